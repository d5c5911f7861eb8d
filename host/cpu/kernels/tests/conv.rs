//! Convolution and its gradients against naive loops in double precision.

mod common;

use clip_host_cpu_kernels::{
    ConvShape, Elements, ElementsMut, Isa, conv2d_forward, conv2d_input_grad, conv2d_weight_grad,
};
use common::{KINDS, Kind, Random, Tensor, assert_close, assert_close_as, exact_moments, on_every_pool, operands};

/// Calls `visit(input, weight, output)` with the offsets of each product of the definition.
fn products(s: &ConvShape, mut visit: impl FnMut(usize, usize, usize)) {
    let (group_in, group_out) = (s.in_c / s.groups, s.out_c / s.groups);
    for pixel in 0..s.batch * s.out_h * s.out_w {
        let (image, y, x) = (pixel / s.out_w / s.out_h, pixel / s.out_w % s.out_h, pixel % s.out_w);
        for o in 0..s.out_c {
            for (ky, kx) in (0..s.kernel.0).flat_map(|ky| (0..s.kernel.1).map(move |kx| (ky, kx))) {
                let iy = (y * s.stride.0 + ky * s.dilation.0).wrapping_sub(s.padding.0);
                let ix = (x * s.stride.1 + kx * s.dilation.1).wrapping_sub(s.padding.1);
                if iy >= s.in_h || ix >= s.in_w {
                    continue;
                }
                for i in 0..group_in {
                    let input = ((image * s.in_h + iy) * s.in_w + ix) * s.in_c + o / group_out * group_in + i;
                    let weight = ((o * group_in + i) * s.kernel.0 + ky) * s.kernel.1 + kx;
                    visit(input, weight, pixel * s.out_c + o);
                }
            }
        }
    }
}

fn shape(batch: usize, size: (usize, usize), channels: (usize, usize), kernel: (usize, usize)) -> ConvShape {
    ConvShape {
        batch,
        in_h: size.0,
        in_w: size.1,
        in_c: channels.0,
        out_h: 0,
        out_w: 0,
        out_c: channels.1,
        kernel,
        stride: (1, 1),
        padding: (kernel.0 / 2, kernel.1 / 2),
        dilation: (1, 1),
        groups: 1,
    }
}

/// Fills in the output size, and runs all three directions with and without accumulation.
fn check(random: &mut Random, mut s: ConvShape) {
    s.out_h = ConvShape::output_size(s.in_h, s.kernel.0, s.stride.0, s.padding.0, s.dilation.0);
    s.out_w = ConvShape::output_size(s.in_w, s.kernel.1, s.stride.1, s.padding.1, s.dilation.1);
    let (input, weight, output) =
        (random.values(s.input_len()), random.values(s.weight_len()), random.values(s.output_len()));
    let bias = random.values(s.out_c);
    for (accumulate, kinds) in [false, true].into_iter().flat_map(|a| KINDS.map(|kinds| (a, kinds))) {
        check_kinds(&s, kinds, accumulate, &input, &weight, &output, &bias);
    }
}

/// The operands are of the first two types, the result of the last one.
fn check_kinds(
    s: &ConvShape,
    kinds: (Kind, Kind, Kind),
    accumulate: bool,
    input: &[f32],
    weight: &[f32],
    output: &[f32],
    bias: &[f32],
) {
    let what = |direction: &str, isa: Isa| format!("{direction} {isa:?} {kinds:?} {s:?}");
    let start = |kind: Kind, old: &[f32]| -> Vec<f64> {
        old.iter().map(|&old| if accumulate { kind.stored(old) as f64 } else { 0.0 }).collect()
    };
    let mut expected = (start(kinds.2, output), start(kinds.2, input), start(Kind::F32, weight));
    let product = operands(kinds.0, kinds.1);
    let (x, w, y) = (product.all(input), product.all(weight), product.all(output));
    products(s, |i, o_w, o| {
        expected.0[o] += x[i] as f64 * w[o_w] as f64;
        expected.1[i] += y[o] as f64 * w[o_w] as f64;
        expected.2[o_w] += y[o] as f64 * x[i] as f64;
    });
    let bias = accumulate.then_some(bias);
    if let Some(bias) = bias {
        expected.0.iter_mut().enumerate().for_each(|(at, out)| *out += bias[at % s.out_c] as f64);
    }
    let scale = |terms: usize| 3.0 + 4.0 * (terms as f64).sqrt();
    let (x, w) = (Tensor::new(kinds.0, input), Tensor::new(kinds.1, weight));
    for (isa, got) in on_every_pool(|pool| {
        let mut out = Tensor::new(kinds.2, output);
        let mut moments = vec![9.0; 2 * s.out_c];
        conv2d_forward(pool, s, x.get(), w.get(), bias, out.get_mut(), accumulate, Some(&mut moments));
        let mut out = out.values();
        let plain = {
            let mut out = Tensor::new(kinds.2, output);
            conv2d_forward(pool, s, x.get(), w.get(), bias, out.get_mut(), accumulate, None);
            out.values()
        };
        let terms = s.in_c / s.groups * s.kernel.0 * s.kernel.1;
        let plain: Vec<f64> = plain.iter().map(|&value| value as f64).collect();
        assert_close_as(kinds.2, &what("forward with moments", pool.isa()), &out, &plain, scale(terms));
        out.extend(moments);
        out
    }) {
        let terms = s.in_c / s.groups * s.kernel.0 * s.kernel.1;
        let (got, moments) = got.split_at(s.output_len());
        assert_close_as(kinds.2, &what("forward", isa), got, &expected.0, scale(terms));
        let (means, variances) = exact_moments(got, s.out_c);
        let largest = variances.iter().fold(0.0f64, |a, &b| a.max(b));
        // What is summed are differences from a first value: of the size of the deviation.
        assert_close(&what("means", isa), &moments[..s.out_c], &means, largest.sqrt().max(1.0));
        assert_close(&what("variances", isa), &moments[s.out_c..], &variances, 3.0 * largest);
    }
    let (y, w) = (Tensor::new(kinds.0, output), Tensor::new(kinds.1, weight));
    for (isa, got) in on_every_pool(|pool| {
        let mut out = Tensor::new(kinds.2, input);
        conv2d_input_grad(pool, s, y.get(), w.get(), out.get_mut(), accumulate);
        out.values()
    }) {
        let terms = s.out_c / s.groups * s.kernel.0 * s.kernel.1;
        assert_close_as(kinds.2, &what("input grad", isa), &got, &expected.1, scale(terms));
    }
    if kinds.2 == Kind::Bf16 {
        return;
    }
    let (x, y) = (Tensor::new(kinds.0, input), Tensor::new(kinds.1, output));
    for (isa, got) in on_every_pool(|pool| {
        let mut out = weight.to_vec();
        conv2d_weight_grad(pool, s, x.get(), y.get(), &mut out, accumulate);
        out
    }) {
        let terms = s.batch * s.out_h * s.out_w;
        assert_close(&what("weight grad", isa), &got, &expected.2, scale(terms));
    }
}

