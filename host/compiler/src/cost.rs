//! What a kernel costs at least: the arithmetic that it does and the memory that it has to read and write, from the plan.

use crate::kernel::{Fused, Input, Instr, Kernel, Operand, Pattern, Rank, Store};
use crate::plan::{Place, Plan};
use clip_host_plugin_api::ir::{Binary, NodeId, Op, Unary};
use std::collections::BTreeMap;
use std::ops::AddAssign;

/// Arithmetic and memory traffic of one run of a kernel.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations. Products and convolutions: a multiplication and an addition for each term, padding
    /// included. Fused kernels: one for each arithmetic instruction and element, whatever the instruction.
    pub flops: f64,
    /// How many of them are transcendental functions or random draws, by name: each takes as long as tens of additions.
    pub dear: BTreeMap<&'static str, f64>,
    /// Bytes of distinct elements read: what would have to come from memory if the caches were empty.
    pub read: u64,
    /// Bytes written.
    pub written: u64,
}

impl Cost {
    /// Bytes read and written.
    pub fn bytes(&self) -> u64 {
        self.read + self.written
    }
}

impl AddAssign<&Cost> for Cost {
    fn add_assign(&mut self, other: &Cost) {
        self.flops += other.flops;
        self.read += other.read;
        self.written += other.written;
        for (name, count) in &other.dear {
            *self.dear.entry(name).or_default() += count;
        }
    }
}

/// What sort of work a kernel does: kernels of one sort are limited by the same thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Conv,
    ConvInputGrad,
    ConvWeightGrad,
    Matmul,
    Pool,
    /// Batch statistics.
    Moments,
    /// Elementwise operations and reductions, fused.
    Fused,
    /// Rows of tables: gather and scatter.
    Table,
    /// Copies, pads and concatenations.
    Copy,
}

impl Kind {
    /// All kinds, products first.
    pub const ALL: [Kind; 9] = [
        Kind::Conv,
        Kind::ConvInputGrad,
        Kind::ConvWeightGrad,
        Kind::Matmul,
        Kind::Pool,
        Kind::Moments,
        Kind::Fused,
        Kind::Table,
        Kind::Copy,
    ];

    /// The kind of a kernel.
    pub fn of(kernel: &Kernel) -> Kind {
        match kernel {
            Kernel::Fused(_) => Kind::Fused,
            Kernel::Copy { .. } | Kernel::Store { .. } => Kind::Copy,
            Kernel::Own { op, .. } => match op {
                Op::Conv2d(_) => Kind::Conv,
                Op::Conv2dInputGrad(_) => Kind::ConvInputGrad,
                Op::Conv2dWeightGrad(_) => Kind::ConvWeightGrad,
                Op::Matmul => Kind::Matmul,
                Op::MaxPool2d(_) | Op::MaxPool2dGrad(_) | Op::AvgPool2d(_) | Op::AvgPool2dGrad(_) => Kind::Pool,
                Op::Moments => Kind::Moments,
                Op::Gather | Op::Scatter | Op::ScatterAdd => Kind::Table,
                _ => Kind::Copy,
            },
        }
    }

    /// The name that plans and traces are printed with.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Conv => "conv",
            Kind::ConvInputGrad => "conv input grad",
            Kind::ConvWeightGrad => "conv weight grad",
            Kind::Matmul => "matmul",
            Kind::Pool => "pool",
            Kind::Moments => "moments",
            Kind::Fused => "fused",
            Kind::Table => "table",
            Kind::Copy => "copy",
        }
    }

    /// Whether it is limited by multiplications rather than by memory.
    pub fn is_product(self) -> bool {
        matches!(self, Kind::Conv | Kind::ConvInputGrad | Kind::ConvWeightGrad | Kind::Matmul)
    }
}

/// The cost of one of a plan's kernels.
pub fn cost(plan: &Plan, kernel: &Kernel) -> Cost {
    match kernel {
        Kernel::Fused(fused) => fused_cost(plan, fused),
        Kernel::Own { op, node, inputs, shape, moments } => {
            let mut cost = own_cost(plan, kernel, op, *node, inputs, shape);
            cost.written += moments.map_or(0, |m| plan.nodes[m as usize].elements() as u64 * size(plan, m));
            cost
        }
        Kernel::Copy { node: target, input } | Kernel::Store { leaf: target, value: input } => Cost {
            read: distinct(input) as u64 * size(plan, input.source),
            written: elements(input) as u64 * size(plan, *target),
            ..Cost::default()
        },
    }
}

/// Bytes of one element of a stored value.
fn size(plan: &Plan, id: NodeId) -> u64 {
    plan.storage[id as usize].bytes() as u64
}

