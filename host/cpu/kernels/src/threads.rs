//! Worker threads that live as long as the pool, with scratch memory each.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};

use memmap2::MmapMut;

use crate::elements::bf16;
use crate::isa::Isa;

/// Scratch buffers that belong to a whole call and not to one worker (packed operands, partial sums, results to be
/// permuted, converted operands), numbered after the workers' own.
const SHARED_SCRATCH: usize = 6;
/// How often a waiting thread looks again before it sleeps: some tens of microseconds, about what a wake-up costs.
const SPINS: u32 = 4000;
/// Bit of the gate that says that a job may be joined; the bits below count the workers inside.
const OPEN: usize = 1 << (usize::BITS - 1);

type Task = dyn Fn(usize, usize) + Sync;

thread_local! {
    /// The worker number of the thread while it runs a task, so that a nested `run` stays on the thread.
    static INSIDE: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The state that the caller and the workers share.
struct State {
    /// Number of the current job; a worker joins each at most once.
    epoch: AtomicU64,
    /// `OPEN` while the job may be joined, plus the number of workers inside.
    gate: AtomicUsize,
    /// One for each thread.
    shares: Vec<Share>,
    /// The job: written by the caller only while the gate is closed and empty.
    job: UnsafeCell<Option<(*const Task, usize)>>,
    /// The first panic of the job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Set while the caller sleeps until the last worker leaves.
    caller_waits: AtomicBool,
    done: Mutex<()>,
    done_signal: Condvar,
    stop: AtomicBool,
}

/// The next task of a thread's share of the job, alone in its cache lines.
#[repr(align(128))]
struct Share(AtomicUsize);

/// The first task of a thread's share.
fn first_task(tasks: usize, thread: usize, threads: usize) -> usize {
    (tasks as u128 * thread as u128 / threads as u128) as usize
}

// SAFETY: `job` is only written while no worker is inside the gate, and read only inside it; entering and leaving
// are acquire and release operations on `gate`. The pointer in it is dereferenced only while its owner waits in
// `run`. Everything else is already `Sync`.
unsafe impl Send for State {}
// SAFETY: as above.
unsafe impl Sync for State {}

impl State {
    /// Takes tasks until none is left, those of the worker's own share first; a panic ends the job and is kept for the
    /// caller.
    fn work(&self, task: &(dyn Fn(usize, usize) + Sync), tasks: usize, worker: usize) {
        let outer = INSIDE.with(|inside| inside.replace(Some(worker)));
        let result = catch_unwind(AssertUnwindSafe(|| {
            let threads = self.shares.len();
            for owner in (worker..threads).chain(0..worker) {
                let end = first_task(tasks, owner + 1, threads);
                loop {
                    let index = self.shares[owner].0.fetch_add(1, Ordering::Relaxed);
                    if index >= end {
                        break;
                    }
                    task(index, worker);
                }
            }
        }));
        INSIDE.with(|inside| inside.set(outer));
        if let Err(payload) = result {
            // Far beyond any task count, and far from wrapping around.
            self.shares.iter().for_each(|share| share.0.store(usize::MAX / 2, Ordering::Relaxed));
            lock(&self.panic).get_or_insert(payload);
        }
    }

    /// Joins the open job, if there is one.
    fn join_job(&self, worker: usize) {
        let mut gate = self.gate.load(Ordering::Relaxed);
        loop {
            if gate & OPEN == 0 {
                return;
            }
            match self.gate.compare_exchange_weak(gate, gate + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => gate = now,
            }
        }
        // SAFETY: inside the gate the job is not written, and its closure is alive: `run` returns only after the
        // gate is closed and empty.
        if let Some((task, tasks)) = unsafe { *self.job.get() } {
            // SAFETY: as above.
            self.work(unsafe { &*task }, tasks, worker);
        }
        let left = self.gate.fetch_sub(1, Ordering::SeqCst) - 1;
        if left == 0 && self.caller_waits.load(Ordering::SeqCst) {
            drop(lock(&self.done));
            self.done_signal.notify_all();
        }
    }

    fn worker_loop(&self, worker: usize, sleeping: &AtomicBool) {
        let mut seen = 0;
        loop {
            let mut spins = 0;
            loop {
                if self.stop.load(Ordering::Acquire) {
                    return;
                }
                let epoch = self.epoch.load(Ordering::SeqCst);
                if epoch != seen {
                    seen = epoch;
                    break;
                }
                spins += 1;
                if spins < SPINS {
                    std::hint::spin_loop();
                    continue;
                }
                sleeping.store(true, Ordering::SeqCst);
                // A job that came before the flag was set would not wake this thread: look once more.
                if self.epoch.load(Ordering::SeqCst) == seen && !self.stop.load(Ordering::SeqCst) {
                    thread::park();
                }
                sleeping.store(false, Ordering::SeqCst);
            }
            self.join_job(worker);
        }
    }
}

/// Locks although another thread may have panicked: the protected values are valid at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Worker {
    thread: Thread,
    sleeping: Arc<AtomicBool>,
    handle: Option<JoinHandle<()>>,
}

