//! Bad data, bad recipes, bad disks: each is a clear error or a counted skip, and nothing that was good is lost.

use clip_host_tests::host::{Ended, Folder, RECIPE, command, metrics, newest_checkpoint, run, small_run};
use clip_host_tests::shards::{members, rewrite};
use serde_json::{Value, json};
use std::path::Path;

/// Runs the small recipe to its end, which may be an early one.
fn train(folder: &Path, more: &[&str]) -> Ended {
    run(folder, &[&["run", "small.ron", "--out", "out", "--json"], more].concat())
}

/// A small run whose second training shard `damage` was done to.
fn damaged(name: &str, damage: impl FnOnce(&Path)) -> Folder {
    let folder = small_run(name);
    damage(&folder.join("data/train-00001.tar"));
    folder
}

const SHARD: &str = "data/train-00001.tar";

#[test]
fn shards_that_cannot_be_read_are_told() {
    let refused = |name: &str, damage: &dyn Fn(&Path), words: &[&str]| {
        let folder = damaged(name, damage);
        let text = train(&folder, &[]).refused(words);
        assert!(text.contains(SHARD), "{name}: {text}");
        run(&folder, &["check", "small.ron"]).refused(words);
        assert!(!folder.join("out").exists(), "{name}: a run that cannot begin leaves no folder");
    };
    let write = |bytes: &'static [u8]| move |path: &Path| std::fs::write(path, bytes).expect("it can be written");
    refused("missing", &|path| std::fs::remove_file(path).expect("it was there"), &["does not exist"]);
    refused("empty", &write(b""), &["is not a tar archive", "found an empty file"]);
    refused("text", &write(&[b'x'; 4000]), &["is not a tar archive", "expected a tar header"]);
    refused("short", &write(b"PK"), &["is not a tar archive"]);
    refused(
        "truncated",
        &|path| {
            // Within the twentieth member.
            let bytes = std::fs::read(path).expect("it was there");
            let before: usize =
                members(&bytes)[..19].iter().map(|(_, content)| 512 + content.len().next_multiple_of(512)).sum();
            std::fs::write(path, &bytes[..before + 530]).expect("it can be written");
        },
        &["is truncated", "complete samples before it", "fetch this shard again"],
    );
    refused(
        "corrupt",
        &|path| {
            // From some header on there is nothing but noise.
            let mut bytes = std::fs::read(path).expect("it was there");
            let half = (bytes.len() / 2).next_multiple_of(512);
            bytes[half..].iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 7 + i / 251) as u8 | 1);
            std::fs::write(path, bytes).expect("it can be written");
        },
        &["complete samples before it", "fetch this shard again"],
    );
    refused(
        "no-pairs",
        &|path| rewrite(path, |members| *members = vec![("readme.md".into(), b"hello".to_vec())]),
        &["yields no sample", "KEY.jpg"],
    );
    refused(
        "no-captions",
        &|path| rewrite(path, |members| members.retain(|(name, _)| name.ends_with(".jpg"))),
        &["yields no sample", "KEY.txt"],
    );
    refused(
        "folder",
        &|path| {
            std::fs::remove_file(path).expect("it was there");
            std::fs::create_dir(path).expect("it can be made");
        },
        &["train-00001.tar"],
    );
}

/// Damage inside a shard costs what it hit: the rest is found again and used.
#[test]
fn a_corrupt_header_costs_its_samples_only() {
    let folder = damaged("header", |path| {
        let mut bytes = std::fs::read(path).expect("it was there");
        // The header of the third member: an image.
        let third: usize =
            members(&bytes)[..2].iter().map(|(_, content)| 512 + content.len().next_multiple_of(512)).sum();
        bytes[third..third + 512].fill(0xA5);
        std::fs::write(path, bytes).expect("it can be written");
    });
    let ended = train(&folder, &[]).done();
    assert!(ended.stderr.contains("corrupt_header") && ended.stderr.contains("train-00001.tar@"), "{}", ended.stderr);
    let summary = ended.json();
    assert_eq!(summary["skipped"]["corrupt_header"], 1, "{summary}");
    // 63 of 64 pairs are left.
    assert_eq!(summary["steps"], 2 * (63 / 8));
}

