//! A loss written outside the workspace: built alone, dropped into a folder, trained with by a program that was built
//! before it existed.

use clip_host_tests::fixtures::{root, target};
use clip_host_tests::host::{Folder, RECIPE, command, metrics, program, small_run};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

/// The whole crate's source. It uses what no first-party loss does, so that nothing of it can be built in.
const SOURCE: &str = r#"//! The sigmoid loss of SigLIP (Zhai et al. 2023, arXiv:2303.15343).

use clip_host_plugin_api::prelude::*;

/// Settings of [`Siglip`].
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SiglipConfig {
    /// Logarithm of the factor of the similarities at the start.
    pub log_scale: f64,
    /// Added to the scaled similarities at the start.
    pub bias: f64,
}

impl Default for SiglipConfig {
    fn default() -> Self {
        SiglipConfig { log_scale: 10f64.ln(), bias: -10.0 }
    }
}

pub struct Siglip;

impl Plugin for Siglip {
    type Config = SiglipConfig;
    const ID: &'static str = "siglip";
    const DOC: &'static str = "Every pair for itself: does this caption belong to this image?";
}

impl Loss for Siglip {
    fn build<'g>(config: &SiglipConfig, graph: &'g Graph, inputs: &LossInputs<'g>) -> Result<Tensor<'g>, BuildError> {
        let scale = graph.param("log_scale", &[], Init::Constant(config.log_scale));
        let bias = graph.param("bias", &[], Init::Constant(config.bias));
        let logits = inputs.image_features.matmul(inputs.text_features.t()) * scale.exp() + bias;
        let label = graph.eye(inputs.batch) * 2.0 - 1.0;
        let z = -(label * logits);
        // ln(1 + exp(z)), which does not overflow.
        let losses = z.relu() + ((-z.abs()).exp() + 1.0).ln();
        graph.metric("scale", scale.exp());
        Ok(losses.sum_all() / inputs.batch as f64 * WEIGHT)
    }
}

const WEIGHT: f64 = 1.0;

export_plugin!(loss, Siglip);
"#;

const LIBRARY: &str = "third_party_siglip";

/// The crate in a folder that has nothing to do with the workspace.
fn write_crate(folder: &Folder) {
    let api = root().join("plugin-api");
    let manifest = format!(
        r#"[package]
name = "{LIBRARY}"
version = "0.3.1"
edition = "2024"

[lib]
crate-type = ["cdylib"]

[dependencies]
clip-host-plugin-api = {{ path = {api:?} }}
serde = {{ version = "1", features = ["derive"] }}
schemars = "1"

# Quick to build is what counts here; the profile is that of the fixtures, whose dependencies are used again.
[profile.release]
panic = "unwind"
opt-level = 1

[workspace]
"#
    );
    folder.write("Cargo.toml", manifest);
    folder.write("src/lib.rs", SOURCE);
    // The versions that the program was built from: layouts of types are part of the boundary.
    std::fs::copy(root().join("Cargo.lock"), folder.join("Cargo.lock")).expect("Cargo.lock can be copied");
}

