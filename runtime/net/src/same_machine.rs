//! Changing over from a QUIC connection to a Unix socket, where both processes are on one machine.
//!
//! ```text
//! caller ──QUIC──► host   "are we neighbours?"
//! host ──QUIC──► caller   name of a socket, ticket, proof
//! caller ──Unix──► host   ticket
//! host ──Unix──► caller   proof, and from here on the frames of the lane
//! ```
//!
//! What proves who is at the other end of the socket is the QUIC connection beside it: both sides
//! have shown their certificates there, and nobody else knows the ticket and the proof. So the
//! rules on who may call whom are the same on both paths, and the socket's bytes need no cipher:
//! the kernel carries them from one process to the other and to nobody else.
//!
//! Invariants:
//! 1. A ticket is good once, for [`TICKET_LIFE`], and only while its QUIC connection lives.
//! 2. The socket's name is random and taken before it is told to anyone, so no other process can
//!    take it first. It is in the abstract namespace: nothing is left behind after a crash.
//! 3. Both ends belong to the same user, by the kernel's word.
//! 4. A stream over the socket is used no longer than its QUIC connection lives: whoever opened it
//!    watches that, and so it ends with the certificates as well.

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use mobula_wire::frame::FrameLimits;
use mobula_wire::hello::Lane;
use mobula_wire::same_machine::{Offer, Secret};
use parking_lot::Mutex;
use rand::TryRngCore;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::endpoint::{Connection, OpenError};
use crate::lane::{FramedStream, ReceiveError, SendError};
use crate::local::{LocalError, check_peer};

/// How long a caller may take to come to the socket: it is on the same machine and expected.
pub const TICKET_LIFE: Duration = Duration::from_secs(5);

/// Callers between connecting and showing their ticket.
const ARRIVALS_MAX: usize = 64;

/// Offers that wait for their caller: every process of a machine may start at once.
const OFFERS_MAX: usize = 1024;

/// Why there is no way over a Unix socket. The QUIC connection is as good as before.
#[derive(Debug, thiserror::Error)]
pub enum SameMachineError {
    /// The socket cannot be made or reached, or another user is at the other end.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// The QUIC connection does not carry the question.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The offer was not sent.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The offer did not arrive.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    /// The host ended the stream instead of offering a socket.
    #[error("the host offers no socket")]
    NoOffer,
    /// Too many offers wait for their callers.
    #[error("{OFFERS_MAX} offers wait for their callers already, the limit")]
    TooManyOffers,
    /// The operating system gives no random bytes.
    #[error("no random bytes for a ticket: {0}")]
    NoEntropy(String),
    /// The other side did not come, or did not answer.
    #[error("the other side did not come within {} ms", TICKET_LIFE.as_millis())]
    TimedOut,
    /// Bytes cannot be sent or received on the socket.
    #[error("the socket failed during the handshake: {0}")]
    Socket(std::io::Error),
    /// Whoever listens there is not who made the offer.
    #[error("the process at the socket does not know the proof: it is not who made the offer")]
    WrongProof,
}

fn secret() -> Result<Secret, SameMachineError> {
    let mut bytes = [0; 32];
    rand::rngs::OsRng
        .try_fill_bytes(&mut bytes)
        .map_err(|error| SameMachineError::NoEntropy(error.to_string()))?;
    Ok(Secret(bytes))
}

/// A name in the abstract namespace, as tokio wants it.
fn abstract_path(name: &str) -> PathBuf {
    PathBuf::from(format!("\0{name}"))
}

/// A host's Unix socket.
#[derive(Debug)]
pub struct SameMachineListener {
    name: String,
    listener: UnixListener,
    /// By the ticket's hash, so that looking one up tells nothing about the others.
    offers: Mutex<BTreeMap<[u8; 32], Expected>>,
}

#[derive(Debug)]
struct Expected {
    proof: Secret,
    arrived: oneshot::Sender<UnixStream>,
}

impl SameMachineListener {
    /// Listens under a name that nobody can guess.
    pub fn bind() -> Result<Self, SameMachineError> {
        let name = format!("mobula/{}", blake3::Hash::from(secret()?.0).to_hex());
        let path = abstract_path(&name);
        let listener = UnixListener::bind(&path).map_err(|source| LocalError::Socket {
            action: "listen on",
            path,
            source,
        })?;
        Ok(SameMachineListener {
            name,
            listener,
            offers: Mutex::new(BTreeMap::new()),
        })
    }

