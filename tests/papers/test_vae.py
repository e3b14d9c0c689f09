"""The VAE is causal, streams exactly, and its losses are what their formulas say."""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from config import load
from discrete import ResidualVQ
from cli import BadInput
from config import Config
from gan import VAEGAN, Balancer, GANConfig, STFTDiscriminator, mel_filters, spectral_losses, stft
from schema import build
from vae import VAE, Conv, ConvTranspose, InverseSpectrum, Spectrum, VAEConfig, kl_loss

SMALL = dict(sample_rate=16000, ratios=[4, 5, 4, 2], stft_hop=40, width=8, width_max=32, dim=32,
             heads=2, encoder_layers=1, decoder_layers=1, context=0.05, latent_dim=6, res_layers=2)
KINDS = [("conv", "conv", "seanet"), ("stft", "istft", "seanet"), ("conv", "istft", "convnext"),
         ("stft", "conv", "convnext"), ("stft", "istft", "convnext")]


def vae(encoder, decoder, block="seanet", **changes):
    torch.manual_seed(0)
    if encoder == "stft" and decoder == "istft":         # as the configs have them
        changes = {"phase": "locked", **changes}
    net = VAE(VAEConfig(**{**SMALL, "encoder": encoder, "decoder": decoder, "block": block,
                           **changes}))
    for p in net.parameters():                       # away from initialisation: every path matters
        p.data += 0.03 * torch.randn_like(p)
    return net.eval()


