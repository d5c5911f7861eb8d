//! The op set and its version: what a plugin may ask for.
//!
//! A plugin describes computation as a [`Fragment`]: a flat list of [`Node`]s in SSA form, each naming the nodes that
//! it reads by index. All shapes are static, all tensors logically contiguous (row-major); every movement is explicit.
//! Fragments cross the plugin boundary as JSON text that begins with its own [`IR_VERSION`].
//!
//! Ops are only ever appended. A host reads fragments of its own version and of every older one.

use serde::{Deserialize, Serialize};

/// The version of the op set. It grows by one whenever an op or a field is added.
pub const IR_VERSION: u32 = 1;

/// The most dimensions that a tensor may have.
pub const MAX_RANK: usize = 6;

/// Index of a node in its fragment.
pub type NodeId = u32;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// 32-bit float; the host may compute in a lower precision where the recipe says so.
    F32,
    /// 32-bit integer: token ids, sample ids. Only gather, scatter, cast and movement ops take it.
    I32,
}

/// One-argument elementwise functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unary {
    Neg,
    Exp,
    Ln,
    Sqrt,
    Recip,
    Tanh,
    Erf,
    Sin,
    Cos,
    Abs,
}

/// Two-argument elementwise functions; both inputs have the node's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Maximum,
    Minimum,
    /// `a` to the power `b`; the gradient with respect to `b` needs `a > 0`.
    Pow,
}

/// Comparisons; the result is 1.0 where true and 0.0 where false.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compare {
    Lt,
    Le,
    Eq,
}

/// Order of the dimensions of an image tensor. Plugins write `Nchw`; the host's layout pass turns ops to `Nhwc`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    #[default]
    Nchw,
    Nhwc,
}

impl Layout {
    /// Axes of (batch, channel, height, width).
    pub fn axes(self) -> [usize; 4] {
        match self {
            Layout::Nchw => [0, 1, 2, 3],
            Layout::Nhwc => [0, 3, 1, 2],
        }
    }

    /// A shape in this layout from its sizes.
    pub fn shape(self, n: usize, c: usize, h: usize, w: usize) -> Vec<usize> {
        match self {
            Layout::Nchw => vec![n, c, h, w],
            Layout::Nhwc => vec![n, h, w, c],
        }
    }
}

/// Attributes of a two-dimensional convolution, as PyTorch names them; pairs are (height, width).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Conv {
    pub stride: [usize; 2],
    pub padding: [usize; 2],
    pub dilation: [usize; 2],
    pub groups: usize,
    #[serde(default)]
    pub layout: Layout,
}

/// Attributes of a two-dimensional pooling; pairs are (height, width).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pool {
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    pub padding: [usize; 2],
    /// Average pooling only: whether padding counts in the divisor (PyTorch's default is that it does).
    #[serde(default)]
    pub count_include_pad: bool,
    #[serde(default)]
    pub layout: Layout,
}

/// How a parameter or state gets its first value. Random numbers come from the run's seed and the tensor's name.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    Constant(f64),
    /// Normal with mean 0.
    Normal {
        std: f64,
    },
    /// Normal with mean 0, redrawn outside ±2 std.
    TruncatedNormal {
        std: f64,
    },
    /// Uniform in ±bound.
    Uniform {
        bound: f64,
    },
}

