//! Shape inference: one function that the builder uses to compute shapes and the host's verifier to check them.

use crate::ir::{Conv, DType, Fragment, IR_VERSION, MAX_RANK, Node, Op, Pool};
use thiserror::Error;

/// A node that does not fit its inputs.
#[derive(Clone, Debug, Error, PartialEq)]
#[error("{op}: expected {expected}, got {got}")]
pub struct ShapeError {
    pub op: &'static str,
    pub expected: String,
    pub got: String,
}

fn wrong(op: &Op, expected: impl Into<String>, got: impl Into<String>) -> ShapeError {
    ShapeError { op: op.name(), expected: expected.into(), got: got.into() }
}

type Shape = Vec<usize>;
/// Shape and element type.
pub type Type<'a> = (&'a [usize], DType);

/// Elements of a tensor at most. No machine holds more, and sizes, offsets and sums of them stay far inside 64 bits.
pub const MAX_ELEMENTS: usize = 1 << 40;

/// Refuses a shape of more than [`MAX_ELEMENTS`] elements, empty dimensions counted as one.
fn within_limit(op: &Op, shape: &[usize]) -> Result<(), ShapeError> {
    let elements = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size.max(1)));
    match elements {
        Some(elements) if elements <= MAX_ELEMENTS => Ok(()),
        _ => Err(wrong(op, format!("at most {MAX_ELEMENTS} elements"), format!("{shape:?}"))),
    }
}

/// Strides, dilations, paddings and pooling windows at most.
pub const MAX_WINDOW: usize = 1 << 20;

/// Refuses windows beyond [`MAX_WINDOW`].
fn within_window(op: &Op, numbers: &[[usize; 2]]) -> Result<(), ShapeError> {
    match numbers.iter().flatten().all(|&number| number <= MAX_WINDOW) {
        true => Ok(()),
        false => {
            Err(wrong(op, format!("a window, stride and padding of at most {MAX_WINDOW}"), format!("{numbers:?}")))
        }
    }
}

/// Size of a convolution's or pooling's output along one dimension; `None` if the window does not fit.
pub fn window_output(input: usize, kernel: usize, stride: usize, padding: usize, dilation: usize) -> Option<usize> {
    let reach = dilation.checked_mul(kernel.checked_sub(1)?)?.checked_add(1)?;
    let room = input.checked_add(padding.checked_mul(2)?)?.checked_sub(reach)?;
    Some(room.checked_div(stride)? + 1)
}

/// The shape and type of `op` over `inputs`. `declared` is the shape that the node states: it is the answer for ops
/// whose shape is free (leaves, reshape, broadcast, gradients of windows), and must agree for all others.
pub fn infer(op: &Op, inputs: &[Type], declared: &[usize], dtype: DType) -> Result<(Shape, DType), ShapeError> {
    for shape in inputs.iter().map(|input| input.0).chain([declared]) {
        within_limit(op, shape)?;
    }
    let (shape, dtype) = infer_unlimited(op, inputs, declared, dtype)?;
    within_limit(op, &shape)?;
    Ok((shape, dtype))
}

