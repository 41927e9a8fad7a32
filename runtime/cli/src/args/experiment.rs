//! Experiments: which of two versions is better.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand};
use mobula_actors::serving::experiment::{Direction, Guardrail, Measure, Metric};

use super::Format;

#[derive(Subcommand)]
pub(crate) enum ExperimentCommand {
    /// Compare another version of an endpoint's model with the one that it serves, by a plan that is fixed now.
    Start(ExperimentStartArguments),
    /// What the numbers of an experiment say.
    Status {
        /// The endpoint's name.
        endpoint: String,
        /// Which experiment of the endpoint [default: the newest].
        #[arg(long)]
        number: Option<u64>,
        /// Also write the same as JSON into this file, as in `--out ab_summary.json`.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        #[command(flatten)]
        format: Format,
    },
    /// End an experiment that is under way; the endpoint's version answers everything.
    Stop {
        /// The endpoint's name.
        endpoint: String,
        #[command(flatten)]
        format: Format,
    },
    /// The experiments that are kept, oldest first.
    List {
        /// The endpoint's name [default: all endpoints].
        endpoint: Option<String>,
        #[command(flatten)]
        format: Format,
    },
    /// Report what came of a key that was answered: it counts once, for the version that the key met.
    Record(ExperimentRecordArguments),
}

#[derive(Args)]
pub(crate) struct ExperimentStartArguments {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    /// The version to compare with, as `name` (newest version), `name:version` or `name@version`.
    pub(crate) model: String,
    /// What decides: `error-rate`, `latency` or `outcome:NAME`, and which way is better, `:up` or `:down`
    /// [default: down for error-rate and latency, up for outcomes].
    #[arg(long, value_name = "METRIC")]
    pub(crate) primary: MetricArgument,
    /// The smallest difference that is worth a change: a share of the requests for error-rate, a part of it for
    /// latency, in its own unit for an outcome.
    #[arg(long, value_name = "CHANGE")]
    pub(crate) min_effect: f64,
    /// What ends the experiment at once: a metric and how much worse it may be [default: error-rate=0.005 and
    /// latency=0.1].
    #[arg(long = "guardrail", value_name = "METRIC=CHANGE")]
    pub(crate) guardrails: Vec<GuardrailArgument>,
    /// No guardrails at all.
    #[arg(long, conflicts_with = "guardrails")]
    pub(crate) no_guardrails: bool,
    /// The shares of control and treatment, in basis points. Who is in neither is answered by the control and
    /// not counted.
    #[arg(
        long,
        value_name = "CONTROL,TREATMENT",
        value_delimiter = ',',
        default_value = "5000,5000"
    )]
    pub(crate) split: Vec<u32>,
    /// What keys are hashed with [default: another text for each experiment].
    #[arg(long, value_name = "TEXT")]
    pub(crate) seed: Option<String>,
    /// The chance of a false conclusion.
    #[arg(long, default_value = "0.05", value_parser = basis_points)]
    pub(crate) alpha: u32,
    /// After so many samples of the primary metric, of both versions together, it ends undecided.
    #[arg(long, default_value_t = 100_000)]
    pub(crate) max_samples: u64,
    #[command(flatten)]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct ExperimentRecordArguments {
    /// The endpoint's name.
    pub(crate) endpoint: String,
    /// The key that a request was sent with.
    #[arg(long)]
    pub(crate) key: String,
    /// What came of it.
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) value: f64,
    /// The outcome's name, if the experiment has several.
    #[arg(long, value_name = "NAME")]
    pub(crate) metric: Option<String>,
    /// File with the endpoint's token [default: what MOBULA_ENDPOINT_TOKEN holds].
    #[arg(long, value_name = "FILE")]
    pub(crate) endpoint_token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) format: Format,
}

