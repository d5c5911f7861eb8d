//! From plugins to compiled programs: the training step, and one evaluation program for each tower.

use crate::grad_scaler::SCALE;
use crate::groups::{
    Group, Groups, ScalarSet, active_input, check_elementwise, check_patterns, group_of, group_params, scalar_input,
};
use crate::{ModelError, ModelSpec, Part};
use clip_host_compiler::kept;
use clip_host_compiler::layout::ChannelsLast;
use clip_host_compiler::plan::{Plan, compile_kept};
use clip_host_compiler::precision::{BOUNDARY, Precision};
use clip_host_graph::autograd::Autograd;
use clip_host_graph::program::{Program, Spliced};
use clip_host_graph::rewrite::rewrite;
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::export::Request;
use clip_host_plugin_api::graph::{Graph, Tensor};
use clip_host_plugin_api::ir::{DType, Fragment, Init, Node, Op};
use clip_host_plugin_api::loss::LossRequest;
use clip_host_plugin_api::optimizer::{OptimizerRequest, ParamInfo, ScalarsRequest};
use luminal::compiler_utils::{Compiler, ToIdsMut};
use luminal::graph::{Graph as LuminalGraph, NodeIndex};
use std::collections::{BTreeSet, HashMap};

/// One of the two towers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tower {
    Image,
    Text,
}

impl Tower {
    fn prefix(self) -> &'static str {
        match self {
            Tower::Image => "image_encoder",
            Tower::Text => "text_encoder",
        }
    }

    /// The host's linear head.
    fn head(self) -> &'static str {
        match self {
            Tower::Image => "image_proj",
            Tower::Text => "text_proj",
        }
    }

    fn part(self, spec: &ModelSpec) -> &Part {
        match self {
            Tower::Image => &spec.image_encoder,
            Tower::Text => &spec.text_encoder,
        }
    }
}

/// A parameter and the memory that it is kept in.
#[derive(Clone, Debug)]
pub struct ParamSlot {
    pub name: String,
    pub shape: Vec<usize>,
    pub init: Init,
    /// The stored tensor: the parameter's own, or its group's flat one.
    pub storage: String,
    pub offset: usize,
    /// It is kept in bf16.
    pub half: bool,
}

impl ParamSlot {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A stored tensor that is not a parameter.
#[derive(Clone, Debug)]
pub struct StateSlot {
    pub name: String,
    pub shape: Vec<usize>,
    pub init: Init,
    /// For a moment of a flat group: the group's tensor.
    pub group: Option<String>,
}

/// The compiled training step and what is kept between steps.
pub struct Training {
    pub plan: Plan,
    pub params: Vec<ParamSlot>,
    pub states: Vec<StateSlot>,
    pub metrics: Vec<String>,
    /// The sets of the optimizer's scalars.
    pub sets: Vec<ScalarSet>,
}

/// A tower with its head: results are unit rows and the rows before normalisation.
struct TowerNodes {
    features: NodeIndex,
    embeddings: NodeIndex,
    params: Vec<clip_host_graph::program::SplicedParam>,
}

fn named(prefix: &str) -> impl Fn(&Op, &str) -> String + '_ {
    move |op, name| match op {
        Op::Input { .. } => name.to_string(),
        _ => format!("{prefix}.{name}"),
    }
}

fn encoder_fragment(spec: &ModelSpec, tower: Tower, batch: usize, training: bool) -> Result<Fragment, ModelError> {
    let part = tower.part(spec);
    let input = match tower {
        Tower::Image => InputShape::Image { height: spec.image_size, width: spec.image_size },
        Tower::Text => InputShape::Text { length: spec.text_length },
    };
    let config = part.config.clone();
    Ok(part.plugin.fragment(&Request::Encoder(EncoderRequest { config, batch, input, training }))?)
}

fn loss_fragment(spec: &ModelSpec) -> Result<Fragment, ModelError> {
    let &ModelSpec { batch, embed_dim, dataset_size, .. } = spec;
    let config = spec.loss.config.clone();
    Ok(spec.loss.plugin.fragment(&Request::Loss(LossRequest { config, batch, embed_dim, dataset_size }))?)
}

