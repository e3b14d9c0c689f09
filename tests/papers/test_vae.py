"""The VAE is causal, streams exactly, and its layers are what their formulas say."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from cli import BadInput
from config import load
from discrete import ResidualVQ
from layers import Conv, ConvTranspose, InverseSpectrum, Spectrum
from schema import build
from vae import VAE, VAEConfig, kl_loss

SMALL = dict(sample_rate=16000, ratios=[4, 5, 4, 2], stft_hop=40, width=8, width_max=32, dim=32,
             heads=2, encoder_layers=1, decoder_layers=1, context=0.05, latent_dim=6, res_layers=2,
             encoder="conv", decoder="conv", block="seanet")
KINDS = [("conv", "conv", "seanet"), ("stft", "istft", "seanet"), ("conv", "istft", "convnext"),
         ("stft", "conv", "convnext"), ("stft", "istft", "convnext")]


def vae(encoder, decoder, block="seanet", **changes):
    torch.manual_seed(0)
    if encoder == "stft" and decoder == "istft":         # as in the configs
        changes = {"phase": "locked", **changes}
    net = VAE(VAEConfig(**{**SMALL, "encoder": encoder, "decoder": decoder, "block": block,
                           **changes}))
    return move_off_initialisation(net).eval()


def move_off_initialisation(net):
    """Small random changes to all parameters, so that every path matters."""
    for p in net.parameters():
        p.data += 0.03 * torch.randn_like(p)
    return net


def assert_close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def encode_in_pieces(net, pieces):
    """Means (B, T, D) of the waveforms `pieces`, encoded one after the other with one state."""
    state = {}
    return torch.cat([net.encode(piece, state)[0] for piece in pieces], 1)


def decode_in_pieces(net, pieces):
    """Waveform (B, ch, S) of the latents `pieces`, decoded with one state, then flushed."""
    state = {}
    waveforms = [net.decode(piece, state) for piece in pieces]
    B = pieces[0].shape[0]
    return torch.cat([*waveforms, net.flush(state).expand(B, -1, -1)], -1)


def random_sizes(total, limit, generator):
    """Random sizes below `limit`, 0 included, that add up to `total`."""
    sizes = []
    while sum(sizes) < total:
        size = int(torch.randint(0, limit, (), generator=generator))
        sizes.append(min(size, total - sum(sizes)))
    return sizes


@pytest.mark.parametrize("encoder, decoder, block", KINDS)
@torch.no_grad()
def test_latents_depend_on_earlier_samples_only_at_every_prefix(encoder, decoder, block):
    net = vae(encoder, decoder, block)
    wav = 0.1 * torch.randn(1, 1, 160 * 7)
    mean, logvar = net.encode(wav)
    for t in range(1, 8):
        prefix_mean, prefix_logvar = net.encode(wav[..., :160 * t])
        assert_close(prefix_mean, mean[:, :t])
        assert_close(prefix_logvar, logvar[:, :t])


@pytest.mark.parametrize("encoder, decoder, block", KINDS)
@torch.no_grad()
def test_samples_depend_on_earlier_latents_only_up_to_the_stated_latency(encoder, decoder, block):
    net = vae(encoder, decoder, block)
    z = torch.randn(1, 7, 6)
    wav = net.decode(z)
    for t in range(1, 8):
        complete = 160 * t - net.latency
        assert_close(net.decode(z[:, :t])[..., :complete], wav[..., :complete])
    assert net.latency == (120 if decoder == "istft" else 0)


@pytest.mark.parametrize("encoder, decoder, block", KINDS)
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_streaming_equals_offline_for_random_chunks(encoder, decoder, block, seed):
    net = vae(encoder, decoder, block)
    g = torch.Generator().manual_seed(seed)
    wav = 0.1 * torch.randn(2, 1, 160 * 11, generator=g)
    z = net.encode(wav)[0]
    assert_close(encode_in_pieces(net, wav.split(random_sizes(160 * 11, 500, g), -1)), z)
    assert_close(decode_in_pieces(net, z.split(random_sizes(11, 4, g), 1)), net.decode(z))


LAYOUTS = [dict(inner=4), dict(inner=4, transformer_style="mimi", decoder="istft"),
           dict(inner=4, aggregator="cls", channels=2, encoder="stft", decoder="istft"),
           dict(bottleneck="rvq", codebooks=3, codebook_size=16), dict(aggregator="cls", inner=1),
           dict(encoder="stft", channels=2, encoder_windows=[40, 100, 400]),
           dict(front_stride=8, decoder="istft"),
           dict(front_stride=40, block="convnext", channels=2)]


@pytest.mark.parametrize("changes", LAYOUTS, ids=str)
@torch.no_grad()
def test_every_layout_is_causal_and_streams_exactly(changes):
    net = vae(**{"encoder": "conv", "decoder": "conv", **changes})
    hop = net.cfg.hop
    assert hop == 160 * net.cfg.inner
    wav = 0.1 * torch.randn(2, net.cfg.channels, hop * 6,
                            generator=torch.Generator().manual_seed(0))

    z = net.encode(wav)[0]
    assert z.shape == (2, 6, 6)
    assert_close(net.encode(wav[..., :hop * 4])[0], z[:, :4])
    sizes = [hop // 2, hop * 2, 7, hop * 3, hop // 2 - 7]
    assert_close(encode_in_pieces(net, wav.split(sizes, -1)), z)

    decoded = net.decode(z)
    complete = hop * 3 - net.latency
    assert_close(net.decode(z[:, :3])[..., :complete], decoded[..., :complete])
    assert_close(decode_in_pieces(net, z.split([1, 3, 2], 1)), decoded)


PAPER = {"calm_speech": (12.5, 130.1, 0), "calm_music": (25.0, 53.8, 0),
         "audiocalm": (44100 / 4096, 87.5, 768)}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_autoencoders_have_their_frame_rates_and_our_sizes(name):
    frame_rate, millions, latency = PAPER[name]
    cfg = load(f"configs/paper/{name}.toml").vae
    with torch.device("meta"):
        net = VAE(cfg)
    assert cfg.frame_rate == frame_rate and net.latency == latency
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("decoder", ["conv", "istft"])
@torch.no_grad()
def test_the_papers_autoencoders_stream_exactly_at_reduced_width(name, decoder):
    cfg = load(f"configs/paper/{name}.toml").vae
    stft_hop = math.prod(cfg.ratios[-2:])
    cfg = dataclasses.replace(cfg, width=4, width_max=16, dim=32, heads=2, encoder_layers=2,
                              decoder_layers=2, context=0.5, decoder=decoder,
                              stft_hop=stft_hop if decoder == "istft" else 0)
    torch.manual_seed(0)
    net = move_off_initialisation(VAE(cfg))
    g = torch.Generator().manual_seed(1)

    wav = 0.1 * torch.randn(1, cfg.channels, cfg.hop * 9 + 100, generator=g)
    z = net.encode(wav)[0][:, :9]                              # the tenth latent is not complete
    sizes = random_sizes(wav.shape[-1], 3 * cfg.hop, g)
    assert_close(encode_in_pieces(net, wav.split(sizes, -1)), z, atol=1e-4)
    assert_close(decode_in_pieces(net, z.split([2, 1, 4, 2], 1)), net.decode(z), atol=1e-4)

    # algorithmic latency: of the first two latents' samples only these wait
    latency = 3 * stft_hop if decoder == "istft" else 0
    assert net.decode(z[:, :2], {}).shape[-1] == 2 * cfg.hop - latency


def quantizer(levels=4, codes=32, dim=3):
    torch.manual_seed(0)
    return ResidualVQ(dim, levels, codes)


def test_codes_are_the_nearest_entries_of_what_is_left():
    q = quantizer()
    x = torch.randn(2, 5, 3)
    codes = q.encode(x)
    assert codes.shape == (2, 5, 4)
    residual = x
    for level in range(4):
        nearest = torch.cdist(residual.flatten(0, 1), q.codebooks[level]).argmin(1).view(2, 5)
        assert torch.equal(codes[..., level], nearest)
        residual = residual - q.codebooks[level][nearest]
    torch.testing.assert_close(x - q.decode(codes), residual)


def test_quantisation_passes_the_gradient_straight_and_pulls_towards_the_codes():
    q = quantizer().eval()
    x = torch.randn(2, 5, 3, requires_grad=True)
    z, commit = q(x)
    torch.testing.assert_close(z, q.decode(q.encode(x)))
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x, retain_graph=True)[0],
                               torch.ones_like(x))
    residual = x.detach()
    expected = 0.0
    for level in range(4):
        residual = residual - q.codebooks[level][q.encode(x)[..., level]]
        expected = expected + residual.pow(2).mean() / 4
    torch.testing.assert_close(commit, expected)


def test_a_codebook_finds_clusters_and_revives_entries_that_nobody_chooses():
    q = quantizer(levels=1, codes=64, dim=2)
    for shift in (0.0, 100.0):                      # the second time nearly all entries are far off
        centres = shift + 5 * torch.randn(8, 2)
        for _ in range(800):
            q(centres[torch.randint(8, (4, 32))] + 0.01 * torch.randn(4, 32, 2))
        distances = torch.cdist(centres, q.codebooks[0])
        assert distances.min(1).values.max() < 0.05
        assert distances.min(0).values.max() < 15.0         # no entry was left behind


def test_dropped_levels_neither_code_nor_learn():
    q = quantizer()
    x = torch.randn(400, 1, 3)
    before = q.codebooks.clone()
    z, _ = q.train()(x)
    nearest = torch.cdist(x[:, 0], before[0]).argmin(1)      # learn() follows the choice
    assert before[0][nearest].shape == (400, 3)
    first_level_only = (z[:, 0] - q.codebooks[0][nearest]).norm(dim=1) < 1e-6
    assert 0.08 < first_level_only.float().mean() < 0.18     # 1/2 · 1/4 of the rows


def test_a_level_that_no_row_uses_stays_as_it_is():
    """Guards a hang (a process without rows skipped all_reduce) and 0 / 0 in an unused codebook."""
    q = quantizer()
    x = torch.randn(6, 3)
    before = [b.clone() for b in (q.codebooks, q.counts, q.sums)]
    candidates = torch.randn(q.codebooks.shape[1:])
    q.update(1, x, q.nearest(x, 1), torch.zeros(6, dtype=torch.bool), candidates)
    assert all(torch.equal(a, b) for a, b in zip(before, (q.codebooks, q.counts, q.sums)))
    for _ in range(40):
        z, commit = q.train()(torch.randn(1, 5, 3))
        assert z.isfinite().all() and commit.isfinite() and q.codebooks.isfinite().all()


def test_a_clip_of_any_length_gives_ceil_of_its_hops_latents():
    net = vae("conv", "conv")
    for samples, frames in ((1, 1), (159, 1), (160, 1), (161, 2), (480, 3)):
        assert net.encode(torch.randn(1, 1, samples))[0].shape == (1, frames, 6)


def test_spectra_of_several_windows_are_those_of_each_and_end_together():
    wav = torch.randn(2, 1, 400, dtype=torch.float64)
    both = Spectrum([160, 60], 40)(wav)
    assert both.shape == (2, 81 + 31, 10)
    torch.testing.assert_close(both, torch.cat([Spectrum([n], 40)(wav) for n in (160, 60)], 1))


def test_the_inverse_spectrum_undoes_the_spectrum():
    n_fft = 64
    hop = 16
    x = torch.randn(1, 1, hop * 20, dtype=torch.float64)
    frames = F.pad(x, (n_fft - hop, 0)).unfold(-1, n_fft, hop)
    frames = frames * torch.hann_window(n_fft, dtype=torch.float64)
    spectrum = torch.fft.rfft(frames)[0].mT                                 # (1, bins, L)
    maps = torch.cat([spectrum.abs().clamp(min=1e-9).log(), spectrum.angle()], 1)
    y = InverseSpectrum(n_fft, hop, 1)(maps)
    # the last 48 lack the frames that would follow
    torch.testing.assert_close(y[..., :-48], x[..., :-48], atol=1e-6, rtol=0)


def tone_map(f, sample_rate, n_fft, frames, error=0.0):
    """Log-magnitudes (1, bins, frames) of a complex tone of f Hz, off by `error` (standard
    deviation).
    """
    bins = n_fft // 2 + 1
    samples = torch.arange(n_fft, dtype=torch.float64)
    wave = torch.exp(2j * math.pi * f / sample_rate * samples)
    spectrum = torch.fft.fft(wave * torch.hann_window(n_fft, dtype=torch.float64))
    magnitude = spectrum[:bins].abs() / 2                # half is at the negative frequency
    noise = torch.randn(bins, frames, generator=torch.Generator().manual_seed(0))
    return (magnitude.clamp(min=1e-4).log()[:, None] + error * noise)[None]


@pytest.mark.parametrize("f", [203.0, 440.0, 1000.0, 2103.0])
@pytest.mark.parametrize("n_fft, hop", [(320, 160), (640, 160)])
def test_the_magnitudes_of_a_tone_tell_its_frequency(f, n_fft, hop):
    magnitude = tone_map(f, 16000, n_fft, 1).exp()[None]
    advance = InverseSpectrum(n_fft, hop, 1, "locked").advances(magnitude)
    found = advance[0, 0, magnitude[0, 0, :, 0].argmax(), 0]
    turned = torch.tensor(2 * math.pi * hop * f / 16000, dtype=torch.float64)
    torch.testing.assert_close(found.cos(), turned.cos(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sin(), turned.sin(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("f", [254, 285, 953])
def test_a_tone_comes_back_at_its_pitch(f):
    """Fault: a learned offset from the centre of a bin made 340 Hz of tones of 254 to 285 Hz."""
    y = InverseSpectrum(320, 160, 1, "locked")(tone_map(f, 16000, 320, 110))[0, 0]
    window = torch.hann_window(16000, dtype=y.dtype)
    assert torch.fft.rfft(y[800:16800] * window).abs().argmax() == f         # bins of 1 Hz


@pytest.mark.parametrize("f", [440.0, 2103.0])
@pytest.mark.parametrize("reach, low, high", [(2, 0.69, 0.72), (0, 0.0, 0.67)])
def test_a_tone_keeps_its_level_although_every_bin_errs_in_its_magnitude(
        f, reach, low, high, monkeypatch):
    """Bins that accumulate their phase alone (reach 0) drift apart: beeps became clicks."""
    monkeypatch.setattr(InverseSpectrum, "REACH", reach)
    y = InverseSpectrum(640, 160, 1, "locked")(tone_map(f, 16000, 640, 100, 0.1))
    rms = y[0, 0, 4000:12000].unfold(0, 400, 400).pow(2).mean(1).sqrt()
    assert low < rms.mean() < high                       # a sine of amplitude 1 has 0.707
    assert (rms.std() < 0.03) == (reach > 0)


def test_locked_phases_turn_by_the_advance_of_the_strongest_bin():
    inverse = InverseSpectrum(64, 16, 1, "locked")
    frames = 9
    magnitude = torch.full((1, 1, 33, frames), 1e-20, dtype=torch.float64)
    magnitude[:, :, 10] = 1.0
    magnitude[:, :, 11] = 0.5                            # so 0.4 of a bin above bin 10
    phases, last = inverse.accumulate(magnitude)
    advance = 2 * math.pi * (10 + 2 * 0.5 / 2.5) * 16 / 64
    expected = advance * torch.arange(1, frames + 1, dtype=torch.float64)
    for k in (8, 9, 10, 11, 12):                         # the neighbours follow
        error = torch.remainder(phases[0, 0, k] - expected + 1, 2 * math.pi) - 1
        torch.testing.assert_close(error, torch.zeros_like(expected), atol=1e-7, rtol=0)
    torch.testing.assert_close(last, phases[..., -1] % (2 * math.pi))


@pytest.mark.parametrize("n_fft, hop", [(64, 16), (64, 32)])
def test_spectra_asked_for_and_those_of_the_original_are_of_the_same_frames(n_fft, hop):
    """What is asked with the original's magnitudes and phases is the original."""
    x = torch.randn(2, 1, hop * 20, dtype=torch.float64)
    inverse = InverseSpectrum(n_fft, hop, 1)
    frames = F.pad(x, (n_fft - hop, 0)).unfold(-1, n_fft, hop)
    spectrum = torch.fft.rfft(frames * torch.hann_window(n_fft, dtype=torch.float64))[:, 0].mT
    maps = torch.cat([spectrum.abs().clamp(min=1e-12).log(), spectrum.angle()], 1)
    torch.testing.assert_close(inverse.magnitude(maps), inverse.spectrum(x).abs())
    turned = torch.polar(torch.ones_like(inverse.phase(maps)), inverse.phase(maps))
    torch.testing.assert_close(turned, inverse.spectrum(x).sgn())
    rest = n_fft - hop
    torch.testing.assert_close(inverse(maps)[..., :-rest], x[..., :-rest], atol=1e-6, rtol=0)


