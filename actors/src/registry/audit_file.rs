//! The registry's log as a file that can be checked without a cluster.
//!
//! The first line says what the log is: how many entries were dropped before the first here, the hashes of
//! what they were, and the root and the end of the chain that follow. Each other line is one entry: its
//! text, its leaf and its place in the chain. All lines are JSON.
//!
//! Invariants:
//! 1. A file that is accepted has the root that it names, and each entry is the one that was hashed.
//! 2. The first thing that is wrong is named, by the number of its entry.
//! 3. Whoever could have written all of the file could have written another: compare the root with one that
//!    was kept elsewhere.

use serde::{Deserialize, Serialize};

use super::events::{EventPage, EventProof, StoredEvent};
use super::hex;
use super::merkle::{self, Frontier, Hash};

/// The format that this code writes.
const FORMAT: &str = "mobula-registry-log/1";

/// The format of a proof.
const PROOF_FORMAT: &str = "mobula-registry-proof/1";

#[derive(Serialize, Deserialize)]
struct Header {
    format: String,
    /// Entries before the first here, whose texts are gone.
    dropped: u64,
    /// Entries up to the last one.
    size: u64,
    /// Peaks of the tree over what was dropped.
    before: Vec<String>,
    /// The chain's hash of the last one that was dropped.
    anchor: String,
    /// The chain's hash of the last one.
    chain: String,
    /// The root of the tree over all entries.
    root: String,
}

#[derive(Serialize, Deserialize)]
struct Line {
    /// The entry's text: JSON within JSON, for its bytes are what was hashed.
    entry: String,
    leaf: String,
    chain: String,
}

#[derive(Serialize, Deserialize)]
struct Proof {
    format: String,
    sequence: u64,
    entry: String,
    leaf: String,
    size: u64,
    root: String,
    path: Vec<String>,
}

/// What was found to be in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Intact {
    /// The first entry's number.
    pub first: u64,
    /// Entries that were checked.
    pub entries: u64,
    /// Entries that the log had then.
    pub size: u64,
    /// The root over all of them, in hex.
    pub root: String,
}

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuditFileError {
    /// Neither a log nor a proof.
    #[error("not a file of `mobula audit export` or `mobula audit prove`: {0}")]
    Format(String),
    /// A line is no entry.
    #[error("entry {sequence} cannot be read ({reason}): it was changed")]
    Unreadable {
        /// Its number.
        sequence: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// An entry is not what was hashed.
    #[error("entry {sequence} was changed: its hash is {found}, and the file says {stated}")]
    Changed {
        /// Its number.
        sequence: u64,
        /// Of its text.
        found: String,
        /// As the file says.
        stated: String,
    },
    /// An entry stands in another one's place.
    #[error("entry {sequence} says that it is entry {said}: it was moved")]
    Moved {
        /// Where it stands.
        sequence: u64,
        /// Its number by its own text, which is hashed.
        said: String,
    },
    /// An entry does not follow the one before.
    #[error(
        "entry {sequence} does not follow the one before it: one of the two was changed, or one is missing"
    )]
    Chain {
        /// Its number.
        sequence: u64,
    },
    /// Entries are missing at the end.
    #[error("the file ends with entry {found}, and should end with {stated}: entries are missing")]
    Short {
        /// The last one that is there.
        found: u64,
        /// As the file says.
        stated: u64,
    },
    /// The tree has another root.
    #[error(
        "the entries have the root {found}, and {stated} was expected: the log was written anew"
    )]
    Root {
        /// Of what is there.
        found: String,
        /// As the file, or whoever asked, says.
        stated: String,
    },
}

/// Writes the log's lines as its pages come.
#[derive(Debug, Default)]
pub struct Exporter {
    text: String,
    next: Option<u64>,
    size: u64,
}

