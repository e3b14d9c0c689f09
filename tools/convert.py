"""Start from published weights: python -m tools.convert mimi IN.safetensors --out RUN

    mimi    Kyutai's codec, its tensors named as in PyPI `moshi` or `pocket-tts`
            -> a run folder with config.toml and vae.pt for evaluate.py, sample.py and train.py
    pocket-tts    Kyutai's text to speech, flow LM and Mimi in one file, named as in PyPI
            `pocket-tts` -> a run folder that speaks: vae.pt, lm.pt, config.toml, tokenizer.json
            (taken from beside the weights, or --tokenizer)
    qwen3, llama    a text model, as a folder with config.json, *.safetensors, tokenizer.json
            -> a run folder with config.toml (that of --config, with the text model's sizes and
            tokenizer) and text.pt: CALM (or --stage audiocalm) whose backbone and text embedding
            are the text model's, the rest random. Train it:
            python train.py --config RUN/config.toml

    model.layers.0.self_attn.q_proj  (H d, C)   ─► backbone.blocks.0.attention.wq   (H d, C)
                        k_proj, v_proj          ─►                          wkv     (2 Hkv d, C)
    model.layers.0.mlp.gate_proj, up_proj       ─► backbone.blocks.0.mlp.up         (2 F, C)
    model.embed_tokens (V, C)                   ─► text (V' + PAD + kinds, C), V' of the tokenizer

A text model's rotations already pair channels as backbone.py does. Its output layer stays behind,
CALM has no use for it. What is random (latents, BOS, kinds, PAD) starts at the scale of the text
embedding. Rotations with scaling (Llama 3.1 and later) and biases are refused, not approximated.

Pocket TTS: what its flow LM has otherwise is folded into our weights, exactly:
- its time runs from noise 0 to data 1, ours back: cos f(1-t) and sin f(1-t) are rotations of
  cos ft and sin ft, done in the first layer of the time embeddings; the output changes its sign
- emb_mean and emb_std are the VAE's latent_mean and latent_std; its voice prompt takes latents as
  they are, ours normalised ones: speaker_proj takes the difference. BOS is input_linear(bos_emb)
- it stops where the EOS logit is above --eos-threshold (-4), ours above 0: the bias moves
- the low-rank text table and z_proj of its small models are multiplied out
What stays a switch: prompt_bos, head.time_norm, data.kind_token. Left to the caller, for these are
no weights: it begins text with a capital and ends it with a full stop, ignores EOS in the first 6
latents and goes on for a few after it. Heads without times (drifting, pointwise) and Mimi decoders
unlike their encoder (its models below 90M) are refused.

Mimi: sizes (ratios, widths, layers, strides) are read off the tensors. What tensors do not tell is
Mimi's own unless given: --heads 8, --context 250 (positions of the transformers), --sample-rate
24000.

Changes to Mimi's weights, all exact:
- in_proj (3 C, C) becomes wq and wkv. Mimi rotates neighbouring channels (2i, 2i + 1), backbone.py
  channels (i, i + d/2): the rows of q and k are put in that order within each head.
- a convolution without bias gets a bias of zeros; weight norm (weight_g, weight_v) is multiplied
  out.
- the bottleneck: latents are what comes out of the downsampling convolution. pocket-tts maps them
  to the decoder's width (output_proj), moshi does not (512 channels before its quantiser). The
  log-variance is the constant -12: these codecs publish no posterior. Codebooks are left out.

--data MANIFEST measures the latents' mean and standard deviation on some 400 clips, which a
language model needs; without it they are 0 and 1.
Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse
import dataclasses
import glob
import json
import math
import os
import re
import shutil

import torch
from tqdm import tqdm

from backbone import BackboneConfig
from calm import CALM, CALMConfig
from cli import BadInput, Parser, cli
from config import Config, SampleConfig, dump, load, make_model, save_checkpoint
from data import KINDS, DataConfig, first_special, load_audio, load_manifest, vocabulary
from heads import HeadConfig
from vae import VAE, VAEConfig


def read(path):
    """A .safetensors file -> {name: tensor in fp32}."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise BadInput("convert.py: needs the hf extra: pip install -e .[hf]") from None
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except Exception as e:                       # the library's own errors have no common class
        raise BadInput(f"{path}: not a readable .safetensors file ({e})") from None


