//! The builder with which plugins write formulas: [`Graph`] and [`Tensor`].
//!
//! A [`Tensor`] is a small copyable handle; its operators append nodes to the graph. Shapes follow PyTorch: binary
//! operators broadcast, negative axes count from the end. A mistake (shapes that do not fit) does not panic: the first
//! one is kept with its place in the source, and [`Graph::finish`] returns it.

use crate::ir::{Binary, Compare, DType, Fragment, Init, Node, NodeId, Op, Unary};
use crate::shape::{self, FragmentError};
use std::cell::RefCell;
use std::panic::Location;
use thiserror::Error;

/// Why a graph could not be built.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum BuildError {
    /// An operator got shapes or types that it does not take.
    #[error("{error} (at {file}:{line})")]
    Op { error: shape::ShapeError, file: String, line: u32 },
    #[error("{message} (at {file}:{line})")]
    Misuse { message: String, file: String, line: u32 },
    #[error(transparent)]
    Fragment(#[from] FragmentError),
    /// A plugin's own refusal of its settings or inputs.
    #[error("{0}")]
    Plugin(String),
}

impl BuildError {
    /// A plugin's own refusal.
    pub fn new(message: impl Into<String>) -> Self {
        BuildError::Plugin(message.into())
    }
}

/// The graph under construction.
#[derive(Default)]
pub struct Graph {
    inner: RefCell<Inner>,
}

#[derive(Default)]
struct Inner {
    fragment: Fragment,
    error: Option<BuildError>,
}

/// A value in a [`Graph`].
#[derive(Clone, Copy)]
pub struct Tensor<'g> {
    graph: &'g Graph,
    id: NodeId,
}

impl std::fmt::Debug for Tensor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "%{} {:?}", self.id, self.shape())
    }
}

impl Graph {
    pub fn new() -> Self {
        Self::default()
    }

    /// A graph that begins with a fragment's nodes (same ids), to go on from there.
    pub fn from_fragment(fragment: &Fragment) -> Self {
        Graph { inner: RefCell::new(Inner { fragment: fragment.clone(), error: None }) }
    }

