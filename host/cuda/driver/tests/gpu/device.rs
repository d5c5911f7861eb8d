//! Memory, copies, kernels, events, graphs.

use crate::{Random, bytes, gpu, numbers};
use clip_host_cuda_driver::compile::{compile, version};
use clip_host_cuda_driver::{CudaError, Device, Event, Queue};
use std::thread;

const KERNELS: &str = r#"
extern "C" __global__ void axpy(float *y, const float *x, long long n, unsigned long long factor) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] += __uint_as_float((unsigned)factor) * x[i];
}

extern "C" __global__ void spin(unsigned long long cycles) {
    long long begin = clock64();
    while ((unsigned long long)(clock64() - begin) < cycles) {}
}

extern "C" __global__ void shared_sum(float *y, const float *x, long long n) {
    extern __shared__ float values[];
    for (long long i = threadIdx.x; i < n; i += blockDim.x) values[i] = x[i];
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0;
        for (long long i = 0; i < n; i++) sum += values[i];
        *y = sum;
    }
}

extern "C" __global__ void narrow(float *y, float x) { *y = x; }
"#;

/// The number `count` as the driver reads it: `count` floats, 256 threads in a block.
fn grid(count: usize) -> [u32; 3] {
    [count.div_ceil(256) as u32, 1, 1]
}

/// Puts `y += factor * x` into the compute queue.
fn axpy(device: &Device, axpy: &clip_host_cuda_driver::Function, y: u64, x: u64, count: usize, factor: f32) {
    let args = [y, x, count as u64, u64::from(factor.to_bits())];
    // SAFETY: the kernel takes these four parameters; every caller's memory holds `count` floats and outlives the work.
    unsafe { device.launch(axpy, grid(count), [256, 1, 1], 0, &args, Queue::Compute) }.unwrap();
}

/// The kernels of these tests compile also where there is no GPU to run them.
#[test]
fn the_kernels_compile() {
    match version() {
        Ok(_) => assert!(compile(KERNELS, (9, 0), &["--fmad=false"]).unwrap().starts_with(b"\x7fELF")),
        Err(error) => println!("the_kernels_compile: SKIPPED: {error}"),
    }
}

#[test]
fn properties_are_plausible() {
    let Some((_alone, device)) = gpu("properties_are_plausible") else { return };
    let (free, total) = device.memory().unwrap();
    assert!(!device.name().is_empty());
    assert!(device.compute_capability() >= (5, 0));
    assert!(device.multiprocessors() > 0 && device.shared_memory_per_block() >= 48 << 10);
    assert!(0 < free && free <= total, "{free} of {total}");
    assert!(device.driver_version() >= (12, 0), "{:?}", device.driver_version());
    let count = Device::count().unwrap();
    assert_eq!(Device::open(count).err(), Some(CudaError::NoDevice { index: count, count }));
}

#[test]
fn memory_comes_back_as_it_went() {
    let Some((_alone, device)) = gpu("memory_comes_back_as_it_went") else { return };
    let memory = device.alloc(1000).unwrap();
    let mut back = vec![1; 1000];
    device.download(memory.address(), &mut back).unwrap();
    assert_eq!(back, vec![0; 1000], "device memory begins with zeros");

    let data: Vec<u8> = (0..1000).map(|index| (index % 251) as u8).collect();
    device.upload(memory.address(), &data).unwrap();
    device.download(memory.address(), &mut back).unwrap();
    assert_eq!(back, data);
    // Part of it, and a copy within the device.
    device.upload(memory.address() + 10, &[200; 5]).unwrap();
    device.copy(memory.address(), memory.address() + 500, 100, Queue::Compute).unwrap();
    device.clear(memory.address() + 990, 10, Queue::Compute).unwrap();
    device.download(memory.address(), &mut back).unwrap();
    let mut expected = data.clone();
    expected[10..15].fill(200);
    expected.copy_within(..100, 500);
    expected[990..].fill(0);
    assert_eq!(back, expected);
}

