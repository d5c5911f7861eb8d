//! Subcommands and flags.

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Trains CLIP-style image-text models: recipes say what, plugins say how.
#[derive(Debug, Parser)]
#[command(name = "clip-host", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Cli {
    /// Log more: once for debug, twice for trace.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Log errors only.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train what a recipe says, into a run folder.
    Run(RunArgs),
    /// Run all combinations of a recipe's `grid`, and compare them in a table.
    ///
    /// Each cell is a run like any other, in its own folder runs/<recipe>/<values' names>. Cells that are finished are
    /// skipped, those that were stopped go on, a failed one does not keep the others from running: the same command,
    /// given again, does what is left. Several processes may share a grid.
    Grid(GridArgs),
    /// Find everything that can be known wrong with a recipe before training.
    Check(CheckArgs),
    /// Show what a recipe's training step compiles to: kernels, costs, memory.
    ///
    /// Prints the kernels in order, with what was fused into each, floating-point operations, bytes, and the operands'
    /// places and sizes; totals for each part of the model; and the memory map.
    ///
    /// Operations of products are exact; a fused kernel counts one for each arithmetic instruction and element. Bytes are
    /// those of distinct elements read and written: the traffic if no cache held anything from the kernel before.
    Plan(PlanArgs),
    /// Evaluate a run's checkpoint: retrieval over the held-out pairs.
    Eval(EvalArgs),
    /// List, inspect and check plugins.
    #[command(subcommand)]
    Plugins(PluginsCommand),
    /// Run one plugin on given tensors and write what it computes: parity with code elsewhere.
    Replay(ReplayArgs),
    /// Make or index data.
    #[command(subcommand)]
    Data(DataCommand),
    /// Measure speed.
    #[command(subcommand)]
    Bench(BenchCommand),
}

/// Overrides of a recipe.
#[derive(Debug, Clone, Default, Args)]
pub struct SetArgs {
    /// Override a setting, for instance `--set optimizer.lr=1e-3`; may be repeated.
    #[arg(long = "set", value_name = "PATH.TO.KEY=VALUE")]
    pub sets: Vec<String>,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// The recipe. May be left out with --resume.
    #[arg(required_unless_present = "resume")]
    pub recipe: Option<PathBuf>,
    #[command(flatten)]
    pub set: SetArgs,
    /// Folder for the run, new or empty [default: runs/<recipe>-<date and time>].
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    pub out: Option<PathBuf>,
    /// Continue the run in this folder, exactly where its newest checkpoint stands.
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
    /// Same as `--set train.epochs=N`.
    #[arg(long, value_name = "N")]
    pub epochs: Option<u64>,
    /// End after this many steps; the schedule stays that of all epochs. Same as `--set train.steps=N`.
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Write a checkpoint every this many steps too, not only at the ends of epochs. Same as
    /// `--set train.checkpoint_every_steps=N`.
    #[arg(long, value_name = "N")]
    pub checkpoint_every_steps: Option<u64>,
    /// Print one JSON object on stdout; progress goes to stderr.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct GridArgs {
    /// The recipe, with a `grid`.
    pub recipe: PathBuf,
    /// Override a setting of all cells, or an axis: `--set 'grid.seed=[0,1,2]'`; may be repeated.
    #[arg(long = "set", value_name = "PATH.TO.KEY=VALUE")]
    pub sets: Vec<String>,
    /// Only cells of this name, in which `*` stands for any text; may be repeated.
    #[arg(long, value_name = "PATTERN")]
    pub cell: Vec<String>,
    /// Folder of the cells' run folders [default: runs/<recipe>].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// How the table is printed. Progress goes to stderr.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub format: TableFormat,
    /// Run nothing: check all cells, and print what would be done with each.
    #[arg(long)]
    pub dry_run: bool,
    /// Run nothing: print the table of what is there.
    #[arg(long, conflicts_with = "dry_run")]
    pub table_only: bool,
    /// Start cells again whose recipe is another one than that of their run folder, which is kept under another name.
    #[arg(long, conflicts_with = "table_only")]
    pub restart: bool,
}

