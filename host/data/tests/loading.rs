//! Order, determinism and resuming of the loader, and evaluation passes.

mod support;

use clip_host_data::fill::{CacheBudget, SampleCache};
use clip_host_data::{Batch, Data, DataError, ImageTransform, Loader, LoaderConfig, Order, Position};
use support::{Folder, drain, open, shard};

fn two_shards() -> (Folder, Data) {
    let folder = Folder::new("loading");
    folder.write("s-0.tar", &shard(0, 20));
    folder.write("s-1.tar", &shard(20, 37));
    let data = open(&folder, "Tar(\"s-{0..1}.tar\")");
    (folder, data)
}

fn with_workers(data: &Data, workers: usize) -> Data {
    let mut data = data.clone();
    data.config.workers = workers;
    data
}

fn train(data: &Data, start: (u64, u64), epochs: u64) -> Loader {
    data.train_loader(8, 42, Position { epoch: start.0, step: start.1 }, Some(epochs)).unwrap()
}

#[test]
fn any_number_of_workers_gives_the_same_bits() {
    let (_folder, data) = two_shards();
    let want = drain(train(&with_workers(&data, 0), (0, 0), 3));
    assert_eq!(want.len(), 12);
    for workers in [1, 2, 3, 7] {
        assert!(want == drain(train(&with_workers(&data, workers), (0, 0), 3)), "{workers} workers");
    }
}

#[test]
fn resuming_anywhere_gives_the_same_bits() {
    let (_folder, data) = two_shards();
    let all = drain(train(&data, (0, 0), 3));
    for (i, batch) in all.iter().enumerate() {
        let rest = drain(train(&with_workers(&data, 1 + i % 3), (batch.epoch, batch.step), 3));
        assert!(rest == all[i..], "from epoch {}, step {}", batch.epoch, batch.step);
    }
    // The position after the last step of an epoch is the start of the next.
    assert!(drain(train(&data, (0, 4), 3)) == all[4..]);
    assert!(drain(train(&data, (3, 0), 3)).is_empty());
    let error = data.train_loader(8, 42, Position { epoch: 0, step: 5 }, Some(3)).err().unwrap();
    assert!(matches!(error, DataError::Position { step: 5, steps: 4, .. }));
}

#[test]
fn an_epoch_has_each_sample_at_most_once_and_differs_from_the_next() {
    let (_folder, data) = two_shards();
    let batches = drain(train(&data, (0, 0), 2));
    let ids = |epoch: u64| -> Vec<i32> {
        batches.iter().filter(|b| b.epoch == epoch).flat_map(|b| b.sample_ids.clone()).collect()
    };
    for epoch in 0..2 {
        let mut sorted = ids(epoch);
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), 32);
        assert!(sorted.iter().all(|&id| (0..37).contains(&id)));
    }
    assert_ne!(ids(0), ids(1));
    let other = drain(data.train_loader(8, 43, Position::default(), Some(1)).unwrap());
    assert_ne!(other[0].sample_ids, batches[0].sample_ids);
}

/// Augmentation depends on the epoch and the sample alone: the same image differs between epochs.
#[test]
fn augmentation_differs_between_epochs() {
    let (_folder, data) = two_shards();
    let batches = drain(train(&data, (0, 0), 2));
    let image = |epoch: u64, id: i32| {
        batches.iter().filter(|b| b.epoch == epoch).find_map(|b| {
            let row = b.sample_ids.iter().position(|&i| i == id)?;
            Some(b.images[row * 768..(row + 1) * 768].to_vec())
        })
    };
    let both = (0..37).filter_map(|id| Some((image(0, id)?, image(1, id)?)));
    let (same, all) = both.fold((0, 0), |(same, all), (a, b)| (same + usize::from(a == b), all + 1));
    assert!(all > 20 && same * 10 < all, "{same} of {all} images are the same in both epochs");
}

