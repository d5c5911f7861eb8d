//! One GPU: its queues, events and captured graphs. Its memory is in `memory`, its kernels in `module`.

use crate::driver::{self, Address, Driver, Functions, Handle};
use crate::error::CudaError;
use crate::memory::Allocation;
use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{c_char, c_int};
use std::fmt;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// One of a device's two queues (CUDA: streams). Work on one queue is carried out in order; work on the other goes on
/// beside it, unless [`Device::wait`] says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// For kernels, and whatever must be ordered with them.
    Compute,
    /// For copies that overlap with kernels.
    Copy,
}

impl Queue {
    pub(crate) const ALL: [Queue; 2] = [Queue::Compute, Queue::Copy];
}

/// A GPU: its primary context, a compute queue and a copy queue. A clone is the same device; it stays open until the last
/// clone and the last thing that was made from it are gone.
#[derive(Clone)]
pub struct Device {
    pub(crate) context: Arc<Context>,
}

/// Something that is to be kept alive.
type Resource = Arc<dyn Any + Send + Sync>;

/// The primary context of a GPU and what belongs to it.
pub(crate) struct Context {
    pub driver: &'static Driver,
    ordinal: c_int,
    handle: Handle,
    /// In the order of [`Queue`].
    streams: [Handle; 2],
    capability: (u32, u32),
    multiprocessors: u32,
    shared_bytes: u32,
    name: String,
    /// While a capture goes on: what its work may use, so that nothing of it is given back meanwhile.
    capturing: Mutex<Option<Vec<Resource>>>,
    /// Device memory by its first address, with its length.
    pub allocations: Mutex<BTreeMap<Address, (usize, Weak<Allocation>)>>,
    /// What captured work may need besides memory: modules, plans.
    resources: Mutex<Vec<Weak<dyn Any + Send + Sync>>>,
}

// SAFETY: a context, its streams and its modules may be used from any thread as long as the context is current there, and
// every call here makes it current first.
unsafe impl Send for Context {}
// SAFETY: the driver's functions may be called from several threads at once.
unsafe impl Sync for Context {}

