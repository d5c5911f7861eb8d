//! Runs a plan on the CPU.

use crate::fused::Program;
use crate::memory::{Address, Buffer, Memory};
use crate::wide::{self, Copy, Wide};
use clip_host_compiler::kernel::{Element, Kernel, Operand};
use clip_host_compiler::plan::Plan;
use clip_host_cpu_kernels as kernels;
use clip_host_cpu_kernels::elements::{narrowed, widened};
use clip_host_cpu_kernels::{ConvShape, Elements, ElementsMut, Gemm, Pool2dShape, ThreadPool, f16};
use clip_host_plugin_api::ir::{Conv, DType, Layout, NodeId, Op, Pool};
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;
use thiserror::Error;

/// Why a plan could not be prepared or run.
#[derive(Debug, Error)]
pub enum ExecuteError {
    #[error("the CPU backend has no kernel for {op} in {layout} (hint: this is a defect of the compiler's passes)")]
    Unsupported { op: &'static str, layout: String },
    #[error("a fused kernel has {0} instructions, more than the backend takes")]
    TooLong(usize),
    #[error("{0}")]
    Row(#[from] kernels::RowError),
    #[error("the store is not the one that the program was prepared with (hint: keep one store for each executor)")]
    Store,
    #[error("there is no {what} `{name}`")]
    Unknown { what: &'static str, name: String },
    #[error("`{name}` has {expected} elements, {got} were given")]
    Size { name: String, expected: usize, got: usize },
}

/// Persistent tensors, shared by all programs of a model.
#[derive(Default)]
pub struct Store {
    names: HashMap<String, usize>,
    tensors: Vec<Tensor>,
}

/// A tensor of the store.
struct Tensor {
    buffer: Buffer,
    elements: usize,
    element: Element,
}

impl Store {
    /// The index of an f32 tensor, made (zero) if it is not there.
    pub fn entry(&mut self, name: &str, len: usize) -> usize {
        self.entry_of(name, len, Element::F32)
    }

    /// As [`Store::entry`], of a tensor that is kept as `element` if it is made.
    pub fn entry_of(&mut self, name: &str, len: usize, element: Element) -> usize {
        if let Some(&index) = self.names.get(name) {
            return index;
        }
        let buffer = Buffer::new((len * element.bytes()).div_ceil(4));
        self.tensors.push(Tensor { buffer, elements: len, element });
        self.names.insert(name.into(), self.tensors.len() - 1);
        self.tensors.len() - 1
    }

    /// Number of a tensor's elements, if it is there.
    pub fn elements(&self, name: &str) -> Option<usize> {
        self.tensor(name).map(|t| t.elements)
    }

    fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.names.get(name).map(|&index| &self.tensors[index])
    }

    /// The values of an f32 tensor.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.tensor(name).filter(|t| t.element == Element::F32).map(|t| t.buffer.as_slice())
    }

    /// As [`Store::get`], to be changed.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut [f32]> {
        let index = *self.names.get(name)?;
        let tensor = &mut self.tensors[index];
        (tensor.element == Element::F32).then(|| tensor.buffer.as_mut_slice())
    }

    /// Some values of a tensor, whatever it is kept as; `None` if it is not there, or has fewer.
    pub fn values(&self, name: &str, range: Range<usize>) -> Option<Cow<'_, [f32]>> {
        let tensor = self.tensor(name).filter(|t| range.end <= t.elements)?;
        Some(match tensor.element {
            Element::Bf16 => tensor.buffer.as_bf16()[range].iter().map(|&v| widened(v)).collect(),
            Element::F16 => tensor.buffer.as_f16()[range].iter().map(|v| v.to_f32()).collect(),
            _ => Cow::Borrowed(&tensor.buffer.as_slice()[range]),
        })
    }

    /// Sets the values of a tensor from element `start` on, rounded to the nearest that it can hold. False if it is not
    /// there, or ends before them.
    pub fn set(&mut self, name: &str, start: usize, values: &[f32]) -> bool {
        let Some(&index) = self.names.get(name) else { return false };
        let tensor = &mut self.tensors[index];
        if start + values.len() > tensor.elements {
            return false;
        }
        match tensor.element {
            Element::Bf16 => {
                let to = &mut tensor.buffer.as_mut_bf16()[start..];
                to.iter_mut().zip(values).for_each(|(to, &value)| *to = narrowed(value));
            }
            Element::F16 => {
                round_to_f16(&mut tensor.buffer.as_mut_f16()[start..start + values.len()], values);
            }
            _ => tensor.buffer.as_mut_slice()[start..start + values.len()].copy_from_slice(values),
        }
        true
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.tensors.iter().map(|t| t.buffer.len() * 4).sum()
    }
}

