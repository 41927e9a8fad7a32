//! Making calls: one ordered stream from this process to each host, shared by all callers.
//!
//! Invariants:
//! 1. Calls reach a host in the order in which [`CallClient::start`] took them.
//! 2. A call that was never handed to the transport failed as *not executed*; one that was, and
//!    whose stream then broke, as *unknown*.
//! 3. Nothing is sent twice from here: sending again is the decision of who knows the new address.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use mobula_core::error::{CallError, Executed};
use mobula_core::id::ActorId;
use mobula_core::order::ActorAddress;
use mobula_net::endpoint::{Endpoint, LaneClass};
use mobula_net::identity::Role;
use mobula_net::lane::{FramedReceiver, FramedSender};
use mobula_wire::call::{CallReply, CallRequest};
use mobula_wire::hello::Lane;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::calls::COALESCED_BYTES;
use crate::mailbox::{CallResult, Deadline, IncomingCall, Reply, VALUE_BYTES_MAX, unavailable};
use crate::supervision::ActorTable;

/// Hosts that one process calls at once; each costs a connection.
pub const HOSTS_MAX: usize = 4096;

/// Calls that wait to be written to one host; beyond that callers wait.
const OUTGOING_MAX: usize = 1024;

/// The longest a call's method may be named, in bytes.
const METHOD_BYTES_MAX: usize = 256;

/// Calls to actors anywhere in the cluster. Clones share their streams.
#[derive(Clone)]
pub struct CallClient(Arc<ClientInner>);

struct ClientInner {
    endpoint: Endpoint,
    /// The actors of this very process, and the address under which others call them.
    local: Option<(SocketAddr, Weak<ActorTable>)>,
    streams: Mutex<HashMap<SocketAddr, Arc<HostStream>>>,
    /// Ends the streams' tasks with the last client.
    ended: CancellationToken,
}

impl Drop for ClientInner {
    fn drop(&mut self) {
        self.ended.cancel();
    }
}

impl CallClient {
    /// A client that calls from `endpoint`; calls to `local` actors do not leave the process.
    #[must_use]
    pub fn new(endpoint: Endpoint, local: Option<(SocketAddr, Weak<ActorTable>)>) -> Self {
        CallClient(Arc::new(ClientInner {
            endpoint,
            local,
            streams: Mutex::new(HashMap::new()),
            ended: CancellationToken::new(),
        }))
    }

    /// Where this process takes calls itself.
    #[must_use]
    pub fn own_address(&self) -> Option<SocketAddr> {
        self.0.local.as_ref().map(|(address, _)| *address)
    }

    /// Makes a call and waits for its answer.
    pub async fn call(
        &self,
        target: &ActorAddress,
        method: &str,
        arguments: Vec<u8>,
        deadline: Option<Deadline>,
    ) -> CallResult {
        self.start(target, method, arguments, deadline)
            .await
            .answer()
            .await
    }

    /// Makes a call. When this returns, its place in the order of calls is taken.
    pub async fn start(
        &self,
        target: &ActorAddress,
        method: &str,
        arguments: Vec<u8>,
        deadline: Option<Deadline>,
    ) -> PendingCall {
        let actor = target.actor;
        let failed = |error| PendingCall {
            actor,
            deadline,
            state: PendingState::Failed(error),
        };
        if arguments.len() > VALUE_BYTES_MAX || method.len() > METHOD_BYTES_MAX {
            return failed(CallError::BadCall(format!(
                "the arguments of `{method}` have {} bytes encoded, the limit is \
                 {VALUE_BYTES_MAX}: pass them in parts, or store them and pass where they are",
                arguments.len()
            )));
        }
        let Ok(address) = target.call_address.parse::<SocketAddr>() else {
            let reason = format!("`{}` is not an address (ip:port)", target.call_address);
            return failed(unavailable(actor, reason, Executed::No));
        };
        if let Some((own, table)) = &self.0.local
            && *own == address
            && let Some(table) = table.upgrade()
        {
            let (reply, receiver) = Reply::same_process(actor);
            let call = IncomingCall {
                method: method.to_owned(),
                arguments,
                deadline,
                reply,
            };
            table.admit(actor, target.incarnation, call);
            return PendingCall {
                actor,
                deadline,
                state: PendingState::SameProcess(receiver),
            };
        }
        let stream = match self.stream(address) {
            Ok(stream) => stream,
            Err(reason) => return failed(unavailable(actor, reason, Executed::No)),
        };
        let request = CallRequest {
            call: stream.next_call.fetch_add(1, Ordering::Relaxed),
            actor,
            incarnation: target.incarnation,
            method: method.to_owned(),
            timeout_ms: deadline.map(|deadline| {
                let left = deadline.at.saturating_duration_since(Instant::now());
                u64::try_from(left.as_millis()).unwrap_or(u64::MAX)
            }),
            arguments,
        };
        stream.enqueue(request, deadline).await
    }

