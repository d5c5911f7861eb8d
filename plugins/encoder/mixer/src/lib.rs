//! MLP-Mixer (Tolstikhin et al. 2021, <https://arxiv.org/abs/2105.01601>) as an encoder plugin, with timm's parameter
//! names, so that timm's weights load. The formula is in [`network`]; here are its settings.

pub mod network;

use clip_host_plugin_api::prelude::*;
use thiserror::Error;

/// Settings of [`Mixer`], under timm's names. The defaults are a Mixer-B/32; the image size is the recipe's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MixerConfig {
    /// A published network; it sets `patch_size`, `num_blocks` and `embed_dim`, which then must be left out (or agree).
    /// The weights that mix tokens have the size that follows from the images' number of patches.
    pub preset: Option<Preset>,
    /// Side of a square patch in pixels; the images' sides are multiples of it.
    #[schemars(range(min = 1, max = 1024))]
    pub patch_size: usize,
    /// Blocks.
    #[schemars(range(min = 1, max = 1024))]
    pub num_blocks: usize,
    /// Width of the tokens, and length of a feature row.
    #[schemars(range(min = 1, max = 65536))]
    pub embed_dim: usize,
    /// Width inside the layers that mix tokens and inside those that mix channels, both as a multiple of `embed_dim`
    /// (rounded down).
    #[schemars(inner(range(min = 0.001, max = 64.0)))]
    pub mlp_ratio: [f64; 2],
    /// Added to the variance in layer norm.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub norm_eps: f64,
    /// Share of the outputs of all linear layers in the blocks dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    pub proj_drop_rate: f64,
    /// Probability that an image skips a branch in training, the same in all blocks (stochastic depth, Huang et al. 2016).
    #[schemars(range(min = 0.0, max = 0.99))]
    pub drop_path_rate: f64,
}

impl Default for MixerConfig {
    fn default() -> Self {
        MixerConfig {
            preset: None,
            patch_size: 32,
            num_blocks: 12,
            embed_dim: 768,
            mlp_ratio: [0.5, 4.0],
            norm_eps: 1e-6,
            proj_drop_rate: 0.0,
            drop_path_rate: 0.0,
        }
    }
}

/// Published networks, by timm's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Preset {
    #[serde(rename = "mixer_s32_224")]
    Small32,
    #[serde(rename = "mixer_s16_224")]
    Small16,
    #[serde(rename = "mixer_b32_224")]
    Base32,
    #[serde(rename = "mixer_b16_224")]
    Base16,
    #[serde(rename = "mixer_l32_224")]
    Large32,
    #[serde(rename = "mixer_l16_224")]
    Large16,
}

/// What a preset sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub patch_size: usize,
    pub num_blocks: usize,
    pub embed_dim: usize,
}

impl Shape {
    /// The settings by name.
    fn settings(self) -> [(&'static str, usize); 3] {
        [("patch_size", self.patch_size), ("num_blocks", self.num_blocks), ("embed_dim", self.embed_dim)]
    }
}

impl Preset {
    /// The settings that it stands for.
    pub fn shape(self) -> Shape {
        let (patch_size, num_blocks, embed_dim) = match self {
            Preset::Small32 => (32, 8, 512),
            Preset::Small16 => (16, 8, 512),
            Preset::Base32 => (32, 12, 768),
            Preset::Base16 => (16, 12, 768),
            Preset::Large32 => (32, 24, 1024),
            Preset::Large16 => (16, 24, 1024),
        };
        Shape { patch_size, num_blocks, embed_dim }
    }
}

/// Settings or data that a Mixer cannot be built from.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum MixerError {
    #[error("building a mixer: expected `{setting}` in {low}..={high}, got {got} (hint: see `plugins inspect mixer`)")]
    Range { setting: &'static str, low: f64, high: f64, got: f64 },
    #[error(
        "building a mixer: preset {preset:?} has `{setting}` {expected}, the settings say {got} (hint: leave out either \
         `preset` or `{setting}`)"
    )]
    Preset { preset: Preset, setting: &'static str, expected: usize, got: usize },
    #[error(
        "building a mixer: expected `mlp_ratio` times `embed_dim` to be at least 1, got {ratio} times {dim} (hint: 0.5 \
         and 4 are the usual ratios)"
    )]
    Mlp { ratio: f64, dim: usize },
    #[error(
        "building a mixer: expected images whose sides are multiples of the patch's {patch} pixels, got \
         {height}x{width} (hint: change `data.image_size`, {patch} times a whole number, or the patch)"
    )]
    Patches { patch: usize, height: usize, width: usize },
}

