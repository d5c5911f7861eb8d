#!/usr/bin/env python3
"""One training step in PyTorch, timed: the peer of `clip-host bench step`. Prints one JSON line.

    python step.py --model resnet50 --precision bf16 --mode compile+nhwc --steps 10
    python step.py --device cuda --batch 128 --image-size 256 --precision bf16 --mode compile+nhwc+graphs
    python step.py --device cuda --batch largest --precision bf16 --mode eager+nhwc

A mode is `eager` or `compile`, followed by any of
    +nhwc       channels_last model and images
    +malloc     freed memory stays with the process, in huge pages (glibc's settings, no library; processor alone)
    +optimizer  the optimizer's step is compiled
    +autotune   torch.compile's mode max-autotune, without CUDA graphs
    +cpp        inductor's C++ wrapper: no Python between compiled kernels
    +math       attention as matmul, softmax, matmul instead of scaled_dot_product_attention
    +graphs     torch.compile's mode reduce-overhead: CUDA graphs of what it compiled
    +capture    forward, backward and update are captured as one CUDA graph, and replayed (GPU alone)
    +pixels     images come as bytes from pinned memory in every step, ahead of it, and are normalised on the device

On a GPU a step's time is that between CUDA events, the loss is read after the last step, and memory is that of
PyTorch's allocator. f32 keeps tf32 off; tf32 allows it for products and convolutions; fp16 scales its loss.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import sys
import time

OPTIONS = ["nhwc", "malloc", "optimizer", "autotune", "cpp", "math", "graphs", "capture", "pixels"]

# glibc maps blocks above 32 MB anew at every allocation and faults their pages in again; like this it keeps them.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
# Batches are multiples of this when the largest one is sought.
GRAIN = 32


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", choices=["resnet50", "vit_b32", "sample"])
    parser.add_argument("--precision", default="f32", choices=["f32", "tf32", "bf16", "fp16"])
    parser.add_argument("--mode", default="compile+nhwc")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--optimizer", default="radam", choices=["radam", "adamw"], help="adamw is PyTorch's fused one")
    parser.add_argument("--batch", help="default: the recipe's (16 for the two large models); `largest`: what fits")
    parser.add_argument("--image-size", type=int, help="default: the recipe's (224 for the two large models)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, help="steps before them, the first one compiles [default: 2; on a GPU 5]")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.base, *args.options = args.mode.split("+")
    unknown = [option for option in args.options if option not in OPTIONS]
    if args.base not in ("eager", "compile") or unknown:
        parser.error(f"mode {args.mode}: expected eager or compile, then any of +{' +'.join(OPTIONS)}")
    if args.device == "cpu" and "capture" in args.options:
        parser.error(f"mode {args.mode}: a CUDA graph needs --device cuda")
    if "capture" in args.options and (args.precision == "fp16" or "pixels" in args.options):
        parser.error(f"mode {args.mode}: a captured step has no loss scaling and no copies")
    if "optimizer" in args.options and args.precision == "fp16":
        parser.error(f"mode {args.mode}: with loss scaling the optimizer's step is not compiled")
    if "graphs" in args.options and (args.base == "eager" or "autotune" in args.options):
        parser.error(f"mode {args.mode}: graphs is one of torch.compile's modes, autotune another")
    if args.warmup is None:
        args.warmup = 5 if args.device == "cuda" else 2
    if args.steps < 1 or args.warmup < 1 or args.threads < 1:
        parser.error("--steps, --warmup and --threads take at least 1")
    if args.batch == "largest" and args.device == "cpu":
        parser.error("--batch largest needs --device cuda")
    if args.batch not in (None, "largest"):
        if not args.batch.isdigit() or int(args.batch) < 1:
            parser.error(f"--batch {args.batch}: expected a number or `largest`")
        args.batch = int(args.batch)
    return args


def restart_with(environment: dict[str, str]) -> None:
    """What the C library and OpenMP read when a process starts has to stand before it does."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})


class ProcessorClock:
    """Times of steps by the machine's clocks, memory as the system counts it."""

    def __init__(self) -> None:
        self.times, self.cpu_times, self.reset = [], [], False

    def begin(self) -> None:
        self.begun, self.cpu_begun = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self.times.append(time.perf_counter() - self.begun)
        self.cpu_times.append(time.process_time() - self.cpu_begun)

    def start_measuring(self) -> None:
        """Lets the kernel's high-water mark start anew: what compiling took is then not in the steps' peak."""
        self.times, self.cpu_times = [], []
        with contextlib.suppress(OSError):
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            self.reset = True

    def finish(self) -> dict:
        return {
            # Of all threads together: hardly moved by what else runs, where OMP_WAIT_POLICY=passive keeps them from
            # spinning.
            "cpu_ms": statistics.median(self.cpu_times) * 1e3,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "steps_peak_rss_bytes": high_water_bytes() if self.reset else None,
        }