/// Forms of a grid's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum TableFormat {
    /// Columns aligned by spaces; percent.
    Text,
    /// A table of GitHub's Markdown, the best figures bold; percent.
    Markdown,
    /// One line for each run, seeds not averaged; fractions under the names of the metrics.
    Csv,
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The recipe.
    pub recipe: PathBuf,
    #[command(flatten)]
    pub set: SetArgs,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    /// The recipe.
    pub recipe: PathBuf,
    #[command(flatten)]
    pub set: SetArgs,
    /// Same as `--set train.batch_size=N`.
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Same as `--set data.image_size=N`.
    #[arg(long, value_name = "N")]
    pub image_size: Option<usize>,
    /// Tables of a small data set instead of the recipe's, so that no data is needed.
    #[arg(long)]
    pub synthetic: bool,
    /// Write the step's CUDA kernels into this folder, a file for each, and list the launches.
    #[arg(long, value_name = "DIR")]
    pub cuda: Option<PathBuf>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    /// The run folder.
    #[arg(value_name = "DIR")]
    pub run: PathBuf,
    /// Held-out data instead of the recipe's `data.val`: tars (`"val-{00..03}.tar"`) or a source as recipes write it
    /// (`'JsonList(file: "coco_val.json", images: "coco")'`); may be repeated.
    #[arg(long, value_name = "SOURCE")]
    pub data: Vec<String>,
    /// Which checkpoint: `newest`, `best`, or a file.
    #[arg(long, value_name = "WHICH", default_value = "newest")]
    pub checkpoint: String,
    #[command(flatten)]
    pub set: SetArgs,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum PluginsCommand {
    /// All plugins on the search path.
    List(PluginsListArgs),
    /// What a plugin says of itself, its settings, and what it builds.
    Inspect(InspectArgs),
    /// Make a crate for a plugin of your own: a formula to replace, its settings, its tests, a page of README.
    New(PluginsNewArgs),
    /// Check a plugin library before it is used.
    ///
    /// Each check runs in a process of its own, so that a plugin that crashes, hangs or panics fails that check only: what
    /// it says of itself, shapes, gradients against finite differences, edge cases, determinism, checkpoints.
    Check(PluginsCheckArgs),
}

#[derive(Debug, Args)]
pub struct PluginsListArgs {
    /// More libraries, or folders of them, to search.
    #[arg(long, value_name = "PATH")]
    pub path: Vec<PathBuf>,
    /// Print a JSON list on stdout.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The plugin's id, as recipes name it.
    pub id: String,
    /// Settings with which it builds what is shown, as recipes write them: '(gamma: 0.8)' [default: its own].
    #[arg(long, value_name = "RON")]
    pub config: Option<String>,
    /// Print the ops that it builds too.
    #[arg(long)]
    pub fragment: bool,
    /// More libraries, or folders of them, to search.
    #[arg(long, value_name = "PATH")]
    pub path: Vec<PathBuf>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PluginsNewArgs {
    /// Kind of the plugin.
    pub kind: KindArg,
    /// Its id, as recipes name it, and the name of its crate: lower-case letters, digits and `_`.
    pub name: String,
    /// Folder for the crate; must not exist [default: the name].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// clip-host's sources, on which the crate depends [default: those that this program was built from].
    #[arg(long, value_name = "DIR")]
    pub api: Option<PathBuf>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PluginsCheckArgs {
    /// The library file.
    pub file: PathBuf,
    /// Settings to check it with, as recipes write them: '(gamma: 0.8)' [default: its own].
    #[arg(long, value_name = "RON")]
    pub config: Option<String>,
    /// Seconds after which the plugin is taken to hang, for each check.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
    /// More libraries, or folders of them, among which its id must be the only one.
    #[arg(long, value_name = "PATH")]
    pub path: Vec<PathBuf>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
    /// Run this check in this process: what the parent process starts.
    #[arg(long, value_name = "NAME", hide = true)]
    pub in_process: Option<String>,
    /// Where the parent process wants the files of its children.
    #[arg(long, value_name = "DIR", hide = true)]
    pub scratch: Option<PathBuf>,
}

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendArg {
    /// A GPU where there is one that can be used, otherwise the CPU.
    Auto,
    Cpu,
    /// The first NVIDIA GPU.
    Cuda,
    /// The GPU's kernels, compiled by the host's C++ compiler and run on the CPU: slow, to check them where there is no GPU.
    Emulator,
}

impl BackendArg {
    /// As recipes write it; none for what they do not know.
    pub fn ron(self) -> Option<&'static str> {
        match self {
            BackendArg::Auto => Some("Auto"),
            BackendArg::Cpu => Some("Cpu"),
            BackendArg::Cuda => Some("Cuda(device: 0)"),
            BackendArg::Emulator => None,
        }
    }
}

/// Kinds of plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum KindArg {
    Loss,
    Optimizer,
    Encoder,
    Scheduler,
}

/// Names in the files, all of them stacked over steps where there are steps:
///
/// loss: image_features text_features [image_ids text_ids epoch] in; loss grad_image_features grad_text_features state.* out.
/// optimizer: param_init.* grad.* [lr] in; param_after.* state.* out.
/// encoder: param.* input.* cotangent.* in; eval.* train.* (outputs, gradients, running statistics) out.
/// scheduler: index (of steps; or epoch, with fractions) [metric] in; lr out.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub struct ReplayArgs {
    /// Kind of the plugin.
    pub kind: KindArg,
    /// Its id.
    pub id: String,
    /// Its settings, as recipes write them: '(gamma: 0.8)'.
    #[arg(long, value_name = "RON", default_value = "()")]
    pub config: String,
    /// Tensors to read, a safetensors file.
    #[arg(long = "in", value_name = "FILE")]
    pub input: PathBuf,
    /// Tensors to write, a safetensors file; replaced if it exists.
    #[arg(long = "out", value_name = "FILE")]
    pub output: PathBuf,
    /// What computes.
    #[arg(long, value_enum, default_value_t = BackendArg::Cpu)]
    pub backend: BackendArg,
    /// More libraries, or folders of them, to search.
    #[arg(long, value_name = "PATH")]
    pub path: Vec<PathBuf>,
    /// Optimizers: weight decay of all parameters but those of --no-decay.
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub weight_decay: f64,
    /// Optimizers: patterns of parameters that do not decay, as `optimizer.no_decay` of recipes; '' for none.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',', default_value = "1d,*.bias")]
    pub no_decay: Vec<String>,
    /// Schedulers: the base learning rate. Optimizers: the rate of all steps, if the input has no `lr`.
    #[arg(long, value_name = "X", default_value_t = 1e-3)]
    pub lr: f64,
    /// Schedulers: epochs of the run.
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub epochs: u64,
    /// Schedulers: steps of the run [default: those of its epochs].
    #[arg(long, value_name = "N")]
    pub total_steps: Option<u64>,
    /// Schedulers: steps in an epoch.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps_per_epoch: u64,
    /// Schedulers: the metric that a schedule may look at, if the input has none for each index.
    #[arg(long, value_name = "X")]
    pub metric: Option<f64>,
}

