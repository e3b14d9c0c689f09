"""The rival of continuous latents: residual VQ, and heads that sample its codes.

    ResidualVQ, the VAE's bottleneck (bottleneck = "rvq"), turns a frame into K codes and back:

             x (.., D) ─► nearest entry of codebook 1 ─► code 1     remainder x - c_1
                          nearest entry of codebook 2 ─► code 2     remainder x - c_1 - c_2
                          ...                        ─► code K
             z (.., D) = c_1[code 1] + c_2[code 2] + ... + c_K[code K]

    The heads go from the backbone's z to the next frame of codes: the baselines of CALM.

    rq       z (.., C) ─ Linear_k ──────────────┐              K codes of a frame, one by one
             code k-1 ─ embed_{k-1} (.., w) ────+─ depth transformer over the levels k = 1 .. K
                                                   │  causal; separate weights per level
             code k  ◄─ sample ◄─ logits (.., codes) ─ Linear_k

    delay    z (.., C) ─ Linear_k ─ logits (.., codes) ─ sample ─► code k    all K at once

             frame     1  2  3  4               step      1  2  3  4  5  6
             level 1   a  b  c  d               level 1   a  b  c  d  .  .
             level 2   e  f  g  h    delay ►    level 2   .  e  f  g  h  .
             level 3   i  j  k  l  ◄ undelay    level 3   .  .  i  j  k  l      . = MISSING

The heads have the members of the objectives in heads.py, so that callers need not tell them
apart; x are codes (.., K):

    loss(z, x, weight=) -> (loss per position, metrics)
    sample(z, steps=, temperature=, ...) -> x

rq models the codes of a frame exactly, p(q | z) = Π_k p(q_k | z, q_1 .. q_{k-1}), in K passes of
the depth transformer. delay needs no such passes, but its K codes are independent given z: level k
learns levels 1 .. k-1 of its frame from earlier steps of the sequence, at the price of K-1 steps of
latency. Shifting is a matter of the sequence: calm.py does it with the functions of this file.

Sources: CALM (arXiv 2509.06926) section 3.1 and Table 9 (RQ-Transformer head: 6 layers, 1024 /
4096, 16 heads, 701M parameters); RQ-Transformer: Lee et al. 2022; weights per codebook: Moshi
(Défossez et al. 2024); delay pattern, linear heads, top-k: MusicGen (Copet et al. 2023); residual
VQ: SoundStream (Zeghidour et al. 2021).
Where this differs from the paper:
- 3.1 takes the first level's logits from z by a linear layer. That is Moshi's formula, where the
  first token of a frame is text; its audio codes all come from the depth transformer, as here.
  With 8 levels of 2048 codes this counts 656M parameters (2560 channels of z), or 574M without
  the first level; an embedding of Helium-1's 48000 text tokens at the first level, as in Moshi,
  would make it 706M.
- One set of weights is 75.5M, so the table's 701M means about 8 sets. With 32 levels, one set per
  level would be 2.6B: with `sets` = 8, levels 8 to 32 share one (749M; 672M with 7 sets).
- The loss is the mean over levels, not the sum: nats per code. The weight of the other loss in
  calm.py (eos) then means the same for any K. Moshi's larger weight of the first level is left
  out.
- ResidualVQ has no separate semantic codebook as Mimi has; its D is the width of the codes.

Precision: softmax, cross-entropy and nearest entries in fp32; other matrix products follow
autocast.
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from backbone import KVCache, RMSNorm
from heads import weighted_mean
from noise import exponential, shared, uniform
from processes import add_up, rank, world

MISSING = -1                                    # no code here: before a delayed level, or padding


# ------------------------------------------------------------------------------ residual VQ

class ResidualVQ(nn.Module):
    """Residual vector quantisation: x ≈ c_1[code 1] + ... + c_K[code K].

    x (B, T, D) -> z (B, T, D). Level i picks the entry nearest to the remainder of levels 1 .. i-1.
    Codebooks follow running means of the vectors assigned to them (decay 0.99; van den Oord et al.
    2017, appendix A.1), updated once per micro-batch; a step that is skipped leaves them
    as they were (runs.RunningState). An entry assigned less than `dead` times the
    mean count is replaced by a vector of the batch (Zeghidour et al. 2021), which also sets nearly
    all entries at the first step. In training half of the rows use the first n levels only, n
    uniform (quantizer dropout). All processes share statistics and replacements.
    """
    decay = 0.99
    dead = 0.1

    def __init__(self, dim, levels, codes):
        super().__init__()
        self.register_buffer("codebooks", torch.randn(levels, codes, dim))
        # running means of assignments per step, and of the sum of the assigned vectors
        self.register_buffer("counts", torch.zeros(levels, codes))
        self.register_buffer("sums", torch.zeros(levels, codes, dim))

    def nearest(self, x, level):
        """x (N, D) -> index of the nearest entry (N,): the least ‖c‖² - 2 x·c, in fp32."""
        c = self.codebooks[level]
        with torch.autocast(x.device.type, enabled=False):
            return (c.pow(2).sum(1) - 2 * x.float() @ c.T).argmin(1)

    def encode(self, x):
        """x (B, T, D) -> codes (B, T, K), int64."""
        remainder = x.flatten(0, 1)                                             # (B·T, D)
        codes = []
        for level, codebook in enumerate(self.codebooks):
            codes.append(self.nearest(remainder, level))
            remainder = remainder - codebook[codes[-1]]
        return torch.stack(codes, -1).view(*x.shape[:2], -1)

    def decode(self, codes):
        """codes (.., K') of the first K' <= K levels -> (.., D)."""
        return sum(self.codebooks[level][entry] for level, entry in enumerate(codes.unbind(-1)))

    @torch.no_grad()
    def update(self, level, x, entry, rows, candidates):
        """One step of the running means: x (N, D) was assigned to entry (N,), where rows (N,).
        candidates (codes, D): replace dead entries.

        Every process calls it for every level, even if no row is true: all_reduce waits for all.
        """
        x = x.float()
        codes = self.codebooks.shape[1]
        D = x.shape[1]

        # counts and sums of this batch
        assigned = entry[:, None] == torch.arange(codes, device=x.device)
        assigned = (assigned & rows[:, None]).to(x.dtype)                       # (N, codes)
        with torch.autocast(x.device.type, enabled=False):
            sums = assigned.T @ x                                               # (codes, D)

        # sums over all processes; each has the candidates of its rows
        stats = add_up(torch.cat([assigned.sum(0)[:, None], sums, candidates], 1))
        counts, sums, candidates = stats.split([1, D, D], 1)
        mean_count = counts.sum() / codes

        # running means; dead entries start again from a candidate, with the mean count
        counts = self.counts[level].lerp(counts[:, 0], 1 - self.decay)          # (codes,)
        sums = self.sums[level].lerp(sums, 1 - self.decay)                      # (codes, D)
        dead = counts < self.dead * mean_count
        counts = torch.where(dead, mean_count, counts)
        sums = torch.where(dead[:, None], mean_count * candidates, sums)

        # a level that no row used stays as it is
        used = mean_count > 0
        self.counts[level] = torch.where(used, counts, self.counts[level])
        self.sums[level] = torch.where(used, sums, self.sums[level])
        means = self.sums[level] / self.counts[level][:, None].clamp(min=1e-12)
        self.codebooks[level] = torch.where(used, means, self.codebooks[level])

    def candidates(self, x, source):
        """For each entry a vector that can replace it: entry e's is of row e, e - rows, ... of the
        rows of all processes, at a random frame. x (B, T, D) -> (codes, D), 0 where the row is
        another process's. source: of random numbers (noise.py).
        """
        B, T, _ = x.shape
        codes = self.codebooks.shape[1]
        frame = torch.randint(T, (codes,), generator=shared(source)).to(x.device)
        row = torch.arange(codes, device=x.device) % (B * world()) - B * rank()
        here = (row >= 0) & (row < B)
        return x[row.clamp(0, B - 1), frame].float() * here[:, None]

    def forward(self, x, source=None):
        """x (B, T, D) -> z with the gradient of x, and the commitment loss. source: noise.py.

        The loss is the mean of ‖x_i - sg(c_i)‖² / D over the levels in use, x_i the remainder that
        level i quantises.
        """
        B, T, _ = x.shape
        levels = len(self.codebooks)

        # quantizer dropout: the number of levels that each row uses
        used = torch.full((B,), levels, device=x.device)
        if self.training:
            dropped = uniform((B,), source, x.device) < 0.5
            fewer = 1 + (levels * uniform((B,), source, x.device)).long()
            used = torch.where(dropped, fewer.clamp(max=levels), used)

        remainder = x
        z = torch.zeros_like(x)
        loss = 0.0
        levels_in_use = 0.0
        for level in range(levels):
            # assign the remainders, and update the codebook with those of the rows in use
            in_use = (level < used).to(x.dtype)[:, None, None]                  # (B, 1, 1)
            vectors = remainder.detach().flatten(0, 1)                          # (B·T, D)
            entry = self.nearest(vectors, level)                                # (B·T,)
            if self.training:
                rows = (in_use > 0).expand(-1, T, 1).flatten()
                candidates = self.candidates(remainder.detach(), source)
                self.update(level, vectors, entry, rows, candidates)

            # add this level's part to z and to the loss
            c = self.codebooks[level][entry].view_as(x)
            loss = loss + (in_use * (remainder - c.detach()).pow(2)).mean()
            levels_in_use = levels_in_use + in_use.mean()
            z = z + in_use * c
            remainder = remainder - c

        # straight-through; levels in use of all processes' rows
        if self.training:
            levels_in_use = add_up(levels_in_use) / world()
        return x + (z - x).detach(), loss / levels_in_use


# ------------------------------------------------------------------------------ delay pattern

def delay_codes(codes):
    """(B, T, K) -> (B, T + K-1, K): level k (from 0) of frame t goes to step t + k."""
    B, T, K = codes.shape
    steps = codes.new_full((B, T + K - 1, K), MISSING)
    for k in range(K):
        steps[:, k:k + T, k] = codes[..., k]
    return steps


def undelay_codes(steps):
    """(B, T + K-1, K) -> (B, T, K): the inverse of delay_codes."""
    K = steps.shape[2]
    T = steps.shape[1] - (K - 1)
    return torch.stack([steps[:, k:k + T, k] for k in range(K)], -1)


class NoDelay:
    """The counterpart of DelayLine where a step is a frame: everything passes unchanged.

    The three methods are those of DelayLine.
    """

    def __init__(self, history):
        self.history = history

    def advance(self, ended):
        return ended

    def put(self, x, ended):
        self.x = x
        return x

    def frame(self):
        return self.x


class DelayLine:
    """The delay pattern step by step: the codes of a step, and the frame that it completes.

    history (B, n, K): frames to continue; n may be 0. Per step: advance, put, frame.
    """

    def __init__(self, history):
        B, self.n, self.levels = history.shape
        steps = delay_codes(history)
        self.history = steps[:, :self.n]                # (B, n, K): whole steps before the first
        self.pending = steps[:, self.n:]                # (B, K-1, K): levels of history yet to come
        self.steps = []                                 # codes of each step (B, K)
        self.ended = []                                 # per step, rows whose clip is over (B,)
        # first frame behind the clip's end, counted from the history's end; none yet
        self.end = torch.full((B,), 1 << 40, device=history.device)

    def advance(self, ended):
        """Begin a step; ended (B,): rows whose clip is over -> the same for the step's frame (B,).

        A step completes the frame that began K-1 steps earlier.
        """
        self.ended.append(ended)
        return self.ended[max(0, len(self.ended) - self.levels)]

    def put(self, x, ended):
        """Sampled codes (B, K), rows whose clip is over (B,) -> the step's codes (B, K).

        MISSING where a level has no frame; the levels of the history that are still to come.
        """
        i = len(self.steps)
        self.end = torch.where(ended & (self.end > i), i, self.end)
        frame = i - torch.arange(self.levels, device=x.device)      # (K,), from the history's end
        exists = (frame >= -self.n) & (frame < self.end[:, None])   # (B, K)
        x = x.masked_fill(~exists, MISSING)
        if i < self.levels - 1:
            x = torch.where(frame < 0, self.pending[:, i], x)
        self.steps.append(x)
        return x

    def frame(self):
        """The frame that the last step completed (B, K); 0 where its row had ended.

        There is one from step K-1 on: call it from there.
        """
        last = self.steps[-self.levels:]
        return torch.stack([x[:, k] for k, x in enumerate(last)], -1).clamp(min=0)


# ------------------------------------------------------------------------------ codes in and out

class CodeEmbedding(nn.Module):
    """codes (.., K) -> the sum of their K embeddings (.., C); MISSING adds nothing."""

    def __init__(self, levels, codes, dim):
        super().__init__()
        self.bag = nn.EmbeddingBag(levels * codes + 1, dim, mode="sum", padding_idx=levels * codes)
        nn.init.normal_(self.bag.weight, std=0.5 / math.sqrt(levels))   # the sum: calm.py's scale
        with torch.no_grad():
            self.bag.weight[-1] = 0
        # index of each level's first embedding
        self.register_buffer("first", torch.arange(levels) * codes, persistent=False)

    def forward(self, codes):
        index = torch.where(codes < 0, self.bag.padding_idx, codes + self.first)
        return self.bag(index.flatten(0, -2)).view(*codes.shape[:-1], self.bag.embedding_dim)


def sample_codes(logits, temperature, top_k, generator):
    """Sample from softmax(logits / temperature) (.., n) among the top_k likeliest -> codes (..).

    top_k = 0 keeps all; temperature 0 takes the likeliest.
    """
    if temperature < 0:
        raise ValueError(f"temperature: must be at least 0, got {temperature}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    # a race: p_i / e_i with e_i exponential is largest at i with probability p_i. So does
    # torch.multinomial, with the same numbers; written out, the numbers can be drawn beforehand
    p = (logits / temperature).softmax(-1)
    return (p / exponential(p.shape, generator, p.device, p.dtype)).argmax(-1)


def cross_entropy(logits, codes, weight=None):
    """logits (.., K, n), codes (.., K) -> nats per code (..), the mean over codes not MISSING.

    metrics: the mean of the first and of the last level. weight (..): 0 at padding, which the
    metrics leave out.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(logits.flatten(0, -2), codes.flatten(), ignore_index=MISSING,
                           reduction="none").view(codes.shape)              # (.., K)
    valid = codes != MISSING                                                # (.., K)
    counted = valid if weight is None else valid * weight[..., None]
    metrics = {f"loss_{name}": weighted_mean(nats[..., k], counted[..., k])
               for name, k in (("first", 0), ("last", -1))}
    return nats.sum(-1) / valid.sum(-1).clamp(min=1), metrics


# ------------------------------------------------------------------------------ RQ-Transformer

class PerLevel(nn.Module):
    """One linear map per level; the levels beyond the last of the `sets` maps share it."""

    def __init__(self, sets, cin, cout):
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(cin, cout, bias=False) for _ in range(sets))

    def forward(self, x, level):
        """(N, 1, cin) at one level, or (N, K, cin) at all (level None) -> (N, 1 or K, cout)."""
        last = len(self.each) - 1
        if level is not None:
            return self.each[min(level, last)](x)
        parts = x.split([1] * last + [x.shape[1] - last], 1)
        return torch.cat([linear(part) for linear, part in zip(self.each, parts)], 1)


