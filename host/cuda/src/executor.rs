//! Runs a plan on a [`Machine`].

use crate::launch::{Address, Block, Launch, Schedule, Work, control};
use crate::machine::{Handle, Machine, MachineError, Recording};
use crate::render::own::{self, Target};
use crate::schedule::{Places, ScheduleError, schedule, standalone};
use crate::verify::{self, VerifyError};
use clip_host_compiler::kernel::{Element, Operand};
use clip_host_compiler::plan::Plan;
use clip_host_plugin_api::ir::{DType, Op};
use half::f16;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use thiserror::Error;

/// Bytes up to which inputs travel together.
const SMALL: usize = 1 << 18;
/// Scalar results that travel together, at most: a kernel's parameters have room for so many addresses and more.
const MOST_SCALARS: usize = 256;

/// Why a plan could not be prepared or run.
#[derive(Debug, Error)]
pub enum ExecuteError {
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    #[error(transparent)]
    Verify(#[from] VerifyError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("an id lies outside its table (hint: check `vocab_size` and the sizes of per-sample tables)")]
    BadId,
    #[error("`{name}` has {expected} elements, {got} were given")]
    Size { name: String, expected: usize, got: usize },
    #[error("`{name}` is kept as {expected}, asked for as {got}")]
    Kept { name: String, expected: &'static str, got: &'static str },
    #[error("there is no {what} `{name}`")]
    Unknown { what: &'static str, name: String },
}

/// Memory of a machine, given back when dropped.
#[derive(Debug)]
pub struct Buffer {
    machine: Arc<dyn Machine>,
    address: u64,
}

impl Buffer {
    /// Takes memory, filled with zeros.
    pub fn new(machine: &Arc<dyn Machine>, bytes: usize) -> Result<Buffer, MachineError> {
        Ok(Buffer { machine: machine.clone(), address: machine.alloc(bytes.max(256))? })
    }
}

impl Buffer {
    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.machine.free(self.address);
    }
}

/// Persistent tensors, shared by all programs of a model.
#[derive(Debug)]
pub struct Store {
    machine: Arc<dyn Machine>,
    names: HashMap<String, usize>,
    tensors: Vec<(Arc<Buffer>, usize, Element)>,
}

impl Store {
    pub fn new(machine: Arc<dyn Machine>) -> Store {
        Store { machine, names: HashMap::new(), tensors: Vec::new() }
    }

    /// The index of a tensor, made (zero) if it is not there.
    pub fn entry(&mut self, name: &str, elements: usize, element: Element) -> Result<usize, ExecuteError> {
        if let Some(&index) = self.names.get(name) {
            let (_, known, kept) = &self.tensors[index];
            check_size(name, *known, elements)?;
            return match *kept == element {
                true => Ok(index),
                false => Err(ExecuteError::Kept { name: name.into(), expected: kept.name(), got: element.name() }),
            };
        }
        let buffer = Arc::new(Buffer::new(&self.machine, elements * element.bytes())?);
        self.tensors.push((buffer, elements, element));
        self.names.insert(name.into(), self.tensors.len() - 1);
        Ok(self.tensors.len() - 1)
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// Number of a tensor's elements.
    pub fn len(&self, name: &str) -> Option<usize> {
        self.names.get(name).map(|&index| self.tensors[index].1)
    }

    /// A part of a tensor; `None` if it is not there.
    pub fn get(&self, name: &str, offset: usize, len: usize) -> Result<Option<Vec<f32>>, ExecuteError> {
        let Some(&index) = self.names.get(name) else { return Ok(None) };
        let (buffer, elements, element) = &self.tensors[index];
        if offset + len > *elements {
            return Err(ExecuteError::Size { name: name.into(), expected: *elements, got: offset + len });
        }
        let at = buffer.address + (offset * element.bytes()) as u64;
        Ok(Some(download(&self.machine, at, len, *element)?))
    }

    /// Sets a tensor's values from `offset` elements on.
    pub fn set(&mut self, name: &str, offset: usize, values: &[f32]) -> Result<(), ExecuteError> {
        let Some(&index) = self.names.get(name) else {
            return Err(ExecuteError::Unknown { what: "tensor", name: name.into() });
        };
        let (buffer, elements, element) = &self.tensors[index];
        if offset + values.len() > *elements {
            return Err(ExecuteError::Size { name: name.into(), expected: *elements, got: offset + values.len() });
        }
        let at = buffer.address + (offset * element.bytes()) as u64;
        Ok(self.machine.upload(at, &encoded(values, *element))?)
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.tensors.iter().map(|(_, elements, element)| elements * element.bytes()).sum()
    }
}

/// Values as they are kept.
fn encoded(values: &[f32], element: Element) -> Vec<u8> {
    // A loop over pieces of one size is a copy to the compiler; an iterator of bytes is not.
    fn pieces<const N: usize>(values: &[f32], encode: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * N];
        bytes.as_chunks_mut::<N>().0.iter_mut().zip(values).for_each(|(piece, &v)| *piece = encode(v));
        bytes
    }
    match element {
        Element::F32 => pieces(values, f32::to_le_bytes),
        Element::I32 => pieces(values, |v| (v as i32).to_le_bytes()),
        Element::Bf16 => pieces(values, |v| bf16_bits(v).to_le_bytes()),
        Element::F16 => pieces(values, |v| f16::from_f32(v).to_le_bytes()),
    }
}

/// Rounded to nearest even; NaN stays NaN.
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    match value.is_nan() {
        true => (bits >> 16) as u16 | 0x40,
        false => ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16,
    }
}

