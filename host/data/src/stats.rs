//! What was skipped and why: counts by cause, with the names of the first few.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};

use serde::{Deserialize, Serialize};

/// How many names are kept for each cause.
pub const NAMES_PER_CAUSE: usize = 5;

/// Why a sample is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipCause {
    /// An image without a text member, or a row without a caption.
    MissingCaption,
    /// A caption of nothing but white space.
    EmptyCaption,
    /// A caption without an image, or a listed image file that does not exist.
    MissingImage,
    /// A second image or text member with the key of an earlier one.
    DuplicateMember,
    /// A damaged tar header; reading went on at the next valid one.
    CorruptHeader,
    /// An image whose data ends too early.
    TruncatedImage,
    /// An image that its decoder refuses.
    CorruptImage,
    /// Neither JPEG, PNG nor WebP.
    UnsupportedImage,
    /// More pixels than [`MAX_PIXELS`](crate::decode::MAX_PIXELS).
    ImageTooLarge,
    /// A file that exists but cannot be read.
    UnreadableFile,
    /// An index entry that no longer fits the shard: the shard was changed while in use.
    StaleIndex,
    /// A shard that ends without the end-of-archive mark: it may have been cut between two members.
    NoEndMark,
}

impl SkipCause {
    /// Every cause, in the order of the codes of the index cache: append, never reorder.
    pub const ALL: [SkipCause; 12] = [
        SkipCause::MissingCaption,
        SkipCause::EmptyCaption,
        SkipCause::MissingImage,
        SkipCause::DuplicateMember,
        SkipCause::CorruptHeader,
        SkipCause::TruncatedImage,
        SkipCause::CorruptImage,
        SkipCause::UnsupportedImage,
        SkipCause::ImageTooLarge,
        SkipCause::UnreadableFile,
        SkipCause::StaleIndex,
        SkipCause::NoEndMark,
    ];

    /// The cause's name in reports and metrics.
    pub fn name(self) -> &'static str {
        match self {
            SkipCause::MissingCaption => "missing_caption",
            SkipCause::EmptyCaption => "empty_caption",
            SkipCause::MissingImage => "missing_image",
            SkipCause::DuplicateMember => "duplicate_member",
            SkipCause::CorruptHeader => "corrupt_header",
            SkipCause::TruncatedImage => "truncated_image",
            SkipCause::CorruptImage => "corrupt_image",
            SkipCause::UnsupportedImage => "unsupported_image",
            SkipCause::ImageTooLarge => "image_too_large",
            SkipCause::UnreadableFile => "unreadable_file",
            SkipCause::StaleIndex => "stale_index",
            SkipCause::NoEndMark => "no_end_mark",
        }
    }
}

/// A sample that cannot be used: the cause, and what exactly was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadSample {
    /// Cause it is counted under.
    pub cause: SkipCause,
    /// What was found, for the log.
    pub message: String,
}

impl BadSample {
    pub(crate) fn new(cause: SkipCause, message: impl Into<String>) -> Self {
        BadSample { cause, message: message.into() }
    }
}

/// Skipped samples of one cause.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SkipEntry {
    /// How many distinct samples.
    pub count: u64,
    /// Names of the first few.
    pub names: Vec<String>,
}

/// Skipped samples by cause.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Skipped(pub BTreeMap<SkipCause, SkipEntry>);

impl Skipped {
    /// Counts one sample.
    pub fn add(&mut self, cause: SkipCause, name: impl Into<String>) {
        let entry = self.0.entry(cause).or_default();
        entry.count += 1;
        if entry.names.len() < NAMES_PER_CAUSE {
            entry.names.push(name.into());
        }
    }

    /// Adds the counts of another part of the data.
    pub fn merge(&mut self, other: &Skipped) {
        for (cause, from) in &other.0 {
            let entry = self.0.entry(*cause).or_default();
            entry.count += from.count;
            let room = NAMES_PER_CAUSE - entry.names.len().min(NAMES_PER_CAUSE);
            entry.names.extend(from.names.iter().take(room).cloned());
        }
    }

