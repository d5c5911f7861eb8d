//! `clip-host bench`: how fast steps and data are.

use crate::cli::{BackendArg, BenchDataArgs, BenchStepArgs};
use crate::error::CliError;
use crate::profile::{self, Profile};
use crate::{output, prepare};
use clip_host_cpu::ThreadPool;
use clip_host_cpu::peak::Peaks;
use clip_host_data::{Batch, Data, DataConfig, DataError, ImageTransform, Loader, Position};
use clip_host_model::{Ahead, Device, Images, ModelError, ModelSpec, Session, StepInput};
use serde_json::{Value, json};
use std::time::Instant;

/// Steps before the measured ones: memory is touched and caches are filled.
const WARM_UP: u64 = 2;
const PHASES_NOTE: &str =
    "phases are fused where that is faster: a kernel that spans two counts in the one it begins in";

pub fn step(args: BenchStepArgs) -> Result<(), CliError> {
    let flags = [
        ("train.batch_size", args.batch.map(|n| n.to_string())),
        ("data.image_size", args.image_size.map(|n| n.to_string())),
        ("backend", args.backend.and_then(|b| b.ron()).map(str::to_string)),
    ];
    let (recipe, config) = prepare::recipe(&args.recipe, &prepare::sets(&args.set, &flags))?;
    let plugins = prepare::plugins(&recipe)?;
    let batch = recipe.train.batch_size;
    let device = match args.backend {
        Some(BackendArg::Emulator) => prepare::device_of(BackendArg::Emulator)?,
        _ => prepare::device(&recipe)?,
    };
    let (device_name, on_gpu) = (device.name(), matches!(device, Device::Cuda(_)));
    let levels = *ImageTransform::new(&config).levels();
    let (mut source, dataset_size) = match args.synthetic {
        true => {
            let mut source = Source::synthetic(&config, batch, plugins.vocab_size().unwrap_or(30_522));
            if on_gpu {
                source.with_pixels();
            }
            (source, prepare::synthetic_dataset(batch))
        }
        false => {
            let mut data = Data::open(&config, &prepare::base()?)?;
            data.pixels = on_gpu;
            let loader = data.train_loader(batch, recipe.seed, Position::default(), None)?;
            (Source::Loader(Box::new(loader)), data.train.num_images().max(data.train.num_texts()))
        }
    };
    let spec = plugins.model(&recipe, &config, dataset_size, device);
    let mut profile = match &args.profile {
        // The file first: measuring for nothing would be a pity.
        Some(path) => Some(Profile::create(path, || peaks_of(&spec))?),
        None => None,
    };
    let mut session = Session::new(spec)?;

    let mut times = Times::default();
    if args.kernels.is_some() || profile.is_some() {
        session.time_kernels();
    }
    if let Some(profile) = &mut profile {
        profile.describe(session.kernel_infos());
    }
    let mut upcoming: Option<Result<Batch, CliError>> = None;
    for step in 0..WARM_UP + args.steps {
        let begun = Instant::now();
        let (input, sent) = match upcoming.take() {
            Some(batch) => (batch?, true),
            None => (source.next(step)?, false),
        };
        let waited = begun.elapsed();
        let images = match on_gpu {
            false => Images::Normalized(&input.images),
            true if sent => Images::Sent { levels: &levels },
            true => Images::Pixels { pixels: &input.pixels, levels: &levels },
        };
        // As in training: while a GPU is at this step, the next one's images are sent.
        let fetch = |ahead: &mut Ahead| {
            if on_gpu {
                let next = source.next(step + 1).map_err(CliError::from);
                upcoming = Some(next.and_then(|next| ahead.send(&next.pixels).map(|()| next).map_err(CliError::from)));
            }
        };
        let step_input = StepInput {
            images,
            input_ids: &input.input_ids,
            attention_mask: &input.attention_mask,
            image_ids: &input.sample_ids,
            text_ids: &input.text_ids,
            epoch: input.epoch,
            step,
            // Measured steps are all of one epoch.
            steps_per_epoch: u64::MAX,
            lr: recipe.optimizer.lr,
        };
        let output = session.train_step_while(&step_input, fetch)?;
        tracing::debug!(step, loss = output.loss, "measured step");
        source.recycle(input);
        if step >= WARM_UP {
            let phases = session.phases();
            times.step.push(milliseconds(begun));
            if let Some(profile) = &mut profile {
                profile.step(begun, waited, session.spans());
            }
            times.data.push(waited.as_secs_f64() * 1e3);
            times.forward.push(phases.forward_ms);
            times.backward.push(phases.backward_ms);
            times.update.push(phases.update_ms);
        }
    }

    if let Some(most) = args.kernels {
        print_kernels(&session, most, WARM_UP + args.steps)?;
    }
    let stats = session.stats();
    let step_ms = median(&mut times.step);
    let mut result = json!({
        "device": device_name,
        "samples_per_second": batch as f64 * 1e3 / step_ms,
        "step_ms": step_ms,
        "phases_ms": {
            "data": median(&mut times.data),
            "forward": median(&mut times.forward),
            "backward": median(&mut times.backward),
            "update": median(&mut times.update),
        },
        "phases_note": PHASES_NOTE,
        "compile_ms": stats.compile_ms,
        "init_ms": stats.init_ms,
        "peak_rss_bytes": peak_rss_bytes(),
        "gflops": stats.flops / (step_ms * 1e6),
        "gflop_per_step": stats.flops / 1e9,
        "batch": batch,
        "image_size": config.image_size,
        "steps": args.steps,
        "synthetic": args.synthetic,
        "params": stats.params,
        "kernels": stats.kernels,
        "arena_bytes": stats.arena_bytes,
        "persistent_bytes": stats.persistent_bytes,
    });
    let Some(mut profile) = profile else { return print_result(&result, args.json) };
    profile.write()?;
    if args.json {
        result["profile"] = profile.json_form();
        return print_result(&result, true);
    }
    print_result(&result, false)?;
    output::print(&profile.tables())
}

