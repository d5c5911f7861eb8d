//! The contract of a scheduler: from progress to a learning rate, on the host, in double precision.

use crate::describe::Plugin;
use crate::export::{Entry, Request, config};
use crate::graph::BuildError;
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