impl From<MixerError> for BuildError {
    fn from(error: MixerError) -> Self {
        BuildError::new(error.to_string())
    }
}

impl MixerConfig {
    /// Patch size and sizes of the blocks, from the preset if there is one.
    ///
    /// # Errors
    /// [`MixerError::Preset`] if one of them is set to something else than the preset's.
    pub fn shape(&self) -> Result<Shape, MixerError> {
        let own = |config: &MixerConfig| Shape {
            patch_size: config.patch_size,
            num_blocks: config.num_blocks,
            embed_dim: config.embed_dim,
        };
        let Some(preset) = self.preset else { return Ok(own(self)) };
        let shape = preset.shape();
        let defaults = own(&MixerConfig::default()).settings();
        for (((setting, got), (_, expected)), (_, default)) in
            own(self).settings().into_iter().zip(shape.settings()).zip(defaults)
        {
            if got != default && got != expected {
                return Err(MixerError::Preset { preset, setting, expected, got });
            }
        }
        Ok(shape)
    }

    /// Checks the settings, also against the ranges that the schema states, and the images' size in pixels.
    ///
    /// # Errors
    /// The first setting that does not fit.
    pub fn check(&self, height: usize, width: usize) -> Result<(), MixerError> {
        let ratios = self.mlp_ratio.map(|ratio| ("mlp_ratio", 0.001, 64.0, ratio));
        let others = [
            ("patch_size", 1.0, 1024.0, self.patch_size as f64),
            ("num_blocks", 1.0, 1024.0, self.num_blocks as f64),
            ("embed_dim", 1.0, 65536.0, self.embed_dim as f64),
            ("norm_eps", 0.0, 1.0, self.norm_eps),
            ("proj_drop_rate", 0.0, 0.99, self.proj_drop_rate),
            ("drop_path_rate", 0.0, 0.99, self.drop_path_rate),
        ];
        for (setting, low, high, got) in ratios.into_iter().chain(others) {
            if !(low..=high).contains(&got) {
                return Err(MixerError::Range { setting, low, high, got });
            }
        }
        let shape = self.shape()?;
        if let Some(&ratio) = self.mlp_ratio.iter().find(|&&ratio| ratio * (shape.embed_dim as f64) < 1.0) {
            return Err(MixerError::Mlp { ratio, dim: shape.embed_dim });
        }
        let whole = |side: usize| side > 0 && side.is_multiple_of(shape.patch_size);
        if !whole(height) || !whole(width) {
            return Err(MixerError::Patches { patch: shape.patch_size, height, width });
        }
        Ok(())
    }
}

/// The plugin.
pub struct Mixer;

impl Plugin for Mixer {
    type Config = MixerConfig;
    const ID: &'static str = "mixer";
    const DOC: &'static str =
        "MLP-Mixer (Tolstikhin et al. 2021), named as timm names it; features are the mean of the tokens.";
}

impl Encoder for Mixer {
    fn build<'g>(config: &MixerConfig, graph: &'g Graph, inputs: &EncoderInputs<'g>) -> Result<Tensor<'g>, BuildError> {
        let images = inputs.images()?;
        config.check(images.size(2), images.size(3))?;
        Ok(network::forward(config, config.shape()?, graph, images, inputs.training))
    }
}

#[cfg(feature = "export")]
export_plugin!(encoder, Mixer);
