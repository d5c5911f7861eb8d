//! luminal's own execution as an oracle: a program written out in luminal's primitive operators and run by its stock
//! [`Graph::execute`]. Nothing is shared with the fused plan or the reference interpreter: products are broadcasts,
//! multiplications and sums, windows are products with 0/1 selection matrices, tables are one-hot comparisons. Slow, in
//! f32, for tiny shapes; integers travel as floats.

mod window;

use crate::program::Program;
use crate::rewrite::{linearize, tracker};
use clip_host_plugin_api::decompose::decompose;
use clip_host_plugin_api::graph::{Graph as IrGraph, Tensor as IrTensor};
use clip_host_plugin_api::interpret::uniform;
use clip_host_plugin_api::ir::{Binary, Compare, Conv, Layout, Node, NodeId, Op, Pool, Unary};
use luminal::graph::{Dependency, Graph, NodeIndex};
use luminal::op::{self, ConstantValue, Function, Operator};
use luminal::prelude::Tensor;
use luminal::shape::ShapeTracker;
use std::collections::HashMap;
use thiserror::Error;
use window::Window;

/// Why a program could not be run.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum OracleError {
    #[error("no value was given for `{0}`")]
    Missing(String),
    #[error("`{name}` has {expected} elements, {got} were given")]
    Size { name: String, expected: usize, got: usize },
    #[error("luminal computed nothing for output `{0}`")]
    Lost(String),
}

/// Runs a program on luminal's primitive operators; `inputs` holds inputs, parameters and states by name. Random numbers
/// are those of seed 0.
pub fn execute(program: &Program, inputs: &HashMap<String, Vec<f32>>) -> Result<Vec<(String, Vec<f32>)>, OracleError> {
    let mut primitives = lower(program, inputs)?;
    primitives.graph.no_delete.extend(primitives.outputs.iter().map(|o| o.1));
    primitives.graph.execute();
    primitives.results()
}

/// A program in luminal's primitive operators, with what it is given in it.
pub(crate) struct Primitives {
    /// In a place of its own: its constants point into it.
    pub graph: Box<Graph>,
    /// The program's outputs by name.
    pub outputs: Vec<(String, NodeIndex)>,
}

impl Primitives {
    /// The outputs' numbers after a run.
    pub fn results(&self) -> Result<Vec<(String, Vec<f32>)>, OracleError> {
        let read = |(name, id): &(String, NodeIndex)| {
            let tensor = self.graph.get_tensor_ref(*id, 0);
            let data = tensor.and_then(|t| t.data.as_any().downcast_ref::<Vec<f32>>());
            data.map(|d| (name.clone(), d.clone())).ok_or_else(|| OracleError::Lost(name.clone()))
        };
        self.outputs.iter().map(read).collect()
    }
}

/// Writes a program out in luminal's primitive operators.
pub(crate) fn lower(program: &Program, inputs: &HashMap<String, Vec<f32>>) -> Result<Primitives, OracleError> {
    let linear = linearize(&program.graph, &program.roots());
    let mut oracle = Oracle { graph: Box::default(), inputs };
    let mut values: Vec<Value> = Vec::with_capacity(linear.nodes.len());
    for node in &linear.nodes {
        let operands = node.inputs.iter().map(|&i| values[i as usize].clone()).collect::<Vec<_>>();
        values.push(oracle.node(node, &operands)?);
    }
    let of = |id: &NodeIndex| values[linear.position[id] as usize].id;
    let outputs = program.outputs.iter().map(|(name, id)| (name.clone(), of(id))).collect();
    Ok(Primitives { graph: oracle.graph, outputs })
}

/// A contiguous result in the luminal graph.
#[derive(Clone)]
struct Value {
    id: NodeIndex,
    shape: Vec<usize>,
}

impl Value {
    /// The same elements under another shape.
    fn reshaped(&self, shape: &[usize]) -> Value {
        Value { id: self.id, shape: shape.to_vec() }
    }

    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

struct Oracle<'a> {
    graph: Box<Graph>,
    inputs: &'a HashMap<String, Vec<f32>>,
}

