//! cuDNN's C functions and constants: those of its graph ("backend") API.

use crate::blas;
use crate::compile;
use crate::driver::{Driver, Handle};
use crate::error::CudaError;
use crate::library::{self, functions};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::OnceLock;

/// `cudnnStatus_t`, as a number: a newer library may answer one that a Rust enum would not have.
pub(crate) type Status = c_int;
pub(crate) const SUCCESS: Status = 0;

/// `cudnnDataType_t`.
pub(crate) const DATA_FLOAT: c_int = 0;
pub(crate) const DATA_HALF: c_int = 2;
pub(crate) const DATA_BFLOAT16: c_int = 9;
/// `cudnnConvolutionMode_t`: without a flipped filter.
pub(crate) const CROSS_CORRELATION: c_int = 1;
/// `cudnnBackendHeurMode_t`.
pub(crate) const HEURISTIC_A: c_int = 3;
pub(crate) const HEURISTIC_FALLBACK: c_int = 2;
/// `cudnnBackendNumericalNote_t`.
pub(crate) const NOTE_TENSOR_CORE: c_int = 0;
pub(crate) const NOTE_DOWN_CONVERT_INPUTS: c_int = 1;
pub(crate) const NOTE_REDUCED_PRECISION_REDUCTION: c_int = 2;
pub(crate) const NOTE_FFT: c_int = 3;
pub(crate) const NOTE_NONDETERMINISTIC: c_int = 4;
/// This and the three that follow it.
pub(crate) const NOTE_WINOGRAD: c_int = 5;
pub(crate) const NOTE_WINOGRAD_LAST: c_int = 8;

/// `cudnnBackendDescriptorType_t`.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Convolution = 1,
    Engine = 2,
    EngineConfig = 3,
    EngineHeuristic = 4,
    ExecutionPlan = 5,
    ConvolutionForward = 10,
    ConvolutionBackwardFilter = 11,
    ConvolutionBackwardData = 12,
    OperationGraph = 15,
    VariantPack = 16,
    Tensor = 17,
    #[cfg(test)]
    DeviceProperties = 38,
}

/// `cudnnBackendAttributeType_t`.
const TYPE_HANDLE: c_int = 0;
pub(crate) const TYPE_DATA_TYPE: c_int = 1;
const TYPE_INT64: c_int = 3;
const TYPE_FLOAT: c_int = 4;
const TYPE_VOID_PTR: c_int = 6;
pub(crate) const TYPE_CONVOLUTION_MODE: c_int = 7;
pub(crate) const TYPE_HEURISTIC_MODE: c_int = 8;
const TYPE_NUMERICAL_NOTE: c_int = 11;
const TYPE_BACKEND_DESCRIPTOR: c_int = 15;
#[cfg(test)]
const TYPE_CHAR: c_int = 24;

/// `cudnnBackendAttributeName_t`.
pub(crate) mod attribute {
    use std::ffi::c_int;

    pub const CONVOLUTION_COMPUTE_TYPE: c_int = 100;
    pub const CONVOLUTION_MODE: c_int = 101;
    pub const CONVOLUTION_DILATIONS: c_int = 102;
    pub const CONVOLUTION_STRIDES: c_int = 103;
    pub const CONVOLUTION_POST_PADDINGS: c_int = 104;
    pub const CONVOLUTION_PRE_PADDINGS: c_int = 105;
    pub const CONVOLUTION_SPATIAL_DIMENSIONS: c_int = 106;
    pub const HEURISTIC_MODE: c_int = 200;
    pub const HEURISTIC_GRAPH: c_int = 201;
    pub const HEURISTIC_RESULTS: c_int = 202;
    pub const HEURISTIC_DEVICE_PROPERTIES: c_int = 204;
    pub const ENGINE_CONFIG_ENGINE: c_int = 300;
    pub const PLAN_HANDLE: c_int = 400;
    pub const PLAN_ENGINE_CONFIG: c_int = 401;
    pub const PLAN_WORKSPACE_BYTES: c_int = 402;
    pub const PLAN_DEVICE_PROPERTIES: c_int = 407;
    /// The first of six of an operation: alpha, beta, convolution, and three tensors.
    pub const FORWARD_ALPHA: c_int = 700;
    pub const BACKWARD_DATA_ALPHA: c_int = 706;
    pub const BACKWARD_FILTER_ALPHA: c_int = 712;
    pub const GRAPH_HANDLE: c_int = 800;
    pub const GRAPH_OPERATIONS: c_int = 801;
    pub const TENSOR_ALIGNMENT: c_int = 900;
    pub const TENSOR_DATA_TYPE: c_int = 901;
    pub const TENSOR_DIMENSIONS: c_int = 902;
    pub const TENSOR_STRIDES: c_int = 903;
    pub const TENSOR_UNIQUE_ID: c_int = 906;
    pub const PACK_UNIQUE_IDS: c_int = 1000;
    pub const PACK_POINTERS: c_int = 1001;
    pub const PACK_WORKSPACE: c_int = 1003;
    pub const ENGINE_NUMERICAL_NOTES: c_int = 1303;
    #[cfg(test)]
    pub const DEVICE_PROPERTIES_JSON: c_int = 2702;
}

