//! Grids: each cell is the run that its recipe is alone, to the last bit; what is done is not done again; what is wrong is
//! named, and keeps no other cell from running.

use clip_host_tests::fixtures::root;
use clip_host_tests::host::{Folder, RECIPE, metrics, newest_checkpoint, run, small_run};
use serde_json::{Map, Value};
use std::path::Path;

/// Two losses, each with two optimizers, over the small recipe.
const GRID: &str = r#"(
    include: "small.ron",
    grid: (
        loss: ["clip", (plugin: "isogclr", config: (gamma: 0.8))],
        optimizer: [(plugin: "adamw"), (name: "slow", plugin: "radam", lr: 1e-4)],
    ),
    train: (epochs: 1),
)
"#;

const CELLS: [&str; 4] = ["clip_adamw", "clip_slow", "isogclr_adamw", "isogclr_slow"];

fn small_grid(name: &str) -> Folder {
    let folder = small_run(name);
    folder.write("mine.ron", GRID);
    folder
}

/// A cell's folder.
fn cell(folder: &Path, name: &str) -> std::path::PathBuf {
    folder.join("runs/mine").join(name)
}

/// The log of a run without its times.
fn timeless(run: &Path) -> Vec<Map<String, Value>> {
    let mut lines = metrics(run);
    for line in &mut lines {
        line.retain(|name, _| {
            !["train/samples_per_second", "train/data_time", "train/batch_time", "eval/seconds"]
                .contains(&name.as_str())
        });
    }
    lines
}

#[track_caller]
fn same_bits(one: &Path, other: &Path) {
    let bits = |run: &Path| std::fs::read(newest_checkpoint(run)).expect("a checkpoint can be read");
    assert_eq!(newest_checkpoint(one).file_name(), newest_checkpoint(other).file_name());
    assert!(bits(one) == bits(other), "the checkpoints of {} and {} differ", one.display(), other.display());
    assert_eq!(timeless(one), timeless(other));
}

#[test]
fn cells_are_runs_and_the_table_is_theirs() {
    let folder = small_grid("grid");
    let planned = run(&folder, &["grid", "mine.ron", "--dry-run"]).done().stdout;
    for name in CELLS {
        assert!(planned.contains(name), "`{name}` is missing in {planned}");
    }
    assert_eq!(planned.matches("to be run").count(), 4, "{planned}");
    assert!(!folder.join("runs").exists(), "nothing was run");

    let ended = run(&folder, &["grid", "mine.ron"]).done();
    let table: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(table.len(), 5, "{table:?}");
    for title in
        ["loss", "optimizer", "TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10", "mean recall", "zero-shot", "time"]
    {
        assert!(table[0].contains(title), "`{title}` is missing in {}", table[0]);
    }
    assert!(!table[0].contains("status"), "all are finished: {}", table[0]);
    // Every figure is that of the cell's own log, in percent.
    for (line, name) in table[1..].iter().zip(CELLS) {
        let log = metrics(&cell(&folder, name));
        let last = log.iter().rev().find(|line| line.contains_key("mean_recall")).expect("an evaluation");
        let percent = |metric: &str| format!("{:.2}", last[metric].as_f64().expect("a number") * 100.0);
        let expected: Vec<String> = name
            .split('_')
            .map(String::from)
            .chain(
                [
                    "image_to_text_R@1",
                    "image_to_text_R@5",
                    "image_to_text_R@10",
                    "text_to_image_R@1",
                    "text_to_image_R@5",
                    "text_to_image_R@10",
                    "mean_recall",
                ]
                .map(percent),
            )
            .collect();
        assert_eq!(line.split_whitespace().take(9).collect::<Vec<_>>(), expected, "{name}");
    }

    // A cell is the same recipe run alone. Its plugin is the base's, whose other settings therefore hold.
    let alone = r#"(include: "small.ron", loss: (config: (gamma: 0.8)), optimizer: (plugin: "radam", lr: 1e-4),
        train: (epochs: 1))"#;
    folder.write("alone.ron", alone);
    run(&folder, &["run", "alone.ron", "--out", "alone"]).done();
    same_bits(&folder.join("alone"), &cell(&folder, "isogclr_slow"));
    // What a cell recorded is a whole recipe, with which it can be run again without the files it came from.
    let recorded = std::fs::read_to_string(cell(&folder, "clip_adamw").join("recipe.ron")).expect("a run has a recipe");
    assert!(!recorded.contains("include") && !recorded.contains("grid"), "{recorded}");
    folder.write("recorded.ron", &recorded);
    run(&folder, &["run", "recorded.ron", "--out", "again"]).done();
    same_bits(&folder.join("again"), &cell(&folder, "clip_adamw"));

    // Nothing is left to do; the table is what it was, in every form.
    let again = run(&folder, &["grid", "mine.ron"]).done();
    assert_eq!(again.stdout, ended.stdout);
    assert_eq!(again.stderr.matches("finished already").count(), 4, "{}", again.stderr);
    assert_eq!(run(&folder, &["grid", "mine.ron", "--table-only"]).done().stdout, ended.stdout);
    let markdown = run(&folder, &["grid", "mine.ron", "--table-only", "--format", "markdown"]).done().stdout;
    assert!(markdown.lines().all(|line| line.starts_with("| ") && line.ends_with(" |")), "{markdown}");
    assert_eq!(markdown.lines().count(), 6, "{markdown}");
    let csv = run(&folder, &["grid", "mine.ron", "--table-only", "--format", "csv", "--cell", "*_slow"]).done().stdout;
    let lines: Vec<&str> = csv.lines().collect();
    assert!(lines[0].starts_with("cell,loss,optimizer,image_to_text_R@1,"), "{csv}");
    assert!(lines.len() == 3 && lines[1].starts_with("clip_slow,clip,slow,0."), "{csv}");

    // Seeds are an axis like any other; figures are averaged over them.
    let args = ["grid", "mine.ron", "--set", "grid.seed=[7, 8]", "--cell", "clip_adamw_*", "--out", "seeds"];
    let seeds = run(&folder, &args).done().stdout;
    assert!(seeds.contains("±") && seeds.lines().count() == 2, "{seeds}");
    same_bits(&folder.join("seeds/clip_adamw_s7"), &cell(&folder, "clip_adamw"));
    assert_ne!(timeless(&folder.join("seeds/clip_adamw_s8")), timeless(&cell(&folder, "clip_adamw")));
}

