//! Whether the launches of one of the plan's kernels are what that kernel needs: all that it reads, in its order and no other
//! part; all that it writes, whole; and its own scratch, as it was written.

use crate::launch::{Access, Argument, Block, Convolution, Product, Schedule, Work, control};
use crate::schedule::Places;
use clip_host_compiler::kernel::{Fused, Kernel};
use clip_host_compiler::plan::Plan;
use clip_host_cuda_driver::dnn::Direction;
use clip_host_plugin_api::ir::{NodeId, Op};
use std::collections::HashMap;

/// A value and the bytes of its memory's block that are read: from, to.
type Part = (NodeId, usize, usize);

/// What the kernel reads, in its order; not what lies in its result already.
fn expected_reads(plan: &Plan, places: &Places, kernel: &Kernel) -> Result<Vec<Part>, String> {
    let mut seen: HashMap<NodeId, usize> = HashMap::new();
    let mut parts = Vec::new();
    for source in kernel.reads() {
        let occurrence = seen.entry(source).or_insert(0);
        let range = kernel.reads_of(source).into_iter().nth(*occurrence).unwrap_or(0..0);
        *occurrence += 1;
        let in_place = match kernel {
            Kernel::Own { op: Op::Concat { .. } | Op::Scatter, node, .. } => super::nested(places, source, *node),
            _ => false,
        };
        if !in_place {
            let at = places.of(source).ok_or_else(|| format!("%{source} has no place"))?.offset;
            let bytes = plan.storage[source as usize].bytes();
            parts.push((source, at + range.start * bytes, at + range.end * bytes));
        }
    }
    Ok(parts)
}

fn part(argument: &Argument, node: NodeId) -> Part {
    (node, argument.at.offset, argument.at.offset + argument.bytes)
}

/// Checks the work of kernel number `number`.
pub(super) fn check(
    plan: &Plan,
    schedule: &Schedule,
    places: &Places,
    number: usize,
    works: &[&Work],
) -> Result<(), String> {
    let kernel = &plan.kernels[number];
    let results = kernel.writes();
    let mut reads: Vec<Part> = Vec::new();
    let mut written: Vec<NodeId> = Vec::new();
    for work in works {
        if let Work::Launch(launch) = work {
            let function = schedule.functions.get(launch.function).ok_or("its function is not there")?;
            let threads: u32 = launch.block.iter().product();
            if threads != function.threads {
                return Err(format!("blocks of {threads} threads for a function of {}", function.threads));
            }
            parameters(&function.text, &launch.arguments)?;
        }
        for argument in work.arguments() {
            let flag = (control::BAD_ID, 4, Access::Update);
            let seed = (control::SEED, 8, Access::Read);
            let held = (argument.at.offset, argument.bytes, argument.access);
            if argument.at.block == Block::Control && held != flag && held != seed {
                return Err(format!(
                    "bytes from {} of the control block are neither seed nor flag",
                    argument.at.offset
                ));
            }
            let Some(node) = argument.node else { continue };
            let is_result = results.contains(&node);
            match argument.access {
                Access::Read if is_result => whole(plan, places, argument, node)?,
                Access::Read => reads.push(part(argument, node)),
                _ if !is_result => return Err(format!("it writes %{node}, which is no result of its kernel")),
                _ => {
                    whole(plan, places, argument, node)?;
                    written.push(node);
                }
            }
        }
    }
    let mut expected = expected_reads(plan, places, kernel)?;
    let rendered = works.iter().all(|work| matches!(work, Work::Launch(_)));
    if !rendered {
        // What is copied for a library is read before what is not.
        reads.sort_unstable();
        expected.sort_unstable();
    }
    if reads != expected {
        return Err(format!("its kernel reads {expected:?}, the launches read {reads:?}"));
    }
    // The parts of a concatenation may all be there already.
    let joins = matches!(kernel, Kernel::Own { op: Op::Concat { .. }, .. });
    if let Some(missing) = results.iter().find(|r| !joins && !written.contains(r)) {
        return Err(format!("nothing writes %{missing}"));
    }
    scratch(works, rendered)?;
    match kernel {
        Kernel::Fused(fused) => outputs_in_order(fused, works),
        Kernel::Own { op, inputs, .. } => {
            let sources: Vec<NodeId> = inputs.iter().map(|i| i.source).collect();
            operands(op, &sources, works)
        }
        _ => Ok(()),
    }
}

/// Whether a function's parameters are what they are given: `const` where it is only read; `w…` is scratch, `seed` and `bad`
/// are in the control block.
fn parameters(text: &str, arguments: &[Argument]) -> Result<(), String> {
    let list = text.split("\n{").next().unwrap_or_default().trim_matches(['(', ')']);
    let fits = |(parameter, argument): (&str, &Argument)| {
        let name = parameter.rsplit(['*', ' ']).next().unwrap_or_default();
        let of_control = name == "seed" || name == "bad";
        parameter.trim_start().starts_with("const ") == (argument.access == Access::Read)
            && of_control == (argument.at.block == Block::Control)
            && (!name.starts_with('w') || argument.at.block == Block::Scratch)
    };
    let count = list.split(',').count();
    match count == arguments.len() && list.split(',').zip(arguments).all(fits) {
        true => Ok(()),
        false => Err(format!("its arguments are not what the function takes: {list}")),
    }
}

