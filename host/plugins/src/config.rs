//! A recipe's settings against a plugin's JSON Schema: every mistake at once, and all defaults written out.
//!
//! What is understood is what schemars 1 makes of a settings struct: objects with `additionalProperties`, `required` and
//! defaults, numbers with ranges, strings with choices, lists and tuples, `$ref`, and alternatives (`anyOf`, `oneOf`, lists
//! of types). Other keywords constrain nothing here; the plugin's own deserialisation still sees the value.

use clip_host_plugin_api::describe::Descriptor;
use clip_host_recipe::{Part, name_hint, nearest};
use serde_json::{Map, Value};
use thiserror::Error;

/// One mistake in a plugin's settings.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{plugin}: `{path}`: {message}{}", hint.as_ref().map(|hint| format!("\nhint: {hint}")).unwrap_or_default())]
pub struct ConfigError {
    /// Kind and id, "loss plugin `clip`".
    pub plugin: String,
    /// Where, inside `config`: `betas[1]`, `schedule.warmup`. Of a missing key, where it would be.
    pub path: String,
    /// Whether the key or its value is wrong; with path, message and hint what [`clip_host_recipe::Recipe::error_at`] shows
    /// in the recipe's text.
    pub part: Part,
    /// What was expected and what was got.
    pub message: String,
    pub hint: Option<String>,
}

/// Checks `config` and fills in what it leaves out. Numbers come out as the schema's type (a `1` given for a float is
/// `1.0`), so that equal settings are equal values.
pub fn complete(descriptor: &Descriptor, config: &Map<String, Value>) -> Result<Value, Vec<ConfigError>> {
    let root = &descriptor.schema;
    let mut check = Check {
        plugin: format!("{} plugin `{}`", descriptor.kind, descriptor.id),
        schema: Schema { definitions: root.get("$defs") },
        errors: vec![],
    };
    // A plugin without settings may have a unit for its settings struct, whose schema is null.
    if root.get("type").and_then(Value::as_str) == Some("null") {
        for key in config.keys() {
            check.unknown_key(key, "", &[]);
        }
        return if check.errors.is_empty() { Ok(Value::Null) } else { Err(check.errors) };
    }
    let value = check.object(root, config, "", descriptor.defaults.as_object());
    if check.errors.is_empty() { Ok(value) } else { Err(check.errors) }
}

/// Reads schemas; knows the definitions that `$ref` names.
#[derive(Clone, Copy)]
pub(crate) struct Schema<'s> {
    pub definitions: Option<&'s Value>,
}