impl Oracle<'_> {
    fn add(&mut self, op: impl Operator + 'static, operands: &[(&Value, ShapeTracker)], shape: &[usize]) -> Value {
        let id = self.graph.graph.add_node(Box::new(op));
        for (order, (operand, shape)) in operands.iter().enumerate() {
            let edge = Dependency::Data { input_order: order as u8, output_order: 0, shape: *shape };
            self.graph.graph.add_edge(operand.id, id, edge);
        }
        Value { id, shape: shape.to_vec() }
    }

    fn unary(&mut self, op: impl Operator + 'static, x: &Value) -> Value {
        self.add(op, &[(x, whole(&x.shape))], &x.shape)
    }

    fn binary(&mut self, op: impl Operator + 'static, a: &Value, b: &Value) -> Value {
        self.add(op, &[(a, whole(&a.shape)), (b, whole(&b.shape))], &a.shape)
    }

    /// Reads a value through a tracker.
    fn moved(&mut self, x: &Value, view: ShapeTracker, shape: &[usize]) -> Value {
        self.add(op::Contiguous, &[(x, view)], shape)
    }

    /// Given numbers.
    fn data(&mut self, values: Vec<f32>, shape: &[usize]) -> Value {
        let load = Function("data".into(), Box::new(move |_| vec![Tensor::new(values.clone())]));
        self.add(load, &[], shape)
    }

    fn full(&mut self, value: f64, shape: &[usize]) -> Value {
        let constant = op::Constant(ConstantValue::Float(value as f32), &raw const self.graph.dyn_map);
        let one = self.add(constant, &[], &[1]);
        let dims: Vec<_> = at_least_one(shape).iter().map(|&d| d.into()).collect();
        self.moved(&one, ShapeTracker::fake(&dims), shape)
    }

    fn scale(&mut self, x: &Value, factor: f64) -> Value {
        let factor = self.full(factor, &x.shape);
        self.binary(op::Mul, x, &factor)
    }

    fn shift(&mut self, x: &Value, by: f64) -> Value {
        let by = self.full(by, &x.shape);
        self.binary(op::Add, x, &by)
    }

    fn mul(&mut self, a: &Value, b: &Value) -> Value {
        self.binary(op::Mul, a, b)
    }

    fn sum_of(&mut self, a: &Value, b: &Value) -> Value {
        self.binary(op::Add, a, b)
    }

    fn less(&mut self, a: &Value, b: &Value) -> Value {
        self.binary(op::LessThan, a, b)
    }

    /// 1 − x.
    fn not(&mut self, x: &Value) -> Value {
        let negative = self.scale(x, -1.0);
        self.shift(&negative, 1.0)
    }

    fn equal(&mut self, a: &Value, b: &Value) -> Value {
        let (less, more) = (self.less(a, b), self.less(b, a));
        let either = self.sum_of(&less, &more);
        self.not(&either)
    }

    /// c·a + (1 − c)·b with c of zeros and ones.
    fn choose(&mut self, c: &Value, a: &Value, b: &Value) -> Value {
        let other = self.not(c);
        let (a, b) = (self.mul(c, a), self.mul(&other, b));
        self.sum_of(&a, &b)
    }

    fn maximum(&mut self, a: &Value, b: &Value) -> Value {
        let less = self.less(a, b);
        self.choose(&less, b, a)
    }

    fn exp(&mut self, x: &Value) -> Value {
        let scaled = self.scale(x, std::f64::consts::LOG2_E);
        self.unary(op::Exp2, &scaled)
    }

    fn permute(&mut self, x: &Value, axes: &[usize]) -> Value {
        let mut view = whole(&x.shape);
        if !axes.is_empty() {
            view.permute(axes);
        }
        let shape: Vec<usize> = axes.iter().map(|&a| x.shape[a]).collect();
        self.moved(x, view, &shape)
    }

    fn broadcast(&mut self, x: &Value, shape: &[usize]) -> Value {
        // Dimensions that are kept keep their place, the others become fake ones.
        let mut view = whole(shape);
        for (d, (&from, &to)) in x.shape.iter().zip(shape).enumerate() {
            view.fake[d] = from != to;
        }
        self.moved(x, view, shape)
    }

    fn slice(&mut self, x: &Value, starts: &[usize], ends: &[usize]) -> Value {
        let mut view = whole(&x.shape);
        for d in 0..x.shape.len() {
            view.slices[d] = (starts[d].into(), ends[d].into());
        }
        let shape: Vec<usize> = starts.iter().zip(ends).map(|(s, e)| e - s).collect();
        self.moved(x, view, &shape)
    }

    /// Surrounded by zeros.
    fn pad(&mut self, x: &Value, before: &[usize], after: &[usize]) -> Value {
        let mut view = whole(&x.shape);
        let mut shape = x.shape.clone();
        for d in 0..shape.len() {
            view.padding[d] = (before[d].into(), after[d].into());
            shape[d] += before[d] + after[d];
        }
        self.moved(x, view, &shape)
    }

    /// Placed at `at` in zeros of a shape.
    fn placed(&mut self, x: &Value, at: &[usize], shape: &[usize]) -> Value {
        let after: Vec<usize> = (0..shape.len()).map(|d| shape[d] - at[d] - x.shape[d]).collect();
        self.pad(x, at, &after)
    }

    /// Reduced axes stay with size 1.
    fn reduce(&mut self, x: &Value, axes: &[usize], max: bool) -> Value {
        let mut x = x.clone();
        for &axis in axes {
            let mut shape = x.shape.clone();
            shape[axis] = 1;
            x = match max {
                true => self.add(op::MaxReduce(axis), &[(&x, whole(&x.shape))], &shape),
                false => self.add(op::SumReduce(axis), &[(&x, whole(&x.shape))], &shape),
            };
        }
        x
    }

    /// `[b, m, k] × [b, k, n]` in the form of luminal's own `matmul`, which its compilers look for: the product of two
    /// expanded views, summed over the last axis. A single matrix has no batch dimension there.
    fn product(&mut self, a: &Value, b: &Value) -> Value {
        let (batch, m, k, n) = (a.shape[0], a.shape[1], a.shape[2], b.shape[2]);
        let (mut left, mut right, shape) = match batch {
            1 => (whole(&[m, k]), whole(&[k, n]), vec![m, n, k]),
            _ => (whole(&[batch, m, k]), whole(&[batch, k, n]), vec![batch, m, n, k]),
        };
        let last = shape.len() - 1;
        left.expand(last - 1, n.into());
        right.permute(if batch == 1 { &[1, 0] } else { &[0, 2, 1] });
        right.expand(last - 2, m.into());
        let products = self.add(op::Mul, &[(a, left), (b, right)], &shape);
        self.reduce(&products, &[last], false).reshaped(&[batch, m, n])
    }

    /// `x` `[n, c, h, w]` times selection matrices along height (`[h', h]`) and width (`[w', w]`).
    fn select_window(&mut self, x: &Value, rows: &Value, cols: &Value) -> Value {
        let [n, c, h, w] = four(&x.shape);
        let (to_h, to_w) = (rows.shape[0], cols.shape[0]);
        let right = self.permute(cols, &[1, 0]).reshaped(&[1, w, to_w]);
        let wide = self.product(&x.reshaped(&[1, n * c * h, w]), &right);
        let turned = self.permute(&wide.reshaped(&[n * c, h, to_w]), &[1, 0, 2]);
        let tall = self.product(&rows.reshaped(&[1, to_h, h]), &turned.reshaped(&[1, h, n * c * to_w]));
        self.permute(&tall.reshaped(&[to_h, n * c, to_w]), &[1, 0, 2]).reshaped(&[n, c, to_h, to_w])
    }

    fn transposed(&mut self, matrix: &Value) -> Value {
        self.permute(matrix, &[1, 0])
    }

    /// The selection matrices of every tap of a window, in row-major order.
    fn taps(&mut self, window: &Window) -> Vec<Tap> {
        let mut taps = Vec::new();
        for ky in 0..window.kernel[0] {
            for kx in 0..window.kernel[1] {
                let [(rows, valid_y), (cols, valid_x)] = [(0, ky), (1, kx)].map(|(d, k)| window.selection(d, k));
                let valid: Vec<f32> = valid_y.iter().flat_map(|y| valid_x.iter().map(move |x| y * x)).collect();
                let selection = (!window.is_identity()).then(|| {
                    let rows = self.data(rows, &[window.output[0], window.input[0]]);
                    (rows, self.data(cols, &[window.output[1], window.input[1]]))
                });
                taps.push(Tap { at: [ky, kx], selection, valid });
            }
        }
        taps
    }

    fn nchw(&mut self, x: &Value, layout: Layout) -> Value {
        match layout {
            Layout::Nchw => x.clone(),
            Layout::Nhwc => self.permute(x, &[0, 3, 1, 2]),
        }
    }

    fn laid_out(&mut self, x: &Value, layout: Layout) -> Value {
        match layout {
            Layout::Nchw => x.clone(),
            Layout::Nhwc => self.permute(x, &[0, 2, 3, 1]),
        }
    }

    /// Adds to a running total.
    fn accumulate(&mut self, total: &mut Option<Value>, part: Value) {
        *total = Some(match total.take() {
            Some(sum) => self.sum_of(&sum, &part),
            None => part,
        });
    }

    fn total(&mut self, total: Option<Value>, shape: &[usize]) -> Value {
        total.unwrap_or_else(|| self.full(0.0, shape))
    }

    /// The weight of one tap and group, `[out / groups, in / groups]`.
    fn tap_weight(&mut self, weight: &Value, conv: &Conv, group: usize, at: [usize; 2]) -> Value {
        let (out, inner) = (weight.shape[0] / conv.groups, weight.shape[1]);
        let starts = [group * out, 0, at[0], at[1]];
        let ends = [(group + 1) * out, inner, at[0] + 1, at[1] + 1];
        self.slice(weight, &starts, &ends).reshaped(&[out, inner])
    }

    /// The channels of one group as rows: `[c / groups, n · h · w]`.
    fn group_rows(&mut self, x: &Value, groups: usize, group: usize) -> Value {
        let [n, c, h, w] = four(&x.shape);
        let size = c / groups;
        let part = self.slice(x, &[0, group * size, 0, 0], &[n, (group + 1) * size, h, w]);
        self.permute(&part, &[1, 0, 2, 3]).reshaped(&[size, n * h * w])
    }

    /// The inverse: rows of one group placed among all channels of `shape`.
    fn ungrouped(&mut self, rows: &Value, group: usize, shape: [usize; 4]) -> Value {
        let [n, c, h, w] = shape;
        let size = rows.shape[0];
        let part = self.permute(&rows.reshaped(&[size, n, h, w]), &[1, 0, 2, 3]);
        self.placed(&part, &[0, group * size, 0, 0], &[n, c, h, w])
    }

    fn conv2d(&mut self, x: &Value, weight: &Value, conv: &Conv, out: &[usize]) -> Value {
        let x = self.nchw(x, conv.layout);
        let shape = conv.layout.axes().map(|a| out[a]);
        let mut y = None;
        for tap in self.taps(&Window::of_conv(conv, &x.shape, &weight.shape, &shape)) {
            let seen = self.seen(&x, &tap);
            for group in 0..conv.groups {
                let weight = self.tap_weight(weight, conv, group, tap.at);
                let rows = self.group_rows(&seen, conv.groups, group);
                let part = self.matrix_product(&weight, &rows);
                let part = self.ungrouped(&part, group, shape);
                self.accumulate(&mut y, part);
            }
        }
        let y = self.total(y, &shape);
        self.laid_out(&y, conv.layout)
    }

    fn conv2d_input_grad(&mut self, grad: &Value, weight: &Value, conv: &Conv, out: &[usize]) -> Value {
        let grad = self.nchw(grad, conv.layout);
        let shape = conv.layout.axes().map(|a| out[a]);
        let [n, c, _, _] = shape;
        let mut dx = None;
        for tap in self.taps(&Window::of_conv(conv, &shape, &weight.shape, &grad.shape)) {
            for group in 0..conv.groups {
                let weight = self.tap_weight(weight, conv, group, tap.at);
                let weight = self.transposed(&weight);
                let rows = self.group_rows(&grad, conv.groups, group);
                let part = self.matrix_product(&weight, &rows);
                let part = self.ungrouped(&part, group, [n, c, grad.shape[2], grad.shape[3]]);
                let part = self.scatter_window(&part, &tap);
                self.accumulate(&mut dx, part);
            }
        }
        let dx = self.total(dx, &shape);
        self.laid_out(&dx, conv.layout)
    }

    fn conv2d_weight_grad(&mut self, x: &Value, grad: &Value, conv: &Conv, out: &[usize]) -> Value {
        let (x, grad) = (self.nchw(x, conv.layout), self.nchw(grad, conv.layout));
        let per_group = out[0] / conv.groups;
        let mut dw = None;
        for tap in self.taps(&Window::of_conv(conv, &x.shape, out, &grad.shape)) {
            let seen = self.seen(&x, &tap);
            for group in 0..conv.groups {
                let (g, s) = (self.group_rows(&grad, conv.groups, group), self.group_rows(&seen, conv.groups, group));
                let s = self.transposed(&s);
                let part = self.matrix_product(&g, &s).reshaped(&[per_group, out[1], 1, 1]);
                let part = self.placed(&part, &[group * per_group, 0, tap.at[0], tap.at[1]], out);
                self.accumulate(&mut dw, part);
            }
        }
        self.total(dw, out)
    }

    fn matrix_product(&mut self, a: &Value, b: &Value) -> Value {
        let shape = [a.shape[0], b.shape[1]];
        let left = a.reshaped(&[1, a.shape[0], a.shape[1]]);
        self.product(&left, &b.reshaped(&[1, b.shape[0], b.shape[1]])).reshaped(&shape)
    }

    /// A plane `[h', w']` repeated over `[n, c, h', w']`.
    fn plane(&mut self, values: Vec<f32>, shape: &[usize]) -> Value {
        let plane = self.data(values, &[1, 1, shape[2], shape[3]]);
        self.broadcast(&plane, shape)
    }

    /// Each tap's view of `x`, −10³⁰ in the padding.
    fn pool_views(&mut self, x: &Value, taps: &[Tap], shape: &[usize; 4]) -> Vec<Value> {
        taps.iter()
            .map(|tap| {
                let seen = self.seen(x, tap);
                let hidden = self.plane(tap.valid.iter().map(|v| (1.0 - v) * -1e30).collect(), shape);
                self.sum_of(&seen, &hidden)
            })
            .collect()
    }

    fn pool_max(&mut self, views: &[Value], shape: &[usize; 4]) -> Value {
        let mut top = self.full(-1e30, shape);
        for view in views {
            top = self.maximum(&top, view);
        }
        top
    }

    fn max_pool2d(&mut self, x: &Value, pool: &Pool, out: &[usize]) -> Value {
        let x = self.nchw(x, pool.layout);
        let shape = pool.layout.axes().map(|a| out[a]);
        let taps = self.taps(&Window::of_pool(pool, &x.shape, &shape));
        let views = self.pool_views(&x, &taps, &shape);
        let y = self.pool_max(&views, &shape);
        self.laid_out(&y, pool.layout)
    }

    fn max_pool2d_grad(&mut self, x: &Value, grad: &Value, pool: &Pool) -> Value {
        let (x, grad) = (self.nchw(x, pool.layout), self.nchw(grad, pool.layout));
        let shape = four(&grad.shape);
        let taps = self.taps(&Window::of_pool(pool, &x.shape, &shape));
        let views = self.pool_views(&x, &taps, &shape);
        let top = self.pool_max(&views, &shape);
        // 1 until a window's first maximum has been met.
        let mut waiting = self.full(1.0, &shape);
        let mut dx = None;
        for (tap, view) in taps.iter().zip(&views) {
            let equal = self.equal(view, &top);
            let hit = self.mul(&equal, &waiting);
            let miss = self.not(&hit);
            waiting = self.mul(&waiting, &miss);
            let part = self.mul(&grad, &hit);
            let part = self.scatter_window(&part, tap);
            self.accumulate(&mut dx, part);
        }
        let dx = self.total(dx, &x.shape);
        self.laid_out(&dx, pool.layout)
    }

    /// What a tap sees of `x`.
    fn seen(&mut self, x: &Value, tap: &Tap) -> Value {
        match &tap.selection {
            Some((rows, cols)) => self.select_window(x, rows, cols),
            None => x.clone(),
        }
    }

    /// The transpose of a tap's selection.
    fn scatter_window(&mut self, x: &Value, tap: &Tap) -> Value {
        let Some((rows, cols)) = &tap.selection else { return x.clone() };
        let (rows, cols) = (self.transposed(rows), self.transposed(cols));
        self.select_window(x, &rows, &cols)
    }

    /// 1 / the number of elements that each window averages.
    fn pool_weights(&mut self, pool: &Pool, taps: &[Tap], shape: &[usize; 4]) -> Value {
        let mut counts = vec![0.0; shape[2] * shape[3]];
        for tap in taps {
            counts.iter_mut().zip(&tap.valid).for_each(|(c, v)| *c += v);
        }
        if pool.count_include_pad {
            counts.fill((pool.kernel[0] * pool.kernel[1]) as f32);
        }
        self.plane(counts.into_iter().map(f32::recip).collect(), shape)
    }

    fn avg_pool2d(&mut self, x: &Value, pool: &Pool, out: &[usize]) -> Value {
        let x = self.nchw(x, pool.layout);
        let shape = pool.layout.axes().map(|a| out[a]);
        let taps = self.taps(&Window::of_pool(pool, &x.shape, &shape));
        let mut y = None;
        for tap in &taps {
            let seen = self.seen(&x, tap);
            self.accumulate(&mut y, seen);
        }
        let (sum, weights) = (self.total(y, &shape), self.pool_weights(pool, &taps, &shape));
        let y = self.mul(&sum, &weights);
        self.laid_out(&y, pool.layout)
    }

    fn avg_pool2d_grad(&mut self, grad: &Value, pool: &Pool, out: &[usize]) -> Value {
        let grad = self.nchw(grad, pool.layout);
        let (shape, input) = (four(&grad.shape), pool.layout.axes().map(|a| out[a]));
        let taps = self.taps(&Window::of_pool(pool, &input, &shape));
        let weights = self.pool_weights(pool, &taps, &shape);
        let grad = self.mul(&grad, &weights);
        let mut dx = None;
        for tap in &taps {
            let part = self.scatter_window(&grad, tap);
            self.accumulate(&mut dx, part);
        }
        let dx = self.total(dx, &input);
        self.laid_out(&dx, pool.layout)
    }

    /// `[ids, n]`: 1 where an id is the column.
    fn one_hot(&mut self, ids: &Value, n: usize) -> Value {
        let m = ids.elements();
        let ids = self.broadcast(&ids.reshaped(&[m, 1]), &[m, n]);
        let columns = self.data((0..m * n).map(|i| (i % n) as f32).collect(), &[m, n]);
        self.equal(&ids, &columns)
    }

    /// Rows replaced one after the other, so that of equal ids the last wins.
    fn scatter(&mut self, table: &Value, ids: &Value, rows: &Value) -> Value {
        let (n, m) = (table.shape[0], ids.elements());
        let width = table.elements() / n.max(1);
        let hot = self.one_hot(ids, n);
        let (mut result, rows) = (table.reshaped(&[n, width]), rows.reshaped(&[m, width]));
        for i in 0..m {
            let hit = self.slice(&hot, &[i, 0], &[i + 1, n]).reshaped(&[n, 1]);
            let hit = self.broadcast(&hit, &[n, width]);
            let row = self.slice(&rows, &[i, 0], &[i + 1, width]);
            let row = self.broadcast(&row, &[n, width]);
            result = self.choose(&hit, &row, &result);
        }
        result.reshaped(&table.shape)
    }

    /// One node. The match is exhaustive: a new op must be written here.
    fn node(&mut self, node: &Node, x: &[Value]) -> Result<Value, OracleError> {
        let shape = node.shape.as_slice();
        Ok(match &node.op {
            Op::Input { name } | Op::Param { name, .. } | Op::State { name, .. } => {
                let values = self.inputs.get(name).ok_or_else(|| OracleError::Missing(name.clone()))?;
                if values.len() != node.elements() {
                    let (expected, got) = (node.elements(), values.len());
                    return Err(OracleError::Size { name: name.clone(), expected, got });
                }
                self.data(values.clone(), shape)
            }
            Op::Constant { value } => self.full(*value, shape),
            Op::Literal { values } => self.data(values.iter().map(|&v| v as f32).collect(), shape),
            Op::Iota { axis } => {
                let behind: usize = shape[axis + 1..].iter().product();
                let size = shape[*axis];
                self.data((0..node.elements()).map(|i| (i / behind % size) as f32).collect(), shape)
            }
            Op::Random { stream } => {
                self.data((0..node.elements()).map(|i| uniform(0, *stream, i as u64) as f32).collect(), shape)
            }
            Op::Unary(op) => self.unary_op(*op, &x[0]),
            Op::Binary(op) => self.binary_op(*op, &x[0], &x[1]),
            Op::Compare(Compare::Lt) => self.less(&x[0], &x[1]),
            Op::Compare(Compare::Le) => {
                let more = self.less(&x[1], &x[0]);
                self.not(&more)
            }
            Op::Compare(Compare::Eq) => self.equal(&x[0], &x[1]),
            Op::Select => {
                let zero = self.full(0.0, shape);
                let no = self.equal(&x[0], &zero);
                self.choose(&no, &x[2], &x[1])
            }
            Op::Sum { axes } => self.reduce(&x[0], axes, false),
            Op::Max { axes } => self.reduce(&x[0], axes, true),
            Op::Reshape | Op::Cast | Op::Detach => x[0].reshaped(shape),
            Op::Permute { axes } => self.permute(&x[0], axes),
            Op::Broadcast => self.broadcast(&x[0], shape),
            Op::Slice { starts, ends } => self.slice(&x[0], starts, ends),
            Op::Pad { before, after, value } => {
                let inside = self.full(1.0, &x[0].shape);
                let inside = self.pad(&inside, before, after);
                let outside = self.not(&inside);
                let outside = self.scale(&outside, *value);
                let padded = self.pad(&x[0], before, after);
                self.sum_of(&padded, &outside)
            }
            Op::Concat { axis } => {
                let mut at = vec![0; shape.len()];
                let mut joined = None;
                for part in x {
                    let placed = self.placed(part, &at, shape);
                    self.accumulate(&mut joined, placed);
                    at[*axis] += part.shape[*axis];
                }
                self.total(joined, shape)
            }
            Op::Matmul => {
                let rank = shape.len();
                let batch: usize = shape[..rank - 2].iter().product();
                let flat = |v: &Value| v.reshaped(&[batch, v.shape[rank - 2], v.shape[rank - 1]]);
                self.product(&flat(&x[0]), &flat(&x[1])).reshaped(shape)
            }
            Op::Conv2d(conv) => self.conv2d(&x[0], &x[1], conv, shape),
            Op::Conv2dInputGrad(conv) => self.conv2d_input_grad(&x[0], &x[1], conv, shape),
            Op::Conv2dWeightGrad(conv) => self.conv2d_weight_grad(&x[0], &x[1], conv, shape),
            Op::MaxPool2d(pool) => self.max_pool2d(&x[0], pool, shape),
            Op::MaxPool2dGrad(pool) => self.max_pool2d_grad(&x[0], &x[1], pool),
            Op::AvgPool2d(pool) => self.avg_pool2d(&x[0], pool, shape),
            Op::AvgPool2dGrad(pool) => self.avg_pool2d_grad(&x[0], pool, shape),
            Op::Gather => {
                let n = x[0].shape[0];
                let hot = self.one_hot(&x[1], n);
                let width = x[0].elements() / n.max(1);
                self.matrix_product(&hot, &x[0].reshaped(&[n, width])).reshaped(shape)
            }
            Op::ScatterAdd => {
                let (n, m) = (shape[0], x[0].elements());
                let hot = self.one_hot(&x[0], n);
                let hot = self.transposed(&hot);
                self.matrix_product(&hot, &x[1].reshaped(&[m, node.elements() / n.max(1)])).reshaped(shape)
            }
            Op::Scatter => self.scatter(&x[0], &x[1], &x[2]),
            Op::Softmax
            | Op::LogSoftmax
            | Op::LayerNorm { .. }
            | Op::BatchNorm { .. }
            | Op::Gelu
            | Op::L2Normalize { .. }
            | Op::Moments => self.composite(node, x)?,
        })
    }

    /// A composite by its definition.
    fn composite(&mut self, node: &Node, x: &[Value]) -> Result<Value, OracleError> {
        let graph = IrGraph::new();
        let input = |(i, v): (usize, &Value)| graph.input(&i.to_string(), &v.shape, node.dtype);
        let inputs: Vec<IrTensor> = x.iter().enumerate().map(input).collect();
        let output: NodeId = decompose(&node.op, &inputs).map(|t| t.id()).unwrap_or_default();
        let mut values: Vec<Value> = Vec::new();
        for inner in graph.into_fragment().nodes {
            let value = match &inner.op {
                Op::Input { .. } => x[values.len()].clone(),
                _ => {
                    let operands: Vec<Value> = inner.inputs.iter().map(|&i| values[i as usize].clone()).collect();
                    self.node(&inner, &operands)?
                }
            };
            values.push(value);
        }
        Ok(values.swap_remove(output as usize))
    }

    fn unary_op(&mut self, op: Unary, x: &Value) -> Value {
        match op {
            Unary::Neg => self.scale(x, -1.0),
            Unary::Exp => self.exp(x),
            Unary::Ln => {
                let log = self.unary(op::Log2, x);
                self.scale(&log, std::f64::consts::LN_2)
            }
            Unary::Sqrt => self.unary(op::Sqrt, x),
            Unary::Recip => self.unary(op::Recip, x),
            Unary::Tanh => {
                // 1 − 2 / (e²ˣ + 1)
                let doubled = self.scale(x, 2.0);
                let power = self.exp(&doubled);
                let above = self.shift(&power, 1.0);
                let part = self.unary(op::Recip, &above);
                let part = self.scale(&part, 2.0);
                self.not(&part)
            }
            Unary::Erf => self.erf(x),
            Unary::Sin => self.unary(op::Sin, x),
            Unary::Cos => {
                let shifted = self.shift(x, std::f64::consts::FRAC_PI_2);
                self.unary(op::Sin, &shifted)
            }
            Unary::Abs => {
                let sign = self.sign(x);
                self.mul(x, &sign)
            }
        }
    }

    /// −1 below 0, else 1.
    fn sign(&mut self, x: &Value) -> Value {
        let zero = self.full(0.0, &x.shape);
        let negative = self.less(x, &zero);
        let doubled = self.scale(&negative, 2.0);
        self.not(&doubled)
    }

    /// Abramowitz and Stegun 7.1.26, to 1.5e-7.
    fn erf(&mut self, x: &Value) -> Value {
        let sign = self.sign(x);
        let magnitude = self.mul(x, &sign);
        let scaled = self.scale(&magnitude, 0.327_591_1);
        let shifted = self.shift(&scaled, 1.0);
        let t = self.unary(op::Recip, &shifted);
        let mut polynomial = self.full(1.061_405_429, &x.shape);
        for coefficient in [-1.453_152_027, 1.421_413_741, -0.284_496_736, 0.254_829_592] {
            polynomial = self.mul(&polynomial, &t);
            polynomial = self.shift(&polynomial, coefficient);
        }
        polynomial = self.mul(&polynomial, &t);
        let square = self.mul(x, x);
        let square = self.scale(&square, -1.0);
        let tail = self.exp(&square);
        let tail = self.mul(&tail, &polynomial);
        let result = self.not(&tail);
        self.mul(&result, &sign)
    }

    fn binary_op(&mut self, op: Binary, a: &Value, b: &Value) -> Value {
        match op {
            Binary::Add => self.sum_of(a, b),
            Binary::Sub => {
                let negative = self.scale(b, -1.0);
                self.sum_of(a, &negative)
            }
            Binary::Mul => self.mul(a, b),
            Binary::Div => {
                let reciprocal = self.unary(op::Recip, b);
                self.mul(a, &reciprocal)
            }
            Binary::Maximum => self.maximum(a, b),
            Binary::Minimum => {
                let less = self.less(a, b);
                self.choose(&less, a, b)
            }
            Binary::Pow => {
                let log = self.unary(op::Log2, a);
                let product = self.mul(&log, b);
                self.unary(op::Exp2, &product)
            }
        }
    }
}

