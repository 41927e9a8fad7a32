//! Making calls: one ordered stream from this process to each host, shared by all callers, and some more for calls
//! that need no order.
//!
//! Invariants:
//! 1. Calls reach a host in the order in which [`CallClient::start`] took them, but for those that need none
//!    ([`CallOrder::Any`]).
//! 2. A call that was never handed to the transport failed as *not executed*; one that was, and
//!    whose stream then broke, as *unknown*.
//! 3. Nothing is sent twice from here: sending again is the decision of who knows the new address.
//! 4. A host on this machine is called over a Unix socket if it offers one, any other over QUIC.
//!    The choice is made once for a stream, before its first call is written, so order holds.

mod stream;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use bytes::Bytes;
use mobula_core::error::{CallError, Executed};
use mobula_core::id::{ActorId, Incarnation};
use mobula_core::order::ActorAddress;
use mobula_net::endpoint::Endpoint;
use mobula_net::same_machine::is_own_address;
use mobula_wire::call::{CallKey, CallRequest, METHOD_BYTES_MAX, MethodName, STREAM_WINDOW_MAX};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::host_stream::{HostStream, NewCall};
use crate::mailbox::{Deadline, IncomingCall};
use crate::pending::Route;
pub use crate::pending::{PendingCall, PendingStream, StreamEvent};
use crate::reply::{CallResult, Reply, VALUE_BYTES_MAX, unavailable};
use crate::supervision::ActorTable;

/// Streams that one process has to others at once; each costs a connection.
pub const STREAMS_MAX: usize = 4096;

/// Connections to a host beside the ordered one, for calls that need no order. One connection's packets are
/// encrypted and acknowledged by one task, so several are faster than one where there are processors for them.
pub const LARGE_STREAMS: u8 = 3;

/// Which ways to other processes a client takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paths {
    /// The fastest that there is.
    Any,
    /// QUIC also to hosts on this machine.
    QuicOnly,
}

/// The way that calls to one host take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallPath {
    /// A mailbox of this process.
    SameProcess,
    /// A Unix socket.
    SameMachine,
    /// QUIC.
    Network,
}

/// Whether a call has a place among the calls to its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CallOrder {
    /// It comes after those that were started before.
    #[default]
    Kept,
    /// It may overtake others and be overtaken. Between machines it goes over one of [`LARGE_STREAMS`] connections
    /// of its own kind, so that it neither waits for large values of other calls nor has those wait for its own.
    Any,
}

/// A call to make.
#[derive(Debug, Clone)]
pub struct OutgoingCall {
    /// The method's name.
    pub method: MethodName,
    /// The encoded arguments.
    pub arguments: Bytes,
    /// When the caller gives up.
    pub deadline: Option<Deadline>,
    /// By which a repetition is recognized: the same for each time that the call is sent.
    pub key: Option<CallKey>,
    /// Whether it keeps its place among other calls.
    pub order: CallOrder,
}

impl OutgoingCall {
    /// A call without deadline or key, in its order.
    pub fn new(method: impl Into<MethodName>, arguments: impl Into<Bytes>) -> Self {
        OutgoingCall {
            method: method.into(),
            arguments: arguments.into(),
            deadline: None,
            key: None,
            order: CallOrder::Kept,
        }
    }

    /// The same with a deadline, or without.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Option<Deadline>) -> Self {
        self.deadline = deadline;
        self
    }

    /// The same with a key, or without.
    #[must_use]
    pub fn with_key(mut self, key: Option<CallKey>) -> Self {
        self.key = key;
        self
    }

    /// The same in another order.
    #[must_use]
    pub fn in_order(mut self, order: CallOrder) -> Self {
        self.order = order;
        self
    }
}

/// An actor's address as calls use it: looked at once, for all calls to one start of an actor.
#[derive(Clone)]
pub struct CallRoute(Arc<RouteInner>);

struct RouteInner {
    actor: ActorId,
    incarnation: Incarnation,
    address: SocketAddr,
    /// Whether that is on this machine, once somebody wanted to know.
    is_near: OnceLock<bool>,
    /// The stream that the last call took: it saves the look into the table of streams.
    stream: Mutex<Option<Arc<HostStream>>>,
}

/// One of the streams to a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum StreamKind {
    /// All calls that keep their order.
    Ordered,
    /// Some of those that need none.
    Large(u8),
}

impl CallRoute {
    /// The route to `target`.
    pub fn new(target: &ActorAddress) -> Result<Self, CallError> {
        let address = target.call_address.parse::<SocketAddr>().map_err(|_| {
            let reason = format!("`{}` is not an address (ip:port)", target.call_address);
            unavailable(target.actor, reason, Executed::No)
        })?;
        Ok(CallRoute(Arc::new(RouteInner {
            actor: target.actor,
            incarnation: target.incarnation,
            address,
            is_near: OnceLock::new(),
            stream: Mutex::new(None),
        })))
    }

