#!/usr/bin/env python3
"""What PyTorch gets out of the machine at most, as one JSON line: products of two 8192 × 8192 matrices of random
numbers (on a processor of 1024 × 1024) by type, and copies within its memory (bytes read plus bytes written). Each
figure is the fastest of several runs.

    python peak.py --device cuda
"""

import argparse
import json
import time


def fastest(work, device: str, seconds: float) -> float:
    """Seconds of the fastest of at least five calls, after two that are not counted."""
    import torch

    best, end = float("inf"), None
    for number in range(10_000):
        if device == "cuda":
            begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            done.record()
            torch.cuda.synchronize()
            took = begin.elapsed_time(done) / 1e3
        else:
            begun = time.perf_counter()
            work()
            took = time.perf_counter() - begun
        if number < 2:
            end = time.perf_counter() + seconds
            continue
        best = min(best, took)
        if number >= 6 and time.perf_counter() > end:
            break
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    args = parser.parse_args()

    import torch

    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: PyTorch sees no GPU\nhint: `nvidia-smi` shows what the driver sees")
    side = 8192 if on_gpu else 1024
    types = {"f32": torch.float32, "bf16": torch.bfloat16}
    if on_gpu:
        types = {"f32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    found = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__, "side": side}
    for name, dtype in types.items():
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        a, b = (torch.randn(side, side, device=args.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        took = fastest(lambda: torch.mm(a, b, out=out), args.device, args.seconds)
        found[f"gemm_{name}_gflops"] = 2 * side**3 / took / 1e9
    source = torch.empty((4 << 30) if on_gpu else (64 << 20), dtype=torch.uint8, device=args.device).fill_(1)
    target = torch.empty_like(source)
    took = fastest(lambda: target.copy_(source), args.device, args.seconds)
    found["copy_gbytes_per_second"] = 2 * source.numel() / took / 1e9
    if on_gpu:
        found["memory_bytes"] = torch.cuda.mem_get_info()[1]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
