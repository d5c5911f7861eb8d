//! Loading, and the answers of good and bad plugins.

use crate::fixtures;
use clip_host_plugin_api::describe::Kind;
use clip_host_plugin_api::export::Request;
use clip_host_plugin_api::interpret::interpret;
use clip_host_plugin_api::ir::{Fragment, Op};
use clip_host_plugin_api::loss::LossRequest;
use clip_host_plugin_api::optimizer::{OptimizerRequest, ParamInfo, ScalarsRequest};
use clip_host_plugin_api::scheduler::{Progress, ScheduleRequest};
use clip_host_plugins::{LoadError, Plugin, PluginError};
use serde_json::{Value, json};
use std::collections::HashMap;

fn load(name: &str) -> Plugin {
    Plugin::load(&fixtures::library(name)).unwrap_or_else(|error| panic!("{error}"))
}

fn refused(name: &str) -> LoadError {
    Plugin::load(&fixtures::library(name)).expect_err("the fixture is bad")
}

fn loss(config: Value) -> Request {
    Request::Loss(LossRequest { config, batch: 4, embed_dim: 8, dataset_size: 100 })
}

/// Whether a text has all parts; shows the text if not.
#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
}

#[test]
fn a_good_plugin_describes_itself_and_builds() {
    let plugin = load("good_loss");
    assert_eq!((plugin.kind(), plugin.id(), plugin.version()), (Kind::Loss, "good_loss", "0.1.0"));
    assert_eq!(plugin.sha256().len(), 64);
    assert!(plugin.descriptor().doc.contains("Radford"));
    let config = plugin.complete(&serde_json::Map::new()).expect("defaults are sound");
    let fragment = plugin.fragment(&loss(config)).unwrap_or_else(|error| panic!("{error}"));
    // All similarities are 1, so that each row's cross-entropy is ln 4.
    let loss = evaluate(&fragment, 0.0);
    assert!((loss - 4f64.ln()).abs() < 1e-12, "{loss}");
}

/// A loss over equal rows of unit length.
fn evaluate(fragment: &Fragment, step: f64) -> f64 {
    let mut values: HashMap<String, Vec<f64>> = HashMap::new();
    for node in &fragment.nodes {
        if let Op::Input { name } = &node.op {
            let value = if name.ends_with("features") { (1.0f64 / 8.0).sqrt() } else { 0.0 };
            values.insert(name.clone(), vec![value; node.elements()]);
        }
    }
    values.insert("step".into(), vec![step]);
    let results = interpret(fragment, &values, 0).expect("the fragment runs");
    results[fragment.output("loss").expect("a loss") as usize][0]
}

#[test]
fn the_nan_fixture_is_sound_until_its_step() {
    let fragment = load("nan_loss").fragment(&loss(json!({ "from_step": 5 }))).expect("builds");
    assert!((evaluate(&fragment, 4.0) - 4f64.ln()).abs() < 1e-12);
    assert!(evaluate(&fragment, 5.0).is_nan());
}

#[test]
fn two_plugins_in_one_process_stay_apart_and_one_may_be_loaded_twice() {
    let (good, nan, again) = (load("good_loss"), load("nan_loss"), load("good_loss"));
    assert_eq!((good.id(), nan.id(), again.id()), ("good_loss", "nan_loss", "good_loss"));
    assert_eq!(good.sha256(), again.sha256());
    assert_ne!(good.sha256(), nan.sha256());
    let config = |plugin: &Plugin| loss(plugin.descriptor().defaults.clone());
    assert!(good.fragment(&config(&good)).expect("builds") == again.fragment(&config(&again)).expect("builds"));
}

#[test]
fn plugins_may_be_called_from_many_threads() {
    let plugin = std::sync::Arc::new(load("good_loss"));
    let expected = plugin.fragment(&loss(json!({}))).expect("builds");
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let plugin = plugin.clone();
            std::thread::spawn(move || {
                (0..20).map(|_| plugin.fragment(&loss(json!({}))).expect("builds")).collect::<Vec<_>>()
            })
        })
        .collect();
    for thread in threads {
        assert!(thread.join().expect("no panic").iter().all(|fragment| *fragment == expected));
    }
}

#[test]
fn a_missing_file_is_told_with_its_name() {
    let error = Plugin::load(std::path::Path::new("no/such/libthing.so")).expect_err("there is none");
    assert!(matches!(error, LoadError::Unreadable { .. }));
    says(&error.to_string(), &["no/such/libthing.so", "expected a library file", "\nhint: "]);
}

