"""AudioCALM: blocks of latents, denoised by iterating the transformer itself over the noisy block.

    text (B, L)   voice prompt (B, P, D)   clean latents (B, T, D)      noisy latents (M, B, T, D)
      └─ embed ─┐    └─ linear ─┐            └─ + noise s, linear ─┐      └─ linear + time(t) ─┐
                ▼               ▼                                  ▼                           ▼
              [ text          | prompt | x¹⁻⁴ | x⁵⁻⁸ | x⁹⁻¹² ...   | x_t¹⁻⁴ | x_t⁵⁻⁸ | x_t⁹⁻¹² .. ]
    position    0 1 2 ...       l ...    l+p ...                     l+p ...          the same again
                                  │  one pass of the backbone, one mask
                                  ▼
                 hidden, clean (B, T, C)          hidden, noisy (B, M·T, C)
                                  │                                │
                stop logit a frame: "the clip                read-out with x_t and t
                ends with or before this one"                      │
                                                      velocity F = ε - x (M, B, T, D)
    who sees whom, block by block:
                 text prompt │ clean 1 2 3 4 │ noisy 1 2 3 4
        text     causal      │               │                     a position sees
        clean 3  ■■■■ ■■■■■■ │       ■ ■ ■   │                       what is clean and earlier,
        noisy 3  ■■■■ ■■■■■■ │       ■ ■     │           ■           and its own block, whole

    L = mean over blocks of ||F - (ε - x)||² / D + stop_weight · BCE(stop logits)

Generation: text and prompt go into a KV cache; then, block after block, N evaluations of F read the
cache with the noisy block behind it and leave no trace, and one clean pass of the finished block
appends its keys and values. The mask is the same as in training, so the numbers are too
(tests/test_audiocalm.py: 1e-5). `python report.py mask mask.png` draws it.

Source: AudioCALM (arXiv 2606.23080): block-causal AR-Flow, flow head and stop head on the hidden
states, exposure-bias noise on the history, clean-prefix noise on the prompt, one description
interface, A-MoME (moe.py). The two halves in one pass are BD3-LM's (Arriola et al. 2025) and
ACDiT's (Hu et al. 2024). Objective and solver are those of heads.py; what shares one t is a block.

Not given in the paper; we chose:
- Time enters where the noise does: an embedding of t is added to the noisy positions' input, and
  the read-out (heads.AdaLNMLP, thin) gets t and x_t once more. Text, prompt and history never
  depend on t, so their keys and values are computed once for all steps, and the layers stay those
  of a plain language model, so that one can be loaded. The read-out's x_t spares the residual
  stream from carrying ε to the output.
- The true length inside the last block: latents behind the end are zeros (the mean latent), which
  the flow learns to draw like everything else, and a stop logit a frame says "the clip is over with
  this frame". Its value at a block's last frame is the paper's stop head, "this is the last block";
  the first positive one is where to cut. Without the zeros a noisy block would have to know its
  length before it is drawn; with a logit a block the clip would end on a multiple of the block.
- The stop logits are read from the clean pass: it sees what was drawn, and costs nothing more.
- Guidance F = F_null + a (F_cond - F_null), in each step. The null condition is a learned embedding
  in every place of text and prompt: as long as the condition, so that both rows of a guided batch
  have the same positions and cache, and no mask. Trained by dropping text and prompt together.
- History noise: x̃ = (1-s) x + s ε, s ~ U(0, history_noise) for each block, unknown to the model.
- `window` latents of history beside text and prompt: memory and time a block are then constant.
  Positions go on counting; distances to the text beyond those of training are extrapolated.
- multiplier M: M draws of (t, ε) share one clean half: [text | prompt | clean | noisy x M].

Beyond the paper: a block in 1 to 4 passes. objective = "lsd" (heads.LSD) learns the flow map, F
from t to s. Its loss needs the derivative by s, the time to jump to, alone; s enters at the
read-out, so the jvp goes through that and never meets attention. Stage "audiocalm_lsd" goes on from
audiocalm.pt; with s = t its F is that flow's.
Precision: the backbone in the autocast dtype; times, read-out's norms and the loss fp32 (heads.py).
"""
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from backbone import BackboneConfig, KVCache, Transformer
from heads import LSD, AdaLNMLP, HeadConfig, RectifiedFlow, TrigFlow, sinusoid
from moe import Experts
from schema import Range

