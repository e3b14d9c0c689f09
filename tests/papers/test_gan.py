"""The losses of eq. 2 are what their formulas say, and reach whom they should."""
import math

import pytest
import torch

from cli import BadInput
from config import Config
from gan import (VAEGAN, Balancer, GANConfig, STFTDiscriminator, feature_loss, hinge_loss,
                 mel_filters, phase_loss, spectral_losses, stft)
from schema import build
from vae import VAEConfig

SMALL = dict(sample_rate=16000, ratios=[4, 5, 4, 2], stft_hop=40, width=8, width_max=32, dim=32,
             heads=2, encoder_layers=1, decoder_layers=1, context=0.05, latent_dim=6, res_layers=2,
             encoder="conv", decoder="conv", block="seanet")


def small_gan(balance=0.0, **weights):
    torch.manual_seed(0)
    return VAEGAN(VAEConfig(**SMALL), GANConfig(
        loss_weights=weights, loss_windows=[256], balance=balance, disc_windows=[256, 128],
        disc_width=4))


def test_spectral_losses_vanish_for_equal_signals_and_measure_a_gain_in_decades():
    x = torch.randn(2, 1, 4096)
    same = spectral_losses(x, x, 16000, [256, 512], ["mel", "stft"])
    assert all(v < 1e-3 for v in same.values())
    tenth = spectral_losses(x, x / 10, 16000, [256], ["mel", "stft"])
    assert tenth["mel"].item() == pytest.approx(1.0, abs=1e-2)                  # one decade
    assert tenth["stft"].item() == pytest.approx(0.9 + math.log(10), abs=3e-2)  # convergence + log


def test_the_magnitude_loss_is_zero_where_the_decoder_asks_for_the_original():
    """Exact in float64; convergence and log of a spectrum that is a tenth."""
    torch.manual_seed(0)
    vae = VAEConfig(**{**SMALL, "decoder": "istft", "phase": "locked", "stft_hop": 16,
                       "ratios": [2, 4, 4]})
    model = VAEGAN(vae, GANConfig(loss_weights={"magnitude": 1.0}, loss_floor=1e-9))
    inverse = model.vae.decoder.conv[-1]
    wav = torch.randn(2, 1, 640, dtype=torch.float64)
    maps = inverse.spectrum(wav).abs().flatten(1, 2).log()
    assert model.inverse_terms(wav, maps)["magnitude"] < 2e-4           # sqrt(1e-8), see gan.py
    tenth = model.inverse_terms(wav, maps - math.log(10))["magnitude"].item()
    assert tenth == pytest.approx(0.9 + math.log(10), abs=1e-4)


@pytest.mark.parametrize("axis, expected", [
    (None, 0.5), (1, 2 * math.pi / 5 + math.pi), (2, 4 * math.pi / 9 + math.pi)],
    ids=["constant", "along bins", "along frames"])
def test_the_phase_loss_adds_the_phase_its_group_delay_and_its_frequency(axis, expected):
    """A constant error of 0.5 counts once. One of πk in bin (frame) k is 0 or π without its whole
    turns, and π in the difference of neighbours.
    """
    X = torch.polar(torch.ones(2, 5, 9, dtype=torch.float64), 9 * torch.rand(2, 5, 9).double())
    error = torch.full((2, 5, 9), 0.5, dtype=torch.float64)
    if axis:
        shape = [-1 if axis == i else 1 for i in range(3)]
        steps = math.pi * torch.arange(X.shape[axis], dtype=torch.float64)
        error = steps.view(shape).expand(2, 5, 9)
    turns = 2 * math.pi * torch.randint(-3, 4, (2, 5, 9)).double()
    loss = phase_loss(X, X.angle() - error + turns, 0.0)
    assert loss.item() == pytest.approx(expected, abs=1e-9)


def test_a_bin_of_silence_has_no_phase_to_miss():
    X = torch.polar(torch.ones(1, 6, 8, dtype=torch.float64), torch.rand(1, 6, 8).double())
    X[:, 3:] = 0.0
    p = torch.rand(1, 6, 8).double()
    p[:, :3] = X.angle()[:, :3]
    assert phase_loss(X, p, 1e-3).item() == pytest.approx(0.0, abs=1e-9)
    p = p.requires_grad_()
    phase_loss(X, p + 0.1, 1e-3).backward()
    assert p.grad[:, :3].any() and not p.grad[:, 3:].any()


