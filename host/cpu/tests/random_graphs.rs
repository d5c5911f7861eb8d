//! Randomly composed graphs: shared values, several outputs, movement between everything. What fusion gets wrong shows
//! here first.

mod support;

use clip_host_plugin_api::graph::{Graph, Tensor, broadcast_shapes};
use clip_host_plugin_api::ir::{DType, Init};
use support::{Case, Rng};

/// Limits of a random graph.
struct Limits {
    steps: usize,
    sizes: &'static [usize],
    elements: usize,
    /// Movement by slices, pads and concatenation as well.
    movement: bool,
}

struct Maker<'g, 'r> {
    g: &'g Graph,
    rng: &'r mut Rng,
    limits: &'r Limits,
    values: Vec<Tensor<'g>>,
    leaves: usize,
}

fn elements(shape: &[usize]) -> usize {
    shape.iter().product()
}

impl<'g> Maker<'g, '_> {
    fn leaf(&mut self, shape: &[usize]) -> Tensor<'g> {
        self.leaves += 1;
        let name = format!("x{}", self.leaves);
        match self.rng.below(3) {
            0 => self.g.param(&name, shape, Init::Constant(0.0)),
            1 => self.g.state(&name, shape, Init::Constant(0.0)),
            _ => self.g.input(&name, shape, DType::F32),
        }
    }

    fn shape(&mut self) -> Vec<usize> {
        loop {
            let rank = self.rng.below(4) + 1;
            let shape: Vec<usize> = (0..rank).map(|_| self.rng.pick(self.limits.sizes)).collect();
            if elements(&shape) <= self.limits.elements {
                return shape;
            }
        }
    }

    /// A value; recent ones more often.
    fn any(&mut self) -> Tensor<'g> {
        let n = self.values.len();
        let back = self.rng.below(n).min(self.rng.below(n));
        self.values[n - 1 - back]
    }

    /// A value that broadcasts with `t`.
    fn partner(&mut self, t: Tensor<'g>) -> Tensor<'g> {
        let shape = t.shape();
        for _ in 0..6 {
            let other = self.any();
            let fits = broadcast_shapes(&shape, &other.shape());
            if fits.is_some_and(|s| elements(&s) <= self.limits.elements && s.len() <= 5) {
                return other;
            }
        }
        // A leaf of a part of the shape: a vector for the rows, the columns or anything between.
        let small: Vec<usize> = shape.iter().map(|&n| if self.rng.below(2) == 0 { 1 } else { n }).collect();
        self.leaf(&small)
    }

    fn step(&mut self) -> Tensor<'g> {
        let t = self.any();
        let shape = t.shape();
        let rank = shape.len();
        let axis = self.rng.below(rank) as isize;
        match self.rng.below(if self.limits.movement { 26 } else { 15 }) {
            0 => t.tanh(),
            1 => t.sin() * 1.5,
            2 => (t * 0.5).abs(),
            3 => (t.tanh() * 0.7).exp(),
            4 => (t.square() + 0.5).sqrt(),
            5 => t.relu() - 0.3,
            6 => t.gelu(),
            7 | 8 => {
                let other = self.partner(t);
                t + other
            }
            9 => {
                let other = self.partner(t);
                t * other.tanh()
            }
            10 => {
                let other = self.partner(t);
                other - t * 0.7
            }
            11 | 12 if rank > 0 => {
                let axes: Vec<isize> = (0..rank as isize).filter(|_| self.rng.below(2) == 0).collect();
                let keep = self.rng.below(2) == 0 || axes.len() == rank;
                // Maxima that tie in f32 only would have another gradient.
                if self.rng.below(3) == 0 { t.max(&axes, keep).detach() } else { t.mean(&axes, keep) }
            }
            13 if rank > 0 => match self.rng.below(4) {
                0 => t.softmax(),
                1 => t.log_softmax() * 0.3,
                2 => (t - t.mean(&[-1], true)) / ((t.square()).mean(&[-1], true) + 0.3).sqrt(),
                _ => t / (t.square().sum(&[-1], true).sqrt() + 0.2),
            },
            14 if rank > 0 => {
                let mask = self.g.iota(&shape, axis as usize).lt((shape[axis as usize] / 2) as f64);
                mask.where_(t, t * 0.25)
            }
            15 | 16 => {
                let mut axes: Vec<usize> = (0..rank).collect();
                for i in (1..rank).rev() {
                    axes.swap(i, self.rng.below(i + 1));
                }
                t.permute(&axes)
            }
            17 => t.reshape(&[elements(&shape)]),
            18 if rank < 5 => {
                // Splits a dimension.
                let n = shape[axis as usize];
                let divisors: Vec<usize> = (1..=n).filter(|d| n.is_multiple_of(*d)).collect();
                let d = self.rng.pick(&divisors);
                let mut new = shape.clone();
                new.splice(axis as usize..axis as usize + 1, [d, n / d]);
                t.reshape(&new)
            }
            19 if rank > 1 => {
                let mut new = shape.clone();
                let at = self.rng.below(rank - 1);
                let joined = new[at] * new[at + 1];
                new.splice(at..at + 2, [joined]);
                t.reshape(&new)
            }
            20 if rank > 0 => {
                let n = shape[axis as usize];
                let start = self.rng.below(n);
                t.slice(axis, start, start + 1 + self.rng.below(n - start))
            }
            21 if rank > 0 && elements(&shape) * 3 <= self.limits.elements => {
                let (before, after) =
                    (0..rank).map(|_| (self.rng.below(2), self.rng.below(2))).unzip::<_, _, Vec<_>, Vec<_>>();
                let padded: usize = (0..rank).map(|d| shape[d] + before[d] + after[d]).product();
                if padded <= self.limits.elements { t.pad(&before, &after, 0.25) } else { t.tanh() }
            }
            22 if rank > 0 && elements(&shape) * 2 <= self.limits.elements => {
                Tensor::concat(&[t, t.tanh()], axis as usize).unwrap_or(t)
            }
            23 if rank > 1 => {
                let k = shape[rank - 1];
                let b = self.leaf(&[k, 1 + k % 7]);
                t.matmul(b) * (1.0 / k as f64)
            }
            24 if rank > 1 && shape[rank - 2].pow(2) * elements(&shape[..rank - 2]) <= self.limits.elements => {
                t.matmul(t.t()) * (0.3 / shape[rank - 1] as f64)
            }
            25 if rank < 5 && elements(&shape) * 3 <= self.limits.elements => {
                t.unsqueeze(axis).expand_to(&[&shape[..axis as usize], &[3], &shape[axis as usize..]].concat())
            }
            _ => {
                let other = self.partner(t);
                t * 0.5 - other * 0.25
            }
        }
    }
}

