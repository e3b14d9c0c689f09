"""CALM: a causal transformer over continuous latents and a small head that samples the next one.

       voice prompt     kind, text          latents so far, noised in training
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
                         Z (B, 1+T, C): row s depends on x¹ ... xˢ
                                  ▼
                       head: x^{s+1} ~ p(x | Zˢ)        trained with M draws of (t, ε) per position

Our row s is the paper's Z^{s+1}: there Zˢ predicts xˢ. M is the head batch multiplier (section
4.4). The text begins with a token for its kind (data.encode_text).

    L = mean over positions of the head's loss (eq. 3) + eos_weight · BCE("x^{s+1} does not exist")

With an inner monologue (monologue = true) the words do not precede the audio. They run beside it as
bytes, or as tokens of data.tokenizer (monologue.py), each word from the frame where it begins, and
the audio lags d = acoustic_delay frames:

    position    0    1    2    3    4    5    6  ...          d = 2
    text       BOS   t    h    e   ' '   -    c  ...          - = PAD, no new byte
    latent                    x¹   x²   x³   x⁴  ...
    row s sees positions 0 ... s and predicts the text of position s + 1 (from z_long) and the
    latent x^{s+1-d}

    L += monologue_weight · cross-entropy of the text

Read English has about 14.5 bytes per second. Where latents are rarer, each frame takes n bytes
(monologue_tokens), embedded as a sum. Their logits come one after the other: byte i sees z_long
plus the embeddings of bytes 1 ... i-1 of its frame. A word begins with a frame, and PAD fills its
last. Elsewhere n is 1, and with a tokenizer it can be.

Given a text, generate() lets the model choose when the next word begins and puts its bytes there;
without a text the model writes its own.

The discrete baseline (3.1) is the same model with a head of discrete.py: xˢ are then the K codes of
an RVQ frame, embedded as the sum of K embeddings, and no noise is added. With the "delay" head the
codes are shifted by level on their way in and back on their way out, over K-1 more positions.

Sources: CALM (arXiv 2509.06926) section 4.2 (z_long + z_short, eq. 3), 4.3 (noise:
x̃ = √k ε + √(1-k) x with one k ~ U(0, 1) per latent), 4.4 (head batch multiplier), Table 9. Prefix
layout, EOS and latent guidance z = z_null + a (z_cond - z_null) are from its third version, as in
pocket-tts; z are outputs of the backbone, and z_short is not guided.
Where this differs from the paper:
- T_short is a transformer whose layers look back K positions each (a sliding window, as in the
  codec, so that it streams). With one layer that is the paper's T_short(x^{s-K} ... x^{s-1}); with
  n layers it sees n (K - 1) + 1 latents.
- The short branch can be limited to some kinds and dropped for a share of the training sequences:
  with the branch always on, the loss falls lower but the text is ignored (the paper has the branch
  for music, not for speech).
- The monologue is made of bytes, and a space closes each word; with data.tokenizer it is the
  paper's, one token of a text model per frame (we train no tokenizer). The delay is a config value
  (the paper: 2 frames after the text): a longer one lets the model read a word before it speaks it.
  The paper does not give the weight of the text loss.
- k ~ U(0, noise): the paper's 1 is a config value; with 0.5 short speech learns the text faster.
- Generation can add the training noise to the history that it reads (sample.noise; the paper never
  does). A small model that was trained on noised histories only takes a clean history for a louder
  one: its latents grow (LOG.md).
Precision: the backbone in the autocast dtype, the head's times and norms in fp32 (heads.py).
"""
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from backbone import BackboneConfig, Transformer
from branches import Branches, fixed_step, growing_step
from data import vocabulary
from discrete import (DISCRETE, MISSING, CodeEmbedding, DelayLine, NoDelay, delay_codes)
from heads import HEADS, HeadConfig, energy_score
from monologue import Monologue, NoMonologue, WordTokens
from noise import normal, rows_at, uniform
from processes import masked_mean
from replay import until_all_ended
from schema import Kind, Range


