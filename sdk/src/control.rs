//! The head's control API: authenticated, retried, and exactly once where it changes something.
//!
//! Invariants:
//! 1. A change carries a stamp (session, sequence number) and is sent again with that same stamp,
//!    so that it takes effect once however often it is sent.
//! 2. Each change has a session for itself while it is under way
//!    (`stamps.rs`).
//! 3. Whichever head is asked, the leader is found: one that does not lead names it, and each new
//!    connection learns where the others are.
//! 4. Only what the transport or a missing leader is to blame for is tried again, and only for
//!    [`Access::retry_window`].
//! 5. A change is stamped anew, in another session, only if it surely had no effect before.
//! 6. The last clone closes the sessions (`farewell.rs`), when no change is under way any more.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::error::{ErrorCode, Executed};
use mobula_net::tcp::{ClientTls, connect_channel};
use mobula_wire::control as api;
use mobula_wire::control::control_client::ControlClient;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::error::{Error, Result};
pub use crate::farewell::sessions_closed;
use crate::heads::Heads;
use crate::stamps::{Session, Sessions};

/// The gRPC client, with authentication.
pub type ApiClient = ControlClient<InterceptedService<Channel, Authentication>>;

/// The largest message of the API: a module's command of 4 MiB and what is around it.
const MESSAGE_BYTES_MAX: usize = 5 * 1024 * 1024;

/// The head forgets a session after an hour without use; before that we open another one.
const SESSION_REUSE: Duration = Duration::from_secs(30 * 60);

/// A head that was just connected to says at once where the others are.
const LEARN_TIMEOUT: Duration = Duration::from_secs(1);

const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// The longest pause where another head can be asked meanwhile.
const BACKOFF_IN_GROUP_MAX: Duration = Duration::from_millis(150);

