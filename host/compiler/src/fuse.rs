//! Fusion: which values live in memory, and which kernels compute them.
//!
//! Every value that must exist in memory (an operand of a product, a reduction, an output, a value that would be costly
//! to compute twice) is an *anchor*. A unit begins as one anchor with the pointwise nodes that lead to it; cheap nodes
//! are computed again in each unit that reads them rather than stored. Units are then merged along their operands and
//! with siblings that read the same large tensor, as long as no third unit lies between them.

use crate::merge::Merger;
use crate::module::{Class, Module, class, reduction};
use crate::view::View;
use clip_host_plugin_api::ir::{Node, NodeId, Op, Unary};
use std::collections::{BTreeSet, HashMap};

/// Recomputing more than this many ops in a second kernel costs more than reading the value back.
const INLINE_OPS: usize = 12;
/// A value that needs more large operands than this is stored.
const INLINE_STREAMS: usize = 2;
/// Tensors from this size on count as large.
pub(crate) const LARGE: usize = 4096;
/// Sums over everything up to this size are one row.
const SCALAR_ROW: usize = 4096;
/// A kernel to be.
#[derive(Clone, Debug)]
pub struct Unit {
    /// Values that may be stored; which are is known when all merging is done.
    pub roots: BTreeSet<NodeId>,
    /// Pointwise and reduce nodes computed inside, roots included. Empty for kernels of their own.
    pub body: BTreeSet<NodeId>,
    /// Anchors read from memory.
    pub reads: BTreeSet<NodeId>,
    pub space: Option<Space>,
}

/// A fused unit's iteration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub elements: usize,
    /// Fixed by row reductions and column reductions.
    pub cols: Option<usize>,
    /// Rows in a segment of column reductions.
    pub segment: Option<usize>,
}

/// The fuser's result.
pub struct Fusion {
    pub units: Vec<Unit>,
    pub anchors: Vec<bool>,
    pub views: Views,
}

/// How values are read through movement.
pub struct Views {
    view: Vec<Option<View>>,
}

impl Views {
    /// The view that a node's value is read through; `None` for a constant.
    pub fn of(&self, id: NodeId) -> &View {
        // Filled for every node by `Fuser::views`.
        self.view[id as usize].as_ref().expect("views cover all nodes")
    }
}

/// Fuses a module.
pub fn fuse(module: &Module) -> Fusion {
    let mut fuser = Fuser::new(module);
    fuser.find_anchors();
    let mut units = Merger::new(&fuser, fuser.initial_units()).run();
    fuser.join_moments(&mut units);
    Fusion { units, anchors: fuser.anchors, views: Views { view: fuser.views } }
}

pub(crate) struct Fuser<'a> {
    pub(crate) module: &'a Module,
    anchors: Vec<bool>,
    views: Vec<Option<View>>,
    consumers: Vec<Vec<NodeId>>,
}

impl<'a> Fuser<'a> {
    fn new(module: &'a Module) -> Self {
        let count = module.nodes.len();
        let mut consumers = vec![Vec::new(); count];
        for (id, node) in module.nodes.iter().enumerate() {
            for &input in &node.inputs {
                consumers[input as usize].push(id as NodeId);
            }
        }
        let anchors = module.nodes.iter().map(|n| matches!(class(&n.op), Class::Leaf | Class::Own | Class::Reduce));
        Fuser { module, anchors: anchors.collect(), views: vec![None; count], consumers }
    }

    pub(crate) fn view(&self, id: NodeId) -> &View {
        self.views[id as usize].as_ref().expect("views are computed in order")
    }

