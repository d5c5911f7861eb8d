//! What a plugin says of itself, for people and for programs: `plugins inspect`.

use crate::config::{Schema, number_text};
use crate::error::PluginError;
use crate::plugin::Plugin;
use clip_host_plugin_api::describe::{Descriptor, Kind};
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::export::Request;
use clip_host_plugin_api::ir::{DType, Fragment, Init, Node, Op};
use clip_host_plugin_api::loss::LossRequest;
use clip_host_plugin_api::optimizer::{OptimizerRequest, ParamInfo};
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
        let prefix = format!("{name}.");
        rows.push(Setting {
            name,
            kind: schema.type_text(property),
            default: default.clone(),
            range,
            doc: doc(property, &all),
        });
        // A struct that may be left out: its row says so, and its settings follow.
        let is_null = |one: &Value| one.get("type").is_some_and(|kind| kind == "null");
        if let [inner] = all.iter().filter(|one| !is_null(one)).collect::<Vec<_>>()[..]
            && inner.get("properties").is_some()
            && depth < 4
        {
            collect(schema, inner, &default, &prefix, depth + 1, rows);
        }
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

/// What a plugin builds for a small batch.
pub struct Example {
    /// The batch in words.
    pub of: String,
    pub fragment: Fragment,
}

/// A tensor that comes into a fragment from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Leaf {
    pub name: String,
    /// `input`, fed at every step; `param`, trained; `state`, kept from step to step.
    pub role: &'static str,
    pub shape: Vec<usize>,
    /// `f32` or `i32`.
    #[serde(rename = "type")]
    pub dtype: &'static str,
    /// How the first values are drawn, in words; empty for inputs.
    pub start: String,
}

impl Example {
    /// Builds it. `None` for a scheduler, which builds nothing.
    ///
    /// # Errors
    /// The plugin's refusal of the settings.
    pub fn build(plugin: &Plugin, config: &Value) -> Result<Option<Example>, PluginError> {
        let config = config.clone();
        let (of, request) = match plugin.kind() {
            Kind::Scheduler => return Ok(None),
            Kind::Loss => {
                let (batch, embed_dim, dataset_size) = (4, 8, 100);
                let of = format!("{batch} pairs with features of width {embed_dim}, of {dataset_size} samples");
                (of, Request::Loss(LossRequest { config, batch, embed_dim, dataset_size }))
            }
            Kind::Optimizer => {
                let info = ParamInfo { name: "weight".into(), shape: vec![5, 7], weight_decay: 0.01 };
                let of = format!("a weight {:?} that decays by {}", info.shape, info.weight_decay);
                (of, Request::Optimizer(OptimizerRequest { config, info }))
            }
            Kind::Encoder => {
                let (batch, training) = (2, true);
                let request =
                    |input| Request::Encoder(EncoderRequest { config: config.clone(), batch, input, training });
                // It takes texts or images; what it says of images is told if it takes neither.
                let (height, width, length) = (224, 224, 30);
                let texts = request(InputShape::Text { length });
                match plugin.fragment(&texts) {
                    Ok(_) => (format!("{batch} texts of {length} tokens, in training"), texts),
                    Err(_) => {
                        let of = format!("{batch} images of {height} × {width}, in training");
                        (of, request(InputShape::Image { height, width }))
                    }
                }
            }
        };
        Ok(Some(Example { of, fragment: plugin.fragment(&request)? }))
    }

    /// Inputs that are read, parameters and states, in the fragment's order.
    pub fn leaves(&self) -> Vec<Leaf> {
        let nodes = &self.fragment.nodes;
        let read = |id: usize| nodes.iter().any(|node| node.inputs.iter().any(|&input| input as usize == id));
        let leaf = |(id, node): (usize, &Node)| {
            let (name, role, start) = match &node.op {
                Op::Input { name } if read(id) => (name, "input", String::new()),
                Op::Param { name, init } => (name, "param", start(*init)),
                Op::State { name, init } => (name, "state", start(*init)),
                _ => return None,
            };
            let dtype = match node.dtype {
                DType::F32 => "f32",
                DType::I32 => "i32",
            };
            Some(Leaf { name: name.clone(), role, shape: node.shape.clone(), dtype, start })
        };
        nodes.iter().enumerate().filter_map(leaf).collect()
    }

    /// The names of what comes out: results, and numbers to log.
    fn results(&self) -> [Vec<&str>; 2] {
        [&self.fragment.outputs, &self.fragment.metrics].map(|all| all.iter().map(|(name, _)| name.as_str()).collect())
    }

