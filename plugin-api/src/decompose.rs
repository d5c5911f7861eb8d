//! Composite ops written out in primitive ones: the definition that every backend's own kernel must agree with.

use crate::graph::Tensor;
use crate::ir::Op;

/// The value of a composite op over `inputs`; `None` if the op is a primitive.
pub fn decompose<'g>(op: &Op, inputs: &[Tensor<'g>]) -> Option<Tensor<'g>> {
    let x = *inputs.first()?;
    Some(match op {
        Op::Softmax => {
            let e = (x - x.max(&[-1], true)).exp();
            e / e.sum(&[-1], true)
        }
        Op::LogSoftmax => {
            let shifted = x - x.max(&[-1], true);
            shifted - shifted.exp().sum(&[-1], true).ln()
        }
        Op::LayerNorm { eps } => {
            let (gain, bias) = (inputs[1], inputs[2]);
            let centred = x - x.mean(&[-1], true);
            let rstd = (centred.square().mean(&[-1], true) + *eps).sqrt().recip();
            centred * rstd * gain + bias
        }
        Op::BatchNorm { eps, axis } => {
            let (normalised, _) = batch_normalise(x, *eps, *axis);
            normalised * channel(inputs[1], x, *axis) + channel(inputs[2], x, *axis)
        }
        Op::Gelu => x * ((x * std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5,
        Op::L2Normalize { eps } => x / x.square().sum(&[-1], true).sqrt().maximum(*eps),
        Op::Moments => {
            let leading: Vec<isize> = (0..x.rank() as isize - 1).collect();
            let mean = x.mean(&leading, true);
            let variance = (x - mean).square().mean(&leading, true);
            let row = [1, x.size(-1)];
            Tensor::concat(&[mean.reshape(&row), variance.reshape(&row)], 0)?
        }
        _ => return None,
    })
}

/// The axes over which batch norm averages.
pub(crate) fn batch_axes(rank: usize, axis: usize) -> Vec<isize> {
    (0..rank).filter(|&d| d != axis).map(|d| d as isize).collect()
}

/// (x − mean) / std and 1 / std, with the batch's population statistics.
pub(crate) fn batch_normalise<'g>(x: Tensor<'g>, eps: f64, axis: usize) -> (Tensor<'g>, Tensor<'g>) {
    let axes = batch_axes(x.rank(), axis);
    let centred = x - x.mean(&axes, true);
    let rstd = (centred.square().mean(&axes, true) + eps).sqrt().recip();
    (centred * rstd, rstd)
}

/// A per-channel vector, shaped to broadcast against `x`.
pub(crate) fn channel<'g>(vector: Tensor<'g>, x: Tensor<'g>, axis: usize) -> Tensor<'g> {
    let mut shape = vec![1; x.rank()];
    if let Some(size) = shape.get_mut(axis) {
        *size = vector.size(0);
    }
    vector.reshape(&shape)
}
