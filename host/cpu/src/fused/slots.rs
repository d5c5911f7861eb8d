//! Where the values of a tile are kept.

use super::schedule::Action;
use super::{OPERANDS, Out, Program, SHORT, Slot, Source, Step, Work};
use crate::memory::Address;
use crate::pairs::Pair;
use crate::streams::Stream;
use crate::tape;
use clip_host_compiler::kernel::{Element, Fused, Instr, Pattern, Rank, Rounding, Store};
use clip_host_compiler::lower::operands;
use clip_host_plugin_api::ir::NodeId;
use std::collections::HashMap;

impl Program {
    /// Gives every value its place; slots are used again once their values are dead. A value that does not leave its loop
    /// needs none.
    pub(super) fn assign_slots(
        &mut self,
        kernel: &Fused,
        actions: &[Action],
        pairs: &HashMap<usize, Pair>,
        place: &impl Fn(NodeId) -> Address,
    ) {
        let code = &kernel.code;
        let mut position = vec![None; code.len()];
        for (number, action) in actions.iter().enumerate() {
            action.regs().iter().for_each(|&reg| position[reg] = Some(number));
        }
        let in_group = |reg: usize| position[reg].is_some_and(|at| matches!(actions[at], Action::Group(_)));
        let is_load = |reg: usize| matches!(code[reg].0, Instr::Load(_));
        let is_read: Vec<Address> = kernel.inputs.iter().map(|i| place(i.source)).collect();
        let replaces = |out: &Out| is_read.iter().any(|r| r.block == out.address.block && out.address.block > 0);
        for out in 0..self.outs.len() {
            let is_last = position[self.outs[out].value].is_some_and(|at| at + 1 == actions.len());
            let in_loop = in_group(self.outs[out].value) && self.is_loops_own(&self.outs[out]);
            // What replaces an operand is written when all has been read.
            self.outs[out].direct = in_loop && (is_last || !replaces(&self.outs[out]));
        }

        let mut last_use: Vec<usize> = position.iter().map(|at| at.unwrap_or(0)).collect();
        let mut leaves_loop = vec![false; code.len()];
        for (reader, (instr, _)) in code.iter().enumerate() {
            let Some(at) = position[reader] else { continue };
            for operand in operands(instr) {
                last_use[operand] = last_use[operand].max(at);
                // Loops read loads for themselves.
                leaves_loop[operand] |= position[operand] != Some(at) && !is_load(operand);
            }
        }
        // What a pair's first op reads is read by the pair.
        for (&at, pair) in pairs {
            [pair.a, pair.b].into_iter().for_each(|r| last_use[r] = last_use[r].max(at));
        }
        // Values that are stored or summed at the end of the tile live until then.
        for out in &self.outs {
            last_use[out.value] = actions.len();
            leaves_loop[out.value] |= !out.direct;
        }

        let full_len = (self.tile_rows * self.tile_cols).next_multiple_of(16);
        let row_len = self.tile_rows.next_multiple_of(16);
        let step = |rank| Step { work: Work::Nothing, rank, mixed: false, slot: Slot::None };
        self.steps = code.iter().map(|&(_, rank)| step(rank)).collect();
        let mut free: [Vec<usize>; 2] = [vec![], vec![]];
        let mut taken: Vec<(usize, usize, usize)> = vec![]; // (last use, kind, offset)
        for (now, reg) in actions.iter().enumerate().flat_map(|(now, a)| a.regs().iter().map(move |&reg| (now, reg))) {
            let (instr, rank) = &code[reg];
            taken.retain(|&(last, kind, offset)| {
                let alive = last >= now;
                if !alive {
                    free[kind].push(offset);
                }
                alive
            });
            let direct_output = self.outs.iter().position(|o| {
                o.value == reg && o.store == Store::Each && o.element == Element::F32 && !o.streamed && !o.is_leaf()
            });
            let (once, in_memory) = match instr {
                Instr::Load(_) if in_group(reg) => (false, false),
                Instr::Load(i) => {
                    let source = &self.loads[*i].source;
                    (matches!(source, Source::Repeated), matches!(source, Source::Direct))
                }
                Instr::Const(_) => (false, true),
                _ => (false, false),
            };
            let inside = pairs.values().any(|pair| pair.inside == reg);
            let stays = in_group(reg) && !leaves_loop[reg];
            let slot = match (rank, direct_output) {
                _ if inside || stays => Slot::None,
                (Rank::Scalar, _) => Slot::None,
                _ if in_memory => Slot::None,
                (_, Some(output)) if !is_load(reg) && (*rank == Rank::Full || self.tile_cols == self.cols) => {
                    self.outs[output].direct = true;
                    Slot::Output(output)
                }
                _ => {
                    let (kind, len) = if *rank == Rank::Full { (0, full_len) } else { (1, row_len) };
                    let offset = match free[kind].pop() {
                        Some(offset) if !once => offset,
                        back => {
                            free[kind].extend(back);
                            self.scratch += len;
                            self.scratch - len
                        }
                    };
                    // A repeated vector is made once per task and keeps its slot.
                    let last = if once { usize::MAX } else { last_use[reg] };
                    taken.push((last, kind, offset));
                    Slot::Scratch(offset)
                }
            };
            let pair = pairs.get(&reg).copied();
            let read = pair.map_or_else(|| operands(instr), |p| vec![p.a, p.b, p.c]);
            let mixed = *rank == Rank::Full && !in_group(reg) && read.iter().any(|&r| code[r].1 == Rank::Row);
            let work = match pair {
                _ if inside || in_group(reg) => Work::Nothing,
                Some(pair) => Work::Pair(pair),
                None => Work::Instr(instr.clone()),
            };
            self.steps[reg] = Step { work, rank: *rank, mixed, slot };
        }
        // Scalars are computed once per task, wherever they stand.
        for (step, (instr, _)) in self.steps.iter_mut().zip(code).filter(|(step, _)| step.rank == Rank::Scalar) {
            step.work = Work::Instr(instr.clone());
        }
        self.repeated = self.scratch;
        if self.steps.iter().any(|step| step.mixed) && self.tile_cols <= SHORT {
            self.scratch += OPERANDS * self.repeated_len();
        }
    }

