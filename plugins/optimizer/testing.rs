//! What the optimizers' tests share: golden cases replayed in f64. Included by path.
#![allow(dead_code)]

#[path = "../../tests/support/golden.rs"]
mod golden;

use clip_host_plugin_api::optimizer::Optimizer;
use clip_host_plugin_api::testing::Harness;
use golden::close;
use std::collections::BTreeSet;

pub use golden::Case;

/// The manifest's tolerance for implementations in f64.
pub const EXACT: f64 = 1e-11;

/// The parameters of every case: a matrix, a vector, a convolution's filters and a scalar.
pub const PARAMS: [&str; 4] = ["p0", "p1", "p2", "p3"];

/// Runs a case's steps on one parameter, whose value after each step is compared; returns the states after the last.
pub fn run<O: Optimizer>(case: &Case, config: &O::Config, param: &str) -> Harness {
    let initial = format!("param_init.{param}");
    let decay = case.entry["hyperparameters"]["weight_decay_per_parameter"][param].as_f64().expect("a number");
    let mut harness = Harness::optimizer::<O>(config, &case.shape(&initial), decay).expect("the settings are good");
    harness.set("param", case.tensor(&initial).to_vec());
    for step in 0..case.count("steps") {
        harness.set("grad", case.step(&format!("grad.{param}"), step).to_vec());
        // Cases without a rate are of optimizers that find their own.
        let lr = if case.has("lr") { case.step("lr", step)[0] } else { f64::NAN };
        for (scalar, value) in O::scalars(config, step as u64 + 1, lr) {
            harness.set(&format!("scalar.{scalar}"), [value]);
        }
        let new = harness.step(None, &[]).expect("the update runs").outputs.remove("param").expect("the new value");
        case.compare_step(&format!("param_after.{param}"), step, &new, EXACT);
        harness.set("param", new);
    }
    harness
}

/// Runs a case on all its parameters and compares their values after each step, and all states after the last but those
/// that the plugin does not keep: the number of steps, and what `absent` names.
pub fn check<O: Optimizer>(name: &str, config: &O::Config, absent: &[&str]) {
    let case = Case::load("optimizers", name);
    for param in PARAMS {
        let harness = run::<O>(&case, config, param);
        let mut kept: BTreeSet<&str> = harness.values.keys().map(String::as_str).collect();
        kept.retain(|name| !["param", "grad"].contains(name) && !name.starts_with("scalar."));
        for tensor in case.entry["tensors"].as_object().expect("cases have tensors").keys() {
            let state = tensor.strip_prefix("state.").and_then(|rest| rest.strip_suffix(&format!(".{param}")));
            let Some(state) = state.filter(|state| *state != "step" && !absent.contains(state)) else { continue };
            assert!(kept.remove(state), "{name}: the plugin keeps no `{state}` for {param}");
            close(&format!("{name} {tensor}"), &harness.values[state], case.tensor(tensor), EXACT);
        }
        assert!(kept.is_empty(), "{name}: the reference keeps no {kept:?} for {param}");
    }
}

/// The words with which settings are refused.
pub fn refusal<O: Optimizer>(config: &O::Config) -> String {
    let refused = Harness::optimizer::<O>(config, &[2, 3], 0.0);
    refused.err().expect("the settings are refused").to_string()
}
