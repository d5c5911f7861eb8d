//! CUDA C to machine code by NVRTC. No GPU is needed for it, nor a driver: only the library.
//!
//! NVRTC has no headers but its own built-in ones: `cuda_bf16.h` and its like belong to a CUDA installation, which need not
//! be there. Kernels are `extern "C" __global__`, so that they are found by their names.

mod cache;

pub use cache::Cache;

use crate::driver::Driver;
use crate::error::CudaError;
use crate::library::{self, functions};
use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt::Write;
use std::ptr;
use std::sync::OnceLock;

/// What the source is called in the compiler's messages.
const FILE: &str = "kernels.cu";
/// So many of the errors are shown with their lines.
const SHOWN_ERRORS: usize = 3;
/// So many lines are shown before and behind the one with the error.
const LINES_AROUND: usize = 3;

type Program = *mut c_void;
type Status = c_int;
const SUCCESS: Status = 0;
const ERROR_INVALID_OPTION: Status = 5;
const ERROR_COMPILATION: Status = 6;

functions! {
    /// What is used of `libnvrtc.so`.
    Functions {
        nvrtcVersion: fn(*mut c_int, *mut c_int) -> Status;
        nvrtcGetErrorString: fn(Status) -> *const c_char;
        nvrtcCreateProgram: fn(
            *mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char,
        ) -> Status;
        nvrtcCompileProgram: fn(Program, c_int, *const *const c_char) -> Status;
        nvrtcDestroyProgram: fn(*mut Program) -> Status;
        nvrtcGetProgramLogSize: fn(Program, *mut usize) -> Status;
        nvrtcGetProgramLog: fn(Program, *mut c_char) -> Status;
        nvrtcGetCUBINSize: fn(Program, *mut usize) -> Status;
        nvrtcGetCUBIN: fn(Program, *mut c_char) -> Status;
    }
}

impl Functions {
    /// The process's NVRTC: loaded by the first call.
    fn get() -> Result<&'static Functions, CudaError> {
        static NVRTC: OnceLock<Result<Functions, CudaError>> = OnceLock::new();
        let load = || Functions::load(&library::open(&library::NVRTC, Driver::major())?);
        NVRTC.get_or_init(load).as_ref().map_err(CudaError::clone)
    }

    fn check(&self, status: Status, what: &str) -> Result<(), CudaError> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: any status may be asked about; the answer is a constant string.
        let text = unsafe { CStr::from_ptr((self.nvrtcGetErrorString)(status)) }.to_string_lossy().into_owned();
        Err(CudaError::Call { library: "NVRTC", what: what.into(), code: status, name: text.clone(), text })
    }
}

/// NVRTC's version, major and minor; an error if it cannot be loaded.
pub fn version() -> Result<(u32, u32), CudaError> {
    let nvrtc = Functions::get()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the pointers are to locals.
    nvrtc.check(unsafe { (nvrtc.nvrtcVersion)(&mut major, &mut minor) }, "ask NVRTC for its version")?;
    Ok((major.max(0) as u32, minor.max(0) as u32))
}

/// Compiles CUDA C for GPUs of compute capability `arch`: (9, 0) is `sm_90`. `options` are NVRTC's, `--fmad=false` for
/// example. The answer is a cubin, for [`crate::Device::load`].
///
/// # Errors
/// [`CudaError::Compile`] with the compiler's log and the lines of the source that it complains of; also where NVRTC does
/// not know the option or the architecture.
pub fn compile(source: &str, arch: (u32, u32), options: &[&str]) -> Result<Vec<u8>, CudaError> {
    let nvrtc = Functions::get()?;
    let c_string = |text: &str| {
        CString::new(text).map_err(|_| CudaError::Argument {
            what: "compile a kernel".into(),
            expected: "text without zero bytes".into(),
            got: format!("{:?}", text.chars().take(40).collect::<String>()),
            hint: "this is a defect of what generated the source",
        })
    };
    let (c_source, c_file) = (c_string(source)?, c_string(FILE)?);
    let mut c_options = vec![c_string(&format!("--gpu-architecture=sm_{}{}", arch.0, arch.1))?];
    for option in options {
        c_options.push(c_string(option)?);
    }
    let c_options: Vec<*const c_char> = c_options.iter().map(|option| option.as_ptr()).collect();

    let mut program = Compiling { nvrtc, program: ptr::null_mut() };
    // SAFETY: source and name end with zeros; no headers are given.
    let status = unsafe {
        let (source, file) = (c_source.as_ptr(), c_file.as_ptr());
        (nvrtc.nvrtcCreateProgram)(&mut program.program, source, file, 0, ptr::null(), ptr::null())
    };
    nvrtc.check(status, "hand a kernel's source to NVRTC")?;
    // SAFETY: the program was created, and the options end with zeros.
    let compiled =
        unsafe { (nvrtc.nvrtcCompileProgram)(program.program, c_options.len() as c_int, c_options.as_ptr()) };
    if matches!(compiled, ERROR_COMPILATION | ERROR_INVALID_OPTION) {
        let log = program.bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, "read NVRTC's log")?;
        let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned();
        let excerpt = excerpt(source, &log);
        return Err(CudaError::Compile { arch, log, excerpt });
    }
    nvrtc.check(compiled, "compile a kernel")?;
    program.bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, "read the compiled kernel")
}

