//! The micro-kernel for AVX2 with fused multiply-add.

use std::arch::x86_64::*;

use super::portable::{finish, rows, transpose};
use super::{MicroKernels, Packers, Tile};
use crate::elements::{Element, bf16};

pub(super) static PLAIN: MicroKernels = MicroKernels { in_place: true, ..table::<false>() };
pub(super) static ROUNDED: MicroKernels = table::<true>();

const MR: usize = 6;
const NR: usize = 16;
/// How many rows ahead B is brought near, as for AVX-512.
const AHEAD: usize = 16;

const fn table<const ROUND: bool>() -> MicroKernels {
    MicroKernels {
        mr: MR,
        nr: NR,
        pair: 1,
        in_place: false,
        multiply,
        from_f32: Packers { transpose: transpose::<f32, ROUND>, rows: rows_avx2::<f32, ROUND> },
        from_bf16: Packers { transpose: transpose::<bf16, ROUND>, rows: rows_avx2::<bf16, ROUND> },
    }
}

/// 6x16: 12 accumulators, two columns of B, two broadcasts of A.
///
/// # Safety
/// See [`MicroKernels::multiply`].
unsafe fn multiply(tile: &Tile) {
    macro_rules! dispatch {
        ($($rows:literal)*) => {
            // SAFETY: this table is chosen only where AVX2 and FMA were detected; the rest is the caller's promise.
            unsafe {
                match (tile.rows, tile.cols > 8) {
                    $(($rows, true) => multiply_tile::<$rows, 2>(tile),
                      ($rows, false) => multiply_tile::<$rows, 1>(tile),)*
                    _ => debug_assert!(false, "a tile of {} rows", tile.rows),
                }
            }
        };
    }
    dispatch!(1 2 3 4 5 6)
}

/// # Safety
/// See [`MicroKernels::multiply`].
#[target_feature(enable = "avx2,fma")]
// Counted loops over constants, which the compiler unrolls into registers.
#[allow(clippy::needless_range_loop)]
unsafe fn multiply_tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
    let mut acc = [[_mm256_setzero_ps(); VECTORS]; ROWS];
    let (mut a, mut b) = (tile.a, tile.b);
    let tail = tile.cols - 8 * (VECTORS - 1);
    let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(tail as i32), lanes);
    // SAFETY: reads and writes stay in the ranges promised by the caller; columns past `cols` are masked.
    unsafe {
        if let Some(lines) = &tile.lines {
            for run in 0..lines.runs {
                let starts = lines.starts.add(run).cast::<[*const f32; ROWS]>().read();
                for k in 0..lines.run {
                    let columns = columns_ahead::<VECTORS>(b);
                    for row in 0..ROWS {
                        let value = _mm256_set1_ps(*starts[row].add(k * lines.step));
                        for v in 0..VECTORS {
                            acc[row][v] = _mm256_fmadd_ps(value, columns[v], acc[row][v]);
                        }
                    }
                    b = b.wrapping_add(NR);
                }
            }
        } else {
            for _ in 0..tile.depth {
                let columns = columns_ahead::<VECTORS>(b);
                for row in 0..ROWS {
                    let value = _mm256_set1_ps(*a.add(row));
                    for v in 0..VECTORS {
                        acc[row][v] = _mm256_fmadd_ps(value, columns[v], acc[row][v]);
                    }
                }
                a = a.add(MR);
                b = b.wrapping_add(NR);
            }
        }
        let alpha = _mm256_set1_ps(tile.alpha);
        if tile.narrow.is_some() || tile.moments.is_some() {
            let mut values = [[0f32; NR]; ROWS];
            for row in 0..ROWS {
                for v in 0..VECTORS {
                    _mm256_storeu_ps(values[row][8 * v..].as_mut_ptr(), _mm256_mul_ps(alpha, acc[row][v]));
                }
            }
            return finish(tile, values.as_flattened(), NR);
        }
        for row in 0..ROWS {
            let c = tile.c.add(*tile.c_rows.add(row));
            for v in 0..VECTORS {
                let partial = v + 1 == VECTORS && tail < 8;
                let load = |from: *const f32| {
                    if partial { _mm256_maskload_ps(from, mask) } else { _mm256_loadu_ps(from) }
                };
                let mut value = if tile.accumulate {
                    _mm256_fmadd_ps(alpha, acc[row][v], load(c.add(8 * v)))
                } else {
                    _mm256_mul_ps(alpha, acc[row][v])
                };
                if !tile.bias.is_null() {
                    value = _mm256_add_ps(value, load(tile.bias.add(8 * v)));
                }
                if partial {
                    _mm256_maskstore_ps(c.add(8 * v), mask, value);
                } else {
                    _mm256_storeu_ps(c.add(8 * v), value);
                }
            }
        }
    }
}

/// A row of packed B, while a later one is brought near.
///
/// # Safety
/// The row is readable.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn columns_ahead<const VECTORS: usize>(b: *const f32) -> [__m256; VECTORS] {
    let mut columns = [_mm256_setzero_ps(); VECTORS];
    _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD * NR).cast::<i8>());
    for (v, column) in columns.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { *column = _mm256_loadu_ps(b.add(8 * v)) };
    }
    columns
}

/// # Safety
/// See [`Packers::rows`].
unsafe fn rows_avx2<T: Element, const ROUND: bool>(
    from: [*const T; 2],
    step: usize,
    lines: usize,
    len: usize,
    dst: *mut f32,
    width: usize,
) {
    #[target_feature(enable = "avx2,fma")]
    unsafe fn compiled<T: Element, const ROUND: bool>(
        from: [*const T; 2],
        step: usize,
        lines: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { rows::<T, ROUND>(from, step, lines, len, dst, width) }
    }
    // SAFETY: this table is chosen only where AVX2 was detected; the rest is the caller's promise.
    unsafe { compiled::<T, ROUND>(from, step, lines, len, dst, width) }
}
