//! A connected Unix socket of which a process hears when something arrives, and not when something has left.
//!
//! Whenever a peer has read from a Unix socket the kernel tells whoever sent that there is room again. tokio's own stream listens to
//! both directions from beginning to end, so that each message woke a thread of the sender's once more, for nothing. Here only who
//! waits for room listens for it. (TCP tells a sender of room only when it was missing.)

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::task::coop;

/// The receiving half: what tokio reads pipes with listens to this direction only, and reads sockets as well.
pub(super) type LocalReader = pipe::Receiver;

/// The sending half. Dropping it ends the stream.
#[derive(Debug)]
pub(super) struct LocalWriter(OwnedFd);

/// Both halves of a socket.
pub(super) fn halves(stream: UnixStream) -> io::Result<(LocalReader, LocalWriter)> {
    // It takes the stream off tokio's list; it does not wait still.
    let reading = OwnedFd::from(stream.into_std()?);
    let writer = LocalWriter(reading.try_clone()?);
    let reader = pipe::Receiver::from_owned_fd_unchecked(reading)?;
    Ok((reader, writer))
}

impl LocalWriter {
    /// Sends what there is room for, at least one byte. Cancel safe: nothing has left unless it returns.
    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Others have their turn, also while there is always room.
        coop::consume_budget().await;
        loop {
            match rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Err(Errno::WOULDBLOCK) => self.room().await?,
                Err(Errno::INTR) => {}
                sent => return Ok(sent?),
            }
        }
    }

    /// Waits until there is room.
    async fn room(&self) -> io::Result<()> {
        // Room that there is already is told at once.
        let listening = pipe::Sender::from_owned_fd_unchecked(self.0.try_clone()?)?;
        listening.writable().await
    }

    /// Says that nothing follows.
    pub(super) fn shut_down(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(&self.0, Shutdown::Write)?)
    }
}

impl Drop for LocalWriter {
    fn drop(&mut self) {
        // The peer may be gone.
        let _ = self.shut_down();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use std::collections::BTreeSet;
    use std::os::fd::{AsRawFd, RawFd};
    use tokio::io::AsyncReadExt;

    const IN: u32 = 1;
    const OUT: u32 = 4;

    /// What this process listens for, by the kernel's list of each of its epoll instances: descriptors and events.
    fn listens() -> Vec<(RawFd, u32)> {
        let lists = std::fs::read_dir("/proc/self/fdinfo").unwrap();
        // One that was closed meanwhile is no epoll instance of this test.
        let lists = lists.filter_map(|list| std::fs::read_to_string(list.unwrap().path()).ok());
        let entry = |line: &str| {
            let mut words = line.strip_prefix("tfd:")?.split_whitespace();
            let descriptor = words.next()?.parse().ok()?;
            Some((descriptor, u32::from_str_radix(words.nth(1)?, 16).ok()?))
        };
        lists
            .flat_map(|list| list.lines().filter_map(entry).collect::<Vec<_>>())
            .collect()
    }

    /// Of these events which it listens for at a descriptor.
    fn listens_for(descriptor: RawFd) -> u32 {
        let of_it = listens().into_iter().filter(|(at, _)| *at == descriptor);
        of_it.fold(0, |sum, (_, events)| sum | events) & (IN | OUT)
    }

    /// At how many descriptors it listens for room. An instance that has two descriptors itself is listed twice.
    fn listens_for_room() -> usize {
        let room = listens()
            .into_iter()
            .filter(|(_, events)| events & OUT != 0);
        room.map(|(at, _)| at).collect::<BTreeSet<_>>().len()
    }

    #[tokio::test]
    async fn who_sends_is_not_told_that_its_peer_has_read() {
        let (one, other) = UnixStream::pair().unwrap();
        assert_eq!(listens_for(one.as_raw_fd()), IN | OUT);
        let (reader, mut writer) = halves(one).unwrap();
        let (_reader, _writer) = halves(other).unwrap();
        assert_eq!(listens_for(reader.as_raw_fd()), IN);
        assert_eq!(listens_for(writer.0.as_raw_fd()), 0);
        let bytes = vec![7; 64 << 10];
        while writer.write(&bytes).now_or_never().is_some() {}
        let before = listens_for_room();
        {
            let waits = writer.write(&bytes);
            tokio::pin!(waits);
            assert!(waits.as_mut().now_or_never().is_none());
            assert_eq!(listens_for_room(), before + 1);
        }
        // Who waits no longer listens no longer; while it waits it does so at a copy.
        assert_eq!(listens_for_room(), before);
    }

    #[tokio::test]
    async fn a_sender_waits_for_room_and_hears_of_it() {
        let (one, other) = UnixStream::pair().unwrap();
        let (_, mut writer) = halves(one).unwrap();
        let (mut reader, _writer) = halves(other).unwrap();
        let bytes = vec![7; 64 << 10];
        let mut sent = 0;
        while let Some(count) = writer.write(&bytes).now_or_never() {
            sent += count.unwrap();
        }
        let waits = async {
            let count = writer.write(&bytes).await.unwrap();
            drop(writer);
            count
        };
        let mut received = Vec::new();
        let (more, read) = tokio::join!(waits, reader.read_to_end(&mut received));
        assert_eq!(read.unwrap(), sent + more);
        assert!(received.iter().all(|byte| *byte == 7));
    }

    #[tokio::test]
    async fn who_has_gone_takes_nothing() {
        let (one, other) = UnixStream::pair().unwrap();
        let (_reader, mut writer) = halves(one).unwrap();
        drop(other);
        let error = writer.write(b"anyone?").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
