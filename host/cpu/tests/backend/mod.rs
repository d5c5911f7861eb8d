// The CPU as the backend of the shared cases.

use clip_host_cpu::{Executor, Store, ThreadPool};
use clip_host_cpu_kernels::Isa;
use std::sync::Arc;

impl Case {
    /// Runs the plan twice from the same start; the second results must be the first's to the bit.
    pub fn run(&self, pool: &Arc<ThreadPool>) -> HashMap<String, Vec<f32>> {
        let mut store = Store::default();
        let plan = self.plan();
        let names: Vec<String> = plan.outputs.iter().map(|o| o.0.clone()).collect();
        let mut executor = Executor::new(plan, pool.clone(), &mut store).unwrap_or_else(|e| panic!("prepare: {e}"));
        let mut results: Vec<HashMap<String, Vec<f32>>> = Vec::new();
        for _ in 0..2 {
            for (name, values) in self.all_values() {
                let floats: Vec<f32> = values.iter().map(|&v| v as f32).collect();
                if let Some(stored) = store.get_mut(&name) {
                    stored.copy_from_slice(&floats);
                } else if name.starts_with("ids") {
                    let integers: Vec<i32> = values.iter().map(|&v| v as i32).collect();
                    executor.set_i32(&name, &integers).unwrap_or_else(|e| panic!("{e}"));
                } else {
                    executor.set_f32(&name, &floats).unwrap_or_else(|e| panic!("{e}"));
                }
            }
            executor.run(&mut store, self.seed).unwrap_or_else(|e| panic!("run: {e}"));
            let mut result: HashMap<String, Vec<f32>> = names
                .iter()
                .map(|n| (n.clone(), executor.output(&store, n).unwrap_or_else(|| panic!("no output {n}"))))
                .collect();
            for &(state, _) in &self.fragment.updates {
                let name = leaf_name(&self.fragment.nodes[state as usize]).unwrap_or_default();
                // A state that keeps its value may not be read at all.
                let kept = || self.values[name].iter().map(|&v| v as f32).collect();
                result.insert(format!("state.{name}"), store.get(name).map_or_else(kept, <[f32]>::to_vec));
            }
            results.push(result);
        }
        let second = results.pop().unwrap_or_default();
        let first = results.pop().unwrap_or_default();
        self.same_bits(&first, &second, "a second run");
        first
    }

    /// The whole check: results on every instruction set, and the same bits for any number of threads.
    pub fn check(&self) {
        let expected = self.expected();
        let mut isas = vec![Isa::Portable];
        for isa in [Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16] {
            if Isa::detect() >= isa {
                isas.push(isa);
            }
        }
        for isa in isas {
            let one = self.run(&pool(1, isa));
            self.compare(&expected, &one, &format!("{isa:?}"));
            let three = self.run(&pool(3, isa));
            self.same_bits(&one, &three, "three threads");
        }
    }
}

/// Pools, made once in each thread.
pub fn pool(threads: usize, isa: Isa) -> Arc<ThreadPool> {
    thread_local! {
        static POOLS: std::cell::RefCell<HashMap<(usize, String), Arc<ThreadPool>>> = Default::default();
    }
    POOLS.with(|pools| {
        let key = (threads, format!("{isa:?}"));
        pools.borrow_mut().entry(key).or_insert_with(|| Arc::new(ThreadPool::with_isa(threads, isa))).clone()
    })
}