/// A fixed set of threads that share out the tasks of one job at a time.
///
/// The pool also holds scratch memory per worker and the instruction set that kernels run with.
pub struct ThreadPool {
    state: Arc<State>,
    workers: Vec<Worker>,
    scratch: Vec<Mutex<AlignedBuffer>>,
    /// One job at a time: a second caller waits here.
    turn: Mutex<()>,
    isa: Isa,
}

impl ThreadPool {
    /// A pool of `threads` (at least one) in all: the caller of [`run`](Self::run) is one of them. Uses the
    /// instruction set of [`Isa::selected`]. Where the system refuses a thread the pool is smaller.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::selected())
    }

    /// As [`new`](Self::new), with the given instruction set, or the best that the processor has below it.
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        let state = Arc::new(State {
            epoch: AtomicU64::new(0),
            gate: AtomicUsize::new(0),
            shares: (0..threads.max(1)).map(|_| Share(AtomicUsize::new(0))).collect(),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            caller_waits: AtomicBool::new(false),
            done: Mutex::new(()),
            done_signal: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let mut workers = Vec::new();
        for worker in 1..threads.max(1) {
            let sleeping = Arc::new(AtomicBool::new(false));
            let (shared, flag) = (Arc::clone(&state), Arc::clone(&sleeping));
            let builder = thread::Builder::new().name(format!("kernel-{worker}"));
            match builder.spawn(move || shared.worker_loop(worker, &flag)) {
                Ok(handle) => workers.push(Worker { thread: handle.thread().clone(), sleeping, handle: Some(handle) }),
                Err(_) => break,
            }
        }
        let scratch = (0..workers.len() + 1 + SHARED_SCRATCH).map(|_| Mutex::new(AlignedBuffer::default())).collect();
        ThreadPool { state, workers, scratch, turn: Mutex::new(()), isa: isa.min(Isa::detect()) }
    }

    /// The number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// The instruction set that kernels run with on this pool.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Calls `task(index, worker)` once for each index below `tasks`, and returns when all are done.
    ///
    /// Each thread begins with a share of neighbouring indices, the same for the same number of tasks, so that what it
    /// wrote in one call it finds in its own caches in the next; then it takes from the shares of others. `worker` is
    /// below [`threads`](Self::threads) and no two tasks run at the same time with the same one. Nothing is allocated.
    /// A nested call runs its tasks on the thread that makes it. If a task panics, tasks not yet begun are dropped
    /// and the panic goes on in the caller once all threads have left.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
        if let Some(worker) = INSIDE.with(Cell::get) {
            for index in 0..tasks {
                task(index, worker.min(self.workers.len()));
            }
            return;
        }
        let _turn = lock(&self.turn);
        if tasks <= 1 || self.workers.is_empty() {
            struct Leave;
            impl Drop for Leave {
                fn drop(&mut self) {
                    INSIDE.with(|inside| inside.set(None));
                }
            }
            INSIDE.with(|inside| inside.set(Some(0)));
            let _leave = Leave;
            for index in 0..tasks {
                task(index, 0);
            }
            return;
        }
        let state = &*self.state;
        // SAFETY: only the lifetime changes, and the job is cleared from reach (gate closed and empty) before this
        // function returns. The gate is closed and empty here as well, so that writing the job is exclusive.
        unsafe {
            let task = std::mem::transmute::<*const (dyn Fn(usize, usize) + Sync + '_), *const Task>(task);
            *state.job.get() = Some((task, tasks));
        }
        for (thread, share) in state.shares.iter().enumerate() {
            share.0.store(first_task(tasks, thread, state.shares.len()), Ordering::Relaxed);
        }
        state.gate.store(OPEN, Ordering::SeqCst);
        state.epoch.fetch_add(1, Ordering::SeqCst);
        for worker in self.workers.iter().take(tasks - 1) {
            if worker.sleeping.load(Ordering::SeqCst) {
                worker.thread.unpark();
            }
        }
        state.work(task, tasks, 0);
        let mut inside = state.gate.fetch_and(!OPEN, Ordering::SeqCst) & !OPEN;
        let mut spins = 0;
        while inside != 0 && spins < SPINS {
            std::hint::spin_loop();
            spins += 1;
            inside = state.gate.load(Ordering::Acquire);
        }
        if inside != 0 {
            state.caller_waits.store(true, Ordering::SeqCst);
            let mut done = lock(&state.done);
            while state.gate.load(Ordering::SeqCst) != 0 {
                done = state.done_signal.wait(done).unwrap_or_else(PoisonError::into_inner);
            }
            drop(done);
            state.caller_waits.store(false, Ordering::SeqCst);
        }
        let panic = lock(&state.panic).take();
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// The scratch buffer of one worker: `len` floats, 64-byte aligned, with whatever was in it before.
    ///
    /// It grows when a longer one is asked for than ever before, so that a step that repeats allocates only the
    /// first time. Taking the same worker's buffer twice at the same time from one thread is a deadlock; `worker`
    /// is taken modulo the number of threads.
    pub fn scratch(&self, worker: usize, len: usize) -> Scratch<'_> {
        self.slot(worker % self.threads(), len)
    }

    /// Grows every worker's scratch buffer to `len` floats now, so that it does not depend on who gets which task
    /// when they grow. A buffer in use is left as it is.
    pub fn reserve_scratch(&self, len: usize) {
        for buffer in &self.scratch[..self.threads()] {
            if let Ok(mut buffer) = buffer.try_lock() {
                buffer.grow(len);
            }
        }
    }

    /// A scratch buffer for a whole call, taken by the caller and read or written by its tasks.
    pub(crate) fn shared_scratch(&self, slot: usize, len: usize) -> Scratch<'_> {
        debug_assert!(slot < SHARED_SCRATCH);
        self.slot(self.threads() + slot, len)
    }

    fn slot(&self, slot: usize, len: usize) -> Scratch<'_> {
        let mut buffer = lock(&self.scratch[slot]);
        buffer.grow(len);
        Scratch { buffer, len }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        for worker in &mut self.workers {
            worker.thread.unpark();
            if let Some(handle) = worker.handle.take() {
                // The loop catches the panics of tasks, so that a worker itself never ends in one.
                let _ = handle.join();
            }
        }
    }
}

