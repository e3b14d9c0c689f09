"""
heads.py: from the backbone's z to the next latent x. One small network, four objectives.

        noise eps (N, D) ──┐
                           ▼
    x_t (.., D) ─ Linear ─ h (.., w) ─ [ LN ─ modulate ─ MLP ─ gate ─ + ] x blocks ─ LN ─ F (.., D)
    t   (..)    ─ [cos sin] ─ MLP ─┐          ▲ shift, scale, gate (.., 3w)          ▲ shift, scale
    z   (.., C) ─ Linear ──────────+── c (.., w) ─ SiLU ─ Linear ─────────────────────┘

An objective knows the noising path, the times, the loss and the solver; a network is any callable
`net(x_t, t, z) -> F` (`net(x_t, t, z, s)` for LSD, which has two times). The objectives have the
same two methods, so that nobody asks which; so have the two of discrete.py, whose x are codes:

    loss(z, x) -> (loss per position, metrics)       sample(z, steps=, temperature=, ...) -> x

    objective      path                        the network learns               steps  paper
    RectifiedFlow  x_t = (1-t) x + t eps       F = eps - x,             t < 1    20    Liu 2023
    TrigFlow       x_t = cos t x + sin t eps   F = cos t eps - sin t x, t < π/2  20    4.2, Table 4
    Consistency    the same path               f = cos t x_t - sin t F, f = x_0   1    Eq. 1 and 3
    LSD            RectifiedFlow's path        f = x_t + (s-t) F(t, s), f = x_s   1    v3

Papers: CALM (arXiv 2509.06926) sections 3.2, 4.2, 4.4 (head batch multiplier), 4.5 (temperature)
and Table 9; the network is MAR's (Li et al. 2024, arXiv 2406.11838); consistency is sCM (Lu & Song
2025, arXiv 2410.11081); LSD, Lagrangian self-distillation of flow maps, is Boffi et al. 2025 (arXiv
2505.18825), which the paper's third version (v3) and Pocket TTS use for speech.
Shapes: N positions or any leading dims, D latent channels, C channels of z, w width, M head batch
multiplier. Latents have mean 0 and variance 1 per channel (sCM's sigma_d = 1).

Where this differs from the printed CALM paper, and why:
  * t lies in (0, π/2) and sampling starts at π/2; the paper writes t ~ [0, 1] and t = 1. cos 1 =
    .54, so a network trained on [0, 1] never sees pure noise, which is where a 1-step sample
    starts.
  * Temperature tau multiplies the std of the noise by sqrt(tau); the paper's "variance 1/sqrt(tau)"
    would make a low temperature noisier (v3 of the paper says it right).
  * df/dt in Eq. 3 is a target: no gradient through it (as Eq. 1 and v3). With one the model is
    biased.
  * Not in the paper, from sCM, without which the gradient has spikes: the tangent g is divided by
    ||g|| + .1, it may be warmed up (r), and tan t is log-normal, not t uniform.
  * w_psi(t), the adaptive weight of Eq. 1, is a switch: see HeadConfig.adaptive.
  * LSD counts time as RectifiedFlow does, 0 = data, 1 = noise (Pocket TTS the other way), so that
    its diagonal s = t is that flow.

Precision: times, cos and sin, time embedding, norms, the residual stream, the jvp and the loss are
fp32, even under autocast; only the matrix products of the plain forward follow autocast. float64
inputs stay float64 (the tests use it).
"""

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from schema import Range

HALF_PI = math.pi / 2


