//! The training loop. [`train`] reads as a table of contents; each of its lines is a method below.

use crate::assemble::{Plugins, plugin_error, split_hint, with_hint_line};
use crate::checkpoint::{self, Best, Checkpoint, DataShape, Evaluation, State};
use crate::error::{Result, TrainError};
use crate::evaluate::evaluate;
use crate::export;
use crate::metrics::{self, Metrics};
use crate::pretrained::Weights;
use crate::progress::{self, Progress};
use crate::report;
use crate::run_folder::RunFolder;
use crate::tensorboard::EventFile;
use clip_host_data::{Batch, Data, DataError, ImageTransform, Loader, Position};
use clip_host_model::{Ahead, Device, Images, ModelError, Session, StepInput};
use clip_host_plugin_api::scheduler;
use clip_host_recipe::Recipe;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// The wish to stop after the current step, from a signal handler or another thread.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Asks the run to stop. True if it had been asked before.
    pub fn request(&self) -> bool {
        self.0.swap(true, Ordering::SeqCst)
    }

    /// The flag itself, for a signal handler to raise.
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.0.clone()
    }

    /// Whether it has been asked.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// A run to be started or continued.
pub struct Job {
    /// The resolved recipe.
    pub recipe: Recipe,
    /// Its plugins.
    pub plugins: Plugins,
    /// Its data, opened.
    pub data: Data,
    /// Its folder.
    pub folder: RunFolder,
    /// Where it runs.
    pub device: Device,
}

/// How a run ended.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The run folder.
    pub run_dir: PathBuf,
    /// Seconds since this process began with it, compilation included.
    pub seconds: f64,
    /// Steps done in the whole run, those before a resume included.
    pub steps: u64,
    /// Epochs done.
    pub epochs: u64,
    /// Pairs a second over this process's steps, evaluations and checkpoints not counted.
    pub samples_per_second: f64,
    /// The last evaluation, and the last `train/loss`.
    pub metrics: BTreeMap<String, f64>,
    /// Milliseconds that compilation took.
    pub compile_ms: f64,
    /// Seconds that steps waited for data.
    pub data_wait_seconds: f64,
    /// Samples that could not be used, by cause.
    pub skipped: BTreeMap<String, u64>,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// Whether it was stopped by a signal and can be continued.
    pub interrupted: bool,
}

/// Trains until the recipe's end or an interrupt.
///
/// # Errors
/// See [`TrainError`]; the checkpoints written before remain good.
pub fn train(job: Job, interrupt: &Interrupt, progress: &mut Progress) -> Result<Summary> {
    let mut run = Run::start(job, progress)?;
    while !run.is_over() {
        while run.has_steps_in_epoch() {
            if interrupt.requested() {
                return run.stop();
            }
            run.step()?;
            run.checkpoint_if_steps_are_due()?;
        }
        run.end_epoch_if_complete()?;
    }
    run.finish()
}

struct Run<'p> {
    job: Job,
    session: Session,
    loader: Loader,
    metrics: Metrics,
    events: EventFile,
    progress: &'p mut Progress,
    state: State,
    /// The next batch, if it was fetched while the step before it ran.
    upcoming: Option<Result<Batch>>,
    /// What the levels of pixels stand for.
    levels: Box<[[f32; 256]; 3]>,
    /// Step at which the run ends.
    last_step: u64,
    /// Newest checkpoint, and the step that it was written at.
    saved: Option<(u64, PathBuf)>,
    clock: Clock,
    last_loss: f64,
    last_lr: f64,
}

/// Wall-clock times; nothing that is computed depends on them.
struct Clock {
    started: Instant,
    compile_ms: f64,
    /// Since the last log line: seconds in steps, seconds of those waiting for data, steps.
    window: (f64, f64, u64),
    /// The same of this process.
    total: (f64, f64, u64),
    /// Seconds a step, smoothed over log lines.
    step_seconds: Option<f64>,
}

