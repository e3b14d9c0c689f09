"""Pocket TTS, Kyutai's text to speech, becomes a CALM; its codec is Mimi (mimi.py).

    conditioner.embed (n + 1, C)     ─► text (n + 1 + kinds, C)
    speaker_proj (C, D), emb_*       ─► prompt       voice, normalised latents
    input_linear (C, D), bos_emb     ─► latent, bos
    transformer.layers.0             ─► backbone.blocks.0
    flow_net.*                       ─► head.net.*   one time: rectified flow; two: LSD
    out_eos                          ─► eos

Where its flow LM differs from ours, the difference is folded into the weights, exactly.
- Its time runs from noise at 0 to data at 1, ours from data to noise. cos f(1-t) and sin f(1-t) are
  rotations of cos ft and sin ft, done in the first layer of the time embeddings; the output changes
  its sign.
- emb_mean and emb_std are the VAE's latent_mean and latent_std. Its voice prompt takes latents as
  they are, ours takes normalised ones: speaker_proj absorbs the difference. BOS is
  input_linear(bos_emb).
- It stops where the EOS logit is above --eos-threshold (-4), ours stops above 0: the bias moves.
- The low-rank text table and z_proj of its small models are multiplied out.
What stays a switch: prompt_bos, head.time_norm, data.kind_token. Left to the caller, since these
are no weights: Pocket TTS starts text with a capital and ends it with a full stop, ignores EOS in
the first 6 latents, and continues for a few latents after it. Heads without times (drifting,
pointwise) are refused.
"""
import math
import os
import re

import torch

from backbone import BackboneConfig
from calm import CALM, CALMConfig
from cli import BadInput
from config import Config, SampleConfig
from data import KINDS, DataConfig, pad_id, vocabulary
from heads import HeadConfig
from tools.convert import mimi
from tools.convert.runs import keep_tokenizer, save_run, vae_checkpoint
from tools.convert.tensors import (below, check_shapes, count, halves, read, refuse_leftovers,
                                   rename)

HEAD_DIM = 64                   # channels per attention head, in every published model

# the flow LM's names -> CALM's
CALM_NAMES = (
    (r"^transformer\.layers\.", "backbone.blocks."),
    (r"out_norm\.", "backbone.norm."),
    (r"\.linear1\.", ".mlp.up."),
    (r"\.linear2\.", ".mlp.down."),
    (r"\.self_attn\.in_proj\.", ".attention.wq."),
    (r"\.self_attn\.out_proj\.", ".attention.wo."),
    (r"flow_net\.", "head.net."),
    (r"\.cond_embed\.", ".cond."),
    (r"\.time_embed\.0\.mlp\.", ".time."),
    (r"\.time_embed\.1\.mlp\.", ".until."),
    (r"\.3\.alpha", ".3.weight"),
    (r"\.input_proj\.", ".input."),
    (r"\.res_blocks\.", ".blocks."),
    (r"\.in_ln\.", ".norm."),
    (r"\.adaLN_modulation\.", ".ada."),
    (r"\.final_layer\.linear\.", ".output."),
    (r"\.final_layer\.", "."),
)


def run(args):
    """Write a run with a VAE and a language model, ready to speak."""
    tensors = read(args.weights)
    refuse_leftovers(args.weights, "tensors are", (name for name in tensors
                                                   if not name.startswith(("mimi.", "flow_lm."))))
    vae_cfg, vae_state = mimi.to_vae(below(tensors, "mimi."), args.heads, args.context,
                                     args.sample_rate)
    lm_cfg, lm_state, mean, std = to_calm(below(tensors, "flow_lm."), args.eos_threshold)
    vae_state["latent_mean"] = mean
    vae_state["latent_std"] = std

    # at most 50 tokens per sentence and 30 s of voice, as in Pocket TTS's front end
    beside_weights = os.path.join(os.path.dirname(args.weights), "tokenizer.json")
    tokenizer = keep_tokenizer(args.tokenizer or beside_weights, args.out)
    data = DataConfig(tokenizer=tokenizer, kind_token=False, text_len=50, prompt_frames=375)
    rows = len(lm_state["text.weight"])
    if vocabulary(data) != rows:
        raise BadInput(f"{tokenizer}: has {pad_id(data)} tokens, the text table is for "
                       f"{rows - 1 - len(KINDS)}")

    cfg = Config(out=args.out, vae=vae_cfg, lm=lm_cfg, data=data,
                 sample=SampleConfig(temperature=0.3, seconds=20.0))
    for stage, state in (("vae", vae_checkpoint(vae_state)), ("lm", lm_state)):
        path, size = save_run(args.out, cfg, stage, state)
        print(f"{path}: {size:.1f}M parameters")
    print(f"listen: python sample.py --run {args.out} --prompt voice.wav --text \"Hello world.\"")


def to_calm(tensors, eos_threshold=-4.0):
    """Convert Pocket TTS's flow LM {name: tensor} -> (CALMConfig, state dict of CALM, mean, std).

    The text table keeps its n + 1 rows (the last is padding, our PAD) and gets one unused row per
    kind. mean, std (D,) are those of the latents.
    """
    try:
        cfg = read_config(tensors)
        state = calm_state(tensors, cfg, eos_threshold)
        latent_dim = tensors["input_linear.weight"].shape[1]
        mean = tensors["emb_mean"]
        std = tensors["emb_std"]
    except (KeyError, IndexError, ValueError, RuntimeError, ZeroDivisionError) as e:
        first = str(e).strip().splitlines()[0]
        raise BadInput(f"these are not the tensors of Pocket TTS: {first}") from None

    with torch.device("meta"):
        expected = CALM(cfg, latent_dim, len(state["text.weight"]), KINDS).state_dict()
    check_shapes(expected, state, "Pocket TTS")
    return cfg, state, mean, std


