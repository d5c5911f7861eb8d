//! Conversions between element types, and operands widened to f32 for kernels that know only that.

use crate::elements::{Element, Elements, ElementsMut, bf16};
use crate::isa::per_isa;
use crate::threads::{Scratch, SharedMut, ThreadPool};

/// Elements converted by one task.
const TASK: usize = 32 * 1024;

per_isa! {
/// `out = from`, converted.
pub(crate) fn convert<S: Element, D: Element>(from: &[S], out: &mut [D]) {
    for (out, from) in out.iter_mut().zip(from) {
        *out = D::narrow(from.widen());
    }
}
}

/// As [`convert`], by all threads.
pub(crate) fn convert_all<S: Element, D: Element>(pool: &ThreadPool, from: &[S], out: &mut [D]) {
    debug_assert_eq!(from.len(), out.len());
    let len = from.len();
    let out = SharedMut::new(out);
    pool.run(len.div_ceil(TASK), &|task, _| {
        let (start, count) = (task * TASK, TASK.min(len - task * TASK));
        // SAFETY: each task has its own elements.
        convert(pool.isa(), &from[start..start + count], unsafe { out.slice(start, count) });
    });
}

/// An operand in f32: itself, or a copy in scratch memory.
pub(crate) enum Widened<'a> {
    Borrowed(&'a [f32]),
    Copied(Scratch<'a>),
}

impl Widened<'_> {
    pub fn as_slice(&self) -> &[f32] {
        match self {
            Widened::Borrowed(values) => values,
            Widened::Copied(scratch) => scratch,
        }
    }
}

/// The operand in f32, in shared scratch `slot` if it has to be copied.
pub(crate) fn widened<'a>(pool: &'a ThreadPool, slot: usize, from: Elements<'a>) -> Widened<'a> {
    match from {
        Elements::F32(values) => Widened::Borrowed(values),
        Elements::Bf16(values) => {
            let mut scratch = pool.shared_scratch(slot, values.len());
            convert_all(pool, values, &mut scratch);
            Widened::Copied(scratch)
        }
    }
}

/// As [`widened`], with f32 values rounded to bf16 on the way if `round`.
pub(crate) fn rounded<'a>(pool: &'a ThreadPool, slot: usize, from: Elements<'a>, round: bool) -> Widened<'a> {
    let mut copy = match (from, round) {
        (Elements::F32(values), true) => {
            let mut scratch = pool.shared_scratch(slot, values.len());
            scratch.copy_from_slice(values);
            scratch
        }
        (other, _) => return widened(pool, slot, other),
    };
    round_to_bf16(pool.isa(), &mut copy);
    Widened::Copied(copy)
}

per_isa! {
/// Rounds to values of bf16.
fn round_to_bf16(values: &mut [f32]) {
    for value in values {
        *value = bf16::narrow(*value).widen();
    }
}
}

/// Runs a kernel that writes f32; a bf16 result is computed in shared scratch `slot` and rounded at the end. If `old`,
/// the kernel finds the old values in its output.
pub(crate) fn through_f32(
    pool: &ThreadPool,
    slot: usize,
    out: ElementsMut,
    old: bool,
    kernel: impl FnOnce(&mut [f32]),
) {
    match out {
        ElementsMut::F32(out) => kernel(out),
        ElementsMut::Bf16(out) => {
            let mut scratch = pool.shared_scratch(slot, out.len());
            if old {
                convert_all(pool, out, &mut scratch);
            }
            kernel(&mut scratch);
            convert_all(pool, &scratch, out);
        }
    }
}
