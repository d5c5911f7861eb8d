//! `clip-host replay`: one plugin on given tensors.
//!
//! Who ports a loss from PyTorch dumps tensors there and compares here. This file reads and writes them; the plugin runs
//! in [`clip_host_model::replay`], through the same compiler and kernels as in training.

use crate::cli::{KindArg, ReplayArgs};
use crate::error::CliError;
use crate::settings;
use crate::{output, prepare};
use clip_host_model::replay::{self, Data, Tensor, Tensors};
use clip_host_model::{ModelError, Part};
use clip_host_plugin_api::describe::Kind;
use clip_host_plugin_api::scheduler::Progress;
use clip_host_plugins::Registry;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::path::Path;

pub fn run(args: &ReplayArgs) -> Result<(), CliError> {
    let part = part(args)?;
    let input = read(&args.input)?;
    let device = prepare::device_of(args.backend)?;
    let output = match args.kind {
        KindArg::Loss => replay::loss(&device, &part, &input),
        KindArg::Optimizer => replay::optimizer(&device, &part, args.lr, (args.weight_decay, &args.no_decay), &input),
        KindArg::Encoder => replay::encoder(&device, &part, &input),
        KindArg::Scheduler => replay::scheduler(&part, &progress(args), &input),
    };
    let output = output.map_err(|error| match error {
        ModelError::Replay(problem) => {
            let hint = "`clip-host replay --help` lists the tensors of each kind of plugin";
            failed("use", &args.input, problem, hint)
        }
        error @ ModelError::TensorSize { .. } => failed(
            "use",
            &args.input,
            error,
            "sizes follow from the plugin's settings: give the file's own with --config",
        ),
        error => error.into(),
    })?;
    write(&args.output, &output)?;
    output::line(&format!("{} tensors from {}: {}", output.len(), part.plugin, args.output.display()))
}

/// The plugin with its settings.
fn part(args: &ReplayArgs) -> Result<Part, CliError> {
    let kind = match args.kind {
        KindArg::Loss => Kind::Loss,
        KindArg::Optimizer => Kind::Optimizer,
        KindArg::Encoder => Kind::Encoder,
        KindArg::Scheduler => Kind::Scheduler,
    };
    let plugin = Registry::scan(&args.path).get(kind, &args.id)?;
    let config = settings::complete(&plugin, &args.config)?;
    Ok(Part { plugin, config })
}

/// What a scheduler is told of the run; step and epoch are the indexes of the file.
fn progress(args: &ReplayArgs) -> Progress {
    Progress {
        base_lr: args.lr,
        step: 0,
        steps_per_epoch: args.steps_per_epoch,
        total_steps: args.total_steps.unwrap_or(args.epochs.saturating_mul(args.steps_per_epoch)),
        epoch: 0,
        epochs: args.epochs,
        metric: args.metric,
        evaluations: 0,
    }
}

fn failed(action: &str, path: &Path, error: impl std::fmt::Display, hint: &str) -> CliError {
    CliError::Failed(format!("cannot {action} {}: {error}\nhint: {hint}", path.display()))
}

fn read(path: &Path) -> Result<Tensors, CliError> {
    let bytes = std::fs::read(path).map_err(|e| failed("read", path, e, "--in takes a safetensors file"))?;
    let hint = "write it with `safetensors.torch.save_file` or `safetensors.numpy.save_file`";
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| failed("read", path, format!("expected a safetensors file, got {e}"), hint))?;
    let tensor = |(name, view): (String, TensorView)| {
        let data = elements(view.dtype(), view.data()).ok_or_else(|| {
            let problem = format!("tensor `{name}`: expected F32, F64, I64 or I32, got {:?}", view.dtype());
            failed("read", path, problem, "convert it before it is saved")
        })?;
        Ok((name, Tensor { shape: view.shape().to_vec(), data }))
    };
    file.tensors().into_iter().map(tensor).collect()
}

fn elements(dtype: Dtype, bytes: &[u8]) -> Option<Data> {
    fn each<const N: usize, T>(bytes: &[u8], read: fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks::<N>().0.iter().map(|chunk| read(*chunk)).collect()
    }
    Some(match dtype {
        Dtype::F32 => Data::F32(each(bytes, f32::from_le_bytes)),
        Dtype::F64 => Data::F64(each(bytes, f64::from_le_bytes)),
        Dtype::I64 => Data::I64(each(bytes, i64::from_le_bytes)),
        Dtype::I32 => Data::I64(each(bytes, |b| i64::from(i32::from_le_bytes(b)))),
        _ => return None,
    })
}

/// Writes under a temporary name first: a half-written file must not pass for a result.
fn write(path: &Path, tensors: &Tensors) -> Result<(), CliError> {
    let hint = "check that the folder exists, is writable and has room";
    let stored = tensors.iter().map(|(name, tensor)| {
        let (dtype, bytes): (Dtype, Vec<u8>) = match &tensor.data {
            Data::F32(v) => (Dtype::F32, v.iter().flat_map(|x| x.to_le_bytes()).collect()),
            Data::F64(v) => (Dtype::F64, v.iter().flat_map(|x| x.to_le_bytes()).collect()),
            Data::I64(v) => (Dtype::I64, v.iter().flat_map(|x| x.to_le_bytes()).collect()),
        };
        (name, dtype, &tensor.shape, bytes)
    });
    let stored: Vec<_> = stored.collect();
    let views = stored.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.to_vec(), bytes);
        view.map(|view| (name.as_str(), view)).map_err(|e| failed("write", path, format!("tensor `{name}`: {e}"), hint))
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    let bytes = safetensors::serialize(views, None).map_err(|e| failed("write", path, e, hint))?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    std::fs::write(&temporary, bytes)
        .and_then(|()| std::fs::rename(&temporary, path))
        .inspect_err(|_| {
            // Gives the room back; that it may fail as well changes nothing.
            let _ = std::fs::remove_file(&temporary);
        })
        .map_err(|e| failed("write", path, e, hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_come_back_as_they_were_written() {
        let path = std::env::temp_dir().join(format!("clip-host-replay-{}.safetensors", std::process::id()));
        let tensor = |shape: &[usize], data| Tensor { shape: shape.to_vec(), data };
        let written = Tensors::from([
            ("a".into(), tensor(&[2, 1], Data::F32(vec![1.5, f32::MIN_POSITIVE]))),
            ("b".into(), tensor(&[], Data::F64(vec![0.1]))),
            ("c".into(), tensor(&[3], Data::I64(vec![-1, 0, i64::MAX]))),
        ]);
        write(&path, &written).unwrap();
        assert_eq!(read(&path).unwrap(), written);
        std::fs::remove_file(&path).unwrap();
        let error = read(&path).unwrap_err();
        assert!(matches!(&error, CliError::Failed(text) if text.contains("hint:")), "{error:?}");
    }

    #[test]
    fn what_is_no_tensor_file_is_told() {
        let path = std::env::temp_dir().join(format!("clip-host-replay-bad-{}", std::process::id()));
        std::fs::write(&path, b"not a tensor file at all").unwrap();
        let error = read(&path).unwrap_err();
        assert!(matches!(&error, CliError::Failed(text) if text.contains("expected a safetensors file")), "{error:?}");
        let view = TensorView::new(Dtype::BF16, vec![1], &[0, 0]).unwrap();
        std::fs::write(&path, safetensors::serialize([("x", view)], None).unwrap()).unwrap();
        let error = read(&path).unwrap_err();
        assert!(matches!(&error, CliError::Failed(text) if text.contains("`x`") && text.contains("BF16")), "{error:?}");
        std::fs::remove_file(&path).unwrap();
    }
}
