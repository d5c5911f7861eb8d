//! Micro-kernels for AVX-512: of f32, and of pairs of bf16 with the dot products of AVX512_BF16.
//!
//! The dot products take subnormal values for zero.

use std::arch::x86_64::*;

use super::portable::{rows, transpose_copied};
use super::{MicroKernels, Moments, Packers, Tile};
use crate::elements::{Element, bf16};

pub(super) static PLAIN: MicroKernels = MicroKernels {
    in_place: true,
    from_f32: Packers { transpose, rows: rows_avx512::<f32, false> },
    ..table::<false>()
};
pub(super) static ROUNDED: MicroKernels = table::<true>();
pub(super) static PAIRS: MicroKernels = MicroKernels {
    mr: MR,
    nr: NR,
    pair: 2,
    in_place: false,
    multiply: multiply_pairs,
    from_f32: Packers { transpose: transpose_pairs_f32, rows: rows_pairs_f32 },
    from_bf16: Packers { transpose: transpose_pairs_bf16, rows: rows_pairs_bf16 },
};

const MR: usize = 12;
const NR: usize = 32;
/// How many rows ahead B is brought from the second-level cache: it streams through the first, which has no room for
/// the block, and what the processor looks ahead by itself is a few rows.
const AHEAD: usize = 16;

const fn table<const ROUND: bool>() -> MicroKernels {
    MicroKernels {
        mr: MR,
        nr: NR,
        pair: 1,
        in_place: false,
        multiply,
        from_f32: Packers { transpose: transpose_avx512::<f32, ROUND>, rows: rows_avx512::<f32, ROUND> },
        from_bf16: Packers { transpose: transpose_bf16, rows: rows_avx512::<bf16, false> },
    }
}

/// Calls a tile's function with its number of rows and of vectors known to the compiler.
macro_rules! dispatch {
    ($function:ident, $tile:ident, $($rows:literal)*) => {
        // SAFETY: a table is chosen only where its instruction set was detected; the rest is the caller's promise.
        unsafe {
            match ($tile.rows, $tile.cols > 16) {
                $(($rows, true) => $function::<$rows, 2>($tile),
                  ($rows, false) => $function::<$rows, 1>($tile),)*
                _ => debug_assert!(false, "a tile of {} rows", $tile.rows),
            }
        }
    };
}

/// 12x32: 24 accumulators, two columns of B, the rest broadcasts of A.
///
/// # Safety
/// See [`MicroKernels::multiply`].
unsafe fn multiply(tile: &Tile) {
    dispatch!(multiply_tile, tile, 1 2 3 4 5 6 7 8 9 10 11 12)
}

/// # Safety
/// See [`MicroKernels::multiply`].
unsafe fn multiply_pairs(tile: &Tile) {
    dispatch!(multiply_tile_pairs, tile, 1 2 3 4 5 6 7 8 9 10 11 12)
}

/// # Safety
/// See [`MicroKernels::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
// Counted loops over constants, which the compiler unrolls into registers.
#[allow(clippy::needless_range_loop)]
unsafe fn multiply_tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
    let mut acc = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    let mut b = tile.b;
    // SAFETY: packed panels have whole rows and columns; the rest is the caller's promise.
    unsafe {
        prefetch_tile::<ROWS, VECTORS>(tile);
        if let Some(lines) = &tile.lines {
            for run in 0..lines.runs {
                let starts = lines.starts.add(run).cast::<[*const f32; ROWS]>().read();
                let mut at = 0;
                for _ in 0..lines.run {
                    let columns = columns_ahead::<VECTORS>(b);
                    for row in 0..ROWS {
                        let value = _mm512_set1_ps(*starts[row].add(at));
                        for v in 0..VECTORS {
                            acc[row][v] = _mm512_fmadd_ps(value, columns[v], acc[row][v]);
                        }
                    }
                    at += lines.step;
                    b = b.add(NR);
                }
            }
        } else {
            let mut a = tile.a;
            for _ in 0..tile.depth {
                let columns = columns_ahead::<VECTORS>(b);
                for row in 0..ROWS {
                    let value = _mm512_set1_ps(*a.add(row));
                    for v in 0..VECTORS {
                        acc[row][v] = _mm512_fmadd_ps(value, columns[v], acc[row][v]);
                    }
                }
                a = a.add(MR);
                b = b.add(NR);
            }
        }
        if tile.narrow.is_none() && tile.moments.is_none() {
            for row in 0..ROWS {
                for v in 0..VECTORS {
                    let mask = lanes::<VECTORS>(tile, v);
                    let value = total(tile, row, v, mask, acc[row][v]);
                    let c = tile.c.add(*tile.c_rows.add(row) + 16 * v);
                    if mask == 0xffff {
                        _mm512_storeu_ps(c, value);
                    } else {
                        _mm512_mask_storeu_ps(c, mask, value);
                    }
                }
            }
            return;
        }
        // The rest is called with the products in memory: inlined, it would keep the accumulators there.
        let mut products = Products([[_mm512_setzero_ps(); 2]; MR]);
        for row in 0..ROWS {
            for v in 0..VECTORS {
                products.0[row][v] = acc[row][v];
            }
        }
        match tile.narrow {
            None => store_summed(tile, &products),
            Some(_) => store_rounded(tile, &products),
        }
    }
}

