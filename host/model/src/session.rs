//! The compiled model with its tensors.

use crate::assemble::{ParamSlot, StateSlot, Tower, Training, evaluation, training};
use crate::device::{Device, Engine, Runner, Tensors};
use crate::grad_scaler::{SCALE, SKIPPED};
use crate::groups::{ScalarSet, active_input, scalar_input};
use crate::{
    Images, KernelInfo, ModelError, ModelSpec, NamedTensor, Phases, Precision, Role, Stats, StepInput, StepOutput,
    TensorInfo, init, inspect,
};
use clip_host_compiler::kernel::{Element, Kernel};
use clip_host_compiler::plan::{Plan, Region};
use clip_host_cpu::ThreadPool;
use clip_host_plugin_api::interpret::mix;
use clip_host_plugin_api::ir::Init;
use clip_host_plugin_api::optimizer::ScalarsRequest;
use std::time::Instant;

/// Samples that a tower encodes at once in evaluation.
pub const EVAL_BATCH: usize = 64;

/// Sends the coming step's images ahead while a step runs.
pub struct Ahead<'s> {
    step: &'s mut Runner,
}

impl Ahead<'_> {
    /// Begins to copy pixels `[batch, size, size, 3]` to the GPU; the step after this one
    /// is given [`Images::Sent`]. On the CPU there is nothing to be gained: it is an error there.
    ///
    /// # Errors
    /// If they cannot be copied.
    pub fn send(&mut self, pixels: &[u8]) -> Result<(), ModelError> {
        self.step.send_pixels("images", pixels)
    }
}

/// A model, compiled.
pub struct Session {
    spec: ModelSpec,
    engine: Engine,
    store: Tensors,
    step: Runner,
    params: Vec<ParamSlot>,
    states: Vec<StateSlot>,
    metrics: Vec<String>,
    sets: Vec<ScalarSet>,
    image: Option<Runner>,
    text: Option<Runner>,
    compile_ms: f64,
    init_ms: f64,
}

impl Session {
    /// Builds and compiles everything, and gives every tensor its first value.
    pub fn new(spec: ModelSpec) -> Result<Session, ModelError> {
        let start = Instant::now();
        let engine = Engine::new(spec.device.clone(), spec.threads);
        let Training { plan, params, states, metrics, sets } = training(&spec)?;
        let mut store = Tensors::new(&engine);
        for param in &params {
            // A parameter that nothing reads still has its value.
            let length = params.iter().filter(|p| p.storage == param.storage).map(|p| p.offset + p.elements()).max();
            let element = if param.half { Element::Bf16 } else { Element::F32 };
            store.entry(&param.storage, length.unwrap_or(0), element)?;
        }
        if let Device::Cpu = engine.device {
            check_memory((plan.arena + store.bytes()) as u64)?;
        }
        let phases = phases(&plan);
        let mut step = Runner::new(plan, &engine, &mut store)?;
        step.set_phases(phases);
        let compile_ms = start.elapsed().as_secs_f64() * 1e3;
        tracing::debug!(kernels = step.plan().kernels.len(), compile_ms, "compiled the training step");
        let start = Instant::now();
        for param in &params {
            let fill = |values: &mut [f32]| init::fill(&engine.pool, param.init, spec.seed, &param.name, values);
            store.fill(&param.storage, param.offset, param.elements(), fill)?;
        }
        // Memory is zero from the start: the moments of a large model need no page before the first step writes them.
        for state in states.iter().filter(|s| s.init != Init::Constant(0.0)) {
            let elements = state.shape.iter().product();
            let fill = |values: &mut [f32]| init::fill(&engine.pool, state.init, spec.seed, &state.name, values);
            store.fill(&state.name, 0, store.len(&state.name).unwrap_or(elements), fill)?;
        }
        let init_ms = start.elapsed().as_secs_f64() * 1e3;
        tracing::debug!(init_ms, "gave every tensor its first value");
        let (image, text) = (None, None);
        Ok(Session { spec, engine, store, step, params, states, metrics, sets, image, text, compile_ms, init_ms })
    }

    /// What the session was built from.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Forward, backward and update. With a loss or gradient that is not finite, an error that names the step; the
    /// caller then must not use the session's tensors. With [`Precision::Fp16`] a gradient that is not finite is none: the
    /// step changes nothing but the loss's scale.
    pub fn train_step(&mut self, input: &StepInput) -> Result<StepOutput, ModelError> {
        self.train_step_while(input, |_| ())
    }

