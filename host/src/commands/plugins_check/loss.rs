//! What is asked of a loss.

use super::gradient::{Point, TOLERANCE, node};
use super::numbers::{self, Random, Values, compile, declared, finite, first_values, params, set, states};
use super::report::{Fault, Finding};
use super::state::{self, Steps};
use super::{Check, Subject};
use clip_host_model::replay::Compiled;
use clip_host_plugin_api::export::Request;
use clip_host_plugin_api::interpret::interpret;
use clip_host_plugin_api::ir::{Fragment, Op};
use clip_host_plugin_api::loss::LossRequest;
use serde_json::Value;

pub const CHECKS: [Check; 8] = [
    Check {
        name: "shapes",
        about: "It builds a scalar for batches, widths and data sets of several sizes, and its tables have a row for \
                every sample.",
        needs_settings: true,
        run: shapes,
    },
    Check {
        name: "every pair counts",
        about: "Each image and each text of the batch has an influence on the loss.",
        needs_settings: true,
        run: every_pair_counts,
    },
    Check {
        name: "gradient",
        about: "The gradient that trains is the value's, by central finite differences in f64; what it holds constant is \
                declared.",
        needs_settings: true,
        run: gradient,
    },
    Check {
        name: "finite",
        about: "Loss, gradient, states and metrics are finite in f32 for ordinary batches, batches of 2, and identical, \
                opposite and orthogonal features.",
        needs_settings: true,
        run: edge_cases,
    },
    Check {
        name: "tiny temperature",
        about: "All is finite in f32, too, at the lowest temperatures that the settings allow.",
        needs_settings: true,
        run: tiny_temperature,
    },
    Check {
        name: "limits of settings",
        about: "Every other setting may be set to the limits of its range: all is finite there, or refused in its own words.",
        needs_settings: true,
        run: limits,
    },
    Check {
        name: "states",
        about: "Every state that is declared moves from step to step.",
        needs_settings: true,
        run: |subject| {
            declared(&build(subject, &subject.config, Size { batch: 4, dim: 8, samples: 20 })?).map(Finding::Ok)
        },
    },
    Check {
        name: "state survives",
        about: "Saved in a checkpoint and read back by a fresh process, it goes on to the same bits.",
        needs_settings: true,
        run: survives,
    },
];

/// Sizes of a batch: pairs, width of features, length of per-sample tables.
#[derive(Clone, Copy)]
struct Size {
    batch: usize,
    dim: usize,
    samples: usize,
}

fn build(subject: &Subject, config: &Value, size: Size) -> Result<Fragment, Fault> {
    let Size { batch, dim, samples } = size;
    let request = LossRequest { config: config.clone(), batch, embed_dim: dim, dataset_size: samples };
    subject
        .plugin
        .fragment(&Request::Loss(request))
        .map_err(|error| Fault::told(error).during(format!("a batch of {batch}, width {dim}, {samples} samples")))
}

/// A random batch at a step; epochs are of two steps. `seed` tells batches apart.
fn batch(size: Size, seed: u64, step: u64) -> Values {
    let Size { batch, dim, samples } = size;
    let mut random = Random::new(seed);
    let mut rows = || -> Vec<f64> {
        let rows = (0..batch).flat_map(|_| unit(random.many(dim)));
        rows.collect()
    };
    let (images, texts) = (rows(), rows());
    // Before normalisation, rows are longer.
    let longer = |rows: &[f64]| rows.iter().enumerate().map(|(i, x)| x * (1.5 + 0.1 * (i / dim) as f64)).collect();
    // Steps overlap in their samples, and the last row of the tables is among them.
    let ids = |first: u64| (0..batch).map(move |i| ((first as usize + samples - 1 + i) % samples) as f64);
    Values::from([
        ("image_embeddings".into(), longer(&images)),
        ("text_embeddings".into(), longer(&texts)),
        ("image_features".into(), images),
        ("text_features".into(), texts),
        ("image_ids".into(), ids(step).collect()),
        ("text_ids".into(), ids(step).rev().collect()),
        ("epoch".into(), vec![(step / 2) as f64]),
        ("step".into(), vec![step as f64]),
        ("cotangent".into(), vec![1.0]),
    ])
}

