//! Max and average pooling over NHWC activations.

use crate::conv::ConvShape;
use crate::convert::{convert, through_f32, widened};
use crate::elements::{Element, Elements, ElementsMut};
use crate::isa::per_isa;
use crate::threads::{SharedMut, ThreadPool};

/// The sizes of a pooling. Pairs are (height, width).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool2dShape {
    /// Images.
    pub batch: usize,
    /// Rows of the input.
    pub in_h: usize,
    /// Columns of the input.
    pub in_w: usize,
    /// Rows of the output.
    pub out_h: usize,
    /// Columns of the output.
    pub out_w: usize,
    /// Channels.
    pub channels: usize,
    /// Size of the window.
    pub kernel: (usize, usize),
    /// Distance of two windows.
    pub stride: (usize, usize),
    /// Padding on each side; at most half the window.
    pub padding: (usize, usize),
}

impl Pool2dShape {
    /// The output size along one axis, rounded down: `(input + 2 padding - kernel) / stride + 1`.
    pub fn output_size(input: usize, kernel: usize, stride: usize, padding: usize) -> usize {
        ConvShape::output_size(input, kernel, stride, padding, 1)
    }

    /// Elements of the input.
    pub fn input_len(&self) -> usize {
        self.batch * self.in_h * self.in_w * self.channels
    }

    /// Elements of the output.
    pub fn output_len(&self) -> usize {
        self.batch * self.out_h * self.out_w * self.channels
    }

    /// The caller's invariants; see the crate's notes on shapes.
    fn check(&self, input: usize, output: usize) {
        let Self { kernel, stride, padding, .. } = *self;
        assert!(
            kernel.0.min(kernel.1).min(stride.0).min(stride.1) > 0
                && padding.0 <= kernel.0 / 2
                && padding.1 <= kernel.1 / 2,
            "pool2d: kernel and stride must be positive, padding at most half the kernel: {self:?}"
        );
        let size = (
            Self::output_size(self.in_h, kernel.0, stride.0, padding.0),
            Self::output_size(self.in_w, kernel.1, stride.1, padding.1),
        );
        assert!((self.out_h, self.out_w) == size, "pool2d: expected an output of {size:?}: {self:?}");
        let (has, needs) = ((input, output), (self.input_len(), self.output_len()));
        assert!(has == needs, "pool2d: input and output have {has:?} elements, expected {needs:?}");
    }

    /// The part of the window at `output` that is inside the input, along one axis.
    fn window(output: usize, kernel: usize, stride: usize, padding: usize, input: usize) -> (usize, usize) {
        let start = output * stride;
        (start.saturating_sub(padding), (start + kernel).saturating_sub(padding).min(input))
    }

    fn rows(&self, output: usize) -> (usize, usize) {
        Self::window(output, self.kernel.0, self.stride.0, self.padding.0, self.in_h)
    }

    fn cols(&self, output: usize) -> (usize, usize) {
        Self::window(output, self.kernel.1, self.stride.1, self.padding.1, self.in_w)
    }

    /// The outputs whose windows have an input, along one axis.
    fn windows_of(input: usize, kernel: usize, stride: usize, padding: usize, outputs: usize) -> (usize, usize) {
        let at = input + padding;
        ((at + 1).saturating_sub(kernel).div_ceil(stride), (at / stride + 1).min(outputs))
    }

    /// The number that an average divides by.
    fn divisor(&self, rows: (usize, usize), cols: (usize, usize), y: usize, x: usize, count_padding: bool) -> f32 {
        // PyTorch counts the padding, but not what a window has beyond it.
        let span = |output: usize, kernel: usize, stride: usize, padding: usize, input: usize| {
            (output * stride + kernel).min(input + 2 * padding) - output * stride
        };
        if count_padding {
            let height = span(y, self.kernel.0, self.stride.0, self.padding.0, self.in_h);
            (height * span(x, self.kernel.1, self.stride.1, self.padding.1, self.in_w)) as f32
        } else {
            ((rows.1 - rows.0) * (cols.1 - cols.0)) as f32
        }
    }
}

