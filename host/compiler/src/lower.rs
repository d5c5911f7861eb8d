//! From units to kernels: instruction lists and operands with strides.

use crate::fuse::{Fusion, Space, Unit, boundaries};
use crate::kernel::{Element, Fused, Input, Instr, Kernel, Operand, Output, Pattern, Rank, Reg, Rounding, Store};
use crate::module::{Class, Module, class, reduction};
use crate::view::{View, merge, split};
use clip_host_plugin_api::ir::{NodeId, Op};
use std::collections::{BTreeSet, HashMap};
use thiserror::Error;

/// A unit that could not be lowered: a defect of the compiler, told rather than run.
#[derive(Debug, Error)]
#[error("the compiler could not lower node %{node} ({op}): {why}")]
pub struct LowerError {
    pub node: NodeId,
    pub op: &'static str,
    pub why: String,
}

/// Lowers every unit. `stored` says which roots someone outside their unit reads, `storage` how each node is kept.
pub fn lower(
    module: &Module,
    fusion: &Fusion,
    stored: &[bool],
    storage: &[Element],
) -> Result<Vec<Kernel>, LowerError> {
    fusion.units.iter().map(|unit| lower_unit(module, fusion, unit, stored, storage)).collect()
}

fn operand(view: &View) -> Operand {
    Operand { source: view.root, offset: view.offset, dims: view.dims.clone() }
}

fn lower_unit(
    module: &Module,
    fusion: &Fusion,
    unit: &Unit,
    stored: &[bool],
    storage: &[Element],
) -> Result<Kernel, LowerError> {
    let root = unit.roots.first().copied().unwrap_or_default();
    let node = module.node(root);
    let Some(space) = unit.space else {
        return Ok(match class(&node.op) {
            Class::Movement => {
                let mut view = fusion.views.of(node.inputs[0]).clone();
                view = match &node.op {
                    Op::Permute { axes } => view.permute(axes),
                    Op::Broadcast => view.broadcast(&node.shape),
                    Op::Slice { starts, ends } => view.slice(starts, ends),
                    _ => view,
                };
                Kernel::Copy { node: root, input: operand(&view) }
            }
            _ => Kernel::Own {
                op: node.op.clone(),
                node: root,
                inputs: node.inputs.iter().map(|&i| operand(fusion.views.of(i))).collect(),
                shape: node.shape.clone(),
                moments: unit.roots.iter().nth(1).copied(),
            },
        });
    };
    let fail = |why: &str| LowerError { node: root, op: node.op.name(), why: why.into() };
    let mut lowering =
        Lowering::new(module, fusion, unit, space, storage).ok_or_else(|| fail("its shapes do not nest"))?;
    for &id in &unit.body {
        lowering.visit(id).ok_or_else(|| fail("an operand is not strided over the kernel's dimensions"))?;
    }
    Ok(Kernel::Fused(lowering.finish(stored)))
}

struct Lowering<'a> {
    module: &'a Module,
    fusion: &'a Fusion,
    unit: &'a Unit,
    storage: &'a [Element],
    space: Space,
    rows: usize,
    cols: usize,
    dims: Vec<usize>,
    inner: usize,
    inputs: Vec<Input>,
    code: Vec<(Instr, Rank)>,
    outputs: Vec<(NodeId, Reg, Store)>,
    regs: HashMap<NodeId, Reg>,
    loads: HashMap<(View, Rank), Reg>,
    made: HashMap<String, Reg>,
}

impl<'a> Lowering<'a> {
    fn new(
        module: &'a Module,
        fusion: &'a Fusion,
        unit: &'a Unit,
        space: Space,
        storage: &'a [Element],
    ) -> Option<Self> {
        let body: BTreeSet<NodeId> = unit.body.clone();
        let sizes = boundaries(module, |id| fusion.views.of(id), |id| fusion.anchors[id as usize], &body, space)?;
        let mut lowering = Lowering {
            module,
            fusion,
            unit,
            storage,
            space,
            rows: 1,
            cols: 1,
            dims: sizes,
            inner: 0,
            inputs: vec![],
            code: vec![],
            outputs: vec![],
            regs: HashMap::new(),
            loads: HashMap::new(),
            made: HashMap::new(),
        };
        lowering.choose_dims()?;
        Some(lowering)
    }

