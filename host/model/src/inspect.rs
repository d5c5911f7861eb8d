//! A compiled step as a person reads it: each kernel with what it computes, what it costs, where its operands are, and
//! which part of the model it works for.

use crate::assemble::{ParamSlot, Training, training};
use crate::session::phases;
use crate::{ModelError, ModelSpec};
use clip_host_compiler::cost::{Cost, Kind, cost, distinct, points};
use clip_host_compiler::kernel::{Kernel, Operand};
use clip_host_compiler::module::{Class, class};
use clip_host_compiler::plan::{Plan, Region};
use clip_host_plugin_api::ir::{NodeId, Op};
use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

/// Part of a step in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    Forward,
    Backward,
    Update,
}

impl Phase {
    /// All phases in order.
    pub const ALL: [Phase; 3] = [Phase::Forward, Phase::Backward, Phase::Update];

    /// The name that plans and traces are printed with.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Forward => "forward",
            Phase::Backward => "backward",
            Phase::Update => "update",
        }
    }
}

/// The part of the model that a kernel works for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// The image encoder.
    Image,
    /// The text encoder.
    Text,
    /// The heads and the loss, and what is done to all gradients together.
    Shared,
}

impl Owner {
    /// The name that plans and traces are printed with.
    pub fn name(self) -> &'static str {
        match self {
            Owner::Image => "image",
            Owner::Text => "text",
            Owner::Shared => "heads+loss",
        }
    }
}

/// An operand in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Buffer {
    /// The plan's number of the value.
    pub value: NodeId,
    /// The parameter's, state's or input's name; none in the arena.
    pub leaf: Option<String>,
    /// For a parameter that lives in a flat tensor with others: that tensor, and how many bytes into it.
    pub within: Option<(String, usize)>,
    /// Bytes from the beginning of the arena or of the named leaf.
    pub offset: usize,
    /// Bytes of the value; of a leaf, those that are read or written.
    pub bytes: usize,
    pub shape: Vec<usize>,
    /// `f32`, `bf16` or `i32`.
    pub element: &'static str,
}

/// One kernel of the step.
#[derive(Clone, Debug)]
pub struct KernelInfo {
    /// Operation and shapes.
    pub name: String,
    /// What was fused into it, with the number of each; for kernels of their own, the op.
    pub ops: Vec<(&'static str, usize)>,
    pub kind: Kind,
    pub phase: Phase,
    pub owner: Owner,
    pub cost: Cost,
    pub reads: Vec<Buffer>,
    pub writes: Vec<Buffer>,
}

impl KernelInfo {
    /// The part of the step that totals are given for.
    pub fn part(&self) -> String {
        part(self.phase, self.owner)
    }
}

/// A part's name: `image forward`, `update`.
pub fn part(phase: Phase, owner: Owner) -> String {
    match phase {
        Phase::Update => phase.name().into(),
        _ => format!("{} {}", owner.name(), phase.name()),
    }
}

/// A value's stay in the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stay {
    pub value: NodeId,
    /// Bytes from the arena's beginning.
    pub offset: usize,
    pub bytes: usize,
    /// The first and last kernel that use it.
    pub first: usize,
    pub last: usize,
}

/// A tensor outside the arena.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafInfo {
    pub name: String,
    /// `input`, `param`, `state` or `literal`.
    pub kind: &'static str,
    pub bytes: usize,
}

/// Where everything is in memory.
#[derive(Clone, Debug)]
pub struct MemoryMap {
    /// Bytes reserved for values that do not outlive a step.
    pub arena: usize,
    /// The most of it in use at once; the rest is lost between buffers.
    pub peak: usize,
    /// The kernel during which that is so.
    pub peak_kernel: usize,
    pub stays: Vec<Stay>,
    pub leaves: Vec<LeafInfo>,
}

/// A training step, compiled but without memory: `clip-host plan` shows it.
pub struct StepPlan {
    pub kernels: Vec<KernelInfo>,
    pub memory: MemoryMap,
    /// Trainable numbers.
    pub params: usize,
    /// Milliseconds of assembly, passes and plan.
    pub compile_ms: f64,
}

impl StepPlan {
    /// Assembles and compiles the training step.
    pub fn compile(spec: &ModelSpec) -> Result<StepPlan, ModelError> {
        let start = Instant::now();
        let Training { plan, params, .. } = training(spec)?;
        let compile_ms = start.elapsed().as_secs_f64() * 1e3;
        let elements = params.iter().map(ParamSlot::elements).sum();
        Ok(StepPlan { kernels: kernels(&plan, &params), memory: memory_map(&plan), params: elements, compile_ms })
    }
}

