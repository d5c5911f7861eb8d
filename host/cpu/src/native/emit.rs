//! From a list of operations to the machine code of a loop over rows and columns.
//!
//! The loop's body stands twice: for 16 columns, and for what is left of a row, with a mask. Values are kept in the 32
//! vector registers; one that finds no room is put on the stack, or read from its memory again.

use super::assembler::{
    Arithmetic, Assembler, Condition, Gpr, Lanes, Mask, Memory, Operand, R8, R9, R10, R11, R12, R13, R14, R15, RAX,
    RBP, RBX, RCX, RDI, RDX, RSI, RSP, Zmm,
};
use super::record::{Id, Operation};

/// What a loop does with a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sink {
    /// f32 in the loop's order.
    Full,
    /// Past the caches.
    Stream,
    /// bf16 (in the lower halves) in the loop's order.
    Half,
    /// Past the caches.
    StreamHalf,
    /// Added to a vector by column.
    AddToColumn,
}

/// A result of a loop.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    pub sink: Sink,
    /// The pointer's number.
    pub pointer: usize,
    pub value: Id,
}

/// Lanes of a vector.
const LANES: i32 = 16;
/// The mask of a row's last columns.
const LAST: Mask = Mask(1);
/// The mask of comparisons.
const HIT: Mask = Mask(2);
/// Vectors on the stack at most.
const SPILLS: usize = 40;
/// Bytes of a vector.
const BYTES: i32 = 64;
/// How many elements ahead memory is asked for.
const AHEAD: i32 = 512;

// The loop's registers, by the System V convention for its arguments.
const POINTERS: Gpr = RDI;
const COLUMNS: Gpr = RSI;
const ROWS: Gpr = RDX;
/// Elements done.
const ELEMENT: Gpr = RAX;
const COLUMN: Gpr = RCX;
const ROW: Gpr = R8;
/// Columns in whole vectors.
const WHOLE: Gpr = RBP;
const SCALARS: Gpr = RBX;
/// Holds a pointer that has no register of its own.
const SPARE: Gpr = R11;
/// Hold the first pointers.
const HELD: [Gpr; 6] = [R9, R10, R12, R13, R14, R15];
const SAVED: [Gpr; 6] = [RBX, RBP, R12, R13, R14, R15];

/// The code of a function `(pointers, columns, rows)`: `pointers[0]` are the scalars, `pointers[1 + i]` is where pointer i
/// begins. `ahead` says for each pointer whether its memory is walked from loop to loop, so that it pays to ask for what
/// comes next. `None` if it needs more room for values than there is.
pub fn emit(list: &[Operation], outputs: &[Output], ahead: &[bool]) -> Option<Vec<u8>> {
    let mut asm = Assembler::default();
    SAVED.iter().for_each(|&reg| asm.push(reg));
    let frame = SPILLS as i32 * BYTES;
    asm.mov(RAX, RSP);
    asm.add_number(RSP, -(frame + 2 * BYTES));
    asm.and_number(RSP, -BYTES);
    let old_stack = at(RSP, frame);
    asm.mov_store(old_stack, RAX);

    asm.mov(RCX, COLUMNS);
    asm.and_number(RCX, LANES - 1);
    asm.mov_number(RAX, 1);
    asm.shift_by_count(RAX);
    asm.add_number(RAX, -1);
    asm.mask_from(LAST, RAX);
    asm.mov(WHOLE, COLUMNS);
    asm.and_number(WHOLE, -LANES);
    asm.mov_load(SCALARS, at(POINTERS, 0));
    for (number, &reg) in HELD.iter().enumerate().take(ahead.len()) {
        asm.mov_load(reg, in_table(number));
    }
    asm.mov_number(ELEMENT, 0);
    asm.mov_number(ROW, 0);

    let (row, whole, last, next) = (asm.label(), asm.label(), asm.label(), asm.label());
    asm.place(row);
    asm.mov_number(COLUMN, 0);
    asm.compare_general(COLUMN, WHOLE);
    asm.jump_if(Condition::AboveOrEqual, last);
    asm.place(whole);
    Body::new(list, outputs, &mut asm, false).ask_ahead(ahead).emit()?;
    asm.add_number(ELEMENT, LANES);
    asm.add_number(COLUMN, LANES);
    asm.compare_general(COLUMN, WHOLE);
    asm.jump_if(Condition::Below, whole);
    asm.place(last);
    asm.compare_general(COLUMN, COLUMNS);
    asm.jump_if(Condition::AboveOrEqual, next);
    Body::new(list, outputs, &mut asm, true).emit()?;
    asm.add(ELEMENT, COLUMNS);
    asm.sub(ELEMENT, WHOLE);
    asm.place(next);
    asm.add_number(ROW, 1);
    asm.compare_general(ROW, ROWS);
    asm.jump_if(Condition::Below, row);

    asm.zero_upper();
    asm.mov_load(RSP, old_stack);
    SAVED.iter().rev().for_each(|&reg| asm.pop(reg));
    asm.return_();
    Some(asm.finish())
}