impl Exporter {
    /// Takes the next page; entries that came after the first page are left out, for its root does not
    /// cover them. The number of the next entry that is wanted, `None` after the last.
    pub fn push(&mut self, page: &EventPage) -> Option<u64> {
        if self.next.is_none() {
            let ends = &page.ends;
            let header = Header {
                format: FORMAT.to_owned(),
                dropped: ends.dropped,
                size: ends.size,
                before: page.before.iter().map(|hash| hex::encode(hash)).collect(),
                anchor: hex::encode(&ends.anchor),
                chain: hex::encode(&ends.chain),
                root: hex::encode(&page.root),
            };
            self.line(&header);
            (self.next, self.size) = (Some(ends.dropped + 1), ends.size);
        }
        for event in &page.events {
            if event.sequence <= self.size {
                self.line(&line_of(event));
                self.next = Some(event.sequence + 1);
            }
        }
        self.next.filter(|next| *next <= self.size)
    }

    fn line(&mut self, value: &impl Serialize) {
        self.text += &serde_json::to_string(value).expect("texts and numbers always encode");
        self.text.push('\n');
    }

    /// The file's text.
    #[must_use]
    pub fn finish(self) -> String {
        self.text
    }
}

fn line_of(event: &StoredEvent) -> Line {
    Line {
        entry: event.text.clone(),
        leaf: hex::encode(&event.leaf),
        chain: hex::encode(&event.chain),
    }
}

/// The proof that one entry is in the log, as a file.
#[must_use]
pub fn proof_to_text(proof: &EventProof) -> String {
    let proof = Proof {
        format: PROOF_FORMAT.to_owned(),
        sequence: proof.event.sequence,
        entry: proof.event.text.clone(),
        leaf: hex::encode(&proof.event.leaf),
        size: proof.size,
        root: hex::encode(&proof.root),
        path: proof.path.iter().map(|hash| hex::encode(hash)).collect(),
    };
    serde_json::to_string_pretty(&proof).expect("texts and numbers always encode") + "\n"
}

/// Checks a file of either kind; `root` is one that was kept elsewhere.
pub fn verify(text: &str, root: Option<&str>) -> Result<Intact, AuditFileError> {
    let intact = match serde_json::from_str::<Proof>(text) {
        Ok(proof) if proof.format == PROOF_FORMAT => verify_proof(&proof)?,
        _ => verify_log(text)?,
    };
    match root {
        Some(root) if root != intact.root => Err(AuditFileError::Root {
            found: intact.root,
            stated: root.to_owned(),
        }),
        _ => Ok(intact),
    }
}

fn hash_of(text: &str) -> Result<Hash, AuditFileError> {
    hex::decode_hash(text).ok_or_else(|| {
        let shown: String = text.chars().take(80).collect();
        AuditFileError::Format(format!("`{shown}` is no SHA-256"))
    })
}

/// An entry's leaf, if it is the one that the file says.
fn leaf_of(sequence: u64, entry: &str, stated: &str) -> Result<Hash, AuditFileError> {
    let leaf = merkle::leaf(entry.as_bytes());
    let found = hex::encode(&leaf);
    if found != stated {
        return Err(AuditFileError::Changed {
            sequence,
            found,
            stated: stated.to_owned(),
        });
    }
    Ok(leaf)
}

/// Whether an entry's own text, which is hashed, has this number. A root says nothing of how many entries it is over,
/// and over another number of them a leaf can be in another place.
fn check_number(sequence: u64, entry: &str) -> Result<(), AuditFileError> {
    let text: serde_json::Value =
        serde_json::from_str(entry).map_err(|error| AuditFileError::Unreadable {
            sequence,
            reason: error.to_string(),
        })?;
    match &text["sequence"] {
        said if *said == sequence => Ok(()),
        said => Err(AuditFileError::Moved {
            sequence,
            said: said.to_string(),
        }),
    }
}

