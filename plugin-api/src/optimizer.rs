//! The contract of an optimizer: the update of one parameter.

use crate::describe::Plugin;
use crate::export::{Entry, Request, config};
use crate::graph::{BuildError, Graph, Tensor};
use crate::ir::{DType, Fragment};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::marker::PhantomData;

/// An optimizer.
pub trait Optimizer: Plugin {
    /// Whether every element is updated by itself (Adam, SGD). The host then joins all parameters of a group into one
    /// flat vector and updates them in one pass, and refuses an update with reductions or with states of other shapes;
    /// otherwise `build` is called for each parameter with its own shape.
    const ELEMENTWISE: bool = true;

    /// Numbers that depend on the step and the learning rate only, computed on the host in double precision (bias
    /// corrections and the like). `step` counts from 1. Their names must not depend on the arguments.
    fn scalars(config: &Self::Config, step: u64, lr: f64) -> Vec<(&'static str, f64)>;

    /// The parameter's new value. Moments are `graph.state(name, update.shape(), …)` with `graph.update`.
    fn build<'g>(config: &Self::Config, graph: &'g Graph, update: &ParamUpdate<'g>) -> Result<Tensor<'g>, BuildError>;
}

/// What the host gives an optimizer for one parameter.
pub struct ParamUpdate<'g> {
    pub param: Tensor<'g>,
    /// The loss's gradient, same shape.
    pub grad: Tensor<'g>,
    pub info: ParamInfo,
    scalars: BTreeMap<String, Tensor<'g>>,
}

impl<'g> ParamUpdate<'g> {
    /// What the host makes of its nodes; `scalars` under the names that [`Optimizer::scalars`] gives them.
    pub fn new(
        param: Tensor<'g>,
        grad: Tensor<'g>,
        info: ParamInfo,
        scalars: impl IntoIterator<Item = (String, Tensor<'g>)>,
    ) -> Self {
        ParamUpdate { param, grad, info, scalars: scalars.into_iter().collect() }
    }

    pub fn shape(&self) -> Vec<usize> {
        self.param.shape()
    }

    /// A number by the name that [`Optimizer::scalars`] gave it.
    pub fn scalar(&self, name: &str) -> Result<Tensor<'g>, BuildError> {
        let known: Vec<&str> = self.scalars.keys().map(String::as_str).collect();
        self.scalars
            .get(name)
            .copied()
            .ok_or_else(|| BuildError::new(format!("`scalars` gives no `{name}` (it gives {})", known.join(", "))))
    }
}

/// What is known of a parameter when its update is built.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParamInfo {
    /// The parameter's name, or the group's where parameters are joined.
    pub name: String,
    pub shape: Vec<usize>,
    /// The group's weight decay; 0 for parameters that do not decay.
    pub weight_decay: f64,
}

/// The host's request for one update, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerRequest {
    pub config: serde_json::Value,
    pub info: ParamInfo,
}

/// The host's request for a step's scalars, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScalarsRequest {
    pub config: serde_json::Value,
    /// From 1.
    pub step: u64,
    pub lr: f64,
}

/// The answer to [`ScalarsRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScalarsAnswer {
    pub elementwise: bool,
    pub scalars: Vec<(String, f64)>,
}

/// Builds the update of one parameter: inputs `param`, `grad` and `scalar.<name>`, output `param`.
pub fn build<O: Optimizer>(request: &OptimizerRequest) -> Result<Fragment, BuildError> {
    let graph = Graph::new();
    let config = config::<O>(&request.config)?;
    let shape = &request.info.shape;
    let scalars = O::scalars(&config, 1, 0.0).into_iter();
    let update = ParamUpdate::new(
        graph.input("param", shape, DType::F32),
        graph.input("grad", shape, DType::F32),
        request.info.clone(),
        scalars.map(|(name, _)| (name.to_string(), graph.input(&format!("scalar.{name}"), &[], DType::F32))),
    );
    let new = O::build(&config, &graph, &update)?.expand_to(shape);
    graph.output("param", new);
    graph.finish()
}

/// Connects an optimizer to the plugin boundary; used by [`crate::export_plugin`].
pub struct OptimizerEntry<O>(PhantomData<O>);

impl<O: Optimizer> Entry for OptimizerEntry<O> {
    type Plugin = O;
    const KIND: crate::describe::Kind = crate::describe::Kind::Optimizer;

    fn answer(request: Request) -> Result<String, BuildError> {
        match request {
            Request::Optimizer(request) => crate::export::to_json(&build::<O>(&request)?),
            Request::Scalars(request) => {
                let scalars = O::scalars(&config::<O>(&request.config)?, request.step, request.lr);
                let scalars = scalars.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
                crate::export::to_json(&ScalarsAnswer { elementwise: O::ELEMENTWISE, scalars })
            }
            other => Err(other.refused_by::<Self>()),
        }
    }
}
