//! The learning rate falls along a hyperbolic tangent, after an optional linear warm-up, with optional restarts.
//!
//! With r from 0 to 1 over a cycle: lr = min_lr + (base − min_lr)·(1 − tanh(lb·(1 − r) + ub·r))/2. Cycle i is `t_mul`ⁱ times
//! as long as the first, and its rates are `decay_rate`ⁱ times as high.
//!
//! Hsueh, Li and Wu, "Stochastic Gradient Descent with Hyperbolic-Tangent Decay on Classification", WACV 2019,
//! arXiv:1806.01593. The settings' names are those of timm's `TanhLRScheduler`, which the CLIP studies use.

use clip_host_plugin_api::prelude::*;
use clip_host_plugin_api::scheduler::{Cycle, Unit};
use clip_host_plugin_api::serde_json::Value;

/// Settings of the `tanh` scheduler.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TanhConfig {
    /// What the schedule counts.
    pub unit: Unit,
    /// The tangent's argument at a cycle's beginning.
    pub lb: f64,
    /// The tangent's argument at a cycle's end.
    pub ub: f64,
    /// Length of the warm-up in steps; or give `warmup_epochs`.
    pub warmup_steps: u64,
    /// Length of the warm-up in epochs; or give `warmup_steps`.
    #[schemars(range(min = 0.0))]
    pub warmup_epochs: f64,
    /// Learning rate at which the warm-up begins.
    #[schemars(range(min = 0.0))]
    pub warmup_lr: f64,
    /// The tangent begins after the warm-up, which rises to the base rate; otherwise the warm-up hides the tangent's
    /// beginning and rises to where it meets it.
    pub warmup_prefix: bool,
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
    /// Number of cycles, after which the rate stays at `min_lr`·`decay_rate`^`cycle_limit`. 0: no limit.
    pub cycle_limit: u32,
}

impl Default for TanhConfig {
    fn default() -> Self {
        TanhConfig {
            unit: Unit::Step,
            lb: -6.0,
            ub: 4.0,
            warmup_steps: 0,
            warmup_epochs: 0.0,
            warmup_lr: 0.0,
            warmup_prefix: false,
            min_lr: 0.0,
            t_initial: 0.0,
            t_mul: 1.0,
            decay_rate: 1.0,
            cycle_limit: 1,
        }
    }
}

/// The scheduler.
pub struct Tanh;

impl Plugin for Tanh {
    type Config = TanhConfig;
    const ID: &'static str = "tanh";
    const DOC: &'static str = "Hyperbolic-tangent decay with linear warm-up and restarts \
        (Hsueh et al. 2019, arXiv:1806.01593).";
}

impl Scheduler for Tanh {
    fn lr(config: &TanhConfig, progress: &Progress, _: &mut Value) -> Result<f64, BuildError> {
        let &TanhConfig { lb, ub, t_mul, t_initial, .. } = config;
        if !(lb < ub && t_mul >= 1.0 && t_mul.is_finite() && t_initial >= 0.0) {
            let got = format!("it got {lb}, {ub}, {t_mul} and {t_initial}");
            return Err(BuildError::new(format!("tanh takes lb < ub, t_mul >= 1 and t_initial >= 0; {got}")));
        }
        let clock = progress.clock(config.unit);
        let warmup = clock.warmup("tanh", config.warmup_steps, config.warmup_epochs)?;
        let taken = if config.warmup_prefix { warmup } else { 0.0 };
        let length = if t_initial > 0.0 { t_initial } else { (clock.total - taken).max(clock.tick) };
        let curve = |time: f64| config.curve(progress.base_lr, time - taken, length);
        if clock.now < warmup {
            let target = if config.warmup_prefix { progress.base_lr } else { curve(warmup) };
            return Ok(config.warmup_lr + (target - config.warmup_lr) * clock.now / warmup);
        }
        Ok(curve(clock.now))
    }
}

impl TanhConfig {
    /// The rate at a time since the first cycle began, which is of this length.
    fn curve(&self, base: f64, time: f64, length: f64) -> f64 {
        let cycle = Cycle::at(time, length, self.t_mul);
        if self.cycle_limit > 0 && cycle.index >= self.cycle_limit {
            return self.min_lr * self.decay_rate.powi(self.cycle_limit as i32);
        }
        let decay = self.decay_rate.powi(cycle.index as i32);
        let (low, high) = (self.min_lr * decay, base * decay);
        let done = cycle.now / cycle.length;
        low + 0.5 * (high - low) * (1.0 - (self.lb * (1.0 - done) + self.ub * done).tanh())
    }
}

#[cfg(feature = "export")]
export_plugin!(scheduler, Tanh);
