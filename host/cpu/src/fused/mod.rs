//! Fused kernels on the CPU: the instruction list is run tile by tile, so that intermediate values stay in the first
//! cache; groups of instructions run as one compiled loop where the processor has one (`group`). What a task computes,
//! and the order of every sum, depends on shapes only, never on the number of threads or the instruction set.

mod group;
mod prepare;
mod schedule;
mod slots;
#[cfg(test)]
mod tests;
mod tile;

use crate::loops::{Loops, loops};
use crate::memory::{Address, Memory, Partials};
use crate::native;
use crate::pairs::{Pair, find_pairs};
use crate::streams::Stream;
use crate::tape::{self, Arg};
use crate::walk::{Cols, Rows, read};
use clip_host_compiler::kernel::{Element, Fused, Instr, Rank, Reg, Rounding, Store};
use clip_host_cpu_kernels::{Isa, ThreadPool};
use clip_host_plugin_api::ir::NodeId;
use group::Group;
use schedule::{Action, in_groups, one_by_one};
use std::collections::HashMap;
use std::mem::MaybeUninit;
use tile::{Tile, Worker};

/// Elements of a tile. Smaller ones leave more room in the first cache, but each step's start then costs more than it
/// gains: measured, half or twice as many are slower.
const TILE: usize = 1024;
/// Elements of a task.
const TASK: usize = 32_768;
/// Columns up to which values of rows are repeated for all of a tile's elements before they meet full ones.
const SHORT: usize = 256;
/// Operands of an instruction at most.
const OPERANDS: usize = 3;
/// Bytes from which a result is written past the caches: a plain store reads each line before it overwrites it, and the
/// next kernel would not find the line in a cache anyway.
const STREAM: usize = 32 << 20;
/// The most partial sums of one reduction.
const PARTIALS: usize = 64;
/// The most instructions of a kernel (the fuser's limits keep below it).
const MAX_CODE: usize = 384;

enum Source {
    /// Read in place.
    Direct,
    /// Written into the slot for each tile.
    Gathered,
    /// Likewise, from bf16 in the tile's own order.
    Widened,
    /// One vector for all rows, repeated over a tile's rows once per task.
    Repeated,
}

struct Load {
    address: Address,
    element: Element,
    rows: Rows,
    cols: Cols,
    source: Source,
}

/// Where a value is kept while a tile runs.
#[derive(Clone, Copy, PartialEq)]
enum Slot {
    None,
    /// Offset in the worker's scratch.
    Scratch(usize),
    /// The output's own memory.
    Output(usize),
}

/// What a step does.
enum Work {
    Instr(Instr),
    Pair(Pair),
    /// Done by a later pair, or by a loop.
    Nothing,
}

/// A part of a tile's work.
enum Run {
    Step(Reg),
    Group(Group),
}

struct Step {
    work: Work,
    rank: Rank,
    /// Row values meet full ones.
    mixed: bool,
    slot: Slot,
}

struct Out {
    address: Address,
    value: usize,
    store: Store,
    element: Element,
    rounding: Rounding,
    /// Written by its instruction already.
    direct: bool,
    /// Too large for a cache: written past it.
    streamed: bool,
    /// Offset in the partial sums, and their number for each segment.
    partial: usize,
}

impl Out {
    /// Whether it stays from step to step. Subnormal numbers do not: the moment of a word that is not seen for long would
    /// decay to one and never leave it, and each step would pay for it, since processors multiply them a hundred times slower.
    fn is_leaf(&self) -> bool {
        self.address.block > 0 && self.store == Store::Each && self.element == Element::F32
    }
}

