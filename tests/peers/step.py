#!/usr/bin/env python3
"""One training step in PyTorch, timed: the peer of `clip-host bench step`. Prints one JSON line.

    python step.py --model resnet50 --precision bf16 --mode compile+nhwc --steps 10

A mode is `eager` or `compile`, followed by any of
    +nhwc       channels_last model and images
    +malloc     freed memory stays with the process, in huge pages (glibc's settings, no library)
    +optimizer  the optimizer's step is compiled
    +autotune   torch.compile's mode max-autotune (CPU GEMM templates)
    +cpp        inductor's C++ wrapper: no Python between compiled kernels
    +math       attention as matmul, softmax, matmul instead of scaled_dot_product_attention
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time

OPTIONS = ["nhwc", "malloc", "optimizer", "autotune", "cpp", "math"]

# glibc maps blocks above 32 MB anew at every allocation and faults their pages in again; like this it keeps them.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", choices=["resnet50", "vit_b32", "sample"])
    parser.add_argument("--precision", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--mode", default="compile+nhwc")
    parser.add_argument("--batch", type=int, help="default: the recipe's (16 for the two large models)")
    parser.add_argument("--image-size", type=int, help="default: the recipe's (224 for the two large models)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them; the first one compiles")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.base, *args.options = args.mode.split("+")
    unknown = [option for option in args.options if option not in OPTIONS]
    if args.base not in ("eager", "compile") or unknown:
        parser.error(f"mode {args.mode}: expected eager or compile, then any of +{' +'.join(OPTIONS)}")
    if args.steps < 1 or args.warmup < 1 or args.threads < 1:
        parser.error("--steps, --warmup and --threads take at least 1")
    return args


def restart_with(environment: dict[str, str]) -> None:
    """What the C library and OpenMP read when a process starts has to stand before it does."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> bool:
    """Lets the kernel's high-water mark start anew: what compiling took is then not in the steps' peak."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return True
    except OSError:
        return False


def high_water_bytes() -> int | None:
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


def main() -> None:
    args = arguments()
    environment = {"OMP_NUM_THREADS": str(args.threads)}
    if "malloc" in args.options:
        environment |= MALLOC
    if "math" in args.options:
        environment["TIMM_FUSED_ATTN"] = "0"
    restart_with(environment)

    import torch

    from isogclr import IsogClr
    from models import SPECS, Batch, TwoTowers, parameter_count, parameter_groups

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    # Before the first parallel region: OpenMP's threads take it over from the one that starts them.
    torch.set_flush_denormal(True)

    spec = SPECS[args.model]
    batch = Batch(spec, args.batch or spec.batch, args.image_size or spec.image_size)
    model = TwoTowers(spec, "eager" if "math" in args.options else "sdpa").train()
    if "nhwc" in args.options:
        model = model.to(memory_format=torch.channels_last)
        batch.images = batch.images.contiguous(memory_format=torch.channels_last)
    criterion = IsogClr(spec.loss, batch.dataset_size)
    optimizer = torch.optim.RAdam(
        parameter_groups(model, spec.weight_decay),
        lr=spec.lr,
        betas=spec.betas,
        eps=1e-8,
        decoupled_weight_decay=True,
        foreach=True,
        # Without it the step counts become Python numbers, for each of which the step is compiled again.
        capturable="optimizer" in args.options,
    )

    def forward(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            images, texts = model(batch.images, batch.input_ids, batch.attention_mask)
        return criterion(images, texts, ids, ids, 0)

    update = optimizer.step
    if "cpp" in args.options:
        import torch._inductor.config

        torch._inductor.config.cpp_wrapper = True
    compile_mode = "max-autotune-no-cudagraphs" if "autotune" in args.options else None
    if args.base == "compile":
        forward = torch.compile(forward, mode=compile_mode)
    if "optimizer" in args.options:
        update = torch.compile(lambda: optimizer.step(), mode=compile_mode)

    compiled = args.base == "compile" or "optimizer" in args.options
    times, cpu_times, first, reset = [], [], 0.0, False
    for step in range(args.warmup + args.steps):
        begun, cpu_begun = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss = forward(batch.ids(step))
        loss.backward()
        update()
        value = loss.item()
        elapsed, cpu = time.perf_counter() - begun, time.process_time() - cpu_begun
        first = elapsed if step == 0 else first
        if step >= args.warmup:
            times.append(elapsed)
            cpu_times.append(cpu)
        elif step == args.warmup - 1:
            reset = reset_peak()

    median = statistics.median(times)
    print(
        json.dumps(
            {
                "model": args.model,
                "precision": args.precision,
                "mode": args.mode,
                "samples_per_second": batch.size / median,
                "step_ms": median * 1e3,
                "step_times_ms": [round(t * 1e3, 3) for t in times],
                # Of all threads together: hardly moved by what else runs, where OMP_WAIT_POLICY=passive keeps them from
                # spinning.
                "cpu_ms": statistics.median(cpu_times) * 1e3,
                "peak_rss_bytes": peak_rss_bytes(),
                "steps_peak_rss_bytes": high_water_bytes() if reset else None,
                "compile_seconds": max(0.0, first - median) if compiled else 0.0,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "batch": batch.size,
                "image_size": batch.image_size,
                "params": parameter_count(model),
                "loss": value,
            }
        )
    )


if __name__ == "__main__":
    main()
