//! A tower's forward pass by luminal's stock CUDA compiler, to compare the session's own plan with.

use crate::assemble::{Tower, evaluation_program};
use crate::{ModelError, Session};
use clip_host_graph::stock_cuda::StockCuda;
use std::collections::HashMap;
use std::time::Duration;

/// What `luminal_cuda` computed, and how long that took.
pub struct StockRun {
    pub compile_time: Duration,
    /// Each run's time, from a device that has everything to the result in the host's memory.
    pub times: Vec<Duration>,
    /// Unit rows `[n, embed_dim]`.
    pub features: Vec<f32>,
}

/// As [`Session::encode_images`] with the session's weights in f32, `runs` times (at least once) after one that is not
/// counted.
///
/// # Errors
/// [`ModelError::Stock`] without a device, or with what `luminal_cuda` said.
pub fn encode_images(session: &Session, images: &[f32], runs: usize) -> Result<StockRun, ModelError> {
    let size = session.spec().image_size;
    let inputs = HashMap::from([("images".to_string(), images.to_vec())]);
    encode(session, Tower::Image, images.len() / (3 * size * size), inputs, runs)
}

/// As [`Session::encode_texts`], likewise.
///
/// # Errors
/// As [`encode_images`].
pub fn encode_texts(session: &Session, ids: &[i32], mask: &[f32], runs: usize) -> Result<StockRun, ModelError> {
    // luminal computes with floats; ids below 2²⁴ are whole numbers there too.
    let floats = ids.iter().map(|&id| id as f32).collect();
    let inputs = HashMap::from([("input_ids".to_string(), floats), ("attention_mask".to_string(), mask.to_vec())]);
    encode(session, Tower::Text, ids.len() / session.spec().text_length, inputs, runs)
}

fn encode(
    session: &Session,
    tower: Tower,
    batch: usize,
    mut inputs: HashMap<String, Vec<f32>>,
    runs: usize,
) -> Result<StockRun, ModelError> {
    inputs.extend(session.tensors()?.into_iter().map(|tensor| (tensor.name, tensor.data.into_owned())));
    let mut program = evaluation_program(session.spec(), tower, batch)?;
    program.outputs.retain(|(name, _)| name == "features");
    let mut stock = StockCuda::compile(&program, &inputs)?;
    stock.run()?;
    let times = (0..runs.max(1)).map(|_| stock.run()).collect::<Result<_, _>>()?;
    let features = stock.results()?.into_iter().flat_map(|(_, features)| features).collect();
    Ok(StockRun { compile_time: stock.compile_time(), times, features })
}