    /// The handle of a node by its id.
    pub fn tensor(&self, id: NodeId) -> Tensor<'_> {
        Tensor { graph: self, id }
    }

    /// A tensor that the host feeds at every step.
    pub fn input(&self, name: &str, shape: &[usize], dtype: DType) -> Tensor<'_> {
        self.leaf(Op::Input { name: name.into() }, shape, dtype)
    }

    /// A trainable tensor. Use the names of the public checkpoints, so that those load.
    pub fn param(&self, name: &str, shape: &[usize], init: Init) -> Tensor<'_> {
        self.leaf(Op::Param { name: name.into(), init }, shape, DType::F32)
    }

    /// A tensor that persists from step to step and is checkpointed; see [`Graph::update`].
    pub fn state(&self, name: &str, shape: &[usize], init: Init) -> Tensor<'_> {
        self.leaf(Op::State { name: name.into(), init }, shape, DType::F32)
    }

    /// One value everywhere.
    pub fn full(&self, shape: &[usize], value: f64) -> Tensor<'_> {
        self.leaf(Op::Constant { value }, shape, DType::F32)
    }

    /// A scalar.
    pub fn scalar(&self, value: f64) -> Tensor<'_> {
        self.full(&[], value)
    }

    /// Given values, row-major.
    pub fn literal(&self, values: Vec<f64>, shape: &[usize], dtype: DType) -> Tensor<'_> {
        self.leaf(Op::Literal { values }, shape, dtype)
    }

    /// 0, 1, 2, … along `axis`.
    pub fn iota(&self, shape: &[usize], axis: usize) -> Tensor<'_> {
        self.leaf(Op::Iota { axis }, shape, DType::F32)
    }

    /// The identity matrix.
    pub fn eye(&self, n: usize) -> Tensor<'_> {
        self.iota(&[n, n], 0).eq(self.iota(&[n, n], 1))
    }

    /// Uniform random numbers in [0, 1), new at every step. Every call is a stream of its own.
    pub fn random(&self, shape: &[usize]) -> Tensor<'_> {
        let stream = self.inner.borrow().fragment.nodes.len() as u32;
        self.leaf(Op::Random { stream }, shape, DType::F32)
    }

    /// At the end of the step `state` takes `value`. Every read in the step, before or after, sees the old value.
    #[track_caller]
    pub fn update<'g>(&'g self, state: Tensor<'g>, value: Tensor<'g>) {
        let value = value.expand_to(&state.shape());
        self.inner.borrow_mut().fragment.updates.push((state.id, value.id));
    }

    /// Before the step `param` takes the value that `f` gives (`param.data.clamp_()` in PyTorch): the formula reads the
    /// new value, no gradient flows through `f`, and the optimizer starts from the new value too.
    pub fn project<'g>(&'g self, param: Tensor<'g>, f: impl FnOnce(Tensor<'g>) -> Tensor<'g>) -> Tensor<'g> {
        let value = f(param);
        self.inner.borrow_mut().fragment.projections.push((param.id, value.id));
        // Readers of the parameter see the projected value: the host swaps it in.
        param
    }

    /// Names a result.
    pub fn output(&self, name: &str, value: Tensor<'_>) {
        self.inner.borrow_mut().fragment.outputs.push((name.into(), value.id));
    }

    /// A number to log; not differentiated.
    #[track_caller]
    pub fn metric(&self, name: &str, value: Tensor<'_>) {
        let value = value.reshape(&[]);
        self.inner.borrow_mut().fragment.metrics.push((name.into(), value.id));
    }

    /// The finished fragment, verified.
    pub fn finish(self) -> Result<Fragment, BuildError> {
        let inner = self.inner.into_inner();
        if let Some(error) = inner.error {
            return Err(error);
        }
        shape::verify(&inner.fragment)?;
        Ok(inner.fragment)
    }

    /// The nodes as they are, unverified.
    pub fn into_fragment(self) -> Fragment {
        self.inner.into_inner().fragment
    }

    /// The node behind a tensor.
    pub fn node(&self, tensor: Tensor<'_>) -> Node {
        self.inner.borrow().fragment.nodes[tensor.id as usize].clone()
    }

    /// Appends any op. `declared` is the result's shape where the op leaves it free (see [`shape::infer`]).
    #[track_caller]
    pub fn push<'g>(&'g self, op: Op, inputs: &[Tensor<'g>], declared: &[usize], dtype: DType) -> Tensor<'g> {
        let mut inner = self.inner.borrow_mut();
        let Inner { fragment, error } = &mut *inner;
        let sources = inputs.iter().map(|t| &fragment.nodes[t.id as usize]);
        let types: Vec<shape::Type> = sources.map(|node| (node.shape.as_slice(), node.dtype)).collect();
        let (shape, dtype) = shape::infer(&op, &types, declared, dtype).unwrap_or_else(|wrong| {
            let place = Location::caller();
            let (file, line) = (place.file().to_string(), place.line());
            error.get_or_insert(BuildError::Op { error: wrong, file, line });
            (types.first().map_or(Vec::new(), |t| t.0.to_vec()), DType::F32)
        });
        let id = inner.fragment.nodes.len() as NodeId;
        inner.fragment.nodes.push(Node { op, inputs: inputs.iter().map(|t| t.id).collect(), shape, dtype });
        Tensor { graph: self, id }
    }

    fn leaf(&self, op: Op, shape: &[usize], dtype: DType) -> Tensor<'_> {
        self.push(op, &[], shape, dtype)
    }

    #[track_caller]
    fn misuse(&self, message: String) {
        let place = Location::caller();
        let (file, line) = (place.file().to_string(), place.line());
        self.inner.borrow_mut().error.get_or_insert(BuildError::Misuse { message, file, line });
    }
}

