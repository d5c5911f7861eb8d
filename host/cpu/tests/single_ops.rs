//! Every op by itself, forward and backward, over random shapes.

mod support;

use clip_host_plugin_api::graph::{Graph, Tensor};
use clip_host_plugin_api::ir::{Binary, Compare, Conv, DType, Init, Layout, Op, Pool, Unary};
use support::{Case, Rng};

const RUNS: u64 = 12;

fn each(runs: u64, tolerance: f64, build: impl Fn(&Graph, &mut Rng)) {
    for seed in 0..runs {
        Case::new(seed, &build).tolerance(tolerance).check();
    }
}

/// A leaf with 0 to 5 dimensions; now and then a large one.
fn any<'g>(g: &'g Graph, rng: &mut Rng, name: &str) -> Tensor<'g> {
    let shape = any_shape(rng);
    g.input(name, &shape, DType::F32)
}

fn any_shape(rng: &mut Rng) -> Vec<usize> {
    match rng.below(8) {
        0 => vec![3, 1500],
        1 => vec![70, 65],
        rank => rng.shape((rank - 2).min(5)),
    }
}

#[test]
fn unary() {
    for op in [Unary::Neg, Unary::Exp, Unary::Tanh, Unary::Erf, Unary::Sin, Unary::Cos, Unary::Abs] {
        each(RUNS, 1e-5, |g, rng| g.output("y", g.push(Op::Unary(op), &[any(g, rng, "x")], &[], DType::F32)));
    }
    for op in [Unary::Ln, Unary::Sqrt, Unary::Recip] {
        each(RUNS, 1e-5, |g, rng| g.output("y", g.push(Op::Unary(op), &[any(g, rng, "pos")], &[], DType::F32)));
    }
}

#[test]
fn binary() {
    use Binary::*;
    for op in [Add, Sub, Mul, Div, Maximum, Minimum, Pow] {
        each(RUNS, 1e-4, |g, rng| {
            let (a, b) = if matches!(op, Div | Pow) { ("pos.a", "pos.b") } else { ("a", "b") };
            let a = any(g, rng, a);
            let b = g.input(b, &a.shape(), DType::F32);
            g.output("y", g.push(Op::Binary(op), &[a, b], &[], DType::F32));
        });
    }
}

#[test]
fn compare_and_select() {
    for op in [Compare::Lt, Compare::Le, Compare::Eq] {
        each(RUNS, 1e-6, |g, rng| {
            let shape = any_shape(rng);
            let ids = |name| g.input(name, &shape, DType::I32).cast(DType::F32);
            let (a, b) = (ids("ids3.a"), ids("ids3.b"));
            let hit = g.push(Op::Compare(op), &[a, b], &[], DType::F32);
            g.output("hit", hit);
            let (x, y) = (g.input("x", &shape, DType::F32), g.input("y", &shape, DType::F32));
            g.output("chosen", hit.where_(x, y));
            g.output("half", a.where_(x, 2.5));
        });
    }
}

#[test]
fn constants_and_counters() {
    each(RUNS, 1e-6, |g, rng| {
        let shape = rng.shape(3);
        let x = g.input("x", &shape, DType::F32);
        let axis = rng.below(3);
        g.output("constant", g.full(&shape, 2.5));
        g.output("iota", g.iota(&shape, axis));
        g.output("weighted", x * g.iota(&shape, axis));
        let values = (0..shape[2]).map(|i| i as f64 * 0.5).collect();
        g.output("literal", x * g.literal(values, &[shape[2]], DType::F32));
        g.output("random", g.random(&shape));
        g.output("other", x * g.random(&shape));
        g.output("row", x.sum(&[2], true) + g.iota(&[shape[0], shape[1], 1], 1));
    });
    each(4, 1e-6, |g, _| {
        let x = g.input("x", &[3, 3000], DType::F32);
        g.output("kept", x.dropout(0.25));
        g.output("row", g.random(&[1, 5000]));
        g.output("eye", x.matmul(g.iota(&[3000, 4], 1)));
    });
}

