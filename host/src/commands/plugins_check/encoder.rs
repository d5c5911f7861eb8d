//! What is asked of an encoder.

use super::gradient::{Point, TOLERANCE, node};
use super::numbers::{Random, Values, compile, finite, first_values, params, set, states};
use super::report::{Fault, Finding};
use super::state::{self, Steps};
use super::{Check, Subject};
use clip_host_model::replay::Compiled;
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::export::Request;
use clip_host_plugin_api::ir::{Fragment, Node, Op};

pub const CHECKS: [Check; 6] = [
    Check {
        name: "shapes",
        about: "It builds feature rows of one width for batches of several sizes, in training and in evaluation.",
        needs_settings: true,
        run: shapes,
    },
    Check {
        name: "parameters",
        about: "Names and shapes of the parameters depend neither on the batch nor on the mode, so that checkpoints load.",
        needs_settings: true,
        run: parameters,
    },
    Check {
        name: "finite",
        about: "Features, gradients and running statistics are finite in f32, for random inputs and for empty ones.",
        needs_settings: true,
        run: edge_cases,
    },
    Check {
        name: "samples do not mix",
        about: "In evaluation a sample's features do not depend on the rest of the batch.",
        needs_settings: true,
        run: samples_do_not_mix,
    },
    Check {
        name: "gradient",
        about: "The gradient in the parameters is the slope of the features, by central finite differences in f64.",
        needs_settings: true,
        run: gradient,
    },
    Check {
        name: "state survives",
        about: "Running statistics, saved in a checkpoint and read back by a fresh process, go on to the same bits.",
        needs_settings: true,
        run: survives,
    },
];

/// The question for a fragment.
pub fn request(subject: &Subject, batch: usize, input: InputShape, training: bool) -> EncoderRequest {
    EncoderRequest { config: subject.config.clone(), batch, input, training }
}

fn build(subject: &Subject, batch: usize, input: InputShape, training: bool) -> Result<Fragment, Fault> {
    let fragment = subject.plugin.fragment(&Request::Encoder(request(subject, batch, input, training)));
    let mode = if training { "training" } else { "evaluation" };
    fragment.map_err(|error| Fault::told(error).during(format!("a batch of {batch} {} in {mode}", told(input))))
}

fn told(input: InputShape) -> String {
    match input {
        InputShape::Image { height, width } => format!("images of {height} × {width}"),
        InputShape::Text { length } => format!("texts of {length} tokens"),
    }
}

/// The smallest of some usual inputs that the encoder takes; smaller ones are quicker to compute.
pub fn smallest_input(subject: &Subject) -> Result<InputShape, Fault> {
    let images = [32, 64, 96, 128, 224].map(|size| InputShape::Image { height: size, width: size });
    let texts = [8, 30, 77].map(|length| InputShape::Text { length });
    let mut first = None;
    for input in images.into_iter().chain(texts) {
        match build(subject, 2, input, true) {
            Ok(_) => return Ok(input),
            // What it says of the most usual image is told if it takes neither.
            Err(fault) => {
                if matches!(input, InputShape::Image { height: 224, .. }) {
                    first = Some(fault);
                }
            }
        }
    }
    Err(first.unwrap_or_else(|| Fault::told("it takes neither images nor texts")))
}

/// The inputs that a check builds for: the smallest, and the usual one of training.
fn inputs(subject: &Subject) -> Result<Vec<InputShape>, Fault> {
    let smallest = smallest_input(subject)?;
    let usual = match smallest {
        InputShape::Image { .. } => InputShape::Image { height: 224, width: 224 },
        InputShape::Text { .. } => InputShape::Text { length: 30 },
    };
    // One that is made for small inputs only may refuse the usual.
    Ok(if usual != smallest && build(subject, 2, usual, true).is_ok() { vec![smallest, usual] } else { vec![smallest] })
}

/// Batches of the two modes: a network with batch statistics has none of a single sample in training.
const BATCHES: [(usize, bool); 7] = [(2, true), (3, true), (16, true), (1, false), (2, false), (3, false), (16, false)];

fn shapes(subject: &Subject) -> Result<Finding, Fault> {
    let mut known: Option<usize> = None;
    let inputs = inputs(subject)?;
    for &input in &inputs {
        for (batch, training) in BATCHES {
            let fragment = build(subject, batch, input, training)?;
            let features = fragment.output("features").map(|id| &fragment.nodes[id as usize].shape);
            let width = features.and_then(|shape| shape.get(1)).copied().unwrap_or_default();
            if let Some(known) = known.filter(|known| *known != width) {
                return Err(Fault::new(
                    format!("building for a batch of {batch} {}", told(input)),
                    format!("features of the same width as for others, {known}"),
                    width.to_string(),
                    "the linear head after it has one size: the width may depend on the settings only",
                ));
            }
            known = Some(width);
        }
    }
    let told: Vec<String> = inputs.into_iter().map(told).collect();
    let width = known.unwrap_or_default();
    Ok(Finding::Ok(format!("Features are {width} wide, for batches of 1 to 16 {}.", told.join(" and "))))
}

