//! Bad input: each kind is a clear error or a counted skip, never a panic and never lost.

mod support;

use clip_host_data::stats::SkipCause;
use clip_host_data::{Data, DataError, Dataset, Order, Position, Source};
use support::{Folder, Tar, config, drain, golden_jpeg, open, png, shard, write_vocab};

fn open_tar(folder: &Folder, name: &str) -> Result<Dataset, DataError> {
    Dataset::open(&[Source::Tar(name.into())], &folder.0)
}

/// The error's text; every error carries a hint.
fn message(result: Result<Dataset, DataError>) -> String {
    let text = result.expect_err("an error").to_string();
    assert!(text.contains("\nhint: "), "{text}");
    text
}

#[test]
fn whole_shards() {
    let folder = Folder::new("damage");
    folder.write("good.tar", &shard(0, 3));
    let text = message(open_tar(&folder, "{good,gone}.tar"));
    assert!(text.contains("gone.tar` does not exist"), "{text}");
    let text = message(open_tar(&folder, "gone-{0..9}.tar"));
    assert!(text.contains("gone-0.tar") && text.contains("9 others of the 10"), "{text}");
    assert_eq!(open_tar(&folder, "g*d.tar").unwrap().num_images(), 3);
    assert!(message(open_tar(&folder, "x*.tar")).contains("no file in"));
    assert!(message(open_tar(&folder, "*/a.tar")).contains("wildcard"));
    assert!(message(open_tar(&folder, "good-{0..3.tar")).contains("never closed"));

    for (name, bytes, part) in [
        ("empty.tar", Vec::new(), "an empty file"),
        ("text.tar", b"<!DOCTYPE html><html>".repeat(100), "a web page"),
        ("gzip.tar", [0x1f, 0x8b].repeat(600), "gzip"),
        ("random.tar", (0..2000u32).map(|i| (i * i) as u8).collect(), "not a tar archive"),
        ("short.tar", vec![7; 100], "a file shorter"),
        ("none.tar", Tar::default().member("readme.md", b"hello").end(), "yields no sample"),
        ("nothing.tar", vec![0; 1024], "yields no sample"),
        ("images.tar", Tar::default().member("1.jpg", &png(1)).end(), "1 missing_caption"),
    ] {
        folder.write(name, &bytes);
        let text = message(open_tar(&folder, name));
        assert!(text.contains(part) && text.contains(name), "{name}: {text}");
    }
}

#[test]
fn a_truncated_shard_names_the_member_and_what_came_before() {
    let folder = Folder::new("truncated");
    let whole = shard(0, 10);
    for len in [513, 600, whole.len() / 2 + 13, whole.len() - 1024 - 510] {
        let path = folder.write("cut.tar", &whole[..len]);
        let error = open_tar(&folder, "cut.tar").unwrap_err();
        let DataError::Truncated { path: named, offset, expected, got, .. } = &error else { panic!("{len}: {error}") };
        assert_eq!(*named, path);
        assert!(got < expected && offset + got == len as u64, "{error}");
    }
    let text = message(open_tar(&folder, "cut.tar"));
    assert!(text.contains("9 complete samples") && text.contains("000000009.txt"), "{text}");
    // Cut between two members: nothing in the file is wrong, but it is told.
    folder.write("short.tar", &whole[..whole.len() - 1024]);
    let data = open_tar(&folder, "short.tar").unwrap();
    assert_eq!((data.num_images(), data.skipped().count(SkipCause::NoEndMark)), (10, 1));
}

