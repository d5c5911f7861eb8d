//! Row gather and scatter, and strided copies, against naive loops.

mod common;

use clip_host_cpu_kernels::{
    Elements, ElementsMut, RowError, ThreadPool, bf16, copy_strided, fill, gather_rows, scatter_add_rows, scatter_rows,
};
use common::{Kind, Random, Tensor, assert_close, on_every_pool};

#[test]
fn gather_and_scatter() {
    let mut random = Random::new(1);
    for (rows, width, count) in [(1, 1, 1), (7, 3, 40), (100, 33, 1000), (5, 300, 129), (30, 64, 0), (500, 768, 65)] {
        let table = random.values(rows * width);
        let ids: Vec<i32> = (0..count).map(|_| random.below(rows) as i32).collect();
        let updates = random.values(count * width);
        let mut gathered = Vec::new();
        let mut added: Vec<f64> = table.iter().map(|&value| value as f64).collect();
        let mut assigned = added.clone();
        for (row, &id) in ids.iter().enumerate() {
            for col in 0..width {
                let (at, value) = (id as usize * width + col, updates[row * width + col] as f64);
                gathered.push(table[at] as f64);
                added[at] += value;
                assigned[at] = value;
            }
        }
        for (isa, got) in on_every_pool(|pool| {
            let mut out = vec![9.0; count * width];
            gather_rows(pool, Elements::F32(&table), width, &ids, &mut out).unwrap();
            out
        }) {
            assert_close(&format!("gather {isa:?}"), &got, &gathered, 0.0);
        }
        let halves: Vec<bf16> = table.iter().map(|&value| bf16::from_f32(value)).collect();
        let rounded: Vec<f64> = gathered.iter().map(|&value| bf16::from_f32(value as f32).to_f64()).collect();
        for (isa, got) in on_every_pool(|pool| {
            let mut out = vec![9.0; count * width];
            gather_rows(pool, Elements::Bf16(&halves), width, &ids, &mut out).unwrap();
            out
        }) {
            assert_close(&format!("gather of bf16 {isa:?}"), &got, &rounded, 0.0);
        }
        for (isa, got) in on_every_pool(|pool| {
            let mut out = table.clone();
            scatter_add_rows(pool, &updates, width, &ids, &mut out).unwrap();
            out
        }) {
            assert_close(&format!("scatter add {isa:?}"), &got, &added, 50.0);
        }
        for (isa, got) in on_every_pool(|pool| {
            let mut out = table.clone();
            scatter_rows(pool, &updates, width, &ids, &mut out).unwrap();
            out
        }) {
            assert_close(&format!("scatter {isa:?}"), &got, &assigned, 0.0);
        }
    }
}

#[test]
fn ids_outside_the_table_are_errors() {
    let pool = ThreadPool::new(2);
    let mut table = vec![1.0; 6];
    let error = gather_rows(&pool, Elements::F32(&table), 2, &[0, 3], &mut [0.0; 4]).unwrap_err();
    assert_eq!(error, RowError { operation: "gather", position: 1, id: 3, rows: 3 });
    assert!(error.to_string().contains("id 3 at position 1"), "{error}");
    assert!(error.to_string().contains("hint:"), "{error}");
    let error = scatter_add_rows(&pool, &[5.0; 4], 2, &[-1, 0], &mut table).unwrap_err();
    assert_eq!(error, RowError { operation: "scatter_add", position: 0, id: -1, rows: 3 });
    let error = scatter_rows(&pool, &[5.0; 4], 2, &[1, i32::MAX], &mut table).unwrap_err();
    assert_eq!(error, RowError { operation: "scatter", position: 1, id: i32::MAX, rows: 3 });
    assert_eq!(table, [1.0; 6]);
}

/// Copies by the definition.
fn naive(shape: &[usize], strides: &[usize], input: &[f32]) -> Vec<f64> {
    let total: usize = shape.iter().product();
    (0..total)
        .map(|mut index| {
            let mut at = 0;
            for (len, stride) in shape.iter().zip(strides).rev() {
                at += index % len * stride;
                index /= len;
            }
            input[at] as f64
        })
        .collect()
}

fn check_copy(shape: &[usize], strides: &[usize], input: &[f32]) {
    for (from, to) in
        [(Kind::F32, Kind::F32), (Kind::F32, Kind::Bf16), (Kind::Bf16, Kind::F32), (Kind::Bf16, Kind::Bf16)]
    {
        let expected = naive(shape, strides, &to.all(&from.all(input)));
        let source = Tensor::new(from, input);
        for (isa, got) in on_every_pool(|pool| {
            let mut out = Tensor::new(to, &vec![9.0; expected.len()]);
            copy_strided(pool, shape, strides, source.get(), out.get_mut());
            out.values()
        }) {
            assert_close(&format!("copy {isa:?} {from:?} to {to:?} {shape:?} {strides:?}"), &got, &expected, 0.0);
        }
    }
}

#[test]
fn fills() {
    for (isa, got) in on_every_pool(|pool| {
        let mut out = vec![9.0; 600_001];
        fill(pool, &mut out[..600_000], 2.5);
        fill(pool, &mut [], 1.0);
        out
    }) {
        assert!(got[..600_000].iter().all(|&value| value == 2.5) && got[600_000] == 9.0, "{isa:?}");
    }
}

#[test]
fn copies_of_permuted_arrays() {
    let mut random = Random::new(2);
    for _ in 0..80 {
        let dims = random.below(7);
        let sizes: Vec<usize> = (0..dims).map(|_| random.pick(&[1, 2, 3, 5, 8, 17])).collect();
        if sizes.iter().product::<usize>() > 30_000 {
            continue;
        }
        let mut strides = vec![1; dims];
        for dim in (1..dims).rev() {
            strides[dim - 1] = strides[dim] * sizes[dim];
        }
        let input = random.values(sizes.iter().product());
        let mut order: Vec<usize> = (0..dims).collect();
        for at in (1..dims).rev() {
            order.swap(at, random.below(at + 1));
        }
        let shape: Vec<usize> = order.iter().map(|&dim| sizes[dim]).collect();
        let mut permuted: Vec<usize> = order.iter().map(|&dim| strides[dim]).collect();
        check_copy(&shape, &permuted, &input);
        if dims > 0 {
            // A broadcast dimension in place of one of them.
            permuted[random.below(dims)] = 0;
            check_copy(&shape, &permuted, &input);
        }
    }
}

#[test]
fn copies_of_large_arrays() {
    let mut random = Random::new(3);
    let input = random.values(130 * 300 * 5);
    check_copy(&[130, 300], &[1, 130], &input);
    check_copy(&[5, 300, 130], &[39_000, 1, 300], &input);
    check_copy(&[300, 5, 130], &[1, 39_000, 300], &input);
    check_copy(&[195_000], &[1], &input);
    check_copy(&[97_500], &[2], &input);
    check_copy(&[3, 40_000], &[0, 1], &input);
    check_copy(&[], &[], &input);
    check_copy(&[3, 0], &[1, 1], &input);
}

#[test]
fn a_copy_that_reaches_too_far_is_told() {
    let result = std::panic::catch_unwind(|| {
        let (from, mut to) = ([0.0; 5], [0.0; 6]);
        copy_strided(&ThreadPool::new(1), &[2, 3], &[1, 2], Elements::F32(&from), ElementsMut::F32(&mut to));
    });
    let payload = result.expect_err("out of bounds");
    let text = payload.downcast_ref::<String>().unwrap();
    assert!(text.contains("the input has 5 elements, its strides reach 6"), "{text}");
}
