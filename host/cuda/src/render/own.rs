//! Kernels with a text of their own: copies, padding, tables, pooling, batch statistics.

use super::text::{Draft, Parameters, dot, index_type};
use crate::launch::{Access, Address, Block, control};
use clip_host_compiler::kernel::{Element, Operand};
use clip_host_plugin_api::ir::{NodeId, Pool};

const THREADS: usize = 256;
/// Blocks of a kernel that walks over elements, at most.
const BLOCKS: usize = 8192;

/// An operand with its place: that of its first element.
pub struct Source<'a> {
    pub at: Address,
    pub element: Element,
    pub view: &'a Operand,
    /// Whose value it is; none for scratch.
    pub node: Option<NodeId>,
}

/// A result with its place.
#[derive(Clone, Copy)]
pub struct Target {
    pub at: Address,
    pub element: Element,
    /// Whose value it is; none for scratch.
    pub node: Option<NodeId>,
}

impl Source<'_> {
    pub fn sizes(&self) -> Vec<usize> {
        self.view.dims.iter().map(|d| d.0).collect()
    }

    pub fn elements(&self) -> usize {
        self.view.dims.iter().map(|d| d.0).product()
    }

    /// How far it reaches from its first element on.
    pub fn reach(&self) -> usize {
        self.view.dims.iter().map(|(size, stride)| size.saturating_sub(1) * stride).sum::<usize>() + 1
    }

    pub fn parameter(&self, parameters: &mut Parameters, name: &str) {
        parameters.read(name, self.element, self.at, self.reach(), self.node);
    }
}

/// A loop of all threads over `count` elements, with the element's number in `i`.
fn each(count: usize, body: &str) -> (String, [u32; 3]) {
    let blocks = count.div_ceil(THREADS).clamp(1, BLOCKS);
    let index = index_type(count);
    let text = format!(
        "    for ({index} i = ({index})blockIdx.x * {THREADS} + threadIdx.x; i < {count}; i += {}) {{\n{body}    }}\n",
        blocks * THREADS
    );
    (text, [blocks as u32, 1, 1])
}

fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d];
    }
    strides
}

/// Writes a strided view in contiguous order.
pub fn copy(from: &Source, to: Target) -> Draft {
    block(from, to, &from.sizes(), &vec![0; from.view.dims.len()], None)
}

/// Writes a view into a part of a contiguous tensor, and a value into the rest if one is given.
pub fn block(from: &Source, to: Target, shape: &[usize], before: &[usize], fill: Option<f32>) -> Draft {
    let sizes = from.sizes();
    let from_strides: Vec<usize> = from.view.dims.iter().map(|d| d.1).collect();
    let count: usize = shape.iter().product();
    let mut parameters = Parameters::default();
    from.parameter(&mut parameters, "p");
    let body = match fill {
        // Over the result's elements: each is inside the block or not.
        Some(value) => {
            let mut inside = Vec::new();
            let mut terms = Vec::new();
            for d in 0..shape.len() {
                let mut one = vec![0; shape.len()];
                one[d] = 1;
                let at = dot("i", shape, &one);
                if before[d] > 0 {
                    inside.push(format!("{at} >= {}", before[d]));
                }
                if before[d] + sizes[d] < shape[d] {
                    inside.push(format!("{at} < {}", before[d] + sizes[d]));
                }
                if from_strides[d] != 0 && sizes[d] != 1 {
                    terms.push(format!("({at} - {}) * {}", before[d], from_strides[d]));
                }
            }
            let (inside, at) = (joined(inside, " && ", "true"), joined(terms, " + ", "0"));
            let value = super::text::literal(value);
            format!("        narrow({inside} ? widen(p[{at}]) : {value}, q[i]);\n")
        }
        // Over the block's elements.
        None => {
            let to_strides = strides(shape);
            let start: usize = before.iter().zip(&to_strides).map(|(b, s)| b * s).sum();
            let (at, into) = (dot("i", &sizes, &from_strides), dot("i", &sizes, &to_strides));
            format!("        narrow(widen(p[{at}]), q[{start} + {into}]);\n")
        }
    };
    let whole = fill.is_some() || from.elements() == count;
    let access = if whole { Access::Write } else { Access::Update };
    parameters.write("q", to.element, to.at, count, to.node, access);
    let (text, grid) = each(if fill.is_some() { count } else { from.elements() }, &body);
    parameters.draft(THREADS as u32, grid, &text)
}

