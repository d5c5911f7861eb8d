//! Against timm's MlpMixer: features and all gradients, computed by it in f64.

#[path = "../../testing.rs"]
mod golden;

use clip_encoder_mixer::{Mixer, MixerConfig, Preset};
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::graph::BuildError;
use clip_host_plugin_api::ir::{Fragment, Init, Op};
use clip_host_plugin_api::testing::Harness;
use golden::{Golden, assert_close, assert_ranges_checked, count, params};
use std::collections::BTreeSet;

/// The golden case's network.
fn golden_config() -> MixerConfig {
    MixerConfig { patch_size: 8, num_blocks: 2, embed_dim: 32, ..Default::default() }
}

/// A network of six patches to images of 8x12 pixels.
fn small() -> MixerConfig {
    MixerConfig { patch_size: 4, num_blocks: 1, embed_dim: 8, ..Default::default() }
}

fn request(config: &MixerConfig, [height, width]: [usize; 2], training: bool) -> EncoderRequest {
    let config = serde_json::to_value(config).expect("settings are JSON");
    EncoderRequest { config, batch: 2, input: InputShape::Image { height, width }, training }
}

fn build(config: &MixerConfig, size: usize) -> Result<Fragment, BuildError> {
    clip_host_plugin_api::encoder::build::<Mixer>(&request(config, [size, size], true))
}

/// Dropout is 0: training computes the same.
#[test]
fn features_and_gradients_are_timms() {
    let golden = Golden::read("mixer");
    for training in [false, true] {
        let mut harness = Harness::encoder::<Mixer>(&request(&golden_config(), [32, 32], training)).expect("builds");
        for (name, values) in golden.under("param.") {
            assert!(harness.leaf(name).is_some(), "there is no leaf `{name}`");
            harness.set(name, values.iter().copied());
        }
        harness.set("images", golden.get("input.image").iter().copied());
        let mut wrt: Vec<&str> = golden.under("eval.grad.").map(|(name, _)| name).collect();
        assert_eq!(wrt.len(), params(&harness.fragment).len(), "all parameters are compared");
        wrt.push("images");
        let step = harness.step(Some(("features", Some(golden.get("cotangent.features")))), &wrt).expect("runs");
        assert_close("features", &step.outputs["features"], golden.get("eval.output.features"));
        for (name, expected) in golden.under("eval.grad.") {
            assert_close(&format!("gradient of {name}"), &step.grads[name], expected);
        }
        assert_close("gradient of images", &step.grads["images"], golden.get("eval.grad_input.image"));
    }
}

/// Features of two images of 8x12, with weights and pixels from formulas.
fn features(config: &MixerConfig, training: bool, seed: u64) -> Vec<f64> {
    let mut harness = Harness::encoder::<Mixer>(&request(config, [8, 12], training)).expect("builds");
    let sizes: Vec<(String, usize)> =
        params(&harness.fragment).iter().map(|(name, shape)| (name.to_string(), shape.iter().product())).collect();
    for (p, (name, size)) in sizes.into_iter().enumerate() {
        harness.set(&name, (0..size).map(|i| 0.3 * (1.7 * p as f64 + 0.9 * i as f64 + 0.5).sin()));
    }
    harness.set("images", (0..2 * 3 * 8 * 12).map(|i| (0.31 * f64::from(i)).cos()));
    harness.seed = seed;
    harness.step(None, &[]).expect("runs").outputs["features"].clone()
}

/// Dropout is on in training only, and a new draw with every seed.
#[test]
fn dropout() {
    let plain = features(&small(), false, 0);
    let rates: [fn(&mut MixerConfig); 2] = [|config| config.proj_drop_rate = 0.3, |config| config.drop_path_rate = 0.5];
    for (kind, set) in rates.into_iter().enumerate() {
        let mut config = small();
        set(&mut config);
        assert_eq!(features(&config, true, 1), features(&config, true, 1));
        assert!((2..6).any(|seed| features(&config, true, seed) != features(&config, true, 1)), "kind {kind}");
        assert_eq!(features(&config, false, 1), plain, "kind {kind} is off in evaluation");
    }
    // An image keeps or loses each of the two branches of the one block.
    let config = MixerConfig { drop_path_rate: 0.5, ..small() };
    let first = |seed| features(&config, true, seed)[..8].iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!((0..40).map(first).collect::<BTreeSet<_>>().len(), 4);
}