    /// Joins dimensions that every operand walks with one stride, and says where rows end and columns begin.
    fn choose_dims(&mut self) -> Option<()> {
        let mut walks: Vec<Vec<usize>> = Vec::new();
        for &id in &self.unit.body {
            let node = self.module.node(id);
            if let Op::Iota { axis } = node.op {
                walks.push(self.index_factors(&node.shape, axis, self.rank_of(id))?);
            }
            for &input in &node.inputs {
                let view = self.fusion.views.of(input);
                if !self.unit.body.contains(&view.root) {
                    walks.push(self.strides(view, self.rank_of_reader(id))?);
                }
            }
        }
        let boundary = self.space.cols;
        let mut sizes: Vec<usize> = vec![];
        let mut kept: Vec<Vec<usize>> = vec![vec![]; walks.len()];
        // Points behind one step of a dimension.
        let mut behind: usize = self.dims.iter().product();
        for (d, &size) in self.dims.iter().enumerate() {
            let at_boundary = boundary == Some(behind);
            behind /= size;
            let joins = !sizes.is_empty()
                && !at_boundary
                && walks.iter().zip(&kept).all(|(walk, kept)| kept.last() == Some(&(walk[d] * size)));
            if joins {
                if let Some(last) = sizes.last_mut() {
                    *last *= size;
                }
                kept.iter_mut().zip(&walks).for_each(|(kept, walk)| {
                    if let Some(last) = kept.last_mut() {
                        *last = walk[d];
                    }
                });
            } else {
                sizes.push(size);
                kept.iter_mut().zip(&walks).for_each(|(kept, walk)| kept.push(walk[d]));
            }
        }
        self.dims = sizes;
        self.cols = boundary.unwrap_or_else(|| self.dims.last().copied().unwrap_or(1));
        self.rows = self.space.elements / self.cols.max(1);
        let mut product = 1;
        self.inner = 0;
        for &size in self.dims.iter().rev() {
            if product == self.cols {
                break;
            }
            product *= size;
            self.inner += 1;
        }
        (product == self.cols).then_some(())
    }

    /// Strides of a view over `dims` (row values: 0 over the columns).
    fn strides(&self, view: &View, reader: Rank) -> Option<Vec<usize>> {
        let dims = match (reader, self.space.cols) {
            (Rank::Row, Some(cols)) => {
                let mut dims = view.dims.clone();
                dims.push((cols, 0));
                dims
            }
            _ => view.dims.clone(),
        };
        let elements: usize = dims.iter().map(|d| d.0).product();
        if elements == 1 {
            return Some(vec![0; self.dims.len()]);
        }
        Some(split(&merge(&dims), &self.dims)?.into_iter().map(|d| d.1).collect())
    }

    /// What an iota adds for one step along each of `dims`.
    fn index_factors(&self, shape: &[usize], axis: usize, rank: Rank) -> Option<Vec<usize>> {
        let dims: Vec<(usize, usize)> =
            shape.iter().enumerate().map(|(d, &size)| (size, usize::from(d == axis))).collect();
        // A unit stride along one axis and 0 elsewhere is a view over 0, 1, 2, …
        self.strides(&View { root: 0, offset: 0, dims }, rank)
    }

    /// The rank of a pointwise node's own value by its shape.
    fn rank_of(&self, id: NodeId) -> Rank {
        let elements = self.module.node(id).elements();
        match self.space.cols {
            Some(cols) if elements != self.space.elements && elements * cols == self.space.elements => Rank::Row,
            _ if elements == self.space.elements => Rank::Full,
            _ => Rank::Scalar,
        }
    }

    /// The rank at which a node reads its operands: reductions read what they reduce.
    fn rank_of_reader(&self, id: NodeId) -> Rank {
        match class(&self.module.node(id).op) {
            Class::Reduce => {
                let source = self.module.node(id).inputs[0];
                let elements = self.module.node(source).elements();
                if elements == self.space.elements { Rank::Full } else { Rank::Row }
            }
            _ => self.rank_of(id),
        }
    }

