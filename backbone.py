"""The transformer: RMSNorm, rotary positions, attention with a cache, SwiGLU.

One class serves the whole project: the backbone of CALM, its short-context branch, and the layers
inside the VAE's encoder and decoder (with a sliding window there).

    x (B, T, C)
     │
     ├─► RMSNorm ─► q k v ─► rotate q, k by position ─► softmax(q kᵀ / √d + mask) v ─► out ─► + ─┐
     │                            │                                                              │
     │                     KVCache (streaming)                                          x (B, T, C)
     ├─► RMSNorm ─► SwiGLU: down(silu(gate x) * up x) ─────────────────────────────────────► + ──┤
     ×  layers                                                                                   ▼
    RMSNorm ─► y (B, T, C)

Which positions a query sees:
    causal              keys at or before it                          (default)
    window = W          only the last W of them, itself included      (VAE layers, short context)
    causal = False      all of them
    mask given          what the mask says                            (AudioCALM's blocks)
With a cache the same rule holds over (cached ++ new) positions, so that feeding a sequence in
chunks of any size gives what one call over the whole sequence gives (tests/test_backbone.py).

Sources: CALM section 4.2 and Table 9 (widths); Mimi (Défossez et al. 2024) for windowed layers in a
codec; RoPE (Su et al. 2021); RMSNorm (Zhang & Sennrich 2019); SwiGLU (Shazeer 2020); GQA (Ainslie
et al. 2023).
Where this differs from the paper: CALM does not name its MLP. Table 9's MLP dimension of 6336 does
not give the table's own parameter counts; 6144 with two matrices ("gelu") or 4032 with three
("swiglu") do.

Precision: norms and rotations in fp32, matrix products in the autocast dtype.
"""
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from schema import Range


