//! One WebDataset tar, memory-mapped as it is, and the index of its samples.
//!
//! A sample is the members that share a key: the path up to the first dot of the file name (`00/a.b.jpg` has the key
//! `00/a`). Used are an image (`jpg`, `jpeg`, `png`, `webp`) and a caption (`txt`, or the `caption` field of `json` if
//! there is no usable text). Members of a sample need not stand together. ustar, GNU long names and pax headers are
//! understood.
//!
//! Damage of a whole shard is an error: no tar, cut in the middle of a member, no sample at all. Damage of a single
//! sample is counted. The index holds offsets only, 32 bytes a sample; names are read back from the tar for messages.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{DataError, Result};
use crate::index_cache;
use crate::stats::{BadSample, SkipCause, Skipped};

/// Size of a tar block.
const BLOCK: u64 = 512;

/// Where one sample lies in its shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardSample {
    /// Offset of the image's bytes.
    pub image_offset: u64,
    /// Length of the image in bytes.
    pub image_len: u32,
    /// Length of the caption's member in bytes.
    pub caption_len: u32,
    /// Offset of the caption's bytes.
    pub caption_offset: u64,
    /// The caption is the `caption` field of a JSON object, not plain text.
    pub caption_is_json: bool,
}

/// The index of a shard: its samples in the order of their first members, and what was skipped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShardIndex {
    /// Usable samples.
    pub samples: Vec<ShardSample>,
    /// Members and samples that are not usable.
    pub skipped: Skipped,
}

/// A memory-mapped shard with its index.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Mmap,
    index: ShardIndex,
}

impl Shard {
    /// Maps a shard and reads its index from beside it, or builds and stores the index.
    ///
    /// # Errors
    /// See [`DataError`]: a missing or unreadable file, no tar, a truncated one, one without samples.
    pub fn open(path: &Path) -> Result<Shard> {
        let file = File::open(path).map_err(|e| DataError::io("open", path, &e))?;
        let meta = file.metadata().map_err(|e| DataError::io("read", path, &e))?;
        if meta.len() == 0 {
            return Err(DataError::NotTar {
                path: path.into(),
                found: "an empty file".into(),
                hint: "the download failed; fetch this shard again".into(),
            });
        }
        // SAFETY: the map is read-only and private to this struct. As for every mapped file, cutting it while a run
        // uses it would raise SIGBUS; shards are written once, and every access is checked against the mapped length.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| DataError::io("map", path, &e))?;
        let stamp = index_cache::Stamp::of(&meta);
        let index = match index_cache::load(path, stamp) {
            Some(index) => index,
            None => {
                let index = build_index(path, &map)?;
                index_cache::store(path, stamp, &index);
                index
            }
        };
        if index.samples.is_empty() {
            let found = if index.skipped.total() > 0 { format!("only {}", index.skipped) } else { "none".into() };
            return Err(DataError::NoSamples {
                path: path.into(),
                found,
                hint: "check that this is an image-text shard; take it out of the list if it is not".into(),
            });
        }
        Ok(Shard { path: path.into(), map, index })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of usable samples.
    pub fn len(&self) -> usize {
        self.index.samples.len()
    }

    /// True if there is no sample; `open` refuses such shards.
    pub fn is_empty(&self) -> bool {
        self.index.samples.is_empty()
    }

    /// What was skipped while indexing.
    pub fn skipped(&self) -> &Skipped {
        &self.index.skipped
    }

    /// The encoded image of a sample, straight from the mapping.
    ///
    /// # Errors
    /// [`SkipCause::StaleIndex`] if the sample does not lie in the shard.
    pub fn image(&self, sample: usize) -> Result<&[u8], BadSample> {
        let s = self.sample(sample)?;
        self.slice(s.image_offset, s.image_len)
    }

    /// The caption of a sample, trimmed.
    ///
    /// # Errors
    /// As [`Shard::image`]; [`SkipCause::EmptyCaption`] if the shard changed under the index.
    pub fn caption(&self, sample: usize) -> Result<Cow<'_, str>, BadSample> {
        let s = self.sample(sample)?;
        let bytes = self.slice(s.caption_offset, s.caption_len)?;
        let caption = if s.caption_is_json { json_caption(bytes).map(Cow::Owned) } else { text_caption(bytes) };
        caption.ok_or_else(|| BadSample::new(SkipCause::EmptyCaption, "no caption where the index has one"))
    }

