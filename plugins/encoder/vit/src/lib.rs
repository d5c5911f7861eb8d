//! Vision Transformer (Dosovitskiy et al. 2021, <https://arxiv.org/abs/2010.11929>) as an encoder plugin, with timm's
//! parameter names, so that timm's weights load. The formula is in [`network`]; here are its settings.

pub mod network;

use clip_host_plugin_api::prelude::*;
use thiserror::Error;

/// Settings of [`Vit`], under timm's names. The defaults are a ViT-B/16; the image size is the recipe's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct VitConfig {
    /// A published network; it sets `patch_size`, `embed_dim`, `depth`, `num_heads`, `pre_norm`, `quick_gelu` and
    /// `norm_eps`, which then must be left out (or agree). Images of another size than its name says get as many positions
    /// as they have patches.
    pub preset: Option<Preset>,
    /// Side of a square patch in pixels; the images' sides are multiples of it.
    #[schemars(range(min = 1, max = 1024))]
    pub patch_size: usize,
    /// Width of the tokens, and length of a feature row; a multiple of `num_heads`.
    #[schemars(range(min = 1, max = 65536))]
    pub embed_dim: usize,
    /// Blocks.
    #[schemars(range(min = 1, max = 1024))]
    pub depth: usize,
    /// Attention heads of each block.
    #[schemars(range(min = 1, max = 1024))]
    pub num_heads: usize,
    /// Width inside the feed-forward layers, as a multiple of `embed_dim` (rounded down).
    #[schemars(range(min = 0.001, max = 64.0))]
    pub mlp_ratio: f64,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// What the factors of each channel of a branch start with (layer scale, Touvron et al. 2021). None: there are no such
    /// factors.
    #[schemars(range(min = -10.0, max = 10.0))]
    pub init_values: Option<f64>,
    /// Whether a learned token stands before the patches.
    pub class_token: bool,
    /// Number of further learned tokens before the patches (registers, Darcet et al. 2024).
    #[schemars(range(min = 0, max = 1024))]
    pub reg_tokens: usize,
    /// Whether only the patches have positions, and not the tokens before them.
    pub no_embed_class: bool,
    /// Whether there is a layer norm (`norm_pre`) before the first block too, as in CLIP; patches have no bias then.
    pub pre_norm: bool,
    /// Whether the feed-forward layers have x·sigmoid(1.702·x), as OpenAI's CLIP does, and not x·Φ(x).
    pub quick_gelu: bool,
    /// How the tokens become one feature row: the class token (`token`), or the mean of the patches (`avg`).
    pub global_pool: Pooling,
    /// Whether the final layer norm comes after pooling (named `fc_norm`) and not before (`norm`). Left out: after `avg`,
    /// before `token`.
    pub fc_norm: Option<bool>,
    /// Added to the variance in layer norm.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub norm_eps: f64,
    /// Share of the patches left out in training, other ones for each image and step (FLIP, Li et al. 2023; 0.5 there).
    #[schemars(range(min = 0.0, max = 0.99))]
    pub patch_drop_rate: f64,
    /// Share of the embedded tokens' elements dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    pub pos_drop_rate: f64,
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

impl Default for VitConfig {
    fn default() -> Self {
        VitConfig {
            preset: None,
            patch_size: 16,
            embed_dim: 768,
            depth: 12,
            num_heads: 12,
            mlp_ratio: 4.0,
            qkv_bias: true,
            init_values: None,
            class_token: true,
            reg_tokens: 0,
            no_embed_class: false,
            pre_norm: false,
            quick_gelu: false,
            global_pool: Pooling::Token,
            fc_norm: None,
            norm_eps: 1e-6,
            patch_drop_rate: 0.0,
            pos_drop_rate: 0.0,
            proj_drop_rate: 0.0,
            attn_drop_rate: 0.0,
            drop_path_rate: 0.0,
        }
    }
}

/// How the tokens become one feature row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// The class token.
    Token,
    /// The mean of the patches, without the tokens before them.
    Avg,
}