class DepthBlock(nn.Module):
    """Pre-norm attention over the levels of one frame, and a GELU MLP; no positions (Moshi)."""

    def __init__(self, width, heads, sets):
        super().__init__()
        self.heads = heads
        self.norm1 = RMSNorm(width)
        self.norm2 = RMSNorm(width)
        self.qkv = PerLevel(sets, width, 3 * width)
        self.out = PerLevel(sets, width, width)
        self.up = PerLevel(sets, width, 4 * width)
        self.down = PerLevel(sets, 4 * width, width)

    def forward(self, h, level, cache, layer):
        qkv = self.qkv(self.norm1(h), level)                                    # (N, K, 3 w)
        q, k, v = rearrange(qkv, "N K (three H d) -> three N H K d", three=3, H=self.heads)
        if cache is not None:
            k, v = cache.append(layer, k, v, 0)                                 # (N, H, 1 .. K, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=level is None)
        h = h + self.out(rearrange(y, "N H K d -> N K (H d)"), level)
        return h + self.down(F.gelu(self.up(self.norm2(h), level)), level)


class DepthTransformer(nn.Module):
    """z (N, C), codes (N, K) -> logits (N, K, n): level k sees z and the codes before it.

    Logits are 0 at initialisation: a loss of log n.
    """

    def __init__(self, levels, codes, cond_dim, width, blocks, heads, sets):
        super().__init__()
        self.levels = levels
        sets = min(sets or levels, levels)
        self.cond = PerLevel(sets, cond_dim, width)
        self.embed = nn.ModuleList(nn.Embedding(codes, width) for _ in range(levels - 1))
        self.blocks = nn.ModuleList(DepthBlock(width, heads, sets) for _ in range(blocks))
        self.norm = RMSNorm(width)
        self.output = nn.ModuleList(nn.Linear(width, codes, bias=False) for _ in range(levels))

        # order matters: "output" contains "out"; cond keeps PyTorch's default
        for name, p in self.named_parameters():
            if name.startswith("embed"):
                nn.init.normal_(p, std=0.5)                 # the scale that cond gives z
            elif name.startswith("output"):
                nn.init.zeros_(p)
            elif "qkv" in name or "up" in name:
                nn.init.normal_(p, std=0.02)
            elif "out" in name or "down" in name:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * blocks))

    def matrices(self):
        """The modules with the large linear layers: those that int8 rounds (sample.py)."""
        return [self.blocks]

    def project(self, z):
        """z (N, C) -> the input of each level (N, K, w); levels that share a set get the same."""
        per_set = torch.stack([linear(z) for linear in self.cond.each], 1)      # (N, sets, w)
        rest = self.levels - per_set.shape[1]                       # levels that share the last set
        return torch.cat([per_set, per_set[:, -1:].expand(-1, rest, -1)], 1)

    def run(self, h, level=None, cache=None):
        """All blocks over all levels (N, K, w), or over one level (N, 1, w) with a cache."""
        for i, block in enumerate(self.blocks):
            h = block(h, level, cache, i)
        return self.norm(h)

    def forward(self, z, codes):
        c = self.project(z)                                                     # (N, K, w)
        previous = [torch.zeros_like(c[:, 0])]              # nothing precedes the first level
        for k, embed in enumerate(self.embed):
            previous.append(embed(codes[:, k].clamp(min=0)))
        y = self.run(c + torch.stack(previous, 1))                              # (N, K, w)
        return torch.stack([out(y[:, k]) for k, out in enumerate(self.output)], 1)

    def sample(self, z, choose):
        """z (N, C) -> codes (N, K), one level after the other; choose: logits (N, n) -> (N,)."""
        c = self.project(z)                                                     # (N, K, w)
        cache = KVCache()
        codes = []
        for k in range(self.levels):
            h = c[:, k:k + 1]                                                   # (N, 1, w)
            if k > 0:
                h = h + self.embed[k - 1](codes[-1])[:, None]
            logits = self.output[k](self.run(h, k, cache)[:, 0])                # (N, n)
            codes.append(choose(logits))
        return torch.stack(codes, 1)