fn parameters(subject: &Subject) -> Result<Finding, Fault> {
    let input = smallest_input(subject)?;
    let sorted = |batch, training| -> Result<Vec<(String, Vec<usize>)>, Fault> {
        let mut params = params(&build(subject, batch, input, training)?);
        params.sort();
        Ok(params)
    };
    let known = sorted(2, true)?;
    if known.is_empty() {
        let hint = "`graph.param` makes a tensor that is trained";
        return Err(Fault::new("looking for parameters", "at least one", "none", hint));
    }
    for (batch, training) in BATCHES {
        let others = sorted(batch, training)?;
        let differs = known.iter().find(|param| !others.contains(param));
        let differs = differs.or_else(|| others.iter().find(|param| !known.contains(param)));
        if let Some((name, shape)) = differs {
            let mode = if training { "training" } else { "evaluation" };
            return Err(Fault::new(
                format!("comparing the parameters of a batch of {batch} in {mode} with those of 2 in training"),
                "the same names and shapes",
                format!("`{name}` {shape:?} in one of them only"),
                "a parameter's shape may depend on the settings and on the input's size, not on `inputs.batch`",
            ));
        }
    }
    let values: usize = known.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    Ok(Finding::Ok(format!("They are {}, of {values} values.", known.len())))
}

/// Inputs of a batch. `empty`: black images, texts of one token.
fn values(input: InputShape, batch: usize, seed: u64, empty: bool) -> Values {
    let mut random = Random::new(seed);
    match input {
        InputShape::Image { height, width } => {
            let images = random.many(batch * 3 * height * width);
            let scale = if empty { 0.0 } else { 2.0 };
            Values::from([("images".into(), images.into_iter().map(|x| x * scale).collect())])
        }
        InputShape::Text { length } => {
            // Ids that any vocabulary has; texts of several lengths.
            let ids = (0..batch * length).map(|_| (1.0 + 20.0 * random.unit()).floor()).collect();
            let tokens = |row: usize| if empty { 1 } else { length - row % (length / 2).max(1) };
            let mask = (0..batch * length).map(|at| if at % length < tokens(at / length) { 1.0 } else { 0.0 });
            Values::from([("input_ids".into(), ids), ("attention_mask".into(), mask.collect())])
        }
    }
}

/// Weights of the features in what is differentiated.
fn cotangent(fragment: &Fragment) -> Vec<f64> {
    let features = fragment.output("features").map(|id| fragment.nodes[id as usize].elements());
    Random::new(77).many(features.unwrap_or_default())
}

fn edge_cases(subject: &Subject) -> Result<Finding, Fault> {
    let input = smallest_input(subject)?;
    for training in [true, false] {
        let fragment = build(subject, 2, input, training)?;
        let wrt: Vec<String> = params(&fragment).into_iter().map(|leaf| leaf.0).collect();
        let wrt = if training { wrt } else { vec![] };
        let mut compiled = compile(&fragment, training.then_some("features"), &wrt)?;
        let gradients = wrt.iter().map(|name| format!("grad.{name}"));
        let outputs: Vec<String> = gradients.chain(fragment.outputs.iter().map(|output| output.0.clone())).collect();
        for (name, empty) in [("random", false), ("empty", true)] {
            let mut values = values(input, 2, 11, empty);
            values.insert("cotangent".into(), cotangent(&fragment));
            set(&mut compiled, &values)?;
            compiled.run(0).map_err(Fault::told)?;
            let mode = if training { "training" } else { "evaluation" };
            let attempted = format!("two {name} {} in {mode}", told(input));
            let hint = "roots, divisors and logarithms need a small number added; a variance may be 0";
            for output in &outputs {
                let numbers = compiled.get(output).unwrap_or_default();
                finite(&attempted, &format!("`{output}`"), &numbers, hint)?;
            }
            for (state, _, numbers) in compiled.kept() {
                finite(&attempted, &format!("`{state}`"), &numbers, hint)?;
            }
        }
    }
    Ok(Finding::Ok(format!("They were {}.", told(input))))
}

