//! The policies' word before a version is served: by a new endpoint, or by a rollout or an experiment at one.

use mobula_core::control::{ApplyContext, Origin, Txn};
use mobula_core::error::Rejection;

use super::experiment::command::Command as ExperimentCommand;
use super::rollout::command::Command as RolloutCommand;
use super::state::Command;
use crate::registry;
use crate::registry::policy::gate;

/// Refuses what the policies forbid. To be called within the command, before what it does.
pub(super) fn pass(
    context: &ApplyContext,
    origin: Option<&Origin>,
    txn: &mut dyn Txn,
    command: &Command,
) -> Result<(), Rejection> {
    let (endpoint, model, version, rollout) = match command {
        Command::Deploy {
            endpoint,
            model,
            version,
            ..
        } => (endpoint, model, version, false),
        Command::Rollout(
            RolloutCommand::Start {
                endpoint,
                model,
                version,
                ..
            }
            | RolloutCommand::StartShadowed {
                endpoint,
                model,
                version,
                ..
            },
        ) => (endpoint, model, version, true),
        Command::Rollout(RolloutCommand::Begin(proposed)) => {
            (&proposed.endpoint, &proposed.model, &proposed.version, true)
        }
        Command::Experiment(ExperimentCommand::Start(proposed)) => {
            (&proposed.endpoint, &proposed.model, &proposed.version, true)
        }
        _ => return Ok(()),
    };
    // Without a version there is nothing to ask about, and the command is refused for what is wrong with it.
    let Ok(found) = registry::state::find(txn, model, *version) else {
        return Ok(());
    };
    gate::pass_deploy(context, txn, origin, &found, endpoint, rollout)
}
