//! What a plugin says of itself, for people and for programs: `plugins inspect`.

use crate::config::Schema;
use crate::plugin::Plugin;
use clip_host_plugin_api::describe::Descriptor;
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt::Write;

/// A row of the table of settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// The key in `config`; of a setting inside another, `outer.inner`.
    pub name: String,
    /// The type in words: "number", "list of 2 numbers", "`a` or `b`".
    #[serde(rename = "type")]
    pub kind: String,
    /// The default; null where the setting is off by default or must be given.
    pub default: Value,
    /// The range in words, empty where any value of the type will do.
    pub range: String,
    pub doc: String,
}

/// The settings of a plugin in the order of its schema.
pub fn settings(descriptor: &Descriptor) -> Vec<Setting> {
    let schema = Schema { definitions: descriptor.schema.get("$defs") };
    let mut rows = vec![];
    collect(schema, &descriptor.schema, &descriptor.defaults, "", 0, &mut rows);
    rows
}

fn collect(schema: Schema, object: &Value, defaults: &Value, prefix: &str, depth: usize, rows: &mut Vec<Setting>) {
    for (key, property) in object.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let name = format!("{prefix}{key}");
        let default = defaults.get(key).or_else(|| property.get("default")).cloned().unwrap_or_default();
        let all = schema.alternatives(property);
        // A struct among the settings: its own settings are rows. One that holds itself ends somewhere.
        if let [inner] = all[..]
            && inner.get("properties").is_some()
            && depth < 4
        {
            collect(schema, inner, &default, &format!("{name}."), depth + 1, rows);
            continue;
        }
        let range = all.iter().map(|one| range(schema, one)).find(|range| !range.is_empty()).unwrap_or_default();
        rows.push(Setting { name, kind: schema.type_text(property), default, range, doc: doc(property, &all) });
    }
}

/// The range of a number, or of a list's items.
fn range(schema: Schema, property: &Value) -> String {
    match property.get("items") {
        Some(items) => schema.range_text(items),
        None => schema.range_text(property),
    }
}

/// A setting's documentation on one line, with that of its choices.
fn doc(property: &Value, alternatives: &[&Value]) -> String {
    let words = |schema: &Value| {
        let text = schema.get("description").and_then(Value::as_str).unwrap_or_default();
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let mut text = words(property);
    for one in alternatives.iter().filter(|one| !std::ptr::eq(**one, property)) {
        if let (Some(choice), said) = (one.get("const").and_then(Value::as_str), words(one))
            && !said.is_empty()
        {
            let _ = write!(text, "{}`{choice}`: {said}", if text.is_empty() { "" } else { " " });
        }
    }
    text
}

/// A plugin's description as JSON: what `text` tells, and the schema itself.
pub fn json(plugin: &Plugin) -> Value {
    let descriptor = plugin.descriptor();
    json!({
        "kind": descriptor.kind,
        "id": descriptor.id,
        "version": descriptor.version,
        "doc": descriptor.doc,
        "abi": descriptor.abi,
        "ir": descriptor.ir,
        "file": plugin.file().to_string_lossy(),
        "sha256": plugin.sha256(),
        "settings": settings(descriptor),
        "schema": descriptor.schema,
        "defaults": descriptor.defaults,
    })
}

/// A plugin's description as text, ending in a newline.
pub fn text(plugin: &Plugin) -> String {
    let descriptor = plugin.descriptor();
    let mut text = format!("{} `{}` {}\n", descriptor.kind, descriptor.id, descriptor.version);
    for line in descriptor.doc.lines() {
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(text, "{}", line.trim_end());
    }
    let _ = writeln!(text, "\nfile    {}", plugin.file().display());
    let _ = writeln!(text, "sha256  {}", plugin.sha256());
    let _ = writeln!(text, "abi     {}, ir {}\n", descriptor.abi, descriptor.ir);
    let settings = settings(descriptor);
    if settings.is_empty() {
        text.push_str("It has no settings.\n");
        return text;
    }
    let mut rows = vec![["setting", "type", "default", "range", "meaning"].map(String::from)];
    rows.extend(settings.into_iter().map(|s| [s.name, s.kind, s.default.to_string(), s.range, s.doc]));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 5] = std::array::from_fn(width);
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}
