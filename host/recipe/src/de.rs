//! serde over placed values: every error knows its key path and its place, and one pass after another finds all of them.

use crate::error::name_hint;
use crate::span::{KeyPath, Segment, Span};
use crate::value::{Field, Kind, Value};
use serde::de::{self, DeserializeOwned, DeserializeSeed, Visitor};
use std::collections::HashSet;
use std::fmt;

/// One error of a [`deserialize_all`], with its place.
#[derive(Debug)]
pub(crate) struct Found {
    pub span: Span,
    pub path: KeyPath,
    pub message: String,
    pub hint: Option<String>,
}

/// Reads `value` as a `T`, or reports everything that is wrong with it.
///
/// serde stops at its first error. So the part that was wrong is left out and the reading begins again, until nothing new
/// turns up; errors that only follow from a part left out are dropped. `path` is where `value` stands in the recipe.
/// Sources from number `overrides` on are `--set`s, in which the shell has eaten the quotes around texts.
pub(crate) fn deserialize_all<T: DeserializeOwned>(
    value: &Value,
    path: &KeyPath,
    overrides: usize,
) -> Result<T, Vec<Found>> {
    let mut round = Round { skip: HashSet::new(), overrides };
    let mut found: Vec<Found> = Vec::new();
    let mut proposed: HashSet<KeyPath> = HashSet::new();
    loop {
        let error = match T::deserialize(De::new(value, &round)) {
            Ok(read) if found.is_empty() => return Ok(read),
            Ok(_) => return Err(found),
            Err(error) => *error.0,
        };
        let at = error.at.unwrap_or(value.span);
        let poison = error.poison.unwrap_or(at);
        let here = KeyPath(error.path.into_iter().rev().collect());
        let follows = match error.what {
            What::Follows => true,
            // A key that is misspelt elsewhere in its section, or whose value was wrong.
            What::Missing => proposed.contains(&here) || value.get(&here).is_some_and(|v| round.skip.contains(&v.span)),
            What::Length => {
                value.get(&here).is_some_and(|v| v.children().iter().any(|child| round.skip.contains(&child.span)))
            }
            What::Unknown { near } => {
                if let (Some(near), [parent @ .., _]) = (near, here.0.as_slice()) {
                    proposed.insert(KeyPath(parent.to_vec()).join(&KeyPath(vec![Segment::Key(near)])));
                }
                false
            }
            What::Type(_) | What::Other => false,
        };
        if !follows {
            found.push(Found { span: at, path: path.join(&here), message: error.message, hint: error.hint });
        }
        // Each round leaves out one more part; the whole is the last.
        if poison == value.span || !round.skip.insert(poison) {
            return Err(found);
        }
    }
}

#[derive(Debug)]
enum What {
    Other,
    /// Expected this; what was found is filled in where the value is known.
    Type(String),
    Missing,
    Length,
    Unknown {
        near: Option<String>,
    },
    /// A part that was left out is needed here.
    Follows,
}

/// serde's error, on its way up to the root. Boxed, because each level hands it on beside values that are small.
#[derive(Debug)]
pub(crate) struct DeError(Box<Details>);

#[derive(Debug)]
struct Details {
    what: What,
    message: String,
    hint: Option<String>,
    at: Option<Span>,
    /// The value to leave out in the next round.
    poison: Option<Span>,
    /// Innermost segment first.
    path: Vec<Segment>,
}

impl DeError {
    fn new(what: What, message: String) -> Self {
        DeError(Box::new(Details { what, message, hint: None, at: None, poison: None, path: Vec::new() }))
    }

    fn hint(mut self, hint: Option<String>) -> Self {
        self.0.hint = hint;
        self
    }

    fn expected(what: &str) -> Self {
        Self::new(What::Type(what.to_string()), String::new())
    }

