//! Against timm's ConvNeXt: features and all gradients, computed by it in f64.

#[path = "../../testing.rs"]
mod golden;

use clip_encoder_convnext::{ConvNext, ConvNextConfig, Preset};
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::graph::BuildError;
use clip_host_plugin_api::ir::{Fragment, Init, Op};
use clip_host_plugin_api::testing::Harness;
use golden::{Golden, assert_close, assert_ranges_checked, count, params};
use std::collections::BTreeSet;

/// The golden case's network.
fn golden_config() -> ConvNextConfig {
    ConvNextConfig { depths: [1, 1, 2, 1], dims: [8, 12, 16, 24], ..Default::default() }
}

/// A network of a block in each stage.
fn small() -> ConvNextConfig {
    ConvNextConfig { depths: [1; 4], dims: [4, 6, 8, 5], kernel_size: 3, ..Default::default() }
}

fn request(config: &ConvNextConfig, [height, width]: [usize; 2], training: bool) -> EncoderRequest {
    let config = serde_json::to_value(config).expect("settings are JSON");
    EncoderRequest { config, batch: 2, input: InputShape::Image { height, width }, training }
}

fn build(config: &ConvNextConfig, size: usize) -> Result<Fragment, BuildError> {
    clip_host_plugin_api::encoder::build::<ConvNext>(&request(config, [size, size], true))
}

