//! The network: embeddings, blocks of causal attention and feed-forward with layer norm before each, the end of text.

use crate::{ClipTextConfig, Pooling, Shape};
use clip_host_plugin_api::prelude::*;

/// Added to the scores of later positions: large enough that their probability is exactly 0 in f32 and bf16.
const MASKED: f64 = -1e9;

/// Feature rows `[batch, output_dim]` of token ids and mask, both `[batch, length]`; `config` has passed its check, and
/// `shape` is what it said.
///
/// Padding comes after the text, so that the causal mask hides it; the attention mask only serves
/// [`Pooling::LastToken`].
pub fn forward<'g>(
    config: &ClipTextConfig,
    shape: Shape,
    graph: &'g Graph,
    input_ids: Tensor<'g>,
    attention_mask: Tensor<'g>,
) -> Tensor<'g> {
    let net = Net { graph, config, shape };
    let end = net.end(input_ids, attention_mask);
    let mut x = net.embeddings(input_ids);
    for layer in 0..shape.layers {
        // Nothing but the end of text reaches the features: the last block is computed for it alone.
        let rows = if layer + 1 == shape.layers { Rows::At(end) } else { Rows::All };
        x = net.block(&format!("transformer.resblocks.{layer}"), x, rows);
    }
    let pooled = net.layer_norm("ln_final", x.squeeze(1));
    if shape.output_dim == 0 {
        return pooled;
    }
    let init = Init::Normal { std: net.width().sqrt().recip() };
    pooled.matmul(graph.param("text_projection", &[shape.width, shape.output_dim], init))
}

/// The positions that a block is computed for.
#[derive(Clone, Copy)]
enum Rows<'g> {
    All,
    /// One of each sequence, `[batch, 1]`.
    At(Tensor<'g>),
}

