//! Channels-last: convolution, pooling and batch norm work on NHWC inside, whatever plugins write.
//!
//! An NCHW op becomes permute → NHWC op → permute back. The pass carries each value's NHWC twin along elementwise ops
//! and reductions, so that the permutes cancel and only those at the edges of the image tower remain.

use clip_host_graph::rewrite::{Builder, rewrite};
use clip_host_plugin_api::ir::{DType, Layout, Node, NodeId, Op};
use luminal::compiler_utils::{Compiler, ToIdsMut};
use luminal::graph::Graph;

/// The pass.
#[derive(Debug)]
pub struct ChannelsLast;

const TO_NHWC: [usize; 4] = [0, 2, 3, 1];
const TO_NCHW: [usize; 4] = [0, 3, 1, 2];

impl Compiler for ChannelsLast {
    fn compile<T: ToIdsMut>(&self, graph: &mut Graph, ids: T) {
        rewrite(graph, ids, |nodes, builder| {
            let mut pass = Pass { builder, twin: vec![], new: vec![], nodes };
            for node in nodes {
                pass.visit(node);
            }
            pass.new
        });
    }
}

struct Pass<'a> {
    builder: &'a mut Builder,
    nodes: &'a [Node],
    /// NHWC twin of each old node, where it has one.
    twin: Vec<Option<NodeId>>,
    /// NCHW (logical) replacement of each old node.
    new: Vec<NodeId>,
}

impl Pass<'_> {
    fn visit(&mut self, node: &Node) {
        let twin = self.twin_of(node);
        let id = match twin {
            Some(twin) => self.permute(twin, &TO_NCHW),
            None => {
                let inputs = node.inputs.iter().map(|&i| self.new[i as usize]).collect();
                self.builder.push(node.op.clone(), inputs, node.shape.clone(), node.dtype)
            }
        };
        self.twin.push(twin);
        self.new.push(id);
    }

    /// Builds the op on NHWC operands if it is one of the image tower's.
    fn twin_of(&mut self, node: &Node) -> Option<NodeId> {
        if node.shape.len() != 4 || node.dtype != DType::F32 {
            return None;
        }
        let shape: Vec<usize> = TO_NHWC.iter().map(|&a| node.shape[a]).collect();
        let has_twin = |pass: &Self| node.inputs.iter().any(|&i| pass.twin[i as usize].is_some());
        let op = match &node.op {
            Op::Conv2d(conv) if conv.layout == Layout::Nchw => {
                let mut conv = *conv;
                conv.layout = Layout::Nhwc;
                let (x, weight) = (self.nhwc(node.inputs[0]), self.new[node.inputs[1] as usize]);
                return Some(self.builder.f32(Op::Conv2d(conv), &[x, weight], &shape));
            }
            Op::MaxPool2d(pool) | Op::AvgPool2d(pool) if pool.layout == Layout::Nchw => {
                let mut pool = *pool;
                pool.layout = Layout::Nhwc;
                let op = match node.op {
                    Op::MaxPool2d(_) => Op::MaxPool2d(pool),
                    _ => Op::AvgPool2d(pool),
                };
                let x = self.nhwc(node.inputs[0]);
                return Some(self.builder.f32(op, &[x], &shape));
            }
            Op::BatchNorm { eps, axis: 1 } => {
                let x = self.nhwc(node.inputs[0]);
                let (gain, bias) = (self.new[node.inputs[1] as usize], self.new[node.inputs[2] as usize]);
                return Some(self.builder.f32(Op::BatchNorm { eps: *eps, axis: 3 }, &[x, gain, bias], &shape));
            }
            Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select | Op::Detach | Op::Gelu if has_twin(self) => {
                node.op.clone()
            }
            Op::Sum { axes } if has_twin(self) => Op::Sum { axes: mapped(axes) },
            Op::Max { axes } if has_twin(self) => Op::Max { axes: mapped(axes) },
            _ => return None,
        };
        let inputs: Vec<NodeId> = node.inputs.iter().map(|&i| self.nhwc(i)).collect();
        Some(self.builder.f32(op, &inputs, &shape))
    }

    /// The NHWC form of an old node's value.
    fn nhwc(&mut self, old: NodeId) -> NodeId {
        if let Some(twin) = self.twin[old as usize] {
            return twin;
        }
        let node = &self.nodes[old as usize];
        let shape: Vec<usize> = TO_NHWC.iter().map(|&a| node.shape[a]).collect();
        match &node.op {
            Op::Constant { .. } => self.builder.f32(node.op.clone(), &[], &shape),
            // Expand after the permute: moving a per-channel vector costs nothing.
            Op::Broadcast => {
                let x = self.nhwc(node.inputs[0]);
                self.builder.f32(Op::Broadcast, &[x], &shape)
            }
            _ => self.permute(self.new[old as usize], &TO_NHWC),
        }
    }

    fn permute(&mut self, x: NodeId, axes: &[usize; 4]) -> NodeId {
        let source = self.builder.node(x);
        let shape: Vec<usize> = axes.iter().map(|&a| source.shape[a]).collect();
        let dtype = source.dtype;
        self.builder.push(Op::Permute { axes: axes.to_vec() }, vec![x], shape, dtype)
    }
}

fn mapped(axes: &[usize]) -> Vec<usize> {
    // Where NCHW axis a stands in NHWC.
    let mut axes: Vec<usize> = axes.iter().map(|&a| [0, 3, 1, 2][a]).collect();
    axes.sort_unstable();
    axes
}
