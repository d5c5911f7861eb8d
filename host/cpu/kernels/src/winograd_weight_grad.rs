//! The weight's gradient with Winograd's algorithms; see [`crate::winograd`].
//!
//! The gradient is a correlation of the input with the output's gradient, of which 3x3 values are wanted. Cut into
//! tiles of `m x m` values of the latter, it is a sum over tiles of small correlations with 3x3 results, each from
//! `(m + 2)^2` products. The sum is taken before the results are mapped back: at each point it is a matrix product of
//! output channels by tiles by input channels.
//!
//! Some tiles are transformed at a time, by all threads; then all points are multiplied. The sums are in ascending
//! order of the tiles, in parts that the shape alone decides.

use std::marker::PhantomData;

use crate::blocked::SLOT_CALLER;
use crate::conv::ConvShape;
use crate::elements::Elements;
use crate::threads::{SharedMut, ThreadPool};
use crate::winograd::{Image, Operand, SKEW, Tiles, Tiling, Variant};
use crate::winograd_product::{COLS, Left, Product, RUN, across_rows};
use crate::winograd_transform::{Algorithm, F2, F4, KERNELS, Layout, collect_kernels};
use crate::winograd_vector::{Vector, Work, tile_rows, with_vectors};

/// Tiles that are transformed at a time, at most: a panel of them (256 x 32 floats, 32 KiB) stays in L1.
const TILES: usize = 256;
/// Floats that are transformed at a time, where that leaves tiles enough.
const CHUNK: usize = 256 * 1024;
/// The least number of tiles to transform at a time.
const LEAST_TILES: usize = 64;
/// Tiles of a task that transforms.
const TASK_TILES: usize = 8;

/// Gradient of the weight; see [`crate::conv2d_weight_grad`].
pub(crate) fn weight_grad(
    pool: &ThreadPool,
    variant: Variant,
    shape: &ConvShape,
    input: Elements,
    output_grad: Elements,
    weight_grad: &mut [f32],
    accumulate: bool,
) {
    assert!(input.len() == shape.input_len());
    assert!(output_grad.len() == shape.output_len());
    assert!(weight_grad.len() == shape.weight_len());
    let half = input.is_bf16() || output_grad.is_bf16();
    let (input, output_grad) = (Operand::new(input, half), Operand::new(output_grad, half));
    let out = SharedMut::new(weight_grad);
    match variant {
        Variant::F2 => Pass::<F2, 4, 2>::new(shape).run(pool, input, output_grad, out, accumulate),
        Variant::F4 => Pass::<F4, 6, 4>::new(shape).run(pool, input, output_grad, out, accumulate),
    }
}

/// The sizes of a gradient's buffers.
struct Pass<'a, A, const SIDE: usize, const OUT: usize> {
    shape: &'a ConvShape,
    tiling: Tiling,
    /// Tiles that are transformed at a time.
    chunk: usize,
    algorithm: PhantomData<A>,
}

impl<'a, A: Algorithm<SIDE, OUT>, const SIDE: usize, const OUT: usize> Pass<'a, A, SIDE, OUT> {
    const POINTS: usize = SIDE * SIDE;

    fn new(shape: &'a ConvShape) -> Self {
        let tiling = Tiling::new(shape.batch, (shape.out_h, shape.out_w), OUT);
        let tiles = tiling.count();
        let most = (CHUNK / (Self::POINTS * (shape.in_c + shape.out_c))).clamp(LEAST_TILES, TILES);
        let chunk = tiles.div_ceil(tiles.div_ceil(most));
        Pass { shape, tiling, chunk, algorithm: PhantomData }
    }

    /// The transformed input: `[(point, panel of 32 input channels, tile, channel of the panel)]`.
    fn data_layout(&self) -> Layout {
        let panel = self.chunk * COLS;
        Layout { point: self.shape.in_c.div_ceil(COLS) * panel + SKEW, width: COLS, panel }
    }

    /// The transformed gradient: `[(point, run of 16 output channels, tile, channel of the run)]`.
    fn gradient_layout(&self) -> Layout {
        let panel = self.chunk * RUN;
        Layout { point: self.shape.out_c.div_ceil(RUN) * panel + SKEW, width: RUN, panel }
    }

    /// Distance of two panels of sums: `[(point, panel of input channels, output channel, channel of the panel)]`.
    fn sums_panel(&self) -> usize {
        self.shape.out_c.next_multiple_of(RUN) * COLS
    }

    fn sums_point(&self) -> usize {
        self.shape.in_c.div_ceil(COLS) * self.sums_panel() + SKEW
    }

