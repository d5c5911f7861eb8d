//! Groups of parameters: own rates, own decay, frozen ones; clipping by value; patterns that match nothing.

use clip_host_tests::host::{Folder, newest_checkpoint, run, small_run};
use std::collections::HashMap;

type Tensors = HashMap<String, Vec<f64>>;

/// The tensors after some steps with plain gradient descent, in which a step is the rate times the gradient.
fn train(folder: &Folder, steps: &str, optimizer: &str) -> Tensors {
    let set = format!("optimizer=(plugin: \"sgd\", lr: 0.05, {optimizer})");
    let args = ["run", "small.ron", "--out", "out", "--set", "scheduler=(plugin: \"constant\")", "--set", &set];
    run(folder, &[&args[..], &["--steps", steps]].concat()).done();
    let tensors = clip_host_tests::golden::read_tensors(&newest_checkpoint(&folder.join("out")));
    std::fs::remove_dir_all(folder.join("out")).expect("a run's folder can be removed");
    tensors
}

/// Parameters by whether a group has them.
fn names(tensors: &Tensors, prefix: &str) -> (Vec<String>, Vec<String>) {
    let statistics =
        |name: &str| ["running_mean", "running_var", "num_batches_tracked"].iter().any(|s| name.ends_with(s));
    let parameters = tensors.keys().filter(|name| {
        let towers = ["image_encoder.", "text_encoder.", "image_proj.", "text_proj."];
        towers.iter().any(|tower| name.starts_with(tower)) && !statistics(name)
    });
    parameters.cloned().partition(|name| name.starts_with(prefix))
}

fn close(what: &str, got: f64, expected: f64) {
    assert!((got - expected).abs() <= 1e-6 + 1e-4 * expected.abs(), "{what}: expected {expected}, got {got}");
}

#[test]
fn frozen_parameters_stay_and_others_move_as_before() {
    let folder = small_run("groups-freeze");
    let freeze = "groups: [(params: [\"text_encoder.*\", \"text_proj.weight\"], freeze: true)]";
    let (one, three) = (train(&folder, "1", freeze), train(&folder, "3", freeze));
    let (frozen, _) = names(&one, "text_encoder.");
    assert!(frozen.len() > 10, "{frozen:?}");
    for name in frozen.iter().map(String::as_str).chain(["text_proj.weight"]) {
        assert_eq!(one[name], three[name], "{name} moved");
    }
    for name in ["text_proj.bias", "image_encoder.conv1.weight", "image_proj.weight"] {
        assert_ne!(one[name], three[name], "{name} did not move");
    }
    // The first step's gradients do not depend on who is frozen.
    let free = train(&folder, "1", "groups: []");
    let (_, others) = names(&free, "text_");
    for name in others {
        assert_eq!(one[&name], free[&name], "{name}");
    }
    assert_ne!(free["text_proj.weight"], one["text_proj.weight"]);
    // With momentum, a frozen parameter has none.
    let momentum = train(&folder, "1", &format!("config: (momentum: 0.9), {freeze}"));
    let moments: Vec<&String> = momentum.keys().filter(|name| name.starts_with("optimizer.")).collect();
    assert!(moments.iter().any(|name| name.ends_with("image_proj.weight")), "{moments:?}");
    assert!(!moments.iter().any(|name| name.contains("text_encoder")), "{moments:?}");
}

#[test]
fn groups_have_their_own_rate_and_decay() {
    let folder = small_run("groups-rate");
    let frozen = train(&folder, "1", "groups: [(params: [\"*\"], lr: 0.0)]");
    let plain = train(&folder, "1", "groups: []");
    let twice = train(&folder, "1", "groups: [(params: [\"image_*\"], lr: 0.1)]");
    let (inside, outside) = names(&plain, "image_");
    assert!(inside.len() > 10 && outside.len() > 10);
    let mut moved = 0.0f64;
    for name in &inside {
        for ((start, once), twice) in frozen[name].iter().zip(&plain[name]).zip(&twice[name]) {
            close(name, twice - start, 2.0 * (once - start));
            moved = moved.max((once - start).abs());
        }
    }
    assert!(moved > 1e-4, "{moved}");
    for name in &outside {
        assert_eq!(plain[name], twice[name], "{name}");
    }

    // The first group that names a parameter counts; vectors do not decay in a group either.
    let decay = "weight_decay: 0.1, groups: [(params: [\"image_proj.*\"], weight_decay: 0.5), (params: [\"image_*\"], \
                 weight_decay: 0.0)]";
    let decayed = train(&folder, "1", decay);
    for (name, rate) in [
        ("image_proj.weight", 0.5),
        ("image_proj.bias", 0.0),
        ("image_encoder.conv1.weight", 0.0),
        ("image_encoder.bn1.weight", 0.0),
        ("text_proj.weight", 0.1),
    ] {
        for ((start, once), decayed) in frozen[name].iter().zip(&plain[name]).zip(&decayed[name]) {
            close(name, once - decayed, 0.05 * rate * start);
        }
    }
}

