//! The kernel IR: what backends execute. A fused kernel is a short program over one row-structured iteration space; the
//! CPU runs it tile by tile, a GPU backend renders the same program.

use clip_host_plugin_api::ir::{Binary, Compare, DType, Node, NodeId, Op, Unary};
use std::ops::Range;

/// How a value is kept in memory. Registers of fused kernels hold f32 whatever is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    F32,
    I32,
    /// The upper half of an f32, rounded to nearest even when it is written: activations in mixed precision.
    Bf16,
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
            Element::Bf16 => 2,
        }
    }

    /// The name that plans are printed with.
    pub fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::I32 => "i32",
            Element::Bf16 => "bf16",
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

/// A result in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    pub target: NodeId,
    pub value: Reg,
    pub store: Store,
    /// Registers hold floats; other results are converted when they are stored.
    pub dtype: Element,
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
