//! `mobula models register`: a version that was made elsewhere.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail};
use bytes::Bytes;
use mobula::Cluster;
use mobula_actors::registry::imported_file::{Description, ImportedFile, ModelFormat};
use mobula_actors::registry::provenance::{Code, Parent, Provenance};
use mobula_actors::registry::search::Selector;
use mobula_actors::registry::versions::IMPORTED;
use mobula_actors::registry::{NewVersion, client};
use mobula_actors::serving::encoder::{self, EncoderFiles, EncoderModel};
use mobula_actors::serving::onnx::{ONNX_BYTES_MAX, OnnxModel};
use mobula_actors::serving::signature::Described;
use mobula_actors::storage::open_blobs;
use serde::Deserialize;

use super::{VersionJson, name_of};
use crate::args::{ModelSource, RegisterArguments};
use crate::output::print_json;

/// The largest metadata: what of it is registered has 8 KiB at the most, and names of classes may be many.
const METADATA_BYTES_MAX: u64 = 1 << 20;

/// What is said of a version, by whoever made it. What is not said is not known.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Metadata {
    dataset_blake3: Option<String>,
    code: Option<String>,
    code_blake3: Option<String>,
    environment: BTreeMap<String, String>,
    seed: Option<u64>,
    run_record: Option<String>,
    metrics: BTreeMap<String, f64>,
    training: serde_json::Map<String, serde_json::Value>,
    /// The names of an output's classes, by output.
    labels: BTreeMap<String, Vec<String>>,
}

impl Metadata {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let bytes = read(path, METADATA_BYTES_MAX)?;
        let metadata: Metadata = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is no metadata", path.display()))?;
        if metadata.code.is_some() != metadata.code_blake3.is_some() {
            bail!(
                "{} has one of `code` and `code_blake3`: a program is named by both",
                path.display()
            );
        }
        Ok(metadata)
    }

    fn provenance(&self) -> Provenance {
        let code = self.code.clone().zip(self.code_blake3.clone());
        Provenance {
            sha256: None,
            code: code.map(|(reference, blake3)| Code { reference, blake3 }),
            environment: self.environment.clone(),
            seed: self.seed,
            // Weights that were drawn from a seed began with nothing else.
            parent: self.seed.map(|_| Parent::Seed),
            checkpoint: None,
            run_record: self.run_record.clone(),
        }
    }

    /// Names the classes of outputs.
    fn label(&self, described: &mut Described) -> anyhow::Result<()> {
        for (name, labels) in &self.labels {
            let mut outputs = described.outputs.iter_mut();
            let Some(output) = outputs.find(|output| output.name == *name) else {
                let known: Vec<&str> = described
                    .outputs
                    .iter()
                    .map(|output| output.name.as_str())
                    .collect();
                bail!("labels are for the output {name:?}, the model gives {known:?}");
            };
            output.labels.clone_from(labels);
        }
        Ok(())
    }
}

/// A file of at most so many bytes.
fn read(path: &Path, limit_bytes: u64) -> anyhow::Result<Vec<u8>> {
    let unreadable = || format!("{} cannot be read", path.display());
    let size = std::fs::metadata(path).with_context(unreadable)?.len();
    if size > limit_bytes {
        bail!(
            "{} has {size} bytes, the limit is {limit_bytes}",
            path.display()
        );
    }
    std::fs::read(path).with_context(unreadable)
}

/// A model's files, and what was found in them.
struct Source {
    format: ModelFormat,
    files: BTreeMap<String, Bytes>,
    described: Described,
    /// Rows of a batch, at most, if nobody says otherwise.
    rows: u32,
}

impl Source {
    /// Reads the model that is named, looks it through and tries it.
    fn open(source: &ModelSource) -> anyhow::Result<Self> {
        match (&source.onnx, &source.encoder) {
            (Some(file), None) => Self::onnx(file),
            (None, Some(folder)) => Self::encoder(folder),
            _ => bail!("name the model's files by one of --onnx and --encoder"),
        }
    }

    fn onnx(path: &Path) -> anyhow::Result<Self> {
        let bytes: Bytes = read(path, ONNX_BYTES_MAX)?.into();
        let described = OnnxModel::prepared(bytes.clone(), |model| model.describe());
        let described = described.with_context(|| path.display().to_string())?;
        Ok(Source {
            format: ModelFormat::Onnx,
            files: [(ModelFormat::Onnx.file_name().to_owned(), bytes)].into(),
            rows: described.max_batch_size,
            described,
        })
    }

