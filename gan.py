"""What trains the VAE: eq. 2 of CALM, term by term.

    L = λ_t L_t  +  λ_f L_f  +  λ_adv L_adv  +  λ_feat L_feat  +  λ_KL L_KL                  (eq. 2)
        + λ_distill L_distill       (speech, CALM 5.1)         + λ_commit L_commit       (rvq)

    x (B, ch, S) ─────► VAE ─────► x̂ (B, ch, S)       z (B, T, D), from the encoder
     │                             │                    │
     │                             │                    ├─► posterior ──────────────► L_KL
     ├─────────────────────────────│────────────────────┴─► W z, WavLM(x) ──────────► L_distill
     ├─────────────────────────────┼────────► waveforms ────────────────────────────► L_t
     ├─────────────────────────────┼────────► log-mel, STFT magnitudes ─────────────► L_f
     │              magnitudes that the inverse STFT was asked for ("magnitude") ───► L_f
    │              phases that it was asked for ("phase") ─────────────────────────► L_f
     ▼ random crop                 ▼ same crop
    ┌─────────────────────────────────────┐
    │ discriminators, one per STFT size,  ├─► features of x and x̂ ──────────────────► L_feat
    │ on its real and imaginary parts     ├─► logits of x̂ ──────────────────────────► L_adv
    └─────────────────────────────────────┴─► logits of x and of x̂ (detached) ──────► hinge loss
                                                             (trains the discriminators)

CALM trains its music VAE with all terms but L_distill, its speech VAE with L_distill but without
L_t and L_f: they make music better and speech worse (section 4.1, Table 10).

Sources: CALM (arXiv 2509.06926) section 4.1, eq. 2, Table 10; discriminators, hinge losses and the
balancer: EnCodec (Défossez et al. 2022) section 3.4; multi-scale log-mel loss: DAC (Kumar et al.
2023); distillation: Mimi (Défossez et al. 2024).
Where this differs from the paper:
- disc_power < 1 (discriminators on compressed spectra of equal loudness) is ours: from EnCodec's
  linear spectra they learn little in a few hundred steps (LOG.md).
- "magnitude" is ours: it compares the spectrum that the decoder asks its inverse STFT for, before
  frames with their phases overlap and blur it.
- "phase" is APNet's (Ai & Ling 2023), of a vocoder: a mel loss does not hear the phase.
- λ_t, λ_f, λ_adv, λ_feat are not given; [gan.loss_weights] exposes them.
- Generator and discriminators step together, each with the other's weights from before the step.
  Gradients then accumulate exactly over micro-batches (except for the balancer's norms, which are
  taken per micro-batch). EnCodec and DAC step one after the other.

Precision: spectra, losses and discriminator logits in fp32; convolutions in the autocast dtype.
"""
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.nn.utils.parametrizations import weight_norm

from noise import shared
from processes import add_up, world
from schema import Range
from vae import VAE, VAEConfig

Loss = Literal["time", "mel", "stft", "magnitude", "phase", "adv", "feat", "kl", "commit",
               "distill"]


def default_weights():
    """The weights of the CPU configs, which train without discriminators; KL: CALM, Table 10."""
    return {"mel": 5.0, "kl": 0.01}


