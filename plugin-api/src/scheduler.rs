//! The contract of a scheduler: from progress to a learning rate, on the host, in double precision.

use crate::describe::Plugin;
use crate::export::{Entry, Request, config};
use crate::graph::BuildError;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::marker::PhantomData;

/// A learning-rate schedule.
pub trait Scheduler: Plugin {
    /// The learning rate of the coming step. A schedule that must remember something (a plateau) reads it from
    /// `state`, which is null at first, and leaves it there: it is checkpointed.
    fn lr(config: &Self::Config, progress: &Progress, state: &mut serde_json::Value) -> Result<f64, BuildError>;
}

/// Where training is. Steps and epochs count from 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The peak learning rate of the recipe.
    pub base_lr: f64,
    pub step: u64,
    pub steps_per_epoch: u64,
    pub total_steps: u64,
    pub epoch: u64,
    pub epochs: u64,
    /// The newest evaluation's main metric, if there was one.
    pub metric: Option<f64>,
    /// Number of evaluations so far: it tells a new metric from the one already seen.
    #[serde(default)]
    pub evaluations: u64,
}

/// What a schedule counts, for the settings of schedulers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// The rate changes at every step.
    #[default]
    Step,
    /// The rate changes at every epoch.
    Epoch,
    /// The rate changes at every step, and times are in epochs.
    EpochFraction,
}

/// Time as a schedule counts it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clock {
    /// The coming step's time, from 0.
    pub now: f64,
    /// Length of the run.
    pub total: f64,
    /// Length of a step.
    pub step: f64,
    /// Length of an epoch.
    pub epoch: f64,
    /// Time from one change of the rate to the next.
    pub tick: f64,
}

impl Progress {
    /// The time in a unit.
    pub fn clock(&self, unit: Unit) -> Clock {
        let per_epoch = self.steps_per_epoch.max(1) as f64;
        match unit {
            Unit::Step => {
                Clock { now: self.step as f64, total: self.total_steps as f64, step: 1.0, epoch: per_epoch, tick: 1.0 }
            }
            Unit::Epoch => Clock {
                now: self.epoch as f64,
                total: self.epochs as f64,
                step: 1.0 / per_epoch,
                epoch: 1.0,
                tick: 1.0,
            },
            Unit::EpochFraction => Clock {
                now: self.step as f64 / per_epoch,
                total: self.epochs as f64,
                step: 1.0 / per_epoch,
                epoch: 1.0,
                tick: 1.0 / per_epoch,
            },
        }
    }
}

impl Clock {
    /// The length of a warm-up that is given either in steps or in epochs. `who` is told in the refusal of both.
    pub fn warmup(&self, who: &str, steps: u64, epochs: f64) -> Result<f64, BuildError> {
        match steps > 0 && epochs > 0.0 {
            true => {
                let got = format!("it got {steps} and {epochs}");
                Err(BuildError::new(format!("{who} takes either warmup_steps or warmup_epochs; {got}")))
            }
            false => Ok(steps as f64 * self.step + epochs * self.epoch),
        }
    }
}

/// Where a time lies in cycles of growing length, as in warm restarts (Loshchilov and Hutter 2017, arXiv:1608.03983).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cycle {
    /// Number of the cycle, from 0.
    pub index: u32,
    /// Time since it began.
    pub now: f64,
    pub length: f64,
}

impl Cycle {
    /// The cycle at `time` (at least 0), where the first has `length` (above 0) and each is `factor` (at least 1) times
    /// as long as the one before.
    pub fn at(time: f64, length: f64, factor: f64) -> Cycle {
        if factor <= 1.0 {
            return Cycle { index: (time / length) as u32, now: time % length, length };
        }
        let mut cycle = Cycle { index: 0, now: time, length };
        while cycle.now >= cycle.length {
            cycle.now -= cycle.length;
            cycle.length *= factor;
            cycle.index += 1;
        }
        cycle
    }
}

/// The host's request, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleRequest {
    pub config: serde_json::Value,
    pub progress: Progress,
    pub state: serde_json::Value,
}

/// The answer to [`ScheduleRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleAnswer {
    pub lr: f64,
    pub state: serde_json::Value,
}

/// Connects a scheduler to the plugin boundary; used by [`crate::export_plugin`].
pub struct SchedulerEntry<S>(PhantomData<S>);

impl<S: Scheduler> Entry for SchedulerEntry<S> {
    type Plugin = S;
    const KIND: crate::describe::Kind = crate::describe::Kind::Scheduler;

    fn answer(request: Request) -> Result<String, BuildError> {
        match request {
            Request::Schedule(mut request) => {
                let config = config::<S>(&request.config)?;
                let lr = S::lr(&config, &request.progress, &mut request.state)?;
                crate::export::to_json(&ScheduleAnswer { lr, state: request.state })
            }
            other => Err(other.refused_by::<Self>()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(step: u64) -> Progress {
        let (steps_per_epoch, total_steps, epoch, epochs) = (8, 80, step / 8, 10);
        Progress { base_lr: 1.0, step, steps_per_epoch, total_steps, epoch, epochs, metric: None, evaluations: 0 }
    }

    #[test]
    fn clocks_of_all_units_show_the_same_time() {
        let clock = |unit| at(12).clock(unit);
        assert_eq!((clock(Unit::Step).now, clock(Unit::Epoch).now, clock(Unit::EpochFraction).now), (12.0, 1.0, 1.5));
        for unit in [Unit::Step, Unit::Epoch, Unit::EpochFraction] {
            let clock = clock(unit);
            assert_eq!(clock.total, 10.0 * clock.epoch);
            assert_eq!(clock.epoch, 8.0 * clock.step);
            // Two epochs are sixteen steps.
            assert_eq!(clock.warmup("it", 16, 0.0), clock.warmup("it", 0, 2.0));
            let error = clock.warmup("it", 16, 2.0).map_err(|error| error.to_string());
            assert_eq!(error, Err("it takes either warmup_steps or warmup_epochs; it got 16 and 2".into()));
        }
    }

    #[test]
    fn cycles_follow_each_other_without_gaps() {
        let cycle = |index, now, length| Cycle { index, now, length };
        assert_eq!(Cycle::at(0.0, 5.0, 2.0), cycle(0, 0.0, 5.0));
        assert_eq!(Cycle::at(5.0, 5.0, 2.0), cycle(1, 0.0, 10.0));
        assert_eq!(Cycle::at(14.5, 5.0, 2.0), cycle(1, 9.5, 10.0));
        assert_eq!(Cycle::at(15.0, 5.0, 2.0), cycle(2, 0.0, 20.0));
        assert_eq!(Cycle::at(14.0, 4.0, 1.0), cycle(3, 2.0, 4.0));
    }
}
