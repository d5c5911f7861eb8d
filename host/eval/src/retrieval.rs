//! Retrieval: how high does each image's caption rank among all captions, and each caption's image among all images?
//!
//! With several captions per image (COCO has five) the rank of an image is that of its best caption, as in Karpathy and
//! Fei-Fei 2015; with one caption each the numbers are open_clip's. Ranks count from 1. Among equal similarities the
//! earlier row ranks first, as a stable descending sort puts it: a collapsed model scores chance, not 100 %.

use crate::EvalError;
use crate::embedding::{dot, normalize};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The k of the reported R@k.
pub const RECALL_AT: [usize; 3] = [1, 5, 10];

/// Rows that one tile of similarities has: 4 × 64 f32 sums stay in registers and first-level cache.
const TILE_IMAGES: usize = 4;
const TILE_TEXTS: usize = 64;
/// Texts whose transposed rows are kept together while images pass by.
const BLOCK_TEXTS: usize = 256;
/// Images that a thread takes at a time.
const BLOCK_IMAGES: usize = 128;

/// Retrieval in one direction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Direction {
    /// Fraction of queries whose match ranks within k, for each k of [`RECALL_AT`].
    pub recall: [f64; 3],
    /// Mean rank of the match, from 1.
    pub mean_rank: f64,
    /// Median rank of the match, from 1; rounded down where two are averaged, as open_clip does.
    pub median_rank: f64,
    /// The rank of each query's match, from 0.
    pub ranks: Vec<u32>,
}

/// Retrieval in both directions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Retrieval {
    /// Queries are images, each one's match is its best caption.
    pub image_to_text: Direction,
    /// Queries are captions.
    pub text_to_image: Direction,
}

impl Direction {
    fn new(ranks: Vec<u32>) -> Self {
        let n = ranks.len() as f64;
        let recall = RECALL_AT.map(|k| ranks.iter().filter(|&&rank| (rank as usize) < k).count() as f64 / n);
        let mean_rank = ranks.iter().map(|&rank| f64::from(rank)).sum::<f64>() / n + 1.0;
        let mut sorted = ranks.clone();
        sorted.sort_unstable();
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            1 => sorted[middle],
            // The mean of the middle two, rounded down.
            _ => sorted[middle - 1] + (sorted[middle] - sorted[middle - 1]) / 2,
        };
        Direction { recall, mean_rank, median_rank: f64::from(median) + 1.0, ranks }
    }

    /// Mean of the recalls.
    pub fn mean_recall(&self) -> f64 {
        self.recall.iter().sum::<f64>() / self.recall.len() as f64
    }
}

impl Retrieval {
    /// Mean of all six recalls: one number to compare models by.
    pub fn mean_recall(&self) -> f64 {
        (self.image_to_text.mean_recall() + self.text_to_image.mean_recall()) / 2.0
    }

    /// All metrics by name: `image_to_text_R@1` …, `…_mean_rank`, `…_median_rank`, `…_mean_recall`, and `mean_recall`.
    /// Recalls are fractions.
    pub fn metrics(&self) -> Vec<(String, f64)> {
        let mut all = Vec::new();
        for (name, direction) in [("image_to_text", &self.image_to_text), ("text_to_image", &self.text_to_image)] {
            for (k, recall) in RECALL_AT.iter().zip(direction.recall) {
                all.push((format!("{name}_R@{k}"), recall));
            }
            all.push((format!("{name}_mean_rank"), direction.mean_rank));
            all.push((format!("{name}_median_rank"), direction.median_rank));
            all.push((format!("{name}_mean_recall"), direction.mean_recall()));
        }
        all.push(("mean_recall".into(), self.mean_recall()));
        all
    }
}

