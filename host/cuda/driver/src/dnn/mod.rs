//! Convolutions by cuDNN: images NHWC, filters KRSC (for a group: C / groups channels), sums in f32.
//!
//! They go through cuDNN's graph API, as the older one gets no new engines and knows NHWC and bfloat16 in part only. A graph
//! of one convolution is described, cuDNN's heuristic names engines for it, and the first that can be built is the plan.
//!
//! # The same bits
//!
//! Engines that cuDNN notes as nondeterministic are never taken, nor those that round their operands or sums to less than
//! was asked for, nor those that go by way of Fourier or Winograd transforms. A plan gives the same bits at each run on the
//! same GPU with the same library; another candidate may give others, so a choice that was measured ([`Dnn::fastest`]) must
//! be kept where runs are to be repeated.

mod ffi;

use crate::blas::measure;
use crate::device::{Context, Device, Queue, lock};
use crate::driver::Handle;
use crate::element::{Compute, Element};
use crate::error::CudaError;
use ffi::{Descriptor, Functions, Kind, attribute};
use std::any::Any;
use std::ffi::{c_int, c_void};
use std::fmt;
use std::ptr;
use std::sync::{Arc, Mutex, Weak};

/// So many candidates are measured at most; the heuristic's order is rarely off by more.
const MEASURED_CANDIDATES: usize = 12;
/// A measurement runs each candidate so often, and takes the mean.
const MEASURED_RUNS: usize = 10;
/// Images and filters are at multiples of this: what vectorised access needs.
const ALIGNMENT: usize = 16;
/// The workspace is at a multiple of this.
const WORKSPACE_ALIGNMENT: usize = 256;

/// What is computed from what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// y from x and w.
    Forward,
    /// x's gradient from w and y's gradient.
    InputGradient,
    /// w's gradient from x and y's gradient.
    WeightGradient,
}

/// A convolution, without a flipped filter, as PyTorch's `Conv2d`. Pairs are height and width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conv {
    /// Images.
    pub batch: usize,
    /// Size of x.
    pub input: [usize; 2],
    /// Channels of x.
    pub channels: usize,
    /// Size of a filter.
    pub kernel: [usize; 2],
    /// Channels of y.
    pub filters: usize,
    /// Size of y.
    pub output: [usize; 2],
    /// From one place of the filter to the next.
    pub stride: [usize; 2],
    /// Zeros before the first row and column. Behind the last there are as many, or, where that does not give `output`, as
    /// many as it takes.
    pub padding: [usize; 2],
    /// From one element of the filter to the next.
    pub dilation: [usize; 2],
    /// Groups of channels that are convolved apart from each other; `channels` and `filters` are multiples of it.
    pub groups: usize,
    /// The type of x, w and y. cuDNN has no engines that read 16-bit numbers and write f32; of 1 × 1 convolutions, which are
    /// products, [`crate::blas`] has them.
    pub element: Element,
    /// How products of f32 are formed.
    pub compute: Compute,
    /// What is computed from what.
    pub direction: Direction,
}

/// Where images and filters are: addresses in device memory, multiples of 16. What the direction computes is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConvOperands {
    /// batch × input height × input width × channels.
    pub x: u64,
    /// filters × kernel height × kernel width × channels / groups.
    pub w: u64,
    /// batch × output height × output width × filters.
    pub y: u64,
    /// As many bytes as [`ConvPlan::workspace_bytes`] says, at a multiple of 256; for no other use at the same time.
    pub workspace: u64,
}

impl Conv {
    /// Elements of x, w and y.
    pub fn elements(&self) -> [usize; 3] {
        let count = |sizes: [usize; 4]| sizes.into_iter().fold(1, usize::saturating_mul);
        [
            count([self.batch, self.input[0], self.input[1], self.channels]),
            count([self.filters, self.kernel[0], self.kernel[1], self.channels / self.groups.max(1)]),
            count([self.batch, self.output[0], self.output[1], self.filters]),
        ]
    }