fn download(
    machine: &Arc<dyn Machine>,
    address: u64,
    elements: usize,
    element: Element,
) -> Result<Vec<f32>, MachineError> {
    let mut bytes = vec![0; elements * element.bytes()];
    machine.download(address, &mut bytes)?;
    let words = || bytes.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
    Ok(match element {
        Element::F32 => words().map(f32::from_le_bytes).collect(),
        Element::I32 => words().map(|b| i32::from_le_bytes(b) as f32).collect(),
        Element::Bf16 => {
            let halves = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
            halves.map(|h| f32::from_bits(u32::from(h) << 16)).collect()
        }
        Element::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
    })
}

/// A plan made ready: kernels compiled, memory taken once, addresses fixed.
pub struct Executor {
    plan: Arc<Plan>,
    machine: Arc<dyn Machine>,
    schedule: Schedule,
    /// For each piece of work: its function and the addresses of its arguments.
    ready: Vec<(Handle, Vec<u64>)>,
    /// Addresses of the plan's leaves, in their order.
    leaves: Vec<u64>,
    /// The memory behind the addresses.
    _memory: Vec<Arc<Buffer>>,
    arena: u64,
    control: u64,
    /// What the control block is to hold when a run begins: the seed, a flag of 0, small inputs.
    host: Vec<u8>,
    /// Where in it each small input is, by its leaf.
    small: HashMap<usize, Range<usize>>,
    collect: Option<Collect>,
    /// Numbers of the scalar results, and their values after the last run.
    scalars: HashMap<String, usize>,
    results: Vec<f32>,
    inputs: HashMap<String, usize>,
    /// The whole step, once it has run as single launches.
    recording: Option<Recording>,
    runs: u64,
    /// Milliseconds of each of the plan's kernels in the last run, if they are measured.
    timings: Option<Vec<f64>>,
    /// Images that come as pixels.
    pixels: Option<PixelInput>,
}

/// The launch that brings scalar results together.
struct Collect {
    function: Handle,
    launch: Launch,
    arguments: Vec<u64>,
}

/// How images get to their input.
struct PixelInput {
    /// Pixels arrive in turns: one slot is filled while the other is read.
    slots: [Buffer; 2],
    slot: usize,
    levels: Buffer,
    /// What the table on the device holds.
    levels_of: Option<[[f32; 256]; 3]>,
    function: Handle,
    launch: Launch,
    /// The input's memory.
    to: u64,
    /// Whether pixels were sent that no run has used.
    sent: bool,
}

