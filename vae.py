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
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm

from backbone import BackboneConfig, KVCache, Transformer

LOSSES = ("time", "mel", "stft", "adv", "feat", "kl", "commit", "distill")


def default_weights():
    """EnCodec's balance of time and adversarial terms, DAC's of mel and features, CALM's KL (Table
    10).
    """
    return {"time": 0.1, "mel": 15.0, "stft": 0.0, "adv": 1.0, "feat": 2.0, "kl": 0.01}


@dataclass
class VAEConfig:
    """The [vae] table.

    Table 10: music 32 kHz, 8·8·5·4, D = 128; speech 24 kHz, 6·5·4·4·4, D = 32.
    """
    sample_rate: int = 24000        # Hz
    channels: int = 1               # audio channels
    latent_dim: int = 32            # D
    # upsampling, decoder order; product = hop
    ratios: list[int] = field(default_factory=lambda: [6, 5, 4, 4, 4])
    encoder: str = "conv"           # conv | stft: log-magnitudes replace the outermost ratios
    decoder: str = "conv"           # conv | istft: magnitude and phase replace the outermost ratios
    # samples; for stft / istft: product of the last ratios that the STFT replaces
    stft_hop: int = 0
    # istft: direct (Vocos) | locked (tones that hold, for encoder = stft)
    phase: str = "direct"
    stft_size: int = 0              # n_fft in samples; 0 = 4 · stft_hop
    # samples; encoder = stft: the n_fft of all spectra that it is given; none = the stft_size.
    # A long one tells the harmonics of a tone apart, a short one its beginning
    encoder_windows: list[int] = field(default_factory=list)
    # seanet (ELU, no norm: both papers) | convnext (LayerNorm, GELU, as Vocos: learns faster)
    block: str = "seanet"
    # transformer positions a latent (Mimi: 2, Pocket TTS: 16): the last, learned downsampling comes
    # after the encoder's transformer, the first upsampling before the decoder's
    inner: int = 1
    # how `inner` positions become one latent: conv (strided: Mimi) | cls (one learned [CLS] after
    # each patch of them, seen through the transformer: AudioCALM)
    aggregator: str = "conv"
    # plain (RMSNorm) | mimi (LayerNorm, layer scale .01, no final norm) | pocket (Mimi with the
    # tanh approximation of GELU, as in Pocket TTS)
    transformer_style: str = "plain"
    bottleneck: str = "gaussian"    # gaussian | rvq (the discrete baseline of Tables 1 and 3)
    codebooks: int = 8              # rvq: K codebooks (8 at 12.5 Hz, Table 1; 32 at 25 Hz, Table 3)
    codebook_size: int = 2048       # rvq: entries of a codebook (Mimi)
    teacher: str = ""               # distill: WavLM, a folder or a name on the Hugging Face hub
    width: int = 64                 # channels next to the waveform; doubled at each ratio
    width_max: int = 512            # ... up to this
    res_layers: int = 1             # residual units a level, dilated 1, 2, 4, ...
    dim: int = 512                  # transformer width C
    heads: int = 8
    encoder_layers: int = 8         # Table 10: 8 + 8 speech, 4 + 4 music
    decoder_layers: int = 8
    # seconds that each transformer layer looks back (Table 10: 10 speech, 30 music)
    context: float = 10.0
    # eq. 2; 0 = not computed
    loss_weights: dict[str, float] = field(default_factory=default_weights)
    # samples
    loss_windows: list[int] = field(default_factory=lambda: [2048, 1024, 512, 256, 128, 64, 32])
    # amplitude below which spectra count as silent (DAC); 1e-3 = -60 dB learns faster
    loss_floor: float = 1e-5
    # windows drawn each step; 0 = all (fewer is faster: the STFTs are 40 % of a step)
    loss_scales: int = 0
    # samples (EnCodec)
    disc_windows: list[int] = field(default_factory=lambda: [2048, 1024, 512, 256, 128])
    disc_width: int = 32            # channels of the discriminators
    # seconds of each crop, drawn anew each step, that the discriminators hear; 0 = all of it. They
    # cost most of a step, and a short part makes more steps of the same time (HiFi-GAN: .37)
    disc_seconds: float = 0.0
    disc_start: int = 0             # step at which the discriminators begin to learn
    # steps that they learn alone before the generator hears them: one that has learnt nothing yet
    # only shakes a decoder that is already good
    disc_warmup: int = 0
    # 1 = the discriminators see X as it is (EnCodec); .3: |X|^.3 with X's phase, at equal loudness,
    # so that detail 40 dB below the peaks counts. Learns sooner, but needs the balancer (LOG.md)
    disc_power: float = 1.0
    # 0 = the losses are added with their weights; else the balancer with this decay (EnCodec .999):
    # weights of time, mel, stft, adv and feat become shares of a gradient of norm 1, beside which
    # those of kl, commit and distill are to be chosen anew
    balance: float = 0.0

    def __post_init__(self):
        for name, valid in (("encoder", ("conv", "stft")), ("decoder", ("conv", "istft")),
                            ("phase", ("direct", "locked")), ("block", ("seanet", "convnext")),
                            ("aggregator", ("conv", "cls")),
                            ("transformer_style", ("plain", "mimi", "pocket")),
                            ("bottleneck", ("gaussian", "rvq"))):
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"{name}: unknown '{getattr(self, name)}'; valid: {', '.join(valid)}")
        if not self.ratios or min(self.ratios) < 1:
            raise ValueError("ratios: needs at least one whole number >= 1")
        for name in ("sample_rate", "channels", "latent_dim", "width", "dim", "heads", "width_max",
                     "disc_width", "inner", "codebooks", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("encoder_layers", "decoder_layers", "stft_hop", "stft_size", "res_layers",
                     "context", "loss_floor", "loss_scales", "disc_seconds", "disc_start",
                     "disc_warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        for name in ("loss_windows", "disc_windows"):
            if min(getattr(self, name), default=0) < 8:
                raise ValueError(f"{name}: needs windows of at least 8 samples, "
                                 f"got {getattr(self, name)}")
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise ValueError(
                f"heads: dim / heads must be an even whole number, got {self.dim} / {self.heads}")
        if self.disc_seconds and self.disc_seconds * self.sample_rate < max(self.disc_windows):
            raise ValueError("disc_seconds: must hold the longest of disc_windows, "
                             f"{max(self.disc_windows) / self.sample_rate:.3f} s, "
                             f"got {self.disc_seconds}")
        if not 0 < self.disc_power <= 1:
            raise ValueError(f"disc_power: must be above 0 and at most 1, got {self.disc_power}")
        if not 0 <= self.balance < 1:
            raise ValueError(f"balance: must be from 0 to below 1, got {self.balance}")
        if self.disc_power < 1 and not any(self.loss_weights.get(name, 0) > 0
                                           for name in ("time", "mel", "stft")):
            raise ValueError("disc_power: below 1 no discriminator hears the level; it needs a "
                             "time, mel or stft loss that does")
        unknown = set(self.loss_weights) - set(LOSSES)
        if unknown:
            raise ValueError(f"loss_weights: unknown '{min(unknown)}'; valid: {', '.join(LOSSES)}")
        if not all(weight >= 0 for weight in self.loss_weights.values()):
            raise ValueError(f"loss_weights: must not be negative, got {self.loss_weights}")
        if self.loss_weights.get("distill", 0) > 0 and not self.teacher:
            raise ValueError("teacher: loss_weights.distill needs one, "
                             "e.g. \"microsoft/wavlm-large\" or a folder")
        if self.encoder_windows and self.encoder != "stft":
            raise ValueError("encoder_windows: needs encoder = \"stft\"")
        if "stft" in self.encoder + self.decoder:
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

    def units(self, width):
        """The residual units of one level."""
        if self.block == "convnext":
            return [ConvNeXt(width) for _ in range(self.res_layers)]
        return [Residual(width, 2 ** i) for i in range(self.res_layers)]

    def between(self, width):
        """What stands between the residual units and a convolution that changes the rate."""
        return Norm(width) if self.block == "convnext" else Elu()

    def transformer(self, layers, cls=False):
        rate = self.frame_rate * (self.inner + int(cls))                  # positions a second
        plain = self.transformer_style == "plain"
        return BackboneConfig(dim=self.dim, layers=layers, heads=self.heads,
                              mlp="gelu_tanh" if self.transformer_style == "pocket" else "gelu",
                              norm="rms" if plain else "layer", final_norm=plain,
                              layer_scale=0.0 if plain else 0.01,
                              window=max(1, round(self.context * rate)))


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


# ---------------------------------------------------------------- the discrete baseline

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


# ---------------------------------------------------------------- encoder, decoder, VAE

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
            layers += [*cfg.units(width), cfg.between(width),
                       Conv(width, wider, ratios[i] * (1 if convnext else 2), stride=ratios[i])]
            width = wider
        self.conv = Chain(*layers, *([] if convnext else [Elu(), Conv(width, cfg.dim, 3)]))
        self.cls = cfg.aggregator == "cls"
        self.inner, outputs = cfg.inner, cfg.latent_dim * (2 if cfg.bottleneck == "gaussian" else 1)
        self.transformer = Transformer(cfg.transformer(cfg.encoder_layers, self.cls))
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
        self.transformer = Transformer(cfg.transformer(cfg.decoder_layers))
        layers = [Conv(cfg.dim, widths[0], 7)]
        if cfg.block == "convnext":
            layers, widths[0] = [], cfg.dim
        for ratio, wide, width in zip(ratios, widths, widths[1:]):
            layers += [cfg.between(wide), ConvTranspose(wide, width, ratio), *cfg.units(width)]
        if cfg.decoder == "istft":
            inverse = InverseSpectrum(cfg.n_fft, cfg.stft_hop, cfg.channels, cfg.phase)
            head = Conv(narrow, cfg.channels * inverse.maps * (cfg.n_fft // 2 + 1), 3)
            inverse.start(head.conv)
            layers += [cfg.between(narrow), head, inverse]
        else:
            layers += [cfg.between(narrow), Conv(narrow, cfg.channels, 3)]
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


# ---------------------------------------------------------------- losses

def stft(x, n_fft):
    """(B, S) -> complex (B, n_fft / 2 + 1, frames), hop n_fft / 4, fp32."""
    window = torch.hann_window(n_fft, device=x.device)
    return torch.stft(x.float(), n_fft, n_fft // 4, window=window, return_complex=True)


@cache
def mel_filters(sample_rate, n_fft, n_mels, device=None):
    """Triangles on the mel scale m = 2595 log10(1 + f / 700): (n_mels, n_fft / 2 + 1), each summing
    to about 1.
    """
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, n_mels + 2, device=device) / 2595) - 1)     # Hz
    freq = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, device=device)
    up = (freq - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - freq) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(up, down).clamp(min=0)
    return filters / filters.sum(1, keepdim=True).clamp(min=1e-3)


def kl_loss(mean, logvar):
    """KL(N(mean, e^logvar) ‖ N(0, 1)) in nats, the mean over dimensions and positions."""
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()


def spectral_losses(x, y, cfg, windows, names):
    """Sums over windows / number of windows. x, y (B, ch, S): original, reconstruction.

    mel:  mean |log10 mel(x) - log10 mel(y)|, floor loss_floor, 5 n_fft / 32 bands
          (DAC: 5 at 32 .. 320 at 2048)
    stft: ‖X - Y‖ / ‖X‖ (spectral convergence) + mean |log |X| - log |Y||
          (Yamamoto et al. 2020), same floor
    The floor is added, not clamped to: silence that should not be silent keeps a gradient.
    Spectra are divided by sqrt(n_fft): white noise of amplitude a has magnitudes of about .6 a.
    """
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    out, floor = dict.fromkeys(names, 0.0), cfg.loss_floor
    for n_fft in windows:
        X, Y = (stft(w, n_fft).abs() / math.sqrt(n_fft) for w in (x, y))
        if "mel" in out:
            filters = mel_filters(cfg.sample_rate, n_fft, max(5, 5 * n_fft // 32), x.device)
            mels = [(filters @ s + floor).log10() for s in (X, Y)]
            out["mel"] = out["mel"] + (mels[0] - mels[1]).abs().mean()
        if "stft" in out:
            norm = X.pow(2).sum((1, 2)).clamp(min=X[0].numel() * floor ** 2)
            convergence = ((X - Y).pow(2).sum((1, 2)) / norm).clamp(min=1e-8).sqrt().mean()
            logs = ((X + floor).log() - (Y + floor).log()).abs().mean()
            out["stft"] = out["stft"] + convergence + logs
    return {name: value / len(windows) for name, value in out.items()}


class Teacher:
    """A frozen WavLM: wav (B, ch, S) -> its last hidden states, averaged to T frames, (B, T, dim).

    Needs the `hf` extra. `teacher` is a folder saved by transformers or a name on the hub; audio is
    brought to 16 kHz by cutting or extending its spectrum, and to zero mean and unit variance where
    the model's feature extractor says so. WavLM's 50 frames a second become T by averaging over
    equal spans (Mimi averages too). Which layer is not given in CALM; the last is Mimi's choice.
    """
    rate = 16000

    def __init__(self, cfg):
        try:
            from transformers import AutoFeatureExtractor, WavLMModel
        except ImportError:
            raise ValueError("teacher: needs the hf extra: pip install -e .[hf]") from None
        try:
            self.model = WavLMModel.from_pretrained(cfg.teacher).eval().requires_grad_(False)
            self.normalize = AutoFeatureExtractor.from_pretrained(cfg.teacher).do_normalize
        except OSError as e:
            raise ValueError(f"teacher: {cfg.teacher} cannot be loaded "
                             f"({str(e).splitlines()[0]})") from None
        self.cfg, self.dim = cfg, self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, wav, frames):
        self.model.to(wav.device)
        with torch.autocast(wav.device.type, enabled=False):
            x = wav.float().mean(1)                                             # (B, S)
            n = round(x.shape[1] * self.rate / self.cfg.sample_rate)
            spectrum = torch.fft.rfft(x)
            if n < x.shape[1]:
                spectrum = spectrum[:, :n // 2 + 1]
            x = torch.fft.irfft(spectrum, n=n) * (n / x.shape[1])              # zeros fill the rest
            if self.normalize:
                x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-7).sqrt()
            # a frame sees 400 samples, every 320: 40 zeros on both sides give S / 320 frames
            features = self.model(F.pad(x, (40, 40))).last_hidden_state
            return F.adaptive_avg_pool1d(features.transpose(1, 2), frames).transpose(1, 2)


class STFTDiscriminator(nn.Module):
    """Real and imaginary STFT as an image -> logits; 2-d convs dilated in time, strided in
    frequency (EnCodec).

    power < 1: the clip is brought to RMS 1 and X becomes X (|X|² + 1e-6)^((power - 1) / 2), which
    is ours: a spectrum spans 60 dB, and with X itself only its loudest partials reach the logits.
    """

    def __init__(self, n_fft, channels, width, power=1.0):
        super().__init__()
        self.n_fft, self.power = n_fft, power
        conv = lambda cin, cout, kernel, **options: weight_norm(nn.Conv2d(
            cin, cout, kernel,
            padding=tuple((k - 1) * d // 2
                          for k, d in zip(kernel, options.get("dilation", (1, 1)))),
            **options))
        self.convs = nn.ModuleList(
            [conv(2 * channels, width, (3, 9))]
            + [conv(width, width, (3, 9), stride=(1, 2), dilation=(d, 1)) for d in (1, 2, 4)]
            + [conv(width, width, (3, 3))])
        self.logits = conv(width, 1, (3, 3))

    def forward(self, wav):
        B, ch, _ = wav.shape
        if self.power < 1:
            wav = wav / wav.float().pow(2).mean((1, 2), keepdim=True).clamp(min=1e-6).sqrt()
        s = stft(wav.flatten(0, 1), self.n_fft) / math.sqrt(self.n_fft)     # (B ch, bins, frames)
        if self.power < 1:
            s = s * (torch.view_as_real(s).pow(2).sum(-1) + 1e-6) ** ((self.power - 1) / 2)
        x = torch.view_as_real(s).permute(0, 3, 2, 1).reshape(B, 2 * ch, s.shape[2], s.shape[1])
        x, features = x.contiguous(memory_format=torch.channels_last), []   # faster in bf16
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            features.append(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.logits(x.float()), features


class Discriminators(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.each = nn.ModuleList(
            STFTDiscriminator(n, cfg.channels, cfg.disc_width, cfg.disc_power)
            for n in cfg.disc_windows)

    def forward(self, wav):
        """wav (B, ch, S) -> [(logits, features) for each scale]"""
        return [d(wav) for d in self.each]


class Balancer(nn.Module):
    """Gradients of several losses on one output, each with a fixed share (EnCodec section 3.4,
    with its R = 1).

    g = Σ_i  λ_i / Σ_j λ_j · g_i / <‖g_i‖>,   g_i = B ∂ loss_i / ∂ output: of each row's own loss

    ‖g_i‖ is the mean over rows, <·> its running mean over micro-batches (and processes). However
    large a loss happens to be, it pulls with its weight, j being the losses of this step (adv and
    feat may have to wait). A row of g has a norm of about 1, or less where losses disagree; the
    gradient is g / B, that of a mean over rows. EnCodec leaves out both B.
    """

    def __init__(self, names, decay):
        super().__init__()
        self.names, self.decay = names, decay
        self.register_buffer("norms", torch.zeros(len(names)))      # sums of decay^age ‖g‖
        self.register_buffer("seen", torch.zeros(len(names)))       # sums of decay^age

    def forward(self, terms, weights, output):
        """terms {name: scalar}, means over rows; output (B, ..) -> scalar 0 with gradient g / B.
        """
        total, g = sum(weights[name] for name in terms), 0.0
        for name, term in terms.items():
            with torch.autocast(output.device.type, enabled=False):
                one, = torch.autograd.grad(term, output, retain_graph=True)             # g_i / B
            norm = one.flatten(1).norm(dim=1).mean() * len(one)
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(norm)
                norm = norm / torch.distributed.get_world_size()
            i = self.names.index(name)
            if norm.isfinite():
                self.norms[i] = self.decay * self.norms[i] + norm
                self.seen[i] = self.decay * self.seen[i] + 1
            mean = self.norms[i] / self.seen[i].clamp(min=1e-12)
            g = g + weights[name] / total * one / mean.clamp(min=1e-12)
        pull = (output * g).sum()
        return pull - pull.detach()


class VAEGAN(nn.Module):
    """The VAE, its discriminators, and eq. 2.

    loss_weights of 0 are not computed; no discriminators without adv, feat.
    """

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg, self.vae = cfg, VAE(cfg)
        self.weights = {name: w for name, w in cfg.loss_weights.items() if w > 0}
        self.disc = Discriminators(cfg) if self.weights.keys() & {"adv", "feat"} else None
        audible = [name for name in ("time", "mel", "stft", "adv", "feat") if name in self.weights]
        self.balancer = Balancer(audible, cfg.balance) if cfg.balance else None
        if "distill" in self.weights:
            self.teacher = [Teacher(cfg)]                    # in a list: neither trained nor saved
            self.to_teacher = nn.Linear(cfg.latent_dim, self.teacher[0].dim)

    def losses(self, wav, step):
        """wav (B, ch, S) -> yields (optimizer name, loss, metrics): first "vae", then "disc" if it
        plays.

        adv:  generator -mean D(x̂);
              discriminator mean relu(1 - D(x)) + mean relu(1 + D(x̂))            (hinge)
        distill: 1 - cos(linear(z_t), WavLM_t), averaged over latents (CALM 5.1, after Mimi); we
              take z as sampled, since the paper does not say
        feat: mean |D_l(x) - D_l(x̂)| / mean |D_l(x)| over layers and scales           (EnCodec)
        """
        cfg = self.cfg
        rec, z, terms = self.vae(wav)
        terms = {name: value for name, value in terms.items() if name in self.weights}
        if "time" in self.weights:
            terms["time"] = (wav - rec).abs().mean()
        if "distill" in self.weights:
            target, = self.teacher
            told = self.to_teacher(z)
            terms["distill"] = 1 - F.cosine_similarity(told, target(wav, z.shape[1]), dim=-1).mean()
        spectral = [name for name in ("mel", "stft") if name in self.weights]
        if spectral:
            windows = cfg.loss_windows
            if cfg.loss_scales:
                windows = [windows[i]
                           for i in torch.randperm(len(windows))[:cfg.loss_scales].tolist()]
            with torch.autocast(wav.device.type, enabled=False):
                terms |= spectral_losses(wav, rec, cfg, windows, spectral)
        playing = self.disc is not None and step >= cfg.disc_start
        heard = slice(None)
        if playing and cfg.disc_seconds:
            length = min(round(cfg.disc_seconds * cfg.sample_rate), wav.shape[-1])
            start = torch.randint(wav.shape[-1] - length + 1, ()).item()
            heard = slice(start, start + length)
        if playing and step >= cfg.disc_start + cfg.disc_warmup:
            self.disc.requires_grad_(False)                  # gradients pass through it, none stay
            with torch.no_grad():
                real = self.disc(wav[..., heard])
            fake = self.disc(rec[..., heard])
            if "adv" in self.weights:
                terms["adv"] = -sum(logits.mean() for logits, _ in fake) / len(fake)
            if "feat" in self.weights:
                pairs = [(r, f) for (_, rs), (_, fs) in zip(real, fake) for r, f in zip(rs, fs)]
                terms["feat"] = sum((r - f).float().abs().mean()
                                    / r.float().abs().mean().clamp(min=1e-4)
                                    for r, f in pairs) / len(pairs)
            self.disc.requires_grad_(True)
            real = fake = pairs = None
        weigh = lambda some: sum((self.weights[name] * value for name, value in some.items()),
                                 rec.new_zeros(()))
        on_wav = {name: value for name, value in terms.items()
                  if self.balancer is not None and name in self.balancer.names}
        total = weigh({name: value for name, value in terms.items() if name not in on_wav})
        if on_wav:
            total = total + weigh(on_wav).detach() + self.balancer(on_wav, self.weights, rec)
        terms = {name: value.detach() for name, value in terms.items()}       # lets the graphs go
        on_wav = None
        if total.requires_grad:                          # nothing to learn from before adv plays
            yield "vae", total, terms
        if playing:
            real, fake = self.disc(wav[..., heard]), self.disc(rec[..., heard].detach())
            loss = sum(F.relu(1 - r).mean() + F.relu(1 + f).mean()
                       for (r, _), (f, _) in zip(real, fake)) / len(real)
            yield "disc", loss, {"disc": loss.detach()}
