//! The network: patches to tokens, stages of blocks with attention inside windows, merging between them, mean of tokens.
//!
//! Tokens are `[batch, height, width, channels]` throughout.

use crate::window::Windows;
use crate::{Shape, SwinConfig};
use clip_host_plugin_api::prelude::*;

/// Standard deviation of the initial weights. timm truncates them at ±2 (not at two deviations), which is never reached.
const WEIGHT: Init = Init::Normal { std: 0.02 };

/// Feature rows, as long as the last stage has channels, of images `[batch, channels, height, width]`; `config` has passed
/// its check for them, and `shape` is what it said.
pub fn forward<'g>(
    config: &SwinConfig,
    shape: &Shape,
    graph: &'g Graph,
    images: Tensor<'g>,
    training: bool,
) -> Tensor<'g> {
    let net = Net { graph, config, training };
    let mut x = net.patches(images, shape.embed_dim);
    let last = shape.depths.iter().sum::<usize>() - 1;
    let mut index = 0;
    for (stage, (&depth, &heads)) in shape.depths.iter().zip(&shape.num_heads).enumerate() {
        let name = format!("layers.{stage}");
        if stage > 0 {
            x = net.merge(&format!("{name}.downsample"), x, shape.channels(stage));
        }
        // Every second block's windows are shifted.
        let cuts = [false, true].map(|shifted| Cut::new(graph, x, shape.window_size, shifted));
        for block in 0..depth {
            let cut = &cuts[block % 2];
            let skip = config.drop_path_rate * index as f64 / last.max(1) as f64;
            x = net.block(&format!("{name}.blocks.{block}"), x, cut, heads, skip);
            index += 1;
        }
    }
    net.layer_norm("norm", x).mean(&[1, 2], false)
}

/// Windows, and what attention inside them needs to know of their tokens.
struct Cut<'g> {
    windows: Windows,
    offset_ids: Tensor<'g>,
    mask: Option<Tensor<'g>>,
}

impl<'g> Cut<'g> {
    /// Over images `x`.
    fn new(graph: &'g Graph, x: Tensor<'g>, size: usize, shifted: bool) -> Cut<'g> {
        let windows = Windows::new([x.size(1), x.size(2)], size, shifted);
        Cut { windows, offset_ids: windows.offset_ids(graph), mask: windows.mask(graph) }
    }
}

struct Net<'g, 'c> {
    graph: &'g Graph,
    config: &'c SwinConfig,
    training: bool,
}

