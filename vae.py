"""The causal autoencoder: waveform -> latents, a few dozen numbers per frame -> waveform.

    wav (B, ch, S)                                        wav (B, ch, S)
      │ front: conv k7, or log |STFT|                       ▲ conv k3, or inverse STFT
      │ [residual units, ELU, strided conv]                 │ [ELU, transposed conv, residual units]
      │   × ratios                                          │   × ratios
      │ conv k3                                             │ conv k7
      ▼ (B, C, T)                                           │ (B, C, T)
    transformer, causal, window = context                 transformer, causal, window = context
      ▼ (B, T, C)                                           ▲ (B, T, C)
    linear ─► mean, log-variance (B, T, D) ─► z = mean + std · eps ─► linear

    inner > 1: the transformers see `inner` positions per latent. A strided convolution (Mimi) or
    one [CLS] per patch (AudioCALM) merges them into the latent; a transposed convolution takes the
    latent apart again.
    bottleneck = "rvq": z = a sum of K codebook entries, the discrete baseline.

T = ceil(S / hop), where hop is the product of `ratios` times `inner`. Everything is causal: latent
i depends only on samples before (i + 1) · hop. The conv decoder computes samples i · hop to
(i + 1) · hop from the latents up to i. The iSTFT decoder lags by `latency` = n_fft - stft_hop
samples: a sample is complete once all frames (n_fft samples long) that cover it have been added.

gan.py trains it (eq. 2).

Sources: CALM (arXiv 2509.06926) section 4.1 and Table 10; encoder and decoder are those of Mimi
(Défossez et al. 2024), the layers' sources stand in layers.py; iSTFT head and [CLS]: AudioCALM
appendix A.1.
Where this differs from the paper:
- AudioCALM names the parts of its autoencoder (appendix A.1: residual convolutions, self-attention
  on both sides, a patch-[CLS] aggregator, an iSTFT head), not their sizes or order. Here the [CLS]
  stands after its patch and goes through the encoder's transformer with it, so that everything
  stays causal; configs/paper/audiocalm.toml lists our choices.
- encoder = "stft" (log-magnitudes instead of the outermost convolutions) is ours. It discards the
  phase at the input, and trains in minutes on a CPU. For a codec that is faithful to the waveform
  use encoder = "conv"; a strided front (front_stride, ours too) makes it affordable there.
- block = "convnext" (Liu et al. 2022, causal; LayerNorm, GELU) instead of SEANet's units is ours
  too. Its strided convolutions have kernel = stride, and the last one leads straight to the
  transformer. With it and Muon (optim.py) a VAE of recordings learns in minutes what it otherwise
  does not (LOG.md).

Precision: spectra in fp32; convolutions and transformers in the autocast dtype.
"""
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from backbone import BackboneConfig, KVCache, Transformer
from discrete import ResidualVQ
from layers import (Chain, Conv, ConvNeXt, ConvTranspose, Elu, InverseSpectrum, Norm, Residual,
                    Spectrum)
from noise import normal
from schema import Range


