//! The plan: kernels in order, and the place of every value. Made once; a step only runs it.

use crate::fuse::{Fusion, fuse};
use crate::kept::{Halves, Kept};
use crate::kernel::{Element, Kernel, Operand, Pattern, Rank, Store};
use crate::lower::{LowerError, lower};
use crate::memory::{Life, pack};
use crate::module::{Class, Module, class};
use crate::precision::{self, Precision};
use crate::update::{self, Schedule};
use clip_host_graph::program::{Program, ProgramError};
use clip_host_plugin_api::ir::{DType, Node, NodeId, Op};
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::ops::Range;
use thiserror::Error;

/// Why a program could not be compiled.
#[derive(Debug, Error)]
pub enum CompileError {
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Lower(#[from] LowerError),
    #[error("{op} gives {shape:?}, which has no elements (hint: every size must be at least 1)")]
    Empty { op: &'static str, shape: Vec<usize> },
    #[error("the compiler made a plan that reads %{0} before it is written")]
    Schedule(NodeId),
}

/// Memory that a value lives in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Region {
    /// Reused from launch to launch.
    Arena,
    /// The memory of a leaf: an input, a parameter, a state or a literal.
    Leaf(NodeId),
}

/// A place in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub region: Region,
    /// In bytes.
    pub offset: usize,
}

/// A compiled program.
pub struct Plan {
    pub nodes: Vec<Node>,
    pub kernels: Vec<Kernel>,
    /// How each node's value is kept, if it is stored.
    pub storage: Vec<Element>,
    /// The place of each stored value.
    pub places: HashMap<NodeId, Place>,
    /// Leaves that the program reads or writes.
    pub leaves: Vec<NodeId>,
    /// Results by name, as views of stored values.
    pub outputs: Vec<(String, Operand)>,
    /// Arena length in bytes.
    pub arena: usize,
    /// Floating-point operations of products and windows in one run.
    pub flops: f64,
}

/// Compiles a program in f32.
pub fn compile(program: &mut Program) -> Result<Plan, CompileError> {
    compile_with(program, Precision::F32)
}

/// Compiles a program whose persistent tensors are all f32.
pub fn compile_with(program: &mut Program, precision: Precision) -> Result<Plan, CompileError> {
    compile_kept(program, precision, &Halves::new())
}

/// Compiles a program: the visible list of passes, then fusion, precision, schedule and memory. `halves` are the leaves that
/// are kept in bf16.
pub fn compile_kept(program: &mut Program, precision: Precision, halves: &Halves) -> Result<Plan, CompileError> {
    program.run("decompose", crate::decompose::Decompose)?;
    program.run("simplify", crate::simplify::Simplify)?;
    program.run("moments", crate::moments::FindMoments)?;
    let mut module = Module::read(program);
    let towers = precision::take_boundaries(&mut module);
    if let Some(node) = module.nodes.iter().find(|n| n.elements() == 0) {
        return Err(CompileError::Empty { op: node.op.name(), shape: node.shape.clone() });
    }
    let kept = Kept::mark(&mut module, halves, precision);
    let fusion = fuse(&module);
    let stored = stored(&module, &fusion);
    let mut storage = match precision.half() {
        None => module.nodes.iter().map(|n| Element::of(n.dtype)).collect(),
        Some(half) => precision::mixed(&module, &fusion, &stored, &towers, half),
    };
    kept.store(&mut storage);
    plan(module, fusion, &kept, &stored, storage)
}

