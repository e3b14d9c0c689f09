"""The three streams that CALM reads while it generates, and its step from one latent to the next.

        long     prefix, text stream and latents    ─► z_long (B, C)
        null     the same without the prefix        ─► z_null (B, C), with guidance only
        short    latents                            ─► z_short (B, C), for kinds that have it

    prefix ─► read ─► Z ─► draw ─► x ─► read ─► Z ─► draw ─► x ...
                 └─► z_long: the text beside the next latent, end of clip

    Z = z_null + a (z_long - z_null) + z_short,  a = guidance

The prefix is read into caches that grow. Then the step goes on in them (growing_step), or in
memory that never moves (fixed_step), where it can be compiled or be a CUDA graph (replay.py). It is
one function for both, so the latents are the same (tests/papers/test_fast.py: 1e-12 in fp64).

Source: CALM (arXiv 2509.06926) section 4.2 and, for the guidance, its third version; see calm.py.
Precision: that of the model.
"""
from collections.abc import Callable
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

import torch

from backbone import KVCache, StaticCache
from replay import Replay, rounded


@dataclass
class Inputs:
    """What the streams read next; None = nothing."""
    long: torch.Tensor                      # (B, T, C)
    null: torch.Tensor                      # (B, T, C)
    short: torch.Tensor | None              # (B, T, C)

    def without_short(self):
        return Inputs(self.long, self.null, None)

    def feed(self, audio, token, pad):
        """One more position for long and null: a latent and the text beside it, (B, C) each."""
        self.long = (audio + token)[:, None]
        self.null = (audio + pad)[:, None]


class Branches:
    """The streams and their caches.

    net: a CALM; noise: share of the training noise that the latents get before they are read, 0 to
    1; front (B,): padding in front of the prefix, None = none.
    """

    def __init__(self, net, kind, guidance, noise, front=None):
        self.net = net
        self.guidance = guidance
        self.use_short = bool(net.cfg.short_layers and net.has_short[kind])
        self.noise = noise * net.cfg.noise
        self.short_noise = noise * net.cfg.short_noise

        # one cache for each stream in use
        self.caches = {"long": KVCache(front)}
        if guidance != 1:
            self.caches["null"] = KVCache()
        if self.use_short:
            self.caches["short"] = KVCache()

    def start(self, prefix, history, pad, generator):
        """The first Inputs: prefix (B, P + L, C) and history (B, n, D or K), each frame beside
        `pad` (B, C), the embedding of no text.

        Also the d audio inputs (B, d, C) that have no text beside them yet: with an acoustic delay
        of d the first new words go there.
        """
        net = self.net
        B, n = history.shape[:2]
        bos = net.bos.expand(B, 1, -1)
        self.pad = pad

        # audio inputs: d positions without audio, then the history; the first n go beside PAD
        delay = bos.new_zeros(B, net.acoustic_delay, bos.shape[2])
        audio = net.embed_noised(net.latent, history, self.noise, generator)
        audio = torch.cat([delay, audio], 1)                                # (B, d + n, C)
        beside_pad = audio[:, :n] + pad[:, None]
        inputs = Inputs(long=torch.cat([prefix, bos, beside_pad], 1),       # (B, P + L + 1 + n, C)
                        null=torch.cat([bos, beside_pad], 1),               # (B, 1 + n, C)
                        short=None)

        if self.use_short:
            recent = net.embed_noised(net.short_latent, history, self.short_noise, generator)
            inputs.short = torch.cat([net.short_bos.expand(B, 1, -1), recent], 1)
        return inputs, audio[:, n:]

    def load(self, other):
        """Take over what other branches have read; the caches here are StaticCaches."""
        self.pad.copy_(other.pad)
        for name, cache in self.caches.items():
            cache.load(other.caches[name])

    def read(self, inputs):
        """-> z_long (B, C) and Z (B, C), of the last position."""
        net = self.net
        z_long = net.backbone(inputs.long, self.caches["long"])[:, -1]
        Z = z_long

        # latent guidance (CALM, third version)
        if self.guidance != 1:
            z_null = net.backbone(inputs.null, self.caches["null"])[:, -1]
            Z = z_null + self.guidance * (z_long - z_null)

        # Z = z + z_short (section 4.2)
        if inputs.short is not None:
            Z = Z + net.short(inputs.short, self.caches["short"])[:, -1]
        return z_long, Z

    def read_latent(self, x, token, generator):
        """A latent x (B, D or K), the text beside it (B, C) -> z_long and Z (B, C), and "the clip
        is over" (B,).
        """
        net = self.net
        inputs = Inputs(None, None, None)
        inputs.feed(net.embed_noised(net.latent, x, self.noise, generator), token, self.pad)
        if self.use_short:
            recent = net.embed_noised(net.short_latent, x, self.short_noise, generator)
            inputs.short = recent[:, None]
        z_long, Z = self.read(inputs)
        return z_long, Z, net.eos(z_long).squeeze(-1) > 0


# ---------------------------------------------------------------- the step

@dataclass
class Step:
    """From latent to latent: read(x, token, generator=) as Branches.read_latent, and draw(Z,
    generator=) -> (x,), the next latent or frame of codes from the head.
    """
    branches: Branches
    read: Callable
    draw: Callable


def make_draw(net, sampling):
    """The draw of a Step; sampling: options of the head's sample()."""
    def draw(Z, generator):
        return (net.head.sample(Z, generator=generator, **sampling),)
    return draw


def growing_step(branches, sampling):
    """The step as it is, in caches that grow."""
    return Step(branches, branches.read_latent, make_draw(branches.net, sampling))


@contextmanager
def fixed_step(fast, branches, sampling, frames):
    """The step in fixed memory, for so many frames behind what `branches` have read.

    A step that an earlier call left in `fast` is used again where it fits.
    """
    long_cache = branches.caches["long"]
    positions = rounded(long_cache.pos + frames)
    rows = branches.pad.shape[0]
    padded = long_cache.front is not None
    key = (branches.net, rows, positions, padded, long_cache.kv[0][0].dtype, *branches.caches,
           branches.guidance, branches.noise, branches.short_noise, *sampling.values())

    step = fast.take(key, lambda: make_fixed_step(branches, sampling, positions, fast.how))
    step.branches.load(branches)
    try:
        yield step
    finally:
        fast.give_back(key, step)


def make_fixed_step(branches, sampling, positions, how):
    """A step in new memory for so many positions; load() fills it."""
    fixed = copy(branches)
    fixed.pad = torch.zeros_like(branches.pad)
    fixed.caches = {}
    for name, cache in branches.caches.items():
        net = branches.net.short if name == "short" else branches.net.backbone
        fixed.caches[name] = StaticCache.beside(cache, net.cfg.window or positions)

    draw = make_draw(branches.net, sampling)
    return Step(fixed, Replay(fixed.read_latent, how), Replay(draw, how))