/// Ranks all captions against all images. `images` is `[n, dim]`, `texts` `[m, dim]`, neither needs unit length;
/// `image_of_text[t]` is the row of the image that caption `t` belongs to. Images without a caption are not queries,
/// but they compete. `threads` 0 takes one for each core.
///
/// Similarities are computed tile by tile and only counted: memory is O(n + m).
///
/// # Errors
/// If lengths do not fit, there is no caption, or a row has no direction.
pub fn retrieval(
    images: &[f32],
    texts: &[f32],
    dim: usize,
    image_of_text: &[u32],
    threads: usize,
) -> Result<Retrieval, EvalError> {
    let images = normalize("image embeddings", images, dim)?;
    let texts = normalize("text embeddings", texts, dim)?;
    let (n, m) = (images.len() / dim, texts.len() / dim);
    check(n, m, image_of_text)?;

    // The score to beat of each query, and the row it is at: ties go to the earlier row.
    let own: Vec<f32> = texts
        .chunks_exact(dim)
        .zip(image_of_text)
        .map(|(text, &image)| dot(&images[image as usize * dim..(image as usize + 1) * dim], text))
        .collect();
    let mut best: Vec<Option<(f32, u32)>> = vec![None; n];
    for (t, (&image, &score)) in image_of_text.iter().zip(&own).enumerate() {
        let best = &mut best[image as usize];
        if best.is_none_or(|(before, _)| score > before) {
            *best = Some((score, t as u32));
        }
    }

    let threads = match threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    };
    let threads = threads.min(n.div_ceil(BLOCK_IMAGES)).max(1);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut part = Part { of_images: Vec::new(), of_texts: vec![0; m] };
        loop {
            let start = next.fetch_add(BLOCK_IMAGES, Ordering::Relaxed);
            if start >= n {
                return part;
            }
            let block = start..(start + BLOCK_IMAGES).min(n);
            part.count(&images, &texts, dim, block, &best, &own, image_of_text);
        }
    };
    let parts: Vec<Part> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut parts = vec![work()];
        for other in others {
            match other.join() {
                Ok(part) => parts.push(part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        parts
    });

    let mut image_ranks = vec![0; n];
    let mut text_ranks = vec![0u32; m];
    for part in parts {
        for (image, rank) in part.of_images {
            image_ranks[image] = rank;
        }
        text_ranks.iter_mut().zip(part.of_texts).for_each(|(sum, count)| *sum += count);
    }
    let image_ranks = image_ranks.into_iter().zip(&best).filter_map(|(rank, best)| best.map(|_| rank)).collect();
    Ok(Retrieval { image_to_text: Direction::new(image_ranks), text_to_image: Direction::new(text_ranks) })
}

fn check(n: usize, m: usize, image_of_text: &[u32]) -> Result<(), EvalError> {
    let shape = |what, expected: String, got: String, hint| Err(EvalError::Shape { what, expected, got, hint });
    if n == 0 || m == 0 {
        let hint = "evaluation needs held-out data: set `data.val`";
        return shape("pairs", "at least one".into(), format!("{n} images and {m} captions"), hint);
    }
    if n > u32::MAX as usize || m > u32::MAX as usize {
        return shape("pairs", "at most 2^32".into(), n.max(m).to_string(), "evaluate a part of the data");
    }
    if image_of_text.len() != m {
        let got = image_of_text.len().to_string();
        return shape("image of each caption", format!("one for each of {m} captions"), got, "one index per caption");
    }
    match image_of_text.iter().find(|&&image| image as usize >= n) {
        Some(image) => {
            shape("image of a caption", format!("0 to {}", n - 1), image.to_string(), "indexes count from 0")
        }
        None => Ok(()),
    }
}

/// What one thread has counted.
struct Part {
    /// Ranks of the images that this thread took.
    of_images: Vec<(usize, u32)>,
    /// For every text, how many of those images come before its own.
    of_texts: Vec<u32>,
}

impl Part {
    #[allow(clippy::too_many_arguments)] // The queries of both directions, as plain lists.
    fn count(
        &mut self,
        images: &[f32],
        texts: &[f32],
        dim: usize,
        block: std::ops::Range<usize>,
        best: &[Option<(f32, u32)>],
        own: &[f32],
        image_of_text: &[u32],
    ) {
        let m = own.len();
        let mut ranks = vec![0u32; block.len()];
        let mut transposed = vec![0.0f32; dim * BLOCK_TEXTS];
        for block_start in (0..m).step_by(BLOCK_TEXTS) {
            let width = BLOCK_TEXTS.min(m - block_start);
            for t in 0..width {
                for d in 0..dim {
                    transposed[d * BLOCK_TEXTS + t] = texts[(block_start + t) * dim + d];
                }
            }
            for first in block.clone().step_by(TILE_IMAGES) {
                let rows = TILE_IMAGES.min(block.end - first);
                for tile_start in (0..width).step_by(TILE_TEXTS) {
                    let scores = tile(images, dim, first, rows, &transposed, tile_start);
                    let columns = TILE_TEXTS.min(width - tile_start);
                    for (r, scores) in scores.iter().enumerate().take(rows) {
                        let image = first + r;
                        for (c, &score) in scores.iter().enumerate().take(columns) {
                            let text = block_start + tile_start + c;
                            if let Some((mark, at)) = best[image] {
                                let before = score > mark || (score == mark && text < at as usize);
                                ranks[image - block.start] += u32::from(before);
                            }
                            let before =
                                score > own[text] || (score == own[text] && image < image_of_text[text] as usize);
                            self.of_texts[text] += u32::from(before);
                        }
                    }
                }
            }
        }
        self.of_images.extend(block.zip(ranks));
    }
}