FLOWS = {"rectified_flow": RectifiedFlow, "trigflow": TrigFlow, "lsd": LSD}


@dataclass
class FlowConfig(HeadConfig):
    """The [audiocalm.head] table: a HeadConfig with AudioCALM's values. width and blocks are the
    read-out's.
    """
    # consistency would need a jvp of the whole backbone
    objective: Literal["rectified_flow", "trigflow", "lsd"] = "rectified_flow"
    width: Annotated[int, Range(1)] = 256
    # thin: the backbone does the work
    blocks: Annotated[int, Range(1)] = 1
    # M, noise draws that share one clean half
    multiplier: Annotated[int, Range(1)] = 1
    # logit-normal(0, 1) times (Esser et al. 2024)
    p_mean: float = 0.0
    p_std: Annotated[float, Range(above=0)] = 1.0


@dataclass
class AudioCALMConfig:
    """The [audiocalm] table."""
    # its `causal` is not used
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: FlowConfig = field(default_factory=FlowConfig)
    # latents drawn together, which see each other (the paper sweeps it, the value is not public);
    # 1 = frame by frame, as CALM. The first audio comes after one block
    block: Annotated[int, Range(1)] = 4
    # largest share s of noise in the history that training shows (generation: sample.noise)
    history_noise: Annotated[float, Range(0, 1)] = 0.3
    # the same for the voice prompt: a prompt is a recording, not our own errors, so less
    prompt_noise: Annotated[float, Range(0, 1)] = 0.1
    # share of training rows without text and prompt: what guidance needs
    text_dropout: Annotated[float, Range(0, 1)] = 0.1
    # speech = A-MoME, all = one for each kind (the control of the ablation)
    experts: Literal["none", "speech", "all"] = "speech"
    # hidden width of an expert
    expert_dim: Annotated[int, Range(1)] = 256
    # weight of the end-of-clip loss
    stop_weight: Annotated[float, Range(0)] = 0.1
    # latents of history seen and cached, whole blocks; 0 = all
    window: Annotated[int, Range(0)] = 0

    def __post_init__(self):
        if self.window % self.block:
            raise ValueError(f"window: must be whole blocks of {self.block}, got {self.window}")
        if self.backbone.window:
            raise ValueError("backbone.window: the mask is the blocks'; use audiocalm.window")


def rule(order, copy, valid, window=0):
    """Who sees whom -> sees(row, head, query, key), as flex_attention asks.

    order (S,): block number of latents, negative for text and prompt, counting up to -1.
    copy (S,): 0 for what is clean, m for noisy draw m. valid (B, S): not padding. window: blocks.
    """
    def sees(b, h, q, k):
        earlier = (copy[k] == 0) & (order[k] < order[q]) & valid[b, k]
        if window:
            earlier = earlier & ((order[k] < 0) | (order[q] - order[k] <= window))
        return earlier | ((copy[k] == copy[q]) & (order[k] == order[q]))
    return sees


def make_mask(sees, B, S, device):
    """The rule as a BlockMask on CUDA (attention skips what it hides; it is made of a dense one),
    as a dense one (B, 1, S, S) elsewhere.
    """
    if device.type == "cuda":
        return create_block_mask(sees, B, None, S, S, device=device)
    b, i = torch.arange(B, device=device)[:, None, None], torch.arange(S, device=device)
    return sees(b, 0, i[:, None], i)[:, None]


@dataclass
class Context:
    """What the noisy blocks stand behind: given as embeddings (training) or cached (generation).

    known (B, K, C): text, prompt, clean latents; positions (B, K + N): of known and noisy; masks:
    length S -> mask of the first S. Or cache. experts: from Experts.per_layer. guidance: of a
    cache whose second half of rows is the null condition. hidden (B, K, C): filled in by the first
    pass, for the stop head.
    """
    known: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    masks: dict | None = None
    cache: KVCache | None = None
    experts: list | None = None
    guidance: float = 1.0
    hidden: torch.Tensor | None = None


