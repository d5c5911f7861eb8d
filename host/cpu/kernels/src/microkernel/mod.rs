//! Register tiles of the matrix multiplication, one set per instruction set and kind of product, and the packing that
//! brings operands into their order.
//!
//! A micro-kernel multiplies a packed panel of up to `mr` rows of A with a packed panel of up to `nr` columns of B:
//! the tile of C stays in registers while it walks the depth. A packed panel consists of words of four bytes: an f32,
//! or, for dot products of bf16, two values that are neighbours along the depth.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use crate::elements::{Element, bf16};
use crate::isa::Isa;

/// One call of a micro-kernel: `C[rows, cols] (+)= alpha * A[rows, depth] * B[depth, cols] (+ bias[cols])`.
pub(crate) struct Tile {
    /// Packed A: `a[k * mr + row]`.
    pub a: *const f32,
    /// A where it lies, in place of the packed one, for tables with [`MicroKernels::in_place`].
    pub lines: Option<Lines>,
    /// Packed B: `b[k * nr + col]`.
    pub b: *const f32,
    /// Words along the depth.
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
    /// Where the result goes in place of C, rounded.
    pub narrow: Option<Narrow>,
    /// Where the results are summed as well.
    pub moments: Option<Moments>,
}

/// Rows of A as they lie in memory: the depth is cut into runs of equal length, in each of which a row's words are at a
/// constant distance.
#[derive(Clone, Copy)]
pub(crate) struct Lines {
    /// Where each row's words of run number `r` start: `starts[r][row]`.
    pub starts: *const Starts,
    pub runs: usize,
    /// Words of a run; `runs` times as many are the depth.
    pub run: usize,
    /// Distance of two words of a row.
    pub step: usize,
}

/// Where the rows of a tile start.
pub(crate) type Starts = [*const f32; MAX_MR];

/// A tile's place in a result of bf16.
#[derive(Clone, Copy)]
pub(crate) struct Narrow {
    /// First element of the tile's columns; row `r` lies `rows[r]` elements further.
    pub out: *mut bf16,
    pub rows: *const usize,
    /// Add to what is there.
    pub accumulate: bool,
}

/// Sums over rows of what a tile stores, less the value of a first row.
#[derive(Clone, Copy)]
pub(crate) struct Moments {
    /// A value of the first row per column; the sums of differences lie `stride` further, the sums of their squares
    /// twice as far.
    pub pivots: *mut f32,
    pub stride: usize,
    /// The tile has the first row: begin with it.
    pub first: bool,
}

/// How a packed panel is made from elements of one type.
pub(crate) struct Packers<T> {
    /// Transposes up to 16 lines: the words of `lines[line]` go to `dst[k * stride + line]`. An odd last element is
    /// paired with zero.
    ///
    /// # Safety
    /// The processor has the instruction set; each line is readable for `len` elements; `dst` is writable for 16
    /// words at each of the rows. What follows the last line's word in a row of `dst` is left undefined for up to 16
    /// words, so that panels are packed in ascending order.
    pub transpose: unsafe fn(lines: &[*const T], len: usize, dst: *mut f32, stride: usize),
    /// Takes `len` rows of `lines` neighbouring elements: even rows are at `rows[0] + i * step`, odd ones at
    /// `rows[1] + i * step` if two make a word; else row `i` is at `rows[0] + i * step`. Words go to
    /// `dst[k * width + line]`.
    ///
    /// # Safety
    /// The processor has the instruction set; all of this is readable and writable.
    pub rows: unsafe fn(rows: [*const T; 2], step: usize, lines: usize, len: usize, dst: *mut f32, width: usize),
}

/// The micro-kernel of an instruction set, its tile size, and its packing.
pub(crate) struct MicroKernels {
    /// Rows of a tile.
    pub mr: usize,
    /// Columns of a tile.
    pub nr: usize,
    /// Elements of a word.
    pub pair: usize,
    /// Whether `multiply` can read rows of A where they are.
    pub in_place: bool,
    /// # Safety
    /// The processor has the instruction set; `0 < rows <= mr`, `0 < cols <= nr`; A is readable for `depth * mr`
    /// words, or its lines where they say, B for `depth * nr`; the others for `rows` by `cols`.
    pub multiply: unsafe fn(&Tile),
    pub from_f32: Packers<f32>,
    pub from_bf16: Packers<bf16>,
}

impl MicroKernels {
    /// Words that `len` elements along the depth take.
    pub fn words(&self, len: usize) -> usize {
        len.div_ceil(self.pair)
    }

    /// Packs `len` rows of neighbouring elements, `stride` apart: see [`Packers::rows`].
    ///
    /// # Safety
    /// Both sides are large enough.
    #[inline(always)]
    pub unsafe fn pack_rows<T: Source>(
        &self,
        src: *const T,
        stride: usize,
        lines: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            (T::packers(self).rows)([src, src.wrapping_add(stride)], stride * self.pair, lines, len, dst, width);
        }
    }
}

/// An element type that panels are packed from.
pub(crate) trait Source: Element {
    /// Whether an element is a word of a panel as it is.
    const WORD: bool;

    fn packers(kernels: &MicroKernels) -> &Packers<Self>;

    /// What is read where an operand has nothing.
    fn zeros() -> &'static [Self; ZEROS];
}

/// Number of [`Source::zeros`].
pub(crate) const ZEROS: usize = 1024;

impl Source for f32 {
    const WORD: bool = true;

    fn packers(kernels: &MicroKernels) -> &Packers<f32> {
        &kernels.from_f32
    }

    fn zeros() -> &'static [f32; ZEROS] {
        static VALUES: [f32; ZEROS] = [0.0; ZEROS];
        &VALUES
    }
}

impl Source for bf16 {
    const WORD: bool = false;

    fn packers(kernels: &MicroKernels) -> &Packers<bf16> {
        &kernels.from_bf16
    }

    fn zeros() -> &'static [bf16; ZEROS] {
        static VALUES: [bf16; ZEROS] = [bf16::ZERO; ZEROS];
        &VALUES
    }
}

/// Largest `mr` of any table.
pub(crate) const MAX_MR: usize = 12;
/// Largest `nr` of any table.
pub(crate) const MAX_NR: usize = 32;
/// Words that [`Packers::transpose`] may write past the end of a panel.
pub(crate) const SLACK: usize = 16;

/// The table for an instruction set; with `half` operands count as bf16, and those in f32 are rounded while they are
/// packed.
pub(crate) fn micro_kernels(isa: Isa, half: bool) -> &'static MicroKernels {
    match (isa, half) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16, true) => &avx512::PAIRS,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, true) => &avx512::ROUNDED,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16 | Isa::Avx512, false) => &avx512::PLAIN,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, true) => &avx2::ROUNDED,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, false) => &avx2::PLAIN,
        (_, true) => &portable::ROUNDED,
        (_, false) => &portable::PLAIN,
    }
}

/// Asks for the cache line of an address to be brought into the first-level cache; a hint without effect on results.
#[inline(always)]
pub(crate) fn prefetch_near(address: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch does not access memory as far as the program can tell, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast::<i8>()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