#[test]
fn reductions() {
    for max in [false, true] {
        each(40, 1e-5, |g, rng| {
            let rank = rng.below(6);
            let shape = rng.shape(rank);
            let x = g.input("x", &shape, DType::F32);
            let axes: Vec<usize> = (0..rank).filter(|_| rng.below(2) == 0).collect();
            let op = if max { Op::Max { axes } } else { Op::Sum { axes } };
            g.output("y", g.push(op, &[x], &[], DType::F32));
        });
    }
}

#[test]
fn large_reductions() {
    let shapes: [(&[usize], &[isize]); 14] = [
        (&[5000], &[0]),
        (&[40_000], &[0]),
        (&[9, 4000], &[0, 1]),
        (&[200, 300], &[0, 1]),
        (&[3, 5000], &[1]),
        (&[3, 5000], &[0]),
        (&[1, 5000], &[0]),
        (&[1, 2500], &[1]),
        (&[5000, 3], &[0]),
        (&[5000, 3], &[1]),
        (&[2, 13, 17, 96], &[1, 2]),
        (&[4, 9, 9, 200], &[0, 1, 2]),
        (&[2, 40, 33, 30], &[0, 2, 3]),
        (&[70_000, 2], &[0]),
    ];
    for (seed, (shape, axes)) in shapes.into_iter().enumerate() {
        let case = Case::new(seed as u64, |g, _| {
            let x = g.input("x", shape, DType::F32);
            g.output("sum", x.sum(axes, false));
            g.output("squares", (x * x).mean(axes, true));
            g.output("max", x.max(axes, false));
            g.output("centred", x - x.mean(axes, true));
        });
        case.tolerance(3e-5).check();
    }
}

#[test]
fn movement() {
    each(60, 1e-6, |g, rng| {
        let rank = 1 + rng.below(4);
        let shape = rng.shape(rank);
        let x = g.input("x", &shape, DType::F32);
        let mut axes: Vec<usize> = (0..rank).collect();
        for i in (1..rank).rev() {
            axes.swap(i, rng.below(i + 1));
        }
        let axis = rng.below(rank);
        let start = rng.below(shape[axis]);
        let end = start + 1 + rng.below(shape[axis] - start);
        let sliced = x.slice(axis as isize, start, end);
        let turned = x.permute(&axes);
        let flat = [shape.iter().product()];
        g.output("permuted", turned);
        g.output("sliced", sliced);
        g.output("both", sliced.permute(&axes) * 2.0);
        g.output("flat", turned.reshape(&flat));
        g.output("flat2", turned.reshape(&flat) + x.reshape(&flat));
        g.output("wide", x.unsqueeze(rank as isize).expand_to(&[shape.as_slice(), &[3]].concat()));
        g.output("broadcast", x.unsqueeze(0).expand_to(&[&[2], shape.as_slice()].concat()) * 1.5);
        let before: Vec<usize> = (0..rank).map(|_| rng.below(3)).collect();
        let after: Vec<usize> = (0..rank).map(|_| rng.below(3)).collect();
        g.output("padded", turned.pad(&before, &after, 0.75));
        g.output("joined", Tensor::concat(&[x, sliced, x * 2.0], axis).unwrap());
        g.output("detached", x.detach() * x);
        g.output("itself", x);
    });
}