fn plan(
    mut module: Module,
    fusion: Fusion,
    kept: &Kept,
    stored: &[bool],
    mut storage: Vec<Element>,
) -> Result<Plan, CompileError> {
    let mut kernels = lower(&module, &fusion, stored, &storage)?;
    for kernel in &mut kernels {
        if let Kernel::Fused(fused) = kernel {
            kept.round(fused);
        }
    }
    let keys: Vec<NodeId> = fusion.units.iter().map(|u| u.roots.last().copied().unwrap_or(0)).collect();
    let mut schedule = Schedule { kernels, keys };
    let pieces = update::split(&mut module, &fusion, &mut schedule, &mut storage);
    let kernels = schedule.kernels;
    let mut graph = Dependencies::new(&kernels, schedule.keys);
    let view = |id: NodeId| fusion.views.of(id);

    // New values of leaves go straight into the leaves' memory where every reader of the old one comes first.
    let mut alias: HashMap<NodeId, Place> = HashMap::new();
    let mut copies: Vec<Kernel> = Vec::new();
    for piece in &pieces {
        let offset = piece.start * storage[piece.value as usize].bytes();
        alias.insert(piece.value, Place { region: Region::Leaf(piece.leaf), offset });
        let end = piece.start + module.node(piece.value).elements();
        graph.order_overlapping(&kernels, piece.leaf, piece.start..end, piece.kernel);
    }
    for &(leaf, value) in &module.updates {
        let value_view = view(value);
        let root = value_view.root;
        let whole = value_view.offset == 0
            && value_view.is_contiguous()
            && value_view.elements() == module.node(root).elements();
        let writer = graph.writer.get(&root).copied();
        let free = whole
            && class(&module.node(root).op) != Class::Leaf
            && !alias.contains_key(&root)
            && storage[root as usize] == storage[leaf as usize];
        match writer {
            Some(writer)
                if free && may_write_in_place(&kernels[writer], leaf, root) && graph.order_readers(leaf, writer) =>
            {
                alias.insert(root, Place { region: Region::Leaf(leaf), offset: 0 });
            }
            _ if root == leaf && whole => {}
            _ => {
                let operand = Operand { source: root, offset: value_view.offset, dims: value_view.dims.clone() };
                copies.push(Kernel::Store { leaf, value: operand });
            }
        }
    }

    // Parts of a concatenation are computed in place.
    let mut parent: HashMap<NodeId, (NodeId, usize)> = HashMap::new();
    for kernel in &kernels {
        let Kernel::Own { op: Op::Concat { axis }, node, inputs, shape, .. } = kernel else { continue };
        // In a leaf's memory the parts would overwrite what others have yet to read.
        if shape[..*axis].iter().any(|&d| d != 1) || alias.contains_key(node) {
            continue;
        }
        let mut offset = 0;
        for input in inputs {
            let elements: usize = input.dims.iter().map(|d| d.0).product();
            let source = module.node(input.source);
            let whole = input.offset == 0 && elements == source.elements();
            let owned = class(&source.op) != Class::Leaf && !alias.contains_key(&input.source);
            let alike = storage[input.source as usize] == storage[*node as usize];
            let single = inputs.iter().filter(|i| i.source == input.source).count() == 1;
            if whole && owned && single && alike && !parent.contains_key(&input.source) {
                parent.insert(input.source, (*node, offset));
            }
            offset += elements * storage[*node as usize].bytes();
        }
    }

    let order = graph.sort();
    let mut slots: Vec<Option<Kernel>> = kernels.into_iter().map(Some).collect();
    let mut kernels: Vec<Kernel> = order.into_iter().filter_map(|i| slots[i].take()).collect();
    kernels.extend(copies);

    let outputs: Vec<(String, Operand)> = module
        .outputs
        .iter()
        .map(|(name, id)| {
            let view = view(*id);
            (name.clone(), Operand { source: view.root, offset: view.offset, dims: view.dims.clone() })
        })
        .collect();
    let (places, arena, leaves) = place(&module, &kernels, &outputs, &alias, &parent, &storage)?;
    let flops = kernels.iter().map(flops).sum();
    Ok(Plan { nodes: module.nodes, kernels, storage, places, leaves, outputs, arena, flops })
}

/// The roots that someone outside their unit reads.
fn stored(module: &Module, fusion: &Fusion) -> Vec<bool> {
    let mut stored = vec![false; module.nodes.len()];
    for unit in &fusion.units {
        for &read in unit.reads.iter().filter(|r| !unit.roots.contains(r)) {
            stored[read as usize] = true;
        }
        if unit.space.is_none() {
            unit.roots.iter().for_each(|&r| stored[r as usize] = true);
        }
    }
    let ends = module.outputs.iter().map(|o| o.1).chain(module.updates.iter().map(|u| u.1));
    ends.for_each(|id| stored[fusion.views.of(id).root as usize] = true);
    stored
}

