//! 2-D convolution (cross-correlation, as in PyTorch) in NHWC, as an implicit matrix multiplication.
//!
//! Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning" (2014), section 3: patches are gathered while a
//! panel is packed and are never stored as a whole. With `x` the input, `w` the weight and `g` the output's gradient:
//!
//! - forward: rows are output pixels, depth is (tap, input channel), columns are output channels;
//! - input gradient: rows are input pixels, depth is (tap, output channel), columns are input channels. With a
//!   stride, the pixels are taken in classes of equal remainder, each with just the taps that meet it;
//! - weight gradient: rows are output channels, depth is output pixels, columns are (tap, input channel).

use crate::blocked::{DenseRows, Panels, Problem, Rows, SLOT_CALLER, Strided, copy_lines, multiply};
use crate::convert::{rounded, through_f32};
use crate::depthwise;
use crate::elements::{Elements, ElementsMut};
use crate::microkernel::{MAX_NR, MicroKernels, prefetch};
use crate::moments::column_moments;
use crate::threads::{SharedMut, ThreadPool};

/// The sizes of a convolution. Pairs are (height, width).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Images.
    pub batch: usize,
    /// Rows of the input.
    pub in_h: usize,
    /// Columns of the input.
    pub in_w: usize,
    /// Channels of the input, of all groups.
    pub in_c: usize,
    /// Rows of the output.
    pub out_h: usize,
    /// Columns of the output.
    pub out_w: usize,
    /// Channels of the output, of all groups.
    pub out_c: usize,
    /// Size of the kernel.
    pub kernel: (usize, usize),
    /// Distance of two outputs' windows.
    pub stride: (usize, usize),
    /// Zeros around the input, on each side.
    pub padding: (usize, usize),
    /// Distance of two taps.
    pub dilation: (usize, usize),
    /// Groups of channels that do not see each other.
    pub groups: usize,
}

impl ConvShape {
    /// The output size along one axis: `(input + 2 padding - dilation (kernel - 1) - 1) / stride + 1`, or zero where
    /// the kernel does not fit.
    pub fn output_size(input: usize, kernel: usize, stride: usize, padding: usize, dilation: usize) -> usize {
        match (input + 2 * padding).checked_sub(dilation * (kernel.max(1) - 1) + 1) {
            Some(room) if stride > 0 => room / stride + 1,
            _ => 0,
        }
    }

    /// Elements of the input.
    pub fn input_len(&self) -> usize {
        self.batch * self.in_h * self.in_w * self.in_c
    }

    /// Elements of the output.
    pub fn output_len(&self) -> usize {
        self.batch * self.out_h * self.out_w * self.out_c
    }

    /// Elements of the weight.
    pub fn weight_len(&self) -> usize {
        self.out_c * self.group_in() * self.taps()
    }

    /// Multiplications and additions of the forward pass, each counted as one.
    pub fn flops(&self) -> usize {
        2 * self.output_len() * self.group_in() * self.taps()
    }

    pub(crate) fn taps(&self) -> usize {
        self.kernel.0 * self.kernel.1
    }

    pub(crate) fn group_in(&self) -> usize {
        self.in_c / self.groups
    }

    pub(crate) fn group_out(&self) -> usize {
        self.out_c / self.groups
    }

    fn is_depthwise(&self) -> bool {
        self.groups > 1 && self.group_in() == 1 && self.group_out() == 1
    }

    /// The caller's invariants; see the crate's notes on shapes.
    fn check(&self, input: usize, weight: usize, output: usize) {
        let Self { kernel, stride, dilation, .. } = *self;
        assert!(
            self.groups > 0 && self.in_c.is_multiple_of(self.groups) && self.out_c.is_multiple_of(self.groups),
            "conv2d: {} and {} channels in {} groups",
            self.in_c,
            self.out_c,
            self.groups
        );
        assert!(
            kernel.0.min(kernel.1).min(stride.0).min(stride.1).min(dilation.0).min(dilation.1) > 0,
            "conv2d: kernel, stride and dilation must be positive: {self:?}"
        );
        for (input, output, axis) in [(self.in_h, self.out_h, 0), (self.in_w, self.out_w, 1)] {
            let pick = |pair: (usize, usize)| if axis == 0 { pair.0 } else { pair.1 };
            let size = Self::output_size(input, pick(kernel), pick(stride), pick(self.padding), pick(dilation));
            assert!(output == size, "conv2d: output size {output} along axis {axis}, expected {size}: {self:?}");
        }
        for (name, has, needs) in [
            ("input", input, self.input_len()),
            ("weight", weight, self.weight_len()),
            ("output", output, self.output_len()),
        ] {
            assert!(has == needs, "conv2d: the {name} has {has} elements, expected {needs}");
        }
    }
}