#[test]
fn addresses_outside_of_memory_are_refused() {
    let Some((_alone, device)) = gpu("addresses_outside_of_memory_are_refused") else { return };
    let memory = device.alloc(1000).unwrap();
    let address = memory.address();
    let mut nine = [0; 9];
    for wrong in [address - 1, address + 992, address + 1000, 0, u64::MAX - 3] {
        assert!(matches!(device.upload(wrong, &nine), Err(CudaError::Range { bytes: 9, .. })), "{wrong:#x}");
        assert!(matches!(device.download(wrong, &mut nine), Err(CudaError::Range { .. })), "{wrong:#x}");
        assert!(matches!(device.copy(wrong, address, 9, Queue::Copy), Err(CudaError::Range { .. })), "{wrong:#x}");
        assert!(matches!(device.clear(wrong, 9, Queue::Copy), Err(CudaError::Range { .. })), "{wrong:#x}");
    }
    assert!(matches!(device.copy(address, address + 8, 9, Queue::Compute), Err(CudaError::Argument { .. })));
    drop(memory);
    assert!(matches!(device.upload(address, &nine), Err(CudaError::Range { .. })), "freed memory");
}

#[test]
fn page_locked_copies_overlap_and_are_waited_for() {
    let Some((_alone, device)) = gpu("page_locked_copies_overlap_and_are_waited_for") else { return };
    let bytes = 64 << 20;
    let memory = device.alloc(bytes).unwrap();
    let mut there = device.pinned(bytes).unwrap();
    let mut back = device.pinned(bytes).unwrap();
    assert!(there.as_slice().unwrap().iter().all(|byte| *byte == 0), "page-locked memory begins with zeros");
    for round in 1..4_u8 {
        // Waits until the last round's copy has read the memory.
        there.as_mut_slice().unwrap().fill(round);
        device.upload_async(&there, 0..bytes, memory.address(), Queue::Copy).unwrap();
        let copied = device.event().unwrap();
        device.record(&copied, Queue::Copy).unwrap();
        device.wait(&copied, Queue::Compute).unwrap();
        device.download_async(memory.address(), &mut back, 0..bytes, Queue::Compute).unwrap();
        assert!(back.as_slice().unwrap().iter().all(|byte| *byte == round), "round {round}");
    }
    assert!(matches!(
        device.upload_async(&there, 1..bytes + 1, memory.address(), Queue::Copy),
        Err(CudaError::Argument { .. })
    ));
    // Dropped while copies may be under way: the drop waits.
    device.upload_async(&there, 0..bytes, memory.address(), Queue::Copy).unwrap();
}

#[test]
fn kernels_run_in_order() {
    let Some((_alone, device)) = gpu("kernels_run_in_order") else { return };
    let module = device.load(&compile(KERNELS, device.compute_capability(), &["--fmad=false"]).unwrap()).unwrap();
    let kernel = module.function("axpy").unwrap();
    let count = 10_007;
    let (x, mut y) = (Random(1).numbers(count), Random(2).numbers(count));
    let memory = device.alloc(8 * count).unwrap();
    let (x_address, y_address) = (memory.address(), memory.address() + 4 * count as u64);
    device.upload(x_address, &bytes(&x)).unwrap();
    device.upload(y_address, &bytes(&y)).unwrap();
    for factor in [0.5, -0.25, 3.0] {
        axpy(&device, &kernel, y_address, x_address, count, factor);
        y.iter_mut().zip(&x).for_each(|(y, x)| *y += factor * x);
    }
    let mut back = vec![0; 4 * count];
    device.download(y_address, &mut back).unwrap();
    assert_eq!(numbers(&back), y);
}

#[test]
fn kernels_get_the_shared_memory_they_ask_for() {
    let Some((_alone, device)) = gpu("kernels_get_the_shared_memory_they_ask_for") else { return };
    let module = device.load(&compile(KERNELS, device.compute_capability(), &[]).unwrap()).unwrap();
    let kernel = module.function("shared_sum").unwrap();
    let most = device.shared_memory_per_block();
    let memory = device.alloc(most as usize + 4).unwrap();
    let (x, y) = (memory.address() + 4, memory.address());
    device.upload(x, &bytes(&vec![1.0; most as usize / 4])).unwrap();
    for shared in [1 << 10, 48 << 10, most, 40 << 10] {
        let args = [y, x, u64::from(shared / 4)];
        // SAFETY: the kernel takes three parameters, and reads and writes what `memory` holds.
        unsafe { device.launch(&kernel, [1, 1, 1], [128, 1, 1], shared, &args, Queue::Compute) }.unwrap();
        let mut back = [0; 4];
        device.download(y, &mut back).unwrap();
        assert_eq!(f32::from_le_bytes(back), (shared / 4) as f32);
    }
    // SAFETY: the driver refuses the launch.
    let refused = unsafe { device.launch(&kernel, [1, 1, 1], [128, 1, 1], most + 4, &[y, x, 1], Queue::Compute) };
    assert!(matches!(refused, Err(CudaError::Call { .. })), "{refused:?}");
}

