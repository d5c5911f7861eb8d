//! A fused kernel as CUDA C, in one of two forms.
//!
//! *Flat*: no reduction but those over everything. Threads take groups of neighbouring elements in turn.
//!
//! *Rows*: a group of `lanes` threads takes one row at a time; reductions over its columns end a pass over the row, and
//! the next pass computes again what it needs from operands that are still in the first cache. Reductions over rows are kept in
//! each thread's registers while it walks down its columns.
//!
//! Partial sums of blocks go to scratch and are added in the blocks' order by a second launch, so that results are the
//! same to the bit in every run.

use super::text::{Draft, Parameters, blocks, dot, index_type, literal};
use crate::launch::{Access, Address, Block, control};
use clip_host_compiler::kernel::{Element, Fused, Input, Instr, Output, Pattern, Rank, Reg, Rounding, Store};
use clip_host_compiler::lower::operands;
use clip_host_plugin_api::ir::{Binary, Compare, NodeId, Unary};
use std::collections::BTreeSet;
use std::fmt::Write;

/// Threads of a block.
const THREADS: usize = 256;
/// Blocks of a flat kernel at most: enough for any GPU, and each thread takes several groups.
const FLAT_BLOCKS: usize = 4096;
/// Blocks that reduce, each with a partial sum of its own.
const PARTIALS: usize = 1024;
/// Instructions from which a thread takes half as many elements at a time: registers are short.
const LONG: usize = 80;

/// Renders a kernel; `place` finds a value's memory, `scratch` is free for the kernel from its first byte on.
pub fn fused(kernel: &Fused, place: impl Fn(NodeId) -> Address) -> Vec<Draft> {
    let by_rows = kernel.has_row_reductions()
        || kernel.outputs.iter().any(|o| matches!(o.store, Store::SumRows { .. } | Store::MaxRows { .. }));
    let renderer = Renderer::new(kernel, &place, by_rows);
    if by_rows { renderer.rows() } else { renderer.flat() }
}

/// Elements that an input may reach from its offset on.
fn reach(kernel: &Fused, input: &Input) -> usize {
    match (&input.pattern, input.rank) {
        (_, Rank::Scalar) => 1,
        (Pattern::Same, Rank::Row) => kernel.rows,
        (Pattern::Same, Rank::Full) => kernel.rows * kernel.cols,
        (Pattern::Column, _) => kernel.cols,
        (Pattern::Strided(strides), _) => {
            let steps = kernel.dims.iter().zip(strides);
            steps.map(|(size, stride)| size.saturating_sub(1) * stride).sum::<usize>() + 1
        }
    }
}

/// Elements of an output.
fn written(kernel: &Fused, value: Reg, store: Store) -> usize {
    match store {
        Store::Each if kernel.code[value].1 == Rank::Row => kernel.rows,
        Store::Each => kernel.rows * kernel.cols,
        Store::SumRows { segment } | Store::MaxRows { segment } => kernel.rows / segment.max(1) * kernel.cols,
        Store::SumAll | Store::MaxAll => 1,
    }
}

struct Renderer<'a> {
    kernel: &'a Fused,
    inputs: Vec<Address>,
    outputs: Vec<Address>,
    /// Elements that a thread takes at once.
    vector: usize,
    /// Whether the space is one row of all elements: no coordinate is needed.
    linear: bool,
    index: &'static str,
    /// By register: how many row reductions come before it.
    phase: Vec<usize>,
    phases: usize,
}

/// What a partial result is joined with.
fn operation(store: Store) -> &'static str {
    match store {
        Store::MaxRows { .. } | Store::MaxAll => "Max",
        _ => "Sum",
    }
}

impl<'a> Renderer<'a> {
    fn new(kernel: &'a Fused, place: &impl Fn(NodeId) -> Address, by_rows: bool) -> Self {
        let inputs = kernel.inputs.iter().map(|i| place(i.source).plus(i.offset * i.dtype.bytes())).collect();
        let outputs = kernel.outputs.iter().map(|o| place(o.target)).collect();
        let mut phase: Vec<usize> = Vec::with_capacity(kernel.code.len());
        for (instr, _) in &kernel.code {
            let before = operands(instr).into_iter().map(|r| phase[r]).max().unwrap_or(0);
            phase.push(before + usize::from(matches!(instr, Instr::RowSum(_) | Instr::RowMax(_))));
        }
        let phases = phase.iter().max().copied().unwrap_or(0);
        let in_order = kernel.code.iter().all(|(instr, rank)| {
            let walks = match instr {
                Instr::Load(i) => kernel.inputs[*i].rank == Rank::Scalar || kernel.inputs[*i].pattern == Pattern::Same,
                Instr::Index(_) => false,
                _ => true,
            };
            walks && *rank != Rank::Row
        });
        let linear = in_order && !by_rows;
        let index = index_type(kernel.rows * kernel.cols);
        let mut renderer = Renderer { kernel, inputs, outputs, vector: 1, linear, index, phase, phases };
        renderer.vector = renderer.choose_vector();
        renderer
    }

