//! Eight updates in f64 against the reference implementations' numbers.

#[path = "../../testing.rs"]
mod testing;

use clip_host_plugin_api::optimizer::Optimizer;
use clip_host_plugin_api::testing::Harness;
use clip_optimizer_novograd::{NovoGrad, NovoGradConfig, Variant};
use testing::{check, refusal};

#[test]
fn nvidia() {
    let config = NovoGradConfig::default();
    check::<NovoGrad>("nvnovograd", &config, &[]);
    check::<NovoGrad>("nvnovograd_wd", &config, &[]);
    let config = NovoGradConfig { grad_averaging: true, amsgrad: true, ..config };
    check::<NovoGrad>("nvnovograd_averaging_amsgrad", &config, &[]);
    check::<NovoGrad>("nvnovograd_averaging_amsgrad_wd", &config, &[]);
}

/// The decay of `novograd_seed_constructor_wd` is that of all parameters, the vector too.
#[test]
fn original() {
    let config = NovoGradConfig { variant: Variant::Original, ..Default::default() };
    check::<NovoGrad>("novograd_seed", &config, &[]);
    check::<NovoGrad>("novograd_seed_constructor_wd", &config, &[]);
    let config = NovoGradConfig { grad_averaging: true, ..config };
    check::<NovoGrad>("novograd_seed_averaging", &config, &[]);
}

/// A parameter that a step does not reach does not move, and its first gradient still counts as the first.
#[test]
fn a_zero_gradient_does_not_move() {
    let config = NovoGradConfig::default();
    let mut harness = Harness::optimizer::<NovoGrad>(&config, &[2], 0.0).unwrap();
    for (step, grad, moved, v) in [(1, [0.0, 0.0], [0.0, 0.0], 0.0), (2, [3.0, 4.0], [-0.6, -0.8], 25.0)] {
        harness.set("param", [0.0, 0.0]).set("grad", grad);
        for (scalar, value) in NovoGrad::scalars(&config, step, 1.0) {
            harness.set(&format!("scalar.{scalar}"), [value]);
        }
        let new = harness.step(None, &[]).unwrap().outputs.remove("param").unwrap();
        assert!(new.iter().zip(moved).all(|(a, b)| (a - b).abs() < 1e-8), "step {step}: {new:?}");
        assert_eq!(harness.values["exp_avg_sq"], [v]);
    }
}

#[test]
fn impossible_settings_are_refused() {
    let error = refusal::<NovoGrad>(&NovoGradConfig { betas: [0.9, 1.0], ..Default::default() });
    assert!(error.contains("betas in [0, 1)"), "{error}");
    let config = NovoGradConfig { variant: Variant::Original, amsgrad: true, ..Default::default() };
    assert!(refusal::<NovoGrad>(&config).contains("amsgrad with variant"));
}
