//! The decoders of what the domain modules read and the object store keeps: as
//! [`decoders`](super::decoders), for builds with the actors.

#![allow(
    unreachable_pub,
    reason = "a test of the workspace includes this file as a private module"
)]

use mobula_actors::serving::oip;

use super::decoders::{Decoder, no_seeds};

/// All of them.
pub const DOMAIN_DECODERS: &[Decoder] = &[
    Decoder {
        name: "modules",
        run: super::replicated::run,
        seeds: super::replicated::seeds,
    },
    Decoder {
        name: "manifest",
        run: manifest,
        seeds: no_seeds,
    },
    Decoder {
        name: "job_toml",
        run: job_toml,
        seeds: job_toml_seeds,
    },
    Decoder {
        name: "version_file",
        run: version_file,
        seeds: version_file_seeds,
    },
    Decoder {
        name: "encoder",
        run: encoder,
        seeds: encoder_seeds,
    },
    Decoder {
        name: "oip_json",
        run: oip_json,
        seeds: oip_json_seeds,
    },
    Decoder {
        name: "oip_binary",
        run: oip_binary,
        seeds: oip_binary_seeds,
    },
    Decoder {
        name: "drift_labels",
        run: drift_labels,
        seeds: drift_labels_seeds,
    },
    Decoder {
        name: "registry_files",
        run: registry_files,
        seeds: registry_files_seeds,
    },
];

/// What people hand to each other about models: signatures, decisions, logs, keys, conditions,
/// policies.
fn registry_files(bytes: &[u8]) {
    use mobula_actors::registry::decide::Decision;
    use mobula_actors::registry::envelope::Envelope;
    use mobula_actors::registry::keys::PublicKey;
    use mobula_actors::registry::policy::engine;
    use mobula_actors::registry::search::MetricCondition;
    use mobula_actors::registry::{audit_file, bundle};
    use std::path::Path;

    if let Ok(key) = PublicKey::from_spki(bytes) {
        assert_eq!(PublicKey::from_pem(&key.to_pem()), Ok(key.clone()));
        let _ = key.verifies(b"message", bytes);
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let _ = PublicKey::from_pem(text);
    let _ = audit_file::verify(text, None);
    let _ = text.parse::<MetricCondition>();
    let _ = engine::check(text);
    if let Ok(value) = serde_json::from_str(text) {
        let _ = Decision::reason_in(&value);
        if let Ok(envelope) = Envelope::from_json(&value) {
            assert_eq!(Envelope::from_json(&envelope.to_json()), Ok(envelope));
        }
    }
    let key = include_str!("../../actors/src/registry/testdata/p256.pub");
    let key = PublicKey::from_pem(key).expect("a test of the registry reads it");
    let nowhere = Path::new("/nonexistent");
    // A genuine one is refused for want of its folder.
    assert!(bundle::verify(nowhere, nowhere, text, &key).is_err());
}

fn registry_files_seeds() -> Vec<Vec<u8>> {
    let files = [
        include_str!("../../actors/src/registry/testdata/model_signing_1.1.1.sig"),
        include_str!("../../actors/src/registry/testdata/p256.pub"),
        r#"{"payload":"e30=","payloadType":"application/vnd.in-toto+json","signatures":[{"keyid":"a","sig":"AAAA"}]}"#,
        r#"{"format":"mobula-registry-log/1","dropped":0,"size":0,"before":[],"anchor":"0","chain":"0","root":"0"}"#,
        "accuracy>=0.9",
        r#"@id("a") forbid (principal, action, resource) when { resource.labels.contains("pii") };"#,
    ];
    files.map(Vec::from).to_vec()
}

fn manifest(bytes: &[u8]) {
    use mobula_storage::checkpoint::{Manifest, ManifestName};
    let _ = Manifest::from_bytes(bytes);
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Some(name) = ManifestName::parse(text)
    {
        assert!(ManifestName::parse(&name.path()).is_some());
    }
}

fn job_toml(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = mobula_actors::training::spec::TrainSpec::from_toml(text, "job.toml");
    }
}

fn job_toml_seeds() -> Vec<Vec<u8>> {
    let text = "name = \"a\"\nseed = 7\nsteps = 80\ncheckpoint_every_steps = 40\n\
                workers = { min = 1, max = 2 }\n[model.mlp]\nhidden = [64]\n";
    vec![text.into()]
}

/// The files of a small encoder, in the order of their names.
const ENCODER_FILES: [&[u8]; 3] = [
    include_bytes!("../../actors/src/serving/encoder/golden/classifier/config.json"),
    include_bytes!("../../actors/src/serving/encoder/golden/classifier/model.safetensors"),
    include_bytes!("../../actors/src/serving/encoder/golden/classifier/tokenizer.json"),
];