    /// How many neighbouring elements a thread takes: 16 bytes of the narrowest, if rows divide so.
    fn choose_vector(&self) -> usize {
        let full = |rank: Rank| rank == Rank::Full;
        let loads = self.kernel.inputs.iter().filter(|i| full(i.rank)).map(|i| i.dtype.bytes());
        let stores = self.kernel.outputs.iter().filter(|o| full(self.kernel.code[o.value].1)).map(|o| o.dtype.bytes());
        let narrowest = loads.chain(stores).min().unwrap_or(4);
        let most = if self.kernel.code.len() > LONG { 4 } else { 16 / narrowest };
        match self.linear {
            // The last group may be shorter.
            true => most,
            false => (1..=most).rev().find(|v| v.is_power_of_two() && self.kernel.cols.is_multiple_of(*v)).unwrap_or(1),
        }
    }

    /// Whether a vector at this address, moved by multiples of a vector, can be read at once.
    fn is_aligned(&self, at: Address, element: Element) -> bool {
        at.offset.is_multiple_of((self.vector * element.bytes()).min(16))
    }

    /// The streams of random numbers that the kernel draws from.
    fn streams(&self) -> BTreeSet<u32> {
        let drawn = self.kernel.code.iter().filter_map(|(instr, _)| match instr {
            Instr::Random(stream) => Some(*stream),
            _ => None,
        });
        let rounded = self.kernel.outputs.iter().filter_map(|o| match o.rounding {
            Rounding::Stochastic { stream, .. } => Some(stream),
            Rounding::Nearest => None,
        });
        drawn.chain(rounded).collect()
    }

    /// The statement that stores one value of a row.
    fn store_row(&self, output: usize) -> String {
        let o = &self.kernel.outputs[output];
        let value = o.value;
        match o.rounding {
            Rounding::Nearest => format!("narrow(r{value}, q{output}[row]);"),
            Rounding::Stochastic { stream, first } => {
                format!("q{output}[row] = stochastic(r{value}, random_word(key{stream}, {first} + (u64)row));")
            }
        }
    }

    fn parameters(&self) -> Parameters {
        let mut parameters = Parameters::default();
        for (i, input) in self.kernel.inputs.iter().enumerate() {
            let reach = reach(self.kernel, input);
            parameters.read(&format!("p{i}"), input.dtype, self.inputs[i], reach, Some(input.source));
            if input.rank == Rank::Full && self.is_wide(i) {
                parameters.widen_last((self.vector * input.dtype.bytes()).min(16));
            }
        }
        if !self.streams().is_empty() {
            let at = Address { block: Block::Control, offset: control::SEED };
            parameters.raw("const u64 *seed", at, 8, Access::Read, 8);
        }
        parameters
    }

    /// Whether a full input's vectors are neighbours in memory, at addresses that can be read at once.
    fn is_wide(&self, input: usize) -> bool {
        let Input { pattern, dtype, .. } = &self.kernel.inputs[input];
        let aligned = self.is_aligned(self.inputs[input], *dtype);
        aligned
            && match pattern {
                Pattern::Same | Pattern::Column => true,
                Pattern::Strided(strides) => {
                    let last = self.kernel.dims.len() - 1;
                    let others = || strides[..last].iter().zip(&self.kernel.dims);
                    self.kernel.inner > 0
                        && strides[last] == 1
                        && self.kernel.dims[last].is_multiple_of(self.vector)
                        && others().all(|(stride, &size)| size == 1 || stride.is_multiple_of(self.vector))
                }
            }
    }