/// `output[b, y, x, o] (+)= bias[o] + sum over taps and i of input * weight[o, i, tap]`.
///
/// `bias` holds `out_c` values. If `moments` is given it takes the mean of each output channel over the pixels of all
/// images and then, `out_c` further, the population variance: of the values as they are stored.
///
/// If one of the operands is bf16, both are multiplied as bf16 (an f32 operand is rounded) and summed in f32; a result
/// in bf16 is rounded once, after accumulation and bias.
///
/// # Panics
/// If the shape contradicts itself or a slice's length: the caller's invariant, checked once.
#[allow(clippy::too_many_arguments)]
pub fn conv2d_forward(
    pool: &ThreadPool,
    shape: &ConvShape,
    input: Elements,
    weight: Elements,
    bias: Option<&[f32]>,
    mut output: ElementsMut,
    accumulate: bool,
    moments: Option<&mut [f32]>,
) {
    let round = input.is_bf16() || weight.is_bf16();
    {
        let (input, weight) = (rounded(pool, 3, input, round), rounded(pool, 4, weight, round));
        through_f32(pool, 5, output.reborrow(), accumulate, |output| {
            forward_f32(pool, shape, input.as_slice(), weight.as_slice(), bias, output, accumulate);
        });
    }
    if let Some(moments) = moments {
        let pixels = shape.batch * shape.out_h * shape.out_w;
        column_moments(pool, output.as_elements(), pixels, shape.out_c, moments);
    }
}

fn forward_f32(
    pool: &ThreadPool,
    shape: &ConvShape,
    input: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    output: &mut [f32],
    accumulate: bool,
) {
    shape.check(input.len(), weight.len(), output.len());
    if let Some(bias) = bias {
        assert!(bias.len() == shape.out_c, "conv2d: {} biases for {} channels", bias.len(), shape.out_c);
    }
    if shape.is_depthwise() {
        return depthwise::forward(pool, shape, input, weight, bias, output, accumulate);
    }
    let patches = Patches::of_input(shape, input);
    let problem = Problem {
        m: shape.batch * shape.out_h * shape.out_w,
        n: shape.group_out(),
        k: shape.taps() * shape.group_in(),
        batch: shape.groups,
        alpha: 1.0,
        accumulate,
        bias,
        bias_stride: shape.group_out(),
    };
    let rows = DenseRows { start: 0, row: shape.out_c, batch: shape.group_out() };
    let output = SharedMut::new(output);
    if shape.taps() == 1 {
        // The weight is a plain matrix.
        let (group_in, group_out) = (shape.group_in(), shape.group_out());
        let batch = |group: usize| group * group_out * group_in;
        let weights = Strided { data: weight, line: group_in, depth: 1, batch };
        // SAFETY: `check` compared all sizes; the rows of C are the output's pixels.
        return unsafe { multiply(pool, &problem, &patches, &weights, output, &rows) };
    }
    let weights = ForwardWeights { shape, weight };
    // SAFETY: as above.
    unsafe { multiply(pool, &problem, &patches, &weights, output, &rows) };
}

/// The gradient of the input: `input_grad (+)=` the transposed convolution of `output_grad` with `weight`.
///
/// # Panics
/// As [`conv2d_forward`].
pub fn conv2d_input_grad(
    pool: &ThreadPool,
    shape: &ConvShape,
    output_grad: Elements,
    weight: Elements,
    input_grad: ElementsMut,
    accumulate: bool,
) {
    let round = output_grad.is_bf16() || weight.is_bf16();
    let (output_grad, weight) = (rounded(pool, 3, output_grad, round), rounded(pool, 4, weight, round));
    through_f32(pool, 5, input_grad, accumulate, |input_grad| {
        input_grad_f32(pool, shape, output_grad.as_slice(), weight.as_slice(), input_grad, accumulate);
    });
}

