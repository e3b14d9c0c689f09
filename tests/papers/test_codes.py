"""CALM over RVQ codes, the discrete baseline: the same guarantees as over latents, end to end."""
import json
import os
import sys

import numpy as np
import pytest
import soundfile as sf
import torch

import evaluate
import prompts
import runs
import sample
import train
from backbone import BackboneConfig
from calm import CALM, CALMConfig
from config import Config, build, open_run
from cli import BadInput
from data import Clip, DataConfig
from latents import LatentBatches, LatentCache
from discrete import MISSING, delay_codes
from heads import HeadConfig
from vae import VAE, VAEConfig

KINDS = ("speech", "sound", "music")
K, N, VOCAB = 3, 11, 260


def model(objective, short_layers=1, monologue=False, **changes):
    torch.manual_seed(0)
    cfg = CALMConfig(backbone=BackboneConfig(dim=32, layers=2, heads=2), short_layers=short_layers,
                     short_context=3, monologue=monologue, acoustic_delay=2,
                     head=HeadConfig(objective=objective, width=16, blocks=1, depth_heads=2),
                     **changes)
    net = CALM(cfg, 5, VOCAB, KINDS, codes=(K, N))
    for p in net.parameters():                       # zero-initialised layers would hide everything
        p.data += 0.1 * torch.randn_like(p)
    net.eos.bias.data.fill_(-100.0)
    return net.eval()


def batch(B=4, T=6):
    torch.manual_seed(1)
    return {"x": torch.randint(0, N, (B, T, K)), "frames": torch.tensor([6, 4, 6, 2])[:B],
            "text": torch.randint(0, VOCAB, (B, 5)),
            "ended": torch.tensor([True, True, False, True]),
            "text_len": torch.tensor([5, 2, 1, 3]), "prompt": torch.randint(0, N, (B, 3, K)),
            "prompt_len": torch.tensor([0, 3, 1, 0]), "kind": torch.tensor([0, 1, 2, 0]),
            "words": torch.zeros(B, T, 1, dtype=torch.long), "aligned": torch.ones(B).bool()}


def recorded(net):
    """The inputs of the backbone's embedding of codes, of the text embedding and of the head."""
    codes, tokens, conditions = [], [], []
    embed, embed_text, sample_head = net.latent.forward, net.text.forward, net.head.sample
    net.latent.forward = lambda x: codes.append(x) or embed(x)
    net.text.forward = lambda ids: tokens.append(ids) or embed_text(ids)
    net.head.sample = lambda z, **options: conditions.append(z) or sample_head(z, **options)
    return codes, tokens, conditions


@pytest.mark.parametrize("monologue", [False, True])
@pytest.mark.parametrize("objective", ["rq", "delay"])
def test_generation_step_by_step_equals_the_training_pass_over_what_was_generated(
        objective, monologue):
    net, text = model(objective, monologue=monologue), torch.tensor([[1, 97], [1, 98]])
    history, prompt = torch.randint(0, N, (2, 4, K)), torch.randint(0, N, (2, 3, K))
    _, tokens, conditions = recorded(net)
    sampled = [x for x, _ in net.generate(
        text, kind=0 if monologue else 1, max_frames=5, prompt=prompt, history=history,
        generator=torch.Generator().manual_seed(0))]
    frames = torch.cat([history, torch.stack(sampled, 1)], 1)               # (2, 9, K)
    assert frames.shape == (2, 9, K) and 0 <= frames.min() and frames.max() < N
    x = delay_codes(frames)[:, :9] if objective == "delay" else frames
    words = None
    if monologue:                                    # PAD beside the history; embedded first
        steps = [ids for ids in tokens if ids.shape == (2,)][1:]
        words = torch.cat([torch.full((2, 4), 256), torch.stack(steps, 1)], 1)[:, :9, None]
        text = text[:, :1]
    length = torch.full((2,), text.shape[1])
    z = net.condition(x, text, length, prompt, torch.tensor([3, 3]), words)[:, net.acoustic_delay:]
    if not monologue:                                # speech, which has no short branch
        z = z + net.short(torch.cat([net.short_bos.expand(2, 1, -1), net.short_latent(x)], 1))
    torch.testing.assert_close(torch.stack(conditions[:5], 1), z[:, 4:9], atol=1e-5, rtol=0)


@pytest.mark.parametrize("objective", ["rq", "delay"])
def test_history_continues_as_if_it_had_been_generated(objective):
    net, text = model(objective), torch.randint(0, VOCAB, (2, 4))
    run = lambda n, history=None: torch.stack([x for x, _ in net.generate(
        text, kind=2, max_frames=n, history=history, temperature=0)], 1)
    whole = run(8)
    assert whole.float().std() > 1                   # not the same code all over
    for n in (1, 2, 5):
        assert torch.equal(run(8 - n, whole[:, :n]), whole[:, n:])