/// A poisoned lock is as good as any: the maps behind these locks are whole between any two statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    /// How many GPUs there are; an error if there is no driver.
    pub fn count() -> Result<usize, CudaError> {
        Driver::get()?.devices()
    }

    /// Opens GPU number `index`, counted from 0 among those that `CUDA_VISIBLE_DEVICES` leaves.
    ///
    /// # Errors
    /// [`CudaError::Library`] without a driver, [`CudaError::NoDevice`] without such a GPU, [`CudaError::Call`] where the
    /// driver refuses.
    pub fn open(index: usize) -> Result<Device, CudaError> {
        let driver = Driver::get()?;
        let count = driver.devices()?;
        if index >= count {
            return Err(CudaError::NoDevice { index, count });
        }
        let functions = &driver.functions;
        let opened = |status| driver.check(status, || format!("open GPU {index}"));
        let mut ordinal = 0;
        // SAFETY: the driver is initialised, and the pointer is to a local.
        opened(unsafe { (functions.cuDeviceGet)(&mut ordinal, index as c_int) })?;
        let attribute = |which| {
            let mut value: c_int = 0;
            // SAFETY: `ordinal` is a device that the driver gave.
            opened(unsafe { (functions.cuDeviceGetAttribute)(&mut value, which, ordinal) })
                .map(|()| value.max(0) as u32)
        };
        let capability = (attribute(driver::DEVICE_CAPABILITY_MAJOR)?, attribute(driver::DEVICE_CAPABILITY_MINOR)?);
        let multiprocessors = attribute(driver::DEVICE_MULTIPROCESSORS)?;
        let shared_bytes = attribute(driver::DEVICE_SHARED_BYTES_OPT_IN)?;
        let mut name = [0_u8; 256];
        // SAFETY: the driver writes at most the given number of bytes, the last of them a zero.
        opened(unsafe {
            (functions.cuDeviceGetName)(name.as_mut_ptr().cast::<c_char>(), name.len() as c_int, ordinal)
        })?;
        let name = String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();

        let mut handle = ptr::null_mut();
        {
            // cuBLASLt and cuDNN keep things in the context for as long as the process lives, so one reference is never
            // given back.
            static KEPT: Mutex<BTreeSet<c_int>> = Mutex::new(BTreeSet::new());
            let mut kept = lock(&KEPT);
            if !kept.contains(&ordinal) {
                // SAFETY: as above.
                opened(unsafe { (functions.cuDevicePrimaryCtxRetain)(&mut handle, ordinal) })?;
                kept.insert(ordinal);
            }
        }
        // SAFETY: as above. From here on `Context`'s drop gives back what was made.
        opened(unsafe { (functions.cuDevicePrimaryCtxRetain)(&mut handle, ordinal) })?;
        let mut context = Context {
            driver,
            ordinal,
            handle,
            streams: [ptr::null_mut(); 2],
            capability,
            multiprocessors,
            shared_bytes,
            name,
            capturing: Mutex::default(),
            allocations: Mutex::default(),
            resources: Mutex::default(),
        };
        context.bind()?;
        for stream in &mut context.streams {
            // SAFETY: the context is current. "Non-blocking" keeps the queues apart from the legacy default stream.
            opened(unsafe { (functions.cuStreamCreate)(stream, driver::STREAM_NON_BLOCKING) })?;
        }
        Ok(Device { context: Arc::new(context) })
    }

    /// The GPU's name, as `nvidia-smi` shows it.
    pub fn name(&self) -> &str {
        &self.context.name
    }

    /// Major and minor: (9, 0) is what NVRTC calls `sm_90`.
    pub fn compute_capability(&self) -> (u32, u32) {
        self.context.capability
    }

    /// How many multiprocessors the GPU has.
    pub fn multiprocessors(&self) -> u32 {
        self.context.multiprocessors
    }

    /// The most bytes of shared memory that one block can be launched with, static and dynamic together.
    pub fn shared_memory_per_block(&self) -> u32 {
        self.context.shared_bytes
    }

    /// The newest CUDA that the driver runs: (13, 0).
    pub fn driver_version(&self) -> (u32, u32) {
        let version = self.context.driver.version;
        (version / 1000, version % 1000 / 10)
    }

    /// Bytes of device memory: those still free, and all.
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        let functions = self.context.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current, the pointers are to locals.
        let status = unsafe { (functions.cuMemGetInfo_v2)(&mut free, &mut total) };
        self.context.check(status, || "ask for the free device memory".into())?;
        Ok((free, total))
    }

    /// Waits until both queues are empty.
    ///
    /// # Errors
    /// Also those of work that was queued before: a kernel's fault is told by the first call that waits for it.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.context.outside_capture("wait for the device")?;
        let functions = self.context.bind()?;
        // SAFETY: the context is current.
        let status = unsafe { (functions.cuCtxSynchronize)() };
        self.context.check(status, || "wait for the device".into())
    }

    /// An event: a mark in a queue, once [`Device::record`] has put it there.
    pub fn event(&self) -> Result<Event, CudaError> {
        Event::new(&self.context, driver::EVENT_DEFAULT)
    }

    /// Puts the event behind the work that `queue` holds now; an earlier mark is forgotten.
    pub fn record(&self, event: &Event, queue: Queue) -> Result<(), CudaError> {
        self.context.owns(&event.context, "record an event")?;
        event.record(queue)
    }

    /// Lets what is put into `queue` from now on wait until the event's last mark is reached; an event that was never
    /// recorded holds up nothing.
    pub fn wait(&self, event: &Event, queue: Queue) -> Result<(), CudaError> {
        self.context.owns(&event.context, "wait for an event")?;
        let functions = self.context.bind()?;
        // SAFETY: stream and event are of this context, and alive.
        let status = unsafe { (functions.cuStreamWaitEvent)(self.context.stream(queue), event.handle, 0) };
        self.context.check(status, || format!("let the {queue:?} queue wait for an event"))
    }

    /// From here to [`Device::end_capture`], work that is put into the compute queue is not carried out but recorded; so is
    /// that of the copy queue from where it waits for an event of the compute queue, and the compute queue must then wait
    /// for it again. Run the work once beforehand, because libraries load their kernels at the first use. Nothing may be
    /// allocated, loaded or waited for meanwhile, and other threads leave the device alone.
    ///
    /// [`Device::capture`] ends the recording also where the work fails.
    ///
    /// # Errors
    /// [`CudaError::Argument`] while another capture goes on.
    pub fn begin_capture(&self) -> Result<(), CudaError> {
        self.context.outside_capture("begin a capture")?;
        let functions = self.context.bind()?;
        // SAFETY: the stream is of this context. Relaxed: other threads may go on allocating meanwhile.
        let status = unsafe {
            (functions.cuStreamBeginCapture_v2)(self.context.stream(Queue::Compute), driver::CAPTURE_RELAXED)
        };
        self.context.check(status, || "begin a capture".into())?;
        *lock(&self.context.capturing) = Some(self.context.alive());
        Ok(())
    }

    /// Ends what [`Device::begin_capture`] began. The graph keeps alive the device memory, modules and plans that exist now.
    pub fn end_capture(&self) -> Result<Graph, CudaError> {
        let what = "capture a graph";
        let captured = lock(&self.context.capturing).take();
        let Some(mut kept) = captured else {
            return Err(CudaError::Argument {
                what: what.into(),
                expected: "a capture that was begun".into(),
                got: "none".into(),
                hint: "call begin_capture first, or use capture",
            });
        };
        // Plans may be made during a capture.
        kept.extend(self.context.alive());
        let functions = self.context.bind()?;
        let mut captured = ptr::null_mut();
        // SAFETY: the stream is of this context and is being captured.
        let status = unsafe { (functions.cuStreamEndCapture)(self.context.stream(Queue::Compute), &mut captured) };
        self.context.check(status, || what.into())?;
        let mut graph = Graph { context: self.context.clone(), handle: ptr::null_mut(), _kept: kept };
        // SAFETY: `captured` is a graph that the driver just made; once instantiated it is not needed any more.
        let status = unsafe {
            let status = (functions.cuGraphInstantiateWithFlags)(&mut graph.handle, captured, 0);
            (functions.cuGraphDestroy)(captured);
            status
        };
        self.context.check(status, || what.into())?;
        Ok(graph)
    }

    /// Captures what `work` puts into the compute queue; see [`Device::begin_capture`].
    pub fn capture<E: From<CudaError>>(&self, work: impl FnOnce() -> Result<(), E>) -> Result<Graph, E> {
        self.begin_capture()?;
        let worked = work();
        let graph = self.end_capture();
        worked?;
        Ok(graph?)
    }

    /// Puts all of a graph's work into the compute queue.
    pub fn replay(&self, graph: &Graph) -> Result<(), CudaError> {
        self.context.owns(&graph.context, "replay a graph")?;
        let functions = self.context.bind()?;
        // SAFETY: graph and stream are of this context and alive, and the graph keeps alive what its work uses.
        let status = unsafe { (functions.cuGraphLaunch)(graph.handle, self.context.stream(Queue::Compute)) };
        self.context.check(status, || "replay a graph".into())
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({}: {})", self.context.ordinal, self.context.name)
    }
}

