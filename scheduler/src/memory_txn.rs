//! Tables in a `BTreeMap`: what tests, properties and the simulator's model apply commands to.
//!
//! Invariant: a rejected command leaves them as they were, as on a real head.

use std::collections::BTreeMap;
use std::ops::Bound;

use mobula_core::Rejection;
use mobula_core::control::{Applied, ApplyContext, Origin, Reader, Row, StateModule, Table, Txn};

/// Tables in memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryTables {
    rows: BTreeMap<(Table, Vec<u8>), Vec<u8>>,
}

impl MemoryTables {
    /// Applies a command as the head does: all of its writes, or none when it is rejected.
    pub fn apply(
        &mut self,
        module: &dyn StateModule,
        context: &ApplyContext,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        self.apply_from(module, context, None, payload)
    }

    /// The same for a command whose origin is known.
    pub fn apply_from(
        &mut self,
        module: &dyn StateModule,
        context: &ApplyContext,
        origin: Option<&Origin>,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        let mut next = self.clone();
        let applied = module.apply_from(context, origin, &mut next, payload)?;
        *self = next;
        Ok(applied)
    }

    /// How many rows there are, over all tables.
    #[must_use]
    pub fn row_count(&self) -> usize {
        self.rows.len()
    }

    /// How many bytes all rows have together, without their keys.
    #[must_use]
    pub fn value_bytes(&self) -> usize {
        self.rows.values().map(Vec::len).sum()
    }
}

impl Reader for MemoryTables {
    fn get(&self, table: Table, key: &[u8]) -> Option<Vec<u8>> {
        self.rows.get(&(table, key.to_vec())).cloned()
    }

    fn scan(&self, table: Table, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Vec<Row> {
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded((table, after.to_vec())),
            _ => Bound::Included((table, prefix.to_vec())),
        };
        self.rows
            .range((start, Bound::Unbounded))
            .take_while(|((of, key), _)| *of == table && key.starts_with(prefix))
            .take(limit)
            .map(|((_, key), value)| (key.clone(), value.clone()))
            .collect()
    }
}

impl Txn for MemoryTables {
    fn put(&mut self, table: Table, key: &[u8], value: Vec<u8>) {
        self.rows.insert((table, key.to_vec()), value);
    }

    fn delete(&mut self, table: Table, key: &[u8]) {
        self.rows.remove(&(table, key.to_vec()));
    }
}
