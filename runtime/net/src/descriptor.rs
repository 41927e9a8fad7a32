//! Messages with file descriptors between processes of one machine, over a Unix socket.
//!
//! ```text
//! offset 0                    4            5
//!        +--------------------+------------+---------
//!        | length, bytes (LE) | descriptor | payload
//!        +--------------------+------------+---------
//! ```
//!
//! Invariants:
//! 1. Both ends belong to the same user, by the kernel's word.
//! 2. A message whose descriptor byte is 1 comes with one descriptor; they arrive in order.
//! 3. A length is compared with the limit before anything is allocated for it.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

const HEADER_BYTES: usize = 5;

/// Descriptors that one read may bring: a peer that sends more is not ours.
const DESCRIPTORS_MAX: usize = 16;

/// How much is read at once.
const READ_BYTES: usize = 16 * 1024;

/// A listening socket for streams of messages; its file goes away with it.
#[derive(Debug)]
pub struct DescriptorListener {
    listener: UnixListener,
    path: PathBuf,
    message_bytes_max: usize,
}

impl DescriptorListener {
    /// Listens at `path`; a socket file that an earlier process left there is replaced.
    pub fn bind(path: &Path, message_bytes_max: usize) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(DescriptorListener {
            listener,
            path: path.to_owned(),
            message_bytes_max,
        })
    }

    /// The next stream of a process of our user. Cancel safe.
    pub async fn accept(&self) -> io::Result<(DescriptorSender, DescriptorReceiver)> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            match halves(stream, self.message_bytes_max) {
                Ok(halves) => return Ok(halves),
                Err(error) => tracing::warn!(%error, "local connection refused"),
            }
        }
    }
}

impl Drop for DescriptorListener {
    fn drop(&mut self) {
        // Gone already if someone has cleaned up behind us.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Connects to the process that listens at `path`.
pub async fn connect_descriptors(
    path: &Path,
    message_bytes_max: usize,
) -> io::Result<(DescriptorSender, DescriptorReceiver)> {
    halves(UnixStream::connect(path).await?, message_bytes_max)
}

fn halves(
    stream: UnixStream,
    message_bytes_max: usize,
) -> io::Result<(DescriptorSender, DescriptorReceiver)> {
    let (expected, found) = (
        rustix::process::geteuid().as_raw(),
        stream.peer_cred()?.uid(),
    );
    if expected != found {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("the other process runs as user {found}, this one as {expected}"),
        ));
    }
    let stream = Arc::new(stream);
    let sender = DescriptorSender {
        stream: Arc::clone(&stream),
    };
    let receiver = DescriptorReceiver {
        stream,
        message_bytes_max,
        buffer: Vec::new(),
        descriptors: VecDeque::new(),
    };
    Ok((sender, receiver))
}

/// The sending half.
#[derive(Debug)]
pub struct DescriptorSender {
    stream: Arc<UnixStream>,
}

impl DescriptorSender {
    /// Sends a message, with `descriptor` if there is one. Not cancel safe: a message that is
    /// given up halfway breaks the stream.
    pub async fn send(
        &mut self,
        payload: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let length = u32::try_from(payload.len())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "message over 4 GiB"))?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.push(u8::from(descriptor.is_some()));
        bytes.extend_from_slice(payload);
        let mut descriptor = descriptor;
        let mut sent = 0;
        while sent < bytes.len() {
            let rest = &bytes[sent..];
            let count = self
                .stream
                .async_io(Interest::WRITABLE, || {
                    send_once(&self.stream, rest, descriptor)
                })
                .await?;
            // It went with the first bytes.
            descriptor = None;
            sent += count;
        }
        Ok(())
    }
}

fn send_once(
    stream: &UnixStream,
    bytes: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.as_slice();
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::net::sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut control,
        flags,
    )?)
}

