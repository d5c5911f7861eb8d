//! Against open_clip's TextTransformer: features and all gradients, computed by it in f64.

#[path = "../../testing.rs"]
mod golden;

use clip_encoder_clip_text::{ClipText, ClipTextConfig, Pooling, Preset};
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::graph::BuildError;
use clip_host_plugin_api::ir::{Fragment, Init, Op};
use clip_host_plugin_api::testing::Harness;
use golden::{Golden, assert_close, assert_ranges_checked, count, params};

const BATCH: usize = 4;
const LENGTH: usize = 14;

/// The golden cases' network.
fn small() -> ClipTextConfig {
    ClipTextConfig {
        context_length: LENGTH,
        vocab_size: 61,
        width: 32,
        heads: 4,
        layers: 2,
        output_dim: 24,
        ..Default::default()
    }
}

fn request(config: &ClipTextConfig, batch: usize, length: usize, training: bool) -> EncoderRequest {
    let config = serde_json::to_value(config).expect("settings are JSON");
    EncoderRequest { config, batch, input: InputShape::Text { length }, training }
}

fn build(config: &ClipTextConfig, length: usize) -> Result<Fragment, BuildError> {
    clip_host_plugin_api::encoder::build::<ClipText>(&request(config, 2, length, true))
}

/// A harness with the golden case's weights and ids, of which it takes the first `length`.
fn harness(golden: &Golden, config: &ClipTextConfig, length: usize, training: bool) -> Harness {
    let mut harness = Harness::encoder::<ClipText>(&request(config, BATCH, length, training)).expect("builds");
    for (name, values) in golden.under("param.") {
        assert!(harness.leaf(name).is_some() || name == "text_projection", "there is no leaf `{name}`");
        harness.set(name, values.iter().copied());
    }
    let ids = golden.get("input.input_ids");
    harness.set("input_ids", ids.chunks(LENGTH).flat_map(|row| row[..length].to_vec()));
    harness
}

fn features(harness: &mut Harness) -> Vec<f64> {
    harness.step(None, &[]).expect("runs").outputs["features"].clone()
}

#[test]
fn features_and_gradients_are_open_clips() {
    for (case, quick_gelu) in [("clip_text_gelu", false), ("clip_text_quickgelu", true)] {
        for training in [false, true] {
            let golden = Golden::read(case);
            let config = ClipTextConfig { quick_gelu, ..small() };
            let mut harness = harness(&golden, &config, LENGTH, training);
            let wrt: Vec<&str> = golden.under("eval.grad.").map(|(name, _)| name).collect();
            assert_eq!(wrt.len(), params(&harness.fragment).len(), "all parameters are compared");
            let step = harness.step(Some(("features", Some(golden.get("cotangent.features")))), &wrt).expect("runs");
            assert_close("features", &step.outputs["features"], golden.get("eval.output.features"));
            for (name, expected) in golden.under("eval.grad.") {
                assert_close(&format!("{case}: gradient of {name}"), &step.grads[name], expected);
            }
        }
    }
}

