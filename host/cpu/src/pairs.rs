//! Pairs: two arithmetic ops of a fused kernel that run as one loop, so that the value between them is never stored.

use crate::tape::Arithmetic;
use clip_host_compiler::kernel::{Instr, Output, Rank};
use clip_host_compiler::lower::operands;
use clip_host_plugin_api::ir::Binary;
use std::collections::HashMap;

/// `(a first b) second c`.
#[derive(Clone, Copy)]
pub struct Pair {
    pub ops: (Arithmetic, Arithmetic),
    pub a: usize,
    pub b: usize,
    pub c: usize,
    /// The first op's own place in the code.
    pub inside: usize,
}

/// Arithmetic ops over full values whose result only the next such op reads, by the place of the second.
pub fn find_pairs(code: &[(Instr, Rank)], outputs: &[Output]) -> HashMap<usize, Pair> {
    let mut uses = vec![0; code.len()];
    for (instr, _) in code {
        operands(instr).into_iter().for_each(|r| uses[r] += 1);
    }
    outputs.iter().for_each(|o| uses[o.value] += 1);
    let arithmetic = |at: usize| match code[at] {
        (Instr::Binary(op, a, b), Rank::Full) => {
            let op = match op {
                Binary::Add => Arithmetic::Add,
                Binary::Sub => Arithmetic::Sub,
                Binary::Mul => Arithmetic::Mul,
                _ => return None,
            };
            Some((op, a, b))
        }
        _ => None,
    };
    let mut pairs: HashMap<usize, Pair> = HashMap::new();
    for at in 0..code.len() {
        let Some((second, x, y)) = arithmetic(at) else { continue };
        // An op that is a pair already is not the first of another.
        let first = |r: usize| arithmetic(r).filter(|_| uses[r] == 1 && !pairs.contains_key(&r));
        let pair = match (first(x), first(y)) {
            (Some((op, a, b)), _) => Pair { ops: (op, second), a, b, c: y, inside: x },
            (None, Some((op, a, b))) => {
                let second = if second == Arithmetic::Sub { Arithmetic::SubFrom } else { second };
                Pair { ops: (op, second), a, b, c: x, inside: y }
            }
            (None, None) => continue,
        };
        pairs.insert(at, pair);
    }
    pairs
}
