"""An experiment is one TOML file: loaded strictly, overridden from the command line, written back
resolved.

  configs/quickstart.toml ─┐
  --lm.backbone.layers 6 ──┴─► Config (dataclasses) ─► python train.py ─► out/quickstart/config.toml

Tables and the file that owns their dataclass:
    [data] data.py    [toy] corpora/toy.py
    [vae] vae.py      [gan] gan.py
    [lm] calm.py      ([lm.backbone] backbone.py, [lm.head] heads.py)
    [audiocalm] audiocalm.py         ([audiocalm.backbone], [audiocalm.head])
    [train.STAGE] for each of STAGES, [sample], [log] here

A field's type says what it may hold (schema.py). An unknown key, a wrong type or an impossible
value stops with one line that names the key and what is valid.
"""
import copy
import dataclasses
import json
import os
import re
import tomllib
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch

from audiocalm import AudioCALM, AudioCALMConfig
from calm import CALM, CALMConfig
from checkpoint import build_within, checksum, exported_file, load_checkpoint, load_weights
from cli import BadInput, atomic
from corpora.toy import ToyConfig
from data import KINDS, DataConfig, refuse_download
from discrete import DISCRETE
from gan import GANConfig
from latents import digest
from schema import Kind, Range, build, shown
from vae import VAE, VAEConfig


# ---------------------------------------------------------------- stages

@dataclass(frozen=True)
class StageInfo:
    """One row of STAGES. In the code, `name` is a stage's name and `trainer` the object that trains
    it.
    """
    # the model that a run folder is opened as; stages.py wraps the VAE in VAEGAN to train it
    model: type
    # the table of the config that describes it
    table: str
    # the class in stages.py that trains it
    trainer: str = "LMStage"
    # the stage whose weights it goes on from; "" = none
    after: str = ""
    # that stage's objective -> this one's; {} = the table's own
    objectives: dict = field(default_factory=dict)


STAGES = {
    "vae": StageInfo(VAE, "vae", "VAEStage"),
    "lm": StageInfo(CALM, "lm"),
    "consistency": StageInfo(CALM, "lm", "ConsistencyStage", after="lm", objectives={
        "trigflow": "consistency", "consistency": "consistency", "rectified_flow": "lsd"}),
    "distill": StageInfo(CALM, "lm", "DistillStage"),
    "audiocalm": StageInfo(AudioCALM, "audiocalm"),
    "audiocalm_lsd": StageInfo(AudioCALM, "audiocalm", after="audiocalm",
                               objectives={"rectified_flow": "lsd"}),
}
LM_STAGES = tuple(name for name in STAGES if name != "vae")
StageName = Literal[*STAGES]