# ------------------------------------------------------------------------------ heads

class RQ(nn.Module):
    """A frame's K codes by a depth transformer (section 3.1, Table 9)."""
    code_delay = 0                              # steps between the first and last code of a frame
    has_jvp = False

    def __init__(self, levels, codes, cond_dim, cfg):
        super().__init__()
        self.cfg = cfg
        self.net = DepthTransformer(levels, codes, cond_dim, cfg.width, cfg.blocks,
                                    cfg.depth_heads, cfg.sets)

    def set_step(self, step):
        """Nothing here depends on the training step."""

    def draws(self, x, source=None):
        """Nothing here is random."""
        return ()

    def loss(self, z, x, weight=None, draws=()):
        """-log p(x | z) / K, teacher-forced. z (.., C), codes x (.., K) -> (..), metrics."""
        logits = self.net(z.flatten(0, -2), x.flatten(0, -2))                   # CALM 3.1
        return cross_entropy(logits.view(*x.shape, -1), x, weight)

    @torch.no_grad()
    def sample(self, z, *, steps=None, temperature=1.0, generator=None):
        """z (.., C) -> codes (.., K). `steps` is for heads.py: here there are always K."""
        def choose(logits):
            return sample_codes(logits, temperature, self.cfg.top_k, generator)
        return self.net.sample(z.flatten(0, -2), choose).view(*z.shape[:-1], -1)


