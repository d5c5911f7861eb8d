//! RAdam: Adam whose step is rectified for the variance of its adaptive rate, and which is plain momentum until that
//! variance is known.
//!
//! With ρ∞ = 2/(1 − β₂) − 1, ρ = ρ∞ − 2t·β₂ᵗ/(1 − β₂ᵗ) at step t and Adam's moments m and v:
//!
//! ```text
//! rectified (ρ at least 5):   p ← p − lr·r·√(1 − β₂ᵗ)/(1 − β₁ᵗ) · m / (√v + ε)
//!                             r = √((ρ − 4)(ρ − 2)ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)ρ))
//! before:                     p ← p − lr/(1 − β₁ᵗ) · m
//! ```
//!
//! Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020, arXiv:1908.03265.
//!
//! The authors' code keeps the step size of a step in a cache that all parameter groups share, so that every group moves
//! with the first group's learning rate. That is a defect, not a variant: it is not offered, each group has its own rate.

use clip_host_plugin_api::prelude::*;

/// Whose RAdam it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// The authors' code, which the CLIP studies use: rectifies from ρ ≥ 5, decoupled weight decay.
    #[default]
    Original,
    /// `torch.optim.RAdam`: rectifies from ρ > 5, weight decay is added to the gradient (L2).
    Torch,
}

/// Settings of the `radam` optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RAdamConfig {
    /// Decay of the running means of the gradient and of its square; each in [0, 1).
    #[schemars(inner(range(min = 0.0, max = 1.0)))]
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    #[schemars(range(min = 0.0))]
    pub eps: f64,
    /// Whose RAdam it is.
    pub variant: Variant,
}

impl Default for RAdamConfig {
    fn default() -> Self {
        RAdamConfig { betas: [0.9, 0.999], eps: 1e-8, variant: Variant::Original }
    }
}

/// The optimizer.
pub struct RAdam;

impl Plugin for RAdam {
    type Config = RAdamConfig;
    const ID: &'static str = "radam";
    const DOC: &'static str = "Rectified Adam, as the authors' code or as torch has it \
        (Liu et al. 2020, arXiv:1908.03265).";
}

impl Optimizer for RAdam {
    fn scalars(config: &RAdamConfig, step: u64, lr: f64) -> Vec<(&'static str, f64)> {
        let [beta1, beta2] = config.betas;
        let t = step as f64;
        let (correction1, correction2) = (1.0 - beta1.powf(t), 1.0 - beta2.powf(t));
        let rho_inf = 2.0 / (1.0 - beta2) - 1.0;
        let rho = rho_inf - 2.0 * t * beta2.powf(t) / correction2;
        let rectified = match config.variant {
            Variant::Original => rho >= 5.0,
            Variant::Torch => rho > 5.0,
        };
        let factor = if rectified {
            let r = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho);
            (r * correction2).sqrt()
        } else {
            1.0
        };
        vec![("lr", lr), ("step_size", lr * factor / correction1), ("rectified", f64::from(u8::from(rectified)))]
    }

    fn build<'g>(config: &RAdamConfig, graph: &'g Graph, update: &ParamUpdate<'g>) -> Result<Tensor<'g>, BuildError> {
        let [beta1, beta2] = config.betas;
        if !config.betas.iter().all(|beta| (0.0..1.0).contains(beta)) {
            return Err(BuildError::new(format!("radam takes betas in [0, 1); it got {beta1} and {beta2}")));
        }
        let (lr, decay) = (update.scalar("lr")?, update.info.weight_decay);
        let (param, grad) = match config.variant {
            Variant::Original => (update.param - update.param * (lr * decay), update.grad),
            Variant::Torch => (update.param, update.grad + update.param * decay),
        };
        let moment = |name: &str| graph.state(name, &update.shape(), Init::Constant(0.0));
        let (exp_avg, exp_avg_sq) = (moment("exp_avg"), moment("exp_avg_sq"));
        let m = exp_avg * beta1 + grad * (1.0 - beta1);
        let v = exp_avg_sq * beta2 + grad.square() * (1.0 - beta2);
        graph.update(exp_avg, m);
        graph.update(exp_avg_sq, v);

        let denominator = update.scalar("rectified")?.where_(v.sqrt() + config.eps, 1.0);
        Ok(param - m * update.scalar("step_size")? / denominator)
    }
}

#[cfg(feature = "export")]
export_plugin!(optimizer, RAdam);
