//! The typed sections of a recipe. Keys, types, defaults and ranges are all here.

use crate::encoder::Encoder;
use crate::optimizer::Optimizer;
use crate::range;
use crate::value::{Kind, Value};
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny};
use std::path::PathBuf;

/// The keys of a recipe in its own order.
pub(crate) const KEYS: [&str; 11] =
    ["seed", "data", "model", "loss", "optimizer", "scheduler", "train", "eval", "backend", "precision", "plugins"];

/// Those that have no default.
pub(crate) const REQUIRED: [&str; 5] = ["data", "model", "loss", "optimizer", "train"];

/// All keys of a recipe. The sections that others define are only looked at by them.
#[derive(Debug, Deserialize)]
#[serde(rename = "Recipe", deny_unknown_fields)]
pub(crate) struct Top {
    #[serde(default)]
    pub seed: u64,
    #[serde(rename = "data")]
    pub _data: IgnoredAny,
    pub model: Model,
    pub loss: PluginChoice,
    pub optimizer: Optimizer,
    #[serde(default = "constant")]
    pub scheduler: PluginChoice,
    pub train: Train,
    #[serde(default)]
    pub eval: Eval,
    #[serde(default)]
    pub backend: Backend,
    #[serde(default)]
    pub precision: Precision,
    #[serde(default)]
    pub plugins: Plugins,
    // Gone from a recipe before it is read as this one; here for the names that a misspelt key may stand for.
    #[serde(default, rename = "include")]
    pub _include: IgnoredAny,
    #[serde(default, rename = "grid")]
    pub _grid: IgnoredAny,
}

fn constant() -> PluginChoice {
    PluginChoice { plugin: "constant".into(), ..PluginChoice::default() }
}

/// One plugin and its settings: `(plugin: "radam", config: (betas: (0.9, 0.999)))`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PluginChoice {
    /// The plugin's id.
    #[serde(deserialize_with = "plugin_id")]
    pub plugin: String,
    /// Its settings, to be checked against the plugin's own schema. Names become strings, tuples arrays, `Some(x)` x,
    /// `None` null and `Name(x)` the object `{"Name": x}`.
    #[serde(default)]
    pub config: serde_json::Map<String, serde_json::Value>,
    /// This library file, rather than the one that the search path yields.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// SHA-256 that the library file must have, in hexadecimal.
    #[serde(default, deserialize_with = "sha256")]
    pub sha256: Option<String>,
}

/// The two encoders and the space in which they meet.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Encoder of images.
    pub image_encoder: Encoder,
    /// Encoder of captions.
    pub text_encoder: Encoder,
    /// Dimensions of the shared embedding.
    #[serde(deserialize_with = "range::within::<_, 1, 65_536>")]
    pub embed_dim: usize,
}

/// The training loop.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Train {
    /// Passes over the training data.
    #[serde(deserialize_with = "range::at_least::<_, _, 1>")]
    pub epochs: u64,
    /// Ends the run after this many steps, though the schedule is still that of all epochs.
    #[serde(default, deserialize_with = "range::optional_at_least::<_, _, 1>")]
    pub steps: Option<u64>,
    /// Image-text pairs in a step; the last, incomplete batch of an epoch is dropped. At least 2: a contrastive loss
    /// needs a negative.
    #[serde(deserialize_with = "range::within::<_, 2, 1_048_576>")]
    pub batch_size: usize,
    /// Steps between two log lines.
    #[serde(default = "ten", deserialize_with = "range::at_least::<_, _, 1>")]
    pub log_every: u64,
    /// Epochs between two evaluations; 0 evaluates at the end only.
    #[serde(default = "one")]
    pub eval_every: u64,
    /// Epochs between two checkpoints; 0 writes one at the end only.
    #[serde(default = "one")]
    pub checkpoint_every: u64,
    /// Also writes a checkpoint each time this many steps are done, counted over the whole run.
    #[serde(default, deserialize_with = "range::optional_at_least::<_, _, 1>")]
    pub checkpoint_every_steps: Option<u64>,
    /// Compute threads; 0 takes all cores. The results are the same bits for any number.
    #[serde(default, deserialize_with = "range::within::<_, 0, 1024>")]
    pub threads: usize,
    /// How the loss is scaled with `precision: Fp16`; only there.
    #[serde(default)]
    pub grad_scaler: Option<GradScaler>,
}

