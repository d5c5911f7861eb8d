//! Eight updates in f64 against the reference implementations' numbers.

#[path = "../../testing.rs"]
mod testing;

use clip_host_plugin_api::optimizer::Optimizer;
use clip_host_plugin_api::testing::Harness;
use clip_optimizer_nadam::{NAdam, NAdamConfig};
use testing::{Case, EXACT, check, refusal};

/// One formula, whose product of momenta torch calls `mu_product` and the studies `m_schedule`.
#[test]
fn torch_and_the_studies() {
    for (name, product) in [
        ("nadam_torch", "mu_product"),
        ("nadam_torch_wd", "mu_product"),
        ("nadam_seed", "m_schedule"),
        ("nadam_seed_wd", "m_schedule"),
    ] {
        check::<NAdam>(name, &NAdamConfig::default(), &[product]);
        // The product that they keep is the one that ours follows from: grad_size = (1 − μ₈)/(1 − product).
        let scalars = NAdam::scalars(&NAdamConfig::default(), 8, 1.0);
        let grad_size = scalars.iter().find(|(scalar, _)| *scalar == "grad_size").unwrap().1;
        let momentum = 0.9 * (1.0 - 0.5 * 0.96f64.powf(8.0 * 4e-3));
        let expected = Case::load("optimizers", name).tensor(&format!("state.{product}.p0"))[0];
        assert!((1.0 - (1.0 - momentum) / grad_size - expected).abs() < EXACT, "{name}");
    }
}

/// Decoupled: with a gradient of zero the parameter shrinks by lr·decay, and nothing else happens.
#[test]
fn decoupled_decay_stays_out_of_the_moments() {
    let config = NAdamConfig { decoupled_weight_decay: true, ..Default::default() };
    let mut harness = Harness::optimizer::<NAdam>(&config, &[1], 0.5).unwrap();
    harness.set("param", [2.0]).set("grad", [0.0]);
    for (scalar, value) in NAdam::scalars(&config, 1, 0.1) {
        harness.set(&format!("scalar.{scalar}"), [value]);
    }
    let new = harness.step(None, &[]).unwrap().outputs["param"][0];
    assert!((new - 1.9).abs() < 1e-15, "{new}");
    assert_eq!(harness.values["exp_avg"], [0.0]);
}

#[test]
fn impossible_settings_are_refused() {
    let error = refusal::<NAdam>(&NAdamConfig { betas: [0.9, 1.0], ..Default::default() });
    assert!(error.contains("betas in [0, 1)"), "{error}");
    let error = refusal::<NAdam>(&NAdamConfig { momentum_decay: -1.0, ..Default::default() });
    assert!(error.contains("momentum_decay >= 0") && error.contains("got -1"), "{error}");
}
