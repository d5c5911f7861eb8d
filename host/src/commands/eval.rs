//! `clip-host eval`: retrieval with a run's checkpoint.

use crate::cli::EvalArgs;
use crate::error::CliError;
use crate::{output, prepare};
use clip_host_data::Data;
use clip_host_model::Session;
use clip_host_train::checkpoint::{self, Checkpoint};
use clip_host_train::evaluate::evaluate;
use clip_host_train::{TrainError, run_folder, train_loop};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub fn run(args: EvalArgs) -> Result<(), CliError> {
    let sets = prepare::sets(&args.set, &[("data.val", sources(&args.data))]);
    let (recipe, mut config) = prepare::recipe(&run_folder::recipe_of(&args.run)?, &sets)?;
    let plugins = prepare::plugins(&recipe)?;
    let checkpoint = choose(&args.run, &args.checkpoint)?;
    // The training data is not needed, and may be on another machine.
    config.train.clear();
    let data = Data::open(&config, &prepare::base()?)?;

    let shape = checkpoint.state.data;
    let spec = plugins.model(&recipe, &config, shape.images.max(shape.texts) as usize, prepare::device(&recipe)?);
    let mut session = Session::new(spec)?;
    let state = train_loop::restore(&mut session, &checkpoint, shape)?;
    let batch_size = recipe.eval.batch_size.unwrap_or(recipe.train.batch_size);
    let found = evaluate(&mut session, &data, recipe.model.embed_dim, batch_size, recipe.train.threads)?;

    if found.skipped.total() > 0 {
        tracing::warn!("data.val: skipped {}", found.skipped);
    }
    let metrics: BTreeMap<String, f64> = found.retrieval.metrics().into_iter().collect();
    if args.json {
        return output::json(&serde_json::json!({
            "metrics": metrics,
            "images": found.images,
            "captions": found.captions,
            "step": state.step,
            "epoch": state.epoch,
            "checkpoint": checkpoint.path,
            "skipped": found.skipped.counts(),
        }));
    }
    output::line(&format!("{} (step {}, epoch {})", checkpoint.path.display(), state.step, state.epoch))?;
    output::line(&format!("{} images, {} captions", found.images, found.captions))?;
    for (name, value) in &metrics {
        output::line(&format!("{name:32} {value:.4}"))?;
    }
    Ok(())
}

/// The sources as a RON list; what is no source expression names tars.
fn sources(data: &[String]) -> Option<String> {
    let source = |text: &String| match text.trim().split_once('(') {
        Some((name, _)) if !name.is_empty() && name.chars().all(char::is_alphanumeric) => text.clone(),
        _ => format!("Tar({text:?})"),
    };
    (!data.is_empty()).then(|| format!("[{}]", data.iter().map(source).collect::<Vec<_>>().join(", ")))
}

fn choose(run: &Path, which: &str) -> Result<Checkpoint, CliError> {
    let folder = run_folder::checkpoints_of(run);
    let none = || TrainError::NoRun {
        path: run.to_path_buf(),
        problem: "there is no checkpoint in it".into(),
        hint: "train for at least an epoch first, or stop a run with Ctrl-C".into(),
    };
    match which {
        "newest" => Ok(checkpoint::load_newest(&folder, false)?.ok_or_else(none)?),
        "best" => {
            let newest = checkpoint::load_newest(&folder, false)?.ok_or_else(none)?;
            let best = newest.state.best.map(|best| best.step);
            let file = checkpoint::list(&folder)?.into_iter().find(|(step, _)| Some(*step) == best);
            match file {
                Some((_, path)) => Ok(checkpoint::load(&path)?),
                None => Ok(newest),
            }
        }
        file => Ok(checkpoint::load(&PathBuf::from(file))?),
    }
}

#[cfg(test)]
mod tests {
    use super::sources;

    #[test]
    fn bare_names_are_tars() {
        assert_eq!(sources(&[]), None);
        let given = ["a-{0..3}.tar".into(), "Karpathy(file: \"k.json\")".into(), "dir (1)/x.tar".into()];
        let expected = r#"[Tar("a-{0..3}.tar"), Karpathy(file: "k.json"), Tar("dir (1)/x.tar")]"#;
        assert_eq!(sources(&given).as_deref(), Some(expected));
    }
}
