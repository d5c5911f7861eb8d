//! DistilBERT (Sanh et al. 2019, <https://arxiv.org/abs/1910.01108>) as an encoder plugin, with Hugging Face's parameter
//! names, so that its weights load. The formula is in [`network`]; here are its settings.

pub mod network;

use clip_host_plugin_api::prelude::*;
use thiserror::Error;

/// Settings of [`DistilBert`]. The defaults are distilbert-base-uncased.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DistilBertConfig {
    /// A published network; it sets `vocab_size`, `dim`, `hidden_dim`, `n_heads` and `n_layers`, which then must be left
    /// out (or agree).
    pub preset: Option<Preset>,
    /// Number of tokens in the vocabulary.
    #[schemars(range(min = 1, max = 16777216))]
    pub vocab_size: usize,
    /// Longest sequence: rows of the table of position embeddings.
    #[schemars(range(min = 1, max = 1048576))]
    pub max_position_embeddings: usize,
    /// Width of the hidden states, and length of a feature row; a multiple of `n_heads`.
    #[schemars(range(min = 1, max = 65536))]
    pub dim: usize,
    /// Width inside the feed-forward layers.
    #[schemars(range(min = 1, max = 262144))]
    pub hidden_dim: usize,
    /// Attention heads of each layer.
    #[schemars(range(min = 1, max = 1024))]
    pub n_heads: usize,
    /// Layers.
    #[schemars(range(min = 1, max = 1024))]
    pub n_layers: usize,
    /// Share of the embeddings and of the feed-forward outputs dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    pub dropout: f64,
    /// Share of the attention probabilities dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    pub attention_dropout: f64,
    /// The function inside the feed-forward layers.
    pub activation: Activation,
    /// Added to the variance in layer norm.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub layer_norm_eps: f64,
    /// Standard deviation of the initial weights.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub initializer_range: f64,
    /// The token whose embedding is not trained.
    #[schemars(range(min = 0, max = 16777215))]
    pub pad_token_id: usize,
    /// How a sequence becomes one feature row.
    pub pooling: Pooling,
}

impl Default for DistilBertConfig {
    fn default() -> Self {
        DistilBertConfig {
            preset: None,
            vocab_size: 30522,
            max_position_embeddings: 512,
            dim: 768,
            hidden_dim: 3072,
            n_heads: 12,
            n_layers: 6,
            dropout: 0.1,
            attention_dropout: 0.1,
            activation: Activation::Gelu,
            layer_norm_eps: 1e-12,
            initializer_range: 0.02,
            pad_token_id: 0,
            pooling: Pooling::Cls,
        }
    }
}

/// Activation of the feed-forward layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// x·Φ(x), with the exact Φ.
    Gelu,
    /// max(x, 0).
    Relu,
}

/// How a sequence becomes one feature row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// The last hidden state of position 0, where the tokenizer puts `[CLS]`.
    Cls,
    /// The mean of the last hidden states of all tokens but padding.
    Mean,
}

/// Published networks, by the names of their checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Preset {
    #[serde(rename = "distilbert-base-uncased")]
    Uncased,
    #[serde(rename = "distilbert-base-cased")]
    Cased,
    #[serde(rename = "distilbert-base-multilingual-cased")]
    MultilingualCased,
}

impl Preset {
    /// The settings that it stands for, by name.
    fn settings(self) -> [(&'static str, usize); 5] {
        let vocab_size = match self {
            Preset::Uncased => 30522,
            Preset::Cased => 28996,
            Preset::MultilingualCased => 119547,
        };
        [("vocab_size", vocab_size), ("dim", 768), ("hidden_dim", 3072), ("n_heads", 12), ("n_layers", 6)]
    }
}

/// Settings or data that a DistilBERT cannot be built from.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum DistilBertError {
    #[error(
        "building a distilbert: expected `{setting}` in {low}..={high}, got {got} (hint: see `plugins inspect \
         distilbert`)"
    )]
    Range { setting: &'static str, low: f64, high: f64, got: f64 },
    #[error(
        "building a distilbert: preset {preset:?} has `{setting}` {expected}, the settings say {got} (hint: leave out \
         either `preset` or `{setting}`)"
    )]
    Preset { preset: Preset, setting: &'static str, expected: usize, got: usize },
    #[error(
        "building a distilbert: expected `dim` to be a multiple of `n_heads`, got {dim} and {heads} (hint: dim 768 goes \
         with 12 heads)"
    )]
    Heads { dim: usize, heads: usize },
    #[error(
        "building a distilbert: expected sequences of 1 to {max} tokens (`max_position_embeddings`), got {length} \
         (hint: shorten the tokenizer's length or raise the setting)"
    )]
    Length { length: usize, max: usize },
}

