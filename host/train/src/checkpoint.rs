//! Checkpoints: everything that decides how a run goes on, in one safetensors file.
//!
//! Tensors (weights, running statistics, optimizer moments, per-sample tables) are stored under their public names;
//! [`State`] (position, scheduler, metric history) is JSON in the file's metadata, with a CRC-32 over all of it. A file
//! is written under a temporary name, synced and renamed: a name `step-….safetensors` is a whole checkpoint, and damage
//! that a disk does later is found by the checksum. The newest two and the best one are kept.

use crate::error::{Result, TrainError, io_error};
use crate::tensor_file::{self, Entry, little_endian};
use clip_host_model::NamedTensor;
use safetensors::tensor::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Where a run is, and all that its next step depends on besides the tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Epoch of the next step, from 0.
    pub epoch: u64,
    /// Steps done in that epoch. Equal to the steps of an epoch where only the work at its end is left.
    pub step_in_epoch: u64,
    /// Steps done in the whole run.
    pub step: u64,
    /// What the data was like.
    pub data: DataShape,
    /// What the scheduler remembers.
    pub scheduler: serde_json::Value,
    /// Sums since the last line of the log.
    pub window: Window,
    /// All evaluations so far.
    pub evaluations: Vec<Evaluation>,
    /// The best of them by mean recall that a checkpoint was written for.
    pub best: Option<Best>,
}

/// Sizes that must not change between parts of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataShape {
    /// Training images and captions.
    pub images: u64,
    /// Training captions.
    pub texts: u64,
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// Pairs of a step.
    pub batch_size: u64,
}

impl std::fmt::Display for DataShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let DataShape { images, texts, steps_per_epoch, batch_size } = self;
        write!(f, "{images} images, {texts} captions, batches of {batch_size}, {steps_per_epoch} steps an epoch")
    }
}

/// Sums over the steps since the last log line.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// Steps in the sums.
    pub steps: u64,
    /// Sum of the loss and of each metric of the loss plugin.
    pub sums: BTreeMap<String, f64>,
}

/// One evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps done before it.
    pub step: u64,
    /// Epochs done before it.
    pub epoch: u64,
    /// Metrics by name.
    pub metrics: BTreeMap<String, f64>,
}

/// The best checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The checkpoint's step.
    pub step: u64,
    /// Its mean recall.
    pub metric: f64,
}

impl State {
    /// Before the first step.
    pub fn new(data: DataShape) -> State {
        State {
            epoch: 0,
            step_in_epoch: 0,
            step: 0,
            data,
            scheduler: serde_json::Value::Null,
            window: Window::default(),
            evaluations: Vec::new(),
            best: None,
        }
    }
}

/// Version of the metadata; a newer one is refused.
const FORMAT: u32 = 1;
const FORMAT_KEY: &str = "clip_host.format";
const STATE_KEY: &str = "clip_host.state";
const CRC_KEY: &str = "clip_host.crc32";
/// How many of the newest checkpoints are kept.
const KEEP: usize = 2;

/// A checkpoint in memory, checked to be whole.
pub struct Checkpoint {
    /// Its file.
    pub path: PathBuf,
    /// Its state.
    pub state: State,
    bytes: Vec<u8>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("path", &self.path).field("state", &self.state).finish_non_exhaustive()
    }
}

/// The checksum of a state and of tensors in the order of their names.
struct Checksum(crc32fast::Hasher);

impl Checksum {
    fn new(state: &str) -> Self {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(state.as_bytes());
        Checksum(hasher)
    }
    fn add(&mut self, name: &str, shape: &[usize], data: &[u8]) {
        self.0.update(name.as_bytes());
        shape.iter().for_each(|&n| self.0.update(&(n as u64).to_le_bytes()));
        self.0.update(data);
    }
    fn finish(self) -> String {
        format!("{:08x}", self.0.finalize())
    }
}

