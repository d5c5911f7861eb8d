//! The host's side of things, on any machine: the tests that need no kernels, on a stand-in for the driver's library.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Tests of the other modules, which are run once more.
const TESTS: [&str; 8] = [
    "device::properties_are_plausible",
    "device::memory_comes_back_as_it_went",
    "device::addresses_outside_of_memory_are_refused",
    "device::page_locked_copies_overlap_and_are_waited_for",
    "device::captured_copies_are_replayed_and_keep_their_memory",
    "device::a_capture_may_fork_into_the_copy_queue",
    "device::a_capture_that_fails_leaves_the_device_usable",
    "device::several_threads_share_a_device",
];

#[test]
fn the_host_side_works_on_a_stand_in() {
    let folder = env::temp_dir().join(format!("clip_host_cuda_stand_in_{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand_in/libcuda.rs");
    let built = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .args(["--edition", "2024", "--crate-type", "cdylib", "--crate-name", "cuda", "-O", "-o"])
        .arg(folder.join("libcuda.so.1"))
        .arg(&source)
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));

    // Of its own process, because a library is loaded once for each.
    let run = Command::new(env::current_exe().unwrap())
        .args(TESTS)
        .args(["--exact", "--nocapture"])
        .env("CLIP_HOST_CUDA_PATH", &folder)
        .output()
        .unwrap();
    let told = format!("{}{}", String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{told}");
    assert!(told.contains(&format!("{} passed; 0 failed", TESTS.len())), "{told}");
    assert!(told.contains("Stand-in (9, 0)") && !told.contains("SKIPPED"), "{told}");
    fs::remove_dir_all(folder).unwrap();
}
