//! What tasks do when things go wrong around them: the program of `tests/it/tasks.rs`.
//!
//! Test and program meet in a folder: a task says there that it has begun, and waits there until it
//! may go on. Nothing here depends on how long something takes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt, TryStreamExt};
use mobula::prelude::*;
use serde::{Deserialize, Serialize};

/// How long anything that is waited for may take.
const LIMIT: Duration = Duration::from_secs(110);

/// How often is looked.
const POLL: Duration = Duration::from_millis(5);

/// The folder, as tasks are given it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Folder(PathBuf);

impl Folder {
    /// Says `name`, with `text`.
    fn say(&self, name: &str, text: &str) {
        let path = self.0.join(name);
        let draft = self.0.join(format!("{name}.draft"));
        std::fs::write(&draft, text).expect("the test made the folder");
        std::fs::rename(draft, path).expect("both are in the folder");
    }

    fn has(&self, name: &str) -> bool {
        self.0.join(name).exists()
    }

    /// How many names begin like this.
    fn count(&self, beginning: &str) -> std::io::Result<usize> {
        let mut count = 0;
        for entry in std::fs::read_dir(&self.0)? {
            let name = entry?.file_name();
            let name = name.to_string_lossy();
            count += usize::from(name.starts_with(beginning) && !name.ends_with(".draft"));
        }
        Ok(count)
    }

    async fn until(&self, name: &str) {
        let began = Instant::now();
        while !self.has(name) {
            assert!(began.elapsed() < LIMIT, "nobody said `{name}`");
            tokio::time::sleep(POLL).await;
        }
    }

    /// The same for a task that computes and never awaits.
    fn until_blocking(&self, name: &str) {
        let began = Instant::now();
        while !self.has(name) {
            assert!(began.elapsed() < LIMIT, "nobody said `{name}`");
            std::thread::sleep(POLL);
        }
    }
}

/// The square of `x`, and at which attempt. One that is `held` stays at its first one for ever.
#[mobula::task(max_retries = 10)]
async fn square(ctx: &TaskContext, folder: Folder, x: u64, held: bool) -> (u64, u32) {
    if held && ctx.attempt() == 1 {
        folder.say(&format!("held-{x}"), &std::process::id().to_string());
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(Duration::from_millis(2)).await;
    (x * x, ctx.attempt())
}

/// Many tasks, some of which get on only when their process is killed under them.
async fn kills(cluster: &Cluster, folder: &Folder, count: u64) -> mobula::Result<()> {
    let values: Vec<_> = (0..count)
        .map(|x| {
            let held = x % (count / 3) == 7;
            cluster.task(square(folder.clone(), x, held)).submit()
        })
        .collect();
    let (mut right, mut retried) = (0, 0);
    for (x, value) in (0..count).zip(&values) {
        let (value, attempt) = value.get().await?;
        right += u64::from(value == x * x);
        retried += u64::from(attempt > 1);
    }
    let result = serde_json::json!({ "right": right, "retried": retried });
    cluster.set_result(&result).await
}

/// Says that it has begun, and ends when it may.
#[mobula::task]
async fn holds(folder: Folder, n: u64) -> u64 {
    folder.say(&format!("holding-{n}"), "");
    folder.until("go").await;
    n
}

#[mobula::task]
async fn says(folder: Folder, n: u64) -> u64 {
    folder.say(&format!("said-{n}"), "");
    n
}

/// Computed by tasks that submit tasks and wait for them.
#[mobula::task]
async fn fibonacci(ctx: &TaskContext, n: u64) -> Result<u64, mobula::Error> {
    if n < 2 {
        return Ok(n);
    }
    let cluster = ctx.cluster();
    let parts = [n - 1, n - 2].map(|n| cluster.task(fibonacci(n)).submit());
    Ok(parts[0].get().await? + parts[1].get().await?)
}

/// More long tasks than there are slots, then short ones, then more nested ones than slots.
async fn full(cluster: &Cluster, folder: &Folder) -> mobula::Result<()> {
    let long: Vec<_> = (0..16)
        .map(|n| cluster.task(holds(folder.clone(), n)).submit())
        .collect();
    let short: Vec<_> = (0..100)
        .map(|n| cluster.task(says(folder.clone(), n)).submit())
        .collect();
    let nested: Vec<_> = (0..16)
        .map(|_| cluster.task(fibonacci(7)).submit())
        .collect();
    let mut sum = 0;
    for value in long.iter().chain(&short) {
        sum += value.get().await?;
    }
    let mut fibonacci = BTreeSet::new();
    for value in &nested {
        fibonacci.insert(value.get().await?);
    }
    let result = serde_json::json!({ "sum": sum, "fibonacci": fibonacci });
    cluster.set_result(&result).await
}

/// A value that is too large to travel with an answer; made on more than one node.
#[mobula::task]
async fn large(ctx: &TaskContext, folder: Folder, n: u64) -> Vec<u64> {
    folder.say(
        &format!("made-{n}-{}", rand_name()),
        &format!("{} {}", ctx.node_name(), std::process::id()),
    );
    folder.until("two-nodes").await;
    vec![n; 100_000]
}

/// A name that no other execution has.
fn rand_name() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    format!(
        "{}-{}",
        std::process::id(),
        since.expect("after 1970").as_nanos()
    )
}