/// A row of packed B, while a later one is brought near.
///
/// # Safety
/// The row is readable.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn columns_ahead<const VECTORS: usize>(b: *const f32) -> [__m512; VECTORS] {
    let mut columns = [_mm512_setzero_ps(); VECTORS];
    for (v, column) in columns.iter_mut().enumerate() {
        // SAFETY: the caller's promise; a prefetch never faults.
        unsafe {
            *column = _mm512_loadu_ps(b.add(16 * v));
            _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD * NR + 16 * v).cast::<i8>());
        }
    }
    columns
}

/// # Safety
/// See [`MicroKernels::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[allow(clippy::needless_range_loop)]
unsafe fn multiply_tile_pairs<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
    let mut acc = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    let (mut a, mut b) = (tile.a.cast::<i32>(), tile.b);
    // SAFETY: as for `multiply_tile`.
    unsafe {
        prefetch_tile::<ROWS, VECTORS>(tile);
        for _ in 0..tile.depth {
            let columns = columns_ahead::<VECTORS>(b).map(|column| _mm512_castps_si512(column));
            for row in 0..ROWS {
                let pair = _mm512_set1_epi32(*a.add(row));
                for v in 0..VECTORS {
                    acc[row][v] = _mm512_dpbf16_ps(acc[row][v], as_pairs(pair), as_pairs(columns[v]));
                }
            }
            a = a.add(MR);
            b = b.add(NR);
        }
        if tile.narrow.is_none() && tile.moments.is_none() {
            for row in 0..ROWS {
                for v in 0..VECTORS {
                    let mask = lanes::<VECTORS>(tile, v);
                    let value = total(tile, row, v, mask, acc[row][v]);
                    let c = tile.c.add(*tile.c_rows.add(row) + 16 * v);
                    if mask == 0xffff {
                        _mm512_storeu_ps(c, value);
                    } else {
                        _mm512_mask_storeu_ps(c, mask, value);
                    }
                }
            }
            return;
        }
        // The rest is called with the products in memory: inlined, it would keep the accumulators there.
        let mut products = Products([[_mm512_setzero_ps(); 2]; MR]);
        for row in 0..ROWS {
            for v in 0..VECTORS {
                products.0[row][v] = acc[row][v];
            }
        }
        match tile.narrow {
            None => store_summed(tile, &products),
            Some(_) => store_pairs(tile, &products),
        }
    }
}

/// The same bits as operands of a dot product.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn as_pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes without invalid values.
    unsafe { std::mem::transmute(bits) }
}

/// Brings the tile from memory while its product is computed.
///
/// # Safety
/// See [`MicroKernels::multiply`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn prefetch_tile<const ROWS: usize, const VECTORS: usize>(tile: &Tile) {
    // SAFETY: a prefetch never faults; the rows' offsets are the caller's promise.
    unsafe {
        match tile.narrow {
            None => {
                for row in 0..ROWS {
                    let c = tile.c.wrapping_add(*tile.c_rows.add(row));
                    for v in 0..VECTORS {
                        _mm_prefetch::<_MM_HINT_ET0>(c.wrapping_add(16 * v).cast::<i8>());
                    }
                }
            }
            Some(narrow) => {
                for row in 0..ROWS {
                    let out = narrow.out.wrapping_add(*narrow.rows.add(row));
                    _mm_prefetch::<_MM_HINT_ET0>(out.cast::<i8>());
                }
            }
        }
    }
}

/// The products of a tile, in memory.
struct Products([[__m512; 2]; MR]);

