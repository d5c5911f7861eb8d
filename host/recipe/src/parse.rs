//! RON text to a tree of placed values.

use crate::error::RecipeError;
use crate::span::{Source, Span};
use crate::value::{Field, Kind, Value, is_identifier_part, is_identifier_start};

/// Deepest nesting that is read; deeper text is refused rather than risking the stack.
const MAX_DEPTH: usize = 100;

/// The extensions that `#![enable(..)]` may name. All of them only relax what is accepted, and this reader is relaxed
/// already, except `explicit_struct_names`, which this reader cannot hold anyone to.
const EXTENSIONS: [&str; 4] = ["unwrap_newtypes", "implicit_some", "unwrap_variant_newtypes", "explicit_struct_names"];

/// What is wrong with the text, and where.
#[derive(Debug, Clone)]
pub(crate) struct SyntaxError {
    pub span: Span,
    pub message: String,
    pub hint: Option<String>,
}

impl SyntaxError {
    /// The error as it is shown, in the text that it is about.
    pub(crate) fn placed(self, sources: &[Source]) -> RecipeError {
        let location = sources.get(self.span.source).map(|source| source.locate(self.span.start, self.span.end));
        RecipeError { location, path: String::new(), message: self.message, hint: self.hint }
    }
}

/// Reads one RON value, which must be all of `text[start..]`.
///
/// Keys set twice do not stop the reading: they are returned beside the value. Spans count from the beginning of `text`
/// and name the source `source`.
pub(crate) fn parse(text: &str, start: usize, source: usize) -> Result<(Value, Vec<SyntaxError>), SyntaxError> {
    let mut parser = Parser { text, at: start, source, depth: 0, duplicates: Vec::new(), long_string: None };
    parser.skip('\u{FEFF}');
    parser.blank()?;
    parser.attributes()?;
    let value = parser.value()?;
    parser.blank()?;
    if let Some(c) = parser.peek() {
        return Err(parser.error(format!("expected the end of the text, got {c:?}")));
    }
    Ok((value, parser.duplicates))
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
    source: usize,
    depth: usize,
    duplicates: Vec<SyntaxError>,
    /// End of the last string, if it went over lines: a place where a quote may be missing.
    long_string: Option<Span>,
}

type Parsed<T> = Result<T, SyntaxError>;

