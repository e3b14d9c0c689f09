"""An experiment is one TOML file: loaded strictly, overridden from the command line, written back
resolved.

  configs/quickstart.toml ─┐
  --lm.backbone.layers 6 ──┴─► Config (dataclasses) ─► python train.py ─► out/quickstart/config.toml

Tables and the file that owns their dataclass:
    [vae] vae.py      [lm] calm.py   ([lm.backbone] backbone.py, [lm.head] heads.py)
    [audiocalm] audiocalm.py         ([audiocalm.backbone], [audiocalm.head])
    [data] data.py
    [toy] toy.py      [train.STAGE] for each of STAGES, [sample] here
An unknown key, a wrong type or an impossible value stops with one line that names the key and what
is valid.
"""
import dataclasses
import json
import math
import os
import re
import tomllib
import typing
from dataclasses import dataclass, field

import torch

from audiocalm import AudioCALM, AudioCALMConfig
from calm import CALM, CALMConfig
from data import KINDS, BadInput, DataConfig, vocabulary
from discrete import DISCRETE
from toy import ToyConfig
from vae import VAE, VAEConfig

STAGES = ("vae", "lm", "consistency", "distill", "audiocalm", "audiocalm_lsd")
# stages of a language model, last trained first -> its class and its table of the config
MODELS = {"audiocalm_lsd": (AudioCALM, "audiocalm"), "audiocalm": (AudioCALM, "audiocalm"),
          "distill": (CALM, "lm"), "consistency": (CALM, "lm"), "lm": (CALM, "lm")}
# stages that go on from another's weights -> that stage; and what they make of its objective
FASTER = {"consistency": "lm", "audiocalm_lsd": "audiocalm"}
FEW_STEPS = {"trigflow": "consistency", "rectified_flow": "lsd", "consistency": "consistency"}


