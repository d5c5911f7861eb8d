//! Settings of one plugin, given on the command line and read as a recipe reads them.

use crate::error::CliError;
use clip_host_plugin_api::describe::Kind;
use clip_host_plugins::Plugin;
use clip_host_recipe::{Recipe, RecipeErrors};
use clip_host_train::assemble;
use serde_json::Value;

/// The plugin's complete settings: those of `config`, `(gamma: 0.8)` for instance, and defaults for the others.
pub fn complete(plugin: &Plugin, config: &str) -> Result<Value, CliError> {
    let section = match plugin.kind() {
        Kind::Loss => "loss",
        Kind::Optimizer => "optimizer",
        Kind::Encoder => "model.image_encoder",
        Kind::Scheduler => "scheduler",
    };
    let recipe = frame(section, config)?;
    let config = match plugin.kind() {
        Kind::Loss => &recipe.loss.config,
        Kind::Optimizer => &recipe.optimizer.choice.config,
        Kind::Encoder => &recipe.model.image_encoder.choice.config,
        Kind::Scheduler => &recipe.scheduler.config,
    };
    Ok(plugin.complete(config).map_err(|errors| {
        RecipeErrors(errors.into_iter().map(|error| assemble::config_error(&recipe, section, error)).collect())
    })?)
}

/// A recipe with nothing in it but one plugin's settings, so that these mean what they mean in a recipe.
fn frame(section: &str, config: &str) -> Result<Recipe, RecipeErrors> {
    const FRAME: &str = r#"(data: (), model: (image_encoder: (plugin: "-"), text_encoder: (plugin: "-"), embed_dim: 1),
        loss: (plugin: "-"), optimizer: (plugin: "-", lr: 1.0), scheduler: (plugin: "-"),
        train: (epochs: 1, batch_size: 2))"#;
    Recipe::parse("--config", FRAME, &[format!("{section}.config={config}")])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_as_in_recipes() {
        for section in ["loss", "optimizer", "scheduler", "model.image_encoder"] {
            for config in ["()", "(a: 1, b: (0.5, two), c: Some(\"x\"))"] {
                assert!(frame(section, config).is_ok(), "{section} {config}");
            }
            let error = frame(section, "(a: ").unwrap_err().to_string();
            assert!(error.contains("(a: "), "{error}");
        }
        let config = frame("loss", "(b: (0.5, two))").unwrap().loss.config;
        assert_eq!(serde_json::Value::Object(config), serde_json::json!({"b": [0.5, "two"]}));
    }
}
