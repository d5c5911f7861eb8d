//! NovoGrad: gradients are normalised tensor by tensor before they enter the momentum.
//!
//! With gradient g, step t, learning rate lr, and ‖·‖² over the whole tensor:
//!
//! ```text
//! nvidia:    v ← ‖g‖² as long as v is 0, else β₂·v + (1 − β₂)·‖g‖²
//!            m ← β₁·m + (g/(√v + ε) + weight_decay·p)        averaging: times 1 − β₁;  AMSGrad: the largest v so far
//!            p ← p − lr·m
//! original:  e ← β₂·e + (1 − β₂)·‖g‖²,  first ‖g‖²
//!            ĝ = g/(√e + ε)                                  averaging: times 1 − β₁
//!            v ← β₂·v + (1 − β₂)·‖ĝ‖²,  first v = ‖g‖²
//!            m ← β₁·m + ĝ/(√v + ε) + weight_decay·p,  first m = g/(‖g‖ + ε) + weight_decay·p
//!            p ← p − lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ)·m
//! ```
//!
//! Ginsburg et al., "Stochastic Gradient Methods with Layer-wise Adaptive Moments for Training of Deep Networks", 2019,
//! arXiv:1905.11286; NVIDIA's code is the paper's algorithm. The CLIP studies' other code ("original") normalises twice,
//! and its first step takes the first gradient twice. There, too, the decay of parameter groups is never applied and that
//! of the constructor hits all parameters: which parameters decay is the recipe's matter here (`no_decay: ()` for all).

use clip_host_plugin_api::prelude::*;

/// Whose NovoGrad it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// NVIDIA's, the paper's algorithm: the studies' `nvnovograd`.
    #[default]
    Nvidia,
    /// The studies' `novograd`: normalises twice, with Adam's bias corrections.
    Original,
}

/// Settings of the `novograd` optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NovoGradConfig {
    /// Decay of the momentum and of the running mean of the squared norm; each in [0, 1).
    #[schemars(inner(range(min = 0.0, max = 1.0)))]
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    #[schemars(range(min = 0.0))]
    pub eps: f64,
    /// Multiplies what enters the momentum by 1 − β₁.
    pub grad_averaging: bool,
    /// Divides by the largest second moment so far (AMSGrad); variant `nvidia` only.
    pub amsgrad: bool,
    /// Whose NovoGrad it is.
    pub variant: Variant,
}

impl Default for NovoGradConfig {
    fn default() -> Self {
        NovoGradConfig {
            betas: [0.95, 0.98],
            eps: 1e-8,
            grad_averaging: false,
            amsgrad: false,
            variant: Variant::Nvidia,
        }
    }
}

/// The optimizer.
pub struct NovoGrad;

impl Plugin for NovoGrad {
    type Config = NovoGradConfig;
    const ID: &'static str = "novograd";
    const DOC: &'static str = "NovoGrad: momentum of gradients normalised tensor by tensor, NVIDIA's or the CLIP studies' \
        (Ginsburg et al. 2019, arXiv:1905.11286).";
}

impl Optimizer for NovoGrad {
    const ELEMENTWISE: bool = false;

    fn scalars(config: &NovoGradConfig, step: u64, lr: f64) -> Vec<(&'static str, f64)> {
        let [correction1, correction2] = config.betas.map(|beta| 1.0 - beta.powf(step as f64));
        let step_size = match config.variant {
            Variant::Nvidia => lr,
            Variant::Original => lr * correction2.sqrt() / correction1,
        };
        vec![("step_size", step_size), ("first", f64::from(u8::from(step == 1)))]
    }

    fn build<'g>(
        config: &NovoGradConfig,
        graph: &'g Graph,
        update: &ParamUpdate<'g>,
    ) -> Result<Tensor<'g>, BuildError> {
        let [beta1, beta2] = config.betas;
        if !config.betas.iter().all(|beta| (0.0..1.0).contains(beta)) {
            return Err(BuildError::new(format!("novograd takes betas in [0, 1); it got {beta1} and {beta2}")));
        }
        let momentum = match config.variant {
            Variant::Nvidia => nvidia(config, graph, update),
            Variant::Original if config.amsgrad => {
                return Err(BuildError::new("novograd takes amsgrad with variant \"nvidia\"; it got \"original\""));
            }
            Variant::Original => original(config, graph, update)?,
        };
        Ok(update.param - momentum * update.scalar("step_size")?)
    }
}

/// ‖x‖² over all elements.
fn norm_squared(x: Tensor<'_>) -> Tensor<'_> {
    x.square().sum_all()
}

/// What the running means of the gradients take of each.
fn share(config: &NovoGradConfig) -> f64 {
    if config.grad_averaging { 1.0 - config.betas[0] } else { 1.0 }
}

/// The momentum of NVIDIA's variant.
fn nvidia<'g>(config: &NovoGradConfig, graph: &'g Graph, update: &ParamUpdate<'g>) -> Tensor<'g> {
    let [beta1, beta2] = config.betas;
    let exp_avg = graph.state("exp_avg", &update.shape(), Init::Constant(0.0));
    let exp_avg_sq = graph.state("exp_avg_sq", &[], Init::Constant(0.0));
    let norm = norm_squared(update.grad);
    let v = exp_avg_sq.eq(0.0).where_(norm, exp_avg_sq * beta2 + norm * (1.0 - beta2));
    graph.update(exp_avg_sq, v);
    let second = if config.amsgrad {
        let max_exp_avg_sq = graph.state("max_exp_avg_sq", &[], Init::Constant(0.0));
        let largest = max_exp_avg_sq.maximum(v);
        graph.update(max_exp_avg_sq, largest);
        largest
    } else {
        v
    };
    let normalised = update.grad / (second.sqrt() + config.eps) + update.param * update.info.weight_decay;
    let m = exp_avg * beta1 + normalised * share(config);
    graph.update(exp_avg, m);
    m
}

/// The momentum of the studies' other variant.
fn original<'g>(config: &NovoGradConfig, graph: &'g Graph, update: &ParamUpdate<'g>) -> Result<Tensor<'g>, BuildError> {
    let [beta1, beta2] = config.betas;
    let first = update.scalar("first")?;
    let state = |name: &str, shape: &[usize]| graph.state(name, shape, Init::Constant(0.0));
    let (m, v, grad_ema) = (state("m", &update.shape()), state("v", &[]), state("grad_ema", &[]));
    let decay = update.param * update.info.weight_decay;
    let mean = |old: Tensor<'g>, new: Tensor<'g>| old * beta2 + new * (1.0 - beta2);

    let norm = norm_squared(update.grad);
    let ema = first.where_(norm, mean(grad_ema, norm));
    let normalised = update.grad * (share(config) / (ema.sqrt() + config.eps));
    let second = mean(first.where_(norm, v), norm_squared(normalised));
    let before = first.where_(update.grad / (norm.sqrt() + config.eps) + decay, m);
    let momentum = before * beta1 + (normalised / (second.sqrt() + config.eps) + decay);
    graph.update(grad_ema, ema);
    graph.update(v, second);
    graph.update(m, momentum);
    Ok(momentum)
}

#[cfg(feature = "export")]
export_plugin!(optimizer, NovoGrad);
