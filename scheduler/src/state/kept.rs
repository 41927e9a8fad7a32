//! Kept objects: which values a job owns, and under which names. Their bytes are in the object store,
//! where a sweep leaves what [`kept_chunks`] names.
//!
//! A module of its own, so that hosts can write to it as to any other, and a part of this crate, because
//! what a job owns ends with the job.
//!
//! Invariants:
//! 1. A name has one value until it is dropped: the same one again changes nothing, another is refused.
//! 2. Only an open job gets new ones, and all of a job's go when it is over. Until then actors that are
//!    ending read them.
//! 3. A holder whose incarnation is over changes nothing.
//! 4. [`KEPT_TOTALS`] has the sums over [`KEPT`], of each job and of all.

use mobula_core::codec;
use mobula_core::control::{
    Applied, ApplyContext, Caller, ModuleId, Reader, StateModule, Table, Txn,
};
use mobula_core::kept::{
    Holder, KEPT_PAGE_ROWS, KeptCommand, KeptNames, KeptObject, KeptQuery, KeptValue,
};
use mobula_core::mutant::{Mutant, is_planted};
use mobula_core::{ErrorCode, JobId, Rejection};
use serde::{Deserialize, Serialize};

use super::{actor, check_name, job, precondition, stopping};
use crate::authorize::describe;
use crate::limits::{KEPT_JOB_BYTES_MAX, KEPT_JOB_MAX, KEPT_TOTAL_BYTES_MAX, KEPT_TOTAL_MAX};
use crate::row;

const fn table(tag: u8) -> Table {
    Table {
        module: ModuleId::KEPT,
        tag,
    }
}

/// Job id, name → `KeptObject`.
pub(crate) const KEPT: Table = table(1);
/// Job id, or [`ALL_JOBS`] → `Totals`; no row where there is nothing.
pub(crate) const KEPT_TOTALS: Table = table(2);

/// Shorter than any job's key.
pub(crate) const ALL_JOBS: &[u8] = b"all";

/// How much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Totals {
    pub(crate) objects: u64,
    pub(crate) bytes: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, value: &KeptValue) {
        self.objects += 1;
        self.bytes += value.size_bytes;
    }

    fn subtract(&mut self, other: Totals) {
        const COUNTED: &str = "what goes was counted when it came";
        self.objects = self.objects.checked_sub(other.objects).expect(COUNTED);
        self.bytes = self.bytes.checked_sub(other.bytes).expect(COUNTED);
    }

    /// Refuses what would be too much; `whose` says of what.
    fn check(&self, objects_max: u64, bytes_max: u64, whose: &str) -> Result<(), Rejection> {
        let Totals { objects, bytes } = *self;
        if objects <= objects_max && bytes <= bytes_max {
            return Ok(());
        }
        Err(Rejection::new(
            ErrorCode::Overloaded,
            format!(
                "{whose} would keep {objects} objects of {bytes} bytes, the limits are {objects_max} \
                 and {bytes_max}: drop what is needed no more"
            ),
        ))
    }

    fn store(self, txn: &mut dyn Txn, key: &[u8]) {
        match self.objects {
            0 => txn.delete(KEPT_TOTALS, key),
            _ => row::put(txn, KEPT_TOTALS, key, &self),
        }
    }
}

fn totals(reader: &dyn Reader, key: &[u8]) -> Totals {
    row::get(reader, KEPT_TOTALS, key).unwrap_or_default()
}

fn key(job: JobId, name: &str) -> Vec<u8> {
    [&job.to_key(), name.as_bytes()].concat()
}

/// Kept objects' part of the replicated state, to be plugged into the head.
#[derive(Debug, Clone, Copy, Default)]
pub struct KeptObjects;

impl StateModule for KeptObjects {
    fn id(&self) -> ModuleId {
        ModuleId::KEPT
    }

    fn name(&self) -> &'static str {
        "kept"
    }

    fn apply(
        &self,
        context: &ApplyContext,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        let command = KeptCommand::decode(payload)?;
        let (job, holder, _) = command.about();
        check_holder(txn, job, holder)?;
        let response = match command {
            KeptCommand::Keep {
                job, name, value, ..
            } => {
                let kept_ms = context.now_ms;
                let object = KeptObject {
                    name,
                    value,
                    kept_ms,
                };
                keep(txn, job, object)?;
                Vec::new()
            }
            KeptCommand::Drop { job, name, .. } => {
                check_name("the name of what is kept", &name)?;
                codec::encode_plain(&drop_named(txn, job, &name))
            }
        };
        Ok(Applied::changed(ModuleId::KEPT, response))
    }

    fn subject(&self, payload: &[u8], _response: Option<&[u8]>) -> String {
        match KeptCommand::decode(payload) {
            Ok(command) => {
                let (job, _, name) = command.about();
                format!("`{name}` of {job}")
            }
            Err(_) => self.name().to_owned(),
        }
    }

    fn query(&self, reader: &dyn Reader, _: u64, payload: &[u8]) -> Result<Vec<u8>, Rejection> {
        let KeptQuery { job, which } = KeptQuery::decode(payload)?;
        job::require(reader, job)?;
        let found = match which {
            KeptNames::One(name) => Vec::from_iter(row::get(reader, KEPT, &key(job, &name))),
            KeptNames::After(name) => page(reader, job, &name),
        };
        Ok(codec::encode_plain::<Vec<KeptObject>>(&found))
    }

    fn authorize(&self, caller: &Caller, payload: &[u8]) -> Result<(), Rejection> {
        let command = KeptCommand::decode(payload)?;
        let (job, holder, name) = command.about();
        let next_step = match caller {
            Caller::Head => return Ok(()),
            Caller::Host { job: own, .. } if *own != job => {
                "a process keeps and drops for its own job only"
            }
            Caller::Host { .. } if holder.is_none() => {
                "do it by the cluster in an actor's or a task's context, so that it is fenced"
            }
            Caller::Client if matches!(command, KeptCommand::Keep { .. }) => {
                "only the job's own processes have values to keep"
            }
            Caller::Host { .. } | Caller::Client => return Ok(()),
            Caller::Node(_) => "only the job's own processes and clients do",
        };
        Err(Rejection::new(
            ErrorCode::PermissionDenied,
            format!(
                "{} may not change what {job} keeps, `{name}`: {next_step}",
                describe(caller)
            ),
        ))
    }

    fn authorize_query(&self, caller: &Caller, payload: &[u8]) -> Result<(), Rejection> {
        let KeptQuery { job, .. } = KeptQuery::decode(payload)?;
        match caller {
            Caller::Host { job: own, .. } if *own != job => Err(Rejection::new(
                ErrorCode::PermissionDenied,
                format!(
                    "a process of {own} may not read what {job} keeps: have a process of {job} pass \
                     the value"
                ),
            )),
            _ => Ok(()),
        }
    }
}

