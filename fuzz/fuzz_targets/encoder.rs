#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mobula_fuzz::run("encoder", bytes));
