//! `clip-host plan`: the compiled training step as a person reads it.

use crate::cli::PlanArgs;
use crate::error::CliError;
use crate::units::{bytes, counted, gflop, megabytes, table, wrap};
use crate::{output, prepare};
use clip_host_compiler::cost::{Cost, Kind};
use clip_host_cuda::launch::Work;
use clip_host_data::Data;
use clip_host_model::{Buffer, Device, KernelInfo, LeafInfo, MemoryMap, ModelSpec, Owner, Phase, StepPlan, part};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Columns that the printed plan keeps to, where names allow.
const WIDTH: usize = 120;
/// Leaves smaller than this are printed as one line for each kind.
const SMALL: usize = 1 << 20;
/// Buffers of the arena that are printed, largest first.
const BUFFERS: usize = 12;

pub fn run(args: &PlanArgs) -> Result<(), CliError> {
    let flags = [
        ("train.batch_size", args.batch.map(|n| n.to_string())),
        ("data.image_size", args.image_size.map(|n| n.to_string())),
    ];
    let (recipe, config) = prepare::recipe(&args.recipe, &prepare::sets(&args.set, &flags))?;
    let plugins = prepare::plugins(&recipe)?;
    let dataset_size = match args.synthetic {
        true => prepare::synthetic_dataset(recipe.train.batch_size),
        false => {
            let data = Data::open(&config, &prepare::base()?)?;
            data.train.num_images().max(data.train.num_texts())
        }
    };
    let spec = plugins.model(&recipe, &config, dataset_size, Device::Cpu);
    if let Some(folder) = &args.cuda {
        return write_cuda(&spec, folder);
    }
    let plan = StepPlan::compile(&spec)?;
    if args.json {
        return output::json(&json_form(&plan, &spec));
    }
    let head = format!(
        "{}: batch {}, images of {} pixels, texts of {} tokens\n",
        args.recipe.display(),
        spec.batch,
        spec.image_size,
        spec.text_length
    );
    output::print(&(head + &text(&plan)))
}

/// The costs of each part of the step, in order, and their sum.
fn totals(kernels: &[KernelInfo]) -> Vec<(String, usize, Cost)> {
    let parts = [Phase::Forward, Phase::Backward]
        .into_iter()
        .flat_map(|phase| [Owner::Image, Owner::Text, Owner::Shared].map(|owner| part(phase, owner)))
        .chain([part(Phase::Update, Owner::Shared)]);
    let mut totals: Vec<(String, usize, Cost)> = parts.map(|name| (name, 0, Cost::default())).collect();
    let mut sum = ("total".to_string(), 0, Cost::default());
    for kernel in kernels {
        let name = kernel.part();
        for (_, count, cost) in totals.iter_mut().filter(|t| t.0 == name).chain([&mut sum]) {
            *count += 1;
            *cost += &kernel.cost;
        }
    }
    totals.push(sum);
    totals
}

/// Writes the kernels that a GPU would run, and prints what it would launch: grid, threads, function, and what for.
fn write_cuda(spec: &ModelSpec, folder: &Path) -> Result<(), CliError> {
    let (schedule, kernels) = clip_host_model::cuda_schedule(spec)?;
    let failed = |error: std::io::Error| {
        CliError::Failed(format!(
            "cannot write kernels to {}: {error}\nhint: name a folder that can be written",
            folder.display()
        ))
    };
    std::fs::create_dir_all(folder).map_err(failed)?;
    for function in &schedule.functions {
        std::fs::write(folder.join(format!("{}.cu", function.name)), function.source()).map_err(failed)?;
    }
    let mut text = String::new();
    for (work, kernel) in &schedule.work {
        let Work::Launch(launch) = work else { continue };
        let [x, y, _] = launch.grid;
        let (name, threads) = (&schedule.functions[launch.function].name, launch.block[0]);
        text += &format!("{x:>8} x {y:<4} {threads:>5}  {name}  {}\n", kernels[*kernel]);
    }
    text += &format!(
        "{} launches of {} functions, {} of scratch\n",
        schedule.work.len(),
        schedule.functions.len(),
        bytes(schedule.scratch as u64)
    );
    output::print(&text)
}

