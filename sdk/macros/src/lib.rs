//! The attribute macros of the Mobula SDK; use them through the `mobula` crate.
//!
//! Invariant: what cannot be an actor or a main function is refused here with a message that says
//! what to write instead; generated code never is the first to complain.

mod actor;
mod entry;
mod method;
mod options;
mod task;

use proc_macro::TokenStream;

/// Makes a type an actor: stands on its inherent `impl` block.
///
/// * `fn new(..)` is the constructor: plain or `async`, returning `Self` or `Result<Self, E>`
///   where `E: Display`. It may take `ctx: &ActorContext` first. The macro renames it to
///   `construct` and puts in its place a `new` that only *describes* the actor: `Counter::new(5)`
///   gives an `Init<Counter>` for `cluster.actor(..)`.
/// * Every function with `&self` or `&mut self` can be called from other processes: on
///   `ActorRef<Counter>` it appears under the same name through the trait `CounterCalls`, which is
///   generated beside the type. It may take `ctx: &ActorContext` right after `self`. Arguments and
///   values are owned and implement serde's traits; a `Result<T, E>` brings the caller that `E`.
/// * A method that returns `impl Stream<Item = T>` (or `StreamOf<T>`) gives the caller a stream of
///   `T`; it runs until the stream ends, and goes on only as the caller reads.
/// * `#[mobula(local)]` keeps a function out of that; `#[mobula(started)]`, `#[mobula(notice)]`
///   (takes the deadline in milliseconds since the Unix epoch) and `#[mobula(stop)]` make it a
///   hook. A hook takes its turn as a method with `&mut self` does.
/// * `#[mobula::actor(name = "shop.counter")]` names the type; otherwise its path is its name.
/// * `#[mobula::actor(max_concurrency = 8)]`: up to eight methods with `&self` run at once, each in
///   a task of its own; one with `&mut self` waits for all that came before it, runs alone, and
///   all that came after it wait. `groups(io = 4)` declares a group with a limit of its own, and
///   `#[mobula(group = "io")]` puts a method into it. The type must be `Sync` then. Without these,
///   methods run one after another.
/// * `#[mobula::actor(durable)]`: the actor keeps what its methods save in `ctx.state()` beyond its
///   own life. It is committed when a method returns, and restored before the constructor of the
///   next start runs, on whatever worker that is.
/// * `#[mobula(blocking)]` on a plain `fn` says that it blocks its thread, by computing or by
///   synchronous I/O: other actors of the process go on meanwhile.
#[proc_macro_attribute]
pub fn actor(arguments: TokenStream, item: TokenStream) -> TokenStream {
    actor::expand(arguments.into(), item.into())
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}

/// Makes a function a task: one execution of it is submitted with `cluster.task(square(3))` and
/// runs in a slot of some worker.
///
/// * The function is `async` or not: it runs on a thread of its slot, so it may compute as long as
///   it likes. It may take `ctx: &TaskContext` first. Arguments and value are owned and implement
///   serde's traits; a `Result<T, E>` is a task of `T` that may fail with that `E`.
/// * In its place stands a function of the same name and arguments that only *describes* the task:
///   `square(3)` is a `Task<u64>`.
/// * An argument whose type is written `ObjectRef<T>` is waited for: the task is sent when its
///   value is there, and fails if that failed.
/// * `#[mobula::task(cpus = 1, gpus = 0.5, memory_bytes = 1048576, max_retries = 3,
///   retry_errors = true, name = "shop.square")]`: what it needs, how often it is executed again
///   when its process or node was lost (3 unless said otherwise), whether its own errors and panics
///   are a reason too, and its name (otherwise its path).
#[proc_macro_attribute]
pub fn task(arguments: TokenStream, item: TokenStream) -> TokenStream {
    task::expand(arguments.into(), item.into())
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}

/// Makes an `async fn main(cluster: Cluster)` the main function of a program that is driver and
/// host in one: it may also take `args: Vec<String>`, and returns `()` or a `Result<T, E>` whose `T`
/// is serialized and whose `E` is an error, a box or report with one, or prints.
///
/// Started by hand, the program runs as a job on an embedded cluster of its own, or on the one
/// that `MOBULA_CLUSTER` names; started by a worker, it is the job's driver or a host of its
/// actors.
#[proc_macro_attribute]
pub fn main(arguments: TokenStream, item: TokenStream) -> TokenStream {
    entry::expand(arguments.into(), item.into())
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}
