//! A loop's body as a list of operations over lanes, each a machine instruction or two.

use super::assembler::{Arithmetic, Conversion, Predicate};
use crate::math::{self, Lane};
use clip_host_plugin_api::ir::{Binary, Compare, Unary};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::{Add, Div, Mul, Sub};

/// The place of an operation in the list; also names its result.
pub type Id = usize;

/// An operation; its operands come before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// f32 in the loop's order, by the pointer's number.
    Full(usize),
    /// The same of bf16, as integers.
    Half(usize),
    /// f32 by column.
    Column(usize),
    /// One f32 for each row.
    Row(usize),
    /// One f32 for the loop, by its place in the table of scalars.
    Scalar(usize),
    /// One for good: its bits.
    Constant(u32),
    Arithmetic(Arithmetic, Id, Id),
    Convert(Conversion, Id),
    ShiftLeft(Id, u8),
    ShiftRight(Id, u8),
    /// `a predicate b ? yes : no`.
    Select {
        predicate: Predicate,
        a: Id,
        b: Id,
        yes: Id,
        no: Id,
    },
}

impl Operation {
    /// The operations that it reads.
    pub fn operands(self) -> impl Iterator<Item = Id> {
        let [a, b, c, d] = match self {
            Operation::Full(_) | Operation::Half(_) | Operation::Column(_) => [None; 4],
            Operation::Row(_) | Operation::Scalar(_) | Operation::Constant(_) => [None; 4],
            Operation::Arithmetic(_, a, b) => [Some(a), Some(b), None, None],
            Operation::Convert(_, a) | Operation::ShiftLeft(a, _) | Operation::ShiftRight(a, _) => {
                [Some(a), None, None, None]
            }
            Operation::Select { a, b, yes, no, .. } => [Some(a), Some(b), Some(yes), Some(no)],
        };
        [a, b, c, d].into_iter().flatten()
    }

    /// Whether it only says where a value is in memory, so that its register can be given up at no cost.
    pub fn is_leaf(self) -> bool {
        self.operands().next().is_none()
    }
}

/// Records operations, each of them once.
#[derive(Default)]
pub struct Recorder {
    list: RefCell<Vec<Operation>>,
    known: RefCell<HashMap<Operation, Id>>,
}

/// A value under construction.
#[derive(Clone, Copy)]
pub struct Recorded<'r> {
    recorder: &'r Recorder,
    id: Id,
}

impl Recorder {
    /// The operation's result; one that stands already is used again.
    pub fn value(&self, operation: Operation) -> Recorded<'_> {
        let mut list = self.list.borrow_mut();
        let id = *self.known.borrow_mut().entry(operation).or_insert_with(|| {
            list.push(operation);
            list.len() - 1
        });
        Recorded { recorder: self, id }
    }

    pub fn constant(&self, value: f32) -> Recorded<'_> {
        self.value(Operation::Constant(value.to_bits()))
    }

    /// What was recorded.
    pub fn finish(self) -> Vec<Operation> {
        self.list.into_inner()
    }
}

impl<'r> Recorded<'r> {
    pub fn id(self) -> Id {
        self.id
    }

    fn arithmetic(self, op: Arithmetic, b: Recorded<'r>) -> Recorded<'r> {
        self.recorder.value(Operation::Arithmetic(op, self.id, b.id))
    }

    fn convert(self, op: Conversion) -> Recorded<'r> {
        self.recorder.value(Operation::Convert(op, self.id))
    }