fn unit(mut row: Vec<f64>) -> Vec<f64> {
    let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
    row.iter_mut().for_each(|x| *x /= norm);
    row
}

/// The features that the loss reads.
fn features(fragment: &Fragment) -> Vec<String> {
    let read = numbers::leaves(fragment, |op| match op {
        Op::Input { name } => Some(name),
        _ => None,
    });
    read.into_iter().map(|leaf| leaf.0).filter(|name| FEATURES.contains(&name.as_str())).collect()
}

const FEATURES: [&str; 4] = ["image_features", "text_features", "image_embeddings", "text_embeddings"];

fn shapes(subject: &Subject) -> Result<Finding, Fault> {
    let sizes = [(2, 4, 16), (3, 8, 3), (5, 2, 1000), (8, 16, 100), (128, 256, 5000)];
    let mut names: Option<Vec<String>> = None;
    for (pairs, dim, samples) in sizes {
        let size = Size { batch: pairs, dim, samples };
        let fragment = build(subject, &subject.config, size)?;
        let kept: Vec<String> = params(&fragment).into_iter().chain(states(&fragment)).map(|leaf| leaf.0).collect();
        match &names {
            Some(names) if *names != kept => {
                return Err(Fault::new(
                    format!("building for a batch of {pairs}"),
                    format!("the parameters and states of other batches, [{}]", names.join(", ")),
                    format!("[{}]", kept.join(", ")),
                    "names must not depend on sizes: checkpoints are read by name",
                ));
            }
            _ => names = Some(kept),
        }
        // The largest is built only: its numbers would tell nothing new.
        if pairs <= 8 {
            let mut values = first_values(&fragment)?;
            values.extend(batch(size, 1, 0));
            interpret(&fragment, &values, 0).map_err(|error| {
                let hint = "per-sample tables have the shape [inputs.dataset_size]";
                let attempted = format!("computing the loss of {pairs} pairs with ids up to {}", samples - 1);
                Fault::new(attempted, "ids that lie in the tables", error.to_string(), hint)
            })?;
        }
    }
    let told: Vec<String> = sizes.iter().map(|size| format!("{size:?}")).collect();
    Ok(Finding::Ok(format!("Pairs, width and samples were {}.", told.join(", "))))
}

/// The loss in f64.
fn value(fragment: &Fragment, values: &Values) -> Result<f64, Fault> {
    let results = interpret(fragment, values, 0).map_err(Fault::told)?;
    let id = fragment.output("loss").ok_or_else(|| Fault::told("there is no output `loss`"))?;
    Ok(results[id as usize].first().copied().unwrap_or(f64::NAN))
}

fn every_pair_counts(subject: &Subject) -> Result<Finding, Fault> {
    let size = Size { batch: 8, dim: 5, samples: 20 };
    let fragment = build(subject, &subject.config, size)?;
    let mut values = first_values(&fragment)?;
    values.extend(batch(size, 2, 0));
    let before = value(&fragment, &values)?;
    let other = batch(size, 3, 0);
    let read = features(&fragment);
    for pair in 0..size.batch {
        for modality in ["image", "text"] {
            // By itself: a pair that is left out of the sum may still be compared with the others.
            let own: Vec<&String> = read.iter().filter(|name| name.starts_with(modality)).collect();
            let mut changed = values.clone();
            for name in &own {
                let rows = pair * size.dim..(pair + 1) * size.dim;
                if let (Some(to), Some(from)) = (changed.get_mut(*name), other.get(*name)) {
                    to[rows.clone()].copy_from_slice(&from[rows]);
                }
            }
            // Equal but for rounding.
            let same = (value(&fragment, &changed)? - before).abs() <= 1e-12 * before.abs().max(1e-3);
            if same && !own.is_empty() {
                return Err(Fault::new(
                    format!("giving {modality} {pair} of {} other features", size.batch),
                    format!("another loss than {before}"),
                    "the same",
                    "is a size written as a number somewhere, where `inputs.batch` is meant?",
                ));
            }
        }
    }
    Ok(Finding::Ok(format!("{} of each were given other features, one by one.", size.batch)))
}

