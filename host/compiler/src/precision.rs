//! Mixed precision: which stored values are kept in bf16, or in f16.
//!
//! Arithmetic inside fused kernels is always f32, products accumulate in f32; what is rounded is what is *written
//! to memory* inside the towers: operands and results of their products and windows, and large activations. A product
//! with a half-precision operand rounds its other one, a master weight, while it is packed. Parameters, weight gradients,
//! statistics (every reduction), the loss and the optimizer stay f32, but for what is [kept in half precision](crate::kept).
//!
//! As `torch.autocast`, but for two things that are more exact here: values that never leave a fused kernel
//! are not rounded, and weight gradients are not either.

use crate::fuse::Fusion;
use crate::kernel::Element;
use crate::module::{Class, Module, class};
use clip_host_plugin_api::ir::{DType, NodeId, Op};

/// The precision that a program is compiled for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    #[default]
    F32,
    /// bf16 activations and product operands, f32 for everything else.
    Bf16,
    /// The same with f16, whose range is small: the loss must be scaled before it is differentiated.
    Fp16,
}

impl Precision {
    /// What activations and product operands are kept in, where that is not f32.
    pub fn half(self) -> Option<Element> {
        match self {
            Precision::F32 => None,
            Precision::Bf16 => Some(Element::Bf16),
            Precision::Fp16 => Some(Element::F16),
        }
    }
}

/// Outputs of this name mark where the towers end; [`crate::plan::compile_with`] takes them off the program. What they
/// need belongs to a tower, and so does what the backward pass computes from that.
pub const BOUNDARY: &str = "precision.boundary";

/// Pointwise results below this many elements stay f32, unless a product reads them: they cost no bandwidth.
const LARGE: usize = 1 << 14;

/// Takes the boundaries off the module's outputs.
pub(crate) fn take_boundaries(module: &mut Module) -> Vec<NodeId> {
    let (marks, outputs) = std::mem::take(&mut module.outputs).into_iter().partition(|o| o.0 == BOUNDARY);
    module.outputs = outputs;
    let marks: Vec<(String, NodeId)> = marks;
    marks.into_iter().map(|o| o.1).collect()
}

/// Ops that read and write half precision: products and windows.
pub(crate) fn is_product(op: &Op) -> bool {
    matches!(op, Op::Matmul | Op::Conv2d(_) | Op::Conv2dInputGrad(_) | Op::Conv2dWeightGrad(_)) || is_window(op)
}

fn is_window(op: &Op) -> bool {
    matches!(op, Op::MaxPool2d(_) | Op::MaxPool2dGrad(_) | Op::AvgPool2d(_) | Op::AvgPool2dGrad(_))
}

/// How each node's value is kept, with `half` for what is rounded. `boundaries` are the towers' last values.
pub(crate) fn mixed(
    module: &Module,
    fusion: &Fusion,
    stored: &[bool],
    boundaries: &[NodeId],
    half: Element,
) -> Vec<Element> {
    let nodes = &module.nodes;
    let count = nodes.len();
    let root = |id: NodeId| fusion.views.of(id).root as usize;
    let is_leaf = |id: usize| class(&nodes[id].op) == Class::Leaf;

    // Forward: what the boundaries need.
    let mut forward = vec![false; count];
    let mut stack = boundaries.to_vec();
    while let Some(id) = stack.pop() {
        for &input in &nodes[id as usize].inputs {
            if !std::mem::replace(&mut forward[input as usize], true) {
                stack.push(input);
            }
        }
    }
    let is_boundary = |id: usize| boundaries.contains(&(id as NodeId));

    // A product belongs to a tower if it is part of its forward pass, or if it reads one of the tower's values.
    let tower_product: Vec<bool> = (0..count)
        .map(|id| {
            let node = &nodes[id];
            let reads_tower = || node.inputs.iter().any(|&i| forward[root(i)]);
            is_product(&node.op) && (forward[id] || is_boundary(id) || reads_tower())
        })
        .collect();

    // Activations are computed from a product. What is not (masks, ranks, positions) may be exact counts.
    let mut computed = vec![false; count];
    for id in 0..count {
        computed[id] = nodes[id].inputs.iter().any(|&i| computed[i as usize] || tower_product[i as usize]);
    }

    // Backward: what depends on a product that is not the forward pass's, and is needed by another.
    let mut backward = vec![false; count];
    for id in 0..count {
        let from = |i: &NodeId| backward[*i as usize] || (tower_product[*i as usize] && !forward[*i as usize]);
        backward[id] = !forward[id] && !is_boundary(id) && nodes[id].inputs.iter().any(from);
    }
    // A forward value counts where the forward pass needs it: the last products' results go to the loss in f32.
    let mut needed = vec![false; count];
    for id in (0..count).rev() {
        if needed[id] || tower_product[id] {
            let counts = |i: &usize| !forward[*i] || forward[id] || is_boundary(id);
            let inputs = nodes[id].inputs.iter().map(|&i| i as usize);
            inputs.filter(counts).for_each(|i| needed[i] = true);
        }
    }

    let mut storage: Vec<Element> = nodes.iter().map(|n| Element::of(n.dtype)).collect();
    for id in 0..count {
        let node = &nodes[id];
        if node.dtype != DType::F32 || is_leaf(id) || is_boundary(id) || !needed[id] || !stored[id] {
            continue;
        }
        let inside = (forward[id] && computed[id]) || backward[id];
        let demoted = match class(&node.op) {
            Class::Own => tower_product[id] && !matches!(node.op, Op::Conv2dWeightGrad(_)),
            Class::Pointwise => inside && node.elements() >= LARGE,
            _ => false,
        };
        if demoted {
            storage[id] = half;
        }
    }
    // What products read, whatever its size; an input that only products read is rounded when it is filled.
    let mut read_by_others = vec![false; count];
    for (id, node) in nodes.iter().enumerate() {
        if !(tower_product[id] || matches!(class(&node.op), Class::Movement)) {
            node.inputs.iter().for_each(|&i| read_by_others[root(i)] = true);
        }
    }
    for id in (0..count).filter(|&id| tower_product[id]) {
        for &input in &nodes[id].inputs {
            let source = root(input);
            let node = &nodes[source];
            let rounds = match class(&node.op) {
                Class::Leaf => matches!(node.op, Op::Input { .. }) && !read_by_others[source],
                Class::Pointwise | Class::Movement => true,
                Class::Own => tower_product[source] && !matches!(node.op, Op::Conv2dWeightGrad(_)),
                Class::Reduce => false,
            };
            if rounds && node.dtype == DType::F32 {
                storage[source] = half;
            }
        }
    }
    // Outputs and new values of leaves are what others read: they keep their type.
    let ends = module.outputs.iter().map(|o| o.1).chain(module.updates.iter().flat_map(|u| [u.0, u.1]));
    for id in ends {
        let end = root(id);
        storage[end] = Element::of(nodes[end].dtype);
    }
    storage
}
