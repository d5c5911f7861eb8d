//! `metrics.jsonl`: one JSON object per line, appended as the run goes.
//!
//! Every line has `step` (steps done) and `epoch`; training lines have `train/loss`, `train/lr`, …, evaluation lines
//! `image_to_text_R@1`, …. A resumed run first cuts off what lies after its checkpoint, so that the file reads as if the
//! run had never stopped.

use crate::error::{Result, TrainError, io_error};
use serde_json::{Map, Value};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The open file.
#[derive(Debug)]
pub struct Metrics {
    file: File,
    path: PathBuf,
}

impl Metrics {
    /// Opens the file at `path`, or makes it, and drops all lines after step `last`, and a last line that was not
    /// written to its end.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn open(path: &Path, last: u64) -> Result<Metrics> {
        let length = match fs::read(path) {
            Ok(bytes) => length_until(&bytes, last),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
            Err(error) => return Err(io_error("read", path)(error)),
        };
        let file = File::options().create(true).append(true).open(path).map_err(io_error("open", path))?;
        file.set_len(length as u64).map_err(io_error("truncate", path))?;
        Ok(Metrics { file, path: path.to_path_buf() })
    }

    /// Appends a line in one write, and returns it. Numbers that JSON cannot hold (NaN) become `null`.
    ///
    /// # Errors
    /// [`TrainError::Io`]: a full disk, above all.
    pub fn append(
        &mut self,
        step: u64,
        epoch: u64,
        values: impl IntoIterator<Item = (String, f64)>,
    ) -> Result<Map<String, Value>> {
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        line.insert("epoch".into(), epoch.into());
        line.extend(values.into_iter().map(|(name, value)| (name, Value::from(value))));
        let mut text = serde_json::to_string(&line).map_err(|e| TrainError::Bug(e.to_string()))?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(io_error("append to", &self.path))?;
        Ok(line)
    }

    /// Forces what was appended to the disk; a checkpoint must not be newer than its metrics.
    ///
    /// # Errors
    /// [`TrainError::Io`].
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(io_error("sync", &self.path))
    }
}

/// Seconds that the steps and evaluations of a log took, over all starts of its run. Compilation and checkpoints are not
/// in it.
pub fn seconds(lines: &[Map<String, Value>]) -> f64 {
    let mut logged = 0;
    let mut seconds = 0.0;
    for line in lines {
        let number = |name: &str| line.get(name).and_then(Value::as_f64);
        if let (Some(step), Some(each)) = (line.get("step").and_then(Value::as_u64), number("train/batch_time")) {
            seconds += each * step.saturating_sub(logged) as f64;
            logged = step;
        }
        seconds += number("eval/seconds").unwrap_or(0.0);
    }
    seconds
}

/// All lines of a file, for reports. Lines that are no JSON objects are left out.
///
/// # Errors
/// [`TrainError::Io`].
pub fn read(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let text = fs::read_to_string(path).map_err(io_error("read", path))?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

/// Length of the leading lines that are whole and not after step `last`.
fn length_until(bytes: &[u8], last: u64) -> usize {
    let mut length = 0;
    for line in bytes.split_inclusive(|&b| b == b'\n') {
        let step = serde_json::from_slice::<Value>(line).ok().and_then(|line| line.get("step")?.as_u64());
        if !line.ends_with(b"\n") || step.is_none_or(|step| step > last) {
            break;
        }
        length += line.len();
    }
    length
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::folder;

    fn one(name: &str, value: f64) -> [(String, f64); 1] {
        [(name.to_string(), value)]
    }

    #[test]
    fn a_resumed_file_is_as_if_uninterrupted() {
        let dir = folder("metrics");
        let (whole, broken) = (dir.join("whole.jsonl"), dir.join("broken.jsonl"));
        let write = |metrics: &mut Metrics, steps: std::ops::RangeInclusive<u64>| {
            for step in steps {
                metrics.append(step, step / 5, one("train/loss", 1.0 / step as f64)).unwrap();
                if step % 5 == 0 {
                    metrics.append(step, step / 5, one("mean_recall", 0.5)).unwrap();
                }
            }
            metrics.sync().unwrap();
        };
        write(&mut Metrics::open(&whole, 0).unwrap(), 1..=12);
        write(&mut Metrics::open(&broken, 0).unwrap(), 1..=9);
        // Killed within a line.
        let mut bytes = fs::read(&broken).unwrap();
        bytes.extend_from_slice(br#"{"step":10,"ep"#);
        fs::write(&broken, bytes).unwrap();
        write(&mut Metrics::open(&broken, 9).unwrap(), 10..=11);
        write(&mut Metrics::open(&broken, 5).unwrap(), 6..=12);
        assert_eq!(fs::read_to_string(&broken).unwrap(), fs::read_to_string(&whole).unwrap());
        assert_eq!(read(&whole).unwrap().len(), 14);
        // From the beginning.
        drop(Metrics::open(&broken, 0).unwrap());
        assert_eq!(fs::read(&broken).unwrap(), b"");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn seconds_are_those_of_steps_and_evaluations() {
        let line = |step: u64, name: &str, value: f64| {
            Map::from_iter([("step".to_string(), step.into()), (name.to_string(), value.into())])
        };
        let lines = [
            line(2, "train/batch_time", 0.5),
            line(6, "train/batch_time", 0.25),
            line(6, "eval/seconds", 3.0),
            line(7, "train/batch_time", 2.0),
        ];
        assert_eq!(seconds(&lines), 1.0 + 1.0 + 3.0 + 2.0);
        assert_eq!(seconds(&[]), 0.0);
    }

    #[test]
    fn what_json_cannot_hold_is_null() {
        let dir = folder("metrics-nan");
        let path = dir.join("m.jsonl");
        Metrics::open(&path, 0).unwrap().append(3, 0, one("train/loss", f64::NAN)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"epoch\":0,\"step\":3,\"train/loss\":null}\n");
        fs::remove_dir_all(dir).unwrap();
    }
}
