use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::*;
use crate::registry::signer::PrivateKey;
use crate::registry::signer::tests::key;

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    dir
}

fn model() -> tempfile::TempDir {
    folder(&[("a/b", "x"), ("a.b", "y"), ("c", ""), (".gitignore", "z")])
}

fn check(dir: &Path, text: &str, key: &PublicKey) -> Result<Verified, BundleError> {
    verify(dir, &dir.join(BUNDLE_FILE), text, key)
}

#[test]
fn a_folder_verifies_with_the_key_that_signed_it() {
    let (dir, signer) = (model(), key());
    let text = sign(dir.path(), "digits", &signer).unwrap();
    std::fs::write(dir.path().join(BUNDLE_FILE), &text).unwrap();
    let verified = check(dir.path(), &text, signer.public_key()).unwrap();
    assert_eq!((verified.name.as_str(), verified.files), ("digits", 3));
    // (printf x | sha256sum; printf y | sha256sum; printf '' | sha256sum) | cut -c1-64 | xxd -r -p | sha256sum
    assert_eq!(
        verified.root,
        "35450b36e4f088328b6434558814916d689295083efe26faee142097efc6b0e5"
    );
    let error = check(dir.path(), &text, key().public_key()).unwrap_err();
    assert!(matches!(error, BundleError::OtherKey { .. }), "{error}");
}

#[test]
fn what_model_signing_wrote_is_accepted() {
    // `model_signing sign key m --private_key … --signature m/model.sig` of PyPI's 1.1.1.
    let text = include_str!("testdata/model_signing_1.1.1.sig");
    let key = PublicKey::from_pem(include_str!("testdata/p256.pub")).unwrap();
    let dir = folder(&[("a.txt", "hi\n"), ("d/b", "x\n"), (BUNDLE_FILE, text)]);
    let verified = check(dir.path(), text, &key).unwrap();
    assert_eq!((verified.name.as_str(), verified.files), ("m", 2));
}

#[test]
fn files_that_are_changed_more_or_missing_are_named() {
    let (dir, signer) = (model(), key());
    let text = sign(dir.path(), "digits", &signer).unwrap();
    std::fs::write(dir.path().join("a/b"), "X").unwrap();
    std::fs::write(dir.path().join("new"), "").unwrap();
    std::fs::remove_file(dir.path().join("c")).unwrap();
    let error = check(dir.path(), &text, signer.public_key()).unwrap_err();
    let expected = "`a/b` was changed, `c` is missing, `new` was not signed";
    assert!(error.to_string().ends_with(expected), "{error}");
    std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
    let error = check(dir.path(), &text, signer.public_key()).unwrap_err();
    assert!(matches!(error, BundleError::NotPlain { .. }), "{error}");
}

#[test]
fn a_bundle_that_was_changed_is_refused() {
    let (dir, signer) = (model(), key());
    let text = sign(dir.path(), "digits", &signer).unwrap();
    let bundle: Value = serde_json::from_str(&text).unwrap();
    let payload = bundle["dsseEnvelope"]["payload"].as_str().unwrap();
    let statement = String::from_utf8(STANDARD.decode(payload).unwrap()).unwrap();
    let other = STANDARD.encode(statement.replace("digits", "digitz"));
    let mut forged = bundle.clone();
    forged["dsseEnvelope"]["payload"] = other.into();
    let refused =
        |bundle: &Value| check(dir.path(), &bundle.to_string(), signer.public_key()).unwrap_err();
    assert!(matches!(refused(&forged), BundleError::Forged));
    let mut without = bundle.clone();
    without["dsseEnvelope"]["signatures"] = json!([]);
    assert!(matches!(refused(&without), BundleError::Format(_)));
    let mut older = bundle.clone();
    older["mediaType"] = "application/vnd.dev.sigstore.bundle+json;version=0.1".into();
    assert!(matches!(refused(&older), BundleError::Format(_)));
    assert!(matches!(refused(&json!({})), BundleError::Format(_)));
    // Without a hint, as older bundles are.
    let mut silent = bundle;
    silent["verificationMaterial"]["publicKey"] = json!({});
    check(dir.path(), &silent.to_string(), signer.public_key()).unwrap();
}

#[test]
fn only_keys_that_model_signing_knows_sign_bundles() {
    let dir = model();
    let path = dir.path().join("key");
    let signer = PrivateKey::create(&path, Algorithm::Ed25519).unwrap();
    let error = sign(dir.path(), "digits", &signer).unwrap_err();
    assert!(
        matches!(error, BundleError::Algorithm("ed25519")),
        "{error}"
    );
}
