//! The matrix products at the points of a Winograd algorithm.
//!
//! Their left operand is not packed: transforms store it in one of two layouts from which single values are
//! broadcast, so that no transpose is needed.

use crate::microkernel::prefetch_near;
use crate::winograd_vector::{Vector, Work};

/// Columns of a panel of the right operand.
pub(crate) const COLS: usize = 32;
/// Neighbours in a run of the left operand.
pub(crate) const RUN: usize = 16;

/// How the left operand lies in memory.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Left {
    /// Runs of 16 along the depth: `a[(k / 16 * tile_rows + row) * 16 + k % 16]`.
    DepthRuns,
    /// Runs of 16 rows: `a[k * 16 + row]`, for [`across_rows`] rows of a run.
    RowRuns,
}

/// `C[rows, cols] (+)= A[rows, depth] B[depth, cols]` for a panel of each operand.
///
/// Each element of C is summed in ascending order of the depth, whatever tile it is in, and then added to the old one.
///
/// To run it, A must be readable for `rows` by `depth`, B for `depth` rows of 32 floats, and C writable for `rows`
/// rows of `cols` floats rounded up to 16, `c_row` apart, with no more rows than a register tile has.
pub(crate) struct Product {
    pub left: Left,
    pub a: *const f32,
    pub b: *const f32,
    pub depth: usize,
    pub c: *mut f32,
    pub c_row: usize,
    pub rows: usize,
    pub cols: usize,
    pub accumulate: bool,
}

/// Rows of a tile of [`Left::RowRuns`]: a divisor of 16 for every instruction set.
pub(crate) const fn across_rows(tile_rows: usize) -> usize {
    if tile_rows >= 8 { 8 } else { 4 }
}

impl Work for Product {
    // SAFETY: what the caller promises is with the trait and the type.
    #[inline(always)]
    unsafe fn run<V: Vector>(&self) {
        macro_rules! dispatch {
            ($col:expr, $vectors:literal: $($rows:literal)*) => {
                // SAFETY: the caller's promise.
                match (self.rows, self.left) {
                    $(($rows, Left::DepthRuns) => unsafe { self.tile::<V, $rows, $vectors, false>($col) },)*
                    (8, Left::RowRuns) => unsafe { self.tile::<V, 8, $vectors, true>($col) },
                    (4, Left::RowRuns) => unsafe { self.tile::<V, 4, $vectors, true>($col) },
                    _ => debug_assert!(false, "a tile of {} rows", self.rows),
                }
            };
        }
        let mut col = 0;
        while col < self.cols {
            if V::TILE.1 == 2 && self.cols - col > V::LANES {
                dispatch!(col, 2: 1 2 3 4 5 6 7 8 9 10 11 12);
                col += 2 * V::LANES;
            } else {
                dispatch!(col, 1: 1 2 3 4 5 6 7 8 9 10 11 12);
                col += V::LANES;
            }
        }
    }
}

impl Product {
    /// The columns of some vectors from `col` on.
    ///
    /// # Safety
    /// See [`Product`].
    #[inline(always)]
    // Counted loops over constants, which the compiler unrolls into registers.
    #[allow(clippy::needless_range_loop)]
    unsafe fn tile<V: Vector, const ROWS: usize, const VECTORS: usize, const ACROSS: bool>(&self, col: usize) {
        if ROWS > V::TILE.0 {
            return;
        }
        let (row_step, depth_step, run) = if ACROSS { (1, RUN, self.depth) } else { (RUN, 1, RUN) };
        // SAFETY: reads and writes stay in the ranges that the type's documentation asks for.
        unsafe {
            let c = self.c.add(col);
            let mut sums = [[V::splat(0.0); VECTORS]; ROWS];
            let (mut a, mut b) = (self.a, self.b.add(col));
            let mut left = self.depth;
            while left > 0 {
                let count = left.min(run);
                for _ in 0..count {
                    let mut columns = [V::splat(0.0); VECTORS];
                    for v in 0..VECTORS {
                        columns[v] = V::load(b.add(v * V::LANES));
                        prefetch_near(b.wrapping_add(16 * COLS + v * V::LANES));
                    }
                    for row in 0..ROWS {
                        let value = V::splat(*a.add(row * row_step));
                        for v in 0..VECTORS {
                            sums[row][v] = sums[row][v].plus(value, columns[v]);
                        }
                    }
                    a = a.wrapping_add(depth_step);
                    b = b.wrapping_add(COLS);
                }
                left -= count;
                a = a.wrapping_add((V::TILE.0 - 1) * RUN);
            }
            for row in 0..ROWS {
                for v in 0..VECTORS {
                    let to = c.add(row * self.c_row + v * V::LANES);
                    // Added at the end: a sum of short sums loses less than one long sum.
                    let sum = if self.accumulate { V::load(to) + sums[row][v] } else { sums[row][v] };
                    sum.store(to);
                }
            }
        }
    }
}
