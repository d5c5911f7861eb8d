//! Kernels without reductions, or with those over everything only.

use super::*;

impl Renderer<'_> {
    pub(super) fn flat(&self) -> Vec<Draft> {
        let Fused { rows, cols, .. } = *self.kernel;
        let (count, v) = (rows * cols, self.vector);
        let reductions: Vec<usize> =
            (0..self.kernel.outputs.len()).filter(|&o| self.kernel.outputs[o].store != Store::Each).collect();
        let most = if reductions.is_empty() { FLAT_BLOCKS } else { PARTIALS };
        let blocks = count.div_ceil(THREADS * v).clamp(1, most);

        let mut parameters = self.parameters();
        let each = || (0..self.kernel.outputs.len()).filter(|&o| self.kernel.outputs[o].store == Store::Each);
        each().for_each(|o| self.write_parameter(&mut parameters, o));
        let mut combine = Vec::new();
        for (number, &output) in reductions.iter().enumerate() {
            let at = Address { block: Block::Scratch, offset: number * PARTIALS * 4 };
            parameters.raw(&format!("float *w{output}"), at, blocks * 4, Access::Write, 4);
            combine.push(self.combine_all(output, at, blocks));
        }

        let mut text = String::new();
        let index = self.index;
        if !reductions.is_empty() {
            line(&mut text, 1, "__shared__ float room[32];");
        }
        self.scalars(&mut text);
        for &o in &reductions {
            let op = operation(self.kernel.outputs[o].store);
            line(&mut text, 1, &format!("float s{o} = {op}::zero();"));
        }
        let start = format!("({index} i = (({index})blockIdx.x * {THREADS} + threadIdx.x) * {v};");
        line(&mut text, 1, &format!("for {start} i < {count}; i += ({index}){} * {v}) {{", blocks * THREADS));
        let tail = !count.is_multiple_of(v);
        if tail {
            line(&mut text, 2, &format!("const int n = {count} - i < {v} ? (int)({count} - i) : {v};"));
        }
        if !self.linear {
            line(&mut text, 2, &format!("const {index} row = i / {cols}, col = i % {cols};"));
            for (reg, (_, rank)) in self.kernel.code.iter().enumerate() {
                if *rank == Rank::Row {
                    line(&mut text, 2, &format!("const float r{reg} = {};", self.expression(reg, "row", "0")));
                }
            }
        }
        let n = tail.then_some("n");
        let of_rank = |o: &usize, rank: Rank| self.kernel.code[self.kernel.outputs[*o].value].1 == rank;
        let full: Vec<usize> = (0..self.kernel.outputs.len()).filter(|o| of_rank(o, Rank::Full)).collect();
        let regs = self.needed(full.iter().map(|&o| self.kernel.outputs[o].value));
        self.loads(&mut text, 2, &regs, n);
        for &o in full.iter().filter(|o| !reductions.contains(o)) {
            line(&mut text, 2, &format!("float o{o}[{v}];"));
        }
        if !full.is_empty() {
            line(&mut text, 2, "#pragma unroll");
            line(&mut text, 2, &format!("for (int e = 0; e < {v}; e++) {{"));
            self.compute(&mut text, 3, &regs);
            for &o in &full {
                let value = self.kernel.outputs[o].value;
                let op = operation(self.kernel.outputs[o].store);
                match (reductions.contains(&o), tail) {
                    (true, true) => line(&mut text, 3, &format!("if (e < n) s{o} = {op}::join(s{o}, r{value});")),
                    (true, false) => line(&mut text, 3, &format!("s{o} = {op}::join(s{o}, r{value});")),
                    (false, _) => line(&mut text, 3, &format!("o{o}[e] = r{value};")),
                }
            }
            line(&mut text, 2, "}");
        }
        for &o in full.iter().filter(|o| !reductions.contains(o)) {
            self.store(&mut text, 2, o, "i", n);
        }
        for o in each().filter(|o| of_rank(o, Rank::Row)) {
            line(&mut text, 2, &format!("if (col == 0) {}", self.store_row(o)));
        }
        line(&mut text, 1, "}");
        for &o in &reductions {
            let op = operation(self.kernel.outputs[o].store);
            line(&mut text, 1, &format!("s{o} = reduce_block<{THREADS}, {op}>(s{o}, room);"));
            line(&mut text, 1, &format!("if (threadIdx.x == 0) w{o}[blockIdx.x] = s{o};"));
        }
        let mut drafts = vec![parameters.draft(THREADS as u32, [super::blocks(blocks), 1, 1], &text)];
        drafts.append(&mut combine);
        drafts
    }

    /// The launch that joins the blocks' partial results of a reduction over everything, in double precision.
    pub(super) fn combine_all(&self, output: usize, partials: Address, count: usize) -> Draft {
        let o = &self.kernel.outputs[output];
        let mut parameters = Parameters::default();
        parameters.raw("const float *w", partials, count * 4, Access::Read, 4);
        parameters.write("q", o.dtype, self.outputs[output], 1, Some(o.target), Access::Write);
        let text = match o.store {
            Store::MaxAll => format!(
                "    __shared__ float room[32];\n    float v = Max::zero();\n    for (int i = threadIdx.x; i < {count}; i += {THREADS}) v = larger(v, w[i]);\n    v = reduce_block<{THREADS}, Max>(v, room);\n    if (threadIdx.x == 0) narrow(v, q[0]);\n"
            ),
            _ => format!(
                "    __shared__ double room[{THREADS}];\n    double v = 0.0;\n    for (int i = threadIdx.x; i < {count}; i += {THREADS}) v += w[i];\n    room[threadIdx.x] = v;\n    __syncthreads();\n    for (int step = {THREADS} / 2; step > 0; step /= 2) {{\n        if (threadIdx.x < step) room[threadIdx.x] += room[threadIdx.x + step];\n        __syncthreads();\n    }}\n    if (threadIdx.x == 0) narrow((float)room[0], q[0]);\n"
            ),
        };
        parameters.draft(THREADS as u32, [1, 1, 1], &text)
    }
}