/// Scratch memory on loan from a [`ThreadPool`].
pub struct Scratch<'a> {
    buffer: MutexGuard<'a, AlignedBuffer>,
    len: usize,
}

impl Scratch<'_> {
    /// The same memory as twice as many values of half the size.
    pub(crate) fn as_bf16(&self) -> &[bf16] {
        // SAFETY: the buffer holds at least `len` initialised floats, and any bits are a value.
        unsafe { std::slice::from_raw_parts(self.buffer.start.as_ptr().cast(), 2 * self.len) }
    }

    /// As [`as_bf16`](Self::as_bf16), to write.
    pub(crate) fn as_bf16_mut(&mut self) -> &mut [bf16] {
        // SAFETY: as above, and the guard is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.start.as_ptr().cast(), 2 * self.len) }
    }
}

impl Deref for Scratch<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: the buffer holds at least `len` initialised floats.
        unsafe { std::slice::from_raw_parts(self.buffer.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Scratch<'_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: the buffer holds at least `len` initialised floats, and the guard is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.start.as_ptr(), self.len) }
    }
}

/// Buffers from this many bytes on are mapped, and take whole huge pages where the system has them: packed operands
/// that are read from many places miss the address cache less.
const MAPPED: usize = 256 << 10;
/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Floats at a cache line's start, all initialised.
struct AlignedBuffer {
    start: NonNull<f32>,
    capacity: usize,
    /// The memory's owner, if it was mapped.
    mapping: Option<MmapMut>,
}

// SAFETY: the buffer owns its memory.
unsafe impl Send for AlignedBuffer {}

impl Default for AlignedBuffer {
    fn default() -> Self {
        AlignedBuffer { start: NonNull::dangling(), capacity: 0, mapping: None }
    }
}

impl AlignedBuffer {
    fn layout(capacity: usize) -> Option<Layout> {
        Layout::from_size_align(capacity.checked_mul(size_of::<f32>())?, 64).ok()
    }

    fn grow(&mut self, len: usize) {
        if len <= self.capacity {
            return;
        }
        self.release();
        if self.map(len) {
            return;
        }
        let capacity = len.next_multiple_of(1024);
        let Some(layout) = Self::layout(capacity) else { handle_alloc_error(Layout::new::<f32>()) };
        // SAFETY: the layout is not empty, because `len` is above zero here.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start.cast::<f32>()) else { handle_alloc_error(layout) };
        (self.start, self.capacity) = (start, capacity);
    }

    /// Maps room for `len` floats from the start of a huge page on, if that is worth it and the system grants it.
    fn map(&mut self, len: usize) -> bool {
        let Some(bytes) = len.checked_mul(size_of::<f32>()).filter(|&bytes| bytes >= MAPPED) else { return false };
        let Some(bytes) = bytes.checked_next_multiple_of(HUGE) else { return false };
        let Some(room) = bytes.checked_add(HUGE) else { return false };
        let Ok(mut mapping) = MmapMut::map_anon(room) else { return false };
        #[cfg(target_os = "linux")]
        // Refused where there are no huge pages: then small ones do.
        let _ = mapping.advise(memmap2::Advice::HugePage);
        let skip = mapping.as_ptr().align_offset(HUGE);
        let Some(page) = mapping.get_mut(skip..skip.saturating_add(bytes)) else { return false };
        let Some(start) = NonNull::new(page.as_mut_ptr().cast::<f32>()) else { return false };
        *self = AlignedBuffer { start, capacity: bytes / size_of::<f32>(), mapping: Some(mapping) };
        true
    }

