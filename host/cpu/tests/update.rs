//! Updates of flat parameters, piece by piece, and of single parameters with reductions inside.

mod support;

use clip_host_compiler::kernel::Kernel;
use clip_host_compiler::plan::{Plan, Region};
use clip_host_plugin_api::graph::{Graph, Tensor};
use clip_host_plugin_api::ir::{DType, Init};
use clip_host_plugin_api::optimizer::{Optimizer, ParamInfo, ParamUpdate};
use clip_optimizer_adafactor::{Adafactor, AdafactorConfig};
use support::Case;

const ZERO: Init = Init::Constant(0.0);

/// Sizes of the matrices that the flat tensor holds, end to end.
const PARTS: [[usize; 2]; 9] =
    [[512, 640], [1, 640], [640, 512], [512, 2], [512, 640], [3, 1], [640, 512], [512, 640], [7, 11]];

/// A step of momentum over one flat tensor. Each matrix's gradient
/// depends on the matrix before: what could be updated early is still wanted elsewhere. `scaled` divides by the sum of all
/// gradients' squares, so that no piece can come early.
fn step(g: &Graph, scaled: bool) {
    let total: usize = PARTS.iter().map(|p| p[0] * p[1]).sum();
    let (flat, moment) = (g.state("flat", &[total], ZERO), g.state("moment", &[total], ZERO));
    let rate = g.input("pos.rate", &[], DType::F32);
    let mut offset = 0;
    let mut matrices: Vec<Tensor> = vec![];
    for [rows, cols] in PARTS {
        matrices.push(flat.slice(0, offset, offset + rows * cols).reshape(&[rows, cols]));
        offset += rows * cols;
    }
    let parts: Vec<Tensor> = PARTS
        .iter()
        .enumerate()
        .map(|(i, &[rows, cols])| {
            let before = matrices[(i + PARTS.len() - 1) % PARTS.len()].slice(0, 0, 1);
            let column = g.input(&format!("column{i}"), &[rows, 1], DType::F32);
            let mix = g.input(&format!("mix{i}"), &[before.size(1), cols], DType::F32);
            (column * 0.01).matmul(before.matmul(mix)).reshape(&[rows * cols])
        })
        .collect();
    let halves = [Tensor::concat(&parts[..4], 0).expect("parts"), Tensor::concat(&parts[4..], 0).expect("parts")];
    let mut gradient = Tensor::concat(&halves, 0).expect("halves");
    g.output("finite", (gradient * 0.0).sum_all());
    if scaled {
        gradient = gradient / (gradient.square().mean_all() + 1.0);
    }
    let new = moment * 0.9 + gradient;
    g.update(moment, new);
    g.update(flat, flat - rate * new);
}

/// The launches that write a leaf's memory, and how many elements each writes.
fn writers(plan: &Plan) -> Vec<usize> {
    let in_leaf = |id: &u32| matches!(plan.places.get(id).map(|p| p.region), Some(Region::Leaf(_)));
    let fused = plan.kernels.iter().filter_map(|k| match k {
        Kernel::Fused(fused) if k.writes().iter().any(in_leaf) => Some(fused.cols),
        _ => None,
    });
    fused.collect()
}

#[test]
fn large_updates_are_cut_where_gradients_meet() {
    let case = Case::new(1, |g, _| step(g, false)).forward_only();
    let plan = case.plan();
    let total: usize = PARTS.iter().map(|p| p[0] * p[1]).sum();
    let pieces = writers(&plan);
    // Five large matrices, each with the small ones behind it as far as there is room.
    assert_eq!(pieces.iter().sum::<usize>(), total);
    assert!(pieces.len() >= 5, "{pieces:?}");
    assert!(!plan.kernels.iter().any(|k| matches!(k, Kernel::Store { .. } | Kernel::Copy { .. })));
    // The flat gradient never exists as a whole.
    assert!(plan.arena < 4 * total * 2 / 3, "{} of {}", plan.arena, 4 * total);
    case.check();
}

#[test]
fn pieces_wait_for_what_they_need() {
    let case = Case::new(2, |g, _| step(g, true)).forward_only();
    case.check();
}

/// A step of Adafactor on one parameter: means over rows and columns, root mean squares of the whole, and states of
/// several shapes. As in training, the gradient is a product's result and the parameter is overwritten.
fn adafactor(seed: u64, shape: &[usize], config: &AdafactorConfig) -> Case {
    let rows = shape.first().copied().unwrap_or(1);
    let cols = shape.iter().skip(1).product();
    let mut case = Case::new(seed, |g, _| {
        let param = g.state("param", shape, ZERO);
        let (left, right) = (g.input("left", &[rows, 3], DType::F32), g.input("right", &[3, cols], DType::F32));
        let grad = left.matmul(right).reshape(shape);
        let info = ParamInfo { name: "param".into(), shape: shape.to_vec(), weight_decay: 0.1 };
        let scalars = Adafactor::scalars(config, 1, 0.0).into_iter();
        let scalars = scalars.map(|(name, _)| (name.into(), g.input(&format!("scalar.{name}"), &[], DType::F32)));
        let update = ParamUpdate::new(param, grad, info, scalars);
        let new = Adafactor::build(config, g, &update).expect("the settings are good");
        g.update(param, new);
    })
    .forward_only();
    for (name, values) in &mut case.values {
        if name.starts_with("exp_avg_sq") {
            values.iter_mut().for_each(|v| *v = v.abs() + 0.1);
        }
    }
    for (name, value) in Adafactor::scalars(config, 4, 0.1) {
        case.values.insert(format!("scalar.{name}"), vec![value]);
    }
    case
}

#[test]
fn updates_with_reductions_are_the_same_for_any_number_of_threads() {
    let given = AdafactorConfig { beta1: Some(0.9), ..Default::default() };
    let relative = AdafactorConfig { relative_step: true, ..Default::default() };
    let shapes: [&[usize]; 11] = [
        &[512, 640],
        &[2048, 3],
        &[3, 2048],
        &[1, 640],
        &[257, 129],
        &[64, 3, 7, 7],
        &[24, 16, 3, 3],
        &[48, 80, 1, 1],
        &[5000],
        &[1],
        &[],
    ];
    for (seed, shape) in (0..).zip(shapes) {
        for config in [&given, &relative] {
            adafactor(seed, shape, config).check();
        }
    }
}

#[test]
fn updates_with_reductions_happen_in_place() {
    let case = adafactor(0, &[512, 640], &AdafactorConfig { relative_step: true, ..Default::default() });
    let plan = case.plan();
    // The parameter's size, the gradient's mean squares, the step's size, the step: no more walks through the whole.
    let whole = |k: &&Kernel| matches!(k, Kernel::Fused(fused) if fused.rows * fused.cols == 512 * 640);
    assert_eq!(plan.kernels.iter().filter(whole).count(), 4);
    assert!(!plan.kernels.iter().any(|k| matches!(k, Kernel::Store { .. } | Kernel::Copy { .. })));
    // Besides the gradient there are sums only.
    assert!(plan.arena < 4 * 512 * 640 + (1 << 14), "{}", plan.arena);
}