def read_config(tensors):
    """Read the sizes from the tensors' shapes -> CALMConfig."""
    layer = "transformer.layers.0.self_attn."
    q_dim = tensors[layer + "out_proj.weight"].shape[1]              # over all heads
    qkv_dim = tensors[layer + "in_proj.weight"].shape[0]
    kv_dim = (qkv_dim - q_dim) // 2                                  # of k alone
    backbone = BackboneConfig(
        dim=tensors["input_linear.weight"].shape[0],
        layers=count(tensors, r"transformer\.layers\.(\d+)\."),
        heads=q_dim // HEAD_DIM, kv_heads=kv_dim // HEAD_DIM,
        head_dim=HEAD_DIM, mlp="gelu_tanh",
        mlp_dim=tensors["transformer.layers.0.linear1.weight"].shape[0], norm="layer")

    # one time belongs to a velocity, two to a flow map
    width = tensors["flow_net.cond_embed.weight"].shape[0]
    times = sum(f"flow_net.time_embed.{i}.mlp.0.weight" in tensors for i in range(2))
    if times == 0:
        raise BadInput("Pocket TTS: this head has no times (drifting or pointwise); "
                       "heads.py has no such objective")
    head = HeadConfig(
        objective="lsd" if times == 2 else "rectified_flow", steps=1 if times == 2 else 16,
        width=width, time_norm=True,
        blocks=count(tensors, r"flow_net\.res_blocks\.(\d+)\."))
    return CALMConfig(backbone=backbone, head=head, noise=0.0,
                      prompt_bos="bos_before_voice" in tensors)


def calm_state(tensors, cfg, eos_threshold):
    """The flow LM's tensors -> state dict of CALM."""
    tensors = dict(tensors)                      # what is converted is taken out of it
    dim = cfg.backbone.dim
    latent = tensors.pop("input_linear.weight")                      # (C, D)
    z_proj = tensors.pop("z_proj.weight", torch.eye(dim))            # (z, C)

    # the voice prompt takes normalised latents
    mean = tensors.pop("emb_mean")                                   # (D,)
    std = tensors.pop("emb_std")
    voice = tensors.pop("speaker_proj_weight")                       # (C, D)

    # a low-rank text table is multiplied out; kinds get unused rows
    table = tensors.pop("conditioner.embed.weight")                  # (n + 1, C) or (n + 1, r)
    if "conditioner.proj.weight" in tensors:
        table = table @ tensors.pop("conditioner.proj.weight").T

    state = {
        "text.weight": torch.cat([table, torch.zeros(len(KINDS), dim)]),
        "prompt.weight": voice * std,
        "prompt.bias": voice @ mean,
        "latent.weight": latent,
        "latent.bias": torch.zeros(dim),
        "bos": latent @ tensors.pop("bos_emb"),
        "eos.weight": tensors.pop("out_eos.weight") @ z_proj,
        "eos.bias": tensors.pop("out_eos.bias") - eos_threshold,
    }
    if cfg.prompt_bos:
        state["prompt_bos"] = tensors.pop("bos_before_voice")[0, 0]

    for name, weight in tensors.items():
        state |= converted(rename(name, CALM_NAMES), weight, cfg.backbone, z_proj)
    return state


def converted(name, weight, backbone, z_proj):
    """One tensor of the transformer or the head under CALM's name -> its part of the state dict."""
    if name.endswith(".attention.wq.weight"):
        kv_dim = backbone.kv_heads * HEAD_DIM
        q, k, v = weight.split([backbone.heads * HEAD_DIM, kv_dim, kv_dim])
        k = halves(k, backbone.kv_heads)
        return {name: halves(q, backbone.heads),
                name.replace(".wq.", ".wkv."): torch.cat([k, v])}

    # time runs the other way: so do the embedding and the sign of the velocity
    if re.search(r"\.(time|until)\.0\.weight", name):
        return {name: toward_noise(weight)}
    if ".output." in name:
        return {name: -weight}

    if name.endswith(".cond.weight"):
        return {name: weight @ z_proj}
    if name.endswith(".freqs"):
        if not torch.allclose(weight, time_frequencies()):
            raise BadInput(f"Pocket TTS: {name} has other frequencies than heads.py")
        return {}
    return {name: weight}


def time_frequencies():
    """The 128 frequencies f of the time embeddings, as in heads.sinusoid."""
    return torch.exp(torch.arange(128) * (-math.log(1e4) / 128))


def toward_noise(weight):
    """Reverse time in the first layer of a time embedding (w, 256).

    Pocket TTS's layer reads [cos fu, sin fu] of u = 1 - t (u = 0 is noise); ours reads
    sinusoid() = sqrt 2 [cos ft, sin ft].
    """
    f = time_frequencies()
    cos, sin = weight.chunk(2, 1)                                    # (w, 128) each
    reversed_time = torch.cat([cos * f.cos() + sin * f.sin(), cos * f.sin() - sin * f.cos()], 1)
    return reversed_time / math.sqrt(2)
