//! What can go wrong. Every message says what was attempted, what was expected and what was got; a last line `hint: …`
//! says what to do about it.

use crate::library::PATH_VARIABLE;
use thiserror::Error;

/// Why something of CUDA did not work.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum CudaError {
    /// A library is not there, or the system's loader refuses it.
    #[error(
        "cannot {purpose}: expected the library {library}, got none in:\n{}\nhint: {source_hint}, or name the folder \
         that holds it in {PATH_VARIABLE}",
        looked_in.iter().map(|place| format!("  {place}")).collect::<Vec<_>>().join("\n")
    )]
    Library {
        /// Its file name, with the versions that would do.
        library: String,
        /// What it is needed for.
        purpose: &'static str,
        /// Every place that was looked in; where a file was there, why it could not be loaded.
        looked_in: Vec<String>,
        /// Where the library comes from.
        source_hint: &'static str,
    },
    /// A library is older than what this crate needs.
    #[error(
        "cannot use {library}: expected the function {symbol} in it, got: {message}\n\
         hint: CUDA 12 or newer and cuDNN 9 or newer are needed"
    )]
    Symbol {
        /// Its path, or its name if the loader found it.
        library: String,
        /// The function.
        symbol: &'static str,
        /// The loader's words.
        message: String,
    },
    /// There is a driver, but no such GPU.
    #[error(
        "cannot open GPU {index}: expected a GPU of that number, got {count} that the driver shows\n\
         hint: `nvidia-smi -L` lists them; CUDA_VISIBLE_DEVICES hides some"
    )]
    NoDevice {
        /// The number asked for, from 0.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// A call into a library failed.
    #[error("cannot {what}: expected success of {library}, got {name} ({code}): {text}\nhint: {}", hint(name))]
    Call {
        /// Whose call.
        library: &'static str,
        /// What was attempted.
        what: String,
        /// The library's number for it.
        code: i32,
        /// The library's name for it.
        name: String,
        /// The library's words for it.
        text: String,
    },
    /// A kernel's source does not compile.
    #[error(
        "cannot compile the kernel for sm_{}{}: expected CUDA C without errors, got:\n{log}{excerpt}\n\
         hint: the source is generated, so this is a defect of what generated it, unless the GPU is newer than NVRTC",
        arch.0, arch.1
    )]
    Compile {
        /// Compute capability.
        arch: (u32, u32),
        /// What the compiler says.
        log: String,
        /// The lines of the source around the errors, numbered.
        excerpt: String,
    },
    /// An address that is not the device's.
    #[error(
        "cannot {what}: expected {bytes} bytes of allocated device memory, got the address {address:#x}\n\
         hint: the memory may have been freed; an address and its length must lie within one allocation"
    )]
    Range {
        /// What was attempted.
        what: String,
        /// The first byte.
        address: u64,
        /// How many.
        bytes: usize,
    },
    /// A call that makes no sense.
    #[error("cannot {what}: expected {expected}, got {got}\nhint: {hint}")]
    Argument {
        /// What was attempted.
        what: String,
        /// What it needs.
        expected: String,
        /// What it was given.
        got: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// A file of the kernel cache.
    #[error("cannot {what}: expected to, got: {message}\nhint: choose another folder for the kernel cache")]
    File {
        /// What was attempted, with the path.
        what: String,
        /// The system's words.
        message: String,
    },
}

fn hint(name: &str) -> &'static str {
    match name {
        "CUDA_ERROR_OUT_OF_MEMORY" => "take a smaller batch, or free the GPU (`nvidia-smi` shows who uses it)",
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" | "CUDA_ERROR_SYSTEM_NOT_READY" => {
            "driver and kernel module do not fit each other; `nvidia-smi` says more, a restart often helps"
        }
        "CUDA_ERROR_NO_BINARY_FOR_GPU" | "CUDA_ERROR_INVALID_IMAGE" => {
            "the kernel was compiled for another GPU, or by an NVRTC of a newer major version than the driver's"
        }
        "CUDA_ERROR_ILLEGAL_ADDRESS" | "CUDA_ERROR_LAUNCH_FAILED" => {
            "a kernel that ran before this call is at fault; the process must begin anew"
        }
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" | "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" => {
            "run the step once before it is captured, and wait for nothing while it is captured"
        }
        "CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED" => {
            "cuDNN's other libraries must lie beside libcudnn.so.9, and they need the driver's libcuda.so.1"
        }
        _ => "`nvidia-smi` shows the driver and the GPU; NVIDIA's documentation explains the code",
    }
}
