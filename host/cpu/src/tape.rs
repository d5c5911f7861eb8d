//! The instructions of a fused kernel over one tile: plain loops over short vectors in the first cache.

use crate::math;
use clip_host_compiler::kernel::stochastic_bf16;
use clip_host_cpu_kernels::elements::{narrowed, widened};
use clip_host_cpu_kernels::{bf16, f16};
use clip_host_plugin_api::interpret::{mix, word};
use clip_host_plugin_api::ir::{Binary, Compare, Unary};

/// An operand of a loop: a vector, or one value for all its elements.
#[derive(Clone, Copy)]
pub enum Arg {
    Vector(*const f32),
    Value(f32),
}

impl Arg {
    /// The operand from element `at` on.
    ///
    /// # Safety
    /// A vector must have more than `at` elements.
    #[inline(always)]
    pub unsafe fn at(self, at: usize) -> Arg {
        match self {
            // SAFETY: in bounds by the caller's promise.
            Arg::Vector(p) => Arg::Vector(unsafe { p.add(at) }),
            value => value,
        }
    }
}

/// `out[i] = f(a[i])`.
///
/// # Safety
/// Vectors have at least `n` readable elements, `out` `n` writable ones; `out` may be `a` itself but not overlap it
/// otherwise.
#[inline(always)]
unsafe fn map1(a: Arg, out: *mut f32, n: usize, f: impl Fn(f32) -> f32) {
    match a {
        Arg::Vector(a) => {
            for i in 0..n {
                // SAFETY: i < n.
                unsafe { *out.add(i) = f(*a.add(i)) };
            }
        }
        Arg::Value(a) => {
            let value = f(a);
            for i in 0..n {
                // SAFETY: i < n.
                unsafe { *out.add(i) = value };
            }
        }
    }
}

/// `out[i] = f(a[i], b[i])`.
///
/// # Safety
/// As [`map1`].
#[inline(always)]
unsafe fn map2(a: Arg, b: Arg, out: *mut f32, n: usize, f: impl Fn(f32, f32) -> f32) {
    // SAFETY: i < n in each loop.
    unsafe {
        match (a, b) {
            (Arg::Vector(a), Arg::Vector(b)) => (0..n).for_each(|i| *out.add(i) = f(*a.add(i), *b.add(i))),
            (Arg::Vector(a), Arg::Value(b)) => (0..n).for_each(|i| *out.add(i) = f(*a.add(i), b)),
            (Arg::Value(a), Arg::Vector(b)) => (0..n).for_each(|i| *out.add(i) = f(a, *b.add(i))),
            (Arg::Value(a), Arg::Value(b)) => {
                let value = f(a, b);
                (0..n).for_each(|i| *out.add(i) = value);
            }
        }
    }
}

/// Copies, or fills.
///
/// # Safety
/// As [`map1`].
#[inline(always)]
pub unsafe fn unary_identity(a: Arg, out: *mut f32, n: usize) {
    // SAFETY: the caller's promise is passed on.
    unsafe { map1(a, out, n, |x| x) }
}

/// Copies, or fills, with 0 for what is subnormal.
///
/// # Safety
/// As [`map1`].
#[inline(always)]
pub unsafe fn keep(a: Arg, out: *mut f32, n: usize) {
    // SAFETY: the caller's promise is passed on.
    unsafe { map1(a, out, n, math::without_subnormals) }
}

/// Stores floats as integers, towards zero.
///
/// # Safety
/// As [`map1`].
#[inline(always)]
pub unsafe fn to_integers(a: Arg, out: *mut i32, n: usize) {
    // SAFETY: i < n in each loop.
    unsafe {
        match a {
            Arg::Vector(a) => (0..n).for_each(|i| *out.add(i) = *a.add(i) as i32),
            Arg::Value(a) => (0..n).for_each(|i| *out.add(i) = a as i32),
        }
    }
}

