//! `clip-host plugins new`: a crate for a plugin of one's own, which builds at once.
//!
//! The sources in `plugins_new/templates` are whole crates under the names `my_loss` and `MyLoss` (and so on), which are
//! replaced; tests/plugins_new.rs builds them all, runs their tests and trains with them.

mod name;

use crate::cli::{KindArg, PluginsNewArgs};
use crate::error::CliError;
use crate::output;
use clip_host_plugin_api::describe::Kind;
use clip_host_plugins::Registry;
use name::Name;
use std::path::{Path, PathBuf};

/// What differs from kind to kind.
struct Template {
    kind: Kind,
    source: &'static str,
    /// What an author of this kind works with.
    guide: &'static str,
    /// The setting that puts `{id}` into a recipe.
    set: &'static str,
}

const TEMPLATES: [Template; 4] = [
    Template {
        kind: Kind::Loss,
        source: include_str!("plugins_new/templates/loss.rs"),
        guide: include_str!("plugins_new/templates/loss.md"),
        set: r#"loss=(plugin: "{id}")"#,
    },
    Template {
        kind: Kind::Optimizer,
        source: include_str!("plugins_new/templates/optimizer.rs"),
        guide: include_str!("plugins_new/templates/optimizer.md"),
        set: r#"optimizer=(plugin: "{id}", lr: 2e-3, weight_decay: 0.02)"#,
    },
    Template {
        kind: Kind::Encoder,
        source: include_str!("plugins_new/templates/encoder.rs"),
        guide: include_str!("plugins_new/templates/encoder.md"),
        set: r#"model.image_encoder=(plugin: "{id}")"#,
    },
    Template {
        kind: Kind::Scheduler,
        source: include_str!("plugins_new/templates/scheduler.rs"),
        guide: include_str!("plugins_new/templates/scheduler.md"),
        set: r#"scheduler=(plugin: "{id}", config: (warmup_steps: 100))"#,
    },
];

const MANIFEST: &str = include_str!("plugins_new/templates/Cargo.toml.in");
const README: &str = include_str!("plugins_new/templates/README.md.in");

pub fn run(args: &PluginsNewArgs) -> Result<(), CliError> {
    let kind = match args.kind {
        KindArg::Loss => Kind::Loss,
        KindArg::Optimizer => Kind::Optimizer,
        KindArg::Encoder => Kind::Encoder,
        KindArg::Scheduler => Kind::Scheduler,
    };
    let name = Name::parse(&args.name).map_err(|why| refused(kind, &args.name, &why))?;
    if let Some(other) = Registry::scan(&[]).list().iter().find(|p| p.kind() == kind && p.id() == name.id()) {
        let why = format!("{other} has that name already\nhint: choose another: recipes tell plugins apart by it");
        return Err(refused(kind, &args.name, &why));
    }
    let api = plugin_api(args.api.as_deref()).map_err(|why| refused(kind, &args.name, &why))?;
    let Some(template) = TEMPLATES.iter().find(|template| template.kind == kind) else {
        return Err(refused(kind, &args.name, "internal error: there is no template of the kind\nhint: report this"));
    };
    let folder = args.out.clone().unwrap_or_else(|| name.id().into());
    let files = files(template, &name, &api);
    write(&folder, &files, &api).map_err(|why| refused(kind, &args.name, &why))?;

    if args.json {
        let files: Vec<&str> = files.iter().map(|(path, _)| *path).collect();
        return output::json(&serde_json::json!({
            "kind": kind, "id": name.id(), "folder": folder, "files": files, "api": api,
        }));
    }
    output::print(&format!(
        "made the {kind} `{id}` in {folder}: its formula, settings and tests are in src/lib.rs, the rest is in README.md\n\n\
         \x20   cd {folder}\n\
         \x20   cargo test --release\n\
         \x20   cargo build --release\n\
         \x20   clip-host plugins check target/release/{library}\n",
        id = name.id(),
        folder = folder.display(),
        library = library(name.id()),
    ))
}

fn refused(kind: Kind, name: &str, why: &str) -> CliError {
    CliError::Failed(format!("cannot make the {kind} `{name}`: {why}"))
}