/// What may stand beside a tensor in a binary operation: another tensor or a number.
pub trait Operand<'g> {
    fn tensor(self, graph: &'g Graph) -> Tensor<'g>;
}

impl<'g> Operand<'g> for Tensor<'g> {
    fn tensor(self, _: &'g Graph) -> Tensor<'g> {
        self
    }
}

impl<'g> Operand<'g> for f64 {
    fn tensor(self, graph: &'g Graph) -> Tensor<'g> {
        graph.scalar(self)
    }
}

impl<'g> Tensor<'g> {
    /// The graph that the tensor belongs to.
    pub fn graph(self) -> &'g Graph {
        self.graph
    }

    pub fn id(self) -> NodeId {
        self.id
    }

    pub fn shape(self) -> Vec<usize> {
        self.graph.inner.borrow().fragment.nodes[self.id as usize].shape.clone()
    }

    pub fn rank(self) -> usize {
        self.shape().len()
    }

    pub fn dtype(self) -> DType {
        self.graph.inner.borrow().fragment.nodes[self.id as usize].dtype
    }

    /// Size of an axis (negative counts from the end); 1 after a misuse, which [`Graph::finish`] reports.
    #[track_caller]
    pub fn size(self, axis: isize) -> usize {
        let axis = self.axis(axis);
        self.shape().get(axis).copied().unwrap_or(1)
    }

    #[track_caller]
    fn axis(self, axis: isize) -> usize {
        let rank = self.rank() as isize;
        let index = if axis < 0 { axis + rank } else { axis };
        if !(0..rank).contains(&index) {
            self.graph.misuse(format!("axis {axis} of a tensor with shape {:?}", self.shape()));
            return 0;
        }
        index as usize
    }

    #[track_caller]
    fn unary(self, op: Unary) -> Self {
        self.graph.push(Op::Unary(op), &[self], &[], DType::F32)
    }

    #[track_caller]
    fn one(self, op: Op) -> Self {
        let dtype = self.dtype();
        self.graph.push(op, &[self], &[], dtype)
    }

    /// Both tensors expanded to their common shape.
    #[track_caller]
    fn aligned(self, other: impl Operand<'g>) -> (Self, Self) {
        let other = other.tensor(self.graph);
        match broadcast_shapes(&self.shape(), &other.shape()) {
            Some(shape) => (self.expand_to(&shape), other.expand_to(&shape)),
            None => {
                let message = format!("shapes {:?} and {:?} do not broadcast", self.shape(), other.shape());
                self.graph.misuse(message);
                (self, self)
            }
        }
    }

    #[track_caller]
    fn binary(self, op: Binary, other: impl Operand<'g>) -> Self {
        let (a, b) = self.aligned(other);
        self.graph.push(Op::Binary(op), &[a, b], &[], DType::F32)
    }

    #[track_caller]
    fn compare(self, op: Compare, other: impl Operand<'g>) -> Self {
        let (a, b) = self.aligned(other);
        self.graph.push(Op::Compare(op), &[a, b], &[], DType::F32)
    }

    // Elementwise.

