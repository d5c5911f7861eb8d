//! The program as users have it: built, started as a process, looked at from outside.

use crate::fixtures::{root, target};
use serde_json::Value;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// The program; the plugins lie beside it. Built once per test process, with the tests' own profile and target folder:
/// cargo brings up to date what is stale, so that no test runs yesterday's program or plugins. Where nothing is built
/// (`tests/gpu/run.py`), the variable `CLIP_HOST_TEST_PROGRAM` names it.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(program) = std::env::var_os("CLIP_HOST_TEST_PROGRAM") {
            return program.into();
        }
        let exe = std::env::current_exe().expect("a test knows its own file");
        let folder = exe.parent().and_then(Path::parent).expect("tests run from target/<profile>/deps");
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        cargo.current_dir(root()).args(["build", "--workspace", "--quiet", "--target-dir"]).arg(target());
        match folder.file_name().and_then(OsStr::to_str).expect("profiles have names") {
            "debug" => {}
            profile => _ = cargo.args(["--profile", profile]),
        }
        let output = cargo.output().expect("cargo can be started");
        assert!(output.status.success(), "the program does not build: {}", String::from_utf8_lossy(&output.stderr));
        folder.join(format!("clip-host{}", std::env::consts::EXE_SUFFIX))
    })
}

/// A command of the program in a folder.
pub fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.current_dir(folder).args(args).env_remove("CLIP_HOST_PLUGIN_PATH");
    command
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code; none if a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Ended {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ended { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

impl Ended {
    /// Everything that it printed.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// Fails unless the command did what it was asked.
    #[track_caller]
    pub fn done(self) -> Ended {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    /// The JSON value that it printed.
    #[track_caller]
    pub fn json(self) -> Value {
        let ended = self.done();
        serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e} in {}", ended.stdout))
    }

    /// Fails unless the command was refused with exit code 1 and a readable message that has all of `words` and a hint,
    /// and is neither a panic nor a dump. Returns what it printed.
    #[track_caller]
    pub fn refused(self, words: &[&str]) -> String {
        let text = self.refused_without_hint(words);
        assert!(text.contains("hint:"), "no hint in: {text}");
        text
    }

    /// As [`Ended::refused`], for messages that say all by what they expected.
    #[track_caller]
    pub fn refused_without_hint(self, words: &[&str]) -> String {
        let text = self.text();
        assert_eq!(self.code, Some(1), "{self:#?}");
        for word in words {
            assert!(text.contains(word), "`{word}` is missing in: {text}");
        }
        for word in ["panicked", "RUST_BACKTRACE", "internal error"] {
            assert!(!text.contains(word), "`{word}` in: {text}");
        }
        assert!(text.len() < 6000, "{} bytes of text: {text}", text.len());
        text
    }
}

/// Runs a command of the program to its end.
pub fn run(folder: &Path, args: &[&str]) -> Ended {
    command(folder, args).output().expect("the program can be started").into()
}

/// A folder that is removed at the end, unless the test fails.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("clip-host-{name}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("the folder for temporary files can be written");
        Folder(path)
    }

    /// Writes a file, and the folders it lies in; returns its path.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        let parent = path.parent().expect("a file lies in a folder");
        std::fs::create_dir_all(parent).expect("folders can be made");
        std::fs::write(&path, content).expect("files can be written");
        path
    }
}

