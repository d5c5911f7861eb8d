//! x86-64 machine code: the few instructions that loops over AVX-512 vectors need, encoded as Intel's Software
//! Developer's Manual (volume 2) has them.
//!
//! Vectors have 16 lanes of 32 bits. What a memory operand leaves to choose (index, broadcast) is in [`Memory`]; constants
//! are kept behind the code.

/// A general register, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpr(pub u8);

pub const RAX: Gpr = Gpr(0);
pub const RCX: Gpr = Gpr(1);
pub const RDX: Gpr = Gpr(2);
pub const RBX: Gpr = Gpr(3);
pub const RSP: Gpr = Gpr(4);
pub const RBP: Gpr = Gpr(5);
pub const RSI: Gpr = Gpr(6);
pub const RDI: Gpr = Gpr(7);
pub const R8: Gpr = Gpr(8);
pub const R9: Gpr = Gpr(9);
pub const R10: Gpr = Gpr(10);
pub const R11: Gpr = Gpr(11);
pub const R12: Gpr = Gpr(12);
pub const R13: Gpr = Gpr(13);
pub const R14: Gpr = Gpr(14);
pub const R15: Gpr = Gpr(15);

/// A vector register, 0 to 31.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zmm(pub u8);

/// A mask register, 1 to 7 (0 means none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mask(pub u8);

/// `base + index · scale + offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub base: Gpr,
    /// With a scale of 1, 2, 4 or 8.
    pub index: Option<(Gpr, u8)>,
    pub offset: i32,
}

/// The last operand of a vector instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    Register(Zmm),
    /// A whole vector.
    Vector(Memory),
    /// One value for all lanes.
    Broadcast(Memory),
    /// One value for all lanes: its bits.
    Constant(u32),
}

/// Which lanes an instruction writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lanes {
    All,
    /// The others keep what they have (in memory, they are not touched).
    Merge(Mask),
    /// The others become 0.
    Zero(Mask),
}

/// Instructions `to = a op b` over lanes, in f32 unless named otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    Add,
    Sub,
    Mul,
    Div,
    /// `a > b ? a : b`, so `b` if either is NaN.
    Max,
    /// `a < b ? a : b`, so `b` if either is NaN.
    Min,
    And,
    Or,
    Xor,
    /// Of 32-bit integers.
    AddInt,
}

/// Instructions `to = op a` over lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Conversion {
    Sqrt,
    /// To a 32-bit integer, towards zero.
    ToInt,
    FromInt,
}

/// Comparisons, by their number in `vcmpps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Predicate {
    Equal = 0x00,
    Unordered = 0x03,
    NotEqual = 0x04,
    Less = 0x11,
    LessOrEqual = 0x12,
}

/// A condition of a jump, by its number in `jcc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Condition {
    Below = 0x2,
    AboveOrEqual = 0x3,
}

/// A place in the code to jump to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(usize);

/// What identifies an instruction with an EVEX prefix.
#[derive(Clone, Copy)]
struct Opcode {
    /// 1: 0F, 2: 0F 38, 3: 0F 3A.
    map: u8,
    /// 0: none, 1: 66, 2: F3.
    prefix: u8,
    byte: u8,
    /// Bytes of a memory operand that is not a broadcast.
    bytes: u8,
    /// 2: 512 bits, 1: 256.
    length: u8,
}

const fn opcode(map: u8, prefix: u8, byte: u8) -> Opcode {
    Opcode { map, prefix, byte, bytes: 64, length: 2 }
}

/// Code under construction.
#[derive(Default)]
pub struct Assembler {
    code: Vec<u8>,
    constants: Vec<u32>,
    /// Where a 32-bit distance to a constant is missing, what it is counted from, and the constant.
    constant_uses: Vec<(usize, usize, usize)>,
    /// Where labels are, once they are.
    labels: Vec<Option<usize>>,
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    /// The finished code; it may lie anywhere (at an address divisible by 4).
    pub fn finish(mut self) -> Vec<u8> {
        for (at, label) in std::mem::take(&mut self.jumps) {
            let target = self.labels[label.0].unwrap_or(at);
            self.patch(at, at + 4, target);
        }
        while !self.code.len().is_multiple_of(4) {
            self.code.push(0xcc);
        }
        let pool = self.code.len();
        for (at, from, constant) in std::mem::take(&mut self.constant_uses) {
            self.patch(at, from, pool + constant * 4);
        }
        self.constants.iter().for_each(|bits| self.code.extend(bits.to_le_bytes()));
        self.code
    }