@dataclass
class VAEConfig:
    """The [vae] table: what one needs to turn a waveform into latents and back.

    Table 10: music 32 kHz, ratios 8·8·5·4, D = 128; speech 24 kHz, 6·5·4·4·4, D = 32.
    """
    # Hz
    sample_rate: Annotated[int, Range(1, 1_000_000)] = 16000
    # audio channels
    channels: Annotated[int, Range(1, 64)] = 1
    # channels D of a latent (Table 10, speech)
    latent_dim: Annotated[int, Range(1, 100_000)] = 32
    # upsampling factors in decoder order; hop = their product · inner
    ratios: list[Annotated[int, Range(1, 10_000)]] = field(default_factory=lambda: [4, 10, 4, 4])
    # stft: log-magnitudes replace the outermost ratios
    encoder: Literal["conv", "stft"] = "stft"
    # encoder = "conv": stride of its first convolution, the product of the last ratios, which it
    # replaces; 1 = residual units run at the rate of the waveform too (SEANet; slow)
    front_stride: Annotated[int, Range(1, 1_000_000)] = 1
    # istft: magnitude and phase replace the outermost ratios
    decoder: Literal["conv", "istft"] = "istft"
    # stft, istft: hop in samples, the product of the last ratios, which the STFT replaces
    stft_hop: Annotated[int, Range(0, 1_000_000)] = 160
    # istft: direct (Vocos), or locked (phases follow from the magnitudes, so that tones hold; for
    # encoder = "stft", trained with gan.loss_weights.magnitude)
    phase: Literal["direct", "locked"] = "direct"
    # stft, istft: n_fft in samples; 0 = 4 · stft_hop
    stft_size: Annotated[int, Range(0, 1_000_000)] = 0
    # encoder = "stft": n_fft in samples of each input spectrum; [] = stft_size only. A long one
    # resolves the harmonics of a tone, a short one its onset
    encoder_windows: list[Annotated[int, Range(1, 1_000_000)]] = field(default_factory=list)
    # seanet (ELU, no norm: both papers) or convnext (LayerNorm, GELU, as in Vocos: learns faster)
    block: Literal["seanet", "convnext"] = "convnext"
    # transformer positions per latent (Mimi: 2, Pocket TTS: 16): the last, learned downsampling
    # comes after the encoder's transformer, the first upsampling before the decoder's
    inner: Annotated[int, Range(1, 1000)] = 1
    # how `inner` positions become one latent: conv (strided: Mimi) or cls (one learned [CLS] after
    # each patch, read after the transformer: AudioCALM)
    aggregator: Literal["conv", "cls"] = "conv"
    # plain (RMSNorm), mimi (LayerNorm, layer scale 0.01, no final norm) or pocket (Mimi with the
    # tanh approximation of GELU, as in Pocket TTS)
    transformer_style: Literal["plain", "mimi", "pocket"] = "plain"
    # rvq: the discrete baseline of Tables 1 and 3
    bottleneck: Literal["gaussian", "rvq"] = "gaussian"
    # rvq: codebooks K (8 at 12.5 Hz, Table 1; 32 at 25 Hz, Table 3)
    codebooks: Annotated[int, Range(1, 1000)] = 8
    # rvq: entries per codebook (Mimi: 2048)
    codebook_size: Annotated[int, Range(1, 32_768)] = 2048
    # channels next to the waveform, doubled at each ratio
    width: Annotated[int, Range(1, 100_000)] = 32
    # upper limit of that doubling
    width_max: Annotated[int, Range(1, 100_000)] = 256
    # residual units per ratio; seanet: dilated 1, 2, 4, ...
    res_layers: Annotated[int, Range(0, 100)] = 2
    # transformer width C
    dim: Annotated[int, Range(1, 100_000)] = 256
    heads: Annotated[int, Range(1, 10_000)] = 4
    # transformer layers of each side (Table 10: 8 + 8 speech, 4 + 4 music)
    encoder_layers: Annotated[int, Range(0, 10_000)] = 1
    decoder_layers: Annotated[int, Range(0, 10_000)] = 1
    # seconds that each transformer layer looks back (Table 10: 10 speech, 30 music)
    context: Annotated[float, Range(0, 100_000)] = 1.0

    def __post_init__(self):
        if not self.ratios:
            raise ValueError("ratios: needs at least one whole number >= 1")
        if len(self.ratios) > 20 or math.prod(self.ratios) > 1_000_000:
            raise ValueError("ratios: must be at most 20 numbers with a product up to 1000000")
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise ValueError(
                f"heads: dim / heads must be an even whole number, got {self.dim} / {self.heads}")
        if self.encoder_windows and self.encoder != "stft":
            raise ValueError("encoder_windows: needs encoder = \"stft\"")
        if self.encoder == "stft" or self.decoder == "istft":
            self.check_stft()

        if self.front_stride > 1:
            if self.encoder != "conv":
                raise ValueError("front_stride: needs encoder = \"conv\"")
            self.check_replaced("front_stride")

    def check_replaced(self, name):
        """ValueError unless that stride replaces whole ratios, and not all of them."""
        outer = [math.prod(self.ratios[i:]) for i in range(1, len(self.ratios))]
        if getattr(self, name) not in outer:
            raise ValueError(f"{name}: must be the product of the last ratios, "
                             f"one of {outer}, got {getattr(self, name)}")

    def check_stft(self):
        self.check_replaced("stft_hop")
        if self.n_fft < self.stft_hop:
            raise ValueError(f"stft_size: must be at least stft_hop = {self.stft_hop}, "
                             f"got {self.stft_size}")
        if self.encoder_windows and min(self.encoder_windows) < self.stft_hop:
            raise ValueError(f"encoder_windows: must be at least stft_hop = {self.stft_hop}, "
                             f"got {min(self.encoder_windows)}")

    @property
    def hop(self):
        """Samples per latent."""
        return math.prod(self.ratios) * self.inner

    @property
    def frame_rate(self):
        """Latents per second."""
        return self.sample_rate / self.hop

    @property
    def n_fft(self):
        """Samples per frame of the STFT and its inverse."""
        return self.stft_size or 4 * self.stft_hop

    @property
    def codes(self):
        """rvq: (levels K, entries per codebook)."""
        return self.codebooks, self.codebook_size

    def conv_ratios(self, stride):
        """(ratios left to the convolutions, in decoder order; channels at their waveform end).

        stride: the product of the outermost ratios, which an STFT or a strided front replaces.
        """
        ratios = list(self.ratios)
        width = self.width
        replaced = 1
        while replaced < stride:
            replaced *= ratios.pop()
            width *= 2
        return ratios, min(width, self.width_max)


