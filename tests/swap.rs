//! Parts are swapped by one setting, and a setting that the new part lacks is told.

use clip_host_tests::host::{RECIPE, newest_checkpoint, run, small_run};

#[test]
fn another_optimizer_by_one_setting() {
    let folder = small_run("swap");
    let train = |out: &str, more: &[&str]| {
        run(&folder, &[&["run", "small.ron", "--steps", "4", "--out", out, "--json"], more].concat())
    };
    let radam = train("radam", &[]).json();
    // The recipe's only setting, `betas`, is one that both know.
    let adamw = train("adamw", &["--set", "optimizer.plugin=adamw"]).json();
    let amsgrad = ["--set", "optimizer.plugin=adamw", "--set", "optimizer.config.amsgrad=true"];
    let amsgrad = train("amsgrad", &amsgrad).json();
    for summary in [&radam, &adamw, &amsgrad] {
        assert_eq!(summary["steps"], 4);
        assert!(summary["metrics"]["train/loss"].is_f64());
    }
    let names = |run: &str| {
        let tensors = clip_host_tests::golden::read_tensors(&newest_checkpoint(&folder.join(run)));
        tensors.into_keys().filter(|name| name.contains("max_exp_avg_sq")).count()
    };
    assert_eq!((names("radam"), names("adamw")), (0, 0));
    assert!(names("amsgrad") > 20, "AMSGrad keeps a maximum for each parameter");
    let plugins = std::fs::read_to_string(folder.join("adamw/plugins.json")).expect("a run records its plugins");
    assert!(plugins.contains(r#""adamw""#) && !plugins.contains("radam\""), "{plugins}");
    // The weights differ: it was not the old one under a new name.
    let weights = |run: &str| clip_host_tests::golden::read_tensors(&newest_checkpoint(&folder.join(run)));
    let (radam, adamw) = (weights("radam"), weights("adamw"));
    assert_ne!(radam["image_encoder.conv1.weight"], adamw["image_encoder.conv1.weight"]);
}

#[test]
fn a_setting_that_the_new_optimizer_lacks_is_told() {
    let folder = small_run("swap-refused");
    let recipe = RECIPE.replace("(betas: (0.9, 0.999))", r#"(betas: (0.9, 0.999), variant: "original")"#);
    assert_ne!(recipe, RECIPE);
    folder.write("radam.ron", recipe);
    for command in ["run", "check"] {
        run(&folder, &[command, "radam.ron", "--set", "optimizer.plugin=adamw"]).refused(&[
            "optimizer plugin `adamw`",
            "unknown setting `variant`",
            "optimizer.config.variant",
            "valid keys: amsgrad, betas, eps",
            "radam.ron:",
        ]);
    }
    assert!(!folder.join("runs").exists(), "a refused run leaves no folder");
    run(&folder, &["run", "radam.ron", "--steps", "1", "--out", "as-written"]).done();
}

/// Every optimizer and its variants train, also where activations are bf16: with the same bits for any number of threads,
/// and when the run is interrupted after a step and goes on, for which all it remembers must be in the checkpoint.
#[test]
fn every_optimizer_trains_and_resumes() {
    let folder = small_run("swap-optimizers");
    for (id, config, states) in [
        ("sgd", "()", &[][..]),
        ("sgd", "(momentum: 0.9, dampening: 0.1)", &["momentum_buffer"]),
        ("adam", "(amsgrad: true)", &["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        ("nadam", "()", &["exp_avg", "exp_avg_sq"]),
        ("adafactor", "(beta1: Some(0.9))", &["exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"]),
        ("adafactor", "(relative_step: true)", &["exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"]),
        ("novograd", "(amsgrad: true)", &["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        ("novograd", "(variant: \"original\")", &["m", "v", "grad_ema"]),
    ] {
        let set = format!("optimizer=(plugin: \"{id}\", config: {config}, lr: 1e-3, weight_decay: 0.02)");
        let train = |out: &str, more: &[&str]| {
            run(&folder, &[&["run", "small.ron", "--resume", out, "--json", "--set", &set, "--steps"], more].concat())
        };
        let one = train("one", &["3", "--set", "train.threads=1"]).json();
        assert!(one["metrics"]["train/loss"].as_f64().is_some_and(f64::is_finite), "{id} {config}: {one}");
        train("three", &["3", "--set", "train.threads=3"]).done();
        train("resumed", &["1"]).done();
        train("resumed", &["3"]).done();
        let bf16 = train("bf16", &["3", "--set", "precision=Bf16"]).json();
        assert!(bf16["metrics"]["train/loss"].as_f64().is_some_and(f64::is_finite), "{id} {config}: {bf16}");

        let tensors = |run: &str| clip_host_tests::golden::read_tensors(&newest_checkpoint(&folder.join(run)));
        let (one, three, resumed) = (tensors("one"), tensors("three"), tensors("resumed"));
        assert!(one == three, "{id} {config}: the number of threads matters");
        assert!(one == resumed, "{id} {config}: a resumed run is another");
        let kept: std::collections::BTreeSet<&str> =
            one.keys().filter_map(|name| name.strip_prefix("optimizer.")?.split('.').next()).collect();
        assert_eq!(kept, states.iter().copied().collect(), "{id} {config}");
        for out in ["one", "three", "resumed", "bf16"] {
            std::fs::remove_dir_all(folder.join(out)).expect("a run's folder can be removed");
        }
    }
}

/// A schedule that waits for evaluations remembers them across an interruption.
#[test]
fn plateau_falls_after_evaluations_and_resumes() {
    let folder = small_run("swap-plateau");
    let set = "scheduler=(plugin: \"plateau\", config: (patience: 0, factor: 0.5, threshold: 1000.0))";
    let train = |out: &str, steps: &str| {
        let sets = ["--set", set, "--set", "train.epochs=4", "--set", "train.log_every=8"];
        run(&folder, &[&["run", "small.ron", "--resume", out, "--steps", steps], &sets[..]].concat()).done();
    };
    train("whole", "32");
    train("resumed", "16");
    train("resumed", "32");
    let rates = |run: &str| -> Vec<f64> {
        let lines = clip_host_tests::host::metrics(&folder.join(run));
        lines.iter().filter_map(|line| line.get("train/lr")?.as_f64()).collect()
    };
    // The first evaluation is the best so far; no later one is a thousand times as good.
    assert_eq!(rates("whole"), [2e-3, 2e-3, 1e-3, 5e-4]);
    assert_eq!(rates("resumed"), rates("whole"));
}

/// The same for every kind of plugin.
#[test]
fn other_parts_are_swapped_too() {
    let folder = small_run("swap-others");
    let train = |out: &str, sets: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> = ["run", "small.ron", "--steps", "2", "--out", out].into_iter().chain(sets).collect();
        run(&folder, &args)
    };
    train("clip", &["loss=(plugin: \"clip\", config: (mode: \"learnable\"))"]).done();
    train("temperature", &["loss=(plugin: \"dynamic_temperature\")"]).done();
    for id in ["constant", "step", "tanh", "plateau", "linear_warmup_cosine"] {
        train(id, &[&format!("scheduler=(plugin: \"{id}\")")]).done();
    }
    train("bottleneck", &["model.image_encoder.config.block=bottleneck"]).done();
    train("refused", &["loss.plugin=clip"]).refused(&["loss plugin `clip`", "rho_image", "valid keys:", "temperature"]);
    train("refused", &["loss.plugin=radam"]).refused(&["there is no loss plugin `radam`", "plugin of kind optimizer"]);
}
