//! The fused plan against luminal's own execution of the same program, for every op.

mod support;

use clip_host_compiler::decompose::Decompose;
use clip_host_compiler::moments::FindMoments;
use clip_host_compiler::simplify::Simplify;
use clip_host_cpu_kernels::Isa;
use clip_host_graph::oracle::execute;
use clip_host_graph::rewrite::linearize;
use clip_host_plugin_api::graph::{Graph, Tensor};
use clip_host_plugin_api::ir::{Binary, Compare, Conv, DType, Init, Layout, Op, Pool, Unary};
use std::collections::{BTreeSet, HashMap};
use support::{Case, Rng, pool};

/// Kinds of ops: the match is exhaustive, so that a new op must be given a number here, and a case below.
const KINDS: usize = 55;

fn kind(op: &Op) -> usize {
    match op {
        Op::Input { .. } => 0,
        Op::Param { .. } => 1,
        Op::State { .. } => 2,
        Op::Constant { .. } => 3,
        Op::Literal { .. } => 4,
        Op::Iota { .. } => 5,
        Op::Random { .. } => 6,
        Op::Unary(Unary::Neg) => 7,
        Op::Unary(Unary::Exp) => 8,
        Op::Unary(Unary::Ln) => 9,
        Op::Unary(Unary::Sqrt) => 10,
        Op::Unary(Unary::Recip) => 11,
        Op::Unary(Unary::Tanh) => 12,
        Op::Unary(Unary::Erf) => 13,
        Op::Unary(Unary::Sin) => 14,
        Op::Unary(Unary::Cos) => 15,
        Op::Unary(Unary::Abs) => 16,
        Op::Binary(Binary::Add) => 17,
        Op::Binary(Binary::Sub) => 18,
        Op::Binary(Binary::Mul) => 19,
        Op::Binary(Binary::Div) => 20,
        Op::Binary(Binary::Maximum) => 21,
        Op::Binary(Binary::Minimum) => 22,
        Op::Binary(Binary::Pow) => 23,
        Op::Compare(Compare::Lt) => 24,
        Op::Compare(Compare::Le) => 25,
        Op::Compare(Compare::Eq) => 26,
        Op::Select => 27,
        Op::Sum { .. } => 28,
        Op::Max { .. } => 29,
        Op::Reshape => 30,
        Op::Permute { .. } => 31,
        Op::Broadcast => 32,
        Op::Slice { .. } => 33,
        Op::Pad { .. } => 34,
        Op::Concat { .. } => 35,
        Op::Matmul => 36,
        Op::Conv2d(_) => 37,
        Op::Conv2dInputGrad(_) => 38,
        Op::Conv2dWeightGrad(_) => 39,
        Op::MaxPool2d(_) => 40,
        Op::MaxPool2dGrad(_) => 41,
        Op::AvgPool2d(_) => 42,
        Op::AvgPool2dGrad(_) => 43,
        Op::Gather => 44,
        Op::ScatterAdd => 45,
        Op::Scatter => 46,
        Op::Cast => 47,
        Op::Detach => 48,
        Op::Softmax => 49,
        Op::LogSoftmax => 50,
        Op::LayerNorm { .. } => 51,
        Op::BatchNorm { .. } => 52,
        Op::Gelu => 53,
        Op::L2Normalize { .. } => 54,
        // Made by the compiler's passes only: it has a test of its own.
        Op::Moments => KINDS,
    }
}

const ZERO: Init = Init::Constant(0.0);

type Build = fn(&Graph, &mut Rng);

fn elementwise(g: &Graph, rng: &mut Rng) {
    let rank = rng.below(4);
    let shape = rng.shape(rank);
    let (x, y) = (g.input("x", &shape, DType::F32), g.param("y", &shape, ZERO));
    let (p, q) = (g.input("pos.p", &shape, DType::F32), g.state("pos.q", &shape, ZERO));
    for (i, op) in
        [Unary::Neg, Unary::Exp, Unary::Tanh, Unary::Erf, Unary::Sin, Unary::Cos, Unary::Abs].iter().enumerate()
    {
        g.output(&format!("u{i}"), g.push(Op::Unary(*op), &[x], &[], DType::F32));
    }
    for (i, op) in [Unary::Ln, Unary::Sqrt, Unary::Recip].iter().enumerate() {
        g.output(&format!("p{i}"), g.push(Op::Unary(*op), &[p], &[], DType::F32));
    }
    g.output("sums", x + y - x * y);
    g.output("quotient", x / p);
    g.output("power", p.pow(q));
    g.output("largest", x.maximum(y));
    g.output("smallest", x.minimum(y));
    let (a, b) = (g.input("ids3.a", &shape, DType::I32), g.input("ids3.b", &shape, DType::I32));
    let (a, b) = (a.cast(DType::F32), b.cast(DType::F32));
    g.output("less", a.lt(b) * x);
    g.output("at_most", a.le(b) * y);
    g.output("chosen", a.eq(b).where_(x, y.detach()));
}

