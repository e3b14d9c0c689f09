"""Mimi, Kyutai's codec, becomes a VAE.

    encoder.model.0.conv             ─► encoder.conv.0
    encoder_transformer.*.layers.0   ─► encoder.transformer.blocks.0
    downsample.conv  (D, C, k)       ─► encoder.out  (2 D, C, k): mean, log-variance -12
    quantizer.*      (codebooks)     ─► left out
    quantizer.output_proj (C, D)     ─► decoder.input: pocket-tts; the identity for moshi
    upsample.convtr                  ─► decoder.up
    decoder_transformer, decoder     ─► as in the encoder

Sizes (ratios, widths, layers, strides) are read from the tensors' shapes. What the shapes do not
show has Mimi's values unless given: --heads 8, --context 250 (positions that the transformers see),
--sample-rate 24000. Decoders whose sizes differ from their encoder's (pocket-tts's models below
90M) are refused.

Changes to the weights, all exact:
- in_proj (3 C, C) becomes wq and wkv. Mimi rotates neighbouring channels (2i, 2i + 1), backbone.py
  channels (i, i + d/2): the rows of q and k are put in that order within each head.
- A convolution without bias gets a bias of zeros; weight norm (weight_g, weight_v) is multiplied
  out.
- Bottleneck: the latents are the output of the downsampling convolution. pocket-tts maps them to
  the decoder's width (output_proj), moshi does not (512 channels before its quantiser). The
  log-variance is the constant -12, since these codecs publish no posterior.
"""
import dataclasses
import math
import re

import torch
from tqdm import tqdm

from audio import load_audio
from cli import BadInput
from config import Config
from schema import build
from data import load_manifest
from intervals import drawn_evenly
from tools.convert.runs import save_run, vae_checkpoint
from tools.convert.tensors import check_shapes, count, halves, read, rename
from vae import VAE, VAEConfig

MAX_CLIPS = 400                 # measured for --data, about

# moshi's and pocket-tts's names -> one naming; wrapped convolutions lose their repeated ".conv"
ONE_NAMING = (
    (r"^(mimi\.|model\.)", ""),
    (r"(\.conv)+\.", ".conv."),
    (r"(\.convtr)+\.", ".convtr."),
    (r"\.(in|out)_proj(s\.0\.|\.|_)weight$", r".\1_proj.weight"),
)

# that naming -> the VAE's
VAE_NAMES = (
    (r"^(encoder|decoder)\.model\.", r"\1.conv."),
    (r"\.block\.", ".body."),
    (r"\.convtr\.", ".conv."),
    (r"^(encoder|decoder)_transformer\.transformer\.layers", r"\1.transformer.blocks"),
    (r"\.layer_scale_(\d)\.scale$", r".scale\1"),
    (r"\.linear1\.", ".mlp.up."),
    (r"\.linear2\.", ".mlp.down."),
    (r"\.self_attn\.out_proj\.", ".attention.wo."),
)


def left_out(tensors):
    """A line that counts the quantiser's tensors, which no rule converts, and names the first."""
    names = sorted(name for name in one_naming(tensors) if name.startswith("quantizer.")
                   and name != "quantizer.output_proj.weight")
    return (f"left out: {len(names)} tensors of the quantiser, behind which a VAE has nothing"
            + (f", e.g. {names[0]}" if names else ""))


def run(args):
    """Write a run with a VAE."""
    tensors = read(args.weights)
    vae_cfg, state = to_vae(tensors, args.heads, args.context, args.sample_rate)
    print(left_out(tensors))
    vae = VAE(vae_cfg).eval()
    vae.load_state_dict(state)

    # mean and standard deviation of the latents
    if args.data:
        clips = drawn_evenly(load_manifest(args.data), MAX_CLIPS)
        vae.set_latent_statistics(load_wav(clip, vae_cfg)
                    for clip in tqdm(clips, desc="measuring latents", unit="clip"))
        state = vae.state_dict()

    cfg = Config(out=args.out, stages=["lm", "consistency"], vae=vae_cfg)
    path, size = save_run(args.out, cfg, "vae", vae_checkpoint(state))
    print(f"{path}: {size:.1f}M parameters, {vae_cfg.frame_rate:g} latents of "
          f"{vae_cfg.latent_dim} per second")


def load_wav(clip, vae_cfg):
    """At most 10 s of a clip, as the VAE reads it (1, channels, S)."""
    wav = load_audio(clip.audio, vae_cfg.sample_rate, vae_cfg.channels, seconds=10.0,
                     allow_silence=True)
    return torch.tensor(wav)[None]