impl Executor {
    /// Prepares a plan; persistent leaves are found in, or added to, the store.
    pub fn new(plan: Plan, machine: Arc<dyn Machine>, store: &mut Store) -> Result<Executor, ExecuteError> {
        let schedule = schedule(&plan, machine.as_ref())?;
        verify::verify(&plan, &schedule)?;
        let plan = Arc::new(plan);
        let mut memory = Vec::new();
        let mut take = |bytes: usize| -> Result<u64, ExecuteError> {
            let buffer = Arc::new(Buffer::new(&machine, bytes)?);
            memory.push(buffer.clone());
            Ok(buffer.address)
        };
        let (arena, scratch) = (take(plan.arena)?, take(schedule.scratch)?);
        // One copy a step takes the seed and all small inputs, another brings all scalar results.
        let mut host = vec![0; control::BYTES.next_multiple_of(256)];
        let mut small = HashMap::new();
        for (index, &id) in plan.leaves.iter().enumerate() {
            let node = &plan.nodes[id as usize];
            let bytes = node.elements() * plan.storage[id as usize].bytes();
            // Images may come as pixels, beside the other inputs.
            if matches!(node.op, Op::Input { .. }) && bytes <= SMALL && node.shape.len() < 4 {
                small.insert(index, host.len()..host.len() + bytes);
                host.resize((host.len() + bytes).next_multiple_of(256), 0);
            }
        }
        let scalars: Vec<(String, Operand)> =
            plan.outputs.iter().filter(|(_, view)| elements(view) == 1).take(MOST_SCALARS).cloned().collect();
        let control = take(host.len() + 4 * scalars.len())?;
        let (mut leaves, mut inputs) = (Vec::new(), HashMap::new());
        let mut stored = Vec::new();
        for (index, &id) in plan.leaves.iter().enumerate() {
            let (node, element) = (&plan.nodes[id as usize], plan.storage[id as usize]);
            let elements = node.elements();
            leaves.push(match &node.op {
                Op::Param { name, .. } | Op::State { name, .. } => {
                    let entry = store.entry(name, elements, element)?;
                    let buffer = store.tensors[entry].0.clone();
                    stored.push(buffer.clone());
                    buffer.address
                }
                Op::Literal { values } => {
                    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
                    let address = take(elements * element.bytes())?;
                    machine.upload(address, &encoded(&values, element))?;
                    address
                }
                Op::Input { name } => {
                    inputs.insert(name.clone(), index);
                    match small.get(&index) {
                        Some(place) => control + place.start as u64,
                        None => take(elements * element.bytes())?,
                    }
                }
                other => {
                    return Err(ScheduleError::Unsupported { op: other.name(), layout: "a leaf's place".into() }.into());
                }
            });
        }
        memory.extend(stored);
        let handles = machine.load(&schedule.functions)?;
        let address = |at: Address| {
            let base = match at.block {
                Block::Arena => arena,
                Block::Leaf(index) => leaves[index],
                Block::Scratch => scratch,
                _ => control,
            };
            base + at.offset as u64
        };
        let ready = schedule
            .work
            .iter()
            .map(|(work, _)| {
                let function = match work {
                    Work::Launch(launch) => handles[launch.function],
                    Work::Product(product) => Handle(product.ready),
                    Work::Convolution(convolution) => Handle(convolution.ready),
                };
                (function, work.arguments().iter().map(|a| address(a.at)).collect())
            })
            .collect();
        let collect = match scalars.is_empty() {
            true => None,
            false => {
                let places = Places::new(&plan);
                let sources: Vec<(Address, Element)> = scalars
                    .iter()
                    .map(|(_, view)| {
                        let element = plan.storage[view.source as usize];
                        let at = places.of(view.source).ok_or(ScheduleError::NoPlace(view.source))?;
                        Ok((at.plus(view.offset * element.bytes()), element))
                    })
                    .collect::<Result<_, ScheduleError>>()?;
                let results = Address { block: Block::Control, offset: host.len() };
                let (function, launch) = standalone(own::collect(&sources, results));
                let arguments = launch.arguments.iter().map(|a| address(a.at)).collect();
                Some(Collect { function: machine.load(&[function])?[0], launch, arguments })
            }
        };
        let results = vec![0.0; scalars.len()];
        let scalars = scalars.into_iter().enumerate().map(|(at, (name, _))| (name, at)).collect();
        Ok(Executor {
            plan,
            machine,
            schedule,
            ready,
            leaves,
            _memory: memory,
            arena,
            control,
            host,
            small,
            collect,
            scalars,
            results,
            inputs,
            recording: None,
            runs: 0,
            timings: None,
            pixels: None,
        })
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The work, in order.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// Whether the program reads an input of this name.
    pub fn has_input(&self, name: &str) -> bool {
        self.inputs.contains_key(name)
    }

    /// From now on measures every kernel: they run one by one instead of as one recording.
    pub fn time_kernels(&mut self) {
        self.timings = Some(vec![0.0; self.plan.kernels.len()]);
    }

    /// Milliseconds of each of the plan's kernels in the last run, if they are measured.
    pub fn timings(&self) -> Option<&[f64]> {
        self.timings.as_deref()
    }

    /// Fills an f32 input; one that the program does not read is passed over.
    pub fn set_f32(&mut self, name: &str, values: &[f32]) -> Result<(), ExecuteError> {
        let Some(&index) = self.inputs.get(name) else { return Ok(()) };
        let id = self.plan.leaves[index] as usize;
        check_size(name, self.plan.nodes[id].elements(), values.len())?;
        self.set_input(index, &encoded(values, self.plan.storage[id]))
    }

    fn set_input(&mut self, index: usize, bytes: &[u8]) -> Result<(), ExecuteError> {
        match self.small.get(&index) {
            Some(place) => self.host[place.clone()].copy_from_slice(bytes),
            None => self.machine.upload(self.leaves[index], bytes)?,
        }
        Ok(())
    }

    /// Fills an i32 input; one that the program does not read is passed over.
    pub fn set_i32(&mut self, name: &str, values: &[i32]) -> Result<(), ExecuteError> {
        let Some(&index) = self.inputs.get(name) else { return Ok(()) };
        let node = &self.plan.nodes[self.plan.leaves[index] as usize];
        check_size(name, node.elements(), values.len())?;
        if node.dtype != DType::I32 {
            return Err(ExecuteError::Kept { name: name.into(), expected: "f32", got: "i32" });
        }
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.set_input(index, &bytes)
    }

    /// Fills an input of images `[n, 3, height, width]` with their pixels `[n, height, width, 3]`, normalised on the device: each
    /// byte by its channel's table. Without pixels, those that were sent ahead are taken.
    pub fn set_pixels(
        &mut self,
        name: &str,
        pixels: Option<&[u8]>,
        levels: &[[f32; 256]; 3],
    ) -> Result<(), ExecuteError> {
        if !self.has_input(name) {
            return Ok(());
        }
        if let Some(pixels) = pixels {
            self.send_pixels(name, pixels)?;
        }
        let not_sent = || ExecuteError::Unknown { what: "batch of pixels sent ahead for", name: name.into() };
        let on = self.pixels.as_mut().filter(|on| on.sent).ok_or_else(not_sent)?;
        on.sent = false;
        if on.levels_of.as_ref() != Some(levels) {
            let values: Vec<f32> = levels.iter().flatten().copied().collect();
            self.machine.upload(on.levels.address, &encoded(&values, Element::F32))?;
            on.levels_of = Some(*levels);
        }
        let slot = on.slot;
        self.machine.receive(slot)?;
        let arguments = [on.slots[slot].address, on.levels.address, on.to];
        self.machine.launch(on.function, &on.launch, &arguments)?;
        Ok(self.machine.release(slot)?)
    }

    /// Begins to copy the coming run's pixels to the device, while this run goes on.
    pub fn send_pixels(&mut self, name: &str, pixels: &[u8]) -> Result<(), ExecuteError> {
        let Some(&index) = self.inputs.get(name) else { return Ok(()) };
        let id = self.plan.leaves[index] as usize;
        let node = &self.plan.nodes[id];
        check_size(name, node.elements(), pixels.len())?;
        if self.pixels.is_none() {
            let shape = <[usize; 4]>::try_from(node.shape.as_slice());
            let no_images = |_| ExecuteError::Kept { name: name.into(), expected: "no images", got: "pixels" };
            let shape = shape.map_err(no_images)?;
            let buffer = |bytes| Buffer::new(&self.machine, bytes);
            let (slots, levels) = ([buffer(pixels.len())?, buffer(pixels.len())?], buffer(3 * 256 * 4)?);
            let at = |block| Address { block, offset: 0 };
            let to = Target { at: at(Block::Leaf(index)), element: self.plan.storage[id], node: None };
            let draft = own::normalize(at(Block::Pixels(0)), at(Block::Levels), to, shape);
            let (function, launch) = standalone(draft);
            let function = self.machine.load(&[function])?[0];
            let to = self.leaves[index];
            self.pixels =
                Some(PixelInput { slots, slot: 1, levels, levels_of: None, function, launch, to, sent: false });
        }
        let Some(on) = &mut self.pixels else { return Ok(()) };
        on.slot = 1 - on.slot;
        self.machine.send(on.slot, on.slots[on.slot].address, pixels)?;
        on.sent = true;
        Ok(())
    }

    /// Runs the program once. `seed` drives its random numbers.
    pub fn run(&mut self, seed: u64) -> Result<(), ExecuteError> {
        self.start(seed)?;
        self.finish()
    }

    /// Begins to run the program. The first run launches kernel by kernel, the second records the whole step, later ones
    /// replay it.
    pub fn start(&mut self, seed: u64) -> Result<(), ExecuteError> {
        self.host[control::SEED..control::SEED + 8].copy_from_slice(&seed.to_le_bytes());
        self.machine.upload(self.control, &self.host)?;
        self.runs += 1;
        if self.timings.is_some() {
            return self.start_timed();
        }
        match self.recording {
            Some(recording) => self.machine.replay(recording)?,
            None if self.runs == 2 => match self.record() {
                Ok(Some(recording)) => {
                    self.recording = Some(recording);
                    self.machine.replay(recording)?;
                }
                Ok(None) => self.launch_all()?,
                Err(error) => {
                    tracing::warn!("the step is launched kernel by kernel, which is slower: {error}");
                    self.launch_all()?;
                }
            },
            None => self.launch_all()?,
        }
        Ok(())
    }

    /// The whole step as one recording; `None` if the machine makes none.
    fn record(&self) -> Result<Option<Recording>, ExecuteError> {
        if !self.machine.begin_recording()? {
            return Ok(None);
        }
        let launched = self.launch_all();
        // Recording ends in any case: the stream would stay in it.
        let recording = self.machine.end_recording();
        if let (Err(_), Ok(part)) = (&launched, &recording) {
            self.machine.forget(*part);
        }
        launched?;
        Ok(Some(recording?))
    }

    /// Waits for the run.
    pub fn finish(&mut self) -> Result<(), ExecuteError> {
        let mut results = vec![0; 4 * self.results.len()];
        self.machine.download(self.control + self.host.len() as u64, &mut results)?;
        self.results.iter_mut().zip(results.as_chunks().0).for_each(|(v, bytes)| *v = f32::from_le_bytes(*bytes));
        let mut flag = [0; 4];
        self.machine.download(self.control + control::BAD_ID as u64, &mut flag)?;
        if let Some(timings) = &mut self.timings {
            let moments = self.machine.moments()?;
            timings.iter_mut().for_each(|t| *t = 0.0);
            for ((_, kernel), pair) in self.schedule.work.iter().zip(moments.windows(2)) {
                timings[*kernel] += pair[1] - pair[0];
            }
        }
        if flag == [0; 4] { Ok(()) } else { Err(ExecuteError::BadId) }
    }

    /// Enqueues one piece of work.
    fn start_work(&self, number: usize) -> Result<(), ExecuteError> {
        let (function, arguments) = &self.ready[number];
        match &self.schedule.work[number].0 {
            Work::Launch(launch) => self.machine.launch(*function, launch, arguments)?,
            Work::Product(product) => self.machine.multiply(product, arguments)?,
            Work::Convolution(convolution) => self.machine.convolve(convolution, arguments)?,
        }
        Ok(())
    }

    fn launch_all(&self) -> Result<(), ExecuteError> {
        (0..self.ready.len()).try_for_each(|number| self.start_work(number))?;
        self.collect()
    }

    /// Brings the scalar results together.
    fn collect(&self) -> Result<(), ExecuteError> {
        match &self.collect {
            Some(collect) => Ok(self.machine.launch(collect.function, &collect.launch, &collect.arguments)?),
            None => Ok(()),
        }
    }

    fn start_timed(&mut self) -> Result<(), ExecuteError> {
        self.machine.note_moment()?;
        for number in 0..self.ready.len() {
            self.start_work(number)?;
            self.machine.note_moment()?;
        }
        self.collect()
    }

    /// A result of the last run, contiguous.
    pub fn output(&self, name: &str) -> Result<Option<Vec<f32>>, ExecuteError> {
        if let Some(&at) = self.scalars.get(name) {
            return Ok(Some(vec![self.results[at]]));
        }
        let Some((_, operand)) = self.plan.outputs.iter().find(|(n, _)| n == name) else { return Ok(None) };
        let at = Places::new(&self.plan).of(operand.source).ok_or(ScheduleError::NoPlace(operand.source))?;
        let element = self.plan.storage[operand.source as usize];
        let base = match at.block {
            Block::Arena => self.arena,
            Block::Leaf(index) => self.leaves[index],
            _ => return Ok(None),
        };
        let address = base + (at.offset + operand.offset * element.bytes()) as u64;
        Ok(Some(download(&self.machine, address, elements(operand), element)?))
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        // A recording keeps all memory that there was in its time.
        if let Some(recording) = self.recording.take() {
            self.machine.forget(recording);
        }
    }
}

fn elements(view: &Operand) -> usize {
    view.dims.iter().map(|d| d.0).product()
}

fn check_size(name: &str, expected: usize, got: usize) -> Result<(), ExecuteError> {
    match expected == got {
        true => Ok(()),
        false => Err(ExecuteError::Size { name: name.into(), expected, got }),
    }
}
