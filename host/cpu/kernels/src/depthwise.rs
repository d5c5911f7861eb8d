//! Convolution with one channel per group: no matrix to multiply, so it runs along the channels of each pixel.

use crate::blocked::SLOT_CALLER;
use crate::conv::ConvShape;
use crate::threads::{SharedMut, ThreadPool};

/// Parts into which the weight gradient's sum over rows is cut, whatever the number of threads.
const PARTS: usize = 32;

/// The weight as `[tap][channel]`.
fn by_tap(shape: &ConvShape, weight: &[f32], out: &mut [f32]) {
    let taps = shape.taps();
    for (channel, values) in weight.chunks_exact(taps).enumerate() {
        for (tap, value) in values.iter().enumerate() {
            out[tap * shape.in_c + channel] = *value;
        }
    }
}

/// The input position of a tap, if it is inside.
fn input_at(output: usize, tap: usize, stride: usize, padding: usize, dilation: usize, size: usize) -> Option<usize> {
    (output * stride + tap * dilation).checked_sub(padding).filter(|&at| at < size)
}

/// The output position whose window has input `input` at `tap`, if there is one.
fn output_at(input: usize, tap: usize, stride: usize, padding: usize, dilation: usize, size: usize) -> Option<usize> {
    let at = (input + padding).checked_sub(tap * dilation)?;
    (at.is_multiple_of(stride) && at / stride < size).then_some(at / stride)
}

fn add_product(out: &mut [f32], a: &[f32], b: &[f32]) {
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out += a * b;
    }
}

/// See [`crate::conv2d_forward`]; the sizes are checked there.
pub(crate) fn forward(
    pool: &ThreadPool,
    shape: &ConvShape,
    input: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    output: &mut [f32],
    accumulate: bool,
) {
    let s = *shape;
    let mut weights = pool.shared_scratch(SLOT_CALLER, weight.len());
    by_tap(shape, weight, &mut weights);
    let (weights, output) = (&weights[..], SharedMut::new(output));
    pool.run(s.batch * s.out_h, &|row, _| {
        // SAFETY: each task has its own row of the output.
        let out = unsafe { output.slice(row * s.out_w * s.out_c, s.out_w * s.out_c) };
        let (image, y) = (row / s.out_h, row % s.out_h);
        for (x, out) in out.chunks_exact_mut(s.out_c).enumerate() {
            match (accumulate, bias) {
                (true, Some(bias)) => out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias),
                (true, None) => {}
                (false, Some(bias)) => out.copy_from_slice(bias),
                (false, None) => out.fill(0.0),
            }
            for tap in 0..s.taps() {
                let (tap_y, tap_x) = (tap / s.kernel.1, tap % s.kernel.1);
                let at_y = input_at(y, tap_y, s.stride.0, s.padding.0, s.dilation.0, s.in_h);
                let at_x = input_at(x, tap_x, s.stride.1, s.padding.1, s.dilation.1, s.in_w);
                if let (Some(at_y), Some(at_x)) = (at_y, at_x) {
                    let start = ((image * s.in_h + at_y) * s.in_w + at_x) * s.in_c;
                    add_product(out, &input[start..start + s.in_c], &weights[tap * s.in_c..][..s.in_c]);
                }
            }
        }
    });
}

/// See [`crate::conv2d_input_grad`]; the sizes are checked there.
pub(crate) fn input_grad(
    pool: &ThreadPool,
    shape: &ConvShape,
    output_grad: &[f32],
    weight: &[f32],
    input_grad: &mut [f32],
    accumulate: bool,
) {
    let s = *shape;
    let mut weights = pool.shared_scratch(SLOT_CALLER, weight.len());
    by_tap(shape, weight, &mut weights);
    let (weights, input_grad) = (&weights[..], SharedMut::new(input_grad));
    pool.run(s.batch * s.in_h, &|row, _| {
        // SAFETY: each task has its own row of the input.
        let grad = unsafe { input_grad.slice(row * s.in_w * s.in_c, s.in_w * s.in_c) };
        let (image, y) = (row / s.in_h, row % s.in_h);
        for (x, grad) in grad.chunks_exact_mut(s.in_c).enumerate() {
            if !accumulate {
                grad.fill(0.0);
            }
            for tap in 0..s.taps() {
                let (tap_y, tap_x) = (tap / s.kernel.1, tap % s.kernel.1);
                let at_y = output_at(y, tap_y, s.stride.0, s.padding.0, s.dilation.0, s.out_h);
                let at_x = output_at(x, tap_x, s.stride.1, s.padding.1, s.dilation.1, s.out_w);
                if let (Some(at_y), Some(at_x)) = (at_y, at_x) {
                    let start = ((image * s.out_h + at_y) * s.out_w + at_x) * s.out_c;
                    add_product(grad, &output_grad[start..start + s.out_c], &weights[tap * s.in_c..][..s.in_c]);
                }
            }
        }
    });
}

/// See [`crate::conv2d_weight_grad`]; the sizes are checked there.
pub(crate) fn weight_grad(
    pool: &ThreadPool,
    shape: &ConvShape,
    input: &[f32],
    output_grad: &[f32],
    weight_grad: &mut [f32],
    accumulate: bool,
) {
    let s = *shape;
    let size = weight_grad.len();
    let rows = s.batch * s.out_h;
    let parts = PARTS.min(rows).max(1);
    let mut sums = pool.shared_scratch(SLOT_CALLER, parts * size);
    let shared = SharedMut::new(&mut sums);
    pool.run(parts, &|part, _| {
        // SAFETY: each task has its own partial sums.
        let sums = unsafe { shared.slice(part * size, size) };
        sums.fill(0.0);
        for row in rows * part / parts..rows * (part + 1) / parts {
            let (image, y) = (row / s.out_h, row % s.out_h);
            for x in 0..s.out_w {
                let grad = &output_grad[(row * s.out_w + x) * s.out_c..][..s.out_c];
                for (tap, sums) in sums.chunks_exact_mut(s.in_c).enumerate() {
                    let (tap_y, tap_x) = (tap / s.kernel.1, tap % s.kernel.1);
                    let at_y = input_at(y, tap_y, s.stride.0, s.padding.0, s.dilation.0, s.in_h);
                    let at_x = input_at(x, tap_x, s.stride.1, s.padding.1, s.dilation.1, s.in_w);
                    if let (Some(at_y), Some(at_x)) = (at_y, at_x) {
                        let start = ((image * s.in_h + at_y) * s.in_w + at_x) * s.in_c;
                        add_product(sums, grad, &input[start..start + s.in_c]);
                    }
                }
            }
        }
    });
    for (channel, out) in weight_grad.chunks_exact_mut(s.taps()).enumerate() {
        for (tap, out) in out.iter_mut().enumerate() {
            let values = sums[tap * s.in_c + channel..].iter().step_by(size);
            let sum: f32 = values.take(parts).sum();
            *out = if accumulate { *out + sum } else { sum };
        }
    }
}