    /// Says that the error is about `value`, unless a deeper one has been named.
    fn about(mut self, value: &Value) -> Self {
        if let (What::Type(expected), None) = (&self.0.what, self.0.at) {
            self.0.message = format!("expected {expected}, got {}", value.describe());
            self.0.hint = match &value.kind {
                Kind::Name(name) if expected.starts_with("a string") => {
                    Some(format!("texts are written in quotes: {name:?}"))
                }
                Kind::Float(x) if expected.starts_with("a whole number") && x.fract() == 0.0 => {
                    Some(format!("write it as {x:.0}"))
                }
                Kind::String(text) if text.parse::<f64>().is_ok() => Some(format!("write it without quotes: {text}")),
                Kind::Name(name) if name == "True" || name == "False" => {
                    Some(format!("write `{}`", name.to_lowercase()))
                }
                _ => None,
            };
        }
        self.0.at.get_or_insert(value.span);
        self.0.poison.get_or_insert(value.span);
        self
    }

    fn under(mut self, segment: Segment) -> Self {
        self.0.path.push(segment);
        self
    }
}

impl fmt::Display for DeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for DeError {}

/// serde's and Rust's words, in a recipe author's.
fn plain(expected: &dyn de::Expected) -> String {
    let text = expected.to_string();
    match text.as_str() {
        "f32" | "f64" => "a number".into(),
        "u8" | "u16" | "u32" | "u64" | "u128" | "usize" => "a whole number from 0".into(),
        "i8" | "i16" | "i32" | "i64" | "i128" | "isize" => "a whole number".into(),
        "a boolean" => "`true` or `false`".into(),
        "a sequence" => "a list `[..]`".into(),
        "a map" => "a section `(key: ..)`".into(),
        other if other.starts_with("struct ") && !other.contains(' ') => "a section".into(),
        other => match other.strip_prefix("struct ") {
            Some(name) if !name.contains(' ') => "a section `(key: ..)`".into(),
            _ => match other.strip_prefix("enum ") {
                Some(_) => "one of its names".into(),
                None => text,
            },
        },
    }
}

impl de::Error for DeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        DeError::new(What::Other, message.to_string())
    }

    fn invalid_type(_: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        DeError::expected(&plain(expected))
    }

    fn invalid_value(_: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        // Only a range can be wrong here, so the type's own name says which.
        let text = expected.to_string();
        let range = match text.as_str() {
            "u8" => "a whole number from 0 to 255".into(),
            "u16" => "a whole number from 0 to 65535".into(),
            "u32" => "a whole number from 0 to 4294967295".into(),
            _ => plain(expected),
        };
        DeError::expected(&range)
    }

    fn invalid_length(length: usize, expected: &dyn de::Expected) -> Self {
        let message = format!("expected {}, got {length} values", plain(expected));
        DeError::new(What::Length, message)
    }

    fn missing_field(field: &'static str) -> Self {
        DeError::new(What::Missing, format!("the key `{field}` is missing")).under(Segment::Key(field.to_string()))
    }

    fn unknown_field(field: &str, valid: &'static [&'static str]) -> Self {
        let near = crate::error::nearest(field, valid.iter().copied()).map(str::to_string);
        DeError::new(What::Unknown { near }, format!("unknown key `{field}`")).hint(name_hint(field, "keys", valid))
    }

    fn unknown_variant(variant: &str, valid: &'static [&'static str]) -> Self {
        DeError::new(What::Other, format!("unknown name `{variant}`")).hint(name_hint(variant, "names", valid))
    }
}

/// What holds for one reading of the whole.
struct Round {
    /// Values left out of it.
    skip: HashSet<Span>,
    /// Number of the first source that is an override.
    overrides: usize,
}

/// A deserializer over one value.
#[derive(Clone, Copy)]
struct De<'v> {
    value: &'v Value,
    round: &'v Round,
    /// The name of a named struct or tuple has been read already.
    unnamed: bool,
}

impl<'v> De<'v> {
    fn new(value: &'v Value, round: &'v Round) -> Self {
        De { value, round, unnamed: false }
    }

