//! Assembles encoders, loss and optimizer into one program and holds it compiled: the model as the train loop sees it.

use clip_host_plugins::Plugin;
use std::sync::Arc;

/// A plugin with its settings.
#[derive(Clone)]
pub struct Part {
    pub plugin: Arc<Plugin>,
    /// Complete settings (defaults filled in).
    pub config: serde_json::Value,
}

/// Everything that decides the compiled program.
#[derive(Clone)]
pub struct ModelSpec {
    pub image_encoder: Part,
    pub text_encoder: Part,
    pub loss: Part,
    pub optimizer: Part,
    /// Width of the shared embedding: the host's linear heads `image_proj` and `text_proj` lead there.
    pub embed_dim: usize,
    pub batch: usize,
    pub image_size: usize,
    pub text_length: usize,
    /// Length of per-sample tables.
    pub dataset_size: usize,
    pub weight_decay: f64,
    /// Parameters without weight decay: `1d` stands for those with one dimension, other entries are name patterns
    /// with `*`.
    pub no_decay: Vec<String>,
    pub clip_grad_norm: Option<f64>,
    pub seed: u64,
    /// 0: one for each core.
    pub threads: usize,
}

/// One batch, borrowed.
pub struct StepInput<'a> {
    /// `[batch, 3, size, size]`
    pub images: &'a [f32],
    /// `[batch, length]`
    pub input_ids: &'a [i32],
    /// `[batch, length]`
    pub attention_mask: &'a [f32],
    pub image_ids: &'a [i32],
    pub text_ids: &'a [i32],
    pub epoch: u64,
    /// From 0, over the whole run.
    pub step: u64,
    pub lr: f64,
}

pub struct StepOutput {
    pub loss: f32,
    /// The loss plugin's metrics and `grad_norm` if clipping is on.
    pub metrics: Vec<(String, f32)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Param,
    /// Running statistics, per-sample tables.
    State,
    /// Moments of the optimizer.
    Optimizer,
}

/// A persistent tensor by its public name, for instance `image_encoder.conv1.weight`, `loss.s_I`,
/// `optimizer.exp_avg.text_encoder.embeddings.word_embeddings.weight`.
pub struct NamedTensor<'a> {
    pub name: String,
    pub role: Role,
    pub shape: Vec<usize>,
    pub data: &'a [f32],
}

pub struct Session {}

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("{0}")]
    Other(String),
}

impl Session {
    /// Builds and compiles everything.
    pub fn new(spec: ModelSpec) -> Result<Session, ModelError> {
        unimplemented!()
    }
    /// Forward, backward and update. With a loss or gradient that is not finite, an error that names the step; the
    /// caller then must not use the session's tensors.
    pub fn train_step(&mut self, input: &StepInput) -> Result<StepOutput, ModelError> {
        unimplemented!()
    }
    /// Normalised embeddings `[n, embed_dim]` of `n` images, evaluation mode; any n.
    pub fn encode_images(&mut self, images: &[f32]) -> Result<Vec<f32>, ModelError> {
        unimplemented!()
    }
    /// Normalised embeddings of `n` texts.
    pub fn encode_texts(&mut self, input_ids: &[i32], attention_mask: &[f32]) -> Result<Vec<f32>, ModelError> {
        unimplemented!()
    }
    /// Every persistent tensor, in a fixed order.
    pub fn tensors(&self) -> Vec<NamedTensor<'_>> {
        unimplemented!()
    }
    /// Sets one; an error if the name or the size does not fit.
    pub fn set_tensor(&mut self, name: &str, data: &[f32]) -> Result<(), ModelError> {
        unimplemented!()
    }
    /// What the compiled step is: for `bench` and logs.
    pub fn stats(&self) -> Stats {
        unimplemented!()
    }
    /// Milliseconds that the parts of the last step took.
    pub fn phases(&self) -> Phases {
        unimplemented!()
    }
}

/// Sizes of the compiled training step.
#[derive(Clone, Debug)]
pub struct Stats {
    pub compile_ms: f64,
    pub params: usize,
    /// Floating-point operations of one step.
    pub flops: f64,
    pub arena_bytes: usize,
    pub persistent_bytes: usize,
    pub kernels: usize,
}

/// Where the time of a step went; fused kernels count where they begin.
#[derive(Clone, Copy, Debug, Default)]
pub struct Phases {
    pub forward_ms: f64,
    pub backward_ms: f64,
    pub update_ms: f64,
}