/// Whether a kernel may overwrite a leaf that it reads: point by point, or as the table of a scatter.
fn may_write_in_place(kernel: &Kernel, leaf: NodeId, root: NodeId) -> bool {
    match kernel {
        Kernel::Fused(fused) => {
            let stores_points = fused.outputs.iter().any(|o| o.target == root && o.store == Store::Each);
            let full = |o: &crate::kernel::Output| fused.code[o.value].1;
            let rank = fused.outputs.iter().find(|o| o.target == root).map(full);
            // A row's value is read again by every tile of its row, unless tiles hold whole rows.
            let once = rank == Some(Rank::Full) || (rank == Some(Rank::Row) && fused.has_row_reductions());
            stores_points
                && fused
                    .inputs
                    .iter()
                    .filter(|i| i.source == leaf)
                    .all(|i| i.pattern == Pattern::Same && i.offset == 0 && Some(i.rank) == rank && once)
        }
        Kernel::Own { op: Op::Scatter, inputs, .. } => {
            inputs[1..].iter().all(|i| i.source != leaf) && (inputs[0].source != leaf || inputs[0].offset == 0)
        }
        other => !other.reads().contains(&leaf),
    }
}

/// The order constraints between kernels.
struct Dependencies {
    writer: HashMap<NodeId, usize>,
    readers: HashMap<NodeId, Vec<usize>>,
    /// Kernels that must come before each.
    before: Vec<BTreeSet<usize>>,
    /// The schedule follows the order in which values were written down.
    keys: Vec<NodeId>,
}

impl Dependencies {
    fn new(kernels: &[Kernel], keys: Vec<NodeId>) -> Self {
        let mut writer = HashMap::new();
        let mut readers: HashMap<NodeId, Vec<usize>> = HashMap::new();
        for (index, kernel) in kernels.iter().enumerate() {
            writer.extend(kernel.writes().into_iter().map(|w| (w, index)));
            for read in kernel.reads() {
                readers.entry(read).or_default().push(index);
            }
        }
        let before = kernels
            .iter()
            .enumerate()
            .map(|(index, k)| k.reads().iter().filter_map(|r| writer.get(r).copied()).filter(|&w| w != index).collect())
            .collect();
        Dependencies { writer, readers, before, keys }
    }

    /// Demands that all readers of a leaf run before `writer`; refuses if that cannot be.
    fn order_readers(&mut self, leaf: NodeId, writer: usize) -> bool {
        let readers: Vec<usize> =
            self.readers.get(&leaf).into_iter().flatten().copied().filter(|&r| r != writer).collect();
        if readers.iter().any(|&reader| self.needs(reader, writer)) {
            return false;
        }
        self.before[writer].extend(readers);
        true
    }

    /// Demands that all who read a part of a leaf run before `writer` overwrites it. Nothing may need what `writer`
    /// writes there.
    fn order_overlapping(&mut self, kernels: &[Kernel], leaf: NodeId, part: Range<usize>, writer: usize) {
        let overlaps = |range: Range<usize>| range.start < part.end && part.start < range.end;
        let readers = self.readers.get(&leaf).into_iter().flatten().copied();
        let clash = |&reader: &usize| reader != writer && kernels[reader].reads_of(leaf).into_iter().any(overlaps);
        let readers: Vec<usize> = readers.filter(clash).collect();
        self.before[writer].extend(readers);
    }

    /// Whether kernel `a` must come after kernel `b`.
    fn needs(&self, a: usize, b: usize) -> bool {
        let mut seen = vec![false; self.before.len()];
        let mut stack = vec![a];
        while let Some(kernel) = stack.pop() {
            if kernel == b {
                return true;
            }
            if !std::mem::replace(&mut seen[kernel], true) {
                stack.extend(&self.before[kernel]);
            }
        }
        false
    }

    fn sort(&self) -> Vec<usize> {
        let count = self.before.len();
        let mut waiting: Vec<usize> = self.before.iter().map(BTreeSet::len).collect();
        let mut after: Vec<Vec<usize>> = vec![Vec::new(); count];
        for (kernel, before) in self.before.iter().enumerate() {
            before.iter().for_each(|&b| after[b].push(kernel));
        }
        let key = |k: usize| std::cmp::Reverse((self.keys[k], k));
        let mut ready: BinaryHeap<_> = (0..count).filter(|&k| waiting[k] == 0).map(key).collect();
        let mut order = Vec::with_capacity(count);
        while let Some(std::cmp::Reverse((_, kernel))) = ready.pop() {
            order.push(kernel);
            for &next in &after[kernel] {
                waiting[next] -= 1;
                if waiting[next] == 0 {
                    ready.push(key(next));
                }
            }
        }
        order
    }
}