    fn write(&self, text: &mut String, fragment: bool) {
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(text, "\nFor {} it builds {} ops, from\n", self.of, self.fragment.nodes.len());
        let rows = self.leaves().into_iter().map(|leaf| {
            let shape = match leaf.dtype {
                "f32" => format!("{:?}", leaf.shape),
                dtype => format!("{:?} {dtype}", leaf.shape),
            };
            [leaf.name, leaf.role.to_string(), shape, leaf.start]
        });
        table(text, ["tensor", "role", "shape", "first value"], rows);
        let [outputs, metrics] = self.results();
        let _ = writeln!(text, "\nand gives {}.", outputs.join(", "));
        if !metrics.is_empty() {
            let _ = writeln!(text, "It logs {}.", metrics.join(", "));
        }
        let _ = match fragment {
            true => write!(text, "\n{}", self.fragment.to_text()),
            false => writeln!(text, "--fragment prints the ops."),
        };
    }
}

/// How first values are drawn, with numbers to five places.
fn start(init: Init) -> String {
    let number = |exact: f64| number_text(format!("{exact:.4e}").parse().unwrap_or(exact));
    match init {
        Init::Constant(value) => number(value),
        Init::Normal { std } => format!("normal, std {}", number(std)),
        Init::TruncatedNormal { std } => format!("normal, std {}, within two of them", number(std)),
        Init::Uniform { bound } => format!("uniform in ±{}", number(bound)),
    }
}

/// A plugin's description as JSON: what `text` tells, the schema itself, and the fragment in full.
pub fn json(plugin: &Plugin, config: Option<&Value>) -> Value {
    let descriptor = plugin.descriptor();
    let builds = config.map(|config| match Example::build(plugin, config) {
        Ok(None) => Value::Null,
        Ok(Some(example)) => {
            let [outputs, metrics] = example.results();
            json!({
                "of": example.of,
                "leaves": example.leaves(),
                "outputs": outputs,
                "metrics": metrics,
                "fragment": example.fragment.to_text(),
            })
        }
        Err(error) => json!({ "error": error.to_string() }),
    });
    json!({
        "kind": descriptor.kind,
        "id": descriptor.id,
        "version": descriptor.version,
        "doc": descriptor.doc,
        "held_constant": descriptor.held_constant,
        "abi": descriptor.abi,
        "ir": descriptor.ir,
        "file": plugin.file().to_string_lossy(),
        "sha256": plugin.sha256(),
        "settings": settings(descriptor),
        "schema": descriptor.schema,
        "defaults": descriptor.defaults,
        "config": config,
        "builds": builds,
    })
}

/// A plugin's description as text, ending in a newline: about itself, its settings, and what it builds with the complete
/// settings `config`, in full with `fragment`.
pub fn text(plugin: &Plugin, config: Option<&Value>, fragment: bool) -> String {
    let descriptor = plugin.descriptor();
    let mut text = format!("{} `{}` {}\n", descriptor.kind, descriptor.id, descriptor.version);
    for line in descriptor.doc.lines() {
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(text, "{}", line.trim_end());
    }
    if let Some(what) = &descriptor.held_constant {
        let _ = writeln!(text, "Its gradient holds constant: {what}.");
    }
    let _ = writeln!(text, "\nfile    {}", plugin.file().display());
    let _ = writeln!(text, "sha256  {}", plugin.sha256());
    let _ = writeln!(text, "abi     {}, ir {}\n", descriptor.abi, descriptor.ir);
    let settings = settings(descriptor);
    if settings.is_empty() {
        text.push_str("It has no settings.\n");
    } else {
        let rows = settings.into_iter().map(|s| [s.name, s.kind, s.default.to_string(), s.range, s.doc]);
        table(&mut text, ["setting", "type", "default", "range", "meaning"], rows);
    }
    match config.map(|config| Example::build(plugin, config)) {
        None => {
            text.push_str("\nNot all settings have a default: --config '(…)' gives them and shows what it builds.\n")
        }
        Some(Err(error)) => {
            let _ = writeln!(text, "\nWith these settings it builds nothing: {error}");
        }
        Some(Ok(Some(example))) => example.write(&mut text, fragment),
        Some(Ok(None)) => {}
    }
    text
}

/// Rows below a head, in columns.
fn table<const N: usize>(text: &mut String, head: [&str; N], rows: impl Iterator<Item = [String; N]>) {
    let rows: Vec<[String; N]> = std::iter::once(head.map(String::from)).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
}
