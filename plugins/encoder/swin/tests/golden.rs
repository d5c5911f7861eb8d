//! Against timm's SwinTransformer: features and all gradients, computed by it in f64.

#[path = "../../testing.rs"]
mod golden;

use clip_encoder_swin::window::Windows;
use clip_encoder_swin::{Preset, Swin, SwinConfig};
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::graph::{BuildError, Graph};
use clip_host_plugin_api::ir::{DType, Fragment, Init, Op};
use clip_host_plugin_api::testing::Harness;
use golden::{Golden, assert_close, assert_ranges_checked, count, params};
use std::collections::BTreeSet;

/// The golden case's network.
fn golden_config() -> SwinConfig {
    SwinConfig {
        patch_size: 2,
        window_size: 4,
        embed_dim: 16,
        depths: vec![2, 2],
        num_heads: vec![2, 4],
        mlp_ratio: 2.0,
        drop_path_rate: 0.0,
        ..Default::default()
    }
}

fn small() -> SwinConfig {
    SwinConfig { embed_dim: 8, num_heads: vec![2, 2], mlp_ratio: 1.5, ..golden_config() }
}

fn request(config: &SwinConfig, [height, width]: [usize; 2], training: bool) -> EncoderRequest {
    let config = serde_json::to_value(config).expect("settings are JSON");
    EncoderRequest { config, batch: 2, input: InputShape::Image { height, width }, training }
}

fn build(config: &SwinConfig, size: usize) -> Result<Fragment, BuildError> {
    clip_host_plugin_api::encoder::build::<Swin>(&request(config, [size, size], true))
}