/// The lanes of vector `v` of `VECTORS` that are in the tile.
#[inline(always)]
fn lanes<const VECTORS: usize>(tile: &Tile, v: usize) -> __mmask16 {
    if v + 1 == VECTORS { (0xffffu32 >> (16 * VECTORS - tile.cols)) as __mmask16 } else { 0xffff }
}

/// A vector of the tile with everything added that is in f32.
///
/// # Safety
/// See [`MicroKernels::multiply`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn total(tile: &Tile, row: usize, v: usize, mask: __mmask16, product: __m512) -> __m512 {
    let alpha = _mm512_set1_ps(tile.alpha);
    // SAFETY: masked lanes are not read; the rest is the caller's promise.
    unsafe {
        let mut value = if tile.accumulate {
            let c = tile.c.add(*tile.c_rows.add(row));
            _mm512_fmadd_ps(alpha, product, _mm512_maskz_loadu_ps(mask, c.add(16 * v)))
        } else {
            _mm512_mul_ps(alpha, product)
        };
        if !tile.bias.is_null() {
            value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, tile.bias.add(16 * v)));
        }
        value
    }
}

/// Sums of a column of vectors, in registers.
struct Sums {
    pivot: __m512,
    sum: __m512,
    square: __m512,
}

impl Sums {
    /// The sums so far, with the pivots of an earlier row or of `first`.
    ///
    /// # Safety
    /// The tile's sums are readable in the lanes of the mask.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn begin(moments: &Moments, v: usize, mask: __mmask16, first: __m512) -> Sums {
        if moments.first {
            return Sums { pivot: first, sum: _mm512_setzero_ps(), square: _mm512_setzero_ps() };
        }
        let at = moments.pivots.wrapping_add(16 * v);
        // SAFETY: masked lanes are not read.
        unsafe {
            Sums {
                pivot: _mm512_maskz_loadu_ps(mask, at),
                sum: _mm512_maskz_loadu_ps(mask, at.wrapping_add(moments.stride)),
                square: _mm512_maskz_loadu_ps(mask, at.wrapping_add(2 * moments.stride)),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add(&mut self, value: __m512) {
        let difference = _mm512_sub_ps(value, self.pivot);
        self.sum = _mm512_add_ps(self.sum, difference);
        self.square = _mm512_fmadd_ps(difference, difference, self.square);
    }

    /// # Safety
    /// The tile's sums are writable in the lanes of the mask.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn end(&self, moments: &Moments, v: usize, mask: __mmask16) {
        let at = moments.pivots.wrapping_add(16 * v);
        // SAFETY: masked lanes are not written.
        unsafe {
            _mm512_mask_storeu_ps(at, mask, self.pivot);
            _mm512_mask_storeu_ps(at.wrapping_add(moments.stride), mask, self.sum);
            _mm512_mask_storeu_ps(at.wrapping_add(2 * moments.stride), mask, self.square);
        }
    }
}

/// Stores a tile of f32 and sums it.
///
/// # Safety
/// See [`MicroKernels::multiply`].
#[inline(never)]
#[target_feature(enable = "avx512f")]
unsafe fn store_summed(tile: &Tile, products: &Products) {
    let Some(moments) = &tile.moments else { return };
    for v in 0..tile.cols.div_ceil(16) {
        let mask = mask16(tile.cols - 16 * v);
        // SAFETY: columns past `cols` are masked; the rest is the caller's promise.
        unsafe {
            let mut sums = Sums::begin(moments, v, mask, total(tile, 0, v, mask, products.0[0][v]));
            for (row, products) in products.0.iter().enumerate().take(tile.rows) {
                let value = total(tile, row, v, mask, products[v]);
                _mm512_mask_storeu_ps(tile.c.add(*tile.c_rows.add(row) + 16 * v), mask, value);
                sums.add(value);
            }
            sums.end(moments, v, mask);
        }
    }
}

/// Stores a tile of bf16 with the processor's own rounding.
///
/// # Safety
/// See [`MicroKernels::multiply`]; the tile has a place for rounded results.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn store_pairs(tile: &Tile, products: &Products) {
    let Some(narrow) = tile.narrow else { return };
    for v in 0..tile.cols.div_ceil(16) {
        let mask = mask16(tile.cols - 16 * v);
        let mut sums = None;
        for (row, products) in products.0.iter().enumerate().take(tile.rows) {
            // SAFETY: columns past `cols` are masked; the rest is the caller's promise.
            unsafe {
                let out = narrow.out.add(*narrow.rows.add(row) + 16 * v).cast::<i16>();
                let mut value = total(tile, row, v, mask, products[v]);
                if narrow.accumulate {
                    value = _mm512_add_ps(value, widen(_mm256_maskz_loadu_epi16(mask, out)));
                }
                let rounded: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(value));
                _mm256_mask_storeu_epi16(out, mask, rounded);
                if let Some(moments) = &tile.moments {
                    let value = widen(rounded);
                    sums.get_or_insert_with(|| Sums::begin(moments, v, mask, value)).add(value);
                }
            }
        }
        if let (Some(sums), Some(moments)) = (sums, &tile.moments) {
            // SAFETY: as above.
            unsafe { sums.end(moments, v, mask) };
        }
    }
}