/// A program in NVRTC's hands.
struct Compiling {
    nvrtc: &'static Functions,
    program: Program,
}

impl Compiling {
    /// What a pair of "how long" and "write it there" gives.
    fn bytes(
        &self,
        size: unsafe extern "C" fn(Program, *mut usize) -> Status,
        get: unsafe extern "C" fn(Program, *mut c_char) -> Status,
        what: &str,
    ) -> Result<Vec<u8>, CudaError> {
        let mut length = 0;
        // SAFETY: the program was created, the pointer is to a local.
        self.nvrtc.check(unsafe { size(self.program, &mut length) }, what)?;
        let mut bytes = vec![0; length];
        // SAFETY: NVRTC writes as many bytes as it said.
        self.nvrtc.check(unsafe { get(self.program, bytes.as_mut_ptr().cast::<c_char>()) }, what)?;
        Ok(bytes)
    }
}

impl Drop for Compiling {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: the program was created and is not used any more.
            unsafe { (self.nvrtc.nvrtcDestroyProgram)(&mut self.program) };
        }
    }
}

/// The numbered lines around the first errors that the log names (`kernels.cu(12): error: …`).
fn excerpt(source: &str, log: &str) -> String {
    let mut marked = Vec::new();
    for line in log.lines() {
        let number = line.strip_prefix(FILE).and_then(|rest| rest.strip_prefix('('));
        let number = number.and_then(|rest| rest.split_once("): ")).filter(|(_, message)| message.contains("error"));
        if let Some(number) = number.and_then(|(number, _)| number.parse::<usize>().ok())
            && !marked.contains(&number)
        {
            marked.push(number);
        }
    }
    marked.truncate(SHOWN_ERRORS);
    let shown: BTreeSet<usize> =
        marked.iter().flat_map(|number| number.saturating_sub(LINES_AROUND)..=number + LINES_AROUND).collect();
    let mut text = String::new();
    let mut previous = 0;
    for (index, line) in source.lines().enumerate().filter(|(index, _)| shown.contains(&(index + 1))) {
        let number = index + 1;
        if number != previous + 1 && previous != 0 {
            text.push_str("\n       ⋮");
        }
        let mark = if marked.contains(&number) { '>' } else { ' ' };
        // Writing to a string cannot fail.
        let _ = write!(text, "\n{mark} {number:5} | {line}");
        previous = number;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_shown_with_the_lines_around_them() {
        let source: String = (1..=30).map(|number| format!("line {number}\n")).collect();
        let log = "kernels.cu(2): error: no\nkernels.cu(2): error: again\nkernels.cu(9): warning: never mind\n\
                   kernels.cu(20): catastrophic error: stop\n2 errors";
        let expected = "\n      1 | line 1\n>     2 | line 2\n      3 | line 3\n      4 | line 4\n      5 | line 5\n       ⋮\
                        \n     17 | line 17\n     18 | line 18\n     19 | line 19\n>    20 | line 20\n     21 | line 21\
                        \n     22 | line 22\n     23 | line 23";
        assert_eq!(excerpt(&source, log), expected);
        assert_eq!(excerpt(&source, "nvrtc: error: invalid value for --gpu-architecture (-arch)"), "");
    }
}
