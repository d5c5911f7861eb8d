//! The blocked multiplication shared by matmul and convolution: `C (+)= alpha * A * B (+ bias)`.
//!
//! After Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008): blocks of A and B are
//! packed into panels in the order in which the micro-kernel reads them. Where the operands come from is abstract
//! ([`Panels`]), so that a convolution packs straight from the activation and never stores its patches.
//!
//! Each element of C is a sum over blocks of the depth, whose limits depend on the shape alone, and each block is
//! summed in ascending order by one thread: how C is cut into tasks has no influence on the result. Where C is too
//! small for tasks enough and the depth is long, the depth is cut into chunks, a number fixed by the shape, whose
//! partial products are added in ascending order.

use crate::elements::{Element, ElementsMut, bf16};
use crate::microkernel::{
    Lines, MAX_MR, MAX_NR, MicroKernels, Moments, Narrow, SLACK, Source, Starts, Tile, micro_kernels,
};
use crate::moments::{Groups, SLOT_SUMS};
use crate::threads::{SharedMut, ThreadPool};

/// Words along the depth of a packed block: a panel of A (12 x 384 words, 18 KiB) stays in L1.
const DEPTH: usize = 384;
/// Rows of a packed block of A.
const ROWS: usize = 96;
/// Columns of a task: the block of B (384 x 384 words, 576 KiB) stays in L2.
const COLS: usize = 384;
/// Columns of B that one task packs: a multiple of every `nr`.
const PACK_COLS: usize = 256;
/// Runs of the depth that a product reads in place at most.
pub(crate) const MAX_RUNS: usize = 16;
/// Tasks that a split of the depth aims for.
const SPLIT_TASKS: usize = 32;
/// Rows of a task of a split, at most.
const SPLIT_ROWS: usize = 8 * ROWS;
/// Largest C for which the depth is split, in elements.
const SPLIT_ELEMENTS: usize = 256 * 1024;
/// Largest B that is packed as a whole, in words.
const PACKED_B: usize = 4 << 20;

/// Shared scratch: B packed as a whole.
const SLOT_B: usize = 0;
/// Shared scratch: partial products of the chunks of the depth.
const SLOT_PARTIAL: usize = 1;
/// Shared scratch for the caller of [`multiply`].
pub(crate) const SLOT_CALLER: usize = 2;

/// An operand: a matrix of lines (rows of A, columns of B) by depth, for each batch.
pub(crate) trait Panels: Sync {
    /// Packs a panel: words `dst[k * width + line]` for the lines from `line` to `line + lines` (at most `width`) and
    /// the depth from `depth`, which starts a word, to `depth + len`.
    ///
    /// # Safety
    /// The range is within the operand, and `dst` is writable for `words(len) * width + SLACK` words; what lies beyond
    /// `lines` in a row, and in the slack, is undefined afterwards.
    #[allow(clippy::too_many_arguments)]
    unsafe fn pack(
        &self,
        kernels: &MicroKernels,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    );

    /// Packs any number of lines as neighbouring panels, `words(len) * width` words each. Operands whose lines are
    /// neighbours in memory take the depth as the outer loop, so that memory is read in long runs.
    ///
    /// # Safety
    /// As for [`pack`](Self::pack), with room for all panels; they may be packed in any order.
    #[allow(clippy::too_many_arguments)]
    unsafe fn pack_block(
        &self,
        kernels: &MicroKernels,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        for at in (0..lines).step_by(width) {
            // SAFETY: the caller's promise.
            unsafe {
                let dst = dst.add(at * kernels.words(len));
                self.pack(kernels, batch, line + at, width.min(lines - at), depth, len, dst, width);
            }
        }
    }

    /// Elements along the depth after which lines go on elsewhere in memory, if they do.
    fn run(&self) -> Option<usize> {
        None
    }

