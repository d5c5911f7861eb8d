//! Are a plugin's answers a function of the question alone?
//!
//! A run is repeated, resumed and replayed by asking again, so an answer may depend neither on chance, time or the order
//! of a hash map, which two processes that are asked the same show, nor on what was asked before, which one process shows.

use super::report::{Fault, Finding};
use super::{Check, Subject, encoder};
use clip_host_plugin_api::describe::Kind;
use clip_host_plugin_api::export::Request;
use clip_host_plugin_api::loss::LossRequest;
use clip_host_plugin_api::optimizer::{OptimizerRequest, ParamInfo, ScalarsRequest};
use clip_host_plugin_api::scheduler::{Progress, ScheduleRequest};
use serde::Serialize;
use serde_json::{Value, json};
use std::hash::{DefaultHasher, Hash, Hasher};

const DETERMINISTIC: &str = "deterministic";

pub const CHECKS: [Check; 2] = [
    Check {
        name: DETERMINISTIC,
        about: "Two processes that ask the same get the same answers, bit by bit.",
        needs_settings: true,
        run: deterministic,
    },
    Check {
        name: "no hidden state",
        about: "An answer does not depend on what was asked before: what is remembered is declared, and checkpointed.",
        needs_settings: true,
        run: no_hidden_state,
    },
];

/// A question and what it is about.
struct Question {
    of: String,
    request: Request,
}

fn questions(subject: &Subject) -> Result<Vec<Question>, Fault> {
    let config = &subject.config;
    Ok(match subject.plugin.kind() {
        Kind::Loss => [(4, 8, 100), (2, 3, 17)]
            .map(|(batch, embed_dim, dataset_size)| Question {
                of: format!("the loss of {batch} pairs"),
                request: Request::Loss(LossRequest { config: config.clone(), batch, embed_dim, dataset_size }),
            })
            .into(),
        Kind::Optimizer => {
            let builds = [vec![5, 7], vec![3]].map(|shape| Question {
                of: format!("the update of a parameter {shape:?}"),
                request: Request::Optimizer(OptimizerRequest {
                    config: config.clone(),
                    info: ParamInfo { name: "weight".into(), shape, weight_decay: 0.01 },
                }),
            });
            let scalars = [1, 2, 1000].map(|step| Question {
                of: format!("the scalars of step {step}"),
                request: Request::Scalars(ScalarsRequest { config: config.clone(), step, lr: 1e-3 }),
            });
            builds.into_iter().chain(scalars).collect()
        }
        Kind::Encoder => {
            let input = encoder::smallest_input(subject)?;
            [(2, true), (3, false)]
                .map(|(batch, training)| Question {
                    of: format!("the encoder of a batch of {batch}"),
                    request: Request::Encoder(encoder::request(subject, batch, input, training)),
                })
                .into()
        }
        Kind::Scheduler => [0, 7, 19]
            .map(|step| Question {
                of: format!("the rate of step {step}"),
                request: Request::Schedule(ScheduleRequest {
                    config: config.clone(),
                    progress: Progress {
                        base_lr: 1e-3,
                        step,
                        steps_per_epoch: 5,
                        total_steps: 20,
                        epoch: step / 5,
                        epochs: 4,
                        metric: None,
                        evaluations: 0,
                    },
                    state: Value::Null,
                }),
            })
            .into(),
    })
}

/// The answer's fingerprint; a refusal is an answer too.
fn fingerprint(subject: &Subject, request: &Request) -> u64 {
    fn text<T: Serialize>(answer: Result<T, clip_host_plugins::PluginError>) -> String {
        match answer {
            Ok(answer) => serde_json::to_string(&answer).unwrap_or_else(|error| error.to_string()),
            Err(error) => error.to_string(),
        }
    }
    let text = match request {
        Request::Scalars(request) => text(subject.plugin.scalars(request)),
        Request::Schedule(request) => text(subject.plugin.schedule(request)),
        request => text(subject.plugin.fragment(request)),
    };
    // Its keys are constants: equal in every process.
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

fn ask(subject: &Subject, questions: &[Question]) -> Vec<u64> {
    questions.iter().map(|question| fingerprint(subject, &question.request)).collect()
}

fn deterministic(subject: &Subject) -> Result<Finding, Fault> {
    let questions = questions(subject)?;
    let answers = ask(subject, &questions);
    let Some(before) = &subject.before else { return Ok(Finding::Again(json!(answers))) };
    let differs = questions.iter().zip(&answers).enumerate().find(|(at, (_, answer))| before[at] != json!(answer));
    match differs {
        None => Ok(Finding::Ok(format!("{} questions were asked twice.", questions.len()))),
        Some((_, (question, _))) => Err(Fault::new(
            format!("asking two fresh processes for {}", question.of),
            "one answer",
            "two",
            "is there a HashMap that is iterated over, a random number, a clock or an address in it? `graph.random` draws \
             at every step, from the run's seed",
        )),
    }
}

fn no_hidden_state(subject: &Subject) -> Result<Finding, Fault> {
    let questions = questions(subject)?;
    let answers = [ask(subject, &questions), ask(subject, &questions)];
    let Some(before) = &subject.before else { return Ok(Finding::Again(json!(answers))) };
    let [first, again] = &answers;
    let differs = questions.iter().zip(first.iter().zip(again)).find(|(_, (first, again))| first != again);
    match differs {
        None => Ok(Finding::Ok(format!("{} questions were asked twice in one process.", questions.len()))),
        // Not for what was asked before, but for chance.
        Some(_) if *before != json!(answers) => Ok(Finding::Skipped(format!(
            "its answers differ from process to process: see the check `{DETERMINISTIC}`."
        ))),
        Some((question, _)) => Err(Fault::new(
            format!("asking one process twice for {}", question.of),
            "the same answer",
            "another one the second time",
            "it keeps something between calls, in a `static` perhaps; what it must remember is `graph.state` with \
             `graph.update`, or a scheduler's `state`",
        )),
    }
}
