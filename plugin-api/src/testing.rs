//! The author's harness: evaluates a plugin in f64 and differentiates it, inside the plugin's own `cargo test`.

use crate::encoder::{self, Encoder, EncoderRequest, InputShape};
use crate::gradient::{GradientError, differentiate};
use crate::graph::BuildError;
use crate::interpret::{InterpretError, interpret, uniform};
use crate::ir::{DType, Fragment, Init, Node, NodeId, Op};
use crate::loss::{self, Loss, LossRequest};
use crate::optimizer::{self, Optimizer, OptimizerRequest};
use std::collections::HashMap;
use thiserror::Error;

/// Why a check could not run.
#[derive(Debug, Error)]
pub enum TestingError {
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Gradient(#[from] GradientError),
    #[error(transparent)]
    Interpret(#[from] InterpretError),
    #[error("there is no {0}")]
    Unknown(String),
}

/// A fragment with values for its leaves, evaluated in f64.
pub struct Harness {
    pub fragment: Fragment,
    /// Values of inputs, parameters and states by name. States and parameters with a constant start hold it; all
    /// others must be set before a step.
    pub values: HashMap<String, Vec<f64>>,
    /// Seed of the random ops.
    pub seed: u64,
}

/// What one step computed.
pub struct Step {
    /// Outputs and metrics by name.
    pub outputs: HashMap<String, Vec<f64>>,
    /// Gradients of the seeded output by the name of the leaf.
    pub grads: HashMap<String, Vec<f64>>,
}

impl Harness {
    pub fn new(fragment: Fragment) -> Self {
        let mut values = HashMap::new();
        for node in &fragment.nodes {
            if let Op::Param { name, init: Init::Constant(v) } | Op::State { name, init: Init::Constant(v) } = &node.op
            {
                values.insert(name.clone(), vec![*v; node.elements()]);
            }
        }
        Harness { fragment, values, seed: 0 }
    }

    /// The fragment of a loss.
    pub fn loss<L: Loss>(
        config: &L::Config,
        batch: usize,
        embed_dim: usize,
        dataset_size: usize,
    ) -> Result<Self, BuildError> {
        let config = serde_json::to_value(config).map_err(|e| BuildError::new(e.to_string()))?;
        Ok(Self::new(loss::build::<L>(&LossRequest { config, batch, embed_dim, dataset_size })?))
    }

    /// The fragment of one parameter's update.
    pub fn optimizer<O: Optimizer>(config: &O::Config, shape: &[usize], weight_decay: f64) -> Result<Self, BuildError> {
        let config = serde_json::to_value(config).map_err(|e| BuildError::new(e.to_string()))?;
        let info = crate::optimizer::ParamInfo { name: "param".into(), shape: shape.to_vec(), weight_decay };
        Ok(Self::new(optimizer::build::<O>(&OptimizerRequest { config, info })?))
    }

    /// The fragment of an encoder.
    pub fn encoder<E: Encoder>(request: &EncoderRequest) -> Result<Self, BuildError> {
        Ok(Self::new(encoder::build::<E>(request)?))
    }

    /// The fragment of an encoder with settings, for a batch of `input`.
    pub fn encoder_with<E: Encoder>(
        config: &E::Config,
        batch: usize,
        input: InputShape,
        training: bool,
    ) -> Result<Self, BuildError> {
        let config = serde_json::to_value(config).map_err(|e| BuildError::new(e.to_string()))?;
        Self::encoder::<E>(&EncoderRequest { config, batch, input, training })
    }

    /// Gives every leaf that has no value yet one that its contract allows: normalised features have rows of unit length,
    /// ids count from 0 along the last axis, a mask is 1, `epoch` and `step` are 0; all else lies between −1 and 1 and
    /// follows from `seed`.
    pub fn fill(&mut self, seed: u64) -> &mut Self {
        for (leaf, node) in self.fragment.nodes.iter().enumerate() {
            let (Op::Input { name } | Op::Param { name, .. } | Op::State { name, .. }) = &node.op else { continue };
            if self.values.contains_key(name) {
                continue;
            }
            let row = node.shape.last().copied().unwrap_or(1).max(1);
            let mut values: Vec<f64> = (0..node.elements())
                .map(|i| match (node.dtype, name.as_str()) {
                    (DType::I32, _) => (i % row) as f64,
                    (_, "attention_mask") => 1.0,
                    (_, "epoch" | "step") => 0.0,
                    _ => 2.0 * uniform(seed, leaf as u32, i as u64) - 1.0,
                })
                .collect();
            if matches!(name.as_str(), "image_features" | "text_features") {
                for row in values.chunks_mut(row) {
                    let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
                    row.iter_mut().for_each(|x| *x /= norm);
                }
            }
            self.values.insert(name.clone(), values);
        }
        self
    }

    /// Sets a leaf.
    pub fn set(&mut self, name: &str, values: impl IntoIterator<Item = f64>) -> &mut Self {
        self.values.insert(name.into(), values.into_iter().collect());
        self
    }

    /// The named leaf.
    pub fn leaf(&self, name: &str) -> Option<(NodeId, &Node)> {
        self.fragment.nodes.iter().enumerate().find_map(|(id, node)| match &node.op {
            Op::Input { name: n } | Op::Param { name: n, .. } | Op::State { name: n, .. } if n == name => {
                Some((id as NodeId, node))
            }
            _ => None,
        })
    }

    /// Evaluates the outputs; with `of`, also the gradients of `Σ cotangent · output` (cotangent 1 if absent) with
    /// respect to the leaves named in `wrt`. Then applies updates and projections to the stored values.
    pub fn step(&mut self, of: Option<(&str, Option<&[f64]>)>, wrt: &[&str]) -> Result<Step, TestingError> {
        let mut program = self.fragment.clone();
        let mut values = self.values.clone();
        // Only what is read must have a value: unused inputs of the contract are zero.
        for node in &program.nodes {
            if let Op::Input { name } = &node.op {
                values.entry(name.clone()).or_insert_with(|| vec![0.0; node.elements()]);
            }
        }
        if let Some((output, cotangent)) = of {
            let target = program.output(output).ok_or_else(|| TestingError::Unknown(format!("output `{output}`")))?;
            let shape = program.nodes[target as usize].shape.clone();
            let seed = program.nodes.len() as NodeId;
            let op = Op::Input { name: "cotangent".into() };
            let elements = shape.iter().product();
            program.nodes.push(Node { op, inputs: vec![], shape, dtype: DType::F32 });
            values.insert("cotangent".into(), cotangent.map_or(vec![1.0; elements], <[f64]>::to_vec));
            let leaves: Vec<NodeId> = wrt
                .iter()
                .map(|name| self.leaf(name).map(|l| l.0).ok_or_else(|| TestingError::Unknown(format!("leaf `{name}`"))))
                .collect::<Result<_, _>>()?;
            program = differentiate(&program, &[(target, seed)], &leaves)?;
        }
        let results = interpret(&program, &values, self.seed)?;
        let named = program.outputs.iter().chain(&program.metrics);
        let mut outputs: HashMap<String, Vec<f64>> =
            named.map(|(name, id)| (name.clone(), results[*id as usize].clone())).collect();
        let grads = wrt
            .iter()
            .enumerate()
            .filter_map(|(i, name)| Some((name.to_string(), outputs.remove(&format!("grad.{i}"))?)))
            .collect();
        for &(target, value) in program.updates.iter().chain(&program.projections) {
            if let Op::Param { name, .. } | Op::State { name, .. } = &program.nodes[target as usize].op {
                self.values.insert(name.clone(), results[value as usize].clone());
            }
        }
        Ok(Step { outputs, grads })
    }

    /// The largest difference between the gradient of an output's sum and central finite differences over the leaves
    /// named in `wrt`, relative to the largest gradient. Formulas with `detach` differ on purpose: leave those out.
    pub fn gradient_error(&self, output: &str, wrt: &[&str]) -> Result<f64, TestingError> {
        let fresh = || Harness { fragment: self.fragment.clone(), values: self.values.clone(), seed: self.seed };
        let grads = fresh().step(Some((output, None)), wrt)?.grads;
        let mut worst = 0.0f64;
        for name in wrt {
            let values = self.values.get(*name).ok_or_else(|| TestingError::Unknown(format!("value of `{name}`")))?;
            let scale = grads[*name].iter().fold(1e-6f64, |m, g| m.max(g.abs()));
            for i in 0..values.len() {
                let h = 1e-5 * values[i].abs().max(1.0);
                let at = |shift: f64| -> Result<f64, TestingError> {
                    let mut harness = fresh();
                    if let Some(values) = harness.values.get_mut(*name) {
                        values[i] += shift;
                    }
                    Ok(harness.step(None, &[])?.outputs[output].iter().sum())
                };
                let numeric = (at(h)? - at(-h)?) / (2.0 * h);
                worst = worst.max((numeric - grads[*name][i]).abs() / scale);
            }
        }
        Ok(worst)
    }
}