    fn run(
        &self,
        pool: &ThreadPool,
        input: Operand,
        output_grad: Operand,
        weight_grad: SharedMut<'_, f32>,
        accumulate: bool,
    ) {
        let (data_len, gradient_len) =
            (Self::POINTS * self.data_layout().point, Self::POINTS * self.gradient_layout().point);
        let mut scratch = pool.shared_scratch(SLOT_CALLER, data_len + gradient_len + Self::POINTS * self.sums_point());
        let (data, rest) = scratch.split_at_mut(data_len);
        let (gradient, sums) = rest.split_at_mut(gradient_len);
        let (data, gradient, sums) = (SharedMut::new(data), SharedMut::new(gradient), SharedMut::new(sums));
        let (shape, tiles) = (self.shape, self.tiling.count());
        let from = Image { size: (shape.in_h, shape.in_w), channels: shape.in_c, padding: shape.padding };
        let by = Image { size: (shape.out_h, shape.out_w), channels: shape.out_c, padding: (0, 0) };
        for first in (0..tiles).step_by(self.chunk) {
            let count = self.chunk.min(tiles - first);
            pool.run(count.div_ceil(TASK_TILES), &|task, _| {
                let at = task * TASK_TILES;
                let block = |image, layout: Layout| Tiles {
                    tiling: self.tiling,
                    image,
                    first: first + at,
                    count: TASK_TILES.min(count - at),
                    layout,
                    group: TASK_TILES,
                    group_step: 0,
                    step: layout.width,
                };
                let (from, by) = (block(from, self.data_layout()), block(by, self.gradient_layout()));
                // SAFETY: sizes were checked at entry, and each task writes its own tiles of the chunk.
                unsafe {
                    input.spread::<A::Data, SIDE, SIDE>(pool, &from, data.as_ptr().add(at * COLS));
                    output_grad.spread::<A::Gradient, OUT, SIDE>(pool, &by, gradient.as_ptr().add(at * RUN));
                }
            });
            let panels = self.shape.in_c.div_ceil(COLS);
            pool.run(Self::POINTS * panels, &|task, _| {
                let (point, panel) = (task / panels, task % panels);
                // SAFETY: the chunk is transformed; each task has its own panel of sums.
                unsafe { self.multiply(pool, point, panel, count, first > 0, data, gradient, sums) };
            });
        }
        self.collect(pool, sums, weight_grad, accumulate);
    }

    /// Adds the chunk's products to a panel of sums at one point.
    ///
    /// # Safety
    /// The chunk is transformed, and no other task touches the panel.
    #[allow(clippy::too_many_arguments)]
    unsafe fn multiply(
        &self,
        pool: &ThreadPool,
        point: usize,
        panel: usize,
        count: usize,
        accumulate: bool,
        data: SharedMut<'_, f32>,
        gradient: SharedMut<'_, f32>,
        sums: SharedMut<'_, f32>,
    ) {
        let (from, by) = (self.data_layout(), self.gradient_layout());
        let rows = across_rows(tile_rows(pool.isa()));
        for row in (0..self.shape.out_c).step_by(rows) {
            // SAFETY: the caller's promise; a pool has no instruction set that was not detected.
            unsafe {
                let product = Product {
                    left: Left::RowRuns,
                    a: gradient.as_ptr().add(point * by.point + row / RUN * by.panel + row % RUN),
                    b: data.as_ptr().add(point * from.point + panel * from.panel),
                    depth: count,
                    c: sums.as_ptr().add(point * self.sums_point() + panel * self.sums_panel() + row * COLS),
                    c_row: COLS,
                    rows,
                    cols: COLS.min(self.shape.in_c - panel * COLS),
                    accumulate,
                };
                with_vectors(pool.isa(), &product);
            }
        }
    }

    /// Maps the sums back to taps.
    fn collect(&self, pool: &ThreadPool, sums: SharedMut<'_, f32>, weight_grad: SharedMut<'_, f32>, accumulate: bool) {
        let in_c = self.shape.in_c;
        let taps_len = 9 * KERNELS;
        pool.reserve_scratch(taps_len);
        pool.run(self.shape.out_c, &|row, worker| {
            let mut taps = pool.scratch(worker, taps_len);
            for channel in (0..in_c).step_by(KERNELS) {
                let count = KERNELS.min(in_c - channel);
                let from = channel / COLS * self.sums_panel() + row * COLS + channel % COLS;
                // SAFETY: the sums are complete, each task writes the gradient of one output channel, and a pool has
                // no instruction set that was not detected.
                let out = unsafe {
                    let from = sums.as_ptr().add(from);
                    with_vectors(pool.isa(), &Kernels { pass: self, from, taps: taps.as_mut_ptr() });
                    weight_grad.slice((row * in_c + channel) * 9, 9 * count)
                };
                for (lane, kernel) in out.chunks_exact_mut(9).enumerate() {
                    for (tap, out) in kernel.iter_mut().enumerate() {
                        let value = taps[tap * KERNELS + lane];
                        *out = if accumulate { *out + value } else { value };
                    }
                }
            }
        });
    }
}

/// Maps the sums of 16 kernels back.
struct Kernels<'a, A, const SIDE: usize, const OUT: usize> {
    pass: &'a Pass<'a, A, SIDE, OUT>,
    from: *const f32,
    taps: *mut f32,
}

impl<A: Algorithm<SIDE, OUT>, const SIDE: usize, const OUT: usize> Work for Kernels<'_, A, SIDE, OUT> {
    // SAFETY: what the caller promises is with the trait; both sides are as long as the sizes say.
    #[inline(always)]
    unsafe fn run<V: Vector>(&self) {
        // SAFETY: as above.
        unsafe { collect_kernels::<V, A::KernelGradient, SIDE>(self.from, self.pass.sums_point(), self.taps) }
    }
}
