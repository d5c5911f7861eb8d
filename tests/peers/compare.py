#!/usr/bin/env python3
"""clip-host and PyTorch on the same training step, in turn: A B A B. Needs Python's standard library alone.

    tests/peers/compare.py --python VENV/bin/python --model resnet50 --precision f32
    tests/peers/compare.py --python VENV/bin/python --backend cuda --precision bf16 --batch 128
    tests/peers/compare.py --python VENV/bin/python --backend cuda --precision bf16 --batch largest

`step.py` is the PyTorch side and runs under `--python`. First every mode is run once for a few steps, then the fastest
one and clip-host take turns, each run a process of its own, and the table gives the medians over the rounds. On a GPU
`peak.py` also measures what it can do at most.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# Recipe and the flags that make its step the one measured; step.py's SPECS has the same numbers.
MODELS = {
    "resnet50": ("recipes/cc3m/isogclr_radam.ron", 16, 224),
    "vit_b32": ("recipes/cc3m/isogclr_radam_vit.ron", 16, 224),
    "sample": ("recipes/isogclr_radam.ron", 64, 64),
}
# Of a GPU's comparison, unless they are given: the study's batch, and ResNet-50's image size there.
GPU_SIZES = {"resnet50": (128, 256), "vit_b32": (128, 224), "sample": (128, 64)}
# Those worth a scan; step.py knows more (`step.py --help`).
SCAN = {
    "cpu": ["eager", "eager+nhwc", "eager+nhwc+malloc", "compile", "compile+nhwc", "compile+nhwc+malloc"],
    "cuda": ["eager+nhwc", "eager+nhwc+capture", "compile+nhwc", "compile+nhwc+graphs", "compile+nhwc+autotune"],
}
# clip-host's precision beside each of PyTorch's; tf32 is an option of its CUDA backend.
PRECISIONS = {"f32": "F32", "tf32": "F32", "bf16": "Bf16", "fp16": "Fp16"}
# A run over 30 epochs of 100,000 pairs, as in the studies.
STUDY_SAMPLES = 30 * 100_000
GIB = float(1 << 30)


class Failed(Exception):
    """A side did not answer with its line of JSON."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", choices=list(MODELS))
    parser.add_argument("--backend", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="f32", choices=list(PRECISIONS), help="tf32 and fp16: --backend cuda")
    parser.add_argument("--optimizer", default="radam", choices=["radam", "adamw"], help="adamw: PyTorch's fused one")
    parser.add_argument("--smoke", action="store_true", help="with --backend cuda: all of it, but on the processor")
    parser.add_argument("--python", default=sys.executable, help="a Python that has requirements.txt")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/clip-host")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="handed to clip-host")
    defaults = "; ".join(f"{backend}: {','.join(modes)}" for backend, modes in SCAN.items())
    parser.add_argument("--modes", help=f"PyTorch's modes to scan, with commas [default: {defaults}]")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side after the scan")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run; two more come before")
    parser.add_argument("--scan-steps", type=int, default=3, help="timed steps of each mode in the scan")
    parser.add_argument("--batch", help="a number; with --backend cuda also `largest`: what fits on both sides")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--inductor-cache", type=Path, help="kept between calls; then compile seconds may be warm ones")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds after which a run counts as failed")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.scan_steps, args.threads) < 1:
        parser.error("--rounds, --steps, --scan-steps and --threads take at least 1")
    if args.backend == "cpu" and (args.smoke or args.precision in ("tf32", "fp16") or args.batch == "largest"):
        parser.error("--smoke, --batch largest, tf32 and fp16 go with --backend cuda")
    if args.batch not in (None, "largest"):
        if not args.batch.isdigit() or int(args.batch) < 2:
            parser.error(f"--batch {args.batch}: expected a number from 2, or `largest`")
        args.batch = int(args.batch)
    # Where each side runs.
    args.on_gpu = args.backend == "cuda" and not args.smoke
    recipe, batch, image_size = MODELS[args.model]
    if args.on_gpu:
        batch, image_size = GPU_SIZES[args.model]
    if args.smoke and args.batch == "largest":
        args.batch = batch
    args.recipe, args.batch, args.image_size = recipe, args.batch or batch, args.image_size or image_size
    args.modes = args.modes.split(",") if args.modes else SCAN["cuda" if args.on_gpu else "cpu"]
    args.binary = args.binary.resolve()
    if not args.binary.exists():
        parser.error(f"no clip-host at {args.binary}\nhint: cargo build --release, or name it with --binary")
    if not (ROOT / recipe).exists():
        parser.error(f"there is no {recipe}")
    if shutil.which(args.python) is None:
        parser.error(f"--python: there is no {args.python}")
    return args


