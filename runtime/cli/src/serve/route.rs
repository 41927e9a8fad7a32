//! `mobula serve route`.

use std::borrow::Cow;

use anyhow::Context;
use mobula::Cluster;
use mobula_actors::serving::access::rules::{Matcher, Rule};
use mobula_actors::serving::access::state::Command;
use mobula_actors::serving::client;
use serde::Serialize;

use crate::args::{Format, ServeRouteCommand};
use crate::output::{print_json, print_table};

/// A rule as `--json` prints it.
#[derive(Serialize)]
pub(crate) struct RuleJson<'a> {
    /// Without its share.
    matcher: Cow<'a, Matcher>,
    percent: u32,
    version: u64,
    answered: bool,
}

/// The rules of an endpoint that answers with these versions, as `--json` prints them.
pub(crate) fn json_of<'a>(rules: &'a [Rule], versions: &[u64]) -> Vec<RuleJson<'a>> {
    let json = |rule: &'a Rule| RuleJson {
        matcher: match rule.matcher.percent() {
            100 => Cow::Borrowed(&rule.matcher),
            _ => Cow::Owned(rule.matcher.clone().of_percent(100)),
        },
        percent: rule.matcher.percent(),
        version: rule.version,
        answered: versions.contains(&rule.version),
    };
    rules.iter().map(json).collect()
}

/// The versions that an endpoint answers with: the active one, and one that is tried.
pub(crate) async fn versions(cluster: &Cluster, endpoint: &str) -> anyhow::Result<Vec<u64>> {
    let routing = client::routing(cluster, endpoint).await?;
    let rollout = routing.rollout.filter(|rollout| rollout.phase.is_open());
    let tried = rollout.map(|rollout| rollout.candidate.version);
    Ok([routing.endpoint.version]
        .into_iter()
        .chain(tried)
        .collect())
}

pub(super) async fn run(cluster: &Cluster, command: ServeRouteCommand) -> anyhow::Result<()> {
    let none = "name a header or a parameter";
    let (endpoint, rules, format) = match command {
        ServeRouteCommand::Set {
            endpoint,
            matcher,
            version,
            percent,
            first,
            format,
        } => {
            let rule = Rule {
                matcher: matcher.matcher().context(none)?.of_percent(percent),
                version,
            };
            let command = Command::SetRule {
                endpoint: endpoint.clone(),
                rule,
                is_first: first,
            };
            let access = client::change_access(cluster, command).await?;
            (endpoint, access.rules, format)
        }
        ServeRouteCommand::List { endpoint, format } => {
            let rules = client::access(cluster, &endpoint).await?.rules;
            (endpoint, rules, format)
        }
        ServeRouteCommand::Remove {
            endpoint,
            matcher,
            format,
        } => {
            let command = Command::RemoveRule {
                endpoint: endpoint.clone(),
                matcher: matcher.matcher().context(none)?,
            };
            let access = client::change_access(cluster, command).await?;
            (endpoint, access.rules, format)
        }
    };
    let versions = versions(cluster, &endpoint).await?;
    print(&rules, &versions, format)
}

fn print(rules: &[Rule], versions: &[u64], format: Format) -> anyhow::Result<()> {
    if format.json {
        return print_json(&json_of(rules, versions));
    }
    let rows: Vec<Vec<String>> = rules
        .iter()
        .enumerate()
        .map(|(index, rule)| {
            let state = match versions.contains(&rule.version) {
                true => "holds",
                false => "passed over: the version is not in service",
            };
            vec![
                (index + 1).to_string(),
                rule.matcher.to_string(),
                rule.version.to_string(),
                state.to_owned(),
            ]
        })
        .collect();
    print_table(&["ORDER", "REQUESTS WITH", "VERSION", "STATE"], &rows);
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_share_stands_beside_what_the_rule_looks_at() {
        let beta = Matcher::header("x-tier", "beta");
        let rule = |percent, version| Rule {
            matcher: beta.clone().of_percent(percent),
            version,
        };
        let rules = [rule(20, 3), rule(100, 2)];
        let matcher = json!({"header": {"name": "x-tier", "value": "beta"}});
        assert_eq!(
            serde_json::to_value(json_of(&rules, &[2])).unwrap(),
            json!([
                {"matcher": matcher, "percent": 20, "version": 3, "answered": false},
                {"matcher": matcher, "percent": 100, "version": 2, "answered": true},
            ])
        );
    }
}
