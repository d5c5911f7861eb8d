//! OnlineCLR: pushes the most similar wrong pairs apart and pulls the least similar right pairs together.
//!
//! With S = image · textᵀ, x_ij = S_ij for i ≠ j, y_i = −S_ii, and u, c the old sums and shifts of both kinds (n, p):
//!
//! ```text
//! c_n ← max(0, max x);  e_ij = exp((x_ij − c_n)/τ_n);  u_n ← (1 − γ)·u_n·exp((c_old − c_n)/τ_n) + γ·2·Σ e
//! c_p ← max(0, max y);  f_i  = exp((y_i − c_p)/τ_p);   u_p ← (1 − γ)·u_p·exp((c_old − c_p)/τ_p) + γ·2·Σ f
//! loss = 2·Σ e/u_n·x + 2·Σ f/u_p·y, where no gradient flows through e, f and u
//! ```
//!
//! The factors 2 count a pair from image to text and from text to image. This is the two-modal loss `onlineCLR` of the
//! code published with iSogCLR (Qiu et al., ICML 2023, arXiv:2305.11965), which needs several processes; here one is
//! enough.
//!
//! A shift may fall, and then its old sum grows: where ln u would exceed [`LARGEST_LOG_SUM`], the shift stays higher than
//! the formula says. The weights e/u are the same for every shift.

use clip_host_plugin_api::global::ShiftedSum;
use clip_host_plugin_api::prelude::*;

/// The largest logarithm of a kept sum: f32 ends at 88.7.
pub const LARGEST_LOG_SUM: f64 = 60.0;

/// Settings of the `onlineclr` loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OnlineClrConfig {
    /// Divides the similarities of wrong pairs, τ_n.
    #[schemars(range(min = 0.0001, max = 10.0))]
    pub temperature: f64,
    /// τ_p / τ_n: the temperature of right pairs in terms of that of wrong ones.
    #[schemars(range(min = 0.01, max = 1000.0))]
    pub positive_factor: f64,
    /// Weight of the newest batch in the moving sums, γ.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub gamma: f64,
}

impl Default for OnlineClrConfig {
    fn default() -> Self {
        OnlineClrConfig { temperature: 0.01, positive_factor: 10.0, gamma: 0.8 }
    }
}

/// The loss.
pub struct OnlineClr;

impl Plugin for OnlineClr {
    type Config = OnlineClrConfig;
    const ID: &'static str = "onlineclr";
    const DOC: &'static str = "Contrastive loss whose weights of wrong and of right pairs come from two moving sums \
        (OnlineCLR, as in the code of Qiu et al. 2023, arXiv:2305.11965).";
}

impl Loss for OnlineClr {
    const HELD_CONSTANT: Option<&'static str> = Some("the weights of the pairs, which come from the moving sums");

    fn build<'g>(
        config: &OnlineClrConfig,
        graph: &'g Graph,
        inputs: &LossInputs<'g>,
    ) -> Result<Tensor<'g>, BuildError> {
        if inputs.batch < 2 {
            return Err(BuildError::new(format!(
                "onlineclr needs pairs that do not match: at least 2 samples a batch, it got {}",
                inputs.batch
            )));
        }
        if config.gamma <= 0.0 {
            return Err(BuildError::new(format!(
                "onlineclr takes gamma above 0, it got {}: its sums would stay 0, and it divides by them",
                config.gamma
            )));
        }
        let similarity = inputs.image_features.matmul(inputs.text_features.t());
        let matching = graph.eye(inputs.batch);
        let wrong = matching.where_(0.0, similarity);
        let right = -similarity.diagonal();
        // One kind's part: `mask` is 1 where `x` holds a pair of it, elsewhere `x` is 0.
        let kind = |suffix: &str, x: Tensor<'g>, mask: Tensor<'g>, temperature: f64| {
            let state = |name: &str| graph.state(&format!("{name}_{suffix}"), &[], Init::Constant(0.0));
            let (u, c) = (state("u"), state("c"));
            let h = x.detach() / temperature;
            let old = ShiftedSum { sum: u, shift: c / temperature };
            // ln 0 must not enter: before the first step u is 0.
            let lowest = old.shift + (old.sum.maximum(f64::from(f32::MIN_POSITIVE)).ln() - LARGEST_LOG_SUM);
            let top = h.reshape(&[x.shape().iter().product()]).max(&[0], false).maximum(0.0);
            let shift = top.maximum(lowest);
            let e = (h - shift).exp() * mask;
            let sum = old.average(ShiftedSum { sum: e.sum_all() * 2.0, shift }, config.gamma).sum;
            graph.update(u, sum);
            graph.update(c, shift * temperature);
            (e / sum * x).sum_all() * 2.0
        };
        let wrong = kind("n", wrong, 1.0 - matching, config.temperature);
        let right = kind("p", right, graph.scalar(1.0), config.temperature * config.positive_factor);
        Ok(wrong + right)
    }
}

#[cfg(feature = "export")]
export_plugin!(loss, OnlineClr);