/// [`infer`] of shapes that are within the limit, for a result that may not be.
fn infer_unlimited(op: &Op, inputs: &[Type], declared: &[usize], dtype: DType) -> Result<(Shape, DType), ShapeError> {
    let arity = match op {
        Op::Input { .. } | Op::Param { .. } | Op::State { .. } | Op::Constant { .. } => 0..=0,
        Op::Literal { .. } | Op::Iota { .. } | Op::Random { .. } => 0..=0,
        Op::Unary(_) | Op::Sum { .. } | Op::Max { .. } | Op::Reshape | Op::Permute { .. } | Op::Broadcast => 1..=1,
        Op::Moments
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::MaxPool2d(_)
        | Op::AvgPool2d(_)
        | Op::AvgPool2dGrad(_) => 1..=1,
        Op::Cast | Op::Detach | Op::Softmax | Op::LogSoftmax | Op::Gelu | Op::L2Normalize { .. } => 1..=1,
        Op::Binary(_) | Op::Compare(_) | Op::Matmul | Op::Conv2d(_) | Op::Conv2dInputGrad(_) => 2..=2,
        Op::Conv2dWeightGrad(_) | Op::MaxPool2dGrad(_) | Op::Gather | Op::ScatterAdd => 2..=2,
        Op::Select | Op::Scatter | Op::LayerNorm { .. } | Op::BatchNorm { .. } => 3..=3,
        Op::Concat { .. } => 1..=usize::MAX,
    };
    if !arity.contains(&inputs.len()) {
        return Err(wrong(op, format!("{} inputs", arity.start()), format!("{}", inputs.len())));
    }
    if declared.len() > MAX_RANK || inputs.iter().any(|i| i.0.len() > MAX_RANK) {
        return Err(wrong(op, format!("at most {MAX_RANK} dimensions"), format!("{declared:?}")));
    }
    let float_inputs = !matches!(
        op,
        Op::Reshape
            | Op::Permute { .. }
            | Op::Broadcast
            | Op::Slice { .. }
            | Op::Cast
            | Op::Detach
            | Op::Gather
            | Op::ScatterAdd
            | Op::Scatter
    );
    if float_inputs && inputs.iter().any(|i| i.1 != DType::F32) {
        return Err(wrong(op, "f32 inputs", "an i32 input (hint: cast it first with `.cast(DType::F32)`)"));
    }
    let x = inputs.first().map(|i| i.0).unwrap_or(&[]);
    let same = |shape: &[usize]| Ok((shape.to_vec(), DType::F32));
    match op {
        Op::Input { .. } | Op::Param { .. } | Op::State { .. } => Ok((declared.to_vec(), dtype)),
        Op::Constant { value } if !value.is_finite() => Err(wrong(op, "a finite value", format!("{value}"))),
        Op::Constant { .. } | Op::Random { .. } => same(declared),
        Op::Literal { values } => {
            let count: usize = declared.iter().product();
            if values.len() != count {
                return Err(wrong(op, format!("{count} values for {declared:?}"), format!("{}", values.len())));
            }
            if values.iter().any(|v| !v.is_finite()) {
                return Err(wrong(op, "finite values", "infinity or NaN"));
            }
            Ok((declared.to_vec(), dtype))
        }
        Op::Iota { axis } => match axis < &declared.len() {
            true => same(declared),
            false => Err(wrong(op, format!("an axis below {}", declared.len()), format!("{axis}"))),
        },
        Op::Unary(_) | Op::Softmax | Op::LogSoftmax | Op::Gelu | Op::L2Normalize { .. } => {
            if !matches!(op, Op::Unary(_) | Op::Gelu) && x.is_empty() {
                return Err(wrong(op, "at least one dimension", "a scalar"));
            }
            same(x)
        }
        Op::Detach => Ok((x.to_vec(), inputs[0].1)),
        Op::Cast => Ok((x.to_vec(), dtype)),
        Op::Binary(_) | Op::Compare(_) | Op::Select => match inputs.iter().all(|i| i.0 == x) {
            true => same(x),
            false => Err(wrong(op, "inputs of one shape", format!("{:?}", shapes(inputs)))),
        },
        Op::Sum { axes } | Op::Max { axes } => {
            let mut shape = x.to_vec();
            for &axis in axes {
                match shape.get_mut(axis) {
                    Some(size) => *size = 1,
                    None => return Err(wrong(op, format!("axes of {x:?}"), format!("{axes:?}"))),
                }
            }
            if matches!(op, Op::Max { .. }) && x.contains(&0) {
                return Err(wrong(op, "a tensor with elements", format!("{x:?}")));
            }
            same(&shape)
        }
        Op::Reshape => match x.iter().product::<usize>() == declared.iter().product::<usize>() {
            true => Ok((declared.to_vec(), inputs[0].1)),
            false => Err(wrong(op, format!("the element count of {x:?}"), format!("{declared:?}"))),
        },
        Op::Permute { axes } => {
            let mut seen = axes.clone();
            seen.sort_unstable();
            if !seen.iter().copied().eq(0..x.len()) {
                return Err(wrong(op, format!("a permutation of {} axes", x.len()), format!("{axes:?}")));
            }
            Ok((axes.iter().map(|&a| x[a]).collect(), inputs[0].1))
        }
        Op::Broadcast => {
            let fits = x.len() == declared.len() && x.iter().zip(declared).all(|(a, b)| a == b || *a == 1);
            match fits {
                true => Ok((declared.to_vec(), inputs[0].1)),
                false => Err(wrong(op, format!("a shape that {x:?} expands to"), format!("{declared:?}"))),
            }
        }
        Op::Slice { starts, ends } => {
            let fits = starts.len() == x.len()
                && ends.len() == x.len()
                && x.iter().zip(starts.iter().zip(ends)).all(|(n, (s, e))| s <= e && e <= n);
            match fits {
                true => Ok((starts.iter().zip(ends).map(|(s, e)| e - s).collect(), inputs[0].1)),
                false => Err(wrong(op, format!("ranges inside {x:?}"), format!("{starts:?}..{ends:?}"))),
            }
        }
        Op::Pad { before, after, .. } => match before.len() == x.len() && after.len() == x.len() {
            true => {
                let padded = |(n, (b, a)): (&usize, (&usize, &usize))| n.saturating_add(*b).saturating_add(*a);
                same(&x.iter().zip(before.iter().zip(after)).map(padded).collect::<Vec<_>>())
            }
            false => Err(wrong(op, format!("{} paddings", x.len()), format!("{} and {}", before.len(), after.len()))),
        },
        Op::Concat { axis } => {
            let mut shape = x.to_vec();
            if *axis >= x.len() {
                return Err(wrong(op, format!("an axis of {x:?}"), format!("{axis}")));
            }
            shape[*axis] = 0;
            for (other, _) in inputs {
                let fits = other.len() == x.len() && (0..x.len()).all(|d| d == *axis || other.get(d) == Some(&x[d]));
                if !fits {
                    return Err(wrong(
                        op,
                        format!("shapes equal but for axis {axis}"),
                        format!("{:?}", shapes(inputs)),
                    ));
                }
                shape[*axis] = shape[*axis].saturating_add(other[*axis]);
            }
            same(&shape)
        }
        Op::Matmul => {
            let b = inputs[1].0;
            let rank = x.len();
            let fits = rank >= 2 && b.len() == rank && x[..rank - 2] == b[..rank - 2] && x[rank - 1] == b[rank - 2];
            if !fits {
                return Err(wrong(op, "[…, m, k] and […, k, n]", format!("{x:?} and {b:?}")));
            }
            let mut shape = x.to_vec();
            shape[rank - 1] = b[rank - 1];
            same(&shape)
        }
        Op::Conv2d(conv) => same(&conv_output(op, conv, x, inputs[1].0)?),
        Op::Conv2dInputGrad(conv) => match conv_output(op, conv, declared, inputs[1].0)? == x {
            true => same(declared),
            false => Err(wrong(op, "the gradient of the convolution's output", format!("{x:?}"))),
        },
        Op::Conv2dWeightGrad(conv) => match conv_output(op, conv, x, declared)? == inputs[1].0 {
            true => same(declared),
            false => Err(wrong(op, "the gradient of the convolution's output", format!("{:?}", inputs[1].0))),
        },
        Op::MaxPool2d(pool) | Op::AvgPool2d(pool) => same(&pool_output(op, pool, x)?),
        Op::MaxPool2dGrad(pool) => match pool_output(op, pool, x)? == inputs[1].0 {
            true => same(x),
            false => Err(wrong(op, "the gradient of the pooled output", format!("{:?}", inputs[1].0))),
        },
        Op::AvgPool2dGrad(pool) => match pool_output(op, pool, declared)? == x {
            true => same(declared),
            false => Err(wrong(op, "the gradient of the pooled output", format!("{x:?}"))),
        },
        Op::Gather => {
            let (ids, ids_type) = inputs[1];
            if x.is_empty() || ids_type != DType::I32 {
                return Err(wrong(op, "a table and i32 ids", format!("{x:?} and {ids:?} {ids_type:?}")));
            }
            Ok((ids.iter().chain(&x[1..]).copied().collect(), inputs[0].1))
        }
        Op::ScatterAdd => {
            let (rows, rows_type) = inputs[1];
            let fits = inputs[0].1 == DType::I32
                && rows_type == DType::F32
                && !declared.is_empty()
                && rows.iter().eq(x.iter().chain(&declared[1..]));
            match fits {
                true => same(declared),
                false => Err(wrong(op, format!("i32 ids and rows for {declared:?}"), format!("{x:?} and {rows:?}"))),
            }
        }
        Op::Scatter => {
            let ((ids, ids_type), (rows, rows_type)) = (inputs[1], inputs[2]);
            let fits = ids_type == DType::I32
                && rows_type == inputs[0].1
                && !x.is_empty()
                && rows.iter().eq(ids.iter().chain(&x[1..]));
            match fits {
                true => Ok((x.to_vec(), inputs[0].1)),
                false => Err(wrong(op, format!("i32 ids and rows for {x:?}"), format!("{ids:?} and {rows:?}"))),
            }
        }
        Op::Moments => match x.last() {
            Some(&columns) => same(&[2, columns]),
            None => Err(wrong(op, "at least one dimension", "a scalar")),
        },
        Op::LayerNorm { .. } | Op::BatchNorm { .. } => {
            let axis = match op {
                Op::BatchNorm { axis, .. } => *axis,
                _ => x.len().saturating_sub(1),
            };
            let size = x.get(axis).copied();
            let fits = size.is_some() && inputs[1..].iter().all(|i| i.0.len() == 1 && Some(i.0[0]) == size);
            match fits {
                true => same(x),
                false => {
                    Err(wrong(op, "gain and bias as long as the normalised axis", format!("{:?}", shapes(inputs))))
                }
            }
        }
    }
}