#[test]
fn a_text_file_is_not_a_library() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("libtext.so");
    std::fs::write(&file, "not a library at all").expect("written");
    let error = Plugin::load(&file).expect_err("text");
    assert!(matches!(error, LoadError::NotALibrary { .. }), "{error}");
    // The system's own words name the file, too.
    says(&error.to_string(), &["libtext.so", "expected a dynamic library", "got: ", "\nhint: "]);
}

#[test]
fn a_library_without_plugin_is_told() {
    let error = refused("not_a_plugin");
    assert!(matches!(error, LoadError::NoPlugin { .. }), "{error}");
    says(&error.to_string(), &["not_a_plugin", "export_plugin!", "\nhint: "]);
}

#[test]
fn another_abi_version_is_told_before_any_function_is_called() {
    // Every function of the fixture ends the process.
    let error = refused("other_abi");
    assert!(matches!(error, LoadError::OtherAbi { expected: 1, got: 999, .. }), "{error}");
    says(&error.to_string(), &["other_abi", "expected ABI version 1, got 999", "\nhint: rebuild"]);
}

#[test]
fn another_layout_is_one_line_and_the_report_is_in_details() {
    let error = refused("other_layout");
    assert!(matches!(error, LoadError::Layout { .. }), "{error}");
    let text = error.to_string();
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(text.len() < 500, "{text}");
    let details = error.details().expect("a report");
    says(details, &["PluginModule", "abi_version"]);
    assert!(details.len() > text.len());
}

#[test]
fn a_panic_is_an_error_and_the_plugin_lives_on() {
    let plugin = load("panics");
    for _ in 0..3 {
        let error = plugin.fragment(&loss(json!({}))).expect_err("panics");
        assert!(matches!(error, PluginError::Refused { .. }));
        says(
            &error.to_string(),
            &["loss plugin `panics` 0.1.0", "libpanics", "the plugin panicked: out of cheese with batch 4"],
        );
    }
}

#[test]
fn a_refusal_carries_the_plugins_words() {
    let plugin = load("good_loss");
    let error = plugin.fragment(&loss(json!({ "temprature": 0.1 }))).expect_err("unknown field");
    says(&error.to_string(), &["loss plugin `good_loss`", "temprature"]);
}

#[test]
fn each_malformed_answer_has_its_own_error() {
    let plugin = load("malformed");
    let cases: [(&str, &[&str]); 11] = [
        ("not_json", &["expected a fragment of the IR", "in `the loss, with regards`"]),
        ("not_a_fragment", &["missing field `ir_version`"]),
        ("unknown_op", &["unknown variant `conjure`"]),
        ("wrong_shape", &["node %1 (sum) states [4] F32, its inputs give [1, 1] F32"]),
        ("forward_reference", &["reads %5, which does not come before it"]),
        ("huge", &["node %1 of shape [4294967296, 4294967296, 4]"]),
        ("foreign_input", &["expected the inputs image_features", "got `weather`"]),
        ("input_of_other_shape", &["expected the input `text_ids` to be [4] i32, got [4, 8] f32"]),
        ("no_output", &["expected the output `loss`, got outputs [lost]"]),
        ("output_of_other_shape", &["expected the output `loss` to be [] f32, got [1, 1] f32"]),
        ("nan_constant", &["invalid type: null, expected f64"]),
    ];
    for (fault, parts) in cases {
        let error = plugin.fragment(&loss(json!({ "fault": fault }))).expect_err(fault);
        assert!(matches!(error, PluginError::Malformed { .. }), "{fault}: {error}");
        let text = error.to_string();
        says(&text, parts);
        says(&text, &["loss plugin `malformed` 0.1.0", "libmalformed", "\nhint: "]);
        assert!(text.len() < 600, "{fault}: {text}");
    }
    for fault in ["newer_ir", "newer_ir_known_ops"] {
        let error = plugin.fragment(&loss(json!({ "fault": fault }))).expect_err(fault);
        assert!(matches!(error, PluginError::NewerIr { got: 7, .. }), "{fault}: {error}");
        says(&error.to_string(), &["IR version 7, this host reads up to 1"]);
    }
}

#[test]
fn a_question_for_another_kind_is_told_without_asking() {
    let request = ScalarsRequest { config: json!({}), step: 1, lr: 0.1 };
    let error = load("good_loss").scalars(&request).expect_err("a loss has no scalars");
    says(&error.to_string(), &["loss plugin `good_loss`", "scalars", "optimizer plugins"]);
    let error = load("nan_scalars").fragment(&loss(json!({}))).expect_err("an optimizer is no loss");
    assert!(matches!(error, PluginError::WrongKind { expected: Kind::Loss, .. }), "{error}");
    let error = load("nan_scalars").fragment(&Request::Scalars(request)).expect_err("scalars are no fragment");
    assert!(matches!(error, PluginError::Malformed { .. }), "{error}");
}

