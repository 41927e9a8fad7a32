//! A checkpoint as a safetensors file, which other programs read.
//!
//! Layout: the header's length (u64, little-endian), the header (JSON, padded with spaces to a multiple of
//! eight bytes), then each tensor's bytes as they were saved, without gaps. The file's bytes depend on the
//! checkpoint only.

use std::collections::BTreeMap;
use std::io::{self, Write};

use mobula_storage::checkpoint::{Checkpoint, Manifest, Section};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// The key of a checkpoint's metadata that names each tensor's shape, as JSON. Where it is there, sections
/// hold `f32` values; where it is not, bytes.
pub const SHAPES_KEY: &str = "tensor_shapes";

/// The section that is no tensor.
const HEADER_SECTION: &str = "header";

/// A tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tensor {
    /// Its name, as `params.dense.0.weight`.
    pub name: String,
    /// `F32` or `U8`.
    pub dtype: &'static str,
    /// Its shape.
    pub shape: Vec<u64>,
    /// How long it is, in bytes.
    pub size_bytes: u64,
}

/// The tensors that a checkpoint names, in the order of their bytes.
#[must_use]
pub fn tensors(manifest: &Manifest) -> Vec<Tensor> {
    let shapes: Option<BTreeMap<String, Vec<u64>>> = manifest
        .metadata
        .get(SHAPES_KEY)
        .and_then(|text| serde_json::from_str(text).ok());
    sections(manifest)
        .map(|section| {
            let (dtype, value_bytes) = match shapes {
                Some(_) => ("F32", 4),
                None => ("U8", 1),
            };
            let values = section.length / value_bytes;
            let known = shapes.as_ref().and_then(|shapes| shapes.get(&section.name));
            // What does not fit the bytes is not believed.
            let shape = known
                .filter(|shape| {
                    let product = shape.iter().try_fold(1_u64, |p, side| p.checked_mul(*side));
                    product == Some(values)
                })
                .cloned()
                .unwrap_or_else(|| vec![values]);
            Tensor {
                name: section.name.clone(),
                dtype,
                shape,
                size_bytes: section.length,
            }
        })
        .collect()
}

fn sections(manifest: &Manifest) -> impl Iterator<Item = &Section> {
    manifest
        .sections
        .iter()
        .filter(|section| section.name != HEADER_SECTION)
}

/// Writes `checkpoint` as a safetensors file; `notes` go into its metadata beside the checkpoint's own.
pub fn write(
    checkpoint: &Checkpoint,
    notes: &BTreeMap<String, String>,
    output: &mut impl Write,
) -> io::Result<()> {
    let manifest = &checkpoint.handle.manifest;
    let mut header = Map::new();
    let metadata: BTreeMap<&String, &String> = manifest.metadata.iter().chain(notes).collect();
    header.insert("__metadata__".to_owned(), json!(metadata));
    let mut at = 0;
    for tensor in tensors(manifest) {
        let end = at + tensor.size_bytes;
        let entry: Value =
            json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, end]});
        header.insert(tensor.name, entry);
        at = end;
    }
    let mut text = serde_json::to_vec(&header)?;
    text.resize(text.len().next_multiple_of(8), b' ');
    output.write_all(&(text.len() as u64).to_le_bytes())?;
    output.write_all(&text)?;
    for section in sections(manifest) {
        let bytes = checkpoint
            .section(&section.name)
            .expect("the manifest names it");
        output.write_all(&bytes)?;
    }
    output.flush()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mobula_core::{Incarnation, JobId};
    use mobula_storage::blob::{BlobStore, S3Options};
    use mobula_storage::checkpoint::{CheckpointReader, CheckpointWriter, SaveRequest};

    use super::*;
    use crate::training::layout::Layout;
    use crate::training::snapshot::StateSnapshot;
    use crate::training::spec::TrainSpec;
    use crate::training::state::TrainState;
    use crate::training::workload::Workload;

    async fn checkpoint(shapes: Option<&str>) -> (TrainState, Layout, Checkpoint) {
        let spec = TrainSpec::digits_mlp("a");
        let workload = Workload::of(&spec);
        let layout = workload.layout().clone();
        let mut state = TrainState::initial(&workload);
        state.moments[1][3] = 0.5;
        let blobs = BlobStore::open("memory://", &S3Options::default()).unwrap();
        let section = |(name, offset, length)| Section {
            name,
            offset,
            length,
        };
        let metadata = shapes.map(|shapes| (SHAPES_KEY.to_owned(), shapes.to_owned()));
        let request = SaveRequest {
            job: JobId(1),
            step: 2,
            incarnation: Incarnation(1),
            parent: None,
            sections: state.sections(&layout).into_iter().map(section).collect(),
            metadata: metadata.into_iter().collect(),
        };
        let saved = CheckpointWriter::new(blobs.clone())
            .save_from(request, Arc::new(StateSnapshot::of(&state)))
            .await
            .unwrap();
        let loaded = CheckpointReader::new(blobs, 1 << 30)
            .load(&saved.handle.reference)
            .await
            .unwrap();
        (state, layout, loaded)
    }

    /// Reads a file as candle does.
    fn read(bytes: &[u8]) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
        let device = candle_core::Device::Cpu;
        candle_core::safetensors::load_buffer(bytes, &device)
            .unwrap()
            .into_iter()
            .map(|(name, tensor)| {
                let shape = tensor.dims().to_vec();
                let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                (name, (shape, values))
            })
            .collect()
    }

    #[tokio::test]
    async fn others_read_every_tensor_with_its_shape_and_bits() {
        let shapes = r#"{"params.dense.0.weight": [64, 128], "params.dense.0.bias": [7]}"#;
        let (state, layout, checkpoint) = checkpoint(Some(shapes)).await;
        let notes = BTreeMap::from([("step".to_owned(), "2".to_owned())]);
        let mut file = Vec::new();
        write(&checkpoint, &notes, &mut file).unwrap();
        let found = read(&file);
        assert_eq!(found.len(), 3 * layout.slots.len());
        let (shape, values) = &found["params.dense.0.weight"];
        assert_eq!(*shape, [64, 128]);
        let slot = layout
            .slots
            .iter()
            .find(|slot| slot.name == "dense.0.weight")
            .unwrap();
        assert_eq!(*values, state.params[slot.range()]);
        let bias = &found["params.dense.0.bias"].0;
        assert_eq!(*bias, [128], "a shape that does not fit is not believed");
        assert!(found["moments.1.dense.0.bias"].1.contains(&0.5));
    }

    #[tokio::test]
    async fn what_has_no_shapes_is_bytes() {
        let (_, _, checkpoint) = checkpoint(None).await;
        let tensors = tensors(&checkpoint.handle.manifest);
        assert!(
            tensors
                .iter()
                .all(|t| t.dtype == "U8" && t.shape == [t.size_bytes])
        );
    }
}
