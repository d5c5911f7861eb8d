//! Captions to token ids: the studies' cleaning, then BERT WordPiece.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::utils::truncation::TruncationParams;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer, TokenizerImpl,
};

use crate::config::setting;
use crate::error::{DataError, Result};

/// Special tokens in the order in which [`build_vocab`] numbers them, so that padding is 0 as in BERT.
pub const SPECIAL_TOKENS: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

/// How captions become ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TextConfig {
    /// Vocabulary, one token a line; the line number from 0 is the id. BERT's `vocab.txt` fits.
    pub vocab: PathBuf,
    /// Ids a caption, with `[CLS]`, `[SEP]` and padding.
    pub max_length: usize,
    /// Clean captions first as the studies do, see [`clean_caption`].
    pub clean: bool,
    /// Words that cleaning keeps.
    pub max_words: usize,
}

impl Default for TextConfig {
    fn default() -> Self {
        TextConfig { vocab: PathBuf::new(), max_length: 30, clean: true, max_words: 30 }
    }
}

impl TextConfig {
    /// Whether the vocabulary is there and whole.
    ///
    /// # Errors
    /// See [`CaptionTokenizer::open`].
    pub fn check(&self, base: &Path) -> Result<()> {
        read_vocab(&self.vocab, base).map(|_| ())
    }

    /// The settings that are out of range.
    pub fn check_ranges(&self) -> Vec<DataError> {
        let mut errors = Vec::new();
        if !(3..=4096).contains(&self.max_length) {
            let hint = "[CLS], at least one word and [SEP] must fit; the studies use 30";
            errors.push(setting("text.max_length", "3 to 4096 tokens", self.max_length, hint));
        }
        if self.clean && self.max_words == 0 {
            errors.push(setting("text.max_words", "at least 1", 0, "the studies use 30"));
        }
        errors
    }
}

type BertTokenizer = TokenizerImpl<WordPiece, BertNormalizer, BertPreTokenizer, BertProcessing, DecoderWrapper>;

/// Captions to ids of fixed length.
#[derive(Debug)]
pub struct CaptionTokenizer {
    tokenizer: BertTokenizer,
    config: TextConfig,
    vocab_size: usize,
    pad: i32,
}

