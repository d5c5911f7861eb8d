//! Software prefetch: a fused kernel walks several tensors in turn, a tile of each, which processors do not foresee as they
//! do one long walk. It asks for the next tile of each while it works on the current one.

use crate::memory::{Address, Memory};
use clip_host_compiler::kernel::Element;

/// Bytes of a cache line.
const LINE: usize = 64;

/// A tensor that is walked in the space's order.
pub struct Stream {
    address: Address,
    /// Bytes of an element.
    bytes: usize,
    /// Lines that each step asks for, so that all of them ask for a tile.
    share: usize,
}

impl Stream {
    /// A tensor that is walked `tile` elements at a time, each time by `steps` steps.
    pub fn new(address: Address, element: Element, tile: usize, steps: usize) -> Stream {
        let lines = (tile * element.bytes()).div_ceil(LINE);
        Stream { address, bytes: element.bytes(), share: lines.div_ceil(steps.max(1)) }
    }

    /// Asks for a step's share of the tile that begins at element `start`; without effect on results.
    #[inline(always)]
    pub fn ask(&self, memory: Memory, start: usize, step: usize) {
        // SAFETY: the address is of a plan's own; what lies beyond the tensor's end is only ever asked for.
        let tile = unsafe { memory.at::<u8>(self.address) }.wrapping_add(start * self.bytes);
        let first = tile.wrapping_add(step * self.share * LINE);
        (0..self.share).for_each(|line| prefetch(first.wrapping_add(line * LINE)));
    }
}

#[inline(always)]
fn prefetch(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch accesses no memory as far as the program can tell, and never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}