impl<'t> Parser<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn skip(&mut self, c: char) -> bool {
        let found = self.peek() == Some(c);
        if found {
            self.at += c.len_utf8();
        }
        found
    }

    fn skip_str(&mut self, s: &str) -> bool {
        let found = self.rest().starts_with(s);
        if found {
            self.at += s.len();
        }
        found
    }

    fn span(&self, start: usize) -> Span {
        Span { source: self.source, start, end: self.at }
    }

    fn error_at(&self, start: usize, end: usize, message: impl Into<String>) -> SyntaxError {
        SyntaxError { span: Span { source: self.source, start, end }, message: message.into(), hint: None }
    }

    /// An error about the next character.
    fn error(&self, message: impl Into<String>) -> SyntaxError {
        let end = self.at + self.peek().map_or(0, char::len_utf8);
        self.error_at(self.at, end, message)
    }

    fn found(&self) -> String {
        self.peek().map_or("the end of the text".to_string(), |c| format!("{c:?}"))
    }

    fn expect(&mut self, c: char, after: &str) -> Parsed<()> {
        if self.skip(c) {
            return Ok(());
        }
        let message = format!("expected {c:?} {after}, got {}", self.found());
        Err(self.error(message))
    }

    /// White space and comments.
    fn blank(&mut self) -> Parsed<()> {
        loop {
            let start = self.at;
            while self.peek().is_some_and(is_blank) {
                self.at += self.peek().map_or(0, char::len_utf8);
            }
            if self.skip_str("//") {
                self.at += self.rest().find('\n').unwrap_or(self.rest().len());
            } else if self.skip_str("/*") {
                let mut open = 1;
                while open > 0 {
                    if self.skip_str("/*") {
                        open += 1;
                    } else if self.skip_str("*/") {
                        open -= 1;
                    } else if let Some(c) = self.peek() {
                        self.at += c.len_utf8();
                    } else {
                        let message = "the comment that begins here is never closed";
                        return Err(self.error_at(start, start + 2, message));
                    }
                }
            }
            if self.at == start {
                return Ok(());
            }
        }
    }

    fn attributes(&mut self) -> Parsed<()> {
        while self.skip('#') {
            for c in ['!', '['] {
                self.blank()?;
                self.expect(c, "in an attribute `#![enable(..)]`")?;
            }
            self.blank()?;
            let start = self.at;
            if self.identifier() != Some("enable") {
                return Err(self.error_at(start, self.at.max(start + 1), "only `enable` is known here"));
            }
            self.blank()?;
            self.expect('(', "after `enable`")?;
            loop {
                self.blank()?;
                let start = self.at;
                match self.identifier() {
                    Some(name) if EXTENSIONS.contains(&name) => {}
                    Some(name) => {
                        let message = format!("unknown RON extension `{name}`");
                        return Err(SyntaxError {
                            hint: crate::error::name_hint(name, "extensions", &EXTENSIONS),
                            ..self.error_at(start, self.at, message)
                        });
                    }
                    None => return Err(self.error("expected the name of a RON extension")),
                }
                self.blank()?;
                let comma = self.skip(',');
                self.blank()?;
                if self.skip(')') {
                    break;
                }
                if !comma {
                    return Err(self.error(format!("expected ',' or ')', got {}", self.found())));
                }
            }
            self.blank()?;
            self.expect(']', "at the end of the attribute")?;
            self.blank()?;
        }
        Ok(())
    }

    /// `name` or `r#raw.name`, if one is next.
    fn identifier(&mut self) -> Option<&'t str> {
        let rest = self.rest();
        if let Some(raw) = rest.strip_prefix("r#") {
            let part = |c: char| is_identifier_part(c) || matches!(c, '.' | '+' | '-');
            let length = raw.find(|c| !part(c)).unwrap_or(raw.len());
            if length > 0 {
                self.at += 2 + length;
                return Some(&raw[..length]);
            }
        }
        if !rest.starts_with(is_identifier_start) {
            return None;
        }
        let length = rest.find(|c| !is_identifier_part(c)).unwrap_or(rest.len());
        self.at += length;
        Some(&rest[..length])
    }

    fn value(&mut self) -> Parsed<Value> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.error(format!("brackets are nested more than {MAX_DEPTH} deep")));
        }
        let start = self.at;
        let kind = self.kind()?;
        self.depth -= 1;
        Ok(Value { kind, span: self.span(start) })
    }

    fn kind(&mut self) -> Parsed<Kind> {
        let start = self.at;
        let rest = self.rest();
        match self.peek() {
            None => Err(self.error("expected a value, got the end of the text")),
            Some('(') => self.bracket(None),
            Some('[') => {
                self.at += 1;
                Ok(Kind::List(self.items(']')?))
            }
            Some('{') => self.map(),
            Some('"') => self.string(),
            Some('r') if rest.starts_with("r\"") || rest.starts_with("r#\"") || rest.starts_with("r##") => {
                self.raw_string()
            }
            Some('b')
                if rest.starts_with("b\"")
                    || rest.starts_with("b'")
                    || rest.starts_with("br") && { rest[2..].starts_with(['"', '#']) } =>
            {
                Err(SyntaxError {
                    hint: Some("write it as a string, without the `b`".into()),
                    ..self.error_at(start, start + 1, "byte strings have no use in a recipe")
                })
            }
            Some('\'') => self.character(),
            Some(c) if c.is_ascii_digit() || matches!(c, '+' | '-' | '.') => self.number(),
            Some(_) => {
                let Some(name) = self.identifier() else {
                    return Err(self.error(format!("expected a value, got {}", self.found())));
                };
                match name {
                    "true" => return Ok(Kind::Bool(true)),
                    "false" => return Ok(Kind::Bool(false)),
                    "inf" | "inff32" | "inff64" => return Ok(Kind::Float(f64::INFINITY)),
                    "NaN" | "NaNf32" | "NaNf64" => return Ok(Kind::Float(f64::NAN)),
                    _ => {}
                }
                let end = self.at;
                self.blank()?;
                if self.peek() == Some('(') {
                    return self.bracket(Some((name, start)));
                }
                self.at = end;
                Ok(match name {
                    "None" => Kind::Option(None),
                    _ => Kind::Name(name.to_string()),
                })
            }
        }
    }

    /// `(..)`: unit, tuple or struct, after `name` if there is one.
    fn bracket(&mut self, name: Option<(&str, usize)>) -> Parsed<Kind> {
        self.at += 1;
        self.blank()?;
        let inside = self.at;
        let is_struct = self.identifier().is_some() && {
            self.blank()?;
            self.peek() == Some(':')
        };
        self.at = inside;
        let owned = name.map(|(name, _)| name.to_string());
        if is_struct {
            return Ok(Kind::Struct(owned, self.fields()?));
        }
        let mut items = self.items(')')?;
        Ok(match name {
            None if items.is_empty() => Kind::Unit,
            Some(("Some", start)) => match (items.pop(), items.is_empty()) {
                (Some(one), true) => Kind::Option(Some(Box::new(one))),
                _ => return Err(self.error_at(start, self.at, "`Some(..)` holds exactly one value")),
            },
            _ => Kind::Tuple(owned, items),
        })
    }

    /// Values up to `close`, separated by commas.
    fn items(&mut self, close: char) -> Parsed<Vec<Value>> {
        let mut items = Vec::new();
        loop {
            self.blank()?;
            if self.skip(close) {
                return Ok(items);
            }
            items.push(self.value()?);
            self.separator(close)?;
        }
    }

    /// After an element: a comma, or `close` (which stays).
    fn separator(&mut self, close: char) -> Parsed<()> {
        let end = self.at;
        self.blank()?;
        if self.skip(',') || self.peek() == Some(close) {
            return Ok(());
        }
        let found = self.found();
        let mut error = self.error(format!("expected ',' or {close:?}, got {found}"));
        if self.text[end..self.at].contains('\n') {
            error.hint = Some("is a comma missing at the end of the line before?".into());
        }
        if let Some(string) = self.long_string.filter(|string| string.end == end) {
            let line = self.text[..string.start].matches('\n').count() + 1;
            error.hint = Some(format!("is a quote missing? The string that ends here begins in line {line}"));
        }
        Err(error)
    }

    fn fields(&mut self) -> Parsed<Vec<Field>> {
        let mut fields: Vec<Field> = Vec::new();
        loop {
            self.blank()?;
            if self.skip(')') {
                return Ok(fields);
            }
            let start = self.at;
            let Some(name) = self.identifier() else {
                return Err(self.error(format!("expected a key or ')', got {}", self.found())));
            };
            let name_span = self.span(start);
            self.blank()?;
            self.expect(':', &format!("after the key `{name}`"))?;
            self.blank()?;
            let value = self.value()?;
            if fields.iter().any(|field| field.name == name) {
                self.duplicate(name_span, name);
            } else {
                fields.push(Field { name: name.to_string(), name_span, value });
            }
            self.separator(')')?;
        }
    }

    fn duplicate(&mut self, span: Span, name: &str) {
        self.duplicates.push(SyntaxError {
            span,
            message: format!("the key `{name}` is set twice"),
            hint: Some("remove one of the two".into()),
        });
    }

    fn map(&mut self) -> Parsed<Kind> {
        self.at += 1;
        let mut entries: Vec<(Value, Value)> = Vec::new();
        loop {
            self.blank()?;
            if self.skip('}') {
                return Ok(Kind::Map(entries));
            }
            let key = self.value()?;
            self.blank()?;
            self.expect(':', "after the map's key")?;
            self.blank()?;
            let value = self.value()?;
            if entries.iter().any(|(other, _)| *other == key) {
                let name = self.text[key.span.start..key.span.end].to_string();
                self.duplicate(key.span, &name);
            } else {
                entries.push((key, value));
            }
            self.separator('}')?;
        }
    }

    fn number(&mut self) -> Parsed<Kind> {
        let start = self.at;
        let negative = self.rest().starts_with('-');
        if matches!(self.peek(), Some('+' | '-')) {
            self.at += 1;
        }
        let body = self.rest();
        let radix = match body.get(..2) {
            Some("0x") => 16,
            Some("0o") => 8,
            Some("0b") => 2,
            _ => 10,
        };
        let mut previous = ' ';
        let length = body
            .find(|c: char| {
                let exponent_sign = radix == 10 && matches!(c, '+' | '-') && matches!(previous, 'e' | 'E');
                previous = c;
                !(is_identifier_part(c) || c == '.' || exponent_sign)
            })
            .unwrap_or(body.len());
        self.at += length;
        let body = &body[..length];
        let wrong = |parser: &Self| {
            let written = &parser.text[start..parser.at];
            let mut error = parser.error_at(start, parser.at, format!("`{written}` is not a number"));
            if written.starts_with(|c: char| c.is_ascii_digit()) && !written.starts_with("0x") {
                error.hint = Some("if it is meant as text, put it in quotes".into());
            }
            error
        };
        let special = match body {
            "inf" | "inff32" | "inff64" => Some(f64::INFINITY),
            "NaN" | "NaNf32" | "NaNf64" => Some(f64::NAN),
            _ => None,
        };
        if let Some(number) = special {
            return Ok(Kind::Float(if negative { -number } else { number }));
        }
        let (digits, suffix) = split_suffix(body, radix);
        if radix != 10 || !digits.contains(['.', 'e', 'E']) && !suffix.starts_with('f') {
            let digits = if radix == 10 { digits } else { &digits[2..] };
            if digits.is_empty() || digits.starts_with('_') || !digits.chars().all(|c| c == '_' || c.is_digit(radix)) {
                return Err(wrong(self));
            }
            let digits = digits.replace('_', "");
            let Ok(number) = i128::from_str_radix(&digits, radix) else {
                return Err(self.error_at(start, self.at, "this number is too large"));
            };
            let number = if negative { -number } else { number };
            if !suffix_holds(suffix, number) {
                let written = &self.text[start..self.at];
                let message = format!("`{written}` does not fit into its own type `{suffix}`");
                return Err(self.error_at(start, self.at, message));
            }
            return Ok(Kind::Int(number));
        }
        // A digit must come before each `_`, and Rust's own reader decides about the rest.
        let misplaced = digits.starts_with('_') || digits.contains("._");
        match digits.replace('_', "").parse::<f64>() {
            Ok(number) if !misplaced && (suffix.is_empty() || suffix.starts_with('f')) => {
                Ok(Kind::Float(if negative { -number } else { number }))
            }
            _ => Err(wrong(self)),
        }
    }

    fn character(&mut self) -> Parsed<Kind> {
        let start = self.at;
        self.at += 1;
        let c = match self.peek() {
            Some('\\') => {
                self.at += 1;
                self.escape()?
            }
            Some(c) if c != '\'' => {
                self.at += c.len_utf8();
                c
            }
            _ => return Err(self.error("expected a character")),
        };
        if !self.skip('\'') {
            return Err(SyntaxError {
                hint: Some("texts are written in double quotes: \"text\"".into()),
                ..self.error_at(start, self.at, "a character in single quotes is one character")
            });
        }
        Ok(Kind::Char(c))
    }

    fn string(&mut self) -> Parsed<Kind> {
        let start = self.at;
        self.at += 1;
        let mut text = String::new();
        loop {
            let rest = self.rest();
            let Some(next) = rest.find(['"', '\\']) else {
                let message = "the string that begins here is never closed";
                return Err(self.error_at(start, start + 1, message));
            };
            text.push_str(&rest[..next]);
            self.at += next + 1;
            if rest[next..].starts_with('"') {
                self.long_string = Some(self.span(start)).filter(|_| self.text[start..self.at].contains('\n'));
                return Ok(Kind::String(text));
            }
            if self.skip_str("\r\n") || self.skip('\n') {
                let rest = self.rest();
                self.at += rest.len() - rest.trim_start_matches([' ', '\t', '\n', '\r']).len();
            } else {
                text.push(self.escape()?);
            }
        }
    }

    /// The character that an escape stands for; the backslash is read already.
    fn escape(&mut self) -> Parsed<char> {
        let start = self.at - 1;
        let Some(c) = self.peek() else {
            return Err(self.error("expected an escape after `\\`"));
        };
        self.at += c.len_utf8();
        let code = match c {
            '\'' | '"' | '\\' => return Ok(c),
            'n' => return Ok('\n'),
            'r' => return Ok('\r'),
            't' => return Ok('\t'),
            '0' => return Ok('\0'),
            'x' => {
                let digits = self.rest().get(..2).unwrap_or_default();
                self.at += digits.len();
                // Like Rust: only ASCII; `\u{..}` writes everything else.
                hexadecimal(digits).filter(|code| digits.len() == 2 && *code < 0x80)
            }
            'u' if self.skip('{') => {
                let rest = self.rest();
                let length = rest.find('}').unwrap_or(0);
                self.at += if length > 0 { length + 1 } else { 0 };
                Some(&rest[..length]).filter(|d| d.len() <= 6).and_then(hexadecimal)
            }
            _ => None,
        };
        code.and_then(char::from_u32).ok_or_else(|| SyntaxError {
            hint: Some(r#"in a path, write `\\` for `\`, or use a raw string r"..""#.into()),
            ..self.error_at(start, self.at, "this escape is not known")
        })
    }

    fn raw_string(&mut self) -> Parsed<Kind> {
        let start = self.at;
        self.at += 1;
        let hashes = self.rest().len() - self.rest().trim_start_matches('#').len();
        let close = format!("\"{}", "#".repeat(hashes));
        self.at += hashes;
        self.expect('"', "at the beginning of a raw string")?;
        let Some(length) = self.rest().find(&close) else {
            let message = format!("the raw string that begins here is never closed by `{close}`");
            return Err(self.error_at(start, start + 1, message));
        };
        let text = self.rest()[..length].to_string();
        self.at += length + close.len();
        Ok(Kind::String(text))
    }
}