def test_with_delay_a_row_that_ends_is_fed_what_training_feeds_and_yields_its_last_frame_whole():
    net, text = model("delay"), torch.randint(0, VOCAB, (2, 4))
    codes, _, _ = recorded(net)
    eos = iter(range(1, 100))                        # evaluated before steps 1, 2, ...
    net.eos.forward = lambda z: torch.tensor([[1.0 if next(eos) >= 3 else -1.0], [-1.0]])
    sampled = list(net.generate(text, kind=0, max_frames=6,
                                generator=torch.Generator().manual_seed(0)))
    assert [ended.tolist() for _, ended in sampled] == [[i >= 3, False] for i in range(6)]
    frames = torch.stack([x for x, _ in sampled], 1)[:1, :3]                # row 0 has 3 frames
    padded = torch.cat([frames, torch.full((1, 3, K), MISSING)], 1)
    fed = torch.stack(codes[1:], 1)[:1]              # step by step, after an empty history
    assert torch.equal(fed[:, :6], delay_codes(padded)[:, :6])
    net, text = model("delay"), text[:1]
    net.eos.forward = lambda z: torch.ones(1, 1)     # ends as soon as it may
    assert len(list(net.generate(text, kind=0, max_frames=6))) == 1


@pytest.mark.parametrize("objective", ["rq", "delay"])
def test_no_code_of_the_future_reaches_the_condition_of_a_step(objective):
    net, b = model(objective), batch()
    x = delay_codes(b["x"]) if objective == "delay" else b["x"]
    def rows(x):
        z = net.condition(x, b["text"], b["text_len"], b["prompt"], b["prompt_len"])
        return z + net.short(torch.cat([net.short_bos.expand(4, 1, -1), net.short_latent(x)], 1))
    base = rows(x)
    for s in range(x.shape[1]):
        other = x.clone()
        other[:, s] = torch.where(x[:, s] == MISSING, MISSING, (x[:, s] + 1) % N)
        moved = (rows(other) - base).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [row > s for row in range(x.shape[1] + 1)]


@pytest.mark.parametrize("objective", ["rq", "delay"])
def test_the_loss_is_the_likelihood_of_the_valid_codes_and_noise_touches_nothing(objective):
    net = model(objective, prefix_dropout=0.0, eos_weight=0.0, noise=1.0, short_noise=1.0)
    b = batch()
    loss, metrics = net.loss(b)
    assert torch.equal(loss, net.loss(b)[0])         # nothing random is left
    x = b["x"].masked_fill(torch.arange(6)[:, None] >= b["frames"][:, None, None], MISSING)
    x = delay_codes(x) if objective == "delay" else x
    z = net.condition(x, b["text"], b["text_len"], b["prompt"], b["prompt_len"])
    z = z + (b["kind"] > 0)[:, None, None] * net.short(
        torch.cat([net.short_bos.expand(4, 1, -1), net.short_latent(x)], 1))
    valid = (x != MISSING).any(-1)
    torch.testing.assert_close(loss, net.head.loss(z[:, :-1][valid], x[valid])[0].mean())
    assert valid.sum(1).tolist() == [n + (K - 1 if objective == "delay" else 0)
                                     for n in b["frames"].tolist()]
    behind = b["x"].clone()
    behind[torch.arange(6) >= b["frames"][:, None]] = 5
    torch.testing.assert_close(net.loss(b | {"x": behind})[0], loss)


@pytest.mark.parametrize("monologue", [False, True])
@pytest.mark.parametrize("objective", ["rq", "delay"])
def test_every_part_learns(objective, monologue):
    net, b = model(objective, monologue=monologue, prefix_dropout=0.0), batch()
    net.loss(b)[0].backward()
    silent = [name for name, p in net.named_parameters()
              if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


# ------------------------------------------------------------------------------------ data path

def test_codes_decode_to_what_the_vae_encodes_to():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(encoder="conv", decoder="conv", block="seanet",
                        sample_rate=800, ratios=[4, 2], width=4, dim=16, heads=1, latent_dim=6,
                        encoder_layers=1, decoder_layers=1, bottleneck="rvq", codebooks=K,
                        codebook_size=N)).eval()
    wav = torch.randn(2, 1, 101)
    vae.latent_mean.fill_(3.0)                       # must not be added to codes
    codes = vae.encode_codes(wav)
    assert codes.shape == (2, 13, K) and codes.dtype == torch.int64
    torch.testing.assert_close(vae.denormalize(codes), vae.encode(wav)[0])
    torch.testing.assert_close(vae.denormalize(codes[:, 4]), vae.encode(wav)[0][:, 4])
    assert torch.equal(prompts.encode_prompt(model("rq"), vae, wav), codes)