#[test]
fn matmul() {
    each(40, 2e-5, |g, rng| {
        let rank = rng.below(5);
        let lead: Vec<usize> = (0..rank).map(|_| 1 + rng.below(3)).collect();
        let (m, k, n) = (1 + rng.below(20), 1 + rng.below(20), 1 + rng.below(20));
        let shape = |tail: [usize; 2]| [lead.as_slice(), &tail].concat();
        let a = if rng.below(2) == 0 {
            g.input("a", &shape([m, k]), DType::F32)
        } else {
            g.input("a", &shape([k, m]), DType::F32).t()
        };
        let b = if rng.below(2) == 0 {
            g.input("b", &shape([k, n]), DType::F32)
        } else {
            g.input("b", &shape([n, k]), DType::F32).t()
        };
        g.output("y", a.matmul(b));
        if lead.is_empty() {
            let column = g.input("c", &[k, 1], DType::F32);
            g.output("shared", a.matmul(column.expand_to(&[k, 5])));
            g.output("row", g.input("d", &[1, m], DType::F32).expand_to(&[4, m]).matmul(a));
        }
    });
}

/// `(x, weight)` shapes and attributes of a random convolution, in NCHW.
fn random_conv(rng: &mut Rng) -> (Vec<usize>, Vec<usize>, Conv) {
    let groups = rng.pick(&[1, 1, 2, 3]);
    let (ci, co) = (1 + rng.below(4), 1 + rng.below(5));
    let kernel = [1 + rng.below(3), 1 + rng.below(3)];
    let conv = Conv {
        stride: [1 + rng.below(2), 1 + rng.below(2)],
        padding: [rng.below(2), rng.below(2)],
        dilation: [1 + rng.below(2), 1],
        groups,
        layout: Layout::Nchw,
    };
    let x = vec![1 + rng.below(3), ci * groups, 5 + rng.below(5), 3 + rng.below(5)];
    (x, vec![co * groups, ci, kernel[0], kernel[1]], conv)
}

#[test]
fn convolution() {
    each(40, 2e-5, |g, rng| {
        let (x, w, conv) = random_conv(rng);
        let (x, w) = (g.input("x", &x, DType::F32), g.param("w", &w, Init::Constant(0.0)));
        g.output("y", x.conv2d(w, conv));
    });
}

#[test]
fn gradients_of_convolution_by_themselves() {
    for seed in 0..20 {
        let case = Case::new(seed, |g, rng| {
            let (x, w, mut conv) = random_conv(rng);
            conv.layout = Layout::Nhwc;
            let x = [x[0], x[2], x[3], x[1]];
            let (x, w) = (g.input("x", &x, DType::F32), g.input("w", &w, DType::F32));
            let y = x.conv2d(w, conv) * 0.5;
            g.output("dx", g.push(Op::Conv2dInputGrad(conv), &[y, w], &x.shape(), DType::F32));
            g.output("dw", g.push(Op::Conv2dWeightGrad(conv), &[x, y], &w.shape(), DType::F32));
        });
        case.forward_only().tolerance(2e-5).check();
    }
}

#[test]
fn pooling() {
    each(40, 2e-5, |g, rng| {
        let kernel = [1 + rng.below(3), 1 + rng.below(3)];
        let pool = Pool {
            kernel,
            stride: [1 + rng.below(2), 1 + rng.below(3)],
            padding: [rng.below(kernel[0] / 2 + 1), rng.below(kernel[1] / 2 + 1)],
            count_include_pad: rng.below(2) == 0,
            layout: if rng.below(2) == 0 { Layout::Nchw } else { Layout::Nhwc },
        };
        let x = g.input("x", &[1 + rng.below(3), 4 + rng.below(5), 4 + rng.below(5), 4 + rng.below(5)], DType::F32);
        g.output("max", x.max_pool2d(pool));
        g.output("avg", x.avg_pool2d(pool));
    });
}