def high_water_bytes() -> int | None:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


class DeviceClock:
    """Times of steps by events in the GPU's stream, memory as PyTorch's allocator counts it."""

    def __init__(self) -> None:
        self.peak = self.reserved = 0
        self.start_measuring()

    def begin(self) -> None:
        pass

    def end(self) -> None:
        self.events.append(self.event())

    def event(self):
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start_measuring(self) -> None:
        import torch

        torch.cuda.synchronize()
        self.remember()
        torch.cuda.reset_peak_memory_stats()
        self.begun = time.perf_counter()
        self.events = [self.event()]

    def remember(self) -> None:
        import torch

        self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())

    def finish(self) -> dict:
        import torch

        torch.cuda.synchronize()
        wall = time.perf_counter() - self.begun
        self.times = [a.elapsed_time(b) / 1e3 for a, b in zip(self.events, self.events[1:])]
        steps_peak = torch.cuda.max_memory_allocated()
        self.remember()
        return {
            "wall_step_ms": wall * 1e3 / len(self.times),
            "peak_device_bytes": self.peak,
            "reserved_device_bytes": self.reserved,
            "steps_peak_device_bytes": steps_peak,
            "gpu": torch.cuda.get_device_name(),
        }


class Step:
    """The model, its loss and its optimizer at one batch size, and a call for one training step."""

    def __init__(self, args: argparse.Namespace, size: int) -> None:
        import torch

        from isogclr import IsogClr
        from models import SPECS, Batch, TwoTowers

        torch.manual_seed(0)
        spec, options, device = SPECS[args.model], args.options, torch.device(args.device)
        layout = torch.channels_last if "nhwc" in options else torch.contiguous_format
        self.batch = Batch(spec, size, args.image_size or spec.image_size, device, layout, "pixels" in options)
        self.model = TwoTowers(spec, "eager" if "math" in options else "sdpa").train().to(device, memory_format=layout)
        criterion = IsogClr(spec.loss, self.batch.dataset_size).to(device)
        self.optimizer = make_optimizer(args, spec, self.model)
        self.scaler = torch.amp.GradScaler(args.device) if args.precision == "fp16" else None
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)

        def forward(pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            batch = self.batch
            with torch.autocast(args.device, dtype, enabled=dtype is not None):
                images, texts = self.model(batch.normalised(pixels), batch.input_ids, batch.attention_mask)
            return criterion(images, texts, ids, ids, 0)

        self.update = self.optimizer.step if self.scaler is None else self.scaled_update
        if "cpp" in options:
            import torch._inductor.config

            torch._inductor.config.cpp_wrapper = True
        mode = "max-autotune-no-cudagraphs" if "autotune" in options else None
        self.forward = forward
        if args.base == "compile":
            self.forward = torch.compile(forward, mode="reduce-overhead" if "graphs" in options else mode)
        if "optimizer" in options:
            self.update = torch.compile(lambda: self.optimizer.step(), mode=mode)
        self.graphs, self.graph = "graphs" in options, None
        if "capture" in options:
            self.capture()

    def scaled_update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def work(self, ids):
        if self.graphs:
            import torch

            torch.compiler.cudagraph_mark_step_begin()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward(self.batch.fetch(), ids)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.update()
        return loss

    def capture(self) -> None:
        import torch

        self.ids = self.batch.ids(0)
        # Allocations and the choice of algorithms come before what is captured, on another stream than the default one.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.work(self.ids)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.work(self.ids)

    def __call__(self, number: int):
        """Answers with the loss, on the device."""
        if self.graph is None:
            return self.work(self.batch.ids(number)).detach()
        self.ids.copy_(self.batch.ids(number))
        self.graph.replay()
        return self.loss


def make_optimizer(args: argparse.Namespace, spec, model):
    import torch

    from models import parameter_groups

    groups = parameter_groups(model, spec.weight_decay)
    # Else the step counts are Python numbers: each is compiled again, and a captured one stays what it was.
    capturable = "optimizer" in args.options or "capture" in args.options
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=1e-8, fused=True, capturable=capturable)
    return torch.optim.RAdam(
        groups,
        lr=spec.lr,
        betas=spec.betas,
        eps=1e-8,
        decoupled_weight_decay=True,
        foreach=True,
        capturable=capturable,
    )


