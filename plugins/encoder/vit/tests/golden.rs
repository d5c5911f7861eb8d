//! Against timm's VisionTransformer: features and all gradients, computed by it in f64.

#[path = "../../testing.rs"]
mod golden;

use clip_encoder_vit::{Pooling, Preset, Vit, VitConfig};
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::graph::BuildError;
use clip_host_plugin_api::ir::{Fragment, Init, Op};
use clip_host_plugin_api::testing::{Harness, Step};
use golden::{Golden, assert_close, assert_ranges_checked, count, params};
use std::collections::BTreeSet;

/// The golden case's network.
fn golden_config() -> VitConfig {
    VitConfig { patch_size: 8, embed_dim: 32, depth: 2, num_heads: 4, mlp_ratio: 2.0, ..Default::default() }
}

/// A network of six patches to images of 8x12 pixels.
fn small() -> VitConfig {
    VitConfig { patch_size: 4, embed_dim: 8, depth: 2, num_heads: 2, mlp_ratio: 1.5, ..Default::default() }
}

fn request(config: &VitConfig, [height, width]: [usize; 2], training: bool) -> EncoderRequest {
    let config = serde_json::to_value(config).expect("settings are JSON");
    EncoderRequest { config, batch: 2, input: InputShape::Image { height, width }, training }
}

fn build(config: &VitConfig, size: usize) -> Result<Fragment, BuildError> {
    clip_host_plugin_api::encoder::build::<Vit>(&request(config, [size, size], true))
}

