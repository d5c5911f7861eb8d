//! Copies of strided arrays into contiguous ones: permutations, transposes, broadcasts.

use std::any::TypeId;

use crate::convert::convert;
use crate::elements::{Element, Elements, ElementsMut};
use crate::isa::per_isa;
use crate::microkernel::{Source, micro_kernels};
use crate::threads::{SharedMut, ThreadPool};

/// Dimensions of an array at most.
pub const MAX_DIMS: usize = 6;

/// Elements per task, about: 64 KiB.
const TASK: usize = 16 * 1024;
/// Elements that one task fills: 1 MiB.
const FILLED: usize = 256 * 1024;
/// Sides of a transposed block. Along the long one the 16 lines that lie far apart are walked in runs that the
/// processor's prefetcher follows; the short one keeps the block in L2, where the other side is revisited.
const LONG: usize = 256;
const SHORT: usize = 64;

/// A dimension of the copy: size, stride in the source, stride in the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Dim {
    len: usize,
    src: usize,
    dst: usize,
}

/// `out[i0, i1, …] = input[i0 * strides[0] + i1 * strides[1] + …]`, with `out` contiguous and of shape `shape`.
///
/// Elements are converted where the two types differ. A permuted view has the permuted strides of its array, a broadcast dimension has stride zero.
///
/// # Panics
/// If there are more than [`MAX_DIMS`] dimensions, another number of strides, or a slice is too short: the caller's
/// invariants, checked once.
pub fn copy_strided(pool: &ThreadPool, shape: &[usize], strides: &[usize], input: Elements, out: ElementsMut) {
    use {Elements as From, ElementsMut as To};
    match (input, out) {
        (From::F32(input), To::F32(out)) => copy(pool, shape, strides, input, out),
        (From::F32(input), To::Bf16(out)) => copy(pool, shape, strides, input, out),
        (From::Bf16(input), To::F32(out)) => copy(pool, shape, strides, input, out),
        (From::Bf16(input), To::Bf16(out)) => copy(pool, shape, strides, input, out),
    }
}

fn copy<S: Source, D: Element>(pool: &ThreadPool, shape: &[usize], strides: &[usize], input: &[S], out: &mut [D]) {
    assert!(
        shape.len() <= MAX_DIMS && shape.len() == strides.len(),
        "copy: {} dimensions and {} strides, at most {MAX_DIMS}",
        shape.len(),
        strides.len()
    );
    let total: usize = shape.iter().product();
    assert!(out.len() == total, "copy: the output has {} elements, expected {total}", out.len());
    if total == 0 {
        return;
    }
    let reach = shape.iter().zip(strides).fold(1usize, |reach, (len, stride)| reach + (len - 1) * stride);
    assert!(reach <= input.len(), "copy: the input has {} elements, its strides reach {reach}", input.len());

    let (mut dims, count) = merged(shape, strides);
    let inner = dims[count - 1];
    let out = SharedMut::new(out);
    if inner.src == 1 || count == 1 {
        return copy_runs(pool, &dims[..count], input, out);
    }
    // The dimension along which the source is contiguous becomes the other side of a transpose.
    match (0..count - 1).find(|&dim| dims[dim].src == 1 && dims[dim].len > 1) {
        Some(dim) => {
            let lines = dims[dim];
            dims.copy_within(dim + 1..count - 1, dim);
            transpose(pool, &dims[..count - 2], lines, inner, input, out);
        }
        None => copy_runs(pool, &dims[..count], input, out),
    }
}

/// Drops dimensions of one element and joins neighbours that are one run in both arrays.
fn merged(shape: &[usize], strides: &[usize]) -> ([Dim; MAX_DIMS], usize) {
    let mut dims = [Dim { len: 1, src: 1, dst: 1 }; MAX_DIMS];
    let mut count = 0;
    for (&len, &src) in shape.iter().zip(strides).filter(|&(&len, _)| len != 1) {
        if count > 0 && dims[count - 1].src == len * src {
            dims[count - 1] = Dim { len: dims[count - 1].len * len, src, dst: 1 };
        } else {
            dims[count] = Dim { len, src, dst: 1 };
            count += 1;
        }
    }
    let count = count.max(1);
    for dim in (0..count - 1).rev() {
        dims[dim].dst = dims[dim + 1].dst * dims[dim + 1].len;
    }
    (dims, count)
}

/// Offsets in source and destination of a position in the given dimensions.
fn offsets(dims: &[Dim], mut index: usize) -> (usize, usize) {
    let (mut src, mut dst) = (0, 0);
    for dim in dims.iter().rev() {
        let at = index % dim.len;
        index /= dim.len;
        src += at * dim.src;
        dst += at * dim.dst;
    }
    (src, dst)
}

