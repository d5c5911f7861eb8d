//! Loops compiled at run time: a group of a fused kernel's instructions as one loop of AVX-512 machine code, so that a value
//! between two instructions is in a register and not in a cache. The interpreter runs a loop for each instruction; where
//! there is no AVX-512, or no memory may be made executable, it runs all of them.
//!
//! Every operation rounds as in the interpreter's loops, and in the same order: the bits are the same.

mod assembler;
mod emit;
mod record;
#[cfg(test)]
mod tests;

pub use assembler::Predicate;
pub use emit::{Output, Sink};
pub use record::{Operation, Recorded, Recorder, has_binary, has_unary};

use clip_host_cpu_kernels::Isa;
use memmap2::{Mmap, MmapMut};
use std::sync::OnceLock;

/// Pointers of a loop at most.
pub const MAX_POINTERS: usize = 48;

/// Whether loops can be compiled for an instruction set, on this system.
pub fn is_supported(isa: Isa) -> bool {
    static CAN_MAKE_CODE: OnceLock<bool> = OnceLock::new();
    let can_make_code = || {
        let made = executable(&[0xc3]);
        if let Err(error) = &made {
            tracing::warn!(
                "fused kernels are interpreted, at about half their speed: the system lets no memory become code ({error}); \
                 hint: systemd's MemoryDenyWriteExecute, SELinux's execmem and prctl's PR_SET_MDWE do that"
            );
        }
        made.is_ok()
    };
    cfg!(target_arch = "x86_64")
        && matches!(isa, Isa::Avx512 | Isa::Avx512Bf16)
        && *CAN_MAKE_CODE.get_or_init(can_make_code)
}

/// Memory that holds this code, and can no longer be written.
fn executable(code: &[u8]) -> std::io::Result<Mmap> {
    let mut mapping = MmapMut::map_anon(code.len())?;
    mapping[..code.len()].copy_from_slice(code);
    mapping.make_exec()
}

/// A compiled loop over rows and columns.
pub struct Loop {
    code: Mmap,
}

impl Loop {
    /// Compiles a body. `ahead` says for each pointer whether its memory is walked from loop to loop. `None` if there are too
    /// many pointers or values, or if the system lets no memory become code.
    pub fn new(list: &[Operation], outputs: &[Output], ahead: &[bool]) -> Option<Loop> {
        if ahead.len() > MAX_POINTERS {
            return None;
        }
        let code = emit::emit(list, outputs, ahead)?;
        Some(Loop { code: executable(&code).ok()? })
    }

    /// Runs the loop over `rows` rows of `columns` columns that follow each other.
    ///
    /// # Safety
    /// The processor has AVX-512 (F, BW, DQ and VL). `pointers[0]` leads to the scalars that the body reads; the others,
    /// in the order of their numbers, to memory of the body's types: `rows · columns` elements in the loop's order,
    /// `columns` by column, `rows` by row. What is streamed is aligned to 64 bytes (32 for bf16), as is every row of it.
    /// An output may be an operand in the loop's order, but overlaps none otherwise.
    pub unsafe fn run(&self, pointers: &[*const u8], columns: usize, rows: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            type Code = unsafe extern "sysv64" fn(*const *const u8, usize, usize);
            // SAFETY: the memory holds a function of this type, which reads and writes what the caller promises.
            unsafe {
                let code: Code = std::mem::transmute::<*const u8, Code>(self.code.as_ptr());
                code(pointers.as_ptr(), columns, rows);
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (pointers, columns, rows);
    }
}