/// The golden ids end each text with the largest id, then zeros: all poolings find the same position there, and what comes
/// after it does not matter.
#[test]
fn poolings_find_the_end_of_the_text() {
    let golden = Golden::read("clip_text_gelu");
    let ids = golden.get("input.input_ids");
    let mask: Vec<f64> = ids.iter().map(|&id| f64::from(u8::from(id != 0.0))).collect();
    assert!(mask.contains(&0.0), "the case has padding");
    let expected = features(&mut harness(&golden, &small(), LENGTH, false));
    for config in [
        ClipTextConfig { pool_type: Pooling::Eos, eos_id: 60, ..small() },
        ClipTextConfig { pool_type: Pooling::LastToken, ..small() },
        small(),
    ] {
        let mut harness = harness(&golden, &config, LENGTH, false);
        harness.set("attention_mask", mask.clone());
        assert_eq!(features(&mut harness), expected, "{:?}", config.pool_type);
        harness.set("input_ids", ids.iter().map(|&id| if id == 0.0 { 7.0 } else { id }));
        assert_eq!(features(&mut harness), expected, "{:?}: later positions are not seen", config.pool_type);
    }
    // Of several ends the first counts; without one the last position does.
    let eos = |eos_id, ids: Vec<f64>| {
        let config = ClipTextConfig { pool_type: Pooling::Eos, eos_id, ..small() };
        let mut harness = harness(&golden, &config, LENGTH, false);
        harness.set("input_ids", ids);
        features(&mut harness)
    };
    let twice = |id: f64| if id == 0.0 { 60.0 } else { id };
    assert_eq!(eos(60, ids.iter().map(|&id| twice(id)).collect()), expected);
    let tokens = |end: f64| -> Vec<f64> {
        (0..BATCH * LENGTH).map(|i| if i % LENGTH == LENGTH - 1 { end } else { 1.0 + (i * 7 % 50) as f64 }).collect()
    };
    assert_eq!(eos(60, tokens(55.0)), eos(55, tokens(55.0)));
    // A text of nothing but padding gives finite features.
    let mut empty = harness(&golden, &ClipTextConfig { pool_type: Pooling::LastToken, ..small() }, LENGTH, false);
    empty.set("attention_mask", vec![0.0; BATCH * LENGTH]);
    assert!(features(&mut empty).iter().all(|v| v.is_finite()));
}

/// Sequences may be shorter than the context; without a projection features are what it reads.
#[test]
fn shorter_sequences_and_no_projection() {
    let golden = Golden::read("clip_text_gelu");
    // The first two ids of each text, pooled at the larger: the start, which sees nothing but itself and what is before.
    let short = features(&mut harness(&golden, &small(), 2, false));
    let mut long = harness(&golden, &small(), LENGTH, false);
    let ids = golden.get("input.input_ids");
    long.set("input_ids", ids.iter().enumerate().map(|(i, &id)| if i % LENGTH < 2 { id } else { 0.0 }));
    assert_eq!(short, features(&mut long));

    let mut bare = harness(&golden, &ClipTextConfig { output_dim: 0, ..small() }, LENGTH, false);
    assert!(bare.leaf("text_projection").is_none());
    let (hidden, projection) = (features(&mut bare), golden.get("param.text_projection"));
    assert_eq!(hidden.len(), BATCH * 32);
    let projected: Vec<f64> =
        (0..BATCH * 24).map(|i| (0..32).map(|d| hidden[i / 24 * 32 + d] * projection[d * 24 + i % 24]).sum()).collect();
    assert_close("projected", &projected, golden.get("eval.output.features"));
}

/// open_clip's own counts, without the scale of the logits.
#[test]
fn presets_have_their_published_sizes() {
    for (preset, tensors, values) in [
        (Preset::VitB32, 149, 63_428_096),
        (Preset::VitB16, 149, 63_428_096),
        (Preset::VitL14, 149, 123_650_304),
        (Preset::VitH14, 293, 354_032_640),
        (Preset::Rn50, 149, 63_690_240),
        (Preset::Rn101, 149, 63_428_096),
        (Preset::Rn50x4, 149, 91_163_520),
        (Preset::Rn50x16, 149, 123_650_304),
        (Preset::Rn50x64, 149, 202_877_952),
    ] {
        let fragment = build(&ClipTextConfig { preset: Some(preset), ..Default::default() }, 77).expect("builds");
        assert_eq!((params(&fragment).len(), count(&fragment)), (tensors, values), "{preset:?}");
    }
    let named = serde_json::json!({ "preset": "ViT-B-32" });
    let config: ClipTextConfig = serde_json::from_value(named).expect("a preset goes by its model's name");
    assert_eq!(config.shape(), ClipTextConfig::default().shape(), "the defaults are ViT-B/32's");
}