    fn inner(self, value: &'v Value) -> Self {
        De::new(value, self.round)
    }

    fn left_out(self, value: &Value) -> bool {
        self.round.skip.contains(&value.span)
    }

    /// Runs `read`, and says that its error is about this value.
    fn here<T>(self, read: impl FnOnce(Self) -> Result<T, DeError>) -> Result<T, DeError> {
        if self.left_out(self.value) {
            // Without a place: the value around this one claims it.
            return Err(DeError::new(What::Follows, String::new()));
        }
        read(self).map_err(|error| error.about(self.value))
    }

    fn seq<V: Visitor<'v>>(self, items: &'v [Value], visitor: V) -> Result<V::Value, DeError> {
        let mut access = Items { de: self, items, next: 0 };
        let read = visitor.visit_seq(&mut access)?;
        let rest = items[access.next..].iter().filter(|item| !self.left_out(item)).count();
        if rest > 0 {
            let message = format!("expected {} values, got {}", access.next, items.len());
            return Err(DeError::new(What::Length, message));
        }
        Ok(read)
    }

    fn fields<V: Visitor<'v>>(self, fields: &'v [Field], visitor: V) -> Result<V::Value, DeError> {
        visitor.visit_map(Fields { de: self, fields: fields.iter(), value: None })
    }

    fn entries<V: Visitor<'v>>(self, entries: &'v [(Value, Value)], visitor: V) -> Result<V::Value, DeError> {
        visitor.visit_map(Entries { de: self, entries: entries.iter(), value: None })
    }

    fn any<V: Visitor<'v>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.value.kind {
            Kind::Unit => self.fields(&[], visitor),
            Kind::Bool(b) => visitor.visit_bool(*b),
            Kind::Int(n) => match (u64::try_from(*n), i64::try_from(*n)) {
                (Ok(n), _) => visitor.visit_u64(n),
                (_, Ok(n)) => visitor.visit_i64(n),
                _ => visitor.visit_i128(*n),
            },
            Kind::Float(x) => visitor.visit_f64(*x),
            Kind::Char(c) => visitor.visit_char(*c),
            Kind::String(text) | Kind::Name(text) => visitor.visit_str(text),
            Kind::Option(None) => visitor.visit_none(),
            Kind::Option(Some(inner)) => visitor.visit_some(self.inner(inner)),
            Kind::List(items) => self.seq(items, visitor),
            Kind::Map(entries) => self.entries(entries, visitor),
            Kind::Tuple(Some(name), _) | Kind::Struct(Some(name), _) if !self.unnamed => {
                // As serde's data formats without variants of their own write them: {name: content}.
                visitor.visit_map(Tagged { de: self, name: Some(name) })
            }
            Kind::Tuple(_, items) => self.seq(items, visitor),
            Kind::Struct(_, fields) => self.fields(fields, visitor),
        }
    }

    /// A number or a truth value: a bare name is none, though [`De::any`] reads it as text.
    fn scalar<V: Visitor<'v>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.value.kind {
            Kind::Bool(_) | Kind::Int(_) | Kind::Float(_) => self.any(visitor),
            _ => Err(DeError::expected(&plain(&visitor))),
        }
    }

    fn text<V: Visitor<'v>>(self, visitor: V) -> Result<V::Value, DeError> {
        match &self.value.kind {
            Kind::String(text) => visitor.visit_str(text),
            Kind::Char(c) => visitor.visit_char(*c),
            // In an override the shell has eaten the quotes.
            Kind::Name(name) if self.value.span.source >= self.round.overrides => visitor.visit_str(name),
            _ => Err(DeError::expected(&plain(&visitor))),
        }
    }
}

macro_rules! forward {
    ($to:ident: $($method:ident)*) => {$(
        fn $method<V: Visitor<'v>>(self, visitor: V) -> Result<V::Value, DeError> {
            self.here(|de| de.$to(visitor))
        }
    )*};
}

