//! The driver's C functions, and the driver itself: loaded once for the process.

use crate::error::CudaError;
use crate::library::{self, functions};
use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};
use std::ptr;
use std::sync::OnceLock;

/// A context, stream, event, module, function or graph: each an opaque pointer.
pub(crate) type Handle = *mut c_void;
/// `CUdeviceptr`.
pub(crate) type Address = u64;
/// `CUresult`, as a number: a newer driver may answer one that a Rust enum would not have.
pub(crate) type Status = c_int;

pub(crate) const SUCCESS: Status = 0;
pub(crate) const NO_DEVICE: Status = 100;
pub(crate) const STREAM_NON_BLOCKING: c_uint = 1;
pub(crate) const EVENT_DEFAULT: c_uint = 0;
pub(crate) const EVENT_DISABLE_TIMING: c_uint = 2;
pub(crate) const CAPTURE_RELAXED: c_int = 2;
pub(crate) const FUNCTION_MAX_DYNAMIC_SHARED_BYTES: c_int = 8;
pub(crate) const DEVICE_MULTIPROCESSORS: c_int = 16;
pub(crate) const DEVICE_CAPABILITY_MAJOR: c_int = 75;
pub(crate) const DEVICE_CAPABILITY_MINOR: c_int = 76;
pub(crate) const DEVICE_SHARED_BYTES_OPT_IN: c_int = 97;

functions! {
    /// What is used of `libcuda.so.1`.
    Functions {
        cuInit: fn(c_uint) -> Status;
        cuDriverGetVersion: fn(*mut c_int) -> Status;
        cuGetErrorName: fn(Status, *mut *const c_char) -> Status;
        cuGetErrorString: fn(Status, *mut *const c_char) -> Status;
        cuDeviceGetCount: fn(*mut c_int) -> Status;
        cuDeviceGet: fn(*mut c_int, c_int) -> Status;
        cuDeviceGetName: fn(*mut c_char, c_int, c_int) -> Status;
        cuDeviceGetAttribute: fn(*mut c_int, c_int, c_int) -> Status;
        cuDevicePrimaryCtxRetain: fn(*mut Handle, c_int) -> Status;
        cuDevicePrimaryCtxRelease_v2: fn(c_int) -> Status;
        cuCtxSetCurrent: fn(Handle) -> Status;
        cuCtxSynchronize: fn() -> Status;
        cuMemGetInfo_v2: fn(*mut usize, *mut usize) -> Status;
        cuMemAlloc_v2: fn(*mut Address, usize) -> Status;
        cuMemFree_v2: fn(Address) -> Status;
        cuMemHostAlloc: fn(*mut *mut c_void, usize, c_uint) -> Status;
        cuMemFreeHost: fn(*mut c_void) -> Status;
        cuMemcpyHtoDAsync_v2: fn(Address, *const c_void, usize, Handle) -> Status;
        cuMemcpyDtoHAsync_v2: fn(*mut c_void, Address, usize, Handle) -> Status;
        cuMemcpyDtoDAsync_v2: fn(Address, Address, usize, Handle) -> Status;
        cuMemsetD8Async: fn(Address, c_uchar, usize, Handle) -> Status;
        cuStreamCreate: fn(*mut Handle, c_uint) -> Status;
        cuStreamDestroy_v2: fn(Handle) -> Status;
        cuStreamSynchronize: fn(Handle) -> Status;
        cuStreamWaitEvent: fn(Handle, Handle, c_uint) -> Status;
        cuStreamBeginCapture_v2: fn(Handle, c_int) -> Status;
        cuStreamEndCapture: fn(Handle, *mut Handle) -> Status;
        cuEventCreate: fn(*mut Handle, c_uint) -> Status;
        cuEventDestroy_v2: fn(Handle) -> Status;
        cuEventRecord: fn(Handle, Handle) -> Status;
        cuEventSynchronize: fn(Handle) -> Status;
        cuEventElapsedTime: fn(*mut f32, Handle, Handle) -> Status;
        cuModuleLoadData: fn(*mut Handle, *const c_void) -> Status;
        cuModuleUnload: fn(Handle) -> Status;
        cuModuleGetFunction: fn(*mut Handle, Handle, *const c_char) -> Status;
        cuFuncSetAttribute: fn(Handle, c_int, c_int) -> Status;
        cuLaunchKernel: fn(
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void,
        ) -> Status;
        cuGraphInstantiateWithFlags: fn(*mut Handle, Handle, c_ulonglong) -> Status;
        cuGraphLaunch: fn(Handle, Handle) -> Status;
        cuGraphExecDestroy: fn(Handle) -> Status;
        cuGraphDestroy: fn(Handle) -> Status;
    }
}

