//! Plugins that are none, belong to another host or misbehave: each is told by name, and none takes the program down.

use clip_host_tests::fixtures::library;
use clip_host_tests::host::{Ended, Folder, metrics, run, small_run};
use std::path::Path;

/// Runs the small recipe with other parts.
fn train(folder: &Path, sets: &[&str]) -> Ended {
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let args = ["run", "small.ron", "--out", "out", "--checkpoint-every-steps", "3"];
    run(folder, &args.into_iter().chain(sets).collect::<Vec<_>>())
}

/// A loss from a fixture's library.
fn loss(name: &str, config: &str) -> String {
    format!("loss=(plugin: \"{name}\", path: {:?}, config: ({config}))", library(name))
}

/// A folder of libraries under the names given.
fn put(folder: &Folder, path: &str, libraries: &[(&str, Vec<u8>)]) {
    for (name, bytes) in libraries {
        folder.write(&format!("{path}/{name}.so"), bytes);
    }
}

fn bytes(name: &str) -> Vec<u8> {
    std::fs::read(library(name)).expect("a fixture can be read")
}

#[test]
fn what_is_no_plugin_is_told() {
    let folder = small_run("no-plugin");
    let refused = |name: &str, words: &[&str]| {
        let file = format!("{name}.so");
        let text = train(&folder, &[&loss(name, "")]).refused(words);
        assert!(text.contains(&file) && text.contains("loss.plugin"), "{text}");
    };
    refused("not_a_plugin", &["holds no plugin", "export_plugin!"]);
    refused("other_abi", &["expected ABI version 1, got 999", "rebuild the plugin"]);
    refused("newer_abi", &["expected ABI version 1, got 2", "rebuild the plugin", "update the host"]);
    refused("other_layout", &["expected the function table of ABI version 1", "rebuild the plugin"]);

    // Files that are no libraries, or halves of one.
    let good = bytes("good_loss");
    put(
        &folder,
        "bad",
        &[
            ("empty", vec![]),
            ("text", b"no library at all".to_vec()),
            ("header", good[..40].to_vec()),
            ("start", good[..3000].to_vec()),
            ("half", good[..good.len() / 2].to_vec()),
        ],
    );
    for name in ["empty", "text", "header", "start", "half"] {
        let path = format!("bad/{name}.so");
        let choice = format!("loss=(plugin: \"good_loss\", path: {path:?})");
        train(&folder, &[&choice]).refused(&["cannot open the plugin", &path, "expected a dynamic library"]);
        let checked = run(&folder, &["plugins", "check", &path]);
        assert_eq!(checked.code, Some(1), "{checked:#?}");
        assert!(checked.text().contains("expected a dynamic library"), "{checked:#?}");
    }
    let missing = "loss=(plugin: \"good_loss\", path: \"bad/missing.so\")";
    train(&folder, &[missing]).refused(&["cannot read the plugin bad/missing.so"]);
    assert!(!folder.join("out").exists(), "a refused run leaves no folder");
}

/// A folder may hold anything; what is unusable in it does not stand in the way of the rest, and is told where it is asked
/// for.
#[test]
fn a_folder_with_bad_libraries_among_good_ones() {
    let folder = small_run("mixed");
    let good = bytes("good_loss");
    let libraries = ["other_abi", "other_layout", "not_a_plugin", "panics"].map(|name| (name, bytes(name)));
    put(&folder, "mixed", &libraries);
    put(&folder, "mixed", &[("cut", good[..good.len() / 2].to_vec()), ("text", b"hello".to_vec())]);
    let path = r#"plugins.path=["mixed"]"#;
    train(&folder, &[path, "loss=(plugin: \"good_loss\")"]).refused(&["there is no loss plugin `good_loss`", "cut.so"]);
    put(&folder, "mixed", &[("good", good)]);
    train(&folder, &[path, "loss=(plugin: \"good_loss\")", "train.steps=2"]).done();
    let list = run(&folder, &["plugins", "list", "--path", "mixed"]).done();
    assert!(list.stdout.contains("good_loss") && list.stdout.contains("panics"), "{list:#?}");
    assert!(list.stderr.contains("other_abi.so") && list.stderr.contains("cut.so"), "{list:#?}");
}