@dataclass
class BackboneConfig:
    """Sizes of a transformer. Table 9: music 1536 / 48 layers / 24 heads, speech 2560 / 24 / 20."""
    # model width C
    dim: Annotated[int, Range(1)] = 256
    layers: Annotated[int, Range(0)] = 4
    # query heads
    heads: Annotated[int, Range(1)] = 4
    # key/value heads (GQA); 0 = as many as heads
    kv_heads: Annotated[int, Range(0)] = 0
    # channels of a head, even because of RoPE; 0 = dim / heads (Qwen3: 128 at every width)
    head_dim: Annotated[int, Range(0)] = 0
    # swiglu has three matrices, gelu and gelu_tanh two
    mlp: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    # hidden width; 0 = 4 C for gelu, 8/3 C rounded up to a multiple of 32 for swiglu
    mlp_dim: Annotated[int, Range(0)] = 0
    # RMSNorm on each head's q and k (Qwen3); steadier at high learning rates
    qk_norm: bool = False
    # positions a query sees, itself included; 0 = all earlier ones
    window: Annotated[int, Range(0)] = 0
    causal: bool = True
    # layer = LayerNorm with bias (Mimi)
    norm: Literal["rms", "layer"] = "rms"
    # added to the variance; 0 = 1e-6 for rms (Qwen3; Llama has 1e-5), 1e-5 for layer (Mimi)
    norm_eps: Annotated[float, Range(0)] = 0.0
    # initial value of a learned factor per channel on what each sublayer adds (Mimi: 0.01); 0 = none
    layer_scale: float = 0.0
    # a norm after the last layer (Mimi has none)
    final_norm: bool = True
    # wavelength of the slowest rotation is 2π·rope_base positions
    rope_base: float = 10000.0

    def __post_init__(self):
        if self.head_dim % 2:
            raise ValueError(f"head_dim: must be even, or 0, got {self.head_dim}")
        if not self.head_dim and (self.dim % self.heads or self.dim // self.heads % 2):
            raise ValueError(
                f"heads: dim / heads must be an even whole number, got {self.dim} / {self.heads}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: must divide heads = {self.heads}, got {self.kv_heads}")

    @property
    def head_width(self):
        return self.head_dim or self.dim // self.heads


class RMSNorm(nn.Module):
    """y = w · x / sqrt(mean(x²) + eps), in fp32."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def make_norm(cfg):
    """The norm over C channels that the config names."""
    if cfg.norm == "rms":
        return RMSNorm(cfg.dim, cfg.norm_eps or 1e-6)
    return nn.LayerNorm(cfg.dim, cfg.norm_eps or 1e-5)


def rotations(first, length, dim, base, like):
    """cos and sin (T, d/2) of the angles (first + t) · base^(-2i/d), fp32 (fp64 for fp64 input).

    first: a number, or all positions (.., T) as a tensor: then (.., T, d/2).
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    i = torch.arange(dim // 2, device=like.device, dtype=dtype)
    t = first if torch.is_tensor(first) else first + torch.arange(length, device=like.device)
    angle = t.to(dtype)[..., None] * torch.exp(i * (-2 * math.log(base) / dim))     # (.., T, d/2)
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """Rotate channel pairs (i, i + d/2) of x (B, H, T, d) by the angles of `rotations`."""
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class KVCache:
    """Keys and values of the positions seen so far, one (k, v) pair a layer; `pos` counts
    positions.

    Without gradients new positions are written behind the old ones, into a buffer of twice the
    size: a step copies what is new, not what is there. Whoever replaces a pair in `kv` (select)
    only makes the next append allocate.
    """

    def __init__(self):
        self.kv, self.pos, self.buffers = {}, 0, {}

    def append(self, layer, k, v, window):
        """Add new k, v (B, H, T, d); return all that the new queries can see; keep window - 1 of
        them.
        """
        buffer = None
        if layer in self.kv and torch.is_grad_enabled():
            k, v = torch.cat([self.kv[layer][0], k], 2), torch.cat([self.kv[layer][1], v], 2)
        elif layer in self.kv:
            old, new = self.kv[layer], k.shape[2]
            n = old[0].shape[2]
            keys, values, end, view = self.buffers.get(layer) or (k, v, 0, None)
            if view is not old[0] or end + new > keys.shape[2]:
                size = (*k.shape[:2], 2 * (n + new) + 64, k.shape[3])
                keys, values, end = k.new_empty(size), v.new_empty(size), n
                keys[:, :, :n], values[:, :, :n] = old
            keys[:, :, end:end + new], values[:, :, end:end + new] = k, v
            buffer = keys, values, end + new
            k, v = keys[:, :, end - n:end + new], values[:, :, end - n:end + new]
        keep = min(window - 1, k.shape[2]) if window else k.shape[2]
        self.kv[layer] = (k[:, :, k.shape[2] - keep:], v[:, :, v.shape[2] - keep:])
        self.buffers[layer] = buffer and (*buffer, self.kv[layer][0])
        return k, v

    def copy(self):
        """A cache to read with: what a call appends to the copy, this one never sees.

        One copy at a time: it writes into the spare room of the shared buffer, and the next append
        of either writes over that.
        """
        other = KVCache()
        other.kv, other.pos, other.buffers = dict(self.kv), self.pos, dict(self.buffers)
        return other

    def trim(self, first, last):
        """Forget all positions but the `first` and the `last` ones; `pos` counts on."""
        for i, (k, v) in self.kv.items():
            if k.shape[2] > first + last:
                self.kv[i] = tuple(torch.cat([a[:, :, :first], a[:, :, a.shape[2] - last:]], 2)
                                   for a in (k, v))


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.head_dim = cfg, cfg.head_width
        self.kv_heads = cfg.kv_heads or cfg.heads
        self.wq = nn.Linear(cfg.dim, cfg.heads * self.head_dim, bias=False)
        self.wkv = nn.Linear(cfg.dim, 2 * self.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(cfg.heads * self.head_dim, cfg.dim, bias=False)
        if cfg.qk_norm:
            eps = cfg.norm_eps or 1e-6
            self.q_norm, self.k_norm = RMSNorm(self.head_dim, eps), RMSNorm(self.head_dim, eps)

    def forward(self, x, turn, mask, is_causal, cache, layer):
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.cfg.heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k, v = self.wkv(x).view(B, T, 2, self.kv_heads, self.head_dim).unbind(2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)                               # (B, Hkv, T, d)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, *turn), rope(k, *turn)
        if cache is not None:
            k, v = cache.append(layer, k, v, self.cfg.window)                     # (B, Hkv, P+T, d)
        gqa = self.kv_heads != self.cfg.heads
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal,
                                               enable_gqa=gqa)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        hidden = cfg.mlp_dim or (
            -(-8 * cfg.dim // 3 // 32) * 32 if cfg.mlp == "swiglu" else 4 * cfg.dim)
        self.swiglu = cfg.mlp == "swiglu"
        self.approximate = "tanh" if cfg.mlp == "gelu_tanh" else "none"
        self.up = nn.Linear(cfg.dim, (1 + self.swiglu) * hidden, bias=False)
        self.down = nn.Linear(hidden, cfg.dim, bias=False)

    def forward(self, x):
        h = self.up(x)
        if self.swiglu:
            gate, h = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * h)
        return self.down(F.gelu(h, approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attention = make_norm(cfg), Attention(cfg)
        self.norm2, self.mlp = make_norm(cfg), MLP(cfg)
        self.scale1 = self.scale2 = 1.0
        if cfg.layer_scale:
            self.scale1, self.scale2 = (
                nn.Parameter(torch.full((cfg.dim,), cfg.layer_scale)) for _ in range(2))

    def forward(self, x, *where, expert=None):
        x = x + self.scale1 * self.attention(self.norm1(x), *where)
        h = self.norm2(x)
        y = self.mlp(h) if expert is None else expert(h, self.mlp(h))
        return x + self.scale2 * y


class Transformer(nn.Module):
    """x (B, T, C) -> y (B, T, C).

    cache: a KVCache that the call extends; positions then count on from cache.pos. With
    cache.copy() the call reads what is cached and leaves no trace.
    positions (T,) or (B, T): of the rotations, in place of counting.
    mask: what queries see, in place of the config's rule: bool (T, past + T) or (B, 1, T, past +
    T), True = seen, for SDPA; or a BlockMask, for flex_attention (fast where it is compiled).
    experts: one callable a layer, expert(h, y) -> y: h is what the MLP read, y what it gave.
    Initialisation: N(0, 0.02), output matrices divided by sqrt(2 · layers) (GPT-2).
    """

    def __init__(self, cfg: BackboneConfig):
        super().__init__()
        self.cfg = cfg
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = make_norm(cfg) if cfg.final_norm else nn.Identity()
        for name, p in self.named_parameters():
            if p.dim() == 2:
                out = name.endswith(("wo.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.layers) if out else 0.02)

    def mask(self, new, past, device):
        """What (new) queries see of (past + new) keys: bool (new, past + new), or None with
        is_causal.
        """
        window = self.cfg.window
        if not self.cfg.causal:
            return None, False
        if past == 0 and (not window or new <= window):
            return None, True               # not new > 1: no bool where a length is dynamic
        if new == 1:
            return None, False              # one query: a windowed cache holds just what it may see
        q = torch.arange(past, past + new, device=device)[:, None]
        k = torch.arange(past + new, device=device)[None]
        return (k <= q) & ((q - k < window) if window else True), False

    def forward(self, x, cache: KVCache | None = None, *, positions=None, mask=None, experts=None):
        if x.shape[1] == 0:
            return x
        first = cache.pos if cache is not None else 0
        if positions is not None:                                  # (B, 1, T): the same for heads
            first = positions[:, None] if positions.dim() == 2 else positions
        turn = rotations(first, x.shape[1], self.cfg.head_width, self.cfg.rope_base, x)
        past = cache.kv[0][0].shape[2] if cache is not None and 0 in cache.kv else 0
        is_causal = False
        if mask is None:
            mask, is_causal = self.mask(x.shape[1], past, x.device)
        for i, block in enumerate(self.blocks):
            x = block(x, turn, mask, is_causal, cache, i,
                      expert=None if experts is None else experts[i])
        if cache is not None:
            cache.pos += x.shape[1]
        return self.norm(x)
