#!/usr/bin/env python3
"""All that needs a GPU, on a machine where nothing is built. Needs Python's standard library alone.

    tests/gpu/run.py pack                       # where the project is built: target/gpu-pack/pack.tar.xz
    tests/gpu/run.py run --out target/gpu-run   # where the GPU is, with that file: all stages, under 10 minutes
    tests/gpu/run.py run --stages environment,driver,golden
    tests/gpu/run.py stages

`pack` builds the program, the first-party plugins and the tests of `TESTS`, strips them, and puts them into one file
with recipes, sample data and golden numbers (`--bare`: without what the repository has anyway; `run` then takes it from
the repository that this file lies in). `run` unpacks it and goes through the stages: each has a time limit, a failed
one does not keep the next from running, and one that needs a GPU is skipped without one, which the table at the end
tells from having passed. The exit status is 1 if a stage failed. In the folder `--out` are `summary.json` with all figures,
`log.txt` with all that was printed, and the trace of the profiled steps.

`--smoke` tries the stages on the processor: no figure of it is one of a GPU.
"""

import argparse
import ctypes
import gzip
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent.parent
PACK = ROOT / "target/gpu-pack/pack.tar.xz"
# Tests that run on the GPU, by stage: package, test, threads (one where a test has the GPU to itself).
TESTS = {
    "driver": [("clip-host-cuda-driver", "compile", 4), ("clip-host-cuda-driver", "gpu", 1)],
    "kernels": [
        ("clip-host-cuda", "single_ops", 1),
        ("clip-host-cuda", "programs", 1),
        ("clip-host-cuda", "precision", 1),
        ("clip-host-cuda", "update", 1),
        ("clip-host-cuda", "halves", 1),
        ("clip-host-cuda", "random_graphs", 1),
    ],
    "golden": [("clip-host-tests", "replay", 8)],
}
# What `run` reads besides what was built.
FILES = ["recipes", "data/sample", "tests/golden", "tests/peers"]
# ResNet-50 at 256 pixels with DistilBERT.
BENCH = ["recipes/cc3m/isogclr_radam.ron", "--synthetic", "--image-size", "256", "--batch", "128"]
SAMPLE = "recipes/isogclr_radam.ron"
# Percent of recall that the sample's runs on the CPU and on the GPU may be apart.
RECALL_POINTS = 1.0
LIBRARIES = ["libnvrtc.so", "libcublas.so", "libcublasLt.so", "libcudnn.so"]


# ---------------------------------------------------------------------------------------------------------------- pack


def pack(args: argparse.Namespace) -> int:
    environment = {**os.environ, **({"CARGO_TARGET_DIR": str(args.target)} if args.target else {})}
    cargo = ["cargo", "build", "--release", "--message-format=json"]
    built = executables(cargo + ["--workspace"], environment)
    program = next(path for name, kind, path in built if (name, kind) == ("clip-host", "bin"))
    plugins = [path for _, kind, path in built if kind == "cdylib"]
    chosen = []
    for package in dict.fromkeys(package for tests in TESTS.values() for package, _, _ in tests):
        wanted = [name for tests in TESTS.values() for of, name, _ in tests if of == package]
        flags = [flag for name in wanted for flag in ("--test", name)]
        command = ["cargo", "test", "--release", "--no-run", "--message-format=json", "-p", package, *flags]
        found = {name: path for name, kind, path in executables(command, environment) if kind == "test"}
        chosen += [(f"{package}-{name}", found[name]) for name in wanted]

    with tempfile.TemporaryDirectory(prefix="clip-host-gpu-pack-") as folder:
        stage = Path(folder)
        strip(program, stage / "bin/clip-host", "--strip-all")
        for plugin in plugins:
            strip(plugin, stage / "bin" / plugin.name, "--strip-unneeded")
        for name, path in chosen:
            # Tests find the folder that they may write to from a place such as this.
            strip(path, stage / "target/release/deps" / name, "--strip-all")
        if not args.bare:
            for name in FILES:
                shutil.copytree(ROOT / name, stage / name, ignore=shutil.ignore_patterns("__pycache__"))
        binaries = [path for path in stage.rglob("*") if path.is_file() and path.parent.name in ("bin", "deps")]
        manifest = {
            "commit": text_of(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip(),
            "changed": bool(text_of(["git", "-C", str(ROOT), "status", "--porcelain"]).strip()),
            "bare": args.bare,
            "machine": platform.machine(),
            "glibc": newest_glibc(binaries),
        }
        (stage / "manifest.json").write_text(json.dumps(manifest))
        args.file.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(args.file, "w:xz", preset=6) as archive:
            archive.add(stage, arcname=".")
    print(f"{args.file}: {args.file.stat().st_size / (1 << 20):.1f} MiB, {len(plugins)} plugins, {len(chosen)} tests;")
    print(f"runs on {manifest['machine']} Linux with glibc {manifest['glibc']} or newer")
    return 0


def executables(command: list[str], environment: dict[str, str]) -> list[tuple[str, str, Path]]:
    """Name, kind and file of everything that a cargo command made."""
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        for message in map(json.loads, filter(None, done.stdout.splitlines())):
            if message.get("reason") == "compiler-message":
                print(message["message"].get("rendered"), file=sys.stderr)
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}")
    found = []
    for message in map(json.loads, filter(None, done.stdout.splitlines())):
        if message.get("reason") != "compiler-artifact":
            continue
        target = message["target"]
        kind = "test" if message["profile"]["test"] else target["kind"][0]
        if "cdylib" in target["kind"] and kind != "test":
            files = [Path(file) for file in message["filenames"] if file.endswith(".so")]
            found += [(target["name"], "cdylib", file) for file in files]
        elif message.get("executable"):
            found.append((target["name"], kind, Path(message["executable"])))
    return found