/// Stores a tile of bf16.
///
/// # Safety
/// See [`MicroKernels::multiply`]; the tile has a place for rounded results.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn store_rounded(tile: &Tile, products: &Products) {
    let Some(narrow) = tile.narrow else { return };
    for v in 0..tile.cols.div_ceil(16) {
        let mask = mask16(tile.cols - 16 * v);
        let mut sums = None;
        for (row, products) in products.0.iter().enumerate().take(tile.rows) {
            // SAFETY: columns past `cols` are masked; the rest is the caller's promise.
            unsafe {
                let out = narrow.out.add(*narrow.rows.add(row) + 16 * v).cast::<i16>();
                let mut value = total(tile, row, v, mask, products[v]);
                if narrow.accumulate {
                    value = _mm512_add_ps(value, widen(_mm256_maskz_loadu_epi16(mask, out)));
                }
                let rounded = round(value);
                _mm256_mask_storeu_epi16(out, mask, rounded);
                if let Some(moments) = &tile.moments {
                    let value = widen(rounded);
                    sums.get_or_insert_with(|| Sums::begin(moments, v, mask, value)).add(value);
                }
            }
        }
        if let (Some(sums), Some(moments)) = (sums, &tile.moments) {
            // SAFETY: as above.
            unsafe { sums.end(moments, v, mask) };
        }
    }
}

/// Sixteen bf16 as f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn widen(values: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(values)))
}

/// Sixteen f32 as bf16, to nearest even; NaN stays NaN.
#[inline]
#[target_feature(enable = "avx512f")]
fn round(values: __m512) -> __m256i {
    let bits = _mm512_castps_si512(values);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(rounded, nan, quiet)))
}

/// # Safety
/// See [`Packers::transpose`].
unsafe fn transpose(lines: &[*const f32], len: usize, dst: *mut f32, stride: usize) {
    // SAFETY: this table is chosen only where AVX-512F was detected; the rest is the caller's promise.
    unsafe { transpose_f32(lines, len, dst, stride) }
}

/// # Safety
/// See [`Packers::transpose`].
#[target_feature(enable = "avx512f")]
unsafe fn transpose_f32(lines: &[*const f32], len: usize, dst: *mut f32, stride: usize) {
    let count = lines.len().min(16);
    let mut at = 0;
    while at < len {
        let width = (len - at).min(16);
        let mask = (0xffffu32 >> (16 - width)) as __mmask16;
        let mut r = [_mm512_setzero_ps(); 16];
        // SAFETY: `width` floats from `at` are within the line; masked lanes are not read. The caller promises room
        // for 16 words at each row of `dst`.
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
            store_transposed(&r, width, dst.add(at * stride), stride);
        }
        at += width;
    }
}

/// Pairs are transposed as words, and then widened to two rows.
///
/// # Safety
/// See [`Packers::transpose`].
unsafe fn transpose_bf16(lines: &[*const bf16], len: usize, dst: *mut f32, stride: usize) {
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn compiled(lines: &[*const bf16], len: usize, dst: *mut f32, stride: usize) {
        let upper = _mm512_set1_epi32(0xffff_0000u32 as i32);
        for at in (0..len).step_by(32) {
            let count = (len - at).min(32);
            // SAFETY: the caller's promise.
            let words = unsafe { transposed(&pairs_of(lines, at, count)) };
            for (pair, words) in words.iter().enumerate().take(count.div_ceil(2)) {
                let words = _mm512_castps_si512(*words);
                // SAFETY: the caller promises room for 16 words at each row of `dst`.
                unsafe {
                    let out = dst.add((at + 2 * pair) * stride);
                    _mm512_storeu_si512(out.cast(), _mm512_slli_epi32::<16>(words));
                    if 2 * pair + 1 < count {
                        _mm512_storeu_si512(out.add(stride).cast(), _mm512_and_si512(words, upper));
                    }
                }
            }
        }
    }
    // SAFETY: this table is chosen only where its instruction set was detected; the rest is the caller's promise.
    unsafe { compiled(lines, len, dst, stride) }
}