/// Steps that come before the compared one, so that tables and averages are filled.
const WARM_UP: u64 = 2;
/// Batches that are tried: one may lie where the loss has a kink.
const TRIES: u64 = 3;

fn gradient(subject: &Subject) -> Result<Finding, Fault> {
    let size = Size { batch: 4, dim: 6, samples: 9 };
    let fragment = build(subject, &subject.config, size)?;
    let read = features(&fragment);
    let leaves: Vec<String> = read.iter().cloned().chain(params(&fragment).into_iter().map(|leaf| leaf.0)).collect();
    let wrt: Vec<_> = leaves.into_iter().filter_map(|name| Some((name.clone(), node(&fragment, &name)?))).collect();
    if read.is_empty() {
        let hint = "compute it from `inputs.image_features` and `inputs.text_features`";
        return Err(Fault::new("looking for what the loss reads", "features of images and texts", "none", hint));
    }
    let declared = subject.plugin.descriptor().held_constant.as_deref();
    let mut result = Err(Fault::told("no batch was tried"));
    for seed in 0..TRIES {
        result = gradient_of_batch(&fragment, size, &wrt, declared, 10 * (seed + 1));
        if result.is_ok() {
            break;
        }
    }
    result.map(Finding::Ok)
}

fn gradient_of_batch(
    fragment: &Fragment,
    size: Size,
    wrt: &[(String, u32)],
    declared: Option<&str>,
    seed: u64,
) -> Result<String, Fault> {
    let mut values = first_values(fragment)?;
    let mut held = 0.0f64;
    let mut moved: Option<(String, f64)> = None;
    for step in 0..=WARM_UP {
        values.extend(batch(size, seed + step, step));
        let point = Point { fragment, output: "loss", cotangent: vec![1.0], values: values.clone(), seed: step };
        // The first step, with fresh tables, and one with filled ones.
        if step == 0 || step == WARM_UP {
            let gradients = point.gradient(&wrt.iter().map(|leaf| leaf.1).collect::<Vec<_>>())?;
            let reaches = wrt
                .iter()
                .zip(&gradients)
                .any(|((name, _), gradient)| FEATURES.contains(&name.as_str()) && gradient.iter().any(|g| *g != 0.0));
            if !reaches {
                return Err(Fault::new(
                    format!("differentiating the loss at step {step}"),
                    "a gradient in the features",
                    "none, so that nothing would be trained",
                    "a `detach` or a comparison stands between the features and the result",
                ));
            }
            for (leaf, distance) in point.compare(wrt, 48)? {
                if distance.held > TOLERANCE {
                    return Err(Fault::new(
                        format!("comparing the gradient in `{leaf}` at step {step} with differences of the loss"),
                        format!("at most {TOLERANCE:.0e} of the largest gradient between them"),
                        format!("{:.1e}, with all that is detached held constant", distance.held),
                        "the formula has a kink or a jump where the batch lies, or is not finite in f64",
                    ));
                }
                held = held.max(distance.held);
                if distance.value > TOLERANCE && declared.is_none() {
                    let nodes: Vec<String> = point.culprits(&leaf)?.iter().map(|id| format!("%{id}")).collect();
                    let nodes = if nodes.is_empty() { "several together".into() } else { nodes.join(", ") };
                    return Err(Fault::new(
                        format!("comparing the gradient in `{leaf}` at step {step} with differences of the loss"),
                        format!("at most {TOLERANCE:.0e} of the largest gradient between them"),
                        format!(
                            "{:.1e}, which vanishes if what `detach` makes is held constant: {nodes}",
                            distance.value
                        ),
                        "take out the `detach` (`plugins inspect --fragment` shows the ops by number); where it is on \
                         purpose, say so with `const HELD_CONSTANT: Option<&'static str>` in its `Loss`",
                    ));
                }
                if distance.value > moved.as_ref().map_or(TOLERANCE, |moved| moved.1) {
                    moved = Some((leaf, distance.value));
                }
            }
        }
        step_values(fragment, &mut values, step)?;
    }
    let leaves: Vec<&str> = wrt.iter().map(|leaf| leaf.0.as_str()).collect();
    let agree = format!("In {} the difference is {held:.1e} of the largest gradient at most", leaves.join(", "));
    Ok(match (declared, moved) {
        (None, _) => format!("{agree}."),
        (Some(what), Some((leaf, distance))) => format!(
            "{agree}, with what it declares held constant: {what}. From the slope of the value itself the gradient is \
             up to {distance:.1e} away, in `{leaf}`."
        ),
        (Some(what), None) => {
            format!("{agree}. It declares to hold constant {what}, which makes no difference with these settings.")
        }
    })
}