enum Leaf {
    /// The store's tensor.
    Stored(usize),
    Own(Buffer),
}

enum Launch {
    Fused(Box<Program>),
    Own {
        op: Op,
        output: Target,
        inputs: Vec<Source>,
        shape: Vec<usize>,
        in_place: Vec<bool>,
        moments: Option<Address>,
    },
    Copy {
        output: Target,
        input: Source,
    },
}

/// An operand's place and how it is read.
struct Source {
    address: Address,
    element: Element,
    view: Operand,
}

/// A result's place.
#[derive(Clone, Copy)]
struct Target {
    address: Address,
    element: Element,
}

/// A plan made ready: kernels prepared, memory taken once.
pub struct Executor {
    plan: Arc<Plan>,
    pool: Arc<ThreadPool>,
    arena: Buffer,
    leaves: Vec<Leaf>,
    inputs: HashMap<String, usize>,
    launches: Vec<Launch>,
    blocks: Vec<usize>,
    wide: Wide,
    /// Which of `phases` each launch counts in: see [`Executor::set_phases`].
    phase_of: Vec<usize>,
    /// Seconds of the last run, by phase.
    pub phases: [f64; 3],
    /// Seconds of each launch over all runs since [`Executor::time_launches`].
    timings: Option<Vec<f64>>,
    /// When each launch of the last run began and ended, if launches are timed.
    spans: Vec<(Instant, Instant)>,
}

impl Executor {
    /// Prepares a plan; persistent leaves are found in, or added to, the store.
    pub fn new(plan: Plan, pool: Arc<ThreadPool>, store: &mut Store) -> Result<Executor, ExecuteError> {
        let plan = Arc::new(plan);
        let mut leaves = Vec::new();
        let mut inputs = HashMap::new();
        for (index, &id) in plan.leaves.iter().enumerate() {
            let node = &plan.nodes[id as usize];
            let elements = node.elements();
            leaves.push(match &node.op {
                Op::Param { name, .. } | Op::State { name, .. } => {
                    let entry = store.entry_of(name, elements, plan.storage[id as usize]);
                    let tensor = &store.tensors[entry];
                    check_size(name, tensor.elements, elements)?;
                    if tensor.element != plan.storage[id as usize] {
                        return Err(ExecuteError::Store);
                    }
                    Leaf::Stored(entry)
                }
                Op::Literal { values } => {
                    let mut buffer = Buffer::new(elements);
                    if node.dtype == DType::I32 {
                        buffer.as_mut_i32().iter_mut().zip(values).for_each(|(b, &v)| *b = v as i32);
                    } else {
                        buffer.as_mut_slice().iter_mut().zip(values).for_each(|(b, &v)| *b = v as f32);
                    }
                    Leaf::Own(buffer)
                }
                Op::Input { name } => {
                    inputs.insert(name.clone(), index);
                    Leaf::Own(Buffer::new((elements * plan.storage[id as usize].bytes()).div_ceil(4)))
                }
                other => return Err(ExecuteError::Unsupported { op: other.name(), layout: "a leaf's place".into() }),
            });
        }
        let address = |id: NodeId| match plan.places.get(&id) {
            Some(&place) => Address::of(&plan, place),
            None => Address { block: 0, offset: 0 },
        };
        let source = |view: &Operand| {
            let element = plan.storage[view.source as usize];
            Source { address: address(view.source).plus(view.offset, element), element, view: view.clone() }
        };
        let target = |id: NodeId| Target { address: address(id), element: plan.storage[id as usize] };
        let mut launches = Vec::with_capacity(plan.kernels.len());
        for kernel in &plan.kernels {
            launches.push(match kernel {
                Kernel::Fused(fused) => {
                    let program =
                        Program::new(fused, pool.isa(), address).ok_or(ExecuteError::TooLong(fused.code.len()))?;
                    Launch::Fused(Box::new(program))
                }
                Kernel::Own { op, node, inputs, shape, moments } => {
                    check_layout(op)?;
                    let output = target(*node);
                    let inputs: Vec<Source> = inputs.iter().map(source).collect();
                    let mut offset = 0;
                    let in_place = inputs
                        .iter()
                        .map(|input| {
                            let here = input.address == output.address.plus(offset, output.element);
                            offset += elements(&input.view);
                            here
                        })
                        .collect();
                    let moments = moments.map(address);
                    Launch::Own { op: op.clone(), output, inputs, shape: shape.clone(), in_place, moments }
                }
                Kernel::Copy { node, input } => Launch::Copy { output: target(*node), input: source(input) },
                Kernel::Store { leaf, value } => Launch::Copy { output: target(*leaf), input: source(value) },
            });
        }
        let arena = Buffer::new(plan.arena.div_ceil(4));
        let blocks = vec![0; plan.leaves.len() + 1];
        let count = launches.len();
        Ok(Executor {
            plan,
            pool,
            arena,
            leaves,
            inputs,
            launches,
            blocks,
            wide: Wide::default(),
            phase_of: vec![0; count],
            phases: [0.0; 3],
            timings: None,
            spans: Vec::new(),
        })
    }