    fn stream(&self, address: SocketAddr) -> Result<Arc<HostStream>, String> {
        let mut streams = self.0.streams.lock();
        if let Some(stream) = streams.get(&address)
            && !stream.outgoing.is_closed()
        {
            return Ok(Arc::clone(stream));
        }
        // A new host is rare enough to look through all of them for those that are gone.
        streams.retain(|_, stream| !stream.outgoing.is_closed());
        if streams.len() >= HOSTS_MAX {
            return Err(format!(
                "this process calls {HOSTS_MAX} hosts already, its limit"
            ));
        }
        let (outgoing, requests) = mpsc::channel(OUTGOING_MAX);
        let stream = Arc::new(HostStream {
            outgoing,
            unanswered: Mutex::new(Unanswered::default()),
            next_call: AtomicU64::new(0),
        });
        // Ends when the stream breaks, or by the token; its answers are in `unanswered`.
        let endpoint = self.0.endpoint.clone();
        let ended = self.0.ended.clone();
        let weak = Arc::downgrade(&stream);
        tokio::spawn(async move {
            let reason = tokio::select! {
                reason = run_stream(&endpoint, address, requests, &weak) => reason,
                () = ended.cancelled() => "this process stopped calling".to_owned(),
            };
            if let Some(stream) = weak.upgrade() {
                stream.fail_all(&reason);
            }
        });
        streams.insert(address, Arc::clone(&stream));
        Ok(stream)
    }
}

impl std::fmt::Debug for CallClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CallClient")
            .field("own_address", &self.own_address())
            .finish_non_exhaustive()
    }
}

struct HostStream {
    outgoing: mpsc::Sender<CallRequest>,
    unanswered: Mutex<Unanswered>,
    next_call: AtomicU64,
}

#[derive(Default)]
struct Unanswered {
    calls: HashMap<u64, UnansweredCall>,
    /// Why the stream ended, once it has.
    ended: Option<String>,
}

struct UnansweredCall {
    actor: ActorId,
    sent: bool,
    answer: oneshot::Sender<CallResult>,
}

impl HostStream {
    async fn enqueue(
        self: Arc<Self>,
        request: CallRequest,
        deadline: Option<Deadline>,
    ) -> PendingCall {
        let (actor, call) = (request.actor, request.call);
        let (answer, receiver) = oneshot::channel();
        {
            let mut unanswered = self.unanswered.lock();
            if let Some(reason) = &unanswered.ended {
                let error = unavailable(actor, reason.clone(), Executed::No);
                return PendingCall {
                    actor,
                    deadline,
                    state: PendingState::Failed(error),
                };
            }
            unanswered.calls.insert(
                call,
                UnansweredCall {
                    actor,
                    sent: false,
                    answer,
                },
            );
        }
        let pending = PendingCall {
            actor,
            deadline,
            state: PendingState::Sent {
                call,
                stream: Arc::clone(&self),
                receiver,
            },
        };
        let sending = self.outgoing.send(request);
        match deadline {
            // Past the deadline the entry stays unsent, and `answer` reports just that. A closed
            // channel means that `fail_all` has answered or is about to.
            Some(deadline) => drop(tokio::time::timeout_at(deadline.at, sending).await),
            None => drop(sending.await),
        }
        pending
    }

    fn fail_all(&self, reason: &str) {
        let calls = {
            let mut unanswered = self.unanswered.lock();
            unanswered.ended = Some(reason.to_owned());
            std::mem::take(&mut unanswered.calls)
        };
        for (
            _,
            UnansweredCall {
                actor,
                sent,
                answer,
            },
        ) in calls
        {
            let executed = if sent {
                Executed::Unknown
            } else {
                Executed::No
            };
            // Whoever gave up waiting is not there to be told.
            let _ = answer.send(Err(unavailable(actor, reason, executed)));
        }
    }
}

/// Connects, then writes requests and reads answers until either side fails; answers why.
async fn run_stream(
    endpoint: &Endpoint,
    address: SocketAddr,
    requests: mpsc::Receiver<CallRequest>,
    stream: &Weak<HostStream>,
) -> String {
    let connection = match endpoint
        .connect(address, LaneClass::Control, Role::Host)
        .await
    {
        Ok(connection) => connection,
        Err(error) => return format!("its host {address} does not take the connection: {error}"),
    };
    let framed = match connection.open(Lane::Call).await {
        Ok(framed) => framed,
        Err(error) => return format!("its host {address} does not open a call stream: {error}"),
    };
    let (sender, receiver) = framed.split();
    let reason = tokio::select! {
        reason = write_requests(sender, requests, stream) => reason,
        reason = read_answers(receiver, stream) => reason,
    };
    connection.close("the call stream ended");
    format!("the connection to its host {address} is lost: {reason}")
}

