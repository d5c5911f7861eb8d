//! Updates piece by piece: an elementwise update of a large flat leaf is cut where the parts of its gradient meet.
//!
//! An optimizer's kernel reads one flat gradient, the concatenation of all weights' gradients. Cut into pieces, each
//! weight is updated as soon as its own gradient is there and nobody reads the old value any more: the gradient is still
//! in cache, its memory is free for the next one, and the flat gradient never exists as a whole. (PyTorch calls this
//! "optimizer step in backward".) Where every gradient is needed before any update, as for clipping by their common
//! norm, the pieces merely run one after the other.

use crate::fuse::Fusion;
use crate::kernel::{Element, Fused, Input, Instr, Kernel, Operand, Output, Pattern, Rank, Rounding, Store};
use crate::module::Module;
use clip_host_plugin_api::ir::{DType, Node, NodeId, Op};
use std::collections::{BTreeSet, HashMap};

/// Updates of fewer elements are left whole.
const LARGE: usize = 1 << 20;
/// Neighbouring parts are joined up to this many elements: a launch should be worth its start.
const PIECE: usize = 1 << 17;

/// A piece's new value, which belongs in a leaf's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// Index of the kernel that computes it.
    pub kernel: usize,
    pub leaf: NodeId,
    pub value: NodeId,
    /// Where it begins in the leaf, in elements.
    pub start: usize,
}

/// Kernels, with the keys that order them where nothing else does.
pub(crate) struct Schedule {
    pub kernels: Vec<Kernel>,
    pub keys: Vec<NodeId>,
}

/// Cuts what can be cut: kernels are replaced, the updates that pieces take over leave the module.
pub(crate) fn split(
    module: &mut Module,
    fusion: &Fusion,
    schedule: &mut Schedule,
    storage: &mut Vec<Element>,
) -> Vec<Piece> {
    let (mut pieces, mut removed) = (Vec::new(), BTreeSet::new());
    for index in 0..schedule.kernels.len() {
        if let Some(cut) = Cut::of(module, fusion, &schedule.kernels, storage, index) {
            cut.apply(module, schedule, storage, &mut pieces, &mut removed);
        }
    }
    // What the pieces replace goes; the pieces' indices follow.
    let before = |index: usize| removed.range(..index).count();
    pieces.iter_mut().for_each(|piece| piece.kernel -= before(piece.kernel));
    let mut at = 0..;
    schedule.kernels.retain(|_| at.next().is_none_or(|i| !removed.contains(&i)));
    let mut at = 0..;
    schedule.keys.retain(|_| at.next().is_none_or(|i| !removed.contains(&i)));
    pieces
}

/// How a kernel is cut.
struct Cut {
    index: usize,
    kernel: Fused,
    /// Which input is the concatenation.
    gradient: usize,
    /// The concatenations that are no longer needed.
    gone: Vec<usize>,
    /// The concatenation's parts, joined into pieces.
    groups: Vec<Vec<Operand>>,
    /// For each output that is stored point by point, the leaf that takes it.
    leaves: HashMap<NodeId, NodeId>,
}

/// A node for a value that only the plan knows.
fn add(
    module: &mut Module,
    storage: &mut Vec<Element>,
    op: Op,
    inputs: Vec<NodeId>,
    len: usize,
    element: Element,
) -> NodeId {
    module.nodes.push(Node { op, inputs, shape: vec![len], dtype: DType::F32 });
    storage.push(element);
    module.nodes.len() as NodeId - 1
}

fn elements(operand: &Operand) -> usize {
    operand.dims.iter().map(|d| d.0).product()
}

impl Cut {
    fn of(module: &Module, fusion: &Fusion, kernels: &[Kernel], storage: &[Element], index: usize) -> Option<Cut> {
        let Kernel::Fused(kernel) = &kernels[index] else { return None };
        let pointwise = kernel.inputs.iter().all(|i| i.rank == Rank::Scalar || i.pattern == Pattern::Same);
        let placed = |instr: &Instr| matches!(instr, Instr::Index(_) | Instr::Random(_));
        if kernel.rows != 1
            || kernel.cols < LARGE
            || kernel.dims.len() != 1
            || !pointwise
            || kernel.has_row_reductions()
            || kernel.code.iter().any(|(instr, rank)| placed(instr) || *rank == Rank::Row)
        {
            return None;
        }
        let readers = |id: NodeId| kernels.iter().filter(|k| k.reads().contains(&id)).count();
        let is_end = |id: NodeId| module.outputs.iter().any(|o| fusion.views.of(o.1).root == id);

        let mut leaves = HashMap::new();
        for output in &kernel.outputs {
            match output.store {
                Store::Each => {
                    let takes = |u: &&(NodeId, NodeId)| fusion.views.of(u.1).root == output.target;
                    let mut updates = module.updates.iter().filter(takes);
                    let (&(leaf, value), None) = (updates.next()?, updates.next()) else { return None };
                    let view = fusion.views.of(value);
                    let whole = view.offset == 0 && view.is_contiguous() && view.elements() == kernel.cols;
                    // A scalar is read by every point, also after its own was written.
                    let own = |i: &Input| i.offset == 0 && i.rank == Rank::Full;
                    let in_place = kernel.inputs.iter().all(|i| i.source != leaf || own(i));
                    let alike = storage[leaf as usize] == storage[output.target as usize];
                    let other = leaves.insert(output.target, leaf).is_some()
                        || leaves.values().filter(|&&l| l == leaf).count() > 1;
                    if !whole || !in_place || !alike || other || readers(output.target) > 0 || is_end(output.target) {
                        return None;
                    }
                }
                Store::SumAll | Store::MaxAll => {}
                Store::SumRows { .. } | Store::MaxRows { .. } => return None,
            }
        }

        let concat = |id: NodeId| {
            kernels.iter().position(|k| match k {
                Kernel::Own { op: Op::Concat { axis }, node, shape, .. } => {
                    *node == id && shape[..*axis].iter().all(|&d| d == 1)
                }
                _ => false,
            })
        };
        let (gradient, first) = kernel.inputs.iter().enumerate().find_map(|(at, input)| {
            let concat = concat(input.source)?;
            let whole = input.offset == 0
                && input.rank == Rank::Full
                && module.node(input.source).elements() == kernel.cols
                && storage[input.source as usize] == Element::F32;
            (whole && readers(input.source) == 1 && !is_end(input.source)).then_some((at, concat))
        })?;
        // A concatenation of concatenations is one.
        let inner = |o: &Operand| {
            let whole = o.offset == 0 && elements(o) == module.node(o.source).elements();
            concat(o.source).filter(|_| whole && readers(o.source) == 1 && !is_end(o.source))
        };
        let Kernel::Own { inputs, .. } = &kernels[first] else { return None };
        let (mut parts, mut gone) = (inputs.clone(), vec![first]);
        while let Some((at, nested)) = parts.iter().enumerate().find_map(|(at, part)| Some((at, inner(part)?))) {
            let Kernel::Own { inputs, .. } = &kernels[nested] else { return None };
            gone.push(nested);
            parts.splice(at..=at, inputs.iter().cloned());
        }
        let mut groups: Vec<Vec<Operand>> = Vec::new();
        let mut room = 0;
        for part in parts {
            let size = elements(&part);
            match groups.last_mut() {
                Some(group) if room >= size => group.push(part),
                _ => {
                    groups.push(vec![part]);
                    room = PIECE;
                }
            }
            room = room.saturating_sub(size);
        }
        (groups.len() > 1).then(|| Cut { index, kernel: kernel.clone(), gradient, gone, groups, leaves })
    }

