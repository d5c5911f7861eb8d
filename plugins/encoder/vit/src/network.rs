//! The network: patches to tokens, blocks of attention and feed-forward with layer norm before each, then pooling.

use crate::{Pooling, Shape, VitConfig};
use clip_host_plugin_api::prelude::*;

/// Standard deviation of the initial weights. timm truncates them at ±2 (not at two deviations), which is never reached.
const WEIGHT: Init = Init::Normal { std: 0.02 };

/// Feature rows `[batch, embed_dim]` of images `[batch, channels, height, width]`; `config` has passed its check for
/// them, and `shape` is what it said.
pub fn forward<'g>(
    config: &VitConfig,
    shape: Shape,
    graph: &'g Graph,
    images: Tensor<'g>,
    training: bool,
) -> Tensor<'g> {
    let net = Net { graph, config, shape, training };
    let batch = images.size(0);
    let mut x = net.embeddings(images);
    for block in 0..shape.depth {
        // Nothing but the class token reaches the features: the last block is computed for it alone.
        let last = block + 1 == shape.depth;
        let rows = if last && config.global_pool == Pooling::Token { 1 } else { x.size(1) };
        x = net.block(block, x, rows);
    }
    let after = config.fc_norm.unwrap_or(config.global_pool == Pooling::Avg);
    let x = if after { x } else { net.layer_norm("norm", x) };
    let features = match config.global_pool {
        Pooling::Token => x.reshape(&[batch, shape.embed_dim]),
        Pooling::Avg => tokens(x, net.prefix(), x.size(1)).mean(&[1], false),
    };
    if after { net.layer_norm("fc_norm", features) } else { features }
}