    /// Computes each node's view given the anchors so far; a movement that strides cannot express becomes an anchor.
    fn compute_views(&mut self) {
        // Copies by what they copy, in which order: the next one that wants the same reads the first.
        let mut copies: HashMap<View, NodeId> = HashMap::new();
        for (id, node) in self.module.nodes.iter().enumerate() {
            let own = View::contiguous(id as NodeId, &node.shape);
            if class(&node.op) != Class::Movement {
                self.views[id] = Some(own);
                continue;
            }
            let source = self.view(node.inputs[0]).clone();
            let moved = match &node.op {
                Op::Permute { axes } => Some(source.clone().permute(axes)),
                Op::Broadcast => Some(source.clone().broadcast(&node.shape)),
                Op::Slice { starts, ends } => Some(source.clone().slice(starts, ends)),
                Op::Reshape => source.reshape(&node.shape),
                _ => Some(source.clone()),
            };
            let view = match moved {
                Some(view) if !self.anchors[id] => view,
                // The order of elements is the reshaped value's own.
                moved => {
                    let order = moved.unwrap_or(source).order();
                    let first = *copies.entry(order).or_insert(id as NodeId);
                    self.anchors[id] = first == id as NodeId;
                    View::contiguous(first, &node.shape)
                }
            };
            self.views[id] = Some(view);
        }
    }

    /// Whether a node's value is read element by element in its own order through this view.
    pub(crate) fn is_same_order(&self, view: &View) -> bool {
        view.offset == 0 && view.is_contiguous() && view.elements() == self.module.node(view.root).elements()
    }

    fn is_constant(&self, id: NodeId) -> bool {
        matches!(self.module.node(id).op, Op::Constant { .. })
    }

    /// A single number computed from others: every kernel that needs it computes it for itself.
    fn is_scalar(&self, id: NodeId) -> bool {
        let node = self.module.node(id);
        let counts = matches!(node.op, Op::Random { .. } | Op::Iota { .. });
        node.elements() == 1 && class(&node.op) == Class::Pointwise && !counts
    }

    fn find_anchors(&mut self) {
        // To a fixed point: a new anchor changes views, which may make others necessary.
        loop {
            self.compute_views();
            let before = self.anchors.clone();
            self.mark_required();
            self.mark_shared();
            self.mark_clashes();
            if before == self.anchors {
                return;
            }
        }
    }

    fn mark_required(&mut self) {
        for id in 0..self.module.nodes.len() as NodeId {
            let node = self.module.node(id);
            match class(&node.op) {
                Class::Own => {
                    for &input in &node.inputs {
                        let view = self.view(input);
                        let root = view.root;
                        let strided = matches!(node.op, Op::Matmul) && view.dims.len() <= 5;
                        if strided || view.is_contiguous() {
                            self.anchors[root as usize] = true;
                        } else {
                            self.anchors[input as usize] = true;
                        }
                    }
                }
                Class::Pointwise | Class::Reduce => {
                    for &input in &node.inputs {
                        let view = self.view(input);
                        let root = view.root;
                        // A constant is known at every point; a pointwise value elsewhere than at its own point is not.
                        if !self.is_same_order(view) && !self.is_constant(root) && !self.is_scalar(root) {
                            self.anchors[root as usize] = true;
                        }
                    }
                }
                Class::Movement if self.anchors[id as usize] => {
                    let root = self.view(node.inputs[0]).root;
                    self.anchors[root as usize] = true;
                }
                _ => {}
            }
        }
        let ends = self.module.outputs.iter().map(|o| o.1).chain(self.module.updates.iter().map(|u| u.1));
        for id in ends.collect::<Vec<_>>() {
            let view = self.view(id);
            let root = view.root;
            // The old value of a leaf that changes must be copied.
            let in_place = view.is_contiguous() && (root == id || !self.module.is_updated(root));
            match in_place {
                true => self.anchors[root as usize] = true,
                false => self.anchors[id as usize] = true,
            }
        }
    }