#[test]
fn wrong_kernels_and_arguments_are_told() {
    let Some((_alone, device)) = gpu("wrong_kernels_and_arguments_are_told") else { return };
    let cubin = compile(KERNELS, device.compute_capability(), &[]).unwrap();
    let module = device.load(&cubin).unwrap();
    let error = module.function("no_such").err().unwrap();
    assert!(matches!(&error, CudaError::Call { name, .. } if name == "CUDA_ERROR_NOT_FOUND"), "{error:?}");
    assert!(matches!(device.load(b"not a cubin").err(), Some(CudaError::Argument { .. })));
    if device.driver_version() >= (12, 4) {
        assert!(matches!(module.function("narrow").err(), Some(CudaError::Argument { .. })), "a parameter of 4 bytes");
        let kernel = module.function("axpy").unwrap();
        // SAFETY: the launch is refused: three arguments are missing.
        let refused = unsafe { device.launch(&kernel, [1, 1, 1], [1, 1, 1], 0, &[0], Queue::Compute) };
        assert!(matches!(refused, Err(CudaError::Argument { .. })), "{refused:?}");
    }
}

#[test]
fn events_measure_time() {
    let Some((_alone, device)) = gpu("events_measure_time") else { return };
    let module = device.load(&compile(KERNELS, device.compute_capability(), &[]).unwrap()).unwrap();
    let spin = module.function("spin").unwrap();
    let events: Vec<Event> = (0..3).map(|_| device.event().unwrap()).collect();
    device.record(&events[0], Queue::Compute).unwrap();
    for (event, cycles) in events[1..].iter().zip([10_000_000, 1_000]) {
        // SAFETY: the kernel takes one parameter and touches no memory.
        unsafe { device.launch(&spin, [1, 1, 1], [1, 1, 1], 0, &[cycles], Queue::Compute) }.unwrap();
        device.record(event, Queue::Compute).unwrap();
    }
    let long = Event::milliseconds_between(&events[0], &events[1]).unwrap();
    let short = Event::milliseconds_between(&events[1], &events[2]).unwrap();
    println!("10 million cycles: {long} ms, a thousand: {short} ms");
    // A GPU's clock is between 0.1 and 10 GHz.
    assert!((1.0..1000.0).contains(&long) && 0.0 <= short && short < long, "{long} {short}");
}

#[test]
fn a_graph_does_its_work_at_each_replay() {
    let Some((_alone, device)) = gpu("a_graph_does_its_work_at_each_replay") else { return };
    let module = device.load(&compile(KERNELS, device.compute_capability(), &["--fmad=false"]).unwrap()).unwrap();
    let kernel = module.function("axpy").unwrap();
    let count = 1000;
    let memory = device.alloc(8 * count).unwrap();
    let (x, y) = (memory.address(), memory.address() + 4 * count as u64);
    device.upload(x, &bytes(&vec![1.0; count])).unwrap();
    let graph = device
        .capture(|| {
            axpy(&device, &kernel, y, x, count, 2.0);
            axpy(&device, &kernel, y, x, count, 1.0);
            // What cannot be recorded is refused, and leaves the capture whole.
            assert!(matches!(device.alloc(1), Err(CudaError::Argument { .. })));
            assert!(matches!(device.upload(x, &[0]), Err(CudaError::Argument { .. })));
            assert!(matches!(device.synchronize(), Err(CudaError::Argument { .. })));
            assert!(matches!(device.begin_capture(), Err(CudaError::Argument { .. })));
            Ok::<(), CudaError>(())
        })
        .unwrap();
    assert!(matches!(device.end_capture().err(), Some(CudaError::Argument { .. })));
    let mut back = vec![0; 4 * count];
    device.download(y, &mut back).unwrap();
    assert_eq!(numbers(&back), vec![0.0; count], "captured work is not carried out");
    for replays in 1..=3 {
        device.replay(&graph).unwrap();
        device.download(y, &mut back).unwrap();
        assert_eq!(numbers(&back), vec![3.0 * replays as f32; count]);
    }
    // The data may change between replays, and the graph keeps its kernels and memory.
    device.upload(x, &bytes(&vec![2.0; count])).unwrap();
    drop((kernel, module, memory));
    device.replay(&graph).unwrap();
    device.download(y, &mut back).unwrap();
    assert_eq!(numbers(&back), vec![15.0; count]);
    drop(graph);
    assert!(matches!(device.download(y, &mut back), Err(CudaError::Range { .. })), "the graph was the last to need it");
}

