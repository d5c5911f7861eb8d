//! What fuses: the number of kernels of programs that matter.

mod support;

use clip_encoder_resnet::{Block, ResNetConfig, network};
use clip_host_compiler::kernel::Kernel;
use clip_host_compiler::plan::Plan;
use clip_host_plugin_api::graph::{Graph, Tensor};
use clip_host_plugin_api::ir::{Conv, DType, Init, Layout, NodeId, Op};
use std::collections::BTreeSet;
use support::Case;

const ZERO: Init = Init::Constant(0.0);

/// Kernels of a program: fused ones, ops' own, copies.
fn counts(gradients: bool, build: impl FnOnce(&Graph)) -> (usize, usize, usize) {
    let mut case = Case::new(1, |g, _| build(g));
    case.gradients = gradients;
    let plan = case.plan();
    let count = |f: fn(&Kernel) -> bool| plan.kernels.iter().filter(|k| f(k)).count();
    let counts = (
        count(|k| matches!(k, Kernel::Fused(_))),
        count(|k| matches!(k, Kernel::Own { .. })),
        count(|k| matches!(k, Kernel::Copy { .. } | Kernel::Store { .. })),
    );
    if std::env::var_os("EXPLAIN").is_some() {
        case.explain();
    }
    counts
}

/// Large operands (`size` elements or more) that the kernels without products read and write: passes over memory.
fn passes(plan: &Plan, size: usize) -> usize {
    let large = |id: &NodeId| plan.nodes[*id as usize].elements() >= size;
    let is_product = |k: &Kernel| matches!(k, Kernel::Own { op, .. } if !matches!(op, Op::Moments));
    let of = |k: &Kernel| {
        let reads: BTreeSet<NodeId> = k.reads().into_iter().filter(large).collect();
        reads.len() + k.writes().iter().filter(|id| large(id)).count()
    };
    if std::env::var_os("EXPLAIN").is_some() {
        println!("{}", listing(plan, size));
    }
    plan.kernels.iter().filter(|k| !is_product(k)).map(of).sum()
}

/// The kernels of a plan, a line each, with the large nodes that they write and read.
fn listing(plan: &Plan, size: usize) -> String {
    let large =
        |ids: Vec<NodeId>| ids.into_iter().filter(|&id| plan.nodes[id as usize].elements() >= size).collect::<Vec<_>>();
    let line = |k: &Kernel| format!("{:?} <- {:?}: {}\n", large(k.writes()), large(k.reads()), k.describe(&plan.nodes));
    plan.kernels.iter().map(line).collect()
}

fn vector<'g>(g: &'g Graph, name: &str, n: usize) -> Tensor<'g> {
    g.param(name, &[n], ZERO)
}

#[test]
fn softmax_is_one_kernel() {
    for shape in [[64, 100], [3, 5], [512, 2000]] {
        for gradients in [false, true] {
            let got = counts(gradients, |g| g.output("y", g.input("x", &shape, DType::F32).softmax()));
            assert_eq!(got, (1, 0, 0), "{shape:?} {gradients}");
            let got = counts(gradients, |g| g.output("y", g.input("x", &shape, DType::F32).log_softmax()));
            assert_eq!(got, (1, 0, 0), "{shape:?} {gradients}");
        }
    }
}

#[test]
fn layer_norm_is_one_kernel() {
    for shape in [[64, 100], [3, 5], [512, 768]] {
        for gradients in [false, shape[0] > 3] {
            let got = counts(gradients, |g| {
                let x = g.input("x", &shape, DType::F32);
                g.output("y", x.layer_norm(vector(g, "gain", shape[1]), vector(g, "bias", shape[1]), 1e-5));
            });
            assert_eq!(got, (1, 0, 0), "{shape:?} {gradients}");
        }
    }
}

#[test]
fn flat_update_is_one_kernel() {
    let n = 100_000;
    let got = counts(false, |g| {
        let state = |name: &str| g.state(name, &[n], ZERO);
        let (flat, first, second) = (state("flat"), state("m"), state("v"));
        let (grad, rate) = (g.input("grad", &[n], DType::F32), g.input("rate", &[], DType::F32));
        let decay = g.literal(vec![1.0; n], &[n], DType::F32);
        let new_first = first * 0.9 + grad * 0.1;
        let new_second = second * 0.999 + grad.square() * 0.001;
        g.update(first, new_first);
        g.update(second, new_second);
        g.update(flat, flat * (1.0 - rate * 0.1 * decay) - rate * new_first / (new_second.sqrt() + 1e-8));
    });
    assert_eq!(got, (1, 0, 0));
}

fn mlp(g: &Graph) {
    let x = g.input("x", &[480, 256], DType::F32);
    let up = x.linear(g.param("up", &[1024, 256], ZERO), Some(vector(g, "up.bias", 1024)));
    g.output("y", up.gelu().linear(g.param("down", &[256, 1024], ZERO), Some(vector(g, "down.bias", 256))));
}

#[test]
fn gelu_mlp() {
    // Two products; the activation and the last bias.
    assert_eq!(counts(false, mlp), (2, 2, 0));
    // Backward: four products more, which write the weights' gradients as the weights lie. The cotangent is an input
    // here, so that the activation, its gradient and its bias's sum are one kernel.
    assert_eq!(counts(true, mlp), (3, 6, 0));
}

