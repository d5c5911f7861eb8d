//! What is asked of an optimizer.

use super::numbers::{Random, compile, declared, finite, set};
use super::report::{Fault, Finding};
use super::state::{self, Steps};
use super::{Check, Subject};
use clip_host_model::replay::Compiled;
use clip_host_plugin_api::export::Request;
use clip_host_plugin_api::ir::{Fragment, Op};
use clip_host_plugin_api::optimizer::{OptimizerRequest, ParamInfo, ScalarsAnswer, ScalarsRequest};
use clip_host_plugin_api::testing::Harness;

pub const CHECKS: [Check; 7] = [
    Check {
        name: "shapes",
        about: "It builds the update of scalars, vectors, matrices and filters, with and without weight decay.",
        needs_settings: true,
        run: shapes,
    },
    Check {
        name: "scalars",
        about: "The numbers of a step have the same names at every step and are finite, at a learning rate of 0 too.",
        needs_settings: true,
        run: scalars,
    },
    Check {
        name: "elementwise",
        about: "An update that is declared to be elementwise moves each element by its own gradient only.",
        needs_settings: true,
        run: elementwise,
    },
    Check {
        name: "finite",
        about: "Parameters and states stay finite in f32 for gradients of ordinary size, zero, tiny and huge.",
        needs_settings: true,
        run: extremes,
    },
    Check {
        name: "finds the minimum",
        about: "It comes at least half of the way to the minimum of a quadratic in 300 steps, at one of three learning \
                rates.",
        needs_settings: true,
        run: minimum,
    },
    Check {
        name: "states",
        about: "Every state that is declared moves from step to step.",
        needs_settings: true,
        run: |subject| declared(&build(subject, &[5, 7], 0.01)?).map(Finding::Ok),
    },
    Check {
        name: "state survives",
        about: "Saved in a checkpoint and read back by a fresh process, it goes on to the same bits.",
        needs_settings: true,
        run: survives,
    },
];

fn build(subject: &Subject, shape: &[usize], weight_decay: f64) -> Result<Fragment, Fault> {
    let info = ParamInfo { name: "weight".into(), shape: shape.into(), weight_decay };
    let request = OptimizerRequest { config: subject.config.clone(), info };
    let fragment = subject.plugin.fragment(&Request::Optimizer(request));
    fragment.map_err(|error| Fault::told(error).during(format!("a parameter of shape {shape:?}")))
}

/// The numbers of a step, from 1.
fn ask(subject: &Subject, step: u64, lr: f64) -> Result<ScalarsAnswer, Fault> {
    let request = ScalarsRequest { config: subject.config.clone(), step, lr };
    subject.plugin.scalars(&request).map_err(Fault::told)
}

fn shapes(subject: &Subject) -> Result<Finding, Fault> {
    let shapes: [&[usize]; 6] = [&[], &[7], &[5, 7], &[1, 9], &[4, 3, 2], &[3, 4, 3, 3]];
    for shape in shapes {
        for weight_decay in [0.0, 0.01] {
            let fragment = build(subject, shape, weight_decay)?;
            if fragment.nodes.iter().any(|node| matches!(node.op, Op::Param { .. })) {
                return Err(Fault::new(
                    format!("building the update of a parameter {shape:?}"),
                    "states only",
                    "a parameter of its own, which nothing trains",
                    "`graph.state` keeps what changes from step to step",
                ));
            }
        }
    }
    let told: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
    Ok(Finding::Ok(format!("Shapes were {}.", told.join(", "))))
}

