//! `plugins check`: every first-party plugin passes, and every planted defect is found by the check that is there for it.

use clip_host_tests::fixtures::{defect, first_party_library, first_party_plugins, library, root};
use clip_host_tests::host::{SMALL_ENCODERS, program, run};
use serde_json::Value;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Does `f` for all, as many at a time as there are cores.
fn each<T: Sync>(all: &[T], f: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some(one) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    f(one);
                }
            });
        }
    });
}

/// Runs the checks; the exit code must fit what they found.
fn check(file: &Path, more: &[&str]) -> Value {
    let file = file.to_string_lossy();
    let ended = run(&root(), &[&["plugins", "check", &file, "--json"], more].concat());
    let report: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:#?}"));
    assert_eq!(ended.code, Some(if report["ok"] == true { 0 } else { 1 }), "{ended:#?}");
    report
}

fn rows(report: &Value) -> &[Value] {
    report["checks"].as_array().expect("a report has checks")
}

/// Names of the checks that ended so.
fn named<'r>(report: &'r Value, status: &str) -> Vec<&'r str> {
    rows(report).iter().filter(|row| row["status"] == status).filter_map(|row| row["name"].as_str()).collect()
}

#[test]
fn every_first_party_plugin_passes() {
    let beside = program().parent().expect("the program lies in a folder");
    each(&first_party_plugins(), |plugin| {
        let small = SMALL_ENCODERS.iter().copied().flatten().find(|encoder| encoder.0 == plugin.id);
        // Other kinds are checked with their defaults.
        let config = small.map(|(_, config)| format!("--config=({config})"));
        assert_eq!(config.is_some(), plugin.kind == "encoder", "{plugin:?}");
        let report =
            check(&first_party_library(beside, &plugin.package), &config.as_deref().map_or(vec![], |c| vec![c]));
        assert_eq!((&report["ok"], named(&report, "failed")), (&true.into(), vec![]), "{report:#}");
        assert_eq!(report["plugin"]["id"], plugin.id.as_str());
        for row in rows(&report) {
            assert!(row["about"].as_str().is_some_and(|about| about.ends_with('.')), "{row}");
            assert!(row["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{row}");
            assert!(row["seconds"].is_f64(), "{row}");
        }
        // What has nothing to check says so; everything else was checked.
        let skipped: &[&str] = match (plugin.kind.as_str(), plugin.id.as_str()) {
            ("loss", "vicreg") => &["tiny temperature"],
            ("optimizer", "adafactor" | "novograd") => &["elementwise"],
            ("encoder", "resnet") => &[],
            ("encoder", _) => &["state survives"],
            _ => &[],
        };
        assert_eq!(named(&report, "skipped"), skipped, "{report:#}");
    });
}

/// What a loss holds constant on purpose it declares, and its gradient is checked with that.
#[test]
fn a_declared_detach_is_told() {
    let beside = program().parent().expect("the program lies in a folder");
    for (package, declares) in [("clip-loss-sogclr", true), ("clip-loss-vicreg", false)] {
        let report = check(&first_party_library(beside, package), &[]);
        let gradient = rows(&report).iter().find(|row| row["name"] == "gradient").expect("losses have gradients");
        let detail = gradient["detail"].as_str().unwrap_or_default();
        assert_eq!(detail.contains("it declares held constant: the weights"), declares, "{detail}");
    }
}

/// The defect, the checks that fail for it, and words of the first.
type Defect = (&'static str, &'static [&'static str], &'static [&'static str]);

const DEFECTS: [Defect; 17] = [
    ("bad_detach", &["gradient"], &["`detach`", "HELD_CONSTANT", "`image_features`"]),
    ("overflows", &["tiny temperature"], &["`temperature` at 0.001", "`loss` to be finite, got NaN", "cross_entropy"]),
    ("panics", &["shapes"], &["the plugin panicked: out of cheese", "src/lib.rs:"]),
    ("hangs", &["shapes"], &["an answer within 20 s, got none"]),
    ("fixed_batch", &["shapes"], &["a batch of 2", "[2, 2] and [4, 4] do not broadcast"]),
    ("hidden_state", &["no hidden state"], &["the loss of 4 pairs", "`static`", "`graph.state`"]),
    ("unordered", &["deterministic"], &["two fresh processes", "HashMap"]),
    ("own_default", &["settings"], &["`temperature`: expected a value at least 0.1, at most 1, got 0.05"]),
    ("other_abi", &["loads"], &["expected ABI version 1, got 999"]),
    ("duplicate", &["id"], &["other loss plugins `clip`", "clip_loss_clip"]),
    // Beyond the ten.
    ("aborts", &["shapes"], &["the end of the process: signal: 6"]),
    ("first_rows", &["every pair counts"], &["image 2 of 8"]),
    ("idle_state", &["states"], &["`mean`", "graph.update"]),
    ("climbs", &["finds the minimum"], &["go against the gradient"]),
    ("not_elementwise", &["elementwise"], &["element 0 of `param`", "ELEMENTWISE"]),
    ("mixes_samples", &["samples do not mix"], &["inputs.training"]),
    ("forgetful", &["no hidden state", "state survives"], &["the rate of step 0", "a scheduler's `state`"]),
];

#[test]
fn every_planted_defect_is_found() {
    program();
    each(&DEFECTS, |(name, failing, words)| {
        let file = if ["panics", "other_abi"].contains(name) { library(name) } else { defect(name) };
        let limit: &[&str] = if *name == "hangs" { &["--timeout", "20"] } else { &[] };
        let report = check(&file, limit);
        let failed = named(&report, "failed");
        match *name {
            // What never builds fails all that needs numbers, and what is another each time more than one check; the first
            // says why.
            "panics" | "fixed_batch" | "unordered" => assert!(failed.starts_with(failing), "{name}: {report:#}"),
            _ => assert_eq!(failed, *failing, "{name}: {report:#}"),
        }
        let first = rows(&report).iter().find(|row| row["status"] == "failed").expect("one failed");
        let told = [&first["detail"], &first["hint"]].map(|text| text.as_str().unwrap_or_default()).join(" ");
        for word in *words {
            assert!(told.contains(word), "{name}: `{word}` is missing in {told}");
        }
        // The others still ran.
        assert!(*name == "other_abi" || named(&report, "ok").len() > 5, "{name}: {report:#}");
    });
}

/// The fixtures that are sound: a defect is found where there is one only.
#[test]
fn sound_plugins_from_elsewhere_pass() {
    for name in ["good_loss", "wild_scheduler"] {
        let report = check(&library(name), &[]);
        assert_eq!(report["ok"], true, "{name}: {report:#}");
    }
}

#[test]
fn a_report_for_people_has_a_line_for_each_check() {
    let file = defect("bad_detach");
    let ended = run(&root(), &["plugins", "check", &file.to_string_lossy()]);
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    let lines: Vec<&str> = ended.stdout.lines().collect();
    let begins = |mark: &str| lines.iter().filter(|line| line.starts_with(mark)).count();
    assert_eq!((begins("ok      "), begins("FAILED  "), begins("skipped ")), (15, 1, 0), "{}", ended.stdout);
    assert!(lines.iter().any(|line| line.trim_start().starts_with("hint: take out the `detach`")), "{}", ended.stdout);
    assert_eq!(lines.last(), Some(&"16 checks, 1 failed, 0 skipped"));

    // Settings that the schema refuses: the checks that need some are left out, and it is told which one is wrong.
    let report = check(&library("good_loss"), &["--config", "(temprature: 0.1)"]);
    assert_eq!(named(&report, "failed"), ["settings"], "{report:#}");
    let settings = rows(&report).iter().find(|row| row["name"] == "settings").expect("it is there");
    assert!(settings["detail"].as_str().is_some_and(|detail| detail.contains("temprature")), "{settings}");
    assert!(named(&report, "skipped").contains(&"gradient"), "{report:#}");
}
