//! Encoders that begin with weights of a file.

use clip_host_tests::golden::read_tensors;
use clip_host_tests::host::{newest_checkpoint, run, small_run};

/// What one run exports, another begins with.
#[test]
fn a_run_begins_with_another_runs_weights() {
    let folder = small_run("pretrained");
    run(&folder, &["run", "small.ron", "--steps", "4", "--out", "first"]).done();
    let weights = |tower: &str| format!("first/weights/{tower}.safetensors");
    let image = format!("model.image_encoder.weights=\"{}\"", weights("image_encoder"));
    let text = format!("model.text_encoder.weights=\"{}\"", weights("text_encoder"));
    // A rate that moves no weight that is not almost 0.
    let still = ["scheduler.plugin=constant", "scheduler.config=()", "optimizer.lr=1e-30", "optimizer.weight_decay=0"];
    let still = [vec!["--steps", "1"], still.iter().flat_map(|set| ["--set", set]).collect()].concat();
    let begin = ["--set", &image, "--set", &text];
    let second = run(&folder, &[&["run", "small.ron", "--out", "second"], &begin[..], &still[..]].concat()).done();
    let said = second.text();
    assert!(said.contains("image_encoder begins with") && said.contains("text_encoder begins with"), "{said}");

    let params = |run: &str, tower: &str| {
        let tensors = read_tensors(&newest_checkpoint(&folder.join(run)));
        let is_weight = |name: &str| name.starts_with(tower) && name.ends_with(".weight");
        tensors.into_iter().filter(|(name, _)| is_weight(name)).collect::<std::collections::BTreeMap<_, _>>()
    };
    for tower in ["image_encoder.", "text_encoder."] {
        let (first, second) = (params("first", tower), params("second", tower));
        assert!(first.len() > 5 && first == second, "{tower} begins where the other run ended");
    }
    // The heads belong to no encoder: they are drawn.
    assert_ne!(params("first", "image_proj"), params("second", "image_proj"));

    let checked = run(&folder, &[&["check", "small.ron"], &begin[..]].concat()).done().text();
    assert!(checked.contains("model.image_encoder: begins with"), "{checked}");
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    let folder = small_run("pretrained-refused");
    run(&folder, &["run", "small.ron", "--steps", "1", "--out", "first"]).done();
    let set = |key: &str, value: &str| format!("model.image_encoder.{key}=\"{value}\"");
    let text = set("weights", "first/weights/text_encoder.safetensors");
    let missing = set("weights", "nowhere.safetensors");
    let image = set("weights", "first/weights/image_encoder.safetensors");
    let sum = set("weights_sha256", &"0".repeat(64));
    for (settings, words) in [
        (vec![&text], &["text_encoder.safetensors", "expected a tensor", "nearest name"][..]),
        (vec![&missing], &["nowhere.safetensors"]),
        (vec![&image, &sum], &["expected the SHA-256 0000"]),
    ] {
        let sets: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting.as_str()]).collect();
        run(&folder, &[&["check", "small.ron"], &sets[..]].concat()).refused(words);
        run(&folder, &[&["run", "small.ron", "--steps", "1", "--out", "second"], &sets[..]].concat()).refused(words);
    }
    let unknown = ["--set", "model.image_encoder.weight=\"x\""];
    run(&folder, &[&["check", "small.ron"], &unknown[..]].concat()).refused(&["weight", "weights"]);
}