/// A kernel made ready to run.
pub struct Program {
    rows: usize,
    cols: usize,
    tile_rows: usize,
    tile_cols: usize,
    chunk_rows: usize,
    chunks_per_segment: usize,
    tasks: usize,
    /// Tasks divide the columns of the one row; `chunk_rows` then counts columns.
    by_columns: bool,
    /// By instruction.
    steps: Vec<Step>,
    /// What a tile does, in order.
    order: Vec<Run>,
    loads: Vec<Load>,
    outs: Vec<Out>,
    /// Tensors that are walked in the space's order.
    streams: Vec<Stream>,
    scratch: usize,
    /// Where in the scratch values of rows are repeated, an operand after the other.
    repeated: usize,
    /// The pool's instruction set's.
    loops: &'static Loops,
    partials: Vec<f32>,
    /// Index factors by dimension, for iota.
    dims: Vec<usize>,
    inner: usize,
}

impl Program {
    /// Prepares a kernel for an instruction set; `place` finds a value's memory. `None` if it has more instructions than
    /// fit.
    pub fn new(kernel: &Fused, isa: Isa, place: impl Fn(NodeId) -> Address) -> Option<Program> {
        if kernel.code.len() > MAX_CODE {
            return None;
        }
        let compiled = native::is_supported(isa).then(|| Program::compiled(kernel, isa, &place)).flatten();
        Some(compiled.unwrap_or_else(|| Program::interpreted(kernel, isa, &place)))
    }

    /// A program whose instructions all run one by one.
    fn interpreted(kernel: &Fused, isa: Isa, place: &impl Fn(NodeId) -> Address) -> Program {
        let mut program = Program::empty(kernel, isa);
        program.prepare_loads(kernel, place);
        program.prepare_outputs(kernel, place);
        let pairs = find_pairs(&kernel.code, &kernel.outputs);
        let actions = one_by_one(&kernel.code);
        program.assign_slots(kernel, &actions, &pairs, place);
        program.order = actions.iter().flat_map(Action::regs).map(|&reg| Run::Step(reg)).collect();
        program.find_streams(kernel);
        program
    }

    /// A program with compiled loops; `None` if one cannot be compiled.
    fn compiled(kernel: &Fused, isa: Isa, place: &impl Fn(NodeId) -> Address) -> Option<Program> {
        let mut program = Program::empty(kernel, isa);
        program.prepare_loads(kernel, place);
        program.prepare_outputs(kernel, place);
        let can = program.can_be_in_loops(kernel);
        let actions = in_groups(&kernel.code, |reg| can[reg], |reg| kernel.outputs.iter().any(|o| o.value == reg));
        program.assign_slots(kernel, &actions, &HashMap::new(), place);
        program.order = program.compile_groups(kernel, actions, &can)?;
        if program.scratch == 0 && program.order.iter().all(|run| matches!(run, Run::Group(_))) {
            // Nothing is kept from loop to loop: a tile may be as large as a task.
            program.tile_cols = if program.by_columns { program.chunk_rows } else { program.cols };
            program.tile_rows = if program.by_columns { 1 } else { program.chunk_rows };
        }
        Some(program)
    }

    /// A program that does nothing yet: how the kernel's space is divided.
    fn empty(kernel: &Fused, isa: Isa) -> Program {
        let (rows, cols) = (kernel.rows, kernel.cols);
        let whole_rows = kernel.has_row_reductions();
        let tile_cols = if whole_rows || cols <= TILE { cols } else { TILE };
        let tile_rows = if tile_cols < cols { 1 } else { (TILE / cols.max(1)).clamp(1, rows.max(1)) };

        let reduces = kernel.outputs.iter().any(|o| o.store != Store::Each);
        let segment = kernel.segment().max(1);
        let segments = rows / segment;
        let by_columns = rows == 1 && !whole_rows;
        let (chunk_rows, chunks_per_segment, tasks) = if by_columns {
            let chunk = if reduces { TASK.max(cols.div_ceil(PARTIALS)) } else { TASK }.next_multiple_of(16);
            (chunk, cols.div_ceil(chunk), cols.div_ceil(chunk))
        } else {
            let by_size = (segment * cols).div_ceil(TASK);
            let chunks = if reduces { by_size.clamp(1, PARTIALS) } else { by_size.max(1) }.min(segment);
            let chunk_rows = segment.div_ceil(chunks);
            let chunks = segment.div_ceil(chunk_rows);
            (chunk_rows, chunks, chunks * segments)
        };

        Program {
            rows,
            cols,
            tile_rows,
            tile_cols,
            chunk_rows,
            chunks_per_segment,
            tasks,
            by_columns,
            steps: vec![],
            order: vec![],
            loads: vec![],
            outs: vec![],
            streams: vec![],
            scratch: 0,
            repeated: 0,
            loops: loops(isa),
            partials: vec![],
            dims: kernel.dims.clone(),
            inner: kernel.inner,
        }
    }

