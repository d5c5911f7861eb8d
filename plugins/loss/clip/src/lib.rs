//! CLIP's symmetric cross-entropy between images and texts, with the four ways in which its temperature is kept.
//!
//! With S = image · textᵀ and a temperature τ, the loss is the mean of the cross-entropies of S/τ over its rows (which
//! text belongs to this image?) and over its columns (which image belongs to this text?).
//!
//! Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
//! arXiv:2103.00020.

use clip_host_plugin_api::prelude::*;

/// How the temperature is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A constant: `temperature`.
    #[default]
    Fixed,
    /// One parameter `temperature` that divides the similarities, kept within
    /// `min_temperature..=max_temperature`.
    Learnable,
    /// OpenAI's form: one parameter `logit_scale` whose exponential multiplies the similarities, kept within
    /// 0..=ln `max_logit_scale`. It starts at ln(1 / `temperature`).
    LogitScale,
    /// One parameter for each image and each text: the tables `image_tau` and `text_tau`, kept within
    /// `min_temperature..=max_temperature`.
    Personalized,
}

/// Settings of the `clip` loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ClipConfig {
    /// How the temperature is kept.
    pub mode: Mode,
    /// The temperature, where it is learnt its start. OpenAI's start is 0.07.
    #[schemars(range(min = 0.0001, max = 10.0))]
    pub temperature: f64,
    /// Lowest learnable temperature.
    #[schemars(range(min = 0.0001, max = 10.0))]
    pub min_temperature: f64,
    /// Highest learnable temperature.
    #[schemars(range(min = 0.0001, max = 10.0))]
    pub max_temperature: f64,
    /// Largest factor in mode `logit_scale`.
    #[schemars(range(min = 1.0, max = 10000.0))]
    pub max_logit_scale: f64,
}

impl Default for ClipConfig {
    fn default() -> Self {
        ClipConfig {
            mode: Mode::Fixed,
            temperature: 0.07,
            min_temperature: 0.001,
            max_temperature: 0.5,
            max_logit_scale: 100.0,
        }
    }
}

/// The loss.
pub struct Clip;

impl Plugin for Clip {
    type Config = ClipConfig;
    const ID: &'static str = "clip";
    const DOC: &'static str = "Symmetric cross-entropy of image and text similarities over a fixed, learnable or \
        per-sample temperature (Radford et al. 2021, arXiv:2103.00020).";
}

impl Loss for Clip {
    fn build<'g>(config: &ClipConfig, graph: &'g Graph, inputs: &LossInputs<'g>) -> Result<Tensor<'g>, BuildError> {
        let (low, high) = (config.min_temperature, config.max_temperature);
        if !(config.temperature > 0.0 && low > 0.0 && low <= high && config.max_logit_scale >= 1.0) {
            return Err(BuildError::new(format!(
                "clip takes a temperature above 0, 0 < min_temperature <= max_temperature and max_logit_scale >= 1; \
                 it got {}, {low}, {high} and {}",
                config.temperature, config.max_logit_scale
            )));
        }
        let similarity = inputs.image_features.matmul(inputs.text_features.t());
        // Rows of `by_image` are images, rows of `by_text` are texts.
        let (by_image, by_text, temperature) = match config.mode {
            Mode::Fixed => {
                let logits = similarity / config.temperature;
                (logits, logits.t(), graph.scalar(config.temperature))
            }
            Mode::Learnable => {
                let tau = graph.param("temperature", &[], Init::Constant(config.temperature));
                let tau = graph.project(tau, |tau| tau.clamp(low, high));
                let logits = similarity / tau;
                (logits, logits.t(), tau)
            }
            Mode::LogitScale => {
                let t = graph.param("logit_scale", &[], Init::Constant(-config.temperature.ln()));
                let scale = graph.project(t, |t| t.clamp(0.0, config.max_logit_scale.ln())).exp();
                graph.metric("logit_scale", scale);
                let logits = similarity * scale;
                (logits, logits.t(), scale.recip())
            }
            Mode::Personalized => {
                let table = |name: &str| {
                    let table = graph.param(name, &[inputs.dataset_size], Init::Constant(config.temperature));
                    graph.project(table, |tau| tau.clamp(low, high))
                };
                let image_tau = table("image_tau").gather(inputs.image_ids);
                let text_tau = table("text_tau").gather(inputs.text_ids);
                // The temperature is that of the column, not of the row: so it was published in code.
                let mean = (image_tau.mean_all() + text_tau.mean_all()) * 0.5;
                (similarity / image_tau, similarity.t() / text_tau, mean)
            }
        };
        graph.metric("temperature", temperature);
        Ok((by_image.cross_entropy_diagonal() + by_text.cross_entropy_diagonal()) * 0.5)
    }
}

#[cfg(feature = "export")]
export_plugin!(loss, Clip);