impl<'s> Schema<'s> {
    /// Follows `$ref`.
    pub fn resolve(&self, mut schema: &'s Value) -> &'s Value {
        // A definition that is only a reference to itself would go round for ever.
        for _ in 0..16 {
            let Some(name) = schema.get("$ref").and_then(Value::as_str).and_then(|r| r.strip_prefix("#/$defs/")) else {
                break;
            };
            let Some(target) = self.definitions.and_then(|definitions| definitions.get(name)) else { break };
            schema = target;
        }
        schema
    }

    /// The alternatives of a schema, flattened; one that has none is its own.
    pub fn alternatives(&self, schema: &'s Value) -> Vec<&'s Value> {
        let mut flat = vec![];
        self.flatten(schema, 0, &mut flat);
        flat
    }

    fn flatten(&self, schema: &'s Value, depth: usize, flat: &mut Vec<&'s Value>) {
        let schema = self.resolve(schema);
        match schema.get("anyOf").or_else(|| schema.get("oneOf")).and_then(Value::as_array) {
            Some(all) if depth < 16 => all.iter().for_each(|one| self.flatten(one, depth + 1, flat)),
            _ => flat.push(schema),
        }
    }

    /// The types that an alternative allows, `None` if it does not say.
    fn types(schema: &'s Value) -> Option<Vec<&'s str>> {
        match schema.get("type")? {
            Value::String(one) => Some(vec![one]),
            Value::Array(all) => Some(all.iter().filter_map(Value::as_str).collect()),
            _ => None,
        }
    }

    /// The strings that an alternative allows, if it is a choice.
    fn choices(schema: &'s Value) -> Option<Vec<&'s str>> {
        if let Some(only) = schema.get("const").and_then(Value::as_str) {
            return Some(vec![only]);
        }
        let all: Vec<&str> = schema.get("enum")?.as_array()?.iter().filter_map(Value::as_str).collect();
        Some(all)
    }

    /// A type as a person says it: "number", "list of 2 numbers", "`a` or `b`", "integer or null".
    pub fn type_text(&self, schema: &'s Value) -> String {
        let mut names: Vec<String> = vec![];
        let mut null = false;
        for one in self.alternatives(schema) {
            if let Some(choices) = Self::choices(one) {
                names.extend(choices.iter().map(|choice| format!("`{choice}`")));
                null |= one.get("enum").and_then(Value::as_array).is_some_and(|all| all.contains(&Value::Null));
                continue;
            }
            for kind in Self::types(one).unwrap_or(vec!["any value"]) {
                match kind {
                    "null" => null = true,
                    "array" => names.push(self.list_text(one)),
                    "object" => names.push(object_text(one)),
                    "boolean" => names.push("true or false".into()),
                    other => names.push(other.into()),
                }
            }
        }
        if null {
            names.push("null".into());
        }
        any_of(&names)
    }

    fn list_text(&self, schema: &'s Value) -> String {
        let size = |key: &str| schema.get(key).and_then(Value::as_u64);
        let count = match (size("minItems"), size("maxItems")) {
            (Some(low), Some(high)) if low == high => format!("list of {low}"),
            (None | Some(0), None) => "list of".into(),
            (None | Some(0), Some(high)) => format!("list of at most {high}"),
            (Some(low), None) => format!("list of at least {low}"),
            (Some(low), Some(high)) => format!("list of {low} to {high}"),
        };
        match schema.get("items") {
            Some(items) if items.is_object() => match self.type_text(items).as_str() {
                plain @ ("number" | "integer" | "string") => format!("{count} {plain}s"),
                other => format!("{count} ({other})"),
            },
            _ => format!("{count} values"),
        }
    }

    /// The range of a number, for instance "greater than 0, at most 1"; empty if there is none worth telling.
    pub fn range_text(&self, schema: &'s Value) -> String {
        let bounds: Vec<String> = BOUNDS
            .iter()
            .filter_map(|(key, words, _)| Some(format!("{words} {}", number_text(limit(schema, key)?))))
            .collect();
        bounds.join(", ")
    }
}

/// Keyword, words and test of each bound that a number can have.
type Bound = (&'static str, &'static str, fn(f64, f64) -> bool);
const BOUNDS: [Bound; 4] = [
    ("exclusiveMinimum", "greater than", |value, bound| value > bound),
    ("minimum", "at least", |value, bound| value >= bound),
    ("exclusiveMaximum", "less than", |value, bound| value < bound),
    ("maximum", "at most", |value, bound| value <= bound),
];

/// A number's bound: the schema's, or that of its integer format.
fn limit(schema: &Value, key: &str) -> Option<f64> {
    schema.get(key).and_then(Value::as_f64).or_else(|| match (key, schema.get("format")?.as_str()?) {
        ("maximum", "uint32") => Some(u32::MAX.into()),
        ("maximum", "int32") => Some(i32::MAX.into()),
        ("minimum", "int32") => Some(i32::MIN.into()),
        _ => None,
    })
}

/// A number as one would write it: with an exponent where zeros would have to be counted.
pub(crate) fn number_text(number: f64) -> String {
    match number.abs() {
        size if size != 0.0 && !(1e-4..1e15).contains(&size) => format!("{number:e}"),
        _ => format!("{number}"),
    }
}

/// A struct, or a variant with data of an enum: an object whose one key is the variant.
fn object_text(schema: &Value) -> String {
    let keys: Vec<&String> =
        schema.get("properties").and_then(Value::as_object).into_iter().flat_map(Map::keys).collect();
    match keys[..] {
        [key] if required(schema).contains(&key.as_str()) => format!("`{key}: …`"),
        _ => "object".into(),
    }
}

fn required(schema: &Value) -> Vec<&str> {
    schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
}

fn any_of(names: &[String]) -> String {
    match names {
        [] => "any value".into(),
        [one] => one.clone(),
        [head @ .., last] => format!("{} or {last}", head.join(", ")),
    }
}

fn got(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => format!("\"{text}\""),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".into(),
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.into() } else { format!("{path}.{key}") }
}

struct Check<'s> {
    plugin: String,
    schema: Schema<'s>,
    errors: Vec<ConfigError>,
}

impl<'s> Check<'s> {
    fn error(&mut self, path: &str, part: Part, message: String, hint: Option<String>) {
        self.errors.push(ConfigError { plugin: self.plugin.clone(), path: path.into(), part, message, hint });
    }

    fn unknown_key(&mut self, key: &str, path: &str, valid: &[&str]) {
        let hint = name_hint(key, "keys", valid);
        let message = format!("unknown setting `{key}` of {}", self.plugin);
        self.error(&join(path, key), Part::Key, message, hint);
    }

    /// Checks a value and returns it in the schema's own types.
    fn value(&mut self, schema: &'s Value, value: &Value, path: &str) -> Value {
        let all = self.schema.alternatives(schema);
        let [only] = all[..] else {
            return self.one_of(schema, &all, value, path);
        };
        self.plain(only, value, path)
    }

    /// A value for which there are alternatives: the first that fits.
    fn one_of(&mut self, schema: &'s Value, all: &[&'s Value], value: &Value, path: &str) -> Value {
        let mut attempts = vec![];
        for one in all {
            let mut attempt = Check { plugin: self.plugin.clone(), schema: self.schema, errors: vec![] };
            let fitted = attempt.plain(one, value, path);
            if attempt.errors.is_empty() {
                return fitted;
            }
            // An alternative of the value's own type is what was meant: its errors are deeper down.
            if is_meant(one, value) {
                attempts.push(attempt.errors);
            }
        }
        let choices: Vec<&str> = all.iter().filter_map(|one| Schema::choices(one)).flatten().collect();
        match (attempts.len(), value) {
            (1, _) => self.errors.append(&mut attempts[0]),
            (_, Value::String(text)) if !choices.is_empty() => self.choice(text, &choices, path),
            _ => self.wrong_type(schema, value, path),
        }
        value.clone()
    }

    fn wrong_type(&mut self, schema: &'s Value, value: &Value, path: &str) {
        let message = format!("expected {}, got {}", self.schema.type_text(schema), got(value));
        self.error(path, Part::Value, message, None);
    }

    fn choice(&mut self, text: &str, choices: &[&str], path: &str) {
        let all: Vec<String> = choices.iter().map(|choice| format!("`{choice}`")).collect();
        let hint = nearest(text, choices.iter().copied()).map(|near| format!("did you mean `{near}`?"));
        self.error(path, Part::Value, format!("expected {}, got \"{text}\"", any_of(&all)), hint);
    }

    /// A value against a schema without alternatives, other than a list of types.
    fn plain(&mut self, schema: &'s Value, value: &Value, path: &str) -> Value {
        let types = Schema::types(schema);
        let allows = |kind: &str| types.as_ref().is_none_or(|types| types.contains(&kind));
        if let Some(choices) = Schema::choices(schema)
            && let Value::String(text) = value
        {
            if !choices.contains(&text.as_str()) {
                self.choice(text, &choices, path);
            }
            return value.clone();
        }
        match value {
            Value::Null if allows("null") => value.clone(),
            Value::Bool(_) if allows("boolean") => value.clone(),
            Value::String(_) if allows("string") => value.clone(),
            Value::Number(number) if types.is_none() || allows("number") || allows("integer") => {
                self.range(schema, number, path);
                match number.as_f64().and_then(serde_json::Number::from_f64) {
                    // `integer` takes whole numbers only; where nothing is said, the number stays what it is.
                    Some(float) if types.is_some() && allows("number") => Value::Number(float),
                    _ => {
                        if !allows("number") && number.is_f64() {
                            let whole = number.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 9e15);
                            let hint = whole.map(|f| format!("write it without a fraction: {f:.0}"));
                            let message = format!("expected {}, got {number}", self.schema.type_text(schema));
                            self.error(path, Part::Value, message, hint);
                        }
                        value.clone()
                    }
                }
            }
            Value::Array(items) if allows("array") => self.list(schema, items, path),
            Value::Object(map) if allows("object") => self.object(schema, map, path, None),
            _ => {
                self.wrong_type(schema, value, path);
                value.clone()
            }
        }
    }