@dataclass
class HeadConfig:
    """The [lm.head] and [audiocalm.head] tables."""
    # What the head learns; rq and delay are the discrete baselines (discrete.py; they need [vae]
    # bottleneck = "rvq"). TrigFlow is the paper's best and slowest (Table 4), consistency its choice
    # for real time, lsd that of its third version for speech; consistency starts well from
    # TrigFlow's weights (Consistency.load_flow).
    objective: Literal["rectified_flow", "trigflow", "consistency", "lsd", "rq", "delay"] = "trigflow"
    # Channels inside the MLP. Table 9: 3072 (music, 601M parameters), 512 (speech, 10M); rq: 1024.
    width: Annotated[int, Range(1)] = 512
    # Residual blocks. Table 9: 12 (music), 6 (speech); rq: 6 transformer layers.
    blocks: Annotated[int, Range(1)] = 6
    # Head batch multiplier M (4.4, Table 9: 8): draws of (t, eps) per position and step. One pass of
    # the backbone serves M losses; memory and time of the head grow M times.
    multiplier: Annotated[int, Range(1)] = 8
    # Mean and std of log(noise / signal), the same in all objectives: the log of tan t, or of t /
    # (1-t) for rectified_flow (where 0, 1 is SD3's logit-normal). Not given in the paper; sCM uses
    # -1, 1.4 on images; -0.4, 1.4 trained on every seed of our toys.
    p_mean: float = -0.4
    p_std: Annotated[float, Range(above=0)] = 1.4
    # consistency: learn w_psi(t) of Eq. 1 and 3, 257 parameters: exp(w) loss - w, so that every t
    # weighs the same (lsd: w(t, s), 513). The reported loss then is about 1 - w and may be
    # negative. Measured no better than without in our toys, and lsd diverged with it, so off; the
    # paper has it on.
    adaptive: bool = False
    # consistency: steps over which r goes from 0 (flow matching) to 1 (sCM uses 10k). 0 = r is 1
    # from the start, which was stable from scratch and is right when TrigFlow's weights are loaded.
    warmup: Annotated[int, Range(0)] = 0
    # consistency: c of g / (||g|| + c), sCM's 0.1. Not in the paper.
    tangent_c: Annotated[float, Range(above=0)] = 0.1
    # Divide each embedded time by its spread over the width, times a learned factor per channel
    # (Pocket TTS; not in MAR). sinusoid() below has that effect on the embedding's input already.
    time_norm: bool = False
    # lsd: weight of the self-distillation; the flow on the diagonal has the rest (v3, Pocket TTS).
    distill: Annotated[float, Range(above=0, below=1)] = 0.25
    # Flows: euler (one evaluation per step) or heun (two, second order). The others ignore it.
    solver: Literal["euler", "heun"] = "euler"
    # Steps when sample() is not told: 0 = 1 for consistency and lsd, 20 for the flows. Table 4
    # has 1 and 4 for consistency, 100 for TrigFlow; consistency gets worse beyond 4 to 10 (Table 6).
    steps: Annotated[int, Range(0)] = 0
    # rq: attention heads (Table 9: 16).
    depth_heads: Annotated[int, Range(1)] = 16
    # rq: sets of weights: one for each of the first levels, the rest share the last; 0 = as many as
    # levels.
    sets: Annotated[int, Range(0)] = 0
    # rq, delay: draw among so many likeliest codes; 0 = all (MusicGen's default is 250).
    top_k: Annotated[int, Range(0)] = 0

    def __post_init__(self):
        if self.objective == "rq" and self.width % self.depth_heads:
            raise ValueError(f"depth_heads: must divide width = {self.width}, "
                             f"got {self.depth_heads}")

    @property
    def sample_steps(self):
        """Steps that sample() takes when it is not told."""
        return self.steps or {"rectified_flow": 20, "trigflow": 20}.get(self.objective, 1)


