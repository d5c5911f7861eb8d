//! Pooling and its gradients against naive loops.

mod common;

use clip_host_cpu_kernels::{
    Elements, ElementsMut, Pool2dShape, ThreadPool, avg_pool2d_backward, avg_pool2d_forward, max_pool2d_backward,
    max_pool2d_forward,
};
use common::{Kind, Random, Tensor, assert_close, on_every_pool};

/// Offsets of the inputs of each window, and the divisor when padding counts.
fn windows(s: &Pool2dShape) -> Vec<(Vec<usize>, f64)> {
    let mut out = Vec::new();
    for index in 0..s.output_len() {
        let (c, pixel) = (index % s.channels, index / s.channels);
        let (image, y, x) = (pixel / s.out_w / s.out_h, pixel / s.out_w % s.out_h, pixel % s.out_w);
        let mut inside = Vec::new();
        for (ky, kx) in (0..s.kernel.0).flat_map(|ky| (0..s.kernel.1).map(move |kx| (ky, kx))) {
            let iy = (y * s.stride.0 + ky).wrapping_sub(s.padding.0);
            let ix = (x * s.stride.1 + kx).wrapping_sub(s.padding.1);
            if iy < s.in_h && ix < s.in_w {
                inside.push(((image * s.in_h + iy) * s.in_w + ix) * s.channels + c);
            }
        }
        out.push((inside, (s.kernel.0 * s.kernel.1) as f64));
    }
    out
}

fn shapes(random: &mut Random) -> Vec<Pool2dShape> {
    let mut shapes = Vec::new();
    while shapes.len() < 60 {
        let kernel = (1 + random.below(4), 1 + random.below(4));
        let mut s = Pool2dShape {
            batch: 1 + random.below(3),
            in_h: 1 + random.below(19),
            in_w: 1 + random.below(12),
            out_h: 0,
            out_w: 0,
            channels: random.pick(&[1, 3, 16, 37]),
            kernel,
            stride: (1 + random.below(3), 1 + random.below(3)),
            padding: (random.below(kernel.0 / 2 + 1), random.below(kernel.1 / 2 + 1)),
        };
        s.out_h = Pool2dShape::output_size(s.in_h, s.kernel.0, s.stride.0, s.padding.0);
        s.out_w = Pool2dShape::output_size(s.in_w, s.kernel.1, s.stride.1, s.padding.1);
        if s.out_h > 0 && s.out_w > 0 {
            shapes.push(s);
        }
    }
    shapes
}

#[test]
fn max_pool() {
    let mut random = Random::new(1);
    for s in shapes(&mut random) {
        // Few distinct values, so that windows have several maxima.
        let input: Vec<f32> = (0..s.input_len()).map(|_| random.below(4) as f32 - 2.0).collect();
        let incoming = random.values(s.output_len());
        let mut expected = (vec![0.0; s.output_len()], vec![0.0; s.input_len()]);
        for (at, (inside, _)) in windows(&s).into_iter().enumerate() {
            let mut best = inside[0];
            for place in inside {
                if input[place] > input[best] {
                    best = place;
                }
            }
            expected.0[at] = input[best] as f64;
            expected.1[best] += incoming[at] as f64;
        }
        for (isa, got) in on_every_pool(|pool| {
            let mut out = vec![7.0; s.output_len()];
            max_pool2d_forward(pool, &s, Elements::F32(&input), ElementsMut::F32(&mut out));
            out
        }) {
            assert_close(&format!("max pool {isa:?} {s:?}"), &got, &expected.0, 0.0);
        }
        for (isa, got) in on_every_pool(|pool| {
            let mut out = vec![7.0; s.input_len()];
            let (x, grad) = (Elements::F32(&input), Elements::F32(&incoming));
            max_pool2d_backward(pool, &s, x, grad, ElementsMut::F32(&mut out));
            out
        }) {
            assert_close(&format!("max pool grad {isa:?} {s:?}"), &got, &expected.1, 1.0);
        }
    }
}

#[test]
fn average_pool() {
    let mut random = Random::new(2);
    for s in shapes(&mut random) {
        let (input, incoming) = (random.values(s.input_len()), random.values(s.output_len()));
        for count_include_pad in [false, true] {
            let mut expected = (vec![0.0; s.output_len()], vec![0.0; s.input_len()]);
            for (at, (inside, size)) in windows(&s).into_iter().enumerate() {
                let divisor = if count_include_pad { size } else { inside.len() as f64 };
                for place in inside {
                    expected.0[at] += input[place] as f64 / divisor;
                    expected.1[place] += incoming[at] as f64 / divisor;
                }
            }
            for (isa, got) in on_every_pool(|pool| {
                let mut out = vec![7.0; s.output_len()];
                avg_pool2d_forward(pool, &s, Elements::F32(&input), ElementsMut::F32(&mut out), count_include_pad);
                out
            }) {
                assert_close(&format!("average pool {isa:?} {s:?}"), &got, &expected.0, 1.0);
            }
            for (isa, got) in on_every_pool(|pool| {
                let mut out = vec![7.0; s.input_len()];
                avg_pool2d_backward(pool, &s, Elements::F32(&incoming), ElementsMut::F32(&mut out), count_include_pad);
                out
            }) {
                assert_close(&format!("average pool grad {isa:?} {s:?}"), &got, &expected.1, 1.0);
            }
        }
    }
}

