//! The reader with places accepts what the `ron` crate accepts, and reads it as the same values.

use clip_host_recipe::Recipe;
use ron::extensions::Extensions;
use ron::ser::PrettyConfig;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// All of serde's forms that a recipe can hold.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    int: i64,
    float: f64,
    text: String,
    maybe: Option<Option<u32>>,
    shapes: Vec<Shape>,
    table: BTreeMap<String, i32>,
    pair: (bool, char),
    unit: (),
    marker: Marker,
    wrapped: Wrapped,
    two: Two,
    inner: Option<Box<Document>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Shape {
    Unit,
    New(f64),
    Maybe(Option<u8>),
    List(Vec<i8>),
    Two(i32, String),
    Named { x: u8, y: Vec<String> },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Marker;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Wrapped(f64);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Two(i32, bool);

/// SplitMix64 (Steele et al. 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn chance(&mut self) -> bool {
        self.below(2) == 0
    }

    fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(4)).map(|_| item(self)).collect()
    }

    fn text(&mut self) -> String {
        let alphabet = ['a', 'Z', ' ', '"', '\\', '\n', '\t', '\'', '/', '*', 'é', '漢', '\u{7f}', '\0', '(', ']', '#'];
        (0..self.below(8)).map(|_| alphabet[self.below(alphabet.len() as u64) as usize]).collect()
    }

    fn float(&mut self) -> f64 {
        match self.below(4) {
            0 => self.below(100) as f64,
            1 => -(self.below(1000) as f64) / 64.0,
            2 => f64::INFINITY,
            _ => Some(f64::from_bits(self.next())).filter(|x| x.is_finite()).unwrap_or(1e-300),
        }
    }

    fn shape(&mut self) -> Shape {
        match self.below(6) {
            0 => Shape::Unit,
            1 => Shape::New(self.float()),
            2 => Shape::Maybe(self.chance().then(|| self.next() as u8)),
            3 => Shape::List(self.list(|r| r.next() as i8)),
            4 => Shape::Two(self.next() as i32, self.text()),
            _ => Shape::Named { x: self.next() as u8, y: self.list(Self::text) },
        }
    }

    fn document(&mut self, depth: u32) -> Document {
        Document {
            int: self.next() as i64,
            float: self.float(),
            text: self.text(),
            maybe: self.chance().then(|| self.chance().then(|| self.next() as u32)),
            shapes: self.list(Self::shape),
            table: self.list(|r| (r.text(), r.next() as i32)).into_iter().collect(),
            pair: (self.chance(), self.text().chars().find(|c| *c != '\n').unwrap_or('x')),
            unit: (),
            marker: Marker,
            wrapped: Wrapped(self.float()),
            two: Two(self.next() as i32, self.chance()),
            inner: (depth > 0).then(|| Box::new(self.document(depth - 1))),
        }
    }

    /// The document's text, written as tersely or as loosely as RON allows.
    fn write(&mut self, document: &Document) -> String {
        if self.chance() {
            return ron::to_string(document).unwrap();
        }
        let pretty = PrettyConfig::new().struct_names(self.chance()).separate_tuple_members(self.chance());
        let text = ron::ser::to_string_pretty(document, pretty).unwrap();
        // Strings hold no line ends here: they are escaped.
        let mut loose = String::new();
        for line in text.lines() {
            loose.push_str(line);
            loose.push_str(match self.below(6) {
                0 => " // one \"line\" (\n",
                1 => "/* a /* nested */ ** comment\n\n */",
                2 => "\r\n\t",
                _ => "\n",
            });
        }
        loose
    }
}

/// `text` read as a section of a recipe.
fn ours<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let recipe = format!(
        "(data: {text}\n, model: (image_encoder: (plugin: \"a\"), text_encoder: (plugin: \"b\"), embed_dim: 1),
        loss: (plugin: \"c\"), optimizer: (plugin: \"d\", lr: 1.0), train: (epochs: 1, batch_size: 2))"
    );
    let recipe = Recipe::parse("test", &recipe, &[]).map_err(|e| e.to_string())?;
    recipe.section("data").map_err(|e| e.to_string())
}

#[test]
fn documents_read_as_they_were_written() {
    let mut random = Random(1);
    for i in 0..3000 {
        let document = random.document(i % 3);
        let text = random.write(&document);
        assert_eq!(ron::from_str::<Document>(&text).as_ref(), Ok(&document), "ron: {text}");
        assert_eq!(ours::<Document>(&text).as_ref(), Ok(&document), "{text}");
    }
}

