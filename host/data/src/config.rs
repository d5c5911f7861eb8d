//! The data section of a recipe.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::augment::AugmentConfig;
use crate::error::{DataError, Result};
use crate::names;
use crate::text::TextConfig;

/// Mean of CLIP's training images, RGB in 0..1 (Radford et al. 2021).
pub const CLIP_MEAN: [f32; 3] = [0.48145466, 0.4578275, 0.40821073];
/// Standard deviation of CLIP's training images, RGB in 0..1 (Radford et al. 2021), with the digits it was published with.
#[allow(clippy::excessive_precision)]
pub const CLIP_STD: [f32; 3] = [0.26862954, 0.26130258, 0.27577711];

/// Where samples come from. Relative paths start at the base folder that the caller passes (the recipe's folder).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// WebDataset tars as img2dataset writes them: `Tar("cc3m-train-{0000..0575}.tar")` or `Tar("*.tar")`.
    Tar(String),
    /// A JSON list of `{image, caption, image_id}`; `caption` is a string or a list of strings. Rows with the same
    /// image belong to one image.
    JsonList {
        /// The list.
        file: PathBuf,
        /// Folder that the `image` paths start from.
        images: PathBuf,
    },
    /// The Karpathy split files (`dataset_coco.json`): `images[]` with `filepath`, `filename`, `split`,
    /// `sentences[].raw`.
    Karpathy {
        /// The JSON file.
        file: PathBuf,
        /// Folder that `filepath/filename` start from.
        images: PathBuf,
        /// `train`, `val`, `test` or `restval`; several joined by `+`.
        split: String,
    },
    /// One folder a class, captioned by a template.
    ImageFolder {
        /// Folder that holds the class folders.
        root: PathBuf,
        /// Caption; `{c}` stands for the class, its folder's name with `_` as spaces.
        #[serde(default = "default_template")]
        template: String,
    },
    /// A table with a header line, as open_clip reads it.
    Csv {
        /// The table.
        file: PathBuf,
        /// Folder that the image paths start from.
        #[serde(default)]
        images: PathBuf,
        /// Column of the image paths.
        #[serde(default = "default_image_column")]
        image_column: String,
        /// Column of the captions.
        #[serde(default = "default_caption_column")]
        caption_column: String,
        /// Character between columns.
        #[serde(default = "default_separator")]
        separator: char,
    },
}

fn default_template() -> String {
    "a photo of a {c}".into()
}
fn default_image_column() -> String {
    "filepath".into()
}
fn default_caption_column() -> String {
    "title".into()
}
fn default_separator() -> char {
    '\t'
}

/// Everything about data: sources, image and text preparation, workers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Sources of training pairs, concatenated in this order.
    pub train: Vec<Source>,
    /// Sources of held-out pairs.
    pub val: Vec<Source>,
    /// Height and width of the images that the model sees, in pixels.
    pub image_size: usize,
    /// Mean that is subtracted from RGB in 0..1.
    pub mean: [f32; 3],
    /// Standard deviation that the difference is divided by.
    pub std: [f32; 3],
    /// Augmentation of training images.
    pub augment: AugmentConfig,
    /// Captions to token ids.
    pub text: TextConfig,
    /// Threads that prepare batches; 0 prepares them in the caller's thread.
    pub workers: usize,
    /// Batches that are prepared ahead, besides the one that each worker is at.
    pub queue_batches: usize,
    /// Most bytes of decoded images kept in memory, for data that is small and read often; 0 keeps none.
    pub cache_bytes: u64,
}

impl Default for DataConfig {
    fn default() -> Self {
        DataConfig {
            train: Vec::new(),
            val: Vec::new(),
            image_size: 224,
            mean: CLIP_MEAN,
            std: CLIP_STD,
            augment: AugmentConfig::default(),
            text: TextConfig::default(),
            workers: 2,
            queue_batches: 2,
            cache_bytes: 0,
        }
    }
}

/// Largest side of a training image. Far above any model's; it catches a slipped digit before memory does.
const MAX_IMAGE_SIZE: usize = 4096;

impl DataConfig {
    /// Everything that can be known wrong without reading the data, all at once: ranges, the vocabulary, and which
    /// files of the sources are missing. Empty if all is well.
    pub fn check(&self, base: &Path) -> Vec<DataError> {
        let mut errors = self.check_ranges();
        if let Err(e) = self.text.check(base) {
            errors.push(e);
        }
        if self.train.is_empty() {
            errors.push(setting("train", "at least one source", "none", "add a source, as in `[Tar(\"*.tar\")]`"));
        }
        for source in self.train.iter().chain(&self.val) {
            if let Err(e) = source.check(base) {
                errors.push(e);
            }
        }
        errors
    }

