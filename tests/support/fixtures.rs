//! Builds the fixture plugins of `tests/fixtures/plugins` and tells where their libraries are.
//!
//! `cargo test` builds no cdylibs for others to open, so tests that load plugins build them first. One cargo call builds
//! all; it goes to a folder of its own under the target folder, so that it is quick from the second time on and no other
//! build's libraries lie beside. Uses nothing but the standard library: a crate's own tests include it with `#[path]`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The workspace's root, from the manifest folder of any of its crates.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root =
        manifest.ancestors().find(|folder| folder.join("plugin-api").is_dir() && folder.join("Cargo.lock").is_file());
    root.expect("the crate lies in the workspace").to_path_buf()
}

/// The target folder that the running test was built into.
pub fn target() -> PathBuf {
    let exe = std::env::current_exe().expect("a test knows its own file");
    let deps = exe.ancestors().find(|folder| folder.file_name().is_some_and(|name| name == "deps"));
    let target = deps.and_then(|deps| deps.parent()?.parent());
    target.expect("tests run from target/<profile>/deps").to_path_buf()
}

/// The folder with all fixtures' libraries, built if need be. Panics with cargo's own words if they do not build.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let workspace = root().join("tests/fixtures/plugins");
        pin_versions(&workspace);
        let target = target().join("fixtures");
        // Offline first: the versions are those that the running test itself was built from, so they are here.
        let (built, words) = build(&workspace, &target, true);
        if !built {
            let (built, words_online) = build(&workspace, &target, false);
            assert!(built, "the fixture plugins do not build.\noffline: {words}\nonline: {words_online}");
        }
        target.join("release")
    })
}

/// The library of one fixture, by its folder's name: `library("good_loss")`.
pub fn library(name: &str) -> PathBuf {
    let (prefix, suffix) = (std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let file = folder().join(format!("{prefix}{name}{suffix}"));
    assert!(file.is_file(), "there is no fixture `{name}`: {} is missing", file.display());
    file
}

/// The library of a plugin with a planted defect, by the name of its file in `tests/fixtures/plugins/defects`.
#[allow(dead_code)]
pub fn defect(name: &str) -> PathBuf {
    let (prefix, suffix) = (std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let file = folder().join("examples").join(format!("{prefix}{name}{suffix}"));
    assert!(file.is_file(), "there is no defect `{name}`: {} is missing", file.display());
    file
}

/// Copies the root's Cargo.lock beside the fixtures, so that they get the same versions of everything: type layouts are
/// part of the boundary. Cargo then drops from the copy what the fixtures do not need.
fn pin_versions(workspace: &Path) {
    let (from, to) = (root().join("Cargo.lock"), workspace.join("Cargo.lock"));
    let modified = |path: &Path| std::fs::metadata(path).and_then(|meta| meta.modified());
    if let (Ok(from), Ok(to)) = (modified(&from), modified(&to))
        && from <= to
    {
        return;
    }
    // Copied aside and renamed: another test program may be at the same.
    let aside = workspace.join(format!("Cargo.lock.{}", std::process::id()));
    let copied =
        std::fs::read(&from).and_then(|lock| std::fs::write(&aside, lock)).and_then(|()| std::fs::rename(&aside, &to));
    copied.expect("the fixtures' folder can be written");
}

fn build(workspace: &Path, target: &Path, offline: bool) -> (bool, String) {
    let mut cargo = cargo(workspace, target);
    // The examples are the plugins of `defects`.
    cargo.args(["--workspace", "--lib", "--examples"]);
    if offline {
        cargo.arg("--offline");
    }
    let output = cargo.output().expect("cargo can be started");
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A plugin of the folder `plugins`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FirstParty {
    /// The folder that it lies in: `loss`, `optimizer`, `encoder` or `scheduler`.
    pub kind: String,
    /// The name in recipes: that of its folder, with `_` for `-`.
    pub id: String,
    /// The package: `clip-loss-clip`.
    pub package: String,
}

/// All of them, by kind and name: a folder `plugins/KIND/NAME` holds the package `clip-KIND-NAME`.
pub fn first_party_plugins() -> Vec<FirstParty> {
    let folders = |path: PathBuf| {
        let entries = std::fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let entries = entries.map(|entry| entry.expect("folders can be listed"));
        let folders = entries.filter(|entry| entry.path().is_dir());
        folders.map(|entry| entry.file_name().into_string().expect("names are UTF-8")).collect::<Vec<_>>()
    };
    let plugins = root().join("plugins");
    let mut found = Vec::new();
    for kind in folders(plugins.clone()) {
        for name in folders(plugins.join(&kind)) {
            if !plugins.join(&kind).join(&name).join("Cargo.toml").is_file() {
                continue;
            }
            let (id, package) = (name.replace('-', "_"), format!("clip-{kind}-{name}"));
            found.push(FirstParty { kind: kind.clone(), id, package });
        }
    }
    found.sort();
    found
}

/// Builds first-party plugins by their packages' names, `first_party(&["clip-loss-clip"])`, and returns the folder with
/// their libraries. The folder may hold others, too, from earlier builds: pick by file with [`first_party_library`].
pub fn first_party(packages: &[&str]) -> PathBuf {
    // Beside the test's own build, whose products are used again; cargo brings up to date what is stale.
    let target = target();
    let mut cargo = cargo(&root(), &target);
    for package in packages {
        cargo.args(["--package", package]);
    }
    let output = cargo.output().expect("cargo can be started");
    assert!(output.status.success(), "{packages:?} do not build: {}", String::from_utf8_lossy(&output.stderr));
    target.join("release")
}

/// The library file of a package: `clip-loss-clip` is `libclip_loss_clip.so`.
pub fn first_party_library(folder: &Path, package: &str) -> PathBuf {
    let name = package.replace('-', "_");
    folder.join(format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX))
}

fn cargo(workspace: &Path, target: &Path) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.current_dir(workspace).args(["build", "--release", "--quiet"]).arg("--target-dir").arg(target);
    cargo
}