/// Builds the crate, alone, and puts its library into `plugins`.
fn build(crate_folder: &Path, plugins: &Path) {
    let target = target().join("fixtures");
    let cargo = |args: &[&str]| {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        cargo.current_dir(crate_folder).args(args).args(["--release", "--quiet", "--target-dir"]).arg(&target);
        cargo.output().expect("cargo can be started")
    };
    // Offline first: the program was built from the same versions, so they are here.
    if !cargo(&["build", "--offline"]).status.success() {
        let built = cargo(&["build"]);
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    }
    let name = format!("{}{LIBRARY}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    std::fs::create_dir_all(plugins).expect("folders can be made");
    // Renamed into place, as one ought to replace a library that may be open.
    let aside = plugins.join("new");
    std::fs::copy(target.join("release").join(&name), &aside).expect("the library was built");
    std::fs::rename(&aside, plugins.join(&name)).expect("the folder can be written");
    // Nothing of it stays beside the fixtures.
    assert!(cargo(&["clean", "--package", LIBRARY]).status.success());
}

/// What would change if the program were built again.
fn identity(file: &Path) -> (Vec<u8>, SystemTime) {
    let modified = std::fs::metadata(file).and_then(|meta| meta.modified()).expect("the program is there");
    (std::fs::read(file).expect("the program can be read"), modified)
}

/// Trains three steps; returns the loss of each.
fn train(folder: &Folder, out: &str, sets: &[&str], search: Option<&Path>) -> Vec<f64> {
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let args: Vec<&str> =
        ["run", "siglip.ron", "--steps", "3", "--out", out, "--json"].into_iter().chain(sets).collect();
    let mut command = command(folder, &args);
    if let Some(path) = search {
        command.env("CLIP_HOST_PLUGIN_PATH", path);
    }
    let ended: clip_host_tests::host::Ended = command.output().expect("the program can be started").into();
    assert_eq!(ended.json()["steps"], 3);
    let lines = metrics(&folder.join(out));
    let losses: Vec<f64> = lines.iter().filter_map(|line| line.get("train/loss")?.as_f64()).collect();
    assert_eq!(losses.len(), 3);
    assert!(lines[0].get("train/scale").is_some_and(|scale| scale.as_f64().is_some_and(|s| (s - 10.0).abs() < 1e-4)));
    losses
}

#[test]
fn a_loss_from_elsewhere_is_trained_with_and_edited_without_building_the_host() {
    assert!(SOURCE.lines().count() < 60, "{} lines", SOURCE.lines().count());
    let before = identity(program());
    let folder = small_run("third-party");
    let loss = RECIPE.lines().find(|line| line.trim_start().starts_with("loss:")).expect("a recipe has a loss");
    let recipe = RECIPE.replace(loss, r#"    loss: (plugin: "siglip"),"#).replace("log_every: 2", "log_every: 1");
    folder.write("siglip.ron", recipe);
    let ended = clip_host_tests::host::run(&folder, &["run", "siglip.ron", "--out", "none"]);
    ended.refused(&["siglip", "searched", "isogclr"]);

    let (author, plugins): (Folder, PathBuf) = (Folder::new("author"), folder.join("my plugins"));
    write_crate(&author);
    build(&author, &plugins);

    // Found by the environment, and by the recipe.
    let first = train(&folder, "by-environment", &[], Some(&plugins));
    let again = train(&folder, "by-recipe", &[r#"plugins.path=["my plugins"]"#], None);
    assert_eq!(first, again);
    // Eight pairs at a bias of −10: each image's own caption costs about 10 less what the similarity gives.
    assert!(first[0] > 0.0 && first[0] < 25.0, "{first:?}");

    // Its settings are checked by its own schema.
    let refused = |set: &str| {
        let args = ["run", "siglip.ron", "--out", "none", "--set", r#"plugins.path=["my plugins"]"#, "--set", set];
        clip_host_tests::host::run(&folder, &args)
    };
    refused("loss.config.log_scal=1.0").refused(&["siglip", "log_scal", "did you mean `log_scale`"]);

    // The author edits the formula and builds the plugin again; nothing else is built.
    std::thread::sleep(Duration::from_millis(20));
    author.write("src/lib.rs", SOURCE.replace("WEIGHT: f64 = 1.0", "WEIGHT: f64 = 2.0"));
    build(&author, &plugins);
    let edited = train(&folder, "edited", &[], Some(&plugins));
    assert_eq!(edited[0], 2.0 * first[0], "the same step under the edited formula");
    assert_ne!(edited[2], first[2]);
    assert!(identity(program()) == before, "the program was not built in between");

    // The run folder says which library it was.
    let records = |run: &str| {
        let text = std::fs::read_to_string(folder.join(run).join("plugins.json")).expect("a run records its plugins");
        let records: serde_json::Value = serde_json::from_str(&text).expect("plugins.json is JSON");
        let records = records.as_array().expect("a list").clone();
        records.into_iter().find(|record| record["role"] == "loss").expect("the loss is among them")
    };
    let (old, new) = (records("by-recipe"), records("edited"));
    assert_eq!((&old["id"], &old["version"]), (&"siglip".into(), &"0.3.1".into()));
    assert_ne!(old["sha256"], new["sha256"]);
}