impl CaptionTokenizer {
    /// Opens the vocabulary of a configuration.
    ///
    /// # Errors
    /// [`DataError::Missing`], [`DataError::Io`], or [`DataError::Format`] if a special token is missing or a token
    /// stands twice.
    pub fn open(config: &TextConfig, base: &Path) -> Result<Self> {
        if let Some(error) = config.check_ranges().into_iter().next() {
            return Err(error);
        }
        let (path, text, vocab) = read_vocab(&config.vocab, base)?;
        let bad = |e: &dyn std::fmt::Display| vocab_error(&path, "a WordPiece vocabulary", &e.to_string());
        let id = |token: &str| (token.to_string(), vocab[token]);
        let (cls, sep, pad) = (id("[CLS]"), id("[SEP]"), vocab["[PAD]"] as i32);
        let vocab_size = vocab.len();
        // The builder's defaults are BERT's: `[UNK]`, `##`, words of at most 100 characters.
        let vocab = WordPiece::read_bytes(text.as_bytes()).map_err(|e| bad(&e))?;
        let model = WordPiece::builder().vocab(vocab).build().map_err(|e| bad(&e))?;
        let mut tokenizer = BertTokenizer::new(model);
        let truncation = TruncationParams { max_length: config.max_length, ..TruncationParams::default() };
        tokenizer
            .with_normalizer(Some(normalizer()))
            .with_pre_tokenizer(Some(BertPreTokenizer))
            .with_post_processor(Some(BertProcessing::new(sep, cls)))
            .with_truncation(Some(truncation))
            .map_err(|e| bad(&e))?;
        let special: Vec<AddedToken> = SPECIAL_TOKENS.iter().map(|t| AddedToken::from(*t, true)).collect();
        tokenizer.add_special_tokens(&special);
        Ok(CaptionTokenizer { tokenizer, config: config.clone(), vocab_size, pad })
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Ids a caption.
    pub fn max_length(&self) -> usize {
        self.config.max_length
    }

    /// Id of padding.
    pub fn pad_id(&self) -> i32 {
        self.pad
    }

    /// Writes the ids of a caption, padded to `ids.len()` (= [`max_length`](Self::max_length)), and returns how many
    /// are no padding.
    ///
    /// # Errors
    /// The tokenizer's message; none is known for valid UTF-8.
    pub fn encode(&self, caption: &str, ids: &mut [i32]) -> Result<usize, String> {
        let encoding = if self.config.clean {
            self.tokenizer.encode_fast(clean_caption(caption, self.config.max_words), true)
        } else {
            self.tokenizer.encode_fast(caption, true)
        };
        let encoding = encoding.map_err(|e| e.to_string())?;
        let tokens = encoding.get_ids();
        let count = tokens.len().min(ids.len());
        for (slot, &token) in ids.iter_mut().zip(tokens) {
            *slot = token as i32;
        }
        ids[count..].fill(self.pad);
        Ok(count)
    }
}

fn normalizer() -> BertNormalizer {
    BertNormalizer::new(true, true, None, true)
}

fn vocab_error(path: &Path, expected: &str, got: &str) -> DataError {
    DataError::Format {
        what: "vocabulary",
        path: path.into(),
        expected: expected.into(),
        got: got.into(),
        hint: "use BERT's vocab.txt, or make one with `clip-host data`".into(),
    }
}

fn read_vocab(vocab: &Path, base: &Path) -> Result<(PathBuf, String, HashMap<String, u32>)> {
    if vocab.as_os_str().is_empty() {
        return Err(setting("text.vocab", "the path of a vocabulary", "nothing", "name a vocab.txt, one token a line"));
    }
    let path = base.join(vocab);
    if !path.is_file() {
        return Err(DataError::Missing { what: "vocabulary", path, base: base.into(), more: String::new() });
    }
    let bytes = std::fs::read(&path).map_err(|e| DataError::io("read", &path, &e))?;
    let text = String::from_utf8(bytes).map_err(|e| vocab_error(&path, "UTF-8", &e.to_string()))?;
    let mut ids = HashMap::new();
    for (line, token) in text.lines().enumerate() {
        if let Some(earlier) = ids.insert(token.to_string(), line as u32) {
            let got = format!("`{token}` in lines {} and {}", earlier + 1, line + 1);
            return Err(vocab_error(&path, "each token once", &got));
        }
    }
    for token in &SPECIAL_TOKENS[..4] {
        if !ids.contains_key(*token) {
            return Err(vocab_error(&path, &format!("a line `{token}`"), "none"));
        }
    }
    Ok((path, text, ids))
}

/// White space as Python's regular expressions see it: Unicode's, and the four ASCII separators U+001C to U+001F.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The studies' caption cleaning: lower case; `, . ' ! ? " ( ) * # : ; ~` deleted; `-` and `/` become spaces;
/// `<person>` becomes `person`; runs of two or more white-space characters become one space; trailing newlines, then
/// spaces at both ends go; the first `max_words` words stay.
pub fn clean_caption(caption: &str, max_words: usize) -> String {
    let mut text: String = caption
        .to_lowercase()
        .chars()
        .filter(|c| !matches!(c, ',' | '.' | '\'' | '!' | '?' | '"' | '(' | ')' | '*' | '#' | ':' | ';' | '~'))
        .map(|c| if matches!(c, '-' | '/') { ' ' } else { c })
        .collect();
    if text.contains("<person>") {
        text = text.replace("<person>", "person");
    }
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if is_space(c) && chars.next_if(|&next| is_space(next)).is_some() {
            while chars.next_if(|&next| is_space(next)).is_some() {}
            out.push(' ');
        } else {
            out.push(c);
        }
    }
    let trimmed = out.trim_end_matches('\n').trim_matches(' ');
    match trimmed.match_indices(' ').nth(max_words.saturating_sub(1)) {
        Some((end, _)) => trimmed[..end].to_string(),
        None => trimmed.to_string(),
    }
}

