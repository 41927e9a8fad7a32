//! The control API's messages to and from the types of `mobula-core`. What comes in is checked
//! here, once; an error names the field.

use std::fmt;

use mobula_core::error::Rejection;
use mobula_core::label::Requirement;
use mobula_core::namespace::NamespaceEntry;
use mobula_core::resource::Resources;
use mobula_core::secret::Secret;
use mobula_core::spec::{
    ActorKind, ActorSpec, DEFAULT_MAILBOX_CAPACITY, INIT_LIMIT_BYTES, JobFile, JobSpec,
    PlacementPolicy, Program, RestartPolicy, SpreadKey, Strategy,
};

use crate::control;

impl From<Resources> for control::Resources {
    fn from(resources: Resources) -> Self {
        control::Resources {
            cpu_milli: resources.cpu_milli,
            memory_bytes: resources.memory_bytes,
            gpu_milli: resources.gpu_milli,
            custom_milli: resources.custom.into_iter().collect(),
        }
    }
}

impl From<control::Resources> for Resources {
    fn from(resources: control::Resources) -> Self {
        Resources {
            cpu_milli: resources.cpu_milli,
            memory_bytes: resources.memory_bytes,
            gpu_milli: resources.gpu_milli,
            custom: resources.custom_milli.into_iter().collect(),
        }
    }
}

impl From<PlacementPolicy> for control::Placement {
    fn from(placement: PlacementPolicy) -> Self {
        let (spread_key, spread_strict) = match placement.spread_key {
            Some(SpreadKey { key, strict }) => (Some(key), strict),
            None => (None, false),
        };
        control::Placement {
            selector: placement
                .selector
                .into_iter()
                .map(requirement_message)
                .collect(),
            strategy: match placement.strategy {
                Strategy::Pack => "pack".to_owned(),
                Strategy::Spread => "spread".to_owned(),
            },
            affinity_key: placement.affinity_key,
            spread_key,
            spread_strict,
        }
    }
}

fn requirement_message(requirement: Requirement) -> control::Requirement {
    let (key, operator, values) = match requirement {
        Requirement::In(key, values) => (key, "in", values),
        Requirement::NotIn(key, values) => (key, "not_in", values),
        Requirement::Exists(key) => (key, "exists", Vec::new()),
    };
    control::Requirement {
        key,
        operator: operator.to_owned(),
        values,
    }
}

impl TryFrom<control::Placement> for PlacementPolicy {
    type Error = Rejection;

    fn try_from(placement: control::Placement) -> Result<Self, Rejection> {
        let strategy = match placement.strategy.as_str() {
            "" | "pack" => Strategy::Pack,
            "spread" => Strategy::Spread,
            other => {
                return Err(Rejection::invalid(format!(
                    "placement strategy `{other}` is unknown: use `pack` or `spread`"
                )));
            }
        };
        let selector = placement
            .selector
            .into_iter()
            .map(requirement)
            .collect::<Result<_, _>>()?;
        Ok(PlacementPolicy {
            selector,
            strategy,
            affinity_key: placement.affinity_key,
            spread_key: placement.spread_key.map(|key| SpreadKey {
                key,
                strict: placement.spread_strict,
            }),
        })
    }
}

fn requirement(message: control::Requirement) -> Result<Requirement, Rejection> {
    let control::Requirement {
        key,
        operator,
        values,
    } = message;
    match operator.as_str() {
        "in" => Ok(Requirement::In(key, values)),
        "not_in" => Ok(Requirement::NotIn(key, values)),
        "exists" => Ok(Requirement::Exists(key)),
        other => Err(Rejection::invalid(format!(
            "selector operator `{other}` on label `{key}` is unknown: use `in`, `not_in` or `exists`"
        ))),
    }
}

impl From<RestartPolicy> for control::RestartPolicy {
    fn from(policy: RestartPolicy) -> Self {
        control::RestartPolicy {
            max_restarts: policy.max_restarts,
            backoff_initial_ms: policy.backoff_initial_ms,
            backoff_max_ms: policy.backoff_max_ms,
        }
    }
}

