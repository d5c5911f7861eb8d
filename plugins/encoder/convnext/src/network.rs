//! The network: a stem of patches, four stages of depthwise convolutions and feed-forward layers, global average pool.
//!
//! Tensors between the convolutions are `[batch, height, width, channels]`, which the host keeps images in anyway.

use crate::{ConvNextConfig, Shape};
use clip_host_plugin_api::prelude::*;

/// Standard deviation of the initial weights. timm truncates them at ±2 (not at two deviations), which is never reached.
const WEIGHT: Init = Init::Normal { std: 0.02 };

/// Feature rows `[batch, dims[3]]` of images `[batch, channels, height, width]`; `config` has passed its check for them,
/// and `shape` is what it said.
pub fn forward<'g>(
    config: &ConvNextConfig,
    shape: Shape,
    graph: &'g Graph,
    images: Tensor<'g>,
    training: bool,
) -> Tensor<'g> {
    let net = Net { graph, config, training };
    let x = net.patches("stem.0", images.permute(&[0, 2, 3, 1]), shape.dims[0], config.patch_size);
    let mut x = net.layer_norm("stem.1", x);
    let last = shape.depths.iter().sum::<usize>() - 1;
    let mut index = 0;
    for (stage, (&depth, &dim)) in shape.depths.iter().zip(&shape.dims).enumerate() {
        if stage > 0 {
            let normalised = net.layer_norm(&format!("stages.{stage}.downsample.0"), x);
            x = net.patches(&format!("stages.{stage}.downsample.1"), normalised, dim, 2);
        }
        for block in 0..depth {
            let skip = config.drop_path_rate * index as f64 / last.max(1) as f64;
            x = net.block(&format!("stages.{stage}.blocks.{block}"), x, skip);
            index += 1;
        }
    }
    net.layer_norm("head.norm", x.mean(&[1, 2], false))
}

struct Net<'g, 'c> {
    graph: &'g Graph,
    config: &'c ConvNextConfig,
    training: bool,
}

impl<'g> Net<'g, '_> {
    /// One block: x plus a branch, which in training whole images leave out with probability `skip`.
    fn block(&self, name: &str, x: Tensor<'g>, skip: f64) -> Tensor<'g> {
        let (kernel, dim) = (self.config.kernel_size, x.size(-1));
        let conv =
            Conv { stride: [1; 2], padding: [kernel / 2; 2], dilation: [1; 2], groups: dim, layout: Layout::Nchw };
        let y = self.conv(&format!("{name}.conv_dw"), x, [dim, 1, kernel, kernel], conv);
        let y = self.layer_norm(&format!("{name}.norm"), y);
        let hidden = (dim as f64 * self.config.mlp_ratio) as usize;
        let y = self.linear(&format!("{name}.mlp.fc1"), y, hidden).gelu();
        let y = self.linear(&format!("{name}.mlp.fc2"), y, dim);
        let y = match self.config.ls_init_value {
            Some(start) => y * self.graph.param(&format!("{name}.gamma"), &[dim], Init::Constant(start)),
            None => y,
        };
        x + self.drop_path(y, skip)
    }

    /// A linear map of each square patch of `size` pixels a side, as a convolution.
    fn patches(&self, name: &str, x: Tensor<'g>, channels: usize, size: usize) -> Tensor<'g> {
        let conv = Conv { stride: [size; 2], padding: [0; 2], dilation: [1; 2], groups: 1, layout: Layout::Nchw };
        self.conv(name, x, [channels, x.size(-1), size, size], conv)
    }

    fn conv(&self, name: &str, x: Tensor<'g>, weight: [usize; 4], conv: Conv) -> Tensor<'g> {
        let channels = weight[0];
        let weight = self.graph.param(&format!("{name}.weight"), &weight, WEIGHT);
        let y = x.permute(&[0, 3, 1, 2]).conv2d(weight, conv).permute(&[0, 2, 3, 1]);
        match self.config.conv_bias {
            true => y + self.graph.param(&format!("{name}.bias"), &[channels], Init::Constant(0.0)),
            false => y,
        }
    }

    /// Leaves a branch out for whole images, with probability `rate`.
    fn drop_path(&self, branch: Tensor<'g>, rate: f64) -> Tensor<'g> {
        if !self.training || rate == 0.0 {
            return branch;
        }
        branch * self.graph.full(&[branch.size(0), 1, 1, 1], 1.0).dropout(rate)
    }

    fn linear(&self, name: &str, x: Tensor<'g>, out: usize) -> Tensor<'g> {
        let weight = self.graph.param(&format!("{name}.weight"), &[out, x.size(-1)], WEIGHT);
        let bias = self.graph.param(&format!("{name}.bias"), &[out], Init::Constant(0.0));
        x.linear(weight, Some(bias))
    }

    fn layer_norm(&self, name: &str, x: Tensor<'g>) -> Tensor<'g> {
        let dim = x.size(-1);
        let weight = self.graph.param(&format!("{name}.weight"), &[dim], Init::Constant(1.0));
        let bias = self.graph.param(&format!("{name}.bias"), &[dim], Init::Constant(0.0));
        x.layer_norm(weight, bias, self.config.norm_eps)
    }
}
