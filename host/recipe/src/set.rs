//! `--set path.to.key=VALUE`.

use crate::parse::{SyntaxError, parse};
use crate::span::{KeyPath, Segment, Span};
use crate::value::{Field, Kind, Value};

/// Applies one override to the recipe `root`. `text` is all of it, `source` its number.
///
/// A key that is not there is made, with its place in `text`: whether it may exist is for those to say who read the
/// section, and their error then points at the override.
pub(crate) fn apply(root: &mut Value, text: &str, source: usize) -> Result<(), Vec<SyntaxError>> {
    let error = |start: usize, end: usize, message: String, hint: Option<String>| {
        vec![SyntaxError { span: Span { source, start, end }, message, hint }]
    };
    let form = || Some("write --set path.to.key=VALUE".to_string());
    let Some((path, _)) = text.split_once('=') else {
        return Err(error(0, text.len(), "expected `=` and a value".into(), form()));
    };
    let segments = KeyPath::parse_placed(path).map_err(|(at, message)| error(at, path.len(), message, form()))?;
    if segments.is_empty() {
        return Err(error(0, 0, "expected a key before `=`".into(), form()));
    }
    let (value, duplicates) = value(text, path.len() + 1, source).map_err(|e| vec![e])?;

    let mut place = root;
    for (i, (segment, range)) in segments.iter().enumerate() {
        let before = KeyPath(segments[..i].iter().map(|(s, _)| s.clone()).collect());
        let span = Span { source, start: range.start, end: range.end };
        place = match step(place, segment, span) {
            Ok(place) => place,
            Err((message, hint)) => {
                return Err(error(range.start, range.end, format!("`{before}` is {message}"), hint));
            }
        };
    }
    *place = value;
    if duplicates.is_empty() { Ok(()) } else { Err(duplicates) }
}

/// The value after `=`: RON, or else the bare text as a string.
fn value(text: &str, start: usize, source: usize) -> Result<(Value, Vec<SyntaxError>), SyntaxError> {
    let bare = text[start..].trim();
    match parse(text, start, source) {
        Ok(parsed) => Ok(parsed),
        // With a bracket or a quote it was meant as RON.
        Err(error) if bare.starts_with(['(', '[', '{', '"']) || bare.ends_with([')', '}']) => Err(error),
        Err(_) => Ok((
            Value { kind: Kind::String(bare.to_string()), span: Span { source, start, end: text.len() } },
            Vec::new(),
        )),
    }
}

/// One step down, making a missing key. The error completes the sentence "`path` is ...".
fn step<'v>(value: &'v mut Value, segment: &Segment, span: Span) -> Result<&'v mut Value, (String, Option<String>)> {
    let description = value.describe();
    // What can hold keys, but holds none yet.
    if let Segment::Key(_) = segment {
        match &value.kind {
            Kind::Unit | Kind::Option(None) => value.kind = Kind::Struct(None, Vec::new()),
            Kind::Name(name) => value.kind = Kind::Struct(Some(name.clone()), Vec::new()),
            _ => {}
        }
    }
    match (&mut value.kind, segment) {
        (Kind::Option(Some(inner)), _) => step(inner, segment, span),
        (Kind::Tuple(Some(_), items), Segment::Key(key)) => match items.as_mut_slice() {
            [one] => step(one, segment, span),
            _ => Err((format!("{description} and has no key `{key}`"), None)),
        },
        (Kind::Struct(_, fields), Segment::Key(key)) => {
            let at = fields.iter().position(|field| field.name == *key);
            let at = at.unwrap_or_else(|| {
                fields.push(Field { name: key.clone(), name_span: span, value: Value { kind: Kind::Unit, span } });
                fields.len() - 1
            });
            Ok(&mut fields[at].value)
        }
        (Kind::Map(entries), Segment::Key(key)) => {
            let at = entries.iter().position(|(k, _)| k.is_key(key));
            let at = at.unwrap_or_else(|| {
                let kind = Kind::String(key.clone());
                let value = Kind::Unit;
                entries.push((Value { kind, span }, Value { kind: value, span }));
                entries.len() - 1
            });
            Ok(&mut entries[at].1)
        }
        (Kind::List(items) | Kind::Tuple(_, items), Segment::Index(index)) => {
            let hint = match items.len() {
                0 => "it is empty; set the whole list: path=[..]".to_string(),
                length => format!("its indexes are 0 to {}", length - 1),
            };
            let missing = || (format!("{description} and has no [{index}]"), Some(hint));
            items.get_mut(*index).ok_or_else(missing)
        }
        (_, Segment::Key(key)) => Err((format!("{description} and has no key `{key}`"), None)),
        (_, Segment::Index(index)) => {
            Err((format!("{description} and has no [{index}]"), Some("only lists and tuples have indexes".into())))
        }
    }
}