    fn range(&mut self, schema: &'s Value, number: &serde_json::Number, path: &str) {
        let Some(value) = number.as_f64() else { return };
        let inside = BOUNDS.iter().all(|(key, _, test)| limit(schema, key).is_none_or(|bound| test(value, bound)));
        if !inside {
            let message = format!("expected a value {}, got {number}", self.schema.range_text(schema));
            self.error(path, Part::Value, message, None);
        }
    }

    fn list(&mut self, schema: &'s Value, items: &[Value], path: &str) -> Value {
        let size = |key: &str| schema.get(key).and_then(Value::as_u64);
        let count = items.len() as u64;
        if size("minItems").is_some_and(|low| count < low) || size("maxItems").is_some_and(|high| count > high) {
            let message = format!("expected a {}, got {count}", self.schema.list_text(schema));
            self.error(path, Part::Value, message, None);
            return Value::Array(items.to_vec());
        }
        let tuple = schema.get("prefixItems").and_then(Value::as_array);
        let items = items.iter().enumerate().map(|(i, item)| {
            match tuple.and_then(|tuple| tuple.get(i)).or_else(|| schema.get("items")) {
                Some(schema) => self.value(schema, item, &format!("{path}[{i}]")),
                None => item.clone(),
            }
        });
        Value::Array(items.collect())
    }