    /// As [`Session::train_step`]. On a GPU `meanwhile` runs while the step does, and may send the coming step's images ahead.
    pub fn train_step_while(
        &mut self,
        input: &StepInput,
        meanwhile: impl FnOnce(&mut Ahead),
    ) -> Result<StepOutput, ModelError> {
        let step = &mut self.step;
        match input.images {
            Images::Normalized(images) => step.set_f32("images", images)?,
            Images::Pixels { pixels, levels } => step.set_pixels("images", Some(pixels), levels)?,
            Images::Sent { levels } => step.set_pixels("images", None, levels)?,
        }
        step.set_i32("input_ids", input.input_ids)?;
        step.set_f32("attention_mask", input.attention_mask)?;
        step.set_i32("image_ids", input.image_ids)?;
        step.set_i32("text_ids", input.text_ids)?;
        step.set_f32("epoch", &[input.epoch as f32])?;
        step.set_f32("step", &[input.step as f32])?;
        let skipped = match self.spec.precision {
            Precision::Fp16 => self.store.read(SKIPPED, 0, 1)?.and_then(|count| count.first().copied()).unwrap_or(0.0),
            _ => 0.0,
        };
        for (number, set) in self.sets.iter().enumerate() {
            let active = input.epoch >= set.from_epoch;
            let before = set.from_epoch.saturating_mul(input.steps_per_epoch);
            let request = ScalarsRequest {
                config: self.spec.optimizer.config.clone(),
                step: (input.step + 1).saturating_sub(before).saturating_sub(skipped as u64).max(1),
                lr: input.lr * set.lr_scale,
            };
            for (name, value) in self.spec.optimizer.plugin.scalars(&request)?.scalars {
                step.set_f32(&scalar_input(number, &name), &[value as f32])?;
            }
            step.set_f32(&active_input(number), &[f32::from(u8::from(active))])?;
        }
        step.start(&mut self.store, mix(self.spec.seed ^ mix(input.step)))?;
        meanwhile(&mut Ahead { step });
        step.finish()?;
        let scalar = |name: &str| -> Result<Option<f32>, ModelError> {
            Ok(step.output(&self.store, name)?.and_then(|v| v.first().copied()))
        };
        let loss = scalar("loss")?.unwrap_or(f32::NAN);
        if !loss.is_finite() {
            return Err(ModelError::NotFinite { step: input.step, what: "the loss" });
        }
        // With a scaled loss such a step has changed nothing but the scale.
        let is_scaled = self.spec.precision == Precision::Fp16;
        if !is_scaled && !scalar("finite")?.unwrap_or(f32::NAN).is_finite() {
            return Err(ModelError::NotFinite { step: input.step, what: "a gradient" });
        }
        let mut metrics = Vec::new();
        for name in &self.metrics {
            metrics.extend(scalar(&format!("metric.{name}"))?.map(|value| (name.clone(), value)));
        }
        metrics.extend(scalar("grad_norm")?.map(|norm| ("grad_norm".to_string(), norm)));
        metrics.extend(scalar(SCALE)?.map(|scale| (SCALE.to_string(), scale)));
        Ok(StepOutput { loss, metrics })
    }

    /// Normalised embeddings `[n, embed_dim]` of `n` images `[n, 3, size, size]`, in evaluation mode.
    pub fn encode_images(&mut self, images: &[f32]) -> Result<Vec<f32>, ModelError> {
        let each = 3 * self.spec.image_size * self.spec.image_size;
        check_rows("images", images.len(), each)?;
        self.prepare(Tower::Image)?;
        let Some(tower) = &mut self.image else { return Ok(vec![]) };
        let mut all = Vec::new();
        let mut block = vec![0.0; EVAL_BATCH * each];
        for chunk in images.chunks(EVAL_BATCH * each) {
            block[..chunk.len()].copy_from_slice(chunk);
            tower.set_f32("images", &block)?;
            tower.run(&mut self.store, 0)?;
            let rows = tower.output(&self.store, "features")?.unwrap_or_default();
            all.extend_from_slice(&rows[..chunk.len() / each * self.spec.embed_dim]);
        }
        Ok(all)
    }

