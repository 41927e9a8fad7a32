//! `mobula local`: a whole cluster on this machine, as child processes.
//!
//! The data directory holds `cluster.json` (who runs, where, with which log), `tokens/`, and one
//! folder for each process.

mod down;
mod heads;
mod process;
mod record;
mod status;
pub(crate) mod up;

use std::path::PathBuf;
use std::process::ExitCode;

use crate::args::{LocalCommand, LocalDirectory, Target};
use crate::connect::default_local_dir;

pub(crate) use down::stop_all;
pub(crate) use record::{CLUSTER_FILE, ClusterRecord};

pub(crate) async fn run(target: &Target, command: LocalCommand) -> anyhow::Result<ExitCode> {
    match command {
        LocalCommand::Up(arguments) => {
            let dir = data_dir(target, &arguments.directory)?;
            up::run(dir, arguments).await?;
        }
        LocalCommand::Down(directory) => down::run(&data_dir(target, &directory)?).await?,
        LocalCommand::Status(arguments) => {
            return status::run(&data_dir(target, &arguments.directory)?, arguments.format);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn data_dir(target: &Target, directory: &LocalDirectory) -> anyhow::Result<PathBuf> {
    match directory.data_dir.as_ref().or(target.cluster.as_ref()) {
        // Absolute, because the processes and the record outlive this one's working directory.
        Some(dir) => Ok(std::path::absolute(dir)?),
        None => default_local_dir(),
    }
}
