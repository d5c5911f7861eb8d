//! Worker threads that prepare batches ahead, and come out in order.
//!
//! The caller pairs each position (epoch, step) with a free batch and puts both, as a ticket, into a bounded queue.
//! Workers take tickets, fill the batch alone ([`fill`](crate::fill)) and hand it in; [`Loader::next_batch`] gives
//! batches out in the order of the positions. Because a ticket carries its memory, no worker ever waits for memory that
//! only a later batch could free. Batches that come back through [`Loader::recycle`] are filled again, so that after the
//! first few no batch is allocated. At most `workers + queue_batches` batches are under way.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, bounded};
use serde::{Deserialize, Serialize};

use crate::augment::ImageTransform;
use crate::config::{DataConfig, setting};
use crate::dataset::Dataset;
use crate::error::{DataError, Result};
use crate::fill::{CacheBudget, Filler, SampleCache, Shared};
use crate::sampler::Sampler;
use crate::stats::{BadList, Skipped};
use crate::text::CaptionTokenizer;

/// Where a run stands in its data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Epoch, from 0.
    pub epoch: u64,
    /// Step inside the epoch, from 0.
    pub step: u64,
}

/// The order of the samples, and with it the transform.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Training: shuffled anew each epoch, augmented, only full batches. Each image once an epoch; of several captions
    /// the next one each epoch.
    Shuffled,
    /// Evaluation: every image once in order, with its first caption and the test transform; the last batch may be
    /// shorter. Unreadable images are left out.
    Images,
    /// Evaluation: every caption once in order; `images` is left empty.
    Texts,
}

/// One batch. Row `r` of each tensor is one sample; the shapes are always those of a full batch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Epoch of the batch.
    pub epoch: u64,
    /// Step inside the epoch.
    pub step: u64,
    /// Rows that hold samples; fewer than the batch size only in evaluation. The others hold zero images, the ids and
    /// mask of an empty caption's first token, and ids of −1.
    pub len: usize,
    /// Normalised images, `[batch, 3, size, size]`; empty for [`Order::Texts`], and where `pixels` are asked for.
    pub images: Vec<f32>,
    /// Images before normalisation, `[batch, size, size, 3]`; empty unless [`Data::pixels`] asks for them.
    pub pixels: Vec<u8>,
    /// Token ids, `[batch, max_length]`.
    pub input_ids: Vec<i32>,
    /// 1 for tokens, 0 for padding, `[batch, max_length]`.
    pub attention_mask: Vec<f32>,
    /// Image ids, `[batch]`; distinct within a batch except for [`Order::Texts`].
    pub sample_ids: Vec<i32>,
    /// Caption ids, `[batch]`.
    pub text_ids: Vec<i32>,
}

impl Batch {
    /// Gives the tensors their sizes, keeping allocations.
    pub(crate) fn reset(&mut self, shared: &Shared, at: Position) {
        let (rows, tokens, size) = (shared.batch_size, shared.tokenizer.max_length(), shared.transform.size());
        (self.epoch, self.step, self.len) = (at.epoch, at.step, 0);
        let image_len = if shared.order == Order::Texts { 0 } else { 3 * size * size };
        let (images, pixels) = if shared.pixels { (0, image_len) } else { (image_len, 0) };
        self.images.resize(rows * images, 0.0);
        self.pixels.resize(rows * pixels, 0);
        self.input_ids.resize(rows * tokens, 0);
        self.attention_mask.resize(rows * tokens, 0.0);
        self.sample_ids.resize(rows, -1);
        self.text_ids.resize(rows, -1);
    }

    /// Empties the rows from `row` on. One position of their mask stays 1: a softmax over none would give NaN, which
    /// may spread into the rows that count.
    pub(crate) fn clear_rows(&mut self, row: usize, shared: &Shared) {
        let tokens = shared.tokenizer.max_length();
        let rows = self.sample_ids.len().max(1);
        let image_len = self.images.len() / rows;
        self.images[row * image_len..].fill(0.0);
        self.input_ids[row * tokens..].fill(shared.tokenizer.pad_id());
        self.attention_mask[row * tokens..].fill(0.0);
        self.attention_mask[row * tokens..].chunks_exact_mut(tokens).for_each(|mask| mask[0] = 1.0);
        self.sample_ids[row..].fill(-1);
        self.text_ids[row..].fill(-1);
    }
}

