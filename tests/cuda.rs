//! The GPU's backend where there is no GPU: whole runs on the emulator, every kernel of the recipes through the GPU's own
//! compiler, and what is said when there is none.

use clip_host_cuda::render::PRELUDE;
use clip_host_cuda_driver::compile;
use clip_host_tests::fixtures::root;
use clip_host_tests::golden::read_tensors;
use clip_host_tests::host::{Folder, command, metrics, newest_checkpoint, run, small_run};
use std::path::Path;

/// Whether the emulator runs here; else says so.
fn emulator_runs() -> bool {
    match clip_host_cuda_emulator::Emulator::new() {
        Ok(_) => true,
        Err(error) => {
            eprintln!("skipped: {error}");
            false
        }
    }
}

/// Trains on the emulator.
fn emulated(folder: &Folder, args: &[&str]) {
    let args = [&["run", "small.ron", "--set", "backend=Cuda"], args].concat();
    let output = command(folder, &args).env("CLIP_HOST_CUDA_EMULATOR", "1").output().expect("the program starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The largest difference of what two runs keep, in units of each tensor's largest value (of 1 if that is less).
fn difference(one: &Path, other: &Path) -> (f64, String) {
    let (one, other) = (read_tensors(&newest_checkpoint(one)), read_tensors(&newest_checkpoint(other)));
    assert_eq!(one.len(), other.len());
    assert!(one.len() > 40);
    let of = |(name, values): (&String, &Vec<f64>)| {
        let scale = values.iter().fold(1.0f64, |most, v| most.max(v.abs()));
        let apart = values.iter().zip(&other[name]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        (apart / scale, name.clone())
    };
    one.iter().map(of).max_by(|a, b| a.0.total_cmp(&b.0)).expect("there are tensors")
}

#[test]
fn a_run_is_the_cpus() {
    if !emulator_runs() {
        return;
    }
    let folder = small_run("cuda-run");
    for (precision, bound) in [("F32", 2e-4), ("Bf16", 3e-2), ("Fp16", 1e-2)] {
        let set = format!("precision={precision}");
        let common = ["--steps", "5", "--set", &set];
        let cpu = format!("cpu-{precision}");
        run(&folder, &[&["run", "small.ron", "--out", &cpu, "--set", "backend=Cpu"], &common[..]].concat()).done();
        let gpu = format!("gpu-{precision}");
        emulated(&folder, &[&["--out", &gpu], &common[..]].concat());
        let (apart, name) = difference(&folder.join(&cpu), &folder.join(&gpu));
        assert!(apart < bound, "{precision}: `{name}` differs by {apart:e}");
        let loss = |run: &str| {
            let lines = metrics(&folder.join(run));
            lines.iter().rev().find_map(|line| line.get("train/loss")?.as_f64()).expect("a loss was logged")
        };
        let (a, b) = (loss(&cpu), loss(&gpu));
        assert!((a - b).abs() < bound * a.abs().max(1.0), "{precision}: {a} and {b}");
    }
}

/// A run that was stopped goes on with the same bits; so does one with statistics and weights in half precision.
#[test]
fn a_resumed_run_has_the_same_bits() {
    if !emulator_runs() {
        return;
    }
    let folder = small_run("cuda-resume");
    let halves = ["--set", "optimizer.state_dtype=Bf16"];
    emulated(&folder, &[&["--out", "whole", "--steps", "4"], &halves[..]].concat());
    emulated(&folder, &[&["--out", "parts", "--steps", "2"], &halves[..]].concat());
    let args = ["run", "--resume", "parts", "--steps", "4"];
    let output = command(&folder, &args).env("CLIP_HOST_CUDA_EMULATOR", "1").output().expect("the program starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(difference(&folder.join("whole"), &folder.join("parts")).0, 0.0);
}

/// Without a driver the error names the library and the places; `Auto` takes the CPU and says why.
#[test]
fn a_missing_gpu_is_told() {
    if clip_host_cuda_driver::Device::count().is_ok_and(|count| count > 0) {
        eprintln!("skipped: there is a GPU");
        return;
    }
    let folder = small_run("cuda-missing");
    let ended = run(&folder, &["run", "small.ron", "--set", "backend=Cuda(device: 0)"]);
    ended.refused(&["backend", "libcuda.so.1", "CLIP_HOST_CUDA_PATH", "backend: Cpu"]);
    let ended = run(&folder, &["run", "small.ron", "--steps", "1"]).done();
    assert!(ended.stderr.contains("backend Auto: the CPU") && ended.stderr.contains("libcuda"), "{}", ended.stderr);
}

/// Every kernel that the recipes of the repository need, for A100 and H100. With grids' losses and optimizers, and both
/// precisions.
#[test]
fn recipes_compile_for_gpus() {
    if let Err(error) = compile::version() {
        eprintln!("skipped: {error}");
        return;
    }
    let folder = Folder::new("cuda-kernels");
    let recipes = root().join("recipes");
    let main = recipes.join("isogclr_radam.ron").display().to_string();
    let resnet = recipes.join("cc3m/isogclr_radam.ron").display().to_string();
    let vit = recipes.join("cc3m/isogclr_radam_vit.ron").display().to_string();
    let mut plans: Vec<Vec<String>> = vec![
        vec![main.clone(), "precision=F32".into()],
        vec![main.clone(), "precision=Bf16".into()],
        vec![main.clone(), "precision=Fp16".into()],
        vec![main.clone(), "optimizer.state_dtype=Bf16".into()],
        vec![resnet, "precision=Bf16".into()],
        vec![vit, "precision=Bf16".into()],
    ];
    for loss in ["clip", "cyclip", "vicreg", "onlineclr", "sogclr", "dynamic_temperature"] {
        plans.push(vec![main.clone(), format!("loss=(plugin: \"{loss}\")")]);
    }
    for optimizer in ["adamw", "nadam", "adafactor", "novograd", "sgd"] {
        let rest = "lr: 0.001, weight_decay: 0.02";
        plans.push(vec![main.clone(), format!("optimizer=(plugin: \"{optimizer}\", {rest})")]);
    }
    for (number, plan) in plans.iter().enumerate() {
        let out = format!("kernels{number}");
        let args: Vec<&str> = vec!["plan", &plan[0], "--synthetic", "--cuda", &out, "--set", &plan[1]];
        run(&folder, &args).done();
    }
    // Equal kernels have equal names: each is compiled once.
    let mut sources = std::collections::BTreeMap::new();
    for number in 0..plans.len() {
        for entry in std::fs::read_dir(folder.join(format!("kernels{number}"))).expect("kernels were written") {
            let path = entry.expect("folders can be listed").path();
            let name = path.file_name().expect("files have names").to_owned();
            sources.insert(name, std::fs::read_to_string(path).expect("kernels can be read"));
        }
    }
    assert!(sources.len() > 500, "{} kernels", sources.len());
    println!("{} kernels", sources.len());
    // Many at a time, since all begin alike.
    let bodies: Vec<&str> =
        sources.values().map(|s| s.strip_prefix(PRELUDE).expect("kernels have a prelude")).collect();
    std::thread::scope(|scope| {
        for arch in [(8, 0), (9, 0)] {
            let bodies = &bodies;
            scope.spawn(move || {
                for bodies in bodies.chunks(32) {
                    let source = PRELUDE.to_string() + &bodies.concat();
                    let cubin = compile::compile(&source, arch, &clip_host_cuda::gpu::OPTIONS);
                    let cubin = cubin.unwrap_or_else(|error| panic!("{error}"));
                    assert!(cubin.starts_with(b"\x7fELF"));
                }
            });
        }
    });
}
