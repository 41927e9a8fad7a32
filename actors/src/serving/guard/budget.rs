//! Second tries are a fifth of the requests, and a reserve: where most requests fail, trying all of them
//! again would double the load on what is left.
//!
//! The reserve is what one replica holds when it dies, so that its death alone costs no answer.

/// Second tries that each request allows, in thousandths.
const SHARE_MILLI: u64 = 200;

/// Second tries that are allowed without any request before: a full queue of a replica and a full batch.
pub const RESERVE: u64 = 384;

/// How long the reserve takes to come back, in milliseconds.
const RESERVE_MS: u64 = 10_000;

/// What may be saved up: several replicas that die together while there is much to do.
const SAVED_MAX: u64 = 4 * RESERVE;

/// What is left for second tries.
#[derive(Debug)]
pub struct RetryBudget {
    left_milli: u64,
    at_ms: u64,
}

impl RetryBudget {
    /// The reserve.
    #[must_use]
    pub fn new(now_ms: u64) -> Self {
        RetryBudget {
            left_milli: RESERVE * 1_000,
            at_ms: now_ms,
        }
    }

    /// A request has come.
    pub fn earn(&mut self) {
        self.left_milli = (self.left_milli + SHARE_MILLI).min(SAVED_MAX * 1_000);
    }

    /// Whether a request may be tried once more, which it then is.
    pub fn spend(&mut self, now_ms: u64) -> bool {
        let elapsed_ms = now_ms.saturating_sub(self.at_ms).min(RESERVE_MS);
        self.at_ms = now_ms;
        if self.left_milli < RESERVE * 1_000 {
            let grown = self.left_milli + RESERVE * 1_000 * elapsed_ms / RESERVE_MS;
            self.left_milli = grown.min(RESERVE * 1_000);
        }
        let may = self.left_milli >= 1_000;
        if may {
            self.left_milli -= 1_000;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_there_at_once_and_comes_back_in_ten_seconds() {
        let mut budget = RetryBudget::new(0);
        assert!((0..RESERVE).all(|_| budget.spend(0)));
        assert!(!budget.spend(0));
        assert!((0..RESERVE / 2).all(|_| budget.spend(5_000)));
        assert!(!budget.spend(5_000));
        assert!((0..RESERVE).all(|_| budget.spend(60_000)));
        assert!(!budget.spend(60_000));
    }

    #[test]
    fn where_everything_fails_a_fifth_is_tried_again() {
        let mut budget = RetryBudget::new(0);
        let mut second_tries = 0;
        // Ten thousand a second for a minute.
        for request in 0..600_000_u64 {
            budget.earn();
            second_tries += u64::from(budget.spend(request / 10));
        }
        let reserve = RESERVE * 7;
        assert!(second_tries <= 120_000 + reserve, "{second_tries}");
        assert!(second_tries >= 120_000, "{second_tries}");
    }
}