class ARFlow(nn.Module):
    """The network of the objective: net(x_t, t, context[, s]) -> F, a pass of the backbone.

    x_t (B, n, block · D) or (M, B, n, block · D), t and s without the last axis.
    """

    def __init__(self, cfg, latent_dim, vocab):
        super().__init__()
        C = cfg.backbone.dim
        self.block, self.dim = cfg.block, cfg.block * latent_dim
        self.text = nn.Embedding(vocab, C)
        self.prompt = nn.Linear(latent_dim, C)
        self.latent = nn.Linear(latent_dim, C)
        self.noisy = nn.Linear(latent_dim, C)
        self.time = nn.Sequential(nn.Linear(256, C), nn.SiLU(), nn.Linear(C, C))
        self.null = nn.Parameter(torch.randn(C) * 0.5)
        nn.init.normal_(self.text.weight, std=0.5)   # the scale that the linear layers give latents
        # the order is in the masks, so the backbone has none of its own
        self.backbone = Transformer(replace(cfg.backbone, causal=False, window=0))
        self.readout = AdaLNMLP(latent_dim, C, cfg.head.width, cfg.head.blocks,
                                cfg.head.objective == "lsd", cfg.head.time_norm)

    def embeddings(self):
        """The parameters that start at the scale of the text embedding, itself among them."""
        linear = (self.prompt, self.latent, self.noisy)
        return [self.text.weight, self.null, *(p for layer in linear for p in layer.parameters())]

    def forward(self, x_t, t, z, s=None):
        return self.at_target_time(x_t, t, z)(s)

    def at_target_time(self, x_t, t, z):
        """The backbone's pass, which knows nothing of s -> the read-out, F as a function of s."""
        shape, twice = x_t.shape, z.guidance != 1
        if twice:
            x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
        M, B, n = (1, *t.shape)[-3:]

        def frames(t):                                                          # (B, M·T)
            t = t.reshape(M, B, n).transpose(0, 1).flatten(1)
            return t.repeat_interleave(self.block, 1)
        x = x_t.reshape(M, B, n * self.block, -1).transpose(0, 1).flatten(1, 2)  # (B, M·T, D)
        at, dtype = frames(t), self.noisy.weight.dtype
        with torch.autocast(x.device.type, enabled=False):                      # times stay fp32
            time = self.time(sinusoid(at[:, ::self.block]).to(dtype))           # (B, M·n, C)
        h = self.noisy(x.to(dtype)) + time.repeat_interleave(self.block, 1)     # (B, M·T, C)
        K, cache, where = 0, None, {}
        if z.known is not None:
            K, h = z.known.shape[1], torch.cat([z.known, h], 1)                 # (B, K + M·T, C)
            S = h.shape[1]
            where = {"positions": z.positions[:, :S], "mask": z.masks[S]}
        else:
            cache = z.cache.copy()
        y = self.backbone(h, cache, experts=z.experts, **where)
        if z.hidden is None:
            z.hidden = y[:, :K]

        def read(s):
            if s is not None:
                s = frames(torch.cat([s, s]) if twice else s)
            F = self.readout(x, at, y[:, K:], s)                                # (B, M·T, D)
            F = F.unflatten(1, (M, -1)).transpose(0, 1)
            if not twice:
                return F.reshape(shape)
            cond, null = F.reshape(2 * shape[0], *shape[1:]).chunk(2)
            return null + z.guidance * (cond - null)
        return read