    /// Normalised embeddings `[n, embed_dim]` of `n` texts, ids and mask `[n, length]`, in evaluation mode.
    pub fn encode_texts(&mut self, input_ids: &[i32], attention_mask: &[f32]) -> Result<Vec<f32>, ModelError> {
        let each = self.spec.text_length;
        check_rows("input_ids", input_ids.len(), each)?;
        check_rows("attention_mask", attention_mask.len(), each)?;
        self.prepare(Tower::Text)?;
        let Some(tower) = &mut self.text else { return Ok(vec![]) };
        let mut all = Vec::new();
        let (mut ids, mut mask) = (vec![0; EVAL_BATCH * each], vec![1.0; EVAL_BATCH * each]);
        for (id_chunk, mask_chunk) in input_ids.chunks(EVAL_BATCH * each).zip(attention_mask.chunks(EVAL_BATCH * each))
        {
            ids[..id_chunk.len()].copy_from_slice(id_chunk);
            mask[..mask_chunk.len()].copy_from_slice(mask_chunk);
            tower.set_i32("input_ids", &ids)?;
            tower.set_f32("attention_mask", &mask)?;
            tower.run(&mut self.store, 0)?;
            let rows = tower.output(&self.store, "features")?.unwrap_or_default();
            all.extend_from_slice(&rows[..id_chunk.len() / each * self.spec.embed_dim]);
        }
        Ok(all)
    }

    /// Evaluation programs are compiled when they are first needed, and kept.
    fn prepare(&mut self, tower: Tower) -> Result<(), ModelError> {
        let ready = match tower {
            Tower::Image => self.image.is_some(),
            Tower::Text => self.text.is_some(),
        };
        if ready {
            return Ok(());
        }
        let plan = evaluation(&self.spec, &self.params, tower, EVAL_BATCH)?;
        let executor = Runner::new(plan, &self.engine, &mut self.store)?;
        match tower {
            Tower::Image => self.image = Some(executor),
            Tower::Text => self.text = Some(executor),
        }
        Ok(())
    }

    /// Every persistent tensor, in a fixed order: parameters, states, then the optimizer's moments.
    ///
    /// # Errors
    /// If they cannot be read from a GPU.
    pub fn tensors(&self) -> Result<Vec<NamedTensor<'_>>, ModelError> {
        let mut places = Vec::new();
        self.each_tensor(|name, role, shape, storage, offset| {
            places.push((name, role, shape.to_vec(), storage.to_string(), offset));
        });
        let mut tensors = Vec::new();
        for (name, role, shape, storage, offset) in places {
            let data = self.store.read(&storage, offset, shape.iter().product())?;
            tensors.extend(data.map(|data| NamedTensor { name, role, shape, data }));
        }
        Ok(tensors)
    }

    /// The same without the values.
    pub fn tensor_infos(&self) -> Vec<TensorInfo> {
        let mut infos = Vec::new();
        self.each_tensor(|name, role, shape, storage, _| {
            if self.store.len(storage).is_some() {
                infos.push(TensorInfo { name, role, shape: shape.to_vec() });
            }
        });
        infos
    }

    /// Calls `f(name, role, shape, storage, offset)` for every persistent tensor.
    fn each_tensor(&self, mut f: impl FnMut(String, Role, &[usize], &str, usize)) {
        for param in &self.params {
            f(param.name.clone(), Role::Param, &param.shape, &param.storage, param.offset);
        }
        for state in &self.states {
            let role = if state.name.starts_with("optimizer.") { Role::Optimizer } else { Role::State };
            match &state.group {
                None => f(state.name.clone(), role, &state.shape, &state.name, 0),
                // A flat group's moment is shown as each parameter's own.
                Some(group) => {
                    let prefix = state.name.strip_suffix(group.as_str()).unwrap_or(&state.name);
                    for param in self.params.iter().filter(|p| p.storage == *group) {
                        f(format!("{prefix}{}", param.name), role, &param.shape, &state.name, param.offset);
                    }
                }
            }
        }
    }

    /// Sets one, rounded to nearest where it is kept in half precision; an error if the name or the size does not fit.
    pub fn set_tensor(&mut self, name: &str, data: &[f32]) -> Result<(), ModelError> {
        let mut found = None;
        let mut names = Vec::new();
        self.each_tensor(|known, _, shape, storage, offset| {
            if known == name {
                found = Some((shape.iter().product::<usize>(), storage.to_string(), offset));
            }
            names.push(known);
        });
        let Some((elements, storage, offset)) = found else {
            let nearest = names.into_iter().min_by_key(|n| distance(n, name));
            return Err(ModelError::UnknownTensor { name: name.into(), nearest });
        };
        if elements != data.len() {
            let (expected, got) = (format!("{elements} elements"), format!("{}", data.len()));
            return Err(ModelError::TensorSize { name: name.into(), expected, got });
        }
        self.store.write(&storage, offset, data)
    }

    /// What the compiled step is: for `bench` and logs.
    pub fn stats(&self) -> Stats {
        let plan = self.step.plan();
        Stats {
            compile_ms: self.compile_ms,
            init_ms: self.init_ms,
            params: self.params.iter().map(ParamSlot::elements).sum(),
            flops: plan.flops,
            arena_bytes: plan.arena,
            persistent_bytes: self.store.bytes(),
            kernels: plan.kernels.len(),
        }
    }

    /// From now on measures every kernel of the training step.
    pub fn time_kernels(&mut self) {
        self.step.time_kernels();
    }

    /// The training step's kernels in order, each as a line of text with the seconds that it took so far (0 if they
    /// are not measured).
    pub fn kernels(&self) -> Vec<(String, f64)> {
        let plan = self.step.plan();
        let seconds = |i: usize| self.step.timings().and_then(|t| t.get(i).copied()).unwrap_or(0.0);
        plan.kernels.iter().enumerate().map(|(i, kernel)| (kernel.describe(&plan.nodes), seconds(i))).collect()
    }

    /// What each of the training step's kernels is, in order.
    pub fn kernel_infos(&self) -> Vec<KernelInfo> {
        inspect::kernels(self.step.plan(), &self.params)
    }

    /// When each of them began and ended in the last step; empty unless kernels are measured.
    pub fn spans(&self) -> &[(Instant, Instant)] {
        self.step.spans()
    }

    /// The threads that the model runs on.
    pub fn pool(&self) -> &ThreadPool {
        &self.engine.pool
    }

    /// Milliseconds that the parts of the last step took.
    pub fn phases(&self) -> Phases {
        let [forward, backward, update] = self.step.phases().map(|s| s * 1e3);
        Phases { forward_ms: forward, backward_ms: backward, update_ms: update }
    }
}

