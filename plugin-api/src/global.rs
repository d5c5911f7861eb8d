//! What global contrastive losses keep from step to step: numbers for each sample, and moving averages of softmax
//! denominators.
//!
//! Such a loss divides the exponentials of a batch's similarities by a sum over the whole data set. No batch gives that
//! sum, so each batch moves an average of it. The exponentials overflow f32, so an average is a pair: a sum s and a shift
//! b, which stand for s·exp(b). SogCLR (Yuan et al., ICML 2022, arXiv:2202.12387) and iSogCLR (Qiu et al., ICML 2023,
//! arXiv:2305.11965) keep one pair for each sample, OnlineCLR one for each kind of pair.

use crate::graph::{Graph, Tensor};
use crate::ir::Init;
use crate::loss::LossInputs;

/// A state with one number for each sample of the data set, seen at a batch's ids.
#[derive(Clone, Copy)]
pub struct SampleTable<'g> {
    graph: &'g Graph,
    table: Tensor<'g>,
    ids: Tensor<'g>,
}

impl<'g> SampleTable<'g> {
    /// The state `name`, of which every number is `start` before the first step; `ids` are
    /// [`LossInputs::image_ids`] or [`LossInputs::text_ids`].
    pub fn new(graph: &'g Graph, inputs: &LossInputs<'g>, name: &str, ids: Tensor<'g>, start: f64) -> Self {
        SampleTable { graph, table: graph.state(name, &[inputs.dataset_size], Init::Constant(start)), ids }
    }

    /// The batch's numbers as they were before the step, `[batch]`.
    #[track_caller]
    pub fn rows(self) -> Tensor<'g> {
        self.table.gather(self.ids)
    }

    /// What the batch's numbers, `[batch]`, are from the next step on.
    #[track_caller]
    pub fn store(self, rows: Tensor<'g>) {
        self.graph.update(self.table, self.table.scatter(self.ids, rows));
    }
}

/// The number sum·exp(shift), or several of them; both tensors have the same shape.
#[derive(Clone, Copy)]
pub struct ShiftedSum<'g> {
    pub sum: Tensor<'g>,
    pub shift: Tensor<'g>,
}

impl<'g> ShiftedSum<'g> {
    /// (1 − gamma)·self + gamma·`new`, with the shift of `new`. The caller sees to it that exp(self.shift − new.shift)
    /// times self.sum is finite: shifts that never fall do.
    #[track_caller]
    pub fn average(self, new: ShiftedSum<'g>, gamma: f64) -> ShiftedSum<'g> {
        let old = self.sum * (self.shift - new.shift).exp();
        ShiftedSum { sum: old * (1.0 - gamma) + new.sum * gamma, shift: new.shift }
    }
}

/// The moving averages of a softmax denominator for every image, or for every text: the states `s_<suffix>` and
/// `b_<suffix>`, from 0.
pub struct Denominators<'g> {
    sum: SampleTable<'g>,
    shift: SampleTable<'g>,
    epoch: Tensor<'g>,
}

/// What [`Denominators::update`] gives.
pub struct Exponentials<'g> {
    /// exp(h_ij − shift_i), `[batch, batch]`; 0 on the diagonal.
    pub values: Tensor<'g>,
    /// The averages with this batch in them, `[batch]` each.
    pub average: ShiftedSum<'g>,
}

impl<'g> Denominators<'g> {
    /// The averages at `ids`, the batch's images or texts.
    pub fn new(graph: &'g Graph, inputs: &LossInputs<'g>, suffix: &str, ids: Tensor<'g>) -> Self {
        let table = |name: &str| SampleTable::new(graph, inputs, &format!("{name}_{suffix}"), ids, 0.0);
        Denominators { sum: table("s"), shift: table("b"), epoch: inputs.epoch }
    }

    /// Moves the averages by Σ_{j≠i} exp(h_ij) / `divisor` and stores them. Row i of `h`, `[batch, batch]`, belongs to
    /// the i-th id; nothing flows back through it.
    ///
    /// In epoch 0 an average is the batch's own sum, later it is (1 − gamma)·old + gamma·new: a sample first seen after
    /// epoch 0 starts from 0, as in the published code. The shift is the largest h_ij so far, that of i = j among them.
    #[track_caller]
    pub fn update(&self, h: Tensor<'g>, gamma: f64, divisor: f64) -> Exponentials<'g> {
        let h = h.detach();
        let old = ShiftedSum { sum: self.sum.rows(), shift: self.shift.rows() };
        // Never falls, so that old sums only shrink when they are brought to it.
        let shift = old.shift.maximum(h.max(&[-1], false));
        let values = h.graph().eye(h.size(-1)).where_(0.0, (h - shift.unsqueeze(-1)).exp());
        let new = ShiftedSum { sum: values.sum(&[-1], false) / divisor, shift };
        let sum = self.epoch.eq(0.0).where_(new.sum, old.average(new, gamma).sum);
        self.sum.store(sum);
        self.shift.store(shift);
        Exponentials { values, average: ShiftedSum { sum, shift } }
    }
}
