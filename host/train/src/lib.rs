//! Training: from a recipe to a run folder with checkpoints, metrics and curves.
//!
//! The modules stand in the order in which a run meets them:
//!
//! 1. [`assemble`]: the recipe's plugins, loaded and configured, and the model that they make;
//! 2. [`run_folder`]: where everything goes;
//! 3. [`pretrained`]: published weights that an encoder begins with;
//! 4. [`train_loop`]: steps, evaluations, checkpoints;
//! 5. [`evaluate`]: retrieval over the held-out pairs;
//! 6. [`progress`] shows, [`metrics`] and [`tensorboard`] record, [`checkpoint`] saves and restores, [`report`] draws, [`export`]
//!    writes the weights for other programs.
//!
//! What a run computes is a function of its recipe, its data and its plugins: a run that was killed at any instant and
//! resumed ends with the same bits as one that was not, tables of the loss included.

pub mod assemble;
mod atomic;
pub mod checkpoint;
pub mod error;
pub mod evaluate;
pub mod export;
pub mod metrics;
pub mod pretrained;
pub mod progress;
pub mod report;
pub mod run_folder;
mod tensor_file;
pub mod tensorboard;
#[cfg(test)]
mod testing;
pub mod train_loop;

pub use assemble::Plugins;
pub use error::{Result, TrainError};
pub use progress::Progress;
pub use run_folder::RunFolder;
pub use train_loop::{Interrupt, Job, Summary, train};
