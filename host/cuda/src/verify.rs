//! Checks launches against the planned buffers: what no kernel's own test can see. A wrong address on a GPU is another
//! value's memory, and no error.

use crate::launch::{Access, Address, Argument, Block, Launch, Schedule, Work, control};
use crate::schedule::Places;
use clip_host_compiler::plan::Plan;
use clip_host_plugin_api::ir::{NodeId, Op};
use std::collections::{BTreeMap, HashMap};
use thiserror::Error;

mod kernel;

/// Threads of a block at most, on every GPU that there is.
const MAX_THREADS: u64 = 1024;

/// A launch that does not fit the plan: a defect of the backend, found before anything runs.
#[derive(Debug, Error, PartialEq)]
#[error("launch {launch} of {kernel} does not fit the plan: {why} (hint: this is a defect of the CUDA backend)")]
pub struct VerifyError {
    pub launch: usize,
    pub kernel: String,
    pub why: String,
}

/// Who wrote the bytes from a place on, up to `end`.
#[derive(Clone, Copy, Debug)]
struct Written {
    end: usize,
    by: Option<NodeId>,
}

/// By block and start.
type Memory = HashMap<Block, BTreeMap<usize, Written>>;

/// Checks every launch: sizes, alignment, aliasing, and that what is read was written before by whom the plan says; and that
/// each kernel's launches, in the kernels' order, read and write what the kernel does, no more and no less.
///
/// # Errors
/// The first launch that does not fit.
pub fn verify(plan: &Plan, schedule: &Schedule) -> Result<(), VerifyError> {
    let places = Places::new(plan);
    let mut memory = Memory::new();
    for (number, &id) in plan.leaves.iter().enumerate() {
        record(&mut memory, Address { block: Block::Leaf(number), offset: 0 }, bytes_of(plan, id), Some(id));
    }
    record(&mut memory, Address { block: Block::Control, offset: 0 }, control::BYTES, None);
    let failed = |launch: usize, kernel: usize, why: String| {
        let kernel = plan.kernels.get(kernel).map_or("no kernel".into(), |k| k.describe(&plan.nodes));
        VerifyError { launch, kernel, why }
    };
    for (index, (work, kernel)) in schedule.work.iter().enumerate() {
        let before = index.checked_sub(1).map(|before| schedule.work[before].1);
        if *kernel >= plan.kernels.len() || before.is_some_and(|before| before > *kernel) {
            return Err(failed(index, *kernel, format!("kernel {kernel} follows kernel {before:?}")));
        }
        // What an earlier kernel left in scratch is no value.
        if before != Some(*kernel) {
            memory.remove(&Block::Scratch);
        }
        check(plan, schedule, &places, work, &mut memory).map_err(|why| failed(index, *kernel, why))?;
    }
    let mut rest = schedule.work.as_slice();
    for number in 0..plan.kernels.len() {
        let (own, behind) = rest.split_at(rest.iter().take_while(|(_, kernel)| *kernel == number).count());
        let first = schedule.work.len() - rest.len();
        let works: Vec<&Work> = own.iter().map(|(work, _)| work).collect();
        kernel::check(plan, schedule, &places, number, &works).map_err(|why| failed(first, number, why))?;
        rest = behind;
    }
    Ok(())
}

fn bytes_of(plan: &Plan, id: NodeId) -> usize {
    plan.nodes[id as usize].elements() * plan.storage[id as usize].bytes()
}

fn check(plan: &Plan, schedule: &Schedule, places: &Places, work: &Work, memory: &mut Memory) -> Result<(), String> {
    if let Work::Launch(launch) = work {
        check_grid(launch)?;
    }
    for (number, argument) in work.arguments().iter().enumerate() {
        place(plan, schedule, places, argument).map_err(|why| format!("argument {number}: {why}"))?;
        if argument.access != Access::Write {
            written(places, memory, argument).map_err(|why| format!("argument {number}: {why}"))?;
        }
    }
    aliasing(work)?;
    for argument in work.arguments().iter().filter(|a| a.access != Access::Read && a.at.block != Block::Control) {
        record(memory, argument.at, argument.bytes, argument.node);
    }
    Ok(())
}

fn check_grid(launch: &Launch) -> Result<(), String> {
    let product = |dims: [u32; 3]| dims.iter().map(|&d| u64::from(d)).product::<u64>();
    if product(launch.grid) == 0 || launch.grid[1] > 65_535 || launch.grid[2] > 65_535 {
        return Err(format!("a grid of {:?} blocks", launch.grid));
    }
    if !(1..=MAX_THREADS).contains(&product(launch.block)) {
        return Err(format!("blocks of {:?} threads", launch.block));
    }
    Ok(())
}

