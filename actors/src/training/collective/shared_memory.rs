//! Sums between processes of one machine: written once into memory that the others read, while the message only
//! says where.
//!
//! Invariants:
//! 1. Sums are put there only for a member that has said that it can read them; all others get them with the
//!    message.
//! 2. A sum that several ask for is written once, and again only when it was written over.
//! 3. What cannot be read, or is not what was written, is [`Damaged`], and is sent or asked for again.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;

use super::parcel::{Damaged, Parcel};
use super::segment::{Segment, SegmentName, Span, Window};
use crate::training::protocol::exchange::Ask;
use crate::training::protocol::leader::StateDigest;
use crate::training::reduction::Partial;

/// Fewer values than this go with the message, which has to be sent anyway: 16 KiB.
const PLACED_MIN: usize = 4096;
/// The ring holds the gradient so many times: what a trainer sends in a step (all that it does not own, of one or
/// more subtrees), what it answers (all that it owns), and the same of a step that others are behind.
const GRADIENTS_HELD: usize = 4;
/// Bounds on the ring. A model whose sums overrun it has them sent again, which costs time and nothing else.
const SEGMENT_BYTES_MIN: usize = 1 << 20;
const SEGMENT_BYTES_MAX: usize = 512 << 20;
/// Sums that are remembered as written: two steps' of the most buckets that one trainer is likely to own.
const REMEMBERED_MAX: usize = 256;
/// Others' segments that are open: each other trainer's, and those of some that were started again.
const WINDOWS_MAX: usize = 512;

/// One process's part: what it writes, and what it reads of others.
#[derive(Debug, Default)]
pub struct SharedMemory {
    own: Option<Segment>,
    windows: Mutex<BTreeMap<SegmentName, Arc<Window>>>,
    /// Sums that were asked for, oldest first.
    answers: Mutex<VecDeque<(Which, Parcel)>>,
}

/// Which sum over all shards: step, bucket and the state before the step decide its bits.
type Which = (u64, u32, StateDigest);