@dataclass
class CALMConfig:
    """The [lm] table."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    # largest share of noise k in the latents that the backbone reads (4.3: 1); 0 = no noise
    noise: Annotated[float, Range(0, 1)] = 1.0
    # layers of T_short (Table 9: 4 for music, none for speech); 0 = no short branch
    short_layers: Annotated[int, Range(0, 10_000)] = 0
    # K, latents that each layer of T_short looks back (4.2: 10; Table 7: 5 is too few)
    short_context: Annotated[int, Range(1, 1_000_000)] = 10
    # largest share of noise k in the latents that T_short reads (the paper's are clean: 0)
    short_noise: Annotated[float, Range(0, 1)] = 0.0
    # kinds that use the short branch
    short_kinds: list[Kind] = field(default_factory=lambda: ["sound", "music"])
    # share of training sequences that go without the short branch
    short_dropout: Annotated[float, Range(0, 1)] = 0.0
    # share of training sequences that go without prompt and text; guidance needs some
    prefix_dropout: Annotated[float, Range(0, 1)] = 0.1
    # put a learned vector before the voice prompt, where there is a prompt (Pocket TTS)
    prompt_bos: bool = False
    # weight of the end-of-clip loss (0.1 as in the third version)
    eos_weight: Annotated[float, Range(0)] = 0.1
    # put words beside the latents instead of before them, where the manifest has their times
    monologue: bool = False
    # frames by which the audio lags behind its words (Table 9: 2; monologue only)
    acoustic_delay: Annotated[int, Range(0, 1000)] = 2
    # n, bytes (or tokens of data.tokenizer) beside each latent (monologue only): n · frame rate
    # must exceed the bytes per second of the speech, or the words fall behind the audio. Measured
    # on 6,813 recordings, 4.3 h: 14 on average, above 22 in the fastest 5 %; so 2 at 12.5 Hz, 1 at
    # 25 Hz
    monologue_tokens: Annotated[int, Range(1, 1000)] = 1
    # weight of the text's cross-entropy (monologue only)
    monologue_weight: Annotated[float, Range(0)] = 0.1
    # frames without text after which generation begins the next word whatever the model predicts: a
    # model that missed a word's beginning has never seen a pause so long and may wait for ever. A
    # clip ends at the latest so long after its last word is spoken
    longest_pause: Annotated[int, Range(1, 1_000_000)] = 25


def pack(parts):
    """Join [(values (B, n, C), lengths (B,)), ...] without gaps -> (B, sum n, C), padding last.

    A causal model then needs no mask: nothing valid comes after padding.
    """
    values = torch.cat([v for v, _ in parts], 1)                            # (B, sum n, C)
    valid = torch.cat([torch.arange(v.shape[1], device=v.device) < length[:, None]
                       for v, length in parts], 1)                          # (B, sum n)
    order = torch.argsort(~valid, dim=1, stable=True)                       # valid ones first
    return values.gather(1, order[..., None].expand_as(values))


class CALM(nn.Module):
    """The language model: loss(batch) trains it, generate(text, ...) yields latents frame by frame.

    latent_dim D; vocab: number of text tokens; kinds: names of the indices in batch["kind"], e.g.
    (speech, sound, music); codes: (levels K, entries per level) of the RVQ, for discrete heads;
    word_tokens: the monologue's (monologue.WordTokens), None = bytes.
    static_shapes (attribute): compute padding on a CPU too, as on CUDA (plan.py).
    head_guidance (attribute): most guidance at which the head learns (train.consistency.guidance).
    """
    static_shapes = False
    head_guidance = 1.0

    def __init__(self, cfg: CALMConfig, latent_dim, vocab, kinds, codes=None, word_tokens=None):
        super().__init__()
        C = cfg.backbone.dim
        discrete = cfg.head.objective in DISCRETE
        self.cfg = cfg
        self.kinds = tuple(kinds)
        self.monologue = cfg.monologue_tokens if cfg.monologue else 0       # tokens per latent
        self.word_tokens = word_tokens or WordTokens()
        self.pad = self.word_tokens.pad
        self.latent_dim = latent_dim
        self.codes = codes if discrete else None                            # x: (B, T, K) int64

        def embedding():
            return CodeEmbedding(*codes, C) if discrete else nn.Linear(latent_dim, C)

        # inputs
        self.text = nn.Embedding(vocab, C)
        self.prompt = embedding()
        self.latent = embedding()
        self.bos = nn.Parameter(torch.randn(C) * 0.5)
        if cfg.prompt_bos:
            self.prompt_bos = nn.Parameter(torch.randn(C) * 0.5)

        # backbone, and what reads z_long
        self.backbone = Transformer(cfg.backbone)
        self.eos = nn.Linear(C, 1)
        self.acoustic_delay = cfg.acoustic_delay if cfg.monologue else 0
        if cfg.monologue:
            # logits of the first byte of a frame; then embeddings and logits of the others
            self.word = nn.Linear(C, vocab)
            others = range(self.monologue - 1)
            self.more_text = nn.ModuleList(nn.Embedding(vocab, C) for _ in others)
            self.more_words = nn.ModuleList(nn.Linear(C, vocab) for _ in others)

        # head; with "delay" level K of a frame comes K-1 positions after level 1
        if discrete:
            self.head = DISCRETE[cfg.head.objective](*codes, C, cfg.head)
        else:
            self.head = HEADS[cfg.head.objective](latent_dim, C, cfg.head)
        self.code_delay = self.head.code_delay if discrete else 0

        # text starts at the scale at which latents are embedded
        for embed in self.text_embeddings():
            nn.init.normal_(embed.weight, std=0.5)

        # short-context branch (section 4.2)
        if cfg.short_layers:
            short = BackboneConfig(**{**vars(cfg.backbone), "layers": cfg.short_layers,
                                      "window": cfg.short_context})
            self.short_latent = embedding()
            self.short_bos = nn.Parameter(torch.randn(C) * 0.5)
            self.short = Transformer(short)
        has_short = torch.tensor([kind in cfg.short_kinds for kind in kinds])
        self.register_buffer("has_short", has_short, persistent=False)

    # ---------------------------------------------------------------- what every model offers

    @classmethod
    def from_config(cls, cfg, vae, data, kinds, only=None):
        """The model for the latents of a VAE (its config) and the texts of data (DataConfig);
        `only` is AudioCALM's: its experts.
        """
        return cls(cfg, vae.latent_dim, vocabulary(data), kinds, vae.codes, WordTokens(data))

    def wanted(self, state):
        """The part of a state_dict that this model loads (AudioCALM leaves out experts)."""
        return state

    def embeddings(self):
        """The parameters that convert.py rescales to a text model's embedding, itself among them.

        The short branch is not the text model's, so its embeddings keep their scale.
        """
        prompt_bos = [self.prompt_bos] if self.cfg.prompt_bos else []
        text = [embed.weight for embed in self.text_embeddings()]
        return [*text, self.bos, *prompt_bos, *self.latent.parameters(),
                *self.prompt.parameters()]

    def matrices(self):
        """The modules with the large linear layers: those that int8 rounds (sample.py)."""
        short = [self.short] if self.cfg.short_layers else []
        head = self.head.net.matrices() if self.cfg.head.objective != "delay" else []
        return [self.backbone, *short, *head]

    def blocks(self):
        """The layers that are compiled and recomputed one by one: equal code, compiled once."""
        short = self.short.blocks if self.cfg.short_layers else []
        return [*self.backbone.blocks, *short]

    def compile_for_training(self):
        """torch.compile the backbone's and the short context's layers, and the head."""
        for block in self.blocks():
            block.compile()
        if self.head.has_jvp:
            # the loss calls net.jvp or net.jvp_s, which net.compile() would leave as they are
            self.head.loss = torch.compile(self.head.loss)
        else:
            self.head.net.compile()

    # ---------------------------------------------------------------- inputs and z_long

    def text_embeddings(self):
        """The embedding of each byte of a frame; the first is that of a text before the audio."""
        return [self.text, *(self.more_text if self.monologue else [])]

    def embed_words(self, words):
        """The monologue's tokens (.., n) -> (.., C)."""
        return sum(embed(words[..., i]) for i, embed in enumerate(self.text_embeddings()))

    def text_logits(self, z, words):
        """z (.., C), a frame's tokens (.., n) -> logits (.., n, vocab); each sees those before."""
        logits = [self.word(z)]
        for i, layer in enumerate(self.more_words):
            z = z + self.text_embeddings()[i](words[..., i])
            logits.append(layer(z))
        return torch.stack(logits, -2)

    def embed_prompt(self, prompt, length):
        """Voice prompt (B, P, D), valid frames (B,) -> (B, P or 1 + P, C), valid positions (B,)."""
        y = self.prompt(prompt)
        if not self.cfg.prompt_bos:
            return y, length
        y = torch.cat([self.prompt_bos.expand(y.shape[0], 1, -1), y], 1)
        return y, length + (length > 0)

    def add_noise(self, x, k_max, generator=None):
        """x (.., D) -> √k ε + √(1-k) x with one k ~ U(0, k_max) per latent (section 4.3)."""
        k = k_max * uniform((*x.shape[:-1], 1), generator, x.device)        # (.., 1)
        noise = normal(x.shape, generator, x.device, x.dtype)
        return k.sqrt() * noise + (1 - k).sqrt() * x                        # CALM 4.3

    def embed_noised(self, embed, x, k_max, generator=None):
        """embed(x), of noised latents where k_max > 0; codes are never noised."""
        if k_max and not self.codes:
            x = self.add_noise(x, k_max, generator)
        return embed(x)

    def condition(self, x, text, text_len, prompt, prompt_len, words=None):
        """Latents as the backbone reads them (B, T, D), text and prompt -> z_long (B, 1 + T, C).

        Row s depends on x¹ ... xˢ. With words (B, T, n) and an acoustic delay of d: z_long
        (B, 1 + d + T, C), and row s depends on words 1 ... s and x¹ ... x^{s-d}.
        """
        # the audio stream behind BOS; words run beside it and d positions ahead
        audio = self.latent(x)                                              # (B, T, C)
        if words is not None:
            d = self.acoustic_delay
            words = F.pad(words, (0, 0, 0, d), value=self.pad)              # (B, d + T, n)
            audio = F.pad(audio, (0, 0, d, 0)) + self.embed_words(words)
        B, steps, _ = audio.shape                                           # T, or d + T
        audio = torch.cat([self.bos.expand(B, 1, -1), audio], 1)            # (B, 1+steps, C)

        # prompt, text and audio without gaps, through the backbone
        prompt, prompt_len = self.embed_prompt(prompt, prompt_len)
        audio_len = torch.full((B,), 1 + steps, device=x.device)
        packed = pack([(prompt, prompt_len), (self.text(text), text_len), (audio, audio_len)])
        y = self.backbone(packed.to(audio.dtype))                           # (B, P+L+1+steps, C)

        # the rows of the audio stream, which begin behind each row's prefix
        rows = (prompt_len + text_len)[:, None] + torch.arange(1 + steps, device=x.device)
        return y.gather(1, rows[..., None].expand(-1, -1, y.shape[2]))      # (B, 1+steps, C)

    # ---------------------------------------------------------------- training

    def loss(self, batch, source=None):
        """One training loss and its metrics.

        batch: x (B, T, D) normalised latents or (B, T, K) codes, valid up to frames (B,); ended
        (B,): the clip ends in this row; text (B, L), text_len (B,); prompt (B, P, D), prompt_len
        (B,); kind (B,). Monologue: words (B, T, n), tokens beside the latents; aligned (B,): rows
        that have them. In eval mode there are further metrics (validation_metrics); histories are
        noised there too, so that the held-out loss compares with the training loss. source: of
        random numbers (noise.py).
        """
        cfg = self.cfg
        x = self.target(batch)                                              # (B, T, D or K)
        B, T, _ = x.shape                                   # T counts the code delay from here
        frames = batch["frames"]
        ended = batch["ended"]

        # rows that keep text and prompt; guidance needs rows without
        dropout = cfg.prefix_dropout if self.training else 0
        keep = uniform((B,), source, x.device) >= dropout                   # (B,)

        # z_long: the backbone reads the noised past
        noised = x if self.codes else self.add_noise(x, cfg.noise, source)
        words = None
        if cfg.monologue:
            words = torch.where(keep[:, None, None], batch["words"], self.pad)
            words = F.pad(words, (0, 0, 0, self.code_delay), value=self.pad)            # (B, T, n)
        z_long = self.condition(noised, batch["text"], batch["text_len"] * keep,
                                batch["prompt"], batch["prompt_len"] * keep, words)
        z_audio = z_long[:, self.acoustic_delay:]                           # (B, 1+T, C)

        # what the head reads: z, guided for a head that learns so, and the short context
        Z = z_audio
        if self.training and self.head_guidance > 1:
            Z = self.guided(z_audio, noised, batch, words, source)
        if cfg.short_layers:
            Z = Z + self.short_context(x, batch["kind"], source)            # CALM 4.2

        # the head, where the next latent exists
        valid = torch.arange(T, device=x.device) < (frames + self.code_delay)[:, None]
        head, metrics = self.head_loss(Z[:, :T], x, valid, batch["kind"], source)

        # end of clip, and the monologue's text
        eos = self.eos_loss(z_audio, frames, ended)
        loss = head + cfg.eos_weight * eos
        metrics = {"head": head.detach(), "eos": eos.detach(), **metrics}
        if cfg.monologue:
            text = self.text_loss(z_long, words, frames, ended, batch["aligned"] & keep)
            loss = loss + cfg.monologue_weight * text
            metrics["text"] = text.detach()
        return loss, metrics

    def target(self, batch):
        """What the head predicts: the latents (B, T, D), or the codes (B, T + code_delay, K)."""
        x = batch["x"]
        if not self.codes:
            return x
        valid = torch.arange(x.shape[1], device=x.device) < batch["frames"][:, None]
        codes = x.masked_fill(~valid[..., None], MISSING)
        return delay_codes(codes) if self.code_delay else codes

    def guided(self, z, noised, batch, words, source=None):
        """z (B, 1 + T, C) -> z_null + a (z - z_null), one a ~ U(1, head_guidance) per row.

        Sampling with guidance reads such z (CALM, third version); that a one-step head learns at
        them is not in the papers. A row without prefix has z = z_null and keeps it.
        """
        nothing = torch.zeros_like(batch["text_len"])
        if words is not None:
            words = torch.full_like(words, self.pad)
        z_null = self.condition(noised, batch["text"], nothing, batch["prompt"], nothing, words)
        z_null = z_null[:, self.acoustic_delay:]                            # (B, 1 + T, C)
        share = uniform((len(z), 1, 1), source, z.device)
        a = 1 + (self.head_guidance - 1) * share                            # (B, 1, 1)
        return z_null + a * (z - z_null)

    def short_context(self, x, kind, source=None):
        """z_short (B, 1 + T, C), zero in rows without the short branch."""
        B = x.shape[0]
        recent = self.embed_noised(self.short_latent, x, self.cfg.short_noise, source)
        recent = torch.cat([self.short_bos.expand(B, 1, -1), recent], 1)    # (B, 1+T, C)
        dropout = self.cfg.short_dropout if self.training else 0
        keep = self.has_short[kind] & (uniform((B,), source, x.device) >= dropout)
        return self.short(recent) * keep[:, None, None]

    def head_loss(self, Z, x, valid, kind, source=None):
        """Mean of the head's loss (eq. 3) over the valid positions (B, T), and metrics."""
        kind = kind[:, None].expand_as(valid)                               # (B, T)

        # static shapes: padding is computed too and weighs 0
        if not (x.is_cuda or self.static_shapes):
            source = rows_at(source, valid)
            Z = Z[valid]                                                    # (N, C)
            x = x[valid]                                                    # (N, D)
            kind = kind[valid]                                              # (N,)
            valid = valid.new_ones(len(x))                                  # all that is left

        # with several samples of noise and time for each Z (heads.py)
        draws = self.head.draws(x, source)
        per_position, metrics = self.head.loss(Z, x, valid, draws)
        if not self.training:
            metrics = metrics | self.validation_metrics(per_position, Z, x, valid, kind)
        return masked_mean(per_position, valid), metrics

    def validation_metrics(self, per_position, Z, x, valid, kind):
        """Per kind in the batch: the head's loss, and of latents the energy score (heads.py).

        The energy score compares objectives and numbers of solver steps, which losses cannot.
        """
        if not self.codes:
            energy = energy_score(self.head, Z, x)
        metrics = {}
        for index, name in enumerate(self.kinds):
            of_kind = valid & (kind == index)
            if not of_kind.any():
                continue
            metrics[f"head_{name}"] = masked_mean(per_position, of_kind)
            if not self.codes:
                metrics[f"energy_{name}"] = masked_mean(energy, of_kind)
        return metrics

    def eos_loss(self, z_audio, frames, ended):
        """Binary cross-entropy of "x^{s+1} does not exist", over rows 0 ... frames of each clip."""
        s = torch.arange(z_audio.shape[1], device=z_audio.device)
        is_end = (s == frames[:, None]) & ended[:, None]                    # (B, 1+T)
        valid = (s < frames[:, None]) | is_end
        logits = self.eos(z_audio).squeeze(-1).float()
        bce = F.binary_cross_entropy_with_logits(logits, is_end.float(), reduction="none")
        return masked_mean(bce, valid)

    def text_loss(self, z_long, words, frames, ended, aligned):
        """Cross-entropy per byte of the monologue (B, T, n): row s predicts position s + 1.

        Only aligned rows (B,) count, up to d positions behind the end of a clip, where PAD is due.
        """
        d = self.acoustic_delay
        target = F.pad(words, (0, 0, 0, d), value=self.pad)                 # (B, d+T, n)
        s = torch.arange(target.shape[1], device=target.device)
        valid = aligned[:, None] & (s < (frames + d * ended)[:, None])
        logits = self.text_logits(z_long[:, :-1], target).float()           # (B, d+T, n, vocab)
        nats = F.cross_entropy(logits.movedim(-1, 1), target, reduction="none")
        return masked_mean(nats.mean(-1), valid)

    def regress(self, batch, teacher, guidance, source=None):
        """Distil a teacher into this model's backbone (third version of CALM; Pocket TTS).

            L = mean over positions of ||z - (z_null + a (z_cond - z_null))||² / C,  a = guidance

        z is this model's, the rest the teacher's; both read the same noised latents, with text and
        prompt (z_null without). Sampling then needs no guidance, and the teacher's head fits
        unchanged when copied. Its EOS does not: it reads z_cond, so this model's learns the same
        probability from z (eos_divergence). Positions: rows 0 ... frames; the last is the clip's
        end. batch as in loss. metrics: explained = 1 - L / variance of the target (1 = the
        teacher); eos, 0 = the teacher's.
        """
        x = batch["x"]
        noised = self.add_noise(x, self.cfg.noise, source)

        def z_of(net, keep):
            return net.condition(noised, batch["text"], batch["text_len"] * keep, batch["prompt"],
                                 batch["prompt_len"] * keep).float()

        # the teacher's guided z
        with torch.no_grad():
            null = z_of(teacher, 0)
            cond = z_of(teacher, 1)
            target = null + guidance * (cond - null)                        # (B, 1 + T, C)

        # squared error over the positions that count
        valid = torch.arange(1 + x.shape[1], device=x.device) <= batch["frames"][:, None]
        z = z_of(self, 1)
        loss = masked_mean((z - target).square().mean(-1), valid)
        eos = masked_mean(self.eos_divergence(z, teacher.eos(cond)), valid)

        # share of the target's variance that is explained
        mean = (target * valid[..., None]).sum((0, 1)) / valid.sum()
        variance = masked_mean((target - mean).square().mean(-1), valid)
        metrics = {"explained": 1 - loss.detach() / variance, "eos": eos.detach()}
        return loss + self.cfg.eos_weight * eos, metrics

    def eos_divergence(self, z, teacher_logits):
        """KL divergence of the teacher's end-of-clip probability from that of this model's z.

        z (B, 1 + T, C), teacher_logits (B, 1 + T, 1) -> (B, 1 + T). The gradient stays in the EOS
        layer: z has its own target.
        """
        teacher_logits = teacher_logits.float()
        logits = self.eos(z.detach()).float()
        p = teacher_logits.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(logits, p, reduction="none")
        entropy = F.binary_cross_entropy_with_logits(teacher_logits, p, reduction="none")
        return (cross_entropy - entropy).squeeze(-1)

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(self, text, *, kind, max_frames, prompt=None, history=None, text_len=None,
                 prompt_len=None, steps=None, temperature=1.0, guidance=1.0, noise=0.0,
                 text_temperature=0.8, text_top_k=0, generator=None, fast=None):
        """Yield latents (B, D), or codes (B, K), frame by frame, and the rows that have ended (B,).

        Stops after max_frames or when all rows have ended. A row that has ended goes on yielding:
        cut it there. text (B, L): tokens, valid up to text_len (B,), None = all; kind: an index;
        prompt (B, P, D): voice prompt, valid up to prompt_len (B,); history (B, n, D): clean
        latents to continue. All latents are normalised. noise: share of the training noise that
        the latents get before they are read, 0 (the paper) to 1. Monologue: the bytes of a
        speech's text run beside the latents, and nothing beside a history; a row cannot end before
        its text is complete, and ends at the latest longest_pause after it is spoken.
        text_temperature (the paper: 0.8) and text_top_k (0 = all): of a text that the model writes
        itself. fast: a replay.Fast, to generate in fixed memory; None = in a cache that grows.
        """
        B = text.shape[0]
        history = self.no_frames(B) if history is None else history
        line = DelayLine(history) if self.code_delay else NoDelay(history)
        text, text_len, monologue = self.start_monologue(text, text_len, kind, text_temperature,
                                                         text_top_k)
        prefix, front = self.embed_prefix(text, prompt, text_len, prompt_len)

        # prefix and history; with an acoustic delay the first words run ahead of the audio
        branches = Branches(self, kind, guidance, noise, front)
        inputs, delayed = branches.start(prefix, line.history, monologue.pad, generator)
        for audio in delayed.unbind(1):                                     # (B, C), d times
            z_long, _ = branches.read(inputs.without_short())
            inputs.feed(audio, monologue.step(z_long, generator), monologue.pad)
        first = branches.read(inputs)

        # latent by latent
        sampling = {"steps": steps, "temperature": temperature}
        frames = max_frames + self.code_delay
        if fast is None:
            step = growing_step(branches, sampling)
            yield from self.frames(first, step, frames, line, monologue, generator)
            return
        with fixed_step(fast, branches, sampling, frames) as step:
            yield from until_all_ended(
                self.frames(first, step, frames, line, monologue, generator, look=not text.is_cuda))

    def frames(self, first, step, count, line, monologue, generator, look=True):
        """The frames of generate(); first: z_long and Z (B, C) of the first.

        look: stop when all rows have ended, for which the host waits for the device.
        """
        z_long, Z = first
        ended = torch.zeros(len(Z), dtype=torch.bool, device=Z.device)
        last_frame = self.cfg.acoustic_delay + self.cfg.longest_pause       # after the text
        for i in range(count):
            # z_long: the next text token, and whether the clip is over
            if i > 0:
                z_long, Z, over = step.read(x, token, generator=generator)  # (B, C), (B, C), (B,)
            token = monologue.step(z_long, generator)
            if i > 0:                                                       # at least one latent
                ended = ended | (over & monologue.finished(over.device))
                ended = ended | monologue.overdue(last_frame, over.device)
            frame_ended = line.advance(ended)
            if look and frame_ended.all():
                return

            # Z = z_long + z_short: the next latent
            x, = step.draw(Z, generator=generator)
            x = line.put(x, ended)                                          # (B, D or K)
            if i >= self.code_delay:
                yield line.frame(), frame_ended

    def no_frames(self, B):
        """An empty history."""
        if self.codes:
            return torch.zeros(B, 0, self.codes[0], dtype=torch.long, device=self.bos.device)
        return self.bos.new_zeros(B, 0, self.latent_dim)

    def start_monologue(self, text, text_len, kind, temperature, top_k):
        """The tokens that stay before the audio, their number (B,) or None where there is no
        padding, and the stream of those that run beside it.
        """
        B = text.shape[0]
        if not self.cfg.monologue:
            return text, text_len, NoMonologue(self.bos.new_zeros(B, len(self.bos)))
        pad = self.embed_words(torch.full((B, self.monologue), self.pad, device=text.device))
        if self.kinds[kind] != "speech":                        # captions stay before the audio
            return text, text_len, NoMonologue(pad)

        # the first token names the kind
        lengths = [text.shape[1]] * B if text_len is None else text_len.tolist()
        spoken = [row[1:n] for row, n in zip(text.tolist(), lengths)]
        return text[:, :1], None, Monologue(spoken, self.cfg.longest_pause,
                                            [self.word, *self.more_words], self.text_embeddings(),
                                            pad, temperature, top_k, self.word_tokens)

    def embed_prefix(self, text, prompt, text_len=None, prompt_len=None):
        """Voice prompt (B, P, D) or None and text (B, L) -> (B, P + L, C), padding in front.

        Also its length in each row (B,); None where nothing is padded (no lengths are given).
        """
        B, L = text.shape
        padded = text_len is not None or prompt_len is not None
        parts = [(self.text(text), text.new_full((B,), L) if text_len is None else text_len)]
        if prompt is not None and prompt.shape[1] > 0:
            if prompt_len is None:
                prompt_len = text.new_full((B,), prompt.shape[1])
            parts.insert(0, self.embed_prompt(prompt, prompt_len))
        if not padded:
            return torch.cat([values for values, _ in parts], 1), None

        # as in pack(), but padding first
        values = torch.cat([values for values, _ in parts], 1)              # (B, P + L, C)
        valid = torch.cat([torch.arange(v.shape[1], device=v.device) < length[:, None]
                           for v, length in parts], 1)                      # (B, P + L)
        order = torch.argsort(valid.int(), dim=1, stable=True)
        values = values.gather(1, order[..., None].expand_as(values))
        return values, (~valid).sum(1)