/// One position of a window's kernel.
struct Tap {
    at: [usize; 2],
    /// The matrices along height and width; none if the tap sees everything in its place.
    selection: Option<(Value, Value)>,
    /// 1 where the tap is inside the input, by output position.
    valid: Vec<f32>,
}

/// luminal's trackers have at least one dimension.
fn at_least_one(shape: &[usize]) -> Vec<usize> {
    if shape.is_empty() { vec![1] } else { shape.to_vec() }
}

fn whole(shape: &[usize]) -> ShapeTracker {
    tracker(&at_least_one(shape))
}

fn four(shape: &[usize]) -> [usize; 4] {
    [shape[0], shape[1], shape[2], shape[3]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use clip_host_plugin_api::ir::DType;
    use luminal::compiler_utils::{SelectEdge, SelectOp};

    /// As `luminal_cuda` finds what cuBLAS can do: its search, on luminal's own operators.
    #[test]
    fn a_product_of_matrices_has_the_form_of_luminals_own() {
        let graph = IrGraph::new();
        let (x, y) = (graph.input("x", &[5, 3], DType::F32), graph.input("y", &[3, 4], DType::F32));
        graph.output("product", x.matmul(y));
        let fragment = graph.finish().unwrap();
        let mut program = Program::default();
        let spliced = program.splice(&fragment, "test", &HashMap::new(), |_, name| name.to_string()).unwrap();
        program.outputs.push(("product".into(), spliced.nodes[fragment.output("product").unwrap() as usize]));
        let inputs = HashMap::from([("x".to_string(), vec![1.0; 15]), ("y".to_string(), vec![2.0; 12])]);
        let mut primitives = lower(&program, &inputs).unwrap();
        let product = SelectOp::new().ty::<op::Mul>().shapes([['A', 'C', 'B'], ['A', 'C', 'B']]);
        let product = product.fakes([[Some(false), Some(true), Some(false)], [Some(true), Some(false), Some(false)]]);
        let pattern = SelectEdge::new(product, SelectOp::new().ty::<op::SumReduce>());
        assert!(pattern.search(&mut primitives.graph).next_match());
        assert_eq!(execute(&program, &inputs).unwrap()[0].1, vec![6.0; 20]);
    }
}