    /// Writes the distance of `target` from `from` at `at`.
    fn patch(&mut self, at: usize, from: usize, target: usize) {
        let distance = (target as i64 - from as i64) as i32;
        self.code[at..at + 4].copy_from_slice(&distance.to_le_bytes());
    }

    fn constant(&mut self, bits: u32) -> usize {
        let known = self.constants.iter().position(|&b| b == bits);
        known.unwrap_or_else(|| {
            self.constants.push(bits);
            self.constants.len() - 1
        })
    }

    // Vectors.

    pub fn arithmetic(&mut self, op: Arithmetic, to: Zmm, a: Zmm, b: Operand) {
        let opcode = match op {
            Arithmetic::Add => opcode(1, 0, 0x58),
            Arithmetic::Sub => opcode(1, 0, 0x5c),
            Arithmetic::Mul => opcode(1, 0, 0x59),
            Arithmetic::Div => opcode(1, 0, 0x5e),
            Arithmetic::Max => opcode(1, 0, 0x5f),
            Arithmetic::Min => opcode(1, 0, 0x5d),
            Arithmetic::And => opcode(1, 1, 0xdb),
            Arithmetic::Or => opcode(1, 1, 0xeb),
            Arithmetic::Xor => opcode(1, 1, 0xef),
            Arithmetic::AddInt => opcode(1, 1, 0xfe),
        };
        self.evex(opcode, to.0, a.0, b, Lanes::All, None);
    }

    pub fn convert(&mut self, op: Conversion, to: Zmm, a: Operand) {
        let opcode = match op {
            Conversion::Sqrt => opcode(1, 0, 0x51),
            Conversion::ToInt => opcode(1, 2, 0x5b),
            Conversion::FromInt => opcode(1, 0, 0x5b),
        };
        self.evex(opcode, to.0, 0, a, Lanes::All, None);
    }

    /// Shifts 32-bit lanes to the left, filling with 0.
    pub fn shift_left(&mut self, to: Zmm, a: Zmm, bits: u8) {
        self.evex(opcode(1, 1, 0x72), 6, to.0, Operand::Register(a), Lanes::All, Some(bits));
    }

    /// Shifts 32-bit lanes to the right, filling with 0.
    pub fn shift_right(&mut self, to: Zmm, a: Zmm, bits: u8) {
        self.evex(opcode(1, 1, 0x72), 2, to.0, Operand::Register(a), Lanes::All, Some(bits));
    }

    /// Sets a mask's bits where the comparison holds.
    pub fn compare(&mut self, predicate: Predicate, to: Mask, a: Zmm, b: Operand) {
        self.evex(opcode(1, 0, 0xc2), to.0, a.0, b, Lanes::All, Some(predicate as u8));
    }

    /// `mask ? yes : no`.
    pub fn blend(&mut self, mask: Mask, to: Zmm, yes: Operand, no: Zmm) {
        self.evex(opcode(2, 1, 0x65), to.0, no.0, yes, Lanes::Merge(mask), None);
    }

    /// Moves a vector into a register.
    pub fn load(&mut self, to: Zmm, from: Operand, lanes: Lanes) {
        match from {
            Operand::Register(_) | Operand::Vector(_) => self.evex(opcode(1, 0, 0x10), to.0, 0, from, lanes, None),
            Operand::Broadcast(_) | Operand::Constant(_) => {
                let broadcast = Opcode { bytes: 4, ..opcode(2, 1, 0x18) };
                self.evex(broadcast, to.0, 0, from, lanes, None);
            }
        }
    }

    /// 16 values of 16 bits as integers of 32.
    pub fn load_half(&mut self, to: Zmm, from: Memory, lanes: Lanes) {
        self.evex(Opcode { bytes: 32, ..opcode(2, 1, 0x33) }, to.0, 0, Operand::Vector(from), lanes, None);
    }

