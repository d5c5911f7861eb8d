//! All sources of a split as one data set, with global ordinals as ids.
//!
//! An image's id is its ordinal over all sources in the order of the recipe; a text's id likewise. Per-sample tables of
//! a loss are indexed by these, so they must not depend on keys, file names or workers. In shards every sample has one
//! caption and both ids agree; lists may have several captions an image.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::config::Source;
use crate::error::{DataError, Result};
use crate::names;
use crate::shard::Shard;
use crate::source::{self, FileList};
use crate::stats::{BadSample, SkipCause, Skipped};

/// A split of the data.
#[derive(Debug, Default)]
pub struct Dataset {
    parts: Vec<Part>,
    /// First image and first text of each part, and the totals at the end.
    image_starts: Vec<usize>,
    text_starts: Vec<usize>,
    skipped: Skipped,
}

#[derive(Debug)]
enum Part {
    Shard(Shard),
    Files { list: FileList, texts: TextsOfImages },
}

/// The captions of each image, as offsets into one list.
#[derive(Debug)]
struct TextsOfImages {
    starts: Vec<u32>,
    texts: Vec<u32>,
}

impl TextsOfImages {
    fn new(images: usize, text_to_image: &[u32]) -> Self {
        let mut starts = vec![0u32; images + 1];
        for &image in text_to_image {
            starts[image as usize + 1] += 1;
        }
        for i in 0..images {
            starts[i + 1] += starts[i];
        }
        let mut next = starts.clone();
        let mut texts = vec![0; text_to_image.len()];
        for (text, &image) in text_to_image.iter().enumerate() {
            texts[next[image as usize] as usize] = text as u32;
            next[image as usize] += 1;
        }
        TextsOfImages { starts, texts }
    }

    fn of(&self, image: usize) -> &[u32] {
        &self.texts[self.starts[image] as usize..self.starts[image + 1] as usize]
    }
}

impl Dataset {
    /// Opens all sources; shards are mapped and indexed in parallel.
    ///
    /// # Errors
    /// The first error in the order of the sources.
    pub fn open(sources: &[Source], base: &Path) -> Result<Dataset> {
        let mut data = Dataset { image_starts: vec![0], text_starts: vec![0], ..Dataset::default() };
        for source in sources {
            source.check(base)?;
            match source {
                Source::Tar(pattern) => {
                    for shard in open_shards(&names::resolve(pattern, base)?)? {
                        data.push(Part::Shard(shard));
                    }
                }
                Source::JsonList { file, images } => {
                    data.push_list(source::json_list(&base.join(file), &base.join(images))?);
                }
                Source::Karpathy { file, images, split } => {
                    data.push_list(source::karpathy(&base.join(file), &base.join(images), split)?);
                }
                Source::ImageFolder { root, template } => {
                    data.push_list(source::image_folder(&base.join(root), template)?);
                }
                Source::Csv { file, images, image_column, caption_column, separator } => {
                    let (file, images) = (base.join(file), base.join(images));
                    data.push_list(source::csv(&file, &images, image_column, caption_column, *separator)?);
                }
            }
        }
        // Ids leave this crate as i32.
        if data.num_texts() > i32::MAX as usize {
            return Err(crate::config::setting("train", "at most 2^31 - 1 captions", data.num_texts(), "use fewer"));
        }
        Ok(data)
    }

    fn push_list(&mut self, list: FileList) {
        let texts = TextsOfImages::new(list.images.len(), &list.text_to_image);
        self.push(Part::Files { list, texts });
    }

    fn push(&mut self, part: Part) {
        let (images, texts, skipped) = match &part {
            Part::Shard(shard) => (shard.len(), shard.len(), shard.skipped()),
            Part::Files { list, .. } => (list.images.len(), list.captions.len(), &list.skipped),
        };
        self.skipped.merge(skipped);
        self.image_starts.push(self.num_images() + images);
        self.text_starts.push(self.num_texts() + texts);
        self.parts.push(part);
    }

    /// Number of images; ids run from 0 to this.
    pub fn num_images(&self) -> usize {
        self.image_starts.last().copied().unwrap_or(0)
    }

    /// Number of captions; ids run from 0 to this.
    pub fn num_texts(&self) -> usize {
        self.text_starts.last().copied().unwrap_or(0)
    }

    /// What was skipped while indexing.
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    /// Part and ordinal in it of a global ordinal.
    fn locate(starts: &[usize], id: usize) -> Option<(usize, usize)> {
        let part = starts.partition_point(|&start| start <= id).checked_sub(1)?;
        (part + 1 < starts.len()).then(|| (part, id - starts[part]))
    }