    /// An object; `defaults` go before the defaults that its properties state.
    fn object(
        &mut self,
        schema: &'s Value,
        given: &Map<String, Value>,
        path: &str,
        defaults: Option<&Map<String, Value>>,
    ) -> Value {
        let none = Map::new();
        let properties = schema.get("properties").and_then(Value::as_object);
        let others = schema.get("additionalProperties");
        let mut complete = Map::new();
        for (key, property) in properties.into_iter().flatten() {
            let here = join(path, key);
            if let Some(value) = given.get(key) {
                let value = self.value(property, value, &here);
                complete.insert(key.clone(), value);
                continue;
            }
            match defaults.unwrap_or(&none).get(key).or_else(|| property.get("default")) {
                Some(default) => {
                    complete.insert(key.clone(), default.clone());
                }
                None if required(schema).contains(&key.as_str()) => {
                    let message = format!("expected {}, got nothing", self.schema.type_text(property));
                    self.error(&here, Part::Key, message, Some(format!("`{key}` has no default: it must be given")));
                }
                None => {}
            }
        }
        let valid: Vec<&str> = properties.into_iter().flat_map(Map::keys).map(String::as_str).collect();
        for (key, value) in given.iter().filter(|(key, _)| !valid.contains(&key.as_str())) {
            match others {
                Some(Value::Bool(false)) => self.unknown_key(key, path, &valid),
                Some(schema) if schema.is_object() => {
                    let value = self.value(schema, value, &join(path, key));
                    complete.insert(key.clone(), value);
                }
                // Without a word on other keys serde drops them: a slip would go unnoticed.
                None if properties.is_some() => self.unknown_key(key, path, &valid),
                _ => {
                    complete.insert(key.clone(), value.clone());
                }
            }
        }
        Value::Object(complete)
    }
}

/// Whether a value that does not fit an alternative was surely meant for it.
fn is_meant(schema: &Value, value: &Value) -> bool {
    let Some(types) = Schema::types(schema) else { return false };
    match value {
        Value::Object(map) => {
            // Of an enum's variants, the one whose key is there.
            let properties = schema.get("properties").and_then(Value::as_object);
            let keys = required(schema);
            types.contains(&"object")
                && (keys.is_empty() || keys.iter().any(|key| map.contains_key(*key)) || properties.is_none())
        }
        Value::Array(_) => types.contains(&"array"),
        Value::Number(_) => types.contains(&"number") || types.contains(&"integer"),
        _ => false,
    }
}
