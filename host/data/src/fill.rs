//! Fills one batch: what a worker does between taking a ticket and handing the batch in.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::augment::{ImageTransform, TransformScratch};
use crate::dataset::Dataset;
use crate::decode::{Decoder, RgbImage};
use crate::error::{DataError, Result};
use crate::loader::{Batch, Order, Position};
use crate::rng::{Rng, key};
use crate::sampler::{Sampler, purpose};
use crate::stats::{BadList, BadSample, SkipCause};
use crate::text::CaptionTokenizer;

/// Decoded images and token ids of a split, kept up to a number of bytes. Nothing is ever dropped from it: data that
/// is read once an epoch gains nothing from replacing one sample by another.
#[derive(Debug)]
pub struct SampleCache {
    images: Vec<OnceLock<Box<RgbImage>>>,
    tokens: Vec<OnceLock<Box<[i32]>>>,
    budget: Arc<CacheBudget>,
}

/// Bytes left for caches; several splits may share one.
#[derive(Debug)]
pub struct CacheBudget(AtomicU64);

impl CacheBudget {
    /// A budget of so many bytes.
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(CacheBudget(AtomicU64::new(bytes)))
    }

    fn take(&self, bytes: u64) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)).is_ok()
    }
}

impl SampleCache {
    /// An empty cache for a data set; None if there is no budget.
    pub fn new(dataset: &Dataset, budget: &Arc<CacheBudget>) -> Option<Arc<Self>> {
        let slots = (dataset.num_images() + dataset.num_texts()) * size_of::<OnceLock<Box<[i32]>>>();
        budget.take(slots as u64).then(|| {
            Arc::new(SampleCache {
                images: (0..dataset.num_images()).map(|_| OnceLock::new()).collect(),
                tokens: (0..dataset.num_texts()).map(|_| OnceLock::new()).collect(),
                budget: budget.clone(),
            })
        })
    }

    fn keep_image(&self, id: usize, image: &RgbImage) {
        let bytes = image.pixels.len() + size_of::<RgbImage>();
        if let Some(slot) = self.images.get(id).filter(|slot| slot.get().is_none())
            && self.budget.take(bytes as u64)
        {
            // Two workers may decode one image at once; the loser's copy goes, its bytes stay booked.
            let _ = slot.set(Box::new(image.clone()));
        }
    }

    fn keep_tokens(&self, id: usize, tokens: &[i32]) {
        if let Some(slot) = self.tokens.get(id).filter(|slot| slot.get().is_none())
            && self.budget.take(size_of_val(tokens) as u64)
        {
            let _ = slot.set(tokens.into());
        }
    }
}

/// What all workers of a loader share.
pub(crate) struct Shared {
    pub dataset: Arc<Dataset>,
    pub tokenizer: Arc<CaptionTokenizer>,
    pub transform: ImageTransform,
    pub order: Order,
    /// None unless the order is shuffled.
    pub sampler: Option<Sampler>,
    pub batch_size: usize,
    pub seed: u64,
    pub cache: Option<Arc<SampleCache>>,
    /// Whether batches hold pixels instead of normalised images.
    pub pixels: bool,
    pub bad: BadList,
    pub stop: AtomicBool,
}

/// Candidates that are tried for one batch beyond its own samples before giving up.
fn replacement_limit(batch_size: usize) -> usize {
    16 * batch_size + 1024
}

/// One worker's state.
pub(crate) struct Filler {
    shared: Arc<Shared>,
    decoder: Decoder,
    decoded: RgbImage,
    file: Vec<u8>,
    transform: TransformScratch,
    ids: Vec<u64>,
}

impl Filler {
    pub fn new(shared: Arc<Shared>) -> Self {
        Filler {
            shared,
            decoder: Decoder::default(),
            decoded: RgbImage::default(),
            file: Vec::new(),
            transform: TransformScratch::default(),
            ids: Vec::new(),
        }
    }

