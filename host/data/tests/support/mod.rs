//! Shards made by hand, for the tests of the pipeline.

// Each test file uses a part of this.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use clip_host_data::{Data, DataConfig, Loader};

/// A folder that is removed when the test ends.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let unique = format!("clip-host-data-{name}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(unique);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A tar as GNU tar or Python write it.
#[derive(Default)]
pub struct Tar(pub Vec<u8>);

impl Tar {
    pub fn member(self, name: &str, content: &[u8]) -> Tar {
        self.entry(name, b'0', content)
    }

    pub fn entry(mut self, name: &str, kind: u8, content: &[u8]) -> Tar {
        let mut header = [0u8; 512];
        let short = &name.as_bytes()[..name.len().min(100)];
        header[..short.len()].copy_from_slice(short);
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
        header[136..148].copy_from_slice(b"00000000000\0");
        header[156] = kind;
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn pair(self, key: &str, image: &[u8], caption: &str) -> Tar {
        self.member(&format!("{key}.jpg"), image).member(&format!("{key}.txt"), caption.as_bytes())
    }

    pub fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// A small image whose pixels tell its number.
pub fn png(number: usize) -> Vec<u8> {
    let (w, h) = (12 + number % 5, 10 + number % 3);
    let pixels: Vec<u8> = (0..w * h * 3).map(|i| (i * 7 + number * 31 + (i * i * number) % 97) as u8).collect();
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, w as u32, h as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
    out
}

/// The encoded JPEG of a golden case.
pub fn golden_jpeg(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../tests/golden/images/{name}.safetensors"));
    let bytes = std::fs::read(path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    tensors.tensor("file_bytes").unwrap().data().to_vec()
}

pub const COLOURS: [&str; 6] = ["red", "green", "blue", "grey", "white", "black"];

/// A shard of samples `from..to`.
pub fn shard(from: usize, to: usize) -> Vec<u8> {
    (from..to)
        .fold(Tar::default(), |tar, i| {
            tar.pair(&format!("{i:09}"), &png(i), &format!("A {} thing, number {i}.", COLOURS[i % 6]))
        })
        .end()
}

pub fn write_vocab(folder: &Folder) {
    let captions: Vec<String> = COLOURS.iter().map(|c| format!("a {c} thing number 0123456789")).collect();
    let vocab = clip_host_data::text::build_vocab(captions.iter().map(String::as_str), &Default::default(), 1000, 1);
    clip_host_data::text::write_vocab(&vocab, &folder.0.join("vocab.txt")).unwrap();
}

/// A configuration for `train`, in RON, of 16-pixel images with all augmentation.
pub fn config(train: &str) -> DataConfig {
    let text = format!(
        "(train: [{train}], val: [{train}], image_size: 16, text: (vocab: \"vocab.txt\", max_length: 12), workers: 2)"
    );
    ron::from_str(&text).unwrap()
}

pub fn open(folder: &Folder, train: &str) -> Data {
    write_vocab(folder);
    Data::open(&config(train), &folder.0).unwrap()
}

/// All that is left of a loader.
pub fn drain(mut loader: Loader) -> Vec<clip_host_data::Batch> {
    let mut batches = Vec::new();
    while let Some(batch) = loader.next_batch().unwrap() {
        batches.push(batch);
    }
    batches
}
