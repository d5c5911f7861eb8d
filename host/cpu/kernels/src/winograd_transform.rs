//! The linear maps of Winograd's algorithms for a 3x3 kernel, along one axis, and their application to tiles.
//!
//! An algorithm multiplies two polynomials by their values at some points (and at infinity): with `m` outputs there
//! are `m + 2` of them. `F(2, 3)` has the points 0, 1, -1. `F(4, 3)` has 0, ±1/√2, ±√2, whose rounding errors are
//! a fifth of those of the usual 0, ±1, ±2. The names of the matrices are those of Lavin and Gray.
//!
//! Loops and arrays only, and no closures: a library function between the code here and the vector operations could
//! stay a call, compiled without the instruction set.

use crate::winograd_vector::{Load, Store, Vector};

/// A linear map along one axis.
pub(crate) trait Map<const FROM: usize, const TO: usize> {
    fn map<V: Vector>(from: [V; FROM]) -> [V; TO];
}

/// The maps of an algorithm with `SIDE` points and `OUT` outputs of three taps.
pub(crate) trait Algorithm<const SIDE: usize, const OUT: usize>: Sync {
    /// B': values of an input window.
    type Data: Map<SIDE, SIDE>;
    /// G: values of a kernel.
    type Kernel: Map<3, SIDE>;
    /// A': outputs from products.
    type Output: Map<SIDE, OUT>;
    /// G of the algorithm with the same points whose kernel is a tile of the output's gradient.
    type Gradient: Map<OUT, SIDE>;
    /// A' of that algorithm: the kernel's gradient from sums of products.
    type KernelGradient: Map<SIDE, 3>;
}

/// F(2, 3): 16 products for 36 in two dimensions.
pub(crate) struct F2;

impl Algorithm<4, 2> for F2 {
    type Data = F2Data;
    type Kernel = F2Kernel;
    type Output = F2Output;
    type Gradient = F2Gradient;
    type KernelGradient = F2KernelGradient;
}

/// [`Algorithm::Data`] of [`F2`].
pub(crate) struct F2Data;

impl Map<4, 4> for F2Data {
    #[inline(always)]
    fn map<V: Vector>([d0, d1, d2, d3]: [V; 4]) -> [V; 4] {
        [d0 - d2, d1 + d2, d2 - d1, d3 - d1]
    }
}

/// [`Algorithm::Kernel`] of [`F2`].
pub(crate) struct F2Kernel;

impl Map<3, 4> for F2Kernel {
    #[inline(always)]
    fn map<V: Vector>([g0, g1, g2]: [V; 3]) -> [V; 4] {
        let (even, odd) = ((g0 + g2).scaled(0.5), g1.scaled(0.5));
        [g0, even + odd, even - odd, g2]
    }
}

/// [`Algorithm::Output`] of [`F2`].
pub(crate) struct F2Output;

impl Map<4, 2> for F2Output {
    #[inline(always)]
    fn map<V: Vector>([m0, m1, m2, m3]: [V; 4]) -> [V; 2] {
        [m0 + (m1 + m2), (m1 - m2) + m3]
    }
}

/// [`Algorithm::Gradient`] of [`F2`].
pub(crate) struct F2Gradient;

impl Map<2, 4> for F2Gradient {
    #[inline(always)]
    fn map<V: Vector>([g0, g1]: [V; 2]) -> [V; 4] {
        let (even, odd) = (g0.scaled(0.5), g1.scaled(0.5));
        [g0, even + odd, even - odd, g1]
    }
}

/// [`Algorithm::KernelGradient`] of [`F2`].
pub(crate) struct F2KernelGradient;

impl Map<4, 3> for F2KernelGradient {
    #[inline(always)]
    fn map<V: Vector>([m0, m1, m2, m3]: [V; 4]) -> [V; 3] {
        let sum = m1 + m2;
        [m0 + sum, m1 - m2, sum + m3]
    }
}

/// F(4, 3): 36 products for 144 in two dimensions.
pub(crate) struct F4;

impl Algorithm<6, 4> for F4 {
    type Data = F4Data;
    type Kernel = F4Kernel;
    type Output = F4Output;
    type Gradient = F4Gradient;
    type KernelGradient = F4KernelGradient;
}

/// The points of [`F4`] other than zero: ±P and ±Q, with squares 1/2 and 2.
const P: f32 = std::f32::consts::FRAC_1_SQRT_2;
const Q: f32 = std::f32::consts::SQRT_2;
/// One over the product of a point's distances from the others: 1 at zero, these at ±P and ±Q.
const AT_P: f32 = -2.0 / 3.0;
const AT_Q: f32 = 1.0 / 6.0;

