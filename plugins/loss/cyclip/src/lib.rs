//! CyCLIP: CLIP's loss + λ₁·‖I·Iᵀ − T·Tᵀ‖²/B + λ₂·‖S − Sᵀ‖²/B, with S = I·Tᵀ and B the batch's size: images lie to each
//! other as their texts do, and an image to a text as that text's image to that image's text. The temperature divides S
//! in CLIP's loss only. Goel et al., "CyCLIP: Cyclic Contrastive Language-Image Pretraining", 2022, arXiv:2205.14459.

use clip_host_plugin_api::prelude::*;

/// Settings of the `cyclip` loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CyClipConfig {
    /// The temperature, where it is learnt its start.
    #[schemars(range(min = 0.0001, max = 10.0))]
    pub temperature: f64,
    /// Whether the temperature is a parameter.
    pub learnable: bool,
    /// Lowest and highest learnable temperature.
    #[schemars(inner(range(min = 0.0001, max = 10.0)))]
    pub temperature_limits: [f64; 2],
    /// Weight λ₁ of the term within images and within texts.
    #[schemars(range(min = 0.0))]
    pub lambda_1: f64,
    /// Weight λ₂ of the term between images and texts.
    #[schemars(range(min = 0.0))]
    pub lambda_2: f64,
}

impl Default for CyClipConfig {
    fn default() -> Self {
        Self { temperature: 0.07, learnable: false, temperature_limits: [0.001, 0.5], lambda_1: 0.25, lambda_2: 0.25 }
    }
}

/// The loss.
pub struct CyClip;

impl Plugin for CyClip {
    type Config = CyClipConfig;
    const ID: &'static str = "cyclip";
    const DOC: &'static str = "CLIP's loss with cyclic consistency (Goel et al. 2022, arXiv:2205.14459).";
}

impl Loss for CyClip {
    fn build<'g>(config: &CyClipConfig, graph: &'g Graph, inputs: &LossInputs<'g>) -> Result<Tensor<'g>, BuildError> {
        let (images, texts) = (inputs.image_features, inputs.text_features);
        let [low, high] = config.temperature_limits;
        let learnt =
            |start| graph.project(graph.param("temperature", &[], Init::Constant(start)), |t| t.clamp(low, high));
        let tau = if config.learnable { learnt(config.temperature) } else { graph.scalar(config.temperature) };
        graph.metric("temperature", tau);
        let similarity = images.matmul(texts.t());
        let clip = (similarity / tau).cross_entropy_diagonal() + (similarity.t() / tau).cross_entropy_diagonal();
        let apart = |a: Tensor<'g>, b: Tensor<'g>| (a - b).square().sum_all() / inputs.batch as f64;
        let within = apart(images.matmul(images.t()), texts.matmul(texts.t()));
        Ok(clip * 0.5 + within * config.lambda_1 + apart(similarity, similarity.t()) * config.lambda_2)
    }
}

#[cfg(feature = "export")]
export_plugin!(loss, CyClip);
