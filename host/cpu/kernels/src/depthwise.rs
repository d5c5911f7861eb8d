//! Convolution with one channel per group: no matrix to multiply, so it runs along the channels of each pixel.

use crate::blocked::SLOT_CALLER;
use crate::conv::ConvShape;
use crate::isa::per_isa;
use crate::threads::{SharedMut, ThreadPool};

/// Parts into which the weight gradient's sum over rows is cut, whatever the number of threads.
const PARTS: usize = 32;
/// Channels whose sums are held in registers at a time.
const LANES: usize = 32;

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
#[inline(always)]
fn input_at(output: usize, tap: usize, stride: usize, padding: usize, dilation: usize, size: usize) -> Option<usize> {
    (output * stride + tap * dilation).checked_sub(padding).filter(|&at| at < size)
}

/// The output position whose window has input `input` at `tap`, if there is one.
#[inline(always)]
fn output_at(input: usize, tap: usize, stride: usize, padding: usize, dilation: usize, size: usize) -> Option<usize> {
    let at = (input + padding).checked_sub(tap * dilation)?;
    (at.is_multiple_of(stride) && at / stride < size).then_some(at / stride)
}

/// `sums += a * b`; with `FULL` the length is known to the compiler and the sums stay in registers.
#[inline(always)]
fn add_product<const FULL: bool>(sums: &mut [f32; LANES], a: &[f32], b: &[f32]) {
    if FULL {
        if let (Some(a), Some(b)) = (a.first_chunk::<LANES>(), b.first_chunk::<LANES>()) {
            for lane in 0..LANES {
                sums[lane] += a[lane] * b[lane];
            }
        }
    } else {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
}

/// What a pixel gathers from: the input's rows for the output, or (`transposed`) the output's for the input's gradient.
struct Gather<'a> {
    shape: &'a ConvShape,
    transposed: bool,
    source: &'a [f32],
    /// As `[tap][channel]`.
    weights: &'a [f32],
    bias: Option<&'a [f32]>,
    accumulate: bool,
}

impl Gather<'_> {
    #[inline(always)]
    fn at(
        &self,
        pixel: usize,
        tap: usize,
        stride: usize,
        padding: usize,
        dilation: usize,
        size: usize,
    ) -> Option<usize> {
        if self.transposed {
            output_at(pixel, tap, stride, padding, dilation, size)
        } else {
            input_at(pixel, tap, stride, padding, dilation, size)
        }
    }

    /// The sums of a pixel over the taps, for `lanes` channels.
    #[inline(always)]
    fn sums<const FULL: bool>(
        &self,
        (image, y, x): (usize, usize, usize),
        (source_h, source_w): (usize, usize),
        channel: usize,
        lanes: usize,
    ) -> [f32; LANES] {
        let s = self.shape;
        let mut sums = [0f32; LANES];
        for tap_y in 0..s.kernel.0 {
            let Some(at_y) = self.at(y, tap_y, s.stride.0, s.padding.0, s.dilation.0, source_h) else { continue };
            for tap_x in 0..s.kernel.1 {
                let Some(at_x) = self.at(x, tap_x, s.stride.1, s.padding.1, s.dilation.1, source_w) else { continue };
                let start = ((image * source_h + at_y) * source_w + at_x) * s.in_c + channel;
                let weight = (tap_y * s.kernel.1 + tap_x) * s.in_c + channel;
                let (source, weights) = (&self.source[start..start + lanes], &self.weights[weight..weight + lanes]);
                add_product::<FULL>(&mut sums, source, weights);
            }
        }
        sums
    }

    #[inline(always)]
    fn row(&self, row: usize, out: &mut [f32]) {
        let (s, c) = (self.shape, self.shape.in_c);
        let (rows, source_size) =
            if self.transposed { (s.in_h, (s.out_h, s.out_w)) } else { (s.out_h, (s.in_h, s.in_w)) };
        for (x, out) in out.chunks_exact_mut(c).enumerate() {
            let pixel = (row / rows, row % rows, x);
            for channel in (0..c).step_by(LANES) {
                let lanes = LANES.min(c - channel);
                let sums = if lanes == LANES {
                    self.sums::<true>(pixel, source_size, channel, LANES)
                } else {
                    self.sums::<false>(pixel, source_size, channel, lanes)
                };
                let out = &mut out[channel..channel + lanes];
                if self.accumulate {
                    out.iter_mut().zip(&sums).for_each(|(out, sum)| *out += sum);
                } else {
                    out.copy_from_slice(&sums[..lanes]);
                }
                if let Some(bias) = self.bias {
                    out.iter_mut().zip(&bias[channel..]).for_each(|(out, bias)| *out += bias);
                }
            }
        }
    }
}

