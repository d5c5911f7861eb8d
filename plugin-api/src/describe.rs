//! What a plugin says of itself.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The four kinds of plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Loss,
    Optimizer,
    Encoder,
    Scheduler,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::Loss => "loss",
            Kind::Optimizer => "optimizer",
            Kind::Encoder => "encoder",
            Kind::Scheduler => "scheduler",
        })
    }
}

/// What every plugin has: a name, a sentence about itself and settings.
///
/// The settings are a struct with `#[derive(Serialize, Deserialize, JsonSchema)]` and
/// `#[serde(default, deny_unknown_fields)]`. Doc comments become the settings' documentation and
/// `#[schemars(range(min = 0.0))]` their range; the host checks recipes against both.
pub trait Plugin {
    type Config: Serialize + DeserializeOwned + JsonSchema + Default;
    /// The name that recipes use: lower-case letters, digits and `_`.
    const ID: &'static str;
    /// What it computes and where it was published, for `plugins inspect`.
    const DOC: &'static str;
}

/// The answer to `describe`, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Descriptor {
    pub kind: Kind,
    pub id: String,
    /// The plugin crate's version.
    pub version: String,
    pub doc: String,
    /// [`crate::abi::ABI_VERSION`] that the plugin was built with.
    pub abi: u32,
    /// [`crate::ir::IR_VERSION`] that the plugin was built with.
    pub ir: u32,
    /// JSON Schema of the settings.
    pub schema: serde_json::Value,
    /// The settings' defaults.
    pub defaults: serde_json::Value,
    /// [`crate::loss::Loss::HELD_CONSTANT`]; absent in what older plugins say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_constant: Option<String>,
}

impl Descriptor {
    pub(crate) fn of<P: Plugin>(kind: Kind, version: &str) -> Self {
        Descriptor {
            kind,
            id: P::ID.into(),
            version: version.into(),
            doc: P::DOC.into(),
            abi: crate::abi::ABI_VERSION,
            ir: crate::ir::IR_VERSION,
            schema: schemars::schema_for!(P::Config).to_value(),
            defaults: serde_json::to_value(P::Config::default()).unwrap_or_default(),
            held_constant: None,
        }
    }
}
