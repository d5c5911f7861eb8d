//! A plugin's name in its three forms: the id in recipes, the crate, the type.

/// A name that can be all three.
#[derive(Debug, PartialEq, Eq)]
pub struct Name {
    id: String,
    type_name: String,
}

/// Longer names make file names that some systems refuse.
const MOST: usize = 64;

/// Words that Rust keeps for itself, of those that an id could be.
const KEYWORDS: [&str; 50] = [
    "abstract", "as", "async", "await", "become", "box", "break", "const", "continue", "crate", "do", "dyn", "else",
    "enum", "extern", "false", "final", "fn", "for", "gen", "if", "impl", "in", "let", "loop", "macro", "match", "mod",
    "move", "mut", "override", "priv", "pub", "ref", "return", "self", "static", "struct", "super", "trait", "true",
    "try", "type", "typeof", "unsafe", "unsized", "use", "virtual", "where", "while",
];

/// Crates that Rust or every plugin already has by these names.
const CRATES: [&str; 10] = [
    "abi_stable",
    "alloc",
    "clip_host_plugin_abi",
    "clip_host_plugin_api",
    "core",
    "proc_macro",
    "schemars",
    "serde",
    "std",
    "test",
];

/// Types and traits that a plugin's source uses by these names, or with `Config` behind.
const TYPES: [&str; 31] = [
    "BuildError",
    "Conv",
    "Copy",
    "DType",
    "Debug",
    "Default",
    "Deserialize",
    "Encoder",
    "EncoderInputs",
    "Err",
    "Graph",
    "Harness",
    "Init",
    "InputShape",
    "JsonSchema",
    "Layout",
    "Loss",
    "LossInputs",
    "Modality",
    "Ok",
    "Optimizer",
    "ParamInfo",
    "ParamUpdate",
    "Plugin",
    "Pool",
    "Progress",
    "Result",
    "Scheduler",
    "Serialize",
    "Tensor",
    "Vec",
];

/// More of the same, from the standard library.
const STANDARD: [&str; 5] = ["Option", "Some", "None", "String", "Value"];

impl Name {
    /// Checks a name. The error completes the sentence "cannot make it: …".
    pub fn parse(text: &str) -> Result<Name, String> {
        let refused = |expected: &str, hint: String| Err(format!("expected {expected}, got `{text}`\nhint: {hint}"));
        let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if !text.starts_with(|c: char| c.is_ascii_lowercase()) || !text.chars().all(valid) {
            let expected = "a name that begins with a lower-case letter and goes on with those, digits and `_`";
            return refused(expected, suggestion(text));
        }
        if text.len() > MOST {
            return refused(&format!("a name of at most {MOST} characters"), "say the rest in its `DOC`".into());
        }
        let other = format!("my_{}", text.trim_end_matches('_'));
        if KEYWORDS.contains(&text) {
            return refused("a name that is no word of Rust's own", format!("`{other}` would do"));
        }
        if CRATES.contains(&text) {
            return refused("a name that no crate has which it needs", format!("`{other}` would do"));
        }
        let words = text.split('_').filter_map(|word| {
            let mut chars = word.chars();
            Some(chars.next()?.to_ascii_uppercase().to_string() + chars.as_str())
        });
        let type_name: String = words.collect();
        if TYPES.iter().chain(&STANDARD).any(|taken| *taken == type_name) {
            let expected = format!("a name whose type is not `{type_name}`, which its source needs");
            return refused(&expected, format!("`{other}` would do"));
        }
        Ok(Name { id: text.into(), type_name })
    }

    /// The id in recipes, which is also the crate's name: `my_loss`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The type that implements it: `MyLoss`.
    pub fn type_name(&self) -> &str {
        &self.type_name
    }
}

/// What a name may have been meant as.
fn suggestion(text: &str) -> String {
    let mut id = String::new();
    let mut small = false;
    for c in text.chars() {
        match c {
            'A'..='Z' => {
                // "MyLoss" is "my_loss", "my-Loss" too.
                if small {
                    id.push('_');
                }
                id.push(c.to_ascii_lowercase());
            }
            'a'..='z' | '0'..='9' => id.push(c),
            _ if !id.is_empty() && !id.ends_with('_') => id.push('_'),
            _ => {}
        }
        small = c.is_ascii_lowercase() || c.is_ascii_digit();
    }
    let id = id.trim_matches('_').trim_start_matches(|c: char| c.is_ascii_digit() || c == '_');
    // What is left has the form of a name, so that this does not come back here.
    match !id.is_empty() && Name::parse(id).is_ok() {
        true => format!("`{id}` would do"),
        false => "`my_loss` would do".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names_have_three_forms() {
        for (text, type_name) in [("my_loss", "MyLoss"), ("a", "A"), ("x2_y", "X2Y"), ("siglip", "Siglip")] {
            let name = Name::parse(text).expect(text);
            assert_eq!((name.id(), name.type_name()), (text, type_name));
        }
    }

    #[test]
    fn bad_names_are_refused_with_a_better_one() {
        for (text, hint) in [
            ("My-Loss", "hint: `my_loss` would do"),
            ("MyLoss", "hint: `my_loss` would do"),
            ("my-loss", "hint: `my_loss` would do"),
            ("2fast", "hint: `fast` would do"),
            ("_x", "hint: `x` would do"),
            ("../up", "hint: `up` would do"),
            ("größe", "hint: `gr_e` would do"),
            ("", "hint: `my_loss` would do"),
            ("match", "hint: `my_match` would do"),
            ("serde", "hint: `my_serde` would do"),
            ("loss", "hint: `my_loss` would do"),
            ("build_error", "hint: `my_build_error` would do"),
        ] {
            let error = Name::parse(text).expect_err(text);
            assert!(error.ends_with(hint), "{text}: {error}");
            assert!(error.starts_with("expected ") && error.contains(&format!("got `{text}`")), "{error}");
        }
        assert!(Name::parse(&"a".repeat(65)).is_err());
    }
}