    fn write_parameter(&self, parameters: &mut Parameters, output: usize) {
        let o = &self.kernel.outputs[output];
        let elements = written(self.kernel, o.value, o.store);
        parameters.write(&format!("q{output}"), o.dtype, self.outputs[output], elements, Some(o.target), Access::Write);
        let full = self.kernel.code[o.value].1 == Rank::Full && o.store == Store::Each;
        if full && self.is_aligned(self.outputs[output], o.dtype) {
            parameters.widen_last((self.vector * o.dtype.bytes()).min(16));
        }
    }

    /// Values that are the same for the whole kernel, and the keys of random streams.
    fn scalars(&self, text: &mut String) {
        for stream in self.streams() {
            line(text, 1, &format!("const u64 key{stream} = random_key(*seed, {stream}u);"));
        }
        for (reg, (_, rank)) in self.kernel.code.iter().enumerate() {
            if *rank == Rank::Scalar {
                line(text, 1, &format!("const float r{reg} = {};", self.expression(reg, "0", "0")));
            }
        }
    }

    /// An instruction's value at (row, column); operands are registers in scope.
    fn expression(&self, reg: Reg, row: &str, col: &str) -> String {
        let (instr, rank) = &self.kernel.code[reg];
        let (outer, inner) = self.kernel.dims.split_at(self.kernel.dims.len() - self.kernel.inner);
        let split = |factors: &[usize]| {
            let (of_outer, of_inner) = factors.split_at(outer.len().min(factors.len()));
            let rows = dot(row, outer, of_outer);
            if *rank == Rank::Full { format!("{rows} + {}", dot(col, inner, of_inner)) } else { rows }
        };
        match instr {
            Instr::Load(i) => {
                let input = &self.kernel.inputs[*i];
                let at = match (&input.pattern, input.rank) {
                    (_, Rank::Scalar) => "0".to_string(),
                    (Pattern::Same, Rank::Row) => row.to_string(),
                    (Pattern::Same, Rank::Full) if self.linear => col.to_string(),
                    (Pattern::Same, Rank::Full) => format!("{row} * {} + {col}", self.kernel.cols),
                    (Pattern::Column, _) => col.to_string(),
                    (Pattern::Strided(strides), _) => split(strides),
                };
                format!("widen(p{i}[{at}])")
            }
            Instr::Const(value) => literal(*value),
            Instr::Index(factors) => format!("(float)({})", split(factors)),
            Instr::Expand(a) => format!("r{a}"),
            Instr::Random(stream) => {
                let flat = match rank {
                    Rank::Scalar => "0".to_string(),
                    Rank::Row => row.to_string(),
                    Rank::Full if self.linear => col.to_string(),
                    Rank::Full => format!("(u64){row} * {} + {col}", self.kernel.cols),
                };
                format!("uniform(key{stream}, {flat})")
            }
            Instr::Unary(op, a) => match op {
                Unary::Neg => format!("-r{a}"),
                Unary::Exp => format!("expf(r{a})"),
                Unary::Ln => format!("logf(r{a})"),
                Unary::Sqrt => format!("sqrtf(r{a})"),
                Unary::Recip => format!("1.0f / r{a}"),
                Unary::Tanh => format!("tanhf(r{a})"),
                Unary::Erf => format!("erff(r{a})"),
                Unary::Sin => format!("sinf(r{a})"),
                Unary::Cos => format!("cosf(r{a})"),
                Unary::Abs => format!("fabsf(r{a})"),
            },
            Instr::Binary(op, a, b) => match op {
                Binary::Add => format!("r{a} + r{b}"),
                Binary::Sub => format!("r{a} - r{b}"),
                Binary::Mul => format!("r{a} * r{b}"),
                Binary::Div => format!("r{a} / r{b}"),
                Binary::Maximum => format!("larger(r{a}, r{b})"),
                Binary::Minimum => format!("-larger(-r{a}, -r{b})"),
                Binary::Pow => format!("powf(r{a}, r{b})"),
            },
            Instr::Compare(op, a, b) => {
                let sign = match op {
                    Compare::Lt => "<",
                    Compare::Le => "<=",
                    Compare::Eq => "==",
                };
                format!("r{a} {sign} r{b} ? 1.0f : 0.0f")
            }
            Instr::Select(c, a, b) => format!("r{c} != 0.0f ? r{a} : r{b}"),
            // Reductions are written by the row form.
            Instr::RowSum(a) | Instr::RowMax(a) => format!("r{a}"),
        }
    }

