//! Objects: values that are put once and read by reference, from any process of the job.
//!
//! Invariants:
//! 1. A value never changes. Reading it twice, anywhere, gives the same bytes, or a typed error.
//! 2. An object lives as long as a reference to it, in a process or on its way to one, and as long
//!    as the process that created it: its *owner*. What is to live longer is kept: [`Cluster::keep`].
//! 3. A reference may be sent as an argument, returned, or put inside another object.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::codec;
use mobula_core::error::Executed;
use mobula_core::object::{ObjectError, ObjectId};
use mobula_host::TaskContext;
use mobula_host::objects::store::COPY_IN_PLACE_BYTES_MAX;
use mobula_host::objects::{Object, ObjectTable, Payload, PutError, Value, holding, wait_for};
use mobula_wire::object::{Format, Reference};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::kept;
use crate::plain::{self, Plain, SharedSlice};
use crate::task::scope::waiting;

/// A reference to a value of type `T` that some process has put or will produce. Clones are cheap.
pub struct ObjectRef<T> {
    object: Object,
    value: PhantomData<fn() -> T>,
}

/// What [`Cluster::wait`] answers.
#[derive(Debug)]
pub struct Waited<T> {
    /// Those that have come to a value or an error, in the order in which they were given.
    pub ready: Vec<ObjectRef<T>>,
    /// The others.
    pub pending: Vec<ObjectRef<T>>,
}

impl<T> ObjectRef<T> {
    /// A reference to `object`, whose value must be a `T`: reading it is checked.
    #[must_use]
    pub fn from_object(object: Object) -> Self {
        ObjectRef {
            object,
            value: PhantomData,
        }
    }

    /// The reference without its type.
    #[must_use]
    pub fn object(&self) -> &Object {
        &self.object
    }

    /// Which object.
    #[must_use]
    pub fn id(&self) -> ObjectId {
        self.object.id()
    }

    /// Whether it has come to a value or an error, as far as this process knows.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.object.is_settled()
    }
}

impl<T: DeserializeOwned + 'static> ObjectRef<T> {
    /// Waits for the value and reads it. Where producing it failed, that error is returned.
    pub async fn get(&self) -> Result<T> {
        // The usual case first: it needs neither waiting nor asking.
        if let Some(outcome) = self.object.outcome()
            && let Value::Inline(payload) = outcome?
        {
            return self.decode(&payload);
        }
        let payload = waiting(self.object.table().read(&self.object)).await?;
        self.decode(&payload)
    }

    /// As [`get`](ObjectRef::get), giving up after `timeout`: the value may still come.
    pub async fn get_timeout(&self, timeout: Duration) -> Result<T> {
        match tokio::time::timeout(timeout, self.get()).await {
            Ok(value) => value,
            Err(_) => Err(Error::Object(ObjectError::DeadlineExceeded {
                object: self.id(),
                limit_ms: crate::cluster::millis(timeout),
            })),
        }
    }

    pub(crate) fn decode(&self, payload: &Payload) -> Result<T> {
        match payload.bytes.len() {
            0..=COPY_IN_PLACE_BYTES_MAX => self.decode_here(payload),
            _ => mobula_host::actor::run_blocking(|| self.decode_here(payload)),
        }
    }

    fn decode_here(&self, payload: &Payload) -> Result<T> {
        let Payload { format, bytes } = payload;
        let wrong = |reason: String| {
            Error::Object(ObjectError::WrongType {
                object: self.id(),
                reason,
            })
        };
        match *format {
            // References inside are kept by this object until they are registered.
            Format::Encoded => holding(&self.object, || codec::decode(bytes, bytes.len()))
                .map_err(|error| wrong(error.to_string())),
            Format::Plain(element) => plain::decode(element, bytes).map_err(wrong),
        }
    }
}

