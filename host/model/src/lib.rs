//! Assembles encoders, loss and optimizer into one program and holds it compiled: the model as the train loop sees it.

mod assemble;
mod device;
mod grad_scaler;
mod groups;
mod init;
mod inspect;
pub mod replay;
mod session;
#[cfg(feature = "luminal-cuda")]
pub mod stock;

pub use assemble::param_names;
pub use clip_host_compiler::precision::Precision;
pub use device::{Device, Engine};
pub use grad_scaler::GradScaler;
pub use groups::ParamGroup;
pub use inspect::{Buffer, KernelInfo, LeafInfo, MemoryMap, Owner, Phase, Stay, StepPlan, part};
pub use session::{Ahead, EVAL_BATCH, Session, cuda_schedule};

use clip_host_plugins::Plugin;
use std::borrow::Cow;
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
    /// What activations and product operands are kept in.
    pub precision: Precision,
    /// How the loss is scaled with [`Precision::Fp16`].
    pub grad_scaler: GradScaler,
    /// Which persistent tensors are kept in half precision.
    pub halves: Halves,
    /// Length of per-sample tables.
    pub dataset_size: usize,
    pub weight_decay: f64,
    /// Parameters without weight decay: `1d` stands for those with one dimension, other entries are name patterns
    /// with `*`.
    pub no_decay: Vec<String>,
    pub groups: Vec<ParamGroup>,
    /// Each element of the gradients is limited to ± this, before their norm is taken.
    pub clip_grad_value: Option<f64>,
    pub clip_grad_norm: Option<f64>,
    pub seed: u64,
    /// 0: one for each core.
    pub threads: usize,
    /// Where the model lives.
    pub device: Device,
}

/// Persistent tensors that are kept in bf16: half the memory, and half the bytes that an update moves. They are computed in
/// f32 and rounded at random when they are written, so that small changes count (Radford et al. 2021, section 2.5: "half-precision
/// Adam statistics and half-precision stochastically rounded text encoder weights").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Halves {
    /// The image encoder's parameters.
    pub image_encoder: bool,
    /// The text encoder's parameters.
    pub text_encoder: bool,
    /// What the optimizer keeps for each element of a parameter.
    pub statistics: bool,
}

/// The images of a batch.
#[derive(Clone, Copy, Debug)]
pub enum Images<'a> {
    /// Normalised, `[batch, 3, size, size]`.
    Normalized(&'a [f32]),
    /// Pixels `[batch, size, size, 3]`, and the normalised value of each channel's levels.
    Pixels { pixels: &'a [u8], levels: &'a [[f32; 256]; 3] },
    /// Those that [`Ahead::send`] sent during the step before.
    Sent { levels: &'a [[f32; 256]; 3] },
}

/// One batch, borrowed.
pub struct StepInput<'a> {
    pub images: Images<'a>,
    /// `[batch, length]`
    pub input_ids: &'a [i32],
    /// `[batch, length]`
    pub attention_mask: &'a [f32],
    pub image_ids: &'a [i32],
    pub text_ids: &'a [i32],
    pub epoch: u64,
    /// From 0, over the whole run.
    pub step: u64,
    /// What is frozen for some epochs counts its own steps from there.
    pub steps_per_epoch: u64,
    pub lr: f64,
}

/// What a step computed.
pub struct StepOutput {
    pub loss: f32,
    /// The loss plugin's metrics, `grad_norm` if clipping is on, `loss_scale` with [`Precision::Fp16`].
    pub metrics: Vec<(String, f32)>,
}

/// What a persistent tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A trainable weight.
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
    /// What is kept in half precision is given as the same values in f32.
    pub data: Cow<'a, [f32]>,
}

/// A persistent tensor without its values.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    pub name: String,
    pub role: Role,
    pub shape: Vec<usize>,
}

/// Refuses a pattern of parameters' names that matches none, groups that leave nothing to train, and half-precision
/// statistics of an optimizer that keeps none, before anything is compiled.
///
/// # Errors
/// [`ModelError::Pattern`], [`ModelError::AllFrozen`], [`ModelError::NoStatistics`]; the plugins' own.
pub fn check_groups(spec: &ModelSpec) -> Result<(), ModelError> {
    if spec.halves.statistics && !assemble::keeps_statistics(&spec.optimizer)? {
        return Err(ModelError::NoStatistics { plugin: spec.optimizer.plugin.to_string() });
    }
    let names = param_names(spec)?;
    groups::check_patterns(spec, &names)?;
    let trained = |name: &String| groups::group_of(spec, name).is_none_or(|(_, group)| !group.freeze);
    match names.iter().any(trained) {
        true => Ok(()),
        false => Err(ModelError::AllFrozen),
    }
}

/// Why a model could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Plugin(#[from] clip_host_plugins::PluginError),
    #[error(transparent)]
    Program(#[from] clip_host_graph::program::ProgramError),
    #[error(transparent)]
    Compile(#[from] clip_host_compiler::plan::CompileError),
    #[error(transparent)]
    Execute(#[from] clip_host_cpu::ExecuteError),
    #[error(transparent)]
    Cuda(#[from] clip_host_cuda::ExecuteError),
    #[error("differentiating the loss: {0}")]
    Gradient(#[from] clip_host_plugin_api::gradient::GradientError),
    #[error("assembling the model: {0}")]
    Build(#[from] clip_host_plugin_api::graph::BuildError),
    #[error("{plugin}: expected an output `{name}` {expected}, got {got}")]
    Output { plugin: String, name: String, expected: String, got: String },
    #[error(
        "step {step}: {what} is not finite (hint: a lower learning rate or a higher temperature; the last checkpoint \
         is from before this step)"
    )]
    NotFinite { step: u64, what: &'static str },
    #[error(
        "the training step needs {:.1} GB of memory, the machine has {:.1} GB (hint: lower train.batch_size or \
         data.image_size)", *needed as f64 / 1e9, *machine as f64 / 1e9
    )]
    Memory { needed: u64, machine: u64 },
    #[error("the model has no tensor `{name}`{}", nearest.as_ref().map(|n| format!(" (hint: did you mean `{n}`?)")).unwrap_or_default())]
    UnknownTensor { name: String, nearest: Option<String> },
    #[error("{key}: the pattern `{pattern}` matches no parameter (hint: {choices})")]
    Pattern { key: String, pattern: String, choices: String },
    #[error(
        "{plugin} updates all parameters as one: expected each element to be updated by itself, got {got} (hint: \
         `const ELEMENTWISE: bool = false;` in its `Optimizer`, or a number of `scalars`)"
    )]
    NotElementwise { plugin: String, got: String },
    #[error("every parameter is frozen, nothing is left to train (hint: take a group with `freeze: true` out)")]
    AllFrozen,
    #[error(
        "{plugin} keeps no statistics that could be bf16: expected a state of a parameter's own shape, got none (hint: take \
         `state_dtype` out, or choose settings that keep one, a momentum for instance)"
    )]
    NoStatistics { plugin: String },
    #[error("tensor `{name}`: expected {expected}, got {got}")]
    TensorSize { name: String, expected: String, got: String },
    #[cfg(feature = "luminal-cuda")]
    #[error(transparent)]
    Stock(#[from] clip_host_graph::stock_cuda::StockError),
    #[error("replay: {0}")]
    Replay(String),
}

/// Sizes of the compiled training step.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Assembly, passes, plan and the preparation of its kernels.
    pub compile_ms: f64,
    /// Drawing every tensor's first values.
    pub init_ms: f64,
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