fn scalars(subject: &Subject) -> Result<Finding, Fault> {
    let names = |step, lr| -> Result<Vec<String>, Fault> {
        Ok(ask(subject, step, lr)?.scalars.into_iter().map(|(name, _)| name).collect())
    };
    let first = names(1, 0.0)?;
    for (step, lr) in [(1, 1e-3), (2, 1e-3), (1000, 1e-3), (1_000_000, 1e-6), (100_000_000, 1.0)] {
        let later = names(step, lr)?;
        if later != first {
            return Err(Fault::new(
                format!("asking for the scalars of step {step} with a learning rate of {lr}"),
                format!("the names of step 1, [{}]", first.join(", ")),
                format!("[{}]", later.join(", ")),
                "the update is built once: give every number at every step, 0 or 1 where it is of no use",
            ));
        }
    }
    Ok(Finding::Ok(format!("They are [{}].", first.join(", "))))
}

/// Sets the scalars of a step, from 1, in f64.
fn set_scalars(subject: &Subject, harness: &mut Harness, step: u64, lr: f64) -> Result<(), Fault> {
    for (name, value) in ask(subject, step, lr)?.scalars {
        harness.set(&format!("scalar.{name}"), [value]);
    }
    Ok(())
}

fn elementwise(subject: &Subject) -> Result<Finding, Fault> {
    if !ask(subject, 1, 1e-3)?.elementwise {
        return Ok(Finding::Skipped("it declares `ELEMENTWISE = false`.".into()));
    }
    const COUNT: usize = 6;
    const CHANGED: usize = 2;
    let fragment = build(subject, &[COUNT], 0.01)?;
    let run = |by: f64| -> Result<Vec<(String, Vec<f64>)>, Fault> {
        let mut harness = Harness::new(fragment.clone());
        let mut random = Random::new(5);
        let mut param = random.many(COUNT);
        param[CHANGED] += by;
        for step in 1..=3 {
            let mut gradient = random.many(COUNT);
            gradient[CHANGED] += 2.0 * by;
            harness.set("param", param.clone()).set("grad", gradient);
            set_scalars(subject, &mut harness, step, 1e-2)?;
            let mut outputs = harness.step(None, &[]).map_err(Fault::told)?.outputs;
            param = outputs.remove("param").unwrap_or_default();
        }
        let states = harness.values.iter().filter(|(name, _)| !is_input(name));
        let mut numbers: Vec<_> = states.map(|(name, values)| (name.clone(), values.clone())).collect();
        numbers.push(("param".into(), param));
        numbers.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(numbers)
    };
    for ((name, before), (_, after)) in run(0.0)?.iter().zip(&run(1.0)?) {
        let hint = "`const ELEMENTWISE: bool = false;` in its `Optimizer`, or a number of `scalars`";
        if before.len() != COUNT {
            let (expected, got) = (format!("the parameter's shape, [{COUNT}]"), format!("{} elements", before.len()));
            return Err(Fault::new(format!("comparing the state `{name}` with its parameter"), expected, got, hint));
        }
        if let Some(at) = (0..COUNT).find(|&at| at != CHANGED && before[at] != after[at]) {
            return Err(Fault::new(
                format!("changing element {CHANGED} of parameter and gradient"),
                format!("element {at} of `{name}` to be the same"),
                "another value",
                hint,
            ));
        }
    }
    Ok(Finding::Ok("One element of six was changed for three steps.".into()))
}

fn is_input(name: &str) -> bool {
    ["param", "grad"].contains(&name) || name.starts_with("scalar.")
}

/// An update in f32, as training computes it, of a parameter that begins at random.
struct Update<'s> {
    subject: &'s Subject<'s>,
    compiled: Compiled,
    param: Vec<f32>,
    /// What each random gradient is multiplied by.
    scale: f64,
}

impl<'s> Update<'s> {
    fn new(subject: &'s Subject<'s>, shape: &[usize], scale: f64) -> Result<Self, Fault> {
        let compiled = compile(&build(subject, shape, 0.01)?, None, &[])?;
        let param = Random::new(8).many(shape.iter().product()).into_iter().map(|x| x as f32).collect();
        Ok(Update { subject, compiled, param, scale })
    }
}

