"""Start from published weights: python convert.py mimi IN.safetensors --out RUN

    mimi    Kyutai's codec, its tensors named as in PyPI `moshi` or `pocket-tts`
            -> a run folder with config.toml and vae.pt for evaluate.py, sample.py and train.py

Sizes (ratios, widths, layers, strides) are read off the tensors. What tensors do not tell is Mimi's
own unless given: --heads 8, --context 250 (positions of the transformers), --sample-rate 24000.

Changes to the weights, all exact:
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
import os
import re

import torch
from tqdm import tqdm

from config import Config, dump, save_checkpoint
from data import BadInput, Parser, cli, load_audio, load_manifest
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


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mimi"], help="which published model")
    parser.add_argument("weights", help="its .safetensors file")
    parser.add_argument("--out", required=True, help="the run folder to make")
    parser.add_argument("--heads", type=int, default=8, help="attention heads (Mimi: 8)")
    parser.add_argument("--context", type=int, default=250,
                        help="positions that a transformer layer sees (Mimi: 250)")
    parser.add_argument("--data", help="manifest or folder of audio to measure the latents on")
    parser.add_argument("--sample-rate", type=int, default=24000, help="Hz (Mimi: 24000)")
    a = parser.parse_args()
    if not os.path.isfile(a.weights):
        raise BadInput(f"{a.weights}: no such file")
    if os.path.exists(f"{a.out}/vae.pt"):
        raise BadInput(f"{a.out}/vae.pt exists; choose another --out")
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
    os.makedirs(a.out, exist_ok=True)
    with open(f"{a.out}/config.toml", "w") as f:
        f.write(dump(cfg))
    save_checkpoint(f"{a.out}/vae.pt", {
        "stage": "vae", "step": 0, "done": True, "config": dataclasses.asdict(cfg),
        "model": {f"vae.{k}": v for k, v in state.items()}, "ema": None, "optimizers": {}})
    size = sum(v.numel() for v in state.values())
    print(f"{a.out}/vae.pt: {size / 1e6:.1f}M parameters, {vae.frame_rate:g} latents of "
          f"{vae.latent_dim} a second")


if __name__ == "__main__":
    cli(main)
