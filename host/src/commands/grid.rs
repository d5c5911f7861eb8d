//! `clip-host grid`: every combination of a recipe's grid becomes a run folder, and all of them one table.
//!
//! A cell is the run that `clip-host run` makes of the same recipe, to the last bit; its folder alone says how far it is.

use crate::cli::GridArgs;
use crate::commands::grid_table::{Outcome, Row, table};
use crate::commands::run::{open_data, say_where, stop_on_signals};
use crate::error::CliError;
use crate::{output, prepare};
use clip_host_data::{DataConfig, DataError};
use clip_host_model::Device;
use clip_host_plugins::Registry;
use clip_host_recipe::{Cell, Difference, Grid, Part, Recipe, RecipeErrors, matches_pattern};
use clip_host_train::{
    Interrupt, Job, Progress, RunFolder, Summary, TrainError, assemble, checkpoint, metrics, run_folder, train,
};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

/// Settings that no result depends on: a cell may go on with others, and is not another one for them.
const IRRELEVANT: [&str; 5] =
    ["train.threads", "train.checkpoint_every", "train.checkpoint_every_steps", "data.workers", "data.cache_bytes"];

/// Differences shown of a cell whose recipe has changed.
const SHOWN: usize = 5;

/// A cell, its folder, and how far it is.
struct Task {
    cell: Cell,
    config: DataConfig,
    folder: PathBuf,
    state: State,
}

enum State {
    /// There is nothing yet.
    New,
    /// Stopped after this step.
    Stopped(u64),
    Finished(Summary),
    /// The folder's recipe is another one.
    Changed(Vec<Difference>),
    /// Another process is at it.
    Running,
    /// It ended with this error.
    Failed(String),
}

pub fn run(args: &GridArgs) -> Result<(), CliError> {
    let grid = Grid::load(&args.recipe, &args.sets)?;
    let mut tasks = tasks(&grid, args)?;
    if args.table_only {
        refuse_changed(&tasks)?;
        return output::print(&table(&grid, &rows(&tasks)?, args.format));
    }
    let found = check(&tasks)?;
    if args.dry_run {
        list(&tasks, args.restart)?;
        // A grid is no worse for data that was not fetched yet.
        for missing in &found.missing {
            output::line(&format!("warning: {missing}"))?;
        }
        return found.errors();
    }
    found.all()?;
    if args.restart {
        set_aside(&mut tasks)?;
    }
    refuse_changed(&tasks)?;
    let interrupted = run_all(&mut tasks)?;
    output::print(&table(&grid, &rows(&tasks)?, args.format))?;
    verdict(&tasks, interrupted)
}

/// The cells that are asked for, and how far they are.
fn tasks(grid: &Grid, args: &GridArgs) -> Result<Vec<Task>, CliError> {
    let unknown = args.cell.iter().find(|pattern| !grid.cells.iter().any(|cell| matches_pattern(pattern, &cell.name)));
    if let Some(pattern) = unknown {
        let names: Vec<&str> = grid.cells.iter().map(|cell| cell.name.as_str()).collect();
        return Err(CliError::Failed(format!(
            "--cell: expected the name of a cell, in which `*` stands for any text, got `{pattern}`, which is none's\n\
             hint: the cells are {}",
            names.join(", ")
        )));
    }
    let parent = args
        .out
        .clone()
        .unwrap_or_else(|| Path::new("runs").join(args.recipe.file_stem().unwrap_or(std::ffi::OsStr::new("grid"))));
    let chosen = |cell: &&Cell| args.cell.is_empty() || args.cell.iter().any(|p| matches_pattern(p, &cell.name));
    let mut errors = Vec::new();
    let mut tasks = Vec::new();
    for cell in grid.cells.iter().filter(chosen) {
        let folder = parent.join(&cell.name);
        match prepare::resolved(cell.recipe.clone()) {
            Ok((recipe, config)) => {
                let state = state(&folder, &recipe)?;
                tasks.push(Task { cell: Cell { recipe, ..cell.clone() }, config, folder, state });
            }
            Err(found) => add_new(&mut errors, found),
        }
    }
    if errors.is_empty() { Ok(tasks) } else { Err(RecipeErrors(errors).into()) }
}

/// Cells share most of their recipe, and so of what is wrong with it.
fn add_new<E: PartialEq>(errors: &mut Vec<E>, found: impl IntoIterator<Item = E>) {
    for error in found {
        if !errors.contains(&error) {
            errors.push(error);
        }
    }
}

/// How far the cell in `folder` is, and whether it is that of `recipe`.
fn state(folder: &Path, recipe: &Recipe) -> Result<State, CliError> {
    let Ok(saved) = run_folder::recipe_of(folder) else {
        return Ok(State::New);
    };
    let (saved, _) = prepare::recipe(&saved, &[])?;
    let mut changed = recipe.differences(&saved);
    changed.retain(|difference| !IRRELEVANT.contains(&difference.path.as_str()));
    if !changed.is_empty() {
        return Ok(State::Changed(changed));
    }
    Ok(match run_folder::summary_of(folder)? {
        Some(summary) => State::Finished(summary),
        None => State::Stopped(newest_step(folder)?),
    })
}

