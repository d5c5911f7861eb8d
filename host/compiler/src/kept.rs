//! Persistent tensors that are kept in half precision: statistics of the optimizer, weights.
//!
//! Such a leaf is bf16 in memory and is read as it is: fused kernels widen what they load. Its new value is computed in f32
//! and rounded at random where it is stored ([`Rounding::Stochastic`]), as the text encoder's weights of Radford et al.
//! (2021, section 2.5) are. What else reads the new value in the same step (an optimizer's later formulas) reads it before
//! it is rounded.

use crate::kernel::{Element, Fused, Rounding};
use crate::module::{Class, Module, class};
use crate::precision::{Precision, is_product};
use clip_host_plugin_api::ir::{DType, Node, NodeId, Op};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// The leaves that are kept in bf16, by name, each with its stream of random numbers: from [`STREAMS`] on, where no
/// [`Op::Random`] has one.
pub type Halves = BTreeMap<String, u32>;

/// The first stream of roundings.
pub const STREAMS: u32 = 1 << 31;

/// Numbers the streams of these leaves in the order of their names.
pub fn halves(names: impl IntoIterator<Item = String>) -> Halves {
    let names: BTreeSet<String> = names.into_iter().collect();
    names.into_iter().zip(STREAMS..).collect()
}

/// The nodes of a module that are kept in bf16.
pub(crate) struct Kept {
    /// The leaves.
    leaves: Vec<NodeId>,
    /// New values as they are stored, with the leaf's stream.
    rounded: HashMap<NodeId, u32>,
}

impl Kept {
    /// Gives the new value of each kept leaf a node of its own, which rounds it, and each kernel that reads f32 alone a
    /// wider copy of what it reads of one.
    pub fn mark(module: &mut Module, halves: &Halves, precision: Precision) -> Kept {
        if halves.is_empty() {
            return Kept { leaves: vec![], rounded: HashMap::new() };
        }
        widen_operands(module, halves, precision);
        let leaves: Vec<NodeId> =
            (0..module.nodes.len() as NodeId).filter(|&id| stream(module.node(id), halves).is_some()).collect();
        let mut rounded = HashMap::new();
        for (leaf, value) in &mut module.updates {
            let Some(stream) = stream(&module.nodes[*leaf as usize], halves) else { continue };
            let Node { shape, dtype, .. } = &module.nodes[*value as usize];
            let node = Node { op: Op::Cast, inputs: vec![*value], shape: shape.clone(), dtype: *dtype };
            module.nodes.push(node);
            *value = module.nodes.len() as NodeId - 1;
            rounded.insert(*value, stream);
        }
        Kept { leaves, rounded }
    }

    /// Sets how the nodes are stored.
    pub fn store(&self, storage: &mut [Element]) {
        self.leaves.iter().chain(self.rounded.keys()).for_each(|&id| storage[id as usize] = Element::Bf16);
    }

    /// Sets how a kernel rounds their new values.
    pub fn round(&self, kernel: &mut Fused) {
        for output in &mut kernel.outputs {
            if let Some(&stream) = self.rounded.get(&output.target) {
                output.rounding = Rounding::Stochastic { stream, first: 0 };
            }
        }
    }
}

/// A kept leaf's stream.
fn stream(node: &Node, halves: &Halves) -> Option<u32> {
    match &node.op {
        Op::Param { name, .. } | Op::State { name, .. } if node.dtype == DType::F32 => halves.get(name).copied(),
        _ => None,
    }
}

/// Products in mixed precision and lookups read bf16; every other kernel of its own reads a copy in f32, and so do products
/// in f32, whose other operand would be rounded too.
fn widen_operands(module: &mut Module, halves: &Halves, precision: Precision) {
    let mut nodes: Vec<Node> = Vec::with_capacity(module.nodes.len());
    let mut new: Vec<NodeId> = Vec::with_capacity(module.nodes.len());
    // By new number: a kept leaf, or a view of one.
    let mut is_half: Vec<bool> = Vec::with_capacity(module.nodes.len());
    let mut wide: HashMap<NodeId, NodeId> = HashMap::new();
    for mut node in std::mem::take(&mut module.nodes) {
        for (position, input) in node.inputs.iter_mut().enumerate() {
            *input = new[*input as usize];
            let reads_halves = match &node.op {
                Op::Gather => position == 0,
                op => is_product(op) && precision == Precision::Bf16,
            };
            if class(&node.op) == Class::Own && is_half[*input as usize] && !reads_halves {
                *input = *wide.entry(*input).or_insert_with(|| {
                    let Node { shape, dtype, .. } = &nodes[*input as usize];
                    nodes.push(Node { op: Op::Cast, inputs: vec![*input], shape: shape.clone(), dtype: *dtype });
                    is_half.push(false);
                    nodes.len() as NodeId - 1
                });
            }
        }
        let view = class(&node.op) == Class::Movement && node.inputs.iter().any(|&i| is_half[i as usize]);
        is_half.push(view || stream(&node, halves).is_some());
        new.push(nodes.len() as NodeId);
        nodes.push(node);
    }
    module.nodes = nodes;
    module.outputs.iter_mut().for_each(|(_, id)| *id = new[*id as usize]);
    for (leaf, value) in &mut module.updates {
        (*leaf, *value) = (new[*leaf as usize], new[*value as usize]);
    }
}
