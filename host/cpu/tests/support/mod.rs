//! Compiled programs against the reference interpreter: the same fragment, differentiated by the same rules, run by the
//! fused plan in f32 and node by node in f64.
#![allow(dead_code)]

use clip_host_compiler::layout::ChannelsLast;
use clip_host_compiler::plan::{Plan, compile_with};
use clip_host_compiler::precision::{BOUNDARY, Precision};
use clip_host_graph::autograd::Autograd;
use clip_host_graph::program::Program;
use clip_host_plugin_api::gradient::differentiate;
use clip_host_plugin_api::graph::Graph;
use clip_host_plugin_api::interpret::interpret;
use clip_host_plugin_api::ir::{DType, Fragment, Layout, Node, NodeId, Op};
use std::collections::HashMap;

/// A small random number generator (SplitMix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        clip_host_plugin_api::interpret::mix(self.0)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
    /// In [-1, 1), rounded to f32.
    pub fn symmetric(&mut self) -> f64 {
        f64::from(((self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0) as f32)
    }
    pub fn shape(&mut self, rank: usize) -> Vec<usize> {
        (0..rank).map(|_| self.pick(&[1, 2, 3, 4, 5, 7, 8, 9])).collect()
    }
}

/// What to check of a fragment.
pub struct Case {
    pub fragment: Fragment,
    pub values: HashMap<String, Vec<f64>>,
    pub gradients: bool,
    pub channels_last: bool,
    pub precision: Precision,
    /// Outputs that are the towers' ends.
    pub boundaries: Vec<&'static str>,
    pub tolerance: f64,
    pub seed: u64,
}

/// Name of a leaf.
fn leaf_name(node: &Node) -> Option<&str> {
    match &node.op {
        Op::Input { name } | Op::Param { name, .. } | Op::State { name, .. } => Some(name),
        _ => None,
    }
}

/// Values of a leaf by its name: `pos…` is positive, `ids<n>…` an id below n.
fn leaf_values(node: &Node, name: &str, rng: &mut Rng) -> Vec<f64> {
    let bound = name.strip_prefix("ids").map(|rest| {
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<usize>().unwrap_or(1)
    });
    (0..node.elements())
        .map(|_| match bound {
            Some(bound) => rng.below(bound) as f64,
            None if name.starts_with("pos") => f64::from((0.5 + rng.symmetric().abs() * 1.5) as f32),
            None => rng.symmetric() * 2.0,
        })
        .collect()
}

impl Case {
    /// A case with random values for every leaf.
    pub fn new(seed: u64, build: impl FnOnce(&Graph, &mut Rng)) -> Case {
        let mut rng = Rng(seed.wrapping_mul(0x1234_5678_9abc_def1) ^ 77);
        let graph = Graph::new();
        build(&graph, &mut rng);
        let fragment = graph.finish().unwrap_or_else(|e| panic!("the case does not build: {e}"));
        let mut values = HashMap::new();
        for node in &fragment.nodes {
            if let Some(name) = leaf_name(node) {
                values.insert(name.to_string(), leaf_values(node, name, &mut rng));
            }
        }
        let channels_last = fragment.nodes.iter().any(|n| match &n.op {
            Op::Conv2d(c) => c.layout == Layout::Nchw,
            Op::MaxPool2d(p) | Op::AvgPool2d(p) => p.layout == Layout::Nchw,
            _ => false,
        });
        Case {
            fragment,
            values,
            gradients: true,
            channels_last,
            precision: Precision::F32,
            boundaries: vec![],
            tolerance: 1e-4,
            seed,
        }
    }

    pub fn forward_only(mut self) -> Case {
        self.gradients = false;
        self
    }

    pub fn tolerance(mut self, tolerance: f64) -> Case {
        self.tolerance = tolerance;
        self
    }

