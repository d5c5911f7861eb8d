//! Groups of a kernel's instructions as compiled loops.

use super::schedule::Action;
use super::tile::{Tile, Worker};
use super::{Program, Run, Slot, Source};
use crate::math::without_subnormals;
use crate::native::{self, Loop, MAX_POINTERS, Operation, Output, Predicate, Recorded, Recorder, Sink};
use clip_host_compiler::kernel::{Element, Fused, Instr, Pattern, Rank, Reg, Store};
use clip_host_compiler::lower::operands;
use clip_host_cpu_kernels::bf16;
use std::collections::HashMap;

/// Columns from which rows are worth a loop.
const MIN_COLUMNS: usize = 8;

/// A group made ready to run.
pub struct Group {
    code: Loop,
    pointers: Vec<Pointer>,
    /// The values that leave it.
    leave: Vec<Reg>,
    /// Whether rows make no difference: the tile is one long row.
    is_flat: bool,
}

/// What a loop reads or writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pointer {
    /// An operand in memory, in the space's order.
    Load(usize),
    /// An operand in memory, by column.
    Column(usize),
    /// A value that a step or another loop made.
    Register(Reg),
    /// A result in memory.
    Output(usize),
    /// A result's partial sums by column.
    Sums(usize),
}

impl Program {
    /// Which instructions can be in a loop.
    pub(super) fn can_be_in_loops(&self, kernel: &Fused) -> Vec<bool> {
        let code = &kernel.code;
        let mut can: Vec<bool> = code
            .iter()
            .map(|(instr, rank)| {
                *rank == Rank::Full
                    && match instr {
                        Instr::Load(load) => !matches!(self.loads[*load].source, Source::Gathered),
                        Instr::Unary(op, _) => native::has_unary(*op),
                        Instr::Binary(op, ..) => native::has_binary(*op),
                        Instr::Expand(_) | Instr::Compare(..) | Instr::Select(..) => true,
                        _ => false,
                    }
            })
            .collect();
        // What a step reads must be there for it.
        for (reader, (instr, _)) in code.iter().enumerate().rev() {
            for operand in operands(instr) {
                can[operand] &= can[reader] || !matches!(code[operand].0, Instr::Load(_));
            }
        }
        can
    }

    /// Compiles the groups among a program's actions; `None` if one cannot be.
    pub(super) fn compile_groups(&self, kernel: &Fused, actions: Vec<Action>, can: &[bool]) -> Option<Vec<Run>> {
        let compile = |action| match action {
            Action::Step(reg) => Some(Run::Step(reg)),
            Action::Group(members) => Group::new(self, kernel, can, &members).map(Run::Group),
        };
        actions.into_iter().map(compile).collect()
    }
}

impl Group {
    fn new(program: &Program, kernel: &Fused, can: &[bool], members: &[Reg]) -> Option<Group> {
        let recorder = Recorder::default();
        let (pointers, values) = (vec![], HashMap::new());
        let mut body = Body { program, kernel, members, can, recorder: &recorder, pointers, values };
        for &member in members {
            body.value(member)?;
        }
        let outputs = body.outputs()?;
        let pointers = body.pointers;
        let by_row_or_column = |operation: &Operation| matches!(operation, Operation::Row(_) | Operation::Column(_));
        let list = recorder.finish();
        let is_flat = !list.iter().any(by_row_or_column) && !outputs.iter().any(|o| o.sink == Sink::AddToColumn);
        if !is_flat && program.cols < MIN_COLUMNS && program.rows > 1 {
            return None;
        }
        let in_memory = |pointer: &Pointer| match *pointer {
            Pointer::Load(_) | Pointer::Output(_) => true,
            Pointer::Register(reg) => !matches!(program.steps[reg].slot, Slot::Scratch(_)),
            Pointer::Column(_) | Pointer::Sums(_) => false,
        };
        let ahead: Vec<bool> = pointers.iter().map(in_memory).collect();
        let leave = members.iter().copied().filter(|&reg| program.steps[reg].slot != Slot::None).collect();
        Some(Group { code: Loop::new(&list, &outputs, &ahead)?, pointers, leave, is_flat })
    }

    /// Runs the loop over a tile.
    ///
    /// # Safety
    /// As [`Program::tile`]; what the group reads is in `regs`.
    pub(super) unsafe fn run(&self, program: &Program, worker: &Worker, tile: Tile, regs: &mut [*const f32]) {
        let Worker { task, memory, partials, .. } = *worker;
        let Tile { row, rows, col, cols } = tile;
        let flat = row * program.cols + col;
        let mut pointers = [std::ptr::null::<u8>(); MAX_POINTERS + 1];
        // SAFETY: every operand and result covers the tile; slots and partial sums are the task's own.
        unsafe {
            for &reg in &self.leave {
                regs[reg] = program.slot(&program.steps[reg], worker, tile);
            }
            pointers[0] = worker.scalars.cast();
            let at = |address, element, start| match element {
                // Of f16 nothing is in a loop.
                Element::Bf16 => memory.at::<bf16>(address).add(start).cast::<u8>().cast_const(),
                _ => memory.at::<f32>(address).add(start).cast::<u8>().cast_const(),
            };
            for (to, pointer) in pointers[1..].iter_mut().zip(&self.pointers) {
                *to = match *pointer {
                    Pointer::Load(load) => at(program.loads[load].address, program.loads[load].element, flat),
                    Pointer::Column(load) => at(program.loads[load].address, program.loads[load].element, col),
                    Pointer::Register(reg) => regs[reg].cast(),
                    Pointer::Output(out) => at(program.outs[out].address, program.outs[out].element, flat),
                    Pointer::Sums(out) => {
                        partials.add(program.outs[out].partial + task * program.cols + col).cast::<u8>().cast_const()
                    }
                };
            }
            let (columns, rows) = if self.is_flat { (rows * cols, 1) } else { (cols, rows) };
            self.code.run(&pointers, columns, rows);
        }
    }
}