/// Scaling of the loss before it is differentiated, with the names and defaults of `torch.amp.GradScaler`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GradScaler {
    /// The first scale.
    #[serde(deserialize_with = "range::positive")]
    pub init_scale: f64,
    /// What it is multiplied by after `growth_interval` steps with finite gradients.
    #[serde(deserialize_with = "range::positive")]
    pub growth_factor: f64,
    /// What it is multiplied by after a step that was skipped for a gradient that is not finite.
    #[serde(deserialize_with = "range::positive")]
    pub backoff_factor: f64,
    /// In steps.
    #[serde(deserialize_with = "range::at_least::<_, _, 1>")]
    pub growth_interval: u64,
}

impl Default for GradScaler {
    fn default() -> Self {
        GradScaler { init_scale: 65536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000 }
    }
}

fn one() -> u64 {
    1
}

fn ten() -> u64 {
    10
}

/// The evaluation on the validation data.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Eval {
    /// Samples that are encoded at once; `None` takes the training batch size.
    #[serde(deserialize_with = "range::optional_at_least::<_, _, 1>")]
    pub batch_size: Option<usize>,
}

/// What computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Backend {
    /// A GPU where there is one that can be used, otherwise the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// One NVIDIA GPU.
    Cuda {
        /// Its number, from 0.
        #[serde(default)]
        device: u32,
        /// Whether products and convolutions of f32 may round their operands to ten bits of mantissa, as PyTorch's
        /// `allow_tf32`.
        #[serde(default)]
        tf32: bool,
    },
}

/// Arithmetic of the forward and backward pass. Weights and the optimizer are f32 in all, unless their own settings say
/// otherwise: [`Encoder::weights_dtype`], [`Optimizer::state_dtype`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits throughout.
    #[default]
    F32,
    /// Activations and matrix products in bfloat16, sums in f32.
    Bf16,
    /// The same in IEEE's 16 bits, with a loss that is scaled: see [`GradScaler`].
    Fp16,
}

impl<'de> Deserialize<'de> for Precision {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let values = [Precision::F32, Precision::Bf16, Precision::Fp16];
        deserializer.deserialize_identifier(Name { names: &["F32", "Bf16", "Fp16"], values })
    }
}

/// How a tensor that stays from step to step is kept in memory. It is computed in f32 whatever it is kept in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Dtype {
    /// 32 bits.
    #[default]
    F32,
    /// bfloat16, rounded at random when it is written: up or down with the probabilities that make the mean exact.
    Bf16,
}

impl<'de> Deserialize<'de> for Dtype {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let values = [Dtype::F32, Dtype::Bf16];
        deserializer.deserialize_identifier(Name { names: &["F32", "Bf16"], values })
    }
}

/// Reads one of some names, in capitals or not.
struct Name<T, const N: usize> {
    names: &'static [&'static str; N],
    values: [T; N],
}

impl<T: Copy, const N: usize> serde::de::Visitor<'_> for Name<T, N> {
    type Value = T;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "one of {}", self.names.join(", "))
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<T, E> {
        match self.names.iter().position(|known| known.eq_ignore_ascii_case(name)) {
            Some(at) => Ok(self.values[at]),
            None => Err(E::unknown_variant(name, self.names)),
        }
    }
}

/// Where plugins are found.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plugins {
    /// Library files, and folders of them, that are searched before `CLIP_HOST_PLUGIN_PATH` and the program's folder.
    pub path: Vec<PathBuf>,
}

pub(crate) fn plugin_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let id = String::deserialize(deserializer)?;
    if id.trim().is_empty() {
        return Err(D::Error::custom("expected the id of a plugin, got an empty string"));
    }
    Ok(id)
}