    /// In mixed precision, with towers that end in these outputs.
    pub fn bf16(mut self, boundaries: &[&'static str]) -> Case {
        self.precision = Precision::Bf16;
        self.boundaries = boundaries.to_vec();
        self
    }

    /// As [`Case::bf16`], with f16.
    pub fn fp16(self, boundaries: &[&'static str]) -> Case {
        Case { precision: Precision::Fp16, ..self.bf16(boundaries) }
    }

    /// The fragment with an input of cotangents for each output, and its seeds.
    fn seeded(&self) -> (Fragment, Vec<(NodeId, NodeId)>, Vec<NodeId>) {
        let mut fragment = self.fragment.clone();
        let mut seeds = Vec::new();
        for (name, id) in &self.fragment.outputs {
            let shape = fragment.nodes[*id as usize].shape.clone();
            let op = Op::Input { name: format!("cotangent.{name}") };
            seeds.push((*id, fragment.nodes.len() as NodeId));
            fragment.nodes.push(Node { op, inputs: vec![], shape, dtype: DType::F32 });
        }
        let wrt = (0..self.fragment.nodes.len() as NodeId)
            .filter(|&id| {
                let node = &fragment.nodes[id as usize];
                leaf_name(node).is_some() && node.dtype == DType::F32
            })
            .collect();
        (fragment, seeds, wrt)
    }

    pub fn all_values(&self) -> HashMap<String, Vec<f64>> {
        let mut values = self.values.clone();
        let mut rng = Rng(self.seed ^ 0xc07a);
        if self.gradients {
            for (name, id) in &self.fragment.outputs {
                let elements = self.fragment.nodes[*id as usize].elements();
                values.insert(format!("cotangent.{name}"), (0..elements).map(|_| rng.symmetric()).collect());
            }
        }
        values
    }

    /// Results by name: outputs, `grad.<i>`, and `state.<name>` for updated states.
    pub fn expected(&self) -> HashMap<String, Vec<f64>> {
        let fragment = match self.gradients {
            true => {
                let (fragment, seeds, wrt) = self.seeded();
                differentiate(&fragment, &seeds, &wrt).unwrap_or_else(|e| panic!("no gradient: {e}"))
            }
            false => self.fragment.clone(),
        };
        let all = interpret(&fragment, &self.all_values(), self.seed).unwrap_or_else(|e| panic!("interpreter: {e}"));
        let mut results: HashMap<String, Vec<f64>> =
            fragment.outputs.iter().map(|(name, id)| (name.clone(), all[*id as usize].clone())).collect();
        for &(state, value) in &fragment.updates {
            let name = leaf_name(&fragment.nodes[state as usize]).unwrap_or_default();
            results.insert(format!("state.{name}"), all[value as usize].clone());
        }
        results
    }

    /// Compiles the fragment, with its gradients if wanted.
    pub fn plan(&self) -> Plan {
        let mut program = self.program();
        compile_with(&mut program, self.precision)
            .unwrap_or_else(|e| panic!("compile: {e}\n{}", self.fragment.to_text()))
    }

    /// The program before compilation.
    pub fn program(&self) -> Program {
        let mut program = Program::default();
        let (fragment, seeds, wrt) = match self.gradients {
            true => self.seeded(),
            false => (self.fragment.clone(), vec![], vec![]),
        };
        let spliced = program
            .splice(&fragment, "the case", &HashMap::new(), |_, name| name.to_string())
            .unwrap_or_else(|e| panic!("splice: {e}"));
        let at = |id: NodeId| spliced.nodes[id as usize];
        for (name, id) in &fragment.outputs {
            program.outputs.push((name.clone(), at(*id)));
        }
        for name in &self.boundaries {
            let end = fragment.output(name).unwrap_or_else(|| panic!("no output {name}"));
            program.outputs.push((BOUNDARY.into(), at(end)));
        }
        let named = program.outputs.len();
        // What autograd needs follows the passes as further outputs.
        for &(output, cotangent) in &seeds {
            program.outputs.push(("seed".into(), at(output)));
            program.outputs.push(("cotangent".into(), at(cotangent)));
        }
        program.outputs.extend(wrt.iter().map(|&w| ("wrt".to_string(), at(w))));
        if self.channels_last {
            program.run("channels_last", ChannelsLast).unwrap_or_else(|e| panic!("{e}"));
        }
        let extra: Vec<_> = program.outputs.drain(named..).map(|o| o.1).collect();
        if self.gradients {
            let (pairs, wrt) = extra.split_at(2 * seeds.len());
            let seeds = pairs.chunks(2).map(|p| (p[0], Some(p[1]))).collect();
            let autograd = Autograd::new(seeds, wrt.to_vec());
            program.run("autograd", &autograd).unwrap_or_else(|e| panic!("{e}"));
            let grads = autograd.take().expect("autograd ran").unwrap_or_else(|e| panic!("{e}")).grads;
            program.outputs.extend(grads.into_iter().enumerate().map(|(i, g)| (format!("grad.{i}"), g)));
        }
        program
    }

    fn same_bits(&self, a: &HashMap<String, Vec<f32>>, b: &HashMap<String, Vec<f32>>, what: &str) {
        for (name, values) in a {
            let differs = values.iter().zip(&b[name]).position(|(x, y)| x.to_bits() != y.to_bits());
            if let Some(i) = differs {
                self.explain();
                panic!("{what}: `{name}`[{i}] is {} and was {}", b[name][i], values[i]);
            }
        }
    }

    /// Prints the fragment and its plan.
    pub fn explain(&self) {
        let plan = self.plan();
        for (id, node) in plan.nodes.iter().enumerate() {
            println!("%{id} = {:?} {:?} {:?}", node.op, node.inputs, node.shape);
        }
        for kernel in &plan.kernels {
            println!("{kernel:?}");
        }
        println!("places {:?}\noutputs {:?}", plan.places, plan.outputs);
    }

    pub fn compare(&self, expected: &HashMap<String, Vec<f64>>, got: &HashMap<String, Vec<f32>>, what: &str) {
        for (name, expected) in expected {
            let got = got.get(name).unwrap_or_else(|| panic!("`{name}` was not computed"));
            assert_eq!(got.len(), expected.len(), "{name}");
            let scale = expected.iter().filter(|v| v.is_finite()).fold(1.0f64, |m, v| m.max(v.abs()));
            for (i, (&e, &g)) in expected.iter().zip(got).enumerate() {
                let close = (f64::from(g) - e).abs() <= self.tolerance * scale
                    || f64::from(g) == e
                    || (e.is_nan() && g.is_nan())
                    || (e.abs() > 1e30 && !g.is_finite());
                if !close {
                    self.explain();
                    panic!("{what}, case {}: `{name}`[{i}] is {g}, expected {e} (scale {scale})", self.seed);
                }
            }
        }
    }
}

// The crate under test brings its backend: `impl Case { pub fn check(&self) }` and what else its tests need.
include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/backend/mod.rs"));
