//! Batch statistics in one pass: the mean and the population variance of a tensor's columns, written as two sums of which
//! the second needs the first, become one [`Op::Moments`].
//!
//! As sums they cost two passes over the tensor, because the variance is that of the centred values. One kernel gathers
//! both without cancellation, and where the tensor is a convolution's result the convolution does it while its tiles are
//! in the cache.

use clip_host_graph::rewrite::{Builder, rewrite};
use clip_host_plugin_api::ir::{Binary, DType, Node, NodeId, Op};
use luminal::compiler_utils::{Compiler, ToIdsMut};
use luminal::graph::Graph;
use std::collections::HashMap;

/// The pass. Expects constants to be folded.
#[derive(Debug)]
pub struct FindMoments;

impl Compiler for FindMoments {
    fn compile<T: ToIdsMut>(&self, graph: &mut Graph, ids: T) {
        rewrite(graph, ids, |nodes, builder| {
            let found = find(nodes);
            let mut new: Vec<NodeId> = Vec::with_capacity(nodes.len());
            for (id, node) in nodes.iter().enumerate() {
                new.push(match found.get(&(id as NodeId)) {
                    Some(&(x, row)) => statistic(builder, new[x as usize], row, &node.shape),
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

/// Rows of the moments.
const MEAN: usize = 0;
const VARIANCE: usize = 1;

/// What is a mean or a variance over leading axes: the tensor, and which row of its moments. A mean alone is one pass as
/// it is.
fn find(nodes: &[Node]) -> HashMap<NodeId, (NodeId, usize)> {
    let mut found = HashMap::new();
    for id in 0..nodes.len() as NodeId {
        if let Some((mean, x)) = variance(nodes, id) {
            found.insert(mean, (x, MEAN));
            found.insert(id, (x, VARIANCE));
        }
    }
    found
}

/// The mean node and the tensor, if `id` is Σ (x − mean)² / n over all axes of x but the last.
fn variance(nodes: &[Node], id: NodeId) -> Option<(NodeId, NodeId)> {
    let square = &nodes[column_mean(nodes, id)? as usize];
    let (Op::Binary(Binary::Mul), [a, b]) = (&square.op, square.inputs.as_slice()) else { return None };
    let centred = &nodes[*a as usize];
    let (Op::Binary(Binary::Sub), [x, mean]) = (&centred.op, centred.inputs.as_slice()) else { return None };
    let mean = match &nodes[*mean as usize] {
        Node { op: Op::Broadcast, inputs, .. } => inputs[0],
        _ => *mean,
    };
    (a == b && column_mean(nodes, mean) == Some(*x)).then_some((mean, *x))
}

/// The tensor, if `id` is its sum over all axes but the last, divided by their size.
fn column_mean(nodes: &[Node], id: NodeId) -> Option<NodeId> {
    let node = &nodes[id as usize];
    let (Op::Binary(op @ (Binary::Mul | Binary::Div)), [sum, scale]) = (&node.op, node.inputs.as_slice()) else {
        return None;
    };
    let Op::Constant { value } = nodes[*scale as usize].op else { return None };
    let sum = &nodes[*sum as usize];
    let Op::Sum { axes } = &sum.op else { return None };
    let x = &nodes[sum.inputs[0] as usize];
    let last = x.shape.len().checked_sub(1)?;
    let rows: usize = x.shape[..last].iter().product();
    let columns = (0..last).all(|d| x.shape[d] == 1 || axes.contains(&d)) && !axes.contains(&last);
    let share = if *op == Binary::Mul { value } else { 1.0 / value };
    (rows > 1 && columns && (share * rows as f64 - 1.0).abs() < 1e-9).then_some(sum.inputs[0])
}

fn statistic(builder: &mut Builder, x: NodeId, row: usize, shape: &[usize]) -> NodeId {
    let columns = shape[shape.len() - 1];
    let moments = builder.push(Op::Moments, vec![x], vec![2, columns], DType::F32);
    let slice = Op::Slice { starts: vec![row, 0], ends: vec![row + 1, columns] };
    let slice = builder.push(slice, vec![moments], vec![1, columns], DType::F32);
    builder.push(Op::Reshape, vec![slice], shape.to_vec(), DType::F32)
}
