//! Winograd convolution for 3x3 kernels with stride 1: fewer products, at the price of sums.
//!
//! Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016): a tile of `m x m` outputs needs
//! `(m + 2)^2` products per pair of channels in place of `9 m^2`. Windows of the input and kernels are mapped to
//! values at `(m + 2)^2` points; at each point the sum over input channels is a matrix product of tiles by output
//! channels; outputs are mapped back.
//!
//! Kernels are transformed first, once per call. Then each task takes some tiles all the way: their values at the
//! points and the products of 32 output channels stay in the second-level cache, and only the input, the transformed
//! kernels and the output pass through memory.
//!
//! Operands and results may be bf16; the arithmetic between is in f32.
//!
//! Times of the direct convolution over these in f32, one thread with AVX-512, forward / input gradient / weight
//! gradient; [`choose`] takes the better one. With bf16 operands and results F(4x4) gains 2.2 to 4.1, and 1.5 to 2.2 at
//! 24 channels, which fill no vector.
//!
//! | images, size, channels | F(2x2, 3x3) | F(4x4, 3x3) |
//! |---|---|---|
//! | 16, 56x56, 64 | 2.5 / 2.5 / 2.7 | 3.6 / 3.4 / 4.0 |
//! | 16, 28x28, 128 | 2.3 / 2.3 / 2.6 | 3.1 / 3.2 / 3.6 |
//! | 16, 14x14, 256 | 2.1 / 1.9 / 2.3 | 2.3 / 2.3 / 3.0 |
//! | 16, 7x7, 512 | 1.6 / 1.4 / 1.8 | 1.9 / 1.8 / 1.9 |
//! | 64, 16x16, 24 | 2.3 / 2.4 / 2.0 | 3.3 / 3.4 / 2.6 |
//! | 64, 8x8, 48 | 2.3 / 2.3 / 3.0 | 3.2 / 3.3 / 4.6 |
//! | 64, 4x4, 96 | 2.3 / 2.1 / 2.5 | 3.0 / 2.8 / 3.2 |
//! | 64, 2x2, 192 | 2.1 / 1.7 / 1.8 | 0.8 / 0.8 / 0.9 |
//!
//! Largest errors of the first three, as shares of the largest value, with operands spread evenly around zero: forward
//! and input gradient 8e-7 with F(2x2), 4e-6 with F(4x4), 7e-7 direct; weight gradient 6e-7, 1.2e-6, 4e-7.

use std::marker::PhantomData;

use crate::blocked::SLOT_CALLER;
use crate::conv::ConvShape;
use crate::elements::{Elements, ElementsMut, bf16};
use crate::microkernel::{SLACK, Source, micro_kernels};
use crate::moments::SLOT_SUMS;
use crate::threads::{SharedMut, ThreadPool};
use crate::winograd_product::{COLS, Left, Product, RUN};
use crate::winograd_transform::{
    Algorithm, Epilogue, F2, F4, KERNELS, Layout, MOMENTS, Map, Window, collect, spread, spread_kernels,
};
use crate::winograd_vector::{Load, Rounded, Store, Vector, Work, tile_rows, with_vectors};

/// Shared scratch: the transformed kernels.
const SLOT_KERNELS: usize = SLOT_CALLER;
/// Floats of transformed data and products that a task aims for: they stay in the second-level cache.
const BLOCK: usize = 192 * 1024;
/// Tiles of a task, at least: each panel of kernels is used by as many once it is near.
const LEAST_TILES: usize = 48;
/// Depth of a product: a panel of the right operand (256 x 32 floats, 32 KiB) stays in L1.
const DEPTH: usize = 256;
/// Between the points of a panel: without it they would fall in the same sets of the cache.
pub(crate) const SKEW: usize = 16;
/// Channels whose moments one task combines.
const MOMENT_CHANNELS: usize = 64;

/// Tile size: outputs along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variant {
    /// 2x2 outputs from 16 products.
    F2,
    /// 4x4 outputs from 36 products.
    F4,
}

