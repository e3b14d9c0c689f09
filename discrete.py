"""
discrete.py: from the backbone's z to the next frame of RVQ codes: the baselines of CALM.

    rq       z (.., C) ─ Linear_k ──────────────┐              K codes of a frame, one by one
             code k-1 ─ embed_{k-1} (.., w) ────+─ depth transformer over the levels k = 1 .. K
                                                   │  causal; each level has weights of its own
             code k  ◄─ draw ◄─ logits (.., codes) ─ Linear_k

    delay    z (.., C) ─ Linear_k ─ logits (.., codes) ─ draw ─► code k      all K at once

             frame     1  2  3  4               step      1  2  3  4  5  6
             level 1   a  b  c  d               level 1   a  b  c  d  .  .
             level 2   e  f  g  h    delay ►    level 2   .  e  f  g  h  .
             level 3   i  j  k  l  ◄ undelay    level 3   .  .  i  j  k  l      . = MISSING

Same two methods as the objectives of heads.py, so that nobody asks which; x are codes (.., K):

    loss(z, x) -> (loss per position, metrics)       sample(z, steps=, temperature=, ...) -> x

rq models a frame's codes exactly, p(q | z) = Π_k p(q_k | z, q_1 .. q_{k-1}), in K passes of the
depth transformer. delay has no passes, but its K draws are independent given z: level k learns what
levels 1 .. k-1 of its frame are from earlier steps of the sequence, at the price of K-1 steps'
latency. The shifting belongs to the sequence: calm.py does it with the two functions here.

Papers: CALM (arXiv 2509.06926) section 3.1 and Table 9 (RQ-Transformer head: 6 layers, 1024 / 4096,
16 heads, 701M parameters); RQ-Transformer: Lee et al. 2022; weights per codebook: Moshi (Défossez
et al. 2024); delay pattern, linear heads, top-k: MusicGen (Copet et al. 2023).
Where this differs from the paper:
  * 3.1 takes the first level's logits from z by a linear layer. That is Moshi's formula, where the
    first token of a frame is text; its audio codes all come from the depth transformer, as here.
    With 8 levels of 2048 codes that counts 656M (2560 channels of z), without the first 574M; an
    embedding of Helium-1's 48000 text tokens at the first level, as in Moshi, would make it 706M.
  * One set of weights is 75.5M, so the table's 701M means about 8 sets. With 32 levels a set each
    would be 2.6B: with `sets` = 8 levels 8 to 32 share one (749M, with 7 sets 672M).
  * The loss is the mean over levels, not the sum: nats a code. The weight of the others (eos) in
    calm.py is then the same for any K. Moshi's larger weight of the first level is left out.

Precision: softmax and cross-entropy in fp32, the matrix products follow autocast.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from backbone import KVCache, RMSNorm

MISSING = -1                                    # no code here: before a delayed level, or padding


# ------------------------------------------------------------------------------------------- codes

def delay_codes(codes):
    """(B, T, K) -> (B, T + K-1, K): level k (from 0) of frame t goes to step t + k."""
    B, T, K = codes.shape
    steps = codes.new_full((B, T + K - 1, K), MISSING)
    for k in range(K):
        steps[:, k:k + T, k] = codes[..., k]
    return steps


def undelay_codes(steps):
    """(B, T + K-1, K) -> (B, T, K): the inverse."""
    K = steps.shape[2]
    T = steps.shape[1] - (K - 1)
    return torch.stack([steps[:, k:k + T, k] for k in range(K)], -1)


class DelayLine:
    """The delay pattern step by step: what a step of a sequence being drawn holds, and the frames
    that are complete. history (B, n, K): frames to continue, n may be 0.
    """

    def __init__(self, history):
        B, self.first, self.levels = history.shape
        steps = delay_codes(history)
        self.past = steps[:, :self.first]               # (B, n, K), as drawn before
        self.owed = steps[:, self.first:]               # (B, K-1, K): levels of history yet to come
        self.steps, self.end = [], torch.full((B,), 1 << 40, device=history.device)

    def put(self, x, ended):
        """Codes as drawn (B, K), which rows have no frame at this step (B,) -> the step (B, K)."""
        i, level = len(self.steps), torch.arange(self.levels, device=x.device)
        self.end = torch.where(ended & (self.end > i), i, self.end)
        frame = i - level                               # (K,), counted from the end of history
        exists = (frame >= -self.first) & (frame < self.end[:, None])           # (B, K)
        x = x.masked_fill(~exists, MISSING)
        if i < self.levels - 1:
            x = torch.where(frame < 0, self.owed[:, i], x)
        self.steps.append(x)
        return x

    def frame(self):
        """The frame whose last level the last step held (B, K); 0 where its row had ended."""
        last = self.steps[-self.levels:]
        return torch.stack([x[:, k] for k, x in enumerate(last)], -1).clamp(min=0)


class ResidualVQ(nn.Module):
    """Residual vector quantisation: x ≈ c_1[k_1] + c_2[k_2] + ... + c_K[k_K].

    Level i picks the entry nearest to what the levels before left over. x (B, T, D) -> z (B, T, D).
    Codebooks follow running means of the vectors that chose them (decay .99; van den Oord et al.
    2017, appendix A.1), once a micro-batch; an entry chosen less than `dead` times its fair share
    is replaced by a vector of the batch (Zeghidour et al. 2021), which also sets nearly all entries
    at the first step. In training half of the rows use the first n levels only, n uniform
    (quantizer dropout). Statistics and replacements are shared by all processes.
    Where this differs from Mimi: no separate semantic codebook; D is the width of the codes.
    """
    decay, dead = 0.99, 0.1

    def __init__(self, dim, levels, codes):
        super().__init__()
        self.register_buffer("codebooks", torch.randn(levels, codes, dim))
        self.register_buffer("counts", torch.zeros(levels, codes))         # choices a step, running
        self.register_buffer("sums", torch.zeros(levels, codes, dim))      # vectors a step, running

    def nearest(self, x, level):
        """x (N, D) -> index of the nearest entry (N,): least ‖c‖² - 2 x·c, in fp32."""
        c = self.codebooks[level]
        with torch.autocast(x.device.type, enabled=False):
            return (c.pow(2).sum(1) - 2 * x.float() @ c.T).argmin(1)

    def encode(self, x):
        """(B, T, D) -> codes (B, T, K), int64."""
        left, codes = x.flatten(0, 1), []
        for level in range(len(self.codebooks)):
            codes.append(self.nearest(left, level))
            left = left - self.codebooks[level][codes[-1]]
        return torch.stack(codes, -1).view(*x.shape[:2], -1)

    def decode(self, codes):
        """codes (.., K') of the first K' <= K levels -> (.., D)."""
        return sum(self.codebooks[i][k] for i, k in enumerate(codes.unbind(-1)))

    @torch.no_grad()
    def learn(self, level, x, k, rows):
        """One step of the running means; where rows (N,) is true x (N, D) chose the entries k (N,).

        Every process calls it for every level, even without such rows: all_reduce waits for all.
        """
        x = x.float()
        hot = F.one_hot(k, self.codebooks.shape[1]).to(x.dtype) * rows[:, None]  # (N, codes)
        spare = x[torch.randint(len(x), (self.codebooks.shape[1],), device=x.device)]
        with torch.autocast(x.device.type, enabled=False):
            total = hot.T @ x                                                    # (codes, D)
        stats = torch.cat([hot.sum(0)[:, None], total, spare], 1)                # (codes, 1 + 2 D)
        if torch.distributed.is_initialized():
            stats[:, x.shape[1] + 1:] *= torch.distributed.get_rank() == 0
            torch.distributed.all_reduce(stats)
        count, total, spare = stats.split([1, x.shape[1], x.shape[1]], 1)
        fair = count.sum() / len(count)                                # choices if all were equal
        if fair == 0:
            return
        self.counts[level].lerp_(count[:, 0], 1 - self.decay)
        self.sums[level].lerp_(total, 1 - self.decay)
        dead = self.counts[level] < self.dead * fair
        self.counts[level][dead], self.sums[level][dead] = fair, fair * spare[dead]
        self.codebooks[level] = self.sums[level] / self.counts[level][:, None]

    def forward(self, x):
        """x (B, T, D) -> z with the gradient of x, commitment loss mean ‖x_i - sg(c_i)‖² / D over
        the levels in use.
        """
        B, levels = x.shape[0], len(self.codebooks)
        used = torch.full((B,), levels, device=x.device)
        if self.training:
            some = torch.rand(B, device=x.device) < 0.5
            used = torch.where(some, torch.randint(1, levels + 1, (B,), device=x.device), used)
        left, z, loss, weight = x, torch.zeros_like(x), 0.0, 0.0
        for level in range(levels):
            on = (level < used).to(x.dtype)[:, None, None]                      # (B, 1, 1)
            k = self.nearest(left.detach().flatten(0, 1), level)
            if self.training:
                rows = (on > 0).expand(-1, x.shape[1], 1).flatten()
                self.learn(level, left.detach().flatten(0, 1), k, rows)
            c = self.codebooks[level][k].view_as(x)
            loss = loss + (on * (left - c.detach()).pow(2)).mean()
            weight = weight + on.mean()
            z, left = z + on * c, left - c
        return x + (z - x).detach(), loss / weight


class CodeEmbedding(nn.Module):
    """codes (.., K) -> the sum of their K embeddings (.., C); MISSING adds nothing."""

    def __init__(self, levels, codes, dim):
        super().__init__()
        self.bag = nn.EmbeddingBag(levels * codes + 1, dim, mode="sum", padding_idx=levels * codes)
        nn.init.normal_(self.bag.weight, std=0.5 / math.sqrt(levels))   # the sum: calm.py's scale
        with torch.no_grad():
            self.bag.weight[-1] = 0
        self.register_buffer("first", torch.arange(levels) * codes, persistent=False)

    def forward(self, codes):
        rows = torch.where(codes < 0, self.bag.padding_idx, codes + self.first)
        return self.bag(rows.flatten(0, -2)).view(*codes.shape[:-1], self.bag.embedding_dim)


def pick(logits, temperature, top_k, generator):
    """Draw from softmax(logits / temperature) (.., n), among the top_k likeliest (0 = all) -> (..).

    Temperature 0 takes the likeliest.
    """
    if temperature < 0:
        raise ValueError(f"temperature: {temperature} is wrong; valid: a number of at least 0")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    p = (logits / temperature).softmax(-1)
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])


def cross_entropy(logits, codes):
    """logits (.., K, n), codes (.., K) -> nats a code (..), the mean over the codes that are not
    MISSING; metrics of the first and the last level.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(logits.flatten(0, -2), codes.flatten(), ignore_index=MISSING,
                           reduction="none").view(codes.shape)
    there = codes != MISSING
    metrics = {f"loss_{name}": nats[..., k].detach().sum() / there[..., k].sum().clamp(min=1)
               for name, k in (("first", 0), ("last", -1))}
    return nats.sum(-1) / there.sum(-1).clamp(min=1), metrics


# ---------------------------------------------------------------------------------- RQ-Transformer

class PerLevel(nn.Module):
    """Linear maps side by side: level k goes through the k-th, those beyond the last share it."""

    def __init__(self, sets, cin, cout):
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(cin, cout, bias=False) for _ in range(sets))

    def forward(self, x, level):
        """(N, 1, cin) at one level, or all levels (None), (N, K, cin) -> (N, 1 or K, cout)."""
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
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv, self.out = PerLevel(sets, width, 3 * width), PerLevel(sets, width, width)
        self.up, self.down = PerLevel(sets, width, 4 * width), PerLevel(sets, 4 * width, width)

    def forward(self, h, level, cache, layer):
        q, k, v = (p.unflatten(2, (self.heads, -1)).transpose(1, 2)             # (N, H, K, d)
                   for p in self.qkv(self.norm1(h), level).chunk(3, -1))
        if cache is not None:
            k, v = cache.append(layer, k, v, 0)                                 # (N, H, k, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=level is None)
        h = h + self.out(y.transpose(1, 2).flatten(2), level)
        return h + self.down(F.gelu(self.up(self.norm2(h), level)), level)


