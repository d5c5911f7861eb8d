//! `clip-host plugins list` and `inspect`.

use crate::cli::{InspectArgs, PluginsListArgs};
use crate::error::CliError;
use crate::output;
use crate::settings;
use clip_host_plugins::{Registry, inspect as describe};
use serde_json::json;

pub fn list(args: &PluginsListArgs) -> Result<(), CliError> {
    let registry = Registry::scan(&args.path);
    let plugins = registry.list();
    for failure in registry.failures() {
        tracing::warn!("{}", failure.error);
    }
    if args.json {
        let rows = plugins.iter().map(|plugin| {
            json!({
                "id": plugin.id(),
                "kind": plugin.kind(),
                "version": plugin.version(),
                "file": plugin.file().to_string_lossy(),
                "abi": plugin.descriptor().abi,
                "sha256": plugin.sha256(),
                "doc": plugin.descriptor().doc,
            })
        });
        return output::json(&rows.collect::<Vec<_>>());
    }
    for plugin in plugins {
        let about = plugin.descriptor().doc.lines().next().unwrap_or_default();
        let (kind, id) = (plugin.kind().to_string(), plugin.id());
        output::line(&format!("{kind:10} {id:20} {:8} {about}", plugin.version()))?;
    }
    if plugins.is_empty() {
        let searched: Vec<String> = registry.searched().iter().map(|path| path.display().to_string()).collect();
        return Err(CliError::Failed(format!(
            "no plugins in {}\nhint: build them (`cargo build --release`), or name their folder with --path",
            searched.join(", ")
        )));
    }
    Ok(())
}

pub fn inspect(args: &InspectArgs) -> Result<(), CliError> {
    let registry = Registry::scan(&args.path);
    let found: Vec<_> = registry.list().iter().filter(|plugin| plugin.id() == args.id).collect();
    if found.is_empty() {
        let ids: Vec<&str> = registry.list().iter().map(|plugin| plugin.id()).collect();
        let hint = clip_host_recipe::name_hint(&args.id, "plugins", &ids);
        let hint = hint.map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
        return Err(CliError::Failed(format!("there is no plugin `{}`{hint}", args.id)));
    }
    let mut described = Vec::new();
    for plugin in found {
        let config = match &args.config {
            Some(config) => Some(settings::complete(plugin, config)?),
            None => plugin.complete(&serde_json::Map::new()).ok(),
        };
        described.push((plugin, config));
    }
    // One id may be a loss's and an encoder's at once.
    if !args.json {
        let texts = described.iter().map(|(plugin, config)| describe::text(plugin, config.as_ref(), args.fragment));
        return output::print(&texts.collect::<Vec<_>>().join("\n"));
    }
    let objects: Vec<_> = described.iter().map(|(plugin, config)| describe::json(plugin, config.as_ref())).collect();
    match objects.as_slice() {
        [object] => output::json(object),
        objects => output::json(&objects),
    }
}
