//! A loss for clip-host: say here what yours computes, and where it was published.
//!
//! With S = image · textᵀ and a temperature τ, this one is the cross-entropy of S/τ over its rows
//! (which text belongs to this image?) and over its columns (which image belongs to this text?).

use clip_host_plugin_api::prelude::*;

/// Settings of `my_loss`: what a recipe's `config: (…)` may hold.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
pub struct MyLossConfig {
    /// Divides the similarities.
    #[schemars(range(min = 0.001, max = 1.0))]
    pub temperature: f64,
    /// Weight of the direction from texts to images; the other direction has the rest.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub text_weight: f64,
}

impl Default for MyLossConfig {
    fn default() -> Self {
        MyLossConfig {
            temperature: 0.07,
            text_weight: 0.5,
        }
    }
}

/// The loss.
pub struct MyLoss;

impl Plugin for MyLoss {
    type Config = MyLossConfig;
    const ID: &'static str = "my_loss";
    const DOC: &'static str =
        "Cross-entropy between images and texts, its two directions weighted.";
}

impl Loss for MyLoss {
    /// The formula; gradients come from the host.
    fn build<'g>(
        config: &MyLossConfig,
        graph: &'g Graph,
        inputs: &LossInputs<'g>,
    ) -> Result<Tensor<'g>, BuildError> {
        // Rows are images, columns are texts; the diagonal holds the pairs.
        let similarity = inputs.image_features.matmul(inputs.text_features.t());
        graph.metric("similarity", similarity.diagonal().mean_all());
        let logits = similarity / config.temperature;
        let from_image = logits.cross_entropy_diagonal();
        let from_text = logits.t().cross_entropy_diagonal();
        Ok(from_image * (1.0 - config.text_weight) + from_text * config.text_weight)
    }
}

export_plugin!(loss, MyLoss);

#[cfg(test)]
mod tests {
    use super::*;
    use clip_host_plugin_api::testing::Harness;

    /// A batch of 3 pairs with 4 features each, out of 10 pairs.
    fn harness(config: &MyLossConfig) -> Harness {
        let mut harness = Harness::loss::<MyLoss>(config, 3, 4, 10).expect("the settings are good");
        harness.fill(1);
        harness
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        for text_weight in [0.0, 0.3, 1.0] {
            let harness = harness(&MyLossConfig {
                text_weight,
                ..Default::default()
            });
            let error = harness.gradient_error("loss", &["image_features", "text_features"]);
            let error = error.expect("the formula can be evaluated");
            assert!(error < 1e-5, "relative error {error:e} at {text_weight}");
        }
    }

    #[test]
    fn a_batch_that_cannot_be_told_apart_costs_ln_3() {
        let mut harness = harness(&MyLossConfig::default());
        harness
            .set("image_features", [0.5; 12])
            .set("text_features", [0.5; 12]);
        let step = harness
            .step(None, &[])
            .expect("the formula can be evaluated");
        assert!((step.outputs["loss"][0] - 3f64.ln()).abs() < 1e-12);
    }
}
