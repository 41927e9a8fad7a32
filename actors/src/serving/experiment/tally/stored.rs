//! A tally as bytes, for the router that goes on with a count. It must know every key of it: a key that comes again is
//! no new evidence, so sums alone could not be added to.
//!
//! Invariants:
//! 1. What is read is the tally that was written, or an error: nothing is counted on top of something else.
//! 2. The bytes are bounded, as the keys are.

use mobula_core::codec::{self, DecodeError};
use serde::{Deserialize, Serialize};

use super::{Seen, Sums, Tally, Variant};
use crate::serving::experiment::plan::{GUARDRAILS_MAX, Plan, SAMPLES_MAX};

/// How long the head is, as a number in front of it.
const LENGTH_BYTES: usize = 8;

/// Of each key: its hash, and what is known of it.
const KEY_BYTES: usize = 8 + 1;

/// The largest head: the sums of all measures that a plan can have are some 400 bytes.
const HEAD_BYTES_MAX: usize = 4 * 1024;

/// The largest tally in bytes: that of as many keys as are counted.
pub(in crate::serving::experiment) const TALLY_BYTES_MAX: usize =
    LENGTH_BYTES + HEAD_BYTES_MAX + SAMPLES_MAX as usize * KEY_BYTES;

/// The bit of keys that met the treatment.
const TREATMENT: u8 = 1;

/// The bit of keys whose first request was executed.
const MEASURED: u8 = 1 << 1;

/// The first bit of the measures that a value was reported of.
const REPORTED_FROM: u32 = 2;

// The primary metric's measure and those of the guardrails have a bit each.
const _: () = assert!(REPORTED_FROM as usize + 1 + GUARDRAILS_MAX <= u8::BITS as usize);

/// What stands in front of the keys.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    plan_blake3: String,
    sums: Vec<Sums>,
    exposed: (u64, u64),
    failed: (u64, u64),
    uncounted: u64,
}

/// Why bytes are not a tally to go on with.
#[derive(Debug, thiserror::Error)]
pub(in crate::serving::experiment) enum NotATally {
    /// Something is missing, or there is more.
    #[error("the count's {size_bytes} bytes are cut off, or others follow them")]
    Cut {
        /// How many there are.
        size_bytes: usize,
    },
    /// The sums are none.
    #[error("the count's sums: {0}")]
    Sums(#[from] DecodeError),
    /// It was counted for something else.
    #[error("the count is that of the plan with the hash {found}, and the plan's is {wanted}")]
    AnotherPlan {
        /// The hash of its plan.
        found: String,
        /// That of the plan which is followed.
        wanted: String,
    },
}

impl Seen {
    fn to_byte(self) -> u8 {
        let mut bits = self.reported << REPORTED_FROM;
        if self.variant == Variant::Treatment {
            bits |= TREATMENT;
        }
        if self.is_measured {
            bits |= MEASURED;
        }
        bits
    }

    fn of_byte(bits: u8) -> Self {
        Seen {
            variant: if bits & TREATMENT == 0 {
                Variant::Control
            } else {
                Variant::Treatment
            },
            is_measured: bits & MEASURED != 0,
            reported: bits >> REPORTED_FROM,
        }
    }
}

impl Tally {
    /// All that was counted, in at most [`TALLY_BYTES_MAX`] bytes.
    #[must_use]
    pub(in crate::serving::experiment) fn to_bytes(&self) -> Vec<u8> {
        let head = codec::encode_plain(&Head {
            plan_blake3: self.plan.digest(),
            sums: self.sums.clone(),
            exposed: self.exposed,
            failed: self.failed,
            uncounted: self.uncounted,
        });
        let keys_bytes = self.seen.len() * KEY_BYTES;
        let mut bytes = Vec::with_capacity(LENGTH_BYTES + head.len() + keys_bytes);
        bytes.extend_from_slice(&(head.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&head);
        for (key, seen) in &self.seen {
            bytes.extend_from_slice(&key.to_le_bytes());
            bytes.push(seen.to_byte());
        }
        bytes
    }

    /// The tally that was written, to go on with.
    ///
    /// # Errors
    /// The bytes are no tally, or one of another plan.
    pub(in crate::serving::experiment) fn from_bytes(
        plan: Plan,
        alpha: f64,
        bytes: &[u8],
    ) -> Result<Self, NotATally> {
        let cut = || NotATally::Cut {
            size_bytes: bytes.len(),
        };
        let (length, rest) = bytes.split_first_chunk().ok_or_else(cut)?;
        let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| cut())?;
        let (head, keys) = rest.split_at_checked(length).ok_or_else(cut)?;
        let head: Head = codec::decode(head, HEAD_BYTES_MAX)?;
        let wanted = plan.digest();
        if head.plan_blake3 != wanted {
            let found = head.plan_blake3;
            return Err(NotATally::AnotherPlan { found, wanted });
        }
        let empty = Tally::new(plan, alpha);
        let (keys, rest) = keys.as_chunks::<KEY_BYTES>();
        if !rest.is_empty()
            || keys.len() as u64 > SAMPLES_MAX
            || head.sums.len() != empty.sums.len()
        {
            return Err(cut());
        }
        let seen = keys.iter().map(|[key @ .., bits]| {
            let key = u64::from_le_bytes(*key);
            (key, Seen::of_byte(*bits))
        });
        Ok(Tally {
            sums: head.sums,
            seen: seen.collect(),
            exposed: head.exposed,
            failed: head.failed,
            uncounted: head.uncounted,
            ..empty
        })
    }
}

#[cfg(test)]
pub(in crate::serving::experiment) mod tests {
    use std::time::Duration;

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::serving::experiment::plan::{Direction, Guardrail, Measure, Metric};
    use crate::serving::experiment::tally::{NotCounted, Unit};
    use crate::serving::rollout::plan::Served;
    use crate::serving::rollout::trial::Outcome;

