//! open_clip's schedule: a linear warm-up, then half a cosine down to zero, at every step.
//!
//! ```text
//! step < warm-up:   lr = base·(step + 1)/warm-up
//! then:             lr = base·(1 + cos(π·(step − warm-up)/(total − warm-up)))/2
//! ```
//!
//! `cosine` has more settings and can do the same; this is the schedule of CLIP (Radford et al. 2021, arXiv:2103.00020) as
//! open_clip's `--warmup` gives it, by its one number.

use clip_host_plugin_api::prelude::*;
use clip_host_plugin_api::serde_json::Value;

/// Settings of the `linear_warmup_cosine` scheduler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LinearWarmupCosineConfig {
    /// Length of the warm-up in steps.
    pub warmup_steps: u64,
}

impl Default for LinearWarmupCosineConfig {
    fn default() -> Self {
        LinearWarmupCosineConfig { warmup_steps: 10_000 }
    }
}

/// The scheduler.
pub struct LinearWarmupCosine;

impl Plugin for LinearWarmupCosine {
    type Config = LinearWarmupCosineConfig;
    const ID: &'static str = "linear_warmup_cosine";
    const DOC: &'static str = "open_clip's schedule: a linear warm-up, then half a cosine to zero, at every step.";
}

impl Scheduler for LinearWarmupCosine {
    fn lr(config: &LinearWarmupCosineConfig, progress: &Progress, _: &mut Value) -> Result<f64, BuildError> {
        let (step, warmup) = (progress.step as f64, config.warmup_steps as f64);
        if step < warmup {
            return Ok(progress.base_lr * (step + 1.0) / warmup);
        }
        // A step beyond the run's last is at the end of the cosine, as the last of a run that is all warm-up.
        let rest = (progress.total_steps as f64 - warmup).max(1.0);
        let done = ((step - warmup) / rest).min(1.0);
        Ok(0.5 * (1.0 + (std::f64::consts::PI * done).cos()) * progress.base_lr)
    }
}

#[cfg(feature = "export")]
export_plugin!(scheduler, LinearWarmupCosine);
