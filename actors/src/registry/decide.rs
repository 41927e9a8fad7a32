//! A change of a stage on its way from who wants it to who signs it: made from what the registry says,
//! signed here or handed on as a file, and sent.
//!
//! Invariants:
//! 1. Whoever signs has made the statements from the registry's own rows: a file that was handed on is
//!    compared with them before anything of it is signed or sent.
//! 2. Signing adds signatures and changes nothing else.

use serde_json::{Value, json};

use super::envelope::{Demand, Envelope, EnvelopeError, Signature};
use super::keys::{Revocation, Role};
use super::search::{ModelView, VersionView};
use super::signer::{self, SignError, Signer};
use super::stages::{SignedEdge, Stage, StageChange};
use super::statement::{self, Promotion};

/// The format of a file that is handed on.
const FORMAT: &str = "mobula-decision/1";

/// Why a file that was handed on cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecisionError {
    /// Not such a file.
    #[error("not a file of `mobula models promote --save`: {0}")]
    Format(String),
    /// It is about another change, or about what the model was before.
    #[error(
        "the file is about another change: {what} is `{found}` there, and `{expected}` here; if somebody \
         decided something since, begin anew"
    )]
    Other {
        /// What differs.
        what: &'static str,
        /// In the file.
        found: String,
        /// What was asked for.
        expected: String,
    },
}

impl From<EnvelopeError> for DecisionError {
    fn from(error: EnvelopeError) -> Self {
        DecisionError::Format(error.0)
    }
}

/// A change of a stage, with the signatures so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    change: StageChange,
    /// The stage now.
    pub from: Stage,
    /// The version that leaves production by this.
    pub replaces: Option<u64>,
    /// How many different keys are needed.
    pub signatures_needed: u32,
}

fn unsigned(payload: Vec<u8>) -> Envelope {
    Envelope {
        payload,
        signatures: Vec::new(),
    }
}

impl Decision {
    /// The change of `version`'s stage to `to`.
    #[must_use]
    pub fn new(model: &ModelView, version: &VersionView, to: Stage, reason: &str) -> Self {
        let from = version.standing.stage;
        let replaces = model.state.production.filter(|_| to == Stage::Production);
        let edge = Promotion {
            version: &version.version,
            provenance: version.provenance.as_ref(),
            from,
            to,
            replaces,
            revision: model.state.revision,
            reason,
        };
        // Without any provenance the registry refuses the change, and says why.
        let provenance = version
            .provenance
            .as_ref()
            .filter(|_| to == Stage::Production)
            .map(|provenance| unsigned(statement::provenance(&version.version, provenance)));
        Decision {
            change: StageChange {
                model: model.model.clone(),
                version: version.version.version,
                to,
                expected_revision: model.state.revision,
                reason: reason.to_owned(),
                promotion: unsigned(statement::promotion(&edge)),
                provenance,
            },
            from,
            replaces,
            signatures_needed: model.state.policy.signatures,
        }
    }

    /// Adds a key's signature to each statement.
    pub fn sign(&mut self, signer: &dyn Signer) -> Result<(), SignError> {
        signer::sign(signer, &mut self.change.promotion)?;
        if let Some(provenance) = &mut self.change.provenance {
            signer::sign(signer, provenance)?;
        }
        Ok(())
    }

    /// The statements that are signed, for a signer that is elsewhere.
    #[must_use]
    pub fn statements(&self) -> Vec<&[u8]> {
        let envelopes = [
            Some(&self.change.promotion),
            self.change.provenance.as_ref(),
        ];
        let envelopes = envelopes.into_iter().flatten();
        envelopes.map(|envelope| &envelope.payload[..]).collect()
    }

    /// Adds a key's signatures, one of each of [`Decision::statements`] in their order.
    pub fn add_signatures(&mut self, signatures: Vec<Signature>) {
        let envelopes = [
            Some(&mut self.change.promotion),
            self.change.provenance.as_mut(),
        ];
        for (envelope, signature) in envelopes.into_iter().flatten().zip(signatures) {
            envelope.signatures.push(signature);
        }
    }

    /// How often it is signed.
    #[must_use]
    pub fn signatures(&self) -> usize {
        self.change.promotion.signatures.len()
    }

    /// What is sent to the registry.
    #[must_use]
    pub fn into_change(self) -> StageChange {
        self.change
    }

