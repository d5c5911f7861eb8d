//! Kernels allocate nothing once they have run with the same shapes before.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use clip_host_cpu_kernels::{
    ConvShape, Gemm, Pool2dShape, ThreadPool, conv2d_forward, conv2d_input_grad, conv2d_weight_grad, copy_strided,
    gather_rows, gemm, max_pool2d_backward, max_pool2d_forward, scatter_add_rows,
};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything to the system's allocator, and counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn nothing_is_allocated_after_the_first_step() {
    let pool = ThreadPool::new(3);
    let shape = ConvShape {
        batch: 2,
        in_h: 14,
        in_w: 14,
        in_c: 32,
        out_h: 14,
        out_w: 14,
        out_c: 48,
        kernel: (3, 3),
        stride: (1, 1),
        padding: (1, 1),
        dilation: (1, 1),
        groups: 1,
    };
    let windows = Pool2dShape {
        batch: 2,
        in_h: 14,
        in_w: 14,
        out_h: 7,
        out_w: 7,
        channels: 32,
        kernel: (3, 3),
        stride: (2, 2),
        padding: (1, 1),
    };
    let mut input = vec![0.5; shape.input_len()];
    let mut weight = vec![0.25; shape.weight_len()];
    let mut output = vec![0.0; shape.output_len()];
    let mut pooled = vec![0.0; windows.output_len()];
    let mut other = input.clone();
    let mut table = vec![0.0; 100 * 64];
    let mut rows = vec![1.0; 8 * 64];
    let ids = [3, 1, 4, 1, 5, 9, 2, 6];
    let (a, b, mut c) = (vec![1.0; 200 * 2000], vec![1.0; 2000 * 300], vec![0.0; 200 * 300]);
    let mut step = || {
        conv2d_forward(&pool, &shape, &input, &weight, None, &mut output, false);
        conv2d_weight_grad(&pool, &shape, &input, &output, &mut weight, false);
        conv2d_input_grad(&pool, &shape, &output, &weight, &mut input, false);
        max_pool2d_forward(&pool, &windows, &input, &mut pooled);
        max_pool2d_backward(&pool, &windows, &input, &pooled, &mut other);
        copy_strided(&pool, &[2, 32, 196], &[6272, 1, 32], &other, &mut input);
        gather_rows(&pool, &table, 64, &ids, &mut rows).unwrap();
        scatter_add_rows(&pool, &rows, 64, &ids, &mut table).unwrap();
        gemm(&pool, &Gemm::contiguous(200, 300, 2000), &a, &b, &mut c);
        gemm(&pool, &Gemm::contiguous(10, 20, 20_000), &a, &a, &mut c);
    };
    step();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for _ in 0..50 {
        step();
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
}
