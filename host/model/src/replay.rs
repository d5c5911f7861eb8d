//! Runs one plugin on given tensors, through the same compiler and kernels as training: parity checks for those who port
//! a formula from elsewhere. Names are those of the golden files.

use crate::device::{Device, Engine, Runner, Tensors as Store};
use crate::{ModelError, Part};
use clip_host_compiler::kernel::Element;
use clip_host_compiler::layout::ChannelsLast;
use clip_host_compiler::plan::compile;
use clip_host_graph::autograd::Autograd;
use clip_host_graph::program::Program;
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::export::Request;
use clip_host_plugin_api::ir::{DType, Fragment, Init, Node, NodeId, Op};
use clip_host_plugin_api::loss::LossRequest;
use clip_host_plugin_api::optimizer::{OptimizerRequest, ParamInfo, ScalarsRequest};
use clip_host_plugin_api::scheduler::{Progress, ScheduleRequest};
use std::collections::{BTreeMap, HashMap};

/// A tensor read from or written to a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Data,
}

/// Its elements.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    F32(Vec<f32>),
    F64(Vec<f64>),
    I64(Vec<i64>),
}

impl Tensor {
    fn f32(shape: &[usize], data: Vec<f32>) -> Self {
        Tensor { shape: shape.to_vec(), data: Data::F32(data) }
    }

    fn values(&self) -> Vec<f64> {
        match &self.data {
            Data::F32(v) => v.iter().map(|&x| f64::from(x)).collect(),
            Data::F64(v) => v.clone(),
            Data::I64(v) => v.iter().map(|&x| x as f64).collect(),
        }
    }

    /// The part of one step: the leading dimension is the step.
    fn step(&self, step: usize) -> Vec<f64> {
        let all = self.values();
        let each = all.len() / self.shape.first().copied().unwrap_or(1).max(1);
        all[(step * each).min(all.len())..((step + 1) * each).min(all.len())].to_vec()
    }
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// Names under which the golden files know a parameter.
const ALIASES: [(&str, &str); 1] = [("logit_scale", "t")];

/// The embeddings before normalisation, and what stands for them where a file has none.
const EMBEDDINGS: [(&str, &str); 2] = [("image_embeddings", "image_features"), ("text_embeddings", "text_features")];

/// Whether a node of the fragment reads the leaf.
fn reads(fragment: &Fragment, leaf: &str) -> bool {
    fragment
        .nodes
        .iter()
        .flat_map(|node| &node.inputs)
        .any(|&id| matches!(&fragment.nodes[id as usize].op, Op::Input { name } if name == leaf))
}

fn alias(name: &str) -> &str {
    ALIASES.iter().find(|a| a.0 == name).map_or(name, |a| a.1)
}

fn required<'t>(tensors: &'t Tensors, name: &str) -> Result<&'t Tensor, ModelError> {
    tensors.get(name).ok_or_else(|| {
        let known: Vec<&str> = tensors.keys().map(String::as_str).collect();
        ModelError::Replay(format!("the input has no tensor `{name}` (it has {})", known.join(", ")))
    })
}

fn shape<const N: usize>(name: &str, tensor: &Tensor) -> Result<[usize; N], ModelError> {
    <[usize; N]>::try_from(tensor.shape.clone())
        .map_err(|got| ModelError::Replay(format!("`{name}`: expected {N} dimensions, got {got:?}")))
}

/// A fragment by itself, compiled with gradients; all its numbers are f32, as in training.
pub struct Compiled {
    executor: Runner,
    store: Store,
    /// Persistent leaves: name, shape, how the first values are drawn, whether it is a parameter.
    leaves: Vec<(String, Vec<usize>, Init, bool)>,
}

impl Compiled {
    /// Compiles the fragment's outputs and metrics, and the gradients of `seeds` (output, cotangent input or none) with
    /// respect to the leaves that `wrt` picks, as outputs `grad.<leaf>`. Parameters and states get their first values.
    ///
    /// # Errors
    /// What the compiler refuses; [`ModelError::Replay`] if there is no such output.
    pub fn new(fragment: &Fragment, seeds: &[(String, Option<String>)], wrt: &[String]) -> Result<Self, ModelError> {
        Compiled::on(&Device::Cpu, fragment, seeds, wrt)
    }

