//! The kernel IR: what backends execute. A fused kernel is a short program over one row-structured iteration space; the
//! CPU runs it tile by tile, a GPU backend renders the same program.

use clip_host_plugin_api::ir::{Binary, Compare, DType, Node, NodeId, Op, Unary};
use std::ops::Range;

/// How a value is kept in memory. Registers of fused kernels hold f32 whatever is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    F32,
    I32,
    /// The upper half of an f32, rounded when it is written as its [`Rounding`] says: activations in mixed precision, and
    /// persistent tensors that are [kept in half precision](crate::kept).
    Bf16,
    /// IEEE 754's 16 bits, rounded to nearest even when it is written: activations in mixed precision with loss scaling.
    /// From 65520 on, infinite.
    F16,
}

impl Element {
    /// How a value of this type is kept unless mixed precision says otherwise.
    pub fn of(dtype: DType) -> Element {
        match dtype {
            DType::F32 => Element::F32,
            DType::I32 => Element::I32,
        }
    }

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 | Element::I32 => 4,
            Element::Bf16 | Element::F16 => 2,
        }
    }

    /// The name that plans are printed with.
    pub fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::I32 => "i32",
            Element::Bf16 => "bf16",
            Element::F16 => "f16",
        }
    }
}

/// Index of an instruction's result.
pub type Reg = usize;

/// Whether a value is one for the whole kernel, one for each row or one for each point of the space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rank {
    Scalar,
    Row,
    Full,
}

/// How an input is read; `i` is the row, `j` the column.
#[derive(Clone, Debug, PartialEq)]
pub enum Pattern {
    /// The space's own order: `offset + i·cols + j`, for row values `offset + i`, for scalars `offset`.
    Same,
    /// `offset + j`: one vector for all rows.
    Column,
    /// Strides over the kernel's `dims` (for row values: over the outer ones), outermost first.
    Strided(Vec<usize>),
}

/// An operand in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    pub source: NodeId,
    pub offset: usize,
    pub rank: Rank,
    pub dtype: Element,
    pub pattern: Pattern,
}

/// One step of a fused kernel.
#[derive(Clone, Debug, PartialEq)]
pub enum Instr {
    Load(usize),
    Const(f32),
    /// `Σ index[d] · factor[d]` over the kernel's `dims`.
    Index(Vec<usize>),
    /// The same value at every point (or row) of the result's rank.
    Expand(Reg),
    /// Uniform [0, 1) by flat element number.
    Random(u32),
    Unary(Unary, Reg),
    Binary(Binary, Reg, Reg),
    Compare(Compare, Reg, Reg),
    Select(Reg, Reg, Reg),
    /// Over the columns of a row; the result is a row value.
    RowSum(Reg),
    RowMax(Reg),
}

/// What happens to a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Written in the space's order, or one for each row.
    Each,
    /// Summed over the rows of each segment (`segment` rows long): `[segments, cols]`.
    SumRows {
        segment: usize,
    },
    MaxRows {
        segment: usize,
    },
    /// Summed over everything.
    SumAll,
    MaxAll,
}

/// How a result is rounded to what its element can hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// To the nearest value, of two the one whose last bit is even.
    #[default]
    Nearest,
    /// Up or down at random, with probabilities that make the mean exact: [`stochastic_bf16`] of the value and of
    /// [`word`](clip_host_plugin_api::interpret::word)`(seed, stream, first + i)`, where `seed` is the run's, as for
    /// [`Instr::Random`], and `i` is the element's number in the result. Only of [`Element::Bf16`] and [`Store::Each`],
    /// for tensors that stay from step to step: what is rounded to nearest there never takes a step that is smaller than
    /// half the distance of two neighbours, however often it is repeated.
    Stochastic {
        /// No other result of the program has it, and no [`Instr::Random`].
        stream: u32,
        /// The number of the result's first element: not 0 if it is a part of a larger tensor.
        first: usize,
    },
}