    /// Runs the kernel.
    ///
    /// # Safety
    /// `memory` must be that of the plan that the addresses come from.
    pub unsafe fn run(&mut self, pool: &ThreadPool, memory: Memory, seed: u64) {
        let partials = Partials::new(&mut self.partials);
        let this = &*self;
        pool.run(this.tasks, &|task, worker| {
            let mut scratch = pool.scratch(worker, this.scratch.max(16));
            // SAFETY: tasks write disjoint rows (or columns) and their own partial sums.
            unsafe { this.task(task, memory, scratch.as_mut_ptr(), partials.get(), seed) };
        });
        // SAFETY: all tasks are done.
        unsafe { self.combine(memory) };
    }

    /// Adds up the partial sums in the order of the chunks.
    ///
    /// # Safety
    /// As [`Program::run`], once all tasks are done.
    unsafe fn combine(&self, memory: Memory) {
        for out in &self.outs {
            let partials = &self.partials[out.partial..];
            match out.store {
                Store::Each => {}
                Store::SumAll => {
                    let total: f64 = partials[..self.tasks].iter().map(|&v| f64::from(v)).sum();
                    // SAFETY: the output is one element of the plan's.
                    unsafe { *memory.at::<f32>(out.address) = total as f32 };
                }
                Store::MaxAll => {
                    let top = partials[..self.tasks]
                        .iter()
                        .fold(f32::NEG_INFINITY, |m, &v| if v > m || v.is_nan() { v } else { m });
                    // SAFETY: as above.
                    unsafe { *memory.at::<f32>(out.address) = top };
                }
                Store::SumRows { segment } | Store::MaxRows { segment } => {
                    let is_max = matches!(out.store, Store::MaxRows { .. });
                    let n = self.cols;
                    for s in 0..self.rows / segment.max(1) {
                        // SAFETY: the output has a row of `cols` for each segment; so have the partial sums.
                        unsafe {
                            let into = memory.at::<f32>(out.address).add(s * n);
                            let from = partials.as_ptr().add(s * self.chunks_per_segment * n);
                            std::ptr::copy_nonoverlapping(from, into, n);
                            for chunk in 1..self.chunks_per_segment {
                                (self.loops.accumulate)(is_max, Arg::Vector(from.add(chunk * n)), into, n);
                            }
                        }
                    }
                }
            }
        }
    }

    /// One task: a range of rows, or of columns if there is one row.
    ///
    /// # Safety
    /// As [`Program::run`]; `scratch` has `self.scratch` elements and belongs to this task alone.
    unsafe fn task(&self, task: usize, memory: Memory, scratch: *mut f32, partials: *mut f32, seed: u64) {
        let mut scalars = [const { MaybeUninit::<f32>::uninit() }; MAX_CODE];
        let mut regs = [const { MaybeUninit::<*const f32>::uninit() }; MAX_CODE];
        let regs = &mut regs[..self.steps.len()];
        for (reg, scalar) in regs.iter_mut().zip(&mut scalars) {
            reg.write(scalar.write(0.0));
        }
        // SAFETY: all of these were written just now. For the rest see the callees; all offsets come from the plan.
        unsafe {
            let regs = std::slice::from_raw_parts_mut(regs.as_mut_ptr().cast::<*const f32>(), regs.len());
            let scalars = scalars.as_mut_ptr().cast::<f32>();
            let (row0, row1, col0, col1) = self.range(task);
            self.begin(task, memory, scratch, scalars, partials, regs);
            let worker = Worker { task, memory, scratch, scalars, partials, seed };
            let mut row = row0;
            while row < row1 {
                let rows = self.tile_rows.min(row1 - row);
                let mut col = col0;
                while col < col1 {
                    let cols = self.tile_cols.min(col1 - col);
                    self.tile(&worker, Tile { row, rows, col, cols }, regs);
                    col += cols;
                }
                row += rows;
            }
            if self.outs.iter().any(|o| o.streamed) {
                tape::fence();
            }
        }
    }

