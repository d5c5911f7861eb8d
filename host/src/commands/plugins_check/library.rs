//! Is it a plugin, what does it say of itself, and does it get on with the others?

use super::report::{Fault, Finding};
use super::{Check, Subject};
use crate::cli::PluginsCheckArgs;
use clip_host_plugin_api::ir::IR_VERSION;
use clip_host_plugins::{Plugin, Registry};
use serde_json::{Value, json};
use std::time::Instant;

pub const SCAN_TIME: &str = "scan time";
pub const SETTINGS: &str = "settings";

/// The check before all others.
pub const LOADS: Check = Check {
    name: "loads",
    about: "The library opens, its table of functions is one that this program knows, and it says what it is.",
    needs_settings: false,
    // The parent needs the facts: answered where the library is loaded.
    run: |_| Ok(Finding::Ok(String::new())),
};

pub const CHECKS: [Check; 5] = [
    Check {
        name: SCAN_TIME,
        about: "Opening and describing takes no noticeable time: every command does it with every plugin it finds.",
        needs_settings: false,
        run: |subject| scan_time(subject.args, subject.before.clone()),
    },
    Check {
        name: "describes itself",
        about: "It says in a sentence what it computes, has a version, and was built for an IR that this program reads.",
        needs_settings: false,
        run: describes,
    },
    Check {
        name: "id",
        about: "No other file on the search path holds a plugin of this kind and id.",
        needs_settings: false,
        run: id,
    },
    Check {
        name: SETTINGS,
        about: "The schema of the settings holds for their own defaults, and for those given with --config.",
        needs_settings: false,
        run: settings,
    },
    Check {
        name: "unknown settings",
        about: "A setting that is not there is refused, not dropped in silence.",
        needs_settings: false,
        run: unknown_settings,
    },
];

/// The most that opening a plugin may take, in milliseconds.
const MOST_MS: f64 = 1000.0;

/// The time to read, hash, open and describe a library. Measured once more in another process if it is long: the machine
/// may have been busy.
pub fn scan_time(args: &PluginsCheckArgs, before: Option<Value>) -> Result<Finding, Fault> {
    let begin = Instant::now();
    Plugin::load(&args.file).map_err(Fault::told)?;
    let now = begin.elapsed().as_secs_f64() * 1e3;
    let best = before.as_ref().and_then(Value::as_f64).map_or(now, |before| before.min(now));
    match (best <= MOST_MS, before) {
        (true, _) => Ok(Finding::Ok(format!("It took {best:.1} ms, of {MOST_MS:.0} ms at most."))),
        (false, None) => Ok(Finding::Again(json!(best))),
        (false, Some(_)) => Err(Fault::new(
            "opening the library in two fresh processes",
            format!("at most {MOST_MS:.0} ms"),
            format!("{best:.0} ms at best"),
            "leave work to `build`: nothing but the description is needed when a library is opened",
        )),
    }
}

fn describes(subject: &Subject) -> Result<Finding, Fault> {
    let descriptor = subject.plugin.descriptor();
    if descriptor.doc.trim().is_empty() {
        let hint = "say in a sentence what it computes and where it was published";
        return Err(Fault::new("reading DOC", "a sentence", "nothing", hint));
    }
    if descriptor.version.trim().is_empty() {
        let hint = "`version` in its Cargo.toml; runs record it";
        return Err(Fault::new("reading the version", "one such as 0.1.0", "nothing", hint));
    }
    if descriptor.ir > IR_VERSION {
        let hint = "update the host, or build the plugin with the host's clip-host-plugin-api";
        let (expected, got) = (format!("at most {IR_VERSION}"), descriptor.ir.to_string());
        return Err(Fault::new("reading its IR version", expected, got, hint));
    }
    let first = descriptor.doc.lines().next().unwrap_or_default().trim_end();
    Ok(Finding::Ok(format!("It says: {first}")))
}

fn id(subject: &Subject) -> Result<Finding, Fault> {
    let plugin = &subject.plugin;
    let registry = Registry::scan(&subject.args.path);
    let own = plugin.file().canonicalize().ok();
    let other = registry.list().iter().find(|other| {
        // The same library, found under this path or another, is one plugin.
        let same = other.sha256() == plugin.sha256() || (own.is_some() && other.file().canonicalize().ok() == own);
        (other.kind(), other.id()) == (plugin.kind(), plugin.id()) && !same
    });
    match other {
        None => {
            let count = registry.list().len();
            Ok(Finding::Ok(format!(
                "{count} plugins were found; none but this is {} `{}`.",
                plugin.kind(),
                plugin.id()
            )))
        }
        Some(other) => Err(Fault::new(
            format!("looking for other {} plugins `{}`", plugin.kind(), plugin.id()),
            "none",
            format!("version {} in {}", other.version(), other.file().display()),
            "choose another ID, or take the other file off the search path: recipes could not tell them apart",
        )),
    }
}

fn settings(subject: &Subject) -> Result<Finding, Fault> {
    let descriptor = subject.plugin.descriptor();
    let none = serde_json::Map::new();
    let defaults = match &descriptor.defaults {
        Value::Object(defaults) => defaults,
        // A unit struct for settings: there are none.
        _ => &none,
    };
    if let Err(errors) = subject.plugin.complete(defaults) {
        let told: Vec<String> = errors.iter().map(|error| format!("`{}`: {}", error.path, error.message)).collect();
        return Err(Fault::new(
            "comparing the defaults with the schema",
            "defaults that it allows",
            told.join("; "),
            "a default must lie in its own `range`: widen the range or move the default",
        ));
    }
    let count = descriptor.schema.get("properties").and_then(Value::as_object).map_or(0, serde_json::Map::len);
    Ok(Finding::Ok(match count {
        0 => "It has no settings.".into(),
        count => format!("It has {count}."),
    }))
}

fn unknown_settings(subject: &Subject) -> Result<Finding, Fault> {
    let schema = &subject.plugin.descriptor().schema;
    let closed = schema.get("additionalProperties") == Some(&Value::Bool(false));
    match closed || schema.get("type").and_then(Value::as_str) == Some("null") {
        true => Ok(Finding::Ok("The schema allows no others.".into())),
        false => Err(Fault::new(
            "looking for `additionalProperties: false` in the schema",
            "a schema that allows the plugin's own settings only",
            "one that allows any, so that a slip would go unnoticed",
            "add #[serde(deny_unknown_fields)] to the settings",
        )),
    }
}
