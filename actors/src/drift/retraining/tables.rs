//! Policies and retrainings as replicated tables: their rows, and how they are read and shown.

use mobula_core::control::{ModuleId, Reader, Table};
use mobula_core::error::Rejection;
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::next::waits_for;
use super::plan::{RetrainPolicy, Retraining};
use crate::serving::state::find as find_endpoint;

/// Endpoint → [`RetrainPolicy`].
pub(super) const POLICIES: Table = Table {
    module: ModuleId::DRIFT,
    tag: 3,
};

/// Endpoint → [`Ledger`], of each endpoint that has or had a policy.
pub(super) const LEDGERS: Table = Table {
    module: ModuleId::DRIFT,
    tag: 4,
};

/// Endpoint, 0, number → [`Retraining`].
pub(super) const RETRAININGS: Table = Table {
    module: ModuleId::DRIFT,
    tag: 5,
};

/// Retrainings that are kept of an endpoint, the newest: of some KiB each.
pub const HISTORY_MAX: u64 = 50;

/// What is counted of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Ledger {
    /// The number of the newest retraining; 0 if there was none.
    pub(super) newest: u64,
    /// The drift event of the newest retraining; 0 if there was none.
    pub(super) event: u64,
    /// When jobs were submitted, in milliseconds since the Unix epoch: the latest, as many as a budget may
    /// count.
    pub(super) submissions_ms: Vec<u64>,
    /// Until when no drift event begins a retraining, in milliseconds since the Unix epoch.
    pub(super) quiet_until_ms: u64,
}

/// A retraining with what it waits for now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    /// The retraining.
    pub retraining: Retraining,
    /// In a few words; absent if it is over, or goes on at once.
    pub waits_for: Option<String>,
}

/// The retrainings of an endpoint, and what its policy still allows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Those that are kept, oldest first.
    pub retrainings: Vec<Shown>,
    /// How many jobs the budget allows now; absent without a policy.
    pub jobs_left: Option<u32>,
    /// Until when no drift event begins another one, in milliseconds since the Unix epoch; absent if one may.
    pub quiet_until_ms: Option<u64>,
}

/// The key of a retraining's row.
pub(super) fn key(endpoint: &str, number: u64) -> Vec<u8> {
    [endpoint.as_bytes(), &[0], &number.to_be_bytes()].concat()
}

/// Every endpoint that has or had a policy, with what is counted of it.
pub(super) fn ledgers(reader: &dyn Reader) -> Vec<(String, Ledger)> {
    row::all(reader, LEDGERS, &[])
        .into_iter()
        .map(|(name, ledger)| {
            let name = String::from_utf8(name).expect("an endpoint's name is ASCII");
            (name, ledger)
        })
        .collect()
}

pub(super) fn ledger(reader: &dyn Reader, endpoint: &str) -> Ledger {
    row::get(reader, LEDGERS, endpoint.as_bytes()).unwrap_or_default()
}

/// A retraining of an endpoint.
pub(super) fn find(reader: &dyn Reader, endpoint: &str, number: u64) -> Option<Retraining> {
    row::get(reader, RETRAININGS, &key(endpoint, number))
}

pub(super) fn newest(reader: &dyn Reader, endpoint: &str) -> Option<Retraining> {
    find(reader, endpoint, ledger(reader, endpoint).newest)
}

/// The retrainings of an endpoint that are kept, oldest first.
pub(super) fn history(reader: &dyn Reader, endpoint: &str) -> Vec<Retraining> {
    row::all(reader, RETRAININGS, &[endpoint.as_bytes(), &[0]].concat())
        .into_iter()
        .map(|(_, retraining)| retraining)
        .collect()
}

pub(super) fn find_policy_row(reader: &dyn Reader, endpoint: &str) -> Option<RetrainPolicy> {
    row::get(reader, POLICIES, endpoint.as_bytes())
}

/// The policy of an endpoint, which has to exist.
pub(in crate::drift) fn find_policy(
    reader: &dyn Reader,
    endpoint: &str,
) -> Result<Option<RetrainPolicy>, Rejection> {
    find_endpoint(reader, endpoint)?;
    Ok(find_policy_row(reader, endpoint))
}

/// The retrainings of an endpoint, which has to exist, as they are shown.
pub(in crate::drift) fn shown(
    reader: &dyn Reader,
    now_ms: u64,
    endpoint: &str,
) -> Result<History, Rejection> {
    let policy = find_policy(reader, endpoint)?;
    let ledger = ledger(reader, endpoint);
    let shown = |retraining| Shown {
        waits_for: waits_for(reader, &retraining),
        retraining,
    };
    Ok(History {
        retrainings: history(reader, endpoint).into_iter().map(shown).collect(),
        jobs_left: policy.map(|policy| {
            policy
                .budget
                .jobs
                .saturating_sub(spent(&policy, &ledger, now_ms))
        }),
        quiet_until_ms: Some(ledger.quiet_until_ms).filter(|until| *until > now_ms),
    })
}

/// How many jobs were submitted in the budget's period.
pub(super) fn spent(policy: &RetrainPolicy, ledger: &Ledger, now_ms: u64) -> u32 {
    let from = now_ms.saturating_sub(policy.budget.period_ms);
    let within = ledger.submissions_ms.iter().filter(|at| **at > from);
    u32::try_from(within.count()).unwrap_or(u32::MAX)
}