/// The kernels, each with a line of its own and what it reads and writes below; then totals and memory.
fn text(plan: &StepPlan) -> String {
    let cells = |row: [&str; 5]| row.map(String::from).to_vec();
    let mut text = format!(
        "{} kernels, {:.1} M parameters, compiled in {:.0} ms; MB: bytes read and written\n\n",
        plan.kernels.len(),
        plan.params as f64 / 1e6,
        plan.compile_ms
    );

    let mut rows = vec![cells(["#", "part", "kernel", "GFLOP", "MB"])];
    rows.extend(plan.kernels.iter().enumerate().map(|(index, k)| {
        vec![index.to_string(), k.part(), k.name.clone(), gflop(k.cost.flops), megabytes(k.cost.bytes())]
    }));
    let lines = table(&rows, 2);
    for (index, line) in lines.lines().enumerate() {
        text += &format!("{line}\n");
        // The first line is the head.
        if let Some(kernel) = index.checked_sub(1).and_then(|i| plan.kernels.get(i)) {
            text += &details(kernel);
        }
    }

    text += "\ntotals\n";
    let mut rows = vec![cells(["part", "kernels", "GFLOP", "MB read", "MB written"])];
    rows.extend(totals(&plan.kernels).into_iter().map(|(name, count, cost)| {
        vec![name, count.to_string(), gflop(cost.flops), megabytes(cost.read), megabytes(cost.written)]
    }));
    text += &table(&rows, 0);
    text += &memory(&plan.memory, &plan.kernels);
    text
}

/// What was fused into a kernel and where its operands are.
fn details(kernel: &KernelInfo) -> String {
    let mut words: Vec<String> = Vec::new();
    if kernel.kind == Kind::Fused {
        words.push("computes".into());
        words.extend(kernel.ops.iter().map(counted));
        words.push("·".into());
    }
    words.push("reads".into());
    words.extend(list(&kernel.reads));
    words.push("·".into());
    words.push("writes".into());
    words.extend(list(&kernel.writes));
    wrap(&words, 6, WIDTH)
}

/// Operands, each one word; of many the first.
fn list(buffers: &[Buffer]) -> Vec<String> {
    const MOST: usize = 12;
    let mut words: Vec<String> = buffers.iter().take(MOST).map(place).collect();
    if buffers.len() > MOST {
        words.push(format!("and {} more", buffers.len() - MOST));
    }
    if words.is_empty() {
        words.push("nothing".into());
    }
    words
}

/// A value's place, type and size.
fn place(buffer: &Buffer) -> String {
    let size = bytes(buffer.bytes as u64);
    match &buffer.leaf {
        Some(name) if buffer.offset > 0 => {
            format!("{name}+{}[{} {size}]", megabytes(buffer.offset as u64), buffer.element)
        }
        Some(name) => format!("{name}[{} {size}]", buffer.element),
        None => format!("arena+{}[{} {size}]", megabytes(buffer.offset as u64), buffer.element),
    }
}

fn memory(memory: &MemoryMap, kernels: &[KernelInfo]) -> String {
    let mut text = format!(
        "\nmemory\narena {}; at most {} of it in use, in kernel {}{}\n",
        bytes(memory.arena as u64),
        bytes(memory.peak as u64),
        memory.peak_kernel,
        kernels.get(memory.peak_kernel).map(|k| format!(" ({})", k.name)).unwrap_or_default(),
    );
    let row = |cells: [String; 4]| cells.to_vec();
    let mut stays: Vec<_> = memory.stays.iter().collect();
    stays.sort_by_key(|s| (std::cmp::Reverse(s.bytes), s.offset));
    let mut rows = vec![row(["largest buffers".into(), "MB".into(), "at MB".into(), "kernels".into()])];
    rows.extend(stays.iter().take(BUFFERS).map(|s| {
        let (size, offset) = (megabytes(s.bytes as u64), megabytes(s.offset as u64));
        row([format!("  %{}", s.value), size, offset, format!("{}–{}", s.first, s.last)])
    }));
    text += &table(&rows, 0);

    let mut rows = vec![vec!["outside the arena".to_string(), "MB".to_string()]];
    for (kind, title) in KINDS {
        let of_kind: Vec<&LeafInfo> = memory.leaves.iter().filter(|l| l.kind == kind).collect();
        let sum: usize = of_kind.iter().map(|l| l.bytes).sum();
        rows.push(vec![format!("{title} ({})", of_kind.len()), megabytes(sum as u64)]);
        let (large, small): (Vec<&LeafInfo>, Vec<&LeafInfo>) = of_kind.into_iter().partition(|l| l.bytes >= SMALL);
        rows.extend(large.iter().map(|l| vec![format!("  {}", l.name), megabytes(l.bytes as u64)]));
        if !large.is_empty() && !small.is_empty() {
            let rest: usize = small.iter().map(|l| l.bytes).sum();
            rows.push(vec![format!("  {} smaller", small.len()), megabytes(rest as u64)]);
        }
    }
    text + &table(&rows, 0)
}

