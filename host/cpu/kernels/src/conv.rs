//! 2-D convolution (cross-correlation, as in PyTorch) in NHWC, as an implicit matrix multiplication.
//!
//! Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning" (2014), section 3: patches are gathered while a
//! panel is packed and are never stored as a whole. With `x` the input, `w` the weight and `g` the output's gradient:
//!
//! - forward: rows are output pixels, depth is (tap, input channel), columns are output channels;
//! - input gradient: rows are input pixels, depth is (tap, output channel), columns are input channels. With a
//!   stride, the pixels are taken in classes of equal remainder, each with just the taps that meet it;
//! - weight gradient: rows are output channels, depth is output pixels, columns are (tap, input channel).
//!
//! 3x3 kernels with stride 1 take the algorithms of `winograd` where those are faster.

use crate::blocked::{DenseRows, Problem, Rows, SLOT_CALLER, Strided, Target, multiply};
use crate::convert::{rounded, through_f32};
use crate::depthwise;
use crate::elements::{Element, Elements, ElementsMut};
use crate::few_channels;
use crate::isa::per_isa;
use crate::microkernel::Source;
use crate::moments::column_moments;
use crate::patches::{Axis, PatchColumns, Patches};
use crate::threads::{Scratch, SharedMut, ThreadPool};
use crate::{winograd, winograd_weight_grad};

/// Shared scratch: an operand in f32.
pub(crate) const SLOT_INPUT: usize = 4;
/// Shared scratch: the weight in another order or type.
const SLOT_WEIGHTS: usize = 3;
/// Shared scratch: a result in f32, where nothing is multiplied in blocks.
pub(crate) const SLOT_RESULT: usize = 0;

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
    shape.check(input.len(), weight.len(), output.len());
    if let Some(bias) = bias {
        assert!(bias.len() == shape.out_c, "conv2d: {} biases for {} channels", bias.len(), shape.out_c);
    }
    if let Some(moments) = &moments {
        let (has, needs) = (moments.len(), 2 * shape.out_c);
        assert!(has == needs, "conv2d: room for {has} moments, expected {needs}");
    }
    if let Some(variant) = winograd::choose(shape) {
        return winograd::forward(pool, variant, shape, input, weight, bias, output, accumulate, moments);
    }
    let pixels = shape.batch * shape.out_h * shape.out_w;
    let depth = shape.taps() * shape.group_in();
    if shape.is_depthwise() || pixels * depth == 0 {
        if shape.is_depthwise() {
            let half = input.is_bf16() || weight.is_bf16();
            let (input, weight) = (rounded(pool, SLOT_INPUT, input, half), rounded(pool, SLOT_WEIGHTS, weight, half));
            let (input, weight) = (input.as_slice(), weight.as_slice());
            through_f32(pool, SLOT_RESULT, output.reborrow(), accumulate, |output| {
                depthwise::forward(pool, shape, input, weight, bias, output, accumulate);
            });
        }
        if let Some(moments) = moments {
            column_moments(pool, output.as_elements(), pixels, shape.out_c, moments);
        }
        return;
    }
    let problem = Problem {
        m: pixels,
        n: shape.group_out(),
        k: depth,
        batch: shape.groups,
        alpha: 1.0,
        accumulate,
        bias,
        bias_stride: shape.group_out(),
        half: input.is_bf16() || weight.is_bf16(),
        moments: if moments.is_some() { shape.out_c } else { 0 },
    };
    let (output, moments) = (Target::new(&mut output), moments.unwrap_or_default());
    let half = problem.half;
    if few_channels::applies(shape) {
        // What is rounded is rounded already: the products are those of f32.
        let (image, shape) = few_channels::padded(pool, shape, input, half);
        let problem = Problem { half: false, ..problem };
        return forward(pool, &shape, &problem, image.as_slice(), weight, half, output, moments);
    }
    match input {
        Elements::F32(input) => forward(pool, shape, &problem, input, weight, half, output, moments),
        Elements::Bf16(input) => forward(pool, shape, &problem, input, weight, half, output, moments),
    }
}