    /// Lets callers in, for as long as it is polled.
    pub async fn run(&self) {
        let mut arrivals = JoinSet::new();
        loop {
            tokio::select! {
                Some(arrived) = arrivals.join_next() => {
                    if let Ok(Some((ticket, stream))) = arrived {
                        self.hand_over(ticket, stream).await;
                    }
                }
                accepted = self.listener.accept(), if arrivals.len() < ARRIVALS_MAX => {
                    match accepted {
                        Ok((stream, _)) => {
                            if let Err(error) = check_peer(&stream, &abstract_path(&self.name)) {
                                tracing::warn!(%error, "refused a caller of this machine");
                                continue;
                            }
                            arrivals.spawn(read_ticket(stream));
                        }
                        Err(error) => {
                            tracing::warn!(%error, "cannot accept callers of this machine");
                            tokio::time::sleep(ACCEPT_PAUSE).await;
                        }
                    }
                }
            }
        }
    }

    async fn hand_over(&self, ticket: Secret, mut stream: UnixStream) {
        let expected = self.offers.lock().remove(&hash(ticket));
        let Some(Expected { proof, arrived }) = expected else {
            tracing::warn!("refused a caller of this machine whose ticket is not known");
            return;
        };
        // Thirty-two bytes into an empty socket: this does not wait.
        if stream.write_all(&proof.0).await.is_ok() {
            // Whoever made the offer may be gone with its connection.
            drop(arrived.send(stream));
        }
    }

    /// Answers a caller's question on `stream` and waits for it at the socket. The stream that this
    /// gives is to be dropped when the QUIC connection of the question ends.
    pub async fn offer(
        &self,
        mut stream: FramedStream,
        lane: Lane,
    ) -> Result<FramedStream, SameMachineError> {
        let (ticket, proof) = (secret()?, secret()?);
        let (arrived, arrival) = oneshot::channel();
        let withdraw = {
            let mut offers = self.offers.lock();
            if offers.len() >= OFFERS_MAX {
                return Err(SameMachineError::TooManyOffers);
            }
            offers.insert(hash(ticket), Expected { proof, arrived });
            Withdraw {
                listener: self,
                ticket,
            }
        };
        let offer = Offer {
            socket: self.name.clone(),
            ticket,
            proof,
        };
        stream.sender.send_message(&offer).await?;
        let arrived = timeout(TICKET_LIFE, arrival).await;
        drop(withdraw);
        let local = arrived
            .map_err(|_| SameMachineError::TimedOut)?
            .map_err(|_| SameMachineError::TimedOut)?;
        FramedStream::local(local, FrameLimits::of(lane)).map_err(SameMachineError::Socket)
    }
}

/// After an error of the system: descriptors may be short for a moment.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// An offer ends with whoever waits for its caller.
struct Withdraw<'a> {
    listener: &'a SameMachineListener,
    ticket: Secret,
}

impl Drop for Withdraw<'_> {
    fn drop(&mut self) {
        self.listener.offers.lock().remove(&hash(self.ticket));
    }
}

fn hash(ticket: Secret) -> [u8; 32] {
    *blake3::hash(&ticket.0).as_bytes()
}

async fn read_ticket(mut stream: UnixStream) -> Option<(Secret, UnixStream)> {
    let mut ticket = [0; 32];
    match timeout(TICKET_LIFE, stream.read_exact(&mut ticket)).await {
        Ok(Ok(_)) => Some((Secret(ticket), stream)),
        _ => None,
    }
}

/// Whether `ip` is one of this machine's addresses.
#[must_use]
pub fn is_own_address(ip: IpAddr) -> bool {
    // The system lets a socket have this machine's addresses only.
    ip.is_loopback() || UdpSocket::bind((ip, 0)).is_ok()
}

