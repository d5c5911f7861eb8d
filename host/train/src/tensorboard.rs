//! A TensorBoard event file beside `metrics.jsonl`, with the same numbers: `tensorboard --logdir runs` shows all runs.
//!
//! An event file is a sequence of TFRecords, each an `Event` message in protobuf's encoding. Of both only what scalars
//! need is here. One line of `metrics.jsonl` is one event, its numbers the scalars, `step` the event's step.
//!
//! ```text
//! TFRecord         u64 length, u32 masked CRC-32C of the length, data, u32 masked CRC-32C of the data; little-endian
//! Event            1: double wall_time, 2: int64 step, 3: string file_version | 5: Summary | 7: SessionLog
//! Summary          1: repeated Value
//! Value            1: string tag, 2: float simple_value
//! SessionLog       1: enum status, START = 1
//! ```
//!
//! A resumed run replaces the file by one of the lines that are left of its metrics, so that no point is there twice. The
//! new file begins with a session start at step 0, on which a TensorBoard that shows the run drops what it has read.

use crate::error::{Result, io_error};
use serde_json::{Map, Value};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// TensorBoard reads files whose names contain `tfevents`, in the order of their names; seconds stand in between.
const START: &str = "events.out.tfevents.";
const END: &str = ".clip-host";
/// Must not be taken for an event file while it is written.
const TEMPORARY: &str = ".tensorboard.tmp";

/// The open event file of a run.
#[derive(Debug)]
pub struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// Replaces the event files of this program in `folder` by one with `lines`, the lines of `metrics.jsonl` that count.
    /// Lines that an earlier file has keep the time they were written at there; others get the time of now.
    ///
    /// # Errors
    /// [`TrainError::Io`](crate::TrainError::Io).
    pub fn open(folder: &Path, lines: &[Map<String, Value>]) -> Result<EventFile> {
        let now = now();
        let old = files(folder)?;
        let times: Vec<(u64, f64)> = match old.last() {
            Some(path) => times(&fs::read(path).map_err(io_error("read", path))?),
            None => Vec::new(),
        };
        let mut bytes = record(&event(now, 0, 3, b"brain.Event:2"));
        bytes.extend(record(&event(now, 0, 7, &[0x08, 1])));
        for (i, line) in lines.iter().enumerate() {
            let step = step_of(line);
            let time = times.get(i).filter(|(of, _)| *of == step).map_or(now, |(_, time)| *time);
            bytes.extend(record(&line_event(time, line)));
        }
        let path = folder.join(format!("{START}{:010}{END}", now as u64));
        let temporary = folder.join(TEMPORARY);
        fs::write(&temporary, bytes).map_err(io_error("write", &temporary))?;
        fs::rename(&temporary, &path).map_err(io_error("write", &path))?;
        for path in old.iter().filter(|old| **old != path) {
            fs::remove_file(path).map_err(io_error("remove", path))?;
        }
        let file = File::options().append(true).open(&path).map_err(io_error("open", &path))?;
        Ok(EventFile { file, path })
    }

    /// Appends one line of metrics in one write. What is no finite number, and `step` itself, is left out.
    ///
    /// # Errors
    /// [`TrainError::Io`](crate::TrainError::Io): a full disk, above all.
    pub fn append(&mut self, line: &Map<String, Value>) -> Result<()> {
        self.file.write_all(&record(&line_event(now(), line))).map_err(io_error("append to", &self.path))
    }
}

/// Removes the event files of this program from `folder`; what cannot be removed stays.
pub(crate) fn remove(folder: &Path) {
    for path in files(folder).unwrap_or_default() {
        let _ = fs::remove_file(path);
    }
    let _ = fs::remove_file(folder.join(TEMPORARY));
}

/// The event files of this program in `folder`, oldest first.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(io_error("list", folder))? {
        let entry = entry.map_err(io_error("list", folder))?;
        let name = entry.file_name();
        if name.to_str().is_some_and(|name| name.starts_with(START) && name.ends_with(END)) {
            files.push(entry.path());
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// Seconds since 1970; nothing that is computed depends on them.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn step_of(line: &Map<String, Value>) -> u64 {
    line.get("step").and_then(Value::as_u64).unwrap_or(0)
}

fn line_event(time: f64, line: &Map<String, Value>) -> Vec<u8> {
    let mut summary = Vec::new();
    for (name, value) in line.iter().filter(|(name, _)| *name != "step") {
        if let Some(number) = value.as_f64().map(|number| number as f32).filter(|number| number.is_finite()) {
            let mut value = Vec::with_capacity(name.len() + 8);
            bytes_field(&mut value, 1, name.as_bytes());
            value.push(2 << 3 | FIXED_32);
            value.extend(number.to_le_bytes());
            bytes_field(&mut summary, 1, &value);
        }
    }
    event(time, step_of(line), SUMMARY, &summary)
}

