//! Composites written out in primitives, so that fusion sees every step.

use clip_host_graph::rewrite::{Builder, rewrite};
use clip_host_plugin_api::decompose::decompose;
use clip_host_plugin_api::graph::{Graph as IrGraph, Tensor};
use clip_host_plugin_api::ir::{Node, NodeId, Op};
use luminal::compiler_utils::{Compiler, ToIdsMut};
use luminal::graph::Graph;

/// The pass.
#[derive(Debug)]
pub struct Decompose;

impl Compiler for Decompose {
    fn compile<T: ToIdsMut>(&self, graph: &mut Graph, ids: T) {
        rewrite(graph, ids, |nodes, builder| {
            let mut new: Vec<NodeId> = Vec::with_capacity(nodes.len());
            for node in nodes {
                let inputs: Vec<NodeId> = node.inputs.iter().map(|&i| new[i as usize]).collect();
                let id = match node.op.is_composite() {
                    true => expand(node, &inputs, builder),
                    false => builder.push(node.op.clone(), inputs, node.shape.clone(), node.dtype),
                };
                new.push(id);
            }
            new
        });
    }
}

fn expand(node: &Node, inputs: &[NodeId], builder: &mut Builder) -> NodeId {
    let graph = IrGraph::new();
    let tensors: Vec<Tensor> = inputs
        .iter()
        .enumerate()
        .map(|(i, &id)| graph.input(&i.to_string(), &builder.node(id).shape, builder.node(id).dtype))
        .collect();
    let Some(output) = decompose(&node.op, &tensors).map(|t| t.id()) else {
        return builder.push(node.op.clone(), inputs.to_vec(), node.shape.clone(), node.dtype);
    };
    let mut placed: Vec<NodeId> = Vec::new();
    for inner in graph.into_fragment().nodes {
        placed.push(match inner.op {
            Op::Input { name } => name.parse::<usize>().map_or(0, |i| inputs[i]),
            op => {
                let inputs = inner.inputs.iter().map(|&i| placed[i as usize]).collect();
                builder.push(op, inputs, inner.shape, inner.dtype)
            }
        });
    }
    placed[output as usize]
}