fn hexadecimal(digits: &str) -> Option<u32> {
    // `from_str_radix` alone would take a sign.
    let valid = !digits.is_empty() && digits.chars().all(|c| c.is_ascii_hexdigit());
    u32::from_str_radix(digits, 16).ok().filter(|_| valid)
}

/// White space as RON defines it.
fn is_blank(c: char) -> bool {
    c.is_ascii_whitespace() || matches!(c, '\u{0B}' | '\u{85}' | '\u{200E}' | '\u{200F}' | '\u{2028}' | '\u{2029}')
}

/// `10u8` is `10` and `u8`.
fn split_suffix(body: &str, radix: u32) -> (&str, &str) {
    let integers = ["u8", "u16", "u32", "u64", "u128", "i8", "i16", "i32", "i64", "i128"];
    let floats = ["f32", "f64"];
    let known = integers.iter().chain(floats.iter().filter(|_| radix == 10));
    for suffix in known {
        if let Some(digits) = body.strip_suffix(suffix) {
            return (digits, suffix);
        }
    }
    (body, "")
}

fn suffix_holds(suffix: &str, number: i128) -> bool {
    match suffix {
        "u8" => u8::try_from(number).is_ok(),
        "u16" => u16::try_from(number).is_ok(),
        "u32" => u32::try_from(number).is_ok(),
        "u64" => u64::try_from(number).is_ok(),
        "u128" => u128::try_from(number).is_ok(),
        "i8" => i8::try_from(number).is_ok(),
        "i16" => i16::try_from(number).is_ok(),
        "i32" => i32::try_from(number).is_ok(),
        "i64" => i64::try_from(number).is_ok(),
        _ => true,
    }
}
