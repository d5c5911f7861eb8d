//! Swin Transformer (Liu et al. 2021, <https://arxiv.org/abs/2103.14030>) as an encoder plugin, with timm's parameter
//! names, so that timm's weights load. The formula is in [`network`] and [`window`]; here are its settings.

pub mod network;
pub mod window;

use clip_host_plugin_api::prelude::*;
use thiserror::Error;

/// Settings of [`Swin`], under timm's names. The defaults are a Swin-T; the image size is the recipe's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SwinConfig {
    /// A published network; it sets `window_size`, `embed_dim`, `depths` and `num_heads`, which then must be left out (or
    /// agree).
    pub preset: Option<Preset>,
    /// Side of a square patch in pixels; the images' sides are multiples of it.
    #[schemars(range(min = 1, max = 1024))]
    pub patch_size: usize,
    /// Side of a square window in patches. Every second block's windows are shifted by half of it. Where a stage's images
    /// are not a multiple of it, the windows at the right and the bottom are filled up with zeros; where they are smaller,
    /// there is one window of their size.
    #[schemars(range(min = 1, max = 256))]
    pub window_size: usize,
    /// Channels of the first stage. Each later one has twice as many, those of the last being the length of a feature row.
    #[schemars(range(min = 1, max = 16384))]
    pub embed_dim: usize,
    /// Number of blocks of each stage.
    #[schemars(length(min = 1, max = 8), inner(range(min = 1, max = 256)))]
    pub depths: Vec<usize>,
    /// Attention heads of each stage's blocks; its channels are a multiple of them.
    #[schemars(length(min = 1, max = 8), inner(range(min = 1, max = 1024)))]
    pub num_heads: Vec<usize>,
    /// Width inside the feed-forward layers, as a multiple of the stage's channels (rounded down).
    #[schemars(range(min = 0.001, max = 64.0))]
    pub mlp_ratio: f64,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Added to the variance in layer norm.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub norm_eps: f64,
    /// Share of the outputs of attention and of both feed-forward layers dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    pub proj_drop_rate: f64,
    /// Share of the attention probabilities dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    pub attn_drop_rate: f64,
    /// Probability that an image skips a branch of the last block in training; it rises linearly from 0 in the first
    /// (stochastic depth, Huang et al. 2016).
    #[schemars(range(min = 0.0, max = 0.99))]
    pub drop_path_rate: f64,
}

impl Default for SwinConfig {
    fn default() -> Self {
        SwinConfig {
            preset: None,
            patch_size: 4,
            window_size: 7,
            embed_dim: 96,
            depths: vec![2, 2, 6, 2],
            num_heads: vec![3, 6, 12, 24],
            mlp_ratio: 4.0,
            qkv_bias: true,
            norm_eps: 1e-5,
            proj_drop_rate: 0.0,
            attn_drop_rate: 0.0,
            drop_path_rate: 0.1,
        }
    }
}

/// Published networks, by timm's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Preset {
    #[serde(rename = "swin_tiny_patch4_window7_224")]
    Tiny,
    #[serde(rename = "swin_small_patch4_window7_224")]
    Small,
    #[serde(rename = "swin_base_patch4_window7_224")]
    Base,
    #[serde(rename = "swin_base_patch4_window12_384")]
    Base12,
    #[serde(rename = "swin_large_patch4_window7_224")]
    Large,
    #[serde(rename = "swin_large_patch4_window12_384")]
    Large12,
}

/// What a preset sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    pub window_size: usize,
    pub embed_dim: usize,
    pub depths: Vec<usize>,
    pub num_heads: Vec<usize>,
}

impl Shape {
    /// Channels of a stage.
    pub fn channels(&self, stage: usize) -> usize {
        self.embed_dim << stage
    }

    /// The settings by name, as text.
    fn settings(&self) -> [(&'static str, String); 4] {
        [
            ("window_size", self.window_size.to_string()),
            ("embed_dim", self.embed_dim.to_string()),
            ("depths", format!("{:?}", self.depths)),
            ("num_heads", format!("{:?}", self.num_heads)),
        ]
    }
}

impl Preset {
    /// The settings that it stands for.
    pub fn shape(self) -> Shape {
        let (window_size, heads, blocks) = match self {
            Preset::Tiny => (7, 3, 6),
            Preset::Small => (7, 3, 18),
            Preset::Base => (7, 4, 18),
            Preset::Base12 => (12, 4, 18),
            Preset::Large => (7, 6, 18),
            Preset::Large12 => (12, 6, 18),
        };
        let num_heads = [1, 2, 4, 8].map(|times| times * heads).to_vec();
        Shape { window_size, embed_dim: 32 * heads, depths: vec![2, 2, blocks, 2], num_heads }
    }
}

/// Settings or data that a Swin cannot be built from.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum SwinError {
    #[error("building a swin: expected `{setting}` in {low}..={high}, got {got} (hint: see `plugins inspect swin`)")]
    Range { setting: &'static str, low: f64, high: f64, got: f64 },
    #[error(
        "building a swin: preset {preset:?} has `{setting}` {expected}, the settings say {got} (hint: leave out either \
         `preset` or `{setting}`)"
    )]
    Preset { preset: Preset, setting: &'static str, expected: String, got: String },
    #[error(
        "building a swin: expected `depths` and `num_heads` of as many stages, 1 to 8, got {depths} and {heads} (hint: \
         the paper's networks have 4)"
    )]
    Stages { depths: usize, heads: usize },
    #[error(
        "building a swin: expected the channels of stage {stage} to be a multiple of its `num_heads`, got {channels} and \
         {heads} (hint: the paper's heads have 32 channels each)"
    )]
    Heads { stage: usize, channels: usize, heads: usize },
    #[error(
        "building a swin: expected `mlp_ratio` times `embed_dim` to be at least 1, got {ratio} times {dim} (hint: 4 is \
         the usual ratio)"
    )]
    Mlp { ratio: f64, dim: usize },
    #[error(
        "building a swin: expected images whose sides are multiples of the patch's {patch} pixels, got {height}x{width} \
         (hint: change `data.image_size`, {patch} times a whole number, or the patch)"
    )]
    Patches { patch: usize, height: usize, width: usize },
}

