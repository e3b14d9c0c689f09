"""A Qwen3 or Llama text model becomes the backbone and the text embedding of CALM or AudioCALM.

    model.layers.0.self_attn.q_proj  (H d, C)   ─► backbone.blocks.0.attention.wq   (H d, C)
                        k_proj, v_proj          ─►                          wkv     (2 Hkv d, C)
    model.layers.0.mlp.gate_proj, up_proj       ─► backbone.blocks.0.mlp.up         (2 F, C)
    model.embed_tokens (V, C)                   ─► text (V' + PAD + kinds, C), V' of the tokenizer

Its rotary embeddings already pair channels as backbone.py does. The output layer is left out, since
CALM does not use it. Random embeddings (latents, BOS, kinds, PAD) start at the scale of the text
embedding. Scaled rotary embeddings (Llama 3.1 and later) and biases are refused, not approximated.
"""
import dataclasses
import functools
import json

import torch

from backbone import BackboneConfig, Transformer
from cli import BadInput
from config import Config, load, make_model
from data import pad_id
from tools.convert.runs import keep_tokenizer, save_run
from tools.convert.tensors import check_shapes, read_folder, refuse_leftovers

# keys of config.json that are read here, and those that change no output of the backbone
USED = {"model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "rope_theta",
        "rope_parameters", "rope_scaling", "hidden_act", "attention_bias", "mlp_bias",
        "use_sliding_window"}
HARMLESS = {"architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
            "initializer_range", "is_llama_config", "max_position_embeddings",
            "max_window_layers", "pad_token_id",
            "pretraining_tp", "sliding_window", "tie_word_embeddings", "torch_dtype",
            "transformers.js_config",
            "transformers_version", "use_cache", "vocab_size"}
# tensors without a place in CALM: the output layer, and what RoPE is computed from
UNUSED = ("lm_head.weight", "rotary_emb.inv_freq")


def run(args):
    """Write a run whose language model starts from a text model."""
    backbone, weights, table = to_backbone(args.weights)
    if args.model != ("qwen3" if backbone.qk_norm else "llama"):
        raise BadInput(f"{args.weights}: not a {args.model} model according to its config.json")

    # the experiment, with the text model's sizes and tokenizer
    cfg = load(args.config) if args.config else Config()
    tokenizer = keep_tokenizer(f"{args.weights}/tokenizer.json", args.out)
    model_table = dataclasses.replace(getattr(cfg, args.stage), backbone=backbone)
    try:
        cfg = dataclasses.replace(cfg, out=args.out, **{args.stage: model_table},
                                  data=dataclasses.replace(cfg.data, tokenizer=tokenizer))
    except ValueError as e:                          # e.g. lm.monologue without a kind
        raise BadInput(f"--config {args.config}: {e}") from None
    getattr(cfg.train, args.stage).init = f"{args.out}/text.pt"

    torch.manual_seed(cfg.seed)
    lm = make_model(cfg, args.stage)
    tokens = pad_id(cfg.data)
    if tokens > len(table):
        raise BadInput(f"{args.weights}: its tokenizer has {tokens} tokens, its embedding has only "
                       f"{len(table)} rows")

    # the text model's weights, and its scale for all other embeddings
    net = lm if args.stage == "lm" else lm.head.net
    net.backbone.load_state_dict(weights)
    with torch.no_grad():
        for parameter in net.embeddings():
            parameter *= table.std() / 0.5                   # 0.5: the scale that they start with
        net.text.weight[:tokens] = table[:tokens]

    path, size = save_run(args.out, cfg, "text", lm.state_dict())
    print(f"{path}: {size:.1f}M parameters, {tokens} tokens of text; "
          f"train it: python train.py --config {args.out}/config.toml")