functions! {
    /// What is used of `libcudnn.so`.
    Functions {
        cudnnGetVersion: fn() -> usize;
        cudnnGetErrorString: fn(Status) -> *const c_char;
        cudnnGetLastErrorString: fn(*mut c_char, usize) -> ();
        cudnnCreate: fn(*mut Handle) -> Status;
        cudnnDestroy: fn(Handle) -> Status;
        cudnnSetStream: fn(Handle, Handle) -> Status;
        cudnnBackendCreateDescriptor: fn(c_int, *mut Handle) -> Status;
        cudnnBackendDestroyDescriptor: fn(Handle) -> Status;
        cudnnBackendFinalize: fn(Handle) -> Status;
        cudnnBackendSetAttribute: fn(Handle, c_int, c_int, i64, *const c_void) -> Status;
        cudnnBackendGetAttribute: fn(Handle, c_int, c_int, i64, *mut i64, *mut c_void) -> Status;
        cudnnBackendExecute: fn(Handle, Handle, Handle) -> Status;
    }
}

impl Functions {
    /// The process's cuDNN: loaded by the first call.
    pub fn get() -> Result<&'static Functions, CudaError> {
        static CUDNN: OnceLock<Result<Functions, CudaError>> = OnceLock::new();
        CUDNN.get_or_init(Functions::open).as_ref().map_err(CudaError::clone)
    }

    fn open() -> Result<Functions, CudaError> {
        // cuDNN itself loads these two, by name only: what is loaded already it finds wherever it came from. It tells for
        // itself what it cannot do without them.
        let _ = (blas::Blas::version(), compile::version());
        Functions::load(&library::open(&library::CUDNN, Driver::major())?)
    }

    /// An error that says what was attempted, unless the library answered success.
    pub fn check(&self, status: Status, what: impl FnOnce() -> String) -> Result<(), CudaError> {
        if status == SUCCESS {
            return Ok(());
        }
        let mut text = [0_u8; 1024];
        // SAFETY: any status may be asked about, its name is a constant string; of the text, the library writes at most the
        // given number of bytes.
        let name = unsafe {
            (self.cudnnGetLastErrorString)(text.as_mut_ptr().cast::<c_char>(), text.len());
            CStr::from_ptr((self.cudnnGetErrorString)(status)).to_string_lossy().into_owned()
        };
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let text = String::from_utf8_lossy(text).trim().to_owned();
        Err(CudaError::Call { library: "cuDNN", what: what(), code: status, name, text })
    }
}

/// A description of a tensor, an operation, a graph, an engine, a plan.
pub(crate) struct Descriptor {
    pub handle: Handle,
}

// SAFETY: a descriptor is memory of the library's; nothing binds it to a thread.
unsafe impl Send for Descriptor {}
// SAFETY: a finished descriptor does not change any more, and changes before that take an exclusive reference.
unsafe impl Sync for Descriptor {}

impl Descriptor {
    pub fn new(kind: Kind) -> Result<Descriptor, CudaError> {
        let lib = Functions::get()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the pointer is to a local.
        let status = unsafe { (lib.cudnnBackendCreateDescriptor)(kind as c_int, &mut handle) };
        lib.check(status, || "make a cuDNN descriptor".into())?;
        Ok(Descriptor { handle })
    }

    /// # Safety
    /// `T` must be the C type that `kind` stands for.
    unsafe fn set<T>(&mut self, attribute: c_int, kind: c_int, values: &[T]) -> Result<(), CudaError> {
        let lib = Functions::get()?;
        // SAFETY: the descriptor is alive; the library reads as many values as there are.
        let status = unsafe {
            let (count, pointer) = (values.len() as i64, values.as_ptr().cast::<c_void>());
            (lib.cudnnBackendSetAttribute)(self.handle, attribute, kind, count, pointer)
        };
        lib.check(status, || format!("set attribute {attribute} of a cuDNN descriptor"))
    }

    pub fn integers(&mut self, attribute: c_int, values: &[i64]) -> Result<(), CudaError> {
        // SAFETY: the type is that of the values.
        unsafe { self.set(attribute, TYPE_INT64, values) }
    }

    pub fn float(&mut self, attribute: c_int, value: f32) -> Result<(), CudaError> {
        // SAFETY: the type is that of the value.
        unsafe { self.set(attribute, TYPE_FLOAT, &[value]) }
    }