/// Writes the checkpoint of `state` to `folder` and removes those that are no longer needed.
///
/// # Errors
/// If it cannot be written; those that were there before are then untouched.
pub fn save(folder: &Path, state: &State, tensors: &[NamedTensor<'_>]) -> Result<PathBuf> {
    let path = folder.join(file_name(state.step));
    let state_text =
        serde_json::to_string(state).map_err(|e| TrainError::Bug(format!("checkpoint {}: {e}", path.display())))?;

    let mut sorted: Vec<Entry<'_>> = tensors
        .iter()
        .map(|NamedTensor { name, shape, data, .. }| Entry {
            name,
            dtype: Dtype::F32,
            shape,
            data: little_endian(data),
        })
        .collect();
    sorted.sort_by(|a, b| a.name.cmp(b.name));
    let mut checksum = Checksum::new(&state_text);
    for tensor in &sorted {
        checksum.add(tensor.name, tensor.shape, &tensor.data);
    }
    let metadata =
        BTreeMap::from([(FORMAT_KEY, FORMAT.to_string()), (STATE_KEY, state_text), (CRC_KEY, checksum.finish())]);
    tensor_file::write(&path, &metadata, &sorted)?;
    prune(folder, state.best.map(|best| best.step));
    Ok(path)
}

/// Removes all but the newest checkpoints and the best. What cannot be removed is left: it harms nothing but room.
fn prune(folder: &Path, best: Option<u64>) {
    let Ok(files) = list(folder) else { return };
    for (step, path) in files.iter().skip(KEEP).filter(|(step, _)| Some(*step) != best) {
        match fs::remove_file(path) {
            Ok(()) => tracing::debug!(step, "removed an old checkpoint"),
            Err(error) => tracing::warn!("cannot remove the old checkpoint {}: {error}", path.display()),
        }
    }
}

fn file_name(step: u64) -> String {
    format!("step-{step:010}.safetensors")
}

/// The checkpoints in `folder` with their steps, newest first.
///
/// # Errors
/// If the folder cannot be read; one that is not there holds none.
pub fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("list", folder)(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(io_error("list", folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let step = name.strip_prefix("step-").and_then(|rest| rest.strip_suffix(".safetensors"));
        if let Some(step) = step.and_then(|step| step.parse().ok()) {
            files.push((step, path));
        }
    }
    files.sort_unstable_by(|a, b| b.cmp(a));
    Ok(files)
}

/// The newest checkpoint in `folder` that is whole. A damaged one is passed over with a warning; with `set_aside` it is
/// also renamed to `….damaged`, so that it does not count as the newest any more.
///
/// # Errors
/// If there are checkpoints but none is whole.
pub fn load_newest(folder: &Path, set_aside: bool) -> Result<Option<Checkpoint>> {
    let mut first_error = None;
    for (_, path) in list(folder)? {
        match load(&path) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            // A checkpoint of a newer program is no damage: going back behind it would lose steps.
            Err(error @ TrainError::Checkpoint { .. }) if is_newer(&error) => return Err(error),
            Err(error) => {
                tracing::warn!("{error}");
                tracing::warn!("going back to the checkpoint before {}", path.display());
                if set_aside && matches!(error, TrainError::Checkpoint { .. }) {
                    let aside = path.with_extension("safetensors.damaged");
                    if let Err(error) = fs::rename(&path, &aside) {
                        tracing::warn!("cannot rename {}: {error}", path.display());
                    }
                }
                first_error.get_or_insert(error);
            }
        }
    }
    match first_error {
        Some(error) => Err(error),
        None => Ok(None),
    }
}

const NEWER: &str = "it was written by a newer clip-host";

fn is_newer(error: &TrainError) -> bool {
    matches!(error, TrainError::Checkpoint { problem, .. } if problem.starts_with(NEWER))
}

/// Reads the checkpoint at `path` and checks that it is whole.
///
/// # Errors
/// [`TrainError::Checkpoint`] if it is damaged or no checkpoint, [`TrainError::Io`].
pub fn load(path: &Path) -> Result<Checkpoint> {
    let damaged = |problem: String| TrainError::Checkpoint {
        path: path.to_path_buf(),
        problem,
        hint: "the file is damaged or incomplete; restore it, or resume from an earlier checkpoint by removing it"
            .into(),
    };
    let bytes = fs::read(path).map_err(io_error("read", path))?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes)
        .map_err(|e| damaged(format!("expected a safetensors file of {} bytes, got {e}", bytes.len())))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|e| damaged(format!("the tensors are incomplete: {e}")))?;
    let value = |key: &str| {
        let metadata = metadata.metadata().as_ref();
        metadata.and_then(|m| m.get(key)).ok_or_else(|| damaged(format!("the metadata has no `{key}`")))
    };
    let format = value(FORMAT_KEY)?;
    if format.parse::<u32>().is_ok_and(|format| format > FORMAT) {
        return Err(TrainError::Checkpoint {
            path: path.to_path_buf(),
            problem: format!("{NEWER}: expected format {FORMAT}, got {format}"),
            hint: "resume with the program that wrote it".into(),
        });
    }
    let text = value(STATE_KEY)?;
    let mut checksum = Checksum::new(text);
    let mut names = tensors.names();
    names.sort_unstable();
    for name in names {
        let tensor = tensors.tensor(name).map_err(|e| damaged(e.to_string()))?;
        if tensor.dtype() != Dtype::F32 {
            return Err(damaged(format!("tensor `{name}`: expected F32, got {:?}", tensor.dtype())));
        }
        checksum.add(name, tensor.shape(), tensor.data());
    }
    let (found, expected) = (checksum.finish(), value(CRC_KEY)?);
    if found != *expected {
        return Err(damaged(format!("expected the checksum {expected}, got {found}")));
    }
    let state = serde_json::from_str(text).map_err(|e| damaged(format!("the state cannot be read: {e}")))?;
    Ok(Checkpoint { path: path.to_path_buf(), state, bytes })
}

