"""Published weights in our modules give the outputs of the published models."""
import json
import math

import pytest
import torch
import torch.nn.functional as F

from backbone import BackboneConfig, Transformer
from calm import CALM
from clips import decode_text
from config import load, load_checkpoint, load_weights, make_model, open_run
from cli import BadInput
from data import KINDS, DataConfig, encode_text, pad_id, vocabulary
from layers import ConvTranspose
from tools.convert import __main__ as convert
from tools.convert import mimi, pocket_tts, text_model
from tools.convert.tensors import halves, read
from vae import VAE, VAEConfig


def attention(x, in_proj, out_proj, heads, window):
    """Mimi's: one in_proj (3 C, C), rotations of neighbouring channels, the last `window` keys."""
    B, T, C = x.shape
    q, k, v = (x @ in_proj.T).view(B, T, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    d = C // heads
    angle = torch.arange(T)[:, None] * torch.exp(-math.log(10000) * 2 * torch.arange(d // 2) / d)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(a):
        pairs = torch.view_as_complex(a.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    score = rotate(q) @ rotate(k).mT / math.sqrt(d)
    ago = torch.arange(T)[:, None] - torch.arange(T)
    score = score.masked_fill((ago < 0) | (ago >= window), -math.inf)
    return (score.softmax(-1) @ v).transpose(1, 2).flatten(2) @ out_proj.T


def test_a_fused_projection_with_neighbouring_rotations_becomes_ours():
    torch.manual_seed(0)
    net = Transformer(BackboneConfig(dim=24, layers=1, heads=3, window=5)).eval()
    x, in_proj, out_proj = torch.randn(2, 9, 24), torch.randn(72, 24), torch.randn(24, 24)
    q, k, v = in_proj.chunk(3)
    layer = net.blocks[0].attention
    layer.wq.weight.data = halves(q, 3)
    layer.wkv.weight.data = torch.cat([halves(k, 3), v])
    layer.wo.weight.data = out_proj
    net.blocks[0].norm1, net.blocks[0].mlp, net.norm = (torch.nn.Identity(), Nothing(),
                                                        torch.nn.Identity())
    torch.testing.assert_close(net(x), x + attention(x, in_proj, out_proj, 3, 5),
                               atol=1e-4, rtol=1e-4)


class Nothing(torch.nn.Module):
    def forward(self, x):
        return 0 * x


def published(pocket):
    """A small VAE in Mimi's layout, and its tensors under the names of moshi or pocket-tts."""
    torch.manual_seed(0)
    cfg = VAEConfig(encoder="conv", decoder="conv", block="seanet", stft_hop=0, res_layers=1,
                    sample_rate=24000, latent_dim=6 if pocket else 16, ratios=[5, 4, 3], inner=4,
                    width=4, width_max=32, dim=16, heads=2, encoder_layers=2, decoder_layers=1,
                    transformer_style="pocket" if pocket else "mimi", context=10 * 60 / 24000)
    net = VAE(cfg).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    D = cfg.latent_dim
    net.encoder.out.conv.weight.data[D:], net.encoder.out.conv.bias.data[:D] = 0.0, 0.0
    net.encoder.out.conv.bias.data[D:], net.decoder.up.conv.bias.data[:] = -12.0, 0.0
    net.decoder.input.bias.data[:] = 0.0
    if not pocket:
        net.decoder.input.weight.data = torch.eye(D)
    back = lambda w: w.unflatten(0, (2, 2, -1)).transpose(1, 2).flatten(0, 2)
    out, double = {}, "" if pocket else ".conv"
    for name, w in net.state_dict().items():
        part, *rest = name.split(".")
        if ".blocks." in name:
            name = name.replace(".transformer.blocks", "_transformer.transformer.layers")
            name = name.replace("mlp.up", "linear1").replace("mlp.down", "linear2")
            name = name.replace("attention.wo", "self_attn.out_proj")
            name = name.replace("scale1", "layer_scale_1.scale")
            name = name.replace("scale2", "layer_scale_2.scale")
            if "wq" in name:
                kv = net.state_dict()[f"{part}.{'.'.join(rest)}".replace("wq", "wkv")]
                k, v = kv.chunk(2)
                w = torch.cat([back(w), back(k), v])
                name = name.replace("attention.wq.weight", "self_attn.in_proj" + (
                    ".weight" if pocket else "_weight"))
            elif "wkv" in name:
                continue
        elif name == "encoder.out.conv.weight":
            name, w = f"downsample.conv.conv{double}.weight", w[:D]
        elif name == "decoder.up.conv.weight":
            name = f"upsample.convtr{'' if pocket else '.convtr'}.convtr.weight"
        elif name == "decoder.input.weight":
            if not pocket:
                continue
            name, w = "quantizer.output_proj.weight", w[..., None]
        elif name.endswith((".out.conv.bias", ".up.conv.bias", ".input.bias", "mean", "std")):
            continue
        else:
            up = part == "decoder" and isinstance(net.decoder.conv[int(rest[1])], ConvTranspose)
            name = name.replace(f"{part}.conv.", f"{part}.model.").replace(".body.", ".block.")
            name = name.replace(".conv.", ".convtr." if up else ".conv.")
            if not pocket:
                name = name.replace(".convtr.", ".convtr.convtr.").replace(".conv.", ".conv.conv.")
        out[name] = w
    return net, out


@pytest.mark.parametrize("pocket", [False, True])
@torch.no_grad()
def test_a_codec_under_its_published_names_gives_the_same_latents_and_audio(pocket):
    net, tensors = published(pocket)
    cfg, state = mimi.to_vae(tensors, heads=2, context=10)
    assert cfg.ratios == [5, 4, 3] and cfg.inner == 4 and cfg.hop == 240
    other = VAE(cfg).eval()
    other.load_state_dict(state)
    wav = 0.1 * torch.randn(1, 1, 240 * 9)
    torch.testing.assert_close(other.encode(wav), net.encode(wav))
    z = torch.randn(1, 9, cfg.latent_dim)
    torch.testing.assert_close(other.decode(z), net.decode(z))


def test_weight_norm_is_multiplied_out():
    net, tensors = published(True)
    w = tensors.pop("encoder.model.0.conv.weight")
    tensors["encoder.model.0.conv.weight_g"] = 2 * w.norm(dim=(1, 2), keepdim=True)
    tensors["encoder.model.0.conv.weight_v"] = 5 * w
    _, state = mimi.to_vae(tensors, heads=2, context=10)
    torch.testing.assert_close(state["encoder.conv.0.conv.weight"], 2 * w)


def test_a_tensor_that_is_missing_or_unknown_is_named():
    _, tensors = published(True)
    lost = dict(tensors)
    del lost["decoder_transformer.transformer.layers.0.norm1.bias"]
    with pytest.raises(BadInput, match="missing, the first: decoder.transformer.blocks.0.norm1.b"):
        mimi.to_vae(lost, heads=2, context=10)
    with pytest.raises(BadInput, match="1 tensors are not understood: surplus"):
        mimi.to_vae({**tensors, "surplus": torch.zeros(1)}, heads=2, context=10)
    with pytest.raises(BadInput, match="not the tensors of a Mimi"):
        mimi.to_vae({"lm_head.weight": torch.zeros(2, 2)})


def test_all_that_is_missing_or_not_understood_is_counted():
    """Fault: one tensor was named and the others were not counted."""
    _, tensors = published(True)
    surplus = {f"surplus{i}": torch.zeros(1) for i in range(4)}
    with pytest.raises(BadInput, match="4 tensors are not understood: surplus0, surplus1, surpl"):
        mimi.to_vae({**tensors, **surplus}, heads=2, context=10)
    lost = {k: v for k, v in tensors.items() if "norm1.bias" not in k}
    with pytest.raises(BadInput, match="3 tensors are missing"):
        mimi.to_vae(lost, heads=2, context=10)
    assert mimi.left_out({"mimi.quantizer.rvq_first.vq.a": 0, "quantizer.output_proj.weight": 0,
                          "x": 0}) == ("left out: 1 tensors of the quantiser, behind which a VAE "
                                       "has nothing, e.g. quantizer.rvq_first.vq.a")


@pytest.mark.parametrize("option, value", [("--sample-rate", "0"), ("--heads", "-1"),
                                           ("--context", "0.5")])
def test_sizes_that_cannot_be_are_refused_by_their_option(option, value, monkeypatch):
    """Fault: `--sample-rate 0` was a traceback, and -8000 a run that could not be opened."""
    monkeypatch.setattr("sys.argv", ["tools.convert", "mimi", "x", "--out", "y", option, value])
    with pytest.raises(BadInput, match=f"argument {option}: {value} is not possible"):
        convert.main()


def test_tensors_of_wrong_shapes_are_one_line():
    """Fault: heads that do not divide the width, or a weight of another rank, were tracebacks."""
    _, tensors = published(True)
    with pytest.raises(BadInput, match="not the tensors of a Mimi codec"):
        mimi.to_vae(tensors, heads=5, context=10)
    for name in ("encoder.model.0.conv.weight", "quantizer.output_proj.weight"):
        with pytest.raises(BadInput):
            mimi.to_vae({**tensors, name: tensors[name][0]}, heads=2, context=10)
    narrow = {**tensors, "upsample.convtr.convtr.weight": torch.zeros(3, 3, 3)}
    with pytest.raises(BadInput):
        mimi.to_vae(narrow, heads=2, context=10)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_quantised_weights_are_refused(dtype, tmp_path):
    """Fault: FP8 codes were taken for weights without their scales (std 152.8 for 0.0488)."""
    safetensors = pytest.importorskip("safetensors.torch")
    codes = (torch.randn(4, 4) * 50).to(getattr(torch, dtype))
    safetensors.save_file({"a.weight": codes, "a.weight_scale_inv": torch.ones(1, 1),
                           "steps": torch.zeros(1, dtype=torch.int64)}, tmp_path / "m.safetensors")
    with pytest.raises(BadInput, match=f"1 tensors are quantised .{dtype}., e.g. a.weight; take"):
        read(tmp_path / "m.safetensors")


def test_a_converted_file_is_a_run_that_opens(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    net, tensors = published(True)
    safetensors.save_file({k: v.contiguous() for k, v in tensors.items()},
                          tmp_path / "m.safetensors")
    monkeypatch.setattr("sys.argv", ["tools.convert", "mimi", str(tmp_path / "m.safetensors"),
                                     "--out", str(tmp_path / "run"), "--heads", "2",
                                     "--context", "10"])
    convert.main()
    cfg, vae, lm, _ = open_run(str(tmp_path / "run"))
    wav = 0.1 * torch.randn(1, 1, 240 * 3)
    torch.testing.assert_close(vae.encode(wav)[0], net.encode(wav)[0])
    assert lm is None
    with pytest.raises(BadInput, match="exists"):
        convert.main()


@torch.no_grad()
def test_moshis_own_mimi_and_ours_agree():
    loaders = pytest.importorskip("moshi.models.loaders")
    torch.manual_seed(0)
    peer = loaders.get_mimi(None, device="cpu").eval()
    cfg, state = mimi.to_vae(peer.state_dict())
    ours = VAE(cfg).eval()
    ours.load_state_dict(state)
    wav = 0.1 * torch.randn(1, 1, cfg.hop * 8)
    z = peer.encode_to_latent(wav, quantize=False)
    torch.testing.assert_close(ours.encode(wav)[0], z.mT, atol=1e-4, rtol=0)
    up = peer.decoder_transformer(peer._to_encoder_framerate(z))[0]
    torch.testing.assert_close(ours.decode(z.mT), peer.decoder(up), atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------- Pocket TTS

def pocket_tensors(small):
    """Random tensors under the published names. small: with what its models below 90M have."""
    torch.manual_seed(0)
    C, q, F, w, D, layers = 128, 128, 96, 24, 5, 2
    kv, z = (64, 48) if small else (128, 128)
    shapes = {"bos_emb": (D,), "emb_mean": (D,), "speaker_proj_weight": (C, D),
              "input_linear.weight": (C, D), "bos_before_voice": (1, 1, C),
              "conditioner.embed.weight": (11, 16 if small else C), "out_eos.weight": (1, z),
              "out_eos.bias": (1,), "out_norm.weight": (C,), "out_norm.bias": (C,)}
    if small:
        shapes |= {"conditioner.proj.weight": (C, 16), "z_proj.weight": (z, C)}
    for i in range(layers):
        layer = {"self_attn.in_proj": (q + 2 * kv, C), "self_attn.out_proj": (C, q),
                 "linear1": (F, C), "linear2": (C, F)}
        shapes |= {f"transformer.layers.{i}.{n}.weight": s for n, s in layer.items()}
        shapes |= {f"transformer.layers.{i}.norm{j}.{n}": (C,)
                   for j in (1, 2) for n in ("weight", "bias")}
    net = {"cond_embed": (w, z), "input_proj": (w, D), "final_layer.linear": (D, w),
           "final_layer.adaLN_modulation.1": (2 * w, w)}
    for i in range(2):
        net |= {f"time_embed.{i}.mlp.0": (w, 256), f"time_embed.{i}.mlp.2": (w, w)}
        net |= {f"res_blocks.{i}.mlp.{j}": (w, w) for j in (0, 2)}
        net |= {f"res_blocks.{i}.adaLN_modulation.1": (3 * w, w), f"res_blocks.{i}.in_ln": (w,)}
        shapes[f"flow_net.time_embed.{i}.mlp.3.alpha"] = (w,)
    for name, shape in net.items():
        shapes |= {f"flow_net.{name}.weight": shape, f"flow_net.{name}.bias": shape[:1]}
    t = {name: torch.randn(shape) / (shape[1] ** 0.5 if len(shape) == 2 else 1)
         for name, shape in shapes.items()}
    freqs = torch.exp(torch.arange(128) * (-math.log(1e4) / 128))
    return t | {"emb_std": torch.rand(D) + 0.5} | {
        f"flow_net.time_embed.{i}.freqs": freqs for i in range(2)}


def pocket_latents(t, text, voice, noises, steps):
    """What Pocket TTS computes, written from its description: latents and EOS logits."""
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], t[name + ".weight"], t[name + ".bias"])
    linear = lambda x, name: x @ t[name + ".weight"].T + t.get(name + ".bias", torch.zeros(1))
    net = lambda x, name: linear(x, "flow_net." + name)

    def embed_time(u, i):
        f = u * t[f"flow_net.time_embed.{i}.freqs"]
        h = net(F.silu(net(torch.cat([f.cos(), f.sin()]), f"time_embed.{i}.mlp.0")),
                f"time_embed.{i}.mlp.2")
        return h * t[f"flow_net.time_embed.{i}.mlp.3.alpha"] / (h.var() + 1e-5).sqrt()

    def velocity(x, z, start, end):
        c = net(z, "cond_embed") + (embed_time(start, 0) + embed_time(end, 1)) / 2
        h = net(x, "input_proj")
        for i in range(2):
            shift, scale, gate = net(F.silu(c), f"res_blocks.{i}.adaLN_modulation.1").chunk(3, -1)
            inner = F.layer_norm(h, h.shape[-1:], t[f"flow_net.res_blocks.{i}.in_ln.weight"],
                                 t[f"flow_net.res_blocks.{i}.in_ln.bias"], 1e-6)
            inner = F.silu(net(inner * (1 + scale) + shift, f"res_blocks.{i}.mlp.0"))
            h = h + gate * net(inner, f"res_blocks.{i}.mlp.2")
        shift, scale = net(F.silu(c), "final_layer.adaLN_modulation.1").chunk(2, -1)
        return net(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift,
                   "final_layer.linear")

    words = t["conditioner.embed.weight"][text]
    if "conditioner.proj.weight" in t:
        words = linear(words, "conditioner.proj")
    past = [t["bos_emb"].expand(1, 1, -1)]
    drawn, ends = [], []
    for noise in noises:
        x = torch.cat([t["bos_before_voice"], voice @ t["speaker_proj_weight"].T, words,
                       linear(torch.cat(past, 1), "input_linear")], 1)
        for i in range(2):
            name = f"transformer.layers.{i}."
            fused = t[name + "self_attn.in_proj.weight"]
            kv = (len(fused) - 128) // 2
            q, k, v = fused.split([128, kv, kv])
            fused = torch.cat([q, *(w.unflatten(0, (kv // 64, 64)).repeat_interleave(
                128 // kv, 0).flatten(0, 1) for w in (k, v))])       # shared heads written out
            x = x + attention(norm(x, name + "norm1"), fused,
                              t[name + "self_attn.out_proj.weight"], 2, 1000)
            h = F.gelu(linear(norm(x, name + "norm2"), name + "linear1"), approximate="tanh")
            x = x + linear(h, name + "linear2")
        z = norm(x, "out_norm")[:, -1]
        z = linear(z, "z_proj") if "z_proj.weight" in t else z
        ends.append(linear(z, "out_eos"))
        for i in range(steps):
            noise = noise + velocity(noise, z, torch.tensor(i / steps),
                                     torch.tensor((i + 1) / steps)) / steps
        drawn.append(noise)
        past.append(noise[:, None])
    return torch.stack(drawn, 1), torch.stack(ends, 1)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_pocket_tts_under_its_published_names_gives_the_same_latents_and_ends(small, steps):
    t = pocket_tensors(small)
    cfg, state, mean, std = pocket_tts.to_calm(t, eos_threshold=-4.0)
    lm = CALM(cfg, 5, 14, KINDS).eval()
    lm.load_state_dict(state)
    text, voice = torch.randint(0, 10, (1, 7)), torch.randn(1, 4, 5)
    draw = lambda: torch.Generator().manual_seed(3)
    g = draw()
    noises = [0.6 ** 0.5 * torch.randn(1, 5, generator=g) for _ in range(6)]
    wanted, ends = pocket_latents(t, text, voice, noises, steps)
    seen, eos = [], lm.eos.forward
    lm.eos.forward = lambda z: seen.append(eos(z)) or torch.full((1, 1), -1.0)
    found = [x for x, _ in lm.generate(text, kind=0, max_frames=6, prompt=(voice - mean) / std,
                                       temperature=0.6, steps=steps, generator=draw())]
    torch.testing.assert_close(torch.stack(found, 1), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack(seen, 1), ends[:, 1:] + 4, atol=1e-4, rtol=0)
    assert wanted.std() > 0.1


def test_the_papers_config_has_the_sizes_and_parameters_of_pocket_tts():
    cfg = load("configs/paper/pocket_tts.toml")
    with torch.device("meta"):
        lm, vae = CALM(cfg.lm, cfg.vae.latent_dim, 4001, KINDS), VAE(cfg.vae)
    millions = lambda *modules: sum(p.numel() for m in modules for p in m.parameters()) / 1e6
    assert cfg.vae.frame_rate == 12.5
    assert millions(lm) == pytest.approx(89.448, abs=0.01)      # its own state dict: 89.4478
    assert millions(lm.backbone) == pytest.approx(75.5, abs=0.1)
    assert millions(lm.head) == pytest.approx(9.76, abs=0.01)
    assert millions(vae.decoder) == pytest.approx(10.28, abs=0.03)           # 10.2725 + biases of 0


def test_heads_of_pocket_tts_without_times_are_refused():
    t = {k: v for k, v in pocket_tensors(False).items() if "time_embed" not in k}
    with pytest.raises(BadInput, match="no times"):
        pocket_tts.to_calm(t)


@torch.no_grad()
def test_pocket_tts_own_model_and_ours_agree(tmp_path, monkeypatch):
    """Its English model (90M) with random weights, all of it, from file to latents and audio."""
    yaml, safetensors = pytest.importorskip("yaml"), pytest.importorskip("safetensors.torch")
    peer = pytest.importorskip("pocket_tts.models.tts_model")
    from pocket_tts.modules.stateful_module import init_states
    from pocket_tts.utils.config import CONFIGS_DIR, Config
    config = yaml.safe_load((CONFIGS_DIR / "english.yaml").read_text())
    config["weights_path"] = config["weights_path_without_voice_cloning"] = None
    config["flow_lm"]["lookup_table"]["tokenizer_path"] = str(tmp_path / "tokenizer.json")
    words(tmp_path / "tokenizer.json", 4000)
    torch.manual_seed(0)
    net = peer.TTSModel._from_pydantic_config_with_weights(
        Config(**config), 0.7, 1, None, float("inf"))
    for p in net.parameters():
        p += 0.02 * torch.randn_like(p)
    net.flow_lm.emb_std.uniform_(0.5, 1.5), net.flow_lm.emb_mean.normal_()
    safetensors.save_file({k: v.contiguous() for k, v in net.state_dict().items()},
                          tmp_path / "model.safetensors")
    monkeypatch.setattr("sys.argv", ["tools.convert", "pocket-tts",
                                     str(tmp_path / "model.safetensors"),
                                     "--out", str(tmp_path / "run")])
    convert.main()
    cfg, vae, lm, stage = open_run(str(tmp_path / "run"))
    assert stage == "lm" and encode_text("w5", "speech", cfg.data) == [5]
    wav, text = 0.1 * torch.randn(1, 1, 1920 * 6), torch.randint(0, 4000, (1, 9))
    raw = net.mimi.encode_to_latent(wav)
    torch.testing.assert_close(vae.encode(wav)[0], raw, atol=1e-4, rtol=0)
    state = init_states(net.flow_lm, 1, 100)
    voice = torch.cat([net.flow_lm.bos_before_voice, raw @ net.flow_lm.speaker_proj_weight.T], 1)
    net._run_flow_lm_and_increment_step(state, audio_conditioning=voice)
    net._run_flow_lm_and_increment_step(state, text_tokens=text)
    g, x, wanted = torch.Generator().manual_seed(3), torch.full((1, 1, 32), math.nan), []
    monkeypatch.setattr(torch.nn.init, "normal_",
                        lambda t, mean, std: t.copy_(std * torch.randn(t.shape, generator=g)))
    for _ in range(8):
        x, _ = net._run_flow_lm_and_increment_step(state, backbone_input_latents=x)
        wanted.append(x[:, 0])
    wanted = torch.stack(wanted, 1)
    lm.eos.bias -= 1000
    found = torch.stack([x for x, _ in lm.generate(
        text, kind=0, max_frames=8, prompt=vae.normalize(raw), temperature=0.7,
        generator=torch.Generator().manual_seed(3))], 1)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    audio = net.mimi.decode_from_latent(wanted * net.flow_lm.emb_std + net.flow_lm.emb_mean,
                                        init_states(net.mimi, 1, 16 * 8))
    torch.testing.assert_close(vae.decode(vae.denormalize(found)), audio, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------- text models

def words(path, count):
    """A tokenizer.json whose tokens are the words w0 .. w{count - 1}."""
    tokenizers = pytest.importorskip("tokenizers")
    t = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(count)}, "w0"))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    t.save(str(path))


def text_folder(folder, kind, **changes):
    """A small random text model, saved by transformers in shards."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = dict(vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                  **changes)
    if kind == "qwen3":
        net = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            head_dim=10, tie_word_embeddings=True, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e3}, **shared))
    else:
        net = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            tie_word_embeddings=False, rms_norm_eps=1e-5, **shared))
    for p in net.parameters():                       # norms away from 1, attention away from flat
        p.data += 0.3 * torch.randn_like(p)
    net.eval().save_pretrained(folder, max_shard_size="10KB")
    words(folder / "tokenizer.json", 60)             # fewer tokens than rows, as Qwen3 has it
    return net


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@torch.no_grad()
def test_a_text_models_weights_in_calm_give_its_hidden_states_and_logits(
        kind, tmp_path, monkeypatch):
    net = text_folder(tmp_path / "text", kind)
    assert len(list((tmp_path / "text").glob("*.safetensors"))) > 1
    run = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["tools.convert", kind, str(tmp_path / "text"),
                                     "--out", str(run)])
    convert.main()
    cfg = load(run / "config.toml")
    lm = CALM(cfg.lm, cfg.vae.latent_dim, vocabulary(cfg.data), KINDS).eval()
    load_weights(lm, load_checkpoint(cfg.train.lm.init)["model"], "text.pt")
    text = torch.randint(0, 60, (2, 17))
    wanted = net.model(text).last_hidden_state
    found = lm.backbone(lm.text(text))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert wanted.abs().max() > 0.5
    table = net.lm_head.weight if kind == "llama" else torch.cat(
        [lm.text.weight[:60], net.lm_head.weight[60:]])      # tied: the embedding is the output
    torch.testing.assert_close(found @ table.T, net(text).logits, atol=1e-4, rtol=0)
    assert encode_text("w5  w7", "music", cfg.data) == [63, 5, 7] and lm.text.num_embeddings == 64
    with pytest.raises(BadInput, match="exists"):
        convert.main()


@torch.no_grad()
def test_audiocalm_gets_a_text_models_backbone_too(tmp_path, monkeypatch):
    net, run = text_folder(tmp_path / "text", "qwen3"), tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["tools.convert", "qwen3", str(tmp_path / "text"), "--out",
                                     str(run), "--stage", "audiocalm"])
    convert.main()
    cfg = load(run / "config.toml")
    model = make_model(cfg, "audiocalm").eval()
    load_weights(model, load_checkpoint(cfg.train.audiocalm.init)["model"], "text.pt")
    text, ours = torch.randint(0, 60, (1, 9)), model.head.net
    past = torch.ones(9, 9, dtype=torch.bool).tril()         # it has no order but its masks'
    torch.testing.assert_close(ours.backbone(ours.text(text), mask=past),
                               net.model(text).last_hidden_state, atol=1e-4, rtol=0)


def test_a_text_model_starts_a_model_with_a_monologue_of_its_tokens(tmp_path, monkeypatch):
    """Fault: refused, since a monologue was made of bytes."""
    text_folder(tmp_path / "text", "qwen3")
    monkeypatch.setattr("sys.argv", ["tools.convert", "qwen3", str(tmp_path / "text"), "--out",
                                     str(tmp_path / "run"), "--config", "configs/flite_tts.toml"])
    convert.main()
    lm = make_model(load(tmp_path / "run" / "config.toml"), "lm")
    assert lm.word.out_features == len(lm.text.weight) == 60 + 1 + len(KINDS) and lm.pad == 60


def test_what_a_backbone_cannot_do_and_a_missing_shard_are_refused_by_name(tmp_path):
    text_folder(tmp_path / "a", "llama", attention_bias=True)
    with pytest.raises(BadInput, match="backbone.py has no biases in attention"):
        text_model.to_backbone(tmp_path / "a")
    text_folder(tmp_path / "b", "llama", rope_parameters={
        "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(BadInput, match="no rotations of type linear"):
        text_model.to_backbone(tmp_path / "b")
    text_folder(tmp_path / "c", "qwen3")
    lost = sorted((tmp_path / "c").glob("*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(BadInput, match=f"{lost.name}: missing"):
        text_model.to_backbone(tmp_path / "c")


def change(folder, tensors=(), **keys):
    """Write a text model again with other tensors {name: tensor} and keys of config.json."""
    safetensors = pytest.importorskip("safetensors.torch")
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    safetensors.save_file(dict(tensors), folder / "zz.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def test_tensors_and_keys_of_a_text_model_that_no_rule_knows_are_refused(tmp_path):
    """Fault: they were dropped in silence: biases, layers beyond the number of config.json, norms
    of another model, soft caps.
    """
    text_folder(tmp_path, "llama")
    text_model.to_backbone(tmp_path)
    change(tmp_path, {"model.layers.0.self_attn.q_proj.bias": torch.ones(24),
                      "model.layers.0.self_attn.k_proj.bias": torch.ones(12),
                      "model.rotary_emb.inv_freq": torch.ones(3)})
    with pytest.raises(BadInput, match="2 tensors are not understood: layers.0.self_attn.k_proj.b"):
        text_model.to_backbone(tmp_path)
    change(tmp_path, {"model.layers.2.mlp.down_proj.weight": torch.ones(24, 40)})
    with pytest.raises(BadInput, match="1 tensors are not understood: layers.2.mlp.down_proj.weig"):
        text_model.to_backbone(tmp_path)
    change(tmp_path, {"x": torch.ones(1)}, logit_scale=0.5, residual_multiplier=2.0, use_a=False)
    with pytest.raises(BadInput, match="config.json: 2 keys are not understood: logit_scale, resi"):
        text_model.to_backbone(tmp_path)


def test_a_text_model_whose_tensors_do_not_fit_its_config_is_one_line(tmp_path):
    """Fault: a traceback of load_state_dict."""
    text_folder(tmp_path, "llama")
    change(tmp_path, {"x": torch.ones(1)}, intermediate_size=48)
    (tmp_path / "zz.safetensors").unlink()
    with pytest.raises(BadInput, match="mlp.up.weight is .80, 24., the sizes .* require .96, 24."):
        text_model.to_backbone(tmp_path)


def test_a_tokenizer_gives_ids_and_puts_the_kinds_behind_its_vocabulary(tmp_path):
    words(tmp_path / "tokenizer.json", 9)
    for where in (tmp_path, tmp_path / "tokenizer.json"):
        cfg = DataConfig(tokenizer=str(where))
        assert (pad_id(cfg), vocabulary(cfg)) == (9, 13)
        assert encode_text(" w3\n w8", "sound", cfg) == [11, 3, 8]
        assert decode_text([11, 3, 8, 9], cfg) == "w3 w8"
    plain = DataConfig(tokenizer=str(tmp_path), kind_token=False)
    assert encode_text("w3", "speech", plain) == [3]
    with pytest.raises(BadInput, match="data.tokenizer = .*: neither a tokenizer.json"):
        (tmp_path / "bad.json").write_text("{}")
        encode_text("w3", "speech", DataConfig(tokenizer=str(tmp_path / "bad.json")))