class AudioCALM(nn.Module):
    """latent_dim D; vocab tokens of text; kinds: the names behind batch["kind"], speech first.

    only: the one kind that this copy will generate; the experts of others are then not made (load
    the weights that `wanted` lets through).
    """
    codes = None                                # its latents are never codes
    monologue = False                           # its text always stands before the audio

    def __init__(self, cfg: AudioCALMConfig, latent_dim, vocab, kinds, only=None):
        super().__init__()
        self.cfg, self.kinds = cfg, tuple(kinds)
        net = ARFlow(cfg, latent_dim, vocab)
        self.head = FLOWS[cfg.head.objective](net, cfg.head)
        self.stop = nn.Linear(cfg.backbone.dim, 1)
        owners = {"none": [], "speech": ["speech"], "all": kinds}[cfg.experts]
        self.experts = Experts(cfg.backbone.dim, cfg.expert_dim, cfg.backbone.layers, kinds,
                               [k for k in owners if only in (None, k)])

    @classmethod
    def from_config(cls, cfg, vae, vocab, kinds, only=None):
        """The model for the latents of a VAE (its config)."""
        return cls(cfg, vae.latent_dim, vocab, kinds, only)

    @property
    def backbone(self):
        return self.head.net.backbone

    def matrices(self):
        """The modules whose linear layers are large: what int8 rounds (sample.py)."""
        return [self.backbone, self.head.net.time]

    def compile_for_training(self):
        """torch.compile the backbone and what stands round it."""
        self.backbone.compile()
        self.head.net.compile()

    def wanted(self, state):
        """A state_dict without the experts that this copy does not have."""
        kinds = [f"experts.of.{k}." for k in self.kinds if k not in self.experts.of]
        return {k: v for k, v in state.items() if not k.startswith(tuple(kinds))}

    def prefix(self, text, prompt, keep):
        """Embeddings of text (B, L) and prompt (B, P, D), or the null's where not keep (B,)."""
        net = self.head.net
        given = torch.cat([net.text(text), net.prompt(prompt)], 1)          # (B, L + P, C)
        return torch.where(keep[:, None, None], given, net.null.to(given.dtype))

    def context(self, x, text, text_len, prompt, prompt_len, keep, kind):
        """Everything clean, x (B, T, D) in whole blocks, ready for the pass with M noisy copies.

        Rows sorted by kind; padding of text and prompt stays where it is, seen by nobody, and
        positions count as if it were not there.
        """
        B, T, _ = x.shape
        L, P, M, b = text.shape[1], prompt.shape[1], self.cfg.head.multiplier, self.cfg.block
        known = torch.cat([self.prefix(text, prompt, keep), self.head.net.latent(x)], 1)
        i = torch.arange(max(L, P, T), device=x.device)
        start = (text_len + prompt_len)[:, None]
        audio = start + i[:T]                                               # (B, T)
        positions = torch.cat([i[:L].expand(B, L), text_len[:, None] + i[:P]]
                              + [audio] * (1 + M), 1)                       # (B, L + P + (1+M)·T)
        order = torch.cat([torch.arange(-L - P, 0, device=x.device)] + [i[:T] // b] * (1 + M))
        copy = torch.arange(1 + M, device=x.device).repeat_interleave(T)
        copy = torch.cat([copy.new_zeros(L + P), copy])                     # (L + P + (1+M)·T,)
        valid = torch.cat([i[:L] < text_len[:, None], i[:P] < prompt_len[:, None],
                           torch.ones(B, (1 + M) * T, dtype=torch.bool, device=x.device)], 1)
        sees = rule(order, copy, valid, self.cfg.window // b)
        draws = {M, -(-M // 4)} if self.cfg.head.objective == "lsd" else {M}   # M / 4: its jumps
        masks = {S: make_mask(sees, B, S, x.device) for S in (L + P + T + m * T for m in draws)}
        counts = torch.bincount(kind, minlength=len(self.kinds)).tolist()
        return Context(known, positions, masks, experts=self.experts.per_layer(counts))

    def loss(self, batch):
        """One training loss and its parts.

        batch: x (B, T, D) normalised latents, frames (B,) valid ones; ended (B,) the clip ends in
        this row; text (B, L), text_len (B,) at least 1; prompt (B, P, D), prompt_len (B,); kind
        (B,). In eval mode the metrics also have the flow's loss of each kind that is there.
        """
        cfg, D = self.cfg, batch["x"].shape[2]
        by_kind = batch["kind"].argsort(stable=True)                        # speech rows first
        batch = {name: v[by_kind] for name, v in batch.items()}
        frames, ended, kind = batch["frames"], batch["ended"], batch["kind"]
        blocks = torch.where(ended, -(-frames // cfg.block), frames // cfg.block)           # (B,)
        T, L, P = (batch[name].shape[1] for name in ("x", "text", "prompt"))
        if not frames.is_cuda:                               # static shapes there, less work here
            T, L, P = (int(v.max()) for v in (blocks * cfg.block, batch["text_len"],
                                              batch["prompt_len"]))
            T = max(T, cfg.block)
        T = -(-T // cfg.block) * cfg.block
        x = F.pad(batch["x"], (0, 0, 0, max(0, T - batch["x"].shape[1])))[:, :T]
        s = torch.arange(T, device=x.device)
        x = x * (s < frames[:, None])[..., None]                            # zeros behind the end

        def noised(x, largest, each):
            share = largest * torch.rand(*x.shape[:2], 1, device=x.device)[:, ::each]
            share = share.repeat_interleave(each, 1)[:, :x.shape[1]]        # one a block
            return (1 - share) * x + share * torch.randn_like(x)

        B = len(x)
        keep = torch.rand(B, device=x.device) >= (cfg.text_dropout if self.training else 0)
        z = self.context(noised(x, cfg.history_noise, cfg.block), batch["text"][:, :L],
                         batch["text_len"], noised(batch["prompt"][:, :P], cfg.prompt_noise,
                                                   max(P, 1)), batch["prompt_len"], keep, kind)
        per, _ = self.head.loss(z, x.view(B, T // cfg.block, cfg.block * D))
        real = torch.arange(T // cfg.block, device=x.device) < blocks[:, None]      # (B, blocks)
        head = (per * real).sum() / real.sum().clamp(min=1)

        over = ended[:, None] & (s >= frames[:, None] - 1)                  # over with this frame
        known = real.repeat_interleave(cfg.block, 1)
        logits = self.stop(z.hidden[:, L + P:]).squeeze(-1).float()         # (B, T)
        bce = F.binary_cross_entropy_with_logits(logits, over.float(), reduction="none")
        stop = (bce * known).sum() / known.sum().clamp(min=1)
        metrics = {"head": head.detach(), "stop": stop.detach()}
        if not self.training:
            for i, name in enumerate(self.kinds):
                mine = real & (kind == i)[:, None]
                if mine.any():
                    metrics[f"head_{name}"] = (per * mine).sum().detach() / mine.sum()
        return head + cfg.stop_weight * stop, metrics

    @torch.no_grad()
    def generate(self, text, *, kind, max_frames, prompt=None, history=None, steps=None,
                 temperature=1.0, guidance=1.0, noise=0.0, generator=None):
        """Yields normalised latents (B, D) and which rows have ended (B,) until all have, or
        max_frames. Frame by frame like CALM's, drawn block by block.

        text (B, L) tokens without padding; kind: index; prompt (B, P, D) voice prompt; history
        (B, n, D): clean latents to continue (both normalised), used in whole blocks, the oldest
        n mod block are left out. A row that has ended goes on yielding: cut it there. noise: the
        share of the training's history noise that blocks have when they are heard, 0 to 1.
        """
        cfg, net, B, device = self.cfg, self.head.net, text.shape[0], text.device
        D = net.latent.in_features
        prompt = torch.zeros(B, 0, D, device=device, dtype=self.stop.weight.dtype) \
            if prompt is None else prompt
        keep = torch.ones(B, dtype=torch.bool, device=device)
        known = self.prefix(text, prompt, keep)                             # (B, K, C)
        if guidance != 1:                                                   # (2B, K, C)
            known = torch.cat([known, self.prefix(text, prompt, ~keep)])
        K, rows = known.shape[1], len(known)
        counts = [rows * (i == kind) for i in range(len(self.kinds))]
        cache, experts = KVCache(), self.experts.per_layer(counts)
        causal = torch.ones(K, K, dtype=torch.bool, device=device).tril()
        self.backbone(known, cache, mask=causal, experts=experts)

        def remember(x):
            """The clean pass: x (B, block, D) into the cache -> stop logits (B, block)."""
            if noise * cfg.history_noise:
                draw = {"device": device, "generator": generator}
                share = noise * cfg.history_noise * torch.rand(B, 1, 1, **draw)
                x = (1 - share) * x + share * torch.randn(x.shape, **draw)
            h = net.latent(x.to(net.latent.weight.dtype)).repeat(rows // B, 1, 1)
            hidden = self.backbone(h, cache, experts=experts)
            if cfg.window:
                cache.trim(K, cfg.window)
            return self.stop(hidden[:B]).squeeze(-1)

        if history is not None:
            for x in history[:, history.shape[1] % cfg.block:].split(cfg.block, 1):
                remember(x)
        z = Context(cache=cache, experts=experts, guidance=guidance)
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        for first in range(0, max_frames, cfg.block):
            x = self.head.sample(z, steps=steps, temperature=temperature, generator=generator,
                                 shape=(B, 1, net.dim)).view(B, cfg.block, D)
            over = remember(x) > 0                                          # (B, block)
            for i in range(min(cfg.block, max_frames - first)):
                if ended.all():
                    return
                yield x[:, i], ended
                ended = ended | over[:, i]
            if ended.all():
                return