/// Each of the files, after the number of it.
fn encoder_seeds() -> Vec<Vec<u8>> {
    let files = (0u8..).zip(ENCODER_FILES);
    files
        .map(|(number, file)| [&[number], file].concat())
        .collect()
}

/// One file of an encoder, among good ones: what is taken answers, or says why not.
fn encoder(bytes: &[u8]) {
    use mobula_actors::serving::encoder::{EncoderFiles, EncoderModel};
    let Some((number, bytes)) = bytes.split_first() else {
        return;
    };
    let mut files = ENCODER_FILES.map(bytes::Bytes::from_static);
    files[usize::from(*number) % files.len()] = bytes::Bytes::copy_from_slice(bytes);
    let [config, weights, tokenizer] = files;
    let model = EncoderModel::load(&EncoderFiles {
        config,
        weights,
        tokenizer,
    });
    let Ok(described) = model.and_then(|model| model.describe()) else {
        return;
    };
    assert_eq!(described.inputs.len(), 1);
}

fn version_file_seeds() -> Vec<Vec<u8>> {
    use mobula_actors::registry::imported_file::{Description, ImportedFile, ModelFormat};
    let description = Description {
        model_name: "a".into(),
        format: ModelFormat::Onnx,
        files: Default::default(),
        inputs: Vec::new(),
        outputs: Vec::new(),
        max_batch_size: 8,
    };
    let file = ("model.onnx".to_owned(), bytes::Bytes::from_static(b"abc"));
    vec![ImportedFile::new(description, &[file].into()).to_bytes()]
}

fn version_file(bytes: &[u8]) {
    let _ = mobula_actors::registry::version_file::VersionFile::from_bytes(bytes);
    let artifact = bytes::Bytes::copy_from_slice(bytes);
    let artifact = mobula_actors::registry::artifact::Artifact::from_bytes(&artifact);
    if let Ok(mobula_actors::registry::artifact::Artifact::Imported(file)) = artifact {
        // Every file that it says it has is there.
        for name in file.description.files.keys() {
            assert!(file.file(name).is_some(), "{name}");
        }
    }
    let csv = mobula_actors::training::data::csv::CsvSpec {
        files: Vec::new(),
        header: false,
        shape: None,
        classes: None,
        targets: None,
        scale: None,
    };
    let _ = mobula_actors::training::data::Dataset::from_csv("fuzz.csv", bytes, &csv);
}

fn oip_json(bytes: &[u8]) {
    if let Ok(request) = oip::decode_request(bytes, None)
        // BF16 has no JSON form.
        && let Ok(body) = oip::encode_request(&request, false)
    {
        assert!(oip::decode_request(&body.bytes, body.json_length).is_ok());
    }
    let _ = oip::decode_response(bytes, None);
}

fn oip_json_seeds() -> Vec<Vec<u8>> {
    let text = r#"{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1.0,2.0]}]}"#;
    vec![text.into()]
}

/// The first two bytes are the length of the JSON part, which a header gives.
fn oip_binary(bytes: &[u8]) {
    let Some((length, body)) = bytes.split_first_chunk::<2>() else {
        return;
    };
    let json_length = Some(usize::from(u16::from_le_bytes(*length)));
    if let Ok(request) = oip::decode_request(body, json_length) {
        let written =
            oip::encode_request(&request, true).expect("what was accepted can be written");
        assert!(oip::decode_request(&written.bytes, written.json_length).is_ok());
    }
    let _ = oip::decode_response(body, json_length);
}

fn oip_binary_seeds() -> Vec<Vec<u8>> {
    let json = r#"{"inputs":[{"name":"x","shape":[2],"datatype":"INT32","parameters":{"binary_data_size":8}}]}"#;
    let length = u16::try_from(json.len())
        .expect("it is short")
        .to_le_bytes();
    vec![[&length, json.as_bytes(), &[1, 0, 0, 0, 2, 0, 0, 0]].concat()]
}

/// The truth about earlier requests, as clients report it.
fn drift_labels(bytes: &[u8]) {
    if let Ok(labels) = mobula_actors::drift::labels::parse(bytes) {
        assert!(!labels.is_empty());
    }
}

fn drift_labels_seeds() -> Vec<Vec<u8>> {
    let text = "{\"id\": \"a\", \"class\": 3}\n{\"id\": \"b\", \"row\": 2, \"label\": \"seven\"}\n";
    vec![text.into()]
}