    /// Whether a loop can write a result itself.
    fn is_loops_own(&self, out: &Out) -> bool {
        match (out.store, out.element) {
            // Random bits are drawn by the interpreter's loops.
            _ if out.rounding != Rounding::Nearest => false,
            // Lines that are written past the caches begin where a vector does.
            (Store::Each, Element::F32 | Element::Bf16) if out.streamed => {
                out.address.offset.is_multiple_of(64) && (self.cols.is_multiple_of(16) || self.rows == 1)
            }
            (Store::Each, Element::F32 | Element::Bf16) | (Store::SumRows { .. }, _) => true,
            _ => false,
        }
    }

    /// Elements of a tile of repeated values.
    pub(super) fn repeated_len(&self) -> usize {
        (self.tile_rows * self.tile_cols + tape::SLACK).next_multiple_of(16)
    }

    /// Tensors whose next tile is asked for while the current one is worked on: processors foresee one long walk, not
    /// several that take turns.
    pub(super) fn find_streams(&mut self, kernel: &Fused) {
        let (tile, steps) = (self.tile_rows * self.tile_cols, self.steps.len());
        let mut stream = |address, element| self.streams.push(Stream::new(address, element, tile, steps));
        for (load, input) in self.loads.iter().zip(&kernel.inputs) {
            if input.rank == Rank::Full && input.pattern == Pattern::Same {
                stream(load.address, load.element);
            }
        }
        for out in self.outs.iter().filter(|o| o.store == Store::Each && !o.streamed) {
            if self.steps[out.value].rank == Rank::Full {
                stream(out.address, out.element);
            }
        }
    }
}
