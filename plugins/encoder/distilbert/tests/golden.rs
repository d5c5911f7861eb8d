//! Against transformers' DistilBertModel: hidden states and all gradients, computed by it in f64.

#[path = "../../testing.rs"]
mod golden;

use clip_encoder_distilbert::{Activation, DistilBert, DistilBertConfig, Pooling, Preset};
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::graph::BuildError;
use clip_host_plugin_api::ir::{Fragment, Init, Op};
use clip_host_plugin_api::testing::Harness;
use golden::{Golden, assert_close, assert_ranges_checked, count, params};

const BATCH: usize = 4;
const LENGTH: usize = 12;

/// The golden case's network, without dropout.
fn small() -> DistilBertConfig {
    DistilBertConfig {
        vocab_size: 97,
        max_position_embeddings: 20,
        dim: 32,
        hidden_dim: 64,
        n_heads: 4,
        n_layers: 2,
        dropout: 0.0,
        attention_dropout: 0.0,
        ..Default::default()
    }
}

fn request(config: &DistilBertConfig, batch: usize, length: usize, training: bool) -> EncoderRequest {
    let config = serde_json::to_value(config).expect("settings are JSON");
    EncoderRequest { config, batch, input: InputShape::Text { length }, training }
}

fn build(config: &DistilBertConfig, length: usize, training: bool) -> Result<Fragment, BuildError> {
    clip_host_plugin_api::encoder::build::<DistilBert>(&request(config, 2, length, training))
}

/// A harness with the golden case's weights and inputs.
fn harness(golden: &Golden, config: &DistilBertConfig, training: bool) -> Harness {
    let mut harness = Harness::encoder::<DistilBert>(&request(config, BATCH, LENGTH, training)).expect("builds");
    for (name, values) in golden.under("param.").chain(golden.under("input.")) {
        assert!(harness.leaf(name).is_some(), "there is no leaf `{name}`");
        harness.set(name, values.iter().copied());
    }
    harness
}

#[test]
fn hidden_states_and_gradients_are_transformers() {
    let golden = Golden::read("distilbert");
    let mut harness = harness(&golden, &small(), false);
    let wrt: Vec<&str> = golden.under("eval.grad.").map(|(name, _)| name).collect();
    assert_eq!(wrt.len(), params(&harness.fragment).len(), "all parameters are compared");
    let cotangent = golden.get("cotangent.last_hidden_state");
    let step = harness.step(Some(("last_hidden_state", Some(cotangent))), &wrt).expect("runs");

    let (got, expected) = (&step.outputs["last_hidden_state"], golden.get("eval.output.last_hidden_state"));
    let mask = golden.get("input.attention_mask");
    assert!(mask.contains(&0.0), "the case has padding");
    // At padded positions the reference's states mean nothing.
    let tokens = |states: &[f64]| -> Vec<f64> {
        states.iter().enumerate().filter(|(i, _)| mask[i / 32] == 1.0).map(|(_, v)| *v).collect()
    };
    assert_close("last_hidden_state", &tokens(got), &tokens(expected));
    for (name, expected) in golden.under("eval.grad.") {
        assert_close(&format!("gradient of {name}"), &step.grads[name], expected);
    }
    let table = &step.grads["embeddings.word_embeddings.weight"];
    assert!(table[..32].iter().all(|g| *g == 0.0), "the padding token's row is not trained");

    let first: Vec<f64> = got.chunks(LENGTH * 32).flat_map(|sample| sample[..32].to_vec()).collect();
    assert_eq!(step.outputs["features"], first, "features are those of position 0");
}

/// In training only position 0 goes through the last layer: same features, same gradients, same parameters.
#[test]
fn training_computes_the_same_features() {
    let golden = Golden::read("distilbert");
    let cotangent: Vec<f64> = (0..BATCH * 32).map(|i| (i * 37 % 101) as f64 / 50.0 - 1.0).collect();
    let wrt: Vec<&str> = golden.under("param.").map(|(name, _)| name).collect();
    let run = |training| {
        let mut harness = harness(&golden, &small(), training);
        harness.step(Some(("features", Some(&cotangent))), &wrt).expect("runs")
    };
    let (eval, train) = (run(false), run(true));
    assert!(!train.outputs.contains_key("last_hidden_state"));
    assert_close("features", &train.outputs["features"], &eval.outputs["features"]);
    for name in wrt {
        assert_close(&format!("gradient of {name}"), &train.grads[name], &eval.grads[name]);
    }
}

/// The mean goes over tokens, and what stands in padded positions does not matter.
#[test]
fn mean_pooling_and_masking() {
    let golden = Golden::read("distilbert");
    let config = DistilBertConfig { pooling: Pooling::Mean, activation: Activation::Relu, ..small() };
    let mut plain = harness(&golden, &config, false);
    let (ids, mask) = (golden.get("input.input_ids"), golden.get("input.attention_mask"));
    let step = plain.step(None, &[]).expect("runs");
    let states = &step.outputs["last_hidden_state"];
    for sample in 0..BATCH {
        let tokens: Vec<usize> = (0..LENGTH).map(|t| sample * LENGTH + t).filter(|&t| mask[t] == 1.0).collect();
        let mean: Vec<f64> =
            (0..32).map(|d| tokens.iter().map(|t| states[t * 32 + d]).sum::<f64>() / tokens.len() as f64).collect();
        assert_close("mean", &step.outputs["features"][sample * 32..][..32], &mean);
    }
    plain.set("input_ids", ids.iter().zip(mask).map(|(&id, &m)| if m == 0.0 { 96.0 } else { id }));
    let changed = plain.step(None, &[]).expect("runs");
    assert_eq!(changed.outputs["features"], step.outputs["features"], "padding has weight exactly 0");

    // A sample of nothing but padding (a caption that was cleaned away) gives finite features.
    plain.set("attention_mask", vec![0.0; BATCH * LENGTH]);
    let empty = plain.step(None, &[]).expect("runs");
    assert!(empty.outputs["features"].iter().all(|v| *v == 0.0));
    assert!(empty.outputs["last_hidden_state"].iter().all(|v| v.is_finite()));
}

