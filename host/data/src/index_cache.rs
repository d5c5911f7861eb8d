//! The index of a shard, kept beside it as `SHARD.index`.
//!
//! The file is little-endian: magic, format version, size and modification time of the shard, the samples, what was
//! skipped, and a checksum of all before. A cache that does not fit in any way is built again, never an error; where
//! the folder cannot be written to, the index just stays in memory. It is written to a temporary name and renamed, so
//! that two processes that index one shard at once, or one that is killed, leave either no file or a whole one.

use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use crate::shard::{ShardIndex, ShardSample};
use crate::stats::{SkipCause, SkipEntry, Skipped};

/// "clip-host index" and the version of the format.
const MAGIC: [u8; 8] = *b"CHINDEX1";

/// What a cache must agree on with its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    size: u64,
    modified_ns: u64,
}

impl Stamp {
    /// Size and modification time of a file.
    pub fn of(meta: &Metadata) -> Stamp {
        let modified = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        Stamp { size: meta.len(), modified_ns: modified.map_or(0, |d| d.as_nanos() as u64) }
    }
}

/// The cache file of a shard.
pub fn cache_path(shard: &Path) -> PathBuf {
    let mut name = shard.as_os_str().to_owned();
    name.push(".index");
    name.into()
}

/// The cached index, if there is one that is whole and fits the shard.
pub fn load(shard: &Path, stamp: Stamp) -> Option<ShardIndex> {
    let bytes = std::fs::read(cache_path(shard)).ok()?;
    let index = decode(&bytes, stamp);
    if index.is_none() {
        tracing::debug!(shard = %shard.display(), "index cache is out of date or damaged: building it again");
    }
    index
}

/// Stores an index beside its shard, if the folder allows.
pub fn store(shard: &Path, stamp: Stamp, index: &ShardIndex) {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let path = cache_path(shard);
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".tmp-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
    let temporary = PathBuf::from(temporary);
    let written = std::fs::write(&temporary, encode(index, stamp)).and_then(|()| std::fs::rename(&temporary, &path));
    if let Err(error) = written {
        // The file may be half there (a full disk).
        let _ = std::fs::remove_file(&temporary);
        tracing::debug!(shard = %shard.display(), %error, "cannot store the index: keeping it in memory");
    }
}

fn encode(index: &ShardIndex, stamp: Stamp) -> Vec<u8> {
    let mut out = Vec::with_capacity(64 + index.samples.len() * 25);
    out.extend_from_slice(&MAGIC);
    for word in [stamp.size, stamp.modified_ns, index.samples.len() as u64] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    for s in &index.samples {
        out.extend_from_slice(&s.image_offset.to_le_bytes());
        out.extend_from_slice(&s.caption_offset.to_le_bytes());
        out.extend_from_slice(&s.image_len.to_le_bytes());
        out.extend_from_slice(&s.caption_len.to_le_bytes());
        out.push(u8::from(s.caption_is_json));
    }
    out.push(index.skipped.0.len() as u8);
    for (cause, entry) in &index.skipped.0 {
        let code = SkipCause::ALL.iter().position(|c| c == cause).unwrap_or(0);
        out.push(code as u8);
        out.extend_from_slice(&entry.count.to_le_bytes());
        out.push(entry.names.len() as u8);
        for name in &entry.names {
            out.extend_from_slice(&(name.len() as u32).to_le_bytes());
            out.extend_from_slice(name.as_bytes());
        }
    }
    let sum = checksum(&out);
    out.extend_from_slice(&sum.to_le_bytes());
    out
}

fn decode(bytes: &[u8], stamp: Stamp) -> Option<ShardIndex> {
    let (body, sum) = bytes.split_at_checked(bytes.len().checked_sub(8)?)?;
    if checksum(body).to_le_bytes() != *sum {
        return None;
    }
    let mut reader = Reader(body);
    if *reader.take(8)? != MAGIC || reader.u64()? != stamp.size || reader.u64()? != stamp.modified_ns {
        return None;
    }
    let count = usize::try_from(reader.u64()?).ok()?;
    // 25 bytes each: a count that cannot be right must not reserve memory.
    if count > body.len() / 25 {
        return None;
    }
    let mut samples = Vec::with_capacity(count);
    for _ in 0..count {
        samples.push(ShardSample {
            image_offset: reader.u64()?,
            caption_offset: reader.u64()?,
            image_len: reader.u32()?,
            caption_len: reader.u32()?,
            caption_is_json: reader.u8()? != 0,
        });
    }
    let mut skipped = Skipped::default();
    for _ in 0..reader.u8()? {
        let cause = *SkipCause::ALL.get(usize::from(reader.u8()?))?;
        let mut entry = SkipEntry { count: reader.u64()?, names: Vec::new() };
        for _ in 0..reader.u8()? {
            let len = reader.u32()? as usize;
            entry.names.push(String::from_utf8(reader.take(len)?.to_vec()).ok()?);
        }
        skipped.0.insert(cause, entry);
    }
    reader.0.is_empty().then_some(ShardIndex { samples, skipped })
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }
    fn u8(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }
    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }
    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }
}

/// FNV-1a, 64 bits: enough to notice a damaged cache, which is all it is for.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> (ShardIndex, Stamp) {
        let sample = ShardSample {
            image_offset: 512,
            image_len: 7,
            caption_len: 9,
            caption_offset: 1536,
            caption_is_json: true,
        };
        let mut skipped = Skipped::default();
        skipped.add(SkipCause::EmptyCaption, "ü");
        skipped.add(SkipCause::CorruptHeader, "x@12");
        (ShardIndex { samples: vec![sample; 3], skipped }, Stamp { size: 10, modified_ns: 20 })
    }

    #[test]
    fn round_trip_and_stamp() {
        let (index, stamp) = example();
        let bytes = encode(&index, stamp);
        assert_eq!(decode(&bytes, stamp), Some(index));
        assert_eq!(decode(&bytes, Stamp { size: 11, ..stamp }), None);
        assert_eq!(decode(&bytes, Stamp { modified_ns: 21, ..stamp }), None);
    }

    #[test]
    fn every_damaged_byte_and_every_cut_is_noticed() {
        let (index, stamp) = example();
        let bytes = encode(&index, stamp);
        for i in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[i] ^= 0x10;
            assert_eq!(decode(&damaged, stamp), None, "byte {i}");
            assert_eq!(decode(&bytes[..i], stamp), None, "cut at {i}");
        }
    }
}