/// Frozen for an epoch of eight steps, a group begins in the second as if it were its first: with Adam, whose first step
/// moves every element by the rate, whatever its gradient.
#[test]
fn a_group_is_unfrozen_at_its_epoch() {
    let folder = small_run("groups-unfreeze");
    let train = |out: &str, steps: &str, threads: &str| {
        let set = "optimizer=(plugin: \"adam\", lr: 1e-3, clip_grad_norm: 1.0, config: (eps: 1e-16), groups: [(params: \
                   [\"text_encoder.*\", \"loss.*\", \"image_encoder.conv1.weight\"], freeze_epochs: 1, lr: 2e-3)])";
        let constant = "scheduler=(plugin: \"constant\")";
        let args =
            ["run", "small.ron", "--resume", out, "--set", set, "--set", constant, "--set", threads, "--steps", steps];
        let args = [&args[..], &["--set", "loss=(plugin: \"clip\", config: (mode: \"learnable\"))"]].concat();
        run(&folder, &args).done();
        clip_host_tests::golden::read_tensors(&newest_checkpoint(&folder.join(out)))
    };
    let whole = train("whole", "1", "train.threads=1");
    let (late, _) = names(&whole, "text_encoder.");
    let late = late.iter().map(String::as_str).chain(["image_encoder.conv1.weight", "loss.temperature"]);
    let late: Vec<&str> = late.filter(|name| whole.contains_key(*name)).collect();
    assert!(late.contains(&"loss.temperature"), "{late:?}");
    let eight = train("whole", "8", "train.threads=1");
    let nine = train("whole", "9", "train.threads=1");
    for &name in &late {
        assert_eq!(whole[name], eight[name], "{name} moved in the first epoch");
        assert!(eight[&format!("optimizer.exp_avg.{name}")].iter().all(|m| *m == 0.0), "{name} has momentum");
        let steps = eight[name].iter().zip(&nine[name]).map(|(before, after)| (before - after).abs());
        let furthest = steps.fold(0.0, f64::max);
        close(name, furthest, 2e-3);
    }
    assert_ne!(whole["image_proj.weight"], eight["image_proj.weight"]);
    // Interrupted before, at and after its epoch, on other numbers of threads.
    for (steps, threads) in [("3", 2), ("8", 3), ("11", 1)] {
        train("parts", steps, &format!("train.threads={threads}"));
    }
    assert!(train("parts", "12", "train.threads=2") == train("whole", "12", "train.threads=1"));
}

/// All that is said of groups holds for optimizers that update each parameter by itself, and across an interruption.
#[test]
fn groups_resume_with_the_same_bits() {
    let folder = small_run("groups-resume");
    for plugin in ["adamw", "novograd"] {
        let set = format!(
            "optimizer=(plugin: \"{plugin}\", lr: 1e-3, weight_decay: 0.1, clip_grad_norm: 1.0, clip_grad_value: 0.1, groups: [\
             (params: [\"text_encoder.embeddings.*\"], freeze: true), (params: [\"text_*\"], lr: 2e-4, weight_decay: 0.3)])"
        );
        let train = |out: &str, steps: &str, threads: &str| {
            let args = ["run", "small.ron", "--resume", out, "--set", &set, "--steps", steps, "--set", threads];
            run(&folder, &args).done();
            clip_host_tests::golden::read_tensors(&newest_checkpoint(&folder.join(out)))
        };
        let whole = train(&format!("{plugin}-whole"), "3", "train.threads=1");
        train(&format!("{plugin}-parts"), "1", "train.threads=2");
        assert!(whole == train(&format!("{plugin}-parts"), "3", "train.threads=3"), "{plugin}");
    }
}

#[test]
fn gradients_are_limited_by_value() {
    let folder = small_run("groups-clip");
    let frozen = train(&folder, "1", "groups: [(params: [\"*\"], lr: 0.0)]");
    let plain = train(&folder, "1", "groups: []");
    let clipped = train(&folder, "1", "clip_grad_value: 1e-3");
    let (names, _) = names(&plain, "");
    let (mut limited, mut free) = (0, 0);
    for name in names {
        for ((start, once), clipped) in frozen[&name].iter().zip(&plain[&name]).zip(&clipped[&name]) {
            let gradient = (start - once) / 0.05;
            close(&name, (start - clipped) / 0.05, gradient.clamp(-1e-3, 1e-3));
            if gradient.abs() > 1e-3 { limited += 1 } else { free += 1 }
        }
    }
    assert!(limited > 100 && free > 100, "{limited} limited, {free} not");
}

#[test]
fn a_pattern_that_matches_nothing_is_told() {
    let folder = small_run("groups-refused");
    for (optimizer, words) in [
        (
            "groups: [(params: [\"image_*\"]), (params: [\"text_*\", \"text_encoder.embedings.*\"], lr: 1e-4)]",
            [
                "optimizer.groups[1].params[1]",
                "`text_encoder.embedings.*` matches no parameter",
                "text_encoder.embeddings.",
            ],
        ),
        (
            "no_decay: [\"1d\", \"*.bias\", \"image_encoder.conv.weight\"]",
            ["optimizer.no_decay[2]", "`image_encoder.conv.weight` matches no parameter", "image_encoder.conv1.weight"],
        ),
        (
            "groups: [(params: [\"*\"], freeze: true)]",
            ["optimizer.groups", "every parameter is frozen", "freeze: true"],
        ),
        ("groups: [(params: [])]", ["optimizer.groups[0].params", "expected names of parameters", "text_encoder.*"]),
        ("groups: [(params: [\"*\"], lrr: 1.0)]", ["optimizer.groups[0].lrr", "unknown key `lrr`", "lr"]),
        (
            "groups: [(params: [\"image_*\"], freeze: true, lr: 1e-4)]",
            ["optimizer.groups[0]", "expected `freeze: true` alone", "a group that is trained"],
        ),
        ("groups: [(params: [\"*\"], lr: -1.0)]", ["optimizer.groups[0].lr", "at least 0", "-1"]),
    ] {
        let set = format!("optimizer=(plugin: \"sgd\", lr: 0.05, {optimizer})");
        for command in ["run", "check"] {
            run(&folder, &[command, "small.ron", "--set", &set]).refused_without_hint(&words);
        }
    }
    assert!(!folder.join("runs").exists(), "a refused run leaves no folder");
}
