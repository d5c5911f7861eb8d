//! Products and convolutions as one tiled kernel: a block computes 64 × 64 results, its threads 4 × 4 each, from operands that
//! it brings to shared memory 16 terms at a time. Operands are widened to f32 and terms are added in f32, in an order that
//! depends on the shape alone. This form takes any strides, groups and element types; the vendor's libraries take over what
//! they know.

use super::own::{Source, Target};
use super::text::{self, Draft, Parameters, dot};
use crate::launch::{Access, Address, Block};
use clip_host_plugin_api::ir::Conv;

const TILE: usize = 64;
const DEPTH: usize = 16;
const THREADS: usize = 256;
/// Blocks that a product should have at least, if its terms can be divided.
const BLOCKS: usize = 512;
/// Terms of a part at least.
const PART: usize = 1024;

/// A product `[m, k] × [k, n]` for each of `batch`, and where its elements are.
struct Product {
    m: usize,
    n: usize,
    k: usize,
    batch: usize,
    /// Statements that leave the element's value in `v`; they see `m` or `n`, `k` and `z`, the number in the batch.
    left: String,
    right: String,
    /// Whether neighbouring threads should walk along `k` when they bring an operand.
    left_along_k: bool,
    right_along_k: bool,
    /// The element of the result at (`m`, `n`, `z`).
    result: String,
}

impl Product {
    /// The launches: of the product, and if its terms are divided, of the sum of the parts.
    fn drafts(self, mut parameters: Parameters, to: Target, elements: usize) -> Vec<Draft> {
        let Product { m, n, k, batch, left, right, left_along_k, right_along_k, result } = self;
        let (tiles_m, tiles_n) = (m.div_ceil(TILE), n.div_ceil(TILE));
        let blocks = tiles_m * tiles_n * batch;
        let parts = BLOCKS.div_ceil(blocks).min(k.div_ceil(PART)).max(1);
        let part = k.div_ceil(parts).next_multiple_of(DEPTH);
        let parts = k.div_ceil(part);
        let partials = Address { block: Block::Scratch, offset: 0 };
        let write = match parts {
            1 => {
                parameters.write("q", to.element, to.at, elements, to.node, Access::Write);
                format!("narrow(sum[i][j], q[{result}]);")
            }
            _ => {
                parameters.raw("float *w", partials, parts * elements * 4, Access::Write, 4);
                format!("w[(u64)part * {elements} + ({result})] = sum[i][j];")
            }
        };
        // Which of a pair of coordinates neighbouring threads differ in.
        let walk = |along_k: bool, wide: &str| match along_k {
            true => format!("const int {wide} = at / {DEPTH}, kk = at % {DEPTH};"),
            false => format!("const int {wide} = at % {TILE}, kk = at / {TILE};"),
        };
        let text = format!(
            "    __shared__ float a[{DEPTH}][{TILE} + 4], b[{DEPTH}][{TILE} + 4];
    const u32 tile = blockIdx.x;
    const u32 part = blockIdx.y;
    const u32 z = tile / {per_batch};
    const u32 m0 = tile % {per_batch} / {tiles_n} * {TILE}, n0 = tile % {tiles_n} * {TILE};
    const u32 first = part * {part}, last = first + {part} < {k} ? first + {part} : {k};
    const int row = threadIdx.x / 16 * 4, col = threadIdx.x % 16 * 4;
    float sum[4][4] = {{}};
    for (u32 k0 = first; k0 < last; k0 += {DEPTH}) {{
        for (int at = threadIdx.x; at < {TILE} * {DEPTH}; at += {THREADS}) {{
            {walk_a}
            const u32 m = m0 + mm, k = k0 + kk;
            float v = 0.0f;
            if (m < {m} && k < last) {{ {left} }}
            a[kk][mm] = v;
        }}
        for (int at = threadIdx.x; at < {TILE} * {DEPTH}; at += {THREADS}) {{
            {walk_b}
            const u32 n = n0 + nn, k = k0 + kk;
            float v = 0.0f;
            if (n < {n} && k < last) {{ {right} }}
            b[kk][nn] = v;
        }}
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < {DEPTH}; kk++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] += a[kk][row + i] * b[kk][col + j];
        __syncthreads();
    }}
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {{
            const u64 m = m0 + row + i, n = n0 + col + j;
            if (m < {m} && n < {n}) {write}
        }}
",
            per_batch = tiles_m * tiles_n,
            walk_a = walk(left_along_k, "mm"),
            walk_b = walk(right_along_k, "nn"),
        );
        let grid = [text::blocks(blocks), text::blocks(parts), 1];
        let mut drafts = vec![parameters.draft(THREADS as u32, grid, &text)];
        if parts > 1 {
            drafts.push(sum_of_parts(partials, parts, elements, to));
        }
        drafts
    }
}