/// [`Algorithm::Data`] of [`F4`].
pub(crate) struct F4Data;

impl Map<6, 6> for F4Data {
    #[inline(always)]
    fn map<V: Vector>([d0, d1, d2, d3, d4, d5]: [V; 6]) -> [V; 6] {
        let (even_p, odd_p) = (d4.plus_scaled(-2.0, d2), d3.plus_scaled(-2.0, d1));
        let (even_q, odd_q) = (d4.plus_scaled(-0.5, d2), d3.plus_scaled(-0.5, d1));
        [
            (d0 + d4).plus_scaled(-2.5, d2),
            even_p.plus_scaled(P, odd_p),
            even_p.plus_scaled(-P, odd_p),
            even_q.plus_scaled(Q, odd_q),
            even_q.plus_scaled(-Q, odd_q),
            (d1 + d5).plus_scaled(-2.5, d3),
        ]
    }
}

/// [`Algorithm::Kernel`] of [`F4`].
pub(crate) struct F4Kernel;

impl Map<3, 6> for F4Kernel {
    #[inline(always)]
    fn map<V: Vector>([g0, g1, g2]: [V; 3]) -> [V; 6] {
        let (even_p, odd_p) = (g0.plus_scaled(0.5, g2).scaled(AT_P), g1.scaled(P * AT_P));
        let (even_q, odd_q) = (g0.plus_scaled(2.0, g2).scaled(AT_Q), g1.scaled(Q * AT_Q));
        [g0, even_p + odd_p, even_p - odd_p, even_q + odd_q, even_q - odd_q, g2]
    }
}

/// [`Algorithm::Output`] of [`F4`].
pub(crate) struct F4Output;

impl Map<6, 4> for F4Output {
    #[inline(always)]
    fn map<V: Vector>([m0, m1, m2, m3, m4, m5]: [V; 6]) -> [V; 4] {
        let (sum_p, gap_p, sum_q, gap_q) = (m1 + m2, m1 - m2, m3 + m4, m3 - m4);
        [
            m0 + (sum_p + sum_q),
            gap_p.scaled(P).plus_scaled(Q, gap_q),
            sum_p.scaled(0.5).plus_scaled(2.0, sum_q),
            m5.plus_scaled(0.5 * P, gap_p).plus_scaled(2.0 * Q, gap_q),
        ]
    }
}

/// [`Algorithm::Gradient`] of [`F4`].
pub(crate) struct F4Gradient;

impl Map<4, 6> for F4Gradient {
    #[inline(always)]
    fn map<V: Vector>([g0, g1, g2, g3]: [V; 4]) -> [V; 6] {
        let even_p = g0.plus_scaled(0.5, g2).scaled(AT_P);
        let odd_p = g1.plus_scaled(0.5, g3).scaled(P * AT_P);
        let even_q = g0.plus_scaled(2.0, g2).scaled(AT_Q);
        let odd_q = g1.plus_scaled(2.0, g3).scaled(Q * AT_Q);
        [g0, even_p + odd_p, even_p - odd_p, even_q + odd_q, even_q - odd_q, g3]
    }
}

/// [`Algorithm::KernelGradient`] of [`F4`].
pub(crate) struct F4KernelGradient;

impl Map<6, 3> for F4KernelGradient {
    #[inline(always)]
    fn map<V: Vector>([m0, m1, m2, m3, m4, m5]: [V; 6]) -> [V; 3] {
        let (sum_p, gap_p, sum_q, gap_q) = (m1 + m2, m1 - m2, m3 + m4, m3 - m4);
        [
            m0 + (sum_p + sum_q),
            gap_p.scaled(P).plus_scaled(Q, gap_q),
            m5.plus_scaled(0.5, sum_p).plus_scaled(2.0, sum_q),
        ]
    }
}

/// Applies a map along both axes of a square.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn both_axes<V: Vector, M: Map<FROM, TO>, const FROM: usize, const TO: usize>(
    square: [[V; FROM]; FROM],
) -> [[V; TO]; TO] {
    let mut rows = [M::map(square[0]); FROM];
    for y in 1..FROM {
        rows[y] = M::map(square[y]);
    }
    let mut out = [[rows[0][0]; TO]; TO];
    for x in 0..TO {
        let mut column = [rows[0][x]; FROM];
        for y in 1..FROM {
            column[y] = rows[y][x];
        }
        let column = M::map(column);
        for y in 0..TO {
            out[y][x] = column[y];
        }
    }
    out
}

/// A square of an image in NHWC, part of which may lie outside.
#[derive(Clone, Copy, Default)]
pub(crate) struct Window {
    /// Offset of the first pixel, inside or not.
    pub start: isize,
    /// Distance of two rows.
    pub row: usize,
    /// Distance of two pixels.
    pub pixel: usize,
    /// The rows from the first to before the second are inside.
    pub ys: (usize, usize),
    /// The same for columns.
    pub xs: (usize, usize),
}

