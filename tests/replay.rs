//! Golden numbers through `clip-host replay`: each first-party plugin, loaded from its library and run by the compiler and
//! the kernels that training uses, against what the public reference implementations compute.

use clip_host_tests::fixtures::target;
use clip_host_tests::golden::{Case, folder, read_tensors};
use clip_host_tests::host::{Ended, command, run};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::OnceLock;

/// What `replay` writes for a golden case.
fn replay(kind: &str, id: &str, family: &str, case: &str, config: &str, more: &[&str]) -> HashMap<String, Vec<f64>> {
    let input = folder().join(family).join(format!("{case}.safetensors"));
    // One file a case and option: tests run side by side.
    let name =
        format!("{}-{kind}-{case}-{}.safetensors", env!("CARGO_CRATE_NAME"), more.join("").replace(['-', '.'], ""));
    let output = target().join(name);
    let (input, path) = (input.to_string_lossy(), output.to_string_lossy());
    let backend = match env!("CARGO_CRATE_NAME") {
        // The GPU's kernels, on the CPU.
        "replay_emulator" => match clip_host_cuda_emulator::Emulator::new() {
            Ok(_) => "emulator".into(),
            Err(error) => {
                eprintln!("skipped: the CPU's kernels are tried instead of the GPU's: {error}");
                "cpu".to_string()
            }
        },
        _ => std::env::var("CLIP_HOST_TEST_BACKEND").unwrap_or("cpu".into()),
    };
    let more = [&["--backend", &backend], more].concat();
    let args = ["replay", kind, id, "--config", config, "--in", &input, "--out", &path];
    let mut command = command(Path::new("."), &[&args[..], &more].concat());
    if backend == "emulator" {
        // Where NVRTC is, it compiles every kernel for these GPUs too.
        command.env("CLIP_HOST_EMULATOR_ARCHS", archs());
    }
    Ended::from(command.output().expect("the program starts")).done();
    let tensors = read_tensors(&output);
    std::fs::remove_file(&output).expect("the output was written");
    tensors
}

/// The GPUs that kernels are compiled for, none without NVRTC: compute capabilities with commas.
fn archs() -> &'static str {
    static ARCHS: OnceLock<&str> = OnceLock::new();
    ARCHS.get_or_init(|| match clip_host_cuda_driver::compile::version() {
        Ok(_) => "80,90",
        Err(error) => {
            eprintln!("skipped: golden cases' kernels are not compiled for GPUs: {error}");
            ""
        }
    })
}

/// A tolerance of the manifest: |x − y| <= absolute + relative·max|y|.
#[derive(Clone, Copy)]
struct Tolerance {
    absolute: f64,
    relative: f64,
}

impl Tolerance {
    /// The case's own, or one of its special ones.
    fn of(case: &Case, special: Option<&str>) -> Tolerance {
        let tolerance = &case.entry["tolerance"];
        let tolerance = special.and_then(|name| tolerance.get(name)).unwrap_or(tolerance);
        let number = |name: &str| tolerance[name].as_f64().expect("tolerances are numbers");
        Tolerance { absolute: number("absolute"), relative: number("relative") }
    }

    /// Compares step by step; `steps` is 1 for tensors without steps.
    #[track_caller]
    fn compare(self, what: &str, steps: usize, got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len(), "{what}: number of elements");
        let width = (expected.len() / steps).max(1);
        for (step, (got, expected)) in got.chunks(width).zip(expected.chunks(width)).enumerate() {
            let bound = self.absolute + self.relative * expected.iter().fold(0.0f64, |max, y| max.max(y.abs()));
            for (i, (x, y)) in got.iter().zip(expected).enumerate() {
                assert!(
                    (x - y).abs() <= bound,
                    "{what}, step {step}, element {i}: expected {y}, got {x} (± {bound:e})"
                );
            }
        }
    }
}