fn joined(parts: Vec<String>, between: &str, none: &str) -> String {
    if parts.is_empty() { none.into() } else { parts.join(between) }
}

/// Sets the flag that ends the step with an error.
const BAD_ID: &str = "atomicExch(bad, 1u)";

fn bad_id(parameters: &mut Parameters) {
    let at = Address { block: Block::Control, offset: control::BAD_ID };
    parameters.raw("u32 *bad", at, 4, Access::Update, 4);
}

/// Rows of a contiguous table by their ids.
pub fn gather(table: &Source, ids: &Source, to: Target) -> Draft {
    let rows = table.view.dims[0].0;
    let width: usize = table.sizes()[1..].iter().product();
    let count = ids.elements() * width;
    let mut parameters = Parameters::default();
    table.parameter(&mut parameters, "p");
    ids.parameter(&mut parameters, "ids");
    parameters.write("q", to.element, to.at, count, to.node, Access::Write);
    bad_id(&mut parameters);
    let body = format!(
        "        const int id = ids[i / {width}];\n        const bool good = id >= 0 && id < {rows};\n        if (!good) {BAD_ID};\n        narrow(good ? widen(p[(u64)id * {width} + i % {width}]) : 0.0f, q[i]);\n"
    );
    let (text, grid) = each(count, &body);
    parameters.draft(THREADS as u32, grid, &text)
}

/// Adds rows where their ids say. A block looks through all ids for those of its row and adds them in their order, so
/// that sums are the same in every run.
pub fn scatter_add(ids: &Source, rows: &Source, to: Target, shape: &[usize]) -> Draft {
    let (count, width) = (shape[0], shape[1..].iter().product::<usize>());
    let given = ids.elements();
    let tiles = width.div_ceil(THREADS * 4);
    let mut parameters = Parameters::default();
    ids.parameter(&mut parameters, "ids");
    rows.parameter(&mut parameters, "p");
    parameters.write("q", to.element, to.at, count * width, to.node, Access::Write);
    bad_id(&mut parameters);
    let text = format!(
        "    __shared__ u32 found[{words}];
    const u32 row = blockIdx.x;
    float sum[4] = {{0.0f, 0.0f, 0.0f, 0.0f}};
    for (u32 first = 0; first < {given}; first += {THREADS}) {{
        const u32 mine = first + threadIdx.x;
        const int id = mine < {given} ? ids[mine] : -1;
        if (mine < {given} && (id < 0 || id >= {count})) {BAD_ID};
        const u32 votes = __ballot_sync(0xffffffffu, mine < {given} && id == (int)row);
        if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = votes;
        __syncthreads();
        for (u32 word = 0; word < {words}; word++) {{
            for (u32 left = found[word]; left != 0; left &= left - 1) {{
                const u64 at = (u64)(first + word * 32 + __ffs(left) - 1) * {width};
                for (int k = 0; k < 4; k++) {{
                    const u32 col = (blockIdx.y * 4 + k) * {THREADS} + threadIdx.x;
                    if (col < {width}) sum[k] += widen(p[at + col]);
                }}
            }}
        }}
        __syncthreads();
    }}
    for (int k = 0; k < 4; k++) {{
        const u32 col = (blockIdx.y * 4 + k) * {THREADS} + threadIdx.x;
        if (col < {width}) narrow(sum[k], q[(u64)row * {width} + col]);
    }}
",
        words = THREADS / 32,
    );
    parameters.draft(THREADS as u32, [count as u32, tiles as u32, 1], &text)
}