fn fused_cost(plan: &Plan, fused: &Fused) -> Cost {
    let mut cost = Cost::default();
    let count = |rank: Rank| count(fused, rank);
    for (instr, rank) in &fused.code {
        // A reduction adds each of its operands once.
        let work = match instr {
            Instr::Load(_) | Instr::Const(_) | Instr::Index(_) | Instr::Expand(_) => continue,
            Instr::RowSum(value) | Instr::RowMax(value) => count(fused.code[*value].1),
            _ => count(*rank),
        };
        cost.flops += work as f64;
        if let Some(name) = dear(instr) {
            *cost.dear.entry(name).or_default() += work as f64;
        }
    }
    for output in &fused.outputs {
        if output.store != Store::Each {
            cost.flops += count(fused.code[output.value].1) as f64;
        }
        cost.written += plan.nodes[output.target as usize].elements() as u64 * size(plan, output.target);
    }
    let mut read: BTreeMap<NodeId, usize> = BTreeMap::new();
    for input in &fused.inputs {
        *read.entry(input.source).or_default() += points(fused, input);
    }
    for (source, points) in read {
        // Operands that read the same elements find them in a cache.
        cost.read += points.min(plan.nodes[source as usize].elements()) as u64 * size(plan, source);
    }
    cost
}

/// Values of a rank.
fn count(fused: &Fused, rank: Rank) -> usize {
    match rank {
        Rank::Scalar => 1,
        Rank::Row => fused.rows,
        Rank::Full => fused.rows * fused.cols,
    }
}

/// Elements of a fused kernel's operand without those that a broadcast repeats.
pub fn points(fused: &Fused, input: &Input) -> usize {
    match &input.pattern {
        Pattern::Same => count(fused, input.rank),
        Pattern::Column => fused.cols,
        Pattern::Strided(strides) => {
            let outer = fused.dims.len() - fused.inner;
            let dims = if input.rank == Rank::Full { &fused.dims[..] } else { &fused.dims[..outer] };
            dims.iter().zip(strides).filter(|d| *d.1 != 0).map(|d| d.0).product()
        }
    }
}

/// The name of an instruction that takes much longer than an addition.
fn dear(instr: &Instr) -> Option<&'static str> {
    match instr {
        Instr::Random(_) => Some("random"),
        Instr::Binary(op @ Binary::Pow, ..) => Some(Op::Binary(*op).name()),
        Instr::Unary(op, _) => match op {
            Unary::Exp | Unary::Ln | Unary::Tanh | Unary::Erf | Unary::Sin | Unary::Cos => Some(Op::Unary(*op).name()),
            Unary::Neg | Unary::Sqrt | Unary::Recip | Unary::Abs => None,
        },
        _ => None,
    }
}

fn own_cost(plan: &Plan, kernel: &Kernel, op: &Op, node: NodeId, inputs: &[Operand], shape: &[usize]) -> Cost {
    let out = shape.iter().product::<usize>() as u64;
    let element = size(plan, node);
    let read = |input: &Operand| distinct(input) as u64 * size(plan, input.source);
    let mut cost = Cost {
        flops: crate::plan::flops(kernel),
        read: inputs.iter().map(read).sum(),
        written: out * element,
        ..Cost::default()
    };
    match op {
        Op::MaxPool2d(pool) | Op::AvgPool2d(pool) => {
            cost.flops = out as f64 * (pool.kernel[0] * pool.kernel[1]) as f64;
        }
        // The gradient is the last operand, and each of its elements meets its window.
        Op::MaxPool2dGrad(pool) | Op::AvgPool2dGrad(pool) => {
            let grads = inputs.last().map_or(0, elements);
            cost.flops = (grads * pool.kernel[0] * pool.kernel[1]) as f64;
        }
        // Each element is added to its mean, and its square to the variance.
        Op::Moments => cost.flops = 3.0 * elements(&inputs[0]) as f64,
        Op::Gather => {
            let rows = out.min(elements(&inputs[0]) as u64);
            cost.read = rows * size(plan, inputs[0].source) + read(&inputs[1]);
        }
        Op::ScatterAdd => cost.flops = elements(&inputs[1]) as f64,
        // In place, only the rows are touched.
        Op::Scatter if in_place(plan, node, &inputs[0], 0) => {
            cost.read -= read(&inputs[0]);
            cost.written = elements(&inputs[2]) as u64 * element;
        }
        Op::Concat { axis } if shape[..*axis].iter().all(|&d| d == 1) => {
            let mut offset = 0;
            for input in inputs {
                let bytes = elements(input) * element as usize;
                if in_place(plan, node, input, offset) {
                    cost.read -= read(input);
                    cost.written -= bytes as u64;
                }
                offset += bytes;
            }
        }
        _ => {}
    }
    cost
}

/// Whether an operand is already where the result has it, `offset` bytes from its beginning.
fn in_place(plan: &Plan, node: NodeId, input: &Operand, offset: usize) -> bool {
    let (Some(to), Some(from)) = (plan.places.get(&node), plan.places.get(&input.source)) else { return false };
    let from = Place { offset: from.offset + input.offset * size(plan, input.source) as usize, ..*from };
    from == Place { offset: to.offset + offset, ..*to }
}

fn elements(operand: &Operand) -> usize {
    operand.dims.iter().map(|d| d.0).product()
}