    /// Zeros behind the last row and column, or the refusal of a convolution that makes no sense.
    fn check(&self) -> Result<[usize; 2], CudaError> {
        let refuse = |expected: &str, got: String| CudaError::Argument {
            what: format!("plan a convolution ({self:?})"),
            expected: expected.into(),
            got,
            hint: "this is a defect of what planned the convolution",
        };
        let sizes = [self.batch, self.channels, self.filters, self.groups];
        let pairs = [self.input, self.kernel, self.output, self.stride, self.dilation];
        if sizes.contains(&0) || pairs.as_flattened().contains(&0) {
            return Err(refuse("sizes of at least 1", "a zero".into()));
        }
        if !self.channels.is_multiple_of(self.groups) || !self.filters.is_multiple_of(self.groups) {
            let got = format!("{} and {}", self.channels, self.filters);
            return Err(refuse(&format!("channels and filters that are multiples of {}", self.groups), got));
        }
        // Also keeps every product of sizes here within what is exact.
        let all = sizes.iter().chain(pairs.as_flattened()).chain(&self.padding);
        if all.clone().any(|size| *size > 1 << 30) || self.elements().iter().any(|elements| *elements > 1 << 40) {
            return Err(refuse("sizes that device memory can hold", "larger ones".into()));
        }
        let mut behind = [0; 2];
        for (axis, behind) in behind.iter_mut().enumerate() {
            let reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1;
            let places = |behind: usize| {
                let padded = self.input[axis] + self.padding[axis] + behind;
                padded.checked_sub(reach).map_or(0, |rest| rest / self.stride[axis] + 1)
            };
            let needed = (self.output[axis] - 1) * self.stride[axis] + reach;
            *behind = match places(self.padding[axis]) == self.output[axis] {
                true => self.padding[axis],
                false => needed.saturating_sub(self.input[axis] + self.padding[axis]),
            };
            if places(*behind) != self.output[axis] {
                let got = format!("{} (axis {axis}), from {}", self.output[axis], self.input[axis]);
                return Err(refuse("an output of the size that input, kernel, stride and padding give", got));
            }
        }
        Ok(behind)
    }
}

/// cuDNN on one device.
#[derive(Clone)]
pub struct Dnn {
    device: Device,
    opened: Arc<Opened>,
}

/// A handle for each queue: changing a handle's queue could wait.
struct Opened {
    context: Arc<Context>,
    /// In the order of [`Queue`]. A handle serves one thread at a time.
    handles: [Mutex<SendHandle>; 2],
}

struct SendHandle(Handle);
// SAFETY: a cuDNN handle may be used from any thread, by one at a time: it is behind a lock.
unsafe impl Send for SendHandle {}

impl Drop for Opened {
    fn drop(&mut self) {
        if let (Ok(_), Ok(lib)) = (self.context.bind(), Functions::get()) {
            for handle in self.handles.iter().map(|handle| lock(handle).0).filter(|handle| !handle.is_null()) {
                // SAFETY: the handle was made by this value, and its context is current.
                unsafe { (lib.cudnnDestroy)(handle) };
            }
        }
    }
}

impl fmt::Debug for Dnn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dnn({:?})", self.device)
    }
}

impl Dnn {
    /// Loads cuDNN and opens it on the device.
    pub fn open(device: &Device) -> Result<Dnn, CudaError> {
        let lib = Functions::get()?;
        device.context.outside_capture("open cuDNN")?;
        device.context.bind()?;
        let handles = [Mutex::new(SendHandle(ptr::null_mut())), Mutex::new(SendHandle(ptr::null_mut()))];
        let opened = Arc::new(Opened { context: device.context.clone(), handles });
        for queue in Queue::ALL {
            let mut handle = lock(&opened.handles[queue as usize]);
            // SAFETY: the device's context is current, the pointer is into a value that is alive.
            let status = unsafe { (lib.cudnnCreate)(&mut handle.0) };
            lib.check(status, || "open cuDNN".into())?;
            // SAFETY: the handle was made just now, the stream is of the same context.
            let status = unsafe { (lib.cudnnSetStream)(handle.0, device.context.stream(queue)) };
            lib.check(status, || "give cuDNN its queue".into())?;
        }
        let weak: Weak<dyn Any + Send + Sync> = Arc::downgrade(&opened) as Weak<dyn Any + Send + Sync>;
        device.context.register(weak);
        Ok(Dnn { device: device.clone(), opened })
    }

    /// cuDNN's version: 91002 is 9.10.2.
    pub fn version() -> Result<usize, CudaError> {
        // SAFETY: it takes nothing and may be called at any time.
        Ok(unsafe { (Functions::get()?.cudnnGetVersion)() })
    }

    /// Plans a convolution: `choice` is a number among the candidates that can be built and need at most `workspace_bytes`,
    /// in the heuristic's order, 0 being what it thinks best.
    ///
    /// # Errors
    /// [`CudaError::Argument`] if the convolution makes no sense or there is no such candidate; [`CudaError::Call`] if cuDNN
    /// has no engine for it.
    pub fn plan(&self, conv: &Conv, workspace_bytes: usize, choice: usize) -> Result<ConvPlan, CudaError> {
        self.device.context.outside_capture("plan a convolution")?;
        let mut plans = self.plans(conv, workspace_bytes, choice + 1)?;
        match plans.pop() {
            Some(plan) if plan.choice == choice => Ok(plan),
            _ => Err(no_candidate(conv, choice)),
        }
    }

