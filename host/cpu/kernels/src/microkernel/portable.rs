//! The micro-kernel in plain Rust, and what the tables for f32 words share.

use super::{MicroKernels, Packers, Tile};
use crate::elements::{Element, bf16};

pub(super) static PLAIN: MicroKernels = MicroKernels { in_place: true, ..table::<false>() };
pub(super) static ROUNDED: MicroKernels = table::<true>();

const fn table<const ROUND: bool>() -> MicroKernels {
    MicroKernels {
        mr: 4,
        nr: 8,
        pair: 1,
        in_place: false,
        multiply,
        from_f32: Packers { transpose: transpose::<f32, ROUND>, rows: rows::<f32, ROUND> },
        from_bf16: Packers { transpose: transpose::<bf16, ROUND>, rows: rows::<bf16, ROUND> },
    }
}

/// 4x8: sixteen four-lane registers hold the tile on any 64-bit machine.
///
/// # Safety
/// See [`MicroKernels::multiply`].
#[allow(clippy::needless_range_loop)]
unsafe fn multiply(tile: &Tile) {
    const MR: usize = 4;
    const NR: usize = 8;
    // Indexed by constants only, so that the compiler keeps it in registers.
    let mut acc = [[0f32; NR]; MR];
    // SAFETY: packed panels have whole rows and columns.
    unsafe {
        for k in 0..tile.depth {
            let a = match &tile.lines {
                None => tile.a.add(k * MR).cast::<[f32; MR]>().read(),
                Some(lines) => {
                    // Rows past the last one have no start: the first one's stands in for them.
                    let starts = lines.starts.add(k / lines.run).cast::<[*const f32; MR]>().read();
                    let at = k % lines.run * lines.step;
                    std::array::from_fn(|row| *starts[if row < tile.rows { row } else { 0 }].add(at))
                }
            };
            let b = tile.b.add(k * NR).cast::<[f32; NR]>().read();
            for row in 0..MR {
                for col in 0..NR {
                    acc[row][col] += a[row] * b[col];
                }
            }
        }
    }
    for row in acc.iter_mut() {
        row.iter_mut().for_each(|sum| *sum *= tile.alpha);
    }
    // SAFETY: the tile is inside C, by the caller's promise.
    unsafe { finish(tile, acc.as_flattened(), NR) };
}

/// Adds what is to be added to a tile of products, stores it, and sums it where that is asked for.
///
/// # Safety
/// As for [`MicroKernels::multiply`]; `values` holds rows of `width` products.
#[inline(always)]
pub(super) unsafe fn finish(tile: &Tile, values: &[f32], width: usize) {
    for (row, values) in values.chunks_exact(width).enumerate().take(tile.rows) {
        for (col, value) in values.iter().enumerate().take(tile.cols) {
            let mut value = *value;
            // SAFETY: the element is in C, the bias, the rounded result and the sums.
            unsafe {
                let c = tile.c.wrapping_add(*tile.c_rows.add(row) + col);
                if tile.accumulate {
                    value += c.read();
                }
                if !tile.bias.is_null() {
                    value += tile.bias.add(col).read();
                }
                match tile.narrow {
                    None => c.write(value),
                    Some(narrow) => {
                        let out = narrow.out.add(*narrow.rows.add(row) + col);
                        if narrow.accumulate {
                            value += out.read().widen();
                        }
                        let rounded = bf16::narrow(value);
                        out.write(rounded);
                        value = rounded.widen();
                    }
                }
                if let Some(moments) = tile.moments {
                    let pivot = moments.pivots.add(col);
                    let (sum, square) = (pivot.add(moments.stride), pivot.add(2 * moments.stride));
                    if row == 0 && moments.first {
                        pivot.write(value);
                        sum.write(0.0);
                        square.write(0.0);
                    }
                    let difference = value - pivot.read();
                    sum.write(sum.read() + difference);
                    square.write(square.read() + difference * difference);
                }
            }
        }
    }
}

/// An element as an f32 word.
#[inline(always)]
fn word<T: Element, const ROUND: bool>(value: T) -> f32 {
    if ROUND { bf16::narrow(value.widen()).widen() } else { value.widen() }
}

/// # Safety
/// See [`Packers::transpose`].
pub(super) unsafe fn transpose<T: Element, const ROUND: bool>(
    lines: &[*const T],
    len: usize,
    dst: *mut f32,
    stride: usize,
) {
    // Blocks of the depth keep the destination in L1 while the lines are read one after the other.
    for start in (0..len).step_by(64) {
        for (line, source) in lines.iter().enumerate() {
            for k in start..len.min(start + 64) {
                // SAFETY: the caller promises `len` readable elements per line and room for all of them.
                unsafe { dst.add(k * stride + line).write(word::<T, ROUND>(source.add(k).read())) };
            }
        }
    }
}

/// Transposes through a copy in f32, for instruction sets that have a transpose of f32.
///
/// # Safety
/// See [`Packers::transpose`].
#[inline(always)]
pub(super) unsafe fn transpose_copied<T: Element, const ROUND: bool>(
    lines: &[*const T],
    len: usize,
    dst: *mut f32,
    stride: usize,
    transpose: impl Fn(&[*const f32], usize, *mut f32, usize),
) {
    const PART: usize = 64;
    let mut copies = [[0f32; PART]; 16];
    for start in (0..len).step_by(PART) {
        let count = (len - start).min(PART);
        let mut pointers = [std::ptr::null(); 16];
        for ((copy, pointer), line) in copies.iter_mut().zip(&mut pointers).zip(lines) {
            // SAFETY: the caller promises `len` readable elements per line.
            let values = unsafe { std::slice::from_raw_parts(line.add(start), count) };
            copy.iter_mut().zip(values).for_each(|(copy, value)| *copy = word::<T, ROUND>(*value));
            *pointer = copy.as_ptr();
        }
        let count_lines = lines.len().min(16);
        transpose(&pointers[..count_lines], count, dst.wrapping_add(start * stride), stride);
    }
}

/// # Safety
/// See [`Packers::rows`].
#[inline(always)]
pub(super) unsafe fn rows<T: Element, const ROUND: bool>(
    rows: [*const T; 2],
    step: usize,
    lines: usize,
    len: usize,
    dst: *mut f32,
    width: usize,
) {
    // A length known to the compiler becomes a few vector moves.
    macro_rules! fixed {
        ($lines:literal) => {
            for k in 0..len {
                // SAFETY: the caller promises the ranges.
                unsafe {
                    let values = rows[0].add(k * step).cast::<[T; $lines]>().read();
                    dst.add(k * width).cast::<[f32; $lines]>().write(values.map(word::<T, ROUND>));
                }
            }
        };
    }
    match lines {
        32 => fixed!(32),
        16 => fixed!(16),
        12 => fixed!(12),
        6 => fixed!(6),
        4 => fixed!(4),
        _ => {
            for k in 0..len {
                for line in 0..lines {
                    // SAFETY: the caller promises the ranges.
                    unsafe {
                        dst.add(k * width + line).write(word::<T, ROUND>(rows[0].add(k * step + line).read()));
                    }
                }
            }
        }
    }
}