#[allow(clippy::too_many_arguments)]
fn forward<T: Source>(
    pool: &ThreadPool,
    shape: &ConvShape,
    problem: &Problem,
    input: &[T],
    weight: Elements,
    half: bool,
    output: Target,
    moments: &mut [f32],
) {
    let patches = Patches::of_input(shape, input);
    let rows = DenseRows { start: 0, row: shape.out_c, batch: shape.group_out() };
    // With one tap the weight is the matrix: output channels by depth.
    let taps = shape.taps();
    let by_tap = (taps > 1).then(|| TapWeights::by_output(pool, shape, weight, half));
    let weight = by_tap.as_ref().map_or(weight, TapWeights::elements);
    let line = taps * shape.group_in();
    let batch = |group: usize| group * shape.group_out() * line;
    // SAFETY: all sizes were compared; the rows of C are the output's pixels.
    unsafe {
        match weight {
            Elements::F32(data) => {
                let weights = Strided { data, line, depth: 1, batch };
                multiply(pool, problem, &patches, &weights, output, &rows, moments);
            }
            Elements::Bf16(data) => {
                let weights = Strided { data, line, depth: 1, batch };
                multiply(pool, problem, &patches, &weights, output, &rows, moments);
            }
        }
    }
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
    mut input_grad: ElementsMut,
    accumulate: bool,
) {
    shape.check(input_grad.len(), weight.len(), output_grad.len());
    if let Some(variant) = winograd::choose(shape) {
        return winograd::input_grad(pool, variant, shape, output_grad, weight, input_grad, accumulate);
    }
    if shape.is_depthwise() {
        let half = output_grad.is_bf16() || weight.is_bf16();
        let gradient = rounded(pool, SLOT_INPUT, output_grad, half);
        let weight = rounded(pool, SLOT_WEIGHTS, weight, half);
        let (gradient, weight) = (gradient.as_slice(), weight.as_slice());
        return through_f32(pool, SLOT_RESULT, input_grad, accumulate, |input_grad| {
            depthwise::input_grad(pool, shape, gradient, weight, input_grad, accumulate);
        });
    }
    let half = output_grad.is_bf16() || weight.is_bf16();
    let input_grad = Target::new(&mut input_grad);
    for phase_y in 0..shape.stride.0.min(shape.in_h) {
        for phase_x in 0..shape.stride.1.min(shape.in_w) {
            let phase = (phase_y, phase_x);
            match output_grad {
                Elements::F32(gradient) => {
                    input_phase(pool, shape, phase, gradient, weight, half, input_grad, accumulate)
                }
                Elements::Bf16(gradient) => {
                    input_phase(pool, shape, phase, gradient, weight, half, input_grad, accumulate)
                }
            }
        }
    }
}