/// What a loader needs; [`Data`] makes the usual ones.
#[derive(Debug, Clone)]
pub struct LoaderConfig {
    /// The split.
    pub dataset: Arc<Dataset>,
    /// Captions to ids.
    pub tokenizer: Arc<CaptionTokenizer>,
    /// Images to pixels.
    pub transform: ImageTransform,
    /// Order and kind of pass.
    pub order: Order,
    /// Rows of a batch.
    pub batch_size: usize,
    /// Fixes order, captions and augmentation.
    pub seed: u64,
    /// First batch to give out.
    pub start: Position,
    /// Number of epochs after which there are no more batches, counted from epoch 0; None never ends.
    pub epochs: Option<u64>,
    /// Threads; 0 works in the caller's.
    pub workers: usize,
    /// Batches ahead besides those that workers are at.
    pub queue_batches: usize,
    /// Decoded images and token ids kept in memory, of this data set and this tokenizer.
    pub cache: Option<Arc<SampleCache>>,
    /// Whether shuffled batches hold pixels instead of normalised images.
    pub pixels: bool,
}

struct Ticket {
    number: u64,
    at: Position,
    batch: Batch,
}

type Finished = (u64, Result<Batch>);

/// Gives out batches in order.
pub struct Loader {
    shared: Arc<Shared>,
    steps_per_epoch: u64,
    end: Option<u64>,
    /// Position of the next ticket.
    next: Position,
    /// Numbers of the next ticket and of the next batch to give out.
    issued: u64,
    given: u64,
    /// Most tickets under way.
    depth: u64,
    free: Vec<Batch>,
    /// Finished batches that wait for an earlier one, by number relative to `given`.
    early: VecDeque<Option<Result<Batch>>>,
    /// None works in the caller's thread, or after an error.
    tickets: Option<Sender<Ticket>>,
    finished: Receiver<Finished>,
    threads: Vec<JoinHandle<()>>,
    /// The caller's worker if there are no threads.
    inline: Option<Filler>,
    wait_seconds: f64,
    allocated: usize,
    failed: bool,
}

impl Loader {
    /// Starts the workers; they begin with the batch of `config.start` at once.
    ///
    /// # Errors
    /// [`DataError::BatchTooLarge`], [`DataError::Position`], [`DataError::Setting`] (nothing to read, batch size 0),
    /// [`DataError::Io`] if a thread cannot be started.
    pub fn new(config: LoaderConfig) -> Result<Loader> {
        let images = config.dataset.num_images();
        let (sampler, steps_per_epoch) = match config.order {
            Order::Shuffled => {
                let sampler = Sampler::new(images, config.batch_size, config.seed)?;
                let steps = sampler.steps_per_epoch();
                (Some(sampler), steps)
            }
            order => {
                let rows = if order == Order::Images { images } else { config.dataset.num_texts() };
                if config.batch_size == 0 || rows == 0 {
                    let (key, got) = if rows == 0 { ("val", "no samples") } else { ("batch_size", "0") };
                    return Err(setting(key, "at least 1", got, "name the sources of held-out pairs in `val`"));
                }
                (None, rows.div_ceil(config.batch_size) as u64)
            }
        };
        if config.start.step >= steps_per_epoch {
            // The end of an epoch is the start of the next; more is a mistake.
            if config.start.step > steps_per_epoch {
                let Position { epoch, step } = config.start;
                return Err(DataError::Position { epoch, step, steps: steps_per_epoch });
            }
        }
        let next = match config.start {
            Position { epoch, step } if step == steps_per_epoch => Position { epoch: epoch + 1, step: 0 },
            start => start,
        };
        let shared = Arc::new(Shared {
            dataset: config.dataset,
            tokenizer: config.tokenizer,
            transform: config.transform,
            order: config.order,
            sampler,
            batch_size: config.batch_size,
            seed: config.seed,
            cache: config.cache,
            pixels: config.pixels,
            bad: BadList::default(),
            stop: AtomicBool::new(false),
        });
        let depth = config.workers + config.queue_batches.max(1);
        let (ticket_sender, ticket_receiver) = bounded::<Ticket>(depth);
        let (finished_sender, finished) = bounded::<Finished>(depth);
        let mut loader = Loader {
            steps_per_epoch,
            end: config.epochs,
            next,
            issued: 0,
            given: 0,
            depth: depth as u64,
            free: Vec::new(),
            early: VecDeque::with_capacity(depth),
            tickets: None,
            finished,
            threads: Vec::with_capacity(config.workers),
            inline: (config.workers == 0).then(|| Filler::new(shared.clone())),
            wait_seconds: 0.0,
            allocated: 0,
            failed: false,
            shared,
        };
        for i in 0..config.workers {
            let (shared, tickets, finished) = (loader.shared.clone(), ticket_receiver.clone(), finished_sender.clone());
            let thread = std::thread::Builder::new()
                .name(format!("data-{i}"))
                .spawn(move || work(shared, &tickets, &finished))
                .map_err(|e| DataError::Io {
                    action: "start the data worker",
                    path: format!("data-{i}").into(),
                    message: e.to_string(),
                    hint: "lower `workers`".into(),
                })?;
            loader.threads.push(thread);
        }
        if config.workers > 0 {
            loader.tickets = Some(ticket_sender);
            loader.issue();
        }
        Ok(loader)
    }

