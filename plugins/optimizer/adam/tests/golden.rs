//! Eight updates in f64 against the reference implementation's numbers.

#[path = "../../testing.rs"]
mod testing;

use clip_host_plugin_api::optimizer::Optimizer;
use clip_host_plugin_api::testing::Harness;
use clip_optimizer_adam::{Adam, AdamConfig};
use testing::{check, refusal};

#[test]
fn adam() {
    check::<Adam>("adam", &AdamConfig::default(), &[]);
    check::<Adam>("adam_wd", &AdamConfig::default(), &[]);
}

/// A large gradient, then small ones: v falls, what AMSGrad divides by does not. (torch's numbers for AMSGrad are in
/// adamw's tests; without decay both optimizers are one.)
#[test]
fn amsgrad_keeps_the_largest_moment() {
    let config = AdamConfig { betas: [0.0, 0.5], eps: 0.0, amsgrad: true };
    let mut harness = Harness::optimizer::<Adam>(&config, &[1], 0.0).unwrap();
    for (step, grad, largest) in [(1, 4.0, 8.0), (2, 1.0, 8.0), (3, 1.0, 8.0f64)] {
        harness.set("param", [0.0]).set("grad", [grad]);
        for (scalar, value) in Adam::scalars(&config, step, 1.0) {
            harness.set(&format!("scalar.{scalar}"), [value]);
        }
        let moved = harness.step(None, &[]).unwrap().outputs["param"][0];
        let expected = -grad / (largest / (1.0 - 0.5f64.powi(step as i32))).sqrt();
        assert!((moved - expected).abs() < 1e-12, "step {step}: {moved} is not {expected}");
    }
    assert!(harness.values["exp_avg_sq"][0] < 8.0);
}

#[test]
fn impossible_settings_are_refused() {
    let error = refusal::<Adam>(&AdamConfig { betas: [1.0, 0.9], ..Default::default() });
    assert!(error.contains("betas in [0, 1)"), "{error}");
}