def to_backbone(folder):
    """A Qwen3 or Llama folder -> (BackboneConfig, state dict of Transformer, embedding (V, C))."""
    try:
        with open(f"{folder}/config.json") as f:
            config = json.load(f)
    except (OSError, json.JSONDecodeError) as e:
        raise BadInput(f"{folder}/config.json: not readable ({e})") from None
    check_supported(folder, config)

    kind = config["model_type"]
    try:
        cfg = read_config(config)
        tensors = {name.removeprefix("model."): tensor
                   for name, tensor in read_folder(folder).items()}
        table = tensors.pop("embed_tokens.weight")
        state = backbone_state(tensors, cfg)
    except KeyError as e:
        raise BadInput(f"{folder}: {e.args[0]} is missing; is this a {kind} model?") from None
    except (ValueError, TypeError) as e:
        raise BadInput(f"{folder}/config.json: {e}") from None

    # nothing is left over, and everything fits
    refuse_leftovers(folder, "tensors are", (n for n in tensors if not n.endswith(UNUSED)))
    with torch.device("meta"):
        expected = Transformer(cfg).state_dict()
    check_shapes(expected, state, folder)
    if table.shape[1:] != (cfg.dim,):
        raise BadInput(f"{folder}: embed_tokens is {tuple(table.shape)}, hidden_size is {cfg.dim}")
    return cfg, state, table


def rope_table(config):
    """What a config.json tells of the rotary embedding; the key depends on its age."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def check_supported(folder, config):
    """Raise BadInput for a kind of model, or a part of one, that backbone.py cannot compute."""
    kind = config.get("model_type")
    if kind not in ("qwen3", "llama"):
        raise BadInput(f"{folder}: model_type '{kind}' is not supported; valid: qwen3, llama")

    rope = rope_table(config)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    activation = config.get("hidden_act")
    for part, present in (("rotations of type " + scaling, scaling != "default"),
                          ("biases in attention", config.get("attention_bias")),
                          ("biases in the MLP", config.get("mlp_bias")),
                          ("sliding windows", config.get("use_sliding_window")),
                          (f"activation {activation}", activation != "silu")):
        if present:
            raise BadInput(f"{folder}: backbone.py has no {part}")

    # a key that we do not know may change the model, unless it is off
    unknown = (key for key in config.keys() - USED - HARMLESS
               if config[key] and not key.startswith("_"))
    layer_types = set(config.get("layer_types") or ()) - {"full_attention"}
    refuse_leftovers(f"{folder}/config.json", "keys are", {*unknown} - {"layer_types"})
    refuse_leftovers(f"{folder}/config.json", "layer_types are", layer_types)


def read_config(config):
    """config.json -> BackboneConfig."""
    rope_base = rope_table(config).get("rope_theta") or config.get("rope_theta") or 10000.0
    return BackboneConfig(
        dim=config["hidden_size"], layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"], kv_heads=config.get("num_key_value_heads") or 0,
        head_dim=config.get("head_dim") or 0, mlp="swiglu", mlp_dim=config["intermediate_size"],
        norm="rms", qk_norm=config["model_type"] == "qwen3", norm_eps=config["rms_norm_eps"],
        rope_base=float(rope_base))


def backbone_state(tensors, cfg):
    """Tensors without their "model." -> state dict of Transformer; what it uses is taken out."""
    state = {"norm.weight": tensors.pop("norm.weight")}
    for i in range(cfg.layers):
        get = functools.partial(join, tensors, i)
        block = f"blocks.{i}."
        state |= {
            block + "norm1.weight": get("input_layernorm"),
            block + "norm2.weight": get("post_attention_layernorm"),
            block + "attention.wq.weight": get("self_attn.q_proj"),
            block + "attention.wkv.weight": get("self_attn.k_proj", "self_attn.v_proj"),
            block + "attention.wo.weight": get("self_attn.o_proj"),
            block + "mlp.up.weight": get("mlp.gate_proj", "mlp.up_proj"),
            block + "mlp.down.weight": get("mlp.down_proj"),
        }
        if cfg.qk_norm:
            state[block + "attention.q_norm.weight"] = get("self_attn.q_norm")
            state[block + "attention.k_norm.weight"] = get("self_attn.k_norm")
    return state


def join(tensors, layer, *names):
    """Take the weights of one layer under `names` out of the tensors, one below the other."""
    return torch.cat([tensors.pop(f"layers.{layer}.{name}.weight") for name in names])