impl Context {
    /// Makes the context current on this thread, as every other call needs it.
    pub fn bind(&self) -> Result<&'static Functions, CudaError> {
        let functions = &self.driver.functions;
        // SAFETY: the handle is a context that this value holds a reference to.
        let status = unsafe { (functions.cuCtxSetCurrent)(self.handle) };
        self.check(status, || "make the GPU's context current".into())?;
        Ok(functions)
    }

    pub fn check(&self, status: driver::Status, what: impl FnOnce() -> String) -> Result<(), CudaError> {
        self.driver.check(status, what)
    }

    pub fn stream(&self, queue: Queue) -> Handle {
        self.streams[queue as usize]
    }

    /// Refuses what cannot be recorded.
    pub fn outside_capture(&self, what: &str) -> Result<(), CudaError> {
        match lock(&self.capturing).is_some() {
            false => Ok(()),
            true => Err(CudaError::Argument {
                what: what.into(),
                expected: "no capture going on".into(),
                got: "one that has not ended".into(),
                hint: "do it before the capture or after it",
            }),
        }
    }

    /// Refuses what belongs to another device.
    pub fn owns(self: &Arc<Self>, other: &Arc<Context>, what: &str) -> Result<(), CudaError> {
        match Arc::ptr_eq(self, other) {
            true => Ok(()),
            false => Err(CudaError::Argument {
                what: what.into(),
                expected: format!("one of this device (GPU {})", self.ordinal),
                got: format!("one of a device that was opened separately (GPU {})", other.ordinal),
                hint: "open each GPU once and clone the device",
            }),
        }
    }

    /// Lets graphs that are captured from now on keep `resource` alive.
    pub fn register(&self, resource: Weak<dyn Any + Send + Sync>) {
        let mut resources = lock(&self.resources);
        resources.retain(|resource| resource.strong_count() > 0);
        resources.push(resource);
    }

    /// All memory, modules and plans that are alive.
    fn alive(&self) -> Vec<Resource> {
        let memory: Vec<_> = lock(&self.allocations).values().filter_map(|(_, memory)| memory.upgrade()).collect();
        let mut alive: Vec<Resource> = lock(&self.resources).iter().filter_map(Weak::upgrade).collect();
        alive.extend(memory.into_iter().map(|memory| memory as Resource));
        alive
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let functions = &self.driver.functions;
        // SAFETY: streams and context were made by this value and nobody else holds them. A drop cannot tell errors.
        unsafe {
            (functions.cuCtxSetCurrent)(self.handle);
            for stream in self.streams.iter().filter(|stream| !stream.is_null()) {
                (functions.cuStreamDestroy_v2)(*stream);
            }
            (functions.cuDevicePrimaryCtxRelease_v2)(self.ordinal);
        }
    }
}