pub(crate) fn sha256<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let sum = Option::<String>::deserialize(deserializer)?;
    match &sum {
        Some(text) if text.len() != 64 || !text.chars().all(|c| c.is_ascii_hexdigit()) => {
            Err(D::Error::custom(format!("expected 64 hexadecimal digits, got {} characters", text.chars().count())))
        }
        _ => Ok(sum.map(|text| text.to_ascii_lowercase())),
    }
}

// Back to RON, all defaults written out.

pub(crate) fn path(path: &std::path::Path) -> Value {
    Value::string(&path.to_string_lossy())
}

impl PluginChoice {
    pub(crate) fn keys(&self) -> Vec<(&'static str, Value)> {
        let mut keys = vec![("plugin", Value::string(&self.plugin))];
        if let Some(file) = &self.path {
            keys.push(("path", path(file)));
        }
        if let Some(sum) = &self.sha256 {
            keys.push(("sha256", Value::string(sum)));
        }
        if !self.config.is_empty() {
            let config = serde_json::Value::Object(self.config.clone());
            keys.push(("config", Value::from_json(&config)));
        }
        keys
    }

    pub(crate) fn to_value(&self) -> Value {
        Value::section(self.keys())
    }
}

impl Model {
    pub(crate) fn to_value(&self) -> Value {
        Value::section([
            ("image_encoder", self.image_encoder.to_value()),
            ("text_encoder", self.text_encoder.to_value()),
            ("embed_dim", Value::int(self.embed_dim as u64)),
        ])
    }
}

impl Train {
    pub(crate) fn to_value(&self) -> Value {
        Value::section([
            ("epochs", Value::int(self.epochs)),
            ("steps", Value::optional(self.steps.map(Value::int))),
            ("batch_size", Value::int(self.batch_size as u64)),
            ("log_every", Value::int(self.log_every)),
            ("eval_every", Value::int(self.eval_every)),
            ("checkpoint_every", Value::int(self.checkpoint_every)),
            ("checkpoint_every_steps", Value::optional(self.checkpoint_every_steps.map(Value::int))),
            ("threads", Value::int(self.threads as u64)),
            ("grad_scaler", Value::optional(self.grad_scaler.map(GradScaler::to_value))),
        ])
    }
}

impl GradScaler {
    fn to_value(self) -> Value {
        Value::section([
            ("init_scale", Value::float(self.init_scale)),
            ("growth_factor", Value::float(self.growth_factor)),
            ("backoff_factor", Value::float(self.backoff_factor)),
            ("growth_interval", Value::int(self.growth_interval)),
        ])
    }
}

impl Eval {
    pub(crate) fn to_value(&self) -> Value {
        let batch_size = self.batch_size.map(|size| Value::int(size as u64));
        Value::section([("batch_size", Value::optional(batch_size))])
    }
}

impl Backend {
    pub(crate) fn to_value(self) -> Value {
        let name = |name: &str| Value::from(Kind::Name(name.to_string()));
        match self {
            Backend::Auto => name("Auto"),
            Backend::Cpu => name("Cpu"),
            Backend::Cuda { device, tf32 } => {
                let fields = [("device", Value::int(device)), ("tf32", Value::from(Kind::Bool(tf32)))];
                let mut value = Value::section(fields);
                if let Kind::Struct(name, _) = &mut value.kind {
                    *name = Some("Cuda".to_string());
                }
                value
            }
        }
    }
}

impl Precision {
    pub(crate) fn to_value(self) -> Value {
        let name = match self {
            Precision::F32 => "F32",
            Precision::Bf16 => "Bf16",
            Precision::Fp16 => "Fp16",
        };
        Kind::Name(name.to_string()).into()
    }
}

impl Dtype {
    pub(crate) fn to_value(self) -> Value {
        let name = match self {
            Dtype::F32 => "F32",
            Dtype::Bf16 => "Bf16",
        };
        Kind::Name(name.to_string()).into()
    }
}

impl Plugins {
    pub(crate) fn to_value(&self) -> Value {
        let files = self.path.iter().map(|file| path(file)).collect();
        Value::section([("path", Kind::List(files).into())])
    }
}
