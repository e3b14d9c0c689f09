"""From the backbone's z to the next latent x: one small network, four objectives.

    z (.., C) ─► objective ─┬─ loss:   x (.., D) ─ noise ─► x_t, compare F(x_t, t, z) to its target
                            └─ sample: noise eps ─► F, `steps` times ─► x (.., D)
                 network F: adaln.py, a small MLP modulated by t and z

A head is an objective and its network. An objective defines the noising path, the times, the loss
and the solver. A network is any callable `net(x_t, t, z) -> F`; for LSD, which has two times,
`net(x_t, t, z, s)`; for these two it also has a derivative (below). Outside construction and
compilation the rest of the code uses only these four members, which the two discrete objectives in
discrete.py, whose x are codes, have too:

    loss(z, x, weight=) -> (loss per position, metrics)
    sample(z, steps=, temperature=, ...) -> x
    set_step(step): the optimizer step               has_jvp: whether the loss differentiates net
    draws(x, source): the random numbers of a loss, which is a function of them once they are given

weight (..) is 1 where a position counts and 0 where it is padding: metrics leave out padding, and
the loss per position is the caller's to weigh.

    objective      path                        the network learns               steps  paper
    RectifiedFlow  x_t = (1-t) x + t eps       F = eps - x,             t < 1    20    Liu 2023
    TrigFlow       x_t = cos t x + sin t eps   F = cos t eps - sin t x, t < π/2  20    4.2, Table 4
    Consistency    the same path               f = cos t x_t - sin t F, f = x_0   1    eq. 1, eq. 3
    LSD            RectifiedFlow's path        f = x_t + (s-t) F(t, s), f = x_s   1    CALM v3

Sources: CALM (arXiv 2509.06926) sections 3.2 (eq. 1), 4.2 (eq. 3), 4.4 (head batch multiplier), 4.5
(temperature) and Table 9; the network is MAR's (Li et al. 2024, arXiv 2406.11838); consistency is
sCM (Lu & Song 2025, arXiv 2410.11081); LSD, Lagrangian self-distillation of flow maps, is from
Boffi et al. 2025 (arXiv 2505.18825). "CALM v3" is the third version of the arXiv paper, which adds
text to speech with LSD; Pocket TTS is Kyutai's released model of that kind.
Shapes: N positions or any leading dims (..), D latent channels, C channels of z, w width of the
MLP, M head batch multiplier. Latents have mean 0 and variance 1 per channel (sCM's sigma_d = 1).

Where this differs from the printed CALM paper, and why:
- t lies in (0, π/2) and sampling starts at π/2. The paper writes t ~ [0, 1] and starts at t = 1,
  but cos 1 = 0.54: a network trained on [0, 1] never sees pure noise, which is where a one-step
  sample starts.
- The temperature tau multiplies the std of the noise by sqrt(tau). The paper's "variance
  1/sqrt(tau)" would make a low temperature noisier; CALM v3 states it correctly.
- df/dt in eq. 3 is a target without gradient (as in eq. 1 and CALM v3). With gradient the
  model is biased.
- Not in the paper, but in sCM, and without it the gradient has spikes: the tangent g is divided
  by ||g|| + 0.1, it can be warmed up (r), and tan t is log-normal instead of t being uniform.
- w_psi(t), the adaptive weight of eq. 1, is optional: see HeadConfig.adaptive.
- LSD counts time as RectifiedFlow does, 0 = data and 1 = noise (Pocket TTS the other way round),
  so that its diagonal s = t is that flow.

Precision: times, cos and sin, time embedding, norms, the residual stream, the targets and the loss
are fp32, even under autocast; only the network's matrix products follow autocast, those of its
derivative too. In bf16 that moves Consistency's normalised tangent by 0.9 % (median; 99 %: 2 %),
mean over draws 0.03 %, on a trained head of 256 x 4. On CUDA train.py allows TF32, in which the
matrix products of the time embedding then run. float64 inputs stay float64 (used by the tests).
"""
import copy
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from adaln import AdaLNMLP, fp32, sinusoid
from noise import normal, rows_along
from schema import Range