fn input_grad_f32(
    pool: &ThreadPool,
    shape: &ConvShape,
    output_grad: &[f32],
    weight: &[f32],
    input_grad: &mut [f32],
    accumulate: bool,
) {
    shape.check(input_grad.len(), weight.len(), output_grad.len());
    if shape.is_depthwise() {
        return depthwise::input_grad(pool, shape, output_grad, weight, input_grad, accumulate);
    }
    for phase_y in 0..shape.stride.0.min(shape.in_h) {
        for phase_x in 0..shape.stride.1.min(shape.in_w) {
            // Input pixel i meets tap t of output o where i + padding = o stride + t dilation.
            let ys = Axis::phase(shape.kernel.0, shape.stride.0, shape.padding.0, shape.dilation.0, phase_y);
            let xs = Axis::phase(shape.kernel.1, shape.stride.1, shape.padding.1, shape.dilation.1, phase_x);
            let grid =
                ((shape.in_h - phase_y).div_ceil(shape.stride.0), (shape.in_w - phase_x).div_ceil(shape.stride.1));
            let patches = Patches {
                data: output_grad,
                image: (shape.out_h, shape.out_w),
                channels: shape.out_c,
                group: shape.group_out(),
                grid,
                step: (1, 1),
                ys,
                xs,
            };
            let rows = PhaseRows { shape, grid, phase: (phase_y, phase_x) };
            let problem = Problem {
                m: shape.batch * grid.0 * grid.1,
                n: shape.group_in(),
                k: ys.count * xs.count * shape.group_out(),
                batch: shape.groups,
                alpha: 1.0,
                accumulate,
                bias: None,
                bias_stride: 0,
            };
            let input_grad = SharedMut::new(input_grad);
            if shape.taps() == 1 {
                // The weight is a plain matrix, here transposed.
                let (group_in, group_out) = (shape.group_in(), shape.group_out());
                let batch = |group: usize| group * group_out * group_in;
                let weights = Strided { data: weight, line: 1, depth: group_in, batch };
                // SAFETY: `check` compared all sizes; the rows of C are the pixels of one class, each once.
                unsafe { multiply(pool, &problem, &patches, &weights, input_grad, &rows) };
                continue;
            }
            let weights = BackwardWeights { shape, weight, ys, xs };
            // SAFETY: as above.
            unsafe { multiply(pool, &problem, &patches, &weights, input_grad, &rows) };
        }
    }
}

/// The gradient of the weight: `weight_grad[o, i, tap] (+)= sum over pixels of output_grad * input`.
///
/// # Panics
/// As [`conv2d_forward`].
pub fn conv2d_weight_grad(
    pool: &ThreadPool,
    shape: &ConvShape,
    input: Elements,
    output_grad: Elements,
    weight_grad: &mut [f32],
    accumulate: bool,
) {
    let round = input.is_bf16() || output_grad.is_bf16();
    let (input, output_grad) = (rounded(pool, 3, input, round), rounded(pool, 4, output_grad, round));
    weight_grad_f32(pool, shape, input.as_slice(), output_grad.as_slice(), weight_grad, accumulate);
}

