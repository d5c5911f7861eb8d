//! Does what a plugin keeps survive a checkpoint? Six steps in one process are compared with the last three of them in
//! another, which begins from the checkpoint that the first wrote after three.

use super::Subject;
use super::report::{Fault, Finding};
use clip_host_model::replay::Compiled;
use clip_host_model::{NamedTensor, Role};
use clip_host_train::checkpoint::{self, Checkpoint, DataShape, State};
use serde_json::{Value, json};
use std::hash::{DefaultHasher, Hasher};
use std::path::Path;

/// Steps of the whole, and those before the checkpoint.
pub const STEPS: u64 = 6;
pub const SAVED: u64 = 3;

/// Writes a checkpoint and returns its path.
pub fn save(folder: &Path, tensors: &[NamedTensor], scheduler: Value, step: u64) -> Result<String, Fault> {
    let state = State { step, scheduler, ..State::new(DataShape::default()) };
    let path = checkpoint::save(folder, &state, tensors);
    Ok(path.map_err(|error| Fault::told(error).during("writing a checkpoint"))?.to_string_lossy().into_owned())
}

/// Reads a checkpoint.
pub fn load(path: &str) -> Result<Checkpoint, Fault> {
    checkpoint::load(Path::new(path)).map_err(|error| Fault::told(error).during("reading the checkpoint"))
}

/// A fingerprint of numbers' bits; its keys are constants, equal in every process.
fn bits(values: &[f32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    values.iter().for_each(|value| hasher.write_u32(value.to_bits()));
    hasher.finish()
}

/// A formula that runs step by step: it is fed for a step, and says which of its numbers count.
pub trait Steps {
    fn compiled(&mut self) -> &mut Compiled;
    /// Runs a step, from 0, and returns the numbers that came out.
    fn step(&mut self, step: u64) -> Result<Vec<f32>, Fault>;
    /// What must be kept besides the formula's own parameters and states.
    fn extra(&self) -> Vec<(&'static str, Vec<f32>)> {
        vec![]
    }
    fn restore(&mut self, _name: &str, _values: &[f32]) {}
}

/// The check itself: `about` says what the plugin keeps.
pub fn survives(subject: &Subject, steps: &mut impl Steps, about: String) -> Result<Finding, Fault> {
    let mut answers = Vec::new();
    let first = match &subject.before {
        None => 0,
        Some(before) => {
            restore(steps, before["checkpoint"].as_str().unwrap_or_default())?;
            SAVED
        }
    };
    let mut saved = String::new();
    for step in first..STEPS {
        if step == SAVED && subject.before.is_none() {
            saved = keep(&subject.scratch(), steps)?;
        }
        let numbers = steps.step(step)?;
        if step >= SAVED {
            answers.push(json!([format!("the results of step {step}"), bits(&numbers)]));
        }
    }
    for (name, _, values) in steps.compiled().kept() {
        answers.push(json!([format!("`{name}` after step {STEPS}"), bits(&values)]));
    }
    let Some(before) = &subject.before else {
        return Ok(Finding::Again(json!({"checkpoint": saved, "answers": answers})));
    };
    compare(before["answers"].as_array().map_or(&[], Vec::as_slice), &answers)?;
    Ok(Finding::Ok(about))
}

/// A fault if two lists of named numbers differ.
pub fn compare(before: &[Value], after: &[Value]) -> Result<(), Fault> {
    let differs = after.iter().enumerate().find(|(at, answer)| before.get(*at) != Some(answer));
    match differs {
        None if before.len() == after.len() => Ok(()),
        _ => {
            let what = differs.and_then(|(_, answer)| answer[0].as_str()).unwrap_or("what is kept");
            Err(Fault::new(
                "going on from a checkpoint in a fresh process",
                format!("{what} to be the same bits as without the interruption"),
                "others",
                "what a plugin must remember is `graph.state` with `graph.update`, or a scheduler's `state`; nothing \
                 else is in a checkpoint",
            ))
        }
    }
}

fn keep(folder: &Path, steps: &mut impl Steps) -> Result<String, Fault> {
    let extra = steps.extra();
    let tensor =
        |name: String, shape: &[usize], data| NamedTensor { name, role: Role::State, shape: shape.into(), data };
    let compiled = steps.compiled();
    let kept = compiled.kept().map(|(name, shape, values)| tensor(format!("kept.{name}"), shape, values.into()));
    let extra = extra.iter().map(|(name, values)| tensor(format!("extra.{name}"), &[values.len()], values.into()));
    save(folder, &kept.chain(extra).collect::<Vec<_>>(), Value::Null, SAVED)
}

fn restore(steps: &mut impl Steps, path: &str) -> Result<(), Fault> {
    let mut tensors = Vec::new();
    let visited = load(path)?.tensors(|name, _, values| {
        tensors.push((name.to_string(), values.to_vec()));
        Ok(())
    });
    visited.map_err(Fault::told)?;
    for (name, values) in tensors {
        if let Some(name) = name.strip_prefix("kept.") {
            let values: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
            steps.compiled().set(name, &values).map_err(Fault::told)?;
        } else if let Some(name) = name.strip_prefix("extra.") {
            steps.restore(name, &values);
        }
    }
    Ok(())
}