class DepthTransformer(nn.Module):
    """z (N, C), codes (N, K) -> logits (N, K, n): level k sees z and the codes before it.

    Logits are 0 at the start: a loss of log n.
    """

    def __init__(self, levels, codes, cond_dim, width, blocks, heads, sets):
        super().__init__()
        self.levels, sets = levels, min(sets or levels, levels)
        self.cond = PerLevel(sets, cond_dim, width)
        self.embed = nn.ModuleList(nn.Embedding(codes, width) for _ in range(levels - 1))
        self.blocks = nn.ModuleList(DepthBlock(width, heads, sets) for _ in range(blocks))
        self.norm = RMSNorm(width)
        self.output = nn.ModuleList(nn.Linear(width, codes, bias=False) for _ in range(levels))
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
        """The modules whose linear layers are large: what int8 rounds (sample.py)."""
        return [self.blocks]

    def project(self, z):
        """z (N, C) -> what each level gets of it (N, K, w); levels of one set the same."""
        own = torch.stack([linear(z) for linear in self.cond.each], 1)          # (N, sets, w)
        return own[:, [min(k, own.shape[1] - 1) for k in range(self.levels)]]

    def run(self, h, level=None, cache=None):
        for i, block in enumerate(self.blocks):
            h = block(h, level, cache, i)
        return self.norm(h)

    def forward(self, z, codes):
        c = self.project(z)
        before = [torch.zeros_like(c[:, 0])] + [embed(codes[:, k].clamp(min=0))
                                                for k, embed in enumerate(self.embed)]
        y = self.run(c + torch.stack(before, 1))                                # (N, K, w)
        return torch.stack([out(y[:, k]) for k, out in enumerate(self.output)], 1)

    def draw(self, z, choose):
        """z (N, C), choose: logits (N, n) -> codes (N,). One level after the other -> (N, K)."""
        c, cache, codes = self.project(z), KVCache(), []
        for k in range(self.levels):
            h = c[:, k:k + 1]
            if k:
                h = h + self.embed[k - 1](codes[-1])[:, None]
            codes.append(choose(self.output[k](self.run(h, k, cache)[:, 0])))
        return torch.stack(codes, 1)


