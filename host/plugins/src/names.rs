//! "Did you mean …": proposals for names that are not known.

/// The valid name that `name` most likely stands for, if any is near enough to be worth proposing. Case and `-` for `_`
/// do not count.
pub(crate) fn nearest<'a>(name: &str, valid: &[&'a str]) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace('-', "_");
    let wanted = plain(name);
    valid
        .iter()
        .map(|valid| (strsim::jaro_winkler(&wanted, &plain(valid)), *valid))
        .filter(|(score, _)| *score >= 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, valid)| valid)
}

/// "did you mean `x`? Valid keys: a, b": the hint for an unknown name; `what` is the plural of what is named.
pub(crate) fn hint(name: &str, what: &str, valid: &[&str]) -> String {
    let mut sorted = valid.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    if sorted.is_empty() {
        return format!("there are no {what} here");
    }
    match nearest(name, &sorted) {
        Some(near) => format!("did you mean `{near}`? Valid {what}: {}", sorted.join(", ")),
        None => format!("valid {what}: {}", sorted.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_forgives_case_and_dashes_but_not_anything() {
        let valid = ["temperature", "label_smoothing"];
        assert_eq!(nearest("temprature", &valid), Some("temperature"));
        assert_eq!(nearest("Label-Smoothing", &valid), Some("label_smoothing"));
        assert_eq!(nearest("zz", &valid), None);
        assert_eq!(hint("q", "keys", &["b", "a", "b"]), "valid keys: a, b");
        assert_eq!(hint("q", "keys", &[]), "there are no keys here");
    }
}