#[test]
fn the_cache_changes_nothing_but_time() {
    let (folder, data) = two_shards();
    let want = drain(train(&data, (0, 0), 3));
    for bytes in [1_000u64, 10_000, 1_000_000_000] {
        let mut config = data.config.clone();
        config.cache_bytes = bytes;
        let cached = Data::open(&config, &folder.0).unwrap();
        assert!(want == drain(train(&cached, (0, 0), 3)), "{bytes} bytes");
        assert!(want == drain(train(&cached, (0, 0), 3)), "{bytes} bytes, warm");
    }
}

#[test]
fn recycled_batches_are_not_allocated_again() {
    let (_folder, data) = two_shards();
    let mut loader = train(&data, (0, 0), 50);
    let (mut first, mut pointers) = (Vec::new(), std::collections::HashSet::new());
    while let Some(batch) = loader.next_batch().unwrap() {
        pointers.insert(batch.images.as_ptr());
        if first.len() < 12 {
            first.push(batch.clone());
        }
        loader.recycle(batch);
    }
    // Two workers, two ahead, and the one that the caller holds.
    assert!(loader.allocated_batches() <= 5, "{}", loader.allocated_batches());
    assert!(pointers.len() <= 5);
    assert!(loader.wait_seconds() > 0.0);
    assert!(first == drain(train(&data, (0, 0), 3)), "recycled memory must leave no trace");
}

#[test]
fn dropping_a_loader_ends_its_threads() {
    let (_folder, data) = two_shards();
    let workers_90_to_99 = || {
        std::fs::read_dir("/proc/self/task").map(|d| {
            d.filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("comm")).ok())
                .filter(|name| name.starts_with("data-9") && name.trim_end().len() == "data-90".len())
                .count()
        })
    };
    // A thread gives itself its name once it runs, and the kernel may list one for a moment after it was joined.
    let becomes = |expected: usize| {
        let start = std::time::Instant::now();
        loop {
            match workers_90_to_99() {
                Ok(n) if n != expected && start.elapsed().as_secs() < 30 => std::thread::yield_now(),
                Ok(n) => return assert_eq!(n, expected, "workers 90 to 99"),
                Err(_) => return, // a system without /proc
            }
        }
    };
    let mut many = with_workers(&data, 100);
    many.config.queue_batches = 1;
    let mut loader = many.train_loader(8, 1, Position::default(), None).unwrap();
    let first = loader.next_batch().unwrap().unwrap();
    assert_eq!(first.len, 8);
    becomes(10);
    drop(loader);
    becomes(0);
}

#[test]
fn a_batch_larger_than_the_data_is_an_error() {
    let (_folder, data) = two_shards();
    let error = data.train_loader(38, 0, Position::default(), None).err().unwrap();
    assert!(error.to_string().contains("38") && error.to_string().contains("37 images"), "{error}");
    assert!(data.train_loader(37, 0, Position::default(), Some(1)).is_ok());
    assert!(matches!(data.train_loader(0, 0, Position::default(), None).err(), Some(DataError::Setting { .. })));
}

#[test]
fn evaluation_visits_everything_in_order() {
    let (_folder, data) = two_shards();
    let batches = drain(data.eval_loader(Order::Images, 10).unwrap());
    assert_eq!(batches.iter().map(|b| b.len).collect::<Vec<_>>(), [10, 10, 10, 7]);
    let ids: Vec<i32> = batches.iter().flat_map(|b| b.sample_ids[..b.len].to_vec()).collect();
    assert_eq!(ids, (0..37).collect::<Vec<_>>());
    let last: &Batch = &batches[3];
    assert_eq!(last.images.len(), 10 * 3 * 16 * 16);
    assert!(last.images[7 * 768..].iter().all(|&v| v == 0.0));
    assert!(last.sample_ids[7..].iter().all(|&id| id == -1));
    assert!(last.attention_mask[7 * 12..].chunks(12).all(|m| m[0] == 1.0 && m[1] == 0.0));

    let texts = drain(data.eval_loader(Order::Texts, 10).unwrap());
    let text_ids: Vec<i32> = texts.iter().flat_map(|b| b.text_ids[..b.len].to_vec()).collect();
    assert_eq!(text_ids, (0..37).collect::<Vec<_>>());
    assert!(texts.iter().all(|b| b.images.is_empty()));
    // One caption an image: both passes give the same ids and tokens.
    for (a, b) in batches.iter().zip(&texts) {
        assert_eq!((&a.input_ids, &a.attention_mask), (&b.input_ids, &b.attention_mask));
    }
    // [CLS] a blue thing number 2 [SEP] and padding.
    let row = &batches[0].attention_mask[2 * 12..3 * 12];
    assert_eq!(row.iter().sum::<f32>(), 7.0);
    assert!(batches[0].input_ids[2 * 12 + 7..3 * 12].iter().all(|&id| id == 0));
}

