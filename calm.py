"""CALM: a causal transformer over continuous latents, and a small head that draws the next one.

       voice prompt        text             latents so far, noised in training
      (B, P, D) ─linear  (B, L) ─embed   BOS, x̃¹ ... x̃ᵀ (B, T, D) ─linear
           └───────────────┴──────┬───────────┘
                 packed: no gaps, padding at the end (B, P+L+1+T, C)
                                  ▼
                       backbone T_long, causal                     BOS, x¹ ... xᵀ, clean
                                  │                                         │
                       z_long (B, 1+T, C) ──► EOS logit          T_short, sees K latents
                                  │                                         │
                                  + ◄───────────────────────────── z_short (B, 1+T, C)
                                  ▼
                         Z (B, 1+T, C): row s knows x¹ ... xˢ
                                  ▼
                       head: x^{s+1} ~ p(x | Zˢ)        trained with N noise draws a position

    L = mean over positions of the head's loss (eq. 3) + eos_weight · BCE("x^{s+1} does not exist")

Sources: CALM (arXiv 2509.06926) section 4.2 (z_long + z_short, eq. 3), 4.3 (noise:
x̃ = √k ε + √(1-k) x with k ~ U(0, 1) drawn for each latent), 4.4 (head batch multiplier), Table 9;
prefix layout, EOS and latent guidance Z = Z_null + a (Z_cond - Z_null) from its third version, as
in pocket-tts.
Where this differs from the paper:
- T_short is a transformer whose layers look back K positions each (a sliding window, as the codec's
  do, so that it streams). With one layer that is the paper's T_short(x^{s-K} ... x^{s-1}); with n
  layers it sees up to nK latents back.
- The short branch can be kept from some kinds and dropped for a share of sequences in training:
  with it always on, the loss falls lower and the text is ignored (the paper has it for music, not
  for speech).
- k ~ U(0, noise): the paper's 1 is a config value; for short speech .5 learns the text faster.
Precision: the backbone in the autocast dtype, the head's times and jvp in fp32 (heads.py).
"""
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from backbone import BackboneConfig, KVCache, Transformer
from heads import HEADS, HeadConfig