impl<'v> de::Deserializer<'v> for De<'v> {
    type Error = DeError;

    forward!(any: deserialize_any deserialize_bytes deserialize_byte_buf);
    forward!(scalar: deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128 deserialize_f32 deserialize_f64);
    forward!(text: deserialize_char deserialize_str deserialize_string);

    fn deserialize_identifier<V: Visitor<'v>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.here(|de| match &de.value.kind {
            Kind::String(text) | Kind::Name(text) => visitor.visit_str(text),
            _ => Err(DeError::expected("a name")),
        })
    }

    fn deserialize_ignored_any<V: Visitor<'v>>(self, visitor: V) -> Result<V::Value, DeError> {
        visitor.visit_unit()
    }

    fn deserialize_option<V: Visitor<'v>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.here(|de| match &de.value.kind {
            Kind::Option(None) => visitor.visit_none(),
            Kind::Option(Some(inner)) => visitor.visit_some(de.inner(inner)),
            _ => visitor.visit_some(de),
        })
    }

    fn deserialize_unit<V: Visitor<'v>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.here(|de| match &de.value.kind {
            Kind::Unit => visitor.visit_unit(),
            _ => Err(DeError::expected("`()`")),
        })
    }

    fn deserialize_unit_struct<V: Visitor<'v>>(self, name: &'static str, visitor: V) -> Result<V::Value, DeError> {
        self.here(|de| match &de.value.kind {
            Kind::Unit => visitor.visit_unit(),
            Kind::Name(found) if found == name => visitor.visit_unit(),
            _ => Err(DeError::expected(&format!("`{name}`"))),
        })
    }

    fn deserialize_newtype_struct<V: Visitor<'v>>(self, name: &'static str, visitor: V) -> Result<V::Value, DeError> {
        self.here(|de| match &de.value.kind {
            Kind::Tuple(Some(found), items) if found == name && items.len() == 1 => {
                visitor.visit_newtype_struct(de.inner(&items[0]))
            }
            Kind::Tuple(None, items) if items.len() == 1 => visitor.visit_newtype_struct(de.inner(&items[0])),
            _ => visitor.visit_newtype_struct(de),
        })
    }

    fn deserialize_seq<V: Visitor<'v>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.here(|de| match &de.value.kind {
            Kind::Unit => de.seq(&[], visitor),
            Kind::List(items) | Kind::Tuple(None, items) => de.seq(items, visitor),
            Kind::Tuple(Some(_), items) if de.unnamed => de.seq(items, visitor),
            _ => Err(DeError::expected("a list `[..]`")),
        })
    }

    fn deserialize_tuple<V: Visitor<'v>>(self, length: usize, visitor: V) -> Result<V::Value, DeError> {
        self.here(|de| match &de.value.kind {
            Kind::List(items) | Kind::Tuple(None, items) => de.seq(items, visitor),
            Kind::Tuple(Some(_), items) if de.unnamed => de.seq(items, visitor),
            _ => Err(DeError::expected(&format!("{length} values in brackets `(..)`"))),
        })
    }

    fn deserialize_tuple_struct<V: Visitor<'v>>(
        self,
        name: &'static str,
        length: usize,
        visitor: V,
    ) -> Result<V::Value, DeError> {
        match &self.value.kind {
            Kind::Tuple(Some(found), items) if found == name => self.here(|de| de.seq(items, visitor)),
            _ => self.deserialize_tuple(length, visitor),
        }
    }

    fn deserialize_map<V: Visitor<'v>>(self, visitor: V) -> Result<V::Value, DeError> {
        self.here(|de| match &de.value.kind {
            Kind::Unit => de.fields(&[], visitor),
            Kind::Map(entries) => de.entries(entries, visitor),
            Kind::Struct(None, fields) => de.fields(fields, visitor),
            Kind::Struct(Some(_), fields) if de.unnamed => de.fields(fields, visitor),
            _ => Err(DeError::expected("a section `(key: ..)`")),
        })
    }

    fn deserialize_struct<V: Visitor<'v>>(
        self,
        name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        match &self.value.kind {
            Kind::Struct(Some(found), fields) if found == name => self.here(|de| de.fields(fields, visitor)),
            Kind::Name(found) if found == name => self.here(|de| de.fields(&[], visitor)),
            _ => self.deserialize_map(visitor),
        }
    }

    fn deserialize_enum<V: Visitor<'v>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DeError> {
        self.here(|de| {
            let name = match &de.value.kind {
                Kind::Name(name) | Kind::String(name) => name,
                Kind::Tuple(Some(name), _) | Kind::Struct(Some(name), _) => name,
                Kind::Option(None) => "None",
                Kind::Option(Some(_)) => "Some",
                _ => {
                    let expected = format!("one of {}", variants.join(", "));
                    return Err(DeError::expected(&expected));
                }
            };
            visitor.visit_enum(Variant { de, name })
        })
    }
}