def residual_units(cfg, width):
    """The residual units of one level."""
    if cfg.block == "convnext":
        return [ConvNeXt(width) for _ in range(cfg.res_layers)]
    return [Residual(width, 2 ** i) for i in range(cfg.res_layers)]


def before_resampling(cfg, width):
    """The layer between residual units and a convolution that changes the sample rate: LayerNorm in
    ConvNeXt, ELU in SEANet.
    """
    return Norm(width) if cfg.block == "convnext" else Elu()


def transformer_config(cfg, layers, cls=False):
    """The BackboneConfig of the encoder's or decoder's transformer; cls: with a [CLS] per patch."""
    plain = cfg.transformer_style == "plain"
    positions_per_second = cfg.frame_rate * (cfg.inner + int(cls))
    return BackboneConfig(dim=cfg.dim, layers=layers, heads=cfg.heads,
                          mlp="gelu_tanh" if cfg.transformer_style == "pocket" else "gelu",
                          norm="rms" if plain else "layer", final_norm=plain,
                          layer_scale=0.0 if plain else 0.01,
                          window=max(1, round(cfg.context * positions_per_second)))


def encoder_convolutions(cfg):
    """The layers from wav (B, ch, S) to (B, C, T · inner): a front, and a level per ratio."""
    convnext = cfg.block == "convnext"
    stride = cfg.stft_hop if cfg.encoder == "stft" else cfg.front_stride
    ratios, width = cfg.conv_ratios(stride)

    # front: the waveform or its spectra
    if cfg.encoder == "stft":
        sizes = cfg.encoder_windows or [cfg.n_fft]
        bins = sum(n_fft // 2 + 1 for n_fft in sizes)
        layers = [Spectrum(sizes, cfg.stft_hop),                    # (B, ch · bins, S / stft_hop)
                  Conv(cfg.channels * bins, width, 3)]              # (B, width, S / stft_hop)
    else:
        kernel = 7 if stride == 1 else 2 * stride
        layers = [Conv(cfg.channels, width, kernel, stride)]        # (B, width, S / front_stride)
    if convnext:
        layers.append(Norm(width))

    # levels: the length divided by the ratio, the width doubled
    for level in reversed(range(len(ratios))):
        stride = ratios[level]
        kernel = stride if convnext else 2 * stride
        wider = cfg.dim if convnext and level == 0 else min(2 * width, cfg.width_max)
        layers += [*residual_units(cfg, width), before_resampling(cfg, width),
                   Conv(width, wider, kernel, stride)]
        width = wider

    # to the transformer's width; with convnext the last level did that
    if not convnext:
        layers += [Elu(), Conv(width, cfg.dim, 3)]                  # (B, C, T · inner)
    return layers


class Encoder(nn.Module):
    """wav (B, ch, T · hop) -> mean and log-variance (B, T, 2 D); rvq: (B, T, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.inner = cfg.inner
        self.cls = cfg.aggregator == "cls"
        strided = cfg.inner > 1 and not self.cls
        outputs = 2 * cfg.latent_dim if cfg.bottleneck == "gaussian" else cfg.latent_dim

        self.conv = Chain(*encoder_convolutions(cfg))                        # (B, C, T · inner)
        self.transformer = Transformer(transformer_config(cfg, cfg.encoder_layers, self.cls))
        if self.cls:
            self.token = nn.Parameter(0.02 * torch.randn(cfg.dim))           # the learned [CLS]
        if strided:
            self.out = Conv(cfg.dim, outputs, 2 * cfg.inner, stride=cfg.inner, replicate=True)
        else:
            self.out = nn.Linear(cfg.dim, outputs)                           # (B, T, 2 D)

        # begin with little posterior noise, std e^-2 = 0.14 (no gain measured by itself: LOG.md)
        with torch.no_grad():
            (self.out.conv if strided else self.out).bias[cfg.latent_dim:] = -4.0

    def forward(self, wav, state=None):
        x = self.conv(wav, state).mT                                         # (B, T · inner, C)
        cache = None if state is None else state.setdefault(self, KVCache())

        # AudioCALM: a [CLS] after each patch of `inner` positions becomes the latent
        if self.cls:
            patches = x.unflatten(1, (-1, self.inner))                       # (B, T, inner, C)
            cls = self.token.to(x.dtype).expand(x.shape[0], patches.shape[1], 1, -1)
            x = torch.cat([patches, cls], 2).flatten(1, 2)                   # (B, T (inner + 1), C)
            x = self.transformer(x, cache)
            return self.out(x[:, self.inner::self.inner + 1])

        # one position per latent, or a strided convolution over `inner` of them
        x = self.transformer(x, cache)
        if self.inner == 1:
            return self.out(x)
        return self.out(x.mT, state).mT


def decoder_convolutions(cfg):
    """The layers from (B, C, T · inner) to wav (B, ch, T · hop): a level per ratio, and a head."""
    ratios, narrowest = cfg.conv_ratios(cfg.stft_hop if cfg.decoder == "istft" else 1)
    widths = [min(narrowest * 2 ** i, cfg.width_max) for i in range(len(ratios), -1, -1)]

    # from the transformer's width C; convnext's levels start at C and drop this convolution, which
    # is built all the same: without its random numbers every seed would give other weights
    layers = [Conv(cfg.dim, widths[0], 7)]                          # (B, widths[0], T · inner)
    if cfg.block == "convnext":
        layers = []
        widths[0] = cfg.dim

    # levels: the length times the ratio, the width halved
    for ratio, width, narrower in zip(ratios, widths, widths[1:]):
        layers += [before_resampling(cfg, width), ConvTranspose(width, narrower, ratio),
                   *residual_units(cfg, narrower)]
    layers.append(before_resampling(cfg, narrowest))

    # head: the waveform, or spectra and their inverse
    if cfg.decoder == "conv":
        return [*layers, Conv(narrowest, cfg.channels, 3)]          # (B, ch, T · hop)
    inverse = InverseSpectrum(cfg.n_fft, cfg.stft_hop, cfg.channels, cfg.phase)
    maps = Conv(narrowest, cfg.channels * inverse.maps * (cfg.n_fft // 2 + 1), 3)
    inverse.initialise(maps.conv)
    return [*layers, maps, inverse]


class Decoder(nn.Module):
    """z (B, T, D) -> wav (B, ch, T · hop)."""

    def __init__(self, cfg):
        super().__init__()
        self.latency = cfg.n_fft - cfg.stft_hop if cfg.decoder == "istft" else 0

        self.input = nn.Linear(cfg.latent_dim, cfg.dim)                      # (B, T, C)
        self.up = None
        if cfg.inner > 1:                                                    # (B, C, T · inner)
            self.up = ConvTranspose(cfg.dim, cfg.dim, cfg.inner, groups=cfg.dim)   # as in Mimi
        self.transformer = Transformer(transformer_config(cfg, cfg.decoder_layers))
        self.conv = Chain(*decoder_convolutions(cfg))                        # (B, ch, T · hop)

    def forward(self, z, state=None, with_maps=False):
        """with_maps: also what the last layer was given, of an inverse STFT its maps."""
        x = self.input(z)
        if self.up is not None:
            x = self.up(x.mT, state).mT                                      # (B, T · inner, C)
        cache = None if state is None else state.setdefault(self, KVCache())
        maps = self.transformer(x, cache).mT
        if not with_maps:
            return self.conv(maps, state)

        *layers, last = self.conv
        for layer in layers:
            maps = layer(maps, state)
        return last(maps, state), maps


class VAE(nn.Module):
    """Encoder, bottleneck and decoder, and the statistics that normalise latents for a language
    model.

    Streaming: pass one dict, empty at first, as `state` to every call of encode (or decode) for one
    signal. The joined pieces equal the offline result for pieces of any size. layers.py shows what
    each layer keeps in it; Encoder and Decoder keep the KVCache of their transformer, encode keeps
    under "pending" the samples that do not fill a latent yet.
    """

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.latency = self.decoder.latency              # samples by which streaming decode lags
        self.quantizer = None
        if cfg.bottleneck == "rvq":
            self.quantizer = ResidualVQ(cfg.latent_dim, cfg.codebooks, cfg.codebook_size)
        self.register_buffer("latent_mean", torch.zeros(cfg.latent_dim))
        self.register_buffer("latent_std", torch.ones(cfg.latent_dim))

    def encode(self, wav, state=None):
        """wav (B, ch, S) in [-1, 1] -> mean, log-variance, each (B, T, D), T = ceil(S / hop).

        rvq: the sum of the codes' entries, and a log-variance of -12 (next to no noise).
        Offline the end is padded with zeros to a whole latent. With a state T counts the latents
        that are complete, and the remaining samples wait in the state.
        """
        wav = self.whole_latents(wav, state)
        if wav.shape[-1] == 0:
            empty = wav.new_zeros(wav.shape[0], 0, self.cfg.latent_dim)
            return empty, empty

        h = self.encoder(wav, state).float()                                 # (B, T, 2 D); rvq: D
        if self.quantizer is not None:
            return self.quantizer.decode(self.quantizer.encode(h)), torch.full_like(h, -12.0)
        mean, logvar = h.chunk(2, -1)
        return mean, logvar.clamp(-12.0, 4.0)   # std 0.0025 to 7.4: no overflow, no division by 0

    def whole_latents(self, wav, state):
        """The samples of wav, and of those that wait in the state, that make whole latents."""
        hop = self.cfg.hop
        if state is None:
            return F.pad(wav, (0, -wav.shape[-1] % hop))
        if "pending" in state:
            wav = torch.cat([state["pending"], wav], -1)
        whole = wav.shape[-1] // hop * hop
        state["pending"] = wav[..., whole:]
        return wav[..., :whole]

    def encode_codes(self, wav, state=None):
        """rvq: wav (B, ch, S) -> codes (B, T, K), int64; denormalize(codes) is encode's mean.

        With a state as encode.
        """
        wav = self.whole_latents(wav, state)
        if wav.shape[-1] == 0:
            return wav.new_zeros(wav.shape[0], 0, self.cfg.codebooks, dtype=torch.long)
        return self.quantizer.encode(self.encoder(wav, state).float())

    def decode(self, z, state=None):
        """z (B, T, D) -> wav (B, ch, T · hop).

        With a state the first call returns `latency` samples fewer; flush returns the last ones.
        """
        if z.shape[1] == 0:
            return z.new_zeros(z.shape[0], self.cfg.channels, 0)
        return self.decoder(z, state).float()

    def flush(self, state):
        """The last samples of a signal decoded with `state`, (B, ch, latency).

        For the conv decoder, which does not lag, and before the first latent there are none: the
        result is then (1, ch, 0) on the CPU, whatever B and the device.
        """
        last = self.decoder.conv[-1]
        if not self.latency or last not in state:
            return torch.zeros(1, self.cfg.channels, 0)
        return last.remaining(state).float()

    def decode_stream(self, latents, state=None, parallel=False):
        """Decode latents as they come, in chunks of 1, 2, then 4.

        latents: iterator of pairs (normalised latent (B, D) or codes (B, K), extra), extra anything
        -> yields waveform (B, ch, S), number of its latents, the last latent's extra.

        parallel: decode in a thread while the next latents are sampled; worth it where a second
        core is free.
        """
        state = {} if state is None else state
        if not parallel:
            for x, extra in in_chunks(latents):
                yield self.decode_chunk(x, state), x.shape[1], extra
            return

        jobs = deque()
        with ThreadPoolExecutor(1) as pool:
            for x, extra in in_chunks(latents):
                jobs.append((pool.submit(self.decode_chunk, x, state), x.shape[1], extra))
                # yield what is decoded; wait only if three chunks behind
                while jobs and (jobs[0][0].done() or len(jobs) > 2):
                    job, *rest = jobs.popleft()
                    yield job.result(), *rest
            for job, *rest in jobs:
                yield job.result(), *rest

    @torch.no_grad()                                     # a thread has a grad mode of its own
    def decode_chunk(self, x, state):
        """x (B, n, D), normalised, or codes (B, n, K) -> wav (B, ch, n · hop)."""
        return self.decode(self.denormalize(x), state)

    @torch.no_grad()
    def set_latent_statistics(self, wavs):
        """Set latent_mean and latent_std to those of posterior samples of wavs, (1, ch, S) each."""
        means = []
        variances = []
        for wav in wavs:
            mean, logvar = self.encode(wav)
            means.append(mean[0])
            variances.append(logvar[0].exp())

        # total variance: that of the means plus the mean of the posterior's
        means = torch.cat(means)                                             # (all frames, D)
        variance = means.var(0, correction=0) + torch.cat(variances).mean(0)
        self.latent_mean.copy_(means.mean(0))
        self.latent_std.copy_(variance.sqrt().clamp(min=1e-4))

    def normalize(self, z):
        """Latents for the language model: (z - latent_mean) / latent_std."""
        return (z - self.latent_mean) / self.latent_std

    def denormalize(self, x):
        """The inverse of normalize; codes (.., K) become the sums of their codebook entries."""
        if not x.is_floating_point():
            return self.quantizer.decode(x)
        return x * self.latent_std + self.latent_mean

    def forward(self, wav, source=None):
        """wav (B, ch, S), S a multiple of hop -> x̂ (B, ch, S), what the decoder's last layer made
        it of, z (B, T, D), {"kl"} or {"commit"}.

        z is a posterior sample; rvq: the sum of the codes' entries, with straight-through gradient.
        source: of random numbers (noise.py).
        """
        if self.quantizer is not None:
            z, commit = self.quantizer(self.encoder(wav).float(), source)
            terms = {"commit": commit}
        else:
            mean, logvar = self.encode(wav)
            z = sample_posterior(mean, logvar, source)
            terms = {"kl": kl_loss(mean, logvar)}
        rec, maps = self.decoder(z, with_maps=True)
        return rec.float(), maps, z, terms


def in_chunks(latents):
    """Pairs (latent (B, D), extra) -> (chunk (B, n, D), the last extra), n = 1, 2, 4, 4, ...

    The first latent goes alone, for low latency. One alone costs 1.6 times its share of four (each
    call reads the weights of the transformer and the first convolutions again); eight are no
    cheaper. At twice real time playback has no gaps.
    """
    chunk = []
    size = 1
    for x, extra in latents:
        chunk.append(x)
        if len(chunk) == size:
            yield torch.stack(chunk, 1), extra
            chunk = []
            size = min(2 * size, 4)
    if chunk:
        yield torch.stack(chunk, 1), extra


def sample_posterior(mean, logvar, source=None):
    """z ~ N(mean, e^logvar), (B, T, D) all three; source: of random numbers (noise.py)."""
    return mean + (0.5 * logvar).exp() * normal(mean.shape, source, mean.device, mean.dtype)


def kl_loss(mean, logvar):
    """L_KL (eq. 2): KL(N(mean, e^logvar) ‖ N(0, 1)) in nats, mean over channels and frames."""
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