/// Dropout is on in training only, and a new draw with every seed.
#[test]
fn dropout() {
    let golden = Golden::read("distilbert");
    for (dropout, attention_dropout) in [(0.3, 0.0), (0.0, 0.3)] {
        let config = DistilBertConfig { dropout, attention_dropout, ..small() };
        let features = |training, seed| {
            let mut harness = harness(&golden, &config, training);
            harness.seed = seed;
            harness.step(None, &[]).expect("runs").outputs["features"].clone()
        };
        assert_eq!(features(true, 1), features(true, 1));
        assert_ne!(features(true, 1), features(true, 2));
        assert_eq!(features(false, 1), features(false, 2));
    }
}

#[test]
fn base_model_has_its_published_size_and_names() {
    let fragment = build(&DistilBertConfig::default(), 30, true).expect("builds");
    assert_eq!(count(&fragment), 66_362_880);
    let params = params(&fragment);
    assert_eq!(params.len(), 100);
    assert_eq!(params["embeddings.word_embeddings.weight"], [30522, 768]);
    assert_eq!(params["embeddings.position_embeddings.weight"], [512, 768]);
    assert_eq!(params["embeddings.LayerNorm.bias"], [768]);
    assert_eq!(params["transformer.layer.0.attention.q_lin.weight"], [768, 768]);
    assert_eq!(params["transformer.layer.3.ffn.lin1.weight"], [3072, 768]);
    assert_eq!(params["transformer.layer.5.ffn.lin2.weight"], [768, 3072]);
    assert_eq!(params["transformer.layer.5.sa_layer_norm.weight"], [768]);
    assert_eq!(params["transformer.layer.5.output_layer_norm.bias"], [768]);
    for node in &fragment.nodes {
        let Op::Param { name, init } = &node.op else { continue };
        let expected = match node.shape.len() {
            2 => Init::Normal { std: 0.02 },
            _ if name.ends_with("bias") => Init::Constant(0.0),
            _ => Init::Constant(1.0),
        };
        assert_eq!(*init, expected, "{name}");
    }
}

/// transformers' own counts.
#[test]
fn presets_have_their_published_sizes() {
    for (name, preset, values) in [
        ("distilbert-base-uncased", Preset::Uncased, 66_362_880),
        ("distilbert-base-cased", Preset::Cased, 65_190_912),
        ("distilbert-base-multilingual-cased", Preset::MultilingualCased, 134_734_080),
    ] {
        let config: DistilBertConfig = serde_json::from_value(serde_json::json!({ "preset": name }))
            .expect("a preset goes by its checkpoint's name");
        assert_eq!(config.preset, Some(preset));
        let fragment = build(&config, 30, true).expect("builds");
        assert_eq!((params(&fragment).len(), count(&fragment)), (100, values), "{name}");
    }
}

#[test]
fn refusals_say_what_is_wrong() {
    let refused = |config: DistilBertConfig, length| match build(&config, length, true) {
        Ok(_) => panic!("{config:?} was accepted"),
        Err(error) => error.to_string(),
    };
    let error = refused(small(), 21);
    assert!(error.contains("1 to 20 tokens") && error.contains("got 21") && error.contains("hint:"), "{error}");
    let error = refused(DistilBertConfig { n_heads: 5, ..small() }, 12);
    assert!(error.contains("got 32 and 5"), "{error}");
    let error = refused(DistilBertConfig { n_heads: 0, ..small() }, 12);
    assert!(error.contains("`n_heads` in 1..=1024, got 0"), "{error}");
    let error = refused(DistilBertConfig { pad_token_id: 97, ..small() }, 12);
    assert!(error.contains("`pad_token_id` in 0..=96"), "{error}");
    let error = refused(DistilBertConfig { preset: Some(Preset::Cased), n_layers: 4, ..Default::default() }, 12);
    assert!(error.contains("preset Cased has `n_layers` 6, the settings say 4"), "{error}");
    let mut images = request(&small(), 2, 12, true);
    images.input = InputShape::Image { height: 8, width: 8 };
    let error =
        clip_host_plugin_api::encoder::build::<DistilBert>(&images).expect_err("images are refused").to_string();
    assert!(error.contains("text_encoder"), "{error}");
    let unknown = serde_json::json!({ "layers": 6 });
    assert!(serde_json::from_value::<DistilBertConfig>(unknown).is_err());
}

#[test]
fn ranges_are_those_of_the_schema() {
    assert_ranges_checked::<DistilBertConfig>(|settings| {
        let request = EncoderRequest { config: settings, ..request(&small(), 2, 12, false) };
        let answer = clip_host_plugin_api::encoder::build::<DistilBert>(&request);
        answer.is_err_and(|error| error.to_string().contains("building a distilbert: expected"))
    });
}