    /// Where the lines from `line` to `line + lines` lie for the depth from `depth` to `depth + len`, if they are runs
    /// of f32 of equal length there, and no more than there are `starts` for.
    fn in_place(
        &self,
        _batch: usize,
        _line: usize,
        _lines: usize,
        _depth: usize,
        _len: usize,
        _starts: &mut [Starts; MAX_RUNS],
    ) -> Option<Lines> {
        None
    }
}

/// Where the rows of C lie.
pub(crate) trait Rows: Sync {
    /// Offset of the first element of each of `offsets.len()` rows from `row` on.
    fn offsets(&self, batch: usize, row: usize, offsets: &mut [usize]);
}

/// A multiplication to do; the two operands and the rows of C are given beside it.
pub(crate) struct Problem<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub batch: usize,
    pub alpha: f32,
    pub accumulate: bool,
    /// Per column, `batch * bias_stride` further for each batch.
    pub bias: Option<&'a [f32]>,
    pub bias_stride: usize,
    /// Whether the operands are multiplied as bf16.
    pub half: bool,
    /// Columns of the moments of what is stored, of all batches; `bias_stride` apart for each batch.
    pub moments: usize,
}

/// Where results go.
#[derive(Clone, Copy)]
pub(crate) enum Target<'a> {
    F32(SharedMut<'a, f32>),
    Bf16(SharedMut<'a, bf16>),
}

impl<'a> Target<'a> {
    pub fn new(out: &'a mut ElementsMut) -> Self {
        match out {
            ElementsMut::F32(out) => Target::F32(SharedMut::new(out)),
            ElementsMut::Bf16(out) => Target::Bf16(SharedMut::new(out)),
        }
    }

    /// Replaces `len` elements from `offset` on by a function of their place and old value.
    ///
    /// # Safety
    /// Nobody else uses these elements meanwhile.
    unsafe fn update(&self, offset: usize, len: usize, new: impl Fn(usize, f32) -> f32) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Target::F32(out) => {
                    out.slice(offset, len).iter_mut().enumerate().for_each(|(at, out)| *out = new(at, *out));
                }
                Target::Bf16(out) => {
                    let out = out.slice(offset, len).iter_mut().enumerate();
                    out.for_each(|(at, out)| *out = bf16::narrow(new(at, out.widen())));
                }
            }
        }
    }
}

/// Runs the multiplication, and puts the moments of what is stored into `moments`, if the problem has columns of them.
///
/// # Safety
/// Every element that the problem names is inside the operands and inside C, and no two rows of C overlap.
pub(crate) unsafe fn multiply<A: Panels, B: Panels, C: Rows>(
    pool: &ThreadPool,
    problem: &Problem,
    a: &A,
    b: &B,
    c: Target<'_>,
    rows: &C,
    moments: &mut [f32],
) {
    let p = problem;
    if p.m == 0 || p.n == 0 || p.batch == 0 {
        return;
    }
    if p.k == 0 {
        fill_empty(pool, p, c, rows);
        return;
    }
    let kernels = micro_kernels(pool.isa(), p.half);
    let run = if kernels.in_place { a.run() } else { None };
    let Depth { block: depth, chunks, chunk } = Depth::of(p, kernels.pair, run);
    let groups = Groups { rows: p.m, cols: p.moments, group: moment_rows(p) };
    let mut sums = pool.shared_scratch(SLOT_SUMS, groups.len());
    let shared_sums = (p.moments > 0).then(|| SharedMut::new(&mut sums));
    let run = Run { kernels, problem: p, a, b, depth, groups, sums: shared_sums };
    if chunks > 1 {
        // SAFETY: as promised by the caller.
        unsafe { run.split(pool, c, rows, chunks, chunk) };
        return;
    }
    // SAFETY: as promised by the caller.
    unsafe { run.whole(pool, c, rows) };
    if p.moments > 0 {
        groups.combine(pool, &sums, moments);
    }
}

/// Rows whose moments are summed together, from the shape alone: tasks have a multiple of them.
fn moment_rows(p: &Problem) -> usize {
    if p.m >= 128 * ROWS { ROWS } else { ROWS / 2 }
}