per_isa! {
/// A row of the output from the input.
fn forward_row(gather: &Gather, row: usize, out: &mut [f32]) {
    Gather { transposed: false, ..*gather }.row(row, out)
}
}

per_isa! {
/// A row of the input's gradient from the output's.
fn backward_row(gather: &Gather, row: usize, out: &mut [f32]) {
    Gather { transposed: true, ..*gather }.row(row, out)
}
}

/// One channel block's products of a row of gradients with the input, summed along the row.
#[inline(always)]
fn weight_run<const FULL: bool>(
    s: &ConvShape,
    input: &[f32],
    grad: &[f32],
    tap_x: usize,
    channel: usize,
    lanes: usize,
) -> [f32; LANES] {
    let mut run = [0f32; LANES];
    for x in 0..s.out_w {
        let at_x = input_at(x, tap_x, s.stride.1, s.padding.1, s.dilation.1, s.in_w);
        let Some(at_x) = at_x else { continue };
        let (start, grad_start) = (at_x * s.in_c + channel, x * s.in_c + channel);
        add_product::<FULL>(&mut run, &grad[grad_start..grad_start + lanes], &input[start..start + lanes]);
    }
    run
}

per_isa! {
/// The weight's gradient, as `[tap][channel]`, from the output rows in `rows`; a sum runs along a row in registers.
fn weight_part(
    s: &ConvShape,
    input: &[f32],
    output_grad: &[f32],
    rows: std::ops::Range<usize>,
    sums: &mut [f32],
) {
    let c = s.in_c;
    for row in rows {
        let (image, y) = (row / s.out_h, row % s.out_h);
        let grad = &output_grad[row * s.out_w * c..][..s.out_w * c];
        for (tap, sums) in sums.chunks_exact_mut(c).enumerate() {
            let (tap_y, tap_x) = (tap / s.kernel.1, tap % s.kernel.1);
            let at_y = input_at(y, tap_y, s.stride.0, s.padding.0, s.dilation.0, s.in_h);
            let Some(at_y) = at_y else { continue };
            let input = &input[(image * s.in_h + at_y) * s.in_w * c..][..s.in_w * c];
            for channel in (0..c).step_by(LANES) {
                let lanes = LANES.min(c - channel);
                let run = if lanes == LANES {
                    weight_run::<true>(s, input, grad, tap_x, channel, LANES)
                } else {
                    weight_run::<false>(s, input, grad, tap_x, channel, lanes)
                };
                sums[channel..channel + lanes].iter_mut().zip(&run).for_each(|(sum, run)| *sum += run);
            }
        }
    }
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
    let mut weights = pool.shared_scratch(SLOT_CALLER, weight.len());
    by_tap(shape, weight, &mut weights);
    let (weights, output) = (&weights[..], SharedMut::new(output));
    let len = shape.out_w * shape.out_c;
    pool.run(shape.batch * shape.out_h, &|row, _| {
        // SAFETY: each task has its own row of the output.
        let out = unsafe { output.slice(row * len, len) };
        let gather = Gather { shape, transposed: false, source: input, weights, bias, accumulate };
        forward_row(pool.isa(), &gather, row, out);
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
    let mut weights = pool.shared_scratch(SLOT_CALLER, weight.len());
    by_tap(shape, weight, &mut weights);
    let (weights, input_grad) = (&weights[..], SharedMut::new(input_grad));
    let len = shape.in_w * shape.in_c;
    pool.run(shape.batch * shape.in_h, &|row, _| {
        // SAFETY: each task has its own row of the input.
        let grad = unsafe { input_grad.slice(row * len, len) };
        let gather = Gather { shape, transposed: true, source: output_grad, weights, bias: None, accumulate };
        backward_row(pool.isa(), &gather, row, grad);
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
        let rows = rows * part / parts..rows * (part + 1) / parts;
        weight_part(pool.isa(), &s, input, output_grad, rows, sums);
    });
    for (channel, out) in weight_grad.chunks_exact_mut(s.taps()).enumerate() {
        for (tap, out) in out.iter_mut().enumerate() {
            let values = sums[tap * s.in_c + channel..].iter().step_by(size);
            let sum: f32 = values.take(parts).sum();
            *out = if accumulate { *out + sum } else { sum };
        }
    }
}