impl std::ops::Deref for Folder {
    type Target = Path;
    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// A recipe of a few thousand parameters for 32-pixel images, in which a test replaces what it is about. It reads
/// `data/` in the folder that the program is started in; see [`small_run`].
pub const RECIPE: &str = r#"(
    seed: 7,
    data: (
        train: [Tar("data/train-{00000..00001}.tar")],
        val: [Tar("data/val-00000.tar")],
        image_size: 32,
        text: (vocab: "data/vocab.txt", max_length: 30),
        workers: 1,
    ),
    model: (
        image_encoder: (
            plugin: "resnet",
            config: (block: "basic", layers: (1, 1, 1, 1), channels: (8, 8, 8, 8), stem: "7x7", stem_width: 8),
        ),
        text_encoder: (
            plugin: "distilbert",
            config: (
                vocab_size: 400, max_position_embeddings: 30, dim: 16, hidden_dim: 32, n_heads: 2, n_layers: 1,
                dropout: 0.1, attention_dropout: 0.1,
            ),
        ),
        embed_dim: 16,
    ),
    loss: (plugin: "isogclr", config: (rho_image: 1.0, rho_text: 1.0, tau_init: 0.05, eta: 2e-4, gamma: 0.9)),
    optimizer: (plugin: "radam", config: (betas: (0.9, 0.999)), lr: 2e-3, weight_decay: 0.02),
    scheduler: (plugin: "cosine", config: (warmup_steps: 4, warmup_lr: 1e-5, min_lr: 1e-6)),
    train: (epochs: 2, batch_size: 8, log_every: 2, threads: 1),
)
"#;

/// An encoder's id and settings.
pub type Encoder = (&'static str, &'static str);

/// Small encoders with everything random that they have, for images of 32 pixels and for 30 tokens of 400: of each plugin
/// one.
pub const SMALL_ENCODERS: [&[Encoder]; 2] = [
    &[
        ("resnet", r#"block: "bottleneck", layers: (1, 1, 1, 1), channels: (4, 4, 4, 4), stem: "deep", stem_width: 4"#),
        (
            "vit",
            "patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2, init_values: 0.1, reg_tokens: 1, pre_norm: true, \
             patch_drop_rate: 0.5, proj_drop_rate: 0.1, attn_drop_rate: 0.1, drop_path_rate: 0.1",
        ),
        ("convnext", "depths: (1, 1, 1, 1), dims: (4, 8, 12, 16), drop_path_rate: 0.1"),
        (
            "swin",
            "patch_size: 2, window_size: 5, embed_dim: 8, depths: (2, 2), num_heads: (2, 4), proj_drop_rate: 0.1, \
             attn_drop_rate: 0.1, drop_path_rate: 0.1",
        ),
        ("mixer", "patch_size: 8, num_blocks: 2, embed_dim: 16, proj_drop_rate: 0.1, drop_path_rate: 0.1"),
    ],
    &[
        ("distilbert", r#"vocab_size: 400, dim: 16, hidden_dim: 32, n_heads: 2, n_layers: 2, pooling: "mean""#),
        (
            "bert",
            "vocab_size: 400, hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_hidden_layers: 2",
        ),
        (
            "clip_text",
            r#"vocab_size: 400, width: 16, heads: 2, layers: 2, output_dim: 8, quick_gelu: true, pool_type: "last_token""#,
        ),
    ],
];

/// A folder with [`RECIPE`] as `small.ron` and its data: 64 training pairs in two shards, 16 held-out pairs.
pub fn small_run(name: &str) -> Folder {
    let folder = Folder::new(name);
    let args = ["--train", "64", "--val", "16", "--shard-size", "32", "--image-size", "32", "--seed", "3"];
    run(&folder, &[&["data", "synth", "--out", "data"], &args[..]].concat()).done();
    folder.write("small.ron", RECIPE);
    folder
}

/// The newest checkpoint of a run folder.
pub fn newest_checkpoint(run: &Path) -> PathBuf {
    let entries = std::fs::read_dir(run.join("checkpoints")).expect("a run has a folder of checkpoints");
    let names = entries.map(|entry| entry.expect("folders can be listed").path());
    let whole = names.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    whole.max().unwrap_or_else(|| panic!("no checkpoint in {}", run.display()))
}

/// The lines of a run's `metrics.jsonl`.
pub fn metrics(run: &Path) -> Vec<serde_json::Map<String, Value>> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).expect("a run has metrics");
    text.lines().map(|line| serde_json::from_str(line).expect("every line is whole")).collect()
}
