//! The gradient rule of each op, written in the builder's own language, and reverse-mode differentiation with them.
//!
//! A rule gets the op's inputs, its output and the gradient of the loss with respect to that output, and answers with
//! the gradient with respect to each input.

use crate::decompose::{batch_axes, batch_normalise, channel};
use crate::graph::{BuildError, Graph, Tensor};
use crate::ir::{Binary, DType, Fragment, NodeId, Op, Unary};
use thiserror::Error;

/// Why a gradient could not be written.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum GradientError {
    /// Second derivatives of windows and tables are not there.
    #[error("the gradient of `{op}` is not available (hint: `.detach()` its result if no gradient should flow)")]
    NotDifferentiable { op: &'static str },
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// Gradients with respect to the inputs of one node; `None` where none flows. `wanted[i]` says whether input `i`'s is
/// needed, so that costly ones are left out.
pub fn rule<'g>(
    op: &Op,
    x: &[Tensor<'g>],
    y: Tensor<'g>,
    g: Tensor<'g>,
    wanted: &[bool],
) -> Result<Vec<Option<Tensor<'g>>>, GradientError> {
    let want = |i: usize| wanted.get(i).copied().unwrap_or(false);
    let graph = g.graph();
    let one = |t: Tensor<'g>| Ok(vec![Some(t)]);
    match op {
        Op::Input { .. } | Op::Param { .. } | Op::State { .. } | Op::Constant { .. } => Ok(vec![]),
        Op::Literal { .. } | Op::Iota { .. } | Op::Random { .. } => Ok(vec![]),
        Op::Detach | Op::Cast => Ok(vec![None]),
        Op::Compare(_) => Ok(vec![None, None]),

        Op::Unary(unary) => one(match unary {
            Unary::Neg => -g,
            Unary::Exp => g * y,
            Unary::Ln => g / x[0],
            Unary::Sqrt => g * 0.5 / y,
            Unary::Recip => -(g * y * y),
            Unary::Tanh => g * (1.0 - y * y),
            Unary::Erf => g * (x[0] * x[0] * -1.0).exp() * std::f64::consts::FRAC_2_SQRT_PI,
            Unary::Sin => g * x[0].cos(),
            Unary::Cos => -(g * x[0].sin()),
            // 0 at 0, as PyTorch.
            Unary::Abs => g * (x[0].gt(0.0) - x[0].lt(0.0)),
        }),
        Op::Binary(binary) => {
            let (a, b) = (x[0], x[1]);
            let pair = match binary {
                Binary::Add => [want(0).then_some(g), want(1).then_some(g)],
                Binary::Sub => [want(0).then_some(g), want(1).then(|| -g)],
                Binary::Mul => [want(0).then(|| g * b), want(1).then(|| g * a)],
                Binary::Div => [want(0).then(|| g / b), want(1).then(|| -(g * y / b))],
                // Equal arguments share the gradient evenly, as PyTorch.
                Binary::Maximum => [want(0).then(|| g * first_share(b, a)), want(1).then(|| g * first_share(a, b))],
                Binary::Minimum => [want(0).then(|| g * first_share(a, b)), want(1).then(|| g * first_share(b, a))],
                Binary::Pow => [
                    want(0).then(|| g * b * a.pow(b - 1.0)),
                    want(1).then(|| g * y * a.maximum(f64::MIN_POSITIVE).ln()),
                ],
            };
            Ok(pair.into())
        }
        Op::Select => {
            let zero = graph.scalar(0.0);
            Ok(vec![None, want(1).then(|| x[0].where_(g, zero)), want(2).then(|| x[0].where_(zero, g))])
        }

        Op::Sum { .. } => one(g.expand_to(&x[0].shape())),
        Op::Max { axes } => {
            let axes: Vec<isize> = axes.iter().map(|&a| a as isize).collect();
            let hit = x[0].eq(y);
            one(hit * (g / hit.sum(&axes, true)))
        }

        Op::Reshape => one(g.reshape(&x[0].shape())),
        Op::Permute { axes } => {
            let mut inverse = vec![0; axes.len()];
            for (to, &from) in axes.iter().enumerate() {
                inverse[from] = to;
            }
            one(g.permute(&inverse))
        }
        Op::Broadcast => {
            let (from, to) = (x[0].shape(), y.shape());
            let axes: Vec<isize> = (0..to.len()).filter(|&d| from[d] != to[d]).map(|d| d as isize).collect();
            one(g.sum(&axes, true))
        }
        Op::Slice { starts, ends } => {
            let after: Vec<usize> = x[0].shape().iter().zip(ends).map(|(n, e)| n - e).collect();
            one(g.pad(starts, &after, 0.0))
        }
        Op::Pad { before, .. } => {
            let ends = x[0].shape().iter().zip(before).map(|(n, b)| n + b).collect();
            one(graph.push(Op::Slice { starts: before.clone(), ends }, &[g], &[], DType::F32))
        }
        Op::Concat { axis } => {
            let mut start = 0;
            let mut parts = Vec::new();
            for (i, part) in x.iter().enumerate() {
                let end = start + part.size(*axis as isize);
                parts.push(want(i).then(|| g.slice(*axis as isize, start, end)));
                start = end;
            }
            Ok(parts)
        }

        Op::Matmul => Ok(vec![want(0).then(|| g.matmul(x[1].t())), want(1).then(|| x[0].t().matmul(g))]),
        Op::Conv2d(conv) => Ok(vec![
            want(0).then(|| graph.push(Op::Conv2dInputGrad(*conv), &[g, x[1]], &x[0].shape(), DType::F32)),
            want(1).then(|| graph.push(Op::Conv2dWeightGrad(*conv), &[x[0], g], &x[1].shape(), DType::F32)),
        ]),
        Op::MaxPool2d(pool) => one(graph.push(Op::MaxPool2dGrad(*pool), &[x[0], g], &[], DType::F32)),
        Op::AvgPool2d(pool) => one(graph.push(Op::AvgPool2dGrad(*pool), &[g], &x[0].shape(), DType::F32)),

        Op::Gather => {
            Ok(vec![want(0).then(|| graph.push(Op::ScatterAdd, &[x[1], g], &x[0].shape(), DType::F32)), None])
        }
        Op::ScatterAdd => Ok(vec![None, want(1).then(|| g.gather(x[0]))]),
        Op::Conv2dInputGrad(_)
        | Op::Conv2dWeightGrad(_)
        | Op::MaxPool2dGrad(_)
        | Op::AvgPool2dGrad(_)
        | Op::Moments
        | Op::Scatter => Err(GradientError::NotDifferentiable { op: op.name() }),

        Op::Softmax => one((g - (g * y).sum(&[-1], true)) * y),
        Op::LogSoftmax => one(g - y.exp() * g.sum(&[-1], true)),
        Op::LayerNorm { eps } => {
            let centred = x[0] - x[0].mean(&[-1], true);
            let rstd = (centred.square().mean(&[-1], true) + *eps).sqrt().recip();
            let normalised = centred * rstd;
            let scaled = g * x[1];
            let dx = (scaled - scaled.mean(&[-1], true) - normalised * (scaled * normalised).mean(&[-1], true)) * rstd;
            let rows = batch_axes(y.rank(), y.rank() - 1);
            Ok(vec![
                want(0).then_some(dx),
                want(1).then(|| (g * normalised).sum(&rows, false)),
                want(2).then(|| g.sum(&rows, false)),
            ])
        }
        Op::BatchNorm { eps, axis } => {
            let (normalised, rstd) = batch_normalise(x[0], *eps, *axis);
            let axes = batch_axes(y.rank(), *axis);
            let count: usize = axes.iter().map(|&a| y.size(a)).product();
            let (sum, dot) = (g.sum(&axes, true), (g * normalised).sum(&axes, true));
            let gain = channel(x[1], y, *axis);
            let mean = 1.0 / count as f64;
            // One multiply-add of g and x with per-channel factors: dx = gain·rstd·(g − mean(g) − x̂·mean(g·x̂)).
            let dx = (gain * rstd) * (g - sum * mean - normalised * (dot * mean));
            let size = [x[1].size(0)];
            Ok(vec![want(0).then_some(dx), want(1).then(|| dot.reshape(&size)), want(2).then(|| sum.reshape(&size))])
        }
        Op::Gelu => {
            let cdf = ((x[0] * std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5;
            let density =
                (x[0] * x[0] * -0.5).exp() * (0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2);
            one(g * (cdf + x[0] * density))
        }
        Op::L2Normalize { eps } => {
            let norm = x[0].square().sum(&[-1], true).sqrt();
            // Below eps the divisor is a constant.
            let along = norm.gt(*eps) * (g * y).sum(&[-1], true);
            one((g - y * along) / norm.maximum(*eps))
        }
    }
}

/// 1 where `b > a`, ½ where equal, 0 elsewhere.
fn first_share<'g>(a: Tensor<'g>, b: Tensor<'g>) -> Tensor<'g> {
    (a.lt(b) + a.le(b)) * 0.5
}

/// Adds the gradient of `Σ seed · output` with respect to the named nodes to a fragment: outputs `grad.<i>` for each
/// entry of `wrt`. `seed` pairs nodes with the nodes that hold their cotangents.
pub fn differentiate(
    fragment: &Fragment,
    seeds: &[(NodeId, NodeId)],
    wrt: &[NodeId],
) -> Result<Fragment, GradientError> {
    let graph = Graph::from_fragment(fragment);
    let count = fragment.nodes.len();
    let mut depends = vec![false; count];
    for &id in wrt {
        depends[id as usize] = true;
    }
    for (id, node) in fragment.nodes.iter().enumerate() {
        let through = !matches!(node.op, Op::Detach | Op::Compare(_) | Op::Cast);
        depends[id] |= through && node.inputs.iter().any(|&i| depends[i as usize]);
    }
    let mut grads: Vec<Option<Tensor>> = vec![None; count];
    for &(output, seed) in seeds {
        accumulate(&mut grads[output as usize], graph.tensor(seed));
    }
    for id in (0..count).rev() {
        let node = &fragment.nodes[id];
        let Some(grad) = grads[id] else { continue };
        if !depends[id] || node.inputs.is_empty() {
            continue;
        }
        let inputs: Vec<Tensor> = node.inputs.iter().map(|&i| graph.tensor(i)).collect();
        let wanted: Vec<bool> = node.inputs.iter().map(|&i| depends[i as usize]).collect();
        let parts = rule(&node.op, &inputs, graph.tensor(id as NodeId), grad, &wanted)?;
        for ((&input, part), wanted) in node.inputs.iter().zip(parts).zip(wanted) {
            if let (Some(part), true) = (part, wanted) {
                accumulate(&mut grads[input as usize], part);
            }
        }
    }
    for (index, &id) in wrt.iter().enumerate() {
        let shape = graph.tensor(id).shape();
        let grad = grads[id as usize].unwrap_or_else(|| graph.full(&shape, 0.0));
        graph.output(&format!("grad.{index}"), grad);
    }
    Ok(graph.finish()?)
}

fn accumulate<'g>(slot: &mut Option<Tensor<'g>>, part: Tensor<'g>) {
    *slot = Some(match *slot {
        Some(sum) => sum + part,
        None => part,
    });
}
