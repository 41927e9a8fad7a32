//! Counted handles on objects, and how they leave a process and arrive in another.
//!
//! Invariants:
//! 1. A handle that exists keeps its object alive; the last one that is dropped says so.
//! 2. A reference that was sent keeps its object alive until it arrives, by a hold at the owner.
//! 3. References inside an object's value are kept by that object, not by holds: a value can be
//!    read many times.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

use mobula_core::object::ObjectId;
use mobula_wire::object::Reference;

use super::cell::{Cell, Outcome};
use super::link::Link;
use super::owner::Entry;
use super::table::ObjectTable;

/// A handle on an object. Clones count as one until the last of them is dropped.
#[derive(Clone)]
pub struct Object(Arc<Handle>);

struct Handle {
    id: ObjectId,
    table: Arc<ObjectTable>,
    side: Side,
}

pub(crate) enum Side {
    Owned(Arc<Entry>),
    Borrowed { link: Arc<Link>, cell: Arc<Cell> },
}

impl Object {
    pub(crate) fn new(id: ObjectId, table: Arc<ObjectTable>, side: Side) -> Self {
        Object(Arc::new(Handle { id, table, side }))
    }

    /// Which object.
    #[must_use]
    pub fn id(&self) -> ObjectId {
        self.0.id
    }

    /// Whether this very process answers for the object.
    #[must_use]
    pub fn is_owned(&self) -> bool {
        matches!(self.0.side, Side::Owned(_))
    }

    /// Whether the object has come to a value or an error, as far as this process knows.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.cell().is_settled()
    }

    /// What the object has come to, if it has.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.cell().outcome()
    }

    /// Waits until the object has come to something.
    pub async fn wait(&self) -> Outcome {
        self.cell().wait().await
    }

    pub(crate) fn cell(&self) -> &Cell {
        match &self.0.side {
            Side::Owned(entry) => &entry.cell,
            Side::Borrowed { cell, .. } => cell,
        }
    }

    pub(crate) fn side(&self) -> &Side {
        &self.0.side
    }

    /// The objects that this one belongs to.
    #[must_use]
    pub fn table(&self) -> &Arc<ObjectTable> {
        &self.0.table
    }

    /// A reference to send to another process. The object lives until somebody takes it in, or
    /// for [`TRANSIT_MAX`](super::table::TRANSIT_MAX).
    #[must_use]
    pub fn export(&self) -> Reference {
        let mode = CAPTURE.with_borrow_mut(|capture| {
            let capture = capture.as_mut()?;
            capture.objects.push(self.clone());
            Some(capture.is_contained)
        });
        let is_contained = mode == Some(true);
        let owner = match &self.0.side {
            Side::Owned(_) => self.0.table.call_address().to_owned(),
            Side::Borrowed { link, .. } => link.address().to_owned(),
        };
        let agent = match &self.0.side {
            Side::Owned(_) => self.0.table.agent_address().to_owned(),
            Side::Borrowed { link, .. } => link.agent().to_owned(),
        };
        let transit = match &self.0.side {
            Side::Owned(entry) => self.0.table.export(entry, !is_contained),
            Side::Borrowed { .. } if is_contained => 0,
            Side::Borrowed { link, .. } => {
                let transit = self.0.table.next_transit();
                link.transit(self.0.id.sequence, transit);
                transit
            }
        };
        Reference {
            object: self.0.id,
            owner,
            transit,
            agent,
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        match &self.side {
            Side::Owned(entry) => self.table.dropped(entry),
            Side::Borrowed { link, .. } => link.release(self.id.sequence),
        }
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object")
            .field("id", &self.0.id)
            .field("is_owned", &self.is_owned())
            .finish_non_exhaustive()
    }
}

struct Capture {
    objects: Vec<Object>,
    is_contained: bool,
}

thread_local! {
    static CAPTURE: RefCell<Option<Capture>> = const { RefCell::new(None) };
    static HOLDING: RefCell<Option<Object>> = const { RefCell::new(None) };
}

/// Runs `encode` and answers, with its result, every object whose reference it sent. Who keeps
/// them until the receiver has answered need not fear that a repetition of the message finds them
/// freed.
pub fn capture<R>(encode: impl FnOnce() -> R) -> (R, Vec<Object>) {
    capturing(false, encode)
}

/// As [`capture`], for the value of an object that will keep those it contains.
pub(crate) fn capture_contained<R>(encode: impl FnOnce() -> R) -> (R, Vec<Object>) {
    capturing(true, encode)
}

fn capturing<R>(is_contained: bool, encode: impl FnOnce() -> R) -> (R, Vec<Object>) {
    let outer = CAPTURE.replace(Some(Capture {
        objects: Vec::new(),
        is_contained,
    }));
    let restore = Restore(&CAPTURE, Some(outer));
    let result = encode();
    let captured = CAPTURE
        .take()
        .map_or_else(Vec::new, |capture| capture.objects);
    drop(restore);
    (result, captured)
}

/// Runs `decode` on the value of `container`, which then lives until the owners of all references
/// in it know about their new holder.
pub fn holding<R>(container: &Object, decode: impl FnOnce() -> R) -> R {
    let outer = HOLDING.replace(Some(container.clone()));
    let _restore = Restore(&HOLDING, Some(outer));
    decode()
}

pub(crate) fn held() -> Option<Object> {
    HOLDING.with_borrow(Clone::clone)
}

/// Puts back what was there before, on a panic too.
struct Restore<T: 'static>(
    &'static std::thread::LocalKey<RefCell<Option<T>>>,
    Option<Option<T>>,
);

impl<T> Drop for Restore<T> {
    fn drop(&mut self) {
        if let Some(outer) = self.1.take() {
            drop(self.0.replace(outer));
        }
    }
}
