//! Plain values: vectors of numbers, whose bytes in memory are the value.

use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use bytemuck::Pod;
use bytes::Bytes;
use mobula_host::objects::Payload;
use mobula_wire::object::{Element, Format};
use serde::de::DeserializeOwned;
use serde::de::IntoDeserializer;
use serde::de::value::SeqDeserializer;

mod sealed {
    pub trait Sealed {}
}

/// A number whose vectors are kept as they are in memory: the integers of 8 to 64 bits, `f32` and
/// `f64`.
pub trait Plain: sealed::Sealed + Pod + Send + Sync {
    /// How the wire calls it.
    #[doc(hidden)]
    const ELEMENT: Element;
}

macro_rules! plain {
    ($($number:ty => $element:ident),*) => {
        $(
            impl sealed::Sealed for $number {}
            impl Plain for $number {
                const ELEMENT: Element = Element::$element;
            }
        )*

        /// The bytes of a vector of numbers; `None` for any other value.
        pub(crate) fn bytes_of(value: &dyn Any) -> Option<(Element, &[u8])> {
            $(
                if let Some(numbers) = value.downcast_ref::<Vec<$number>>() {
                    return Some((Element::$element, bytemuck::cast_slice(numbers)));
                }
            )*
            None
        }

        /// Reads numbers as whatever a sequence of them can be read as.
        pub(crate) fn decode<T: DeserializeOwned + 'static>(
            element: Element,
            bytes: &[u8],
        ) -> Result<T, String> {
            match element {
                $(Element::$element => decode_as::<$number, T>(bytes),)*
            }
        }

    };
}

plain! {
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64,
    f32 => F32, f64 => F64
}

fn decode_as<N, T>(bytes: &[u8]) -> Result<T, String>
where
    N: Plain + IntoDeserializer<'static, serde::de::value::Error>,
    T: DeserializeOwned + 'static,
{
    let numbers = numbers_of::<N>(bytes)?;
    let mut value: Option<T> = None;
    // The usual case, without a look at each number.
    if let Some(same) = (&mut value as &mut dyn Any).downcast_mut::<Option<Vec<N>>>() {
        *same = Some(numbers);
    } else {
        let sequence = SeqDeserializer::<_, serde::de::value::Error>::new(numbers.into_iter());
        value = Some(
            T::deserialize(sequence)
                .map_err(|error| format!("it holds numbers of type {:?}: {error}", N::ELEMENT))?,
        );
    }
    Ok(value.expect("both ways set it"))
}

fn numbers_of<N: Plain>(bytes: &[u8]) -> Result<Vec<N>, String> {
    if !bytes.len().is_multiple_of(size_of::<N>()) {
        return Err(format!(
            "its {} bytes are not a whole number of {:?}",
            bytes.len(),
            N::ELEMENT
        ));
    }
    let mut numbers = vec![N::zeroed(); bytes.len() / size_of::<N>()];
    bytemuck::cast_slice_mut(&mut numbers).copy_from_slice(bytes);
    Ok(numbers)
}

/// Numbers of an object, read in place. Clones are the same memory.
#[derive(Clone)]
pub struct SharedSlice<N> {
    numbers: Numbers<N>,
}

#[derive(Clone)]
enum Numbers<N> {
    /// Aligned for `N`.
    InPlace(Bytes),
    /// A small value, which comes in a message at any address.
    Copied(Arc<[N]>),
}

impl<N: Plain> SharedSlice<N> {
    pub(crate) fn new(payload: Payload) -> Result<Self, String> {
        match payload.format {
            Format::Plain(element) if element == N::ELEMENT => {}
            Format::Plain(element) => {
                return Err(format!(
                    "it holds numbers of type {element:?}, not {:?}",
                    N::ELEMENT
                ));
            }
            Format::Encoded => {
                return Err("it was put as an encoded value: read it with `get`".to_owned());
            }
        }
        let numbers = match bytemuck::try_cast_slice::<u8, N>(&payload.bytes) {
            Ok(_) => Numbers::InPlace(payload.bytes),
            Err(_) => Numbers::Copied(numbers_of::<N>(&payload.bytes)?.into()),
        };
        Ok(SharedSlice { numbers })
    }
}

impl<N: Plain> Deref for SharedSlice<N> {
    type Target = [N];

    fn deref(&self) -> &[N] {
        match &self.numbers {
            Numbers::InPlace(bytes) => bytemuck::cast_slice(bytes),
            Numbers::Copied(numbers) => numbers,
        }
    }
}

impl<N: Plain + fmt::Debug> fmt::Debug for SharedSlice<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_as_what_they_were_and_as_other_sequences() {
        let numbers = vec![1.5f32, -2.0, f32::NAN];
        let (element, bytes) = bytes_of(&numbers).unwrap();
        assert_eq!((element, bytes.len()), (Element::F32, 12));
        let back: Vec<f32> = decode(element, bytes).unwrap();
        assert_eq!(
            back.iter().map(|n| n.to_bits()).collect::<Vec<_>>(),
            numbers.iter().map(|n| n.to_bits()).collect::<Vec<_>>()
        );
        let bytes = bytemuck::cast_slice(&[3u16, 4]);
        let set: std::collections::BTreeSet<u64> = decode(Element::U16, bytes).unwrap();
        assert_eq!(set.into_iter().collect::<Vec<_>>(), [3, 4]);
        let error = decode::<String>(Element::U16, bytes).unwrap_err();
        assert!(error.contains("U16"), "{error}");
        assert!(decode::<Vec<u16>>(Element::U16, &[1]).is_err());
        assert!(bytes_of(&"text").is_none());
    }
}
