//! Memory of a run: the arena and the leaves, addressed by the plan's places.

use clip_host_compiler::kernel::Element;
use clip_host_compiler::plan::{Place, Plan, Region};
use clip_host_cpu_kernels::{bf16, f16};
use clip_host_plugin_api::ir::NodeId;
use memmap2::MmapMut;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Buffers from this many bytes on are mapped, in huge pages where the system has them: touching the memory of a large
/// model for the first time is many times faster, and its kernels miss the address cache less.
const MAPPED: usize = 1 << 20;

/// 4-byte elements at a cache line's start, zero at first. Holds f32, or i32 or pairs of bf16 or f16 by their bits.
pub struct Buffer {
    start: NonNull<f32>,
    len: usize,
    /// The memory's owner, if it was mapped.
    mapping: Option<MmapMut>,
}

// SAFETY: the buffer owns its memory; access follows the usual borrow rules.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub fn new(len: usize) -> Self {
        if len.saturating_mul(4) >= MAPPED
            && let Ok(mut mapping) = MmapMut::map_anon(len * 4)
        {
            #[cfg(target_os = "linux")]
            // Refused where there are no huge pages: then small ones do.
            let _ = mapping.advise(memmap2::Advice::HugePage);
            if let Some(start) = NonNull::new(mapping.as_mut_ptr().cast::<f32>()) {
                return Buffer { start, len, mapping: Some(mapping) };
            }
        }
        let layout = Self::layout(len);
        // SAFETY: the layout is never empty.
        let start = unsafe { alloc_zeroed(layout) }.cast::<f32>();
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Buffer { start, len, mapping: None }
    }

    fn layout(len: usize) -> Layout {
        // A length beyond the address space cannot have been planned; the maximum then fails to allocate.
        Layout::from_size_align(len.max(1).saturating_mul(4), 64).unwrap_or(Layout::new::<[u8; 64]>())
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn as_slice(&self) -> &[f32] {
        // SAFETY: `len` initialised elements.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: `len` initialised elements, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    pub fn as_mut_i32(&mut self) -> &mut [i32] {
        // SAFETY: same size and alignment, every bit pattern is valid.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len) }
    }

    /// Two for each of the buffer's elements.
    pub fn as_mut_bf16(&mut self) -> &mut [bf16] {
        // SAFETY: half the size each, twice as many, a smaller alignment; every bit pattern is valid.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len * 2) }
    }

    /// Two for each of the buffer's elements.
    pub fn as_bf16(&self) -> &[bf16] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len * 2) }
    }

    /// Two for each of the buffer's elements.
    pub fn as_mut_f16(&mut self) -> &mut [f16] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len * 2) }
    }

    /// Two for each of the buffer's elements.
    pub fn as_f16(&self) -> &[f16] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len * 2) }
    }

    pub(crate) fn as_ptr(&self) -> *mut f32 {
        self.start.as_ptr()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.mapping.is_none() {
            // SAFETY: allocated with this layout.
            unsafe { dealloc(self.start.as_ptr().cast(), Self::layout(self.len)) };
        }
    }
}

/// A place, resolved: which block of memory and how far into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// 0 is the arena, `1 + i` the plan's i-th leaf.
    pub block: usize,
    /// In bytes.
    pub offset: usize,
}

impl Address {
    pub fn of(plan: &Plan, place: Place) -> Address {
        let block = match place.region {
            Region::Arena => 0,
            Region::Leaf(leaf) => 1 + leaf_index(plan, leaf),
        };
        Address { block, offset: place.offset }
    }

    /// The address `elements` further.
    pub fn plus(self, elements: usize, element: Element) -> Address {
        Address { offset: self.offset + elements * element.bytes(), ..self }
    }
}

fn leaf_index(plan: &Plan, leaf: NodeId) -> usize {
    // Every leaf with a place is in the list: `compile` makes both.
    plan.leaves.iter().position(|&l| l == leaf).unwrap_or(usize::MAX - 1)
}

/// The blocks' first elements during a run.
#[derive(Clone, Copy)]
pub struct Memory<'a> {
    pub blocks: &'a [*mut f32],
}

// SAFETY: tasks reach disjoint parts, as the plan lays them out.
unsafe impl Send for Memory<'_> {}
// SAFETY: as above.
unsafe impl Sync for Memory<'_> {}

impl<'a> Memory<'a> {
    /// # Safety
    /// The address must come from the plan that the blocks were made for.
    #[inline(always)]
    pub unsafe fn at<T>(&self, address: Address) -> *mut T {
        // SAFETY: the plan's places lie inside their blocks, aligned for their element.
        unsafe { self.blocks.get_unchecked(address.block).byte_add(address.offset).cast() }
    }

    /// # Safety
    /// As [`Memory::at`]; nobody writes these elements while the slice is used.
    pub unsafe fn slice<T>(&self, address: Address, len: usize) -> &'a [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.at(address), len) }
    }

    /// # Safety
    /// As [`Memory::at`]; nobody else uses these elements while the slice is used.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice_mut<T>(&self, address: Address, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at(address), len) }
    }
}

/// Partial sums of all tasks.
#[derive(Clone, Copy)]
pub struct Partials(*mut f32);

// SAFETY: each task writes the sums of its own chunk.
unsafe impl Send for Partials {}
// SAFETY: as above.
unsafe impl Sync for Partials {}

impl Partials {
    pub fn new(sums: &mut [f32]) -> Self {
        Partials(sums.as_mut_ptr())
    }

    /// Where the first task's begin.
    pub fn get(&self) -> *mut f32 {
        self.0
    }
}