def test_the_phase_loss_compares_what_the_decoder_asks_its_inverse_stft_for():
    vae = VAEConfig(**{**SMALL, "decoder": "istft", "stft_hop": 16, "ratios": [2, 4, 4]})
    model = VAEGAN(vae, GANConfig(loss_weights={"phase": 1.0}))
    X = model.vae.decoder.conv[-1].spectrum(wav := torch.randn(2, 1, 640, dtype=torch.float64))
    maps = torch.cat([X.abs().log(), X.angle()], 1).flatten(1, 2)
    assert model.inverse_terms(wav, maps)["phase"].item() == pytest.approx(0.0, abs=1e-6)


def test_mel_filters_cover_the_band_and_keep_the_level_of_a_flat_spectrum():
    filters = mel_filters(16000, 1024, 80)
    assert filters.shape == (80, 513) and (filters >= 0).all()
    filled = filters.sum(1) > 0
    torch.testing.assert_close((filters @ torch.ones(513))[filled], torch.ones(int(filled.sum())))


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
    features = model.teacher(wav, 150)
    assert features.shape == (2, 150, 12) and not features.requires_grad
    # scaled to zero mean and unit variance: the level does not matter
    torch.testing.assert_close(model.teacher(3 * wav, 150), features, atol=1e-3, rtol=0)

    torch.manual_seed(0)
    (_, total, terms), = model.losses(wav[..., :160 * 150], 0)
    torch.manual_seed(0)
    z = model.vae(wav)[2]
    expected = 1 - torch.cosine_similarity(model.to_teacher(z), features, dim=-1).mean()
    torch.testing.assert_close(terms["distill"], expected)
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


def test_loss_weights_of_zero_are_not_computed_and_build_no_discriminator():
    model = small_gan(mel=1.0, time=0.0, adv=0.0, feat=0.0, kl=0.01)
    (name, loss, terms), = model.losses(torch.randn(1, 1, 640), 0)
    assert model.disc is None and name == "vae"
    assert terms.keys() == {"mel", "kl"}
    torch.testing.assert_close(loss, terms["mel"] + 0.01 * terms["kl"])


def test_each_adversarial_loss_moves_its_own_player_only():
    model = small_gan(adv=1.0, feat=1.0)
    wav = torch.randn(1, 1, 640)

    def moved(part):                                     # no biases: in the hinge the last cancel
        return [p.grad is not None and bool(p.grad.abs().sum() > 0)
                for key, p in part.named_parameters()
                if key.endswith(("weight", "original0", "original1"))]

    players = {}
    for name, loss, _ in model.losses(wav, 0):
        loss.backward()
        players[name] = (moved(model.vae.decoder), moved(model.disc))
        model.zero_grad(set_to_none=True)
    decoder, disc = players["vae"]
    assert all(decoder) and not any(disc)
    decoder, disc = players["disc"]
    assert not any(decoder) and all(disc)


@pytest.mark.parametrize("power, same", [(0.3, True), (1.0, False)])
def test_discriminators_of_compressed_spectra_hear_loud_and_quiet_alike(power, same):
    discriminator = STFTDiscriminator(64, 2, 4, power)
    wav = torch.randn(2, 2, 640)
    logits, _ = discriminator(wav)
    quiet, _ = discriminator(0.05 * wav)
    one_channel_quiet, _ = discriminator(wav * torch.tensor([[1.0], [0.1]]))
    assert torch.allclose(quiet, logits, atol=1e-4) == same
    assert not torch.allclose(one_channel_quiet, logits, atol=1e-4)