/// Reads bf16.
///
/// # Safety
/// `a` has `n` readable elements, `out` `n` writable ones.
#[inline(always)]
pub unsafe fn widen(a: *const bf16, out: *mut f32, n: usize) {
    // SAFETY: i < n.
    (0..n).for_each(|i| unsafe { *out.add(i) = widened(*a.add(i)) });
}

/// Writes bf16.
///
/// # Safety
/// As [`map1`].
#[inline(always)]
pub unsafe fn narrow(a: Arg, out: *mut bf16, n: usize) {
    // SAFETY: i < n in each loop.
    unsafe {
        match a {
            Arg::Vector(a) => (0..n).for_each(|i| *out.add(i) = narrowed(*a.add(i))),
            Arg::Value(a) => (0..n).for_each(|i| *out.add(i) = narrowed(a)),
        }
    }
}

/// Writes bf16, [rounded at random](stochastic_bf16): element `i` by the word of (seed, stream, `first + i`).
///
/// # Safety
/// As [`map1`].
#[inline(always)]
pub unsafe fn narrow_at_random(a: Arg, (seed, stream, first): (u64, u32, u64), out: *mut bf16, n: usize) {
    let round = |value: f32, i: usize| bf16::from_bits(stochastic_bf16(value, word(seed, stream, first + i as u64)));
    // SAFETY: i < n in each loop.
    unsafe {
        match a {
            Arg::Vector(a) => (0..n).for_each(|i| *out.add(i) = round(*a.add(i), i)),
            Arg::Value(a) => (0..n).for_each(|i| *out.add(i) = round(a, i)),
        }
    }
}

