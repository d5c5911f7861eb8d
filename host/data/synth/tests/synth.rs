//! The generated set as a reader of it sees it.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use clip_host_data_synth::caption::MAX_TOKENS;
use clip_host_data_synth::split::{held_out, train_sample, val_samples};
use clip_host_data_synth::{Difficulty, SynthConfig, SynthError, generate, vocab};

fn small(out: &Path) -> SynthConfig {
    SynthConfig { out: out.to_owned(), seed: 7, train: 130, val: 30, shard_size: 50, ..SynthConfig::default() }
}

/// Name and bytes of every member.
fn members(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut archive = tar::Archive::new(File::open(path).expect("the shard opens"));
    let entries = archive.entries().expect("the shard is a tar");
    entries
        .map(|entry| {
            let mut entry = entry.expect("the member is well-formed");
            let name = entry.path().expect("the name is a path").display().to_string();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("the member is whole");
            (name, bytes)
        })
        .collect()
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

#[test]
fn same_seed_same_bytes() {
    let (one, two, other) = (tempfile::tempdir(), tempfile::tempdir(), tempfile::tempdir());
    let (one, two, other) = (one.expect("folder"), two.expect("folder"), other.expect("folder"));
    let first = generate(&small(one.path())).expect("it generates");
    generate(&small(two.path())).expect("it generates");
    generate(&SynthConfig { seed: 8, ..small(other.path()) }).expect("it generates");
    assert_eq!(first.train_shards.len(), 3);
    assert_eq!(first.val_shards.len(), 1);
    let mut all = Vec::new();
    for path in first.train_shards.iter().chain(&first.val_shards).chain([&first.vocab]) {
        let name = path.file_name().expect("a file");
        let bytes = fs::read(path).expect("it was written");
        assert_eq!(bytes, fs::read(two.path().join(name)).expect("it was written"), "{name:?}");
        assert_ne!(bytes, fs::read(other.path().join(name)).expect("it was written"), "{name:?}");
        all.extend(bytes);
    }
    // Made on x86-64; another machine has to agree. A deliberate change of the generator changes it, and then
    // data/sample is to be made anew.
    assert_eq!(fnv(&all), PINNED, "the generator's output changed: {:#x}", fnv(&all));
    let left: Vec<_> = fs::read_dir(one.path())
        .expect("it lists")
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|name| name.contains("partial"))
        .collect();
    assert!(left.is_empty(), "temporary files are left: {left:?}");
}

const PINNED: u64 = 0xd47e_f792_da1f_823b;

#[test]
fn members_are_what_img2dataset_writes() {
    let folder = tempfile::tempdir().expect("folder");
    let config = SynthConfig { json: true, ..small(folder.path()) };
    let summary = generate(&config).expect("it generates");
    let mut index = 0;
    for shard in &summary.train_shards {
        for sample in members(shard).chunks(3) {
            let names: Vec<&str> = sample.iter().map(|(name, _)| name.as_str()).collect();
            let key = format!("{index:09}");
            assert_eq!(names, [format!("{key}.jpg"), format!("{key}.txt"), format!("{key}.json")]);
            let mut decoder = zune_jpeg::JpegDecoder::new(&sample[0].1);
            let pixels = decoder.decode().expect("the picture decodes");
            assert_eq!(decoder.dimensions(), Some((64, 64)));
            assert_eq!(pixels.len(), 64 * 64 * 3);
            let (low, high) = (pixels.iter().min(), pixels.iter().max());
            assert!(low < high, "picture {key} is blank");
            let caption = String::from_utf8(sample[1].1.clone()).expect("UTF-8");
            let json: serde_json::Value = serde_json::from_slice(&sample[2].1).expect("JSON");
            assert_eq!(json["caption"], caption);
            assert_eq!(json["key"], key);
            index += 1;
        }
    }
    assert_eq!(index, config.train);
}

#[test]
fn no_held_out_combination_is_trained_on() {
    let settings = Difficulty::Standard.settings();
    let kinds =
        |scene: &clip_host_data_synth::scene::Scene| -> Vec<usize> { scene.objects.iter().map(|o| o.kind()).collect() };
    let mut trained = HashSet::new();
    for index in 0..5_000 {
        let (sample, _) = train_sample(1, index, &settings);
        let kinds = kinds(&sample.scene);
        for &a in &kinds {
            trained.extend(kinds.iter().map(|&b| (a, b)));
        }
    }
    let singles: HashSet<usize> = trained.iter().map(|pair| pair.0).collect();
    assert_eq!(singles.len(), 144, "every colour and shape is seen alone");
    let samples = val_samples(1, 500, &settings);
    assert_eq!(samples.len(), 500);
    for sample in &samples {
        let objects = &sample.scene.objects;
        assert!(held_out(1, &objects[0], &objects[1]));
        assert!(!trained.contains(&(objects[0].kind(), objects[1].kind())));
    }
}