#[test]
fn scalars_arrive_exactly_and_must_be_finite() {
    let plugin = load("nan_scalars");
    let ask = |step| plugin.scalars(&ScalarsRequest { config: json!({}), step, lr: 0.1 + 0.2 });
    let answer = ask(1).expect("finite");
    assert!(answer.elementwise);
    assert_eq!(answer.scalars, [("rate".to_string(), 0.1 + 0.2)]);
    for step in [3, 4] {
        let error = ask(step).expect_err("infinite, then NaN");
        assert!(matches!(error, PluginError::Number { .. }));
        says(&error.to_string(), &["optimizer plugin `nan_scalars`", "`rate`", &format!("step {step}"), "finite"]);
    }
    let info = ParamInfo { name: "w".into(), shape: vec![3, 5], weight_decay: 0.0 };
    let fragment = plugin.fragment(&Request::Optimizer(OptimizerRequest { config: json!({}), info })).expect("builds");
    assert!(fragment.output("param").is_some());
}

#[test]
fn a_schedule_keeps_its_state_and_stays_in_range() {
    let plugin = load("wild_scheduler");
    let ask = |factor: f64, base_lr: f64, state: Value| {
        let progress = Progress {
            base_lr,
            step: 7,
            steps_per_epoch: 10,
            total_steps: 100,
            epoch: 0,
            epochs: 10,
            metric: None,
            evaluations: 0,
        };
        plugin.schedule(&ScheduleRequest { config: json!({ "factor": factor }), progress, state })
    };
    let first = ask(1.0, 2e-4, Value::Null).expect("sound");
    assert_eq!((first.lr, &first.state), (2e-4, &json!(1)));
    assert_eq!(ask(0.0, 2e-4, first.state).expect("0 is a rate").state, json!(2));
    let error = ask(-1.0, 2e-4, Value::Null).expect_err("below 0");
    says(&error.to_string(), &["scheduler plugin `wild_scheduler`", "step 7", "at least 0, got -0.0002"]);
    let error = ask(1e200, 1.0, Value::Null).expect_err("infinite");
    says(&error.to_string(), &["got NaN or infinity"]);
}

/// Collects the events with the target `plugin`.
struct Collect(std::sync::Arc<std::sync::Mutex<Vec<String>>>);

impl tracing::Subscriber for Collect {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "plugin"
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        struct Fields(String);
        impl tracing::field::Visit for Fields {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!(" {}={value:?}", field.name());
            }
        }
        let mut fields = Fields(event.metadata().level().to_string());
        event.record(&mut fields);
        self.0.lock().expect("not poisoned").push(fields.0);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn log_lines_reach_tracing_with_the_plugins_name() {
    let lines = std::sync::Arc::default();
    let plugin = load("good_loss");
    tracing::subscriber::with_default(Collect(std::sync::Arc::clone(&lines)), || plugin.fragment(&loss(json!({}))))
        .expect("builds");
    assert_eq!(*lines.lock().expect("not poisoned"), ["INFO message=building plugin=\"loss good_loss\""]);
}

#[test]
fn inspection_names_every_setting() {
    let plugin = load("good_loss");
    let config = plugin.complete(&serde_json::Map::new()).expect("it has defaults");
    let text = clip_host_plugins::inspect::text(&plugin, Some(&config), false);
    says(&text, &["loss `good_loss` 0.1.0", "Radford", plugin.sha256(), "libgood_loss"]);
    for row in [
        ["temperature", "number", "0.07", "at least 0.001, at most 1", "Divides the similarities."],
        ["weights", "list of 2 numbers", "[0.5,0.5]", "at least 0", "Weights of the two directions."],
        ["direction", "`both` or `image_to_text`", "\"both\"", "", "`image_to_text`: Image to text only."],
        ["ceiling", "number or null", "null", "", "Largest similarity that counts; none, if null."],
    ] {
        let line = text.lines().find(|line| line.starts_with(row[0])).expect(row[0]);
        says(line, &row);
    }
    let json = clip_host_plugins::inspect::json(&plugin, Some(&config));
    assert_eq!(json["kind"], "loss");
    assert_eq!(json["settings"].as_array().map(Vec::len), Some(4));
    let temperature = json["settings"].as_array().and_then(|all| all.iter().find(|row| row["name"] == "temperature"));
    assert_eq!(temperature.expect("there")["default"], 0.07);
}
