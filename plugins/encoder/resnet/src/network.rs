//! The network: stem, four stages of residual blocks, global average pool.

use crate::{Block, ResNetConfig, ResNetError, Stem};
use clip_host_plugin_api::prelude::*;

/// Feature rows `[batch, features]` of images `[batch, channels, height, width]`.
///
/// In training mode batch norm uses the batch's statistics and moves the running ones; else it uses those.
///
/// # Errors
/// A preset that contradicts the other settings; in training, a batch norm with a single value for each channel.
pub fn forward<'g>(
    config: &ResNetConfig,
    graph: &'g Graph,
    images: Tensor<'g>,
    training: bool,
) -> Result<Tensor<'g>, ResNetError> {
    let (block, layers) = config.shape()?;
    let net = Net { graph, config, training };
    let mut x = net.stem(images)?;
    for (stage, (&count, &width)) in layers.iter().zip(&config.channels).enumerate() {
        for index in 0..count {
            // A stage but the first halves the resolution in its first block.
            let stride = if stage > 0 && index == 0 { 2 } else { 1 };
            x = net.block(&format!("layer{}.{index}", stage + 1), block, x, width, stride)?;
        }
    }
    Ok(x.mean(&[2, 3], false))
}

/// How the weight of a batch norm starts.
#[derive(Clone, Copy, PartialEq)]
enum Gain {
    One,
    Zero,
}

struct Net<'g, 'c> {
    graph: &'g Graph,
    config: &'c ResNetConfig,
    training: bool,
}

impl<'g> Net<'g, '_> {
    fn stem(&self, images: Tensor<'g>) -> Result<Tensor<'g>, ResNetError> {
        let width = self.config.stem_width;
        let x = match self.config.stem {
            Stem::Plain7x7 => self.conv("conv1", images, width, 7, 2),
            Stem::Plain3x3 => self.conv("conv1", images, width, 3, 1),
            Stem::Deep => {
                let x = self.conv("conv1.0", images, width, 3, 2);
                let x = self.norm("conv1.1", x, Gain::One)?.relu();
                let x = self.conv("conv1.3", x, width, 3, 1);
                let x = self.norm("conv1.4", x, Gain::One)?.relu();
                self.conv("conv1.6", x, 2 * width, 3, 1)
            }
        };
        let x = self.norm("bn1", x, Gain::One)?.relu();
        if self.config.stem == Stem::Plain3x3 {
            return Ok(x);
        }
        Ok(x.max_pool2d(Pool {
            kernel: [3, 3],
            stride: [2, 2],
            padding: [1, 1],
            count_include_pad: false,
            layout: Layout::Nchw,
        }))
    }

    /// A residual block: relu(branch(x) + shortcut(x)).
    fn block(
        &self,
        name: &str,
        block: Block,
        x: Tensor<'g>,
        width: usize,
        stride: usize,
    ) -> Result<Tensor<'g>, ResNetError> {
        let conv =
            |part: &str, x, channels, kernel, stride| self.conv(&format!("{name}.{part}"), x, channels, kernel, stride);
        let norm = |part: &str, x, gain| self.norm(&format!("{name}.{part}"), x, gain);
        let last = if self.config.zero_init_last { Gain::Zero } else { Gain::One };
        let out = width * block.expansion();
        let branch = match block {
            Block::Basic => {
                let y = norm("bn1", conv("conv1", x, width, 3, stride), Gain::One)?.relu();
                norm("bn2", conv("conv2", y, out, 3, 1), last)?
            }
            Block::Bottleneck => {
                let y = norm("bn1", conv("conv1", x, width, 1, 1), Gain::One)?.relu();
                // The stride is on the 3x3 convolution ("ResNet v1.5"), as in torchvision and timm.
                let y = norm("bn2", conv("conv2", y, width, 3, stride), Gain::One)?.relu();
                norm("bn3", conv("conv3", y, out, 1, 1), last)?
            }
        };
        let shortcut = if stride != 1 || x.size(1) != out {
            norm("downsample.1", conv("downsample.0", x, out, 1, stride), Gain::One)?
        } else {
            x
        };
        Ok((branch + shortcut).relu())
    }

    /// A square convolution without bias whose padding keeps the size at stride 1; Kaiming-normal by the fan-out
    /// (He et al. 2015).
    fn conv(&self, name: &str, x: Tensor<'g>, channels: usize, kernel: usize, stride: usize) -> Tensor<'g> {
        let std = (2.0 / (channels * kernel * kernel) as f64).sqrt();
        let shape = [channels, x.size(1), kernel, kernel];
        let weight = self.graph.param(&format!("{name}.weight"), &shape, Init::Normal { std });
        x.conv2d(
            weight,
            Conv {
                stride: [stride, stride],
                padding: [kernel / 2, kernel / 2],
                dilation: [1, 1],
                groups: 1,
                layout: Layout::Nchw,
            },
        )
    }

    /// Batch norm with running statistics, as `torch.nn.BatchNorm2d`.
    fn norm(&self, name: &str, x: Tensor<'g>, gain: Gain) -> Result<Tensor<'g>, ResNetError> {
        let (graph, channels) = (self.graph, x.size(1));
        let start = if gain == Gain::Zero { 0.0 } else { 1.0 };
        let weight = graph.param(&format!("{name}.weight"), &[channels], Init::Constant(start));
        let bias = graph.param(&format!("{name}.bias"), &[channels], Init::Constant(0.0));
        let running_mean = graph.state(&format!("{name}.running_mean"), &[channels], Init::Constant(0.0));
        let running_var = graph.state(&format!("{name}.running_var"), &[channels], Init::Constant(1.0));
        // A float, exact up to 2^24 steps: states are f32.
        let batches = graph.state(&format!("{name}.num_batches_tracked"), &[], Init::Constant(0.0));
        let per_channel = |vector: Tensor<'g>| vector.reshape(&[1, channels, 1, 1]);

        if !self.training {
            let scale = (running_var + self.config.bn_eps).sqrt().recip() * weight;
            return Ok((x - per_channel(running_mean)) * per_channel(scale) + per_channel(bias));
        }

        let count = x.size(0) * x.size(2) * x.size(3);
        if count < 2 {
            return Err(ResNetError::TooFewValues { name: name.into(), got: count });
        }
        // Written as batch norm itself is defined, so that the host computes the statistics once for both.
        let axes = [0, 2, 3];
        let mean = x.mean(&axes, true);
        let variance = (x - mean).square().mean(&axes, true);
        let momentum = self.config.bn_momentum;
        let moved = |running: Tensor<'g>, new: Tensor<'g>| {
            running * (1.0 - momentum) + new.detach().reshape(&[channels]) * momentum
        };
        graph.update(running_mean, moved(running_mean, mean));
        // The running variance is the unbiased one, the variance that normalises is not.
        let unbiased = count as f64 / (count - 1) as f64;
        graph.update(running_var, moved(running_var, variance * unbiased));
        graph.update(batches, batches + 1.0);
        Ok(x.batch_norm(weight, bias, self.config.bn_eps))
    }
}