/// Adds the client token to each request; with a client certificate there is none.
#[derive(Clone)]
pub struct Authentication {
    bearer: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Authentication {
    fn call(&mut self, mut request: Request<()>) -> std::result::Result<Request<()>, Status> {
        if let Some(bearer) = &self.bearer {
            request
                .metadata_mut()
                .insert("authorization", bearer.clone());
        }
        Ok(request)
    }
}

/// How to reach the heads, and as whom.
pub struct Access {
    /// The heads' API addresses; any of them answers.
    pub addresses: Vec<SocketAddr>,
    /// How the head is known, and how we are if by certificate.
    pub tls: ClientTls,
    /// The client token, where there is no certificate.
    pub token: Option<String>,
    /// Who opens the session, for people.
    pub client_name: String,
    /// For how long a request is tried again while no head answers.
    pub retry_window: Duration,
    /// Where the heads are now, where somebody keeps track of it for this process.
    pub followed: Option<watch::Receiver<Vec<String>>>,
}

/// The control API. Clones share their connection and sessions.
#[derive(Clone)]
pub struct Control(Arc<ControlInner>);

struct ControlInner {
    access: Access,
    authentication: Authentication,
    connected: Mutex<Connected>,
    sessions: Sessions,
}

struct Connected {
    heads: Heads,
    client: Option<ApiClient>,
}

impl Drop for ControlInner {
    /// Closes the sessions, as far as that goes without a new connection.
    fn drop(&mut self) {
        let sessions = self.sessions.take_opened();
        let client = self.connected.get_mut().client.take();
        if let Some(client) = client.filter(|_| !sessions.is_empty()) {
            crate::farewell::close(client, sessions);
        }
    }
}

enum Failure {
    /// No connection: nothing was sent.
    NotSent {
        reason: String,
        retryable: bool,
    },
    Status(Status),
}

impl Control {
    /// A client; it connects with its first request.
    pub fn new(access: Access) -> Result<Self> {
        let heads = Heads::new(access.addresses.clone())
            .ok_or_else(|| Error::setup("control API", "no address of a head is known"))?;
        let bearer = match &access.token {
            None => None,
            Some(token) => {
                let mut value: MetadataValue<Ascii> =
                    format!("Bearer {}", token.trim()).parse().map_err(|_| {
                        Error::setup("client token", "it has characters that no token has")
                    })?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        Ok(Control(Arc::new(ControlInner {
            access,
            authentication: Authentication { bearer },
            connected: Mutex::new(Connected {
                heads,
                client: None,
            }),
            sessions: Sessions::default(),
        })))
    }

    /// The heads' API addresses, as far as they are known.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.0.connected.lock().heads.addresses().to_vec()
    }

    /// Asks something that changes nothing; it is asked again while no head answers.
    pub async fn read<T, F, Fut>(&self, operation: &str, ask: F) -> Result<T>
    where
        F: Fn(ApiClient) -> Fut,
        Fut: Future<Output = std::result::Result<tonic::Response<T>, Status>>,
    {
        self.repeat(operation, false, ask).await
    }

    /// Changes something, exactly once: `ask` puts the stamp into its request.
    pub async fn mutate<T, F, Fut>(&self, operation: &str, ask: F) -> Result<T>
    where
        F: Fn(ApiClient, api::Stamp) -> Fut,
        Fut: Future<Output = std::result::Result<tonic::Response<T>, Status>>,
    {
        let mut held = self.0.sessions.take().await;
        let answer = self.stamped(&mut held.session, operation, &ask).await;
        match &answer {
            // The head forgot the session before this change reached it (a clock that jumped, a
            // restored head): in a new session it takes effect for the first time. What may have
            // been applied in the old one is the caller's to decide.
            Err(error)
                if error.code() == Some(ErrorCode::SessionExpired)
                    && error.executed() == Executed::No =>
            {
                self.stamped(&mut held.session, operation, &ask).await
            }
            _ => answer,
        }
    }

    /// Sends a change with the next stamp of `session`, which is opened where it is not usable.
    async fn stamped<T, F, Fut>(&self, session: &mut Session, operation: &str, ask: &F) -> Result<T>
    where
        F: Fn(ApiClient, api::Stamp) -> Fut,
        Fut: Future<Output = std::result::Result<tonic::Response<T>, Status>>,
    {
        if session
            .used
            .is_none_or(|used| used.elapsed() > SESSION_REUSE)
        {
            let client = self.0.access.client_name.clone();
            let opened = self
                .repeat("open a session", false, |mut api| {
                    let client = client.clone();
                    async move { api.open_session(api::OpenSessionRequest { client }).await }
                })
                .await?;
            *session = Session {
                id: opened.session,
                ..Session::default()
            };
        }
        session.last_sequence += 1;
        let stamp = api::Stamp {
            session: session.id,
            sequence: session.last_sequence,
        };
        let answer = self
            .repeat(operation, true, |client| ask(client, stamp))
            .await;
        session.used = match &answer {
            // The head has forgotten the session: the next change opens another one.
            Err(error) if error.code() == Some(ErrorCode::SessionExpired) => None,
            _ => Some(Instant::now()),
        };
        answer
    }

    /// Sends what cannot be sent twice (a stream): one attempt on a connection that stands.
    pub async fn once<T, F, Fut>(&self, operation: &str, ask: F) -> Result<T>
    where
        F: FnOnce(ApiClient) -> Fut,
        Fut: Future<Output = std::result::Result<tonic::Response<T>, Status>>,
    {
        let client = self
            .read(operation, |client| {
                std::future::ready(Ok(tonic::Response::new(client)))
            })
            .await?;
        ask(client)
            .await
            .map(tonic::Response::into_inner)
            .map_err(|status| {
                if is_transient(&status) {
                    self.forget_connection(named_leader(&status));
                }
                status_error(operation, &status, true)
            })
    }

    async fn repeat<T, F, Fut>(&self, operation: &str, changes: bool, ask: F) -> Result<T>
    where
        F: Fn(ApiClient) -> Fut,
        Fut: Future<Output = std::result::Result<tonic::Response<T>, Status>>,
    {
        let last = Instant::now() + self.0.access.retry_window;
        let mut backoff = BACKOFF_FIRST;
        // Once an attempt may have arrived, a later failure to connect says nothing about it.
        let mut may_have_arrived = false;
        loop {
            let failure = match self.client().await {
                Ok(client) => match ask(client).await {
                    Ok(response) => return Ok(response.into_inner()),
                    Err(status) => Failure::Status(status),
                },
                Err(failure) => failure,
            };
            let retryable = match &failure {
                Failure::NotSent { retryable, .. } => *retryable,
                Failure::Status(status) => is_transient(status),
            };
            let mut leader = None;
            if let Failure::Status(status) = &failure
                && retryable
            {
                // A head that does not lead says that it did nothing.
                may_have_arrived |= !was_not_executed(status);
                leader = named_leader(status);
                self.forget_connection(leader);
            }
            if !retryable || Instant::now() + backoff > last {
                return Err(give_up(operation, failure, changes && may_have_arrived));
            }
            // The first name is followed at once; heads that name each other in turn are electing,
            // which takes less than a second.
            let wait = match leader {
                Some(_) if backoff == BACKOFF_FIRST => Duration::ZERO,
                _ if self.addresses().len() > 1 => backoff.min(BACKOFF_IN_GROUP_MAX),
                _ => backoff,
            };
            tokio::time::sleep(wait).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    async fn client(&self) -> std::result::Result<ApiClient, Failure> {
        let access = &self.0.access;
        let address = {
            let mut connected = self.0.connected.lock();
            if let Some(client) = &connected.client {
                return Ok(client.clone());
            }
            if let Some(followed) = &access.followed {
                let now: Vec<SocketAddr> = addresses_of(&followed.borrow());
                connected.heads.learn(&now);
            }
            connected.heads.current()
        };
        match connect_channel(address, access.tls.clone()).await {
            Ok(channel) => {
                let client =
                    ControlClient::with_interceptor(channel, self.0.authentication.clone())
                        .max_decoding_message_size(MESSAGE_BYTES_MAX)
                        .max_encoding_message_size(MESSAGE_BYTES_MAX);
                self.0.connected.lock().client = Some(client.clone());
                self.learn_heads(client.clone()).await;
                Ok(client)
            }
            Err(error) => {
                self.0.connected.lock().heads.next();
                let retryable = error.is_retryable();
                Err(Failure::NotSent {
                    reason: error.to_string(),
                    retryable,
                })
            }
        }
    }

    /// Asks a head that was just connected to where the others are. It answers from what it has, so
    /// this costs one round trip; without an answer what is known stays.
    async fn learn_heads(&self, mut client: ApiClient) {
        let asked = client.list_heads(api::ListHeadsRequest { by_leader: false });
        if let Ok(Ok(reply)) = tokio::time::timeout(LEARN_TIMEOUT, asked).await {
            let heads = reply.into_inner().heads;
            let found: Vec<String> = heads.into_iter().map(|head| head.api_address).collect();
            self.0.connected.lock().heads.learn(&addresses_of(&found));
        }
    }

    fn forget_connection(&self, leader: Option<SocketAddr>) {
        let mut connected = self.0.connected.lock();
        connected.client = None;
        match leader {
            Some(leader) => connected.heads.prefer(leader),
            // Another head may answer where this one cannot.
            None => connected.heads.next(),
        }
    }
}

fn addresses_of(texts: &[String]) -> Vec<SocketAddr> {
    texts.iter().filter_map(|text| text.parse().ok()).collect()
}

/// The leader that a head names which does not lead.
fn named_leader(status: &Status) -> Option<SocketAddr> {
    let text = status.metadata().get("mobula-leader")?.to_str().ok()?;
    text.parse().ok()
}

/// Whether the head says that the request took no effect.
fn was_not_executed(status: &Status) -> bool {
    status
        .metadata()
        .get("mobula-executed")
        .is_some_and(|executed| executed == "no")
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("addresses", &self.0.access.addresses)
            .finish_non_exhaustive()
    }
}

/// The finer kind of a refusal, which the head puts beside the status.
fn refusal_code(status: &Status) -> Option<ErrorCode> {
    let text = status.metadata().get("mobula-code")?.to_str().ok()?;
    ErrorCode::ALL
        .into_iter()
        .find(|code| code.as_str() == text)
}

/// Whether the transport or a missing leader is to blame. What a head refused on purpose carries
/// a kind of its own.
fn is_transient(status: &Status) -> bool {
    match refusal_code(status) {
        Some(code) => code == ErrorCode::Unavailable,
        None => matches!(
            status.code(),
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Aborted | Code::Internal
        ),
    }
}

fn give_up(operation: &str, failure: Failure, may_have_arrived: bool) -> Error {
    match failure {
        Failure::Status(status) => status_error(operation, &status, may_have_arrived),
        Failure::NotSent { reason, .. } => Error::Control {
            operation: operation.to_owned(),
            code: ErrorCode::Unavailable,
            message: reason,
            executed: if may_have_arrived {
                Executed::Unknown
            } else {
                Executed::No
            },
        },
    }
}

pub(crate) fn status_error(operation: &str, status: &Status, may_have_arrived: bool) -> Error {
    let code = refusal_code(status).unwrap_or(match status.code() {
        Code::InvalidArgument | Code::OutOfRange => ErrorCode::InvalidArgument,
        Code::NotFound => ErrorCode::NotFound,
        Code::AlreadyExists => ErrorCode::AlreadyExists,
        Code::FailedPrecondition => ErrorCode::FailedPrecondition,
        Code::PermissionDenied => ErrorCode::PermissionDenied,
        Code::Unauthenticated => ErrorCode::Unauthenticated,
        Code::ResourceExhausted => ErrorCode::Overloaded,
        Code::DeadlineExceeded => ErrorCode::DeadlineExceeded,
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Aborted => {
            ErrorCode::Unavailable
        }
        _ => ErrorCode::Internal,
    });
    let uncertain = matches!(
        code,
        ErrorCode::Unavailable
            | ErrorCode::DeadlineExceeded
            | ErrorCode::Internal
            // Said before the head looks whether an earlier attempt was applied.
            | ErrorCode::Overloaded
            | ErrorCode::Unauthenticated
            | ErrorCode::SessionExpired
    );
    Error::Control {
        operation: operation.to_owned(),
        code,
        message: status.message().to_owned(),
        executed: if uncertain && may_have_arrived {
            Executed::Unknown
        } else {
            Executed::No
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_final_and_a_broken_connection_is_not() {
        let mut refused = Status::failed_precondition("the job has ended");
        refused
            .metadata_mut()
            .insert("mobula-code", "fenced".parse().unwrap());
        assert!(!is_transient(&refused));
        let error = status_error("stop job", &refused, true);
        assert_eq!(
            (error.code(), error.executed()),
            (Some(ErrorCode::Fenced), Executed::No)
        );

        let broken = Status::unavailable("tcp connect error");
        assert!(is_transient(&broken));
        let error = status_error("stop job", &broken, true);
        assert_eq!(error.executed(), Executed::Unknown);
        assert_eq!(
            error.to_string(),
            "stop job: tcp connect error (execution unknown)"
        );
    }
}
