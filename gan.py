"""What trains the VAE: eq. 2 of CALM term by term.

    wav x ─► VAE ─► x̂, z
      │             │
      │   L = λ_t |x - x̂|  +  λ_f L_f  +  λ_adv L_adv  +  λ_feat L_feat  +  λ_KL L_KL   (CALM eq. 2)
      │       + λ_distill (1 - cos(W z, WavLM))      (speech, CALM 5.1)   + λ_commit L_commit  (rvq)
      │             │
      └──► discriminators: one per STFT size, looking at real and imaginary parts

Sources: CALM (arXiv 2509.06926) section 4.1, eq. 2, Table 10; discriminators, hinge losses and the
balancer: EnCodec (Défossez et al. 2022) section 3.4; multi-scale log-mel loss: DAC (Kumar et al.
2023).
Where this differs from the paper:
- disc_power < 1 (compressed spectra of equal loudness for the discriminators) is ours: from the
  linear ones of EnCodec they learn little in a few hundred steps (LOG.md).
- λ_t, λ_f, λ_adv, λ_feat are not given; [gan.loss_weights] exposes them.
- Generator and discriminator see the same weights of each other and step together, which lets
  gradients accumulate over micro-batches exactly (but for the balancer's norms, which are taken
  per micro-batch); EnCodec and DAC step one after the other.

Precision: spectra, losses and discriminator logits in fp32; convolutions in the autocast dtype.
"""
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm

from schema import Range
from vae import VAE, VAEConfig

Loss = Literal["time", "mel", "stft", "adv", "feat", "kl", "commit", "distill"]


def default_weights():
    """EnCodec's balance of time and adversarial terms, DAC's of mel and features, CALM's KL (Table
    10).
    """
    return {"time": 0.1, "mel": 15.0, "stft": 0.0, "adv": 1.0, "feat": 2.0, "kl": 0.01}


@dataclass
class GANConfig:
    """The [gan] table: what only the training of the VAE needs."""
    # eq. 2; 0 = not computed
    loss_weights: dict[Loss, Annotated[float, Range(0)]] = field(default_factory=default_weights)
    # samples: the n_fft of the spectral losses
    loss_windows: list[Annotated[int, Range(8)]] = field(
        default_factory=lambda: [2048, 1024, 512, 256, 128, 64, 32])
    # amplitude below which spectra count as silent (DAC); 1e-3 = -60 dB learns faster
    loss_floor: Annotated[float, Range(0)] = 1e-5
    # windows drawn each step; 0 = all (fewer is faster: the STFTs are 40 % of a step)
    loss_scales: Annotated[int, Range(0)] = 0
    # distill: WavLM, a folder or a name on the Hugging Face hub
    teacher: str = ""
    # samples: one discriminator per n_fft (EnCodec)
    disc_windows: list[Annotated[int, Range(8)]] = field(
        default_factory=lambda: [2048, 1024, 512, 256, 128])
    # channels of the discriminators
    disc_width: Annotated[int, Range(1)] = 32
    # seconds of each crop, drawn anew each step, that the discriminators hear; 0 = all of it. They
    # cost most of a step, and a short part makes more steps of the same time (HiFi-GAN: 0.37)
    disc_seconds: Annotated[float, Range(0)] = 0.0
    # step at which the discriminators begin to learn
    disc_start: Annotated[int, Range(0)] = 0
    # steps that they learn alone before the generator hears them: one that has learnt nothing yet
    # only shakes a decoder that is already good
    disc_warmup: Annotated[int, Range(0)] = 0
    # 1 = the discriminators see X as it is (EnCodec); 0.3: |X|^0.3 with X's phase, at equal
    # loudness, so that detail 40 dB below the peaks counts. Learns sooner, but needs the balancer
    # (LOG.md)
    disc_power: Annotated[float, Range(above=0, high=1)] = 1.0
    # 0 = the losses are added with their weights; else the balancer with this decay (EnCodec
    # 0.999): weights of time, mel, stft, adv and feat become shares of a gradient of norm 1, beside
    # which those of kl, commit and distill are to be chosen anew
    balance: Annotated[float, Range(0, below=1)] = 0.0

    def __post_init__(self):
        for name in ("loss_windows", "disc_windows"):
            if not getattr(self, name):
                raise ValueError(f"{name}: needs windows of at least 8 samples, got []")
        if self.disc_power < 1 and not any(self.loss_weights.get(name, 0) > 0
                                           for name in ("time", "mel", "stft")):
            raise ValueError("disc_power: below 1 no discriminator hears the level; it needs a "
                             "time, mel or stft loss that does")
        if self.loss_weights.get("distill", 0) > 0 and not self.teacher:
            raise ValueError("teacher: loss_weights.distill needs one, "
                             "e.g. \"microsoft/wavlm-large\" or a folder")


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


