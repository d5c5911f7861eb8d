//! BERT (Devlin et al. 2019, <https://arxiv.org/abs/1810.04805>) as an encoder plugin, with Hugging Face's parameter
//! names, so that its weights load. The formula is in [`network`]; here are its settings.

pub mod network;

use clip_host_plugin_api::prelude::*;
use thiserror::Error;

/// Settings of [`Bert`], under Hugging Face's names. The defaults are bert-base-uncased.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BertConfig {
    /// A published network; it sets `hidden_size`, `num_hidden_layers`, `num_attention_heads` and `intermediate_size`,
    /// which then must be left out (or agree).
    pub preset: Option<Preset>,
    /// Number of tokens in the vocabulary.
    #[schemars(range(min = 1, max = 16777216))]
    pub vocab_size: usize,
    /// Width of the hidden states, and length of a feature row; a multiple of `num_attention_heads`.
    #[schemars(range(min = 1, max = 65536))]
    pub hidden_size: usize,
    /// Layers.
    #[schemars(range(min = 1, max = 1024))]
    pub num_hidden_layers: usize,
    /// Attention heads of each layer.
    #[schemars(range(min = 1, max = 1024))]
    pub num_attention_heads: usize,
    /// Width inside the feed-forward layers.
    #[schemars(range(min = 1, max = 262144))]
    pub intermediate_size: usize,
    /// The function inside the feed-forward layers.
    pub hidden_act: Activation,
    /// Share of the embeddings and of the outputs of attention and feed-forward dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    pub hidden_dropout_prob: f64,
    /// Share of the attention probabilities dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    pub attention_probs_dropout_prob: f64,
    /// Longest sequence: rows of the table of position embeddings.
    #[schemars(range(min = 1, max = 1048576))]
    pub max_position_embeddings: usize,
    /// Rows of the table of token types, of which a caption's tokens all have the first.
    #[schemars(range(min = 1, max = 65536))]
    pub type_vocab_size: usize,
    /// Standard deviation of the initial weights.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub initializer_range: f64,
    /// Added to the variance in layer norm.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub layer_norm_eps: f64,
    /// The token whose embedding is not trained.
    #[schemars(range(min = 0, max = 16777215))]
    pub pad_token_id: usize,
    /// How a sequence becomes one feature row.
    pub pooling: Pooling,
}

impl Default for BertConfig {
    fn default() -> Self {
        BertConfig {
            preset: None,
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            initializer_range: 0.02,
            layer_norm_eps: 1e-12,
            pad_token_id: 0,
            pooling: Pooling::Pooler,
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
    /// tanh of a linear map of the last hidden state of position 0: `pooler_output` of Hugging Face's model. With the
    /// other poolings the map's parameters are not there.
    Pooler,
    /// The last hidden state of position 0, where the tokenizer puts `[CLS]`.
    Cls,
    /// The mean of the last hidden states of all tokens but padding.
    Mean,
}

/// Published networks, by the names of their checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Preset {
    #[serde(rename = "bert_uncased_L-2_H-128_A-2")]
    Tiny,
    #[serde(rename = "bert_uncased_L-4_H-256_A-4")]
    Mini,
    #[serde(rename = "bert_uncased_L-4_H-512_A-8")]
    Small,
    #[serde(rename = "bert_uncased_L-8_H-512_A-8")]
    Medium,
    #[serde(rename = "bert-base-uncased")]
    Base,
    #[serde(rename = "bert-large-uncased")]
    Large,
}

/// What a preset sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
}

impl Shape {
    /// The settings by name.
    fn settings(self) -> [(&'static str, usize); 4] {
        [
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
        ]
    }
}

impl Preset {
    /// The settings that it stands for.
    pub fn shape(self) -> Shape {
        let (num_hidden_layers, hidden_size, num_attention_heads) = match self {
            Preset::Tiny => (2, 128, 2),
            Preset::Mini => (4, 256, 4),
            Preset::Small => (4, 512, 8),
            Preset::Medium => (8, 512, 8),
            Preset::Base => (12, 768, 12),
            Preset::Large => (24, 1024, 16),
        };
        Shape { hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: 4 * hidden_size }
    }
}

/// Settings or data that a BERT cannot be built from.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum BertError {
    #[error("building a bert: expected `{setting}` in {low}..={high}, got {got} (hint: see `plugins inspect bert`)")]
    Range { setting: &'static str, low: f64, high: f64, got: f64 },
    #[error(
        "building a bert: preset {preset:?} has `{setting}` {expected}, the settings say {got} (hint: leave out either \
         `preset` or `{setting}`)"
    )]
    Preset { preset: Preset, setting: &'static str, expected: usize, got: usize },
    #[error(
        "building a bert: expected `hidden_size` to be a multiple of `num_attention_heads`, got {hidden} and {heads} \
         (hint: hidden size 768 goes with 12 heads)"
    )]
    Heads { hidden: usize, heads: usize },
    #[error(
        "building a bert: expected sequences of 1 to {max} tokens (`max_position_embeddings`), got {length} (hint: \
         shorten the tokenizer's length or raise the setting)"
    )]
    Length { length: usize, max: usize },
}