    /// Pointwise values with several readers are stored if computing them again would be dear.
    fn mark_shared(&mut self) {
        let mut cost: HashMap<NodeId, (usize, bool, BTreeSet<NodeId>)> = HashMap::new();
        for id in 0..self.module.nodes.len() as NodeId {
            let node = self.module.node(id);
            if class(&node.op) != Class::Pointwise {
                continue;
            }
            let mut ops = 1;
            let mut dear = matches!(
                node.op,
                Op::Random { .. }
                    | Op::Unary(Unary::Exp | Unary::Ln | Unary::Tanh | Unary::Erf | Unary::Sin | Unary::Cos)
            );
            let mut streams = BTreeSet::new();
            for &input in &node.inputs {
                let root = self.view(input).root;
                if self.anchors[root as usize] {
                    if self.module.node(root).elements() >= LARGE
                        && self.module.node(root).elements() * 2 > node.elements()
                    {
                        streams.insert(root);
                    }
                } else if let Some((o, d, s)) = cost.get(&root) {
                    ops += o;
                    dear |= d;
                    streams.extend(s);
                }
            }
            if !self.anchors[id as usize] && self.readers(id) > 1 {
                let small = node.elements() < LARGE;
                let stored = match self.is_scalar(id) {
                    true => ops > INLINE_OPS,
                    false => dear || ops > INLINE_OPS || streams.len() > INLINE_STREAMS || small,
                };
                if stored && !self.is_constant(id) {
                    self.anchors[id as usize] = true;
                }
            }
            cost.insert(id, (ops, dear, streams));
        }
    }

    /// Where the shapes met on the way to one root do not nest, those of another shape are stored.
    fn mark_clashes(&mut self) {
        for unit in self.initial_units() {
            let (Some(space), Some(&root)) = (unit.space, unit.roots.first()) else { continue };
            if self.boundaries(&unit.body, space).is_some() {
                continue;
            }
            let node = self.module.node(root);
            let source = if class(&node.op) == Class::Reduce { node.inputs[0] } else { root };
            let shape = &self.module.node(source).shape;
            for id in unit.body {
                if self.module.node(id).shape != *shape && !self.is_constant(id) {
                    self.anchors[id as usize] = true;
                }
            }
        }
    }

    /// The common refinement of all shapes in which a unit's operands are read: sizes of the space's dimensions,
    /// outermost first; `None` if they do not nest.
    pub(crate) fn boundaries(&self, body: &BTreeSet<NodeId>, space: Space) -> Option<Vec<usize>> {
        boundaries(self.module, |id| self.view(id), |id| self.anchors[id as usize], body, space)
    }

    /// The number of columns if the view repeats each element of its root along a row.
    pub(crate) fn row_broadcast(&self, view: &View) -> Option<usize> {
        let rows = self.module.node(view.root).elements();
        match crate::view::merge(&view.dims).as_slice() {
            [(r, 1), (cols, 0)] if view.offset == 0 && *r == rows => Some(*cols),
            _ => None,
        }
    }

    /// Number of pointwise and reduce nodes that read a value, through movement too.
    fn readers(&self, id: NodeId) -> usize {
        self.consumers[id as usize]
            .iter()
            .map(|&c| match class(&self.module.node(c).op) {
                Class::Movement if !self.anchors[c as usize] => self.readers(c),
                _ => 1,
            })
            .sum()
    }

    fn initial_units(&self) -> Vec<Unit> {
        let mut units = Vec::new();
        for id in 0..self.module.nodes.len() as NodeId {
            let node = self.module.node(id);
            if !self.anchors[id as usize] || class(&node.op) == Class::Leaf {
                continue;
            }
            let mut unit =
                Unit { roots: BTreeSet::from([id]), body: BTreeSet::new(), reads: BTreeSet::new(), space: None };
            match class(&node.op) {
                Class::Own | Class::Movement => {
                    unit.reads = node.inputs.iter().map(|&i| self.view(i).root).collect();
                }
                _ => {
                    self.collect(id, id, &mut unit);
                    unit.space = Some(self.space(id));
                }
            }
            units.push(unit);
        }
        units
    }