def test_a_compressed_spectrum_keeps_its_phase_and_has_the_power_of_its_magnitude():
    discriminator = STFTDiscriminator(64, 1, 4, 0.3)
    wav = torch.randn(1, 1, 640)
    inputs = []
    discriminator.convs[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    discriminator(wav)
    X = stft(wav[0] / wav.pow(2).mean().sqrt(), 64) / 8                        # sqrt(64)
    compressed = torch.view_as_complex(inputs[0].permute(0, 3, 2, 1).contiguous())
    loud = X.abs() > 0.03                                # far above the 1e-3 that keeps it smooth
    torch.testing.assert_close(compressed[loud], torch.polar(X.abs() ** 0.3, X.angle())[loud],
                               atol=0, rtol=1e-3)


def test_a_silent_clip_gives_the_generator_a_finite_gradient_through_compressed_spectra():
    wav = torch.zeros(1, 1, 640, requires_grad=True)
    STFTDiscriminator(64, 1, 4, 0.3)(wav)[0].sum().backward()
    assert wav.grad.isfinite().all()


def test_the_balancer_gives_each_loss_its_share_of_the_gradient():
    """EnCodec: λ_i / Σ λ of a gradient of norm 1 per row, whatever the scales of the losses."""
    balancer = Balancer(["time", "mel"], 0.5)
    weights = {"time": 1.0, "mel": 3.0}
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
    # running mean (0.5 · 100 + 400) / 1.5 = 300
    balancer(terms(400.0), weights, wav).backward()
    torch.testing.assert_close(wav.grad * 2, a * rows / 4 * 4 / 3 + 3 * b / 4)
    before = balancer.norms.clone()
    balancer(terms(float("nan")), weights, wav)          # a step that train.py will skip
    assert balancer.norms[0] == before[0] and balancer.norms[1] != before[1]


def test_balanced_and_plain_losses_have_the_same_value():
    values = []
    for balance in (0.0, 0.9):
        model = small_gan(balance, mel=2.0, adv=1.0, feat=1.0, kl=0.5)
        torch.manual_seed(1)
        _, loss, _ = next(model.losses(torch.randn(1, 1, 800), 0))
        values.append(loss)
    torch.testing.assert_close(*values)


def test_the_balancer_knows_shares_only_and_leaves_the_kl_alone():
    grads = []
    for kl, mel in ((0.0, 1.0), (0.5, 1.0), (0.5, 100.0), (1.0, 1.0)):
        model = small_gan(0.9, kl=kl, mel=mel)
        torch.manual_seed(1)
        next(model.losses(torch.randn(1, 1, 800), 0))[1].backward()
        grads.append(model.vae.encoder.out.bias.grad)
    torch.testing.assert_close(grads[1], grads[2])       # the only loss on the waveform: share 1
    torch.testing.assert_close(grads[3] - grads[0], 2 * (grads[1] - grads[0]))
    assert (grads[1] - grads[0]).abs().max() > 0.01


def test_a_balancer_without_a_loss_on_the_waveform_waits():
    """Guards a crash: adv alone, its warm-up, and nothing to weigh yet."""
    model = small_gan(0.9, adv=1.0, kl=0.5)
    model.cfg.disc_warmup = 5
    (name, loss, terms), (other, _, _) = model.losses(torch.randn(1, 1, 800), 0)
    assert (name, other) == ("vae", "disc") and terms.keys() == {"kl"}
    torch.testing.assert_close(loss, 0.5 * terms["kl"])
    model = small_gan(adv=1.0)
    model.cfg.disc_warmup = 5
    assert [name for name, *_ in model.losses(torch.randn(1, 1, 800), 0)] == ["disc"]


def test_discriminators_hear_the_same_part_of_the_original_and_of_the_reconstruction():
    """With a model that returns its input every feature matches."""
    model = small_gan(adv=1.0, feat=1.0)
    crops = []
    model.cfg.disc_seconds = 0.01
    model.vae.forward = lambda wav, source: (wav * torch.ones((), requires_grad=True), None, None,
                                             {})
    model.disc.register_forward_pre_hook(lambda _, args: crops.append(args[0].detach()))
    wav = torch.randn(1, 1, 800)
    for step in range(3):
        assert [terms.get("feat", 0.0) for *_, terms in model.losses(wav, step)] == [0.0, 0.0]
    assert {crop.shape[-1] for crop in crops} == {160}                       # 0.01 s at 16 kHz
    # three per step: x for both, x̂ for the generator, x̂ for the discriminators
    assert len(crops) == 9
    assert torch.equal(crops[0], crops[2]) and not torch.equal(crops[0], crops[3])


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_three_passes_of_the_discriminators_give_the_gradients_of_four(balance):
    """Fault: the original went through the discriminators twice per step."""
    model = small_gan(balance, adv=1.0, feat=2.0)
    wav = torch.randn(2, 1, 640)
    passes = []
    model.disc.register_forward_pre_hook(lambda *_: passes.append(1))
    gradients = {}
    torch.manual_seed(1)
    for name, loss, _ in model.losses(wav, 0):
        loss.backward()
        gradients[name] = {key: p.grad.clone() for key, p in model.named_parameters()
                           if p.grad is not None}
        model.zero_grad(set_to_none=True)
    assert len(passes) == 3
    assert all(key.startswith("disc.") for key in gradients["disc"])

    # the discriminators: two passes of their own
    torch.manual_seed(1)
    rec, *_ = model.vae(wav)
    hinge_loss(model.disc(wav), model.disc(rec.detach())).backward()
    for key, p in model.disc.named_parameters():
        assert torch.equal(p.grad, gradients["disc"][f"disc.{key}"]), key
    model.zero_grad(set_to_none=True)

    # the generator: two more, the original's without gradient
    if not balance:
        with torch.no_grad():
            real = model.disc(wav)
        fake = model.disc(rec)
        adv = -sum(logits.mean() for logits, _ in fake) / len(fake)
        (adv + 2 * feature_loss(real, fake)).backward()
        for key, p in model.vae.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(p.grad, gradients["vae"][f"vae.{key}"])


def test_the_config_reaches_discriminators_and_balancer():
    model = VAEGAN(VAEConfig(**SMALL),
                   GANConfig(loss_weights={"mel": 1.0, "adv": 1.0}, disc_width=4,
                             disc_power=0.4, balance=0.7))
    assert {d.power for d in model.disc.each} == {0.4} and model.balancer.decay == 0.7


def test_the_discriminator_learns_to_tell_real_from_fake():
    model = small_gan(adv=1.0, feat=1.0)
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.disc.parameters(), 3e-3)
    seconds = torch.arange(640) / 16000
    values = []
    for _ in range(30):
        wav = torch.sin(2 * math.pi * 400 * seconds + 6 * torch.rand(4, 1, 1, generator=g))
        (_, _, _), (_, loss, _) = model.losses(wav, 0)
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[0] > 1.9 and values[-1] < 1.4       # 2 is guessing (measured 1.13)