/// Adds parts in their order.
fn sum_of_parts(partials: Address, parts: usize, elements: usize, to: Target) -> Draft {
    let mut parameters = Parameters::default();
    parameters.raw("const float *w", partials, parts * elements * 4, Access::Read, 4);
    parameters.write("q", to.element, to.at, elements, to.node, Access::Write);
    let text = format!(
        "    const u64 i = (u64)blockIdx.x * {THREADS} + threadIdx.x;
    if (i >= {elements}) return;
    float v = 0.0f;
    for (u32 part = 0; part < {parts}; part++) v += w[(u64)part * {elements} + i];
    narrow(v, q[i]);
"
    );
    parameters.draft(THREADS as u32, [text::blocks(elements.div_ceil(THREADS)), 1, 1], &text)
}

/// A batched product over strided operands.
pub fn matmul(a: &Source, b: &Source, to: Target) -> Vec<Draft> {
    let rank = a.view.dims.len();
    let (lead, [rows, terms]) = (&a.view.dims[..rank - 2], [a.view.dims[rank - 2], a.view.dims[rank - 1]]);
    let [inner, cols] = [b.view.dims[rank - 2], b.view.dims[rank - 1]];
    let sizes: Vec<usize> = lead.iter().map(|d| d.0).collect();
    let batch: usize = sizes.iter().product();
    let of = |view: &[(usize, usize)]| {
        let strides: Vec<usize> = view[..rank - 2].iter().map(|d| d.1).collect();
        dot("z", &sizes, &strides)
    };
    let (m, n) = (rows.0, cols.0);
    let mut parameters = Parameters::default();
    a.parameter(&mut parameters, "p");
    b.parameter(&mut parameters, "r");
    let product = Product {
        m,
        n,
        k: terms.0,
        batch,
        left: format!("v = widen(p[(u64)m * {} + (u64)k * {} + {}]);", rows.1, terms.1, of(&a.view.dims)),
        right: format!("v = widen(r[(u64)k * {} + (u64)n * {} + {}]);", inner.1, cols.1, of(&b.view.dims)),
        left_along_k: terms.1 == 1,
        right_along_k: inner.1 == 1,
        result: format!("((u64)z * {m} + m) * {n} + n"),
    };
    product.drafts(parameters, to, batch * m * n)
}

/// A convolution's sizes: `[batch, height, width, channels]` of what it reads and gives, weights `[out, in / groups, kh, kw]`.
pub struct Convolution<'a> {
    pub conv: &'a Conv,
    pub input: &'a [usize],
    pub weight: &'a [usize],
    pub output: &'a [usize],
}

