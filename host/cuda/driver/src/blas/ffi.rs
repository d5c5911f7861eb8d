//! cuBLASLt's C functions and constants.

use crate::driver::{Driver, Handle};
use crate::error::CudaError;
use crate::library::{self, functions};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

/// `cublasStatus_t`, as a number: a newer library may answer one that a Rust enum would not have.
pub(crate) type Status = c_int;
pub(crate) const SUCCESS: Status = 0;

/// `cudaDataType`.
pub(crate) const R_32F: c_int = 0;
pub(crate) const R_16F: c_int = 2;
pub(crate) const R_16BF: c_int = 14;
/// `cublasComputeType_t`.
pub(crate) const COMPUTE_32F: c_int = 68;
pub(crate) const COMPUTE_32F_FAST_TF32: c_int = 77;
/// `cublasOperation_t`.
pub(crate) const OP_T: c_int = 1;
/// `cublasLtMatmulDescAttributes_t`.
pub(crate) const DESC_TRANSA: c_int = 3;
pub(crate) const DESC_TRANSB: c_int = 4;
pub(crate) const DESC_EPILOGUE: c_int = 7;
pub(crate) const DESC_BIAS_POINTER: c_int = 8;
pub(crate) const DESC_EPILOGUE_AUX_POINTER: c_int = 11;
pub(crate) const DESC_EPILOGUE_AUX_LD: c_int = 12;
/// `cublasLtMatrixLayoutAttribute_t`.
pub(crate) const LAYOUT_BATCH_COUNT: c_int = 5;
pub(crate) const LAYOUT_STRIDED_BATCH_OFFSET: c_int = 6;
/// `cublasLtMatmulPreferenceAttributes_t`.
pub(crate) const PREFERENCE_MAX_WORKSPACE_BYTES: c_int = 1;
pub(crate) const PREFERENCE_REDUCTION_SCHEME_MASK: c_int = 3;
/// The first of four: A, B, C, D.
pub(crate) const PREFERENCE_MIN_ALIGNMENT_A_BYTES: c_int = 5;
/// `cublasLtReductionScheme_t`: what a split along k may use beside none at all.
pub(crate) const REDUCTION_INPLACE: u32 = 1;
pub(crate) const REDUCTION_COMPUTE_TYPE: u32 = 2;
pub(crate) const REDUCTION_OUTPUT_TYPE: u32 = 4;
/// `cublasLtEpilogue_t`.
pub(crate) const EPILOGUE_DEFAULT: u32 = 1;
pub(crate) const EPILOGUE_BIAS: u32 = 4;
pub(crate) const EPILOGUE_GELU: u32 = 32;
pub(crate) const EPILOGUE_AUX: u32 = 128;
pub(crate) const EPILOGUE_DGELU: u32 = 64 | EPILOGUE_AUX;
pub(crate) const EPILOGUE_DGELU_BGRAD: u32 = EPILOGUE_DGELU | 16;

/// `cublasLtMatmulAlgo_t`: opaque, and plain data.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Algorithm {
    pub data: [u64; 8],
}

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct HeuristicResult {
    pub algorithm: Algorithm,
    pub workspace_bytes: usize,
    pub state: Status,
    pub waves: f32,
    pub reserved: [c_int; 4],
}

functions! {
    /// What is used of `libcublasLt.so`.
    Functions {
        cublasLtCreate: fn(*mut Handle) -> Status;
        cublasLtDestroy: fn(Handle) -> Status;
        cublasLtGetVersion: fn() -> usize;
        cublasLtGetStatusName: fn(Status) -> *const c_char;
        cublasLtGetStatusString: fn(Status) -> *const c_char;
        cublasLtMatmulDescCreate: fn(*mut Handle, c_int, c_int) -> Status;
        cublasLtMatmulDescDestroy: fn(Handle) -> Status;
        cublasLtMatmulDescSetAttribute: fn(Handle, c_int, *const c_void, usize) -> Status;
        cublasLtMatrixLayoutCreate: fn(*mut Handle, c_int, u64, u64, i64) -> Status;
        cublasLtMatrixLayoutDestroy: fn(Handle) -> Status;
        cublasLtMatrixLayoutSetAttribute: fn(Handle, c_int, *const c_void, usize) -> Status;
        cublasLtMatmulPreferenceCreate: fn(*mut Handle) -> Status;
        cublasLtMatmulPreferenceDestroy: fn(Handle) -> Status;
        cublasLtMatmulPreferenceSetAttribute: fn(Handle, c_int, *const c_void, usize) -> Status;
        cublasLtMatmulAlgoGetHeuristic: fn(
            Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut HeuristicResult, *mut c_int,
        ) -> Status;
        cublasLtMatmul: fn(
            Handle, Handle, *const c_void, *const c_void, Handle, *const c_void, Handle, *const c_void, *const c_void,
            Handle, *mut c_void, Handle, *const Algorithm, *mut c_void, usize, Handle,
        ) -> Status;
    }
}