/// Replaces rows of a table; of equal ids the last one's row stays. A block for each given row.
pub fn scatter(ids: &Source, rows: &Source, to: Target, shape: &[usize]) -> Draft {
    let (count, width) = (shape[0], shape[1..].iter().product::<usize>());
    let given = ids.elements();
    let mut parameters = Parameters::default();
    ids.parameter(&mut parameters, "ids");
    rows.parameter(&mut parameters, "p");
    parameters.write("q", to.element, to.at, count * width, to.node, Access::Update);
    bad_id(&mut parameters);
    let text = format!(
        "    const int id = ids[blockIdx.x];
    if (id < 0 || id >= {count}) {{
        if (threadIdx.x == 0) {BAD_ID};
        return;
    }}
    bool later = false;
    for (u32 i = blockIdx.x + 1 + threadIdx.x; i < {given}; i += {THREADS}) later = later || ids[i] == id;
    if (__syncthreads_or(later)) return;
    for (u32 col = threadIdx.x; col < {width}; col += {THREADS})
        narrow(widen(p[(u64)blockIdx.x * {width} + col]), q[(u64)id * {width} + col]);
"
    );
    parameters.draft(THREADS as u32, [given as u32, 1, 1], &text)
}

/// Sizes of a pooling: `[batch, height, width, channels]` before and after.
pub struct Pooling<'a> {
    pub pool: &'a Pool,
    pub input: &'a [usize],
    pub output: &'a [usize],
}

