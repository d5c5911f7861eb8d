//! The `optimizer` section: the plugin, weight decay, groups of parameters, clipping.

use crate::range;
use crate::sections::{Dtype, PluginChoice, plugin_id, sha256};
use crate::value::{Kind, Value};
use serde::Deserialize;
use serde::de::{Deserializer, Error};
use std::path::PathBuf;

/// The optimizer plugin, and what holds for all of them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(from = "OptimizerKeys")]
pub struct Optimizer {
    /// The plugin.
    pub choice: PluginChoice,
    /// Base learning rate, which the scheduler scales. Above 0.
    pub lr: f64,
    /// Weight decay of the parameters that [`Optimizer::decays`] names.
    pub weight_decay: f64,
    /// Parameters without weight decay: `"1d"` for all one-dimensional ones, otherwise a name in which `*` stands for
    /// any text. The default `["1d", "*.bias"]` is the studies' grouping: biases and the scales and shifts of
    /// normalisations do not decay, a 0-dimensional temperature does.
    pub no_decay: Vec<String>,
    /// Parameters with settings of their own. A parameter belongs to the first group that names it.
    pub groups: Vec<ParamGroup>,
    /// Gradients are limited to ± this, each element by itself, before their norm is taken.
    pub clip_grad_value: Option<f64>,
    /// Gradients are scaled down to this global L2 norm where they exceed it.
    pub clip_grad_norm: Option<f64>,
    /// What the optimizer's states of each parameter (moments, momentum) are kept in, where they have its shape. With
    /// `Bf16`, Radford et al.'s (2021) half-precision Adam statistics.
    pub state_dtype: Dtype,
}

/// Parameters with settings of their own: `(params: ["text_encoder.*"], lr: 2e-5)`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "ParamGroupKeys")]
pub struct ParamGroup {
    /// Their names, in which `*` stands for any text.
    pub params: Vec<String>,
    /// Base learning rate in place of the optimizer's: the group's rates are the schedule's times `lr / optimizer.lr`.
    pub lr: Option<f64>,
    /// Weight decay in place of the optimizer's, of those that decay by `no_decay`.
    pub weight_decay: Option<f64>,
    /// They keep their first values (running statistics of normalisations do not): no gradient is computed for them.
    pub freeze: bool,
    /// They keep their first values for so many epochs. The optimizer's steps count from there for them, the schedule's
    /// do not.
    pub freeze_epochs: u64,
}

#[derive(Deserialize)]
#[serde(rename = "ParamGroup", deny_unknown_fields)]
struct ParamGroupKeys {
    #[serde(deserialize_with = "patterns")]
    params: Vec<String>,
    #[serde(default, deserialize_with = "range::optional_not_negative")]
    lr: Option<f64>,
    #[serde(default, deserialize_with = "range::optional_not_negative")]
    weight_decay: Option<f64>,
    #[serde(default)]
    freeze: bool,
    #[serde(default)]
    freeze_epochs: u64,
}

impl TryFrom<ParamGroupKeys> for ParamGroup {
    type Error = &'static str;

    fn try_from(keys: ParamGroupKeys) -> Result<Self, Self::Error> {
        let ParamGroupKeys { params, lr, weight_decay, freeze, freeze_epochs } = keys;
        if freeze && (lr.is_some() || weight_decay.is_some() || freeze_epochs > 0) {
            return Err("expected `freeze: true` alone, got settings of a group that is trained beside it");
        }
        Ok(ParamGroup { params, lr, weight_decay, freeze, freeze_epochs })
    }
}

#[derive(Deserialize)]
#[serde(rename = "Optimizer", deny_unknown_fields)]
struct OptimizerKeys {
    #[serde(deserialize_with = "plugin_id")]
    plugin: String,
    #[serde(default)]
    config: serde_json::Map<String, serde_json::Value>,
    #[serde(default)]
    path: Option<PathBuf>,
    #[serde(default, deserialize_with = "sha256")]
    sha256: Option<String>,
    #[serde(deserialize_with = "range::positive")]
    lr: f64,
    #[serde(default, deserialize_with = "range::not_negative")]
    weight_decay: f64,
    #[serde(default = "studies_no_decay")]
    no_decay: Vec<String>,
    #[serde(default)]
    groups: Vec<ParamGroup>,
    #[serde(default, deserialize_with = "range::optional_positive")]
    clip_grad_value: Option<f64>,
    #[serde(default, deserialize_with = "range::optional_positive")]
    clip_grad_norm: Option<f64>,
    #[serde(default)]
    state_dtype: Dtype,
}

fn studies_no_decay() -> Vec<String> {
    vec!["1d".into(), "*.bias".into()]
}

impl From<OptimizerKeys> for Optimizer {
    fn from(keys: OptimizerKeys) -> Self {
        Optimizer {
            choice: PluginChoice { plugin: keys.plugin, config: keys.config, path: keys.path, sha256: keys.sha256 },
            lr: keys.lr,
            weight_decay: keys.weight_decay,
            no_decay: keys.no_decay,
            groups: keys.groups,
            clip_grad_value: keys.clip_grad_value,
            clip_grad_norm: keys.clip_grad_norm,
            state_dtype: keys.state_dtype,
        }
    }
}

impl Optimizer {
    /// Whether weight decay applies to the parameter `name` of `dims` dimensions.
    pub fn decays(&self, name: &str, dims: usize) -> bool {
        !self.no_decay.iter().any(|pattern| match pattern.as_str() {
            "1d" => dims == 1,
            pattern => matches_pattern(pattern, name),
        })
    }
}

/// Whether `name` is `pattern`, in which `*` stands for any text, none included.
pub fn matches_pattern(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else {
        return false;
    };
    let Some(last) = parts.next_back() else {
        return rest.is_empty();
    };
    // The leftmost place is always right for the parts between two stars.
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

fn patterns<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let patterns = Vec::<String>::deserialize(deserializer)?;
    match patterns.is_empty() || patterns.iter().any(String::is_empty) {
        true => Err(D::Error::custom(format!(
            "expected names of parameters such as [\"text_encoder.*\"], got {patterns:?}"
        ))),
        false => Ok(patterns),
    }
}

// Back to RON, all defaults written out.

impl Optimizer {
    pub(crate) fn to_value(&self) -> Value {
        let mut keys = self.choice.keys();
        keys.extend([
            ("lr", Value::float(self.lr)),
            ("weight_decay", Value::float(self.weight_decay)),
            ("no_decay", Value::strings(&self.no_decay)),
            ("groups", Kind::List(self.groups.iter().map(ParamGroup::to_value).collect()).into()),
            ("clip_grad_value", Value::optional(self.clip_grad_value.map(Value::float))),
            ("clip_grad_norm", Value::optional(self.clip_grad_norm.map(Value::float))),
            ("state_dtype", self.state_dtype.to_value()),
        ]);
        Value::section(keys)
    }
}

impl ParamGroup {
    fn to_value(&self) -> Value {
        Value::section([
            ("params", Value::strings(&self.params)),
            ("lr", Value::optional(self.lr.map(Value::float))),
            ("weight_decay", Value::optional(self.weight_decay.map(Value::float))),
            ("freeze", Kind::Bool(self.freeze).into()),
            ("freeze_epochs", Value::int(self.freeze_epochs)),
        ])
    }
}
