//! The bytes of call messages.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use mobula_core::codec;
use mobula_core::error::CallError;
use mobula_core::id::{ActorId, Incarnation};

use super::{
    CallKey, CallMessageError, CallRequest, CalleeMessage, CallerId, CallerMessage,
    METHOD_BYTES_MAX, MethodName,
};

const REQUEST: u8 = 1;
const CANCEL: u8 = 2;
const CREDIT: u8 = 3;
const VALUE: u8 = 1;
const ERROR: u8 = 2;
const ITEM: u8 = 3;

const HAS_TIMEOUT: u8 = 1;
const HAS_KEY: u8 = 2;
const HAS_WINDOW: u8 = 4;

/// The largest encoded error: its texts are shortened where they are made.
const ERROR_BYTES_MAX: usize = 8 << 20;

impl CallerMessage {
    /// Appends the head to `buffer`; the payload belongs behind it.
    pub fn encode_head(&self, buffer: &mut BytesMut) -> Bytes {
        match self {
            CallerMessage::Request(request) => {
                let flags = flag(request.timeout_ms.is_some(), HAS_TIMEOUT)
                    | flag(request.key.is_some(), HAS_KEY)
                    | flag(request.window.is_some(), HAS_WINDOW);
                buffer.put_u8(REQUEST);
                buffer.put_u8(flags);
                buffer.put_u16_le(request.method.0.len() as u16);
                buffer.put_u32_le(request.call);
                buffer.put_u64_le(request.actor.0);
                buffer.put_u64_le(request.incarnation.0);
                if let Some(timeout_ms) = request.timeout_ms {
                    buffer.put_u64_le(timeout_ms);
                }
                if let Some(CallKey { caller, sequence }) = request.key {
                    buffer.put_u128_le(caller.0);
                    buffer.put_u64_le(sequence);
                }
                if let Some(window) = request.window {
                    buffer.put_u32_le(window);
                }
                buffer.put_slice(&request.method.0);
                request.arguments.clone()
            }
            CallerMessage::Cancel { call, forced } => {
                buffer.put_u8(CANCEL);
                buffer.put_u8(u8::from(*forced));
                buffer.put_u32_le(*call);
                Bytes::new()
            }
            CallerMessage::Credit { call, items } => {
                buffer.put_u8(CREDIT);
                buffer.put_u32_le(*call);
                buffer.put_u32_le(*items);
                Bytes::new()
            }
        }
    }

    /// The message in a frame's payload, whose memory it shares.
    pub fn decode(payload: Bytes) -> Result<Self, CallMessageError> {
        let mut head = Head(payload);
        match head.u8()? {
            REQUEST => {
                let flags = head.u8()?;
                if flags & !(HAS_TIMEOUT | HAS_KEY | HAS_WINDOW) != 0 {
                    return Err(CallMessageError::Unknown {
                        tag: REQUEST,
                        flags,
                    });
                }
                let length_bytes = usize::from(head.u16()?);
                if length_bytes > METHOD_BYTES_MAX {
                    return Err(CallMessageError::MethodTooLong { length_bytes });
                }
                let call = head.u32()?;
                let actor = ActorId(head.u64()?);
                let incarnation = Incarnation(head.u64()?);
                let timeout_ms = match flags & HAS_TIMEOUT {
                    0 => None,
                    _ => Some(head.u64()?),
                };
                let key = match flags & HAS_KEY {
                    0 => None,
                    _ => Some(CallKey {
                        caller: CallerId(head.u128()?),
                        sequence: head.u64()?,
                    }),
                };
                let window = match flags & HAS_WINDOW {
                    0 => None,
                    _ => Some(head.u32()?),
                };
                let method = MethodName::from_utf8(head.take(length_bytes)?)?;
                Ok(CallerMessage::Request(CallRequest {
                    call,
                    actor,
                    incarnation,
                    method,
                    timeout_ms,
                    key,
                    window,
                    arguments: head.0,
                }))
            }
            CANCEL => {
                let forced = match head.u8()? {
                    0 => false,
                    1 => true,
                    flags => return Err(CallMessageError::Unknown { tag: CANCEL, flags }),
                };
                let call = head.u32()?;
                head.end()?;
                Ok(CallerMessage::Cancel { call, forced })
            }
            CREDIT => {
                let (call, items) = (head.u32()?, head.u32()?);
                head.end()?;
                Ok(CallerMessage::Credit { call, items })
            }
            tag => Err(CallMessageError::Unknown { tag, flags: 0 }),
        }
    }