#[test]
fn a_failed_cell_is_named_and_the_others_run() {
    let folder = small_grid("grid-failed");
    let wild = GRID.replace(r#"(plugin: "adamw")"#, r#"(name: "wild", plugin: "sgd", lr: 1e30)"#);
    folder.write("mine.ron", wild);
    let ended = run(&folder, &["grid", "mine.ron"]);
    let text = ended.refused(&[
        "2 of 4 cells failed",
        "clip_wild: training stopped at epoch 0",
        "isogclr_wild: ",
        "not finite",
    ]);
    assert_eq!(text.matches("  failed\n").count(), 2, "{text}");
    for name in ["clip_slow", "isogclr_slow"] {
        assert!(cell(&folder, name).join("summary.json").is_file(), "{name} has run");
    }
    let table = run(&folder, &["grid", "mine.ron", "--table-only"]).done().stdout;
    assert!(table.contains("status") && table.matches("finished").count() == 2, "{table}");
    // Tried again, and only those.
    let again = run(&folder, &["grid", "mine.ron"]);
    assert_eq!(again.stderr.matches("finished already").count(), 2, "{}", again.stderr);
    again.refused(&["2 of 4 cells failed"]);
}

#[test]
fn a_changed_recipe_is_refused_by_name() {
    let folder = small_grid("grid-changed");
    let only = ["grid", "mine.ron", "--cell", "clip_*"];
    run(&folder, &only).done();
    let with = |more: &[&str]| run(&folder, &[&only[..], more].concat());
    // What no result depends on may change.
    with(&["--set", "train.threads=2", "--set", "data.workers=0"]).done();

    folder.write("mine.ron", GRID.replace("lr: 1e-4", "lr: 3e-4"));
    for more in [&[][..], &["--table-only"]] {
        let text = with(more).refused(&[
            "the recipe of 1 of 2 cells is another one",
            "clip_slow: optimizer.lr: 0.0003 here, 0.0001 there",
            "--restart",
        ]);
        assert!(!text.contains("clip_adamw"), "{text}");
    }
    let planned = with(&["--dry-run"]).done().stdout;
    assert!(planned.contains("its recipe has changed: optimizer.lr"), "{planned}");
    let before = timeless(&cell(&folder, "clip_slow"));
    with(&["--restart"]).done();
    // The old run is kept, and takes no part.
    assert_eq!(timeless(&cell(&folder, "clip_slow.old1")), before);
    assert_ne!(timeless(&cell(&folder, "clip_slow")), before);
    let again = with(&[]).done();
    assert_eq!(again.stderr.matches("finished already").count(), 2, "{}", again.stderr);
}

#[test]
fn mistakes_are_told_before_anything_runs() {
    let folder = small_grid("grid-wrong");
    run(&folder, &["grid", "mine.ron", "--cell", "sogclr_*"]).refused(&["--cell", "sogclr_*", "clip_adamw, clip_slow"]);
    run(&folder, &["grid", "small.ron"]).refused(&["small.ron:1:1", "the key `grid` is missing", "clip-host run"]);
    run(&folder, &["grid", "mine.ron", "--set", "loss.plugin=clip"]).refused(&["--set:1:1: loss", "--cell"]);
    run(&folder, &["grid", "mine.ron", "--set", "train.epochs=0"])
        .refused_without_hint(&["train.epochs", "at least 1"]);
    run(&folder, &["grid", "mine.ron", "--set", "train.epoch=1"]).refused(&["train.epoch", "did you mean `epochs`?"]);
    let groups = r#"optimizer.groups=[(params: ["nothing.*"], lr: 1e-3)]"#;
    let text = run(&folder, &["grid", "mine.ron", "--set", groups]).refused(&["optimizer.groups", "nothing.*"]);
    assert_eq!(text.matches("nothing.*").count(), 2, "once, with the text that it stands in: {text}");
    for command in ["run", "check", "plan"] {
        run(&folder, &[command, "mine.ron"])
            .refused_without_hint(&["mine.ron:3:5: grid: this recipe is a grid of runs"]);
    }
    // Plugins' settings, of all cells at once, each in its place and once.
    let wrong = GRID
        .replace("(gamma: 0.8)", "(gama: 0.8)")
        .replace(r#"(plugin: "adamw")"#, r#"(plugin: "adamw", config: (eps: -1.0))"#);
    folder.write("mine.ron", wrong);
    for more in [&[][..], &["--dry-run"]] {
        let text = run(&folder, &[&["grid", "mine.ron"], more].concat()).refused(&[
            "mine.ron:4:53: loss.config.gama",
            "gamma",
            "mine.ron:5:53: optimizer.config.eps",
        ]);
        assert_eq!(text.matches("loss.config.gama").count(), 1, "{text}");
    }
    folder.write("mine.ron", GRID.replace("small.ron", "smal.ron"));
    run(&folder, &["grid", "mine.ron"]).refused(&["mine.ron:2:14: include: cannot read the included recipe smal.ron"]);
    // A recipe with a mistake in what it includes.
    folder.write("mine.ron", GRID);
    folder.write("small.ron", RECIPE.replace("batch_size: 8", "batch_size: 1"));
    let text = run(&folder, &["grid", "mine.ron"]).refused_without_hint(&["small.ron:27:36: train.batch_size"]);
    assert_eq!(text.matches("train.batch_size").count(), 1, "{text}");
    assert!(!folder.join("runs").exists(), "nothing was run");
}

/// Ctrl-C ends the grid after the step at hand; the same command goes on there, and the bits are those of a grid that was
/// left alone.
#[test]
#[cfg(unix)]
fn an_interrupted_grid_goes_on() {
    use clip_host_tests::host::{Ended, command};
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    let folder = small_grid("grid-interrupt");
    let args = ["grid", "mine.ron", "--cell", "clip_*", "--set", "train.epochs=40", "--set", "train.eval_every=0"];
    run(&folder, &[&args[..], &["--out", "whole"]].concat()).done();
    let child = command(&folder, &args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let second = cell(&folder, "clip_slow");
    let deadline = Instant::now() + Duration::from_secs(120);
    let lines = || std::fs::read_to_string(second.join("metrics.jsonl")).unwrap_or_default().lines().count();
    while lines() < 5 {
        assert!(Instant::now() < deadline, "ten steps of the second cell are not reached");
        std::thread::sleep(Duration::from_millis(1));
    }
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(sent.is_ok_and(|status| status.success()));
    let ended: Ended = child.wait_with_output().expect("it ends").into();
    assert_eq!(ended.code, Some(130), "{ended:#?}");
    assert!(ended.stdout.contains("stopped at step"), "{}", ended.stdout);
    assert!(!second.join("summary.json").exists(), "the second cell is not finished");
    let planned = run(&folder, &[&args[..], &["--dry-run"]].concat()).done().stdout;
    assert!(planned.contains("finished") && planned.contains("to go on at step"), "{planned}");
    let resumed = run(&folder, &args).done();
    assert!(resumed.stderr.contains("clip_adamw: finished already"), "{}", resumed.stderr);
    assert!(resumed.stderr.contains("resumed at step"), "{}", resumed.stderr);
    for name in ["clip_adamw", "clip_slow"] {
        same_bits(&folder.join("whole").join(name), &cell(&folder, name));
    }
}

/// The grids that the project ships: every cell's settings are ones that its plugins know.
#[test]
fn the_shipped_grids_can_be_run() {
    let folder = root();
    for (recipe, cells) in
        [("recipes/grid_sample.ron", 4), ("recipes/cc3m/grid_5x4.ron", 20), ("recipes/cc3m/grid_5x3.ron", 15)]
    {
        let out = std::env::temp_dir().join("clip-host-no-such-grid");
        let planned = run(&folder, &["grid", recipe, "--dry-run", "--out", &out.to_string_lossy()]).done().stdout;
        assert_eq!(planned.matches("  to be run\n").count(), cells, "{planned}");
    }
}