fn at(base: Gpr, offset: i32) -> Memory {
    Memory { base, index: None, offset }
}

fn in_table(pointer: usize) -> Memory {
    at(POINTERS, (pointer as i32 + 1) * 8)
}

/// A pointer in a general register, which may be the spare one.
fn pointer_in(asm: &mut Assembler, number: usize) -> Gpr {
    HELD.get(number).copied().unwrap_or_else(|| {
        asm.mov_load(SPARE, in_table(number));
        SPARE
    })
}

/// Where a loop's body keeps its values, while it is written down.
struct Body<'a> {
    list: &'a [Operation],
    outputs: &'a [Output],
    asm: &'a mut Assembler,
    /// For a row's last columns.
    last: bool,
    /// Where each value is read, the next time last; results count as read behind the list.
    uses: Vec<Vec<usize>>,
    /// The register of each value.
    registers: Vec<Option<Zmm>>,
    /// The value of each register.
    values: [Option<Id>; 32],
    /// Not to be given up at present.
    pinned: Vec<Zmm>,
    /// The value of each place on the stack.
    stack: Vec<Option<Id>>,
}

impl<'a> Body<'a> {
    fn new(list: &'a [Operation], outputs: &'a [Output], asm: &'a mut Assembler, last: bool) -> Self {
        let mut uses = vec![vec![]; list.len()];
        for (i, output) in outputs.iter().enumerate().rev() {
            uses[output.value].push(list.len() + i);
        }
        for (reader, operation) in list.iter().enumerate().rev() {
            // What nobody reads is left out, and reads nothing.
            if !uses[reader].is_empty() {
                operation.operands().for_each(|id| uses[id].push(reader));
            }
        }
        Body {
            list,
            outputs,
            asm,
            last,
            uses,
            registers: vec![None; list.len()],
            values: [None; 32],
            pinned: vec![],
            stack: vec![],
        }
    }

    fn emit(mut self) -> Option<()> {
        for now in 0..self.list.len() {
            // Leaves are read where they are used.
            if !self.list[now].is_leaf() && !self.uses[now].is_empty() {
                self.operation(now)?;
            }
        }
        for (i, &output) in self.outputs.iter().enumerate() {
            self.output(self.list.len() + i, output)?;
        }
        Some(())
    }

    /// Asks for memory that comes next: processors foresee one long walk, not several at once.
    fn ask_ahead(self, ahead: &[bool]) -> Self {
        let read = self.list.iter().filter_map(|operation| match operation {
            Operation::Full(pointer) => Some((*pointer, 4)),
            Operation::Half(pointer) => Some((*pointer, 2)),
            _ => None,
        });
        let written = self.outputs.iter().filter_map(|output| match output.sink {
            Sink::Full => Some((output.pointer, 4)),
            Sink::Half => Some((output.pointer, 2)),
            _ => None,
        });
        for (pointer, scale) in read.chain(written).filter(|&(pointer, _)| ahead[pointer]) {
            let base = pointer_in(self.asm, pointer);
            let offset = AHEAD * i32::from(scale);
            self.asm.prefetch(Memory { base, index: Some((ELEMENT, scale)), offset });
        }
        self
    }

