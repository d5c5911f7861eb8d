//! The network: embeddings, then layers of attention and feed-forward with layer norm after each, then pooling.

use crate::{Activation, BertConfig, Pooling, Shape};
use clip_host_plugin_api::prelude::*;

/// Added to the scores of padding. Finite, so that a row of nothing but padding stays finite; large enough that in any
/// other row the probability is exactly 0 in f32 and bf16.
const MASKED: f64 = -1e9;

/// Feature rows `[batch, hidden_size]` of token ids and mask, both `[batch, length]`; `config` has passed its check, and
/// `shape` is what it said.
///
/// Names the hidden states `[batch, length, hidden_size]` as output `last_hidden_state`, and the pooler's as
/// `pooler_output`, except when training without [`Pooling::Mean`]: nothing but position 0 reaches the loss then, and the
/// last layer is computed for it alone.
pub fn forward<'g>(
    config: &BertConfig,
    shape: Shape,
    graph: &'g Graph,
    input_ids: Tensor<'g>,
    attention_mask: Tensor<'g>,
    training: bool,
) -> Tensor<'g> {
    let (batch, length) = (input_ids.size(0), input_ids.size(1));
    let net = Net {
        graph,
        config,
        shape,
        mask: ((1.0 - attention_mask) * MASKED).reshape(&[batch, 1, 1, length]),
        dropout: if training { config.hidden_dropout_prob } else { 0.0 },
        attention_dropout: if training { config.attention_probs_dropout_prob } else { 0.0 },
    };
    let first_only = training && config.pooling != Pooling::Mean;
    let mut x = net.embeddings(input_ids);
    for layer in 0..shape.num_hidden_layers {
        let queries = if first_only && layer + 1 == shape.num_hidden_layers { x.slice(1, 0, 1) } else { x };
        x = net.layer(&format!("encoder.layer.{layer}"), x, queries);
    }
    if !first_only {
        graph.output("last_hidden_state", x);
    }
    let first = || x.slice(1, 0, 1).reshape(&[batch, shape.hidden_size]);
    match config.pooling {
        Pooling::Pooler => {
            let pooled = net.linear("pooler.dense", first(), shape.hidden_size).tanh();
            if !first_only {
                graph.output("pooler_output", pooled);
            }
            pooled
        }
        Pooling::Cls => first(),
        Pooling::Mean => {
            let tokens = attention_mask.sum(&[1], true).maximum(1.0);
            (x * attention_mask.unsqueeze(-1)).sum(&[1], false) / tokens
        }
    }
}

struct Net<'g, 'c> {
    graph: &'g Graph,
    config: &'c BertConfig,
    shape: Shape,
    /// Added to the attention scores, `[batch, 1, 1, length]`.
    mask: Tensor<'g>,
    dropout: f64,
    attention_dropout: f64,
}

impl<'g> Net<'g, '_> {
    fn embeddings(&self, input_ids: Tensor<'g>) -> Tensor<'g> {
        let config = self.config;
        let table = |name: &str, rows| {
            let init = Init::Normal { std: config.initializer_range };
            self.graph.param(&format!("embeddings.{name}.weight"), &[rows, self.shape.hidden_size], init)
        };
        let words = table("word_embeddings", config.vocab_size).gather(input_ids);
        // The row of the padding token gets no gradient (`padding_idx` in PyTorch).
        let padding = input_ids.cast(DType::F32).eq(config.pad_token_id as f64).unsqueeze(-1);
        let words = padding.where_(words.detach(), words);
        let positions = table("position_embeddings", config.max_position_embeddings).slice(0, 0, input_ids.size(1));
        let types = table("token_type_embeddings", config.type_vocab_size).slice(0, 0, 1);
        self.layer_norm("embeddings.LayerNorm", words + (positions + types)).dropout(self.dropout)
    }

    /// One layer over `x` for the positions in `queries`: all of them (`x` itself) or a part.
    fn layer(&self, name: &str, x: Tensor<'g>, queries: Tensor<'g>) -> Tensor<'g> {
        let attended = self.attention(&format!("{name}.attention"), x, queries).dropout(self.dropout);
        let x = self.layer_norm(&format!("{name}.attention.output.LayerNorm"), attended + queries);
        let inner = self.linear(&format!("{name}.intermediate.dense"), x, self.shape.intermediate_size);
        let inner = match self.config.hidden_act {
            Activation::Gelu => inner.gelu(),
            Activation::Relu => inner.relu(),
        };
        let y = self.linear(&format!("{name}.output.dense"), inner, self.shape.hidden_size).dropout(self.dropout);
        self.layer_norm(&format!("{name}.output.LayerNorm"), y + x)
    }

    /// Multi-head attention (Vaswani et al. 2017) from `queries` to `x`, with dropout on the probabilities.
    fn attention(&self, name: &str, x: Tensor<'g>, queries: Tensor<'g>) -> Tensor<'g> {
        let (dim, heads) = (self.shape.hidden_size, self.shape.num_attention_heads);
        let project = |part: &str, x: Tensor<'g>| {
            let split = [x.size(0), x.size(1), heads, dim / heads];
            self.linear(&format!("{name}.self.{part}"), x, dim).reshape(&split).permute(&[0, 2, 1, 3])
        };
        let (q, k, v) = (project("query", queries), project("key", x), project("value", x));
        let scores = (q * ((dim / heads) as f64).sqrt().recip()).matmul(k.t()) + self.mask;
        let context = scores.softmax().dropout(self.attention_dropout).matmul(v);
        let joined = context.permute(&[0, 2, 1, 3]).reshape(&queries.shape());
        self.linear(&format!("{name}.output.dense"), joined, dim)
    }

    fn linear(&self, name: &str, x: Tensor<'g>, out: usize) -> Tensor<'g> {
        let init = Init::Normal { std: self.config.initializer_range };
        let weight = self.graph.param(&format!("{name}.weight"), &[out, x.size(-1)], init);
        let bias = self.graph.param(&format!("{name}.bias"), &[out], Init::Constant(0.0));
        x.linear(weight, Some(bias))
    }

    fn layer_norm(&self, name: &str, x: Tensor<'g>) -> Tensor<'g> {
        let dim = self.shape.hidden_size;
        let weight = self.graph.param(&format!("{name}.weight"), &[dim], Init::Constant(1.0));
        let bias = self.graph.param(&format!("{name}.bias"), &[dim], Init::Constant(0.0));
        x.layer_norm(weight, bias, self.config.layer_norm_eps)
    }
}