/// timm's own counts, without a classifier.
#[test]
fn presets_have_their_published_sizes() {
    for (preset, tensors, values) in [
        (Preset::Small32, 100, 18_591_624),
        (Preset::Small16, 100, 18_015_264),
        (Preset::Base32, 148, 59_524_428),
        (Preset::Base16, 148, 59_111_472),
        (Preset::Large32, 292, 205_914_264),
        (Preset::Large16, 292, 207_171_168),
    ] {
        let fragment = build(&MixerConfig { preset: Some(preset), ..Default::default() }, 224).expect("builds");
        assert_eq!((params(&fragment).len(), count(&fragment)), (tensors, values), "{preset:?}");
    }
    let named = serde_json::json!({ "preset": "mixer_b32_224" });
    let config: MixerConfig = serde_json::from_value(named).expect("a preset goes by timm's name");
    assert_eq!(config.shape(), MixerConfig::default().shape(), "the defaults are Mixer-B/32's");
    let fragment = build(&config, 256).expect("builds");
    let params = params(&fragment);
    assert_eq!(params["stem.proj.weight"], [768, 3, 32, 32]);
    assert_eq!(params["blocks.11.mlp_tokens.fc1.weight"], [384, 64], "tokens follow the images' size");
    assert_eq!(params["blocks.11.mlp_tokens.fc2.bias"], [64]);
    assert_eq!(params["blocks.11.mlp_channels.fc1.weight"], [3072, 768]);
    assert_eq!(params["norm.weight"], [768]);
}

#[test]
fn initial_values() {
    let fragment = build(&small(), 8).expect("builds");
    for node in &fragment.nodes {
        let Op::Param { name, init } = &node.op else { continue };
        let expected = match name.as_str() {
            "stem.proj.weight" => Init::TruncatedNormal { std: 1.0 / 48.0f64.sqrt() / 0.8796256610342398 },
            "stem.proj.bias" => Init::Constant(0.0),
            name if name.contains("norm") && name.ends_with("weight") => Init::Constant(1.0),
            name if name.contains("norm") => Init::Constant(0.0),
            name if name.ends_with("bias") => Init::Normal { std: 1e-6 },
            _ => Init::Uniform { bound: (6.0 / node.shape.iter().sum::<usize>() as f64).sqrt() },
        };
        assert_eq!(*init, expected, "{name}");
    }
}

#[test]
fn refusals_say_what_is_wrong() {
    let refused = |config: MixerConfig, size| match build(&config, size) {
        Ok(_) => panic!("{config:?} was accepted"),
        Err(error) => error.to_string(),
    };
    let error = refused(small(), 10);
    assert!(error.contains("the patch's 4 pixels, got 10x10") && error.contains("hint:"), "{error}");
    let error = refused(MixerConfig { num_blocks: 0, ..small() }, 8);
    assert!(error.contains("`num_blocks` in 1..=1024, got 0"), "{error}");
    let error = refused(MixerConfig { mlp_ratio: [0.1, 4.0], ..small() }, 8);
    assert!(error.contains("got 0.1 times 8"), "{error}");
    let preset = Some(Preset::Small16);
    let error = refused(MixerConfig { preset, num_blocks: 6, ..Default::default() }, 32);
    assert!(error.contains("preset Small16 has `num_blocks` 8, the settings say 6"), "{error}");
    let mut text = request(&small(), [8, 8], true);
    text.input = InputShape::Text { length: 4 };
    let error = clip_host_plugin_api::encoder::build::<Mixer>(&text).expect_err("text is refused").to_string();
    assert!(error.contains("image_encoder"), "{error}");
    assert!(serde_json::from_value::<MixerConfig>(serde_json::json!({ "patch": 8 })).is_err());
}

#[test]
fn ranges_are_those_of_the_schema() {
    assert_ranges_checked::<MixerConfig>(|settings| {
        let request = EncoderRequest { config: settings, ..request(&small(), [32, 32], false) };
        let answer = clip_host_plugin_api::encoder::build::<Mixer>(&request);
        answer.is_err_and(|error| error.to_string().contains("building a mixer: expected"))
    });
}
