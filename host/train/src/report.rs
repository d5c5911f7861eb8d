//! `report.html`: the curves of a run in one file that needs nothing else.

use crate::atomic;
use crate::error::Result;
use crate::metrics;
use crate::run_folder::RunFolder;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;

/// Points by step.
type Curve = Vec<(f64, f64)>;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 240.0;
const MARGIN: f64 = 56.0;
const COLOURS: [&str; 6] = ["#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a"];

/// Charts, each with the metrics that share it; a name ending in `*` stands for all that begin so.
const CHARTS: [(&str, &[&str]); 6] = [
    ("Loss", &["train/loss"]),
    ("Learning rate", &["train/lr"]),
    ("Retrieval: recall", &["image_to_text_R@*", "text_to_image_R@*"]),
    ("Retrieval: median rank", &["image_to_text_median_rank", "text_to_image_median_rank"]),
    ("Samples per second", &["train/samples_per_second"]),
    ("Seconds a step", &["train/batch_time", "train/data_time"]),
];

/// Draws the run's `metrics.jsonl`.
///
/// # Errors
/// If it cannot be read, or the report cannot be written.
pub fn write(folder: &RunFolder) -> Result<()> {
    let mut curves: BTreeMap<String, Curve> = BTreeMap::new();
    for line in metrics::read(&folder.metrics())? {
        let Some(step) = line.get("step").and_then(|step| step.as_f64()) else { continue };
        for (name, value) in &line {
            if let Some(value) = value.as_f64() {
                curves.entry(name.clone()).or_default().push((step, value));
            }
        }
    }
    let name = folder.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    let html = page(&name, &curves);
    atomic::write(&folder.report(), |file| file.write_all(html.as_bytes()))
}

fn page(name: &str, curves: &BTreeMap<String, Curve>) -> String {
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{0}</title>\n<style>body{{font:14px \
         system-ui,sans-serif;margin:2em;color:#1f2328}}svg{{display:block;margin:0 0 2em}}table{{border-collapse:\
         collapse}}td{{padding:2px 12px 2px 0}}</style></head>\n<body><h1>{0}</h1>\n",
        escape(name)
    );
    for (title, wanted) in CHARTS {
        let chosen: Vec<(&String, &Curve)> = curves
            .iter()
            .filter(|(name, _)| {
                wanted.iter().any(|wanted| match wanted.strip_suffix('*') {
                    Some(start) => name.starts_with(start),
                    None => name == wanted,
                })
            })
            .collect();
        if !chosen.is_empty() {
            chart(&mut html, title, &chosen);
        }
    }
    html.push_str("<h2>Last values</h2>\n<table>\n");
    for (name, curve) in curves {
        if let Some((_, value)) = curve.last() {
            // Writing to a string cannot fail.
            let _ = writeln!(html, "<tr><td>{}</td><td>{}</td></tr>", escape(name), number(*value));
        }
    }
    html.push_str("</table>\n</body></html>\n");
    html
}

fn chart(html: &mut String, title: &str, curves: &[(&String, &Curve)]) {
    let all = || curves.iter().flat_map(|(_, curve)| curve.iter());
    let range = |pick: fn(&(f64, f64)) -> f64| {
        let (low, high) = all().map(pick).fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
        if high > low { (low, high) } else { (low - 0.5, high + 0.5) }
    };
    let (x, y) = (range(|point| point.0), range(|point| point.1));
    let px = |value: f64| MARGIN + (value - x.0) / (x.1 - x.0) * (WIDTH - MARGIN - 8.0);
    let py = |value: f64| HEIGHT - 24.0 - (value - y.0) / (y.1 - y.0) * (HEIGHT - 48.0);
    let _ = writeln!(html, "<h2>{title}</h2>\n<svg width=\"{WIDTH}\" height=\"{}\" role=\"img\">", HEIGHT + 20.0);
    for part in 0..=4 {
        let value = y.0 + (y.1 - y.0) * f64::from(part) / 4.0;
        let at = py(value);
        let _ = writeln!(
            html,
            "<line x1=\"{MARGIN}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#d0d7de\"/><text x=\"{}\" \
             y=\"{:.1}\" text-anchor=\"end\" font-size=\"11\">{}</text>",
            WIDTH - 8.0,
            MARGIN - 6.0,
            at + 4.0,
            number(value)
        );
    }
    let bottom = HEIGHT - 8.0;
    let _ = writeln!(
        html,
        "<text x=\"{MARGIN}\" y=\"{bottom}\" font-size=\"11\">step {}</text><text x=\"{}\" y=\"{bottom}\" \
         text-anchor=\"end\" font-size=\"11\">{}</text>",
        number(x.0),
        WIDTH - 8.0,
        number(x.1)
    );
    for (i, (name, curve)) in curves.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let points: Vec<String> = curve.iter().map(|(s, v)| format!("{:.1},{:.1}", px(*s), py(*v))).collect();
        let points = points.join(" ");
        let _ =
            writeln!(html, "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" points=\"{points}\"/>");
        if let [(step, value)] = curve.as_slice() {
            let _ =
                writeln!(html, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>", px(*step), py(*value));
        }
        let across = MARGIN + 98.0 * i as f64;
        let short =
            name.rsplit('/').next().unwrap_or(name).replace("image_to_text", "i2t").replace("text_to_image", "t2i");
        let _ = writeln!(
            html,
            "<text x=\"{across}\" y=\"{}\" font-size=\"11\" fill=\"{colour}\">{}</text>",
            HEIGHT + 12.0,
            escape(&short)
        );
    }
    html.push_str("</svg>\n");
}

fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        small if small < 1e-3 => format!("{value:.2e}"),
        large if large >= 1000.0 => format!("{value:.0}"),
        _ => format!("{value:.4}").trim_end_matches('0').trim_end_matches('.').to_string(),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::folder;
    use std::path::Path;

    #[test]
    fn every_metric_is_in_the_report_and_names_are_escaped() {
        let dir = folder("report");
        let run = RunFolder::create(Some(&dir.join("a<b")), Path::new("r.ron"), "()").unwrap();
        let lines = "{\"step\":10,\"epoch\":0,\"train/loss\":3.5,\"train/lr\":0.0001}\n\
                     {\"step\":20,\"epoch\":0,\"train/loss\":2.5,\"train/lr\":0.0001}\n\
                     {\"step\":20,\"epoch\":1,\"image_to_text_R@1\":0.25,\"train/<x>\":null,\"other\":1e-9}\n";
        std::fs::write(run.metrics(), lines).unwrap();
        write(&run).unwrap();
        let html = std::fs::read_to_string(run.report()).unwrap();
        for part in ["<h1>a&lt;b</h1>", "<h2>Loss</h2>", "Retrieval: recall", "i2t_R@1", "<td>2.5</td>", "1.00e-9"] {
            assert!(html.contains(part), "{part}");
        }
        assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
        // Two points of the loss: from the top left to the bottom right.
        assert!(html.contains("points=\"56.0,24.0 632.0,216.0\""), "{html}");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [(0.0, "0"), (0.25, "0.25"), (1234.5, "1234"), (-3.0, "-3"), (2e-4, "2.00e-4")] {
            assert_eq!(number(value), text);
        }
    }
}
