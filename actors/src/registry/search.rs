//! Versions as people look for them: by model, stage, tag, data, job and metric, and with what they came
//! from and where they went.

use std::str::FromStr;

use mobula_core::control::Reader;
use mobula_core::error::Rejection;
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::aliases::{self, Alias};
use super::provenance::Provenance;
use super::stages::{self, ModelState, Stage, Standing};
use super::tables::{VERSIONS, model_prefix, version_key, version_of_key};
use super::versions::{ModelVersion, find};
use crate::serving;

/// Versions in one answer: each has 50 KiB at the most (a version 14, its provenance 18, tags 11, names of
/// aliases and endpoints 7), so less than 4 MiB together, which the control API carries.
const PAGE_ROWS: usize = 64;

/// Versions that one question looks at: some milliseconds of a head's time.
const SCAN_ROWS_MAX: usize = 2_048;

/// Versions that are read at once.
const SCAN_ROWS: usize = 256;

/// Conditions of one filter.
const CONDITIONS_MAX: usize = 16;

/// Endpoints that a version is shown with.
const ENDPOINTS_SHOWN_MAX: usize = 32;

/// Which version of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Selector {
    /// The newest.
    Newest,
    /// That of this number.
    Number(u64),
    /// What this alias names.
    Alias(String),
}

/// How a metric is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Comparison {
    /// `<`
    Less,
    /// `<=`
    LessOrEqual,
    /// `=`
    Equal,
    /// `>=`
    GreaterOrEqual,
    /// `>`
    Greater,
}

/// What a metric must be, as `accuracy>=0.9`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricCondition {
    /// The metric.
    pub metric: String,
    /// How it is compared.
    pub comparison: Comparison,
    /// With what.
    pub value: f64,
}

/// Why a text is no condition.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no condition on a metric: write accuracy>=0.9, with <, <=, =, >= or >")]
pub struct ConditionError(String);

impl FromStr for MetricCondition {
    type Err = ConditionError;

    fn from_str(text: &str) -> Result<Self, ConditionError> {
        let signs = [
            ("<=", Comparison::LessOrEqual),
            (">=", Comparison::GreaterOrEqual),
            ("<", Comparison::Less),
            (">", Comparison::Greater),
            ("=", Comparison::Equal),
        ];
        let error = || ConditionError(text.to_owned());
        let found = signs
            .into_iter()
            .find_map(|(sign, comparison)| Some((text.split_once(sign)?, comparison)));
        let ((metric, value), comparison) = found.ok_or_else(error)?;
        let value: f64 = value.trim().parse().map_err(|_| error())?;
        if metric.trim().is_empty() || value.is_nan() {
            return Err(error());
        }
        Ok(MetricCondition {
            metric: metric.trim().to_owned(),
            comparison,
            value,
        })
    }
}

impl MetricCondition {
    /// Whether a version fulfils it; one that was not measured so does not.
    fn holds(&self, version: &ModelVersion) -> bool {
        let Some(measured) = version.description.metrics.get(&self.metric) else {
            return false;
        };
        match self.comparison {
            Comparison::Less => *measured < self.value,
            Comparison::LessOrEqual => *measured <= self.value,
            Comparison::Equal => *measured == self.value,
            Comparison::GreaterOrEqual => *measured >= self.value,
            Comparison::Greater => *measured > self.value,
        }
    }
}

/// Which versions: those that fulfil all that is there.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Filter {
    /// Of this model.
    pub model: Option<String>,
    /// In this stage.
    pub stage: Option<Stage>,
    /// With these tags, each with this value if one is given.
    pub tags: Vec<(String, Option<String>)>,
    /// With these metrics.
    pub metrics: Vec<MetricCondition>,
    /// Trained on this data, by the BLAKE3 of its bytes.
    pub dataset_blake3: Option<String>,
    /// Trained by this job.
    pub job: Option<u64>,
}

impl Filter {
    fn check(&self) -> Result<(), Rejection> {
        let count = self.tags.len() + self.metrics.len();
        if count > CONDITIONS_MAX {
            return Err(Rejection::invalid(format!(
                "{count} conditions on tags and metrics, the limit is {CONDITIONS_MAX}: ask with fewer"
            )));
        }
        Ok(())
    }

    fn holds(&self, reader: &dyn Reader, version: &ModelVersion) -> bool {
        let description = &version.description;
        let is_of = self.job.is_none_or(|job| job == description.job)
            && self
                .dataset_blake3
                .as_ref()
                .is_none_or(|data| *data == description.dataset_blake3)
            && self.metrics.iter().all(|metric| metric.holds(version));
        if !is_of || (self.stage.is_none() && self.tags.is_empty()) {
            return is_of;
        }
        let standing = stages::standing(reader, version);
        let has_tag = |(name, value): &(String, Option<String>)| {
            let found = standing.tags.get(name);
            found.is_some_and(|found| value.as_ref().is_none_or(|value| value == found))
        };
        self.stage.is_none_or(|stage| stage == standing.stage) && self.tags.iter().all(has_tag)
    }
}