impl Window {
    #[inline(always)]
    fn offset(&self, y: usize, x: usize) -> isize {
        self.start + (y * self.row + x * self.pixel) as isize
    }

    #[inline(always)]
    fn contains(&self, y: usize, x: usize) -> bool {
        self.ys.0 <= y && y < self.ys.1 && self.xs.0 <= x && x < self.xs.1
    }

    #[inline(always)]
    fn is_whole(&self, side: usize) -> bool {
        self.ys == (0, side) && self.xs == (0, side)
    }
}

/// Where the channels of a transformed tile go: point `p` of channel `c` lies at
/// `p * point + c / width * panel + c % width`.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub point: usize,
    pub width: usize,
    pub panel: usize,
}

/// Loads a window of all channels, zero outside the image, and stores its values at the points.
///
/// # Safety
/// The processor has the instruction set; what the window says to be inside is inside `data` for `channels` values
/// at each pixel, and the layout for `channels` rounded up to 16 is inside `to`.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
pub(crate) unsafe fn spread<V: Vector, S: Load, M: Map<FROM, SIDE>, const FROM: usize, const SIDE: usize>(
    data: *const S,
    window: &Window,
    channels: usize,
    to: *mut f32,
    layout: &Layout,
) {
    let whole = window.is_whole(FROM);
    let mut channel = 0;
    while channel < channels {
        let count = V::LANES.min(channels - channel);
        let data = data.wrapping_add(channel);
        // SAFETY: only what is inside is read; the points are within the layout.
        unsafe {
            let mut square = [[V::splat(0.0); FROM]; FROM];
            if whole && count == V::LANES {
                for y in 0..FROM {
                    for x in 0..FROM {
                        square[y][x] = S::load(data.offset(window.offset(y, x)), V::LANES);
                    }
                }
            } else {
                for y in 0..FROM {
                    for x in 0..FROM {
                        if window.contains(y, x) {
                            square[y][x] = S::load(data.offset(window.offset(y, x)), count);
                        }
                    }
                }
            }
            let values = both_axes::<V, M, FROM, SIDE>(square);
            let to = to.add(channel / layout.width * layout.panel + channel % layout.width);
            for y in 0..SIDE {
                for x in 0..SIDE {
                    values[y][x].store(to.add((y * SIDE + x) * layout.point));
                }
            }
        }
        channel += V::LANES;
    }
}

/// What is done with outputs on their way to memory; pointers are to the first of the channels in hand.
#[derive(Clone, Copy)]
pub(crate) struct Epilogue {
    /// Null, or a value to add for each channel.
    pub bias: *const f32,
    /// Add to what is there, or overwrite it.
    pub accumulate: bool,
    /// Null, or where to sum what is stored, less the first value: see [`MOMENTS`].
    pub moments: *mut f32,
    /// Distance of two of the sums.
    pub moments_stride: usize,
}

/// Sums for the moments of a channel: its first value; the sum of the differences from it; the sum of their squares.
pub(crate) const MOMENTS: usize = 3;

/// Computes the outputs of a tile from products at `from + p * point`, and stores those inside the image.
///
/// If `first`, the tile is the first to be summed for the moments: it has an output inside the image.
///
/// # Safety
/// The processor has the instruction set; the products are readable for `channels` rounded up to 16; the bias, and
/// three sums for the moments, for `channels`; and what the window says to be inside is inside `data`, for `channels`
/// values at each pixel.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
pub(crate) unsafe fn collect<V: Vector, D: Store, M: Map<SIDE, OUT>, const SIDE: usize, const OUT: usize>(
    from: *const f32,
    point: usize,
    channels: usize,
    data: *mut D,
    window: &Window,
    epilogue: &Epilogue,
    first: bool,
) {
    let plain = window.is_whole(OUT) && epilogue.bias.is_null() && !epilogue.accumulate;
    let mut channel = 0;
    while channel < channels {
        let count = V::LANES.min(channels - channel);
        let data = data.wrapping_add(channel);
        // SAFETY: products are readable for whole vectors; only what is inside is written.
        unsafe {
            let mut values = both_axes::<V, M, SIDE, OUT>(load_square(from.add(channel), point));
            if plain && count == V::LANES {
                for y in 0..OUT {
                    for x in 0..OUT {
                        values[y][x] = D::store(values[y][x], data.offset(window.offset(y, x)), V::LANES);
                    }
                }
            } else {
                let mut bias = V::splat(0.0);
                if !epilogue.bias.is_null() {
                    bias = V::load_first(epilogue.bias.add(channel), count);
                }
                for y in 0..OUT {
                    for x in 0..OUT {
                        if window.contains(y, x) {
                            let to = data.offset(window.offset(y, x));
                            let mut value = values[y][x] + bias;
                            if epilogue.accumulate {
                                value = value + D::load(to, count);
                            }
                            values[y][x] = D::store(value, to, count);
                        }
                    }
                }
            }
            if !epilogue.moments.is_null() {
                let at = epilogue.moments.add(channel);
                add_moments(&values, window, at, epilogue.moments_stride, count, first);
            }
        }
        channel += V::LANES;
    }
}

