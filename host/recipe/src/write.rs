//! A tree of values to RON text, as a person would lay it out.

use crate::value::{Kind, Value, is_identifier};
use std::fmt::Write;

/// Longest line that is not broken further.
const WIDTH: usize = 100;

/// The text of `value`, read back by the parser to an equal value. The first level is broken into lines always, and the
/// second one if it is a section.
pub(crate) fn write(value: &Value) -> String {
    let mut out = String::new();
    broken(&mut out, value, 0);
    out.push('\n');
    out
}

/// The text of `value` on one line.
pub(crate) fn one_line(value: &Value) -> String {
    let mut out = String::new();
    inline(&mut out, value);
    out
}

fn name_of(value: &Value) -> &str {
    match &value.kind {
        Kind::Tuple(Some(name), _) | Kind::Struct(Some(name), _) => name,
        Kind::Option(Some(_)) => "Some",
        _ => "",
    }
}

/// Opening and closing bracket, and what is between them: the key with its colon, if there is one, and the value.
type Parts<'v> = (char, char, Vec<(String, &'v Value)>);

/// The brackets of a value that holds others, and each of those with its key.
fn parts(value: &Value) -> Option<Parts<'_>> {
    Some(match &value.kind {
        Kind::List(items) => ('[', ']', items.iter().map(|v| (String::new(), v)).collect()),
        Kind::Tuple(_, items) => ('(', ')', items.iter().map(|v| (String::new(), v)).collect()),
        Kind::Option(Some(inner)) => ('(', ')', vec![(String::new(), inner.as_ref())]),
        Kind::Struct(_, fields) => {
            let key = |name: &str| match is_identifier(name) {
                true => format!("{name}: "),
                false => format!("r#{name}: "),
            };
            ('(', ')', fields.iter().map(|f| (key(&f.name), &f.value)).collect())
        }
        Kind::Map(entries) => {
            let entries = entries.iter().map(|(k, v)| {
                let mut key = String::new();
                inline(&mut key, k);
                (key + ": ", v)
            });
            ('{', '}', entries.collect())
        }
        _ => return None,
    })
}

fn broken(out: &mut String, value: &Value, depth: usize) {
    let Some((open, close, parts)) = parts(value).filter(|(_, _, parts)| !parts.is_empty()) else {
        return inline(out, value);
    };
    out.push_str(name_of(value));
    out.push(open);
    out.push('\n');
    let indent = "    ".repeat(depth + 1);
    for (key, part) in parts {
        let mut line = String::new();
        inline(&mut line, part);
        let section = depth == 0 && matches!(part.kind, Kind::Struct(None, _));
        out.push_str(&indent);
        out.push_str(&key);
        if section || indent.len() + key.len() + line.chars().count() + 1 > WIDTH {
            broken(out, part, depth + 1);
        } else {
            out.push_str(&line);
        }
        out.push_str(",\n");
    }
    out.push_str(&"    ".repeat(depth));
    out.push(close);
}

fn inline(out: &mut String, value: &Value) {
    // Writing to a string cannot fail.
    let _ = match &value.kind {
        Kind::Unit => write!(out, "()"),
        Kind::Bool(b) => write!(out, "{b}"),
        Kind::Int(n) => write!(out, "{n}"),
        Kind::Float(x) => write!(out, "{x:?}"),
        Kind::Char('\'') => write!(out, r"'\''"),
        Kind::Char(c) => write!(out, "'{}'", escape(&c.to_string())),
        Kind::String(text) => write!(out, "\"{}\"", escape(text)),
        Kind::Option(None) => write!(out, "None"),
        Kind::Name(name) => write!(out, "{name}"),
        _ => {
            out.push_str(name_of(value));
            let (open, close, parts) = parts(value).unwrap_or(('(', ')', Vec::new()));
            out.push(open);
            for (i, (key, part)) in parts.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                out.push_str(key);
                inline(out, part);
            }
            out.push(close);
            Ok(())
        }
    };
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => {
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}