fn weight_grad_f32(
    pool: &ThreadPool,
    shape: &ConvShape,
    input: &[f32],
    output_grad: &[f32],
    weight_grad: &mut [f32],
    accumulate: bool,
) {
    shape.check(input.len(), weight_grad.len(), output_grad.len());
    if shape.is_depthwise() {
        return depthwise::weight_grad(pool, shape, input, output_grad, weight_grad, accumulate);
    }
    let (taps, group_in, group_out) = (shape.taps(), shape.group_in(), shape.group_out());
    let columns = taps * group_in;
    let gradient = Strided { data: output_grad, line: 1, depth: shape.out_c, batch: |group: usize| group * group_out };
    let patches = PatchColumns(Patches::of_input(shape, input));
    let problem = Problem {
        m: group_out,
        n: columns,
        k: shape.batch * shape.out_h * shape.out_w,
        batch: shape.groups,
        alpha: 1.0,
        accumulate: accumulate && taps == 1,
        bias: None,
        bias_stride: 0,
    };
    let rows = DenseRows { start: 0, row: columns, batch: group_out * columns };
    if taps == 1 || group_in == 1 {
        let problem = Problem { accumulate, ..problem };
        // SAFETY: `check` compared all sizes; the rows of C are the weight's rows.
        return unsafe { multiply(pool, &problem, &gradient, &patches, SharedMut::new(weight_grad), &rows) };
    }
    // The product has (tap, channel) as columns, the weight (channel, tap).
    let mut product = pool.shared_scratch(SLOT_CALLER, weight_grad.len());
    // SAFETY: as above; the product is as large as the weight.
    unsafe { multiply(pool, &problem, &gradient, &patches, SharedMut::new(&mut product), &rows) };
    let (product, out) = (&product[..], SharedMut::new(weight_grad));
    pool.run(shape.out_c, &|channel, _| {
        // SAFETY: each task has its own output channel.
        let out = unsafe { out.slice(channel * columns, columns) };
        for (tap, values) in product[channel * columns..][..columns].chunks_exact(group_in).enumerate() {
            let targets = out[tap..].iter_mut().step_by(taps);
            if accumulate {
                targets.zip(values).for_each(|(out, value)| *out += value);
            } else {
                targets.zip(values).for_each(|(out, value)| *out = *value);
            }
        }
    });
}

/// The taps along one axis: tap number `n` is the kernel's `first + n * step`, and reads at a pixel's position plus
/// `offset + n * distance`.
#[derive(Clone, Copy)]
struct Axis {
    count: usize,
    first: usize,
    step: usize,
    offset: isize,
    distance: isize,
}

impl Axis {
    /// All taps, for windows over the input.
    fn forward(kernel: usize, padding: usize, dilation: usize) -> Axis {
        Axis { count: kernel, first: 0, step: 1, offset: -(padding as isize), distance: dilation as isize }
    }

    /// The taps that meet input pixels of remainder `phase`, for windows over the output.
    fn phase(kernel: usize, stride: usize, padding: usize, dilation: usize, phase: usize) -> Axis {
        let meets = |tap: &usize| (phase + padding + stride * tap * dilation - tap * dilation).is_multiple_of(stride);
        let count = (0..kernel).filter(meets).count();
        let mut taps = (0..kernel).filter(meets);
        let Some(first) = taps.next() else {
            return Axis { count: 0, first: 0, step: 1, offset: 0, distance: 0 };
        };
        let step = taps.next().map_or(1, |second| second - first);
        let at = |tap: usize| (phase as isize + padding as isize - (tap * dilation) as isize) / stride as isize;
        Axis { count, first, step, offset: at(first), distance: -((step * dilation / stride) as isize) }
    }

    fn tap(&self, number: usize) -> usize {
        self.first + number * self.step
    }

    fn position(&self, pixel: usize, number: usize) -> isize {
        pixel as isize + self.offset + number as isize * self.distance
    }
}

/// Windows over an image in NHWC: lines are pixels of a grid, depth is (tap, channel).
#[derive(Clone, Copy)]
struct Patches<'a> {
    data: &'a [f32],
    image: (usize, usize),
    /// Channels of the image.
    channels: usize,
    /// Channels of a group, and so of a tap.
    group: usize,
    grid: (usize, usize),
    /// Image pixels per step of the grid.
    step: (usize, usize),
    ys: Axis,
    xs: Axis,
}

/// Longest run of values that is packed in one go.
const RUN: usize = 1024;
/// Longest row of taps that is treated as one run.
const WIDE: usize = 64;
/// What is read outside the image.
static ZEROS: [f32; RUN] = [0.0; RUN];

/// A pixel of the grid, walked in order.
#[derive(Clone, Copy)]
struct Pixel {
    image: usize,
    y: usize,
    x: usize,
}

