//! The fuzz targets' decoders on seeded inputs: random bytes, and damaged ones that were valid. A few
//! seconds of what `fuzz/README.md` does for hours.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

#[path = "../../../../fuzz/src/decoders.rs"]
mod decoders;
#[path = "../../../../fuzz/src/domain_decoders.rs"]
mod domain_decoders;
#[path = "../../../../fuzz/src/head_decoders.rs"]
mod head_decoders;
#[path = "../../../../fuzz/src/replicated.rs"]
mod replicated;
#[path = "../../../../fuzz/src/wire_decoders.rs"]
mod wire_decoders;

use decoders::{DECODERS, Decoder};
use domain_decoders::DOMAIN_DECODERS;
use head_decoders::HEAD_DECODERS;
use wire_decoders::WIRE_DECODERS;

/// Inputs of each decoder.
const INPUTS: usize = 2_000;

/// `MOBULA_TEST_SEED`, or one of its own each time.
fn seed() -> u64 {
    match std::env::var("MOBULA_TEST_SEED") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => rand::random(),
    }
}

fn all() -> impl Iterator<Item = &'static Decoder> {
    let all = DECODERS.iter().chain(WIRE_DECODERS);
    all.chain(DOMAIN_DECODERS).chain(HEAD_DECODERS)
}

/// A valid input with a few bytes changed, cut off or put in; or anything at all.
fn input(random: &mut StdRng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = match seeds.len() {
        0 => Vec::new(),
        count => seeds[random.random_range(0..count)].clone(),
    };
    if bytes.is_empty() || random.random_bool(0.2) {
        bytes = vec![0; random.random_range(0..200)];
        random.fill(bytes.as_mut_slice());
        return bytes;
    }
    for _ in 0..random.random_range(0..5) {
        let at = random.random_range(0..=bytes.len());
        match random.random_range(0..4) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.random()),
            // Lengths and tags are small numbers, or the largest ones.
            2 if at < bytes.len() => bytes[at] = [0, 1, 250, 251, 252, 253, 255][at % 7],
            _ if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
            _ => {}
        }
    }
    bytes
}

#[test]
fn no_input_makes_a_decoder_panic_or_forget_what_it_read() {
    let seed = seed();
    for decoder in all() {
        let mut random = StdRng::seed_from_u64(seed);
        let seeds = (decoder.seeds)();
        for valid in &seeds {
            (decoder.run)(valid);
        }
        for number in 0..INPUTS {
            let bytes = input(&mut random, &seeds);
            if catch_unwind(AssertUnwindSafe(|| (decoder.run)(&bytes))).is_err() {
                panic!(
                    "{} on input {number} of MOBULA_TEST_SEED={seed}: {bytes:?}",
                    decoder.name
                );
            }
        }
    }
}

/// A target that is not listed would never be run.
#[test]
fn every_decoder_has_a_fuzz_target() {
    let fuzz = crate::support::repository("fuzz");
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    let mut targets: Vec<String> = std::fs::read_dir(fuzz.join("fuzz_targets"))
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            path.file_stem().unwrap().to_str().unwrap().to_owned()
        })
        .collect();
    targets.sort();
    let mut names: Vec<&str> = all().map(|decoder| decoder.name).collect();
    names.sort_unstable();
    assert_eq!(targets, names);
    for name in names {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
    }
}
