//! ConvNeXt (Liu et al. 2022, <https://arxiv.org/abs/2201.03545>) as an encoder plugin, with timm's parameter names, so
//! that timm's weights load. The formula is in [`network`]; here are its settings.

pub mod network;

use clip_host_plugin_api::prelude::*;
use thiserror::Error;

/// Settings of [`ConvNext`], under timm's names. The defaults are a ConvNeXt-T.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConvNextConfig {
    /// A published network; it sets `depths` and `dims`, which then must be left out (or agree).
    pub preset: Option<Preset>,
    /// Number of blocks of each of the four stages.
    #[schemars(inner(range(min = 1, max = 256)))]
    pub depths: [usize; 4],
    /// Channels of each stage; the last is the length of a feature row.
    #[schemars(inner(range(min = 1, max = 16384)))]
    pub dims: [usize; 4],
    /// Side of the depthwise convolutions' kernel, an odd number.
    #[schemars(range(min = 1, max = 63))]
    pub kernel_size: usize,
    /// Side of the square patch that the stem makes a pixel of; each later stage halves the resolution, whatever it is
    /// (timm does so for 4 only).
    #[schemars(range(min = 1, max = 1024))]
    pub patch_size: usize,
    /// Width inside the feed-forward layers, as a multiple of the stage's channels (rounded down).
    #[schemars(range(min = 0.001, max = 64.0))]
    pub mlp_ratio: f64,
    /// What the factors of each channel of a branch start with (layer scale, Touvron et al. 2021). None: there are no such
    /// factors.
    #[schemars(range(min = -10.0, max = 10.0))]
    pub ls_init_value: Option<f64>,
    /// Whether convolutions have a bias.
    pub conv_bias: bool,
    /// Added to the variance in layer norm.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub norm_eps: f64,
    /// Probability that an image skips the branch of the last block in training; it rises linearly from 0 in the first
    /// (stochastic depth, Huang et al. 2016).
    #[schemars(range(min = 0.0, max = 0.99))]
    pub drop_path_rate: f64,
}

impl Default for ConvNextConfig {
    fn default() -> Self {
        ConvNextConfig {
            preset: None,
            depths: [3, 3, 9, 3],
            dims: [96, 192, 384, 768],
            kernel_size: 7,
            patch_size: 4,
            mlp_ratio: 4.0,
            ls_init_value: Some(1e-6),
            conv_bias: true,
            norm_eps: 1e-6,
            drop_path_rate: 0.0,
        }
    }
}

/// Published networks, by timm's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Preset {
    #[serde(rename = "convnext_tiny")]
    Tiny,
    #[serde(rename = "convnext_small")]
    Small,
    #[serde(rename = "convnext_base")]
    Base,
    #[serde(rename = "convnext_large")]
    Large,
    #[serde(rename = "convnext_xlarge")]
    XLarge,
}

impl Preset {
    /// Blocks and channels of each stage.
    pub fn shape(self) -> Shape {
        let (blocks, width) = match self {
            Preset::Tiny => (9, 96),
            Preset::Small => (27, 96),
            Preset::Base => (27, 128),
            Preset::Large => (27, 192),
            Preset::XLarge => (27, 256),
        };
        Shape { depths: [3, 3, blocks, 3], dims: [1, 2, 4, 8].map(|times| times * width) }
    }
}

/// What a preset sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub depths: [usize; 4],
    pub dims: [usize; 4],
}

/// Settings or data that a ConvNeXt cannot be built from.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum ConvNextError {
    #[error(
        "building a convnext: expected `{setting}` in {low}..={high}, got {got} (hint: see `plugins inspect convnext`)"
    )]
    Range { setting: &'static str, low: f64, high: f64, got: f64 },
    #[error(
        "building a convnext: preset {preset:?} has `{setting}` {expected:?}, the settings say {got:?} (hint: leave out \
         either `preset` or `{setting}`)"
    )]
    Preset { preset: Preset, setting: &'static str, expected: [usize; 4], got: [usize; 4] },
    #[error("building a convnext: expected an odd `kernel_size`, got {got} (hint: 7 is the paper's)")]
    EvenKernel { got: usize },
    #[error(
        "building a convnext: expected `mlp_ratio` times the channels of each stage to be at least 1, got {ratio} times \
         {dim} (hint: 4 is the usual ratio)"
    )]
    Mlp { ratio: f64, dim: usize },
    #[error(
        "building a convnext: expected images of at least {least} pixels a side, of which the last stage has one left, \
         got {height}x{width} (hint: larger images in `data.image_size`, or a smaller `patch_size`)"
    )]
    Size { least: usize, height: usize, width: usize },
}

