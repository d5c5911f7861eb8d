//! The recipe's learning rate all the time, after an optional linear warm-up and before an optional cool-down.
//!
//! A cool-down of n steps falls from the base rate to `cooldown_lr`: at its step i by lr = end + (base − end)·(1 − i/n)^power.
//! open_clip's schedules: `const` is `(warmup_steps: 10000, warmup_counts_from_one: true)`, `const-cooldown` the same with
//! `cooldown_epochs`.

use clip_host_plugin_api::prelude::*;
use clip_host_plugin_api::scheduler::Unit;
use clip_host_plugin_api::serde_json::Value;

/// Settings of the `constant` scheduler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConstantConfig {
    /// Length of the warm-up in steps; or give `warmup_epochs`.
    pub warmup_steps: u64,
    /// Length of the warm-up in epochs; or give `warmup_steps`.
    #[schemars(range(min = 0.0))]
    pub warmup_epochs: f64,
    /// Learning rate at which the warm-up begins.
    #[schemars(range(min = 0.0))]
    pub warmup_lr: f64,
    /// The first step is already one part above `warmup_lr`, and the last step of the warm-up has the full rate
    /// (open_clip); otherwise the first step has `warmup_lr` itself (timm).
    pub warmup_counts_from_one: bool,
    /// Length of the cool-down at the end of the run in steps; or give `cooldown_epochs`.
    pub cooldown_steps: u64,
    /// Length of the cool-down at the end of the run in epochs; or give `cooldown_steps`.
    #[schemars(range(min = 0.0))]
    pub cooldown_epochs: f64,
    /// Learning rate at which the cool-down would end, one step after the run's last.
    #[schemars(range(min = 0.0))]
    pub cooldown_lr: f64,
    /// The power of the time left that the cool-down follows: 1 is a straight line.
    #[schemars(range(min = 0.0))]
    pub cooldown_power: f64,
}

impl Default for ConstantConfig {
    fn default() -> Self {
        ConstantConfig {
            warmup_steps: 0,
            warmup_epochs: 0.0,
            warmup_lr: 0.0,
            warmup_counts_from_one: false,
            cooldown_steps: 0,
            cooldown_epochs: 0.0,
            cooldown_lr: 0.0,
            cooldown_power: 1.0,
        }
    }
}

/// The scheduler.
pub struct Constant;

impl Plugin for Constant {
    type Config = ConstantConfig;
    const ID: &'static str = "constant";
    const DOC: &'static str = "The base learning rate, with an optional linear warm-up and a cool-down.";
}

impl Scheduler for Constant {
    fn lr(config: &ConstantConfig, progress: &Progress, _: &mut Value) -> Result<f64, BuildError> {
        if config.cooldown_steps > 0 && config.cooldown_epochs > 0.0 {
            let got = format!("it got {} and {}", config.cooldown_steps, config.cooldown_epochs);
            return Err(BuildError::new(format!("constant takes either cooldown_steps or cooldown_epochs; {got}")));
        }
        let clock = progress.clock(Unit::Step);
        let warmup = clock.warmup("constant", config.warmup_steps, config.warmup_epochs)?;
        if clock.now < warmup {
            let done = clock.now + f64::from(u8::from(config.warmup_counts_from_one));
            return Ok(config.warmup_lr + (progress.base_lr - config.warmup_lr) * (done / warmup).min(1.0));
        }
        let cooldown = config.cooldown_steps as f64 + config.cooldown_epochs * clock.epoch;
        let left = clock.total - clock.now;
        if left >= cooldown {
            return Ok(progress.base_lr);
        }
        let share = (left / cooldown).max(0.0).powf(config.cooldown_power);
        Ok(config.cooldown_lr + (progress.base_lr - config.cooldown_lr) * share)
    }
}

#[cfg(feature = "export")]
export_plugin!(scheduler, Constant);