impl From<BertError> for BuildError {
    fn from(error: BertError) -> Self {
        BuildError::new(error.to_string())
    }
}

impl BertConfig {
    /// Sizes of the layers, from the preset if there is one.
    ///
    /// # Errors
    /// [`BertError::Preset`] if one of them is set to something else than the preset's.
    pub fn shape(&self) -> Result<Shape, BertError> {
        let own = |config: &BertConfig| Shape {
            hidden_size: config.hidden_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            intermediate_size: config.intermediate_size,
        };
        let Some(preset) = self.preset else { return Ok(own(self)) };
        let shape = preset.shape();
        let defaults = own(&BertConfig::default()).settings();
        for (((setting, got), (_, expected)), (_, default)) in
            own(self).settings().into_iter().zip(shape.settings()).zip(defaults)
        {
            if got != default && got != expected {
                return Err(BertError::Preset { preset, setting, expected, got });
            }
        }
        Ok(shape)
    }

    /// Checks the settings, also against the ranges that the schema states, and the sequences' length.
    ///
    /// # Errors
    /// The first setting that does not fit.
    pub fn check(&self, length: usize) -> Result<(), BertError> {
        let ranges = [
            ("vocab_size", 1.0, 16777216.0, self.vocab_size as f64),
            ("hidden_size", 1.0, 65536.0, self.hidden_size as f64),
            ("num_hidden_layers", 1.0, 1024.0, self.num_hidden_layers as f64),
            ("num_attention_heads", 1.0, 1024.0, self.num_attention_heads as f64),
            ("intermediate_size", 1.0, 262144.0, self.intermediate_size as f64),
            ("hidden_dropout_prob", 0.0, 0.99, self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", 0.0, 0.99, self.attention_probs_dropout_prob),
            ("max_position_embeddings", 1.0, 1048576.0, self.max_position_embeddings as f64),
            ("type_vocab_size", 1.0, 65536.0, self.type_vocab_size as f64),
            ("initializer_range", 0.0, 10.0, self.initializer_range),
            ("layer_norm_eps", 0.0, 1.0, self.layer_norm_eps),
            ("pad_token_id", 0.0, self.vocab_size as f64 - 1.0, self.pad_token_id as f64),
        ];
        for (setting, low, high, got) in ranges {
            if !(low..=high).contains(&got) {
                return Err(BertError::Range { setting, low, high, got });
            }
        }
        let shape = self.shape()?;
        if !shape.hidden_size.is_multiple_of(shape.num_attention_heads) {
            return Err(BertError::Heads { hidden: shape.hidden_size, heads: shape.num_attention_heads });
        }
        if !(1..=self.max_position_embeddings).contains(&length) {
            return Err(BertError::Length { length, max: self.max_position_embeddings });
        }
        Ok(())
    }
}

/// The plugin.
pub struct Bert;

impl Plugin for Bert {
    type Config = BertConfig;
    const ID: &'static str = "bert";
    const DOC: &'static str =
        "BERT (Devlin et al. 2019), named as Hugging Face names it; features are the pooler's output.";
}

impl Encoder for Bert {
    fn build<'g>(config: &BertConfig, graph: &'g Graph, inputs: &EncoderInputs<'g>) -> Result<Tensor<'g>, BuildError> {
        let (input_ids, attention_mask) = inputs.text()?;
        config.check(input_ids.size(1))?;
        Ok(network::forward(config, config.shape()?, graph, input_ids, attention_mask, inputs.training))
    }
}

#[cfg(feature = "export")]
export_plugin!(encoder, Bert);