fn sources(g: &Graph, rng: &mut Rng) {
    let shape = rng.shape(3);
    let x = g.input("x", &shape, DType::F32);
    let values = (0..shape[1] * shape[2]).map(|i| i as f64 * 0.25 - 1.0).collect();
    g.output("iota", x * g.iota(&shape, rng.below(3)) + g.full(&shape, 0.5));
    g.output("literal", x + g.literal(values, &[shape[1], shape[2]], DType::F32));
    g.output("random", x * g.random(&shape));
}

fn reductions(g: &Graph, rng: &mut Rng) {
    let rank = 1 + rng.below(4);
    let shape = rng.shape(rank);
    let x = g.input("x", &shape, DType::F32);
    let axes: Vec<isize> = (0..rank as isize).filter(|_| rng.below(2) == 0).collect();
    g.output("sum", x.sum(&axes, true));
    g.output("max", x.max(&axes, false));
    g.output("deviation", x - x.mean(&axes, true));
}

fn movement(g: &Graph, rng: &mut Rng) {
    let shape = rng.shape(3);
    let x = g.input("x", &shape, DType::F32);
    let turned = x.permute(&[2, 0, 1]);
    g.output("flat", turned.reshape(&[shape.iter().product()]));
    let ends: Vec<usize> = shape.iter().map(|&n| 1 + rng.below(n)).collect();
    let part = g.push(Op::Slice { starts: vec![0, ends[1] - 1, 0], ends }, &[x], &[], DType::F32);
    g.output("part", part * 2.0);
    g.output("padded", turned.pad(&[1, 0, 2], &[0, 1, 1], 0.5));
    g.output("joined", Tensor::concat(&[x, x.slice(1, 0, 1), x * 3.0], 1).unwrap());
    let wide = g.param("row", &[shape[0], 1, shape[2]], ZERO).expand_to(&shape);
    g.output("wide", wide + x);
}

fn products(g: &Graph, rng: &mut Rng) {
    let (b, m, k, n) = (1 + rng.below(3), 1 + rng.below(5), 1 + rng.below(5), 1 + rng.below(5));
    let (x, y) = (g.input("x", &[b, m, k], DType::F32), g.input("y", &[b, k, n], DType::F32));
    g.output("batched", x.matmul(y));
    g.output("linear", x.linear(g.param("w", &[n, k], ZERO), Some(g.param("bias", &[n], ZERO))));
    g.output("turned", y.t().matmul(x.t()));
}

fn convolution(g: &Graph, rng: &mut Rng) {
    let groups = rng.pick(&[1, 1, 2]);
    let (inner, out) = (1 + rng.below(3), groups * (1 + rng.below(2)));
    let conv = Conv {
        stride: [1 + rng.below(2), 1 + rng.below(2)],
        padding: [rng.below(2), rng.below(2)],
        dilation: [1, 1 + rng.below(2)],
        groups,
        layout: Layout::Nchw,
    };
    let x = g.input("x", &[1 + rng.below(2), inner * groups, 4 + rng.below(2), 5], DType::F32);
    let weight = g.param("w", &[out, inner, 1 + rng.below(3), 1 + rng.below(2)], ZERO);
    g.output("y", x.conv2d(weight, conv));
}

fn pointwise(g: &Graph, rng: &mut Rng) {
    let (inner, out) = (1 + rng.below(3), 1 + rng.below(3));
    let conv = Conv { stride: [1, 1], padding: [0, 0], dilation: [1, 1], groups: 1, layout: Layout::Nchw };
    let x = g.input("x", &[2, inner, 3, 2], DType::F32);
    g.output("y", x.conv2d(g.param("w", &[out, inner, 1, 1], ZERO), conv));
}

fn pooling(g: &Graph, rng: &mut Rng) {
    let kernel = [1 + rng.below(3), 1 + rng.below(3)];
    let pool = Pool {
        kernel,
        stride: [1 + rng.below(2), 1 + rng.below(2)],
        padding: [rng.below(kernel[0] / 2 + 1), rng.below(kernel[1] / 2 + 1)],
        count_include_pad: rng.below(2) == 0,
        layout: rng.pick(&[Layout::Nchw, Layout::Nhwc]),
    };
    let x = g.input("x", &[2, 3 + rng.below(2), 4, 3 + rng.below(3)], DType::F32);
    g.output("max", x.max_pool2d(pool));
    g.output("mean", x.avg_pool2d(pool));
}

fn tables(g: &Graph, rng: &mut Rng) {
    let (n, m, width) = (4 + rng.below(3), 1 + rng.below(5), 1 + rng.below(4));
    let table = g.param("table", &[n, width], ZERO);
    let ids = g.input("ids4", &[m], DType::I32);
    let rows = table.gather(ids);
    g.output("rows", rows);
    g.output("added", g.push(Op::ScatterAdd, &[ids, rows * 0.5], &[n, width], DType::F32));
}