@dataclass
class StageConfig:
    """[train.vae], [train.lm], [train.audiocalm] ...: one stage of training."""
    steps: int = 1000           # optimizer steps
    # checkpoint of the same sizes to start from (vae.pt of a run or of convert.py); "" = none
    init: str = ""
    # parts of the model that keep their weights, e.g. ["encoder"] of a VAE: latents, and with them
    # a language model trained on them, stay valid while the decoder learns (RVQ codebooks move)
    freeze: list[str] = field(default_factory=list)
    batch: int = 16             # rows an optimizer step, over all processes
    # rows a forward; 0 = batch / processes; less memory. Losses are means over the positions of a
    # forward, so rows of unequal length weigh a little differently
    micro_batch: int = 0
    # adamw (the papers) | muon: for matrices, AdamW for the rest (see train.py; torch >= 2.9)
    optimizer: str = "adamw"
    # peak learning rate (Table 9: 1e-4 music, 2e-4 speech; Table 10: 8e-4 VAE)
    lr: float = 1e-3
    lr_end: float = 0.1         # final learning rate as a share of lr; cosine in between
    warmup: int = 50            # steps of linear warm-up
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])    # AdamW (Table 9)
    weight_decay: float = 0.0   # on matrices only
    clip: float = 1.0           # largest gradient norm
    ema: float = 0.0            # decay of the averaged weights that are sampled from; 0 = none
    disc_lr: float = 0.0        # discriminators' learning rate; 0 = lr
    log_every: int = 20         # steps
    # steps between validation losses and re-rendered clips; 0 = at the end only
    valid_every: int = 0
    save_every: int = 500       # steps between checkpoints

    def __post_init__(self):
        for name in ("steps", "batch", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer: unknown '{self.optimizer}'; valid: adamw, muon")
        if self.micro_batch > 0 and self.batch % self.micro_batch:
            raise ValueError(
                f"micro_batch: must divide batch = {self.batch}, got {self.micro_batch}")
        if not (self.lr > 0 and self.clip > 0 and 0 <= self.ema < 1 and len(self.betas) == 2
                and all(0 <= b < 1 for b in self.betas)):
            raise ValueError("lr, clip > 0; 0 <= ema < 1; two betas of 0 .. 1: "
                             "one of these does not hold")
        for name in ("lr_end", "warmup", "weight_decay", "disc_lr", "valid_every", "micro_batch"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")


@dataclass
class ConsistencyConfig(StageConfig):
    """[train.consistency]: from lm.pt's weights."""
    # TrigFlow: true = consistency distillation, dx/dt is the flow's, and the head alone learns;
    # false = consistency training (the paper), dx/dt is the pair's, and everything learns
    teacher: bool = False


@dataclass
class DistillConfig(StageConfig):
    """[train.distill]: [lm] is the student; what is not its backbone is the teacher's, copied."""
    # checkpoint of a trained CALM (lm.pt or consistency.pt of another run) on the same latents, of
    # the same width, text and head, with more layers
    teacher: str = ""
    guidance: float = 1.5       # a in Z_null + a (Z_cond - Z_null), learned with (v3: 1.5)


@dataclass
class Stages:
    vae: StageConfig = field(default_factory=StageConfig)
    lm: StageConfig = field(default_factory=StageConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    audiocalm: StageConfig = field(default_factory=StageConfig)
    audiocalm_lsd: StageConfig = field(default_factory=StageConfig)


@dataclass
class SampleConfig:
    """[sample]: what train.py renders at the end, and the defaults of sample.py."""
    # head steps a latent; 0 = the objective's own (1 consistency and lsd, 20 flow)
    steps: int = 0
    # variance of the noise (CALM 4.5; 0.8 continuation, 0.7 text to speech); of the softmax for
    # codes
    temperature: float = 0.8
    # share of the training's noise (lm.noise, lm.short_noise, audiocalm.history_noise) on what a
    # model hears of its own past, 0 (the papers) .. 1; for long continuations
    noise: float = 0.0
    cfg: float = 1.0            # latent guidance a in Z = Z_null + a (Z_cond - Z_null); 1 = off
    seconds: float = 5.0        # longest clip
    prompt_seconds: float = 3.0 # audio continued where there is no text (CALM section 5)
    # kind -> texts; {} = from the validation manifest
    texts: dict[str, list[str]] = field(default_factory=dict)
    count: int = 3              # clips of each kind rendered at the end

    def __post_init__(self):
        for name, low in (("steps", 0), ("temperature", 0), ("count", 0)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be at least {low}, got {getattr(self, name)}")
        for name in ("seconds", "prompt_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be positive seconds, got {getattr(self, name)}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise: must lie in 0 .. 1, got {self.noise}")
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg: must be a number, got {self.cfg}")
        for kind in set(self.texts) - set(KINDS):
            raise ValueError(f"texts: unknown kind '{kind}'; valid: {', '.join(KINDS)}")


@dataclass
class Config:
    out: str = "out/run"        # run folder
    # in order; finished ones are skipped
    stages: list[str] = field(default_factory=lambda: ["vae", "lm"])
    seed: int = 0
    device: str = "auto"        # auto (cuda > mps > cpu) | cuda | mps | cpu
    dtype: str = "auto"         # auto (bf16 on Ampere and newer, else fp32) | fp32 | bf16
    compile: str = "auto"       # auto (on CUDA) | yes | no
    threads: int = 0            # CPU threads; 0 = torch's choice
    data: DataConfig = field(default_factory=DataConfig)
    toy: ToyConfig = field(default_factory=ToyConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    lm: CALMConfig = field(default_factory=CALMConfig)
    audiocalm: AudioCALMConfig = field(default_factory=AudioCALMConfig)
    train: Stages = field(default_factory=Stages)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self):
        if not self.out:
            raise ValueError("out: names the run folder, it is empty")
        if not 0 <= self.threads <= 1024:
            raise ValueError(f"threads: must lie in 0 .. 1024, got {self.threads}")
        if not 0 <= self.seed < 2 ** 63:
            raise ValueError(f"seed: must lie in 0 .. 2^63 - 1, got {self.seed}")
        wrong = [s for s in self.stages if s not in STAGES]
        if wrong or not self.stages:
            raise ValueError(f"stages: unknown {wrong}; valid: {', '.join(STAGES)}")
        if "distill" in self.stages and not self.train.distill.teacher:
            raise ValueError("train.distill.teacher: stage \"distill\" needs one, the lm.pt of "
                             "a trained run")
        if "consistency" in self.stages and self.lm.head.objective not in FEW_STEPS:
            raise ValueError("stages: consistency goes on from a flow's weights, not from "
                             f"lm.head.objective = \"{self.lm.head.objective}\"; leave it out")
        if ("consistency" in self.stages and self.train.consistency.teacher
                and self.lm.head.objective != "trigflow"):
            raise ValueError("train.consistency.teacher: is for lm.head.objective = \"trigflow\", "
                             f"not \"{self.lm.head.objective}\"; set it to false")
        if "audiocalm_lsd" in self.stages and self.audiocalm.head.objective == "trigflow":
            raise ValueError("stages: audiocalm_lsd goes on from a rectified flow's weights; set "
                             "audiocalm.head.objective = \"rectified_flow\" or leave it out")
        if self.lm.head.objective in DISCRETE and self.vae.bottleneck != "rvq":
            raise ValueError(f"lm.head.objective: {self.lm.head.objective} draws codes; "
                             "set vae.bottleneck = \"rvq\"")
        if "audiocalm_lsd" in self.stages and self.audiocalm.head.objective != "rectified_flow":
            raise ValueError("stages: audiocalm_lsd goes on from audiocalm.head.objective = "
                             f"\"rectified_flow\", not \"{self.audiocalm.head.objective}\"")
        if "distill" in self.stages and self.sample.cfg != 1:
            raise ValueError("sample.cfg: a distilled model has the guidance inside; set 1")
        for kind in set(self.lm.short_kinds) - set(KINDS):
            raise ValueError(f"lm.short_kinds: unknown '{kind}'; valid: {', '.join(KINDS)}")
        if self.lm.monologue and (self.data.tokenizer or not self.data.kind_token):
            raise ValueError("lm.monologue: is made of bytes behind the kind's token; it needs "
                             "data.tokenizer = \"\" and data.kind_token = true")
        for name, valid in (("device", ("auto", "cuda", "mps", "cpu")),
                            ("dtype", ("auto", "fp32", "bf16")),
                            ("compile", ("auto", "yes", "no"))):
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"{name}: unknown '{getattr(self, name)}'; valid: {', '.join(valid)}")


def check(value, kind, key):
    """value as the annotated type, or BadInput naming the key."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    wrong = BadInput(f"{key}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
    if dataclasses.is_dataclass(kind):
        return build(kind, value, key)
    if origin is list:
        if not isinstance(value, list):
            raise wrong
        return [check(v, args[0], key) for v in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return {k: check(v, args[1], f"{key}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise wrong
    return value


def build(cls, table, key=""):
    """A dataclass from a (nested) dict; strict."""
    if not isinstance(table, dict):
        raise BadInput(f"{key}: expected a table, got {table!r}")
    fields, kinds = {f.name for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    prefix = key + "." if key else ""
    for name in table:
        if name not in fields:
            raise BadInput(f"{prefix}{name}: unknown key; valid: {', '.join(sorted(fields))}")
    values = {name: check(value, kinds[name], prefix + name) for name, value in table.items()}
    try:
        return cls(**values)
    except ValueError as e:
        raise BadInput(f"{prefix}{e}") from None


def load(path, overrides=()):
    """Config from a TOML file and ["--lm.backbone.layers", "6", ...] (values in TOML or bare
    strings).
    """
    try:
        with open(path, "rb") as f:
            table = tomllib.load(f)
    except FileNotFoundError:
        raise BadInput(f"config {path}: no such file; see configs/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as e:
        raise BadInput(f"config {path}: not readable as TOML: {e}") from None
    overrides = list(overrides)
    while overrides:
        name = overrides.pop(0)
        if not name.startswith("--"):
            raise BadInput(f"'{name}': expected --section.key value (see -h)")
        name, _, text = name[2:].partition("=")
        if not text:
            if not overrides:
                raise BadInput(f"--{name}: needs a value")
            text = overrides.pop(0)
        try:                                              # TOML wants 0.5 where people write .5
            number = re.sub(r"^(-?)\.(?=\d)", r"\g<1>0.", text)
            value = tomllib.loads(f"v = {number}")["v"]
        except tomllib.TOMLDecodeError:
            value = text if name != "stages" else [stage.strip() for stage in text.split(",")]
        at = table
        *sections, last = name.split(".")
        for section in sections:
            at = at.setdefault(section, {})
            if not isinstance(at, dict):
                raise BadInput(f"--{name}: '{section}' is a value, not a table")
        at[last] = value
    return build(Config, table)


def dump(cfg):
    """A (nested) dataclass as TOML that load() reads back to the same value."""
    lines = []

    def walk(table, key):
        plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
        if key and (plain or not table):
            lines.append(f"\n[{key}]")
        lines.extend(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in plain.items())
        for k, v in table.items():
            if isinstance(v, dict):
                walk(v, f"{key}.{k}" if key else k)

    walk(dataclasses.asdict(cfg), "")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- run folders

def save_checkpoint(path, state):
    """Write to a temporary file, then rename: a crash or a full disk leaves the old checkpoint
    whole.
    """
    temp = f"{path}.tmp"
    try:
        with open(temp, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    except (OSError, RuntimeError) as e:             # torch reports a full disk as RuntimeError
        if os.path.exists(temp):
            os.remove(temp)
        kept = "; the previous checkpoint is untouched" if os.path.exists(path) else ""
        raise BadInput(f"{path}: could not be written ({e}); "
                       f"free some disk space and run again{kept}") from None


def load_checkpoint(path, device="cpu"):
    """The dict that save_checkpoint wrote; tensors only, no code (weights_only)."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such checkpoint; "
                       "train it first: python train.py --config ...") from None
    except Exception as e:                    # a truncated zip, a pickle, anything but a checkpoint
        raise BadInput(f"{path}: not a readable checkpoint ({type(e).__name__}); "
                       "delete it or restore a copy") from None
    if not isinstance(state, dict) or not {"stage", "config", "model", "done"} <= state.keys():
        raise BadInput(f"{path}: not a nanoCALM checkpoint; expected stage, config, model, done")
    return state


def load_weights(module, state, path):
    """Strict load with one line instead of torch's list of keys."""
    try:
        module.load_state_dict(state)
    except RuntimeError as e:
        first = next(line.strip() for line in str(e).splitlines()[1:] if line.strip())
        raise BadInput(f"{path}: does not fit this config's model: {first[:200]}") from None


def open_run(run, stage="", device="cpu", kind=None):
    """A trained run folder -> (Config, VAE, language model or None, name of its stage).

    stage: "" = the last language-model stage that was trained, else one of MODELS. kind: the only
    one that will be generated; AudioCALM then leaves the experts of the others on disk.
    Averaged weights (EMA) are taken where there are any.
    """
    if not os.path.isdir(run):
        raise BadInput(f"run {run}: no such folder; "
                       "train one first: python train.py --config configs/quickstart.toml")
    state = load_checkpoint(f"{run}/vae.pt", device)
    cfg = build(Config, state["config"])
    vae = VAE(cfg.vae)
    weights = state["ema"] or {k[4:]: v for k, v in state["model"].items() if k.startswith("vae.")}
    load_weights(vae, weights, f"{run}/vae.pt")
    names = [stage] if stage else [
        s for s in MODELS if os.path.exists(f"{run}/{s}.pt")]
    if not names:
        return cfg, vae.to(device).eval(), None, "vae"
    state = load_checkpoint(f"{run}/{names[0]}.pt", device)
    cfg, weights = build(Config, state["config"]), state["ema"] or state["model"]
    only = {"only": kind} if MODELS[names[0]][0] is AudioCALM else {}
    lm = make_model(cfg, names[0], **only)
    load_weights(lm, lm.wanted(weights) if only else weights, f"{run}/{names[0]}.pt")
    return cfg, vae.to(device).eval(), lm.to(device).eval(), names[0]


def make_model(cfg, stage, **options):
    """The language model of a stage."""
    model, _ = MODELS[stage]
    codes = {"codes": cfg.vae.codes} if model is CALM else {}
    return model(stage_model(cfg, stage), cfg.vae.latent_dim, vocabulary(cfg.data),
                 KINDS, **codes, **options)


def stage_model(cfg, stage):
    """The model's table as the stage has it: those of FASTER change the objective."""
    table = getattr(cfg, MODELS[stage][1])
    if stage not in FASTER:
        return table
    return dataclasses.replace(
        table, head=dataclasses.replace(table.head, objective=FEW_STEPS[table.head.objective],
                                        steps=0))