/// Asks the host at the other end of `connection` for a Unix socket and goes there. The stream that
/// this gives keeps the connection open; it is to be dropped when that ends all the same.
pub async fn change_over(
    connection: &Connection,
    lane: Lane,
) -> Result<FramedStream, SameMachineError> {
    let change = async {
        let mut question = connection.open(Lane::SameMachine).await?;
        let offer: Offer = question
            .receiver
            .receive_message()
            .await?
            .ok_or(SameMachineError::NoOffer)?;
        let path = abstract_path(&offer.socket);
        let mut local = UnixStream::connect(&path)
            .await
            .map_err(|source| LocalError::Socket {
                action: "connect to",
                path: path.clone(),
                source,
            })?;
        check_peer(&local, &path)?;
        let mut proof = [0; 32];
        local
            .write_all(&offer.ticket.0)
            .await
            .map_err(SameMachineError::Socket)?;
        local
            .read_exact(&mut proof)
            .await
            .map_err(SameMachineError::Socket)?;
        if Secret(proof) != offer.proof {
            return Err(SameMachineError::WrongProof);
        }
        let mut stream =
            FramedStream::local(local, FrameLimits::of(lane)).map_err(SameMachineError::Socket)?;
        stream.set_guard(connection.guard());
        Ok(stream)
    };
    timeout(TICKET_LIFE, change)
        .await
        .unwrap_or(Err(SameMachineError::TimedOut))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::{Endpoint, LaneClass};
    use crate::identity::{ClusterCa, Role};
    use crate::testing::{credentials, loopback};

    struct Pair {
        ours: Connection,
        theirs: Connection,
        _endpoints: [Endpoint; 2],
    }

    async fn connected() -> Pair {
        let ca = ClusterCa::create("demo").unwrap();
        let host = Endpoint::bind(loopback(), &credentials(&ca, Role::Host)).unwrap();
        let caller = Endpoint::bind_client(loopback(), &credentials(&ca, Role::Client)).unwrap();
        let address = host.local_address();
        let (ours, theirs) = tokio::join!(
            caller.connect(address, LaneClass::Control, Role::Host),
            host.accept()
        );
        Pair {
            ours: ours.unwrap(),
            theirs: theirs.unwrap(),
            _endpoints: [host, caller],
        }
    }

    async fn offered(listener: &SameMachineListener, theirs: &Connection) -> FramedStream {
        let (lane, question) = theirs.accept().await.unwrap();
        assert_eq!(lane, Lane::SameMachine);
        listener.offer(question, Lane::Call).await.unwrap()
    }

    #[tokio::test]
    async fn neighbours_change_over_and_talk() {
        let pair = connected().await;
        let listener = SameMachineListener::bind().unwrap();
        let talk = async {
            let (ours, theirs) = tokio::join!(
                change_over(&pair.ours, Lane::Call),
                offered(&listener, &pair.theirs)
            );
            let (mut ours, mut theirs) = (ours.unwrap(), theirs);
            ours.sender.send_message("hello").await.unwrap();
            let heard = theirs.receiver.receive_message::<String>().await;
            assert_eq!(heard.unwrap().unwrap(), "hello");
        };
        tokio::select! {
            () = listener.run() => unreachable!("it runs for ever"),
            () = talk => {}
        }
        assert!(listener.offers.lock().is_empty(), "a ticket is good once");
    }

    #[tokio::test]
    async fn a_ticket_that_nobody_was_given_is_refused() {
        let listener = SameMachineListener::bind().unwrap();
        let path = abstract_path(&listener.name);
        let stranger = async {
            let mut stream = UnixStream::connect(&path).await.unwrap();
            stream.write_all(&[7; 32]).await.unwrap();
            let mut answer = [0; 32];
            stream.read_exact(&mut answer).await.unwrap_err()
        };
        tokio::select! {
            () = listener.run() => unreachable!("it runs for ever"),
            error = stranger => assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof),
        }
    }

    #[tokio::test]
    async fn an_impostor_at_the_socket_is_found_out() {
        let pair = connected().await;
        let impostor = SameMachineListener::bind().unwrap();
        let path = abstract_path(&impostor.name);
        let host = async {
            let (_, mut question) = pair.theirs.accept().await.unwrap();
            let offer = Offer {
                socket: impostor.name.clone(),
                ticket: Secret([1; 32]),
                proof: Secret([2; 32]),
            };
            question.sender.send_message(&offer).await.unwrap();
            let (mut arrived, _) = impostor.listener.accept().await.unwrap();
            arrived.write_all(&[3; 32]).await.unwrap();
            (question, arrived)
        };
        let (changed, _kept) = tokio::join!(change_over(&pair.ours, Lane::Call), host);
        assert!(
            matches!(changed, Err(SameMachineError::WrongProof)),
            "{path:?}"
        );
    }

    #[tokio::test]
    async fn an_offer_ends_with_whoever_waits_for_its_caller() {
        let pair = connected().await;
        let listener = SameMachineListener::bind().unwrap();
        // Nobody lets callers in, so this waits at the socket.
        let asking = change_over(&pair.ours, Lane::Call);
        let offering = offered(&listener, &pair.theirs);
        let waiting = async {
            while listener.offers.lock().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            _ = async { tokio::join!(asking, offering) } => unreachable!("nobody lets it in"),
            () = waiting => {}
        }
        assert!(listener.offers.lock().is_empty());
    }

    #[test]
    fn only_this_machines_addresses_are_its_own() {
        assert!(is_own_address([127, 0, 0, 1].into()));
        // Set aside for documentation: nobody has it.
        assert!(!is_own_address([192, 0, 2, 1].into()));
    }
}
