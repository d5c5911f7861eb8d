//! What a step compiles to and where its time goes, as commands tell it.

use clip_host_tests::host::{Folder, RECIPE, run};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// A folder with a small recipe and no data.
fn without_data(name: &str) -> Folder {
    let folder = Folder::new(name);
    folder.write("small.ron", RECIPE);
    folder
}

fn numbers<'a>(list: &'a Value, key: &'a str) -> impl Iterator<Item = f64> + 'a {
    list.as_array()
        .expect("a list")
        .iter()
        .map(move |item| item[key].as_f64().unwrap_or_else(|| panic!("{key} in {item}")))
}

fn texts<'a>(list: &'a Value, key: &'a str) -> BTreeSet<&'a str> {
    list.as_array().expect("a list").iter().map(|item| item[key].as_str().expect("a text")).collect()
}

#[test]
fn a_plan_says_what_every_kernel_costs_and_where_its_operands_are() {
    let folder = without_data("plan");
    let plan = run(&folder, &["plan", "small.ron", "--synthetic", "--json"]).json();
    assert_eq!((plan["batch"].as_u64(), plan["image_size"].as_u64()), (Some(8), Some(32)));
    let (kernels, memory) = (&plan["kernels"], &plan["memory"]);
    assert!(kernels.as_array().is_some_and(|k| k.len() > 50));

    // The first convolution: 8 images of 16×16 points, 8 channels, 7×7×3 weights each.
    let list = kernels.as_array().expect("a list");
    let conv = list.iter().find(|k| k["ops"]["conv2d"] == 1).expect("a ResNet has convolutions");
    assert_eq!(conv["flops"], 2.0 * (8 * 16 * 16 * 8) as f64 * (7 * 7 * 3) as f64);
    // It writes its result, and each channel's mean and variance.
    assert_eq!(conv["bytes_written"], (8 * 16 * 16 * 8 + 2 * 8) * 4);
    assert_eq!((&conv["kind"], &conv["part"]), (&"conv".into(), &"image forward".into()));
    let weight = conv["reads"].as_array().expect("operands").iter().find(|b| !b["leaf"].is_null());
    assert_eq!(weight.expect("a weight")["leaf"], "image_encoder.conv1.weight");
    // Its weights' gradient costs as much, and is the image encoder's too.
    let gradient = list.iter().rfind(|k| k["ops"]["conv2d_weight_grad"] == 1).expect("weights have gradients");
    assert_eq!((&gradient["flops"], &gradient["part"]), (&conv["flops"], &"image backward".into()));
    // Elementwise work is in fused kernels, which say what they are made of.
    let fused = list.iter().filter(|k| k["kind"] == "fused");
    assert!(fused.clone().any(|k| k["ops"].as_object().is_some_and(|ops| ops.len() > 4)));
    // Table rows are the text encoder's; the update writes the parameters.
    assert!(list.iter().any(|k| k["kind"] == "table" && k["part"] == "text backward"));
    let updates = list.iter().filter(|k| k["part"] == "update").flat_map(|k| k["writes"].as_array().expect("results"));
    assert!(updates.clone().any(|b| b["leaf"] == "params.decay" || b["within"]["leaf"] == "params.decay"));

    // A product has two gradients that cost what it costs; only the first convolution's input, the images, needs none.
    let products = |part: &str| -> f64 {
        let is_product =
            |k: &&Value| ["conv", "matmul"].iter().any(|p| k["kind"].as_str().is_some_and(|kind| kind.starts_with(p)));
        list.iter()
            .filter(is_product)
            .filter(|k| k["part"] == part)
            .map(|k| k["flops"].as_f64().expect("a number"))
            .sum()
    };
    let first = conv["flops"].as_f64().expect("a number");
    assert_eq!(products("image backward"), 2.0 * products("image forward") - first);
    assert_eq!(products("text backward"), 2.0 * products("text forward"));
    assert_eq!(products("heads+loss backward"), 2.0 * products("heads+loss forward"));

    // Totals are sums.
    let totals = &plan["totals"];
    let parts = ["image", "text", "heads+loss"].map(|o| ["forward", "backward"].map(|p| format!("{o} {p}")));
    for part in parts.as_flattened() {
        assert!(texts(totals, "part").contains(part.as_str()), "{part} in {totals}");
    }
    for key in ["flops", "bytes_read", "bytes_written", "kernels"] {
        let all: Vec<f64> = numbers(totals, key).collect();
        let (total, parts) = all.split_last().expect("a total");
        let sum: f64 = parts.iter().sum();
        assert!((sum - total).abs() <= 1e-9 * total, "{key}: {sum} of {total}");
        if key != "kernels" {
            let sum: f64 = numbers(kernels, key).sum();
            assert!((sum - total).abs() <= 1e-9 * total, "{key}: kernels have {sum} of {total}");
        }
    }

    // The memory map: every operand lies inside the arena or is a leaf that is listed.
    let arena = memory["arena_bytes"].as_u64().expect("a size");
    assert!((1..=arena).contains(&memory["peak_bytes"].as_u64().expect("a size")));
    let number = |object: &Value, key: &str| object[key].as_u64().unwrap_or_else(|| panic!("{key} in {object}"));
    let leaves = memory["leaves"].as_array().expect("leaves");
    let sizes: BTreeMap<&str, u64> =
        leaves.iter().map(|leaf| (leaf["name"].as_str().expect("a name"), number(leaf, "bytes"))).collect();
    let mut parameters = 0;
    for kernel in list {
        let operands = ["reads", "writes"].map(|key| kernel[key].as_array().expect("operands"));
        for buffer in operands.into_iter().flatten() {
            let (leaf, within) = (&buffer["leaf"], &buffer["within"]);
            // A parameter in a flat tensor has its own name, and says where it is.
            let (memory, offset) = match (leaf.as_str(), within["leaf"].as_str()) {
                (Some(_), Some(flat)) => (sizes[flat], number(within, "offset")),
                (Some(name), None) => (sizes[name], 0),
                (None, _) => (arena, 0),
            };
            assert!(offset + number(buffer, "offset") + number(buffer, "bytes") <= memory, "{buffer}");
            parameters += usize::from(leaf == "text_encoder.embeddings.word_embeddings.weight");
        }
    }
    assert!(parameters > 0, "the table of words is read");
    assert!(["params.decay", "images", "optimizer.exp_avg.params.decay"].iter().all(|name| sizes.contains_key(name)));
}

