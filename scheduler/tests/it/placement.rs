//! Placement by example: `placement.txt` holds cases of nodes and actors, and who goes where.
//!
//! ```text
//! case NAME
//! node NAME [cpu=N] [gpu=N] [custom.NAME=N] [LABEL:VALUE ...] [drain] [notice] [lost]
//! actor NAME [cpu=N] [gpu=N] [custom.NAME=N] [strategy=spread] [affinity=KEY]
//!       [spread=KEY] [strict=KEY] [select=LABEL:V1,V2] [gang=KEY]
//! place                 run passes
//! stop ACTOR            end an actor
//! expect ACTOR NODE     where it is; `-` for pending
//! explain ACTOR TEXT    its explanation contains this
//! ```

use std::collections::BTreeMap;

use mobula_core::label::{Labels, Requirement};
use mobula_core::spec::{ActorSpec, SpreadKey, Strategy};
use mobula_core::{ActorId, ExitReason, JobId, NodeId, Resources};
use mobula_scheduler::{Command, explain_actor};

use crate::cluster::{Cluster, actor_spec};

const CASES: &str = include_str!("placement.txt");

#[derive(Default)]
struct Names {
    nodes: BTreeMap<String, NodeId>,
    actors: BTreeMap<String, ActorId>,
    gang: Vec<(String, ActorSpec)>,
    gang_key: Option<String>,
}

fn milli(text: &str) -> u64 {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    whole.parse::<u64>().unwrap() * 1000 + format!("{part:0<3}").parse::<u64>().unwrap()
}

fn resource(resources: &mut Resources, key: &str, value: &str) -> bool {
    match key {
        "cpu" => resources.cpu_milli = milli(value),
        "gpu" => resources.gpu_milli = milli(value),
        _ => match key.strip_prefix("custom.") {
            Some(name) => drop(resources.custom.insert(name.to_owned(), milli(value))),
            None => return false,
        },
    }
    true
}

fn node(cluster: &mut Cluster, names: &mut Names, words: &[&str]) {
    let mut capacity = Resources::default();
    let mut labels = Labels::new();
    for word in &words[1..] {
        if let Some((key, value)) = word.split_once('=') {
            assert!(resource(&mut capacity, key, value), "{word}");
        } else if let Some((key, value)) = word.split_once(':') {
            labels.insert(key.to_owned(), value.to_owned());
        }
    }
    let (node, incarnation) = cluster.register_with(words[0], "boot", capacity, labels);
    if words.contains(&"drain") {
        cluster.ok(Command::DrainNode { node, on: true });
    }
    if words.contains(&"notice") {
        cluster.ok(Command::PreemptNode {
            node,
            grace_ms: 10_000,
        });
    }
    if words.contains(&"lost") {
        cluster.ok(Command::NodeLost { node, incarnation });
    }
    names.nodes.insert(words[0].to_owned(), node);
}

fn actor(cluster: &mut Cluster, names: &mut Names, words: &[&str]) {
    let mut spec = actor_spec(Some(words[0]), 0);
    let mut gang = None;
    for word in &words[1..] {
        let (key, value) = word.split_once('=').unwrap();
        let spread = |strict| {
            Some(SpreadKey {
                key: value.to_owned(),
                strict,
            })
        };
        match key {
            "strategy" => spec.placement.strategy = Strategy::Spread,
            "affinity" => spec.placement.affinity_key = Some(value.to_owned()),
            "spread" => spec.placement.spread_key = spread(false),
            "strict" => spec.placement.spread_key = spread(true),
            "gang" => gang = Some(value.to_owned()),
            "select" => {
                let (label, values) = value.split_once(':').unwrap();
                let values = values.split(',').map(str::to_owned).collect();
                spec.placement
                    .selector
                    .push(Requirement::In(label.to_owned(), values));
            }
            _ => assert!(resource(&mut spec.resources, key, value), "{word}"),
        }
    }
    if gang != names.gang_key {
        flush_gang(cluster, names);
    }
    match gang {
        Some(_) => {
            names.gang_key = gang;
            names.gang.push((words[0].to_owned(), spec));
        }
        None => {
            let id = cluster.create(JobId::SYSTEM, vec![spec], false)[0];
            names.actors.insert(words[0].to_owned(), id);
        }
    }
}

fn flush_gang(cluster: &mut Cluster, names: &mut Names) {
    names.gang_key = None;
    let (members, specs): (Vec<String>, Vec<ActorSpec>) = names.gang.drain(..).unzip();
    if !specs.is_empty() {
        let ids = cluster.create(JobId::SYSTEM, specs, true);
        names.actors.extend(members.into_iter().zip(ids));
    }
}

#[test]
fn placement_decides_as_the_table_says() {
    let mut case = "";
    let mut cluster = Cluster::new();
    let mut names = Names::default();
    for (number, line) in CASES.lines().enumerate() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = format!("placement.txt:{} ({case})", number + 1);
        match words.as_slice() {
            [] => {}
            [first, ..] if first.starts_with('#') => {}
            ["case", ..] => {
                case = line;
                (cluster, names) = (Cluster::new(), Names::default());
            }
            ["node", rest @ ..] => node(&mut cluster, &mut names, rest),
            ["actor", rest @ ..] => actor(&mut cluster, &mut names, rest),
            ["place"] => {
                flush_gang(&mut cluster, &mut names);
                cluster.place();
            }
            ["stop", name] => {
                let actor = names.actors[*name];
                cluster.ok(Command::StopActor {
                    job: None,
                    actor,
                    grace_ms: 0,
                });
                if cluster.actor(actor).node.is_some() {
                    cluster.exit(actor, ExitReason::Stopped);
                }
            }
            ["expect", name, node] => {
                let expected = (*node != "-").then(|| names.nodes[*node]);
                assert_eq!(
                    cluster.actor(names.actors[*name]).node,
                    expected,
                    "{at}: {line}"
                );
            }
            ["explain", name, ..] => {
                let text = line.splitn(3, ' ').nth(2).unwrap();
                let explained =
                    explain_actor(&cluster.tables, names.actors[*name], cluster.now_ms).unwrap();
                let printed = format!("{explained:?}");
                assert!(printed.contains(text), "{at}: `{text}` is not in {printed}");
            }
            _ => panic!("{at}: cannot read `{line}`"),
        }
    }
}
