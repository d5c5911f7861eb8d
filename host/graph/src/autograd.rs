//! Reverse-mode differentiation as a luminal compiler.

use crate::rewrite::{linearize, write};
use clip_host_plugin_api::gradient::{GradientError, differentiate};
use clip_host_plugin_api::ir::{DType, Fragment, Node, NodeId, Op};
use luminal::compiler_utils::{Compiler, ToIdsMut};
use luminal::graph::{Graph, NodeIndex};
use std::cell::RefCell;

/// Adds the gradients of `Σ cotangent · output` with respect to `wrt`; the rule of each op is
/// [`clip_host_plugin_api::gradient::rule`]. After the pass [`Autograd::take`] gives the gradients' nodes.
pub struct Autograd {
    /// `(output, cotangent)`; without a cotangent the output is a scalar loss.
    pub seeds: Vec<(NodeIndex, Option<NodeIndex>)>,
    pub wrt: Vec<NodeIndex>,
    result: RefCell<Option<Result<Gradients, GradientError>>>,
}

/// Nodes after differentiation.
#[derive(Clone)]
pub struct Gradients {
    /// The gradients, in the order of `wrt`.
    pub grads: Vec<NodeIndex>,
    /// Where the nodes of `wrt` are now.
    pub wrt: Vec<NodeIndex>,
}

impl Autograd {
    pub fn new(seeds: Vec<(NodeIndex, Option<NodeIndex>)>, wrt: Vec<NodeIndex>) -> Self {
        Autograd { seeds, wrt, result: RefCell::new(None) }
    }

    /// The result of the last run.
    pub fn take(&self) -> Option<Result<Gradients, GradientError>> {
        self.result.borrow_mut().take()
    }
}

impl Compiler for &Autograd {
    fn compile<T: ToIdsMut>(&self, graph: &mut Graph, mut ids: T) {
        let mut outside = ids.to_ids_mut();
        let mut roots: Vec<NodeIndex> = outside.iter().map(|id| **id).collect();
        roots.extend(self.wrt.iter().copied());
        for (output, cotangent) in &self.seeds {
            roots.push(*output);
            roots.extend(cotangent.iter().copied());
        }
        let linear = linearize(graph, &roots);
        let mut fragment = Fragment { nodes: linear.nodes, ..Fragment::default() };
        let mut seeds: Vec<(NodeId, NodeId)> = Vec::new();
        for (output, cotangent) in &self.seeds {
            let output = linear.position[output];
            let cotangent = cotangent.map(|c| linear.position[&c]).unwrap_or_else(|| {
                let shape = fragment.nodes[output as usize].shape.clone();
                let op = Op::Constant { value: 1.0 };
                fragment.nodes.push(Node { op, inputs: vec![], shape, dtype: DType::F32 });
                fragment.nodes.len() as NodeId - 1
            });
            seeds.push((output, cotangent));
        }
        let wrt: Vec<NodeId> = self.wrt.iter().map(|w| linear.position[w]).collect();
        let differentiated = match differentiate(&fragment, &seeds, &wrt) {
            Ok(differentiated) => differentiated,
            Err(error) => {
                *self.result.borrow_mut() = Some(Err(error));
                return;
            }
        };
        let grads: Vec<NodeId> = (0..wrt.len()).filter_map(|i| differentiated.output(&format!("grad.{i}"))).collect();
        let mut wanted: Vec<NodeId> = roots.iter().map(|r| linear.position[r]).collect();
        wanted.extend(&grads);
        let mut rebuilt = Graph::new();
        let indices = write(&mut rebuilt, &differentiated.nodes, &wanted);
        let at = |id: NodeId| indices[id as usize].unwrap_or_default();
        for id in outside.iter_mut() {
            **id = at(linear.position[*id]);
        }
        *graph = rebuilt;
        let gradients =
            Gradients { grads: grads.iter().map(|&g| at(g)).collect(), wrt: wrt.iter().map(|&w| at(w)).collect() };
        *self.result.borrow_mut() = Some(Ok(gradients));
    }
}
