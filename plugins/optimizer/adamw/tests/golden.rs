//! Eight updates in f64 against the reference implementations' numbers.

#[path = "../../../../tests/support/golden.rs"]
mod golden;

use clip_host_plugin_api::optimizer::Optimizer;
use clip_host_plugin_api::testing::Harness;
use clip_optimizer_adamw::{AdamW, AdamWConfig};
use golden::{Case, close};

/// The manifest's tolerance for implementations in f64.
const EXACT: f64 = 1e-11;

fn check(name: &str, config: &AdamWConfig) {
    let case = Case::load("optimizers", name);
    for param in ["p0", "p1", "p2", "p3"] {
        let initial = format!("param_init.{param}");
        let decay = case.entry["hyperparameters"]["weight_decay_per_parameter"][param].as_f64().unwrap();
        let mut harness = Harness::optimizer::<AdamW>(config, &case.shape(&initial), decay).unwrap();
        harness.set("param", case.tensor(&initial).to_vec());
        for step in 0..case.count("steps") {
            harness.set("grad", case.step(&format!("grad.{param}"), step).to_vec());
            let lr = case.step("lr", step)[0];
            for (scalar, value) in AdamW::scalars(config, step as u64 + 1, lr) {
                harness.set(&format!("scalar.{scalar}"), [value]);
            }
            let new = harness.step(None, &[]).unwrap().outputs.remove("param").unwrap();
            case.compare_step(&format!("param_after.{param}"), step, &new, EXACT);
            harness.set("param", new);
        }
        for state in states(config) {
            let tensor = format!("state.{state}.{param}");
            close(&tensor, &harness.values[state], case.tensor(&tensor), EXACT);
        }
    }
}

fn states(config: &AdamWConfig) -> Vec<&'static str> {
    let all = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"];
    all[..if config.amsgrad { 3 } else { 2 }].to_vec()
}

#[test]
fn adamw() {
    check("adamw", &AdamWConfig::default());
    check("adamw_wd", &AdamWConfig::default());
}

#[test]
fn amsgrad() {
    let config = AdamWConfig { amsgrad: true, ..Default::default() };
    check("adamw_amsgrad", &config);
    check("adamw_amsgrad_wd", &config);
}

#[test]
fn impossible_settings_are_refused() {
    let config = AdamWConfig { betas: [0.9, 1.0], ..Default::default() };
    let error = Harness::optimizer::<AdamW>(&config, &[2], 0.0).err().unwrap().to_string();
    assert!(error.contains("betas in [0, 1)"), "{error}");
}
