//! ResNet (He et al. 2016, <https://arxiv.org/abs/1512.03385>) as an encoder plugin, with timm's parameter and buffer
//! names, so that timm's weights load. The formula is in [`network`]; here are its settings.

pub mod network;

use clip_host_plugin_api::prelude::*;
use thiserror::Error;

/// Settings of [`ResNet`]. The defaults are a ResNet-50.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ResNetConfig {
    /// A published network; it sets `block` and `layers`, which then must be left out (or agree).
    pub preset: Option<Preset>,
    /// The residual block: two 3x3 convolutions (`basic`), or 1x1, 3x3, 1x1 with four times the channels at the end
    /// (`bottleneck`).
    pub block: Block,
    /// Number of blocks of each of the four stages.
    #[schemars(inner(range(min = 1, max = 256)))]
    pub layers: [usize; 4],
    /// Channels inside the blocks of each stage; a stage's output has as many (`basic`) or four times as many
    /// (`bottleneck`).
    #[schemars(inner(range(min = 1, max = 16384)))]
    pub channels: [usize; 4],
    /// The layers before the first stage. `7x7`: a stride-2 convolution and a stride-2 max pool, for images of 100
    /// pixels and more; `deep`: three 3x3 convolutions (ResNet-C) in place of the 7x7; `3x3`: one convolution of stride
    /// 1 and no pool, for images of about 32 pixels.
    pub stem: Stem,
    /// Channels of the stem; a `deep` stem has these in its first two convolutions and twice as many in its last (32
    /// there makes timm's resnet50c).
    #[schemars(range(min = 1, max = 16384))]
    pub stem_width: usize,
    /// Added to the variance in batch norm.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub bn_eps: f64,
    /// Share of the batch's statistics in each update of the running ones.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub bn_momentum: f64,
    /// Whether the last batch norm of every block starts with weight 0, so that each block starts as its shortcut
    /// (Goyal et al. 2017).
    pub zero_init_last: bool,
}

impl Default for ResNetConfig {
    fn default() -> Self {
        ResNetConfig {
            preset: None,
            block: Block::Bottleneck,
            layers: [3, 4, 6, 3],
            channels: [64, 128, 256, 512],
            stem: Stem::Plain7x7,
            stem_width: 64,
            bn_eps: 1e-5,
            bn_momentum: 0.1,
            zero_init_last: true,
        }
    }
}

/// Kinds of residual block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Block {
    Basic,
    Bottleneck,
}

impl Block {
    /// Channels of a block's output for each of its inner channels.
    pub fn expansion(self) -> usize {
        match self {
            Block::Basic => 1,
            Block::Bottleneck => 4,
        }
    }
}

/// Kinds of stem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Stem {
    #[serde(rename = "7x7")]
    Plain7x7,
    #[serde(rename = "3x3")]
    Plain3x3,
    #[serde(rename = "deep")]
    Deep,
}

/// Published networks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    ResNet18,
    ResNet26,
    ResNet34,
    ResNet50,
    ResNet101,
    ResNet152,
}

impl Preset {
    /// Block and number of blocks of each stage.
    pub fn shape(self) -> (Block, [usize; 4]) {
        match self {
            Preset::ResNet18 => (Block::Basic, [2, 2, 2, 2]),
            Preset::ResNet26 => (Block::Bottleneck, [2, 2, 2, 2]),
            Preset::ResNet34 => (Block::Basic, [3, 4, 6, 3]),
            Preset::ResNet50 => (Block::Bottleneck, [3, 4, 6, 3]),
            Preset::ResNet101 => (Block::Bottleneck, [3, 4, 23, 3]),
            Preset::ResNet152 => (Block::Bottleneck, [3, 8, 36, 3]),
        }
    }
}

/// Settings or data that a ResNet cannot be built from.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum ResNetError {
    #[error(
        "building a resnet: expected `{setting}` in {low}..={high}, got {got} (hint: see `plugins inspect resnet`)"
    )]
    Range { setting: &'static str, low: f64, high: f64, got: f64 },
    #[error(
        "building a resnet: preset {preset:?} has {expected}, the settings say {got} (hint: leave out either `preset` \
         or `{setting}`)"
    )]
    Preset { preset: Preset, setting: &'static str, expected: String, got: String },
    #[error(
        "building a resnet: batch norm of `{name}` needs at least 2 values for each channel in training, got {got} \
         (hint: a larger batch or larger images)"
    )]
    TooFewValues { name: String, got: usize },
}

impl From<ResNetError> for BuildError {
    fn from(error: ResNetError) -> Self {
        BuildError::new(error.to_string())
    }
}

impl ResNetConfig {
    /// Block and number of blocks of each stage, from the preset if there is one.
    ///
    /// # Errors
    /// [`ResNetError::Preset`] if `block` or `layers` is set to something else than the preset's.
    pub fn shape(&self) -> Result<(Block, [usize; 4]), ResNetError> {
        let Some(preset) = self.preset else { return Ok((self.block, self.layers)) };
        let (block, layers) = preset.shape();
        let default = ResNetConfig::default();
        if self.block != default.block && self.block != block {
            let (expected, got) = (format!("{block:?} blocks"), format!("{:?}", self.block));
            return Err(ResNetError::Preset { preset, setting: "block", expected, got });
        }
        if self.layers != default.layers && self.layers != layers {
            let (expected, got) = (format!("layers {layers:?}"), format!("{:?}", self.layers));
            return Err(ResNetError::Preset { preset, setting: "layers", expected, got });
        }
        Ok((block, layers))
    }

    /// Length of a feature row.
    pub fn features(&self) -> Result<usize, ResNetError> {
        Ok(self.channels[3] * self.shape()?.0.expansion())
    }

    /// Checks the ranges that the schema states, for callers that have not checked them against it.
    pub fn check(&self) -> Result<(), ResNetError> {
        let layers = self.layers.map(|n| ("layers", 1.0, 256.0, n as f64));
        let channels = self.channels.map(|n| ("channels", 1.0, 16384.0, n as f64));
        let others = [
            ("stem_width", 1.0, 16384.0, self.stem_width as f64),
            ("bn_eps", 0.0, 1.0, self.bn_eps),
            ("bn_momentum", 0.0, 1.0, self.bn_momentum),
        ];
        for (setting, low, high, got) in layers.into_iter().chain(channels).chain(others) {
            if !(low..=high).contains(&got) {
                return Err(ResNetError::Range { setting, low, high, got });
            }
        }
        Ok(())
    }
}

/// The plugin.
pub struct ResNet;

impl Plugin for ResNet {
    type Config = ResNetConfig;
    const ID: &'static str = "resnet";
    const DOC: &'static str = "ResNet (He et al. 2016), named as timm names it; features are the global average pool.";
}

impl Encoder for ResNet {
    fn build<'g>(
        config: &ResNetConfig,
        graph: &'g Graph,
        inputs: &EncoderInputs<'g>,
    ) -> Result<Tensor<'g>, BuildError> {
        config.check()?;
        let images = inputs.images()?;
        Ok(network::forward(config, graph, images, inputs.training)?)
    }
}

#[cfg(feature = "export")]
export_plugin!(encoder, ResNet);
