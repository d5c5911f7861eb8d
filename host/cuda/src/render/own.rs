//! Kernels with a text of their own: copies, padding, tables, images.

use super::text::{Draft, Parameters, blocks, dot, index_type};
use crate::launch::{Access, Address, Block, control};
use clip_host_compiler::kernel::{Element, Operand};
use clip_host_plugin_api::ir::NodeId;

pub(super) const THREADS: usize = 256;
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
pub(super) fn each(count: usize, body: &str) -> (String, [u32; 3]) {
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
                    terms.push(format!("(u64)({at} - {}) * {}", before[d], from_strides[d]));
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
            let start = if start == 0 { String::new() } else { format!("(u64){start} + ") };
            match from.element == to.element {
                // As it is: an id does not go through a float.
                true => format!("        q[{start}{into}] = p[{at}];\n"),
                false => format!("        narrow(widen(p[{at}]), q[{start}{into}]);\n"),
            }
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
    parameters.draft(THREADS as u32, [blocks(count), blocks(tiles), 1], &text)
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
    parameters.draft(THREADS as u32, [blocks(given), 1, 1], &text)
}

/// Writes scalars one after the other.
pub fn collect(scalars: &[(Address, Element)], to: Address) -> Draft {
    let mut parameters = Parameters::default();
    let mut text = String::from("    if (threadIdx.x != 0) return;\n");
    for (i, &(at, element)) in scalars.iter().enumerate() {
        parameters.read(&format!("p{i}"), element, at, 1, None);
        text += &format!("    q[{i}] = widen(p{i}[0]);\n");
    }
    parameters.raw("float *q", to, 4 * scalars.len(), Access::Write, 4);
    parameters.draft(32, [1, 1, 1], &text)
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
