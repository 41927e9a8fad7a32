//! When the head hears how far the sentinels of a version are answered: people look at it, and each time is an entry of the log.

use tokio::time::Instant;

use super::state::{Of, Standing};
use crate::serving::rollout::reporting::REPORT_INTERVAL;

/// What the head was told.
#[derive(Debug, Default)]
pub(in crate::serving) struct Noting {
    last: Option<Noted>,
}

#[derive(Debug)]
struct Noted {
    /// When it was told last, or what this is about began.
    at: Instant,
    of: Of,
    /// What it knows; absent before it knows anything of this.
    known: Option<Standing>,
}

impl Noting {
    /// Whether the head is to hear this now: it knows something else, and was told some time ago. What it hears first
    /// is what all replicas have answered, if they do within that time.
    pub(in crate::serving) fn is_due(&mut self, of: Of, standing: Standing) -> bool {
        let now = Instant::now();
        if self.last.as_ref().is_none_or(|last| last.of != of) {
            self.last = Some(Noted {
                at: now,
                of,
                known: None,
            });
        }
        let Some(last) = &mut self.last else {
            return false;
        };
        let has_time = now.duration_since(last.at) < REPORT_INTERVAL;
        if last.known == Some(standing) || has_time && (last.known.is_some() || !standing.is_all())
        {
            return false;
        }
        last.at = now;
        true
    }

    /// The head knows this now.
    pub(in crate::serving) fn taken(&mut self, of: Of, standing: Standing) {
        if let Some(last) = self.last.as_mut().filter(|last| last.of == of) {
            last.known = Some(standing);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const STEP: Of = Of::Step {
        rollout: 1,
        step: 0,
    };

    fn standing(replicas: u32, right: u32) -> Standing {
        Standing {
            sentinels: 8,
            replicas,
            right,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_all_have_answered_is_told_at_once_and_the_rest_after_some_time() {
        let mut noting = Noting::default();
        assert!(!noting.is_due(STEP, standing(2, 0)));
        assert!(!noting.is_due(STEP, standing(2, 1)));
        assert!(noting.is_due(STEP, standing(2, 2)));
        // The head has not taken it, so it is told again.
        assert!(noting.is_due(STEP, standing(2, 2)));
        noting.taken(STEP, standing(2, 2));
        assert!(!noting.is_due(STEP, standing(2, 2)));
        // Another replica comes.
        assert!(!noting.is_due(STEP, standing(3, 2)));
        assert!(!noting.is_due(STEP, standing(3, 3)));
        tokio::time::advance(REPORT_INTERVAL).await;
        assert!(noting.is_due(STEP, standing(3, 3)));
        noting.taken(STEP, standing(3, 3));
        tokio::time::advance(10 * REPORT_INTERVAL).await;
        assert!(!noting.is_due(STEP, standing(3, 3)), "nothing is new");

        // Of another step it knows nothing.
        let next = Of::Step {
            rollout: 1,
            step: 1,
        };
        noting.taken(next, standing(3, 3));
        assert!(noting.is_due(next, standing(3, 3)));
        noting.taken(STEP, standing(3, 3));
        assert!(
            noting.is_due(next, standing(3, 3)),
            "that was about another"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn replicas_that_do_not_answer_are_told_of_as_well_and_so_is_a_version_without_sentinels()
    {
        let mut noting = Noting::default();
        let of = Of::Experiment { experiment: 1 };
        assert!(!noting.is_due(of, standing(2, 1)));
        tokio::time::advance(REPORT_INTERVAL - Duration::from_millis(1)).await;
        assert!(!noting.is_due(of, standing(2, 1)));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(noting.is_due(of, standing(2, 1)));
        assert!(!noting.is_due(of, standing(2, 1)), "it has time");

        let none = Standing::default();
        let of = Of::Experiment { experiment: 2 };
        assert!(noting.is_due(of, none));
    }
}