/// Published networks, by timm's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Preset {
    #[serde(rename = "vit_tiny_patch16_224")]
    Tiny16,
    #[serde(rename = "vit_small_patch32_224")]
    Small32,
    #[serde(rename = "vit_small_patch16_224")]
    Small16,
    #[serde(rename = "vit_base_patch32_224")]
    Base32,
    #[serde(rename = "vit_base_patch16_224")]
    Base16,
    #[serde(rename = "vit_large_patch32_224")]
    Large32,
    #[serde(rename = "vit_large_patch16_224")]
    Large16,
    #[serde(rename = "vit_large_patch14_224")]
    Large14,
    #[serde(rename = "vit_huge_patch14_224")]
    Huge14,
    #[serde(rename = "vit_base_patch32_clip_224")]
    Base32Clip,
    #[serde(rename = "vit_base_patch16_clip_224")]
    Base16Clip,
    #[serde(rename = "vit_large_patch14_clip_224")]
    Large14Clip,
    #[serde(rename = "vit_huge_patch14_clip_224")]
    Huge14Clip,
    #[serde(rename = "vit_base_patch32_clip_quickgelu_224")]
    Base32ClipQuickGelu,
    #[serde(rename = "vit_base_patch16_clip_quickgelu_224")]
    Base16ClipQuickGelu,
    #[serde(rename = "vit_large_patch14_clip_quickgelu_224")]
    Large14ClipQuickGelu,
}

/// What a preset sets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub patch_size: usize,
    pub embed_dim: usize,
    pub depth: usize,
    pub num_heads: usize,
    pub pre_norm: bool,
    pub quick_gelu: bool,
    pub norm_eps: f64,
}

impl Shape {
    /// The settings by name, as text.
    fn settings(self) -> [(&'static str, String); 7] {
        [
            ("patch_size", self.patch_size.to_string()),
            ("embed_dim", self.embed_dim.to_string()),
            ("depth", self.depth.to_string()),
            ("num_heads", self.num_heads.to_string()),
            ("pre_norm", self.pre_norm.to_string()),
            ("quick_gelu", self.quick_gelu.to_string()),
            ("norm_eps", self.norm_eps.to_string()),
        ]
    }
}

impl Preset {
    /// The settings that it stands for.
    pub fn shape(self) -> Shape {
        use Preset::*;
        let (patch_size, embed_dim, depth, num_heads) = match self {
            Tiny16 => (16, 192, 12, 3),
            Small32 => (32, 384, 12, 6),
            Small16 => (16, 384, 12, 6),
            Base32 | Base32Clip | Base32ClipQuickGelu => (32, 768, 12, 12),
            Base16 | Base16Clip | Base16ClipQuickGelu => (16, 768, 12, 12),
            Large32 => (32, 1024, 24, 16),
            Large16 => (16, 1024, 24, 16),
            Large14 | Large14Clip | Large14ClipQuickGelu => (14, 1024, 24, 16),
            Huge14 | Huge14Clip => (14, 1280, 32, 16),
        };
        let quick_gelu = matches!(self, Base32ClipQuickGelu | Base16ClipQuickGelu | Large14ClipQuickGelu);
        let clip = quick_gelu || matches!(self, Base32Clip | Base16Clip | Large14Clip | Huge14Clip);
        let norm_eps = if clip { 1e-5 } else { 1e-6 };
        Shape { patch_size, embed_dim, depth, num_heads, pre_norm: clip, quick_gelu, norm_eps }
    }
}

/// Settings or data that a ViT cannot be built from.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum VitError {
    #[error("building a vit: expected `{setting}` in {low}..={high}, got {got} (hint: see `plugins inspect vit`)")]
    Range { setting: &'static str, low: f64, high: f64, got: f64 },
    #[error(
        "building a vit: preset {preset:?} has `{setting}` {expected}, the settings say {got} (hint: leave out either \
         `preset` or `{setting}`)"
    )]
    Preset { preset: Preset, setting: &'static str, expected: String, got: String },
    #[error(
        "building a vit: expected `embed_dim` to be a multiple of `num_heads`, got {dim} and {heads} (hint: dim 768 goes \
         with 12 heads)"
    )]
    Heads { dim: usize, heads: usize },
    #[error(
        "building a vit: expected `mlp_ratio` times `embed_dim` to be at least 1, got {ratio} times {dim} (hint: 4 is \
         the usual ratio)"
    )]
    Mlp { ratio: f64, dim: usize },
    #[error(
        "building a vit: expected images whose sides are multiples of the patch's {patch} pixels, got {height}x{width} \
         (hint: change `data.image_size`, {patch} times a whole number, or the patch)"
    )]
    Patches { patch: usize, height: usize, width: usize },
    #[error(
        "building a vit: expected a class token for `global_pool` \"token\", got `class_token` false (hint: pool by \
         \"avg\", or leave out `class_token`)"
    )]
    NoClassToken,
}

