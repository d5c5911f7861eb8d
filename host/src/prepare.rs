//! From a recipe file to what commands work with.

use crate::cli::{BackendArg, SetArgs};
use crate::error::CliError;
use clip_host_data::{DataConfig, DataError};
use clip_host_model::Device;
use clip_host_plugins::Registry;
use clip_host_recipe::{Recipe, RecipeErrors};
use clip_host_train::{Plugins, assemble};
use std::path::{Path, PathBuf};

/// Loads a recipe with its data section; the recipe returned has that section's defaults written out.
pub fn recipe(path: &Path, sets: &[String]) -> Result<(Recipe, DataConfig), RecipeErrors> {
    resolved(Recipe::load(path, sets)?)
}

/// The recipe with its data section's defaults written out, and that section.
pub fn resolved(mut recipe: Recipe) -> Result<(Recipe, DataConfig), RecipeErrors> {
    let data: DataConfig = recipe.section("data")?;
    recipe.resolve_data(&data)?;
    Ok((recipe, data))
}

/// The recipe's plugins; all that is wrong with them at once.
pub fn plugins(recipe: &Recipe) -> Result<Plugins, CliError> {
    Ok(plugins_of(recipe, &assemble::registry(recipe))?)
}

/// As [`plugins`], from a registry that was scanned before.
pub fn plugins_of(recipe: &Recipe, registry: &Registry) -> Result<Plugins, RecipeErrors> {
    let errors = assemble::check_backend(recipe);
    match Plugins::choose(recipe, registry) {
        Ok(plugins) if errors.is_empty() => Ok(plugins),
        Ok(_) => Err(RecipeErrors(errors)),
        Err(mut found) => {
            found.extend(errors);
            Err(RecipeErrors(found))
        }
    }
}

/// Where the recipe's model lives. `Auto` says which device it took, and why.
pub fn device(recipe: &Recipe) -> Result<Device, CliError> {
    assemble::device(recipe).map_err(|error| (*error).into())
}

/// The device that a flag names.
pub fn device_of(backend: BackendArg) -> Result<Device, CliError> {
    let open = || clip_host_cuda::gpu::open(0);
    match backend {
        BackendArg::Cpu => Ok(Device::Cpu),
        BackendArg::Auto => Ok(open().map_or(Device::Cpu, Device::Cuda)),
        BackendArg::Emulator => match clip_host_cuda_emulator::Emulator::new() {
            Ok(emulator) => Ok(Device::Cuda(std::sync::Arc::new(emulator))),
            Err(error) => Err(CliError::Failed(error.to_string())),
        },
        BackendArg::Cuda => open().map(Device::Cuda).map_err(|error| CliError::Failed(error.to_string())),
    }
}

/// The folder that relative paths in recipes start from: the current one, so that a recipe copied into a run folder still
/// means the same files.
pub fn base() -> Result<PathBuf, CliError> {
    std::env::current_dir().map_err(|error| {
        CliError::Failed(format!("cannot find the current folder: {error}\nhint: change to a folder that exists"))
    })
}

/// The overrides of a command: `--set`, then those that have a flag of their own.
pub fn sets(set: &SetArgs, flags: &[(&str, Option<String>)]) -> Vec<String> {
    let flags = flags.iter().filter_map(|(key, value)| Some(format!("{key}={}", value.as_ref()?)));
    set.sets.iter().cloned().chain(flags).collect()
}

/// Length of per-sample tables for measurements without data: it does not change the time of a step.
pub fn synthetic_dataset(batch: usize) -> usize {
    batch * 16
}

/// The number of threads that a setting stands for: 0 is one for each core.
pub fn threads(setting: usize) -> usize {
    match setting {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}

/// A data error, with where to get the data if it is CC3M's.
pub fn with_source(error: &DataError) -> String {
    let text = error.to_string();
    let missing = matches!(error, DataError::Missing { .. } | DataError::Pattern { .. });
    if missing && text.to_lowercase().contains("cc3m") {
        format!(
            "{text}; CC3M's tars: `huggingface-cli download pixparse/cc3m-wds --repo-type dataset --local-dir data/cc3m` \
             (2.9 million pairs), or make them with img2dataset as data/README.md shows"
        )
    } else {
        text
    }
}