fn replaced(g: &Graph, rng: &mut Rng) {
    let (n, m, width) = (4 + rng.below(3), 1 + rng.below(5), 1 + rng.below(4));
    let table = g.state("table", &[n, width], ZERO);
    let rows = g.input("rows", &[m, width], DType::F32);
    g.output("replaced", table.scatter(g.input("ids4", &[m], DType::I32), rows).detach());
}

fn composites(g: &Graph, rng: &mut Rng) {
    let shape = [1 + rng.below(4), 3 + rng.below(4)];
    let x = g.input("x", &shape, DType::F32);
    g.output("softmax", x.softmax());
    g.output("log_softmax", x.log_softmax());
    g.output("gelu", x.gelu());
    g.output("l2", x.l2_normalize());
    let (gain, bias) = (g.param("gain", &[shape[1]], ZERO), g.param("bias", &[shape[1]], ZERO));
    g.output("layer", x.layer_norm(gain, bias, 1e-3));
    let image = g.input("image", &[3, shape[1], 2, 2], DType::F32);
    g.output("batch", image.batch_norm(gain, bias, 1e-3));
}

#[test]
fn every_op_agrees_with_luminal() {
    let builds: [(Build, bool); 11] = [
        (elementwise, true),
        (sources, true),
        (reductions, true),
        (movement, true),
        (products, true),
        (convolution, true),
        (pointwise, true),
        (pooling, true),
        (tables, true),
        (replaced, false),
        (composites, true),
    ];
    let mut seen: BTreeSet<usize> = BTreeSet::new();
    for (build, gradients) in builds {
        for seed in 0..5 {
            let mut case = Case::new(seed, build).tolerance(2e-4);
            case.gradients = gradients;
            case.seed = 0;
            let program = case.program();
            seen.extend(linearize(&program.graph, &program.roots()).nodes.iter().map(|node| kind(&node.op)));
            let inputs: HashMap<String, Vec<f32>> = case
                .all_values()
                .into_iter()
                .map(|(name, values)| (name, values.into_iter().map(|v| v as f32).collect()))
                .collect();
            let oracle = execute(&program, &inputs).unwrap_or_else(|e| panic!("{e}"));
            let oracle = oracle.into_iter().map(|(name, v)| (name, v.into_iter().map(f64::from).collect())).collect();
            case.compare(&oracle, &case.run(&pool(2, Isa::detect())), "luminal");
        }
    }
    let missing: Vec<usize> = (0..KINDS).filter(|k| !seen.contains(k)).collect();
    assert!(missing.is_empty(), "no case has ops of kind {missing:?}");
}

#[test]
fn moments_agree_with_luminal() {
    for seed in 0..5 {
        let mut case = Case::new(seed, |g, rng| {
            let shape = [2 + rng.below(3), 3, 1 + rng.below(3), 2];
            let (gain, bias) = (g.param("gain", &[3], ZERO), g.param("bias", &[3], ZERO));
            g.output("y", g.input("x", &shape, DType::F32).batch_norm(gain, bias, 1e-3));
        });
        // Channels are the last axis where statistics are those of columns.
        case.channels_last = true;
        let mut program = case.program();
        program.run("decompose", Decompose).unwrap();
        program.run("simplify", Simplify).unwrap();
        program.run("moments", FindMoments).unwrap();
        let nodes = linearize(&program.graph, &program.roots()).nodes;
        assert_eq!(nodes.iter().filter(|n| matches!(n.op, Op::Moments)).count(), 1);
        let inputs = case.all_values().into_iter().map(|(name, v)| (name, v.into_iter().map(|v| v as f32).collect()));
        let oracle = execute(&program, &inputs.collect()).unwrap_or_else(|e| panic!("{e}"));
        let oracle: HashMap<String, Vec<f64>> =
            oracle.into_iter().map(|(name, v)| (name, v.into_iter().map(f64::from).collect())).collect();
        case.compare(&case.expected(), &case.run(&pool(2, Isa::detect())), "the interpreter");
        case.compare(&oracle, &case.run(&pool(2, Isa::detect())), "luminal");
    }
}

#[test]
fn wrong_inputs_are_told() {
    let case = Case::new(1, |g, _| g.output("y", g.input("x", &[3], DType::F32) * 2.0)).forward_only();
    let program = case.program();
    let error = execute(&program, &HashMap::new()).unwrap_err().to_string();
    assert_eq!(error, "no value was given for `x`");
    let error = execute(&program, &HashMap::from([("x".to_string(), vec![1.0])])).unwrap_err().to_string();
    assert_eq!(error, "`x` has 3 elements, 1 were given");
}
