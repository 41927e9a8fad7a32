//! `mobula local`: a whole cluster on this machine, as child processes.
//!
//! The data directory holds `cluster.json` (who runs, where, with which log), `tokens/`, and one
//! folder for each process.

mod down;
mod process;
mod record;
mod status;
pub(crate) mod up;

use std::path::PathBuf;
use std::process::ExitCode;

use crate::args::{LocalCommand, LocalDirectory};
use crate::connect::default_local_dir;

pub(crate) use down::stop_all;
pub(crate) use record::{CLUSTER_FILE, ClusterRecord};

pub(crate) async fn run(command: LocalCommand) -> anyhow::Result<ExitCode> {
    match command {
        LocalCommand::Up(arguments) => up::run(arguments).await?,
        LocalCommand::Down(directory) => down::run(&data_dir(&directory)?).await?,
        LocalCommand::Status(arguments) => {
            return status::run(&data_dir(&arguments.directory)?, arguments.format);
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn data_dir(directory: &LocalDirectory) -> anyhow::Result<PathBuf> {
    match &directory.data_dir {
        // Absolute, because the processes and the record outlive this one's working directory.
        Some(dir) => Ok(std::path::absolute(dir)?),
        None => default_local_dir(),
    }
}
