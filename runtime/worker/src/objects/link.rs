//! One host's socket: requests in, answers and descriptors out.
//!
//! Invariant: nothing of a process is looked at before it has shown the key of a host that this
//! agent launched; a key opens one link at a time.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use mobula_core::codec;
use mobula_core::id::{HostId, JobId};
use mobula_core::object::ProcessId;
use mobula_net::descriptor::{DescriptorListener, DescriptorReceiver, DescriptorSender};
use mobula_wire::store::{STORE_MESSAGE_BYTES_MAX, StoreReply, StoreRequest};
use parking_lot::Mutex;
use rand::Rng;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::service::Input;

/// Links at a time: more hosts than any machine has memory for.
const LINKS_MAX: usize = 4096;

/// Answers that wait for one host to read them. Each is the answer to a request, or about an
/// object of the host's; one that leaves as many unread has hung, and is cut off.
const ANSWERS_MAX: usize = 64 * 1024;

const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// After a failed `accept` (no file descriptors left): long enough not to spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// An answer, and the descriptor that goes with it.
pub(crate) type Answer = (StoreReply, Option<OwnedFd>);

/// The keys of hosts that were launched and have not ended.
#[derive(Debug, Clone, Default)]
pub(crate) struct Keys(Arc<Mutex<BTreeMap<String, (HostId, JobId)>>>);

impl Keys {
    /// A new key, for a host that is about to be launched.
    pub(crate) fn issue(&self, host: HostId, job: JobId) -> String {
        let key = format!("{:032x}", rand::rng().random::<u128>());
        self.0.lock().insert(key.clone(), (host, job));
        key
    }

    /// The host has ended, or was not launched after all.
    pub(crate) fn revoke(&self, host: HostId) {
        self.0.lock().retain(|_, (other, _)| *other != host);
    }

    fn look_up(&self, key: &str) -> Option<(HostId, JobId)> {
        self.0.lock().get(key).copied()
    }
}

/// A host's process that said hello.
#[derive(Debug)]
pub(crate) struct Linked {
    pub(crate) link: u64,
    pub(crate) job: JobId,
    pub(crate) process: ProcessId,
    pub(crate) answers: mpsc::Sender<Answer>,
}

/// Serves hosts until the service ends.
pub(crate) async fn serve(listener: DescriptorListener, keys: Keys, inputs: mpsc::Sender<Input>) {
    let mut links = JoinSet::new();
    let mut last_link = 0;
    loop {
        tokio::select! {
            Some(_) = links.join_next() => {}
            accepted = listener.accept(), if links.len() < LINKS_MAX => match accepted {
                Ok((sender, receiver)) => {
                    last_link += 1;
                    links.spawn(run(last_link, sender, receiver, keys.clone(), inputs.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept processes at the object store");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }
}

async fn run(
    link: u64,
    mut sender: DescriptorSender,
    mut receiver: DescriptorReceiver,
    keys: Keys,
    inputs: mpsc::Sender<Input>,
) {
    let hello = tokio::time::timeout(HELLO_TIMEOUT, next_request(&mut receiver)).await;
    let Ok(Ok(Some(StoreRequest::Hello { key, process }))) = hello else {
        tracing::warn!("a local process came to the object store without a hello");
        return;
    };
    let Some((host, job)) = keys.look_up(&key) else {
        tracing::warn!("a local process came to the object store with a key of no host");
        return;
    };
    let (answers, mut waiting) = mpsc::channel(ANSWERS_MAX);
    let linked = Linked {
        link,
        job,
        process,
        answers,
    };
    if inputs.send(Input::Linked(linked)).await.is_err() {
        return;
    }
    let sending = async {
        while let Some((answer, descriptor)) = waiting.recv().await {
            let descriptor = descriptor.as_ref().map(AsFd::as_fd);
            sender
                .send(&codec::encode_plain(&answer), descriptor)
                .await?;
        }
        Ok(())
    };
    let receiving = async {
        while let Some(request) = next_request(&mut receiver).await? {
            if inputs.send(Input::Request(link, request)).await.is_err() {
                break;
            }
        }
        Ok(())
    };
    let ended: io::Result<()> = tokio::select! {
        ended = sending => ended,
        ended = receiving => ended,
    };
    if let Err(error) = ended {
        tracing::debug!(%host, %error, "a host's link to the object store broke");
    }
    // Nobody is left to tell when the agent is ending.
    let _ = inputs.send(Input::Unlinked(link)).await;
}

async fn next_request(receiver: &mut DescriptorReceiver) -> io::Result<Option<StoreRequest>> {
    match receiver.receive().await? {
        None => Ok(None),
        Some((payload, _)) => codec::decode(&payload, STORE_MESSAGE_BYTES_MAX)
            .map(Some)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)),
    }
}
