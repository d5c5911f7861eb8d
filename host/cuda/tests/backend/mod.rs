// The emulator as the backend of the shared cases; with `CLIP_HOST_TEST_BACKEND=cuda` the GPU (`tests/gpu/run.py`).

use clip_host_cuda::{Executor, Machine, Store};
use clip_host_cuda_emulator::Emulator;
use std::sync::Arc;

/// Emulators of machines with and without the vendor's libraries, if they run here: one for each thread, since a machine has
/// one stream. They run new kernels with threads and blocks in other orders too. Or the GPU.
fn machines() -> Option<[Arc<dyn Machine>; 2]> {
    if std::env::var("CLIP_HOST_TEST_BACKEND").is_ok_and(|backend| backend == "cuda") {
        return Some(gpu());
    }
    thread_local! {
        static MACHINES: Option<[Arc<dyn Machine>; 2]> = match (Emulator::new(), Emulator::new()) {
            (Ok(with), Ok(without)) => {
                let without = without.without_libraries();
                Some([Arc::new(with.in_other_orders()), Arc::new(without.in_other_orders())])
            }
            (Err(error), _) | (_, Err(error)) => {
                eprintln!("skipped: {error}");
                None
            }
        };
    }
    MACHINES.with(Clone::clone)
}

/// The GPU, with the vendor's libraries and without. Who asks for it wants no test that passes without one.
fn gpu() -> [Arc<dyn Machine>; 2] {
    use clip_host_cuda::gpu::{Options, open_with};
    thread_local! {
        static GPU: [Arc<dyn Machine>; 2] = [true, false].map(|libraries| {
            open_with(0, Options { libraries, ..Options::default() }).unwrap_or_else(|error| panic!("{error}"))
        });
    }
    GPU.with(Clone::clone)
}

impl Case {
    /// Runs the plan three times from the same start (launch by launch, recorded, replayed): the results must be the same
    /// to the bit.
    pub fn run(&self, machine: &Arc<dyn Machine>) -> HashMap<String, Vec<f32>> {
        let mut store = Store::new(machine.clone());
        let plan = self.plan();
        let names: Vec<String> = plan.outputs.iter().map(|o| o.0.clone()).collect();
        let mut executor =
            Executor::new(plan, machine.clone(), &mut store).unwrap_or_else(|e| self.fail(&format!("prepare: {e}")));
        let mut results: Vec<HashMap<String, Vec<f32>>> = Vec::new();
        for _ in 0..3 {
            for (name, values) in self.all_values() {
                let floats: Vec<f32> = values.iter().map(|&v| v as f32).collect();
                if store.has(&name) {
                    store.set(&name, 0, &floats).unwrap_or_else(|e| panic!("{e}"));
                } else if name.starts_with("ids") {
                    let integers: Vec<i32> = values.iter().map(|&v| v as i32).collect();
                    executor.set_i32(&name, &integers).unwrap_or_else(|e| panic!("{e}"));
                } else {
                    executor.set_f32(&name, &floats).unwrap_or_else(|e| panic!("{e}"));
                }
            }
            executor.run(self.seed).unwrap_or_else(|e| self.fail(&format!("run: {e}")));
            let output = |name: &str| {
                let values = executor.output(name).unwrap_or_else(|e| panic!("{e}"));
                values.unwrap_or_else(|| panic!("no output {name}"))
            };
            let mut result: HashMap<String, Vec<f32>> = names.iter().map(|n| (n.clone(), output(n))).collect();
            for &(state, _) in &self.fragment.updates {
                let name = leaf_name(&self.fragment.nodes[state as usize]).unwrap_or_default();
                // A state that keeps its value may not be read at all.
                let kept = || self.values[name].iter().map(|&v| v as f32).collect();
                let values = store.get(name, 0, store.len(name).unwrap_or(0)).unwrap_or_else(|e| panic!("{e}"));
                result.insert(format!("state.{name}"), values.unwrap_or_else(kept));
            }
            results.push(result);
        }
        let last = results.pop().unwrap_or_default();
        for other in &results {
            self.same_bits(other, &last, "a later run");
        }
        last
    }

    fn fail(&self, why: &str) -> ! {
        self.explain();
        panic!("case {}: {why}", self.seed)
    }

    /// The whole check, where the emulator runs.
    pub fn check(&self) {
        let Some(machines) = machines() else { return };
        let expected = self.expected();
        // Every second case without libraries: what they take is otherwise never rendered.
        let machine = &machines[self.seed as usize % 2];
        self.compare(&expected, &self.run(machine), "the emulator");
    }
}