    /// The image that a caption belongs to; None for an id out of range.
    pub fn image_of_text(&self, text: usize) -> Option<usize> {
        let (p, local) = Self::locate(&self.text_starts, text)?;
        Some(match &self.parts[p] {
            Part::Shard(_) => self.image_starts[p] + local,
            Part::Files { list, .. } => self.image_starts[p] + list.text_to_image[local] as usize,
        })
    }

    /// For each caption the image it belongs to, as retrieval metrics need it.
    pub fn text_to_image(&self) -> Vec<u32> {
        (0..self.num_texts()).filter_map(|t| self.image_of_text(t)).map(|i| i as u32).collect()
    }

    /// How many captions an image has.
    pub fn num_texts_of(&self, image: usize) -> usize {
        Self::locate(&self.image_starts, image).map_or(0, |(p, local)| match &self.parts[p] {
            Part::Shard(_) => 1,
            Part::Files { texts, .. } => texts.of(local).len(),
        })
    }

    /// The id of an image's `k`-th caption, `k` modulo the number of its captions.
    pub fn text_of_image(&self, image: usize, k: u64) -> Option<usize> {
        let (p, local) = Self::locate(&self.image_starts, image)?;
        match &self.parts[p] {
            Part::Shard(_) => Some(self.text_starts[p] + local),
            Part::Files { texts, .. } => {
                let of = texts.of(local);
                let k = k.checked_rem(of.len() as u64)?;
                Some(self.text_starts[p] + of[k as usize] as usize)
            }
        }
    }

    /// A caption.
    ///
    /// # Errors
    /// [`BadSample`] if the id is out of range or the shard has changed.
    pub fn caption(&self, text: usize) -> Result<Cow<'_, str>, BadSample> {
        let (p, local) = Self::locate(&self.text_starts, text).ok_or_else(|| out_of_range("caption", text))?;
        match &self.parts[p] {
            Part::Shard(shard) => shard.caption(local),
            Part::Files { list, .. } => Ok(Cow::Borrowed(&list.captions[local])),
        }
    }

    /// The encoded file of an image: from the mapping, or read into `buffer`.
    ///
    /// # Errors
    /// [`BadSample`] if the file is missing or unreadable.
    pub fn image_bytes<'a>(&'a self, image: usize, buffer: &'a mut Vec<u8>) -> Result<&'a [u8], BadSample> {
        let (p, local) = Self::locate(&self.image_starts, image).ok_or_else(|| out_of_range("image", image))?;
        match &self.parts[p] {
            Part::Shard(shard) => shard.image(local),
            Part::Files { list, .. } => {
                let path = &list.images[local];
                let fail = |e: std::io::Error| match e.kind() {
                    std::io::ErrorKind::NotFound => BadSample::new(SkipCause::MissingImage, e.to_string()),
                    _ => BadSample::new(SkipCause::UnreadableFile, e.to_string()),
                };
                buffer.clear();
                let mut file = std::fs::File::open(path).map_err(fail)?;
                std::io::Read::read_to_end(&mut file, buffer).map_err(fail)?;
                Ok(buffer)
            }
        }
    }

    /// The name of an image for people: `shard.tar/key`, or the path.
    pub fn image_name(&self, image: usize) -> String {
        match Self::locate(&self.image_starts, image).map(|(p, local)| (&self.parts[p], local)) {
            None => format!("#{image}"),
            Some((Part::Shard(shard), local)) => {
                let file = shard.path().file_name().unwrap_or_default().to_string_lossy();
                format!("{file}/{}", shard.key(local))
            }
            Some((Part::Files { list, .. }, local)) => list.images[local].display().to_string(),
        }
    }
}

fn out_of_range(what: &str, id: usize) -> BadSample {
    BadSample::new(SkipCause::StaleIndex, format!("there is no {what} {id}"))
}

/// Opens shards on all cores; the result is in the order of `files`, and so is the error that is reported.
fn open_shards(files: &[std::path::PathBuf]) -> Result<Vec<Shard>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(files.len());
    let next = AtomicUsize::new(0);
    let opened: Mutex<Vec<(usize, Result<Shard>)>> = Mutex::new(Vec::with_capacity(files.len()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((i, file)) = {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    files.get(i).map(|f| (i, f))
                } {
                    let shard = Shard::open(file);
                    if shard.is_err() {
                        // The shards before this one are being opened still; those after need not be.
                        next.fetch_add(files.len(), Ordering::Relaxed);
                    }
                    opened.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((i, shard));
                }
            });
        }
    });
    let mut opened = opened.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    opened.sort_unstable_by_key(|(i, _)| *i);
    let shards: Result<Vec<Shard>> = opened.into_iter().map(|(_, shard)| shard).collect();
    match shards {
        Ok(shards) if shards.len() < files.len() => Err(DataError::Stopped),
        shards => shards,
    }
}