    /// The choice that takes the least time on these operands; what is written there is lost. The workspace must have
    /// `workspace_bytes`. Bits depend on the choice: see the module's documentation.
    pub fn fastest(&self, conv: &Conv, workspace_bytes: usize, operands: &ConvOperands) -> Result<usize, CudaError> {
        self.device.context.outside_capture("measure convolutions")?;
        let mut fastest = Err(no_candidate(conv, 0));
        let mut least = f32::INFINITY;
        for plan in self.plans(conv, workspace_bytes, MEASURED_CANDIDATES)? {
            // The first run loads the candidate's kernels. One that fails is none.
            let run = || plan.run(operands, Queue::Compute);
            match run().and_then(|()| measure(&self.device, MEASURED_RUNS, run)) {
                Ok(milliseconds) if milliseconds < least => (least, fastest) = (milliseconds, Ok(plan.choice)),
                Err(error) if fastest.is_err() => fastest = Err(error),
                _ => {}
            }
        }
        fastest
    }

    /// The first `count` candidates that can be built and need no more workspace.
    fn plans(&self, conv: &Conv, workspace_bytes: usize, count: usize) -> Result<Vec<ConvPlan>, CudaError> {
        self.device.context.bind()?;
        let handle = lock(&self.opened.handles[Queue::Compute as usize]);
        let graph = Arc::new(Graph::new(conv, Target::Handle(handle.0))?);
        let mut plans = Vec::new();
        for config in graph.candidates(Target::Handle(handle.0))? {
            // An engine that cannot be built is none: the heuristic does not know everything.
            let Ok(built) = Built::new(graph.clone(), config, Target::Handle(handle.0)) else { continue };
            if built.workspace_bytes > workspace_bytes {
                continue;
            }
            let built = Arc::new(built);
            let weak: Weak<dyn Any + Send + Sync> = Arc::downgrade(&built) as Weak<dyn Any + Send + Sync>;
            self.device.context.register(weak);
            plans.push(ConvPlan { dnn: self.clone(), conv: *conv, built, choice: plans.len() });
            if plans.len() == count {
                break;
            }
        }
        Ok(plans)
    }
}

fn no_candidate(conv: &Conv, choice: usize) -> CudaError {
    CudaError::Argument {
        what: format!("plan a convolution ({conv:?})"),
        expected: "a deterministic engine of cuDNN for it".into(),
        got: format!("none of number {choice}"),
        hint: "more workspace may allow more; a choice is good for the GPU and library that it was measured with",
    }
}

/// Whom a graph is planned for: a device that is there, or one that is only described.
#[derive(Clone, Copy)]
enum Target<'a> {
    Handle(Handle),
    #[cfg_attr(not(test), expect(dead_code, reason = "tests plan for a GPU that is not there"))]
    Properties(&'a Descriptor),
}

/// What tensors are called in a plan.
const X: i64 = 1;
const W: i64 = 2;
const Y: i64 = 3;

/// A convolution as cuDNN is told of it, with everything that it refers to.
struct Graph {
    graph: Descriptor,
    conv: Conv,
    _parts: [Descriptor; 5],
}