/// Samples that cannot be used are skipped, counted by cause and named; the epoch goes on.
#[test]
fn samples_that_cannot_be_used_are_counted() {
    type Edit = fn(&mut Vec<u8>);
    let cases: [(&str, &str, Edit, &str); 8] = [
        ("half-jpeg", "jpg", |content| content.truncate(content.len() / 2), "truncated_image"),
        ("no-bytes", "jpg", |content| content.clear(), "truncated_image"),
        ("not-jpeg", "jpg", |content| *content = b"a picture of a dog".to_vec(), "unsupported_image"),
        (
            "noise",
            "jpg",
            |content| content[20..].iter_mut().enumerate().for_each(|(i, b)| *b = (i * 131) as u8),
            "image",
        ),
        ("empty-caption", "txt", |content| content.clear(), "empty_caption"),
        ("blank-caption", "txt", |content| *content = b" \n\t ".to_vec(), "empty_caption"),
        ("no-caption", "txt", |content| *content = b"DROP".to_vec(), "missing_caption"),
        ("no-image", "jpg", |content| *content = b"DROP".to_vec(), "missing_image"),
    ];
    for (name, ending, edit, cause) in cases {
        let folder = damaged(name, |path| {
            rewrite(path, |members| {
                // Three samples of 32.
                for (_, content) in members.iter_mut().filter(|(name, _)| name.ends_with(ending)).skip(5).take(3) {
                    edit(content);
                }
                members.retain(|(_, content)| content != b"DROP");
            });
        });
        let ended = train(&folder, &[]).done();
        let told = ended.stderr.clone();
        assert!(!told.contains("panicked"), "{told}");
        assert!(told.contains(cause) && told.contains("skipped"), "{name}: {told}");
        let summary = ended.json();
        let counts = summary["skipped"].as_object().expect("counts by cause");
        let count: u64 = counts.iter().filter(|(key, _)| key.contains(cause)).filter_map(|(_, n)| n.as_u64()).sum();
        assert_eq!(count, 3, "{name}: {summary}");
        assert!(summary["steps"].as_u64().is_some_and(|steps| steps >= 14), "{name}: {summary}");
        // Bit by bit the same with other workers: what is skipped does not depend on them.
        let again = run(&folder, &["run", "small.ron", "--out", "again", "--json", "--set", "data.workers=3"]).json();
        assert_eq!(again["metrics"], summary["metrics"], "{name}");
        assert_eq!(again["skipped"], summary["skipped"], "{name}");
    }
}

#[test]
fn data_that_yields_nothing_fails_at_once() {
    let folder = damaged("nothing", |_| {});
    for shard in ["train-00000.tar", "train-00001.tar"] {
        rewrite(&folder.join("data").join(shard), |members| {
            members.iter_mut().filter(|(name, _)| name.ends_with("jpg")).for_each(|(_, content)| content.truncate(200));
        });
    }
    train(&folder, &[]).refused(&["cannot fill the batch", "0 of 8 samples", "64 truncated_image"]);
}

#[test]
fn a_batch_larger_than_the_data_is_told() {
    let folder = small_run("batch");
    for command in ["run", "check"] {
        let ended = run(&folder, &[command, "small.ron", "--set", "train.batch_size=65"]);
        ended.refused(&["64", "65", "lower the batch size"]);
    }
    assert!(!folder.join("runs").exists());
    for command in ["run", "check"] {
        run(&folder, &[command, "small.ron", "--set", "data.train=[]"]).refused(&["at least one source", "got none"]);
    }
    // All of it is a batch, too.
    assert_eq!(train(&folder, &["--set", "train.batch_size=64"]).json()["steps"], 2);
}