impl<N: Plain> ObjectRef<Vec<N>> {
    /// Waits for the value and reads it in place: nothing of a large one is copied. The object's
    /// memory is not moved or used again while the slice lives.
    pub async fn view(&self) -> Result<SharedSlice<N>> {
        let payload = waiting(self.object.table().read(&self.object)).await?;
        SharedSlice::new(payload).map_err(|reason| {
            Error::Object(ObjectError::WrongType {
                object: self.id(),
                reason,
            })
        })
    }
}

impl Cluster {
    /// Puts a value: it is encoded once, and read wherever its reference gets to. A vector of
    /// numbers is kept as it is.
    pub async fn put<T: Serialize + 'static>(&self, value: T) -> Result<ObjectRef<T>> {
        let objects = self.objects()?;
        let object = match plain::bytes_of(&value as &dyn Any) {
            Some((element, bytes)) => objects.put_slice(Format::Plain(element), bytes).await?,
            None => objects
                .put_value(&value)
                .await
                .map_err(|error| match error {
                    PutError::Encode(error) => Error::encoding("value to put", error, Executed::No),
                    PutError::Store(error) => error.into(),
                })?,
        };
        Ok(ObjectRef::from_object(object))
    }

    /// Puts numbers, copying them once: what [`put`](Cluster::put) does with a vector of them,
    /// without taking it.
    pub async fn put_slice<N: Plain>(&self, numbers: &[N]) -> Result<ObjectRef<Vec<N>>> {
        let bytes = bytemuck::cast_slice(numbers);
        let objects = self.objects()?;
        let object = objects.put_slice(Format::Plain(N::ELEMENT), bytes).await?;
        Ok(ObjectRef::from_object(object))
    }

    /// Waits until `count` of `references` have come to a value or an error, for at most
    /// `timeout`; answers which have and which have not.
    pub async fn wait<T>(
        &self,
        references: &[ObjectRef<T>],
        count: usize,
        timeout: Duration,
    ) -> Result<Waited<T>> {
        let objects: Vec<&Object> = references.iter().map(ObjectRef::object).collect();
        // Past the timeout the answer says how far it got.
        let _ = tokio::time::timeout(timeout, waiting(wait_for(&objects, count))).await;
        let (ready, pending) = references
            .iter()
            .cloned()
            .partition(|reference| reference.is_ready());
        Ok(Waited { ready, pending })
    }

    /// The objects of this process.
    pub(crate) fn objects(&self) -> Result<&Arc<ObjectTable>> {
        self.runtime()
            .and_then(|runtime| runtime.objects())
            .ok_or_else(|| {
                Error::NotInCluster(
                    "objects belong to a process of a job, and this is none: put them in the \
                     job's main, in a task or in an actor"
                        .to_owned(),
                )
            })
    }
}

impl<T> Clone for ObjectRef<T> {
    fn clone(&self) -> Self {
        ObjectRef::from_object(self.object.clone())
    }
}

impl<T> fmt::Debug for ObjectRef<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "ObjectRef<{}>({})",
            std::any::type_name::<T>(),
            self.id()
        )
    }
}

impl<T> fmt::Display for ObjectRef<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id().fmt(f)
    }
}

impl<T> Serialize for ObjectRef<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.object.export().serialize(serializer)
    }
}

impl<'de, T> Deserialize<'de> for ObjectRef<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let reference = Reference::deserialize(deserializer)?;
        if !kept::may_hold_references() {
            return Err(serde::de::Error::custom("a kept value holds no references"));
        }
        let of_task =
            TaskContext::current().and_then(|task| task.slot().runtime().objects().cloned());
        let objects = of_task
            .or_else(mobula_host::objects::current)
            .ok_or_else(|| {
                serde::de::Error::custom(
                    "a reference to an object can be read in a process of its job only",
                )
            })?;
        Ok(ObjectRef::from_object(objects.import(&reference)))
    }
}

impl From<ObjectError> for Error {
    fn from(error: ObjectError) -> Self {
        match error {
            ObjectError::Failed(error) => Error::Call(error),
            error => Error::Object(error),
        }
    }
}
