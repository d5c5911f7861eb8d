//! Mean and variance of the columns of a matrix, in one pass.
//!
//! Rows are taken in groups whose limits depend on the shape alone. Within a group the first row is subtracted from
//! all, so that sums of squares do not cancel where the mean is far larger than the deviation; groups are combined in
//! ascending order, in double precision, after Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm
//! for Computing Sample Variances" (1979).

use crate::elements::{Element, Elements};
use crate::isa::per_isa;
use crate::threads::{SharedMut, ThreadPool};

/// Shared scratch: sums of the groups.
pub(crate) const SLOT_SUMS: usize = 5;
/// Columns that one task combines.
const COLS: usize = 64;

/// Mean and population variance of each column of `x` (`rows` by `cols`, contiguous): `out[..cols]` the means,
/// `out[cols..]` the variances. Both are zero where there are no rows.
///
/// # Panics
/// If `x` or `out` has another size: the caller's invariant.
pub fn column_moments(pool: &ThreadPool, x: Elements, rows: usize, cols: usize, out: &mut [f32]) {
    assert!(x.len() == rows * cols, "moments: {} elements, expected {rows} rows of {cols}", x.len());
    match x {
        Elements::F32(x) => of_columns(pool, x, rows, cols, out),
        Elements::Bf16(x) => of_columns(pool, x, rows, cols, out),
    }
}

fn of_columns<T: Element>(pool: &ThreadPool, x: &[T], rows: usize, cols: usize, out: &mut [f32]) {
    let groups = Groups { rows, cols, group: Groups::ROWS };
    let mut sums = pool.shared_scratch(SLOT_SUMS, groups.len());
    let shared = SharedMut::new(&mut sums);
    pool.run(groups.count(), &|group, _| {
        let x = &x[group * groups.group * cols..rows.min((group + 1) * groups.group) * cols];
        // SAFETY: each task has its own group.
        let sums = unsafe { shared.slice(group * 3 * cols, 3 * cols) };
        sum_group(pool.isa(), x, cols, sums);
    });
    groups.combine(pool, &sums, out);
}

/// How rows are cut into groups, and where their sums are: for each group `cols` values of its first row, `cols` sums
/// and `cols` sums of squares of the differences from it.
#[derive(Clone, Copy)]
pub(crate) struct Groups {
    pub rows: usize,
    pub cols: usize,
    /// Rows of a group; the last one may have fewer.
    pub group: usize,
}

impl Groups {
    /// Rows of a group where nothing else asks for another number.
    const ROWS: usize = 128;

    pub fn count(&self) -> usize {
        self.rows.div_ceil(self.group)
    }

    /// Floats that the sums take.
    pub fn len(&self) -> usize {
        self.count() * 3 * self.cols
    }

    /// The moments of all rows from the sums of the groups.
    pub fn combine(&self, pool: &ThreadPool, sums: &[f32], out: &mut [f32]) {
        let Groups { rows, cols, .. } = *self;
        assert!(out.len() == 2 * cols, "moments: room for {} values, expected {}", out.len(), 2 * cols);
        let out = SharedMut::new(out);
        pool.run(cols.div_ceil(COLS), &|task, _| {
            let (col, count) = (task * COLS, COLS.min(cols - task * COLS));
            // SAFETY: each task has its own columns.
            let (means, variances) = unsafe { (out.slice(col, count), out.slice(cols + col, count)) };
            combine_columns(pool.isa(), self, sums, col, means, variances);
        });
        debug_assert!(rows > 0 || sums.is_empty());
    }
}

per_isa! {
/// The sums of a group of rows.
fn sum_group<T: Element>(x: &[T], cols: usize, sums: &mut [f32]) {
    let (pivots, sums) = sums.split_at_mut(cols);
    let (sums, squares) = sums.split_at_mut(cols);
    // A strip of columns stays in registers.
    const STRIP: usize = 64;
    for col in (0..cols).step_by(STRIP) {
        let count = STRIP.min(cols - col);
        let mut pivot = [0f32; STRIP];
        let mut sum = [0f32; STRIP];
        let mut square = [0f32; STRIP];
        for (pivot, x) in pivot.iter_mut().zip(&x[col..col + count]) {
            *pivot = x.widen();
        }
        for row in x.chunks_exact(cols) {
            if let Some(row) = row[col..].first_chunk::<STRIP>() {
                for at in 0..STRIP {
                    let difference = row[at].widen() - pivot[at];
                    sum[at] += difference;
                    square[at] += difference * difference;
                }
            } else {
                for (at, x) in row[col..col + count].iter().enumerate() {
                    let difference = x.widen() - pivot[at];
                    sum[at] += difference;
                    square[at] += difference * difference;
                }
            }
        }
        pivots[col..col + count].copy_from_slice(&pivot[..count]);
        sums[col..col + count].copy_from_slice(&sum[..count]);
        squares[col..col + count].copy_from_slice(&square[..count]);
    }
}
}

per_isa! {
/// The moments of up to `COLS` columns from `col` on.
fn combine_columns(groups: &Groups, sums: &[f32], col: usize, means: &mut [f32], variances: &mut [f32]) {
    let (count, cols) = (means.len(), groups.cols);
    let (mut mean, mut m2) = ([0f64; COLS], [0f64; COLS]);
    let mut before = 0.0;
    for (group, sums) in sums.chunks_exact(3 * cols.max(1)).enumerate() {
        let rows = groups.group.min(groups.rows - group * groups.group) as f64;
        let (pivots, sums) = sums.split_at(cols);
        let (sums, squares) = sums.split_at(cols);
        let (pivots, sums, squares) = (&pivots[col..][..count], &sums[col..][..count], &squares[col..][..count]);
        let (share, weight) = (rows / (before + rows), before * rows / (before + rows));
        for at in 0..count {
            let sum = sums[at] as f64;
            let offset = sum / rows;
            let delta = pivots[at] as f64 + offset - mean[at];
            m2[at] += (squares[at] as f64 - sum * offset).max(0.0) + delta * delta * weight;
            mean[at] += delta * share;
        }
        before += rows;
    }
    for at in 0..count {
        means[at] = mean[at] as f32;
        variances[at] = (m2[at] / before.max(1.0)) as f32;
    }
}
}
