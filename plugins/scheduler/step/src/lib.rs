//! The learning rate falls by a factor at regular intervals: lr = base·decay_rate^⌊t/decay_t⌋, after an optional linear
//! warm-up, whose time counts.
//!
//! The settings' names are those of timm's `StepLRScheduler`, which the CLIP studies use; without a warm-up it is PyTorch's
//! `StepLR`.

use clip_host_plugin_api::prelude::*;
use clip_host_plugin_api::scheduler::Unit;
use clip_host_plugin_api::serde_json::Value;

/// Settings of the `step` scheduler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct StepConfig {
    /// What the schedule counts.
    pub unit: Unit,
    /// Time from one fall to the next, in units.
    #[schemars(range(min = 1e-9))]
    pub decay_t: f64,
    /// What the rate is multiplied by.
    #[schemars(range(min = 0.0))]
    pub decay_rate: f64,
    /// Length of the warm-up in steps; or give `warmup_epochs`.
    pub warmup_steps: u64,
    /// Length of the warm-up in epochs; or give `warmup_steps`.
    #[schemars(range(min = 0.0))]
    pub warmup_epochs: f64,
    /// Learning rate at which the warm-up begins.
    #[schemars(range(min = 0.0))]
    pub warmup_lr: f64,
}

impl Default for StepConfig {
    fn default() -> Self {
        StepConfig {
            unit: Unit::Epoch,
            decay_t: 30.0,
            decay_rate: 0.1,
            warmup_steps: 0,
            warmup_epochs: 0.0,
            warmup_lr: 0.0,
        }
    }
}

/// The scheduler.
pub struct Step;

impl Plugin for Step {
    type Config = StepConfig;
    const ID: &'static str = "step";
    const DOC: &'static str = "Falls by a factor at regular intervals, after an optional linear warm-up.";
}

impl Scheduler for Step {
    fn lr(config: &StepConfig, progress: &Progress, _: &mut Value) -> Result<f64, BuildError> {
        if !(config.decay_t > 0.0 && config.decay_rate >= 0.0) {
            let got = format!("it got {} and {}", config.decay_t, config.decay_rate);
            return Err(BuildError::new(format!("step takes decay_t > 0 and decay_rate >= 0; {got}")));
        }
        let clock = progress.clock(config.unit);
        let warmup = clock.warmup("step", config.warmup_steps, config.warmup_epochs)?;
        if clock.now < warmup {
            return Ok(config.warmup_lr + (progress.base_lr - config.warmup_lr) * clock.now / warmup);
        }
        Ok(progress.base_lr * config.decay_rate.powf((clock.now / config.decay_t).floor()))
    }
}

#[cfg(feature = "export")]
export_plugin!(scheduler, Step);