impl<'a> Patches<'a> {
    fn of_input(shape: &ConvShape, input: &'a [f32]) -> Patches<'a> {
        Patches {
            data: input,
            image: (shape.in_h, shape.in_w),
            channels: shape.in_c,
            group: shape.group_in(),
            grid: (shape.out_h, shape.out_w),
            step: shape.stride,
            ys: Axis::forward(shape.kernel.0, shape.padding.0, shape.dilation.0),
            xs: Axis::forward(shape.kernel.1, shape.padding.1, shape.dilation.1),
        }
    }

    fn pixel(&self, line: usize) -> Pixel {
        let (row, x) = (line / self.grid.1, line % self.grid.1);
        Pixel { image: row / self.grid.0, y: row % self.grid.0, x }
    }

    fn next(&self, pixel: &mut Pixel) {
        pixel.x += 1;
        if pixel.x == self.grid.1 {
            (pixel.x, pixel.y) = (0, pixel.y + 1);
            if pixel.y == self.grid.0 {
                (pixel.y, pixel.image) = (0, pixel.image + 1);
            }
        }
    }

    /// Whether a row of taps is one run of memory that is worth to be packed as such.
    fn is_wide(&self) -> bool {
        self.group == self.channels && self.xs.distance == 1 && self.xs.count > 1 && self.xs.count * self.group <= WIDE
    }

    /// Taps and their length, with rows of taps taken as one where that pays.
    fn runs(&self) -> usize {
        if self.is_wide() { self.xs.count * self.group } else { self.group }
    }

    /// Start of a tap's channels of `group`, or none outside the image.
    fn at(&self, pixel: &Pixel, tap_y: usize, tap_x: usize, group: usize) -> Option<usize> {
        let y = self.ys.position(pixel.y * self.step.0, tap_y);
        let x = self.xs.position(pixel.x * self.step.1, tap_x);
        // A negative position is far above any size once it is unsigned.
        if y as usize >= self.image.0 || x as usize >= self.image.1 {
            return None;
        }
        let row = pixel.image * self.image.0 + y as usize;
        Some((row * self.image.1 + x as usize) * self.channels + group * self.group)
    }

    /// A row of taps of a [wide](Self::is_wide) window: the first tap inside the image, one past the last, and where
    /// the first one's values start.
    fn wide(&self, pixel: &Pixel, tap_y: usize) -> Option<(usize, usize, usize)> {
        let y = self.ys.position(pixel.y * self.step.0, tap_y);
        if y as usize >= self.image.0 {
            return None;
        }
        let x = self.xs.position(pixel.x * self.step.1, 0);
        let first = (-x).max(0) as usize;
        let last = (self.image.1 as isize - x).clamp(0, self.xs.count as isize) as usize;
        if first >= last {
            return None;
        }
        let row = pixel.image * self.image.0 + y as usize;
        Some((first, last, (row * self.image.1 + (x + first as isize) as usize) * self.channels))
    }

    /// Copies part of a row of taps, zero outside the image.
    fn copy_wide(&self, pixel: &Pixel, tap_y: usize, from: usize, out: &mut [f32]) {
        out.fill(0.0);
        if let Some((first, last, start)) = self.wide(pixel, tap_y) {
            let (low, high) = ((first * self.group).max(from), (last * self.group).min(from + out.len()));
            if low < high {
                let start = start + low - first * self.group;
                out[low - from..high - from].copy_from_slice(&self.data[start..start + high - low]);
            }
        }
    }
}

impl Panels for Patches<'_> {
    // SAFETY: what the caller promises is with the trait.
    unsafe fn pack(
        &self,
        kernels: &MicroKernels,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        let mut pixels = [self.pixel(line); MAX_NR];
        for at in 1..lines {
            pixels[at] = pixels[at - 1];
            self.next(&mut pixels[at]);
        }
        let (wide, run) = (self.is_wide(), self.runs());
        let mut edge = [[0f32; WIDE]; 16];
        let mut k = depth;
        while k < depth + len {
            let (tap, from) = (k / run, k % run);
            let count = (run - from).min(depth + len - k).min(RUN);
            for first in (0..lines).step_by(16) {
                let mut pointers = [ZEROS.as_ptr(); 16];
                let pixels = &pixels[first..lines.min(first + 16)];
                for ((pointer, edge), pixel) in pointers.iter_mut().zip(&mut edge).zip(pixels) {
                    if wide {
                        match self.wide(pixel, tap) {
                            Some((0, last, start)) if last == self.xs.count => {
                                *pointer = self.data[start + from..start + from + count].as_ptr();
                            }
                            None => {}
                            _ => {
                                self.copy_wide(pixel, tap, from, &mut edge[..count]);
                                *pointer = edge.as_ptr();
                            }
                        }
                    } else if let Some(start) = self.at(pixel, tap / self.xs.count, tap % self.xs.count, batch) {
                        *pointer = self.data[start + from..start + from + count].as_ptr();
                    }
                }
                // SAFETY: each pointer was taken from a slice of `count` floats; the destination has room by the
                // caller's promise.
                unsafe {
                    (kernels.transpose)(&pointers[..pixels.len()], count, dst.add((k - depth) * width + first), width);
                }
            }
            k += count;
        }
    }

