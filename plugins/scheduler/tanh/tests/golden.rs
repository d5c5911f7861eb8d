//! Learning rates against timm's scheduler.

#[path = "../../testing.rs"]
mod testing;

use clip_host_plugin_api::scheduler::{Scheduler, Unit};
use clip_host_plugin_api::serde_json::Value;
use clip_scheduler_tanh::{Tanh, TanhConfig};
use testing::{Case, at, check, refusal};

#[test]
fn timm() {
    for name in ["tanh", "tanh_restarts_prefix"] {
        let case = Case::load("schedulers", name);
        let config = TanhConfig {
            unit: Unit::Epoch,
            lb: case.number("lb"),
            ub: case.number("ub"),
            warmup_steps: 0,
            warmup_epochs: case.number("warmup_t"),
            warmup_lr: case.number("warmup_lr_init"),
            warmup_prefix: case.entry["hyperparameters"]["warmup_prefix"].as_bool().unwrap(),
            min_lr: case.number("lr_min"),
            t_initial: case.number("t_initial"),
            t_mul: case.number("t_mul"),
            decay_rate: case.number("decay_rate"),
            cycle_limit: case.count("cycle_limit") as u32,
        };
        check::<Tanh>(name, &config, 34);
        check::<Tanh>(name, &TanhConfig { unit: Unit::EpochFraction, ..config }, 34);
    }
}

/// Without a length it is the run's: from just below the base rate to just above the least.
#[test]
fn the_length_of_the_run_is_found() {
    let lr = |step| Tanh::lr(&TanhConfig::default(), &at(1.0, step, 100), &mut Value::Null).unwrap();
    let edge = |x: f64| 0.5 * (1.0 - x.tanh());
    assert_eq!((lr(0), lr(60), lr(100)), (edge(-6.0), edge(-6.0 * 0.4 + 4.0 * 0.6), 0.0));
}

#[test]
fn impossible_settings_are_refused() {
    for config in [
        TanhConfig { lb: 1.0, ub: 1.0, ..Default::default() },
        TanhConfig { t_mul: 0.5, ..Default::default() },
        TanhConfig { t_initial: -1.0, ..Default::default() },
    ] {
        assert!(refusal::<Tanh>(&config).contains("tanh takes lb < ub"), "{config:?}");
    }
    let error = refusal::<Tanh>(&TanhConfig { warmup_steps: 1, warmup_epochs: 1.0, ..Default::default() });
    assert!(error.contains("either warmup_steps or warmup_epochs"), "{error}");
}
