//! Compiled kernels: loading and launching them.

use crate::device::{Context, Device, Queue, lock};
use crate::driver::{self, Handle};
use crate::error::CudaError;
use std::any::Any;
use std::ffi::{CString, c_int, c_void};
use std::fmt;
use std::ptr;
use std::sync::{Arc, Mutex, Weak};

/// What a block may have of dynamic shared memory without asking for more.
const SHARED_BYTES_WITHOUT_ASKING: u32 = 48 << 10;

/// A cubin that is loaded on a device; it stays loaded while a [`Function`] of it, or a graph captured in its time, is left.
pub struct Module {
    loaded: Arc<Loaded>,
}

struct Loaded {
    context: Arc<Context>,
    handle: Handle,
}

// SAFETY: the driver allows any thread to use a module of a context that is current there.
unsafe impl Send for Loaded {}
// SAFETY: nothing of a module changes while it is loaded.
unsafe impl Sync for Loaded {}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Ok(functions) = self.context.bind() {
            // SAFETY: the module was loaded by this value. Its kernels end first.
            unsafe {
                for queue in Queue::ALL {
                    (functions.cuStreamSynchronize)(self.context.stream(queue));
                }
                (functions.cuModuleUnload)(self.handle);
            }
        }
    }
}

/// A kernel of a [`Module`].
pub struct Function {
    module: Arc<Loaded>,
    name: String,
    handle: Handle,
    /// How many parameters it takes, where the driver can tell.
    parameters: Option<usize>,
    /// The most bytes of dynamic shared memory that a launch may have so far.
    shared: Mutex<u32>,
}

// SAFETY: a function is a pointer into its module, which it keeps loaded.
unsafe impl Send for Function {}
// SAFETY: launching does not change a function; its one attribute only grows, behind a lock.
unsafe impl Sync for Function {}

impl Device {
    /// Loads a cubin, as [`crate::compile::compile`] makes it for this GPU's compute capability.
    pub fn load(&self, cubin: &[u8]) -> Result<Module, CudaError> {
        self.context.outside_capture("load kernels")?;
        // The driver reads as far as the file's own headers say.
        if !cubin.starts_with(b"\x7fELF") {
            return Err(CudaError::Argument {
                what: "load kernels".into(),
                expected: "a cubin, which is an ELF file".into(),
                got: format!("{} bytes of something else", cubin.len()),
                hint: "compile the source for the GPU's own architecture",
            });
        }
        let functions = self.context.bind()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the context is current; the image is an ELF file, which the driver checks further.
        let status = unsafe { (functions.cuModuleLoadData)(&mut handle, cubin.as_ptr().cast::<c_void>()) };
        self.context.check(status, || format!("load kernels on {}", self.name()))?;
        let loaded = Arc::new(Loaded { context: self.context.clone(), handle });
        let weak: Weak<dyn Any + Send + Sync> = Arc::downgrade(&loaded) as Weak<dyn Any + Send + Sync>;
        self.context.register(weak);
        Ok(Module { loaded })
    }

    /// Puts a kernel into a queue: `grid` blocks of `block` threads each, with `shared` bytes of dynamic shared memory.
    /// `args` are the kernel's parameters, each 8 bytes: pointers, integers, or whatever the kernel takes from their bits.
    ///
    /// # Errors
    /// [`CudaError::Argument`] if the number of arguments is wrong or a parameter is not 8 bytes, where the driver can tell
    /// (CUDA 12.4 and newer); [`CudaError::Call`] where the driver refuses. A fault while the kernel runs is told by a later
    /// call that waits.
    ///
    /// # Safety
    /// The kernel must take `args.len()` parameters of 8 bytes, and may, when the queue comes to it and at each replay of a
    /// graph that it is captured in, read and write only device memory that is allocated then and that nothing else uses
    /// against it.
    pub unsafe fn launch(
        &self,
        function: &Function,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        args: &[u64],
        queue: Queue,
    ) -> Result<(), CudaError> {
        let what = || format!("launch {} with {grid:?} blocks of {block:?} threads, {shared} bytes", function.name);
        self.context.owns(&function.module.context, "launch a kernel")?;
        if let Some(parameters) = function.parameters.filter(|parameters| *parameters != args.len()) {
            return Err(CudaError::Argument {
                what: what(),
                expected: format!("{parameters} arguments"),
                got: format!("{}", args.len()),
                hint: "this is a defect of what planned the launch",
            });
        }
        let functions = self.context.bind()?;
        {
            let mut allowed = lock(&function.shared);
            if shared > *allowed {
                let (attribute, bytes) = (driver::FUNCTION_MAX_DYNAMIC_SHARED_BYTES, shared as c_int);
                // SAFETY: the function is of this context, and its module is loaded.
                let status = unsafe { (functions.cuFuncSetAttribute)(function.handle, attribute, bytes) };
                self.context.check(status, || format!("let {} have {shared} bytes of shared memory", function.name))?;
                *allowed = shared;
            }
        }
        // The driver copies the parameters before it returns.
        let mut pointers: Vec<*mut c_void> =
            args.iter().map(|argument| ptr::from_ref(argument).cast_mut().cast::<c_void>()).collect();
        // SAFETY: function and stream are of this context; every parameter points to 8 bytes, of which the caller vouches
        // that the kernel takes as many; what the kernel does is the caller's promise.
        let status = unsafe {
            (functions.cuLaunchKernel)(
                function.handle,
                grid[0],
                grid[1],
                grid[2],
                block[0],
                block[1],
                block[2],
                shared,
                self.context.stream(queue),
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.context.check(status, what)
    }
}

impl Module {
    /// The kernel of that name (`extern "C" __global__`).
    pub fn function(&self, name: &str) -> Result<Function, CudaError> {
        let context = &self.loaded.context;
        let functions = context.bind()?;
        let what = || format!("find the kernel {name}");
        let argument = |expected: &str, got: String, hint| CudaError::Argument {
            what: what(),
            expected: expected.into(),
            got,
            hint,
        };
        let c_name = CString::new(name)
            .map_err(|_| argument("a name", format!("{name:?}"), "the name must be the one in the source"))?;
        let mut handle = ptr::null_mut();
        // SAFETY: the module is loaded, the name ends with a zero.
        let status = unsafe { (functions.cuModuleGetFunction)(&mut handle, self.loaded.handle, c_name.as_ptr()) };
        context.check(status, what)?;
        let mut parameters = None;
        if let Some(parameter) = context.driver.parameter {
            let (mut count, mut offset, mut size) = (0, 0, 0);
            // SAFETY: the function is of a loaded module; the driver answers an error behind the last parameter.
            while unsafe { parameter(handle, count, &mut offset, &mut size) } == driver::SUCCESS {
                if size != 8 {
                    let hint = "declare every parameter as a pointer or a 64-bit integer";
                    return Err(argument("parameters of 8 bytes", format!("number {count} of {size}"), hint));
                }
                count += 1;
            }
            parameters = Some(count);
        }
        let module = self.loaded.clone();
        Ok(Function { module, name: name.into(), handle, parameters, shared: Mutex::new(SHARED_BYTES_WITHOUT_ASKING) })
    }
}

impl Function {
    /// The kernel's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Module")
    }
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Function({})", self.name)
    }
}
