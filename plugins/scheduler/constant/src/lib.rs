//! The recipe's learning rate all the time, after an optional linear warm-up.

use clip_host_plugin_api::prelude::*;
use clip_host_plugin_api::serde_json::Value;

/// Settings of the `constant` scheduler.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
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
}

/// The scheduler.
pub struct Constant;

impl Plugin for Constant {
    type Config = ConstantConfig;
    const ID: &'static str = "constant";
    const DOC: &'static str = "The base learning rate, after an optional linear warm-up.";
}

impl Scheduler for Constant {
    fn lr(config: &ConstantConfig, progress: &Progress, _: &mut Value) -> Result<f64, BuildError> {
        if config.warmup_steps > 0 && config.warmup_epochs > 0.0 {
            return Err(BuildError::new("constant takes either warmup_steps or warmup_epochs, it got both"));
        }
        let warmup = config.warmup_steps as f64 + config.warmup_epochs * progress.steps_per_epoch as f64;
        let step = progress.step as f64;
        if step >= warmup {
            return Ok(progress.base_lr);
        }
        let done = step + f64::from(u8::from(config.warmup_counts_from_one));
        Ok(config.warmup_lr + (progress.base_lr - config.warmup_lr) * (done / warmup).min(1.0))
    }
}

#[cfg(feature = "export")]
export_plugin!(scheduler, Constant);
