//! `clip-host check`: everything that can be known wrong before training, all at once.

use crate::cli::CheckArgs;
use crate::error::CliError;
use crate::{output, prepare};
use clip_host_data::{Data, DataConfig, DataError};
use clip_host_model::Device;
use clip_host_plugin_api::encoder::{EncoderRequest, InputShape};
use clip_host_plugin_api::export::Request;
use clip_host_plugin_api::ir::{Fragment, Op};
use clip_host_plugin_api::loss::LossRequest;
use clip_host_plugin_api::optimizer::{OptimizerRequest, ParamInfo, ScalarsRequest};
use clip_host_plugin_api::scheduler::Progress;
use clip_host_recipe::{Encoder, Part, Recipe, RecipeError};
use clip_host_train::pretrained::Weights;
use clip_host_train::{Plugins, TrainError, assemble};
use serde::Serialize;
use std::path::Path;

/// What was found. Errors would stop a run; warnings would not, or only on this machine.
#[derive(Debug, Default, Serialize)]
struct Findings {
    ok: bool,
    errors: Vec<String>,
    warnings: Vec<String>,
    /// Lines about what is well.
    facts: Vec<String>,
}

pub fn run(args: &CheckArgs) -> Result<(), CliError> {
    let mut findings = Findings::default();
    check(&args.recipe, &args.set.sets, &mut findings)?;
    findings.ok = findings.errors.is_empty();
    if args.json {
        output::json(&findings)?;
    } else {
        for fact in &findings.facts {
            output::line(fact)?;
        }
        for warning in &findings.warnings {
            output::line(&format!("warning: {warning}"))?;
        }
        for error in &findings.errors {
            output::line(&format!("error: {error}"))?;
        }
        let (errors, warnings) = (findings.errors.len(), findings.warnings.len());
        let verdict = if findings.ok { "can be run" } else { "cannot be run" };
        output::line(&format!("{} {verdict}: {errors} errors, {warnings} warnings", args.recipe.display()))?;
    }
    if findings.ok { Ok(()) } else { Err(CliError::Reported) }
}

fn check(path: &Path, sets: &[String], findings: &mut Findings) -> Result<(), CliError> {
    let recipe = match Recipe::load(path, sets) {
        Ok(recipe) => recipe,
        Err(errors) => {
            findings.errors.extend(errors.into_iter().map(|error| error.to_string()));
            return Ok(());
        }
    };
    findings.errors.extend(assemble::check_backend(&recipe).iter().map(ToString::to_string));
    let plugins = match Plugins::choose(&recipe, &assemble::registry(&recipe)) {
        Ok(plugins) => Some(plugins),
        Err(errors) => {
            findings.errors.extend(errors.iter().map(ToString::to_string));
            None
        }
    };
    let config: Option<DataConfig> = match recipe.section("data") {
        Ok(config) => Some(config),
        Err(errors) => {
            findings.errors.extend(errors.into_iter().map(|error| error.to_string()));
            None
        }
    };
    let data = match &config {
        Some(config) => check_data(&recipe, config, findings)?,
        None => None,
    };
    if let (Some(plugins), Some(config)) = (&plugins, &config) {
        check_model(&recipe, plugins, config, data.as_ref(), findings);
    }
    Ok(())
}

/// The data section, and the data if it is there.
fn check_data(recipe: &Recipe, config: &DataConfig, findings: &mut Findings) -> Result<Option<Data>, CliError> {
    let base = prepare::base()?;
    let mut usable = true;
    for error in config.check(&base) {
        usable = false;
        let text = prepare::with_source(&error);
        match &error {
            // A recipe is no worse for data that was not fetched yet. A file missing beside others is a mistake.
            DataError::Missing { path, .. } if path.parent().is_some_and(|folder| !folder.exists()) => {
                findings.warnings.push(format!("{text}\n(a run stops here until the data is there)"));
            }
            DataError::Setting { key, expected, got, hint } => {
                let message = format!("expected {expected}, got {got}");
                let error = recipe.error_at(&format!("data.{key}"), Part::Value, message, Some(hint.clone()));
                findings.errors.push(error.to_string());
            }
            _ => findings.errors.push(text),
        }
    }
    if !usable {
        return Ok(None);
    }
    let data = match Data::open(config, &base) {
        Ok(data) => data,
        Err(error) => {
            findings.errors.push(prepare::with_source(&error));
            return Ok(None);
        }
    };
    let (train, val) = (&data.train, &data.val);
    findings.facts.push(format!(
        "data: {} images with {} captions to train on, {} images with {} captions held out",
        train.num_images(),
        train.num_texts(),
        val.num_images(),
        val.num_texts()
    ));
    for (name, split) in [("train", train), ("val", val)] {
        if split.skipped().total() > 0 {
            findings.warnings.push(format!("data.{name}: skipped {}", split.skipped()));
        }
    }
    if val.num_images() == 0 {
        findings.warnings.push("data.val: there is no held-out data, so nothing is evaluated".into());
    }
    let batch = recipe.train.batch_size;
    if batch > train.num_images() {
        let message = format!("expected at most the {} training images, got {batch}", train.num_images());
        let hint = Some("lower the batch size, or add data".into());
        findings.errors.push(recipe.error_at("train.batch_size", Part::Value, message, hint).to_string());
    }
    Ok(Some(data))
}