    fn range(&self, task: usize) -> (usize, usize, usize, usize) {
        if self.by_columns {
            let start = task * self.chunk_rows;
            return (0, 1, start, (start + self.chunk_rows).min(self.cols));
        }
        let segment = self.segment_rows();
        let (s, c) = (task / self.chunks_per_segment, task % self.chunks_per_segment);
        let start = s * segment + c * self.chunk_rows;
        (start, (start + self.chunk_rows).min((s + 1) * segment), 0, self.cols)
    }

    fn segment_rows(&self) -> usize {
        self.rows / (self.tasks / self.chunks_per_segment).max(1)
    }

    /// What is the same for all tiles of a task: scalars, repeated vectors, empty sums.
    ///
    /// # Safety
    /// As [`Program::run`]; `scratch` has `self.scratch` elements and belongs to this task alone.
    #[allow(clippy::too_many_arguments)]
    unsafe fn begin(
        &self,
        task: usize,
        memory: Memory,
        scratch: *mut f32,
        scalars: *mut f32,
        partials: *mut f32,
        regs: &mut [*const f32],
    ) {
        // SAFETY: addresses and slots come from the plan; the partial sums of a task are its own.
        unsafe {
            for (at, step) in self.steps.iter().enumerate() {
                if let Work::Instr(Instr::Const(value)) = step.work {
                    *scalars.add(at) = value;
                } else if let (Work::Instr(Instr::Load(load)), Slot::Scratch(offset)) = (&step.work, step.slot)
                    && let Source::Repeated = self.loads[*load].source
                {
                    let from = memory.at::<f32>(self.loads[*load].address);
                    let slot = scratch.add(offset);
                    for row in 0..self.tile_rows {
                        std::ptr::copy_nonoverlapping(from, slot.add(row * self.cols), self.cols);
                    }
                    regs[at] = slot;
                } else if step.rank == Rank::Scalar {
                    let out = scalars.add(at);
                    let Work::Instr(instr) = &step.work else { continue };
                    match instr {
                        Instr::Load(load) => {
                            let load = &self.loads[*load];
                            *out = read(memory, load.address, load.element, 0);
                        }
                        Instr::Unary(op, a) => (self.loops.unary)(*op, self.arg(regs, *a), out, 1),
                        Instr::Binary(op, a, b) => {
                            (self.loops.binary)(*op, self.arg(regs, *a), self.arg(regs, *b), out, 1)
                        }
                        Instr::Compare(op, a, b) => {
                            (self.loops.compare)(*op, self.arg(regs, *a), self.arg(regs, *b), out, 1)
                        }
                        Instr::Select(c, a, b) => {
                            (self.loops.select)(self.arg(regs, *c), self.arg(regs, *a), self.arg(regs, *b), out, 1)
                        }
                        _ => {}
                    }
                }
            }
            for out in &self.outs {
                let (start, len) = match out.store {
                    Store::Each => continue,
                    Store::SumAll | Store::SumRows { .. } => (0.0, self.partial_len(out.store)),
                    Store::MaxAll | Store::MaxRows { .. } => (f32::NEG_INFINITY, self.partial_len(out.store)),
                };
                let sums = partials.add(out.partial + task * len);
                (0..len).for_each(|i| *sums.add(i) = start);
            }
        }
    }

    fn partial_len(&self, store: Store) -> usize {
        match store {
            Store::SumRows { .. } | Store::MaxRows { .. } => self.cols,
            _ => 1,
        }
    }
}