HALF_PI = math.pi / 2


@dataclass
class HeadConfig:
    """The [lm.head] and [audiocalm.head] tables."""
    # ---- all objectives
    # What the head learns. TrigFlow is the paper's best and slowest (Table 4), consistency its
    # choice for real time, lsd that of CALM v3 for speech; consistency starts well from TrigFlow's
    # weights (Consistency.load_flow). rq and delay are the discrete baselines (discrete.py), which
    # need [vae] bottleneck = "rvq".
    objective: Literal["rectified_flow", "trigflow", "consistency", "lsd",
                       "rq", "delay"] = "trigflow"
    # Channels inside the MLP. Table 9: 3072 (music, 601M parameters), 512 (speech, 10M); rq: 1024.
    width: Annotated[int, Range(1, 100_000)] = 192
    # Residual blocks. Table 9: 12 (music), 6 (speech); rq: 6 transformer layers.
    blocks: Annotated[int, Range(1, 10_000)] = 3
    # Head batch multiplier M (section 4.4; Table 9: 8): samples of (t, eps) per position and step.
    # One pass of the backbone serves M losses; the head's memory and time grow M times.
    multiplier: Annotated[int, Range(1, 10_000)] = 4
    # Mean and std of log(noise / signal), the same for all objectives: the log of tan t, or of
    # t / (1-t) for rectified_flow (where 0, 1 is SD3's logit-normal). Not given in the paper; sCM
    # uses -1, 1.4 on images; -0.4, 1.4 trained on every seed of our toys.
    p_mean: float = -0.4
    p_std: Annotated[float, Range(above=0)] = 1.4
    # Divide each embedded time by its std over the width, times a learned factor per channel (as in
    # Pocket TTS, not in MAR). sinusoid() already does this to the input of the embedding's MLP.
    time_norm: bool = False
    # Default number of solver steps in sample(); 0 = 20 for the flows, else 1. Table 4 has 1 and 4
    # for consistency, 100 for TrigFlow; consistency degrades beyond 4 to 10 (Table 6).
    steps: Annotated[int, Range(0, 10_000)] = 0

    # ---- flows (the others ignore it)
    # euler (one evaluation per step) or heun (two, second order).
    solver: Literal["euler", "heun"] = "euler"

    # ---- consistency and lsd
    # Learn w_psi(t) of eq. 1 and eq. 3 (257 parameters): the loss exp(w) error - w weighs all t the
    # same; lsd: w(t, s) (513 parameters). The reported loss is then about 1 - w, even negative. On
    # in the paper; off here: in our toys it was no better, and lsd diverged.
    adaptive: bool = False

    # ---- consistency
    # Optimizer steps over which r goes from 0 (flow matching) to 1 (sCM: 10k). 0 = r is 1 from the
    # start, which was stable from scratch and is right when starting from TrigFlow.
    warmup: Annotated[int, Range(0, 1_000_000_000)] = 0
    # c in g / (||g|| + c), 0.1 as in sCM. Not in the paper.
    tangent_c: Annotated[float, Range(above=0)] = 0.1

    # ---- lsd
    # Weight of the self-distillation; flow matching on the diagonal has the rest (CALM v3: 0.25).
    distill: Annotated[float, Range(above=0, below=1)] = 0.25

    # ---- rq and delay (discrete.py)
    # rq: attention heads (Table 9: 16).
    depth_heads: Annotated[int, Range(1, 10_000)] = 16
    # rq: sets of weights: one for each of the first levels, the remaining levels share the last;
    # 0 = one per level.
    sets: Annotated[int, Range(0, 10_000)] = 0
    # rq, delay: sample among this many most likely codes; 0 = all (MusicGen's default is 250).
    top_k: Annotated[int, Range(0, 1_000_000)] = 0

    def __post_init__(self):
        if self.objective == "rq" and self.width % self.depth_heads:
            raise ValueError(f"depth_heads: must divide width = {self.width}, "
                             f"got {self.depth_heads}")

    @property
    def sample_steps(self):
        """Number of solver steps that sample() takes by default."""
        is_flow = self.objective in ("rectified_flow", "trigflow")
        return self.steps or (20 if is_flow else 1)