#[test]
fn a_damaged_header_costs_one_member() {
    let folder = Folder::new("header");
    let mut bytes = shard(0, 10);
    let at = (512..bytes.len()).step_by(512).find(|&i| bytes[i..].starts_with(b"000000004.jpg")).unwrap();
    bytes[at + 3] ^= 0x55;
    folder.write("a.tar", &bytes);
    let data = open_tar(&folder, "a.tar").unwrap();
    assert_eq!(data.num_images(), 9);
    assert_eq!(data.skipped().count(SkipCause::CorruptHeader), 1);
    assert_eq!(data.skipped().count(SkipCause::MissingImage), 1);
    // The rest of the file is unreadable: an error, not a short data set.
    let at = (512..bytes.len()).step_by(512).find(|&i| bytes[i..].starts_with(b"000000007.txt")).unwrap();
    bytes[at..].fill(0x33);
    folder.write("b.tar", &bytes);
    let text = message(open_tar(&folder, "b.tar"));
    assert!(text.contains("corrupt") && text.contains(&format!("byte {at}")), "{text}");
}

#[test]
fn single_samples_are_counted_by_cause_and_named() {
    let folder = Folder::new("samples");
    let jpeg = golden_jpeg("photo_jpeg");
    let mut corrupt_png = png(3);
    let middle = corrupt_png.len() / 2;
    corrupt_png[middle..middle + 20].fill(0xee);
    let mut huge = Vec::new();
    png::Encoder::new(&mut huge, 65535, 65535).write_header().unwrap();
    let tar = (0..12)
        .fold(Tar::default(), |tar, i| tar.pair(&format!("ok{i}"), &png(i), "red"))
        .pair("half_jpeg", &jpeg[..jpeg.len() / 2], "red")
        .pair("half_png", &png(1)[..100], "red")
        .pair("bad_png", &corrupt_png, "red")
        .pair("huge_png", &huge, "red")
        .pair("gif", b"GIF89a......", "red")
        .pair("no_bytes", b"", "red")
        .pair("blank", &png(1), " \n\t ")
        .member("lonely.jpg", &png(1))
        .member("orphan.txt", b"red")
        .pair("ok3", &png(1), "twice")
        .end();
    folder.write("a.tar", &tar);
    let data = open(&folder, "Tar(\"a.tar\")");
    let indexed = data.train.skipped();
    assert_eq!(data.train.num_images(), 18);
    for (cause, count, name) in [
        (SkipCause::EmptyCaption, 1, "blank"),
        (SkipCause::MissingCaption, 1, "lonely"),
        (SkipCause::MissingImage, 1, "orphan"),
        (SkipCause::DuplicateMember, 2, "ok3.jpg"),
    ] {
        assert_eq!(indexed.count(cause), count, "{indexed}");
        assert!(indexed.0[&cause].names[0].contains(name), "{indexed}");
    }

    // Evaluation leaves the bad ones out and keeps the others' ids.
    let mut loader = data.eval_loader(Order::Images, 6).unwrap();
    let mut ids = Vec::new();
    while let Some(batch) = loader.next_batch().unwrap() {
        ids.extend_from_slice(&batch.sample_ids[..batch.len]);
    }
    assert_eq!(ids, (0..12).collect::<Vec<_>>());
    let skipped = loader.skipped();
    assert_eq!(skipped.count(SkipCause::TruncatedImage), 3, "{skipped}");
    assert!(skipped.0[&SkipCause::TruncatedImage].names.contains(&"a.tar/half_jpeg".to_string()), "{skipped}");
    assert_eq!(skipped.count(SkipCause::CorruptImage), 1, "{skipped}");
    assert_eq!(skipped.count(SkipCause::ImageTooLarge), 1, "{skipped}");
    assert_eq!(skipped.count(SkipCause::UnsupportedImage), 1, "{skipped}");
    assert_eq!(skipped.total(), 11);
    assert_eq!(skipped.counts()["truncated_image"], 3);
}