@pytest.mark.parametrize("encoder, decoder, block", KINDS)
@torch.no_grad()
def test_latents_depend_on_earlier_samples_only_at_every_prefix(encoder, decoder, block):
    net, wav = vae(encoder, decoder, block), 0.1 * torch.randn(1, 1, 160 * 7)
    mean, logvar = net.encode(wav)
    for t in range(1, 8):
        short = net.encode(wav[..., :160 * t])
        torch.testing.assert_close(short[0], mean[:, :t], atol=1e-5, rtol=0)
        torch.testing.assert_close(short[1], logvar[:, :t], atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoder, decoder, block", KINDS)
@torch.no_grad()
def test_samples_depend_on_earlier_latents_only_up_to_the_stated_latency(encoder, decoder, block):
    net, z = vae(encoder, decoder, block), torch.randn(1, 7, 6)
    wav = net.decode(z)
    for t in range(1, 8):
        known = 160 * t - net.latency
        torch.testing.assert_close(net.decode(z[:, :t])[..., :known], wav[..., :known],
                                   atol=1e-5, rtol=0)
    assert net.latency == (120 if decoder == "istft" else 0)


@pytest.mark.parametrize("encoder, decoder, block", KINDS)
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_streaming_equals_offline_for_random_chunks(encoder, decoder, block, seed):
    net, g = vae(encoder, decoder, block), torch.Generator().manual_seed(seed)
    wav = 0.1 * torch.randn(2, 1, 160 * 11, generator=g)
    whole = net.encode(wav)[0]
    state, parts, at = {}, [], 0
    while at < wav.shape[-1]:
        n = int(torch.randint(0, 500, (), generator=g))
        parts.append(net.encode(wav[..., at:at + n], state)[0])
        at += n
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
    state, parts, at = {}, [], 0
    while at < whole.shape[1]:
        n = int(torch.randint(0, 4, (), generator=g))
        parts.append(net.decode(whole[:, at:at + n], state))
        at += n
    parts.append(net.flush(state).expand(2, -1, -1))
    torch.testing.assert_close(torch.cat(parts, -1), net.decode(whole), atol=1e-5, rtol=0)


INNER = [dict(inner=4), dict(inner=4, transformer_style="mimi", decoder="istft"),
         dict(inner=4, aggregator="cls", channels=2, encoder="stft", decoder="istft"),
         dict(bottleneck="rvq", codebooks=3, codebook_size=16), dict(aggregator="cls", inner=1),
         dict(encoder="stft", channels=2, encoder_windows=[40, 100, 400])]


@pytest.mark.parametrize("changes", INNER, ids=str)
@torch.no_grad()
def test_every_layout_is_causal_and_streams_exactly(changes):
    changes = {"encoder": "conv", "decoder": "conv", **changes}
    net, g = vae(changes.pop("encoder"), changes.pop("decoder"), **changes), torch.Generator()
    hop = net.cfg.hop
    assert hop == 160 * net.cfg.inner
    wav = 0.1 * torch.randn(2, net.cfg.channels, hop * 6, generator=g.manual_seed(0))
    whole = net.encode(wav)[0]
    assert whole.shape == (2, 6, 6)
    torch.testing.assert_close(net.encode(wav[..., :hop * 4])[0], whole[:, :4], atol=1e-5, rtol=0)
    state, parts = {}, []
    for piece in wav.split([hop // 2, hop * 2, 7, hop * 3, hop // 2 - 7], -1):
        parts.append(net.encode(piece, state)[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
    out, state = net.decode(whole), {}
    parts = [net.decode(piece, state) for piece in whole.split([1, 3, 2], 1)]
    parts.append(net.flush(state).expand(2, -1, -1))
    torch.testing.assert_close(torch.cat(parts, -1), out, atol=1e-5, rtol=0)
    known = hop * 3 - net.latency
    torch.testing.assert_close(net.decode(whole[:, :3])[..., :known], out[..., :known],
                               atol=1e-5, rtol=0)


PAPER = {"speech": (12.5, 130.1, 0), "music": (25.0, 53.8, 0),
         "audiocalm": (44100 / 4096, 87.5, 768)}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_autoencoders_have_their_frame_rates_and_our_sizes(name):
    rate, millions, latency = PAPER[name]
    cfg = load(f"configs/paper/vae_{name}.toml").vae
    with torch.device("meta"):
        net = VAE(cfg)
    assert cfg.frame_rate == rate and net.latency == latency
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("decoder", ["conv", "istft"])
@torch.no_grad()
def test_the_papers_autoencoders_stream_exactly_at_reduced_width(name, decoder):
    cfg = load(f"configs/paper/vae_{name}.toml").vae
    hop = math.prod(cfg.ratios[-2:])
    cfg = dataclasses.replace(cfg, width=4, width_max=16, dim=32, heads=2, encoder_layers=2,
                              decoder_layers=2, context=0.5, decoder=decoder,
                              stft_hop=hop if decoder == "istft" else 0)
    torch.manual_seed(0)
    net, g = VAE(cfg), torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data += 0.03 * torch.randn_like(p)
    wav = 0.1 * torch.randn(1, cfg.channels, cfg.hop * 9 + 100, generator=g)
    whole, state, parts = net.encode(wav)[0][:, :9], {}, []
    while wav.shape[-1]:
        n = int(torch.randint(1, 3 * cfg.hop, (), generator=g))
        parts.append(net.encode(wav[..., :n], state)[0])
        wav = wav[..., n:]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)
    state, parts = {}, []
    for piece in whole.split([2, 1, 4, 2], 1):
        parts.append(net.decode(piece, state))
    # algorithmic latency: nothing of the first two latents' samples is owed but this
    assert parts[0].shape[-1] == 2 * cfg.hop - (3 * hop if decoder == "istft" else 0)
    parts.append(net.flush(state))
    torch.testing.assert_close(torch.cat(parts, -1), net.decode(whole), atol=1e-4, rtol=0)


def test_wavlm_features_come_at_the_latents_rate_and_are_distilled(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.WavLMConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,) * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    torch.manual_seed(0)
    transformers.WavLMModel(config).save_pretrained(tmp_path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path)
    model = VAEGAN(VAEConfig(**{**SMALL, "sample_rate": 24000}),
                   GANConfig(loss_weights={"mel": 1.0, "distill": 25.0}, loss_windows=[256],
                             teacher=str(tmp_path)))
    wav = 0.1 * torch.randn(2, 1, 24000)
    teacher = model.teacher
    features = teacher(wav, 150)
    assert features.shape == (2, 150, 12) and not features.requires_grad
    # zero mean, unit variance: the level says nothing; and a later change leaves earlier frames
    torch.testing.assert_close(teacher(3 * wav, 150), features, atol=1e-3, rtol=0)
    torch.manual_seed(0)
    (_, total, terms), = model.losses(wav[..., :160 * 150], 0)
    torch.manual_seed(0)
    z = model.vae(wav)[1]
    want = 1 - torch.cosine_similarity(model.to_teacher(z), features, dim=-1).mean()
    torch.testing.assert_close(terms["distill"], want)
    torch.testing.assert_close(total, terms["mel"] + 25 * terms["distill"])
    total.backward()
    assert model.vae.encoder.out.weight.grad.abs().sum() > 0
    assert not any("teacher" in name and "to_teacher" not in name for name in model.state_dict())


def test_a_teacher_that_is_not_there_is_one_clear_line(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="teacher: .*nowhere cannot be loaded"):
        VAEGAN(VAEConfig(**SMALL),
               GANConfig(loss_weights={"distill": 1.0}, teacher=f"{tmp_path}/nowhere"))
    with pytest.raises(ValueError, match="teacher: loss_weights.distill needs one"):
        GANConfig(loss_weights={"distill": 1.0})


def quantizer(levels=4, codes=32, dim=3):
    torch.manual_seed(0)
    return ResidualVQ(dim, levels, codes)


def test_codes_are_the_nearest_entries_of_what_is_left():
    q, x = quantizer(), torch.randn(2, 5, 3)
    codes, left = q.encode(x), x
    assert codes.shape == (2, 5, 4)
    for level in range(4):
        nearest = torch.cdist(left.flatten(0, 1), q.codebooks[level]).argmin(1).view(2, 5)
        assert torch.equal(codes[..., level], nearest)
        left = left - q.codebooks[level][nearest]
    torch.testing.assert_close(x - q.decode(codes), left)


def test_quantisation_passes_the_gradient_straight_and_pulls_towards_the_codes():
    q, x = quantizer().eval(), torch.randn(2, 5, 3, requires_grad=True)
    z, commit = q(x)
    torch.testing.assert_close(z, q.decode(q.encode(x)))
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x, retain_graph=True)[0],
                               torch.ones_like(x))
    left, want = x.detach(), 0.0
    for level in range(4):
        left = left - q.codebooks[level][q.encode(x)[..., level]]
        want = want + left.pow(2).mean() / 4
    torch.testing.assert_close(commit, want)


def test_a_codebook_finds_clusters_and_revives_entries_that_nobody_chooses():
    q = quantizer(levels=1, codes=64, dim=2)
    for shift in (0.0, 100.0):                      # the second time nearly all entries are far off
        centres = shift + 5 * torch.randn(8, 2)
        for _ in range(800):
            q(centres[torch.randint(8, (4, 32))] + 0.01 * torch.randn(4, 32, 2))
        found = torch.cdist(centres, q.codebooks[0])
        assert found.min(1).values.max() < 0.05
        assert found.min(0).values.max() < 15.0         # no entry was left behind


def test_dropped_levels_neither_code_nor_learn():
    q, x = quantizer(), torch.randn(400, 1, 3)
    before = q.codebooks.clone()
    z, _ = q.train()(x)
    first = before[0][torch.cdist(x[:, 0], before[0]).argmin(1)]      # learn() follows the choice
    used = (z[:, 0] - q.codebooks[0][torch.cdist(x[:, 0], before[0]).argmin(1)]).norm(dim=1) < 1e-6
    assert first.shape == (400, 3) and 0.08 < used.float().mean() < 0.18    # 1/2 · 1/4 of the rows


def test_a_level_that_no_row_uses_stays_as_it_is():
    """Guards a hang (a process without rows skipped all_reduce) and 0 / 0 in an unused codebook."""
    q, x = quantizer(), torch.randn(6, 3)
    before = [b.clone() for b in (q.codebooks, q.counts, q.sums)]
    q.learn(1, x, q.nearest(x, 1), torch.zeros(6, dtype=torch.bool))
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
    n_fft, hop, x = 64, 16, torch.randn(1, 1, 16 * 20, dtype=torch.float64)
    frames = (torch.nn.functional.pad(x, (48, 0)).unfold(-1, n_fft, hop)
              * torch.hann_window(n_fft, dtype=torch.float64))
    s = torch.fft.rfft(frames)[0].transpose(1, 2)                           # (1, bins, L)
    m = torch.cat([s.abs().clamp(min=1e-9).log(), s.angle()], 1)
    y = InverseSpectrum(n_fft, hop, 1)(m)
    # the last 48 wait for frames
    torch.testing.assert_close(y[..., :-48], x[..., :-48], atol=1e-6, rtol=0)


def tone_maps(f, rate, n_fft, hop, frames, error):
    """Maps (1, 3 · bins, frames) of a tone of f Hz; every bin's frequency errs by `error` radians a
    frame (standard deviation).
    """
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64)
    wave = torch.sin(2 * math.pi * f / rate * torch.arange(n_fft, dtype=torch.float64))
    mag = torch.fft.rfft(wave * torch.hann_window(n_fft, dtype=torch.float64)).abs()
    delta = 2 * math.pi * hop * (f / rate - bins / n_fft)
    noise = torch.randn(len(bins), frames, generator=torch.Generator().manual_seed(0))
    maps = [mag.clamp(min=1e-4).log()[:, None].expand(-1, frames),
            (math.pi * (bins % 2))[:, None].expand(-1, frames), delta[:, None] + error * noise]
    return torch.cat(maps)[None]


@pytest.mark.parametrize("f", [440.0, 2103.0])
@pytest.mark.parametrize("reach, low, high", [(2, 0.65, 0.72), (0, 0.0, 0.6)])
def test_a_tone_keeps_its_level_although_every_bin_errs_in_its_frequency(
        f, reach, low, high, monkeypatch):
    """Bins that sum up their turns alone (reach 0) drift apart: beeps were heard as clicks."""
    monkeypatch.setattr(InverseSpectrum, "REACH", reach)
    y = InverseSpectrum(640, 160, 1, "locked")(tone_maps(f, 16000, 640, 160, 100, 0.5))
    rms = y[0, 0, 4000:12000].unfold(0, 400, 400).pow(2).mean(1).sqrt()
    assert low < rms.mean() < high                       # a sine of amplitude 1 has .707
    assert (rms.std() < 0.05) == (reach > 0)


def test_locked_phases_turn_by_the_frequency_of_the_strongest_bin():
    inverse, frames = InverseSpectrum(64, 16, 1, "locked"), 9
    log = torch.full((1, 1, 33, frames), -50.0, dtype=torch.float64)
    log[:, :, 10] = 0.0
    delta = torch.zeros(1, 1, 33, frames, dtype=torch.float64)
    delta[:, :, 10] = 0.3
    turns, last = inverse.accumulate(log, delta)
    angle = (2 * math.pi * 10 * 16 / 64 + 0.3) * torch.arange(1, frames + 1, dtype=torch.float64)
    for k in (8, 9, 10, 11, 12):                         # the neighbours follow
        wrong = torch.remainder(turns[0, 0, k] - angle + 1, 2 * math.pi) - 1
        torch.testing.assert_close(wrong, torch.zeros_like(angle), atol=1e-12, rtol=0)
    torch.testing.assert_close(last, turns[..., -1] % (2 * math.pi))


@pytest.mark.parametrize("training", [False, True])      # with a gradient torch's own convolution
def test_transposed_convolution_counts_its_bias_once_when_streaming(training):
    layer, x = ConvTranspose(2, 3, 4), torch.randn(1, 2, 6)
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
    torch.nn.init.ones_(layer.conv.weight), torch.nn.init.zeros_(layer.conv.bias)
    y = layer(torch.arange(1.0, 13.0).view(1, 1, 12))
    assert y.flatten().tolist() == [10.0, 36.0, 68.0]    # 1..4, 1..8, 5..12


def test_kl_has_its_closed_form():
    mean, logvar = torch.tensor([[2.0]]), torch.tensor([[math.log(0.25)]])
    assert kl_loss(mean, logvar).item() == pytest.approx(0.5 * (4 + 0.25 - 1 - math.log(0.25)))
    assert kl_loss(torch.zeros(3), torch.zeros(3)) == 0


def test_spectral_losses_vanish_for_equal_signals_and_measure_a_gain_in_decades():
    x = torch.randn(2, 1, 4096)
    same = spectral_losses(x, x, 16000, [256, 512], ["mel", "stft"])
    assert all(v < 1e-3 for v in same.values())
    tenth = spectral_losses(x, x / 10, 16000, [256], ["mel", "stft"])
    assert tenth["mel"].item() == pytest.approx(1.0, abs=1e-2)                  # one decade
    assert tenth["stft"].item() == pytest.approx(0.9 + math.log(10), abs=3e-2)  # convergence + log


def test_mel_filters_cover_the_band_and_keep_the_level_of_a_flat_spectrum():
    filters = mel_filters(16000, 1024, 80)
    assert filters.shape == (80, 513) and (filters >= 0).all()
    filled = filters.sum(1) > 0
    torch.testing.assert_close((filters @ torch.ones(513))[filled], torch.ones(int(filled.sum())))


@pytest.mark.parametrize("encoder, decoder, block", KINDS)
def test_normalised_latents_come_back(encoder, decoder, block):
    net = vae(encoder, decoder, block)
    net.latent_mean.uniform_(-1, 1), net.latent_std.uniform_(0.5, 2)
    z = torch.randn(2, 3, 6)
    torch.testing.assert_close(net.denormalize(net.normalize(z)), z)


def gan(balance=0.0, **weights):
    torch.manual_seed(0)
    return VAEGAN(VAEConfig(**SMALL), GANConfig(
        loss_weights=weights, loss_windows=[256], balance=balance, disc_windows=[256, 128],
        disc_width=4))


def test_loss_weights_of_zero_are_not_computed_and_build_no_discriminator():
    model = gan(mel=1.0, time=0.0, adv=0.0, feat=0.0, kl=0.01)
    found = list(model.losses(torch.randn(1, 1, 640), 0))
    assert model.disc is None and [name for name, *_ in found] == ["vae"]
    assert found[0][2].keys() == {"mel", "kl"}
    total = found[0][2]["mel"] + 0.01 * found[0][2]["kl"]
    torch.testing.assert_close(found[0][1], total)


def test_each_adversarial_loss_moves_its_own_player_only():
    model, wav = gan(adv=1.0, feat=1.0), torch.randn(1, 1, 640)
    seen = {}
    for name, loss, _ in model.losses(wav, 0):
        loss.backward()
        # hinge: last biases cancel
        seen[name] = [[p.grad is not None and bool(p.grad.abs().sum() > 0)
                       for key, p in part.named_parameters()
                       if key.endswith(("weight", "original0", "original1"))]
                      for part in (model.vae.decoder, model.disc)]
        model.zero_grad(set_to_none=True)
    assert all(seen["vae"][0]) and not any(seen["vae"][1])
    assert not any(seen["disc"][0]) and all(seen["disc"][1])


@pytest.mark.parametrize("power, same", [(0.3, True), (1.0, False)])
def test_discriminators_of_compressed_spectra_hear_loud_and_quiet_alike(power, same):
    one, wav = STFTDiscriminator(64, 2, 4, power), torch.randn(2, 2, 640)
    assert torch.allclose(one(0.05 * wav)[0], one(wav)[0], atol=1e-4) == same
    assert not torch.allclose(one(wav * torch.tensor([[1.0], [0.1]]))[0], one(wav)[0], atol=1e-4)


def test_a_compressed_spectrum_keeps_its_phase_and_has_the_power_of_its_magnitude():
    seen = []
    one, wav = STFTDiscriminator(64, 1, 4, 0.3), torch.randn(1, 1, 640)
    one.convs[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    one(wav)
    x = stft(wav[0] / wav.pow(2).mean().sqrt(), 64) / 8                        # sqrt(64)
    found = torch.view_as_complex(seen[0].permute(0, 3, 2, 1).contiguous())
    loud = x.abs() > 0.03                                # far above the 1e-3 that keeps it smooth
    torch.testing.assert_close(found[loud], torch.polar(x.abs() ** 0.3, x.angle())[loud],
                               atol=0, rtol=1e-3)


def test_a_silent_clip_gives_the_generator_a_finite_gradient_through_compressed_spectra():
    wav = torch.zeros(1, 1, 640, requires_grad=True)
    STFTDiscriminator(64, 1, 4, 0.3)(wav)[0].sum().backward()
    assert wav.grad.isfinite().all()


def test_the_balancer_gives_each_loss_its_share_of_the_gradient():
    """EnCodec: λ_i / Σ λ of a gradient of norm 1 a row, whatever the losses' own scales."""
    balancer, weights = Balancer(["time", "mel"], 0.5), {"time": 1.0, "mel": 3.0}
    wav = torch.zeros(2, 1, 4, dtype=torch.float64, requires_grad=True)
    a, b = (torch.tensor(v, dtype=torch.float64) for v in ([1., 0, 0, 0], [0, 1., 0, 0]))
    rows = torch.tensor([[[0.5]], [[1.5]]], dtype=torch.float64)      # ‖g‖ is the mean over rows
    terms = lambda size: {"time": (wav * a * rows).sum(-1).mean() * size,
                          "mel": (wav * b).sum(-1).mean() * 1e-3}
    value = balancer(terms(100.0), weights, wav)
    value.backward()
    assert value.item() == 0.0
    torch.testing.assert_close(wav.grad * 2, a * rows / 4 + 3 * b / 4)                 # B = 2
    wav.grad = None
    balancer(terms(400.0), weights, wav).backward()      # running mean (.5 · 100 + 400) / 1.5 = 300
    torch.testing.assert_close(wav.grad * 2, a * rows / 4 * 4 / 3 + 3 * b / 4)
    before = balancer.norms.clone()
    balancer(terms(float("nan")), weights, wav)          # a step that train.py will skip
    assert balancer.norms[0] == before[0] and balancer.norms[1] != before[1]


def test_balanced_and_plain_losses_have_the_same_value():
    weights, found = dict(mel=2.0, adv=1.0, feat=1.0, kl=0.5), []
    for balance in (0.0, 0.9):
        model = gan(balance, **weights)
        torch.manual_seed(1)
        found.append(next(model.losses(torch.randn(1, 1, 800), 0))[1])
    torch.testing.assert_close(*found)


def test_the_balancer_knows_shares_only_and_leaves_the_kl_alone():
    grads = []
    for kl, mel in ((0.0, 1.0), (0.5, 1.0), (0.5, 100.0), (1.0, 1.0)):
        model = gan(0.9, kl=kl, mel=mel)
        torch.manual_seed(1)
        next(model.losses(torch.randn(1, 1, 800), 0))[1].backward()
        grads.append(model.vae.encoder.out.bias.grad)
    torch.testing.assert_close(grads[1], grads[2])       # the only loss on the waveform: share 1
    torch.testing.assert_close(grads[3] - grads[0], 2 * (grads[1] - grads[0]))
    assert (grads[1] - grads[0]).abs().max() > 0.01


def test_a_balancer_without_a_loss_on_the_waveform_waits():
    """Guards a crash: adv alone, its warm-up, and nothing to weigh yet."""
    model = gan(0.9, adv=1.0, kl=0.5)
    model.cfg.disc_warmup = 5
    (name, loss, found), (other, _, _) = model.losses(torch.randn(1, 1, 800), 0)
    assert (name, other) == ("vae", "disc") and found.keys() == {"kl"}
    torch.testing.assert_close(loss, 0.5 * found["kl"])
    model = gan(adv=1.0)
    model.cfg.disc_warmup = 5
    assert [name for name, *_ in model.losses(torch.randn(1, 1, 800), 0)] == ["disc"]


def test_discriminators_hear_the_same_part_of_the_original_and_of_the_reconstruction():
    """With a model that returns its input every feature matches."""
    model, heard = gan(adv=1.0, feat=1.0), []
    model.cfg.disc_seconds = 0.01
    model.vae.forward = lambda wav: (wav * torch.ones((), requires_grad=True), None, {})
    model.disc.register_forward_pre_hook(lambda _, x: heard.append(x[0].detach()))
    wav = torch.randn(1, 1, 800)
    for step in range(3):
        assert [found.get("feat", 0.0) for *_, found in model.losses(wav, step)] == [0.0, 0.0]
    assert {part.shape[-1] for part in heard} == {160}                       # .01 s of 16 kHz
    first, second = heard[0], heard[4]                                        # four a step
    assert torch.equal(heard[0], heard[3]) and not torch.equal(first, second)


def test_the_config_reaches_discriminators_and_balancer():
    model = VAEGAN(VAEConfig(**SMALL),
                   GANConfig(disc_width=4, disc_power=0.4, balance=0.7))
    assert {d.power for d in model.disc.each} == {0.4} and model.balancer.decay == 0.7


def test_the_discriminator_learns_to_tell_real_from_fake():
    model, g = gan(adv=1.0, feat=1.0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.disc.parameters(), 3e-3)
    first = last = None
    for _ in range(30):
        t = torch.arange(640) / 16000
        wav = torch.sin(2 * math.pi * 400 * t + 6 * torch.rand(4, 1, 1, generator=g))
        (_, _, _), (_, loss, _) = model.losses(wav, 0)
        first, last = first or loss.item(), loss.item()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert first > 1.9 and last < 1.4                 # 2 is guessing (measured 1.13)


def test_adversarial_losses_wait_for_their_step():
    model = gan(mel=1.0, adv=1.0, feat=1.0)
    model.cfg.disc_start = 5
    names = lambda step: [name for name, *_ in model.losses(torch.randn(1, 1, 640), step)]
    assert names(4) == ["vae"] and names(5) == ["vae", "disc"]


def test_the_generator_hears_the_discriminators_only_after_their_warm_up():
    model = gan(mel=1.0, adv=1.0, feat=1.0)
    model.cfg.disc_start, model.cfg.disc_warmup = 2, 3

    def metrics(step):
        return {k for _, _, found in model.losses(torch.randn(1, 1, 800), step) for k in found}
    assert "disc" not in metrics(1)
    assert "disc" in metrics(2) and not metrics(4) & {"adv", "feat"}
    assert {"adv", "feat", "disc"} <= metrics(5)


@pytest.mark.parametrize("changes, message", [
    (dict(encoder="fft"), "encoder"), (dict(ratios=[]), "ratios"),
    (dict(stft_hop=7, decoder="istft"), "stft_hop"),
    (dict(heads=5), "heads"), (dict(latent_dim=0), "latent_dim"),
    (dict(encoder="stft", encoder_windows=[7]), "encoder_windows"),
    (dict(encoder_windows=[160]), "encoder_windows")])
def test_impossible_configs_are_refused_by_name(changes, message):
    with pytest.raises(BadInput, match="vae." + message):
        build(VAEConfig, {**SMALL, **changes}, "vae")


@pytest.mark.parametrize("changes, message", [
    (dict(loss_weights={"l1": 1.0}), "loss_weights"), (dict(disc_power=0.0), "disc_power"),
    (dict(disc_seconds=0.01), "disc_seconds"), (dict(balance=1.0), "balance"),
    (dict(disc_power=0.3, loss_weights={"adv": 1.0}), "disc_power")])
def test_impossible_losses_are_refused_by_name(changes, message):
    with pytest.raises(BadInput, match="gan." + message):
        build(Config, {"vae": SMALL, "gan": changes})
