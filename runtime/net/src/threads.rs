//! Threads that do nothing but QUIC's work.
//!
//! A process that runs its users' code cannot rely on a thread being free for the network: an actor that computes
//! without awaiting keeps one from it, as many as there are keep all. Peers would take that for the end of the
//! process, because nobody acknowledges their packets. So packets are read, acknowledged and written here, and only what
//! they carry waits for a thread of the others.

use std::future::Future;
use std::io;
use std::net::UdpSocket;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};
use tokio::runtime::{Builder, Handle};

/// Processors of which one thread's worth goes to the network where all are at work: some 3 Gbit/s a thread.
const PROCESSORS_PER_THREAD: usize = 8;
/// More than the largest machines send.
const THREADS_MAX: usize = 8;

/// The threads; they end with this.
#[derive(Debug)]
pub struct NetworkThreads(Option<tokio::runtime::Runtime>);

impl NetworkThreads {
    /// As many as suit this machine.
    pub fn start() -> io::Result<Self> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let runtime = Builder::new_multi_thread()
            .worker_threads(
                processors
                    .div_ceil(PROCESSORS_PER_THREAD)
                    .clamp(1, THREADS_MAX),
            )
            .thread_name("network")
            .enable_all()
            .build()?;
        Ok(NetworkThreads(Some(runtime)))
    }

    pub(crate) fn runtime(&self) -> Arc<dyn Runtime> {
        let runtime = self.0.as_ref().expect("it is there until it is dropped");
        Arc::new(OnThreads(runtime.handle().clone()))
    }
}

impl Drop for NetworkThreads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // Waiting for them would block whatever thread drops this, which may be an executor's.
            runtime.shutdown_background();
        }
    }
}

/// What an endpoint needs of a runtime, from these threads.
#[derive(Debug)]
struct OnThreads(Handle);

impl Runtime for OnThreads {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _here = self.0.enter();
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        // Ends with its connection or endpoint, or with the threads.
        self.0.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let _here = self.0.enter();
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mobula_wire::hello::Lane;

    use super::*;
    use crate::endpoint::{Endpoint, LaneClass};
    use crate::identity::{ClusterCa, Role};
    use crate::testing::{credentials, loopback};

    /// Longer than a connection of calls may be silent.
    const BUSY: Duration = Duration::from_secs(7);

    #[test]
    fn a_process_whose_other_threads_are_all_busy_keeps_its_connections() {
        let ca = ClusterCa::create("demo").unwrap();
        let (host, caller) = (credentials(&ca, Role::Host), credentials(&ca, Role::Client));
        let threads = NetworkThreads::start().unwrap();
        let busy = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let host = Endpoint::bind_on(&threads, loopback(), &host).unwrap();
        let address = host.local_address();
        let serving = busy.spawn(async move {
            let connection = host.accept().await.unwrap();
            let (_, mut stream) = connection.accept().await.unwrap();
            let asked: String = stream.receiver.receive_message().await.unwrap().unwrap();
            // An actor that computes, on the only thread that there is for actors.
            std::thread::sleep(BUSY);
            stream.sender.send_message(&asked).await.unwrap();
            connection.closed().await;
        });
        let calm = Builder::new_multi_thread().enable_all().build().unwrap();
        calm.block_on(async {
            let ours = Endpoint::bind_client(loopback(), &caller).unwrap();
            let connection = ours
                .connect(address, LaneClass::Control, Role::Host)
                .await
                .unwrap();
            let mut stream = connection.open(Lane::Call).await.unwrap();
            stream.sender.send_message(&"well?").await.unwrap();
            let answer: Option<String> = stream.receiver.receive_message().await.unwrap();
            assert_eq!(answer.as_deref(), Some("well?"));
            ours.close("done").await;
        });
        busy.block_on(serving).unwrap();
    }
}
