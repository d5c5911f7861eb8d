"""The recipes' models in PyTorch: timm's image encoders, transformers' DistilBERT, two linear heads, random weights."""

from collections.abc import Callable
from dataclasses import dataclass, field

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertModel

from isogclr import IsogClrConfig


@dataclass
class Spec:
    """One recipe: what decides the work of a step."""

    recipe: str
    image_encoder: Callable[[], nn.Module]
    text: dict
    embed_dim: int
    batch: int
    image_size: int
    lr: float
    loss: IsogClrConfig
    text_length: int = 30
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)


class SmallResNet(nn.Module):
    """The sample recipe's image encoder: a narrow stem, then one basic block a stage (timm fixes its stem at 64)."""

    def __init__(self, stem: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.num_features = channels[-1]
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        width = stem
        for stage, out in enumerate(channels):
            stride = 1 if stage == 0 else 2
            shortcut = downsample_conv(width, out, 1, stride=stride) if stride != 1 or width != out else None
            setattr(self, f"layer{stage + 1}", nn.Sequential(BasicBlock(width, out, stride, shortcut)))
            width = out
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))


DISTILBERT_BASE = dict(vocab_size=30522, max_position_embeddings=512, dim=768, hidden_dim=3072, n_heads=12, n_layers=6)

SPECS = {
    "resnet50": Spec(
        recipe="recipes/cc3m/isogclr_radam.ron",
        image_encoder=lambda: timm.create_model("resnet50", pretrained=False, num_classes=0),
        text=DISTILBERT_BASE,
        embed_dim=256,
        batch=16,
        image_size=224,
        lr=2e-4,
        loss=IsogClrConfig(),
    ),
    "vit_b32": Spec(
        recipe="recipes/cc3m/isogclr_radam_vit.ron",
        image_encoder=lambda: timm.create_model("vit_base_patch32_224", pretrained=False, num_classes=0),
        text=DISTILBERT_BASE,
        embed_dim=256,
        batch=16,
        image_size=224,
        lr=2e-4,
        loss=IsogClrConfig(),
    ),
    "sample": Spec(
        recipe="recipes/isogclr_radam.ron",
        image_encoder=lambda: SmallResNet(24, (24, 48, 96, 192)),
        text=dict(vocab_size=258, max_position_embeddings=30, dim=128, hidden_dim=512, n_heads=4, n_layers=2),
        embed_dim=128,
        batch=64,
        image_size=64,
        lr=2e-3,
        loss=IsogClrConfig(tau_init=0.05, eta=5e-4, gamma=0.9),
    ),
}


class TwoTowers(nn.Module):
    """Both encoders with their heads; unit rows in f32."""

    def __init__(self, spec: Spec, attention: str = "sdpa") -> None:
        super().__init__()
        config = DistilBertConfig(**spec.text, dropout=0.1, attention_dropout=0.1)
        self.image_encoder = spec.image_encoder()
        self.text_encoder = DistilBertModel._from_config(config, attn_implementation=attention)
        self.image_proj = nn.Linear(self.image_encoder.num_features, spec.embed_dim)
        self.text_proj = nn.Linear(config.dim, spec.embed_dim)

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        image = self.image_proj(self.image_encoder(images))
        text = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        return F.normalize(image.float()), F.normalize(self.text_proj(text).float())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """As the recipes' `no_decay`: one-dimensional parameters, biases, a ViT's class token and positions do not decay."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        without = parameter.ndim == 1 or name.endswith((".bias", ".cls_token", ".pos_embed"))
        (rest if without else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Of OpenAI's CLIP, which clip-host's data pipeline normalises with too.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Batch:
    """One random batch, used for every step, as `clip-host bench step --synthetic` does.

    With `pixels` the images are bytes in the host's memory (pinned, if the device is a GPU), which come to the device
    anew in every step: `fetch` sends the next step's while this one computes; to normalise them is a part of the step.
    """

    spec: Spec
    size: int
    image_size: int
    device: torch.device = torch.device("cpu")
    memory_format: torch.memory_format = torch.contiguous_format
    pixels: bool = False
    images: Tensor = field(init=False)
    input_ids: Tensor = field(init=False)
    attention_mask: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (self.size, 3, self.image_size, self.image_size)
        tokens = (self.size, self.spec.text_length)
        if self.pixels:
            images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        else:
            images = torch.rand(shape, generator=generator) * 4 - 2
        self.images = images.to(self.device).contiguous(memory_format=self.memory_format)
        self.input_ids = torch.randint(self.spec.text["vocab_size"], tokens, generator=generator).to(self.device)
        self.attention_mask = torch.ones(tokens, dtype=torch.int64, device=self.device)
        self.order = torch.arange(self.size, device=self.device)
        self.stream = None
        if self.pixels and self.device.type == "cuda":
            self.host = images.contiguous(memory_format=self.memory_format).pin_memory()
            self.next, self.stream = torch.empty_like(self.images), torch.cuda.Stream()
            self.send()
        if self.pixels:
            scale = lambda values: 255 * torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            self.mean, self.std = scale(MEAN), scale(STD)

    def send(self) -> None:
        # What was in the buffer has to be read before it is written over.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.next.copy_(self.host, non_blocking=True)

    def fetch(self) -> Tensor:
        """This step's images on the device."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.images, self.next = self.next, self.images
            self.send()
        return self.images

    def normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std if self.pixels else images

    @property
    def dataset_size(self) -> int:
        return 16 * self.size

    def ids(self, step: int) -> Tensor:
        """Other samples at every step, as in training."""
        return self.order + (step % 16) * self.size
