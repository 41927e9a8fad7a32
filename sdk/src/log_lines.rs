//! Lines of many processes, for people: whole lines with where they come from, and what many processes
//! say alike said once.
//!
//! Invariants:
//! 1. Every line is printed, or counted in a line that was printed before it.
//! 2. Only a line that another process printed within [`FOLD_WINDOW`] is folded: what one process
//!    repeats is its own business, and is printed.
//! 3. At most `LINES_KEPT_MAX` lines are remembered, and at most `LINE_BYTES_MAX` of one that has
//!    no end yet.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// How long a line is remembered: what hosts print at the same event is apart by the time that it
/// takes them to start, and by how often logs are read.
pub const FOLD_WINDOW: Duration = Duration::from_secs(5);

/// Lines that are remembered at a time, of a kilobyte and less each.
const LINES_KEPT_MAX: usize = 1024;

/// The longest line, in bytes; a longer one is cut into several.
const LINE_BYTES_MAX: usize = 64 << 10;

/// Puts lines together and folds repeated ones. Time comes in as an argument.
#[derive(Debug, Default)]
pub struct LogLines {
    is_folding: bool,
    /// The beginning of each source's next line.
    open: BTreeMap<String, Vec<u8>>,
    seen: BTreeMap<Vec<u8>, Seen>,
    /// Remembered lines in the order in which they are forgotten.
    order: VecDeque<(Instant, Vec<u8>)>,
}

#[derive(Debug)]
struct Seen {
    /// Who said it; whoever says it twice is printed again.
    sources: BTreeSet<String>,
    /// How often it was left out.
    folded: u64,
}

impl LogLines {
    /// `is_folding`: whether repeated lines are folded.
    #[must_use]
    pub fn new(is_folding: bool) -> Self {
        LogLines {
            is_folding,
            ..LogLines::default()
        }
    }

    /// Takes what `source` printed; the lines to show now, each with its end.
    pub fn push(&mut self, source: &str, data: &[u8], now: Instant) -> Vec<u8> {
        let mut shown = self.due(now);
        let mut open = self.open.remove(source).unwrap_or_default();
        for part in data.split_inclusive(|byte| *byte == b'\n') {
            open.extend_from_slice(part);
            if open.last() == Some(&b'\n') || open.len() >= LINE_BYTES_MAX {
                let line = std::mem::take(&mut open);
                self.line(source, line, now, &mut shown);
            }
        }
        if !open.is_empty() {
            self.open.insert(source.to_owned(), open);
        }
        shown
    }

    /// What is to be shown because its time has come: how often lines were repeated.
    pub fn due(&mut self, now: Instant) -> Vec<u8> {
        let mut shown = Vec::new();
        while let Some((since, _)) = self.order.front()
            && (now.saturating_duration_since(*since) >= FOLD_WINDOW
                || self.order.len() > LINES_KEPT_MAX)
        {
            let (_, line) = self.order.pop_front().expect("it was there just now");
            self.forget(&line, &mut shown);
        }
        shown
    }

    /// The rest: lines without an end, and what was folded.
    pub fn finish(mut self, now: Instant) -> Vec<u8> {
        let mut shown = Vec::new();
        for (source, line) in std::mem::take(&mut self.open) {
            self.line(&source, line, now, &mut shown);
        }
        for (_, line) in std::mem::take(&mut self.order) {
            self.forget(&line, &mut shown);
        }
        shown
    }

    fn line(&mut self, source: &str, line: Vec<u8>, now: Instant, shown: &mut Vec<u8>) {
        let text = line.trim_ascii_end().to_vec();
        if self.is_folding && !text.is_empty() {
            match self.seen.get_mut(&text) {
                Some(seen) => {
                    if seen.sources.insert(source.to_owned()) {
                        seen.folded += 1;
                        return;
                    }
                }
                None => {
                    let seen = Seen {
                        sources: BTreeSet::from([source.to_owned()]),
                        folded: 0,
                    };
                    self.seen.insert(text.clone(), seen);
                    self.order.push_back((now, text.clone()));
                }
            }
        }
        write_line(source, &text, None, shown);
        shown.extend(self.due(now));
    }

    fn forget(&mut self, line: &[u8], shown: &mut Vec<u8>) {
        if let Some(Seen { folded, .. }) = self.seen.remove(line)
            && folded > 0
        {
            write_line("", line, Some(folded), shown);
        }
    }
}

fn write_line(source: &str, text: &[u8], folded: Option<u64>, shown: &mut Vec<u8>) {
    if !source.is_empty() {
        shown.extend_from_slice(format!("({source}) ").as_bytes());
    }
    shown.extend_from_slice(text);
    if let Some(folded) = folded {
        shown.extend_from_slice(format!(" [repeated {folded}x across hosts]").as_bytes());
    }
    shown.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn what_many_hosts_say_alike_is_said_once_and_counted() {
        let start = Instant::now();
        let mut lines = LogLines::new(true);
        assert_eq!(
            text(lines.push("a", b"loading\nst", start)),
            "(a) loading\n"
        );
        for source in ["b", "c", "d"] {
            assert_eq!(text(lines.push(source, b"loading\n", start)), "");
        }
        // Who says it twice means it.
        assert_eq!(
            text(lines.push("a", b"ep 1\nloading\n", start)),
            "(a) step 1\n(a) loading\n"
        );
        let later = start + FOLD_WINDOW;
        assert_eq!(
            text(lines.due(later)),
            "loading [repeated 3x across hosts]\n"
        );
        // It is forgotten then.
        assert_eq!(text(lines.push("b", b"loading\n", later)), "(b) loading\n");
        assert_eq!(text(lines.push("c", b"loading\nend", later)), "");
        assert_eq!(
            text(lines.finish(later)),
            "(c) end\nloading [repeated 1x across hosts]\n"
        );
    }

    #[test]
    fn without_folding_everything_is_shown() {
        let now = Instant::now();
        let mut lines = LogLines::new(false);
        assert_eq!(
            text(lines.push("a", b"x\n\nx\n", now)),
            "(a) x\n(a) \n(a) x\n"
        );
        assert_eq!(text(lines.push("b", b"x\n", now)), "(b) x\n");
        assert_eq!(text(lines.finish(now)), "");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let now = Instant::now();
        let mut lines = LogLines::new(true);
        for number in 0..2 * LINES_KEPT_MAX {
            lines.push("a", format!("line {number}\n").as_bytes(), now);
        }
        assert!(lines.seen.len() <= LINES_KEPT_MAX + 1);
        let shown = lines.push("b", &vec![b'x'; 3 * LINE_BYTES_MAX], now);
        assert!(shown.len() > LINE_BYTES_MAX);
        assert!(lines.open.values().all(|open| open.len() < LINE_BYTES_MAX));
    }
}