/// An `Event` with `content` in its field `number`.
fn event(time: f64, step: u64, number: u8, content: &[u8]) -> Vec<u8> {
    let mut event = vec![1 << 3 | FIXED_64];
    event.extend(time.to_le_bytes());
    event.push(2 << 3 | VARINT);
    varint(&mut event, step);
    bytes_field(&mut event, number, content);
    event
}

const SUMMARY: u8 = 5;

// Wire types of protobuf; a field begins with its number times 8 plus its type.
const VARINT: u8 = 0;
const FIXED_64: u8 = 1;
const BYTES: u8 = 2;
const FIXED_32: u8 = 5;

/// Seven bits a byte, the lowest first; the high bit says that more follow.
fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn bytes_field(out: &mut Vec<u8>, number: u8, content: &[u8]) {
    out.push(number << 3 | BYTES);
    varint(out, content.len() as u64);
    out.extend(content);
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked(crc32c(&length)).to_le_bytes());
    record.extend(data);
    record.extend(masked(crc32c(data)).to_le_bytes());
    record
}

/// The data of the leading records that are whole.
fn records(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<8>()
        && let Some((length_crc, rest)) = rest.split_first_chunk::<4>()
        && u32::from_le_bytes(*length_crc) == masked(crc32c(length))
        && let Some((data, rest)) =
            usize::try_from(u64::from_le_bytes(*length)).ok().and_then(|n| rest.split_at_checked(n))
        && let Some((data_crc, rest)) = rest.split_first_chunk::<4>()
        && u32::from_le_bytes(*data_crc) == masked(crc32c(data))
    {
        found.push(data);
        bytes = rest;
    }
    found
}

/// Step and wall time of each summary in a file's bytes. What this program did not write ends the list.
fn times(bytes: &[u8]) -> Vec<(u64, f64)> {
    let parse = |event: &[u8]| {
        let rest = event.strip_prefix(&[1 << 3 | FIXED_64])?;
        let (time, rest) = rest.split_first_chunk::<8>()?;
        let mut rest = rest.strip_prefix(&[2 << 3 | VARINT])?;
        let mut step = 0u64;
        for shift in (0..64).step_by(7) {
            let (byte, after) = rest.split_first()?;
            rest = after;
            step |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        Some((step, f64::from_le_bytes(*time), *rest.first()? == SUMMARY << 3 | BYTES))
    };
    let events = records(bytes).into_iter().map_while(parse);
    events.filter(|(_, _, is_summary)| *is_summary).map(|(step, time, _)| (step, time)).collect()
}

/// CRC-32C (Castagnoli): polynomial 0x1EDC6F41, bits reversed, begun and ended with all ones.
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut crc = i as u32;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !data.iter().fold(!0, |crc, &byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)])
}

