//! The loss and its gradients in f64 against the reference implementations' numbers.

#[path = "../../../../tests/support/golden.rs"]
mod golden;

use clip_host_plugin_api::testing::{Harness, Step};
use clip_loss_clip::{Clip, ClipConfig, Mode};
use golden::{Case, close};

const EXACT: f64 = 1e-10;

fn harness(case: &Case, config: &ClipConfig, dataset_size: usize) -> Harness {
    Harness::loss::<Clip>(config, case.count("batch"), case.count("dim"), dataset_size).unwrap()
}

/// Runs one step of a case and compares what every case has.
fn run(case: &Case, harness: &mut Harness, step: usize, params: &[&str]) -> Step {
    for name in ["image_features", "text_features"] {
        harness.set(name, case.step(name, step).to_vec());
    }
    let leaves = [&["image_features", "text_features"], params].concat();
    let result = harness.step(Some(("loss", None)), &leaves).unwrap();
    case.compare_step("loss", step, &result.outputs["loss"], EXACT);
    case.compare_step("grad_image_features", step, &result.grads["image_features"], EXACT);
    case.compare_step("grad_text_features", step, &result.grads["text_features"], EXACT);
    result
}

fn fixed(name: &str) {
    let case = Case::load("losses", name);
    let config = ClipConfig { temperature: case.number("temperature"), ..Default::default() };
    let mut harness = harness(&case, &config, 1);
    for step in 0..case.count("steps") {
        run(&case, &mut harness, step, &[]);
    }
}

#[test]
fn fixed_temperature() {
    fixed("clip");
    fixed("clip_temp001");
}

#[test]
fn edge_cases() {
    fixed("edge_identical_clip");
    fixed("edge_tiny_tau_clip");
    fixed("edge_batch2_clip");
}

#[test]
fn learnable_temperature() {
    let case = Case::load("losses", "clip_learnable_temperature");
    let config = ClipConfig {
        mode: Mode::Learnable,
        min_temperature: case.number("clamp_min"),
        max_temperature: case.number("clamp_max"),
        ..Default::default()
    };
    let mut harness = harness(&case, &config, 1);
    for step in 0..case.count("steps") {
        harness.set("temperature", case.step("temperature_raw", step).to_vec());
        let result = run(&case, &mut harness, step, &["temperature"]);
        case.compare_step("temperature_used", step, &result.outputs["temperature"], EXACT);
        case.compare_step("grad_temperature", step, &result.grads["temperature"], EXACT);
        // The clamp is in place: the optimizer goes on from the clamped value.
        case.compare_step("temperature_used", step, &harness.values["temperature"], EXACT);
    }
}

#[test]
fn logit_scale() {
    let case = Case::load("losses", "clip_logit_scale");
    let mut harness = harness(&case, &ClipConfig { mode: Mode::LogitScale, ..Default::default() }, 1);
    close("start", &harness.values["logit_scale"], &[(1.0f64 / 0.07).ln()], EXACT);
    for step in 0..case.count("steps") {
        harness.set("logit_scale", case.step("t_raw", step).to_vec());
        let result = run(&case, &mut harness, step, &["logit_scale"]);
        case.compare_step("logit_scale", step, &result.outputs["logit_scale"], EXACT);
        case.compare_step("grad_t", step, &result.grads["logit_scale"], EXACT);
        case.compare_step("t_used", step, &harness.values["logit_scale"], EXACT);
    }
}

#[test]
fn personalized_temperature() {
    let case = Case::load("losses", "clip_personalized_tau");
    let config = ClipConfig { mode: Mode::Personalized, ..Default::default() };
    let mut harness = harness(&case, &config, case.count("dataset_size"));
    for table in ["image_tau", "text_tau"] {
        harness.set(table, case.tensor(table).to_vec());
    }
    for step in 0..case.count("steps") {
        for ids in ["image_ids", "text_ids"] {
            harness.set(ids, case.step(ids, step).to_vec());
        }
        let result = run(&case, &mut harness, step, &["image_tau", "text_tau"]);
        case.compare_step("grad_image_tau", step, &result.grads["image_tau"], EXACT);
        case.compare_step("grad_text_tau", step, &result.grads["text_tau"], EXACT);
    }
}

#[test]
fn impossible_settings_are_refused() {
    for config in [
        ClipConfig { temperature: 0.0, ..Default::default() },
        ClipConfig { temperature: f64::NAN, ..Default::default() },
        ClipConfig { min_temperature: 0.5, max_temperature: 0.1, ..Default::default() },
    ] {
        assert!(clip_refuses(&config), "{config:?}");
    }
}

fn clip_refuses(config: &ClipConfig) -> bool {
    Harness::loss::<Clip>(config, 4, 8, 1).is_err()
}