/// Adds the outputs inside the image to the sums for the moments.
///
/// # Safety
/// The processor has the instruction set, and `count` values are readable and writable at each sum.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
unsafe fn add_moments<V: Vector, const OUT: usize>(
    values: &[[V; OUT]; OUT],
    window: &Window,
    sums: *mut f32,
    stride: usize,
    count: usize,
    first: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let pivot = if first { values[0][0] } else { V::load_first(sums, count) };
        // A tile's own sums first: adding up short sums loses less than adding to a long one.
        let (mut sum, mut square) = (V::splat(0.0), V::splat(0.0));
        for y in 0..OUT {
            for x in 0..OUT {
                if window.contains(y, x) {
                    let difference = values[y][x] - pivot;
                    sum = sum + difference;
                    square = square.plus(difference, difference);
                }
            }
        }
        if first {
            pivot.store_first(sums, count);
        } else {
            sum = sum + V::load_first(sums.add(stride), count);
            square = square + V::load_first(sums.add(2 * stride), count);
        }
        sum.store_first(sums.add(stride), count);
        square.store_first(sums.add(2 * stride), count);
    }
}

/// A square of vectors, each `point` after the one before.
///
/// # Safety
/// The processor has the instruction set, and all points are readable.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
unsafe fn load_square<V: Vector, const SIDE: usize>(from: *const f32, point: usize) -> [[V; SIDE]; SIDE] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut square = [[V::splat(0.0); SIDE]; SIDE];
        for y in 0..SIDE {
            for x in 0..SIDE {
                square[y][x] = V::load(from.add((y * SIDE + x) * point));
            }
        }
        square
    }
}

/// Kernels that are transformed together: enough for a whole vector of any instruction set.
pub(crate) const KERNELS: usize = 16;

/// Computes the values of 16 kernels at the points: tap `t` of kernel `lane` is at `taps[16 t + lane]`, or in reverse
/// order if `flip`, and point `p` goes to `to[p * point + lane]`. If `round`, taps are rounded to bf16 first.
///
/// # Safety
/// The processor has the instruction set, and both sides are large enough.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
pub(crate) unsafe fn spread_kernels<V: Vector, M: Map<3, SIDE>, const SIDE: usize>(
    taps: *const f32,
    flip: bool,
    round: bool,
    to: *mut f32,
    point: usize,
) {
    let mut lane = 0;
    while lane < KERNELS {
        // SAFETY: the caller's promise.
        unsafe {
            let mut square: [[V; 3]; 3] = load_square(taps.add(lane), KERNELS);
            if flip {
                let [a, b, c] = square;
                square = [[c[2], c[1], c[0]], [b[2], b[1], b[0]], [a[2], a[1], a[0]]];
            }
            if round {
                for y in 0..3 {
                    for x in 0..3 {
                        square[y][x] = square[y][x].rounded();
                    }
                }
            }
            let values = both_axes::<V, M, 3, SIDE>(square);
            for y in 0..SIDE {
                for x in 0..SIDE {
                    values[y][x].store(to.add(lane + (y * SIDE + x) * point));
                }
            }
        }
        lane += V::LANES;
    }
}

/// Computes the gradients of 16 kernels from sums of products at `from + p * point`: tap `t` of kernel `lane` goes to
/// `taps[16 t + lane]`.
///
/// # Safety
/// The processor has the instruction set, and both sides are large enough.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
pub(crate) unsafe fn collect_kernels<V: Vector, M: Map<SIDE, 3>, const SIDE: usize>(
    from: *const f32,
    point: usize,
    taps: *mut f32,
) {
    let mut lane = 0;
    while lane < KERNELS {
        // SAFETY: the caller's promise.
        unsafe {
            let gradient = both_axes::<V, M, SIDE, 3>(load_square(from.add(lane), point));
            for y in 0..3 {
                for x in 0..3 {
                    gradient[y][x].store(taps.add(lane + (3 * y + x) * KERNELS));
                }
            }
        }
        lane += V::LANES;
    }
}