/// x·Wᵀ + b and its rows at unit length, initialised as `torch.nn.Linear`.
fn head_fragment(batch: usize, width: usize, embed_dim: usize) -> Result<Fragment, ModelError> {
    let graph = Graph::new();
    let bound = 1.0 / (width as f64).sqrt();
    let x = graph.input("features", &[batch, width], DType::F32);
    let weight = graph.param("weight", &[embed_dim, width], Init::Uniform { bound });
    let bias = graph.param("bias", &[embed_dim], Init::Uniform { bound });
    let embeddings = x.linear(weight, Some(bias));
    graph.output("embeddings", embeddings);
    graph.output("features", embeddings.l2_normalize());
    Ok(graph.finish()?)
}

fn output(fragment: &Fragment, spliced: &Spliced, part: &Part, name: &str) -> Result<NodeIndex, ModelError> {
    let id = fragment.output(name).ok_or_else(|| ModelError::Output {
        plugin: part.plugin.to_string(),
        name: name.into(),
        expected: String::new(),
        got: "nothing".into(),
    })?;
    Ok(spliced.nodes[id as usize])
}

fn splice_tower(
    program: &mut Program,
    spec: &ModelSpec,
    tower: Tower,
    batch: usize,
    training: bool,
) -> Result<TowerNodes, ModelError> {
    let part = tower.part(spec);
    let fragment = encoder_fragment(spec, tower, batch, training)?;
    let mut spliced = program.splice(&fragment, tower.prefix(), &HashMap::new(), named(tower.prefix()))?;
    let features = output(&fragment, &spliced, part, "features")?;
    let width = fragment.output("features").map(|id| fragment.nodes[id as usize].shape.clone()).unwrap_or_default();
    let [rows, width] = width[..] else {
        return Err(ModelError::Output {
            plugin: part.plugin.to_string(),
            name: "features".into(),
            expected: format!("[{batch}, width]"),
            got: format!("{width:?}"),
        });
    };
    debug_assert_eq!(rows, batch);
    let head = head_fragment(batch, width, spec.embed_dim)?;
    let bindings = HashMap::from([("features".to_string(), features)]);
    let head_nodes = program.splice(&head, tower.head(), &bindings, named(tower.head()))?;
    spliced.params.extend(head_nodes.params);
    let of = |name: &str| head.output(name).map(|id| head_nodes.nodes[id as usize]).unwrap_or_default();
    Ok(TowerNodes { features: of("features"), embeddings: of("embeddings"), params: spliced.params })
}

