//! `mobula models card`: a version as a page for people who decide about it.
//!
//! The sections are those of model cards (Mitchell et al., *Model Cards for Model Reporting*, 2019), as far as the
//! registry knows them; what only people know, they say in tags.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::Context;
use mobula::Cluster;
use mobula_actors::registry::client;
use mobula_actors::registry::decide::{Finding, verify as verify_signed};
use mobula_actors::registry::keys::KeyRecord;
use mobula_actors::registry::provenance::{CheckpointOrigin, Parent, missing};
use mobula_actors::registry::search::VersionView;
use mobula_actors::serving::client as serving;
use mobula_actors::serving::experiment::Experiment;
use mobula_actors::serving::rollout::Rollout;
use mobula_actors::serving::rollout::plan::Action;
use mobula_actors::serving::rollout::trial::SideEvidence;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::list::made_by;
use super::name::VersionName;
use super::{name_of, one_version};
use crate::experiment::{decision, measured_in_words, said, state};

/// Tags that have a place of their own in a card, and the heading that they come under.
const SAID: [(&str, &str); 5] = [
    ("description", "Description"),
    ("owner", "Owner"),
    ("license", "License"),
    ("intended-use", "Intended use"),
    ("limitations", "Limitations"),
];

/// Everything that a card says.
struct Card<'a> {
    version: &'a VersionView,
    /// What was found about the signatures.
    findings: &'a [Finding],
    /// Rollouts in which the version was the candidate.
    rollouts: &'a [Rollout],
    /// Experiments in which it was one of the two that were compared.
    experiments: &'a [Experiment],
}

/// Prints a version's card, or writes it to `out`.
pub(super) async fn card(
    cluster: &Cluster,
    name: &VersionName,
    out: Option<&Path>,
) -> anyhow::Result<()> {
    let version = one_version(cluster, name).await?;
    let number = version.version.version;
    let signed = client::signed(cluster, &name.model, number).await?;
    let keys = client::keys(cluster).await?.into_iter();
    let keys: BTreeMap<String, KeyRecord> = keys.map(|key| (key.id.clone(), key)).collect();
    let findings = verify_signed(&version, signed.as_ref(), |id| keys.get(id).cloned());
    let (mut rollouts, mut experiments) = (Vec::new(), Vec::new());
    for endpoint in serving::list(cluster).await? {
        if endpoint.model == name.model {
            let known = serving::rollouts(cluster, &endpoint.name)
                .await?
                .into_iter();
            rollouts.extend(known.filter(|rollout| rollout.candidate.version == number));
            let known = serving::experiments(cluster, &endpoint.name)
                .await?
                .into_iter();
            experiments.extend(known.filter(|experiment| {
                let plan = &experiment.plan;
                [plan.control.version, plan.treatment.version].contains(&number)
            }));
        }
    }
    let text = Card {
        version: &version,
        findings: &findings,
        rollouts: &rollouts,
        experiments: &experiments,
    }
    .render();
    let Some(path) = out else {
        print!("{text}");
        return Ok(());
    };
    std::fs::write(path, text).with_context(|| format!("{} cannot be written", path.display()))?;
    println!("the card of {} is in {}", name_of(&version), path.display());
    Ok(())
}

