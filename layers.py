"""The causal layers that the autoencoder is built of, and how they stream.

Each layer takes (x, state) and maps (B, Cin, L) to (B, Cout, L'). Without a state, x is the whole
signal, and zeros precede it. With one, x is the next chunk (whole strides: VAE.encode sees to
that), and `state` is a dict, empty before the first chunk, in which each layer
keeps one entry under itself:

    inputs kept (Conv, Spectrum)             outputs kept (ConvTranspose, InverseSpectrum)

    chunk 1   x x x x p p                    chunk 1   y y y y t t    t: incomplete
                      │ │ put before                           │ │ added to
                      ▼ ▼                                      ▼ ▼
    chunk 2           p p x x x x            chunk 2           y y y y t t

The joined chunks equal the offline result (tests/papers/test_vae.py).

    Conv, ConvTranspose     causal convolutions           Residual    SEANet's unit, as in Mimi
    Spectrum                log |STFT|                    ConvNeXt    a ConvNeXt block, causal
    InverseSpectrum         magnitude, phase -> waveform  Elu, Gelu, Norm, Chain

Sources: SEANet as in EnCodec (Défossez et al. 2022) and Mimi (Défossez et al. 2024: zero padding,
no norm, hidden width half); ConvNeXt (Liu et al. 2022); iSTFT: Vocos (Siuzdak 2023).

Precision: spectra in fp32; convolutions in the autocast dtype.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def put_before(layer, x, length, state, replicate=False):
    """x (B, C, L) -> (B, C, length + L): the `length` inputs before x, and x.

    At the start of the signal they are zeros, or with `replicate` its first value.
    """
    previous = None if state is None else state.get(layer)
    if previous is None:
        previous = x[..., :1] if replicate else x.new_zeros(*x.shape[:2], 1)
        previous = previous.expand(-1, -1, length)

    x = torch.cat([previous, x], -1)
    if state is not None:
        state[layer] = x[..., x.shape[-1] - length:]
    return x


class Conv(nn.Module):
    """Causal convolution: output n depends on inputs before (n + 1) · stride.

    (B, Cin, L) -> (B, Cout, L / stride). replicate: the signal's first value precedes it instead of
    zeros.
    """

    def __init__(self, cin, cout, kernel, stride=1, dilation=1, groups=1, replicate=False):
        super().__init__()
        self.replicate = replicate
        self.padding = (kernel - 1) * dilation + 1 - stride         # inputs that precede the signal
        self.conv = nn.Conv1d(cin, cout, kernel, stride, dilation=dilation, groups=groups)

    def forward(self, x, state=None):
        # offline, or kernel = stride: let conv1d pad both ends, drop the excess
        if self.padding == 0 or (state is None and not self.replicate):
            conv = self.conv
            length = x.shape[-1] // conv.stride[0]
            y = F.conv1d(x, conv.weight, conv.bias, conv.stride, self.padding, conv.dilation,
                         conv.groups)
            return y[..., :length]
        return self.conv(put_before(self, x, self.padding, state, self.replicate))


class ConvTranspose(nn.Module):
    """Causal upsampling by `stride`, kernel 2 · stride: input n reaches outputs from n · stride on.

    (B, Cin, L) -> (B, Cout, L · stride). Each input contributes to the `stride` outputs at its
    position and to the next `stride`. That is a matrix product and an overlap-add, which we use
    where no gradient is needed (decoding is 1.1 times as fast on a CPU: LOG.md).
    """

    def __init__(self, cin, cout, stride, groups=1):
        super().__init__()
        self.stride = stride
        self.conv = nn.ConvTranspose1d(cin, cout, 2 * stride, stride, groups=groups)

    def forward(self, x, state=None):
        # one stride longer than the chunk: what the last input adds to the next chunk
        n = x.shape[-1] * self.stride
        y = self.conv(x) if torch.is_grad_enabled() else self.overlap_add(x)
        if state is None:
            return y[..., :n]

        if self in state:
            y = torch.cat([y[..., :self.stride] + state[self], y[..., self.stride:]], -1)
        state[self] = y[..., n:] - self.conv.bias[:, None]          # the next chunk adds the bias
        return y[..., :n]

    def overlap_add(self, x):
        """What self.conv computes, (B, Cin, L) -> (B, Cout, (L + 1) stride); groups = 1 or Cin."""
        B, _, L = x.shape
        weight = self.conv.weight                            # (Cin, Cout / groups, 2 · stride)
        if self.conv.groups == 1:
            y = torch.bmm(weight.flatten(1).mT.expand(B, -1, -1), x)    # (B, Cout · 2 stride, L)
        else:                                                           # one group per channel
            y = x[:, :, None] * weight.mT

        # outputs at each input's position, and those that overlap the next input's
        at_input, after_input = y.view(B, -1, 2, self.stride, L).unbind(2)
        y = F.pad(at_input, (0, 1))                                     # (B, Cout, stride, L + 1)
        y[..., 1:] += after_input
        y += self.conv.bias[:, None, None]
        return y.mT.flatten(2)                                          # (B, Cout, (L + 1) stride)


class Elu(nn.Module):
    def forward(self, x, state=None):
        return F.elu(x)


class Gelu(nn.Module):
    def forward(self, x, state=None):
        return F.gelu(x)


class Norm(nn.Module):
    """LayerNorm over the channels of (B, C, L)."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x, state=None):
        return self.norm(x.mT).mT