    fn emit(&mut self, instr: Instr, rank: Rank) -> Reg {
        let key = format!("{instr:?}{rank:?}");
        if let Some(&reg) = self.made.get(&key) {
            return reg;
        }
        self.code.push((instr, rank));
        self.made.insert(key, self.code.len() - 1);
        self.code.len() - 1
    }

    fn expand(&mut self, reg: Reg, rank: Rank) -> Reg {
        if self.code[reg].1 >= rank { reg } else { self.emit(Instr::Expand(reg), rank) }
    }

    /// The register that holds an operand as a reader of some rank sees it.
    fn read(&mut self, input: NodeId, reader: Rank) -> Option<Reg> {
        let view = self.fusion.views.of(input).clone();
        if let Some(&reg) = self.regs.get(&view.root) {
            return Some(reg);
        }
        let key = (view.order(), reader);
        if let Some(&reg) = self.loads.get(&key) {
            return Some(reg);
        }
        let strides = self.strides(&view, reader)?;
        let outer = self.dims.len() - self.inner;
        let (rank, pattern) = classify(&strides, &self.dims, outer);
        let dtype = self.storage[view.root as usize];
        self.inputs.push(Input { source: view.root, offset: view.offset, rank, dtype, pattern });
        let reg = self.emit(Instr::Load(self.inputs.len() - 1), rank);
        self.loads.insert(key, reg);
        Some(reg)
    }

    fn visit(&mut self, id: NodeId) -> Option<()> {
        let node = self.module.node(id);
        let reader = self.rank_of_reader(id);
        let regs: Vec<Reg> = node.inputs.iter().map(|&i| self.read(i, reader)).collect::<Option<_>>()?;
        let rank = regs.iter().map(|&r| self.code[r].1).max().unwrap_or(Rank::Scalar);
        let reg = match &node.op {
            Op::Constant { value } => self.emit(Instr::Const(*value as f32), Rank::Scalar),
            Op::Iota { axis } => {
                let factors = self.index_factors(&node.shape, *axis, self.rank_of(id))?;
                self.emit(Instr::Index(factors), self.rank_of(id))
            }
            Op::Random { stream } => self.emit(Instr::Random(*stream), self.rank_of(id)),
            Op::Unary(op) => self.emit(Instr::Unary(*op, regs[0]), rank),
            Op::Binary(op) => self.emit(Instr::Binary(*op, regs[0], regs[1]), rank),
            Op::Compare(op) => self.emit(Instr::Compare(*op, regs[0], regs[1]), rank),
            Op::Select => self.emit(Instr::Select(regs[0], regs[1], regs[2]), rank),
            // Integers become floats when they are loaded.
            Op::Cast | Op::Detach => regs[0],
            Op::Sum { axes } | Op::Max { axes } => {
                let sum = matches!(node.op, Op::Sum { .. });
                let value = self.expand(regs[0], reader);
                let source = &self.module.node(node.inputs[0]).shape;
                let store = match reduction(source, axes) {
                    (a, r, 1) if reader == Rank::Full && self.space.cols == Some(r) && a == self.rows => {
                        let instr = if sum { Instr::RowSum(value) } else { Instr::RowMax(value) };
                        let reg = self.emit(instr, Rank::Row);
                        self.regs.insert(id, reg);
                        self.store(id, reg, Rank::Row);
                        return Some(());
                    }
                    (1, _, 1) if sum => Store::SumAll,
                    (1, _, 1) => Store::MaxAll,
                    (_, segment, _) if sum => Store::SumRows { segment },
                    (_, segment, _) => Store::MaxRows { segment },
                };
                self.outputs.push((id, value, store));
                return Some(());
            }
            _ => return None,
        };
        self.regs.insert(id, reg);
        if self.unit.roots.contains(&id) {
            self.store(id, reg, self.rank_of(id));
        }
        Some(())
    }

