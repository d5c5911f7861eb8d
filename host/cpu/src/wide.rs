//! f16 for kernels of their own, which do not know it: they read and write copies in f32. Simple rather than fast: on a CPU
//! bf16 takes no more room and needs no scaled loss.

use crate::memory::{Address, Memory};
use clip_host_cpu_kernels::f16;

/// The copies of one launch. The largest launch decides how much room they take.
#[derive(Default)]
pub struct Wide {
    /// By operand; empty for one that is read where it is.
    pub inputs: Vec<Vec<f32>>,
    pub output: Vec<f32>,
}

/// How an operand is copied.
pub enum Copy {
    /// Read where it is.
    None,
    /// From f16.
    Widened,
    /// From f32, rounded to f16: what is multiplied with f16 is f16 itself.
    Rounded,
}

impl Wide {
    /// Copies operands of so many elements at these places.
    ///
    /// # Safety
    /// As [`Memory::slice`].
    pub unsafe fn copy(&mut self, operands: impl Iterator<Item = (Copy, Address, usize)>, memory: Memory) {
        for (number, (copy, at, len)) in operands.enumerate() {
            if self.inputs.len() == number {
                self.inputs.push(Vec::new());
            }
            let to = &mut self.inputs[number];
            to.clear();
            // SAFETY: the caller's promise.
            unsafe {
                match copy {
                    Copy::None => {}
                    Copy::Widened => to.extend(memory.slice::<f16>(at, len).iter().map(|v| v.to_f32())),
                    Copy::Rounded => {
                        to.extend(memory.slice::<f32>(at, len).iter().map(|&v| f16::from_f32(v).to_f32()));
                    }
                }
            }
        }
    }
}

/// Writes a result's copy.
///
/// # Safety
/// As [`Memory::slice_mut`].
pub unsafe fn narrow(output: &[f32], at: Address, memory: Memory) {
    // SAFETY: the caller's promise.
    let to = unsafe { memory.slice_mut::<f16>(at, output.len()) };
    to.iter_mut().zip(output).for_each(|(to, &value)| *to = f16::from_f32(value));
}
