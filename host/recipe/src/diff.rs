//! What two resolved recipes differ in.

use crate::value::{Field, Kind, Value};
use crate::write::one_line;
use std::fmt;

/// One setting that two recipes do not agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Its key path.
    pub path: String,
    /// Its value in the first recipe, as RON; `None` if it is not set there.
    pub left: Option<String>,
    /// Its value in the second.
    pub right: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = |side: &Option<String>| side.clone().unwrap_or_else(|| "not set".to_string());
        write!(f, "{}: {} here, {} there", self.path, value(&self.left), value(&self.right))
    }
}

/// The differences of two values, section by section.
pub(crate) fn differences(left: &Value, right: &Value) -> Vec<Difference> {
    let mut found = Vec::new();
    compare("", Some(left), Some(right), &mut found);
    found
}

fn compare(path: &str, left: Option<&Value>, right: Option<&Value>, found: &mut Vec<Difference>) {
    if let (Some(a), Some(b)) = (left, right) {
        if same(a, b) {
            return;
        }
        if let (Some(a), Some(b)) = (section(a), section(b)) {
            let keys = a.iter().chain(b.iter().filter(|field| !a.iter().any(|other| other.name == field.name)));
            for key in keys.map(|field| &field.name) {
                let inner = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                compare(&inner, value_of(a, key), value_of(b, key), found);
            }
            return;
        }
    }
    let (left, right) = (left.map(one_line), right.map(one_line));
    found.push(Difference { path: path.to_string(), left, right });
}

/// The keys of a section; `()` is one without any.
fn section(value: &Value) -> Option<&[Field]> {
    match &value.kind {
        Kind::Unit => Some(&[]),
        Kind::Struct(None, fields) => Some(fields),
        _ => None,
    }
}

fn value_of<'v>(fields: &'v [Field], key: &str) -> Option<&'v Value> {
    fields.iter().find(|field| field.name == key).map(|field| &field.value)
}

/// Equal as settings: `8` and `8.0` are one number.
fn same(a: &Value, b: &Value) -> bool {
    match (&a.kind, &b.kind) {
        (Kind::Int(n), Kind::Float(x)) | (Kind::Float(x), Kind::Int(n)) => *n as f64 == *x,
        _ => a == b,
    }
}
