//! A GPU as a [`Machine`].

use crate::launch::{Convolution, Function, Launch, Product};
use crate::library::{Libraries, Ready};
use crate::machine::{Handle, Machine, MachineError, Recording, Result};
use clip_host_cuda_driver::blas::{Blas, Gemm, GemmPlan, Operands};
use clip_host_cuda_driver::compile::Cache;
use clip_host_cuda_driver::dnn::{Conv, ConvOperands, ConvPlan, Dnn};
use clip_host_cuda_driver::{Compute, CudaError, Device, DeviceMemory, Event, Graph, Pinned, Queue};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// What NVRTC is asked for besides the architecture.
pub const OPTIONS: [&str; 1] = ["--std=c++17"];
/// Bytes of workspace that a product may ask for: what cuBLAS recommends on Hopper.
const WORKSPACE: usize = 32 << 20;
/// Bytes of workspace that a convolution may ask for.
const CONVOLUTION_WORKSPACE: usize = 1 << 30;
/// Events that are kept for measuring.
const EVENTS: usize = 4096;

/// Opens a GPU, by its number from 0.
///
/// # Errors
/// If there is none, or a library is missing: with its name, and where it was looked for.
pub fn open(index: usize) -> std::result::Result<Arc<dyn Machine>, CudaError> {
    open_with(index, Options::default())
}

/// How a GPU computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Whether cuBLASLt and cuDNN are used where they are there; otherwise every kernel is rendered.
    pub libraries: bool,
    /// Whether they may round operands of f32 to ten bits of mantissa.
    pub tf32: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { libraries: true, tf32: false }
    }
}

/// As [`open`], with options.
///
/// # Errors
/// As [`open`].
pub fn open_with(index: usize, options: Options) -> std::result::Result<Arc<dyn Machine>, CudaError> {
    let device = Device::open(index)?;
    // Without the compiler nothing could run: say so now.
    clip_host_cuda_driver::compile::version()?;
    let cache = Cache::open(cache_folder())?;
    let slower = |what: &str, error: CudaError| {
        tracing::warn!("{what} are computed by rendered kernels, which are slower: {error}");
    };
    let (mut blas, mut dnn) = (None, None);
    if options.libraries {
        blas = Blas::open(&device).map_err(|error| slower("products", error)).ok();
        dnn = Dnn::open(&device).map_err(|error| slower("convolutions", error)).ok();
    }
    let compute = if options.tf32 { Compute::Tf32 } else { Compute::F32 };
    Ok(Arc::new(Gpu { device, cache, blas, dnn, compute, state: Mutex::default() }))
}

/// Where compiled kernels are kept: beside other programs' caches.
fn cache_folder() -> PathBuf {
    let folder = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")));
    base.unwrap_or_else(std::env::temp_dir).join("clip-host").join("kernels")
}

/// A kernel's machine code.
type Compiled = std::result::Result<Vec<u8>, CudaError>;

/// An NVIDIA GPU with its compute queue.
struct Gpu {
    device: Device,
    cache: Cache,
    blas: Option<Blas>,
    dnn: Option<Dnn>,
    /// How the libraries form products of f32.
    compute: Compute,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    memory: BTreeMap<u64, DeviceMemory>,
    names: HashMap<String, usize>,
    functions: Vec<clip_host_cuda_driver::Function>,
    products: Vec<(Gemm, GemmPlan)>,
    /// With those that cuDNN does not take.
    convolutions: Vec<(Conv, Option<ConvPlan>)>,
    /// Those that are forgotten leave their number.
    recordings: Vec<Option<Graph>>,
    /// What is sent ahead.
    slots: [Option<Slot>; 2],
    /// For measuring, made once; the first `noted` stand for moments.
    events: Vec<Event>,
    noted: usize,
}

/// Page-locked memory that images are sent from, and its copies' ends.
struct Slot {
    pinned: Pinned,
    arrived: Event,
    /// Of the last work that read what arrived.
    read: Event,
    is_read: bool,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpu({})", self.device.name())
    }
}

fn failed(what: &str) -> impl FnOnce(CudaError) -> MachineError + '_ {
    move |error| MachineError::new(what, error)
}

impl Gpu {
    fn state(&self) -> MutexGuard<'_, State> {
        // Whoever panicked with the lock left nothing half done: each call changes one thing.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Compiles on all cores.
    fn compile(&self, functions: &[&Function]) -> Result<Vec<Vec<u8>>> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(functions.len());
        let next = AtomicUsize::new(0);
        let arch = self.device.compute_capability();
        let none: Vec<Option<Compiled>> = functions.iter().map(|_| None).collect();
        let compiled = Mutex::new(none);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(function) = functions.get(index) else { break };
                        let cubin = self.cache.get_or_compile(&function.source(), arch, &OPTIONS);
                        if let Ok(mut compiled) = compiled.lock() {
                            compiled[index] = Some(cubin);
                        }
                    }
                });
            }
        });
        let compiled = compiled.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        let missing = || MachineError::new("compiling kernels", "a compiler's thread ended early");
        compiled.into_iter().map(|c| c.ok_or_else(missing)?.map_err(failed("compiling kernels"))).collect()
    }
}