/// The algorithm for a shape, or none where the direct convolution is expected to be faster or the only one.
///
/// Counts, in products per lane of 32 output channels: those of the tiles; the sums of the transforms, which cost as
/// much as seven products for each channel and point; the transform of the kernels, as much as 24 tiles.
pub(crate) fn choose(shape: &ConvShape) -> Option<Variant> {
    let ConvShape { kernel, stride, dilation, groups, padding, .. } = *shape;
    let applies = kernel == (3, 3)
        && stride == (1, 1)
        && dilation == (1, 1)
        && groups == 1
        && padding.0 <= 2
        && padding.1 <= 2
        && shape.output_len() * shape.input_len() > 0;
    if !applies {
        return None;
    }
    let channels = |count: usize| count.next_multiple_of(16);
    let pairs = channels(shape.in_c) * channels(shape.out_c);
    let sums = 7 * (channels(shape.in_c) + channels(shape.out_c));
    let cost = |out: usize| {
        let tiles = shape.batch * shape.out_h.div_ceil(out) * shape.out_w.div_ceil(out);
        (out + 2).pow(2) * (tiles * (pairs + sums) + 24 * pairs)
    };
    let direct = 9 * shape.batch * shape.out_h * shape.out_w * shape.in_c * shape.out_c;
    let (f2, f4) = (cost(2), cost(4));
    match f2.min(f4) {
        least if least > direct / 8 * 7 => None,
        least if least == f4 => Some(Variant::F4),
        _ => Some(Variant::F2),
    }
}

/// Forward pass; see [`crate::conv2d_forward`].
#[allow(clippy::too_many_arguments)]
pub(crate) fn forward(
    pool: &ThreadPool,
    variant: Variant,
    shape: &ConvShape,
    input: Elements,
    weight: Elements,
    bias: Option<&[f32]>,
    output: ElementsMut,
    accumulate: bool,
    moments: Option<&mut [f32]>,
) {
    let sizes = Correlation {
        batch: shape.batch,
        from: (shape.in_h, shape.in_w),
        from_channels: shape.in_c,
        to: (shape.out_h, shape.out_w),
        to_channels: shape.out_c,
        padding: shape.padding,
        reversed: false,
    };
    sizes.run(pool, variant, input, weight, bias, output, accumulate, moments);
}

/// Gradient of the input; see [`crate::conv2d_input_grad`].
pub(crate) fn input_grad(
    pool: &ThreadPool,
    variant: Variant,
    shape: &ConvShape,
    output_grad: Elements,
    weight: Elements,
    input_grad: ElementsMut,
    accumulate: bool,
) {
    // The same with reversed kernels and the two kinds of channels exchanged.
    let sizes = Correlation {
        batch: shape.batch,
        from: (shape.out_h, shape.out_w),
        from_channels: shape.out_c,
        to: (shape.in_h, shape.in_w),
        to_channels: shape.in_c,
        padding: (2 - shape.padding.0, 2 - shape.padding.1),
        reversed: true,
    };
    sizes.run(pool, variant, output_grad, weight, None, input_grad, accumulate, None);
}

/// Sizes of a correlation with 3x3 kernels; pairs are (height, width).
struct Correlation {
    batch: usize,
    from: (usize, usize),
    from_channels: usize,
    to: (usize, usize),
    to_channels: usize,
    padding: (usize, usize),
    /// Kernels are `[from, to, 3, 3]` with reversed taps, in place of `[to, from, 3, 3]`.
    reversed: bool,
}

