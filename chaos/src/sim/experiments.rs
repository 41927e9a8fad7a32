//! Experiments in a simulated cluster: what people and routers say of them, and the leader that ends as they begin or end.
//!
//! What a router counts is played: keys come one after the other, and what follows from them is chance. How often the
//! numbers of a real one err, the tests of `actors/src/serving/experiment/tally.rs` say.

use mobula_actors::serving::experiment::command::{Command, Proposed};
use mobula_actors::serving::experiment::findings::{Decision, Findings, GuardrailFinding, Ratio};
use mobula_actors::serving::experiment::plan::Ending;
use mobula_actors::serving::experiment::{Direction, Experiment, Guardrail, Measure, Metric};
use mobula_actors::serving::rollout::plan::Cleanup;
use mobula_core::id::Incarnation;
use rand::Rng;

use super::coverage::Counts;
use super::experiment_model::{ExperimentModel, Turn};
use super::options::{MILLISECOND, Micros};
use super::world::World;

/// How long it takes until another key comes.
const KEY_EVERY: Micros = 10 * MILLISECOND;

/// How often a router speaks that has not said that it counts, as one would that went on with the counts of another.
const COUNTS_UNASKED: f64 = 0.1;

/// The hash of what routers store: no store is played, and every count that is not lost is found.
const STORED: [u8; 32] = [1; 32];

impl World {
    /// Something that a client may want of the experiments of an endpoint; nothing where there is none.
    pub(crate) fn experiment_change(&mut self) -> Option<Command> {
        let domain = &self.checker.model.domain;
        let pick = self.rng.random_range(0..domain.endpoints().count().max(1));
        let endpoint = domain.endpoints().nth(pick)?.clone();
        let (model, _) = domain.rollouts.serves(&endpoint)?;
        let model = model.to_owned();
        let versions = domain.versions(&model);
        let last = domain.experiments.of(&endpoint).last();
        let is_open = last.is_some_and(Experiment::is_open);
        let what = self.rng.random_range(0..10);
        if what == 0 || (is_open && what < 2) {
            return Some(Command::Stop { endpoint });
        }
        // Now and then of a version that does not exist. While an experiment is under way this is a plan for it that
        // somebody would rather have.
        let version = self.rng.random_range(1..=versions + 1);
        let error_rate = Metric {
            measure: Measure::ErrorRate,
            direction: Direction::Down,
        };
        Some(Command::Start(Proposed {
            endpoint,
            model,
            version: self.rng.random_bool(0.8).then_some(version),
            control_share_bp: 5_000,
            treatment_share_bp: [1_000, 5_000][self.rng.random_range(0..2)],
            seed: None,
            primary: Metric {
                measure: Measure::Outcome("clicks".to_owned()),
                direction: Direction::Up,
            },
            effect_min: 0.01,
            guardrails: vec![Guardrail {
                metric: error_rate,
                worsening_max: 0.005,
            }],
            alpha_bp: [100, 500][self.rng.random_range(0..2)],
            samples_max: 10_000,
        }))
    }

    /// What a router says of its endpoint's experiment, if there is one to speak of.
    pub(crate) fn router_counts(&mut self, endpoint: &str, router: Incarnation) -> Option<Command> {
        let last = self.checker.model.domain.experiments.of(endpoint).last()?;
        let (experiment, revision) = (last.number, last.revision);
        let (cleanup, counting, count) = (last.cleanup, last.counting, last.counts);
        match cleanup {
            Cleanup::Waiting
                if counting == Some(router) || self.rng.random_bool(COUNTS_UNASKED) =>
            {
                Some(self.router_looks(endpoint.to_owned(), (experiment, count), router))
            }
            Cleanup::Waiting => Some(Command::Count {
                endpoint: endpoint.to_owned(),
                experiment,
                router,
            }),
            Cleanup::Draining => Some(Command::Drained {
                endpoint: endpoint.to_owned(),
                experiment,
                revision,
                router,
            }),
            Cleanup::Ending | Cleanup::Done => None,
        }
    }

    /// A look at what was counted so far, or word that it is lost. A run is short, so something follows in every second
    /// look.
    fn router_looks(
        &mut self,
        endpoint: String,
        (experiment, count): (u64, u32),
        router: Incarnation,
    ) -> Command {
        let (ending, decision) = match self.rng.random_range(0..18) {
            0 | 1 => (Some(Ending::Decided), Decision::Treatment),
            2 => (Some(Ending::Decided), Decision::Control),
            3 => (Some(Ending::Exhausted), Decision::Undecided),
            4 | 5 => (Some(Ending::Guardrail), Decision::Control),
            6 => (Some(Ending::Unfit), Decision::Control),
            // No router finds these, and they must be refused.
            7 => (Some(Ending::Decided), Decision::Undecided),
            8 => (Some(Ending::Stopped), Decision::Control),
            9 => {
                return Command::CountAnew {
                    endpoint,
                    experiment,
                    count,
                    router,
                };
            }
            _ => (None, Decision::Undecided),
        };
        let findings = self.findings(decision, ending == Some(Ending::Guardrail));
        match ending {
            Some(ending) => Command::Conclude {
                endpoint,
                experiment,
                router,
                ending,
                findings,
            },
            None => Command::Report {
                endpoint,
                experiment,
                router,
                findings,
                stored: STORED,
            },
        }
    }

    /// The numbers of a router at this moment.
    fn findings(&self, decision: Decision, is_violated: bool) -> Findings {
        let keys = self.now / KEY_EVERY;
        let treatment = keys / 2;
        Findings {
            decision,
            reason: "simulated".to_owned(),
            ratios: vec![Ratio {
                of: "keys".to_owned(),
                control: keys - treatment,
                treatment,
                p_value: 1.0,
                is_mismatch: false,
            }],
            guardrails: vec![GuardrailFinding {
                measure: Measure::ErrorRate,
                statistic: "log_e_value".to_owned(),
                value: if is_violated { 6.0 } else { 0.0 },
                limit: 5.0,
                is_violated,
            }],
            ..Findings::default()
        }
    }

    /// Ends the leader now and then when an experiment began or ended by what just happened; `known` had done so before.
    pub(crate) fn endanger_experiments(&mut self, known: usize) {
        let turns = self.checker.model.domain.experiments.turns();
        let Some(turn) = turns.get(known..).and_then(|new| new.last().copied()) else {
            return;
        };
        match turn {
            Turn::Begun if self.endanger_leader("it is killed as an experiment begins") => {
                self.counts.killed_at_experiment_start += 1;
            }
            Turn::Ended(_) if self.endanger_leader("it is killed as an experiment ends") => {
                self.counts.killed_at_experiment_end += 1;
            }
            Turn::Begun | Turn::Ended(_) => {}
        }
    }
}

impl Counts {
    /// Takes over what became of experiments.
    pub(crate) fn take_experiments(&mut self, model: &ExperimentModel) {
        let count = |is_it: fn(Turn) -> bool| {
            let turns = model.turns().iter();
            turns.filter(|turn| is_it(**turn)).count() as u64
        };
        self.experiments = count(|turn| turn == Turn::Begun);
        self.experiments_stopped = count(|turn| turn == Turn::Ended(Ending::Stopped));
        self.experiments_guarded = count(|turn| turn == Turn::Ended(Ending::Guardrail));
        self.experiments_decided = count(|turn| turn == Turn::Ended(Ending::Decided));
        self.plans_refused = model.plans_refused;
    }
}