    fn release(&mut self) {
        if self.mapping.take().is_none()
            && let (1.., Some(layout)) = (self.capacity, Self::layout(self.capacity))
        {
            // SAFETY: allocated by `grow` with this very layout.
            unsafe { dealloc(self.start.as_ptr().cast(), layout) };
        }
        (self.start, self.capacity) = (NonNull::dangling(), 0);
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        self.release();
    }
}

/// A mutable slice that several tasks write at disjoint places.
///
/// Sharing the handle is safe; each access is `unsafe` and promises that no other task touches the same elements
/// while the returned reference lives.
#[derive(Clone, Copy)]
pub struct SharedMut<'a, T> {
    start: *mut T,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `unsafe` functions whose callers promise disjointness.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    /// Borrows the slice for as long as the handle or a copy of it lives.
    pub fn new(slice: &'a mut [T]) -> Self {
        SharedMut { start: slice.as_mut_ptr(), len: slice.len(), _borrow: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first element's address, for kernels that check their bounds themselves.
    pub fn as_ptr(&self) -> *mut T {
        self.start
    }

    /// The elements from `offset` to `offset + len`; out of bounds is a panic.
    ///
    /// # Safety
    /// No other reference to any of these elements may be used while the returned one lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, offset: usize, len: usize) -> &'a mut [T] {
        assert!(offset <= self.len && len <= self.len - offset, "{offset} + {len} is beyond {}", self.len);
        // SAFETY: in bounds by the line above; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in 1..=4 {
            let pool = ThreadPool::new(threads);
            assert_eq!(pool.threads(), threads);
            for round in 0..200 {
                let tasks = round % 37;
                let hits: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|index, worker| {
                    assert!(worker < threads);
                    hits[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn sleeping_workers_wake_up() {
        let pool = ThreadPool::new(3);
        for _ in 0..5 {
            thread::sleep(std::time::Duration::from_millis(3));
            let sum = AtomicUsize::new(0);
            pool.run(50, &|index, _| {
                thread::sleep(std::time::Duration::from_micros(20));
                sum.fetch_add(index, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 49 * 50 / 2);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        for threads in 1..=3 {
            let pool = ThreadPool::new(threads);
            for bad in [0, 7, 19] {
                let result = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(20, &|index, _| assert!(index != bad, "task {bad} fails"));
                }));
                let payload = result.expect_err("the panic was lost");
                let text = payload.downcast_ref::<String>().map(String::as_str).unwrap_or_default();
                assert_eq!(text, format!("task {bad} fails"));
                let count = AtomicUsize::new(0);
                pool.run(20, &|_, _| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(count.into_inner(), 20);
            }
        }
    }

    #[test]
    fn nested_runs_stay_on_their_thread() {
        let pool = ThreadPool::new(2);
        let count = AtomicUsize::new(0);
        pool.run(4, &|_, outer| {
            pool.run(5, &|_, inner| {
                assert_eq!(inner, outer);
                count.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(count.into_inner(), 20);
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = ThreadPool::new(2);
        let count = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(7, &|_, _| {
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), 2100);
    }

    #[test]
    fn scratch_is_aligned_and_kept() {
        let pool = ThreadPool::new(2);
        pool.scratch(1, 10).fill(3.0);
        let first = pool.scratch(1, 10).as_ptr();
        assert_eq!(first as usize % 64, 0);
        assert_eq!(pool.scratch(1, 10)[9], 3.0);
        assert_eq!(pool.scratch(0, 5000).len(), 5000);
        assert_eq!(pool.scratch(1, 7).as_ptr(), first);
        assert!(pool.scratch(0, 0).is_empty());
    }

    #[test]
    fn shared_slices_are_written_side_by_side() {
        let pool = ThreadPool::new(3);
        let mut values = vec![0usize; 90];
        let shared = SharedMut::new(&mut values);
        assert_eq!((shared.len(), shared.is_empty()), (90, false));
        pool.run(9, &|index, _| {
            // SAFETY: each task takes its own ten elements.
            unsafe { shared.slice(index * 10, 10) }.fill(index);
        });
        assert!(values.iter().enumerate().all(|(at, &value)| value == at / 10));
        let result = catch_unwind(AssertUnwindSafe(|| {
            // SAFETY: never returns.
            unsafe { SharedMut::new(&mut [0u8; 4]).slice(3, 2).len() }
        }));
        assert!(result.is_err());
    }
}
