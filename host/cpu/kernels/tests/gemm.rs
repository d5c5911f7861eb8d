//! Matrix multiplication against a naive loop in double precision.

mod common;

use clip_host_cpu_kernels::{Elements, ElementsMut, Gemm, gemm};
use common::{KINDS, Kind, Random, Tensor, assert_close_as, on_every_pool, operands};

/// The definition.
fn naive(g: &Gemm, a: &[f32], b: &[f32], c: &[f32]) -> Vec<f64> {
    let mut out: Vec<f64> = c.iter().map(|&c| c as f64).collect();
    let batches: usize = g.batch.iter().product();
    for index in 0..batches {
        let (mut rest, mut at) = (index, [0; 3]);
        for dim in (0..g.batch.len()).rev() {
            let position = rest % g.batch[dim];
            rest /= g.batch[dim];
            at[0] += position * g.a_batch[dim];
            at[1] += position * g.b_batch[dim];
            at[2] += position * g.c_batch[dim];
        }
        for row in 0..g.m {
            for col in 0..g.n {
                let mut sum = 0.0;
                for k in 0..g.k {
                    let left = a[at[0] + row * g.a_strides.0 + k * g.a_strides.1] as f64;
                    sum += left * b[at[1] + k * g.b_strides.0 + col * g.b_strides.1] as f64;
                }
                let old = if g.accumulate { out[at[2] + row * g.c_row_stride + col] } else { 0.0 };
                let bias = g.bias.map_or(0.0, |bias| bias[col] as f64);
                out[at[2] + row * g.c_row_stride + col] = old + g.alpha as f64 * sum + bias;
            }
        }
    }
    out
}

fn check(what: &str, g: &Gemm, a: &[f32], b: &[f32], c: &[f32]) {
    // Large products take long in the reference.
    let large = g.m * g.n * g.k > 4_000_000;
    for &kinds in if large { &KINDS[..2] } else { &KINDS[..] } {
        check_kinds(what, kinds, g, a, b, c);
    }
}

fn check_kinds(what: &str, kinds: (Kind, Kind, Kind), g: &Gemm, a: &[f32], b: &[f32], c: &[f32]) {
    let product = operands(kinds.0, kinds.1);
    let expected = naive(g, &product.all(a), &product.all(b), &kinds.2.all(c));
    let (a, b) = (Tensor::new(kinds.0, a), Tensor::new(kinds.1, b));
    for (isa, got) in on_every_pool(|pool| {
        let mut out = Tensor::new(kinds.2, c);
        gemm(pool, g, a.get(), b.get(), out.get_mut());
        out.values()
    }) {
        let scale = (g.k as f64).sqrt() * 4.0 + 2.0;
        assert_close_as(kinds.2, &format!("{what} {isa:?} {kinds:?} {g:?}"), &got, &expected, scale);
    }
}

#[test]
fn contiguous_of_many_sizes() {
    let mut random = Random::new(1);
    let sizes = [1, 2, 3, 5, 7, 11, 12, 13, 16, 17, 23, 31, 32, 33, 47, 64, 97, 100, 129];
    for _ in 0..150 {
        let (m, n, k) = (random.pick(&sizes), random.pick(&sizes), random.pick(&sizes));
        let (a, b, c) = (random.values(m * k), random.values(k * n), random.values(m * n));
        let bias = random.values(n);
        let g = Gemm {
            accumulate: random.below(2) == 0,
            bias: (random.below(2) == 0).then_some(&bias[..]),
            alpha: random.pick(&[1.0, 0.125, -2.0]),
            ..Gemm::contiguous(m, n, k)
        };
        check("contiguous", &g, &a, &b, &c);
    }
}

#[test]
fn transposed_and_padded_operands() {
    let mut random = Random::new(2);
    for _ in 0..120 {
        let (m, n, k) = (1 + random.below(70), 1 + random.below(90), 1 + random.below(80));
        // Row-major, column-major, or with gaps in both directions.
        let mut strides = |rows: usize, cols: usize| match random.below(3) {
            0 => (cols + random.below(3), 1),
            1 => (1, rows + random.below(3)),
            _ => (2, 2 * rows + 1),
        };
        let (a_strides, b_strides) = (strides(m, k), strides(k, n));
        let reach = |rows: usize, cols: usize, s: (usize, usize)| (rows - 1) * s.0 + (cols - 1) * s.1 + 1;
        let c_row_stride = n + random.below(4);
        let a = random.values(reach(m, k, a_strides));
        let b = random.values(reach(k, n, b_strides));
        let c = random.values(reach(m, n, (c_row_stride, 1)));
        let accumulate = random.below(2) == 0;
        let g = Gemm { a_strides, b_strides, c_row_stride, accumulate, ..Gemm::contiguous(m, n, k) };
        check("strided", &g, &a, &b, &c);
    }
}