    fn apply(
        self,
        module: &mut Module,
        schedule: &mut Schedule,
        storage: &mut Vec<Element>,
        pieces: &mut Vec<Piece>,
        removed: &mut BTreeSet<usize>,
    ) {
        let mut sums: Vec<(Output, Vec<Operand>)> = Vec::new();
        let mut made: Vec<Kernel> = Vec::new();
        let mut values: Vec<Piece> = Vec::new();
        let mut start = 0;
        for group in &self.groups {
            let len: usize = group.iter().map(elements).sum();
            let (source, offset) = match &group[..] {
                [part] => (part.source, part.offset),
                _ => {
                    let sources = group.iter().map(|o| o.source).collect();
                    let node = add(module, storage, Op::Concat { axis: 0 }, sources, len, Element::F32);
                    let inputs = group.iter().map(|o| Operand { dims: vec![(elements(o), 1)], ..o.clone() }).collect();
                    made.push(Kernel::Own {
                        op: Op::Concat { axis: 0 },
                        node,
                        inputs,
                        shape: vec![len],
                        moments: None,
                    });
                    (node, 0)
                }
            };
            let mut piece = Fused { cols: len, dims: vec![len], ..self.kernel.clone() };
            for (at, input) in piece.inputs.iter_mut().enumerate().filter(|(_, i)| i.rank == Rank::Full) {
                match at == self.gradient {
                    true => *input = Input { source, offset, dtype: storage[source as usize], ..input.clone() },
                    false => input.offset += start,
                }
            }
            for (at, output) in piece.outputs.iter_mut().enumerate() {
                let original = self.kernel.outputs[at].target;
                let size = if output.store == Store::Each { len } else { 1 };
                output.target = add(module, storage, Op::Reshape, vec![original], size, output.dtype);
                if output.store == Store::Each {
                    // Random numbers go by the leaf's elements: the same ones, cut or whole.
                    if let Rounding::Stochastic { first, .. } = &mut output.rounding {
                        *first += start;
                    }
                    let leaf = self.leaves[&original];
                    values.push(Piece { kernel: made.len(), leaf, value: output.target, start });
                    continue;
                }
                let sum = Operand { source: output.target, offset: 0, dims: vec![(1, 1)] };
                match sums.iter_mut().find(|s| s.0.target == original) {
                    Some(known) => known.1.push(sum),
                    None => sums.push((self.kernel.outputs[at].clone(), vec![sum])),
                }
            }
            made.push(Kernel::Fused(piece));
            start += len;
        }
        // Pieces come as soon as they can: their keys are the lowest.
        let mut keys = vec![0; made.len()];
        for (output, parts) in sums {
            let len = parts.len();
            let sources = parts.iter().map(|p| p.source).collect();
            let node = add(module, storage, Op::Concat { axis: 0 }, sources, len, Element::F32);
            made.push(Kernel::Own { op: Op::Concat { axis: 0 }, node, inputs: parts, shape: vec![len], moments: None });
            let (rank, pattern, dtype) = (Rank::Full, Pattern::Same, Element::F32);
            made.push(Kernel::Fused(Fused {
                rows: 1,
                cols: len,
                dims: vec![len],
                inner: 1,
                inputs: vec![Input { source: node, offset: 0, rank, dtype, pattern }],
                code: vec![(Instr::Load(0), rank)],
                nodes: vec![output.target],
                outputs: vec![Output { value: 0, ..output }],
            }));
            keys.extend([schedule.keys[self.index]; 2]);
        }

        let first = schedule.kernels.len();
        pieces.extend(values.into_iter().map(|p| Piece { kernel: first + p.kernel, ..p }));
        schedule.kernels.extend(made);
        schedule.keys.extend(keys);
        module.updates.retain(|(leaf, _)| !self.leaves.values().any(|l| l == leaf));
        removed.extend(self.gone);
        removed.insert(self.index);
    }
}
