//! RON as a tree of values that know where they were written.

use crate::span::{KeyPath, Segment, Span};

/// A RON value and its place. Equality ignores the place.
#[derive(Debug, Clone)]
pub struct Value {
    /// What it is.
    pub kind: Kind,
    /// Where it was written.
    pub span: Span,
}

/// The forms a RON value can take.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// `()`: an empty struct, tuple or unit.
    Unit,
    /// `true`, `false`
    Bool(bool),
    /// `3`, `-0x1F`, `1_000u32`
    Int(i128),
    /// `0.5`, `2e-4`, `inf`
    Float(f64),
    /// `'x'`
    Char(char),
    /// `"text"`, `r#"text"#`
    String(String),
    /// `None`, `Some(x)`
    Option(Option<Box<Value>>),
    /// `[a, b]`
    List(Vec<Value>),
    /// `{key: value}`
    Map(Vec<(Value, Value)>),
    /// `Auto`: a unit variant or unit struct.
    Name(String),
    /// `(a, b)`, `Tar("x")`
    Tuple(Option<String>, Vec<Value>),
    /// `(a: 1)`, `Cuda(device: 0)`
    Struct(Option<String>, Vec<Field>),
}

/// `name: value` in a struct.
#[derive(Debug, Clone)]
pub struct Field {
    /// The key.
    pub name: String,
    /// Where the key was written.
    pub name_span: Span,
    /// What it is set to.
    pub value: Value,
}

impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind
    }
}

impl PartialEq for Field {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.value == other.value
    }
}

/// Place of values that no text holds (defaults written out, numbers set by code).
pub(crate) const NOWHERE: Span = Span { source: usize::MAX, start: 0, end: 0 };

impl From<Kind> for Value {
    fn from(kind: Kind) -> Self {
        Value { kind, span: NOWHERE }
    }
}

