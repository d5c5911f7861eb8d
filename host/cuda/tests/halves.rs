//! Persistent tensors in half precision on the GPU: rounded by seed, stream and element alone, to the same bits as on the CPU.

use clip_host_compiler::kept::{Halves, halves};
use clip_host_compiler::kernel::{Rounding, stochastic_bf16};
use clip_host_compiler::plan::{Plan, compile_kept};
use clip_host_compiler::precision::Precision;
use clip_host_cuda::{Executor, Machine, Store};
use clip_host_cuda_emulator::Emulator;
use clip_host_graph::program::Program;
use clip_host_plugin_api::graph::Graph;
use clip_host_plugin_api::interpret::word;
use clip_host_plugin_api::ir::{DType, Init};
use std::collections::HashMap;
use std::sync::Arc;

const ZERO: Init = Init::Constant(0.0);
const SEED: u64 = 11;

/// Large tensors, in pieces; values of rows; a value that is turned before it is stored.
fn step(g: &Graph) {
    let n = 3 * 1001;
    let (flat, moment) = (g.state("flat", &[n], ZERO), g.state("moment", &[n], ZERO));
    let gradient = g.input("gradient", &[n], DType::F32);
    let new = moment * 0.9 + gradient * 0.1;
    g.update(moment, new);
    g.update(flat, flat - new * 0.01);
    let (rows, table) = (g.state("rows", &[300], ZERO), g.state("table", &[40, 30], ZERO));
    let x = g.input("x", &[300, 70], DType::F32);
    g.update(rows, rows * 0.99 + x.square().mean(&[1], false));
    let turned = g.input("turned", &[30, 40], DType::F32);
    g.output("sum", (turned.t() * 1.1).sum_all());
    g.update(table, table * 0.3 + turned.t() * 1.1);
}

fn plan(kept: &Halves) -> Plan {
    let graph = Graph::new();
    step(&graph);
    let fragment = graph.finish().expect("the step builds");
    let mut program = Program::default();
    let spliced = program.splice(&fragment, "the step", &HashMap::new(), |_, name| name.into()).expect("it is spliced");
    let at = |id: u32| spliced.nodes[id as usize];
    program.outputs.extend(fragment.outputs.iter().map(|(name, id)| (name.clone(), at(*id))));
    compile_kept(&mut program, Precision::F32, kept).expect("it compiles")
}

/// What stays after a step, from values that bf16 has.
fn run(machine: &Arc<dyn Machine>, kept: &Halves) -> HashMap<&'static str, Vec<f32>> {
    let mut store = Store::new(machine.clone());
    let mut executor = Executor::new(plan(kept), machine.clone(), &mut store).expect("it is prepared");
    let value = |i: usize| f32::from_bits((((i * 37 % 113) as f32 - 50.5) * 0.37).to_bits() & 0xffff_0000);
    let values: Vec<f32> = (0..300 * 70 + 7).map(value).collect();
    for (name, len) in [("flat", 3003), ("moment", 3003), ("rows", 300), ("table", 1200)] {
        store.set(name, 0, &values[..len]).expect("it is set");
    }
    for (name, len) in [("gradient", 3003), ("x", 300 * 70), ("turned", 1200)] {
        executor.set_f32(name, &values[7..7 + len]).expect("it is set");
    }
    executor.run(SEED).expect("it runs");
    let names = ["flat", "moment", "rows", "table"];
    let values = |name| store.get(name, 0, store.len(name)?).expect("it is read");
    names.map(|name| (name, values(name).expect("it is there"))).into()
}

#[test]
fn new_values_are_rounded_as_on_the_cpu() {
    let machine: Arc<dyn Machine> = match (std::env::var("CLIP_HOST_TEST_BACKEND").as_deref(), Emulator::new()) {
        (Ok("cuda"), _) => clip_host_cuda::gpu::open(0).unwrap_or_else(|error| panic!("{error}")),
        (_, Ok(emulator)) => Arc::new(emulator),
        (_, Err(error)) => return eprintln!("skipped: {error}"),
    };
    let kept = halves(["flat", "moment", "rows", "table"].map(String::from));
    let rounded = plan(&kept).kernels.iter().any(|kernel| match kernel {
        clip_host_compiler::kernel::Kernel::Fused(f) => f.outputs.iter().any(|o| o.rounding != Rounding::Nearest),
        _ => false,
    });
    assert!(rounded);
    let (exact, got) = (run(&machine, &Halves::new()), run(&machine, &kept));
    for (name, stream) in &kept {
        let name = name.as_str();
        let expected =
            (0..).zip(&exact[name]).map(|(i, &v)| u32::from(stochastic_bf16(v, word(SEED, *stream, i))) << 16);
        for (i, (bits, value)) in expected.zip(&got[name]).enumerate() {
            let exact = exact[name][i];
            assert_eq!(bits, value.to_bits(), "{name}[{i}]: {exact:e} became {value:e}");
        }
        // Rounding at random is not rounding to nearest: the test would see the difference.
        let nearest = |v: f32| (v.to_bits() + 0x7fff + (v.to_bits() >> 16 & 1)) & 0xffff_0000;
        assert!(exact[name].iter().zip(&got[name]).any(|(e, g)| nearest(*e) != g.to_bits()), "{name}");
    }
}
