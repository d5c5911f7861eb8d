//! No wrong schedule passes the verifier: small random changes of right ones are refused, or change nothing.

use clip_host_compiler::plan::{Plan, compile, compile_with};
use clip_host_compiler::precision::Precision;
use clip_host_cuda::launch::{Argument, Schedule, Work};
use clip_host_cuda::library::{Libraries, Ready};
use clip_host_cuda::schedule::schedule;
use clip_host_cuda::verify::verify;
use clip_host_cuda_driver::{blas::Gemm, dnn::Conv};
use clip_host_graph::program::Program;
use clip_host_plugin_api::graph::{Graph, Tensor};
use clip_host_plugin_api::interpret::mix;
use clip_host_plugin_api::ir::{Conv as ConvOp, DType, Init, Layout, Op};
use std::collections::HashMap;

/// Libraries that take everything, with a workspace, or nothing.
struct Taken(bool);

impl Libraries for Taken {
    fn product(&self, _: &Gemm) -> Option<Ready> {
        self.0.then_some(Ready { number: 0, workspace: 512 })
    }
    fn convolution(&self, _: &Conv) -> Option<Ready> {
        self.0.then_some(Ready { number: 0, workspace: 256 })
    }
}

/// Something of everything that plans hold: products of two operands of one size, a convolution, tables, parts that
/// are joined, reductions of every kind with results of one size, states updated in place.
fn plan(precision: Precision) -> Plan {
    let g = Graph::new();
    let x = g.input("x", &[512, 48], DType::F32);
    let (one, other) =
        (g.param("one", &[48, 48], Init::Constant(0.0)), g.param("other", &[48, 48], Init::Constant(0.0)));
    let state = g.state("state", &[512, 48], Init::Constant(0.0));
    let y = x.matmul(one).softmax();
    g.update(state, state * 0.9 + y);
    g.output("squares", one.matmul(other));
    g.output("columns", y.sum(&[0], false));
    g.output("peaks", y.max(&[0], false));
    g.output("total", (y * y).sum_all());
    g.output("apart", (y - x).sum_all());
    g.output("turned", y.t() * 2.0);
    g.output("below", Tensor::concat(&[x, y], 0).expect("two parts").softmax());
    g.output("beside", Tensor::concat(&[x, y], 1).expect("two parts").softmax());
    let ids = g.input("ids", &[64], DType::I32);
    let table = g.state("table", &[100, 48], Init::Constant(0.0));
    let rows = table.gather(ids);
    g.update(table, table.scatter(ids, rows * 0.5));
    let images = g.input("images", &[2, 8, 8, 16], DType::F32);
    let filters = g.param("filters", &[16, 16, 3, 3], Init::Constant(0.0));
    let layout = Layout::Nhwc;
    let conv = ConvOp { stride: [1, 1], padding: [1, 1], dilation: [1, 1], groups: 1, layout };
    let convolved = images.conv2d(filters, conv);
    g.output("dx", g.push(Op::Conv2dInputGrad(conv), &[convolved, filters], &images.shape(), DType::F32));
    g.output("dw", g.push(Op::Conv2dWeightGrad(conv), &[images, convolved], &filters.shape(), DType::F32));
    let fragment = g.finish().expect("the program builds");
    let mut program = Program::default();
    let spliced = program.splice(&fragment, "a test", &HashMap::new(), |_, name| name.into()).expect("it is spliced");
    let at = |id: u32| spliced.nodes[id as usize];
    program.outputs.extend(fragment.outputs.iter().map(|(name, id)| (name.clone(), at(*id))));
    match precision {
        Precision::F32 => compile(&mut program),
        other => compile_with(&mut program, other),
    }
    .expect("it compiles")
}

/// What a machine sees. A workspace may lie anywhere in scratch: that nothing else lies there is checked; how long it must be
/// only the library knows.
fn seen(schedule: &Schedule) -> Vec<(Work, usize)> {
    let mut work = schedule.work.clone();
    for (work, _) in &mut work {
        let workspace = if matches!(work, Work::Launch(_)) { usize::MAX } else { 3 };
        let held = arguments(work);
        if let Some(argument) = held.get_mut(workspace) {
            (argument.at.offset, argument.bytes) = (0, 0);
        }
        // What addresses are held against; no machine sees it.
        held.iter_mut().for_each(|a| a.align = 1);
    }
    work
}

fn arguments(work: &mut Work) -> &mut Vec<Argument> {
    match work {
        Work::Launch(launch) => &mut launch.arguments,
        Work::Product(product) => &mut product.arguments,
        Work::Convolution(convolution) => &mut convolution.arguments,
    }
}

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.0) % n.max(1) as u64) as usize
    }
}

/// One small change, and what it was.
fn mutate(schedule: &mut Schedule, rng: &mut Rng) -> String {
    let count = schedule.work.len();
    let (one, other) = (rng.below(count), rng.below(count));
    let step = [2, 4, 16, 64, 256, 1024][rng.below(6)];
    let kind = rng.below(9);
    let foreign = schedule.work[other].0.arguments()[0];
    let number = rng.below(schedule.work[one].0.arguments().len());
    let with = rng.below(schedule.work[one].0.arguments().len());
    let held = arguments(&mut schedule.work[one].0);
    match kind {
        0 => held[number].at.offset += step,
        1 => held[number].at.offset = held[number].at.offset.saturating_sub(step),
        2 => held[number].bytes += step,
        3 => held[number].bytes = held[number].bytes.saturating_sub(step),
        4 => held.swap(number, with),
        5 => {
            let (a, b) = (held[number].at, held[with].at);
            (held[number].at, held[with].at) = (b, a);
        }
        6 => held[number] = Argument { access: held[number].access, ..foreign },
        7 => schedule.work.swap(one, other),
        _ => drop(schedule.work.remove(one)),
    }
    format!("change {kind} of work {one}, argument {number} (by {step}; with work {other}, argument {with})")
}

#[test]
fn wrong_schedules_are_refused() {
    for (precision, libraries) in [Precision::F32, Precision::Bf16].into_iter().flat_map(|p| [(p, false), (p, true)]) {
        let plan = plan(precision);
        let right = schedule(&plan, &Taken(libraries)).expect("it is scheduled");
        assert_eq!(verify(&plan, &right), Ok(()));
        let mut rng = Rng(precision as u64 * 2 + u64::from(libraries));
        let mut refused = 0;
        for _ in 0..4000 {
            let mut wrong = right.clone();
            let what = mutate(&mut wrong, &mut rng);
            match verify(&plan, &wrong) {
                Err(_) => refused += 1,
                Ok(()) => assert!(
                    seen(&wrong) == seen(&right),
                    "{precision:?}, libraries {libraries}: {what} passes: {:?}",
                    wrong.work.iter().zip(&right.work).find(|(a, b)| a != b)
                ),
            }
        }
        assert!(refused > 3000, "{refused} of 4000 changes were refused");
    }
}