    /// From now on measures every launch.
    pub fn time_launches(&mut self) {
        self.timings = Some(vec![0.0; self.launches.len()]);
    }

    /// Seconds that each of the plan's kernels took so far, if they are measured.
    pub fn timings(&self) -> Option<&[f64]> {
        self.timings.as_deref()
    }

    /// When each of the plan's kernels began and ended in the last run, if they are measured; else empty.
    pub fn spans(&self) -> &[(Instant, Instant)] {
        &self.spans
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Says which phase each launch belongs to: 0, the forward pass; 1, the backward pass; 2, the update.
    pub fn set_phases(&mut self, of: impl IntoIterator<Item = usize>) {
        self.phase_of.iter_mut().zip(of).for_each(|(phase, of)| *phase = of.min(2));
    }

    /// An input's memory, its elements and how they are kept.
    fn input(&mut self, name: &str) -> Option<(&mut Buffer, usize, Element)> {
        let index = *self.inputs.get(name)?;
        let id = self.plan.leaves[index] as usize;
        match &mut self.leaves[index] {
            Leaf::Own(buffer) => Some((buffer, self.plan.nodes[id].elements(), self.plan.storage[id])),
            Leaf::Stored(_) => None,
        }
    }

    /// The shape of an input with four dimensions, if the program reads one of this name.
    pub fn input_shape(&self, name: &str) -> Option<[usize; 4]> {
        let id = self.plan.leaves[*self.inputs.get(name)?];
        self.plan.nodes[id as usize].shape.as_slice().try_into().ok()
    }

    /// Whether the program reads an input of this name.
    pub fn has_input(&self, name: &str) -> bool {
        self.inputs.contains_key(name)
    }

    /// Fills an f32 input; one that the program does not read is passed over.
    pub fn set_f32(&mut self, name: &str, values: &[f32]) -> Result<(), ExecuteError> {
        let Some((buffer, elements, element)) = self.input(name) else { return Ok(()) };
        check_size(name, elements, values.len())?;
        match element {
            Element::Bf16 => {
                let out = &mut buffer.as_mut_bf16()[..elements];
                out.iter_mut().zip(values).for_each(|(out, &value)| *out = narrowed(value));
            }
            Element::F16 => round_to_f16(&mut buffer.as_mut_f16()[..elements], values),
            _ => buffer.as_mut_slice().copy_from_slice(values),
        }
        Ok(())
    }

    /// Fills an i32 input; one that the program does not read is passed over.
    pub fn set_i32(&mut self, name: &str, values: &[i32]) -> Result<(), ExecuteError> {
        let Some((buffer, elements, _)) = self.input(name) else { return Ok(()) };
        check_size(name, elements, values.len())?;
        buffer.as_mut_i32().copy_from_slice(values);
        Ok(())
    }

    /// Runs the program once. `seed` drives its random numbers.
    pub fn run(&mut self, store: &mut Store, seed: u64) -> Result<(), ExecuteError> {
        self.blocks[0] = self.arena.as_ptr() as usize;
        let plan = &self.plan;
        for ((block, leaf), &id) in self.blocks[1..].iter_mut().zip(&self.leaves).zip(&plan.leaves) {
            *block = match leaf {
                Leaf::Own(buffer) => buffer.as_ptr() as usize,
                // A store that this executor was not made with is refused: its memory may be smaller.
                Leaf::Stored(index) => match store.tensors.get(*index) {
                    Some(tensor)
                        if tensor.elements >= plan.nodes[id as usize].elements()
                            && tensor.element == plan.storage[id as usize] =>
                    {
                        tensor.buffer.as_ptr() as usize
                    }
                    _ => return Err(ExecuteError::Store),
                },
            };
        }
        let pointers: &[usize] = &self.blocks;
        // SAFETY: an address and its number have the same size; each came from a live buffer above.
        let memory = Memory { blocks: unsafe { std::slice::from_raw_parts(pointers.as_ptr().cast(), pointers.len()) } };
        let mut began = Instant::now();
        self.phases = [0.0; 3];
        self.spans.clear();
        for (index, launch) in self.launches.iter_mut().enumerate() {
            // SAFETY: the addresses come from the plan that the blocks were made for, and no two kernels run at once.
            unsafe { run_launch(launch, &self.pool, memory, seed, &mut self.wide)? };
            let ended = Instant::now();
            let seconds = (ended - began).as_secs_f64();
            self.phases[self.phase_of[index]] += seconds;
            if let Some(timings) = &mut self.timings {
                timings[index] += seconds;
                self.spans.push((began, ended));
            }
            began = ended;
        }
        Ok(())
    }

    /// A result of the last run, contiguous.
    pub fn output(&self, store: &Store, name: &str) -> Option<Vec<f32>> {
        let (_, operand) = self.plan.outputs.iter().find(|(n, _)| n == name)?;
        let place = *self.plan.places.get(&operand.source)?;
        let element = self.plan.storage[operand.source as usize];
        let address = Address::of(&self.plan, place).plus(operand.offset, element);
        let block = match address.block {
            0 => &self.arena,
            leaf => match &self.leaves[leaf - 1] {
                Leaf::Own(buffer) => buffer,
                Leaf::Stored(index) => &store.tensors.get(*index)?.buffer,
            },
        };
        let start = address.offset / element.bytes();
        let range = start..start + elements(operand);
        Some(match element {
            Element::Bf16 => block.as_bf16().get(range)?.iter().map(|&v| widened(v)).collect(),
            Element::F16 => block.as_f16().get(range)?.iter().map(|v| v.to_f32()).collect(),
            _ => block.as_slice().get(range)?.to_vec(),
        })
    }
}

fn check_size(name: &str, expected: usize, got: usize) -> Result<(), ExecuteError> {
    match expected == got {
        true => Ok(()),
        false => Err(ExecuteError::Size { name: name.into(), expected, got }),
    }
}

fn check_layout(op: &Op) -> Result<(), ExecuteError> {
    let layout = match op {
        Op::Conv2d(c) | Op::Conv2dInputGrad(c) | Op::Conv2dWeightGrad(c) => c.layout,
        Op::MaxPool2d(p) | Op::MaxPool2dGrad(p) | Op::AvgPool2d(p) | Op::AvgPool2dGrad(p) => p.layout,
        _ => return Ok(()),
    };
    match layout {
        Layout::Nhwc => Ok(()),
        Layout::Nchw => Err(ExecuteError::Unsupported { op: op.name(), layout: "NCHW".into() }),
    }
}

fn sizes(view: &Operand) -> Vec<usize> {
    view.dims.iter().map(|d| d.0).collect()
}

fn elements(view: &Operand) -> usize {
    view.dims.iter().map(|d| d.0).product()
}

/// How far into its memory a view reaches.
fn extent(view: &Operand) -> usize {
    match elements(view) {
        0 => 0,
        _ => view.dims.iter().map(|(size, stride)| (size - 1) * stride).sum::<usize>() + 1,
    }
}

fn conv_shape(conv: &Conv, x: &[usize], weight: &[usize], y: &[usize]) -> ConvShape {
    ConvShape {
        batch: x[0],
        in_h: x[1],
        in_w: x[2],
        in_c: x[3],
        out_h: y[1],
        out_w: y[2],
        out_c: y[3],
        kernel: (weight[2], weight[3]),
        stride: (conv.stride[0], conv.stride[1]),
        padding: (conv.padding[0], conv.padding[1]),
        dilation: (conv.dilation[0], conv.dilation[1]),
        groups: conv.groups,
    }
}

fn pool_shape(pool: &Pool, x: &[usize], y: &[usize]) -> Pool2dShape {
    Pool2dShape {
        batch: x[0],
        in_h: x[1],
        in_w: x[2],
        out_h: y[1],
        out_w: y[2],
        channels: x[3],
        kernel: (pool.kernel[0], pool.kernel[1]),
        stride: (pool.stride[0], pool.stride[1]),
        padding: (pool.padding[0], pool.padding[1]),
    }
}

/// Runs one launch.
///
/// # Safety
/// `memory` must hold the blocks of the plan that the launch was prepared from, used by nobody else meanwhile.
unsafe fn run_launch(
    launch: &mut Launch,
    pool: &ThreadPool,
    memory: Memory,
    seed: u64,
    wide: &mut Wide,
) -> Result<(), ExecuteError> {
    // SAFETY: the caller's promise; a kernel's output never overlaps its inputs, except where they are the same.
    unsafe {
        match launch {
            Launch::Fused(program) => program.run(pool, memory, seed),
            Launch::Copy { output, input } => {
                let view = &input.view;
                let strides: Vec<usize> = view.dims.iter().map(|d| d.1).collect();
                let operands = std::slice::from_ref(&*input);
                wide.copy(operands.iter().map(|i| i.copy(false)), memory);
                let Wide { inputs: copies, output: copy } = wide;
                let from = read(operands, copies, 0, memory);
                let to = output.elements(copy, memory, elements(view));
                kernels::copy_strided(pool, &sizes(view), &strides, from, to);
                output.finish(copy, memory);
            }
            Launch::Own { op, output, inputs, shape, in_place, moments } => {
                let (op, shape) = (&*op, &*shape);
                let out_len: usize = shape.iter().product();
                let view = |i: usize| &inputs[i].view;
                let rounds = is_product(op) && inputs.iter().any(|i| i.element == Element::F16);
                wide.copy(inputs.iter().map(|i| i.copy(rounds)), memory);
                let Wide { inputs: copies, output: copy } = wide;
                let input = |i: usize| read(inputs, copies, i, memory);
                let ids = |i: usize| memory.slice::<i32>(inputs[i].address, extent(view(i)));
                let out = output.elements(copy, memory, out_len);
                match op {
                    Op::Matmul => matmul(pool, view(0), view(1), input(0), input(1), out),
                    Op::Conv2d(conv) => {
                        let s = conv_shape(conv, &sizes(view(0)), &sizes(view(1)), shape);
                        let moments = moments.map(|at| memory.slice_mut::<f32>(at, 2 * s.out_c));
                        kernels::conv2d_forward(pool, &s, input(0), input(1), None, out, false, moments);
                    }
                    Op::Conv2dInputGrad(conv) => {
                        let s = conv_shape(conv, shape, &sizes(view(1)), &sizes(view(0)));
                        kernels::conv2d_input_grad(pool, &s, input(0), input(1), out, false);
                    }
                    Op::Conv2dWeightGrad(conv) => {
                        let s = conv_shape(conv, &sizes(view(0)), shape, &sizes(view(1)));
                        kernels::conv2d_weight_grad(pool, &s, input(0), input(1), single(op, out)?, false);
                    }
                    Op::MaxPool2d(p) => {
                        kernels::max_pool2d_forward(pool, &pool_shape(p, &sizes(view(0)), shape), input(0), out);
                    }
                    Op::MaxPool2dGrad(p) => {
                        let s = pool_shape(p, shape, &sizes(view(1)));
                        kernels::max_pool2d_backward(pool, &s, input(0), input(1), out);
                    }
                    Op::AvgPool2d(p) => {
                        let s = pool_shape(p, &sizes(view(0)), shape);
                        kernels::avg_pool2d_forward(pool, &s, input(0), out, p.count_include_pad);
                    }
                    Op::AvgPool2dGrad(p) => {
                        let s = pool_shape(p, shape, &sizes(view(0)));
                        kernels::avg_pool2d_backward(pool, &s, input(0), out, p.count_include_pad);
                    }
                    Op::Moments => {
                        let columns = shape[1];
                        let rows = elements(view(0)) / columns;
                        kernels::column_moments(pool, input(0), rows, columns, single(op, out)?);
                    }
                    Op::Gather => {
                        let width = sizes(view(0))[1..].iter().product();
                        kernels::gather_rows(pool, input(0), width, ids(1), single(op, out)?)?;
                    }
                    Op::ScatterAdd => {
                        let (rows, out) = (inputs[1].single(op, memory)?, single(op, out)?);
                        kernels::fill(pool, out, 0.0);
                        let width = shape[1..].iter().product();
                        kernels::scatter_add_rows(pool, rows, width, ids(0), out)?;
                    }
                    Op::Scatter => {
                        let (rows, out) = (inputs[2].single(op, memory)?, single(op, out)?);
                        if inputs[0].address != output.address {
                            out.copy_from_slice(inputs[0].single(op, memory)?);
                        }
                        let width = shape[1..].iter().product();
                        kernels::scatter_rows(pool, rows, width, ids(1), out)?;
                    }
                    Op::Pad { before, value, .. } => {
                        let out = single(op, out)?;
                        kernels::fill(pool, out, *value as f32);
                        kernels::place_block(pool, input(0), &sizes(view(0)), ElementsMut::F32(out), shape, before);
                    }
                    Op::Concat { axis } => {
                        let out = single(op, out)?;
                        let mut before = vec![0; shape.len()];
                        for (i, source) in inputs.iter().enumerate() {
                            // Parts that were computed in place are there already.
                            if !(in_place[i] && shape[..*axis].iter().all(|&d| d == 1)) {
                                let out = ElementsMut::F32(out);
                                kernels::place_block(pool, input(i), &sizes(&source.view), out, shape, &before);
                            }
                            before[*axis] += source.view.dims[*axis].0;
                        }
                    }
                    other => return Err(unsupported(other, inputs[0].element)),
                }
                output.finish(copy, memory);
            }
        }
    }
    Ok(())
}

/// Ops whose operands are all rounded if one is in half precision.
fn is_product(op: &Op) -> bool {
    matches!(op, Op::Matmul | Op::Conv2d(_) | Op::Conv2dInputGrad(_) | Op::Conv2dWeightGrad(_))
}

/// An operand's memory as far as it is read, or its copy.
///
/// # Safety
/// As [`Memory::slice`].
unsafe fn read<'m>(operands: &[Source], copies: &'m [Vec<f32>], number: usize, memory: Memory<'m>) -> Elements<'m> {
    match copies[number].is_empty() {
        // SAFETY: the caller's promise.
        true => unsafe { operands[number].elements(memory) },
        false => Elements::F32(&copies[number]),
    }
}

fn round_to_f16(out: &mut [f16], values: &[f32]) {
    out.iter_mut().zip(values).for_each(|(out, &value)| *out = f16::from_f32(value));
}

impl Source {
    /// How the operand is copied before it is read, where it is and how long; with `rounds`, f32 is rounded to f16.
    fn copy(&self, rounds: bool) -> (Copy, Address, usize) {
        let copy = match self.element {
            Element::F16 => Copy::Widened,
            Element::F32 if rounds => Copy::Rounded,
            _ => Copy::None,
        };
        (copy, self.address, extent(&self.view))
    }