fn verify_proof(proof: &Proof) -> Result<Intact, AuditFileError> {
    let leaf = leaf_of(proof.sequence, &proof.entry, &proof.leaf)?;
    let path = proof.path.iter().map(|hash| hash_of(hash));
    let path: Vec<Hash> = path.collect::<Result<_, _>>()?;
    let found = proof
        .sequence
        .checked_sub(1)
        .and_then(|index| merkle::root_of_proof(leaf, index, proof.size, &path))
        .map(|root| hex::encode(&root));
    if found.as_ref() != Some(&proof.root) {
        return Err(AuditFileError::Root {
            found: found.unwrap_or_else(|| "none".to_owned()),
            stated: proof.root.clone(),
        });
    }
    check_number(proof.sequence, &proof.entry)?;
    Ok(Intact {
        first: proof.sequence,
        entries: 1,
        size: proof.size,
        root: proof.root.clone(),
    })
}

fn verify_log(text: &str) -> Result<Intact, AuditFileError> {
    let mut lines = text.lines();
    let header: Header = serde_json::from_str(lines.next().unwrap_or_default())
        .map_err(|error| AuditFileError::Format(error.to_string()))?;
    if header.format != FORMAT {
        let shown: String = header.format.chars().take(80).collect();
        return Err(AuditFileError::Format(format!("it is of format `{shown}`")));
    }
    let before = header.before.iter().map(|hash| hash_of(hash));
    let peaks = before.collect::<Result<Vec<Hash>, _>>()?;
    let mut tree = Frontier::new(header.dropped, peaks)
        .ok_or_else(|| AuditFileError::Format("`before` does not fit `dropped`".to_owned()))?;
    let mut chain = hash_of(&header.anchor)?;
    for text in lines {
        let sequence = tree.size() + 1;
        let line: Line = serde_json::from_str(text).map_err(|error| {
            let reason = error.to_string();
            AuditFileError::Unreadable { sequence, reason }
        })?;
        let leaf = leaf_of(sequence, &line.entry, &line.leaf)?;
        chain = merkle::chained(&chain, &leaf);
        if hex::encode(&chain) != line.chain {
            return Err(AuditFileError::Chain { sequence });
        }
        check_number(sequence, &line.entry)?;
        tree.push(leaf);
    }
    if tree.size() != header.size {
        return Err(AuditFileError::Short {
            found: tree.size(),
            stated: header.size,
        });
    }
    if hex::encode(&chain) != header.chain {
        let sequence = tree.size();
        return Err(AuditFileError::Chain { sequence });
    }
    let root = hex::encode(&tree.root());
    if root != header.root {
        return Err(AuditFileError::Root {
            found: root,
            stated: header.root,
        });
    }
    Ok(Intact {
        first: header.dropped + 1,
        entries: tree.size() - header.dropped,
        size: tree.size(),
        root,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::stages::Stage;
    use crate::registry::state::Query;
    use crate::registry::state::tests::World;

    fn world() -> World {
        let mut world = World::with_versions(2);
        world.promote(1, Stage::Staging).unwrap();
        world.promote(1, Stage::Production).unwrap();
        world.alias("champion", Some(1)).unwrap();
        world
    }

    fn export(world: &World) -> String {
        let mut exporter = Exporter::default();
        let mut from = 0;
        while let Some(next) = exporter.push(&world.ask(&Query::Events { from }).unwrap()) {
            from = next;
        }
        exporter.finish()
    }

    #[test]
    fn a_log_verifies_and_its_root_can_be_kept_elsewhere() {
        let text = export(&world());
        let intact = verify(&text, None).unwrap();
        // Two keys, two versions, two edges, an alias.
        assert_eq!((intact.first, intact.entries, intact.size), (1, 7, 7));
        assert_eq!(verify(&text, Some(&intact.root)).unwrap(), intact);
        let other = verify(&text, Some(&"0".repeat(64))).unwrap_err();
        assert!(matches!(other, AuditFileError::Root { .. }), "{other}");
        let mut empty = World::default();
        empty.tables = Default::default();
        assert_eq!(verify(&export(&empty), None).unwrap().entries, 0);
    }

    #[test]
    fn every_altered_byte_is_found_and_in_an_entry_it_is_named() {
        let text = export(&world());
        let mut line = 0_u64;
        let mut found = 0;
        for at in 0..text.len() {
            line += u64::from(at > 0 && text.as_bytes()[at - 1] == b'\n');
            // Each line's end is one of the places, too.
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            let Ok(altered) = String::from_utf8(bytes) else {
                continue;
            };
            let error = match verify(&altered, None) {
                Ok(intact) => panic!("byte {at} of line {line} was altered: {intact:?}"),
                Err(error) => error,
            };
            let named = match &error {
                AuditFileError::Changed { sequence, .. }
                | AuditFileError::Chain { sequence }
                | AuditFileError::Unreadable { sequence, .. } => Some(*sequence),
                _ => None,
            };
            if line > 0 {
                assert_eq!(named, Some(line), "byte {at}: {error}");
                found += 1;
            }
        }
        assert!(found > 2_000, "{found}");
    }

    #[test]
    fn lines_that_are_missing_or_moved_are_found() {
        let text = export(&world());
        let lines: Vec<&str> = text.lines().collect();
        let joined = |lines: &[&str]| lines.join("\n");
        let mut without = lines.clone();
        without.remove(3);
        let error = verify(&joined(&without), None).unwrap_err();
        assert_eq!(error, AuditFileError::Chain { sequence: 3 });
        let mut moved = lines.clone();
        moved.swap(3, 4);
        let error = verify(&joined(&moved), None).unwrap_err();
        assert_eq!(error, AuditFileError::Chain { sequence: 3 });
        let error = verify(&joined(&lines[..7]), None).unwrap_err();
        let (found, stated) = (6, 7);
        assert_eq!(error, AuditFileError::Short { found, stated });
        for text in ["", "{}", "hello"] {
            let error = verify(text, None).unwrap_err();
            assert!(matches!(error, AuditFileError::Format(_)), "{error}");
        }
    }

    #[test]
    fn one_entry_is_proved_without_the_others() {
        let world = world();
        let root = verify(&export(&world), None).unwrap().root;
        for sequence in 1..=7 {
            let proof: EventProof = world.ask(&Query::Proof { sequence }).unwrap();
            let text = proof_to_text(&proof);
            let intact = verify(&text, Some(&root)).unwrap();
            assert_eq!((intact.first, intact.entries), (sequence, 1));
            let altered = text
                .replace("digits", "digitz")
                .replace("someone", "someonf");
            let error = verify(&altered, None).unwrap_err();
            assert!(matches!(error, AuditFileError::Changed { .. }), "{error}");
            let moved = text.replace(
                &format!("\"sequence\": {sequence}"),
                &format!("\"sequence\": {}", sequence % 7 + 1),
            );
            assert!(verify(&moved, None).is_err(), "{sequence}");
        }
    }

    #[test]
    fn an_entry_is_not_proved_as_one_of_a_smaller_log_with_the_same_root() {
        let mut world = World::with_versions(2);
        world.promote(1, Stage::Staging).unwrap();
        let page: EventPage = world.ask(&Query::Events { from: 0 }).unwrap();
        let last = page.events.last().unwrap().sequence;
        // The last leaf of an odd number of them is the right child of the root, as the second of two is.
        assert_eq!(last % 2, 1, "the log has {last} entries");
        let proof: EventProof = world.ask(&Query::Proof { sequence: last }).unwrap();
        assert_eq!(proof.path.len(), 1);
        let text = proof_to_text(&proof);
        let smaller = text
            .replace(&format!("\"sequence\": {last},"), "\"sequence\": 2,")
            .replace(&format!("\"size\": {last}"), "\"size\": 2");
        assert_ne!(smaller, text);
        let error = verify(&smaller, None).unwrap_err();
        assert!(matches!(error, AuditFileError::Moved { .. }), "{error}");
    }
}