fn shapes<'a>(inputs: &[Type<'a>]) -> Vec<&'a [usize]> {
    inputs.iter().map(|i| i.0).collect()
}

fn conv_output(op: &Op, conv: &Conv, x: &[usize], weight: &[usize]) -> Result<Shape, ShapeError> {
    if x.len() != 4 || weight.len() != 4 || conv.groups == 0 {
        return Err(wrong(
            op,
            "a 4-D input, a 4-D weight and groups ≥ 1",
            format!("{x:?}, {weight:?}, {}", conv.groups),
        ));
    }
    within_window(op, &[conv.stride, conv.padding, conv.dilation])?;
    let [n, c, h, w] = conv.layout.axes().map(|a| x[a]);
    if Some(c) != weight[1].checked_mul(conv.groups) || !weight[0].is_multiple_of(conv.groups) {
        return Err(wrong(
            op,
            format!("a weight [out, {c} / groups, kh, kw] with groups dividing out"),
            format!("{weight:?} with {} groups", conv.groups),
        ));
    }
    let size = |d: usize, input: usize| {
        window_output(input, weight[2 + d], conv.stride[d], conv.padding[d], conv.dilation[d])
            .ok_or_else(|| wrong(op, "a window that fits the padded input", format!("{x:?} and {weight:?}")))
    };
    Ok(conv.layout.shape(n, weight[0], size(0, h)?, size(1, w)?))
}