def test_adversarial_losses_wait_for_their_step():
    model = small_gan(mel=1.0, adv=1.0, feat=1.0)
    model.cfg.disc_start = 5
    names = lambda step: [name for name, *_ in model.losses(torch.randn(1, 1, 640), step)]
    assert names(4) == ["vae"] and names(5) == ["vae", "disc"]


def test_the_generator_hears_the_discriminators_only_after_their_warm_up():
    model = small_gan(mel=1.0, adv=1.0, feat=1.0)
    model.cfg.disc_start, model.cfg.disc_warmup = 2, 3

    def metrics(step):
        return {k for _, _, terms in model.losses(torch.randn(1, 1, 800), step) for k in terms}

    assert "disc" not in metrics(1)
    assert "disc" in metrics(2) and not metrics(4) & {"adv", "feat"}
    assert {"adv", "feat", "disc"} <= metrics(5)


@pytest.mark.parametrize("changes, message", [
    (dict(loss_weights={"l1": 1.0}), "loss_weights"), (dict(disc_power=0.0), "disc_power"),
    (dict(disc_seconds=0.01), "disc_seconds"), (dict(balance=1.0), "balance"),
    (dict(disc_power=0.3, loss_weights={"adv": 1.0}), "disc_power")])
def test_impossible_losses_are_refused_by_name(changes, message):
    with pytest.raises(BadInput, match="gan." + message):
        build(Config, {"vae": SMALL, "gan": changes})