    const ALPHA: f64 = 0.05;

    fn metric(measure: Measure) -> Metric {
        Metric {
            measure,
            direction: Direction::Down,
        }
    }

    /// With as many measures as there can be.
    pub(in crate::serving::experiment) fn plan() -> Plan {
        let served = |version| Served {
            version,
            digest: "d".repeat(64),
            size_bytes: 1,
        };
        let others = ["refunds", "returns"].map(|name| Measure::Outcome(name.into()));
        let guardrails = [Measure::ErrorRate, Measure::Latency]
            .into_iter()
            .chain(others)
            .map(|measure| Guardrail {
                metric: metric(measure),
                worsening_max: 0.5,
            });
        Plan {
            endpoint: "digits".into(),
            model: "digits".into(),
            control: served(1),
            treatment: served(2),
            control_share_bp: 5_000,
            treatment_share_bp: 5_000,
            seed: "exp".into(),
            primary: metric(Measure::Outcome("clicks".into())),
            effect_min: 0.01,
            guardrails: guardrails.collect(),
            alpha_bp: 500,
            samples_max: SAMPLES_MAX,
        }
    }

    fn again(tally: &Tally) -> Tally {
        Tally::from_bytes(plan(), ALPHA, &tally.to_bytes()).unwrap()
    }

    /// Something happens to a key, the same to whoever counts it.
    fn happen(tally: &mut Tally, rng: &mut StdRng) -> Option<Result<Variant, NotCounted>> {
        let key = format!("user-{}", rng.random_range(0..500));
        let is_treated = blake3::hash(key.as_bytes()).as_bytes()[0].is_multiple_of(2);
        let variant = if is_treated {
            Variant::Treatment
        } else {
            Variant::Control
        };
        let latency = Duration::from_micros(rng.random_range(500..2_000));
        let outcome = match rng.random_range(0..10) {
            0 => Outcome::Refused,
            1 => Outcome::Failed("no"),
            _ => Outcome::Answered(latency),
        };
        match rng.random_range(0..3) {
            0 => tally.record(Unit::of(&key), variant, outcome),
            1 => tally.record(Unit::Request, variant, outcome),
            _ => {
                let name = ["clicks", "refunds", "returns"][rng.random_range(0..3)];
                return Some(tally.report(&key, Some(name), rng.random()));
            }
        }
        None
    }

    #[test]
    fn a_count_that_was_interrupted_says_what_one_without_a_break_says() {
        let (mut whole, mut broken) = (Tally::new(plan(), ALPHA), Tally::new(plan(), ALPHA));
        let mut rngs = [StdRng::seed_from_u64(1), StdRng::seed_from_u64(1)];
        for at in 0..5_000 {
            let one = happen(&mut whole, &mut rngs[0]);
            let other = happen(&mut broken, &mut rngs[1]);
            // Keys come again and again, and what is refused of one is refused ever after.
            assert_eq!(one, other, "{at}");
            if at % 97 == 0 {
                broken = again(&broken);
            }
        }
        assert_eq!(whole.judge(), broken.judge());
        assert!(whole.counted() > 2_000, "{}", whole.counted());
    }

    #[test]
    fn a_key_takes_nine_bytes_and_the_rest_is_small() {
        let mut tally = Tally::new(plan(), ALPHA);
        let empty = tally.to_bytes().len();
        assert!(empty <= LENGTH_BYTES + HEAD_BYTES_MAX, "{empty}");
        for key in 0..10 {
            tally.record(Unit::Key(key), Variant::Control, Outcome::Refused);
        }
        assert_eq!(tally.to_bytes().len() - empty, 10 * KEY_BYTES);
    }

    #[test]
    fn bytes_of_something_else_are_no_count() {
        let mut tally = Tally::new(plan(), ALPHA);
        tally.record(Unit::Key(7), Variant::Control, Outcome::Refused);
        let bytes = tally.to_bytes();
        let longer = [&bytes[..], &[0]].concat();
        for wrong in [
            &bytes[..4],
            &bytes[..40],
            &bytes[..bytes.len() - 1],
            &longer[..],
        ] {
            let error = Tally::from_bytes(plan(), ALPHA, wrong).unwrap_err();
            assert!(matches!(error, NotATally::Cut { .. }), "{error}");
        }
        let other = Plan {
            alpha_bp: 501,
            ..plan()
        };
        let error = Tally::from_bytes(other, ALPHA, &bytes).unwrap_err();
        assert!(matches!(error, NotATally::AnotherPlan { .. }), "{error}");
    }
}
