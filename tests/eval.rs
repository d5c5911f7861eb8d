//! What other tools read from the program: each command's `--json`, its keys and that they agree with each other.

use clip_host_tests::fixtures::{FirstParty, first_party_library, first_party_plugins, root};
use clip_host_tests::host::{metrics, program, run, small_run};
use serde_json::Value;

const METRICS: [&str; 10] = [
    "image_to_text_R@1",
    "image_to_text_R@5",
    "image_to_text_R@10",
    "image_to_text_mean_rank",
    "image_to_text_median_rank",
    "text_to_image_R@1",
    "text_to_image_R@5",
    "text_to_image_R@10",
    "text_to_image_mean_rank",
    "text_to_image_median_rank",
];

/// Fails unless all are there and are numbers.
#[track_caller]
fn numbers(value: &Value, keys: &[&str]) {
    for key in keys {
        assert!(value[key].as_f64().is_some_and(f64::is_finite), "`{key}` is no number in {value}");
    }
}

#[test]
fn run_and_eval_agree() {
    let folder = small_run("eval");
    let summary = run(&folder, &["run", "small.ron", "--out", "run", "--json"]).json();
    numbers(&summary, &["seconds", "steps", "samples_per_second"]);
    assert_eq!((&summary["run_dir"], &summary["steps"]), (&"run".into(), &16.into()));
    numbers(&summary["metrics"], &METRICS);
    assert!(folder.join("run/report.html").is_file());

    let eval = run(&folder, &["eval", "run", "--json"]).json();
    numbers(&eval["metrics"], &METRICS);
    for name in METRICS {
        assert_eq!(eval["metrics"][name], summary["metrics"][name], "{name}");
    }
    assert_eq!((&eval["images"], &eval["captions"], &eval["step"]), (&16.into(), &16.into(), &16.into()));
    // Ranks of 16 pairs: within their bounds, and in order.
    let metric = |name: &str| eval["metrics"][name].as_f64().expect("a number");
    for direction in ["image_to_text", "text_to_image"] {
        let [r1, r5, r10] = ["R@1", "R@5", "R@10"].map(|k| metric(&format!("{direction}_{k}")));
        assert!(0.0 <= r1 && r1 <= r5 && r5 <= r10 && r10 <= 1.0, "{r1} {r5} {r10}");
        assert!((1.0..=16.0).contains(&metric(&format!("{direction}_mean_rank"))));
    }
    // The log has the same numbers.
    let lines = metrics(&folder.join("run"));
    let last = lines.iter().rev().find(|line| line.contains_key("mean_recall")).expect("an evaluation");
    assert_eq!(last["image_to_text_R@10"], eval["metrics"]["image_to_text_R@10"]);
    for line in lines.iter().filter(|line| line.contains_key("train/loss")) {
        numbers(&Value::Object(line.clone()), &["train/lr", "train/samples_per_second", "train/data_time", "step"]);
    }

    // Other data, and the same by its place.
    let train = run(&folder, &["eval", "run", "--json", "--data", "data/train-{00000..00001}.tar"]).json();
    assert_eq!(train["images"], 64);
    let same = run(&folder, &["eval", "run", "--json", "--data", r#"Tar("data/val-00000.tar")"#]).json();
    assert_eq!(same["metrics"], eval["metrics"]);
    for which in ["best", "newest"] {
        numbers(&run(&folder, &["eval", "run", "--json", "--checkpoint", which]).json()["metrics"], &METRICS);
    }
    run(&folder, &["eval", "data", "--json"]).refused(&["data", "recipe.ron"]);
    run(&folder, &["eval", "run", "--data", "nowhere.tar"]).refused(&["nowhere.tar", "does not exist"]);
}

#[test]
fn bench_measures() {
    let folder = small_run("bench");
    // No data at all is needed.
    std::fs::remove_dir_all(folder.join("data")).expect("the data was made");
    let args =
        ["bench", "step", "small.ron", "--steps", "3", "--batch", "4", "--image-size", "48", "--synthetic", "--json"];
    let bench = run(&folder, &args).json();
    numbers(&bench, &["samples_per_second", "step_ms", "compile_ms", "peak_rss_bytes", "gflops"]);
    numbers(&bench["phases_ms"], &["data", "forward", "backward", "update"]);
    assert_eq!((&bench["batch"], &bench["image_size"]), (&4.into(), &48.into()));
    assert!(bench["phases_note"].as_str().is_some_and(|note| note.contains("fused")));
    let value = |key: &str| bench[key].as_f64().expect("a number");
    assert!((value("samples_per_second") * value("step_ms") / 4000.0 - 1.0).abs() < 1e-6);
    assert!(value("gflops") > 0.0 && value("peak_rss_bytes") > 1e6);

    run(&folder, &["bench", "step", "small.ron"]).refused(&["does not exist"]);
    run(&folder, &["bench", "data", "small.ron"]).refused(&["does not exist"]);
}

#[test]
fn bench_measures_data() {
    let folder = small_run("bench-data");
    let bench = run(&folder, &["bench", "data", "small.ron", "--seconds", "0.5", "--workers", "2", "--json"]).json();
    numbers(&bench, &["images_per_second"]);
    assert_eq!((&bench["workers"], &bench["skipped"]), (&2.into(), &serde_json::json!({})));
}

#[test]
fn plugins_are_listed_inspected_and_checked() {
    let folder = root();
    let list = run(&folder, &["plugins", "list", "--json"]).json();
    let list = list.as_array().expect("a list");
    for FirstParty { kind, id, .. } in &first_party_plugins() {
        let plugin = list.iter().find(|plugin| plugin["id"] == id.as_str() && plugin["kind"] == kind.as_str());
        let plugin = plugin.unwrap_or_else(|| panic!("there is no {kind} `{id}` in {list:?}"));
        assert!(plugin["version"].is_string() && plugin["abi"].is_u64(), "{plugin}");
        assert!(plugin["file"].as_str().is_some_and(|file| std::path::Path::new(file).is_file()), "{plugin}");
        let inspected = run(&folder, &["plugins", "inspect", id, "--json"]).json();
        assert_eq!((&inspected["id"], &inspected["kind"]), (&id.as_str().into(), &kind.as_str().into()));
        assert!(inspected["schema"].is_object() && inspected["defaults"].is_object(), "{inspected}");
        let text = run(&folder, &["plugins", "inspect", id]).done().stdout;
        for setting in inspected["defaults"].as_object().expect("an object").keys() {
            assert!(text.contains(setting.as_str()), "`{setting}` is missing in {text}");
        }
    }
    let inspect = |args: &[&str]| run(&folder, &[&["plugins", "inspect"], args].concat());
    let text = inspect(&["isogclr"]).done().stdout;
    for words in
        ["image_features", "s_I", "[100]", "gives loss", "logs image_tau, ", "network.prototypes", "--fragment"]
    {
        assert!(text.contains(words), "`{words}` is missing in {text}");
    }
    assert!(!text.contains("output loss = %"), "{text}");
    let text = inspect(&["isogclr", "--fragment"]).done().stdout;
    for words in ["%0 = input \"image_features\"() [4, 8]", "output loss = %", "update %", "metric image_tau = %"] {
        assert!(text.contains(words), "`{words}` is missing in {text}");
    }
    let network = ["isogclr", "--config", "(network: Some((prototypes: 16)))"];
    let text = inspect(&network).done().stdout;
    assert!(text.contains("image_temp_gen.prototypes") && !text.contains("tau_I"), "{text}");
    let network = inspect(&[&network[..], &["--json"]].concat()).json();
    let leaves = network["builds"]["leaves"].as_array().expect("a list");
    let prototypes = leaves.iter().find(|leaf| leaf["name"] == "image_temp_gen.prototypes").expect("a parameter");
    assert_eq!((&prototypes["role"], &prototypes["shape"]), (&"param".into(), &serde_json::json!([16, 8])));
    let text = inspect(&["resnet"]).done().stdout;
    assert!(text.contains("conv1.weight") && text.contains("gives features"), "{text}");
    inspect(&["isogclr", "--config", "(gama: 0.5)"]).refused(&["gama", "gamma"]);
    run(&folder, &["plugins", "inspect", "isoglcr"]).refused(&["isoglcr", "did you mean `isogclr`"]);

    let beside = program().parent().expect("the program lies in a folder");
    let library = first_party_library(beside, "clip-loss-isogclr");
    let checked = run(&folder, &["plugins", "check", &library.to_string_lossy(), "--json"]).json();
    assert_eq!(checked["ok"], true, "{checked}");
    assert!(checked["checks"].as_array().is_some_and(|checks| checks.len() > 4), "{checked}");
}

#[test]
fn the_shipped_recipes_pass_their_check() {
    let folder = root();
    let sample = run(&folder, &["check", "recipes/isogclr_radam.ron", "--json"]).json();
    assert_eq!((&sample["ok"], &sample["errors"]), (&true.into(), &serde_json::json!([])), "{sample}");
    assert_eq!(sample["warnings"], serde_json::json!([]));
    assert!(sample["facts"].to_string().contains("5000 images"), "{sample}");

    // CC3M's shards may be here or not; if not, every message says where to get them.
    let cc3m = run(&folder, &["check", "recipes/cc3m/isogclr_radam.ron", "--json"]).json();
    assert_eq!(cc3m["ok"], true, "{cc3m}");
    if !folder.join("data/cc3m").exists() {
        let warnings = cc3m["warnings"].as_array().expect("a list");
        assert_eq!(warnings.len(), 3, "vocabulary, training and held-out shards: {warnings:?}");
        assert!(warnings.iter().all(|warning| warning.as_str().is_some_and(|text| text.contains("pixparse/cc3m-wds"))));
        let out = folder.join("runs").join("no-data");
        let refused = run(&folder, &["run", "recipes/cc3m/isogclr_radam.ron", "--out", &out.to_string_lossy()]);
        refused.refused(&["does not exist", "pixparse/cc3m-wds"]);
        assert!(!out.exists(), "a run that cannot start leaves no folder");
    }
}

/// Everything that is wrong, at once.
#[test]
fn check_finds_all_mistakes_at_once() {
    let folder = small_run("check");
    let sets = [
        "loss.config.gama=0.5",
        "optimizer.plugin=radm",
        "model.text_encoder.config.n_heads=3",
        "train.batch_size=65",
        "data.image_size=0",
    ];
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let args: Vec<&str> = ["check", "small.ron", "--json"].into_iter().chain(sets).collect();
    let ended = run(&folder, &args);
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    let found: Value = serde_json::from_str(&ended.stdout).expect("JSON even so");
    assert_eq!(found["ok"], false);
    let errors = found["errors"].to_string();
    for word in ["gama", "gamma", "radm", "radam", "image_size"] {
        assert!(errors.contains(word), "`{word}` is missing in {errors}");
    }
    let args = [
        "check",
        "small.ron",
        "--json",
        "--set",
        "model.text_encoder.config.vocab_size=10",
        "--set",
        "train.batch_size=65",
    ];
    let ended = run(&folder, &args);
    let found: Value = serde_json::from_str(&ended.stdout).expect("JSON even so");
    let errors = found["errors"].to_string();
    assert!(errors.contains("vocabulary") && errors.contains("64 training images"), "{errors}");
}

#[test]
fn shards_are_indexed() {
    let folder = small_run("index");
    let index = run(&folder, &["data", "index", "data/*.tar", "--json"]).json();
    assert_eq!(index["samples"], 80);
    assert_eq!(index["shards"].as_array().map(Vec::len), Some(3));
    folder.write("data/bad.tar", "no tar at all");
    run(&folder, &["data", "index", "data/*.tar"]).refused(&["bad.tar", "not a tar archive", "1 of 4 shards"]);
    run(&folder, &["data", "synth", "--out", "data", "--train", "64", "--val", "16"]).refused(&["data"]);
    run(&folder, &["data", "synth", "--out", "x", "--train", "64", "--val", "16", "--image-size", "8"])
        .refused(&["32"]);
}
