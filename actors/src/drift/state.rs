//! The replicated module of drift detection: what monitors found (`findings`) and what is done
//! about it ([`super::retraining`]).

use mobula_core::codec;
use mobula_core::control::{
    Applied, ApplyContext, Caller, ModuleId, Reader, StateModule, TableGauge, Txn,
};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::JobId;
use serde::{Deserialize, Serialize};

pub use super::findings::{
    DRIFTED_MAX, DriftEvent, Drifted, MonitorStatus, Report, RetrainSuggestion,
};
pub use super::growth::GrownErrors;
use super::log::LogPolicy;
pub use super::signals::{EndpointVitals, Signal, SignalEvent, Stream, VitalsReport};
use super::{findings, log, retraining, signals};

/// The endpoint is gone: forgets what was found about it, and what was to follow from that.
pub(crate) fn forget(txn: &mut dyn Txn, endpoint: &str) {
    findings::forget(txn, endpoint);
    retraining::state::retire(txn, endpoint);
}

/// The largest command: a report of 64 features with their numbers, or a policy with its job; with room.
const PAYLOAD_BYTES_MAX: usize = 256 * 1024;

/// A change. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// A monitor compared a window. Answer: nothing.
    Report(Report),
    /// A change of a policy or of a retraining. Answer: see there.
    Retraining(Box<retraining::Command>),
    /// A monitor says how well its version does, and what began. Answer: nothing.
    Vitals(Box<VitalsReport>),
    /// Logs the predictions of an endpoint, or no more. Answer: nothing.
    SetLog {
        /// The endpoint.
        endpoint: String,
        /// What is logged of it; nothing if absent.
        policy: Option<Box<LogPolicy>>,
    },
}

/// A question. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Query {
    /// That of one endpoint, or all monitors, by endpoint, a page of them. Answer:
    /// `Vec<MonitorStatus>`, of a list empty after the last.
    Monitors {
        /// Only that one.
        endpoint: Option<String>,
        /// In a list, only those of endpoints with a larger name.
        after: Option<String>,
    },
    /// Events of an endpoint, oldest first. Answer: `Vec<DriftEvent>`.
    Events {
        /// The endpoint.
        endpoint: String,
    },
    /// The policy of an endpoint. Answer: `Option<RetrainPolicy>`.
    Policy {
        /// The endpoint.
        endpoint: String,
    },
    /// The retrainings of an endpoint that are kept, oldest first. Answer: [`retraining::History`].
    Retrainings {
        /// The endpoint.
        endpoint: String,
    },
    /// How well the version of an endpoint does. Answer: `Option<EndpointVitals>`.
    Vitals {
        /// The endpoint.
        endpoint: String,
    },
    /// Signals of an endpoint that are kept, oldest first. Answer: `Vec<SignalEvent>`.
    Signals {
        /// The endpoint.
        endpoint: String,
    },
    /// What is logged of an endpoint's predictions. Answer: `Option<LogPolicy>`.
    Log {
        /// The endpoint.
        endpoint: String,
    },
}

/// The replicated part of drift detection.
#[derive(Debug, Clone, Copy, Default)]
pub struct Drift;

impl StateModule for Drift {
    fn id(&self) -> ModuleId {
        ModuleId::DRIFT
    }