impl<'g> Rows<'g> {
    /// These rows of `x [batch, length, width]`.
    fn of(self, x: Tensor<'g>) -> Tensor<'g> {
        match self {
            Rows::All => x,
            // A product with a row of one 1, which is exact and has a gradient.
            Rows::At(position) => x.graph().iota(&[1, x.size(1)], 1).eq(position).unsqueeze(1).matmul(x),
        }
    }

    /// What is added to attention scores `[batch, heads, rows, length]`, so that no row sees a later position.
    fn mask(self, graph: &'g Graph, length: usize) -> Tensor<'g> {
        let later = match self {
            Rows::All => graph.iota(&[length, length], 1).gt(graph.iota(&[length, length], 0)),
            Rows::At(position) => graph.iota(&[1, 1, 1, length], 3).gt(position.reshape(&[position.size(0), 1, 1, 1])),
        };
        later * MASKED
    }
}

struct Net<'g, 'c> {
    graph: &'g Graph,
    config: &'c ClipTextConfig,
    shape: Shape,
}

impl<'g> Net<'g, '_> {
    fn width(&self) -> f64 {
        self.shape.width as f64
    }

    /// Position of the end of each text, `[batch, 1]`.
    fn end(&self, input_ids: Tensor<'g>, attention_mask: Tensor<'g>) -> Tensor<'g> {
        let length = input_ids.size(1);
        let positions = self.graph.iota(&[1, length], 1);
        let first = |hit: Tensor<'g>| {
            let last = length as f64 - 1.0;
            // The most positions after a hit; none where there is no hit.
            last - hit.where_(last - positions, 0.0).max(&[1], true)
        };
        let ids = input_ids.cast(DType::F32);
        match self.config.pool_type {
            Pooling::Argmax => first(ids.eq(ids.max(&[1], true))),
            Pooling::Eos => first(ids.eq(self.config.eos_id as f64)),
            Pooling::LastToken => (attention_mask * positions).max(&[1], true),
        }
    }

    fn embeddings(&self, input_ids: Tensor<'g>) -> Tensor<'g> {
        let Shape { width, .. } = self.shape;
        let table = |name: &str, rows, std| self.graph.param(name, &[rows, width], Init::Normal { std });
        let words = table("token_embedding.weight", self.config.vocab_size, 0.02).gather(input_ids);
        words + table("positional_embedding", self.config.context_length, 0.01).slice(0, 0, input_ids.size(1))
    }

    /// One block over `x`, for some of its rows.
    fn block(&self, name: &str, x: Tensor<'g>, rows: Rows<'g>) -> Tensor<'g> {
        let Shape { width, .. } = self.shape;
        let normalised = self.layer_norm(&format!("{name}.ln_1"), x);
        let x = rows.of(x) + self.attention(&format!("{name}.attn"), normalised, rows);
        let hidden = (self.width() * self.config.mlp_ratio) as usize;
        let inner = self.layer_norm(&format!("{name}.ln_2"), x);
        let inner = self.mlp_linear(&format!("{name}.mlp.c_fc"), inner, hidden, (2.0 * self.width()).sqrt().recip());
        let inner = if self.config.quick_gelu { inner.quick_gelu() } else { inner.gelu() };
        x + self.mlp_linear(&format!("{name}.mlp.c_proj"), inner, width, self.output_std())
    }

    /// Multi-head attention (Vaswani et al. 2017) from some rows to all that are not later.
    fn attention(&self, name: &str, x: Tensor<'g>, rows: Rows<'g>) -> Tensor<'g> {
        let Shape { width, heads, .. } = self.shape;
        let (batch, length) = (x.size(0), x.size(1));
        let zero = Init::Constant(0.0);
        let init = Init::Normal { std: self.width().sqrt().recip() };
        let weight = self.graph.param(&format!("{name}.in_proj_weight"), &[3 * width, width], init);
        let bias = self.graph.param(&format!("{name}.in_proj_bias"), &[3 * width], zero);
        let qkv = x.linear(weight, Some(bias));
        let part = |index: usize| qkv.slice(2, index * width, (index + 1) * width);
        let split =
            |part: Tensor<'g>| part.reshape(&[batch, part.size(1), heads, width / heads]).permute(&[0, 2, 1, 3]);
        let (q, k, v) = (split(rows.of(part(0))), split(part(1)), split(part(2)));
        // The scores are scaled, not the queries, which stay as the product wrote them.
        let scores = q.matmul(k.t()) * ((width / heads) as f64).sqrt().recip();
        let context = (scores + rows.mask(self.graph, length)).softmax().matmul(v);
        let joined = context.permute(&[0, 2, 1, 3]).reshape(&[batch, q.size(2), width]);
        let init = Init::Normal { std: self.output_std() };
        let weight = self.graph.param(&format!("{name}.out_proj.weight"), &[width, width], init);
        let bias = self.graph.param(&format!("{name}.out_proj.bias"), &[width], zero);
        joined.linear(weight, Some(bias))
    }

    /// Standard deviation of the weights that write to the residual stream: smaller, the more of them there are.
    fn output_std(&self) -> f64 {
        (self.width() * 2.0 * self.shape.layers as f64).sqrt().recip()
    }

    /// A linear map of the feed-forward layers, whose bias starts as PyTorch makes it: uniform by the fan-in.
    fn mlp_linear(&self, name: &str, x: Tensor<'g>, out: usize, std: f64) -> Tensor<'g> {
        let fan_in = x.size(-1);
        let weight = self.graph.param(&format!("{name}.weight"), &[out, fan_in], Init::Normal { std });
        let bound = (fan_in as f64).sqrt().recip();
        let bias = self.graph.param(&format!("{name}.bias"), &[out], Init::Uniform { bound });
        x.linear(weight, Some(bias))
    }

    fn layer_norm(&self, name: &str, x: Tensor<'g>) -> Tensor<'g> {
        let width = self.shape.width;
        let weight = self.graph.param(&format!("{name}.weight"), &[width], Init::Constant(1.0));
        let bias = self.graph.param(&format!("{name}.bias"), &[width], Init::Constant(0.0));
        x.layer_norm(weight, bias, self.config.layer_norm_eps)
    }
}
