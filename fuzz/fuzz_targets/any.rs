//! The decoder that has this binary's name.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let name = env!("CARGO_BIN_NAME");
    let (_, run) = replite::fuzz::TARGETS.iter().find(|(target, _)| *target == name).expect("a target");
    run(data);
});