    fn bits(self, bits: u32) -> Recorded<'r> {
        self.recorder.value(Operation::Constant(bits))
    }

    /// `self predicate b ? yes : no`.
    pub fn select(self, predicate: Predicate, b: Recorded<'r>, yes: Recorded<'r>, no: Recorded<'r>) -> Recorded<'r> {
        self.recorder.value(Operation::Select { predicate, a: self.id, b: b.id, yes: yes.id, no: no.id })
    }

    /// bf16 as it is loaded, as f32.
    pub fn widened(self) -> Recorded<'r> {
        self.recorder.value(Operation::ShiftLeft(self.id, 16))
    }

    /// The nearest bf16 in the lower halves, as [`clip_host_cpu_kernels::elements::narrowed`].
    pub fn narrowed(self) -> Recorded<'r> {
        let upper = self.recorder.value(Operation::ShiftRight(self.id, 16));
        let odd = upper.arithmetic(Arithmetic::And, self.bits(1));
        let sum = self.arithmetic(Arithmetic::AddInt, odd.arithmetic(Arithmetic::AddInt, self.bits(0x7fff)));
        let rounded = self.recorder.value(Operation::ShiftRight(sum.id, 16));
        let quiet = upper.arithmetic(Arithmetic::Or, self.bits(0x40));
        self.select(Predicate::Unordered, self, quiet, rounded)
    }

    /// The op's result, if it has a form without calls.
    pub fn unary(self, op: Unary) -> Option<Recorded<'r>> {
        Some(match op {
            Unary::Neg => self.arithmetic(Arithmetic::Xor, self.bits(1 << 31)),
            Unary::Exp => math::exp(self),
            Unary::Ln => math::ln(self),
            Unary::Sqrt => self.convert(Conversion::Sqrt),
            Unary::Recip => self.constant(1.0) / self,
            Unary::Tanh => math::tanh(self),
            Unary::Erf => math::erf(self),
            Unary::Abs => self.abs(),
            Unary::Sin | Unary::Cos => return None,
        })
    }

    /// As [`Recorded::unary`].
    pub fn binary(self, op: Binary, b: Recorded<'r>) -> Option<Recorded<'r>> {
        Some(match op {
            Binary::Add => self + b,
            Binary::Sub => self - b,
            Binary::Mul => self * b,
            Binary::Div => self / b,
            // NaN in either argument gives NaN, as in PyTorch.
            Binary::Maximum => self.if_nan(self, self.arithmetic(Arithmetic::Max, b)),
            Binary::Minimum => self.if_nan(self, self.arithmetic(Arithmetic::Min, b)),
            Binary::Pow => return None,
        })
    }

    /// `self op b ? yes : no`.
    pub fn compare(self, op: Compare, b: Recorded<'r>, yes: Recorded<'r>, no: Recorded<'r>) -> Recorded<'r> {
        let predicate = match op {
            Compare::Lt => Predicate::Less,
            Compare::Le => Predicate::LessOrEqual,
            Compare::Eq => Predicate::Equal,
        };
        self.select(predicate, b, yes, no)
    }
}

/// Whether [`Recorded::unary`] has a form.
pub fn has_unary(op: Unary) -> bool {
    !matches!(op, Unary::Sin | Unary::Cos)
}

/// Whether [`Recorded::binary`] has a form.
pub fn has_binary(op: Binary) -> bool {
    op != Binary::Pow
}

impl<'r> Add for Recorded<'r> {
    type Output = Recorded<'r>;

    fn add(self, b: Recorded<'r>) -> Recorded<'r> {
        self.arithmetic(Arithmetic::Add, b)
    }
}

impl<'r> Sub for Recorded<'r> {
    type Output = Recorded<'r>;

    fn sub(self, b: Recorded<'r>) -> Recorded<'r> {
        self.arithmetic(Arithmetic::Sub, b)
    }
}

impl<'r> Mul for Recorded<'r> {
    type Output = Recorded<'r>;

    fn mul(self, b: Recorded<'r>) -> Recorded<'r> {
        self.arithmetic(Arithmetic::Mul, b)
    }
}

impl<'r> Div for Recorded<'r> {
    type Output = Recorded<'r>;

    fn div(self, b: Recorded<'r>) -> Recorded<'r> {
        self.arithmetic(Arithmetic::Div, b)
    }
}

impl<'r> Add<f32> for Recorded<'r> {
    type Output = Recorded<'r>;

    fn add(self, b: f32) -> Recorded<'r> {
        self + self.constant(b)
    }
}

impl<'r> Sub<f32> for Recorded<'r> {
    type Output = Recorded<'r>;

    fn sub(self, b: f32) -> Recorded<'r> {
        self - self.constant(b)
    }
}

impl<'r> Mul<f32> for Recorded<'r> {
    type Output = Recorded<'r>;

    fn mul(self, b: f32) -> Recorded<'r> {
        self * self.constant(b)
    }
}

impl Lane for Recorded<'_> {
    fn constant(self, value: f32) -> Self {
        self.bits(value.to_bits())
    }

    fn at_least(self, low: f32) -> Self {
        self.arithmetic(Arithmetic::Max, self.constant(low))
    }

    fn at_most(self, high: f32) -> Self {
        self.arithmetic(Arithmetic::Min, self.constant(high))
    }

    fn abs(self) -> Self {
        self.arithmetic(Arithmetic::And, self.bits(!(1 << 31)))
    }

    fn copysign(self, sign: Self) -> Self {
        self.abs().arithmetic(Arithmetic::Or, sign.arithmetic(Arithmetic::And, self.bits(1 << 31)))
    }

    fn power_of_two(self) -> Self {
        let exponent = self.convert(Conversion::ToInt).arithmetic(Arithmetic::AddInt, self.bits(127));
        self.recorder.value(Operation::ShiftLeft(exponent.id, 23))
    }

    fn exponent(self) -> Self {
        let biased = self.recorder.value(Operation::ShiftRight(self.id, 23));
        biased.arithmetic(Arithmetic::AddInt, self.bits((-126i32).cast_unsigned())).convert(Conversion::FromInt)
    }

    fn mantissa(self) -> Self {
        self.arithmetic(Arithmetic::And, self.bits(0x007f_ffff)).arithmetic(Arithmetic::Or, self.bits(0x3f00_0000))
    }

    fn if_less(self, bound: f32, yes: Self, no: Self) -> Self {
        self.select(Predicate::Less, self.constant(bound), yes, no)
    }

    fn if_equal(self, value: f32, yes: Self, no: Self) -> Self {
        self.select(Predicate::Equal, self.constant(value), yes, no)
    }

    fn if_nan(self, yes: Self, no: Self) -> Self {
        self.select(Predicate::Unordered, self, yes, no)
    }
}
