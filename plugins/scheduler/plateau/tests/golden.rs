//! Learning rates against timm's scheduler over PyTorch's rule.

#[path = "../../testing.rs"]
mod testing;

use clip_host_plugin_api::scheduler::{Progress, Scheduler};
use clip_host_plugin_api::serde_json::Value;
use clip_scheduler_plateau::{Mode, Plateau, PlateauConfig, ThresholdMode};
use testing::{Case, at, check, refusal};

#[test]
fn timm() {
    for (name, mode) in [("plateau_max", Mode::Max), ("plateau_min_cooldown", Mode::Min)] {
        let case = Case::load("schedulers", name);
        let config = PlateauConfig {
            mode,
            factor: case.number("decay_rate"),
            patience: case.count("patience_t") as u64,
            threshold: case.number("threshold"),
            threshold_mode: ThresholdMode::Rel,
            cooldown: case.count("cooldown_t") as u64,
            min_lr: case.number("lr_min"),
            eps: 1e-8,
            warmup_epochs: case.count("warmup_t") as u64,
            warmup_lr: case.number("warmup_lr_init"),
        };
        check::<Plateau>(name, &config, 30);
    }
}

/// Rates of one step after each evaluation, from epoch 1 on.
fn rates(config: &PlateauConfig, metrics: &[f64]) -> Vec<f64> {
    let mut state = Value::Null;
    let after = metrics.iter().zip(1..).map(|(&metric, epoch)| {
        let progress = Progress { metric: Some(metric), evaluations: epoch, ..at(1.0, epoch, 30) };
        Plateau::lr(config, &progress, &mut state).unwrap()
    });
    after.collect()
}

/// One evaluation counts once, however many steps and epochs see it.
#[test]
fn an_evaluation_counts_once() {
    let config = PlateauConfig { factor: 0.5, patience: 0, ..Default::default() };
    let mut state = Value::Null;
    let mut lr = |step, evaluations| {
        let progress = Progress { metric: Some(0.5), evaluations, ..at(1.0, step, 30) };
        Plateau::lr(&config, &progress, &mut state).unwrap()
    };
    assert_eq!((lr(1, 1), lr(2, 1), lr(3, 1)), (1.0, 1.0, 1.0));
    assert_eq!((lr(4, 2), lr(5, 2)), (0.5, 0.5));
}

#[test]
fn absolute_threshold() {
    let config = PlateauConfig {
        factor: 0.5,
        patience: 0,
        threshold: 0.25,
        threshold_mode: ThresholdMode::Abs,
        ..Default::default()
    };
    // 2.25 is no better than 2 by more than a quarter, 2.5 is.
    assert_eq!(rates(&config, &[2.0, 2.25, 2.5]), [1.0, 0.5, 0.5]);
    let down = PlateauConfig { mode: Mode::Min, ..config };
    assert_eq!(rates(&down, &[2.0, 1.75, 1.5]), [1.0, 0.5, 0.5]);
}

#[test]
fn the_rate_has_a_floor() {
    let config = PlateauConfig { factor: 0.1, patience: 0, min_lr: 0.05, ..Default::default() };
    assert_eq!(rates(&config, &[1.0; 4]), [1.0, 0.1, 0.05, 0.05]);
}

/// Without evaluations the rate stays; what another scheduler remembered is refused.
#[test]
fn no_metric_and_a_foreign_state() {
    let config = PlateauConfig::default();
    assert_eq!(Plateau::lr(&config, &at(1.0, 5, 30), &mut Value::Null), Ok(1.0));
    let mut foreign = Value::from("something else");
    let error = Plateau::lr(&config, &at(1.0, 5, 30), &mut foreign).unwrap_err().to_string();
    assert!(error.contains("state of plateau"), "{error}");
}

#[test]
fn impossible_settings_are_refused() {
    for config in
        [PlateauConfig { factor: 1.0, ..Default::default() }, PlateauConfig { threshold: -1.0, ..Default::default() }]
    {
        assert!(refusal::<Plateau>(&config).contains("plateau takes factor in [0, 1)"), "{config:?}");
    }
}
