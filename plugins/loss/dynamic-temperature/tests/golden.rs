//! The loss, its gradients and its temperature in f64 against the published code's numbers.

#[path = "../../../../tests/support/golden.rs"]
mod golden;

use clip_host_plugin_api::testing::Harness;
use clip_loss_dynamic_temperature::{DynamicTemperature, DynamicTemperatureConfig};
use golden::{Case, close};

const EXACT: f64 = 1e-10;

fn check(name: &str) {
    let case = Case::load("losses", name);
    let config = DynamicTemperatureConfig {
        initial_tau: case.number("initial_tau"),
        alpha: case.number("alpha"),
        min_tau: case.number("min_tau"),
        max_tau: case.number("max_tau"),
        symmetric: false,
    };
    let mut harness = Harness::loss::<DynamicTemperature>(&config, case.count("batch"), case.count("dim"), 1).unwrap();
    for step in 0..case.count("steps") {
        for input in ["image_features", "text_features"] {
            harness.set(input, case.step(input, step).to_vec());
        }
        let result = harness.step(Some(("loss", None)), &["image_features", "text_features"]).unwrap();
        case.compare_step("loss", step, &result.outputs["loss"], EXACT);
        case.compare_step("grad_image_features", step, &result.grads["image_features"], EXACT);
        case.compare_step("grad_text_features", step, &result.grads["text_features"], EXACT);
        case.compare_step("state.tau", step, &harness.values["tau"], EXACT);
        case.compare_step("state.tau", step, &result.outputs["temperature"], EXACT);
    }
}

#[test]
fn published_defaults() {
    check("dynamic_temperature");
}

#[test]
fn clamped() {
    check("dynamic_temperature_clamped");
}

/// The symmetric form is the mean of the published form and of the published form with images and texts swapped.
#[test]
fn symmetric() {
    let case = Case::load("losses", "dynamic_temperature");
    let loss = |symmetric: bool, images: &str, texts: &str| {
        let config = DynamicTemperatureConfig { symmetric, ..Default::default() };
        let mut harness =
            Harness::loss::<DynamicTemperature>(&config, case.count("batch"), case.count("dim"), 1).unwrap();
        harness.set("image_features", case.step(images, 0).to_vec());
        harness.set("text_features", case.step(texts, 0).to_vec());
        harness.step(None, &[]).unwrap().outputs["loss"][0]
    };
    let there = loss(false, "image_features", "text_features");
    let back = loss(false, "text_features", "image_features");
    assert!((there - back).abs() > 1e-3, "the case does not tell the directions apart");
    close("symmetric", &[loss(true, "image_features", "text_features")], &[(there + back) / 2.0], EXACT);
}

#[test]
fn impossible_settings_are_refused() {
    let refused =
        |config: &DynamicTemperatureConfig, batch| Harness::loss::<DynamicTemperature>(config, batch, 4, 1).is_err();
    assert!(!refused(&DynamicTemperatureConfig::default(), 2));
    assert!(refused(&DynamicTemperatureConfig::default(), 1));
    assert!(refused(&DynamicTemperatureConfig { min_tau: 0.5, max_tau: 0.1, ..Default::default() }, 2));
}