struct Items<'v> {
    de: De<'v>,
    items: &'v [Value],
    next: usize,
}

impl<'v> de::SeqAccess<'v> for &mut Items<'v> {
    type Error = DeError;

    fn next_element_seed<T: DeserializeSeed<'v>>(&mut self, seed: T) -> Result<Option<T::Value>, DeError> {
        while let Some(item) = self.items.get(self.next) {
            let index = self.next;
            self.next += 1;
            if !self.de.left_out(item) {
                let read = seed.deserialize(self.de.inner(item));
                return read.map(Some).map_err(|e| e.about(item).under(Segment::Index(index)));
            }
        }
        Ok(None)
    }
}

struct Fields<'v> {
    de: De<'v>,
    fields: std::slice::Iter<'v, Field>,
    value: Option<&'v Field>,
}

impl<'v> de::MapAccess<'v> for Fields<'v> {
    type Error = DeError;

    fn next_key_seed<K: DeserializeSeed<'v>>(&mut self, seed: K) -> Result<Option<K::Value>, DeError> {
        let de = self.de;
        self.value = self.fields.by_ref().find(|field| !de.left_out(&field.value));
        let Some(field) = self.value else {
            return Ok(None);
        };
        let key = de::value::StrDeserializer::new(&field.name);
        seed.deserialize(key).map(Some).map_err(|mut error: DeError| {
            error.0.at = Some(field.name_span);
            error.0.poison = Some(field.value.span);
            error.under(Segment::Key(field.name.clone()))
        })
    }

    fn next_value_seed<T: DeserializeSeed<'v>>(&mut self, seed: T) -> Result<T::Value, DeError> {
        let Some(field) = self.value.take() else {
            return Err(de::Error::custom("a value was asked for before its key"));
        };
        let read = seed.deserialize(self.de.inner(&field.value));
        read.map_err(|e| e.about(&field.value).under(Segment::Key(field.name.clone())))
    }
}

struct Entries<'v> {
    de: De<'v>,
    entries: std::slice::Iter<'v, (Value, Value)>,
    value: Option<&'v (Value, Value)>,
}

fn key_segment(key: &Value) -> Segment {
    match &key.kind {
        Kind::String(text) | Kind::Name(text) => Segment::Key(text.clone()),
        _ => Segment::Key(key.describe()),
    }
}

impl<'v> de::MapAccess<'v> for Entries<'v> {
    type Error = DeError;

    fn next_key_seed<K: DeserializeSeed<'v>>(&mut self, seed: K) -> Result<Option<K::Value>, DeError> {
        let de = self.de;
        self.value = self.entries.by_ref().find(|(_, value)| !de.left_out(value));
        let Some((key, value)) = self.value else {
            return Ok(None);
        };
        seed.deserialize(de.inner(key)).map(Some).map_err(|error| {
            let mut error = error.about(key);
            error.0.poison = Some(value.span);
            error.under(key_segment(key))
        })
    }

    fn next_value_seed<T: DeserializeSeed<'v>>(&mut self, seed: T) -> Result<T::Value, DeError> {
        let Some((key, value)) = self.value.take() else {
            return Err(de::Error::custom("a value was asked for before its key"));
        };
        let read = seed.deserialize(self.de.inner(value));
        read.map_err(|e| e.about(value).under(key_segment(key)))
    }
}