/// The plan's kernels in order.
pub(crate) fn kernels(plan: &Plan, params: &[ParamSlot]) -> Vec<KernelInfo> {
    let phases = phases(plan);
    let names = Names { plan, params };
    let info = |(index, (kernel, owner)): (usize, (&Kernel, Owner))| KernelInfo {
        name: title(plan, kernel),
        ops: ops(plan, kernel),
        kind: Kind::of(kernel),
        phase: match phases[index] {
            0 => Phase::Forward,
            1 => Phase::Backward,
            _ => Phase::Update,
        },
        owner,
        cost: cost(plan, kernel),
        reads: reads(kernel).into_iter().map(|read| names.buffer(read.value, Some(read))).collect(),
        writes: kernel.writes().into_iter().map(|id| names.buffer(id, None)).collect(),
    };
    plan.kernels.iter().zip(owners(plan, params)).enumerate().map(info).collect()
}

/// Part of a value that a kernel reads.
#[derive(Clone, Copy)]
struct Read {
    value: NodeId,
    /// First element and number of different ones.
    element: usize,
    count: usize,
}

fn reads(kernel: &Kernel) -> Vec<Read> {
    let view = |i: &Operand| Read { value: i.source, element: i.offset, count: distinct(i) };
    match kernel {
        Kernel::Fused(fused) => {
            fused.inputs.iter().map(|i| Read { value: i.source, element: i.offset, count: points(fused, i) }).collect()
        }
        Kernel::Own { inputs, .. } => inputs.iter().map(view).collect(),
        Kernel::Copy { input, .. } | Kernel::Store { value: input, .. } => vec![view(input)],
    }
}

fn ops(plan: &Plan, kernel: &Kernel) -> Vec<(&'static str, usize)> {
    match kernel {
        Kernel::Fused(fused) => {
            let mut ops: Vec<(&'static str, usize)> = Vec::new();
            for &id in &fused.nodes {
                let name = plan.nodes[id as usize].op.name();
                match ops.iter_mut().find(|o| o.0 == name) {
                    Some(op) => op.1 += 1,
                    None => ops.push((name, 1)),
                }
            }
            ops
        }
        Kernel::Own { op, .. } => vec![(op.name(), 1)],
        Kernel::Copy { .. } => vec![("copy", 1)],
        Kernel::Store { .. } => vec![("store", 1)],
    }
}

/// Operation and shapes in a few words.
fn title(plan: &Plan, kernel: &Kernel) -> String {
    let dims = |shape: &[usize]| shape.iter().map(usize::to_string).collect::<Vec<_>>().join("×");
    let shape = |id: &NodeId| dims(&plan.nodes[*id as usize].shape);
    match kernel {
        Kernel::Fused(fused) => format!("fused {}×{}", fused.rows, fused.cols),
        Kernel::Copy { node, .. } => format!("copy {}", shape(node)),
        Kernel::Store { leaf, .. } => format!("store {}", shape(leaf)),
        Kernel::Own { op, inputs, shape, .. } => {
            let sizes: Vec<Vec<usize>> = inputs.iter().map(|i| i.dims.iter().map(|d| d.0).collect()).collect();
            let window = |kernel: &[usize], stride: [usize; 2]| match stride {
                [1, 1] => format!(" {}", dims(kernel)),
                [down, _] => format!(" {}/{down}", dims(kernel)),
            };
            let detail = match op {
                Op::Conv2d(conv) | Op::Conv2dInputGrad(conv) => window(&sizes[1][2..], conv.stride),
                Op::Conv2dWeightGrad(conv) => window(&shape[2..], conv.stride),
                Op::MaxPool2d(pool) | Op::MaxPool2dGrad(pool) | Op::AvgPool2d(pool) | Op::AvgPool2dGrad(pool) => {
                    window(&pool.kernel, pool.stride)
                }
                _ => String::new(),
            };
            let operands = match sizes.len() {
                0..=3 => sizes.iter().map(|s| dims(s)).collect::<Vec<_>>().join(" · "),
                count => format!("{count} parts"),
            };
            format!("{}{detail} {operands} → {}", op.name(), dims(shape))
        }
    }
}

/// Finds the parameters inside flat tensors.
struct Names<'a> {
    plan: &'a Plan,
    params: &'a [ParamSlot],
}