/// Writes f16.
///
/// # Safety
/// As [`map1`].
pub unsafe fn narrow_f16(a: Arg, out: *mut f16, n: usize) {
    // SAFETY: i < n in each loop.
    unsafe {
        match a {
            Arg::Vector(a) => (0..n).for_each(|i| *out.add(i) = f16::from_f32(*a.add(i))),
            Arg::Value(a) => (0..n).for_each(|i| *out.add(i) = f16::from_f32(a)),
        }
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// A line of elements on its way to memory.
#[repr(align(64))]
struct Line<T, const N: usize>([T; N]);

/// `out[i] = f(a[i])` past the caches, a line at a time: no line is read before it is written. [`fence`] must follow
/// before another thread reads.
///
/// # Safety
/// As [`map1`]; `out` is aligned to its type.
#[inline(always)]
pub unsafe fn stream<T: Copy>(a: Arg, out: *mut T, n: usize, f: impl Fn(f32) -> T) {
    const { assert!(size_of::<T>() == 4 || size_of::<T>() == 2) };
    // SAFETY: as in the parts, which cover 0..n.
    unsafe {
        let per_line = LINE / size_of::<T>();
        let head = out.align_offset(LINE).min(n);
        let body = (n - head) / per_line * per_line;
        map_to(a, out, head, &f);
        match size_of::<T>() {
            4 => stream_lines::<T, 16>(a.at(head), out.add(head), body, &f),
            _ => stream_lines::<T, 32>(a.at(head), out.add(head), body, &f),
        }
        map_to(a.at(head + body), out.add(head + body), n - head - body, &f);
    }
}

/// # Safety
/// As [`map1`].
#[inline(always)]
unsafe fn map_to<T>(a: Arg, out: *mut T, n: usize, f: impl Fn(f32) -> T) {
    for i in 0..n {
        // SAFETY: i < n.
        unsafe {
            *out.add(i) = match a {
                Arg::Vector(a) => f(*a.add(i)),
                Arg::Value(a) => f(a),
            };
        }
    }
}

/// # Safety
/// As [`map1`]; `n` is a multiple of `N`, `N` elements are a line, and `out` is where one begins.
#[inline(always)]
unsafe fn stream_lines<T: Copy, const N: usize>(a: Arg, out: *mut T, n: usize, f: impl Fn(f32) -> T) {
    for at in (0..n).step_by(N) {
        // SAFETY: at + N ≤ n; both lines are aligned, and 64 bytes long.
        unsafe {
            let line = Line(match a {
                Arg::Vector(a) => std::array::from_fn::<T, N, _>(|i| f(*a.add(at + i))),
                Arg::Value(a) => [f(a); N],
            });
            #[cfg(target_arch = "x86_64")]
            {
                use std::arch::x86_64::{__m128i, _mm_load_si128, _mm_stream_si128};
                let (from, to) = ((&raw const line.0).cast::<__m128i>(), out.add(at).cast::<__m128i>());
                for part in 0..LINE / 16 {
                    _mm_stream_si128(to.add(part), _mm_load_si128(from.add(part)));
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            std::ptr::copy_nonoverlapping((&raw const line.0).cast::<T>(), out.add(at), N);
        }
    }
}

/// Writes f32 past the caches.
///
/// # Safety
/// As [`stream`].
#[inline(always)]
pub unsafe fn stream_single(a: Arg, out: *mut f32, n: usize) {
    // SAFETY: the caller's promise is passed on.
    unsafe { stream(a, out, n, |v| v) }
}

/// Writes bf16 past the caches.
///
/// # Safety
/// As [`stream`].
#[inline(always)]
pub unsafe fn stream_half(a: Arg, out: *mut bf16, n: usize) {
    // SAFETY: the caller's promise is passed on.
    unsafe { stream(a, out, n, narrowed) }
}

/// Makes streamed results visible to whoever this thread hands over to.
#[inline(always)]
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction, which only orders stores.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// # Safety
/// As [`map1`].
#[inline(always)]
pub unsafe fn unary(op: Unary, a: Arg, out: *mut f32, n: usize) {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match op {
            Unary::Neg => map1(a, out, n, |x| -x),
            Unary::Exp => map1(a, out, n, math::exp),
            Unary::Ln => map1(a, out, n, math::ln),
            Unary::Sqrt => map1(a, out, n, f32::sqrt),
            Unary::Recip => map1(a, out, n, |x| 1.0 / x),
            Unary::Tanh => map1(a, out, n, math::tanh),
            Unary::Erf => map1(a, out, n, math::erf),
            Unary::Sin => map1(a, out, n, f32::sin),
            Unary::Cos => map1(a, out, n, f32::cos),
            Unary::Abs => map1(a, out, n, f32::abs),
        }
    }
}

/// NaN in either argument gives NaN, as in PyTorch.
#[inline(always)]
fn maximum(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

#[inline(always)]
fn minimum(a: f32, b: f32) -> f32 {
    if a < b || a.is_nan() { a } else { b }
}

/// # Safety
/// As [`map1`].
#[inline(always)]
pub unsafe fn binary(op: Binary, a: Arg, b: Arg, out: *mut f32, n: usize) {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match op {
            Binary::Add => map2(a, b, out, n, |x, y| x + y),
            Binary::Sub => map2(a, b, out, n, |x, y| x - y),
            Binary::Mul => map2(a, b, out, n, |x, y| x * y),
            Binary::Div => map2(a, b, out, n, |x, y| x / y),
            Binary::Maximum => map2(a, b, out, n, maximum),
            Binary::Minimum => map2(a, b, out, n, minimum),
            Binary::Pow => map2(a, b, out, n, f32::powf),
        }
    }
}

/// An op of a [`pair`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    Add,
    Sub,
    /// The second operand minus the first.
    SubFrom,
    Mul,
}

#[inline(always)]
fn arithmetic<const OP: u8>(x: f32, y: f32) -> f32 {
    match OP {
        0 => x + y,
        1 => x - y,
        2 => y - x,
        _ => x * y,
    }
}

/// `out[i] = (a[i] first b[i]) second c[i]`: two ops in one loop, rounded as by two.
///
/// # Safety
/// As [`map1`].
#[inline(always)]
pub unsafe fn pair(ops: (Arithmetic, Arithmetic), a: Arg, b: Arg, c: Arg, out: *mut f32, n: usize) {
    use Arithmetic::{Add, Mul, Sub, SubFrom};
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match ops {
            (Add, Add) => map3::<0, 0>(a, b, c, out, n),
            (Add, Sub) => map3::<0, 1>(a, b, c, out, n),
            (Add, SubFrom) => map3::<0, 2>(a, b, c, out, n),
            (Add, Mul) => map3::<0, 3>(a, b, c, out, n),
            (Sub, Add) => map3::<1, 0>(a, b, c, out, n),
            (Sub, Sub) => map3::<1, 1>(a, b, c, out, n),
            (Sub, SubFrom) => map3::<1, 2>(a, b, c, out, n),
            (Sub, Mul) => map3::<1, 3>(a, b, c, out, n),
            (SubFrom, Add) => map3::<2, 0>(a, b, c, out, n),
            (SubFrom, Sub) => map3::<2, 1>(a, b, c, out, n),
            (SubFrom, SubFrom) => map3::<2, 2>(a, b, c, out, n),
            (SubFrom, Mul) => map3::<2, 3>(a, b, c, out, n),
            (Mul, Add) => map3::<3, 0>(a, b, c, out, n),
            (Mul, Sub) => map3::<3, 1>(a, b, c, out, n),
            (Mul, SubFrom) => map3::<3, 2>(a, b, c, out, n),
            (Mul, Mul) => map3::<3, 3>(a, b, c, out, n),
        }
    }
}

/// # Safety
/// As [`map1`].
#[inline(always)]
unsafe fn map3<const FIRST: u8, const SECOND: u8>(a: Arg, b: Arg, c: Arg, out: *mut f32, n: usize) {
    use Arg::{Value, Vector};
    let f = |x: f32, y: f32, z: f32| arithmetic::<SECOND>(arithmetic::<FIRST>(x, y), z);
    // SAFETY: i < n in each loop.
    unsafe {
        match (a, b, c) {
            (Vector(a), Vector(b), Vector(c)) => {
                (0..n).for_each(|i| *out.add(i) = f(*a.add(i), *b.add(i), *c.add(i)));
            }
            (Vector(a), Vector(b), Value(c)) => (0..n).for_each(|i| *out.add(i) = f(*a.add(i), *b.add(i), c)),
            (Vector(a), Value(b), Vector(c)) => (0..n).for_each(|i| *out.add(i) = f(*a.add(i), b, *c.add(i))),
            (Value(a), Vector(b), Vector(c)) => (0..n).for_each(|i| *out.add(i) = f(a, *b.add(i), *c.add(i))),
            (Vector(a), Value(b), Value(c)) => (0..n).for_each(|i| *out.add(i) = f(*a.add(i), b, c)),
            (Value(a), Vector(b), Value(c)) => (0..n).for_each(|i| *out.add(i) = f(a, *b.add(i), c)),
            (Value(a), Value(b), Vector(c)) => (0..n).for_each(|i| *out.add(i) = f(a, b, *c.add(i))),
            (Value(a), Value(b), Value(c)) => {
                let value = f(a, b, c);
                (0..n).for_each(|i| *out.add(i) = value);
            }
        }
    }
}

/// # Safety
/// As [`map1`].
#[inline(always)]
pub unsafe fn compare(op: Compare, a: Arg, b: Arg, out: *mut f32, n: usize) {
    let mask = |hit: bool| if hit { 1.0 } else { 0.0 };
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match op {
            Compare::Lt => map2(a, b, out, n, |x, y| mask(x < y)),
            Compare::Le => map2(a, b, out, n, |x, y| mask(x <= y)),
            Compare::Eq => map2(a, b, out, n, |x, y| mask(x == y)),
        }
    }
}

