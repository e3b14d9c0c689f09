"""The transformer: RMSNorm, rotary positions, attention with a KV cache, SwiGLU.

One class serves the whole project: the backbone of CALM, its short-context transformer, and the
layers inside the VAE's encoder and decoder (there with a sliding window).

    x (B, T, C)
     │
     ├─► RMSNorm ─► q k v ─► rotate q, k by position ─► softmax(q kᵀ / √d + mask) v ─► out ─► + ─┐
     │                            │                                                              │
     │                     KVCache (streaming)                                          x (B, T, C)
     ├─► RMSNorm ─► SwiGLU: down(silu(gate x) * up x) ─────────────────────────────────────► + ──┤
     ×  layers                                                                                   ▼
    RMSNorm ─► y (B, T, C)

Which positions a query attends to:
    causal              its own position and all earlier ones             (default)
    window = W          the last W positions, its own included           (VAE layers, short context)
    causal = False      all positions
    mask given          those that the mask marks                         (AudioCALM's blocks)
With a cache the same rule holds over the cached and the new positions together: feeding a sequence
in chunks of any size gives the same output as one call on the whole sequence
(tests/papers/test_backbone.py).

Sources: CALM section 4.2 and Table 9 (widths); Mimi (Défossez et al. 2024) for windowed layers in a
codec; RoPE (Su et al. 2021); RMSNorm (Zhang & Sennrich 2019); SwiGLU (Shazeer 2020); GQA (Ainslie
et al. 2023).
Where this differs from the paper: CALM does not name its MLP. Table 9's MLP dimension for music,
6336, does not reproduce the table's own parameter counts; 6144 with two matrices ("gelu") or 4032
with three ("swiglu") does. For speech, 7040 = 2/3 of Table 9's 10560 does, gated
(configs/paper/calm_speech.toml).

Precision: norms and rotations in fp32, matrix products in the autocast dtype.
"""
import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from schema import Range


