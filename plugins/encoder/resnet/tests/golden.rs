//! Against timm's ResNet: outputs, all gradients and the running statistics, computed by it in f64.

#[path = "../../testing.rs"]
mod golden;

use clip_encoder_resnet::{Block, Preset, ResNet, ResNetConfig, Stem};
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::graph::BuildError;
use clip_host_plugin_api::ir::{Fragment, Init, Op};
use clip_host_plugin_api::testing::Harness;
use golden::{Golden, assert_close, assert_ranges_checked, count, params};

fn request(config: &ResNetConfig, batch: usize, size: usize, training: bool) -> EncoderRequest {
    let config = serde_json::to_value(config).expect("settings are JSON");
    EncoderRequest { config, batch, input: InputShape::Image { height: size, width: size }, training }
}

fn build(config: &ResNetConfig, batch: usize, size: usize, training: bool) -> Result<Fragment, BuildError> {
    clip_host_plugin_api::encoder::build::<ResNet>(&request(config, batch, size, training))
}

/// Compares one golden case in one mode.
fn compare(name: &str, block: Block, channels: [usize; 4], training: bool) {
    let config = ResNetConfig { block, layers: [1, 2, 1, 1], channels, ..Default::default() };
    let golden = Golden::read(name);
    let mut harness = Harness::encoder::<ResNet>(&request(&config, 3, 40, training)).expect("builds");
    for (name, values) in golden.under("param.") {
        assert!(harness.leaf(name).is_some(), "there is no leaf `{name}`");
        harness.set(name, values.iter().copied());
    }
    harness.set("images", golden.get("input.image").iter().copied());

    let mode = if training { "train" } else { "eval" };
    let prefix = format!("{mode}.grad.");
    let mut wrt: Vec<&str> = golden.under(&prefix).map(|(name, _)| name).collect();
    assert_eq!(wrt.len(), params(&harness.fragment).len(), "all parameters are compared");
    wrt.push("images");
    let step = harness.step(Some(("features", Some(golden.get("cotangent.features")))), &wrt).expect("runs");

    assert_close("features", &step.outputs["features"], golden.get(&format!("{mode}.output.features")));
    for (name, expected) in golden.under(&prefix) {
        assert_close(&format!("gradient of {name}"), &step.grads[name], expected);
    }
    assert_close("gradient of images", &step.grads["images"], golden.get(&format!("{mode}.grad_input.image")));
    if training {
        let buffers: Vec<_> = golden.under("train.buffer_after.").collect();
        assert_eq!(buffers.len(), harness.fragment.updates.len(), "all buffers are compared");
        for (name, expected) in buffers {
            assert_close(name, &harness.values[name], expected);
        }
    } else {
        assert!(harness.fragment.updates.is_empty(), "evaluation moves nothing");
    }
}

#[test]
fn basic_eval_is_timms() {
    compare("resnet_basic", Block::Basic, [8, 12, 16, 20], false);
}

#[test]
fn basic_train_is_timms() {
    compare("resnet_basic", Block::Basic, [8, 12, 16, 20], true);
}

#[test]
fn bottleneck_eval_is_timms() {
    compare("resnet_bottleneck", Block::Bottleneck, [6, 8, 10, 12], false);
}

#[test]
fn bottleneck_train_is_timms() {
    compare("resnet_bottleneck", Block::Bottleneck, [6, 8, 10, 12], true);
}

/// Parameter counts of timm's models without their classifier (their published counts less 1000 · (features + 1)).
#[test]
fn presets_have_timms_sizes() {
    let published = [
        (Preset::ResNet18, 11_689_512, 512),
        (Preset::ResNet26, 15_995_176, 2048),
        (Preset::ResNet34, 21_797_672, 512),
        (Preset::ResNet50, 25_557_032, 2048),
        (Preset::ResNet101, 44_549_160, 2048),
        (Preset::ResNet152, 60_192_808, 2048),
    ];
    for (preset, with_classifier, features) in published {
        let config = ResNetConfig { preset: Some(preset), ..Default::default() };
        let fragment = build(&config, 2, 224, true).expect("builds");
        assert_eq!(count(&fragment), with_classifier - 1000 * (features + 1), "{preset:?}");
        assert_eq!(config.features(), Ok(features));
        let id = fragment.output("features").expect("has features");
        assert_eq!(fragment.nodes[id as usize].shape, [2, features]);
    }
    let resnet50 = build(&ResNetConfig::default(), 2, 224, false).expect("builds");
    assert_eq!(count(&resnet50), 23_508_032);
    let params = params(&resnet50);
    assert_eq!(params.len(), 159);
    assert_eq!(params["conv1.weight"], [64, 3, 7, 7]);
    assert_eq!(params["layer1.0.downsample.0.weight"], [256, 64, 1, 1]);
    assert_eq!(params["layer3.5.conv2.weight"], [256, 256, 3, 3]);
    assert_eq!(params["layer4.2.bn3.bias"], [2048]);
}

