//! Makes image-text pairs to train on: pictures of a few objects, captioned in English, as WebDataset tars.
//!
//! The pairs are drawn from a seed and are the same to the byte on every machine and for any number of threads.
//! Held-out pairs show combinations (a colour and shape beside another colour and shape) that no training pair shows,
//! in families of near neighbours, and each held-out caption is true of its own picture only.
//!
//! The modules stand in the order in which a pair is made: [`scene`] draws what is there, [`split`] decides what is
//! held out, [`caption`] says it, [`render`] draws it, [`vocab`] collects the words and [`shard`] writes the files.

pub mod caption;
pub mod render;
pub mod rng;
pub mod scene;
pub mod settings;
pub mod shard;
pub mod split;
pub mod vocab;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use settings::{Difficulty, Settings};
use shard::Shard;
use split::Sample;

/// What to make. [`SynthConfig::default`] is the sample in `data/sample`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SynthConfig {
    /// Folder to write to; made when it is missing.
    pub out: PathBuf,
    /// Everything random follows from it.
    pub seed: u64,
    /// Number of training pairs.
    pub train: usize,
    /// Number of held-out pairs.
    pub val: usize,
    /// Pairs per tar.
    pub shard_size: usize,
    /// Side of the pictures in pixels, 32 to 1024.
    pub image_size: usize,
    /// JPEG quality, 1 to 100.
    pub quality: u8,
    /// How hard the pictures are to tell apart.
    pub difficulty: Difficulty,
    /// Also write a `.json` member per pair, with the keys that img2dataset writes.
    pub json: bool,
    /// Replace shards of an earlier run in `out`.
    pub overwrite: bool,
}

impl Default for SynthConfig {
    fn default() -> Self {
        Self {
            out: PathBuf::from("data/sample"),
            seed: 1,
            train: 5_000,
            val: 500,
            shard_size: 1_000,
            image_size: 64,
            quality: 54,
            difficulty: Difficulty::Standard,
            json: false,
            overwrite: false,
        }
    }
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The tars of training pairs, in order.
    pub train_shards: Vec<PathBuf>,
    /// The tars of held-out pairs, in order.
    pub val_shards: Vec<PathBuf>,
    /// The vocabulary file.
    pub vocab: PathBuf,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Tokens of the longest caption, [CLS] and [SEP] included.
    pub longest_caption: usize,
    /// Bytes of all tars.
    pub bytes: u64,
    /// Fraction of what held-out captions say that cannot be left out without the caption becoming true of another
    /// held-out picture.
    pub necessary_facts: f64,
}

/// Why nothing, or not all, was made.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// A setting out of range.
    #[error(
        "synthetic data: `{key}` must be {expected}, got {got}\nhint: see `clip-host data synth --help` for the ranges"
    )]
    Setting {
        /// Name of the setting.
        key: &'static str,
        /// The values it takes.
        expected: &'static str,
        /// The value given.
        got: String,
    },
    /// The folder holds shards already.
    #[error(
        "synthetic data: expected no shards in {out}, got {found}\nhint: choose another --out, or pass --overwrite to replace them"
    )]
    Exists {
        /// The folder.
        out: PathBuf,
        /// A shard found in it.
        found: String,
    },
    /// A file could not be written.
    #[error(
        "synthetic data: cannot {action} {path}: {source}\nhint: check that the folder is writable and the disk has room"
    )]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A picture could not be encoded.
    #[error(
        "synthetic data: cannot encode picture {index} as JPEG: {source}\nhint: this does not depend on the data; report it with the command line"
    )]
    Encode {
        /// Index within its split.
        index: usize,
        /// Why it failed.
        source: jpeg_encoder::EncodingError,
    },
}

/// Shorthand of this crate.
pub type Result<T> = std::result::Result<T, SynthError>;

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SynthError {
    let path = path.to_owned();
    move |source| SynthError::Io { action, path, source }
}

impl SynthConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`SynthError::Setting`] names the first setting out of range.
    pub fn validate(&self) -> Result<()> {
        let within = |key, value: usize, low: usize, high: usize, expected| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(SynthError::Setting { key, expected, got: value.to_string() })
            }
        };
        within("train", self.train, 1, 100_000_000, "1 to 100000000")?;
        // Every held-out caption is compared with every other picture: quadratic, so bounded.
        within("val", self.val, 0, 5_000, "0 to 5000")?;
        within("shard_size", self.shard_size, 1, 100_000, "1 to 100000")?;
        within("image_size", self.image_size, 32, 1_024, "32 to 1024")?;
        within("quality", usize::from(self.quality), 1, 100, "1 to 100")
    }
}

/// Makes the pairs and writes `train-00000.tar` ..., `val-00000.tar` ... and `vocab.txt` to `config.out`.
///
/// Each file appears whole or not at all, the vocabulary last: where it is, the set is complete.
///
/// # Errors
/// [`SynthError`]: a setting out of range, shards in the way, or a file that cannot be written.
pub fn generate(config: &SynthConfig) -> Result<Summary> {
    config.validate()?;
    fs::create_dir_all(&config.out).map_err(io_error("create the folder", &config.out))?;
    make_room(config)?;

    let settings = config.difficulty.settings();
    let mut captions = Vec::with_capacity(config.train + config.val);
    let mut bytes = 0;

    let train = |index: usize| split::train_sample(config.seed, index, &settings);
    let train_shards = write_split(config, "train", config.train, &settings, train, &mut captions, &mut bytes)?;

    let held_out = split::val_samples(config.seed, config.val, &settings);
    let val = |index: usize| (held_out[index].clone(), rng::Rng::new(config.seed, VAL_PIXELS, index as u64));
    let val_shards = write_split(config, "val", config.val, &settings, val, &mut captions, &mut bytes)?;

    let tokens = vocab::build(captions.iter().map(|c| c.spelled.as_str()));
    let index: HashMap<&str, usize> = tokens.iter().enumerate().map(|(i, t)| (t.as_str(), i)).collect();
    let longest = captions.iter().map(|c| vocab::tokenize(&c.text, &index).len() + 2).max().unwrap_or(2);
    let vocab = config.out.join("vocab.txt");
    let text: String = tokens.iter().flat_map(|t| [t.as_str(), "\n"]).collect();
    shard::write_atomically(&vocab, text.as_bytes()).map_err(io_error("write", &vocab))?;

    Ok(Summary {
        train_shards,
        val_shards,
        vocab,
        vocab_size: tokens.len(),
        longest_caption: longest,
        bytes,
        necessary_facts: necessary_facts(&held_out),
    })
}