def test_the_cache_keeps_codes_exactly_and_batches_are_windows_of_them(tmp_path):
    path = str(tmp_path / "a.wav")
    sf.write(path, np.sin(np.arange(800)) * 0.5, 800)
    clips, rng = [Clip(audio=path, kind="sound")], torch.Generator().manual_seed(0)
    codes = torch.randint(0, 32768, (1, 100, K), generator=rng)
    codes[0, 0] = torch.tensor([0, 2049, 32767])     # float16 would lose these
    how = dict(folder=str(tmp_path), sample_rate=800, channels=1, hop=8, dim=5, levels=K,
               show=False)
    cache = LatentCache.build(clips, lambda wav: codes, key="k", **how)
    assert cache.get(0).dtype == np.int16 and (cache.get(0) == codes[0].numpy()).all()
    rows = LatentBatches(clips, cache, DataConfig(frames=40, prompt_frames=4), 4, 5)
    rows = rows(0, range(4))
    assert rows["x"].dtype == torch.int64 and rows["x"].shape == (4, 40, K)
    for x in rows["x"]:
        assert any(torch.equal(x, codes[0, s:s + 40]) for s in range(61))
    with pytest.raises(ValueError, match="int16"):
        LatentCache.build(clips, lambda wav: codes + 1, key="l", **how)


def test_a_discrete_head_without_codes_is_one_line():
    for objective in ("rq", "delay"):
        with pytest.raises(BadInput, match="^lm.head.objective: .* vae.bottleneck = \"rvq\""):
            build(Config, {"lm": {"head": {"objective": objective}}})
        build(Config, {"lm": {"head": {"objective": objective}}, "vae": {"bottleneck": "rvq"}})


QUICK = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),
                     "configs", "rq_quick.toml")
SMALL = {"toy.clips": 12, "toy.valid_clips": 6, "vae.width": 2, "vae.width_max": 16, "vae.dim": 16,
         "vae.heads": 2, "vae.codebook_size": 16, "vae.codebooks": 3, "data.frames": 16,
         "data.crop_seconds": 0.4, "data.prompt_frames": 4, "lm.backbone.dim": 16,
         "lm.backbone.layers": 1, "lm.backbone.heads": 2, "lm.head.width": 16, "lm.head.blocks": 1,
         "lm.head.depth_heads": 2, "train.vae.steps": 3, "train.vae.batch": 4, "train.lm.steps": 4,
         "train.lm.batch": 4, "sample.seconds": 0.4, "sample.count": 1, "threads": 1,
         "device": "cpu"}


def test_training_sampling_and_judging_work_as_with_latents(tmp_path, monkeypatch, capsys):
    def command(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()
    monkeypatch.setattr(runs, "draw_spectrograms", lambda *a, **k: None)  # test_train.py has them
    monkeypatch.setattr(runs, "draw_losses", lambda *a, **k: None)
    out, wav = f"{tmp_path}/run", f"{tmp_path}/a.wav"
    overrides = [text for k, v in SMALL.items() for text in (f"--{k}", v)]
    for objective in ("rq", "delay"):                # the second finds the VAE trained
        command(train, "--config", QUICK, "--out", out, "--lm.head.objective", objective,
                *overrides)
        cfg, vae, lm, stage = open_run(out)
        assert stage == "lm" and lm.cfg.head.objective == objective and vae.quantizer is not None
        assert os.path.exists(f"{out}/samples/step00000004_lm_speech1.wav")
        with open(f"{out}/log.jsonl") as f:
            rows = [json.loads(line) for line in f]
        assert rows[-1]["valid_head"] < 1.2 * np.log(16)
        clip = f"{out}/samples/step00000003_vae_music1_original.wav"
        for extra in (["--text", "one two", "--stream"], ["--prompt", clip, "--kind", "music"],
                      ["--text", "one", "--prompt", clip]):
            command(sample, "--run", out, "--out", wav, "--seconds", 0.3, *extra)
            made, rate = sf.read(wav)
            assert rate == cfg.vae.sample_rate and len(made) >= cfg.vae.hop

        # there are no steps to choose. Fault: --steps was taken and ignored
        for module, *rest in ((sample, "--text", "one", "--out", wav), (evaluate, "--limit", 1)):
            with pytest.raises(BadInput, match=f"--steps: .* head of {objective} are drawn once"):
                command(module, "--run", out, "--steps", 4, *rest)
        if objective == "rq":
            os.remove(f"{out}/lm.pt")
    command(evaluate, "--run", out, "--limit", 1, "--repeats", 1, "--json", f"{tmp_path}/f.json")
    with open(f"{tmp_path}/f.json") as f:
        assert json.load(f)["lm"]["objective"] == "delay"
    assert "generation, lm: delay: facts right" in capsys.readouterr().out
