//! From plugins to compiled programs: the training step, and one evaluation program for each tower.

use crate::{ModelError, ModelSpec, Part};
use clip_host_compiler::layout::ChannelsLast;
use clip_host_compiler::plan::{Plan, compile_with};
use clip_host_compiler::precision::BOUNDARY;
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
use std::collections::HashMap;

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

/// Parameters that share a flat tensor, or one that stands alone.
struct Group {
    name: String,
    weight_decay: f64,
    members: Vec<usize>,
    flat: bool,
}

/// Assembles and compiles the training step.
pub fn training(spec: &ModelSpec) -> Result<Training, ModelError> {
    let mut program = Program::default();
    let image = splice_tower(&mut program, spec, Tower::Image, spec.batch, true)?;
    let text = splice_tower(&mut program, spec, Tower::Text, spec.batch, true)?;
    let loss_fragment = spec.loss.plugin.fragment(&Request::Loss(LossRequest {
        config: spec.loss.config.clone(),
        batch: spec.batch,
        embed_dim: spec.embed_dim,
        dataset_size: spec.dataset_size,
    }))?;
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

    // Parameters ride along as outputs while passes rewrite the graph.
    let spliced: Vec<_> = [image.params, text.params, loss.params].into_iter().flatten().collect();
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
    // Leaves are kept through differentiation by the same trick.
    let projected: Vec<bool> = leaves.iter().zip(&values).map(|(l, v)| l != v).collect();
    program.outputs.extend(leaves.iter().map(|&l| ("leaf".to_string(), l)));
    let autograd = Autograd::new(vec![(program.outputs[0].1, None)], values);
    program.run("autograd", &autograd)?;
    let gradients = match autograd.take() {
        Some(result) => result?,
        None => return Err(ModelError::Replay("autograd did not run".into())),
    };
    let leaves: Vec<NodeIndex> = program.outputs.split_off(first).into_iter().map(|o| o.1).collect();

    let groups = group_params(spec, &mut params, &projected)?;
    let scalars = scalar_names(&spec.optimizer)?;
    let grads = join_gradients(&mut program, &groups, &gradients.grads, &params);
    let grads = clip_gradients(&mut program, spec, grads)?;
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
        update_group(&mut program, spec, group, param, grad, target, &params, &scalars)?;
    }
    program.run("flatten parameters", FlattenParams { params: &params })?;
    let plan = compile_with(&mut program, spec.precision)?;
    let states = state_slots(&plan, &groups);
    Ok(Training { plan, params, states, metrics })
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
        }),
        _ => None,
    }
}

/// Whether a parameter decays: not if a pattern of `no_decay` matches it.
pub fn decays(no_decay: &[String], name: &str, dims: usize) -> bool {
    !no_decay.iter().any(|pattern| match pattern.as_str() {
        "1d" => dims == 1,
        pattern => matches(pattern, name),
    })
}

/// `*` stands for any run of characters.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => {
            let Some(tail) = name.strip_prefix(start) else { return false };
            (0..=tail.len()).any(|i| tail.is_char_boundary(i) && matches(rest, &tail[i..]))
        }
    }
}

/// Elementwise optimizers update all parameters of one weight decay in one flat tensor.
fn group_params(spec: &ModelSpec, params: &mut [ParamSlot], projected: &[bool]) -> Result<Vec<Group>, ModelError> {
    let request = ScalarsRequest { config: spec.optimizer.config.clone(), step: 1, lr: 0.0 };
    let elementwise = spec.optimizer.plugin.scalars(&request)?.elementwise;
    let mut groups: Vec<Group> = Vec::new();
    for (index, param) in params.iter_mut().enumerate() {
        let decay = if decays(&spec.no_decay, &param.name, param.shape.len()) { spec.weight_decay } else { 0.0 };
        if !elementwise || projected[index] {
            let name = param.name.clone();
            groups.push(Group { name, weight_decay: decay, members: vec![index], flat: false });
            continue;
        }
        let name = if decay != 0.0 { "params.decay" } else { "params.no_decay" };
        let group = match groups.iter_mut().find(|g| g.flat && g.name == name) {
            Some(group) => group,
            None => {
                groups.push(Group { name: name.into(), weight_decay: decay, members: vec![], flat: true });
                let last = groups.len() - 1;
                &mut groups[last]
            }
        };
        group.members.push(index);
        param.storage = name.into();
    }
    for group in groups.iter().filter(|g| g.flat) {
        let mut offset = 0;
        for &member in &group.members {
            params[member].offset = offset;
            offset += params[member].elements();
        }
    }
    Ok(groups)
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

/// Scales all gradients so that their common L2 norm is at most `clip_grad_norm` (as `torch.nn.utils.clip_grad_norm_`),
/// and adds the outputs `grad_norm` and `finite` (NaN if some gradient is not finite).
fn clip_gradients(
    program: &mut Program,
    spec: &ModelSpec,
    grads: Vec<NodeIndex>,
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
    if let Some(limit) = spec.clip_grad_norm {
        let norm = inputs.iter().fold(zero, |sum, g| sum + g.square().sum_all()).sqrt();
        let scale = (limit / (norm + 1e-6)).minimum(1.0);
        graph.output("grad_norm", norm);
        for (index, grad) in inputs.iter().enumerate() {
            graph.output(&format!("clipped.{index}"), *grad * scale);
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
) -> Result<(), ModelError> {
    let shape = match group.flat {
        true => vec![group.members.iter().map(|&m| params[m].elements()).sum()],
        false => params[group.members[0]].shape.clone(),
    };
    let info = ParamInfo { name: group.name.clone(), shape, weight_decay: group.weight_decay };
    let request = OptimizerRequest { config: spec.optimizer.config.clone(), info };
    let fragment = spec.optimizer.plugin.fragment(&Request::Optimizer(request))?;
    let mut bindings = HashMap::from([("param".to_string(), param), ("grad".to_string(), grad)]);
    for name in scalars {
        let op = Op::Input { name: format!("scalar.{name}") };
        let node = program.push(&Node { op, inputs: vec![], shape: vec![], dtype: DType::F32 }, &[]);
        bindings.insert(format!("scalar.{name}"), node);
    }
    let suffix = group.name.clone();
    let spliced = program.splice(&fragment, &group.name, &bindings, |op, name| match op {
        Op::Input { .. } => name.to_string(),
        _ => format!("optimizer.{name}.{suffix}"),
    })?;
    let new = output(&fragment, &spliced, &spec.optimizer, "param")?;
    program.updates.push((target, new));
    Ok(())
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

/// Compiles a tower in evaluation mode: output `features`, unit rows.
pub fn evaluation(spec: &ModelSpec, params: &[ParamSlot], tower: Tower, batch: usize) -> Result<Plan, ModelError> {
    let mut program = Program::default();
    let nodes = splice_tower(&mut program, spec, tower, batch, false)?;
    program.updates.clear();
    program.outputs.push(("features".into(), nodes.features));
    program.outputs.push((BOUNDARY.into(), nodes.embeddings));
    program.run("channels_last", ChannelsLast)?;
    program.run("flatten parameters", FlattenParams { params })?;
    Ok(compile_with(&mut program, spec.precision)?)
}