    #[track_caller]
    pub fn exp(self) -> Self {
        self.unary(Unary::Exp)
    }
    #[track_caller]
    pub fn ln(self) -> Self {
        self.unary(Unary::Ln)
    }
    #[track_caller]
    pub fn sqrt(self) -> Self {
        self.unary(Unary::Sqrt)
    }
    #[track_caller]
    pub fn recip(self) -> Self {
        self.unary(Unary::Recip)
    }
    #[track_caller]
    pub fn tanh(self) -> Self {
        self.unary(Unary::Tanh)
    }
    #[track_caller]
    pub fn erf(self) -> Self {
        self.unary(Unary::Erf)
    }
    #[track_caller]
    pub fn sin(self) -> Self {
        self.unary(Unary::Sin)
    }
    #[track_caller]
    pub fn cos(self) -> Self {
        self.unary(Unary::Cos)
    }
    #[track_caller]
    pub fn abs(self) -> Self {
        self.unary(Unary::Abs)
    }
    #[track_caller]
    pub fn square(self) -> Self {
        self * self
    }
    /// Written with tanh, so that neither it nor its gradient overflows.
    #[track_caller]
    pub fn sigmoid(self) -> Self {
        (self * 0.5).tanh() * 0.5 + 0.5
    }
    /// The gradient at 0 is 0, as PyTorch's; NaN stays NaN.
    #[track_caller]
    pub fn relu(self) -> Self {
        self.le(0.0).where_(0.0, self)
    }
    /// The exact form, with erf.
    #[track_caller]
    pub fn gelu(self) -> Self {
        self.one(Op::Gelu)
    }
    /// x · sigmoid(1.702 x), as in OpenAI's CLIP.
    #[track_caller]
    pub fn quick_gelu(self) -> Self {
        self * (self * 1.702).sigmoid()
    }
    #[track_caller]
    pub fn maximum(self, other: impl Operand<'g>) -> Self {
        self.binary(Binary::Maximum, other)
    }
    #[track_caller]
    pub fn minimum(self, other: impl Operand<'g>) -> Self {
        self.binary(Binary::Minimum, other)
    }
    #[track_caller]
    pub fn pow(self, exponent: impl Operand<'g>) -> Self {
        self.binary(Binary::Pow, exponent)
    }
    /// Limits to `low..=high`; the gradient is 0 outside.
    #[track_caller]
    pub fn clamp(self, low: f64, high: f64) -> Self {
        self.maximum(low).minimum(high)
    }
    /// 1.0 where `self < other`, else 0.0; likewise the following four.
    #[track_caller]
    pub fn lt(self, other: impl Operand<'g>) -> Self {
        self.compare(Compare::Lt, other)
    }
    #[track_caller]
    pub fn le(self, other: impl Operand<'g>) -> Self {
        self.compare(Compare::Le, other)
    }
    #[track_caller]
    pub fn gt(self, other: impl Operand<'g>) -> Self {
        other.tensor(self.graph).lt(self)
    }
    #[track_caller]
    pub fn ge(self, other: impl Operand<'g>) -> Self {
        other.tensor(self.graph).le(self)
    }
    #[track_caller]
    pub fn eq(self, other: impl Operand<'g>) -> Self {
        self.compare(Compare::Eq, other)
    }
    /// Where `self` is not 0 the element of `a`, else that of `b`.
    #[track_caller]
    pub fn where_(self, a: impl Operand<'g>, b: impl Operand<'g>) -> Self {
        let (a, b) = a.tensor(self.graph).aligned(b);
        let (condition, a) = self.aligned(a);
        let (_, b) = condition.aligned(b);
        self.graph.push(Op::Select, &[condition, a, b], &[], DType::F32)
    }
    #[track_caller]
    pub fn cast(self, dtype: DType) -> Self {
        self.graph.push(Op::Cast, &[self], &[], dtype)
    }
    /// The same value, through which no gradient flows.
    #[track_caller]
    pub fn detach(self) -> Self {
        self.one(Op::Detach)
    }
    /// Inverted dropout: elements are 0 with probability `rate`, the others grow by 1 / (1 − rate).
    #[track_caller]
    pub fn dropout(self, rate: f64) -> Self {
        if rate <= 0.0 {
            return self;
        }
        let keep = self.graph.random(&self.shape()).ge(rate);
        keep.where_(self * (1.0 / (1.0 - rate)), 0.0)
    }

    // Reductions. Axes may be negative; `keepdim` keeps them with size 1.

