//! `plugins new` as an author meets it: each kind's crate builds alone, passes its own tests, and is trained with.

use clip_host_tests::fixtures::{root, target};
use clip_host_tests::host::{Folder, metrics, run, small_run};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds a new crate and runs its tests, both as its README says; returns its library.
///
/// The crate's own profile is that of the fixtures, so that what they were built from serves again, and only the crate
/// itself is compiled.
fn build(crate_folder: &Path, id: &str) -> PathBuf {
    let target = target().join("fixtures");
    for command in ["test", "build"] {
        let cargo = |offline: &[&str]| {
            let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
            cargo.current_dir(crate_folder).args([command, "--release", "--quiet"]).args(offline);
            cargo.arg("--target-dir").arg(&target).output().expect("cargo can be started")
        };
        // Offline, as it goes on a machine that has built the host.
        let mut ended = cargo(&["--offline"]);
        if !ended.status.success() && String::from_utf8_lossy(&ended.stderr).contains("--offline") {
            ended = cargo(&[]);
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(ended.status.success(), "{command} {id}: {}{}", text(&ended.stdout), text(&ended.stderr));
        assert!(!text(&ended.stderr).contains("warning"), "{command} {id}: {}", text(&ended.stderr));
        if command == "test" {
            assert!(text(&ended.stdout).contains("test result: ok"), "{id}: {}", text(&ended.stdout));
        }
    }
    let name = format!("{}{id}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let library = crate_folder.join(&name);
    std::fs::copy(target.join("release").join(&name), &library).expect("the library was built");
    std::fs::remove_file(target.join("release").join(&name)).expect("nothing of it stays beside the fixtures");
    library
}

/// The setting that the README names: `--set '…'`.
fn set(readme: &str) -> &str {
    let (_, rest) = readme.split_once("--set '").expect("the README says how to train with it");
    rest.split_once('\'').expect("a quote has an end").0
}

#[test]
fn every_kind_builds_passes_its_tests_and_trains() {
    let folder = small_run("plugins-new");
    for (kind, id) in [
        ("loss", "author_loss"),
        ("optimizer", "author_optimizer"),
        ("encoder", "author_encoder"),
        ("scheduler", "author_scheduler"),
    ] {
        let api = root();
        let made = run(&folder, &["plugins", "new", kind, id, "--api", &api.to_string_lossy()]).done();
        assert!(made.stdout.contains(&format!("cd {id}\n")), "{made:#?}");
        let read = |name: &str| std::fs::read_to_string(folder.join(id).join(name)).expect(name);
        // One dependency, and a page.
        let manifest = read("Cargo.toml");
        let (_, dependencies) = manifest.split_once("[dependencies]").expect("it has dependencies");
        let (dependencies, _) = dependencies.split_once("\n\n").expect("the section ends");
        assert_eq!(dependencies.lines().filter(|line| line.contains('=')).count(), 1, "{manifest}");
        let source = read("src/lib.rs");
        let before_tests = source.split("#[cfg(test)]").next().map_or(0, |text| text.lines().count());
        assert!(before_tests < 100, "{kind}: {before_tests} lines before the tests");

        let library = build(&folder.join(id), id);
        let readme = read("README.md");
        let path = format!("plugins.path=[{:?}]", folder.join(id));
        let args = ["run", "small.ron", "--steps", "3", "--out", kind, "--set", &path, "--set", set(&readme)];
        run(&folder, &[&args[..], &["--set", "train.log_every=1"]].concat()).done();
        let losses: Vec<f64> =
            metrics(&folder.join(kind)).iter().filter_map(|line| line.get("train/loss")?.as_f64()).collect();
        assert!(losses.len() == 3 && losses.iter().all(|loss| loss.is_finite()), "{kind}: {losses:?}");
        let plugins =
            std::fs::read_to_string(folder.join(kind).join("plugins.json")).expect("a run records its plugins");
        assert!(plugins.contains(id), "{plugins}");

        // Its settings are its own: documented, and in range.
        let shown = run(&folder, &["plugins", "inspect", id, "--path", &library.to_string_lossy()]).done();
        assert!(shown.stdout.contains(id) && shown.stdout.contains("at least"), "{shown:#?}");
        let checked = run(&folder, &["plugins", "check", &library.to_string_lossy()]).done();
        assert!(!checked.text().contains("FAILED"), "{checked:#?}");
    }
}

#[test]
fn what_cannot_be_made_is_refused_and_leaves_nothing() {
    let folder = Folder::new("plugins-new-refused");
    let new = |args: &[&str]| run(&folder, &[&["plugins", "new"], args].concat());
    new(&["loss", "My-Loss"]).refused(&["cannot make the loss `My-Loss`", "lower-case", "`my_loss` would do"]);
    new(&["loss", ""]).refused(&["lower-case", "`my_loss` would do"]);
    new(&["encoder", "match"]).refused(&["cannot make the encoder `match`", "word of Rust", "`my_match` would do"]);
    // An id that a first-party plugin of the kind has; those of other kinds are free.
    new(&["loss", "isogclr"]).refused(&["cannot make the loss `isogclr`", "has that name already", "isogclr"]);
    new(&["loss", "mine", "--api", "nowhere"]).refused(&["clip-host-plugin-api", "nowhere"]);
    assert_eq!(std::fs::read_dir(&*folder).expect("it is there").count(), 0, "a refusal writes nothing");
    folder.write("taken/notes.txt", "mine");
    new(&["loss", "taken"]).refused(&["expected a folder that does not exist", "taken", "--out"]);
    assert_eq!(std::fs::read_dir(folder.join("taken")).expect("it is there").count(), 1, "what was there stays alone");
    let made = new(&["scheduler", "taken", "--out", "deep/elsewhere", "--json"]).json();
    assert_eq!((&made["kind"], &made["id"]), (&"scheduler".into(), &"taken".into()));
    assert!(folder.join("deep/elsewhere/src/lib.rs").is_file());
    assert_eq!(new(&["losses", "mine"]).code, Some(2), "kinds are on the command line's own list");
}
