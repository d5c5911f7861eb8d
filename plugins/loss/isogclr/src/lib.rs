//! iSogCLR: a global contrastive loss in which every image and every text has its own temperature.
//!
//! The loss of a sample compares it with the whole data set, not with the batch only: moving averages of the softmax
//! denominators are kept for every sample (SogCLR), and so are temperatures, which follow their own gradient.
//!
//! For images (for texts the same with the similarities transposed), with the old tables s, b, u, τ at the batch's ids,
//! B the batch's size and d_ij = S_ij − S_ii, h = d/τ:
//!
//! ```text
//! b ← max(b, max_j h_ij)                       keeps the exponentials below 1
//! e_ij = exp(h_ij − b), e_ii = 0;  g = Σ_j e_ij
//! s ← g in epoch 0, later (1 − γ)·s·exp(b_old − b) + γ·g
//! w = e / max(s, ε)                             a constant: no gradient flows
//! loss = mean_i Σ_j w_ij·d_ij
//! G = clip(ln(s / (B − 1)) + b + ρ − Σ_j w_ij·h_ij, ±grad_clip)
//! u ← (1 − β)·u + β·G;  τ ← clamp(τ − η·u, tau_min, tau_max)
//! ```
//!
//! With `network` the temperatures come from a network over the features instead of the tables u and τ; see [`network`].
//!
//! Qiu et al., "Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic Temperature
//! Individualization", ICML 2023, arXiv:2305.11965; the estimator is SogCLR's, Yuan et al., ICML 2022,
//! arXiv:2202.12387. The defaults are those of the published code, whose η is smaller than the paper's and whose G is
//! clipped.

pub mod network;

use clip_host_plugin_api::global::{Denominators, SampleTable};
use clip_host_plugin_api::prelude::*;
use network::NetworkConfig;

/// Settings of the `isogclr` loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct IsogClrConfig {
    /// Weight of the newest batch in the moving averages, γ.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub gamma: f64,
    /// Pull of the images' temperatures towards smaller values, ρ: the radius of the robust loss.
    #[schemars(range(min = 0.0))]
    pub rho_image: f64,
    /// Pull of the texts' temperatures towards smaller values, ρ: the radius of the robust loss.
    #[schemars(range(min = 0.0))]
    pub rho_text: f64,
    /// Temperature of a sample that was never seen.
    #[schemars(range(min = 0.0001, max = 1.0))]
    pub tau_init: f64,
    /// Learning rate of the temperatures, η.
    #[schemars(range(min = 0.0))]
    pub eta: f64,
    /// Weight of the newest gradient in the temperatures' momentum, β.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub beta_u: f64,
    /// Limit of a temperature's gradient on both sides; 0: no limit, as in the paper.
    #[schemars(range(min = 0.0))]
    pub grad_clip: f64,
    /// Lowest temperature.
    #[schemars(range(min = 0.0001, max = 1.0))]
    pub tau_min: f64,
    /// Highest temperature.
    #[schemars(range(min = 0.0001, max = 1.0))]
    pub tau_max: f64,
    /// Lowest divisor of the weights, ε.
    #[schemars(range(min = 1e-30, max = 0.001))]
    pub eps: f64,
    /// Temperatures from a network between `tau_min` and `tau_max` instead of a table: `tau_init`, `eta`, `beta_u` and
    /// `grad_clip` then do nothing.
    pub network: Option<NetworkConfig>,
}

impl Default for IsogClrConfig {
    fn default() -> Self {
        IsogClrConfig {
            gamma: 0.8,
            rho_image: 8.0,
            rho_text: 8.0,
            tau_init: 0.01,
            eta: 1e-5,
            beta_u: 0.5,
            grad_clip: 5.0,
            tau_min: 0.005,
            tau_max: 0.05,
            eps: 1e-14,
            network: None,
        }
    }
}

/// The loss.
pub struct IsogClr;

impl Plugin for IsogClr {
    type Config = IsogClrConfig;
    const ID: &'static str = "isogclr";
    const DOC: &'static str = "Global contrastive loss with one temperature for each image and each text \
        (iSogCLR, Qiu et al. 2023, arXiv:2305.11965).";
}

