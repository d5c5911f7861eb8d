//! Data sets that are lists of image files: the studies' JSON, the Karpathy JSON, image folders, tables.
//!
//! All become one form: image paths, captions, and which image each caption belongs to. Images are numbered densely in
//! the order in which they first appear, captions in the order of the rows.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{DataError, Result};
use crate::stats::{SkipCause, Skipped};

/// Images and captions of one list.
#[derive(Debug, Default)]
pub struct FileList {
    /// The image files.
    pub images: Vec<PathBuf>,
    /// The captions, trimmed.
    pub captions: Vec<String>,
    /// Index of each caption's image.
    pub text_to_image: Vec<u32>,
    /// Rows that are not usable.
    pub skipped: Skipped,
}

/// Collects rows, merging those of one image.
struct Builder {
    list: FileList,
    by_path: HashMap<PathBuf, u32>,
}

impl Builder {
    fn new() -> Self {
        Builder { list: FileList::default(), by_path: HashMap::new() }
    }

    fn add(&mut self, image: &Path, caption: Option<&str>) {
        let list = &mut self.list;
        let Some(caption) = caption else {
            return list.skipped.add(SkipCause::MissingCaption, image.display().to_string());
        };
        let caption = caption.trim();
        if caption.is_empty() {
            return list.skipped.add(SkipCause::EmptyCaption, image.display().to_string());
        }
        let id = *self.by_path.entry(image.to_path_buf()).or_insert_with(|| {
            list.images.push(image.to_path_buf());
            list.images.len() as u32 - 1
        });
        list.captions.push(caption.to_string());
        list.text_to_image.push(id);
    }

    fn finish(self, path: &Path, expected: &str) -> Result<FileList> {
        if self.list.images.is_empty() {
            let found = match self.list.skipped.total() {
                0 => "none".to_string(),
                _ => format!("only {}", self.list.skipped),
            };
            return Err(DataError::NoSamples { path: path.into(), found, hint: expected.into() });
        }
        Ok(self.list)
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| DataError::io("read", path, &e))
}

fn bad_json(what: &'static str, path: &Path, expected: &str, error: &serde_json::Error) -> DataError {
    DataError::Format {
        what,
        path: path.into(),
        expected: expected.into(),
        got: error.to_string(),
        hint: "check the file at the line named; it must be UTF-8".into(),
    }
}

/// One caption or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Captions {
    One(String),
    Many(Vec<String>),
}

/// Reads the studies' list, `[{image, caption, image_id}]`; `image_id` and other keys are not needed.
///
/// # Errors
/// [`DataError::Io`], [`DataError::Format`], [`DataError::NoSamples`].
pub fn json_list(file: &Path, images: &Path) -> Result<FileList> {
    #[derive(Deserialize)]
    struct Row {
        image: PathBuf,
        caption: Option<Captions>,
    }
    let expected = "a list of {\"image\": path, \"caption\": text or list of texts}";
    let rows: Vec<Row> = serde_json::from_slice(&read(file)?).map_err(|e| bad_json("JSON list", file, expected, &e))?;
    let mut builder = Builder::new();
    for row in &rows {
        let image = images.join(&row.image);
        match &row.caption {
            None => builder.add(&image, None),
            Some(Captions::One(caption)) => builder.add(&image, Some(caption)),
            Some(Captions::Many(captions)) if captions.is_empty() => builder.add(&image, None),
            Some(Captions::Many(captions)) => captions.iter().for_each(|c| builder.add(&image, Some(c))),
        }
    }
    builder.finish(file, expected)
}