# --------------------------------------------------------------------------------------- objectives
# Contract with the network: net(x_t, t, z), or net(x_t, t, z, s) for LSD. x_t (.., D) and t, s (..)
# are fp32; z is what loss or sample was given, unchanged. With multiplier M > 1, loss adds an axis
# in front of x_t, t and s: M, or M / 4, rounded up, for LSD's jumps. net.dim is D. All channels of
# a position share one t: a network that denoises blocks takes x (B, blocks, block * D).
# For its loss, Consistency also calls net.jvp(x_t, t, z, dx, dt) -> F, dF = ∂F/∂x dx + ∂F/∂t dt, dF
# without gradient; LSD calls net.jvp_s(x_t, t, z, s) -> F, ∂F/∂s, both with gradient. A network
# that has no tangents of its own can return those of torch.func.jvp.

def sample_noise_and_log_ratio(x, cfg, source=None):
    """Noise for M repeats of x (.., D), and how much of it there is.

    Returns eps (M, .., D) and u = log(noise / signal) ~ N(p_mean, p_std²) (M, ..), each independent
    for every position and repeat; without the axis M if M = 1. The objectives turn u into a time.
    source: of random numbers (noise.py).
    """
    x = fp32(x)
    shape = (cfg.multiplier, *x.shape) if cfg.multiplier > 1 else x.shape   # CALM 4.4
    source = rows_along(source, len(shape) - x.dim())
    eps = normal(shape, source, x.device, x.dtype)
    u = cfg.p_mean + cfg.p_std * normal(shape[:-1], source, x.device, x.dtype)
    return eps, u


def average_over_draws(loss, cfg):
    """Mean over the M samples of (t, eps): (M, ..) -> (..) (head batch multiplier)."""
    return loss.mean(0) if cfg.multiplier > 1 else loss


def weighted_mean(values, weight=None):
    """Mean of values (M, ..), without gradient; weight (..): 0 at padding, None = all count."""
    values = values.detach()
    if weight is None:
        return values.mean()
    weight = weight.expand_as(values)
    return (values * weight).sum() / weight.sum().clamp(min=1)


def error_by_noise_level(error, u, cfg, weight=None):
    """Metrics: the mean error (M, ..) in the thirds of low, middle and high noise u (M, ..).

    weight (..): 0 at padding.
    """
    weight = torch.ones_like(error) if weight is None else weight
    n = (u - cfg.p_mean) / cfg.p_std                                        # ~ N(0, 1)

    # -0.43 and 0.43 cut N(0, 1) into thirds
    thirds = {"low": n < -0.43, "mid": n.abs() <= 0.43, "high": n > 0.43}
    return {f"loss_{name}": weighted_mean(error, third * weight)
            for name, third in thirds.items()}


def adaptive_weight(width):
    """w_psi of eq. 1: a linear layer on embedded times, zero at initialisation."""
    psi = nn.Linear(width, 1)
    nn.init.zeros_(psi.weight)
    nn.init.zeros_(psi.bias)
    return psi


def apply_adaptive_weight(psi, error, *times):
    """e^w error - w with w = w_psi(times) (eq. 1): error and times (M, ..) -> (M, ..)."""
    if psi is None:
        return error
    with torch.autocast(error.device.type, enabled=False):
        embedded = torch.cat([sinusoid(t) for t in times], dim=-1)          # (M, .., 256 or 512)
        w = psi(embedded.to(psi.weight.dtype))[..., 0]                      # (M, ..)
    return w.exp() * error - w


def solver_steps(steps, cfg, default):
    """The number of solver steps: the argument, else the config's, else the objective's default."""
    steps = steps or cfg.steps or default
    if steps < 1:
        raise ValueError(f"steps: must be an integer of at least 1, got {steps}")
    return steps


