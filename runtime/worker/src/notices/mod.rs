//! Notices that the machine is about to be taken away: from the leader (a command), from a file,
//! by SIGTERM, and from the cloud's metadata service.
//!
//! Invariants:
//! 1. Each source gives at most one notice; the earliest deadline of all counts.
//! 2. The leader and the hosts hear only of changes of that earliest deadline, so a notice that
//!    comes back as an echo changes nothing.
//! 3. Advice is no notice: the hosts hear of it, nothing is moved for it, and the leader is not told.

mod cloud;
mod file;
mod signal;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

pub(crate) use cloud::watch_cloud;
pub use cloud::{Cloud, UnknownCloud};
pub(crate) use file::watch_file;
pub use file::{NoticeFileError, parse_notice_file};
pub(crate) use signal::{sigterm, watch_sigterm};

/// Who says that the machine will be taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NoticeSource {
    /// The leader, asked by a person.
    Command,
    /// The notice file.
    File,
    /// SIGTERM to the agent.
    Sigterm,
    /// Amazon's metadata service.
    Aws,
    /// Google's.
    Gcp,
    /// Microsoft's.
    Azure,
}

impl NoticeSource {
    /// A short stable word for events and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            NoticeSource::Command => "command",
            NoticeSource::File => "file",
            NoticeSource::Sigterm => "sigterm",
            NoticeSource::Aws => "aws",
            NoticeSource::Gcp => "gcp",
            NoticeSource::Azure => "azure",
        }
    }
}

/// A notice that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notice {
    /// When the machine will be gone, in milliseconds since the Unix epoch.
    pub deadline_ms: u64,
    /// Who says so.
    pub source: NoticeSource,
}

/// What a source says: a deadline in milliseconds since the Unix epoch, or that there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoticeChange {
    pub(crate) source: NoticeSource,
    pub(crate) deadline_ms: Option<u64>,
}

/// What a source says that has no deadline: that the machine may be taken away, or no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AdviceChange {
    pub(crate) source: NoticeSource,
    pub(crate) stands: bool,
}

/// All notices that stand, and all advice.
#[derive(Debug, Default)]
pub(crate) struct NoticeBoard {
    deadlines: BTreeMap<NoticeSource, u64>,
    advisers: BTreeSet<NoticeSource>,
}

impl NoticeBoard {
    /// Takes in what a source says. `Some` means that what counts has changed, to the value inside.
    pub(crate) fn apply(&mut self, change: NoticeChange) -> Option<Option<Notice>> {
        let before = self.current();
        match change.deadline_ms {
            // The leader repeats to the node what the node told it: not a notice of its own.
            Some(deadline_ms)
                if change.source == NoticeSource::Command
                    && self.deadlines.values().any(|known| *known == deadline_ms) => {}
            Some(deadline_ms) => {
                self.deadlines.insert(change.source, deadline_ms);
            }
            None => {
                self.deadlines.remove(&change.source);
            }
        }
        let after = self.current();
        (before != after).then_some(after)
    }

    /// Takes in what a source advises. Answers whether any advice stands now.
    pub(crate) fn advise(&mut self, change: AdviceChange) -> bool {
        if change.stands {
            self.advisers.insert(change.source);
        } else {
            self.advisers.remove(&change.source);
        }
        !self.advisers.is_empty()
    }

    /// The notice that counts.
    pub(crate) fn current(&self) -> Option<Notice> {
        self.deadlines
            .iter()
            .map(|(source, deadline_ms)| Notice {
                deadline_ms: *deadline_ms,
                source: *source,
            })
            .min_by_key(|notice| notice.deadline_ms)
    }
}

/// Milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// How long it is from now to `deadline_ms`.
pub(crate) fn until(deadline_ms: u64) -> Duration {
    Duration::from_millis(deadline_ms.saturating_sub(now_ms()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(source: NoticeSource, deadline_ms: Option<u64>) -> NoticeChange {
        NoticeChange {
            source,
            deadline_ms,
        }
    }

    #[test]
    fn the_earliest_deadline_counts_and_only_changes_are_told() {
        let mut board = NoticeBoard::default();
        let file = |deadline_ms| Notice {
            deadline_ms,
            source: NoticeSource::File,
        };
        let told = board.apply(change(NoticeSource::File, Some(500)));
        assert_eq!(told, Some(Some(file(500))));
        assert_eq!(board.apply(change(NoticeSource::File, Some(500))), None);
        assert_eq!(board.apply(change(NoticeSource::Sigterm, Some(900))), None);
        let told = board.apply(change(NoticeSource::Command, Some(100)));
        let command = Notice {
            deadline_ms: 100,
            source: NoticeSource::Command,
        };
        assert_eq!(told, Some(Some(command)));
        assert_eq!(
            board.apply(change(NoticeSource::Command, None)),
            Some(Some(file(500)))
        );
    }

    #[test]
    fn advice_stands_as_long_as_somebody_gives_it() {
        let mut board = NoticeBoard::default();
        let advice = |source, stands| AdviceChange { source, stands };
        assert!(board.advise(advice(NoticeSource::Aws, true)));
        assert!(board.advise(advice(NoticeSource::Gcp, true)));
        assert!(board.advise(advice(NoticeSource::Aws, false)));
        assert_eq!(board.current(), None, "it is no notice");
        assert!(!board.advise(advice(NoticeSource::Gcp, false)));
    }

    #[test]
    fn an_echo_of_our_own_notice_ends_with_it() {
        let mut board = NoticeBoard::default();
        board.apply(change(NoticeSource::File, Some(500)));
        assert_eq!(board.apply(change(NoticeSource::Command, Some(500))), None);
        assert_eq!(board.apply(change(NoticeSource::File, None)), Some(None));
        assert_eq!(board.apply(change(NoticeSource::Command, None)), None);
    }
}