def fp32(x):
    """At least fp32: bf16 and fp16 go up, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------ network

def sinusoid(t):
    """t (..) -> [cos, sin] (.., 256) with RMS 1, angular frequencies from 1 down to 1e-4.

    The highest frequency is 1 on purpose. Scaling t by 1000 first (DiT's habit) multiplies d/dt,
    and with it the consistency tangent, by 1000 (toy energy distance 3.66 instead of .18). The sqrt
    2 is the RMSNorm after the embedding that keeps training stable: cos² + sin² = 1, so it is a
    constant.
    """
    t = fp32(t)
    freqs = torch.exp(torch.arange(128, device=t.device, dtype=t.dtype) * (-math.log(1e4) / 128))
    angles = t[..., None] * freqs                                           # (.., 128)
    return math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=-1)  # (.., 256)


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


class Block(nn.Module):
    """h + gate * MLP(LN(h) (1 + scale) + shift); no expansion in the MLP (hence Tab. 9's 601M)."""

    def __init__(self, width):
        super().__init__()
        self.norm = LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, h, c):
        shift, scale, gate = self.ada(c).chunk(3, dim=-1)                   # 3 x (.., w)
        return h + gate * self.mlp(self.norm(h) * (1 + scale) + shift)


class SpreadNorm(nn.Module):
    """w x / sqrt(var(x) + 1e-5) with the unbiased variance, x itself not centred (Pocket TTS)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * (self.weight * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5))


class AdaLNMLP(nn.Module):
    """MAR's head: F(x_t, t, z) for x_t (.., D), t (..), z (.., C) -> F (.., D); zero at init.

    z may have fewer leading dims than x_t, it broadcasts: with the head batch multiplier x_t is
    (M, .., D) and z stays (.., C), so its projection is computed once.
    two_times: F(x_t, t, z, s), s (..) the time to jump to; it has its own embedding, c gets the
    mean of the two.
    """

    def __init__(self, dim, cond_dim, width, blocks, two_times=False, time_norm=False):
        super().__init__()
        self.dim, self.two_times = dim, two_times
        self.input = nn.Linear(dim, width)
        self.cond = nn.Linear(cond_dim, width)
        embedding = lambda: nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width),
                                          *([SpreadNorm(width)] if time_norm else []))
        self.time = embedding()
        if two_times:
            self.until = embedding()
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.norm = LayerNorm(width, affine=False)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.output = nn.Linear(width, dim)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in [block.ada[1] for block in self.blocks] + [self.ada[1], self.output]:
            nn.init.zeros_(m.weight)                                      # blocks start as identity

    def matrices(self):
        """The modules whose linear layers are large: what int8 rounds (sample.py)."""
        until = [self.until] if self.two_times else []
        return [self.blocks, self.time, *until, self.ada]

    def towards(self, x_t, t, z):
        """F as a function of s: what LSD differentiates."""
        return lambda s: self(x_t, t, z, s)

    def forward(self, x_t, t, z, s=None):
        dtype = self.input.weight.dtype
        with torch.autocast(x_t.device.type, enabled=False):                # times stay fp32
            time = self.time(sinusoid(t).to(dtype))                         # (.., w)
            if s is not None:
                time = (time + self.until(sinusoid(s).to(dtype))) / 2
        c = time + fp32(self.cond(z.to(dtype)))                             # (.., w)
        h = fp32(self.input(x_t.to(dtype)))                                 # (.., w)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.ada(c).chunk(2, dim=-1)                         # 2 x (.., w)
        return self.output(self.norm(h) * (1 + scale) + shift)              # (.., D)


# --------------------------------------------------------------------------------------- objectives
# Contract with the network. net(x_t, t, z), LSD: net(x_t, t, z, s): x_t (.., D) and t, s (..) in
# fp32, z whatever loss or sample was given, untouched; with multiplier M > 1, loss puts one axis in
# front of x_t, t and s: M, or M / 4, rounded up, for LSD's jumps. `net.dim` is D. A position is
# what shares one t: a network that denoises blocks takes x (B, blocks, block * D).

def draw(x, cfg):
    """Repeat x (.., D) M times; own noise and time for every position and every repeat (4.4).

    Returns x, eps (M, .., D), u = log(noise / signal) ~ N(p_mean, p_std²) (M, ..); no M if M = 1.
    """
    x = fp32(x)
    if cfg.multiplier > 1:
        x = x.expand(cfg.multiplier, *x.shape)
    eps = torch.randn(x.shape, device=x.device, dtype=x.dtype)
    u = cfg.p_mean + cfg.p_std * torch.randn(x.shape[:-1], device=x.device, dtype=x.dtype)
    return x, eps, u


def finish(loss, u, cfg, error=None):
    """Mean over the repeats; metrics: the error in the thirds of low, middle and high noise."""
    n = (u - cfg.p_mean) / cfg.p_std
    error = (loss if error is None else error).detach()
    thirds = {"low": n < -0.43, "mid": n.abs() <= 0.43, "high": n > 0.43}
    metrics = {f"loss_{k}": (error * m).sum() / m.sum().clamp(min=1) for k, m in thirds.items()}
    return (loss.mean(0) if cfg.multiplier > 1 else loss), metrics


def energy_score(head, z, x, **options):
    """How well the head's draws foretell x: z (.., C), x (.., D) -> (..), lower is better.

        (|a - x| + |b - x| - |a - b|) / (2 sqrt D)      a, b two draws of head.sample(z, **options)

    The energy score of Gneiting & Raftery (2007, section 4.2) from two draws; strictly proper: its
    expectation is least where the draws have x's distribution, and one unit serves all objectives
    and numbers of steps. Draws that all equal the mean gain nothing from |a - b|; draws that are
    too wide pay in |a - x|. train.py logs it on held-out clips as valid_energy_*.
    """
    x = fp32(x)
    a, b = (head.sample(z, **options) for _ in range(2))
    size = lambda d: d.norm(dim=-1) / (2 * math.sqrt(x.shape[-1]))
    return size(a - x) + size(b - x) - size(a - b)


def start(net, z, cfg, default, shape, steps, temperature, generator):
    """Starting noise of std sqrt(tau) (.., D), a function that draws more of it, and the steps."""
    steps = steps or cfg.steps or default
    if steps < 1:
        raise ValueError(f"steps: {steps} is wrong; valid: an integer of at least 1")
    if temperature < 0:
        raise ValueError(f"temperature: {temperature} is wrong; valid: a number of at least 0")
    shape = shape or (*z.shape[:-1], net.dim)
    dtype = torch.promote_types(z.dtype, torch.float32) if torch.is_tensor(z) else torch.float32
    device = z.device if torch.is_tensor(z) else next(net.parameters()).device

    def noise():                                                            # 4.5: std sqrt(tau)
        eps = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return math.sqrt(temperature) * eps
    return noise(), noise, steps


class RectifiedFlow(nn.Module):
    """x_t = (1-t) x + t eps, F = dx/dt = eps - x, t in (0, 1) (Liu et al. 2023; AudioCALM)."""
    has_jvp = False                          # its loss differentiates the network by its inputs

    def __init__(self, net, cfg):
        super().__init__()
        self.net, self.cfg = net, cfg

    def set_step(self, step):
        """Nothing here depends on the training step."""

    def loss(self, z, x):
        """||F(x_t, t, z) - (eps - x)||² / D. (.., C), (.., D) -> (..), metrics."""
        x, eps, u = draw(x, self.cfg)
        t = torch.sigmoid(u)                                                # t / (1-t) = e^u
        x_t = x + t[..., None] * (eps - x)
        F = fp32(self.net(x_t, t, z))
        return finish((F - (eps - x)).square().mean(-1), u, self.cfg)

    @torch.no_grad()
    def sample(self, z, *, steps=None, temperature=1.0, generator=None, shape=None):
        """Integrate dx/dt = F from t = 1 to 0 on a uniform grid. z (.., C) -> x (.., D)."""
        x, _, steps = start(self.net, z, self.cfg, 20, shape, steps, temperature, generator)
        times = torch.linspace(1, 0, steps + 1, device=x.device, dtype=x.dtype)
        for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
            F = fp32(self.net(x, t.expand(x.shape[:-1]), z))
            x_s = x + (s - t) * F
            if self.cfg.solver == "heun" and i < steps - 1:               # last step: see TrigFlow
                F_s = fp32(self.net(x_s, s.expand(x.shape[:-1]), z))
                x_s = x + (s - t) * (F + F_s) / 2
            x = x_s
        return x


class TrigFlow(nn.Module):
    """x_t = cos t x + sin t eps, F = dx/dt = cos t eps - sin t x, t in (0, π/2) (CALM 4.2, sCM 3).

    Variance 1 at every t, and the same F as Consistency, which can therefore start from its
    weights.
    """
    has_jvp = False

    def __init__(self, net, cfg):
        super().__init__()
        self.net, self.cfg = net, cfg

    def set_step(self, step):
        """Nothing here depends on the training step."""

    def loss(self, z, x):
        """||F(x_t, t, z) - (cos t eps - sin t x)||² / D. (.., C), (.., D) -> (..), metrics."""
        x, eps, u = draw(x, self.cfg)
        t = torch.atan(u.exp())                                             # tan t = e^u
        cos, sin = t.cos()[..., None], t.sin()[..., None]
        F = fp32(self.net(cos * x + sin * eps, t, z))
        return finish((F - (cos * eps - sin * x)).square().mean(-1), u, self.cfg)

    @torch.no_grad()
    def sample(self, z, *, steps=None, temperature=1.0, generator=None, shape=None):
        """Integrate dx/dt = F from t = π/2 to 0, a grid uniform in t. z (.., C) -> x (.., D).

        A step is a rotation: x_s = cos(t-s) x_t - sin(t-s) F. It moves along the path of the x and
        eps that F predicts (it is DDIM), so it is exact wherever these are constant, with any step,
        and keeps the variance; an Euler step x_t - (t-s) F leaves the circle, by 57 % when 1 step
        goes from π/2 to 0. heun corrects it with the F found at s: x'' + x = w with w constant over
        a step. The last step stays first order (as in EDM): F at t = 0 is a guess of noise that is
        not there.
        """
        x, _, steps = start(self.net, z, self.cfg, 20, shape, steps, temperature, generator)
        times = torch.linspace(HALF_PI, 0, steps + 1, device=x.device, dtype=x.dtype)
        for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
            cos, sin = (t - s).cos(), (t - s).sin()
            F = fp32(self.net(x, t.expand(x.shape[:-1]), z))
            x_s = cos * x - sin * F
            if self.cfg.solver == "heun" and i < steps - 1:
                F_s = fp32(self.net(x_s, s.expand(x.shape[:-1]), z))
                x_s = x_s - ((t - s) / 2).tan() * (F_s - (cos * F + sin * x))
            x = x_s
        return x


def consistency_tangent(net, x_t, t, dxdt, z, r=1.0):
    """g = cos t df/dt along the trajectory, f = cos t x_t - sin t F (sCM, Eq. 8 and Algorithm 1).

        df/dt = -cos t (F - dx/dt) - sin t (x_t + dF/dt),   dF/dt = dF/dx dx/dt + ∂F/∂t (both terms)
        g     = -cos² t (F - dx/dt) - r (cos t sin t x_t + J)
        J     = cos t sin t dF/dt: one jvp whose tangents are multiplied by cos t sin t before
                it, which keeps it finite near π/2

    x_t, dxdt (.., D), t (..); r in [0, 1] is the warm-up, 1 = the true derivative. Returns g (..,
    D) without gradient. The caller turns autocast off. dxdt is cos t eps - sin t x with the x and
    eps of the pair (training without a teacher), or the flow's F (exact).
    """
    cos, sin = t.cos(), t.sin()
    with torch.no_grad():
        F, J = torch.func.jvp(lambda x, time: net(x, time, z), (x_t, t),
                              ((cos * sin)[..., None] * dxdt, cos * sin))
        cos, sin = cos[..., None], sin[..., None]
        return -cos.square() * (F - dxdt) - r * (cos * sin * x_t + J)


class Consistency(nn.Module):
    """f(x_t, t) = cos t x_t - sin t F(x_t, t) jumps to the data in one step; f(x, 0) = x by form.

    CALM Eq. 1 and 3 without a teacher, sCM's way: dx/dt is the pair's, a draw whose mean is the
    flow's. With `teach` it is the flow's F itself (sCM's consistency distillation): the same
    minimum without that noise in every target. The loss hovers and tells nothing about quality:
    watch tangent_max and energy_score. Two passes: the jvp without graph, then a plain forward with
    one; one pass gives the same gradient and takes 2.5 x the memory.
    """
    has_jvp = True

    def __init__(self, net, cfg):
        super().__init__()
        self.net, self.cfg, self.teacher = net, cfg, []
        self.register_buffer("it", torch.zeros((), dtype=torch.long))       # training step, for r
        if cfg.adaptive:
            self.psi = nn.Linear(256, 1)                                    # w_psi(t)
            nn.init.zeros_(self.psi.weight)
            nn.init.zeros_(self.psi.bias)

    def set_step(self, step):
        """The training step, for the warm-up of r."""
        self.it.fill_(step)

    def f(self, x_t, t, z):
        """The consistency function: x_t (.., D), t (..), z (.., C) -> clean x (.., D)."""
        return t.cos()[..., None] * x_t - t.sin()[..., None] * fp32(self.net(x_t, t, z))

    def loss(self, z, x):
        """e^w(t) / D ||F - sg(F) - g / (||g|| + c)||² - w(t). (.., C), (.., D) -> (..), metrics.

        Gradients reach the network and z through the plain F only. The warm-up is at step `it`,
        which the training loop sets.
        """
        cfg = self.cfg
        x, eps, u = draw(x, cfg)
        t = torch.atan(u.exp())
        cos, sin = t.cos()[..., None], t.sin()[..., None]
        x_t, dxdt = cos * x + sin * eps, cos * eps - sin * x
        if self.teacher:
            with torch.no_grad():
                dxdt = fp32(self.teacher[0](x_t, t, z))
        r = (self.it / cfg.warmup).clamp(max=1) if cfg.warmup else 1.0
        with torch.autocast(x.device.type, enabled=False):
            g = consistency_tangent(self.net, x_t, t, dxdt, z, r)           # (M, .., D)
            w = self.psi(sinusoid(t).to(self.psi.weight.dtype))[..., 0] if cfg.adaptive else None
        size = g.norm(dim=-1, keepdim=True)                                 # (M, .., 1)
        F = fp32(self.net(x_t, t, z))
        error = (F - F.detach() - g / (size + cfg.tangent_c)).square().mean(-1)
        loss, metrics = finish(w.exp() * error - w if cfg.adaptive else error, u, cfg, error)
        return loss, metrics | {"tangent_max": size.max(), "tangent_mean": size.mean()}

    @torch.no_grad()
    def sample(self, z, *, steps=None, temperature=1.0, generator=None, shape=None):
        """1 step: f(sqrt(tau) eps, π/2). More: noise again to t, jump again. (.., C) -> (.., D).

        Times π/2 (1 - k / steps): for 2 to 4 steps other grids differ within noise. The new noise
        has std sqrt(tau) too. Stochastic, so many steps accumulate error (Tab. 6: worse beyond 4 to
        10).
        """
        x_t, noise, steps = start(self.net, z, self.cfg, 1, shape, steps, temperature, generator)
        times = torch.linspace(HALF_PI, 0, steps + 1, device=x_t.device, dtype=x_t.dtype)
        for i, t in enumerate(times[:-1]):
            if i > 0:
                x_t = t.cos() * x + t.sin() * noise()
            x = self.f(x_t, t.expand(x_t.shape[:-1]), z)
        return x

    def teach(self):
        """The network as it is now, TrigFlow's after load_flow, becomes the teacher: a frozen copy.

        It knows the z that it was trained with: what makes z must not learn from here on.
        """
        self.teacher = [copy.deepcopy(self.net).requires_grad_(False)]     # a list: not saved

    def load_flow(self, state_dict):
        """Start from a TrigFlow's state_dict: every weight of the network must be there and fit.

        Only what TrigFlow does not have (it, psi) keeps its value. A Consistency state_dict loads
        as usual. RectifiedFlow's names are the same but its F means something else: do not.
        """
        own = {k: v for k, v in self.state_dict().items() if not k.startswith("net.")}
        self.load_state_dict(own | state_dict)                              # strict


class LSD(nn.Module):
    """A flow map f(x_t, t, s) = x_t + (s-t) F(x_t, t, s), which jumps from time t to s < t.

    Path and times are RectifiedFlow's: x_t = (1-t) x + t eps. Two conditions make f the flow map of
    that flow (Boffi et al. 2025; the paper's third version; as Pocket TTS trains it):

        diagonal:  F(x_t, t, t) = eps - x                             flow matching
        off it:    df/ds = F + (s-t) ∂F/∂s = F(f, s, s)               f moves as the flow does at f

        D L = (1-distill) ||F(x_t, t, t) - (eps - x)||² + distill ||df/ds - sg(F(f, s, s))||²

    ∂F/∂s is one jvp, and the gradient goes through it (reverse over forward). A quarter of the M
    draws, at least one, has the second term, which costs two passes more. Pocket TTS computes it on
    a random quarter of the steps instead; the expectation is the same. The target is a constant;
    with the gradient through its x (not its weights) they found the same quality.

    On the 3-mode toy of tests/test_heads.py, 300 steps, energy distance with 1, 2, 4 steps: .06,
    .02, .01; Consistency .07, .06, .07 (two seeds).
    """
    has_jvp = True

    def __init__(self, net, cfg):
        super().__init__()
        self.net, self.cfg = net, cfg
        if cfg.adaptive:
            self.psi = nn.Linear(512, 1)                                    # w_psi(t, s)
            nn.init.zeros_(self.psi.weight)
            nn.init.zeros_(self.psi.bias)

    def f(self, x_t, t, s, z):
        """The flow map: x_t (.., D), t, s (..), z (.., C) -> x_s (.., D)."""
        return x_t + (s - t)[..., None] * fp32(self.net(x_t, t, z, s))

    def set_step(self, step):
        """Nothing here depends on the training step."""

    def weigh(self, loss, t, s):
        if not self.cfg.adaptive:
            return loss
        with torch.autocast(loss.device.type, enabled=False):
            times = torch.cat([sinusoid(t), sinusoid(s)], -1)               # (M, .., 512)
            w = self.psi(times.to(self.psi.weight.dtype))[..., 0]
        return w.exp() * loss - w

    def loss(self, z, x):
        """The loss above. (.., C), (.., D) -> (..), metrics: loss_* of the diagonal, lsd off it."""
        cfg = self.cfg
        x, eps, u = draw(x, cfg)
        t = torch.sigmoid(u)
        x_t, v = x + t[..., None] * (eps - x), eps - x
        diagonal = (fp32(self.net(x_t, t, z, t)) - v).square().mean(-1)
        flow, metrics = finish(self.weigh(diagonal, t, t), u, cfg, diagonal)
        if cfg.multiplier > 1:
            few = slice(-(-cfg.multiplier // 4))
            x, v, t = x[few], v[few], t[few]                                # (M / 4, .., D)
        other = torch.sigmoid(cfg.p_mean + cfg.p_std * torch.randn_like(t))
        t, s = torch.maximum(t, other), torch.minimum(t, other)             # towards less noise
        x_t = x + t[..., None] * v
        # F as a function of s alone; a network that is a whole backbone runs it only once for this
        part = self.net.towards(x_t, t, z)
        with torch.autocast(x.device.type, enabled=False):
            F, dFds = torch.func.jvp(lambda s: fp32(part(s)), (s,), (torch.ones_like(s),))
        jump = (s - t)[..., None]
        with torch.no_grad():
            target = fp32(self.net(x_t + jump * F, s, z, s))
        error = (F + jump * dFds - target).square().mean(-1)
        jumps = self.weigh(error, t, s)
        jumps = jumps.mean(0) if cfg.multiplier > 1 else jumps
        return ((1 - cfg.distill) * flow + cfg.distill * jumps,
                metrics | {"lsd": error.detach().mean()})

    @torch.no_grad()
    def sample(self, z, *, steps=None, temperature=1.0, generator=None, shape=None):
        """1 step: f(sqrt(tau) eps, 1, 0). More: jumps over a uniform grid. (.., C) -> (.., D).

        No noise is added on the way: with the exact map any number of steps gives the same x.
        """
        x, _, steps = start(self.net, z, self.cfg, 1, shape, steps, temperature, generator)
        times = torch.linspace(1, 0, steps + 1, device=x.device, dtype=x.dtype)
        for t, s in zip(times[:-1], times[1:]):
            x = self.f(x, t.expand(x.shape[:-1]), s.expand(x.shape[:-1]), z)
        return x

    def load_flow(self, state_dict):
        """Start from a RectifiedFlow's state_dict: the diagonal then is that flow, exactly.

        The second time's embedding starts as a copy of the first's. An LSD state_dict loads as
        usual; a TrigFlow's F means something else: do not.
        """
        second = {k: state_dict[k.replace(".until.", ".time.")] for k in self.state_dict()
                  if ".until." in k and k not in state_dict}
        own = {k: v for k, v in self.state_dict().items() if not k.startswith("net.")}
        self.load_state_dict(own | second | state_dict)                     # strict


# ------------------------------------------------------------------------------------------ by name

def with_mlp(objective, two_times=False):
    """(dim, cond_dim, cfg) -> the objective with an AdaLNMLP inside."""
    return lambda dim, cond_dim, cfg: objective(
        AdaLNMLP(dim, cond_dim, cfg.width, cfg.blocks, two_times, cfg.time_norm), cfg)


HEADS = {                                            # HEADS[cfg.objective](dim, cond_dim, cfg)
    "rectified_flow": with_mlp(RectifiedFlow),
    "trigflow": with_mlp(TrigFlow),
    "consistency": with_mlp(Consistency),
    "lsd": with_mlp(LSD, two_times=True),
}