def read_folder(folder):
    """All shards of a Hugging Face folder -> {name: tensor in fp32}; all that its index names."""
    tensors = {}
    for path in sorted(glob.glob(f"{folder}/*.safetensors")):
        tensors |= read(path)
    index = f"{folder}/model.safetensors.index.json"
    if os.path.isfile(index):
        with open(index) as f:
            shards = json.load(f)["weight_map"]
        for name in shards.keys() - tensors.keys():
            raise BadInput(f"{folder}/{shards[name]}: missing; the index says it holds {name}")
    if not tensors:
        raise BadInput(f"{folder}: no .safetensors file in it")
    return tensors


def halves(weight, heads):
    """Rows of q or k (C, C): channels (2i, 2i + 1) of each head -> (i, i + d/2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def mimi_names(tensors):
    """One naming for both packages, weight norm multiplied out."""
    out = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(mimi\.|model\.)", "", name)
        name = re.sub(r"(\.conv)+\.|(\.convtr)+\.", lambda m: f".{m[0].split('.')[1]}.", name)
        name = re.sub(r"\.(in|out)_proj(s\.0\.|\.|_)weight$", r".\1_proj.weight", name)
        out[name] = tensor
    for name in [n for n in out if n.endswith(".weight_g")]:
        g, v = out.pop(name), out.pop(name[:-1] + "v")
        out[name[:-2]] = torch._weight_norm(v, g, 0)
    return out


def fits(state, new, model):
    """Every name and shape of our module's state dict, and nothing else."""
    for name in state.keys() ^ new.keys():
        what = "missing" if name in state else "not understood"
        raise BadInput(f"{model}: tensor {name} is {what}; is this another version of it?")
    for name, want in state.items():
        if want.shape != new[name].shape:
            raise BadInput(f"{model}: {name} is {tuple(new[name].shape)}, "
                           f"the sizes read off the other tensors ask for {tuple(want.shape)}")