@dataclass
class BackboneConfig:
    """Sizes of a transformer. Table 9: music 1536 / 48 layers / 24 heads, speech 2560 / 24 / 20."""
    # Model width C.
    dim: Annotated[int, Range(1, 100_000)] = 256
    # Number of layers, each attention and MLP.
    layers: Annotated[int, Range(0, 10_000)] = 4
    # Number of query heads.
    heads: Annotated[int, Range(1, 10_000)] = 4
    # Number of key/value heads (GQA); 0 = as many as query heads.
    kv_heads: Annotated[int, Range(0, 10_000)] = 0
    # Channels per head, even because RoPE rotates pairs; 0 = dim / heads (Qwen3: 128 at any width).
    head_dim: Annotated[int, Range(0, 100_000)] = 0
    # Kind of MLP: swiglu has three matrices, gelu and gelu_tanh have two.
    mlp: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    # Hidden width of the MLP; 0 = 4 C for gelu, 8/3 C rounded up to a multiple of 32 for swiglu.
    mlp_dim: Annotated[int, Range(0, 1_000_000)] = 0
    # RMSNorm on the q and k of each head, which steadies training at high learning rates (Qwen3).
    qk_norm: bool = False
    # Positions that a query attends to, its own included; 0 = all earlier ones.
    window: Annotated[int, Range(0, 1_000_000)] = 0
    # Whether a query attends to its own and earlier positions only.
    causal: bool = True
    # Kind of norm: rms, or layer = LayerNorm with bias (Mimi).
    norm: Literal["rms", "layer"] = "rms"
    # Added to the variance in norms; 0 = 1e-6 for rms (Qwen3; Llama: 1e-5), 1e-5 for layer (Mimi).
    norm_eps: Annotated[float, Range(0)] = 0.0
    # Start value of a learned factor per channel on each sublayer's output; 0 = none (Mimi: 0.01).
    layer_scale: float = 0.0
    # Whether a norm follows the last layer (Mimi has none).
    final_norm: bool = True
    # Base of RoPE's frequencies: the slowest rotation has a period of about
    # 2π · rope_base^(1 - 2/d) positions, d channels per head.
    rope_base: Annotated[float, Range(above=0)] = 10000.0

    def __post_init__(self):
        if self.head_dim % 2:
            raise ValueError(f"head_dim: must be even, or 0 for dim / heads, got {self.head_dim}")
        if not self.head_dim and (self.dim % self.heads or self.dim // self.heads % 2):
            raise ValueError(
                f"heads: dim / heads must be an even integer, got {self.dim} / {self.heads}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: must divide heads = {self.heads}, got {self.kv_heads}")

    @property
    def head_width(self):
        """Channels per head, with the default resolved."""
        return self.head_dim or self.dim // self.heads


class RMSNorm(nn.Module):
    """Root-mean-square norm: y = w · x / sqrt(mean(x²) + eps), in fp32."""

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


def rotations(positions, dim, base, dtype):
    """The cosine and sine of RoPE's angles, position · base^(-2i/d) for channel pair i.

    positions (.., T), d = dim -> two tensors (.., T, d/2), fp32 (fp64 if dtype is fp64).
    """
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    i = torch.arange(dim // 2, device=positions.device, dtype=dtype)
    frequency = torch.exp(i * (-2 * math.log(base) / dim))                      # (d/2,)
    angle = positions.to(dtype)[..., None] * frequency                          # (.., T, d/2)
    return angle.cos(), angle.sin()


def rope(x, cos, sin):
    """Rotate channel pairs (i, i + d/2) of x (B, H, T, d) by the angles of `rotations`."""
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Buffer(NamedTuple):
    """Storage for one layer's keys and values, with spare room behind those already written."""
    keys: torch.Tensor      # (B, H, capacity, d)
    values: torch.Tensor    # (B, H, capacity, d)
    end: int                # number of positions written
    # the part of `keys` that the last append left in KVCache.kv[layer][0]. If kv[layer][0] is no
    # longer this tensor, other code has replaced it: copy to a new buffer
    view: torch.Tensor

    def write(self, k, v):
        """Write k, v (B, H, T, d) behind the positions written so far."""
        end = self.end + k.shape[2]
        self.keys[:, :, self.end:end] = k
        self.values[:, :, self.end:end] = v
        return self._replace(end=end)


class KVCache:
    """Keys and values of earlier positions, so that a streaming step computes only the new ones.

    kv       {layer: (k, v)}, each (B, H, P, d): the P positions that the next query may attend to
    pos      number of positions processed so far, including those dropped since
    buffers  {layer: Buffer or None}: the storage that kv[layer] is a view of
    front    (B,): positions of padding in front of each row, which no other sees; None = none

    Without gradients, an append writes into the spare room of the layer's buffer; what is cached
    stays in place:

        buffer.keys   │ dropped │ cached: kv[layer][0] │ new │ spare room            │
                                └──── append returns ────────┴─ buffer.end

    When the room is used up, the cached positions move to a buffer of twice the size. They also do
    after other code has replaced kv[layer] (to select rows), which it may at any time: kv[layer] is
    then no longer the view that the buffer remembers.
    """

    def __init__(self, front=None):
        self.kv = {}
        self.pos = 0
        self.buffers = {}
        self.front = front

    def positions(self, new, device):
        """Positions of `new` queries: (new,), or (B, new) with padding, which is not counted."""
        positions = self.pos + torch.arange(new, device=device)
        return positions if self.front is None else positions - self.front[:, None]

    def mask(self, net, new, device):
        """(mask, is_causal) for `new` queries: the rule of net, a Transformer, without padding."""
        past = self.kv[0][0].shape[2] if 0 in self.kv else 0
        if self.front is None:
            return net.attention_mask(new, past, device)

        q = self.pos + torch.arange(new, device=device)[:, None]
        k = self.pos - past + torch.arange(past + new, device=device)
        mask = k <= q                                                           # (new, past + new)
        if net.cfg.window:
            mask = mask & (q - k < net.cfg.window)

        # padding sees itself, since a query that sees nothing gives NaN
        mask = mask & (k >= self.front[:, None, None]) | (k == q)
        return mask[:, None], False                                     # (B, 1, new, past + new)

    def append(self, layer, k, v, window):
        """Add k, v (B, H, T, d) of T new positions; return the keys and values to attend to.

        These are the cached positions and the new ones. The cache then keeps the last window - 1,
        all that a later query can attend to, or all positions if window is 0.
        """
        buffer = None
        if layer in self.kv and torch.is_grad_enabled():
            # autograd does not allow writing in place
            old_k, old_v = self.kv[layer]
            k = torch.cat([old_k, k], dim=2)                                    # (B, H, P+T, d)
            v = torch.cat([old_v, v], dim=2)
        elif layer in self.kv:
            length = self.kv[layer][0].shape[2] + k.shape[2]
            buffer = self.room_for(layer, k.shape[2]).write(k, v)
            k = buffer.keys[:, :, buffer.end - length:buffer.end]               # (B, H, P+T, d)
            v = buffer.values[:, :, buffer.end - length:buffer.end]

        # keep what a later query can attend to
        length = k.shape[2]
        first = length - min(window - 1, length) if window else 0
        self.kv[layer] = k[:, :, first:], v[:, :, first:]
        if buffer is not None:
            buffer = buffer._replace(view=self.kv[layer][0])
        self.buffers[layer] = buffer
        return k, v

    def room_for(self, layer, new):
        """The layer's buffer; one of twice the size if `new` positions do not fit into it."""
        k, v = self.kv[layer]
        buffer = self.buffers.get(layer)
        if buffer is not None and buffer.view is k and buffer.end + new <= buffer.keys.shape[2]:
            return buffer

        size = (*k.shape[:2], 2 * (k.shape[2] + new) + 64, k.shape[3])
        buffer = Buffer(k.new_empty(size), v.new_empty(size), end=0, view=k)
        return buffer.write(k, v)

    def reserve(self, new):
        """Make room for `new` positions, so that all copies append to the same storage.

        Without it every copy that finds no room would move the whole cache for itself.
        """
        for layer, (k, _) in self.kv.items():
            self.point_to(layer, self.room_for(layer, new), k.shape[2])

    def point_to(self, layer, buffer, length):
        """kv[layer] becomes the last `length` positions of the buffer."""
        first = buffer.end - length
        k = buffer.keys[:, :, first:buffer.end]
        self.kv[layer] = k, buffer.values[:, :, first:buffer.end]
        self.buffers[layer] = buffer._replace(view=k)

    def copy(self):
        """A cache to read from: appending to the copy leaves this cache unchanged.

        Use one copy at a time. It shares the buffer and writes into its spare room, and the next
        append to either cache overwrites that.
        """
        other = KVCache(self.front)
        other.kv = dict(self.kv)
        other.pos = self.pos
        other.buffers = dict(self.buffers)
        return other

    def trim(self, first, last):
        """Drop all cached positions except the `first` and the `last` ones; `pos` is unchanged.

        A buffer keeps its storage: the positions that stay move to its front.
        """
        for layer, (k, v) in self.kv.items():
            length = k.shape[2]
            if length <= first + last:
                continue
            kept_k = torch.cat([k[:, :, :first], k[:, :, length - last:]], dim=2)
            kept_v = torch.cat([v[:, :, :first], v[:, :, length - last:]], dim=2)

            buffer = self.buffers.get(layer)
            if buffer is None or buffer.view is not k or torch.is_grad_enabled():
                self.kv[layer] = kept_k, kept_v
            else:
                buffer = buffer._replace(end=0).write(kept_k, kept_v)
                self.point_to(layer, buffer, first + last)


class StaticCache:
    """A KVCache in memory that never moves, for steps that are compiled or recorded (replay.py).

        slot    0 ... pinned - 1     pinned ... size - 1
        holds   positions 0 ...      a ring: position p in slot pinned + (p - pinned) % ring

    kv     [(k, v)] of each layer, (B, H, size, d); ring = size - pinned
    pos    number of positions processed so far, a tensor (): the operations of a call are the same
           at every position
    front  as in KVCache

    A query attends to every position that is held and to all new ones, which is the rule of a
    causal model for one new position, and AudioCALM's for a block. A ring as long as the window
    holds exactly what the window shows.
    """

    def __init__(self, kv, size, pinned, pos, front):
        self.kv = kv
        self.size = size
        self.pinned = pinned
        self.pos = pos
        self.front = front

    @classmethod
    def beside(cls, cache, size, pinned=0):
        """Memory for what a filled KVCache holds and what is still to come; load() fills it."""
        kv = []
        for k, v in cache.kv.values():
            shape = (*k.shape[:2], size, k.shape[3])
            kv.append((k.new_zeros(shape), v.new_zeros(shape)))
        pos = torch.zeros((), dtype=torch.long, device=k.device)
        front = None if cache.front is None else torch.zeros_like(cache.front)
        return cls(kv, size, pinned, pos, front)

    def load(self, cache):
        """Take over what a KVCache of the same model and batch holds."""
        self.pos.fill_(cache.pos)
        if self.front is not None:
            self.front.copy_(cache.front)

        # the first pinned positions, and the last ones
        length = cache.kv[0][0].shape[2]
        kept = torch.arange(length, device=self.pos.device)
        kept = torch.where(kept < self.pinned, kept, kept + cache.pos - length)
        slots = self.slots(kept)
        for (k, v), (new_k, new_v) in zip(self.kv, cache.kv.values()):
            k.index_copy_(2, slots, new_k)
            v.index_copy_(2, slots, new_v)

    def slots(self, positions):
        """Where positions (n,) are held."""
        in_ring = self.pinned + (positions - self.pinned) % (self.size - self.pinned)
        return torch.where(positions < self.pinned, positions, in_ring)

    def positions(self, new, device):
        """As KVCache.positions; the new keys and values will be written there."""
        positions = self.pos + torch.arange(new, device=device)
        self.new_slots = self.slots(positions)
        return positions if self.front is None else positions - self.front[:, None]

    def mask(self, net, new, device):
        """(mask (1, size) or (B, 1, 1, size), False): the slots that hold something by then."""
        slot = torch.arange(self.size, device=device)
        last = self.pos + new - 1
        held = last - (last - slot) % (self.size - self.pinned)                 # position in a slot
        if self.front is None:
            return ((slot < self.pinned) | (held >= self.pinned))[None], False
        return (held >= self.front[:, None])[:, None, None], False

    def append(self, layer, k, v, window):
        """Write k, v (B, H, T, d) of T new positions; return all slots (B, H, size, d)."""
        keys, values = self.kv[layer]
        keys.index_copy_(2, self.new_slots, k)
        values.index_copy_(2, self.new_slots, v)
        return keys, values

    def copy(self):
        """A cache to read from: it writes where this one will write next, and keeps its own pos."""
        return StaticCache(self.kv, self.size, self.pinned, self.pos.clone(), self.front)

    def reserve(self, new):
        """There is room: the ring."""

    def trim(self, first, last):
        """The ring drops what is too old."""


class Band(NamedTuple):
    """The mask of a window in chunks of queries, each with its own keys and those before them."""
    # positions that a query attends to, its own included
    window: int
    # queries per chunk
    size: int
    # True = attend (chunks, 1, size, size + window - 1)
    mask: torch.Tensor


def make_band(window, new, past, device):
    """The Band of `new` queries over past + new keys, past < window."""
    size = max(window, 64)
    chunks = -(-new // size)
    before = window - 1                                     # keys in front of a chunk's own
    query = torch.arange(size, device=device)[:, None] + before
    key = torch.arange(size + before, device=device)
    in_window = (key <= query) & (query - key < window)                         # (size, keys)

    # in front of the first keys there is padding
    chunk = torch.arange(chunks, device=device)[:, None, None]
    exists = chunk * size + key >= before - past                                # (chunks, 1, keys)
    return Band(window, size, (in_window & exists)[:, None])


def banded_attention(q, k, v, band, gqa):
    """Attention of q (B, H, T, d) over k, v (B, Hkv, P + T, d), memory O(T · window)."""
    B, _, T, _ = q.shape
    chunks = band.mask.shape[0]
    behind = chunks * band.size - T
    front = band.window - 1 - (k.shape[2] - T)

    # queries in chunks, and for each the keys that it may attend to
    q = rearrange(F.pad(q, (0, 0, 0, behind)), "b h (n s) d -> (b n) h s d", n=chunks)
    keys = band.mask.shape[-1]
    kv = F.pad(torch.stack([k, v]), (0, 0, front, behind))                      # (2, B, Hkv, ., d)
    kv = kv.unfold(3, keys, band.size)                                          # (.., n, d, keys)
    k, v = rearrange(kv, "kv b h n d s -> kv (b n) h s d")

    mask = repeat(band.mask, "n 1 q s -> (b n) 1 q s", b=B)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    return rearrange(y, "(b n) h s d -> b h (n s) d", b=B)[:, :, :T]


class Attention(nn.Module):
    """Multi-head attention with rotary positions and, with kv_heads, grouped queries."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.head_dim = cfg.head_width
        self.kv_heads = cfg.kv_heads or cfg.heads

        self.wq = nn.Linear(cfg.dim, cfg.heads * self.head_dim, bias=False)
        self.wkv = nn.Linear(cfg.dim, 2 * self.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(cfg.heads * self.head_dim, cfg.dim, bias=False)
        if cfg.qk_norm:
            eps = cfg.norm_eps or 1e-6
            self.q_norm = RMSNorm(self.head_dim, eps)
            self.k_norm = RMSNorm(self.head_dim, eps)

    def forward(self, x, rotation, mask, is_causal, cache, layer):
        """x (B, T, C) -> (B, T, C).

        rotation: (cos, sin); mask, is_causal: as SDPA takes them, or mask is a BlockMask or a Band.
        """
        d = self.head_dim
        q = rearrange(self.wq(x), "b t (h d) -> b h t d", d=d)                  # (B, H, T, d)
        k, v = rearrange(self.wkv(x), "b t (kv h d) -> kv b h t d", kv=2, d=d)  # (B, Hkv, T, d)
        if self.cfg.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)

        q = rope(q, *rotation)
        k = rope(k, *rotation)
        if cache is not None:
            k, v = cache.append(layer, k, v, self.cfg.window)                   # (B, Hkv, P+T, d)

        gqa = self.kv_heads != self.cfg.heads
        if isinstance(mask, BlockMask):
            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
        elif isinstance(mask, Band):
            y = banded_attention(q, k, v, mask, gqa)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=gqa)   # (B, H, T, d)
        return self.wo(rearrange(y, "b h t d -> b t (h d)"))                    # (B, T, C)


class MLP(nn.Module):
    """Position-wise feed-forward network: down(silu(gate x) · up x), or down(gelu(up x))."""

    def __init__(self, cfg):
        super().__init__()
        self.swiglu = cfg.mlp == "swiglu"
        self.approximate = "tanh" if cfg.mlp == "gelu_tanh" else "none"

        hidden = cfg.mlp_dim
        if not hidden and self.swiglu:
            hidden = math.ceil(8 * cfg.dim / 3 / 32) * 32
        elif not hidden:
            hidden = 4 * cfg.dim
        # (2F, C): gate, then up; or (F, C)
        self.up = nn.Linear(cfg.dim, (2 if self.swiglu else 1) * hidden, bias=False)
        self.down = nn.Linear(hidden, cfg.dim, bias=False)

    def forward(self, x):
        h = self.up(x)
        if self.swiglu:
            gate, h = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * h)
        return self.down(F.gelu(h, approximate=self.approximate))


class Block(nn.Module):
    """One layer: attention, then MLP, each reading a norm of x and adding its output to x."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1 = make_norm(cfg)
        self.attention = Attention(cfg)
        self.norm2 = make_norm(cfg)
        self.mlp = MLP(cfg)

        self.scale1 = 1.0
        self.scale2 = 1.0
        if cfg.layer_scale:
            self.scale1 = nn.Parameter(torch.full((cfg.dim,), cfg.layer_scale))
            self.scale2 = nn.Parameter(torch.full((cfg.dim,), cfg.layer_scale))

    def forward(self, x, rotation, mask, is_causal, cache, layer, expert=None):
        y = self.attention(self.norm1(x), rotation, mask, is_causal, cache, layer)
        x = x + self.scale1 * y

        h = self.norm2(x)
        y = self.mlp(h)
        if expert is not None:
            y = expert(h, y)                                                    # A-MoME
        return x + self.scale2 * y


class Transformer(nn.Module):
    """A stack of layers: x (B, T, C) -> y (B, T, C).

    cache      a KVCache or StaticCache to read and extend; positions then continue from cache.pos.
               With cache.copy() the call reads the cache and leaves it unchanged.
    positions  (T,) or (B, T), for the rotations, in place of 0, 1, 2 ...; without a cache
    mask       which keys a query attends to, in place of the config's rule, for P cached positions:
               bool (T, P + T) or (B, 1, T, P + T), True = attend, for SDPA; or a BlockMask, for
               flex_attention (fast when compiled).
    experts    one callable per layer, expert(h, y) -> y, where h is the MLP's input and y its
               output (moe.py).

    checkpoint (attribute): compute the activations inside each layer again in the backward pass
    instead of keeping them.

    Initialisation: N(0, 0.02²), output matrices divided by sqrt(2 · layers) (GPT-2).
    """
    checkpoint = False

    def __init__(self, cfg: BackboneConfig):
        super().__init__()
        self.cfg = cfg
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = make_norm(cfg) if cfg.final_norm else nn.Identity()
        for name, p in self.named_parameters():
            if p.dim() == 2:
                is_output = name.endswith(("wo.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.layers) if is_output else 0.02)

    def attention_mask(self, new, past, device):
        """The config's rule for `new` queries over past + new keys: (mask, is_causal) for SDPA.

        mask: bool (new, past + new), True = attend; or a Band, where that would be much smaller; or
        None, all keys, earlier ones if is_causal.
        """
        window = self.cfg.window
        if not self.cfg.causal:
            return None, False

        # no window in effect: use SDPA's causal flag. (No `new > 1` test: under torch.compile it is
        # symbolic.)
        if past == 0 and (not window or new <= window):
            return None, True

        # one query: the cache holds exactly what it may attend to
        if new == 1:
            return None, False

        # a long sequence with a window: memory O(new · window)
        if window and past < window and new > 4 * max(window, 64):
            return make_band(window, new, past, device), False

        q = torch.arange(past, past + new, device=device)[:, None]
        k = torch.arange(past + new, device=device)[None]
        mask = k <= q                                                           # (new, past + new)
        if window:
            mask = mask & (q - k < window)
        return mask, False

    def forward(self, x, cache: KVCache | StaticCache | None = None, *, positions=None, mask=None,
                experts=None):
        T = x.shape[1]
        if T == 0:
            return x

        # rotations of the positions, the same for all heads
        if cache is not None:
            positions = cache.positions(T, x.device)                            # (T,) or (B, T)
        elif positions is None:
            positions = torch.arange(T, device=x.device)                        # (T,)
        if positions.dim() == 2:
            positions = positions[:, None]                                      # (B, 1, T)
        rotation = rotations(positions, self.cfg.head_width, self.cfg.rope_base, x.dtype)

        # mask: the caller's, or the config's rule
        is_causal = False
        if mask is None and cache is not None:
            mask, is_causal = cache.mask(self, T, x.device)
        elif mask is None:
            mask, is_causal = self.attention_mask(T, 0, x.device)

        # layers
        for i, block in enumerate(self.blocks):
            expert = None if experts is None else experts[i]
            arguments = (x, rotation, mask, is_causal, cache, i, expert)
            if self.checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)

        if cache is not None:
            cache.pos += T
        return self.norm(x)
