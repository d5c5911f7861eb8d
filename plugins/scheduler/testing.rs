//! What the schedulers' tests share: golden cases, each place of which is asked for in order. Included by path.
#![allow(dead_code)]

#[path = "../../tests/support/golden.rs"]
mod golden;

use clip_host_plugin_api::scheduler::{Progress, Scheduler};
use clip_host_plugin_api::serde_json::Value;

pub use golden::Case;

/// The place of a step in a run of one step an epoch.
pub fn at(base_lr: f64, step: u64, length: u64) -> Progress {
    let (total_steps, epochs, metric) = (length, length, None);
    Progress { base_lr, step, steps_per_epoch: 1, total_steps, epoch: step, epochs, metric, evaluations: 0 }
}

/// Compares the rates of a case whose indexes are epochs, or steps of a run of one step an epoch; where it has metrics,
/// each is that of an evaluation just before.
pub fn check<S: Scheduler>(name: &str, config: &S::Config, length: u64) {
    let case = Case::load("schedulers", name);
    let mut state = Value::Null;
    for (place, (&index, &expected)) in case.tensor("index").iter().zip(case.tensor("lr")).enumerate() {
        let mut progress = at(case.number("lr"), index as u64, length);
        if case.has("metric") {
            (progress.metric, progress.evaluations) = (Some(case.tensor("metric")[place]), place as u64 + 1);
        }
        let lr = S::lr(config, &progress, &mut state).expect("the settings are good");
        // Each rate by itself: a peak must not hide what is near zero.
        assert!((lr - expected).abs() <= 1e-9 * expected, "{name} at {index}: expected {expected}, got {lr}");
    }
}

/// The words with which settings are refused.
pub fn refusal<S: Scheduler>(config: &S::Config) -> String {
    let refused = S::lr(config, &at(1.0, 0, 10), &mut Value::Null);
    refused.expect_err("the settings are refused").to_string()
}
