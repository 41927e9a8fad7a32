//! A store that fails on purpose: for tests here and for chaos scenarios.
//!
//! Every operation that reaches the store has a number, from 0; faults are planned by number, so a
//! run can be repeated with a crash at each of its steps in turn.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::{BoxStream, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// What happens to one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It never reaches the store; the caller hears that the connection broke.
    BeforeStore,
    /// The store does it, and the reply is lost.
    ReplyLost,
    /// A write stores only this many bytes and reports success, a read brings only this many. Real
    /// stores must not do this; the reader's hashes are what notices it.
    Truncated(usize),
    /// The store answers with a server error (500, 503) and does nothing.
    ServerError,
    /// The store says that the name is taken (409, 412) and does nothing: what S3 answers to one of
    /// two conditional writes at the same time, also where the name is free.
    Conflict,
    /// The store has no space left.
    NoSpace,
    /// The operation takes this much longer, and then succeeds.
    Stalled(Duration),
}

#[derive(Debug, Default)]
struct Plan {
    next: u64,
    planned: BTreeMap<u64, Fault>,
    crash_at: Option<(u64, Fault)>,
    standing: Option<Fault>,
}

/// A store over another one, with planned faults. Clones share the plan.
#[derive(Clone)]
pub struct FaultStore {
    inner: Arc<dyn ObjectStore>,
    plan: Arc<Mutex<Plan>>,
}

impl FaultStore {
    /// Passes everything on to `inner` until faults are planned.
    pub fn new(inner: Arc<dyn ObjectStore>) -> Self {
        FaultStore {
            inner,
            plan: Arc::default(),
        }
    }

    /// Plans a fault for operation number `number`.
    pub fn plan(&self, number: u64, fault: Fault) {
        self.locked().planned.insert(number, fault);
    }

    /// The caller dies at operation number `number`: that one meets `fault`, and everything behind
    /// it never reaches the store.
    pub fn crash_at(&self, number: u64, fault: Fault) {
        self.locked().crash_at = Some((number, fault));
    }

    /// Every operation from now on meets `fault`, until `None` ends that: an outage, or a full disk.
    pub fn stand(&self, fault: Option<Fault>) {
        self.locked().standing = fault;
    }

    /// Forgets all plans and counts from 0 again.
    pub fn reset(&self) {
        *self.locked() = Plan::default();
    }

    /// How many operations have been counted.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.locked().next
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Plan> {
        self.plan
            .lock()
            .expect("no code panics while it holds this lock")
    }

    fn next_fault(&self) -> Option<Fault> {
        let mut plan = self.locked();
        let number = plan.next;
        plan.next += 1;
        match plan.crash_at {
            Some((at, fault)) if number == at => Some(fault),
            Some((at, _)) if number > at => Some(Fault::BeforeStore),
            _ => plan.planned.remove(&number).or(plan.standing),
        }
    }
}

fn broken_connection() -> object_store::Error {
    failed("fault", io::ErrorKind::ConnectionReset)
}

fn failed(store: &'static str, kind: io::ErrorKind) -> object_store::Error {
    object_store::Error::Generic {
        store,
        source: Box::new(io::Error::new(kind, "a planned fault")),
    }
}

/// Runs `operation` on `path` under `fault`.
async fn under<T>(
    fault: Option<Fault>,
    path: &Path,
    operation: impl Future<Output = Result<T>>,
) -> Result<T> {
    match fault {
        Some(Fault::BeforeStore) => Err(broken_connection()),
        Some(Fault::ReplyLost) => operation.await.and_then(|_| Err(broken_connection())),
        // As the library reports what S3 answers: a text without a cause that it knows.
        Some(Fault::ServerError) => Err(failed("S3", io::ErrorKind::Other)),
        Some(Fault::Conflict) => Err(object_store::Error::AlreadyExists {
            path: path.to_string(),
            source: "a planned conflict".into(),
        }),
        Some(Fault::NoSpace) => Err(failed("fault", io::ErrorKind::StorageFull)),
        Some(Fault::Stalled(pause)) => {
            tokio::time::sleep(pause).await;
            operation.await
        }
        Some(Fault::Truncated(_)) | None => operation.await,
    }
}

impl fmt::Debug for FaultStore {
    // Without the inner store, whose text may show credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultStore")
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultStore({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for FaultStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let fault = self.next_fault();
        let payload = match fault {
            Some(Fault::Truncated(kept)) => {
                let bytes = bytes::Bytes::from(payload);
                PutPayload::from(bytes.slice(..kept.min(bytes.len())))
            }
            _ => payload,
        };
        under(
            fault,
            location,
            self.inner.put_opts(location, payload, options),
        )
        .await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        under(
            self.next_fault(),
            location,
            self.inner.put_multipart_opts(location, options),
        )
        .await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let fault = self.next_fault();
        let read = self.inner.get_opts(location, options);
        let result = under(fault, location, read).await?;
        match fault {
            Some(Fault::Truncated(kept)) => truncated(result, kept).await,
            _ => Ok(result),
        }
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        locations
            .then(move |location| {
                let this = this.clone();
                async move {
                    let location = location?;
                    let deletion = this.inner.delete(&location);
                    under(this.next_fault(), &location, deletion)
                        .await
                        .map(|()| location.clone())
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.next_fault() {
            // A full disk can be looked at.
            None | Some(Fault::Truncated(_) | Fault::Stalled(_) | Fault::NoSpace) => {
                self.inner.list(prefix)
            }
            // A list has no name that could be taken: all that fails it is the connection.
            Some(_) => futures::stream::once(async { Err(broken_connection()) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let root = Path::default();
        let list = self.inner.list_with_delimiter(prefix);
        under(self.next_fault(), prefix.unwrap_or(&root), list).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let copy = self.inner.copy_opts(from, to, options);
        under(self.next_fault(), to, copy).await
    }
}

/// The beginning of what was read, as a connection leaves it that ends early and does not say so.
async fn truncated(result: GetResult, kept: usize) -> Result<GetResult> {
    let (meta, range) = (result.meta.clone(), result.range.clone());
    let (attributes, extensions) = (result.attributes.clone(), result.extensions.clone());
    let bytes = result.bytes().await?;
    let kept = bytes.slice(..kept.min(bytes.len()));
    Ok(GetResult {
        payload: GetResultPayload::Stream(futures::stream::once(async { Ok(kept) }).boxed()),
        meta,
        range,
        attributes,
        extensions,
    })
}
