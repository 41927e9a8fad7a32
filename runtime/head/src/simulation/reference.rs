//! The state machine alone, which what replicas say and hold is compared with.

use std::ops::ControlFlow;
use std::sync::Arc;

use mobula_core::control::{Effect, ModuleId, StateModule, Subject};
use mobula_core::error::Rejection;
use mobula_storage::engine::{Column, Durability, Engine, MemoryEngine, Read, WriteBatch, WriteOp};
use mobula_storage::tables::TablesReader;
use raft::prelude::{ConfChange, ConfChangeType, ConfState, Entry};

use super::View;
use crate::raft::simulation::{Applier, Configuration, HeadsModule};

/// The state machine alone: entries are applied one by one, each exactly once, on a store that
/// never fails. What replicas say and hold is compared with it.
pub struct Reference {
    applier: Applier<MemoryEngine>,
    engine: MemoryEngine,
    members: ConfState,
    rows_sum: u64,
    changed: Vec<ModuleId>,
}

impl Reference {
    /// That of a group which member `founder` has founded.
    #[must_use]
    pub fn new(founder: u64, modules: &[Arc<dyn StateModule>]) -> Self {
        let engine = MemoryEngine::new();
        let heads: Arc<dyn StateModule> = Arc::new(HeadsModule);
        let modules = modules.iter().cloned().chain([heads]);
        let applier = Applier::new(
            engine.clone(),
            modules.map(|module| (module.id(), module)).collect(),
        );
        let members = ConfState {
            voters: vec![founder],
            ..ConfState::default()
        };
        Reference {
            applier,
            engine,
            members,
            rows_sum: 0,
            changed: Vec::new(),
        }
    }

    /// Applies one entry. The answer is that of its command; `None` for one that holds none.
    pub fn apply(&mut self, entry: &Entry) -> Option<Result<Vec<u8>, Rejection>> {
        let mut batch = WriteBatch::new();
        let mut members = Members(&mut self.members);
        let run = self
            .applier
            .apply(std::slice::from_ref(entry), &mut members, &mut batch);
        for op in batch.ops() {
            let (WriteOp::Put { key, .. } | WriteOp::Delete { key, .. }) = op else {
                unreachable!("commands write and delete single rows");
            };
            let before = self.engine.get(Column::State, key);
            if let Some(value) = before.expect("memory can be read") {
                self.rows_sum = self.rows_sum.wrapping_sub(row_hash(key, &value));
            }
            if let WriteOp::Put { value, .. } = op {
                self.rows_sum = self.rows_sum.wrapping_add(row_hash(key, value));
            }
        }
        self.engine
            .write(batch, Durability::Synced)
            .expect("this store never fails");
        let modules = run
            .effects
            .into_iter()
            .filter_map(|(_, effect)| match effect {
                Effect::Changed(Subject::Module(module)) => Some(module),
                _ => None,
            });
        self.changed = modules.collect();
        run.outcomes
            .into_iter()
            .next()
            .map(|outcome| outcome.result)
    }

    /// The modules that the last entry changed.
    #[must_use]
    pub fn changed(&self) -> &[ModuleId] {
        &self.changed
    }

    /// What [`rows_sum`] would be of the tables.
    #[must_use]
    pub fn rows_sum(&self) -> u64 {
        self.rows_sum
    }

    /// The tables, for modules' questions.
    #[must_use]
    pub fn reader(&self) -> View {
        TablesReader::new(self.engine.snapshot())
    }

    /// Who votes and who learns.
    #[must_use]
    pub fn members(&self) -> &ConfState {
        &self.members
    }
}

/// A number that tells tables apart: a sum over their rows, so that it can be kept up with each
/// write. It is quick and no protection against malice, unlike `state_hash` of the storage crate.
#[must_use]
pub fn rows_sum<R: Read>(base: &R) -> u64 {
    let mut sum = 0_u64;
    base.visit(Column::State, &[], &mut |key, value| {
        sum = sum.wrapping_add(row_hash(key, value));
        ControlFlow::Continue(())
    })
    .expect("memory can be read");
    sum
}

fn row_hash(key: &[u8], value: &[u8]) -> u64 {
    let mut hash = 0x9e37_79b9_7f4a_7c15 ^ ((key.len() as u64) << 32) ^ value.len() as u64;
    for part in [key, value] {
        for chunk in part.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            hash = (hash ^ u64::from_le_bytes(word))
                .wrapping_mul(0xff51_afd7_ed55_8ccd)
                .rotate_left(29);
        }
    }
    hash ^ (hash >> 32)
}

/// A configuration that is nothing but a list.
struct Members<'a>(&'a mut ConfState);

impl Configuration for Members<'_> {
    fn state(&self) -> ConfState {
        self.0.clone()
    }

    fn change(&mut self, change: &ConfChange) -> Result<(), String> {
        let id = change.node_id;
        let mut next = self.0.clone();
        next.voters.retain(|voter| *voter != id);
        next.learners.retain(|learner| *learner != id);
        match change.get_change_type() {
            ConfChangeType::AddNode => next.voters.push(id),
            ConfChangeType::AddLearnerNode => next.learners.push(id),
            ConfChangeType::RemoveNode => {}
        }
        if next.voters.is_empty() {
            return Err("no voter would be left".to_owned());
        }
        next.voters.sort_unstable();
        next.learners.sort_unstable();
        *self.0 = next;
        Ok(())
    }
}
