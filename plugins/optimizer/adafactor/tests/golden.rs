//! Eight updates in f64 against the reference implementation's numbers.

#[path = "../../testing.rs"]
mod testing;

use clip_host_plugin_api::optimizer::Optimizer;
use clip_host_plugin_api::testing::Harness;
use clip_optimizer_adafactor::{Adafactor, AdafactorConfig};
use testing::{check, refusal};

/// The reference notes the parameter's root mean square, which nothing reads, for every parameter.
const ABSENT: [&str; 1] = ["RMS"];

#[test]
fn given_rate() {
    let config = AdafactorConfig::default();
    check::<Adafactor>("adafactor_lr", &config, &ABSENT);
    check::<Adafactor>("adafactor_lr_wd", &config, &ABSENT);
    let config = AdafactorConfig { beta1: Some(0.9), ..config };
    check::<Adafactor>("adafactor_lr_beta1", &config, &ABSENT);
    check::<Adafactor>("adafactor_lr_beta1_wd", &config, &ABSENT);
}

#[test]
fn relative_step() {
    let config = AdafactorConfig { relative_step: true, ..Default::default() };
    check::<Adafactor>("adafactor_relative", &config, &ABSENT);
    check::<Adafactor>("adafactor_relative_wd", &config, &ABSENT);
    let config = AdafactorConfig { scale_parameter: false, warmup_init: true, ..config };
    check::<Adafactor>("adafactor_relative_noscale_warmup", &config, &ABSENT);
    check::<Adafactor>("adafactor_relative_noscale_warmup_wd", &config, &ABSENT);
}

/// One step from `param` with gradient 1 everywhere.
fn moved(config: &AdafactorConfig, param: f64, lr: f64) -> f64 {
    let mut harness = Harness::optimizer::<Adafactor>(config, &[2, 3], 0.0).unwrap();
    harness.set("param", [param; 6]).set("grad", [1.0; 6]);
    for (scalar, value) in Adafactor::scalars(config, 1, lr) {
        harness.set(&format!("scalar.{scalar}"), [value]);
    }
    param - harness.step(None, &[]).unwrap().outputs["param"][0]
}

/// The studies' code lets a given rate be; fairseq scales it by the parameter.
#[test]
fn a_given_rate_is_scaled_where_it_is_asked_for() {
    let config = AdafactorConfig::default();
    assert!((moved(&config, 4.0, 0.1) - 0.1).abs() < 1e-12);
    let config = AdafactorConfig { scale_lr: true, ..config };
    assert!((moved(&config, 4.0, 0.1) - 0.4).abs() < 1e-12);
    assert!((moved(&config, 0.0, 0.1) - 0.1 * 1e-3).abs() < 1e-12);
}

#[test]
fn impossible_settings_are_refused() {
    for (config, takes) in [
        (AdafactorConfig { beta1: Some(1.0), ..Default::default() }, "beta1 in [0, 1)"),
        (AdafactorConfig { clip_threshold: 0.0, ..Default::default() }, "clip_threshold > 0"),
        (AdafactorConfig { decay_rate: 0.8, ..Default::default() }, "decay_rate <= 0"),
        (AdafactorConfig { warmup_init: true, ..Default::default() }, "warmup_init with relative_step"),
    ] {
        let error = refusal::<Adafactor>(&config);
        assert!(error.contains(takes), "{error}");
    }
}