    /// As a file, for whoever signs next.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let change = &self.change;
        json!({
            "format": FORMAT,
            "model": change.model,
            "version": change.version,
            "from": self.from.as_str(),
            "to": change.to.as_str(),
            "revision": change.expected_revision,
            "reason": change.reason,
            "promotion": change.promotion.to_json(),
            "provenance": change.provenance.as_ref().map(Envelope::to_json),
        })
    }

    /// The reason in a file that was handed on, which the same change has to be made with.
    pub fn reason_in(file: &Value) -> Result<&str, DecisionError> {
        if file["format"] != FORMAT {
            return Err(DecisionError::Format("it has another format".to_owned()));
        }
        file["reason"]
            .as_str()
            .ok_or_else(|| DecisionError::Format("it has no reason".to_owned()))
    }

    /// Takes over the signatures of a file that was handed on, if it is about the very same statements.
    pub fn take_over(&mut self, file: &Value) -> Result<(), DecisionError> {
        let expected = self.to_json();
        for what in [
            "format", "model", "version", "from", "to", "revision", "reason",
        ] {
            let shown = |value: &Value| value.to_string().chars().take(80).collect();
            if file[what] != expected[what] {
                return Err(DecisionError::Other {
                    what,
                    found: shown(&file[what]),
                    expected: shown(&expected[what]),
                });
            }
        }
        let take = |into: &mut Envelope, value: &Value| -> Result<(), DecisionError> {
            let found = Envelope::from_json(value)?;
            if found.payload != into.payload {
                return Err(DecisionError::Other {
                    what: "a statement",
                    found: "another text".to_owned(),
                    expected: "what the registry says".to_owned(),
                });
            }
            into.signatures.extend(found.signatures);
            Ok(())
        };
        take(&mut self.change.promotion, &file["promotion"])?;
        if let Some(provenance) = &mut self.change.provenance {
            take(provenance, &file["provenance"])?;
        }
        Ok(())
    }
}

/// One thing that was looked at when a version was verified.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// What was looked at: `stage`, `promotion`, `provenance`.
    pub check: &'static str,
    /// Whether it is in order.
    pub ok: bool,
    /// What was found.
    pub detail: String,
}

impl Finding {
    fn of<E: std::fmt::Display>(check: &'static str, outcome: Result<String, E>) -> Self {
        let (ok, detail) = match outcome {
            Ok(detail) => (true, detail),
            Err(error) => (false, error.to_string()),
        };
        Finding { check, ok, detail }
    }
}

/// Checks what was signed about a version, with the registry's rows but without believing its verdicts:
/// signatures are verified here, and statements compared with what the version is.
#[must_use]
pub fn verify(
    version: &VersionView,
    signed: Option<&SignedEdge>,
    find_key: impl Fn(&str) -> Option<super::keys::KeyRecord>,
) -> Vec<Finding> {
    let Some(edge) = signed else {
        let outcome = match version.standing.stage {
            Stage::Candidate => Ok("candidate: nothing was signed yet".to_owned()),
            stage => Err(format!(
                "{} without a signature: nobody decided that",
                stage.as_str()
            )),
        };
        return vec![Finding::of("stage", outcome)];
    };
    let mut revoked = Vec::new();
    // What was signed before a key was revoked stays signed; it is said, though.
    let mut check = |envelope: &Envelope, demand: Demand<'_>, signed_ms: u64| {
        let revoked_later = std::cell::RefCell::new(Vec::new());
        let find = |id: &str| {
            let mut record = find_key(id)?;
            let later = |revocation: &mut Revocation| revocation.revoked_ms >= signed_ms;
            if record.revoked.take_if(later).is_some() {
                revoked_later.borrow_mut().push(record.id.clone());
            }
            Some(record)
        };
        let signers = envelope.check(demand, find);
        revoked.extend(revoked_later.into_inner());
        signers.map(|signers| format!("signed by {}", signers.join(", ")))
    };
    // The row says how many keys were asked for, and may be what somebody made up: nothing is signed by nobody.
    let demand = Demand {
        what: "promotion",
        statement: &edge.promotion.payload,
        role: role_of(&edge.promotion.payload),
        signatures: edge.signatures.max(1),
    };
    let mut findings = vec![
        Finding::of("stage", says(&edge.promotion.payload, version)),
        Finding::of("promotion", check(&edge.promotion, demand, edge.signed_ms)),
    ];
    match (&edge.provenance, &version.provenance) {
        (Some(signed), Some(provenance)) => {
            let demand = Demand {
                what: "provenance",
                statement: &statement::provenance(&version.version, provenance),
                role: Role::Release,
                signatures: signed.signatures.max(1),
            };
            let outcome = check(&signed.envelope, demand, signed.signed_ms);
            findings.push(Finding::of("provenance", outcome));
        }
        _ if version.standing.stage == Stage::Production => {
            let outcome = Err::<String, _>("in production without signed provenance");
            findings.push(Finding::of("provenance", outcome));
        }
        _ => {}
    }
    revoked.sort();
    revoked.dedup();
    for key in revoked {
        let detail = format!("key {key} was revoked after it had signed");
        findings.push(Finding::of("keys", Ok::<_, String>(detail)));
    }
    findings
}