/// A mark in a queue.
pub struct Event {
    context: Arc<Context>,
    handle: Handle,
}

// SAFETY: the driver allows any thread to use an event of a context that is current there.
unsafe impl Send for Event {}
// SAFETY: as above; recording and waiting at once is ordered by the driver.
unsafe impl Sync for Event {}

impl Event {
    pub(crate) fn new(context: &Arc<Context>, flags: u32) -> Result<Event, CudaError> {
        let functions = context.bind()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the context is current, the pointer is to a local.
        let status = unsafe { (functions.cuEventCreate)(&mut handle, flags) };
        context.check(status, || "make an event".into())?;
        Ok(Event { context: context.clone(), handle })
    }

    pub(crate) fn record(&self, queue: Queue) -> Result<(), CudaError> {
        let functions = self.context.bind()?;
        // SAFETY: event and stream are of this context, and alive.
        let status = unsafe { (functions.cuEventRecord)(self.handle, self.context.stream(queue)) };
        self.context.check(status, || format!("record an event in the {queue:?} queue"))
    }

    /// Waits until the last mark is reached; not at all for an event that was never recorded.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        let functions = self.context.bind()?;
        // SAFETY: the event is of this context, and alive.
        let status = unsafe { (functions.cuEventSynchronize)(self.handle) };
        self.context.check(status, || "wait for an event".into())
    }

    /// Milliseconds on the GPU's clock (half a microsecond fine) from one event's mark to the other's; waits for both.
    pub fn milliseconds_between(begin: &Event, end: &Event) -> Result<f32, CudaError> {
        begin.context.owns(&end.context, "measure the time between two events")?;
        begin.synchronize()?;
        end.synchronize()?;
        let functions = begin.context.bind()?;
        let mut milliseconds = 0.0;
        // SAFETY: both events are of this context, and alive.
        let status = unsafe { (functions.cuEventElapsedTime)(&mut milliseconds, begin.handle, end.handle) };
        begin.context.check(status, || "measure the time between two events".into())?;
        Ok(milliseconds)
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Event")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(functions) = self.context.bind() {
            // SAFETY: the event was made by this value; the driver lets work that waits for it go on.
            unsafe { (functions.cuEventDestroy_v2)(self.handle) };
        }
    }
}

/// Captured work, to be replayed as one.
pub struct Graph {
    context: Arc<Context>,
    handle: Handle,
    _kept: Vec<Resource>,
}

// SAFETY: any thread may launch or destroy an instantiated graph; the launches of one graph are ordered by its stream.
unsafe impl Send for Graph {}
// SAFETY: nothing of a graph changes after it was instantiated; two launches at once go into the same stream.
unsafe impl Sync for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Graph")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.handle.is_null() {
            return;
        }
        if let Ok(functions) = self.context.bind() {
            // SAFETY: the graph was made by this value. Work that is under way goes on; the memory that it uses waits for
            // it before it is given back.
            unsafe { (functions.cuGraphExecDestroy)(self.handle) };
        }
    }
}
