//! The order of a fused kernel's work: which of its instructions run as one compiled loop, and when.

use clip_host_compiler::kernel::{Instr, Rank, Reg};
use clip_host_compiler::lower::operands;

/// A part of a kernel's work.
pub enum Action {
    /// One instruction, interpreted.
    Step(Reg),
    /// Instructions over all elements that run as one loop, in order.
    Group(Vec<Reg>),
}

impl Action {
    /// The instructions of it.
    pub fn regs(&self) -> &[Reg] {
        match self {
            Action::Step(reg) => std::slice::from_ref(reg),
            Action::Group(regs) => regs,
        }
    }
}

/// Every instruction for itself, in order.
pub fn one_by_one(code: &[(Instr, Rank)]) -> Vec<Action> {
    (0..code.len()).map(Action::Step).collect()
}

/// As few groups as there can be: what cannot be in a loop (sums over rows, gathered operands, values of rows) stands
/// between them, as early as its operands allow; what can is done as late as its readers allow, so that few values leave
/// their loop. `can` says which instructions can be in a loop; loads among them are part of every loop that reads them, and
/// stand in one themselves only if they are results. Scalars stand nowhere: they are computed before.
pub fn in_groups(code: &[(Instr, Rank)], can: impl Fn(Reg) -> bool, is_result: impl Fn(Reg) -> bool) -> Vec<Action> {
    let is_load = |reg: Reg| matches!(code[reg].0, Instr::Load(_));
    // The first round in which each instruction can be done: in a round, steps come first, then a loop.
    let mut earliest = vec![0usize; code.len()];
    for (reg, (instr, _)) in code.iter().enumerate() {
        let after = |operand: Reg| match (can(operand) && !is_load(operand), can(reg)) {
            // A step that reads a loop's result waits for the next round.
            (true, false) => earliest[operand] + 1,
            _ => earliest[operand],
        };
        earliest[reg] = operands(instr).into_iter().map(after).max().unwrap_or(0);
    }
    let rounds = earliest.iter().max().map_or(0, |last| last + 1);
    // The last round in which each instruction of a loop can be done.
    let mut round = vec![rounds.saturating_sub(1); code.len()];
    for (reg, (instr, _)) in code.iter().enumerate().rev() {
        if !can(reg) {
            round[reg] = earliest[reg];
        }
        for operand in operands(instr) {
            let latest = if can(reg) { round[reg] } else { round[reg].saturating_sub(1) };
            round[operand] = round[operand].min(latest);
        }
    }
    let mut actions = vec![];
    for now in 0..rounds {
        let here = |reg: &Reg| round[*reg] == now && code[*reg].1 != Rank::Scalar;
        actions.extend((0..code.len()).filter(|&reg| !can(reg)).filter(here).map(Action::Step));
        let stands = |reg: &Reg| can(*reg) && (!is_load(*reg) || is_result(*reg));
        let group: Vec<Reg> = (0..code.len()).filter(stands).filter(here).collect();
        if !group.is_empty() {
            actions.push(Action::Group(group));
        }
    }
    actions
}
