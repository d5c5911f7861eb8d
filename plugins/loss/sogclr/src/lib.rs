//! SogCLR: a contrastive loss that compares each sample with the whole data set, at one temperature.
//!
//! Moving averages of the softmax denominators are kept for every image and every text. For images (for texts the same
//! with the similarities transposed), with S = image · textᵀ, B the batch's size and s, b the old tables at its ids:
//!
//! ```text
//! d_ij = S_ij − S_ii, or its surrogate max(0, S_ij − S_ii + c)²;  h = d/τ
//! b ← max(b, max_j h_ij)                       keeps the exponentials below 1
//! e_ij = exp(h_ij − b), e_ii = 0;  g = Σ_j e_ij / (B − 1)
//! s ← g in epoch 0, later (1 − γ)·s·exp(b_old − b) + γ·g
//! loss = mean_i Σ_j e_ij/(s + ε)·d_ij / (B − 1), where no gradient flows through e and s
//! ```
//!
//! Yuan et al., "Provable Stochastic Optimization for Global Contrastive Learning: Small Batch Does Not Harm
//! Performance", ICML 2022, arXiv:2202.12387. The defaults are those of the published two-modal code.

use clip_host_plugin_api::global::Denominators;
use clip_host_plugin_api::prelude::*;

/// What stands for the difference between a pair that does not match and one that does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Surrogate {
    /// The difference itself.
    #[default]
    None,
    /// max(0, difference + `margin`)².
    SquaredHinge,
}

/// Settings of the `sogclr` loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SogClrConfig {
    /// Weight of the newest batch in the moving averages, γ.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub gamma: f64,
    /// Divides the differences, τ.
    #[schemars(range(min = 0.0001, max = 10.0))]
    pub temperature: f64,
    /// Added to the divisor of the weights, ε.
    #[schemars(range(min = 1e-30, max = 0.001))]
    pub eps: f64,
    /// What stands for the differences of similarities.
    pub surrogate: Surrogate,
    /// Margin c of the squared hinge.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub margin: f64,
}

impl Default for SogClrConfig {
    fn default() -> Self {
        SogClrConfig { gamma: 0.8, temperature: 0.01, eps: 1e-8, surrogate: Surrogate::None, margin: 1.0 }
    }
}

/// The loss.
pub struct SogClr;

impl Plugin for SogClr {
    type Config = SogClrConfig;
    const ID: &'static str = "sogclr";
    const DOC: &'static str = "Global contrastive loss with moving averages of every sample's softmax denominator \
        (SogCLR, Yuan et al. 2022, arXiv:2202.12387).";
}

impl Loss for SogClr {
    const HELD_CONSTANT: Option<&'static str> = Some("the weights of the pairs, which come from the moving averages");

    fn build<'g>(config: &SogClrConfig, graph: &'g Graph, inputs: &LossInputs<'g>) -> Result<Tensor<'g>, BuildError> {
        if inputs.batch < 2 {
            return Err(BuildError::new(format!(
                "sogclr compares samples of a batch with each other: it needs at least 2, it got {}",
                inputs.batch
            )));
        }
        let similarity = inputs.image_features.matmul(inputs.text_features.t());
        // One side's part; row i of `similarity` belongs to the i-th id.
        let side = |suffix: &str, ids: Tensor<'g>, similarity: Tensor<'g>| {
            let others = (inputs.batch - 1) as f64;
            let difference = similarity - similarity.diagonal().unsqueeze(-1);
            let difference = match config.surrogate {
                Surrogate::None => difference,
                Surrogate::SquaredHinge => (difference + config.margin).relu().square(),
            };
            let h = difference.detach() / config.temperature;
            let exponentials = Denominators::new(graph, inputs, suffix, ids).update(h, config.gamma, others);
            let weights = exponentials.values / (exponentials.average.sum + config.eps).unsqueeze(-1);
            (weights * difference).sum(&[-1], false).mean_all() / others
        };
        Ok(side("I", inputs.image_ids, similarity) + side("T", inputs.text_ids, similarity.t()))
    }
}

#[cfg(feature = "export")]
export_plugin!(loss, SogClr);