    /// The same on a device.
    ///
    /// # Errors
    /// As [`Compiled::new`].
    pub fn on(
        device: &Device,
        fragment: &Fragment,
        seeds: &[(String, Option<String>)],
        wrt: &[String],
    ) -> Result<Self, ModelError> {
        let mut program = Program::default();
        let spliced = program.splice(fragment, "replay", &HashMap::new(), |_, name| name.to_string())?;
        let projected: HashMap<NodeId, NodeId> = fragment.projections.iter().copied().collect();
        for (name, id) in fragment.outputs.iter().chain(&fragment.metrics) {
            program.outputs.push((name.clone(), spliced.nodes[*id as usize]));
        }
        let mut leaves = Vec::new();
        let mut wrt_nodes = Vec::new();
        let mut params = spliced.params.iter();
        for (id, node) in fragment.nodes.iter().enumerate() {
            let (name, init) = match &node.op {
                Op::Param { name, init } | Op::State { name, init } => (name, Some(*init)),
                Op::Input { name } => (name, None),
                _ => continue,
            };
            let param = if let Op::Param { .. } = node.op { params.next() } else { None };
            if let Some(init) = init {
                leaves.push((name.clone(), node.shape.clone(), init, param.is_some()));
            }
            if let Some(param) = param
                && projected.contains_key(&(id as NodeId))
            {
                program.outputs.push((format!("used.{name}"), param.value));
                program.updates.push((param.leaf, param.value));
            }
            if wrt.contains(name) {
                wrt_nodes.push((name.clone(), param.map_or(spliced.nodes[id], |p| p.value)));
            }
        }
        let cotangent = |program: &mut Program, name: &str, shape: &[usize]| {
            let op = Op::Input { name: name.into() };
            program.push(&Node { op, inputs: vec![], shape: shape.to_vec(), dtype: DType::F32 }, &[])
        };
        let mut pairs = Vec::new();
        for (output, seed) in seeds {
            let Some(id) = fragment.output(output) else {
                return Err(ModelError::Replay(format!("the plugin has no output `{output}`")));
            };
            let shape = fragment.nodes[id as usize].shape.clone();
            let seed = seed.as_ref().map(|name| cotangent(&mut program, name, &shape));
            pairs.push((spliced.nodes[id as usize], seed));
        }
        // References follow through the passes as outputs.
        let first = program.outputs.len();
        for (name, node) in &wrt_nodes {
            program.outputs.push((name.clone(), *node));
        }
        for (output, seed) in &pairs {
            program.outputs.push(("seeded".into(), *output));
            program.outputs.extend(seed.map(|s| ("cotangent".to_string(), s)));
        }
        program.run("channels_last", ChannelsLast)?;
        let tracked = program.outputs.split_off(first);
        let (wrt_now, rest) = tracked.split_at(wrt_nodes.len());
        let mut rest = rest.iter().map(|r| r.1);
        let mut seeds_now = Vec::new();
        for (_, seed) in &pairs {
            let output = rest.next().unwrap_or_default();
            seeds_now.push((output, seed.and_then(|_| rest.next())));
        }
        if !wrt_now.is_empty() {
            let autograd = Autograd::new(seeds_now, wrt_now.iter().map(|w| w.1).collect());
            program.run("autograd", &autograd)?;
            if let Some(gradients) = autograd.take() {
                for ((name, _), grad) in wrt_now.iter().zip(gradients?.grads) {
                    program.outputs.push((format!("grad.{name}"), grad));
                }
            }
        }
        let plan = compile(&mut program)?;
        let engine = Engine::new(device.clone(), 0);
        let mut store = Store::new(&engine);
        let executor = Runner::new(plan, &engine, &mut store)?;
        for (name, shape, init, _) in &leaves {
            let elements = shape.iter().product();
            store.entry(name, elements, Element::F32)?;
            store.fill(name, 0, elements, |values| crate::init::fill(&engine.pool, *init, 0, name, values))?;
        }
        Ok(Compiled { executor, store, leaves })
    }