/// Moves the states as a step does.
fn step_values(fragment: &Fragment, values: &mut Values, seed: u64) -> Result<(), Fault> {
    let results = interpret(fragment, values, seed).map_err(Fault::told)?;
    for &(state, new) in &fragment.updates {
        if let Op::State { name, .. } = &fragment.nodes[state as usize].op {
            values.insert(name.clone(), results[new as usize].clone());
        }
    }
    Ok(())
}

/// The loss in f32, as training computes it.
struct Training {
    compiled: Compiled,
    /// What must be finite: the loss, gradients, metrics.
    outputs: Vec<String>,
    size: Size,
}

impl Training {
    fn new(subject: &Subject, config: &Value, size: Size) -> Result<Self, Fault> {
        let fragment = build(subject, config, size)?;
        let wrt: Vec<String> =
            features(&fragment).into_iter().chain(params(&fragment).into_iter().map(|leaf| leaf.0)).collect();
        let compiled = compile(&fragment, Some("loss"), &wrt)?;
        let gradients = wrt.iter().map(|name| format!("grad.{name}"));
        let metrics = fragment.metrics.iter().map(|metric| metric.0.clone());
        let outputs = std::iter::once("loss".to_string()).chain(gradients).chain(metrics).collect();
        Ok(Training { compiled, outputs, size })
    }

    /// Runs a step and returns all its numbers.
    fn run(&mut self, values: &Values, step: u64) -> Result<Vec<(String, Vec<f32>)>, Fault> {
        set(&mut self.compiled, values)?;
        self.compiled.run(step).map_err(|error| Fault::told(error).during(format!("running step {step}")))?;
        let outputs = self.outputs.iter().filter_map(|name| Some((name.clone(), self.compiled.get(name)?)));
        let kept = self.compiled.kept().map(|(name, _, values)| (name.to_string(), values.to_vec()));
        Ok(outputs.chain(kept).collect())
    }

    /// Runs four steps of a kind of batch; all numbers must be finite.
    fn finite(&mut self, of: &str, change: fn(Size, &mut Values), hint: &str) -> Result<(), Fault> {
        for step in 0..4 {
            let mut values = batch(self.size, 40 + step, step);
            change(self.size, &mut values);
            for (name, numbers) in self.run(&values, step)? {
                finite(&format!("step {step} of {of}"), &format!("`{name}`"), &numbers, hint)?;
            }
        }
        Ok(())
    }
}