/// Uses a large value where it runs.
#[mobula::task]
async fn first_and_length(values: ObjectRef<Vec<u64>>) -> Result<(u64, usize), mobula::Error> {
    let values = values.view().await?;
    Ok((values[0], values.len()))
}

/// Large values, read when the test says that what held them is gone.
async fn lost(cluster: &Cluster, folder: &Folder) -> mobula::Result<()> {
    let values: Vec<_> = (0..6)
        .map(|n| cluster.task(large(folder.clone(), n)).submit())
        .collect();
    let waited = cluster.wait(&values, values.len(), LIMIT).await?;
    assert!(waited.pending.is_empty(), "{waited:?}");
    folder.say("made", "");
    folder.until("gone").await;
    let used: Vec<_> = values
        .iter()
        .map(|value| cluster.task(first_and_length(value.clone())).submit())
        .collect();
    let mut right = 0;
    for (n, (value, used)) in (0..).zip(values.iter().zip(&used)) {
        right += u64::from(value.get().await? == vec![n; 100_000]);
        right += u64::from(used.get().await? == (n, 100_000));
    }
    cluster
        .set_result(&serde_json::json!({ "right": right }))
        .await
}

/// Says `name` when it is dropped.
struct SaysWhenDropped(Folder, &'static str);

impl Drop for SaysWhenDropped {
    fn drop(&mut self) {
        self.0.say(self.1, "");
    }
}

#[mobula::task]
async fn child(folder: Folder) -> u64 {
    let _says = SaysWhenDropped(folder.clone(), "child-dropped");
    folder.say("child-begun", "");
    std::future::pending().await
}

#[mobula::task]
async fn parent(ctx: &TaskContext, folder: Folder) -> Result<u64, mobula::Error> {
    ctx.cluster().task(child(folder)).submit().get().await
}

/// Never awaits.
#[mobula::task]
fn spins(folder: Folder) -> u64 {
    folder.say("spinning", "");
    folder.until_blocking("spun-enough");
    1
}

#[mobula::task]
async fn never() -> u64 {
    std::future::pending().await
}

/// Ends its process, at its first attempt or at every one.
#[mobula::task(max_retries = 1)]
async fn exits(ctx: &TaskContext, always: bool) -> u32 {
    if always || ctx.attempt() == 1 {
        std::process::exit(4);
    }
    ctx.attempt()
}

#[mobula::task]
fn panics(text: String) -> u64 {
    panic!("{text}")
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Odd(u64);

impl std::fmt::Display for Odd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is odd", self.0)
    }
}

#[mobula::task]
async fn half(x: u64) -> Result<u64, Odd> {
    if x % 2 == 1 { Err(Odd(x)) } else { Ok(x / 2) }
}

/// Remembers how often it was asked.
struct Bystander(u64);

#[mobula::actor]
impl Bystander {
    fn new() -> Self {
        Bystander(0)
    }

    async fn asked(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }
}

fn is_cancelled(error: &mobula::Error) -> bool {
    matches!(error, mobula::Error::Call(CallError::Cancelled { .. }))
}