impl Pooling<'_> {
    /// Statements that name the coordinates of element `i` of a tensor of this shape.
    fn coordinates(shape: &[usize]) -> String {
        let [_, h, w, c] = [shape[0], shape[1], shape[2], shape[3]];
        format!(
            "        const int c = i % {c}, x = i / {c} % {w}, y = i / {} % {h};\n        const u64 n = i / {};\n",
            c * w,
            c * w * h
        )
    }

    fn constants(&self) -> String {
        let p = self.pool;
        format!(
            "    const int H = {}, W = {}, C = {}, OH = {}, OW = {}, KH = {}, KW = {}, SH = {}, SW = {}, PH = {}, PW = {};\n",
            self.input[1],
            self.input[2],
            self.input[3],
            self.output[1],
            self.output[2],
            p.kernel[0],
            p.kernel[1],
            p.stride[0],
            p.stride[1],
            p.padding[0],
            p.padding[1]
        )
    }

    pub fn max(&self, x: &Source, to: Target) -> Draft {
        let body = format!(
            "{}        float best = Max::zero();
        for (int dy = 0; dy < KH; dy++)
            for (int dx = 0; dx < KW; dx++) {{
                const int iy = y * SH - PH + dy, ix = x * SW - PW + dx;
                if (iy >= 0 && iy < H && ix >= 0 && ix < W) best = larger(best, widen(p[((n * H + iy) * W + ix) * C + c]));
            }}
        narrow(best, q[i]);
",
            Self::coordinates(self.output)
        );
        self.draft(&[(x, "p")], to, self.output, &body)
    }

    /// Each input asks the windows that it lies in for their first maximum.
    pub fn max_grad(&self, x: &Source, grad: &Source, to: Target) -> Draft {
        let body = format!(
            "{}        float sum = 0.0f;
        const int y0 = y + PH < KH ? 0 : (y + PH - KH) / SH + 1, y1 = (y + PH) / SH < OH - 1 ? (y + PH) / SH : OH - 1;
        const int x0 = x + PW < KW ? 0 : (x + PW - KW) / SW + 1, x1 = (x + PW) / SW < OW - 1 ? (x + PW) / SW : OW - 1;
        for (int oy = y0; oy <= y1; oy++)
            for (int ox = x0; ox <= x1; ox++) {{
                float best = Max::zero();
                int by = -1, bx = -1;
                for (int dy = 0; dy < KH; dy++)
                    for (int dx = 0; dx < KW; dx++) {{
                        const int iy = oy * SH - PH + dy, ix = ox * SW - PW + dx;
                        if (iy < 0 || iy >= H || ix < 0 || ix >= W) continue;
                        const float v = widen(p[((n * H + iy) * W + ix) * C + c]);
                        if (by < 0 || v > best || (v != v && best == best)) {{
                            best = v;
                            by = iy;
                            bx = ix;
                        }}
                    }}
                if (by == y && bx == x) sum += widen(g[((n * OH + oy) * OW + ox) * C + c]);
            }}
        narrow(sum, q[i]);
",
            Self::coordinates(self.input)
        );
        self.draft(&[(x, "p"), (grad, "g")], to, self.input, &body)
    }

    /// What an average at (oy, ox) divides by.
    fn divisor(&self) -> &'static str {
        match self.pool.count_include_pad {
            true => {
                "((oy * SH + KH < H + 2 * PH ? KH : H + 2 * PH - oy * SH) * (ox * SW + KW < W + 2 * PW ? KW : W + 2 * PW - ox * SW))"
            }
            false => {
                "(((oy * SH - PH + KH < H ? oy * SH - PH + KH : H) - (oy * SH > PH ? oy * SH - PH : 0)) * ((ox * SW - PW + KW < W ? ox * SW - PW + KW : W) - (ox * SW > PW ? ox * SW - PW : 0)))"
            }
        }
    }

    pub fn average(&self, x: &Source, to: Target) -> Draft {
        let body = format!(
            "{}        float sum = 0.0f;
        const int oy = y, ox = x;
        for (int dy = 0; dy < KH; dy++)
            for (int dx = 0; dx < KW; dx++) {{
                const int iy = y * SH - PH + dy, ix = x * SW - PW + dx;
                if (iy >= 0 && iy < H && ix >= 0 && ix < W) sum += widen(p[((n * H + iy) * W + ix) * C + c]);
            }}
        narrow(sum / (float){}, q[i]);
",
            Self::coordinates(self.output),
            self.divisor()
        );
        self.draft(&[(x, "p")], to, self.output, &body)
    }

    pub fn average_grad(&self, grad: &Source, to: Target) -> Draft {
        let body = format!(
            "{}        float sum = 0.0f;
        const int y0 = y + PH < KH ? 0 : (y + PH - KH) / SH + 1, y1 = (y + PH) / SH < OH - 1 ? (y + PH) / SH : OH - 1;
        const int x0 = x + PW < KW ? 0 : (x + PW - KW) / SW + 1, x1 = (x + PW) / SW < OW - 1 ? (x + PW) / SW : OW - 1;
        for (int oy = y0; oy <= y1; oy++)
            for (int ox = x0; ox <= x1; ox++)
                sum += widen(g[((n * OH + oy) * OW + ox) * C + c]) / (float){};
        narrow(sum, q[i]);
",
            Self::coordinates(self.input),
            self.divisor()
        );
        self.draft(&[(grad, "g")], to, self.input, &body)
    }

    fn draft(&self, sources: &[(&Source, &str)], to: Target, shape: &[usize], body: &str) -> Draft {
        let count: usize = shape.iter().product();
        let mut parameters = Parameters::default();
        sources.iter().for_each(|(source, name)| source.parameter(&mut parameters, name));
        parameters.write("q", to.element, to.at, count, to.node, Access::Write);
        let (text, grid) = each(count, body);
        parameters.draft(THREADS as u32, grid, &(self.constants() + &text))
    }
}

/// Normalises images: pixels `[n, height, width, 3]` become planes `[n, 3, height, width]`, each byte by its channel's table
/// of 256 values.
pub fn normalize(pixels: Address, levels: Address, to: Target, shape: [usize; 4]) -> Draft {
    let [n, channels, height, width] = shape;
    let (plane, count) = (height * width, n * channels * height * width);
    let mut parameters = Parameters::default();
    parameters.raw("const u8 *p", pixels, count, Access::Read, 1);
    parameters.raw("const float *levels", levels, channels * 256 * 4, Access::Read, 4);
    parameters.write("q", to.element, to.at, count, to.node, Access::Write);
    let body = format!(
        "        const u32 c = i / {plane} % {channels};
        const u64 at = ((u64)(i / {image}) * {plane} + i % {plane}) * {channels} + c;
        narrow(levels[c * 256 + p[at]], q[i]);
",
        image = channels * plane
    );
    let (text, grid) = each(count, &body);
    parameters.draft(THREADS as u32, grid, &text)
}