/// A loop's body under construction.
struct Body<'a> {
    program: &'a Program,
    kernel: &'a Fused,
    members: &'a [Reg],
    can: &'a [bool],
    recorder: &'a Recorder,
    pointers: Vec<Pointer>,
    values: HashMap<Reg, Recorded<'a>>,
}

impl<'a> Body<'a> {
    fn pointer(&mut self, pointer: Pointer) -> usize {
        let known = self.pointers.iter().position(|&p| p == pointer);
        known.unwrap_or_else(|| {
            self.pointers.push(pointer);
            self.pointers.len() - 1
        })
    }

    /// A value in the loop: a member's is computed, others are read.
    fn value(&mut self, reg: Reg) -> Option<Recorded<'a>> {
        if let Some(&value) = self.values.get(&reg) {
            return Some(value);
        }
        let (instr, rank) = &self.kernel.code[reg];
        let value = match (instr, rank) {
            _ if self.members.contains(&reg) => self.member(reg)?,
            (Instr::Load(load), Rank::Full) if self.can[reg] => self.load(*load),
            (Instr::Const(value), _) => self.recorder.constant(*value),
            (_, Rank::Scalar) => self.recorder.value(Operation::Scalar(reg)),
            (_, Rank::Row) => {
                let pointer = self.pointer(Pointer::Register(reg));
                self.recorder.value(Operation::Row(pointer))
            }
            (_, Rank::Full) => {
                let pointer = self.pointer(Pointer::Register(reg));
                self.recorder.value(Operation::Full(pointer))
            }
        };
        self.values.insert(reg, value);
        Some(value)
    }

    fn load(&mut self, load: usize) -> Recorded<'a> {
        if self.kernel.inputs[load].pattern == Pattern::Column {
            let pointer = self.pointer(Pointer::Column(load));
            return self.recorder.value(Operation::Column(pointer));
        }
        let pointer = self.pointer(Pointer::Load(load));
        match self.program.loads[load].source {
            Source::Widened => self.recorder.value(Operation::Half(pointer)).widened(),
            _ => self.recorder.value(Operation::Full(pointer)),
        }
    }

    /// Records a member.
    fn member(&mut self, reg: Reg) -> Option<Recorded<'a>> {
        Some(match self.kernel.code[reg].0 {
            Instr::Load(load) => self.load(load),
            Instr::Expand(a) => self.value(a)?,
            Instr::Unary(op, a) => self.value(a)?.unary(op)?,
            Instr::Binary(op, a, b) => self.value(a)?.binary(op, self.value(b)?)?,
            Instr::Compare(op, a, b) => {
                let (one, zero) = (self.recorder.constant(1.0), self.recorder.constant(0.0));
                self.value(a)?.compare(op, self.value(b)?, one, zero)
            }
            Instr::Select(c, yes, no) => {
                let (yes, no) = (self.value(yes)?, self.value(no)?);
                match self.kernel.code[c].0 {
                    // A comparison of this loop need not become a number first.
                    Instr::Compare(op, a, b) if self.members.contains(&c) => {
                        self.value(a)?.compare(op, self.value(b)?, yes, no)
                    }
                    _ => self.value(c)?.select(Predicate::NotEqual, self.recorder.constant(0.0), yes, no),
                }
            }
            _ => return None,
        })
    }

    /// What the loop writes: values that leave it, and results.
    fn outputs(&mut self) -> Option<Vec<Output>> {
        let mut outputs = vec![];
        for &member in self.members {
            if self.program.steps[member].slot != Slot::None {
                let pointer = self.pointer(Pointer::Register(member));
                outputs.push(Output { sink: Sink::Full, pointer, value: self.value(member)?.id() });
            }
        }
        for (number, out) in self.program.outs.iter().enumerate() {
            let written = self.members.contains(&out.value) && out.direct;
            if !written || self.program.steps[out.value].slot == Slot::Output(number) {
                continue;
            }
            let value = self.value(out.value)?;
            let (sink, pointer, value) = match (out.store, out.element) {
                (Store::SumRows { .. }, _) => (Sink::AddToColumn, Pointer::Sums(number), value),
                (_, Element::Bf16) if out.streamed => (Sink::StreamHalf, Pointer::Output(number), value.narrowed()),
                (_, Element::Bf16) => (Sink::Half, Pointer::Output(number), value.narrowed()),
                _ if out.streamed => (Sink::Stream, Pointer::Output(number), value),
                _ if out.is_leaf() => (Sink::Full, Pointer::Output(number), without_subnormals(value)),
                _ => (Sink::Full, Pointer::Output(number), value),
            };
            outputs.push(Output { sink, pointer: self.pointer(pointer), value: value.id() });
        }
        Some(outputs)
    }
}