#[test]
fn the_shapes_of_resnet() {
    let mut random = Random::new(1);
    let stem = ConvShape { stride: (2, 2), ..shape(2, (23, 30), (3, 20), (7, 7)) };
    check(&mut random, stem);
    check(&mut random, shape(2, (9, 9), (37, 33), (1, 1)));
    check(&mut random, shape(2, (9, 10), (16, 18), (3, 3)));
    check(&mut random, ConvShape { stride: (2, 2), ..shape(2, (9, 10), (16, 18), (3, 3)) });
    check(&mut random, ConvShape { stride: (2, 2), ..shape(3, (8, 7), (20, 40), (1, 1)) });
    check(&mut random, shape(1, (4, 4), (130, 70), (3, 3)));
}

#[test]
fn patch_embedding() {
    let mut random = Random::new(2);
    let s = ConvShape { stride: (4, 4), padding: (0, 0), ..shape(3, (16, 12), (3, 50), (4, 4)) };
    check(&mut random, s);
}

#[test]
fn random_shapes() {
    let mut random = Random::new(3);
    let mut done = 0;
    while done < 60 {
        let groups = random.pick(&[1, 1, 1, 2, 3]);
        let mut pair = |values: &[usize]| (random.pick(values), random.pick(values));
        let (size, kernel) = (pair(&[1, 2, 3, 5, 6, 7, 8, 11, 13]), pair(&[1, 2, 3, 4, 5]));
        let (stride, dilation) = (pair(&[1, 1, 2, 3]), pair(&[1, 1, 2, 3]));
        let (padding, channels) = (pair(&[0, 1, 2]), pair(&[1, 2, 3, 5, 17]));
        let s = ConvShape {
            stride,
            padding,
            dilation,
            groups,
            ..shape(1 + random.below(3), size, (channels.0 * groups, channels.1 * groups), kernel)
        };
        let fits =
            |size: usize, padding: usize, kernel: usize, dilation: usize| size + 2 * padding > dilation * (kernel - 1);
        if fits(size.0, padding.0, kernel.0, dilation.0) && fits(size.1, padding.1, kernel.1, dilation.1) {
            check(&mut random, s);
            done += 1;
        }
    }
}

#[test]
fn depthwise() {
    let mut random = Random::new(4);
    for (channels, kernel, stride, dilation) in
        [(5, 3, 1, 1), (32, 7, 1, 1), (17, 3, 2, 1), (40, 3, 1, 2), (2, 5, 3, 2)]
    {
        let s = ConvShape {
            groups: channels,
            stride: (stride, stride),
            dilation: (dilation, dilation),
            padding: (kernel / 2 * dilation, kernel / 2),
            ..shape(2, (11, 12), (channels, channels), (kernel, kernel))
        };
        check(&mut random, s);
    }
}

#[test]
fn broken_invariants_are_told() {
    let mut s = shape(1, (4, 4), (2, 2), (3, 3));
    (s.out_h, s.out_w) = (4, 4);
    let fails = |s: ConvShape, input: usize, expected: &str| {
        let result = std::panic::catch_unwind(|| {
            let pool = clip_host_cpu_kernels::ThreadPool::new(1);
            let (input, mut output) = (vec![0.0; input], [0.0; 32]);
            let (x, w) = (Elements::F32(&input), Elements::F32(&[0.0; 36]));
            conv2d_forward(&pool, &s, x, w, None, ElementsMut::F32(&mut output), false, None);
        });
        let payload = result.expect_err(expected);
        let text = payload.downcast_ref::<String>().unwrap();
        assert!(text.contains(expected), "{text}");
    };
    fails(s, 31, "the input has 31 elements, expected 32");
    fails(ConvShape { out_h: 3, ..s }, 32, "output size 3 along axis 0, expected 4");
    fails(ConvShape { groups: 3, ..s }, 32, "2 and 2 channels in 3 groups");
    fails(ConvShape { stride: (0, 1), ..s }, 32, "must be positive");
}