/// TFRecord's masking, so that a checksum over data that holds checksums stays a good one.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::folder;

    /// Wall time, step, field of the content, scalars.
    type Event = (f64, u64, u32, Vec<(String, f32)>);

    /// A reader of any protobuf message: number and content of each field, numbers as little-endian bytes.
    fn fields(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
        fn varint(bytes: &mut &[u8]) -> u64 {
            let mut value = 0;
            for shift in (0..).step_by(7) {
                let byte = bytes[0];
                *bytes = &bytes[1..];
                value |= u64::from(byte & 0x7f) << shift;
                if byte < 0x80 {
                    break;
                }
            }
            value
        }
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let length = match key & 7 {
                0 => {
                    found.push(((key >> 3) as u32, varint(&mut bytes).to_le_bytes().to_vec()));
                    continue;
                }
                1 => 8,
                5 => 4,
                2 => varint(&mut bytes) as usize,
                other => panic!("wire type {other}"),
            };
            found.push(((key >> 3) as u32, bytes[..length].to_vec()));
            bytes = &bytes[length..];
        }
        found
    }

    fn read(folder: &Path) -> Vec<Event> {
        let files = files(folder).unwrap();
        assert_eq!(files.len(), 1, "{files:?}");
        let bytes = fs::read(&files[0]).unwrap();
        let records = records(&bytes);
        assert_eq!(records.iter().map(|data| data.len() + 16).sum::<usize>(), bytes.len());
        let event = |data: &&[u8]| {
            let fields = fields(data);
            assert_eq!(fields.iter().map(|(number, _)| *number).take(2).collect::<Vec<_>>(), [1, 2]);
            let time = f64::from_le_bytes(fields[0].1.as_slice().try_into().unwrap());
            let step = u64::from_le_bytes(fields[1].1.as_slice().try_into().unwrap());
            let (number, content) = &fields[2];
            let value = |(number, value): (u32, Vec<u8>)| {
                assert_eq!(number, 1);
                let value = super::tests::fields(&value);
                let scalar = f32::from_le_bytes(value[1].1.as_slice().try_into().unwrap());
                (String::from_utf8(value[0].1.clone()).unwrap(), scalar)
            };
            let scalars = match number {
                5 => super::tests::fields(content).into_iter().map(value).collect(),
                _ => Vec::new(),
            };
            (time, step, *number, scalars)
        };
        records.iter().map(event).collect()
    }

    fn line(step: u64, values: &[(&str, f64)]) -> Map<String, Value> {
        let mut line = Map::from_iter([("step".to_string(), Value::from(step))]);
        line.extend(values.iter().map(|(name, value)| (name.to_string(), Value::from(*value))));
        line
    }

    #[test]
    fn checksums_are_the_published_ones() {
        // The check value of the catalogue of CRCs, and RFC 3720, appendix B.4.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&std::array::from_fn::<u8, 32, _>(|i| i as u8)), 0x46dd_794e);
        assert_eq!(crc32c(b""), 0);
        assert_eq!(masked(0), 0xa282_ead8);
        assert_eq!(masked(0x8000), 0xa282_ead9);
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let dir = folder("events");
        let mut events = EventFile::open(&dir, &[]).unwrap();
        // A step and names that need more than one byte of varint.
        let long = "x".repeat(200);
        events.append(&line(300, &[("train/loss", 2.5), (&long, -1e-3), ("none", f64::NAN), ("most", 1e300)])).unwrap();
        events.append(&line(1 << 40, &[])).unwrap();
        let found = read(&dir);
        assert_eq!(
            found.iter().map(|event| (event.1, event.2)).collect::<Vec<_>>(),
            [(0, 3), (0, 7), (300, 5), (1 << 40, 5)]
        );
        assert_eq!(found[2].3, [("train/loss".to_string(), 2.5), (long, -1e-3)]);
        let age = now() - found[2].0;
        assert!((0.0..60.0).contains(&age), "{age}");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_resumed_file_has_each_point_once_and_its_first_time() {
        let dir = folder("events-resumed");
        let lines: Vec<_> = (1..=4).map(|step| line(step * 100, &[("train/loss", 1.0 / step as f64)])).collect();
        let mut events = EventFile::open(&dir, &[]).unwrap();
        lines.iter().for_each(|line| events.append(line).unwrap());
        let before = read(&dir);
        // Killed within a record, and found to be of an earlier second.
        events.file.write_all(&record(&line_event(1.0, &lines[0]))[..20]).unwrap();
        drop(events);
        fs::rename(&files(&dir).unwrap()[0], dir.join(format!("{START}0000000007{END}"))).unwrap();
        fs::write(dir.join("events.out.tfevents.1.other"), "not ours").unwrap();

        let mut events = EventFile::open(&dir, &lines[..2]).unwrap();
        events.append(&lines[2]).unwrap();
        let after = read(&dir);
        assert_eq!(after.len(), 5);
        assert_eq!(after[2..4], before[2..4]);
        assert_eq!((after[4].1, &after[4].3), (before[4].1, &before[4].3));
        // Lines that are not in the file have no time but that of now.
        EventFile::open(&dir, &[lines[3].clone()]).unwrap();
        assert!(read(&dir)[2].0 >= after[4].0);

        remove(&dir);
        let left: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["events.out.tfevents.1.other"]);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn damage_ends_the_reading() {
        let whole = [record(b"one"), record(b"two")].concat();
        assert_eq!(records(&whole), [b"one", b"two"]);
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            assert_eq!(records(&bytes).len(), usize::from(at >= 19), "byte {at}");
            assert_eq!(records(&whole[..at]).len(), usize::from(at >= 19), "cut at {at}");
        }
        // A varint without an end, and a length beyond the memory.
        assert_eq!(times(&record(&[[9; 1].as_slice(), &[0; 8], &[16], &[0xff; 12]].concat())).len(), 0);
        let mut endless = u64::MAX.to_le_bytes().to_vec();
        endless.extend(masked(crc32c(&u64::MAX.to_le_bytes())).to_le_bytes());
        assert_eq!(records(&endless).len(), 0);
    }
}
