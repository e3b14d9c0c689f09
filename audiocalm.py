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
                stop logit per frame: "the clip              read-out with x_t and t
                ends with or before this one"                      │
                                                      velocity F = ε - x (M, B, T, D)

    mask of AR-Flow, block by block:
                 text prompt │ clean 1 2 3 4 │ noisy 1 2 3 4
        text     causal      │               │                     a position sees clean blocks
        clean 3  ■■■■ ■■■■■■ │       ■ ■ ■   │                     before its own, and the whole
        noisy 3  ■■■■ ■■■■■■ │       ■ ■     │           ■         of its own block

    L = mean over blocks of ||F - (ε - x)||² / (block · D) + stop_weight · BCE(stop logits)

is the loss of the rectified flow; for trigflow and lsd see heads.py. How the mask makes text and
prompt causal: they have the orders -K ... -1, one each, so "the same block" is the position itself.

Generation: text and prompt go into a KV cache. Then, block by block, N evaluations of F read the
cache with the noisy block behind it and leave the cache unchanged, and one clean pass of the
finished block appends its keys and values. The mask is that of training, so the numbers are the
same (tests/papers/test_audiocalm.py: 1e-10 in fp64). `python report.py mask mask.png` draws it.

Source: AudioCALM (arXiv 2606.23080): block-causal AR-Flow, flow head and stop head on the hidden
states, exposure-bias noise on the history, clean-prefix noise on the prompt, one description
interface, speech expert (moe.py). The two halves in one pass are from BD3-LM (Arriola et al. 2025)
and ACDiT (Hu et al. 2024). Objective and solver are those of heads.py, with one t per block.

Where this differs from the paper, or chooses what the paper does not give:
- Time enters where the noise does: an embedding of t is added to the input of the noisy positions,
  and the read-out (heads.AdaLNMLP, thin) gets t and x_t once more. Text, prompt and history never
  depend on t, so their keys and values are computed once for all steps, and the layers stay those
  of a plain language model, so that a pretrained one can be loaded. With x_t at the read-out, the
  residual stream need not carry ε to the output.
- The true length inside the last block: latents behind the end are zeros (the mean latent), which
  the flow learns to generate like all others, and a stop logit per frame predicts "the clip is over
  with this frame". Its value at a block's last frame is the paper's stop head, "this is the last
  block"; a clip is cut at its first positive logit. Without the zeros the length of a noisy block
  would have to be known first; with one logit per block, clips could end only at multiples of a
  block.
- The stop logits are read from the clean pass: it sees the generated block, and costs nothing more.
- Guidance F = F_null + a (F_cond - F_null), in each solver step. The null condition is a learned
  embedding in every place of text and prompt: it is as long as the condition, so that both rows of
  a guided batch share positions and cache, without a mask. It is trained by dropping text and
  prompt together.
- History noise: x̃ = (1-s) x + s ε, s ~ U(0, history_noise) per block; the model is not given s.
- `window`: latents of history that are seen beside text and prompt, which makes memory and time per
  block constant. Positions go on counting, so distances to the text beyond those of training are
  extrapolated.
- multiplier M: M samples of (t, ε) share one clean half: [text | prompt | clean | noisy x M].