def strip(source: Path, target: Path, how: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["strip", how, "-o", str(target), str(source)], check=True)


def text_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def newest_glibc(files: list[Path]) -> str:
    """The newest version of a symbol that the files need of the C library."""
    versions = {"2.0"}
    for file in files:
        versions.update(re.findall(r"GLIBC_(\d+(?:\.\d+)+)", text_of(["objdump", "-T", str(file)])))
    return max(versions, key=version)


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


# ----------------------------------------------------------------------------------------------------------------- run


class Skipped(Exception):
    """What a stage needs is not there."""


class Failed(Exception):
    """What a stage looks at is not as it should be."""


@dataclass
class Started:
    """A process and what it prints."""

    process: subprocess.Popen
    out: IO[bytes]
    err: IO[bytes]


@dataclass
class Run:
    """What the stages share."""

    args: argparse.Namespace
    root: Path
    bin: Path
    work: Path
    log: Path
    gpu: bool
    libraries: list[str]
    ends: float
    results: dict[str, object] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        return "cpu" if self.args.smoke else "cuda"

    def need_gpu(self) -> None:
        if not self.gpu and not self.args.smoke:
            raise Skipped("no GPU here")

    def write(self, text: str) -> None:
        with self.log.open("a") as file:
            file.write(text)

    def start(self, command: list) -> Started:
        self.write(f"\n$ {' '.join(map(str, command))}\n")
        own = {
            "CLIP_HOST_CUDA_PATH": ":".join(self.libraries),
            "CLIP_HOST_TEST_PROGRAM": str(self.bin / "clip-host"),
            "CLIP_HOST_TEST_ROOT": str(self.root),
            "CLIP_HOST_TEST_BACKEND": self.backend,
        }
        # Files and not pipes: nobody reads while two of them run.
        out, err = tempfile.TemporaryFile(dir=self.work), tempfile.TemporaryFile(dir=self.work)
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=self.root,
            env={**os.environ, **own},
            stdout=out,
            stderr=err,
            # So that what it starts can be ended with it.
            start_new_session=True,
        )
        return Started(process, out, err)

    def finish(self, started: Started, check: bool = True) -> tuple[int, str, str]:
        process, in_time = started.process, True
        try:
            process.wait(timeout=max(1.0, self.ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            in_time = False
        texts = []
        for file in (started.out, started.err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        out, err = texts
        self.write(out[-1_000_000:] + err[-200_000:])
        if not in_time:
            raise Failed("its time was up")
        if check and process.returncode != 0:
            lines = [line for line in (err or out).strip().splitlines() if line.strip()]
            said = next((line for line in lines if line.startswith("error")), lines[-1] if lines else "nothing")
            raise Failed(f"exit status {process.returncode}: {said[:160]}")
        return process.returncode, out, err

    def call(self, command: list, check: bool = True) -> tuple[int, str, str]:
        return self.finish(self.start(command), check)

    def tests(self, stage: str) -> str:
        """Runs the test programs of a stage, all of them, and tells how many tests there were."""
        passed = skipped = 0
        wrong: list[str] = []
        for package, name, threads in TESTS[stage]:
            program = self.work / "target/release/deps" / f"{package}-{name}"
            try:
                _, out, err = self.call([program, "--nocapture", f"--test-threads={threads}"], check=False)
            except Failed as reason:
                wrong.append(f"{name}: {reason}")
                continue
            counts = re.search(r"test result: .*? (\d+) passed; (\d+) failed", out)
            if counts is None:
                last = [line for line in (err + out).strip().splitlines() if line.strip()][-1:]
                wrong.append(f"{name} ended without a result: {' '.join(last)[:120]}")
                continue
            # Where what it needs is missing, a test says so and passes.
            without = len(set(re.findall(r"(\S+): SKIPPED", out)))
            if re.search(r"^skipped: ", err, re.MULTILINE):
                without = int(counts[1])
            passed, skipped = passed + int(counts[1]) - without, skipped + without
            if counts[2] != "0":
                failed = re.findall(r"^test (\S+) \.\.\. .*FAILED$", out, re.MULTILINE)
                failed = failed or re.findall(r"^    (\S+)$", out, re.MULTILINE)
                wrong.append(f"{counts[2]} of {name}: {', '.join(dict.fromkeys(failed))[:160]}")
        self.results[stage] = {"passed": passed, "skipped": skipped, "failed": wrong}
        if wrong:
            raise Failed(f"{'; '.join(wrong)}; {passed} passed")
        if skipped:
            raise Skipped(f"{skipped} tests had no GPU or no library; {passed} passed")
        return f"{passed} tests passed"


def environment(run: Run) -> str:
    """What is there."""
    found = {
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "glibc": platform.libc_ver()[1],
        "cores": os.cpu_count(),
        "CLIP_HOST_CUDA_PATH": run.libraries,
        "libraries": {
            name: sorted({path.name for folder in run.libraries for path in Path(folder).glob(f"{name}.*")})
            for name in LIBRARIES
        },
        "pack": json.loads((run.work / "manifest.json").read_text()),
    }
    run.results["environment"] = found
    if shutil.which("nvidia-smi"):
        run.call(["nvidia-smi"], check=False)
        query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
        _, out, _ = run.call(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], check=False)
        found["gpu"] = out.strip()
    versions = "import torch, timm, transformers; print(*(m.__version__ for m in (torch, timm, transformers)))"
    _, out, _ = run.call([run.args.python, "-c", versions], check=False)
    found["torch, timm, transformers"] = out.strip() or "not all of them are there"
    if version(found["glibc"] or "99") < version(found["pack"]["glibc"]):
        raise Failed(f"expected glibc {found['pack']['glibc']} or newer, got {found['glibc']}")
    run.write(json.dumps(found, indent=2) + "\n")
    run.call([run.bin / "clip-host", "plugins", "list"])
    run.need_gpu()
    return found.get("gpu") or "the processor"


def driver(run: Run) -> str:
    """The driver's tests: memory, copies, kernels, events, graphs, NVRTC."""
    return run.tests("driver")


def kernels(run: Run) -> str:
    """Single ops, programs, precisions, updates and random graphs on the GPU, against the reference interpreter."""
    run.need_gpu()
    return run.tests("kernels")


def golden(run: Run) -> str:
    """The golden encoders, losses and optimizers, replayed on the GPU."""
    run.need_gpu()
    return run.tests("golden")


def sample(run: Run) -> str:
    """The sample recipe on the GPU and on the CPU, side by side: both end with the same recall."""
    run.need_gpu()
    backends = {"gpu": "Cpu" if run.args.smoke else "Cuda(device: 0)", "cpu": "Cpu"}
    more = ["--epochs", "1", "--steps", "10"] if run.args.smoke else []
    started = {}
    for name, backend in backends.items():
        out = run.work / f"sample-{name}"
        flags = ["--set", f"backend={backend}", "--out", out, "--json", *more]
        started[name] = run.start([run.bin / "clip-host", "run", SAMPLE, *flags])
    found, wrong = {}, []
    for name, process in started.items():
        try:
            _, out, _ = run.finish(process)
            found[name] = json.loads(out.strip().splitlines()[-1])
        except (Failed, ValueError, IndexError) as error:
            wrong.append(f"{name}: {error}")
    run.results["sample"] = found
    if wrong:
        raise Failed("; ".join(wrong))
    recall = {name: 100 * summary["metrics"]["mean_recall"] for name, summary in found.items()}
    speeds = " and ".join(f"{found[name]['samples_per_second']:.0f} samples/s ({name})" for name in found)
    told = f"mean recall {recall['gpu']:.2f} on the GPU, {recall['cpu']:.2f} on the CPU; {speeds}"
    if not abs(recall["gpu"] - recall["cpu"]) <= RECALL_POINTS:
        raise Failed(f"{told}: more than {RECALL_POINTS} apart")
    return told


def profile(run: Run) -> str:
    """Steps of ResNet-50 + DistilBERT, kernel by kernel."""
    run.need_gpu()
    trace = run.args.out / "trace.json"
    flags = ["--backend", run.backend, "--set", "precision=Bf16", "--profile", trace, "--json"]
    bench = [SAMPLE, "--synthetic", "--steps", "2"] if run.args.smoke else [*BENCH, "--steps", "10"]
    _, out, _ = run.call([run.bin / "clip-host", "bench", "step", *bench, *flags])
    result = json.loads(out.strip().splitlines()[-1])
    run.results["profile"] = result
    with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    trace.unlink()
    speed = f"{result['samples_per_second']:.1f} samples/s"
    return f"{speed} while measured, step {result['step_ms']:.1f} ms; trace.json.gz"


def compared(run: Run, name: str, batch: str, modes: str, rounds: int) -> str:
    run.need_gpu()
    command = [run.args.python, run.root / "tests/peers/compare.py", "--python", run.args.python, "--backend", "cuda"]
    command += ["--binary", run.bin / "clip-host", "--precision", run.args.precision, "--rounds", rounds, "--json"]
    if run.args.smoke:
        command += ["--smoke", "--model", "sample", "--batch", "8", "--modes", "eager", "--steps", "1"]
        command += ["--scan-steps", "1"]
    else:
        command += ["--batch", batch, "--modes", run.args.modes or modes, "--steps", "20", "--scan-steps", "10"]
    _, out, _ = run.call(command)
    result = json.loads(out.strip().splitlines()[-1])
    run.results[name] = result
    rows = {row["name"]: row for row in result["rows"]}
    own, peer = rows["clip-host"], rows[result["best_mode"]]
    return (
        f"batch {result['batch']}: {own['samples_per_second']:.1f} samples/s, PyTorch {peer['samples_per_second']:.1f} "
        f"({result['best_mode']}): {result['ratio']:.2f}x; 30 epochs of 100k: {own['study_minutes']:.1f} min"
    )


def bench(run: Run) -> str:
    """Batch 128 beside PyTorch."""
    return compared(run, "bench", "128", "eager+nhwc+capture,compile+nhwc+graphs", 2)


def largest(run: Run) -> str:
    """The largest batch that fits, beside PyTorch."""
    return compared(run, "largest", "largest", "compile+nhwc", 1)


# In order, with the seconds that each may take.
STAGES: dict[str, tuple[Callable[[Run], str], int]] = {
    "environment": (environment, 40),
    "driver": (driver, 60),
    "kernels": (kernels, 150),
    "golden": (golden, 90),
    "sample": (sample, 120),
    "profile": (profile, 60),
    "bench": (bench, 300),
    "largest": (largest, 240),
}


def go_through(args: argparse.Namespace) -> int:
    begun = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    log = args.out / "log.txt"
    log.unlink(missing_ok=True)
    work = Path(tempfile.mkdtemp(prefix="clip-host-gpu-"))
    with tarfile.open(args.file) as archive:
        archive.extractall(work, filter="data")
    bare = json.loads((work / "manifest.json").read_text())["bare"]
    root = ROOT if bare else work
    run = Run(args, root, work / "bin", work, log, has_gpu(), library_folders(args.python), begun)
    rows = []
    for name in args.stages:
        stage, seconds = STAGES[name]
        start = time.monotonic()
        run.ends = min(start + seconds, begun + args.total)
        print(f"{name} ...", file=sys.stderr, flush=True)
        run.write(f"\n==== {name}: {stage.__doc__}\n")
        try:
            if run.ends - start < 5:
                raise Failed("not run: the time of all stages was up")
            status, note = "pass", stage(run)
        except Skipped as reason:
            status, note = "skip", str(reason)
        except Failed as reason:
            status, note = "FAIL", str(reason)
        except Exception as error:  # A stage that breaks is a failed one: the next ones still run.
            status, note = "FAIL", f"{type(error).__name__}: {error}"
        took = time.monotonic() - start
        rows.append({"stage": name, "status": status, "seconds": round(took, 1), "note": note})
        print(f"{name}: {status} ({took:.0f} s) {note}", file=sys.stderr, flush=True)
        summary = {"rows": rows, "smoke": args.smoke, "results": run.results}
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1))
    shutil.rmtree(work, ignore_errors=True)
    table = [f"{'stage':12} {'':5} {'s':>5}  result"]
    table += [f"{row['stage']:12} {row['status']:5} {row['seconds']:5.0f}  {row['note']}" for row in rows]
    if args.smoke:
        table.append("a smoke test on the processor: no figure of a GPU")
    run.write("\n" + "\n".join(table) + "\n")
    print("\n".join(table), flush=True)
    return 1 if any(row["status"] == "FAIL" for row in rows) else 0