/// A kind of batch: its name, and what it makes of a random one.
type Case = (&'static str, fn(Size, &mut Values));

const CASES: [Case; 4] = [
    ("random features", |_, _| {}),
    ("identical features", |size, values| {
        let first: Vec<f64> = values["image_features"][..size.dim].to_vec();
        all_rows(values, |_, _, at| first[at % size.dim]);
    }),
    ("texts opposite to their images", |_, values| {
        let images = values["image_features"].clone();
        all_rows(values, |image, _, at| if image { images[at] } else { -images[at] });
    }),
    ("orthogonal features", |_, values| {
        all_rows(values, |_, dim, at| if at / dim % dim == at % dim { 1.0 } else { 0.0 });
    }),
];

/// Sets all features: `f` gets whether they are an image's, the width, and the element's index.
fn all_rows(values: &mut Values, f: impl Fn(bool, usize, usize) -> f64) {
    let batch = values["image_ids"].len().max(1);
    for name in FEATURES {
        let features = values.entry(name.into()).or_default();
        let dim = features.len() / batch;
        features.iter_mut().enumerate().for_each(|(at, x)| *x = f(name.starts_with("image"), dim, at));
    }
}

const STABLE: &str = "write it with `softmax`, `log_softmax`, `logsumexp` or `cross_entropy_diagonal`, which do not \
    overflow; roots and logarithms need a small number added, and so do divisors that may be 0";

fn edge_cases(subject: &Subject) -> Result<Finding, Fault> {
    for size in [Size { batch: 2, dim: 8, samples: 5 }, Size { batch: 8, dim: 8, samples: 10 }] {
        for (name, change) in CASES {
            let of = format!("a batch of {} with {name}", size.batch);
            Training::new(subject, &subject.config, size)?.finite(&of, change, STABLE)?;
        }
    }
    let names: Vec<&str> = CASES.iter().map(|case| case.0).collect();
    Ok(Finding::Ok(format!("Four steps each, for batches of 2 and 8: {}.", names.join(", "))))
}

/// A number among the settings, with the limits of its range that can be taken.
struct Range {
    name: String,
    low: Option<f64>,
    high: Option<f64>,
}

fn ranges(subject: &Subject) -> Vec<Range> {
    let properties = subject.plugin.descriptor().schema.get("properties").and_then(Value::as_object);
    let number = |(name, property): (&String, &Value)| {
        // Whole numbers are sizes more often than not: their limits may be anything.
        let is_number = match property.get("type")? {
            Value::Array(types) => types.iter().any(|one| one == "number"),
            one => one == "number",
        };
        let limit = |key: &str| property.get(key).and_then(Value::as_f64);
        is_number.then(|| Range { name: name.clone(), low: limit("minimum"), high: limit("maximum") })
    };
    properties.into_iter().flatten().filter_map(number).collect()
}

/// Whether a name is a temperature's.
fn is_temperature(name: &str) -> bool {
    name.split('_').any(|word| ["temperature", "tau", "temp"].contains(&word))
}

/// What a setting may be at least, if its range does not say.
const TINY: f64 = 1e-3;

/// Tries settings in f32; `None` if the loss refuses them in its own words.
fn try_settings(subject: &Subject, config: &Value, told: &str) -> Result<Option<()>, Fault> {
    let size = Size { batch: 8, dim: 8, samples: 10 };
    let mut training = match Training::new(subject, config, size) {
        Ok(training) => training,
        // A panic is no refusal.
        Err(fault) if fault.problem.contains("the plugin panicked") => return Err(fault.during(told)),
        Err(_) => return Ok(None),
    };
    for (name, change) in CASES {
        training.finite(&format!("{name} with {told}"), change, STABLE)?;
    }
    Ok(Some(()))
}

fn with(config: &Value, changes: &[(&str, f64)]) -> Value {
    let mut config = config.clone();
    for (name, value) in changes {
        config[*name] = (*value).into();
    }
    config
}

fn tiny_temperature(subject: &Subject) -> Result<Finding, Fault> {
    let ranges = ranges(subject);
    let lowest = |range: &Range| range.low.filter(|low| *low > 0.0).unwrap_or(TINY);
    // The highest temperature that is allowed must stay above the lowest.
    let settings = ranges.iter().filter(|range| is_temperature(&range.name) && !range.name.contains("max"));
    let tiny: Vec<(&str, f64)> = settings.map(|range| (range.name.as_str(), lowest(range))).collect();
    let mut tried = Vec::new();
    let alone = tiny.iter().map(std::slice::from_ref);
    for changes in alone.chain((tiny.len() > 1).then_some(tiny.as_slice())) {
        let told: Vec<String> = changes.iter().map(|(name, value)| format!("`{name}` at {value}")).collect();
        let told = told.join(", ");
        if try_settings(subject, &with(&subject.config, changes), &told)?.is_some() {
            tried.push(told);
        }
    }
    // Learnt ones fall by themselves.
    let size = Size { batch: 8, dim: 8, samples: 10 };
    let mut training = Training::new(subject, &subject.config, size)?;
    let learnt: Vec<(String, usize)> =
        training.compiled.kept().map(|(name, _, values)| (name.to_string(), values.len())).collect();
    let parameters = params(&build(subject, &subject.config, size)?);
    for (name, count) in learnt.into_iter().filter(|(name, _)| is_temperature(name)) {
        if !parameters.iter().any(|parameter| parameter.0 == name) {
            continue;
        }
        training.compiled.set(&name, &vec![1e-4; count]).map_err(Fault::told)?;
        let told = format!("the parameter `{name}` at 0.0001");
        training.finite(
            &format!("random features with {told}"),
            CASES[0].1,
            "keep it within limits with `graph.project`",
        )?;
        tried.push(told);
    }
    match (tried.is_empty(), tiny.first()) {
        (false, _) => Ok(Finding::Ok(format!("Tried: {}.", tried.join("; ")))),
        (true, Some((name, _))) => Ok(Finding::Skipped(format!("the loss refuses the lowest `{name}`."))),
        (true, None) => Ok(Finding::Skipped("no setting or parameter is named like a temperature.".into())),
    }
}

fn limits(subject: &Subject) -> Result<Finding, Fault> {
    let (mut tried, mut refused) = (0, Vec::new());
    for Range { name, low, high } in ranges(subject) {
        // The lowest temperatures have a check of their own.
        let low = low.filter(|_| !is_temperature(&name));
        for value in [low, high].into_iter().flatten() {
            let told = format!("`{name}` at {value}");
            match try_settings(subject, &with(&subject.config, &[(&name, value)]), &told)? {
                Some(()) => tried += 1,
                None => refused.push(told),
            }
        }
    }
    Ok(match (tried, refused.len()) {
        (0, 0) => Finding::Skipped("no setting has a range of numbers.".into()),
        (tried, 0) => Finding::Ok(format!("{tried} limits were tried.")),
        (tried, _) => Finding::Ok(format!("{tried} limits were tried; refused were {}.", refused.join(", "))),
    })
}

impl Steps for Training {
    fn compiled(&mut self) -> &mut Compiled {
        &mut self.compiled
    }

    fn step(&mut self, step: u64) -> Result<Vec<f32>, Fault> {
        let numbers = self.run(&batch(self.size, 60 + step, step), step)?;
        Ok(numbers.into_iter().flat_map(|(_, numbers)| numbers).collect())
    }
}

fn survives(subject: &Subject) -> Result<Finding, Fault> {
    let size = Size { batch: 4, dim: 8, samples: 11 };
    let about = match states(&build(subject, &subject.config, size)?).len() {
        0 => "It keeps no state.".to_string(),
        count => format!("It keeps {count} states."),
    };
    state::survives(subject, &mut Training::new(subject, &subject.config, size)?, about)
}
