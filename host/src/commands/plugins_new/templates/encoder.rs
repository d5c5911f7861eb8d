//! An encoder for clip-host: say here what yours computes, and where it was published.
//!
//! Square patches of the image become tokens by one linear map, each token goes through two more
//! with GELU between, and the image's features are the mean of its tokens.

use clip_host_plugin_api::prelude::*;

/// Settings of `my_encoder`: what a recipe's `config: (…)` may hold.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
pub struct MyEncoderConfig {
    /// Side of a patch in pixels; the images' sides are multiples of it.
    #[schemars(range(min = 1, max = 1024))]
    pub patch_size: usize,
    /// Width of the tokens, and length of a feature row.
    #[schemars(range(min = 1, max = 65536))]
    pub dim: usize,
    /// Width between the two linear maps of a token.
    #[schemars(range(min = 1, max = 65536))]
    pub hidden_dim: usize,
}

impl Default for MyEncoderConfig {
    fn default() -> Self {
        MyEncoderConfig {
            patch_size: 8,
            dim: 64,
            hidden_dim: 128,
        }
    }
}

/// The encoder.
pub struct MyEncoder;

impl Plugin for MyEncoder {
    type Config = MyEncoderConfig;
    const ID: &'static str = "my_encoder";
    const DOC: &'static str = "Patches through a small network each; features are their mean.";
}

impl Encoder for MyEncoder {
    /// Feature rows `[batch, dim]`. An encoder of texts reads `inputs.text()?` instead.
    fn build<'g>(
        config: &MyEncoderConfig,
        graph: &'g Graph,
        inputs: &EncoderInputs<'g>,
    ) -> Result<Tensor<'g>, BuildError> {
        let &MyEncoderConfig {
            patch_size,
            dim,
            hidden_dim,
        } = config;
        let images = inputs.images()?;
        let (height, width) = (images.size(2), images.size(3));
        if !height.is_multiple_of(patch_size) || !width.is_multiple_of(patch_size) {
            return Err(BuildError::new(format!(
                "my_encoder takes images whose sides are multiples of patch_size, {patch_size}; \
                 it got {height}x{width} (hint: change `data.image_size` or `patch_size`)"
            )));
        }
        // [batch, dim, rows, columns], then [batch, rows, columns, dim].
        let filters = &[dim, 3, patch_size, patch_size];
        let weight = graph.param("patch.weight", filters, Init::TruncatedNormal { std: 0.02 });
        let bias = graph.param("patch.bias", &[dim], Init::Constant(0.0));
        let patches = Conv {
            stride: [patch_size; 2],
            padding: [0; 2],
            dilation: [1; 2],
            groups: 1,
            layout: Layout::Nchw,
        };
        let tokens = images.conv2d(weight, patches).permute(&[0, 2, 3, 1]) + bias;
        let hidden = linear(graph, "fc1", tokens, hidden_dim).gelu();
        Ok(linear(graph, "fc2", hidden, dim).mean(&[1, 2], false))
    }
}

/// A linear map of the last axis, its parameters named and laid out as PyTorch has them.
fn linear<'g>(graph: &'g Graph, name: &str, x: Tensor<'g>, out: usize) -> Tensor<'g> {
    let shape = [out, x.size(-1)];
    let weight = graph.param(
        &format!("{name}.weight"),
        &shape,
        Init::Normal { std: 0.05 },
    );
    let bias = graph.param(&format!("{name}.bias"), &[out], Init::Constant(0.0));
    x.linear(weight, Some(bias))
}

export_plugin!(encoder, MyEncoder);

#[cfg(test)]
mod tests {
    use super::*;
    use clip_host_plugin_api::encoder::InputShape;
    use clip_host_plugin_api::testing::Harness;

    const CONFIG: MyEncoderConfig = MyEncoderConfig {
        patch_size: 4,
        dim: 6,
        hidden_dim: 8,
    };

    fn harness(batch: usize, input: InputShape) -> Result<Harness, BuildError> {
        Harness::encoder_with::<MyEncoder>(&CONFIG, batch, input, true)
    }

    #[test]
    fn a_batch_of_images_gives_as_many_rows() {
        for (batch, height, width) in [(1, 4, 4), (2, 8, 12), (5, 16, 16)] {
            let harness = harness(batch, InputShape::Image { height, width }).expect("they fit");
            let features = harness
                .fragment
                .output("features")
                .expect("an encoder has features");
            assert_eq!(
                harness.fragment.nodes[features as usize].shape,
                [batch, CONFIG.dim]
            );
        }
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let mut harness = harness(
            2,
            InputShape::Image {
                height: 8,
                width: 4,
            },
        )
        .expect("they fit");
        harness.fill(1);
        let leaves = [
            "images",
            "patch.weight",
            "fc1.weight",
            "fc1.bias",
            "fc2.weight",
        ];
        let error = harness
            .gradient_error("features", &leaves)
            .expect("it can be evaluated");
        assert!(error < 1e-5, "relative error {error:e}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refused = |input| {
            harness(1, input)
                .err()
                .expect("it does not fit")
                .to_string()
        };
        assert!(
            refused(InputShape::Image {
                height: 8,
                width: 10
            })
            .contains("8x10")
        );
        assert!(refused(InputShape::Text { length: 30 }).contains("reads images"));
    }
}