/// `output = max over the window`; padding counts as minus infinity. NaN wins, as in PyTorch.
///
/// # Panics
/// If the shape contradicts itself or a slice's length: the caller's invariant, checked once.
pub fn max_pool2d_forward(pool: &ThreadPool, shape: &Pool2dShape, input: Elements, output: ElementsMut) {
    match (input, output) {
        (Elements::F32(input), ElementsMut::F32(output)) => max_forward(pool, shape, input, output),
        (Elements::Bf16(input), ElementsMut::Bf16(output)) => max_forward(pool, shape, input, output),
        (input, output) => {
            let input = widened(pool, 3, input);
            through_f32(pool, 4, output, false, |output| max_forward(pool, shape, input.as_slice(), output));
        }
    }
}

fn max_forward<T: Element>(pool: &ThreadPool, shape: &Pool2dShape, input: &[T], output: &mut [T]) {
    shape.check(input.len(), output.len());
    let (s, c) = (*shape, shape.channels);
    let output = SharedMut::new(output);
    pool.run(s.batch * s.out_h, &|row, _| {
        // SAFETY: each task has its own row of the output.
        max_row(pool.isa(), &s, input, row, unsafe { output.slice(row * s.out_w * c, s.out_w * c) });
    });
}

per_isa! {
/// The maxima of a row of windows.
fn max_row<T: Element>(s: &Pool2dShape, input: &[T], row: usize, out: &mut [T]) {
    if s.channels.is_multiple_of(16) {
        max_windows::<T, 16>(s, input, row, out);
    } else if s.channels.is_multiple_of(8) {
        max_windows::<T, 8>(s, input, row, out);
    } else {
        max_windows::<T, 1>(s, input, row, out);
    }
}
}

/// The maxima of a row of windows, for some channels at a time, which stay in registers.
#[inline(always)]
fn max_windows<T: Element, const LANES: usize>(s: &Pool2dShape, input: &[T], row: usize, out: &mut [T]) {
    let c = s.channels;
    let (image, (y0, y1)) = (row / s.out_h, s.rows(row % s.out_h));
    for (x, out) in out.chunks_exact_mut(c.max(1)).enumerate() {
        let (x0, x1) = s.cols(x);
        for (first, out) in (0..c).step_by(LANES).zip(out.chunks_exact_mut(LANES)) {
            let mut best = [f32::NEG_INFINITY; LANES];
            for y in y0..y1 {
                for x in x0..x1 {
                    let at = ((image * s.in_h + y) * s.in_w + x) * c + first;
                    for (best, value) in best.iter_mut().zip(&input[at..at + LANES]) {
                        let value = value.widen();
                        *best = if wins(value, *best) { value } else { *best };
                    }
                }
            }
            out.iter_mut().zip(best).for_each(|(out, best)| *out = T::narrow(best));
        }
    }
}

/// Whether a value replaces the maximum so far: equal ones do not, NaN does,
/// and stays.
#[inline(always)]
fn wins(value: f32, best: f32) -> bool {
    value > best || value.is_nan()
}

/// The gradient of [`max_pool2d_forward`]: each window's gradient goes to its first maximum, row by row.
///
/// # Panics
/// As [`max_pool2d_forward`].
pub fn max_pool2d_backward(
    pool: &ThreadPool,
    shape: &Pool2dShape,
    input: Elements,
    output_grad: Elements,
    input_grad: ElementsMut,
) {
    match (input, output_grad, input_grad) {
        (Elements::F32(x), Elements::F32(g), ElementsMut::F32(out)) => max_backward(pool, shape, x, g, out),
        (Elements::Bf16(x), Elements::Bf16(g), ElementsMut::Bf16(out)) => max_backward(pool, shape, x, g, out),
        (x, g, out) => {
            let (x, g) = (widened(pool, 3, x), widened(pool, 4, g));
            through_f32(pool, 5, out, false, |out| max_backward(pool, shape, x.as_slice(), g.as_slice(), out));
        }
    }
}