def has_gpu() -> bool:
    """Whether the driver counts a device."""
    for name in ["libcuda.so.1", "/usr/local/nvidia/lib64/libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"]:
        try:
            cuda = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0:
            return True
    return False


def library_folders(python: str) -> list[str]:
    """Folders with CUDA's libraries: those given, those of Python's wheels, the toolkit's, the driver's."""
    folders = [Path(p) for p in os.environ.get("CLIP_HOST_CUDA_PATH", "").split(":") if p]
    places = text_of([python, "-c", "import sys; print(*sys.path, sep='\\n')"]).splitlines()
    for place in filter(None, places):
        folders += sorted(Path(place).glob("nvidia/*/lib"))
    folders += [Path("/usr/local/cuda/lib64"), Path("/usr/local/nvidia/lib64")]
    return list(dict.fromkeys(str(folder) for folder in folders if folder.is_dir()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="build all and put it into one file")
    packing.add_argument("--bare", action="store_true", help="without recipes, data, golden numbers and scripts")
    packing.add_argument("--target", type=Path, help="cargo's target folder")
    packing.add_argument("--file", type=Path, default=PACK)
    running = commands.add_parser("run", help="go through the stages with a packed file")
    running.add_argument("--file", type=Path, default=PACK)
    running.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "target/gpu-run")))
    running.add_argument("--stages", default=",".join(STAGES), help=f"with commas [default: {','.join(STAGES)}]")
    running.add_argument("--total", type=int, default=580, help="seconds that all stages may take together")
    running.add_argument("--python", default=sys.executable, help="a Python with torch, timm and transformers")
    precisions = ["f32", "tf32", "bf16", "fp16"]
    running.add_argument("--precision", default="bf16", choices=precisions, help="of the benchmark")
    running.add_argument("--modes", help="PyTorch's modes in the benchmark, with commas")
    running.add_argument("--smoke", action="store_true", help="on the processor instead of a GPU")
    commands.add_parser("stages", help="list them")
    args = parser.parse_args()
    if args.command == "pack":
        return pack(args)
    if args.command == "stages":
        for name, (stage, seconds) in STAGES.items():
            print(f"{name:12} {seconds:4} s  {stage.__doc__}")
        return 0
    args.stages = args.stages.split(",")
    unknown = [name for name in args.stages if name not in STAGES]
    if unknown:
        parser.error(f"--stages {','.join(unknown)}: expected some of {','.join(STAGES)}")
    if not args.file.is_file():
        parser.error(f"there is no {args.file}\nhint: `tests/gpu/run.py pack` makes it where the project is built")
    if shutil.which(args.python) is None:
        parser.error(f"--python: there is no {args.python}")
    return go_through(args)


if __name__ == "__main__":
    sys.exit(main())
