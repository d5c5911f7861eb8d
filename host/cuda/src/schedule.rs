//! From a compiled plan to work for the GPU.

use crate::launch::{Address, Block, Function, Launch, Schedule, Work};
use crate::library::{self, Item, Libraries};
use crate::render::moments;
use crate::render::own::{self, Source, Target};
use crate::render::pool::Pooling;
use crate::render::product::{self, Convolution};
use crate::render::{Draft, fused};
use clip_host_compiler::kernel::{Kernel, Operand};
use clip_host_compiler::plan::{Place, Plan, Region};
use clip_host_cuda_driver::dnn::Direction;
use clip_host_plugin_api::ir::{Layout, NodeId, Op};
use std::collections::HashMap;
use thiserror::Error;

/// Why a plan has no form for the GPU.
#[derive(Debug, Error)]
pub enum ScheduleError {
    #[error("the CUDA backend has no kernel for {op} in {layout} (hint: this is a defect of the compiler's passes)")]
    Unsupported { op: &'static str, layout: String },
    #[error("a kernel for {op} needs {threads} blocks of threads, a GPU takes {most} (hint: lower `train.batch_size`)")]
    TooLarge { op: &'static str, threads: u64, most: u64 },
    #[error("the plan gives %{0} no place")]
    NoPlace(NodeId),
}

/// Finds values' memory.
pub struct Places<'a> {
    plan: &'a Plan,
    leaves: HashMap<NodeId, usize>,
}

impl<'a> Places<'a> {
    pub fn new(plan: &'a Plan) -> Self {
        Places { plan, leaves: plan.leaves.iter().enumerate().map(|(i, &id)| (id, i)).collect() }
    }

    /// A place in the plan's terms as an address.
    pub fn address(&self, place: Place) -> Address {
        let block = match place.region {
            Region::Arena => Block::Arena,
            Region::Leaf(leaf) => Block::Leaf(self.leaves.get(&leaf).copied().unwrap_or(usize::MAX)),
        };
        Address { block, offset: place.offset }
    }

    pub fn of(&self, id: NodeId) -> Option<Address> {
        self.plan.places.get(&id).map(|&place| self.address(place))
    }

    /// Bytes of a value.
    pub fn bytes(&self, id: NodeId) -> usize {
        self.plan.nodes[id as usize].elements() * self.plan.storage[id as usize].bytes()
    }

    fn source<'v>(&self, view: &'v Operand) -> Result<Source<'v>, ScheduleError> {
        let element = self.plan.storage[view.source as usize];
        let at = self.of(view.source).ok_or(ScheduleError::NoPlace(view.source))?;
        Ok(Source { at: at.plus(view.offset * element.bytes()), element, view, node: Some(view.source) })
    }

    fn target(&self, node: NodeId) -> Result<Target, ScheduleError> {
        let at = self.of(node).ok_or(ScheduleError::NoPlace(node))?;
        Ok(Target { at, element: self.plan.storage[node as usize], node: Some(node) })
    }
}

/// Lowers a plan; what the libraries take is theirs.
///
/// # Errors
/// If it holds an op or a layout that this backend does not know.
pub fn schedule(plan: &Plan, libraries: &dyn Libraries) -> Result<Schedule, ScheduleError> {
    let places = Places::new(plan);
    let mut builder = Builder::default();
    for (number, kernel) in plan.kernels.iter().enumerate() {
        for item in items(&places, kernel, libraries)? {
            match item {
                Item::Draft(draft) => builder.add(draft, number, kernel)?,
                Item::Work(work) => builder.push(work, number),
            }
        }
    }
    Ok(builder.schedule)
}

#[derive(Default)]
struct Builder {
    schedule: Schedule,
    known: HashMap<(String, u32), usize>,
}

