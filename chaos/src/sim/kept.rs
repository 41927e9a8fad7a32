//! What jobs keep in a simulated cluster: their drivers keep values by name and drop them, whatever has become of their
//! incarnation meanwhile, and clients drop what they have heard of.

use mobula_core::control::ModuleId;
use mobula_core::id::JobId;
use mobula_core::kept::{Holder, KeptCommand, KeptValue};
use mobula_core::object::Format;
use rand::Rng;

use super::domain::Change;
use super::world::World;

/// Names and values of a job: few, so that its drivers get into each other's way.
const NAMES: u8 = 2;
const VALUES: u8 = 2;

/// How many of a driver's commands drop something.
const DROPS: f64 = 0.3;

/// A value of one chunk that no other name has.
fn value(job: JobId, name: u8, number: u8) -> KeptValue {
    let mut chunk = [number; 32];
    chunk[0] = name;
    chunk[1..9].copy_from_slice(&job.0.to_be_bytes());
    KeptValue {
        format: Format::Encoded,
        size_bytes: u64::from(number) + 1,
        chunks: vec![chunk],
    }
}

impl World {
    /// A driver keeps something, or drops it.
    pub(crate) fn driver_keeps(&mut self, worker: usize, job: JobId, holder: Holder) {
        let holder = Some(holder);
        let name_number = self.rng.random_range(0..NAMES);
        let name = format!("kept-{name_number}");
        let command = if self.rng.random_bool(DROPS) {
            KeptCommand::Drop { job, holder, name }
        } else {
            let value = value(job, name_number, self.rng.random_range(0..VALUES));
            KeptCommand::Keep {
                job,
                holder,
                name,
                value,
            }
        };
        self.actor_says(worker, ModuleId::KEPT, command.encode());
    }

    /// A client drops something that a job keeps, or kept until just now; nothing where none does.
    pub(crate) fn kept_change(&mut self) -> Option<Change> {
        let model = &self.checker.model;
        let pick = self.rng.random_range(0..model.kept_names().count().max(1));
        let (job, name) = model.kept_names().nth(pick)?;
        let command = KeptCommand::Drop {
            job,
            holder: None,
            name: name.to_owned(),
        };
        Some(Change {
            module: ModuleId::KEPT,
            payload: command.encode(),
        })
    }
}
