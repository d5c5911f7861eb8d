#!/usr/bin/env python3
"""Whether PyTorch's side computes what clip-host computes: each part on the same random tensors, in f32.

    python parity.py --binary clip-host

Encoders (features and all gradients, dropout off), loss (value, gradients, tables) and optimizer (parameters after
eight steps) go through `clip-host replay`. Prints the relative difference of each; exits with 1 if one is too large.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import DistilBertConfig, DistilBertModel

from isogclr import IsogClr, IsogClrConfig
from models import SPECS, parameter_groups

# Both sides add in f32, in orders of their own.
LIMIT = 2e-4
# Through 50 layers of batch norm and ReLU signs flip: PyTorch's own f32 gradients are 1e-2 from its f64 ones here.
DEEP_LIMIT = 5e-2

Tensors = dict[str, torch.Tensor]
# What was compared: its relative difference, and how large that may be.
Found = dict[str, tuple[float, float]]


def replay(binary: Path, kind: str, plugin: str, config: str, tensors: Tensors, *flags: str) -> Tensors:
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "in.safetensors", Path(folder) / "out.safetensors"
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, given)
        command = [binary, "replay", kind, plugin, "--config", config, "--in", given, "--out", answer, *flags]
        subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
        return load_file(answer)


def difference(ours: Tensors, theirs: Tensors) -> float:
    """The norm of all differences over the norm of what PyTorch has; a missing tensor is an infinite difference."""
    if not theirs or not theirs.keys() <= ours.keys():
        return float("inf")
    apart = sum((ours[name].double() - theirs[name].double()).square().sum() for name in theirs)
    return float((apart / sum(tensor.double().square().sum() for tensor in theirs.values())).sqrt())


def encoder(
    binary: Path,
    plugin: str,
    config: str,
    model: torch.nn.Module,
    inputs: Tensors,
    features: Callable[[torch.nn.Module], torch.Tensor],
    gradients_limit: float = LIMIT,
) -> Found:
    model.train()
    before = {f"param.{name}": tensor.clone().float() for name, tensor in model.state_dict().items()}
    out = features(model)
    cotangent = torch.randn_like(out)
    (out * cotangent).sum().backward()
    ours = replay(binary, "encoder", plugin, config, {**before, **inputs, "cotangent.features": cotangent})
    theirs = {f"train.grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        "features": (difference(ours, {"train.output.features": out.detach()}), LIMIT),
        "gradients": (difference(ours, theirs), gradients_limit),
    }


def small_resnet(binary: Path) -> Found:
    image = torch.rand(8, 3, 64, 64) * 4 - 2
    config = (
        '(block: "basic", layers: (1, 1, 1, 1), channels: (24, 48, 96, 192), stem: "7x7", stem_width: 24, '
        "zero_init_last: false)"
    )
    model = SPECS["sample"].image_encoder()
    return encoder(binary, "resnet", config, model, {"input.image": image}, lambda m: m(image))


def resnet50(binary: Path) -> Found:
    image = torch.rand(4, 3, 64, 64) * 4 - 2
    model = SPECS["resnet50"].image_encoder()
    # timm starts the last norm of a block at 0, which would hide the block.
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            torch.nn.init.constant_(parameter, 0.5)
    given = {"input.image": image}
    return encoder(binary, "resnet", '(preset: "resnet50")', model, given, lambda m: m(image), DEEP_LIMIT)


def vit_b32(binary: Path) -> Found:
    image = torch.rand(2, 3, 224, 224) * 4 - 2
    model = SPECS["vit_b32"].image_encoder()
    return encoder(binary, "vit", '(preset: "vit_base_patch32_224")', model, {"input.image": image}, lambda m: m(image))


def distilbert(binary: Path) -> Found:
    sizes = SPECS["sample"].text
    model = DistilBertModel(DistilBertConfig(**sizes, dropout=0.0, attention_dropout=0.0))
    ids, mask = torch.randint(1, sizes["vocab_size"], (8, 30)), torch.ones(8, 30)
    mask[2:, 20:] = 0
    config = ", ".join(f"{name}: {value}" for name, value in sizes.items())
    return encoder(
        binary,
        "distilbert",
        f"({config}, dropout: 0.0, attention_dropout: 0.0)",
        model,
        {"input.input_ids": ids, "input.attention_mask": mask},
        lambda m: m(input_ids=ids, attention_mask=mask.long()).last_hidden_state[:, 0],
    )


def loss(binary: Path) -> Found:
    steps, batch, dim, dataset_size = 3, 16, 32, 24
    rows = lambda: torch.nn.functional.normalize(torch.randn(steps, batch, dim), dim=-1)
    images, texts = rows(), rows()
    ids = torch.stack([torch.randperm(dataset_size)[:batch] for _ in range(steps)])
    ids[0, 0] = dataset_size - 1
    ids[0, 1:] = torch.arange(batch - 1)
    epochs = [0, 1, 1]
    criterion = IsogClr(IsogClrConfig(), dataset_size)
    theirs: dict[str, list] = {}
    for step in range(steps):
        image, text = images[step].clone().requires_grad_(), texts[step].clone().requires_grad_()
        value = criterion(image, text, ids[step], ids[step], epochs[step])
        value.backward()
        found = {"loss": value, "grad_image_features": image.grad, "grad_text_features": text.grad}
        found |= {f"state.{name}": table.clone() for name, table in criterion.named_buffers()}
        for name, tensor in found.items():
            theirs.setdefault(name, []).append(tensor.detach())
    given = {"image_features": images, "text_features": texts, "image_ids": ids, "text_ids": ids}
    ours = replay(binary, "loss", "isogclr", "()", {**given, "epoch": torch.tensor(epochs)})
    return {name: (difference(ours, {name: torch.stack(values)}), LIMIT) for name, values in theirs.items()}


def optimizer(binary: Path) -> Found:
    steps, lr = 8, 1e-2
    model = torch.nn.Linear(12, 7)
    given = {f"param_init.{name}": p.detach().clone() for name, p in model.named_parameters()}
    given |= {f"grad.{name}": torch.randn(steps, *p.shape) for name, p in model.named_parameters()}
    given["lr"] = torch.full((steps,), lr)
    radam = torch.optim.RAdam(parameter_groups(model, 0.02), lr=lr, decoupled_weight_decay=True, foreach=True)
    theirs: dict[str, list] = {}
    for step in range(steps):
        for name, parameter in model.named_parameters():
            parameter.grad = given[f"grad.{name}"][step].clone()
        radam.step()
        for name, parameter in model.named_parameters():
            theirs.setdefault(f"param_after.{name}", []).append(parameter.detach().clone())
    ours = replay(binary, "optimizer", "radam", "()", given, "--weight-decay", "0.02")
    return {name: (difference(ours, {name: torch.stack(values)}), LIMIT) for name, values in theirs.items()}


CHECKS = {check.__name__: check for check in (small_resnet, resnet50, vit_b32, distilbert, loss, optimizer)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parent.parent.parent
    parser.add_argument("--binary", type=Path, default=root / "target/release/clip-host")
    parser.add_argument("--only", choices=list(CHECKS), action="append", help="may be repeated [default: all]")
    args = parser.parse_args()
    equal = True
    for check in args.only or CHECKS:
        torch.manual_seed(0)
        try:
            found = CHECKS[check](args.binary)
        except subprocess.CalledProcessError as error:
            print(f"{check:14} failed: {error.stderr.strip()}", flush=True)
            equal = False
            continue
        for name, (apart, limit) in found.items():
            equal &= apart <= limit
            verdict = "ok" if apart <= limit else f"too far apart (limit {limit:.0e})"
            print(f"{check:14} {name:22} {apart:9.2e} {verdict}", flush=True)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
