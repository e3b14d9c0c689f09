"""The causal VAE-GAN: waveform -> a few dozen numbers a frame -> waveform.

    wav (B, ch, S)                                        wav (B, ch, S)
      │ front: conv k7, or log |STFT|                       ▲ conv k3, or inverse STFT
      │ [residual units, ELU, strided conv]                 │ [ELU, transposed conv, residual units]
      │   × ratios                                          │   × ratios
      │ conv k3                                             │ conv k7
      ▼ (B, C, T)                                           │ (B, C, T)
    transformer, causal, window = context                 transformer, causal, window = context
      ▼ (B, T, C)                                           ▲ (B, T, C)
    linear ─► mean, log-variance (B, T, D) ─► z = mean + std · eps ─► linear

    inner > 1: the transformers see `inner` positions a latent; a strided convolution (Mimi) or one
    [CLS] a patch (AudioCALM) makes the latent, a transposed convolution takes it apart again.
    bottleneck = "rvq": z = a sum of K codebook entries, the discrete baseline.

    discriminators: one per STFT size, looking at real and imaginary parts   (training only)

    L = λ_t |x - x̂|  +  λ_f L_f  +  λ_adv L_adv  +  λ_feat L_feat  +  λ_KL L_KL      (CALM eq. 2)
        + λ_distill (1 - cos(W z, WavLM))          (speech, CALM 5.1)   + λ_commit L_commit  (rvq)

T = ceil(S / hop), hop = product of `ratios` times `inner`. Everything is causal: latent t is a
function of the samples before (t + 1) · hop. The conv decoder gives samples t · hop to
(t + 1) · hop from the latents up to t; the iSTFT decoder owes its last `latency` =
n_fft - stft_hop samples until the next frames have been overlapped.

Sources: CALM (arXiv 2509.06926) section 4.1, eq. 2, Table 10; the convolutions are SEANet's as in
EnCodec (Défossez et al. 2022) and Mimi (Défossez et al. 2024: zero padding, no norm, hidden width
half); iSTFT head: Vocos (Siuzdak 2023) and AudioCALM appendix A.1; discriminators and hinge losses:
EnCodec section 3.4; multi-scale log-mel loss: DAC (Kumar et al. 2023).
Where this differs from the paper:
- disc_power < 1 (compressed spectra of equal loudness for the discriminators) is ours: from the
  linear ones of EnCodec they learn little in a few hundred steps (LOG.md).
- λ_t, λ_f, λ_adv, λ_feat are not given; [vae.loss_weights] exposes them.
- AudioCALM says which parts its autoencoder has (appendix A.1: residual convolutions,
  self-attention on both sides, a patch-[CLS] aggregator, an iSTFT head), not their sizes or order.
  Here the [CLS] stands after its patch and goes through the encoder's transformer with it, so that
  everything stays causal; configs/paper/vae_audiocalm.toml lists what we chose.
- encoder = "stft" (log-magnitudes instead of the outermost convolutions) is ours: it drops the
  phase at the door, and trains in minutes on a CPU. For a codec that is faithful to the waveform
  use encoder = "conv".
- block = "convnext" (Liu et al. 2022, causal; LayerNorm, GELU) instead of SEANet's units is ours
  too: strided convolutions reach no further than their stride, and the last one leads straight to
  the transformer. With it and Muon (train.py) a VAE of recordings learns in minutes what it
  otherwise does not (LOG.md).
- Generator and discriminator see the same weights of each other and step together, which lets
  gradients accumulate over micro-batches exactly (but for the balancer's norms, which are taken a
  micro-batch); EnCodec and DAC step one after the other.

Precision: spectra, losses and discriminator logits in fp32; convolutions and transformers in the
autocast dtype.
"""
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from backbone import BackboneConfig, KVCache, Transformer
from discrete import ResidualVQ
from schema import Range


