"""The head's network: MAR's MLP, whose layers are modulated by time and by z.

    x_t (.., D) ─ Linear ─ h (.., w) ─ [ LN ─ modulate ─ MLP ─ gate ─ + ] x blocks ─ LN ─ F (.., D)
    t   (..)    ─ [cos sin] ─ MLP ─┐          ▲ shift, scale, gate (.., 3w)          ▲ shift, scale
    z   (.., C) ─ Linear ──────────+── c (.., w) ─ SiLU ─ Linear ─────────────────────┘

The objectives of heads.py train it; AudioCALM's read-out is a thin one (audiocalm.py).

Consistency and LSD also need how F moves when its inputs do: `jvp` (x_t and t move) and `jvp_s` (s
moves) return F with its tangent dF, a derivative along one direction. Every layer carries its own
tangent, so a linear layer costs two matrix products, W x and W dx; torch.func.jvp takes three, of
which one multiplies zeros. z never moves: it has no tangent and costs one product.

Sources: CALM (arXiv 2509.06926) section 4.2 and Table 9; Li et al. 2024 (MAR, arXiv 2406.11838).
Shapes: any leading dims (..), D latent channels, C channels of z, w width. dx is the tangent of x
and has its shape.

Precision: times, time embedding, norms, the residual stream and all of the tangent between two
matrix products are fp32, even under autocast; only the matrix products follow autocast, the
tangent's too. float64 inputs stay float64 (used by the tests).
"""
import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


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
    angles = t[..., None] * frequencies(t)                                  # (.., 128)
    return math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=-1)   # (.., 256)


def frequencies(t):
    """The angular frequencies of `sinusoid` (128,), in the dtype of t."""
    return torch.exp(torch.arange(128, device=t.device, dtype=t.dtype) * (-math.log(1e4) / 128))


# ----------------------------------------------------------------------------------------- tangents

def sinusoid_tangent(t, dt):
    """sqrt(2) f dt [-sin(f t), cos(f t)], f the frequencies: t, dt (..) -> (.., 256)."""
    t = fp32(t)
    f = frequencies(t)
    angles = t[..., None] * f                                               # (.., 128)
    speed = math.sqrt(2) * dt[..., None] * f                                # (.., 128)
    return torch.cat([-speed * angles.sin(), speed * angles.cos()], dim=-1)


def linear_tangent(layer, dx):
    """W dx: the bias does not move."""
    return fp32(nn.functional.linear(dx.to(layer.weight.dtype), layer.weight))


def silu_tangent(x, dx):
    """σ(x) (1 + x (1 - σ(x))) dx, the derivative of SiLU(x) = x σ(x)."""
    x = fp32(x)
    sigma = x.sigmoid()
    return sigma * (1 + x * (1 - sigma)) * dx


# ------------------------------------------------------------------------------------------- layers

class LayerNorm(nn.Module):
    """LayerNorm in fp32, with its tangent.

        y  = weight u + bias,   u = r (x - mean(x)),   r = 1 / sqrt(var(x) + eps)
        dy = weight r (dx - mean(dx) - u mean(u dx))
    """

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

    def tangent(self, x, dx):
        x = fp32(x)
        x = x - x.mean(-1, keepdim=True)
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)       # (.., 1)
        u = r * x
        dy = r * (dx - dx.mean(-1, keepdim=True) - u * (u * dx).mean(-1, keepdim=True))
        return dy if self.weight is None else dy * self.weight


class StdNorm(nn.Module):
    """Divide x (.., n) by its std, x itself not centred (Pocket TTS), with its tangent.

        y  = weight r x,   r = 1 / sqrt(var(x) + 1e-5), the unbiased variance
        dy = weight r (dx - r² x cov(x, dx)),   cov(x, dx) = sum((x - mean(x)) dx) / (n - 1)
    """

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * (self.weight * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5))

    def tangent(self, x, dx):
        r = torch.rsqrt(x.var(-1, keepdim=True) + 1e-5)                     # (.., 1)
        centred = x - x.mean(-1, keepdim=True)
        cov = (centred * dx).sum(-1, keepdim=True) / (x.shape[-1] - 1)      # (.., 1)
        return self.weight * r * (dx - r.square() * x * cov)


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

    def jvp(self, h, c, dh, dc, graph):
        """`forward` and its tangent, by the product rule: h, c, dh, dc (.., w) -> 2 x (.., w).

            d(n (1 + scale) + shift) = dn (1 + scale) + n dscale + dshift,   n = LN(h)
            d(h + gate out)          = dh + gate dout + dgate out

        graph: whether gradients flow through the tangent. Without it the tangent stores nothing.
        """
        # forward, step by step
        shift, scale, gate = self.ada(c).chunk(3, dim=-1)                   # 3 x (.., w)
        n = self.norm(h)
        hidden = self.mlp[0](n * (1 + scale) + shift)
        out = self.mlp[2](self.mlp[1](hidden))

        # the tangent of each step
        with torch.set_grad_enabled(graph):
            dada = linear_tangent(self.ada[1], silu_tangent(c, dc))
            dshift, dscale, dgate = dada.chunk(3, dim=-1)                   # 3 x (.., w)
            dmodulated = self.norm.tangent(h, dh) * (1 + scale) + n * dscale + dshift
            dhidden = linear_tangent(self.mlp[0], dmodulated)
            dout = linear_tangent(self.mlp[2], silu_tangent(hidden, dhidden))
            dh = dh + gate * dout + dgate * out
        return h + gate * out, dh


