//! The loss and its gradients in f64 against the published code's numbers.

#[path = "../../../../tests/support/golden.rs"]
mod golden;

use clip_host_plugin_api::testing::Harness;
use clip_loss_cyclip::{CyClip, CyClipConfig};
use golden::{Case, close};

const EXACT: f64 = 1e-10;

fn config(case: &Case) -> CyClipConfig {
    let [temperature, lambda_1, lambda_2] = ["temperature", "lambda_1", "lambda_2"].map(|name| case.number(name));
    CyClipConfig { temperature, lambda_1, lambda_2, ..Default::default() }
}

fn check(name: &str) {
    let case = Case::load("losses", name);
    for learnable in [false, true] {
        let config = CyClipConfig { learnable, ..config(&case) };
        let mut harness = Harness::loss::<CyClip>(&config, case.count("batch"), case.count("dim"), 1).unwrap();
        let leaves = ["image_features", "text_features", "temperature"];
        for step in 0..case.count("steps") {
            for input in ["image_features", "text_features"] {
                harness.set(input, case.step(input, step).to_vec());
            }
            let result = harness.step(Some(("loss", None)), &leaves[..2 + usize::from(learnable)]).unwrap();
            case.compare_step("loss", step, &result.outputs["loss"], EXACT);
            case.compare_step("grad_image_features", step, &result.grads["image_features"], EXACT);
            case.compare_step("grad_text_features", step, &result.grads["text_features"], EXACT);
            if learnable {
                case.compare_step("grad_temperature", step, &result.grads["temperature"], EXACT);
            }
        }
    }
}

#[test]
fn published_defaults() {
    check("cyclip");
    assert_eq!(config(&Case::load("losses", "cyclip")), CyClipConfig::default());
}

#[test]
fn other_weights() {
    check("cyclip_lambdas");
}

/// A learnable temperature starts where the settings say and never leaves its limits.
#[test]
fn limits_hold() {
    let case = Case::load("losses", "cyclip");
    let config = CyClipConfig { learnable: true, temperature_limits: [0.01, 0.2], ..Default::default() };
    let mut harness = Harness::loss::<CyClip>(&config, case.count("batch"), case.count("dim"), 1).unwrap();
    close("start", &harness.values["temperature"], &[0.07], EXACT);
    for (raw, used) in [(-1.0, 0.01), (0.05, 0.05), (3.0, 0.2)] {
        for input in ["image_features", "text_features"] {
            harness.set(input, case.step(input, 0).to_vec());
        }
        let result = harness.set("temperature", [raw]).step(None, &[]).unwrap();
        close("used", &result.outputs["temperature"], &[used], EXACT);
        close("kept", &harness.values["temperature"], &[used], EXACT);
    }
}