def mimi(tensors, heads=8, context=250, sample_rate=24000):
    """Mimi's tensors {name: tensor} -> (VAEConfig, state dict of VAE)."""
    t = mimi_names(tensors)
    try:
        convs = sorted(int(m[1]) for m in (re.match(r"encoder\.model\.(\d+)\.conv\.weight", n)
                                           for n in t) if m)
        first, *strided, last = (t[f"encoder.model.{i}.conv.weight"].shape for i in convs)
        units = sum(f"encoder.model.{i}.block.1.conv.weight" in t for i in range(convs[1]))
        down, up = t["downsample.conv.weight"], t["upsample.convtr.weight"]
        layers = [1 + max(int(m[1]) for m in (re.match(
            rf"{part}_transformer\.transformer\.layers\.(\d+)\.", n) for n in t) if m)
            for part in ("encoder", "decoder")]
        D, inner = down.shape[0], down.shape[2] // 2
        ratios = [shape[2] // 2 for shape in reversed(strided)]
        hop = inner * torch.Size(ratios).numel()
        projected = "quantizer.output_proj.weight" in t
        cfg = VAEConfig(
            sample_rate=sample_rate, channels=first[1], latent_dim=D, ratios=ratios, inner=inner,
            width=first[0], width_max=strided[-1][0], res_layers=units, dim=last[0], heads=heads,
            encoder_layers=layers[0], decoder_layers=layers[1],
            transformer_style="pocket" if projected else "mimi",
            context=context * hop / inner / sample_rate)
        state = VAE(cfg).state_dict()
        new = {"latent_mean": torch.zeros(D), "latent_std": torch.ones(D)}
        for name, w in t.items():
            if name.startswith("quantizer."):
                continue
            name = re.sub(r"^(encoder|decoder)\.model\.", r"\1.conv.", name)
            name = name.replace(".block.", ".body.").replace(".convtr.", ".conv.")
            name = re.sub(r"^(encoder|decoder)_transformer\.transformer\.layers",
                          r"\1.transformer.blocks", name)
            name = re.sub(r"\.layer_scale_(\d)\.scale$", r".scale\1", name)
            name = name.replace(".linear1.", ".mlp.up.").replace(".linear2.", ".mlp.down.")
            name = name.replace(".self_attn.out_proj.", ".attention.wo.")
            if ".self_attn.in_proj." in name:
                q, k, v = w.chunk(3)
                name = name.replace(".self_attn.in_proj.", ".attention.wq.")
                new[name] = halves(q, heads)
                new[name.replace(".wq.", ".wkv.")] = torch.cat([halves(k, heads), v])
            elif name == "downsample.conv.weight":
                new["encoder.out.conv.weight"] = torch.cat([w, torch.zeros_like(w)])
                new["encoder.out.conv.bias"] = torch.cat([torch.zeros(D), torch.full((D,), -12.0)])
            elif name == "upsample.conv.weight":
                new["decoder.up.conv.weight"] = up
                new["decoder.up.conv.bias"] = torch.zeros(up.shape[0])
            else:
                new[name] = w
        new["decoder.input.weight"] = (t["quantizer.output_proj.weight"][..., 0] if projected
                                       else torch.eye(D))
        new["decoder.input.bias"] = torch.zeros(cfg.dim)
    except (KeyError, IndexError, ValueError) as e:
        raise BadInput(f"these are not the tensors of a Mimi codec: {e}") from None
    fits(state, new, "Mimi")
    return cfg, new


def text_model(folder):
    """A Qwen3 or Llama folder -> (BackboneConfig, state dict of Transformer, embedding (V, C))."""
    try:
        with open(f"{folder}/config.json") as f:
            c = json.load(f)
    except (OSError, json.JSONDecodeError) as e:
        raise BadInput(f"{folder}/config.json: not readable ({e})") from None
    kind, rope = c.get("model_type"), c.get("rope_parameters") or c.get("rope_scaling") or {}
    if kind not in ("qwen3", "llama"):
        raise BadInput(f"{folder}: model_type '{kind}' is not supported; valid: qwen3, llama")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    for name, wrong in (("rotations of type " + scaling, scaling != "default"),
                        ("biases in attention", c.get("attention_bias")),
                        ("biases in the MLP", c.get("mlp_bias")),
                        ("sliding windows", c.get("use_sliding_window")),
                        (f"activation {c.get('hidden_act')}", c.get("hidden_act") != "silu")):
        if wrong:
            raise BadInput(f"{folder}: backbone.py has no {name}")
    try:
        cfg = BackboneConfig(
            dim=c["hidden_size"], layers=c["num_hidden_layers"], heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or 0, head_dim=c.get("head_dim") or 0,
            mlp="swiglu", mlp_dim=c["intermediate_size"], norm="rms", qk_norm=kind == "qwen3",
            norm_eps=c["rms_norm_eps"],
            rope_base=float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0))
        t = {name.removeprefix("model."): w for name, w in read_folder(folder).items()}
        state = {"norm.weight": t["norm.weight"]}
        for i in range(cfg.layers):
            theirs, ours = f"layers.{i}.", f"blocks.{i}."
            get = lambda *names: torch.cat([t[f"{theirs}{name}.weight"] for name in names])
            state |= {
                ours + "norm1.weight": get("input_layernorm"),
                ours + "norm2.weight": get("post_attention_layernorm"),
                ours + "attention.wq.weight": get("self_attn.q_proj"),
                ours + "attention.wkv.weight": get("self_attn.k_proj", "self_attn.v_proj"),
                ours + "attention.wo.weight": get("self_attn.o_proj"),
                ours + "mlp.up.weight": get("mlp.gate_proj", "mlp.up_proj"),
                ours + "mlp.down.weight": get("mlp.down_proj")}
            if cfg.qk_norm:
                state |= {f"{ours}attention.{n}.weight": get(f"self_attn.{n}")
                          for n in ("q_norm", "k_norm")}
        return cfg, state, t["embed_tokens.weight"]
    except KeyError as e:
        raise BadInput(f"{folder}: {e.args[0]} is missing; is this a {kind} model?") from None
    except ValueError as e:
        raise BadInput(f"{folder}/config.json: {e}") from None