/// How the depth is cut, from the shape alone.
struct Depth {
    /// Elements of a block: even parts of at most `DEPTH` words.
    block: usize,
    /// Chunks that are multiplied apart, and their length, a multiple of a block's.
    chunks: usize,
    chunk: usize,
}

impl Depth {
    fn of(p: &Problem, pair: usize, run: Option<usize>) -> Depth {
        if let Some(block) = run.and_then(|run| Depth::of_runs(p.k, run)) {
            return Depth { block, chunks: 1, chunk: p.k };
        }
        let even = |parts: usize| p.k.div_ceil(parts).next_multiple_of(4);
        let blocks = p.k.div_ceil(DEPTH * pair);
        let tiles = p.batch * p.n.div_ceil(COLS) * p.m.div_ceil(SPLIT_ROWS);
        let size = p.m * p.n * p.batch;
        if p.moments > 0 || size > SPLIT_ELEMENTS || p.k < 4 * DEPTH || tiles >= SPLIT_TASKS {
            return Depth { block: even(blocks), chunks: 1, chunk: p.k };
        }
        // Where C is large, the sum of the parts costs memory traffic: chunks of two blocks and more. An even number
        // leaves no thread idle at the end where there are few.
        let most = if size > SPLIT_ELEMENTS / 4 { blocks / 2 } else { blocks };
        let chunks = (SPLIT_TASKS / tiles).min(most.next_multiple_of(2)).max(1);
        let per_chunk = blocks.div_ceil(chunks);
        let block = even(chunks * per_chunk);
        let chunk = per_chunk * block;
        Depth { block, chunks: p.k.div_ceil(chunk), chunk }
    }

    /// A block of whole runs, or an even part of one.
    fn of_runs(k: usize, run: usize) -> Option<usize> {
        if run <= DEPTH {
            let (runs, most) = (k / run, (DEPTH / run).min(MAX_RUNS));
            return Some(runs.div_ceil(runs.div_ceil(most)) * run);
        }
        let part = run.div_ceil(run.div_ceil(DEPTH));
        run.is_multiple_of(part).then_some(part)
    }
}

/// A product over no depth: zero, plus bias.
fn fill_empty<C: Rows>(pool: &ThreadPool, p: &Problem, c: Target<'_>, rows: &C) {
    if p.accumulate && p.bias.is_none() {
        return;
    }
    let parts = p.m.div_ceil(ROWS);
    pool.run(p.batch * parts, &|task, _| {
        let (batch, first) = (task / parts, task % parts * ROWS);
        let mut offsets = [0; ROWS];
        let offsets = &mut offsets[..ROWS.min(p.m - first)];
        rows.offsets(batch, first, offsets);
        for offset in offsets {
            // SAFETY: each task has its own rows, and rows do not overlap.
            unsafe {
                c.update(*offset, p.n, |col, old| {
                    let bias = p.bias.map_or(0.0, |bias| bias[batch * p.bias_stride + col]);
                    if p.accumulate { old + bias } else { bias }
                });
            }
        }
    });
}

/// The part of C worked on between two packings of B, and how it is cut into tasks.
struct Grid {
    batches: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
    rows_per_task: usize,
    cols_per_task: usize,
}

/// A rectangle of C over a range of the depth.
struct Block {
    batch: usize,
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
    depth: std::ops::Range<usize>,
}

struct Run<'a, A, B> {
    kernels: &'static MicroKernels,
    problem: &'a Problem<'a>,
    a: &'a A,
    b: &'a B,
    /// Depth of a block, in elements.
    depth: usize,
    /// Rows whose moments are summed together, and where.
    groups: Groups,
    sums: Option<SharedMut<'a, f32>>,
}

/// B packed for a grid.
#[derive(Clone, Copy)]
struct PackedB<'a> {
    words: SharedMut<'a, f32>,
    /// Columns of a batch, whole panels.
    padded: usize,
    /// First batch and column.
    batch: usize,
    col: usize,
}