    /// The operand's memory, as far as it is read; f16 is read from its copy.
    ///
    /// # Safety
    /// As [`Memory::slice`].
    unsafe fn elements<'m>(&self, memory: Memory<'m>) -> Elements<'m> {
        let len = extent(&self.view);
        // SAFETY: the caller's promise.
        unsafe {
            match self.element {
                Element::Bf16 => Elements::Bf16(memory.slice(self.address, len)),
                _ => Elements::F32(memory.slice(self.address, len)),
            }
        }
    }

    /// The same for an op that reads 4-byte elements only.
    ///
    /// # Safety
    /// As [`Memory::slice`].
    unsafe fn single<'m>(&self, op: &Op, memory: Memory<'m>) -> Result<&'m [f32], ExecuteError> {
        // SAFETY: the caller's promise.
        match unsafe { self.elements(memory) } {
            Elements::F32(values) if self.element != Element::F16 => Ok(values),
            _ => Err(unsupported(op, self.element)),
        }
    }
}

impl Target {
    /// The result's memory, for f16 a copy of it.
    ///
    /// # Safety
    /// As [`Memory::slice_mut`].
    unsafe fn elements<'m>(&self, copy: &'m mut Vec<f32>, memory: Memory<'m>, len: usize) -> ElementsMut<'m> {
        // SAFETY: the caller's promise.
        unsafe {
            match self.element {
                Element::F16 => {
                    copy.clear();
                    copy.resize(len, 0.0);
                    ElementsMut::F32(copy)
                }
                Element::Bf16 => ElementsMut::Bf16(memory.slice_mut(self.address, len)),
                _ => ElementsMut::F32(memory.slice_mut(self.address, len)),
            }
        }
    }
}

