//! Merging of units: along operands, then siblings that read the same large tensor.

use crate::fuse::{Fuser, LARGE, Space, Unit};
use crate::view::View;
use clip_host_plugin_api::ir::NodeId;
use std::collections::{BTreeSet, HashMap};

/// Rows up to this length are reduced inside a kernel whose other parts use the result.
const ROW_LIMIT: usize = 16384;
/// The most instructions and operands of a merged unit.
const MAX_BODY: usize = 160;
const MAX_READS: usize = 32;

/// The units while they are merged.
pub struct Merger<'a> {
    fuser: &'a Fuser<'a>,
    units: Vec<Unit>,
    alive: Vec<bool>,
    /// The unit that computes an anchor.
    owner: HashMap<NodeId, usize>,
    /// All units that a unit needs, as bits.
    ancestors: Vec<Vec<u64>>,
}

fn has_bit(bits: &[u64], index: usize) -> bool {
    bits[index / 64] >> (index % 64) & 1 == 1
}

impl<'a> Merger<'a> {
    /// Units must come in topological order.
    pub fn new(fuser: &'a Fuser<'a>, units: Vec<Unit>) -> Self {
        let mut owner: HashMap<NodeId, usize> = HashMap::new();
        let mut ancestors: Vec<Vec<u64>> = Vec::with_capacity(units.len());
        for (index, unit) in units.iter().enumerate() {
            let mut bits = vec![0u64; units.len().div_ceil(64)];
            for &producer in unit.reads.iter().filter_map(|r| owner.get(r)) {
                bits[producer / 64] |= 1 << (producer % 64);
                bits.iter_mut().zip(&ancestors[producer]).for_each(|(b, a)| *b |= a);
            }
            ancestors.push(bits);
            owner.extend(unit.roots.iter().map(|&root| (root, index)));
        }
        Merger { fuser, alive: vec![true; units.len()], units, owner, ancestors }
    }

    /// The merged units.
    pub fn run(mut self) -> Vec<Unit> {
        let mut index = 0;
        while index < self.units.len() {
            if !(self.alive[index] && self.merge_with_a_producer(index)) {
                index += 1;
            }
        }
        self.merge_siblings();
        let mut alive = self.alive.into_iter();
        self.units.retain(|_| alive.next().unwrap_or(false));
        self.units
    }

    fn merge_with_a_producer(&mut self, index: usize) -> bool {
        if self.units[index].space.is_none() {
            return false;
        }
        let producers = self.units[index].reads.iter().filter_map(|r| self.owner.get(r).copied());
        let producers: BTreeSet<usize> = producers.filter(|&p| p != index).collect();
        // The nearest first.
        for producer in producers.into_iter().rev() {
            if self.may_merge(producer, index, true) {
                self.absorb(producer, index);
                return true;
            }
        }
        false
    }

    fn merge_siblings(&mut self) {
        let mut readers: HashMap<NodeId, Vec<usize>> = HashMap::new();
        for (index, unit) in self.units.iter().enumerate().filter(|(i, u)| self.alive[*i] && u.space.is_some()) {
            for &read in unit.reads.iter().filter(|&&r| self.fuser.module.node(r).elements() >= LARGE) {
                readers.entry(read).or_default().push(index);
            }
        }
        let mut shared: Vec<(NodeId, Vec<usize>)> = readers.into_iter().collect();
        shared.sort_unstable_by_key(|s| s.0);
        for (_, group) in shared {
            for (position, &b) in group.iter().enumerate() {
                for &a in &group[..position] {
                    if self.alive[a] && self.alive[b] && self.may_merge(a, b, false) {
                        self.absorb(a, b);
                    }
                }
            }
        }
    }