fn max_backward<T: Element>(
    pool: &ThreadPool,
    shape: &Pool2dShape,
    input: &[T],
    output_grad: &[T],
    input_grad: &mut [T],
) {
    shape.check(input.len(), output_grad.len());
    assert!(input_grad.len() == input.len(), "pool2d: the input's gradient has {} elements", input_grad.len());
    let (s, c) = (*shape, shape.channels);
    let grad = SharedMut::new(input_grad);
    // Windows of an image overlap; bands of input rows do not. A band looks at all windows that reach into it.
    let bands = s.in_h.div_ceil(BAND);
    // Gradients of another type than f32 are summed in scratch memory and rounded once.
    let sums = if T::as_f32_mut(&mut []).is_some() { 0 } else { BAND.min(s.in_h) * s.in_w * c };
    pool.reserve_scratch(sums);
    pool.run(s.batch * bands, &|task, worker| {
        let (image, top) = (task / bands, task % bands * BAND);
        let rows = s.in_h.min(top + BAND) - top;
        // SAFETY: each task has its own rows of the gradient.
        let grad = unsafe { grad.slice((image * s.in_h + top) * s.in_w * c, rows * s.in_w * c) };
        match T::as_f32_mut(grad) {
            Some(grad) => max_band(pool.isa(), &s, input, output_grad, image, top, grad),
            None => {
                let mut scratch = pool.scratch(worker, sums);
                let sums = &mut scratch[..grad.len()];
                max_band(pool.isa(), &s, input, output_grad, image, top, sums);
                convert(pool.isa(), sums, grad);
            }
        }
    });
}

/// Input rows of a task of the backward pass.
const BAND: usize = 16;

per_isa! {
/// The gradient of the input rows from `top` on.
fn max_band<T: Element>(
    s: &Pool2dShape,
    input: &[T],
    output_grad: &[T],
    image: usize,
    top: usize,
    grad: &mut [f32],
) {
    if s.channels.is_multiple_of(16) {
        max_band_of::<T, 16>(s, input, output_grad, image, top, grad);
    } else if s.channels.is_multiple_of(8) {
        max_band_of::<T, 8>(s, input, output_grad, image, top, grad);
    } else {
        max_band_of::<T, 1>(s, input, output_grad, image, top, grad);
    }
}
}

/// The gradient of the input rows from `top` on, for some channels at a time.
#[inline(always)]
fn max_band_of<T: Element, const LANES: usize>(
    s: &Pool2dShape,
    input: &[T],
    output_grad: &[T],
    image: usize,
    top: usize,
    grad: &mut [f32],
) {
    let c = s.channels;
    grad.fill(0.0);
    if grad.is_empty() {
        return;
    }
    let bottom = top + grad.len() / (s.in_w * c);
    let first = Pool2dShape::windows_of(top, s.kernel.0, s.stride.0, s.padding.0, s.out_h).0;
    let last = Pool2dShape::windows_of(bottom - 1, s.kernel.0, s.stride.0, s.padding.0, s.out_h).1;
    for y in first..last {
        let (y0, y1) = s.rows(y);
        for x in 0..s.out_w {
            let (x0, x1) = s.cols(x);
            let incoming = &output_grad[((image * s.out_h + y) * s.out_w + x) * c..][..c];
            for (channel, incoming) in (0..c).step_by(LANES).zip(incoming.chunks_exact(LANES)) {
                let start = |y: usize, x: usize| ((image * s.in_h + y) * s.in_w + x) * c + channel;
                let mut best = [f32::NEG_INFINITY; LANES];
                for y in y0..y1 {
                    for x in x0..x1 {
                        for (best, value) in best.iter_mut().zip(&input[start(y, x)..][..LANES]) {
                            let value = value.widen();
                            *best = if wins(value, *best) { value } else { *best };
                        }
                    }
                }
                // The first value that is the maximum takes what there is; that of a NaN goes to the last NaN.
                let mut left = [0.0; LANES];
                left.iter_mut().zip(incoming).for_each(|(left, incoming)| *left = incoming.widen());
                let mut elsewhere = [0.0; LANES];
                for y in y0..y1 {
                    for x in x0..x1 {
                        let values = &input[start(y, x)..][..LANES];
                        let grad = match y >= top && y < bottom {
                            true => &mut grad[((y - top) * s.in_w + x) * c + channel..][..LANES],
                            false => &mut elsewhere[..],
                        };
                        for lane in 0..LANES {
                            let share = if values[lane].widen() == best[lane] { left[lane] } else { 0.0 };
                            grad[lane] += share;
                            left[lane] -= share;
                        }
                    }
                }
                for lane in (0..LANES).filter(|&lane| best[lane].is_nan()) {
                    let taps = (y0..y1).flat_map(|y| (x0..x1).map(move |x| (y, x)));
                    let last = taps.filter(|&(y, x)| input[start(y, x) + lane].widen().is_nan()).last();
                    if let Some((y, x)) = last.filter(|&(y, _)| y >= top && y < bottom) {
                        grad[((y - top) * s.in_w + x) * c + channel + lane] += incoming[lane].widen();
                    }
                }
            }
        }
    }
}

