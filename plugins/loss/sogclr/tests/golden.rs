//! The loss, its gradients and its tables in f64 against the published code's numbers.

#[path = "../../../../tests/support/golden.rs"]
mod golden;

use clip_host_plugin_api::testing::Harness;
use clip_loss_sogclr::{SogClr, SogClrConfig, Surrogate};
use golden::{Case, close};

const EXACT: f64 = 1e-10;

fn config(case: &Case) -> SogClrConfig {
    let [gamma, temperature, eps] = ["gamma", "temperature", "eps"].map(|name| case.number(name));
    SogClrConfig { gamma, temperature, eps, ..Default::default() }
}

fn check(name: &str) {
    let case = Case::load("losses", name);
    let sizes = [case.count("batch"), case.count("dim"), case.count("dataset_size")];
    let mut harness = Harness::loss::<SogClr>(&config(&case), sizes[0], sizes[1], sizes[2]).unwrap();
    for step in 0..case.count("steps") {
        for input in ["image_features", "text_features", "image_ids", "text_ids", "epoch"] {
            harness.set(input, case.step(input, step).to_vec());
        }
        let result = harness.step(Some(("loss", None)), &["image_features", "text_features"]).unwrap();
        case.compare_step("loss", step, &result.outputs["loss"], EXACT);
        case.compare_step("grad_image_features", step, &result.grads["image_features"], EXACT);
        case.compare_step("grad_text_features", step, &result.grads["text_features"], EXACT);
        for table in ["s_I", "s_T", "b_I", "b_T"] {
            case.compare_step(&format!("state.{table}"), step, &harness.values[table], EXACT);
        }
    }
}

#[test]
fn published_defaults() {
    check("sogclr");
    assert_eq!(config(&Case::load("losses", "sogclr")), SogClrConfig::default());
}

#[test]
fn other_settings() {
    check("sogclr_gamma01_temp007");
}

#[test]
fn identical_features() {
    check("edge_identical_sogclr");
}

#[test]
fn tiny_temperature() {
    check("edge_tiny_tau_sogclr");
}

#[test]
fn batch_of_two() {
    check("edge_batch2_sogclr");
}

/// Two pairs at cosine 1 and 0, in epoch 0, by hand. Differences are −1 off the diagonal; the surrogate of −1 with c = 1.5
/// is ¼, that of 0 on the diagonal 2¼. Each row has one other entry, whose weight is s/(s + ε).
#[test]
fn squared_hinge() {
    let config =
        SogClrConfig { surrogate: Surrogate::SquaredHinge, margin: 1.5, temperature: 1.0, ..Default::default() };
    let mut harness = Harness::loss::<SogClr>(&config, 2, 2, 2).unwrap();
    for input in ["image_features", "text_features"] {
        harness.set(input, [1.0, 0.0, 0.0, 1.0]);
    }
    for input in ["image_ids", "text_ids"] {
        harness.set(input, [1.0, 0.0]);
    }
    let result = harness.step(Some(("loss", None)), &["image_features", "text_features"]).unwrap();
    let s = (-2.0f64).exp();
    let weight = s / (s + config.eps);
    close("s", &harness.values["s_I"], &[s; 2], EXACT);
    close("b", &harness.values["b_T"], &[2.25; 2], EXACT);
    close("loss", &result.outputs["loss"], &[2.0 * 0.25 * weight], EXACT);
    // Each of the four terms is ½·weight·(S_ij − S_ii + c)², with slope 2·½ there: −weight/2 along its own text, +weight/2
    // along the other, from both sides.
    let expected = [-weight, weight, weight, -weight];
    close("image gradient", &result.grads["image_features"], &expected, EXACT);
    close("text gradient", &result.grads["text_features"], &expected, EXACT);
}

#[test]
fn a_batch_of_one_is_refused() {
    assert!(Harness::loss::<SogClr>(&SogClrConfig::default(), 1, 4, 8).is_err());
    assert!(Harness::loss::<SogClr>(&SogClrConfig::default(), 2, 4, 8).is_ok());
}
