//! The recipe's plugins, loaded and configured, and the model that they make.

use crate::error::TrainError;
use crate::run_folder::PluginRecord;
use clip_host_cuda::gpu::Options;
use clip_host_data::DataConfig;
use clip_host_model::{Device, GradScaler, Halves, ModelError, ModelSpec, ParamGroup, Part};
use clip_host_plugin_api::describe::Kind;
use clip_host_plugin_api::scheduler::{Progress, ScheduleAnswer, ScheduleRequest};
use clip_host_plugins::{ConfigError, Plugin, PluginError, Registry};
use clip_host_recipe::{Backend, Dtype, PluginChoice, Precision, Recipe, RecipeError};
use std::sync::Arc;

/// The plugins of a run, each with its complete settings.
#[derive(Clone)]
pub struct Plugins {
    /// Encoder of images.
    pub image_encoder: Part,
    /// Encoder of captions.
    pub text_encoder: Part,
    /// The loss.
    pub loss: Part,
    /// The optimizer.
    pub optimizer: Part,
    /// The learning-rate schedule.
    pub scheduler: Part,
}

/// The registry that a recipe asks for.
pub fn registry(recipe: &Recipe) -> Registry {
    Registry::scan(&recipe.plugins.path)
}

/// The hint at the end of a message, apart from the rest: a last line `hint: …`, or a last `(hint: …)`.
pub fn split_hint(text: &str) -> (String, Option<String>) {
    if let Some((message, hint)) = text.rsplit_once("\nhint: ") {
        return (message.into(), Some(hint.into()));
    }
    match text.strip_suffix(')').and_then(|text| text.rsplit_once(" (hint: ")) {
        Some((message, hint)) => (message.into(), Some(hint.into())),
        None => (text.into(), None),
    }
}

/// A message with its hint on a line of its own, however it came.
pub fn with_hint_line(text: &str) -> String {
    match split_hint(text) {
        (message, Some(hint)) => format!("{message}\nhint: {hint}"),
        (message, None) => message,
    }
}

impl Plugins {
    /// Loads the recipe's plugins and checks their settings.
    ///
    /// # Errors
    /// Everything that is wrong with any of them, each where the recipe says it.
    pub fn choose(recipe: &Recipe, registry: &Registry) -> Result<Plugins, Vec<RecipeError>> {
        let mut errors = Vec::new();
        let mut part = |kind: Kind, section: &str, choice: &PluginChoice| {
            let chosen = choose(recipe, registry, kind, section, choice);
            chosen.map_err(|found| errors.extend(found)).ok()
        };
        let image_encoder = part(Kind::Encoder, "model.image_encoder", &recipe.model.image_encoder.choice);
        let text_encoder = part(Kind::Encoder, "model.text_encoder", &recipe.model.text_encoder.choice);
        let loss = part(Kind::Loss, "loss", &recipe.loss);
        let optimizer = part(Kind::Optimizer, "optimizer", &recipe.optimizer.choice);
        let scheduler = part(Kind::Scheduler, "scheduler", &recipe.scheduler);
        match (image_encoder, text_encoder, loss, optimizer, scheduler) {
            (Some(image_encoder), Some(text_encoder), Some(loss), Some(optimizer), Some(scheduler)) => {
                Ok(Plugins { image_encoder, text_encoder, loss, optimizer, scheduler })
            }
            _ => Err(errors),
        }
    }

