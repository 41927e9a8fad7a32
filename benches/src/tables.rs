//! The scheduler's tables in memory, changed by its own commands and nothing else.

use mobula_core::control::{ApplyContext, StateModule};
use mobula_scheduler::memory_txn::MemoryTables;
use mobula_scheduler::{Command, Response, Scheduler, placement_pass};

/// A cluster's tables.
#[derive(Debug, Clone, Default)]
pub struct Tables {
    /// Their rows.
    pub rows: MemoryTables,
    /// The log index of their last command, which is the time in milliseconds too.
    index: u64,
}

impl Tables {
    /// Applies a command. There is nothing to undo: a refusal ends the bench.
    pub fn apply(&mut self, command: &Command) -> Response {
        self.index += 1;
        let context = ApplyContext {
            index: self.index,
            term: 1,
            now_ms: self.index,
        };
        let applied = Scheduler
            .apply(&context, &mut self.rows, &command.encode())
            .expect("the commands of a bench are within every limit");
        Response::decode(&applied.response).expect("the scheduler's own answer decodes")
    }

    /// What one pass of placement decides.
    #[must_use]
    pub fn placement_pass(&self) -> Option<Command> {
        placement_pass(&self.rows, self.index)
    }

    /// Passes until everything is placed; how many passes that took.
    pub fn place_all(&mut self) -> usize {
        let mut passes = 0;
        while let Some(command) = self.placement_pass() {
            self.apply(&command);
            passes += 1;
        }
        passes
    }
}