@dataclass
class GANConfig:
    """The [gan] table: what only the training of the VAE needs."""
    # λ of each term of eq. 2 (time = λ_t; mel, stft, magnitude, phase = λ_f); 0 = not computed
    loss_weights: dict[Loss, Annotated[float, Range(0)]] = field(default_factory=default_weights)
    # n_fft in samples of each spectral loss (DAC)
    loss_windows: list[Annotated[int, Range(8, 1_000_000)]] = field(
        default_factory=lambda: [2048, 1024, 512, 256])
    # amplitude below which spectra count as silent (DAC: 1e-5); 1e-3 = -60 dB learns faster
    loss_floor: Annotated[float, Range(0)] = 1e-3
    # how many of loss_windows each step uses, at random; 0 = all (fewer is faster: the STFTs take
    # 40 % of a step)
    loss_scales: Annotated[int, Range(0, 20)] = 2
    # distill: WavLM, a folder or a name on the Hugging Face hub
    teacher: str = ""
    # n_fft in samples of each discriminator (EnCodec)
    disc_windows: list[Annotated[int, Range(8, 1_000_000)]] = field(
        default_factory=lambda: [2048, 1024, 512, 256, 128])
    # channels of the discriminators (EnCodec: 32)
    disc_width: Annotated[int, Range(1, 10_000)] = 32
    # seconds of the random crop that the discriminators see at each step; 0 = everything. They cost
    # most of a step, so a short crop gives more steps in the same time (HiFi-GAN: 0.37)
    disc_seconds: Annotated[float, Range(0, 3600)] = 0.0
    # step at which the discriminators begin to learn
    disc_start: Annotated[int, Range(0, 1_000_000_000)] = 0
    # steps for which they learn alone, before adv and feat: an untrained discriminator only
    # disturbs a decoder that is already good
    disc_warmup: Annotated[int, Range(0, 1_000_000_000)] = 0
    # 1 = the discriminators see the spectrum X (EnCodec); 0.3 = |X|^0.3 with the phase of X, at
    # equal loudness, so that detail 40 dB below the peaks counts: learns sooner, but needs the
    # balancer (LOG.md)
    disc_power: Annotated[float, Range(above=0, high=1)] = 1.0
    # decay of the balancer (EnCodec: 0.999); 0 = off, losses are added with their weights. With it
    # the weights of time, mel, stft, adv and feat are shares of a gradient of norm 1, while kl,
    # commit and distill stay plain weights and must be retuned
    balance: Annotated[float, Range(0, below=1)] = 0.0

    def __post_init__(self):
        positive = {name for name, weight in self.loss_weights.items() if weight > 0}
        for name in ("loss_windows", "disc_windows"):
            if not getattr(self, name):
                raise ValueError(f"{name}: needs windows of at least 8 samples, got []")
        if self.disc_power < 1 and not positive & {"time", "mel", "stft"}:
            raise ValueError("disc_power: below 1 the discriminators ignore the level; needs a "
                             "weight above 0 for time, mel or stft in loss_weights")
        if "distill" in positive and not self.teacher:
            raise ValueError("teacher: loss_weights.distill needs one, "
                             "e.g. \"microsoft/wavlm-large\" or a folder")


# ---------------------------------------------------------------- L_f, spectral losses