/// # Safety
/// As [`map1`].
#[inline(always)]
pub unsafe fn select(c: Arg, a: Arg, b: Arg, out: *mut f32, n: usize) {
    // SAFETY: the caller's promise is passed on; i < n in each loop.
    unsafe {
        match (c, a, b) {
            (Arg::Value(c), a, b) => map1(if c != 0.0 { a } else { b }, out, n, |x| x),
            (Arg::Vector(c), Arg::Vector(a), Arg::Vector(b)) => {
                (0..n).for_each(|i| *out.add(i) = if *c.add(i) != 0.0 { *a.add(i) } else { *b.add(i) });
            }
            (Arg::Vector(c), Arg::Value(a), Arg::Vector(b)) => {
                (0..n).for_each(|i| *out.add(i) = if *c.add(i) != 0.0 { a } else { *b.add(i) });
            }
            (Arg::Vector(c), Arg::Vector(a), Arg::Value(b)) => {
                (0..n).for_each(|i| *out.add(i) = if *c.add(i) != 0.0 { *a.add(i) } else { b });
            }
            (Arg::Vector(c), Arg::Value(a), Arg::Value(b)) => {
                (0..n).for_each(|i| *out.add(i) = if *c.add(i) != 0.0 { a } else { b });
            }
        }
    }
}