class Chain(nn.Sequential):
    """Layers one after the other, with one state."""

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
    causal, otherwise as in Vocos). γ starts at 0.1: a block begins close to the identity.
    """

    def __init__(self, width):
        super().__init__()
        self.body = Chain(Conv(width, width, 7, groups=width), Norm(width),
                          Conv(width, 3 * width, 1), Gelu(), Conv(3 * width, width, 1))
        self.scale = nn.Parameter(torch.full((width, 1), 0.1))

    def forward(self, x, state=None):
        return x + self.scale * self.body(x, state)


class Spectrum(nn.Module):
    """Log-magnitudes of causal frames, one spectrum per window size n_fft, side by side.

    (B, ch, L · hop) -> (B, ch · sum of (n_fft / 2 + 1), L). Frame j ends at sample (j + 1) · hop
    whatever its size.
    """

    def __init__(self, sizes, hop):
        super().__init__()
        self.sizes = sizes
        self.hop = hop
        for n_fft in sizes:
            self.register_buffer(f"window{n_fft}", torch.hann_window(n_fft), persistent=False)

    def forward(self, x, state=None):
        longest = max(self.sizes)
        x = put_before(self, x, longest - self.hop, state)
        x = x.to(torch.promote_types(x.dtype, torch.float32))

        spectra = []
        for n_fft in self.sizes:
            frames = x[..., longest - n_fft:].unfold(-1, n_fft, self.hop)   # (B, ch, L, n_fft)
            frames = frames * getattr(self, f"window{n_fft}").to(x.dtype)
            magnitude = torch.fft.rfft(frames).abs()                        # (B, ch, L, bins)
            log = magnitude.clamp(min=1e-3).log() * 0.3 + 0.5               # about unit scale
            spectra.append(log.mT)
        return torch.cat(spectra, 2).flatten(1, 2)


class InverseSpectrum(nn.Module):
    """Magnitude and phase of each frame -> inverse FFT, window, overlap-add -> waveform.

    (B, ch · maps · bins, L) -> (B, ch, L · hop). The spectrum of frame j is M_j · e^{i φ_j},
    M_j = exp(m_j):

    phase = "direct": maps m, p;  φ_j = p_j                                              (Vocos)
    phase = "locked": map m;      φ_jk = πk + Θ_jk,  Θ_jk = Θ_{j-1,l} + 2π hop (l + d_jl) / n_fft,
                                  l the strongest bin of frame j among k-2 .. k+2,
                                  d_l = 2 (M_{l+1} - M_{l-1}) / (M_{l-1} + 2 M_l + M_{l+1})

    The phase of a tone with f cycles per sample advances by 2π f hop per frame. A network without
    phase at its input (encoder = "stft") cannot predict the phase, but the magnitudes tell how many
    bins d a tone lies above the centre of its strongest bin, exactly so for one tone under a Hann
    window (Grandke 1983; with three bins: Agrež 2002). The advances are accumulated: a phase
    vocoder (Flanagan & Golden 1966). If each of the four or five bins under a tone accumulated for
    itself, their small errors would drift apart and the tone would beat or vanish. So all of them
    take the accumulated phase Θ of the strongest one (phase locking, Laroche & Dolson 1999), and an
    error only detunes the tone a little. πk puts a frame's energy in its middle.

    Trained through the waveform alone, "locked" asks for one bin per tone, d = 0, and so for wrong
    pitches; gan.py's "magnitude" loss compares M with |spectrum(original)|. Its "phase" loss
    compares the p of "direct" with the angles of spectrum(original).

    Frame j covers samples [j · hop - latency, j · hop - latency + n_fft), so that a latent's frames
    end where its samples end. Offline the last `latency` samples lack the frames that would follow,
    and fade out.
    """
    REACH = 2                                     # bins: half of the main lobe of a Hann window

    def __init__(self, n_fft, hop, channels, phase="direct"):
        super().__init__()
        self.n_fft = n_fft
        self.hop = hop
        self.channels = channels
        self.latency = n_fft - hop
        self.locked = phase == "locked"
        self.maps = 1 if self.locked else 2

        # divided by the sum of overlapping squared windows, which has period hop: squared, since
        # the frames to be learned, those of an STFT, are windowed once already
        window = torch.hann_window(n_fft)
        energy = F.pad(window.pow(2), (0, -n_fft % hop)).view(-1, hop).sum(0)
        energy = energy.repeat(n_fft // hop + 1)[:n_fft]
        self.register_buffer("window", window / energy, persistent=False)

        # phases πk put a frame's energy in its middle
        self.register_buffer("centred", math.pi * (torch.arange(n_fft // 2 + 1) % 2),
                             persistent=False)

    def forward(self, x, state=None):
        B, _, L = x.shape
        n = L * self.hop
        x = x.to(torch.promote_types(x.dtype, torch.float32))

        # samples that await this chunk, samples before the signal still to skip, phase so far
        initial = (None, self.latency, None)
        overlap, skip, accumulated = initial if state is None else state.get(self, initial)

        # magnitude and phase of each bin                           (B, ch, bins, L) each
        magnitude = self.magnitude(x)
        if self.locked:
            theta, accumulated = self.accumulate(magnitude, accumulated)
            phase = theta + self.centred.to(x.dtype)[:, None]
        else:
            phase = self.phase(x)

        # frames, windowed and overlapped
        y = torch.fft.irfft(torch.polar(magnitude, phase), n=self.n_fft, dim=2)
        y = (y * self.window.to(x.dtype)[:, None]).flatten(0, 1)             # (B · ch, n_fft, L)
        y = F.fold(y, (1, n + self.latency), (1, self.n_fft), stride=(1, self.hop))
        y = y.view(B, self.channels, n + self.latency)
        if state is None:
            return y[..., self.latency:]

        # add the previous chunk's last samples, keep those that later frames overlap
        if overlap is not None:
            y = torch.cat([y[..., :self.latency] + overlap, y[..., self.latency:]], -1)
        skipped = min(skip, n)
        state[self] = (y[..., n:], skip - skipped, accumulated)
        return y[..., skipped:n]

    def split(self, x):
        """The maps apart: (B, ch · maps · bins, L) -> (B, ch, maps, bins, L)."""
        return x.view(len(x), self.channels, self.maps, self.n_fft // 2 + 1, -1)

    def magnitude(self, x):
        """M (B, ch, bins, L) of the maps x."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.split(x)[:, :, 0].clamp(max=7.0).exp()          # e^7: louder than any clip

    def phase(self, x):
        """p (B, ch, bins, L) of the maps x, in radians and not wrapped; of "direct" only."""
        return self.split(x.to(torch.promote_types(x.dtype, torch.float32)))[:, :, 1]

    def spectrum(self, wav):
        """The complex spectra (B, ch, bins, L) of wav (B, ch, L · hop) in the frames of M and p."""
        wav = wav.to(torch.promote_types(wav.dtype, torch.float32))
        frames = F.pad(wav, (self.latency, 0)).unfold(-1, self.n_fft, self.hop)
        window = torch.hann_window(self.n_fft, dtype=wav.dtype, device=wav.device)
        return torch.fft.rfft(frames * window).mT

    def advances(self, magnitude):
        """Radians by which a tone with its peak in that bin turns per frame, (B, ch, bins, L): the
        bin's centre, without whole turns, and how far the tone lies from it.
        """
        padded = F.pad(magnitude, (0, 0, 1, 1))
        below = padded[:, :, :-2]
        above = padded[:, :, 2:]
        offset = 2 * (above - below) / (below + 2 * magnitude + above + 1e-9)       # in bins

        bins = torch.arange(magnitude.shape[2], device=magnitude.device)
        centre = bins * self.hop % self.n_fft / self.hop
        return (centre.to(offset.dtype)[:, None] + offset) * (2 * math.pi * self.hop / self.n_fft)

    @torch.compiler.disable                                                  # a loop over frames
    def accumulate(self, magnitude, previous=None):
        """Accumulated phase Θ of every frame, (B, ch, bins, L), and of the last one, in radians.

        magnitude (B, ch, bins, L); previous: Θ of the frame before, (B, ch, bins). Gradients reach
        the advance of a frame from that frame only: with gradients through the sum training stalls.
        """
        advance = self.advances(magnitude)

        # the strongest bin within REACH of each bin; max_pool2d is 20 times as fast as argmax
        size = 2 * self.REACH + 1
        _, peak = F.max_pool2d(magnitude.detach(), (size, 1), 1, (self.REACH, 0),
                               return_indices=True)                 # bin · L + frame
        peak = peak // magnitude.shape[-1]                          # (B, ch, bins, L)

        # each bin goes on from its peak's phase
        phases = [torch.zeros_like(advance[..., 0]) if previous is None else previous]
        with torch.no_grad():
            for frame_advance, frame_peak in zip(advance.unbind(-1), peak.unbind(-1)):
                total = (phases[-1] + frame_advance).gather(2, frame_peak)
                phases.append(total % (2 * math.pi))

        before = torch.stack(phases[:-1], -1)
        return (before + advance).gather(2, peak), phases[-1]

    @torch.no_grad()
    def initialise(self, conv):
        """Set the bias of the layer before: magnitudes e^-2.5, which is quiet, and phases πk."""
        bias = conv.bias.view(self.channels, self.maps, -1)
        bias[:, 0] = -2.5
        bias[:, 1:] = self.centred

    def remaining(self, state):
        """The samples that wait for further frames, (B, ch, latency) or fewer; ends the state."""
        overlap, skip, _ = state.pop(self)
        return overlap[..., skip:]


if __name__ == "__main__":
    print("layers.py is a library, used by train.py, sample.py and evaluate.py through vae.py")