def busy_seconds() -> float | None:
    """Processor seconds that the whole machine has worked since it started."""
    try:
        with open("/proc/stat") as file:
            fields = [int(x) for x in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(command: list[str], environment: dict[str, str], timeout: int) -> dict:
    """Runs a side and returns its JSON, with `others`: processor seconds that other programs took meanwhile, as a
    share of this side's own."""
    machine, own = busy_seconds(), children_seconds()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"{' '.join(command)}\n{error}") from error
    own = children_seconds() - own
    line = done.stdout.strip().splitlines()[-1:] or [""]
    try:
        result = json.loads(line[0])
    except ValueError:
        result = None
    if done.returncode != 0 or not isinstance(result, dict):
        raise Failed(f"{' '.join(command)}\nexit status {done.returncode}\n{done.stderr[-2000:]}")
    after = busy_seconds()
    result["others"] = None if machine is None or after is None or own <= 0 else max(0.0, (after - machine) / own - 1)
    return result


def own_precision(args: argparse.Namespace) -> str:
    given = [text.partition("=")[2] for text in args.set if text.startswith("precision=")]
    return given[-1] if given else PRECISIONS[args.precision]


def ours(args: argparse.Namespace, batch: int, steps: int) -> dict:
    flags = ["--batch", batch, "--image-size", args.image_size, "--steps", steps]
    if args.on_gpu and args.precision != "tf32":
        flags += ["--backend", "cuda"]
    sets = [f"train.threads={args.threads}", *(s for s in args.set if not s.startswith("precision="))]
    sets.append(f"precision={own_precision(args)}")
    if args.on_gpu and args.precision == "tf32":
        sets.append("backend=Cuda(tf32: true)")
    if args.optimizer == "adamw" and not any(s.startswith("optimizer") for s in sets):
        sets += ["optimizer.plugin=adamw", "optimizer.config=()"]
    command = [args.binary, "bench", "step", args.recipe, "--synthetic", "--json", *flags]
    result = measure([str(c) for c in command] + [f"--set={s}" for s in sets], {}, args.timeout)
    return {**result, "on_gpu": args.on_gpu}


def theirs(args: argparse.Namespace, mode: str, batch: int | str, steps: int, cache: Path) -> dict:
    flags = ["--model", args.model, "--precision", args.precision, "--mode", mode, "--steps", steps]
    flags += ["--batch", batch, "--image-size", args.image_size, "--threads", args.threads]
    flags += ["--optimizer", args.optimizer, "--device", "cuda" if args.on_gpu else "cpu"]
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache / mode)}
    command = [args.python, HERE / "step.py", *flags]
    return measure([str(c) for c in command], environment, args.timeout)


def peaks(args: argparse.Namespace) -> dict:
    command = [args.python, HERE / "peak.py", "--device", "cuda" if args.on_gpu else "cpu"]
    return measure([str(c) for c in command], {}, args.timeout)