/// `cuFuncGetParamInfo`: of CUDA 12.4, so it may be missing.
pub(crate) type FuncGetParamInfo = unsafe extern "C" fn(Handle, usize, *mut usize, *mut usize) -> Status;

/// The driver, initialised.
pub(crate) struct Driver {
    pub functions: Functions,
    /// Sizes of a kernel's parameters, if the driver can tell them.
    pub parameter: Option<FuncGetParamInfo>,
    /// `1000 * major + 10 * minor` of the newest CUDA that it runs.
    pub version: u32,
    /// What `cuInit` answered: with success the driver can be used.
    initialised: Status,
}

impl Driver {
    /// The process's driver: loaded by the first call.
    pub fn get() -> Result<&'static Driver, CudaError> {
        static DRIVER: OnceLock<Result<Driver, CudaError>> = OnceLock::new();
        DRIVER.get_or_init(Driver::load).as_ref().map_err(CudaError::clone)
    }

    /// The major version of the CUDA that the driver runs, if there is a driver.
    pub fn major() -> Option<u32> {
        Driver::get().ok().map(|driver| driver.version / 1000)
    }

    fn load() -> Result<Driver, CudaError> {
        let library = library::open(&library::DRIVER, None)?;
        let functions = Functions::load(&library)?;
        // SAFETY: the type is that of CUDA's header.
        let parameter = unsafe { library.function("cuFuncGetParamInfo") }.ok();
        let mut version = 0;
        // SAFETY: `cuInit` may be called at any time, and takes no flags; the version may be asked for before it.
        let (initialised, told) = unsafe { ((functions.cuInit)(0), (functions.cuDriverGetVersion)(&mut version)) };
        let driver = Driver { functions, parameter, version: version.max(0) as u32, initialised };
        driver.check(told, || "ask the driver for its version".into())?;
        Ok(driver)
    }

    /// How many GPUs it shows.
    pub fn devices(&self) -> Result<usize, CudaError> {
        if self.initialised == NO_DEVICE {
            return Ok(0);
        }
        self.check(self.initialised, || "initialise the driver".into())?;
        let mut count = 0;
        // SAFETY: the pointer is to a local, and the driver is initialised.
        let status = unsafe { (self.functions.cuDeviceGetCount)(&mut count) };
        self.check(status, || "count the GPUs".into())?;
        Ok(count.max(0) as usize)
    }

    /// An error that says what was attempted, unless the driver answered success.
    pub fn check(&self, status: Status, what: impl FnOnce() -> String) -> Result<(), CudaError> {
        if status == SUCCESS {
            return Ok(());
        }
        let text = |ask: unsafe extern "C" fn(Status, *mut *const c_char) -> Status| {
            let mut text = ptr::null();
            // SAFETY: any status may be asked about; the answer is null or a constant string of the driver.
            unsafe {
                ask(status, &mut text);
                match text.is_null() {
                    true => "a code that the driver has no words for".to_owned(),
                    false => CStr::from_ptr(text).to_string_lossy().into_owned(),
                }
            }
        };
        Err(CudaError::Call {
            library: "the CUDA driver",
            what: what(),
            code: status,
            name: text(self.functions.cuGetErrorName),
            text: text(self.functions.cuGetErrorString),
        })
    }
}
