//! Persistent tensors in half precision: rounded at random when they are written, read as they are. And the range of f16.

mod support;

use clip_host_compiler::kept::{Halves, STREAMS, halves};
use clip_host_compiler::kernel::{Kernel, stochastic_bf16};
use clip_host_compiler::plan::{Plan, compile_kept};
use clip_host_compiler::precision::Precision;
use clip_host_cpu::{Executor, Store};
use clip_host_cpu_kernels::{Isa, bf16};
use clip_host_plugin_api::graph::{Graph, Tensor};
use clip_host_plugin_api::interpret::word;
use clip_host_plugin_api::ir::{DType, Init};
use std::collections::HashMap;
use support::{Case, pool};

const ZERO: Init = Init::Constant(0.0);

fn named(names: &[&str]) -> Halves {
    halves(names.iter().map(|name| name.to_string()))
}

fn plan(case: &Case, kept: &Halves) -> Plan {
    compile_kept(&mut case.program(), case.precision, kept).expect("the case compiles")
}

/// Runs a case some times over, from values that bf16 has: outputs by name of the last run, and all that stays.
fn run(case: &Case, kept: &Halves, threads: usize, isa: Isa, seeds: &[u64]) -> HashMap<String, Vec<f32>> {
    let mut store = Store::default();
    let plan = plan(case, kept);
    let names: Vec<String> = plan.outputs.iter().map(|o| o.0.clone()).collect();
    let mut executor = Executor::new(plan, pool(threads, isa), &mut store).expect("it is prepared");
    for (name, values) in case.all_values() {
        let values: Vec<f32> = values.iter().map(|&v| bf16::from_f64(v).to_f32()).collect();
        if store.set(&name, 0, &values) {
            assert_eq!(store.values(&name, 0..values.len()).as_deref(), Some(&values[..]), "{name} is kept exactly");
        } else if name.starts_with("ids") {
            executor.set_i32(&name, &values.iter().map(|&v| v as i32).collect::<Vec<_>>()).expect("an input");
        } else {
            executor.set_f32(&name, &values).expect("an input");
        }
    }
    for &seed in seeds {
        executor.run(&mut store, seed).expect("it runs");
    }
    let mut results: HashMap<String, Vec<f32>> =
        names.iter().map(|n| (n.clone(), executor.output(&store, n).expect("an output"))).collect();
    for (name, values) in &case.values {
        results.extend(store.values(name, 0..values.len()).map(|v| (name.clone(), v.into_owned())));
    }
    results
}

/// Every way to run a case, with the threads and instruction set of each.
fn ways() -> Vec<(usize, Isa)> {
    let all = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];
    let known = all.into_iter().filter(|&isa| isa == Isa::Portable || Isa::detect() >= isa);
    known.flat_map(|isa| [(1, isa), (3, isa)]).collect()
}

/// A step with momentum over one flat tensor, large enough to be cut where the parts of its gradient meet.
fn step(g: &Graph) {
    const PARTS: [[usize; 2]; 4] = [[700, 1001], [3, 5], [512, 900], [801, 600]];
    let total: usize = PARTS.iter().map(|p| p[0] * p[1]).sum();
    let (flat, moment) = (g.state("flat", &[total], ZERO), g.state("moment", &[total], ZERO));
    let parts: Vec<Tensor> = PARTS
        .iter()
        .enumerate()
        .map(|(i, &[rows, cols])| {
            let left = g.input(&format!("left{i}"), &[rows, 3], DType::F32);
            let right = g.input(&format!("right{i}"), &[3, cols], DType::F32);
            left.matmul(right).reshape(&[rows * cols])
        })
        .collect();
    let gradient = Tensor::concat(&parts, 0).expect("parts");
    let new = moment * 0.9 + gradient * 0.1;
    g.update(moment, new);
    g.update(flat, flat - new * 0.01);
}

#[test]
fn new_values_are_rounded_by_seed_stream_and_element_alone() {
    let case = Case::new(3, |g, _| step(g)).forward_only();
    let kept = named(&["flat", "moment"]);
    let fused = plan(&case, &kept);
    assert!(!fused.kernels.iter().any(|k| matches!(k, Kernel::Store { .. } | Kernel::Copy { .. })), "in place");
    let updates = fused.kernels.iter().filter(|k| k.writes().len() == 2).count();
    assert!(updates >= 3, "cut into pieces, {updates} of them");
    // The same step in f32 gives the values before they are rounded.
    let exact = run(&case, &Halves::new(), 1, Isa::Portable, &[11]);
    for (threads, isa) in ways() {
        let got = run(&case, &kept, threads, isa, &[11]);
        for (name, stream) in &kept {
            let rounded = (0..).zip(&exact[name]).map(|(i, &v)| stochastic_bf16(v, word(11, *stream, i)));
            let rounded: Vec<u32> = rounded.map(|bits| u32::from(bits) << 16).collect();
            let bits: Vec<u32> = got[name].iter().map(|v| v.to_bits()).collect();
            assert!(bits == rounded, "{name} with {threads} threads, {isa:?}");
        }
    }
    assert_eq!(kept["flat"], STREAMS);
    assert_ne!(kept["moment"], kept["flat"]);
}