impl Builder {
    fn add(&mut self, draft: Draft, number: usize, kernel: &Kernel) -> Result<(), ScheduleError> {
        for (axis, most) in [(0, i32::MAX as u64), (1, 65_535)] {
            let threads = u64::from(draft.grid[axis]);
            if threads > most {
                return Err(ScheduleError::TooLarge { op: name(kernel), threads, most });
            }
        }
        let schedule = &mut self.schedule;
        let threads = draft.block.iter().product();
        let function = *self.known.entry((draft.text, threads)).or_insert_with_key(|(text, threads)| {
            let name = format!("k{:016x}", hash(text) ^ u64::from(*threads));
            schedule.functions.push(Function { name, text: text.clone(), threads: *threads });
            schedule.functions.len() - 1
        });
        let Draft { grid, block, arguments, in_place, .. } = draft;
        self.push(Work::Launch(Launch { function, grid, block, arguments, in_place }), number);
        Ok(())
    }

    fn push(&mut self, work: Work, number: usize) {
        for argument in work.arguments().iter().filter(|a| a.at.block == Block::Scratch) {
            self.schedule.scratch = self.schedule.scratch.max(argument.at.offset + argument.bytes);
        }
        self.schedule.work.push((work, number));
    }
}

/// A launch outside any plan, with its function.
pub fn standalone(draft: Draft) -> (Function, Launch) {
    let Draft { text, grid, block, arguments, in_place } = draft;
    let threads = block.iter().product();
    let name = format!("k{:016x}", hash(&text) ^ u64::from(threads));
    (Function { name, text, threads }, Launch { function: 0, grid, block, arguments, in_place })
}

/// FNV-1a.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

fn name(kernel: &Kernel) -> &'static str {
    match kernel {
        Kernel::Fused(_) => "a fused kernel",
        Kernel::Own { op, .. } => op.name(),
        Kernel::Copy { .. } | Kernel::Store { .. } => "a copy",
    }
}

fn items(places: &Places, kernel: &Kernel, libraries: &dyn Libraries) -> Result<Vec<Item>, ScheduleError> {
    let rendered = |drafts: Vec<Draft>| drafts.into_iter().map(Item::Draft).collect();
    Ok(match kernel {
        Kernel::Fused(kernel) => {
            for id in kernel.inputs.iter().map(|i| i.source).chain(kernel.outputs.iter().map(|o| o.target)) {
                places.of(id).ok_or(ScheduleError::NoPlace(id))?;
            }
            let place = |id| places.of(id).unwrap_or(Address { block: Block::Arena, offset: 0 });
            rendered(fused(kernel, place))
        }
        Kernel::Copy { node, input } => rendered(vec![own::copy(&places.source(input)?, places.target(*node)?)]),
        Kernel::Store { leaf, value } => rendered(vec![own::copy(&places.source(value)?, places.target(*leaf)?)]),
        Kernel::Own { op, node, inputs, shape, moments } => {
            check_layout(op)?;
            let to = places.target(*node)?;
            let inputs: Vec<Source> = inputs.iter().map(|i| places.source(i)).collect::<Result<_, _>>()?;
            let taken = match op {
                Op::Matmul => library::matmul(libraries, &inputs[0], &inputs[1], to),
                _ => convolution(op, &inputs, to, shape, libraries),
            };
            let mut items = match taken {
                Some(items) => items,
                None => rendered(own(op, &inputs, to, shape)?),
            };
            if let Some(moments) = moments {
                let dims = library::dense(shape);
                let view = Operand { source: *node, offset: 0, dims };
                let y = Source { at: to.at, element: to.element, view: &view, node: Some(*node) };
                let cols = shape.last().copied().unwrap_or(1);
                let moments =
                    crate::render::moments::moments(&y, y.elements() / cols.max(1), cols, places.target(*moments)?);
                items.extend(moments.into_iter().map(Item::Draft));
            }
            items
        }
    })
}

/// A convolution by the library, if the op is one and the library takes it.
fn convolution(
    op: &Op,
    inputs: &[Source],
    to: Target,
    shape: &[usize],
    libraries: &dyn Libraries,
) -> Option<Vec<Item>> {
    let (conv, direction) = match op {
        Op::Conv2d(conv) => (conv, Direction::Forward),
        Op::Conv2dInputGrad(conv) => (conv, Direction::InputGradient),
        Op::Conv2dWeightGrad(conv) => (conv, Direction::WeightGradient),
        _ => return None,
    };
    let [first, second] = inputs else { return None };
    let (a, b) = (first.sizes(), second.sizes());
    let (x, w, y) = match direction {
        Direction::Forward => (a.as_slice(), b.as_slice(), shape),
        Direction::InputGradient => (shape, b.as_slice(), a.as_slice()),
        Direction::WeightGradient => (a.as_slice(), shape, b.as_slice()),
    };
    library::convolution(libraries, &library::Sizes { conv, x, w, y }, direction, [first, second], to)
}

