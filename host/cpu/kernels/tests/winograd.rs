//! 3x3 convolutions that take Winograd's algorithms, against naive loops in double precision.

mod common;

use clip_host_cpu_kernels::{ConvShape, conv2d_forward, conv2d_input_grad, conv2d_weight_grad};
use common::{KINDS, Kind, Random, Tensor, assert_close, exact_moments, on_every_pool, operands};

/// Error allowed, as a share of the largest value.
const ERROR: f64 = 1e-5;

fn shape(batch: usize, size: (usize, usize), channels: (usize, usize), padding: (usize, usize)) -> ConvShape {
    ConvShape {
        batch,
        in_h: size.0,
        in_w: size.1,
        in_c: channels.0,
        out_h: size.0 + 2 * padding.0 - 2,
        out_w: size.1 + 2 * padding.1 - 2,
        out_c: channels.1,
        kernel: (3, 3),
        stride: (1, 1),
        padding,
        dilation: (1, 1),
        groups: 1,
    }
}

/// Calls `visit(input, weight, output)` with the offsets of each product of the definition.
fn products(s: &ConvShape, mut visit: impl FnMut(usize, usize, usize)) {
    for pixel in 0..s.batch * s.out_h * s.out_w {
        let (image, y, x) = (pixel / s.out_w / s.out_h, pixel / s.out_w % s.out_h, pixel % s.out_w);
        for (ky, kx) in (0..3).flat_map(|ky| (0..3).map(move |kx| (ky, kx))) {
            let (iy, ix) = ((y + ky).wrapping_sub(s.padding.0), (x + kx).wrapping_sub(s.padding.1));
            if iy < s.in_h && ix < s.in_w {
                let input = ((image * s.in_h + iy) * s.in_w + ix) * s.in_c;
                for (o, i) in (0..s.out_c).flat_map(|o| (0..s.in_c).map(move |i| (o, i))) {
                    visit(input + i, ((o * s.in_c + i) * 3 + ky) * 3 + kx, pixel * s.out_c + o);
                }
            }
        }
    }
}

/// Compares with exact values, within a share of the largest and what storing as `kind` rounds off.
fn assert_near(kind: Kind, what: &str, got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f64, |largest, value| largest.max(value.abs()));
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        let rounding = if kind == Kind::Bf16 { expected.abs() / 256.0 } else { 0.0 };
        let error = (*got as f64 - expected).abs();
        assert!(error <= ERROR * largest + rounding, "{what}: element {at} is {got}, expected {expected}: {error:e}");
    }
}

