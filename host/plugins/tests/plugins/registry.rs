//! The search path, lookups, duplicates and pins.

use crate::fixtures;
use clip_host_plugin_api::describe::Kind;
use clip_host_plugins::{LoadError, Registry, RegistryError};
use std::path::{Path, PathBuf};

/// A folder with copies of fixtures, each under a name of choice.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for (fixture, name) in files {
        std::fs::copy(fixtures::library(fixture), folder.path().join(name)).expect("copied");
    }
    folder
}

/// Trailing bytes change a library's hash and nothing else.
fn alter(file: &Path) {
    let mut bytes = std::fs::read(file).expect("read");
    bytes.extend(b"another build");
    std::fs::write(file, bytes).expect("written");
}

fn error(result: Result<std::sync::Arc<clip_host_plugins::Plugin>, RegistryError>) -> RegistryError {
    result.expect_err("an error was expected")
}

#[track_caller]
fn says(error: &RegistryError, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
}

#[test]
fn a_folder_yields_its_plugins_and_skips_other_libraries() {
    let folder = folder(&[("good_loss", "liba.so"), ("nan_scalars", "libb.so"), ("not_a_plugin", "libc.so")]);
    std::fs::write(folder.path().join("libd.so"), "text").expect("written");
    std::fs::write(folder.path().join("README.md"), "text").expect("written");
    std::fs::create_dir(folder.path().join("deps")).expect("made");
    std::fs::copy(fixtures::library("nan_loss"), folder.path().join("deps/libe.so")).expect("copied");
    let registry = Registry::search(&[folder.path().into()], None, None);
    let ids: Vec<(Kind, &str)> = registry.list().iter().map(|plugin| (plugin.kind(), plugin.id())).collect();
    assert_eq!(ids, [(Kind::Loss, "good_loss"), (Kind::Optimizer, "nan_scalars")]);
    assert!(registry.failures().is_empty(), "{:?}", registry.failures());
    assert_eq!(registry.get(Kind::Loss, "good_loss").expect("there").file(), folder.path().join("liba.so"));
}

#[test]
fn all_three_sources_are_searched_in_order() {
    let (a, b, c) = (folder(&[("good_loss", "a.so")]), folder(&[("nan_loss", "b.so")]), folder(&[("panics", "c.so")]));
    let d = fixtures::library("wild_scheduler");
    let list = std::env::join_paths([b.path(), Path::new(""), &d]).expect("no separators in names");
    let registry = Registry::search(&[a.path().into()], Some(&list), Some(c.path()));
    assert_eq!(registry.searched(), [a.path(), b.path(), &d, c.path()]);
    assert_eq!(registry.list().len(), 4);
}

#[test]
fn an_unknown_id_is_told_with_the_nearest_and_the_folders() {
    let folder = folder(&[("good_loss", "a.so"), ("nan_loss", "b.so"), ("other_abi", "c.so")]);
    let registry = Registry::search(&[folder.path().into()], None, None);
    let unknown = error(registry.get(Kind::Loss, "good_los"));
    let searched = folder.path().display().to_string();
    says(&unknown, &["no loss plugin `good_los`", &searched, "did you mean `good_loss`?", "good_loss, nan_loss"]);
    // A plugin that cannot be used may be the one that was meant.
    says(&unknown, &["not usable: ", "c.so", "got 999"]);
    says(
        &error(registry.get(Kind::Optimizer, "good_loss")),
        &["no optimizer plugin", "`good_loss` is a plugin of kind loss"],
    );
    says(
        &error(registry.get(Kind::Encoder, "resnet")),
        &["no encoder plugin was found at all", "CLIP_HOST_PLUGIN_PATH"],
    );
}