fn pool_output(op: &Op, pool: &Pool, x: &[usize]) -> Result<Shape, ShapeError> {
    if x.len() != 4 {
        return Err(wrong(op, "a 4-D input", format!("{x:?}")));
    }
    within_window(op, &[pool.kernel, pool.stride, pool.padding])?;
    let [n, c, h, w] = pool.layout.axes().map(|a| x[a]);
    if (0..2).any(|d| pool.padding[d] * 2 > pool.kernel[d]) {
        return Err(wrong(
            op,
            "padding of at most half the kernel",
            format!("{:?} for {:?}", pool.padding, pool.kernel),
        ));
    }
    let size = |d: usize, input: usize| {
        window_output(input, pool.kernel[d], pool.stride[d], pool.padding[d], 1)
            .ok_or_else(|| wrong(op, "a window that fits the padded input", format!("{x:?} and {:?}", pool.kernel)))
    };
    Ok(pool.layout.shape(n, c, size(0, h)?, size(1, w)?))
}

/// Why a fragment is refused.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum FragmentError {
    #[error("the fragment has IR version {got}, this program reads up to {IR_VERSION}")]
    Version { got: u32 },
    #[error("node %{node}: {error}")]
    Shape { node: usize, error: ShapeError },
    #[error("node %{node} ({op}) states {stated}, its inputs give {inferred}")]
    Stated { node: usize, op: &'static str, stated: String, inferred: String },
    #[error("node %{node} ({op}) reads %{input}, which does not come before it")]
    Order { node: usize, op: &'static str, input: u32 },
    #[error("two nodes are named `{name}`")]
    Name { name: String },
    #[error("two {what} are named `{name}`")]
    Result { what: &'static str, name: String },
    #[error("{what} names %{node}: {why}")]
    Reference { what: String, node: u32, why: String },
    #[error(
        "node %{node} is `{op}`, which only the host's own passes make (hint: write the formula in other ops; the host \
         finds it again)"
    )]
    Internal { node: usize, op: &'static str },
}

/// Checks every rule that a fragment must keep: order, arity, shapes, types, unique names, references.
pub fn verify(fragment: &Fragment) -> Result<(), FragmentError> {
    if fragment.ir_version == 0 || fragment.ir_version > IR_VERSION {
        return Err(FragmentError::Version { got: fragment.ir_version });
    }
    let mut names = std::collections::HashSet::new();
    for (index, node) in fragment.nodes.iter().enumerate() {
        for &input in &node.inputs {
            if input as usize >= index {
                return Err(FragmentError::Order { node: index, op: node.op.name(), input });
            }
        }
        if node.op.is_internal() {
            return Err(FragmentError::Internal { node: index, op: node.op.name() });
        }
        verify_node(node, |i| &fragment.nodes[i as usize]).map_err(|error| match error {
            FragmentError::Shape { error, .. } => FragmentError::Shape { node: index, error },
            FragmentError::Stated { op, stated, inferred, .. } => {
                FragmentError::Stated { node: index, op, stated, inferred }
            }
            other => other,
        })?;
        if let Op::Input { name } | Op::Param { name, .. } | Op::State { name, .. } = &node.op
            && !names.insert(name.as_str())
        {
            return Err(FragmentError::Name { name: name.clone() });
        }
    }
    verify_references(fragment)
}

/// Checks one node against its inputs.
pub fn verify_node<'a>(node: &Node, input: impl Fn(u32) -> &'a Node) -> Result<(), FragmentError> {
    let inputs: Vec<Type> = node.inputs.iter().map(|&i| (input(i).shape.as_slice(), input(i).dtype)).collect();
    let (shape, dtype) =
        infer(&node.op, &inputs, &node.shape, node.dtype).map_err(|error| FragmentError::Shape { node: 0, error })?;
    if (shape.as_slice(), dtype) != (node.shape.as_slice(), node.dtype) {
        return Err(FragmentError::Stated {
            node: 0,
            op: node.op.name(),
            stated: format!("{:?} {:?}", node.shape, node.dtype),
            inferred: format!("{shape:?} {dtype:?}"),
        });
    }
    Ok(())
}