impl Correlation {
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        pool: &ThreadPool,
        variant: Variant,
        data: Elements,
        weight: Elements,
        bias: Option<&[f32]>,
        out: ElementsMut,
        accumulate: bool,
        moments: Option<&mut [f32]>,
    ) {
        assert!(data.len() == self.batch * self.from.0 * self.from.1 * self.from_channels);
        assert!(out.len() == self.batch * self.to.0 * self.to.1 * self.to_channels);
        assert!(weight.len() == self.from_channels * self.to_channels * 9);
        assert!(bias.is_none_or(|bias| bias.len() == self.to_channels));
        assert!(moments.as_ref().is_none_or(|moments| moments.len() == 2 * self.to_channels));
        let half = data.is_bf16() || weight.is_bf16();
        let data = Operand::new(data, half);
        let out = Output::new(out);
        match variant {
            Variant::F2 => Pass::<F2, 4, 2>::new(self).run(pool, data, weight, half, bias, out, accumulate, moments),
            Variant::F4 => Pass::<F4, 6, 4>::new(self).run(pool, data, weight, half, bias, out, accumulate, moments),
        }
    }
}

/// An operand, and how its values are read.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    F32(&'a [f32]),
    /// To be rounded to bf16.
    Rounded(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> Operand<'a> {
    /// With `half` the operand counts as bf16.
    pub(crate) fn new(elements: Elements<'a>, half: bool) -> Self {
        match (elements, half) {
            (Elements::F32(values), false) => Operand::F32(values),
            (Elements::F32(values), true) => Operand::Rounded(values),
            (Elements::Bf16(values), _) => Operand::Bf16(values),
        }
    }

    /// Transforms some tiles.
    ///
    /// # Safety
    /// The operand is as long as the work says, and the destination as its layout says.
    pub(crate) unsafe fn spread<M: Map<FROM, SIDE>, const FROM: usize, const SIDE: usize>(
        self,
        pool: &ThreadPool,
        tiles: &Tiles,
        to: *mut f32,
    ) {
        // SAFETY: the caller's promise; a pool has no instruction set that was not detected.
        unsafe {
            match self {
                Operand::F32(data) => {
                    with_vectors(pool.isa(), &Spread::<f32, M, FROM, SIDE>::new(data.as_ptr(), tiles, to))
                }
                Operand::Rounded(data) => {
                    with_vectors(pool.isa(), &Spread::<Rounded, M, FROM, SIDE>::new(data.as_ptr().cast(), tiles, to))
                }
                Operand::Bf16(data) => {
                    with_vectors(pool.isa(), &Spread::<bf16, M, FROM, SIDE>::new(data.as_ptr(), tiles, to))
                }
            }
        }
    }
}

/// A result that tasks write at disjoint places.
#[derive(Clone, Copy)]
enum Output<'a> {
    F32(SharedMut<'a, f32>),
    Bf16(SharedMut<'a, bf16>),
}

impl<'a> Output<'a> {
    fn new(elements: ElementsMut<'a>) -> Self {
        match elements {
            ElementsMut::F32(values) => Output::F32(SharedMut::new(values)),
            ElementsMut::Bf16(values) => Output::Bf16(SharedMut::new(values)),
        }
    }
}

/// How images are cut into tiles.
#[derive(Clone, Copy)]
pub(crate) struct Tiling {
    pub images: usize,
    /// Tiles along the axes.
    pub tiles: (usize, usize),
    /// Pixels from one tile to the next.
    pub step: usize,
}

impl Tiling {
    pub(crate) fn new(images: usize, size: (usize, usize), step: usize) -> Tiling {
        Tiling { images, tiles: (size.0.div_ceil(step), size.1.div_ceil(step)), step }
    }

    pub(crate) fn count(&self) -> usize {
        self.images * self.tiles.0 * self.tiles.1
    }

    /// The window of `side` pixels that begins `padding` before a tile.
    #[inline(always)]
    pub(crate) fn window(&self, tile: usize, side: usize, image: &Image) -> Window {
        let (line, x) = (tile / self.tiles.1, tile % self.tiles.1);
        let (number, y) = (line / self.tiles.0, line % self.tiles.0);
        let y = (y * self.step) as isize - image.padding.0 as isize;
        let x = (x * self.step) as isize - image.padding.1 as isize;
        let inside = |at: isize, size: usize| {
            ((-at).clamp(0, side as isize) as usize, (size as isize - at).clamp(0, side as isize) as usize)
        };
        let row = (number * image.size.0) as isize + y;
        Window {
            start: (row * image.size.1 as isize + x) * image.channels as isize,
            row: image.size.1 * image.channels,
            pixel: image.channels,
            ys: inside(y, image.size.0),
            xs: inside(x, image.size.1),
        }
    }
}

/// The images that a tiling is laid over.
#[derive(Clone, Copy)]
pub(crate) struct Image {
    /// Height and width.
    pub size: (usize, usize),
    pub channels: usize,
    pub padding: (usize, usize),
}

/// Some tiles to transform, and where they go: tile `first + i` at `i / group * group_step + i % group * step`.
pub(crate) struct Tiles {
    pub tiling: Tiling,
    pub image: Image,
    pub first: usize,
    pub count: usize,
    pub layout: Layout,
    pub group: usize,
    pub group_step: usize,
    pub step: usize,
}

/// Transforms tiles of an operand.
struct Spread<'a, S, M, const FROM: usize, const SIDE: usize> {
    data: *const S,
    tiles: &'a Tiles,
    to: *mut f32,
    map: PhantomData<M>,
}