    /// All causes together.
    pub fn total(&self) -> u64 {
        self.0.values().map(|e| e.count).sum()
    }

    /// Number of samples skipped for a cause.
    pub fn count(&self, cause: SkipCause) -> u64 {
        self.0.get(&cause).map_or(0, |e| e.count)
    }

    /// The counts alone, by the causes' names, as `bench data --json` shows them.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        self.0.iter().map(|(cause, e)| (cause.name().to_string(), e.count)).collect()
    }
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (i, (cause, entry)) in self.0.iter().enumerate() {
            let more = if entry.count as usize > entry.names.len() { ", …" } else { "" };
            let comma = if i > 0 { "; " } else { "" };
            write!(f, "{comma}{} {} ({}{more})", entry.count, cause.name(), entry.names.join(", "))?;
        }
        Ok(())
    }
}

/// The samples that turned out unreadable while training, shared by all workers. A sample is counted once however
/// often its turn comes, and is not decoded again.
#[derive(Debug, Default)]
pub(crate) struct BadList {
    len: AtomicUsize,
    bad: RwLock<HashMap<u64, (SkipCause, String)>>,
}

impl BadList {
    /// True if the image is known to be unreadable.
    pub fn contains(&self, image: u64) -> bool {
        // The usual case, no bad sample at all, takes no lock.
        self.len.load(Ordering::Relaxed) > 0
            && self.bad.read().unwrap_or_else(PoisonError::into_inner).contains_key(&image)
    }

    /// Notes an unreadable image; `name` is asked for only the first time.
    pub fn add(&self, image: u64, bad: &BadSample, name: impl FnOnce() -> String) {
        let mut list = self.bad.write().unwrap_or_else(PoisonError::into_inner);
        if list.contains_key(&image) {
            return;
        }
        let name = name();
        let same_cause = list.values().filter(|(cause, _)| *cause == bad.cause).take(NAMES_PER_CAUSE).count();
        if same_cause < NAMES_PER_CAUSE {
            tracing::warn!(sample = %name, cause = bad.cause.name(), "skipped: {}", bad.message);
        }
        list.insert(image, (bad.cause, name));
        self.len.store(list.len(), Ordering::Relaxed);
    }

    /// The counts; names are those of the lowest ids, whatever the order in which the workers met them.
    pub fn summary(&self) -> Skipped {
        let list = self.bad.read().unwrap_or_else(PoisonError::into_inner);
        let mut sorted: Vec<_> = list.iter().collect();
        sorted.sort_unstable_by_key(|(id, _)| **id);
        let mut skipped = Skipped::default();
        for (_, (cause, name)) in sorted {
            skipped.add(*cause, name.clone());
        }
        skipped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_sample_counts_once_and_names_are_in_id_order() {
        let list = BadList::default();
        let bad = BadSample::new(SkipCause::CorruptImage, "x");
        for id in (0..8).rev().chain(0..8) {
            list.add(id, &bad, || format!("s{id}"));
        }
        let s = list.summary();
        assert_eq!(s.count(SkipCause::CorruptImage), 8);
        assert_eq!(s.0[&SkipCause::CorruptImage].names, ["s0", "s1", "s2", "s3", "s4"]);
        assert!(list.contains(3) && !list.contains(9));
        assert_eq!(s.to_string(), "8 corrupt_image (s0, s1, s2, s3, s4, …)");
    }

    #[test]
    fn all_lists_every_cause_with_its_own_name() {
        let mut names: Vec<_> = SkipCause::ALL.iter().map(|c| c.name()).collect();
        for cause in SkipCause::ALL {
            let json = serde_json::to_string(&cause).unwrap();
            assert_eq!(json, format!("\"{}\"", cause.name()));
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), SkipCause::ALL.len());
    }
}
