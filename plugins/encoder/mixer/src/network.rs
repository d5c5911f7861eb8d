//! The network: patches to tokens, blocks that mix tokens and then channels with layer norm before each, mean of tokens.

use crate::{MixerConfig, Shape};
use clip_host_plugin_api::prelude::*;

/// Standard deviation of a standard normal distribution cut off at ±2: what is drawn from it is divided by this.
const TRUNCATED_STD: f64 = 0.8796256610342398;

/// Feature rows `[batch, embed_dim]` of images `[batch, channels, height, width]`; `config` has passed its check for
/// them, and `shape` is what it said.
pub fn forward<'g>(
    config: &MixerConfig,
    shape: Shape,
    graph: &'g Graph,
    images: Tensor<'g>,
    training: bool,
) -> Tensor<'g> {
    let net = Net { graph, config, shape, training };
    let mut x = net.patches(images);
    for block in 0..shape.num_blocks {
        x = net.block(&format!("blocks.{block}"), x);
    }
    net.layer_norm("norm", x).mean(&[1], false)
}

struct Net<'g, 'c> {
    graph: &'g Graph,
    config: &'c MixerConfig,
    shape: Shape,
    training: bool,
}

impl<'g> Net<'g, '_> {
    /// A linear map of each patch, row by row: `[batch, patches, embed_dim]`. timm keeps it as a convolution, with the
    /// initial weights of LeCun et al. 1998.
    fn patches(&self, images: Tensor<'g>) -> Tensor<'g> {
        let Shape { patch_size: size, embed_dim: dim, .. } = self.shape;
        let channels = images.size(1);
        let init = Init::TruncatedNormal { std: ((channels * size * size) as f64).sqrt().recip() / TRUNCATED_STD };
        let weight = self.graph.param("stem.proj.weight", &[dim, channels, size, size], init);
        let bias = self.graph.param("stem.proj.bias", &[dim], Init::Constant(0.0));
        let conv = Conv { stride: [size; 2], padding: [0; 2], dilation: [1; 2], groups: 1, layout: Layout::Nchw };
        let grid = images.conv2d(weight, conv).permute(&[0, 2, 3, 1]);
        grid.reshape(&[grid.size(0), grid.size(1) * grid.size(2), dim]) + bias
    }

    /// One block over tokens `[batch, patches, embed_dim]`.
    fn block(&self, name: &str, x: Tensor<'g>) -> Tensor<'g> {
        let [tokens, channels] = self.config.mlp_ratio.map(|ratio| (self.shape.embed_dim as f64 * ratio) as usize);
        let normalised = self.layer_norm(&format!("{name}.norm1"), x);
        let x = x + self.drop_path(self.mlp(&format!("{name}.mlp_tokens"), normalised.t(), tokens).t());
        let normalised = self.layer_norm(&format!("{name}.norm2"), x);
        x + self.drop_path(self.mlp(&format!("{name}.mlp_channels"), normalised, channels))
    }

    /// Two linear layers over the last axis with GELU between.
    fn mlp(&self, name: &str, x: Tensor<'g>, hidden: usize) -> Tensor<'g> {
        let inner = self.dropout(self.linear(&format!("{name}.fc1"), x, hidden).gelu());
        self.dropout(self.linear(&format!("{name}.fc2"), inner, x.size(-1)))
    }

    fn dropout(&self, x: Tensor<'g>) -> Tensor<'g> {
        if self.training { x.dropout(self.config.proj_drop_rate) } else { x }
    }

    /// Leaves a branch out for whole images.
    fn drop_path(&self, branch: Tensor<'g>) -> Tensor<'g> {
        let rate = self.config.drop_path_rate;
        if !self.training || rate == 0.0 {
            return branch;
        }
        branch * self.graph.full(&[branch.size(0), 1, 1], 1.0).dropout(rate)
    }

    /// Uniform by fan-in and fan-out (Glorot and Bengio 2010), as timm's Mixer is.
    fn linear(&self, name: &str, x: Tensor<'g>, out: usize) -> Tensor<'g> {
        let fan_in = x.size(-1);
        let bound = (6.0 / (fan_in + out) as f64).sqrt();
        let weight = self.graph.param(&format!("{name}.weight"), &[out, fan_in], Init::Uniform { bound });
        let bias = self.graph.param(&format!("{name}.bias"), &[out], Init::Normal { std: 1e-6 });
        x.linear(weight, Some(bias))
    }

    fn layer_norm(&self, name: &str, x: Tensor<'g>) -> Tensor<'g> {
        let dim = self.shape.embed_dim;
        let weight = self.graph.param(&format!("{name}.weight"), &[dim], Init::Constant(1.0));
        let bias = self.graph.param(&format!("{name}.bias"), &[dim], Init::Constant(0.0));
        x.layer_norm(weight, bias, self.config.norm_eps)
    }
}