impl Functions {
    /// The process's cuBLASLt: loaded by the first call.
    pub fn get() -> Result<&'static Functions, CudaError> {
        static CUBLAS_LT: OnceLock<Result<Functions, CudaError>> = OnceLock::new();
        let load = || Functions::load(&library::open(&library::CUBLAS_LT, Driver::major())?);
        CUBLAS_LT.get_or_init(load).as_ref().map_err(CudaError::clone)
    }

    /// An error that says what was attempted, unless the library answered success.
    pub fn check(&self, status: Status, what: impl FnOnce() -> String) -> Result<(), CudaError> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: any status may be asked about; the answers are constant strings.
        let text = |ask: unsafe extern "C" fn(Status) -> *const c_char| unsafe {
            CStr::from_ptr(ask(status)).to_string_lossy().into_owned()
        };
        Err(CudaError::Call {
            library: "cuBLASLt",
            what: what(),
            code: status,
            name: text(self.cublasLtGetStatusName),
            text: text(self.cublasLtGetStatusString),
        })
    }
}

/// Descriptions of one kind: what makes, changes and destroys them.
pub(crate) struct Object {
    pub handle: Handle,
    set: unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> Status,
    destroy: unsafe extern "C" fn(Handle) -> Status,
}

// SAFETY: a description is plain memory of the library's; nothing binds it to a thread.
unsafe impl Send for Object {}

impl Object {
    pub fn product(compute: c_int) -> Result<Object, CudaError> {
        let lib = Functions::get()?;
        let mut object = Object {
            handle: std::ptr::null_mut(),
            set: lib.cublasLtMatmulDescSetAttribute,
            destroy: lib.cublasLtMatmulDescDestroy,
        };
        // SAFETY: the pointer is to a local.
        let status = unsafe { (lib.cublasLtMatmulDescCreate)(&mut object.handle, compute, R_32F) };
        lib.check(status, || "describe a product".into())?;
        Ok(object)
    }

    pub fn layout(element: c_int, rows: usize, columns: usize, leading: usize) -> Result<Object, CudaError> {
        let lib = Functions::get()?;
        let mut object = Object {
            handle: std::ptr::null_mut(),
            set: lib.cublasLtMatrixLayoutSetAttribute,
            destroy: lib.cublasLtMatrixLayoutDestroy,
        };
        let (rows, columns, leading) = (rows as u64, columns as u64, leading as i64);
        // SAFETY: the pointer is to a local.
        let status = unsafe { (lib.cublasLtMatrixLayoutCreate)(&mut object.handle, element, rows, columns, leading) };
        lib.check(status, || "describe a matrix".into())?;
        Ok(object)
    }

    pub fn preference() -> Result<Object, CudaError> {
        let lib = Functions::get()?;
        let mut object = Object {
            handle: std::ptr::null_mut(),
            set: lib.cublasLtMatmulPreferenceSetAttribute,
            destroy: lib.cublasLtMatmulPreferenceDestroy,
        };
        // SAFETY: the pointer is to a local.
        let status = unsafe { (lib.cublasLtMatmulPreferenceCreate)(&mut object.handle) };
        lib.check(status, || "describe the search for an algorithm".into())?;
        Ok(object)
    }

    /// Sets an attribute, whose C type must be as long as `T` is: the library checks the length.
    pub fn set<T: Number>(&mut self, attribute: c_int, value: T) -> Result<(), CudaError> {
        // SAFETY: the description is alive; the library reads as many bytes as it is told, and refuses another length.
        let status = unsafe {
            let pointer = std::ptr::from_ref(&value).cast::<c_void>();
            (self.set)(self.handle, attribute, pointer, std::mem::size_of::<T>())
        };
        Functions::get()?.check(status, || format!("set attribute {attribute} of a product, matrix or search"))
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: the description was made by this value.
            unsafe { (self.destroy)(self.handle) };
        }
    }
}

/// What an attribute may be.
pub(crate) trait Number: Copy {}
impl Number for i32 {}
impl Number for u32 {}
impl Number for i64 {}
impl Number for u64 {}