/// Start of a packed panel, all lengths in words: blocks of the depth lie one after the other, each with all panels of
/// `padded` columns.
fn packed_offset(k: usize, padded: usize, batch: usize, depth: usize, len: usize, col: usize) -> usize {
    batch * k * padded + depth * padded + col * len
}

impl<A: Panels, B: Panels> Run<'_, A, B> {
    /// The multiplication with the depth in one piece.
    ///
    /// # Safety
    /// See [`multiply`].
    unsafe fn whole<C: Rows>(&self, pool: &ThreadPool, c: Target<'_>, rows: &C) {
        let p = self.problem;
        let k = self.kernels.words(p.k);

        // Few threads want large tasks, many threads want many; the result does not depend on it.
        let smallest = if p.moments > 0 { self.groups.group } else { ROWS / 2 };
        let mut rows_per_task = ROWS;
        let mut cols_per_task = COLS;
        let tasks = |rows: usize, cols: usize| p.batch * p.m.div_ceil(rows) * p.n.div_ceil(cols);
        if p.batch >= 4 * pool.threads() && k * p.n <= PACKED_B / 16 && p.m <= 8 * ROWS {
            // Many small products: each is one task that packs its own B.
            rows_per_task = p.m;
        } else {
            while tasks(rows_per_task, cols_per_task) < 4 * pool.threads() && cols_per_task > 128 {
                cols_per_task -= 128;
            }
            while tasks(rows_per_task, cols_per_task) < 4 * pool.threads() && rows_per_task > smallest {
                rows_per_task /= 2;
            }
        }
        if p.m <= rows_per_task {
            let grid = Grid { batches: 0..p.batch, cols: 0..p.n, rows_per_task, cols_per_task };
            // SAFETY: as promised by the caller.
            unsafe { self.grid(pool, c, rows, &grid, None) };
            return;
        }
        // B is used by several tasks: pack all of it first, or as much at a time as the limit allows.
        let padded = p.n.next_multiple_of(self.kernels.nr);
        let batches = (PACKED_B / (k * padded)).clamp(1, p.batch);
        let cols = if k * padded <= PACKED_B { padded } else { (PACKED_B / k / COLS * COLS).max(COLS) };
        let mut packed = pool.shared_scratch(SLOT_B, batches * k * cols.min(padded) + SLACK);
        let packed = SharedMut::new(&mut packed);
        for first in (0..p.batch).step_by(batches) {
            for col in (0..p.n).step_by(cols) {
                let grid = Grid {
                    batches: first..p.batch.min(first + batches),
                    cols: col..p.n.min(col + cols),
                    rows_per_task,
                    cols_per_task,
                };
                // SAFETY: as promised by the caller.
                unsafe {
                    self.pack_b(pool, packed, &grid);
                    self.grid(pool, c, rows, &grid, Some(packed));
                }
            }
        }
    }

    /// Packs B for the grid, one task per panel.
    ///
    /// # Safety
    /// See [`multiply`].
    unsafe fn pack_b(&self, pool: &ThreadPool, packed: SharedMut<'_, f32>, grid: &Grid) {
        let (p, nr) = (self.problem, self.kernels.nr);
        let padded = grid.cols.len().next_multiple_of(nr);
        let (blocks, groups) = (p.k.div_ceil(self.depth), padded.div_ceil(PACK_COLS));
        pool.run(grid.batches.len() * blocks * groups, &|task, _| {
            let (batch, depth) = (task / (blocks * groups), task / groups % blocks * self.depth);
            let col = task % groups * PACK_COLS;
            let len = self.depth.min(p.k - depth);
            let words = |len| self.kernels.words(len);
            let at = packed_offset(words(p.k), padded, batch, words(depth), words(len), col);
            let (first, lines) = (grid.cols.start + col, PACK_COLS.min(grid.cols.len() - col));
            debug_assert!(at + words(len) * lines.next_multiple_of(nr) <= packed.len());
            // SAFETY: each task writes its own panels, and nothing past them: panels of B are whole vectors.
            unsafe {
                let dst = packed.as_ptr().add(at);
                self.b.pack_block(self.kernels, grid.batches.start + batch, first, lines, depth, len, dst, nr);
            }
        });
    }

    /// Multiplies the grid's part of C, with B packed already or by each task.
    ///
    /// # Safety
    /// See [`multiply`].
    unsafe fn grid<C: Rows>(
        &self,
        pool: &ThreadPool,
        c: Target<'_>,
        rows: &C,
        grid: &Grid,
        packed: Option<SharedMut<'_, f32>>,
    ) {
        let p = self.problem;
        let row_tasks = p.m.div_ceil(grid.rows_per_task);
        let col_tasks = grid.cols.len().div_ceil(grid.cols_per_task);
        let padded = grid.cols.len().next_multiple_of(self.kernels.nr);
        let b_len = if packed.is_some() { 0 } else { self.b_scratch(grid.cols_per_task.min(grid.cols.len())) };
        let c_len = self.c_scratch(c, grid.rows_per_task.min(p.m), grid.cols_per_task.min(grid.cols.len()));
        pool.reserve_scratch(b_len + self.a_scratch() + c_len);
        pool.run(grid.batches.len() * row_tasks * col_tasks, &|task, worker| {
            let (batch, tile) = (task / (row_tasks * col_tasks), task % (row_tasks * col_tasks));
            let row = tile / col_tasks * grid.rows_per_task;
            let col = grid.cols.start + tile % col_tasks * grid.cols_per_task;
            let block = Block {
                batch: grid.batches.start + batch,
                rows: row..p.m.min(row + grid.rows_per_task),
                cols: col..grid.cols.end.min(col + grid.cols_per_task),
                depth: 0..p.k,
            };
            let packed = packed.map(|words| PackedB { words, padded, batch: grid.batches.start, col: grid.cols.start });
            // SAFETY: tasks have disjoint rectangles of C.
            unsafe { self.block(pool, worker, c, rows, &block, packed, Finish::of(p)) };
        });
    }

    /// Cuts the depth into chunks, multiplies each into its own partial C, and adds them in ascending order.
    ///
    /// # Safety
    /// See [`multiply`].
    unsafe fn split<C: Rows>(&self, pool: &ThreadPool, c: Target<'_>, rows: &C, chunks: usize, chunk: usize) {
        let p = self.problem;
        let size = p.batch * p.m * p.n;
        let mut partial = pool.shared_scratch(SLOT_PARTIAL, chunks * size);
        let partial = SharedMut::new(&mut partial);
        let (row_tasks, col_tasks) = (p.m.div_ceil(SPLIT_ROWS), p.n.div_ceil(COLS));
        let (rows_per_task, cols_per_task) = (
            p.m.div_ceil(row_tasks).next_multiple_of(self.kernels.mr),
            p.n.div_ceil(col_tasks).next_multiple_of(self.kernels.nr),
        );
        let tiles = p.batch * row_tasks * col_tasks;
        pool.reserve_scratch(self.b_scratch(p.n.min(cols_per_task)) + self.a_scratch());
        pool.run(tiles * chunks, &|task, worker| {
            let (part, tile) = (task / tiles, task % tiles);
            let (batch, tile) = (tile / (row_tasks * col_tasks), tile % (row_tasks * col_tasks));
            let (row, col) = (tile / col_tasks * rows_per_task, tile % col_tasks * cols_per_task);
            let block = Block {
                batch,
                rows: row.min(p.m)..p.m.min(row + rows_per_task),
                cols: col.min(p.n)..p.n.min(col + cols_per_task),
                depth: part * chunk..p.k.min((part + 1) * chunk),
            };
            let dense = DenseRows { start: part * size, row: p.n, batch: p.m * p.n };
            let finish = Finish { alpha: 1.0, accumulate: false, bias: None };
            // SAFETY: tasks have disjoint rectangles of the partial products.
            unsafe { self.block(pool, worker, Target::F32(partial), &dense, &block, None, finish) };
        });
        pool.run(p.batch * p.m, &|task, _| {
            let (batch, row) = (task / p.m, task % p.m);
            let mut offset = [0];
            rows.offsets(batch, row, &mut offset);
            // SAFETY: each task has its own row of C and of the partial products; the latter are complete.
            let sums = unsafe { partial.slice(task * p.n, p.n) };
            for part in 1..chunks {
                // SAFETY: as above.
                let more = unsafe { partial.slice(part * size + task * p.n, p.n) };
                sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += *more);
            }
            let sums = &sums[..];
            // SAFETY: as above.
            unsafe {
                match (p.accumulate, p.bias.map(|bias| &bias[batch * p.bias_stride..][..p.n])) {
                    (true, None) => c.update(offset[0], p.n, |at, old| old + p.alpha * sums[at]),
                    (false, None) => c.update(offset[0], p.n, |at, _| p.alpha * sums[at]),
                    (true, Some(bias)) => c.update(offset[0], p.n, |at, old| old + p.alpha * sums[at] + bias[at]),
                    (false, Some(bias)) => c.update(offset[0], p.n, |at, _| p.alpha * sums[at] + bias[at]),
                }
            }
        });
    }

    /// Scratch for a packed block of B, a whole number of cache lines.
    fn b_scratch(&self, cols: usize) -> usize {
        (self.kernels.words(self.depth) * cols.next_multiple_of(self.kernels.nr) + SLACK).next_multiple_of(16)
    }

    /// Scratch for a packed panel of A, a whole number of cache lines.
    fn a_scratch(&self) -> usize {
        (self.kernels.words(self.depth) * self.kernels.mr + SLACK).next_multiple_of(16)
    }

    /// Scratch for the sums over the blocks of the depth, where C itself cannot hold them.
    fn c_scratch(&self, c: Target<'_>, rows: usize, cols: usize) -> usize {
        match c {
            Target::Bf16(_) if self.problem.k > self.depth => rows * cols.next_multiple_of(16),
            _ => 0,
        }
    }

    /// One task: a rectangle of C over a range of the depth that starts at a block's limit.
    ///
    /// # Safety
    /// See [`multiply`]; no other task touches the rectangle.
    #[allow(clippy::too_many_arguments)]
    unsafe fn block<C: Rows>(
        &self,
        pool: &ThreadPool,
        worker: usize,
        c: Target<'_>,
        rows: &C,
        block: &Block,
        packed: Option<PackedB<'_>>,
        finish: Finish<'_>,
    ) {
        let kernels = self.kernels;
        let MicroKernels { mr, nr, .. } = *kernels;
        let cols = block.cols.len();
        let b_len = if packed.is_some() { 0 } else { self.b_scratch(cols) };
        let c_len = self.c_scratch(c, block.rows.len(), cols);
        let mut scratch = pool.scratch(worker, b_len + self.a_scratch() + c_len);
        let (b_block, rest) = scratch.split_at_mut(b_len);
        let (a_panel, sums) = rest.split_at_mut(self.a_scratch());
        let (a_panel, sums) = (a_panel.as_mut_ptr(), sums.as_mut_ptr());
        let bias = finish.bias.map(|bias| &bias[block.batch * self.problem.bias_stride..]);
        let (mut c_rows, mut sum_rows) = ([0; MAX_MR], [0; MAX_MR]);
        let mut starts = [[std::ptr::null(); MAX_MR]; MAX_RUNS];
        for depth in block.depth.clone().step_by(self.depth) {
            let len = self.depth.min(block.depth.end - depth);
            let words = kernels.words(len);
            let first = depth == block.depth.start;
            let last = depth + len == block.depth.end;
            let b_start = match packed {
                Some(packed) => {
                    let (k, depth) = (kernels.words(self.problem.k), kernels.words(depth));
                    let (batch, col) = (block.batch - packed.batch, block.cols.start - packed.col);
                    let at = packed_offset(k, packed.padded, batch, depth, words, col);
                    // SAFETY: within the packed operand, which is complete and no longer written.
                    unsafe { packed.words.as_ptr().add(at).cast_const() }
                }
                None => {
                    let dst = b_block.as_mut_ptr();
                    // SAFETY: within the operand; the scratch has room for whole panels and the slack.
                    unsafe { self.b.pack_block(kernels, block.batch, block.cols.start, cols, depth, len, dst, nr) };
                    b_block.as_ptr()
                }
            };
            for row in block.rows.clone().step_by(mr) {
                let count = mr.min(block.rows.end - row);
                let lines = match kernels.in_place {
                    true => self.a.in_place(block.batch, row, count, depth, len, &mut starts),
                    false => None,
                };
                if lines.is_none() {
                    // SAFETY: within the operand; the scratch has room for one panel and the slack.
                    unsafe { self.a.pack(kernels, block.batch, row, count, depth, len, a_panel, mr) };
                }
                rows.offsets(block.batch, row, &mut c_rows[..count]);
                // Sums go to C, or to the scratch memory until the last block of the depth.
                let in_c = matches!(c, Target::F32(_));
                for (at, offset) in sum_rows[..count].iter_mut().enumerate() {
                    *offset = (row - block.rows.start + at) * cols.next_multiple_of(16);
                }
                let (moments, group) = (last.then_some(self.sums).flatten(), row / self.groups.group);
                for col in (0..cols).step_by(nr) {
                    let bias = match bias {
                        Some(bias) if last => bias[block.cols.start + col..].as_ptr(),
                        _ => std::ptr::null(),
                    };
                    // SAFETY: the first row's offset plus the column is an element of C, or of the scratch memory;
                    // each group has `3 * cols` sums.
                    let (c_start, narrow, moments) = unsafe {
                        let (c_start, narrow) = match c {
                            Target::F32(c) => (c.as_ptr().add(block.cols.start + col), None),
                            Target::Bf16(c) => {
                                let out = c.as_ptr().add(block.cols.start + col);
                                let narrow = Narrow { out, rows: c_rows.as_ptr(), accumulate: finish.accumulate };
                                (sums.wrapping_add(col), last.then_some(narrow))
                            }
                        };
                        let moments = moments.map(|sums| {
                            let col = block.batch * self.problem.bias_stride + block.cols.start + col;
                            let pivots = sums.as_ptr().add(group * 3 * self.groups.cols + col);
                            Moments { pivots, stride: self.groups.cols, first: row % self.groups.group == 0 }
                        });
                        (c_start, narrow, moments)
                    };
                    let tile = Tile {
                        a: a_panel,
                        lines,
                        // SAFETY: within the packed block.
                        b: unsafe { b_start.add(col * words) },
                        depth: words,
                        c: c_start,
                        c_rows: if in_c { c_rows.as_ptr() } else { sum_rows.as_ptr() },
                        rows: count,
                        cols: nr.min(cols - col),
                        alpha: finish.alpha,
                        accumulate: !first || finish.accumulate && in_c,
                        bias,
                        narrow,
                        moments,
                    };
                    // SAFETY: the tile is inside C and both packed panels; the table matches the processor.
                    unsafe { (kernels.multiply)(&tile) };
                }
            }
        }
    }
}