    /// The full registers that `targets` need, in order.
    fn needed(&self, targets: impl IntoIterator<Item = Reg>) -> Vec<Reg> {
        let mut needed = BTreeSet::new();
        let mut stack: Vec<Reg> = targets.into_iter().collect();
        while let Some(reg) = stack.pop() {
            if self.kernel.code[reg].1 == Rank::Full && needed.insert(reg) {
                stack.extend(operands(&self.kernel.code[reg].0));
            }
        }
        needed.into_iter().collect()
    }

    /// Loads of a group of `vector` elements at (row, col).
    fn loads(&self, text: &mut String, depth: usize, regs: &[Reg], count: Option<&str>) {
        for &reg in regs {
            let Instr::Load(i) = self.kernel.code[reg].0 else { continue };
            let input = &self.kernel.inputs[i];
            let cols = self.kernel.cols;
            let strided = match &input.pattern {
                Pattern::Strided(strides) => {
                    let (outer, inner) = self.kernel.dims.split_at(self.kernel.dims.len() - self.kernel.inner);
                    let (of_outer, of_inner) = strides.split_at(outer.len());
                    Some((dot("row", outer, of_outer), inner, of_inner))
                }
                _ => None,
            };
            let v = self.vector;
            line(text, depth, &format!("float l{reg}[{v}];"));
            let start = match (&input.pattern, &strided) {
                (Pattern::Same, _) if self.linear => format!("p{i} + i"),
                (Pattern::Same, _) => format!("p{i} + (row * {cols} + col)"),
                (Pattern::Column, _) => format!("p{i} + col"),
                (_, Some((rows, inner, of_inner))) => format!("p{i} + ({rows} + {})", dot("col", inner, of_inner)),
                _ => format!("p{i}"),
            };
            let wide = self.is_wide(i);
            match (&strided, count) {
                _ if wide && count.is_none() => line(text, depth, &format!("load<{v}>(l{reg}, {start});")),
                (Some((rows, inner, of_inner)), _) => {
                    line(text, depth, "#pragma unroll");
                    let at = dot("(col + e)", inner, of_inner);
                    line(
                        text,
                        depth,
                        &format!("for (int e = 0; e < {v}; e++) l{reg}[e] = widen(p{i}[{rows} + {at}]);"),
                    );
                }
                (None, Some(n)) if wide => {
                    line(text, depth, &format!("if ({n} == {v}) load<{v}>(l{reg}, {start});"));
                    line(text, depth, &format!("else load_some<{v}>(l{reg}, {start}, {n});"));
                }
                (None, n) => {
                    let n = n.map_or(v.to_string(), str::to_string);
                    line(text, depth, &format!("load_some<{v}>(l{reg}, {start}, {n});"));
                }
            }
        }
    }

    /// The statements that compute full registers of element `e`.
    fn compute(&self, text: &mut String, depth: usize, regs: &[Reg]) {
        for &reg in regs {
            let value = match self.kernel.code[reg].0 {
                Instr::Load(_) => format!("l{reg}[e]"),
                _ if self.linear => self.expression(reg, "0", "(i + e)"),
                _ => self.expression(reg, "row", "(col + e)"),
            };
            line(text, depth, &format!("const float r{reg} = {value};"));
        }
    }

    /// Writes a group of elements.
    fn store(&self, text: &mut String, depth: usize, output: usize, start: &str, count: Option<&str>) {
        let o = &self.kernel.outputs[output];
        let v = self.vector;
        let wide = self.is_aligned(self.outputs[output], o.dtype);
        let to = format!("q{output} + ({start})");
        if let Rounding::Stochastic { stream, first } = o.rounding {
            let n = count.map_or(v.to_string(), str::to_string);
            let at = format!("{first} + (u64)({start})");
            line(text, depth, &format!("store_stochastic<{v}>({to}, o{output}, {n}, key{stream}, {at});"));
            return;
        }
        match (wide, count) {
            (true, None) => line(text, depth, &format!("store<{v}>({to}, o{output});")),
            (true, Some(n)) => {
                line(text, depth, &format!("if ({n} == {v}) store<{v}>({to}, o{output});"));
                line(text, depth, &format!("else store_some<{v}>({to}, o{output}, {n});"));
            }
            (false, n) => {
                let n = n.map_or(v.to_string(), str::to_string);
                line(text, depth, &format!("store_some<{v}>({to}, o{output}, {n});"));
            }
        }
    }
}

/// A line of the kernel's text.
fn line(text: &mut String, depth: usize, statement: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{:width$}{statement}", "", width = 4 * depth);
}

mod flat;
mod rows;
