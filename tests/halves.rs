//! Statistics of the optimizer and weights in half precision: what is kept in bf16 is rounded at random, so that training
//! goes as in f32, resumes exactly, and does not depend on threads.

use clip_host_tests::golden::read_tensors;
use clip_host_tests::host::{Folder, newest_checkpoint, run, small_run};
use std::collections::HashMap;

const HALVES: [&str; 4] = ["--set", "model.text_encoder.weights_dtype=Bf16", "--set", "optimizer.state_dtype=Bf16"];

type Tensors = HashMap<String, Vec<f64>>;

fn tensors(folder: &Folder, run: &str) -> Tensors {
    read_tensors(&newest_checkpoint(&folder.join(run)))
}

/// Whether bf16 has all of some values.
fn is_bf16(values: &[f64]) -> bool {
    values.iter().all(|&v| f64::from(v as f32) == v && (v as f32).to_bits() & 0xffff == 0)
}

/// The names of tensors that are not all values of bf16.
fn others(tensors: &Tensors) -> Vec<&str> {
    tensors.iter().filter(|(_, values)| !is_bf16(values)).map(|(name, _)| name.as_str()).collect()
}

fn remove(folder: &Folder, run: &str) {
    std::fs::remove_dir_all(folder.join(run)).expect("a run's folder can be removed");
}

#[test]
fn every_optimizers_states_can_be_halves() {
    let folder = small_run("halves");
    for (id, config, precision) in [
        ("sgd", "(momentum: 0.9)", "F32"),
        ("adamw", "(amsgrad: true)", "F32"),
        ("adamw", "()", "Bf16"),
        ("radam", "()", "F32"),
        ("nadam", "()", "F32"),
        ("adafactor", "(beta1: Some(0.9))", "F32"),
        ("novograd", "()", "Bf16"),
    ] {
        let what = format!("{id} {config} {precision}");
        let set = format!(
            "optimizer=(plugin: \"{id}\", config: {config}, lr: 1e-3, weight_decay: 0.02, state_dtype: Bf16, groups: \
             [(params: [\"text_encoder.transformer.*\"], lr: 5e-4), (params: [\"text_encoder.embeddings.*\"], \
             freeze_epochs: 1)])"
        );
        let train = |out: &str, more: &[&str]| {
            let precision = format!("precision={precision}");
            let common = ["--set", &set, "--set", &precision, "--set", HALVES[1], "--steps"];
            run(&folder, &[&["run", "small.ron", "--resume", out], &common[..], more].concat()).done()
        };
        train("one", &["10", "--set", "train.threads=1"]);
        train("three", &["10", "--set", "train.threads=3"]);
        train("resumed", &["4"]);
        train("resumed", &["10"]);
        let (one, three, resumed) = (tensors(&folder, "one"), tensors(&folder, "three"), tensors(&folder, "resumed"));
        assert!(one == three, "{what}: the number of threads matters");
        assert!(one == resumed, "{what}: a resumed run is another");
        // Halves, and nothing else is: not what is smaller than a parameter, not the other tower.
        let others = others(&one);
        assert!(!others.iter().any(|name| name.starts_with("text_encoder.")), "{what}: {others:?}");
        assert!(others.contains(&"image_encoder.conv1.weight"), "{what}: {others:?}");
        let statistic = |name: &str| name.starts_with("optimizer.") && name.ends_with("attention.q_lin.weight");
        let kept: Vec<&String> = one.keys().filter(|name| statistic(name)).collect();
        let of_shape = |name: &&&String| one[**name].len() == 256 && one[**name].iter().any(|&v| v != 0.0);
        assert!(kept.iter().filter(of_shape).all(|name| is_bf16(&one[*name])), "{what}: {kept:?}");
        assert!(kept.iter().filter(of_shape).count() > 0, "{what}: {kept:?}");
        for out in ["one", "three", "resumed"] {
            remove(&folder, out);
        }
    }
    // Nothing that could be kept in half precision is an error where the recipe says it, before anything runs.
    let set = "optimizer=(plugin: \"sgd\", lr: 0.1, state_dtype: Bf16)";
    for command in ["check", "run"] {
        run(&folder, &[command, "small.ron", "--set", set]).refused(&[
            "optimizer.state_dtype",
            "optimizer plugin `sgd`",
            "momentum",
        ]);
    }
}

/// The sample's weights move as in f32, and the files that others read are f32.
#[test]
fn training_reaches_the_loss_of_f32() {
    let folder = small_run("halves-loss");
    let common = ["--json", "--set", "train.epochs=30", "--set", "train.log_every=40", "--set", "train.eval_every=0"];
    let train = |out: &str, more: &[&str]| {
        run(&folder, &[&["run", "small.ron", "--out", out], &common[..], more].concat()).json()
    };
    let loss = |summary: &serde_json::Value| summary["metrics"]["train/loss"].as_f64().expect("a loss");
    let (single, half) = (loss(&train("single", &[])), loss(&train("half", &HALVES)));
    let mixed = loss(&train("mixed", &[&HALVES[..], &["--set", "precision=Bf16"]].concat()));
    println!("loss {single} in f32, {half} with halves, {mixed} with halves in mixed precision");
    let first = loss(&train("first", &["--steps", "40"]));
    for got in [half, mixed] {
        assert!((got - single).abs() < 0.1 * (first - single).abs(), "{got}, expected about {single}, from {first}");
    }
    let checkpoint = tensors(&folder, "half");
    let exported = read_tensors(&folder.join("half/weights/text_encoder.safetensors"));
    assert!(exported.len() > 10);
    for (name, values) in exported {
        assert_eq!(values, checkpoint[&format!("text_encoder.{name}")], "{name}");
        assert!(is_bf16(&values), "{name}");
    }
}

/// Half the bytes, of these tensors.
#[test]
fn memory_is_halved() {
    let folder = small_run("halves-memory");
    let bytes = |more: &[&str]| {
        let json = run(&folder, &[&["bench", "step", "small.ron", "--synthetic", "--json"], more].concat()).json();
        json["persistent_bytes"].as_u64().expect("a number of bytes")
    };
    let (neither, both) = (bytes(&[]), bytes(&HALVES));
    let (weights, statistics) = (bytes(&HALVES[..2]), bytes(&HALVES[2..]));
    run(&folder, &["run", "small.ron", "--steps", "1", "--out", "run"]).done();
    let tensors = tensors(&folder, "run");
    let elements = |prefix: &str| {
        let of = tensors.iter().filter(|(name, _)| name.starts_with(prefix));
        of.map(|(_, values)| values.len() as u64).sum::<u64>()
    };
    // A tensor of an odd number of elements ends in the middle of a word.
    let about = |got: u64, expected: u64| assert!(got.abs_diff(expected) <= 16, "{got}, expected {expected}");
    about(neither - weights, 2 * elements("text_encoder."));
    about(neither - statistics, 2 * (elements("optimizer.exp_avg.") + elements("optimizer.exp_avg_sq.")));
    about(neither - both, (neither - weights) + (neither - statistics));
}
