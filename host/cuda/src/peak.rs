//! What a machine can do at most: products of matrices and copies of memory. A step's kernels are held against it.

use crate::executor::{Buffer, ExecuteError};
use crate::launch::{Address, Block, Work};
use crate::library::{self, Item};
use crate::machine::{Handle, Machine};
use crate::render::own::{Source, Target};
use crate::render::{fused, product};
use crate::schedule::standalone;
use clip_host_compiler::kernel::{Element, Fused, Input, Instr, Operand, Output, Pattern, Rank, Rounding, Store};
use std::sync::Arc;

/// Runs of one measurement; the fastest of [`ROUNDS`] counts.
const RUNS: usize = 10;
const ROUNDS: usize = 3;

/// The limits of a GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peaks {
    /// 10⁹ multiplications and additions a second in a large product of f32 matrices.
    pub gemm_f32: f64,
    /// The same with bf16 operands and results, summed in f32.
    pub gemm_bf16: f64,
    /// 10⁹ bytes a second in a copy of memory, bytes read plus bytes written.
    pub copy: f64,
}

/// Measures the limits with matrices of `size` rows and columns, of random numbers, and copies of as many bf16 matrices as an
/// f32 matrix has bytes: 8192 fills a large GPU.
///
/// # Errors
/// If the machine cannot run it.
pub fn measure(machine: &Arc<dyn Machine>, size: usize) -> Result<Peaks, ExecuteError> {
    let gemm = |element| -> Result<f64, ExecuteError> {
        let seconds = product_seconds(machine, size, element)?;
        Ok(2.0 * (size as f64).powi(3) / seconds / 1e9)
    };
    let (gemm_f32, gemm_bf16) = (gemm(Element::F32)?, gemm(Element::Bf16)?);
    let elements = 4 * size * size;
    let copy = (2 * 4 * elements) as f64 / copy_seconds(machine, elements)? / 1e9;
    Ok(Peaks { gemm_f32, gemm_bf16, copy })
}

fn at(block: usize) -> Address {
    Address { block: Block::Leaf(block), offset: 0 }
}

/// Numbers in ±1, as a tensor of random values has them: products of zeros are faster.
fn random(elements: usize, element: Element) -> Vec<u8> {
    let words = (0..elements as u64).map(clip_host_plugin_api::interpret::mix);
    match element {
        // Signs and mantissas at random, exponents below that of 1.
        Element::Bf16 => words.flat_map(|w| ((w >> 48) as u16 & 0x80ff | 0x3f00).to_le_bytes()).collect(),
        _ => words.flat_map(|w| ((w >> 32) as u32 & 0x80ff_ffff | 0x3f00_0000).to_le_bytes()).collect(),
    }
}

fn product_seconds(machine: &Arc<dyn Machine>, size: usize, element: Element) -> Result<f64, ExecuteError> {
    let bytes = size * size * element.bytes();
    let memory = [(); 3].map(|()| Buffer::new(machine, bytes));
    let [a, b, c] = memory;
    let memory = [a?, b?, c?];
    for operand in &memory[..2] {
        machine.upload(operand.address(), &random(size * size, element))?;
    }
    let view = Operand { source: 0, offset: 0, dims: vec![(size, size), (size, 1)] };
    let source = |block| Source { at: at(block), element, view: &view, node: None };
    let to = Target { at: at(2), element, node: None };
    let items = match library::matmul(machine.as_ref(), &source(0), &source(1), to) {
        Some(items) => items,
        None => product::matmul(&source(0), &source(1), to).into_iter().map(Item::Draft).collect(),
    };
    seconds(machine, items, &memory)
}

fn copy_seconds(machine: &Arc<dyn Machine>, elements: usize) -> Result<f64, ExecuteError> {
    let memory = [Buffer::new(machine, 4 * elements)?, Buffer::new(machine, 4 * elements)?];
    let (dtype, rank) = (Element::F32, Rank::Full);
    let kernel = Fused {
        rows: 1,
        cols: elements,
        dims: vec![1, elements],
        inner: 1,
        inputs: vec![Input { source: 0, offset: 0, rank, dtype, pattern: Pattern::Same }],
        code: vec![(Instr::Load(0), rank)],
        outputs: vec![Output { target: 1, value: 0, store: Store::Each, dtype, rounding: Rounding::Nearest }],
        nodes: vec![],
    };
    let items = fused(&kernel, |id| at(id as usize)).into_iter().map(Item::Draft).collect();
    seconds(machine, items, &memory)
}

/// Seconds of one run of all items; leaves are the memory's buffers.
fn seconds(machine: &Arc<dyn Machine>, items: Vec<Item>, memory: &[Buffer]) -> Result<f64, ExecuteError> {
    let mut work = Vec::new();
    let mut scratch = 0;
    for item in items {
        let (work_item, function) = match item {
            Item::Draft(draft) => {
                let (function, launch) = standalone(draft);
                (Work::Launch(launch), machine.load(&[function])?[0])
            }
            Item::Work(work) => (work, Handle(0)),
        };
        for argument in work_item.arguments().iter().filter(|a| a.at.block == Block::Scratch) {
            scratch = scratch.max(argument.at.offset + argument.bytes);
        }
        work.push((work_item, function));
    }
    let scratch = Buffer::new(machine, scratch)?;
    let address = |at: Address| match at.block {
        Block::Leaf(index) => memory[index].address() + at.offset as u64,
        _ => scratch.address() + at.offset as u64,
    };
    let run = || -> Result<(), ExecuteError> {
        for (work, function) in &work {
            let arguments: Vec<u64> = work.arguments().iter().map(|a| address(a.at)).collect();
            match work {
                Work::Launch(launch) => machine.launch(*function, launch, &arguments)?,
                Work::Product(product) => machine.multiply(product, &arguments)?,
                Work::Convolution(convolution) => machine.convolve(convolution, &arguments)?,
            }
        }
        Ok(())
    };
    run()?;
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        machine.note_moment()?;
        (0..RUNS).try_for_each(|_| run())?;
        machine.note_moment()?;
        let moments = machine.moments()?;
        best = best.min((moments[1] - moments[0]) / 1e3 / RUNS as f64);
    }
    Ok(best)
}