/// The limits of where the model lives.
fn peaks_of(spec: &ModelSpec) -> Result<Peaks, CliError> {
    let threads = prepare::threads(spec.threads);
    match &spec.device {
        Device::Cpu => Ok(Peaks::measure(&ThreadPool::new(threads), profile::BUDGET)),
        Device::Cuda(machine) => {
            // The emulator is not what large products are for.
            let size = if machine.name().contains("emulator") { 64 } else { 8192 };
            let peaks = clip_host_cuda::peak::measure(machine, size).map_err(ModelError::from)?;
            let clip_host_cuda::peak::Peaks { gemm_f32, gemm_bf16, copy } = peaks;
            Ok(Peaks { threads, gemm_f32, gemm_bf16, copy })
        }
    }
}

/// The kernels that take most of the step, on stderr: the result stays alone on stdout.
fn print_kernels(session: &Session, most: usize, steps: u64) -> Result<(), CliError> {
    let mut kernels = session.kernels();
    let total: f64 = kernels.iter().map(|k| k.1).sum();
    kernels.sort_by(|a, b| b.1.total_cmp(&a.1));
    for (text, seconds) in kernels.iter().take(most) {
        eprintln!("{:8.2} ms {:5.1} %  {text}", seconds * 1e3 / steps as f64, 100.0 * seconds / total);
    }
    Ok(())
}

pub fn data(args: &BenchDataArgs) -> Result<(), CliError> {
    let (recipe, config) = prepare::recipe(&args.recipe, &args.set.sets)?;
    let data = Data::open(&config, &prepare::base()?)?;
    let workers = args.workers.unwrap_or(config.workers);
    let found = clip_host_data::bench::images_per_second(&data, recipe.train.batch_size, workers, args.seconds)?;
    let value = serde_json::to_value(&found).unwrap_or_default();
    print_result(&value, args.json)
}