/// The library file that cargo makes of a crate.
fn library(id: &str) -> String {
    format!("{}{id}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX)
}

/// Paths and contents of the crate's files.
fn files(template: &Template, name: &Name, api: &Path) -> Vec<(&'static str, String)> {
    let (kind, id) = (template.kind.to_string(), name.id());
    // "my_loss" and "MyLoss": the names in the templates.
    let placeholder = Name::parse(&format!("my_{kind}")).map_or(String::new(), |name| name.type_name().to_string());
    let source = template.source.replace(&format!("my_{kind}"), id).replace(&placeholder, name.type_name());
    let set = template.set.replace("{id}", id);
    let in_recipe = match set.split_once('=') {
        Some((path, value)) => match path.rsplit_once('.') {
            Some((section, key)) => format!("`{key}: {value}` in the section `{section}`"),
            None => format!("`{path}: {value}`"),
        },
        None => String::new(),
    };
    let readme = README
        .replace("{guide}\n", template.guide)
        .replace("{set}", &set)
        .replace("{in_recipe}", &in_recipe)
        .replace("{library}", &library(id))
        .replace("{kind}", &kind)
        .replace("{id}", id);
    let manifest = MANIFEST.replace("{id}", id).replace("{api}", &toml_string(&api.to_string_lossy()));
    vec![("Cargo.toml", manifest), ("src/lib.rs", source), ("README.md", readme), (".gitignore", "/target\n".into())]
}

/// A basic string of TOML.
fn toml_string(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Writes the crate into a folder that does not exist yet; what was begun is removed when it cannot be finished.
fn write(folder: &Path, files: &[(&str, String)], api: &Path) -> Result<(), String> {
    let shown = folder.display();
    let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(parent) = parent {
        std::fs::create_dir_all(parent).map_err(|error| cannot_write(parent, &error))?;
    }
    std::fs::create_dir(folder).map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            format!("expected a folder that does not exist, got {shown}\nhint: name another with --out")
        }
        _ => cannot_write(folder, &error),
    })?;
    let fill = || -> Result<(), String> {
        std::fs::create_dir(folder.join("src")).map_err(|error| cannot_write(folder, &error))?;
        for (name, content) in files {
            let file = folder.join(name);
            std::fs::write(&file, content).map_err(|error| cannot_write(&file, &error))?;
        }
        // The versions that the host was built from: they are on this machine, and known to go together. Cargo takes
        // from the copy what the crate needs, and does without where the sources came without one.
        let lock = api.with_file_name("Cargo.lock");
        match lock.is_file() {
            true => std::fs::copy(&lock, folder.join("Cargo.lock")).map_err(|e| cannot_write(folder, &e)).map(|_| ()),
            false => Ok(()),
        }
    };
    fill().inspect_err(|_| {
        let _ = std::fs::remove_dir_all(folder);
    })
}

fn cannot_write(path: &Path, error: &std::io::Error) -> String {
    format!("cannot write {}: {error}\nhint: name a folder that can be written with --out", path.display())
}

/// The folder of the plugin API's sources: the one asked for, or else the one in whose checkout this program lies, or
/// else the one that it was built from.
fn plugin_api(asked: Option<&Path>) -> Result<PathBuf, String> {
    // The folder itself, or a checkout that holds it.
    let found = |folder: &Path| {
        let all = [folder.to_path_buf(), folder.join("plugin-api")];
        all.into_iter().find(|folder| is_plugin_api(folder))?.canonicalize().ok()
    };
    if let Some(asked) = asked {
        return found(asked).ok_or_else(|| {
            let got = if asked.exists() { "a folder without it" } else { "no such folder" };
            format!(
                "expected the sources of clip-host-plugin-api in {}, got {got}\nhint: name a checkout of clip-host",
                asked.display()
            )
        });
    }
    let program = std::env::current_exe().ok().and_then(|program| program.canonicalize().ok());
    let around = program.iter().flat_map(|program| program.ancestors().skip(1)).map(Path::to_path_buf);
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    around.chain([built_from]).find_map(|folder| found(&folder)).ok_or_else(|| {
        format!(
            "expected the sources of clip-host-plugin-api, on which its crate depends, got none around {} and none where \
             it was built\nhint: name a checkout of clip-host: --api clip-host",
            program.as_deref().unwrap_or(Path::new("this program")).display()
        )
    })
}

fn is_plugin_api(folder: &Path) -> bool {
    let manifest = std::fs::read_to_string(folder.join("Cargo.toml"));
    manifest.is_ok_and(|text| text.lines().any(|line| line.trim() == r#"name = "clip-host-plugin-api""#))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_of_the_templates_own_names() {
        for template in &TEMPLATES {
            let kind = template.kind.to_string();
            let name = Name::parse("sharp_2").expect("a good name");
            for (file, text) in files(template, &name, Path::new("/a \"quoted\" \\ path/plugin-api")) {
                for left in [format!("my_{kind}"), "My".into(), "{id}".into(), "{kind}".into(), "{set}".into()] {
                    assert!(!text.contains(&left), "{kind} {file}: `{left}` in {text}");
                }
                let placeholders = ["{guide}", "{library}", "{in_recipe}", "{api}"];
                assert!(placeholders.iter().all(|left| !text.contains(left)), "{kind} {file}: {text}");
                assert_eq!(text.contains("sharp_2"), file != ".gitignore", "{kind} {file}");
                if file == "Cargo.toml" {
                    assert!(text.contains(r#"{ path = "/a \"quoted\" \\ path/plugin-api" }"#), "{text}");
                }
                // A page is about 66 lines; a reader's screen is wider than the source's.
                assert!(file != "README.md" || text.lines().count() < 66, "{kind}: the README is over a page");
            }
        }
    }

    #[test]
    fn the_api_is_found_from_here_and_told_where_it_is_not() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let api = plugin_api(Some(&here)).expect("it lies in the workspace");
        assert!(api.is_absolute() && api.ends_with("plugin-api"), "{}", api.display());
        assert_eq!(plugin_api(Some(&here.join("plugin-api"))), Ok(api.clone()));
        assert_eq!(plugin_api(None), Ok(api));
        let error = plugin_api(Some(Path::new("/no/such/folder"))).expect_err("there is none");
        assert!(error.contains("/no/such/folder") && error.contains("hint: "), "{error}");
        assert!(plugin_api(Some(&here.join("host"))).is_err());
    }
}
