//! The loss, its gradients and its sums in f64 against the published code's numbers.

#[path = "../../../../tests/support/golden.rs"]
mod golden;

use clip_host_plugin_api::testing::Harness;
use clip_loss_onlineclr::{LARGEST_LOG_SUM, OnlineClr, OnlineClrConfig};
use golden::{Case, close};

const EXACT: f64 = 1e-10;

fn config(case: &Case) -> OnlineClrConfig {
    let [temperature, positive, gamma] = ["temperature", "positive_temperature", "gamma"].map(|name| case.number(name));
    OnlineClrConfig { temperature, positive_factor: positive / temperature, gamma }
}

fn check(name: &str) {
    let case = Case::load("losses", name);
    let mut harness = Harness::loss::<OnlineClr>(&config(&case), case.count("batch"), case.count("dim"), 1).unwrap();
    for step in 0..case.count("steps") {
        for input in ["image_features", "text_features"] {
            harness.set(input, case.step(input, step).to_vec());
        }
        let result = harness.step(Some(("loss", None)), &["image_features", "text_features"]).unwrap();
        case.compare_step("loss", step, &result.outputs["loss"], EXACT);
        case.compare_step("grad_image_features", step, &result.grads["image_features"], EXACT);
        case.compare_step("grad_text_features", step, &result.grads["text_features"], EXACT);
        for state in ["u_n", "u_p", "c_n", "c_p"] {
            case.compare_step(&format!("state.{state}"), step, &harness.values[state], EXACT);
        }
    }
}

#[test]
fn published_defaults() {
    check("onlineclr");
    assert_eq!(config(&Case::load("losses", "onlineclr")), OnlineClrConfig::default());
}

#[test]
fn other_temperatures() {
    check("onlineclr_temp005");
}

/// Wrong pairs fall from cosine 1 to 0 in one step: at τ = 0.001 the old sum would grow by exp(1000). The shift stays high
/// instead, the sum keeps within its limit, and the newest batch hardly counts beside the old one, as in the formula.
#[test]
fn a_falling_shift_does_not_overflow() {
    let config = OnlineClrConfig { temperature: 0.001, gamma: 0.5, ..Default::default() };
    let mut harness = Harness::loss::<OnlineClr>(&config, 2, 2, 1).unwrap();
    harness.set("image_features", [1.0, 0.0, 1.0, 0.0]).set("text_features", [1.0, 0.0, 1.0, 0.0]);
    harness.step(None, &[]).unwrap();
    let log_sum = |harness: &Harness| harness.values["u_n"][0].ln() + harness.values["c_n"][0] / config.temperature;
    let before = log_sum(&harness);
    harness.set("text_features", [0.0, 1.0, 0.0, 1.0]);
    for step in 1..4 {
        let result = harness.step(Some(("loss", None)), &["image_features"]).unwrap();
        assert!(result.outputs["loss"][0].is_finite());
        assert!(result.grads["image_features"].iter().all(|g| g.is_finite()));
        assert!(harness.values["u_n"][0].ln() <= LARGEST_LOG_SUM + EXACT);
        // Only the average's own factor 1 − γ moves the sum.
        close("log sum", &[log_sum(&harness)], &[before + f64::from(step) * 0.5f64.ln()], 1e-9);
    }
}

#[test]
fn a_batch_of_one_is_refused() {
    assert!(Harness::loss::<OnlineClr>(&OnlineClrConfig::default(), 1, 4, 1).is_err());
    assert!(Harness::loss::<OnlineClr>(&OnlineClrConfig::default(), 2, 4, 1).is_ok());
}

/// Its sums would stay 0, and it divides by them.
#[test]
fn a_weight_of_zero_is_refused() {
    let config = OnlineClrConfig { gamma: 0.0, ..OnlineClrConfig::default() };
    let error = Harness::loss::<OnlineClr>(&config, 4, 4, 10).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("gamma above 0, it got 0"), "{error}");
}
