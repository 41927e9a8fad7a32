//! What `mobula rollout status` and `mobula experiment status` say of the sentinels of the version beside the active one.

use mobula_actors::serving::sentinels::state::Asked;
use serde::Serialize;

use crate::output::age;

/// How far they are answered, as `--json` prints it.
#[derive(Debug, Serialize)]
pub(crate) struct SentinelsJson {
    at_ms: u64,
    router: u64,
    sentinels: u32,
    replicas: u32,
    right: u32,
}

impl SentinelsJson {
    pub(crate) fn of(asked: &Asked) -> Self {
        let standing = asked.standing;
        SentinelsJson {
            at_ms: asked.at_ms,
            router: asked.router.0,
            sentinels: standing.sentinels,
            replicas: standing.replicas,
            right: standing.right,
        }
    }
}

/// How far those of a rollout's candidate or an experiment's treatment are answered, in a line.
pub(crate) fn said(whose: &str, asked: Option<&Asked>, now_ms: u64) -> String {
    let Some(asked) = asked else {
        return format!("sentinels: the router has not said yet what the {whose} answers to them");
    };
    let standing = asked.standing;
    let (right, replicas) = (standing.right, standing.replicas);
    if standing.sentinels == 0 {
        return format!(
            "sentinels: the {whose}'s version has none to be asked, of {replicas} replicas that take requests"
        );
    }
    format!(
        "sentinels: {right} of the {replicas} replicas of the {whose} that take requests have answered all {} rightly (said {} ago)",
        standing.sentinels,
        age(asked.at_ms, now_ms)
    )
}

#[cfg(test)]
mod tests {
    use mobula_actors::serving::sentinels::state::{Of, Standing};
    use mobula_core::id::Incarnation;
    use serde_json::json;

    use super::*;

    fn asked(standing: Standing) -> Asked {
        Asked {
            of: Of::Experiment { experiment: 1 },
            standing,
            router: Incarnation(900),
            at_ms: 1_000,
        }
    }

    #[test]
    fn how_far_sentinels_are_answered_is_said_in_words_and_numbers() {
        let known = asked(Standing {
            sentinels: 8,
            replicas: 2,
            right: 1,
        });
        assert_eq!(
            said("treatment", Some(&known), 4_000),
            "sentinels: 1 of the 2 replicas of the treatment that take requests have answered all 8 rightly (said 3s ago)"
        );
        assert_eq!(
            serde_json::to_value(SentinelsJson::of(&known)).unwrap(),
            json!({"at_ms": 1_000, "router": 900, "sentinels": 8, "replicas": 2, "right": 1})
        );
        let none = asked(Standing {
            sentinels: 0,
            replicas: 2,
            right: 0,
        });
        assert_eq!(
            said("candidate", Some(&none), 4_000),
            "sentinels: the candidate's version has none to be asked, of 2 replicas that take requests"
        );
        assert_eq!(
            said("candidate", None, 0),
            "sentinels: the router has not said yet what the candidate answers to them"
        );
    }
}