impl From<control::RestartPolicy> for RestartPolicy {
    fn from(policy: control::RestartPolicy) -> Self {
        RestartPolicy {
            max_restarts: policy.max_restarts,
            backoff_initial_ms: policy.backoff_initial_ms,
            backoff_max_ms: policy.backoff_max_ms,
        }
    }
}

impl From<JobSpec> for control::JobSpec {
    fn from(spec: JobSpec) -> Self {
        let (artifact_blake3, artifact_size_bytes) = match spec.program {
            Program::Builtin => (String::new(), 0),
            Program::Artifact { blake3, size_bytes } => (blake3, size_bytes),
        };
        control::JobSpec {
            name: spec.name,
            artifact_blake3,
            artifact_size_bytes,
            args: spec.args,
            env: spec.env.into_iter().collect(),
            resources: Some(spec.resources.into()),
            placement: Some(spec.placement.into()),
            restart: Some(spec.restart.into()),
            idempotency_key: spec.idempotency_key,
            files: spec.files.into_iter().map(Into::into).collect(),
            retry_errors: spec.retry_errors,
            secrets: spec
                .secrets
                .into_iter()
                .map(|(name, secret)| (name, secret.reveal().to_vec()))
                .collect(),
            namespace: spec.namespace.map(|entry| entry.name),
        }
    }
}

impl fmt::Debug for control::JobSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secrets: Vec<&String> = self.secrets.keys().collect();
        f.debug_struct("JobSpec")
            .field("name", &self.name)
            .field("artifact_blake3", &self.artifact_blake3)
            .field("artifact_size_bytes", &self.artifact_size_bytes)
            .field("args", &self.args)
            .field("env", &self.env)
            .field("resources", &self.resources)
            .field("placement", &self.placement)
            .field("restart", &self.restart)
            .field("idempotency_key", &self.idempotency_key)
            .field("files", &self.files)
            .field("retry_errors", &self.retry_errors)
            .field("secrets", &secrets)
            .field("namespace", &self.namespace)
            .finish()
    }
}

impl From<JobFile> for control::JobFile {
    fn from(file: JobFile) -> Self {
        control::JobFile {
            name: file.name,
            blake3: file.blake3,
            size_bytes: file.size_bytes,
        }
    }
}

impl TryFrom<control::JobFile> for JobFile {
    type Error = Rejection;

    fn try_from(file: control::JobFile) -> Result<Self, Rejection> {
        Ok(JobFile {
            name: file.name,
            blake3: checked_digest(file.blake3)?,
            size_bytes: file.size_bytes,
        })
    }
}

impl TryFrom<control::JobSpec> for JobSpec {
    type Error = Rejection;

    fn try_from(spec: control::JobSpec) -> Result<Self, Rejection> {
        if spec.name.is_empty() || spec.name.len() > 128 {
            return Err(Rejection::invalid(format!(
                "job name has {} bytes: give it 1 to 128",
                spec.name.len()
            )));
        }
        let program = if spec.artifact_blake3.is_empty() {
            Program::Builtin
        } else {
            Program::Artifact {
                blake3: checked_digest(spec.artifact_blake3)?,
                size_bytes: spec.artifact_size_bytes,
            }
        };
        Ok(JobSpec {
            name: spec.name,
            program,
            args: spec.args,
            env: spec.env.into_iter().collect(),
            resources: spec.resources.map(Into::into).unwrap_or_default(),
            placement: spec
                .placement
                .map(TryInto::try_into)
                .transpose()?
                .unwrap_or_default(),
            restart: spec.restart.map_or(RestartPolicy::NEVER, Into::into),
            idempotency_key: spec.idempotency_key,
            files: spec
                .files
                .into_iter()
                .map(TryInto::try_into)
                .collect::<Result<_, _>>()?,
            retry_errors: spec.retry_errors,
            secrets: spec
                .secrets
                .into_iter()
                .map(|(name, bytes)| (name, Secret::new(bytes)))
                .collect(),
            // In whose name is for the head to say, never for the request.
            namespace: spec.namespace.map(|name| NamespaceEntry {
                name,
                principal: String::new(),
            }),
        })
    }
}