    /// About how many bytes it has encoded.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        match self {
            CallerMessage::Request(request) => {
                64 + request.method.0.len() + request.arguments.len()
            }
            CallerMessage::Cancel { .. } | CallerMessage::Credit { .. } => 16,
        }
    }
}

impl CalleeMessage {
    /// Appends the head to `buffer`; the payload belongs behind it.
    pub fn encode_head(&self, buffer: &mut BytesMut) -> Bytes {
        match self {
            CalleeMessage::Answer {
                call,
                result: Ok(value),
            } => {
                buffer.put_u8(VALUE);
                buffer.put_u32_le(*call);
                value.clone()
            }
            CalleeMessage::Answer {
                call,
                result: Err(error),
            } => {
                buffer.put_u8(ERROR);
                buffer.put_u32_le(*call);
                codec::encode_plain(error).into()
            }
            CalleeMessage::Item {
                call,
                sequence,
                value,
            } => {
                buffer.put_u8(ITEM);
                buffer.put_u32_le(*call);
                buffer.put_u64_le(*sequence);
                value.clone()
            }
        }
    }

    /// The message in a frame's payload, whose memory it shares.
    pub fn decode(payload: Bytes) -> Result<Self, CallMessageError> {
        let mut head = Head(payload);
        match head.u8()? {
            VALUE => Ok(CalleeMessage::Answer {
                call: head.u32()?,
                result: Ok(head.0),
            }),
            ERROR => Ok(CalleeMessage::Answer {
                call: head.u32()?,
                result: Err(codec::decode(&head.0, ERROR_BYTES_MAX)
                    .map_err(|error| CallMessageError::Error(error.to_string()))?),
            }),
            ITEM => Ok(CalleeMessage::Item {
                call: head.u32()?,
                sequence: head.u64()?,
                value: head.0,
            }),
            tag => Err(CallMessageError::Unknown { tag, flags: 0 }),
        }
    }

    /// About how many bytes it has encoded.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        match self {
            CalleeMessage::Answer {
                result: Ok(value), ..
            }
            | CalleeMessage::Item { value, .. } => 32 + value.len(),
            CalleeMessage::Answer {
                result: Err(CallError::User { payload, message }),
                ..
            } => 64 + payload.len() + message.len(),
            CalleeMessage::Answer { result: Err(_), .. } => 256,
        }
    }
}

fn flag(set: bool, bit: u8) -> u8 {
    if set { bit } else { 0 }
}

/// What is left of a payload while its head is read.
struct Head(Bytes);

impl Head {
    fn check(&self, count: usize) -> Result<(), CallMessageError> {
        match count.checked_sub(self.0.len()) {
            None | Some(0) => Ok(()),
            Some(missing_bytes) => Err(CallMessageError::Truncated { missing_bytes }),
        }
    }

    fn u8(&mut self) -> Result<u8, CallMessageError> {
        self.check(1)?;
        Ok(self.0.get_u8())
    }

    fn u16(&mut self) -> Result<u16, CallMessageError> {
        self.check(2)?;
        Ok(self.0.get_u16_le())
    }

    fn u32(&mut self) -> Result<u32, CallMessageError> {
        self.check(4)?;
        Ok(self.0.get_u32_le())
    }

    fn u64(&mut self) -> Result<u64, CallMessageError> {
        self.check(8)?;
        Ok(self.0.get_u64_le())
    }

    fn u128(&mut self) -> Result<u128, CallMessageError> {
        self.check(16)?;
        Ok(self.0.get_u128_le())
    }

    fn take(&mut self, count: usize) -> Result<Bytes, CallMessageError> {
        self.check(count)?;
        Ok(self.0.split_to(count))
    }