impl Names<'_> {
    /// The one parameter that is read, if it lies in a flat tensor with others.
    fn slot(&self, read: Read) -> Option<&ParamSlot> {
        let Op::Param { name, .. } = &self.plan.nodes[read.value as usize].op else { return None };
        let end = read.element + read.count;
        let holds = |p: &&ParamSlot| p.storage == *name && p.offset <= read.element && end <= p.offset + p.elements();
        self.params.iter().find(holds).filter(|p| p.name != *name)
    }

    /// A value, or the part of it that is read.
    fn buffer(&self, value: NodeId, read: Option<Read>) -> Buffer {
        let node = &self.plan.nodes[value as usize];
        let storage = self.plan.storage[value as usize];
        let (region, offset) = match self.plan.places.get(&value) {
            Some(place) => (place.region, place.offset),
            None => (Region::Leaf(value), 0),
        };
        let (shape, element) = (node.shape.clone(), storage.name());
        let Region::Leaf(leaf) = region else {
            return Buffer {
                value,
                leaf: None,
                within: None,
                offset,
                bytes: node.elements() * storage.bytes(),
                shape,
                element,
            };
        };
        // A result that goes straight into a leaf's memory is a part of the leaf too.
        let first = offset / storage.bytes() + read.map_or(0, |r| r.element);
        let part = Read { value: leaf, element: first, count: read.map_or(node.elements(), |r| r.count) };
        let name = leaf_name(self.plan, leaf);
        match self.slot(part) {
            Some(slot) => Buffer {
                value,
                leaf: Some(slot.name.clone()),
                within: Some((name, slot.offset * storage.bytes())),
                offset: 0,
                bytes: slot.elements() * storage.bytes(),
                shape: slot.shape.clone(),
                element,
            },
            None => Buffer {
                value,
                leaf: Some(name),
                within: None,
                offset: part.element * storage.bytes(),
                bytes: part.count * storage.bytes(),
                shape: if part.count == node.elements() { shape } else { vec![part.count] },
                element,
            },
        }
    }
}

fn leaf_name(plan: &Plan, leaf: NodeId) -> String {
    match &plan.nodes[leaf as usize].op {
        Op::Input { name } | Op::Param { name, .. } | Op::State { name, .. } => name.clone(),
        op => format!("{} %{leaf}", op.name()),
    }
}

// What a value depends on.
const IMAGE: u8 = 1;
const TEXT: u8 = 2;
/// Heads, loss, sample ids: everything else.
const OTHER: u8 = 4;

/// What part of the model a parameter or state is of, by its name.
fn part_of(name: &str) -> u8 {
    match name.split_once('.') {
        Some(("image_encoder", _)) => IMAGE,
        Some(("text_encoder", _)) => TEXT,
        _ => OTHER,
    }
}

fn owner_of(parts: u8) -> Option<Owner> {
    match parts {
        IMAGE => Some(Owner::Image),
        TEXT => Some(Owner::Text),
        _ => None,
    }
}

/// Whom each kernel works for. A kernel whose results depend on one encoder alone is of its forward pass. One of the
/// backward pass reads a value from inside that encoder (an activation, a weight), or else only gradients, and then
/// works for whom they were made.
fn owners(plan: &Plan, params: &[ParamSlot]) -> Vec<Owner> {
    let names = Names { plan, params };
    let parts = dependencies(&names);
    let ends = tower_ends(plan, &parts);
    let mut made: HashMap<NodeId, Owner> = HashMap::new();
    let mut owners = Vec::with_capacity(plan.kernels.len());
    for kernel in &plan.kernels {
        let inner = match kernel {
            Kernel::Fused(fused) => &fused.nodes[..],
            _ => &[],
        };
        let written = kernel.writes().iter().fold(0, |all, &id| all | parts[id as usize]);
        let inside = |id: NodeId| if ends[id as usize] { None } else { owner_of(parts[id as usize]) };
        let mut evidence = Vec::new();
        let mut gradients = Vec::new();
        for read in reads(kernel) {
            match names.slot(read).map(|slot| part_of(&slot.name)) {
                Some(part) => evidence.push(owner_of(part).unwrap_or(Owner::Shared)),
                None => evidence.extend(inside(read.value)),
            }
            if owner_of(parts[read.value as usize]).is_none() {
                gradients.extend(made.get(&read.value).copied());
            }
        }
        evidence.extend(inner.iter().filter_map(|&id| inside(id)));
        let owner = owner_of(written).unwrap_or_else(|| match evidence.is_empty() {
            true => agreed(&gradients),
            false => agreed(&evidence),
        });
        made.extend(kernel.writes().into_iter().map(|id| (id, owner)));
        owners.push(owner);
    }
    owners
}

