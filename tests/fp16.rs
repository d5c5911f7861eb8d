//! `precision: Fp16`: the loss is scaled, a step with a gradient that is not finite is skipped, and all of it resumes.

use clip_host_tests::golden::read_tensors;
use clip_host_tests::host::{Folder, metrics, newest_checkpoint, run, small_run};
use std::collections::HashMap;

type Tensors = HashMap<String, Vec<f64>>;

fn train(folder: &Folder, out: &str, steps: u32, sets: &[&str]) -> Tensors {
    let steps = steps.to_string();
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let args = ["run", "small.ron", "--resume", out, "--steps", &steps, "--set", "train.log_every=1"];
    run(folder, &args.into_iter().chain(sets).collect::<Vec<_>>()).done();
    read_tensors(&newest_checkpoint(&folder.join(out)))
}

fn metric(folder: &Folder, out: &str, name: &str) -> Vec<f64> {
    metrics(&folder.join(out)).iter().filter_map(|line| line.get(name)?.as_f64()).collect()
}

/// With plain gradient descent a step's change is the gradient: the same as in f32 within f16's error, which is smaller than
/// that of bf16.
#[test]
fn losses_and_gradients_are_those_of_f32() {
    let folder = small_run("fp16-gradients");
    let common = [
        "optimizer=(plugin: \"sgd\", lr: 0.1)",
        "scheduler=(plugin: \"constant\")",
        "model.text_encoder.config.dropout=0.0",
        "model.text_encoder.config.attention_dropout=0.0",
    ];
    let frozen = ["optimizer=(plugin: \"sgd\", lr: 1e-30)", common[1], common[2], common[3]];
    let before = train(&folder, "before", 1, &frozen);
    let step = |out: &str, precision: &str| train(&folder, out, 1, &[&common[..], &[precision]].concat());
    let [single, bf16, fp16] = [("single", "F32"), ("bf16", "Bf16"), ("fp16", "Fp16")]
        .map(|(out, precision)| step(out, &format!("precision={precision}")));
    let weights = |name: &&String| name.ends_with("weight") && !name.contains("running");
    // The norm of how two steps differ over the norm of the step.
    let error = |other: &Tensors| {
        let (mut apart, mut whole) = (0.0, 0.0);
        for name in before.keys().filter(weights) {
            for ((a, b), start) in single[name].iter().zip(&other[name]).zip(&before[name]) {
                apart += (a - b) * (a - b);
                whole += (a - start) * (a - start);
            }
        }
        (apart / whole).sqrt()
    };
    let (of_bf16, of_fp16) = (error(&bf16), error(&fp16));
    println!("relative error of a step: {of_bf16} in bf16, {of_fp16} in fp16");
    assert!(of_fp16 < 0.02 && of_fp16 < of_bf16 / 2.0, "{of_fp16} in fp16, {of_bf16} in bf16");
    let loss = |out: &str| metric(&folder, out, "train/loss")[0];
    assert!((loss("fp16") - loss("single")).abs() < 1e-3 * loss("single").abs(), "the loss that is told is not scaled");
    assert_eq!(metric(&folder, "fp16", "train/loss_scale"), [65536.0]);
    assert!(metric(&folder, "single", "train/loss_scale").is_empty());
}