    /// Moves unit `a` into `b`, whose space `may_merge` has set.
    fn absorb(&mut self, a: usize, b: usize) {
        let gone = self.units[a].clone();
        self.owner.extend(gone.roots.iter().map(|&root| (root, b)));
        self.alive[a] = false;
        let unit = &mut self.units[b];
        unit.roots.extend(gone.roots);
        unit.body.extend(gone.body);
        unit.reads.extend(gone.reads);
        let inside = unit.roots.clone();
        unit.reads.retain(|r| !inside.contains(r));
        let from_a = self.ancestors[a].clone();
        self.ancestors[b].iter_mut().zip(&from_a).for_each(|(bits, a)| *bits |= a);
        self.ancestors[b][a / 64] &= !(1 << (a % 64));
        let all = self.ancestors[b].clone();
        for (index, bits) in self.ancestors.iter_mut().enumerate() {
            if index != b && (has_bit(bits, a) || has_bit(bits, b)) {
                bits.iter_mut().zip(&all).for_each(|(bits, b)| *bits |= b);
                bits[b / 64] |= 1 << (b % 64);
            }
        }
    }

    /// Decides whether units `a` and `b` may be one, and gives `b` the common space.
    fn may_merge(&mut self, a: usize, b: usize, along_operand: bool) -> bool {
        let (first, second) = (&self.units[a], &self.units[b]);
        let (Some(space_a), Some(space_b)) = (first.space, second.space) else { return false };
        if first.body.len() + second.body.len() > MAX_BODY || first.reads.len() + second.reads.len() > MAX_READS {
            return false;
        }
        let links: Vec<&View> = second
            .body
            .iter()
            .flat_map(|&id| &self.fuser.module.node(id).inputs)
            .map(|&input| self.fuser.view(input))
            .filter(|view| first.roots.contains(&view.root))
            .collect();
        let row_link = links.iter().any(|view| self.fuser.row_broadcast(view).is_some());
        let Some(space) = common_space(space_a, space_b, row_link) else { return false };
        let fits = |view: &&View| {
            let in_row = space.cols.is_some() && self.fuser.row_broadcast(view) == space.cols;
            self.fuser.is_local(view.root) && (self.fuser.is_same_order(view) || in_row)
        };
        if !links.iter().all(fits) || (along_operand && links.is_empty()) {
            return false;
        }
        if space.segment.is_some() {
            // Sums over row values and over segments of rows do not share a partition.
            let sums_row_values = |unit: &Unit| {
                unit.body.iter().any(|&id| !self.fuser.is_local(id) && self.fuser.space(id).elements != space.elements)
            };
            if sums_row_values(first) || sums_row_values(second) {
                return false;
            }
        }
        if self.has_path(a, b, true) || self.has_path(b, a, false) {
            return false;
        }
        let body = first.body.union(&second.body).copied().collect();
        if self.fuser.boundaries(&body, space).is_none() {
            return false;
        }
        self.units[b].space = Some(space);
        true
    }

    /// Whether `to` needs `from` through a third unit (or at all, if not `indirect_only`).
    fn has_path(&self, from: usize, to: usize, indirect_only: bool) -> bool {
        self.units[to].reads.iter().filter_map(|r| self.owner.get(r).copied()).any(|producer| match producer {
            p if p == from => !indirect_only,
            p => p != to && has_bit(&self.ancestors[p], from),
        })
    }
}

fn common_space(a: Space, b: Space, row_link: bool) -> Option<Space> {
    let agree = |x: Option<usize>, y: Option<usize>| match (x, y) {
        (Some(x), Some(y)) if x != y => None,
        (x, y) => Some(x.or(y)),
    };
    let segment = agree(a.segment, b.segment)?;
    if a.elements == b.elements {
        return Some(Space { elements: a.elements, cols: agree(a.cols, b.cols)?, segment });
    }
    let (large, small) = if a.elements > b.elements { (a, b) } else { (b, a) };
    if small.cols.is_some() || small.elements <= 1 || !large.elements.is_multiple_of(small.elements) {
        return None;
    }
    let cols = large.elements / small.elements;
    if cols > ROW_LIMIT || (large.cols.is_none() && !row_link) {
        return None;
    }
    Some(Space { elements: large.elements, cols: agree(large.cols, Some(cols))?, segment })
}