Beyond the paper: a block in 1 to 4 passes. objective = "lsd" (heads.LSD) learns the flow map, F
from t to s. Its loss needs a derivative with respect to s alone, the time to jump to. s enters at
the read-out, so the derivative is the read-out's and never goes through attention. Stage
"audiocalm_lsd" starts from audiocalm.pt; with s = t its F is the F of that flow.
Precision: the backbone in the autocast dtype; times, read-out's norms and the loss fp32 (heads.py).
"""
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from torch.nn.attention.flex_attention import create_block_mask

from backbone import BackboneConfig, KVCache, StaticCache, Transformer
from data import vocabulary
from heads import LSD, AdaLNMLP, HeadConfig, RectifiedFlow, TrigFlow, sinusoid
from moe import Experts
from noise import normal, rows_cut, uniform
from processes import masked_mean
from replay import Replay, rounded, until_all_ended
from schema import Range

FLOWS = {"rectified_flow": RectifiedFlow, "trigflow": TrigFlow, "lsd": LSD}


@dataclass
class FlowConfig(HeadConfig):
    """The [audiocalm.head] table: a HeadConfig with AudioCALM's values, for the read-out.

    The fields of consistency and of the discrete heads are inherited and ignored.
    """
    # what the network learns; consistency would need a tangent through the whole backbone
    objective: Literal["rectified_flow", "trigflow", "lsd"] = "rectified_flow"
    # width of the read-out
    width: Annotated[int, Range(1, 100_000)] = 256
    # blocks of the read-out; thin, because the backbone does the work
    blocks: Annotated[int, Range(1, 10_000)] = 1
    # M, samples of (t, noise) that share one clean half
    multiplier: Annotated[int, Range(1, 10_000)] = 1
    # mean of the logit of t: times are logit-normal(0, 1) (Esser et al. 2024)
    p_mean: float = 0.0
    # standard deviation of the logit of t
    p_std: Annotated[float, Range(above=0)] = 1.0


@dataclass
class AudioCALMConfig:
    """The [audiocalm] table."""
    # sizes of the transformer; its `causal` is not used
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: FlowConfig = field(default_factory=FlowConfig)
    # latents generated together, which see each other; 1 = frame by frame, as CALM. The paper
    # sweeps it without publishing the value; the first audio comes after one block
    block: Annotated[int, Range(1, 10_000)] = 4
    # largest share s of noise in the history during training (generation: sample.noise)
    history_noise: Annotated[float, Range(0, 1)] = 0.3
    # the same for the voice prompt; less, because a recording has none of the model's errors
    prompt_noise: Annotated[float, Range(0, 1)] = 0.1
    # share of training rows that go without text and prompt; guidance needs some
    text_dropout: Annotated[float, Range(0, 1)] = 0.1
    # speech = the speech expert of moe.py, all = one for each kind (the control of the ablation)
    experts: Literal["none", "speech", "all"] = "speech"
    # hidden width of an expert
    expert_dim: Annotated[int, Range(1, 1_000_000)] = 256
    # weight of the end-of-clip loss
    stop_weight: Annotated[float, Range(0)] = 0.1
    # latents of history that are seen and cached, in whole blocks; 0 = all
    window: Annotated[int, Range(0, 1_000_000)] = 0

    def __post_init__(self):
        if self.window % self.block:
            raise ValueError(f"window: must be whole blocks of {self.block}, got {self.window}")
        if self.backbone.window:
            raise ValueError("backbone.window: must be 0, the mask is made of blocks; "
                             "use audiocalm.window")


def ar_flow_mask(order, copy, valid, window=0):
    """The mask of the blocks as a function sees(row, head, query, key), for flex_attention.

    order (S,): block number of latents; negative for text and prompt, counting up to -1.
    copy (S,): 0 for clean positions, m for noisy copy m. valid (B, S): not padding. window: how
    many blocks of history are seen, 0 = all.
    """
    def sees(row, head, query, key):
        earlier = (copy[key] == 0) & (order[key] < order[query]) & valid[row, key]
        if window:
            in_window = (order[key] < 0) | (order[query] - order[key] <= window)
            earlier = earlier & in_window
        same_block = (copy[key] == copy[query]) & (order[key] == order[query])
        return earlier | same_block                                             # AR-Flow mask
    return sees


def make_mask(sees, B, S, device):
    """The mask of ar_flow_mask as a BlockMask on CUDA, else as a dense one (B, 1, S, S).

    Attention skips the hidden blocks of a BlockMask, which is made from a dense mask.
    """
    if device.type == "cuda":
        return create_block_mask(sees, B, None, S, S, device=device)
    row = torch.arange(B, device=device)[:, None, None]
    i = torch.arange(S, device=device)
    return sees(row, 0, i[:, None], i)[:, None]


def add_history_noise(x, s_max, block, source=None):
    """x (B, T, D) -> x̃ = (1-s) x + s ε with one s ~ U(0, s_max) per block (exposure bias)."""
    s = s_max * uniform((*x.shape[:2], 1), source, x.device)[:, ::block]        # (B, blocks, 1)
    s = s.repeat_interleave(block, 1)[:, :x.shape[1]]                           # (B, T, 1)
    return (1 - s) * x + s * normal(x.shape, source, x.device, x.dtype)


@dataclass
class Context:
    """What the noisy blocks attend to: embeddings (training) or a KV cache (generation)."""
    # training: text, prompt and clean latents (B, K, C)
    clean: torch.Tensor | None = None
    # training: positions of clean and noisy embeddings (B, K + N)
    positions: torch.Tensor | None = None
    # training: total length S -> mask of the first S positions
    masks: dict | None = None
    # generation: keys and values of everything clean, and how many of them are text and prompt
    cache: KVCache | StaticCache | None = None
    prefix_len: int = 0
    # generation: a; if it is not 1, the second half of the cache's rows is the null condition
    guidance: float = 1.0
    # what Experts.per_layer returns
    experts: list | None = None
    # training: hidden states of the clean half (B, K, C), set by the first pass for the stop head
    hidden: torch.Tensor | None = None


class ARFlow(nn.Module):
    """The network of the objective: net(x_t, t, context[, s]) -> F, one pass of the backbone.

    x_t (B, n, block · D) or (M, B, n, block · D); t and s the same without the last axis. z is the
    Context, passed where heads.py passes a tensor.
    """

    def __init__(self, cfg, latent_dim, vocab):
        super().__init__()
        C = cfg.backbone.dim
        self.block = cfg.block
        self.dim = cfg.block * latent_dim
        self.text = nn.Embedding(vocab, C)
        self.prompt = nn.Linear(latent_dim, C)
        self.latent = nn.Linear(latent_dim, C)
        self.noisy = nn.Linear(latent_dim, C)
        self.time = nn.Sequential(nn.Linear(256, C), nn.SiLU(), nn.Linear(C, C))
        self.null = nn.Parameter(torch.randn(C) * 0.5)
        nn.init.normal_(self.text.weight, std=0.5)      # the scale at which latents are embedded

        # the masks hold the order of positions, so the backbone itself has none
        self.backbone = Transformer(replace(cfg.backbone, causal=False, window=0))
        self.readout = AdaLNMLP(latent_dim, C, cfg.head.width, cfg.head.blocks,
                                cfg.head.objective == "lsd", cfg.head.time_norm)

    def embeddings(self):
        """The parameters that start at the scale of the text embedding, itself among them."""
        linear = (self.prompt, self.latent, self.noisy)
        return [self.text.weight, self.null, *(p for layer in linear for p in layer.parameters())]

    def forward(self, x_t, t, z, s=None):
        *inputs, per_latent, to_blocks = self.run_backbone(x_t, t, z)
        s = None if s is None else per_latent(s)
        return to_blocks(self.readout(*inputs, s))

    def jvp_s(self, x_t, t, z, s):
        """F and ∂F/∂s for LSD, of the read-out alone: the backbone does not see s."""
        *inputs, per_latent, to_blocks = self.run_backbone(x_t, t, z)
        velocity, slope = self.readout.jvp_s(*inputs, per_latent(s))
        return to_blocks(velocity), to_blocks(slope)

    def run_backbone(self, x_t, t, z):
        """What the read-out reads: x_t (B, M·T, D), t (B, M·T), hidden states (B, M·T, C).

        z: the Context. Two functions come with them: per_latent(s) gives the times of latents
        (B, M·T), to_blocks brings what the read-out returns into the shape of x_t.
        """
        shape = x_t.shape
        M, B, n = (1, *t.shape)[-3:]                    # t is (B, n), then M = 1, or (M, B, n)
        guided = z.guidance != 1
        if guided:                                      # the second half reads the null condition
            x_t = torch.cat([x_t, x_t])
            B = 2 * B

        def per_latent(times):
            times = torch.cat([times, times]) if guided else times
            return repeat(times.reshape(M, B, n), "M B n -> B (M n b)", b=self.block)

        # noisy positions: the M copies one after the other, one embedding of time per block
        x = x_t.reshape(M, B, n, -1)
        x = rearrange(x, "M B n (b D) -> B (M n b) D", b=self.block)            # (B, M·T, D)
        times = per_latent(t)                                                   # (B, M·T)
        dtype = self.noisy.weight.dtype
        with torch.autocast(x.device.type, enabled=False):                      # times stay fp32
            time = self.time(sinusoid(times[:, ::self.block]).to(dtype))        # (B, M·n, C)
        h = self.noisy(x.to(dtype)) + time.repeat_interleave(self.block, 1)     # (B, M·T, C)

        # training: one pass over both halves; generation: a copy of the cache reads, writes nothing
        if z.clean is not None:
            K = z.clean.shape[1]
            h = torch.cat([z.clean, h], 1)                                      # (B, K + M·T, C)
            S = h.shape[1]
            y = self.backbone(h, positions=z.positions[:, :S], mask=z.masks[S], experts=z.experts)
            if z.hidden is None:
                z.hidden = y[:, :K]
            noisy = y[:, K:]                                                    # (B, M·T, C)
        else:
            noisy = self.backbone(h, z.cache.copy(), experts=z.experts)

        def to_blocks(velocity):
            velocity = rearrange(velocity, "B (M n b) D -> M B n (b D)", M=M, b=self.block)
            if not guided:
                return velocity.reshape(shape)

            # guidance: F = F_null + a (F_cond - F_null)
            cond, null = velocity.reshape(2 * shape[0], *shape[1:]).chunk(2)
            return null + z.guidance * (cond - null)

        return x, times, noisy, per_latent, to_blocks


class AudioCALM(nn.Module):
    """The language model: loss(batch) trains it, generate(text, ...) yields latents frame by frame.

    latent_dim D; vocab: number of text tokens; kinds: names of the indices in batch["kind"], speech
    first. only: the one kind that this copy will generate; the experts of other kinds are then not
    made (load the weights that `wanted` keeps).
    """
    static_shapes = False                       # True: no row is cut on a CPU either (plan.py)
    codes = None                                # its latents are never codes
    monologue = 0                               # its text always precedes the audio

    def __init__(self, cfg: AudioCALMConfig, latent_dim, vocab, kinds, only=None):
        super().__init__()
        self.cfg = cfg
        self.kinds = tuple(kinds)
        net = ARFlow(cfg, latent_dim, vocab)
        self.head = FLOWS[cfg.head.objective](net, cfg.head)
        self.stop = nn.Linear(cfg.backbone.dim, 1)

        # the speech expert (moe.py)
        owners = {"none": [], "speech": ["speech"], "all": kinds}[cfg.experts]
        owners = [kind for kind in owners if only in (None, kind)]
        self.experts = Experts(cfg.backbone.dim, cfg.expert_dim, cfg.backbone.layers, kinds, owners)

    # ---------------------------------------------------------------- what every model offers

    @classmethod
    def from_config(cls, cfg, vae, data, kinds, only=None):
        """The model for the latents of a VAE (its config) and the texts of data (DataConfig)."""
        return cls(cfg, vae.latent_dim, vocabulary(data), kinds, only)

    @property
    def backbone(self):
        return self.head.net.backbone

    def matrices(self):
        """The modules with the large linear layers: those that int8 rounds (sample.py)."""
        return [self.backbone, self.head.net.time]

    def blocks(self):
        """The layers that are compiled and recomputed one by one: equal code, compiled once."""
        return list(self.backbone.blocks)

    def compile_for_training(self):
        """torch.compile the backbone's layers and the read-out."""
        for block in self.blocks():
            block.compile()
        self.head.net.readout.compile()

    def wanted(self, state):
        """The part of a state_dict that this copy loads: without the experts it does not have."""
        absent = [f"experts.of.{kind}." for kind in self.kinds if kind not in self.experts.of]
        return {name: v for name, v in state.items() if not name.startswith(tuple(absent))}

    # ---------------------------------------------------------------- training

    def prefix(self, text, prompt, keep):
        """Embeddings of text (B, L) and prompt (B, P, D), or the null's in rows without keep."""
        net = self.head.net
        embedded = torch.cat([net.text(text), net.prompt(prompt)], 1)           # (B, L + P, C)
        return torch.where(keep[:, None, None], embedded, net.null.to(embedded.dtype))

    def context(self, x, text, text_len, prompt, prompt_len, keep, counts):
        """The clean half: x (B, T, D) in whole blocks, with masks for M noisy copies behind it.

        Rows are sorted by kind, counts[i] rows of kinds[i]. Padding of text and prompt stays in
        place; no position sees it, and the positions count as if it were not there.
        """
        B, T, _ = x.shape
        L = text.shape[1]
        P = prompt.shape[1]
        M = self.cfg.head.multiplier
        block = self.cfg.block
        i = torch.arange(max(L, P, T), device=x.device)

        # embeddings
        clean = torch.cat([self.prefix(text, prompt, keep), self.head.net.latent(x)], 1)

        # positions without padding; noisy copies have those of the clean latents
        of_text = i[:L].expand(B, L)
        of_prompt = text_len[:, None] + i[:P]
        of_audio = (text_len + prompt_len)[:, None] + i[:T]                     # (B, T)
        positions = torch.cat([of_text, of_prompt] + [of_audio] * (1 + M), 1)

        # orders for the mask: text and prompt -K ... -1, latents their block
        order = torch.cat([torch.arange(-L - P, 0, device=x.device)] + [i[:T] // block] * (1 + M))
        copy = torch.arange(1 + M, device=x.device).repeat_interleave(T)
        copy = torch.cat([copy.new_zeros(L + P), copy])                         # (L+P + (1+M)·T,)
        audio_valid = torch.ones(B, (1 + M) * T, dtype=torch.bool, device=x.device)
        valid = torch.cat([i[:L] < text_len[:, None], i[:P] < prompt_len[:, None], audio_valid], 1)
        sees = ar_flow_mask(order, copy, valid, self.cfg.window // block)

        # one mask per number of noisy copies: LSD's jumps use a quarter of them (heads.py)
        copies = {M, -(-M // 4)} if self.cfg.head.objective == "lsd" else {M}
        lengths = [L + P + T + m * T for m in copies]
        masks = {S: make_mask(sees, B, S, x.device) for S in lengths}

        return Context(clean, positions, masks, experts=self.experts.per_layer(counts))

    def loss(self, batch, source=None):
        """One training loss and its metrics.

        batch: x (B, T, D) normalised latents, valid up to frames (B,); ended (B,): the clip ends in
        this row; text (B, L), text_len (B,) at least 1; prompt (B, P, D), prompt_len (B,); kind
        (B,); counts: a list, the rows of each kind, else counted, which waits for the device. In
        eval mode the metrics include the flow's loss of each kind in the batch. source: of random
        numbers (noise.py).
        """
        cfg = self.cfg
        counts = batch.get("counts")
        if counts is None:
            counts = torch.bincount(batch["kind"], minlength=len(self.kinds)).tolist()
        batch, draws = self.noised(batch, source)

        # sort rows by kind: the speech expert runs on a slice
        by_kind = batch["kind"].argsort(stable=True)
        batch = {name: v[by_kind] for name, v in batch.items()}
        repeats = draws[0].dim() - batch["x"].dim()             # an axis before the rows, or none
        draws = [v.index_select(repeats, by_kind) for v in draws]

        # the clean half
        z = self.context(batch["history"], batch["text"], batch["text_len"], batch["prompt"],
                         batch["prompt_len"], batch["keep"], counts)

        # flow loss per block; z, the Context, stands where heads.py has a tensor
        x = batch["x"]
        valid = torch.arange(x.shape[1], device=x.device) < batch["blocks"][:, None]    # (B, n)
        per_block, metrics = self.head.loss(z, x, valid, draws)
        head = masked_mean(per_block, valid)

        # stop head, on the clean hidden states behind text and prompt
        valid_frames = valid.repeat_interleave(cfg.block, 1)                    # (B, T)
        hidden = z.hidden[:, -valid_frames.shape[1]:]
        stop = self.stop_loss(hidden, batch["frames"], batch["ended"], valid_frames)
        metrics |= {"head": head.detach(), "stop": stop.detach()}
        if not self.training:
            metrics |= self.validation_metrics(per_block, valid, batch["kind"])
        return head + cfg.stop_weight * stop, metrics

    def noised(self, batch, source=None):
        """The batch in whole blocks with all that is random, and the head's draws.

        New: blocks (B,), x (B, n, block · D), history (B, T, D) with noise, keep (B,): rows that
        keep text and prompt. The prompt has its noise.
        """
        cfg = self.cfg
        kept = {name: batch[name] for name in ("frames", "ended", "text_len", "prompt_len", "kind")}

        # whole blocks: an ended clip keeps its last, unfinished block, a cut one does not
        frames = batch["frames"]
        blocks = torch.where(batch["ended"], -(-frames // cfg.block), frames // cfg.block)
        x, text, prompt = self.crop(batch, blocks)
        B, T, D = x.shape

        # rows that keep text and prompt; history and prompt with noise
        dropout = cfg.text_dropout if self.training else 0
        keep = uniform((B,), source, x.device) >= dropout
        most_blocks = -(-batch["x"].shape[1] // cfg.block)
        history = add_history_noise(x, cfg.history_noise, cfg.block,
                                    rows_cut(source, most_blocks * cfg.block))
        prompt = add_history_noise(prompt, cfg.prompt_noise, max(prompt.shape[1], 1),
                                   rows_cut(source, batch["prompt"].shape[1]))

        # noise and times of the flow
        x = x.view(B, T // cfg.block, cfg.block * D)
        draws = self.head.draws(x, rows_cut(source, most_blocks))
        return kept | {"blocks": blocks, "x": x, "text": text, "prompt": prompt,
                       "history": history, "keep": keep}, draws

    def crop(self, batch, blocks):
        """x (B, T, D), text and prompt as long as the longest row; T is whole blocks.

        On CUDA the lengths of the batch stay, for static shapes. x is 0 behind the end of a clip.
        """
        x = batch["x"]
        T = x.shape[1]
        L = batch["text"].shape[1]
        P = batch["prompt"].shape[1]
        block = self.cfg.block
        if not (x.is_cuda or self.static_shapes):
            T = max(int(blocks.max()) * block, block)
            L = int(batch["text_len"].max())
            P = int(batch["prompt_len"].max())
        T = -(-T // block) * block

        x = F.pad(x, (0, 0, 0, max(0, T - x.shape[1])))[:, :T]
        exists = torch.arange(T, device=x.device) < batch["frames"][:, None]
        return x * exists[..., None], batch["text"][:, :L], batch["prompt"][:, :P]

    def stop_loss(self, hidden, frames, ended, valid):
        """Binary cross-entropy of "the clip is over with this frame", hidden (B, T, C)."""
        frame = torch.arange(hidden.shape[1], device=hidden.device)
        is_over = ended[:, None] & (frame >= frames[:, None] - 1)               # (B, T)
        logits = self.stop(hidden).squeeze(-1).float()
        bce = F.binary_cross_entropy_with_logits(logits, is_over.float(), reduction="none")
        return masked_mean(bce, valid)

    def validation_metrics(self, per_block, valid, kind):
        """The flow's loss of each kind in the batch."""
        metrics = {}
        for index, name in enumerate(self.kinds):
            of_kind = valid & (kind == index)[:, None]
            if of_kind.any():
                metrics[f"head_{name}"] = masked_mean(per_block, of_kind).detach()
        return metrics

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(self, text, *, kind, max_frames, prompt=None, history=None, steps=None,
                 temperature=1.0, guidance=1.0, noise=0.0, text_temperature=1.0, text_top_k=0,
                 generator=None, fast=None):
        """Yield latents (B, D) frame by frame, like CALM, and the rows that have ended (B,).

        Stops after max_frames or when all rows have ended. A row that has ended goes on yielding:
        cut it there. text (B, L): tokens without padding; kind: an index; prompt (B, P, D): voice
        prompt; history (B, n, D): clean latents to continue, in whole blocks (the oldest n mod
        block are left out). All latents are normalised. noise: share of the training's history
        noise that blocks get before they are read, 0 to 1. text_temperature, text_top_k: CALM's;
        no text is written here. fast: a replay.Fast, to generate in fixed memory; None = in a cache
        that grows.
        """
        cfg = self.cfg

        # text, prompt and history into the cache
        z = self.read_prefix(text, prompt, kind, guidance)
        if history is not None:
            for x in history[:, history.shape[1] % cfg.block:].split(cfg.block, 1):
                self.append_clean_block(z, x, noise, generator)

        # block by block
        B = text.shape[0]
        sampling = {"steps": steps, "temperature": temperature}
        if fast is None:
            next_block = self.make_next_block(z, B, noise, sampling)
            yield from self.frames(next_block, B, max_frames, generator)
            return
        with self.fixed_block(fast, z, B, noise, sampling, kind, max_frames) as next_block:
            yield from until_all_ended(
                self.frames(next_block, B, max_frames, generator, look=not text.is_cuda))

    def frames(self, next_block, B, max_frames, generator, look=True):
        """The frames of generate().

        look: stop when all rows have ended, for which the host waits for the device.
        """
        block = self.cfg.block
        ended = torch.zeros(B, dtype=torch.bool, device=self.stop.weight.device)
        for first in range(0, max_frames, block):
            x, is_over = next_block(generator=generator)        # (B, block, D), (B, block)

            # frame by frame; the rest of a block is dropped once all rows have ended
            for i in range(min(block, max_frames - first)):
                if look and ended.all():
                    return
                yield x[:, i], ended
                ended = ended | is_over[:, i]
            if look and ended.all():
                return

    def make_next_block(self, z, B, noise, sampling):
        """The function (generator) -> a new block (B, block, D) and "the clip is over" (B, block).

        z: the Context, whose cache the block is appended to; sampling: options of the solver.
        """
        block = self.cfg.block
        shape = (B, 1, block * self.head.net.latent.in_features)

        def next_block(generator):
            # the solver's evaluations share the spare room of the cache; then the clean pass
            z.cache.reserve(block)
            x = self.head.sample(z, generator=generator, shape=shape, **sampling)
            x = x.view(B, block, -1)                                            # (B, block, D)
            return x, self.append_clean_block(z, x, noise, generator) > 0
        return next_block

    @contextmanager
    def fixed_block(self, fast, z, B, noise, sampling, kind, max_frames):
        """make_next_block in fixed memory, for max_frames behind what z has read.

        A step that an earlier call left in `fast` is used again where it fits.
        """
        # memory: all positions, or text, prompt and a ring of blocks
        block = self.cfg.block
        pinned = z.prefix_len if self.cfg.window else 0
        size = rounded(z.cache.pos + max_frames + block)
        if self.cfg.window:
            size = pinned + self.cfg.window + block
        key = (self, B, size, pinned, z.cache.kv[0][0].dtype, z.guidance, noise, kind,
               *sampling.values())

        def make():
            cache = StaticCache.beside(z.cache, size, pinned)
            fixed = replace(z, cache=cache)
            return cache, Replay(self.make_next_block(fixed, B, noise, sampling), fast.how)

        cache, next_block = fast.take(key, make)
        cache.load(z.cache)
        try:
            yield next_block
        finally:
            fast.give_back(key, (cache, next_block))

    def read_prefix(self, text, prompt, kind, guidance):
        """Text (B, L) and prompt (B, P, D) or None into a new cache -> Context.

        With guidance the cache has 2 B rows, the second half with the null condition.
        """
        B = text.shape[0]
        if prompt is None:
            D = self.head.net.latent.in_features
            prompt = torch.zeros(B, 0, D, device=text.device, dtype=self.stop.weight.dtype)

        # embeddings
        keep = torch.ones(B, dtype=torch.bool, device=text.device)
        embedded = self.prefix(text, prompt, keep)                              # (B, K, C)
        if guidance != 1:
            null = self.prefix(text, prompt, ~keep)
            embedded = torch.cat([embedded, null])                              # (2B, K, C)
        rows, K, _ = embedded.shape

        # one causal pass; all rows are of one kind
        experts = self.experts.per_layer([rows * (i == kind) for i in range(len(self.kinds))])
        causal = torch.ones(K, K, dtype=torch.bool, device=text.device).tril()
        cache = KVCache()
        self.backbone(embedded, cache, mask=causal, experts=experts)
        return Context(cache=cache, prefix_len=K, guidance=guidance, experts=experts)

    def append_clean_block(self, z, x, noise, generator):
        """The clean pass: a block x (B, block, D) into the cache -> stop logits (B, block).

        z: the Context.
        """
        B = x.shape[0]
        latent = self.head.net.latent

        # history noise, as in training: one share s per block
        s_max = noise * self.cfg.history_noise
        if s_max:
            s = s_max * uniform((B, 1, 1), generator, x.device)
            x = (1 - s) * x + s * normal(x.shape, generator, x.device)

        # the pass, for the null condition too; then the cache keeps prefix and window
        h = latent(x.to(latent.weight.dtype))                                   # (B, block, C)
        if z.guidance != 1:
            h = torch.cat([h, h])
        hidden = self.backbone(h, z.cache, experts=z.experts)
        if self.cfg.window:
            z.cache.trim(z.prefix_len, self.cfg.window)
        return self.stop(hidden[:B]).squeeze(-1)