fn own(op: &Op, inputs: &[Source], to: Target, shape: &[usize]) -> Result<Vec<Draft>, ScheduleError> {
    let sizes = |i: usize| inputs[i].sizes();
    Ok(match op {
        Op::Matmul => product::matmul(&inputs[0], &inputs[1], to),
        Op::Conv2d(conv) => {
            let sizes = Convolution { conv, input: &sizes(0), weight: &sizes(1), output: shape };
            sizes.forward(&inputs[0], &inputs[1], to)
        }
        Op::Conv2dInputGrad(conv) => {
            let sizes = Convolution { conv, input: shape, weight: &sizes(1), output: &sizes(0) };
            sizes.input_grad(&inputs[0], &inputs[1], to)
        }
        Op::Conv2dWeightGrad(conv) => {
            let sizes = Convolution { conv, input: &sizes(0), weight: shape, output: &sizes(1) };
            sizes.weight_grad(&inputs[0], &inputs[1], to)
        }
        Op::MaxPool2d(pool) => vec![Pooling { pool, input: &sizes(0), output: shape }.max(&inputs[0], to)],
        Op::MaxPool2dGrad(pool) => {
            Pooling { pool, input: shape, output: &sizes(1) }.max_grad(&inputs[0], &inputs[1], to)
        }
        Op::AvgPool2d(pool) => vec![Pooling { pool, input: &sizes(0), output: shape }.average(&inputs[0], to)],
        Op::AvgPool2dGrad(pool) => {
            vec![Pooling { pool, input: shape, output: &sizes(0) }.average_grad(&inputs[0], to)]
        }
        Op::Moments => moments::moments(&inputs[0], inputs[0].elements() / shape[1], shape[1], to),
        Op::Gather => vec![own::gather(&inputs[0], &inputs[1], to)],
        Op::ScatterAdd => vec![own::scatter_add(&inputs[0], &inputs[1], to, shape)],
        Op::Scatter => {
            let mut drafts = Vec::new();
            if inputs[0].at != to.at {
                drafts.push(own::copy(&inputs[0], to));
            }
            drafts.push(own::scatter(&inputs[1], &inputs[2], to, shape));
            drafts
        }
        Op::Pad { before, value, .. } => vec![own::block(&inputs[0], to, shape, before, Some(*value as f32))],
        Op::Concat { axis } => {
            let mut before = vec![0; shape.len()];
            let (mut drafts, mut offset) = (Vec::new(), 0);
            for input in inputs {
                // Parts that were computed in place are there already.
                let here = input.at == to.at.plus(offset) && shape[..*axis].iter().all(|&d| d == 1);
                if !here {
                    drafts.push(own::block(input, to, shape, &before, None));
                }
                offset += input.elements() * to.element.bytes();
                before[*axis] += input.view.dims[*axis].0;
            }
            drafts
        }
        other => return Err(ScheduleError::Unsupported { op: other.name(), layout: "a kernel of its own".into() }),
    })
}

fn check_layout(op: &Op) -> Result<(), ScheduleError> {
    let layout = match op {
        Op::Conv2d(c) | Op::Conv2dInputGrad(c) | Op::Conv2dWeightGrad(c) => c.layout,
        Op::MaxPool2d(p) | Op::MaxPool2dGrad(p) | Op::AvgPool2d(p) | Op::AvgPool2dGrad(p) => p.layout,
        _ => return Ok(()),
    };
    match layout {
        Layout::Nhwc => Ok(()),
        Layout::Nchw => Err(ScheduleError::Unsupported { op: op.name(), layout: "NCHW".into() }),
    }
}