fn samples_do_not_mix(subject: &Subject) -> Result<Finding, Fault> {
    let input = smallest_input(subject)?;
    let fragment = build(subject, 2, input, false)?;
    let mut compiled = compile(&fragment, None, &[])?;
    let mut features = |second: u64| -> Result<Vec<f32>, Fault> {
        let (mut batch, other) = (values(input, 2, 21, false), values(input, 2, second, false));
        for (name, values) in &mut batch {
            // The second half is the second sample.
            let half = values.len() / 2;
            values[half..].copy_from_slice(&other[name][half..]);
        }
        set(&mut compiled, &batch)?;
        compiled.run(0).map_err(Fault::told)?;
        Ok(compiled.get("features").unwrap_or_default())
    };
    let (before, after) = (features(22)?, features(23)?);
    let half = before.len() / 2;
    let scale = before.iter().fold(1e-6f32, |most, x| most.max(x.abs()));
    let moved = before[..half].iter().zip(&after).fold(0.0f32, |most, (a, b)| most.max((a - b).abs())) / scale;
    // Sums of a product may be taken in another order.
    match moved <= 1e-4 {
        true => Ok(Finding::Ok(format!("With another second sample, the first one's features moved by {moved:.1e}."))),
        false => Err(Fault::new(
            "evaluating two samples, the second of which is changed",
            "the first one's features to stay, but for rounding",
            format!("them moved by {moved:.1e} of the largest"),
            "in evaluation batch statistics are off: `inputs.training` says which mode it is; is an axis wrong?",
        )),
    }
}

/// Multiplications of a node.
fn work(fragment: &Fragment, node: &Node) -> usize {
    let shape = |input: usize| &fragment.nodes[node.inputs[input] as usize].shape;
    let each: usize = match &node.op {
        Op::Matmul => shape(0).last().copied().unwrap_or(1),
        Op::Conv2d(_) => shape(1)[1..].iter().product(),
        _ => 1,
    };
    node.elements() * each
}

/// What the f64 interpreter does in some seconds.
const MOST_WORK: usize = 20_000_000;

fn gradient(subject: &Subject) -> Result<Finding, Fault> {
    let input = smallest_input(subject)?;
    let fragment = build(subject, 2, input, true)?;
    let work: usize = fragment.nodes.iter().map(|node| work(&fragment, node)).sum();
    let leaves = params(&fragment);
    let size: usize = leaves.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    if work + size > MOST_WORK {
        return Ok(Finding::Skipped(format!(
            "{} million operations are too many in f64; --config gives the sizes of a small encoder.",
            (work + size) / 1_000_000
        )));
    }
    let mut point = Point {
        fragment: &fragment,
        output: "features",
        cotangent: cotangent(&fragment),
        values: first_values(&fragment)?,
        seed: 3,
    };
    point.values.extend(values(input, 2, 31, false));
    let wrt: Vec<_> = leaves.into_iter().filter_map(|leaf| Some((leaf.0.clone(), node(&fragment, &leaf.0)?))).collect();
    let mut random = Random::new(32);
    let direction: Vec<Vec<f64>> = wrt
        .iter()
        .map(|(name, _)| {
            let values = &point.values[name];
            // In proportion to the tensor's own size, so that each counts.
            let mean = values.iter().map(|x| x * x).sum::<f64>() / values.len().max(1) as f64;
            let scale = if mean > 0.0 { mean.sqrt() } else { 0.1 };
            random.many(values.len()).into_iter().map(|x| x * scale).collect()
        })
        .collect();
    let distance = point.compare_along(&wrt, &direction)?;
    let attempted =
        "comparing the gradient along a random direction of all parameters with a difference of the features";
    let expected = format!("at most {:.0e} of it between them", 10.0 * TOLERANCE);
    if distance.held > 10.0 * TOLERANCE {
        let hint = "the formula has a kink or a jump there, or is not finite in f64";
        return Err(Fault::new(attempted, expected, format!("{:.1e}", distance.held), hint));
    }
    if distance.value > 10.0 * TOLERANCE {
        let got = format!("{:.1e}, which vanishes if what `detach` makes is held constant", distance.value);
        return Err(Fault::new(attempted, expected, got, "take out the `detach`, or detach nothing that is trained"));
    }
    Ok(Finding::Ok(format!("The difference is {:.1e} along a random direction of {size} values.", distance.value)))
}

/// Training steps without training: running statistics move.
struct Forward {
    compiled: Compiled,
    input: InputShape,
}

impl Steps for Forward {
    fn compiled(&mut self) -> &mut Compiled {
        &mut self.compiled
    }

    fn step(&mut self, step: u64) -> Result<Vec<f32>, Fault> {
        set(&mut self.compiled, &values(self.input, 2, 50 + step, false))?;
        self.compiled.run(step).map_err(Fault::told)?;
        Ok(self.compiled.get("features").unwrap_or_default())
    }
}

fn survives(subject: &Subject) -> Result<Finding, Fault> {
    let input = smallest_input(subject)?;
    let fragment = build(subject, 2, input, true)?;
    let kept = states(&fragment).len();
    if kept == 0 {
        return Ok(Finding::Skipped("it keeps no state.".into()));
    }
    let mut forward = Forward { compiled: compile(&fragment, None, &[])?, input };
    state::survives(subject, &mut forward, format!("It keeps {kept} states."))
}