    fn prefetch(&self, batch: usize, line: usize, lines: usize, depth: usize, len: usize) {
        // Larger windows overlap, so that most of the next panel is near already.
        if self.ys.count * self.xs.count == 1 {
            let mut pixel = self.pixel(line);
            for _ in 0..lines {
                if let Some(start) = self.at(&pixel, 0, 0, batch) {
                    prefetch(self.data.as_ptr().wrapping_add(start + depth), len);
                }
                self.next(&mut pixel);
            }
        }
    }
}

/// The same windows with lines and depth exchanged: lines are (tap, channel), depth is pixels.
struct PatchColumns<'a>(Patches<'a>);

/// Neighbouring lines of one tap and one panel.
#[derive(Clone, Copy, Default)]
struct Segment {
    tap_y: usize,
    tap_x: usize,
    from: usize,
    count: usize,
    /// Place in the first row of the packed block.
    dst: usize,
}

/// Segments that are packed together.
const SEGMENTS: usize = 64;

impl PatchColumns<'_> {
    /// Packs segments, pixel by pixel.
    ///
    /// # Safety
    /// For each of `len` rows of `width`, `dst` is writable where the segments say.
    unsafe fn pack_segments(
        &self,
        batch: usize,
        segments: &[Segment],
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        let patches = &self.0;
        let wide = patches.is_wide();
        let mut pixel = patches.pixel(depth);
        for k in 0..len {
            for segment in segments {
                let count = segment.count;
                // SAFETY: the caller's promise.
                let out = unsafe { std::slice::from_raw_parts_mut(dst.add(segment.dst + k * width), count) };
                if wide {
                    match patches.wide(&pixel, segment.tap_y) {
                        Some((0, last, start)) if last == patches.xs.count => {
                            out.copy_from_slice(&patches.data[start + segment.from..][..count]);
                        }
                        _ => patches.copy_wide(&pixel, segment.tap_y, segment.from, out),
                    }
                } else if let Some(start) = patches.at(&pixel, segment.tap_y, segment.tap_x, batch) {
                    let source = &patches.data[start + segment.from..start + segment.from + count];
                    // SAFETY: both slices have `count` floats and do not overlap.
                    unsafe { copy_lines(source.as_ptr(), 0, count, 1, out.as_mut_ptr(), 0) };
                } else {
                    out.fill(0.0);
                }
            }
            patches.next(&mut pixel);
        }
    }
}

