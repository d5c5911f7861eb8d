//! Retrieval over all held-out pairs.

use crate::error::{Result, TrainError};
use clip_host_data::{Batch, Data, Loader, Order, Skipped};
use clip_host_eval::{Retrieval, retrieval};
use clip_host_model::{ModelError, Session};

/// What an evaluation found.
#[derive(Debug, Clone)]
pub struct Evaluated {
    /// Ranks and recalls.
    pub retrieval: Retrieval,
    /// Images that took part.
    pub images: usize,
    /// Captions that took part.
    pub captions: usize,
    /// What could not be read.
    pub skipped: Skipped,
}

/// The two halves of a model, so that an evaluation does not depend on what computes.
pub trait Encode {
    /// Embeddings of `n` images, row by row.
    ///
    /// # Errors
    /// If they cannot be computed.
    fn images(&mut self, images: &[f32]) -> Result<Vec<f32>>;
    /// Embeddings of `n` captions, row by row.
    ///
    /// # Errors
    /// If they cannot be computed.
    fn texts(&mut self, input_ids: &[i32], attention_mask: &[f32]) -> Result<Vec<f32>>;
}

impl Encode for Session {
    fn images(&mut self, images: &[f32]) -> Result<Vec<f32>> {
        self.encode_images(images).map_err(model_error)
    }
    fn texts(&mut self, input_ids: &[i32], attention_mask: &[f32]) -> Result<Vec<f32>> {
        self.encode_texts(input_ids, attention_mask).map_err(model_error)
    }
}

fn model_error(error: ModelError) -> TrainError {
    TrainError::Model(crate::assemble::with_hint_line(&error.to_string()))
}

/// Encodes all held-out images and captions and ranks each against all of the other kind. Memory beyond a batch is the
/// embeddings'. Captions of an image that cannot be read take no part.
///
/// # Errors
/// If there is no held-out data, it cannot be read, or the embeddings have no direction.
pub fn evaluate(
    model: &mut impl Encode,
    data: &Data,
    embed_dim: usize,
    batch_size: usize,
    threads: usize,
) -> Result<Evaluated> {
    let val = &data.val;
    // One caption for each image: both come in one pass.
    let pairs = val.num_images() == val.num_texts() && (0..val.num_texts()).all(|t| val.image_of_text(t) == Some(t));
    let mut images = Vec::with_capacity(val.num_images() * embed_dim);
    let mut texts = Vec::with_capacity(val.num_texts() * embed_dim);
    let mut row_of_image = vec![None; val.num_images()];
    let mut image_of_text = Vec::with_capacity(val.num_texts());
    let mut rows = 0u32;

    let mut loader = data.eval_loader(Order::Images, batch_size)?;
    let length = data.tokenizer.max_length();
    each_batch(&mut loader, |batch| {
        let size = batch.images.len() / batch.sample_ids.len().max(1);
        images.extend(model.images(&batch.images[..batch.len * size])?);
        for &id in &batch.sample_ids[..batch.len] {
            if let Some(row) = usize::try_from(id).ok().and_then(|id| row_of_image.get_mut(id)) {
                *row = Some(rows);
            }
            if pairs {
                image_of_text.push(rows);
            }
            rows += 1;
        }
        if pairs {
            let tokens = batch.len * length;
            texts.extend(model.texts(&batch.input_ids[..tokens], &batch.attention_mask[..tokens])?);
        }
        Ok(())
    })?;
    let skipped = loader.skipped();
    drop(loader);

    if !pairs {
        let mut loader = data.eval_loader(Order::Texts, batch_size)?;
        each_batch(&mut loader, |batch| {
            let tokens = batch.len * length;
            let rows = model.texts(&batch.input_ids[..tokens], &batch.attention_mask[..tokens])?;
            for (row, &id) in rows.chunks_exact(embed_dim).zip(&batch.text_ids[..batch.len]) {
                let image = usize::try_from(id).ok().and_then(|id| val.image_of_text(id));
                if let Some(image) = image.and_then(|image| row_of_image.get(image).copied().flatten()) {
                    texts.extend_from_slice(row);
                    image_of_text.push(image);
                }
            }
            Ok(())
        })?;
    }
    let retrieval = retrieval(&images, &texts, embed_dim, &image_of_text, threads)?;
    Ok(Evaluated { retrieval, images: rows as usize, captions: image_of_text.len(), skipped })
}

fn each_batch(loader: &mut Loader, mut visit: impl FnMut(&Batch) -> Result<()>) -> Result<()> {
    while let Some(batch) = loader.next_batch()? {
        if batch.len > 0 {
            visit(&batch)?;
        }
        loader.recycle(batch);
    }
    Ok(())
}
