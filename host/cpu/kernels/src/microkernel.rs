//! Register tiles of the matrix multiplication, one set per instruction set, and the transposes that pack for them.
//!
//! A micro-kernel multiplies a packed panel of up to `mr` rows of A with a packed panel of up to `nr` columns of B:
//! the tile of C stays in registers while it walks the depth. A new element type is a new [`MicroKernels`] table.

use crate::isa::Isa;

/// One call of a micro-kernel: `C[rows, cols] (+)= alpha * A[rows, depth] * B[depth, cols] (+ bias[cols])`.
pub(crate) struct Tile {
    /// Packed A: `a[k * mr + row]`.
    pub a: *const f32,
    /// B: `b[k * b_stride + col]`; `b_stride` is `nr` for a packed panel.
    pub b: *const f32,
    pub b_stride: usize,
    pub depth: usize,
    /// First element of the tile's columns in C; row `r` lies `c_rows[r]` elements further.
    pub c: *mut f32,
    pub c_rows: *const usize,
    pub rows: usize,
    pub cols: usize,
    pub alpha: f32,
    /// Add to C, or overwrite it.
    pub accumulate: bool,
    /// Null, or `cols` values to add to each row.
    pub bias: *const f32,
}

/// The micro-kernel of an instruction set, its tile size, and its packing transposes.
pub(crate) struct MicroKernels {
    /// Rows of a tile.
    pub mr: usize,
    /// Columns of a tile.
    pub nr: usize,
    /// # Safety
    /// The processor has the instruction set; `0 < rows <= mr`, `0 < cols <= nr`; A is readable for `depth * mr`
    /// floats, B for `cols` floats rounded up to whole vectors at each of `depth` rows if it is packed, C and the
    /// bias for `rows` by `cols`.
    pub multiply: unsafe fn(&Tile),
    /// Transposes up to 16 lines: `dst[k * stride + line] = lines[line][k]` for `k < len`.
    ///
    /// # Safety
    /// The processor has the instruction set; each line is readable for `len` floats; `dst` is writable for
    /// `(len - 1) * stride + 16` floats. What follows the last line's element in a row of `dst` is left undefined
    /// for up to 16 floats, so that panels are packed in ascending order.
    pub transpose: unsafe fn(lines: &[*const f32], len: usize, dst: *mut f32, stride: usize),
}

/// Largest `mr` of any table.
pub(crate) const MAX_MR: usize = 12;
/// Largest `nr` of any table.
pub(crate) const MAX_NR: usize = 32;
/// Floats that [`MicroKernels::transpose`] may write past the end of a panel.
pub(crate) const SLACK: usize = 16;

/// The table for an instruction set.
pub(crate) fn micro_kernels(isa: Isa) -> &'static MicroKernels {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => &x86::AVX512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &x86::AVX2,
        _ => &PORTABLE,
    }
}

/// Asks for `len` floats from `start` on to be brought into the second-level cache; a hint without effect on results.
#[inline(always)]
pub(crate) fn prefetch(start: *const f32, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..len).step_by(16) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch does not access memory as far as the program can tell, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(at).cast::<i8>()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, len);
}

static PORTABLE: MicroKernels =
    MicroKernels { mr: 4, nr: 8, multiply: multiply_portable, transpose: transpose_portable };