    fn encoder(folder: &Path) -> anyhow::Result<Self> {
        if !folder.is_dir() {
            bail!(
                "{} is no folder: name the one with {}, {} and {}",
                folder.display(),
                encoder::CONFIG_FILE,
                encoder::WEIGHTS_FILE,
                encoder::TOKENIZER_FILE
            );
        }
        let mut files = BTreeMap::new();
        for (name, limit_bytes) in encoder::FILES {
            let bytes = read(&folder.join(name), limit_bytes)?;
            files.insert(name.to_owned(), Bytes::from(bytes));
        }
        let given = EncoderFiles {
            config: files[encoder::CONFIG_FILE].clone(),
            weights: files[encoder::WEIGHTS_FILE].clone(),
            tokenizer: files[encoder::TOKENIZER_FILE].clone(),
        };
        let described =
            EncoderModel::prepared(&given, |model| Ok((model.describe()?, model.timely_rows())));
        let (described, timely) = described.with_context(|| folder.display().to_string())?;
        Ok(Source {
            format: ModelFormat::Encoder,
            files,
            rows: described.max_batch_size.min(timely),
            described,
        })
    }
}

pub(super) async fn register(
    cluster: &Cluster,
    arguments: RegisterArguments,
) -> anyhow::Result<()> {
    let RegisterArguments {
        model,
        source,
        metadata,
        max_batch,
        store,
        format,
    } = arguments;
    let metadata = metadata.as_deref().map(Metadata::read).transpose()?;
    let metadata = metadata.unwrap_or_default();
    let source = tokio::task::block_in_place(|| Source::open(&source))?;
    let mut described = source.described;
    metadata.label(&mut described)?;
    let max_batch_size = match max_batch {
        Some(asked) => limited(asked, described.max_batch_size)?,
        None => source.rows,
    };
    let weights_blake3 = blake3::hash(&source.files[source.format.file_name()]).to_string();
    let description = Description {
        model_name: model.clone(),
        format: source.format,
        files: BTreeMap::new(),
        inputs: described.inputs,
        outputs: described.outputs,
        max_batch_size,
    };
    let file = ImportedFile::new(description, &source.files);
    let location = crate::checkpoints::location(cluster, &store).await?;
    let stored = file.store(&open_blobs(&location)?).await?;
    let new = NewVersion {
        model: model.clone(),
        digest: String::new(),
        size_bytes: 0,
        weights_blake3,
        dataset_blake3: metadata.dataset_blake3.clone().unwrap_or_default(),
        job: IMPORTED,
        metrics: metadata.metrics.clone(),
        training_json: serde_json::to_string(&metadata.training)?,
    };
    let registered = client::register_imported(cluster, stored, new, metadata.provenance()).await?;
    let selector = Selector::Number(registered.version);
    let view = client::view(cluster, &model, selector).await?;
    if format.json {
        return print_json(&VersionJson::from(&view));
    }
    println!("{} is registered", name_of(&view));
    for (verb, tensors) in [
        ("takes", &file.description.inputs),
        ("gives", &file.description.outputs),
    ] {
        for tensor in tensors {
            println!(
                "  {verb} {} {} {:?}",
                tensor.name, tensor.datatype, tensor.shape
            );
        }
    }
    match file.description.max_batch_size {
        0 => println!("  each request is computed by itself"),
        rows => println!("  up to {rows} rows are computed at once"),
    }
    println!("\nServe it: mobula serve deploy {}", name_of(&view));
    Ok(())
}

/// The rows of a batch that are asked for, if the model takes them.
fn limited(asked: u32, possible: u32) -> anyhow::Result<u32> {
    if asked > possible {
        match possible {
            0 => bail!(
                "--max-batch is {asked}: the first dimension of all inputs and outputs has to be open, and each row's \
                 answer independent of the others; export the model so, or leave the option out"
            ),
            _ => bail!("--max-batch is {asked}, the limit is {possible} rows of this model"),
        }
    }
    if asked == 0 && possible > 0 {
        bail!(
            "--max-batch is 0, and the model has a batch dimension: say 1, and requests are not joined"
        );
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(text: &str) -> anyhow::Result<Metadata> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Metadata::read(file.path())
    }

    #[test]
    fn what_is_not_said_is_not_known() {
        let nothing = metadata("{}").unwrap().provenance();
        assert_eq!(nothing, Provenance::default());
        let said = metadata(r#"{"seed":7,"code":"train 2","code_blake3":"ab"}"#).unwrap();
        let provenance = said.provenance();
        assert_eq!(
            (provenance.seed, provenance.parent),
            (Some(7), Some(Parent::Seed))
        );
        assert_eq!(provenance.code.unwrap().reference, "train 2");
        for (text, expected) in [
            (r#"{"sead":7}"#, "unknown field"),
            (r#"{"code":"train 2"}"#, "named by both"),
            ("[", "no metadata"),
        ] {
            let error = format!("{:#}", metadata(text).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_batch_is_no_larger_than_the_model_takes() {
        assert_eq!(limited(4, 8).unwrap(), 4);
        for (asked, possible, expected) in [
            (9, 8, "the limit is 8"),
            (1, 0, "has to be open"),
            (0, 8, "say 1"),
        ] {
            let error = limited(asked, possible).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
