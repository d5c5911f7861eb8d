//! A run that is killed again and again ends with the same bits as one that is left alone, on any number of threads.
#![cfg(unix)]

use clip_host_tests::golden::read_tensors;
use clip_host_tests::host::{command, metrics, newest_checkpoint, run, small_run};
use serde_json::{Map, Value};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Metrics that are times: all others must be equal to the last bit.
const TIMES: [&str; 4] = ["train/samples_per_second", "train/data_time", "train/batch_time", "eval/seconds"];

fn timeless(run: &Path) -> Vec<Map<String, Value>> {
    let mut lines = metrics(run);
    for line in &mut lines {
        line.retain(|name, _| !TIMES.contains(&name.as_str()));
    }
    lines
}

/// Numbers that look random and are the same each time (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// The last step that a run has written to its metrics, 0 before there is one. Lines may be half-written while it runs.
fn progress(run: &Path) -> u64 {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let step = |line: &str| serde_json::from_str::<Value>(line).ok()?["step"].as_u64();
    text.lines().rev().find_map(step).unwrap_or(0)
}

#[test]
fn ten_kills_change_no_bit() {
    let folder = small_run("resume");
    // 240 steps: 30 epochs of 8. The log's windows, the checkpoints and the epochs all end at other steps.
    let common = ["--set", "train.epochs=30", "--set", "train.log_every=3", "--set", "train.eval_every=5"];
    run(&folder, &[&["run", "small.ron", "--out", "whole"], &common[..]].concat()).done();

    let killed = folder.join("killed");
    // Other instants than the usual ones can be asked for.
    let seed = std::env::var("CLIP_HOST_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut numbers = Numbers(seed.unwrap_or(2026));
    let mut kills = 0;
    let mut positions = Vec::new();
    while kills < 10 {
        // Other numbers of workers and threads at each start; they must not matter either.
        let (workers, threads) = (format!("data.workers={}", kills % 4), format!("train.threads={}", 1 + kills % 2));
        let args = [
            "run",
            "small.ron",
            "--resume",
            "killed",
            "--checkpoint-every-steps",
            "5",
            "--set",
            &workers,
            "--set",
            &threads,
        ];
        let before = progress(&killed);
        let mut child = command(&folder, &[&args[..], &common[..]].concat())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program can be started");
        // Every third is killed some time after its start, wherever it is then; the others some time after a given step.
        let deadline = Instant::now() + Duration::from_secs(60);
        if kills % 3 != 0 {
            let until = before + 4 + numbers.below(12);
            while progress(&killed) < until {
                assert!(Instant::now() < deadline, "step {until} is not reached; {positions:?}");
                assert!(child.try_wait().expect("a child").is_none(), "the run was over after {kills} kills");
                std::thread::sleep(Duration::from_micros(300));
            }
            std::thread::sleep(Duration::from_micros(numbers.below(4000)));
        } else {
            std::thread::sleep(Duration::from_micros(numbers.below(60_000)));
        }
        assert!(child.try_wait().expect("a child").is_none(), "the run was over after {kills} kills: {positions:?}");
        child.kill().expect("a child can be killed");
        let status = child.wait().expect("a child ends");
        assert_eq!(status.signal(), Some(9), "killed, not ended: {status}");
        kills += 1;
        positions.push(progress(&killed));
    }
    let resumed = run(&folder, &[&["run", "small.ron", "--resume", "killed"], &common[..]].concat()).done();
    println!("killed at steps {positions:?} of 240");
    assert!(resumed.text().contains("resumed at step"), "{}", resumed.text());
    assert!(positions.iter().filter(|&&step| step > 0).count() >= 5, "{positions:?}");

    // Tensors first, for a readable failure; then the files, which hold position and history as well.
    let (whole, again) = (newest_checkpoint(&folder.join("whole")), newest_checkpoint(&killed));
    let (a, b) = (read_tensors(&whole), read_tensors(&again));
    assert_eq!(a.len(), b.len());
    for (name, values) in &a {
        let bits = |values: &[f64]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(values), bits(&b[name]), "{name}");
    }
    for part in ["tau_I", "tau_T", "u_I", "s_T", "exp_avg_sq", "running_mean"] {
        let kept: Vec<&Vec<f64>> = a.iter().filter(|(name, _)| name.contains(part)).map(|(_, values)| values).collect();
        assert!(!kept.is_empty(), "`{part}` is part of a checkpoint");
        let constant = kept.iter().all(|values| values.iter().all(|value| *value == values[0]));
        assert!(!constant, "`{part}` holds each sample's or channel's own values");
    }
    let table = a.iter().find(|(name, _)| name.ends_with("tau_I")).expect("a table of temperatures");
    assert_eq!(table.1.len(), 64, "one for each training pair");
    assert!(std::fs::read(whole).ok() == std::fs::read(again).ok(), "the checkpoints differ beside their tensors");
    assert_eq!(timeless(&folder.join("whole")), timeless(&killed));
}

#[test]
fn any_number_of_workers_and_threads_gives_the_same_bits() {
    let folder = small_run("threads");
    type Bits = (Vec<u8>, Vec<Map<String, Value>>);
    let mut first: Option<Bits> = None;
    for (workers, threads) in [(1, 1), (2, 1), (3, 1), (1, 2), (3, 2), (0, 3)] {
        let out = format!("run-{workers}-{threads}");
        let sets = [
            format!("data.workers={workers}"),
            format!("train.threads={threads}"),
            // Wide enough to be worth sharing out.
            "train.batch_size=32".into(),
            "model.image_encoder.config.channels=(32, 32, 64, 64)".into(),
            "model.text_encoder.config.dim=64".into(),
        ];
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        run(&folder, &["run", "small.ron", "--out", &out].into_iter().chain(sets).collect::<Vec<_>>()).done();
        let path = folder.join(&out);
        let bits: Bits = (std::fs::read(newest_checkpoint(&path)).expect("a checkpoint"), timeless(&path));
        match &first {
            None => first = Some(bits),
            Some(first) => assert!(*first == bits, "{workers} workers and {threads} threads give other bits"),
        }
    }
}

/// Ctrl-C finishes the step, saves it and says how to go on.
#[test]
fn an_interrupt_is_an_orderly_end() {
    let folder = small_run("interrupt");
    let args = ["run", "small.ron", "--out", "run", "--set", "train.epochs=2000", "--set", "train.eval_every=0"];
    let child = command(&folder, &args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let run_dir = folder.join("run");
    let deadline = Instant::now() + Duration::from_secs(60);
    while progress(&run_dir) < 10 {
        assert!(Instant::now() < deadline, "ten steps are not reached");
        std::thread::sleep(Duration::from_millis(1));
    }
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(sent.is_ok_and(|status| status.success()));
    let ended: clip_host_tests::host::Ended = child.wait_with_output().expect("it ends").into();
    assert_eq!(ended.code, Some(130), "{ended:#?}");
    let text = ended.text();
    assert!(text.contains("--resume run"), "{text}");
    // The checkpoint is of the very step that the message names.
    let step = progress(&run_dir);
    let name = newest_checkpoint(&run_dir).file_name().map(|name| name.to_string_lossy().into_owned());
    let stopped: u64 = name.and_then(|name| name.trim_start_matches("step-").split('.').next()?.parse().ok()).unwrap();
    assert!(stopped >= step && text.contains(&format!("step {stopped}")), "{stopped} {step} {text}");
    let more = (stopped + 3).to_string();
    let resumed = run(&folder, &["run", "--resume", "run", "--steps", &more]).done();
    assert!(resumed.text().contains(&format!("resumed at step {stopped}")), "{}", resumed.text());
}