    /// Fills the batch of a position.
    ///
    /// # Errors
    /// [`DataError::NothingReadable`] if too many samples are unreadable; [`DataError::Stopped`] if the loader is
    /// being dropped.
    pub fn fill(&mut self, at: Position, batch: &mut Batch) -> Result<()> {
        batch.reset(&self.shared, at);
        match self.shared.order {
            Order::Shuffled => self.fill_shuffled(at, batch),
            Order::Images => self.fill_images(at, batch),
            Order::Texts => self.fill_texts(at, batch),
        }
    }

    fn fill_shuffled(&mut self, at: Position, batch: &mut Batch) -> Result<()> {
        let shared = self.shared.clone();
        let Some(sampler) = &shared.sampler else { return Err(DataError::Stopped) };
        let epoch = sampler.epoch(at.epoch);
        let mut ids = std::mem::take(&mut self.ids);
        epoch.batch_into(at.step, &mut ids);
        let mut empty_slots = Vec::new();
        for (slot, &id) in ids.iter().enumerate() {
            self.check_stop()?;
            if !self.try_pair(id as usize, at.epoch, slot, batch) {
                empty_slots.push(slot);
            }
        }
        // The rule for unreadable samples, see the module `sampler`.
        let mut tried = 0;
        let mut reserve = epoch.reserve(at.step);
        for (i, &slot) in empty_slots.iter().enumerate() {
            loop {
                self.check_stop()?;
                let candidate = reserve.next().filter(|_| tried < replacement_limit(shared.batch_size));
                let Some(id) = candidate else {
                    let filled = shared.batch_size - (empty_slots.len() - i);
                    return Err(nothing_readable(&shared, at, filled, shared.batch_size + tried));
                };
                if ids.contains(&id) {
                    continue;
                }
                tried += 1;
                if self.try_pair(id as usize, at.epoch, slot, batch) {
                    ids[slot] = id;
                    break;
                }
            }
        }
        batch.len = shared.batch_size;
        self.ids = ids;
        Ok(())
    }

    /// Images in order, each with its first caption; unreadable ones are left out.
    fn fill_images(&mut self, at: Position, batch: &mut Batch) -> Result<()> {
        let shared = self.shared.clone();
        let first = at.step as usize * shared.batch_size;
        let last = (first + shared.batch_size).min(shared.dataset.num_images());
        for image in first..last {
            self.check_stop()?;
            let row = batch.len;
            if self.try_pair(image, at.epoch, row, batch) {
                batch.len += 1;
            }
        }
        batch.clear_rows(batch.len, &shared);
        Ok(())
    }

    /// Captions in order, without images.
    fn fill_texts(&mut self, at: Position, batch: &mut Batch) -> Result<()> {
        let shared = self.shared.clone();
        let first = at.step as usize * shared.batch_size;
        let last = (first + shared.batch_size).min(shared.dataset.num_texts());
        for text in first..last {
            self.check_stop()?;
            let Some(image) = shared.dataset.image_of_text(text) else { continue };
            let row = batch.len;
            match self.put_text(text, row, batch) {
                Ok(()) => {
                    batch.sample_ids[row] = image as i32;
                    batch.text_ids[row] = text as i32;
                    batch.len += 1;
                }
                Err(bad) => shared.bad.add(image as u64, &bad, || shared.dataset.image_name(image)),
            }
        }
        batch.clear_rows(batch.len, &shared);
        Ok(())
    }

    fn check_stop(&self) -> Result<()> {
        if self.shared.stop.load(Ordering::Relaxed) { Err(DataError::Stopped) } else { Ok(()) }
    }

    /// Puts an image and a caption of it into a row; false, and counted, if the sample cannot be used.
    fn try_pair(&mut self, image: usize, epoch: u64, row: usize, batch: &mut Batch) -> bool {
        let shared = self.shared.clone();
        if shared.bad.contains(image as u64) {
            return false;
        }
        match self.put_pair(image, epoch, row, batch) {
            Ok(()) => true,
            Err(bad) => {
                shared.bad.add(image as u64, &bad, || shared.dataset.image_name(image));
                false
            }
        }
    }