#[test]
fn several_captions_an_image_take_turns() {
    let folder = Folder::new("captions");
    let mut rows = Vec::new();
    for i in 0..6 {
        folder.write(&format!("img/{i}.png"), &support::png(i));
        rows.push(format!(
            r#"{{"image": "{i}.png", "caption": ["red {i}", "green {i}", "blue {i}"], "image_id": {i}}}"#
        ));
    }
    // A later row of an earlier image.
    rows.push(r#"{"image": "2.png", "caption": "white 2", "image_id": 2}"#.into());
    folder.write("list.json", format!("[{}]", rows.join(",")).as_bytes());
    let data = open(&folder, "JsonList(file: \"list.json\", images: \"img\")");
    assert_eq!((data.train.num_images(), data.train.num_texts()), (6, 19));
    assert_eq!(data.train.text_to_image()[17..], [5, 2]);
    assert_eq!(data.train.num_texts_of(2), 4);
    assert_eq!(data.train.text_of_image(2, 3), Some(18));

    let mut seen = vec![0; 19];
    for batch in drain(data.train_loader(6, 5, Position::default(), Some(12)).unwrap()) {
        for (image, text) in batch.sample_ids.iter().zip(&batch.text_ids) {
            assert_eq!(data.train.image_of_text(*text as usize), Some(*image as usize));
            seen[*text as usize] += 1;
        }
    }
    // 12 epochs: four times each of three captions, three times each of four.
    let want: Vec<i32> = (0..19).map(|t| if data.train.image_of_text(t) == Some(2) { 3 } else { 4 }).collect();
    assert_eq!(seen, want);

    let texts = drain(data.eval_loader(Order::Texts, 8).unwrap());
    let images: Vec<i32> = texts.iter().flat_map(|b| b.sample_ids[..b.len].to_vec()).collect();
    assert_eq!(images, data.val.text_to_image().iter().map(|&i| i as i32).collect::<Vec<_>>());
}

#[test]
fn the_measuring_loop_counts_images() {
    let (_folder, data) = two_shards();
    let bench = clip_host_data::bench::images_per_second(&data, 8, 2, 0.05).unwrap();
    assert!(bench.images >= 8 && bench.images_per_second > 0.0 && bench.skipped.is_empty(), "{bench:?}");
}

/// A cache that was filled by a tokenizer of longer captions makes a worker index out of bounds: the caller gets an
/// error with the position, and nothing hangs.
#[test]
fn a_panic_in_a_worker_reaches_the_caller() {
    let (folder, data) = two_shards();
    let cache = SampleCache::new(&data.train, &CacheBudget::new(1 << 20)).unwrap();
    let config = |data: &Data, workers| LoaderConfig {
        dataset: data.train.clone(),
        tokenizer: data.tokenizer.clone(),
        transform: ImageTransform::new(&data.config),
        order: Order::Shuffled,
        batch_size: 8,
        seed: 42,
        start: Position::default(),
        epochs: Some(1),
        workers,
        queue_batches: 2,
        cache: Some(cache.clone()),
        pixels: false,
    };
    assert_eq!(drain(Loader::new(config(&data, 2)).unwrap()).len(), 4);
    let mut shorter = data.config.clone();
    shorter.text.max_length = 4;
    let shorter = Data::open(&shorter, &folder.0).unwrap();
    for workers in [0, 1, 3] {
        let mut loader = Loader::new(config(&shorter, workers)).unwrap();
        let error = loader.next_batch().unwrap_err();
        assert!(matches!(error, DataError::Worker { epoch: 0, step: 0, .. }), "{error}");
        assert!(matches!(loader.next_batch(), Err(DataError::Stopped)));
    }
}
