//! Device memory, page-locked host memory, and the copies between them.

use crate::device::{Context, Device, Event, Queue, lock};
use crate::driver::{Address, EVENT_DISABLE_TIMING};
use crate::error::CudaError;
use std::ffi::c_void;
use std::fmt;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;

/// Device memory; given back when it is dropped and no [`crate::Graph`] that was captured in its time is left.
pub struct DeviceMemory {
    allocation: Arc<Allocation>,
}

impl DeviceMemory {
    /// Where it begins; a multiple of 256.
    pub fn address(&self) -> u64 {
        self.allocation.address
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> usize {
        self.allocation.bytes
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceMemory({:#x}, {} bytes)", self.address(), self.bytes())
    }
}

pub(crate) struct Allocation {
    context: Arc<Context>,
    address: Address,
    bytes: usize,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        lock(&self.context.allocations).remove(&self.address);
        if let Ok(functions) = self.context.bind() {
            // SAFETY: the memory was allocated by this value. Work that may use it ends first. No capture goes on that
            // the wait would spoil: it would keep the memory alive.
            unsafe {
                for queue in Queue::ALL {
                    (functions.cuStreamSynchronize)(self.context.stream(queue));
                }
                (functions.cuMemFree_v2)(self.address);
            }
        }
    }
}

impl Device {
    /// Device memory, all zeros.
    pub fn alloc(&self, bytes: usize) -> Result<DeviceMemory, CudaError> {
        self.context.outside_capture("allocate device memory")?;
        let functions = self.context.bind()?;
        let mut address = 0;
        // SAFETY: the context is current, the pointer is to a local. The driver has no allocations of nothing.
        let status = unsafe { (functions.cuMemAlloc_v2)(&mut address, bytes.max(1)) };
        self.context.check(status, || format!("allocate {bytes} bytes of device memory"))?;
        let allocation = Arc::new(Allocation { context: self.context.clone(), address, bytes });
        lock(&self.context.allocations).insert(address, (bytes, Arc::downgrade(&allocation)));
        self.clear(address, bytes, Queue::Compute)?;
        self.finish(Queue::Compute, "clear device memory")?;
        Ok(DeviceMemory { allocation })
    }

    /// Zeros from `address` on.
    pub fn clear(&self, address: u64, bytes: usize, queue: Queue) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        let what = || format!("clear {bytes} bytes");
        self.context.in_range(address, bytes, what)?;
        let functions = self.context.bind()?;
        // SAFETY: the range is allocated device memory.
        let status = unsafe { (functions.cuMemsetD8Async)(address, 0, bytes, self.context.stream(queue)) };
        self.context.check(status, what)
    }

    /// Copies `from` to the device, behind the work of the compute queue, and waits until it is there.
    pub fn upload(&self, address: u64, from: &[u8]) -> Result<(), CudaError> {
        if from.is_empty() {
            return Ok(());
        }
        let what = || format!("upload {} bytes", from.len());
        self.context.outside_capture("upload")?;
        self.context.in_range(address, from.len(), what)?;
        let functions = self.context.bind()?;
        // SAFETY: the range is allocated device memory, and `from` is borrowed until the queue is empty.
        let status = unsafe {
            let stream = self.context.stream(Queue::Compute);
            (functions.cuMemcpyHtoDAsync_v2)(address, from.as_ptr().cast::<c_void>(), from.len(), stream)
        };
        self.context.check(status, what)?;
        self.finish(Queue::Compute, "upload")
    }

    /// Copies from the device into all of `to`, behind the work of the compute queue, and waits until it is there.
    pub fn download(&self, address: u64, to: &mut [u8]) -> Result<(), CudaError> {
        if to.is_empty() {
            return Ok(());
        }
        let bytes = to.len();
        let what = || format!("download {bytes} bytes");
        self.context.outside_capture("download")?;
        self.context.in_range(address, bytes, what)?;
        let functions = self.context.bind()?;
        // SAFETY: the range is allocated device memory, and `to` is borrowed until the queue is empty.
        let status = unsafe {
            let stream = self.context.stream(Queue::Compute);
            (functions.cuMemcpyDtoHAsync_v2)(to.as_mut_ptr().cast::<c_void>(), address, bytes, stream)
        };
        let finished = self.finish(Queue::Compute, "download");
        self.context.check(status, what)?;
        finished
    }

    /// Page-locked host memory, all zeros: what asynchronous copies need.
    pub fn pinned(&self, bytes: usize) -> Result<Pinned, CudaError> {
        let fences =
            [Event::new(&self.context, EVENT_DISABLE_TIMING)?, Event::new(&self.context, EVENT_DISABLE_TIMING)?];
        let functions = self.context.bind()?;
        let mut pointer = ptr::null_mut();
        // SAFETY: the context is current, the pointer is to a local.
        let status = unsafe { (functions.cuMemHostAlloc)(&mut pointer, bytes.max(1), 0) };
        let what = || format!("allocate {bytes} bytes of page-locked memory");
        self.context.check(status, what)?;
        let Some(pointer) = NonNull::new(pointer.cast::<u8>()) else {
            return Err(CudaError::Argument {
                what: what(),
                expected: "an address".into(),
                got: "null".into(),
                hint: "this is a defect of the driver",
            });
        };
        // SAFETY: the driver gave that many bytes, and nobody else has them.
        unsafe { pointer.as_ptr().write_bytes(0, bytes) };
        Ok(Pinned { context: self.context.clone(), pointer, bytes, fences })
    }

    /// Copies `from[range]` to `address` when the queue comes to it. The memory cannot be changed before that:
    /// [`Pinned::as_mut_slice`] waits.
    pub fn upload_async(
        &self,
        from: &Pinned,
        range: Range<usize>,
        address: u64,
        queue: Queue,
    ) -> Result<(), CudaError> {
        let what = || format!("upload bytes {range:?} of page-locked memory");
        let Some((offset, bytes)) = self.pinned_range(from, &range, what)? else { return Ok(()) };
        self.context.in_range(address, bytes, what)?;
        let functions = self.context.bind()?;
        // SAFETY: both ranges were checked. The fence keeps the host from writing or freeing the memory before the copy.
        let status = unsafe {
            let pointer = from.pointer.as_ptr().add(offset).cast::<c_void>();
            (functions.cuMemcpyHtoDAsync_v2)(address, pointer, bytes, self.context.stream(queue))
        };
        self.context.check(status, what)?;
        from.fence(queue)
    }

    /// Copies from `address` into `to[range]` when the queue comes to it; [`Pinned::as_slice`] waits for it.
    pub fn download_async(
        &self,
        address: u64,
        to: &mut Pinned,
        range: Range<usize>,
        queue: Queue,
    ) -> Result<(), CudaError> {
        let what = || format!("download into bytes {range:?} of page-locked memory");
        let Some((offset, bytes)) = self.pinned_range(to, &range, what)? else { return Ok(()) };
        self.context.in_range(address, bytes, what)?;
        let functions = self.context.bind()?;
        // SAFETY: both ranges were checked. The fence keeps the host from using or freeing the memory before the copy.
        let status = unsafe {
            let pointer = to.pointer.as_ptr().add(offset).cast::<c_void>();
            (functions.cuMemcpyDtoHAsync_v2)(pointer, address, bytes, self.context.stream(queue))
        };
        self.context.check(status, what)?;
        to.fence(queue)
    }

    /// Copies within the device when the queue comes to it. The ranges may not overlap.
    pub fn copy(&self, from: u64, to: u64, bytes: usize, queue: Queue) -> Result<(), CudaError> {
        if bytes == 0 {
            return Ok(());
        }
        let what = || format!("copy {bytes} bytes on the device");
        self.context.in_range(from, bytes, what)?;
        self.context.in_range(to, bytes, what)?;
        if from.abs_diff(to) < bytes as u64 {
            return Err(CudaError::Argument {
                what: what(),
                expected: "ranges apart from each other".into(),
                got: format!("from {from:#x} to {to:#x}"),
                hint: "copy by way of other memory",
            });
        }
        let functions = self.context.bind()?;
        // SAFETY: both ranges are allocated device memory.
        let status = unsafe { (functions.cuMemcpyDtoDAsync_v2)(to, from, bytes, self.context.stream(queue)) };
        self.context.check(status, what)
    }

    /// Offset and length of a range of page-locked memory, nothing for an empty one.
    fn pinned_range(
        &self,
        memory: &Pinned,
        range: &Range<usize>,
        what: impl Fn() -> String,
    ) -> Result<Option<(usize, usize)>, CudaError> {
        self.context.owns(&memory.context, "copy page-locked memory")?;
        // What a graph copies later, no fence could order with the host's own use of the memory.
        self.context.outside_capture("copy page-locked memory")?;
        if range.start > range.end || range.end > memory.bytes {
            return Err(CudaError::Argument {
                what: what(),
                expected: format!("a range within its {} bytes", memory.bytes),
                got: format!("{range:?}"),
                hint: "this is a defect of the caller",
            });
        }
        Ok((!range.is_empty()).then_some((range.start, range.len())))
    }

    /// Waits until the queue is empty.
    pub(crate) fn finish(&self, queue: Queue, what: &str) -> Result<(), CudaError> {
        let functions = self.context.bind()?;
        // SAFETY: the stream is of this context, and alive.
        let status = unsafe { (functions.cuStreamSynchronize)(self.context.stream(queue)) };
        self.context.check(status, || what.into())
    }
}

impl Context {
    /// Whether these bytes lie within one allocation.
    pub fn in_range(&self, address: u64, bytes: usize, what: impl FnOnce() -> String) -> Result<(), CudaError> {
        let allocations = lock(&self.allocations);
        let within = allocations.range(..=address).next_back().is_some_and(|(base, (length, _))| {
            address.checked_add(bytes as u64).is_some_and(|end| end <= base + *length as u64)
        });
        match within {
            true => Ok(()),
            false => Err(CudaError::Range { what: what(), address, bytes }),
        }
    }
}

/// Page-locked host memory. The host sees it only while no copy is under way that would be disturbed.
pub struct Pinned {
    context: Arc<Context>,
    pointer: NonNull<u8>,
    bytes: usize,
    /// Behind the last copy of each queue, in the order of [`Queue`].
    fences: [Event; 2],
}

// SAFETY: the memory belongs to this value alone; the events may go to any thread.
unsafe impl Send for Pinned {}
// SAFETY: a shared reference gives shared slices only, and lets the device read.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Its length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The bytes, after all copies to or from them have ended.
    pub fn as_slice(&self) -> Result<&[u8], CudaError> {
        self.settle()?;
        // SAFETY: the memory is this value's own, initialised, and no copy into it is under way or can begin: that needs
        // the exclusive reference.
        Ok(unsafe { slice::from_raw_parts(self.pointer.as_ptr(), self.bytes) })
    }

    /// The bytes to be written, after all copies to or from them have ended.
    pub fn as_mut_slice(&mut self) -> Result<&mut [u8], CudaError> {
        self.settle()?;
        // SAFETY: the memory is this value's own, initialised, and no copy is under way or can begin.
        Ok(unsafe { slice::from_raw_parts_mut(self.pointer.as_ptr(), self.bytes) })
    }

    /// Marks where the last copy in the queue ends; without a mark it is waited for at once.
    fn fence(&self, queue: Queue) -> Result<(), CudaError> {
        let recorded = self.fences[queue as usize].record(queue);
        if recorded.is_err() {
            Device { context: self.context.clone() }.finish(queue, "wait for a copy")?;
        }
        recorded
    }

    fn settle(&self) -> Result<(), CudaError> {
        self.fences.iter().try_for_each(Event::synchronize)
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({} bytes)", self.bytes)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // Where waiting fails the device has failed, and copies nothing any more.
        let _ = self.settle();
        if let Ok(functions) = self.context.bind() {
            // SAFETY: the memory was allocated by this value, and no copy is under way.
            unsafe { (functions.cuMemFreeHost)(self.pointer.as_ptr().cast::<c_void>()) };
        }
    }
}
