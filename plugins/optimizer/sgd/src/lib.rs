//! SGD: gradient descent with momentum, plain or Nesterov's.
//!
//! With gradient g, learning rate lr and momentum μ, starting from b = g at the first step:
//!
//! ```text
//! g ← g + weight_decay·p
//! b ← μ·b + (1 − dampening)·g
//! p ← p − lr·b                    Nesterov: p − lr·(g + μ·b);  without momentum: p − lr·g
//! ```
//!
//! Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum in deep learning", ICML 2013.
//! Same numbers as `torch.optim.SGD`, whose rate, unlike the paper's, is outside the momentum.

use clip_host_plugin_api::prelude::*;

/// Settings of the `sgd` optimizer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SgdConfig {
    /// Decay of the running sum of gradients. 0: no momentum, and no memory for it.
    #[schemars(range(min = 0.0))]
    pub momentum: f64,
    /// The share of each gradient after the first that momentum leaves out.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub dampening: f64,
    /// Looks ahead by one step of momentum (Nesterov); takes momentum and no dampening.
    pub nesterov: bool,
}

/// The optimizer.
pub struct Sgd;

impl Plugin for Sgd {
    type Config = SgdConfig;
    const ID: &'static str = "sgd";
    const DOC: &'static str = "Stochastic gradient descent with momentum, plain or Nesterov's (Sutskever et al. 2013).";
}

impl Optimizer for Sgd {
    fn scalars(config: &SgdConfig, step: u64, lr: f64) -> Vec<(&'static str, f64)> {
        let share = if step == 1 { 1.0 } else { 1.0 - config.dampening };
        vec![("lr", lr), ("share", share)]
    }

    fn build<'g>(config: &SgdConfig, graph: &'g Graph, update: &ParamUpdate<'g>) -> Result<Tensor<'g>, BuildError> {
        let &SgdConfig { momentum, dampening, nesterov } = config;
        if !(0.0..f64::INFINITY).contains(&momentum) || !(0.0..=1.0).contains(&dampening) {
            let got = format!("it got {momentum} and {dampening}");
            return Err(BuildError::new(format!("sgd takes momentum >= 0 and dampening in [0, 1]; {got}")));
        }
        if nesterov && (momentum == 0.0 || dampening != 0.0) {
            let got = format!("it got momentum {momentum} and dampening {dampening}");
            return Err(BuildError::new(format!("sgd takes nesterov with momentum and without dampening; {got}")));
        }
        let grad = update.grad + update.param * update.info.weight_decay;
        let direction = if momentum == 0.0 {
            grad
        } else {
            let buffer = graph.state("momentum_buffer", &update.shape(), Init::Constant(0.0));
            let new = buffer * momentum + grad * update.scalar("share")?;
            graph.update(buffer, new);
            if nesterov { grad + new * momentum } else { new }
        };
        Ok(update.param - direction * update.scalar("lr")?)
    }
}

#[cfg(feature = "export")]
export_plugin!(optimizer, Sgd);