impl<'a, S, M, const FROM: usize, const SIDE: usize> Spread<'a, S, M, FROM, SIDE> {
    fn new(data: *const S, tiles: &'a Tiles, to: *mut f32) -> Self {
        Spread { data, tiles, to, map: PhantomData }
    }
}

impl<S: Load, M: Map<FROM, SIDE>, const FROM: usize, const SIDE: usize> Work for Spread<'_, S, M, FROM, SIDE> {
    // SAFETY: what the caller promises is with the trait; the operand and the destination are long enough.
    #[inline(always)]
    unsafe fn run<V: Vector>(&self) {
        let tiles = self.tiles;
        let mut at = 0;
        while at < tiles.count {
            let window = tiles.tiling.window(tiles.first + at, FROM, &tiles.image);
            // SAFETY: as above.
            unsafe {
                let to = self.to.add(at / tiles.group * tiles.group_step + at % tiles.group * tiles.step);
                spread::<V, S, M, FROM, SIDE>(self.data, &window, tiles.image.channels, to, &tiles.layout);
            }
            at += 1;
        }
    }
}

/// A correlation with one algorithm, and how it is cut into tasks. Blocks of tiles are fixed by the shape and the
/// instruction set alone, because moments are summed by block.
struct Pass<'a, A, const SIDE: usize, const OUT: usize> {
    sizes: &'a Correlation,
    tiling: Tiling,
    /// Blocks of tiles, and tiles of a block; the last ones may have fewer or none.
    blocks: usize,
    block: usize,
    algorithm: PhantomData<A>,
}

impl<'a, A: Algorithm<SIDE, OUT>, const SIDE: usize, const OUT: usize> Pass<'a, A, SIDE, OUT> {
    const POINTS: usize = SIDE * SIDE;

    fn new(sizes: &'a Correlation) -> Self {
        let tiling = Tiling::new(sizes.batch, sizes.to, OUT);
        let tiles = tiling.count();
        let most = (BLOCK / (Self::POINTS * (sizes.from_channels + COLS)) / 12 * 12).max(LEAST_TILES);
        let blocks = tiles.div_ceil(most).next_multiple_of(2);
        Pass { sizes, tiling, blocks, block: tiles.div_ceil(blocks), algorithm: PhantomData }
    }

    /// Distance of two points in a panel of kernels: all input channels of 32 output channels.
    fn kernel_point(&self) -> usize {
        self.sizes.from_channels * COLS + SKEW
    }

    /// Distance of two points of a group's data: `values[(group, point, channel / 16, row, channel % 16)]`.
    fn data_point(&self, mr: usize) -> usize {
        self.sizes.from_channels.next_multiple_of(RUN) * mr + SKEW
    }