/// The bits of the bf16 that a value is rounded to at random. The top 16 bits of `word` are added below the bits that are
/// kept, as if to the magnitude's own lower half, which is then cut off: so the two neighbours' probabilities are as the
/// value's distances from the other one. Exact:
/// - infinities, and all values that bf16 has, are kept as they are;
/// - finite values stay finite: beyond the largest bf16, 0x7f7f, they are that one;
/// - subnormal values, and zero of either sign, are +0, as in all tensors that stay from step to step;
/// - NaN is the upper half of its bits with the quiet bit, 0x0040, set.
#[inline(always)]
pub fn stochastic_bf16(value: f32, word: u64) -> u16 {
    const INFINITY: u32 = 0x7f80_0000;
    const SMALLEST: u32 = 0x0080_0000;
    let bits = value.to_bits();
    let (sign, magnitude) = (bits >> 16 & 0x8000, bits & 0x7fff_ffff);
    let random = (word >> 48) as u32;
    let finite = sign | ((magnitude + random) >> 16).min(0x7f7f);
    let special = if magnitude > INFINITY { bits >> 16 | 0x40 } else { bits >> 16 };
    let large = if magnitude < INFINITY { finite } else { special };
    (if magnitude < SMALLEST { 0 } else { large }) as u16
}

/// A result in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    pub target: NodeId,
    pub value: Reg,
    pub store: Store,
    /// Registers hold floats; other results are converted when they are stored.
    pub dtype: Element,
    /// How, where that loses digits.
    pub rounding: Rounding,
}

/// A fused kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Fused {
    pub rows: usize,
    pub cols: usize,
    /// The space's dimensions, outermost first; the last `inner` of them make up the columns.
    pub dims: Vec<usize>,
    pub inner: usize,
    pub inputs: Vec<Input>,
    pub code: Vec<(Instr, Rank)>,
    pub outputs: Vec<Output>,
    /// Nodes computed inside, for the printed plan.
    pub nodes: Vec<NodeId>,
}

impl Fused {
    /// Whether whole rows must be held at once.
    pub fn has_row_reductions(&self) -> bool {
        self.code.iter().any(|(instr, _)| matches!(instr, Instr::RowSum(_) | Instr::RowMax(_)))
    }

    /// Length of the row segments of its column reductions.
    pub fn segment(&self) -> usize {
        let of = |o: &Output| match o.store {
            Store::SumRows { segment } | Store::MaxRows { segment } => Some(segment),
            _ => None,
        };
        self.outputs.iter().find_map(of).unwrap_or(self.rows)
    }
}

/// An operand of a kernel of its own: a strided view of a tensor in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Operand {
    pub source: NodeId,
    pub offset: usize,
    /// (size, stride) of each logical dimension.
    pub dims: Vec<(usize, usize)>,
}

/// One launch.
#[derive(Clone, Debug, PartialEq)]
pub enum Kernel {
    Fused(Fused),
    /// Any op with a kernel of its own; `inputs` are contiguous but for matmul's and copy's.
    Own {
        op: Op,
        node: NodeId,
        inputs: Vec<Operand>,
        shape: Vec<usize>,
        /// A convolution's second result: the [`Op::Moments`] of its first.
        moments: Option<NodeId>,
    },
    /// Writes a strided view in contiguous order.
    Copy {
        node: NodeId,
        input: Operand,
    },
    /// Writes a leaf's new value at the end of the step.
    Store {
        leaf: NodeId,
        value: Operand,
    },
}

impl Kernel {
    /// The nodes whose memory the kernel reads.
    pub fn reads(&self) -> Vec<NodeId> {
        match self {
            Kernel::Fused(fused) => fused.inputs.iter().map(|i| i.source).collect(),
            Kernel::Own { inputs, .. } => inputs.iter().map(|i| i.source).collect(),
            Kernel::Copy { input, .. } => vec![input.source],
            Kernel::Store { value, .. } => vec![value.source],
        }
    }

    /// The elements of `source` that the kernel may read: for each operand, from the first to one past the last.
    pub fn reads_of(&self, source: NodeId) -> Vec<Range<usize>> {
        let reach = |steps: &mut dyn Iterator<Item = (usize, usize)>| {
            steps.map(|(size, stride)| size.saturating_sub(1) * stride).sum::<usize>() + 1
        };
        let operand = |o: &Operand| o.offset..o.offset + reach(&mut o.dims.iter().copied());
        let input = |fused: &Fused, i: &Input| {
            let len = match (&i.pattern, i.rank) {
                (_, Rank::Scalar) => 1,
                (Pattern::Same, Rank::Row) => fused.rows,
                (Pattern::Same, Rank::Full) => fused.rows * fused.cols,
                (Pattern::Column, _) => fused.cols,
                (Pattern::Strided(strides), _) => reach(&mut fused.dims.iter().copied().zip(strides.iter().copied())),
            };
            i.offset..i.offset + len
        };
        let operands = |list: &[Operand]| list.iter().filter(|o| o.source == source).map(operand).collect();
        match self {
            Kernel::Fused(fused) => {
                fused.inputs.iter().filter(|i| i.source == source).map(|i| input(fused, i)).collect()
            }
            Kernel::Own { inputs, .. } => operands(inputs),
            Kernel::Copy { input, .. } | Kernel::Store { value: input, .. } => operands(std::slice::from_ref(input)),
        }
    }