def spectral_losses(x, y, sample_rate, windows, names, floor=1e-5):
    """Sums over windows / number of windows. x, y (B, ch, S): original, reconstruction.

    mel:  mean |log10 mel(x) - log10 mel(y)|, the given floor, 5 n_fft / 32 bands
          (DAC: 5 at 32 .. 320 at 2048)
    stft: ‖X - Y‖ / ‖X‖ (spectral convergence) + mean |log |X| - log |Y||
          (Yamamoto et al. 2020), same floor
    The floor is added, not clamped to: silence that should not be silent keeps a gradient.
    Spectra are divided by sqrt(n_fft): white noise of amplitude a has magnitudes of about .6 a.
    """
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    out = dict.fromkeys(names, 0.0)
    for n_fft in windows:
        X, Y = (stft(w, n_fft).abs() / math.sqrt(n_fft) for w in (x, y))
        if "mel" in out:
            filters = mel_filters(sample_rate, n_fft, max(5, 5 * n_fft // 32), x.device)
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
        self.sample_rate, self.dim = sample_rate, self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, wav, frames):
        self.model.to(wav.device)
        with torch.autocast(wav.device.type, enabled=False):
            x = wav.float().mean(1)                                             # (B, S)
            n = round(x.shape[1] * self.rate / self.sample_rate)
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
    def __init__(self, cfg, channels):
        super().__init__()
        self.each = nn.ModuleList(
            STFTDiscriminator(n, channels, cfg.disc_width, cfg.disc_power)
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

    def __init__(self, vae: VAEConfig, cfg: GANConfig):
        super().__init__()
        self.cfg, self.vae = cfg, VAE(vae)
        self.weights = {name: w for name, w in cfg.loss_weights.items() if w > 0}
        self.disc = Discriminators(cfg, vae.channels) if self.weights.keys() & {"adv", "feat"} else None
        audible = [name for name in ("time", "mel", "stft", "adv", "feat") if name in self.weights]
        self.balancer = Balancer(audible, cfg.balance) if cfg.balance else None
        if "distill" in self.weights:
            # in a list: neither trained nor saved
            self.teacher = [Teacher(cfg.teacher, vae.sample_rate)]
            self.to_teacher = nn.Linear(vae.latent_dim, self.teacher[0].dim)

    def losses(self, wav, step):
        """wav (B, ch, S) -> yields (optimizer name, loss, metrics): first "vae", then "disc" if it
        plays.

        adv:  generator -mean D(x̂);
              discriminator mean relu(1 - D(x)) + mean relu(1 + D(x̂))            (hinge)
        distill: 1 - cos(linear(z_t), WavLM_t), averaged over latents (CALM 5.1, after Mimi); we
              take z as sampled, since the paper does not say
        feat: mean |D_l(x) - D_l(x̂)| / mean |D_l(x)| over layers and scales           (EnCodec)
        """
        cfg, sample_rate = self.cfg, self.vae.cfg.sample_rate
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
                terms |= spectral_losses(wav, rec, sample_rate, windows, spectral,
                                         cfg.loss_floor)
        playing = self.disc is not None and step >= cfg.disc_start
        heard = slice(None)
        if playing and cfg.disc_seconds:
            length = min(round(cfg.disc_seconds * sample_rate), wav.shape[-1])
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