/// Every mistake in a recipe is told with its place and the nearest right word.
#[test]
fn mistakes_in_a_recipe_are_told_where_they_are() {
    let folder = small_run("typos");
    let cases: [(&str, &str, &[&str]); 22] = [
        ("epochs: 2", "epocs: 2", &["unknown key `epocs`", "did you mean `epochs`"]),
        ("image_size: 32", "image_sise: 32", &["unknown key `image_sise`", "did you mean `image_size`"]),
        ("loss: (plugin", "los: (plugin", &["unknown key `los`", "did you mean `loss`"]),
        ("gamma: 0.9", "gama: 0.9", &["`isogclr`", "unknown setting `gama`", "did you mean `gamma`"]),
        ("vocab_size: 400", "vocab: 400", &["`distilbert`", "unknown setting `vocab`", "vocab_size"]),
        ("seed: 7", "precision: F8", &["unknown name `F8`", "valid names: Bf16, F32"]),
        ("seed: 7", "backend: Gpu", &["unknown name `Gpu`", "Cuda"]),
        (
            r#"block: "basic""#,
            r#"block: "basc""#,
            &["`resnet`", "expected `basic` or `bottleneck`", "did you mean `basic`"],
        ),
        ("epochs: 2", "epochs: two", &["expected a whole number", "got the name `two`"]),
        ("epochs: 2", "epochs: 2.5", &["expected a whole number", "got"]),
        ("lr: 2e-3", r#"lr: "high""#, &["expected", "got"]),
        ("epochs: 2", "epochs: 0", &["expected a whole number of at least 1, got 0"]),
        ("batch_size: 8", "batch_size: 1", &["expected a whole number of at least 2, got 1"]),
        ("threads: 1", "threads: 100000", &["expected a whole number of at most 1024, got 100000"]),
        ("embed_dim: 16", "embed_dim: 100000000", &["expected a whole number of at most 65536"]),
        ("lr: 2e-3", "lr: -2e-3", &["expected", "got"]),
        ("gamma: 0.9", "gamma: 1.9", &["expected a value at least 0, at most 1, got 1.9", "plugins inspect isogclr"]),
        ("dim: 16,", r#"dim: "wide","#, &["`distilbert`", "expected", "got", "plugins inspect distilbert"]),
        ("layers: (1, 1, 1, 1)", "layers: (1, 1, 1)", &["`resnet`", "expected", "got"]),
        ("seed: 7", "seed: 7, seed: 8", &["seed"]),
        ("embed_dim: 16,", "", &["embed_dim"]),
        (r#"plugin: "radam""#, r#"plugin: """#, &["expected the id of a plugin"]),
    ];
    for (right, wrong, words) in cases {
        let at = RECIPE.find(right).unwrap_or_else(|| panic!("`{right}` is not in the recipe"));
        folder.write("typo.ron", RECIPE.replacen(right, wrong, 1));
        let text = run(&folder, &["run", "typo.ron"]).refused_without_hint(words);
        // A missing key is told where its section is.
        let line = RECIPE[..at].lines().count().max(1);
        let places = [format!("typo.ron:{line}:"), format!("typo.ron:{}:", line + 1)];
        assert!(
            wrong.is_empty() || places.iter().any(|place| text.contains(place)),
            "{wrong}: no {places:?} in: {text}"
        );
        assert!(!text.contains("hint:") || text.lines().any(|line| line.starts_with("hint: ")), "{text}");
        run(&folder, &["check", "typo.ron"]).refused_without_hint(words);
    }
    // Text that is no RON at all.
    for (name, text) in [("open", &RECIPE[..400]), ("empty", ""), ("json", "{\"seed\": 1}"), ("quote", "(seed: \"7)")] {
        let file = format!("{name}.ron");
        folder.write(&file, text);
        run(&folder, &["run", &file]).refused_without_hint(&[&file]);
    }
    run(&folder, &["run", "nowhere.ron"]).refused_without_hint(&["nowhere.ron"]);
    folder.write("binary.ron", [0xff, 0xfe, 0x00, 0x80]);
    run(&folder, &["run", "binary.ron"]).refused_without_hint(&["binary.ron"]);
    assert!(!folder.join("runs").exists(), "a refused run leaves no folder");
}

#[test]
fn an_unknown_plugin_is_told_with_the_nearest() {
    let folder = small_run("unknown");
    for (set, words) in [
        ("loss.plugin=isoglcr", ["there is no loss plugin `isoglcr`", "did you mean `isogclr`"]),
        ("optimizer.plugin=rdam", ["there is no optimizer plugin `rdam`", "did you mean `radam`"]),
        ("scheduler.plugin=cosin", ["there is no scheduler plugin `cosin`", "did you mean `cosine`"]),
        ("model.image_encoder.plugin=resnet50", ["there is no encoder plugin `resnet50`", "`resnet`"]),
        (
            "model.text_encoder.plugin=distillbert",
            ["there is no encoder plugin `distillbert`", "did you mean `distilbert`"],
        ),
    ] {
        train(&folder, &["--set", set]).refused(&words);
        run(&folder, &["check", "small.ron", "--set", set]).refused(&words);
    }
}

#[test]
fn sizes_that_do_not_match_are_told() {
    let folder = small_run("sizes");
    for (sets, words) in [
        (&["data.text.max_length=40"][..], ["max_position_embeddings", "got 40"]),
        (&["model.text_encoder.config.n_heads=3"], ["n_heads", "16 and 3"]),
        (&["model.embed_dim=0"], ["model.embed_dim", "got 0"]),
        (&["model.image_encoder=(plugin: \"distilbert\")"], ["image_encoder", "distilbert"]),
        (&["model.text_encoder=(plugin: \"resnet\")"], ["text_encoder", "resnet"]),
        (&["data.image_size=0"], ["image_size", "got 0"]),
    ] {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        for command in ["run", "check"] {
            let ended = run(&folder, &[&[command, "small.ron"], &sets[..]].concat());
            let text = ended.refused_without_hint(&[words[1]]);
            assert!(text.contains(words[0]) || text.contains("encoder"), "{sets:?}: {text}");
        }
    }
    // More words in the vocabulary than the encoder has embeddings for.
    let few = ["check", "small.ron", "--set", "model.text_encoder.config.vocab_size=100"];
    run(&folder, &few).refused(&["vocab_size", "expected at least", "got 100"]);
    let few = train(&folder, &["--set", "model.text_encoder.config.vocab_size=100"]);
    few.refused(&["100"]);
    let left = std::fs::read_dir(folder.join("runs")).map_or(0, |entries| entries.count());
    assert_eq!(left, 0, "a run that cannot begin leaves no folder");
}

#[test]
fn a_run_folder_is_never_overwritten() {
    let folder = small_run("exists");
    train(&folder, &["--steps", "2"]).done();
    let before = std::fs::read(newest_checkpoint(&folder.join("out"))).expect("a checkpoint");
    train(&folder, &[]).refused(&["expected a new or empty folder", "--resume out"]);
    folder.write("mine/notes.txt", "do not touch");
    run(&folder, &["run", "small.ron", "--out", "mine"]).refused(&["mine holds notes.txt"]);
    folder.write("file", "a file");
    run(&folder, &["run", "small.ron", "--out", "file"]).refused(&["file"]);
    run(&folder, &["run", "--resume", "mine"]).refused(&["expected a run in mine", "recipe.ron"]);
    run(&folder, &["run", "--resume", "nowhere"]).refused(&["nowhere"]);
    assert_eq!(std::fs::read_to_string(folder.join("mine/notes.txt")).ok().as_deref(), Some("do not touch"));
    assert!(std::fs::read(newest_checkpoint(&folder.join("out"))).ok() == Some(before));
    // Data that changed under a run is told, too: positions and tables would not fit.
    let other = ["run", "--resume", "out", "--set", r#"data.train=[Tar("data/train-00000.tar")]"#];
    run(&folder, &other).refused(&["the data has changed", "64 images", "32 images"]);
}

/// A checkpoint that was damaged later is found out and the one before it is taken.
#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let folder = small_run("damaged");
    train(&folder, &[]).done();
    let newest = newest_checkpoint(&folder.join("out"));
    let good = std::fs::read(&newest).expect("a checkpoint");
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    for damage in [bad, good[..good.len() - 9].to_vec(), vec![]] {
        std::fs::write(&newest, damage).expect("it can be written");
        let resumed = run(&folder, &["run", "--resume", "out"]).done();
        let text = resumed.text();
        assert!(text.contains("resumed at step 8") && text.contains("step-0000000016"), "{text}");
        assert!(std::fs::read(&newest).ok().as_ref() == Some(&good), "the same steps give the same checkpoint");
    }
}

#[test]
fn a_loss_that_is_not_finite_names_the_step() {
    let folder = small_run("diverges");
    let recipe = RECIPE.replace("lr: 2e-3", "lr: 1e30");
    folder.write("small.ron", recipe);
    train(&folder, &[]).refused(&["training stopped at epoch 0, step", "not finite", "lower `optimizer.lr`"]);
}

/// A disk that is full: `/dev/full` stands where the checkpoint's temporary file is to be.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_loses_nothing() {
    let folder = small_run("full");
    train(&folder, &[]).done();
    let args = ["run", "small.ron", "--out", "half", "--steps", "8", "--json"];
    assert_eq!(run(&folder, &args).json()["steps"], 8);
    let half = folder.join("half");
    let good = newest_checkpoint(&half);
    let before = std::fs::read(&good).expect("a checkpoint");
    let temporary = half.join("checkpoints/.step-0000000012.safetensors.tmp");
    std::os::unix::fs::symlink("/dev/full", &temporary).expect("links can be made");
    let args = ["run", "--resume", "half", "--checkpoint-every-steps", "4", "--set", "train.steps=None"];
    run(&folder, &args).refused(&[
        "step-0000000012",
        "No space left",
        "the disk is full",
        "--resume",
        "run folder: half",
    ]);
    assert_eq!(newest_checkpoint(&half), good, "nothing half-written passes for a checkpoint");
    assert!(std::fs::read(&good).ok() == Some(before), "the last good checkpoint is as it was");

    // With room again the run ends as if nothing had been.
    let _ = std::fs::remove_file(temporary);
    assert_eq!(run(&folder, &[&args[..], &["--json"]].concat()).json()["steps"], 16);
    let bits = |run: &Path| std::fs::read(newest_checkpoint(run)).ok();
    assert!(bits(&half) == bits(&folder.join("out")));
}

/// The same with a limit of the process, which hits every file that it writes.
#[cfg(unix)]
#[test]
fn a_file_that_may_not_grow_is_told() {
    let folder = small_run("limit");
    let program = command(&folder, &[]).get_program().to_string_lossy().into_owned();
    let limited = |blocks: u32, more: &str| -> Ended {
        // A signal that is ignored stays so in the program that the shell becomes.
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" run small.ron {more}");
        let mut shell = std::process::Command::new("sh");
        let output = shell.current_dir(&*folder).args(["-c", &script, &program]).output();
        output.expect("there is a shell").into()
    };
    // Too small for a checkpoint, large enough for all else.
    limited(40, "--out out").refused(&["checkpoints", "File too large", "ulimit -f", "--resume", "run folder: out"]);
    let left: Vec<_> = std::fs::read_dir(folder.join("out/checkpoints")).expect("a folder").collect();
    assert!(
        left.iter().all(|entry| entry.as_ref().is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with('.')))
    );
    assert!(!metrics(&folder.join("out")).is_empty(), "the log of the steps is there");
    let resumed = run(&folder, &["run", "--resume", "out", "--json"]).json();
    assert_eq!(resumed["steps"], 16);
    // Too small for anything.
    limited(0, "--out none").refused(&["none", "File too large"]);
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_written_is_told() {
    let folder = small_run("stdout");
    for args in [&["plugins", "list", "--json"][..], &["check", "small.ron"]] {
        let full = std::fs::File::options().write(true).open("/dev/full").expect("Linux has /dev/full");
        let ended: Ended = command(&folder, args).stdout(full).output().expect("it starts").into();
        ended.refused(&["cannot write to stdout", "No space left"]);
    }
    let answer: Value = run(&folder, &["check", "small.ron", "--json"]).json();
    assert_eq!(answer["errors"], json!([]));
}

#[test]
fn what_was_not_built_in_is_told() {
    let folder = small_run("not-built-in");
    run(&folder, &["bench", "luminal-cuda", "small.ron"])
        .refused(&["luminal's CUDA compiler", "--features luminal-cuda"]);
}
