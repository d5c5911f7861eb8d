//! The reference interpreter: every op in f64, one plain loop each. Slow and simple on purpose: tests and the author's
//! harness compare with it.

use crate::decompose::decompose;
use crate::graph::Graph;
use crate::ir::{Binary, Compare, Conv, Fragment, Layout, Node, NodeId, Op, Pool, Unary};
use std::collections::HashMap;
use thiserror::Error;

/// Why a fragment could not be evaluated.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum InterpretError {
    #[error("no value was given for `{0}`")]
    Missing(String),
    #[error("`{name}` has {expected} elements, {got} were given")]
    Size { name: String, expected: usize, got: usize },
    #[error("id {id} is outside the table of {rows} rows")]
    Id { id: f64, rows: usize },
}

/// Evaluates all nodes. `values` holds the named leaves (inputs, params, states); `seed` drives [`Op::Random`].
pub fn interpret(
    fragment: &Fragment,
    values: &HashMap<String, Vec<f64>>,
    seed: u64,
) -> Result<Vec<Vec<f64>>, InterpretError> {
    let mut projected: HashMap<NodeId, Vec<f64>> = HashMap::new();
    if !fragment.projections.is_empty() {
        let raw = evaluate(fragment, values, seed, &projected)?;
        projected = fragment.projections.iter().map(|&(p, v)| (p, raw[v as usize].clone())).collect();
    }
    evaluate(fragment, values, seed, &projected)
}

fn evaluate(
    fragment: &Fragment,
    values: &HashMap<String, Vec<f64>>,
    seed: u64,
    projected: &HashMap<NodeId, Vec<f64>>,
) -> Result<Vec<Vec<f64>>, InterpretError> {
    let mut results: Vec<Vec<f64>> = Vec::with_capacity(fragment.nodes.len());
    for (id, node) in fragment.nodes.iter().enumerate() {
        let result = match (&node.op, projected.get(&(id as NodeId))) {
            (_, Some(value)) => value.clone(),
            (Op::Input { name } | Op::Param { name, .. } | Op::State { name, .. }, _) => {
                let value = values.get(name).ok_or_else(|| InterpretError::Missing(name.clone()))?;
                if value.len() != node.elements() {
                    let (expected, got) = (node.elements(), value.len());
                    return Err(InterpretError::Size { name: name.clone(), expected, got });
                }
                value.clone()
            }
            (op, _) if op.is_composite() || op.is_internal() => composite(fragment, node, &results)?,
            (Op::Random { stream }, _) => (0..node.elements()).map(|i| uniform(seed, *stream, i as u64)).collect(),
            _ => {
                let inputs: Vec<(&[f64], &[usize])> = node
                    .inputs
                    .iter()
                    .map(|&i| (results[i as usize].as_slice(), fragment.nodes[i as usize].shape.as_slice()))
                    .collect();
                primitive(node, &inputs)?
            }
        };
        results.push(result);
    }
    Ok(results)
}

/// The number that [`Op::Random`] has at an element: the top 24 bits of its [`word`], as a fraction.
pub fn uniform(seed: u64, stream: u32, index: u64) -> f64 {
    (word(seed, stream, index) >> 40) as f64 / (1u64 << 24) as f64
}

/// The 64 random bits of an element: SplitMix64 over (seed, stream, index).
#[inline(always)]
pub fn word(seed: u64, stream: u32, index: u64) -> u64 {
    let key = mix(seed ^ mix(u64::from(stream).wrapping_add(0x9e37_79b9_7f4a_7c15)));
    mix(key ^ index.wrapping_mul(0xd134_2543_de82_ef95))
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
#[inline]
pub fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn composite(fragment: &Fragment, node: &Node, results: &[Vec<f64>]) -> Result<Vec<f64>, InterpretError> {
    let graph = Graph::new();
    let mut values = HashMap::new();
    let mut inputs = Vec::new();
    for (position, &id) in node.inputs.iter().enumerate() {
        let source = &fragment.nodes[id as usize];
        let name = position.to_string();
        inputs.push(graph.input(&name, &source.shape, source.dtype));
        values.insert(name, results[id as usize].clone());
    }
    let output = decompose(&node.op, &inputs).map(|t| t.id()).unwrap_or_default();
    let fragment = graph.into_fragment();
    let mut all = evaluate(&fragment, &values, 0, &HashMap::new())?;
    Ok(all.swap_remove(output as usize))
}

/// Row-major strides.
pub fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d];
    }
    strides
}