impl Loss for IsogClr {
    const HELD_CONSTANT: Option<&'static str> =
        Some("the weights of the pairs and the temperatures, which follow a gradient of their own");

    fn build<'g>(config: &IsogClrConfig, graph: &'g Graph, inputs: &LossInputs<'g>) -> Result<Tensor<'g>, BuildError> {
        if inputs.batch < 2 {
            return Err(BuildError::new("isogclr compares samples of a batch with each other: it needs at least 2"));
        }
        if !(config.tau_init > 0.0 && config.tau_min > 0.0 && config.tau_min <= config.tau_max) {
            return Err(BuildError::new(format!(
                "isogclr takes tau_init > 0 and 0 < tau_min <= tau_max; it got {}, {} and {}",
                config.tau_init, config.tau_min, config.tau_max
            )));
        }
        let similarity = inputs.image_features.matmul(inputs.text_features.t());
        let side = |letter, name, ids, features, rho| Side { letter, name, ids, features, rho };
        let images = side("I", "image", inputs.image_ids, inputs.image_features, config.rho_image);
        let texts = side("T", "text", inputs.text_ids, inputs.text_features, config.rho_text);
        Ok(images.loss(config, graph, inputs, similarity) + texts.loss(config, graph, inputs, similarity.t()))
    }
}

/// Where the temperatures of a side come from.
enum Source<'g> {
    /// One number for each sample, and its momentum.
    Tables { tau: SampleTable<'g>, u: SampleTable<'g> },
    /// A network's answers for the batch.
    Network(Tensor<'g>),
}

/// What images and texts differ in.
struct Side<'g> {
    /// Ends the names of the tables.
    letter: &'static str,
    /// Begins the names of the metrics and of the network's parameters.
    name: &'static str,
    ids: Tensor<'g>,
    features: Tensor<'g>,
    rho: f64,
}

impl<'g> Side<'g> {
    /// One side's part of the loss; row i of `similarity` belongs to sample i.
    fn loss(
        &self,
        config: &IsogClrConfig,
        graph: &'g Graph,
        inputs: &LossInputs<'g>,
        similarity: Tensor<'g>,
    ) -> Tensor<'g> {
        let table = |name: &str, start: f64| {
            SampleTable::new(graph, inputs, &format!("{name}_{}", self.letter), self.ids, start)
        };
        let source = match &config.network {
            Some(network) => {
                Source::Network(network.temperatures(graph, self.name, self.features, [config.tau_min, config.tau_max]))
            }
            None => Source::Tables { tau: table("tau", config.tau_init), u: table("u", 0.0) },
        };
        let tau = match source {
            Source::Network(tau) => tau,
            Source::Tables { tau, .. } => tau.rows(),
        };
        graph.metric(&format!("{}_tau", self.name), tau.mean_all());

        let difference = similarity - similarity.diagonal().unsqueeze(-1);
        let h = difference.detach() / tau.detach().unsqueeze(-1);
        let exponentials = Denominators::new(graph, inputs, self.letter, self.ids).update(h, config.gamma, 1.0);
        let divisor = exponentials.average.sum.maximum(config.eps);
        let weights = exponentials.values / divisor.unsqueeze(-1);
        let loss = (weights * difference).sum(&[-1], false).mean_all();

        let others = (inputs.batch - 1) as f64;
        let gradient =
            (divisor / others).ln() + exponentials.average.shift + self.rho - (weights * h).sum(&[-1], false);
        let (loss, gradient) = match source {
            // The parameters follow the gradient by way of the loss.
            Source::Network(tau) => (loss + (tau * gradient).mean_all(), gradient),
            Source::Tables { tau: table, u } => {
                let gradient = match config.grad_clip {
                    limit if limit > 0.0 => gradient.clamp(-limit, limit),
                    _ => gradient,
                };
                let momentum = u.rows() * (1.0 - config.beta_u) + gradient * config.beta_u;
                u.store(momentum);
                table.store((tau - momentum * config.eta).clamp(config.tau_min, config.tau_max));
                (loss, gradient)
            }
        };
        graph.metric(&format!("{}_tau_grad", self.name), gradient.mean_all());
        loss
    }
}

#[cfg(feature = "export")]
export_plugin!(loss, IsogClr);
