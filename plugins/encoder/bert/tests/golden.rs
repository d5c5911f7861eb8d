//! Against transformers' BertModel: hidden states, the pooler's output and all gradients, computed by it in f64.

#[path = "../../testing.rs"]
mod golden;

use clip_encoder_bert::{Activation, Bert, BertConfig, Pooling, Preset};
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::graph::BuildError;
use clip_host_plugin_api::ir::{Fragment, Init, Op};
use clip_host_plugin_api::testing::Harness;
use golden::{Golden, assert_close, assert_ranges_checked, count, params};

const BATCH: usize = 4;
const LENGTH: usize = 12;

/// The golden case's network, without dropout.
fn small() -> BertConfig {
    BertConfig {
        vocab_size: 97,
        hidden_size: 32,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        intermediate_size: 64,
        max_position_embeddings: 20,
        hidden_dropout_prob: 0.0,
        attention_probs_dropout_prob: 0.0,
        ..Default::default()
    }
}

fn request(config: &BertConfig, batch: usize, length: usize, training: bool) -> EncoderRequest {
    let config = serde_json::to_value(config).expect("settings are JSON");
    EncoderRequest { config, batch, input: InputShape::Text { length }, training }
}

fn build(config: &BertConfig, length: usize, training: bool) -> Result<Fragment, BuildError> {
    clip_host_plugin_api::encoder::build::<Bert>(&request(config, 2, length, training))
}

/// A harness with the golden case's weights and inputs.
fn harness(golden: &Golden, config: &BertConfig, training: bool) -> Harness {
    let mut harness = Harness::encoder::<Bert>(&request(config, BATCH, LENGTH, training)).expect("builds");
    for (name, values) in golden.under("param.").chain(golden.under("input.")) {
        assert!(harness.leaf(name).is_some() || name.starts_with("pooler."), "there is no leaf `{name}`");
        harness.set(name, values.iter().copied());
    }
    harness
}

#[test]
fn outputs_and_gradients_are_transformers() {
    let golden = Golden::read("bert");
    let mut harness = harness(&golden, &small(), false);
    let wrt: Vec<&str> = golden.under("eval.grad.").map(|(name, _)| name).collect();
    assert_eq!(wrt.len(), params(&harness.fragment).len(), "all parameters are compared");
    // The case's loss is the sum over both outputs, and so are its gradients.
    let [states, pooled] = ["last_hidden_state", "pooler_output"].map(|output| {
        let cotangent = golden.get(&format!("cotangent.{output}"));
        harness.step(Some((output, Some(cotangent))), &wrt).expect("runs")
    });
    for (name, expected) in golden.under("eval.grad.") {
        let sum: Vec<f64> = states.grads[name].iter().zip(&pooled.grads[name]).map(|(a, b)| a + b).collect();
        assert_close(&format!("gradient of {name}"), &sum, expected);
    }
    let tables = "embeddings.word_embeddings.weight";
    assert!(states.grads[tables][..32].iter().all(|g| *g == 0.0), "the padding token's row is not trained");

    let mask = golden.get("input.attention_mask");
    assert!(mask.contains(&0.0), "the case has padding");
    // At padded positions the reference's states mean nothing.
    let tokens = |states: &[f64]| -> Vec<f64> {
        states.iter().enumerate().filter(|(i, _)| mask[i / 32] == 1.0).map(|(_, v)| *v).collect()
    };
    let got = tokens(&states.outputs["last_hidden_state"]);
    assert_close("last_hidden_state", &got, &tokens(golden.get("eval.output.last_hidden_state")));
    assert_close("pooler_output", &states.outputs["pooler_output"], golden.get("eval.output.pooler_output"));
    assert_eq!(states.outputs["features"], states.outputs["pooler_output"]);
}

/// In training only position 0 goes through the last layer: same features, same gradients, same parameters.
#[test]
fn training_computes_the_same_features() {
    let golden = Golden::read("bert");
    let cotangent: Vec<f64> = (0..BATCH * 32).map(|i| (i * 37 % 101) as f64 / 50.0 - 1.0).collect();
    for pooling in [Pooling::Pooler, Pooling::Cls] {
        let config = BertConfig { pooling, ..small() };
        let run = |training| {
            let mut harness = harness(&golden, &config, training);
            let fragment = harness.fragment.clone();
            let wrt: Vec<&str> = params(&fragment).into_keys().collect();
            assert_eq!(wrt.len(), if pooling == Pooling::Pooler { 39 } else { 37 });
            harness.step(Some(("features", Some(&cotangent))), &wrt).expect("runs")
        };
        let (eval, train) = (run(false), run(true));
        assert!(!train.outputs.contains_key("last_hidden_state"));
        assert_close("features", &train.outputs["features"], &eval.outputs["features"]);
        for (name, expected) in &eval.grads {
            assert_close(&format!("gradient of {name}"), &train.grads[name], expected);
        }
    }
}

