//! The WordPiece vocabulary of the sample captions, in BERT's `vocab.txt` form: one token a line, the line number is
//! the id.

use std::collections::{BTreeMap, HashMap};

/// BERT's special tokens, in the order of their ids here; `[PAD]` is 0.
pub const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

/// Lower-cases, deletes punctuation and splits: the cleaning that retrieval studies apply to captions.
pub fn words(caption: &str) -> Vec<String> {
    let mut text = String::with_capacity(caption.len());
    for c in caption.chars().flat_map(char::to_lowercase) {
        match c {
            ',' | '.' | '\'' | '!' | '?' | '"' | '(' | ')' | '*' | '#' | ':' | ';' | '~' => {}
            '-' | '/' => text.push(' '),
            other => text.push(other),
        }
    }
    text.split_whitespace().map(str::to_owned).collect()
}

/// The vocabulary of correctly spelled captions: special tokens, letters and digits, their `##` continuations (to which
/// mistyped words fall), then words by falling frequency.
pub fn build<'a>(captions: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for caption in captions {
        for word in words(caption) {
            *counts.entry(word).or_default() += 1;
        }
    }
    let mut tokens: Vec<String> = SPECIAL.iter().map(|&t| t.to_owned()).collect();
    let alphabet = || ('a'..='z').chain('0'..='9');
    tokens.extend(alphabet().map(String::from));
    tokens.extend(alphabet().map(|c| format!("##{c}")));
    let mut frequent: Vec<(String, usize)> = counts.into_iter().filter(|(word, _)| word.len() > 1).collect();
    // The map was in alphabetical order and the sort is stable, so ties are settled.
    frequent.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    tokens.extend(frequent.into_iter().map(|(word, _)| word));
    tokens
}

/// Greedy longest-match WordPiece: the token ids of a caption without [CLS] and [SEP]; `None` stands for `[UNK]`.
pub fn tokenize(caption: &str, vocabulary: &HashMap<&str, usize>) -> Vec<Option<usize>> {
    let mut ids = Vec::new();
    for word in words(caption) {
        let letters: Vec<char> = word.chars().collect();
        let (mut start, mut pieces) = (0, Vec::new());
        while start < letters.len() {
            let found = (start + 1..=letters.len()).rev().find_map(|end| {
                let body: String = letters[start..end].iter().collect();
                let piece = if start == 0 { body } else { format!("##{body}") };
                vocabulary.get(piece.as_str()).map(|&id| (id, end))
            });
            match found {
                Some((id, end)) => {
                    pieces.push(Some(id));
                    start = end;
                }
                None => {
                    pieces = vec![None];
                    break;
                }
            }
        }
        ids.extend(pieces);
    }
    ids
}