    fn operation(&mut self, now: usize) -> Option<()> {
        match self.list[now] {
            Operation::Arithmetic(op, a, b) => {
                let commutes = !matches!(op, Arithmetic::Sub | Arithmetic::Div | Arithmetic::Max | Arithmetic::Min);
                // The operand that may stay in memory comes last.
                let swap = commutes && self.registers[a].is_none() && self.registers[b].is_some();
                let swap = swap || commutes && self.list[a].is_leaf() && !self.list[b].is_leaf();
                let (a, b) = if swap { (b, a) } else { (a, b) };
                let first = self.register(a)?;
                let second = self.operand(b, now)?;
                let to = self.result(now)?;
                self.asm.arithmetic(op, to, first, second);
            }
            Operation::Convert(op, a) => {
                let from = self.operand(a, now)?;
                let to = self.result(now)?;
                self.asm.convert(op, to, from);
            }
            Operation::ShiftLeft(a, bits) => {
                let from = self.register(a)?;
                let to = self.result(now)?;
                self.asm.shift_left(to, from, bits);
            }
            Operation::ShiftRight(a, bits) => {
                let from = self.register(a)?;
                let to = self.result(now)?;
                self.asm.shift_right(to, from, bits);
            }
            Operation::Select { predicate, a, b, yes, no } => {
                let first = self.register(a)?;
                let second = self.operand(b, now)?;
                // What the comparison reads may be read here too: it keeps its register until the select is done.
                self.asm.compare(predicate, HIT, first, second);
                if self.list[no] == Operation::Constant(0) {
                    let yes = self.operand(yes, now)?;
                    let to = self.result(now)?;
                    self.asm.load(to, yes, Lanes::Zero(HIT));
                } else {
                    let no = self.register(no)?;
                    let yes = self.operand(yes, now)?;
                    let to = self.result(now)?;
                    self.asm.blend(HIT, to, yes, no);
                }
            }
            _ => {}
        }
        self.list[now].operands().for_each(|id| self.done(id, now));
        self.pinned.clear();
        Some(())
    }

    fn output(&mut self, now: usize, output: Output) -> Option<()> {
        let value = self.register(output.value)?;
        let lanes = if self.last { Lanes::Merge(LAST) } else { Lanes::All };
        match output.sink {
            Sink::Full | Sink::Stream => {
                let to = self.element(output.pointer, 4);
                match output.sink == Sink::Stream && !self.last {
                    true => self.asm.stream(to, value),
                    false => self.asm.store(to, value, lanes),
                }
            }
            Sink::Half => {
                let to = self.element(output.pointer, 2);
                self.asm.store_half(to, value, lanes);
            }
            Sink::StreamHalf if self.last => {
                let to = self.element(output.pointer, 2);
                self.asm.store_half(to, value, lanes);
            }
            Sink::StreamHalf => {
                // The instruction goes by way of a register, which is a copy if the value is read again.
                let by_way = match self.uses[output.value].len() {
                    1 => value,
                    _ => {
                        let copy = self.free()?;
                        self.asm.load(copy, Operand::Register(value), Lanes::All);
                        copy
                    }
                };
                let to = self.element(output.pointer, 2);
                self.asm.stream_half(to, by_way);
            }
            Sink::AddToColumn => {
                let sum = self.free()?;
                let place = self.column(output.pointer);
                match self.last {
                    true => {
                        self.asm.load(sum, Operand::Vector(place), Lanes::Zero(LAST));
                        self.asm.arithmetic(Arithmetic::Add, sum, sum, Operand::Register(value));
                    }
                    false => self.asm.arithmetic(Arithmetic::Add, sum, value, Operand::Vector(place)),
                }
                let place = self.column(output.pointer);
                self.asm.store(place, sum, lanes);
            }
        }
        self.done(output.value, now);
        self.pinned.clear();
        Some(())
    }

    /// Takes a value's use `now` off its list; the last one frees its places.
    fn done(&mut self, id: Id, now: usize) {
        while self.uses[id].last() == Some(&now) {
            self.uses[id].pop();
        }
        if self.uses[id].is_empty() {
            if let Some(reg) = self.registers[id].take() {
                self.values[usize::from(reg.0)] = None;
            }
            self.stack.iter_mut().filter(|place| **place == Some(id)).for_each(|place| *place = None);
        }
    }

    /// A value as an instruction's last operand.
    fn operand(&mut self, id: Id, now: usize) -> Option<Operand> {
        if let Some(reg) = self.registers[id] {
            self.pinned.push(reg);
            return Some(Operand::Register(reg));
        }
        let only = self.uses[id].iter().all(|&reader| reader == now);
        Some(match self.list[id] {
            Operation::Constant(bits) => Operand::Constant(bits),
            Operation::Scalar(place) => Operand::Broadcast(at(SCALARS, place as i32 * 4)),
            Operation::Row(pointer) => Operand::Broadcast(self.row(pointer)),
            // A row's last columns are read under their mask, on their own.
            Operation::Full(pointer) if only && !self.last => Operand::Vector(self.element(pointer, 4)),
            Operation::Column(pointer) if only && !self.last => Operand::Vector(self.column(pointer)),
            _ => Operand::Register(self.register(id)?),
        })
    }

