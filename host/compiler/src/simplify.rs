//! Algebra that never changes a value: constants folded, movements merged, identities dropped.

use clip_host_graph::rewrite::{Builder, rewrite};
use clip_host_plugin_api::ir::{Binary, DType, Node, NodeId, Op, Unary};
use luminal::compiler_utils::{Compiler, ToIdsMut};
use luminal::graph::Graph;

/// The pass. Gradients must have been taken: `detach` is dropped here.
#[derive(Debug)]
pub struct Simplify;

impl Compiler for Simplify {
    fn compile<T: ToIdsMut>(&self, graph: &mut Graph, ids: T) {
        rewrite(graph, ids, |nodes, builder| {
            let mut new: Vec<NodeId> = Vec::with_capacity(nodes.len());
            let mut readers = vec![0; nodes.len()];
            nodes.iter().flat_map(|n| &n.inputs).for_each(|&i| readers[i as usize] += 1);
            for node in nodes {
                let inputs: Vec<NodeId> = node.inputs.iter().map(|&i| new[i as usize]).collect();
                if let (Op::Permute { axes }, [product]) = (&node.op, node.inputs.as_slice())
                    && readers[*product as usize] == 1
                    && let Some(turned) = transposed_product(builder, axes, inputs[0])
                {
                    new.push(turned);
                    continue;
                }
                new.push(simplified(builder, node.op.clone(), inputs, &node.shape, node.dtype));
            }
            new
        });
    }
}

/// (a·b)ᵀ = bᵀ·aᵀ: the product is written as its one reader wants it.
fn transposed_product(builder: &mut Builder, axes: &[usize], product: NodeId) -> Option<NodeId> {
    let Node { op: Op::Matmul, inputs, shape, dtype } = builder.node(product).clone() else { return None };
    let rank = axes.len();
    let mut swapped: Vec<usize> = (0..rank).collect();
    swapped.swap(rank - 1, rank - 2);
    if axes != swapped {
        return None;
    }
    let mut turn = |id: NodeId| {
        let mut shape = builder.node(id).shape.clone();
        shape.swap(rank - 1, rank - 2);
        simplified(builder, Op::Permute { axes: swapped.clone() }, vec![id], &shape, dtype)
    };
    let turned = vec![turn(inputs[1]), turn(inputs[0])];
    let mut shape = shape;
    shape.swap(rank - 1, rank - 2);
    Some(builder.push(Op::Matmul, turned, shape, dtype))
}

fn constant(builder: &Builder, id: NodeId) -> Option<f64> {
    match builder.node(id).op {
        Op::Constant { value } => Some(value),
        _ => None,
    }
}

/// The value as the backends hold it: constants fold with the rounding that computing them would have.
fn fold(value: f64) -> Option<Op> {
    value.is_finite().then_some(Op::Constant { value })
}

fn simplified(builder: &mut Builder, op: Op, inputs: Vec<NodeId>, shape: &[usize], dtype: DType) -> NodeId {
    let x = inputs.first().copied();
    let source: Option<Node> = x.map(|x| builder.node(x).clone());
    if let (Some(x), Some(source)) = (x, source) {
        let value = constant(builder, x);
        let same_shape = source.shape == shape;
        match &op {
            Op::Detach => return x,
            Op::Cast if source.dtype == dtype => return x,
            Op::Reshape | Op::Broadcast | Op::Permute { .. } | Op::Slice { .. } => {
                if let Some(value) = value {
                    return builder.push(Op::Constant { value }, vec![], shape.to_vec(), dtype);
                }
            }
            Op::Unary(unary) => {
                if let Some(folded) = value.and_then(|v| fold(apply_unary(*unary, v)?)) {
                    return builder.push(folded, vec![], shape.to_vec(), dtype);
                }
                // −(−x)
                if let (Unary::Neg, Op::Unary(Unary::Neg)) = (unary, &source.op) {
                    return source.inputs[0];
                }
            }
            Op::Binary(binary) => {
                let right = inputs[1];
                let other = constant(builder, right);
                if let (Some(a), Some(b)) = (value, other)
                    && let Some(folded) = fold(apply_binary(*binary, a, b))
                {
                    return builder.push(folded, vec![], shape.to_vec(), dtype);
                }
                match (binary, value, other) {
                    (Binary::Mul | Binary::Div, _, Some(1.0)) | (Binary::Add | Binary::Sub, _, Some(0.0)) => return x,
                    (Binary::Mul, Some(1.0), _) | (Binary::Add, Some(0.0), _) => return right,
                    _ => {}
                }
            }
            Op::Sum { axes } | Op::Max { axes } if axes.iter().all(|&a| source.shape[a] == 1) => return x,
            Op::Sum { axes } if value.is_some() => {
                let count: usize = axes.iter().map(|&a| source.shape[a]).product();
                if let Some(folded) = value.and_then(|v| fold(v * count as f64)) {
                    return builder.push(folded, vec![], shape.to_vec(), dtype);
                }
            }
            _ => {}
        }
        match &op {
            Op::Reshape | Op::Broadcast if same_shape => return x,
            Op::Reshape if matches!(source.op, Op::Reshape) => {
                return simplified(builder, Op::Reshape, source.inputs, shape, dtype);
            }
            Op::Broadcast if matches!(source.op, Op::Broadcast) => {
                return simplified(builder, Op::Broadcast, source.inputs, shape, dtype);
            }
            // A broadcast that only adds repetition on top of a reshape of ones stays; movement of ones is a reshape.
            Op::Permute { axes } => {
                if axes.iter().enumerate().all(|(i, &a)| i == a) {
                    return x;
                }
                if let Op::Permute { axes: first } = &source.op {
                    let axes = axes.iter().map(|&a| first[a]).collect();
                    return simplified(builder, Op::Permute { axes }, source.inputs, shape, dtype);
                }
                let moved: Vec<usize> = axes.iter().copied().filter(|&a| source.shape[a] != 1).collect();
                if moved.is_sorted() {
                    return simplified(builder, Op::Reshape, inputs, shape, dtype);
                }
            }
            Op::Slice { starts, .. } if same_shape && starts.iter().all(|&s| s == 0) => return x,
            _ => {}
        }
    }
    builder.push(op, inputs, shape.to_vec(), dtype)
}

fn apply_unary(op: Unary, v: f64) -> Option<f64> {
    Some(match op {
        Unary::Neg => -v,
        Unary::Exp => v.exp(),
        Unary::Ln => v.ln(),
        Unary::Sqrt => v.sqrt(),
        Unary::Recip => 1.0 / v,
        Unary::Abs => v.abs(),
        Unary::Tanh | Unary::Erf | Unary::Sin | Unary::Cos => return None,
    })
}

fn apply_binary(op: Binary, a: f64, b: f64) -> f64 {
    match op {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        Binary::Maximum => a.max(b),
        Binary::Minimum => a.min(b),
        Binary::Pow => a.powf(b),
    }
}