@dataclass
class StageConfig:
    """[train.vae], [train.lm], [train.audiocalm] ...: one stage of training."""
    # optimizer steps
    steps: Annotated[int, Range(1, 1_000_000_000)] = 1000
    # checkpoint of the same sizes to start from (vae.pt of a run or of tools.convert, or an
    # exported vae.safetensors); "" = none. Of a stage that is not trained but gone on from: taken
    # as it is
    init: str = ""
    # parts of the model that keep their weights, e.g. ["encoder"] of a VAE: latents, and with them
    # a language model trained on them, stay valid while the decoder learns (RVQ codebooks move)
    freeze: list[str] = field(default_factory=list)
    # rows per optimizer step, over all processes
    batch: Annotated[int, Range(1, 1_000_000)] = 8
    # rows per forward pass; 0 = batch / processes; fewer need less memory. Losses are means over
    # the positions of a forward pass, so rows of unequal length weigh a little differently
    micro_batch: Annotated[int, Range(0, 1_000_000)] = 0
    # compute the activations inside each layer a second time in the backward pass instead of
    # keeping them: about a third more time, and memory for one layer's instead of all
    checkpoint: bool = False
    # adamw (the papers), or muon for matrices with AdamW for the rest (optim.py; torch >= 2.9)
    optimizer: Literal["adamw", "muon"] = "muon"
    # peak learning rate (Table 9: 1e-4 music, 2e-4 speech; Table 10: 8e-4 VAE)
    lr: Annotated[float, Range(above=0)] = 1e-2
    # final learning rate as a share of lr; cosine in between
    lr_end: Annotated[float, Range(0)] = 0.1
    # optimizer steps of linear warm-up
    warmup: Annotated[int, Range(0, 1_000_000_000)] = 50
    # AdamW (Table 9)
    betas: list[Annotated[float, Range(0, below=1)]] = field(default_factory=lambda: [0.9, 0.95])
    # on the weights of linear layers, convolutions and embeddings; not on biases, gains of norms
    # and of weight norm, scales of residual branches (optim.weights_that_decay)
    weight_decay: Annotated[float, Range(0)] = 0.0
    # largest gradient norm; a larger gradient is scaled down to it
    grad_clip: Annotated[float, Range(above=0)] = 1.0
    # decay of the averaged weights that are sampled from; 0 = none
    ema: Annotated[float, Range(0, below=1)] = 0.998
    # discriminators' learning rate; 0 = lr
    disc_lr: Annotated[float, Range(0)] = 0.0
    # steps between two lines of the log
    log_every: Annotated[int, Range(1, 1_000_000_000)] = 20
    # steps between validation losses and re-rendered clips; 0 = at the end only
    valid_every: Annotated[int, Range(0, 1_000_000_000)] = 0
    # steps between checkpoints
    save_every: Annotated[int, Range(1, 1_000_000_000)] = 500

    def __post_init__(self):
        if self.micro_batch > 0 and self.batch % self.micro_batch:
            raise ValueError(
                f"micro_batch: must divide batch = {self.batch}, got {self.micro_batch}")
        if len(self.betas) != 2:
            raise ValueError(f"betas: must be two numbers, got {self.betas}")


@dataclass
class ConsistencyConfig(StageConfig):
    """[train.consistency]: from lm.pt's weights. Small steps: at higher rates the tangent
    explodes, and in a stage of more than 150 steps it may at 2e-3 too. voice.toml has 7e-4 with
    guidance 2.5.
    """
    lr: Annotated[float, Range(above=0)] = 2e-3
    grad_clip: Annotated[float, Range(above=0)] = 0.1
    ema: Annotated[float, Range(0, below=1)] = 0.99
    # TrigFlow: true = consistency distillation, dx/dt is the flow's, and the head alone learns;
    # false = consistency training (the paper), dx/dt is the pair's, and everything learns
    teacher: bool = True
    # with a teacher: the head learns at Z_null + a (Z_cond - Z_null) with a ~ U(1, this) per row,
    # which is what it reads when it is sampled with sample.cfg; 1 = at Z_cond alone
    guidance: Annotated[float, Range(1)] = 1.0


@dataclass
class DistillConfig(StageConfig):
    """[train.distill]: [lm] is the student; what is not its backbone is the teacher's, copied."""
    # checkpoint of a trained CALM (lm.pt or consistency.pt of another run) on the same latents, of
    # the same width, text and head, with more layers
    teacher: str = ""
    # a of the teacher's Z_null + a (Z_cond - Z_null), which the student learns (third version of
    # CALM, Pocket TTS: 1.5)
    guidance: float = 1.5


