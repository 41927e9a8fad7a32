//! Kept objects: values that the job owns by name, and not the process that put them.
//!
//! Invariants:
//! 1. What [`Cluster::kept`] reads under a name is what was kept under it, bit for bit, or an error.
//! 2. A kept value depends on nobody: there are no references to objects in it.

use std::cell::Cell;
use std::sync::Arc;

use mobula_core::control::ModuleId;
use mobula_core::error::Executed;
use mobula_core::kept::{KeptCommand, KeptError, KeptNames, KeptObject, KeptQuery};
use mobula_host::HostRuntime;
use mobula_host::objects::Payload;
use mobula_wire::object::Format;
use serde::de::DeserializeOwned;

use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::object::ObjectRef;
use crate::task::scope::waiting;

impl Cluster {
    /// Keeps the value of an object under a name, for the job: from then on it is there until it is
    /// dropped or the job is over, whichever of the job's processes end. Waits for the value.
    ///
    /// A name has one value. Keeping the same one again changes nothing; another is refused with
    /// [`AlreadyExists`](mobula_core::ErrorCode::AlreadyExists). Errors of the value itself are
    /// [`Error::Kept`], and so is a value in which there are references to objects.
    pub async fn keep<T: DeserializeOwned + 'static>(
        &self,
        name: &str,
        object: &ObjectRef<T>,
    ) -> Result<()> {
        let job = self.required_job()?;
        let runtime = self.keeping_runtime()?;
        let table = object.object().table();
        let payload = waiting(table.read(object.object())).await?;
        check(name, object, &payload)?;
        let value = runtime.store_kept(name, payload).await?;
        let command = KeptCommand::Keep {
            job,
            holder: self.holder,
            name: name.to_owned(),
            value,
        };
        self.apply(ModuleId::KEPT, command.encode()).await?;
        Ok(())
    }

    /// What the job keeps under a name, as an object of this process: its bytes are fetched from the
    /// object store and verified. `None` if there is nothing of this name.
    ///
    /// Each call makes an object of its own: pass the reference on where several processes need it.
    pub async fn kept<T>(&self, name: &str) -> Result<Option<ObjectRef<T>>> {
        let runtime = self.keeping_runtime()?;
        let found = self.ask_kept(KeptNames::One(name.to_owned())).await?;
        let Some(kept) = found.first() else {
            return Ok(None);
        };
        let object = runtime.fetch_kept(self.objects()?, kept).await?;
        Ok(Some(ObjectRef::from_object(object)))
    }

    /// Drops what the job keeps under a name; answers whether there was something. Objects that
    /// processes have made of it by [`kept`](Cluster::kept) stay.
    pub async fn drop_kept(&self, name: &str) -> Result<bool> {
        let command = KeptCommand::Drop {
            job: self.required_job()?,
            holder: self.holder,
            name: name.to_owned(),
        };
        let answer = self.apply(ModuleId::KEPT, command.encode()).await?;
        KeptCommand::was_there(&answer)
            .map_err(|error| Error::encoding("the head's answer", error, Executed::Yes))
    }

    /// All that the job keeps, by name and without the bytes. Programs outside of the job ask by
    /// [`in_job`](Cluster::in_job).
    pub async fn kept_objects(&self) -> Result<Vec<KeptObject>> {
        let mut objects: Vec<KeptObject> = Vec::new();
        loop {
            let after = objects.last().map(|last| last.name.clone());
            let which = KeptNames::After(after.unwrap_or_default());
            let page = self.ask_kept(which).await?;
            if page.is_empty() {
                return Ok(objects);
            }
            objects.extend(page);
        }
    }

    async fn ask_kept(&self, which: KeptNames) -> Result<Vec<KeptObject>> {
        let job = self.required_job()?;
        let query = KeptQuery { job, which };
        let answer = self.query(ModuleId::KEPT, query.encode()).await?;
        KeptQuery::answer(&answer)
            .map_err(|error| Error::encoding("the head's answer", error, Executed::No))
    }

    fn keeping_runtime(&self) -> Result<&Arc<HostRuntime>> {
        self.runtime().ok_or_else(|| {
            Error::NotInCluster(
                "only a job's own processes keep values and read what is kept, and this is none: do \
                 it in the job's main, in a task or in an actor"
                    .to_owned(),
            )
        })
    }
}

/// Refuses a value that is no `T`, or in which there are references.
fn check<T: DeserializeOwned + 'static>(
    name: &str,
    object: &ObjectRef<T>,
    payload: &Payload,
) -> Result<()> {
    if let Format::Plain(_) = payload.format {
        return Ok(());
    }
    // Decoded on this thread from beginning to end.
    let _restore = Restore(REFERENCES.replace(References::Refused));
    let decoded = object.decode(payload);
    match REFERENCES.get() {
        References::Met => Err(Error::Kept(KeptError::HoldsReferences {
            name: name.to_owned(),
        })),
        References::Allowed | References::Refused => decoded.map(drop),
    }
}

/// Puts back what was there before, on a panic of a user's type too.
struct Restore(References);

impl Drop for Restore {
    fn drop(&mut self) {
        REFERENCES.set(self.0);
    }
}

/// What becomes of references in a value that this thread decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum References {
    Allowed,
    Refused,
    /// They are refused, and there was one.
    Met,
}

thread_local! {
    static REFERENCES: Cell<References> = const { Cell::new(References::Allowed) };
}

/// Whether a reference to an object may be taken in now.
pub(crate) fn may_hold_references() -> bool {
    let is_allowed = REFERENCES.get() == References::Allowed;
    if !is_allowed {
        REFERENCES.set(References::Met);
    }
    is_allowed
}

impl From<KeptError> for Error {
    fn from(error: KeptError) -> Self {
        match error {
            KeptError::Object(error) => error.into(),
            error => Error::Kept(error),
        }
    }
}