/// Names, shapes and downsampling of the stems.
#[test]
fn stems() {
    let config = |stem, stem_width| ResNetConfig { stem, stem_width, ..Default::default() };
    // timm's resnet50c: 25,576,264 parameters less a classifier of 2,049,000 (the wider stem is all that differs).
    let deep = build(&config(Stem::Deep, 32), 2, 64, true).expect("builds");
    let shapes = params(&deep);
    assert_eq!(shapes["conv1.0.weight"], [32, 3, 3, 3]);
    assert_eq!(shapes["conv1.1.weight"], [32]);
    assert_eq!(shapes["conv1.3.weight"], [32, 32, 3, 3]);
    assert_eq!(shapes["conv1.4.bias"], [32]);
    assert_eq!(shapes["conv1.6.weight"], [64, 32, 3, 3]);
    assert_eq!(shapes["bn1.weight"], [64]);
    assert_eq!(count(&deep), 23_508_032 - 64 * 3 * 49 + 32 * 27 + 32 * 32 * 9 + 64 * 32 * 9 + 4 * 32);

    let small = build(&config(Stem::Plain3x3, 64), 2, 32, true).expect("builds");
    assert_eq!(params(&small)["conv1.weight"], [64, 3, 3, 3]);
    let last = |fragment: &Fragment| {
        let mut convs = fragment.nodes.iter().filter(|n| matches!(n.op, Op::Conv2d(_)));
        convs.next_back().map(|n| n.shape[2..].to_vec())
    };
    assert_eq!(last(&small), Some(vec![4, 4]));
    assert_eq!(last(&deep), Some(vec![2, 2]));
}

/// Kaiming-normal convolutions by fan-out, batch norms at 1 but for the last of each block.
#[test]
fn initial_values() {
    for zero_init_last in [true, false] {
        let fragment = build(&ResNetConfig { zero_init_last, ..Default::default() }, 2, 64, true).expect("builds");
        for node in &fragment.nodes {
            let Op::Param { name, init } = &node.op else { continue };
            let expected = match node.shape.as_slice() {
                &[out, _, h, w] => Init::Normal { std: (2.0 / (out * h * w) as f64).sqrt() },
                _ if name.ends_with("bias") => Init::Constant(0.0),
                _ if name.ends_with("bn3.weight") && zero_init_last => Init::Constant(0.0),
                _ => Init::Constant(1.0),
            };
            assert_eq!(*init, expected, "{name}");
        }
    }
}

/// Where both the shortcut and the branch are exactly 0, no gradient passes (PyTorch's relu).
#[test]
fn relu_passes_nothing_at_zero() {
    let config = ResNetConfig {
        block: Block::Basic,
        layers: [1, 1, 1, 1],
        channels: [2, 2, 2, 2],
        stem: Stem::Plain3x3,
        stem_width: 2,
        ..Default::default()
    };
    let mut harness = Harness::encoder::<ResNet>(&request(&config, 1, 16, true)).expect("builds");
    let convs: Vec<(String, usize)> = params(&harness.fragment)
        .iter()
        .filter(|(_, shape)| shape.len() == 4)
        .map(|(name, shape)| (name.to_string(), shape.iter().product()))
        .collect();
    for (name, size) in convs {
        harness.set(&name, (0..size).map(|i| ((i * 7 % 11) as f64 - 5.0) / 10.0));
    }
    harness.set("images", (0..768).map(|i| ((i * 29 % 83) as f64 - 41.0) / 40.0));
    // Without a downsampling, layer1 is relu(relu(stem) + 0) at the start: its bias moves only what relu(stem) lets
    // through, so the gradients of the stem's bias and of the block's last bias are the same.
    let step = harness.step(Some(("features", None)), &["bn1.bias", "layer1.0.bn2.bias"]).expect("runs");
    assert!(step.grads["bn1.bias"].iter().any(|g| g.abs() > 1e-6), "some gradient arrives");
    assert_close("gradient", &step.grads["layer1.0.bn2.bias"], &step.grads["bn1.bias"]);
}

#[test]
fn refusals_say_what_is_wrong() {
    let refused = |config: ResNetConfig, batch, size| match build(&config, batch, size, true) {
        Ok(_) => panic!("{config:?} was accepted"),
        Err(error) => error.to_string(),
    };
    let error = refused(ResNetConfig { layers: [1, 0, 1, 1], ..Default::default() }, 2, 64);
    assert!(error.contains("`layers` in 1..=256, got 0"), "{error}");
    let error = refused(ResNetConfig { bn_eps: f64::NAN, ..Default::default() }, 2, 64);
    assert!(error.contains("`bn_eps`") || error.contains("settings of `resnet`"), "{error}");
    let preset = Some(Preset::ResNet18);
    let error = refused(ResNetConfig { preset, layers: [1, 1, 1, 1], ..Default::default() }, 2, 64);
    assert!(error.contains("preset ResNet18 has layers [2, 2, 2, 2]") && error.contains("hint:"), "{error}");
    let preset = Some(Preset::ResNet50);
    let error = refused(ResNetConfig { preset, block: Block::Basic, ..Default::default() }, 2, 64);
    assert!(error.contains("Bottleneck blocks"), "{error}");
    let error = refused(ResNetConfig::default(), 1, 32);
    assert!(error.contains("`layer4.0.bn2`") && error.contains("got 1"), "{error}");
    let mut text = request(&ResNetConfig::default(), 2, 64, true);
    text.input = InputShape::Text { length: 4 };
    let error = clip_host_plugin_api::encoder::build::<ResNet>(&text).expect_err("text is refused").to_string();
    assert!(error.contains("image_encoder"), "{error}");
    let unknown = serde_json::json!({ "depth": 50 });
    assert!(serde_json::from_value::<ResNetConfig>(unknown).is_err());
    let written = serde_json::json!({ "preset": "resnet18", "stem": "7x7", "block": "basic" });
    assert!(serde_json::from_value::<ResNetConfig>(written).is_ok());
}

#[test]
fn ranges_are_those_of_the_schema() {
    assert_ranges_checked::<ResNetConfig>(|settings| {
        let request = EncoderRequest { config: settings, ..request(&ResNetConfig::default(), 2, 32, false) };
        let answer = clip_host_plugin_api::encoder::build::<ResNet>(&request);
        answer.is_err_and(|error| error.to_string().contains("building a resnet: expected"))
    });
}
