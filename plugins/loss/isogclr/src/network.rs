//! Temperatures from a small network over the features, one network for images and one for texts (TempNet).
//!
//! With x a row of features, through which no gradient flows, and M prototypes p_m of unit length:
//!
//! ```text
//! k = dropout(sigmoid(x·Wᵀ + c))                          `proj`
//! q_m = k·p_m;  a = softmax(q / exp(scaler))              `prototypes`, `scaler`
//! z = Σ_m v_m·(a_m − 1/M)·sigmoid(q_m) + d                `linear_1`
//! τ = tau_min + (tau_max − tau_min)·sigmoid(z)
//! ```
//!
//! The loss gains mean_i τ_i·G_i, in which G is a constant and not clipped. Parameters are named as in the published
//! code, `image_temp_gen.proj.weight` for one. Qiu et al., "To Cool or not to Cool? Temperature Network Meets Large
//! Foundation Models via DRO", ICML 2024, arXiv:2404.04575.

use clip_host_plugin_api::prelude::*;

/// Settings of the temperature networks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// Number of prototypes, M.
    #[schemars(range(min = 1, max = 65536))]
    pub prototypes: usize,
    /// Dropout after the first layer.
    #[schemars(range(min = 0.0, max = 0.9))]
    pub dropout: f64,
    /// First temperature of the softmax over prototypes, which is learnt: exp(scaler).
    #[schemars(range(min = 0.0001, max = 10.0))]
    pub softmax_temperature: f64,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        NetworkConfig { prototypes: 256, dropout: 0.5, softmax_temperature: 0.01 }
    }
}

impl NetworkConfig {
    /// The temperatures, `[batch]`, of rows of features, `[batch, embed_dim]`, within `low..=high`. `side` begins the
    /// parameters' names.
    pub(crate) fn temperatures<'g>(
        &self,
        graph: &'g Graph,
        side: &str,
        features: Tensor<'g>,
        [low, high]: [f64; 2],
    ) -> Tensor<'g> {
        let (batch, width, count) = (features.size(0), features.size(1), self.prototypes);
        let param =
            |name: &str, shape: &[usize], init: Init| graph.param(&format!("{side}_temp_gen.{name}"), shape, init);
        // As torch.nn.Linear starts.
        let uniform = Init::Uniform { bound: 1.0 / (width as f64).sqrt() };
        let proj = (param("proj.weight", &[width, width], uniform), param("proj.bias", &[width], uniform));
        let scaler = param("scaler", &[], Init::Constant(self.softmax_temperature.ln()));
        let prototypes = param("prototypes", &[count, width], Init::Normal { std: 1.0 }).l2_normalize();
        let linear_1 = param("linear_1.weight", &[1, count], Init::Constant(1.0));
        let bias = param("linear_1.bias", &[1], Init::Constant(0.0));

        let k = features.detach().linear(proj.0, Some(proj.1)).sigmoid().dropout(self.dropout);
        let q = k.matmul(prototypes.t());
        let shares = (q / scaler.exp()).softmax() - 1.0 / count as f64;
        let z = (shares * q.sigmoid()).linear(linear_1, Some(bias)).reshape(&[batch]);
        z.sigmoid() * (high - low) + low
    }
}
