//! Eight updates in f64 against the reference implementations' numbers.

#[path = "../../../../tests/support/golden.rs"]
mod golden;

use clip_host_plugin_api::optimizer::Optimizer;
use clip_host_plugin_api::testing::Harness;
use clip_optimizer_radam::{RAdam, RAdamConfig, Variant};
use golden::{Case, close};

/// The manifest's tolerance for implementations in f64.
const EXACT: f64 = 1e-11;

fn check(name: &str, config: &RAdamConfig) {
    let case = Case::load("optimizers", name);
    for param in ["p0", "p1", "p2", "p3"] {
        let initial = format!("param_init.{param}");
        let decay = case.entry["hyperparameters"]["weight_decay_per_parameter"][param].as_f64().unwrap();
        let mut harness = Harness::optimizer::<RAdam>(config, &case.shape(&initial), decay).unwrap();
        harness.set("param", case.tensor(&initial).to_vec());
        for step in 0..case.count("steps") {
            harness.set("grad", case.step(&format!("grad.{param}"), step).to_vec());
            let lr = case.step("lr", step)[0];
            for (scalar, value) in RAdam::scalars(config, step as u64 + 1, lr) {
                harness.set(&format!("scalar.{scalar}"), [value]);
            }
            let new = harness.step(None, &[]).unwrap().outputs.remove("param").unwrap();
            case.compare_step(&format!("param_after.{param}"), step, &new, EXACT);
            harness.set("param", new);
        }
        for state in ["exp_avg", "exp_avg_sq"] {
            let tensor = format!("state.{state}.{param}");
            close(&tensor, &harness.values[state], case.tensor(&tensor), EXACT);
        }
    }
}

#[test]
fn original() {
    check("radam_seed", &RAdamConfig::default());
    check("radam_seed_wd", &RAdamConfig::default());
}

#[test]
fn torch() {
    let config = RAdamConfig { variant: Variant::Torch, ..Default::default() };
    check("radam_torch", &config);
    check("radam_torch_wd", &config);
}

/// The cases above cross the step at which the rectification begins.
#[test]
fn rectified_from_the_sixth_step() {
    let rectified = |step| RAdam::scalars(&RAdamConfig::default(), step, 1.0).contains(&("rectified", 1.0));
    assert!(!rectified(5) && rectified(6));
}

/// In the authors' code p3, whose group has a tenth of the rate, moves with the first group's step size. That is all that
/// differs: with that step size put in, the numbers are theirs; by itself the plugin keeps to the group's rate.
#[test]
fn shared_step_size_is_not_repeated() {
    let case = Case::load("optimizers", "radam_seed_shared_buffer");
    let config = RAdamConfig::default();
    let run = |shared: bool| {
        let mut harness = Harness::optimizer::<RAdam>(&config, &[], 0.02).unwrap();
        harness.set("param", case.tensor("param_init.p3").to_vec());
        for step in 0..case.count("steps") {
            harness.set("grad", case.step("grad.p3", step).to_vec());
            let lr = case.step("lr", step)[0];
            for (scalar, value) in RAdam::scalars(&config, step as u64 + 1, lr / 10.0) {
                let factor = if shared && scalar == "step_size" { 10.0 } else { 1.0 };
                harness.set(&format!("scalar.{scalar}"), [value * factor]);
            }
            let new = harness.step(None, &[]).unwrap().outputs.remove("param").unwrap();
            harness.set("param", new);
        }
        harness.values["param"].clone()
    };
    case.compare_step("param_after.p3", case.count("steps") - 1, &run(true), EXACT);
    assert!((run(false)[0] - run(true)[0]).abs() > 1e-3);
}

#[test]
fn impossible_settings_are_refused() {
    let config = RAdamConfig { betas: [0.9, 1.0], ..Default::default() };
    let error = Harness::optimizer::<RAdam>(&config, &[2], 0.0).err().unwrap().to_string();
    assert!(error.contains("betas in [0, 1)"), "{error}");
    let shared = clip_host_plugin_api::serde_json::json!({ "shared_step_size": true });
    assert!(clip_host_plugin_api::serde_json::from_value::<RAdamConfig>(shared).is_err());
}