impl Graph {
    fn new(conv: &Conv, target: Target) -> Result<Graph, CudaError> {
        let behind = conv.check()?;
        let (images, element) = (conv.batch, conv.element);
        let x = tensor(X, [images, conv.channels, conv.input[0], conv.input[1]], element)?;
        let w = tensor(W, [conv.filters, conv.channels / conv.groups, conv.kernel[0], conv.kernel[1]], element)?;
        let y = tensor(Y, [images, conv.filters, conv.output[0], conv.output[1]], element)?;

        let pair = |pair: [usize; 2]| pair.map(|size| size as i64);
        let mut convolution = Descriptor::new(Kind::Convolution)?;
        convolution.choice(attribute::CONVOLUTION_COMPUTE_TYPE, ffi::TYPE_DATA_TYPE, ffi::DATA_FLOAT)?;
        convolution.choice(attribute::CONVOLUTION_MODE, ffi::TYPE_CONVOLUTION_MODE, ffi::CROSS_CORRELATION)?;
        convolution.integers(attribute::CONVOLUTION_SPATIAL_DIMENSIONS, &[2])?;
        convolution.integers(attribute::CONVOLUTION_DILATIONS, &pair(conv.dilation))?;
        convolution.integers(attribute::CONVOLUTION_STRIDES, &pair(conv.stride))?;
        convolution.integers(attribute::CONVOLUTION_PRE_PADDINGS, &pair(conv.padding))?;
        convolution.integers(attribute::CONVOLUTION_POST_PADDINGS, &pair(behind))?;
        let convolution = convolution.finish("a convolution")?;

        // All three have their attributes in one order: alpha, beta, convolution, w, x, y.
        let (kind, alpha) = match conv.direction {
            Direction::Forward => (Kind::ConvolutionForward, attribute::FORWARD_ALPHA),
            Direction::InputGradient => (Kind::ConvolutionBackwardData, attribute::BACKWARD_DATA_ALPHA),
            Direction::WeightGradient => (Kind::ConvolutionBackwardFilter, attribute::BACKWARD_FILTER_ALPHA),
        };
        let mut operation = Descriptor::new(kind)?;
        operation.float(alpha, 1.0)?;
        operation.float(alpha + 1, 0.0)?;
        operation.descriptor(alpha + 2, &convolution)?;
        operation.descriptor(alpha + 3, &w)?;
        operation.descriptor(alpha + 4, &x)?;
        operation.descriptor(alpha + 5, &y)?;
        let operation = operation.finish("a convolution's operation")?;

        let mut graph = Descriptor::new(Kind::OperationGraph)?;
        if let Target::Handle(handle) = target {
            graph.handle(attribute::GRAPH_HANDLE, handle)?;
        }
        graph.descriptor(attribute::GRAPH_OPERATIONS, &operation)?;
        let graph = graph.finish("a convolution's graph")?;
        Ok(Graph { graph, conv: *conv, _parts: [operation, convolution, x, w, y] })
    }

    /// What the heuristic offers, the best first, less what would not give the asked precision or not the same bits.
    fn candidates(&self, target: Target) -> Result<Vec<Descriptor>, CudaError> {
        let mut candidates = Vec::new();
        for mode in [ffi::HEURISTIC_A, ffi::HEURISTIC_FALLBACK] {
            let mut heuristic = Descriptor::new(Kind::EngineHeuristic)?;
            heuristic.descriptor(attribute::HEURISTIC_GRAPH, &self.graph)?;
            heuristic.choice(attribute::HEURISTIC_MODE, ffi::TYPE_HEURISTIC_MODE, mode)?;
            if let Target::Properties(properties) = target {
                heuristic.descriptor(attribute::HEURISTIC_DEVICE_PROPERTIES, properties)?;
            }
            // Where one of the modes has nothing to offer, the other may.
            let Ok(heuristic) = heuristic.finish("the search for a convolution's engine") else { continue };
            for config in heuristic.descriptors(attribute::HEURISTIC_RESULTS, Kind::EngineConfig)? {
                if self.allows(&config)? {
                    candidates.push(config);
                }
            }
        }
        Ok(candidates)
    }

    fn allows(&self, config: &Descriptor) -> Result<bool, CudaError> {
        let engine = Descriptor::new(Kind::Engine)?;
        config.fill(attribute::ENGINE_CONFIG_ENGINE, &engine)?;
        // Tensor cores multiply 16-bit numbers exactly, and f32 only after rounding to TF32.
        let exact = self.conv.element == Element::F32 && self.conv.compute == Compute::F32;
        Ok(engine.notes()?.iter().all(|note| match *note {
            ffi::NOTE_NONDETERMINISTIC | ffi::NOTE_REDUCED_PRECISION_REDUCTION => false,
            ffi::NOTE_DOWN_CONVERT_INPUTS | ffi::NOTE_FFT => false,
            ffi::NOTE_WINOGRAD..=ffi::NOTE_WINOGRAD_LAST => false,
            ffi::NOTE_TENSOR_CORE => !exact,
            _ => true,
        }))
    }
}

/// Describes a tensor of these sizes (N, C, H, W, or K, C, R, S) whose channels are next to each other.
fn tensor(id: i64, sizes: [usize; 4], element: Element) -> Result<Descriptor, CudaError> {
    let [outer, channels, height, width] = sizes.map(|size| size as i64);
    let mut tensor = Descriptor::new(Kind::Tensor)?;
    let element = match element {
        Element::F32 => ffi::DATA_FLOAT,
        Element::F16 => ffi::DATA_HALF,
        Element::Bf16 => ffi::DATA_BFLOAT16,
    };
    tensor.choice(attribute::TENSOR_DATA_TYPE, ffi::TYPE_DATA_TYPE, element)?;
    tensor.integers(attribute::TENSOR_DIMENSIONS, &[outer, channels, height, width])?;
    tensor.integers(attribute::TENSOR_STRIDES, &[height * width * channels, 1, width * channels, channels])?;
    tensor.integers(attribute::TENSOR_UNIQUE_ID, &[id])?;
    tensor.integers(attribute::TENSOR_ALIGNMENT, &[ALIGNMENT as i64])?;
    tensor.finish("a tensor")
}

