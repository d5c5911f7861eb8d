//! A learning-rate schedule for clip-host: say here what yours computes, and where it was published.
//!
//! After a linear warm-up of w steps the rate falls from the recipe's to `min_lr` along
//! (1 − t)^power, where t goes from 0 to 1 over the steps that are left.

use clip_host_plugin_api::prelude::*;
use clip_host_plugin_api::serde_json::Value;

/// Settings of `my_scheduler`: what a recipe's `config: (…)` may hold.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
pub struct MySchedulerConfig {
    /// Length of the warm-up in steps.
    pub warmup_steps: u64,
    /// Exponent of the fall: 1 is a straight line.
    #[schemars(range(min = 0.0, max = 16.0))]
    pub power: f64,
    /// The rate at the end.
    #[schemars(range(min = 0.0))]
    pub min_lr: f64,
}

impl Default for MySchedulerConfig {
    fn default() -> Self {
        MySchedulerConfig {
            warmup_steps: 0,
            power: 1.0,
            min_lr: 0.0,
        }
    }
}

/// The schedule.
pub struct MyScheduler;

impl Plugin for MyScheduler {
    type Config = MySchedulerConfig;
    const ID: &'static str = "my_scheduler";
    const DOC: &'static str = "Linear warm-up, then a fall along a power of what is left.";
}

impl Scheduler for MyScheduler {
    /// The rate of the coming step. What a schedule must remember it keeps in `state`, which is null
    /// at first; this one remembers nothing.
    fn lr(
        config: &MySchedulerConfig,
        progress: &Progress,
        _state: &mut Value,
    ) -> Result<f64, BuildError> {
        let &MySchedulerConfig {
            warmup_steps,
            power,
            min_lr,
        } = config;
        // The first step of a warm-up is not wasted on a rate of 0.
        if progress.step < warmup_steps {
            return Ok(progress.base_lr * (progress.step + 1) as f64 / (warmup_steps + 1) as f64);
        }
        let left = progress.total_steps.saturating_sub(warmup_steps).max(1);
        let time = (progress.step - warmup_steps) as f64 / left as f64;
        Ok(min_lr + (progress.base_lr - min_lr) * (1.0 - time).max(0.0).powf(power))
    }
}

export_plugin!(scheduler, MyScheduler);

#[cfg(test)]
mod tests {
    use super::*;

    /// The rate of a step in a run of 100 steps, 10 an epoch, whose peak is 1.
    fn lr(config: &MySchedulerConfig, step: u64) -> f64 {
        let progress = Progress {
            base_lr: 1.0,
            step,
            steps_per_epoch: 10,
            total_steps: 100,
            epoch: step / 10,
            epochs: 10,
            metric: None,
            evaluations: 0,
        };
        MyScheduler::lr(config, &progress, &mut Value::Null).expect("the settings are good")
    }

    #[track_caller]
    fn close(got: f64, expected: f64) {
        assert!(
            (got - expected).abs() < 1e-12,
            "expected {expected}, got {got}"
        );
    }

    #[test]
    fn it_warms_up_and_falls() {
        let config = MySchedulerConfig {
            warmup_steps: 20,
            power: 2.0,
            min_lr: 0.1,
        };
        close(lr(&config, 0), 1.0 / 21.0);
        close(lr(&config, 19), 20.0 / 21.0);
        close(lr(&config, 20), 1.0);
        // Half of what is left: 0.9 times a quarter above the least.
        close(lr(&config, 60), 0.1 + 0.9 * 0.25);
        close(lr(&config, 100), 0.1);
    }

    #[test]
    fn without_settings_it_is_a_straight_line_to_0() {
        for step in [0, 1, 50, 99, 100] {
            close(
                lr(&MySchedulerConfig::default(), step),
                1.0 - step as f64 / 100.0,
            );
        }
    }
}