impl Steps for Update<'_> {
    fn compiled(&mut self) -> &mut Compiled {
        &mut self.compiled
    }

    fn step(&mut self, step: u64) -> Result<Vec<f32>, Fault> {
        let gradient = Random::new(100 + step).many(self.param.len()).into_iter().map(|g| g * self.scale).collect();
        let param = self.param.iter().map(|&p| f64::from(p)).collect();
        let mut values = super::numbers::Values::from([("param".into(), param), ("grad".into(), gradient)]);
        for (name, value) in ask(self.subject, step + 1, 1e-2)?.scalars {
            values.insert(format!("scalar.{name}"), vec![value]);
        }
        set(&mut self.compiled, &values)?;
        self.compiled.run(step).map_err(Fault::told)?;
        self.param = self.compiled.get("param").unwrap_or_default();
        Ok(self.param.clone())
    }

    fn extra(&self) -> Vec<(&'static str, Vec<f32>)> {
        vec![("param", self.param.clone())]
    }

    fn restore(&mut self, name: &str, values: &[f32]) {
        if name == "param" {
            self.param = values.to_vec();
        }
    }
}

fn extremes(subject: &Subject) -> Result<Finding, Fault> {
    let scales = [("ordinary", 1.0), ("zero", 0.0), ("tiny", 1e-20), ("huge", 1e8)];
    for shape in [&[][..], &[7], &[5, 7]] {
        for (name, scale) in scales {
            let mut update = Update::new(subject, shape, scale)?;
            for step in 0..5 {
                let param = update.step(step)?;
                let attempted = format!("step {} of a parameter {shape:?} with {name} gradients", step + 1);
                let hint = "divisors need a small number added, such as Adam's eps, which must not vanish in f32";
                finite(&attempted, "the parameter", &param, hint)?;
                for (state, _, values) in update.compiled.kept() {
                    finite(&attempted, &format!("the state `{state}`"), &values, hint)?;
                }
            }
        }
    }
    let told: Vec<String> = scales.iter().map(|(name, scale)| format!("{name} ({scale:e})")).collect();
    Ok(Finding::Ok(format!("Five steps each: {}.", told.join(", "))))
}

fn minimum(subject: &Subject) -> Result<Finding, Fault> {
    let shape = [5, 7];
    let fragment = build(subject, &shape, 0.0)?;
    let mut random = Random::new(9);
    let (start, target) = (random.many(35), random.many(35));
    let distance = |param: &[f64]| param.iter().zip(&target).map(|(p, t)| (p - t).powi(2)).sum::<f64>().sqrt();
    let mut told = Vec::new();
    for lr in [1e-2, 1e-1, 1e-3] {
        let mut harness = Harness::new(fragment.clone());
        let mut param = start.clone();
        for step in 1..=300 {
            let gradient: Vec<f64> = param.iter().zip(&target).map(|(p, t)| p - t).collect();
            harness.set("param", param).set("grad", gradient);
            set_scalars(subject, &mut harness, step, lr)?;
            let mut outputs = harness.step(None, &[]).map_err(Fault::told)?.outputs;
            param = outputs.remove("param").unwrap_or_default();
        }
        let (before, after) = (distance(&start), distance(&param));
        if after <= 0.5 * before {
            let words = format!("With a learning rate of {lr} the distance fell from {before:.2} to {after:.2}.");
            return Ok(Finding::Ok(words));
        }
        told.push(format!("{after:.3} with {lr}"));
    }
    Err(Fault::new(
        "minimising the distance to a point, squared, in 300 steps",
        format!("at most half of the distance at first, {:.3}", distance(&start)),
        format!("{} as learning rate", told.join(", ")),
        "does the update go against the gradient, and does it use the learning rate of `scalars`?",
    ))
}

fn survives(subject: &Subject) -> Result<Finding, Fault> {
    let states = super::numbers::states(&build(subject, &[5, 7], 0.01)?);
    let about = format!("It keeps {} states of a matrix.", states.len());
    state::survives(subject, &mut Update::new(subject, &[5, 7], 1.0)?, about)
}