/// Unreadable samples are replaced by the same others for any number of workers and after resuming, and an epoch keeps
/// its length.
#[test]
fn replacements_do_not_depend_on_workers() {
    let folder = Folder::new("replace");
    let tar = (0..30).fold(Tar::default(), |tar, i| {
        let image = if i % 3 == 1 { b"no image".to_vec() } else { png(i) };
        tar.pair(&format!("{i}"), &image, "a red thing")
    });
    folder.write("a.tar", &tar.end());
    let mut data = open(&folder, "Tar(\"a.tar\")");
    let mut all = Vec::new();
    for workers in [1, 2, 3] {
        data.config.workers = workers;
        let batches = drain(data.train_loader(7, 9, Position::default(), Some(3)).unwrap());
        assert_eq!(batches.len(), 12);
        for batch in &batches {
            let mut ids = batch.sample_ids.clone();
            ids.sort_unstable();
            ids.dedup();
            assert_eq!(ids.len(), 7, "ids are distinct");
            assert!(ids.iter().all(|id| id % 3 != 1));
        }
        if workers == 1 {
            all = batches;
        } else {
            assert!(all == batches, "{workers} workers");
        }
    }
    let rest = drain(data.train_loader(7, 9, Position { epoch: 1, step: 2 }, Some(3)).unwrap());
    assert!(rest == all[6..]);
    // 20 readable images, one batch of 20: possible; of 21: not.
    assert!(data.train_loader(20, 0, Position::default(), Some(1)).unwrap().next_batch().is_ok());
    let error = data.train_loader(21, 0, Position::default(), Some(1)).unwrap().next_batch().unwrap_err();
    assert!(matches!(error, DataError::NothingReadable { filled: 20, batch: 21, .. }), "{error}");
}

#[test]
fn a_run_without_one_readable_image_fails_at_once() {
    let folder = Folder::new("unreadable");
    let tar = (0..50).fold(Tar::default(), |tar, i| tar.pair(&format!("{i}"), b"\xff\xd8 no more", "red"));
    folder.write("a.tar", &tar.end());
    let data = open(&folder, "Tar(\"a.tar\")");
    let mut loader = data.train_loader(4, 0, Position::default(), None).unwrap();
    let text = loader.next_batch().unwrap_err().to_string();
    assert!(text.contains("0 of 4") && text.contains("truncated_image") && text.contains("hint:"), "{text}");
    assert!(matches!(loader.next_batch(), Err(DataError::Stopped)), "the loader is finished after an error");
}

#[test]
fn the_index_is_stored_checked_and_rebuilt() {
    let folder = Folder::new("index");
    let path = folder.write("a.tar", &shard(0, 5));
    let index = folder.0.join("a.tar.index");
    assert_eq!(open_tar(&folder, "a.tar").unwrap().num_images(), 5);
    let stored = std::fs::read(&index).unwrap();

    // Another size: built again.
    std::fs::write(&path, shard(0, 8)).unwrap();
    assert_eq!(open_tar(&folder, "a.tar").unwrap().num_images(), 8);
    // The same size, another time.
    std::fs::write(&path, shard(1, 9)).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1)).unwrap();
    assert_eq!(open_tar(&folder, "a.tar").unwrap().image_name(0), "a.tar/000000001");
    // Damaged in any way: built again and stored whole.
    let good = std::fs::read(&index).unwrap();
    assert_ne!(good, stored);
    for bad in [Vec::new(), b"rubbish".to_vec(), good[..good.len() / 2].to_vec(), stored] {
        std::fs::write(&index, bad).unwrap();
        assert_eq!(open_tar(&folder, "a.tar").unwrap().num_images(), 8);
        assert_eq!(std::fs::read(&index).unwrap(), good);
    }
    // It is used: an index that claims to fit is believed, here one made for a shard with other contents.
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    let mut other = shard(1, 9);
    let jpg = other.windows(13).position(|w| w == b"000000003.jpg").unwrap();
    other[jpg] = b'X';
    std::fs::write(&path, &other).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(before).unwrap();
    assert_eq!(open_tar(&folder, "a.tar").unwrap().num_images(), 8, "the header was not read again");
    let leftovers = std::fs::read_dir(&folder.0)
        .unwrap()
        .filter(|f| f.as_ref().unwrap().file_name().to_string_lossy().contains(".tmp"));
    assert_eq!(leftovers.count(), 0);
}