    /// The plugins with what they are in the run, in processing order.
    pub fn parts(&self) -> [(&'static str, &Part); 5] {
        [
            ("image_encoder", &self.image_encoder),
            ("text_encoder", &self.text_encoder),
            ("loss", &self.loss),
            ("optimizer", &self.optimizer),
            ("scheduler", &self.scheduler),
        ]
    }

    /// What `plugins.json` records.
    pub fn records(&self) -> Vec<PluginRecord> {
        let record = |(role, part): (&str, &Part)| PluginRecord {
            role: role.into(),
            id: part.plugin.id().into(),
            version: part.plugin.version().into(),
            file: part.plugin.file().into(),
            sha256: part.plugin.sha256().into(),
        };
        self.parts().map(record).into()
    }

    /// The model of a recipe. `dataset_size` is the length of per-sample tables: the larger of the numbers of training
    /// images and captions.
    pub fn model(&self, recipe: &Recipe, data: &DataConfig, dataset_size: usize, device: Device) -> ModelSpec {
        ModelSpec {
            image_encoder: self.image_encoder.clone(),
            text_encoder: self.text_encoder.clone(),
            loss: self.loss.clone(),
            optimizer: self.optimizer.clone(),
            embed_dim: recipe.model.embed_dim,
            batch: recipe.train.batch_size,
            image_size: data.image_size,
            text_length: data.text.max_length,
            precision: match recipe.precision {
                Precision::F32 => clip_host_model::Precision::F32,
                Precision::Bf16 => clip_host_model::Precision::Bf16,
                Precision::Fp16 => clip_host_model::Precision::Fp16,
            },
            grad_scaler: grad_scaler(recipe.train.grad_scaler.unwrap_or_default()),
            halves: Halves {
                image_encoder: recipe.model.image_encoder.weights_dtype == Dtype::Bf16,
                text_encoder: recipe.model.text_encoder.weights_dtype == Dtype::Bf16,
                statistics: recipe.optimizer.state_dtype == Dtype::Bf16,
            },
            dataset_size,
            weight_decay: recipe.optimizer.weight_decay,
            no_decay: recipe.optimizer.no_decay.clone(),
            groups: recipe.optimizer.groups.iter().map(|group| param_group(group, recipe.optimizer.lr)).collect(),
            clip_grad_value: recipe.optimizer.clip_grad_value,
            clip_grad_norm: recipe.optimizer.clip_grad_norm,
            seed: recipe.seed,
            threads: recipe.train.threads,
            device,
        }
    }

    /// The learning rate of the coming step, and what the scheduler wants to remember.
    ///
    /// # Errors
    /// The plugin's.
    pub fn learning_rate(&self, progress: Progress, state: serde_json::Value) -> Result<ScheduleAnswer, PluginError> {
        let config = self.scheduler.config.clone();
        self.scheduler.plugin.schedule(&ScheduleRequest { config, progress, state })
    }

    /// Number of token ids that the text encoder has embeddings for, where its settings say so under the usual name.
    pub fn vocab_size(&self) -> Option<usize> {
        let size = self.text_encoder.config.get("vocab_size")?.as_u64()?;
        usize::try_from(size).ok()
    }
}

fn grad_scaler(settings: clip_host_recipe::GradScaler) -> GradScaler {
    let clip_host_recipe::GradScaler { init_scale, growth_factor, backoff_factor, growth_interval } = settings;
    GradScaler { init_scale, growth_factor, backoff_factor, growth_interval }
}

fn param_group(group: &clip_host_recipe::ParamGroup, lr: f64) -> ParamGroup {
    ParamGroup {
        params: group.params.clone(),
        lr_scale: group.lr.map_or(1.0, |own| own / lr),
        weight_decay: group.weight_decay,
        freeze: group.freeze,
        freeze_epochs: group.freeze_epochs,
    }
}

/// What is wrong with the recipe's groups of parameters or their states, in its place: a pattern that matches none, nothing
/// to train, or a type for states that the optimizer does not keep.
pub fn check_groups(recipe: &Recipe, spec: &ModelSpec) -> Option<RecipeError> {
    use clip_host_recipe::Part as RecipePart;
    let error = clip_host_model::check_groups(spec).err()?;
    let key = match &error {
        ModelError::Pattern { key, .. } => key,
        ModelError::AllFrozen => "optimizer.groups",
        ModelError::NoStatistics { .. } => "optimizer.state_dtype",
        // A plugin's refusal, which is told where the plugin is asked in earnest.
        _ => return None,
    };
    let text = error.to_string();
    let (message, hint) = split_hint(text.strip_prefix(&format!("{key}: ")).unwrap_or(&text));
    Some(recipe.error_at(key, RecipePart::Value, message, hint))
}

fn choose(
    recipe: &Recipe,
    registry: &Registry,
    kind: Kind,
    section: &str,
    choice: &PluginChoice,
) -> Result<Part, Vec<RecipeError>> {
    use clip_host_recipe::Part as RecipePart;
    let plugin: Arc<Plugin> =
        registry.choose(kind, &choice.plugin, choice.path.as_deref(), choice.sha256.as_deref()).map_err(|error| {
            if let Some(details) = error.details() {
                tracing::debug!("{details}");
            }
            let (message, hint) = split_hint(&error.to_string());
            vec![recipe.error_at(&format!("{section}.plugin"), RecipePart::Value, message, hint)]
        })?;
    let config = plugin.complete(&choice.config).map_err(|errors| {
        let placed = errors.into_iter().map(|error| config_error(recipe, section, error));
        placed.collect::<Vec<_>>()
    })?;
    Ok(Part { plugin, config })
}

/// A mistake in a plugin's settings, shown where the recipe says it. `section` is the plugin's, `loss` for instance.
pub fn config_error(recipe: &Recipe, section: &str, error: ConfigError) -> RecipeError {
    let path = format!("{section}.config.{}", error.path);
    let message = match error.message.contains(&error.plugin) {
        true => error.message,
        false => format!("{}: {}", error.plugin, error.message),
    };
    // What is allowed stands in the message; where nothing nearer is known, the whole list is one command away.
    let inspect =
        || Some(format!("`clip-host plugins inspect {}` shows all settings", error.plugin.split('`').nth(1)?));
    recipe.error_at(path.trim_end_matches('.'), error.part, message, error.hint.or_else(inspect))
}

/// What a recipe asks for that this machine does not have, or that its precision has no use for, all at once.
pub fn check_backend(recipe: &Recipe) -> Vec<RecipeError> {
    let mut errors: Vec<RecipeError> = match recipe.backend {
        Backend::Cuda { .. } => device(recipe).err().map(|error| *error).into_iter().collect(),
        Backend::Auto | Backend::Cpu => vec![],
    };
    if recipe.train.grad_scaler.is_some() && recipe.precision != Precision::Fp16 {
        let message = format!(
            "expected `precision: Fp16` beside it, got `{:?}`: only there is the loss scaled",
            recipe.precision
        );
        let hint = "write `grad_scaler: None`, or take it out".to_string();
        errors.push(recipe.error_at("train.grad_scaler", clip_host_recipe::Part::Value, message, Some(hint)));
    }
    errors
}

/// The device that a recipe asks for. `Auto` takes the first GPU if driver and libraries are there, and says what it took
/// and why.
///
/// # Errors
/// If the recipe asks for a GPU and there is none, at the recipe's `backend`: with the library that was not found and where
/// it was looked for.
pub fn device(recipe: &Recipe) -> Result<Device, Box<RecipeError>> {
    use clip_host_recipe::Part as RecipePart;
    match recipe.backend {
        Backend::Cpu => Ok(Device::Cpu),
        Backend::Auto => Ok(match open_gpu(0, false) {
            Ok(gpu) => {
                tracing::info!("backend Auto: {}, since driver and libraries are there", gpu.name());
                Device::Cuda(gpu)
            }
            Err(why) => {
                let why = why.to_string();
                // The places that were looked in are for who insists on a GPU.
                let why = why.lines().next().unwrap_or_default().trim_end_matches(" in:");
                tracing::info!("backend Auto: the CPU ({why})");
                Device::Cpu
            }
        }),
        Backend::Cuda { device, tf32 } => match open_gpu(device as usize, tf32) {
            Ok(gpu) => Ok(Device::Cuda(gpu)),
            Err(error) => {
                let (message, hint) = split_hint(&error.to_string());
                let hint = hint.map_or(String::new(), |h| format!("{h}; "));
                let hint = format!("{hint}or write `backend: Cpu`, or `Auto` for whatever there is");
                Err(Box::new(recipe.error_at("backend", RecipePart::Value, message, Some(hint))))
            }
        },
    }
}

/// Opens a GPU. Where the variable `CLIP_HOST_CUDA_EMULATOR` is set, the host's emulator stands for it: its kernels are
/// those of the GPU, compiled for the CPU. That is slow, and for tests.
fn open_gpu(index: usize, tf32: bool) -> Result<Arc<dyn clip_host_cuda::Machine>, String> {
    match std::env::var_os("CLIP_HOST_CUDA_EMULATOR").is_some_and(|value| !value.is_empty()) {
        true => match clip_host_cuda_emulator::Emulator::new() {
            Ok(emulator) => Ok(Arc::new(emulator)),
            Err(error) => Err(error.to_string()),
        },
        false => clip_host_cuda::gpu::open_with(index, Options { tf32, ..Options::default() })
            .map_err(|error| error.to_string()),
    }
}

/// A plugin's refusal as this crate's error.
pub(crate) fn plugin_error(error: &PluginError) -> TrainError {
    TrainError::Plugin(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hint_is_the_last_line() {
        assert_eq!(split_hint("a\nb\nhint: c"), ("a\nb".into(), Some("c".into())));
        assert_eq!(split_hint("a\nhint: b\nhint: c"), ("a\nhint: b".into(), Some("c".into())));
        assert_eq!(split_hint("a (hint: b (c))"), ("a".into(), Some("b (c)".into())));
        assert_eq!(split_hint("a"), ("a".into(), None));
        assert_eq!(with_hint_line("a (hint: b)"), "a\nhint: b");
    }
}