#[test]
fn damaged_documents_never_panic_and_are_accepted_where_ron_accepts_them() {
    let mut random = Random(2);
    let (mut both, mut neither, mut only_ours) = (0, 0, 0);
    for _ in 0..6000 {
        let document = random.document(0);
        let mut text: Vec<char> = random.write(&document).chars().collect();
        for _ in 0..=random.below(2) {
            let at = random.below(text.len() as u64) as usize;
            match random.below(3) {
                0 => drop(text.remove(at)),
                1 => text.insert(
                    at,
                    ['(', ')', ',', '"', '1', '.', '_', ' ', 'x', '/', ':', '-'][random.below(12) as usize],
                ),
                _ => {
                    let other = random.below(text.len() as u64) as usize;
                    text.swap(at, other);
                }
            }
        }
        let text: String = text.into_iter().collect();
        match (ron::from_str::<Document>(&text), ours::<Document>(&text)) {
            (Ok(theirs), Ok(ours)) => {
                assert_eq!(theirs, ours, "{text}");
                both += 1;
            }
            (Err(_), Err(_)) => neither += 1,
            // In a map ron lets the last of equal keys win; this reader refuses them.
            (Ok(_), Err(error)) if error.contains("is set twice") => {}
            (Ok(_), Err(error)) => panic!("ron reads it:\n{text}\n{error}"),
            (Err(_), Ok(_)) => only_ours += 1,
        }
    }
    // Implicit `Some` and the like: rare, and the damage must have been real.
    assert!(both > 500 && neither > 1000, "{both} {neither}");
    assert!(only_ours < 300, "{only_ours} texts that ron refuses are read");
}

#[test]
fn numbers() {
    let ron = ron::Options::default();
    for text in [
        "0",
        "-0",
        "7",
        "+7",
        "-7",
        "0x1F",
        "0xff",
        "-0x10",
        "0b101",
        "0o17",
        "1_000",
        "1__0",
        "1_",
        "_1",
        "0x_1",
        "0x",
        "0xG",
        "0b2",
        "0o8",
        "9223372036854775807",
        "9223372036854775808",
        "-9223372036854775808",
        "1u8",
        "300u8",
        "-1i8",
        "5i64",
        "7f32",
        "7f64",
        "1.0",
        "1.",
        ".5",
        "-.5",
        "+.5",
        ".",
        "-",
        "+",
        "1e3",
        "1E3",
        "1e+3",
        "1e-3",
        "1.5e-3",
        "1e",
        "1e+",
        "1.5.2",
        "1_0.5",
        "0.1_0",
        "1._5",
        "._5",
        "1e1_0",
        "1.5f32",
        "1.5f64",
        "1.5u8",
        "inf",
        "-inf",
        "+inf",
        "NaN",
        "inff64",
        "--1",
        "+-1",
        "1 2",
        "1x",
        "1.x",
        "0x1.5",
        "1e400",
        "1e-400",
        "4.9e-324",
        "0.1",
        "123456789012345678901234567890.0",
    ] {
        // ron refuses `1u8` where no u8 is wanted; this reader checks that it is a u8, and takes it for a number.
        let typed = ["u8", "i8", "i64", "f32", "f64"].iter().any(|suffix| text.ends_with(suffix));
        let (theirs, mine) = (ron.from_str::<i64>(text).ok(), ours::<i64>(text).ok());
        assert!(theirs == mine || theirs.is_none() && typed, "{text} as i64: {theirs:?}, {mine:?}");
        let (theirs, mine) = (ron.from_str::<u8>(text).ok(), ours::<u8>(text).ok());
        assert!(theirs == mine || theirs.is_none() && typed, "{text} as u8: {theirs:?}, {mine:?}");
        // And integers of another base where a float is wanted.
        let (theirs, mine) = (ron.from_str::<f64>(text).ok(), ours::<f64>(text).ok());
        let both_nan = theirs.is_some_and(f64::is_nan) && mine.is_some_and(f64::is_nan);
        let lenient = theirs.is_none() && (typed || ours::<i64>(text).is_ok());
        assert!(theirs == mine || both_nan || lenient, "{text} as f64: {theirs:?}, {mine:?}");
    }
    for text in ["300u8", "-1u8", "1.5u8", "128i8"] {
        assert!(ours::<f64>(text).is_err() && ours::<i64>(text).is_err(), "{text}");
    }
}

