//! What is asked of a scheduler.

use super::report::{Fault, Finding};
use super::state::{compare, load, save};
use super::{Check, Subject};
use clip_host_plugin_api::scheduler::{Progress, ScheduleRequest};
use serde_json::{Value, json};

pub const CHECKS: [Check; 2] = [
    Check {
        name: "rates",
        about: "The rate is finite and not negative at every step of runs of several lengths, with and without a metric, \
                and beyond their end.",
        needs_settings: true,
        run: rates,
    },
    Check {
        name: "state survives",
        about: "What it remembers, saved in a checkpoint and read back by a fresh process, leads to the same rates.",
        needs_settings: true,
        run: survives,
    },
];

const BASE_LR: f64 = 1e-3;

/// A run's length.
#[derive(Clone, Copy)]
struct Length {
    epochs: u64,
    steps_per_epoch: u64,
}

/// Asks for the rate of a step. Metrics rise, fall and stand still; there is one at the end of each epoch.
fn ask(subject: &Subject, length: Length, step: u64, metric: bool, state: Value) -> Result<(f64, Value), Fault> {
    let Length { epochs, steps_per_epoch } = length;
    let epoch = step / steps_per_epoch;
    let metrics = [0.1, 0.3, 0.2, 0.2, 0.2, 0.5];
    let evaluated = metric && epoch > 0;
    let progress = Progress {
        base_lr: BASE_LR,
        step,
        steps_per_epoch,
        total_steps: epochs * steps_per_epoch,
        epoch,
        epochs,
        metric: evaluated.then(|| metrics[epoch as usize % metrics.len()]),
        evaluations: if evaluated { epoch } else { 0 },
    };
    let request = ScheduleRequest { config: subject.config.clone(), progress, state };
    let answer = subject.plugin.schedule(&request).map_err(|error| {
        let run = format!("a run of {epochs} epochs of {steps_per_epoch} steps");
        Fault::told(error).during(format!("{run}, {} a metric", if metric { "with" } else { "without" }))
    })?;
    Ok((answer.lr, answer.state))
}

fn rates(subject: &Subject) -> Result<Finding, Fault> {
    let lengths = [(1, 1), (1, 100), (3, 10), (30, 7), (200, 1)];
    let (mut low, mut high) = (f64::INFINITY, 0.0f64);
    for (epochs, steps_per_epoch) in lengths {
        let length = Length { epochs, steps_per_epoch };
        for metric in [false, true] {
            let mut state = Value::Null;
            // A run that is made longer goes on beyond its end.
            for step in 0..epochs * steps_per_epoch + 3 {
                let (lr, next) = ask(subject, length, step, metric, state)?;
                (low, high, state) = (low.min(lr), high.max(lr), next);
            }
        }
    }
    if high == 0.0 {
        return Err(Fault::new(
            format!("asking for the rates of {} runs", lengths.len()),
            format!("some above 0 at a base rate of {BASE_LR:e}"),
            "none",
            "multiply by `progress.base_lr`",
        ));
    }
    Ok(Finding::Ok(format!("At a base rate of {BASE_LR:e} they lie between {low:.2e} and {high:.2e}.")))
}

/// Half of the steps come before the checkpoint, which lies within an epoch.
fn survives(subject: &Subject) -> Result<Finding, Fault> {
    let length = Length { epochs: 12, steps_per_epoch: 5 };
    let (saved, end) = (33, 60);
    let mut state = Value::Null;
    let mut answers = Vec::new();
    let mut path = String::new();
    let first = match &subject.before {
        None => 0,
        Some(before) => {
            state = load(before["checkpoint"].as_str().unwrap_or_default())?.state.scheduler;
            saved
        }
    };
    for step in first..end {
        if step == saved && subject.before.is_none() {
            path = save(&subject.scratch(), &[], state.clone(), saved)?;
        }
        let (lr, next) = ask(subject, length, step, true, state)?;
        state = next;
        if step >= saved {
            answers.push(json!([format!("the rate of step {step}"), lr.to_bits()]));
        }
    }
    let remembers = !state.is_null();
    answers.push(json!(["what it remembers at the end", state]));
    let Some(before) = &subject.before else {
        return Ok(Finding::Again(json!({"checkpoint": path, "answers": answers})));
    };
    compare(before["answers"].as_array().map_or(&[], Vec::as_slice), &answers)?;
    Ok(Finding::Ok(if remembers { "It remembers something." } else { "It remembers nothing." }.into()))
}