fn verify_references(fragment: &Fragment) -> Result<(), FragmentError> {
    let node = |what: String, id: u32| {
        fragment.nodes.get(id as usize).ok_or_else(|| FragmentError::Reference {
            what,
            node: id,
            why: format!("there are only {} nodes", fragment.nodes.len()),
        })
    };
    for (what, results) in [("outputs", &fragment.outputs), ("metrics", &fragment.metrics)] {
        let mut names = std::collections::HashSet::new();
        if let Some((name, _)) = results.iter().find(|(name, _)| !names.insert(name)) {
            return Err(FragmentError::Result { what, name: name.clone() });
        }
    }
    for (name, id) in &fragment.outputs {
        node(format!("output `{name}`"), *id)?;
    }
    for (name, id) in &fragment.metrics {
        if node(format!("metric `{name}`"), *id)?.elements() != 1 {
            let (what, why) = (format!("metric `{name}`"), "a metric is one number".to_string());
            return Err(FragmentError::Reference { what, node: *id, why });
        }
    }
    let pairs =
        fragment.updates.iter().map(|p| ("update", p)).chain(fragment.projections.iter().map(|p| ("projection", p)));
    let mut targets = std::collections::HashSet::new();
    for (what, &(target, value)) in pairs {
        let (to, from) = (node(what.into(), target)?, node(what.into(), value)?);
        let right_kind = match what {
            "update" => matches!(to.op, Op::State { .. }),
            _ => matches!(to.op, Op::Param { .. }),
        };
        let why = if !right_kind {
            format!("it is a {}; updates go to states, projections to params", to.op.name())
        } else if (&to.shape, to.dtype) != (&from.shape, from.dtype) {
            format!("it is {:?}, the value {:?}", to.shape, from.shape)
        } else if !targets.insert(target) {
            "it has two values".into()
        } else {
            continue;
        };
        return Err(FragmentError::Reference { what: what.into(), node: target, why });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(op: Op, inputs: Vec<u32>, shape: &[usize]) -> Node {
        Node { op, inputs, shape: shape.to_vec(), dtype: DType::F32 }
    }

    #[test]
    fn sizes_that_no_machine_holds_are_refused() {
        let input = |shape: &[usize]| node(Op::Input { name: "x".into() }, vec![], shape);
        let refused = |nodes: Vec<Node>| {
            let error = verify(&Fragment { nodes, ..Fragment::default() }).unwrap_err().to_string();
            assert!(error.contains("at most 1099511627776 elements"), "{error}");
        };
        // Products that wrap round to a small number, with and without an empty dimension.
        refused(vec![input(&[1 << 33, 1 << 33])]);
        refused(vec![input(&[0, usize::MAX, usize::MAX])]);
        let padded = Op::Pad { before: vec![usize::MAX], after: vec![2], value: 0.0 };
        refused(vec![input(&[4]), node(padded, vec![0], &[5])]);
        refused(vec![input(&[4, 1]), node(Op::Broadcast, vec![0], &[4, 1 << 40])]);
        let (tall, wide) = (node(Op::Reshape, vec![0], &[1 << 30, 1]), node(Op::Reshape, vec![0], &[1, 1 << 30]));
        refused(vec![input(&[1 << 30]), tall, wide, node(Op::Matmul, vec![1, 2], &[1 << 30, 1 << 30])]);
        let conv = Conv {
            stride: [1; 2],
            padding: [MAX_WINDOW; 2],
            dilation: [1; 2],
            groups: usize::MAX,
            layout: crate::ir::Layout::Nchw,
        };
        let nodes = vec![input(&[1, 1, 4, 4]), node(Op::Input { name: "w".into() }, vec![], &[1, 3, 1, 1])];
        let conv_node = |conv| [nodes.clone(), vec![node(Op::Conv2d(conv), vec![0, 1], &[1, 1, 4, 4])]].concat();
        // Groups times channels would wrap.
        assert!(verify(&Fragment { nodes: conv_node(conv), ..Fragment::default() }).is_err());
        let nodes = vec![input(&[1, 1, 4, 4]), node(Op::Input { name: "w".into() }, vec![], &[1, 1, 1, 1])];
        // 2²¹ by 2²¹ and a few.
        let wide = node(Op::Conv2d(Conv { groups: 1, ..conv }), vec![0, 1], &[1, 1, 4, 4]);
        refused([nodes.clone(), vec![wide]].concat());
        let far = Conv { groups: 1, stride: [MAX_WINDOW + 1; 2], ..conv };
        let nodes = [nodes, vec![node(Op::Conv2d(far), vec![0, 1], &[1, 1, 2, 2])]].concat();
        let error = verify(&Fragment { nodes, ..Fragment::default() }).unwrap_err().to_string();
        assert!(error.contains("at most 1048576"), "{error}");
    }

    #[test]
    fn two_results_of_one_name_are_refused() {
        let nodes = vec![node(Op::Input { name: "x".into() }, vec![], &[])];
        let twice = vec![("a".to_string(), 0), ("a".to_string(), 0)];
        let error = verify(&Fragment { nodes: nodes.clone(), outputs: twice.clone(), ..Fragment::default() });
        assert_eq!(error.unwrap_err().to_string(), "two outputs are named `a`");
        let error = verify(&Fragment { nodes, metrics: twice, ..Fragment::default() });
        assert_eq!(error.unwrap_err().to_string(), "two metrics are named `a`");
    }

    #[test]
    fn ops_of_the_host_are_refused_in_fragments() {
        let input = Op::Input { name: "x".into() };
        let nodes = vec![node(input, vec![], &[4, 3]), node(Op::Moments, vec![0], &[2, 3])];
        assert_eq!(verify_node(&nodes[1], |i| &nodes[i as usize]), Ok(()));
        let error = verify(&Fragment { nodes, ..Fragment::default() }).unwrap_err();
        assert_eq!(error, FragmentError::Internal { node: 1, op: "moments" });
        assert!(error.to_string().contains("hint:"));
    }
}