/// Calls `f` with every index of a shape in row-major order.
fn each_index(shape: &[usize], mut f: impl FnMut(&[usize])) {
    let mut index = vec![0; shape.len()];
    for _ in 0..shape.iter().product() {
        f(&index);
        for d in (0..shape.len()).rev() {
            index[d] += 1;
            if index[d] < shape[d] {
                break;
            }
            index[d] = 0;
        }
    }
}

/// Reads `x` at an index per output element.
fn remap(out: &[usize], x: &[f64], in_shape: &[usize], map: impl Fn(&[usize], usize) -> usize) -> Vec<f64> {
    let strides = strides(in_shape);
    let mut result = Vec::with_capacity(out.iter().product());
    each_index(out, |index| {
        let offset: usize = strides.iter().enumerate().map(|(d, s)| s * map(index, d)).sum();
        result.push(x[offset]);
    });
    result
}

fn primitive(node: &Node, inputs: &[(&[f64], &[usize])]) -> Result<Vec<f64>, InterpretError> {
    let x = inputs.first().map(|i| i.0).unwrap_or(&[]);
    let in_shape = inputs.first().map(|i| i.1).unwrap_or(&[]);
    let out = node.shape.as_slice();
    Ok(match &node.op {
        Op::Constant { value } => vec![*value; node.elements()],
        Op::Literal { values } => values.clone(),
        Op::Iota { axis } => {
            let mut result = Vec::new();
            each_index(out, |index| result.push(index[*axis] as f64));
            result
        }
        Op::Unary(op) => x.iter().map(|&v| unary(*op, v)).collect(),
        Op::Binary(op) => x.iter().zip(inputs[1].0).map(|(&a, &b)| binary(*op, a, b)).collect(),
        Op::Compare(op) => x
            .iter()
            .zip(inputs[1].0)
            .map(|(a, b)| match op {
                Compare::Lt => a < b,
                Compare::Le => a <= b,
                Compare::Eq => a == b,
            })
            .map(|hit| f64::from(u8::from(hit)))
            .collect(),
        Op::Select => {
            let (a, b) = (inputs[1].0, inputs[2].0);
            x.iter().enumerate().map(|(i, &c)| if c != 0.0 { a[i] } else { b[i] }).collect()
        }
        Op::Sum { .. } => reduce(out, x, in_shape, 0.0, |a, b| a + b),
        Op::Max { .. } => reduce(out, x, in_shape, f64::NEG_INFINITY, f64::max),
        Op::Reshape | Op::Detach | Op::Cast => x.to_vec(),
        Op::Permute { axes } => {
            remap(out, x, in_shape, |index, d| axes.iter().position(|&a| a == d).map_or(0, |position| index[position]))
        }
        Op::Broadcast => remap(out, x, in_shape, |index, d| if in_shape[d] == 1 { 0 } else { index[d] }),
        Op::Slice { starts, .. } => remap(out, x, in_shape, |index, d| index[d] + starts[d]),
        Op::Pad { before, value, .. } => {
            let mut result = vec![*value; node.elements()];
            let to = strides(out);
            let mut next = x.iter();
            each_index(in_shape, |index| {
                let offset: usize = (0..index.len()).map(|d| (index[d] + before[d]) * to[d]).sum();
                if let Some(&v) = next.next() {
                    result[offset] = v;
                }
            });
            result
        }
        Op::Concat { axis } => {
            let outer: usize = out[..*axis].iter().product();
            let mut result = Vec::with_capacity(node.elements());
            for row in 0..outer {
                for (part, shape) in inputs {
                    let length: usize = shape[*axis..].iter().product();
                    result.extend_from_slice(&part[row * length..(row + 1) * length]);
                }
            }
            result
        }
        Op::Matmul => {
            let (b, b_shape) = inputs[1];
            let rank = in_shape.len();
            let (m, k, n) = (in_shape[rank - 2], in_shape[rank - 1], b_shape[rank - 1]);
            let mut result = vec![0.0; node.elements()];
            for (index, value) in result.iter_mut().enumerate() {
                let (batch, i, j) = (index / (m * n), index / n % m, index % n);
                *value = (0..k).map(|l| x[(batch * m + i) * k + l] * b[(batch * k + l) * n + j]).sum();
            }
            result
        }
        Op::Conv2d(conv) => {
            let (weight, w_shape) = inputs[1];
            let mut y = vec![0.0; node.elements()];
            each_tap(conv, in_shape, w_shape, out, |yi, xi, wi| y[yi] += x[xi] * weight[wi]);
            y
        }
        Op::Conv2dInputGrad(conv) => {
            let (weight, w_shape) = inputs[1];
            let mut dx = vec![0.0; node.elements()];
            each_tap(conv, out, w_shape, in_shape, |yi, xi, wi| dx[xi] += x[yi] * weight[wi]);
            dx
        }
        Op::Conv2dWeightGrad(conv) => {
            let (grad, g_shape) = inputs[1];
            let mut dw = vec![0.0; node.elements()];
            each_tap(conv, in_shape, out, g_shape, |yi, xi, wi| dw[wi] += x[xi] * grad[yi]);
            dw
        }
        Op::MaxPool2d(pool) => {
            let mut y = vec![f64::NEG_INFINITY; node.elements()];
            each_window(pool, in_shape, out, |yi, xi| y[yi] = y[yi].max(x[xi]));
            y
        }
        Op::MaxPool2dGrad(pool) => {
            let (grad, g_shape) = inputs[1];
            let mut best: Vec<Option<usize>> = vec![None; grad.len()];
            each_window(pool, in_shape, g_shape, |yi, xi| {
                if best[yi].is_none_or(|b| x[xi] > x[b]) {
                    best[yi] = Some(xi);
                }
            });
            let mut dx = vec![0.0; node.elements()];
            for (yi, xi) in best.into_iter().enumerate() {
                if let Some(xi) = xi {
                    dx[xi] += grad[yi];
                }
            }
            dx
        }
        Op::AvgPool2d(pool) => {
            let divisors = pool_divisors(pool, in_shape, out);
            let mut y = vec![0.0; node.elements()];
            each_window(pool, in_shape, out, |yi, xi| y[yi] += x[xi] / divisors[yi]);
            y
        }
        Op::AvgPool2dGrad(pool) => {
            let divisors = pool_divisors(pool, out, in_shape);
            let mut dx = vec![0.0; node.elements()];
            each_window(pool, out, in_shape, |yi, xi| dx[xi] += x[yi] / divisors[yi]);
            dx
        }
        Op::Gather => {
            let (rows, width) = (in_shape[0], in_shape[1..].iter().product::<usize>());
            let mut result = Vec::with_capacity(node.elements());
            for &id in inputs[1].0 {
                let row = row_of(id, rows)?;
                result.extend_from_slice(&x[row * width..(row + 1) * width]);
            }
            result
        }
        Op::ScatterAdd => {
            let (rows, width) = (out[0], out[1..].iter().product::<usize>());
            let mut result = vec![0.0; node.elements()];
            for (position, &id) in x.iter().enumerate() {
                let row = row_of(id, rows)?;
                for c in 0..width {
                    result[row * width + c] += inputs[1].0[position * width + c];
                }
            }
            result
        }
        Op::Scatter => {
            let (rows, width) = (out[0], out[1..].iter().product::<usize>());
            let mut result = x.to_vec();
            for (position, &id) in inputs[1].0.iter().enumerate() {
                let row = row_of(id, rows)?;
                let from = &inputs[2].0[position * width..(position + 1) * width];
                result[row * width..(row + 1) * width].copy_from_slice(from);
            }
            result
        }
        // Leaves and composites are handled by the caller.
        _ => Vec::new(),
    })
}