    pub fn store(&mut self, to: Memory, from: Zmm, lanes: Lanes) {
        self.evex(opcode(1, 0, 0x11), from.0, 0, Operand::Vector(to), lanes, None);
    }

    /// Stores past the caches; the address is a multiple of 64.
    pub fn stream(&mut self, to: Memory, from: Zmm) {
        self.evex(opcode(1, 0, 0x2b), from.0, 0, Operand::Vector(to), Lanes::All, None);
    }

    /// Stores the lower halves of 16 lanes.
    pub fn store_half(&mut self, to: Memory, from: Zmm, lanes: Lanes) {
        self.evex(Opcode { bytes: 32, ..opcode(2, 2, 0x33) }, from.0, 0, Operand::Vector(to), lanes, None);
    }

    /// Likewise past the caches, by way of `from` itself; the address is a multiple of 32.
    pub fn stream_half(&mut self, to: Memory, from: Zmm) {
        self.evex(opcode(2, 2, 0x33), from.0, 0, Operand::Register(from), Lanes::All, None);
        let stream = Opcode { bytes: 32, length: 1, ..opcode(1, 1, 0xe7) };
        self.evex(stream, from.0, 0, Operand::Vector(to), Lanes::All, None);
    }

    /// `reg` and `second` are register numbers (or an opcode's extension); an instruction without a second has 0 there.
    fn evex(&mut self, op: Opcode, reg: u8, second: u8, last: Operand, lanes: Lanes, immediate: Option<u8>) {
        let bit = |value: u8, at: u8| value >> at & 1;
        let (x, b) = match last {
            Operand::Register(r) => (bit(r.0, 4), bit(r.0, 3)),
            Operand::Vector(m) | Operand::Broadcast(m) => (m.index.map_or(0, |(i, _)| bit(i.0, 3)), bit(m.base.0, 3)),
            Operand::Constant(_) => (0, 0),
        };
        // The broadcast instruction itself has no broadcast bit.
        let is_broadcast = matches!(last, Operand::Broadcast(_) | Operand::Constant(_)) && op.bytes != 4;
        let (zero, mask) = match lanes {
            Lanes::All => (0, 0),
            Lanes::Merge(mask) => (0, mask.0),
            Lanes::Zero(mask) => (1, mask.0),
        };
        let not = |value: u8| value ^ 1;
        self.code.extend([
            0x62,
            not(bit(reg, 3)) << 7 | not(x) << 6 | not(b) << 5 | not(bit(reg, 4)) << 4 | op.map,
            (!second & 15) << 3 | 1 << 2 | op.prefix,
            zero << 7 | op.length << 5 | u8::from(is_broadcast) << 4 | not(bit(second, 4)) << 3 | mask,
            op.byte,
        ]);
        match last {
            Operand::Register(r) => self.code.push(0xc0 | (reg & 7) << 3 | r.0 & 7),
            Operand::Vector(m) => self.memory(reg, m, i32::from(op.bytes)),
            Operand::Broadcast(m) => self.memory(reg, m, 4),
            Operand::Constant(bits) => {
                self.code.push((reg & 7) << 3 | 5);
                let constant = self.constant(bits);
                let at = self.code.len();
                self.constant_uses.push((at, at + 4 + usize::from(immediate.is_some()), constant));
                self.code.extend([0; 4]);
            }
        }
        self.code.extend(immediate);
    }

    /// ModRM, SIB and displacement; one byte of displacement counts in `unit`s.
    fn memory(&mut self, reg: u8, m: Memory, unit: i32) {
        let short = i8::try_from(m.offset / unit).ok().filter(|_| m.offset % unit == 0);
        let mode = match (m.offset, short) {
            (0, _) if m.base.0 & 7 != 5 => 0,
            (_, Some(_)) => 1,
            _ => 2,
        };
        let needs_sib = m.index.is_some() || m.base.0 & 7 == 4;
        self.code.push(mode << 6 | (reg & 7) << 3 | if needs_sib { 4 } else { m.base.0 & 7 });
        if needs_sib {
            let (index, scale) = m.index.unwrap_or((RSP, 1));
            self.code.push((scale.trailing_zeros() as u8) << 6 | (index.0 & 7) << 3 | m.base.0 & 7);
        }
        match (mode, short) {
            (1, Some(short)) => self.code.push(short as u8),
            (2, _) => self.code.extend(m.offset.to_le_bytes()),
            _ => {}
        }
    }