/// Kinds of leaves with their titles.
const KINDS: [(&str, &str); 4] =
    [("param", "parameters"), ("state", "states"), ("input", "inputs"), ("literal", "literals")];

/// The whole plan. Names stay as they are; new ones may come.
fn json_form(plan: &StepPlan, spec: &ModelSpec) -> Value {
    let kernels: Vec<Value> = plan.kernels.iter().enumerate().map(|(index, k)| kernel_json(index, k)).collect();
    let totals: Vec<Value> = totals(&plan.kernels)
        .into_iter()
        .map(|(name, count, cost)| {
            let mut object = cost_json(&cost);
            object.insert("part".into(), name.into());
            object.insert("kernels".into(), count.into());
            Value::Object(object)
        })
        .collect();
    let memory = &plan.memory;
    let stays = memory.stays.iter().map(|s| {
        json!({ "value": s.value, "offset": s.offset, "bytes": s.bytes, "first_kernel": s.first, "last_kernel": s.last })
    });
    let leaves = memory.leaves.iter().map(|l| json!({ "name": l.name, "kind": l.kind, "bytes": l.bytes }));
    json!({
        "batch": spec.batch,
        "image_size": spec.image_size,
        "text_length": spec.text_length,
        "params": plan.params,
        "compile_ms": plan.compile_ms,
        "kernels": kernels,
        "totals": totals,
        "memory": {
            "arena_bytes": memory.arena,
            "peak_bytes": memory.peak,
            "peak_kernel": memory.peak_kernel,
            "buffers": stays.collect::<Vec<_>>(),
            "leaves": leaves.collect::<Vec<_>>(),
        },
    })
}

fn kernel_json(index: usize, kernel: &KernelInfo) -> Value {
    let buffer = |b: &Buffer| {
        let within = b.within.as_ref().map(|(leaf, offset)| json!({ "leaf": leaf, "offset": offset }));
        json!({
            "value": b.value, "leaf": b.leaf, "within": within, "offset": b.offset, "bytes": b.bytes, "shape": b.shape, "dtype": b.element,
        })
    };
    let ops: Map<String, Value> = kernel.ops.iter().map(|(name, count)| (name.to_string(), (*count).into())).collect();
    let mut object = cost_json(&kernel.cost);
    object.insert("index".into(), index.into());
    object.insert("name".into(), kernel.name.as_str().into());
    object.insert("kind".into(), kernel.kind.name().into());
    object.insert("phase".into(), kernel.phase.name().into());
    object.insert("owner".into(), kernel.owner.name().into());
    object.insert("part".into(), kernel.part().into());
    object.insert("ops".into(), ops.into());
    object.insert("reads".into(), kernel.reads.iter().map(buffer).collect());
    object.insert("writes".into(), kernel.writes.iter().map(buffer).collect());
    Value::Object(object)
}

fn cost_json(cost: &Cost) -> Map<String, Value> {
    let mut object = Map::new();
    object.insert("flops".into(), cost.flops.into());
    object.insert("dear_ops".into(), json!(cost.dear));
    object.insert("bytes_read".into(), cost.read.into());
    object.insert("bytes_written".into(), cost.written.into());
    object
}