impl From<DistilBertError> for BuildError {
    fn from(error: DistilBertError) -> Self {
        BuildError::new(error.to_string())
    }
}

impl DistilBertConfig {
    /// The settings with the preset's put in, if there is one.
    ///
    /// # Errors
    /// [`DistilBertError::Preset`] if one of them is set to something else than the preset's.
    pub fn resolved(&self) -> Result<DistilBertConfig, DistilBertError> {
        let mut config = self.clone();
        let Some(preset) = config.preset.take() else { return Ok(config) };
        let default = DistilBertConfig::default();
        let settings = [
            (&mut config.vocab_size, default.vocab_size),
            (&mut config.dim, default.dim),
            (&mut config.hidden_dim, default.hidden_dim),
            (&mut config.n_heads, default.n_heads),
            (&mut config.n_layers, default.n_layers),
        ];
        for ((got, default), (setting, expected)) in settings.into_iter().zip(preset.settings()) {
            if *got != default && *got != expected {
                return Err(DistilBertError::Preset { preset, setting, expected, got: *got });
            }
            *got = expected;
        }
        Ok(config)
    }

    /// Checks the settings, also against the ranges that the schema states, and the sequences' length.
    ///
    /// # Errors
    /// The first setting that does not fit.
    pub fn check(&self, length: usize) -> Result<(), DistilBertError> {
        let ranges = [
            ("vocab_size", 1.0, 16777216.0, self.vocab_size as f64),
            ("max_position_embeddings", 1.0, 1048576.0, self.max_position_embeddings as f64),
            ("dim", 1.0, 65536.0, self.dim as f64),
            ("hidden_dim", 1.0, 262144.0, self.hidden_dim as f64),
            ("n_heads", 1.0, 1024.0, self.n_heads as f64),
            ("n_layers", 1.0, 1024.0, self.n_layers as f64),
            ("dropout", 0.0, 0.99, self.dropout),
            ("attention_dropout", 0.0, 0.99, self.attention_dropout),
            ("layer_norm_eps", 0.0, 1.0, self.layer_norm_eps),
            ("initializer_range", 0.0, 10.0, self.initializer_range),
            ("pad_token_id", 0.0, self.vocab_size as f64 - 1.0, self.pad_token_id as f64),
        ];
        for (setting, low, high, got) in ranges {
            if !(low..=high).contains(&got) {
                return Err(DistilBertError::Range { setting, low, high, got });
            }
        }
        if !self.dim.is_multiple_of(self.n_heads) {
            return Err(DistilBertError::Heads { dim: self.dim, heads: self.n_heads });
        }
        if !(1..=self.max_position_embeddings).contains(&length) {
            return Err(DistilBertError::Length { length, max: self.max_position_embeddings });
        }
        Ok(())
    }
}

/// The plugin.
pub struct DistilBert;

impl Plugin for DistilBert {
    type Config = DistilBertConfig;
    const ID: &'static str = "distilbert";
    const DOC: &'static str =
        "DistilBERT (Sanh et al. 2019), named as Hugging Face names it; features are the hidden state of [CLS].";
}

impl Encoder for DistilBert {
    fn build<'g>(
        config: &DistilBertConfig,
        graph: &'g Graph,
        inputs: &EncoderInputs<'g>,
    ) -> Result<Tensor<'g>, BuildError> {
        let (input_ids, attention_mask) = inputs.text()?;
        let config = config.resolved()?;
        config.check(input_ids.size(1))?;
        Ok(network::forward(&config, graph, input_ids, attention_mask, inputs.training))
    }
}

#[cfg(feature = "export")]
export_plugin!(encoder, DistilBert);
