//! Adafactor: second moments kept as one number for each row and column, and steps clipped by their root mean square.
//!
//! With gradient g, step t, β = 1 − t^decay_rate, and means over the last axis (rows) or the one before (columns):
//!
//! ```text
//! r ← β·r + (1 − β)·mean_rows(g² + ε);  c ← β·c + (1 − β)·mean_columns(g² + ε)
//! u = g / (√(r / mean(r)) · √c)         fewer than two dimensions: v ← β·v + (1 − β)·(g² + ε);  u = g / √v
//! u ← α·u / max(1, rms(u)/clip_threshold)
//! u ← m ← β₁·m + (1 − β₁)·u             with beta1 only
//! p ← p − α·weight_decay·p − u
//! ```
//!
//! α is the recipe's learning rate or, with `relative_step`, min(`max_step`, 1/√t) — during a warm-up
//! min(`warmup_step`·t, 1/√t) — times max(`eps_scale`, rms(p)) with `scale_parameter`. Tensors of more than two dimensions
//! are stacks of matrices: a convolution's filters are factored over height and width.
//!
//! Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018, arXiv:1804.04235. The
//! CLIP studies' code scales by the parameter with the relative step only, fairseq's with a given rate too: `scale_lr`.

use clip_host_plugin_api::prelude::*;

/// Settings of the `adafactor` optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdafactorConfig {
    /// Added to the gradient's square.
    #[schemars(range(min = 0.0))]
    pub eps: f64,
    /// The least root mean square that a parameter counts with where it scales its steps.
    #[schemars(range(min = 0.0))]
    pub eps_scale: f64,
    /// Steps with a larger root mean square are scaled down to it.
    #[schemars(range(min = 1e-6))]
    pub clip_threshold: f64,
    /// The second moments' decay is 1 − tᵏ for this k.
    #[schemars(range(max = 0.0))]
    pub decay_rate: f64,
    /// Decay of the running mean of the steps, in [0, 1); without it no memory is needed for one.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub beta1: Option<f64>,
    /// Finds its own step size from the number of the step; the recipe's learning rate is not used then.
    pub relative_step: bool,
    /// With `relative_step`: multiplies the step size by the parameter's root mean square.
    pub scale_parameter: bool,
    /// With a given learning rate: multiplies it by the parameter's root mean square, as fairseq does.
    pub scale_lr: bool,
    /// With `relative_step`: begins with small steps.
    pub warmup_init: bool,
    /// The largest relative step.
    #[schemars(range(min = 0.0))]
    pub max_step: f64,
    /// The relative step of the warm-up's first step, and what each one adds.
    #[schemars(range(min = 0.0))]
    pub warmup_step: f64,
}

impl Default for AdafactorConfig {
    fn default() -> Self {
        AdafactorConfig {
            eps: 1e-30,
            eps_scale: 1e-3,
            clip_threshold: 1.0,
            decay_rate: -0.8,
            beta1: None,
            relative_step: false,
            scale_parameter: true,
            scale_lr: false,
            warmup_init: false,
            max_step: 1e-2,
            warmup_step: 1e-6,
        }
    }
}

impl AdafactorConfig {
    fn check(&self) -> Result<(), BuildError> {
        let refuse = |takes: &str, got: String| Err(BuildError::new(format!("adafactor takes {takes}; it got {got}")));
        if let Some(beta1) = self.beta1.filter(|beta1| !(0.0..1.0).contains(beta1)) {
            return refuse("beta1 in [0, 1)", beta1.to_string());
        }
        if !(self.clip_threshold > 0.0 && self.decay_rate <= 0.0) {
            let got = format!("{} and {}", self.clip_threshold, self.decay_rate);
            return refuse("clip_threshold > 0 and decay_rate <= 0", got);
        }
        if self.warmup_init && !self.relative_step {
            let hint = "a schedule with a warm-up is the recipe's `scheduler`";
            return refuse("warmup_init with relative_step", format!("it alone (hint: {hint})"));
        }
        Ok(())
    }
}

/// The optimizer.
pub struct Adafactor;

impl Plugin for Adafactor {
    type Config = AdafactorConfig;
    const ID: &'static str = "adafactor";
    const DOC: &'static str = "Adafactor: factored second moments, with a given rate or relative steps \
        (Shazeer and Stern 2018, arXiv:1804.04235).";
}

/// Root of the mean square of all elements.
fn rms(x: Tensor<'_>) -> Tensor<'_> {
    x.square().mean_all().sqrt()
}

impl Optimizer for Adafactor {
    const ELEMENTWISE: bool = false;

    fn scalars(config: &AdafactorConfig, step: u64, lr: f64) -> Vec<(&'static str, f64)> {
        let t = step as f64;
        let limit = if config.warmup_init { config.warmup_step * t } else { config.max_step };
        let step_size = if config.relative_step { limit.min(1.0 / t.sqrt()) } else { lr };
        vec![("step_size", step_size), ("new_share", t.powf(config.decay_rate))]
    }

    fn build<'g>(
        config: &AdafactorConfig,
        graph: &'g Graph,
        update: &ParamUpdate<'g>,
    ) -> Result<Tensor<'g>, BuildError> {
        config.check()?;
        let (param, grad, shape) = (update.param, update.grad, update.shape());
        let new_share = update.scalar("new_share")?;
        let scaled = if config.relative_step { config.scale_parameter } else { config.scale_lr };
        let step_size = match scaled {
            true => update.scalar("step_size")? * rms(param).maximum(config.eps_scale),
            false => update.scalar("step_size")?,
        };
        let moment = |name: &str, mean: Tensor<'g>| {
            let state = graph.state(name, &mean.shape(), Init::Constant(0.0));
            let new = state * (1.0 - new_share) + mean * new_share;
            graph.update(state, new);
            new
        };

        let square = grad.square() + config.eps;
        let direction = if shape.len() < 2 {
            grad / moment("exp_avg_sq", square).sqrt()
        } else {
            let rows = moment("exp_avg_sq_row", square.mean(&[-1], false));
            let columns = moment("exp_avg_sq_col", square.mean(&[-2], false));
            let rows = (rows / rows.mean(&[-1], true)).sqrt();
            grad / rows.unsqueeze(-1) / columns.sqrt().unsqueeze(-2)
        };
        let clip = (rms(direction) / config.clip_threshold).maximum(1.0);
        let mut step = direction * (step_size / clip);
        if let Some(beta1) = config.beta1 {
            let exp_avg = graph.state("exp_avg", &shape, Init::Constant(0.0));
            step = exp_avg * beta1 + step * (1.0 - beta1);
            graph.update(exp_avg, step);
        }
        Ok(param - param * (step_size * update.info.weight_decay) - step)
    }
}

#[cfg(feature = "export")]
export_plugin!(optimizer, Adafactor);