def time_embedding(width, time_norm):
    """The MLP that follows sinusoid(t): (.., 256) -> (.., w)."""
    layers = [nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)]
    if time_norm:
        layers.append(StdNorm(width))
    return nn.Sequential(*layers)


def time_jvp(mlp, t, dt, graph):
    """`time_embedding` of sinusoid(t) and its tangent: t, dt (..) -> 2 x (.., w)."""
    time_norm = len(mlp) > 3
    hidden = mlp[0](sinusoid(t).to(mlp[0].weight.dtype))                    # (.., w)
    out = mlp[2](mlp[1](hidden))                                            # (.., w)

    with torch.set_grad_enabled(graph):
        dhidden = linear_tangent(mlp[0], sinusoid_tangent(t, dt))           # (.., w)
        dout = linear_tangent(mlp[2], silu_tangent(hidden, dhidden))        # (.., w)
        if time_norm:
            dout = mlp[3].tangent(out, dout)
    return mlp[3](out) if time_norm else out, dout


class AdaLNMLP(nn.Module):
    """MAR's network: F(x_t, t, z) for x_t (.., D), t (..), z (.., C) -> F (.., D); zero at init.

    z may have fewer leading dims than x_t and is broadcast: with the head batch multiplier x_t is
    (M, .., D) and z stays (.., C), so its projection is computed once.
    two_times: F(x_t, t, z, s) with the time s (..) to jump to. s has a second embedding, and c gets
    the mean of the two.
    checkpoint (attribute): compute the activations inside each block again in the backward pass
    instead of keeping them.
    """
    checkpoint = False

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

    def run(self, block, *arguments):
        """One block, or its jvp, with or without its activations kept."""
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def project(self, layer, x):
        """x (.., n) -> (.., w), onto the residual stream."""
        return fp32(layer(x.to(self.input.weight.dtype)))

    def forward(self, x_t, t, z, s=None):
        dtype = self.input.weight.dtype

        # times, in fp32
        with torch.autocast(x_t.device.type, enabled=False):
            time = self.time(sinusoid(t).to(dtype))                         # (.., w)
            if s is not None:
                time = (time + self.until(sinusoid(s).to(dtype))) / 2

        # the residual stream, in fp32, modulated by c in every block
        c = time + self.project(self.cond, z)                               # (.., w)
        h = self.project(self.input, x_t)                                   # (.., w)
        for block in self.blocks:
            h = self.run(block, h, c)

        shift, scale = self.ada(c).chunk(2, dim=-1)                         # 2 x (.., w)
        return self.output(self.norm(h) * (1 + scale) + shift)              # (.., D)

    def jvp(self, x_t, t, z, dx, dt):
        """F(x_t, t, z) and dF = ∂F/∂x dx + ∂F/∂t dt, for Consistency.

        dx (.., D), dt (..) -> 2 x (.., D). Gradients flow through F only.
        """
        # times and z; z does not move
        with torch.autocast(x_t.device.type, enabled=False):
            time, dc = time_jvp(self.time, t, dt, graph=False)              # (.., w)
        c = time + self.project(self.cond, z)                               # (.., w)

        # x_t
        h = self.project(self.input, x_t)                                   # (.., w)
        with torch.no_grad():
            dh = linear_tangent(self.input, dx)
        return self.residual_stream_jvp(h, c, dh, dc, graph=False)

    def jvp_s(self, x_t, t, z, s):
        """F(x_t, t, z, s) and ∂F/∂s, for LSD: 2 x (.., D). Gradients flow through both."""
        graph = torch.is_grad_enabled()

        # only s moves
        with torch.autocast(x_t.device.type, enabled=False):
            until, duntil = time_jvp(self.until, s, torch.ones_like(s), graph)
            time = self.time(sinusoid(t).to(self.input.weight.dtype))       # (.., w)
        c = (time + until) / 2 + self.project(self.cond, z)                 # (.., w)
        h = self.project(self.input, x_t)                                   # (.., w)
        return self.residual_stream_jvp(h, c, torch.zeros_like(h), duntil / 2, graph)

    def residual_stream_jvp(self, h, c, dh, dc, graph):
        """From the residual stream h and the modulation c, both (.., w), to F and dF (.., D)."""
        for block in self.blocks:
            h, dh = self.run(block.jvp, h, c, dh, dc, graph)

        shift, scale = self.ada(c).chunk(2, dim=-1)                         # 2 x (.., w)
        n = self.norm(h)
        F = self.output(n * (1 + scale) + shift)                            # (.., D)

        with torch.set_grad_enabled(graph):
            dada = linear_tangent(self.ada[1], silu_tangent(c, dc))
            dshift, dscale = dada.chunk(2, dim=-1)                          # 2 x (.., w)
            dmodulated = self.norm.tangent(h, dh) * (1 + scale) + n * dscale + dshift
            dF = linear_tangent(self.output, dmodulated)
        return F, dF


if __name__ == "__main__":
    print("adaln.py is a library, used by train.py, sample.py and evaluate.py through heads.py")
