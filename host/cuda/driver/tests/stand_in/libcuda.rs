//! A stand-in for the driver's library, with one GPU whose memory is the host's. It has no kernels. It is as strict as the
//! driver may be: work waits in its queue until somebody waits for it, a call without a current context or with a foreign
//! handle fails, a wait during a capture spoils the capture, and what is given back twice, or not at all, ends the process.
//!
//! SAFETY: as the driver's own, each function writes where its caller says. The one caller is the crate under test.

#![allow(non_snake_case, clippy::missing_safety_doc)]

use std::cell::Cell;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, MutexGuard};

type Status = c_int;
const SUCCESS: Status = 0;
const INVALID_VALUE: Status = 1;
const INVALID_CONTEXT: Status = 201;
const INVALID_HANDLE: Status = 400;
const CAPTURE_UNSUPPORTED: Status = 900;
const CAPTURE_INVALIDATED: Status = 901;
const CAPTURE_UNJOINED: Status = 904;
const NOT_SUPPORTED: Status = 801;

/// Work in a queue.
#[derive(Clone, Copy)]
enum Work {
    Copy {
        to: usize,
        from: usize,
        bytes: usize,
    },
    Clear {
        at: usize,
        bytes: usize,
    },
    /// An event's mark of that number.
    Record {
        event: usize,
        mark: u64,
    },
    Wait {
        event: usize,
        mark: u64,
    },
}

#[derive(Default)]
struct Event {
    /// The last mark that was put into a queue, and the last that was reached.
    recorded: u64,
    reached: u64,
    /// The queue of a mark that belongs to a capture.
    captured: Option<usize>,
}

#[derive(Default)]
struct Capture {
    origin: usize,
    spoilt: bool,
    /// Queues that wait for the origin, and whether the origin has waited for what they did since.
    forked: BTreeMap<usize, bool>,
    work: Vec<Work>,
}

#[derive(Default)]
struct Gpu {
    contexts: usize,
    next: usize,
    queues: BTreeMap<usize, VecDeque<Work>>,
    events: BTreeMap<usize, Event>,
    /// Address and length of device memory, and of page-locked memory.
    device: BTreeMap<usize, Vec<u64>>,
    pinned: BTreeMap<usize, Vec<u64>>,
    capture: Option<Capture>,
    graphs: BTreeMap<usize, Vec<Work>>,
    started: HashSet<usize>,
}

static GPU: Mutex<Option<Gpu>> = Mutex::new(None);

thread_local! {
    static CURRENT: Cell<bool> = const { Cell::new(false) };
}

/// The GPU's state, if a context is current.
fn current(run: impl FnOnce(&mut Gpu) -> Status) -> Status {
    match CURRENT.get() {
        true => with(run),
        false => INVALID_CONTEXT,
    }
}

fn with(run: impl FnOnce(&mut Gpu) -> Status) -> Status {
    let mut gpu: MutexGuard<Option<Gpu>> = GPU.lock().unwrap();
    run(gpu.get_or_insert_with(Gpu::default))
}

/// A fault of who calls, which no status could make plain enough.
fn fault(what: &str) -> ! {
    eprintln!("the stand-in for the driver: {what}");
    std::process::abort();
}

impl Gpu {
    fn handle(&mut self) -> usize {
        self.next += 1;
        0x1000 + self.next
    }

    /// Puts work into a queue, or into the capture that the queue belongs to.
    fn push(&mut self, queue: usize, work: Work) -> Status {
        if let Some(capture) = &mut self.capture
            && (capture.origin == queue || capture.forked.contains_key(&queue))
        {
            capture.work.push(work);
            if let Some(joined) = capture.forked.get_mut(&queue) {
                *joined = false;
            }
            return SUCCESS;
        }
        match self.queues.get_mut(&queue) {
            Some(queue) => queue.push_back(work),
            None => return INVALID_HANDLE,
        }
        SUCCESS
    }

    /// Carries out what is in a queue; where it waits for an event, the other queues first.
    fn run(&mut self, queue: usize) {
        while let Some(work) = self.queues.get_mut(&queue).and_then(VecDeque::pop_front) {
            self.carry_out(work);
        }
    }

    fn carry_out(&mut self, work: Work) {
        match work {
            // SAFETY: the caller's promise, as the driver's.
            Work::Copy { to, from, bytes } => unsafe {
                std::ptr::copy(from as *const u8, to as *mut u8, bytes);
            },
            // SAFETY: as above.
            Work::Clear { at, bytes } => unsafe { std::ptr::write_bytes(at as *mut u8, 0, bytes) },
            Work::Record { event, mark } => {
                if let Some(event) = self.events.get_mut(&event) {
                    event.reached = event.reached.max(mark);
                }
            }
            Work::Wait { event, mark } => self.reach(event, mark),
        }
    }

    /// Runs the queue that holds the event's mark as far as that; nothing to do if it was reached before.
    fn reach(&mut self, event: usize, mark: u64) {
        let is_mark = |work: &Work| matches!(work, Work::Record { event: e, mark: m } if *e == event && *m == mark);
        let holder = self.queues.iter().find(|(_, works)| works.iter().any(is_mark)).map(|(queue, _)| *queue);
        while self.events.get(&event).is_some_and(|event| event.reached < mark) {
            match holder.and_then(|queue| self.queues.get_mut(&queue)).and_then(VecDeque::pop_front) {
                Some(work) => self.carry_out(work),
                None => break,
            }
        }
    }