/// There is nothing random: training computes the same.
#[test]
fn features_and_gradients_are_timms() {
    let golden = Golden::read("convnext");
    for training in [false, true] {
        let mut harness = Harness::encoder::<ConvNext>(&request(&golden_config(), [64, 64], training)).expect("builds");
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

/// Features of two images of 40x52, with weights and pixels from formulas.
fn features(config: &ConvNextConfig, training: bool, seed: u64) -> Vec<f64> {
    let mut harness = Harness::encoder::<ConvNext>(&request(config, [40, 52], training)).expect("builds");
    let sizes: Vec<(String, usize)> =
        params(&harness.fragment).iter().map(|(name, shape)| (name.to_string(), shape.iter().product())).collect();
    for (p, (name, size)) in sizes.into_iter().enumerate() {
        harness.set(&name, (0..size).map(|i| 0.3 * (1.7 * p as f64 + 0.9 * i as f64 + 0.5).sin()));
    }
    harness.set("images", (0..2 * 3 * 40 * 52).map(|i| (0.31 * f64::from(i)).cos()));
    harness.seed = seed;
    harness.step(None, &[]).expect("runs").outputs["features"].clone()
}

/// A kernel, sides that no stride divides, and no layer scale, which the golden case does not have. The numbers are timm
/// 1.0.31's, from
///
/// ```python
/// torch.set_default_dtype(torch.float64)
/// net = ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 6, 8, 5), num_classes=0, norm_eps=1e-6, **settings).eval()
/// for p, (name, param) in enumerate(sorted(net.named_parameters())):
///     param.data = (0.3 * torch.sin(1.7 * p + 0.9 * torch.arange(param.numel()) + 0.5)).reshape(param.shape)
/// net(torch.cos(0.31 * torch.arange(2 * 3 * 40 * 52)).reshape(2, 3, 40, 52))
/// ```
#[test]
fn other_settings_are_timms() {
    let no_scale = ConvNextConfig { kernel_size: 7, ls_init_value: None, ..small() };
    for (name, config, expected) in [
        (
            "kernel_sizes=3",
            small(),
            [
                -0.1026514512,
                0.3188752083,
                0.2481693764,
                -0.004431712694,
                -0.1486470109,
                -0.1056436946,
                0.3188806618,
                0.2505349156,
                -0.004737871801,
                -0.1516129934,
            ],
        ),
        (
            "ls_init_value=None",
            no_scale,
            [
                0.3405949656,
                0.2967069336,
                0.1191944548,
                0.555423378,
                -0.3272109419,
                0.3437763397,
                0.2964473072,
                0.1166145266,
                0.5539849634,
                -0.3260196575,
            ],
        ),
    ] {
        assert_close(name, &features(&config, false, 0), &expected);
    }
}

/// Stochastic depth is on in training only; the first block is never skipped.
#[test]
fn stochastic_depth() {
    let config = ConvNextConfig { drop_path_rate: 0.5, ..small() };
    assert_eq!(features(&config, false, 1), features(&small(), false, 0));
    let first_image = |seed| features(&config, true, seed)[..5].iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(first_image(1), first_image(1));
    // Blocks 1 to 3 are there or not.
    let outcomes = (0..80).map(first_image).collect::<BTreeSet<_>>().len();
    assert!((5..=8).contains(&outcomes), "{outcomes} outcomes");
}

/// timm's own counts, without a classifier.
#[test]
fn presets_have_their_published_sizes() {
    for (preset, tensors, values) in [
        (Preset::Tiny, 180, 27_820_128),
        (Preset::Small, 342, 49_454_688),
        (Preset::Base, 342, 87_566_464),
        (Preset::Large, 342, 196_230_336),
        (Preset::XLarge, 342, 348_147_968),
    ] {
        let fragment = build(&ConvNextConfig { preset: Some(preset), ..Default::default() }, 224).expect("builds");
        assert_eq!((params(&fragment).len(), count(&fragment)), (tensors, values), "{preset:?}");
    }
    let named = serde_json::json!({ "preset": "convnext_tiny" });
    let config: ConvNextConfig = serde_json::from_value(named).expect("a preset goes by timm's name");
    assert_eq!(config.shape(), ConvNextConfig::default().shape(), "the defaults are ConvNeXt-T's");
    let fragment = build(&config, 256).expect("builds");
    let params = params(&fragment);
    assert_eq!(params["stem.0.weight"], [96, 3, 4, 4]);
    assert_eq!(params["stages.1.downsample.1.weight"], [192, 96, 2, 2]);
    assert_eq!(params["stages.2.blocks.8.conv_dw.weight"], [384, 1, 7, 7]);
    assert_eq!(params["stages.3.blocks.2.mlp.fc1.weight"], [3072, 768]);
    assert_eq!(params["stages.3.blocks.2.gamma"], [768]);
    assert_eq!(params["head.norm.bias"], [768]);
}

#[test]
fn initial_values() {
    let fragment = build(&small(), 32).expect("builds");
    for node in &fragment.nodes {
        let Op::Param { name, init } = &node.op else { continue };
        let expected = match name.as_str() {
            name if name.ends_with("bias") => Init::Constant(0.0),
            name if name.ends_with("gamma") => Init::Constant(1e-6),
            _ if node.shape.len() == 1 => Init::Constant(1.0),
            _ => Init::Normal { std: 0.02 },
        };
        assert_eq!(*init, expected, "{name}");
    }
    let without = |config: ConvNextConfig, part: &str| {
        let fragment = build(&config, 32).expect("builds");
        params(&fragment).into_keys().all(|name| !name.ends_with(part))
    };
    assert!(without(ConvNextConfig { ls_init_value: None, ..small() }, "gamma"));
    assert!(without(ConvNextConfig { conv_bias: false, ..small() }, "conv_dw.bias"));
}

#[test]
fn refusals_say_what_is_wrong() {
    let refused = |config: ConvNextConfig, size| match build(&config, size) {
        Ok(_) => panic!("{config:?} was accepted"),
        Err(error) => error.to_string(),
    };
    let error = refused(small(), 31);
    assert!(error.contains("at least 32 pixels") && error.contains("got 31x31 (hint:"), "{error}");
    let error = refused(ConvNextConfig { kernel_size: 4, ..small() }, 32);
    assert!(error.contains("odd `kernel_size`, got 4"), "{error}");
    let error = refused(ConvNextConfig { depths: [1, 0, 1, 1], ..small() }, 32);
    assert!(error.contains("`depths` in 1..=256, got 0"), "{error}");
    let error = refused(ConvNextConfig { mlp_ratio: 0.2, ..small() }, 32);
    assert!(error.contains("got 0.2 times 4"), "{error}");
    let error = refused(ConvNextConfig { preset: Some(Preset::Base), dims: [4, 8, 16, 32], ..Default::default() }, 32);
    let words = "preset Base has `dims` [128, 256, 512, 1024], the settings say [4, 8, 16, 32]";
    assert!(error.contains(words), "{error}");
    let mut text = request(&small(), [32, 32], true);
    text.input = InputShape::Text { length: 4 };
    let error = clip_host_plugin_api::encoder::build::<ConvNext>(&text).expect_err("text is refused").to_string();
    assert!(error.contains("image_encoder"), "{error}");
    assert!(serde_json::from_value::<ConvNextConfig>(serde_json::json!({ "layers": [1, 1, 1, 1] })).is_err());
}

#[test]
fn ranges_are_those_of_the_schema() {
    assert_ranges_checked::<ConvNextConfig>(|settings| {
        let request = EncoderRequest { config: settings, ..request(&small(), [32, 32], false) };
        let answer = clip_host_plugin_api::encoder::build::<ConvNext>(&request);
        answer.is_err_and(|error| error.to_string().contains("building a convnext: expected"))
    });
}