#[test]
fn strings_and_characters() {
    for text in [
        r#""""#,
        r#""a""#,
        r#""é漢""#,
        r#""\n\r\t\0\\\"\'""#,
        r#""\x41""#,
        r#""\u{41}\u{10FFFF}""#,
        r#""\u{110000}""#,
        r#""\u{}""#,
        r#""\u{D800}""#,
        r#""\u{0000041}""#,
        r#""\u41""#,
        r#""\q""#,
        r#""\x4""#,
        r#""\x+1""#,
        "\"a\nb\"",
        "\"a\\\n   b\"",
        "\"a\\\r\n \t b\"",
        "r\"\\n\"",
        "r#\"a\"b\"#",
        "r##\"a\"#b\"##",
        "r#\"a\"",
        "\"a",
        "a",
        "'a'",
        "''",
        "'ab'",
        r"'\''",
        r"'\\'",
        r"'\n'",
        r"'\x41'",
        r"'\u{e9}'",
        "'",
        "'a",
        "'\"'",
        r#"'\"'"#,
    ] {
        // ron keeps characters and strings of one character apart; this reader takes either for the other.
        if text.starts_with('\'') {
            let (theirs, mine) = (ron::from_str::<char>(text).ok(), ours::<char>(text).ok());
            assert_eq!(theirs, mine, "{text} as char");
        } else {
            let (theirs, mine) = (ron::from_str::<String>(text).ok(), ours::<String>(text).ok());
            assert_eq!(theirs, mine, "{text} as String");
        }
    }
}

#[test]
fn lenient_forms_are_those_of_rons_extensions() {
    let all = Extensions::UNWRAP_NEWTYPES | Extensions::IMPLICIT_SOME | Extensions::UNWRAP_VARIANT_NEWTYPES;
    let ron = ron::Options::default().with_default_extension(all);
    assert_eq!(ron.from_str::<Option<u8>>("3").unwrap(), ours::<Option<u8>>("3").unwrap());
    assert_eq!(ron.from_str::<Wrapped>("3").unwrap(), ours::<Wrapped>("3").unwrap());
    assert_eq!(ours::<Wrapped>("Wrapped(3)").unwrap(), Wrapped(3.0));
    #[derive(Debug, PartialEq, Deserialize)]
    struct Point {
        x: i32,
    }
    #[derive(Debug, PartialEq, Deserialize)]
    enum Holder {
        Point(Point),
        Bare { x: i32 },
    }
    // With that extension ron reads only the short form, without it only the long one; this reader reads both.
    assert_eq!(ron.from_str::<Holder>("Point(x: 1)").unwrap(), ours::<Holder>("Point(x: 1)").unwrap());
    assert_eq!(ron::from_str::<Holder>("Point((x: 1))").unwrap(), ours::<Holder>("Point((x: 1))").unwrap());
    assert_eq!(ron::from_str::<Holder>("Bare(x: 2)").unwrap(), ours::<Holder>("Bare(x: 2)").unwrap());
    assert_eq!(ours::<Holder>("Bare((x: 2))").unwrap(), Holder::Bare { x: 2 });
    assert!(ours::<Holder>("Point(y: 1)").unwrap_err().contains("missing"));
    assert!(ours::<Holder>("Other(y: 1)").unwrap_err().contains("alid names: Bare, Point"));
}

#[test]
fn attributes() {
    let body = "data: (), model: (image_encoder: (plugin: \"a\"), text_encoder: (plugin: \"b\"), embed_dim: 1), loss: (plugin: \"c\"), \
                optimizer: (plugin: \"d\", lr: 1.0), train: (epochs: 1, batch_size: 2)";
    let read = |head: &str| Recipe::parse("test", &format!("{head} Recipe({body})"), &[]).map_err(|e| e.to_string());
    assert!(read("").is_ok());
    assert!(read("#![enable(implicit_some)]").is_ok());
    assert!(
        read("# ! [ enable ( implicit_some , unwrap_newtypes , ) ] /* */ #![enable(unwrap_variant_newtypes)]").is_ok()
    );
    let error = read("#![enable(implicit_som)]").unwrap_err();
    assert!(
        error.contains("test:1:11: unknown RON extension") && error.contains("did you mean `implicit_some`"),
        "{error}"
    );
    assert!(read("#![allow(x)]").is_err() && read("#![enable(implicit_some]").is_err() && read("#!").is_err());
}
