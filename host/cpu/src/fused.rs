//! Fused kernels on the CPU: the instruction list is run tile by tile, so that intermediate values stay in the first
//! cache. What a task computes, and the order of every sum, depends on shapes only, never on the number of threads.

use crate::loops::{Loops, loops};
use crate::memory::{Address, Memory, Partials};
use crate::pairs::{Pair, find_pairs};
use crate::streams::Stream;
use crate::tape::{self, Arg};
use crate::walk::{Cols, Rows, iota, read, table};
use clip_host_compiler::kernel::{Element, Fused, Instr, Output, Pattern, Rank, Store};
use clip_host_compiler::lower::operands;
use clip_host_cpu_kernels::{Isa, ThreadPool, bf16};
use clip_host_plugin_api::ir::NodeId;
use std::collections::HashMap;
use std::mem::MaybeUninit;

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
    /// Done by a later pair.
    Nothing,
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
    /// Written by its instruction already.
    direct: bool,
    /// Too large for a cache: written past it.
    streamed: bool,
    /// Offset in the partial sums, and their number for each segment.
    partial: usize,
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
    steps: Vec<Step>,
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
    /// Prepares a kernel; `place` finds a value's memory. `None` if it has more instructions than fit.
    pub fn new(kernel: &Fused, place: impl Fn(NodeId) -> Address) -> Option<Program> {
        if kernel.code.len() > MAX_CODE {
            return None;
        }
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

        let mut program = Program {
            rows,
            cols,
            tile_rows,
            tile_cols,
            chunk_rows,
            chunks_per_segment,
            tasks,
            by_columns,
            steps: vec![],
            loads: vec![],
            outs: vec![],
            streams: vec![],
            scratch: 0,
            repeated: 0,
            loops: loops(Isa::Portable),
            partials: vec![],
            dims: kernel.dims.clone(),
            inner: kernel.inner,
        };
        program.prepare_loads(kernel, &place);
        program.prepare_outputs(kernel, &place);
        let pairs = find_pairs(&kernel.code, &kernel.outputs);
        program.assign_slots(kernel, &pairs, &place);
        program.repeated = program.scratch;
        if program.steps.iter().any(|step| step.mixed) && program.tile_cols <= SHORT {
            program.scratch += OPERANDS * program.repeated_len();
        }
        program.find_streams(kernel);
        Some(program)
    }

    fn prepare_loads(&mut self, kernel: &Fused, place: &impl Fn(NodeId) -> Address) {
        let outer = kernel.dims.len() - kernel.inner;
        for input in &kernel.inputs {
            let element = input.dtype;
            let address = place(input.source).plus(input.offset, element);
            let (rows, cols) = match (&input.pattern, input.rank) {
                (_, Rank::Scalar) => (Rows::Linear(0), Cols::Stride(0)),
                (Pattern::Same, Rank::Row) => (Rows::Linear(1), Cols::Stride(0)),
                (Pattern::Same, Rank::Full) => (Rows::Linear(kernel.cols), Cols::Unit),
                (Pattern::Column, _) => (Rows::Linear(0), Cols::Unit),
                (Pattern::Strided(strides), rank) => {
                    let split = strides.len().min(outer);
                    let (row_strides, col_strides) = strides.split_at(split);
                    let row_dims = &kernel.dims[..split];
                    let rows = Rows::Strided { dims: row_dims.to_vec(), strides: row_strides.to_vec() };
                    let cols = match (rank, col_strides) {
                        (Rank::Row, _) | (_, []) => Cols::Stride(0),
                        (_, [1]) => Cols::Unit,
                        (_, [stride]) => Cols::Stride(*stride),
                        _ => Cols::Table(table(&kernel.dims[outer..], col_strides)),
                    };
                    (rows, cols)
                }
            };
            let source = match (input.rank, &input.pattern) {
                (Rank::Full | Rank::Row, Pattern::Same) if element == Element::Bf16 => Source::Widened,
                _ if element != Element::F32 => Source::Gathered,
                (Rank::Full | Rank::Row, Pattern::Same) => Source::Direct,
                (Rank::Full, Pattern::Column) if self.tile_rows == 1 => Source::Direct,
                (Rank::Full, Pattern::Column) => Source::Repeated,
                _ => Source::Gathered,
            };
            self.loads.push(Load { address, element, rows, cols, source });
        }
    }

    fn prepare_outputs(&mut self, kernel: &Fused, place: &impl Fn(NodeId) -> Address) {
        let mut partial = 0;
        let segments = self.rows / kernel.segment().max(1);
        for output in &kernel.outputs {
            self.outs.push(Out {
                address: place(output.target),
                value: output.value,
                store: output.store,
                element: output.dtype,
                direct: false,
                streamed: self.is_streamed(kernel, output, place),
                partial,
            });
            partial += match output.store {
                Store::Each => 0,
                Store::SumRows { .. } | Store::MaxRows { .. } => segments * self.chunks_per_segment * self.cols,
                Store::SumAll | Store::MaxAll => self.tasks,
            };
        }
        self.partials = vec![0.0; partial];
    }

    /// Whether a result is written past the caches: if it is large, and its lines are not read, and so cached, just before
    /// because it replaces an operand.
    fn is_streamed(&self, kernel: &Fused, output: &Output, place: &impl Fn(NodeId) -> Address) -> bool {
        let bytes = self.rows * self.cols * output.dtype.bytes();
        let to = place(output.target);
        let in_place = kernel.inputs.iter().map(|i| place(i.source)).any(|from| from.block == to.block && to.block > 0);
        let is_full = output.store == Store::Each && kernel.code[output.value].1 == Rank::Full;
        is_full && output.dtype != Element::I32 && bytes >= STREAM && !in_place
    }

    /// Gives every value its place; slots are used again once their values are dead.
    fn assign_slots(&mut self, kernel: &Fused, pairs: &HashMap<usize, Pair>, place: &impl Fn(NodeId) -> Address) {
        let code = &kernel.code;
        let mut last_use: Vec<usize> = (0..code.len()).collect();
        for (at, (instr, _)) in code.iter().enumerate() {
            operands(instr).into_iter().for_each(|r| last_use[r] = at);
        }
        // What a pair's first op reads is read by the pair.
        for (&at, pair) in pairs {
            [pair.a, pair.b].into_iter().for_each(|r| last_use[r] = last_use[r].max(at));
        }
        // Values that are stored or summed at the end of the tile live until then.
        for output in &kernel.outputs {
            last_use[output.value] = code.len();
        }
        let full_len = (self.tile_rows * self.tile_cols).next_multiple_of(16);
        let row_len = self.tile_rows.next_multiple_of(16);
        let read: Vec<Address> = kernel.inputs.iter().map(|i| place(i.source)).collect();
        let mut free: [Vec<usize>; 2] = [vec![], vec![]];
        let mut taken: Vec<(usize, usize, usize)> = vec![]; // (last use, kind, offset)
        for (at, (instr, rank)) in code.iter().enumerate() {
            taken.retain(|&(last, kind, offset)| {
                let alive = last >= at;
                if !alive {
                    free[kind].push(offset);
                }
                alive
            });
            let direct_output = self.outs.iter().position(|o| {
                o.value == at
                    && o.store == Store::Each
                    && o.element == Element::F32
                    && !o.streamed
                    && !read.iter().any(|r| r.block == o.address.block && o.address.block > 0)
            });
            let once = match instr {
                Instr::Load(i) => matches!(self.loads[*i].source, Source::Repeated),
                _ => false,
            };
            let in_memory = match instr {
                Instr::Load(i) => matches!(self.loads[*i].source, Source::Direct),
                Instr::Const(_) => true,
                _ => false,
            };
            let is_load = matches!(instr, Instr::Load(_));
            let inside = pairs.values().any(|pair| pair.inside == at);
            let slot = match (rank, direct_output) {
                _ if inside => Slot::None,
                (Rank::Scalar, _) => Slot::None,
                _ if in_memory => Slot::None,
                (_, Some(output)) if !is_load && (*rank == Rank::Full || self.tile_cols == self.cols) => {
                    self.outs[output].direct = true;
                    Slot::Output(output)
                }
                _ => {
                    let (kind, len) = if *rank == Rank::Full { (0, full_len) } else { (1, row_len) };
                    let offset = match free[kind].pop() {
                        Some(offset) if !once => offset,
                        back => {
                            free[kind].extend(back);
                            self.scratch += len;
                            self.scratch - len
                        }
                    };
                    // A repeated vector is made once per task and keeps its slot.
                    let last = if once { usize::MAX } else { last_use[at] };
                    taken.push((last, kind, offset));
                    Slot::Scratch(offset)
                }
            };
            let pair = pairs.get(&at).copied();
            let read = pair.map_or_else(|| operands(instr), |p| vec![p.a, p.b, p.c]);
            let mixed = *rank == Rank::Full && read.iter().any(|&r| code[r].1 == Rank::Row);
            let work = match pair {
                _ if inside => Work::Nothing,
                Some(pair) => Work::Pair(pair),
                None => Work::Instr(instr.clone()),
            };
            self.steps.push(Step { work, rank: *rank, mixed, slot });
        }
    }

    /// Elements of a tile of repeated values.
    fn repeated_len(&self) -> usize {
        (self.tile_rows * self.tile_cols + tape::SLACK).next_multiple_of(16)
    }

    /// Tensors whose next tile is asked for while the current one is worked on: processors foresee one long walk, not
    /// several that take turns.
    fn find_streams(&mut self, kernel: &Fused) {
        let (tile, steps) = (self.tile_rows * self.tile_cols, self.steps.len());
        let mut stream = |address, element| self.streams.push(Stream::new(address, element, tile, steps));
        for (load, input) in self.loads.iter().zip(&kernel.inputs) {
            if input.rank == Rank::Full && input.pattern == Pattern::Same {
                stream(load.address, load.element);
            }
        }
        for out in self.outs.iter().filter(|o| o.store == Store::Each && !o.streamed) {
            if self.steps[out.value].rank == Rank::Full {
                stream(out.address, out.element);
            }
        }
    }

    /// Runs the kernel.
    ///
    /// # Safety
    /// `memory` must be that of the plan that the addresses come from.
    pub unsafe fn run(&mut self, pool: &ThreadPool, memory: Memory, seed: u64) {
        self.loops = loops(pool.isa());
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
            let mut row = row0;
            while row < row1 {
                let rows = self.tile_rows.min(row1 - row);
                let mut col = col0;
                while col < col1 {
                    let cols = self.tile_cols.min(col1 - col);
                    let tile = Tile { row, rows, col, cols };
                    self.tile(task, tile, memory, scratch, partials, seed, regs);
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

    /// Runs every instruction over one tile, then stores what leaves it.
    ///
    /// # Safety
    /// As [`Program::run`]; `scratch` has `self.scratch` elements and belongs to this task alone.
    #[allow(clippy::too_many_arguments)]
    unsafe fn tile(
        &self,
        task: usize,
        tile: Tile,
        memory: Memory,
        scratch: *mut f32,
        partials: *mut f32,
        seed: u64,
        regs: &mut [*const f32],
    ) {
        let Tile { row, rows, col, cols } = tile;
        let flat = row * self.cols + col;
        let ahead = rows * cols;
        // SAFETY: addresses and slots come from the plan, lengths from the tile.
        unsafe {
            for (at, step) in self.steps.iter().enumerate() {
                // Each step asks for its share of the next tile.
                self.streams.iter().for_each(|stream| stream.ask(memory, flat + ahead, at));
                if step.rank == Rank::Scalar {
                    continue;
                }
                let n = if step.rank == Rank::Full { rows * cols } else { rows };
                let out = match step.slot {
                    Slot::Scratch(offset) => scratch.add(offset),
                    Slot::Output(output) => {
                        let start = if step.rank == Rank::Full { flat } else { row };
                        memory.at::<f32>(self.outs[output].address).add(start)
                    }
                    Slot::None => std::ptr::null_mut(),
                };
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
            self.store(task, tile, memory, partials, regs);
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
    unsafe fn arg(&self, regs: &[*const f32], reg: usize) -> Arg {
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
    unsafe fn store(&self, task: usize, tile: Tile, memory: Memory, partials: *mut f32, regs: &[*const f32]) {
        let Tile { row, rows, col, cols } = tile;
        // SAFETY: as in `tile`.
        unsafe {
            for out in &self.outs {
                let value = self.arg(regs, out.value);
                let rank = self.steps[out.value].rank;
                // A row's own value counts once, in the row's first tile.
                let n = match rank {
                    Rank::Full => rows * cols,
                    _ if col == 0 => rows,
                    _ => continue,
                };
                match out.store {
                    Store::Each if out.direct => {}
                    Store::Each => {
                        let start = if rank == Rank::Full { row * self.cols + col } else { row };
                        match out.element {
                            Element::F32 if out.streamed => {
                                (self.loops.stream_single)(value, memory.at::<f32>(out.address).add(start), n);
                            }
                            Element::Bf16 if out.streamed => {
                                (self.loops.stream_half)(value, memory.at::<bf16>(out.address).add(start), n);
                            }
                            Element::F32 => {
                                (self.loops.unary_identity)(value, memory.at::<f32>(out.address).add(start), n)
                            }
                            Element::I32 => {
                                (self.loops.to_integers)(value, memory.at::<i32>(out.address).add(start), n)
                            }
                            Element::Bf16 => (self.loops.narrow)(value, memory.at::<bf16>(out.address).add(start), n),
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

#[derive(Clone, Copy)]
struct Tile {
    row: usize,
    rows: usize,
    col: usize,
    cols: usize,
}