    fn end(&self) -> Result<(), CallMessageError> {
        match self.0.len() {
            0 => Ok(()),
            count => Err(CallMessageError::TrailingBytes { count }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::HEAD_BYTES_MAX;
    use super::*;
    use mobula_core::error::Executed;
    use proptest::prelude::*;

    fn joined(head: impl FnOnce(&mut BytesMut) -> Bytes) -> Bytes {
        let mut buffer = BytesMut::new();
        let payload = head(&mut buffer);
        assert!(buffer.len() <= HEAD_BYTES_MAX);
        buffer.extend_from_slice(&payload);
        buffer.freeze()
    }

    fn request(extras: bool) -> CallRequest {
        CallRequest {
            call: 7,
            actor: ActorId(1),
            incarnation: Incarnation(2),
            method: "add".into(),
            timeout_ms: extras.then_some(1500),
            key: extras.then_some(CallKey {
                caller: CallerId(3 << 100),
                sequence: 9,
            }),
            window: extras.then_some(16),
            arguments: Bytes::from_static(b"args"),
        }
    }

    fn caller_messages() -> Vec<CallerMessage> {
        vec![
            CallerMessage::Request(request(false)),
            CallerMessage::Request(request(true)),
            CallerMessage::Cancel {
                call: 1,
                forced: true,
            },
            CallerMessage::Credit { call: 1, items: 8 },
        ]
    }

    fn callee_messages() -> Vec<CalleeMessage> {
        let error = CallError::Cancelled {
            actor: "actor-1".into(),
            executed: Executed::No,
        };
        vec![
            CalleeMessage::Answer {
                call: 3,
                result: Ok(Bytes::from_static(b"value")),
            },
            CalleeMessage::Answer {
                call: 3,
                result: Err(error),
            },
            CalleeMessage::Item {
                call: 3,
                sequence: u64::MAX,
                value: Bytes::from_static(b"item"),
            },
        ]
    }

    #[test]
    fn messages_survive_the_wire() {
        for message in caller_messages() {
            let bytes = joined(|buffer| message.encode_head(buffer));
            assert!(bytes.len() <= message.size_bytes());
            assert_eq!(CallerMessage::decode(bytes).unwrap(), message);
        }
        for message in callee_messages() {
            let bytes = joined(|buffer| message.encode_head(buffer));
            assert_eq!(CalleeMessage::decode(bytes).unwrap(), message);
        }
    }

    #[test]
    fn the_layout_is_what_it_always_was() {
        let bytes = joined(|buffer| CallerMessage::Request(request(false)).encode_head(buffer));
        let mut expected = vec![1, 0, 3, 0, 7, 0, 0, 0];
        expected.extend([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend(b"addargs");
        assert_eq!(bytes, expected);
        let bytes = joined(|buffer| callee_messages()[0].encode_head(buffer));
        assert_eq!(&bytes[..], b"\x01\x03\0\0\0value");
    }

    #[test]
    fn a_head_that_is_cut_or_strange_is_refused() {
        let whole = joined(|buffer| CallerMessage::Request(request(true)).encode_head(buffer));
        for length in 0..whole.len() - 4 {
            assert!(CallerMessage::decode(whole.slice(..length)).is_err());
        }
        let mut flags = whole.to_vec();
        flags[1] = 0xff;
        assert!(matches!(
            CallerMessage::decode(flags.into()),
            Err(CallMessageError::Unknown {
                tag: 1,
                flags: 0xff
            })
        ));
        assert_eq!(
            CallerMessage::decode(Bytes::from_static(&[3, 0, 0, 0, 0, 0, 0, 0, 0, 9])),
            Err(CallMessageError::TrailingBytes { count: 1 })
        );
        assert!(CalleeMessage::decode(Bytes::from_static(&[2, 0, 0, 0, 0, 255])).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_a_message_or_an_error(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..128), tag in 0_u8..5,
        ) {
            if let Some(first) = bytes.first_mut() {
                *first = tag;
            }
            let bytes = Bytes::from(bytes);
            if let Ok(message) = CallerMessage::decode(bytes.clone()) {
                prop_assert_eq!(joined(|buffer| message.encode_head(buffer)), bytes.clone());
            }
            let _ = CalleeMessage::decode(bytes);
        }
    }
}