/// Where no index can be stored (here because a folder has its name), it stays in memory.
#[test]
fn a_folder_without_room_for_an_index_is_no_error() {
    let folder = Folder::new("noindex");
    folder.write("a.tar", &shard(0, 5));
    folder.write("a.tar.index/occupied", b"");
    assert_eq!(open_tar(&folder, "a.tar").unwrap().num_images(), 5);
}

#[test]
fn other_tar_dialects() {
    let folder = Folder::new("dialects");
    let long = format!("{}/{}", "d".repeat(120), "k".repeat(80));
    let pax_path = format!("path={long}2.txt\n");
    let pax = format!("{} {pax_path}", pax_path.len() + 4);
    assert_eq!(pax.len(), pax_path.len() + 4);
    let tar = Tar::default()
        .entry("./", b'5', b"")
        .entry("././@LongLink", b'L', format!("{long}1.jpg\0").as_bytes())
        .member("short", &png(1))
        .entry("././@LongLink", b'L', format!("{long}1.txt\0").as_bytes())
        .member("short", b"one")
        .entry("pax", b'x', pax.as_bytes())
        .member("short", b"two")
        .entry("link", b'2', b"")
        .member("a/b.mask.png", b"another field of the sample a/b, not its image")
        .member("a/b.jpg", &png(2))
        .member("a/b.json", br#"{"caption": " three ", "url": "x"}"#)
        .member("b.jpeg", &png(2))
        .member("b.txt", b"  ")
        .member("b.json", br#"{"caption": "four"}"#)
        .entry("././@LongLink", b'L', format!("{long}2.jpg\0").as_bytes())
        .member("short", &png(3))
        .member("._b.jpg", b"hidden")
        .end();
    folder.write("a.tar", &tar);
    let data = open_tar(&folder, "a.tar").unwrap();
    let captions: Vec<_> = (0..data.num_texts()).map(|t| data.caption(t).unwrap().into_owned()).collect();
    assert_eq!(captions, ["one", "two", "three", "four"]);
    assert_eq!(data.skipped().total(), 0, "{}", data.skipped());
}

#[test]
fn lists_and_tables() {
    let folder = Folder::new("lists");
    for i in 0..4 {
        folder.write(&format!("img/{i}.png"), &png(i));
        folder.write(&format!("classes/red_cat/{i}.png"), &png(i));
        folder.write(&format!("classes/dog/{i}.PNG"), &png(i));
    }
    folder.write(
        "t.tsv",
        b"filepath\ttitle\n0.png\ta \"red\" thing\n1.png\t\"quoted\ttab\"\n2.png\t \n\tx\n9.png\tgone\n",
    );
    folder.write(
        "k.json",
        br#"{"images": [{"filepath": "img", "filename": "0.png", "split": "train", "sentences": [{"raw": "a"}, {"raw": "b"}]},
            {"filepath": "img", "filename": "1.png", "split": "test", "sentences": [{"raw": "c"}]}]}"#,
    );
    let open = |source: &str| Dataset::open(&[ron::from_str(source).unwrap()], &folder.0);

    let table = open("Csv(file: \"t.tsv\", images: \"img\")").unwrap();
    assert_eq!(table.num_images(), 3);
    assert_eq!(table.caption(0).unwrap(), "a \"red\" thing");
    assert_eq!(table.caption(1).unwrap(), "quoted\ttab");
    assert_eq!(
        (table.skipped().count(SkipCause::EmptyCaption), table.skipped().count(SkipCause::MissingImage)),
        (1, 1)
    );
    let bad = table.image_bytes(2, &mut Vec::new()).unwrap_err();
    assert_eq!(bad.cause, SkipCause::MissingImage);
    let text = message(open("Csv(file: \"t.tsv\", caption_column: \"caption\")"));
    assert!(text.contains("`caption`") && text.contains("`title`"), "{text}");

    let coco = open("Karpathy(file: \"k.json\", images: \".\", split: \"train+val\")").unwrap();
    assert_eq!((coco.num_images(), coco.num_texts()), (1, 2));
    let text = message(open("Karpathy(file: \"k.json\", images: \".\", split: \"dev\")"));
    assert!(text.contains("test, train"), "{text}");

    let classes = open("ImageFolder(root: \"classes\")").unwrap();
    assert_eq!(classes.num_images(), 8);
    assert_eq!(classes.caption(0).unwrap(), "a photo of a dog");
    assert_eq!(classes.caption(7).unwrap(), "a photo of a red cat");

    folder.write("bad.json", b"[{\"image\": \"a.png\",\n \"caption\": 3}]");
    let text = message(open("JsonList(file: \"bad.json\", images: \"img\")"));
    assert!(text.contains("line 2"), "{text}");
    folder.write("empty.json", b"[]");
    let text = message(open("JsonList(file: \"empty.json\", images: \"img\")"));
    assert!(text.contains("yields no sample"), "{text}");

    // Several sources: ids go on.
    let sources: Vec<Source> =
        ron::from_str("[ImageFolder(root: \"classes\"), Csv(file: \"t.tsv\", images: \"img\")]").unwrap();
    let both = Dataset::open(&sources, &folder.0).unwrap();
    assert_eq!((both.num_images(), both.image_of_text(8)), (11, Some(8)));
    assert!(both.image_name(8).ends_with("img/0.png"));
}

