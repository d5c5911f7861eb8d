//! Cross-entropy whose temperature follows the spread of the similarities.
//!
//! With S = image · textᵀ, before the loss of each batch
//!
//! ```text
//! τ ← clamp(τ·(1 + α·tanh(Var(S off the diagonal) − Var(S on the diagonal))), min_tau, max_tau)
//! ```
//!
//! with population variances, and the loss is the cross-entropy of S/τ from image to text. From "Comparative Analysis of
//! Loss Functions and Optimizers for CLIP Training". There τ is also handed to the optimizer; here only the rule moves it.

use clip_host_plugin_api::prelude::*;

/// Settings of the `dynamic_temperature` loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DynamicTemperatureConfig {
    /// Temperature before the first step.
    #[schemars(range(min = 0.0001, max = 10.0))]
    pub initial_tau: f64,
    /// Largest relative change of the temperature in one step, α.
    #[schemars(range(min = 0.0))]
    pub alpha: f64,
    /// Lowest temperature.
    #[schemars(range(min = 0.0001, max = 10.0))]
    pub min_tau: f64,
    /// Highest temperature.
    #[schemars(range(min = 0.0001, max = 10.0))]
    pub max_tau: f64,
    /// The mean of both directions, as in CLIP, instead of image to text only.
    pub symmetric: bool,
}

impl Default for DynamicTemperatureConfig {
    fn default() -> Self {
        DynamicTemperatureConfig { initial_tau: 0.05, alpha: 0.1, min_tau: 0.001, max_tau: 1.0, symmetric: false }
    }
}

/// The loss.
pub struct DynamicTemperature;

impl Plugin for DynamicTemperature {
    type Config = DynamicTemperatureConfig;
    const ID: &'static str = "dynamic_temperature";
    const DOC: &'static str = "Cross-entropy whose temperature grows while non-matching similarities spread more than \
        matching ones, and falls otherwise.";
}

impl Loss for DynamicTemperature {
    const HELD_CONSTANT: Option<&'static str> = Some("the temperature, which follows the spread of the similarities");

    fn build<'g>(
        config: &DynamicTemperatureConfig,
        graph: &'g Graph,
        inputs: &LossInputs<'g>,
    ) -> Result<Tensor<'g>, BuildError> {
        if inputs.batch < 2 {
            return Err(BuildError::new(
                "dynamic_temperature needs pairs that do not match: at least 2 samples a batch",
            ));
        }
        if !(config.initial_tau > 0.0 && config.min_tau > 0.0 && config.min_tau <= config.max_tau) {
            return Err(BuildError::new(format!(
                "dynamic_temperature takes initial_tau > 0 and 0 < min_tau <= max_tau; it got {}, {} and {}",
                config.initial_tau, config.min_tau, config.max_tau
            )));
        }
        let similarity = inputs.image_features.matmul(inputs.text_features.t());

        // The rule is no part of the loss: nothing flows back through the statistics.
        let matching = graph.eye(inputs.batch);
        let spread = variance(similarity.detach(), 1.0 - matching, (inputs.batch * (inputs.batch - 1)) as f64)
            - variance(similarity.detach(), matching, inputs.batch as f64);
        let state = graph.state("tau", &[], Init::Constant(config.initial_tau));
        let tau = (state * (spread.tanh() * config.alpha + 1.0)).clamp(config.min_tau, config.max_tau);
        graph.update(state, tau);
        graph.metric("temperature", tau);

        let logits = similarity / tau.detach();
        let image_to_text = logits.cross_entropy_diagonal();
        if !config.symmetric {
            return Ok(image_to_text);
        }
        Ok((image_to_text + logits.t().cross_entropy_diagonal()) * 0.5)
    }
}

/// Population variance of the `count` elements of `x` where `mask` is 1.
fn variance<'g>(x: Tensor<'g>, mask: Tensor<'g>, count: f64) -> Tensor<'g> {
    let mean = (x * mask).sum_all() / count;
    ((x - mean).square() * mask).sum_all() / count
}

#[cfg(feature = "export")]
export_plugin!(loss, DynamicTemperature);
