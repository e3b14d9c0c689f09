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

With an inner monologue (monologue = true) the words do not stand before the audio but run beside
it, as bytes at the frame where each word begins, and the audio lags d = acoustic_delay frames:

    position    0    1    2    3    4    5    6  ...          d = 2
    text       BOS   t    h    e   ' '   -    c  ...          - = PAD, nothing new
    latent                    x¹   x²   x³   x⁴  ...
    row s sees what stands at positions 0 ... s, predicts the text of position s + 1 (from z_long)
    and the latent x^{s+1-d}

    L += monologue_weight · cross-entropy of the text

Given a text, generate() lets the model choose when the next word begins and puts its bytes there;
without one the model writes its own.

The discrete baseline (3.1) is the same model with a head of discrete.py: xˢ are then the K codes of
an RVQ frame, embedded as the sum of K embeddings, and nothing is noised. With the "delay" head the
codes are shifted by level on their way in and back on their way out, over K-1 more positions.

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
- The monologue is bytes (ours have no tokenizer to train), closed by a space; the delay is a config
  value (the paper: 2 frames after the text): a longer one lets the model read a word before it
  speaks it. The paper does not give the weight of the text loss.
- k ~ U(0, noise): the paper's 1 is a config value; for short speech .5 learns the text faster.
- Generation may noise what it hears as training does (sample.noise; the paper: never). A small
  model that has never heard a clean history takes one for a loud one: its latents grow (LOG.md).
Precision: the backbone in the autocast dtype, the head's times and jvp in fp32 (heads.py).
"""
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from backbone import BackboneConfig, KVCache, Transformer
from data import END, PAD
from discrete import DISCRETE, MISSING, CodeEmbedding, DelayLine, delay_codes
from heads import HEADS, HeadConfig, energy_score
from schema import Kind, Range


@dataclass
class CALMConfig:
    """The [lm] table."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    # largest share of noise k in the backbone's latents (4.3: 1); 0 = none
    noise: Annotated[float, Range(0, 1)] = 1.0
    # layers of T_short (Table 9: 4 for music, none for speech); 0 = no branch
    short_layers: Annotated[int, Range(0)] = 0
    # K, latents that T_short's layers look back (4.2; Table 7: 5 is too few)
    short_context: Annotated[int, Range(1)] = 10
    # largest share of noise k in T_short's latents. The paper's are clean (0)
    short_noise: Annotated[float, Range(0, 1)] = 0.0
    # kinds that have the branch
    short_kinds: list[Kind] = field(default_factory=lambda: ["sound", "music"])
    # share of training sequences without it
    short_dropout: Annotated[float, Range(0, 1)] = 0.0
    # share of training sequences without prompt and text: what guidance needs
    prefix_dropout: Annotated[float, Range(0, 1)] = 0.1
    # a learned vector stands before the voice prompt, where there is one (Pocket TTS)
    prompt_bos: bool = False
    # weight of the end-of-clip loss
    eos_weight: Annotated[float, Range(0)] = 0.1
    # words beside the latents instead of before them, where the manifest has their times
    monologue: bool = False
    # frames that the audio lags behind its words (monologue only)
    acoustic_delay: Annotated[int, Range(0)] = 2
    # weight of the text's cross-entropy
    monologue_weight: Annotated[float, Range(0)] = 0.1
    # generation: frames without text after which the next word begins whatever the model says (a
    # model that missed its moment knows no pause so long and may wait for ever)
    longest_pause: Annotated[int, Range(1)] = 25


def pack(parts):
    """Join [(values (B, n, C), lengths (B,)), ...] row by row without gaps -> (B, sum n, C),
    padding last.

    A causal model then needs no mask: nothing valid comes after padding.
    """
    valid = torch.cat([torch.arange(v.shape[1], device=v.device) < n[:, None] for v, n in parts], 1)
    order = torch.argsort(~valid, dim=1, stable=True)                       # valid ones first
    return torch.cat([v for v, _ in parts], 1).gather(
        1, order[..., None].expand(-1, -1, parts[0][0].shape[2]))