/// Values of rows, and an update that is no kernel's whole result.
#[test]
fn rows_and_copies_are_rounded_too() {
    let case = Case::new(4, |g, _| {
        let (rows, table) = (g.state("rows", &[300], ZERO), g.state("table", &[40, 30], ZERO));
        let x = g.input("x", &[300, 70], DType::F32);
        g.update(rows, rows * 0.99 + x.square().mean(&[1], false));
        let turned = g.input("turned", &[30, 40], DType::F32);
        g.output("sum", (turned.t() * 1.1).sum_all());
        g.update(table, table * 0.3 + turned.t() * 1.1);
    })
    .forward_only();
    let kept = named(&["rows", "table"]);
    let exact = run(&case, &Halves::new(), 1, Isa::Portable, &[2]);
    for (threads, isa) in ways() {
        let got = run(&case, &kept, threads, isa, &[2]);
        for (name, stream) in &kept {
            let rounded = (0..).zip(&exact[name]).map(|(i, &v)| stochastic_bf16(v, word(2, *stream, i)));
            let rounded: Vec<f32> = rounded.map(|bits| bf16::from_bits(bits).to_f32()).collect();
            assert!(got[name] == rounded, "{name} with {threads} threads, {isa:?}");
        }
    }
}

/// A second moment whose gradient has vanished decays as β₂ⁿ. To nearest it would never: a step is a thousandth, half the
/// distance of two bf16 a five-hundredth and more.
#[test]
fn a_second_moment_decays() {
    const STEPS: i32 = 1000;
    let mut case = Case::new(5, |g, _| {
        let moment = g.state("moment", &[4096], ZERO);
        g.update(moment, moment * 0.999);
    })
    .forward_only();
    case.values.insert("moment".into(), vec![1.0; 4096]);
    let seeds: Vec<u64> = (0..STEPS as u64).collect();
    let kept = named(&["moment"]);
    let moment = &run(&case, &kept, 1, Isa::detect(), &seeds)["moment"];
    let mean = moment.iter().map(|&v| f64::from(v)).sum::<f64>() / 4096.0;
    let exact = 0.999f64.powi(STEPS);
    // A mean of 4096, each of which has about 5 % of noise: five standard errors.
    assert!((mean - exact).abs() < 0.005 * exact, "{mean}, expected {exact}");
    let nearest = (0..STEPS).fold(1.0f32, |v, _| bf16::from_f32(v * 0.999).to_f32());
    assert_eq!(nearest, 1.0, "rounded to nearest it stays where it was");
}

/// A table and two weights, read by a lookup, a product and elementwise: the values are those of bf16 exactly, so that in
/// f32 only the order of sums may differ from the interpreter's.
#[test]
fn weights_are_read_as_they_are() {
    let build = |g: &Graph| {
        let (table, weight) = (g.state("table", &[50, 33], ZERO), g.state("weight", &[17, 33], ZERO));
        let ids = g.input("ids50", &[40], DType::I32);
        let rows = table.gather(ids) + table.slice(0, 0, 40);
        let embeddings = rows.matmul(weight.t());
        g.output("embeddings", embeddings);
        let stacked = Tensor::concat(&[weight, weight * 2.0], 0).expect("alike");
        g.output("stacked", stacked);
    };
    let kept = named(&["table", "weight"]);
    let mut case = Case::new(6, |g, _| build(g));
    for values in case.values.values_mut() {
        values.iter_mut().for_each(|v| *v = bf16::from_f64(*v).to_f64());
    }
    let expected = case.expected();
    for (threads, isa) in ways() {
        let got = run(&case, &kept, threads, isa, &[1]);
        // Cotangents are not among the values that were rounded.
        for name in ["embeddings", "stacked"] {
            let close = |(e, g): (&f64, &f32)| (e - f64::from(*g)).abs() <= 1e-4 * e.abs().max(1.0);
            assert!(expected[name].iter().zip(&got[name]).all(close), "{name}, {threads} threads, {isa:?}");
        }
    }
    // In mixed precision the product reads the weight itself: nothing as large as it is written but its gradient.
    let mixed = Case::new(6, |g, _| build(g)).forward_only().bf16(&["embeddings"]);
    assert_eq!(mixed.precision, Precision::Bf16);
    let plan = plan(&mixed, &kept);
    let product = plan.kernels.iter().find_map(|k| match k {
        Kernel::Own { op: clip_host_plugin_api::ir::Op::Matmul, inputs, .. } => Some(inputs[1].source),
        _ => None,
    });
    assert!(product.is_some_and(|source| plan.leaves.contains(&source)), "{product:?}");
    let one = run(&mixed, &kept, 1, Isa::detect(), &[1]);
    let scale = expected["embeddings"].iter().fold(0.0f64, |most, v| most.max(v.abs()));
    let close = |(e, g): (&f64, &f32)| (e - f64::from(*g)).abs() <= 1e-2 * scale;
    assert!(expected["embeddings"].iter().zip(&one["embeddings"]).all(close));
}

/// Beyond 65504 f16 is infinite, and what is smaller than half of 2⁻²⁴ is 0: the reason for a scaled loss.
#[test]
fn f16_overflows() {
    let mut case = Case::new(7, |g, _| {
        let (x, y) = (g.input("x", &[8, 64], DType::F32), g.input("y", &[64, 8], DType::F32));
        let product = x.matmul(y);
        g.output("embeddings", product.matmul(g.input("z", &[8, 8], DType::F32)));
    })
    .forward_only()
    .fp16(&["embeddings"]);
    for (x, expected) in [(1025.0, f64::INFINITY), (1023.0, 1023.0 * 64.0 * 8.0), (1e-9, 0.0)] {
        case.values.insert("x".into(), vec![x; 8 * 64]);
        case.values.insert("y".into(), vec![1.0; 64 * 8]);
        case.values.insert("z".into(), vec![1.0; 64]);
        let got = case.run(&pool(1, Isa::detect()));
        assert!(got["embeddings"].iter().all(|&v| f64::from(v) == expected), "{x}: {:?}", got["embeddings"]);
    }
}
