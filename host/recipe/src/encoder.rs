//! An encoder of the `model` section: the plugin, and weights to begin with.

use crate::sections::{Dtype, PluginChoice, path, plugin_id, sha256};
use crate::value::Value;
use serde::Deserialize;
use std::path::PathBuf;

/// An encoder plugin and its first weights: `(plugin: "resnet", weights: "resnet50.safetensors")`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(from = "EncoderKeys")]
pub struct Encoder {
    /// The plugin.
    pub choice: PluginChoice,
    /// A safetensors file with weights under their published names, which a run begins with; without it they are drawn.
    pub weights: Option<PathBuf>,
    /// SHA-256 that this file must have, in hexadecimal.
    pub weights_sha256: Option<String>,
    /// What its parameters are kept in while they are trained. With `Bf16`, the text encoder's are Radford et al.'s (2021)
    /// half-precision stochastically rounded weights. Exported weights are f32.
    pub weights_dtype: Dtype,
}

#[derive(Deserialize)]
#[serde(rename = "Encoder", deny_unknown_fields)]
struct EncoderKeys {
    #[serde(deserialize_with = "plugin_id")]
    plugin: String,
    #[serde(default)]
    config: serde_json::Map<String, serde_json::Value>,
    #[serde(default)]
    path: Option<PathBuf>,
    #[serde(default, deserialize_with = "sha256")]
    sha256: Option<String>,
    #[serde(default)]
    weights: Option<PathBuf>,
    #[serde(default, deserialize_with = "sha256")]
    weights_sha256: Option<String>,
    #[serde(default)]
    weights_dtype: Dtype,
}

impl From<EncoderKeys> for Encoder {
    fn from(keys: EncoderKeys) -> Self {
        Encoder {
            choice: PluginChoice { plugin: keys.plugin, config: keys.config, path: keys.path, sha256: keys.sha256 },
            weights: keys.weights,
            weights_sha256: keys.weights_sha256,
            weights_dtype: keys.weights_dtype,
        }
    }
}

impl Encoder {
    pub(crate) fn to_value(&self) -> Value {
        let mut keys = self.choice.keys();
        if let Some(file) = &self.weights {
            keys.push(("weights", path(file)));
        }
        if let Some(sum) = &self.weights_sha256 {
            keys.push(("weights_sha256", Value::string(sum)));
        }
        keys.push(("weights_dtype", self.weights_dtype.to_value()));
        Value::section(keys)
    }
}
