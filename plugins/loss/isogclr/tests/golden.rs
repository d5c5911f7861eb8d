//! The loss, its gradients and its tables in f64 against the published code's numbers.

#[path = "../../../../tests/support/golden.rs"]
mod golden;

use clip_host_plugin_api::testing::Harness;
use clip_loss_isogclr::network::NetworkConfig;
use clip_loss_isogclr::{IsogClr, IsogClrConfig};
use golden::Case;

const EXACT: f64 = 1e-10;

fn check(name: &str) {
    let case = Case::load("losses", name);
    let config = IsogClrConfig {
        gamma: case.number("gamma"),
        rho_image: case.number("rho_I"),
        rho_text: case.number("rho_T"),
        tau_init: case.number("tau_init"),
        eta: case.number("eta"),
        beta_u: case.number("beta_u"),
        grad_clip: case.number("grad_clip"),
        tau_min: case.number("tau_min"),
        tau_max: case.number("tau_max"),
        eps: case.number("eps"),
        network: None,
    };
    let (batch, dim, dataset_size) = (case.count("batch"), case.count("dim"), case.count("dataset_size"));
    let mut harness = Harness::loss::<IsogClr>(&config, batch, dim, dataset_size).unwrap();
    for step in 0..case.count("steps") {
        for input in ["image_features", "text_features", "image_ids", "text_ids", "epoch"] {
            harness.set(input, case.step(input, step).to_vec());
        }
        let result = harness.step(Some(("loss", None)), &["image_features", "text_features"]).unwrap();
        case.compare_step("loss", step, &result.outputs["loss"], EXACT);
        case.compare_step("grad_image_features", step, &result.grads["image_features"], EXACT);
        case.compare_step("grad_text_features", step, &result.grads["text_features"], EXACT);
        for table in ["s_I", "s_T", "b_I", "b_T", "u_I", "u_T", "tau_I", "tau_T"] {
            case.compare_step(&format!("state.{table}"), step, &harness.values[table], EXACT);
        }
        for (metric, tensor) in [("image_tau", "tau_image"), ("text_tau", "tau_text")] {
            let mean = case.step(tensor, step).iter().sum::<f64>() / batch as f64;
            golden::close(metric, &result.outputs[metric], &[mean], EXACT);
        }
        case.compare_step("temp_weight_image_mean", step, &result.outputs["image_tau_grad"], EXACT);
        case.compare_step("temp_weight_text_mean", step, &result.outputs["text_tau_grad"], EXACT);
    }
}

/// The case's weights are stored in single precision, and so are its gradients of them.
#[test]
fn temperatures_from_a_network() {
    let case = Case::load("losses", "isogclr_tempnet");
    let prototypes = case.count("prototypes_M");
    let config = IsogClrConfig {
        gamma: case.number("gamma"),
        rho_image: case.number("rho_I"),
        rho_text: case.number("rho_T"),
        tau_min: case.number("tau_min"),
        tau_max: case.number("tau_max"),
        eps: case.number("eps"),
        network: Some(NetworkConfig { prototypes, dropout: case.number("dropout"), ..Default::default() }),
        ..Default::default()
    };
    let (batch, dim, dataset_size) = (case.count("batch"), case.count("dim"), case.count("dataset_size"));
    let mut harness = Harness::loss::<IsogClr>(&config, batch, dim, dataset_size).unwrap();
    let names = ["proj.weight", "proj.bias", "scaler", "prototypes", "linear_1.weight", "linear_1.bias"];
    let params: Vec<String> =
        ["image", "text"].iter().flat_map(|side| names.map(|name| format!("{side}_temp_gen.{name}"))).collect();
    for name in &params {
        harness.set(name, case.tensor(name).to_vec());
    }
    let mut leaves = vec!["image_features", "text_features"];
    leaves.extend(params.iter().map(String::as_str));
    for step in 0..case.count("steps") {
        for input in ["image_features", "text_features", "image_ids", "text_ids", "epoch"] {
            harness.set(input, case.step(input, step).to_vec());
        }
        let result = harness.step(Some(("loss", None)), &leaves).unwrap();
        case.compare_step("loss", step, &result.outputs["loss"], EXACT);
        case.compare_step("grad_image_features", step, &result.grads["image_features"], EXACT);
        case.compare_step("grad_text_features", step, &result.grads["text_features"], EXACT);
        for table in ["s_I", "s_T", "b_I", "b_T"] {
            case.compare_step(&format!("state.{table}"), step, &harness.values[table], EXACT);
        }
        for (metric, tensor) in [("image_tau", "tau_image"), ("text_tau", "tau_text")] {
            let mean = case.step(tensor, step).iter().sum::<f64>() / batch as f64;
            golden::close(metric, &result.outputs[metric], &[mean], EXACT);
        }
        for name in &params {
            case.compare_step(&format!("grad.{name}"), step, &result.grads[name], 1e-8);
        }
    }
    for table in ["tau_I", "tau_T", "u_I", "u_T"] {
        assert!(!harness.values.contains_key(table), "a network needs no table `{table}`");
    }
}

#[test]
fn published_defaults() {
    check("isogclr");
}

#[test]
fn temperatures_that_move() {
    check("isogclr_eta");
}

#[test]
fn identical_features() {
    check("edge_identical_isogclr");
}

#[test]
fn tiny_temperature() {
    check("edge_tiny_tau_isogclr");
}

#[test]
fn batch_of_two() {
    check("edge_batch2_isogclr");
}

#[test]
fn impossible_settings_are_refused() {
    let refused = |config: &IsogClrConfig, batch| Harness::loss::<IsogClr>(config, batch, 4, 8).is_err();
    assert!(!refused(&IsogClrConfig::default(), 2));
    assert!(refused(&IsogClrConfig::default(), 1));
    assert!(refused(&IsogClrConfig { tau_init: 0.0, ..Default::default() }, 2));
    assert!(refused(&IsogClrConfig { tau_min: 0.5, tau_max: 0.1, ..Default::default() }, 2));
}