    /// The moments of a convolution's result become the convolution's second result.
    fn join_moments(&self, units: &mut Vec<Unit>) {
        let mut moments: HashMap<NodeId, NodeId> = HashMap::new();
        for unit in units.iter() {
            let root = unit.roots.first().copied().unwrap_or_default();
            if let Node { op: Op::Moments, inputs, .. } = self.module.node(root)
                && self.is_same_order(self.view(inputs[0]))
                && matches!(self.module.node(self.view(inputs[0]).root).op, Op::Conv2d(_))
            {
                moments.insert(self.view(inputs[0]).root, root);
            }
        }
        units.retain(|unit| !unit.roots.iter().any(|root| moments.values().any(|m| m == root)));
        for unit in units {
            let second = unit.roots.iter().find_map(|root| moments.get(root)).copied();
            unit.roots.extend(second);
        }
    }

    /// Takes in a node and the pointwise nodes that lead to it.
    fn collect(&self, id: NodeId, root: NodeId, unit: &mut Unit) {
        if self.anchors[id as usize] && id != root {
            unit.reads.insert(id);
            return;
        }
        if !unit.body.insert(id) {
            return;
        }
        for &input in &self.module.node(id).inputs {
            self.collect(self.view(input).root, root, unit);
        }
    }

    pub(crate) fn space(&self, id: NodeId) -> Space {
        let node = self.module.node(id);
        let (Op::Sum { axes } | Op::Max { axes }) = &node.op else {
            return Space { elements: node.elements(), cols: None, segment: None };
        };
        let source = &self.module.node(node.inputs[0]).shape;
        let elements = source.iter().product();
        match reduction(source, axes) {
            (1, r, 1) if r > SCALAR_ROW => Space { elements, cols: None, segment: None },
            (_, r, 1) => Space { elements, cols: Some(r), segment: None },
            (_, r, c) => Space { elements, cols: Some(c), segment: Some(r) },
        }
    }

    /// Whether a value is complete at its own point or row: all but sums over rows and over everything.
    pub(crate) fn is_local(&self, id: NodeId) -> bool {
        let node = self.module.node(id);
        let (Op::Sum { axes } | Op::Max { axes }) = &node.op else { return true };
        match reduction(&self.module.node(node.inputs[0]).shape, axes) {
            (1, r, 1) => r <= SCALAR_ROW,
            (_, _, c) => c == 1,
        }
    }
}

/// Sizes of the dimensions into which a unit's space divides, outermost first, so that every operand is strided over
/// them; `None` if the operands' shapes do not nest.
pub fn boundaries<'v>(
    module: &Module,
    view: impl Fn(NodeId) -> &'v View,
    anchor: impl Fn(NodeId) -> bool,
    body: &BTreeSet<NodeId>,
    space: Space,
) -> Option<Vec<usize>> {
    let mut cuts = BTreeSet::from([1, space.elements]);
    cuts.extend(space.cols);
    for &id in body {
        let node = module.node(id);
        if let Op::Iota { axis } = node.op {
            let scale = row_scale(node.elements(), space);
            for axis in [axis, axis + 1] {
                cuts.insert(node.shape[axis..].iter().product::<usize>() * scale);
            }
        }
        for &input in &node.inputs {
            let view = view(input);
            let simple = view.is_contiguous() || view.dims.iter().all(|d| d.0 == 1 || d.1 == 0);
            if !anchor(view.root) || simple {
                continue;
            }
            let mut cut = row_scale(view.elements(), space);
            for (size, _) in crate::view::merge(&view.dims).into_iter().rev() {
                cut *= size;
                cuts.insert(cut);
            }
        }
    }
    let cuts: Vec<usize> = cuts.into_iter().collect();
    let mut sizes = Vec::new();
    for pair in cuts.windows(2) {
        if !pair[1].is_multiple_of(pair[0]) {
            return None;
        }
        sizes.push(pair[1] / pair[0]);
    }
    sizes.reverse();
    Some(sizes)
}

/// How many points of the space stand behind one element of a value: the columns for row values.
pub fn row_scale(elements: usize, space: Space) -> usize {
    match space.cols {
        Some(cols) if elements != space.elements && elements * cols == space.elements => cols,
        _ => 1,
    }
}