#[test]
fn vocabularies() {
    let folder = Folder::new("vocab");
    folder.write("a.tar", &shard(0, 3));
    let try_vocab = |text: Option<&str>| {
        let _ = std::fs::remove_file(folder.0.join("vocab.txt"));
        if let Some(text) = text {
            folder.write("vocab.txt", text.as_bytes());
        }
        Data::open(&config("Tar(\"a.tar\")"), &folder.0).map(|_| ()).unwrap_err().to_string()
    };
    assert!(try_vocab(None).contains("vocabulary") && try_vocab(None).contains("does not exist"));
    assert!(try_vocab(Some("[PAD]\n[UNK]\n[CLS]\na\n")).contains("`[SEP]`"));
    assert!(try_vocab(Some("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\na\n")).contains("lines 5 and 6"));
    write_vocab(&folder);
    assert!(Data::open(&config("Tar(\"a.tar\")"), &folder.0).is_ok());
}

/// Random bytes in place of a shard's, an index and an image: errors or skips, never a panic.
#[test]
fn random_damage_never_panics() {
    let folder = Folder::new("fuzz");
    let whole = Tar::default().pair("a", &golden_jpeg("photo_jpeg"), "red").pair("b", &png(3), "green").end();
    let mut rng = clip_host_data::rng::Rng::new(99);
    let (mut decoder, mut image) = (clip_host_data::decode::Decoder::default(), Default::default());
    for round in 0..300 {
        let mut bytes = whole.clone();
        for _ in 0..1 + rng.below(20) {
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] = rng.next_u64() as u8;
        }
        bytes.truncate(bytes.len() - if round % 3 == 0 { rng.below(bytes.len() as u64) as usize } else { 0 });
        folder.write("f.tar", &bytes);
        if let Ok(data) = open_tar(&folder, "f.tar") {
            for i in 0..data.num_images() {
                let mut buffer = Vec::new();
                if let Ok(file) = data.image_bytes(i, &mut buffer) {
                    let _ = decoder.decode(file, &mut image);
                }
                assert!(!data.caption(i).unwrap().is_empty());
                assert!(data.image_name(i).starts_with("f.tar/"));
            }
        }
    }
}