    /// The start of the actor that it leads to.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.0.incarnation
    }
}

impl std::fmt::Debug for CallRoute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CallRoute")
            .field("actor", &self.0.actor)
            .field("incarnation", &self.0.incarnation)
            .field("address", &self.0.address)
            .finish_non_exhaustive()
    }
}

/// A call on its way, or what it still has to wait for.
enum Prepared {
    Done(Route),
    Remote(Arc<HostStream>, NewCall),
}

impl From<NewCall> for OutgoingCall {
    fn from(new: NewCall) -> Self {
        OutgoingCall {
            method: new.request.method,
            arguments: new.request.arguments,
            deadline: new.deadline,
            key: new.request.key,
            order: new.order,
        }
    }
}

/// Calls to actors anywhere in the cluster. Clones share their streams.
#[derive(Clone)]
pub struct CallClient(Arc<ClientInner>);

struct ClientInner {
    endpoint: Endpoint,
    /// The actors of this very process, and the address under which others call them.
    local: Option<(SocketAddr, Weak<ActorTable>)>,
    paths: Paths,
    streams: Mutex<HashMap<(SocketAddr, StreamKind), Arc<HostStream>>>,
    /// Whose turn it is among the streams for large calls.
    turn: AtomicU8,
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
        CallClient::with_paths(endpoint, local, Paths::Any)
    }

    /// The same over some ways only, to measure and to test them.
    #[must_use]
    pub fn with_paths(
        endpoint: Endpoint,
        local: Option<(SocketAddr, Weak<ActorTable>)>,
        paths: Paths,
    ) -> Self {
        CallClient(Arc::new(ClientInner {
            endpoint,
            local,
            paths,
            streams: Mutex::new(HashMap::new()),
            turn: AtomicU8::new(0),
            ended: CancellationToken::new(),
        }))
    }

    /// Where this process takes calls itself.
    #[must_use]
    pub fn own_address(&self) -> Option<SocketAddr> {
        self.0.local.as_ref().map(|(address, _)| *address)
    }

    /// The way to the host at `address`, once it was called.
    #[must_use]
    pub fn path_to(&self, address: SocketAddr) -> Option<CallPath> {
        if self.own_address() == Some(address) {
            return Some(CallPath::SameProcess);
        }
        let streams = self.0.streams.lock();
        let stream = streams.get(&(address, StreamKind::Ordered))?;
        stream.path.get().copied()
    }

    /// Makes a call and waits for its answer.
    pub async fn call(&self, target: &ActorAddress, call: OutgoingCall) -> CallResult {
        self.start(target, call).await.answer().await
    }

    /// Makes a call. When this returns, its place in the order of calls is taken.
    pub async fn start(&self, target: &ActorAddress, call: OutgoingCall) -> PendingCall {
        match CallRoute::new(target) {
            Ok(route) => self.start_on(&route, call).await,
            Err(error) => PendingCall::new(target.actor, call.deadline, Route::Failed(error)),
        }
    }

    /// Makes a call that brings several values, of which at most `window` (1 to
    /// [`STREAM_WINDOW_MAX`]) wait here to be read. When this returns, its place in the order of
    /// calls is taken.
    pub async fn start_stream(
        &self,
        target: &ActorAddress,
        call: OutgoingCall,
        window: u32,
    ) -> PendingStream {
        match CallRoute::new(target) {
            Ok(route) => self.start_stream_on(&route, call, window).await,
            Err(error) => PendingStream::new(target.actor, call.deadline, Route::Failed(error)),
        }
    }

    /// As [`CallClient::start`], for whoever calls one actor often.
    pub async fn start_on(&self, route: &CallRoute, call: OutgoingCall) -> PendingCall {
        let deadline = call.deadline;
        PendingCall::new(route.0.actor, deadline, self.begin(route, call, None).await)
    }

    /// As [`CallClient::start_stream`], for whoever calls one actor often.
    pub async fn start_stream_on(
        &self,
        route: &CallRoute,
        call: OutgoingCall,
        window: u32,
    ) -> PendingStream {
        let deadline = call.deadline;
        let window = window.clamp(1, STREAM_WINDOW_MAX);
        let begun = self.begin(route, call, Some(window)).await;
        PendingStream::new(route.0.actor, deadline, begun)
    }

    /// As [`CallClient::start_on`] if there is room for the call at once; otherwise it stays in
    /// `call`.
    pub fn try_start_on(
        &self,
        route: &CallRoute,
        call: &mut Option<OutgoingCall>,
    ) -> Option<PendingCall> {
        let deadline = call.as_ref()?.deadline;
        let begun = match self.prepare(route, call.take()?, None) {
            Prepared::Done(begun) => begun,
            Prepared::Remote(stream, new) => {
                let mut new = Some(new);
                match stream.try_enter(&mut new) {
                    Some(Ok(sent)) => Route::Stream(sent),
                    Some(Err(error)) => Route::Failed(error),
                    None => {
                        *call = new.map(OutgoingCall::from);
                        return None;
                    }
                }
            }
        };
        Some(PendingCall::new(route.0.actor, deadline, begun))
    }

    async fn begin(&self, route: &CallRoute, call: OutgoingCall, window: Option<u32>) -> Route {
        match self.prepare(route, call, window) {
            Prepared::Done(begun) => begun,
            Prepared::Remote(stream, new) => match stream.enter(new).await {
                Ok(sent) => Route::Stream(sent),
                Err(error) => Route::Failed(error),
            },
        }
    }

    /// All that a call needs no waiting for.
    fn prepare(&self, route: &CallRoute, call: OutgoingCall, window: Option<u32>) -> Prepared {
        let RouteInner {
            actor,
            incarnation,
            address,
            ..
        } = *route.0;
        let OutgoingCall {
            method,
            arguments,
            deadline,
            key,
            order,
        } = call;
        if arguments.len() > VALUE_BYTES_MAX || method.len() > METHOD_BYTES_MAX {
            return Prepared::Done(Route::Failed(CallError::BadCall(format!(
                "the arguments of `{method}` have {} bytes encoded, the limit is \
                 {VALUE_BYTES_MAX}: pass them in parts, or store them and pass where they are",
                arguments.len()
            ))));
        }
        if let Some((own, table)) = &self.0.local
            && *own == address
            && let Some(table) = table.upgrade()
        {
            let (reply, pending) = Reply::same_process(actor, window);
            let call = IncomingCall {
                method,
                arguments,
                deadline,
                key,
                reply,
            };
            table.admit(actor, incarnation, call);
            return Prepared::Done(Route::SameProcess(pending));
        }
        let stream = match self.stream_of(route, order) {
            Ok(stream) => stream,
            Err(reason) => {
                let error = unavailable(actor, reason, Executed::No);
                return Prepared::Done(Route::Failed(error));
            }
        };
        let request = CallRequest {
            // Assigned by the stream, and the timeout when it is written.
            call: 0,
            timeout_ms: None,
            actor,
            incarnation,
            method,
            key,
            window,
            arguments,
        };
        let call = NewCall {
            request,
            deadline,
            order,
        };
        Prepared::Remote(stream, call)
    }

    fn stream_of(&self, route: &CallRoute, order: CallOrder) -> Result<Arc<HostStream>, String> {
        if order == CallOrder::Any && !self.is_near(route) {
            let turn = self.0.turn.fetch_add(1, Ordering::Relaxed) % LARGE_STREAMS;
            return self.stream(route.0.address, StreamKind::Large(turn));
        }
        let mut known = route.0.stream.lock();
        if let Some(stream) = &*known
            && !stream.is_ended()
        {
            return Ok(Arc::clone(stream));
        }
        let stream = self.stream(route.0.address, StreamKind::Ordered)?;
        *known = Some(Arc::clone(&stream));
        Ok(stream)
    }

    /// Whether the host is called over a Unix socket, as far as its address tells: one stream is enough there.
    fn is_near(&self, route: &CallRoute) -> bool {
        let is_own = || is_own_address(route.0.address.ip());
        self.0.paths == Paths::Any && *route.0.is_near.get_or_init(is_own)
    }

    fn stream(&self, address: SocketAddr, kind: StreamKind) -> Result<Arc<HostStream>, String> {
        let mut streams = self.0.streams.lock();
        if let Some(stream) = streams.get(&(address, kind))
            && !stream.is_ended()
        {
            return Ok(Arc::clone(stream));
        }
        // A new host is rare enough to look through all of them for those that are gone.
        streams.retain(|_, stream| !stream.is_ended());
        if streams.len() >= STREAMS_MAX {
            return Err(format!(
                "this process has {STREAMS_MAX} streams to other processes already, its limit"
            ));
        }
        let stream = Arc::new(HostStream::default());
        // Ends when the stream breaks, or by the token; its answers are in the stream.
        let endpoint = self.0.endpoint.clone();
        let (paths, ended) = (self.0.paths, self.0.ended.clone());
        let served = Arc::clone(&stream);
        tokio::spawn(async move {
            let reason = tokio::select! {
                reason = stream::run(&endpoint, address, kind, paths, &served) => reason,
                () = ended.cancelled() => "this process stopped calling".to_owned(),
            };
            served.end(&reason);
        });
        streams.insert((address, kind), Arc::clone(&stream));
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