/// One operation. Inputs are given in the order of the doc's argument list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// A tensor that the host feeds at every step.
    Input {
        name: String,
    },
    /// A trainable tensor.
    Param {
        name: String,
        init: Init,
    },
    /// A persistent tensor that only `updates` change: running statistics, per-sample tables.
    State {
        name: String,
        init: Init,
    },
    /// One finite value everywhere.
    Constant {
        value: f64,
    },
    /// Given values, row-major.
    Literal {
        values: Vec<f64>,
    },
    /// 0, 1, 2, … along `axis`.
    Iota {
        axis: usize,
    },
    /// Uniform in [0, 1): a function of the run's seed, the step, `stream` and the element's index only.
    Random {
        stream: u32,
    },

    Unary(Unary),
    Binary(Binary),
    Compare(Compare),
    /// `(condition, a, b)`: a where the condition is not 0, else b.
    Select,

    /// Sum over `axes`, which stay with size 1.
    Sum {
        axes: Vec<usize>,
    },
    /// Maximum over `axes`, which stay with size 1. Equal maxima share the gradient evenly.
    Max {
        axes: Vec<usize>,
    },

    Reshape,
    /// Output dimension `i` is input dimension `axes[i]`.
    Permute {
        axes: Vec<usize>,
    },
    /// Repeats dimensions of size 1 up to the node's shape (same rank).
    Broadcast,
    /// `starts[i]..ends[i]` of every dimension.
    Slice {
        starts: Vec<usize>,
        ends: Vec<usize>,
    },
    Pad {
        before: Vec<usize>,
        after: Vec<usize>,
        value: f64,
    },
    Concat {
        axis: usize,
    },

    /// `[…, m, k] × […, k, n]`, equal leading dimensions.
    Matmul,
    /// `(x, weight)`; weight is `[out, in / groups, kh, kw]` in either layout.
    Conv2d(Conv),
    /// `(grad, weight)`: gradient of `Conv2d` with respect to x, whose shape is the node's.
    Conv2dInputGrad(Conv),
    /// `(x, grad)`: gradient of `Conv2d` with respect to the weight, whose shape is the node's.
    Conv2dWeightGrad(Conv),
    /// Padding counts as −∞.
    MaxPool2d(Pool),
    /// `(x, grad)`: each window's gradient goes to its first maximum.
    MaxPool2dGrad(Pool),
    AvgPool2d(Pool),
    /// `(grad)`: the node's shape is the pooled input's.
    AvgPool2dGrad(Pool),

    /// `(table [n, …], ids […])` → `[ids…, …]`. Ids outside the table end the step with an error.
    Gather,
    /// `(ids […], rows [ids…, …])` → `[n, …]`: rows added where their ids say, zero elsewhere.
    ScatterAdd,
    /// `(table [n, …], ids […], rows [ids…, …])` → the table with those rows replaced; of equal ids the last wins.
    Scatter,
    Cast,
    /// The identity, through which no gradient flows.
    Detach,

    /// Over the last axis.
    Softmax,
    /// Over the last axis.
    LogSoftmax,
    /// `(x, gain, bias)` over the last axis; gain and bias are 1-D. (Ba et al. 2016)
    LayerNorm {
        eps: f64,
    },
    /// `(x, gain, bias)` with the batch's own statistics over all axes but `axis`. (Ioffe & Szegedy 2015)
    BatchNorm {
        eps: f64,
        axis: usize,
    },
    /// x · Φ(x) with the exact Φ. (Hendrycks & Gimpel 2016)
    Gelu,
    /// x / max(‖x‖₂, eps) over the last axis, as `torch.nn.functional.normalize`.
    L2Normalize {
        eps: f64,
    },

    /// `(x [.., c])` → `[2, c]`: mean and population variance of each column over all leading axes. Made by the host's
    /// passes out of the sums that say the same; a plugin's fragment that holds it is refused, so that it has no part in
    /// [`IR_VERSION`].
    Moments,
}

impl Op {
    /// The op's name in error messages and in the printed form of a fragment.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Input { .. } => "input",
            Op::Param { .. } => "param",
            Op::State { .. } => "state",
            Op::Constant { .. } => "constant",
            Op::Literal { .. } => "literal",
            Op::Iota { .. } => "iota",
            Op::Random { .. } => "random",
            Op::Unary(u) => match u {
                Unary::Neg => "neg",
                Unary::Exp => "exp",
                Unary::Ln => "ln",
                Unary::Sqrt => "sqrt",
                Unary::Recip => "recip",
                Unary::Tanh => "tanh",
                Unary::Erf => "erf",
                Unary::Sin => "sin",
                Unary::Cos => "cos",
                Unary::Abs => "abs",
            },
            Op::Binary(b) => match b {
                Binary::Add => "add",
                Binary::Sub => "sub",
                Binary::Mul => "mul",
                Binary::Div => "div",
                Binary::Maximum => "maximum",
                Binary::Minimum => "minimum",
                Binary::Pow => "pow",
            },
            Op::Compare(c) => match c {
                Compare::Lt => "lt",
                Compare::Le => "le",
                Compare::Eq => "eq",
            },
            Op::Select => "select",
            Op::Sum { .. } => "sum",
            Op::Max { .. } => "max",
            Op::Reshape => "reshape",
            Op::Permute { .. } => "permute",
            Op::Broadcast => "broadcast",
            Op::Slice { .. } => "slice",
            Op::Pad { .. } => "pad",
            Op::Concat { .. } => "concat",
            Op::Matmul => "matmul",
            Op::Conv2d(_) => "conv2d",
            Op::Conv2dInputGrad(_) => "conv2d_input_grad",
            Op::Conv2dWeightGrad(_) => "conv2d_weight_grad",
            Op::MaxPool2d(_) => "max_pool2d",
            Op::MaxPool2dGrad(_) => "max_pool2d_grad",
            Op::AvgPool2d(_) => "avg_pool2d",
            Op::AvgPool2dGrad(_) => "avg_pool2d_grad",
            Op::Gather => "gather",
            Op::ScatterAdd => "scatter_add",
            Op::Scatter => "scatter",
            Op::Cast => "cast",
            Op::Detach => "detach",
            Op::Softmax => "softmax",
            Op::LogSoftmax => "log_softmax",
            Op::LayerNorm { .. } => "layer_norm",
            Op::BatchNorm { .. } => "batch_norm",
            Op::Gelu => "gelu",
            Op::L2Normalize { .. } => "l2_normalize",
            Op::Moments => "moments",
        }
    }

    /// Whether only the host's passes may make the op.
    pub fn is_internal(&self) -> bool {
        matches!(self, Op::Moments)
    }

    /// Whether the op is made of others; [`crate::decompose`] writes it out.
    pub fn is_composite(&self) -> bool {
        matches!(
            self,
            Op::Softmax
                | Op::LogSoftmax
                | Op::LayerNorm { .. }
                | Op::BatchNorm { .. }
                | Op::Gelu
                | Op::L2Normalize { .. }
        )
    }
}