fn print_result(result: &Value, json: bool) -> Result<(), CliError> {
    if json {
        return output::json(result);
    }
    let Value::Object(entries) = result else { return output::json(result) };
    for (name, value) in entries {
        let text = match value {
            Value::Number(n) if n.is_f64() => format!("{:.3}", n.as_f64().unwrap_or_default()),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        output::line(&format!("{name:20} {text}"))?;
    }
    Ok(())
}

/// Milliseconds of each measured step.
#[derive(Default)]
struct Times {
    step: Vec<f64>,
    data: Vec<f64>,
    forward: Vec<f64>,
    backward: Vec<f64>,
    update: Vec<f64>,
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// The most memory that the process has had at once; null where the system does not say.
fn peak_rss_bytes() -> Value {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kilobytes.map_or(Value::Null, |kilobytes| (kilobytes * 1024).into())
}

/// Where the batches of a measurement come from.
pub(super) enum Source {
    Loader(Box<Loader>),
    /// Batches that are not in use.
    Synthetic(Vec<Batch>),
}

impl Source {
    /// One random batch, used for every step: normal-like pixels, full captions of random ids.
    pub(super) fn synthetic(config: &DataConfig, batch: usize, vocab_size: usize) -> Source {
        // Weyl steps of splitmix64; speed is all that matters here.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        let uniform = |bits: u64| (bits >> 40) as f32 / (1u64 << 24) as f32;
        let (pixels, tokens) = (3 * config.image_size * config.image_size, config.text.max_length);
        let images = (0..batch * pixels).map(|_| 4.0 * uniform(next()) - 2.0).collect();
        let input_ids = (0..batch * tokens).map(|_| (next() % vocab_size.max(1) as u64) as i32).collect();
        Source::Synthetic(vec![Batch {
            epoch: 0,
            step: 0,
            len: batch,
            images,
            input_ids,
            attention_mask: vec![1.0; batch * tokens],
            sample_ids: (0..batch as i32).collect(),
            text_ids: (0..batch as i32).collect(),
            pixels: Vec::new(),
        }])
    }

    /// Random pixels instead of normalised images, in two batches: one is sent ahead while the other is trained on.
    fn with_pixels(&mut self) {
        if let Source::Synthetic(batches) = self {
            for batch in batches.iter_mut() {
                batch.pixels = std::mem::take(&mut batch.images).iter().map(|v| (v * 63.0 + 128.0) as u8).collect();
            }
            batches.extend_from_within(..);
        }
    }

    pub(super) fn next(&mut self, step: u64) -> Result<Batch, DataError> {
        match self {
            Source::Loader(loader) => loader.next_batch()?.ok_or(DataError::Stopped),
            Source::Synthetic(batches) => {
                let mut batch = batches.pop().unwrap_or_default();
                batch.step = step;
                // Other samples at every step, as in training.
                let rows = batch.len as i32;
                let first = (step % 16) as i32 * rows;
                for ids in [&mut batch.sample_ids, &mut batch.text_ids] {
                    ids.iter_mut().zip(first..first + rows).for_each(|(id, value)| *id = value);
                }
                Ok(batch)
            }
        }
    }

    fn recycle(&mut self, batch: Batch) {
        match self {
            Source::Loader(loader) => loader.recycle(batch),
            Source::Synthetic(batches) => batches.push(batch),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&mut []), 0.0);
    }

    #[test]
    fn synthetic_batches_fit_the_model() {
        let config = DataConfig { image_size: 8, ..DataConfig::default() };
        let mut source = Source::synthetic(&config, 4, 11);
        for step in 0..20 {
            let batch = source.next(step).unwrap();
            assert_eq!((batch.images.len(), batch.input_ids.len()), (4 * 3 * 64, 4 * 30));
            assert!(batch.input_ids.iter().all(|id| (0..11).contains(id)));
            assert!(batch.sample_ids.iter().all(|id| (0..64).contains(id)));
            source.recycle(batch);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_says_how_much_memory() {
        assert!(peak_rss_bytes().as_u64().is_some_and(|bytes| bytes > 1 << 20));
    }
}