#[test]
fn pools_of_bf16() {
    let mut random = Random::new(3);
    for s in shapes(&mut random).into_iter().take(20) {
        let (input, incoming) = (random.values(s.input_len()), random.values(s.output_len()));
        for (x_kind, g_kind, out_kind) in [
            (Kind::Bf16, Kind::Bf16, Kind::Bf16),
            (Kind::F32, Kind::Bf16, Kind::F32),
            (Kind::Bf16, Kind::F32, Kind::Bf16),
        ] {
            let (x, g) = (Tensor::new(x_kind, &input), Tensor::new(g_kind, &incoming));
            let (stored_x, stored_g) = (x_kind.all(&input), g_kind.all(&incoming));
            let single = ThreadPool::new(1);
            let run = |pool: &ThreadPool, x: &Tensor, g: &Tensor, kind: Kind| {
                let all = |len: usize| Tensor::new(kind, &vec![7.0; len]);
                let (mut maxima, mut averages) = (all(s.output_len()), all(s.output_len()));
                let (mut max_grad, mut average_grad) = (all(s.input_len()), all(s.input_len()));
                max_pool2d_forward(pool, &s, x.get(), maxima.get_mut());
                avg_pool2d_forward(pool, &s, x.get(), averages.get_mut(), true);
                max_pool2d_backward(pool, &s, x.get(), g.get(), max_grad.get_mut());
                avg_pool2d_backward(pool, &s, g.get(), average_grad.get_mut(), true);
                [maxima.values(), averages.values(), max_grad.values(), average_grad.values()].concat()
            };
            // In f32 the kernels are checked above: here the same values, rounded once at the end.
            let (wide_x, wide_g) = (Tensor::new(Kind::F32, &stored_x), Tensor::new(Kind::F32, &stored_g));
            let expected: Vec<f64> =
                out_kind.all(&run(&single, &wide_x, &wide_g, Kind::F32)).iter().map(|&value| value as f64).collect();
            for (isa, got) in on_every_pool(|pool| run(pool, &x, &g, out_kind)) {
                assert_close(&format!("{isa:?} {x_kind:?} {g_kind:?} {out_kind:?} {s:?}"), &got, &expected, 0.0);
            }
        }
    }
}

#[test]
fn nan_wins() {
    let s = Pool2dShape {
        batch: 1,
        in_h: 1,
        in_w: 3,
        out_h: 1,
        out_w: 1,
        channels: 1,
        kernel: (1, 3),
        stride: (1, 1),
        padding: (0, 0),
    };
    for (isa, got) in on_every_pool(|pool| {
        let mut out = vec![0.0; 1];
        max_pool2d_forward(pool, &s, Elements::F32(&[1.0, f32::NAN, 2.0]), ElementsMut::F32(&mut out));
        vec![if out[0].is_nan() { 1.0 } else { 0.0 }]
    }) {
        assert_eq!(got, [1.0], "{isa:?}");
    }
}

#[test]
fn broken_invariants_are_told() {
    let s = Pool2dShape {
        batch: 1,
        in_h: 4,
        in_w: 4,
        out_h: 2,
        out_w: 2,
        channels: 1,
        kernel: (2, 2),
        stride: (2, 2),
        padding: (0, 0),
    };
    for (s, expected) in [
        (Pool2dShape { out_h: 3, ..s }, "expected an output of (2, 2)"),
        (Pool2dShape { padding: (2, 0), ..s }, "padding at most half the kernel"),
        (Pool2dShape { channels: 2, ..s }, "expected (32, 8)"),
    ] {
        let result = std::panic::catch_unwind(|| {
            let pool = clip_host_cpu_kernels::ThreadPool::new(1);
            max_pool2d_forward(&pool, &s, Elements::F32(&[0.0; 16]), ElementsMut::F32(&mut [0.0; 4]));
        });
        let payload = result.expect_err(expected);
        let text = payload.downcast_ref::<String>().unwrap();
        assert!(text.contains(expected), "{text}");
    }
}
