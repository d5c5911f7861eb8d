//! The assembled program: a luminal graph and the names of what goes in and comes out.

use crate::rewrite::{add, linearize, operator};
use clip_host_plugin_api::ir::{Fragment, Node, NodeId, Op};
use clip_host_plugin_api::shape::{FragmentError, verify_node};
use luminal::compiler_utils::Compiler;
use luminal::graph::{Graph, NodeIndex};
use std::collections::HashMap;
use thiserror::Error;

/// Why a program could not be assembled.
#[derive(Debug, Error)]
pub enum ProgramError {
    #[error("`{name}` is {got}, the {what} needs {expected}")]
    Binding { what: String, name: String, expected: String, got: String },
    #[error("pass `{pass}` left a wrong node %{node}: {error}")]
    Verify { pass: String, node: NodeId, error: FragmentError },
    #[error("node `{op}` of {what} has {got} operands; luminal's edges count to 255")]
    Operands { what: String, op: &'static str, got: usize },
    #[error(transparent)]
    Gradient(#[from] clip_host_plugin_api::gradient::GradientError),
}

/// A program under assembly and compilation.
#[derive(Default)]
pub struct Program {
    pub graph: Graph,
    /// Results by name.
    pub outputs: Vec<(String, NodeIndex)>,
    /// `(leaf, value)`: at the end of the step the persistent leaf takes the value.
    pub updates: Vec<(NodeIndex, NodeIndex)>,
    /// Random streams in use: a fragment's own numbers follow those of the fragments before it.
    streams: u32,
}

impl Program {
    /// Splices a fragment in. Leaves get the prefix before their names, unless `bindings` replaces the named input by
    /// a node that is there already; `rename` may change a leaf's full name. Answers with the node of each fragment
    /// node. Updates are taken over; outputs and metrics are the caller's to name.
    pub fn splice(
        &mut self,
        fragment: &Fragment,
        what: &str,
        bindings: &HashMap<String, NodeIndex>,
        leaf_name: impl Fn(&Op, &str) -> String,
    ) -> Result<Spliced, ProgramError> {
        let mut nodes: Vec<NodeIndex> = Vec::with_capacity(fragment.nodes.len());
        let mut params = Vec::new();
        // A projected parameter is read through its projection, except by the projection itself.
        let projected: HashMap<NodeId, NodeId> = fragment.projections.iter().copied().collect();
        let inside = projection_cone(fragment);
        let order: Vec<usize> = (0..fragment.nodes.len())
            .filter(|&i| inside[i])
            .chain((0..fragment.nodes.len()).filter(|&i| !inside[i]))
            .collect();
        let mut placed: Vec<Option<NodeIndex>> = vec![None; fragment.nodes.len()];
        for index in order {
            let node = &fragment.nodes[index];
            if node.inputs.len() > 255 {
                let (op, got) = (node.op.name(), node.inputs.len());
                return Err(ProgramError::Operands { what: what.into(), op, got });
            }
            let bound = match &node.op {
                Op::Input { name } => bindings.get(name).map(|&id| (name, id)),
                _ => None,
            };
            let id = if let Some((name, id)) = bound {
                let given = operator(&self.graph, id).map(|o| (o.shape.clone(), o.dtype));
                if given.as_ref().is_none_or(|g| *g != (node.shape.clone(), node.dtype)) {
                    return Err(ProgramError::Binding {
                        what: what.into(),
                        name: name.clone(),
                        expected: format!("{:?} {:?}", node.shape, node.dtype),
                        got: given.map_or("nothing".into(), |(s, d)| format!("{s:?} {d:?}")),
                    });
                }
                id
            } else {
                let mut node = node.clone();
                if let Op::Random { stream } = &mut node.op {
                    *stream += self.streams;
                }
                if let Op::Input { name } | Op::Param { name, .. } | Op::State { name, .. } = &node.op {
                    let full = leaf_name(&node.op, name);
                    if let Op::Input { name } | Op::Param { name, .. } | Op::State { name, .. } = &mut node.op {
                        *name = full;
                    }
                }
                let read = |i: &NodeId| match projected.get(i) {
                    Some(value) if !inside[index] => placed[*value as usize],
                    _ => placed[*i as usize],
                };
                let inputs: Vec<NodeIndex> = node.inputs.iter().filter_map(read).collect();
                add(&mut self.graph, &node, &inputs)
            };
            placed[index] = Some(id);
        }
        for (index, node) in fragment.nodes.iter().enumerate() {
            let Some(mut id) = placed[index] else { continue };
            if let Op::Param { .. } = node.op {
                // Projections come first: the optimizer starts from the projected value too.
                let leaf = id;
                if let Some(value) = projected.get(&(index as NodeId)).and_then(|v| placed[*v as usize]) {
                    id = value;
                }
                params.push(SplicedParam { leaf, value: id });
            }
            nodes.push(id);
        }
        self.streams += fragment.nodes.len() as u32;
        for &(state, value) in &fragment.updates {
            self.updates.push((nodes[state as usize], nodes[value as usize]));
        }
        Ok(Spliced { nodes, params })
    }

    /// A leaf or any other node.
    pub fn push(&mut self, node: &Node, inputs: &[NodeIndex]) -> NodeIndex {
        add(&mut self.graph, node, inputs)
    }

    /// Runs a pass and checks what it left.
    pub fn run<C: Compiler>(&mut self, name: &str, pass: C) -> Result<(), ProgramError> {
        let outputs = self.outputs.iter_mut().map(|o| &mut o.1);
        let updates = self.updates.iter_mut().flat_map(|(target, value)| [target, value]);
        let ids: Vec<&mut NodeIndex> = outputs.chain(updates).collect();
        pass.compile(&mut self.graph, ids);
        self.verify(name)
    }

    /// Checks every live node's operands, shape and type.
    pub fn verify(&self, pass: &str) -> Result<(), ProgramError> {
        let linear = linearize(&self.graph, &self.roots());
        for (id, node) in linear.nodes.iter().enumerate() {
            verify_node(node, |i| &linear.nodes[i as usize]).map_err(|error| ProgramError::Verify {
                pass: pass.into(),
                node: id as NodeId,
                error,
            })?;
        }
        Ok(())
    }

    /// All references from outside.
    pub fn roots(&self) -> Vec<NodeIndex> {
        self.outputs.iter().map(|o| o.1).chain(self.updates.iter().flat_map(|&(t, v)| [t, v])).collect()
    }
}

/// Where a fragment's nodes went.
pub struct Spliced {
    /// By the fragment's node id; a projected parameter stands for its projected value.
    pub nodes: Vec<NodeIndex>,
    pub params: Vec<SplicedParam>,
}

/// A parameter: where it is stored and the node that formulas read.
pub struct SplicedParam {
    pub leaf: NodeIndex,
    pub value: NodeIndex,
}

/// The nodes that projections are computed from.
fn projection_cone(fragment: &Fragment) -> Vec<bool> {
    let mut inside = vec![false; fragment.nodes.len()];
    for &(_, value) in &fragment.projections {
        inside[value as usize] = true;
    }
    for index in (0..fragment.nodes.len()).rev() {
        if inside[index] {
            for &input in &fragment.nodes[index].inputs {
                inside[input as usize] = true;
            }
        }
    }
    inside
}