/// The encoder that all of them name, or some of them while nobody names the other.
fn agreed(owners: &[Owner]) -> Owner {
    match (owners.contains(&Owner::Image), owners.contains(&Owner::Text)) {
        (true, false) => Owner::Image,
        (false, true) => Owner::Text,
        _ => Owner::Shared,
    }
}

/// What each node depends on.
fn dependencies(names: &Names) -> Vec<u8> {
    let nodes = &names.plan.nodes;
    let mut parts: Vec<u8> = Vec::with_capacity(nodes.len());
    for node in nodes {
        parts.push(match &node.op {
            Op::Input { name } => match name.as_str() {
                "images" => IMAGE,
                "input_ids" | "attention_mask" => TEXT,
                _ => OTHER,
            },
            // A flat tensor is of the part whose parameter is sliced from it.
            Op::Param { name, .. } if names.params.iter().any(|p| p.storage == *name && p.name != *name) => 0,
            Op::Param { name, .. } | Op::State { name, .. } => part_of(name),
            Op::Slice { starts, .. } => {
                let value = node.inputs[0];
                let read = Read { value, element: starts.first().copied().unwrap_or(0), count: node.elements() };
                names.slot(read).map_or(parts[value as usize], |slot| part_of(&slot.name))
            }
            _ => node.inputs.iter().fold(0, |all, &i| all | parts[i as usize]),
        });
    }
    parts
}

/// The encoders' last values: those that heads and loss read. A kernel that reads one need not work for the encoder.
fn tower_ends(plan: &Plan, parts: &[u8]) -> Vec<bool> {
    let nodes = &plan.nodes;
    let mut forward = vec![false; nodes.len()];
    if let Some((_, loss)) = plan.outputs.iter().find(|(name, _)| name == "loss") {
        forward[loss.source as usize] = true;
    }
    let mut ends = vec![false; nodes.len()];
    for (id, node) in nodes.iter().enumerate().rev() {
        for &input in &node.inputs {
            let input = input as usize;
            forward[input] |= forward[id];
            let leaves = forward[id] && owner_of(parts[id]).is_none() && owner_of(parts[input]).is_some();
            ends[input] |= leaves || (ends[id] && class(&node.op) == Class::Movement);
        }
    }
    ends
}

fn memory_map(plan: &Plan) -> MemoryMap {
    let mut stays: BTreeMap<NodeId, Stay> = BTreeMap::new();
    for (index, kernel) in plan.kernels.iter().enumerate() {
        for value in kernel.reads().into_iter().chain(kernel.writes()) {
            let Some(place) = plan.places.get(&value).filter(|p| p.region == Region::Arena) else { continue };
            let bytes = plan.nodes[value as usize].elements() * plan.storage[value as usize].bytes();
            let new = Stay { value, offset: place.offset, bytes, first: index, last: index };
            stays.entry(value).or_insert(new).last = index;
        }
    }
    for (_, operand) in &plan.outputs {
        if let Some(stay) = stays.get_mut(&operand.source) {
            stay.last = plan.kernels.len().saturating_sub(1);
        }
    }
    let stays: Vec<Stay> = stays.into_values().collect();
    // Parts of a concatenation lie inside it: what counts is the union of places.
    let in_use = |time: usize| {
        let mut live: Vec<(usize, usize)> = stays
            .iter()
            .filter(|s| (s.first..=s.last).contains(&time))
            .map(|s| (s.offset, s.offset + s.bytes))
            .collect();
        live.sort_unstable();
        let (mut total, mut reached) = (0, 0);
        for (start, end) in live {
            total += end.saturating_sub(reached.max(start));
            reached = reached.max(end);
        }
        total
    };
    let (peak, std::cmp::Reverse(peak_kernel)) =
        (0..plan.kernels.len()).map(|t| (in_use(t), std::cmp::Reverse(t))).max().unwrap_or_default();
    let leaves = plan.leaves.iter().map(|&id| {
        let node = &plan.nodes[id as usize];
        let bytes = node.elements() * plan.storage[id as usize].bytes();
        LeafInfo { name: leaf_name(plan, id), kind: node.op.name(), bytes }
    });
    MemoryMap { arena: plan.arena, peak, peak_kernel, leaves: leaves.collect(), stays }
}