/// A version with all that is known of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VersionView {
    /// What it is.
    pub version: ModelVersion,
    /// Where it stands.
    pub standing: Standing,
    /// Where it came from, if that is known.
    pub provenance: Option<Provenance>,
    /// Its names.
    pub aliases: Vec<String>,
    /// The endpoints that serve it, 32 at the most.
    pub endpoints: Vec<String>,
}

/// A page of versions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Page {
    /// The versions; there may be none although others follow.
    pub found: Vec<VersionView>,
    /// Behind which to go on; absent after the last.
    pub next: Option<(String, u64)>,
}

/// A model, without its versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelView {
    /// Its name.
    pub model: String,
    /// Its newest version.
    pub newest: u64,
    /// What was decided about it.
    pub state: ModelState,
    /// Its aliases, by name.
    pub aliases: Vec<(String, Alias)>,
}

/// The version that `selector` means.
pub fn select(
    reader: &dyn Reader,
    model: &str,
    selector: &Selector,
) -> Result<ModelVersion, Rejection> {
    let version = match selector {
        Selector::Newest => None,
        Selector::Number(version) => Some(*version),
        Selector::Alias(alias) => Some(aliases::resolve(reader, model, alias)?),
    };
    find(reader, model, version)
}

/// What else is known of a version.
pub(super) fn view(reader: &dyn Reader, version: ModelVersion) -> VersionView {
    Surroundings::default().view(reader, version)
}

/// A model, without its versions.
pub(super) fn model(reader: &dyn Reader, model: &str) -> Result<ModelView, Rejection> {
    Ok(ModelView {
        model: model.to_owned(),
        newest: find(reader, model, None)?.version,
        state: stages::model_state(reader, model),
        aliases: aliases::of_model(reader, model),
    })
}

/// What many versions share, read once.
#[derive(Default)]
struct Surroundings {
    /// Model and version that each endpoint serves, with the endpoint's name.
    endpoints: Option<Vec<(String, u64, String)>>,
    /// The aliases of one model.
    aliases: Option<(String, Vec<(String, Alias)>)>,
}

impl Surroundings {
    fn view(&mut self, reader: &dyn Reader, version: ModelVersion) -> VersionView {
        let model = &version.description.model;
        let endpoints = self.endpoints.get_or_insert_with(|| {
            let endpoints = serving::state::endpoints(reader).into_iter();
            endpoints
                .map(|endpoint| (endpoint.model, endpoint.version, endpoint.name))
                .collect()
        });
        let serving = endpoints
            .iter()
            .filter(|(of, number, _)| of == model && *number == version.version)
            .map(|(.., name)| name.clone())
            .take(ENDPOINTS_SHOWN_MAX);
        if self.aliases.as_ref().is_none_or(|(of, _)| of != model) {
            self.aliases = Some((model.clone(), aliases::of_model(reader, model)));
        }
        let names = self.aliases.iter().flat_map(|(_, aliases)| aliases);
        VersionView {
            standing: stages::standing(reader, &version),
            provenance: stages::provenance(reader, model, version.version),
            aliases: names
                .filter(|(_, alias)| alias.version == version.version)
                .map(|(name, _)| name.clone())
                .collect(),
            endpoints: serving.collect(),
            version,
        }
    }
}

/// The versions that `filter` lets through, behind `after`, a page of them.
pub(super) fn page(
    reader: &dyn Reader,
    filter: &Filter,
    after: Option<(String, u64)>,
) -> Result<Page, Rejection> {
    filter.check()?;
    let prefix = match &filter.model {
        Some(model) => {
            find(reader, model, None)?;
            model_prefix(model)
        }
        None => Vec::new(),
    };
    let mut surroundings = Surroundings::default();
    let mut found = Vec::new();
    let mut last = after.map(|(model, version)| version_key(&model, version));
    for _ in 0..SCAN_ROWS_MAX / SCAN_ROWS {
        let rows = reader.scan(VERSIONS, &prefix, last.as_deref(), SCAN_ROWS);
        let is_end = rows.len() < SCAN_ROWS;
        for (key, bytes) in rows {
            let version: ModelVersion = row::from_bytes(VERSIONS, &bytes);
            if filter.holds(reader, &version) {
                found.push(surroundings.view(reader, version));
            }
            if found.len() == PAGE_ROWS {
                let next = Some(version_of_key(&key));
                return Ok(Page { found, next });
            }
            last = Some(key);
        }
        if is_end {
            return Ok(Page { found, next: None });
        }
    }
    let next = last.as_deref().map(version_of_key);
    Ok(Page { found, next })
}

#[cfg(test)]
#[path = "search_tests.rs"]
mod tests;
