//! `clip-host run`: a recipe becomes a run folder.

use crate::cli::RunArgs;
use crate::error::CliError;
use crate::{output, prepare};
use clip_host_data::{Data, DataConfig, Position};
use clip_host_model::Device;
use clip_host_recipe::{Part, Recipe};
use clip_host_train::{Interrupt, Job, Plugins, Progress, RunFolder, Summary, assemble, run_folder, train};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io::Write;
use std::path::Path;

pub fn run(args: RunArgs) -> Result<(), CliError> {
    let (recipe, config) = load_recipe(&args)?;
    let plugins = prepare::plugins(&recipe)?;
    let data = open_data(&recipe, &config, &plugins)?;
    let device = prepare::device(&recipe)?;
    let folder = open_folder(&args, &recipe)?;
    let interrupt = stop_on_signals()?;

    let run_dir = folder.path().to_path_buf();
    let job = Job { recipe, plugins, data, folder, device };
    let mut progress = Progress::new(args.json);
    let ended = train(job, &interrupt, &mut progress);
    drop(progress);
    match ended {
        Ok(summary) => report(summary, args.json),
        Err(error) => Err(say_where(error.into(), &run_dir, args.resume.is_none())),
    }
}

/// The data of a run; whatever is wrong with it, or with what the recipe says about it, is told before there is a folder.
pub fn open_data(recipe: &Recipe, config: &DataConfig, plugins: &Plugins) -> Result<Data, CliError> {
    if config.train.is_empty() {
        let hint = "add a source, as in `train: [Tar(\"*.tar\")]`".to_string();
        return Err(recipe
            .error_at("data.train", Part::Value, "expected at least one source, got none", Some(hint))
            .into());
    }
    let data = Data::open(config, &prepare::base()?)?;
    warn_of_skipped(&data);
    // A batch larger than the data is told here too.
    data.train_loader(recipe.train.batch_size, recipe.seed, Position::default(), Some(0))?;
    let dataset_size = data.train.num_images().max(data.train.num_texts());
    match assemble::check_groups(recipe, &plugins.model(recipe, config, dataset_size, Device::Cpu)) {
        Some(error) => Err(error.into()),
        None => Ok(data),
    }
}

/// The recipe of a new run, or the one in the folder of a run that goes on.
fn load_recipe(args: &RunArgs) -> Result<(Recipe, DataConfig), CliError> {
    let flags = [
        ("train.epochs", args.epochs),
        ("train.steps", args.steps),
        ("train.checkpoint_every_steps", args.checkpoint_every_steps),
    ]
    .map(|(key, value)| (key, value.map(|n| n.to_string())));
    let sets = prepare::sets(&args.set, &flags);
    let given = match &args.recipe {
        Some(path) => Some(prepare::recipe(path, &sets)?),
        None => None,
    };
    let saved = match &args.resume {
        // A run that was killed before it had written its recipe begins again with the one given.
        Some(folder) if given.is_none() || run_folder::recipe_of(folder).is_ok() => {
            Some(prepare::recipe(&run_folder::recipe_of(folder)?, &sets)?)
        }
        _ => None,
    };
    match (given, saved) {
        (Some((given, _)), Some((saved, config))) => {
            if given != saved {
                tracing::warn!("the recipe differs from the one that the run began with; the run's own counts");
            }
            Ok((saved, config))
        }
        (None, Some(found)) | (Some(found), None) => Ok(found),
        (None, None) => {
            Err(CliError::Usage("a recipe is needed\nhint: clip-host run recipes/isogclr_radam.ron".into()))
        }
    }
}

fn open_folder(args: &RunArgs, recipe: &Recipe) -> Result<RunFolder, CliError> {
    let text = recipe.to_ron();
    match &args.resume {
        Some(path) => {
            let folder = RunFolder::resume(path, args.recipe.as_ref().map(|_| text.as_str()))?;
            // Overrides of this start hold for later ones too.
            folder.write_recipe(&text)?;
            Ok(folder)
        }
        None => {
            let recipe_path = args.recipe.as_deref().unwrap_or(Path::new("run"));
            Ok(RunFolder::create(args.out.as_deref(), recipe_path, &text)?)
        }
    }
}

fn warn_of_skipped(data: &Data) {
    for (name, split) in [("train", &data.train), ("val", &data.val)] {
        if split.skipped().total() > 0 {
            tracing::warn!("data.{name}: skipped {}", split.skipped());
        }
    }
}

/// The first Ctrl-C or SIGTERM asks for an orderly end after the step, a second one ends the process at once.
pub fn stop_on_signals() -> Result<Interrupt, CliError> {
    let interrupt = Interrupt::default();
    for signal in [SIGINT, SIGTERM] {
        // In this order: the shutdown looks at the flag before the same signal raises it.
        signal_hook::flag::register_conditional_shutdown(signal, 130, interrupt.flag())
            .and_then(|_| signal_hook::flag::register(signal, interrupt.flag()))
            .map_err(|e| CliError::Failed(format!("cannot handle signals: {e}\nhint: this is a bug; report it")))?;
    }
    Ok(interrupt)
}

/// A failed run says where its folder is, too. One that failed before its first step leaves none behind.
pub fn say_where(error: CliError, run_dir: &Path, new: bool) -> CliError {
    if new && RunFolder::remove_if_unused(run_dir) {
        return error;
    }
    match error {
        CliError::Failed(text) => CliError::Failed(format!("{text}\nrun folder: {}", run_dir.display())),
        other => other,
    }
}

fn report(summary: Summary, json: bool) -> Result<(), CliError> {
    let dir = summary.run_dir.display();
    if json {
        output::json(&summary)?;
    } else {
        output::line(&format!(
            "{} steps in {:.1} s, {:.1} samples/s, waited {:.1} s for data",
            summary.steps, summary.seconds, summary.samples_per_second, summary.data_wait_seconds
        ))?;
        if !summary.skipped.is_empty() {
            let causes: Vec<String> = summary.skipped.iter().map(|(cause, n)| format!("{n} {cause}")).collect();
            output::line(&format!("skipped samples: {}", causes.join(", ")))?;
        }
        for (name, value) in &summary.metrics {
            output::line(&format!("{name:32} {value:.4}"))?;
        }
    }
    if summary.interrupted {
        // If stderr is closed there is nobody to tell.
        let _ = writeln!(
            std::io::stderr(),
            "stopped after step {}; continue with: clip-host run --resume {dir}",
            summary.steps
        );
    }
    if !json {
        output::line(&format!("run folder: {dir}"))?;
    }
    if summary.interrupted { Err(CliError::Interrupted) } else { Ok(()) }
}