def tempered_noise(net, z, temperature, generator, shape):
    """Gaussian noise of std sqrt(tau), tau = temperature (section 4.5).

    Its shape is (.., D) for z (.., C), or `shape` where z is no tensor (AudioCALM's Context).
    """
    if temperature < 0:
        raise ValueError(f"temperature: must be at least 0, got {temperature}")
    shape = shape or (*z.shape[:-1], net.dim)
    device = z.device if torch.is_tensor(z) else next(net.parameters()).device
    dtype = torch.promote_types(z.dtype, torch.float32) if torch.is_tensor(z) else torch.float32
    eps = normal(shape, generator, device, dtype)
    return math.sqrt(temperature) * eps                                     # CALM 4.5


class RectifiedFlow(nn.Module):
    """x_t = (1-t) x + t eps, F = dx/dt = eps - x, t in (0, 1) (Liu et al. 2023; AudioCALM)."""
    has_jvp = False                          # whether the loss differentiates net by its inputs

    def __init__(self, net, cfg):
        super().__init__()
        self.net = net
        self.cfg = cfg

    def set_step(self, step):
        """Nothing here depends on the training step."""

    def draws(self, x, source=None):
        """eps (M, .., D) and u (M, ..) for a loss on x (.., D)."""
        return sample_noise_and_log_ratio(x, self.cfg, source)

    def loss(self, z, x, weight=None, draws=None):
        """||F(x_t, t, z) - (eps - x)||² / D. z (.., C), x (.., D) -> (..), metrics."""
        # noise the data
        x = fp32(x)
        eps, u = draws or self.draws(x)                                     # (M, .., D), u (M, ..)
        t = torch.sigmoid(u)                                                # t / (1-t) = e^u
        x_t = x + t[..., None] * (eps - x)

        # evaluate the network, compare with dx/dt
        F = fp32(self.net(x_t, t, z))                                       # (M, .., D)
        error = (F - (eps - x)).square().mean(-1)                           # (M, ..)
        metrics = error_by_noise_level(error, u, self.cfg, weight)
        return average_over_draws(error, self.cfg), metrics

    @torch.no_grad()
    def sample(self, z, *, steps=None, temperature=1.0, generator=None, shape=None):
        """Integrate dx/dt = F from t = 1 to 0 on a uniform grid. z (.., C) -> x (.., D).

        shape: of the noise, where z is no tensor (AudioCALM's Context); so for all objectives.
        """
        steps = solver_steps(steps, self.cfg, default=20)
        x = tempered_noise(self.net, z, temperature, generator, shape)      # (.., D)
        times = torch.linspace(1, 0, steps + 1, device=x.device, dtype=x.dtype)

        for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
            # Euler
            F = fp32(self.net(x, t.expand(x.shape[:-1]), z))
            x_s = x + (s - t) * F

            # Heun: the mean of F at both ends, but not in the last step (see TrigFlow)
            if self.cfg.solver == "heun" and i < steps - 1:
                F_s = fp32(self.net(x_s, s.expand(x.shape[:-1]), z))
                x_s = x + (s - t) * (F + F_s) / 2
            x = x_s
        return x