/// The mean goes over tokens, [CLS] is position 0, and what stands in padded positions does not matter.
#[test]
fn pooling_and_masking() {
    let golden = Golden::read("bert");
    let config = |pooling| BertConfig { pooling, hidden_act: Activation::Relu, ..small() };
    let (ids, mask) = (golden.get("input.input_ids"), golden.get("input.attention_mask"));
    let cls = harness(&golden, &config(Pooling::Cls), false).step(None, &[]).expect("runs");
    let mut mean = harness(&golden, &config(Pooling::Mean), false);
    let step = mean.step(None, &[]).expect("runs");
    let states = &step.outputs["last_hidden_state"];
    for sample in 0..BATCH {
        let tokens: Vec<usize> = (0..LENGTH).map(|t| sample * LENGTH + t).filter(|&t| mask[t] == 1.0).collect();
        let expected: Vec<f64> =
            (0..32).map(|d| tokens.iter().map(|t| states[t * 32 + d]).sum::<f64>() / tokens.len() as f64).collect();
        assert_close("mean", &step.outputs["features"][sample * 32..][..32], &expected);
        assert_eq!(cls.outputs["features"][sample * 32..][..32], states[sample * LENGTH * 32..][..32]);
    }
    mean.set("input_ids", ids.iter().zip(mask).map(|(&id, &m)| if m == 0.0 { 96.0 } else { id }));
    let changed = mean.step(None, &[]).expect("runs");
    assert_eq!(changed.outputs["features"], step.outputs["features"], "padding has weight exactly 0");

    // A sample of nothing but padding (a caption that was cleaned away) gives finite features.
    mean.set("attention_mask", vec![0.0; BATCH * LENGTH]);
    let empty = mean.step(None, &[]).expect("runs");
    assert!(empty.outputs["features"].iter().all(|v| *v == 0.0));
    assert!(empty.outputs["last_hidden_state"].iter().all(|v| v.is_finite()));
}

/// Dropout is on in training only, and a new draw with every seed.
#[test]
fn dropout() {
    let golden = Golden::read("bert");
    for (hidden_dropout_prob, attention_probs_dropout_prob) in [(0.3, 0.0), (0.0, 0.3)] {
        let config = BertConfig { hidden_dropout_prob, attention_probs_dropout_prob, ..small() };
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

/// transformers' own counts.
#[test]
fn presets_have_their_published_sizes() {
    for (preset, tensors, values) in [
        (Preset::Tiny, 39, 4_385_920),
        (Preset::Mini, 71, 11_170_560),
        (Preset::Small, 71, 28_763_648),
        (Preset::Medium, 135, 41_373_184),
        (Preset::Base, 199, 109_482_240),
        (Preset::Large, 391, 335_141_888),
    ] {
        let fragment = build(&BertConfig { preset: Some(preset), ..Default::default() }, 30, true).expect("builds");
        assert_eq!((params(&fragment).len(), count(&fragment)), (tensors, values), "{preset:?}");
    }
    let named = serde_json::json!({ "preset": "bert-base-uncased" });
    let config: BertConfig = serde_json::from_value(named).expect("a preset goes by its checkpoint's name");
    assert_eq!(config.shape(), BertConfig::default().shape(), "the defaults are bert-base-uncased");
}

#[test]
fn base_model_has_the_published_names_and_initial_values() {
    let fragment = build(&BertConfig::default(), 30, true).expect("builds");
    let params = params(&fragment);
    assert_eq!(params["embeddings.word_embeddings.weight"], [30522, 768]);
    assert_eq!(params["embeddings.position_embeddings.weight"], [512, 768]);
    assert_eq!(params["embeddings.token_type_embeddings.weight"], [2, 768]);
    assert_eq!(params["encoder.layer.0.attention.self.query.weight"], [768, 768]);
    assert_eq!(params["encoder.layer.3.intermediate.dense.weight"], [3072, 768]);
    assert_eq!(params["encoder.layer.11.output.dense.weight"], [768, 3072]);
    assert_eq!(params["encoder.layer.11.attention.output.LayerNorm.weight"], [768]);
    assert_eq!(params["pooler.dense.weight"], [768, 768]);
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

#[test]
fn refusals_say_what_is_wrong() {
    let refused = |config: BertConfig, length| match build(&config, length, true) {
        Ok(_) => panic!("{config:?} was accepted"),
        Err(error) => error.to_string(),
    };
    let error = refused(small(), 21);
    assert!(error.contains("1 to 20 tokens") && error.contains("got 21") && error.contains("hint:"), "{error}");
    let error = refused(BertConfig { num_attention_heads: 5, ..small() }, 12);
    assert!(error.contains("got 32 and 5"), "{error}");
    let error = refused(BertConfig { num_attention_heads: 0, ..small() }, 12);
    assert!(error.contains("`num_attention_heads` in 1..=1024, got 0"), "{error}");
    let error = refused(BertConfig { pad_token_id: 97, ..small() }, 12);
    assert!(error.contains("`pad_token_id` in 0..=96"), "{error}");
    let error = refused(BertConfig { preset: Some(Preset::Large), hidden_size: 512, ..Default::default() }, 12);
    assert!(error.contains("preset Large has `hidden_size` 1024, the settings say 512"), "{error}");
    let mut images = request(&small(), 2, 12, true);
    images.input = InputShape::Image { height: 8, width: 8 };
    let error = clip_host_plugin_api::encoder::build::<Bert>(&images).expect_err("images are refused").to_string();
    assert!(error.contains("text_encoder"), "{error}");
    let unknown = serde_json::json!({ "layers": 6 });
    assert!(serde_json::from_value::<BertConfig>(unknown).is_err());
}

#[test]
fn ranges_are_those_of_the_schema() {
    assert_ranges_checked::<BertConfig>(|settings| {
        let request = EncoderRequest { config: settings, ..request(&small(), 2, 12, false) };
        let answer = clip_host_plugin_api::encoder::build::<Bert>(&request);
        answer.is_err_and(|error| error.to_string().contains("building a bert: expected"))
    });
}