    /// The key of a sample, read back from the tar header before its image.
    pub fn key(&self, sample: usize) -> String {
        let header = self.sample(sample).ok().and_then(|s| {
            let at = s.image_offset.checked_sub(BLOCK)?;
            self.slice(at, BLOCK as u32).ok()
        });
        match header.map(|h| split_key(&header_name(h)).0.to_string()) {
            Some(key) if !key.is_empty() => key,
            _ => format!("#{sample}"),
        }
    }

    fn sample(&self, sample: usize) -> Result<&ShardSample, BadSample> {
        self.index
            .samples
            .get(sample)
            .ok_or_else(|| BadSample::new(SkipCause::StaleIndex, format!("the shard has no sample {sample}")))
    }

    fn slice(&self, offset: u64, len: u32) -> Result<&[u8], BadSample> {
        let start = usize::try_from(offset).ok();
        start
            .and_then(|s| self.map.get(s..s.checked_add(len as usize)?))
            .ok_or_else(|| BadSample::new(SkipCause::StaleIndex, "the shard is shorter than its index says"))
    }
}

/// The members of one key, while indexing.
#[derive(Default)]
struct Members {
    key: String,
    image: Option<(u64, u32)>,
    text: Option<(u64, u32)>,
    json: Option<(u64, u32)>,
}

/// What a member is for.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    Image,
    Text,
    Json,
}

fn role(extension: &str) -> Option<Role> {
    match extension.to_ascii_lowercase().as_str() {
        "jpg" | "jpeg" | "png" | "webp" => Some(Role::Image),
        "txt" => Some(Role::Text),
        "json" => Some(Role::Json),
        _ => None,
    }
}

/// Key and extension of a member's path: split at the first dot of the file name.
fn split_key(path: &str) -> (&str, &str) {
    let path = path.strip_prefix("./").unwrap_or(path);
    let file = path.rfind('/').map_or(0, |i| i + 1);
    // A leading dot (`.DS_Store`, `._a.jpg`) makes a hidden file, which is no sample.
    match path[file..].find('.') {
        Some(dot) if dot > 0 => (&path[..file + dot], &path[file + dot + 1..]),
        _ => (path, ""),
    }
}

