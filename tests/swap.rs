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
    train("constant", &["scheduler=(plugin: \"constant\")"]).done();
    train("bottleneck", &["model.image_encoder.config.block=bottleneck"]).done();
    train("refused", &["loss.plugin=clip"]).refused(&["loss plugin `clip`", "rho_image", "valid keys:", "temperature"]);
    train("refused", &["loss.plugin=radam"]).refused(&["there is no loss plugin `radam`", "plugin of kind optimizer"]);
}
