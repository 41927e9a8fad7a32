//! Members of one process: messages are moved, and a sum that several ask for is shared until it is
//! taken.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::runner::RunnerHandle;
use super::{Collective, Unreachable};
use crate::training::protocol::exchange::{Ask, Contribution, Refusal};
use crate::training::protocol::plan::MemberId;
use crate::training::reduction::Partial;

/// Who is there.
#[derive(Clone, Default)]
pub struct InProcess(Arc<Mutex<BTreeMap<MemberId, RunnerHandle>>>);

impl InProcess {
    /// A new start of a trainer is there; earlier ones are gone.
    pub fn enter(&self, member: MemberId, handle: RunnerHandle) {
        self.leave(member.slot);
        self.0.lock().insert(member, handle);
    }

    /// All starts of a trainer are gone.
    pub fn leave(&self, slot: u32) {
        self.0.lock().retain(|member, _| member.slot != slot);
    }

    fn find(&self, member: MemberId) -> Result<RunnerHandle, Unreachable> {
        let found = self.0.lock().get(&member).cloned();
        found.ok_or_else(|| gone(member))
    }
}

fn gone(member: MemberId) -> Unreachable {
    Unreachable {
        member,
        reason: "it has ended".to_owned(),
    }
}

impl Collective for InProcess {
    async fn contribute(
        &self,
        to: MemberId,
        contribution: Contribution,
    ) -> Result<Result<(), Refusal>, Unreachable> {
        let answer = self.find(to)?.contribute(contribution).await;
        answer.ok_or_else(|| gone(to))
    }

    async fn ask(&self, to: MemberId, ask: Ask) -> Result<Result<Partial, Refusal>, Unreachable> {
        let answer = self.find(to)?.ask(ask).await.ok_or_else(|| gone(to))?;
        Ok(answer.map(Arc::unwrap_or_clone))
    }
}