#[test]
fn a_held_out_caption_is_true_of_its_own_picture_only() {
    let samples = val_samples(1, 500, &Difficulty::Standard.settings());
    let texts: HashSet<&str> = samples.iter().map(|s| s.caption.text.as_str()).collect();
    assert_eq!(texts.len(), samples.len());
    for (i, sample) in samples.iter().enumerate() {
        for (j, other) in samples.iter().enumerate() {
            assert_eq!(sample.caption.facts.hold(&other.scene), i == j, "{:?} and picture {j}", sample.caption);
        }
    }
}

#[test]
fn captions_tokenise_without_unknowns() {
    let folder = tempfile::tempdir().expect("folder");
    let config = SynthConfig { train: 1_500, shard_size: 1_000, image_size: 32, ..small(folder.path()) };
    let summary = generate(&config).expect("it generates");
    let text = fs::read_to_string(&summary.vocab).expect("the vocabulary is there");
    let tokens: Vec<&str> = text.lines().collect();
    assert_eq!(&tokens[..5], &vocab::SPECIAL);
    assert_eq!(tokens.len(), summary.vocab_size);
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(i, &t)| (t, i)).collect();
    assert_eq!(ids.len(), tokens.len(), "no token twice");
    let (mut longest, mut pieces, mut captions) = (0, 0, HashSet::new());
    for shard in summary.train_shards.iter().chain(&summary.val_shards) {
        for (name, bytes) in members(shard) {
            if name.ends_with(".txt") {
                let caption = String::from_utf8(bytes).expect("UTF-8");
                let found = vocab::tokenize(&caption, &ids);
                assert!(found.iter().all(Option::is_some), "[UNK] in {caption:?}");
                assert!(found.len() >= 2, "{caption:?} says nothing");
                longest = longest.max(found.len() + 2);
                pieces += usize::from(found.iter().flatten().any(|&id| tokens[id].starts_with("##")));
                captions.insert(caption);
            }
        }
    }
    assert_eq!(longest, summary.longest_caption);
    assert!(longest <= MAX_TOKENS, "{longest} tokens");
    assert!(pieces > 0, "no typing error at all");
    assert!(captions.len() > 1_450, "captions repeat: {} of 1530 differ", captions.len());
}

#[test]
fn refusals_name_what_is_wrong() {
    let folder = tempfile::tempdir().expect("folder");
    let config = small(folder.path());
    for (key, bad) in [
        ("image_size", SynthConfig { image_size: 8, ..config.clone() }),
        ("train", SynthConfig { train: 0, ..config.clone() }),
        ("shard_size", SynthConfig { shard_size: 0, ..config.clone() }),
        ("quality", SynthConfig { quality: 0, ..config.clone() }),
    ] {
        let error = generate(&bad).expect_err("out of range");
        assert!(error.to_string().contains(key) && error.to_string().contains("hint:"), "{error}");
    }
    fs::write(folder.path().join("train-00009.tar"), b"old").expect("it writes");
    let error = generate(&config).expect_err("a shard is in the way");
    assert!(matches!(&error, SynthError::Exists { found, .. } if found == "train-00009.tar"), "{error}");
    generate(&SynthConfig { overwrite: true, ..config.clone() }).expect("it replaces");
    assert!(!folder.path().join("train-00009.tar").exists(), "a stale shard stays");
    let file = folder.path().join("vocab.txt");
    let error = generate(&SynthConfig { out: file, ..config }).expect_err("a file is no folder");
    assert!(matches!(error, SynthError::Io { .. }), "{error}");
}

#[test]
fn every_difficulty_generates() {
    for difficulty in [Difficulty::Easy, Difficulty::Standard, Difficulty::Hard] {
        let folder = tempfile::tempdir().expect("folder");
        let config = SynthConfig { train: 20, val: 20, difficulty, ..small(folder.path()) };
        let summary = generate(&config).expect("it generates");
        assert_eq!(members(&summary.val_shards[0]).len(), 40, "{difficulty:?}");
    }
}

#[test]
fn the_sample_in_the_repository_is_what_the_defaults_make() {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../data/sample");
    let folder = tempfile::tempdir().expect("folder");
    let config = SynthConfig { out: folder.path().to_owned(), ..SynthConfig::default() };
    let summary = generate(&config).expect("it generates");
    assert_eq!((summary.train_shards.len(), summary.val_shards.len()), (5, 1));
    for path in summary.train_shards.iter().chain(&summary.val_shards).chain([&summary.vocab]) {
        let name = path.file_name().expect("a file");
        let expected = fs::read(committed.join(name)).expect("the sample is there");
        let made = fs::read(path).expect("it was written");
        assert!(made == expected, "{name:?} differs from data/sample: make the sample anew");
    }
    assert!(summary.bytes < 15 << 20, "{} bytes are too many for a clone", summary.bytes);
}
