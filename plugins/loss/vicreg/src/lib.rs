//! VICReg: no negatives, but embeddings that vary, do not repeat themselves and agree between images and texts.
//!
//! With X and Y the embeddings of images and texts before normalisation, `[B, D]`, and C = cov(X) with divisor B − 1:
//!
//! ```text
//! invariance  mean over all elements of (X − Y)²
//! variance    ½·mean_d max(0, std_target − √(C_dd + std_eps))      and the same for Y
//! covariance  1/D·Σ_{d≠e} C_de²                                    and the same for Y
//! loss = sim_coeff·invariance + std_coeff·variance + cov_coeff·covariance
//! ```
//!
//! Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022,
//! arXiv:2105.04906.

use clip_host_plugin_api::prelude::*;

/// Settings of the `vicreg` loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct VicRegConfig {
    /// Weight of the distance between an image and its text.
    #[schemars(range(min = 0.0))]
    pub sim_coeff: f64,
    /// Weight of the hinge on each dimension's standard deviation.
    #[schemars(range(min = 0.0))]
    pub std_coeff: f64,
    /// Weight of the covariances between dimensions.
    #[schemars(range(min = 0.0))]
    pub cov_coeff: f64,
    /// Standard deviation from which on a dimension costs nothing.
    #[schemars(range(min = 0.0))]
    pub std_target: f64,
    /// Added to variances below the root, whose slope is infinite at 0.
    #[schemars(range(min = 1e-12, max = 1.0))]
    pub std_eps: f64,
}

impl Default for VicRegConfig {
    fn default() -> Self {
        VicRegConfig { sim_coeff: 25.0, std_coeff: 25.0, cov_coeff: 1.0, std_target: 1.0, std_eps: 1e-4 }
    }
}

/// The loss.
pub struct VicReg;

impl Plugin for VicReg {
    type Config = VicRegConfig;
    const ID: &'static str = "vicreg";
    const DOC: &'static str = "Invariance, variance and covariance of embeddings before normalisation, without negatives \
        (VICReg, Bardes et al. 2022, arXiv:2105.04906).";
}

impl Loss for VicReg {
    fn build<'g>(config: &VicRegConfig, graph: &'g Graph, inputs: &LossInputs<'g>) -> Result<Tensor<'g>, BuildError> {
        if inputs.batch < 2 {
            return Err(BuildError::new(
                "vicreg takes variances over the batch: it needs at least 2 samples, it got 1",
            ));
        }
        let (images, texts) = (inputs.image_embeddings, inputs.text_embeddings);
        let (others, width) = ((inputs.batch - 1) as f64, inputs.embed_dim as f64);
        let invariance = (images - texts).square().mean_all();
        // Rows with mean 0 from here on.
        let [images, texts] = [images, texts].map(|x| x - x.mean(&[0], true));
        let hinge = |x: Tensor<'g>| {
            let std = (x.square().sum(&[0], false) / others + config.std_eps).sqrt();
            (config.std_target - std).relu().mean_all() * 0.5
        };
        let off_diagonal = |x: Tensor<'g>| {
            let covariance = x.t().matmul(x) / others;
            graph.eye(inputs.embed_dim).where_(0.0, covariance).square().sum_all() / width
        };
        let variance = hinge(images) + hinge(texts);
        let covariance = off_diagonal(images) + off_diagonal(texts);
        graph.metric("invariance", invariance);
        graph.metric("variance", variance);
        graph.metric("covariance", covariance);
        Ok(invariance * config.sim_coeff + variance * config.std_coeff + covariance * config.cov_coeff)
    }
}

#[cfg(feature = "export")]
export_plugin!(loss, VicReg);