impl Libraries for Gpu {
    fn product(&self, gemm: &Gemm) -> Option<Ready> {
        let gemm = &Gemm { compute: self.compute, ..*gemm };
        let mut state = self.state();
        let known = state.products.iter().position(|(known, _)| known == gemm);
        let number = match known {
            Some(number) => number,
            None => {
                let plan = self.blas.as_ref()?.plan(gemm, WORKSPACE, 0);
                let plan = plan.map_err(|error| tracing::debug!("cuBLASLt does not take {gemm:?}: {error}")).ok()?;
                state.products.push((*gemm, plan));
                state.products.len() - 1
            }
        };
        Some(Ready { number, workspace: state.products[number].1.workspace_bytes() })
    }

    fn convolution(&self, conv: &Conv) -> Option<Ready> {
        self.plan_convolution(conv)
    }
}

impl Gpu {
    /// The number of a convolution's plan, if cuDNN takes it.
    fn plan_convolution(&self, conv: &Conv) -> Option<Ready> {
        let conv = &Conv { compute: self.compute, ..*conv };
        let dnn = self.dnn.as_ref()?;
        let mut state = self.state();
        let number = match state.convolutions.iter().position(|(known, _)| known == conv) {
            Some(number) => number,
            None => {
                let plan = dnn.plan(conv, CONVOLUTION_WORKSPACE, 0);
                let plan = plan.map_err(|error| tracing::debug!("cuDNN does not take {conv:?}: {error}")).ok();
                state.convolutions.push((*conv, plan));
                state.convolutions.len() - 1
            }
        };
        let workspace = state.convolutions[number].1.as_ref()?.workspace_bytes();
        Some(Ready { number, workspace })
    }
}

impl Machine for Gpu {
    fn name(&self) -> String {
        self.device.name().to_string()
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        let memory = self.device.alloc(bytes).map_err(failed("taking memory"))?;
        let address = memory.address();
        self.state().memory.insert(address, memory);
        Ok(address)
    }

    fn free(&self, address: u64) {
        self.state().memory.remove(&address);
    }

    fn upload(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.device.upload(address, bytes).map_err(failed("a copy to the GPU"))
    }

    fn send(&self, slot: usize, address: u64, bytes: &[u8]) -> Result<()> {
        let mut state = self.state();
        let what = "sending images ahead";
        let slot = state.slots.get_mut(slot).ok_or_else(|| MachineError::new(what, "there is no such slot"))?;
        let pinned = || self.device.pinned(bytes.len()).map_err(failed(what));
        match slot {
            Some(slot) if slot.pinned.bytes() >= bytes.len() => {}
            // Marks stay: what was sent before may not have been read yet.
            Some(slot) => slot.pinned = pinned()?,
            None => {
                let event = || self.device.event().map_err(failed(what));
                *slot = Some(Slot { pinned: pinned()?, arrived: event()?, read: event()?, is_read: false });
            }
        }
        let Some(slot) = slot else { return Ok(()) };
        // The copy before from this page-locked memory has been waited for by the step that read it.
        slot.pinned.as_mut_slice().map_err(failed(what))?[..bytes.len()].copy_from_slice(bytes);
        if slot.is_read {
            self.device.wait(&slot.read, Queue::Copy).map_err(failed(what))?;
        }
        self.device.upload_async(&slot.pinned, 0..bytes.len(), address, Queue::Copy).map_err(failed(what))?;
        self.device.record(&slot.arrived, Queue::Copy).map_err(failed(what))
    }

    fn receive(&self, slot: usize) -> Result<()> {
        match self.state().slots.get(slot) {
            Some(Some(slot)) => self.device.wait(&slot.arrived, Queue::Compute).map_err(failed("waiting for images")),
            _ => Ok(()),
        }
    }

