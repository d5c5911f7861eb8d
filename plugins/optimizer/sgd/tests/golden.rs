//! Eight updates in f64 against the reference implementation's numbers.

#[path = "../../testing.rs"]
mod testing;

use clip_host_plugin_api::optimizer::Optimizer;
use clip_host_plugin_api::testing::Harness;
use clip_optimizer_sgd::{Sgd, SgdConfig};
use testing::{check, refusal};

#[test]
fn plain() {
    check::<Sgd>("sgd", &SgdConfig::default(), &[]);
    check::<Sgd>("sgd_wd", &SgdConfig::default(), &[]);
}

#[test]
fn momentum() {
    let config = SgdConfig { momentum: 0.9, ..Default::default() };
    check::<Sgd>("sgd_momentum", &config, &[]);
    check::<Sgd>("sgd_momentum_wd", &config, &[]);
    let config = SgdConfig { nesterov: true, ..config };
    check::<Sgd>("sgd_nesterov", &config, &[]);
    check::<Sgd>("sgd_nesterov_wd", &config, &[]);
}

/// As in torch, the first gradient enters whole: 1, then 0.5·1 + 0.75·1, then 0.5·1.25 + 0.75·1.
#[test]
fn dampening_spares_the_first_gradient() {
    let config = SgdConfig { momentum: 0.5, dampening: 0.25, nesterov: false };
    let mut harness = Harness::optimizer::<Sgd>(&config, &[1], 0.0).unwrap();
    harness.set("param", [0.0]).set("grad", [1.0]);
    for (step, expected) in [(1, 1.0), (2, 1.25), (3, 1.375)] {
        for (scalar, value) in Sgd::scalars(&config, step, 1.0) {
            harness.set(&format!("scalar.{scalar}"), [value]);
        }
        let moved = harness.step(None, &[]).unwrap().outputs["param"][0];
        assert_eq!((harness.values["momentum_buffer"][0], moved), (expected, -expected));
    }
}

#[test]
fn impossible_settings_are_refused() {
    for (momentum, dampening, nesterov) in [(-0.1, 0.0, false), (0.9, 1.5, false), (0.0, 0.0, true), (0.9, 0.1, true)] {
        let error = refusal::<Sgd>(&SgdConfig { momentum, dampening, nesterov });
        assert!(error.contains("sgd takes") && error.contains("it got"), "{error}");
    }
}