/// Elements of an operand without those that a broadcast repeats.
pub fn distinct(operand: &Operand) -> usize {
    operand.dims.iter().filter(|d| d.1 != 0).map(|d| d.0).product()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::compile;
    use clip_host_graph::program::Program;
    use clip_host_plugin_api::graph::{Graph, Tensor};
    use clip_host_plugin_api::ir::{Conv, DType, Init, Layout, Pool};
    use std::collections::HashMap;

    /// Kind and cost of each kernel of a program.
    fn costs(build: impl FnOnce(&Graph)) -> Vec<(Kind, Cost)> {
        let graph = Graph::new();
        build(&graph);
        let fragment = graph.finish().unwrap();
        let mut program = Program::default();
        let spliced = program.splice(&fragment, "test", &HashMap::new(), |_, name| name.to_string()).unwrap();
        let outputs = fragment.outputs.iter().map(|(name, id)| (name.clone(), spliced.nodes[*id as usize]));
        program.outputs.extend(outputs);
        let plan = compile(&mut program).unwrap();
        plan.kernels.iter().map(|k| (Kind::of(k), cost(&plan, k))).collect()
    }

    fn of(flops: usize, read: usize, written: usize) -> Cost {
        Cost { flops: flops as f64, read: read as u64, written: written as u64, ..Cost::default() }
    }

    #[test]
    fn a_product_is_counted_exactly() {
        let got = costs(|g| {
            let (a, b) = (g.input("a", &[3, 5], DType::F32), g.input("b", &[5, 7], DType::F32));
            g.output("y", a.matmul(b));
        });
        assert_eq!(got, [(Kind::Matmul, of(2 * 3 * 5 * 7, 4 * (15 + 35), 4 * 21))]);
    }

    #[test]
    fn convolution_and_its_windows_are_counted_exactly() {
        let conv = Conv { stride: [1, 1], padding: [1, 1], dilation: [1, 1], groups: 2, layout: Layout::Nhwc };
        let pool =
            Pool { kernel: [2, 2], stride: [2, 2], padding: [0, 0], count_include_pad: true, layout: Layout::Nhwc };
        let got = costs(|g| {
            let x = g.input("x", &[2, 8, 8, 4], DType::F32);
            let weight = g.input("w", &[6, 2, 3, 3], DType::F32);
            g.output("y", x.conv2d(weight, conv).max_pool2d(pool));
        });
        let (x, weight, y, pooled) = (2 * 64 * 4, 6 * 18, 2 * 64 * 6, 2 * 16 * 6);
        assert_eq!(got[0], (Kind::Conv, of(2 * y * 18, 4 * (x + weight), 4 * y)));
        assert_eq!(got[1], (Kind::Pool, of(pooled * 4, 4 * y, 4 * pooled)));
        assert_eq!(got.len(), 2);
    }

    #[test]
    fn fused_kernels_count_instructions_and_distinct_elements() {
        let got = costs(|g| {
            let x = g.input("x", &[10, 64], DType::F32);
            let bias = g.input("bias", &[64], DType::F32);
            g.output("y", (x + bias).exp() * x);
        });
        // The bias is read once, not once for each row.
        let expected = Cost { dear: BTreeMap::from([("exp", 640.0)]), ..of(3 * 640, 4 * (640 + 64), 4 * 640) };
        assert_eq!(got, [(Kind::Fused, expected)]);
    }

    #[test]
    fn reductions_count_what_they_add() {
        let got = costs(|g| g.output("y", g.input("x", &[10, 64], DType::F32).square().sum(&[1], false)));
        assert_eq!(got, [(Kind::Fused, of(2 * 640, 4 * 640, 4 * 10))]);
        let got = costs(|g| g.output("y", g.input("x", &[10, 64], DType::F32).square().sum(&[0], false)));
        assert_eq!(got, [(Kind::Fused, of(2 * 640, 4 * 640, 4 * 64))]);
    }

    #[test]
    fn a_table_is_read_where_its_rows_are_asked_for() {
        let got = costs(|g| {
            let table = g.param("table", &[1000, 16], Init::Constant(0.0));
            g.output("y", table.gather(g.input("ids", &[5], DType::I32)));
        });
        assert_eq!(got, [(Kind::Table, of(0, 4 * (5 * 16 + 5), 4 * 5 * 16))]);
    }

    #[test]
    fn parts_computed_in_place_are_not_moved_again() {
        let got = costs(|g| {
            let (x, y) = (g.input("x", &[640], DType::F32), g.input("y", &[320], DType::F32));
            g.output("z", Tensor::concat(&[x.exp(), y], 0).unwrap());
        });
        let concat = got.iter().find(|k| k.0 == Kind::Copy).map(|k| k.1.clone());
        assert_eq!(concat, Some(of(0, 4 * 320, 4 * 320)));
    }

    #[test]
    fn costs_add_up() {
        let mut sum = Cost { dear: BTreeMap::from([("exp", 1.0)]), ..of(1, 2, 3) };
        sum += &Cost { dear: BTreeMap::from([("exp", 2.0), ("ln", 4.0)]), ..of(10, 20, 30) };
        assert_eq!(sum, Cost { dear: BTreeMap::from([("exp", 3.0), ("ln", 4.0)]), ..of(11, 22, 33) });
        assert_eq!(sum.bytes(), 55);
    }
}