/// Assembles and compiles the training step.
pub fn training(spec: &ModelSpec) -> Result<Training, ModelError> {
    let mut program = Program::default();
    let image = splice_tower(&mut program, spec, Tower::Image, spec.batch, true)?;
    let text = splice_tower(&mut program, spec, Tower::Text, spec.batch, true)?;
    let loss_fragment = loss_fragment(spec)?;
    let bindings = HashMap::from([
        ("image_features".to_string(), image.features),
        ("text_features".to_string(), text.features),
        ("image_embeddings".to_string(), image.embeddings),
        ("text_embeddings".to_string(), text.embeddings),
    ]);
    let loss = program.splice(&loss_fragment, "loss", &bindings, named("loss"))?;
    program.outputs.push(("loss".into(), output(&loss_fragment, &loss, &spec.loss, "loss")?));
    program.outputs.extend([image.embeddings, text.embeddings].map(|id| (BOUNDARY.to_string(), id)));
    let mut metrics = Vec::new();
    for (name, id) in &loss_fragment.metrics {
        program.outputs.push((format!("metric.{name}"), loss.nodes[*id as usize]));
        metrics.push(name.clone());
    }

    let is_scaled = spec.precision == Precision::Fp16;
    if is_scaled {
        let loss = program.outputs[0].1;
        let scale = spec.grad_scaler.leaf(&mut program, loss);
        program.outputs.push((SCALE.into(), scale));
    }
    let output_of = |program: &Program, name: &str| program.outputs.iter().find(|o| o.0 == name).map(|o| o.1);

    let mut spliced: Vec<_> = [image.params, text.params, loss.params].into_iter().flatten().collect();
    let name = |leaf| param_slot(&program, leaf).map_or(String::new(), |slot| slot.name);
    check_patterns(spec, &spliced.iter().map(|p| name(p.leaf)).collect::<Vec<_>>())?;
    let frozen = |leaf| group_of(spec, &name(leaf)).is_some_and(|(_, group)| group.freeze);
    // Those that are trained come first: everything below that is indexed by a gradient is theirs.
    spliced.sort_by_cached_key(|p| frozen(p.leaf));
    let trained = spliced.iter().filter(|p| !frozen(p.leaf)).count();
    if trained == 0 {
        return Err(ModelError::AllFrozen);
    }
    // Parameters ride along as outputs while passes rewrite the graph.
    let first = program.outputs.len();
    for (index, param) in spliced.iter().enumerate() {
        program.outputs.push((format!("leaf.{index}"), param.leaf));
        program.outputs.push((format!("value.{index}"), param.value));
    }
    program.run("channels_last", ChannelsLast)?;
    let tracked = program.outputs.split_off(first);
    let leaves: Vec<NodeIndex> = tracked.iter().step_by(2).map(|o| o.1).collect();
    let values: Vec<NodeIndex> = tracked.iter().skip(1).step_by(2).map(|o| o.1).collect();

    let mut params: Vec<ParamSlot> = leaves.iter().filter_map(|&leaf| param_slot(&program, leaf)).collect();
    params.iter_mut().for_each(|param| param.half = is_half(spec, &param.name));
    // Leaves are kept through differentiation by the same trick.
    let projected: Vec<bool> = leaves.iter().zip(&values).map(|(l, v)| l != v).collect();
    program.outputs.extend(leaves.iter().map(|&l| ("leaf".to_string(), l)));
    let seed = output_of(&program, SCALE);
    let autograd = Autograd::new(vec![(program.outputs[0].1, seed)], values[..trained].to_vec());
    program.run("autograd", &autograd)?;
    let gradients = match autograd.take() {
        Some(result) => result?,
        None => return Err(ModelError::Replay("autograd did not run".into())),
    };
    let leaves: Vec<NodeIndex> = program.outputs.split_off(first).into_iter().map(|o| o.1).collect();

    let Groups { groups, sets } = group_params(spec, &mut params[..trained], &projected)?;
    let scalars = scalar_names(&spec.optimizer)?;
    let mut grads = join_gradients(&mut program, &groups, &gradients.grads, &params);
    for (group, grad) in groups.iter().zip(&mut grads).filter(|(group, _)| group.late) {
        // A gradient that moves nothing has no part in the common norm either.
        *grad = gate(&mut program, group.set, *grad, None)?;
    }
    let scale = output_of(&program, SCALE);
    let grads = clip_gradients(&mut program, spec, grads, scale)?;
    let mut statistics = BTreeSet::new();
    for (group, &grad) in groups.iter().zip(&grads) {
        let param = match group.flat {
            true => {
                let op = Op::Param { name: group.name.clone(), init: Init::Constant(0.0) };
                let elements = group.members.iter().map(|&m| params[m].elements()).sum();
                program.push(&Node { op, inputs: vec![], shape: vec![elements], dtype: DType::F32 }, &[])
            }
            false => gradients.wrt[group.members[0]],
        };
        let target = if group.flat { param } else { leaves[group.members[0]] };
        statistics.extend(update_group(&mut program, spec, group, param, grad, target, &params, &scalars)?);
    }
    let halves = match spec.halves.statistics {
        true => kept::halves(half_params(&params).chain(statistics)),
        false => kept::halves(half_params(&params)),
    };
    if let (Some(scale), Some(finite)) = (scale, output_of(&program, "finite")) {
        spec.grad_scaler.guard(&mut program, scale, finite)?;
    }
    program.run("flatten parameters", FlattenParams { params: &params })?;
    let plan = compile_kept(&mut program, spec.precision, &halves)?;
    let states = state_slots(&plan, &groups);
    Ok(Training { plan, params, states, metrics, sets })
}

fn param_slot(program: &Program, leaf: NodeIndex) -> Option<ParamSlot> {
    let operator = clip_host_graph::rewrite::operator(&program.graph, leaf)?;
    match &operator.op {
        Op::Param { name, init } => Some(ParamSlot {
            name: name.clone(),
            shape: operator.shape.clone(),
            init: *init,
            storage: name.clone(),
            offset: 0,
            half: false,
        }),
        _ => None,
    }
}

fn scalar_names(optimizer: &Part) -> Result<Vec<String>, ModelError> {
    let request = ScalarsRequest { config: optimizer.config.clone(), step: 1, lr: 0.0 };
    Ok(optimizer.plugin.scalars(&request)?.scalars.into_iter().map(|s| s.0).collect())
}

