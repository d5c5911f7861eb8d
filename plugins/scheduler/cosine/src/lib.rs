//! Half a cosine from the base learning rate down to `min_lr`, after an optional linear warm-up, with optional restarts.
//!
//! With time t since the start of a cycle of length T: lr = min_lr + (base − min_lr)·(1 + cos(π·t/T))/2. Cycle i is
//! `t_mul`ⁱ times as long as the first, and its rates are `decay_rate`ⁱ times as high.
//!
//! Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, arXiv:1608.03983. The names of
//! the settings are those of timm's `CosineLRScheduler`. Well-known schedules:
//!
//! - open_clip: `(warmup_steps: 10000, warmup_counts_from_one: true)`
//! - the CLIP studies: `(unit: "epoch", warmup_epochs: 5, warmup_step_size: 100, warmup_lr: 1e-5, min_lr: 1e-6)`
//! - PyTorch's `CosineAnnealingWarmRestarts(T_0=5, T_mult=2)`: `(unit: "epoch", t_initial: 5, t_mul: 2, cycle_limit: 0)`,
//!   or with unit `epoch_fraction` if its `step` is called with fractions of an epoch

use clip_host_plugin_api::prelude::*;
use clip_host_plugin_api::scheduler::{Clock, Cycle, Unit};
use clip_host_plugin_api::serde_json::Value;

/// Settings of the `cosine` scheduler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CosineConfig {
    /// What the schedule counts.
    pub unit: Unit,
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
    /// The cosine begins after the warm-up; otherwise the warm-up hides the cosine's beginning.
    pub warmup_prefix: bool,
    /// With unit `epoch`: the warm-up happens inside epoch 0, one of its "epochs" every this many steps, and epoch 1 goes
    /// on with the cosine even if the warm-up was not over. The CLIP studies have 100. 0: off.
    pub warmup_step_size: u64,
    /// Learning rate at the end.
    #[schemars(range(min = 0.0))]
    pub min_lr: f64,
    /// Length of the first cycle in units. 0: what the warm-up leaves of the run.
    #[schemars(range(min = 0.0))]
    pub t_initial: f64,
    /// Each cycle is this many times as long as the one before.
    #[schemars(range(min = 1.0))]
    pub t_mul: f64,
    /// The rates of each cycle are this many times those of the one before.
    #[schemars(range(min = 0.0))]
    pub decay_rate: f64,
    /// Number of cycles, after which the rate stays at `min_lr`. 0: no limit.
    pub cycle_limit: u32,
    /// Length of an epoch in steps, to repeat a schedule of another data set. 0: this run's own.
    pub steps_per_epoch: u64,
}

impl Default for CosineConfig {
    fn default() -> Self {
        CosineConfig {
            unit: Unit::Step,
            warmup_steps: 0,
            warmup_epochs: 0.0,
            warmup_lr: 0.0,
            warmup_counts_from_one: false,
            warmup_prefix: true,
            warmup_step_size: 0,
            min_lr: 0.0,
            t_initial: 0.0,
            t_mul: 1.0,
            decay_rate: 1.0,
            cycle_limit: 1,
            steps_per_epoch: 0,
        }
    }
}

/// The scheduler.
pub struct Cosine;

impl Plugin for Cosine {
    type Config = CosineConfig;
    const ID: &'static str = "cosine";
    const DOC: &'static str = "Cosine annealing with linear warm-up and restarts \
        (Loshchilov and Hutter 2017, arXiv:1608.03983).";
}

impl Scheduler for Cosine {
    fn lr(config: &CosineConfig, progress: &Progress, _: &mut Value) -> Result<f64, BuildError> {
        config.check()?;
        let time = config.time(progress)?;
        if time.now < time.warmup {
            let done = time.now + if config.warmup_counts_from_one { time.tick } else { 0.0 };
            return Ok(config.warmup_lr + (progress.base_lr - config.warmup_lr) * (done / time.warmup).min(1.0));
        }
        let now = time.now - if config.warmup_prefix { time.warmup } else { 0.0 };
        let length = if config.t_initial > 0.0 { config.t_initial } else { time.rest };
        let cycle = Cycle::at(now, length, config.t_mul);
        if config.cycle_limit > 0 && cycle.index >= config.cycle_limit {
            return Ok(config.min_lr);
        }
        let decay = config.decay_rate.powi(cycle.index as i32);
        let (low, high) = (config.min_lr * decay, progress.base_lr * decay);
        Ok(low + 0.5 * (high - low) * (1.0 + (std::f64::consts::PI * cycle.now / cycle.length).cos()))
    }
}

impl CosineConfig {
    fn check(&self) -> Result<(), BuildError> {
        let refuse = |what: &str| Err(BuildError::new(format!("cosine {what}")));
        if self.warmup_step_size > 0 && self.unit != Unit::Epoch {
            return refuse("takes warmup_step_size with unit \"epoch\" only, it got another");
        }
        if !(self.t_mul >= 1.0 && self.t_mul.is_finite() && self.t_initial >= 0.0) {
            return refuse(&format!(
                "takes t_mul >= 1 and t_initial >= 0, it got {} and {}",
                self.t_mul, self.t_initial
            ));
        }
        Ok(())
    }

    fn time(&self, progress: &Progress) -> Result<Time, BuildError> {
        let mut progress = progress.clone();
        if self.steps_per_epoch > 0 {
            progress.steps_per_epoch = self.steps_per_epoch;
            progress.epoch = progress.step / self.steps_per_epoch;
        }
        let Clock { now, total, tick, .. } = progress.clock(self.unit);
        let warmup = progress.clock(self.unit).warmup("cosine", self.warmup_steps, self.warmup_epochs)?;
        let now = match self.warmup_step_size {
            0 => now,
            // The studies' loop moves its clock after the update of steps 0, 100, 200, …
            size if progress.epoch == 0 => ((progress.step.saturating_sub(1) / size) as f64).min(warmup),
            _ => now + warmup,
        };
        // A warm-up inside epoch 0 takes nothing of the cosine's time.
        let taken = if self.warmup_prefix && self.warmup_step_size == 0 { warmup } else { 0.0 };
        Ok(Time { now, tick, warmup, rest: (total - taken).max(tick) })
    }
}

/// Time in the schedule's units.
struct Time {
    now: f64,
    tick: f64,
    warmup: f64,
    /// What the warm-up leaves of the run.
    rest: f64,
}

#[cfg(feature = "export")]
export_plugin!(scheduler, Cosine);