    /// Steps of each epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.steps_per_epoch
    }

    /// Seconds that [`next_batch`](Self::next_batch) has waited for data so far.
    pub fn wait_seconds(&self) -> f64 {
        self.wait_seconds
    }

    /// Batches allocated so far; it stays as it is once batches are recycled.
    pub fn allocated_batches(&self) -> usize {
        self.allocated
    }

    /// What was skipped: while indexing the data, and among the samples read so far (by this loader, ahead included).
    pub fn skipped(&self) -> Skipped {
        let mut skipped = self.shared.dataset.skipped().clone();
        skipped.merge(&self.shared.bad.summary());
        skipped
    }

    /// The next batch, or None after the last epoch. Give it back with [`recycle`](Self::recycle).
    ///
    /// # Errors
    /// The first error in the order of the batches, whatever the number of workers; after it the loader is finished.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        if self.failed {
            return Err(DataError::Stopped);
        }
        let start = Instant::now();
        let result = if self.inline.is_some() { self.next_inline() } else { self.next_finished() };
        self.wait_seconds += start.elapsed().as_secs_f64();
        if result.is_err() {
            self.failed = true;
            self.shared.stop.store(true, Ordering::Relaxed);
            self.tickets = None;
        }
        result
    }

    /// Takes a batch back, to be filled again.
    pub fn recycle(&mut self, batch: Batch) {
        self.free.push(batch);
        self.issue();
    }

    fn next_inline(&mut self) -> Result<Option<Batch>> {
        let Some(at) = self.advance() else { return Ok(None) };
        let mut batch = self.free_batch();
        let Some(filler) = &mut self.inline else { return Err(DataError::Stopped) };
        fill_caught(filler, at, &mut batch)?;
        Ok(Some(batch))
    }

    fn next_finished(&mut self) -> Result<Option<Batch>> {
        self.issue();
        if self.given == self.issued {
            return Ok(None);
        }
        while !matches!(self.early.front(), Some(Some(_))) {
            // An error here means that every worker is gone without handing in what it owed.
            let (number, batch) = self.finished.recv().map_err(|_| DataError::Stopped)?;
            let place = (number - self.given) as usize;
            while self.early.len() <= place {
                self.early.push_back(None);
            }
            self.early[place] = Some(batch);
        }
        self.given += 1;
        match self.early.pop_front().flatten() {
            Some(batch) => {
                let batch = batch?;
                self.issue();
                Ok(Some(batch))
            }
            None => Err(DataError::Stopped),
        }
    }

    /// Hands out tickets until enough are under way.
    fn issue(&mut self) {
        while self.tickets.is_some() && self.issued - self.given < self.depth {
            let Some(at) = self.advance() else { return };
            let ticket = Ticket { number: self.issued, at, batch: self.free_batch() };
            self.issued += 1;
            // The queue holds `depth` tickets, so this does not block; it fails only if all workers are gone, which
            // the next receive reports.
            if let Some(sender) = &self.tickets
                && sender.send(ticket).is_err()
            {
                self.tickets = None;
            }
        }
    }

    fn free_batch(&mut self) -> Batch {
        self.free.pop().unwrap_or_else(|| {
            self.allocated += 1;
            Batch::default()
        })
    }

    /// The next position; None after the last epoch.
    fn advance(&mut self) -> Option<Position> {
        let at = self.next;
        if self.end.is_some_and(|end| at.epoch >= end) {
            return None;
        }
        self.next.step += 1;
        if self.next.step == self.steps_per_epoch {
            self.next = Position { epoch: at.epoch + 1, step: 0 };
        }
        Some(at)
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.tickets = None;
        // Workers end at their next sample; one that is handing in finds room, the queue holds all that is owed.
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A worker's life.
fn work(shared: Arc<Shared>, tickets: &Receiver<Ticket>, finished: &Sender<Finished>) {
    let mut filler = Filler::new(shared);
    for Ticket { number, at, mut batch } in tickets {
        let result = fill_caught(&mut filler, at, &mut batch).map(|()| batch);
        if finished.send((number, result)).is_err() {
            return;
        }
    }
}

/// Fills a batch; a panic becomes an error. The batch and the worker's buffers are rebuilt for each sample, so a
/// half-done one leaves nothing behind that could be seen.
fn fill_caught(filler: &mut Filler, at: Position, batch: &mut Batch) -> Result<()> {
    catch_unwind(AssertUnwindSafe(|| filler.fill(at, batch))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string);
        let message = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panic".into());
        Err(DataError::Worker { epoch: at.epoch, step: at.step, message })
    })
}