fn row_of(id: f64, rows: usize) -> Result<usize, InterpretError> {
    if id < 0.0 || id >= rows as f64 { Err(InterpretError::Id { id, rows }) } else { Ok(id as usize) }
}

fn unary(op: Unary, v: f64) -> f64 {
    match op {
        Unary::Neg => -v,
        Unary::Exp => v.exp(),
        Unary::Ln => v.ln(),
        Unary::Sqrt => v.sqrt(),
        Unary::Recip => 1.0 / v,
        Unary::Tanh => v.tanh(),
        Unary::Erf => erf(v),
        Unary::Sin => v.sin(),
        Unary::Cos => v.cos(),
        Unary::Abs => v.abs(),
    }
}

fn binary(op: Binary, a: f64, b: f64) -> f64 {
    match op {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        Binary::Maximum => a.max(b),
        Binary::Minimum => a.min(b),
        Binary::Pow => a.powf(b),
    }
}

/// The error function to about 1e-15: its Taylor series near 0, a continued fraction of erfc beyond.
pub fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a < 2.5 {
        let (mut term, mut sum, mut n) = (x, x, 0.0);
        while term.abs() > 1e-17 * sum.abs() {
            n += 1.0;
            term *= -x * x / n;
            sum += term / (2.0 * n + 1.0);
            if n > 200.0 {
                break;
            }
        }
        return sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    if a > 6.5 {
        return x.signum();
    }
    let mut fraction = 0.0;
    for k in (1..=120).rev() {
        fraction = k as f64 / 2.0 / (a + fraction);
    }
    let erfc = (-a * a).exp() / (a + fraction) * (0.5 * std::f64::consts::FRAC_2_SQRT_PI);
    x.signum() * (1.0 - erfc)
}