/// An execution plan with everything that it refers to: in this order they are given up.
struct Built {
    plan: Descriptor,
    workspace_bytes: usize,
    _config: Descriptor,
    _graph: Arc<Graph>,
}

impl Built {
    fn new(graph: Arc<Graph>, config: Descriptor, target: Target) -> Result<Built, CudaError> {
        let mut plan = Descriptor::new(Kind::ExecutionPlan)?;
        match target {
            Target::Handle(handle) => plan.handle(attribute::PLAN_HANDLE, handle)?,
            Target::Properties(properties) => plan.descriptor(attribute::PLAN_DEVICE_PROPERTIES, properties)?,
        }
        plan.descriptor(attribute::PLAN_ENGINE_CONFIG, &config)?;
        let plan = plan.finish("a convolution's plan")?;
        let workspace_bytes = plan.integer(attribute::PLAN_WORKSPACE_BYTES)?.max(0) as usize;
        Ok(Built { plan, workspace_bytes, _config: config, _graph: graph })
    }
}

/// A convolution with its engine, ready to run any number of times.
pub struct ConvPlan {
    dnn: Dnn,
    conv: Conv,
    built: Arc<Built>,
    choice: usize,
}

impl fmt::Debug for ConvPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConvPlan").field("conv", &self.conv).field("choice", &self.choice).finish_non_exhaustive()
    }
}

impl ConvPlan {
    /// Bytes of workspace that a run needs.
    pub fn workspace_bytes(&self) -> usize {
        self.built.workspace_bytes
    }

    /// The number of the candidate that was taken.
    pub fn choice(&self) -> usize {
        self.choice
    }

    /// Puts the convolution into a queue. It can be captured.
    ///
    /// # Errors
    /// [`CudaError::Range`] where an operand does not lie in device memory, [`CudaError::Argument`] for an address that is
    /// not aligned.
    pub fn run(&self, operands: &ConvOperands, queue: Queue) -> Result<(), CudaError> {
        let context = &self.dnn.device.context;
        let in_memory = |name: &str, address: u64, bytes: usize, alignment: usize| {
            if !address.is_multiple_of(alignment as u64) {
                return Err(CudaError::Argument {
                    what: "run a convolution".into(),
                    expected: format!("{name} at a multiple of {alignment}"),
                    got: format!("{address:#x}"),
                    hint: "this is a defect of what planned the memory",
                });
            }
            context.in_range(address, bytes, || format!("run a convolution with {name}"))
        };
        let places = [("x", operands.x), ("w", operands.w), ("y", operands.y)];
        for ((name, address), elements) in places.into_iter().zip(self.conv.elements()) {
            in_memory(name, address, elements * self.conv.element.bytes(), ALIGNMENT)?;
        }
        let workspace = match self.workspace_bytes() {
            0 => 0,
            bytes => {
                in_memory("the workspace", operands.workspace, bytes, WORKSPACE_ALIGNMENT)?;
                operands.workspace
            }
        };

        let lib = Functions::get()?;
        context.bind()?;
        let pointer = |address: u64| ptr::with_exposed_provenance_mut::<c_void>(address as usize);
        let mut pack = Descriptor::new(Kind::VariantPack)?;
        pack.integers(attribute::PACK_UNIQUE_IDS, &[X, W, Y])?;
        pack.pointers(attribute::PACK_POINTERS, &[operands.x, operands.w, operands.y].map(pointer))?;
        pack.pointers(attribute::PACK_WORKSPACE, &[pointer(workspace)])?;
        let pack = pack.finish("a convolution's operands")?;
        let handle = lock(&self.dnn.opened.handles[queue as usize]);
        // SAFETY: the handle is of this context, which is current, and no other thread uses it now; the plan is finished;
        // everything that it reads or writes was found to lie in allocated device memory.
        let status: c_int = unsafe { (lib.cudnnBackendExecute)(handle.0, self.built.plan.handle, pack.handle) };
        lib.check(status, || format!("run a convolution ({:?})", self.conv))
    }
}

#[cfg(test)]
mod tests;
