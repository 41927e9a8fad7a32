//! The load generator: HTTP/1.1 over connections that stay open.
//!
//! In a closed loop each caller waits for its answer and asks again, so that a slow server is asked less. In an open loop
//! requests come at random times that the server has no part in, and a latency counts from the time at which its request
//! was due, so that waiting for a free connection is not forgotten.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

use crate::Outcome;
use crate::target::Target;

/// Connections of a crowd: fewer than a router takes, more than an endpoint of two replicas lets wait.
pub(crate) const CONNECTIONS: usize = 1000;

/// The longest latency that is told apart from longer ones.
const LATENCY_MAX_NS: u64 = 60_000_000_000;

/// The largest answer that is read: the models of this suite answer far less.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// How long a caller waits. One that waited for ever would stop the suite: a tritonserver under 512 callers has been seen to
/// leave requests without an answer, their connections open and idle.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// When requests come: independent of each other, so many a second on average.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrivals {
    pub(crate) per_second: f64,
    pub(crate) seed: u64,
    /// Over which they come. What comes while all are busy waits for one.
    pub(crate) connections: usize,
}

/// What came of the requests of a row, in nanoseconds.
#[derive(Debug)]
pub(crate) struct Outcomes {
    /// Of those that were answered.
    pub(crate) answered: Histogram<u64>,
    /// Of those that were refused with 503, from the moment at which they were sent.
    pub(crate) refused: Histogram<u64>,
    /// Those whose time had passed (504).
    pub(crate) late: u64,
    /// Of those that had no answer within [`ANSWER_LIMIT`].
    pub(crate) unanswered: u64,
    /// Until the last answer.
    elapsed: Duration,
}