    /// Distance of two points of the products: `products[(point, tile, output channel)]`.
    fn product_point(&self) -> usize {
        self.block * COLS + SKEW
    }

    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        pool: &ThreadPool,
        data: Operand,
        weight: Elements,
        half: bool,
        bias: Option<&[f32]>,
        out: Output,
        accumulate: bool,
        moments: Option<&mut [f32]>,
    ) {
        let channels = self.sizes.to_channels;
        let panels = channels.div_ceil(COLS);
        let mut kernels = pool.shared_scratch(SLOT_KERNELS, panels * Self::POINTS * self.kernel_point());
        let shared = SharedMut::new(&mut kernels);
        match weight {
            Elements::F32(weight) => self.transform_kernels(pool, weight, half, shared),
            Elements::Bf16(weight) => self.transform_kernels(pool, weight, half, shared),
        }
        let kernels = &*kernels;
        let sums_len = if moments.is_some() { self.blocks * MOMENTS * channels } else { 0 };
        let mut sums = pool.shared_scratch(SLOT_SUMS, sums_len);
        let shared_sums = SharedMut::new(&mut sums);

        // Few tiles are shared by several tasks, each with its part of the output channels.
        let parts = (2 * pool.threads()).div_ceil(self.blocks).min(panels);
        let per_part = panels.div_ceil(parts);
        let mr = tile_rows(pool.isa());
        let group = Self::POINTS * self.data_point(mr);
        let (data_len, products_len) = (self.block.div_ceil(mr) * group, Self::POINTS * self.product_point());
        pool.reserve_scratch(data_len + products_len);
        pool.run(self.blocks * parts, &|task, worker| {
            let (block, part) = (task / parts, task % parts);
            let tiles = self.block_tiles(block);
            let part = part * per_part..panels.min((part + 1) * per_part);
            if tiles.is_empty() || part.is_empty() {
                return;
            }
            let mut scratch = pool.scratch(worker, data_len + products_len);
            let (values, products) = scratch.split_at_mut(data_len);
            let products = products.as_mut_ptr();
            let tiles = Tiles {
                tiling: self.tiling,
                image: self.source_image(),
                first: tiles.start,
                count: tiles.len(),
                layout: Layout { point: self.data_point(mr), width: RUN, panel: mr * RUN },
                group: mr,
                group_step: group,
                step: RUN,
            };
            // SAFETY: sizes were checked at entry, the scratch has room for a block, tasks have disjoint tiles or
            // panels, and a pool has no instruction set that was not detected.
            unsafe {
                data.spread::<A::Data, SIDE, SIDE>(pool, &tiles, values.as_mut_ptr());
                for panel in part {
                    let kernels = kernels[panel * Self::POINTS * self.kernel_point()..].as_ptr();
                    self.multiply(pool, tiles.count, values.as_ptr(), kernels, panel, products);
                    let moments = match sums_len {
                        0 => std::ptr::null_mut(),
                        _ => shared_sums.as_ptr().add(block * MOMENTS * channels + panel * COLS),
                    };
                    let bias = bias.map_or(std::ptr::null(), |bias| bias[panel * COLS..].as_ptr());
                    let epilogue = Epilogue { bias, accumulate, moments, moments_stride: channels };
                    let (first, count) = (tiles.first, tiles.count);
                    match out {
                        Output::F32(out) => {
                            let out = out.as_ptr();
                            let work = Collect { pass: self, from: products, first, count, panel, out, epilogue };
                            with_vectors(pool.isa(), &work);
                        }
                        Output::Bf16(out) => {
                            let out = out.as_ptr();
                            let work = Collect { pass: self, from: products, first, count, panel, out, epilogue };
                            with_vectors(pool.isa(), &work);
                        }
                    }
                }
            }
        });
        if let Some(moments) = moments {
            self.combine_moments(pool, &sums, moments);
        }
    }

    fn block_tiles(&self, block: usize) -> std::ops::Range<usize> {
        let tiles = self.tiling.count();
        tiles.min(block * self.block)..tiles.min((block + 1) * self.block)
    }

    fn source_image(&self) -> Image {
        Image { size: self.sizes.from, channels: self.sizes.from_channels, padding: self.sizes.padding }
    }

    fn result_image(&self) -> Image {
        Image { size: self.sizes.to, channels: self.sizes.to_channels, padding: (0, 0) }
    }

    /// Transforms all kernels: `to[(panel, point, input channel, output channel of the panel)]`.
    fn transform_kernels<T: Source>(&self, pool: &ThreadPool, weight: &[T], round: bool, to: SharedMut<'_, f32>) {
        let (from_channels, to_channels) = (self.sizes.from_channels, self.sizes.to_channels);
        let chunks = from_channels.div_ceil(RUN);
        let transpose = T::packers(micro_kernels(pool.isa(), false)).transpose;
        let taps_len = RUN * 9 * KERNELS + SLACK;
        pool.reserve_scratch(taps_len);
        pool.run(to_channels.div_ceil(KERNELS) * chunks, &|task, worker| {
            let (lane, channel) = (task / chunks * KERNELS, task % chunks * RUN);
            let count = RUN.min(from_channels - channel);
            let mut taps = pool.scratch(worker, taps_len);
            // Beyond the last output channel, that one again.
            let to_channel = |line: usize| (lane + line).min(to_channels - 1);
            let mut lines = [weight.as_ptr(); KERNELS];
            if self.sizes.reversed {
                for at in 0..count {
                    for (line, pointer) in lines.iter_mut().enumerate() {
                        *pointer = weight[((channel + at) * to_channels + to_channel(line)) * 9..][..9].as_ptr();
                    }
                    // SAFETY: each line has nine taps, and the scratch room for them.
                    unsafe { transpose(&lines, 9, taps[at * 9 * KERNELS..].as_mut_ptr(), KERNELS) };
                }
            } else {
                for (line, pointer) in lines.iter_mut().enumerate() {
                    *pointer = weight[(to_channel(line) * from_channels + channel) * 9..][..9 * count].as_ptr();
                }
                // SAFETY: as above, nine taps of each input channel.
                unsafe { transpose(&lines, 9 * count, taps.as_mut_ptr(), KERNELS) };
            }
            let at = lane / COLS * Self::POINTS * self.kernel_point() + channel * COLS + lane % COLS;
            // SAFETY: each task writes channels of its own inside the panels, and a pool has no instruction set that
            // was not detected.
            unsafe {
                let to = to.as_ptr().add(at);
                with_vectors(pool.isa(), &SpreadKernels { pass: self, taps: taps.as_ptr(), count, round, to });
            }
        });
    }

    /// Multiplies a block's values with a panel of kernels.
    ///
    /// # Safety
    /// All three are as long as the layouts say.
    unsafe fn multiply(
        &self,
        pool: &ThreadPool,
        count: usize,
        values: *const f32,
        kernels: *const f32,
        panel: usize,
        products: *mut f32,
    ) {
        let (depth, mr) = (self.sizes.from_channels, tile_rows(pool.isa()));
        let cols = COLS.min(self.sizes.to_channels - panel * COLS);
        for point in 0..Self::POINTS {
            for start in (0..depth).step_by(DEPTH) {
                for (group, row) in (0..count).step_by(mr).enumerate() {
                    // SAFETY: the caller's promise; a pool has no instruction set that was not detected.
                    unsafe {
                        let product = Product {
                            left: Left::DepthRuns,
                            a: values.add((group * Self::POINTS + point) * self.data_point(mr) + start * mr),
                            b: kernels.add(point * self.kernel_point() + start * COLS),
                            depth: DEPTH.min(depth - start),
                            c: products.add(point * self.product_point() + row * COLS),
                            c_row: COLS,
                            rows: mr.min(count - row),
                            cols,
                            accumulate: start > 0,
                        };
                        with_vectors(pool.isa(), &product);
                    }
                }
            }
        }
    }

    /// Mean and population variance of each output channel from the sums of the blocks, in ascending order: Chan,
    /// Golub and LeVeque (1979), as in [`crate::moments`].
    fn combine_moments(&self, pool: &ThreadPool, sums: &[f32], out: &mut [f32]) {
        let channels = self.sizes.to_channels;
        let image = self.result_image();
        let rows = |block: usize| -> usize {
            let inside = |window: Window| (window.ys.1 - window.ys.0) * (window.xs.1 - window.xs.0);
            self.block_tiles(block).map(|tile| inside(self.tiling.window(tile, OUT, &image))).sum()
        };
        let out = SharedMut::new(out);
        pool.run(channels.div_ceil(MOMENT_CHANNELS), &|task, _| {
            let first = task * MOMENT_CHANNELS;
            let count = MOMENT_CHANNELS.min(channels - first);
            let (mut mean, mut m2, mut before) = ([0f64; MOMENT_CHANNELS], [0f64; MOMENT_CHANNELS], 0.0);
            for (block, sums) in sums.chunks_exact(MOMENTS * channels).enumerate() {
                let rows = rows(block) as f64;
                if rows == 0.0 {
                    break;
                }
                for at in 0..count {
                    let sum = |number: usize| sums[number * channels + first + at] as f64;
                    let offset = sum(1) / rows;
                    let delta = sum(0) + offset - mean[at];
                    m2[at] += (sum(2) - sum(1) * offset).max(0.0) + delta * delta * before * rows / (before + rows);
                    mean[at] += delta * rows / (before + rows);
                }
                before += rows;
            }
            // SAFETY: each task has its own channels.
            let (means, variances) = unsafe { (out.slice(first, count), out.slice(channels + first, count)) };
            for at in 0..count {
                means[at] = mean[at] as f32;
                variances[at] = (m2[at] / before) as f32;
            }
        });
    }
}

