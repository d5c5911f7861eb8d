//! Kernels allocate nothing once they have run with the same shapes before.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use clip_host_cpu_kernels::{
    ConvShape, Elements, ElementsMut, Gemm, Pool2dShape, ThreadPool, bf16, column_moments, conv2d_forward,
    conv2d_input_grad, conv2d_weight_grad, copy_strided, gather_rows, gemm, max_pool2d_backward, max_pool2d_forward,
    scatter_add_rows,
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
    let (mut moments, mut wide_moments) = (vec![0.0; 2 * shape.out_c], vec![0.0; 400]);
    let half = vec![bf16::from_f32(0.5); 200 * 2000];
    let half_weight = Elements::Bf16(&half[..shape.weight_len()]);
    let (mut half_c, mut half_output) = (vec![bf16::ZERO; 200 * 300], vec![bf16::ZERO; shape.output_len()]);
    let mut step = || {
        let (x, y) = (Elements::F32(&input), ElementsMut::F32(&mut output));
        conv2d_forward(&pool, &shape, x, Elements::F32(&weight), None, y, false, Some(&mut moments));
        conv2d_weight_grad(&pool, &shape, x, Elements::F32(&output), &mut weight, false);
        let (x, y) = (ElementsMut::F32(&mut input), Elements::F32(&output));
        conv2d_input_grad(&pool, &shape, y, Elements::F32(&weight), x, false);
        max_pool2d_forward(&pool, &windows, Elements::F32(&input), ElementsMut::F32(&mut pooled));
        let (x, y) = (Elements::F32(&input), Elements::F32(&pooled));
        max_pool2d_backward(&pool, &windows, x, y, ElementsMut::F32(&mut other));
        let (from, to) = (Elements::F32(&other), ElementsMut::F32(&mut input));
        copy_strided(&pool, &[2, 32, 196], &[6272, 1, 32], from, to);
        gather_rows(&pool, Elements::F32(&table), 64, &ids, &mut rows).unwrap();
        scatter_add_rows(&pool, &rows, 64, &ids, &mut table).unwrap();
        let (left, right) = (Elements::F32(&a), Elements::F32(&b));
        gemm(&pool, &Gemm::contiguous(200, 300, 2000), left, right, ElementsMut::F32(&mut c));
        gemm(&pool, &Gemm::contiguous(10, 20, 20_000), left, left, ElementsMut::F32(&mut c));
        let half = Elements::Bf16(&half);
        gemm(&pool, &Gemm::contiguous(200, 300, 2000), half, right, ElementsMut::Bf16(&mut half_c));
        gemm(&pool, &Gemm::contiguous(10, 20, 20_000), half, half, ElementsMut::F32(&mut c));
        let y = ElementsMut::Bf16(&mut half_output);
        conv2d_forward(&pool, &shape, Elements::F32(&input), half_weight, None, y, false, Some(&mut moments));
        column_moments(&pool, Elements::F32(&a), 2000, 200, &mut wide_moments);
    };
    step();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for _ in 0..50 {
        step();
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
}