/// `Name(..)` as the map `{Name: ..}`, for readers that know no variants.
struct Tagged<'v> {
    de: De<'v>,
    name: Option<&'v str>,
}

impl<'v> de::MapAccess<'v> for Tagged<'v> {
    type Error = DeError;

    fn next_key_seed<K: DeserializeSeed<'v>>(&mut self, seed: K) -> Result<Option<K::Value>, DeError> {
        let key = self.name.take().map(de::value::StrDeserializer::new);
        key.map(|key| seed.deserialize(key)).transpose()
    }

    fn next_value_seed<T: DeserializeSeed<'v>>(&mut self, seed: T) -> Result<T::Value, DeError> {
        match &self.de.value.kind {
            Kind::Tuple(_, items) if items.len() == 1 => seed.deserialize(self.de.inner(&items[0])),
            _ => seed.deserialize(De { unnamed: true, ..self.de }),
        }
    }
}

struct Variant<'v> {
    de: De<'v>,
    name: &'v str,
}

impl<'v> de::EnumAccess<'v> for Variant<'v> {
    type Error = DeError;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'v>>(self, seed: V) -> Result<(V::Value, Self), DeError> {
        let name = seed.deserialize(de::value::StrDeserializer::<DeError>::new(self.name))?;
        Ok((name, self))
    }
}

impl<'v> Variant<'v> {
    fn wrong(&self, form: &str) -> DeError {
        DeError::expected(&format!("`{}{form}`", self.name))
    }

    /// The variant's own content, without its name.
    fn content(&self) -> De<'v> {
        De { unnamed: true, ..self.de }
    }
}

impl<'v> de::VariantAccess<'v> for Variant<'v> {
    type Error = DeError;

    fn unit_variant(self) -> Result<(), DeError> {
        match &self.de.value.kind {
            Kind::Name(_) | Kind::String(_) | Kind::Option(None) => Ok(()),
            _ => Err(self.wrong("")),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'v>>(self, seed: T) -> Result<T::Value, DeError> {
        match &self.de.value.kind {
            Kind::Tuple(_, items) if items.len() == 1 => seed.deserialize(self.de.inner(&items[0])),
            Kind::Option(Some(inner)) => seed.deserialize(self.de.inner(inner)),
            Kind::Struct(..) | Kind::Tuple(..) => seed.deserialize(self.content()),
            _ => Err(self.wrong("(..)")),
        }
    }

    fn tuple_variant<V: Visitor<'v>>(self, length: usize, visitor: V) -> Result<V::Value, DeError> {
        match &self.de.value.kind {
            Kind::Tuple(_, items) if items.len() == length => self.de.seq(items, visitor),
            _ => Err(self.wrong(&format!("(..)` with {length} values, without keys: `(..)"))),
        }
    }

    fn struct_variant<V: Visitor<'v>>(self, fields: &'static [&'static str], visitor: V) -> Result<V::Value, DeError> {
        match &self.de.value.kind {
            Kind::Struct(_, fields) => self.de.fields(fields, visitor),
            Kind::Name(_) | Kind::String(_) => self.de.fields(&[], visitor),
            Kind::Tuple(_, items) => match items.as_slice() {
                [] => self.de.fields(&[], visitor),
                [one] if matches!(one.kind, Kind::Struct(None, _) | Kind::Map(_)) => {
                    de::Deserializer::deserialize_map(self.de.inner(one), visitor)
                }
                _ => Err(self.wrong(&format!("({}: ..)", fields.join(": .., ")))),
            },
            _ => Err(self.wrong(&format!("({}: ..)", fields.join(": .., ")))),
        }
    }
}