/// One gradient for each group: a flat group's are laid end to end.
fn join_gradients(
    program: &mut Program,
    groups: &[Group],
    grads: &[NodeIndex],
    params: &[ParamSlot],
) -> Vec<NodeIndex> {
    // luminal counts operands in a byte.
    const MOST: usize = 200;
    let f32 = |op: Op, shape: Vec<usize>| Node { op, inputs: vec![], shape, dtype: DType::F32 };
    groups
        .iter()
        .map(|group| {
            if !group.flat {
                return grads[group.members[0]];
            }
            let mut parts: Vec<(NodeIndex, usize)> = group
                .members
                .iter()
                .map(|&m| {
                    let elements = params[m].elements();
                    (program.push(&f32(Op::Reshape, vec![elements]), &[grads[m]]), elements)
                })
                .collect();
            while parts.len() > 1 {
                parts = parts
                    .chunks(MOST)
                    .map(|chunk| {
                        let inputs: Vec<NodeIndex> = chunk.iter().map(|c| c.0).collect();
                        let elements = chunk.iter().map(|c| c.1).sum();
                        (program.push(&f32(Op::Concat { axis: 0 }, vec![elements]), &inputs), elements)
                    })
                    .collect();
            }
            parts[0].0
        })
        .collect()
}

/// Divides the gradients by the loss's scale if there is one, limits every element of them to ±`clip_grad_value` (as `torch.nn.utils.clip_grad_value_`), then scales all so
/// that their common L2 norm is at most `clip_grad_norm` (as `torch.nn.utils.clip_grad_norm_`), and adds the outputs
/// `grad_norm` and `finite` (NaN if some gradient is not finite).
fn clip_gradients(
    program: &mut Program,
    spec: &ModelSpec,
    grads: Vec<NodeIndex>,
    scale: Option<NodeIndex>,
) -> Result<Vec<NodeIndex>, ModelError> {
    let graph = Graph::new();
    let mut bindings = HashMap::new();
    let mut inputs: Vec<Tensor> = Vec::new();
    for (index, &grad) in grads.iter().enumerate() {
        let shape =
            clip_host_graph::rewrite::operator(&program.graph, grad).map(|o| o.shape.clone()).unwrap_or_default();
        inputs.push(graph.input(&format!("grad.{index}"), &shape, DType::F32));
        bindings.insert(format!("grad.{index}"), grad);
    }
    let zero = graph.scalar(0.0);
    let finite = inputs.iter().fold(zero, |sum, g| sum + (*g * 0.0).sum_all());
    graph.output("finite", finite);
    if let Some(scale) = scale {
        let shape = clip_host_graph::rewrite::operator(&program.graph, scale).map_or(vec![], |o| o.shape.clone());
        let inverse = (1.0 / graph.input("scale", &shape, DType::F32)).reshape(&[]);
        bindings.insert("scale".to_string(), scale);
        inputs.iter_mut().for_each(|grad| *grad = *grad * inverse);
    }
    if let Some(limit) = spec.clip_grad_value {
        inputs.iter_mut().for_each(|grad| *grad = grad.clamp(-limit, limit));
    }
    if let Some(limit) = spec.clip_grad_norm {
        let norm = inputs.iter().fold(zero, |sum, g| sum + g.square().sum_all()).sqrt();
        let scale = (limit / (norm + 1e-6)).minimum(1.0);
        graph.output("grad_norm", norm);
        inputs.iter_mut().for_each(|grad| *grad = *grad * scale);
    }
    if scale.is_some() || spec.clip_grad_value.is_some() || spec.clip_grad_norm.is_some() {
        for (index, grad) in inputs.iter().enumerate() {
            graph.output(&format!("clipped.{index}"), *grad);
        }
    }
    let fragment = graph.finish()?;
    let spliced = program.splice(&fragment, "gradients", &bindings, named("gradients"))?;
    let of = |name: &str| fragment.output(name).map(|id| spliced.nodes[id as usize]);
    for name in ["finite", "grad_norm"] {
        program.outputs.extend(of(name).map(|id| (name.to_string(), id)));
    }
    Ok(grads.iter().enumerate().map(|(i, &grad)| of(&format!("clipped.{i}")).unwrap_or(grad)).collect())
}