impl Card<'_> {
    fn render(&self) -> String {
        let mut text = format!("# {}\n", name_of(self.version));
        self.said(&mut text);
        self.details(&mut text);
        self.metrics(&mut text);
        self.origin(&mut text);
        self.signatures(&mut text);
        self.rollouts(&mut text);
        self.experiments(&mut text);
        text
    }

    fn said(&self, text: &mut String) {
        let tags = &self.version.standing.tags;
        for (tag, heading) in SAID {
            if let Some(value) = tags.get(tag) {
                section(text, heading);
                line(text, &one_line(value));
            }
        }
        let lacking: Vec<&str> = SAID
            .iter()
            .map(|(tag, _)| *tag)
            .filter(|tag| !tags.contains_key(*tag))
            .collect();
        if !lacking.is_empty() {
            section(text, "Not said");
            let name = name_of(self.version);
            line(
                text,
                &format!(
                    "{}. Say it with `mobula models tag {name} {}=…`.",
                    lacking.join(", "),
                    lacking[0]
                ),
            );
        }
    }

    fn details(&self, text: &mut String) {
        let version = &self.version.version;
        let description = &version.description;
        let standing = &self.version.standing;
        section(text, "Model");
        let mut rows = vec![
            ("registered", day(version.registered_ms)),
            (
                "stage",
                format!(
                    "{} since {}",
                    standing.stage.as_str(),
                    day(standing.since_ms)
                ),
            ),
            (
                "file",
                format!(
                    "{} bytes, BLAKE3 `{}`",
                    description.size_bytes, description.digest
                ),
            ),
            (
                "weights and optimizer",
                format!("BLAKE3 `{}`", description.weights_blake3),
            ),
        ];
        let of_list = |name, list: &[String]| (!list.is_empty()).then(|| (name, list.join(", ")));
        rows.extend(of_list("aliases", &self.version.aliases));
        rows.extend(of_list("serves at", &self.version.endpoints));
        let other = standing.tags.iter();
        let other = other.filter(|(tag, _)| SAID.iter().all(|(known, _)| known != tag));
        let other: Vec<String> = other.map(|(tag, value)| format!("{tag}={value}")).collect();
        rows.extend(of_list("tags", &other));
        table(
            text,
            ["", ""],
            rows.into_iter()
                .map(|(name, value)| [name.to_owned(), value]),
        );
    }

    fn metrics(&self, text: &mut String) {
        section(text, "Metrics on held-out data");
        let metrics = &self.version.version.description.metrics;
        if metrics.is_empty() {
            return line(text, "None were measured.");
        }
        let rows = metrics.iter();
        let rows = rows.map(|(name, value)| [name.clone(), format!("{value:.4}")]);
        table(text, ["metric", "value"], rows);
    }

    fn origin(&self, text: &mut String) {
        let description = &self.version.version.description;
        section(text, "Training");
        let job = made_by(&self.version.version);
        let data = match description.dataset_blake3.as_str() {
            "" => "not known".to_owned(),
            digest => format!("BLAKE3 `{digest}`"),
        };
        let mut rows = vec![["job".to_owned(), job.clone()], ["data".to_owned(), data]];
        let mut row = |name: &str, value: Option<String>| {
            rows.extend(value.map(|value| [name.to_owned(), value]));
        };
        let checkpoint =
            |of: &CheckpointOrigin| format!("`{}`, BLAKE3 `{}`", of.manifest, of.digest);
        if let Some(provenance) = &self.version.provenance {
            let code = provenance.code.as_ref();
            row(
                "program",
                code.map(|code| format!("{}, BLAKE3 `{}`", code.reference, code.blake3)),
            );
            row("seed", provenance.seed.map(|seed| seed.to_string()));
            row(
                "weights at first",
                provenance.parent.as_ref().map(|parent| match parent {
                    Parent::Seed => "drawn from the seed".to_owned(),
                    Parent::Checkpoint(of) => checkpoint(of),
                }),
            );
            row("checkpoint", provenance.checkpoint.as_ref().map(checkpoint));
            row(
                "run record",
                provenance
                    .run_record
                    .as_ref()
                    .map(|record| format!("BLAKE3 `{record}`")),
            );
            for (fact, value) in &provenance.environment {
                row(fact, Some(value.clone()));
            }
        }
        table(text, ["", ""], rows.into_iter());
        let missing = missing(&self.version.version, self.version.provenance.as_ref());
        if missing.is_empty() && !self.version.version.is_imported() {
            line(
                text,
                &format!("`mobula train replay {job}` trains it again and compares the bits."),
            );
        } else if !missing.is_empty() {
            line(
                text,
                &format!(
                    "Not known, and needed for production: {}.",
                    missing.join(", ")
                ),
            );
        }
        line(text, "```json");
        line(text, &description.training_json);
        line(text, "```");
    }

    fn signatures(&self, text: &mut String) {
        section(text, "Signatures");
        let rows = self.findings.iter().map(|finding| {
            let verdict = if finding.ok { "in order" } else { "**wrong**" };
            [
                finding.check.to_owned(),
                verdict.to_owned(),
                one_line(&finding.detail),
            ]
        });
        table(text, ["of", "", "found"], rows);
    }

    fn rollouts(&self, text: &mut String) {
        section(text, "Rollouts");
        if self.rollouts.is_empty() {
            return line(text, "None that is kept.");
        }
        let rows = self.rollouts.iter().flat_map(|rollout| {
            let of = format!("{} {}", rollout.endpoint, rollout.number);
            let steps = &rollout.steps;
            rollout.decisions.iter().map(move |decision| {
                let weight = steps.get(decision.step as usize).copied().unwrap_or(0);
                let evidence = decision.evidence.as_ref();
                let numbers = evidence.map_or_else(
                    || "a person decided".to_owned(),
                    |evidence| {
                        let side = |side: &SideEvidence| {
                            format!(
                                "{} requests, {} errors, p95 {} µs",
                                side.requests, side.errors, side.latency_p95_us
                            )
                        };
                        format!(
                            "{}; candidate {}; baseline {}",
                            one_line(&evidence.reason),
                            side(&evidence.candidate),
                            side(&evidence.baseline)
                        )
                    },
                );
                [
                    of.clone(),
                    day(decision.at_ms),
                    format!("{weight} %"),
                    done(decision.action).to_owned(),
                    numbers,
                ]
            })
        });
        table(
            text,
            ["endpoint, rollout", "when", "weight", "what", "why"],
            rows,
        );
    }

    fn experiments(&self, text: &mut String) {
        section(text, "Experiments");
        if self.experiments.is_empty() {
            return line(text, "None that is kept.");
        }
        let rows = self.experiments.iter().map(|experiment| {
            let plan = &experiment.plan;
            let findings = experiment.findings.as_ref();
            let numbers = findings.map_or_else(
                || "nothing was counted".to_owned(),
                |findings| {
                    let measured = findings.measured.iter().map(measured_in_words);
                    let measured = measured.collect::<Vec<_>>().join("; ");
                    format!("{}; {measured}", one_line(&findings.reason))
                },
            );
            [
                format!("{} {}", plan.endpoint, experiment.number),
                day(experiment.ended_ms.unwrap_or(experiment.started_ms)),
                format!(
                    "{} against {} by {}",
                    plan.treatment.version, plan.control.version, plan.primary
                ),
                state(experiment).to_owned(),
                said(decision(experiment)).to_owned(),
                numbers,
            ]
        });
        table(
            text,
            [
                "endpoint, experiment",
                "when",
                "treatment against control",
                "state",
                "decision",
                "why",
            ],
            rows,
        );
    }
}