#[test]
fn two_plugins_with_one_id_are_told_by_their_files() {
    let folder = small_run("twice");
    let good = bytes("good_loss");
    // Another build of the same: what differs here is a byte behind the library's end.
    let other = [&good[..], &[0]].concat();
    put(&folder, "first", &[("good", good.clone())]);
    put(&folder, "second", &[("copy", good), ("other", other)]);
    let choice = "loss=(plugin: \"good_loss\")";
    for command in ["run", "check"] {
        let args = [command, "small.ron", "--set", r#"plugins.path=["first", "second"]"#, "--set", choice];
        run(&folder, &args).refused(&["good_loss", "first/good.so", "second/other.so"]);
    }
    // A copy is the same plugin, and a path says which one is meant.
    std::fs::remove_file(folder.join("second/other.so")).expect("it was written");
    train(&folder, &[r#"plugins.path=["first", "second"]"#, choice, "train.steps=1"]).done();
}

#[test]
fn a_pinned_plugin_must_be_the_very_file() {
    let folder = small_run("pin");
    let pinned = |sha256: &str| {
        let choice = format!("loss=(plugin: \"good_loss\", path: {:?}, sha256: {sha256:?})", library("good_loss"));
        train(&folder, &[&choice, "train.steps=1"])
    };
    let text = pinned(&"0".repeat(64)).refused(&["good_loss", &"0".repeat(64)]);
    let own = text.split(|c: char| !c.is_ascii_hexdigit()).find(|word| word.len() == 64 && !word.starts_with("00"));
    pinned(own.unwrap_or_else(|| panic!("the file's own hash is not in: {text}"))).done();
    pinned("abc").refused_without_hint(&["expected 64 hexadecimal digits, got 3"]);
}

/// The panic is an error with the plugin's words and place, without the standard library's own report.
#[test]
fn a_panic_in_a_plugin_is_an_error() {
    let folder = small_run("panics");
    for command in ["run", "check"] {
        let mut started =
            clip_host_tests::host::command(&folder, &[command, "small.ron", "--set", &loss("panics", "")]);
        let ended: Ended = started.env("RUST_BACKTRACE", "1").output().expect("it starts").into();
        assert_eq!(ended.code, Some(1), "{ended:#?}");
        let text = ended.text();
        let told = "loss plugin `panics` 0.1.0";
        assert!(text.contains(told) && text.contains("the plugin panicked: out of cheese with batch 8"), "{text}");
        assert!(text.contains("src/lib.rs:") && text.contains("hint:"), "{text}");
        for raw in ["thread '", "stack backtrace", "RUST_BACKTRACE"] {
            assert!(!text.contains(raw), "`{raw}` in: {text}");
        }
    }
}

#[test]
fn a_malformed_fragment_is_told() {
    let folder = small_run("malformed");
    for (fault, words) in [
        ("not_json", "the loss, with regards"),
        ("not_a_fragment", "missing field"),
        ("unknown_op", "conjure"),
        ("newer_ir", "IR version 7"),
        ("newer_ir_known_ops", "IR version 7"),
        ("wrong_shape", "its inputs give [1, 1]"),
        ("forward_reference", "%"),
        ("huge", "expected tensors that fit in memory"),
        ("foreign_input", "got `weather`"),
        ("input_of_other_shape", "text_ids"),
        ("no_output", "expected"),
        ("output_of_other_shape", "expected"),
        ("nan_constant", "expected f64"),
    ] {
        let text = train(&folder, &[&loss("malformed", &format!("fault: {fault:?}"))]).refused(&["`malformed`", words]);
        assert!(text.contains("got") || text.contains("answered"), "{fault}: {text}");
    }
    assert!(!folder.join("out").exists(), "a run that cannot begin leaves no folder");
}

/// A loss that becomes NaN ends the run at that step; the newest checkpoint is of before, and the run can go on from there.
#[test]
fn a_loss_that_becomes_nan_stops_the_run() {
    let folder = small_run("nan");
    let text = train(&folder, &[&loss("nan_loss", "from_step: 11")]).refused(&[
        "training stopped at epoch 1, step 11: the loss is not finite",
        "the last good checkpoint is of step 9",
        "step-0000000009.safetensors",
        "run folder: out",
    ]);
    assert!(text.contains("lower `optimizer.lr`"), "{text}");
    let lines = metrics(&folder.join("out"));
    assert_eq!(lines.last().map(|line| line["step"].clone()), Some(10.into()));
    for line in &lines {
        assert!(line.values().all(|value| !value.is_null()), "NaN in the log: {line:?}");
    }
    let checkpoint = clip_host_tests::host::newest_checkpoint(&folder.join("out"));
    for (name, values) in clip_host_tests::golden::read_tensors(&checkpoint) {
        assert!(values.iter().all(|value| value.is_finite()), "{name} is not finite in the last good checkpoint");
    }
    // With what was wrong put right it goes on.
    let resumed = run(&folder, &["run", "--resume", "out", "--set", "loss.config.from_step=1000"]).done();
    assert!(resumed.text().contains("resumed at step 9"), "{}", resumed.text());
}

#[test]
fn scalars_and_rates_that_are_not_finite_stop_the_run() {
    let folder = small_run("scalars");
    let scalars = format!(
        "optimizer=(plugin: \"nan_scalars\", path: {:?}, lr: 1e-3, config: (step: 11))",
        library("nan_scalars")
    );
    train(&folder, &[&scalars]).refused(&["step 10", "nan_scalars", "`rate`", "expected a finite number", "step 9"]);
    std::fs::remove_dir_all(folder.join("out")).expect("the run left a folder");
    let scheduler = format!(
        "scheduler=(plugin: \"wild_scheduler\", path: {:?}, config: (factor: 1e200))",
        library("wild_scheduler")
    );
    train(&folder, &[&scheduler]).refused(&["wild_scheduler", "finite"]);
    let negative = scheduler.replace("1e200", "-1.0");
    train(&folder, &[&negative]).refused(&["wild_scheduler"]);
}
