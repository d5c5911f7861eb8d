//! NAdam: Adam with Nesterov's momentum.
//!
//! With gradient g, step t, learning rate lr and momenta μₜ = β₁·(1 − 0.96^(t·momentum_decay)/2):
//!
//! ```text
//! g ← g + weight_decay·p                              decoupled: p ← p − lr·weight_decay·p
//! m ← β₁·m + (1 − β₁)·g;  v ← β₂·v + (1 − β₂)·g²
//! p ← p − lr·( (1 − μₜ)/(1 − Π μ₁…ₜ) · g  +  μₜ₊₁/(1 − Π μ₁…ₜ₊₁) · m ) / (√(v/(1 − β₂ᵗ)) + ε)
//! ```
//!
//! Dozat, "Incorporating Nesterov Momentum into Adam", ICLR 2016 workshop. Same numbers as `torch.optim.NAdam` and as the
//! CLIP studies' code, which computes the same formula and calls `momentum_decay` `schedule_decay`. Both keep the product
//! of the momenta for each parameter; it depends on the step alone and is computed on the host.

use clip_host_plugin_api::prelude::*;

/// Settings of the `nadam` optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NAdamConfig {
    /// Decay of the running means of the gradient and of its square; each in [0, 1).
    #[schemars(inner(range(min = 0.0, max = 1.0)))]
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    #[schemars(range(min = 0.0))]
    pub eps: f64,
    /// How fast the momentum grows from β₁/2 to β₁; the studies' `schedule_decay`.
    #[schemars(range(min = 0.0))]
    pub momentum_decay: f64,
    /// The base of the momentum's growth.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub momentum_base: f64,
    /// Decays the parameter itself, as AdamW, not the gradient (L2).
    pub decoupled_weight_decay: bool,
}

impl Default for NAdamConfig {
    fn default() -> Self {
        NAdamConfig {
            betas: [0.9, 0.999],
            eps: 1e-8,
            momentum_decay: 4e-3,
            momentum_base: 0.96,
            decoupled_weight_decay: false,
        }
    }
}

impl NAdamConfig {
    /// The momentum of a step.
    fn momentum(&self, step: u64) -> f64 {
        self.betas[0] * (1.0 - 0.5 * self.momentum_base.powf(step as f64 * self.momentum_decay))
    }

    /// The product of the momenta up to a step.
    fn momentum_product(&self, step: u64) -> f64 {
        // Below this it is as good as 0 beside 1: long runs need not multiply on.
        const NEGLIGIBLE: f64 = 1e-20;
        let mut product = 1.0;
        for step in 1..=step {
            product *= self.momentum(step);
            if product < NEGLIGIBLE {
                break;
            }
        }
        product
    }
}

/// The optimizer.
pub struct NAdam;

impl Plugin for NAdam {
    type Config = NAdamConfig;
    const ID: &'static str = "nadam";
    const DOC: &'static str = "Adam with Nesterov momentum (Dozat 2016).";
}

impl Optimizer for NAdam {
    fn scalars(config: &NAdamConfig, step: u64, lr: f64) -> Vec<(&'static str, f64)> {
        let (now, next) = (config.momentum(step), config.momentum(step + 1));
        let product = config.momentum_product(step);
        vec![
            ("lr", lr),
            ("grad_size", lr * (1.0 - now) / (1.0 - product)),
            ("moment_size", lr * next / (1.0 - product * next)),
            ("v_scale", 1.0 / (1.0 - config.betas[1].powf(step as f64)).sqrt()),
        ]
    }

    fn build<'g>(config: &NAdamConfig, graph: &'g Graph, update: &ParamUpdate<'g>) -> Result<Tensor<'g>, BuildError> {
        let [beta1, beta2] = config.betas;
        if !config.betas.iter().all(|beta| (0.0..1.0).contains(beta)) {
            return Err(BuildError::new(format!("nadam takes betas in [0, 1); it got {beta1} and {beta2}")));
        }
        if !(config.momentum_decay >= 0.0 && (0.0..=1.0).contains(&config.momentum_base)) {
            let got = format!("it got {} and {}", config.momentum_decay, config.momentum_base);
            return Err(BuildError::new(format!("nadam takes momentum_decay >= 0 and momentum_base in [0, 1]; {got}")));
        }
        let decay = update.info.weight_decay;
        let (param, grad) = match config.decoupled_weight_decay {
            true => (update.param - update.param * (update.scalar("lr")? * decay), update.grad),
            false => (update.param, update.grad + update.param * decay),
        };
        let moment = |name: &str| graph.state(name, &update.shape(), Init::Constant(0.0));
        let (exp_avg, exp_avg_sq) = (moment("exp_avg"), moment("exp_avg_sq"));
        let m = exp_avg * beta1 + grad * (1.0 - beta1);
        let v = exp_avg_sq * beta2 + grad.square() * (1.0 - beta2);
        graph.update(exp_avg, m);
        graph.update(exp_avg_sq, v);

        let step = grad * update.scalar("grad_size")? + m * update.scalar("moment_size")?;
        Ok(param - step / (v.sqrt() * update.scalar("v_scale")? + config.eps))
    }
}

#[cfg(feature = "export")]
export_plugin!(optimizer, NAdam);

#[cfg(test)]
mod tests {
    use super::*;

    /// The product that both references keep as a state, after each step of many.
    #[test]
    fn the_product_of_momenta_is_that_of_all_steps() {
        let config = NAdamConfig::default();
        let mut product = 1.0;
        for step in 1..=2000 {
            product *= config.momentum(step);
            assert!((config.momentum_product(step) - product).abs() <= 1e-20, "step {step}");
        }
        assert_eq!(config.momentum_product(u64::MAX), config.momentum_product(2000));
    }
}
