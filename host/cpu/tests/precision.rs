//! Mixed precision: what is kept in bf16, and that results stay near those in f64.

mod support;

use clip_host_compiler::kernel::{Element, Kernel};
use clip_host_compiler::plan::Plan;
use clip_host_plugin_api::graph::{Graph, Tensor};
use clip_host_plugin_api::ir::{Conv, DType, Init, Layout, Op, Pool};
use support::Case;

const ZERO: Init = Init::Constant(0.0);

/// A parameter of about the size that a layer of `inner` inputs has.
fn weight<'g>(g: &'g Graph, name: &str, shape: &[usize], inner: usize) -> Tensor<'g> {
    g.param(name, shape, ZERO) * (1.0 / (inner as f64).sqrt())
}

fn conv_bn<'g>(g: &'g Graph, x: Tensor<'g>, name: &str, out: usize, kernel: usize, stride: usize) -> Tensor<'g> {
    let conv =
        Conv { stride: [stride; 2], padding: [kernel / 2; 2], dilation: [1; 2], groups: 1, layout: Layout::Nchw };
    let y = x.conv2d(g.param(&format!("{name}.weight"), &[out, x.size(1), kernel, kernel], ZERO), conv);
    let (gain, bias) = (format!("{name}.pos.gain"), format!("{name}.bias"));
    y.batch_norm(g.param(&gain, &[out], ZERO), g.param(&bias, &[out], ZERO), 1e-5)
}

/// Stem, pooling and two residual blocks; the head's results, and a loss on them.
fn image_tower(g: &Graph) {
    let x = g.input("images", &[4, 3, 36, 36], DType::F32);
    let x = conv_bn(g, x, "stem", 16, 3, 1).relu();
    let pool = Pool { kernel: [3; 2], stride: [2; 2], padding: [1; 2], count_include_pad: false, layout: Layout::Nchw };
    let mut x = x.max_pool2d(pool);
    for block in 0..2 {
        let y = conv_bn(g, x, &format!("b{block}.1"), 16, 1, 1).relu();
        let y = conv_bn(g, y, &format!("b{block}.2"), 16, 3, 1).relu();
        let y = conv_bn(g, y, &format!("b{block}.3"), 32, 1, 1);
        x = (y + conv_bn(g, x, &format!("b{block}.short"), 32, 1, 1)).relu();
    }
    let embeddings = x.mean(&[2, 3], false).linear(weight(g, "head", &[12, 32], 32), None);
    g.output("embeddings", embeddings);
    let features = embeddings.l2_normalize();
    g.output("similarity", features.matmul(features.t()));
}

/// One transformer layer over embedded ids; the head's results.
fn text_tower<'g>(g: &'g Graph) {
    let (b, t, d, heads) = (6, 10, 32, 4);
    let x = g.param("tokens", &[9, d], ZERO).gather(g.input("ids9", &[b, t], DType::I32));
    let split = |x: Tensor<'g>| x.reshape(&[b, t, heads, d / heads]).permute(&[0, 2, 1, 3]);
    let linear = |x: Tensor<'g>, name: &str, out: usize| {
        let bias = g.param(&format!("{name}.bias"), &[out], ZERO);
        x.linear(weight(g, name, &[out, x.size(-1)], x.size(-1)), Some(bias))
    };
    let norm = |x: Tensor<'g>, name: &str| {
        let (gain, bias) = (format!("{name}.pos.gain"), format!("{name}.bias"));
        x.layer_norm(g.param(&gain, &[d], ZERO), g.param(&bias, &[d], ZERO), 1e-5)
    };
    let x = norm(x, "norm0");
    let (q, k, v) = (split(linear(x, "q", d)), split(linear(x, "k", d)), split(linear(x, "v", d)));
    let y = q.attention(k, v, None).permute(&[0, 2, 1, 3]).reshape(&[b, t, d]);
    let x = norm(x + linear(y, "out", d).dropout(0.1), "norm1");
    let x = norm(x + linear(linear(x, "up", 2 * d).gelu(), "down", d), "norm2");
    let embeddings = linear(x.slice(1, 0, 1).squeeze(1), "head", 8);
    g.output("embeddings", embeddings);
    g.output("features", embeddings.l2_normalize());
}