#[test]
fn a_plan_can_be_read() {
    let folder = without_data("plan-text");
    let args =
        ["plan", "small.ron", "--synthetic", "--batch", "4", "--image-size", "64", "--set", "model.embed_dim=24"];
    let text = run(&folder, &args).done().stdout;
    for words in ["small.ron: batch 4, images of 64 pixels", "GFLOP", "\ntotals\n", "\nmemory\narena ", "params.decay"]
    {
        assert!(text.contains(words), "`{words}` is missing in {text}");
    }
    assert!(text.contains("conv2d 7×7/2 4×64×64×3 · 8×3×7×7 → 4×32×32×8"), "{text}");
    let longest = text.lines().max_by_key(|line| line.chars().count()).expect("lines");
    assert!(longest.chars().count() <= 140, "{longest}");
    // Without --synthetic the tables are as long as the data, which is not there.
    run(&folder, &["plan", "small.ron"]).refused(&["data/vocab.txt"]);
}

#[test]
fn a_profile_times_every_kernel_of_every_step() {
    let folder = without_data("profile");
    let args = ["bench", "step", "small.ron", "--synthetic", "--steps", "3", "--profile", "trace.json"];
    let result = run(&folder, &[&args[..], &["--json"]].concat()).json();
    let kernels = result["kernels"].as_u64().expect("a number") as usize;
    let trace = std::fs::read_to_string(folder.join("trace.json")).expect("the trace is written");
    let trace: Value = serde_json::from_str(&trace).expect("the trace is JSON");
    let events = trace["traceEvents"].as_array().expect("events");
    let complete: Vec<&Value> = events.iter().filter(|e| e["ph"] == "X").collect();
    for event in &complete {
        let time = |key: &str| event[key].as_f64().unwrap_or(-1.0);
        assert!(time("ts") >= 0.0 && time("dur") >= 0.0 && event["name"].is_string(), "{event}");
        assert!(events.iter().any(|e| e["ph"] == "M" && e["tid"] == event["tid"]), "the track has no name: {event}");
    }
    let launches = complete.iter().filter(|e| e["cat"] != "step");
    assert_eq!(launches.clone().count(), 3 * kernels);
    for event in launches {
        for key in ["GFLOP", "MB", "GFLOP/s", "GB/s", "share_of_gemm_peak", "share_of_copy_peak"] {
            assert!(event["args"][key].as_f64().is_some_and(|x| x >= 0.0), "{key} in {event}");
        }
    }

    // Kinds and parts are two ways to cut the same step.
    let profile = &result["profile"];
    for cut in ["kinds", "parts"] {
        assert_eq!(numbers(&profile[cut], "kernels").sum::<f64>(), kernels as f64);
        let share: f64 = numbers(&profile[cut], "share_of_step").sum();
        assert!(share > 0.0 && share <= 1.0, "{share} of the step in kernels");
    }
    assert!(texts(&profile["kinds"], "name").is_superset(&["conv", "matmul", "fused"].into()));
    assert!(profile["peaks"]["gemm_f32_gflops"].as_f64().is_some_and(|x| x > 0.0));

    let text = run(&folder, &args).done().stdout;
    assert!(
        text.contains("of peak") && text.contains("conv weight grad") && text.contains("outside kernels"),
        "{text}"
    );
}

#[test]
fn a_trace_that_cannot_be_written_is_told_first() {
    let folder = without_data("profile-refused");
    let step = ["bench", "step", "small.ron", "--synthetic", "--steps", "1", "--profile"];
    for path in ["no/such/folder/trace.json", "."] {
        run(&folder, &[&step[..], &[path]].concat()).refused(&["cannot write the trace", path]);
    }
    #[cfg(target_os = "linux")]
    run(&folder, &[&step[..], &["/dev/full"]].concat()).refused(&["cannot write the trace", "/dev/full"]);
}

#[test]
fn peaks_are_measured_with_one_thread_and_with_all() {
    let folder = Folder::new("peak");
    let args = ["bench", "peak", "--threads", "2", "--seconds", "0.01"];
    let result = run(&folder, &[&args[..], &["--json"]].concat()).json();
    assert_eq!(numbers(&result["peaks"], "threads").collect::<Vec<_>>(), [1.0, 2.0]);
    for key in ["gemm_f32_gflops", "gemm_bf16_gflops", "copy_gbytes_per_second"] {
        assert!(numbers(&result["peaks"], key).all(|x| x > 0.1), "{key} in {result}");
    }
    let text = run(&folder, &args).done().stdout;
    assert!(text.contains("threads") && text.contains("read plus bytes written"), "{text}");
    let ended = run(&folder, &["bench", "peak", "--seconds=-1"]);
    assert_eq!(ended.code, Some(2), "{ended:?}");
}