/// One op with its inputs and the shape and type of its result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    pub op: Op,
    #[serde(default)]
    pub inputs: Vec<NodeId>,
    pub shape: Vec<usize>,
    pub dtype: DType,
}

impl Node {
    /// Number of elements of the result.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// What a plugin's `build` answers with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fragment {
    pub ir_version: u32,
    pub nodes: Vec<Node>,
    /// Named results, for instance `loss`, `features`, `param`.
    pub outputs: Vec<(String, NodeId)>,
    /// `(state, value)`: at the end of the step the state takes the value. All reads in the step see the old one.
    #[serde(default)]
    pub updates: Vec<(NodeId, NodeId)>,
    /// `(param, value)`: before anything else the parameter takes the value (a clamp, say); no gradient flows through it.
    #[serde(default)]
    pub projections: Vec<(NodeId, NodeId)>,
    /// Numbers to log; scalars.
    #[serde(default)]
    pub metrics: Vec<(String, NodeId)>,
}

impl Default for Fragment {
    fn default() -> Self {
        Fragment {
            ir_version: IR_VERSION,
            nodes: Vec::new(),
            outputs: Vec::new(),
            updates: Vec::new(),
            projections: Vec::new(),
            metrics: Vec::new(),
        }
    }
}

impl Fragment {
    /// The node that an output's name stands for.
    pub fn output(&self, name: &str) -> Option<NodeId> {
        self.outputs.iter().find(|(n, _)| n == name).map(|o| o.1)
    }

    /// The fragment as a person reads it: a line for each node.
    pub fn to_text(&self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        for (id, node) in self.nodes.iter().enumerate() {
            let inputs: Vec<String> = node.inputs.iter().map(|i| format!("%{i}")).collect();
            let dtype = if node.dtype == DType::I32 { " i32" } else { "" };
            let detail = match &node.op {
                Op::Input { name } | Op::Param { name, .. } | Op::State { name, .. } => format!(" \"{name}\""),
                Op::Constant { value } => format!(" {value}"),
                Op::Sum { axes } | Op::Max { axes } | Op::Permute { axes } => format!(" {axes:?}"),
                Op::Slice { starts, ends } => format!(" {starts:?}..{ends:?}"),
                Op::Pad { before, after, value } => format!(" {before:?} {after:?} with {value}"),
                Op::Concat { axis } | Op::Iota { axis } => format!(" axis {axis}"),
                _ => String::new(),
            };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "%{id} = {}{detail}({}) {:?}{dtype}", node.op.name(), inputs.join(", "), node.shape);
        }
        for (name, id) in &self.outputs {
            let _ = writeln!(text, "output {name} = %{id}");
        }
        for (what, pairs) in [("update", &self.updates), ("projection", &self.projections)] {
            for (target, value) in pairs {
                let _ = writeln!(text, "{what} %{target} <- %{value}");
            }
        }
        for (name, id) in &self.metrics {
            let _ = writeln!(text, "metric {name} = %{id}");
        }
        text
    }
}
