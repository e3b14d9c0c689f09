"""The head's network: MAR's MLP, whose layers are modulated by time and by z.

    x_t (.., D) ─ Linear ─ h (.., w) ─ [ LN ─ modulate ─ MLP ─ gate ─ + ] x blocks ─ LN ─ F (.., D)
    t   (..)    ─ [cos sin] ─ MLP ─┐          ▲ shift, scale, gate (.., 3w)          ▲ shift, scale
    z   (.., C) ─ Linear ──────────+── c (.., w) ─ SiLU ─ Linear ─────────────────────┘

The objectives of heads.py train it; AudioCALM's read-out is a thin one (audiocalm.py).

Sources: CALM (arXiv 2509.06926) section 4.2 and Table 9; Li et al. 2024 (MAR, arXiv 2406.11838).
Shapes: any leading dims (..), D latent channels, C channels of z, w width.

Precision: times, time embedding, norms and the residual stream are fp32, even under autocast; only
the matrix products follow autocast. float64 inputs stay float64 (used by the tests).
"""
import math

import torch
from torch import nn


def fp32(x):
    """At least fp32: bf16 and fp16 are converted, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sinusoid(t):
    """Embed times t (..) as [cos, sin] (.., 256) with RMS 1 and angular frequencies from 1 to 1e-4.

    The highest frequency is 1 on purpose. Scaling t by 1000 first, as DiT does, multiplies d/dt and
    with it the consistency tangent by 1000 (energy distance on a multimodal toy in 16 dimensions:
    3.66 instead of 0.18). The sqrt(2) stands for the RMSNorm after the embedding that keeps
    training stable: cos² + sin² = 1, so the norm is a constant.
    """
    t = fp32(t)
    freqs = torch.exp(torch.arange(128, device=t.device, dtype=t.dtype) * (-math.log(1e4) / 128))
    angles = t[..., None] * freqs                                           # (.., 128)
    return math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=-1)   # (.., 256)


class LayerNorm(nn.Module):
    """LayerNorm in fp32, by hand: nn.LayerNorm inside torch.func.jvp breaks a fullgraph compile."""

    def __init__(self, width, affine=True, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x):
        x = fp32(x)
        x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x if self.weight is None else x * self.weight + self.bias


class StdNorm(nn.Module):
    """w x / sqrt(var(x) + 1e-5) with the unbiased variance, x itself not centred (Pocket TTS)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * (self.weight * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5))


class Block(nn.Module):
    """h + gate * MLP(LN(h) (1 + scale) + shift); the MLP does not expand (Table 9's 601M)."""

    def __init__(self, width):
        super().__init__()
        self.norm = LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))    # c -> 3 x (.., w)

    def forward(self, h, c):
        shift, scale, gate = self.ada(c).chunk(3, dim=-1)                   # 3 x (.., w)
        return h + gate * self.mlp(self.norm(h) * (1 + scale) + shift)


def time_embedding(width, time_norm):
    """The MLP that follows sinusoid(t): (.., 256) -> (.., w)."""
    layers = [nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)]
    if time_norm:
        layers.append(StdNorm(width))
    return nn.Sequential(*layers)


class AdaLNMLP(nn.Module):
    """MAR's network: F(x_t, t, z) for x_t (.., D), t (..), z (.., C) -> F (.., D); zero at init.

    z may have fewer leading dims than x_t and is broadcast: with the head batch multiplier x_t is
    (M, .., D) and z stays (.., C), so its projection is computed once.
    two_times: F(x_t, t, z, s) with the time s (..) to jump to. s has a second embedding, and c gets
    the mean of the two.
    """

    def __init__(self, dim, cond_dim, width, blocks, two_times=False, time_norm=False):
        super().__init__()
        self.dim = dim
        self.two_times = two_times

        # `time` embeds t, `until` the time s to jump to
        self.input = nn.Linear(dim, width)
        self.cond = nn.Linear(cond_dim, width)
        self.time = time_embedding(width, time_norm)
        if two_times:
            self.until = time_embedding(width, time_norm)

        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.norm = LayerNorm(width, affine=False)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))    # c -> 2 x (.., w)
        self.output = nn.Linear(width, dim)

        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)

        # blocks start as the identity, the output as zero
        for m in [block.ada[1] for block in self.blocks] + [self.ada[1], self.output]:
            nn.init.zeros_(m.weight)

    def matrices(self):
        """The modules with the large linear layers, which sample.py can quantise to int8."""
        until = [self.until] if self.two_times else []
        return [self.blocks, self.time, *until, self.ada]

    def at_target_time(self, x_t, t, z):
        """F as a function of s alone, which LSD differentiates."""
        return lambda s: self(x_t, t, z, s)

    def forward(self, x_t, t, z, s=None):
        dtype = self.input.weight.dtype

        # times, in fp32
        with torch.autocast(x_t.device.type, enabled=False):
            time = self.time(sinusoid(t).to(dtype))                         # (.., w)
            if s is not None:
                time = (time + self.until(sinusoid(s).to(dtype))) / 2

        # the residual stream, in fp32, modulated by c in every block
        c = time + fp32(self.cond(z.to(dtype)))                             # (.., w)
        h = fp32(self.input(x_t.to(dtype)))                                 # (.., w)
        for block in self.blocks:
            h = block(h, c)

        shift, scale = self.ada(c).chunk(2, dim=-1)                         # 2 x (.., w)
        return self.output(self.norm(h) * (1 + scale) + shift)              # (.., D)


if __name__ == "__main__":
    print("adaln.py is a library, used by train.py, sample.py and evaluate.py through heads.py")
