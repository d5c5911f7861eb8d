//! From shards to batches: everything between the files of a data set and the tensors of a training step.
//!
//! The modules stand in the order in which data flows:
//!
//! 1. [`config`]: what a recipe says about data (`DataConfig`, `Source`), checked before anything is opened;
//! 2. [`names`]: `train-{00..05}.tar` and `*.tar` become lists of files;
//! 3. [`shard`]: a WebDataset tar is memory-mapped as it is and indexed once; [`index_cache`] keeps the index beside it;
//! 4. [`source`]: the other layouts (JSON list, Karpathy JSON, image folder, CSV);
//! 5. [`dataset`]: all sources of a split as one list of images and captions with global ordinals as ids;
//! 6. [`sampler`]: the order of a seed, epoch and step ([`rng`] has the generator behind it);
//! 7. [`decode`], [`resize`], [`augment`] ([`rand_augment`]): file bytes to normalised pixels;
//! 8. [`text`]: caption to token ids;
//! 9. [`loader`]: worker threads fill recycled batches ([`fill`]), which come out in order;
//! 10. [`stats`] counts what was skipped, [`bench`] measures images per second.
//!
//! Two promises hold throughout. *Determinism*: a batch is a function of (files, configuration, seed, epoch, step);
//! the number of workers and the step at which a run was resumed leave no trace in it. *Nothing is lost silently*: a
//! file that cannot be used at all is an error, a sample that cannot be used is skipped, counted by cause and named.
//!
//! ```no_run
//! use clip_host_data::{Data, DataConfig, Position, Source};
//!
//! # fn main() -> clip_host_data::Result<()> {
//! let mut config = DataConfig { train: vec![Source::Tar("train-{00..05}.tar".into())], ..DataConfig::default() };
//! config.text.vocab = "vocab.txt".into();
//! let data = Data::open(&config, "recipes".as_ref())?;
//! // From epoch 3, step 20 on, as if the run had never stopped.
//! let mut loader = data.train_loader(128, 42, Position { epoch: 3, step: 20 }, Some(30))?;
//! while let Some(batch) = loader.next_batch()? {
//!     // ... one training step ...
//!     loader.recycle(batch);
//! }
//! println!("waited {:.1} s for data; skipped: {}", loader.wait_seconds(), loader.skipped());
//! # Ok(())
//! # }
//! ```

pub mod augment;
pub mod bench;
pub mod config;
pub mod dataset;
pub mod decode;
pub mod error;
pub mod fill;
pub mod index_cache;
pub mod loader;
pub mod names;
pub mod rand_augment;
pub mod resize;
pub mod rng;
pub mod sampler;
pub mod shard;
pub mod source;
pub mod stats;
pub mod text;

pub use augment::{AugmentConfig, ImageTransform};
pub use config::{DataConfig, Source};
pub use dataset::Dataset;
pub use error::{DataError, Result};
pub use loader::{Batch, Data, Loader, LoaderConfig, Order, Position};
pub use stats::Skipped;
pub use text::{CaptionTokenizer, TextConfig};