const VAL_PIXELS: u64 = 3;

/// Refuses or removes the shards of an earlier run: a stale one would be read with the new ones.
fn make_room(config: &SynthConfig) -> Result<()> {
    let listing = fs::read_dir(&config.out).map_err(io_error("list", &config.out))?;
    let mut names: Vec<String> = listing
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| (name.starts_with("train-") || name.starts_with("val-")) && name.ends_with(".tar"))
        .collect();
    names.sort();
    if let (false, Some(found)) = (config.overwrite, names.first()) {
        return Err(SynthError::Exists { out: config.out.clone(), found: found.clone() });
    }
    for name in names {
        let path = config.out.join(name);
        fs::remove_file(&path).map_err(io_error("remove", &path))?;
    }
    Ok(())
}

fn write_split(
    config: &SynthConfig,
    name: &str,
    count: usize,
    settings: &Settings,
    sample: impl Fn(usize) -> (Sample, rng::Rng) + Sync,
    captions: &mut Vec<caption::Caption>,
    bytes: &mut u64,
) -> Result<Vec<PathBuf>> {
    let mut shards = Vec::new();
    for (number, start) in (0..count).step_by(config.shard_size).enumerate() {
        let end = (start + config.shard_size).min(count);
        let path = config.out.join(format!("{name}-{number:05}.tar"));
        let mut shard = Shard::create(&path).map_err(io_error("create", &path))?;
        for (index, made) in (start..end).zip(in_parallel(start..end, |index| {
            let (sample, mut rng) = sample(index);
            let jpeg = encode(&sample, config, settings, index, &mut rng);
            (sample, jpeg)
        })) {
            let (sample, jpeg) = made;
            let jpeg = jpeg?;
            let key = format!("{index:09}");
            let add = |shard: &mut Shard| -> io::Result<()> {
                shard.add(&format!("{key}.jpg"), &jpeg)?;
                shard.add(&format!("{key}.txt"), sample.caption.text.as_bytes())?;
                if config.json {
                    shard.add(&format!("{key}.json"), metadata(&key, &sample, config).as_bytes())?;
                }
                Ok(())
            };
            add(&mut shard).map_err(io_error("write", &path))?;
            captions.push(sample.caption);
        }
        shard.finish().map_err(io_error("finish", &path))?;
        *bytes += fs::metadata(&path).map_err(io_error("read", &path))?.len();
        shards.push(path);
    }
    Ok(shards)
}

/// Maps the range on all cores; the results are in order, so threads change nothing.
fn in_parallel<T: Send>(range: std::ops::Range<usize>, make: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(range.len().max(1));
    let chunk = range.len().div_ceil(threads).max(1);
    let make = &make;
    std::thread::scope(|scope| {
        let workers: Vec<_> = range
            .clone()
            .step_by(chunk)
            .map(|start| {
                let end = (start + chunk).min(range.end);
                scope.spawn(move || (start..end).map(make).collect::<Vec<T>>())
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| match worker.join() {
                Ok(made) => made,
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect()
    })
}

fn encode(
    sample: &Sample,
    config: &SynthConfig,
    settings: &Settings,
    index: usize,
    rng: &mut rng::Rng,
) -> Result<Vec<u8>> {
    let pixels = render::render(&sample.scene, config.image_size, settings, rng);
    let mut jpeg = Vec::new();
    let mut encoder = jpeg_encoder::Encoder::new(&mut jpeg, config.quality);
    encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::F_2_2);
    encoder.set_optimized_huffman_tables(true);
    // At most 1024, checked by `validate`.
    let side = config.image_size as u16;
    encoder
        .encode(&pixels, side, side, jpeg_encoder::ColorType::Rgb)
        .map_err(|source| SynthError::Encode { index, source })?;
    Ok(jpeg)
}

/// The `.json` member with img2dataset's keys.
fn metadata(key: &str, sample: &Sample, config: &SynthConfig) -> String {
    let side = config.image_size;
    serde_json::json!({
        "url": "", "caption": sample.caption.text, "key": key, "status": "success", "error_message": null,
        "width": side, "height": side, "original_width": side, "original_height": side, "exif": "{}",
    })
    .to_string()
}

/// See [`Summary::necessary_facts`].
fn necessary_facts(samples: &[Sample]) -> f64 {
    let (mut all, mut necessary) = (0usize, 0usize);
    for (index, sample) in samples.iter().enumerate() {
        for weaker in sample.caption.facts.weakenings() {
            all += 1;
            let others = samples.iter().enumerate().filter(|(other, _)| *other != index);
            necessary += usize::from(others.into_iter().any(|(_, other)| weaker.hold(&other.scene)));
        }
    }
    if all == 0 { 0.0 } else { necessary as f64 / all as f64 }
}