impl SharedMemory {
    /// The part of one who computes gradients of `value_count` values. Where the system gives no memory, sums go with
    /// the messages.
    #[must_use]
    pub fn for_gradients(value_count: usize) -> Self {
        let wanted = value_count
            .saturating_mul(size_of::<f32>())
            .saturating_mul(GRADIENTS_HELD);
        let length = wanted.clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX);
        let own = match Segment::create(length) {
            Ok(segment) => Some(segment),
            Err(error) => {
                tracing::warn!(%error, length, "no shared memory for sums: they go with the messages");
                None
            }
        };
        SharedMemory {
            own,
            ..SharedMemory::default()
        }
    }

    /// The part of one who only reads.
    #[must_use]
    pub fn reader() -> Self {
        SharedMemory::default()
    }

    /// Where others find what this process writes.
    #[must_use]
    pub fn name(&self) -> Option<SegmentName> {
        self.own.as_ref().map(Segment::name)
    }

    /// Whether this process can read what another writes there.
    pub fn can_read(&self, name: SegmentName) -> bool {
        let mut windows = self.windows.lock();
        if windows.contains_key(&name) {
            return true;
        }
        match Window::open(name) {
            Ok(window) => {
                if windows.len() >= WINDOWS_MAX {
                    // Of ended processes, most of them; the others are opened again.
                    windows.clear();
                }
                windows.insert(name, Arc::new(window));
                true
            }
            Err(reason) => {
                tracing::debug!(%reason, "sums of another process come with its messages");
                false
            }
        }
    }

    /// Sums for one member, which may be `placed` if it can read them.
    #[must_use]
    pub fn pack(&self, partial: Partial, placed: bool) -> Parcel {
        match self.place(&partial, placed) {
            Some(parcel) => parcel,
            None => Parcel::inline(partial),
        }
    }

    /// The sum that `ask` asks for, which others ask for too.
    #[must_use]
    pub fn pack_answer(&self, ask: &Ask, sum: Arc<Partial>, placed: bool) -> Parcel {
        if !placed {
            return Parcel::inline(Arc::unwrap_or_clone(sum));
        }
        let which = (ask.step, ask.bucket, ask.digest);
        let mut answers = self.answers.lock();
        let known = answers.iter().find(|(known, _)| *known == which);
        if let (Some((_, parcel)), Some(own)) = (known, &self.own)
            && parcel.place().is_some_and(|(_, span)| own.holds(span))
        {
            return parcel.clone();
        }
        let Some(parcel) = self.place(&sum, placed) else {
            return Parcel::inline(Arc::unwrap_or_clone(sum));
        };
        answers.retain(|(known, _)| *known != which);
        if answers.len() >= REMEMBERED_MAX {
            answers.pop_front();
        }
        answers.push_back((which, parcel.clone()));
        parcel
    }

    fn place(&self, partial: &Partial, placed: bool) -> Option<Parcel> {
        let own = self.own.as_ref()?;
        if !placed || partial.grads.len() < PLACED_MIN {
            return None;
        }
        let span = own.write(&partial.grads)?;
        Some(Parcel::placed(partial, own.name(), span))
    }

    /// The sums of a parcel that another process has sent.
    pub fn unpack(&self, parcel: Parcel) -> Result<Partial, Damaged> {
        parcel.open(|segment, span| self.read(segment, span))
    }

    fn read(&self, segment: SegmentName, span: Span) -> Option<Vec<f32>> {
        if !self.can_read(segment) {
            return None;
        }
        let window = Arc::clone(self.windows.lock().get(&segment)?);
        window.read(span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::protocol::plan::MemberId;
    use crate::training::reduction::Subtree;

    fn sums(count: usize, first: f32) -> Partial {
        Partial {
            subtree: Subtree { level: 2, index: 1 },
            loss_sum: 1.5,
            count: 32,
            grads: (0..count).map(|value| first + value as f32).collect(),
        }
    }

    fn ask(step: u64) -> Ask {
        Ask {
            from: MemberId::default(),
            step,
            digest: [3; 16],
            bucket: 0,
            at_once: false,
        }
    }

    /// Where its values lie.
    fn is_placed(parcel: &Parcel) -> bool {
        parcel.place().is_some()
    }

    #[test]
    fn large_sums_are_placed_for_who_can_read_them() {
        let (writer, reader) = (SharedMemory::for_gradients(9000), SharedMemory::reader());
        assert!(reader.can_read(writer.name().unwrap()));
        for (count, asked, placed) in [(9001, true, true), (9001, false, false), (10, true, false)]
        {
            let parcel = writer.pack(sums(count, 0.5), asked);
            assert_eq!(is_placed(&parcel), placed);
            assert_eq!(reader.unpack(parcel), Ok(sums(count, 0.5)));
        }
        let parcel = reader.pack(sums(9001, 0.0), true);
        assert!(!is_placed(&parcel), "a reader has no memory of its own");
    }

    #[test]
    fn an_answer_is_written_once_and_again_when_it_was_written_over() {
        let (writer, reader) = (SharedMemory::for_gradients(1), SharedMemory::reader());
        let sum = Arc::new(sums(SEGMENT_BYTES_MIN / 4 / 2, 1.0));
        let first = writer.pack_answer(&ask(1), Arc::clone(&sum), true);
        let second = writer.pack_answer(&ask(1), Arc::clone(&sum), true);
        assert_eq!(first, second, "the same place");
        // Half of the ring each: the third overwrites the first.
        for step in [2, 3] {
            let _ = writer.pack_answer(&ask(step), Arc::new(sums(sum.grads.len(), 7.0)), true);
        }
        assert_eq!(reader.unpack(first), Err(Damaged), "written over");
        let again = writer.pack_answer(&ask(1), Arc::clone(&sum), true);
        assert_eq!(reader.unpack(again), Ok((*sum).clone()));
        let with_the_message = writer.pack_answer(&ask(1), Arc::clone(&sum), false);
        assert!(!is_placed(&with_the_message));
    }

    #[test]
    fn what_an_ended_process_wrote_cannot_be_read_by_who_comes_later() {
        let writer = SharedMemory::for_gradients(9000);
        let parcel = writer.pack(sums(9000, 0.0), true);
        drop(writer);
        assert_eq!(SharedMemory::reader().unpack(parcel), Err(Damaged));
    }
}
