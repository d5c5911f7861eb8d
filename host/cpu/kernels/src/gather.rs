//! Rows of a table by number: lookup, scatter-add and scatter-assign.

use crate::elements::{Elements, widened};
use crate::threads::{SharedMut, ThreadPool};

/// A row number that is outside the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{operation}: id {id} at position {position} is outside the table, expected 0 to {rows} (exclusive)\n\
     hint: the ids must come from the vocabulary or data set that the table was made for"
)]
pub struct RowError {
    /// The kernel that refused.
    pub operation: &'static str,
    /// Which of the ids it was.
    pub position: usize,
    /// The id.
    pub id: i32,
    /// Rows of the table.
    pub rows: usize,
}

/// Rows copied by one task.
const ROWS: usize = 64;
/// Columns owned by one task, at least: two cache lines.
const COLS: usize = 32;

/// Checks the ids, and the slices' lengths (the caller's invariant).
fn check(operation: &'static str, table: usize, width: usize, ids: &[i32], rows: usize) -> Result<usize, RowError> {
    assert!(width > 0 && table.is_multiple_of(width), "{operation}: {table} elements in rows of {width}");
    assert!(rows == ids.len() * width, "{operation}: {rows} elements for {} rows of {width}", ids.len());
    let count = table / width;
    match ids.iter().position(|&id| id < 0 || id as usize >= count) {
        Some(position) => Err(RowError { operation, position, id: ids[position], rows: count }),
        None => Ok(count),
    }
}

/// `out[i, :] = table[ids[i], :]`, with rows of `width` elements, which become f32.
///
/// # Errors
/// If an id is outside the table; `out` is untouched then.
///
/// # Panics
/// If `width` is zero, the table is not whole rows, or `out` has another size than the ids ask for: the caller's
/// invariants.
pub fn gather_rows(
    pool: &ThreadPool,
    table: Elements,
    width: usize,
    ids: &[i32],
    out: &mut [f32],
) -> Result<(), RowError> {
    check("gather", table.len(), width, ids, out.len())?;
    let out = SharedMut::new(out);
    pool.run(ids.len().div_ceil(ROWS), &|task, _| {
        let ids = &ids[task * ROWS..ids.len().min((task + 1) * ROWS)];
        // SAFETY: each task has its own rows.
        let out = unsafe { out.slice(task * ROWS * width, ids.len() * width) };
        for (out, &id) in out.chunks_exact_mut(width).zip(ids) {
            let row = id as usize * width..(id as usize + 1) * width;
            match table {
                Elements::F32(table) => out.copy_from_slice(&table[row]),
                Elements::Bf16(table) => out.iter_mut().zip(&table[row]).for_each(|(o, &v)| *o = widened(v)),
            }
        }
    });
    Ok(())
}

/// `table[ids[i], :] += rows[i, :]`; rows of equal id are added in ascending order of `i`, whatever the number of
/// threads. A gradient of [`gather_rows`] starts from a table of zeros.
///
/// # Errors
/// If an id is outside the table; the table is untouched then.
///
/// # Panics
/// As [`gather_rows`].
pub fn scatter_add_rows(
    pool: &ThreadPool,
    rows: &[f32],
    width: usize,
    ids: &[i32],
    table: &mut [f32],
) -> Result<(), RowError> {
    check("scatter_add", table.len(), width, ids, rows.len())?;
    by_columns(pool, rows, width, ids, table, |out, row| {
        out.iter_mut().zip(row).for_each(|(out, value)| *out += value);
    });
    Ok(())
}

/// `table[ids[i], :] = rows[i, :]`; of rows with equal id the last one stays.
///
/// # Errors
/// If an id is outside the table; the table is untouched then.
///
/// # Panics
/// As [`gather_rows`].
pub fn scatter_rows(
    pool: &ThreadPool,
    rows: &[f32],
    width: usize,
    ids: &[i32],
    table: &mut [f32],
) -> Result<(), RowError> {
    check("scatter", table.len(), width, ids, rows.len())?;
    by_columns(pool, rows, width, ids, table, |out, row| out.copy_from_slice(row));
    Ok(())
}

/// Combines rows into the table in ascending order; each task does so for its own columns.
fn by_columns(
    pool: &ThreadPool,
    rows: &[f32],
    width: usize,
    ids: &[i32],
    table: &mut [f32],
    combine: impl Fn(&mut [f32], &[f32]) + Sync,
) {
    let table = SharedMut::new(table);
    let cols = width.div_ceil(4 * pool.threads()).next_multiple_of(16).max(COLS);
    pool.run(width.div_ceil(cols), &|task, _| {
        let (col, end) = (task * cols, width.min((task + 1) * cols));
        for (row, &id) in ids.iter().enumerate() {
            // SAFETY: each task has its own columns of the table, and takes one row at a time.
            let out = unsafe { table.slice(id as usize * width + col, end - col) };
            combine(out, &rows[row * width + col..row * width + end]);
        }
    });
}