fn random_graph(g: &Graph, rng: &mut Rng, limits: &Limits) {
    let mut maker = Maker { g, rng, limits, values: vec![], leaves: 0 };
    for _ in 0..2 {
        let shape = maker.shape();
        let leaf = maker.leaf(&shape);
        maker.values.push(leaf);
    }
    for _ in 0..limits.steps {
        let t = maker.step();
        maker.values.push(t);
    }
    let count = 1 + maker.rng.below(4);
    for i in 0..count {
        let t = maker.any();
        g.output(&format!("y{i}"), t);
    }
    // States take new values, which may be computed from other states' old ones.
    let mut states: Vec<Tensor> = Vec::new();
    for id in 0..maker.values[maker.values.len() - 1].id() {
        let t = g.tensor(id);
        if matches!(g.node(t).op, clip_host_plugin_api::ir::Op::State { .. }) {
            states.push(t);
        }
    }
    for state in states {
        let shape = state.shape();
        let fitting: Vec<Tensor> = maker.values.iter().copied().filter(|v| v.shape() == shape).collect();
        match maker.rng.below(3) {
            0 if !fitting.is_empty() => g.update(state, maker.rng.pick(&fitting)),
            1 => g.update(state, state * 0.9 + 0.1),
            _ => {}
        }
    }
}

fn runs(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let first = number("GRAPH_FIRST").unwrap_or(0);
    first..first + number("GRAPH_RUNS").unwrap_or(default)
}

fn check(limits: Limits, default_runs: u64, salt: u64) {
    for seed in runs(default_runs) {
        let case = Case::new(seed ^ salt, |g, rng| random_graph(g, rng, &limits)).tolerance(1e-3);
        let case = if seed % 3 == 0 { case.forward_only() } else { case };
        println!("seed {seed}");
        case.check();
    }
}

#[test]
fn pointwise_and_reductions() {
    check(Limits { steps: 14, sizes: &[1, 2, 3, 4, 5, 7, 16], elements: 2000, movement: false }, 150, 0x100_0000);
}

#[test]
fn everything_small() {
    check(Limits { steps: 16, sizes: &[1, 2, 3, 4, 6, 8], elements: 1500, movement: true }, 250, 0x200_0000);
}

#[test]
fn everything_large() {
    check(Limits { steps: 10, sizes: &[1, 2, 4, 6, 32, 96, 1200], elements: 40_000, movement: true }, 40, 0x300_0000);
}

#[test]
fn pointwise_and_reductions_large() {
    check(Limits { steps: 12, sizes: &[1, 2, 64, 96, 1500], elements: 60_000, movement: false }, 30, 0x400_0000);
}