/// Copies along the innermost dimension, whatever its stride.
fn copy_runs<S: Element, D: Element>(pool: &ThreadPool, dims: &[Dim], input: &[S], out: SharedMut<'_, D>) {
    let Some((inner, outer)) = dims.split_last() else { return };
    let runs: usize = outer.iter().map(|dim| dim.len).product();
    let pieces = inner.len.div_ceil(TASK);
    let runs_per_task = (TASK / inner.len).max(1);
    pool.run(runs.div_ceil(runs_per_task) * pieces, &|task, _| {
        let (group, piece) = (task / pieces, task % pieces);
        let from = piece * TASK;
        let len = TASK.min(inner.len - from);
        for run in group * runs_per_task..runs.min((group + 1) * runs_per_task) {
            let (src, _) = offsets(outer, run);
            // SAFETY: each task has its own runs, or its own piece of one.
            let out = unsafe { out.slice(run * inner.len + from, len) };
            let src = src + from * inner.src;
            match inner.src {
                0 => out.fill(D::narrow(input[src].widen())),
                1 => convert(pool.isa(), &input[src..src + len], out),
                stride => {
                    let values = input[src..].iter().step_by(stride);
                    out.iter_mut().zip(values).for_each(|(out, value)| *out = D::narrow(value.widen()));
                }
            }
        }
    });
}

/// Transposes blocks: `lines` is contiguous in the source, `inner` in the destination.
fn transpose<S: Source, D: Element>(
    pool: &ThreadPool,
    outer: &[Dim],
    lines: Dim,
    inner: Dim,
    input: &[S],
    out: SharedMut<'_, D>,
) {
    let kernels = micro_kernels(pool.isa(), false);
    let to_f32 = TypeId::of::<D>() == TypeId::of::<f32>();
    let far_source = inner.src > lines.dst;
    let (line_block, inner_block) = if far_source { (LONG, SHORT) } else { (SHORT, LONG) };
    // A far destination takes 16 lines at a time, a far source all lines of the block.
    let line_step = if far_source { line_block } else { 16 };
    let (across, along) = (lines.len.div_ceil(line_block), inner.len.div_ceil(inner_block));
    let planes: usize = outer.iter().map(|dim| dim.len).product();
    let blocks = planes * across * along;
    let per_task = (TASK / (lines.len.min(line_block) * inner.len.min(inner_block))).max(1);
    pool.run(blocks.div_ceil(per_task), &|task, _| {
        for block in task * per_task..blocks.min((task + 1) * per_task) {
            let (plane, place) = (block / (across * along), block % (across * along));
            let (first_line, first) = (place / along * line_block, place % along * inner_block);
            let (last_line, last) = (lines.len.min(first_line + line_block), inner.len.min(first + inner_block));
            let (src, dst) = offsets(outer, plane);
            for line in (first_line..last_line).step_by(line_step) {
                let count = line_step.min(last_line - line);
                for at in (first..last).step_by(16) {
                    let (src, dst) = (src + at * inner.src + line, dst + line * lines.dst + at);
                    let width = (last - at).min(16);
                    if width == 16 {
                        let pointers: [*const S; 16] =
                            std::array::from_fn(|at| input[src + at * inner.src..][..count].as_ptr());
                        let transpose = S::packers(kernels).transpose;
                        if to_f32 {
                            // SAFETY: each of the 16 pointers is to `count` elements; a row of the destination takes
                            // exactly these 16, which belong to this task.
                            unsafe { transpose(&pointers, count, out.as_ptr().add(dst).cast(), lines.dst) };
                        } else {
                            let mut block = [0f32; 16 * LONG];
                            // SAFETY: as above; the block has room for `LONG` rows.
                            unsafe { transpose(&pointers, count, block.as_mut_ptr(), 16) };
                            narrow_rows(pool.isa(), &block[..16 * count], out, dst, lines.dst);
                        }
                    } else {
                        for at in 0..width {
                            let values = &input[src + at * inner.src..][..count];
                            for (line, value) in values.iter().enumerate() {
                                // SAFETY: within the output, and part of this task's block.
                                unsafe {
                                    out.as_ptr().add(dst + line * lines.dst + at).write(D::narrow(value.widen()))
                                };
                            }
                        }
                    }
                }
            }
        }
    });
}

per_isa! {
/// Converts rows of 16 values, and puts each `stride` further from `start` on; they belong to the caller's task.
fn narrow_rows<D: Element>(rows: &[f32], out: SharedMut<'_, D>, start: usize, stride: usize) {
    for (row, values) in rows.chunks_exact(16).enumerate() {
        // SAFETY: no other task has these elements.
        let out = unsafe { out.slice(start + row * stride, 16) };
        for (out, value) in out.iter_mut().zip(values) {
            *out = D::narrow(*value);
        }
    }
}
}

/// Copies a block of shape `sizes` into a larger array of shape `into`, where it begins at `at`. The rest of `out` stays as
/// it is.
///
/// # Panics
/// If the three have different lengths, the block reaches out of the array, or a slice has another length than its shape
/// says: the caller's invariants, checked once.
pub fn place_block(pool: &ThreadPool, from: Elements, sizes: &[usize], out: ElementsMut, into: &[usize], at: &[usize]) {
    use {Elements as From, ElementsMut as To};
    match (from, out) {
        (From::F32(from), To::F32(out)) => place(pool, from, sizes, out, into, at),
        (From::F32(from), To::Bf16(out)) => place(pool, from, sizes, out, into, at),
        (From::Bf16(from), To::F32(out)) => place(pool, from, sizes, out, into, at),
        (From::Bf16(from), To::Bf16(out)) => place(pool, from, sizes, out, into, at),
    }
}

