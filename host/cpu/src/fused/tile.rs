//! A tile of a kernel: its instructions, then what leaves it.

use super::{Load, Program, Run, SHORT, Slot, Source, Step, Work};
use crate::memory::Memory;
use crate::tape::{self, Arg};
use crate::walk::{Cols, Rows, iota, read};
use clip_host_compiler::kernel::{Element, Instr, Rank, Rounding, Store};
use clip_host_cpu_kernels::{bf16, f16};

/// A part of the kernel's space.
#[derive(Clone, Copy)]
pub struct Tile {
    pub row: usize,
    pub rows: usize,
    pub col: usize,
    pub cols: usize,
}

/// What one task works with.
pub struct Worker<'a> {
    pub task: usize,
    pub memory: Memory<'a>,
    /// `Program::scratch` elements of this task alone.
    pub scratch: *mut f32,
    /// The values of scalars, by instruction.
    pub scalars: *const f32,
    pub partials: *mut f32,
    pub seed: u64,
}

impl Program {
    /// Does a tile's work, then stores what leaves it.
    ///
    /// # Safety
    /// As [`Program::run`]; the worker's memory belongs to this task alone.
    pub(super) unsafe fn tile(&self, worker: &Worker, tile: Tile, regs: &mut [*const f32]) {
        let Worker { memory, scratch, seed, .. } = *worker;
        let Tile { row, rows, col, cols } = tile;
        let flat = row * self.cols + col;
        let ahead = rows * cols;
        // SAFETY: addresses and slots come from the plan, lengths from the tile.
        unsafe {
            for (turn, run) in self.order.iter().enumerate() {
                // Each turn asks for its share of the next tile.
                self.streams.iter().for_each(|stream| stream.ask(memory, flat + ahead, turn));
                let at = match run {
                    Run::Step(reg) => *reg,
                    Run::Group(group) => {
                        group.run(self, worker, tile, regs);
                        continue;
                    }
                };
                let step = &self.steps[at];
                if step.rank == Rank::Scalar {
                    continue;
                }
                let n = if step.rank == Rank::Full { rows * cols } else { rows };
                let out = self.slot(step, worker, tile);
                let instr = match &step.work {
                    Work::Nothing => continue,
                    Work::Pair(pair) => {
                        let (sources, how) = ([pair.a, pair.b, pair.c], (step.rank, step.mixed));
                        self.rowwise(&sources, how, tile, scratch, regs, |args, at, n| {
                            (self.loops.pair)(pair.ops, args[0], args[1], args[2], out.add(at), n);
                        });
                        regs[at] = out;
                        continue;
                    }
                    Work::Instr(instr) => instr,
                };
                match instr {
                    Instr::Load(load) => {
                        let load = &self.loads[*load];
                        match load.source {
                            Source::Repeated => continue,
                            Source::Direct => {
                                let start = match (&load.rows, step.rank) {
                                    (Rows::Linear(0), _) => col,
                                    (_, Rank::Full) => flat,
                                    _ => row,
                                };
                                regs[at] = memory.at::<f32>(load.address).add(start);
                                continue;
                            }
                            Source::Widened => {
                                let start = if step.rank == Rank::Full { flat } else { row };
                                (self.loops.widen)(memory.at::<bf16>(load.address).add(start), out, n);
                            }
                            Source::Gathered => self.gather(load, step.rank, tile, memory, out),
                        }
                    }
                    Instr::Index(factors) => {
                        let (outer, inner) = self.dims.split_at(self.dims.len() - self.inner);
                        let cols = if step.rank == Rank::Row { None } else { Some(tile.col..tile.col + cols) };
                        iota((outer, inner), factors, row..row + rows, cols, out);
                    }
                    Instr::Random(stream) => (self.loops.uniform)(
                        seed,
                        *stream,
                        if step.rank == Rank::Full { flat } else { row } as u64,
                        out,
                        n,
                    ),
                    Instr::RowSum(a) | Instr::RowMax(a) => {
                        let is_max = matches!(instr, Instr::RowMax(_));
                        (self.loops.reduce_rows)(is_max, regs[*a], rows, cols, out);
                    }
                    Instr::Expand(a) => {
                        self.rowwise(&[*a], (step.rank, step.mixed), tile, scratch, regs, |args, at, n| {
                            (self.loops.unary_identity)(args[0], out.add(at), n);
                        })
                    }
                    Instr::Unary(op, a) => {
                        self.rowwise(&[*a], (step.rank, step.mixed), tile, scratch, regs, |args, at, n| {
                            (self.loops.unary)(*op, args[0], out.add(at), n);
                        })
                    }
                    Instr::Binary(op, a, b) => {
                        self.rowwise(&[*a, *b], (step.rank, step.mixed), tile, scratch, regs, |args, at, n| {
                            (self.loops.binary)(*op, args[0], args[1], out.add(at), n);
                        })
                    }
                    Instr::Compare(op, a, b) => {
                        self.rowwise(&[*a, *b], (step.rank, step.mixed), tile, scratch, regs, |args, at, n| {
                            (self.loops.compare)(*op, args[0], args[1], out.add(at), n);
                        })
                    }
                    Instr::Select(c, a, b) => {
                        self.rowwise(&[*c, *a, *b], (step.rank, step.mixed), tile, scratch, regs, |args, at, n| {
                            (self.loops.select)(args[0], args[1], args[2], out.add(at), n);
                        })
                    }
                    Instr::Const(_) => continue,
                }
                regs[at] = out;
            }
            self.store(worker, tile, regs);
        }
    }

