//! Adam: steps scaled by running moments of the gradient, with weight decay as an L2 penalty, and AMSGrad as an option.
//!
//! With gradient g, step t and learning rate lr:
//!
//! ```text
//! g ← g + weight_decay·p
//! m ← β₁·m + (1 − β₁)·g;  v ← β₂·v + (1 − β₂)·g²
//! p ← p − lr/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)       AMSGrad: the largest v so far instead of v
//! ```
//!
//! Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, arXiv:1412.6980; AMSGrad: Reddi, Kale and Kumar,
//! "On the Convergence of Adam and Beyond", ICLR 2018, arXiv:1904.09237. Same numbers as `torch.optim.Adam`. The decay goes
//! through the moments: `adamw` keeps it out of them.

use clip_host_plugin_api::prelude::*;

/// Settings of the `adam` optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdamConfig {
    /// Decay of the running means of the gradient and of its square; each in [0, 1).
    #[schemars(inner(range(min = 0.0, max = 1.0)))]
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    #[schemars(range(min = 0.0))]
    pub eps: f64,
    /// Divides by the largest second moment so far (AMSGrad).
    pub amsgrad: bool,
}

impl Default for AdamConfig {
    fn default() -> Self {
        AdamConfig { betas: [0.9, 0.999], eps: 1e-8, amsgrad: false }
    }
}

/// The optimizer.
pub struct Adam;

impl Plugin for Adam {
    type Config = AdamConfig;
    const ID: &'static str = "adam";
    const DOC: &'static str = "Adam with L2 weight decay (Kingma and Ba 2015, arXiv:1412.6980), \
        optionally AMSGrad (Reddi et al. 2018, arXiv:1904.09237).";
}

impl Optimizer for Adam {
    fn scalars(config: &AdamConfig, step: u64, lr: f64) -> Vec<(&'static str, f64)> {
        let [correction1, correction2] = config.betas.map(|beta| 1.0 - beta.powf(step as f64));
        vec![("step_size", lr / correction1), ("v_scale", 1.0 / correction2.sqrt())]
    }

    fn build<'g>(config: &AdamConfig, graph: &'g Graph, update: &ParamUpdate<'g>) -> Result<Tensor<'g>, BuildError> {
        let [beta1, beta2] = config.betas;
        if !config.betas.iter().all(|beta| (0.0..1.0).contains(beta)) {
            return Err(BuildError::new(format!("adam takes betas in [0, 1); it got {beta1} and {beta2}")));
        }
        let grad = update.grad + update.param * update.info.weight_decay;
        let moment = |name: &str| graph.state(name, &update.shape(), Init::Constant(0.0));
        let (exp_avg, exp_avg_sq) = (moment("exp_avg"), moment("exp_avg_sq"));
        let m = exp_avg * beta1 + grad * (1.0 - beta1);
        let v = exp_avg_sq * beta2 + grad.square() * (1.0 - beta2);
        graph.update(exp_avg, m);
        graph.update(exp_avg_sq, v);

        let second = if config.amsgrad {
            let max_exp_avg_sq = moment("max_exp_avg_sq");
            let largest = max_exp_avg_sq.maximum(v);
            graph.update(max_exp_avg_sq, largest);
            largest
        } else {
            v
        };
        let denominator = second.sqrt() * update.scalar("v_scale")? + config.eps;
        Ok(update.param - m * update.scalar("step_size")? / denominator)
    }
}

#[cfg(feature = "export")]
export_plugin!(optimizer, Adam);