@dataclass
class VAEConfig:
    """The [vae] table: what one needs to turn a waveform into latents and back.

    Table 10: music 32 kHz, 8·8·5·4, D = 128; speech 24 kHz, 6·5·4·4·4, D = 32.
    """
    # Hz
    sample_rate: Annotated[int, Range(1)] = 24000
    # audio channels
    channels: Annotated[int, Range(1)] = 1
    # D
    latent_dim: Annotated[int, Range(1)] = 32
    # upsampling factors, decoder order; their product is the hop
    ratios: list[Annotated[int, Range(1)]] = field(default_factory=lambda: [6, 5, 4, 4, 4])
    # stft: log-magnitudes replace the outermost ratios
    encoder: Literal["conv", "stft"] = "conv"
    # istft: magnitude and phase replace the outermost ratios
    decoder: Literal["conv", "istft"] = "conv"
    # samples; for stft and istft: the product of the last ratios, which the STFT replaces
    stft_hop: Annotated[int, Range(0)] = 0
    # istft: direct (Vocos), or locked (tones that hold, for encoder = stft)
    phase: Literal["direct", "locked"] = "direct"
    # n_fft in samples; 0 = 4 · stft_hop
    stft_size: Annotated[int, Range(0)] = 0
    # samples; encoder = stft: the n_fft of all spectra that it is given; [] = the stft_size.
    # A long one tells the harmonics of a tone apart, a short one its beginning
    encoder_windows: list[Annotated[int, Range(1)]] = field(default_factory=list)
    # seanet (ELU, no norm: both papers) or convnext (LayerNorm, GELU, as Vocos: learns faster)
    block: Literal["seanet", "convnext"] = "seanet"
    # transformer positions per latent (Mimi: 2, Pocket TTS: 16): the last, learned downsampling
    # comes after the encoder's transformer, the first upsampling before the decoder's
    inner: Annotated[int, Range(1)] = 1
    # how `inner` positions become one latent: conv (strided: Mimi) or cls (one learned [CLS] after
    # each patch of them, seen through the transformer: AudioCALM)
    aggregator: Literal["conv", "cls"] = "conv"
    # plain (RMSNorm), mimi (LayerNorm, layer scale 0.01, no final norm) or pocket (Mimi with the
    # tanh approximation of GELU, as in Pocket TTS)
    transformer_style: Literal["plain", "mimi", "pocket"] = "plain"
    # rvq: the discrete baseline of Tables 1 and 3
    bottleneck: Literal["gaussian", "rvq"] = "gaussian"
    # rvq: K codebooks (8 at 12.5 Hz, Table 1; 32 at 25 Hz, Table 3)
    codebooks: Annotated[int, Range(1)] = 8
    # rvq: entries of a codebook (Mimi)
    codebook_size: Annotated[int, Range(1)] = 2048
    # channels next to the waveform; doubled at each ratio
    width: Annotated[int, Range(1)] = 64
    # ... up to this
    width_max: Annotated[int, Range(1)] = 512
    # residual units per level, dilated 1, 2, 4, ...
    res_layers: Annotated[int, Range(0)] = 1
    # transformer width C
    dim: Annotated[int, Range(1)] = 512
    heads: Annotated[int, Range(1)] = 8
    # Table 10: 8 + 8 speech, 4 + 4 music
    encoder_layers: Annotated[int, Range(0)] = 8
    decoder_layers: Annotated[int, Range(0)] = 8
    # seconds that each transformer layer looks back (Table 10: 10 speech, 30 music)
    context: Annotated[float, Range(0)] = 10.0

    def __post_init__(self):
        if not self.ratios:
            raise ValueError("ratios: needs at least one whole number >= 1")
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise ValueError(
                f"heads: dim / heads must be an even whole number, got {self.dim} / {self.heads}")
        if self.encoder_windows and self.encoder != "stft":
            raise ValueError("encoder_windows: needs encoder = \"stft\"")
        if "stft" in self.encoder + self.decoder:
            self.check_stft()

    def check_stft(self):
        outer = [math.prod(self.ratios[i:]) for i in range(1, len(self.ratios))]
        if self.stft_hop not in outer:
            raise ValueError("stft_hop: must be the product of the last ratios, "
                             f"one of {outer}, got {self.stft_hop}")
        if self.n_fft < self.stft_hop:
            raise ValueError(f"stft_size: must be at least stft_hop = {self.stft_hop}, "
                             f"got {self.stft_size}")
        if self.encoder_windows and min(self.encoder_windows) < self.stft_hop:
            raise ValueError(f"encoder_windows: must be at least stft_hop = {self.stft_hop}, "
                             f"got {min(self.encoder_windows)}")

    @property
    def hop(self):
        """Samples a latent."""
        return math.prod(self.ratios) * self.inner

    @property
    def frame_rate(self):
        """Latents a second."""
        return self.sample_rate / self.hop

    @property
    def n_fft(self):
        return self.stft_size or 4 * self.stft_hop

    @property
    def codes(self):
        """rvq: levels K and entries of a codebook."""
        return self.codebooks, self.codebook_size

    def conv_ratios(self, spectral):
        """Ratios left to the convolutions, decoder order, and the channels at their wave-side end.
        """
        ratios, outer, width = list(self.ratios), 1, self.width
        while spectral and outer < self.stft_hop:
            outer *= ratios.pop()
            width *= 2
        return ratios, min(width, self.width_max)


