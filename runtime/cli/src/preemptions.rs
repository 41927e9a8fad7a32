//! What a job's drivers did about notices, as `mobula train status` and `mobula jobs timeline` show it.

use mobula_actors::checkpoint::preemptions::{JobPreemptions, PreemptionStep};
use serde::Serialize;
use serde_json::{Value, json};

/// One step of a driver's way off its machine.
#[derive(Debug, Serialize)]
pub(crate) struct PreemptionJson {
    incarnation: u64,
    node: String,
    from: String,
    to: String,
    deadline_ms: Option<u64>,
    trained_steps: u64,
    needed_ms: Option<u64>,
    usable_ms: Option<u64>,
    why: String,
    said_ms: u64,
}

impl From<&PreemptionStep> for PreemptionJson {
    fn from(step: &PreemptionStep) -> Self {
        PreemptionJson {
            incarnation: step.incarnation.0,
            node: step.node.clone(),
            from: step.from.to_string(),
            to: step.to.to_string(),
            deadline_ms: step.deadline_ms,
            trained_steps: step.trained_steps,
            needed_ms: step.needed_ms,
            usable_ms: step.usable_ms,
            why: step.why.clone(),
            said_ms: step.said_ms,
        }
    }
}

/// All that is known, oldest first.
pub(crate) fn as_json(known: &JobPreemptions) -> Vec<PreemptionJson> {
    known.steps.iter().map(PreemptionJson::from).collect()
}

/// The lines about the newest notice: what its driver did, step by step.
pub(crate) fn newest_lines(steps: &[PreemptionJson]) -> Vec<String> {
    let Some(last) = steps.last() else {
        return Vec::new();
    };
    let of_last = steps
        .iter()
        .filter(|step| step.incarnation == last.incarnation);
    of_last
        .map(|step| {
            format!(
                "{} after step {}: {} -> {}: {}",
                step.node, step.trained_steps, step.from, step.to, step.why
            )
        })
        .collect()
}

/// Marks in a trace, in the Trace Event Format: instants that concern the whole job.
pub(crate) fn marks(known: &JobPreemptions) -> Vec<Value> {
    let mark = |step: &PreemptionStep| {
        json!({
            "name": step.to.to_string(),
            "cat": "preemption",
            "ph": "i",
            "s": "g",
            "ts": step.said_ms * 1000,
            "pid": 0,
            "tid": 0,
            "args": PreemptionJson::from(step),
        })
    };
    known.steps.iter().map(mark).collect()
}

#[cfg(test)]
mod tests {
    use mobula_actors::checkpoint::preemptions::PreemptionPhase;
    use mobula_core::Incarnation;

    use super::*;

    #[test]
    fn the_newest_notice_is_shown_and_every_step_is_a_mark() {
        let step = |incarnation, to| PreemptionStep {
            incarnation: Incarnation(incarnation),
            number: 1,
            node: "worker-2".to_owned(),
            from: PreemptionPhase::Noticed,
            to,
            deadline_ms: Some(9),
            trained_steps: 40,
            needed_ms: None,
            usable_ms: Some(7),
            why: "2 replicas hold these bits".to_owned(),
            said_ms: 3,
        };
        let known = JobPreemptions {
            steps: vec![
                step(3, PreemptionPhase::Abandon),
                step(5, PreemptionPhase::Handoff),
            ],
        };
        assert_eq!(
            newest_lines(&as_json(&known)),
            ["worker-2 after step 40: NOTICED -> HANDOFF: 2 replicas hold these bits"]
        );
        let marks = marks(&known);
        assert_eq!(marks.len(), 2);
        assert_eq!(
            (&marks[1]["name"], &marks[1]["ts"]),
            (&json!("HANDOFF"), &json!(3000))
        );
        assert_eq!(marks[1]["args"]["usable_ms"], 7);
    }
}