/// 4x8 in plain Rust: sixteen four-lane registers hold the tile on any 64-bit machine.
///
/// # Safety
/// See [`MicroKernels::multiply`].
#[allow(clippy::needless_range_loop)]
unsafe fn multiply_portable(tile: &Tile) {
    const MR: usize = 4;
    const NR: usize = 8;
    let mut acc = [[0f32; NR]; MR];
    // SAFETY: all offsets are within the ranges promised by the caller.
    unsafe {
        if tile.cols == NR || tile.b_stride == NR {
            // A tile of its own, indexed by constants only, so that the compiler keeps it in registers.
            let mut sums = [[0f32; NR]; MR];
            for k in 0..tile.depth {
                let a = tile.a.add(k * MR).cast::<[f32; MR]>().read();
                let b = tile.b.add(k * tile.b_stride).cast::<[f32; NR]>().read();
                for row in 0..MR {
                    for col in 0..NR {
                        sums[row][col] += a[row] * b[col];
                    }
                }
            }
            acc = sums;
        } else {
            for k in 0..tile.depth {
                for (row, sums) in acc.iter_mut().enumerate().take(tile.rows) {
                    let value = tile.a.add(k * MR + row).read();
                    for (col, sum) in sums.iter_mut().enumerate().take(tile.cols) {
                        *sum += value * tile.b.add(k * tile.b_stride + col).read();
                    }
                }
            }
        }
        for (row, sums) in acc.iter().enumerate().take(tile.rows) {
            let c = tile.c.add(tile.c_rows.add(row).read());
            for (col, sum) in sums.iter().enumerate().take(tile.cols) {
                let mut value = tile.alpha * sum;
                if tile.accumulate {
                    value += c.add(col).read();
                }
                if !tile.bias.is_null() {
                    value += tile.bias.add(col).read();
                }
                c.add(col).write(value);
            }
        }
    }
}