/// The training step as launches of CUDA kernels, verified against the plan, with a line for each of the plan's kernels.
/// Needs no GPU.
///
/// # Errors
/// What assembly, compilation or the backend refuse.
pub fn cuda_schedule(spec: &ModelSpec) -> Result<(clip_host_cuda::launch::Schedule, Vec<String>), ModelError> {
    let Training { plan, .. } = training(spec)?;
    let schedule = clip_host_cuda::schedule::schedule(&plan, &clip_host_cuda::Rendered)
        .map_err(clip_host_cuda::ExecuteError::from)?;
    clip_host_cuda::verify::verify(&plan, &schedule).map_err(clip_host_cuda::ExecuteError::from)?;
    Ok((schedule, plan.kernels.iter().map(|kernel| kernel.describe(&plan.nodes)).collect()))
}

/// Refuses a step that needs more than the machine's memory: taking it would end the process.
fn check_memory(needed: u64) -> Result<(), ModelError> {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total =
        info.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok());
    match total {
        Some(kib) if needed > kib * 1024 => Err(ModelError::Memory { needed, machine: kib * 1024 }),
        // Elsewhere than on Linux nothing is known.
        _ => Ok(()),
    }
}

fn check_rows(name: &str, len: usize, each: usize) -> Result<(), ModelError> {
    match len % each.max(1) {
        0 => Ok(()),
        _ => Err(ModelError::TensorSize {
            name: name.into(),
            expected: format!("a multiple of {each} elements"),
            got: format!("{len}"),
        }),
    }
}

/// Number of differing characters by position; enough to suggest a name.
fn distance(a: &str, b: &str) -> usize {
    let common = a.chars().zip(b.chars()).take_while(|(x, y)| x == y).count();
    a.len().max(b.len()) - common
}

/// The phase of each kernel: 0, the forward pass, which ends with the kernel that writes the loss; 1, the backward pass;
/// 2, the update, which writes parameters.
pub(crate) fn phases(plan: &Plan) -> Vec<usize> {
    let loss = plan.outputs.iter().find(|(name, _)| name == "loss").map(|(_, o)| o.source);
    let writes = |kernel: &Kernel, id| kernel.writes().contains(&id);
    let forward = loss.and_then(|id| plan.kernels.iter().position(|k| writes(k, id))).map_or(0, |i| i + 1);
    let is_param = |leaf| matches!(plan.nodes[leaf as usize].op, clip_host_plugin_api::ir::Op::Param { .. });
    let updates_param = |kernel: &Kernel| {
        kernel.writes().iter().any(|w| match plan.places.get(w).map(|p| p.region) {
            Some(Region::Leaf(leaf)) => is_param(leaf),
            _ => false,
        })
    };
    let phase = |(index, kernel)| match () {
        _ if updates_param(kernel) => 2,
        _ => usize::from(index >= forward),
    };
    plan.kernels.iter().enumerate().map(phase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_larger_than_the_machine_is_refused() {
        assert!(check_memory(1 << 20).is_ok());
        if std::path::Path::new("/proc/meminfo").exists() {
            let error = check_memory(1 << 60).map_err(|e| e.to_string());
            assert!(error.as_ref().is_err_and(|e| e.contains("hint: ")), "{error:?}");
        }
    }
}
