//! Learning rates against timm's scheduler.

#[path = "../../testing.rs"]
mod testing;

use clip_host_plugin_api::scheduler::{Progress, Scheduler, Unit};
use clip_host_plugin_api::serde_json::Value;
use clip_scheduler_step::{Step, StepConfig};
use testing::{Case, at, check, refusal};

#[test]
fn timm() {
    for name in ["step", "step_no_warmup"] {
        let case = Case::load("schedulers", name);
        let config = StepConfig {
            unit: Unit::Epoch,
            decay_t: case.number("decay_t"),
            decay_rate: case.number("decay_rate"),
            warmup_epochs: case.number("warmup_t"),
            warmup_lr: case.number("warmup_lr_init"),
            ..Default::default()
        };
        check::<Step>(name, &config, 30);
        // Steps are epochs here, so all units say the same.
        check::<Step>(name, &StepConfig { unit: Unit::Step, ..config.clone() }, 30);
        check::<Step>(name, &StepConfig { unit: Unit::EpochFraction, ..config }, 30);
    }
}

/// The rate holds for all steps of its interval.
#[test]
fn steps_within_an_epoch() {
    let config = StepConfig { decay_t: 2.0, decay_rate: 0.5, ..Default::default() };
    let lr = |step: u64| {
        let progress = Progress { steps_per_epoch: 10, epoch: step / 10, ..at(1.0, step, 100) };
        Step::lr(&config, &progress, &mut Value::Null).unwrap()
    };
    assert_eq!((lr(0), lr(19), lr(20), lr(39), lr(40)), (1.0, 1.0, 0.5, 0.5, 0.25));
}

#[test]
fn impossible_settings_are_refused() {
    let error = refusal::<Step>(&StepConfig { decay_t: 0.0, ..Default::default() });
    assert!(error.contains("decay_t > 0") && error.contains("got 0"), "{error}");
    let error = refusal::<Step>(&StepConfig { warmup_steps: 1, warmup_epochs: 1.0, ..Default::default() });
    assert!(error.contains("either warmup_steps or warmup_epochs"), "{error}");
}