    /// Where a step's value is kept; null if nowhere.
    ///
    /// # Safety
    /// As [`Program::tile`].
    pub(super) unsafe fn slot(&self, step: &Step, worker: &Worker, tile: Tile) -> *mut f32 {
        match step.slot {
            // SAFETY: slots lie in the scratch, tiles in the kernel's space.
            Slot::Scratch(offset) => unsafe { worker.scratch.add(offset) },
            Slot::Output(output) => {
                let start = if step.rank == Rank::Full { tile.row * self.cols + tile.col } else { tile.row };
                // SAFETY: as above.
                unsafe { worker.memory.at::<f32>(self.outs[output].address).add(start) }
            }
            Slot::None => std::ptr::null_mut(),
        }
    }

    /// Calls `f` over the tile's elements: at once, or row by row where row values meet full ones. Values of short rows
    /// are repeated first, so that one call does for all.
    ///
    /// # Safety
    /// As [`Program::run`]; `scratch` has `self.scratch` elements and belongs to this task alone.
    unsafe fn rowwise<const N: usize>(
        &self,
        sources: &[usize; N],
        (rank, mixed): (Rank, bool),
        tile: Tile,
        scratch: *mut f32,
        regs: &[*const f32],
        f: impl Fn([Arg; N], usize, usize),
    ) {
        if mixed && tile.rows > 1 && tile.cols <= SHORT {
            let mut number = 0;
            let args = sources.map(|s| {
                if self.steps[s].rank != Rank::Row {
                    // SAFETY: every register points to what its rank says.
                    return unsafe { self.arg(regs, s) };
                }
                // SAFETY: there is room for a repeated tile per operand behind the slots.
                unsafe {
                    let repeated = scratch.add(self.repeated + number * self.repeated_len());
                    number += 1;
                    (self.loops.repeat_rows)(regs[s], tile.rows, tile.cols, repeated);
                    Arg::Vector(repeated)
                }
            });
            f(args, 0, tile.rows * tile.cols);
        } else if mixed {
            for r in 0..tile.rows {
                // SAFETY: a row value has an element for each of the tile's rows, a full one `cols`.
                let args = sources.map(|s| unsafe {
                    match self.steps[s].rank {
                        Rank::Scalar => Arg::Value(*regs[s]),
                        Rank::Row => Arg::Value(*regs[s].add(r)),
                        Rank::Full => Arg::Vector(regs[s].add(r * tile.cols)),
                    }
                });
                f(args, r * tile.cols, tile.cols);
            }
        } else {
            let n = if rank == Rank::Full { tile.rows * tile.cols } else { tile.rows };
            // SAFETY: every register points to what its rank says.
            f(sources.map(|s| unsafe { self.arg(regs, s) }), 0, n);
        }
    }

    /// A register as an operand: a scalar's value, or where a vector begins.
    ///
    /// # Safety
    /// The register was written, by `begin` or by its own step.
    #[inline(always)]
    pub(super) unsafe fn arg(&self, regs: &[*const f32], reg: usize) -> Arg {
        match self.steps[reg].rank {
            // SAFETY: the caller's promise.
            Rank::Scalar => Arg::Value(unsafe { *regs[reg] }),
            _ => Arg::Vector(regs[reg]),
        }
    }