/// Some of the tokens. All of them are `x` itself: the gradient of a slice is a tensor of its own.
fn tokens(x: Tensor<'_>, start: usize, end: usize) -> Tensor<'_> {
    if (start, end) == (0, x.size(1)) { x } else { x.slice(1, start, end) }
}

struct Net<'g, 'c> {
    graph: &'g Graph,
    config: &'c VitConfig,
    shape: Shape,
    training: bool,
}

impl<'g> Net<'g, '_> {
    /// Number of tokens before the patches.
    fn prefix(&self) -> usize {
        usize::from(self.config.class_token) + self.config.reg_tokens
    }

    /// Tokens `[batch, tokens, embed_dim]` with their positions: the class token, if there is one, registers, if there are
    /// any, then the patches.
    fn embeddings(&self, images: Tensor<'g>) -> Tensor<'g> {
        let (config, dim) = (self.config, self.shape.embed_dim);
        let patches = self.patches(images);
        let (batch, count) = (patches.size(0), patches.size(1));
        let placed = if config.no_embed_class { 0 } else { self.prefix() };
        let positions = self.graph.param("pos_embed", &[1, placed + count, dim], WEIGHT);
        let patches = self.drop_patches(patches + tokens(positions, placed, placed + count));
        let own = [("cls_token", usize::from(config.class_token)), ("reg_token", config.reg_tokens)];
        let mut parts = Vec::new();
        let mut start = 0;
        for (name, count) in own.into_iter().filter(|(_, count)| *count > 0) {
            let learned = self.graph.param(name, &[1, count, dim], Init::Normal { std: 1e-6 });
            let learned = if placed > 0 { learned + tokens(positions, start, start + count) } else { learned };
            parts.push(learned.expand_to(&[batch, count, dim]));
            start += count;
        }
        parts.push(patches);
        let x = if parts.len() > 1 { Tensor::concat(&parts, 1).unwrap_or(patches) } else { patches };
        let x = self.dropout(x, config.pos_drop_rate);
        if self.shape.pre_norm { self.layer_norm("norm_pre", x) } else { x }
    }

    /// A linear map of each patch, row by row: `[batch, patches, embed_dim]`. timm keeps it as a convolution, and leaves
    /// its weights as PyTorch makes them.
    fn patches(&self, images: Tensor<'g>) -> Tensor<'g> {
        let Shape { patch_size: size, embed_dim: dim, .. } = self.shape;
        let channels = images.size(1);
        let init = Init::Uniform { bound: ((channels * size * size) as f64).sqrt().recip() };
        let weight = self.graph.param("patch_embed.proj.weight", &[dim, channels, size, size], init);
        let conv = Conv { stride: [size; 2], padding: [0; 2], dilation: [1; 2], groups: 1, layout: Layout::Nchw };
        let grid = images.conv2d(weight, conv).permute(&[0, 2, 3, 1]);
        let patches = grid.reshape(&[grid.size(0), grid.size(1) * grid.size(2), dim]);
        // The layer norm before the blocks stands in for a bias.
        if self.shape.pre_norm { patches } else { patches + self.graph.param("patch_embed.proj.bias", &[dim], init) }
    }

    /// Keeps a random choice of each image's patches, all choices of that many being equally likely, in random order: the
    /// positions are in the tokens already.
    fn drop_patches(&self, patches: Tensor<'g>) -> Tensor<'g> {
        let rate = self.config.patch_drop_rate;
        if !self.training || rate == 0.0 {
            return patches;
        }
        let (graph, batch, count) = (self.graph, patches.size(0), patches.size(1));
        let keep = ((count as f64 * (1.0 - rate)) as usize).max(1);
        // A patch's rank is the number of patches before it by a random key; of equal keys the first patch comes first,
        // so that ranks are a permutation whatever the keys.
        let keys = graph.random(&[batch, count]);
        let (own, other) = (keys.unsqueeze(2), keys.unsqueeze(1));
        let first = graph.iota(&[count, count], 1).lt(graph.iota(&[count, count], 0));
        let rank = (other.lt(own) + other.eq(own) * first).sum(&[2], false);
        // Selection as a product with rows of one 1 each, which is exact and has a gradient.
        let chosen = rank.unsqueeze(1).eq(graph.iota(&[keep, count], 0));
        chosen.matmul(patches)
    }

    /// One block over `x`, for its first `rows` tokens.
    fn block(&self, index: usize, x: Tensor<'g>, rows: usize) -> Tensor<'g> {
        let (config, name) = (self.config, format!("blocks.{index}"));
        let skip = config.drop_path_rate * index as f64 / (self.shape.depth - 1).max(1) as f64;
        let attended = self.attention(&format!("{name}.attn"), self.layer_norm(&format!("{name}.norm1"), x), rows);
        let attended = self.layer_scale(&format!("{name}.ls1"), attended);
        let x = tokens(x, 0, rows) + self.drop_path(attended, skip);
        let hidden = (self.shape.embed_dim as f64 * config.mlp_ratio) as usize;
        let inner = self.linear(&format!("{name}.mlp.fc1"), self.layer_norm(&format!("{name}.norm2"), x), hidden, true);
        let inner = if self.shape.quick_gelu { inner.quick_gelu() } else { inner.gelu() };
        let inner = self.dropout(inner, config.proj_drop_rate);
        let y = self.linear(&format!("{name}.mlp.fc2"), inner, self.shape.embed_dim, true);
        let y = self.layer_scale(&format!("{name}.ls2"), self.dropout(y, config.proj_drop_rate));
        x + self.drop_path(y, skip)
    }

    /// Multi-head attention (Vaswani et al. 2017) from the first `rows` tokens to all.
    fn attention(&self, name: &str, x: Tensor<'g>, rows: usize) -> Tensor<'g> {
        let Shape { embed_dim: dim, num_heads: heads, .. } = self.shape;
        let (batch, count, width) = (x.size(0), x.size(1), dim / heads);
        let qkv = self.linear(&format!("{name}.qkv"), x, 3 * dim, self.config.qkv_bias);
        let qkv = qkv.reshape(&[batch, count, 3, heads, width]);
        let part = |index: usize, rows: usize| {
            let part = tokens(qkv.slice(2, index, index + 1), 0, rows);
            part.reshape(&[batch, rows, heads, width]).permute(&[0, 2, 1, 3])
        };
        let (q, k, v) = (part(0, rows), part(1, count), part(2, count));
        // The scores are scaled, not the queries, which stay as the product wrote them.
        let scores = q.matmul(k.t()) * (width as f64).sqrt().recip();
        let context = self.dropout(scores.softmax(), self.config.attn_drop_rate).matmul(v);
        let joined = context.permute(&[0, 2, 1, 3]).reshape(&[batch, rows, dim]);
        self.dropout(self.linear(&format!("{name}.proj"), joined, dim, true), self.config.proj_drop_rate)
    }

    /// A learned factor for each channel of a branch, if the settings have them.
    fn layer_scale(&self, name: &str, branch: Tensor<'g>) -> Tensor<'g> {
        match self.config.init_values {
            Some(start) => {
                let init = Init::Constant(start);
                branch * self.graph.param(&format!("{name}.gamma"), &[self.shape.embed_dim], init)
            }
            None => branch,
        }
    }

    fn dropout(&self, x: Tensor<'g>, rate: f64) -> Tensor<'g> {
        if self.training { x.dropout(rate) } else { x }
    }

    /// Leaves a branch out for whole images, with probability `rate`.
    fn drop_path(&self, branch: Tensor<'g>, rate: f64) -> Tensor<'g> {
        if !self.training || rate == 0.0 {
            return branch;
        }
        branch * self.graph.full(&[branch.size(0), 1, 1], 1.0).dropout(rate)
    }

    fn linear(&self, name: &str, x: Tensor<'g>, out: usize, bias: bool) -> Tensor<'g> {
        let weight = self.graph.param(&format!("{name}.weight"), &[out, x.size(-1)], WEIGHT);
        let bias = bias.then(|| self.graph.param(&format!("{name}.bias"), &[out], Init::Constant(0.0)));
        x.linear(weight, bias)
    }

    fn layer_norm(&self, name: &str, x: Tensor<'g>) -> Tensor<'g> {
        let dim = self.shape.embed_dim;
        let weight = self.graph.param(&format!("{name}.weight"), &[dim], Init::Constant(1.0));
        let bias = self.graph.param(&format!("{name}.bias"), &[dim], Init::Constant(0.0));
        x.layer_norm(weight, bias, self.shape.norm_eps)
    }
}