/// The case's tensors that a plugin has to answer with: all outputs and states but those in `absent`.
fn expected<'c>(case: &'c Case, absent: &[&str]) -> Vec<&'c str> {
    let tensors = case.entry["tensors"].as_object().expect("cases have tensors");
    let answer = |name: &str| tensors[name]["role"] == "output" || tensors[name]["role"] == "state";
    for name in absent {
        assert!(tensors.contains_key(*name), "case {} has no `{name}` to be left out", case.name);
    }
    let names: Vec<&str> =
        tensors.keys().map(String::as_str).filter(|name| answer(name) && !absent.contains(name)).collect();
    assert!(!names.is_empty());
    names
}

#[track_caller]
fn get<'t>(got: &'t HashMap<String, Vec<f64>>, case: &Case, name: &str) -> &'t [f64] {
    got.get(name).unwrap_or_else(|| panic!("{}: no `{name}` among {:?}", case.name, got.keys()))
}

/// Replays a loss and compares every answer of the case but those in `absent`.
fn loss(id: &str, name: &str, config: &str, absent: &[&str]) -> (Case, HashMap<String, Vec<f64>>) {
    let case = Case::load("losses", name);
    let got = replay("loss", id, "losses", name, config, &[]);
    for tensor in expected(&case, absent) {
        let special = tensor.starts_with("state.tau").then_some("tau_tensors");
        let what = format!("{name} {tensor}");
        let values = get(&got, &case, tensor);
        Tolerance::of(&case, special).compare(&what, case.count("steps"), values, case.tensor(tensor));
    }
    (case, got)
}