fn place<S: Element, D: Element>(
    pool: &ThreadPool,
    from: &[S],
    sizes: &[usize],
    out: &mut [D],
    into: &[usize],
    at: &[usize],
) {
    let fits = sizes.len() == into.len()
        && at.len() == into.len()
        && sizes.iter().zip(at).zip(into).all(|((size, at), into)| at + size <= *into);
    assert!(fits, "place: a block {sizes:?} at {at:?} does not fit into {into:?}");
    let (total, all) = (sizes.iter().product::<usize>(), into.iter().product::<usize>());
    if total == 0 {
        return;
    }
    assert!(
        from.len() == total && out.len() == all,
        "place: {} and {} elements, expected {total} and {all}",
        from.len(),
        out.len()
    );
    // Whole inner dimensions are one run.
    let whole = sizes.iter().zip(into).rev().take_while(|(size, into)| size == into).count();
    let outer = sizes.len().saturating_sub(whole + 1);
    let run: usize = sizes[outer..].iter().product();
    let inner: usize = into[(outer + 1).min(into.len())..].iter().product();
    let first = at.get(outer).map_or(0, |at| at * inner);
    let length: usize = into[outer..].iter().product();
    let start_of = |mut index: usize| {
        let (mut start, mut stride) = (first, length);
        for dim in (0..outer).rev() {
            start += (index % sizes[dim] + at[dim]) * stride;
            index /= sizes[dim];
            stride *= into[dim];
        }
        start
    };
    let out = SharedMut::new(out);
    let (pieces, runs_per_task) = (run.div_ceil(TASK), (TASK / run).max(1));
    let runs = total / run;
    pool.run(runs.div_ceil(runs_per_task) * pieces, &|task, _| {
        let (group, piece) = (task / pieces, task % pieces);
        let skipped = piece * TASK;
        let len = TASK.min(run - skipped);
        for index in group * runs_per_task..runs.min((group + 1) * runs_per_task) {
            // SAFETY: each task has its own runs, or its own piece of one.
            let out = unsafe { out.slice(start_of(index) + skipped, len) };
            convert(pool.isa(), &from[index * run + skipped..][..len], out);
        }
    });
}

/// `out = value`, by all threads.
pub fn fill(pool: &ThreadPool, out: &mut [f32], value: f32) {
    let (len, out) = (out.len(), SharedMut::new(out));
    pool.run(len.div_ceil(FILLED), &|task, _| {
        let start = task * FILLED;
        // SAFETY: each task has its own elements.
        unsafe { out.slice(start, FILLED.min(len - start)) }.fill(value);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_placed_where_they_belong() {
        let pools = [1, 3].map(ThreadPool::new);
        for (sizes, into, at) in [
            (&[3, 4][..], &[5, 9][..], &[1, 2][..]),
            (&[2, 3, 4], &[2, 5, 4], &[0, 2, 0]),
            (&[1, 7, 5, 2], &[3, 7, 5, 2], &[2, 0, 0, 0]),
            (&[2, 3, 1, 5], &[2, 3, 4, 5], &[0, 0, 3, 0]),
            (&[40_000], &[50_000], &[7_000]),
            (&[], &[], &[]),
            (&[0, 3], &[2, 3], &[1, 0]),
        ] {
            let from: Vec<f32> = (0..sizes.iter().product()).map(|i| i as f32).collect();
            let mut expected = vec![-1.0f32; into.iter().product()];
            for (index, value) in from.iter().enumerate() {
                let (mut left, mut offset, mut stride) = (index, 0, 1);
                for dim in (0..sizes.len()).rev() {
                    offset += (left % sizes[dim] + at[dim]) * stride;
                    left /= sizes[dim];
                    stride *= into[dim];
                }
                expected[offset] = *value;
            }
            for pool in &pools {
                let mut out = vec![-1.0f32; expected.len()];
                place_block(pool, Elements::F32(&from), sizes, ElementsMut::F32(&mut out), into, at);
                assert_eq!(out, expected, "{sizes:?} into {into:?} at {at:?}");
            }
        }
    }

    #[test]
    fn neighbouring_dimensions_are_joined() {
        let (dims, count) = merged(&[2, 1, 3, 4], &[12, 7, 4, 1]);
        assert_eq!((count, dims[0]), (1, Dim { len: 24, src: 1, dst: 1 }));
        let (dims, count) = merged(&[5, 3, 4], &[1, 20, 5]);
        assert_eq!((count, dims[0]), (2, Dim { len: 5, src: 1, dst: 12 }));
        assert_eq!(dims[1], Dim { len: 12, src: 5, dst: 1 });
        assert_eq!(merged(&[], &[]).1, 1);
    }
}
