//! The node type of assembled programs: an IR op as a luminal operator.

use clip_host_plugin_api::interpret::interpret;
use clip_host_plugin_api::ir::{DType, Fragment, Node, NodeId, Op};
use luminal::op::{InputTensor, Operator};
use luminal::shape::ShapeTracker;
use luminal::tensor::Tensor;
use std::collections::HashMap;

/// An IR op with the shape and type of its result. The edges that lead to it carry the operands in order, as
/// contiguous tensors: movement is explicit in the op set, not hidden in the edges' trackers.
#[derive(Clone, Debug, PartialEq)]
pub struct IrOperator {
    pub op: Op,
    pub shape: Vec<usize>,
    pub dtype: DType,
}

impl IrOperator {
    pub fn new(node: &Node) -> Self {
        IrOperator { op: node.op.clone(), shape: node.shape.clone(), dtype: node.dtype }
    }
}

impl Operator for IrOperator {
    /// luminal's own execution: the reference interpreter, node by node. Slow; for tests. Random ops draw with seed 0.
    fn process(&mut self, inputs: Vec<(InputTensor, ShapeTracker)>) -> Vec<Tensor> {
        let mut fragment = Fragment::default();
        let mut values = HashMap::new();
        for (position, (tensor, tracker)) in inputs.iter().enumerate() {
            let data = tensor.borrowed().data.as_any().downcast_ref::<Vec<f32>>().map(Vec::as_slice).unwrap_or(&[]);
            let shape = tracker.shape().iter().filter_map(|d| d.to_usize()).collect();
            let name = position.to_string();
            values.insert(name.clone(), data.iter().map(|&v| f64::from(v)).collect());
            // Types do not matter to the interpreter, the op's own check has passed.
            fragment.nodes.push(Node { op: Op::Input { name }, inputs: vec![], shape, dtype: DType::F32 });
        }
        let inputs = (0..inputs.len() as NodeId).collect();
        fragment.nodes.push(Node { op: self.op.clone(), inputs, shape: self.shape.clone(), dtype: self.dtype });
        let result = interpret(&fragment, &values, 0).ok().and_then(|mut all| all.pop()).unwrap_or_default();
        vec![Tensor::new(result.into_iter().map(|v| v as f32).collect::<Vec<f32>>())]
    }
}