/// Whether an argument is all of its value.
fn whole(plan: &Plan, places: &Places, argument: &Argument, node: NodeId) -> Result<(), String> {
    let bytes = super::bytes_of(plan, node);
    match places.of(node) {
        Some(at) if at == argument.at && bytes == argument.bytes => Ok(()),
        place => Err(format!("%{node} has {bytes} bytes at {place:?}, not {} at {:?}", argument.bytes, argument.at)),
    }
}

/// Scratch is read as it was written; rendered kernels also read it in the order in which they wrote it.
fn scratch(works: &[&Work], rendered: bool) -> Result<(), String> {
    let mut waiting: Vec<(usize, usize)> = Vec::new();
    for work in works {
        let in_scratch = || work.arguments().iter().filter(|a| a.at.block == Block::Scratch);
        for argument in in_scratch().filter(|a| a.access == Access::Read) {
            let range = (argument.at.offset, argument.bytes);
            match waiting.iter().position(|&w| w == range) {
                Some(at) if at == 0 || !rendered => waiting.remove(at),
                _ => return Err(format!("bytes {range:?} of scratch are not what is to be read next: {waiting:?}")),
            };
        }
        waiting.extend(in_scratch().filter(|a| a.access != Access::Read).map(|a| (a.at.offset, a.bytes)));
    }
    match rendered && !waiting.is_empty() {
        true => Err(format!("scratch that nobody reads: {waiting:?}")),
        false => Ok(()),
    }
}

/// A fused kernel's results come in its own order, both those of the first launch and those that are joined after it.
fn outputs_in_order(fused: &Fused, works: &[&Work]) -> Result<(), String> {
    let number = |node: NodeId| fused.outputs.iter().position(|o| o.target == node);
    let of = |work: &Work| {
        let written = work.arguments().iter().filter(|a| a.access != Access::Read);
        written.filter_map(|a| number(a.node?)).collect::<Vec<_>>()
    };
    let (first, rest) = works.split_first().ok_or("it has no launch")?;
    let joined: Vec<usize> = rest.iter().flat_map(|work| of(work)).collect();
    let first = of(first);
    match first.is_sorted() && joined.is_sorted() && first.len() + joined.len() == fused.outputs.len() {
        true => Ok(()),
        false => Err(format!("results {first:?}, then {joined:?} are not in their kernel's order")),
    }
}

/// A library's operands are the op's, each in its place, or copies of them.
fn operands(op: &Op, inputs: &[NodeId], works: &[&Work]) -> Result<(), String> {
    let mut copied: HashMap<usize, NodeId> = HashMap::new();
    for work in works {
        let order = match (work, op) {
            (Work::Launch(launch), _) => {
                let mut read = launch.arguments.iter().filter(|a| a.access == Access::Read);
                let copy = launch.arguments.iter().find(|a| a.access == Access::Write && a.at.block == Block::Scratch);
                if let (Some(Argument { node: Some(node), .. }), None, Some(copy)) = (read.next(), read.next(), copy) {
                    copied.insert(copy.at.offset, *node);
                }
                continue;
            }
            (Work::Product(_), Op::Conv2dWeightGrad(_)) | (Work::Convolution(_), Op::Conv2dInputGrad(_)) => [1, 0],
            _ => [0, 1],
        };
        library(work)?;
        let read = work.arguments().iter().filter(|a| a.access == Access::Read);
        let read: Vec<Option<NodeId>> = read.map(|a| a.node.or_else(|| copied.get(&a.at.offset).copied())).collect();
        let expected: Vec<Option<NodeId>> = order.iter().map(|&i| inputs.get(i).copied()).collect();
        if read != expected {
            return Err(format!("the library is given {read:?}, expected {expected:?}"));
        }
    }
    Ok(())
}

/// Whether a library's operands are of the sizes that it was told, its result where it expects it, and then its workspace.
fn library(work: &Work) -> Result<(), String> {
    let (written, bytes, alignment) = match work {
        Work::Launch(_) => return Ok(()),
        Work::Product(Product { gemm, .. }) => {
            let result = gemm.batch * gemm.m * gemm.n * gemm.c.element.bytes();
            (2, [None, None, Some(result)], gemm.alignment)
        }
        Work::Convolution(Convolution { conv, .. }) => {
            let written = match conv.direction {
                Direction::InputGradient => 0,
                Direction::WeightGradient => 1,
                Direction::Forward => 2,
            };
            (written, conv.elements().map(|count| Some(count * conv.element.bytes())), 16)
        }
    };
    for (number, argument) in work.arguments().iter().enumerate() {
        let expected = bytes.get(number).copied().flatten().unwrap_or(argument.bytes);
        let (is_workspace, is_result) = (number == 3, number == written);
        let aligned = argument.at.offset.is_multiple_of(if is_workspace { 256 } else { alignment.max(1) });
        let in_scratch = argument.at.block == Block::Scratch && argument.node.is_none();
        let right = (argument.access == Access::Read) != (is_workspace || is_result)
            && argument.bytes == expected
            && aligned
            && (!is_workspace || in_scratch);
        if !right || number > 3 {
            return Err(format!("argument {number}, {argument:?}, is not what the library expects"));
        }
    }
    Ok(())
}