/// A scale that is too high: steps are skipped, and change nothing at all, until it fits; then it grows again.
#[test]
fn overflow_skips_the_step_and_halves_the_scale() {
    let folder = small_run("fp16-overflow");
    let scaler = "train.grad_scaler=(init_scale: 1e30, growth_factor: 4.0, backoff_factor: 1e-4, growth_interval: 3)";
    let sets = ["precision=Fp16", scaler];
    let one = train(&folder, "one", 1, &sets);
    let two = train(&folder, "two", 2, &sets);
    for (name, values) in &one {
        match name.as_str() {
            "grad_scaler.scale" => {
                // In f32, as the scale is.
                assert_eq!(*values, [f64::from(1e30f32 * 1e-4f32)]);
                assert_eq!(two[name], [f64::from(1e30f32 * 1e-4f32 * 1e-4f32)]);
            }
            "grad_scaler.skipped_steps" => assert_eq!((values[0], two[name][0]), (1.0, 2.0)),
            // Weights, moments, running statistics, tables of the loss.
            _ => assert_eq!(*values, two[name], "{name} moved in a step that was skipped"),
        }
    }
    assert!(one.iter().any(|(name, v)| name.starts_with("optimizer.exp_avg_sq.") && v.iter().all(|&v| v == 0.0)));

    let whole = train(&folder, "whole", 16, &sets);
    let scales = metric(&folder, "whole", "train/loss_scale");
    assert_eq!(scales.len(), 16);
    let (mut grown, mut halved) = (0, 0);
    for pair in scales.windows(2) {
        match (pair[1] as f32) / (pair[0] as f32) {
            1.0 => {}
            4.0 => grown += 1,
            ratio if (ratio - 1e-4).abs() < 1e-9 => halved += 1,
            ratio => panic!("the scale changed by {ratio}: {scales:?}"),
        }
    }
    assert!(grown >= 1 && halved >= 5, "{scales:?}");
    assert_eq!(whole["grad_scaler.skipped_steps"][0], f64::from(halved), "{scales:?}");
    assert_ne!(whole["image_encoder.conv1.weight"], one["image_encoder.conv1.weight"]);

    // Resumed among the skipped steps and after: the same bits, for any number of threads.
    train(&folder, "resumed", 3, &sets);
    train(&folder, "resumed", 9, &[&sets[..], &["train.threads=3"]].concat());
    let resumed = train(&folder, "resumed", 16, &sets);
    assert!(whole == resumed, "a resumed run is another");
    assert_eq!(metric(&folder, "resumed", "train/loss_scale"), scales);

    // The optimizer's own steps are those that were taken: Adam's first one moves by the learning rate, its second without a
    // first would move by three quarters of it.
    let adam = [
        "precision=Fp16",
        "train.grad_scaler=(init_scale: 1e30, backoff_factor: 1e-30)",
        "optimizer=(plugin: \"adam\", lr: 1e-3)",
        "scheduler=(plugin: \"constant\")",
    ];
    let (skipped, first) = (train(&folder, "skipped", 1, &adam), train(&folder, "first", 2, &adam));
    assert_eq!((skipped["grad_scaler.skipped_steps"][0], first["grad_scaler.skipped_steps"][0]), (1.0, 1.0));
    let moved = skipped["image_proj.weight"].iter().zip(&first["image_proj.weight"]).map(|(a, b)| (a - b).abs());
    let most = moved.fold(0.0, f64::max);
    assert!((most - 1e-3).abs() < 2e-5, "{most}");

    run(&folder, &["check", "small.ron", "--set", scaler]).refused(&["train.grad_scaler", "`precision: Fp16`"]);
}

#[test]
fn every_part_trains_in_fp16() {
    let folder = small_run("fp16-parts");
    for (number, sets) in [
        vec!["optimizer=(plugin: \"adamw\", lr: 1e-3, state_dtype: Bf16)", "model.text_encoder.weights_dtype=Bf16"],
        vec!["optimizer=(plugin: \"novograd\", lr: 1e-3, clip_grad_norm: 1.0)", "loss=(plugin: \"sogclr\")"],
        vec![
            "optimizer=(plugin: \"adafactor\", lr: 1e-3, groups: [(params: [\"text_encoder.*\"], freeze_epochs: 1)])",
            "loss=(plugin: \"clip\", config: (mode: \"learnable\"))",
        ],
        vec![
            "model.image_encoder=(plugin: \"vit\", config: (patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2))",
            "model.text_encoder=(plugin: \"bert\", config: (vocab_size: 400, hidden_size: 16, intermediate_size: 32, \
             num_attention_heads: 2, num_hidden_layers: 2))",
        ],
    ]
    .into_iter()
    .enumerate()
    {
        let out = format!("run{number}");
        let tensors = train(&folder, &out, 12, &[&["precision=Fp16"], &sets[..]].concat());
        assert!(tensors.values().flatten().all(|v| v.is_finite()), "{sets:?}");
        let skipped = tensors["grad_scaler.skipped_steps"][0];
        assert!(skipped <= 4.0, "{sets:?}: {skipped} of 12 steps are skipped");
        assert_eq!(tensors["grad_scaler.scale"], [65536.0 * 0.5f64.powf(skipped)], "{sets:?}");
        let losses = metric(&folder, &out, "train/loss");
        assert!(losses.len() == 12 && losses.iter().all(|l| l.is_finite()), "{sets:?}: {losses:?}");
    }
}
