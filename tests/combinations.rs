//! Every loss with every optimizer, in both precisions: three steps on sample data, and nothing that the run keeps is NaN.
//!
//! The plugins are those of the folder `plugins`, with their default settings; what a loss offers beside its defaults is
//! tried with one optimizer. New plugins are tried without a change here.

use clip_host_tests::fixtures::first_party_plugins;
use clip_host_tests::golden::read_tensors;
use clip_host_tests::host::{Folder, newest_checkpoint, run, small_run};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Names of all plugins of a kind.
fn ids(kind: &str) -> Vec<String> {
    let ids: Vec<String> =
        first_party_plugins().into_iter().filter(|plugin| plugin.kind == kind).map(|plugin| plugin.id).collect();
    assert!(ids.len() > 1, "{kind}: {ids:?}");
    ids
}

/// What one run differs in.
struct Combination {
    loss: String,
    optimizer: String,
    precision: &'static str,
}

impl Combination {
    /// Trains three steps and fails unless all that the run reports and keeps is finite.
    fn train(&self, folder: &Folder, number: usize) {
        let Combination { loss, optimizer, precision } = self;
        let out = format!("run{number}");
        let sets = [format!("loss={loss}"), format!("optimizer={optimizer}"), format!("precision={precision}")];
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> =
            ["run", "small.ron", "--steps", "3", "--json", "--out", &out].into_iter().chain(sets).collect();
        let what = format!("{loss} with {optimizer} in {precision}");
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
                let loss = format!(r#"(plugin: "{loss}")"#);
                let optimizer = format!(r#"(plugin: "{optimizer}", lr: 1e-3, weight_decay: 0.02)"#);
                combinations.push(Combination { loss, optimizer, precision });
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
            let optimizer = r#"(plugin: "adamw", lr: 1e-3, weight_decay: 0.02)"#.into();
            combinations.push(Combination { loss: loss.into(), optimizer, precision });
        }
    }
    train_all("modes", &combinations);
}