    fn release(&self, slot: usize) -> Result<()> {
        match self.state().slots.get_mut(slot) {
            Some(Some(slot)) => {
                slot.is_read = true;
                self.device.record(&slot.read, Queue::Compute).map_err(failed("reading images"))
            }
            _ => Ok(()),
        }
    }

    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.device.download(address, bytes).map_err(failed("a copy from the GPU"))
    }

    fn load(&self, functions: &[Function]) -> Result<Vec<Handle>> {
        let new: Vec<&Function> = {
            let state = self.state();
            functions.iter().filter(|f| !state.names.contains_key(&f.name)).collect()
        };
        let cubins = self.compile(&new)?;
        let mut state = self.state();
        for (function, cubin) in new.into_iter().zip(cubins) {
            let module = self.device.load(&cubin).map_err(failed("loading kernels"))?;
            let ready = module.function(&function.name).map_err(failed("loading kernels"))?;
            let number = state.functions.len();
            state.functions.push(ready);
            state.names.insert(function.name.clone(), number);
        }
        let unknown = |f: &Function| MachineError::new("loading kernels", format!("{} is not there", f.name));
        functions.iter().map(|f| state.names.get(&f.name).map(|&n| Handle(n)).ok_or_else(|| unknown(f))).collect()
    }

    fn launch(&self, function: Handle, launch: &Launch, arguments: &[u64]) -> Result<()> {
        let state = self.state();
        let unknown = || MachineError::new("a launch", "the function is not loaded");
        let function = state.functions.get(function.0).ok_or_else(unknown)?;
        // SAFETY: the executor verified the launch against its plan: each argument is memory that it holds, of the size
        // that the kernel's text says. The executor keeps it while its recordings are replayed.
        unsafe { self.device.launch(function, launch.grid, launch.block, 0, arguments, Queue::Compute) }
            .map_err(failed("a launch"))
    }

    fn multiply(&self, product: &Product, arguments: &[u64]) -> Result<()> {
        let state = self.state();
        let unknown = || MachineError::new("a product", "it is not ready");
        let (_, plan) = state.products.get(product.ready).ok_or_else(unknown)?;
        let [a, b, c, rest @ ..] = arguments else { return Err(unknown()) };
        let workspace = rest.first().copied().unwrap_or(0);
        let operands = Operands { a: *a, b: *b, c: *c, workspace, ..Operands::default() };
        plan.run(&operands, Queue::Compute).map_err(failed("a product"))
    }

    fn convolve(&self, convolution: &Convolution, arguments: &[u64]) -> Result<()> {
        let state = self.state();
        let unknown = || MachineError::new("a convolution", "it is not ready");
        let plan = state.convolutions.get(convolution.ready).and_then(|(_, plan)| plan.as_ref()).ok_or_else(unknown)?;
        let [x, w, y, rest @ ..] = arguments else { return Err(unknown()) };
        let workspace = rest.first().copied().unwrap_or(0);
        let operands = ConvOperands { x: *x, w: *w, y: *y, workspace };
        plan.run(&operands, Queue::Compute).map_err(failed("a convolution"))
    }

    fn synchronize(&self) -> Result<()> {
        self.device.synchronize().map_err(failed("waiting for the GPU"))
    }

    fn begin_recording(&self) -> Result<bool> {
        self.device.begin_capture().map_err(failed("recording the step"))?;
        Ok(true)
    }

    fn end_recording(&self) -> Result<Recording> {
        let graph = self.device.end_capture().map_err(failed("recording the step"))?;
        let mut state = self.state();
        state.recordings.push(Some(graph));
        Ok(Recording(state.recordings.len() - 1))
    }

    fn replay(&self, recording: Recording) -> Result<()> {
        let state = self.state();
        let unknown = || MachineError::new("replaying the step", "there is no such recording");
        let graph = state.recordings.get(recording.0).and_then(Option::as_ref).ok_or_else(unknown)?;
        self.device.replay(graph).map_err(failed("replaying the step"))
    }

    fn forget(&self, recording: Recording) {
        // It is dropped without the lock: memory that it kept last waits for work under way.
        let _graph = self.state().recordings.get_mut(recording.0).and_then(Option::take);
    }

    fn note_moment(&self) -> Result<()> {
        let mut state = self.state();
        if state.noted == state.events.len() {
            if state.noted == EVENTS {
                return Err(MachineError::new("measuring kernels", format!("more than {EVENTS} of them")));
            }
            let event = self.device.event().map_err(failed("measuring kernels"))?;
            state.events.push(event);
        }
        let noted = state.noted;
        self.device.record(&state.events[noted], Queue::Compute).map_err(failed("measuring kernels"))?;
        state.noted += 1;
        Ok(())
    }

    fn moments(&self) -> Result<Vec<f64>> {
        let mut state = self.state();
        let noted = std::mem::take(&mut state.noted);
        let Some(last) = state.events[..noted].last() else { return Ok(vec![]) };
        last.synchronize().map_err(failed("measuring kernels"))?;
        let between = |event| Event::milliseconds_between(&state.events[0], event).map(f64::from);
        state.events[..noted].iter().map(|e| between(e).map_err(failed("measuring kernels"))).collect()
    }
}