fn block(g: &Graph) {
    let conv = Conv { stride: [1; 2], padding: [1; 2], dilation: [1; 2], groups: 1, layout: Layout::Nchw };
    let x = g.input("x", &[4, 64, 14, 14], DType::F32);
    let x = x * 1.5;
    let y = x.conv2d(g.param("w", &[64, 64, 3, 3], ZERO), conv);
    let y = y.batch_norm(vector(g, "gain", 64), vector(g, "bias", 64), 1e-5);
    let y = (y + x).relu();
    let z = y.conv2d(g.param("w2", &[64, 64, 3, 3], ZERO), conv);
    g.output("z", z);
}

#[test]
fn residual_block() {
    // Kernels of their own: two convolutions, of which the first gives the moments of its result too. Fused: the input's
    // scaling; the channels' factors; normalise, add and ReLU. Copies are the edges' NHWC.
    assert_eq!(counts(false, block), (3, 2, 2));
    assert_eq!(counts(true, block), (8, 6, 3));
}

fn transformer_layer(g: &Graph) {
    let (b, t, d, heads) = (8, 30, 96, 4);
    let x = g.input("x", &[b, t, d], DType::F32);
    let mask = g.input("mask", &[b, 1, 1, t], DType::F32);
    let linear = |x: Tensor<'_>, name: &str, out: usize| {
        let n = x.size(-1);
        let y = x.matmul(g.param(&format!("{name}.w"), &[out, n], ZERO).t());
        let bias = vector(g, &format!("{name}.b"), out);
        (y + g.tensor(bias.id())).id()
    };
    let split = |id| g.tensor(id).reshape(&[b, t, heads, d / heads]).permute(&[0, 2, 1, 3]);
    let (q, k, v) = (split(linear(x, "q", d)), split(linear(x, "k", d)), split(linear(x, "v", d)));
    let y = q.attention(k, v, Some(mask)).permute(&[0, 2, 1, 3]).reshape(&[b, t, d]);
    let x = x + g.tensor(linear(y, "out", d));
    let x = x.layer_norm(vector(g, "gain1", d), vector(g, "bias1", d), 1e-5);
    let y = g.tensor(linear(g.tensor(linear(x, "up", 4 * d)).gelu(), "down", d));
    g.output("y", (x + y).layer_norm(vector(g, "gain2", d), vector(g, "bias2", d), 1e-5));
}

#[test]
fn transformer() {
    // Products: query, key, value, scores, context, output, and the two of the MLP. Fused: three biases; the scaled query,
    // which reads another order than its bias is added in; masked softmax; bias, residual and layer norm, twice; bias
    // and GELU. The copy joins the heads.
    assert_eq!(counts(false, transformer_layer), (8, 8, 1));
    // Backward: two products for each forward one. Fused with the forward pass: the last norm and its gradient. Further:
    // GELU's gradient and its bias's sum; the first norm's; softmax's; the scale of the query's gradient; the sums of
    // three biases; the sum of the input's four gradients. Copies join the heads of three gradients.
    assert_eq!(counts(true, transformer_layer), (16, 24, 4));
}

/// A ResNet with the given number of blocks in each stage, in training.
fn resnet(g: &Graph, layers: [usize; 4], batch: usize, size: usize) {
    let config = ResNetConfig { layers, block: Block::Bottleneck, zero_init_last: false, ..ResNetConfig::default() };
    let images = g.input("images", &[batch, 3, size, size], DType::F32);
    match network::forward(&config, g, images, true) {
        Ok(features) => g.output("features", features),
        Err(error) => panic!("{error}"),
    };
}

#[test]
fn all_batch_norms_of_a_resnet50_take_their_moments_in_one_pass() {
    let case = Case::new(1, |g, _| resnet(g, [3, 4, 6, 3], 2, 64)).forward_only();
    let plan = case.plan();
    // Each is the epilogue of its convolution.
    let moments = plan.kernels.iter().filter(|k| matches!(k, Kernel::Own { moments: Some(_), .. })).count();
    assert_eq!(moments, 53);
    assert!(!plan.kernels.iter().any(|k| matches!(k, Kernel::Own { op: Op::Moments, .. })));
}

/// Passes over memory that one more bottleneck block costs, forward and with its backward pass.
#[test]
fn bottleneck_block_passes() {
    // Spatial sizes of the first stage are kept, so that the block's own tensors are the only ones that come on top.
    let of = |blocks: usize, gradients: bool| {
        let mut case = Case::new(1, |g, _| resnet(g, [blocks, 1, 1, 1], 4, 64));
        case.gradients = gradients;
        passes(&case.plan(), 4 * 16 * 16 * 64)
    };
    // Forward, after each of three convolutions: read the result, write what the next reads. The last adds the shortcut.
    assert_eq!(of(3, false) - of(2, false), 2 + 2 + 3);
    // Backward, for each of the first two batch norms: read gradient and input for the two sums, read them again and
    // write the input's gradient. For the last: the sum of two branches' gradients and the ReLU's mask come on top (read
    // both, the input and the shortcut, write the masked gradient; then read that and the input, write its gradient).
    assert_eq!(of(3, true) - of(2, true) - 7, 5 + 5 + 5 + 3);
}