    /// Sets an f32 input, a parameter or a state.
    ///
    /// # Errors
    /// [`ModelError::TensorSize`], [`ModelError::Execute`] for values of another number. A name that is not there is none.
    pub fn set(&mut self, name: &str, values: &[f64]) -> Result<(), ModelError> {
        let floats: Vec<f32> = values.iter().map(|&v| v as f32).collect();
        if let Some(stored) = self.store.len(name) {
            if stored != values.len() {
                let (expected, got) = (format!("{stored} elements"), format!("{}", values.len()));
                return Err(ModelError::TensorSize { name: name.into(), expected, got });
            }
            return self.store.write(name, 0, &floats);
        }
        self.executor.set_f32(name, &floats)
    }

    /// Sets an i32 input.
    ///
    /// # Errors
    /// As [`Compiled::set`].
    pub fn set_ids(&mut self, name: &str, values: &[f64]) -> Result<(), ModelError> {
        self.executor.set_i32(name, &values.iter().map(|&v| v as i32).collect::<Vec<_>>())
    }

    /// One step: outputs, then the states' updates. `seed` is that of the random ops.
    ///
    /// # Errors
    /// What the executor refuses, an id outside its table for one.
    pub fn run(&mut self, seed: u64) -> Result<(), ModelError> {
        self.executor.run(&mut self.store, seed)
    }

    /// An output, metric or gradient of the last step; `None` if there is none of this name, or it cannot be read.
    pub fn get(&self, output: &str) -> Option<Vec<f32>> {
        self.executor.output(&self.store, output).ok().flatten()
    }

    /// A parameter or state as it is; `None` if there is none of this name, or it cannot be read.
    pub fn value(&self, name: &str) -> Option<Vec<f32>> {
        let len = self.store.len(name)?;
        self.store.read(name, 0, len).ok().flatten().map(std::borrow::Cow::into_owned)
    }

    /// Parameters and states as they are: name, shape, values.
    pub fn kept(&self) -> impl Iterator<Item = (&str, &[usize], Vec<f32>)> {
        self.leaves.iter().filter_map(|(name, shape, ..)| Some((name.as_str(), shape.as_slice(), self.value(name)?)))
    }
}