impl Target {
    /// Writes the copy back, if there is one.
    ///
    /// # Safety
    /// As [`Memory::slice_mut`].
    unsafe fn finish(&self, copy: &[f32], memory: Memory) {
        if self.element == Element::F16 {
            // SAFETY: the caller's promise; the copy has the result's length.
            unsafe { wide::narrow(copy, self.address, memory) };
        }
    }
}

/// The result of an op that writes 4-byte elements only.
fn single<'m>(op: &Op, out: ElementsMut<'m>) -> Result<&'m mut [f32], ExecuteError> {
    match out {
        ElementsMut::F32(values) => Ok(values),
        ElementsMut::Bf16(_) => Err(unsupported(op, Element::Bf16)),
    }
}

fn unsupported(op: &Op, element: Element) -> ExecuteError {
    ExecuteError::Unsupported { op: op.name(), layout: element.name().into() }
}

/// A batched product over strided operands.
fn matmul(pool: &ThreadPool, a: &Operand, b: &Operand, left: Elements, right: Elements, out: ElementsMut) {
    let rank = a.dims.len();
    let (m, k, n) = (a.dims[rank - 2].0, a.dims[rank - 1].0, b.dims[rank - 1].0);
    let mut batch = [0usize; 8];
    let (mut a_batch, mut b_batch, mut c_batch) = ([0usize; 8], [0usize; 8], [0usize; 8]);
    // Ones take no part and neighbours that all three walk with one stride are one: the kernel knows three batch
    // dimensions, and operands with more are contiguous.
    let mut used = 0usize;
    let mut c_stride = m * n;
    let mut c_strides = [0usize; 8];
    for d in (0..rank - 2).rev() {
        c_strides[d] = c_stride;
        c_stride *= a.dims[d].0;
    }
    let lead = a.dims[..rank - 2].iter().zip(&b.dims).zip(&c_strides);
    for ((&(size, a_stride), &(_, b_stride)), &c_stride) in lead.filter(|((a, _), _)| a.0 != 1) {
        if let Some(last) = used.checked_sub(1)
            && [(a_batch[last], a_stride), (b_batch[last], b_stride), (c_batch[last], c_stride)]
                .iter()
                .all(|(outer, inner)| *outer == inner * size)
        {
            batch[last] *= size;
            (a_batch[last], b_batch[last], c_batch[last]) = (a_stride, b_stride, c_stride);
            continue;
        }
        batch[used] = size;
        a_batch[used] = a_stride;
        b_batch[used] = b_stride;
        c_batch[used] = c_stride;
        used += 1;
    }
    let g = Gemm {
        m,
        n,
        k,
        batch: &batch[..used],
        a_strides: (a.dims[rank - 2].1, a.dims[rank - 1].1),
        a_batch: &a_batch[..used],
        b_strides: (b.dims[rank - 2].1, b.dims[rank - 1].1),
        b_batch: &b_batch[..used],
        c_row_stride: n,
        c_batch: &c_batch[..used],
        accumulate: false,
        bias: None,
        alpha: 1.0,
    };
    kernels::gemm(pool, &g, left, right, out);
}