/// Whether an argument's bytes are inside its value's memory.
fn place(plan: &Plan, schedule: &Schedule, places: &Places, argument: &Argument) -> Result<(), String> {
    let Argument { at, bytes, align, node, access } = *argument;
    let size = match at.block {
        Block::Arena => plan.arena,
        Block::Leaf(index) => match plan.leaves.get(index) {
            Some(&leaf) => bytes_of(plan, leaf),
            None => return Err(format!("there is no leaf {index}")),
        },
        Block::Scratch => schedule.scratch,
        Block::Control => control::BYTES,
        Block::Pixels(_) | Block::Levels => return Err(format!("{:?} in a plan", at.block)),
    };
    let end = at.offset.saturating_add(bytes);
    if end > size {
        return Err(format!("bytes {}..{end} of {:?}, which has {size}", at.offset, at.block));
    }
    if align == 0 || at.offset % align != 0 {
        return Err(format!("byte {} of {:?} is read or written {align} bytes at a time", at.offset, at.block));
    }
    let Some(node) = node else {
        return match at.block {
            Block::Scratch | Block::Control => Ok(()),
            other => Err(format!("memory of {other:?} for no value")),
        };
    };
    let Some(planned) = places.of(node) else { return Err(format!("%{node} has no place")) };
    let room = planned.offset..planned.offset + bytes_of(plan, node);
    if planned.block != at.block || at.offset < room.start || end > room.end {
        return Err(format!(
            "bytes {}..{end} of {:?}, but %{node} is at {room:?} of {:?}",
            at.offset, at.block, planned.block
        ));
    }
    let fixed = |op: &Op| matches!(op, Op::Input { .. } | Op::Literal { .. });
    match at.block {
        Block::Leaf(index) if access != Access::Read && fixed(&plan.nodes[plan.leaves[index] as usize].op) => {
            Err(format!("%{} must not be written", plan.leaves[index]))
        }
        _ => Ok(()),
    }
}

/// Whether all that an argument reads was written last by its value, or by a part or a whole of it.
fn written(places: &Places, memory: &Memory, argument: &Argument) -> Result<(), String> {
    let Argument { at, bytes, node, access, .. } = *argument;
    let end = at.offset + bytes;
    let mut reached = at.offset;
    let Some(block) = memory.get(&at.block) else {
        // A result that is written in parts may begin as anything.
        return if access == Access::Update { Ok(()) } else { Err(format!("{:?} was not written", at.block)) };
    };
    let first = block.range(..=at.offset).next_back().map_or(at.offset, |(&start, _)| start);
    for (&start, piece) in block.range(first..end) {
        if piece.end <= reached {
            continue;
        }
        if start > reached && access == Access::Read {
            return Err(format!("byte {reached} of {:?} is read before it is written", at.block));
        }
        let related = match (node, piece.by) {
            (None, _) => true,
            (Some(_), None) => at.block != Block::Scratch,
            (Some(node), Some(by)) => {
                let leaf = matches!(at.block, Block::Leaf(_));
                node == by || leaf || nested(places, node, by)
            }
        };
        if !related && access == Access::Read {
            return Err(format!("bytes from {start} of {:?} hold %{:?} now, not %{node:?}", at.block, piece.by));
        }
        reached = piece.end;
    }
    match reached >= end || access == Access::Update {
        true => Ok(()),
        false => Err(format!("byte {reached} of {:?} is read before it is written", at.block)),
    }
}

/// Whether two values share an address because one is a part of the other.
fn nested(places: &Places, a: NodeId, b: NodeId) -> bool {
    let (Some(at), Some(bt)) = (places.of(a), places.of(b)) else { return false };
    let range = |at: Address, id: NodeId| at.offset..at.offset + places.bytes(id);
    let (ra, rb) = (range(at, a), range(bt, b));
    at.block == bt.block && ((ra.start <= rb.start && rb.end <= ra.end) || (rb.start <= ra.start && ra.end <= rb.end))
}

/// Whether what is written overlaps anything else only where that is allowed.
fn aliasing(work: &Work) -> Result<(), String> {
    let arguments = work.arguments();
    let in_place = matches!(work, Work::Launch(launch) if launch.in_place);
    for (i, a) in arguments.iter().enumerate().filter(|(_, a)| a.access != Access::Read) {
        for (j, b) in arguments.iter().enumerate().filter(|(j, _)| *j != i) {
            let overlap =
                a.at.block == b.at.block && a.at.offset < b.at.offset + b.bytes && b.at.offset < a.at.offset + a.bytes;
            if !overlap || a.at.block == Block::Control {
                continue;
            }
            if b.access != Access::Read {
                return Err(format!("arguments {i} and {j} are both written, and overlap"));
            }
            if !(in_place && a.at == b.at && b.bytes == a.bytes) {
                return Err(format!("argument {i} is written over argument {j}, which is read"));
            }
        }
    }
    Ok(())
}

fn record(memory: &mut Memory, at: Address, bytes: usize, by: Option<NodeId>) {
    let block = memory.entry(at.block).or_default();
    let end = at.offset + bytes;
    // What it covers goes; what it covers in part is cut.
    let touched: Vec<(usize, Written)> = block
        .range(..end)
        .rev()
        .take_while(|(_, piece)| piece.end > at.offset || piece.end == 0)
        .map(|(&start, &piece)| (start, piece))
        .collect();
    for (start, piece) in touched {
        if piece.end <= at.offset {
            continue;
        }
        block.remove(&start);
        if start < at.offset {
            block.insert(start, Written { end: at.offset, by: piece.by });
        }
        if piece.end > end {
            block.insert(end, Written { end: piece.end, by: piece.by });
        }
    }
    block.insert(at.offset, Written { end, by });
}