class Monologue:
    """The text stream while it is generated: (B,) tokens at a time, PAD where nothing is new.

    texts: B lists of byte tokens, words parted by spaces; an empty one lets the model write. A text
    is kept to: the model's probability of anything but PAD is that of the next word's beginning,
    behind the last one of END; a word's bytes follow each other. pause: CALMConfig.longest_pause.
    """

    def __init__(self, texts, pause):
        spoken = [bytes(t).split() for t in texts]
        self.free = [not words for words in spoken]
        self.left = [[list(word + b" ") for word in words] + [[END]] * bool(words)
                     for words in spoken]
        self.now, self.silent, self.pause = [[] for _ in spoken], [0] * len(spoken), pause

    def step(self, logits, generator):
        """logits (B, vocab) of the next text token -> tokens (B,)."""
        p = logits.float().softmax(-1)
        begin = torch.rand(len(p), generator=generator, device=p.device) < 1 - p[:, PAD]
        written = torch.multinomial(p, 1, generator=generator)[:, 0].tolist()
        tokens = []
        for r, start in enumerate(begin.tolist()):
            if not self.now[r] and self.left[r] and (start or self.silent[r] >= self.pause):
                self.now[r] = self.left[r].pop(0)
            self.silent[r] = 0 if self.now[r] else self.silent[r] + 1
            tokens.append(self.now[r].pop(0) if self.now[r]
                          else written[r] if self.free[r] else PAD)
        return torch.tensor(tokens, device=p.device)

    def said(self, device):
        """Rows (B,) whose text has been put out whole."""
        return torch.tensor([not (now or left) for now, left in zip(self.now, self.left)],
                            device=device)


