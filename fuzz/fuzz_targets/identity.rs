#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| target(data));

fn target(data: &[u8]) {
    let (_, run) = replite::fuzz::TARGETS.iter().find(|(name, _)| *name == "identity").expect("a target");
    run(data);
}