/// Computes the outputs of a block's tiles for a panel of output channels.
struct Collect<'a, D, A, const SIDE: usize, const OUT: usize> {
    pass: &'a Pass<'a, A, SIDE, OUT>,
    from: *const f32,
    first: usize,
    count: usize,
    panel: usize,
    out: *mut D,
    epilogue: Epilogue,
}

impl<D: Store, A: Algorithm<SIDE, OUT>, const SIDE: usize, const OUT: usize> Work for Collect<'_, D, A, SIDE, OUT> {
    // SAFETY: what the caller promises is with the trait; the products and the output are as long as the sizes say.
    #[inline(always)]
    unsafe fn run<V: Vector>(&self) {
        let (image, point) = (self.pass.result_image(), self.pass.product_point());
        let channel = self.panel * COLS;
        let channels = COLS.min(image.channels - channel);
        let out = self.out.wrapping_add(channel);
        let mut at = 0;
        while at < self.count {
            let window = self.pass.tiling.window(self.first + at, OUT, &image);
            // SAFETY: as above.
            unsafe {
                let from = self.from.add(at * COLS);
                let first = at == 0;
                collect::<V, D, A::Output, SIDE, OUT>(from, point, channels, out, &window, &self.epilogue, first);
            }
            at += 1;
        }
    }
}

/// Transforms the kernels of some input channels and 16 output channels.
struct SpreadKernels<'a, A, const SIDE: usize, const OUT: usize> {
    pass: &'a Pass<'a, A, SIDE, OUT>,
    taps: *const f32,
    count: usize,
    round: bool,
    to: *mut f32,
}

impl<A: Algorithm<SIDE, OUT>, const SIDE: usize, const OUT: usize> Work for SpreadKernels<'_, A, SIDE, OUT> {
    // SAFETY: what the caller promises is with the trait; both sides are as long as `count` and the sizes say.
    #[inline(always)]
    unsafe fn run<V: Vector>(&self) {
        let (point, flip) = (self.pass.kernel_point(), self.pass.sizes.reversed);
        let mut at = 0;
        while at < self.count {
            // SAFETY: as above.
            unsafe {
                let (taps, to) = (self.taps.add(at * 9 * KERNELS), self.to.add(at * COLS));
                spread_kernels::<V, A::Kernel, SIDE>(taps, flip, self.round, to, point);
            }
            at += 1;
        }
    }
}