fn check_holder(reader: &dyn Reader, job: JobId, holder: Option<Holder>) -> Result<(), Rejection> {
    let Some((id, incarnation)) = holder else {
        return Ok(());
    };
    let actor = actor::require(reader, id)?;
    stopping::check_job(&actor, job)?;
    if is_planted(Mutant::StaleHolderKeeps) {
        return Ok(());
    }
    stopping::check_incarnation(&actor, incarnation)
}

fn keep(txn: &mut dyn Txn, job: JobId, object: KeptObject) -> Result<(), Rejection> {
    let name = &object.name;
    check_name("the name of an object to keep", name)?;
    let checked = object.value.check();
    checked.map_err(|why| Rejection::invalid(format!("`{name}` cannot be kept: {why}")))?;
    if !job::require(txn, job)?.state.is_open() {
        return Err(precondition(format!(
            "{job} is ending, and what it keeps goes with it: keep `{name}` before its outcome is \
             known, or store what is to outlive the job as its result or a checkpoint"
        )));
    }
    let key = key(job, name);
    if let Some(known) = row::get::<KeptObject>(txn, KEPT, &key)
        && !is_planted(Mutant::KeptReplaced)
    {
        if known.value == object.value {
            return Ok(());
        }
        return Err(Rejection::new(
            ErrorCode::AlreadyExists,
            format!(
                "{job} keeps another value of {} bytes as `{name}`, and objects do not change: drop \
                 that one first, or choose another name",
                known.value.size_bytes
            ),
        ));
    }
    let mut of_job = totals(txn, &job.to_key());
    let mut of_all = totals(txn, ALL_JOBS);
    of_job.add(&object.value);
    of_all.add(&object.value);
    of_job.check(KEPT_JOB_MAX, KEPT_JOB_BYTES_MAX, &job.to_string())?;
    of_all.check(KEPT_TOTAL_MAX, KEPT_TOTAL_BYTES_MAX, "all jobs together")?;
    of_job.store(txn, &job.to_key());
    of_all.store(txn, ALL_JOBS);
    row::put(txn, KEPT, &key, &object);
    Ok(())
}

fn drop_named(txn: &mut dyn Txn, job: JobId, name: &str) -> bool {
    let key = key(job, name);
    let Some(known) = row::get::<KeptObject>(txn, KEPT, &key) else {
        return false;
    };
    let mut gone = Totals::default();
    gone.add(&known.value);
    for key in [&job.to_key()[..], ALL_JOBS] {
        let mut left = totals(txn, key);
        left.subtract(gone);
        left.store(txn, key);
    }
    txn.delete(KEPT, &key);
    true
}

/// A job is over: it keeps nothing any more. Answers whether it did.
pub(super) fn forget(txn: &mut dyn Txn, job: JobId) -> bool {
    let gone = totals(txn, &job.to_key());
    if gone == Totals::default() || is_planted(Mutant::KeptOutlivesJob) {
        return false;
    }
    let keys: Vec<Vec<u8>> = row::scan(txn, KEPT, &job.to_key())
        .map(|(key, _)| key)
        .collect();
    for key in keys {
        txn.delete(KEPT, &key);
    }
    txn.delete(KEPT_TOTALS, &job.to_key());
    let mut left = totals(txn, ALL_JOBS);
    left.subtract(gone);
    left.store(txn, ALL_JOBS);
    true
}

fn page(reader: &dyn Reader, job: JobId, after: &str) -> Vec<KeptObject> {
    let rows = reader.scan(KEPT, &job.to_key(), Some(&key(job, after)), KEPT_PAGE_ROWS);
    rows.iter()
        .map(|(_, value)| row::from_bytes(KEPT, value))
        .collect()
}

/// The chunks of all kept objects, by their BLAKE3 digests: what a sweep of the object store leaves.
pub fn kept_chunks(reader: &dyn Reader) -> impl Iterator<Item = [u8; 32]> + '_ {
    row::scan(reader, KEPT, &[]).flat_map(|(_, row)| {
        let object: KeptObject = row::from_bytes(KEPT, &row);
        object.value.chunks
    })
}