/// A probability in basis points.
fn basis_points(text: &str) -> Result<u32, String> {
    let share: f64 = text
        .parse()
        .map_err(|_| format!("`{text}` is no number: write 0.05 for five percent"))?;
    let points = share * 10_000.0;
    if !(0.0..=10_000.0).contains(&points) {
        return Err(format!(
            "`{text}` is no probability: write 0.05 for five percent"
        ));
    }
    Ok(points.round() as u32)
}

/// A metric as it is written.
#[derive(Clone)]
pub(crate) struct MetricArgument(pub(crate) Metric);

impl FromStr for MetricArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (measure, direction) = match text.rsplit_once(':') {
            Some((measure, "up")) => (measure, Some(Direction::Up)),
            Some((measure, "down")) => (measure, Some(Direction::Down)),
            _ => (text, None),
        };
        let (measure, usual) = match measure.split_once(':') {
            None if measure == "error-rate" => (Measure::ErrorRate, Direction::Down),
            None if measure == "latency" => (Measure::Latency, Direction::Down),
            Some(("outcome", name)) if !name.is_empty() => {
                (Measure::Outcome(name.to_owned()), Direction::Up)
            }
            _ => {
                return Err(format!(
                    "`{text}` is no metric: write error-rate, latency or outcome:NAME, and :up or :down behind \
                     it if that is not the usual way"
                ));
            }
        };
        Ok(MetricArgument(Metric {
            measure,
            direction: direction.unwrap_or(usual),
        }))
    }
}

/// A guardrail as it is written.
#[derive(Clone)]
pub(crate) struct GuardrailArgument(pub(crate) Guardrail);

impl FromStr for GuardrailArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text
            .split_once('=')
            .and_then(|(metric, most)| Some((metric, most.parse().ok()?)));
        let Some((metric, worsening_max)) = parts else {
            return Err(format!(
                "`{text}` is no guardrail: write a metric and how much worse it may be, as in latency=0.1"
            ));
        };
        let MetricArgument(metric) = metric.parse()?;
        Ok(GuardrailArgument(Guardrail {
            metric,
            worsening_max,
        }))
    }
}

impl ExperimentStartArguments {
    /// What ends the experiment early.
    pub(crate) fn guardrails(&self) -> Vec<Guardrail> {
        if self.no_guardrails {
            return Vec::new();
        }
        if !self.guardrails.is_empty() {
            let given = self.guardrails.iter();
            return given
                .map(|GuardrailArgument(given)| given.clone())
                .collect();
        }
        // Those of rollouts.
        let usual = [(Measure::ErrorRate, 0.005), (Measure::Latency, 0.1)];
        let usual = usual.map(|(measure, worsening_max)| Guardrail {
            metric: Metric {
                measure,
                direction: Direction::Down,
            },
            worsening_max,
        });
        usual.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_written_with_their_direction_or_without() {
        for (text, shown) in [
            ("error-rate", "error-rate:down"),
            ("latency:up", "latency:up"),
            ("outcome:clicks", "outcome:clicks:up"),
            ("outcome:refunds:down", "outcome:refunds:down"),
        ] {
            let MetricArgument(metric) = text.parse().unwrap();
            assert_eq!(metric.to_string(), shown, "{text}");
        }
        for text in ["", "errors", "outcome", "outcome:", "latency:sideways"] {
            let error = text.parse::<MetricArgument>().err().unwrap();
            assert!(error.contains("is no metric"), "{text}: {error}");
        }
        let GuardrailArgument(guardrail) = "outcome:refunds:down=0.01".parse().unwrap();
        assert_eq!(guardrail.worsening_max, 0.01);
        for text in ["latency", "latency=", "latency=ten"] {
            assert!(text.parse::<GuardrailArgument>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_chance_is_written_as_a_number() {
        assert_eq!(basis_points("0.05"), Ok(500));
        assert_eq!(basis_points("0.0001"), Ok(1));
        for text in ["5", "-1", "x", "NaN"] {
            assert!(basis_points(text).is_err(), "{text}");
        }
    }
}
