//! How a fused kernel's operand lies in memory: strides over the rows and columns of the kernel's space.

use crate::memory::{Address, Memory};
use clip_host_compiler::kernel::Element;
use clip_host_cpu_kernels::elements::widened;
use clip_host_cpu_kernels::{bf16, f16};
use std::ops::Range;

/// How an operand moves from row to row.
pub enum Rows {
    Linear(usize),
    Strided { dims: Vec<usize>, strides: Vec<usize> },
}

/// How an operand moves along a row.
pub enum Cols {
    Unit,
    Stride(usize),
    Table(Vec<u32>),
}

impl Rows {
    /// Offset of a row's first element.
    #[inline(always)]
    pub fn offset(&self, row: usize) -> usize {
        match self {
            Rows::Linear(stride) => row * stride,
            Rows::Strided { dims, strides } => {
                let (mut left, mut offset) = (row, 0);
                for (size, stride) in dims.iter().zip(strides).rev() {
                    offset += left % size * stride;
                    left /= size;
                }
                offset
            }
        }
    }
}

/// Offsets along a row of these dimensions.
pub fn table(dims: &[usize], strides: &[usize]) -> Vec<u32> {
    let mut offsets = vec![0u32];
    for (&size, &stride) in dims.iter().zip(strides) {
        offsets = offsets.iter().flat_map(|o| (0..size).map(move |i| o + (i * stride) as u32)).collect();
    }
    offsets
}

/// One element of an operand.
///
/// # Safety
/// The address comes from the plan that the blocks were made for, and so does what lies `offset` elements further.
#[inline(always)]
pub unsafe fn read(memory: Memory, address: Address, element: Element, offset: usize) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        match element {
            Element::F32 => *memory.at::<f32>(address).add(offset),
            Element::I32 => *memory.at::<i32>(address).add(offset) as f32,
            Element::Bf16 => widened(*memory.at::<bf16>(address).add(offset)),
            Element::F16 => (*memory.at::<f16>(address).add(offset)).to_f32(),
        }
    }
}

/// The value of an iota at the elements of a tile, or with no columns at its rows. `dims` are those of the rows and those
/// of the columns; `factors` are for all of them.
///
/// # Safety
/// `out` has room for the tile's elements, or rows.
pub unsafe fn iota(
    (outer, inner): (&[usize], &[usize]),
    factors: &[usize],
    rows: Range<usize>,
    cols: Option<Range<usize>>,
    out: *mut f32,
) {
    let at = |mut flat: usize, dims: &[usize], factors: &[usize]| {
        let mut value = 0;
        for (size, factor) in dims.iter().zip(factors).rev() {
            value += flat % size * factor;
            flat /= size;
        }
        value
    };
    let (outer_factors, inner_factors) = factors.split_at(outer.len());
    let mut index = 0;
    let mut write = |value: usize| {
        // SAFETY: the caller's promise.
        unsafe { *out.add(index) = value as f32 };
        index += 1;
    };
    for row in rows {
        let start = at(row, outer, outer_factors);
        match cols.clone() {
            None => write(start),
            Some(cols) => cols.for_each(|col| write(start + at(col, inner, inner_factors))),
        }
    }
}