@dataclass
class TrainConfig:
    """The [train] table: one table per stage, whether the run has the stage or not."""
    # with several processes, each keeps its part of the weights, moments and averages (FSDP2)
    # instead of all of them (DDP); the VAE's, which are small, stay whole. train.py --plan says
    # when it is needed
    shard: bool = False
    vae: StageConfig = field(default_factory=StageConfig)
    lm: StageConfig = field(default_factory=StageConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    audiocalm: StageConfig = field(default_factory=StageConfig)
    audiocalm_lsd: StageConfig = field(default_factory=StageConfig)


# ---------------------------------------------------------------- the whole config

@dataclass
class SampleConfig:
    """[sample]: what train.py renders at the end, and the defaults of sample.py."""
    # head steps per latent; 0 = the objective's default (1 for consistency and lsd, 20 for a flow)
    steps: Annotated[int, Range(0, 10_000)] = 0
    # variance of the noise (CALM 4.5: 0.8 for continuation, 0.7 for text to speech); for codes, the
    # temperature of the softmax
    temperature: Annotated[float, Range(0)] = 0.8
    # of a text that a monologue writes itself: temperature of its softmax (CALM: 0.8)
    text_temperature: Annotated[float, Range(0)] = 0.8
    # of such a text: sample from this many likeliest tokens; 0 = all
    text_top_k: Annotated[int, Range(0, 1_000_000)] = 0
    # noise on a model's generated past, as a share of the noise in training (lm.noise,
    # lm.short_noise, audiocalm.history_noise): 0 (the papers) .. 1; for long continuations
    noise: Annotated[float, Range(0, 1)] = 0.0
    # classifier-free guidance: a in Z = Z_null + a (Z_cond - Z_null); 1 = off
    cfg: float = 1.0
    # longest clip that is generated, in seconds
    seconds: Annotated[float, Range(above=0, high=100_000)] = 5.0
    # seconds of audio that are continued where there is no text (CALM section 5)
    prompt_seconds: Annotated[float, Range(above=0, high=100_000)] = 3.0
    # kind -> texts; {} = from the validation manifest
    texts: dict[Kind, list[str]] = field(default_factory=dict)
    # clips of each kind rendered at the end
    count: Annotated[int, Range(0, 10_000)] = 3


@dataclass
class LogConfig:
    """[log]: where figures, sounds and pictures of the training go beside the run folder."""
    # a package of that name, which needs to be installed (trackers.py); "" = none
    tracker: Literal["", "tensorboard", "wandb", "trackio"] = ""


@dataclass
class Config:
    """A whole experiment."""
    # run folder
    out: str = "out/run"
    # names of the stages, in order; finished ones are skipped
    stages: list[StageName] = field(default_factory=lambda: ["vae", "lm"])
    seed: Annotated[int, Range(0, below=2 ** 63)] = 0
    # auto = cuda > mps > cpu
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    # auto = bf16 on Ampere and newer, else fp32
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    # auto = on CUDA
    compile: Literal["auto", "yes", "no"] = "auto"
    # CPU threads; 0 = torch's choice
    threads: Annotated[int, Range(0, 1024)] = 0
    data: DataConfig = field(default_factory=DataConfig)
    toy: ToyConfig = field(default_factory=ToyConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    gan: GANConfig = field(default_factory=GANConfig)
    lm: CALMConfig = field(default_factory=CALMConfig)
    audiocalm: AudioCALMConfig = field(default_factory=AudioCALMConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        """Rules between tables."""
        if not self.out:
            raise ValueError("out: names the run folder, it is empty")
        if not self.stages:
            raise ValueError(f"stages: is empty; valid: {', '.join(STAGES)}")
        for name in self.stages:
            info = STAGES[name]
            objective = getattr(self, info.table).head.objective if name in LM_STAGES else ""
            if info.objectives and objective not in info.objectives:
                raise ValueError(
                    f"stages: {name} goes on from the weights of {' or '.join(info.objectives)}, "
                    f"not from {info.table}.head.objective = \"{objective}\"; leave it out")
        self.check_teachers()

        if self.lm.head.objective in DISCRETE and self.vae.bottleneck != "rvq":
            raise ValueError(f"lm.head.objective: {self.lm.head.objective} generates codes; "
                             "set vae.bottleneck = \"rvq\"")
        if self.lm.monologue and not self.data.kind_token:
            raise ValueError("lm.monologue: only the kind's token stands before the audio; it "
                             "needs data.kind_token = true")
        for name in ("magnitude", "phase"):
            if self.gan.loss_weights.get(name) and self.vae.decoder != "istft":
                raise ValueError(f"gan.loss_weights: {name} is of an inverse STFT; set vae.decoder "
                                 "= \"istft\" or leave it out")
        if self.gan.loss_weights.get("phase") and self.vae.phase != "direct":
            raise ValueError("gan.loss_weights: phase is of phases that the decoder predicts; set "
                             "vae.phase = \"direct\" or leave it out")
        samples = self.gan.disc_seconds * self.vae.sample_rate
        if samples and samples < max(self.gan.disc_windows):
            longest = max(self.gan.disc_windows) / self.vae.sample_rate
            raise ValueError(f"gan.disc_seconds: must hold the longest of disc_windows, "
                             f"{longest:.3f} s, got {self.gan.disc_seconds}")

    def check_teachers(self):
        if "distill" in self.stages and not self.train.distill.teacher:
            raise ValueError("train.distill.teacher: stage \"distill\" needs one, the lm.pt of "
                             "a trained run")
        if "distill" in self.stages and self.sample.cfg != 1:
            raise ValueError("sample.cfg: a distilled model has the guidance inside; set 1")
        if ("consistency" in self.stages and self.train.consistency.teacher
                and self.lm.head.objective != "trigflow"):
            raise ValueError("train.consistency.teacher: is for lm.head.objective = \"trigflow\", "
                             f"not \"{self.lm.head.objective}\"; set it to false")
        if self.train.consistency.guidance > 1 and not self.train.consistency.teacher:
            raise ValueError("train.consistency.guidance: needs train.consistency.teacher = true; "
                             "clips are examples of Z_cond, not of a guided Z")


# ---------------------------------------------------------------- from a table and back

def resolve(table):
    """A Config from a (nested) dict of today's layout or an older one; strict."""
    try:
        return build(Config, migrate(table))
    except RecursionError:
        raise BadInput("the config: its tables or lists are nested too deeply; no key needs more "
                       "than four levels") from None


def migrate(table):
    """The table of a config or run folder written before 2026-11-27 -> the same in today's layout.

    [vae] held what is now in [gan]; `grad_clip` of a stage was called `clip`.
    """
    table = copy.deepcopy(table)
    vae = table.get("vae")
    if isinstance(vae, dict):
        gan = table.setdefault("gan", {})
        for name in [f.name for f in dataclasses.fields(GANConfig) if f.name in vae]:
            value = vae.pop(name)
            merge = isinstance(value, dict) and isinstance(gan.get(name), dict)
            gan[name] = gan[name] | value if merge else value

    train = table.get("train")
    for stage_table in train.values() if isinstance(train, dict) else ():
        if isinstance(stage_table, dict) and "clip" in stage_table:
            stage_table["grad_clip"] = stage_table.pop("clip")
    return table


def load(path, overrides=()):
    """A Config from a TOML file and ["--lm.backbone.layers", "6", ...] (values in TOML or bare
    strings).
    """
    try:
        with open(path, "rb") as f:
            # before overrides, so that they land in today's tables; resolve migrates old names
            # among the overrides
            table = migrate(tomllib.load(f))
    except FileNotFoundError:
        raise BadInput(f"config {path}: no such file; see configs/") from None
    except (ValueError, RecursionError, IsADirectoryError) as e:    # also 5,000 digits, [[[[...
        raise BadInput(f"config {path}: not readable as TOML: {e}") from None
    except OSError as e:
        raise BadInput(f"config {path}: cannot be read ({e.strerror}); correct the path") from None

    overrides = list(overrides)
    while overrides:
        name = overrides.pop(0)
        if not name.startswith("--"):
            raise BadInput(f"'{name}': expected --section.key value (see -h)")
        name, equals, text = name[2:].partition("=")
        if not equals:
            if not overrides:
                raise BadInput(f"--{name}: needs a value")
            text = overrides.pop(0)
        set_value(table, name, parse_value(name, text))
    return resolve(table)


def parse_value(name, text):
    """The value of one override: TOML, or a bare string."""
    number = re.sub(r"^(-?)\.(?=\d)", r"\g<1>0.", text)      # TOML wants 0.5 where people write .5
    try:
        return tomllib.loads(f"v = {number}")["v"]
    except tomllib.TOMLDecodeError:
        return text if name != "stages" else [part.strip() for part in text.split(",")]
    except (ValueError, RecursionError) as e:                # 5,000 digits, [[[[...
        raise BadInput(f"--{name}: {shown(text)}: not readable as TOML: {e}") from None


def set_value(table, name, value):
    """table["a"]["b"]["c"] = value for the name "a.b.c"."""
    *sections, last = name.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise BadInput(f"--{name}: '{section}' is a value, not a table")
    table[last] = value


def dump(cfg):
    """A (nested) dataclass as TOML that load() reads back to the same value."""
    lines = []

    def walk(table, key):
        plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
        if key and (plain or not table):
            lines.append(f"\n[{key}]")
        # JSON's strings are TOML's but for DEL, which TOML wants escaped
        lines.extend(f"{k} = {json.dumps(v, ensure_ascii=False)}".replace("\x7f", "\\u007f")
                     for k, v in plain.items())
        for k, v in table.items():
            if isinstance(v, dict):
                walk(v, f"{key}.{k}" if key else k)

    walk(dataclasses.asdict(cfg), "")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- run folders

def table_changes(saved, cfg, table):
    """[(line of `saved`, line of `cfg`), ...] where two configs differ in [table]."""
    old, new = (dump(getattr(c, table)).splitlines() for c in (saved, cfg))
    return [(before, now) for before, now in zip(old, new) if before != now]


def refuse_other_table(path, saved, cfg, table):
    """BadInput where a checkpoint's config differs from the run's in [table]."""
    for before, now in table_changes(saved, cfg, table)[:1]:
        raise BadInput(f"{path}: trained with [{table}] {before}, the config now says {now}; "
                       "use --fresh to start over or --out for another run folder")


def save_checkpoint(path, state):
    """Write the whole checkpoint or none: a crash or a full disk leaves the old one untouched."""
    state = {**state, "checksum": checksum(state)}
    with atomic(path) as temp, open(temp, "wb") as f:
        torch.save(state, f)


def vae_weights(state):
    """The VAE's weights of a checkpoint of stage "vae", the averaged ones where there are any."""
    return state["ema"] or {k.removeprefix("vae."): v for k, v in state["model"].items()
                            if k.startswith("vae.")}


def initial_weights(state, name):
    """The averaged weights of a checkpoint, for stage `name` to begin with; those of a later stage
    without what only its objective has beside the head's network (Consistency.it).
    """
    if name == "vae":
        return vae_weights(state)
    weights = state["ema"] or state["model"]
    if state["stage"] == name:
        return weights
    return {k: w for k, w in weights.items() if not k.startswith("head.") or ".net." in k}


def saved_config(state, path):
    """The Config inside a checkpoint, or BadInput naming the file and the key."""
    try:
        return resolve(state["config"])
    except BadInput as e:
        raise BadInput(f"{path}: its config: {e}") from None


def build_saved(cfg, stage, weights, path, only=None):
    """The model of a stage as a checkpoint's config describes it: no larger than its `weights`, and
    nothing is downloaded for it.
    """
    refuse_download(cfg.data.tokenizer, path)
    if stage == "vae":
        return build_within(lambda: VAE(cfg.vae), weights, path)
    return build_within(lambda: make_model(cfg, stage, only), weights, path)


def encoder_id(weights):
    """16 hex digits of what decides a VAE's latents: its weights without the decoder's."""
    return digest({k: v for k, v in weights.items() if not k.startswith("decoder.")})


def refuse_other_encoder(state, encoder, path, vae_path):
    """BadInput where a language model was trained on the latents of another encoder.

    encoder: encoder_id of the VAE beside it. Checkpoints until 2026-11-27 may say none.
    """
    if state.get("encoder", "") not in ("", encoder):
        raise BadInput(f"{path}: was trained on the latents of another VAE than {vae_path} is now; "
                       "restore that one, or train this stage again (--fresh or --out)")


def open_run(run, stage="", device="cpu", kind=None):
    """A trained run folder -> (Config, VAE, language model or None, name of its stage).

    stage: "" = the last language-model stage that was trained, else one of LM_STAGES. kind: the
    only one that will be generated; AudioCALM then leaves the experts of the others on disk.
    Averaged weights (EMA) are taken where there are any.
    """
    if os.path.isfile(run):
        raise BadInput(f"run {run}: is a file; give the folder that it lies in")
    if not os.path.isdir(run):
        raise BadInput(f"run {run}: no such folder; "
                       "train one first: python train.py --config configs/quickstart.toml")
    vae_path = f"{run}/vae.pt"
    refuse_other_folder(run)
    state = load_stage(vae_path, "vae")
    cfg = saved_config(state, vae_path)
    weights = vae_weights(state)
    vae = build_saved(cfg, "vae", weights, vae_path)
    load_weights(vae, weights, vae_path)
    vae.to(device).eval()
    trained = trained_stages(run)
    if not (stage or trained):
        return cfg, vae, None, "vae"

    # the language model, of this VAE's latents
    stage = stage or trained[-1]
    if stage not in trained:
        raise BadInput(f"run {run}: has no '{stage}'; it has {', '.join(trained) or 'none'}")
    path = f"{run}/{stage}.pt"
    encoder = encoder_id(weights)
    state = load_stage(path, stage)
    refuse_other_encoder(state, encoder, path, vae_path)
    vae_cfg, cfg = cfg, saved_config(state, path)
    for before, now in table_changes(cfg, vae_cfg, "vae")[:1]:
        raise BadInput(f"{path}: was trained with [vae] {before}, but {vae_path} has {now}; "
                       "restore the one that belongs to the other")
    weights = state["ema"] or state["model"]
    lm = build_saved(cfg, stage, weights, path, kind)
    load_weights(lm, lm.wanted(weights), path)
    return cfg, vae, lm.to(device).eval(), stage


def refuse_other_folder(run):
    """BadInput where a folder is no run but holds some, naming one."""
    if is_run(run):
        return
    runs = [name for name in sorted(os.listdir(run)) if is_run(f"{run}/{name}")]
    if runs:
        raise BadInput(f"run {run}: is a folder of runs; give one, e.g. {run}/{runs[0]}")


def is_run(folder):
    """Whether a folder has a VAE, trained or exported."""
    return os.path.exists(f"{folder}/vae.pt") or bool(exported_file(f"{folder}/vae.pt"))


def trained_stages(run):
    """The language-model stages that a run folder, or an exported one, holds, in order."""
    return [stage for stage in LM_STAGES
            if os.path.exists(f"{run}/{stage}.pt") or exported_file(f"{run}/{stage}.pt")]


def load_stage(path, stage):
    """load_checkpoint, or BadInput where the file holds another stage than its name says."""
    state = load_checkpoint(path)
    if state["stage"] != stage:
        raise BadInput(f"{path}: holds stage {shown(state['stage'])}, not \"{stage}\"; files "
                       "were mixed up")
    return state


def make_model(cfg, stage, only=None):
    """The language model of a stage; only: the one kind that it will generate."""
    return STAGES[stage].model.from_config(
        stage_table(cfg, stage), cfg.vae, cfg.data, KINDS, only)


def stage_seed(seed, stage):
    """The seed of one stage. With the run's own, consistency would go through the language model's
    first rows and noise again.
    """
    return seed * len(STAGES) + list(STAGES).index(stage)


def stage_table(cfg, stage):
    """The model's table as the stage has it: some change the objective (STAGES)."""
    table = getattr(cfg, STAGES[stage].table)
    objectives = STAGES[stage].objectives
    if not objectives:
        return table
    head = dataclasses.replace(table.head, objective=objectives[table.head.objective], steps=0)
    return dataclasses.replace(table, head=head)


# figures of log.jsonl that are wall-clock ("rate" in runs before it was renamed)
WALL_CLOCK = ("steps_per_second", "audio_per_second", "mfu", "rate")


def read_log(out):
    """The lines of log.jsonl, each a row {"stage": ..., "step": ..., figure: number, ...}.

    What a killed run or a power failure left at the end, half a line or zeros, is left out, and
    cut at the next start of train.py. Errors: BadInput naming another line that is no row.
    """
    path = f"{out}/log.jsonl"
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        *whole, _ = f.read().rstrip(b"\0").split(b"\n")
    lines = []
    for number, line in enumerate(whole, 1):
        try:
            good = is_log_row(json.loads(line))
        except (ValueError, RecursionError):                 # not UTF-8, not JSON
            good = False
        if not good:
            raise BadInput(f"{path}, line {number}: damaged, no row of a log; delete that line")
        lines.append(line.decode() + "\n")
    return lines


def is_log_row(row):
    """Whether a value from JSON is a row of log.jsonl."""
    if not isinstance(row, dict) or not isinstance(row.get("stage"), str):
        return False
    if not isinstance(row.get("step"), int):
        return False
    return all(isinstance(v, (int, float)) for k, v in row.items() if k != "stage")