/// What happens to the products on their way to C.
#[derive(Clone, Copy)]
struct Finish<'a> {
    alpha: f32,
    accumulate: bool,
    bias: Option<&'a [f32]>,
}

impl<'a> Finish<'a> {
    fn of(p: &Problem<'a>) -> Self {
        Finish { alpha: p.alpha, accumulate: p.accumulate, bias: p.bias }
    }
}

/// Rows at a constant distance.
pub(crate) struct DenseRows {
    pub start: usize,
    pub row: usize,
    pub batch: usize,
}

impl Rows for DenseRows {
    fn offsets(&self, batch: usize, row: usize, offsets: &mut [usize]) {
        let first = self.start + batch * self.batch + row * self.row;
        offsets.iter_mut().enumerate().for_each(|(at, offset)| *offset = first + at * self.row);
    }
}

/// An operand in memory with constant strides.
pub(crate) struct Strided<'a, T, F: Fn(usize) -> usize + Sync> {
    pub data: &'a [T],
    /// Distance of two lines.
    pub line: usize,
    /// Distance of two elements along the depth.
    pub depth: usize,
    /// Offset of a batch.
    pub batch: F,
}

impl<T: Source, F: Fn(usize) -> usize + Sync> Panels for Strided<'_, T, F> {
    // SAFETY: what the caller promises is with the trait.
    unsafe fn pack(
        &self,
        kernels: &MicroKernels,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        let start = self.start(batch, line, depth);
        debug_assert!(start + (lines - 1) * self.line + (len - 1) * self.depth < self.data.len());
        // SAFETY: all offsets are inside the operand, by the caller's promise.
        unsafe {
            let src = self.data.as_ptr().add(start);
            if self.line == 1 {
                kernels.pack_rows(src, self.depth, lines, len, dst, width);
            } else if self.depth == 1 {
                let mut pointers = [src; 16];
                for first in (0..lines).step_by(16) {
                    let count = (lines - first).min(16);
                    for (at, pointer) in pointers[..count].iter_mut().enumerate() {
                        *pointer = src.add((first + at) * self.line);
                    }
                    (T::packers(kernels).transpose)(&pointers[..count], len, dst.add(first), width);
                }
            } else {
                // Neither direction is contiguous: a few rows at a time are gathered first.
                let mut values = [[T::default(); MAX_NR]; 2];
                for k in (0..len).step_by(2) {
                    let rows = (len - k).min(2);
                    for (k, values) in (k..k + rows).zip(&mut values) {
                        for (at, value) in values[..lines].iter_mut().enumerate() {
                            *value = src.add(k * self.depth + at * self.line).read();
                        }
                    }
                    let dst = dst.add(k / kernels.pair * width);
                    kernels.pack_rows(values.as_ptr().cast::<T>(), MAX_NR, lines, rows, dst, width);
                }
            }
        }
    }

    // SAFETY: what the caller promises is with the trait.
    unsafe fn pack_block(
        &self,
        kernels: &MicroKernels,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        dst: *mut f32,
        width: usize,
    ) {
        // A few rows at a time: reads run along the rows, writes stay in a few lines of each panel.
        let rows = if self.line == 1 && lines > width { 8 * kernels.pair } else { len };
        for k in (0..len).step_by(rows.max(1)) {
            for at in (0..lines).step_by(width) {
                let (count, rows) = (width.min(lines - at), rows.min(len - k));
                // SAFETY: the caller's promise; rows of a panel follow each other.
                unsafe {
                    let dst = dst.add(at * kernels.words(len) + k / kernels.pair * width);
                    self.pack(kernels, batch, line + at, count, depth + k, rows, dst, width);
                }
            }
        }
    }

    fn in_place(
        &self,
        batch: usize,
        line: usize,
        lines: usize,
        depth: usize,
        len: usize,
        starts: &mut [Starts; MAX_RUNS],
    ) -> Option<Lines> {
        if !T::WORD || self.depth != 1 {
            return None;
        }
        let start = self.start(batch, line, depth);
        debug_assert!(start + (lines - 1) * self.line + len <= self.data.len());
        for (at, first) in starts[0][..lines].iter_mut().enumerate() {
            *first = self.data.as_ptr().wrapping_add(start + at * self.line).cast();
        }
        Some(Lines { starts: starts.as_ptr(), runs: 1, run: len, step: 1 })
    }
}

impl<T: Source, F: Fn(usize) -> usize + Sync> Strided<'_, T, F> {
    fn start(&self, batch: usize, line: usize, depth: usize) -> usize {
        (self.batch)(batch) + line * self.line + depth * self.depth
    }
}
