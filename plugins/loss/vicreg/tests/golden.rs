//! The loss and its gradients in f64 against the published code's numbers.

#[path = "../../../../tests/support/golden.rs"]
mod golden;

use clip_host_plugin_api::testing::Harness;
use clip_loss_vicreg::{VicReg, VicRegConfig};
use golden::{Case, close};

const EXACT: f64 = 1e-10;

fn config(case: &Case) -> VicRegConfig {
    let [sim_coeff, std_coeff, cov_coeff, std_eps] =
        ["sim_coeff", "std_coeff", "cov_coeff", "std_eps"].map(|name| case.number(name));
    VicRegConfig { sim_coeff, std_coeff, cov_coeff, std_eps, ..Default::default() }
}

fn check(name: &str) {
    let case = Case::load("losses", name);
    let mut harness = Harness::loss::<VicReg>(&config(&case), case.count("batch"), case.count("dim"), 1).unwrap();
    for step in 0..case.count("steps") {
        // The case's "features" are embeddings before normalisation.
        for side in ["image", "text"] {
            harness.set(&format!("{side}_embeddings"), case.step(&format!("{side}_features"), step).to_vec());
        }
        let result = harness.step(Some(("loss", None)), &["image_embeddings", "text_embeddings"]).unwrap();
        case.compare_step("loss", step, &result.outputs["loss"], EXACT);
        case.compare_step("grad_image_features", step, &result.grads["image_embeddings"], EXACT);
        case.compare_step("grad_text_features", step, &result.grads["text_embeddings"], EXACT);
    }
}

#[test]
fn published_defaults() {
    check("vicreg");
    assert_eq!(config(&Case::load("losses", "vicreg")), VicRegConfig::default());
}

#[test]
fn other_weights() {
    check("vicreg_coeffs");
}

/// Embeddings without any spread: the root's slope stays finite, and the hinge costs what it must.
#[test]
fn identical_embeddings() {
    let config = VicRegConfig::default();
    let mut harness = Harness::loss::<VicReg>(&config, 4, 3, 1).unwrap();
    for side in ["image_embeddings", "text_embeddings"] {
        harness.set(side, [0.5; 12]);
    }
    let result = harness.step(Some(("loss", None)), &["image_embeddings"]).unwrap();
    close("loss", &result.outputs["loss"], &[config.std_coeff * (1.0 - config.std_eps.sqrt())], EXACT);
    close("gradient", &result.grads["image_embeddings"], &[0.0; 12], EXACT);
}

#[test]
fn a_batch_of_one_is_refused() {
    assert!(Harness::loss::<VicReg>(&VicRegConfig::default(), 1, 4, 1).is_err());
    assert!(Harness::loss::<VicReg>(&VicRegConfig::default(), 2, 4, 1).is_ok());
}
