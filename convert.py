"""Start from published weights: python convert.py mimi IN.safetensors --out RUN

    mimi    Kyutai's codec, its tensors named as in PyPI `moshi` or `pocket-tts`
            -> a run folder with config.toml and vae.pt for evaluate.py, sample.py and train.py
    qwen3, llama    a text model, as a folder with config.json, *.safetensors, tokenizer.json
            -> a run folder with config.toml (that of --config, with the text model's sizes and
            tokenizer) and text.pt: CALM whose backbone and text embedding are the text model's,
            the rest random. python train.py --config RUN/config.toml trains from there.

    model.layers.0.self_attn.q_proj  (H d, C)   ─► backbone.blocks.0.attention.wq   (H d, C)
                        k_proj, v_proj          ─►                          wkv     (2 Hkv d, C)
    model.layers.0.mlp.gate_proj, up_proj       ─► backbone.blocks.0.mlp.up         (2 F, C)
    model.embed_tokens (V, C)                   ─► text (V' + PAD + kinds, C), V' of the tokenizer

A text model's rotations already pair channels as backbone.py does. Its output layer stays behind,
CALM has no use for it. What is random (latents, BOS, kinds, PAD) starts at the scale of the text
embedding. Rotations with scaling (Llama 3.1 and later) and biases are refused, not approximated.

Mimi: sizes (ratios, widths, layers, strides) are read off the tensors. What tensors do not tell is Mimi's
own unless given: --heads 8, --context 250 (positions of the transformers), --sample-rate 24000.

Changes to Mimi's weights, all exact:
- in_proj (3 C, C) becomes wq and wkv. Mimi rotates neighbouring channels (2i, 2i + 1), backbone.py
  channels (i, i + d/2): the rows of q and k are put in that order within each head.
- a convolution without bias gets a bias of zeros; weight norm (weight_g, weight_v) is multiplied
  out.
- the bottleneck: latents are what comes out of the downsampling convolution. pocket-tts maps them
  to the decoder's width (output_proj), moshi does not (512 channels before its quantiser). The
  log-variance is the constant -12: these codecs publish no posterior. Codebooks are left out.

--data MANIFEST measures the latents' mean and standard deviation on up to 400 clips, which a
language model needs; without it they are 0 and 1.
Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse
import dataclasses
import glob
import json
import os
import re
import shutil

import torch
from tqdm import tqdm

from backbone import BackboneConfig
from calm import CALM
from config import Config, dump, load, save_checkpoint
from data import (KINDS, BadInput, Parser, cli, first_special, load_audio, load_manifest,
                  vocabulary)
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
    for name in state.keys() ^ new.keys():
        what = "missing" if name in state else "not understood"
        raise BadInput(f"Mimi: tensor {name} is {what}; is this another version of the codec?")
    for name, want in state.items():
        if want.shape != new[name].shape:
            raise BadInput(f"Mimi: {name} is {tuple(new[name].shape)}, "
                           f"the sizes read off the other tensors ask for {tuple(want.shape)}")
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
    cfg = dataclasses.replace(cfg, out=a.out, lm=dataclasses.replace(cfg.lm, backbone=backbone),
                              data=dataclasses.replace(cfg.data, tokenizer=tokenizer))
    cfg.train.lm.init = f"{a.out}/text.pt"
    torch.manual_seed(cfg.seed)
    lm, ids = CALM(cfg.lm, cfg.vae.latent_dim, vocabulary(cfg.data), KINDS), first_special(cfg.data)
    if ids > len(table):
        raise BadInput(f"{a.weights}: its tokenizer knows {ids} tokens, "
                       f"its embedding has {len(table)} rows")
    lm.backbone.load_state_dict(state)
    with torch.no_grad():
        for p in (lm.text.weight, lm.bos, *lm.latent.parameters(), *lm.prompt.parameters()):
            p *= table.std() / 0.5                           # .5: the scale that CALM gives them
        lm.text.weight[:ids] = table[:ids]
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


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mimi", "qwen3", "llama"], help="which published model")
    parser.add_argument("weights", help="its .safetensors file, or the folder of a text model")
    parser.add_argument("--out", required=True, help="the run folder to make")
    parser.add_argument("--heads", type=int, default=8, help="attention heads (Mimi: 8)")
    parser.add_argument("--context", type=int, default=250,
                        help="positions that a transformer layer sees (Mimi: 250)")
    parser.add_argument("--data", help="manifest or folder of audio to measure the latents on")
    parser.add_argument("--sample-rate", type=int, default=24000, help="Hz (Mimi: 24000)")
    parser.add_argument("--config", help="qwen3, llama: the experiment that gets this backbone "
                        "(default: the defaults of config.py)")
    a = parser.parse_args()
    if not os.path.exists(a.weights):
        raise BadInput(f"{a.weights}: no such file")
    stage = "vae" if a.what == "mimi" else "text"
    if os.path.exists(f"{a.out}/{stage}.pt"):
        raise BadInput(f"{a.out}/{stage}.pt exists; choose another --out")
    if a.what in ("qwen3", "llama"):
        convert_text(a)
    else:
        convert_mimi(a)


if __name__ == "__main__":
    cli(main)