# ---------------------------------------------------------------- causal layers
# Each takes (x, state). state = None: the whole signal, zeros before it. Otherwise a dict, one
# entry a layer, carried from chunk to chunk; chunks are whole numbers of strides (VAE.encode and
# .decode see to that).

class Conv(nn.Module):
    """Causal conv: output n sees inputs before (n + 1) · stride.

    (B, Cin, L) -> (B, Cout, L / stride).
    """

    def __init__(self, cin, cout, kernel, stride=1, dilation=1, groups=1, replicate=False):
        super().__init__()
        self.replicate = replicate         # before the signal: its first value instead of zeros
        self.past = (kernel - 1) * dilation + 1 - stride
        self.conv = nn.Conv1d(cin, cout, kernel, stride, dilation=dilation, groups=groups)

    def forward(self, x, state=None):
        if self.past == 0 or state is None and not self.replicate:      # nothing to keep or to copy
            conv, length = self.conv, x.shape[-1] // self.conv.stride[0]
            return F.conv1d(x, conv.weight, conv.bias, conv.stride, self.past, conv.dilation,
                            conv.groups)[..., :length]
        past = None if state is None else state.get(self)
        if past is None:
            past = x[..., :1] if self.replicate else x.new_zeros(*x.shape[:2], 1)
            past = past.expand(-1, -1, self.past)
        x = torch.cat([past, x], -1)
        if state is not None:
            state[self] = x[..., x.shape[-1] - self.past:]
        return self.conv(x)


class ConvTranspose(nn.Module):
    """Causal upsampling by `stride`, kernel 2 · stride: input n reaches outputs from n · stride on.

    (B, Cin, L) -> (B, Cout, L · stride). Every input gives two pieces of `stride` outputs, its own
    and one that is added to the next input's: a matrix product and an overlap-add, which is what
    we do where no gradient is asked for (decoding is 1.3 times as fast on a CPU: LOG.md).
    """

    def __init__(self, cin, cout, stride, groups=1):
        super().__init__()
        self.stride = stride
        self.conv = nn.ConvTranspose1d(cin, cout, 2 * stride, stride, groups=groups)

    def forward(self, x, state=None):
        n = x.shape[-1] * self.stride                                # y (B, Cout, (L + 1) · stride)
        y = self.conv(x) if torch.is_grad_enabled() else self.overlap_add(x)
        if state is None:
            return y[..., :n]
        if self in state:
            y = torch.cat([y[..., :self.stride] + state[self], y[..., self.stride:]], -1)
        state[self] = y[..., n:] - self.conv.bias[:, None]           # the bias counts once
        return y[..., :n]

    def overlap_add(self, x):
        w, (B, _, L) = self.conv.weight, x.shape             # (Cin, Cout / groups, 2 · stride)
        if self.conv.groups == 1:
            y = torch.bmm(w.flatten(1).mT.expand(B, -1, -1), x)      # (B, Cout · 2 · stride, L)
        else:                                                        # each channel by itself
            y = x[:, :, None] * w.mT
        own, late = y.view(B, -1, 2, self.stride, L).unbind(2)       # (B, Cout, stride, L) each
        y = F.pad(own, (0, 1))
        y[..., 1:] += late
        y += self.conv.bias[:, None, None]
        return y.mT.flatten(2)


