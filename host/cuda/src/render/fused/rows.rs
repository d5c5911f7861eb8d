//! Kernels with reductions over the columns of a row, over the rows of a segment, or both.

use super::*;

/// Lanes of a row group that shares no warp barrier with others.
const WARP: usize = 32;
/// Columns' sums that a thread holds in registers as unrolled code; more are kept in its local memory.
const UNROLLED: usize = 16;
/// Columns of the launch that joins partial sums, and its threads behind each column.
const JOIN: (usize, usize) = (32, 8);

/// How the space is divided.
struct Division {
    /// Threads that share a row, a power of two.
    lanes: usize,
    /// Rows that a block takes at once.
    groups: usize,
    /// Groups of columns that each thread takes.
    slots: usize,
    /// Blocks along the columns.
    tiles: usize,
    /// Rows of a block, and blocks of a segment.
    chunk: usize,
    chunks: usize,
    segment: usize,
}

impl Renderer<'_> {
    fn divide(&self) -> Division {
        let Fused { rows, cols, .. } = *self.kernel;
        let (segment, v) = (self.kernel.segment().max(1), self.vector);
        let wanted = cols.div_ceil(v).next_power_of_two();
        let (lanes, groups, slots, tiles) = if !self.kernel.has_row_reductions() {
            let lanes = wanted.min(WARP);
            (lanes, THREADS / lanes, 1, cols.div_ceil(lanes * v))
        } else if wanted <= WARP {
            (wanted, THREADS / wanted, 1, 1)
        } else {
            let lanes = wanted.min(if cols > 16 * THREADS { 4 * THREADS } else { THREADS });
            (lanes, 1, cols.div_ceil(lanes * v), 1)
        };
        let reduces = self.kernel.outputs.iter().any(|o| o.store != Store::Each);
        let chunk = if reduces {
            let segments = rows / segment;
            let chunks = PARTIALS.div_ceil(segments * tiles).clamp(1, segment.div_ceil(groups * 4).max(1));
            segment.div_ceil(chunks).next_multiple_of(groups).min(segment)
        } else {
            groups.min(segment)
        };
        Division { lanes, groups, slots, tiles, chunk, chunks: segment.div_ceil(chunk), segment }
    }

    pub(super) fn rows(&self) -> Vec<Draft> {
        let division = self.divide();
        let Division { lanes, groups, tiles, chunk, chunks, segment, .. } = division;
        let Fused { rows, cols, .. } = *self.kernel;
        let segments = rows / segment;
        let outputs = &self.kernel.outputs;
        let all: Vec<usize> = (0..outputs.len()).filter(|&o| is_all(outputs[o].store)).collect();
        let columns: Vec<usize> = (0..outputs.len()).filter(|&o| is_rows(outputs[o].store)).collect();

        let mut parameters = self.parameters();
        let mut combine = Vec::new();
        let mut scratch = 0;
        for (o, output) in outputs.iter().enumerate() {
            match output.store {
                Store::Each => self.write_parameter(&mut parameters, o),
                Store::SumAll | Store::MaxAll => {
                    let at = Address { block: Block::Scratch, offset: scratch };
                    let count = segments * chunks * tiles;
                    parameters.raw(&format!("float *w{o}"), at, count * 4, Access::Write, 4);
                    combine.push(self.combine_all(o, at, count));
                    scratch += (count * 4).next_multiple_of(256);
                }
                Store::SumRows { .. } | Store::MaxRows { .. } if chunks == 1 => {
                    self.write_parameter(&mut parameters, o);
                }
                Store::SumRows { .. } | Store::MaxRows { .. } => {
                    let at = Address { block: Block::Scratch, offset: scratch };
                    let count = segments * chunks * cols;
                    parameters.raw(&format!("float *w{o}"), at, count * 4, Access::Write, 4);
                    combine.push(self.combine_rows(o, at, segments, chunks));
                    scratch += (count * 4).next_multiple_of(256);
                }
            }
        }

        let (mut text, index) = (String::new(), self.index);
        let t = &mut text;
        let (v, threads) = (self.vector, lanes * groups);
        if lanes > WARP || !all.is_empty() {
            line(t, 1, "__shared__ float room[32];");
        }
        if !columns.is_empty() && groups > 1 {
            line(t, 1, &format!("__shared__ float column[{groups}][{}];", lanes * v));
        }
        line(t, 1, &format!("const u32 lane = threadIdx.x % {lanes}, group = threadIdx.x / {lanes};"));
        self.scalars(t);
        for &o in &all {
            line(t, 1, &format!("float s{o} = {}::zero();", operation(outputs[o].store)));
        }
        let held = division.slots * v;
        for &o in &columns {
            let zero = operation(outputs[o].store);
            line(t, 1, &format!("float a{o}[{held}];"));
            line(t, 1, "#pragma unroll");
            line(t, 1, &format!("for (int e = 0; e < {held}; e++) a{o}[e] = {zero}::zero();"));
        }
        // Neighbouring blocks take neighbouring columns of the same rows; a grid is long along x only.
        let block = match tiles {
            1 => "blockIdx.x".to_string(),
            _ => {
                line(t, 1, &format!("const u32 tile = blockIdx.x % {tiles}, block = blockIdx.x / {tiles};"));
                "block".to_string()
            }
        };
        line(t, 1, &format!("const {index} part = {block} % {chunks}, piece = {block} / {chunks};"));
        line(t, 1, &format!("const {index} first = piece * {segment} + part * {chunk};"));
        let (last, limit) = (format!("first + {chunk}"), format!("(piece + 1) * {segment}"));
        line(t, 1, &format!("const {index} end = {last} < {limit} ? {last} : {limit};"));
        if self.phases == 0 && self.kernel.code.len() <= LONG {
            // Several rows' loads are under way at once.
            line(t, 0, "#pragma unroll 2");
        }
        line(t, 1, &format!("for (u32 turn = 0; turn < {}; turn++) {{", chunk.div_ceil(groups)));
        // Threads beyond the last row compute it again, so that all meet at the barriers, and keep nothing.
        line(t, 2, &format!("const {index} wanted = first + turn * {groups} + group;"));
        line(t, 2, "const bool valid = wanted < end;");
        line(t, 2, &format!("const {index} row = valid ? wanted : end - 1;"));
        for phase in 0..self.phases {
            self.row_values(t, phase);
            self.row_reductions(t, phase, &division);
        }
        self.row_values(t, self.phases);
        self.last_pass(t, &division);
        let of_row = |o: &Output| o.store == Store::Each && self.kernel.code[o.value].1 == Rank::Row;
        if lanes > 1 && outputs.iter().any(of_row) && parameters.overlap() {
            // Where a row's value replaces one that all lanes read: shuffles order no memory.
            line(t, 2, "__syncwarp();");
        }
        for (o, output) in outputs.iter().enumerate() {
            if of_row(output) {
                let once = if tiles > 1 { "valid && lane == 0 && tile == 0" } else { "valid && lane == 0" };
                line(t, 2, &format!("if ({once}) {}", self.store_row(o)));
            }
        }
        line(t, 1, "}");
        self.column_results(t, &division, &columns);
        for &o in &all {
            let op = operation(outputs[o].store);
            line(t, 1, &format!("s{o} = reduce_block<{threads}, {op}>(s{o}, room);"));
            line(t, 1, &format!("if (threadIdx.x == 0) w{o}[blockIdx.x] = s{o};"));
        }
        let grid = [blocks(segments * chunks * tiles), 1, 1];
        let mut drafts = vec![parameters.draft(threads as u32, grid, &text)];
        drafts.append(&mut combine);
        drafts
    }

    /// Values of the row that are known after `phase` reductions.
    fn row_values(&self, text: &mut String, phase: usize) {
        for (reg, (instr, rank)) in self.kernel.code.iter().enumerate() {
            let reduces = matches!(instr, Instr::RowSum(_) | Instr::RowMax(_));
            if *rank == Rank::Row && self.phase[reg] == phase && !reduces {
                line(text, 2, &format!("const float r{reg} = {};", self.expression(reg, "row", "0")));
            }
        }
    }

    /// A pass over the row for the reductions whose operands are known after `phase` others.
    fn row_reductions(&self, text: &mut String, phase: usize, division: &Division) {
        let (lanes, v) = (division.lanes, self.vector);
        let reductions: Vec<(Reg, Reg, &str)> = self
            .kernel
            .code
            .iter()
            .enumerate()
            .filter(|(reg, _)| self.phase[*reg] == phase + 1)
            .filter_map(|(reg, (instr, _))| match instr {
                Instr::RowSum(a) => Some((reg, *a, "Sum")),
                Instr::RowMax(a) => Some((reg, *a, "Max")),
                _ => None,
            })
            .collect();
        for (reg, _, op) in &reductions {
            line(text, 2, &format!("float r{reg} = {op}::zero();"));
        }
        let cols = self.kernel.cols;
        line(text, 2, &format!("for (u32 col = lane * {v}; col < {cols}; col += {}) {{", lanes * v));
        let regs = self.needed(reductions.iter().map(|r| r.1));
        self.loads(text, 3, &regs, None);
        line(text, 3, "#pragma unroll");
        line(text, 3, &format!("for (int e = 0; e < {v}; e++) {{"));
        self.compute(text, 4, &regs);
        for (reg, operand, op) in &reductions {
            line(text, 4, &format!("r{reg} = {op}::join(r{reg}, r{operand});"));
        }
        line(text, 3, "}");
        line(text, 2, "}");
        for (reg, _, op) in &reductions {
            match lanes > WARP {
                true => line(text, 2, &format!("r{reg} = reduce_block<{lanes}, {op}>(r{reg}, room);")),
                false => line(text, 2, &format!("r{reg} = reduce_lanes<{lanes}, {op}>(r{reg});")),
            }
        }
    }

    /// The pass that writes full results and adds to the reductions over rows.
    fn last_pass(&self, text: &mut String, division: &Division) {
        let Division { lanes, slots, tiles, .. } = *division;
        let (cols, v) = (self.kernel.cols, self.vector);
        let outputs = &self.kernel.outputs;
        let full: Vec<usize> =
            (0..outputs.len()).filter(|&o| self.kernel.code[outputs[o].value].1 == Rank::Full).collect();
        if full.is_empty() {
            return;
        }
        let regs = self.needed(full.iter().map(|&o| outputs[o].value));
        if slots <= UNROLLED {
            line(text, 2, "#pragma unroll");
        }
        line(text, 2, &format!("for (int slot = 0; slot < {slots}; slot++) {{"));
        let tile = if tiles > 1 { format!("tile * {} + ", lanes * v) } else { String::new() };
        line(text, 3, &format!("const u32 col = {tile}(slot * {lanes} + lane) * {v};"));
        line(text, 3, &format!("if (col >= {cols}) break;"));
        self.loads(text, 3, &regs, None);
        for &o in full.iter().filter(|&&o| outputs[o].store == Store::Each) {
            line(text, 3, &format!("float o{o}[{v}];"));
        }
        line(text, 3, "#pragma unroll");
        line(text, 3, &format!("for (int e = 0; e < {v}; e++) {{"));
        self.compute(text, 4, &regs);
        for &o in &full {
            let (value, op) = (outputs[o].value, operation(outputs[o].store));
            let held = format!("a{o}[slot * {v} + e]");
            match outputs[o].store {
                Store::Each => line(text, 4, &format!("o{o}[e] = r{value};")),
                Store::SumAll | Store::MaxAll => {
                    line(text, 4, &format!("if (valid) s{o} = {op}::join(s{o}, r{value});"));
                }
                _ => line(text, 4, &format!("if (valid) {held} = {op}::join({held}, r{value});")),
            }
        }
        line(text, 3, "}");
        let stored: Vec<usize> = full.iter().copied().filter(|&o| outputs[o].store == Store::Each).collect();
        if !stored.is_empty() {
            line(text, 3, "if (valid) {");
            stored.iter().for_each(|&o| self.store(text, 4, o, &format!("row * {cols} + col"), None));
            line(text, 3, "}");
        }
        line(text, 2, "}");
    }

    /// Joins what the block's rows added to each column, and writes it.
    fn column_results(&self, text: &mut String, division: &Division, columns: &[usize]) {
        let Division { lanes, groups, slots, tiles, chunks, .. } = *division;
        let (cols, v) = (self.kernel.cols, self.vector);
        for &o in columns {
            let op = operation(self.kernel.outputs[o].store);
            let write = |text: &mut String, depth: usize, col: &str, value: &str| match chunks {
                1 => line(text, depth, &format!("narrow({value}, q{o}[piece * {cols} + {col}]);")),
                _ => line(text, depth, &format!("w{o}[(piece * {chunks} + part) * {cols} + {col}] = {value};")),
            };
            if groups == 1 {
                line(text, 1, "#pragma unroll");
                line(text, 1, &format!("for (int e = 0; e < {}; e++) {{", slots * v));
                line(text, 2, &format!("const u32 col = (e / {v} * {lanes} + lane) * {v} + e % {v};"));
                line(text, 2, &format!("if (col < {cols})"));
                write(text, 3, "col", &format!("a{o}[e]"));
                line(text, 1, "}");
                continue;
            }
            line(text, 1, "#pragma unroll");
            line(text, 1, &format!("for (int e = 0; e < {v}; e++) column[group][lane * {v} + e] = a{o}[e];"));
            line(text, 1, "__syncthreads();");
            let threads = lanes * groups;
            line(text, 1, &format!("for (u32 c = threadIdx.x; c < {}; c += {threads}) {{", lanes * v));
            let tile = if tiles > 1 { format!("tile * {} + ", lanes * v) } else { String::new() };
            line(text, 2, &format!("const u32 col = {tile}c;"));
            line(text, 2, "float v = column[0][c];");
            line(text, 2, &format!("for (int g = 1; g < {groups}; g++) v = {op}::join(v, column[g][c]);"));
            line(text, 2, &format!("if (col < {cols})"));
            write(text, 3, "col", "v");
            line(text, 1, "}");
            line(text, 1, "__syncthreads();");
        }
    }

    /// The launch that joins the partial sums of a segment's blocks.
    fn combine_rows(&self, output: usize, partials: Address, segments: usize, chunks: usize) -> Draft {
        let (o, cols) = (&self.kernel.outputs[output], self.kernel.cols);
        let (width, behind) = JOIN;
        let op = operation(o.store);
        let mut parameters = Parameters::default();
        parameters.raw("const float *w", partials, segments * chunks * cols * 4, Access::Read, 4);
        let elements = segments * cols;
        parameters.write("q", o.dtype, self.outputs[output], elements, Some(o.target), Access::Write);
        let tiles = cols.div_ceil(width);
        let mut text = String::new();
        let t = &mut text;
        line(t, 1, &format!("__shared__ float room[{behind}][{width}];"));
        line(t, 1, &format!("const u32 x = threadIdx.x % {width}, y = threadIdx.x / {width};"));
        line(t, 1, &format!("const u32 piece = blockIdx.x / {tiles}, col = blockIdx.x % {tiles} * {width} + x;"));
        line(t, 1, &format!("float v = {op}::zero();"));
        line(t, 1, &format!("if (col < {cols})"));
        let at = format!("((u64)piece * {chunks} + i) * {cols} + col");
        line(t, 2, &format!("for (u32 i = y; i < {chunks}; i += {behind}) v = {op}::join(v, w[{at}]);"));
        line(t, 1, "room[y][x] = v;");
        line(t, 1, "__syncthreads();");
        line(t, 1, &format!("if (y == 0 && col < {cols}) {{"));
        line(t, 2, &format!("for (int i = 1; i < {behind}; i++) v = {op}::join(v, room[i][x]);"));
        line(t, 2, &format!("narrow(v, q[(u64)piece * {cols} + col]);"));
        line(t, 1, "}");
        parameters.draft((width * behind) as u32, [blocks(segments * tiles), 1, 1], &text)
    }
}

fn is_all(store: Store) -> bool {
    matches!(store, Store::SumAll | Store::MaxAll)
}

fn is_rows(store: Store) -> bool {
    matches!(store, Store::SumRows { .. } | Store::MaxRows { .. })
}