/// The role that signs the edge which a statement is about: of one that says no stages, the rarer one.
fn role_of(payload: &[u8]) -> Role {
    let statement: Value = serde_json::from_slice(payload).unwrap_or_default();
    let stage = |field: &str| {
        let said = statement["predicate"][field].as_str();
        Stage::ALL
            .into_iter()
            .find(|stage| Some(stage.as_str()) == said)
    };
    match (stage("from"), stage("to")) {
        (Some(from), Some(to)) => from.role_to(to),
        _ => Role::Release,
    }
}

/// Whether a signed statement is about this version and the stage that it has.
fn says(payload: &[u8], version: &VersionView) -> Result<String, String> {
    let statement: Value = serde_json::from_slice(payload).map_err(|error| error.to_string())?;
    let predicate = &statement["predicate"];
    let description = &version.version.description;
    let stage = version.standing.stage;
    let digests = &statement["subject"][0]["digest"];
    let sha256 = version
        .provenance
        .as_ref()
        .and_then(|provenance| provenance.sha256.as_deref());
    let is_about = statement["predicateType"] == statement::PROMOTION_TYPE
        && predicate["model"] == description.model.as_str()
        && predicate["version"] == version.version.version
        && digests["blake3"] == description.digest.as_str()
        && digests["sha256"].as_str() == sha256;
    if !is_about {
        return Err("what was signed is about another version".to_owned());
    }
    // Whoever takes a version's place archives it, with a signature of its own.
    let was_replaced = stage == Stage::Archived && predicate["to"] == Stage::Production.as_str();
    if predicate["to"] == stage.as_str() {
        return Ok(format!("{}, as it was signed", stage.as_str()));
    }
    if was_replaced {
        return Ok("archived, when another version took its place in production".to_owned());
    }
    Err(format!(
        "{} was signed, and it is {}",
        predicate["to"],
        stage.as_str()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::keys;
    use crate::registry::search::Selector;
    use crate::registry::state::tests::World;
    use crate::registry::state::{Command, Query};

    fn seen(world: &World, version: u64) -> (ModelView, VersionView) {
        let model = || "digits".to_owned();
        let selector = Selector::Number(version);
        let view = world.ask(&Query::View {
            model: model(),
            selector,
        });
        let seen = world.ask(&Query::Model { model: model() });
        (seen.unwrap(), view.unwrap())
    }

    fn signed(world: &World, version: u64) -> Option<SignedEdge> {
        let model = "digits".to_owned();
        world.ask(&Query::Signed { model, version }).unwrap()
    }

    fn findings(world: &World, version: u64) -> Vec<Finding> {
        let (_, view) = seen(world, version);
        verify(&view, signed(world, version).as_ref(), |id| {
            keys::find(&world.tables, id)
        })
    }

    #[test]
    fn a_decision_is_handed_from_one_signer_to_the_next_and_counts() {
        let mut world = World::with_versions(1);
        world.promote(1, Stage::Staging).unwrap();
        let (model, version) = seen(&world, 1);
        let mut first = Decision::new(&model, &version, Stage::Production, "good");
        first.sign(&world.keys[0]).unwrap();
        let file = first.to_json();
        assert_eq!(Decision::reason_in(&file).unwrap(), "good");
        let mut second = Decision::new(&model, &version, Stage::Production, "good");
        second.take_over(&file).unwrap();
        second.sign(&world.keys[1]).unwrap();
        assert_eq!(second.signatures(), 2);
        let command = Command::Stage(second.into_change());
        let shown: VersionView = world.apply(&command).unwrap();
        assert_eq!(shown.standing.stage, Stage::Production);
        let found = findings(&world, 1);
        assert!(found.iter().all(|finding| finding.ok), "{found:?}");
        let checks: Vec<&str> = found.iter().map(|finding| finding.check).collect();
        assert_eq!(checks, ["stage", "promotion", "provenance"]);
    }

    #[test]
    fn a_file_about_something_else_is_refused_and_what_differs_is_named() {
        let world = World::with_versions(2);
        let (model, version) = seen(&world, 1);
        let decision = Decision::new(&model, &version, Stage::Staging, "good");
        let file = decision.to_json();
        let refused = |change: &dyn Fn(&mut Value)| {
            let mut other = file.clone();
            change(&mut other);
            decision.clone().take_over(&other).unwrap_err().to_string()
        };
        for what in ["version", "to", "revision", "reason"] {
            let text = refused(&|file| file[what] = "x".into());
            assert!(text.contains(&format!("{what} is `\"x\"` there")), "{text}");
        }
        let text = refused(&|file| file["promotion"]["payload"] = "e30=".into());
        assert!(text.contains("a statement"), "{text}");
        let text = refused(&|file| file["promotion"] = Value::Null);
        assert!(text.contains("not a file of"), "{text}");
        assert!(Decision::reason_in(&json!({})).is_err());
    }

    #[test]
    fn verification_finds_rows_that_nobody_signed() {
        let mut world = World::with_versions(2);
        for version in [1, 2] {
            world.promote(version, Stage::Staging).unwrap();
            world.promote(version, Stage::Production).unwrap();
        }
        // The second took the first one's place.
        assert!(findings(&world, 1).iter().all(|finding| finding.ok));
        let (_, good) = seen(&world, 2);
        let edge = signed(&world, 2).unwrap();
        let find = |id: &str| keys::find(&world.tables, id);
        let bad = |view: &VersionView, edge: &SignedEdge| -> Vec<&'static str> {
            let found = verify(view, Some(edge), find);
            let bad = found.into_iter().filter(|finding| !finding.ok);
            bad.map(|finding| finding.check).collect()
        };
        assert_eq!(bad(&good, &edge), Vec::<&str>::new());
        let mut moved = good.clone();
        moved.standing.stage = Stage::Staging;
        assert_eq!(bad(&moved, &edge), ["stage"]);
        let mut other = good.clone();
        other.version.description.digest = "0".repeat(64);
        assert_eq!(bad(&other, &edge), ["stage", "provenance"]);
        let mut seeded = good.clone();
        seeded.provenance.as_mut().unwrap().seed = Some(8);
        assert_eq!(bad(&seeded, &edge), ["provenance"]);
        let mut forged = edge.clone();
        forged.promotion.signatures[0].bytes[9] ^= 1;
        assert_eq!(bad(&good, &forged), ["promotion"]);
        // Who made up the row would also have made up that nobody had to sign.
        let mut unsigned = edge.clone();
        unsigned.signatures = 0;
        unsigned.promotion.signatures.clear();
        let provenance = unsigned.provenance.as_mut().unwrap();
        provenance.signatures = 0;
        provenance.envelope.signatures.clear();
        assert_eq!(bad(&good, &unsigned), ["promotion", "provenance"]);
        let found = verify(&good, None, find);
        assert!(!found[0].ok, "{found:?}");
    }

    #[test]
    fn a_key_that_is_revoked_later_still_signed_and_that_is_said() {
        let mut world = World::with_versions(1);
        world.promote(1, Stage::Staging).unwrap();
        let id = world.keys[0].public_key().id();
        world.revoke(id.clone());
        let found = findings(&world, 1);
        assert!(found.iter().all(|finding| finding.ok), "{found:?}");
        let last = found.last().unwrap();
        assert!(last.detail.contains("was revoked after"), "{last:?}");
        let (_, view) = seen(&world, 1);
        let mut edge = signed(&world, 1).unwrap();
        edge.signed_ms = u64::MAX;
        let found = verify(&view, Some(&edge), |id| keys::find(&world.tables, id));
        assert!(found.iter().any(|finding| !finding.ok), "{found:?}");
    }

    #[test]
    fn a_version_that_is_replaced_after_its_key_was_revoked_is_signed_still() {
        let mut world = World::with_versions(2);
        for version in [1, 2] {
            world.promote(version, Stage::Staging).unwrap();
        }
        world.promote(1, Stage::Production).unwrap();
        world.revoke(world.keys[0].public_key().id());
        // The other key takes the first version's place: what was signed about that one is as old as it was.
        let change = world.change(2, Stage::Production, &[&world.keys[1]]);
        let _: VersionView = world.apply(&Command::Stage(change)).unwrap();
        let found = findings(&world, 1);
        assert!(found.iter().all(|finding| finding.ok), "{found:?}");
        assert!(found.last().unwrap().detail.contains("was revoked after"));
    }
}