    /// A mask from the lower 16 bits of a register (of the first eight).
    pub fn mask_from(&mut self, to: Mask, from: Gpr) {
        self.code.extend([0xc5, 0xf8, 0x92, 0xc0 | to.0 << 3 | from.0 & 7]);
    }

    /// Ends the use of wide registers.
    pub fn zero_upper(&mut self) {
        self.code.extend([0xc5, 0xf8, 0x77]);
    }

    // General registers, 64 bits.

    /// An instruction of one byte with a register and a register or a memory operand.
    fn general(&mut self, byte: u8, reg: u8, last: Result<Gpr, Memory>) {
        let (x, b) = match last {
            Ok(r) => (0, r.0 >> 3),
            Err(m) => (m.index.map_or(0, |(i, _)| i.0 >> 3), m.base.0 >> 3),
        };
        self.code.extend([0x48 | (reg >> 3) << 2 | x << 1 | b, byte]);
        match last {
            Ok(r) => self.code.push(0xc0 | (reg & 7) << 3 | r.0 & 7),
            Err(m) => self.memory(reg, m, 1),
        }
    }

    pub fn mov(&mut self, to: Gpr, from: Gpr) {
        self.general(0x89, from.0, Ok(to));
    }

    pub fn mov_load(&mut self, to: Gpr, from: Memory) {
        self.general(0x8b, to.0, Err(from));
    }

    pub fn mov_store(&mut self, to: Memory, from: Gpr) {
        self.general(0x89, from.0, Err(to));
    }

    /// A number that is not negative.
    pub fn mov_number(&mut self, to: Gpr, number: i32) {
        self.general(0xc7, 0, Ok(to));
        self.code.extend(number.to_le_bytes());
    }

    pub fn add(&mut self, to: Gpr, from: Gpr) {
        self.general(0x01, from.0, Ok(to));
    }

    pub fn sub(&mut self, to: Gpr, from: Gpr) {
        self.general(0x29, from.0, Ok(to));
    }

    pub fn add_number(&mut self, to: Gpr, number: i32) {
        self.general(0x81, 0, Ok(to));
        self.code.extend(number.to_le_bytes());
    }

    pub fn and_number(&mut self, to: Gpr, number: i32) {
        self.general(0x81, 4, Ok(to));
        self.code.extend(number.to_le_bytes());
    }

    /// Shifts left by the count in the lower byte of RCX.
    pub fn shift_by_count(&mut self, to: Gpr) {
        self.general(0xd3, 4, Ok(to));
    }

    /// Sets the flags for `a - b`.
    pub fn compare_general(&mut self, a: Gpr, b: Gpr) {
        self.general(0x39, b.0, Ok(a));
    }

    pub fn push(&mut self, reg: Gpr) {
        self.code.extend([0x40 | reg.0 >> 3, 0x50 | reg.0 & 7]);
    }

    pub fn pop(&mut self, reg: Gpr) {
        self.code.extend([0x40 | reg.0 >> 3, 0x58 | reg.0 & 7]);
    }

    /// Asks for a line; never faults.
    pub fn prefetch(&mut self, m: Memory) {
        self.code.extend([0x40 | m.index.map_or(0, |(i, _)| i.0 >> 3) << 1 | m.base.0 >> 3, 0x0f, 0x18]);
        self.memory(1, m, 1);
    }

    pub fn return_(&mut self) {
        self.code.push(0xc3);
    }

    // Control.

    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Says that a label is here.
    pub fn place(&mut self, label: Label) {
        self.labels[label.0] = Some(self.code.len());
    }

    pub fn jump_if(&mut self, condition: Condition, to: Label) {
        self.code.extend([0x0f, 0x80 | condition as u8]);
        self.jumps.push((self.code.len(), to));
        self.code.extend([0; 4]);
    }
}