/// Dropout is 0: training computes the same.
#[test]
fn features_and_gradients_are_timms() {
    let golden = Golden::read("swin");
    for training in [false, true] {
        let mut harness = Harness::encoder::<Swin>(&request(&golden_config(), [32, 32], training)).expect("builds");
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

/// Features of two images, with weights and pixels from formulas.
fn features(config: &SwinConfig, size: [usize; 2], training: bool, seed: u64) -> Vec<f64> {
    let mut harness = Harness::encoder::<Swin>(&request(config, size, training)).expect("builds");
    let sizes: Vec<(String, usize)> =
        params(&harness.fragment).iter().map(|(name, shape)| (name.to_string(), shape.iter().product())).collect();
    for (p, (name, size)) in sizes.into_iter().enumerate() {
        harness.set(&name, (0..size).map(|i| 0.3 * (1.7 * p as f64 + 0.9 * i as f64 + 0.5).sin()));
    }
    harness.set("images", (0..2 * 3 * size[0] * size[1]).map(|i| (0.31 * i as f64).cos()));
    harness.seed = seed;
    harness.step(None, &[]).expect("runs").outputs["features"].clone()
}

/// Sizes and settings that the golden case does not have: windows that must be filled up, odd sides to merge, images
/// smaller than a window in one direction. The numbers are timm 1.0.31's, from
///
/// ```python
/// torch.set_default_dtype(torch.float64)
/// net = SwinTransformer(img_size=(h, w), patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(2, 2), mlp_ratio=1.5,
///                       num_classes=0, **settings).eval()
/// for p, (name, param) in enumerate(sorted(net.named_parameters())):
///     param.data = (0.3 * torch.sin(1.7 * p + 0.9 * torch.arange(param.numel()) + 0.5)).reshape(param.shape)
/// net(torch.cos(0.31 * torch.arange(2 * 3 * h * w)).reshape(2, 3, h, w))
/// ```
#[test]
fn other_settings_are_timms() {
    let cases = [
        (
            "padded windows",
            [18, 26],
            small(),
            [
                -0.1797926927,
                0.2350623439,
                0.3370480913,
                -0.3427402064,
                0.1432266796,
                -0.1858750776,
                -0.0572928601,
                -0.05211099277,
                0.03248719584,
                0.2948276839,
                -0.133805112,
                0.1003568617,
                -0.2191605653,
                -0.1103463545,
                0.1164710713,
                -0.1655995036,
                -0.1798028112,
                0.2350144673,
                0.3370356571,
                -0.3426542606,
                0.143057093,
                -0.1858226192,
                -0.05725387631,
                -0.05198930343,
                0.03234745915,
                0.2948019857,
                -0.13371361,
                0.100262129,
                -0.2191486914,
                -0.1103758794,
                0.1167025258,
                -0.1657938063,
            ],
        ),
        (
            "window as large as one side",
            [6, 20],
            SwinConfig { window_size: 3, ..small() },
            [
                -0.1636389041,
                0.2288892148,
                0.337578679,
                -0.3493754448,
                0.1519619735,
                -0.1887545566,
                -0.06525923105,
                -0.04008747063,
                0.03005056992,
                0.296248691,
                -0.1460322188,
                0.1123489813,
                -0.2213911192,
                -0.1153124266,
                0.1217548445,
                -0.164125611,
                -0.1637411745,
                0.228936628,
                0.337576797,
                -0.3493226847,
                0.1518724157,
                -0.1887242077,
                -0.06519997,
                -0.04016685083,
                0.0300719383,
                0.2962410186,
                -0.1459429195,
                0.1122354572,
                -0.2213629865,
                -0.1152681593,
                0.1217185151,
                -0.1641329591,
            ],
        ),
        (
            "no qkv bias, window 5",
            [18, 14],
            SwinConfig { window_size: 5, qkv_bias: false, ..small() },
            [
                -0.5082217904,
                0.5193974304,
                0.005227449332,
                0.1678012965,
                -0.06801990613,
                -0.1278797906,
                -0.2855896004,
                -0.2671471873,
                0.1004266214,
                0.185243722,
                0.3292290451,
                -0.2766998071,
                -0.1063532219,
                -0.2934993805,
                0.04251573388,
                -0.3541436248,
                -0.5095388331,
                0.5199315165,
                0.005884412131,
                0.1688153226,
                -0.07068845679,
                -0.1258164242,
                -0.2854755601,
                -0.2679756806,
                0.100240082,
                0.186148491,
                0.3305149936,
                -0.2794068779,
                -0.1046836325,
                -0.2934062464,
                0.04238572623,
                -0.3549077155,
            ],
        ),
    ];
    for (name, size, config, expected) in cases {
        assert_close(name, &features(&config, size, false, 0), &expected);
    }
}

/// Every token is in one window, comes back to its place, and has the same gradient.
#[test]
fn windows_are_put_back_together() {
    for (image, size, shifted) in
        [([8, 8], 4, false), ([8, 8], 4, true), ([5, 9], 4, true), ([3, 10], 4, true), ([2, 2], 7, true)]
    {
        let windows = Windows::new(image, size, shifted);
        let graph = Graph::new();
        let x = graph.input("x", &[2, image[0], image[1], 3], DType::F32);
        let cut = windows.cut(x);
        assert_eq!(cut.shape(), [2 * windows.count(), windows.area(), 3]);
        let joined = windows.join(cut);
        assert_eq!(joined.shape(), x.shape());
        graph.output("cut", cut);
        graph.output("joined", joined);
        let mut harness = Harness::new(graph.finish().expect("builds"));
        let elements = 2 * image[0] * image[1] * 3;
        let values: Vec<f64> = (1..=elements).map(|i| i as f64).collect();
        harness.set("x", values.clone());
        let step = harness.step(Some(("joined", Some(&values))), &["x"]).expect("runs");
        assert_eq!(step.outputs["joined"], values);
        assert_eq!(step.grads["x"], values);
        let mut cut: Vec<f64> = step.outputs["cut"].iter().copied().filter(|v| *v != 0.0).collect();
        cut.sort_by(f64::total_cmp);
        assert_eq!(cut, values, "{windows:?}");
    }
}

/// Dropout is on in training only, and a new draw with every seed.
#[test]
fn dropout() {
    let size = [8, 8];
    let plain = features(&small(), size, false, 0);
    let rates: [fn(&mut SwinConfig); 3] = [
        |config| config.proj_drop_rate = 0.3,
        |config| config.attn_drop_rate = 0.3,
        |config| config.drop_path_rate = 0.5,
    ];
    for (kind, set) in rates.into_iter().enumerate() {
        let mut config = small();
        set(&mut config);
        let train = |seed| features(&config, size, true, seed);
        assert_eq!(train(1), train(1));
        assert!((2..6).any(|seed| train(seed) != train(1)), "kind {kind} drops something");
        assert_eq!(features(&config, size, false, 1), plain, "kind {kind} is off in evaluation");
    }
    // The first block is never skipped; of the second each image keeps or loses each of the two branches.
    let config = SwinConfig { depths: vec![2], num_heads: vec![2], drop_path_rate: 0.5, ..small() };
    let first = |seed| features(&config, size, true, seed)[..8].iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!((0..40).map(first).collect::<BTreeSet<_>>().len(), 4);
}

/// timm's own counts, without a classifier.
#[test]
fn presets_have_their_published_sizes() {
    for (preset, tensors, values) in [
        (Preset::Tiny, 171, 27_519_354),
        (Preset::Small, 327, 48_837_258),
        (Preset::Base, 327, 86_743_224),
        (Preset::Large, 327, 194_995_476),
    ] {
        let fragment = build(&SwinConfig { preset: Some(preset), ..Default::default() }, 224).expect("builds");
        assert_eq!((params(&fragment).len(), count(&fragment)), (tensors, values), "{preset:?}");
    }
    for (preset, tensors, values) in [(Preset::Base12, 327, 86_878_584), (Preset::Large12, 327, 195_198_516)] {
        let fragment = build(&SwinConfig { preset: Some(preset), ..Default::default() }, 384).expect("builds");
        assert_eq!((params(&fragment).len(), count(&fragment)), (tensors, values), "{preset:?}");
    }
    let named = serde_json::json!({ "preset": "swin_tiny_patch4_window7_224" });
    let config: SwinConfig = serde_json::from_value(named).expect("a preset goes by timm's name");
    assert_eq!(config.shape(), SwinConfig::default().shape(), "the defaults are Swin-T's");
    let fragment = build(&config, 256).expect("builds");
    let params = params(&fragment);
    assert_eq!(params["patch_embed.proj.weight"], [96, 3, 4, 4]);
    assert_eq!(params["layers.1.downsample.reduction.weight"], [192, 384]);
    assert_eq!(params["layers.2.blocks.5.attn.relative_position_bias_table"], [169, 12]);
    assert_eq!(params["layers.3.blocks.1.attn.qkv.weight"], [2304, 768]);
    assert_eq!(params["layers.3.blocks.1.mlp.fc1.bias"], [3072]);
    assert_eq!(params["norm.weight"], [768]);
}

#[test]
fn initial_values() {
    let fragment = build(&small(), 8).expect("builds");
    for node in &fragment.nodes {
        let Op::Param { name, init } = &node.op else { continue };
        let expected = match name.as_str() {
            // torch.nn.Conv2d's own: uniform by the fan-in, the bias too.
            "patch_embed.proj.weight" | "patch_embed.proj.bias" => Init::Uniform { bound: 1.0 / 12.0f64.sqrt() },
            name if name.contains("norm") && name.ends_with("weight") => Init::Constant(1.0),
            name if name.ends_with("bias") => Init::Constant(0.0),
            _ => Init::Normal { std: 0.02 },
        };
        assert_eq!(*init, expected, "{name}");
    }
}

#[test]
fn refusals_say_what_is_wrong() {
    let refused = |config: SwinConfig, size| match build(&config, size) {
        Ok(_) => panic!("{config:?} was accepted"),
        Err(error) => error.to_string(),
    };
    let error = refused(small(), 9);
    assert!(error.contains("the patch's 2 pixels, got 9x9") && error.contains("hint:"), "{error}");
    let error = refused(SwinConfig { num_heads: vec![2, 3], ..small() }, 8);
    assert!(error.contains("stage 1") && error.contains("got 16 and 3"), "{error}");
    let error = refused(SwinConfig { num_heads: vec![2], ..small() }, 8);
    assert!(error.contains("got 2 and 1"), "{error}");
    let error = refused(SwinConfig { depths: vec![], num_heads: vec![], ..small() }, 8);
    assert!(error.contains("1 to 8, got 0 and 0"), "{error}");
    let error = refused(SwinConfig { depths: vec![2, 0], ..small() }, 8);
    assert!(error.contains("`depths` in 1..=256, got 0"), "{error}");
    let error = refused(SwinConfig { window_size: 0, ..small() }, 8);
    assert!(error.contains("`window_size` in 1..=256, got 0"), "{error}");
    let error = refused(SwinConfig { mlp_ratio: 0.1, ..small() }, 8);
    assert!(error.contains("got 0.1 times 8"), "{error}");
    let error = refused(SwinConfig { preset: Some(Preset::Base), window_size: 8, ..Default::default() }, 32);
    assert!(error.contains("preset Base has `window_size` 7, the settings say 8"), "{error}");
    let mut text = request(&small(), [8, 8], true);
    text.input = InputShape::Text { length: 4 };
    let error = clip_host_plugin_api::encoder::build::<Swin>(&text).expect_err("text is refused").to_string();
    assert!(error.contains("image_encoder"), "{error}");
    assert!(serde_json::from_value::<SwinConfig>(serde_json::json!({ "window": 7 })).is_err());
}

#[test]
fn ranges_are_those_of_the_schema() {
    assert_ranges_checked::<SwinConfig>(|settings| {
        let request = EncoderRequest { config: settings, ..request(&small(), [32, 32], false) };
        let answer = clip_host_plugin_api::encoder::build::<Swin>(&request);
        answer.is_err_and(|error| error.to_string().contains("building a swin: expected"))
    });
}
