//! Every library that an earlier release built still loads, says what it is, and is trained with.
//!
//! `tests/fixtures/abi` keeps the built libraries of one plugin of each kind for each ABI version. They are not built
//! again: that they were built then is the point.

use clip_host_tests::fixtures::root;
use clip_host_tests::host::{metrics, run, small_run};

/// The libraries are for one system.
const HERE: bool = cfg!(all(target_arch = "x86_64", target_os = "linux", target_env = "gnu"));

#[test]
fn libraries_of_every_abi_version_are_trained_with() {
    if !HERE {
        println!("skipped: the kept libraries are for x86-64 Linux, this is another system");
        return;
    }
    let folder = small_run("abi");
    let kept = root().join("tests/fixtures/abi");
    let entries = std::fs::read_dir(&kept).expect("the folder can be listed");
    let mut versions: Vec<_> = entries.map(|entry| entry.expect("it can be listed").path()).collect();
    versions.retain(|path| path.is_dir());
    versions.sort();
    assert!(!versions.is_empty(), "no version in {}", kept.display());
    for version in versions {
        let name = version.file_name().and_then(|name| name.to_str()).expect("names are UTF-8").to_string();
        let number: u32 = name.strip_prefix('v').and_then(|n| n.parse().ok()).expect("folders are called v1, v2, …");

        let path = version.to_string_lossy();
        let list = run(&folder, &["plugins", "list", "--path", &path, "--json"]).json();
        let rows: Vec<_> = list.as_array().expect("a list").iter().filter(|row| row["abi"] == number).collect();
        for kind in ["loss", "optimizer", "encoder", "scheduler"] {
            let id = format!("example_{kind}");
            let row = rows.iter().find(|row| row["id"] == *id).unwrap_or_else(|| panic!("{name} has no {id}: {list}"));
            assert_eq!((&row["kind"], &row["version"]), (&kind.into(), &"1.0.0".into()));
            let shown = run(&folder, &["plugins", "inspect", &id, "--path", &path]).done();
            assert!(shown.stdout.contains("at least"), "{name} {kind}: ranges are missing in {}", shown.stdout);
        }

        // All four in one run, whose log, state and checkpoint they take part in.
        let args = ["run", "small.ron", "--out", &name, "--steps", "3", "--set", "train.log_every=1"];
        let sets = [
            format!("plugins.path=[{path:?}]"),
            r#"loss=(plugin: "example_loss", config: (temperature: 0.2))"#.into(),
            r#"optimizer=(plugin: "example_optimizer", lr: 1e-2, weight_decay: 0.02)"#.into(),
            r#"model.image_encoder=(plugin: "example_encoder")"#.into(),
            r#"scheduler=(plugin: "example_scheduler")"#.into(),
        ];
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        run(&folder, &[&args[..], &sets].concat()).done();
        let lines = metrics(&folder.join(&name));
        let column = |key: &str| -> Vec<f64> { lines.iter().filter_map(|line| line.get(key)?.as_f64()).collect() };
        let (losses, rates, temperatures) = (column("train/loss"), column("train/lr"), column("train/temperature"));
        assert!(losses.len() == 3 && losses.iter().all(|loss| loss.is_finite()), "{name}: {losses:?}");
        assert!(rates.len() == 3 && rates[0] > rates[2] && rates[2] > 0.0, "{name}: the line falls: {rates:?}");
        assert!(temperatures.len() == 3 && temperatures[0] != temperatures[2], "{name}: {temperatures:?}");

        // Settings out of range are refused by the library's own schema.
        let bad =
            ["check", "small.ron", "--set", sets[1], "--set", r#"loss=(plugin: "example_loss", config: (gamma: 2.0))"#];
        run(&folder, &bad).refused_without_hint(&["gamma", "at most 1"]);
    }
}