/// Both splits of a configuration, opened: the usual way to loaders.
#[derive(Debug, Clone)]
pub struct Data {
    /// The configuration.
    pub config: DataConfig,
    /// Training pairs.
    pub train: Arc<Dataset>,
    /// Held-out pairs; may be empty.
    pub val: Arc<Dataset>,
    /// Captions to ids.
    pub tokenizer: Arc<CaptionTokenizer>,
    /// Whether training batches hold pixels instead of normalised images: for a device that normalises them itself.
    pub pixels: bool,
    train_cache: Option<Arc<SampleCache>>,
    val_cache: Option<Arc<SampleCache>>,
}

impl Data {
    /// Opens everything that a configuration names; relative paths start at `base`.
    ///
    /// # Errors
    /// The first error found; [`DataConfig::check`] lists the simple ones all at once.
    pub fn open(config: &DataConfig, base: &Path) -> Result<Data> {
        if let Some(error) = config.check_ranges().into_iter().next() {
            return Err(error);
        }
        let tokenizer = Arc::new(CaptionTokenizer::open(&config.text, base)?);
        let train = Arc::new(Dataset::open(&config.train, base)?);
        let val = Arc::new(Dataset::open(&config.val, base)?);
        let budget = CacheBudget::new(config.cache_bytes);
        let cache = |dataset| if config.cache_bytes > 0 { SampleCache::new(dataset, &budget) } else { None };
        let (val_cache, train_cache) = (cache(&val), cache(&train));
        Ok(Data { config: config.clone(), train, val, tokenizer, pixels: false, train_cache, val_cache })
    }

    /// Training batches from `start` on; `epochs` counts from epoch 0, None never ends.
    ///
    /// # Errors
    /// See [`Loader::new`].
    pub fn train_loader(&self, batch_size: usize, seed: u64, start: Position, epochs: Option<u64>) -> Result<Loader> {
        let mut config = self.loader_config(&self.train, &self.train_cache, Order::Shuffled, batch_size);
        (config.seed, config.start, config.epochs) = (seed, start, epochs);
        config.pixels = self.pixels;
        Loader::new(config)
    }

    /// One pass over the held-out images or captions in order.
    ///
    /// # Errors
    /// See [`Loader::new`].
    pub fn eval_loader(&self, order: Order, batch_size: usize) -> Result<Loader> {
        Loader::new(self.loader_config(&self.val, &self.val_cache, order, batch_size))
    }

    fn loader_config(
        &self,
        dataset: &Arc<Dataset>,
        cache: &Option<Arc<SampleCache>>,
        order: Order,
        batch_size: usize,
    ) -> LoaderConfig {
        LoaderConfig {
            dataset: dataset.clone(),
            tokenizer: self.tokenizer.clone(),
            transform: ImageTransform::new(&self.config),
            order,
            batch_size,
            seed: 0,
            start: Position::default(),
            epochs: Some(1),
            workers: self.config.workers,
            queue_batches: self.config.queue_batches,
            cache: cache.clone(),
            pixels: false,
        }
    }
}