class CALM(nn.Module):
    """latent_dim D; vocab tokens of text; kinds: the names behind batch["kind"], e.g. (speech,
    sound, music); codes: levels K and entries of the RVQ, for the discrete heads.
    """

    def __init__(self, cfg: CALMConfig, latent_dim, vocab, kinds, codes=None):
        super().__init__()
        C = cfg.backbone.dim
        self.cfg, self.kinds = cfg, tuple(kinds)
        self.monologue = cfg.monologue
        self.codes = codes if cfg.head.objective in DISCRETE else None    # x are (B, T, K) int64

        def embedding():
            return CodeEmbedding(*codes, C) if self.codes else nn.Linear(latent_dim, C)
        self.text = nn.Embedding(vocab, C)
        self.prompt = embedding()
        self.latent = embedding()
        self.bos = nn.Parameter(torch.randn(C) * 0.5)
        if cfg.prompt_bos:
            self.prompt_bos = nn.Parameter(torch.randn(C) * 0.5)
        self.backbone = Transformer(cfg.backbone)
        self.eos = nn.Linear(C, 1)
        self.delay = cfg.acoustic_delay if cfg.monologue else 0
        if cfg.monologue:
            self.word = nn.Linear(C, vocab)
        self.head = (DISCRETE[cfg.head.objective](*codes, C, cfg.head) if self.codes
                     else HEADS[cfg.head.objective](latent_dim, C, cfg.head))
        self.lag = self.head.lag if self.codes else 0   # K-1 for "delay"
        nn.init.normal_(self.text.weight, std=0.5)   # the scale that the linear layers give latents
        if cfg.short_layers:
            short = BackboneConfig(**{**vars(cfg.backbone), "layers": cfg.short_layers,
                                      "window": cfg.short_context})
            self.short_latent = embedding()
            self.short_bos = nn.Parameter(torch.randn(C) * 0.5)
            self.short = Transformer(short)
        has_short = torch.tensor([k in cfg.short_kinds for k in kinds])
        self.register_buffer("has_short", has_short, persistent=False)

    @classmethod
    def from_config(cls, cfg, vae, vocab, kinds, only=None):
        """The model for the latents of a VAE (its config); `only` is for models with experts."""
        return cls(cfg, vae.latent_dim, vocab, kinds, vae.codes)

    def wanted(self, state):
        """The part of a state_dict that this model has: all of it."""
        return state

    def embeddings(self):
        """The parameters that start at the scale of the text embedding, itself among them."""
        return [self.text.weight, self.bos, *self.latent.parameters(), *self.prompt.parameters()]

    def matrices(self):
        """The modules whose linear layers are large: what int8 rounds (sample.py)."""
        short = [self.short] if self.cfg.short_layers else []
        head = self.head.net.matrices() if self.cfg.head.objective != "delay" else []
        return [self.backbone, *short, *head]

    def compile_for_training(self):
        """torch.compile the backbone, the short-context transformer and the head."""
        self.backbone.compile()
        if self.cfg.short_layers:
            self.short.compile()
        if self.head.has_jvp:
            # dynamo gives up on a compiled network inside an eager jvp, for good and in silence
            self.head.loss = torch.compile(self.head.loss)
        else:
            self.head.net.compile()

    def voice(self, prompt, length):
        """Voice prompt (B, P, D), valid (B,) -> (B, P or 1 + P, C), valid ones of these (B,)."""
        y = self.prompt(prompt)
        if not self.cfg.prompt_bos:
            return y, length
        y = torch.cat([self.prompt_bos.expand(y.shape[0], 1, -1), y], 1)
        return y, length + (length > 0)

    def condition(self, x, text, text_len, prompt, prompt_len, words=None):
        """Latents as the backbone gets them (B, T, D) -> z_long (B, 1 + T, C); row s has seen
        x¹ ... xˢ.

        With words (B, T): z_long (B, 1 + d + T, C); row s has seen words 1 ... s, x¹ ... x^{s-d}.
        """
        audio = self.latent(x)                                              # (B, T, C)
        if words is not None:
            late = (self.delay, 0)
            audio = (F.pad(audio, (0, 0, *late)) + self.text(F.pad(words, late[::-1], value=PAD)))
        B, T, _ = audio.shape                                               # from here T is d + T
        audio = torch.cat([self.bos.expand(B, 1, -1), audio], 1)            # (B, 1+T, C)
        whole = torch.full((B,), 1 + T, device=x.device)
        prompt, prompt_len = self.voice(prompt, prompt_len)
        packed = pack([(prompt, prompt_len), (self.text(text), text_len), (audio, whole)])
        y = self.backbone(packed.to(audio.dtype))                           # (B, P+L+1+T, C)
        at = (prompt_len + text_len)[:, None] + torch.arange(1 + T, device=x.device)
        return y.gather(1, at[..., None].expand(-1, -1, y.shape[2]))        # (B, 1+T, C)

    def noise(self, x, most, generator=None):
        """x (.., D) -> sqrt(k) eps + sqrt(1 - k) x, k ~ U(0, most) for each latent (4.3)."""
        draw = {"device": x.device, "generator": generator}
        k = most * torch.rand(*x.shape[:-1], 1, **draw)
        return k.sqrt() * torch.randn(x.shape, dtype=x.dtype, **draw) + (1 - k).sqrt() * x

    def loss(self, batch):
        """One training loss and its parts.

        batch: x (B, T, D) normalised latents or (B, T, K) codes, valid up to frames (B,); ended
        (B,) the clip ends in this row; text (B, L), text_len (B,); prompt (B, P, D), prompt_len
        (B,); kind (B,). In eval mode the metrics also have the head's loss of each kind and its
        energy score (heads.py), which compares objectives and steps where losses cannot; histories
        are noised there too, as the training loss has them.
        monologue: words (B, T) tokens beside the latents, aligned (B,) rows that have them.
        """
        cfg, x, frames = self.cfg, batch["x"], batch["frames"]
        if self.codes:
            there = torch.arange(x.shape[1], device=x.device) < frames[:, None]
            x = x.masked_fill(~there[..., None], MISSING)
            x = delay_codes(x) if self.lag else x                           # (B, T + lag, K)
        B, T, _ = x.shape                                                   # from here T + lag
        dropped, no_short = (cfg.prefix_dropout, cfg.short_dropout) if self.training else (0, 0)
        keep = torch.rand(B, device=x.device) >= dropped
        noised, words = x, None
        if not self.codes:
            noised = self.noise(x, cfg.noise)
        if cfg.monologue:
            words = F.pad(torch.where(keep[:, None], batch["words"], PAD), (0, self.lag), value=PAD)
        z_long = self.condition(noised, batch["text"], batch["text_len"] * keep,
                                batch["prompt"], batch["prompt_len"] * keep, words)
        Z = z_audio = z_long[:, self.delay:]                                # (B, 1+T, C)
        if cfg.short_layers:
            heard = self.noise(x, cfg.short_noise) if cfg.short_noise else x
            recent = torch.cat([self.short_bos.expand(B, 1, -1), self.short_latent(heard)], 1)
            on = (self.has_short[batch["kind"]]
                  & (torch.rand(B, device=x.device) >= no_short))
            Z = Z + self.short(recent) * on[:, None, None]

        s = torch.arange(1 + T, device=x.device)
        real = s[:T] < frames[:, None] + self.lag                           # x^{s+1} exists
        Z, kind = Z[:, :T], batch["kind"][:, None].expand(B, T)
        if not x.is_cuda:               # CUDA: static shapes, padding is computed too and weighs 0
            Z, x, kind, real = Z[real], x[real], kind[real], real[real]
        per, metrics = self.head.loss(Z, x)
        head = (per * real).sum() / real.sum().clamp(min=1)
        if not self.training:
            if not self.codes:
                with torch.compiler.set_stance("force_eager"):     # the sampler is not compiled
                    energy = energy_score(self.head, Z, x)
            for i, name in enumerate(self.kinds):
                mine = real & (kind == i)
                if mine.any():
                    metrics[f"head_{name}"] = (per * mine).sum() / mine.sum()
                    if not self.codes:
                        metrics[f"energy_{name}"] = (energy * mine).sum() / mine.sum()
        over = (s == frames[:, None]) & batch["ended"][:, None]             # x^{s+1} does not exist
        known = (s < frames[:, None]) | over
        bce = F.binary_cross_entropy_with_logits(self.eos(z_audio).squeeze(-1).float(),
                                                 over.float(), reduction="none")
        eos = (bce * known).sum() / known.sum()
        loss = head + cfg.eos_weight * eos
        if cfg.monologue:
            s = torch.arange(T + self.delay, device=x.device)
            told = (batch["aligned"] & keep)[:, None] & (
                s < (frames + self.delay * batch["ended"])[:, None])        # after the end: PAD
            target = F.pad(words, (0, self.delay), value=PAD)
            text = F.cross_entropy(self.word(z_long[:, :-1]).float().mT, target, reduction="none")
            text = (text * told).sum() / told.sum().clamp(min=1)
            loss, metrics = loss + cfg.monologue_weight * text, metrics | {"text": text.detach()}
        return loss, {"head": head.detach(), "eos": eos.detach(), **metrics}

    def regress(self, batch, teacher, guidance):
        """Distillation into this model's backbone (third version of CALM; Pocket TTS):

            L = mean over positions of ||z - (z_null + a (z_cond - z_null))||² / C,  a = guidance

        z of this model, the rest of the teacher; both read the same noised latents, with text and
        prompt (z_null without). Guidance then costs nothing in sampling, and the teacher's head and
        EOS, copied, fit as they are. Positions: every row that has a next latent, and the end.
        batch as in loss. metrics: explained = 1 - L / variance of the target, 1 = the teacher.
        """
        x, frames = batch["x"], batch["frames"]
        noised = self.noise(x, self.cfg.noise)

        def z(net, share):
            return net.condition(noised, batch["text"], batch["text_len"] * share, batch["prompt"],
                                 batch["prompt_len"] * share).float()
        with torch.no_grad():
            null = z(teacher, 0)
            target = null + guidance * (z(teacher, 1) - null)               # (B, 1 + T, C)
        real = torch.arange(1 + x.shape[1], device=x.device) <= frames[:, None]
        weight = real / real.sum()
        loss = ((z(self, 1) - target).square().mean(-1) * weight).sum()
        mean = (target * weight[..., None]).sum((0, 1))
        spread = ((target - mean).square().mean(-1) * weight).sum()
        return loss, {"explained": 1 - loss.detach() / spread}

    @torch.no_grad()
    def generate(self, text, *, kind, max_frames, prompt=None, history=None, steps=None,
                 temperature=1.0, guidance=1.0, noise=0.0, generator=None):
        """Yields normalised latents (B, D), or codes (B, K), and which rows have ended (B,) until
        all have, or max_frames.

        text (B, L) tokens without padding; kind: index; prompt (B, P, D) voice prompt; history
        (B, n, D): clean latents to continue, both as `listen` gives them. A row that has ended goes
        on yielding: cut it there. noise: the share of the training's noise that the history and
        what is drawn have when they are heard, 0 (the paper) to 1.
        Monologue: the bytes of a speech's text run beside the latents, beside a history nothing
        does; a row cannot end before all its words have been said.
        """
        B, device, d = text.shape[0], text.device, self.delay

        def hear(embed, x, most):
            return embed(self.noise(x, noise * most, generator) if noise * most else x)

        if self.codes:
            noise = 0.0
        if self.lag:
            line = DelayLine(text.new_zeros(B, 0, self.lag + 1) if history is None else history)
            history = line.past
        n = 0 if history is None else history.shape[1]
        bos, long, null, short = self.bos.expand(B, 1, -1), KVCache(), KVCache(), KVCache()
        words, nothing = None, bos.new_zeros(B, bos.shape[-1])
        if self.cfg.monologue:
            nothing = self.text(torch.full((B,), PAD, device=device))
            if self.kinds[kind] == "speech":         # captions stay before the audio
                words = Monologue(text[:, 1:].tolist(), self.cfg.longest_pause)
                text = text[:, :1]
        # (B, d + n, C): what the backbone hears before anything is drawn, nothing for d positions
        # (words come first), then the history. n of it stand behind the prefix, the last d follow
        # one by one beside the first words
        past = bos.new_zeros(B, d, bos.shape[-1])
        if n:
            past = torch.cat([past, hear(self.latent, history, self.cfg.noise)], 1)
        silent = past[:, :n] + nothing[:, None]
        prefix = [self.text(text)]
        if prompt is not None and prompt.shape[1]:
            prefix.insert(0, self.voice(prompt, torch.tensor(prompt.shape[1]))[0])
        x_long, x_null = torch.cat([*prefix, bos, silent], 1), torch.cat([bos, silent], 1)
        use_short = self.cfg.short_layers and bool(self.has_short[kind])
        if use_short:
            x_short = self.short_bos.expand(B, 1, -1)
            if n:
                x_short = torch.cat([x_short, hear(self.short_latent, history,
                                                   self.cfg.short_noise)], 1)
        ended, ends = torch.zeros(B, dtype=torch.bool, device=device), []
        for i in range(d + max_frames + self.lag):
            Z = self.backbone(x_long, long)[:, -1]                          # (B, C)
            token = nothing
            if words is not None:
                token = self.text(words.step(self.word(Z), generator))
            if i > d:                               # at least one latent
                over = self.eos(Z).squeeze(-1) > 0
                ended = ended | (over if words is None else over & words.said(device))
            ends.append(ended)
            if ends[max(0, i - self.lag)].all():
                return
            if guidance != 1:
                Z_null = self.backbone(x_null, null)[:, -1]
                Z = Z_null + guidance * (Z - Z_null)
            if i < d:
                heard = past[:, n + i]
            else:
                if use_short:
                    Z = Z + self.short(x_short, short)[:, -1]
                x = self.head.sample(Z, steps=steps, temperature=temperature,
                                     generator=generator)                   # (B, D)
                if self.lag:
                    x = line.put(x, ended)                                  # (B, K) of K frames
                if i >= d + self.lag:
                    yield line.frame() if self.lag else x, ends[i - self.lag]
                heard = hear(self.latent, x, self.cfg.noise)
                if use_short:
                    x_short = hear(self.short_latent, x, self.cfg.short_noise)[:, None]
            x_long, x_null = (heard + token)[:, None], (heard + nothing)[:, None]