/// `output = sum over the window / its size`; with `count_include_pad` the size counts padding, as PyTorch's default.
///
/// # Panics
/// As [`max_pool2d_forward`].
pub fn avg_pool2d_forward(
    pool: &ThreadPool,
    shape: &Pool2dShape,
    input: Elements,
    output: ElementsMut,
    count_include_pad: bool,
) {
    let input = widened(pool, 3, input);
    through_f32(pool, 4, output, false, |output| {
        avg_forward(pool, shape, input.as_slice(), output, count_include_pad);
    });
}

fn avg_forward(pool: &ThreadPool, shape: &Pool2dShape, input: &[f32], output: &mut [f32], count_include_pad: bool) {
    shape.check(input.len(), output.len());
    let (s, c) = (*shape, shape.channels);
    let output = SharedMut::new(output);
    pool.run(s.batch * s.out_h, &|row, _| {
        // SAFETY: each task has its own row of the output.
        let out = unsafe { output.slice(row * s.out_w * c, s.out_w * c) };
        let (image, y) = (row / s.out_h, row % s.out_h);
        let rows = s.rows(y);
        for (x, out) in out.chunks_exact_mut(c.max(1)).enumerate() {
            let cols = s.cols(x);
            out.fill(0.0);
            for y in rows.0..rows.1 {
                for x in cols.0..cols.1 {
                    let values = &input[((image * s.in_h + y) * s.in_w + x) * c..][..c];
                    out.iter_mut().zip(values).for_each(|(out, value)| *out += value);
                }
            }
            let divisor = s.divisor(rows, cols, y, x, count_include_pad);
            out.iter_mut().for_each(|out| *out /= divisor);
        }
    });
}

/// The gradient of [`avg_pool2d_forward`]: each input gathers from the windows that hold it, in ascending order.
///
/// # Panics
/// As [`max_pool2d_forward`].
pub fn avg_pool2d_backward(
    pool: &ThreadPool,
    shape: &Pool2dShape,
    output_grad: Elements,
    input_grad: ElementsMut,
    count_include_pad: bool,
) {
    let output_grad = widened(pool, 3, output_grad);
    through_f32(pool, 4, input_grad, false, |input_grad| {
        avg_backward(pool, shape, output_grad.as_slice(), input_grad, count_include_pad);
    });
}

fn avg_backward(
    pool: &ThreadPool,
    shape: &Pool2dShape,
    output_grad: &[f32],
    input_grad: &mut [f32],
    count_include_pad: bool,
) {
    shape.check(input_grad.len(), output_grad.len());
    let (s, c) = (*shape, shape.channels);
    let grad = SharedMut::new(input_grad);
    pool.run(s.batch * s.in_h, &|row, _| {
        // SAFETY: each task has its own row of the gradient.
        let grad = unsafe { grad.slice(row * s.in_w * c, s.in_w * c) };
        let (image, y) = (row / s.in_h, row % s.in_h);
        let (y0, y1) = Pool2dShape::windows_of(y, s.kernel.0, s.stride.0, s.padding.0, s.out_h);
        for (x, grad) in grad.chunks_exact_mut(c.max(1)).enumerate() {
            let (x0, x1) = Pool2dShape::windows_of(x, s.kernel.1, s.stride.1, s.padding.1, s.out_w);
            grad.fill(0.0);
            for y in y0..y1 {
                for x in x0..x1 {
                    let factor = 1.0 / s.divisor(s.rows(y), s.cols(x), y, x, count_include_pad);
                    let incoming = &output_grad[((image * s.out_h + y) * s.out_w + x) * c..][..c];
                    grad.iter_mut().zip(incoming).for_each(|(grad, incoming)| *grad += incoming * factor);
                }
            }
        }
    });
}