/// Reads a Karpathy split file; `split` names one split, or several joined by `+`.
///
/// # Errors
/// As [`json_list`]; [`DataError::NoSamples`] names the splits that the file has if `split` matches none.
pub fn karpathy(file: &Path, images: &Path, split: &str) -> Result<FileList> {
    #[derive(Deserialize)]
    struct Sentence {
        raw: String,
    }
    #[derive(Deserialize)]
    struct Row {
        #[serde(default)]
        filepath: PathBuf,
        filename: PathBuf,
        split: String,
        sentences: Vec<Sentence>,
    }
    #[derive(Deserialize)]
    struct Root {
        images: Vec<Row>,
    }
    let expected = "{\"images\": [{\"filepath\", \"filename\", \"split\", \"sentences\": [{\"raw\"}]}]}";
    let root: Root = serde_json::from_slice(&read(file)?).map_err(|e| bad_json("Karpathy file", file, expected, &e))?;
    let wanted: Vec<&str> = split.split('+').map(str::trim).collect();
    let mut builder = Builder::new();
    for row in root.images.iter().filter(|r| wanted.contains(&r.split.as_str())) {
        let image = images.join(&row.filepath).join(&row.filename);
        if row.sentences.is_empty() {
            builder.add(&image, None);
        }
        row.sentences.iter().for_each(|s| builder.add(&image, Some(&s.raw)));
    }
    let mut splits: Vec<&str> = root.images.iter().map(|r| r.split.as_str()).collect();
    splits.sort_unstable();
    splits.dedup();
    builder.finish(file, &format!("the split is `{split}`; the file has {}", splits.join(", ")))
}

/// Reads a folder with one folder a class; `{c}` in the template stands for the class.
///
/// # Errors
/// [`DataError::Io`], [`DataError::NoSamples`].
pub fn image_folder(root: &Path, template: &str) -> Result<FileList> {
    let list = |folder: &Path| -> Result<Vec<PathBuf>> {
        let entries = std::fs::read_dir(folder).map_err(|e| DataError::io("list", folder, &e))?;
        let mut paths = Vec::new();
        for entry in entries {
            paths.push(entry.map_err(|e| DataError::io("list", folder, &e))?.path());
        }
        // The system gives no order; ids must not depend on it.
        paths.sort_unstable();
        Ok(paths)
    };
    let mut builder = Builder::new();
    for class in list(root)?.iter().filter(|p| p.is_dir()) {
        let name = class.file_name().map(|n| n.to_string_lossy().replace('_', " ")).unwrap_or_default();
        let caption = template.replace("{c}", &name);
        for image in list(class)? {
            let extension = image.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
            if ["jpg", "jpeg", "png", "webp"].contains(&extension.as_str()) {
                builder.add(&image, Some(&caption));
            }
        }
    }
    builder.finish(root, "one folder a class, each with .jpg, .jpeg, .png or .webp files")
}

/// Reads a table with a header line; fields may be quoted with `"`.
///
/// # Errors
/// [`DataError::Io`], [`DataError::Format`] (an unknown column is named beside those there are),
/// [`DataError::NoSamples`].
pub fn csv(file: &Path, images: &Path, image_column: &str, caption_column: &str, separator: char) -> Result<FileList> {
    let format = |expected: String, got: String, hint: &str| DataError::Format {
        what: "table",
        path: file.into(),
        expected,
        got,
        hint: hint.into(),
    };
    let delimiter = u8::try_from(separator)
        .ok()
        .filter(u8::is_ascii)
        .ok_or_else(|| format("an ASCII separator".into(), format!("{separator:?}"), "use separator: '\\t' or ','"))?;
    let bytes = read(file)?;
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(bytes.as_slice());
    let header =
        reader.headers().map_err(|e| format("a header line".into(), e.to_string(), "the file must be UTF-8"))?;
    let header = header.clone();
    let column = |name: &str| {
        header.iter().position(|h| h == name).ok_or_else(|| {
            let got = header.iter().map(|h| format!("`{h}`")).collect::<Vec<_>>().join(", ");
            format(format!("a column `{name}`"), got, "set image_column, caption_column and separator")
        })
    };
    let (image_at, caption_at) = (column(image_column)?, column(caption_column)?);
    let mut builder = Builder::new();
    let mut record = csv::StringRecord::new();
    while reader
        .read_record(&mut record)
        .map_err(|e| format("a row".into(), e.to_string(), "the file must be UTF-8"))?
    {
        if let Some(image) = record.get(image_at).filter(|i| !i.is_empty()) {
            builder.add(&images.join(image), record.get(caption_at));
        } else {
            let line = record.position().map_or(0, csv::Position::line);
            builder.list.skipped.add(SkipCause::MissingImage, format!("line {line}"));
        }
    }
    builder.finish(file, "a header line, then one image path and caption a row")
}