class RQ(nn.Module):
    """A frame's K codes by a depth transformer (CALM 3.1, Table 9)."""
    lag = 0                                     # steps between a frame's first code and its last
    has_jvp = False

    def __init__(self, levels, codes, cond_dim, cfg):
        super().__init__()
        self.cfg = cfg
        self.net = DepthTransformer(levels, codes, cond_dim, cfg.width, cfg.blocks,
                                    cfg.depth_heads, cfg.sets)

    def set_step(self, step):
        """Nothing here depends on the training step."""

    def loss(self, z, x):
        """-log p(x | z) / K, teacher-forced. (.., C), codes (.., K) -> (..), metrics."""
        logits = self.net(z.flatten(0, -2), x.flatten(0, -2))                   # (N, K, n)
        return cross_entropy(logits.view(*x.shape, -1), x)

    @torch.no_grad()
    def sample(self, z, *, steps=None, temperature=1.0, generator=None):
        """z (.., C) -> codes (.., K). `steps` is for heads.py: here they are always K."""
        choose = lambda logits: pick(logits, temperature, self.cfg.top_k, generator)
        return self.net.draw(z.flatten(0, -2), choose).view(*z.shape[:-1], -1)


class Delay(nn.Module):
    """K linear heads on z, for codes that calm.py has delayed (MusicGen)."""
    has_jvp = False

    def __init__(self, levels, codes, cond_dim, cfg):
        super().__init__()
        self.cfg, self.lag, self.shape = cfg, levels - 1, (levels, codes)
        self.net = nn.Linear(cond_dim, levels * codes, bias=False)
        nn.init.zeros_(self.net.weight)

    def set_step(self, step):
        """Nothing here depends on the training step."""

    def loss(self, z, x):
        """-log p of the codes that are there, nats a code. (.., C), (.., K) -> (..), metrics."""
        return cross_entropy(self.net(z).unflatten(-1, self.shape), x)

    @torch.no_grad()
    def sample(self, z, *, steps=None, temperature=1.0, generator=None):
        """z (.., C) -> codes (.., K) of K different frames, drawn at once; `steps` is ignored."""
        return pick(self.net(z).unflatten(-1, self.shape), temperature, self.cfg.top_k, generator)


DISCRETE = {"rq": RQ, "delay": Delay}           # DISCRETE[cfg.objective](K, n, cond_dim, cfg)