fn newest_step(folder: &Path) -> Result<u64, CliError> {
    let checkpoints = checkpoint::list(&run_folder::checkpoints_of(folder))?;
    Ok(checkpoints.first().map_or(0, |(step, _)| *step))
}

/// What keeps cells from being run.
#[derive(Default)]
struct Findings {
    wrong: Vec<String>,
    /// Files that are not there.
    missing: Vec<String>,
}

impl Findings {
    fn errors(self) -> Result<(), CliError> {
        if self.wrong.is_empty() { Ok(()) } else { Err(CliError::Failed(self.wrong.join("\n\n"))) }
    }

    fn all(mut self) -> Result<(), CliError> {
        self.wrong.append(&mut self.missing);
        self.errors()
    }
}

/// Everything that is wrong with the plugins' settings, the groups of parameters and the data of cells that are to run,
/// before the first runs.
fn check(tasks: &[Task]) -> Result<Findings, CliError> {
    let base = prepare::base()?;
    let mut registry: Option<(&[PathBuf], Registry)> = None;
    let mut found = Findings::default();
    for task in tasks.iter().filter(|task| !matches!(task.state, State::Finished(_))) {
        let recipe = &task.cell.recipe;
        let path = recipe.plugins.path.as_slice();
        let registry = match &mut registry {
            Some((known, registry)) if *known == path => registry,
            other => &mut other.insert((path, assemble::registry(recipe))).1,
        };
        match prepare::plugins_of(recipe, registry) {
            Ok(plugins) => {
                // Names of parameters do not depend on the data's size, which is not known yet.
                let spec = plugins.model(recipe, &task.config, recipe.train.batch_size, Device::Cpu);
                add_new(&mut found.wrong, assemble::check_groups(recipe, &spec).map(|error| error.to_string()));
            }
            Err(errors) => add_new(&mut found.wrong, errors.into_iter().map(|error| error.to_string())),
        }
        for error in task.config.check(&base) {
            match &error {
                DataError::Missing { .. } => add_new(&mut found.missing, [prepare::with_source(&error)]),
                DataError::Setting { key, expected, got, hint } => {
                    let message = format!("expected {expected}, got {got}");
                    let error = recipe.error_at(&format!("data.{key}"), Part::Value, message, Some(hint.clone()));
                    add_new(&mut found.wrong, [error.to_string()]);
                }
                _ => add_new(&mut found.wrong, [prepare::with_source(&error)]),
            }
        }
    }
    Ok(found)
}

/// What would be done with each cell.
fn list(tasks: &[Task], restart: bool) -> Result<(), CliError> {
    let width = tasks.iter().map(|task| task.cell.name.len()).max().unwrap_or(0);
    for task in tasks {
        let plan = match &task.state {
            State::New => "to be run".to_string(),
            State::Stopped(step) => format!("to go on at step {step}"),
            State::Changed(_) if restart => "to be run again, its recipe has changed".to_string(),
            State::Changed(differences) => format!("its recipe has changed: {}", shown(differences)),
            _ => task.status(),
        };
        output::line(&format!("{:width$}  {}  {plan}", task.cell.name, task.folder.display()))?;
    }
    Ok(())
}

fn shown(differences: &[Difference]) -> String {
    let mut texts: Vec<String> = differences.iter().take(SHOWN).map(ToString::to_string).collect();
    if differences.len() > SHOWN {
        texts.push(format!("{} more", differences.len() - SHOWN));
    }
    texts.join("; ")
}

/// Cells whose recipe has changed must not stand in one table with the others.
fn refuse_changed(tasks: &[Task]) -> Result<(), CliError> {
    let changed: Vec<String> = tasks
        .iter()
        .filter_map(|task| match &task.state {
            State::Changed(differences) => Some(format!("{}: {}", task.folder.display(), shown(differences))),
            _ => None,
        })
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    Err(CliError::Failed(format!(
        "the recipe of {} of {} cells is another one (here) than that of its run folder (there):\n{}\n\
         hint: put the recipe back, choose another folder with --out, or start these cells again with --restart",
        changed.len(),
        tasks.len(),
        changed.join("\n")
    )))
}

