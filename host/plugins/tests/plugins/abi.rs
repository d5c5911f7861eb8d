//! Versions of the boundary: newer libraries are refused by their version, and what an older library does not know it
//! refuses by name or passes over.

use crate::fixtures;
use abi_stable::library::lib_header_from_path;
use abi_stable::std_types::{RResult, RStr};
use clip_host_plugin_api::abi::PluginModuleRef;
use clip_host_plugin_api::describe::Descriptor;
use clip_host_plugins::{LoadError, Plugin};

#[test]
fn a_newer_library_is_refused_by_its_version_in_a_line_and_a_hint() {
    // Its table is another one, and every function in it ends the process.
    let error = Plugin::load(&fixtures::library("newer_abi")).expect_err("it is newer");
    assert!(matches!(error, LoadError::OtherAbi { expected: 1, got: 2, .. }), "{error}");
    let text = error.to_string();
    let [line, hint] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
    assert!(line.starts_with("cannot use the plugin ") && line.ends_with("expected ABI version 1, got 2"), "{line}");
    assert!(hint.starts_with("hint: rebuild the plugin") && hint.ends_with("or update the host"), "{hint}");
}

/// Asks the function table itself, as a host of a later release would.
fn ask(name: &str, request: &str) -> Result<String, String> {
    let library = lib_header_from_path(&fixtures::library(name)).expect("the fixture opens");
    let module = library.check_layout::<PluginModuleRef>().expect("the fixture's table is ours");
    match (module.answer())(RStr::from_str(request)) {
        RResult::ROk(answer) => Ok(answer.into_string()),
        RResult::RErr(error) => Err(error.into_string()),
    }
}

#[test]
fn a_request_that_a_plugin_does_not_know_is_refused_by_name() {
    let error = ask("good_loss", r#"{"gaze":{"config":{},"depth":3}}"#).expect_err("there is no such request");
    assert!(error.contains("not one that this plugin (ABI 1) knows") && error.contains("`gaze`"), "{error}");
}

#[test]
fn fields_that_a_plugin_does_not_know_are_passed_over() {
    let known = r#"{"loss":{"config":{},"batch":4,"embed_dim":8,"dataset_size":100}}"#;
    let newer = known.replace(r#""batch""#, r#""world_size":2,"hints":{"a":[1]},"batch""#);
    assert_ne!(newer, known);
    assert_eq!(ask("good_loss", &newer), ask("good_loss", known));
    assert!(ask("good_loss", known).is_ok());
    // The other way round: a description with more in it than the host knows.
    let descriptor = Plugin::load(&fixtures::library("good_loss")).expect("it loads").descriptor().clone();
    let mut json = serde_json::to_value(&descriptor).expect("it is JSON");
    json["mood"] = "good".into();
    assert_eq!(serde_json::from_value::<Descriptor>(json).expect("more is no harm"), descriptor);
}
