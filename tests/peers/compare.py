#!/usr/bin/env python3
"""clip-host and PyTorch on the same training step, in turn: A B A B. Needs Python's standard library alone.

    tests/peers/compare.py --python VENV/bin/python --model resnet50 --precision f32

`step.py` is the PyTorch side and runs under `--python`. First every mode is run once for a few steps, then the fastest
one and clip-host take turns, each run a process of its own, and the table gives the medians over the rounds.
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
# Those worth a scan; step.py knows more (`step.py --help`).
SCAN = ["eager", "eager+nhwc", "eager+nhwc+malloc", "compile", "compile+nhwc", "compile+nhwc+malloc"]
GIB = float(1 << 30)


class Failed(Exception):
    """A side did not answer with its line of JSON."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", choices=list(MODELS))
    parser.add_argument("--precision", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--python", default=sys.executable, help="a Python that has requirements.txt")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/clip-host")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="handed to clip-host")
    parser.add_argument("--modes", help=f"PyTorch's modes to scan, with commas [default: {','.join(SCAN)}]")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side after the scan")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run; two more come before")
    parser.add_argument("--scan-steps", type=int, default=3, help="timed steps of each mode in the scan")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--inductor-cache", type=Path, help="kept between calls; then compile seconds may be warm ones")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds after which a run counts as failed")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.scan_steps, args.threads) < 1:
        parser.error("--rounds, --steps, --scan-steps and --threads take at least 1")
    recipe, batch, image_size = MODELS[args.model]
    args.recipe, args.batch, args.image_size = recipe, args.batch or batch, args.image_size or image_size
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


def ours(args: argparse.Namespace, steps: int) -> dict:
    flags = ["--batch", args.batch, "--image-size", args.image_size, "--steps", steps]
    sets = [f"train.threads={args.threads}", *args.set]
    if args.precision == "bf16" and not any(s.startswith("precision=") for s in sets):
        sets.append("precision=Bf16")
    command = [args.binary, "bench", "step", args.recipe, "--synthetic", "--json", *flags]
    return measure([str(c) for c in command] + [f"--set={s}" for s in sets], {}, args.timeout)


def theirs(args: argparse.Namespace, mode: str, steps: int, cache: Path) -> dict:
    flags = ["--model", args.model, "--precision", args.precision, "--mode", mode, "--steps", steps]
    flags += ["--batch", args.batch, "--image-size", args.image_size, "--threads", args.threads]
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache / mode)}
    command = [args.python, HERE / "step.py", *flags]
    return measure([str(c) for c in command], environment, args.timeout)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tell(name: str, result: dict) -> None:
    others = "" if result["others"] is None else f"   others {result['others']:4.0%}"
    say(f"  {name:28} {result['samples_per_second']:8.2f} samples/s{others}")


def compare(args: argparse.Namespace, cache: Path) -> dict:
    modes = args.modes.split(",") if args.modes else SCAN
    say(f"{args.model} {args.precision}: batch {args.batch}, image size {args.image_size}, {args.threads} threads")
    scan, failed = {}, {}
    say("scan")
    for mode in modes:
        try:
            scan[mode] = theirs(args, mode, args.scan_steps, cache)
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
        for name, found in runs.items():
            found.append(ours(args, args.steps) if name == "clip-host" else theirs(args, name, args.steps, cache))
            tell(name, found[-1])
    params = {runs["clip-host"][0]["params"], runs[best][0]["params"]}
    if len(params) != 1:
        raise Failed(f"the two sides have different models: {sorted(params)} parameters")

    rows = [summary("clip-host", runs["clip-host"])]
    rows += [summary(mode, [scan[mode], *runs[best]] if mode == best else [scan[mode]]) for mode in scan]
    peer = next(row for row in rows if row["name"] == best)
    # The scan chose the mode: what it measured of it would favour that mode, so the medians are those of the rounds.
    peer.update(speed(runs[best]))
    return {
        "model": args.model,
        "recipe": args.recipe,
        "precision": args.precision,
        "batch": args.batch,
        "image_size": args.image_size,
        "threads": args.threads,
        "rounds": args.rounds,
        "steps": args.steps,
        "params": params.pop(),
        "torch": scan[best]["torch"],
        "best_mode": best,
        "ratio": rows[0]["samples_per_second"] / peer["samples_per_second"],
        "ratio_of_best_rounds": rows[0]["best"] / peer["best"],
        "memory_ratio": ratio(rows[0]["peak_rss_bytes"], peer["peak_rss_bytes"]),
        "steps_memory_ratio": ratio(rows[0]["peak_rss_bytes"], peer["steps_peak_rss_bytes"]),
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


def summary(name: str, runs: list[dict]) -> dict:
    """One row of the table. Compiling is told by the first run, which finds an empty cache."""
    most = lambda key: max((run[key] for run in runs if run.get(key)), default=None)
    first = runs[0]
    compiling = first["compile_ms"] / 1e3 if "compile_ms" in first else first["compile_seconds"]
    return {
        "name": name,
        **speed(runs),
        "peak_rss_bytes": most("peak_rss_bytes"),
        "steps_peak_rss_bytes": most("steps_peak_rss_bytes"),
        "compile_seconds": compiling,
    }


def table(result: dict) -> str:
    gib = lambda value: "-" if value is None else f"{value / GIB:.2f}"
    lines = [
        f"{result['model']} {result['precision']}, batch {result['batch']}, image size {result['image_size']}, "
        f"{result['threads']} threads, {result['params']:,} parameters, torch {result['torch']}",
        f"{'':28}{'samples/s':>10}{'best':>8}{'ours ÷ it':>11}{'peak GiB':>10}{'in steps':>10}{'compile s':>11}"
        f"{'others':>8}",
    ]
    own = result["rows"][0]["samples_per_second"]
    for row in result["rows"]:
        mark = " *" if row["name"] == result["best_mode"] else ""
        against = "" if row["name"] == "clip-host" else f"{own / row['samples_per_second']:.2f}"
        lines.append(
            f"{row['name'] + mark:28}{row['samples_per_second']:10.2f}{row['best']:8.2f}{against:>11}"
            f"{gib(row['peak_rss_bytes']):>10}{gib(row['steps_peak_rss_bytes']):>10}{row['compile_seconds']:11.1f}"
            f"{row['others']:8.0%}"
        )
    memory = lambda value: "-" if value is None else f"{value:.2f}"
    lines.append(
        f"ratio of medians {result['ratio']:.2f}, of best rounds {result['ratio_of_best_rounds']:.2f}; "
        f"memory {memory(result['memory_ratio'])}, against its steps alone {memory(result['steps_memory_ratio'])}"
    )
    lines.append("* took turns with clip-host; the other modes were run once")
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