impl Value {
    /// A struct without a name.
    pub(crate) fn section<'a>(fields: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
        let fields =
            fields.into_iter().map(|(name, value)| Field { name: name.to_string(), name_span: NOWHERE, value });
        Kind::Struct(None, fields.collect()).into()
    }

    pub(crate) fn string(text: &str) -> Value {
        Kind::String(text.to_string()).into()
    }

    pub(crate) fn int(number: impl TryInto<i128>) -> Value {
        // Every integer type of the recipe fits.
        Kind::Int(number.try_into().unwrap_or_default()).into()
    }

    pub(crate) fn float(number: f64) -> Value {
        Kind::Float(number).into()
    }

    pub(crate) fn strings(texts: &[String]) -> Value {
        Kind::List(texts.iter().map(|text| Value::string(text)).collect()).into()
    }

    pub(crate) fn optional(value: Option<Value>) -> Value {
        Kind::Option(value.map(Box::new)).into()
    }

    /// The RON form of a JSON value: objects are structs where their keys allow it, null is `None`.
    pub fn from_json(json: &serde_json::Value) -> Value {
        use serde_json::Value as Json;
        match json {
            Json::Null => Kind::Option(None),
            Json::Bool(b) => Kind::Bool(*b),
            Json::Number(n) => match n.as_i64().map(i128::from).or(n.as_u64().map(i128::from)) {
                Some(int) => Kind::Int(int),
                None => Kind::Float(n.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(s) => Kind::String(s.clone()),
            Json::Array(items) => Kind::List(items.iter().map(Value::from_json).collect()),
            Json::Object(entries) if entries.keys().all(|key| is_identifier(key)) => {
                let fields = entries.iter();
                return Value::section(fields.map(|(k, v)| (k.as_str(), Value::from_json(v))));
            }
            Json::Object(entries) => {
                let entries = entries.iter();
                Kind::Map(entries.map(|(k, v)| (Value::string(k), Value::from_json(v))).collect())
            }
        }
        .into()
    }

    /// What a person would call this value, for "expected ..., got ...".
    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::Unit => "`()`".into(),
            Kind::Bool(b) => format!("`{b}`"),
            Kind::Int(n) => format!("the number {n}"),
            Kind::Float(x) => format!("the number {x:?}"),
            Kind::Char(c) => format!("the character {c:?}"),
            Kind::String(s) if s.chars().count() > 60 => {
                format!("the string {:?}...", s.chars().take(57).collect::<String>())
            }
            Kind::String(s) => format!("the string {s:?}"),
            Kind::Option(None) => "`None`".into(),
            Kind::Option(Some(_)) => "`Some(..)`".into(),
            Kind::List(items) => format!("a list of {}", items.len()),
            Kind::Map(_) => "a map `{..}`".into(),
            Kind::Name(name) => format!("the name `{name}`"),
            Kind::Tuple(Some(name), _) | Kind::Struct(Some(name), _) => format!("`{name}(..)`"),
            Kind::Tuple(None, items) => format!("a tuple of {}", items.len()),
            Kind::Struct(None, _) => "a section `(key: ..)`".into(),
        }
    }

    /// The value one step down. `Some(x)` and `Name(x)` are looked through.
    pub fn step(&self, segment: &Segment) -> Option<&Value> {
        match (&self.kind, segment) {
            (Kind::Struct(_, fields), Segment::Key(key)) => fields.iter().find(|f| f.name == *key).map(|f| &f.value),
            (Kind::Map(entries), Segment::Key(key)) => entries.iter().find(|(k, _)| k.is_key(key)).map(|(_, v)| v),
            (Kind::List(items) | Kind::Tuple(None, items), Segment::Index(i)) => items.get(*i),
            (Kind::Option(Some(inner)), _) => inner.step(segment),
            (Kind::Tuple(Some(_), items), _) => match items.as_slice() {
                [one] => one.step(segment),
                several => match segment {
                    Segment::Index(i) => several.get(*i),
                    Segment::Key(_) => None,
                },
            },
            _ => None,
        }
    }

    /// The value at `path`, if there is one.
    pub fn get(&self, path: &KeyPath) -> Option<&Value> {
        path.0.iter().try_fold(self, |value, segment| value.step(segment))
    }

    /// Takes the field `key` out of this section.
    pub(crate) fn take(&mut self, key: &str) -> Option<Field> {
        match &mut self.kind {
            Kind::Struct(_, fields) => {
                let at = fields.iter().position(|field| field.name == key)?;
                Some(fields.remove(at))
            }
            _ => None,
        }
    }

    /// Place of the key `key` in this value.
    pub(crate) fn key_span(&self, key: &str) -> Option<Span> {
        match &self.kind {
            Kind::Struct(_, fields) => fields.iter().find(|f| f.name == key).map(|f| f.name_span),
            Kind::Map(entries) => entries.iter().find(|(k, _)| k.is_key(key)).map(|(k, _)| k.span),
            Kind::Option(Some(inner)) => inner.key_span(key),
            Kind::Tuple(Some(_), items) if items.len() == 1 => items[0].key_span(key),
            _ => None,
        }
    }

    /// Whether this map key is the text `key`.
    pub(crate) fn is_key(&self, key: &str) -> bool {
        matches!(&self.kind, Kind::String(s) | Kind::Name(s) if s == key)
    }

    /// The values directly inside this one.
    pub(crate) fn children(&self) -> Vec<&Value> {
        match &self.kind {
            Kind::List(items) | Kind::Tuple(_, items) => items.iter().collect(),
            Kind::Struct(_, fields) => fields.iter().map(|f| &f.value).collect(),
            Kind::Map(entries) => entries.iter().map(|(_, v)| v).collect(),
            Kind::Option(Some(inner)) => vec![inner],
            _ => Vec::new(),
        }
    }
}

/// Whether `text` can be written as a RON struct key without quotes.
pub(crate) fn is_identifier(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(is_identifier_start) && chars.all(is_identifier_part)
}

pub(crate) fn is_identifier_start(c: char) -> bool {
    c == '_' || c.is_alphabetic()
}

pub(crate) fn is_identifier_part(c: char) -> bool {
    c == '_' || c.is_alphanumeric()
}
