//! Every loss with every optimizer, and every encoder, in both precisions: three steps on sample data, and nothing that the
//! run keeps is NaN.
//!
//! The plugins are those of the folder `plugins`. Losses and optimizers have their default settings, so that new ones are
//! tried without a change here; what a loss offers beside its defaults is tried with one optimizer. Encoders are small ones.

use clip_host_tests::fixtures::first_party_plugins;
use clip_host_tests::golden::read_tensors;
use clip_host_tests::host::{Folder, SMALL_ENCODERS, newest_checkpoint, run, small_run};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Names of all plugins of a kind.
fn ids(kind: &str) -> Vec<String> {
    let ids: Vec<String> =
        first_party_plugins().into_iter().filter(|plugin| plugin.kind == kind).map(|plugin| plugin.id).collect();
    assert!(ids.len() > 1, "{kind}: {ids:?}");
    ids
}

/// What one run differs in: settings of the recipe, as `--set` takes them.
struct Combination(Vec<String>);

impl Combination {
    /// Trains three steps and fails unless all that the run reports and keeps is finite.
    fn train(&self, folder: &Folder, number: usize) {
        let what = self.0.join(" ");
        let out = format!("run{number}");
        let sets = self.0.iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> =
            ["run", "small.ron", "--steps", "3", "--json", "--out", &out].into_iter().chain(sets).collect();
        let ended = run(folder, &args);
        assert_eq!(ended.code, Some(0), "{what}: {ended:#?}");
        let summary = ended.json();
        assert_eq!(summary["steps"], 3, "{what}");
        let metrics = summary["metrics"].as_object().expect("a summary has metrics");
        assert!(metrics.contains_key("train/loss"), "{what}: {metrics:?}");
        // Numbers that are not finite are null in JSON.
        assert!(metrics.values().all(|value| value.as_f64().is_some_and(f64::is_finite)), "{what}: {metrics:?}");
        let tensors = read_tensors(&newest_checkpoint(&folder.join(&out)));
        assert!(tensors.len() > 40, "{what}: {} tensors", tensors.len());
        for (name, values) in tensors {
            assert!(values.iter().all(|value| value.is_finite()), "{what}: `{name}` after three steps");
        }
        std::fs::remove_dir_all(folder.join(out)).expect("runs can be removed");
    }
}

/// Trains all, as many at a time as there are cores.
fn train_all(name: &str, combinations: &[Combination]) {
    let folder = small_run(name);
    let next = AtomicUsize::new(0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some((number, combination)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|n| Some((n, combinations.get(n)?)))
                {
                    combination.train(&folder, number);
                }
            });
        }
    });
}

#[test]
fn every_loss_trains_with_every_optimizer() {
    let (losses, optimizers) = (ids("loss"), ids("optimizer"));
    let mut combinations = Vec::new();
    for loss in &losses {
        for optimizer in &optimizers {
            for precision in ["F32", "Bf16"] {
                combinations.push(Combination(vec![
                    format!(r#"loss=(plugin: "{loss}")"#),
                    format!(r#"optimizer=(plugin: "{optimizer}", lr: 1e-3, weight_decay: 0.02)"#),
                    format!("precision={precision}"),
                ]));
            }
        }
    }
    train_all("combinations", &combinations);
}

#[test]
fn every_mode_of_a_loss_trains() {
    let modes = [
        r#"(plugin: "clip", config: (mode: "learnable"))"#,
        r#"(plugin: "clip", config: (mode: "logit_scale"))"#,
        r#"(plugin: "clip", config: (mode: "personalized"))"#,
        r#"(plugin: "cyclip", config: (learnable: true))"#,
        r#"(plugin: "dynamic_temperature", config: (symmetric: true))"#,
        r#"(plugin: "isogclr", config: (network: Some((prototypes: 8))))"#,
        r#"(plugin: "sogclr", config: (surrogate: "squared_hinge"))"#,
    ];
    let mut combinations = Vec::new();
    for loss in modes {
        for precision in ["F32", "Bf16"] {
            combinations.push(Combination(vec![
                format!("loss={loss}"),
                r#"optimizer=(plugin: "adamw", lr: 1e-3, weight_decay: 0.02)"#.into(),
                format!("precision={precision}"),
            ]));
        }
    }
    train_all("modes", &combinations);
}

/// Small networks with everything random that they have, on images of 32 pixels and 30 tokens of 400.
#[test]
fn every_encoder_trains() {
    let [images, texts] = SMALL_ENCODERS;
    let mut known: Vec<&str> = images.iter().chain(texts).map(|encoder| encoder.0).collect();
    known.sort_unstable();
    assert_eq!(ids("encoder"), known, "every encoder is tried");
    let mut combinations = Vec::new();
    for (part, encoders) in [("image_encoder", images), ("text_encoder", texts)] {
        for (id, config) in encoders {
            for precision in ["F32", "Bf16"] {
                combinations.push(Combination(vec![
                    format!(r#"model.{part}=(plugin: "{id}", config: ({config}))"#),
                    format!("precision={precision}"),
                ]));
            }
        }
    }
    train_all("encoders", &combinations);
}