class TrigFlow(nn.Module):
    """x_t = cos t x + sin t eps, F = dx/dt = cos t eps - sin t x, t in (0, π/2).

    Section 4.2; sCM, section 3. x_t has variance 1 at every t. Consistency has the same F and can
    start from its weights.
    """
    has_jvp = False

    def __init__(self, net, cfg):
        super().__init__()
        self.net = net
        self.cfg = cfg

    def set_step(self, step):
        """Nothing here depends on the training step."""

    def draws(self, x, source=None):
        """eps (M, .., D) and u (M, ..) for a loss on x (.., D)."""
        return sample_noise_and_log_ratio(x, self.cfg, source)

    def loss(self, z, x, weight=None, draws=None):
        """||F(x_t, t, z) - (cos t eps - sin t x)||² / D. z (.., C), x (.., D) -> (..), metrics."""
        # noise the data
        x = fp32(x)
        eps, u = draws or self.draws(x)                                     # (M, .., D), u (M, ..)
        t = torch.atan(u.exp())                                             # tan t = e^u
        cos = t.cos()[..., None]                                            # (M, .., 1)
        sin = t.sin()[..., None]
        x_t = cos * x + sin * eps

        # evaluate the network, compare with dx/dt
        F = fp32(self.net(x_t, t, z))                                       # (M, .., D)
        error = (F - (cos * eps - sin * x)).square().mean(-1)               # (M, ..)
        metrics = error_by_noise_level(error, u, self.cfg, weight)
        return average_over_draws(error, self.cfg), metrics

    @torch.no_grad()
    def sample(self, z, *, steps=None, temperature=1.0, generator=None, shape=None):
        """Integrate dx/dt = F from t = π/2 to 0 on a grid uniform in t. z (.., C) -> x (.., D).

        A step is a rotation, x_s = cos(t-s) x_t - sin(t-s) F. It follows the path of the x and eps
        that F predicts (it is DDIM), so with any step size it is exact where these are constant,
        and it keeps the variance. An Euler step x_t - (t-s) F leaves the circle, by 86 % when one
        step goes from π/2 to 0 (radius sqrt(1 + π²/4)). heun corrects the rotation with F at s, by
        solving x'' + x = w with w constant over the step. The last step stays first order (as in
        EDM): F at t = 0 would be an estimate of noise in data that has none.
        """
        steps = solver_steps(steps, self.cfg, default=20)
        x = tempered_noise(self.net, z, temperature, generator, shape)      # (.., D)
        times = torch.linspace(HALF_PI, 0, steps + 1, device=x.device, dtype=x.dtype)

        for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
            # rotate
            cos, sin = (t - s).cos(), (t - s).sin()
            F = fp32(self.net(x, t.expand(x.shape[:-1]), z))
            x_s = cos * x - sin * F

            # Heun's correction
            if self.cfg.solver == "heun" and i < steps - 1:
                F_s = fp32(self.net(x_s, s.expand(x.shape[:-1]), z))
                x_s = x_s - ((t - s) / 2).tan() * (F_s - (cos * F + sin * x))
            x = x_s
        return x


def consistency_tangent(net, x_t, t, dxdt, z, r=1.0):
    """F and g = cos t df/dt along the trajectory, f = cos t x_t - sin t F (sCM, Algorithm 1).

        df/dt = -cos t (F - dx/dt) - sin t (x_t + dF/dt),   dF/dt = ∂F/∂x dx/dt + ∂F/∂t
        g     = -cos² t (F - dx/dt) - r (cos t sin t x_t + J)
        J     = cos t sin t dF/dt: one jvp; its tangents are scaled first, which avoids overflow
                near π/2

    x_t, dxdt (.., D), t (..) -> F (.., D) and, without gradient, g (.., D). dxdt is cos t eps -
    sin t x with the x and eps that made x_t (training without a teacher), or the flow's F (exact).
    r in [0, 1] is the warm-up; 1 gives the true derivative.
    """
    with torch.no_grad():
        cos = t.cos()[..., None]                                            # (.., 1)
        sin = t.sin()[..., None]
        scale = cos * sin
    F, J = net.jvp(x_t, t, z, scale * dxdt, scale[..., 0])                  # (.., D)

    F = fp32(F)
    with torch.no_grad():
        return F, -cos.square() * (F - dxdt) - r * (scale * x_t + J)


