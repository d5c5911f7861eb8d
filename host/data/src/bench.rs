//! How many images a second the pipeline delivers.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::{DataError, Result};
use crate::loader::{Data, Position};

/// Result of [`images_per_second`].
#[derive(Debug, Clone, Serialize)]
pub struct DataBench {
    /// Images a second through the whole pipeline.
    pub images_per_second: f64,
    /// Images measured.
    pub images: u64,
    /// Seconds measured.
    pub seconds: f64,
    /// Worker threads.
    pub workers: usize,
    /// Rows of a batch.
    pub batch_size: usize,
    /// Skipped samples by cause.
    pub skipped: BTreeMap<String, u64>,
}

/// Runs training batches through `workers` threads for about `seconds`, as fast as they come, after one batch a worker
/// as warm-up. Epochs follow each other.
///
/// # Errors
/// As the loader's.
pub fn images_per_second(data: &Data, batch_size: usize, workers: usize, seconds: f64) -> Result<DataBench> {
    let mut data = data.clone();
    data.config.workers = workers;
    let mut loader = data.train_loader(batch_size, 0, Position::default(), None)?;
    for _ in 0..workers.max(1) {
        let batch = loader.next_batch()?.ok_or(DataError::Stopped)?;
        loader.recycle(batch);
    }
    let limit = Duration::from_secs_f64(seconds.clamp(0.0, 3600.0));
    let (start, mut images) = (Instant::now(), 0u64);
    loop {
        let batch = loader.next_batch()?.ok_or(DataError::Stopped)?;
        images += batch.len as u64;
        loader.recycle(batch);
        if start.elapsed() >= limit {
            break;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let skipped = loader.skipped().counts();
    Ok(DataBench { images_per_second: images as f64 / seconds, images, seconds, workers, batch_size, skipped })
}