def largest(args: argparse.Namespace, cache: Path) -> tuple[int, dict]:
    """The largest batch that fits on both sides, and what was found of each: PyTorch's, then ours down from there."""
    found = theirs(args, "eager+nhwc", "largest", 2, cache)
    say(f"  PyTorch: {found['batch']} fits; tried {found['batches_tried']}")
    batch, tried = found["batch"], {}
    while batch >= 64:
        try:
            ours(args, batch, 1)
            tried[batch] = "fits"
            say(f"  clip-host: {batch} fits")
            return batch, {"pytorch": found["batch"], "pytorch_tried": found["batches_tried"], "clip_host_tried": tried}
        except Failed as error:
            tried[batch] = str(error)
            say(f"  clip-host: {batch} failed: {error}")
        batch = int(batch * 0.9) // 32 * 32
    raise Failed(f"clip-host runs no batch from 64 to {found['batch']}: {tried}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tell(name: str, result: dict) -> None:
    others = "" if result["others"] is None else f"   others {result['others']:4.0%}"
    say(f"  {name:28} {result['samples_per_second']:8.2f} samples/s{others}")


def compare(args: argparse.Namespace, cache: Path) -> dict:
    place = "GPU" if args.on_gpu else f"{args.threads} threads"
    say(f"{args.model} {args.precision}: batch {args.batch}, image size {args.image_size}, {place}")
    limits = None
    if args.backend == "cuda":
        say("peaks")
        limits = peaks(args)
    batch, found = args.batch, None
    if batch == "largest":
        say("largest batch")
        batch, found = largest(args, cache)
    scan, failed = {}, {}
    say("scan")
    for mode in args.modes:
        try:
            scan[mode] = theirs(args, mode, batch, args.scan_steps, cache)
            tell(mode, scan[mode])
        except Failed as error:
            failed[mode] = str(error)
            say(f"  {mode:28} failed: {error}")
    if not scan:
        raise Failed("no mode of PyTorch ran")
    best = max(scan, key=lambda mode: scan[mode]["samples_per_second"])

    runs = {"clip-host": [], best: []}
    for number in range(args.rounds):
        say(f"round {number + 1} of {args.rounds}")
        for name, results in runs.items():
            if name == "clip-host":
                results.append(ours(args, batch, args.steps))
            else:
                results.append(theirs(args, name, batch, args.steps, cache))
            tell(name, results[-1])
    params = {runs["clip-host"][0]["params"], runs[best][0]["params"]}
    if len(params) != 1:
        raise Failed(f"the two sides have different models: {sorted(params)} parameters")

    rows = [summary("clip-host", runs["clip-host"])]
    rows += [summary(mode, [scan[mode], *runs[best]] if mode == best else [scan[mode]]) for mode in scan]
    peer = next(row for row in rows if row["name"] == best)
    # The scan chose the mode: what it measured of it would favour that mode, so the medians are those of the rounds.
    peer.update(speed(runs[best]))
    gflop = runs["clip-host"][0]["gflop_per_step"] / batch
    for row in rows:
        row["gflops"] = gflop * row["samples_per_second"]
        row["share_of_gemm_peak"] = ratio(row["gflops"], limits and limits.get(f"gemm_{args.precision}_gflops"))
        row["study_minutes"] = STUDY_SAMPLES / row["samples_per_second"] / 60
    return {
        "model": args.model,
        "recipe": args.recipe,
        "backend": args.backend,
        "smoke": args.smoke,
        "precision": args.precision,
        "clip_host_precision": own_precision(args),
        "optimizer": args.optimizer,
        "batch": batch,
        "largest": found,
        "image_size": args.image_size,
        "threads": args.threads,
        "rounds": args.rounds,
        "steps": args.steps,
        "params": params.pop(),
        "gflop_per_sample": gflop,
        "torch": scan[best]["torch"],
        "gpu": scan[best].get("gpu"),
        "peaks": limits,
        "best_mode": best,
        "ratio": rows[0]["samples_per_second"] / peer["samples_per_second"],
        "ratio_of_best_rounds": rows[0]["best"] / peer["best"],
        "memory_ratio": ratio(rows[0]["peak_bytes"], peer["peak_bytes"]),
        "steps_memory_ratio": ratio(rows[0]["peak_bytes"], peer["steps_peak_bytes"]),
        "rows": rows,
        "failed": failed,
    }


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def speed(runs: list[dict]) -> dict:
    rates = [run["samples_per_second"] for run in runs]
    return {
        "samples_per_second": statistics.median(rates),
        "best": max(rates),
        "rounds": rates,
        "others": statistics.median(run["others"] or 0.0 for run in runs),
    }


def peak_bytes(run: dict) -> int | None:
    """The GPU's memory where one was used, else the process's. clip-host plans what it takes on a GPU ahead."""
    if "peak_device_bytes" in run:
        return run["peak_device_bytes"]
    if run.get("on_gpu"):
        return run["arena_bytes"] + run["persistent_bytes"]
    return run.get("peak_rss_bytes")


def summary(name: str, runs: list[dict]) -> dict:
    """One row of the table. Compiling is told by the first run, which finds an empty cache."""
    most = lambda values: max((value for value in values if value), default=None)
    first = runs[0]
    compiling = first["compile_ms"] / 1e3 if "compile_ms" in first else first["compile_seconds"]
    return {
        "name": name,
        **speed(runs),
        "peak_bytes": most(peak_bytes(run) for run in runs),
        "steps_peak_bytes": most(run.get("steps_peak_device_bytes", run.get("steps_peak_rss_bytes")) for run in runs),
        "compile_seconds": compiling,
    }


def table(result: dict) -> str:
    gib = lambda value: "-" if value is None else f"{value / GIB:.2f}"
    share = lambda value: "-" if value is None else f"{value:.0%}"
    of_gpu = lambda row: f"{share(row['share_of_gemm_peak']):>9}{row['study_minutes']:11.1f}"
    peaks = result["peaks"]
    place = result["gpu"] or f"{result['threads']} threads"
    lines = [
        f"{result['model']} {result['precision']}, batch {result['batch']}, image size {result['image_size']}, "
        f"{place}, {result['params']:,} parameters, torch {result['torch']}",
        f"{'':28}{'samples/s':>10}{'best':>9}{'ours ÷ it':>11}{'peak GiB':>10}{'in steps':>10}{'compile s':>11}"
        + (f"{'of peak':>9}{'study min':>11}" if peaks else f"{'others':>8}"),
    ]
    own = result["rows"][0]["samples_per_second"]
    for row in result["rows"]:
        mark = " *" if row["name"] == result["best_mode"] else ""
        against = "" if row["name"] == "clip-host" else f"{own / row['samples_per_second']:.2f}"
        lines.append(
            f"{row['name'] + mark:28}{row['samples_per_second']:10.2f}{row['best']:9.2f}{against:>11}"
            f"{gib(row['peak_bytes']):>10}{gib(row['steps_peak_bytes']):>10}{row['compile_seconds']:11.1f}"
            + (of_gpu(row) if peaks else f"{row['others']:8.0%}")
        )
    memory = lambda value: "-" if value is None else f"{value:.2f}"
    lines.append(
        f"ratio of medians {result['ratio']:.2f}, of best rounds {result['ratio_of_best_rounds']:.2f}; "
        f"memory {memory(result['memory_ratio'])}, against its steps alone {memory(result['steps_memory_ratio'])}"
    )
    lines.append("* took turns with clip-host; the other modes were run once")
    if result["precision"] != result["clip_host_precision"].lower():
        lines.append(f"clip-host's precision is {result['clip_host_precision']}")
    if peaks:
        products = [f"{k.split('_')[1]} {v / 1e3:.1f}" for k, v in peaks.items() if k.startswith("gemm_")]
        copies = f"{peaks['copy_gbytes_per_second']:.0f} GB/s"
        lines.append(
            f"measured peaks: products {', '.join(products)} TFLOP/s, copies {copies}; of peak: "
            f"{result['gflop_per_sample']:.1f} GFLOP a sample against the products of {result['precision']}"
        )
        lines.append("study min: 30 epochs of 100,000 pairs at this speed")
    if result["largest"]:
        lines.append(f"largest batch of PyTorch alone: {result['largest']['pytorch']}")
    if result["smoke"]:
        lines.append("a smoke test on the processor: no figure of a GPU")
    return "\n".join(lines)


def main() -> int:
    args = arguments()
    try:
        if args.inductor_cache:
            result = compare(args, args.inductor_cache.resolve())
        else:
            with tempfile.TemporaryDirectory(prefix="clip-host-peers-") as cache:
                result = compare(args, Path(cache))
    except Failed as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result) if args.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