impl From<ConvNextError> for BuildError {
    fn from(error: ConvNextError) -> Self {
        BuildError::new(error.to_string())
    }
}

impl ConvNextConfig {
    /// Blocks and channels of each stage, from the preset if there is one.
    ///
    /// # Errors
    /// [`ConvNextError::Preset`] if `depths` or `dims` is set to something else than the preset's.
    pub fn shape(&self) -> Result<Shape, ConvNextError> {
        let Some(preset) = self.preset else { return Ok(Shape { depths: self.depths, dims: self.dims }) };
        let (shape, default) = (preset.shape(), ConvNextConfig::default());
        for (setting, got, expected, default) in
            [("depths", self.depths, shape.depths, default.depths), ("dims", self.dims, shape.dims, default.dims)]
        {
            if got != default && got != expected {
                return Err(ConvNextError::Preset { preset, setting, expected, got });
            }
        }
        Ok(shape)
    }

    /// Checks the settings, also against the ranges that the schema states, and the images' size in pixels.
    ///
    /// # Errors
    /// The first setting that does not fit.
    pub fn check(&self, height: usize, width: usize) -> Result<(), ConvNextError> {
        let depths = self.depths.map(|n| ("depths", 1.0, 256.0, n as f64));
        let dims = self.dims.map(|n| ("dims", 1.0, 16384.0, n as f64));
        let others = [
            ("kernel_size", 1.0, 63.0, self.kernel_size as f64),
            ("patch_size", 1.0, 1024.0, self.patch_size as f64),
            ("mlp_ratio", 0.001, 64.0, self.mlp_ratio),
            ("ls_init_value", -10.0, 10.0, self.ls_init_value.unwrap_or(0.0)),
            ("norm_eps", 0.0, 1.0, self.norm_eps),
            ("drop_path_rate", 0.0, 0.99, self.drop_path_rate),
        ];
        for (setting, low, high, got) in depths.into_iter().chain(dims).chain(others) {
            if !(low..=high).contains(&got) {
                return Err(ConvNextError::Range { setting, low, high, got });
            }
        }
        let shape = self.shape()?;
        if self.kernel_size.is_multiple_of(2) {
            return Err(ConvNextError::EvenKernel { got: self.kernel_size });
        }
        if let Some(&dim) = shape.dims.iter().find(|&&dim| self.mlp_ratio * (dim as f64) < 1.0) {
            return Err(ConvNextError::Mlp { ratio: self.mlp_ratio, dim });
        }
        // Each of the last three stages halves the resolution; what does not fill a window is left out.
        let least = 8 * self.patch_size;
        if height.min(width) < least {
            return Err(ConvNextError::Size { least, height, width });
        }
        Ok(())
    }
}

/// The plugin.
pub struct ConvNext;

impl Plugin for ConvNext {
    type Config = ConvNextConfig;
    const ID: &'static str = "convnext";
    const DOC: &'static str =
        "ConvNeXt (Liu et al. 2022), named as timm names it; features are the normalised global average pool.";
}

impl Encoder for ConvNext {
    fn build<'g>(
        config: &ConvNextConfig,
        graph: &'g Graph,
        inputs: &EncoderInputs<'g>,
    ) -> Result<Tensor<'g>, BuildError> {
        let images = inputs.images()?;
        config.check(images.size(2), images.size(3))?;
        Ok(network::forward(config, config.shape()?, graph, images, inputs.training))
    }
}

#[cfg(feature = "export")]
export_plugin!(encoder, ConvNext);
