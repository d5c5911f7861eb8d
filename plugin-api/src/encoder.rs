//! The contract of an encoder: from a batch of images or token ids to one feature row each.

use crate::describe::Plugin;
use crate::export::{Entry, Request, config};
use crate::graph::{BuildError, Graph, Tensor};
use crate::ir::{DType, Fragment};
use serde::{Deserialize, Serialize};
use std::marker::PhantomData;

/// An encoder. Parameters carry the names of the public checkpoints (timm, Hugging Face), so that those load.
pub trait Encoder: Plugin {
    /// Feature rows `[batch, features]`; the host adds the linear head and normalises. Further results may be named
    /// with `graph.output`. In training mode batch statistics are used and `graph.update` moves the running ones.
    fn build<'g>(config: &Self::Config, graph: &'g Graph, inputs: &EncoderInputs<'g>)
    -> Result<Tensor<'g>, BuildError>;
}

/// What the host gives an encoder.
#[derive(Clone, Copy)]
pub struct EncoderInputs<'g> {
    pub modality: Modality<'g>,
    pub batch: usize,
    /// Whether dropout and batch statistics are on.
    pub training: bool,
}

/// The data that an encoder reads.
#[derive(Clone, Copy)]
pub enum Modality<'g> {
    /// Normalised images, `[batch, 3, height, width]`.
    Image { images: Tensor<'g> },
    /// Token ids, i32 `[batch, length]`, and a mask of the same shape: 1 for a token, 0 for padding.
    Text { input_ids: Tensor<'g>, attention_mask: Tensor<'g> },
}

impl<'g> EncoderInputs<'g> {
    /// The images, or an error that says that this encoder is one for images.
    pub fn images(&self) -> Result<Tensor<'g>, BuildError> {
        match self.modality {
            Modality::Image { images } => Ok(images),
            Modality::Text { .. } => {
                Err(BuildError::new("this encoder reads images, it was given text (hint: use it as image_encoder)"))
            }
        }
    }

    /// Token ids and attention mask, or an error that says that this encoder is one for text.
    pub fn text(&self) -> Result<(Tensor<'g>, Tensor<'g>), BuildError> {
        match self.modality {
            Modality::Text { input_ids, attention_mask } => Ok((input_ids, attention_mask)),
            Modality::Image { .. } => {
                Err(BuildError::new("this encoder reads text, it was given images (hint: use it as text_encoder)"))
            }
        }
    }
}

/// Shape of the data, without the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InputShape {
    Image { height: usize, width: usize },
    Text { length: usize },
}

/// The host's request, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EncoderRequest {
    pub config: serde_json::Value,
    pub batch: usize,
    pub input: InputShape,
    pub training: bool,
}

/// Builds an encoder: inputs `images`, or `input_ids` and `attention_mask`; output `features`.
pub fn build<E: Encoder>(request: &EncoderRequest) -> Result<Fragment, BuildError> {
    let graph = Graph::new();
    let batch = request.batch;
    let modality = match request.input {
        InputShape::Image { height, width } => {
            Modality::Image { images: graph.input("images", &[batch, 3, height, width], DType::F32) }
        }
        InputShape::Text { length } => Modality::Text {
            input_ids: graph.input("input_ids", &[batch, length], DType::I32),
            attention_mask: graph.input("attention_mask", &[batch, length], DType::F32),
        },
    };
    let inputs = EncoderInputs { modality, batch, training: request.training };
    let features = E::build(&config::<E>(&request.config)?, &graph, &inputs)?;
    let shape = features.shape();
    if shape.len() != 2 || shape[0] != batch {
        return Err(BuildError::new(format!("features must be [{batch}, n], they are {shape:?}")));
    }
    graph.output("features", features);
    graph.finish()
}

/// Connects an encoder to the plugin boundary; used by [`crate::export_plugin`].
pub struct EncoderEntry<E>(PhantomData<E>);

impl<E: Encoder> Entry for EncoderEntry<E> {
    type Plugin = E;
    const KIND: crate::describe::Kind = crate::describe::Kind::Encoder;

    fn answer(request: Request) -> Result<String, BuildError> {
        match request {
            Request::Encoder(request) => crate::export::to_json(&build::<E>(&request)?),
            other => Err(other.refused_by::<Self>()),
        }
    }
}