def to_vae(tensors, heads=8, context=250, sample_rate=24000):
    """Convert Mimi's tensors {name: tensor} -> (VAEConfig, state dict of VAE).

    context: positions that the transformers see; sample_rate: Hz.
    """
    tensors = one_naming(tensors)
    try:
        cfg = read_config(tensors, heads, context, sample_rate)
        build(VAEConfig, dataclasses.asdict(cfg), "vae")
        expected = VAE(cfg).state_dict()
        state = vae_state(tensors, cfg)
    except (KeyError, IndexError, ValueError, RuntimeError, ZeroDivisionError) as e:
        first = str(e).strip().splitlines()[0]
        raise BadInput(f"these are not the tensors of a Mimi codec: {first}") from None

    check_shapes(expected, state, "Mimi")
    return cfg, state


def one_naming(tensors):
    """Bring the names of both packages into one naming, and multiply weight norm out."""
    named = {rename(name, ONE_NAMING): tensor for name, tensor in tensors.items()}

    for name in [name for name in named if name.endswith(".weight_g")]:
        stem = name.removesuffix("_g")
        gain = named.pop(stem + "_g")
        direction = named.pop(stem + "_v")
        named[stem] = torch._weight_norm(direction, gain, 0)
    return named


def read_config(tensors, heads, context, sample_rate):
    """Read the sizes from the tensors' shapes -> VAEConfig."""
    # the encoder's convolutions outside its residual units: first, one per ratio, last
    matches = (re.match(r"encoder\.model\.(\d+)\.conv\.weight", name) for name in tensors)
    convolutions = sorted(int(match[1]) for match in matches if match)
    shapes = [tensors[f"encoder.model.{i}.conv.weight"].shape for i in convolutions]
    first, *strided, last = shapes                                   # (out, in, kernel) each
    units = sum(f"encoder.model.{i}.block.1.conv.weight" in tensors
                for i in range(convolutions[1]))

    # kernels are twice the stride
    latent_dim, _, kernel = tensors["downsample.conv.weight"].shape
    inner = kernel // 2
    ratios = [kernel // 2 for _, _, kernel in reversed(strided)]
    hop = inner * math.prod(ratios)

    layers = {part: count(tensors, rf"{part}_transformer\.transformer\.layers\.(\d+)\.")
              for part in ("encoder", "decoder")}
    projected = "quantizer.output_proj.weight" in tensors
    return VAEConfig(
        encoder="conv", decoder="conv", block="seanet", stft_hop=0,
        sample_rate=sample_rate, channels=first[1], latent_dim=latent_dim, ratios=ratios,
        inner=inner, width=first[0], width_max=strided[-1][0], res_layers=units, dim=last[0],
        heads=heads, encoder_layers=layers["encoder"], decoder_layers=layers["decoder"],
        transformer_style="pocket" if projected else "mimi",
        context=context * hop / inner / sample_rate)


def vae_state(tensors, cfg):
    """Tensors in one naming -> state dict of VAE."""
    D = cfg.latent_dim
    state = {"latent_mean": torch.zeros(D), "latent_std": torch.ones(D)}
    for name, weight in tensors.items():
        new_name = rename(name, VAE_NAMES)

        if name.startswith("quantizer."):
            continue
        if name == "downsample.conv.weight":
            # mean and constant log-variance
            state["encoder.out.conv.weight"] = torch.cat([weight, torch.zeros_like(weight)])
            state["encoder.out.conv.bias"] = torch.cat([torch.zeros(D), torch.full((D,), -12.0)])
        elif name == "upsample.convtr.weight":
            state["decoder.up.conv.weight"] = weight
            state["decoder.up.conv.bias"] = torch.zeros(weight.shape[0])
        elif ".self_attn.in_proj." in name:
            q, k, v = weight.chunk(3)
            stem, end = new_name.split("self_attn.in_proj")
            state[f"{stem}attention.wq{end}"] = halves(q, cfg.heads)
            state[f"{stem}attention.wkv{end}"] = torch.cat([halves(k, cfg.heads), v])
        else:
            state[new_name] = weight

    # from latents to the decoder's width: moshi's latents have it already
    state["decoder.input.weight"] = torch.eye(D)
    if cfg.transformer_style == "pocket":
        state["decoder.input.weight"] = tensors["quantizer.output_proj.weight"][..., 0]
    state["decoder.input.bias"] = torch.zeros(cfg.dim)
    return state