#[test]
fn loss_clip() {
    for name in ["clip", "clip_temp001", "edge_identical_clip", "edge_tiny_tau_clip", "edge_batch2_clip"] {
        let temperature = Case::load("losses", name).number("temperature");
        loss("clip", name, &format!("(temperature: {temperature})"), &[]);
    }
    loss(
        "clip",
        "clip_learnable_temperature",
        r#"(mode: "learnable", min_temperature: 0.001, max_temperature: 0.5)"#,
        &[],
    );
    loss("clip", "clip_logit_scale", r#"(mode: "logit_scale")"#, &[]);
    loss("clip", "clip_personalized_tau", r#"(mode: "personalized")"#, &[]);
}

#[test]
fn loss_isogclr() {
    for name in ["isogclr", "isogclr_eta", "edge_identical_isogclr", "edge_tiny_tau_isogclr", "edge_batch2_isogclr"] {
        let case = Case::load("losses", name);
        let settings = [
            ("gamma", "gamma"),
            ("tau_init", "tau_init"),
            ("rho_image", "rho_I"),
            ("rho_text", "rho_T"),
            ("eta", "eta"),
            ("beta_u", "beta_u"),
            ("grad_clip", "grad_clip"),
            ("tau_min", "tau_min"),
            ("tau_max", "tau_max"),
            ("eps", "eps"),
        ];
        let settings = settings.map(|(key, name)| format!("{key}: {:e}", case.number(name)));
        // Per batch row or under another name; compared below.
        let others = ["tau_image", "tau_text", "temp_weight_image_mean", "temp_weight_text_mean"];
        let (case, got) = loss("isogclr", name, &format!("({})", settings.join(", ")), &others);
        let steps = case.count("steps");
        for (metric, tensor) in
            [("image_tau_grad", "temp_weight_image_mean"), ("text_tau_grad", "temp_weight_text_mean")]
        {
            let values = get(&got, &case, metric);
            Tolerance::of(&case, None).compare(&format!("{name} {metric}"), steps, values, case.tensor(tensor));
        }
        // The temperatures used at a step are those of the batch's samples after the step before.
        let strict = Tolerance::of(&case, Some("tau_tensors"));
        for (table, ids, used) in [("state.tau_I", "image_ids", "tau_image"), ("state.tau_T", "text_ids", "tau_text")] {
            let table = get(&got, &case, table);
            let size = table.len() / steps;
            for step in 0..steps {
                let tau = |id: &f64| match step {
                    0 => case.number("tau_init"),
                    _ => table[(step - 1) * size + *id as usize],
                };
                let values: Vec<f64> = case.step(ids, step).iter().map(tau).collect();
                strict.compare(&format!("{name} {used} at step {step}"), 1, &values, case.step(used, step));
            }
        }
    }
}

/// Gradients of the network's weights, and temperatures by their means: the file has them for each row.
#[test]
fn loss_isogclr_with_a_temperature_network() {
    let case = Case::load("losses", "isogclr_tempnet");
    let settings = [("gamma", "gamma"), ("rho_image", "rho_I"), ("rho_text", "rho_T"), ("eps", "eps")]
        .map(|(key, name)| format!("{key}: {:e}", case.number(name)));
    let limits = ["tau_min", "tau_max"].map(|key| format!("{key}: {}", case.number(key)));
    let network = format!("prototypes: {}, dropout: {:?}", case.count("prototypes_M"), case.number("dropout"));
    let config = format!("({}, {}, network: Some(({network})))", settings.join(", "), limits.join(", "));
    let tensors = expected(&case, &[]);
    let weights: Vec<&str> = tensors.into_iter().filter(|name| name.starts_with("grad.")).collect();
    assert_eq!(weights.len(), 12);
    let others = [&["tau_image", "tau_text"], &weights[..]].concat();
    let (case, got) = loss("isogclr", "isogclr_tempnet", &config, &others);
    let steps = case.count("steps");
    for name in weights {
        let values = get(&got, &case, &name.replacen("grad.", "grad_", 1));
        Tolerance::of(&case, None).compare(&format!("isogclr_tempnet {name}"), steps, values, case.tensor(name));
    }
    for (metric, tensor) in [("image_tau", "tau_image"), ("text_tau", "tau_text")] {
        let mean = |step| case.step(tensor, step).iter().sum::<f64>() / case.count("batch") as f64;
        let means: Vec<f64> = (0..steps).map(mean).collect();
        let strict = Tolerance::of(&case, Some("tau_tensors"));
        strict.compare(&format!("isogclr_tempnet {metric}"), steps, get(&got, &case, metric), &means);
    }
}

#[test]
fn loss_cyclip() {
    for name in ["cyclip", "cyclip_lambdas"] {
        let case = Case::load("losses", name);
        let settings = ["temperature", "lambda_1", "lambda_2"].map(|key| format!("{key}: {:e}", case.number(key)));
        // Learnable, for the gradient of the temperature.
        loss("cyclip", name, &format!("({}, learnable: true)", settings.join(", ")), &[]);
    }
}

#[test]
fn loss_sogclr() {
    for name in
        ["sogclr", "sogclr_gamma01_temp007", "edge_identical_sogclr", "edge_tiny_tau_sogclr", "edge_batch2_sogclr"]
    {
        let case = Case::load("losses", name);
        let settings = ["gamma", "temperature", "eps"].map(|key| format!("{key}: {:e}", case.number(key)));
        loss("sogclr", name, &format!("({})", settings.join(", ")), &[]);
    }
}

/// The case's features are embeddings before normalisation.
#[test]
fn loss_vicreg() {
    for name in ["vicreg", "vicreg_coeffs"] {
        let case = Case::load("losses", name);
        let settings = ["sim_coeff", "std_coeff", "cov_coeff", "std_eps"];
        let settings = settings.map(|key| format!("{key}: {:e}", case.number(key)));
        loss("vicreg", name, &format!("({})", settings.join(", ")), &[]);
    }
}

#[test]
fn loss_onlineclr() {
    for name in ["onlineclr", "onlineclr_temp005"] {
        let case = Case::load("losses", name);
        let factor = case.number("positive_temperature") / case.number("temperature");
        let settings = ["temperature", "gamma"].map(|key| format!("{key}: {:e}", case.number(key)));
        loss("onlineclr", name, &format!("({}, positive_factor: {factor:e})", settings.join(", ")), &[]);
    }
}

#[test]
fn loss_dynamic_temperature() {
    for name in ["dynamic_temperature", "dynamic_temperature_clamped"] {
        let case = Case::load("losses", name);
        let settings =
            ["initial_tau", "alpha", "min_tau", "max_tau"].map(|key| format!("{key}: {:e}", case.number(key)));
        // Its temperature follows a rule and is no parameter: there is no gradient of it.
        loss("dynamic_temperature", name, &format!("({})", settings.join(", ")), &["grad_tau"]);
    }
}

/// Replays an optimizer and compares parameters after each step and the states after the last but those in `absent`,
/// which the plugin does not keep.
fn optimizer(id: &str, name: &str, config: &str, absent: &[&str]) {
    let case = Case::load("optimizers", name);
    let decay =
        |param: &str| case.entry["hyperparameters"]["weight_decay_per_parameter"][param].as_f64().unwrap_or(0.0);
    // The vector decays where the case says so.
    let no_decay = if decay("p1") == decay("p0") { "" } else { "1d" };
    let more = ["--weight-decay", &decay("p0").to_string(), "--no-decay", no_decay];
    let got = replay("optimizer", id, "optimizers", name, config, &more);
    let params = ["p0", "p1", "p2", "p3"];
    let absent: Vec<String> =
        absent.iter().flat_map(|state| params.map(|param| format!("state.{state}.{param}"))).collect();
    compare_optimizer(&case, &got, &absent.iter().map(String::as_str).collect::<Vec<_>>());
}

fn compare_optimizer(case: &Case, got: &HashMap<String, Vec<f64>>, absent: &[&str]) {
    for tensor in expected(case, absent) {
        // The manifest says both bounds; that of states in words.
        let (tolerance, steps) = match tensor.starts_with("state.") {
            true => (Tolerance { absolute: 1e-8, relative: 2e-5 }, 1),
            false => (Tolerance::of(case, None), case.count("steps")),
        };
        let what = format!("{} {tensor}", case.name);
        tolerance.compare(&what, steps, get(got, case, tensor), case.tensor(tensor));
    }
}

#[test]
fn optimizer_sgd() {
    for decay in ["", "_wd"] {
        optimizer("sgd", &format!("sgd{decay}"), "()", &[]);
        optimizer("sgd", &format!("sgd_momentum{decay}"), "(momentum: 0.9)", &[]);
        optimizer("sgd", &format!("sgd_nesterov{decay}"), "(momentum: 0.9, nesterov: true)", &[]);
    }
}

#[test]
fn optimizer_adam() {
    for name in ["adam", "adam_wd"] {
        optimizer("adam", name, "()", &[]);
    }
}

/// The product of momenta, which the references keep for each parameter, follows from the step alone.
#[test]
fn optimizer_nadam() {
    for decay in ["", "_wd"] {
        optimizer("nadam", &format!("nadam_torch{decay}"), "()", &["mu_product"]);
        optimizer("nadam", &format!("nadam_seed{decay}"), "()", &["m_schedule"]);
    }
}

/// The reference notes the parameter's root mean square and does not read it.
#[test]
fn optimizer_adafactor() {
    for decay in ["", "_wd"] {
        for (name, config) in [
            ("lr", "()"),
            ("lr_beta1", "(beta1: Some(0.9))"),
            ("relative", "(relative_step: true)"),
            ("relative_noscale_warmup", "(relative_step: true, scale_parameter: false, warmup_init: true)"),
        ] {
            optimizer("adafactor", &format!("adafactor_{name}{decay}"), config, &["RMS"]);
        }
    }
}

#[test]
fn optimizer_novograd() {
    for decay in ["", "_wd"] {
        optimizer("novograd", &format!("nvnovograd{decay}"), "()", &[]);
        let config = "(grad_averaging: true, amsgrad: true)";
        optimizer("novograd", &format!("nvnovograd_averaging_amsgrad{decay}"), config, &[]);
    }
    for name in ["novograd_seed", "novograd_seed_constructor_wd"] {
        optimizer("novograd", name, r#"(variant: "original")"#, &[]);
    }
    let config = r#"(variant: "original", grad_averaging: true)"#;
    optimizer("novograd", "novograd_seed_averaging", config, &[]);
}

#[test]
fn optimizer_adamw() {
    for name in ["adamw", "adamw_wd"] {
        optimizer("adamw", name, "()", &[]);
    }
    for name in ["adamw_amsgrad", "adamw_amsgrad_wd"] {
        optimizer("adamw", name, "(amsgrad: true)", &[]);
    }
}

#[test]
fn optimizer_radam() {
    for name in ["radam_seed", "radam_seed_wd"] {
        optimizer("radam", name, r#"(variant: "original")"#, &[]);
    }
    for name in ["radam_torch", "radam_torch_wd"] {
        optimizer("radam", name, r#"(variant: "torch")"#, &[]);
    }
}

/// In the authors' code p3's group has a tenth of the rate, but moves with the first group's step size: only its decay is
/// by the tenth. A tenth of the decay at the full rate is the same.
#[test]
fn optimizer_radam_with_a_shared_step_size() {
    let case = Case::load("optimizers", "radam_seed_shared_buffer");
    let replay = |decay: &str| {
        let more = ["--weight-decay", decay];
        replay("optimizer", "radam", "optimizers", "radam_seed_shared_buffer", "()", &more)
    };
    compare_optimizer(&case, &replay("0.02"), &["param_after.p3"]);
    compare_optimizer(&case, &replay("0.002"), &["param_after.p0", "param_after.p2"]);
}

/// Replays a scheduler and compares all rates.
fn scheduler(id: &str, name: &str, config: &str, more: &[&str]) {
    let case = Case::load("schedulers", name);
    let lr = case.number("lr").to_string();
    let got = replay("scheduler", id, "schedulers", name, config, &[&["--lr", &lr][..], more].concat());
    let tolerance = Tolerance::of(&case, None);
    let (got, expected) = (get(&got, &case, "lr"), case.tensor("lr"));
    // Each rate by itself: a peak must not hide what is near zero.
    tolerance.compare(name, expected.len(), got, expected);
}

#[test]
fn scheduler_cosine() {
    let studies =
        r#"unit: "epoch", warmup_epochs: 5.0, warmup_lr: 1e-5, min_lr: 1e-6, t_initial: 30.0, cycle_limit: 1"#;
    scheduler("cosine", "cosine_clip_defaults", &format!("({studies})"), &["--epochs", "30"]);
    for (name, steps) in [("cosine_seed_loop", 620), ("cosine_seed_loop_short_epoch", 230)] {
        let config = format!("({studies}, warmup_step_size: 100, steps_per_epoch: {steps})");
        scheduler("cosine", name, &config, &["--epochs", "30"]);
    }
    for (name, prefix) in [("cosine_restarts", true), ("cosine_restarts_no_prefix", false)] {
        let config = format!(
            r#"(unit: "epoch", warmup_epochs: 3.0, warmup_lr: 1e-5, warmup_prefix: {prefix}, min_lr: 1e-6,
               t_initial: 4.0, t_mul: 2.0, decay_rate: 0.5, cycle_limit: 3)"#
        );
        scheduler("cosine", name, &config, &["--epochs", "36"]);
    }
}

#[test]
fn scheduler_of_open_clip() {
    let config = "(warmup_steps: 20, warmup_counts_from_one: true)";
    scheduler("cosine", "openclip_cosine", config, &["--total-steps", "150", "--epochs", "150"]);
    scheduler("constant", "openclip_const", config, &["--total-steps", "150", "--epochs", "150"]);
    let config = "(warmup_steps: 20)";
    scheduler("linear_warmup_cosine", "openclip_cosine", config, &["--epochs", "150"]);
}

#[test]
fn scheduler_with_torch_warm_restarts() {
    for (name, unit, steps) in [("", "epoch", "1"), ("_fractional", "epoch_fraction", "8")] {
        let cycles = format!(r#"unit: "{unit}", cycle_limit: 0"#);
        let more = ["--steps-per-epoch", steps];
        let config = format!("({cycles}, t_initial: 5.0, t_mul: 2.0, min_lr: 1e-6)");
        scheduler("cosine", &format!("warm_restarts{name}"), &config, &more);
        scheduler("cosine", &format!("warm_restarts_mult1{name}"), &format!("({cycles}, t_initial: 4.0)"), &more);
    }
}

#[test]
fn scheduler_step() {
    let config = "(decay_t: 7.0, decay_rate: 0.3, warmup_epochs: 4.0, warmup_lr: 1e-5)";
    scheduler("step", "step", config, &[]);
    scheduler("step", "step_no_warmup", "(decay_t: 5.0, decay_rate: 0.1)", &[]);
}

#[test]
fn scheduler_tanh() {
    let common = r#"unit: "epoch", min_lr: 1e-6, warmup_lr: 1e-5"#;
    let config = format!("({common}, t_initial: 20.0, warmup_epochs: 4.0)");
    scheduler("tanh", "tanh", &config, &[]);
    let config = format!(
        "({common}, lb: -5.0, ub: 3.0, t_initial: 5.0, t_mul: 2.0, decay_rate: 0.5, warmup_epochs: 3.0, \
         warmup_prefix: true, cycle_limit: 2)"
    );
    scheduler("tanh", "tanh_restarts_prefix", &config, &[]);
}

#[test]
fn scheduler_plateau() {
    let common = "min_lr: 1e-6, warmup_epochs: 3, warmup_lr: 1e-5";
    let config = format!(r#"({common}, mode: "max", patience: 3, factor: 0.5)"#);
    scheduler("plateau", "plateau_max", &config, &[]);
    let config = format!(r#"({common}, mode: "min", patience: 2, factor: 0.3, threshold: 0.01, cooldown: 2)"#);
    scheduler("plateau", "plateau_min_cooldown", &config, &[]);
}

/// Replays an encoder and compares outputs, all gradients and running statistics; returns how many tensors of each mode.
/// Where the case has none of training, which without dropout and batch statistics computes the same, training's are
/// compared with evaluation's.
fn encoder(id: &str, name: &str, config: &str) -> BTreeMap<&'static str, usize> {
    let case = Case::load("encoders", name);
    let got = replay("encoder", id, "encoders", name, config, &[]);
    let tolerance = Tolerance::of(&case, None);
    let mut counts = BTreeMap::new();
    let mut compare = |answer: &str, tensor: &str| {
        let (mut values, mut golden) = (get(&got, &case, answer).to_vec(), case.tensor(tensor).to_vec());
        if tensor.ends_with("last_hidden_state") {
            // What stands at padded positions means nothing, in the reference neither.
            let mask = case.tensor("input.attention_mask");
            assert!(mask.contains(&0.0), "the case has padding");
            let width = golden.len() / mask.len();
            for values in [&mut values, &mut golden] {
                values
                    .iter_mut()
                    .enumerate()
                    .filter(|(i, _)| mask[i / width] == 0.0)
                    .for_each(|(_, value)| *value = 0.0);
            }
        }
        tolerance.compare(&format!("{name} {answer}"), 1, &values, &golden);
        let kind = ["eval.grad.", "train.grad.", "train.buffer_after.", "eval.output.", "train.output."];
        if let Some(kind) = kind.into_iter().find(|kind| answer.starts_with(kind)) {
            *counts.entry(kind).or_default() += 1;
        }
    };
    let tensors = expected(&case, &[]);
    tensors.iter().for_each(|tensor| compare(tensor, tensor));
    // With another set of outputs in training, the loss is another one.
    let outputs = |mode: &str| got.keys().filter(|name| name.starts_with(&format!("{mode}.output."))).count();
    if tensors.iter().all(|tensor| !tensor.starts_with("train.")) && outputs("train") == outputs("eval") {
        for tensor in tensors {
            compare(&tensor.replacen("eval.", "train.", 1), tensor);
        }
    }
    counts
}

#[test]
fn encoder_resnet() {
    for (name, config) in [
        ("resnet_basic", r#"(block: "basic", layers: (1, 2, 1, 1), channels: (8, 12, 16, 20))"#),
        ("resnet_bottleneck", r#"(block: "bottleneck", layers: (1, 2, 1, 1), channels: (6, 8, 10, 12))"#),
    ] {
        let counts = encoder("resnet", name, config);
        assert_eq!((counts["eval.output."], counts["train.output."]), (1, 1));
        assert_eq!(counts["eval.grad."], counts["train.grad."]);
        assert!(counts["eval.grad."] > 40 && counts["train.buffer_after."] > 40, "{counts:?}");
    }
}

#[test]
fn encoder_vit() {
    let counts = encoder("vit", "vit", "(patch_size: 8, embed_dim: 32, depth: 2, num_heads: 4, mlp_ratio: 2.0)");
    assert_eq!((counts["eval.grad."], counts["train.grad."]), (30, 30));
}

#[test]
fn encoder_convnext() {
    let counts = encoder("convnext", "convnext", "(depths: (1, 1, 2, 1), dims: (8, 12, 16, 24))");
    assert_eq!((counts["eval.grad."], counts["train.grad."]), (63, 63));
}

#[test]
fn encoder_swin() {
    let config = "(patch_size: 2, window_size: 4, embed_dim: 16, depths: (2, 2), num_heads: (2, 4), mlp_ratio: 2.0, \
                  drop_path_rate: 0.0)";
    let counts = encoder("swin", "swin", config);
    assert_eq!(counts["eval.grad."], counts["train.grad."]);
    assert_eq!(counts["eval.grad."], 61);
}

#[test]
fn encoder_mixer() {
    let counts = encoder("mixer", "mixer", "(patch_size: 8, num_blocks: 2, embed_dim: 32, mlp_ratio: (0.5, 4.0))");
    assert_eq!((counts["eval.grad."], counts["train.grad."]), (28, 28));
}

#[test]
fn encoder_distilbert() {
    let config = "(vocab_size: 97, max_position_embeddings: 20, dim: 32, hidden_dim: 64, n_heads: 4, n_layers: 2, \
                  dropout: 0.0, attention_dropout: 0.0)";
    let counts = encoder("distilbert", "distilbert", config);
    assert!(counts["eval.grad."] > 30, "{counts:?}");
}

#[test]
fn encoder_bert() {
    let config = "(vocab_size: 97, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, \
                  intermediate_size: 64, max_position_embeddings: 20, hidden_dropout_prob: 0.0, \
                  attention_probs_dropout_prob: 0.0)";
    let counts = encoder("bert", "bert", config);
    assert_eq!((counts["eval.output."], counts["eval.grad."]), (2, 39));
}

#[test]
fn encoder_clip_text() {
    let shape = "context_length: 14, vocab_size: 61, width: 32, heads: 4, layers: 2, output_dim: 24";
    for (name, quick_gelu) in [("clip_text_gelu", false), ("clip_text_quickgelu", true)] {
        let counts = encoder("clip_text", name, &format!("({shape}, quick_gelu: {quick_gelu})"));
        assert_eq!((counts["eval.grad."], counts["train.grad."]), (29, 29));
    }
}

/// What is missing or of another size is told by name.
#[test]
fn a_file_that_does_not_fit_is_refused() {
    let at = |family: &str, case: &str| folder().join(family).join(format!("{case}.safetensors"));
    let output = target().join("replay-refused.safetensors");
    let replay = |kind: &str, id: &str, config: &str, input: &Path| {
        let (input, output) = (input.to_string_lossy(), output.to_string_lossy());
        run(Path::new("."), &["replay", kind, id, "--config", config, "--in", &input, "--out", &output])
    };
    replay("loss", "clip", "()", &at("optimizers", "adamw")).refused(&["image_features", "param_init.p0"]);
    replay("encoder", "resnet", "()", &at("encoders", "resnet_basic")).refused(&[
        "layer1.0.conv1.weight",
        "expected 4096",
        "--config",
    ]);
    replay("loss", "clip", "(temprature: 0.1)", &at("losses", "clip")).refused(&["temprature", "temperature"]);
    replay("loss", "clipp", "()", &at("losses", "clip")).refused(&["clipp", "`clip`"]);
    replay("loss", "clip", "()", Path::new("nowhere.safetensors")).refused(&["nowhere.safetensors"]);
    assert!(!output.exists(), "a refusal writes nothing");
}