/// Compares the golden case; dropout is 0, so that training computes the same.
fn compare(training: bool) {
    let golden = Golden::read("vit");
    let mut harness = Harness::encoder::<Vit>(&request(&golden_config(), [32, 32], training)).expect("builds");
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

#[test]
fn eval_is_timms() {
    compare(false);
}

#[test]
fn train_is_timms() {
    compare(true);
}

/// A harness for two images of 8x12, with weights and pixels from formulas.
fn harness(config: &VitConfig, training: bool) -> Harness {
    let mut harness = Harness::encoder::<Vit>(&request(config, [8, 12], training)).expect("builds");
    let sizes: Vec<(String, usize)> =
        params(&harness.fragment).iter().map(|(name, shape)| (name.to_string(), shape.iter().product())).collect();
    for (p, (name, size)) in sizes.into_iter().enumerate() {
        harness.set(&name, (0..size).map(|i| 0.3 * (1.7 * p as f64 + 0.9 * i as f64 + 0.5).sin()));
    }
    harness.set("images", (0..2 * 3 * 8 * 12).map(|i| (0.31 * f64::from(i)).cos()));
    harness
}

/// Poolings, norms and settings that the golden case does not have. The numbers are timm 1.0.31's, from
///
/// ```python
/// torch.set_default_dtype(torch.float64)
/// net = VisionTransformer(img_size=(8, 12), patch_size=4, embed_dim=8, depth=2, num_heads=2, mlp_ratio=1.5,
///                         num_classes=0, **settings).eval()
/// for p, (name, param) in enumerate(sorted(net.named_parameters())):
///     param.data = (0.3 * torch.sin(1.7 * p + 0.9 * torch.arange(param.numel()) + 0.5)).reshape(param.shape)
/// net(torch.cos(0.31 * torch.arange(2 * 3 * 8 * 12)).reshape(2, 3, 8, 12))
/// ```
#[test]
fn other_settings_are_timms() {
    let avg = VitConfig { global_pool: Pooling::Avg, ..small() };
    let patches_only = VitConfig { class_token: false, fc_norm: Some(false), ..avg.clone() };
    let cases = [
        (
            "avg",
            avg,
            [
                -0.2274006743,
                -0.4245868855,
                0.05751221629,
                0.1899251492,
                -0.317282577,
                -0.1799051308,
                -0.2710775928,
                -0.406130248,
                -0.175058411,
                -0.5092208536,
                -0.08345736983,
                0.2819952943,
                -0.1391338174,
                -0.2902845873,
                -0.3251142628,
                -0.18966071,
            ],
        ),
        (
            "avg, class_token=False, fc_norm=False",
            patches_only.clone(),
            [
                -0.2541629294,
                -0.2871821768,
                -0.3233611726,
                0.02392733306,
                0.2407309364,
                0.3228611627,
                0.1090660459,
                -0.2221198571,
                -0.1436568099,
                -0.2751088207,
                -0.3669197654,
                0.1149434312,
                0.3235889448,
                0.2790376609,
                0.07995415418,
                -0.166247965,
            ],
        ),
        (
            "the same with qkv_bias=False",
            VitConfig { qkv_bias: false, ..patches_only },
            [
                0.1479504648,
                0.1585803563,
                0.3608236447,
                -0.01441427149,
                -0.1176882844,
                -0.3047155234,
                0.09135808572,
                0.1746691792,
                0.2587457568,
                0.1819586743,
                0.3716441571,
                0.07011842265,
                -0.04451846258,
                -0.3136230858,
                0.09517996437,
                0.2626320114,
            ],
        ),
        (
            "token, fc_norm=True",
            VitConfig { fc_norm: Some(true), ..small() },
            [
                -0.352973515,
                -0.4533451998,
                0.09078446634,
                0.1965024564,
                -0.3186054807,
                -0.2611317003,
                -0.2792444218,
                -0.3772673621,
                -0.351987108,
                -0.4554508724,
                0.09096923954,
                0.1956302294,
                -0.3173033844,
                -0.2576132898,
                -0.2793627043,
                -0.3760570785,
            ],
        ),
        (
            "init_values=1",
            VitConfig { init_values: Some(1.0), ..small() },
            [
                -0.5824421718,
                0.0641691852,
                0.3173117699,
                -0.03164716277,
                -0.2711055533,
                -0.1734063993,
                -0.2299486338,
                -0.5195007083,
                -0.5784484376,
                0.05454452151,
                0.317433713,
                -0.0357303533,
                -0.2613362767,
                -0.1719938792,
                -0.2263458696,
                -0.5172549151,
            ],
        ),
        (
            "reg_tokens=2",
            VitConfig { reg_tokens: 2, ..small() },
            [
                -0.3552868666,
                -0.4499046345,
                0.09671045264,
                0.1937976731,
                -0.3186760807,
                -0.2531220817,
                -0.2778116533,
                -0.3787534697,
                -0.3565873087,
                -0.4484111035,
                0.101332723,
                0.1914109899,
                -0.3177074042,
                -0.2455815219,
                -0.2768706935,
                -0.3792934245,
            ],
        ),
        (
            r#"reg_tokens=2, no_embed_class=True, global_pool="avg""#,
            VitConfig { reg_tokens: 2, no_embed_class: true, global_pool: Pooling::Avg, ..small() },
            [
                -0.2161056891,
                -0.4105848384,
                0.06592871107,
                0.1830017067,
                -0.3146218065,
                -0.1424742641,
                -0.2662478201,
                -0.403460304,
                -0.1644410588,
                -0.5102730222,
                -0.08666496461,
                0.2801234233,
                -0.1339625259,
                -0.2698694798,
                -0.3243573161,
                -0.1782256523,
            ],
        ),
        (
            r#"pre_norm=True, act_layer="quick_gelu""#,
            VitConfig { pre_norm: true, quick_gelu: true, norm_eps: 1e-6, ..small() },
            [
                -0.3150878321,
                -0.4490138471,
                0.006553886249,
                0.260792994,
                -0.2891891796,
                -0.4191508452,
                -0.2999565345,
                -0.3480386461,
                -0.299938139,
                -0.4559215895,
                -0.008331270747,
                0.2685768646,
                -0.271169875,
                -0.4245362605,
                -0.3048597303,
                -0.3336207855,
            ],
        ),
        (
            r#"class_token=False, reg_tokens=1, global_pool="avg""#,
            VitConfig { class_token: false, reg_tokens: 1, global_pool: Pooling::Avg, ..small() },
            [
                -0.5340253435,
                -0.269862286,
                -0.5649676922,
                0.09264711097,
                0.2734957557,
                0.3911030845,
                0.08020813437,
                -0.4080119027,
                -0.103354371,
                -0.2511739759,
                -0.5196318684,
                0.2916270869,
                0.4593742629,
                0.247887753,
                0.04226762543,
                -0.1454435145,
            ],
        ),
    ];
    for (name, config, expected) in cases {
        let step = harness(&config, false).step(None, &[]).expect("runs");
        assert_close(name, &step.outputs["features"], &expected);
    }
}

/// Evaluates the small network in training with some seed; also the gradient of its features' sum by the pixels.
fn train(config: &VitConfig, seed: u64) -> Step {
    let mut harness = harness(config, true);
    harness.seed = seed;
    // The sum over a layer norm's row would hardly depend on the pixels.
    let cotangent: Vec<f64> = (0..16).map(|i| f64::from(i * 37 % 11) - 5.0).collect();
    harness.step(Some(("features", Some(&cotangent))), &["images"]).expect("runs")
}

/// The patches of each image that the features depend on: those with a gradient.
fn seen(step: &Step) -> [BTreeSet<usize>; 2] {
    let mut seen = [BTreeSet::new(), BTreeSet::new()];
    for (i, gradient) in step.grads["images"].iter().enumerate() {
        let (image, y, x) = (i / (3 * 8 * 12), i / 12 % 8, i % 12);
        if *gradient != 0.0 {
            seen[image].insert(y / 4 * 3 + x / 4);
        }
    }
    seen
}

/// Each image keeps as many patches as it should, others at every step, and all of them equally often.
#[test]
fn patch_dropout() {
    let settings = [(0.5, 3, Pooling::Token), (0.5, 3, Pooling::Avg), (0.3, 4, Pooling::Token), (0.9, 1, Pooling::Avg)];
    for (patch_drop_rate, keep, global_pool) in settings {
        let config = VitConfig { patch_drop_rate, global_pool, depth: 1, ..small() };
        let (mut counts, mut choices) = ([0; 6], BTreeSet::new());
        for seed in 0..100 {
            let [a, b] = seen(&train(&config, seed));
            assert_eq!((a.len(), b.len()), (keep, keep), "of 6 patches at rate {patch_drop_rate}");
            choices.insert(a == b);
            a.iter().chain(&b).for_each(|&patch| counts[patch] += 1);
        }
        assert_eq!(choices.len(), 2, "images choose by themselves");
        // Binomial: the mean of 200 draws, and more than four deviations.
        let mean = 200.0 * keep as f64 / 6.0;
        assert!(counts.iter().all(|&n| (f64::from(n) - mean).abs() < 30.0), "{counts:?} should all be near {mean}");
    }
}

/// The class token and every position stay with what they belong to: a patch's gradient is the same whether others were
/// dropped before the network or left out of it.
#[test]
fn dropped_patches_leave_the_others_alone() {
    // Without attention to other patches, each token's features are its own: the mean goes over those that are kept.
    let config = VitConfig { global_pool: Pooling::Avg, class_token: false, fc_norm: Some(false), ..small() };
    let alone = |config: &VitConfig, training, seed| {
        let mut harness = harness(config, training);
        harness.seed = seed;
        for block in 0..2 {
            harness.set(&format!("blocks.{block}.attn.proj.weight"), [0.0; 64]);
        }
        harness.step(Some(("features", None)), &["images"]).expect("runs").grads["images"].clone()
    };
    let full = alone(&config, false, 0);
    let dropped = alone(&VitConfig { patch_drop_rate: 0.5, ..config }, true, 3);
    // Half as many patches share the mean.
    let expected: Vec<f64> =
        full.iter().zip(&dropped).map(|(full, kept)| if *kept == 0.0 { 0.0 } else { 2.0 * full }).collect();
    assert!(dropped.iter().any(|g| g.abs() > 1e-6));
    assert_close("gradient of images", &dropped, &expected);
}

/// All kinds of dropout are on in training only, and a new draw with every seed.
#[test]
fn dropout() {
    let rates: [fn(&mut VitConfig, f64); 5] = [
        |config, rate| config.patch_drop_rate = rate,
        |config, rate| config.pos_drop_rate = rate,
        |config, rate| config.proj_drop_rate = rate,
        |config, rate| config.attn_drop_rate = rate,
        |config, rate| config.drop_path_rate = rate,
    ];
    let plain = harness(&small(), false).step(None, &[]).expect("runs").outputs["features"].clone();
    for (kind, set) in rates.iter().enumerate() {
        let mut config = small();
        set(&mut config, 0.5);
        let features = |seed| train(&config, seed).outputs["features"].clone();
        assert_eq!(features(1), features(1));
        assert!((2..6).any(|seed| features(seed) != features(1)), "kind {kind} drops something");
        let eval = harness(&config, false).step(None, &[]).expect("runs");
        assert_eq!(eval.outputs["features"], plain, "kind {kind} is off in evaluation");
    }
}

/// The first block is never skipped; of the second each image keeps or loses each of the two branches.
#[test]
fn stochastic_depth() {
    let outcomes = |depth| {
        let config = VitConfig { drop_path_rate: 0.5, depth, ..small() };
        let features = |seed| train(&config, seed).outputs["features"].clone();
        let first_image = (0..40).map(|seed| features(seed)[..8].iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        first_image.collect::<BTreeSet<_>>().len()
    };
    assert_eq!(outcomes(1), 1);
    assert_eq!(outcomes(2), 4);
}

/// timm's own counts, without a classifier.
#[test]
fn presets_have_their_published_sizes() {
    for (preset, parameters) in [
        (Preset::Tiny16, 5_524_416),
        (Preset::Small32, 22_493_952),
        (Preset::Base32, 87_455_232),
        (Preset::Base16, 85_798_656),
    ] {
        let fragment = build(&VitConfig { preset: Some(preset), ..Default::default() }, 224).expect("builds");
        assert_eq!((count(&fragment), params(&fragment).len()), (parameters, 150), "{preset:?}");
    }
    for (preset, tensors, parameters) in [
        (Preset::Base32Clip, 151, 87_456_000),
        (Preset::Base16ClipQuickGelu, 151, 85_799_424),
        (Preset::Large14Clip, 295, 303_179_776),
    ] {
        let config = VitConfig { preset: Some(preset), ..Default::default() };
        assert!(config.shape().is_ok_and(|shape| shape.pre_norm && shape.norm_eps == 1e-5));
        let fragment = build(&config, 224).expect("builds");
        assert_eq!((count(&fragment), params(&fragment).len()), (parameters, tensors), "{preset:?}");
        assert!(!params(&fragment).contains_key("patch_embed.proj.bias"));
    }
    let named = serde_json::json!({ "preset": "vit_base_patch32_224", "embed_dim": 768 });
    let config: VitConfig = serde_json::from_value(named).expect("a preset goes by timm's name");
    let fragment = build(&config, 256).expect("builds");
    let params = params(&fragment);
    assert_eq!(params["cls_token"], [1, 1, 768]);
    assert_eq!(params["pos_embed"], [1, 65, 768], "positions follow the images' size");
    assert_eq!(params["patch_embed.proj.weight"], [768, 3, 32, 32]);
    assert_eq!(params["blocks.11.attn.qkv.weight"], [2304, 768]);
    assert_eq!(params["blocks.11.mlp.fc1.bias"], [3072]);
    assert_eq!(params["norm.weight"], [768]);
}

#[test]
fn initial_values() {
    let config = VitConfig { reg_tokens: 2, init_values: Some(0.1), ..small() };
    let fragment = build(&config, 8).expect("builds");
    assert_eq!(params(&fragment)["reg_token"], [1, 2, 8]);
    for node in &fragment.nodes {
        let Op::Param { name, init } = &node.op else { continue };
        let expected = match name.as_str() {
            "cls_token" | "reg_token" => Init::Normal { std: 1e-6 },
            name if name.ends_with("gamma") => Init::Constant(0.1),
            // torch.nn.Conv2d's own: uniform by the fan-in, the bias too.
            "patch_embed.proj.weight" | "patch_embed.proj.bias" => Init::Uniform { bound: 1.0 / 48.0f64.sqrt() },
            name if name.contains("norm") && name.ends_with("weight") => Init::Constant(1.0),
            name if name.ends_with("bias") => Init::Constant(0.0),
            _ => Init::Normal { std: 0.02 },
        };
        assert_eq!(*init, expected, "{name}");
    }
}

#[test]
fn refusals_say_what_is_wrong() {
    let refused = |config: VitConfig, size| match build(&config, size) {
        Ok(_) => panic!("{config:?} was accepted"),
        Err(error) => error.to_string(),
    };
    let error = refused(small(), 10);
    assert!(error.contains("the patch's 4 pixels, got 10x10") && error.contains("hint:"), "{error}");
    let error = refused(VitConfig { num_heads: 3, ..small() }, 8);
    assert!(error.contains("got 8 and 3"), "{error}");
    let error = refused(VitConfig { num_heads: 0, ..small() }, 8);
    assert!(error.contains("`num_heads` in 1..=1024, got 0"), "{error}");
    let error = refused(VitConfig { mlp_ratio: 0.1, ..small() }, 8);
    assert!(error.contains("got 0.1 times 8"), "{error}");
    let error = refused(VitConfig { class_token: false, ..small() }, 8);
    assert!(error.contains("\"avg\""), "{error}");
    let preset = Some(Preset::Tiny16);
    let error = refused(VitConfig { preset, depth: 6, ..Default::default() }, 32);
    assert!(error.contains("preset Tiny16 has `depth` 12, the settings say 6"), "{error}");
    let error = refused(VitConfig { preset: Some(Preset::Base32Clip), norm_eps: 1e-3, ..Default::default() }, 32);
    assert!(error.contains("preset Base32Clip has `norm_eps` 0.00001, the settings say 0.001"), "{error}");
    let mut text = request(&small(), [8, 8], true);
    text.input = InputShape::Text { length: 4 };
    let error = clip_host_plugin_api::encoder::build::<Vit>(&text).expect_err("text is refused").to_string();
    assert!(error.contains("image_encoder"), "{error}");
    assert!(serde_json::from_value::<VitConfig>(serde_json::json!({ "patch": 8 })).is_err());
}

#[test]
fn ranges_are_those_of_the_schema() {
    assert_ranges_checked::<VitConfig>(|settings| {
        let request = EncoderRequest { config: settings, ..request(&small(), [16, 16], false) };
        let answer = clip_host_plugin_api::encoder::build::<Vit>(&request);
        answer.is_err_and(|error| error.to_string().contains("building a vit: expected"))
    });
}