    #[track_caller]
    fn reduce(self, axes: &[isize], keepdim: bool, op: impl FnOnce(Vec<usize>) -> Op) -> Self {
        let mut axes: Vec<usize> = axes.iter().map(|&a| self.axis(a)).collect();
        axes.sort_unstable();
        axes.dedup();
        let kept = self.one(op(axes.clone()));
        if keepdim {
            return kept;
        }
        let shape = kept.shape();
        let left: Vec<usize> = (0..shape.len()).filter(|d| !axes.contains(d)).map(|d| shape[d]).collect();
        kept.reshape(&left)
    }
    #[track_caller]
    pub fn sum(self, axes: &[isize], keepdim: bool) -> Self {
        self.reduce(axes, keepdim, |axes| Op::Sum { axes })
    }
    #[track_caller]
    pub fn max(self, axes: &[isize], keepdim: bool) -> Self {
        self.reduce(axes, keepdim, |axes| Op::Max { axes })
    }
    #[track_caller]
    pub fn mean(self, axes: &[isize], keepdim: bool) -> Self {
        let count: usize = axes.iter().map(|&a| self.size(a)).product();
        self.sum(axes, keepdim) * (1.0 / count as f64)
    }
    /// Over all elements, a scalar.
    #[track_caller]
    pub fn sum_all(self) -> Self {
        self.sum(&self.all_axes(), false)
    }
    /// Over all elements, a scalar.
    #[track_caller]
    pub fn mean_all(self) -> Self {
        self.mean(&self.all_axes(), false)
    }
    fn all_axes(self) -> Vec<isize> {
        (0..self.rank() as isize).collect()
    }
    /// ln Σ exp over the last axis, which is dropped; shifted by the maximum, so that it does not overflow.
    #[track_caller]
    pub fn logsumexp(self) -> Self {
        let top = self.max(&[-1], true).detach();
        ((self - top).exp().sum(&[-1], true).ln() + top).squeeze(-1)
    }
    /// Over the last axis.
    #[track_caller]
    pub fn softmax(self) -> Self {
        self.one(Op::Softmax)
    }
    /// Over the last axis.
    #[track_caller]
    pub fn log_softmax(self) -> Self {
        self.one(Op::LogSoftmax)
    }
    /// x / max(‖x‖₂, 1e-12) over the last axis.
    #[track_caller]
    pub fn l2_normalize(self) -> Self {
        self.one(Op::L2Normalize { eps: 1e-12 })
    }
    /// The diagonal of a square matrix.
    #[track_caller]
    pub fn diagonal(self) -> Self {
        (self * self.graph.eye(self.size(-1))).sum(&[-1], false)
    }
    /// Mean over rows of −log softmax at the diagonal: the cross-entropy of square logits whose row i has class i.
    #[track_caller]
    pub fn cross_entropy_diagonal(self) -> Self {
        -self.log_softmax().diagonal().mean_all()
    }

    // Movement.