class Elu(nn.Module):
    def forward(self, x, state=None):
        return F.elu(x)


class Gelu(nn.Module):
    def forward(self, x, state=None):
        return F.gelu(x)


class Norm(nn.Module):
    """LayerNorm over channels, (B, C, L)."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x, state=None):
        return self.norm(x.mT).mT


class Chain(nn.Sequential):
    def forward(self, x, state=None):
        for layer in self:
            x = layer(x, state)
        return x


class Residual(nn.Module):
    """x + conv1(elu(conv3(elu(x)))), hidden width half (Mimi)."""

    def __init__(self, width, dilation):
        super().__init__()
        self.body = Chain(Elu(), Conv(width, width // 2, 3, dilation=dilation),
                          Elu(), Conv(width // 2, width, 1))

    def forward(self, x, state=None):
        return x + self.body(x, state)


class ConvNeXt(nn.Module):
    """x + γ · conv1(gelu(conv1(norm(depthwise conv7(x))))), hidden width 3 times (Liu et al. 2022;
    causal, as in Vocos otherwise). γ starts at .1: a block begins close to the identity.
    """

    def __init__(self, width):
        super().__init__()
        self.body = Chain(Conv(width, width, 7, groups=width), Norm(width),
                          Conv(width, 3 * width, 1), Gelu(), Conv(3 * width, width, 1))
        self.scale = nn.Parameter(torch.full((width, 1), 0.1))

    def forward(self, x, state=None):
        return x + self.scale * self.body(x, state)


class Spectrum(nn.Module):
    """Log-magnitudes of causal frames, one spectrum a window size n_fft:

    (B, ch, L · hop) -> (B, ch · sum of (n_fft / 2 + 1), L). Frame j ends at sample (j + 1) · hop
    whatever its size.
    """

    def __init__(self, sizes, hop):
        super().__init__()
        self.sizes, self.hop, self.past = sizes, hop, max(sizes) - hop
        for n_fft in sizes:
            self.register_buffer(f"window{n_fft}", torch.hann_window(n_fft), persistent=False)

    def forward(self, x, state=None):
        past, n = None if state is None else state.get(self), x.shape[-1] - self.hop
        zeros = x.new_zeros(*x.shape[:2], self.past)
        x = torch.cat([zeros if past is None else past, x], -1)
        if state is not None:
            state[self] = x[..., x.shape[-1] - self.past:]
        x, logs = x if x.dtype == torch.float64 else x.float(), []
        for n_fft in self.sizes:
            frames = x[..., x.shape[-1] - n - n_fft:].unfold(-1, n_fft, self.hop)
            frames = frames * getattr(self, f"window{n_fft}").to(x.dtype)       # (B, ch, L, n_fft)
            log = torch.fft.rfft(frames).abs().clamp(min=1e-3).log() * 0.3 + 0.5  # about unit scale
            logs.append(log.transpose(2, 3))
        return torch.cat(logs, 2).flatten(1, 2)


class InverseSpectrum(nn.Module):
    """exp(m) · e^{i φ} per bin, inverse FFT, window, overlap-add:

    (B, ch · maps · bins, L) -> (B, ch, L · hop).

    phase = "direct": maps m, p;     φ_j = p_j                                           (Vocos)
    phase = "locked": maps m, p, δ;  φ_j = p_j + Θ_j,  Θ_jk = Θ_{j-1,l} + 2π l hop / n_fft + δ_jl,
                                     l the strongest bin of frame j among k-2 .. k+2
    A tone's phase turns by 2π f hop from frame to frame. A network that hears no phase (encoder =
    "stft") cannot follow it, but can say how far f lies from a bin's centre (δ), and the turns are
    summed up: a phase vocoder (Flanagan & Golden 1966). If each of the four or five bins under a
    tone summed for itself, their small errors would drift apart and the tone would beat or vanish;
    so the strongest lends its neighbours its phase (locking to peaks, Laroche & Dolson 1999), and
    an error is a little detuning. p_j then says how they differ from it.

    Frame j covers samples [j · hop - latency, j · hop - latency + n_fft), so a latent's frames end
    where its samples end. Offline the last `latency` samples miss frames that will never come and
    fade out.
    """
    REACH = 2                                     # bins: half of the main lobe of a Hann window

    def __init__(self, n_fft, hop, channels, phase="direct"):
        super().__init__()
        self.n_fft, self.hop, self.channels, self.latency = n_fft, hop, channels, n_fft - hop
        self.maps = 3 if phase == "locked" else 2
        window = torch.hann_window(n_fft)
        steady = F.pad(window.pow(2), (0, -n_fft % hop)).view(-1, hop).sum(0)   # overlapped energy
        self.register_buffer("window", window / steady.repeat(n_fft // hop + 1)[:n_fft],
                             persistent=False)

    def forward(self, x, state=None):
        B, L = x.shape[0], x.shape[-1]
        x = x if x.dtype == torch.float64 else x.float()
        tail, owed, turned = (None, self.latency, None) if state is None else state.get(
            self, (None, self.latency, None))
        log, phase, *rest = x.view(B, self.channels, self.maps, self.n_fft // 2 + 1, L).unbind(2)
        if rest:
            turns, turned = self.turns(log, rest[0], turned)
            phase = phase + turns
        mag = log.clamp(max=7.0).exp()                       # e^7: louder than any clip
        y = torch.fft.irfft(torch.polar(mag, phase), n=self.n_fft, dim=2)       # (B, ch, n_fft, L)
        y = (y * self.window.to(x.dtype)[:, None]).flatten(0, 1)
        n = L * self.hop
        y = F.fold(y, (1, n + self.latency), (1, self.n_fft), stride=(1, self.hop))
        y = y.view(B, self.channels, n + self.latency)
        if state is None:
            return y[..., self.latency:]
        if tail is not None:
            y = torch.cat([y[..., :self.latency] + tail, y[..., self.latency:]], -1)
        skip = min(owed, n)                                  # what lies before the signal's start
        state[self] = (y[..., n:], owed - skip, turned)
        return y[..., skip:n]

    @torch.compiler.disable                                                  # a loop over frames
    def turns(self, log, delta, before=None):
        """log, delta (B, ch, bins, L), Θ of the frame before (B, ch, bins) -> Θ of all and of the
        last one, in radians.

        A frame's δ learns from its own step only: with gradients through the sum training stalls.
        """
        K, reach = log.shape[2], self.REACH
        bins = torch.arange(K, device=log.device)
        whole = bins * self.hop % self.n_fft                                 # without whole turns
        step = delta + (whole.to(delta.dtype) * (2 * math.pi / self.n_fft))[:, None]
        near = F.pad(log.detach(), (0, 0, reach, reach), value=-math.inf)
        peak = near.unfold(2, 2 * reach + 1, 1).argmax(-1) + bins[:, None] - reach
        past = [torch.zeros_like(step[..., 0]) if before is None else before]
        with torch.no_grad():
            for each, its in zip(step.unbind(-1), peak.unbind(-1)):
                past.append((past[-1] + each).gather(2, its) % (2 * math.pi))
        return (torch.stack(past[:-1], -1) + step).gather(2, peak), past[-1]

    @torch.no_grad()
    def start(self, conv):
        """Initial bias of the layer before: quiet (e^-2.5), and phase πk, which puts a frame's
        energy in its middle.
        """
        bias = conv.bias.view(self.channels, self.maps, -1)
        bias[:, 0], bias[:, 1] = -2.5, math.pi * (torch.arange(bias.shape[-1]) % 2)
        bias[:, 2:] = 0.0

    def flush(self, state):
        """The samples still owed after the last latent."""
        tail, owed, *_ = state.pop(self)
        return tail[..., owed:]


# ---------------------------------------------------------------- encoder, decoder, VAE

def residual_units(cfg, width):
    """The residual units of one level."""
    if cfg.block == "convnext":
        return [ConvNeXt(width) for _ in range(cfg.res_layers)]
    return [Residual(width, 2 ** i) for i in range(cfg.res_layers)]


def activation(cfg, width):
    """What stands between residual units and a convolution that changes the rate."""
    return Norm(width) if cfg.block == "convnext" else Elu()


def transformer_config(cfg, layers, cls=False):
    """The BackboneConfig of the encoder's or decoder's transformer; cls: with a [CLS] per patch."""
    positions_per_second = cfg.frame_rate * (cfg.inner + int(cls))
    plain = cfg.transformer_style == "plain"
    return BackboneConfig(dim=cfg.dim, layers=layers, heads=cfg.heads,
                          mlp="gelu_tanh" if cfg.transformer_style == "pocket" else "gelu",
                          norm="rms" if plain else "layer", final_norm=plain,
                          layer_scale=0.0 if plain else 0.01,
                          window=max(1, round(cfg.context * positions_per_second)))


class Encoder(nn.Module):
    """wav (B, ch, T · hop) -> (B, T, 2 D)."""

    def __init__(self, cfg):
        super().__init__()
        ratios, width = cfg.conv_ratios(cfg.encoder == "stft")
        convnext = cfg.block == "convnext"
        if cfg.encoder == "stft":
            sizes = cfg.encoder_windows or [cfg.n_fft]
            layers = [Spectrum(sizes, cfg.stft_hop),
                      Conv(cfg.channels * sum(n // 2 + 1 for n in sizes), width, 3)]
        else:
            layers = [Conv(cfg.channels, width, 7)]
        if convnext:
            layers += [Norm(width)]
        for i in reversed(range(len(ratios))):
            last = convnext and i == 0
            wider = cfg.dim if last else min(2 * width, cfg.width_max)
            layers += [*residual_units(cfg, width), activation(cfg, width),
                       Conv(width, wider, ratios[i] * (1 if convnext else 2), stride=ratios[i])]
            width = wider
        self.conv = Chain(*layers, *([] if convnext else [Elu(), Conv(width, cfg.dim, 3)]))
        self.cls = cfg.aggregator == "cls"
        self.inner, outputs = cfg.inner, cfg.latent_dim * (2 if cfg.bottleneck == "gaussian" else 1)
        self.transformer = Transformer(transformer_config(cfg, cfg.encoder_layers, self.cls))
        if self.cls:
            self.token = nn.Parameter(0.02 * torch.randn(cfg.dim))
        strided = cfg.inner > 1 and not self.cls
        self.out = (Conv(cfg.dim, outputs, 2 * cfg.inner, stride=cfg.inner, replicate=True)
                    if strided else nn.Linear(cfg.dim, outputs))
        # begin with little posterior noise, std e^-2 = .14 (no gain measured by itself: LOG.md)
        with torch.no_grad():
            (self.out.conv if strided else self.out).bias[cfg.latent_dim:] = -4.0

    def forward(self, wav, state=None):
        x, cache = self.conv(wav, state).transpose(1, 2), None                  # (B, T · inner, C)
        if state is not None:
            cache = state.setdefault(self, KVCache())
        if self.cls:                                  # p_1 .. p_inner [CLS] p_1 .. p_inner [CLS]
            x = x.unflatten(1, (-1, self.inner))
            x = torch.cat([x, self.token.to(x.dtype).expand(x.shape[0], x.shape[1], 1, -1)], 2)
            return self.out(self.transformer(x.flatten(1, 2), cache)[:, self.inner::self.inner + 1])
        x = self.transformer(x, cache)
        if self.inner == 1:
            return self.out(x)
        return self.out(x.transpose(1, 2), state).transpose(1, 2)


class Decoder(nn.Module):
    """z (B, T, D) -> wav (B, ch, T · hop)."""

    def __init__(self, cfg):
        super().__init__()
        ratios, narrow = cfg.conv_ratios(cfg.decoder == "istft")
        widths = [min(narrow * 2 ** i, cfg.width_max) for i in range(len(ratios), -1, -1)]
        self.input = nn.Linear(cfg.latent_dim, cfg.dim)
        self.up = None
        if cfg.inner > 1:                                            # each channel by itself: Mimi
            self.up = ConvTranspose(cfg.dim, cfg.dim, cfg.inner, groups=cfg.dim)
        self.transformer = Transformer(transformer_config(cfg, cfg.decoder_layers))
        layers = [Conv(cfg.dim, widths[0], 7)]
        if cfg.block == "convnext":
            layers, widths[0] = [], cfg.dim
        for ratio, wide, width in zip(ratios, widths, widths[1:]):
            layers += [activation(cfg, wide), ConvTranspose(wide, width, ratio),
                       *residual_units(cfg, width)]
        if cfg.decoder == "istft":
            inverse = InverseSpectrum(cfg.n_fft, cfg.stft_hop, cfg.channels, cfg.phase)
            head = Conv(narrow, cfg.channels * inverse.maps * (cfg.n_fft // 2 + 1), 3)
            inverse.start(head.conv)
            layers += [activation(cfg, narrow), head, inverse]
        else:
            layers += [activation(cfg, narrow), Conv(narrow, cfg.channels, 3)]
        self.conv = Chain(*layers)
        self.latency = cfg.n_fft - cfg.stft_hop if cfg.decoder == "istft" else 0

    def forward(self, z, state=None):
        x = self.input(z)
        if self.up is not None:
            x = self.up(x.transpose(1, 2), state).transpose(1, 2)               # (B, T · inner, C)
        x = self.transformer(x, None if state is None else state.setdefault(self, KVCache()))
        return self.conv(x.transpose(1, 2), state)


class VAE(nn.Module):
    """encode, decode, and the statistics that make latents zero-mean and unit-variance for a
    language model.

    Streaming: pass one dict, empty at first, as `state` to every call of encode (or decode) for one
    signal. The pieces joined equal the offline result for any sizes of pieces.
    """

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.latency = self.decoder.latency              # samples that streaming decode lags behind
        self.quantizer = None
        if cfg.bottleneck == "rvq":
            self.quantizer = ResidualVQ(cfg.latent_dim, cfg.codebooks, cfg.codebook_size)
        self.register_buffer("latent_mean", torch.zeros(cfg.latent_dim))
        self.register_buffer("latent_std", torch.ones(cfg.latent_dim))

    def encode(self, wav, state=None):
        """wav (B, ch, S) in [-1, 1] -> mean, log-variance, each (B, T, D), T = ceil(S / hop).

        rvq: the sum of the codes, and a log-variance of -12 (next to no noise).
        Offline the end is padded with zeros to a whole frame; with a state T = whole frames so far,
        the remaining samples wait in the state.
        """
        hop = self.cfg.hop
        if state is None:
            wav = F.pad(wav, (0, -wav.shape[-1] % hop))
        else:
            wav = torch.cat([state["wait"], wav], -1) if "wait" in state else wav
            whole = wav.shape[-1] // hop * hop
            state["wait"], wav = wav[..., whole:], wav[..., :whole]
        if wav.shape[-1] == 0:
            return (wav.new_zeros(wav.shape[0], 0, self.cfg.latent_dim),) * 2
        h = self.encoder(wav, state).float()
        if self.quantizer is not None:
            return self.quantizer.decode(self.quantizer.encode(h)), torch.full_like(h, -12.0)
        mean, logvar = h.chunk(2, -1)
        return mean, logvar.clamp(-12.0, 4.0)   # std in [.0025, 7.4]: no overflow, no division by 0

    def encode_codes(self, wav):
        """rvq: wav (B, ch, S) -> codes (B, T, K), int64; denormalize(codes) is what encode gives.
        """
        wav = F.pad(wav, (0, -wav.shape[-1] % self.cfg.hop))
        return self.quantizer.encode(self.encoder(wav).float())

    def decode(self, z, state=None):
        """z (B, T, D) -> wav (B, ch, T · hop).

        With a state the first `latency` samples come late; see flush.
        """
        if z.shape[1] == 0:
            return z.new_zeros(z.shape[0], self.cfg.channels, 0)
        return self.decoder(z, state).float()

    def decode_stream(self, drawn, state=None, parallel=False):
        """drawn: an iterator of (normalised latents (B, D), anything) -> yields waveforms
        (B, ch, S), how many latents each is, and the last latent's anything.

        The first latent is decoded at once, later ones 2, then 4 together: one alone costs 1.6
        times its share of four (the weights of the transformer and of the first convolutions are
        read again at each call), eight are no cheaper. At twice real time no gap can be heard.
        parallel: decode in a thread while the next latents are drawn; worth it where a second core
        is free.
        """
        state, waiting, size, doing = {} if state is None else state, [], 1, []

        @torch.no_grad()                                    # a thread has its own grad mode
        def decode(latents):
            return self.decode(self.denormalize(torch.stack(latents, 1)), state)

        with ThreadPoolExecutor(1) as pool:
            for x, about in drawn:
                waiting.append(x)
                if len(waiting) < size:
                    continue
                ready, waiting, size = waiting, [], min(2 * size, 4)
                if not parallel:
                    yield decode(ready), len(ready), about
                    continue
                doing.append((pool.submit(decode, ready), len(ready), about))
                while doing and (doing[0][0].done() or len(doing) > 2):
                    done, *rest = doing.pop(0)
                    yield done.result(), *rest
            for done, *rest in doing:
                yield done.result(), *rest
            if waiting:
                yield decode(waiting), len(waiting), about

    def flush(self, state):
        """(B, ch, latency): the end of a signal decoded with `state`; empty for the conv decoder.
        """
        last = self.decoder.conv[-1]
        if not self.latency or last not in state:
            return torch.zeros(1, self.cfg.channels, 0)
        return last.flush(state).float()

    @torch.no_grad()
    def measure(self, wavs):
        """Set latent_mean and latent_std to those of posterior samples of wavs, (1, ch, S) each."""
        means, variances = [], []
        for wav in wavs:
            mean, logvar = self.encode(wav)
            means.append(mean[0])
            variances.append(logvar[0].exp())
        means, variances = torch.cat(means), torch.cat(variances)
        self.latent_mean.copy_(means.mean(0))
        self.latent_std.copy_(
            (means.var(0, correction=0) + variances.mean(0)).sqrt().clamp(min=1e-4))

    def normalize(self, z):
        """Latents as the language model sees them: (z - latent_mean) / latent_std."""
        return (z - self.latent_mean) / self.latent_std

    def denormalize(self, x):
        """The inverse; codes (.., K) become the sums of their entries."""
        if not x.is_floating_point():
            return self.quantizer.decode(x)
        return x * self.latent_std + self.latent_mean

    def forward(self, wav):
        """wav (B, ch, S), S a multiple of hop -> reconstruction from z, z (B, T, D), {"kl"} or
        {"commit"}; z is a posterior sample, or the sum of the codes with gradient straight through.
        """
        if self.quantizer is not None:
            z, commit = self.quantizer(self.encoder(wav).float())
            return self.decode(z), z, {"commit": commit}
        mean, logvar = self.encode(wav)
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return self.decode(z), z, {"kl": kl_loss(mean, logvar)}


def kl_loss(mean, logvar):
    """KL(N(mean, e^logvar) ‖ N(0, 1)) in nats, the mean over dimensions and positions."""
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
