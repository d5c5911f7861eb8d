//! The text transformer of CLIP (Radford et al. 2021, <https://arxiv.org/abs/2103.00020>) as an encoder plugin, with the
//! parameter names of OpenAI's and open_clip's checkpoints, so that their weights load. The formula is in [`network`];
//! here are its settings.

pub mod network;

use clip_host_plugin_api::prelude::*;
use thiserror::Error;

/// Settings of [`ClipText`], under open_clip's names. The defaults are the text tower beside a ViT-B/32.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ClipTextConfig {
    /// A published network, by the name of the model whose text tower it is; it sets `width`, `heads`, `layers` and
    /// `output_dim`, which then must be left out (or agree).
    pub preset: Option<Preset>,
    /// Longest sequence: rows of `positional_embedding`.
    #[schemars(range(min = 1, max = 1048576))]
    pub context_length: usize,
    /// Number of tokens in the vocabulary.
    #[schemars(range(min = 1, max = 16777216))]
    pub vocab_size: usize,
    /// Width of the hidden states; a multiple of `heads`.
    #[schemars(range(min = 1, max = 65536))]
    pub width: usize,
    /// Attention heads of each layer.
    #[schemars(range(min = 1, max = 1024))]
    pub heads: usize,
    /// Layers.
    #[schemars(range(min = 1, max = 1024))]
    pub layers: usize,
    /// Width inside the feed-forward layers, as a multiple of `width` (rounded down).
    #[schemars(range(min = 0.001, max = 64.0))]
    pub mlp_ratio: f64,
    /// Length of a feature row, which `text_projection` maps the pooled hidden state to. 0: there is no such map, and a
    /// feature row is `width` long.
    #[schemars(range(min = 0, max = 65536))]
    pub output_dim: usize,
    /// Whether the feed-forward layers have x·sigmoid(1.702·x), as OpenAI's checkpoints do, and not x·Φ(x).
    pub quick_gelu: bool,
    /// Which position's hidden state is the sequence's.
    pub pool_type: Pooling,
    /// The token that ends a text, for `pool_type` "eos" (102 is `[SEP]` of BERT's vocabulary).
    #[schemars(range(min = 0, max = 16777215))]
    pub eos_id: usize,
    /// Added to the variance in layer norm.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub layer_norm_eps: f64,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        ClipTextConfig {
            preset: None,
            context_length: 77,
            vocab_size: 49408,
            width: 512,
            heads: 8,
            layers: 12,
            mlp_ratio: 4.0,
            output_dim: 512,
            quick_gelu: false,
            pool_type: Pooling::Argmax,
            eos_id: 49407,
            layer_norm_eps: 1e-5,
        }
    }
}

/// Which position's hidden state is the sequence's. Attention is causal: it must be one after the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The first of the largest token id: the end of text, in CLIP's own vocabulary.
    Argmax,
    /// The first token `eos_id`; the last position, if there is none.
    Eos,
    /// The last token before the padding.
    LastToken,
}

/// Published networks: text towers of OpenAI's and open_clip's models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Preset {
    #[serde(rename = "ViT-B-32")]
    VitB32,
    #[serde(rename = "ViT-B-16")]
    VitB16,
    #[serde(rename = "ViT-L-14")]
    VitL14,
    #[serde(rename = "ViT-H-14")]
    VitH14,
    #[serde(rename = "RN50")]
    Rn50,
    #[serde(rename = "RN101")]
    Rn101,
    #[serde(rename = "RN50x4")]
    Rn50x4,
    #[serde(rename = "RN50x16")]
    Rn50x16,
    #[serde(rename = "RN50x64")]
    Rn50x64,
}

/// What a preset sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub width: usize,
    pub heads: usize,
    pub layers: usize,
    pub output_dim: usize,
}