    fn store(&mut self, id: NodeId, reg: Reg, rank: Rank) {
        // A single value is a row value of the one row.
        let rank = if rank == Rank::Scalar { Rank::Full } else { rank };
        let reg = self.expand(reg, rank);
        self.outputs.push((id, reg, Store::Each));
    }

    /// Keeps what is stored and what that needs.
    fn finish(self, stored: &[bool]) -> Fused {
        let outputs: Vec<(NodeId, Reg, Store)> =
            self.outputs.into_iter().filter(|(target, ..)| stored[*target as usize]).collect();
        let mut live = vec![false; self.code.len()];
        outputs.iter().for_each(|o| live[o.1] = true);
        for reg in (0..self.code.len()).rev().collect::<Vec<_>>() {
            if live[reg] {
                operands(&self.code[reg].0).into_iter().for_each(|r| live[r] = true);
            }
        }
        let mut new = vec![0; self.code.len()];
        let mut inputs = Vec::new();
        let mut code = Vec::new();
        for (reg, (instr, rank)) in self.code.into_iter().enumerate().filter(|(reg, _)| live[*reg]) {
            let instr = match instr {
                Instr::Load(input) => {
                    inputs.push(self.inputs[input].clone());
                    Instr::Load(inputs.len() - 1)
                }
                other => renamed(other, &new),
            };
            new[reg] = code.len();
            code.push((instr, rank));
        }
        let outputs = outputs
            .into_iter()
            .map(|(target, value, store)| {
                let dtype = self.storage[target as usize];
                Output { target, value: new[value], store, dtype, rounding: Rounding::Nearest }
            })
            .collect();
        let nodes = self.unit.body.iter().copied().collect();
        Fused { rows: self.rows, cols: self.cols, dims: self.dims, inner: self.inner, inputs, code, outputs, nodes }
    }
}

/// The registers that an instruction reads.
pub fn operands(instr: &Instr) -> Vec<Reg> {
    match instr {
        Instr::Load(_) | Instr::Const(_) | Instr::Index(_) | Instr::Random(_) => vec![],
        Instr::Unary(_, a) | Instr::Expand(a) | Instr::RowSum(a) | Instr::RowMax(a) => vec![*a],
        Instr::Binary(_, a, b) | Instr::Compare(_, a, b) => vec![*a, *b],
        Instr::Select(a, b, c) => vec![*a, *b, *c],
    }
}

fn renamed(instr: Instr, new: &[Reg]) -> Instr {
    match instr {
        Instr::Unary(op, a) => Instr::Unary(op, new[a]),
        Instr::Expand(a) => Instr::Expand(new[a]),
        Instr::RowSum(a) => Instr::RowSum(new[a]),
        Instr::RowMax(a) => Instr::RowMax(new[a]),
        Instr::Binary(op, a, b) => Instr::Binary(op, new[a], new[b]),
        Instr::Compare(op, a, b) => Instr::Compare(op, new[a], new[b]),
        Instr::Select(a, b, c) => Instr::Select(new[a], new[b], new[c]),
        other => other,
    }
}

fn classify(strides: &[usize], dims: &[usize], outer: usize) -> (Rank, Pattern) {
    let contiguous = |strides: &[usize], dims: &[usize]| {
        let mut expected = 1;
        dims.iter().zip(strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected *= size;
            fits
        })
    };
    let zero = |s: &[usize], d: &[usize]| s.iter().zip(d).all(|(&s, &d)| s == 0 || d == 1);
    let ((so, si), (d_o, di)) = (strides.split_at(outer), dims.split_at(outer));
    if zero(strides, dims) {
        return (Rank::Scalar, Pattern::Same);
    }
    if contiguous(strides, dims) {
        return (Rank::Full, Pattern::Same);
    }
    if zero(si, di) {
        let same = contiguous(so, d_o);
        return (Rank::Row, if same { Pattern::Same } else { Pattern::Strided(so.to_vec()) });
    }
    if zero(so, d_o) && contiguous(si, di) {
        return (Rank::Full, Pattern::Column);
    }
    (Rank::Full, Pattern::Strided(strides.to_vec()))
}