/// Gives the folders of changed cells another name, so that the cells start again.
fn set_aside(tasks: &mut [Task]) -> Result<(), CliError> {
    for task in tasks.iter_mut().filter(|task| matches!(task.state, State::Changed(_))) {
        // The folder's lock: nobody may be at work in what is moved.
        let _held = RunFolder::resume(&task.folder, None)?;
        let name = |number: u32| task.folder.with_file_name(format!("{}.old{number}", task.cell.name));
        let aside = (1..).map(name).find(|path| !path.exists()).unwrap_or_else(|| name(0));
        std::fs::rename(&task.folder, &aside).map_err(|error| {
            CliError::Failed(format!(
                "cannot move {} to {}: {error}\nhint: check the folder's permissions",
                task.folder.display(),
                aside.display()
            ))
        })?;
        tracing::info!("{}: the run of the old recipe is kept in {}", task.cell.name, aside.display());
        task.state = State::New;
    }
    Ok(())
}

/// Runs what is not finished, one cell after the other. True if a signal ended it.
fn run_all(tasks: &mut [Task]) -> Result<bool, CliError> {
    let interrupt = stop_on_signals()?;
    let mut progress = Progress::new(true);
    let count = tasks.len();
    for (number, task) in tasks.iter_mut().enumerate() {
        let name = &task.cell.name;
        if interrupt.requested() {
            return Ok(true);
        }
        if let State::Finished(_) = task.state {
            progress.line(&format!("[{}/{count}] {name}: finished already", number + 1));
            continue;
        }
        progress.line(&format!("[{}/{count}] {name}: {}", number + 1, task.folder.display()));
        task.state = match run_cell(task, &interrupt, &mut progress) {
            Ok(state) => state,
            Err(CliError::Failed(text)) => {
                progress.line(&format!("{name} failed: {text}"));
                State::Failed(text)
            }
            Err(other) => return Err(other),
        };
    }
    Ok(interrupt.requested())
}

fn run_cell(task: &Task, interrupt: &Interrupt, progress: &mut Progress) -> Result<State, CliError> {
    let recipe = &task.cell.recipe;
    let plugins = prepare::plugins(recipe)?;
    let data = open_data(recipe, &task.config, &plugins)?;
    let text = recipe.to_ron();
    let folder = match RunFolder::resume(&task.folder, Some(&text)) {
        Err(TrainError::Locked { .. }) => return Ok(State::Running),
        folder => folder?,
    };
    // Another process may have ended this cell since its state was looked at.
    let state = state(&task.folder, recipe)?;
    if matches!(state, State::Finished(_) | State::Changed(_)) {
        return Ok(state);
    }
    folder.write_recipe(&text)?;
    let device = prepare::device(recipe)?;
    let job = Job { recipe: recipe.clone(), plugins, data, folder, device };
    // A fault of the program in one cell is no reason not to run the others.
    let ended = std::panic::catch_unwind(AssertUnwindSafe(|| train(job, interrupt, progress)));
    match ended {
        Ok(Ok(summary)) if summary.interrupted => Ok(State::Stopped(summary.steps)),
        Ok(Ok(summary)) => Ok(State::Finished(summary)),
        Ok(Err(error)) => Err(say_where(error.into(), &task.folder, true)),
        Err(_) => Err(CliError::Failed(format!(
            "internal error: it panicked, as the lines above say\nhint: this is a bug; report it with {}",
            task.folder.join("recipe.ron").display()
        ))),
    }
}

impl Task {
    fn status(&self) -> String {
        match &self.state {
            State::New => "not started".to_string(),
            State::Stopped(step) => format!("stopped at step {step}"),
            State::Finished(_) => "finished".to_string(),
            State::Changed(_) => "recipe changed".to_string(),
            State::Running => "running elsewhere".to_string(),
            State::Failed(_) => "failed".to_string(),
        }
    }
}

fn rows(tasks: &[Task]) -> Result<Vec<Row>, CliError> {
    let row = |task: &Task| {
        let result = match &task.state {
            State::Finished(summary) => {
                let seconds = metrics::seconds(&metrics::read(&run_folder::metrics_of(&task.folder))?);
                Some(Outcome::new(summary.clone(), seconds))
            }
            _ => None,
        };
        Ok(Row {
            name: task.cell.name.clone(),
            values: task.cell.values.clone(),
            folder: task.folder.display().to_string(),
            status: task.status(),
            result,
        })
    };
    tasks.iter().map(row).collect()
}

/// How the command ends: by its failed cells, by a signal, or well.
fn verdict(tasks: &[Task], interrupted: bool) -> Result<(), CliError> {
    let failed: Vec<String> = tasks
        .iter()
        .filter_map(|task| match &task.state {
            State::Failed(text) => Some(format!("{}: {}", task.cell.name, text.lines().next().unwrap_or_default())),
            State::Changed(_) => Some(format!("{}: its recipe was changed by another process", task.cell.name)),
            _ => None,
        })
        .collect();
    if interrupted {
        tracing::warn!("stopped; the same command goes on from here");
        return Err(CliError::Interrupted);
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(CliError::Failed(format!(
        "{} of {} cells failed:\n{}\nhint: their own messages stand above; the same command tries them again",
        failed.len(),
        tasks.len(),
        failed.join("\n")
    )))
}