    /// A wait: not while there is a capture that it would need the end of.
    fn wait(&mut self, queue: Option<usize>) -> Status {
        if let Some(capture) = &mut self.capture
            && queue.is_none_or(|queue| capture.origin == queue || capture.forked.contains_key(&queue))
        {
            capture.spoilt = true;
            return CAPTURE_UNSUPPORTED;
        }
        let queues = queue.map_or_else(|| self.queues.keys().copied().collect(), |queue| vec![queue]);
        queues.into_iter().for_each(|queue| self.run(queue));
        SUCCESS
    }

    fn memory(&mut self, pinned: bool, bytes: usize) -> Option<usize> {
        // No room for the impossible; memory begins with rubbish, at a multiple of 256.
        if bytes == 0 || bytes > 1 << 32 {
            return None;
        }
        let memory = vec![0x5a5a_5a5a_5a5a_5a5a; bytes / 8 + 64];
        let address = (memory.as_ptr() as usize).next_multiple_of(256);
        if pinned { &mut self.pinned } else { &mut self.device }.insert(address, memory);
        Some(address)
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> Status {
    if flags == 0 { SUCCESS } else { INVALID_VALUE }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    unsafe { *version = 13_000 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(status: Status, name: *mut *const c_char) -> Status {
    let text: &CStr = match status {
        INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        CAPTURE_UNSUPPORTED => c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        _ => c"CUDA_ERROR_OF_THE_STAND_IN",
    };
    unsafe { *name = text.as_ptr() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(_: Status, text: *mut *const c_char) -> Status {
    // A code without words.
    unsafe { *text = std::ptr::null() };
    INVALID_VALUE
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    unsafe { *count = 1 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    unsafe { *device = ordinal };
    if ordinal == 0 { SUCCESS } else { INVALID_VALUE }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, room: c_int, _: c_int) -> Status {
    let text = c"Stand-in";
    let bytes = text.to_bytes_with_nul();
    if (room as usize) < bytes.len() {
        return INVALID_VALUE;
    }
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), name, bytes.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _: c_int) -> Status {
    let known = match attribute {
        16 => 132,
        75 => 9,
        76 => 0,
        97 => 227 << 10,
        _ => return INVALID_VALUE,
    };
    unsafe { *value = known };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, _: c_int) -> Status {
    unsafe { *context = 0xc0 };
    with(|gpu| {
        gpu.contexts += 1;
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_: c_int) -> Status {
    with(|gpu| {
        gpu.contexts = gpu.contexts.checked_sub(1).unwrap_or_else(|| fault("a context is released twice"));
        let left = [gpu.device.len(), gpu.pinned.len(), gpu.events.len(), gpu.queues.len(), gpu.started.len()];
        // One reference is kept until the process ends.
        if gpu.contexts <= 1 && left != [0; 5] {
            fault(&format!("left behind: memory, page-locked memory, events, queues, graphs: {left:?}"));
        }
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: usize) -> Status {
    CURRENT.set(context == 0xc0);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> Status {
    current(|gpu| gpu.wait(None))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Status {
    unsafe { (*free, *total) = (1 << 30, 1 << 31) };
    current(|_| SUCCESS)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut usize, bytes: usize) -> Status {
    current(|gpu| match gpu.memory(false, bytes) {
        Some(memory) => {
            unsafe { *address = memory };
            SUCCESS
        }
        None => 2,
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: usize) -> Status {
    current(|gpu| {
        let busy = gpu.queues.values().flatten().any(|work| matches!(work, Work::Copy { .. } | Work::Clear { .. }));
        if busy {
            fault("device memory is given back while work is in a queue");
        }
        gpu.device.remove(&address).map_or_else(|| fault("memory is given back twice"), |_| SUCCESS)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(address: *mut usize, bytes: usize, _: c_uint) -> Status {
    current(|gpu| match gpu.memory(true, bytes) {
        Some(memory) => {
            unsafe { *address = memory };
            SUCCESS
        }
        None => 2,
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(address: usize) -> Status {
    current(|gpu| {
        let Some(memory) = gpu.pinned.remove(&address) else { fault("page-locked memory is given back twice") };
        let range = address..address + memory.len() * 8;
        let used =
            |work: &Work| matches!(work, Work::Copy { to, from, .. } if range.contains(to) || range.contains(from));
        if gpu.queues.values().flatten().any(used) {
            fault("page-locked memory is given back before it is copied");
        }
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoDAsync_v2(to: usize, from: usize, bytes: usize, queue: usize) -> Status {
    current(|gpu| gpu.push(queue, Work::Copy { to, from, bytes }))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoHAsync_v2(to: usize, from: usize, bytes: usize, queue: usize) -> Status {
    current(|gpu| gpu.push(queue, Work::Copy { to, from, bytes }))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: usize, from: usize, bytes: usize, queue: usize) -> Status {
    current(|gpu| gpu.push(queue, Work::Copy { to, from, bytes }))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(at: usize, value: u8, bytes: usize, queue: usize) -> Status {
    current(|gpu| if value == 0 { gpu.push(queue, Work::Clear { at, bytes }) } else { NOT_SUPPORTED })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(queue: *mut usize, flags: c_uint) -> Status {
    current(|gpu| {
        let handle = gpu.handle();
        gpu.queues.insert(handle, VecDeque::new());
        unsafe { *queue = handle };
        if flags == 1 { SUCCESS } else { INVALID_VALUE }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(queue: usize) -> Status {
    current(|gpu| {
        gpu.run(queue);
        gpu.queues.remove(&queue).map_or_else(|| fault("a queue is destroyed twice"), |_| SUCCESS)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(queue: usize) -> Status {
    current(|gpu| gpu.wait(Some(queue)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(queue: usize, event: usize, _: c_uint) -> Status {
    current(|gpu| {
        let Some(Event { recorded, captured, .. }) = gpu.events.get(&event) else { return INVALID_HANDLE };
        let (mark, captured) = (*recorded, *captured);
        if let (Some(from), Some(capture)) = (captured, &mut gpu.capture) {
            // What is captured is in one list, in an order that is one of those allowed: nothing is left to wait for.
            if queue == capture.origin {
                capture.forked.entry(from).and_modify(|joined| *joined = true);
            } else {
                capture.forked.insert(queue, false);
            }
            return SUCCESS;
        }
        gpu.push(queue, Work::Wait { event, mark })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(origin: usize, mode: c_int) -> Status {
    current(|gpu| {
        if gpu.capture.is_some() || mode != 2 {
            return INVALID_VALUE;
        }
        gpu.capture = Some(Capture { origin, ..Capture::default() });
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(origin: usize, graph: *mut usize) -> Status {
    current(|gpu| {
        let Some(capture) = gpu.capture.take().filter(|capture| capture.origin == origin) else { return INVALID_VALUE };
        gpu.events.values_mut().for_each(|event| event.captured = None);
        if capture.spoilt {
            return CAPTURE_INVALIDATED;
        }
        if capture.forked.values().any(|joined| !joined) {
            return CAPTURE_UNJOINED;
        }
        let handle = gpu.handle();
        gpu.graphs.insert(handle, capture.work);
        unsafe { *graph = handle };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut usize, _: c_uint) -> Status {
    current(|gpu| {
        let handle = gpu.handle();
        gpu.events.insert(handle, Event::default());
        unsafe { *event = handle };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: usize) -> Status {
    current(|gpu| gpu.events.remove(&event).map_or_else(|| fault("an event is destroyed twice"), |_| SUCCESS))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(handle: usize, queue: usize) -> Status {
    current(|gpu| {
        let captures = |capture: &Capture| capture.origin == queue || capture.forked.contains_key(&queue);
        let captured = gpu.capture.as_ref().is_some_and(captures);
        let Some(event) = gpu.events.get_mut(&handle) else { return INVALID_HANDLE };
        if captured {
            event.captured = Some(queue);
            return SUCCESS;
        }
        event.recorded += 1;
        let mark = event.recorded;
        gpu.push(queue, Work::Record { event: handle, mark })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: usize) -> Status {
    current(|gpu| {
        let Some(recorded) = gpu.events.get(&event).map(|event| event.recorded) else { return INVALID_HANDLE };
        gpu.reach(event, recorded);
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventElapsedTime(_: *mut f32, _: usize, _: usize) -> Status {
    NOT_SUPPORTED
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(started: *mut usize, graph: usize, _: u64) -> Status {
    current(|gpu| {
        if !gpu.graphs.contains_key(&graph) {
            return INVALID_HANDLE;
        }
        // The started graph goes by the graph's name, and outlives it.
        gpu.started.insert(graph);
        unsafe { *started = graph };
        SUCCESS
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphDestroy(graph: usize) -> Status {
    current(|gpu| if gpu.graphs.contains_key(&graph) { SUCCESS } else { INVALID_HANDLE })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(started: usize, queue: usize) -> Status {
    current(|gpu| {
        let Some(work) = gpu.graphs.get(&started).cloned() else { return INVALID_HANDLE };
        work.into_iter().map(|work| gpu.push(queue, work)).find(|status| *status != SUCCESS).unwrap_or(SUCCESS)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphExecDestroy(started: usize) -> Status {
    current(|gpu| {
        gpu.graphs.remove(&started);
        if gpu.started.remove(&started) { SUCCESS } else { fault("a graph is destroyed twice") }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoadData(_: *mut c_void, _: *const c_void) -> Status {
    NOT_SUPPORTED
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(_: *mut c_void) -> Status {
    NOT_SUPPORTED
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleGetFunction(_: *mut c_void, _: *mut c_void, _: *const c_char) -> Status {
    NOT_SUPPORTED
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(_: *mut c_void, _: c_int, _: c_int) -> Status {
    NOT_SUPPORTED
}

#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchKernel() -> Status {
    NOT_SUPPORTED
}