fn reduce(out: &[usize], x: &[f64], in_shape: &[usize], start: f64, f: impl Fn(f64, f64) -> f64) -> Vec<f64> {
    let to = strides(out);
    let mut result = vec![start; out.iter().product()];
    let mut next = x.iter();
    each_index(in_shape, |index| {
        let offset: usize = (0..index.len()).filter(|&d| out[d] != 1).map(|d| index[d] * to[d]).sum();
        if let Some(&v) = next.next() {
            result[offset] = f(result[offset], v);
        }
    });
    result
}

fn offset(layout: Layout, shape: &[usize], n: usize, c: usize, h: usize, w: usize) -> usize {
    let index = layout.shape(n, c, h, w);
    index.iter().zip(strides(shape)).map(|(i, s)| i * s).sum()
}

/// Calls `f(y, x, weight)` with the offsets of every multiplication of a convolution.
fn each_tap(conv: &Conv, x: &[usize], w: &[usize], y: &[usize], mut f: impl FnMut(usize, usize, usize)) {
    let [_, _, in_h, in_w] = conv.layout.axes().map(|a| x[a]);
    let [n, out_c, out_h, out_w] = conv.layout.axes().map(|a| y[a]);
    let per_group = out_c / conv.groups;
    each_index(&[n, out_c, out_h, out_w, w[1], w[2] * w[3]], |i| {
        let (ky, kx) = (i[5] / w[3], i[5] % w[3]);
        let py = i[2] * conv.stride[0] + ky * conv.dilation[0];
        let px = i[3] * conv.stride[1] + kx * conv.dilation[1];
        let (Some(iy), Some(ix)) = (py.checked_sub(conv.padding[0]), px.checked_sub(conv.padding[1])) else { return };
        if iy >= in_h || ix >= in_w {
            return;
        }
        let channel = i[1] / per_group * w[1] + i[4];
        f(
            offset(conv.layout, y, i[0], i[1], i[2], i[3]),
            offset(conv.layout, x, i[0], channel, iy, ix),
            ((i[1] * w[1] + i[4]) * w[2] + ky) * w[3] + kx,
        );
    });
}

/// Calls `f(y, x)` with the offsets of every element of every pooling window, windows in row-major order.
fn each_window(pool: &Pool, x: &[usize], y: &[usize], mut f: impl FnMut(usize, usize)) {
    let [_, _, in_h, in_w] = pool.layout.axes().map(|a| x[a]);
    let [n, c, out_h, out_w] = pool.layout.axes().map(|a| y[a]);
    each_index(&[n, c, out_h, out_w, pool.kernel[0], pool.kernel[1]], |i| {
        let (py, px) = (i[2] * pool.stride[0] + i[4], i[3] * pool.stride[1] + i[5]);
        let (Some(iy), Some(ix)) = (py.checked_sub(pool.padding[0]), px.checked_sub(pool.padding[1])) else { return };
        if iy < in_h && ix < in_w {
            f(offset(pool.layout, y, i[0], i[1], i[2], i[3]), offset(pool.layout, x, i[0], i[1], iy, ix));
        }
    });
}

fn pool_divisors(pool: &Pool, x: &[usize], y: &[usize]) -> Vec<f64> {
    let mut counts = vec![0.0; y.iter().product()];
    each_window(pool, x, y, |yi, _| counts[yi] += 1.0);
    if pool.count_include_pad {
        counts.fill((pool.kernel[0] * pool.kernel[1]) as f64);
    }
    counts
}