/// Reads the headers of a whole tar.
///
/// # Errors
/// [`DataError::NotTar`], [`DataError::Truncated`], [`DataError::Corrupt`].
pub(crate) fn build_index(path: &Path, tar: &[u8]) -> Result<ShardIndex> {
    let mut members: Vec<Members> = Vec::new();
    let mut by_key: HashMap<String, usize> = HashMap::new();
    let mut skipped = Skipped::default();
    let len = tar.len() as u64;
    // Name and size that an extended header gives to the next member.
    let (mut long_name, mut long_size): (Option<String>, Option<u64>) = (None, None);
    let (mut at, mut zero_blocks) = (0u64, 0);
    while at < len {
        let complete =
            || members.iter().filter(|m| m.image.is_some() && (m.text.is_some() || m.json.is_some())).count();
        let header = &tar[at as usize..(at + BLOCK).min(len) as usize];
        if header.iter().all(|&b| b == 0) {
            zero_blocks += 1;
            at += BLOCK;
            if zero_blocks == 2 {
                break;
            }
            continue;
        }
        zero_blocks = 0;
        if at == 0 && !valid_checksum(header) {
            return Err(not_tar(path, header));
        }
        if (header.len() as u64) < BLOCK {
            return Err(DataError::Truncated {
                path: path.into(),
                member: "(header)".into(),
                offset: at,
                expected: BLOCK,
                got: header.len() as u64,
                samples: complete(),
            });
        }
        if !valid_checksum(header) {
            // Resynchronise: members start at multiples of 512 bytes, and a checksum hardly ever fits by chance.
            let next = (at + BLOCK..len.saturating_sub(BLOCK - 1)).step_by(BLOCK as usize).find(|&o| {
                let block = &tar[o as usize..(o + BLOCK) as usize];
                block[257..262] == *b"ustar" && valid_checksum(block)
            });
            let Some(next) = next else {
                return Err(DataError::Corrupt { path: path.into(), offset: at, samples: complete() });
            };
            skipped.add(SkipCause::CorruptHeader, format!("{}@{at}", path.display()));
            (long_name, long_size) = (None, None);
            at = next;
            continue;
        }
        let kind = header[156];
        let data = at + BLOCK;
        // Links and devices have no data, whatever their size field says.
        let size = match kind {
            b'1'..=b'6' => 0,
            _ => long_size.take().or_else(|| number(&header[124..136])).unwrap_or(0),
        };
        let name = match kind {
            b'L' | b'K' | b'x' | b'g' => String::new(),
            _ => long_name.take().unwrap_or_else(|| header_name(header)),
        };
        if size > len - data {
            return Err(DataError::Truncated {
                path: path.into(),
                member: if name.is_empty() { "(extended header)".into() } else { name },
                offset: at,
                expected: BLOCK.saturating_add(size),
                got: len - at,
                samples: complete(),
            });
        }
        let content = &tar[data as usize..(data + size) as usize];
        match kind {
            b'L' => long_name = Some(text_until_nul(content)),
            b'x' => {
                let (name, size) = pax_fields(content);
                long_name = name.or(long_name);
                long_size = size;
            }
            0 | b'0' | b'7' => {
                let (key, extension) = split_key(&name);
                if let (Some(role), false, Ok(size)) = (role(extension), key.is_empty(), u32::try_from(size)) {
                    let slot = *by_key.entry(key.to_string()).or_insert_with(|| {
                        members.push(Members { key: key.to_string(), ..Members::default() });
                        members.len() - 1
                    });
                    let field = match role {
                        Role::Image => &mut members[slot].image,
                        Role::Text => &mut members[slot].text,
                        Role::Json => &mut members[slot].json,
                    };
                    if field.is_some() {
                        skipped.add(SkipCause::DuplicateMember, name);
                    } else {
                        *field = Some((data, size));
                    }
                }
            }
            _ => {}
        }
        at = data + size.div_ceil(BLOCK) * BLOCK;
    }
    if zero_blocks < 2 {
        skipped.add(SkipCause::NoEndMark, path.display().to_string());
    }
    Ok(collect(members, tar, skipped))
}

/// Sorts out which keys make a sample.
fn collect(members: Vec<Members>, tar: &[u8], mut skipped: Skipped) -> ShardIndex {
    let bytes = |(offset, len): (u64, u32)| &tar[offset as usize..offset as usize + len as usize];
    let mut samples = Vec::with_capacity(members.len());
    for m in members {
        let text = m.text.filter(|&range| text_caption(bytes(range)).is_some()).map(|range| (range, false));
        let caption = text.or_else(|| m.json.filter(|&r| json_caption(bytes(r)).is_some()).map(|r| (r, true)));
        match (m.image, caption) {
            (Some((image_offset, image_len)), Some(((caption_offset, caption_len), caption_is_json))) => {
                samples.push(ShardSample { image_offset, image_len, caption_len, caption_offset, caption_is_json });
            }
            (Some(_), None) if m.text.is_some() => skipped.add(SkipCause::EmptyCaption, m.key),
            (Some(_), None) => skipped.add(SkipCause::MissingCaption, m.key),
            (None, _) => skipped.add(SkipCause::MissingImage, m.key),
        }
    }
    ShardIndex { samples, skipped }
}

