//! Where each value lives: liveness, aliases and the arena.

use clip_host_plugin_api::ir::NodeId;
use std::collections::HashMap;

/// Buffers begin at multiples of this many bytes: a cache line.
const ALIGN: usize = 64;

/// A buffer's life in launches, both ends included.
#[derive(Clone, Copy, Debug)]
pub struct Life {
    pub node: NodeId,
    pub bytes: usize,
    pub first: usize,
    pub last: usize,
}

/// Gives every buffer an offset so that no two that live at once overlap; the arena's length in bytes comes second.
/// Largest first, each at the lowest place that is free for its whole life.
pub fn pack(mut lives: Vec<Life>) -> (HashMap<NodeId, usize>, usize) {
    lives.sort_by_key(|l| (std::cmp::Reverse(l.bytes), l.node));
    let mut placed: Vec<(Life, usize)> = Vec::with_capacity(lives.len());
    let mut offsets = HashMap::new();
    let mut length = 0;
    for life in lives {
        let size = life.bytes.next_multiple_of(ALIGN).max(ALIGN);
        let mut busy: Vec<(usize, usize)> = placed
            .iter()
            .filter(|(other, _)| other.first <= life.last && life.first <= other.last)
            .map(|(other, offset)| (*offset, offset + other.bytes.next_multiple_of(ALIGN).max(ALIGN)))
            .collect();
        busy.sort_unstable();
        let mut offset = 0;
        for (start, end) in busy {
            if offset + size <= start {
                break;
            }
            offset = offset.max(end);
        }
        length = length.max(offset + size);
        offsets.insert(life.node, offset);
        placed.push((life, offset));
    }
    (offsets, length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_that_live_at_once_do_not_overlap() {
        let mut state = 1u64;
        let mut next = move |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        let lives: Vec<Life> = (0..200)
            .map(|node| {
                let first = next(100) as usize;
                Life { node, bytes: 1 + next(500) as usize, first, last: first + next(20) as usize }
            })
            .collect();
        let (offsets, length) = pack(lives.clone());
        let range = |l: &Life| (offsets[&l.node], offsets[&l.node] + l.bytes);
        for (i, a) in lives.iter().enumerate() {
            assert!(range(a).1 <= length && range(a).0 % ALIGN == 0);
            for b in &lives[..i] {
                if a.first <= b.last && b.first <= a.last {
                    assert!(range(a).1 <= range(b).0 || range(b).1 <= range(a).0, "{a:?} and {b:?}");
                }
            }
        }
        let total: usize = lives.iter().map(|l| l.bytes.next_multiple_of(ALIGN)).sum();
        assert!(length < total / 2, "{length} of {total}");
    }
}