    fn name(&self) -> &'static str {
        "drift"
    }

    fn apply(
        &self,
        context: &ApplyContext,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        match crate::payload::decode(payload, PAYLOAD_BYTES_MAX)? {
            Command::Report(report) => {
                findings::report(context, txn, report)?;
                Ok(Applied::changed(self.id(), Vec::new()))
            }
            Command::Retraining(command) => retraining::apply(context, txn, *command),
            Command::Vitals(report) => {
                signals::report(context, txn, *report)?;
                Ok(Applied::changed(self.id(), Vec::new()))
            }
            Command::SetLog { endpoint, policy } => {
                log::policy::set(txn, &endpoint, policy.map(|policy| *policy))?;
                Ok(Applied::changed(self.id(), Vec::new()))
            }
        }
    }

    fn subject(&self, payload: &[u8], _response: Option<&[u8]>) -> String {
        match crate::payload::decode(payload, PAYLOAD_BYTES_MAX) {
            Ok(Command::Report(report)) => format!("a window of endpoint {}", report.endpoint),
            Ok(Command::Retraining(command)) => command.subject(),
            Ok(Command::SetLog { endpoint, .. }) => format!("the prediction log of {endpoint}"),
            Ok(Command::Vitals(report)) => format!("how endpoint {} does", report.endpoint),
            Err(_) => self.name().to_owned(),
        }
    }

    fn gauges(&self, reader: &dyn Reader) -> Vec<TableGauge> {
        let troubled = signals::troubled(reader);
        let gauge = |name, help, value| TableGauge {
            name,
            help,
            label: None,
            value,
        };
        vec![
            gauge(
                "mobula_drift_endpoints_drifting",
                "Endpoints whose last window of requests differs from what their version was trained on",
                findings::drifting_count(reader),
            ),
            gauge(
                "mobula_drift_endpoints_out_of_distribution",
                "Endpoints whose version was much less sure of its last window of rows than of its reference",
                troubled.unsure,
            ),
            gauge(
                "mobula_drift_sentinel_replicas_wrong",
                "Replicas that answered known rows otherwise than their version does",
                troubled.replicas_wrong,
            ),
            gauge(
                "mobula_drift_endpoints_out_of_distribution_by_energy",
                "Endpoints whose version's logits for its last window of rows had much higher energies than for its \
                 reference",
                troubled.high_energy,
            ),
            gauge(
                "mobula_drift_endpoints_wrong_more_often",
                "Endpoints whose version is wrong more often than it was, as labels say",
                troubled.wrong_more_often,
            ),
            gauge(
                "mobula_drift_slices_drifting",
                "Slices of endpoints' requests whose last window differs from what their version was trained on",
                troubled.slices_drifting,
            ),
        ]
    }

    fn query(
        &self,
        reader: &dyn Reader,
        now_ms: u64,
        payload: &[u8],
    ) -> Result<Vec<u8>, Rejection> {
        Ok(match crate::payload::decode(payload, PAYLOAD_BYTES_MAX)? {
            Query::Monitors {
                endpoint: None,
                after,
            } => codec::encode_plain(&findings::monitors(reader, after.as_deref())),
            Query::Monitors {
                endpoint: Some(endpoint),
                ..
            } => {
                let row = findings::monitor(reader, &endpoint);
                codec::encode_plain(&row.into_iter().collect::<Vec<_>>())
            }
            Query::Events { endpoint } => codec::encode_plain(&findings::events(reader, &endpoint)),
            Query::Policy { endpoint } => {
                codec::encode_plain(&retraining::find_policy(reader, &endpoint)?)
            }
            Query::Retrainings { endpoint } => {
                codec::encode_plain(&retraining::shown(reader, now_ms, &endpoint)?)
            }
            Query::Vitals { endpoint } => codec::encode_plain(&signals::vitals(reader, &endpoint)),
            Query::Signals { endpoint } => {
                codec::encode_plain(&signals::signals(reader, &endpoint))
            }
            Query::Log { endpoint } => codec::encode_plain(&log::policy::find(reader, &endpoint)?),
        })
    }

    fn authorize(&self, caller: &Caller, payload: &[u8]) -> Result<(), Rejection> {
        let command: Command = crate::payload::decode(payload, PAYLOAD_BYTES_MAX)?;
        let why = match (caller, &command) {
            (Caller::Head, _) => return Ok(()),
            (Caller::Host { job, .. }, Command::Report(_) | Command::Vitals(_))
                if *job == JobId::SYSTEM =>
            {
                return Ok(());
            }
            (_, Command::Report(_) | Command::Vitals(_)) => {
                "drift is reported by the platform's monitors"
            }
            (Caller::Client, Command::SetLog { .. }) => return Ok(()),
            (_, Command::SetLog { .. }) => "what is logged is decided with a client token",
            (Caller::Client, Command::Retraining(command)) if command.is_for_clients() => {
                return Ok(());
            }
            (_, Command::Retraining(command)) if command.is_for_clients() => {
                "retraining is decided with a client token"
            }
            (_, Command::Retraining(_)) => "retrainings are driven by the leading head",
        };
        Err(Rejection::new(ErrorCode::PermissionDenied, why))
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