impl Outcomes {
    fn new() -> Outcome<Self> {
        Ok(Outcomes {
            answered: Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3)?,
            refused: Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3)?,
            late: 0,
            unanswered: 0,
            elapsed: Duration::ZERO,
        })
    }

    pub(crate) fn answered_per_second(&self) -> f64 {
        self.per_second(&self.answered)
    }

    pub(crate) fn per_second(&self, outcomes: &Histogram<u64>) -> f64 {
        outcomes.len() as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// Asks once, and records what comes of it.
    async fn ask(
        &mut self,
        connection: &mut Connection,
        target: &Target,
        due: Instant,
        start: Instant,
    ) -> Outcome {
        let sent = Instant::now();
        let asked = tokio::time::timeout(ANSWER_LIMIT, connection.ask(&target.request));
        let Ok(answer) = asked.await else {
            self.unanswered += 1;
            // The answer may still come, and is not the next request's.
            *connection = Connection::open(target).await?;
            return Ok(());
        };
        let answer = answer?;
        match answer.status {
            200 => self.answered.saturating_record(nanoseconds(due.elapsed())),
            503 => self.refused.saturating_record(nanoseconds(sent.elapsed())),
            504 => self.late += 1,
            status => return Err(format!("status {status}: {}", answer.text()).into()),
        }
        self.elapsed = start.elapsed();
        Ok(())
    }

    fn merge(&mut self, other: &Outcomes) {
        self.answered += &other.answered;
        self.refused += &other.refused;
        self.late += other.late;
        self.unanswered += other.unanswered;
        self.elapsed = self.elapsed.max(other.elapsed);
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// An answer, whatever its status.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A connection that stays open.
pub(crate) struct Connection {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Connection {
    pub(crate) async fn open(target: &Target) -> Outcome<Self> {
        let stream = TcpStream::connect(&target.address).await?;
        stream.set_nodelay(true)?;
        Ok(Connection {
            stream,
            read: Vec::new(),
        })
    }

    /// Sends a request and reads its answer.
    pub(crate) async fn ask(&mut self, request: &[u8]) -> Outcome<Answer> {
        self.stream.write_all(request).await?;
        self.read.clear();
        loop {
            if let Some(answer) = whole_answer(&self.read)? {
                return Ok(answer);
            }
            if self.read.len() > ANSWER_BYTES_MAX {
                return Err(format!("an answer of more than {ANSWER_BYTES_MAX} bytes").into());
            }
            if self.stream.read_buf(&mut self.read).await? == 0 {
                return Err("the connection was closed before the answer was whole".into());
            }
        }
    }
}

/// The answer that these bytes begin with, once all of it is there.
fn whole_answer(bytes: &[u8]) -> Outcome<Option<Answer>> {
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = std::str::from_utf8(&bytes[..end])?.to_owned();
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
    let mut answer = Answer {
        status: status.ok_or("an answer without a status")?,
        head,
        body: Vec::new(),
    };
    let length: usize = match answer.header("content-length") {
        Some(length) => length.parse()?,
        None => return Err("an answer without a length".into()),
    };
    let Some(body) = bytes.get(end + 4..end + 4 + length) else {
        return Ok(None);
    };
    answer.body = body.to_vec();
    Ok(Some(answer))
}

/// Lets so many callers ask for so long.
pub(crate) async fn closed(target: &Target, callers: usize, length: Duration) -> Outcome<Outcomes> {
    closed_while(target, callers, move |elapsed| elapsed < length).await
}

/// Lets so many callers ask until nobody wants them to, which they ask before each request.
pub(crate) async fn closed_while(
    target: &Target,
    callers: usize,
    goes_on: impl Fn(Duration) -> bool + Clone + Send + 'static,
) -> Outcome<Outcomes> {
    let mut tasks = JoinSet::new();
    let mut connections = Vec::with_capacity(callers);
    for _ in 0..callers {
        connections.push(Connection::open(target).await?);
    }
    let start = Instant::now();
    for mut connection in connections {
        let target = target.clone();
        let goes_on = goes_on.clone();
        tasks.spawn(async move {
            let mut outcomes = Outcomes::new()?;
            while goes_on(start.elapsed()) {
                let asking = outcomes.ask(&mut connection, &target, Instant::now(), start);
                asking.await?;
            }
            Ok(outcomes)
        });
    }
    all(tasks).await
}

/// Lets requests come for so long, and waits until each has an answer.
pub(crate) async fn open(
    target: &Target,
    arrivals: Arrivals,
    length: Duration,
) -> Outcome<Outcomes> {
    open_while(target, arrivals, |elapsed| elapsed < length).await
}

/// Lets requests come until nobody wants more, and waits until each has an answer.
pub(crate) async fn open_while(
    target: &Target,
    arrivals: Arrivals,
    goes_on: impl Fn(Duration) -> bool,
) -> Outcome<Outcomes> {
    let (due, waiting) = mpsc::unbounded_channel::<Instant>();
    let waiting = Arc::new(Mutex::new(waiting));
    let mut tasks = JoinSet::new();
    let mut connections = Vec::with_capacity(arrivals.connections);
    for _ in 0..arrivals.connections {
        connections.push(Connection::open(target).await?);
    }
    let start = Instant::now();
    for mut connection in connections {
        let target = target.clone();
        let waiting = Arc::clone(&waiting);
        tasks.spawn(async move {
            let mut outcomes = Outcomes::new()?;
            loop {
                let next = waiting.lock().await.recv().await;
                let Some(due) = next else {
                    return Ok(outcomes);
                };
                outcomes.ask(&mut connection, &target, due, start).await?;
            }
        });
    }
    let mut random = arrivals.seed;
    let mut at = Duration::ZERO;
    // The queue is bounded by what comes within the length of the row.
    while goes_on(at) {
        tokio::time::sleep_until((start + at).into()).await;
        // The timer has a grain of a millisecond: all that is due by now is sent.
        while at <= start.elapsed() && goes_on(at) {
            due.send(start + at)?;
            at += Duration::from_secs_f64(gap(&mut random, arrivals.per_second));
        }
    }
    drop(due);
    all(tasks).await
}

async fn all(mut tasks: JoinSet<Outcome<Outcomes>>) -> Outcome<Outcomes> {
    let mut sum = Outcomes::new()?;
    while let Some(outcomes) = tasks.join_next().await {
        sum.merge(&outcomes??);
    }
    Ok(sum)
}

/// Seconds until the next arrival of a Poisson process (SplitMix64 and the inverse of the exponential distribution).
fn gap(random: &mut u64, per_second: f64) -> f64 {
    *random = random.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *random;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    let uniform = (z >> 11) as f64 / (1u64 << 53) as f64;
    -(1.0 - uniform).ln() / per_second.max(f64::MIN_POSITIVE)
}
