//! Moments of columns against two passes in double precision.

mod common;

use clip_host_cpu_kernels::{ConvShape, Elements, column_moments, conv2d_forward};
use common::{Kind, Random, Tensor, exact_moments, on_every_pool};

/// Compares: means to within rounding of the values and their sum, variances to within `bound` of themselves and the
/// square of the mean's rounding.
fn assert_moments(what: &str, got: &[f32], values: &[f32], cols: usize, bound: f64) {
    let (means, variances) = exact_moments(values, cols);
    for col in 0..cols {
        let (mean, variance) = (got[col] as f64, got[cols + col] as f64);
        let (error, allowed) = ((mean - means[col]).abs(), 1e-7 * means[col].abs() + 1e-6 * variances[col].sqrt());
        assert!(error <= allowed, "{what}: mean {col} is {mean}, expected {}, error {error:e}", means[col]);
        let (error, allowed) = ((variance - variances[col]).abs(), bound * variances[col] + (1e-7 * mean).powi(2));
        assert!(error <= allowed, "{what}: variance {col} is {variance}, expected {}, error {error:e}", variances[col]);
    }
}

#[test]
fn a_mean_far_above_the_deviation() {
    let mut random = Random::new(1);
    for (rows, cols) in [(1, 3), (2, 1), (255, 40), (256, 64), (257, 65), (3000, 130), (20_000, 7)] {
        for (mean, deviation) in [(0.0, 1.0), (1000.0, 1.0), (-3e4, 0.5), (1.0, 1e-3)] {
            let values: Vec<f32> = random.values(rows * cols).iter().map(|v| mean + deviation * v).collect();
            for kind in [Kind::F32, Kind::Bf16] {
                let x = Tensor::new(kind, &values);
                for (isa, got) in on_every_pool(|pool| {
                    let mut out = vec![9.0; 2 * cols];
                    column_moments(pool, x.get(), rows, cols, &mut out);
                    out
                }) {
                    let what = format!("{rows} x {cols}, {mean} +- {deviation}, {kind:?}, {isa:?}");
                    assert_moments(&what, &got, &kind.all(&values), cols, 1e-5);
                }
            }
        }
    }
}

#[test]
fn constant_columns_have_no_variance() {
    for (isa, got) in on_every_pool(|pool| {
        let mut out = vec![9.0; 6];
        column_moments(pool, Elements::F32(&[1.1, -2e20, 0.0].repeat(1000)), 1000, 3, &mut out);
        out
    }) {
        assert_eq!(got, [1.1, -2e20, 0.0, 0.0, 0.0, 0.0], "{isa:?}");
    }
}

#[test]
fn no_rows() {
    for (isa, got) in on_every_pool(|pool| {
        let mut out = vec![9.0; 6];
        column_moments(pool, Elements::F32(&[]), 0, 3, &mut out);
        out
    }) {
        assert_eq!(got, [0.0; 6], "{isa:?}");
    }
}

#[test]
fn moments_of_convolutions() {
    let mut random = Random::new(2);
    for (size, in_c, out_c, kernel) in [(9, 5, 33, 3), (40, 16, 64, 1), (12, 300, 20, 3), (120, 3, 16, 1)] {
        let shape = ConvShape {
            batch: 2,
            in_h: size,
            in_w: size,
            in_c,
            out_h: size,
            out_w: size,
            out_c,
            kernel: (kernel, kernel),
            stride: (1, 1),
            padding: (kernel / 2, kernel / 2),
            dilation: (1, 1),
            groups: 1,
        };
        // A bias makes the mean large against the deviation.
        let bias: Vec<f32> = (0..out_c).map(|channel| 300.0 * channel as f32).collect();
        let (input, weight) = (random.values(shape.input_len()), random.values(shape.weight_len()));
        for kind in [Kind::F32, Kind::Bf16] {
            let (x, w) = (Tensor::new(kind, &input), Tensor::new(kind, &weight));
            for (isa, got) in on_every_pool(|pool| {
                let mut out = Tensor::new(kind, &vec![0.0; shape.output_len()]);
                let mut moments = vec![9.0; 2 * out_c];
                conv2d_forward(pool, &shape, x.get(), w.get(), Some(&bias), out.get_mut(), false, Some(&mut moments));
                let mut out = out.values();
                out.extend(moments);
                out
            }) {
                let (out, moments) = got.split_at(shape.output_len());
                assert_moments(&format!("{kind:?} {isa:?} {shape:?}"), moments, out, out_c, 1e-5);
            }
        }
    }
}