impl Checkpoint {
    /// Calls `visit` with name, shape and elements of every tensor, in the order of names.
    ///
    /// # Errors
    /// What `visit` answers.
    pub fn tensors(&self, mut visit: impl FnMut(&str, &[usize], &[f32]) -> Result<()>) -> Result<()> {
        let bug = |e: safetensors::SafeTensorError| TrainError::Bug(format!("a checked checkpoint fails: {e}"));
        let file = SafeTensors::deserialize(&self.bytes).map_err(bug)?;
        let mut names = file.names();
        names.sort_unstable();
        for name in names {
            let tensor = file.tensor(name).map_err(bug)?;
            visit(name, tensor.shape(), &elements(tensor.data()))?;
        }
        Ok(())
    }
}

fn elements(bytes: &[u8]) -> Cow<'_, [f32]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(elements) if cfg!(target_endian = "little") => Cow::Borrowed(elements),
        // Not aligned in memory, or the machine's bytes are the other way round.
        _ => Cow::Owned(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atomic;
    use crate::testing::folder;
    use clip_host_model::Role;

    const WEIGHT: [f32; 6] = [1.5, -0.0, f32::MIN_POSITIVE, 3e38, f32::from_bits(1), -7.25];

    fn tensors(shift: f32) -> Vec<NamedTensor<'static>> {
        let table: &'static [f32] = Vec::leak(vec![shift; 5]);
        let tensor = |name: &str, role, shape: &[usize], data| NamedTensor {
            name: name.into(),
            role,
            shape: shape.to_vec(),
            data: std::borrow::Cow::Borrowed(data),
        };
        vec![
            tensor("text_encoder.z.weight", Role::Param, &[2, 3], &WEIGHT[..]),
            tensor("loss.s_I", Role::State, &[5], table),
            tensor("loss.temperature", Role::Param, &[], &WEIGHT[..1]),
        ]
    }

    fn state(step: u64) -> State {
        let mut state = State::new(DataShape { images: 5, texts: 5, steps_per_epoch: 2, batch_size: 2 });
        state.step = step;
        state.scheduler = serde_json::json!({"best": 0.1 + 0.2});
        state.window = Window { steps: 1, sums: BTreeMap::from([("train/loss".into(), 1.0 / 3.0)]) };
        state
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let dir = folder("checkpoint");
        let path = save(&dir, &state(7), &tensors(2.0)).unwrap();
        let read = load(&path).unwrap();
        assert_eq!(read.state, state(7));
        let mut seen = Vec::new();
        read.tensors(|name, shape, data| {
            seen.push((name.to_string(), shape.to_vec(), data.iter().map(|x| x.to_bits()).collect::<Vec<_>>()));
            Ok(())
        })
        .unwrap();
        let mut expected = tensors(2.0);
        expected.sort_by(|a, b| a.name.cmp(&b.name));
        for (seen, expected) in seen.iter().zip(&expected) {
            assert_eq!(seen.0, expected.name);
            assert_eq!(seen.1, expected.shape);
            assert_eq!(seen.2, expected.data.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        }
        assert_eq!(seen.len(), 3);
        // The same bytes from the same state.
        let first = fs::read(&path).unwrap();
        save(&dir, &state(7), &tensors(2.0)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), first);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn damage_of_any_kind_falls_back_to_the_one_before() {
        let dir = folder("damage");
        save(&dir, &state(1), &tensors(1.0)).unwrap();
        let newest = save(&dir, &state(2), &tensors(2.0)).unwrap();
        let whole = fs::read(&newest).unwrap();
        let mut damages =
            vec![Vec::new(), whole[..5].to_vec(), whole[..whole.len() - 1].to_vec(), vec![0; whole.len()]];
        // One bit in every part of the file: length, header, state, tensors.
        for at in (0..whole.len()).step_by(13).chain([whole.len() - 1]) {
            let mut bytes = whole.clone();
            bytes[at] ^= 4;
            damages.push(bytes);
        }
        for damage in damages {
            fs::write(&newest, &damage).unwrap();
            match load_newest(&dir, false).unwrap() {
                Some(found) if found.state.step == 1 => {}
                // A bit in the padding of the header, or in the name of the metadata's version, changes nothing.
                Some(found) => {
                    assert_eq!(found.state, state(2));
                    let same = found.tensors(|name, _, data| match name {
                        "loss.s_I" if data != [2.0; 5] => Err(TrainError::Bug("other data".into())),
                        _ => Ok(()),
                    });
                    assert!(same.is_ok());
                }
                None => panic!("the older checkpoint is not found"),
            }
        }
        fs::write(&newest, &whole[..whole.len() / 2]).unwrap();
        assert_eq!(load_newest(&dir, true).unwrap().unwrap().state.step, 1);
        assert_eq!(list(&dir).unwrap().len(), 1, "the damaged file is set aside");
        // None whole: an error, for starting anew in silence would lose the run.
        let last = list(&dir).unwrap().remove(0).1;
        fs::write(last, b"x").unwrap();
        assert!(matches!(load_newest(&dir, false), Err(TrainError::Checkpoint { .. })));
        assert!(load_newest(&dir.join("none"), false).unwrap().is_none());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn the_newest_two_and_the_best_are_kept() {
        let dir = folder("keep");
        for step in 1..=6 {
            let mut state = state(step);
            state.best = Some(Best { step: step.min(2), metric: 0.5 });
            save(&dir, &state, &tensors(0.0)).unwrap();
        }
        let steps: Vec<u64> = list(&dir).unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, [6, 5, 2]);
        fs::remove_dir_all(dir).unwrap();
    }

    /// A full disk: the temporary file is a link to the device that is always full.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_leaves_the_last_good_checkpoint() {
        let dir = folder("full");
        save(&dir, &state(1), &tensors(1.0)).unwrap();
        let temporary = atomic::temporary(&dir.join(file_name(2)));
        std::os::unix::fs::symlink("/dev/full", &temporary).unwrap();
        let error = save(&dir, &state(2), &tensors(2.0)).unwrap_err().to_string();
        assert!(error.contains("disk is full") && error.contains("--resume"), "{error}");
        assert_eq!(load_newest(&dir, true).unwrap().unwrap().state.step, 1);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        fs::remove_dir_all(dir).unwrap();
    }
}