/// Says of each number that it is made.
#[mobula::task]
fn numbers(folder: Folder, up_to: u64) -> impl Stream<Item = u64> {
    futures::stream::iter(0..up_to).inspect(move |n| folder.say(&format!("number-{n}"), ""))
}

/// What waits for one reader who takes one number: what it asked for, and what is in each hand.
async fn pressure(cluster: &Cluster, folder: &Folder) -> mobula::Result<()> {
    let mut stream = cluster
        .task(numbers(folder.clone(), 1000))
        .window(4)
        .submit();
    assert_eq!(stream.next().await.transpose()?, Some(0));
    // The task has come to wait once another one ran in its slot, or beside it.
    for n in 0..20 {
        cluster.task(says(folder.clone(), n)).submit().get().await?;
    }
    let ahead = folder.count("number-")?;
    assert!(ahead <= 1 + 4 + 2 + 1, "{ahead} made for one that was read");
    let rest: Vec<u64> = stream.try_collect().await?;
    assert_eq!(rest, (1..1000).collect::<Vec<_>>());

    let result = serde_json::json!({ "ahead": ahead });
    cluster.set_result(&result).await
}

/// Every way in which a task can end other than by its value.
async fn ends(cluster: &Cluster, folder: &Folder) -> mobula::Result<()> {
    let mut bystanders = Vec::new();
    for _ in 0..4 {
        let actor = cluster.actor(Bystander::new()).spread("bystanders");
        bystanders.push(actor.spawn().await?);
    }
    for bystander in &bystanders {
        assert_eq!(bystander.asked().await?, 1);
    }

    let value = cluster.task(parent(folder.clone())).submit();
    folder.until("child-begun").await;
    value.cancel(false);
    let error = value.get().await.expect_err("it was cancelled");
    assert!(is_cancelled(&error), "{error}");
    folder.until("child-dropped").await;

    let value = cluster.task(spins(folder.clone())).submit();
    folder.until("spinning").await;
    value.cancel(true);
    let error = value.get().await.expect_err("it was cancelled");
    assert!(is_cancelled(&error), "{error}");
    folder.say("spun-enough", "");

    let late = cluster.task(never()).timeout(Duration::from_millis(300));
    let error = late.submit().get().await.expect_err("it never ends");
    let is_late = matches!(
        error,
        mobula::Error::Call(CallError::DeadlineExceeded { limit_ms: 300, .. })
    );
    assert!(is_late, "{error}");

    assert_eq!(cluster.task(exits(false)).submit().get().await?, 2);
    let error = cluster.task(exits(true)).submit().get().await;
    let error = error.expect_err("a process that exits brings no value");
    let text = error.to_string();
    assert!(
        text.contains("task `task_cases::exits`") && text.contains("exited with code 4"),
        "{text}"
    );
    assert_eq!(error.executed(), Executed::Unknown);

    let error = cluster.task(panics("oh".to_owned())).submit().get().await;
    assert_eq!(
        error,
        Err(mobula::Error::Call(CallError::Panicked("oh".to_owned())))
    );
    let error = cluster.task(half(7)).submit().get().await;
    let error = error.expect_err("7 is odd");
    assert_eq!(error.user_error::<Odd>(), Some(Odd(7)));
    assert_eq!(cluster.task(half(8)).submit().get().await.ok(), Some(4));

    // Processes of tasks have ended; those of actors have not.
    for bystander in &bystanders {
        assert_eq!(bystander.asked().await?, 2);
    }
    cluster
        .set_result(&serde_json::json!("all ended as they should"))
        .await
}

#[mobula::main]
async fn main(cluster: Cluster, args: Vec<String>) -> mobula::Result<()> {
    let [case, folder] = args.as_slice() else {
        return Err("a case and a folder".to_owned().into());
    };
    let folder = Folder(Path::new(folder).to_owned());
    match case.as_str() {
        "kills" => kills(&cluster, &folder, 2000).await,
        "full" => full(&cluster, &folder).await,
        "lost" => lost(&cluster, &folder).await,
        "ends" => ends(&cluster, &folder).await,
        "pressure" => pressure(&cluster, &folder).await,
        other => Err(format!("there is no case `{other}`").into()),
    }
}