def toward_noise(weight):
    """First layer of a time embedding (w, 256), Pocket TTS -> ours.

    It maps [cos fu, sin fu] of u = 1 - t (0 = noise); sinusoid() gives sqrt 2 [cos ft, sin ft].
    """
    f = torch.exp(torch.arange(128) * (-math.log(1e4) / 128))
    c, s = weight.chunk(2, 1)                                               # 2 x (w, 128)
    return torch.cat([c * f.cos() + s * f.sin(), c * f.sin() - s * f.cos()], 1) / math.sqrt(2)


def pocket_tts(tensors, eos_threshold=-4.0):
    """{name: tensor} of Pocket TTS's flow LM -> (CALMConfig, state dict of CALM, mean, std).

    Heads are 64 channels wide, as in every published size. The text table keeps its n + 1 rows (the
    last is padding, PAD of ours) and gets one unused row a kind. mean, std (D,) of the latents.
    """
    t = dict(tensors)
    try:
        dim, D = t.pop("input_linear.weight").shape
        layers = 1 + max(int(m[1]) for m in (re.match(r"transformer\.layers\.(\d+)\.", n)
                                             for n in t) if m)
        q = t["transformer.layers.0.self_attn.out_proj.weight"].shape[1]
        kv = (t["transformer.layers.0.self_attn.in_proj.weight"].shape[0] - q) // 2
        width, times = t["flow_net.cond_embed.weight"].shape[0], sum(
            f"flow_net.time_embed.{i}.mlp.0.weight" in t for i in range(2))
        if times == 0:
            raise BadInput("Pocket TTS: this head has no times (drifting or pointwise); "
                           "heads.py has no such objective")
        cfg = CALMConfig(
            backbone=BackboneConfig(
                dim=dim, layers=layers, heads=q // 64, kv_heads=kv // 64, head_dim=64,
                mlp="gelu_tanh", mlp_dim=t["transformer.layers.0.linear1.weight"].shape[0],
                norm="layer"),
            head=HeadConfig(
                objective="lsd" if times == 2 else "rectified_flow", width=width, time_norm=True,
                blocks=1 + max(int(m[1]) for m in (re.match(r"flow_net\.res_blocks\.(\d+)\.", n)
                                                   for n in t) if m),
                steps=1 if times == 2 else 16),
            noise=0.0, prompt_bos="bos_before_voice" in t)
        project = t.pop("z_proj.weight", torch.eye(dim))                    # (z, C)
        table = t.pop("conditioner.embed.weight")
        if "conditioner.proj.weight" in t:
            table = table @ t.pop("conditioner.proj.weight").T
        mean, std, voice = t.pop("emb_mean"), t.pop("emb_std"), t.pop("speaker_proj_weight")
        new = {
            "text.weight": torch.cat([table, torch.zeros(len(KINDS), dim)]),
            "prompt.weight": voice * std, "prompt.bias": voice @ mean,
            "latent.weight": tensors["input_linear.weight"], "latent.bias": torch.zeros(dim),
            "bos": tensors["input_linear.weight"] @ t.pop("bos_emb"),
            "eos.weight": t.pop("out_eos.weight") @ project,
            "eos.bias": t.pop("out_eos.bias") - eos_threshold}
        if cfg.prompt_bos:
            new["prompt_bos"] = t.pop("bos_before_voice")[0, 0]
        for name, w in t.items():
            name = re.sub(r"^transformer\.layers\.", "backbone.blocks.", name)
            name = name.replace("out_norm.", "backbone.norm.")
            name = name.replace(".linear1.", ".mlp.up.").replace(".linear2.", ".mlp.down.")
            name = name.replace(".self_attn.out_proj.", ".attention.wo.")
            name = name.replace("flow_net.", "head.net.").replace(".cond_embed.", ".cond.")
            name = name.replace(".time_embed.0.mlp.", ".time.").replace(".3.alpha", ".3.weight")
            name = name.replace(".time_embed.1.mlp.", ".until.")
            name = name.replace(".input_proj.", ".input.").replace(".res_blocks.", ".blocks.")
            name = name.replace(".in_ln.", ".norm.").replace(".adaLN_modulation.", ".ada.")
            name = name.replace(".final_layer.linear.", ".output.").replace(".final_layer.", ".")
            if ".self_attn.in_proj." in name:
                name = name.replace(".self_attn.in_proj.", ".attention.wq.")
                query, key, value = w.split([q, kv, kv])
                new[name] = halves(query, q // 64)
                w = torch.cat([halves(key, kv // 64), value])
                name = name.replace(".wq.", ".wkv.")
            elif re.search(r"\.(time|until)\.0\.weight", name):
                w = toward_noise(w)
            elif ".output." in name:
                w = -w
            elif name.endswith(".cond.weight"):
                w = w @ project
            elif name.endswith(".freqs"):
                if not torch.allclose(w, torch.exp(torch.arange(128) * (-math.log(1e4) / 128))):
                    raise BadInput(f"Pocket TTS: {name} are other frequencies than heads.py's")
                continue
            new[name] = w
    except (KeyError, IndexError, ValueError) as e:
        raise BadInput(f"these are not the tensors of Pocket TTS: {e}") from None
    with torch.device("meta"):
        want = CALM(cfg, D, len(new["text.weight"]), KINDS).state_dict()
    fits(want, new, "Pocket TTS")
    return cfg, new, mean, std


def save_run(out, cfg, stage, state):
    """config.toml and <stage>.pt of a run; stage "text" is a start for training, not a model."""
    path = f"{out}/{stage}.pt"
    os.makedirs(out, exist_ok=True)
    with open(f"{out}/config.toml", "w") as f:
        f.write(dump(cfg))
    save_checkpoint(path, {"stage": stage, "step": 0, "done": True,
                           "config": dataclasses.asdict(cfg), "model": state, "ema": None,
                           "optimizers": {}})
    return path, sum(v.numel() for v in state.values()) / 1e6


def keep_tokenizer(source, out):
    """Copy tokenizer.json into the run, which then needs nothing else."""
    if not os.path.isfile(source):
        raise BadInput(f"{source}: no such file; the text embedding's rows mean nothing without it")
    os.makedirs(out, exist_ok=True)
    shutil.copyfile(source, f"{out}/tokenizer.json")
    return f"{out}/tokenizer.json"


def convert_text(a):
    backbone, state, table = text_model(a.weights)
    if a.what != ("qwen3" if backbone.qk_norm else "llama"):
        raise BadInput(f"{a.weights}: is not a {a.what} model, its config.json says otherwise")
    cfg = load(a.config) if a.config else Config()
    tokenizer = keep_tokenizer(f"{a.weights}/tokenizer.json", a.out)
    model = dataclasses.replace(getattr(cfg, a.stage), backbone=backbone)
    try:
        cfg = dataclasses.replace(cfg, out=a.out, **{a.stage: model},
                                  data=dataclasses.replace(cfg.data, tokenizer=tokenizer))
    except ValueError as e:                          # an inner monologue is made of bytes
        raise BadInput(f"--config {a.config}: {e}") from None
    getattr(cfg.train, a.stage).init = f"{a.out}/text.pt"
    torch.manual_seed(cfg.seed)
    lm, ids = make_model(cfg, a.stage), first_special(cfg.data)
    if ids > len(table):
        raise BadInput(f"{a.weights}: its tokenizer knows {ids} tokens, "
                       f"its embedding has {len(table)} rows")
    net = lm if a.stage == "lm" else lm.head.net
    net.backbone.load_state_dict(state)
    with torch.no_grad():
        for p in [net.text.weight, net.bos if a.stage == "lm" else net.null] + [
                p for name in ("latent", "prompt", "noisy") if hasattr(net, name)
                for p in getattr(net, name).parameters()]:
            p *= table.std() / 0.5                           # .5: the scale that they start with
        net.text.weight[:ids] = table[:ids]
    path, size = save_run(a.out, cfg, "text", lm.state_dict())
    print(f"{path}: {size:.1f}M parameters, {ids} tokens of text; "
          f"train it: python train.py --config {a.out}/config.toml")


def convert_mimi(a):
    vae, state = mimi(read(a.weights), a.heads, a.context, a.sample_rate)
    net = VAE(vae).eval()
    net.load_state_dict(state)
    if a.data:
        clips = load_manifest(a.data)
        clips = clips[:: max(1, len(clips) // 400)]
        net.measure(torch.tensor(load_audio(c.audio, vae.sample_rate, vae.channels, seconds=10.0,
                                            allow_silence=True))[None]
                    for c in tqdm(clips, desc="measuring latents", unit="clip"))
        state = net.state_dict()
    cfg = Config(out=a.out, stages=["lm", "consistency"], vae=vae)
    path, size = save_run(a.out, cfg, "vae", {f"vae.{k}": v for k, v in state.items()})
    print(f"{path}: {size:.1f}M parameters, {vae.frame_rate:g} latents of "
          f"{vae.latent_dim} a second")


def convert_pocket(a):
    tensors = read(a.weights)
    part = lambda name: {k.removeprefix(name): w for k, w in tensors.items() if k.startswith(name)}
    vae, codec = mimi(part("mimi."), a.heads, a.context, a.sample_rate)
    lm, state, codec["latent_mean"], codec["latent_std"] = pocket_tts(
        part("flow_lm."), a.eos_threshold)
    beside = os.path.join(os.path.dirname(a.weights), "tokenizer.json")
    tokenizer = keep_tokenizer(a.tokenizer or beside, a.out)
    # at most 50 tokens a sentence and 30 s of voice, as its own front end has it
    data = DataConfig(tokenizer=tokenizer, kind_token=False, text_len=50, prompt_frames=375)
    cfg = Config(out=a.out, vae=vae, lm=lm, data=data,
                 sample=SampleConfig(temperature=0.3, seconds=20.0))
    if vocabulary(data) != len(state["text.weight"]):
        raise BadInput(f"{tokenizer}: knows {first_special(data)} tokens, "
                       f"the text table has {len(state['text.weight']) - 4}")
    for stage, weights in (("vae", {f"vae.{k}": v for k, v in codec.items()}), ("lm", state)):
        path, size = save_run(a.out, cfg, stage, weights)
        print(f"{path}: {size:.1f}M parameters")
    print(f"listen: python sample.py --run {a.out} --prompt voice.wav --text \"Hello world.\"")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mimi", "pocket-tts", "qwen3", "llama"],
                        help="which published model")
    parser.add_argument("weights", help="its .safetensors file, or the folder of a text model")
    parser.add_argument("--out", required=True, help="the run folder to make")
    parser.add_argument("--heads", type=int, default=8, help="attention heads of Mimi (8)")
    parser.add_argument("--context", type=int, default=250,
                        help="positions that a transformer layer sees (Mimi: 250)")
    parser.add_argument("--data", help="manifest or folder of audio to measure the latents on")
    parser.add_argument("--sample-rate", type=int, default=24000, help="Hz (Mimi: 24000)")
    parser.add_argument("--stage", default="lm", choices=["lm", "audiocalm"],
                        help="qwen3, llama: the model that gets the backbone (default: lm, CALM)")
    parser.add_argument("--config", help="qwen3, llama: the experiment that gets this backbone "
                        "(default: the defaults of config.py)")
    parser.add_argument("--tokenizer", help="pocket-tts: its tokenizer.json "
                        "(default: the one beside the weights)")
    parser.add_argument("--eos-threshold", type=float, default=-4.0,
                        help="pocket-tts: the logit above which a clip ends (default -4)")
    a = parser.parse_args()
    if not os.path.exists(a.weights):
        raise BadInput(f"{a.weights}: no such file")
    stage = "text" if a.what in ("qwen3", "llama") else "vae"
    if os.path.exists(f"{a.out}/{stage}.pt"):
        raise BadInput(f"{a.out}/{stage}.pt exists; choose another --out")
    convert = {"mimi": convert_mimi, "pocket-tts": convert_pocket}.get(a.what, convert_text)
    convert(a)


if __name__ == "__main__":
    cli(main)