/// Similarities of up to [`TILE_IMAGES`] images and [`TILE_TEXTS`] texts. Each sum runs over the dimension in order, so
/// that it has [`dot`]'s bits; lanes are texts.
fn tile(
    images: &[f32],
    dim: usize,
    first: usize,
    rows: usize,
    transposed: &[f32],
    start: usize,
) -> [[f32; TILE_TEXTS]; TILE_IMAGES] {
    let mut sums = [[0.0f32; TILE_TEXTS]; TILE_IMAGES];
    for (r, sums) in sums.iter_mut().enumerate().take(rows) {
        let image = &images[(first + r) * dim..(first + r + 1) * dim];
        for (x, texts) in image.iter().zip(transposed.chunks_exact(BLOCK_TEXTS)) {
            let texts = &texts[start..start + TILE_TEXTS];
            sums.iter_mut().zip(texts).for_each(|(sum, t)| *sum += x * t);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, dim: usize, mut seed: u64) -> Vec<f32> {
        let mut next = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((seed >> 33) as f32 / (1u64 << 31) as f32) - 0.5
        };
        (0..n * dim).map(|_| next()).collect()
    }

    /// The definition: sort every row, look where the match is.
    fn by_sorting(images: &[f32], texts: &[f32], dim: usize, of: &[u32]) -> (Vec<u32>, Vec<u32>) {
        let images = normalize("i", images, dim).unwrap();
        let texts = normalize("t", texts, dim).unwrap();
        let score = |i: usize, t: usize| dot(&images[i * dim..(i + 1) * dim], &texts[t * dim..(t + 1) * dim]);
        let (n, m) = (images.len() / dim, texts.len() / dim);
        let mut image_ranks = Vec::new();
        for i in 0..n {
            let mut order: Vec<usize> = (0..m).collect();
            order.sort_by(|&a, &b| score(i, b).total_cmp(&score(i, a)));
            if let Some(rank) = order.iter().position(|&t| of[t] as usize == i) {
                image_ranks.push(rank as u32);
            }
        }
        let text_ranks = (0..m).map(|t| {
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|&a, &b| score(b, t).total_cmp(&score(a, t)));
            order.iter().position(|&i| of[t] as usize == i).unwrap() as u32
        });
        (image_ranks, text_ranks.collect())
    }

    #[test]
    fn tiles_count_what_sorting_finds_for_any_number_of_threads() {
        for (n, m, dim) in [(1, 1, 3), (5, 9, 1), (130, 600, 7), (300, 301, 16)] {
            let (images, mut texts) = (noise(n, dim, 1), noise(m, dim, 2));
            // Duplicates make ties.
            let copy = texts[..dim].to_vec();
            texts[(m - 1) * dim..].copy_from_slice(&copy);
            let of: Vec<u32> = (0..m).map(|t| (t * 7 % n) as u32).collect();
            let expected = by_sorting(&images, &texts, dim, &of);
            for threads in [1, 2, 3] {
                let found = retrieval(&images, &texts, dim, &of, threads).unwrap();
                assert_eq!(found.image_to_text.ranks, expected.0, "{n} {m} {dim}");
                assert_eq!(found.text_to_image.ranks, expected.1, "{n} {m} {dim}");
            }
        }
    }

    #[test]
    fn a_collapsed_model_scores_chance() {
        let rows = vec![1.0; 100 * 4];
        let of: Vec<u32> = (0..100).collect();
        let found = retrieval(&rows, &rows, 4, &of, 1).unwrap();
        assert_eq!(found.image_to_text.recall, [0.01, 0.05, 0.1]);
        assert_eq!(found.text_to_image.median_rank, 50.0);
        assert_eq!(found.text_to_image.mean_rank, 50.5);
    }

    #[test]
    fn what_does_not_fit_is_an_error_that_says_so() {
        let rows = [1.0, 0.0, 0.0, 1.0];
        for (images, texts, of) in [
            (&rows[..], &rows[..], &[0u32][..]),
            (&rows, &rows, &[0, 2]),
            (&[], &rows, &[0, 1]),
            (&rows, &[], &[]),
            (&rows[..3], &rows, &[0, 1]),
            (&[f32::INFINITY, 0.0, 1.0, 0.0], &rows, &[0, 1]),
        ] {
            let error = retrieval(images, texts, 2, of, 1).unwrap_err().to_string();
            assert!(error.contains("expected") && error.contains("\nhint: "), "{error}");
        }
    }
}