#[test]
fn batches_with_broadcasts() {
    let mut random = Random::new(3);
    for _ in 0..100 {
        let (m, n, k) = (1 + random.below(40), 1 + random.below(40), 1 + random.below(70));
        let dims = random.below(4);
        let batch: Vec<usize> = (0..dims).map(|_| 1 + random.below(4)).collect();
        let mut strides = |size: usize, broadcast: bool| {
            let mut next = size;
            let mut out = vec![0; dims];
            for dim in (0..dims).rev() {
                if broadcast && random.below(3) == 0 {
                    continue;
                }
                out[dim] = next;
                next *= batch[dim];
            }
            (out, next)
        };
        let (a_batch, a_len) = strides(m * k, true);
        let (b_batch, b_len) = strides(k * n, true);
        let (c_batch, c_len) = strides(m * n, false);
        let (a, b, c) = (random.values(a_len), random.values(b_len), random.values(c_len));
        let g = Gemm {
            batch: &batch,
            a_batch: &a_batch,
            b_batch: &b_batch,
            c_batch: &c_batch,
            accumulate: random.below(2) == 0,
            ..Gemm::contiguous(m, n, k)
        };
        check("batched", &g, &a, &b, &c);
    }
}

#[test]
fn several_blocks_of_every_dimension() {
    let mut random = Random::new(4);
    for (m, n, k) in [(150, 401, 390), (97, 33, 1153), (203, 800, 385), (5, 1000, 769), (500, 3, 800)] {
        let (a, b, c) = (random.values(m * k), random.values(k * n), random.values(m * n));
        let bias = random.values(n);
        for accumulate in [false, true] {
            let g = Gemm { accumulate, bias: Some(&bias), alpha: 0.5, ..Gemm::contiguous(m, n, k) };
            check("blocks", &g, &a, &b, &c);
        }
    }
}

#[test]
fn a_long_depth_is_split_the_same_way_for_all_threads() {
    let mut random = Random::new(5);
    for (m, n, k) in [(13, 37, 20_011), (1, 1, 9_000), (64, 30, 5_000)] {
        let (a, b, c) = (random.values(m * k), random.values(k * n), random.values(m * n));
        let bias = random.values(n);
        for accumulate in [false, true] {
            // The weight gradient of a linear layer: A is transposed.
            let g = Gemm {
                accumulate,
                a_strides: (1, m),
                bias: accumulate.then_some(&bias[..]),
                ..Gemm::contiguous(m, n, k)
            };
            check("split", &g, &a, &b, &c);
        }
    }
}

#[test]
fn an_operand_that_is_too_large_to_pack_at_once() {
    let mut random = Random::new(6);
    let (m, n, k) = (100, 1300, 4_000);
    let (a, b, c) = (random.values(m * k), random.values(k * n), random.values(m * n));
    check("large", &Gemm::contiguous(m, n, k), &a, &b, &c);
}

#[test]
fn empty_products() {
    let c = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let bias = [10.0, 20.0, 30.0];
    check("empty", &Gemm::contiguous(2, 3, 0), &[], &[], &c);
    check("empty", &Gemm { accumulate: true, bias: Some(&bias), ..Gemm::contiguous(2, 3, 0) }, &[], &[], &c);
    check("empty", &Gemm::contiguous(0, 3, 5), &[], &[0.0; 15], &c);
    let g = Gemm { batch: &[0], a_batch: &[0], b_batch: &[0], c_batch: &[6], ..Gemm::contiguous(2, 3, 1) };
    check("empty", &g, &[1.0; 2], &[1.0; 3], &c);
}

#[test]
fn broken_invariants_are_told() {
    let fails = |g: &Gemm, a: usize, b: usize, c: usize, expected: &str| {
        let result = std::panic::catch_unwind(|| {
            let pool = clip_host_cpu_kernels::ThreadPool::new(1);
            let (a, b, mut c) = (vec![0.0; a], vec![0.0; b], vec![0.0; c]);
            gemm(&pool, g, Elements::F32(&a), Elements::F32(&b), ElementsMut::F32(&mut c));
        });
        let payload = result.expect_err(expected);
        let text = payload.downcast_ref::<String>().unwrap();
        assert!(text.contains(expected), "{text}");
    };
    let g = Gemm::contiguous(2, 3, 4);
    fails(&g, 7, 12, 6, "A has 7 elements, its strides reach 8");
    fails(&g, 8, 11, 6, "B has 11 elements, its strides reach 12");
    fails(&g, 8, 12, 5, "C has 5 elements, its strides reach 6");
    fails(&Gemm { c_row_stride: 2, ..g }, 8, 12, 6, "elements of C overlap");
    fails(&Gemm { bias: Some(&[0.0]), ..g }, 8, 12, 6, "1 biases for 3 columns");
    fails(&Gemm { batch: &[2], ..g }, 8, 12, 6, "1 batch dimensions");
    let zero = Gemm { batch: &[2], a_batch: &[0], b_batch: &[0], c_batch: &[0], ..g };
    fails(&zero, 8, 12, 6, "elements of C overlap");
}