def largest_batch(args: argparse.Namespace) -> tuple[int, dict[int, str]]:
    """The largest multiple of 32 whose step fits the GPU, and what became of each batch that was tried.

    Memory grows with the batch in a line: two small batches tell where it ends, and batches around there are tried."""
    import gc

    import torch

    total = torch.cuda.mem_get_info()[1]
    found: dict[int, str] = {}

    def tried(size: int) -> int | None:
        step = None
        try:
            torch.cuda.reset_peak_memory_stats()
            step = Step(args, size)
            for number in range(2):
                loss = step(number)
            loss.item()
            peak = torch.cuda.max_memory_reserved()
            found[size] = f"{peak / (1 << 30):.1f} GiB"
            return peak
        except torch.cuda.OutOfMemoryError:
            found[size] = "does not fit"
            return None
        finally:
            del step
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()

    small, peaks = 2 * GRAIN, []
    for size in (small, 2 * small):
        peak = tried(size)
        if peak is None:
            return (small if peaks else 0), found
        peaks.append(peak)
    slope = max(1, peaks[1] - peaks[0]) / small
    guess = int((0.97 * total - peaks[1]) / slope) + 2 * small
    fits, size = 2 * small, max(2 * small, guess // GRAIN * GRAIN)
    for _ in range(4):
        if size <= fits:
            break
        if tried(size) is not None:
            fits = size
            break
        size = int(size * 0.94) // GRAIN * GRAIN
    return fits, found


def set_precision(args: argparse.Namespace) -> None:
    """tf32 only where it is asked for: PyTorch allows it for convolutions by default."""
    import torch

    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    if args.device == "cuda":
        torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
        # Convolutions measured once: shapes never change.
        torch.backends.cudnn.benchmark = True


def run(args: argparse.Namespace) -> dict:
    import torch

    from models import SPECS, parameter_count

    size, tried = args.batch or SPECS[args.model].batch, None
    if size == "largest":
        size, tried = largest_batch(args)
        if size == 0:
            raise SystemExit(f"error: a batch of {2 * GRAIN} does not fit the GPU")
    on_gpu = args.device == "cuda"
    clock = DeviceClock() if on_gpu else ProcessorClock()
    begun = time.perf_counter()
    step = Step(args, size)
    prepared = time.perf_counter() - begun if "capture" in args.options else 0.0
    first, value = 0.0, 0.0
    for number in range(args.warmup + args.steps):
        if number == args.warmup:
            clock.start_measuring()
        begun = time.perf_counter()
        clock.begin()
        loss = step(number)
        # On a GPU nothing waits for the loss, as in a loop that logs now and then.
        if not on_gpu or number in (0, args.warmup + args.steps - 1):
            value = loss.item()
        clock.end()
        first = time.perf_counter() - begun if number == 0 else first
    measured = clock.finish()
    median = statistics.median(clock.times)
    compiled = args.base == "compile" or "optimizer" in args.options or "capture" in args.options
    return {
        "model": args.model,
        "precision": args.precision,
        "mode": args.mode,
        "device": args.device,
        "optimizer": args.optimizer,
        "samples_per_second": size / median,
        "step_ms": median * 1e3,
        "step_times_ms": [round(t * 1e3, 3) for t in clock.times],
        **measured,
        "compile_seconds": max(0.0, prepared + first - median) if compiled else 0.0,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batch": size,
        "batches_tried": tried,
        "image_size": step.batch.image_size,
        "params": parameter_count(step.model),
        "loss": value,
    }


def main() -> None:
    args = arguments()
    environment = {"OMP_NUM_THREADS": str(args.threads)}
    if "malloc" in args.options:
        environment |= MALLOC
    if "math" in args.options:
        environment["TIMM_FUSED_ATTN"] = "0"
    if args.device == "cuda" and not {"graphs", "capture"} & set(args.options):
        # Blocks that grow instead of blocks of fixed sizes: more of the memory is of use.
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    restart_with(environment)

    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: PyTorch sees no GPU\nhint: `nvidia-smi` shows what the driver sees")
    torch.set_num_threads(args.threads)
    # Before the first parallel region: OpenMP's threads take it over from the one that starts them.
    torch.set_flush_denormal(True)
    set_precision(args)
    print(json.dumps(run(args)))


if __name__ == "__main__":
    main()