impl Convolution<'_> {
    fn constants(&self) -> String {
        let (c, w) = (self.conv, self.weight);
        format!(
            "const int H = {}, W = {}, OH = {}, OW = {}, KH = {}, KW = {}; (void)H, (void)W, (void)OH, (void)OW, (void)KH; const int SH = {}, SW = {}, PH = {}, PW = {}, DH = {}, DW = {};",
            self.input[1],
            self.input[2],
            self.output[1],
            self.output[2],
            w[2],
            w[3],
            c.stride[0],
            c.stride[1],
            c.padding[0],
            c.padding[1],
            c.dilation[0],
            c.dilation[1]
        )
    }

    /// Channels before and after, in all and of a group.
    fn channels(&self) -> [usize; 4] {
        let groups = self.conv.groups;
        [self.input[3], self.output[3], self.input[3] / groups, self.output[3] / groups]
    }

    /// `y = x ∗ w`: rows are the output's points, columns its channels.
    pub fn forward(&self, x: &Source, w: &Source, to: Target) -> Vec<Draft> {
        let [in_c, out_c, in_g, out_g] = self.channels();
        let taps = self.weight[2] * self.weight[3];
        let mut parameters = Parameters::default();
        x.parameter(&mut parameters, "p");
        w.parameter(&mut parameters, "r");
        let product = Product {
            m: self.output[..3].iter().product(),
            n: out_g,
            k: taps * in_g,
            batch: self.conv.groups,
            left: format!(
                "{} const int c = k % {in_g}, tap = k / {in_g}; const int ox = m % OW, oy = m / OW % OH; const u64 image = m / (OW * OH); const int y = oy * SH - PH + tap / KW * DH, x = ox * SW - PW + tap % KW * DW; if (y >= 0 && y < H && x >= 0 && x < W) v = widen(p[((image * H + y) * W + x) * {in_c} + z * {in_g} + c]);",
                self.constants()
            ),
            right: format!(
                "const int c = k % {in_g}, tap = k / {in_g}; v = widen(r[((u64)(z * {out_g} + n) * {in_g} + c) * {taps} + tap]);"
            ),
            left_along_k: true,
            right_along_k: true,
            result: format!("m * {out_c} + z * {out_g} + n"),
        };
        product.drafts(parameters, to, self.output.iter().product())
    }

    /// The gradient of x: rows are the input's points, columns its channels.
    pub fn input_grad(&self, grad: &Source, w: &Source, to: Target) -> Vec<Draft> {
        let [in_c, out_c, in_g, out_g] = self.channels();
        let taps = self.weight[2] * self.weight[3];
        let mut parameters = Parameters::default();
        grad.parameter(&mut parameters, "p");
        w.parameter(&mut parameters, "r");
        let product = Product {
            m: self.input[..3].iter().product(),
            n: in_g,
            k: taps * out_g,
            batch: self.conv.groups,
            left: format!(
                "{} const int c = k % {out_g}, tap = k / {out_g}; const int x = m % W, y = m / W % H; const u64 image = m / (W * H); const int oy = y + PH - tap / KW * DH, ox = x + PW - tap % KW * DW; if (oy >= 0 && ox >= 0 && oy % SH == 0 && ox % SW == 0 && oy / SH < OH && ox / SW < OW) v = widen(p[((image * OH + oy / SH) * OW + ox / SW) * {out_c} + z * {out_g} + c]);",
                self.constants()
            ),
            right: format!(
                "const int c = k % {out_g}, tap = k / {out_g}; v = widen(r[((u64)(z * {out_g} + c) * {in_g} + n) * {taps} + tap]);"
            ),
            left_along_k: true,
            right_along_k: true,
            result: format!("m * {in_c} + z * {in_g} + n"),
        };
        product.drafts(parameters, to, self.input.iter().product())
    }

    /// The gradient of the weights: rows are the output's channels, columns the weights of one, terms the output's points.
    pub fn weight_grad(&self, x: &Source, grad: &Source, to: Target) -> Vec<Draft> {
        let [in_c, out_c, in_g, out_g] = self.channels();
        let taps = self.weight[2] * self.weight[3];
        let mut parameters = Parameters::default();
        x.parameter(&mut parameters, "p");
        grad.parameter(&mut parameters, "r");
        let product = Product {
            m: out_g,
            n: in_g * taps,
            k: self.output[..3].iter().product(),
            batch: self.conv.groups,
            left: format!("v = widen(r[(u64)k * {out_c} + z * {out_g} + m]);"),
            // Neighbours along n differ in the channel: the result is written through the weights' own order.
            right: format!(
                "{} const int c = n % {in_g}, tap = n / {in_g}; const int ox = k % OW, oy = k / OW % OH; const u64 image = k / (OW * OH); const int y = oy * SH - PH + tap / KW * DH, x = ox * SW - PW + tap % KW * DW; if (y >= 0 && y < H && x >= 0 && x < W) v = widen(p[((image * H + y) * W + x) * {in_c} + z * {in_g} + c]);",
                self.constants()
            ),
            left_along_k: false,
            right_along_k: false,
            result: format!("((z * {out_g} + m) * {in_g} + n % {in_g}) * {taps} + n / {in_g}"),
        };
        product.drafts(parameters, to, self.weight.iter().product())
    }
}