/// Stacks one result per step.
#[derive(Default)]
struct Stacks(BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl Stacks {
    fn push(&mut self, name: String, shape: &[usize], values: &[f32]) {
        self.0.entry(name).or_insert_with(|| (shape.to_vec(), vec![])).1.extend_from_slice(values);
    }

    fn finish(self, steps: usize) -> Tensors {
        let stacked = |(name, (shape, data)): (String, (Vec<usize>, Vec<f32>))| {
            (name, Tensor::f32(&[&[steps], &shape[..]].concat(), data))
        };
        self.0.into_iter().map(stacked).collect()
    }
}

/// `image_features text_features [image_ids text_ids epoch]`, stacked over steps, and parameters by name (once, or for
/// each step as `<name>_raw`) in; `loss grad_image_features grad_text_features state.* grad_<param> <param>_used` and the
/// metrics out. Without ids, rows are numbered from 0. A loss that reads embeddings before normalisation gets
/// `image_embeddings text_embeddings`, and answers with `grad_image_embeddings grad_text_embeddings`; without them the
/// features are the embeddings too, and their gradients have both ways in them. The data set's size is that of a `state.*` or parameter table
/// among the inputs, else one more than the largest id.
pub fn loss(device: &Device, part: &Part, tensors: &Tensors) -> Result<Tensors, ModelError> {
    let images = required(tensors, "image_features")?;
    let texts = required(tensors, "text_features")?;
    let [steps, batch, embed_dim] = shape("image_features", images)?;
    let ids = |name: &str, step: usize| match tensors.get(name) {
        Some(ids) => ids.step(step),
        None => (0..batch).map(|i| i as f64).collect(),
    };
    let largest = (0..steps).flat_map(|s| [ids("image_ids", s), ids("text_ids", s)].concat()).fold(0.0, f64::max);
    let tables = tensors.iter().filter_map(|(name, t)| match (name.strip_prefix("state."), &t.shape[..]) {
        (Some(_), &[s, n]) if s == steps => Some(n),
        (None, &[n]) if name.ends_with("_tau") => Some(n),
        _ => None,
    });
    let dataset_size = tables.max().unwrap_or(0).max(largest as usize + 1);
    let request = LossRequest { config: part.config.clone(), batch, embed_dim, dataset_size };
    let fragment = part.plugin.fragment(&Request::Loss(request))?;
    let mut wrt = vec!["image_features".to_string(), "text_features".to_string()];
    wrt.extend(fragment.nodes.iter().filter_map(|n| match &n.op {
        Op::Param { name, .. } => Some(name.clone()),
        _ => None,
    }));
    wrt.extend(EMBEDDINGS.iter().filter(|pair| reads(&fragment, pair.0)).map(|pair| pair.0.to_string()));
    let mut compiled = Compiled::on(device, &fragment, &[("loss".into(), None)], &wrt)?;
    let leaves = compiled.leaves.clone();
    let mut out = Stacks::default();
    for step in 0..steps {
        compiled.set("image_features", &images.step(step))?;
        compiled.set("text_features", &texts.step(step))?;
        for (embeddings, features) in EMBEDDINGS {
            let given = tensors.get(embeddings).map_or_else(|| required(tensors, features), Ok)?;
            compiled.set(embeddings, &given.step(step))?;
        }
        for name in ["image_ids", "text_ids"] {
            compiled.set_ids(name, &ids(name, step))?;
        }
        compiled.set("epoch", &tensors.get("epoch").map_or(vec![0.0], |e| e.step(step)))?;
        compiled.set("step", &[step as f64])?;
        for (name, ..) in leaves.iter().filter(|l| l.3) {
            let raw = [format!("{name}_raw"), format!("{}_raw", alias(name))];
            if let Some(tensor) = raw.iter().find_map(|r| tensors.get(r)) {
                compiled.set(name, &tensor.step(step))?;
            } else if let Some(tensor) = tensors.get(name) {
                compiled.set(name, &tensor.values())?;
            }
        }
        compiled.run(step as u64)?;
        for (embeddings, features) in EMBEDDINGS {
            let mut gradient = compiled.get(&format!("grad.{features}")).unwrap_or_default();
            if let Some(of_embeddings) = compiled.get(&format!("grad.{embeddings}")) {
                if tensors.contains_key(embeddings) {
                    out.push(format!("grad_{embeddings}"), &[batch, embed_dim], &of_embeddings);
                } else {
                    gradient.iter_mut().zip(of_embeddings).for_each(|(sum, g)| *sum += g);
                }
            }
            out.push(format!("grad_{features}"), &[batch, embed_dim], &gradient);
        }
        let mut take = |output: &str, name: String, shape: &[usize]| {
            if let Some(values) = compiled.get(output) {
                out.push(name, shape, &values);
            }
        };
        take("loss", "loss".into(), &[]);
        for (name, shape, _, is_param) in &leaves {
            if *is_param {
                take(&format!("grad.{name}"), format!("grad_{}", alias(name)), shape);
                take(&format!("used.{name}"), format!("{}_used", alias(name)), shape);
            }
        }
        for (metric, _) in &fragment.metrics {
            take(metric, metric.clone(), &[]);
        }
        for (name, shape, ..) in leaves.iter().filter(|l| !l.3) {
            if let Some(values) = compiled.value(name) {
                out.push(format!("state.{name}"), shape, &values);
            }
        }
    }
    Ok(out.finish(steps))
}

/// `param_init.* grad.* [lr]` in, `param_after.* state.*` out; gradients and rates are stacked over steps, and without
/// `lr` every step has the given rate. `decay` is a weight decay and the patterns of parameters that do not decay.
pub fn optimizer(
    device: &Device,
    part: &Part,
    lr: f64,
    decay: (f64, &[String]),
    tensors: &Tensors,
) -> Result<Tensors, ModelError> {
    let (weight_decay, no_decay) = decay;
    let mut out = Tensors::new();
    for (name, init) in tensors.iter().filter_map(|(n, t)| Some((n.strip_prefix("param_init.")?, t))) {
        let grads = required(tensors, &format!("grad.{name}"))?;
        let steps = grads.shape.first().copied().unwrap_or(0);
        let rates = tensors.get("lr").map_or(vec![lr; steps], Tensor::values);
        if rates.len() != steps {
            let problem = format!("`grad.{name}` is of {steps} steps, `lr` of {}", rates.len());
            return Err(ModelError::Replay(problem));
        }
        let decay = if crate::groups::decays(no_decay, name, init.shape.len()) { weight_decay } else { 0.0 };
        let info = ParamInfo { name: name.into(), shape: init.shape.clone(), weight_decay: decay };
        let fragment =
            part.plugin.fragment(&Request::Optimizer(OptimizerRequest { config: part.config.clone(), info }))?;
        let mut compiled = Compiled::on(device, &fragment, &[], &[])?;
        let mut param = init.values();
        let mut stack = Stacks::default();
        for (step, lr) in rates.into_iter().enumerate() {
            let request = ScalarsRequest { config: part.config.clone(), step: step as u64 + 1, lr };
            for (scalar, value) in part.plugin.scalars(&request)?.scalars {
                compiled.set(&format!("scalar.{scalar}"), &[value])?;
            }
            compiled.set("param", &param)?;
            compiled.set("grad", &grads.step(step))?;
            compiled.run(step as u64)?;
            let new = compiled.get("param").unwrap_or_default();
            param = new.iter().map(|&v| f64::from(v)).collect();
            stack.push(format!("param_after.{name}"), &init.shape, &new);
        }
        out.extend(stack.finish(steps));
        for (state, shape, ..) in &compiled.leaves {
            if let Some(values) = compiled.value(state) {
                out.insert(format!("state.{state}.{name}"), Tensor::f32(shape, values));
            }
        }
        out.insert(format!("state.step.{name}"), Tensor { shape: vec![], data: Data::I64(vec![steps as i64]) });
    }
    Ok(out)
}

/// `param.*`, `input.image` or `input.input_ids [input.attention_mask]`, and `cotangent.*` in; for both modes
/// `<mode>.output.* <mode>.loss <mode>.grad.* <mode>.grad_input.image <mode>.buffer_after.*` out. Without a mask all ids
/// are tokens.
pub fn encoder(device: &Device, part: &Part, tensors: &Tensors) -> Result<Tensors, ModelError> {
    let mut out = Tensors::new();
    let image = tensors.get("input.image");
    let (batch, input) = match image {
        Some(image) => {
            let [batch, _, height, width] = shape("input.image", image)?;
            (batch, InputShape::Image { height, width })
        }
        None => {
            let [batch, length] = shape("input.input_ids", required(tensors, "input.input_ids")?)?;
            (batch, InputShape::Text { length })
        }
    };
    let cotangents: Vec<&str> = tensors.keys().filter_map(|n| n.strip_prefix("cotangent.")).collect();
    for (mode, training) in [("eval", false), ("train", true)] {
        let request = EncoderRequest { config: part.config.clone(), batch, input, training };
        let mut fragment = part.plugin.fragment(&Request::Encoder(request))?;
        // An encoder may name fewer results in training.
        let seeded: Vec<&str> = cotangents.iter().copied().filter(|c| fragment.output(c).is_some()).collect();
        if seeded.is_empty() {
            continue;
        }
        if !training {
            fragment.updates.clear();
        }
        let seeds: Vec<(String, Option<String>)> =
            seeded.iter().map(|c| (c.to_string(), Some(format!("cotangent.{c}")))).collect();
        let mut wrt: Vec<String> = vec!["images".into()];
        wrt.extend(fragment.nodes.iter().filter_map(|n| match &n.op {
            Op::Param { name, .. } => Some(name.clone()),
            _ => None,
        }));
        let mut compiled = Compiled::on(device, &fragment, &seeds, &wrt)?;
        for (name, ..) in compiled.leaves.clone() {
            let given = tensors.get(&format!("param.{name}"));
            let given = given.ok_or_else(|| ModelError::Replay(format!("the input has no tensor `param.{name}`")))?;
            compiled.set(&name, &given.values())?;
        }
        match image {
            Some(image) => compiled.set("images", &image.values())?,
            None => {
                let ids = required(tensors, "input.input_ids")?.values();
                let mask = tensors.get("input.attention_mask").map(Tensor::values);
                compiled.set("attention_mask", &mask.unwrap_or_else(|| vec![1.0; ids.len()]))?;
                compiled.set_ids("input_ids", &ids)?;
            }
        }
        for c in &seeded {
            compiled.set(&format!("cotangent.{c}"), &required(tensors, &format!("cotangent.{c}"))?.values())?;
        }
        compiled.run(0)?;
        let mut total = 0.0;
        for (name, id) in &fragment.outputs {
            let shape = &fragment.nodes[*id as usize].shape;
            let values = compiled.get(name).unwrap_or_default();
            if let Some(weights) = tensors.get(&format!("cotangent.{name}")) {
                total += values.iter().zip(weights.values()).map(|(&v, w)| f64::from(v) * w).sum::<f64>();
            }
            out.insert(format!("{mode}.output.{name}"), Tensor::f32(shape, values));
        }
        out.insert(format!("{mode}.loss"), Tensor { shape: vec![], data: Data::F64(vec![total]) });
        for (name, shape, _, is_param) in &compiled.leaves {
            if *is_param {
                if let Some(grad) = compiled.get(&format!("grad.{name}")) {
                    out.insert(format!("{mode}.grad.{name}"), Tensor::f32(shape, grad));
                }
            } else if training && let Some(values) = compiled.value(name) {
                let tensor = match name.ends_with("num_batches_tracked") {
                    true => {
                        Tensor { shape: shape.clone(), data: Data::I64(values.iter().map(|&v| v as i64).collect()) }
                    }
                    false => Tensor::f32(shape, values),
                };
                out.insert(format!("{mode}.buffer_after.{name}"), tensor);
            }
        }
        if let (Some(image), Some(grad)) = (image, compiled.get("grad.images")) {
            out.insert(format!("{mode}.grad_input.image"), Tensor::f32(&image.shape, grad));
        }
    }
    Ok(out)
}

/// `index` (numbers of steps) or `epoch` (with fractions, to the nearest step) in, `lr` out; the rates are asked for in
/// this order. With `metric`, each place has one of an evaluation just before. `run` says what else the schedule is told.
pub fn scheduler(part: &Part, run: &Progress, tensors: &Tensors) -> Result<Tensors, ModelError> {
    let per_epoch = run.steps_per_epoch.max(1);
    let (places, steps): (&Tensor, Vec<u64>) = match (tensors.get("index"), tensors.get("epoch")) {
        (None, Some(epochs)) => {
            let step = |epoch: f64| (epoch * per_epoch as f64).round() as u64;
            (epochs, epochs.values().into_iter().map(step).collect())
        }
        _ => {
            let index = required(tensors, "index")?;
            (index, index.values().into_iter().map(|at| at as u64).collect())
        }
    };
    let metrics = tensors.get("metric").map(Tensor::values);
    if let Some(metrics) = metrics.as_ref().filter(|metrics| metrics.len() != steps.len()) {
        let problem = format!("`metric` has {} elements, there are {} places", metrics.len(), steps.len());
        return Err(ModelError::Replay(problem));
    }
    let mut state = serde_json::Value::Null;
    let mut lr = Vec::new();
    for (place, step) in steps.into_iter().enumerate() {
        let mut progress = Progress { step, epoch: step / per_epoch, ..run.clone() };
        if let Some(metrics) = &metrics {
            (progress.metric, progress.evaluations) = (Some(metrics[place]), place as u64 + 1);
        }
        let answer = part.plugin.schedule(&ScheduleRequest { config: part.config.clone(), progress, state })?;
        state = answer.state;
        lr.push(answer.lr);
    }
    Ok(Tensors::from([("lr".to_string(), Tensor { shape: places.shape.clone(), data: Data::F64(lr) })]))
}