#[test]
fn base_model_has_the_published_names_and_initial_values() {
    let fragment = build(&ClipTextConfig::default(), 77).expect("builds");
    let params = params(&fragment);
    assert_eq!(params["token_embedding.weight"], [49408, 512]);
    assert_eq!(params["positional_embedding"], [77, 512]);
    assert_eq!(params["transformer.resblocks.0.attn.in_proj_weight"], [1536, 512]);
    assert_eq!(params["transformer.resblocks.11.attn.in_proj_bias"], [1536]);
    assert_eq!(params["transformer.resblocks.11.mlp.c_fc.weight"], [2048, 512]);
    assert_eq!(params["transformer.resblocks.11.mlp.c_proj.weight"], [512, 2048]);
    assert_eq!(params["ln_final.weight"], [512]);
    assert_eq!(params["text_projection"], [512, 512]);
    let output_std = 1.0 / (512.0f64 * 24.0).sqrt();
    for node in &fragment.nodes {
        let Op::Param { name, init } = &node.op else { continue };
        let (normal, uniform) = (|std| Init::Normal { std }, |bound| Init::Uniform { bound });
        let expected =
            match name.rsplit("resblocks").next().unwrap_or_default().trim_start_matches(['.', '0', '1', '2']) {
                "token_embedding.weight" => normal(0.02),
                "positional_embedding" => normal(0.01),
                "text_projection" => normal(1.0 / 512.0f64.sqrt()),
                part => match part.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.') {
                    "attn.in_proj_weight" => normal(1.0 / 512.0f64.sqrt()),
                    "mlp.c_fc.weight" => normal(1.0 / 1024.0f64.sqrt()),
                    "attn.out_proj.weight" | "mlp.c_proj.weight" => normal(output_std),
                    "mlp.c_fc.bias" => uniform(1.0 / 512.0f64.sqrt()),
                    "mlp.c_proj.bias" => uniform(1.0 / 2048.0f64.sqrt()),
                    part if part.ends_with("bias") => Init::Constant(0.0),
                    _ => Init::Constant(1.0),
                },
            };
        let close = match (*init, expected) {
            (Init::Normal { std: a }, Init::Normal { std: b })
            | (Init::Uniform { bound: a }, Init::Uniform { bound: b }) => (a - b).abs() < 1e-12,
            (a, b) => a == b,
        };
        assert!(close, "{name}: {init:?} is not {expected:?}");
    }
}

#[test]
fn refusals_say_what_is_wrong() {
    let refused = |config: ClipTextConfig, length| match build(&config, length) {
        Ok(_) => panic!("{config:?} was accepted"),
        Err(error) => error.to_string(),
    };
    let error = refused(small(), 15);
    assert!(error.contains("1 to 14 tokens") && error.contains("got 15") && error.contains("hint:"), "{error}");
    let error = refused(ClipTextConfig { heads: 5, ..small() }, 14);
    assert!(error.contains("got 32 and 5"), "{error}");
    let error = refused(ClipTextConfig { heads: 0, ..small() }, 14);
    assert!(error.contains("`heads` in 1..=1024, got 0"), "{error}");
    let error = refused(ClipTextConfig { mlp_ratio: 0.01, ..small() }, 14);
    assert!(error.contains("got 0.01 times 32"), "{error}");
    let error = refused(ClipTextConfig { pool_type: Pooling::Eos, ..small() }, 14);
    assert!(error.contains("`eos_id` in 0..=60, got 49407"), "{error}");
    let error = refused(ClipTextConfig { preset: Some(Preset::Rn50), output_dim: 256, ..Default::default() }, 14);
    assert!(error.contains("preset Rn50 has `output_dim` 1024, the settings say 256"), "{error}");
    let mut images = request(&small(), 2, 12, true);
    images.input = InputShape::Image { height: 8, width: 8 };
    let error = clip_host_plugin_api::encoder::build::<ClipText>(&images).expect_err("images are refused").to_string();
    assert!(error.contains("text_encoder"), "{error}");
    assert!(serde_json::from_value::<ClipTextConfig>(serde_json::json!({ "act": "gelu" })).is_err());
}

#[test]
fn ranges_are_those_of_the_schema() {
    assert_ranges_checked::<ClipTextConfig>(|settings| {
        let request = EncoderRequest { config: settings, ..request(&small(), 2, 12, false) };
        let answer = clip_host_plugin_api::encoder::build::<ClipText>(&request);
        answer.is_err_and(|error| error.to_string().contains("building a clip_text: expected"))
    });
}
