//! The `mobula` binary: argument handling and composition only. One file a command.

mod actors;
mod args;
mod audit;
mod backup;
mod builtin;
mod chaos;
mod checkpoints;
mod clock;
mod connect;
mod demo;
mod drift;
mod experiment;
mod explain;
mod head;
mod heads;
mod jobs;
mod keys;
mod local;
mod models;
mod nodes;
mod output;
mod policy;
mod preemptions;
mod registry_log;
mod replay;
mod rollout;
mod scaling;
mod scenario;
mod secrets;
mod sentinels;
mod serve;
mod signing;
mod status;
mod submit;
mod tokens;
mod train;
mod train_file;
mod upload;
mod worker;

use std::process::ExitCode;

use crate::args::{Arguments, Command};

fn main() -> ExitCode {
    // An agent starts this same binary as a host or as the driver of a built-in job.
    if let Some(code) = mobula::process::run_in_cluster(builtin::main) {
        return code;
    }
    let arguments = Arguments::from_command_line();
    if !arguments.command.is_daemon() {
        end_quietly_on_a_closed_pipe();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("mobula: the runtime cannot be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    // A command that changed something leaves no session behind, for the next thousand to trip over.
    let ended = runtime.block_on(async {
        let ended = Box::pin(run(arguments)).await;
        mobula::control::sessions_closed().await;
        ended
    });
    match ended {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", output::causes(&error));
            ExitCode::FAILURE
        }
    }
}

/// The exit status that a shell shows for a process that a closed pipe has ended.
const CLOSED_PIPE_STATUS: i32 = 128 + libc::SIGPIPE;

/// `mobula … | head` ends when `head` has seen enough, as other commands do, instead of with the
/// message of a panic over the write that fails.
///
/// Not by the signal: that would end the process also when a *socket* is closed that it writes to, in
/// the middle of finding another head.
fn end_quietly_on_a_closed_pipe() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let message = info.payload().downcast_ref::<String>();
        let is_closed_pipe = message.is_some_and(|message| {
            message.starts_with("failed printing to std") && message.contains("Broken pipe")
        });
        if is_closed_pipe {
            std::process::exit(CLOSED_PIPE_STATUS);
        }
        before(info);
    }));
}

async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let target = arguments.target;
    match arguments.command {
        Command::Head(options) => head::run(&target, options).await?,
        Command::Worker(options) => worker::run(options).await?,
        Command::Local(command) => return local::run(&target, command).await,
        Command::Demo(options) => return demo::run(options).await,
        Command::Submit(options) => return submit::run(&target, options).await,
        Command::Train { command, arguments } => {
            return train::run(&target, command, arguments).await;
        }
        Command::Jobs(command) => return jobs::run(&target, command).await,
        Command::Actors(command) => actors::run(&target, command).await?,
        Command::Nodes(command) => nodes::run(&target, command).await?,
        Command::Checkpoints(command) => return checkpoints::run(&target, command).await,
        Command::Models(command) => return models::run(&target, command).await,
        Command::Keys(command) => keys::run(&target, command).await?,
        Command::Policy(command) => policy::run(&target, command).await?,
        Command::Data(command) => policy::data::run(&target, command).await?,
        Command::Approvals(command) => policy::approvals::run(&target, command).await?,
        Command::Serve(command) => serve::run(&target, command).await?,
        Command::Rollout(command) => rollout::run(&target, command).await?,
        Command::Experiment(command) => experiment::run(&target, command).await?,
        Command::Drift(command) => drift::run(&target, command).await?,
        Command::Tokens(command) => tokens::run(&target, command).await?,
        Command::Audit {
            command: Some(command),
            ..
        } => registry_log::run(&target, command).await?,
        Command::Audit { arguments, .. } => audit::run(&target, arguments).await?,
        Command::Metrics { node } => status::metrics(&target, node).await?,
        Command::Status(format) => status::run(&target, format).await?,
        Command::Explain(options) => explain::run(&target, options).await?,
        Command::Chaos(command) => return chaos::run_command(command).await,
    }
    Ok(ExitCode::SUCCESS)
}