impl<'p> Run<'p> {
    /// Compiles the model and puts it where the newest checkpoint says.
    fn start(mut job: Job, progress: &'p mut Progress) -> Result<Run<'p>> {
        let started = Instant::now();
        job.data.pixels = matches!(job.device, Device::Cuda(_));
        job.folder.remove_summary()?;
        for (old, new) in job.folder.record_plugins(&job.plugins.records())? {
            tracing::warn!(
                "{} was {} {} ({:.12}…) when this run began, now it is {} {} ({:.12}…): the numbers may differ",
                new.role,
                old.id,
                old.version,
                old.sha256,
                new.id,
                new.version,
                new.sha256
            );
        }
        let (data, train) = (&job.data, &job.recipe.train);
        let dataset_size = data.train.num_images().max(data.train.num_texts());
        let spec = job.plugins.model(&job.recipe, &data.config, dataset_size, job.device.clone());
        let mut session = Session::new(spec).map_err(|e| TrainError::Model(with_hint_line(&e.to_string())))?;
        let compile_ms = session.stats().compile_ms;

        let found = checkpoint::load_newest(&job.folder.checkpoints(), true)?;
        let start = found.as_ref().map_or(Position::default(), |found| Position {
            epoch: found.state.epoch,
            step: found.state.step_in_epoch,
        });
        let mut loader = data.train_loader(train.batch_size, job.recipe.seed, Position::default(), Some(0))?;
        let shape = DataShape {
            images: data.train.num_images() as u64,
            texts: data.train.num_texts() as u64,
            steps_per_epoch: loader.steps_per_epoch(),
            batch_size: train.batch_size as u64,
        };
        let state = match &found {
            Some(found) => restore(&mut session, found, shape)?,
            None => {
                begin_with_weights(&job.recipe, &mut session, progress)?;
                State::new(shape)
            }
        };
        let all_steps = shape.steps_per_epoch.saturating_mul(train.epochs);
        let last_step = train.steps.map_or(all_steps, |steps| steps.min(all_steps));
        if state.step < last_step {
            loader = data.train_loader(train.batch_size, job.recipe.seed, start, Some(train.epochs))?;
        }
        let metrics = Metrics::open(&job.folder.metrics(), state.step)?;
        let events = EventFile::open(job.folder.path(), &metrics::read(&job.folder.metrics())?)?;

        let stats = session.stats();
        progress.line(&format!(
            "{} parameters, {} training pairs, {} steps of {} an epoch, {} epochs; compiled in {:.1} s",
            stats.params,
            shape.texts,
            shape.steps_per_epoch,
            shape.batch_size,
            train.epochs,
            compile_ms / 1e3
        ));
        if let Some(found) = &found {
            progress.line(&format!("resumed at step {} from {}", state.step, found.path.display()));
        }
        let clock =
            Clock { started, compile_ms, window: Default::default(), total: Default::default(), step_seconds: None };
        let saved = found.map(|found| (found.state.step, found.path));
        let (last_loss, last_lr) = (f64::NAN, f64::NAN);
        let levels = Box::new(*ImageTransform::new(&job.data.config).levels());
        let upcoming = None;
        Ok(Run {
            job,
            session,
            loader,
            metrics,
            events,
            progress,
            state,
            upcoming,
            levels,
            last_step,
            saved,
            clock,
            last_loss,
            last_lr,
        })
    }

    fn is_over(&self) -> bool {
        self.state.step >= self.last_step && !self.epoch_is_complete()
    }

    /// Only the work at the end of the epoch is left.
    fn epoch_is_complete(&self) -> bool {
        self.state.step_in_epoch == self.state.data.steps_per_epoch
    }

    fn has_steps_in_epoch(&self) -> bool {
        !self.epoch_is_complete() && self.state.step < self.last_step
    }

    /// One step: batch, learning rate, forward, backward, update, log.
    fn step(&mut self) -> Result<()> {
        let begun = Instant::now();
        let waited = self.loader.wait_seconds();
        let (batch, sent) = match self.upcoming.take() {
            Some(batch) => (self.checked(batch?)?, true),
            None => (self.next_batch()?, false),
        };
        let lr = self.learning_rate()?;
        let images = match self.job.data.pixels {
            false => Images::Normalized(&batch.images),
            true if sent => Images::Sent { levels: &self.levels },
            true => Images::Pixels { pixels: &batch.pixels, levels: &self.levels },
        };
        let input = StepInput {
            images,
            input_ids: &batch.input_ids,
            attention_mask: &batch.attention_mask,
            image_ids: &batch.sample_ids,
            text_ids: &batch.text_ids,
            epoch: self.state.epoch,
            step: self.state.step,
            steps_per_epoch: self.state.data.steps_per_epoch,
            lr,
        };
        // While a GPU is at this step, the next batch is fetched and its images are sent.
        let more =
            self.state.step_in_epoch + 1 < self.state.data.steps_per_epoch && self.state.step + 1 < self.last_step;
        let (loader, pixels) = (&mut self.loader, self.job.data.pixels && more);
        let mut upcoming = None;
        let fetch = |ahead: &mut Ahead| {
            if pixels {
                let batch = loader.next_batch().map_err(TrainError::from).and_then(|batch| {
                    let batch = batch.ok_or(DataError::Stopped)?;
                    ahead.send(&batch.pixels).map_err(|e| TrainError::Model(with_hint_line(&e.to_string())))?;
                    Ok(batch)
                });
                upcoming = Some(batch);
            }
        };
        let output = self.session.train_step_while(&input, fetch);
        self.upcoming = upcoming;
        let waited = self.loader.wait_seconds() - waited;
        let output = output.map_err(|error| match error {
            ModelError::NotFinite { what, .. } => self.step_error(&format!("{what} is not finite")),
            error => self.step_error(&error.to_string()),
        })?;
        if !output.loss.is_finite() {
            return Err(self.step_error(&format!("the loss is not finite, it is {}", output.loss)));
        }
        self.loader.recycle(batch);

        let window = &mut self.state.window;
        window.steps += 1;
        *window.sums.entry("train/loss".into()).or_default() += f64::from(output.loss);
        for (name, value) in &output.metrics {
            *window.sums.entry(format!("train/{name}")).or_default() += f64::from(*value);
        }
        self.state.step += 1;
        self.state.step_in_epoch += 1;
        self.last_lr = lr;
        self.clock.count(begun.elapsed().as_secs_f64(), waited);
        self.log()
    }

    fn next_batch(&mut self) -> Result<Batch> {
        let batch = self.loader.next_batch()?.ok_or(DataError::Stopped)?;
        self.checked(batch)
    }

    /// A batch, if it is the coming step's.
    fn checked(&self, batch: Batch) -> Result<Batch> {
        let at = (self.state.epoch, self.state.step_in_epoch);
        match (batch.epoch, batch.step) == at {
            true => Ok(batch),
            false => {
                let got = (batch.epoch, batch.step);
                Err(TrainError::Bug(format!("expected the batch of (epoch, step) {at:?}, got {got:?}")))
            }
        }
    }

    fn learning_rate(&mut self) -> Result<f64> {
        let progress = scheduler::Progress {
            base_lr: self.job.recipe.optimizer.lr,
            step: self.state.step,
            steps_per_epoch: self.state.data.steps_per_epoch,
            total_steps: self.state.data.steps_per_epoch.saturating_mul(self.job.recipe.train.epochs),
            epoch: self.state.epoch,
            epochs: self.job.recipe.train.epochs,
            metric: self.state.evaluations.last().and_then(|last| last.metrics.get(MAIN_METRIC).copied()),
            evaluations: self.state.evaluations.len() as u64,
        };
        let answer = self.job.plugins.learning_rate(progress, self.state.scheduler.take());
        let answer = answer.map_err(|error| plugin_error(&error))?;
        self.state.scheduler = answer.state;
        Ok(answer.lr)
    }

    /// A step's failure, with the way back.
    fn step_error(&self, problem: &str) -> TrainError {
        let (problem, hint) = split_hint(problem);
        let hint =
            hint.unwrap_or_else(|| "lower `optimizer.lr`, warm up longer, or set `optimizer.clip_grad_norm`".into());
        let back = match &self.saved {
            Some((step, path)) => format!("the last good checkpoint is of step {step}: {}", path.display()),
            None => "there is no checkpoint yet".into(),
        };
        TrainError::Step { epoch: self.state.epoch, step: self.state.step, problem, hint: format!("{hint}; {back}") }
    }

    /// Shows the step, and writes the log line if one is due.
    fn log(&mut self) -> Result<()> {
        let due = self.state.step.is_multiple_of(self.job.recipe.train.log_every)
            || self.epoch_is_complete()
            || self.state.step >= self.last_step;
        let steps = self.state.window.steps.max(1) as f64;
        let mut values: BTreeMap<String, f64> =
            self.state.window.sums.iter().map(|(name, sum)| (name.clone(), sum / steps)).collect();
        self.last_loss = values.get("train/loss").copied().unwrap_or(f64::NAN);
        let batch = self.state.data.batch_size as f64;
        let (seconds, waited, count) = self.clock.window;
        let count = count.max(1) as f64;
        let left = self.last_step.saturating_sub(self.state.step) as f64;
        let shown = progress::Step {
            epoch: self.state.epoch + 1,
            epochs: self.job.recipe.train.epochs,
            step: self.state.step,
            last: self.last_step,
            loss: self.last_loss,
            lr: self.last_lr,
            samples_per_second: count * batch / seconds,
            data_wait: waited / count,
            eta: left * self.clock.seconds_per_step(),
        };
        self.progress.step(&shown, due);
        if !due {
            return Ok(());
        }
        values.insert("train/lr".into(), self.last_lr);
        values.insert("train/samples_per_second".into(), shown.samples_per_second);
        values.insert("train/data_time".into(), shown.data_wait);
        values.insert("train/batch_time".into(), seconds / count);
        self.record(values)?;
        self.state.window = checkpoint::Window::default();
        self.clock.end_window();
        Ok(())
    }

    /// Appends a line to the metrics and to TensorBoard's events.
    fn record(&mut self, values: BTreeMap<String, f64>) -> Result<()> {
        let line = self.metrics.append(self.state.step, self.state.epoch, values)?;
        self.events.append(&line)
    }

    /// Evaluation and checkpoint at the end of an epoch, where they are due.
    fn end_epoch_if_complete(&mut self) -> Result<()> {
        if !self.epoch_is_complete() {
            return Ok(());
        }
        self.state.epoch += 1;
        self.state.step_in_epoch = 0;
        let last = self.state.step >= self.last_step;
        let due = |every: u64| last || (every > 0 && self.state.epoch.is_multiple_of(every));
        let (evaluation_due, checkpoint_due) =
            (due(self.job.recipe.train.eval_every), due(self.job.recipe.train.checkpoint_every));
        if evaluation_due {
            self.evaluate()?;
        }
        if checkpoint_due {
            self.checkpoint()?;
        }
        Ok(())
    }

    /// Retrieval over the held-out pairs.
    fn evaluate(&mut self) -> Result<()> {
        if self.job.data.val.num_images() == 0 {
            tracing::debug!("no held-out data (`data.val`), no evaluation");
            return Ok(());
        }
        let begun = Instant::now();
        let recipe = &self.job.recipe;
        let batch_size = recipe.eval.batch_size.unwrap_or(recipe.train.batch_size);
        let (dim, threads) = (recipe.model.embed_dim, recipe.train.threads);
        let found = evaluate(&mut self.session, &self.job.data, dim, batch_size, threads)?;
        let metrics: BTreeMap<String, f64> = found.retrieval.metrics().into_iter().collect();
        let value = |name: &str| metrics.get(name).copied().unwrap_or(f64::NAN);
        self.progress.line(&format!(
            "epoch {} evaluated: image_to_text R@1 {:.3} R@5 {:.3} R@10 {:.3}, text_to_image R@1 {:.3} R@5 {:.3} R@10 \
             {:.3} ({} images, {} captions, {:.1} s)",
            self.state.epoch,
            value("image_to_text_R@1"),
            value("image_to_text_R@5"),
            value("image_to_text_R@10"),
            value("text_to_image_R@1"),
            value("text_to_image_R@5"),
            value("text_to_image_R@10"),
            found.images,
            found.captions,
            begun.elapsed().as_secs_f64()
        ));
        let mut line = metrics.clone();
        line.insert("eval/images".into(), found.images as f64);
        line.insert("eval/captions".into(), found.captions as f64);
        line.insert("eval/seconds".into(), begun.elapsed().as_secs_f64());
        self.record(line)?;
        let (step, epoch) = (self.state.step, self.state.epoch);
        self.state.evaluations.push(Evaluation { step, epoch, metrics });
        Ok(())
    }

    fn checkpoint_if_steps_are_due(&mut self) -> Result<()> {
        match self.job.recipe.train.checkpoint_every_steps {
            // The end of an epoch has its own, with the evaluation in it.
            Some(every) if self.state.step.is_multiple_of(every) && !self.epoch_is_complete() => self.checkpoint(),
            _ => Ok(()),
        }
    }

    fn checkpoint(&mut self) -> Result<()> {
        let metric = self.state.evaluations.last().filter(|last| last.step == self.state.step);
        if let Some(metric) = metric.and_then(|last| last.metrics.get(MAIN_METRIC).copied())
            && self.state.best.is_none_or(|best| metric > best.metric)
        {
            self.state.best = Some(Best { step: self.state.step, metric });
        }
        self.metrics.sync()?;
        let tensors = self.session.tensors().map_err(|e| self.step_error(&e.to_string()))?;
        let path = checkpoint::save(&self.job.folder.checkpoints(), &self.state, &tensors)?;
        drop(tensors);
        tracing::debug!("wrote {}", path.display());
        self.saved = Some((self.state.step, path));
        Ok(())
    }

    /// The end after an interrupt: everything is on the disk, and the user knows how to go on.
    fn stop(mut self) -> Result<Summary> {
        if self.saved.as_ref().is_none_or(|(step, _)| *step != self.state.step) {
            self.checkpoint()?;
        }
        Ok(self.summary(true))
    }

    /// The end of a whole run: weights for other programs, curves.
    fn finish(mut self) -> Result<Summary> {
        // A run cut short within an epoch by `train.steps` is evaluated and saved all the same.
        if self.state.step_in_epoch > 0 && self.saved.as_ref().is_none_or(|(step, _)| *step != self.state.step) {
            self.evaluate()?;
            self.checkpoint()?;
        }
        let tensors = self.session.tensors().map_err(|e| self.step_error(&e.to_string()))?;
        export::write(&self.job.folder.weights(), &tensors)?;
        drop(tensors);
        if let Err(error) = report::write(&self.job.folder) {
            tracing::warn!("no report: {error}");
        }
        let summary = self.summary(false);
        self.job.folder.write_summary(&summary)?;
        Ok(summary)
    }

    fn summary(&self, interrupted: bool) -> Summary {
        let (seconds, waited, steps) = self.clock.total;
        let mut metrics = self.state.evaluations.last().map_or(BTreeMap::new(), |last| last.metrics.clone());
        if self.last_loss.is_finite() {
            metrics.insert("train/loss".into(), self.last_loss);
        }
        Summary {
            run_dir: self.job.folder.path().to_path_buf(),
            seconds: self.clock.started.elapsed().as_secs_f64(),
            steps: self.state.step,
            epochs: self.state.epoch,
            samples_per_second: if seconds > 0.0 {
                steps as f64 * self.state.data.batch_size as f64 / seconds
            } else {
                0.0
            },
            metrics,
            compile_ms: self.clock.compile_ms,
            data_wait_seconds: waited,
            skipped: self.loader.skipped().counts(),
            checkpoint: self.saved.as_ref().map(|(_, path)| path.clone()),
            interrupted,
        }
    }
}

/// The metric that schedulers see and that the best checkpoint is chosen by.
const MAIN_METRIC: &str = "mean_recall";

/// Gives the encoders the weights that the recipe names for them.
///
/// # Errors
/// As [`Weights::read`] and [`Weights::load`].
fn begin_with_weights(recipe: &Recipe, session: &mut Session, progress: &mut Progress) -> Result<()> {
    let model = &recipe.model;
    for (tower, encoder) in [("image_encoder", &model.image_encoder), ("text_encoder", &model.text_encoder)] {
        let Some(file) = &encoder.weights else { continue };
        let loaded = Weights::read(file, encoder.weights_sha256.as_deref())?.load(session, tower)?;
        let unused = match loaded.unused.as_slice() {
            [] => String::new(),
            [name] => format!("; `{name}` is not used"),
            [name, more @ ..] => format!("; `{name}` and {} more are not used", more.len()),
        };
        let (taken, sum) = (loaded.taken, &loaded.sha256);
        progress.line(&format!("{tower} begins with {taken} tensors of {} ({sum:.12}…){unused}", file.display()));
    }
    Ok(())
}

/// Puts a checkpoint's tensors into the session, all or none missing.
///
/// # Errors
/// If the data has changed, or a tensor is missing, unknown or of another shape.
pub fn restore(session: &mut Session, found: &Checkpoint, data: DataShape) -> Result<State> {
    if found.state.data != data {
        return Err(TrainError::DataChanged { expected: found.state.data.to_string(), got: data.to_string() });
    }
    let mut wanted: HashMap<String, Vec<usize>> =
        session.tensor_infos().into_iter().map(|tensor| (tensor.name, tensor.shape)).collect();
    let other = |problem: String| TrainError::Checkpoint {
        path: found.path.clone(),
        problem,
        hint: "the model's recipe or a plugin is another one than when it was written; use those of the run".into(),
    };
    found.tensors(|name, shape, data| {
        match wanted.remove(name) {
            Some(expected) if expected == shape => {}
            Some(expected) => {
                return Err(other(format!("tensor `{name}`: expected shape {expected:?}, got {shape:?}")));
            }
            None => return Err(other(format!("tensor `{name}` is not one of the model's"))),
        }
        session.set_tensor(name, data).map_err(|error| other(error.to_string()))
    })?;
    match wanted.keys().min() {
        Some(name) => Err(other(format!("tensor `{name}` is missing, and {} more", wanted.len() - 1))),
        None => Ok(found.state.clone()),
    }
}

impl Clock {
    fn count(&mut self, seconds: f64, waited: f64) {
        for (sum, wait, steps) in [&mut self.window, &mut self.total] {
            *sum += seconds;
            *wait += waited;
            *steps += 1;
        }
    }

    fn end_window(&mut self) {
        let (seconds, _, steps) = std::mem::take(&mut self.window);
        let now = seconds / steps.max(1) as f64;
        self.step_seconds = Some(self.step_seconds.map_or(now, |before| 0.7 * before + 0.3 * now));
    }

    fn seconds_per_step(&self) -> f64 {
        self.step_seconds.unwrap_or(self.total.0 / self.total.2.max(1) as f64)
    }
}