class Consistency(nn.Module):
    """f(x_t, t) = cos t x_t - sin t F(x_t, t) jumps to the data in one step; f(x, 0) = x by design.

    Eq. 1 and eq. 3, trained as in sCM. Without a teacher, dx/dt is that of the sampled pair
    (x, eps), whose mean is the flow's. After `teach` it is F of the flow itself (sCM's consistency
    distillation): the same minimum, without the pair's noise in every target.

    The loss hovers and does not measure quality: watch tangent_max and energy_score. Computing it
    takes one pass, which returns F with a graph and its derivative without: a forward more than
    TrigFlow's loss, and no more memory.
    """
    has_jvp = True

    def __init__(self, net, cfg):
        super().__init__()
        self.net = net
        self.cfg = cfg
        # the network of teach(); a list hides it from parameters() and state_dict()
        self.teacher = []
        self.register_buffer("it", torch.zeros((), dtype=torch.long))       # optimizer step, for r
        self.psi = adaptive_weight(256) if cfg.adaptive else None           # w_psi(t)

    def set_step(self, step):
        """Set the optimizer step (not the micro-batch), on which the warm-up r depends."""
        self.it.fill_(step)

    def f(self, x_t, t, z):
        """The consistency function: x_t (.., D), t (..), z (.., C) -> clean x (.., D)."""
        F = fp32(self.net(x_t, t, z))
        return t.cos()[..., None] * x_t - t.sin()[..., None] * F

    def draws(self, x, source=None):
        """eps (M, .., D) and u (M, ..) for a loss on x (.., D)."""
        return sample_noise_and_log_ratio(x, self.cfg, source)

    def loss(self, z, x, weight=None, draws=None):
        """exp(w(t)) · ||F - sg(F) - g / (||g|| + tangent_c)||² / D - w(t), sg: no gradient (eq. 3).

        z (.., C), x (.., D) -> (..), metrics. Gradients reach the network and z through F only.
        """
        cfg = self.cfg

        # noise the data
        x = fp32(x)
        eps, u = draws or self.draws(x)                                     # (M, .., D), u (M, ..)
        t = torch.atan(u.exp())                                             # tan t = e^u
        cos = t.cos()[..., None]                                            # (M, .., 1)
        sin = t.sin()[..., None]
        x_t = cos * x + sin * eps                                           # (M, .., D)

        # dx/dt of the sampled pair, or of the teacher's flow
        dxdt = cos * eps - sin * x                                          # (M, .., D)
        if self.teacher:
            with torch.no_grad():
                dxdt = fp32(self.teacher[0](x_t, t, z))

        # the network, and the tangent g = cos t df/dt (last term of eq. 1 and eq. 3), normalised
        r = (self.it / cfg.warmup).clamp(max=1) if cfg.warmup else 1.0
        F, g = consistency_tangent(self.net, x_t, t, dxdt, z, r)            # 2 x (M, .., D)
        g_norm = g.norm(dim=-1, keepdim=True)                               # (M, .., 1)
        g = g / (g_norm + cfg.tangent_c)

        # compare the network with itself plus the tangent
        error = (F - F.detach() - g).square().mean(-1)                      # CALM eq. 1, CALM eq. 3
        loss = apply_adaptive_weight(self.psi, error, t)

        g_norm = g_norm.squeeze(-1)                                         # (M, ..)
        metrics = error_by_noise_level(error, u, cfg, weight)
        metrics["tangent_max"] = (g_norm if weight is None else g_norm * weight).max()
        metrics["tangent_mean"] = weighted_mean(g_norm, weight)
        return average_over_draws(loss, cfg), metrics

    @torch.no_grad()
    def sample(self, z, *, steps=None, temperature=1.0, generator=None, shape=None):
        """One step: f(sqrt(tau) eps, π/2). More steps: noise to t again and jump again.

        z (.., C) -> x (.., D). Times are π/2 (1 - k / steps): for 2 to 4 steps other grids differ
        within noise. The new noise has std sqrt(tau) too. Because every step samples noise, many
        steps accumulate error (Table 6: worse beyond 4 to 10).
        """
        steps = solver_steps(steps, self.cfg, default=1)
        x_t = tempered_noise(self.net, z, temperature, generator, shape)    # (.., D)
        times = torch.linspace(HALF_PI, 0, steps + 1, device=x_t.device, dtype=x_t.dtype)

        for i, t in enumerate(times[:-1]):
            if i > 0:                                                       # noise x to t again
                eps = tempered_noise(self.net, z, temperature, generator, shape)
                x_t = t.cos() * x + t.sin() * eps
            x = self.f(x_t, t.expand(x_t.shape[:-1]), z)
        return x

    def teach(self):
        """Make a frozen copy of the network, TrigFlow's after load_flow, the teacher.

        The teacher expects the z that it was trained with: whatever computes z must stay frozen
        from here on.
        """
        self.teacher = [copy.deepcopy(self.net).requires_grad_(False)]

    def load_flow(self, state_dict):
        """Start from a TrigFlow's state_dict, which must hold every weight of the network.

        What TrigFlow does not have (it, psi) keeps its value. A Consistency state_dict is loaded
        with load_state_dict. Do not load a RectifiedFlow's: the names match but F differs.
        """
        not_in_net = {k: v for k, v in self.state_dict().items() if not k.startswith("net.")}
        self.load_state_dict(not_in_net | state_dict)                       # strict