#[test]
fn tables() {
    each(30, 1e-5, |g, rng| {
        let (n, rank) = (3 + rng.below(9), rng.below(3));
        let row = rng.shape(rank);
        let table = g.param("table", &[&[n], row.as_slice()].concat(), Init::Constant(0.0));
        let id_rank = rng.below(3);
        let id_shape = rng.shape(id_rank);
        let ids = g.input("ids3", &id_shape, DType::I32);
        let read = table.gather(ids);
        g.output("read", read * 2.0);
        g.output("scaled", (table * 3.0).gather(ids));
        g.output("sum", g.push(Op::ScatterAdd, &[ids, read], &[&[n + 2], row.as_slice()].concat(), DType::F32));
    });
    for seed in 0..20 {
        let case = Case::new(seed, |g, rng| {
            let (n, m) = (4 + rng.below(5), 1 + rng.below(6));
            let rank = rng.below(3);
            let row = rng.shape(rank);
            let table = g.input("table", &[&[n], row.as_slice()].concat(), DType::F32);
            let rows = g.input("rows", &[&[m], row.as_slice()].concat(), DType::F32);
            let ids = g.input("ids4", &[m], DType::I32);
            g.output("replaced", table.scatter(ids, rows));
            g.output("computed", (table + 1.0).scatter(ids, rows * 2.0) * 0.5);
        });
        case.forward_only().check();
    }
}

#[test]
fn integers() {
    for seed in 0..10 {
        let case = Case::new(seed, |g, rng| {
            let n = 4 + rng.below(5);
            let ids = g.input("ids4", &[3, 4], DType::I32);
            let table = g.input("table", &[n, 3], DType::F32);
            g.output("turned", table.gather(ids.t()));
            g.output("part", table.gather(ids.slice(1, 1, 3)));
            g.output("masked", ids.cast(DType::F32).le(1.0).where_(table.gather(ids).sum(&[-1], false), 0.0));
            let computed = (ids.cast(DType::F32) * 0.0 + 2.0).cast(DType::I32);
            g.output("computed", table.gather(computed));
            let numbers = g.literal((0..12).map(|i| f64::from(i % 4)).collect(), &[12], DType::I32);
            g.output("given", table.gather(numbers));
            g.output("number", numbers.cast(DType::F32) * 2.0);
        });
        case.forward_only().check();
    }
}

#[test]
fn composites() {
    each(24, 1e-4, |g, rng| {
        let rank = 1 + rng.below(3);
        let mut shape = rng.shape(rank);
        if rng.below(4) == 0 {
            shape[rank - 1] = rng.pick(&[1023, 1024, 1025, 2500]);
        }
        // Of a single column the variance is 0 and the reciprocal of its root large.
        shape[rank - 1] = shape[rank - 1].max(3);
        let x = g.input("x", &shape, DType::F32);
        let last = shape[rank - 1];
        let (gain, bias) =
            (g.param("gain", &[last], Init::Constant(1.0)), g.param("bias", &[last], Init::Constant(0.0)));
        match rng.below(6) {
            0 => g.output("y", x.softmax()),
            1 => g.output("y", x.log_softmax()),
            2 => g.output("y", x.gelu()),
            3 => g.output("y", x.l2_normalize()),
            4 => g.output("y", x.logsumexp()),
            _ => g.output("y", x.layer_norm(gain, bias, 1e-5)),
        }
    });
    each(16, 2e-4, |g, rng| {
        let shape = [2 + rng.below(3), 1 + rng.below(5), 3 + rng.below(5), 2 + rng.below(5)];
        let x = g.input("x", &shape, DType::F32);
        let (gain, bias) =
            (g.param("gain", &[shape[1]], Init::Constant(1.0)), g.param("bias", &[shape[1]], Init::Constant(0.0)));
        let y = x.batch_norm(gain, bias, 1e-5);
        g.output("y", y);
        g.output("relu", y.relu());
    });
}

#[test]
fn tensors_without_elements_are_refused() {
    let case = Case::new(0, |g, _| g.output("y", g.input("x", &[0, 3], DType::F32) * 2.0)).forward_only();
    let error = clip_host_compiler::plan::compile(&mut case.program()).err().map(|e| e.to_string());
    assert_eq!(
        error.as_deref(),
        Some("input gives [0, 3], which has no elements (hint: every size must be at least 1)")
    );
}