/// A BLAKE3 digest in lower-case hexadecimal: it becomes part of a path, so nothing else may be.
pub fn checked_digest(text: String) -> Result<String, Rejection> {
    let is_hex = text
        .bytes()
        .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if text.len() == 64 && is_hex {
        return Ok(text);
    }
    Err(Rejection::invalid(format!(
        "`{}` is not a BLAKE3 digest: expected 64 lower-case hexadecimal digits",
        text.chars().take(80).collect::<String>()
    )))
}

impl TryFrom<ActorSpec> for control::ActorSpec {
    type Error = Rejection;

    fn try_from(spec: ActorSpec) -> Result<Self, Rejection> {
        let ActorKind::Actor { type_name } = spec.kind else {
            return Err(Rejection::invalid(
                "a driver cannot be created as an actor: submit a job",
            ));
        };
        Ok(control::ActorSpec {
            type_name,
            name: spec.name,
            init: spec.init,
            resources: Some(spec.resources.into()),
            placement: Some(spec.placement.into()),
            restart: Some(spec.restart.into()),
            isolated: spec.isolated,
            mailbox_capacity: spec.mailbox_capacity,
            detached: spec.detached,
        })
    }
}

impl TryFrom<control::ActorSpec> for ActorSpec {
    type Error = Rejection;

    fn try_from(spec: control::ActorSpec) -> Result<Self, Rejection> {
        if spec.type_name.is_empty() {
            return Err(Rejection::invalid("an actor needs the name of its type"));
        }
        if spec.init.len() > INIT_LIMIT_BYTES {
            return Err(Rejection::invalid(format!(
                "constructor arguments of `{}` have {} bytes, the limit is {INIT_LIMIT_BYTES}: \
                 pass large values in a call",
                spec.type_name,
                spec.init.len()
            )));
        }
        Ok(ActorSpec {
            kind: ActorKind::Actor {
                type_name: spec.type_name,
            },
            name: spec.name.filter(|name| !name.is_empty()),
            init: spec.init,
            resources: spec.resources.map(Into::into).unwrap_or_default(),
            placement: spec
                .placement
                .map(TryInto::try_into)
                .transpose()?
                .unwrap_or_default(),
            restart: spec.restart.map_or(RestartPolicy::NEVER, Into::into),
            isolated: spec.isolated,
            mailbox_capacity: match spec.mailbox_capacity {
                0 => DEFAULT_MAILBOX_CAPACITY,
                capacity => capacity,
            },
            detached: spec.detached,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_spec_survives_the_round_trip() {
        let spec = JobSpec {
            name: "pi".into(),
            program: Program::Artifact {
                blake3: "ab".repeat(32),
                size_bytes: 9,
            },
            args: vec!["100".into()],
            env: [("A".to_owned(), "b".to_owned())].into(),
            resources: Resources::cpu_milli(500),
            placement: PlacementPolicy {
                selector: vec![Requirement::NotIn("zone".into(), vec!["a".into()])],
                strategy: Strategy::Spread,
                affinity_key: None,
                spread_key: Some(SpreadKey {
                    key: "k".into(),
                    strict: true,
                }),
            },
            restart: RestartPolicy::times(3),
            idempotency_key: Some("key".into()),
            files: vec![JobFile {
                name: "data/a.csv".into(),
                blake3: "cd".repeat(32),
                size_bytes: 4,
            }],
            retry_errors: true,
            secrets: [("TOKEN".to_owned(), Secret::new(b"hunter2".to_vec()))].into(),
            namespace: Some(NamespaceEntry {
                name: "shop".into(),
                principal: String::new(),
            }),
        };
        let message = control::JobSpec::from(spec.clone());
        assert_eq!(JobSpec::try_from(message).unwrap(), spec);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut message = control::JobSpec {
            name: "x".into(),
            ..Default::default()
        };
        message.artifact_blake3 = "../../etc/passwd".into();
        let error = JobSpec::try_from(message).unwrap_err();
        assert!(error.message.contains("not a BLAKE3 digest"), "{error}");
        let placement = control::Placement {
            strategy: "best".into(),
            ..Default::default()
        };
        let error = PlacementPolicy::try_from(placement).unwrap_err();
        assert!(error.message.contains("use `pack` or `spread`"), "{error}");
    }
}
