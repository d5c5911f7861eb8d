//! Learning rates against timm's scheduler, the CLIP studies' loop and open_clip's schedule.

#[path = "../../../../tests/support/golden.rs"]
mod golden;

use clip_host_plugin_api::scheduler::{Progress, Scheduler, Unit};
use clip_host_plugin_api::serde_json::Value;
use clip_scheduler_cosine::{Cosine, CosineConfig};
use golden::Case;

/// Compares every index of a case; `progress` gives the place in training that an index stands for.
fn check(case: &Case, config: &CosineConfig, progress: impl Fn(u64) -> Progress) {
    for (&index, &expected) in case.tensor("index").iter().zip(case.tensor("lr")) {
        let lr = Cosine::lr(config, &progress(index as u64), &mut Value::Null).unwrap();
        let name = &case.name;
        assert!((lr - expected).abs() <= 1e-9 * expected, "{name} at {index}: expected {expected}, got {lr}");
    }
}

/// One step an epoch.
fn plain(case: &Case, length: u64) -> impl Fn(u64) -> Progress {
    let base_lr = case.number("lr");
    move |index| Progress {
        base_lr,
        step: index,
        steps_per_epoch: 1,
        total_steps: length,
        epoch: index,
        epochs: length,
        metric: None,
        evaluations: 0,
    }
}

/// The settings of the cases that run the studies' command line.
fn studies(case: &Case) -> CosineConfig {
    CosineConfig {
        unit: Unit::Epoch,
        warmup_epochs: case.number("warmup_t"),
        warmup_lr: case.number("warmup_lr"),
        min_lr: case.number("min_lr"),
        t_initial: case.number("t_initial"),
        t_mul: case.number("t_mul"),
        decay_rate: case.number("decay_rate"),
        cycle_limit: case.count("cycle_limit") as u32,
        ..Default::default()
    }
}

#[test]
fn timm_with_the_studies_defaults() {
    let case = Case::load("schedulers", "cosine_clip_defaults");
    check(&case, &studies(&case), plain(&case, 30));
    // Steps are epochs here, so both units say the same.
    check(&case, &CosineConfig { unit: Unit::Step, ..studies(&case) }, plain(&case, 30));
}

#[test]
fn the_studies_loop() {
    for name in ["cosine_seed_loop", "cosine_seed_loop_short_epoch"] {
        let case = Case::load("schedulers", name);
        let (base_lr, per_epoch) = (case.number("lr"), case.count("iterations_per_epoch") as u64);
        let config = CosineConfig { warmup_step_size: case.count("warmup_step_size") as u64, ..studies(&case) };
        let progress = |step| Progress {
            base_lr,
            step,
            steps_per_epoch: per_epoch,
            total_steps: 30 * per_epoch,
            epoch: step / per_epoch,
            epochs: 30,
            metric: None,
            evaluations: 0,
        };
        check(&case, &config, progress);
        // The length of the run is found without being told …
        check(&case, &CosineConfig { t_initial: 0.0, ..config.clone() }, progress);
        // … and the epochs can be those of another data set.
        check(&case, &CosineConfig { steps_per_epoch: per_epoch, ..config }, plain(&case, 30));
    }
}

#[test]
fn restarts() {
    for name in ["cosine_restarts", "cosine_restarts_no_prefix"] {
        let case = Case::load("schedulers", name);
        let config = CosineConfig {
            unit: Unit::Epoch,
            warmup_epochs: case.number("warmup_t"),
            warmup_lr: case.number("warmup_lr_init"),
            warmup_prefix: case.entry["hyperparameters"]["warmup_prefix"].as_bool().unwrap(),
            min_lr: case.number("lr_min"),
            t_initial: case.number("t_initial"),
            t_mul: case.number("t_mul"),
            decay_rate: case.number("decay_rate"),
            cycle_limit: case.count("cycle_limit") as u32,
            ..Default::default()
        };
        check(&case, &config, plain(&case, 36));
    }
}

#[test]
fn open_clip() {
    let case = Case::load("schedulers", "openclip_cosine");
    let config = CosineConfig {
        warmup_steps: case.count("warmup_steps") as u64,
        warmup_counts_from_one: true,
        ..Default::default()
    };
    check(&case, &config, plain(&case, case.count("total_steps") as u64));
    // The same warm-up in epochs of 10 steps.
    let config = CosineConfig { warmup_steps: 0, warmup_epochs: 2.0, ..config };
    let progress = plain(&case, 150);
    check(&case, &config, |index| Progress { steps_per_epoch: 10, epoch: index / 10, epochs: 15, ..progress(index) });
}

/// PyTorch's `CosineAnnealingWarmRestarts`, stepped at every epoch and at every eighth of one.
#[test]
fn torch_warm_restarts() {
    for (name, fractional) in [
        ("warm_restarts", false),
        ("warm_restarts_mult1", false),
        ("warm_restarts_fractional", true),
        ("warm_restarts_mult1_fractional", true),
    ] {
        let case = Case::load("schedulers", name);
        let config = CosineConfig {
            unit: if fractional { Unit::EpochFraction } else { Unit::Epoch },
            min_lr: case.number("eta_min"),
            t_initial: case.number("T_0"),
            t_mul: case.number("T_mult"),
            cycle_limit: 0,
            ..Default::default()
        };
        let (places, per_epoch) = if fractional { ("epoch", 8.0) } else { ("index", 1.0) };
        for (&epoch, &expected) in case.tensor(places).iter().zip(case.tensor("lr")) {
            let progress = Progress {
                step: (epoch * per_epoch) as u64,
                steps_per_epoch: per_epoch as u64,
                epoch: epoch as u64,
                ..plain(&case, 45)(0)
            };
            let lr = Cosine::lr(&config, &progress, &mut Value::Null).unwrap();
            assert!((lr - expected).abs() <= 1e-9 * expected, "{name} at {epoch}: expected {expected}, got {lr}");
        }
    }
}

/// Cycles of equal length start over.
#[test]
fn equal_cycles() {
    let config = CosineConfig { t_initial: 4.0, cycle_limit: 2, min_lr: 0.1, ..Default::default() };
    let case = Case::load("schedulers", "cosine_restarts");
    let lr = |step| {
        let progress = Progress { base_lr: 1.0, ..plain(&case, 100)(step) };
        Cosine::lr(&config, &progress, &mut Value::Null).unwrap()
    };
    assert_eq!((lr(0), lr(4), lr(8), lr(50)), (1.0, 1.0, 0.1, 0.1));
    assert_eq!(lr(1), lr(5));
    assert!((lr(2) - 0.55).abs() < 1e-12);
}

#[test]
fn impossible_settings_are_refused() {
    let case = Case::load("schedulers", "cosine_restarts");
    for config in [
        CosineConfig { warmup_steps: 1, warmup_epochs: 1.0, ..Default::default() },
        CosineConfig { warmup_step_size: 100, ..Default::default() },
        CosineConfig { t_mul: 0.5, ..Default::default() },
        CosineConfig { t_mul: f64::NAN, ..Default::default() },
    ] {
        assert!(Cosine::lr(&config, &plain(&case, 10)(0), &mut Value::Null).is_err(), "{config:?}");
    }
}