    /// The settings that are out of range.
    pub fn check_ranges(&self) -> Vec<DataError> {
        let mut errors = self.augment.check();
        if !(1..=MAX_IMAGE_SIZE).contains(&self.image_size) {
            let expected = format!("1 to {MAX_IMAGE_SIZE} pixels");
            errors.push(setting("image_size", &expected, self.image_size, "the study used 256, CLIP 224"));
        }
        if self.std.iter().any(|s| !s.is_finite() || *s <= 0.0) {
            let got = format!("{:?}", self.std);
            errors.push(setting("std", "three numbers above 0", got, "leave it out for CLIP's statistics"));
        }
        if self.mean.iter().any(|m| !m.is_finite()) {
            let got = format!("{:?}", self.mean);
            errors.push(setting("mean", "three finite numbers", got, "leave it out for CLIP's statistics"));
        }
        if self.workers > 1024 {
            errors.push(setting("workers", "0 to 1024 threads", self.workers, "one a core is enough"));
        }
        if self.queue_batches > 1024 {
            errors.push(setting(
                "queue_batches",
                "0 to 1024",
                self.queue_batches,
                "2 is enough; more only take memory",
            ));
        }
        errors.extend(self.text.check_ranges());
        errors
    }
}

/// A [`DataError::Setting`].
pub(crate) fn setting(key: &str, expected: &str, got: impl ToString, hint: &str) -> DataError {
    DataError::Setting { key: key.into(), expected: expected.into(), got: got.to_string(), hint: hint.into() }
}

impl Source {
    /// Whether the files that this source names are there.
    ///
    /// # Errors
    /// [`DataError::Missing`] naming the first missing file, [`DataError::Pattern`] for a bad shard name.
    pub fn check(&self, base: &Path) -> Result<()> {
        match self {
            Source::Tar(pattern) => {
                let files = names::resolve(pattern, base)?;
                let missing: Vec<_> = files.iter().filter(|f| !f.is_file()).collect();
                let Some(first) = missing.first() else { return Ok(()) };
                let more = match missing.len() - 1 {
                    0 => String::new(),
                    n => format!(", nor do {n} others of the {} that `{pattern}` names", files.len()),
                };
                Err(DataError::Missing { what: "shard", path: first.to_path_buf(), base: base.into(), more })
            }
            Source::JsonList { file, images } | Source::Karpathy { file, images, .. } => {
                exists("list", &base.join(file), base)?;
                exists("image folder", &base.join(images), base)
            }
            Source::ImageFolder { root, .. } => exists("image folder", &base.join(root), base),
            Source::Csv { file, images, .. } => {
                exists("table", &base.join(file), base)?;
                exists("image folder", &base.join(images), base)
            }
        }
    }
}

fn exists(what: &'static str, path: &Path, base: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    Err(DataError::Missing { what, path: path.into(), base: base.into(), more: String::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_section_parses_with_defaults() {
        let text = r#"(
            train: [Tar("train-{00..05}.tar"), JsonList(file: "a.json", images: "img"), ImageFolder(root: "in"),
                    Csv(file: "t.tsv"), Karpathy(file: "k.json", images: "coco", split: "train+restval")],
            image_size: 64,
            augment: (random_resized_crop: Some((scale: (0.8, 1.0))), horizontal_flip: 0.0, rand_augment: None),
            text: (vocab: "vocab.txt", max_length: 24),
            cache_bytes: 100000000,
        )"#;
        let config: DataConfig = ron::from_str(text).unwrap();
        assert_eq!(config.train.len(), 5);
        assert_eq!(config.image_size, 64);
        assert_eq!(config.mean, CLIP_MEAN);
        assert_eq!(config.augment.random_resized_crop.unwrap().ratio, (3.0 / 4.0, 4.0 / 3.0));
        assert_eq!(config.augment.rand_augment, None);
        assert_eq!((config.text.max_length, config.text.max_words, config.text.clean), (24, 30, true));
        assert_eq!(config.train[2], Source::ImageFolder { root: "in".into(), template: "a photo of a {c}".into() });
        let again: DataConfig = ron::from_str(&ron::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(ron::from_str::<DataConfig>("(imagesize: 3)").unwrap_err().to_string().contains("image_size"));
        assert!(ron::from_str::<DataConfig>("(augment: (flip: 0.1))").is_err());
        assert!(ron::from_str::<DataConfig>("(train: [Tgz(\"a\")])").unwrap_err().to_string().contains("Tar"));
    }

    #[test]
    fn check_finds_everything_at_once() {
        let config: DataConfig = ron::from_str(
            r#"(train: [Tar("none-{0..3}.tar")], image_size: 0, std: (0.0, 1.0, 1.0),
                augment: (horizontal_flip: 2.0, random_resized_crop: Some((scale: (0.0, 1.0)))),
                text: (vocab: "none.txt", max_length: 2))"#,
        )
        .unwrap();
        let errors = config.check(Path::new("/nonexistent-base"));
        let text: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(errors.len(), 7, "{text:#?}");
        assert!(text.iter().all(|t| t.contains("\nhint: ")), "{text:#?}");
        for part in ["image_size", "std", "horizontal_flip", "scale", "max_length", "none.txt", "nor do 3 others"] {
            assert!(text.iter().any(|t| t.contains(part)), "{part}: {text:#?}");
        }
    }
}
