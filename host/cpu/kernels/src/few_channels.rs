//! Convolutions over images of few channels, as the first one of a network: a row of taps is a short run of memory.
//!
//! With the padding written out, no window has an edge, and both products read the image in place: the forward one
//! broadcasts from rows of taps, the weight's gradient from the same tap of pixels that follow each other.

use crate::blocked::{Panels, SLOT_CALLER, Strided};
use crate::conv::{ConvShape, SLOT_INPUT, SLOT_RESULT};
use crate::convert::{Widened, convert, rounded};
use crate::elements::{Element, Elements, bf16};
use crate::microkernel::{Lines, MAX_MR, MicroKernels, SLACK, Source, Starts, Tile, micro_kernels};
use crate::threads::{SharedMut, ThreadPool};

/// Longest row of taps that is treated as one run.
const WIDE: usize = 64;
/// Elements of the padded image that one task writes, about.
const TASK: usize = 16 * 1024;
/// Pixels of the output whose gradients are packed together.
const BLOCK: usize = 1024;
/// Rows of the output in a block at most.
const BLOCK_ROWS: usize = 64;
/// Parts that the weight's gradient is summed in at most.
const PARTS: usize = 64;
/// Pixels of the output in a part at least.
const PART: usize = 2048;

/// Whether a convolution is treated here.
pub(crate) fn applies(shape: &ConvShape) -> bool {
    shape.groups == 1 && shape.dilation.1 == 1 && shape.kernel.1 > 1 && shape.kernel.1 * shape.in_c <= WIDE
}

/// The input in f32 with its padding, rounded to bf16 if `half`, and the shape of the same convolution without padding.
pub(crate) fn padded<'a>(
    pool: &'a ThreadPool,
    shape: &ConvShape,
    input: Elements<'a>,
    half: bool,
) -> (Widened<'a>, ConvShape) {
    let (pad_y, pad_x) = shape.padding;
    let (in_h, in_w) = (shape.in_h + 2 * pad_y, shape.in_w + 2 * pad_x);
    let unpadded = ConvShape { in_h, in_w, padding: (0, 0), ..*shape };
    if let (Elements::F32(values), false, (0, 0)) = (input, half, shape.padding) {
        return (Widened::Borrowed(values), unpadded);
    }
    let mut image = pool.shared_scratch(SLOT_INPUT, unpadded.input_len());
    let (row, image_row) = (in_w * shape.in_c, shape.in_w * shape.in_c);
    let (rows, rows_per_task) = (shape.batch * in_h, (TASK / row).max(1));
    let out = SharedMut::new(&mut image);
    pool.run(rows.div_ceil(rows_per_task), &|task, _| {
        for at in task * rows_per_task..rows.min((task + 1) * rows_per_task) {
            // SAFETY: each task has its own rows.
            let out = unsafe { out.slice(at * row, row) };
            let (batch, y) = (at / in_h, (at % in_h).wrapping_sub(pad_y));
            if y >= shape.in_h {
                out.fill(0.0);
                continue;
            }
            let (left, rest) = out.split_at_mut(pad_x * shape.in_c);
            let (middle, right) = rest.split_at_mut(image_row);
            left.fill(0.0);
            right.fill(0.0);
            let start = (batch * shape.in_h + y) * image_row;
            match input {
                Elements::F32(values) if half => {
                    let values = &values[start..][..image_row];
                    middle.iter_mut().zip(values).for_each(|(out, value)| *out = bf16::narrow(*value).widen());
                }
                Elements::F32(values) => middle.copy_from_slice(&values[start..][..image_row]),
                Elements::Bf16(values) => convert(pool.isa(), &values[start..][..image_row], middle),
            }
        }
    });
    (Widened::Copied(image), unpadded)
}

/// The gradient of the weight: see [`conv2d_weight_grad`](crate::conv2d_weight_grad).
pub(crate) fn weight_grad(
    pool: &ThreadPool,
    shape: &ConvShape,
    input: Elements,
    output_grad: Elements,
    weight_grad: &mut [f32],
    accumulate: bool,
) {
    let half = input.is_bf16() || output_grad.is_bf16();
    let (image, shape) = padded(pool, shape, input, half);
    let image = image.as_slice();
    match output_grad {
        Elements::F32(_) => {
            let gradient = rounded(pool, SLOT_RESULT, output_grad, half);
            WeightGrad::new(pool, &shape, image, gradient.as_slice()).run(pool, weight_grad, accumulate);
        }
        Elements::Bf16(gradient) => {
            WeightGrad::new(pool, &shape, image, gradient).run(pool, weight_grad, accumulate);
        }
    }
}

/// The product of (row of taps, tap and channel) by (output channel), summed over the pixels of the output.
struct WeightGrad<'a, G> {
    kernels: &'static MicroKernels,
    /// Without padding.
    shape: &'a ConvShape,
    image: &'a [f32],
    gradient: &'a [G],
    /// Rows of the output of all images that are summed together, and of a block.
    part_rows: usize,
    block_rows: usize,
}

impl<'a, G: Source> WeightGrad<'a, G> {
    fn new(pool: &ThreadPool, shape: &'a ConvShape, image: &'a [f32], gradient: &'a [G]) -> Self {
        let rows = shape.batch * shape.out_h;
        let parts = (rows * shape.out_w / PART).clamp(1, PARTS);
        WeightGrad {
            kernels: micro_kernels(pool.isa(), false),
            shape,
            image,
            gradient,
            part_rows: rows.div_ceil(parts).max(1),
            block_rows: (BLOCK / shape.out_w.max(1)).clamp(1, BLOCK_ROWS),
        }
    }