/// Splices the optimizer's update of a group; the names of the states that are of the group's own size.
#[allow(clippy::too_many_arguments)]
fn update_group(
    program: &mut Program,
    spec: &ModelSpec,
    group: &Group,
    param: NodeIndex,
    grad: NodeIndex,
    target: NodeIndex,
    params: &[ParamSlot],
    scalars: &[String],
) -> Result<Vec<String>, ModelError> {
    let shape = match group.flat {
        true => vec![group.members.iter().map(|&m| params[m].elements()).sum()],
        false => params[group.members[0]].shape.clone(),
    };
    let elements = shape.iter().product();
    let info = ParamInfo { name: group.name.clone(), shape, weight_decay: group.weight_decay };
    let request = OptimizerRequest { config: spec.optimizer.config.clone(), info };
    let fragment = spec.optimizer.plugin.fragment(&Request::Optimizer(request))?;
    let mut bindings = HashMap::from([("param".to_string(), param), ("grad".to_string(), grad)]);
    for name in scalars {
        let op = Op::Input { name: scalar_input(group.set, name) };
        let node = program.push(&Node { op, inputs: vec![], shape: vec![], dtype: DType::F32 }, &[]);
        bindings.insert(format!("scalar.{name}"), node);
    }
    if group.flat {
        check_elementwise(&spec.optimizer.plugin.to_string(), &fragment)?;
    }
    let first = program.updates.len();
    let suffix = group.name.clone();
    let spliced = program.splice(&fragment, &group.name, &bindings, |op, name| match op {
        Op::Input { .. } => name.to_string(),
        _ => format!("optimizer.{name}.{suffix}"),
    })?;
    let new = output(&fragment, &spliced, &spec.optimizer, "param")?;
    program.updates.push((target, new));
    if group.late {
        for index in first..program.updates.len() {
            let (leaf, value) = program.updates[index];
            program.updates[index].1 = gate(program, group.set, value, Some(leaf))?;
        }
    }
    let states = statistics(&fragment, elements);
    Ok(states.map(|name| format!("optimizer.{name}.{}", group.name)).collect())
}

/// What an optimizer keeps for each element of a parameter of so many: the names of states of that size. A single number
/// is worth no rounding.
fn statistics(fragment: &Fragment, elements: usize) -> impl Iterator<Item = &str> {
    fragment.nodes.iter().filter_map(move |node| match &node.op {
        Op::State { name, .. } if node.elements() == elements && !node.shape.is_empty() => Some(name.as_str()),
        _ => None,
    })
}

