//! Whether the share of errors has changed: detectors suspect it, and an exact test confirms it.
//!
//! A detector looks at its stream with each number anew, and each look may be wrong: in a stream whose share of errors never
//! changes every one of them finds a change now and then, more often the more errors there are. So an alarm is no finding here. It says
//! that the next [`SUSPICION_BLOCKS`] blocks of labels are worth a test: at the end of each the latest 1, 2, 4, … 128 blocks are
//! compared with all labels before them, by Fisher's exact test.
//!
//! 1. In labels that are independent of each other and wrong with one probability, something is found among
//!    [`FAMILY_LABELS`] of them with a probability of at most [`FAMILY_ERROR`]. That is shared out equally (Bonferroni) among
//!    *all* tests that can be made of so many labels: whichever of them the alarms select, each is exact.
//! 2. What comes later is compared with what was found last, so that one change is found once.
//! 3. Memory is bounded: that of the detectors, and a number for each block of the longest comparison.

use std::collections::VecDeque;

use super::{Bank, Change, Detector};
use crate::drift::statistics::{Share, fisher_exact_growth};

/// Labels to which the bound on what is found without a change applies.
pub const FAMILY_LABELS: u64 = 1_000_000;

/// The probability of finding anything in so many labels without a change, at the most.
pub const FAMILY_ERROR: f64 = 0.05;

/// Labels between two looks.
const BLOCK_LABELS: u64 = 50;

/// Comparisons at each look: of one block, and of twice as many each time.
const SPLITS: u32 = 8;

/// Blocks of the longest comparison.
const BLOCKS_MAX: usize = 1 << (SPLITS - 1);

/// For so many blocks an alarm is looked into: while all of them can be in a comparison.
const SUSPICION_BLOCKS: usize = BLOCKS_MAX;

/// Growth, and its contrary.
const DIRECTIONS: u64 = 2;

/// The p-value up to which a test confirms an alarm.
const P_THRESHOLD: f64 =
    FAMILY_ERROR / (FAMILY_LABELS / BLOCK_LABELS * SPLITS as u64 * DIRECTIONS) as f64;

/// An alarm that may be right.
#[derive(Clone, Copy, Debug)]
struct Suspicion {
    detector: Detector,
    change: Change,
    /// Looks until it is given up.
    blocks_left: usize,
}

impl Suspicion {
    /// What is left of it after a look.
    fn aged(self) -> Option<Self> {
        let blocks_left = self.blocks_left - 1;
        (blocks_left > 0).then_some(Suspicion {
            blocks_left,
            ..self
        })
    }
}

/// Watches the share of errors among labels.
#[derive(Clone, Debug)]
pub struct ErrorWatch {
    detectors: Bank,
    /// All labels since what was found last, in whole blocks.
    known: Share,
    /// Errors of the latest blocks of those, the newest first.
    blocks: VecDeque<u64>,
    /// The block that fills.
    open: Share,
    growth: Option<Suspicion>,
    fall: Option<Suspicion>,
}

impl Default for ErrorWatch {
    fn default() -> Self {
        ErrorWatch {
            detectors: Bank::of_errors(),
            known: Share::default(),
            blocks: VecDeque::with_capacity(BLOCKS_MAX),
            open: Share::default(),
            growth: None,
            fall: None,
        }
    }
}

impl ErrorWatch {
    /// A watch that has seen no label.
    #[must_use]
    pub fn new() -> Self {
        ErrorWatch::default()
    }

    /// Takes a label: whether the answer was wrong. A change that is confirmed with it, and the detector that suspected it last: the
    /// statistic is the detector's, and the shares before and after are those that were tested.
    pub fn update(&mut self, is_wrong: bool) -> Option<(Detector, Change)> {
        for (detector, change) in self.detectors.update(f64::from(u8::from(is_wrong))) {
            let suspicion = Some(Suspicion {
                detector,
                change,
                blocks_left: SUSPICION_BLOCKS,
            });
            if change.after > change.before {
                self.growth = suspicion;
            } else {
                self.fall = suspicion;
            }
        }
        self.open.of += 1;
        self.open.hits += u64::from(is_wrong);
        if self.open.of < BLOCK_LABELS {
            return None;
        }
        self.close_block();
        let found = self.look();
        self.growth = self.growth.and_then(Suspicion::aged);
        self.fall = self.fall.and_then(Suspicion::aged);
        found
    }

    fn close_block(&mut self) {
        let block = std::mem::take(&mut self.open);
        self.known.hits += block.hits;
        self.known.of += block.of;
        self.blocks.truncate(BLOCKS_MAX - 1);
        self.blocks.push_front(block.hits);
    }

    /// The change that one of the comparisons confirms, if one is suspected.
    fn look(&mut self) -> Option<(Detector, Change)> {
        if self.growth.is_none() && self.fall.is_none() {
            return None;
        }
        for size in (0..SPLITS).map(|split| 1usize << split) {
            let after = Share {
                hits: self.blocks.iter().take(size).sum(),
                of: size as u64 * BLOCK_LABELS,
            };
            if after.of >= self.known.of {
                return None;
            }
            let before = Share {
                hits: self.known.hits - after.hits,
                of: self.known.of - after.of,
            };
            let is_growth = |_: &Suspicion| fisher_exact_growth(before, after) <= P_THRESHOLD;
            let is_fall = |_: &Suspicion| fisher_exact_growth(after, before) <= P_THRESHOLD;
            let found = self
                .growth
                .filter(is_growth)
                .or_else(|| self.fall.filter(is_fall));
            if let Some(suspicion) = found {
                self.begin_anew(size, after);
                let change = Change {
                    before: before.ratio(),
                    after: after.ratio(),
                    ..suspicion.change
                };
                return Some((suspicion.detector, change));
            }
        }
        None
    }

    /// From now on the latest `size` blocks, which have these labels, are what is known.
    fn begin_anew(&mut self, size: usize, after: Share) {
        self.known = after;
        self.blocks.truncate(size);
        self.growth = None;
        self.fall = None;
    }
}

#[cfg(test)]
#[path = "error_watch_tests.rs"]
mod tests;