/// How the results of kernels of their own are kept, by op.
fn kept(plan: &Plan, is: fn(&Op) -> bool) -> Vec<Element> {
    plan.kernels
        .iter()
        .filter_map(|kernel| match kernel {
            Kernel::Own { op, node, .. } if is(op) => Some(plan.storage[*node as usize]),
            _ => None,
        })
        .collect()
}

#[test]
fn image_towers_stay_near_the_reference() {
    let case = Case::new(3, |g, _| image_tower(g)).bf16(&["embeddings"]);
    let plan = case.plan();
    let convolutions = kept(&plan, |op| matches!(op, Op::Conv2d(_) | Op::MaxPool2d(_)));
    assert_eq!(convolutions.len(), 10);
    assert!(convolutions.iter().all(|&e| e == Element::Bf16), "{convolutions:?}");
    let gradients = kept(&plan, |op| matches!(op, Op::Conv2dWeightGrad(_)));
    assert_eq!(gradients, [Element::F32; 9]);
    case.tolerance(6e-2).check();
}

#[test]
fn text_towers_stay_near_the_reference() {
    let case = Case::new(5, |g, _| text_tower(g)).bf16(&["embeddings"]);
    let plan = case.plan();
    // Forward: q, k, v, scores, values, out, up, down; the head's result goes to the loss in f32.
    let products = kept(&plan, |op| matches!(op, Op::Matmul));
    assert!(products.iter().filter(|&&e| e == Element::Bf16).count() >= 8, "{products:?}");
    case.tolerance(6e-2).check();
}

/// f16 has three more bits than bf16. What is left of the bound is for values that fall on the other side of a ReLU.
#[test]
fn towers_in_f16_stay_nearer() {
    let image = Case::new(3, |g, _| image_tower(g)).fp16(&["embeddings"]);
    let text = Case::new(5, |g, _| text_tower(g)).fp16(&["embeddings"]);
    for case in [image, text] {
        let plan = case.plan();
        let products = kept(&plan, |op| matches!(op, Op::Conv2d(_) | Op::Matmul | Op::MaxPool2d(_)));
        assert!(products.iter().filter(|&&e| e == Element::F16).count() >= 8, "{products:?}");
        assert!(!plan.storage.contains(&Element::Bf16));
        assert!(kept(&plan, |op| matches!(op, Op::Conv2dWeightGrad(_))).iter().all(|&e| e == Element::F32));
        case.tolerance(2e-2).check();
    }
}

/// What a product keeps in bf16 is what f32 would keep, rounded; nothing else is rounded.
#[test]
fn the_loss_stays_in_f32() {
    let build = |g: &Graph| {
        let x = g.input("x", &[64, 48], DType::F32);
        let embeddings = x.linear(weight(g, "head", &[16, 48], 48), None);
        g.output("embeddings", embeddings);
        let features = embeddings.l2_normalize();
        g.output("similarity", features.matmul(features.t()));
    };
    let case = Case::new(1, |g, _| build(g)).bf16(&["embeddings"]);
    let plan = case.plan();
    for (name, operand) in &plan.outputs {
        assert_eq!(plan.storage[operand.source as usize], Element::F32, "{name}");
    }
    // The tower's one product reads a rounded input; the similarity's operands are not rounded.
    let products = kept(&plan, |op| matches!(op, Op::Matmul));
    assert!(products.iter().all(|&e| e == Element::F32), "{products:?}");
    assert!(plan.leaves.iter().any(|&leaf| plan.storage[leaf as usize] == Element::Bf16));
    case.tolerance(2e-2).check();
}

#[test]
fn f32_keeps_nothing_in_bf16() {
    for case in [Case::new(3, |g, _| image_tower(g)), Case::new(5, |g, _| text_tower(g))] {
        assert!(!case.plan().storage.contains(&Element::Bf16));
    }
}