#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Make image-text pairs: pictures of a few objects, captioned in English.
    Synth(SynthArgs),
    /// Index shards ahead of a run, and say what is in them.
    Index(IndexArgs),
}

#[derive(Debug, Args)]
pub struct SynthArgs {
    /// Folder to write to.
    #[arg(long, value_name = "DIR", default_value = "data/sample")]
    pub out: PathBuf,
    /// Everything random follows from it.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Training pairs.
    #[arg(long, value_name = "N", default_value_t = 5_000)]
    pub train: usize,
    /// Held-out pairs.
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub val: usize,
    /// Pairs per tar.
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    pub shard_size: usize,
    /// Side of the pictures in pixels, 32 to 1024.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub image_size: usize,
    /// JPEG quality, 1 to 100.
    #[arg(long, value_name = "N", default_value_t = 66)]
    pub quality: u8,
    /// How hard the pictures are to tell apart: easy, standard or hard.
    #[arg(long, value_name = "LEVEL", default_value = "standard")]
    pub difficulty: clip_host_data_synth::Difficulty,
    /// Also write a `.json` member for each pair, as img2dataset does. (Not the output format.)
    #[arg(long)]
    pub json: bool,
    /// Replace the shards of an earlier run.
    #[arg(long)]
    pub overwrite: bool,
}

#[derive(Debug, Args)]
pub struct IndexArgs {
    /// Shards; braces and `*` are expanded.
    #[arg(required = true, value_name = "SHARD")]
    pub shards: Vec<String>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Training steps: samples a second and where the time goes.
    Step(BenchStepArgs),
    /// The data pipeline alone: images a second.
    Data(BenchDataArgs),
    /// This machine's limits: products of matrices and copies of memory.
    ///
    /// What the kernels of a step are compared with: large products of f32 and of bf16 matrices, and copies of memory
    /// (bytes read plus bytes written), with one thread and with all. Each figure is the fastest of several runs.
    Peak(BenchPeakArgs),
    /// Forward passes of a recipe's encoders by luminal's stock CUDA compiler, beside the plan's own.
    ///
    /// For a clip-host that was built with `--features luminal-cuda` and a CUDA toolkit. Both sides compute the same from
    /// the same weights and random inputs, in f32; `--json` has every run's time.
    LuminalCuda(BenchLuminalCudaArgs),
}

#[derive(Debug, Args)]
pub struct BenchLuminalCudaArgs {
    /// The recipe.
    pub recipe: PathBuf,
    #[command(flatten)]
    pub set: SetArgs,
    /// Passes to measure; one more comes before.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub steps: u16,
    /// Same as `--set data.image_size=N`.
    #[arg(long, value_name = "N")]
    pub image_size: Option<usize>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchPeakArgs {
    /// All threads are this many [default: one for each core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// How long to measure each limit.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5)]
    pub seconds: f64,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchStepArgs {
    /// The recipe.
    pub recipe: PathBuf,
    #[command(flatten)]
    pub set: SetArgs,
    /// Steps to measure; two more come before as warm-up.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// Same as `--set train.batch_size=N`.
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Same as `--set data.image_size=N`.
    #[arg(long, value_name = "N")]
    pub image_size: Option<usize>,
    /// Same as `--set backend=NAME`.
    #[arg(long, value_enum)]
    pub backend: Option<BackendArg>,
    /// Random images and token ids, so that no data is needed.
    #[arg(long)]
    pub synthetic: bool,
    /// List the N kernels that take most of the step.
    #[arg(long, value_name = "N")]
    pub kernels: Option<usize>,
    /// Write a trace of the measured steps' kernels to this file, for ui.perfetto.dev or chrome://tracing, and print where
    /// the time goes, against the machine's limits.
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct BenchDataArgs {
    /// The recipe.
    pub recipe: PathBuf,
    #[command(flatten)]
    pub set: SetArgs,
    /// Worker threads instead of the recipe's.
    #[arg(long, value_name = "N")]
    pub workers: Option<usize>,
    /// How long to measure.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    pub seconds: f64,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}