/// Whether an optimizer keeps something for each element of a parameter.
pub(crate) fn keeps_statistics(optimizer: &Part) -> Result<bool, ModelError> {
    for shape in [vec![4], vec![4, 4]] {
        let elements = shape.iter().product();
        let info = ParamInfo { name: "param".into(), shape, weight_decay: 0.0 };
        let request = OptimizerRequest { config: optimizer.config.clone(), info };
        if statistics(&optimizer.plugin.fragment(&Request::Optimizer(request))?, elements).next().is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a parameter is kept in bf16.
fn is_half(spec: &ModelSpec, name: &str) -> bool {
    let of = |tower: Tower| name.strip_prefix(tower.prefix()).is_some_and(|rest| rest.starts_with('.'));
    spec.halves.image_encoder && of(Tower::Image) || spec.halves.text_encoder && of(Tower::Text)
}

/// The leaves that parameters in bf16 are kept in.
fn half_params(params: &[ParamSlot]) -> impl Iterator<Item = String> {
    params.iter().filter(|param| param.half).map(|param| param.storage.clone())
}

/// `new` once the parameters of a set are no longer frozen; before, `old` or zero.
fn gate(program: &mut Program, set: usize, new: NodeIndex, old: Option<NodeIndex>) -> Result<NodeIndex, ModelError> {
    let shape = clip_host_graph::rewrite::operator(&program.graph, new).map_or(vec![], |o| o.shape.clone());
    let graph = Graph::new();
    let input = |name: &str| graph.input(name, &shape, DType::F32);
    let active = graph.input(&active_input(set), &[], DType::F32);
    let other = if old.is_some() { input("old") } else { graph.scalar(0.0) };
    graph.output("kept", active.where_(input("new"), other));
    let fragment = graph.finish()?;
    let mut bindings = HashMap::from([("new".to_string(), new)]);
    bindings.extend(old.map(|old| ("old".to_string(), old)));
    let spliced = program.splice(&fragment, "freeze", &bindings, |_, name| name.to_string())?;
    Ok(fragment.output("kept").map_or(new, |id| spliced.nodes[id as usize]))
}

/// States that the plan keeps, with the flat group that a moment belongs to.
fn state_slots(plan: &Plan, groups: &[Group]) -> Vec<StateSlot> {
    plan.leaves
        .iter()
        .filter_map(|&leaf| {
            let node = &plan.nodes[leaf as usize];
            let Op::State { name, init } = &node.op else { return None };
            let group = groups
                .iter()
                .find(|g| g.flat && name.starts_with("optimizer.") && name.ends_with(&format!(".{}", g.name)))
                .map(|g| g.name.clone());
            Some(StateSlot { name: name.clone(), shape: node.shape.clone(), init: *init, group })
        })
        .collect()
}

/// Replaces parameters that live in a flat tensor by slices of it.
struct FlattenParams<'a> {
    params: &'a [ParamSlot],
}

impl Compiler for FlattenParams<'_> {
    fn compile<T: ToIdsMut>(&self, graph: &mut LuminalGraph, ids: T) {
        let lengths = self.params.iter().fold(HashMap::<&str, usize>::new(), |mut lengths, p| {
            let length = lengths.entry(&p.storage).or_default();
            *length = (*length).max(p.offset + p.elements());
            lengths
        });
        let flat: HashMap<&str, &ParamSlot> =
            self.params.iter().filter(|p| p.storage != p.name).map(|p| (p.name.as_str(), p)).collect();
        rewrite(graph, ids, |nodes, builder| {
            let mut new = Vec::with_capacity(nodes.len());
            for node in nodes {
                let slot = match &node.op {
                    Op::Param { name, .. } => flat.get(name.as_str()),
                    _ => None,
                };
                new.push(match slot {
                    Some(slot) => {
                        let op = Op::Param { name: slot.storage.clone(), init: Init::Constant(0.0) };
                        let all = builder.f32(op, &[], &[lengths[slot.storage.as_str()]]);
                        let (start, end) = (slot.offset, slot.offset + slot.elements());
                        let part = Op::Slice { starts: vec![start], ends: vec![end] };
                        let part = builder.f32(part, &[all], &[end - start]);
                        builder.f32(Op::Reshape, &[part], &slot.shape)
                    }
                    None => {
                        let inputs = node.inputs.iter().map(|&i| new[i as usize]).collect();
                        builder.push(node.op.clone(), inputs, node.shape.clone(), node.dtype)
                    }
                });
            }
            new
        });
    }
}

/// The names of all parameters, without compiling anything.
pub fn param_names(spec: &ModelSpec) -> Result<Vec<String>, ModelError> {
    let mut program = Program::default();
    let image = splice_tower(&mut program, spec, Tower::Image, spec.batch, true)?;
    let text = splice_tower(&mut program, spec, Tower::Text, spec.batch, true)?;
    let loss = loss_fragment(spec)?;
    let leaves = image.params.iter().chain(&text.params).map(|p| p.leaf);
    let mut names: Vec<String> = leaves.filter_map(|leaf| Some(param_slot(&program, leaf)?.name)).collect();
    names.extend(loss.nodes.iter().filter_map(|node| match &node.op {
        Op::Param { name, .. } => Some(named("loss")(&node.op, name)),
        _ => None,
    }));
    Ok(names)
}

/// A tower in evaluation mode, not compiled: output `features`, unit rows.
pub fn evaluation_program(spec: &ModelSpec, tower: Tower, batch: usize) -> Result<Program, ModelError> {
    let mut program = Program::default();
    let nodes = splice_tower(&mut program, spec, tower, batch, false)?;
    program.updates.clear();
    program.outputs.push(("features".into(), nodes.features));
    program.outputs.push((BOUNDARY.into(), nodes.embeddings));
    Ok(program)
}

/// Compiles a tower in evaluation mode: output `features`, unit rows.
pub fn evaluation(spec: &ModelSpec, params: &[ParamSlot], tower: Tower, batch: usize) -> Result<Plan, ModelError> {
    let mut program = evaluation_program(spec, tower, batch)?;
    program.run("channels_last", ChannelsLast)?;
    program.run("flatten parameters", FlattenParams { params })?;
    Ok(compile_kept(&mut program, spec.precision, &kept::halves(half_params(params)))?)
}