class LSD(nn.Module):
    """A flow map f(x_t, t, s) = x_t + (s-t) F(x_t, t, s), which jumps from time t to s < t.

    Path and times are RectifiedFlow's: x_t = (1-t) x + t eps. Two conditions make f the flow map of
    that flow (Boffi et al. 2025; CALM v3; trained as in Pocket TTS):

        diagonal:      F(x_t, t, t) = eps - x                         flow matching
        off-diagonal:  df/ds = F + (s-t) ∂F/∂s = F(f, s, s)           f moves as the flow does at f

        L = ((1-distill) ||F(x_t, t, t) - (eps - x)||² + distill ||df/ds - sg(F(f, s, s))||²) / D

    ∂F/∂s comes with F from the network (jvp_s), and the gradient goes through both. The second term
    is computed on a quarter of the M samples, at least one, and costs two more passes. Pocket TTS
    computes it on a random quarter of the steps instead; the expectation is the same. The target is
    a constant (sg); with a gradient through its x (not its weights) Pocket TTS's authors found the
    same quality.

    Energy distance on the 3-mode toy of tests/papers/test_heads.py after 300 steps, sampled with 1,
    2 and 4 steps: 0.06, 0.02, 0.01; Consistency 0.07, 0.06, 0.07 (two seeds).
    """
    has_jvp = True

    def __init__(self, net, cfg):
        super().__init__()
        self.net = net
        self.cfg = cfg
        self.psi = adaptive_weight(512) if cfg.adaptive else None           # w_psi(t, s)

    def set_step(self, step):
        """Nothing here depends on the training step."""

    def f(self, x_t, t, s, z):
        """The flow map: x_t (.., D), t, s (..), z (.., C) -> x_s (.., D)."""
        F = fp32(self.net(x_t, t, z, s))
        return x_t + (s - t)[..., None] * F

    def draws(self, x, source=None):
        """eps (M, .., D), u (M, ..), and for the first quarter of the repeats the other end of a
        jump, in (0, 1), (M/4, ..).
        """
        cfg = self.cfg
        eps, u = sample_noise_and_log_ratio(x, cfg, source)
        shape = u.shape
        if cfg.multiplier > 1:
            shape = (math.ceil(cfg.multiplier / 4), *u.shape[1:])
        other = normal(shape, rows_along(source, u.dim() + 1 - x.dim()), x.device, u.dtype)
        return eps, u, torch.sigmoid(cfg.p_mean + cfg.p_std * other)

    def loss(self, z, x, weight=None, draws=None):
        """The loss L above. z (.., C), x (.., D) -> (..), metrics.

        Metrics: loss_low, loss_mid, loss_high of the diagonal, lsd of the jumps.
        """
        cfg = self.cfg

        # noise the data
        x = fp32(x)
        eps, u, other = draws or self.draws(x)                              # (M, .., D), u (M, ..)
        t = torch.sigmoid(u)                                                # t / (1-t) = e^u
        v = eps - x                                                         # dx/dt
        x_t = x + t[..., None] * v

        # diagonal, s = t: flow matching
        F = fp32(self.net(x_t, t, z, t))                                    # (M, .., D)
        flow_error = (F - v).square().mean(-1)                              # (M, ..)
        flow_loss = apply_adaptive_weight(self.psi, flow_error, t, t)

        # off-diagonal: jumps to less noise, on the first quarter of the samples
        if cfg.multiplier > 1:
            v = v[:len(other)]                                              # (M/4, .., D)
            t = t[:len(other)]                                              # (M/4, ..)
        s = torch.minimum(t, other)
        t = torch.maximum(t, other)                                         # s < t
        jump_error = self.self_distillation_error(z, x + t[..., None] * v, t, s)
        jump_loss = apply_adaptive_weight(self.psi, jump_error, t, s)

        # mix
        loss = ((1 - cfg.distill) * average_over_draws(flow_loss, cfg)
                + cfg.distill * average_over_draws(jump_loss, cfg))         # (..)
        metrics = error_by_noise_level(flow_error, u, cfg, weight)
        metrics["lsd"] = weighted_mean(jump_error, weight)
        return loss, metrics

    def self_distillation_error(self, z, x_t, t, s):
        """||df/ds - sg(F(f, s, s))||² / D for jumps t -> s. x_t (M/4, .., D), t, s (M/4, ..)."""
        F, dFds = self.net.jvp_s(x_t, t, z, s)                              # 2 x (M/4, .., D)
        F = fp32(F)

        # the flow at the end of the jump, without gradient
        jump = (s - t)[..., None]                                           # (M/4, .., 1)
        with torch.no_grad():
            target = fp32(self.net(x_t + jump * F, s, z, s))                # (M/4, .., D)

        # compare df/ds with it
        return (F + jump * dFds - target).square().mean(-1)                 # (M/4, ..)

    @torch.no_grad()
    def sample(self, z, *, steps=None, temperature=1.0, generator=None, shape=None):
        """One step: f(sqrt(tau) eps, 1, 0). More steps: jumps on a uniform grid.

        z (.., C) -> x (.., D). No noise is added between jumps: with the exact map any number of
        steps gives the same x.
        """
        steps = solver_steps(steps, self.cfg, default=1)
        x = tempered_noise(self.net, z, temperature, generator, shape)      # (.., D)
        times = torch.linspace(1, 0, steps + 1, device=x.device, dtype=x.dtype)

        for t, s in zip(times[:-1], times[1:]):
            x = self.f(x, t.expand(x.shape[:-1]), s.expand(x.shape[:-1]), z)
        return x

    def load_flow(self, state_dict):
        """Start from a RectifiedFlow's state_dict: the diagonal is then exactly that flow.

        The embedding of s starts as a copy of that of t. An LSD state_dict is loaded with
        load_state_dict. Do not load a TrigFlow's: its F differs.
        """
        not_in_net = {k: v for k, v in self.state_dict().items() if not k.startswith("net.")}
        missing = [k for k in self.state_dict() if ".until." in k and k not in state_dict]
        second_time = {k: state_dict[k.replace(".until.", ".time.")] for k in missing}
        self.load_state_dict(not_in_net | second_time | state_dict)         # strict


