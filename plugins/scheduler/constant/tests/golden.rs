//! Learning rates against open_clip's.

#[path = "../../../../tests/support/golden.rs"]
mod golden;

use clip_host_plugin_api::scheduler::{Progress, Scheduler};
use clip_host_plugin_api::serde_json::Value;
use clip_scheduler_constant::{Constant, ConstantConfig};
use golden::Case;

fn at(step: u64) -> Progress {
    Progress {
        base_lr: 5e-4,
        step,
        steps_per_epoch: 10,
        total_steps: 150,
        epoch: step / 10,
        epochs: 15,
        metric: None,
        evaluations: 0,
    }
}

#[test]
fn open_clip() {
    let case = Case::load("schedulers", "openclip_const");
    let in_steps = ConstantConfig {
        warmup_steps: case.count("warmup_steps") as u64,
        warmup_counts_from_one: true,
        ..Default::default()
    };
    let in_epochs = ConstantConfig { warmup_steps: 0, warmup_epochs: 2.0, ..in_steps.clone() };
    for config in [in_steps, in_epochs] {
        for (&index, &expected) in case.tensor("index").iter().zip(case.tensor("lr")) {
            let lr = Constant::lr(&config, &at(index as u64), &mut Value::Null).unwrap();
            assert!((lr - expected).abs() <= 1e-9 * expected, "step {index}: expected {expected}, got {lr}");
        }
    }
}

#[test]
fn without_warmup() {
    assert_eq!(Constant::lr(&ConstantConfig::default(), &at(0), &mut Value::Null), Ok(5e-4));
}

#[test]
fn warmup_starts_at_its_rate() {
    let config = ConstantConfig { warmup_steps: 4, warmup_lr: 1e-4, ..Default::default() };
    let lr = |step| Constant::lr(&config, &at(step), &mut Value::Null).unwrap();
    assert_eq!(lr(0), 1e-4);
    assert!((lr(2) - 3e-4).abs() < 1e-15);
    assert_eq!(lr(4), 5e-4);
}

/// open_clip's `const_lr_cooldown`: ((1 − e/es)^power)·(base − end) + end at step e of the last es. (No golden case has it.)
#[test]
fn cooldown() {
    let config = ConstantConfig {
        warmup_steps: 20,
        cooldown_steps: 50,
        cooldown_lr: 1e-4,
        cooldown_power: 2.0,
        ..Default::default()
    };
    let in_epochs = ConstantConfig { cooldown_steps: 0, cooldown_epochs: 5.0, ..config.clone() };
    for config in [config, in_epochs] {
        let lr = |step| Constant::lr(&config, &at(step), &mut Value::Null).unwrap();
        assert_eq!((lr(20), lr(99), lr(100), lr(150)), (5e-4, 5e-4, 5e-4, 1e-4));
        for step in 100..150 {
            let expected = (1.0 - (step - 100) as f64 / 50.0).powi(2) * (5e-4 - 1e-4) + 1e-4;
            assert!((lr(step) - expected).abs() < 1e-15, "step {step}: expected {expected}, got {}", lr(step));
        }
    }
}

#[test]
fn two_warmups_are_refused() {
    let config = ConstantConfig { warmup_steps: 1, warmup_epochs: 1.0, ..Default::default() };
    assert!(Constant::lr(&config, &at(0), &mut Value::Null).is_err());
    let config = ConstantConfig { cooldown_steps: 1, cooldown_epochs: 1.0, ..Default::default() };
    assert!(Constant::lr(&config, &at(0), &mut Value::Null).is_err());
}