/// Lanes of a sum: fixed, so that the result does not depend on the processor's vectors.
const LANES: usize = 16;

/// Folds `n` elements: in 16 lanes, then pairwise.
///
/// # Safety
/// `a` has `n` readable elements.
#[inline(always)]
unsafe fn fold(a: *const f32, n: usize, start: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let whole = n - n % LANES;
    for i in (0..whole).step_by(LANES) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            // SAFETY: i + lane < whole ≤ n.
            *total = f(*total, unsafe { *a.add(i + lane) });
        }
    }
    if whole < n {
        // What is missing to whole lanes starts as they did, which changes none of them.
        for (lane, total) in lanes.iter_mut().enumerate() {
            // SAFETY: whole + lane < n.
            let value = if whole + lane < n { unsafe { *a.add(whole + lane) } } else { start };
            *total = f(*total, value);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = f(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// # Safety
/// `a` has `n` readable elements.
#[inline(always)]
pub unsafe fn sum(a: *const f32, n: usize) -> f32 {
    // SAFETY: the caller's promise is passed on.
    unsafe { fold(a, n, 0.0, |x, y| x + y) }
}

/// # Safety
/// `a` has `n` readable elements.
#[inline(always)]
pub unsafe fn max(a: *const f32, n: usize) -> f32 {
    // SAFETY: the caller's promise is passed on.
    unsafe { fold(a, n, f32::NEG_INFINITY, maximum) }
}

/// The sum (or the maximum) of each of `rows` rows of `n` elements that follow each other.
///
/// # Safety
/// `a` has `rows · n` readable elements, `out` has `rows` writable ones.
#[inline(always)]
pub unsafe fn reduce_rows(is_max: bool, a: *const f32, rows: usize, n: usize, out: *mut f32) {
    for row in 0..rows {
        // SAFETY: the caller's promise is passed on.
        unsafe {
            let from = a.add(row * n);
            *out.add(row) = if is_max { max(from, n) } else { sum(from, n) };
        }
    }
}

/// Elements that [`repeat_rows`] may write past its end.
pub const SLACK: usize = 16;

/// Writes each of `rows` values `n` times, row after row.
///
/// # Safety
/// `a` has `rows` readable elements, `out` has `rows · n + SLACK` writable ones.
#[inline(always)]
pub unsafe fn repeat_rows(a: *const f32, rows: usize, n: usize, out: *mut f32) {
    for row in 0..rows {
        // SAFETY: the caller's promise; what is written past a row's end, the next row overwrites.
        unsafe {
            let values = [*a.add(row); SLACK];
            for start in (0..n).step_by(SLACK) {
                out.add(row * n + start).cast::<[f32; SLACK]>().write_unaligned(values);
            }
        }
    }
}

/// Adds (or takes the maximum of) a vector into another.
///
/// # Safety
/// Both have `n` elements and do not overlap.
#[inline(always)]
pub unsafe fn accumulate(is_max: bool, a: Arg, into: *mut f32, n: usize) {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match is_max {
            true => map2(Arg::Vector(into), a, into, n, maximum),
            false => map2(Arg::Vector(into), a, into, n, |x, y| x + y),
        }
    }
}

/// [`accumulate`] for `rows` rows of `n` elements that follow each other, in that order.
///
/// # Safety
/// A vector has `rows · n` elements, `into` has `n`; they do not overlap.
#[inline(always)]
pub unsafe fn accumulate_rows(is_max: bool, a: Arg, rows: usize, into: *mut f32, n: usize) {
    let Arg::Vector(rows_start) = a else {
        // SAFETY: the caller's promise is passed on.
        return (0..rows).for_each(|_| unsafe { accumulate(is_max, a, into, n) });
    };
    // SAFETY: each call takes whole blocks of what is left of the columns.
    unsafe {
        let mut done = 0;
        accumulate_blocks::<64>(is_max, rows_start, rows, into, n, &mut done);
        accumulate_blocks::<16>(is_max, rows_start, rows, into, n, &mut done);
        accumulate_blocks::<8>(is_max, rows_start, rows, into, n, &mut done);
        accumulate_blocks::<1>(is_max, rows_start, rows, into, n, &mut done);
    }
}

/// [`accumulate_rows`] from column `done` on, in blocks of columns whose totals stay in registers, as far as whole blocks
/// go.
///
/// # Safety
/// As [`accumulate_rows`], of a vector.
#[inline(always)]
unsafe fn accumulate_blocks<const BLOCK: usize>(
    is_max: bool,
    from: *const f32,
    rows: usize,
    into: *mut f32,
    n: usize,
    done: &mut usize,
) {
    while *done + BLOCK <= n {
        // SAFETY: done + BLOCK ≤ n, row < rows.
        unsafe {
            let totals = into.add(*done).cast::<[f32; BLOCK]>();
            let mut sums = totals.read();
            for row in 0..rows {
                let values = from.add(row * n + *done).cast::<[f32; BLOCK]>();
                for (sum, value) in sums.iter_mut().zip(&*values) {
                    *sum = if is_max { maximum(*sum, *value) } else { *sum + *value };
                }
            }
            totals.write(sums);
        }
        *done += BLOCK;
    }
}

/// The random numbers of [`clip_host_plugin_api::interpret::uniform`] for elements `first..first + n`.
///
/// # Safety
/// `out` has `n` writable elements.
#[inline(always)]
pub unsafe fn uniform(seed: u64, stream: u32, first: u64, out: *mut f32, n: usize) {
    let key = mix(seed ^ mix(u64::from(stream).wrapping_add(0x9e37_79b9_7f4a_7c15)));
    for i in 0..n {
        let bits = mix(key ^ (first + i as u64).wrapping_mul(0xd134_2543_de82_ef95)) >> 40;
        // SAFETY: i < n.
        unsafe { *out.add(i) = bits as f32 / (1u64 << 24) as f32 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streamed_results_are_complete_and_stay_in_bounds() {
        let from: Vec<f32> = (0..300).map(|i| i as f32 * 0.37 - 50.0).collect();
        // Every alignment that a tile may begin at, lengths with and without whole lines.
        for (start, n) in (0..40).flat_map(|start| [0, 1, 15, 16, 33, 128, 200].map(|n| (start, n))) {
            let (mut floats, mut halves) = ([7.0f32; 300], [bf16::from_f32(7.0); 300]);
            for (a, expected) in [(Arg::Vector(from.as_ptr()), &from[..n]), (Arg::Value(3.0), &[3.0; 300][..n])] {
                // SAFETY: start + n < 300.
                unsafe {
                    stream(a, floats.as_mut_ptr().add(start), n, |v| v);
                    stream(a, halves.as_mut_ptr().add(start), n, narrowed);
                }
                fence();
                assert_eq!(floats[start..start + n], *expected);
                assert!(expected.iter().zip(&halves[start..]).all(|(&e, h)| narrowed(e) == *h));
                let outside = (0..start).chain(start + n..300);
                assert!(outside.clone().all(|i| floats[i] == 7.0 && halves[i].to_f32() == 7.0));
            }
        }
    }
}