async fn write_requests(
    mut sender: FramedSender,
    mut requests: mpsc::Receiver<CallRequest>,
    stream: &Weak<HostStream>,
) -> String {
    while let Some(first) = requests.recv().await {
        let mut next = Some(first);
        while let Some(request) = next.take() {
            let Some(stream) = stream.upgrade() else {
                break;
            };
            if stream.begin_sending(request.call)
                && let Err(error) = sender.queue_message(&request)
            {
                return error.to_string();
            }
            if sender.queued_bytes() < COALESCED_BYTES {
                next = requests.try_recv().ok();
            }
        }
        if let Err(error) = sender.flush().await {
            return error.to_string();
        }
    }
    "no caller is left".to_owned()
}

impl HostStream {
    /// Marks a call as handed to the transport; false when its caller has given up already.
    fn begin_sending(&self, call: u64) -> bool {
        match self.unanswered.lock().calls.get_mut(&call) {
            Some(unanswered) => {
                unanswered.sent = true;
                true
            }
            None => false,
        }
    }
}

async fn read_answers(mut receiver: FramedReceiver, stream: &Weak<HostStream>) -> String {
    loop {
        match receiver.receive_message::<CallReply>().await {
            Ok(Some(CallReply { call, result })) => {
                let Some(stream) = stream.upgrade() else {
                    return "no caller is left".to_owned();
                };
                let waiting = stream.unanswered.lock().calls.remove(&call);
                if let Some(waiting) = waiting {
                    let _ = waiting.answer.send(result);
                }
            }
            Ok(None) => return "the host ended the stream".to_owned(),
            Err(error) => return error.to_string(),
        }
    }
}

enum PendingState {
    Failed(CallError),
    SameProcess(oneshot::Receiver<CallResult>),
    Sent {
        call: u64,
        stream: Arc<HostStream>,
        receiver: oneshot::Receiver<CallResult>,
    },
}

/// A call whose answer is still to come. Dropping it gives up on the answer; a method that has
/// begun runs to its end all the same.
#[must_use = "the outcome of a call is only known once it is answered"]
pub struct PendingCall {
    actor: ActorId,
    deadline: Option<Deadline>,
    state: PendingState,
}

impl PendingCall {
    /// Waits for the answer, up to the deadline.
    pub async fn answer(self) -> CallResult {
        let PendingCall {
            actor,
            deadline,
            state,
        } = self;
        match state {
            PendingState::Failed(error) => Err(error),
            PendingState::SameProcess(receiver) => match within(deadline, receiver).await {
                Some(Ok(result)) => result,
                Some(Err(_)) => Err(unavailable(
                    actor,
                    "it ended with this process",
                    Executed::Unknown,
                )),
                None => Err(expired(deadline, actor, Executed::Unknown)),
            },
            PendingState::Sent {
                call,
                stream,
                receiver,
            } => {
                let abandoned = Abandon {
                    call,
                    stream: &stream,
                };
                match within(deadline, receiver).await {
                    Some(Ok(result)) => result,
                    Some(Err(_)) => {
                        Err(unavailable(actor, "its answer is lost", Executed::Unknown))
                    }
                    None => {
                        let executed = match abandoned.give_up() {
                            Some(false) => Executed::No,
                            _ => Executed::Unknown,
                        };
                        Err(expired(deadline, actor, executed))
                    }
                }
            }
        }
    }
}

async fn within<F: Future>(deadline: Option<Deadline>, future: F) -> Option<F::Output> {
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline.at, future).await.ok(),
        None => Some(future.await),
    }
}

fn expired(deadline: Option<Deadline>, actor: ActorId, executed: Executed) -> CallError {
    match deadline {
        Some(deadline) => deadline.error(actor, executed),
        None => unavailable(actor, "its answer is lost", executed),
    }
}

/// Forgets a call when nobody waits for it any more.
struct Abandon<'a> {
    call: u64,
    stream: &'a HostStream,
}

impl Abandon<'_> {
    /// Whether the call had been sent; `None` if it is answered.
    fn give_up(&self) -> Option<bool> {
        self.stream
            .unanswered
            .lock()
            .calls
            .remove(&self.call)
            .map(|waiting| waiting.sent)
    }
}

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        self.give_up();
    }
}