@pytest.mark.parametrize("training", [False, True])      # with a gradient torch's own convolution
def test_transposed_convolution_counts_its_bias_once_when_streaming(training):
    layer = ConvTranspose(2, 3, 4)
    x = torch.randn(1, 2, 6)
    torch.nn.init.constant_(layer.conv.bias, 10.0)       # a bias added twice at chunk borders shows
    state = {}
    with torch.set_grad_enabled(training):
        y = torch.cat([layer(part, state) for part in x.split([1, 2, 3], -1)], -1)
        torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("kernel, stride, dilation, groups",
                         [(1, 1, 1, 1), (3, 1, 2, 1), (7, 1, 1, 6), (4, 4, 1, 1), (10, 5, 1, 1)])
def test_convolutions_are_those_of_torch(kernel, stride, dilation, groups):
    layer = Conv(6, 12, kernel, stride, dilation, groups).double()
    x = torch.randn(2, 6, 20, dtype=torch.float64)
    expected = layer.conv(F.pad(x, ((kernel - 1) * dilation + 1 - stride, 0)))
    torch.testing.assert_close(layer(x), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("cout, groups", [(4, 1), (6, 6)])
def test_transposed_convolutions_are_those_of_torch(cout, groups):
    layer = ConvTranspose(6, cout, 5, groups).double()
    x = torch.randn(2, 6, 20, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer.overlap_add(x), layer.conv(x), atol=1e-13, rtol=0)


def test_strided_convolution_pads_kernel_minus_stride_zeros():
    layer = Conv(1, 1, 8, stride=4)
    torch.nn.init.ones_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    y = layer(torch.arange(1.0, 13.0).view(1, 1, 12))
    assert y.flatten().tolist() == [10.0, 36.0, 68.0]    # 1..4, 1..8, 5..12


def test_kl_has_its_closed_form():
    mean = torch.tensor([[2.0]])
    logvar = torch.tensor([[math.log(0.25)]])
    assert kl_loss(mean, logvar).item() == pytest.approx(0.5 * (4 + 0.25 - 1 - math.log(0.25)))
    assert kl_loss(torch.zeros(3), torch.zeros(3)) == 0


@pytest.mark.parametrize("encoder, decoder, block", KINDS)
def test_normalised_latents_come_back(encoder, decoder, block):
    net = vae(encoder, decoder, block)
    net.latent_mean.uniform_(-1, 1)
    net.latent_std.uniform_(0.5, 2)
    z = torch.randn(2, 3, 6)
    torch.testing.assert_close(net.denormalize(net.normalize(z)), z)


@pytest.mark.parametrize("changes, message", [
    (dict(encoder="fft"), "encoder"), (dict(ratios=[]), "ratios"),
    (dict(stft_hop=7, decoder="istft"), "stft_hop"),
    (dict(heads=5), "heads"), (dict(latent_dim=0), "latent_dim"),
    (dict(encoder="stft", encoder_windows=[7]), "encoder_windows"),
    (dict(encoder_windows=[160]), "encoder_windows")])
def test_impossible_configs_are_refused_by_name(changes, message):
    with pytest.raises(BadInput, match="vae." + message):
        build(VAEConfig, {**SMALL, **changes}, "vae")