impl From<VitError> for BuildError {
    fn from(error: VitError) -> Self {
        BuildError::new(error.to_string())
    }
}

impl VitConfig {
    /// Patch size, and sizes and kind of the blocks, from the preset if there is one.
    ///
    /// # Errors
    /// [`VitError::Preset`] if one of them is set to something else than the preset's.
    pub fn shape(&self) -> Result<Shape, VitError> {
        let own = |config: &VitConfig| Shape {
            patch_size: config.patch_size,
            embed_dim: config.embed_dim,
            depth: config.depth,
            num_heads: config.num_heads,
            pre_norm: config.pre_norm,
            quick_gelu: config.quick_gelu,
            norm_eps: config.norm_eps,
        };
        let Some(preset) = self.preset else { return Ok(own(self)) };
        let shape = preset.shape();
        let defaults = own(&VitConfig::default()).settings();
        for (((setting, got), (_, expected)), (_, default)) in
            own(self).settings().into_iter().zip(shape.settings()).zip(defaults)
        {
            if got != default && got != expected {
                return Err(VitError::Preset { preset, setting, expected, got });
            }
        }
        Ok(shape)
    }

    /// Checks the settings, also against the ranges that the schema states, and the images' size in pixels.
    ///
    /// # Errors
    /// The first setting that does not fit.
    pub fn check(&self, height: usize, width: usize) -> Result<(), VitError> {
        let ranges = [
            ("patch_size", 1.0, 1024.0, self.patch_size as f64),
            ("embed_dim", 1.0, 65536.0, self.embed_dim as f64),
            ("depth", 1.0, 1024.0, self.depth as f64),
            ("num_heads", 1.0, 1024.0, self.num_heads as f64),
            ("mlp_ratio", 0.001, 64.0, self.mlp_ratio),
            ("init_values", -10.0, 10.0, self.init_values.unwrap_or(0.0)),
            ("reg_tokens", 0.0, 1024.0, self.reg_tokens as f64),
            ("norm_eps", 0.0, 1.0, self.norm_eps),
            ("patch_drop_rate", 0.0, 0.99, self.patch_drop_rate),
            ("pos_drop_rate", 0.0, 0.99, self.pos_drop_rate),
            ("proj_drop_rate", 0.0, 0.99, self.proj_drop_rate),
            ("attn_drop_rate", 0.0, 0.99, self.attn_drop_rate),
            ("drop_path_rate", 0.0, 0.99, self.drop_path_rate),
        ];
        for (setting, low, high, got) in ranges {
            if !(low..=high).contains(&got) {
                return Err(VitError::Range { setting, low, high, got });
            }
        }
        let shape = self.shape()?;
        if !shape.embed_dim.is_multiple_of(shape.num_heads) {
            return Err(VitError::Heads { dim: shape.embed_dim, heads: shape.num_heads });
        }
        if self.mlp_ratio * (shape.embed_dim as f64) < 1.0 {
            return Err(VitError::Mlp { ratio: self.mlp_ratio, dim: shape.embed_dim });
        }
        let whole = |side: usize| side > 0 && side.is_multiple_of(shape.patch_size);
        if !whole(height) || !whole(width) {
            return Err(VitError::Patches { patch: shape.patch_size, height, width });
        }
        if self.global_pool == Pooling::Token && !self.class_token {
            return Err(VitError::NoClassToken);
        }
        Ok(())
    }
}

/// The plugin.
pub struct Vit;

impl Plugin for Vit {
    type Config = VitConfig;
    const ID: &'static str = "vit";
    const DOC: &'static str =
        "Vision Transformer (Dosovitskiy et al. 2021), named as timm names it; features are the class token.";
}

impl Encoder for Vit {
    fn build<'g>(config: &VitConfig, graph: &'g Graph, inputs: &EncoderInputs<'g>) -> Result<Tensor<'g>, BuildError> {
        let images = inputs.images()?;
        config.check(images.size(2), images.size(3))?;
        Ok(network::forward(config, config.shape()?, graph, images, inputs.training))
    }
}

#[cfg(feature = "export")]
export_plugin!(encoder, Vit);