    /// Length of a row of taps.
    fn run_len(&self) -> usize {
        self.shape.kernel.1 * self.shape.in_c
    }

    /// Columns of a part's sums: whole panels.
    fn columns(&self) -> usize {
        self.shape.out_c.next_multiple_of(self.kernels.nr)
    }

    fn run(&self, pool: &ThreadPool, weight_grad: &mut [f32], accumulate: bool) {
        let shape = self.shape;
        let rows = shape.batch * shape.out_h;
        let parts = rows.div_ceil(self.part_rows);
        let (lines, columns) = (shape.kernel.0 * self.run_len(), self.columns());
        let mut sums = pool.shared_scratch(SLOT_CALLER, parts * lines * columns);
        if parts == 0 || shape.out_w == 0 {
            if !accumulate {
                weight_grad.fill(0.0);
            }
            return;
        }
        let shared = SharedMut::new(&mut sums);
        pool.reserve_scratch(self.scratch());
        pool.run(parts, &|part, worker| {
            // SAFETY: each task has its own part.
            let sums = unsafe { shared.slice(part * lines * columns, lines * columns) };
            let mut packed = pool.scratch(worker, self.scratch());
            let (first, end) = (part * self.part_rows, rows.min((part + 1) * self.part_rows));
            for row in (first..end).step_by(self.block_rows) {
                self.block(row, self.block_rows.min(end - row), &mut packed, sums, row > first);
            }
        });
        // Parts are added in ascending order, whoever computed them.
        let (taps, out) = (shape.taps(), SharedMut::new(weight_grad));
        pool.run(lines, &|line, _| {
            // SAFETY: each task has its own line of all parts.
            let sum_of = |part: usize| unsafe { shared.slice((part * lines + line) * columns, columns) };
            let total = sum_of(0);
            for more in (1..parts).map(sum_of) {
                total.iter_mut().zip(more).for_each(|(sum, more)| *sum += *more);
            }
            let (tap, channel) = (line / shape.in_c, line % shape.in_c);
            for (o, sum) in total.iter().enumerate().take(shape.out_c) {
                // SAFETY: each task has its own tap and channel.
                let out = unsafe { &mut out.slice((o * shape.in_c + channel) * taps + tap, 1)[0] };
                *out = if accumulate { *out + sum } else { *sum };
            }
        });
    }

    /// Words of a packed block of gradients.
    fn scratch(&self) -> usize {
        (self.block_rows * self.shape.out_w * self.columns() + SLACK).next_multiple_of(16)
    }

    /// Adds `rows` rows of the output from `row` on to a part's sums, or begins with them.
    fn block(&self, row: usize, rows: usize, packed: &mut [f32], sums: &mut [f32], add: bool) {
        let (shape, kernels) = (self.shape, self.kernels);
        let (pixels, columns, run) = (rows * shape.out_w, self.columns(), self.run_len());
        let gradient = Strided { data: self.gradient, line: 1, depth: shape.out_c, batch: |_| 0 };
        // SAFETY: the rows are the gradient's; the scratch has room for whole panels of them.
        unsafe {
            let first = row * shape.out_w;
            gradient.pack_block(kernels, 0, 0, shape.out_c, first, pixels, packed.as_mut_ptr(), kernels.nr);
        }
        let mut starts: [Starts; BLOCK_ROWS] = [[std::ptr::null(); MAX_MR]; BLOCK_ROWS];
        let c_rows: [usize; MAX_MR] = std::array::from_fn(|at| at * columns);
        for tap_y in 0..shape.kernel.0 {
            for line in (0..run).step_by(kernels.mr) {
                let count = kernels.mr.min(run - line);
                for (starts, row) in starts.iter_mut().zip(row..row + rows) {
                    let y = row % shape.out_h * shape.stride.0 + tap_y * shape.dilation.0;
                    let start = (row / shape.out_h * shape.in_h + y) * shape.in_w * shape.in_c + line;
                    let last = start + (shape.out_w - 1) * shape.stride.1 * shape.in_c + count;
                    let values = &self.image[start..last];
                    for (at, start) in starts[..count].iter_mut().enumerate() {
                        *start = values.as_ptr().wrapping_add(at);
                    }
                }
                let step = shape.stride.1 * shape.in_c;
                let lines = Lines { starts: starts.as_ptr(), runs: rows, run: shape.out_w, step };
                for col in (0..shape.out_c).step_by(kernels.nr) {
                    let c = &mut sums[(tap_y * run + line) * columns + col..];
                    debug_assert!(c.len() + col >= count * columns);
                    let tile = Tile {
                        a: std::ptr::null(),
                        lines: Some(lines),
                        b: packed[col * pixels..].as_ptr(),
                        depth: pixels,
                        c: c.as_mut_ptr(),
                        c_rows: c_rows.as_ptr(),
                        rows: count,
                        cols: kernels.nr.min(shape.out_c - col),
                        alpha: 1.0,
                        accumulate: add,
                        bias: std::ptr::null(),
                        narrow: None,
                        moments: None,
                    };
                    // SAFETY: each line's pixels are inside the image by the slices above, the packed block has whole
                    // panels, and the tile is inside the sums; the table matches the processor.
                    unsafe { (kernels.multiply)(&tile) };
                }
            }
        }
    }
}