#[test]
fn captured_copies_are_replayed_and_keep_their_memory() {
    let Some((_alone, device)) = gpu("captured_copies_are_replayed_and_keep_their_memory") else { return };
    let memory = device.alloc(512).unwrap();
    let (from, to) = (memory.address(), memory.address() + 256);
    let graph = device.capture(|| device.copy(from, to, 256, Queue::Compute)).unwrap();
    drop(memory);
    for value in 1..4 {
        device.upload(from, &[value; 256]).unwrap();
        device.replay(&graph).unwrap();
        let mut back = [0; 256];
        device.download(to, &mut back).unwrap();
        assert_eq!(back, [value; 256]);
    }
    // Given back while a replay may be under way.
    device.replay(&graph).unwrap();
    drop(graph);
    assert!(matches!(device.upload(from, &[1]), Err(CudaError::Range { .. })), "the graph was the last to need it");
}

#[test]
fn several_threads_share_a_device() {
    let Some((_alone, device)) = gpu("several_threads_share_a_device") else { return };
    thread::scope(|scope| {
        for value in 1..5 {
            let device = &device;
            scope.spawn(move || {
                for bytes in [1, 1000, 100_000] {
                    let memory = device.alloc(bytes).unwrap();
                    let mut pinned = device.pinned(bytes).unwrap();
                    pinned.as_mut_slice().unwrap().fill(value);
                    device.upload_async(&pinned, 0..bytes, memory.address(), Queue::Compute).unwrap();
                    let mut back = vec![0; bytes];
                    device.download(memory.address(), &mut back).unwrap();
                    assert_eq!(back, vec![value; bytes]);
                }
            });
        }
    });
}

#[test]
fn a_capture_may_fork_into_the_copy_queue() {
    let Some((_alone, device)) = gpu("a_capture_may_fork_into_the_copy_queue") else { return };
    let memory = device.alloc(300).unwrap();
    device.upload(memory.address(), &[7; 100]).unwrap();
    let (forked, joined) = (device.event().unwrap(), device.event().unwrap());
    let graph = device
        .capture(|| {
            device.record(&forked, Queue::Compute)?;
            device.wait(&forked, Queue::Copy)?;
            device.copy(memory.address(), memory.address() + 100, 100, Queue::Copy)?;
            device.record(&joined, Queue::Copy)?;
            device.wait(&joined, Queue::Compute)?;
            device.copy(memory.address() + 100, memory.address() + 200, 100, Queue::Compute)
        })
        .unwrap();
    device.replay(&graph).unwrap();
    let mut back = [0; 300];
    device.download(memory.address(), &mut back).unwrap();
    assert_eq!(back, [7; 300]);
}

#[test]
fn a_capture_that_fails_leaves_the_device_usable() {
    let Some((_alone, device)) = gpu("a_capture_that_fails_leaves_the_device_usable") else { return };
    let memory = device.alloc(100).unwrap();
    let failed = device.capture(|| device.copy(0, memory.address(), 10, Queue::Compute));
    assert!(matches!(failed.err(), Some(CudaError::Range { .. })));
    device.upload(memory.address(), &[1; 100]).unwrap();
    device.synchronize().unwrap();
}