@dataclass
class CALMConfig:
    """The [lm] table."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    # largest share of noise k in the backbone's latents (4.3: 1); 0 = none
    noise: float = 1.0
    # layers of T_short (Table 9: 4 for music, none for speech); 0 = no branch
    short_layers: int = 0
    # K, latents that T_short's layers look back (4.2; Table 7: 5 is too few)
    short_context: int = 10
    # kinds that have the branch
    short_kinds: list[str] = field(default_factory=lambda: ["sound", "music"])
    short_dropout: float = 0.0  # share of training sequences without it
    # share of training sequences without prompt and text: what guidance needs
    prefix_dropout: float = 0.1
    # a learned vector stands before the voice prompt, where there is one (Pocket TTS)
    prompt_bos: bool = False
    eos_weight: float = 0.1     # weight of the end-of-clip loss

    def __post_init__(self):
        for name in ("noise", "short_dropout", "prefix_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: must lie in 0 .. 1, got {getattr(self, name)}")
        if self.short_layers < 0 or self.short_context < 1 or self.eos_weight < 0:
            raise ValueError("short_layers, eos_weight >= 0 and short_context >= 1: "
                             "one of these does not hold")


def pack(parts):
    """Join [(values (B, n, C), lengths (B,)), ...] row by row without gaps -> (B, sum n, C),
    padding last.

    A causal model then needs no mask: nothing valid comes after padding.
    """
    valid = torch.cat([torch.arange(v.shape[1], device=v.device) < n[:, None] for v, n in parts], 1)
    order = torch.argsort(~valid, dim=1, stable=True)                       # valid ones first
    return torch.cat([v for v, _ in parts], 1).gather(
        1, order[..., None].expand(-1, -1, parts[0][0].shape[2]))


def to_int8(lm, vae=None):
    """Round the big matrices of sampling to int8, in place: backbone, head, decoder's transformer
    (not what touches latents: lm.latent, the head's first and last layers and its condition).

    Weights are rounded once, one scale a matrix, activations at each call (PyTorch's dynamic
    quantisation). One latent reads every weight once, so a quarter of the bytes is up to 2.8 times
    the speed. CPU only; cannot be trained or saved any more.
    """
    net = getattr(lm.head, "net", None)
    parts = [lm.backbone, getattr(lm, "short", None), vae and vae.decoder.transformer,
             *(getattr(net, name, None) for name in ("blocks", "time", "until", "ada"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # it will move to torchao one day
        for part in filter(None, parts):
            torch.ao.quantization.quantize_dynamic(part, {nn.Linear}, dtype=torch.qint8,
                                                   inplace=True)


class CALM(nn.Module):
    """latent_dim D; vocab tokens of text; kinds: the names behind batch["kind"], e.g. (speech,
    sound, music).
    """

    def __init__(self, cfg: CALMConfig, latent_dim, vocab, kinds):
        super().__init__()
        C = cfg.backbone.dim
        unknown = set(cfg.short_kinds) - set(kinds)
        if unknown:
            raise ValueError(f"short_kinds: unknown '{min(unknown)}'; valid: {', '.join(kinds)}")
        self.cfg = cfg
        self.text = nn.Embedding(vocab, C)
        self.prompt = nn.Linear(latent_dim, C)
        self.latent = nn.Linear(latent_dim, C)
        self.bos = nn.Parameter(torch.randn(C) * 0.5)
        if cfg.prompt_bos:
            self.prompt_bos = nn.Parameter(torch.randn(C) * 0.5)
        self.backbone = Transformer(cfg.backbone)
        self.eos = nn.Linear(C, 1)
        self.head = HEADS[cfg.head.objective](latent_dim, C, cfg.head)
        nn.init.normal_(self.text.weight, std=0.5)   # the scale that the linear layers give latents
        if cfg.short_layers:
            short = BackboneConfig(**{**vars(cfg.backbone), "layers": cfg.short_layers,
                                      "window": cfg.short_context})
            self.short_latent = nn.Linear(latent_dim, C)
            self.short_bos = nn.Parameter(torch.randn(C) * 0.5)
            self.short = Transformer(short)
        has_short = torch.tensor([k in cfg.short_kinds for k in kinds])
        self.register_buffer("has_short", has_short, persistent=False)

    def voice(self, prompt, length):
        """Voice prompt (B, P, D), valid (B,) -> (B, P or 1 + P, C) and how many of them are valid."""
        y = self.prompt(prompt)
        if not self.cfg.prompt_bos:
            return y, length
        y = torch.cat([self.prompt_bos.expand(y.shape[0], 1, -1), y], 1)
        return y, length + (length > 0)

    def condition(self, x, text, text_len, prompt, prompt_len):
        """Latents as the backbone gets them (B, T, D) -> z_long (B, 1 + T, C); row s has seen
        x¹ ... xˢ.
        """
        B, T, _ = x.shape
        bos = self.bos.expand(B, 1, -1)
        audio = torch.cat([bos, self.latent(x)], 1)                         # (B, 1+T, C)
        whole = torch.full((B,), 1 + T, device=x.device)
        prompt, prompt_len = self.voice(prompt, prompt_len)
        packed = pack([(prompt, prompt_len), (self.text(text), text_len), (audio, whole)])
        y = self.backbone(packed.to(audio.dtype))                           # (B, P+L+1+T, C)
        at = (prompt_len + text_len)[:, None] + torch.arange(1 + T, device=x.device)
        return y.gather(1, at[..., None].expand(-1, -1, y.shape[2]))        # (B, 1+T, C)

    def loss(self, batch):
        """One training loss and its parts.

        batch: x (B, T, D) normalised latents, zeros after frames (B,); ended (B,) the clip ends in
        this row; text (B, L), text_len (B,); prompt (B, P, D), prompt_len (B,); kind (B,).
        """
        cfg, x, frames = self.cfg, batch["x"], batch["frames"]
        B, T, _ = x.shape
        keep = torch.rand(B, device=x.device) >= cfg.prefix_dropout
        k = cfg.noise * torch.rand(B, T, 1, device=x.device)                # per latent
        noised = k.sqrt() * torch.randn_like(x) + (1 - k).sqrt() * x
        z_long = self.condition(noised, batch["text"], batch["text_len"] * keep,
                                batch["prompt"], batch["prompt_len"] * keep)
        Z = z_long
        if cfg.short_layers:
            clean = torch.cat([self.short_bos.expand(B, 1, -1), self.short_latent(x)], 1)
            on = (self.has_short[batch["kind"]]
                  & (torch.rand(B, device=x.device) >= cfg.short_dropout))
            Z = Z + self.short(clean) * on[:, None, None]

        s = torch.arange(1 + T, device=x.device)
        real = s[:T] < frames[:, None]                                      # x^{s+1} exists
        if x.is_cuda:                               # static shapes: compute padding too, weigh it 0
            per, metrics = self.head.loss(Z[:, :T], x)
            head = (per * real).sum() / real.sum().clamp(min=1)
        else:
            per, metrics = self.head.loss(Z[:, :T][real], x[real])
            head = per.mean()
        over = (s == frames[:, None]) & batch["ended"][:, None]             # x^{s+1} does not exist
        known = torch.cat([real, torch.zeros_like(real[:, :1])], 1) | over
        bce = F.binary_cross_entropy_with_logits(self.eos(z_long).squeeze(-1).float(), over.float(),
                                                 reduction="none")
        eos = (bce * known).sum() / known.sum()
        return head + cfg.eos_weight * eos, {"head": head.detach(), "eos": eos.detach(), **metrics}

    @torch.no_grad()
    def generate(self, text, *, kind, max_frames, prompt=None, history=None, steps=None,
                 temperature=1.0, guidance=1.0, generator=None):
        """Yields normalised latents (B, D) and which rows have ended (B,) until all have, or
        max_frames.

        text (B, L) tokens without padding; kind: index; prompt (B, P, D) voice prompt; history
        (B, n, D): clean latents to continue (both normalised). A row that has ended goes on
        yielding: cut it there.
        """
        B, device = text.shape[0], text.device
        bos, long, null, short = self.bos.expand(B, 1, -1), KVCache(), KVCache(), KVCache()
        past = [] if history is None else [self.latent(history)]
        prefix = [self.text(text)]
        if prompt is not None and prompt.shape[1]:
            prefix.insert(0, self.voice(prompt, torch.tensor(prompt.shape[1]))[0])
        x_long, x_null = torch.cat([*prefix, bos, *past], 1), torch.cat([bos, *past], 1)
        use_short = self.cfg.short_layers and bool(self.has_short[kind])
        if use_short:
            past = [] if history is None else [self.short_latent(history)]
            x_short = torch.cat([self.short_bos.expand(B, 1, -1), *past], 1)
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        for i in range(max_frames):
            Z = self.backbone(x_long, long)[:, -1]                          # (B, C)
            if i > 0:                               # at least one latent
                ended = ended | (self.eos(Z).squeeze(-1) > 0)
            if ended.all():
                return
            if guidance != 1:
                Z_null = self.backbone(x_null, null)[:, -1]
                Z = Z_null + guidance * (Z - Z_null)
            if use_short:
                Z = Z + self.short(x_short, short)[:, -1]
            x = self.head.sample(Z, steps=steps, temperature=temperature,
                                 generator=generator)                       # (B, D)
            yield x, ended
            x_long = x_null = self.latent(x)[:, None]
            if use_short:
                x_short = self.short_latent(x)[:, None]

    @torch.no_grad()
    def stream(self, vae, text, *, max_frames, history=None, state=None, parallel=False, **options):
        """generate(text, **options), decoded: yields waveforms (B, ch, S), how many latents each
        is, and which rows have ended (B,).

        The first latent is decoded at once, later ones 2, then 4 together: one alone costs 1.6
        times its share of four (the weights of the transformer and of the first convolutions are
        read again at each call), eight are no cheaper. At twice real time no gap can be heard.
        state: the decoder's, see VAE. parallel: decode in a thread while the next latents are
        drawn; worth it where a second core is free.
        """
        state, waiting, size, doing = {} if state is None else state, [], 1, []

        @torch.no_grad()                                    # the thread has its own grad mode
        def decode(x):
            return vae.decode(vae.denormalize(x), state)

        with ThreadPoolExecutor(1) as pool:
            for x, ended in self.generate(text, max_frames=max_frames, history=history, **options):
                waiting.append(x)
                if len(waiting) < size:
                    continue
                x, waiting, size = torch.stack(waiting, 1), [], min(2 * size, 4)
                if not parallel:
                    yield decode(x), x.shape[1], ended
                    continue
                doing.append((pool.submit(decode, x), x.shape[1], ended))
                while doing and (doing[0][0].done() or len(doing) > 2):
                    done, *rest = doing.pop(0)
                    yield done.result(), *rest
            for done, *rest in doing:
                yield done.result(), *rest
            if waiting:
                yield decode(torch.stack(waiting, 1)), len(waiting), ended

    @torch.no_grad()
    def render(self, vae, text, *, seconds, history=None, **options):
        """generate(text, **options), decoded: a list of B waveforms (ch, S), each cut where its row
        ended.

        history (B, n, D), normalised: what is continued stands at the front of each waveform.
        """
        max_frames = max(1, round(seconds * vae.cfg.frame_rate))
        drawn = list(self.generate(text, max_frames=max_frames, history=history, **options))
        past = [] if history is None else [history]
        x = torch.cat([*past, torch.stack([x for x, _ in drawn], 1)], 1)    # (B, n + T, D)
        wav = vae.decode(vae.denormalize(x))                                # (B, ch, (n + T) · hop)
        frames = sum((~ended).long() for _, ended in drawn) + (x.shape[1] - len(drawn))     # (B,)
        return [w[:, :n * vae.cfg.hop] for w, n in zip(wav, frames.tolist())]