    #[track_caller]
    pub fn reshape(self, shape: &[usize]) -> Self {
        if self.shape() == shape {
            return self;
        }
        self.graph.push(Op::Reshape, &[self], shape, DType::F32)
    }
    #[track_caller]
    pub fn permute(self, axes: &[usize]) -> Self {
        self.one(Op::Permute { axes: axes.to_vec() })
    }
    /// Swaps the last two axes.
    #[track_caller]
    pub fn t(self) -> Self {
        let rank = self.rank();
        let mut axes: Vec<usize> = (0..rank).collect();
        if rank < 2 {
            self.graph.misuse(format!("t() of a tensor with shape {:?}", self.shape()));
            return self;
        }
        axes.swap(rank - 1, rank - 2);
        self.permute(&axes)
    }
    /// Repeats dimensions of size 1 (and adds leading ones) up to `shape`.
    #[track_caller]
    pub fn expand_to(self, shape: &[usize]) -> Self {
        let own = self.shape();
        if own == shape {
            return self;
        }
        if own.len() > shape.len() {
            self.graph.misuse(format!("{own:?} does not expand to {shape:?}"));
            return self;
        }
        let mut padded = vec![1; shape.len() - own.len()];
        padded.extend(own);
        let lifted = self.reshape(&padded);
        if padded == shape {
            return lifted;
        }
        self.graph.push(Op::Broadcast, &[lifted], shape, DType::F32)
    }
    /// Drops an axis of size 1.
    #[track_caller]
    pub fn squeeze(self, axis: isize) -> Self {
        let axis = self.axis(axis);
        let mut shape = self.shape();
        if shape.get(axis) != Some(&1) {
            self.graph.misuse(format!("squeeze of axis {axis} of {shape:?}"));
            return self;
        }
        shape.remove(axis);
        self.reshape(&shape)
    }
    /// Adds an axis of size 1 before `axis` (−1: at the end).
    #[track_caller]
    pub fn unsqueeze(self, axis: isize) -> Self {
        let mut shape = self.shape();
        let rank = shape.len() as isize;
        let index = if axis < 0 { axis + rank + 1 } else { axis };
        if !(0..=rank).contains(&index) {
            self.graph.misuse(format!("unsqueeze at {axis} of {shape:?}"));
            return self;
        }
        shape.insert(index as usize, 1);
        self.reshape(&shape)
    }
    /// `start..end` along one axis.
    #[track_caller]
    pub fn slice(self, axis: isize, start: usize, end: usize) -> Self {
        let axis = self.axis(axis);
        let mut ends = self.shape();
        let mut starts = vec![0; ends.len()];
        if let (Some(s), Some(e)) = (starts.get_mut(axis), ends.get_mut(axis)) {
            (*s, *e) = (start, end);
        }
        self.one(Op::Slice { starts, ends })
    }
    #[track_caller]
    pub fn pad(self, before: &[usize], after: &[usize], value: f64) -> Self {
        self.one(Op::Pad { before: before.to_vec(), after: after.to_vec(), value })
    }
    /// Joins tensors along an axis.
    #[track_caller]
    pub fn concat(tensors: &[Tensor<'g>], axis: usize) -> Option<Self> {
        let first = tensors.first()?;
        Some(first.graph.push(Op::Concat { axis }, tensors, &[], DType::F32))
    }

    // Tables.

    /// Rows of `self` (a table `[n, …]`) at `ids` (i32): an embedding lookup.
    #[track_caller]
    pub fn gather(self, ids: Tensor<'g>) -> Self {
        self.graph.push(Op::Gather, &[self, ids], &[], DType::F32)
    }
    /// The table with the rows at `ids` replaced.
    #[track_caller]
    pub fn scatter(self, ids: Tensor<'g>, rows: Tensor<'g>) -> Self {
        self.graph.push(Op::Scatter, &[self, ids, rows], &[], DType::F32)
    }

    // Products and windows.

    /// `[…, m, k] × […, k, n]`; leading dimensions broadcast, a 2-D side is shared by all.
    #[track_caller]
    pub fn matmul(self, other: Tensor<'g>) -> Self {
        let (a, b) = (self.shape(), other.shape());
        if a.len() < 2 || b.len() < 2 {
            self.graph.misuse(format!("matmul of {a:?} and {b:?}: both need at least two dimensions"));
            return self;
        }
        let ((lead_a, tail_a), (lead_b, tail_b)) = (a.split_at(a.len() - 2), b.split_at(b.len() - 2));
        if lead_b.is_empty() && !lead_a.is_empty() {
            // One large product instead of many small ones.
            let rows: usize = a[..a.len() - 1].iter().product();
            let flat = self.reshape(&[rows, tail_a[1]]).matmul(other);
            return flat.reshape(&[&a[..a.len() - 1], &[tail_b[1]]].concat());
        }
        let Some(lead) = broadcast_shapes(lead_a, lead_b) else {
            self.graph.misuse(format!("matmul of {a:?} and {b:?}: leading dimensions do not broadcast"));
            return self;
        };
        let left = self.expand_to(&[&lead, tail_a].concat());
        let right = other.expand_to(&[&lead, tail_b].concat());
        self.graph.push(Op::Matmul, &[left, right], &[], DType::F32)
    }
    /// x · weightᵀ + bias, with weight `[out, in]` as `torch.nn.Linear` keeps it.
    #[track_caller]
    pub fn linear(self, weight: Tensor<'g>, bias: Option<Tensor<'g>>) -> Self {
        let y = self.matmul(weight.t());
        match bias {
            Some(bias) => y + bias,
            None => y,
        }
    }
    /// NCHW input, OIHW weight.
    #[track_caller]
    pub fn conv2d(self, weight: Tensor<'g>, conv: crate::ir::Conv) -> Self {
        self.graph.push(Op::Conv2d(conv), &[self, weight], &[], DType::F32)
    }
    #[track_caller]
    pub fn max_pool2d(self, pool: crate::ir::Pool) -> Self {
        self.one(Op::MaxPool2d(pool))
    }
    #[track_caller]
    pub fn avg_pool2d(self, pool: crate::ir::Pool) -> Self {
        self.one(Op::AvgPool2d(pool))
    }
    /// Over the last axis, with gain and bias.
    #[track_caller]
    pub fn layer_norm(self, gain: Tensor<'g>, bias: Tensor<'g>, eps: f64) -> Self {
        self.graph.push(Op::LayerNorm { eps }, &[self, gain, bias], &[], DType::F32)
    }
    /// With the batch's statistics per channel (axis 1).
    #[track_caller]
    pub fn batch_norm(self, gain: Tensor<'g>, bias: Tensor<'g>, eps: f64) -> Self {
        self.graph.push(Op::BatchNorm { eps, axis: 1 }, &[self, gain, bias], &[], DType::F32)
    }
    /// softmax(q·kᵀ/√d + mask)·v for `[batch, heads, tokens, d]`; the mask is added to the scores.
    #[track_caller]
    pub fn attention(self, key: Tensor<'g>, value: Tensor<'g>, mask: Option<Tensor<'g>>) -> Self {
        let scores = (self * (1.0 / (self.size(-1) as f64).sqrt())).matmul(key.t());
        let scores = match mask {
            Some(mask) => scores + mask,
            None => scores,
        };
        scores.softmax().matmul(value)
    }
}

/// The common shape of two shapes by NumPy's rule, if there is one.
pub fn broadcast_shapes(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let size = |shape: &[usize], d: usize| if d + shape.len() < rank { 1 } else { shape[d + shape.len() - rank] };
    (0..rank)
        .map(|d| match (size(a, d), size(b, d)) {
            (x, y) if x == y || y == 1 => Some(x),
            (1, y) => Some(y),
            _ => None,
        })
        .collect()
}

macro_rules! operator {
    ($($trait:ident $method:ident $op:ident;)*) => { $(
        impl<'g, R: Operand<'g>> std::ops::$trait<R> for Tensor<'g> {
            type Output = Tensor<'g>;
            #[track_caller]
            fn $method(self, other: R) -> Tensor<'g> {
                self.binary(Binary::$op, other)
            }
        }
        impl<'g> std::ops::$trait<Tensor<'g>> for f64 {
            type Output = Tensor<'g>;
            #[track_caller]
            fn $method(self, other: Tensor<'g>) -> Tensor<'g> {
                self.tensor(other.graph).binary(Binary::$op, other)
            }
        }
    )* };
}

operator! {
    Add add Add;
    Sub sub Sub;
    Mul mul Mul;
    Div div Div;
}

impl<'g> std::ops::Neg for Tensor<'g> {
    type Output = Tensor<'g>;
    #[track_caller]
    fn neg(self) -> Tensor<'g> {
        self.unary(Unary::Neg)
    }
}