#[test]
fn two_plugins_with_one_id_are_an_error_on_use_only() {
    let folder = folder(&[("good_loss", "one.so"), ("good_loss", "two.so"), ("nan_loss", "three.so")]);
    alter(&folder.path().join("two.so"));
    let registry = Registry::search(&[folder.path().into()], None, None);
    let ambiguous = error(registry.get(Kind::Loss, "good_loss"));
    assert!(matches!(ambiguous, RegistryError::Ambiguous { .. }), "{ambiguous}");
    says(&ambiguous, &["one.so", "two.so", "loss `good_loss`"]);
    assert!(registry.get(Kind::Loss, "nan_loss").is_ok());
    // Naming the file settles it.
    let two = folder.path().join("two.so");
    let chosen = registry.choose(Kind::Loss, "good_loss", Some(&two), None).expect("named");
    assert_eq!(chosen.file(), two);
}

#[test]
fn one_plugin_found_twice_is_one() {
    let (a, b) = (folder(&[("good_loss", "one.so")]), folder(&[("good_loss", "copy.so")]));
    let paths: [PathBuf; 3] = [a.path().into(), a.path().join("one.so"), b.path().into()];
    let registry = Registry::search(&paths, None, Some(a.path()));
    assert_eq!(registry.list().len(), 1);
    assert!(registry.get(Kind::Loss, "good_loss").is_ok());
}

#[test]
fn what_is_named_must_be_a_plugin() {
    let folder = folder(&[("good_loss", "a.so"), ("not_a_plugin", "b.so"), ("other_layout", "c.so")]);
    // In a folder they are passed over, named they are errors.
    let file = |name: &str| folder.path().join(name);
    let failure =
        error(Registry::search(&[folder.path().into(), file("b.so")], None, None).get(Kind::Loss, "good_loss"));
    says(&failure, &["b.so holds no plugin"]);
    let failure = error(Registry::search(&[file("c.so")], None, None).get(Kind::Loss, "good_loss"));
    assert!(matches!(&failure, RegistryError::Load(error) if matches!(**error, LoadError::Layout { .. })), "{failure}");
    assert!(failure.details().is_some());
    let failure = error(Registry::search(&[file("none.so")], None, None).get(Kind::Loss, "good_loss"));
    assert!(matches!(failure, RegistryError::Search { .. }));
    says(&failure, &["none.so", "\nhint: "]);
    // A folder that `CLIP_HOST_PLUGIN_PATH` names may be absent: it belongs to the machine, not to the recipe.
    let list = std::ffi::OsString::from(file("nowhere"));
    assert!(Registry::search(&[file("a.so")], Some(&list), None).get(Kind::Loss, "good_loss").is_ok());
}

#[test]
fn pins_and_paths_are_checked() {
    let folder = folder(&[("good_loss", "a.so")]);
    let registry = Registry::search(&[folder.path().into()], None, None);
    let plugin = registry.get(Kind::Loss, "good_loss").expect("there");
    let hash = plugin.sha256().to_uppercase();
    assert!(registry.choose(Kind::Loss, "good_loss", None, Some(&hash)).is_ok());
    let pin = error(registry.choose(Kind::Loss, "good_loss", None, Some(&"0".repeat(64))));
    assert!(matches!(pin, RegistryError::Pin { .. }));
    says(&pin, &["`good_loss`", "a.so", &"0".repeat(64), plugin.sha256()]);
    let other = fixtures::library("nan_loss");
    let error = error(registry.choose(Kind::Loss, "good_loss", Some(&other), None));
    assert!(matches!(error, RegistryError::Other { .. }));
    says(&error, &["expected the loss plugin `good_loss`", "got loss plugin `nan_loss`"]);
}

#[test]
fn a_scan_opens_nothing_and_skips_cargos_own_folder() {
    // The test program itself runs from `deps`, which the scan must not search.
    let start = std::time::Instant::now();
    let registry = Registry::scan(&[fixtures::folder().into()]);
    let scanned = start.elapsed();
    let own = std::env::current_exe().expect("known");
    assert!(!registry.searched().iter().any(|path| Some(path.as_path()) == own.parent()));
    assert!(registry.searched().contains(&fixtures::folder().to_path_buf()));
    let start = std::time::Instant::now();
    let count = registry.list().len();
    println!("scan {scanned:?}, {count} plugins loaded in {:?}", start.elapsed());
    assert!(count >= 6);
}