    /// A value in a register.
    fn register(&mut self, id: Id) -> Option<Zmm> {
        if let Some(reg) = self.registers[id] {
            self.pinned.push(reg);
            return Some(reg);
        }
        let reg = self.free()?;
        let lanes = if self.last { Lanes::Zero(LAST) } else { Lanes::All };
        match self.list[id] {
            Operation::Full(pointer) => {
                let from = self.element(pointer, 4);
                self.asm.load(reg, Operand::Vector(from), lanes);
            }
            Operation::Half(pointer) => {
                let from = self.element(pointer, 2);
                self.asm.load_half(reg, from, lanes);
            }
            Operation::Column(pointer) => {
                let from = self.column(pointer);
                self.asm.load(reg, Operand::Vector(from), lanes);
            }
            Operation::Row(pointer) => {
                let from = self.row(pointer);
                self.asm.load(reg, Operand::Broadcast(from), Lanes::All);
            }
            Operation::Scalar(place) => {
                self.asm.load(reg, Operand::Broadcast(at(SCALARS, place as i32 * 4)), Lanes::All);
            }
            Operation::Constant(bits) => self.asm.load(reg, Operand::Constant(bits), Lanes::All),
            _ => {
                let place = self.stack.iter().position(|&value| value == Some(id))?;
                self.asm.load(reg, Operand::Vector(at(RSP, place as i32 * BYTES)), Lanes::All);
            }
        }
        self.take(reg, id);
        Some(reg)
    }

    /// The register of an operation's result: one that an operand leaves, or a free one.
    fn result(&mut self, now: usize) -> Option<Zmm> {
        let left = (0..32u8).map(Zmm).find(|reg| {
            let value = self.values[usize::from(reg.0)];
            value.is_some_and(|id| self.uses[id].iter().all(|&reader| reader == now))
        });
        let reg = match left {
            Some(reg) => {
                if let Some(id) = self.values[usize::from(reg.0)] {
                    self.registers[id] = None;
                }
                reg
            }
            None => self.free()?,
        };
        self.take(reg, now);
        Some(reg)
    }

    fn take(&mut self, reg: Zmm, id: Id) {
        self.values[usize::from(reg.0)] = Some(id);
        self.registers[id] = Some(reg);
        self.pinned.push(reg);
    }

    /// A register without a value; if there is none, the value that is read last gives up its own.
    fn free(&mut self) -> Option<Zmm> {
        let empty = |reg: &Zmm| self.values[usize::from(reg.0)].is_none() && !self.pinned.contains(reg);
        if let Some(reg) = (0..32u8).map(Zmm).find(empty) {
            return Some(reg);
        }
        let next_read = |reg: &Zmm| {
            let id = self.values[usize::from(reg.0)];
            id.and_then(|id| self.uses[id].last().copied()).unwrap_or(usize::MAX)
        };
        let reg = (0..32u8).map(Zmm).filter(|reg| !self.pinned.contains(reg)).max_by_key(next_read)?;
        if let Some(id) = self.values[usize::from(reg.0)].take() {
            self.registers[id] = None;
            if !self.list[id].is_leaf() && !self.stack.contains(&Some(id)) {
                let place = match self.stack.iter().position(Option::is_none) {
                    Some(place) => place,
                    None if self.stack.len() < SPILLS => {
                        self.stack.push(None);
                        self.stack.len() - 1
                    }
                    None => return None,
                };
                self.stack[place] = Some(id);
                self.asm.store(at(RSP, place as i32 * BYTES), reg, Lanes::All);
            }
        }
        Some(reg)
    }

    fn element(&mut self, pointer: usize, scale: u8) -> Memory {
        Memory { base: pointer_in(self.asm, pointer), index: Some((ELEMENT, scale)), offset: 0 }
    }

    fn column(&mut self, pointer: usize) -> Memory {
        Memory { base: pointer_in(self.asm, pointer), index: Some((COLUMN, 4)), offset: 0 }
    }

    fn row(&mut self, pointer: usize) -> Memory {
        Memory { base: pointer_in(self.asm, pointer), index: Some((ROW, 4)), offset: 0 }
    }
}