/// The receiving half.
#[derive(Debug)]
pub struct DescriptorReceiver {
    stream: Arc<UnixStream>,
    message_bytes_max: usize,
    buffer: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl DescriptorReceiver {
    /// The next message and its descriptor, or `None` at the end of the stream. Cancel safe.
    pub async fn receive(&mut self) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
        loop {
            if let Some(message) = self.take_message()? {
                return Ok(Some(message));
            }
            let (stream, buffer) = (&self.stream, &mut self.buffer);
            let descriptors = &mut self.descriptors;
            let count = stream
                .async_io(Interest::READABLE, || {
                    receive_once(stream, buffer, descriptors)
                })
                .await?;
            if self.descriptors.len() > DESCRIPTORS_MAX {
                return Err(invalid("more descriptors than messages that announce one"));
            }
            if count == 0 {
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
    }

    fn take_message(&mut self) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
        let Some([a, b, c, d, flag]) = self.buffer.first_chunk::<HEADER_BYTES>().copied() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        if length > self.message_bytes_max {
            return Err(invalid(&format!(
                "message of {length} bytes, the limit is {}",
                self.message_bytes_max
            )));
        }
        if flag > 1 {
            return Err(invalid("descriptor byte is neither 0 nor 1"));
        }
        if self.buffer.len() < HEADER_BYTES + length {
            return Ok(None);
        }
        let payload = self.buffer[HEADER_BYTES..HEADER_BYTES + length].to_vec();
        self.buffer.drain(..HEADER_BYTES + length);
        let descriptor = match flag {
            1 => Some(
                self.descriptors
                    .pop_front()
                    .ok_or_else(|| invalid("a descriptor is announced and missing"))?,
            ),
            _ => None,
        };
        Ok(Some((payload, descriptor)))
    }
}

fn receive_once(
    stream: &UnixStream,
    buffer: &mut Vec<u8>,
    descriptors: &mut VecDeque<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; READ_BYTES];
    let received = rustix::net::recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
    )?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    buffer.extend_from_slice(&bytes[..received.bytes]);
    Ok(received.bytes)
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    async fn pair() -> (DescriptorSender, DescriptorReceiver) {
        let (one, other) = UnixStream::pair().unwrap();
        (
            halves(one, 1 << 20).unwrap().0,
            halves(other, 1 << 20).unwrap().1,
        )
    }

    #[tokio::test]
    async fn messages_and_descriptors_arrive_in_order() {
        let (mut sender, mut receiver) = pair().await;
        let sending = async move {
            for number in 0..40u8 {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(&[number]).unwrap();
                let payload = vec![number; usize::from(number) * 3000];
                let descriptor = (number % 3 == 0).then(|| file.as_fd());
                sender.send(&payload, descriptor).await.unwrap();
            }
        };
        let receiving = async move {
            for number in 0..40u8 {
                let (payload, descriptor) = receiver.receive().await.unwrap().unwrap();
                assert_eq!(payload, vec![number; usize::from(number) * 3000]);
                assert_eq!(descriptor.is_some(), number % 3 == 0);
                if let Some(descriptor) = descriptor {
                    let mut file = File::from(descriptor);
                    file.rewind().unwrap();
                    let mut content = Vec::new();
                    file.read_to_end(&mut content).unwrap();
                    assert_eq!(content, [number]);
                }
            }
            assert!(receiver.receive().await.unwrap().is_none());
        };
        tokio::join!(sending, receiving);
    }

    #[tokio::test]
    async fn what_is_too_long_or_announces_in_vain_is_refused() {
        for (bytes, reason) in [
            (vec![0, 0, 32, 0, 0], "the limit is"),
            (vec![0, 0, 0, 0, 1], "announced and missing"),
            (vec![0, 0, 0, 0, 2], "neither 0 nor 1"),
        ] {
            let (one, other) = UnixStream::pair().unwrap();
            send_once(&one, &bytes, None).unwrap();
            let mut receiver = halves(other, 1 << 20).unwrap().1;
            let error = receiver.receive().await.unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
        }
    }
}