def energy_score(head, z, x, **options):
    """How well the distribution that the head samples from predicts x; lower is better.

        (|a - x| + |b - x| - |a - b|) / (2 sqrt D)   a, b: two samples, head.sample(z, **options)

    z (.., C), x (.., D) -> (..). The energy score of Gneiting & Raftery (2007, section 4.2),
    estimated from two samples. It is strictly proper: its expectation is smallest if the samples
    have the distribution of x. It has one unit for all objectives and numbers of steps. Samples
    that all equal the mean gain nothing from |a - b|; samples that vary too much pay in |a - x|.
    train.py logs it on held-out audio as valid_energy_*.
    """
    x = fp32(x)
    a = head.sample(z, **options)
    b = head.sample(z, **options)
    scale = 2 * math.sqrt(x.shape[-1])
    to_data = (a - x).norm(dim=-1) / scale + (b - x).norm(dim=-1) / scale
    return to_data - (a - b).norm(dim=-1) / scale


# ------------------------------------------------------------------------------------------ by name

def with_mlp(objective, two_times=False):
    """A function (dim, cond_dim, cfg) -> the objective with an AdaLNMLP as its network."""
    def make(dim, cond_dim, cfg):
        net = AdaLNMLP(dim, cond_dim, cfg.width, cfg.blocks, two_times, cfg.time_norm)
        return objective(net, cfg)
    return make


# HEADS[cfg.objective](dim, cond_dim, cfg)
HEADS = {
    "rectified_flow": with_mlp(RectifiedFlow),
    "trigflow": with_mlp(TrigFlow),
    "consistency": with_mlp(Consistency),
    "lsd": with_mlp(LSD, two_times=True),
}
