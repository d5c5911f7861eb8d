//! The errors of the data pipeline: what was attempted, what was expected, what was found, and a hint.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = DataError> = std::result::Result<T, E>;

/// Everything that ends a data pipeline. Damage to single samples is not here: see [`SkipCause`](crate::stats::SkipCause).
#[derive(Debug, Clone, thiserror::Error)]
pub enum DataError {
    /// A setting of the recipe's data section is out of range.
    #[error("data setting `{key}`: expected {expected}, got {got}\nhint: {hint}")]
    Setting {
        /// Path of the setting inside the data section.
        key: String,
        /// What is allowed.
        expected: String,
        /// What was given.
        got: String,
        /// What to do.
        hint: String,
    },
    /// Braces or wildcards of a shard name do not parse, or match nothing.
    #[error("shard name `{pattern}`: {problem}\nhint: {hint}")]
    Pattern {
        /// The name as written.
        pattern: String,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// A file or folder that the recipe names does not exist.
    #[error(
        "{what} `{path}` does not exist{more}\nhint: paths in a recipe are relative to `{base}`; \
         download the missing files (data/README.md says from where) or correct the path",
        path = path.display(), base = base.display()
    )]
    Missing {
        /// Kind of file: "shard", "vocabulary", …
        what: &'static str,
        /// The first missing file.
        path: PathBuf,
        /// Base folder of relative paths.
        base: PathBuf,
        /// How many others are missing too, or nothing.
        more: String,
    },
    /// The operating system refused to open, map, read or write a file.
    #[error("cannot {action} `{path}`: {message}\nhint: {hint}", path = path.display())]
    Io {
        /// "open", "map", "read", …
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's message.
        message: String,
        /// What to do.
        hint: String,
    },
    /// The file is no tar archive.
    #[error(
        "`{path}` is not a tar archive: expected a tar header in the first 512 bytes, found {found}\nhint: {hint}",
        path = path.display()
    )]
    NotTar {
        /// The file.
        path: PathBuf,
        /// What the file starts with.
        found: String,
        /// What to do.
        hint: String,
    },
    /// The archive ends inside a member.
    #[error(
        "shard `{path}` is truncated: member `{member}` at byte {offset} needs {expected} bytes, the file ends after \
         {got} ({samples} complete samples before it)\nhint: the download was cut; fetch this shard again, or take it \
         out of the list",
        path = path.display()
    )]
    Truncated {
        /// The shard.
        path: PathBuf,
        /// Name of the member that is cut, if its header is whole.
        member: String,
        /// Offset of its header in the file.
        offset: u64,
        /// Bytes needed from there on.
        expected: u64,
        /// Bytes there are.
        got: u64,
        /// Complete samples before the cut.
        samples: usize,
    },
    /// No tar header can be found from some offset on.
    #[error(
        "shard `{path}` is corrupt: expected a tar header at byte {offset}, its checksum does not match and no later \
         header is valid ({samples} complete samples before it)\nhint: fetch this shard again, or take it out of the list",
        path = path.display()
    )]
    Corrupt {
        /// The shard.
        path: PathBuf,
        /// Offset of the bad header.
        offset: u64,
        /// Complete samples before the damage.
        samples: usize,
    },
    /// A shard or list without one usable sample.
    #[error(
        "`{path}` yields no sample: expected members KEY.jpg (or .png, .webp) with KEY.txt, found {found}\nhint: {hint}",
        path = path.display()
    )]
    NoSamples {
        /// The file.
        path: PathBuf,
        /// What was found instead.
        found: String,
        /// What to do.
        hint: String,
    },
    /// A list file (JSON, CSV, vocabulary) does not have the expected form.
    #[error("cannot read {what} `{path}`: expected {expected}, got {got}\nhint: {hint}", path = path.display())]
    Format {
        /// Kind of file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The form it should have.
        expected: String,
        /// What was found, with the line if known.
        got: String,
        /// What to do.
        hint: String,
    },
    /// A batch needs more distinct samples than there are.
    #[error(
        "batch size {batch} is larger than the data: {images} images are usable\nhint: lower the batch size to at most \
         {images}, or add data"
    )]
    BatchTooLarge {
        /// Samples a batch.
        batch: usize,
        /// Images in the data set.
        images: usize,
    },
    /// The position to start from lies behind the end of its epoch.
    #[error(
        "cannot start at epoch {epoch}, step {step}: an epoch has {steps} steps\nhint: the data or the batch size \
         changed since the checkpoint; use those it was written with"
    )]
    Position {
        /// Epoch to start from.
        epoch: u64,
        /// Step inside it.
        step: u64,
        /// Steps of an epoch.
        steps: u64,
    },
    /// So many samples are unusable that a batch cannot be filled.
    #[error(
        "cannot fill the batch of epoch {epoch}, step {step}: {filled} of {batch} samples are readable after {tried} \
         tries; skipped so far: {skipped}\nhint: the images of this data set are damaged, missing or in a format that \
         is not supported (JPEG, PNG and WebP are)"
    )]
    NothingReadable {
        /// Epoch of the batch.
        epoch: u64,
        /// Step of the batch.
        step: u64,
        /// Samples found.
        filled: usize,
        /// Samples wanted.
        batch: usize,
        /// Samples that were tried.
        tried: usize,
        /// The counts by cause, in words.
        skipped: String,
    },
    /// A worker thread panicked: a bug in this crate or a decoder. The run ends instead of hanging.
    #[error(
        "data worker failed at epoch {epoch}, step {step}: {message}\nhint: this is a bug; the samples of that batch show it again"
    )]
    Worker {
        /// Epoch of the batch.
        epoch: u64,
        /// Step of the batch.
        step: u64,
        /// The panic's message.
        message: String,
    },
    /// The worker threads are gone although batches are owed.
    #[error("the data workers have stopped\nhint: an earlier error ended the loader; make a new one to go on")]
    Stopped,
}

impl DataError {
    /// An [`DataError::Io`] from the system's error, with a hint fitting its kind.
    pub(crate) fn io(action: &'static str, path: &std::path::Path, error: &std::io::Error) -> Self {
        let hint = match error.kind() {
            std::io::ErrorKind::PermissionDenied => "the file exists but may not be read: check its permissions",
            std::io::ErrorKind::NotFound => "check the path; relative paths start at the recipe's folder",
            _ => "check that the file is a readable, regular file on a mounted disk",
        };
        DataError::Io { action, path: path.to_path_buf(), message: error.to_string(), hint: hint.to_string() }
    }
}