def stft(x, n_fft):
    """(B, S) -> complex (B, n_fft / 2 + 1, frames), hop n_fft / 4, fp32."""
    window = torch.hann_window(n_fft, device=x.device)
    return torch.stft(x.float(), n_fft, n_fft // 4, window=window, return_complex=True)


@cache
def mel_filters(sample_rate, n_fft, n_mels, device=None):
    """Triangular filters (n_mels, n_fft / 2 + 1), each with a sum of about 1.

    Equally spaced on the mel scale m = 2595 log10(1 + f / 700).
    """
    highest = 2595 * math.log10(1 + sample_rate / 2 / 700)
    mels = torch.linspace(0, highest, n_mels + 2, device=device)
    edges = 700 * (10 ** (mels / 2595) - 1)                                             # Hz
    frequency = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, device=device)       # Hz

    rising = (frequency - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequency) / (edges[2:] - edges[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp(min=0)
    return filters / filters.sum(1, keepdim=True).clamp(min=1e-3)


def spectral_losses(x, y, sample_rate, windows, names, floor=1e-5):
    """The losses in `names` between magnitude spectra, each averaged over windows.

    x, y (B, ch, S): original, reconstruction; X, Y: |STFT| / sqrt(n_fft), so that white noise of
    amplitude a has magnitudes of about 0.6 a.
    mel:  mean |log10 mel(X) - log10 mel(Y)|, 5 n_fft / 32 bands (DAC: 5 at 32, 320 at 2048)
    stft: magnitude_loss(X, Y)
    The floor is added, not clamped to: a gradient remains where silence should not be silent.
    """
    x = x.flatten(0, 1)
    y = y.flatten(0, 1)
    sums = dict.fromkeys(names, 0.0)
    for n_fft in windows:
        X = stft(x, n_fft).abs() / math.sqrt(n_fft)                     # (B · ch, bins, frames)
        Y = stft(y, n_fft).abs() / math.sqrt(n_fft)

        if "mel" in sums:
            filters = mel_filters(sample_rate, n_fft, max(5, 5 * n_fft // 32), x.device)
            mel_x = (filters @ X + floor).log10()                       # (B · ch, bands, frames)
            mel_y = (filters @ Y + floor).log10()
            sums["mel"] = sums["mel"] + (mel_x - mel_y).abs().mean()

        if "stft" in sums:
            sums["stft"] = sums["stft"] + magnitude_loss(X, Y, floor)
    return {name: value / len(windows) for name, value in sums.items()}


def magnitude_loss(X, Y, floor):
    """‖X - Y‖ / ‖X‖ (spectral convergence) + mean |log X - log Y| (Yamamoto et al. 2020) of
    magnitudes (B, bins, frames).
    """
    # silence: at least the floor's energy; 1e-8 keeps the gradient of sqrt finite
    energy = X.pow(2).sum((1, 2)).clamp(min=X[0].numel() * floor ** 2)
    convergence = ((X - Y).pow(2).sum((1, 2)) / energy).clamp(min=1e-8).sqrt().mean()
    logs = ((X + floor).log() - (Y + floor).log()).abs().mean()
    return convergence + logs


def phase_loss(X, p, floor):
    """How far the phases p (B, bins, frames) are from those of the complex spectra X (B, bins,
    frames), in radians: the anti-wrapping losses of APNet (Ai & Ling 2023, arXiv 2305.07952).

    e = angle(X) - p,    f(e) = |e - 2π round(e / 2π)|

    L = mean f(e)  +  mean f(difference of e along bins)  +  mean f(difference of e along frames)
        the phase     its group delay                       its instantaneous frequency

    Random phases have π/2 in each mean. The means are weighted by |X| / (|X| + floor), the smaller
    |X| of a difference (ours: a bin of silence has no phase); APNet's are plain.
    """
    magnitude = X.abs()
    weight = magnitude / (magnitude + floor)
    error = X.angle() - p

    def unwrapped(e, weight):
        e = (e - 2 * math.pi * (e / (2 * math.pi)).round()).abs()
        return (weight * e).sum() / weight.sum().clamp(min=1e-8)

    loss = unwrapped(error, weight)
    for axis in (1, 2):
        length = error.shape[axis] - 1
        both = torch.minimum(weight.narrow(axis, 0, length), weight.narrow(axis, 1, length))
        loss = loss + unwrapped(error.diff(dim=axis), both)
    return loss


class Teacher:
    """A frozen WavLM: wav (B, ch, S) -> its last hidden states, averaged to T frames, (B, T, dim).

    Needs the `hf` extra. `teacher` is a folder saved by transformers or a name on the hub. WavLM's
    50 frames per second become T by averaging over equal spans, as in Mimi. CALM does not give the
    layer; the last one is Mimi's choice.
    """
    SAMPLE_RATE = 16000

    def __init__(self, teacher, sample_rate):
        try:
            from transformers import AutoFeatureExtractor, WavLMModel
        except ImportError:
            raise ValueError("teacher: needs the hf extra: pip install -e .[hf]") from None
        try:
            self.model = WavLMModel.from_pretrained(teacher).eval().requires_grad_(False)
            self.normalize = AutoFeatureExtractor.from_pretrained(teacher).do_normalize
        except OSError as e:
            raise ValueError(f"teacher: {teacher} cannot be loaded "
                             f"({str(e).splitlines()[0]})") from None
        self.input_rate = sample_rate
        self.dim = self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, wav, frames):
        self.model.to(wav.device)
        with torch.autocast(wav.device.type, enabled=False):
            x = self.resample(wav.float().mean(1))                              # (B, S) at 16 kHz
            if self.normalize:
                x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-7).sqrt()

            # a frame covers 400 samples, every 320: 40 zeros on both sides give S / 320 frames
            features = self.model(F.pad(x, (40, 40))).last_hidden_state         # (B, S / 320, dim)
            return F.adaptive_avg_pool1d(features.mT, frames).mT                # (B, T, dim)

    def resample(self, x):
        """(B, S) -> 16 kHz, by truncating or zero-padding the spectrum."""
        n = round(x.shape[1] * self.SAMPLE_RATE / self.input_rate)
        spectrum = torch.fft.rfft(x)
        if n < x.shape[1]:
            spectrum = spectrum[:, :n // 2 + 1]
        return torch.fft.irfft(spectrum, n=n) * (n / x.shape[1])


# ---------------------------------------------------------------- L_adv, L_feat, the discriminators

def same_conv(cin, cout, kernel, stride=(1, 1), dilation=(1, 1)):
    """Weight-normalised 2-d convolution with padding that keeps the size at stride 1."""
    padding = tuple((k - 1) * d // 2 for k, d in zip(kernel, dilation))
    return weight_norm(nn.Conv2d(cin, cout, kernel, stride, padding, dilation))


class STFTDiscriminator(nn.Module):
    """wav (B, ch, S) -> logits (B, 1, frames, bins / 8), features of each convolution (EnCodec).

    The real and imaginary parts of the STFT are an image; 2-d convolutions are dilated in time and
    strided in frequency.

    power < 1 is ours: the wav is scaled to RMS 1, and X becomes X (|X|² + 1e-6)^((power - 1) / 2).
    A spectrum spans 60 dB, and with X unchanged only its loudest partials affect the logits.
    """

    def __init__(self, n_fft, channels, width, power=1.0):
        super().__init__()
        self.n_fft = n_fft
        self.power = power
        self.convs = nn.ModuleList([
            same_conv(2 * channels, width, (3, 9)),
            same_conv(width, width, (3, 9), stride=(1, 2), dilation=(1, 1)),
            same_conv(width, width, (3, 9), stride=(1, 2), dilation=(2, 1)),
            same_conv(width, width, (3, 9), stride=(1, 2), dilation=(4, 1)),
            same_conv(width, width, (3, 3))])
        self.logits = same_conv(width, 1, (3, 3))

    def forward(self, wav):
        channels = wav.shape[1]
        if self.power < 1:
            wav = wav / wav.float().pow(2).mean((1, 2), keepdim=True).clamp(min=1e-6).sqrt()

        # spectrum, compressed in magnitude
        X = stft(wav.flatten(0, 1), self.n_fft) / math.sqrt(self.n_fft)     # (B · ch, bins, frames)
        if self.power < 1:
            energy = torch.view_as_real(X).pow(2).sum(-1)
            X = X * (energy + 1e-6) ** ((self.power - 1) / 2)

        # as an image; channels_last is faster in bf16
        x = rearrange(torch.view_as_real(X), "(b ch) bins frames ri -> b (ch ri) frames bins",
                      ch=channels)
        x = x.contiguous(memory_format=torch.channels_last)

        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            features.append(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.logits(x.float()), features


class Discriminators(nn.Module):
    """wav (B, ch, S) -> [(logits, features) of each STFT size]."""

    def __init__(self, cfg, channels):
        super().__init__()
        self.each = nn.ModuleList(
            STFTDiscriminator(n_fft, channels, cfg.disc_width, cfg.disc_power)
            for n_fft in cfg.disc_windows)

    def forward(self, wav):
        return [discriminator(wav) for discriminator in self.each]


def feature_loss(real, fake):
    """L_feat: mean |D_l(x) - D_l(x̂)| / mean |D_l(x)|, mean over layers l and scales (EnCodec).

    real, fake: outputs of Discriminators for x and x̂.
    """
    differences = []
    sizes = []
    for (_, real_features), (_, fake_features) in zip(real, fake):
        for r, f in zip(real_features, fake_features):
            r = r.detach()                              # the target
            differences.append((r - f).float().abs().mean())
            sizes.append(r.float().abs().mean())

    # the sizes are those of all processes' rows
    sizes = add_up(torch.stack(sizes)) / world()                                # (layers,)
    return (torch.stack(differences) / sizes.clamp(min=1e-4)).mean()


def hinge_loss(real, fake):
    """mean relu(1 - D(x)) + mean relu(1 + D(x̂)), mean over scales: trains the discriminators."""
    losses = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for (r, _), (f, _) in zip(real, fake)]
    return sum(losses) / len(losses)


# ---------------------------------------------------------------- eq. 2

class Balancer(nn.Module):
    """Gives each of several losses on one output a fixed share of its gradient (EnCodec section
    3.4, with its R = 1).

    g = Σ_i  λ_i / Σ_j λ_j · g_i / <‖g_i‖>,   g_i = B ∂ loss_i / ∂ output: each row's own gradient

    ‖g_i‖ is the mean over rows, <·> its running mean over micro-batches (and processes). Whatever
    its scale, a loss contributes in proportion to its weight; j runs over the losses of this step
    (adv and feat may start later). A row of g has a norm of about 1, less where losses disagree;
    the output's gradient is g / B, that of a mean over rows. EnCodec leaves out both B.
    """

    def __init__(self, names, decay):
        super().__init__()
        self.names = names
        self.decay = decay
        self.register_buffer("norms", torch.zeros(len(names)))      # sums of decay^age ‖g‖
        self.register_buffer("seen", torch.zeros(len(names)))       # sums of decay^age

    def forward(self, terms, weights, output):
        """terms {name: scalar, mean over rows}, output (B, ...) -> scalar 0 with gradient g / B."""
        total = sum(weights[name] for name in terms)
        output_gradient = 0.0                                               # g / B
        for name, term in terms.items():
            with torch.autocast(output.device.type, enabled=False):
                gradient, = torch.autograd.grad(term, output, retain_graph=True)        # g_i / B
            norm = self.mean_norm(name, gradient)
            output_gradient = output_gradient + weights[name] / total * gradient / norm

        surrogate = (output * output_gradient).sum()
        return surrogate - surrogate.detach()

    def mean_norm(self, name, gradient):
        """<‖g_i‖> with this micro-batch's gradient (B, ...) included, if that is finite."""
        norm = gradient.flatten(1).norm(dim=1).mean() * len(gradient)
        norm = add_up(norm) / world()

        # without waiting for the device
        i = self.names.index(name)
        finite = norm.isfinite()
        self.norms[i] = torch.where(finite, self.decay * self.norms[i] + norm, self.norms[i])
        self.seen[i] = torch.where(finite, self.decay * self.seen[i] + 1, self.seen[i])
        return (self.norms[i] / self.seen[i].clamp(min=1e-12)).clamp(min=1e-12)


class VAEGAN(nn.Module):
    """The VAE, its discriminators, and eq. 2.

    Losses with weight 0 are not computed; without adv and feat there are no discriminators.
    """

    def __init__(self, vae: VAEConfig, cfg: GANConfig):
        super().__init__()
        self.cfg = cfg
        self.vae = VAE(vae)
        self.weights = {name: weight for name, weight in cfg.loss_weights.items() if weight > 0}

        adversarial = self.weights.keys() & {"adv", "feat"}
        self.disc = Discriminators(cfg, vae.channels) if adversarial else None

        # the terms that depend on the waveform x̂
        on_wav = [name for name in ("time", "mel", "stft", "adv", "feat") if name in self.weights]
        self.balancer = Balancer(on_wav, cfg.balance) if cfg.balance else None

        # the teacher is no module: neither trained nor saved
        if "distill" in self.weights:
            self.teacher = Teacher(cfg.teacher, vae.sample_rate)
            self.to_teacher = nn.Linear(vae.latent_dim, self.teacher.dim)

    def losses(self, wav, step, source=None):
        """Yield (optimizer name, loss, metrics) of a step on wav (B, ch, S).

        First "vae" with the loss of eq. 2, then "disc" once the discriminators learn. Neither has a
        gradient for the other's weights. source: of random numbers (noise.py).
        """
        rec, maps, z, terms = self.vae(wav, source)

        # the terms of eq. 2 that have a weight (the weights enter in weighted_sum); from the VAE
        # L_KL or L_commit
        terms = {name: value for name, value in terms.items() if name in self.weights}
        if "time" in self.weights:
            terms["time"] = (wav - rec).abs().mean()                             # L_t
        terms |= self.distill_term(wav, z)                                       # L_distill
        terms |= self.spectral_terms(wav, rec, shared(source))                   # L_f
        terms |= self.inverse_terms(wav, maps)

        # the discriminators see the same crop of both, the original once for both players; the
        # generator learns after their warm-up
        disc_learns = self.disc is not None and step >= self.cfg.disc_start
        if disc_learns:
            crop = self.random_crop(wav.shape[-1], shared(source))
            real = self.disc(wav[..., crop])
            if step >= self.cfg.disc_start + self.cfg.disc_warmup:               # L_adv, L_feat
                terms |= self.adversarial_terms(real, rec[..., crop])

        # generator; before adv starts there may be no term at all: only the discriminators step
        total = self.weighted_sum(terms, rec)
        terms = {name: value.detach() for name, value in terms.items()}          # frees the graphs
        if total.requires_grad:
            yield "vae", total, terms

        if disc_learns:
            loss = hinge_loss(real, self.disc(rec[..., crop].detach()))
            yield "disc", loss, {"disc": loss.detach()}

    def distill_term(self, wav, z):
        """L_distill = 1 - cos(W z, WavLM(x)), mean over latents (CALM 5.1, after Mimi).

        z is the posterior sample, since the paper does not specify.
        """
        if "distill" not in self.weights:
            return {}
        predicted = self.to_teacher(z)                                       # (B, T, dim)
        target = self.teacher(wav, z.shape[1])
        return {"distill": 1 - F.cosine_similarity(predicted, target, dim=-1).mean()}

    def spectral_terms(self, wav, rec, generator=None):
        """L_f (eq. 2): mel and stft, over all windows or some at random, the same for all rows."""
        cfg = self.cfg
        names = [name for name in ("mel", "stft") if name in self.weights]
        if not names:
            return {}

        windows = cfg.loss_windows
        if cfg.loss_scales:
            chosen = torch.randperm(len(windows), generator=generator)[:cfg.loss_scales].tolist()
            windows = [windows[i] for i in chosen]
        with torch.autocast(wav.device.type, enabled=False):
            return spectral_losses(wav, rec, self.vae.cfg.sample_rate, windows, names,
                                   cfg.loss_floor)

    def inverse_terms(self, wav, maps):
        """magnitude and phase: between the original's spectra and what the inverse STFT was asked
        for.
        """
        if not self.weights.keys() & {"magnitude", "phase"}:
            return {}
        inverse = self.vae.decoder.conv[-1]
        scale = math.sqrt(inverse.n_fft)
        X = inverse.spectrum(wav).flatten(0, 1) / scale                     # (B · ch, bins, L)

        terms = {}
        if "magnitude" in self.weights:
            Y = inverse.magnitude(maps).flatten(0, 1) / scale
            terms["magnitude"] = magnitude_loss(X.abs(), Y, self.cfg.loss_floor)
        if "phase" in self.weights:
            p = inverse.phase(maps).flatten(0, 1)
            terms["phase"] = phase_loss(X, p, self.cfg.loss_floor)
        return terms

    def random_crop(self, samples, generator=None):
        """The slice of disc_seconds, at random, that the discriminators see."""
        if not self.cfg.disc_seconds:
            return slice(None)
        length = min(round(self.cfg.disc_seconds * self.vae.cfg.sample_rate), samples)
        first = torch.randint(samples - length + 1, (), generator=generator).item()
        return slice(first, first + length)

    def adversarial_terms(self, real, rec):
        """L_adv = -mean D(x̂) and L_feat (eq. 2); gradients reach x̂ only. real: D(x)."""
        self.disc.requires_grad_(False)
        fake = self.disc(rec)

        terms = {}
        if "adv" in self.weights:
            terms["adv"] = -sum(logits.mean() for logits, _ in fake) / len(fake)     # L_adv
        if "feat" in self.weights:
            terms["feat"] = feature_loss(real, fake)                                 # L_feat
        self.disc.requires_grad_(True)
        return terms

    def weighted_sum(self, terms, rec):
        """Σ λ_i L_i (eq. 2); with the balancer, terms on x̂ get the balanced gradient."""
        balanced = self.balancer.names if self.balancer is not None else []
        on_wav = {name: value for name, value in terms.items() if name in balanced}
        others = {name: value for name, value in terms.items() if name not in balanced}

        def weigh(some):
            zero = rec.new_zeros(())                        # a tensor even if no term is left
            return sum((self.weights[name] * value for name, value in some.items()), zero)

        # value: Σ λ_i L_i; gradient: the balancer's for terms on x̂
        total = weigh(others)                                                    # CALM eq. 2
        if on_wav:
            total = total + weigh(on_wav).detach() + self.balancer(on_wav, self.weights, rec)
        return total
