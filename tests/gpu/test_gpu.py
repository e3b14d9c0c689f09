"""What only a CUDA device can show; skipped without one: python -m pytest -m gpu tests/gpu

Compiled bf16 is compared with eager fp32 on the same device and the same random numbers
(inductor's own are switched off), fp32 on the device with fp32 on the CPU.
"""
import copy
import json

import pytest
import torch
import torch._inductor.config

from config import load, make_model
from conftest import ROOT, TINY, logged, run, write
from plan import RandomRows, random_audio, random_latents
from vae import VAE

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# what is trained: (config, stage, changes)
OBJECTIVES = {
    "trigflow": ("quickstart", "lm", []),
    "consistency": ("quickstart", "consistency", []),
    "rectified flow": ("paper/pocket_tts", "lm", ["--lm.head.objective", "rectified_flow"]),
    "lsd": ("paper/pocket_tts", "lm", []),
    "monologue": ("flite_tts", "consistency", []),
    "rq": ("rq_quick", "lm", []),
    "audiocalm flow": ("audiocalm_quick", "audiocalm", []),
    "audiocalm lsd": ("audiocalm_quick", "audiocalm_lsd", []),
}


def small(config, changes):
    """A shipped config with short rows and few, narrow layers."""
    less = ["--data.frames", "24", "--data.text_len", "12", "--lm.backbone.layers", "2",
            "--data.prompt_frames", "6", "--lm.backbone.dim", "128", "--lm.backbone.mlp_dim", "0",
            "--audiocalm.backbone.layers", "2"]
    return load(f"{ROOT}/configs/{config}.toml", [*less, *changes])


@pytest.fixture(autouse=True)
def exact_products_and_torch_random_numbers():
    """fp32 products without TF32; compiled code draws the random numbers that eager code draws."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    torch.backends.cudnn.allow_tf32 = False
    with torch._inductor.config.patch(fallback_random=True):
        yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = True


def loss_and_gradient(model, batch, bf16):
    """The loss and the norm of the gradient, with the random numbers of seed 1."""
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        loss, _ = model.loss(dict(batch))
        with torch.autocast("cuda", enabled=False):
            loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.nn.utils.get_total_norm(grads).item()


@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-3), (True, 3e-2)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_compiled_objective_gives_the_eager_loss_and_gradient(name, bf16, tolerance):
    config, stage, changes = OBJECTIVES[name]
    cfg = small(config, changes)
    torch.manual_seed(0)
    model = make_model(cfg, stage).cuda().train()
    batch = random_latents(cfg, stage, 6, model.monologue)
    batch = {k: v.cuda() for k, v in batch.items()}

    expected = loss_and_gradient(model, batch, bf16=False)
    model.compile_for_training()
    found = loss_and_gradient(model, batch, bf16)
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("config", ["quickstart", "real_gan", "rq_quick", "audiocalm_quick"])
def test_the_vae_gives_the_same_on_both_devices(config):
    cfg = small(config, [])
    torch.manual_seed(0)
    vae = VAE(cfg.vae).eval()
    on_gpu = copy.deepcopy(vae).cuda()
    wav = random_audio(cfg, 2)["audio"]
    with torch.no_grad():
        mean, _ = vae.encode(wav)
        found = on_gpu.encode(wav.cuda())[0].cpu()
        torch.testing.assert_close(found, mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(on_gpu.decode(mean.cuda()).cpu(), vae.decode(mean),
                                   rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", ["quickstart", "rq_quick", "paper/pocket_tts"])
def test_a_compiled_vae_gan_gives_the_eager_losses(config):
    cfg = load(f"{ROOT}/configs/{config}.toml", ["--data.crop_seconds", "1"])
    torch.manual_seed(0)
    trainer = RandomRows(cfg, "vae", 2, "cuda")

    def losses():
        torch.manual_seed(1)
        with torch.no_grad():
            return [loss.item() for _, loss, _ in trainer.losses(trainer.batch, 10 ** 6)]

    expected = losses()
    trainer.compile()
    assert losses() == pytest.approx(expected, rel=1e-2)


def test_flex_attention_over_blocks_gives_what_the_dense_mask_gives(monkeypatch):
    cfg = small("audiocalm_quick", [])
    torch.manual_seed(0)
    model = make_model(cfg, "audiocalm").cuda().train()
    batch = {k: v.cuda() for k, v in random_latents(cfg, "audiocalm", 6, 0).items()}
    model.compile_for_training()
    found = loss_and_gradient(model, batch, bf16=False)

    def dense(sees, B, S, device):
        row = torch.arange(B, device=device)[:, None, None]
        i = torch.arange(S, device=device)
        return sees(row, 0, i[:, None], i)[:, None]

    monkeypatch.setattr("audiocalm.make_mask", dense)
    torch._dynamo.reset()
    eager = make_model(cfg, "audiocalm").cuda().train()
    eager.load_state_dict(model.state_dict())
    assert loss_and_gradient(eager, batch, bf16=False) == pytest.approx(found, rel=1e-3)


def test_every_stage_trains_resumes_and_speaks_on_the_device(tmp_path):
    text = TINY.replace('device = "cpu"', 'device = "cuda"')
    text = text.replace('"consistency"]', '"consistency", "audiocalm"]')
    config = write(tmp_path, text)

    # half of the language model's training, then the rest with everything behind it
    first = run("train.py", "--config", config, "--stages", "vae,lm", "--train.lm.steps", "8")
    assert first.returncode == 0, first.stderr
    (tmp_path / "run" / "lm.pt").unlink()
    done = run("train.py", "--config", config)
    assert done.returncode == 0, done.stderr
    rows = logged(tmp_path / "run")
    assert {row["stage"] for row in rows} == {"vae", "lm", "consistency", "audiocalm"}
    assert "NaN" not in json.dumps(rows)

    wav = tmp_path / "sample.wav"
    spoken = run("sample.py", "--run", f"{tmp_path}/run", "--kind", "sound", "--text", "a tone",
                 "--seconds", "0.4", "--out", str(wav))
    assert spoken.returncode == 0, spoken.stderr
    assert wav.stat().st_size > 1000