/// All directions, with and without accumulation, for operands and a result of the given types.
fn check(random: &mut Random, s: &ConvShape, kinds: (Kind, Kind, Kind)) {
    let (input, weight) = (random.values(s.input_len()), random.values(s.weight_len()));
    let (output, bias) = (random.values(s.output_len()), random.values(s.out_c));
    let operand = operands(kinds.0, kinds.1);
    let (x, w, y) = (operand.all(&input), operand.all(&weight), operand.all(&output));
    let mut sums = (vec![0f64; s.output_len()], vec![0f64; s.input_len()], vec![0f64; s.weight_len()]);
    products(s, |i, o_w, o| {
        sums.0[o] += x[i] as f64 * w[o_w] as f64;
        sums.1[i] += y[o] as f64 * w[o_w] as f64;
        sums.2[o_w] += y[o] as f64 * x[i] as f64;
    });
    for accumulate in [false, true] {
        let what = format!("accumulate {accumulate} {kinds:?} {s:?}");
        let onto = |kind: Kind, sums: &[f64], old: &[f32]| -> Vec<f64> {
            let old = |at: usize| if accumulate { kind.stored(old[at]) as f64 } else { 0.0 };
            sums.iter().enumerate().map(|(at, sum)| sum + old(at)).collect()
        };
        let mut expected = onto(kinds.2, &sums.0, &output);
        let bias = accumulate.then_some(&bias[..]);
        if let Some(bias) = bias {
            expected.iter_mut().enumerate().for_each(|(at, out)| *out += bias[at % s.out_c] as f64);
        }
        let (x, w, y) = (Tensor::new(kinds.0, &input), Tensor::new(kinds.1, &weight), Tensor::new(kinds.0, &output));
        for (isa, got) in on_every_pool(|pool| {
            let (mut out, mut moments) = (Tensor::new(kinds.2, &output), vec![9.0; 2 * s.out_c]);
            conv2d_forward(pool, s, x.get(), w.get(), bias, out.get_mut(), accumulate, Some(&mut moments));
            let mut plain = Tensor::new(kinds.2, &output);
            conv2d_forward(pool, s, x.get(), w.get(), bias, plain.get_mut(), accumulate, None);
            let mut out = out.values();
            assert!(out == plain.values(), "{:?}: moments change the output, {what}", pool.isa());
            out.extend(moments);
            out
        }) {
            let (got, moments) = got.split_at(s.output_len());
            assert_near(kinds.2, &format!("forward {isa:?} {what}"), got, &expected);
            let (means, variances) = exact_moments(got, s.out_c);
            let largest = variances.iter().fold(0f64, |largest, &value| largest.max(value));
            assert_close(&format!("means {isa:?} {what}"), &moments[..s.out_c], &means, largest.sqrt().max(1.0));
            assert_close(&format!("variances {isa:?} {what}"), &moments[s.out_c..], &variances, largest);
        }
        let expected = onto(kinds.2, &sums.1, &input);
        for (isa, got) in on_every_pool(|pool| {
            let mut out = Tensor::new(kinds.2, &input);
            conv2d_input_grad(pool, s, y.get(), w.get(), out.get_mut(), accumulate);
            out.values()
        }) {
            assert_near(kinds.2, &format!("input grad {isa:?} {what}"), &got, &expected);
        }
        if kinds.2 == Kind::Bf16 {
            continue;
        }
        let (x, y) = (Tensor::new(kinds.0, &input), Tensor::new(kinds.1, &output));
        let expected = onto(Kind::F32, &sums.2, &weight);
        for (isa, got) in on_every_pool(|pool| {
            let mut out = weight.clone();
            conv2d_weight_grad(pool, s, x.get(), y.get(), &mut out, accumulate);
            out
        }) {
            assert_near(Kind::F32, &format!("weight grad {isa:?} {what}"), &got, &expected);
        }
    }
}

#[test]
fn four_by_four_tiles() {
    let mut random = Random::new(1);
    // Whole tiles, cut tiles, several panels of channels, channels that fill no vector, several blocks of tiles.
    for s in [
        shape(3, (8, 8), (32, 64), (1, 1)),
        shape(5, (7, 11), (17, 40), (1, 1)),
        shape(4, (10, 9), (70, 16), (0, 2)),
        shape(3, (13, 6), (19, 33), (2, 0)),
        shape(9, (28, 28), (24, 24), (1, 1)),
    ] {
        check(&mut random, &s, KINDS[0]);
    }
}

#[test]
fn two_by_two_tiles() {
    let mut random = Random::new(2);
    for s in [
        shape(24, (2, 2), (48, 40), (1, 1)),
        shape(7, (6, 5), (33, 24), (1, 1)),
        shape(12, (4, 3), (16, 70), (0, 1)),
        shape(30, (1, 2), (64, 32), (2, 1)),
    ] {
        check(&mut random, &s, KINDS[0]);
    }
}

#[test]
fn depths_beyond_one_block() {
    let mut random = Random::new(3);
    check(&mut random, &shape(9, (8, 8), (300, 40), (1, 1)), KINDS[0]);
    check(&mut random, &shape(9, (8, 8), (40, 300), (1, 1)), KINDS[0]);
}

#[test]
fn all_element_types() {
    let mut random = Random::new(4);
    for kinds in KINDS {
        check(&mut random, &shape(4, (9, 8), (20, 36), (1, 1)), kinds);
        check(&mut random, &shape(24, (2, 2), (36, 20), (1, 1)), kinds);
    }
}

#[test]
fn random_shapes() {
    let mut random = Random::new(5);
    for _ in 0..30 {
        let mut pair = |values: &[usize]| (random.pick(values), random.pick(values));
        let (size, channels) = (pair(&[3, 4, 5, 7, 9, 12, 14]), pair(&[16, 18, 25, 32, 47]));
        let padding = pair(&[0, 1, 1, 2]);
        let s = shape(4 + random.below(12), size, channels, padding);
        let kinds = random.pick(&KINDS);
        check(&mut random, &s, kinds);
    }
}