fn done(action: Action) -> &'static str {
    match action {
        Action::Start => "started",
        Action::Pass => "step passed",
        Action::Pause => "paused",
        Action::Resume => "resumed",
        Action::Promote => "promoted",
        Action::Abort => "aborted",
        Action::RollBack => "rolled back",
    }
}

fn section(text: &mut String, heading: &str) {
    let _ = write!(text, "\n## {heading}\n\n");
}

fn line(text: &mut String, said: &str) {
    text.push_str(said);
    text.push('\n');
}

/// Markdown's table; what stands in a cell cannot end it.
fn table<const N: usize>(
    text: &mut String,
    header: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) {
    let mut print = |cells: [String; N]| {
        let cells = cells.map(|cell| one_line(&cell).replace('|', "\\|"));
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    };
    print(header.map(str::to_owned));
    print([(); N].map(|()| "---".to_owned()));
    rows.for_each(print);
    text.push('\n');
}

/// The text without what would begin another line.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A moment, to the second, in UTC.
fn day(ms: u64) -> String {
    let moment = OffsetDateTime::from_unix_timestamp(ms.cast_signed() / 1000);
    let shown = moment.ok().and_then(|moment| moment.format(&Rfc3339).ok());
    shown.unwrap_or_else(|| format!("{ms} ms since the Unix epoch"))
}

#[cfg(test)]
#[path = "card_tests.rs"]
mod tests;
