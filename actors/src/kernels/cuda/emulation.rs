//! The kernels' own source on a CPU: what `tests` run, against the kernels in Rust, bit for bit.
//!
//! A C++ compiler (which the build of RocksDB needs anyway) makes a library of the `.cu` files and
//! `source/emulation.hpp`. Calls are those that a GPU gets: grids and arguments are tested with the kernels. Each runs
//! with the threads of a block in ascending and in descending order, which a missing barrier would tell apart.
//!
//! What this cannot show is that a GPU rounds like a CPU: that rests on IEEE 754, which CUDA's `_rn` functions promise,
//! and is checked by `cargo xtask gpu-check` where there is one.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use super::call::{Address, Argument, Call, THREADS};
use crate::kernels::test_values::bits;

type Emulate = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    c_uint,
    c_int,
    *const *const c_void,
    *const usize,
    usize,
) -> c_int;

/// The library; it stays loaded as long as the process lives.
fn library() -> &'static libloading::Library {
    static LIBRARY: OnceLock<libloading::Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder for the library");
        let library = folder.path().join("kernels.so");
        // As it is when this runs: another checkout may have built it, as they share what is built.
        let package = std::env::var("CARGO_MANIFEST_DIR").expect("tests are run by cargo");
        let source = Path::new(&package).join("src/kernels/cuda/source");
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        let mut command = Command::new(&compiler);
        command.args(["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]);
        command.args(["-Wall", "-Werror", "-Wno-unknown-pragmas"]);
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("fma") {
            command.arg("-mfma");
        }
        command.arg("-o").arg(&library);
        command.arg(source.join("emulation.cpp"));
        let output = command
            .output()
            .unwrap_or_else(|error| panic!("`{compiler}` compiles the kernels: {error}"));
        let messages = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{messages}");
        // SAFETY: the library has no initialisers but those of its own thread-local values.
        unsafe { libloading::Library::new(&library) }.expect("it was just linked")
    })
}

/// Runs a call; what its addresses point to must be as large as the kernel thinks.
pub(super) fn run(call: &Call, descending: bool) {
    if call.is_empty() {
        return;
    }
    let name = CString::new(call.kernel.name()).expect("a kernel's name has no zero byte");
    let (pointers, sizes): (Vec<*const c_void>, Vec<usize>) = call
        .arguments
        .iter()
        .map(|argument| match argument {
            Argument::Address(Address(value)) | Argument::Count(value) => {
                (std::ptr::from_ref(value).cast(), 8)
            }
            Argument::Wide(value) => (std::ptr::from_ref(value).cast(), 8),
            Argument::Int(value) => (std::ptr::from_ref(value).cast(), 4),
            Argument::Float(value) => (std::ptr::from_ref(value).cast(), 4),
        })
        .unzip();
    // SAFETY: the symbol has this type, and the caller vouches for the addresses.
    let outcome = unsafe {
        let emulate = library().get::<Emulate>(b"emulate\0").unwrap();
        emulate(
            name.as_ptr(),
            call.grid.as_ptr(),
            THREADS,
            c_int::from(descending),
            pointers.as_ptr(),
            sizes.as_ptr(),
            sizes.len(),
        )
    };
    let meaning = match outcome {
        0 => return,
        1 => "its threads came to different barriers",
        2 => "there is no such kernel",
        _ => "it takes other arguments",
    };
    panic!("{call:?}: {meaning}");
}

/// Values between guards that are NaN: what is read beyond shows in the result, what is written beyond in `values`.
pub(super) struct Guarded(Vec<f32>);

const GUARD: usize = 100;

impl Guarded {
    pub(super) fn new(values: &[f32]) -> Self {
        let guard = [f32::NAN; GUARD];
        Self([&guard, values, &guard].concat())
    }

    /// `count` values that all must be written.
    pub(super) fn unwritten(count: usize) -> Self {
        Self::new(&vec![1e30; count])
    }

    pub(super) fn address(&mut self) -> Address {
        Address(self.0[GUARD..].as_mut_ptr() as u64)
    }

    pub(super) fn values(&self) -> &[f32] {
        let end = self.0.len() - GUARD;
        let guards = self.0[..GUARD].iter().chain(&self.0[end..]);
        let untouched = f32::NAN.to_bits();
        assert!(
            guards.into_iter().all(|value| value.to_bits() == untouched),
            "something was written beyond the values"
        );
        &self.0[GUARD..end]
    }
}

/// The bits of values, of which NaN has one only: its sign and payload are not promised.
fn bits_of(values: &[f32]) -> Vec<u32> {
    let canonical = |value: &f32| if value.is_nan() { f32::NAN } else { *value };
    bits(&values.iter().map(canonical).collect::<Vec<f32>>())
}

/// Runs the call in both orders of threads; the result must be `expected` each time.
pub(super) fn check(result_length: usize, expected: &[f32], call: impl Fn(Address) -> Call) {
    check_all(result_length, expected, |result| vec![call(result)]);
}

/// As [`check`], of calls that follow one another and of which the last one completes the result.
pub(super) fn check_all(
    result_length: usize,
    expected: &[f32],
    calls: impl Fn(Address) -> Vec<Call>,
) {
    for descending in [false, true] {
        let mut result = Guarded::unwritten(result_length);
        let calls = calls(result.address());
        for call in &calls {
            run(call, descending);
        }
        let found = result.values();
        let wrong = (0..expected.len())
            .find(|index| bits_of(&found[*index..=*index]) != bits_of(&expected[*index..=*index]));
        if let Some(index) = wrong {
            panic!(
                "{calls:?}, descending {descending}: value {index} is {:e}, not {:e}",
                found[index], expected[index]
            );
        }
        assert_eq!(found.len(), expected.len());
    }
}

/// Whole numbers, as a GPU gets them; what lies beyond them is far too large.
pub(super) struct Numbers(Vec<u32>);

impl Numbers {
    pub(super) fn new(numbers: &[u32]) -> Self {
        Self([numbers, &[u32::MAX; GUARD]].concat())
    }

    pub(super) fn address(&mut self) -> Address {
        Address(self.0.as_mut_ptr() as u64)
    }
}
