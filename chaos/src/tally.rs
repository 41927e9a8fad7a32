//! The smallest replicated module that can tell whether a head forgot a command or did one twice: each command
//! is a read, a write and an answer.

use mobula_core::control::{
    Applied, ApplyContext, Caller, ModuleId, Reader, StateModule, Table, Txn,
};
use mobula_core::error::Rejection;

/// Its number, which no module of the product has.
pub const ID: ModuleId = ModuleId(200);
const TABLE: Table = Table { module: ID, tag: 1 };

/// Counts its commands, and answers with how many they are.
#[derive(Debug, Clone, Copy)]
pub struct Tally;

/// How many were applied.
pub fn count(reader: &dyn Reader) -> u64 {
    reader.get(TABLE, b"count").map_or(0, |bytes| {
        u64::from_be_bytes(bytes.try_into().expect("only apply writes here"))
    })
}

impl StateModule for Tally {
    fn id(&self) -> ModuleId {
        ID
    }

    fn name(&self) -> &'static str {
        "tally"
    }

    fn apply(&self, _: &ApplyContext, txn: &mut dyn Txn, _: &[u8]) -> Result<Applied, Rejection> {
        let response = (count(txn) + 1).to_be_bytes().to_vec();
        txn.put(TABLE, b"count", response.clone());
        Ok(Applied {
            response,
            effects: Vec::new(),
        })
    }

    fn query(&self, reader: &dyn Reader, _: u64, _: &[u8]) -> Result<Vec<u8>, Rejection> {
        Ok(count(reader).to_be_bytes().to_vec())
    }

    fn authorize(&self, _: &Caller, _: &[u8]) -> Result<(), Rejection> {
        Ok(())
    }
}