impl<'g> Net<'g, '_> {
    /// A linear map of each patch, then layer norm. timm keeps the map as a convolution, and leaves its weights as PyTorch
    /// makes them.
    fn patches(&self, images: Tensor<'g>, dim: usize) -> Tensor<'g> {
        let (channels, size) = (images.size(1), self.config.patch_size);
        let init = Init::Uniform { bound: ((channels * size * size) as f64).sqrt().recip() };
        let weight = self.graph.param("patch_embed.proj.weight", &[dim, channels, size, size], init);
        let bias = self.graph.param("patch_embed.proj.bias", &[dim], init);
        let conv = Conv { stride: [size; 2], padding: [0; 2], dilation: [1; 2], groups: 1, layout: Layout::Nchw };
        self.layer_norm("patch_embed.norm", images.conv2d(weight, conv).permute(&[0, 2, 3, 1]) + bias)
    }

    /// Layer norm and a linear map of each two by two tokens; odd sides are filled up with zeros.
    fn merge(&self, name: &str, x: Tensor<'g>, out: usize) -> Tensor<'g> {
        let [batch, height, width, channels] = [0, 1, 2, 3].map(|axis| x.size(axis));
        let after = [0, height % 2, width % 2, 0];
        let x = if after == [0; 4] { x } else { x.pad(&[0; 4], &after, 0.0) };
        let (rows, columns) = (height.div_ceil(2), width.div_ceil(2));
        // Of the four tokens the columns come first: left above, left below, right above, right below.
        let x = x.reshape(&[batch, rows, 2, columns, 2, channels]).permute(&[0, 1, 3, 4, 2, 5]);
        let x = self.layer_norm(&format!("{name}.norm"), x.reshape(&[batch, rows, columns, 4 * channels]));
        self.linear(&format!("{name}.reduction"), x, out, false)
    }

    fn block(&self, name: &str, x: Tensor<'g>, cut: &Cut<'g>, heads: usize, skip: f64) -> Tensor<'g> {
        let dim = x.size(3);
        let tokens = cut.windows.cut(self.layer_norm(&format!("{name}.norm1"), x));
        let attended = cut.windows.join(self.attention(&format!("{name}.attn"), tokens, cut, heads));
        let x = x + self.drop_path(attended, skip);
        let hidden = (dim as f64 * self.config.mlp_ratio) as usize;
        let inner = self.linear(&format!("{name}.mlp.fc1"), self.layer_norm(&format!("{name}.norm2"), x), hidden, true);
        let inner = self.dropout(inner.gelu(), self.config.proj_drop_rate);
        let y = self.linear(&format!("{name}.mlp.fc2"), inner, dim, true);
        x + self.drop_path(self.dropout(y, self.config.proj_drop_rate), skip)
    }

    /// Multi-head attention (Vaswani et al. 2017) inside each window, with a learned bias for each head and offset between
    /// two tokens.
    fn attention(&self, name: &str, x: Tensor<'g>, cut: &Cut<'g>, heads: usize) -> Tensor<'g> {
        let (all, area, dim) = (x.size(0), x.size(1), x.size(2));
        let width = dim / heads;
        let table =
            self.graph.param(&format!("{name}.relative_position_bias_table"), &[cut.windows.offsets(), heads], WEIGHT);
        let bias = table.gather(cut.offset_ids).reshape(&[area, area, heads]).permute(&[2, 0, 1]);
        let qkv = self.linear(&format!("{name}.qkv"), x, 3 * dim, self.config.qkv_bias);
        let qkv = qkv.reshape(&[all, area, 3, heads, width]);
        let part =
            |index: usize| qkv.slice(2, index, index + 1).reshape(&[all, area, heads, width]).permute(&[0, 2, 1, 3]);
        let (q, k, v) = (part(0), part(1), part(2));
        // The scores are scaled, not the queries, which stay as the product wrote them.
        let scores = q.matmul(k.t()) * (width as f64).sqrt().recip() + bias;
        let scores = match cut.mask {
            Some(mask) => {
                let count = cut.windows.count();
                let by_image = scores.reshape(&[all / count, count, heads, area, area]) + mask;
                by_image.reshape(&[all, heads, area, area])
            }
            None => scores,
        };
        let context = self.dropout(scores.softmax(), self.config.attn_drop_rate).matmul(v);
        let joined = context.permute(&[0, 2, 1, 3]).reshape(&[all, area, dim]);
        self.dropout(self.linear(&format!("{name}.proj"), joined, dim, true), self.config.proj_drop_rate)
    }

    fn dropout(&self, x: Tensor<'g>, rate: f64) -> Tensor<'g> {
        if self.training { x.dropout(rate) } else { x }
    }

    /// Leaves a branch out for whole images, with probability `rate`.
    fn drop_path(&self, branch: Tensor<'g>, rate: f64) -> Tensor<'g> {
        if !self.training || rate == 0.0 {
            return branch;
        }
        branch * self.graph.full(&[branch.size(0), 1, 1, 1], 1.0).dropout(rate)
    }

    fn linear(&self, name: &str, x: Tensor<'g>, out: usize, bias: bool) -> Tensor<'g> {
        let weight = self.graph.param(&format!("{name}.weight"), &[out, x.size(-1)], WEIGHT);
        let bias = bias.then(|| self.graph.param(&format!("{name}.bias"), &[out], Init::Constant(0.0)));
        x.linear(weight, bias)
    }

    fn layer_norm(&self, name: &str, x: Tensor<'g>) -> Tensor<'g> {
        let dim = x.size(-1);
        let weight = self.graph.param(&format!("{name}.weight"), &[dim], Init::Constant(1.0));
        let bias = self.graph.param(&format!("{name}.bias"), &[dim], Init::Constant(0.0));
        x.layer_norm(weight, bias, self.config.norm_eps)
    }
}
