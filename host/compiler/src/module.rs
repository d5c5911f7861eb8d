//! The program as the back half of the compiler sees it: a list of primitive nodes.

use clip_host_graph::program::Program;
use clip_host_graph::rewrite::linearize;
use clip_host_plugin_api::ir::{Node, NodeId, Op};

/// What an op is to the fuser.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Memory that exists before the step: inputs, parameters, states, literals.
    Leaf,
    /// Reshape, permute, broadcast, slice: no work of its own.
    Movement,
    Pointwise,
    Reduce,
    /// Has a kernel of its own: products, windows, tables, pad, concat.
    Own,
}

/// The class of an op.
pub fn class(op: &Op) -> Class {
    match op {
        Op::Input { .. } | Op::Param { .. } | Op::State { .. } | Op::Literal { .. } => Class::Leaf,
        Op::Reshape | Op::Permute { .. } | Op::Broadcast | Op::Slice { .. } | Op::Detach => Class::Movement,
        Op::Constant { .. } | Op::Iota { .. } | Op::Random { .. } => Class::Pointwise,
        Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select | Op::Cast => Class::Pointwise,
        Op::Sum { .. } | Op::Max { .. } => Class::Reduce,
        _ => Class::Own,
    }
}

/// Nodes in topological order with what goes in and out.
pub struct Module {
    pub nodes: Vec<Node>,
    pub outputs: Vec<(String, NodeId)>,
    /// `(leaf, value)`.
    pub updates: Vec<(NodeId, NodeId)>,
}

impl Module {
    /// Reads a program whose composites are decomposed.
    pub fn read(program: &Program) -> Self {
        let linear = linearize(&program.graph, &program.roots());
        let at = |id| linear.position[id];
        let mut module = Module {
            outputs: program.outputs.iter().map(|(name, id)| (name.clone(), at(id))).collect(),
            updates: program.updates.iter().map(|(target, value)| (at(target), at(value))).collect(),
            nodes: linear.nodes,
        };
        module.split_reductions();
        module.keep_old_values();
        module
    }

    /// Whether a leaf takes a new value at the end of the step.
    pub fn is_updated(&self, id: NodeId) -> bool {
        self.updates.iter().any(|&(target, _)| target == id)
    }

    /// An output, or another leaf's new value, that is an updated leaf's old value becomes a node of its own, so that it
    /// can be copied before the leaf changes.
    fn keep_old_values(&mut self) {
        let updated: Vec<NodeId> = self.updates.iter().map(|u| u.0).collect();
        let nodes = &mut self.nodes;
        let mut keep = |id: &mut NodeId| {
            if updated.contains(id) {
                let Node { shape, dtype, .. } = &nodes[*id as usize];
                nodes.push(Node { op: Op::Reshape, inputs: vec![*id], shape: shape.clone(), dtype: *dtype });
                *id = nodes.len() as NodeId - 1;
            }
        };
        self.outputs.iter_mut().for_each(|(_, id)| keep(id));
        self.updates.iter_mut().filter(|(target, value)| target != value).for_each(|(_, value)| keep(value));
    }

    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    /// Reductions over axes that do not stand together become two: the kernels know `[a, r, c]` over r only.
    fn split_reductions(&mut self) {
        let mut nodes: Vec<Node> = Vec::with_capacity(self.nodes.len());
        let mut new: Vec<NodeId> = Vec::with_capacity(self.nodes.len());
        for node in std::mem::take(&mut self.nodes) {
            let mut node = node;
            for input in &mut node.inputs {
                *input = new[*input as usize];
            }
            while let Op::Sum { axes } | Op::Max { axes } = &node.op {
                let source = &nodes[node.inputs[0] as usize].shape;
                let last = last_group(source, axes);
                if last.len() == axes.iter().filter(|&&a| source[a] != 1).count() {
                    break;
                }
                let mut shape = source.clone();
                last.iter().for_each(|&a| shape[a] = 1);
                let op = match node.op {
                    Op::Sum { .. } => Op::Sum { axes: last },
                    _ => Op::Max { axes: last },
                };
                let inputs = node.inputs.clone();
                nodes.push(Node { op, inputs, shape, dtype: node.dtype });
                node.inputs = vec![nodes.len() as NodeId - 1];
            }
            new.push(nodes.len() as NodeId);
            nodes.push(node);
        }
        self.nodes = nodes;
        for (_, id) in &mut self.outputs {
            *id = new[*id as usize];
        }
        for (target, value) in &mut self.updates {
            (*target, *value) = (new[*target as usize], new[*value as usize]);
        }
    }
}

/// The reduced axes (but ones) that stand together at the end.
fn last_group(shape: &[usize], axes: &[usize]) -> Vec<usize> {
    let mut group = Vec::new();
    for axis in (0..shape.len()).rev().filter(|&a| shape[a] != 1) {
        if axes.contains(&axis) {
            group.push(axis);
        } else if !group.is_empty() {
            break;
        }
    }
    group.reverse();
    group
}

/// A reduction as `[a, r, c]` over r.
pub fn reduction(shape: &[usize], axes: &[usize]) -> (usize, usize, usize) {
    let group = last_group(shape, axes);
    let (Some(&first), Some(&last)) = (group.first(), group.last()) else { return (shape.iter().product(), 1, 1) };
    let product = |s: &[usize]| s.iter().product::<usize>();
    (product(&shape[..first]), product(&shape[first..=last]), product(&shape[last + 1..]))
}