/// Every plugin builds what the run will ask of it.
fn check_model(recipe: &Recipe, plugins: &Plugins, config: &DataConfig, data: Option<&Data>, findings: &mut Findings) {
    let mut errors: Vec<RecipeError> = Vec::new();
    let mut wrong_weights: Vec<RecipeError> = Vec::new();
    let mut refused = |section: &str, text: &str| {
        let (message, hint) = assemble::split_hint(text);
        errors.push(recipe.error_at(&format!("{section}.plugin"), Part::Value, message, hint));
    };
    let batch = recipe.train.batch_size;
    let (height, width) = (config.image_size, config.image_size);
    let text = InputShape::Text { length: config.text.max_length };
    let encoders = [
        (
            "model.image_encoder",
            &plugins.image_encoder,
            InputShape::Image { height, width },
            &recipe.model.image_encoder,
        ),
        ("model.text_encoder", &plugins.text_encoder, text, &recipe.model.text_encoder),
    ];
    for (section, part, input, encoder) in encoders {
        for training in [true, false] {
            let request = EncoderRequest { config: part.config.clone(), batch, input, training };
            match part.plugin.fragment(&Request::Encoder(request)) {
                Err(error) => {
                    refused(section, &error.to_string());
                    break;
                }
                Ok(fragment) if training => match check_weights(&fragment, encoder) {
                    Ok(fact) => findings.facts.extend(fact.map(|fact| format!("{section}: {fact}"))),
                    Err(error) => {
                        let (message, hint) = assemble::split_hint(&error.to_string());
                        wrong_weights.push(recipe.error_at(&format!("{section}.weights"), Part::Value, message, hint));
                    }
                },
                Ok(_) => {}
            }
        }
    }
    let dataset_size = data.map_or(batch, |data| data.train.num_images().max(data.train.num_texts()));
    let request =
        LossRequest { config: plugins.loss.config.clone(), batch, embed_dim: recipe.model.embed_dim, dataset_size };
    if let Err(error) = plugins.loss.plugin.fragment(&Request::Loss(request)) {
        refused("loss", &error.to_string());
    }
    let info = ParamInfo { name: "check".into(), shape: vec![4, 3], weight_decay: recipe.optimizer.weight_decay };
    let request = OptimizerRequest { config: plugins.optimizer.config.clone(), info };
    let scalars = ScalarsRequest { config: plugins.optimizer.config.clone(), step: 1, lr: recipe.optimizer.lr };
    let optimizer = &plugins.optimizer.plugin;
    let built =
        optimizer.fragment(&Request::Optimizer(request)).map(|_| ()).and(optimizer.scalars(&scalars).map(|_| ()));
    if let Err(error) = built {
        refused("optimizer", &error.to_string());
    }
    let steps_per_epoch = data.map_or(100, |data| (data.train.num_images() / batch.max(1)).max(1)) as u64;
    if let Err(error) = schedule(recipe, plugins, steps_per_epoch) {
        refused("scheduler", &error);
    }
    errors.extend(wrong_weights);
    errors.extend(assemble::check_groups(recipe, &plugins.model(recipe, config, dataset_size, Device::Cpu)));
    if let (Some(data), Some(size)) = (data, plugins.vocab_size())
        && data.tokenizer.vocab_size() > size
    {
        let message = format!("expected at least the vocabulary's {} ids, got {size}", data.tokenizer.vocab_size());
        let hint = Some(format!("set vocab_size: {}, or use another vocabulary", data.tokenizer.vocab_size()));
        errors.push(recipe.error_at("model.text_encoder.config.vocab_size", Part::Value, message, hint));
    }
    if errors.is_empty() {
        let names: Vec<String> = plugins.parts().map(|(role, part)| format!("{role} {}", part.plugin.id())).into();
        findings.facts.push(format!("plugins: {}", names.join(", ")));
    }
    findings.errors.extend(errors.iter().map(ToString::to_string));
}

/// Whether the weights that an encoder is to begin with are there and fit its parameters and states.
fn check_weights(fragment: &Fragment, encoder: &Encoder) -> Result<Option<String>, TrainError> {
    let Some(file) = &encoder.weights else { return Ok(None) };
    let named = fragment.nodes.iter().filter_map(|node| match &node.op {
        Op::Param { name, .. } | Op::State { name, .. } => Some((name.clone(), node.shape.clone())),
        _ => None,
    });
    let (found, unused) = Weights::read(file, encoder.weights_sha256.as_deref())?.fit(&named.collect::<Vec<_>>())?;
    let taken = found.iter().flatten().count();
    Ok(Some(format!("begins with {taken} tensors of {}, {} are not used", file.display(), unused.len())))
}

/// The learning rate at the beginning, in the middle and at the end.
fn schedule(recipe: &Recipe, plugins: &Plugins, steps_per_epoch: u64) -> Result<(), String> {
    let epochs = recipe.train.epochs;
    let total_steps = steps_per_epoch.saturating_mul(epochs);
    let mut state = serde_json::Value::Null;
    for step in [0, total_steps / 2, total_steps.saturating_sub(1)] {
        let progress = Progress {
            base_lr: recipe.optimizer.lr,
            step,
            steps_per_epoch,
            total_steps,
            epoch: step / steps_per_epoch,
            epochs,
            metric: None,
            evaluations: 0,
        };
        state = plugins.learning_rate(progress, state).map_err(|error| error.to_string())?.state;
    }
    Ok(())
}