impl Panels for PatchColumns<'_> {
    // SAFETY: what the caller promises is with the trait.
    unsafe fn pack(
        &self,
        kernels: &MicroKernels,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { self.pack_block(kernels, batch, line, lines, depth, len, dst, width) }
    }

    // SAFETY: what the caller promises is with the trait.
    unsafe fn pack_block(
        &self,
        _: &MicroKernels,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        let (wide, run) = (self.0.is_wide(), self.0.runs());
        let mut segments = [Segment::default(); SEGMENTS];
        let (mut done, mut count) = (0, 0);
        while done < lines {
            let (tap, from) = ((line + done) / run, (line + done) % run);
            let length = (run - from).min(lines - done).min(width - done % width);
            let (tap_y, tap_x) = if wide { (tap, 0) } else { (tap / self.0.xs.count, tap % self.0.xs.count) };
            let dst_at = done / width * len * width + done % width;
            segments[count] = Segment { tap_y, tap_x, from, count: length, dst: dst_at };
            (done, count) = (done + length, count + 1);
            if count == SEGMENTS || done == lines {
                // SAFETY: the caller promises the panels that the segments are in.
                unsafe { self.pack_segments(batch, &segments[..count], depth, len, dst, width) };
                count = 0;
            }
        }
    }

    fn prefetch(&self, batch: usize, line: usize, lines: usize, depth: usize, len: usize) {
        if self.0.ys.count * self.0.xs.count == 1 {
            let mut pixel = self.0.pixel(depth);
            for _ in 0..len {
                if let Some(start) = self.0.at(&pixel, 0, 0, batch) {
                    prefetch(self.0.data.as_ptr().wrapping_add(start + line), lines);
                }
                self.0.next(&mut pixel);
            }
        }
    }
}

/// The weight as columns of output channels, depth (tap, input channel).
struct ForwardWeights<'a> {
    shape: &'a ConvShape,
    weight: &'a [f32],
}

impl Panels for ForwardWeights<'_> {
    // SAFETY: what the caller promises is with the trait.
    unsafe fn pack(
        &self,
        _: &MicroKernels,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        let (taps, group) = (self.shape.taps(), self.shape.group_in());
        let first_channel = batch * self.shape.group_out() + line;
        // In memory the taps of a channel are neighbours: walk the channels, and for each the taps in range.
        for channel in 0..group {
            for tap in 0..taps {
                let k = tap * group + channel;
                if k < depth || k >= depth + len {
                    continue;
                }
                for at in 0..lines {
                    let value = self.weight[((first_channel + at) * group + channel) * taps + tap];
                    // SAFETY: `k` is in the packed range and `at` below `width`.
                    unsafe { dst.add((k - depth) * width + at).write(value) };
                }
            }
        }
    }
}

/// The weight as columns of input channels, depth (tap, output channel), for one class of input pixels.
struct BackwardWeights<'a> {
    shape: &'a ConvShape,
    weight: &'a [f32],
    ys: Axis,
    xs: Axis,
}

impl Panels for BackwardWeights<'_> {
    // SAFETY: what the caller promises is with the trait.
    unsafe fn pack(
        &self,
        _: &MicroKernels,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        let (taps, group_in, group_out) = (self.shape.taps(), self.shape.group_in(), self.shape.group_out());
        let mut k = depth;
        while k < depth + len {
            let (number, from) = (k / group_out, k % group_out);
            let count = (group_out - from).min(depth + len - k);
            let tap = self.ys.tap(number / self.xs.count) * self.shape.kernel.1 + self.xs.tap(number % self.xs.count);
            for channel in 0..count {
                let row = ((batch * group_out + from + channel) * group_in + line) * taps + tap;
                for at in 0..lines {
                    let value = self.weight[row + at * taps];
                    // SAFETY: `k + channel` is in the packed range and `at` below `width`.
                    unsafe { dst.add((k - depth + channel) * width + at).write(value) };
                }
            }
            k += count;
        }
    }
}

/// The input pixels of one class.
struct PhaseRows<'a> {
    shape: &'a ConvShape,
    grid: (usize, usize),
    phase: (usize, usize),
}

impl Rows for PhaseRows<'_> {
    fn offsets(&self, batch: usize, row: usize, offsets: &mut [usize]) {
        let shape = self.shape;
        let (mut x, line) = (row % self.grid.1, row / self.grid.1);
        let (mut y, mut image) = (line % self.grid.0, line / self.grid.0);
        for offset in offsets {
            let (pixel_y, pixel_x) = (y * shape.stride.0 + self.phase.0, x * shape.stride.1 + self.phase.1);
            let pixel = (image * shape.in_h + pixel_y) * shape.in_w + pixel_x;
            *offset = pixel * shape.in_c + batch * shape.group_in();
            x += 1;
            if x == self.grid.1 {
                (x, y) = (0, y + 1);
                if y == self.grid.0 {
                    (y, image) = (0, image + 1);
                }
            }
        }
    }
}