/// Makes a vocabulary from captions: the special tokens, every character that occurs (alone and as a continuation, so
/// that no word made of them is unknown), then whole words by falling frequency, ties in alphabetical order.
///
/// `size` bounds the number of tokens, `min_count` leaves out rarer words; `config.clean` and `config.max_words` apply.
pub fn build_vocab<'a>(
    captions: impl IntoIterator<Item = &'a str>,
    config: &TextConfig,
    size: usize,
    min_count: usize,
) -> Vec<String> {
    let mut counts: HashMap<String, usize> = HashMap::new();
    let normalizer = normalizer();
    for caption in captions {
        let cleaned = if config.clean { clean_caption(caption, config.max_words) } else { caption.to_string() };
        let mut normalized = NormalizedString::from(cleaned);
        // Neither step can fail on valid UTF-8; a caption it did fail on would only not be counted.
        if normalizer.normalize(&mut normalized).is_err() {
            continue;
        }
        let mut pre = PreTokenizedString::from(normalized);
        if BertPreTokenizer.pre_tokenize(&mut pre).is_err() {
            continue;
        }
        for (word, _, _) in pre.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            *counts.entry(word.to_string()).or_default() += 1;
        }
    }
    let mut characters: Vec<char> = counts.keys().flat_map(|w| w.chars()).collect();
    characters.sort_unstable();
    characters.dedup();
    let mut vocab: Vec<String> = SPECIAL_TOKENS.map(String::from).to_vec();
    vocab.extend(characters.iter().map(char::to_string));
    vocab.extend(characters.iter().map(|c| format!("##{c}")));
    let mut words: Vec<(String, usize)> =
        counts.into_iter().filter(|(word, count)| *count >= min_count && word.chars().nth(1).is_some()).collect();
    words.sort_unstable_by(|(a, m), (b, n)| n.cmp(m).then_with(|| a.cmp(b)));
    vocab.extend(words.into_iter().map(|(word, _)| word));
    vocab.truncate(size);
    vocab
}

/// Writes a vocabulary, one token a line.
///
/// # Errors
/// [`DataError::Io`].
pub fn write_vocab(vocab: &[String], path: &Path) -> Result<()> {
    let mut text = vocab.join("\n");
    text.push('\n');
    std::fs::write(path, text).map_err(|e| DataError::io("write", path, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_built_vocabulary_knows_every_word_of_its_captions() {
        let captions = ["A red-brown dog; a DOG!", "the dog's über ball", "the the the"];
        let config = TextConfig { vocab: "v.txt".into(), max_length: 16, ..TextConfig::default() };
        let vocab = build_vocab(captions, &config, 1000, 1);
        assert_eq!(vocab[..5], SPECIAL_TOKENS);
        let at = |token: &str| vocab.iter().position(|t| t == token).unwrap();
        assert!(at("the") < at("dog") && at("dog") < at("ball") && at("ball") < at("brown"), "{vocab:?}");
        // Accents are stripped as BERT does, so `über` counts as `uber`.
        assert!(at("u") < at("##u") && at("##u") < at("the") && vocab.contains(&"uber".to_string()));
        let folder = std::env::temp_dir().join(format!("clip-host-vocab-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        write_vocab(&vocab, &folder.join("v.txt")).unwrap();
        let tokenizer = CaptionTokenizer::open(&config, &folder).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let mut ids = [0; 16];
        // Whole words are one token; a word of known characters is spelled; others are unknown.
        assert_eq!(tokenizer.encode("The red dogd", &mut ids).unwrap(), 2 + 3 + 1);
        let want = ["[CLS]", "the", "red", "dog", "##d", "[SEP]", "[PAD]"].map(|t| at(t) as i32);
        assert_eq!(ids[..7], want);
        tokenizer.encode("qqq", &mut ids).unwrap();
        assert_eq!(ids[1], at("[UNK]") as i32);
        // Rarer words and a bound on the size.
        assert!(!build_vocab(captions, &config, 1000, 2).contains(&"ball".to_string()));
        assert_eq!(build_vocab(captions, &config, 7, 1).len(), 7);
        assert_eq!(vocab, build_vocab(captions, &config, 1000, 1), "the same every time");
    }

    #[test]
    fn long_captions_end_with_sep() {
        let folder = std::env::temp_dir().join(format!("clip-host-long-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let config = TextConfig { vocab: "v.txt".into(), max_length: 5, ..TextConfig::default() };
        write_vocab(&build_vocab(["a b c d e f"], &config, 100, 1), &folder.join("v.txt")).unwrap();
        let tokenizer = CaptionTokenizer::open(&config, &folder).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let mut ids = [0; 5];
        assert_eq!(tokenizer.encode("a b c d e f", &mut ids).unwrap(), 5);
        assert_eq!((ids[0], ids[4]), (2, 3));
        assert_eq!(tokenizer.encode("", &mut ids).unwrap(), 2);
        assert_eq!(ids, [2, 3, 0, 0, 0]);
    }

    #[test]
    fn cleaning_keeps_the_first_words() {
        assert_eq!(clean_caption("one two  three four", 3), "one two three");
        assert_eq!(clean_caption("one", 3), "one");
        assert_eq!(clean_caption("", 3), "");
    }
}
