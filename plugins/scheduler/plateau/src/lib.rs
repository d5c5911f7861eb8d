//! The learning rate falls when a metric has stopped improving, after an optional linear warm-up.
//!
//! The metric is the newest evaluation's main one, `mean_recall`. More than `patience` evaluations in a row that are no
//! better than the best multiply the rate by `factor`; evaluations during the `cooldown` after that do not count.
//!
//! The rule and the settings' names are those of PyTorch's `ReduceLROnPlateau`; the warm-up is that of timm's
//! `PlateauLRScheduler`, which the CLIP studies use: the rule sees no evaluation of the warm-up's epochs, that at its end
//! included.

use clip_host_plugin_api::prelude::*;
use clip_host_plugin_api::scheduler::Unit;
use clip_host_plugin_api::serde_json::{self, Value};

/// What a better metric is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A larger one.
    #[default]
    Max,
    /// A smaller one.
    Min,
}

/// What the threshold is measured in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ThresholdMode {
    /// Shares of the best metric.
    #[default]
    Rel,
    /// The metric itself.
    Abs,
}

/// Settings of the `plateau` scheduler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PlateauConfig {
    /// What a better metric is.
    pub mode: Mode,
    /// What the rate is multiplied by, below 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub factor: f64,
    /// Evaluations without improvement that are put up with.
    pub patience: u64,
    /// By how much a metric must be better than the best one to count as an improvement.
    #[schemars(range(min = 0.0))]
    pub threshold: f64,
    /// What the threshold is measured in.
    pub threshold_mode: ThresholdMode,
    /// Evaluations after a fall of the rate that do not count as bad.
    pub cooldown: u64,
    /// The rate falls no further than this.
    #[schemars(range(min = 0.0))]
    pub min_lr: f64,
    /// Falls by no more than this do not happen.
    #[schemars(range(min = 0.0))]
    pub eps: f64,
    /// Length of the warm-up in epochs: the rate rises from epoch to epoch.
    pub warmup_epochs: u64,
    /// Learning rate at which the warm-up begins.
    #[schemars(range(min = 0.0))]
    pub warmup_lr: f64,
}

impl Default for PlateauConfig {
    fn default() -> Self {
        PlateauConfig {
            mode: Mode::Max,
            factor: 0.1,
            patience: 10,
            threshold: 1e-4,
            threshold_mode: ThresholdMode::Rel,
            cooldown: 0,
            min_lr: 0.0,
            eps: 1e-8,
            warmup_epochs: 0,
            warmup_lr: 0.0,
        }
    }
}

impl PlateauConfig {
    fn is_better(&self, metric: f64, best: f64) -> bool {
        match (self.mode, self.threshold_mode) {
            (Mode::Max, ThresholdMode::Rel) => metric > best * (1.0 + self.threshold),
            (Mode::Max, ThresholdMode::Abs) => metric > best + self.threshold,
            (Mode::Min, ThresholdMode::Rel) => metric < best * (1.0 - self.threshold),
            (Mode::Min, ThresholdMode::Abs) => metric < best - self.threshold,
        }
    }
}

/// What the schedule remembers.
#[derive(Debug, Default, Serialize, Deserialize)]
struct PlateauState {
    /// The rate after the falls so far; the base rate if there was none.
    lr: Option<f64>,
    best: Option<f64>,
    bad_evaluations: u64,
    cooldown_left: u64,
    /// Evaluations that are accounted for.
    seen: u64,
}

impl PlateauState {
    /// Takes in an evaluation; the rate before it is `lr`.
    fn evaluated(&mut self, config: &PlateauConfig, metric: f64, lr: f64) {
        if self.best.is_none_or(|best| config.is_better(metric, best)) {
            self.best = Some(metric);
            self.bad_evaluations = 0;
        } else {
            self.bad_evaluations += 1;
        }
        if self.cooldown_left > 0 {
            self.cooldown_left -= 1;
            self.bad_evaluations = 0;
        }
        if self.bad_evaluations > config.patience {
            let new = (lr * config.factor).max(config.min_lr);
            if lr - new > config.eps {
                self.lr = Some(new);
            }
            self.cooldown_left = config.cooldown;
            self.bad_evaluations = 0;
        }
    }
}

/// The scheduler.
pub struct Plateau;

impl Plugin for Plateau {
    type Config = PlateauConfig;
    const ID: &'static str = "plateau";
    const DOC: &'static str = "Falls when the metric of evaluations stops improving, after an optional linear warm-up.";
}

impl Scheduler for Plateau {
    fn lr(config: &PlateauConfig, progress: &Progress, state: &mut Value) -> Result<f64, BuildError> {
        if !((0.0..1.0).contains(&config.factor) && config.threshold >= 0.0) {
            let got = format!("it got {} and {}", config.factor, config.threshold);
            return Err(BuildError::new(format!("plateau takes factor in [0, 1) and threshold >= 0; {got}")));
        }
        let refuse =
            |error: serde_json::Error| BuildError::new(format!("the state of plateau is not its own: {error}"));
        let mut memory = match state.take() {
            Value::Null => PlateauState::default(),
            value => serde_json::from_value(value).map_err(refuse)?,
        };
        let clock = progress.clock(Unit::Epoch);
        let warmup = config.warmup_epochs as f64;
        let lr = memory.lr.unwrap_or(progress.base_lr);
        if let Some(metric) = progress.metric.filter(|_| progress.evaluations > memory.seen) {
            memory.seen = progress.evaluations;
            if clock.now > warmup {
                memory.evaluated(config, metric, lr);
            }
        }
        let lr = memory.lr.unwrap_or(progress.base_lr);
        *state = serde_json::to_value(&memory).map_err(refuse)?;
        match clock.now < warmup {
            true => Ok(config.warmup_lr + (progress.base_lr - config.warmup_lr) * clock.now / warmup),
            false => Ok(lr),
        }
    }
}

#[cfg(feature = "export")]
export_plugin!(scheduler, Plateau);