/// The gradient of the input pixels of one class.
#[allow(clippy::too_many_arguments)]
fn input_phase<T: Source>(
    pool: &ThreadPool,
    shape: &ConvShape,
    phase: (usize, usize),
    gradient: &[T],
    weight: Elements,
    half: bool,
    input_grad: Target,
    accumulate: bool,
) {
    // Input pixel i meets tap t of output o where i + padding = o stride + t dilation.
    let ys = Axis::phase(shape.kernel.0, shape.stride.0, shape.padding.0, shape.dilation.0, phase.0);
    let xs = Axis::phase(shape.kernel.1, shape.stride.1, shape.padding.1, shape.dilation.1, phase.1);
    let grid = ((shape.in_h - phase.0).div_ceil(shape.stride.0), (shape.in_w - phase.1).div_ceil(shape.stride.1));
    let patches = Patches {
        data: gradient,
        image: (shape.out_h, shape.out_w),
        channels: shape.out_c,
        group: shape.group_out(),
        grid,
        step: (1, 1),
        ys,
        xs,
        wide: false,
    };
    let rows = PhaseRows { shape, grid, phase };
    let problem = Problem {
        m: shape.batch * grid.0 * grid.1,
        n: shape.group_in(),
        k: ys.count * xs.count * shape.group_out(),
        batch: shape.groups,
        alpha: 1.0,
        accumulate,
        bias: None,
        bias_stride: 0,
        half,
        moments: 0,
    };
    // With one tap the weight is the matrix: depth by input channels.
    let by_tap = (shape.taps() > 1).then(|| TapWeights::by_tap(pool, shape, weight, half, ys, xs));
    let weight = by_tap.as_ref().map_or(weight, TapWeights::elements);
    let batch = |group: usize| group * problem.k * shape.group_in();
    // SAFETY: all sizes were compared; the rows of C are the pixels of one class, each once.
    unsafe {
        match weight {
            Elements::F32(data) => {
                let weights = Strided { data, line: 1, depth: shape.group_in(), batch };
                multiply(pool, &problem, &patches, &weights, input_grad, &rows, &mut []);
            }
            Elements::Bf16(data) => {
                let weights = Strided { data, line: 1, depth: shape.group_in(), batch };
                multiply(pool, &problem, &patches, &weights, input_grad, &rows, &mut []);
            }
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
    shape.check(input.len(), weight_grad.len(), output_grad.len());
    if let Some(variant) = winograd::choose(shape) {
        return winograd_weight_grad::weight_grad(pool, variant, shape, input, output_grad, weight_grad, accumulate);
    }
    if shape.is_depthwise() {
        let half = input.is_bf16() || output_grad.is_bf16();
        let input = rounded(pool, SLOT_INPUT, input, half);
        let gradient = rounded(pool, SLOT_WEIGHTS, output_grad, half);
        return depthwise::weight_grad(pool, shape, input.as_slice(), gradient.as_slice(), weight_grad, accumulate);
    }
    if few_channels::applies(shape) {
        return few_channels::weight_grad(pool, shape, input, output_grad, weight_grad, accumulate);
    }
    use Elements::{Bf16, F32};
    match (input, output_grad) {
        (F32(input), F32(gradient)) => weight_product(pool, shape, input, gradient, weight_grad, accumulate, false),
        (F32(input), Bf16(gradient)) => weight_product(pool, shape, input, gradient, weight_grad, accumulate, true),
        (Bf16(input), F32(gradient)) => weight_product(pool, shape, input, gradient, weight_grad, accumulate, true),
        (Bf16(input), Bf16(gradient)) => weight_product(pool, shape, input, gradient, weight_grad, accumulate, true),
    }
}

fn weight_product<T: Source, G: Source>(
    pool: &ThreadPool,
    shape: &ConvShape,
    input: &[T],
    output_grad: &[G],
    weight_grad: &mut [f32],
    accumulate: bool,
    half: bool,
) {
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
        half,
        moments: 0,
    };
    let rows = DenseRows { start: 0, row: columns, batch: group_out * columns };
    if taps == 1 || group_in == 1 {
        let problem = Problem { accumulate, ..problem };
        let weight_grad = Target::F32(SharedMut::new(weight_grad));
        // SAFETY: `check` compared all sizes; the rows of C are the weight's rows.
        return unsafe { multiply(pool, &problem, &gradient, &patches, weight_grad, &rows, &mut []) };
    }
    // The product has (tap, channel) as columns, the weight (channel, tap).
    let mut product = pool.shared_scratch(SLOT_CALLER, weight_grad.len());
    // SAFETY: as above; the product is as large as the weight.
    unsafe {
        let product = Target::F32(SharedMut::new(&mut product));
        multiply(pool, &problem, &gradient, &patches, product, &rows, &mut []);
    }
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

/// The weight with the taps outside the channels, in scratch memory; in bf16 if it is multiplied as such.
struct TapWeights<'a> {
    values: Scratch<'a>,
    half: bool,
}

impl<'a> TapWeights<'a> {
    /// As `[output channel][tap][input channel]`.
    fn by_output(pool: &'a ThreadPool, shape: &ConvShape, weight: Elements, half: bool) -> Self {
        let (taps, group_in) = (shape.taps(), shape.group_in());
        Self::reordered(pool, shape, weight, half, taps, &|tap| tap, &|channel, tap| (channel * taps + tap) * group_in)
    }

    /// As `[group][tap][output channel][input channel]`, with the taps of one class of input pixels.
    fn by_tap(pool: &'a ThreadPool, shape: &ConvShape, weight: Elements, half: bool, ys: Axis, xs: Axis) -> Self {
        let (count, group_in, group_out) = (ys.count * xs.count, shape.group_in(), shape.group_out());
        let tap = |number: usize| ys.tap(number / xs.count) * shape.kernel.1 + xs.tap(number % xs.count);
        let place = |channel: usize, number: usize| {
            let (group, channel) = (channel / group_out, channel % group_out);
            ((group * count + number) * group_out + channel) * group_in
        };
        Self::reordered(pool, shape, weight, half, count, &tap, &place)
    }

    /// Puts the values of tap `tap(number)` of each output channel at `place(channel, number)`.
    fn reordered(
        pool: &'a ThreadPool,
        shape: &ConvShape,
        weight: Elements,
        half: bool,
        count: usize,
        tap: &(dyn Fn(usize) -> usize + Sync),
        place: &(dyn Fn(usize, usize) -> usize + Sync),
    ) -> Self {
        let len = count * shape.out_c * shape.group_in();
        let mut values = pool.shared_scratch(SLOT_WEIGHTS, if half { len.div_ceil(2) } else { len });
        match (weight, half) {
            (Elements::F32(weight), false) => reorder(pool, shape, weight, &mut values, count, tap, place),
            (Elements::Bf16(weight), false) => reorder(pool, shape, weight, &mut values, count, tap, place),
            (Elements::F32(weight), true) => reorder(pool, shape, weight, values.as_bf16_mut(), count, tap, place),
            (Elements::Bf16(weight), true) => reorder(pool, shape, weight, values.as_bf16_mut(), count, tap, place),
        }
        TapWeights { values, half }
    }

    fn elements(&self) -> Elements<'_> {
        if self.half { Elements::Bf16(self.values.as_bf16()) } else { Elements::F32(&self.values) }
    }
}

fn reorder<S: Element, D: Element>(
    pool: &ThreadPool,
    shape: &ConvShape,
    weight: &[S],
    out: &mut [D],
    count: usize,
    tap: &(dyn Fn(usize) -> usize + Sync),
    place: &(dyn Fn(usize, usize) -> usize + Sync),
) {
    let (taps, group_in) = (shape.taps(), shape.group_in());
    let out = SharedMut::new(out);
    pool.run(shape.out_c, &|channel, _| {
        let values = &weight[channel * group_in * taps..][..group_in * taps];
        for number in 0..count {
            // SAFETY: each channel and tap has its own place.
            let out = unsafe { out.slice(place(channel, number), group_in) };
            take_strided(pool.isa(), &values[tap(number)..], taps, out);
        }
    });
}

per_isa! {
/// Every `stride`-th value.
fn take_strided<S: Element, D: Element>(from: &[S], stride: usize, out: &mut [D]) {
    for (out, from) in out.iter_mut().zip(from.iter().step_by(stride)) {
        *out = D::narrow(from.widen());
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
