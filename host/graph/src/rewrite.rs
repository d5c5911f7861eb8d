//! Functional rewriting: a pass reads the live nodes in order and builds the new ones.

use crate::operator::IrOperator;
use clip_host_plugin_api::ir::{DType, Node, NodeId, Op};
use luminal::compiler_utils::ToIdsMut;
use luminal::graph::{Dependency, Graph, NodeIndex};
use luminal::shape::ShapeTracker;
use petgraph::Direction;
use petgraph::visit::EdgeRef;
use std::collections::HashMap;

/// A graph's live nodes as a list in topological order; the order of creation is kept.
pub struct Linear {
    pub nodes: Vec<Node>,
    pub position: HashMap<NodeIndex, NodeId>,
}

/// Contiguous luminal shape.
pub fn tracker(shape: &[usize]) -> ShapeTracker {
    ShapeTracker::new(&shape.iter().map(|&d| d.into()).collect::<Vec<_>>())
}

/// Adds a node to a luminal graph.
pub fn add(graph: &mut Graph, node: &Node, inputs: &[NodeIndex]) -> NodeIndex {
    let id = graph.graph.add_node(Box::new(IrOperator::new(node)));
    for (order, &input) in inputs.iter().enumerate() {
        let shape = operator(graph, input).map(|o| tracker(&o.shape)).unwrap_or_else(|| tracker(&[]));
        let edge = Dependency::Data { input_order: order as u8, output_order: 0, shape };
        graph.graph.add_edge(input, id, edge);
    }
    id
}

/// The IR operator at a node, unless it is one of luminal's own.
pub fn operator(graph: &Graph, id: NodeIndex) -> Option<&IrOperator> {
    graph.graph.node_weight(id)?.as_any().downcast_ref::<IrOperator>()
}

/// Operands of a node in order.
pub fn operands(graph: &Graph, id: NodeIndex) -> Vec<NodeIndex> {
    let mut inputs: Vec<(u8, NodeIndex)> = graph
        .graph
        .edges_directed(id, Direction::Incoming)
        .filter_map(|edge| match edge.weight() {
            Dependency::Data { input_order, .. } => Some((*input_order, edge.source())),
            Dependency::Schedule => None,
        })
        .collect();
    inputs.sort_unstable();
    inputs.into_iter().map(|i| i.1).collect()
}

/// Everything that `roots` need, as a list.
pub fn linearize(graph: &Graph, roots: &[NodeIndex]) -> Linear {
    let mut live: HashMap<NodeIndex, Vec<NodeIndex>> = HashMap::new();
    let mut stack = roots.to_vec();
    while let Some(id) = stack.pop() {
        if live.contains_key(&id) {
            continue;
        }
        let inputs = operands(graph, id);
        stack.extend(&inputs);
        live.insert(id, inputs);
    }
    // Nodes are only ever appended, operands first, so that the index order is a topological one.
    let mut order: Vec<NodeIndex> = live.keys().copied().collect();
    order.sort_unstable();
    let position: HashMap<NodeIndex, NodeId> = order.iter().enumerate().map(|(i, &id)| (id, i as NodeId)).collect();
    let nodes = order
        .iter()
        .filter_map(|id| {
            let operator = operator(graph, *id)?;
            let inputs = live[id].iter().map(|i| position[i]).collect();
            Some(Node { op: operator.op.clone(), inputs, shape: operator.shape.clone(), dtype: operator.dtype })
        })
        .collect();
    Linear { nodes, position }
}

/// The node list under construction; equal nodes are one.
#[derive(Default)]
pub struct Builder {
    pub nodes: Vec<Node>,
    known: HashMap<(String, Vec<NodeId>, Vec<usize>, DType), NodeId>,
}

impl Builder {
    /// Adds a node, or finds the equal one.
    pub fn push(&mut self, op: Op, inputs: Vec<NodeId>, shape: Vec<usize>, dtype: DType) -> NodeId {
        let id = self.nodes.len() as NodeId;
        let key = (format!("{op:?}"), inputs, shape, dtype);
        if let Some(&known) = self.known.get(&key) {
            return known;
        }
        self.nodes.push(Node { op, inputs: key.1.clone(), shape: key.2.clone(), dtype });
        self.known.insert(key, id);
        id
    }

    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    /// An f32 node.
    pub fn f32(&mut self, op: Op, inputs: &[NodeId], shape: &[usize]) -> NodeId {
        self.push(op, inputs.to_vec(), shape.to_vec(), DType::F32)
    }
}

/// Rebuilds a graph. `pass` gets the live nodes and answers, for each, with its replacement in the builder; `ids` are
/// the references from outside, which follow.
pub fn rewrite<T: ToIdsMut>(graph: &mut Graph, mut ids: T, pass: impl FnOnce(&[Node], &mut Builder) -> Vec<NodeId>) {
    let mut outside = ids.to_ids_mut();
    let roots: Vec<NodeIndex> = outside.iter().map(|id| **id).collect();
    let linear = linearize(graph, &roots);
    let mut builder = Builder::default();
    let replacement = pass(&linear.nodes, &mut builder);
    let wanted: Vec<NodeId> = roots.iter().map(|r| replacement[linear.position[r] as usize]).collect();
    let mut rebuilt = Graph::new();
    let indices = write(&mut rebuilt, &builder.nodes, &wanted);
    for (id, new) in outside.iter_mut().zip(&wanted) {
        if let Some(index) = indices[*new as usize] {
            **id = index;
        }
    }
    *graph = rebuilt;
}

/// Writes the nodes that `wanted` need into a luminal graph.
pub fn write(graph: &mut Graph, nodes: &[Node], wanted: &[NodeId]) -> Vec<Option<NodeIndex>> {
    let mut live = vec![false; nodes.len()];
    for &id in wanted {
        live[id as usize] = true;
    }
    for id in (0..nodes.len()).rev() {
        if live[id] {
            for &input in &nodes[id].inputs {
                live[input as usize] = true;
            }
        }
    }
    let mut indices: Vec<Option<NodeIndex>> = vec![None; nodes.len()];
    for (id, node) in nodes.iter().enumerate() {
        if live[id] {
            let inputs: Vec<NodeIndex> = node.inputs.iter().filter_map(|&i| indices[i as usize]).collect();
            indices[id] = Some(add(graph, node, &inputs));
        }
    }
    indices
}