    /// Writes a strided operand's elements into the tile's order.
    ///
    /// # Safety
    /// As [`Program::run`]; `scratch` has `self.scratch` elements and belongs to this task alone.
    unsafe fn gather(&self, load: &Load, rank: Rank, tile: Tile, memory: Memory, out: *mut f32) {
        // SAFETY: the plan's strides stay inside the operand.
        unsafe {
            let read = |offset: usize| read(memory, load.address, load.element, offset);
            for r in 0..tile.rows {
                let start = load.rows.offset(tile.row + r);
                if rank == Rank::Row {
                    *out.add(r) = read(start);
                    continue;
                }
                let to = out.add(r * tile.cols);
                match &load.cols {
                    Cols::Unit if load.element == Element::F32 => {
                        let from = memory.at::<f32>(load.address).add(start + tile.col);
                        std::ptr::copy_nonoverlapping(from, to, tile.cols);
                    }
                    Cols::Unit if load.element == Element::Bf16 => {
                        (self.loops.widen)(memory.at::<bf16>(load.address).add(start + tile.col), to, tile.cols);
                    }
                    Cols::Unit => (0..tile.cols).for_each(|c| *to.add(c) = read(start + tile.col + c)),
                    Cols::Stride(s) => (0..tile.cols).for_each(|c| *to.add(c) = read(start + (tile.col + c) * s)),
                    Cols::Table(t) => (0..tile.cols).for_each(|c| *to.add(c) = read(start + t[tile.col + c] as usize)),
                }
            }
        }
    }

    /// Stores the tile's results and adds to the task's partial sums.
    ///
    /// # Safety
    /// As [`Program::run`]; `scratch` has `self.scratch` elements and belongs to this task alone.
    unsafe fn store(&self, worker: &Worker, tile: Tile, regs: &[*const f32]) {
        let Worker { task, memory, partials, seed, .. } = *worker;
        let Tile { row, rows, col, cols } = tile;
        // SAFETY: as in `tile`.
        unsafe {
            for out in self.outs.iter().filter(|out| !out.direct) {
                let value = self.arg(regs, out.value);
                let rank = self.steps[out.value].rank;
                // A row's own value counts once, in the row's first tile.
                let n = match rank {
                    Rank::Full => rows * cols,
                    _ if col == 0 => rows,
                    _ => continue,
                };
                match out.store {
                    Store::Each => {
                        let start = if rank == Rank::Full { row * self.cols + col } else { row };
                        match (out.element, out.rounding) {
                            (Element::Bf16, Rounding::Stochastic { stream, first }) => {
                                let key = (seed, stream, (first + start) as u64);
                                (self.loops.narrow_at_random)(value, key, memory.at::<bf16>(out.address).add(start), n);
                            }
                            (Element::F32, _) if out.streamed => {
                                (self.loops.stream_single)(value, memory.at::<f32>(out.address).add(start), n);
                            }
                            (Element::Bf16, _) if out.streamed => {
                                (self.loops.stream_half)(value, memory.at::<bf16>(out.address).add(start), n);
                            }
                            (Element::F32, _) if out.is_leaf() => {
                                (self.loops.keep)(value, memory.at::<f32>(out.address).add(start), n);
                            }
                            (Element::F32, _) => {
                                (self.loops.unary_identity)(value, memory.at::<f32>(out.address).add(start), n)
                            }
                            (Element::I32, _) => {
                                (self.loops.to_integers)(value, memory.at::<i32>(out.address).add(start), n)
                            }
                            (Element::Bf16, _) => {
                                (self.loops.narrow)(value, memory.at::<bf16>(out.address).add(start), n)
                            }
                            (Element::F16, _) => tape::narrow_f16(value, memory.at::<f16>(out.address).add(start), n),
                        }
                    }
                    Store::SumAll | Store::MaxAll => {
                        let total = partials.add(out.partial + task);
                        if let Arg::Vector(v) = value {
                            let is_max = out.store == Store::MaxAll;
                            let part = if is_max { (self.loops.max)(v, n) } else { (self.loops.sum)(v, n) };
                            (self.loops.accumulate)(is_max, Arg::Value(part), total, 1);
                        }
                    }
                    Store::SumRows { .. } | Store::MaxRows { .. } => {
                        let is_max = matches!(out.store, Store::MaxRows { .. });
                        let sums = partials.add(out.partial + task * self.cols + col);
                        (self.loops.accumulate_rows)(is_max, value, rows, sums, cols);
                    }
                }
            }
        }
    }
}