type Placed = (HashMap<NodeId, Place>, usize, Vec<NodeId>);

fn place(
    module: &Module,
    kernels: &[Kernel],
    outputs: &[(String, Operand)],
    alias: &HashMap<NodeId, Place>,
    parent: &HashMap<NodeId, (NodeId, usize)>,
    storage: &[Element],
) -> Result<Placed, CompileError> {
    let is_leaf = |id: NodeId| class(&module.node(id).op) == Class::Leaf;
    let base = |mut id: NodeId| {
        let mut offset = 0;
        while let Some(&(up, at)) = parent.get(&id) {
            offset += at;
            id = up;
        }
        (id, offset)
    };
    let mut lives: BTreeMap<NodeId, Life> = BTreeMap::new();
    let mut leaves = BTreeSet::new();
    let mut written: BTreeSet<NodeId> = BTreeSet::new();
    let mut touched: BTreeSet<NodeId> = BTreeSet::new();
    for (time, kernel) in kernels.iter().enumerate() {
        for read in kernel.reads() {
            if !is_leaf(read) && !written.contains(&read) {
                return Err(CompileError::Schedule(read));
            }
        }
        written.extend(kernel.writes());
        for id in kernel.reads().into_iter().chain(kernel.writes()) {
            if is_leaf(id) {
                leaves.insert(id);
                continue;
            }
            touched.insert(id);
            let (id, _) = base(id);
            let bytes = module.node(id).elements() * storage[id as usize].bytes();
            let life = lives.entry(id).or_insert(Life { node: id, bytes, first: time, last: time });
            life.last = time;
        }
    }
    for (_, operand) in outputs {
        if is_leaf(operand.source) {
            leaves.insert(operand.source);
        } else if !written.contains(&operand.source) {
            return Err(CompileError::Schedule(operand.source));
        } else if let Some(life) = lives.get_mut(&base(operand.source).0) {
            life.last = kernels.len();
        }
    }
    leaves.extend(alias.values().filter_map(|p| match p.region {
        Region::Leaf(leaf) => Some(leaf),
        Region::Arena => None,
    }));
    lives.retain(|id, _| !alias.contains_key(id));
    let (offsets, arena) = pack(lives.into_values().collect());
    let mut places: HashMap<NodeId, Place> = HashMap::new();
    for id in touched {
        let (root, inner) = base(id);
        let place = match alias.get(&root) {
            Some(place) => Place { offset: place.offset + inner, ..*place },
            None => Place { region: Region::Arena, offset: offsets.get(&root).copied().unwrap_or(0) + inner },
        };
        places.insert(id, place);
    }
    for &leaf in &leaves {
        places.insert(leaf, Place { region: Region::Leaf(leaf), offset: 0 });
    }
    Ok((places, arena, leaves.into_iter().collect()))
}

/// Floating-point operations of a product or convolution.
pub fn flops(kernel: &Kernel) -> f64 {
    let Kernel::Own { op, inputs, shape, .. } = kernel else { return 0.0 };
    let size = |i: usize, d: usize| inputs[i].dims[d].0 as f64;
    let elements = |i: usize| inputs[i].dims.iter().map(|d| d.0 as f64).product::<f64>();
    let out: f64 = shape.iter().map(|&d| d as f64).product();
    match op {
        Op::Matmul => 2.0 * out * size(0, inputs[0].dims.len() - 1),
        Op::Conv2d(_) => 2.0 * out * elements(1) / size(1, 0),
        // The gradient's elements each meet a filter's weights.
        Op::Conv2dInputGrad(_) => 2.0 * elements(0) * elements(1) / size(1, 0),
        Op::Conv2dWeightGrad(_) => 2.0 * elements(1) * out / shape[0] as f64,
        _ => 0.0,
    }
}

/// Whether a leaf holds integers.
pub fn is_integer(node: &Node) -> bool {
    node.dtype == DType::I32
}
