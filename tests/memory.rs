//! Memory is flat over epochs: what a step needs is there after the first one.
#![cfg(target_os = "linux")]

use clip_host_tests::host::{command, small_run};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

/// A line of `/proc/PID/status`, in bytes.
fn memory(pid: u32, name: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

/// Epochs that a run has behind it.
fn epochs(run: &Path) -> u64 {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let step = text.lines().rev().find_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        line["step"].as_u64()
    });
    step.unwrap_or(0) / 8
}

#[test]
fn memory_is_flat_over_epochs() {
    let folder = small_run("memory");
    let args = [
        "run",
        "small.ron",
        "--out",
        "run",
        "--set",
        "train.epochs=150",
        "--set",
        "train.log_every=8",
        "--set",
        "train.eval_every=10",
        "--set",
        "data.workers=2",
        "--set",
        "train.threads=2",
        // Every picture stays decoded after the first epoch, so that a cache that grows would be seen.
        "--set",
        "data.cache_bytes=100000000",
    ];
    let mut child = command(&folder, &args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let (pid, run) = (child.id(), folder.join("run"));
    // Epoch, private memory, highest memory so far.
    let mut samples: Vec<(u64, u64, u64)> = Vec::new();
    while child.try_wait().expect("a child").is_none() {
        if let (Some(now), Some(peak)) = (memory(pid, "RssAnon"), memory(pid, "VmHWM")) {
            samples.push((epochs(&run), now, peak));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(child.wait().expect("a child").success());
    // The first evaluation and checkpoint are part of what is needed once.
    let within = |from: u64, to: u64| samples.iter().filter(move |(epoch, ..)| (from..to).contains(epoch));
    let early = within(11, 40).map(|sample| sample.1).max().expect("samples after the first evaluation");
    let late = within(120, u64::MAX).map(|sample| sample.1).max().expect("samples at the end");
    let peak = |from, to| within(from, to).map(|sample| sample.2).max().expect("samples");
    let (early_peak, late_peak) = (peak(11, 40), peak(120, u64::MAX));
    println!("private memory {early} → {late} bytes, peak {early_peak} → {late_peak}, {} samples", samples.len());
    // A page here and there is the allocator's; an epoch that kept a batch or a plan would show 100 times over.
    let bound = |early: u64| early + early / 50 + (1 << 20);
    assert!(late <= bound(early), "private memory grew from {early} to {late} bytes");
    assert!(late_peak <= bound(early_peak), "peak memory grew from {early_peak} to {late_peak} bytes");
}