/// Up to 32 elements of each line, from `at` on, as words.
///
/// # Safety
/// They are readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn pairs_of(lines: &[*const bf16], at: usize, count: usize) -> [__m512; 16] {
    let mut r = [_mm512_setzero_ps(); 16];
    // SAFETY: masked elements are not read.
    unsafe {
        if count == 32 && lines.len() == 12 {
            for (line, r) in r.iter_mut().enumerate().take(12) {
                *r = _mm512_loadu_ps(lines.get_unchecked(line).add(at).cast());
            }
        } else if count == 32 {
            for (r, line) in r.iter_mut().zip(lines) {
                *r = _mm512_loadu_ps(line.add(at).cast());
            }
        } else {
            let mask = 0xffff_ffffu32 >> (32 - count);
            for (r, line) in r.iter_mut().zip(lines) {
                *r = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, line.add(at).cast()));
            }
        }
    }
    r
}

/// Stores the first `width` columns of 16 rows of words as rows.
///
/// # Safety
/// `dst` is writable for 16 words at each of them.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_transposed(r: &[__m512; 16], width: usize, dst: *mut f32, stride: usize) {
    let out = transposed(r);
    // SAFETY: the caller's promise.
    unsafe {
        if width == 16 {
            for (k, column) in out.iter().enumerate() {
                _mm512_storeu_ps(dst.add(k * stride), *column);
            }
        } else {
            for (k, column) in out.iter().enumerate().take(width) {
                _mm512_storeu_ps(dst.add(k * stride), *column);
            }
        }
    }
}

/// Columns of 16 rows of words as rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(r: &[__m512; 16]) -> [__m512; 16] {
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
    out
}

/// # Safety
/// See [`Packers::transpose`].
unsafe fn transpose_avx512<T: Element, const ROUND: bool>(
    lines: &[*const T],
    len: usize,
    dst: *mut f32,
    stride: usize,
) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn compiled<T: Element, const ROUND: bool>(lines: &[*const T], len: usize, dst: *mut f32, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            transpose_copied::<T, ROUND>(lines, len, dst, stride, |lines, len, dst, stride| {
                transpose_f32(lines, len, dst, stride)
            })
        }
    }
    // SAFETY: this table is chosen only where AVX-512F was detected; the rest is the caller's promise.
    unsafe { compiled::<T, ROUND>(lines, len, dst, stride) }
}

/// # Safety
/// See [`Packers::rows`].
unsafe fn rows_avx512<T: Element, const ROUND: bool>(
    from: [*const T; 2],
    step: usize,
    lines: usize,
    len: usize,
    dst: *mut f32,
    width: usize,
) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
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
    // SAFETY: this table is chosen only where AVX-512F was detected; the rest is the caller's promise.
    unsafe { compiled::<T, ROUND>(from, step, lines, len, dst, width) }
}

/// # Safety
/// See [`Packers::transpose`].
unsafe fn transpose_pairs_bf16(lines: &[*const bf16], len: usize, dst: *mut f32, stride: usize) {
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn compiled(lines: &[*const bf16], len: usize, dst: *mut f32, stride: usize) {
        for at in (0..len).step_by(32) {
            let count = (len - at).min(32);
            // SAFETY: the caller's promise.
            unsafe {
                let r = pairs_of(lines, at, count);
                store_transposed(&r, count.div_ceil(2), dst.add(at / 2 * stride), stride);
            }
        }
    }
    // SAFETY: this table is chosen only where its instruction set was detected; the rest is the caller's promise.
    unsafe { compiled(lines, len, dst, stride) }
}