impl From<SwinError> for BuildError {
    fn from(error: SwinError) -> Self {
        BuildError::new(error.to_string())
    }
}

impl SwinConfig {
    /// Window and sizes of the stages, from the preset if there is one.
    ///
    /// # Errors
    /// [`SwinError::Preset`] if one of them is set to something else than the preset's.
    pub fn shape(&self) -> Result<Shape, SwinError> {
        let own = |config: &SwinConfig| Shape {
            window_size: config.window_size,
            embed_dim: config.embed_dim,
            depths: config.depths.clone(),
            num_heads: config.num_heads.clone(),
        };
        let Some(preset) = self.preset else { return Ok(own(self)) };
        let shape = preset.shape();
        let defaults = own(&SwinConfig::default()).settings();
        for (((setting, got), (_, expected)), (_, default)) in
            own(self).settings().into_iter().zip(shape.settings()).zip(defaults)
        {
            if got != default && got != expected {
                return Err(SwinError::Preset { preset, setting, expected, got });
            }
        }
        Ok(shape)
    }

    /// Checks the settings, also against the ranges that the schema states, and the images' size in pixels.
    ///
    /// # Errors
    /// The first setting that does not fit.
    pub fn check(&self, height: usize, width: usize) -> Result<(), SwinError> {
        let depths = self.depths.iter().map(|&n| ("depths", 1.0, 256.0, n as f64));
        let heads = self.num_heads.iter().map(|&n| ("num_heads", 1.0, 1024.0, n as f64));
        let others = [
            ("patch_size", 1.0, 1024.0, self.patch_size as f64),
            ("window_size", 1.0, 256.0, self.window_size as f64),
            ("embed_dim", 1.0, 16384.0, self.embed_dim as f64),
            ("mlp_ratio", 0.001, 64.0, self.mlp_ratio),
            ("norm_eps", 0.0, 1.0, self.norm_eps),
            ("proj_drop_rate", 0.0, 0.99, self.proj_drop_rate),
            ("attn_drop_rate", 0.0, 0.99, self.attn_drop_rate),
            ("drop_path_rate", 0.0, 0.99, self.drop_path_rate),
        ];
        for (setting, low, high, got) in depths.chain(heads).chain(others) {
            if !(low..=high).contains(&got) {
                return Err(SwinError::Range { setting, low, high, got });
            }
        }
        let shape = self.shape()?;
        let (stages, heads) = (shape.depths.len(), shape.num_heads.len());
        if stages != heads || !(1..=8).contains(&stages) {
            return Err(SwinError::Stages { depths: stages, heads });
        }
        for (stage, &heads) in shape.num_heads.iter().enumerate() {
            let channels = shape.channels(stage);
            if !channels.is_multiple_of(heads) {
                return Err(SwinError::Heads { stage, channels, heads });
            }
        }
        if self.mlp_ratio * (shape.embed_dim as f64) < 1.0 {
            return Err(SwinError::Mlp { ratio: self.mlp_ratio, dim: shape.embed_dim });
        }
        let whole = |side: usize| side > 0 && side.is_multiple_of(self.patch_size);
        if !whole(height) || !whole(width) {
            return Err(SwinError::Patches { patch: self.patch_size, height, width });
        }
        Ok(())
    }
}

/// The plugin.
pub struct Swin;

impl Plugin for Swin {
    type Config = SwinConfig;
    const ID: &'static str = "swin";
    const DOC: &'static str =
        "Swin Transformer (Liu et al. 2021), named as timm names it; features are the mean of the last tokens.";
}

impl Encoder for Swin {
    fn build<'g>(config: &SwinConfig, graph: &'g Graph, inputs: &EncoderInputs<'g>) -> Result<Tensor<'g>, BuildError> {
        let images = inputs.images()?;
        config.check(images.size(2), images.size(3))?;
        Ok(network::forward(config, &config.shape()?, graph, images, inputs.training))
    }
}

#[cfg(feature = "export")]
export_plugin!(encoder, Swin);