    /// One of an enumeration's values; `kind` says of which enumeration.
    pub fn choice(&mut self, attribute: c_int, kind: c_int, value: c_int) -> Result<(), CudaError> {
        // SAFETY: the enumerations in use are as long as an int.
        unsafe { self.set(attribute, kind, &[value]) }
    }

    pub fn handle(&mut self, attribute: c_int, handle: Handle) -> Result<(), CudaError> {
        // SAFETY: the type is that of the value.
        unsafe { self.set(attribute, TYPE_HANDLE, &[handle]) }
    }

    pub fn pointers(&mut self, attribute: c_int, pointers: &[*mut c_void]) -> Result<(), CudaError> {
        // SAFETY: the type is that of the values.
        unsafe { self.set(attribute, TYPE_VOID_PTR, pointers) }
    }

    pub fn descriptor(&mut self, attribute: c_int, other: &Descriptor) -> Result<(), CudaError> {
        // SAFETY: the type is that of the value. Whoever makes a descriptor keeps alive what it refers to.
        unsafe { self.set(attribute, TYPE_BACKEND_DESCRIPTOR, &[other.handle]) }
    }

    #[cfg(test)]
    pub fn text(&mut self, attribute: c_int, text: &str) -> Result<(), CudaError> {
        // SAFETY: the type is that of the values.
        unsafe { self.set(attribute, TYPE_CHAR, text.as_bytes()) }
    }

    /// Ends the description; only then can it be used. The library says here what it does not support.
    pub fn finish(self, what: &str) -> Result<Descriptor, CudaError> {
        let lib = Functions::get()?;
        // SAFETY: the descriptor is alive.
        let status = unsafe { (lib.cudnnBackendFinalize)(self.handle) };
        lib.check(status, || format!("describe {what}"))?;
        Ok(self)
    }

    /// # Safety
    /// `T` must be the C type that `kind` stands for.
    unsafe fn get<T>(&self, attribute: c_int, kind: c_int, values: &mut [T]) -> Result<usize, CudaError> {
        let lib = Functions::get()?;
        let mut count = 0;
        // SAFETY: the descriptor is alive; the library writes no more values than it is asked for.
        let status = unsafe {
            let (room, pointer) = (values.len() as i64, values.as_mut_ptr().cast::<c_void>());
            let pointer = if values.is_empty() { ptr::null_mut() } else { pointer };
            (lib.cudnnBackendGetAttribute)(self.handle, attribute, kind, room, &mut count, pointer)
        };
        lib.check(status, || format!("ask for attribute {attribute} of a cuDNN descriptor"))?;
        Ok(count.max(0) as usize)
    }

    pub fn integer(&self, attribute: c_int) -> Result<i64, CudaError> {
        let mut value = [0];
        // SAFETY: the type is that of the value.
        unsafe { self.get(attribute, TYPE_INT64, &mut value)? };
        Ok(value[0])
    }

    /// An engine's numerical notes.
    pub fn notes(&self) -> Result<Vec<c_int>, CudaError> {
        let mut notes = [0; 64];
        // SAFETY: notes are an enumeration, as long as an int.
        let count = unsafe { self.get(attribute::ENGINE_NUMERICAL_NOTES, TYPE_NUMERICAL_NOTE, &mut notes)? };
        Ok(notes[..count.min(notes.len())].to_vec())
    }

    /// Fills `other`, which is not finished, with the descriptor that an attribute holds.
    pub fn fill(&self, attribute: c_int, other: &Descriptor) -> Result<(), CudaError> {
        // SAFETY: the type is that of the value: a descriptor that the library fills in.
        unsafe { self.get(attribute, TYPE_BACKEND_DESCRIPTOR, &mut [other.handle]) }.map(|_| ())
    }

    /// The descriptors of `kind` that an attribute holds.
    pub fn descriptors(&self, attribute: c_int, kind: Kind) -> Result<Vec<Descriptor>, CudaError> {
        // SAFETY: nothing is asked for but the count.
        let count = unsafe { self.get::<Handle>(attribute, TYPE_BACKEND_DESCRIPTOR, &mut [])? };
        let mut descriptors = (0..count).map(|_| Descriptor::new(kind)).collect::<Result<Vec<_>, _>>()?;
        let mut handles: Vec<Handle> = descriptors.iter().map(|descriptor| descriptor.handle).collect();
        if handles.is_empty() {
            return Ok(descriptors);
        }
        // SAFETY: the type is that of the values: descriptors that the library fills in.
        let count = unsafe { self.get(attribute, TYPE_BACKEND_DESCRIPTOR, &mut handles)? };
        descriptors.truncate(count);
        Ok(descriptors)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if let Ok(lib) = Functions::get() {
            // SAFETY: the descriptor was made by this value.
            unsafe { (lib.cudnnBackendDestroyDescriptor)(self.handle) };
        }
    }
}