impl Shape {
    /// The settings by name.
    fn settings(self) -> [(&'static str, usize); 4] {
        [("width", self.width), ("heads", self.heads), ("layers", self.layers), ("output_dim", self.output_dim)]
    }
}

impl Preset {
    /// The settings that it stands for.
    pub fn shape(self) -> Shape {
        let (width, layers, output_dim) = match self {
            Preset::VitB32 | Preset::VitB16 | Preset::Rn101 => (512, 12, 512),
            Preset::VitL14 | Preset::Rn50x16 => (768, 12, 768),
            Preset::VitH14 => (1024, 24, 1024),
            Preset::Rn50 => (512, 12, 1024),
            Preset::Rn50x4 => (640, 12, 640),
            Preset::Rn50x64 => (1024, 12, 1024),
        };
        Shape { width, heads: width / 64, layers, output_dim }
    }
}

/// Settings or data that a text tower of CLIP cannot be built from.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum ClipTextError {
    #[error(
        "building a clip_text: expected `{setting}` in {low}..={high}, got {got} (hint: see `plugins inspect clip_text`)"
    )]
    Range { setting: &'static str, low: f64, high: f64, got: f64 },
    #[error(
        "building a clip_text: preset {preset:?} has `{setting}` {expected}, the settings say {got} (hint: leave out \
         either `preset` or `{setting}`)"
    )]
    Preset { preset: Preset, setting: &'static str, expected: usize, got: usize },
    #[error(
        "building a clip_text: expected `width` to be a multiple of `heads`, got {width} and {heads} (hint: width 512 \
         goes with 8 heads)"
    )]
    Heads { width: usize, heads: usize },
    #[error(
        "building a clip_text: expected `mlp_ratio` times `width` to be at least 1, got {ratio} times {width} (hint: 4 \
         is the usual ratio)"
    )]
    Mlp { ratio: f64, width: usize },
    #[error(
        "building a clip_text: expected sequences of 1 to {max} tokens (`context_length`), got {length} (hint: shorten \
         the tokenizer's length or raise the setting)"
    )]
    Length { length: usize, max: usize },
}

impl From<ClipTextError> for BuildError {
    fn from(error: ClipTextError) -> Self {
        BuildError::new(error.to_string())
    }
}

impl ClipTextConfig {
    /// Sizes of the network, from the preset if there is one.
    ///
    /// # Errors
    /// [`ClipTextError::Preset`] if one of them is set to something else than the preset's.
    pub fn shape(&self) -> Result<Shape, ClipTextError> {
        let own = |config: &ClipTextConfig| Shape {
            width: config.width,
            heads: config.heads,
            layers: config.layers,
            output_dim: config.output_dim,
        };
        let Some(preset) = self.preset else { return Ok(own(self)) };
        let shape = preset.shape();
        let defaults = own(&ClipTextConfig::default()).settings();
        for (((setting, got), (_, expected)), (_, default)) in
            own(self).settings().into_iter().zip(shape.settings()).zip(defaults)
        {
            if got != default && got != expected {
                return Err(ClipTextError::Preset { preset, setting, expected, got });
            }
        }
        Ok(shape)
    }

    /// Checks the settings, also against the ranges that the schema states, and the sequences' length.
    ///
    /// # Errors
    /// The first setting that does not fit.
    pub fn check(&self, length: usize) -> Result<(), ClipTextError> {
        let last_id = self.vocab_size as f64 - 1.0;
        let ranges = [
            ("context_length", 1.0, 1048576.0, self.context_length as f64),
            ("vocab_size", 1.0, 16777216.0, self.vocab_size as f64),
            ("width", 1.0, 65536.0, self.width as f64),
            ("heads", 1.0, 1024.0, self.heads as f64),
            ("layers", 1.0, 1024.0, self.layers as f64),
            ("mlp_ratio", 0.001, 64.0, self.mlp_ratio),
            ("output_dim", 0.0, 65536.0, self.output_dim as f64),
            // With other poolings it may be the default's, whatever the vocabulary.
            ("eos_id", 0.0, if self.pool_type == Pooling::Eos { last_id } else { 16777215.0 }, self.eos_id as f64),
            ("layer_norm_eps", 0.0, 1.0, self.layer_norm_eps),
        ];
        for (setting, low, high, got) in ranges {
            if !(low..=high).contains(&got) {
                return Err(ClipTextError::Range { setting, low, high, got });
            }
        }
        let shape = self.shape()?;
        if !shape.width.is_multiple_of(shape.heads) {
            return Err(ClipTextError::Heads { width: shape.width, heads: shape.heads });
        }
        if self.mlp_ratio * (shape.width as f64) < 1.0 {
            return Err(ClipTextError::Mlp { ratio: self.mlp_ratio, width: shape.width });
        }
        if !(1..=self.context_length).contains(&length) {
            return Err(ClipTextError::Length { length, max: self.context_length });
        }
        Ok(())
    }
}

/// The plugin.
pub struct ClipText;

impl Plugin for ClipText {
    type Config = ClipTextConfig;
    const ID: &'static str = "clip_text";
    const DOC: &'static str = "CLIP's causal text transformer (Radford et al. 2021), named as open_clip names it; features are the end of text.";
}

impl Encoder for ClipText {
    fn build<'g>(
        config: &ClipTextConfig,
        graph: &'g Graph,
        inputs: &EncoderInputs<'g>,
    ) -> Result<Tensor<'g>, BuildError> {
        let (input_ids, attention_mask) = inputs.text()?;
        config.check(input_ids.size(1))?;
        Ok(network::forward(config, config.shape()?, graph, input_ids, attention_mask))
    }
}

#[cfg(feature = "export")]
export_plugin!(encoder, ClipText);