/// Columns of a block of batch statistics, and its rows of threads.
const COLUMNS: usize = 32;
/// Blocks along the rows at most.
const CHUNKS: usize = 512;

/// Mean and population variance of each column: each thread sums the differences from the first row of its chunk and
/// their squares; chunks are combined in their order, in double precision, after Chan, Golub and LeVeque (1979).
pub fn moments(x: &Source, rows: usize, cols: usize, to: Target) -> Vec<Draft> {
    let groups = THREADS / COLUMNS;
    let tiles = cols.div_ceil(COLUMNS);
    let chunks = (4 * CHUNKS).div_ceil(tiles).clamp(1, CHUNKS).min(rows.div_ceil(4 * groups)).max(1);
    let chunk = rows.div_ceil(chunks);
    let chunks = rows.div_ceil(chunk);
    let partials = Address { block: Block::Scratch, offset: 0 };
    let bytes = chunks * cols * 3 * 4;

    let mut parameters = Parameters::default();
    x.parameter(&mut parameters, "p");
    parameters.raw("float *w", partials, bytes, Access::Write, 4);
    let text = format!(
        "    __shared__ float sums[{groups}][{COLUMNS}], squares[{groups}][{COLUMNS}];
    const u32 lane = threadIdx.x % {COLUMNS}, group = threadIdx.x / {COLUMNS};
    const u32 col = blockIdx.y * {COLUMNS} + lane;
    const u64 first = (u64)blockIdx.x * {chunk};
    const u64 end = first + {chunk} < {rows} ? first + {chunk} : {rows};
    float sum = 0.0f, square = 0.0f, pivot = 0.0f;
    if (col < {cols}) {{
        pivot = widen(p[first * {cols} + col]);
        for (u64 row = first + group; row < end; row += {groups}) {{
            const float d = widen(p[row * {cols} + col]) - pivot;
            sum += d;
            square += d * d;
        }}
    }}
    sums[group][lane] = sum;
    squares[group][lane] = square;
    __syncthreads();
    if (group == 0 && col < {cols}) {{
        for (int g = 1; g < {groups}; g++) {{
            sum += sums[g][lane];
            square += squares[g][lane];
        }}
        float *to = w + (u64)blockIdx.x * {three} + col;
        to[0] = pivot;
        to[{cols}] = sum;
        to[{two}] = square;
    }}
",
        two = 2 * cols,
        three = 3 * cols,
    );
    let first = parameters.draft(THREADS as u32, [chunks as u32, tiles as u32, 1], &text);

    let mut parameters = Parameters::default();
    parameters.raw("const float *w", partials, bytes, Access::Read, 4);
    parameters.write("q", to.element, to.at, 2 * cols, to.node, Access::Write);
    let text = format!(
        "    const u32 col = blockIdx.x * {COLUMNS} + threadIdx.x;
    if (col >= {cols}) return;
    double count = 0.0, mean = 0.0, square = 0.0;
    for (u32 i = 0; i < {chunks}; i++) {{
        const float *from = w + (u64)i * {three} + col;
        const double n = i + 1 < {chunks} ? {chunk} : {last};
        const double sum = from[{cols}], here = from[0] + sum / n;
        const double delta = here - mean, all = count + n;
        square += from[{two}] - sum * sum / n + delta * delta * count * n / all;
        mean += delta * n / all;
        count = all;
    }}
    narrow((float)mean, q[col]);
    narrow((float)(square > 0.0 ? square / count : 0.0), q[{cols} + col]);
",
        two = 2 * cols,
        three = 3 * cols,
        last = rows - (chunks - 1) * chunk,
    );
    let second = parameters.draft(COLUMNS as u32, [tiles as u32, 1, 1], &text);
    vec![first, second]
}
