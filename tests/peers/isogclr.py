"""iSogCLR as plugins/loss/isogclr states it, in PyTorch (Qiu et al. 2023, arXiv:2305.11965)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class IsogClrConfig:
    """Settings of the loss; the defaults are those of the plugin."""

    gamma: float = 0.8
    rho_image: float = 8.0
    rho_text: float = 8.0
    tau_init: float = 0.01
    eta: float = 1e-5
    beta_u: float = 0.5
    grad_clip: float = 5.0
    tau_min: float = 0.005
    tau_max: float = 0.05
    eps: float = 1e-14


class IsogClr(nn.Module):
    """The loss with its tables: a row for each image and each text of the data set."""

    def __init__(self, config: IsogClrConfig, dataset_size: int) -> None:
        super().__init__()
        self.config = config
        for side in "IT":
            for name, start in [("s", 0.0), ("b", 0.0), ("u", 0.0), ("tau", config.tau_init)]:
                self.register_buffer(f"{name}_{side}", torch.full((dataset_size,), start))

    def forward(self, images: Tensor, texts: Tensor, image_ids: Tensor, text_ids: Tensor, epoch: int) -> Tensor:
        """The scalar loss of unit rows `[batch, embed_dim]`; moves the tables' rows of the batch."""
        similarity = images @ texts.t()
        return self._side("I", self.config.rho_image, similarity, image_ids, epoch) + self._side(
            "T", self.config.rho_text, similarity.t(), text_ids, epoch
        )

    def _side(self, side: str, rho: float, similarity: Tensor, ids: Tensor, epoch: int) -> Tensor:
        config = self.config
        difference = similarity - similarity.diagonal().unsqueeze(1)
        with torch.no_grad():
            s, b, u, tau = (getattr(self, f"{name}_{side}") for name in ("s", "b", "u", "tau"))
            tau_used, b_old = tau[ids], b[ids]
            h = difference / tau_used.unsqueeze(1)
            top = torch.maximum(b_old, h.amax(1))
            e = torch.exp(h - top.unsqueeze(1)).fill_diagonal_(0.0)
            g = e.sum(1)
            s_new = g if epoch == 0 else (1 - config.gamma) * s[ids] * torch.exp(b_old - top) + config.gamma * g
            divisor = s_new.clamp(min=config.eps)
            weights = e / divisor.unsqueeze(1)
            gradient = torch.log(divisor / (len(ids) - 1)) + top + rho - (weights * h).sum(1)
            if config.grad_clip > 0:
                gradient = gradient.clamp(-config.grad_clip, config.grad_clip)
            u_new = (1 - config.beta_u) * u[ids] + config.beta_u * gradient
            s[ids], b[ids], u[ids] = s_new, top, u_new
            tau[ids] = (tau_used - config.eta * u_new).clamp(config.tau_min, config.tau_max)
        return (weights * difference).sum(1).mean()