/// # Safety
/// See [`MicroKernels::transpose`].
unsafe fn transpose_portable(lines: &[*const f32], len: usize, dst: *mut f32, stride: usize) {
    // Blocks of the depth keep the destination in L1 while the lines are read one after the other.
    for start in (0..len).step_by(64) {
        for (line, source) in lines.iter().enumerate() {
            for k in start..len.min(start + 64) {
                // SAFETY: the caller promises `len` readable floats per line and room for all of them.
                unsafe { dst.add(k * stride + line).write(source.add(k).read()) };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{MicroKernels, Tile, transpose_portable};
    use std::arch::x86_64::*;

    pub(super) static AVX512: MicroKernels =
        MicroKernels { mr: 12, nr: 32, multiply: multiply_avx512, transpose: transpose_avx512 };
    pub(super) static AVX2: MicroKernels =
        MicroKernels { mr: 6, nr: 16, multiply: multiply_avx2, transpose: transpose_avx2 };

    /// 12x32: 24 accumulators, two columns of B, the rest broadcasts of A.
    ///
    /// # Safety
    /// See [`MicroKernels::multiply`].
    unsafe fn multiply_avx512(tile: &Tile) {
        macro_rules! dispatch {
            ($($rows:literal)*) => {
                // SAFETY: this table is chosen only where AVX-512F was detected; the rest is the caller's promise.
                unsafe {
                    match (tile.rows, tile.cols > 16) {
                        $(($rows, true) => tile_avx512::<$rows, 2>(tile),
                          ($rows, false) => tile_avx512::<$rows, 1>(tile),)*
                        _ => debug_assert!(false, "a tile of {} rows", tile.rows),
                    }
                }
            };
        }
        dispatch!(1 2 3 4 5 6 7 8 9 10 11 12)
    }

    /// # Safety
    /// See [`MicroKernels::multiply`].
    #[target_feature(enable = "avx512f")]
    // Counted loops over constants, which the compiler unrolls into registers.
    #[allow(clippy::needless_range_loop)]
    unsafe fn tile_avx512<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
        const MR: usize = 12;
        let mut acc = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        let (mut a, mut b) = (tile.a, tile.b);
        let tail = tile.cols - 16 * (VECTORS - 1);
        let mask = (0xffffu32 >> (16 - tail)) as __mmask16;
        // SAFETY: reads and writes stay in the ranges promised by the caller; columns past `cols` are masked.
        unsafe {
            // The tile is on its way from memory while the product is computed.
            for row in 0..ROWS {
                let c = tile.c.wrapping_add(*tile.c_rows.add(row));
                for v in 0..VECTORS {
                    _mm_prefetch::<_MM_HINT_ET0>(c.wrapping_add(16 * v).cast::<i8>());
                }
            }
            // A packed panel has whole vectors, so that only B read in place needs the mask.
            let b_mask = if tile.b_stride == 32 { 0xffff } else { mask };
            if b_mask == 0xffff {
                for _ in 0..tile.depth {
                    let mut columns = [_mm512_setzero_ps(); VECTORS];
                    for (v, column) in columns.iter_mut().enumerate() {
                        *column = _mm512_loadu_ps(b.add(16 * v));
                    }
                    for row in 0..ROWS {
                        let value = _mm512_set1_ps(*a.add(row));
                        for v in 0..VECTORS {
                            acc[row][v] = _mm512_fmadd_ps(value, columns[v], acc[row][v]);
                        }
                    }
                    a = a.add(MR);
                    b = b.wrapping_add(tile.b_stride);
                }
            } else {
                for _ in 0..tile.depth {
                    let mut columns = [_mm512_setzero_ps(); VECTORS];
                    for (v, column) in columns.iter_mut().enumerate() {
                        let mask = if v + 1 == VECTORS { b_mask } else { 0xffff };
                        *column = _mm512_maskz_loadu_ps(mask, b.add(16 * v));
                    }
                    for row in 0..ROWS {
                        let value = _mm512_set1_ps(*a.add(row));
                        for v in 0..VECTORS {
                            acc[row][v] = _mm512_fmadd_ps(value, columns[v], acc[row][v]);
                        }
                    }
                    a = a.add(MR);
                    b = b.wrapping_add(tile.b_stride);
                }
            }
            let alpha = _mm512_set1_ps(tile.alpha);
            for row in 0..ROWS {
                let c = tile.c.add(*tile.c_rows.add(row));
                for v in 0..VECTORS {
                    let mask = if v + 1 == VECTORS { mask } else { 0xffff };
                    let mut value = if tile.accumulate {
                        _mm512_fmadd_ps(alpha, acc[row][v], _mm512_maskz_loadu_ps(mask, c.add(16 * v)))
                    } else {
                        _mm512_mul_ps(alpha, acc[row][v])
                    };
                    if !tile.bias.is_null() {
                        value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, tile.bias.add(16 * v)));
                    }
                    if mask == 0xffff {
                        _mm512_storeu_ps(c.add(16 * v), value);
                    } else {
                        _mm512_mask_storeu_ps(c.add(16 * v), mask, value);
                    }
                }
            }
        }
    }

    /// # Safety
    /// See [`MicroKernels::transpose`].
    unsafe fn transpose_avx512(lines: &[*const f32], len: usize, dst: *mut f32, stride: usize) {
        // SAFETY: this table is chosen only where AVX-512F was detected; the rest is the caller's promise.
        unsafe { transpose16(lines, len, dst, stride) }
    }

    /// # Safety
    /// See [`MicroKernels::transpose`].
    #[target_feature(enable = "avx512f")]
    unsafe fn transpose16(lines: &[*const f32], len: usize, dst: *mut f32, stride: usize) {
        let count = lines.len().min(16);
        let mut at = 0;
        while at < len {
            let width = (len - at).min(16);
            let mask = (0xffffu32 >> (16 - width)) as __mmask16;
            let mut r = [_mm512_setzero_ps(); 16];
            // SAFETY: `width` floats from `at` are within the line; masked lanes are not read.
            unsafe {
                if mask == 0xffff && count == 16 {
                    for (line, r) in r.iter_mut().enumerate() {
                        *r = _mm512_loadu_ps(lines.get_unchecked(line).add(at));
                    }
                } else if mask == 0xffff && count == 12 {
                    for (line, r) in r.iter_mut().enumerate().take(12) {
                        *r = _mm512_loadu_ps(lines.get_unchecked(line).add(at));
                    }
                } else {
                    for (r, line) in r.iter_mut().zip(lines) {
                        *r = _mm512_maskz_loadu_ps(mask, line.add(at));
                    }
                }
            }
            let mut t = [_mm512_setzero_ps(); 16];
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            // After this, 128-bit lane L of u[4 g + j] has column 4 L + j of rows 4 g to 4 g + 3.
            let mut u = [_mm512_setzero_ps(); 16];
            for g in 0..4 {
                let p = |i: usize| _mm512_castps_pd(t[4 * g + i]);
                u[4 * g] = _mm512_castpd_ps(_mm512_unpacklo_pd(p(0), p(2)));
                u[4 * g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p(0), p(2)));
                u[4 * g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(p(1), p(3)));
                u[4 * g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(p(1), p(3)));
            }
            let mut out = [_mm512_setzero_ps(); 16];
            for j in 0..4 {
                let even = _mm512_shuffle_f32x4::<0x88>(u[j], u[4 + j]);
                let odd = _mm512_shuffle_f32x4::<0xdd>(u[j], u[4 + j]);
                let even2 = _mm512_shuffle_f32x4::<0x88>(u[8 + j], u[12 + j]);
                let odd2 = _mm512_shuffle_f32x4::<0xdd>(u[8 + j], u[12 + j]);
                out[j] = _mm512_shuffle_f32x4::<0x88>(even, even2);
                out[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even, even2);
                out[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd, odd2);
                out[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd, odd2);
            }
            // SAFETY: the caller promises room for 16 floats at each of the `len` rows of `dst`.
            unsafe {
                if width == 16 {
                    for (k, column) in out.iter().enumerate() {
                        _mm512_storeu_ps(dst.add((at + k) * stride), *column);
                    }
                } else {
                    for (k, column) in out.iter().enumerate().take(width) {
                        _mm512_storeu_ps(dst.add((at + k) * stride), *column);
                    }
                }
            }
            at += width;
        }
    }

    /// 6x16: 12 accumulators, two columns of B, two broadcasts of A.
    ///
    /// # Safety
    /// See [`MicroKernels::multiply`].
    unsafe fn multiply_avx2(tile: &Tile) {
        macro_rules! dispatch {
            ($($rows:literal)*) => {
                // SAFETY: this table is chosen only where AVX2 and FMA were detected; the rest is the caller's promise.
                unsafe {
                    match (tile.rows, tile.cols > 8) {
                        $(($rows, true) => tile_avx2::<$rows, 2>(tile),
                          ($rows, false) => tile_avx2::<$rows, 1>(tile),)*
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
    unsafe fn tile_avx2<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
        const MR: usize = 6;
        let mut acc = [[_mm256_setzero_ps(); VECTORS]; ROWS];
        let (mut a, mut b) = (tile.a, tile.b);
        let tail = tile.cols - 8 * (VECTORS - 1);
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(tail as i32), lanes);
        // SAFETY: reads and writes stay in the ranges promised by the caller; columns past `cols` are masked.
        unsafe {
            // A packed panel has whole vectors, so that only B read in place needs the mask.
            let whole = tile.b_stride == 16 || tail == 8;
            for _ in 0..tile.depth {
                let mut columns = [_mm256_setzero_ps(); VECTORS];
                for (v, column) in columns.iter_mut().enumerate() {
                    *column = if whole || v + 1 < VECTORS {
                        _mm256_loadu_ps(b.add(8 * v))
                    } else {
                        _mm256_maskload_ps(b.add(8 * v), mask)
                    };
                }
                for row in 0..ROWS {
                    let value = _mm256_set1_ps(*a.add(row));
                    for v in 0..VECTORS {
                        acc[row][v] = _mm256_fmadd_ps(value, columns[v], acc[row][v]);
                    }
                }
                a = a.add(MR);
                b = b.wrapping_add(tile.b_stride);
            }
            let alpha = _mm256_set1_ps(tile.alpha);
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

    /// # Safety
    /// See [`MicroKernels::transpose`].
    unsafe fn transpose_avx2(lines: &[*const f32], len: usize, dst: *mut f32, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe { transpose_portable(lines, len, dst, stride) }
    }
}