class Delay(nn.Module):
    """K linear heads on z, for codes that calm.py has delayed (MusicGen)."""
    has_jvp = False

    def __init__(self, levels, codes, cond_dim, cfg):
        super().__init__()
        self.cfg = cfg
        self.code_delay = levels - 1
        self.shape = (levels, codes)
        self.net = nn.Linear(cond_dim, levels * codes, bias=False)
        nn.init.zeros_(self.net.weight)

    def set_step(self, step):
        """Nothing here depends on the training step."""

    def draws(self, x, source=None):
        """Nothing here is random."""
        return ()

    def loss(self, z, x, weight=None, draws=()):
        """-log p in nats per code that exists. z (.., C), codes x (.., K) -> (..), metrics."""
        return cross_entropy(self.net(z).unflatten(-1, self.shape), x, weight)

    @torch.no_grad()
    def sample(self, z, *, steps=None, temperature=1.0, generator=None):
        """z (.., C) -> codes (.., K) of K different frames, all at once; `steps` is ignored."""
        logits = self.net(z).unflatten(-1, self.shape)                          # (.., K, n)
        return sample_codes(logits, temperature, self.cfg.top_k, generator)


DISCRETE = {"rq": RQ, "delay": Delay}           # DISCRETE[cfg.objective](K, n, cond_dim, cfg)