/// The caption of a text member; None if it is empty. Bytes that are no UTF-8 become U+FFFD.
fn text_caption(bytes: &[u8]) -> Option<Cow<'_, str>> {
    let text = match String::from_utf8_lossy(bytes) {
        Cow::Borrowed(s) => Cow::Borrowed(s.trim()),
        Cow::Owned(s) => Cow::Owned(s.trim().to_string()),
    };
    (!text.is_empty()).then_some(text)
}

fn json_caption(bytes: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Meta {
        caption: Option<String>,
    }
    let caption = serde_json::from_slice::<Meta>(bytes).ok()?.caption?;
    let caption = caption.trim();
    (!caption.is_empty()).then(|| caption.to_string())
}

/// Whether the header's checksum fits; some old archivers summed signed bytes.
fn valid_checksum(header: &[u8]) -> bool {
    if header.len() < BLOCK as usize {
        return false;
    }
    let Some(want) = number(&header[148..156]) else { return false };
    let blanked = |i: usize, b: u8| if (148..156).contains(&i) { b' ' } else { b };
    let unsigned: u64 = header.iter().enumerate().map(|(i, &b)| u64::from(blanked(i, b))).sum();
    let signed: i64 = header.iter().enumerate().map(|(i, &b)| i64::from(blanked(i, b) as i8)).sum();
    want == unsigned || i64::try_from(want) == Ok(signed)
}

/// A number field: octal digits, or GNU's base-256 if the top bit is set.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let mut value = u64::from(field[0] & 0x7f);
        for &b in &field[1..] {
            value = value.checked_mul(256)?.checked_add(u64::from(b))?;
        }
        return Some(value);
    }
    let text = std::str::from_utf8(field).ok()?;
    let text = text.trim_matches([' ', '\0']);
    u64::from_str_radix(text, 8).ok()
}

fn text_until_nul(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// The path in a header, with ustar's prefix (GNU uses that field for other things).
fn header_name(header: &[u8]) -> String {
    let name = text_until_nul(&header[..100]);
    if header[257..263] == *b"ustar\0" && header[345] != 0 {
        return format!("{}/{name}", text_until_nul(&header[345..500]));
    }
    name
}

/// `path` and `size` of a pax header's records, each `LENGTH key=value\n`.
fn pax_fields(mut records: &[u8]) -> (Option<String>, Option<u64>) {
    let (mut name, mut size) = (None, None);
    while let Some(space) = records.iter().position(|&b| b == b' ') {
        let len = std::str::from_utf8(&records[..space]).ok().and_then(|s| s.parse::<usize>().ok());
        let Some(len) = len.filter(|&len| len > space && len <= records.len()) else { break };
        let record = String::from_utf8_lossy(&records[space + 1..len]);
        match record.trim_end_matches('\n').split_once('=') {
            Some(("path", value)) => name = Some(value.to_string()),
            Some(("size", value)) => size = value.parse().ok(),
            _ => {}
        }
        records = &records[len..];
    }
    (name, size)
}

fn not_tar(path: &Path, start: &[u8]) -> DataError {
    let (found, hint) = match start {
        [0x1f, 0x8b, ..] => ("gzip data", "decompress it first (gunzip): compressed tars cannot be memory-mapped"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd data", "decompress it first: compressed tars cannot be memory-mapped"),
        [b'P', b'A', b'R', b'1', ..] => ("a parquet file", "name the .tar files, not the .parquet files beside them"),
        [b'P', b'K', ..] => ("a zip archive", "unpack it and make a tar of its members"),
        _ if start.len() < BLOCK as usize => {
            ("a file shorter than that", "the download failed; fetch this shard again")
        }
        _ if start.trim_ascii_start().starts_with(b"<") => {
            ("a web page", "the server answered with a page, not the shard: check the address and the login")
        }
        _ if start.starts_with(b"version https://git-lfs") => ("a Git LFS pointer", "run `git lfs pull`"),
        _ => ("other data", "name .tar files as img2dataset or webdataset write them"),
    };
    DataError::NotTar { path: path.into(), found: found.into(), hint: hint.into() }
}
