//! `mobula actors`.

use std::collections::BTreeMap;
use std::time::Duration;

use mobula_core::id::{ActorId, JobId, NodeId};
use mobula_core::spec::TASK_SLOT_TYPE;
use mobula_wire::control::{Actor, GetActorRequest};

use crate::args::{ActorsCommand, Target};
use crate::connect::connect;
use crate::output::{or_dash, print_json, print_table};

pub(crate) async fn run(target: &Target, command: ActorsCommand) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    match command {
        ActorsCommand::List { job, all, format } => {
            let actors = cluster.list_actors(job).await?;
            if format.json {
                return print_json(&actors);
            }
            let is_slot = |actor: &&Actor| !all && actor.type_name == TASK_SLOT_TYPE;
            let (slots, actors): (Vec<&Actor>, Vec<&Actor>) = actors.iter().partition(is_slot);
            let rows: Vec<Vec<String>> = actors.into_iter().map(row).collect();
            print_table(
                &[
                    "ID",
                    "JOB",
                    "NAME",
                    "NAMESPACE",
                    "TYPE",
                    "STATE",
                    "NODE",
                    "PID",
                    "RESTARTS",
                    "LAST EXIT",
                ],
                &rows,
            );
            if let Some(summary) = slot_summary(&slots) {
                println!("{summary}");
            }
        }
        ActorsCommand::Show { actor, format } => {
            let reply = cluster
                .control()
                .read("show an actor", |mut client| async move {
                    client.get_actor(GetActorRequest { actor: actor.0 }).await
                })
                .await?;
            if format.json {
                return print_json(&reply);
            }
            let fields = [
                ("id", ActorId(reply.id).to_string()),
                ("job", JobId(reply.job).to_string()),
                ("name", reply.name.clone()),
                ("namespace", or_dash(namespace(&reply))),
                ("type", reply.type_name.clone()),
                ("state", reply.state.clone()),
                ("node", or_dash(reply.node.map(NodeId))),
                ("incarnation", or_dash(reply.incarnation)),
                ("call address", or_dash(reply.call_address.as_ref())),
                ("pid", or_dash(reply.pid)),
                ("restarts", reply.restarts.to_string()),
                ("last exit", or_dash(reply.exit_reason.as_ref())),
            ];
            for (name, value) in fields {
                println!("{name:<13} {value}");
            }
        }
        ActorsCommand::Stop { actor, grace_s } => {
            let grace = Duration::from_secs(u64::from(grace_s));
            cluster.stop_actor(actor, grace).await?;
            println!("{actor} is stopping");
        }
    }
    Ok(())
}

/// One line about the slots for tasks that the table does not show.
fn slot_summary(slots: &[&Actor]) -> Option<String> {
    if slots.is_empty() {
        return None;
    }
    let mut states = BTreeMap::<&str, usize>::new();
    for slot in slots {
        *states.entry(&slot.state).or_default() += 1;
    }
    let states: Vec<String> = states
        .iter()
        .map(|(state, count)| format!("{count} {state}"))
        .collect();
    Some(format!(
        "slots for tasks: {}; `--all` lists them",
        states.join(", ")
    ))
}

/// Where it is found, and whether it stays there without its creator.
fn namespace(actor: &Actor) -> Option<String> {
    let namespace = actor.namespace.as_ref()?;
    Some(match actor.detached {
        true => format!("{namespace} (detached)"),
        false => namespace.clone(),
    })
}

fn row(actor: &Actor) -> Vec<String> {
    vec![
        ActorId(actor.id).to_string(),
        JobId(actor.job).to_string(),
        if actor.name.is_empty() {
            "-".to_owned()
        } else {
            actor.name.clone()
        },
        or_dash(namespace(actor)),
        actor.type_name.clone(),
        actor.state.clone(),
        or_dash(actor.node.map(NodeId)),
        or_dash(actor.pid),
        actor.restarts.to_string(),
        or_dash(actor.exit_reason.as_ref()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_counted_by_state() {
        let slot = |state: &str| Actor {
            state: state.to_owned(),
            ..Actor::default()
        };
        let (a, b, c) = (slot("running"), slot("ended"), slot("running"));
        assert_eq!(slot_summary(&[]), None);
        assert_eq!(
            slot_summary(&[&a, &b, &c]).unwrap(),
            "slots for tasks: 1 ended, 2 running; `--all` lists them"
        );
    }
}