/// # Safety
/// See [`Packers::transpose`].
unsafe fn transpose_pairs_f32(lines: &[*const f32], len: usize, dst: *mut f32, stride: usize) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn compiled(lines: &[*const f32], len: usize, dst: *mut f32, stride: usize) {
        for at in (0..len).step_by(32) {
            let count = (len - at).min(32);
            let (low, high) = (mask16(count), mask16(count.saturating_sub(16)));
            let mut r = [_mm512_setzero_ps(); 16];
            // SAFETY: as for pairs of bf16.
            unsafe {
                for (r, line) in r.iter_mut().zip(lines) {
                    let first = _mm512_maskz_loadu_ps(low, line.wrapping_add(at));
                    let second = _mm512_maskz_loadu_ps(high, line.wrapping_add(at + 16));
                    *r = std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(second, first));
                }
                store_transposed(&r, count.div_ceil(2), dst.add(at / 2 * stride), stride);
            }
        }
    }
    // SAFETY: this table is chosen only where its instruction set was detected; the rest is the caller's promise.
    unsafe { compiled(lines, len, dst, stride) }
}

/// The first `count` of 16 lanes.
#[inline(always)]
fn mask16(count: usize) -> __mmask16 {
    if count >= 16 { 0xffff } else { ((1u32 << count) - 1) as __mmask16 }
}

/// # Safety
/// See [`Packers::rows`].
unsafe fn rows_pairs_bf16(rows: [*const bf16; 2], step: usize, lines: usize, len: usize, dst: *mut f32, width: usize) {
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn compiled(rows: [*const bf16; 2], step: usize, lines: usize, len: usize, dst: *mut f32, width: usize) {
        // Interleaving works within 128 bits: this brings the quarters of the first half to the lower halves of the
        // four lanes, those of the second half to the upper ones.
        let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        for k in (0..len).step_by(2) {
            for line in (0..lines).step_by(32) {
                let count = (lines - line).min(32);
                let mask = 0xffff_ffffu32 >> (32 - count);
                let odd = if k + 1 < len { mask } else { 0 };
                // SAFETY: masked elements are neither read nor written; the rest is the caller's promise.
                unsafe {
                    let at = k / 2 * step + line;
                    let (first, second) = if odd == 0xffff_ffff {
                        let first = _mm512_loadu_si512(rows[0].add(at).cast());
                        (first, _mm512_loadu_si512(rows[1].add(at).cast()))
                    } else {
                        let first = _mm512_maskz_loadu_epi16(mask, rows[0].add(at).cast());
                        (first, _mm512_maskz_loadu_epi16(odd, rows[1].wrapping_add(at).cast()))
                    };
                    let first = _mm512_permutexvar_epi64(order, first);
                    let second = _mm512_permutexvar_epi64(order, second);
                    let out = dst.add(k / 2 * width + line).cast::<i32>();
                    _mm512_mask_storeu_epi32(out, mask16(count), _mm512_unpacklo_epi16(first, second));
                    if count > 16 {
                        let high = _mm512_unpackhi_epi16(first, second);
                        _mm512_mask_storeu_epi32(out.add(16), mask16(count - 16), high);
                    }
                }
            }
        }
    }
    // SAFETY: this table is chosen only where its instruction set was detected; the rest is the caller's promise.
    unsafe { compiled(rows, step, lines, len, dst, width) }
}

/// # Safety
/// See [`Packers::rows`].
unsafe fn rows_pairs_f32(rows: [*const f32; 2], step: usize, lines: usize, len: usize, dst: *mut f32, width: usize) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn compiled(rows: [*const f32; 2], step: usize, lines: usize, len: usize, dst: *mut f32, width: usize) {
        let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        for k in (0..len).step_by(2) {
            for line in (0..lines).step_by(16) {
                let mask = mask16(lines - line);
                let odd = if k + 1 < len { mask } else { 0 };
                // SAFETY: masked elements are neither read nor written; the rest is the caller's promise.
                unsafe {
                    let at = k / 2 * step + line;
                    let first = _mm512_maskz_loadu_ps(mask, rows[0].add(at));
                    let second = _mm512_maskz_loadu_ps(odd, rows[1].wrapping_add(at));
                    // The first row in the lower half, the second in the upper one; then quarter by quarter.
                    let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
                    let both = _mm512_permutexvar_epi64(order, both);
                    let swapped = _mm512_shuffle_epi32::<0x4e>(both);
                    let out = dst.add(k / 2 * width + line).cast::<i32>();
                    _mm512_mask_storeu_epi32(out, mask, _mm512_unpacklo_epi16(both, swapped));
                }
            }
        }
    }
    // SAFETY: this table is chosen only where its instruction set was detected; the rest is the caller's promise.
    unsafe { compiled(rows, step, lines, len, dst, width) }
}