    /// The nodes whose memory the kernel writes.
    pub fn writes(&self) -> Vec<NodeId> {
        match self {
            Kernel::Fused(fused) => fused.outputs.iter().map(|o| o.target).collect(),
            Kernel::Own { node, moments, .. } => std::iter::once(*node).chain(*moments).collect(),
            Kernel::Copy { node, .. } => vec![*node],
            Kernel::Store { leaf, .. } => vec![*leaf],
        }
    }

    /// One line for people: what it computes, over which sizes.
    pub fn describe(&self, nodes: &[Node]) -> String {
        match self {
            Kernel::Fused(fused) => {
                let mut ops: Vec<(&str, usize)> = Vec::new();
                for &id in &fused.nodes {
                    let name = nodes[id as usize].op.name();
                    match ops.iter_mut().find(|o| o.0 == name) {
                        Some(op) => op.1 += 1,
                        None => ops.push((name, 1)),
                    }
                }
                let ops: Vec<String> = ops
                    .into_iter()
                    .map(|(name, count)| if count == 1 { name.to_string() } else { format!("{name}×{count}") })
                    .collect();
                let (rows, cols) = (fused.rows, fused.cols);
                let (inputs, outputs) = (fused.inputs.len(), fused.outputs.len());
                format!("fused [{rows}, {cols}] {inputs} in, {outputs} out: {}", ops.join(" "))
            }
            Kernel::Own { op, inputs, shape, moments, .. } => {
                let sizes = |o: &Operand| format!("{:?}", o.dims.iter().map(|d| d.0).collect::<Vec<_>>());
                let inputs: Vec<String> = inputs.iter().map(sizes).collect();
                let moments = if moments.is_some() { " and its moments" } else { "" };
                format!("{} {} -> {shape:?}{moments}", op.name(), inputs.join(" "))
            }
            Kernel::Copy { node, .. } => format!("copy {:?}", nodes[*node as usize].shape),
            Kernel::Store { leaf, .. } => format!("store {:?}", nodes[*leaf as usize].shape),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words that give each of the 2¹⁶ random numbers once.
    fn words() -> impl Iterator<Item = u64> {
        (0..1u64 << 16).map(|random| random << 48 | 0x1234_5678_9abc)
    }

    fn value(bits: u16) -> f32 {
        f32::from_bits(u32::from(bits) << 16)
    }

    #[test]
    fn stochastic_rounding_is_unbiased_and_takes_neighbours_only() {
        for x in [1.000_123f32, -3.25e-9, 7.7e20, 0.999, 1.999_999_9, -1.0e-30, 1.000_000_1] {
            let below = value((x.to_bits() >> 16) as u16);
            let above = value((x.to_bits() >> 16) as u16 + 1);
            let rounded: Vec<f32> = words().map(|word| value(stochastic_bf16(x, word))).collect();
            assert!(rounded.iter().all(|&r| r == below || r == above), "{x}");
            // Every random number has been drawn once: the mean is the value itself, not only near it.
            let mean = rounded.iter().map(|&r| f64::from(r)).sum::<f64>() / 65536.0;
            assert_eq!(mean, f64::from(x));
        }
    }

    #[test]
    fn what_bf16_has_is_kept_and_nothing_else_becomes_infinite() {
        let largest = f32::from_bits(0x7f7f_0000);
        for word in words().step_by(97).chain([u64::MAX, 0]) {
            for exact in [1.0, -1.5, 3.0e38, f32::MIN_POSITIVE, -f32::MIN_POSITIVE, f32::INFINITY, f32::NEG_INFINITY] {
                let exact = f32::from_bits(exact.to_bits() & 0xffff_0000);
                assert_eq!(value(stochastic_bf16(exact, word)).to_bits(), exact.to_bits());
            }
            for (x, expected) in [(f32::MAX, largest), (f32::MIN, -largest), (largest, largest)] {
                assert_eq!(value(stochastic_bf16(x, word)), expected);
            }
            for small in [0.0, -0.0, 1e-40, -1e-45, f32::from_bits(0x007f_ffff)] {
                assert_eq!(stochastic_bf16(small, word), 0, "{small:e}");
            }
            for nan in [f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)] {
                assert!(value(stochastic_bf16(nan, word)).is_nan());
            }
        }
    }
}
