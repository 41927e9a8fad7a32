//! Whether it is worth looking for a frame before sleeping until it comes.
//!
//! Waking a thread on a processor that sleeps takes longer than a small call does. A processor that
//! others want does not sleep, and there looking would only take time from them.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A frame that came within this time will have cost about as much waking up as waiting.
const SOON: Duration = Duration::from_micros(100);

/// How many frames must have come soon, each alone, before it is worth looking for the next.
const SOON_MIN: u32 = 4;

/// Each time that it was looked in vain twice as many, so often: what comes soon, but never so soon, is not looked for.
const DOUBLED_MAX: u32 = 10;

/// Between two looks of a thread that has its processor to itself there is less than this.
const LOOK_GAP_MAX: Duration = Duration::from_micros(500);

/// How long not to look after others were seen to want the processor: what a time slice costs is a
/// small part of it.
const REST: Duration = Duration::from_millis(100);

/// Whether two threads can run at once: otherwise looking would only keep the sender from sending.
fn can_look() -> bool {
    static CAN: OnceLock<bool> = OnceLock::new();
    *CAN.get_or_init(|| std::thread::available_parallelism().is_ok_and(|cores| cores.get() > 1))
}

/// What a receiver knows of the frames that came last.
#[derive(Debug, Default)]
pub(super) struct Anticipation {
    /// Frames that have come soon and alone, in a row.
    soon: u32,
    /// Looks in vain since the last that was not.
    vain: u32,
    rests_until: Option<Instant>,
}

impl Anticipation {
    /// Whether to look now.
    pub(super) fn looks(&self, now: Instant) -> bool {
        let soon_min = SOON_MIN << self.vain.min(DOUBLED_MAX);
        self.soon >= soon_min && can_look() && self.rests_until.is_none_or(|until| until <= now)
    }

    /// Between two looks this much time went by.
    pub(super) fn looked(&mut self, now: Instant, gap: Duration) {
        if gap > LOOK_GAP_MAX {
            self.rests_until = Some(now + REST);
        }
    }

    /// What was looked for came.
    pub(super) fn found(&mut self) {
        self.vain = 0;
    }

    /// It did not come as long as it was looked for.
    pub(super) fn not_found(&mut self) {
        self.vain = self.vain.saturating_add(1);
        self.soon = 0;
    }

    /// A frame came after `waited`; several at once make up for the price of waking up.
    pub(super) fn came(&mut self, waited: Duration, alone: bool) {
        self.soon = match alone && waited < SOON {
            true => self.soon.saturating_add(1),
            false => 0,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lone_frames_that_come_soon_are_looked_for_and_not_while_others_want_the_processor() {
        let now = Instant::now();
        let mut anticipation = Anticipation::default();
        for _ in 0..SOON_MIN {
            assert!(!anticipation.looks(now));
            anticipation.came(SOON / 2, true);
        }
        assert_eq!(anticipation.looks(now), can_look());
        anticipation.looked(now, LOOK_GAP_MAX / 2);
        assert_eq!(anticipation.looks(now), can_look());
        anticipation.looked(now, LOOK_GAP_MAX * 2);
        assert!(!anticipation.looks(now));
        assert_eq!(anticipation.looks(now + REST), can_look());
        anticipation.came(SOON / 2, false);
        assert!(!anticipation.looks(now + REST));
    }

    #[test]
    fn what_is_looked_for_in_vain_is_looked_for_less_often() {
        let now = Instant::now();
        let mut anticipation = Anticipation::default();
        // As often as there may be looks among so many frames.
        let mut looks_among = |frames: u32, found: bool| {
            let mut looks = 0;
            for _ in 0..frames {
                if anticipation.looks(now) {
                    looks += 1;
                    match found {
                        true => anticipation.found(),
                        false => anticipation.not_found(),
                    }
                }
                anticipation.came(SOON / 2, true);
            }
            looks
        };
        if !can_look() {
            return;
        }
        // 4 and 8 and 16 … of them before each.
        assert_eq!(looks_among(1000, false), 7);
        let again = looks_among(2000, true);
        assert!(again > 900, "{again}");
    }
}
