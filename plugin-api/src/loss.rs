//! The contract of a loss: a formula over one batch of image and text features.

use crate::describe::Plugin;
use crate::export::{Entry, Request, config};
use crate::graph::{BuildError, Graph, Tensor};
use crate::ir::{DType, Fragment};
use serde::{Deserialize, Serialize};
use std::marker::PhantomData;

/// A loss. Gradients, fusion and devices are the host's matter: the plugin writes the forward formula only.
pub trait Loss: Plugin {
    /// What the formula detaches on purpose, in words ("the weights of the pairs"): the gradient that trains is then not
    /// that of the value, as with weights from moving averages. `plugins check` takes any other difference for a mistake.
    const HELD_CONSTANT: Option<&'static str> = None;

    /// The scalar loss of a batch. Per-sample tables are `graph.state(…, &[inputs.dataset_size], …)`, read with
    /// `gather(inputs.image_ids)` and written with `graph.update(table, table.scatter(inputs.image_ids, rows))`.
    fn build<'g>(config: &Self::Config, graph: &'g Graph, inputs: &LossInputs<'g>) -> Result<Tensor<'g>, BuildError>;
}

/// What the host gives a loss.
pub struct LossInputs<'g> {
    /// Rows of unit length, `[batch, embed_dim]`.
    pub image_features: Tensor<'g>,
    /// Rows of unit length, `[batch, embed_dim]`; row i belongs to image row i.
    pub text_features: Tensor<'g>,
    /// The same before normalisation.
    pub image_embeddings: Tensor<'g>,
    pub text_embeddings: Tensor<'g>,
    /// Ordinals of the batch's images in the data set, i32 `[batch]`, distinct.
    pub image_ids: Tensor<'g>,
    /// Ordinals of the batch's captions, i32 `[batch]`, distinct.
    pub text_ids: Tensor<'g>,
    /// Number of the epoch, from 0; a scalar.
    pub epoch: Tensor<'g>,
    /// Number of the step in the whole run, from 0; a scalar.
    pub step: Tensor<'g>,
    pub batch: usize,
    pub embed_dim: usize,
    /// Number of image and text ordinals: the length of per-sample tables.
    pub dataset_size: usize,
}

/// The host's request, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossRequest {
    pub config: serde_json::Value,
    pub batch: usize,
    pub embed_dim: usize,
    pub dataset_size: usize,
}

/// Builds the fragment of a loss: its one output is `loss`.
pub fn build<L: Loss>(request: &LossRequest) -> Result<Fragment, BuildError> {
    let graph = Graph::new();
    let &LossRequest { batch, embed_dim, dataset_size, .. } = request;
    let features = |name| graph.input(name, &[batch, embed_dim], DType::F32);
    let ids = |name| graph.input(name, &[batch], DType::I32);
    let inputs = LossInputs {
        image_features: features("image_features"),
        text_features: features("text_features"),
        image_embeddings: features("image_embeddings"),
        text_embeddings: features("text_embeddings"),
        image_ids: ids("image_ids"),
        text_ids: ids("text_ids"),
        epoch: graph.input("epoch", &[], DType::F32),
        step: graph.input("step", &[], DType::F32),
        batch,
        embed_dim,
        dataset_size,
    };
    let loss = L::build(&config::<L>(&request.config)?, &graph, &inputs)?.reshape(&[]);
    graph.output("loss", loss);
    graph.finish()
}

/// Connects a loss to the plugin boundary; used by [`crate::export_plugin`].
pub struct LossEntry<L>(PhantomData<L>);

impl<L: Loss> Entry for LossEntry<L> {
    type Plugin = L;
    const KIND: crate::describe::Kind = crate::describe::Kind::Loss;
    const HELD_CONSTANT: Option<&'static str> = L::HELD_CONSTANT;

    fn answer(request: Request) -> Result<String, BuildError> {
        match request {
            Request::Loss(request) => crate::export::to_json(&build::<L>(&request)?),
            other => Err(other.refused_by::<Self>()),
        }
    }
}