    fn put_pair(&mut self, image: usize, epoch: u64, row: usize, batch: &mut Batch) -> Result<(), BadSample> {
        let shared = self.shared.clone();
        // Training goes round an image's captions, from a random one on, so that each is seen equally often.
        let turn = match shared.order {
            Order::Shuffled if shared.dataset.num_texts_of(image) > 1 => {
                key(&[shared.seed, purpose::CAPTION, image as u64]).wrapping_add(epoch)
            }
            _ => 0,
        };
        let text = shared
            .dataset
            .text_of_image(image, turn)
            .ok_or_else(|| BadSample::new(SkipCause::MissingCaption, "the image has no caption"))?;
        self.put_image(image, epoch, row, batch)?;
        self.put_text(text, row, batch)?;
        batch.sample_ids[row] = image as i32;
        batch.text_ids[row] = text as i32;
        Ok(())
    }

    fn put_image(&mut self, image: usize, epoch: u64, row: usize, batch: &mut Batch) -> Result<(), BadSample> {
        let shared = self.shared.clone();
        let cached = shared.cache.as_ref().and_then(|c| c.images.get(image)?.get());
        let decoded = match cached {
            Some(decoded) => decoded,
            None => {
                let file = shared.dataset.image_bytes(image, &mut self.file)?;
                self.decoder.decode(file, &mut self.decoded)?;
                if let Some(cache) = &shared.cache {
                    cache.keep_image(image, &self.decoded);
                }
                &self.decoded
            }
        };
        let len = 3 * shared.transform.size() * shared.transform.size();
        let place = row * len..(row + 1) * len;
        let mut rng = Rng::new(key(&[shared.seed, purpose::AUGMENT, epoch, image as u64]));
        match shared.order {
            Order::Shuffled if shared.pixels => {
                let out = &mut batch.pixels[place];
                shared.transform.train_pixels(&mut rng, decoded, &mut self.transform, out)
            }
            Order::Shuffled => shared.transform.train(&mut rng, decoded, &mut self.transform, &mut batch.images[place]),
            _ => shared.transform.test(decoded, &mut self.transform, &mut batch.images[place]),
        }
    }

    fn put_text(&mut self, text: usize, row: usize, batch: &mut Batch) -> Result<(), BadSample> {
        let shared = &self.shared;
        let len = shared.tokenizer.max_length();
        let (ids, mask) =
            (&mut batch.input_ids[row * len..(row + 1) * len], &mut batch.attention_mask[row * len..(row + 1) * len]);
        let cached = shared.cache.as_ref().and_then(|c| c.tokens.get(text)?.get());
        let count = match cached {
            Some(tokens) => {
                ids[..tokens.len()].copy_from_slice(tokens);
                ids[tokens.len()..].fill(shared.tokenizer.pad_id());
                tokens.len()
            }
            None => {
                let caption = shared.dataset.caption(text)?;
                let count = shared
                    .tokenizer
                    .encode(&caption, ids)
                    .map_err(|e| BadSample::new(SkipCause::EmptyCaption, format!("tokenizer: {e}")))?;
                if let Some(cache) = &shared.cache {
                    cache.keep_tokens(text, &ids[..count]);
                }
                count
            }
        };
        mask[..count].fill(1.0);
        mask[count..].fill(0.0);
        Ok(())
    }
}

fn nothing_readable(shared: &Shared, at: Position, filled: usize, tried: usize) -> DataError {
    DataError::NothingReadable {
        epoch: at.epoch,
        step: at.step,
        filled,
        batch: shared.batch_size,
        tried,
        skipped: shared.bad.summary().to_string(),
    }
}
