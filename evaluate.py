"""Judge a trained run: how well its VAE reconstructs held-out clips, and how well its generations
match their text.

    python evaluate.py --run out/quickstart [--manifest heldout.jsonl] [--what all|vae|lm]
                       [--metrics wer,sim,fad,...] [--reference real.jsonl] [--json figures.json]
                       [--device auto] [--jobs 4]
    torchrun --nproc_per_node=8 evaluate.py --run ...

    held-out clips ─► VAE ──► reconstructions ─┬─► log-mel, STFT, SI-SDR; information rate
                                               ├─► facts right (the toy corpus has an oracle)
                                               ├─► --metrics
    held-out texts ─► CALM ─► generations ─────┴─► length right

Beside every figure stands its 95 % interval, a bootstrap over clips (intervals.py).

Figures of the VAE
  log-mel distance: mean |log10 mel(x) - log10 mel(x̂)|, 80 bands, n_fft 1024, divided by the same
    distance between a clip and another one of its kind: 0 = perfect, 1 = as far as two clips are.
  STFT distance: spectral convergence + log magnitudes at 2048, 1024, 512, 256 (gan.py). Magnitudes
    have the run's gan.loss_floor: compare only runs with the same floor.
  SI-SDR: 10 log10(‖αx‖² / ‖αx - x̂‖²) dB, α = <x, x̂> / ‖x‖² (Le Roux et al. 2019); above 0
    only for codecs that keep the waveform.
  rate: information in the latents: frame rate · D · mean KL, in nats per second; of RVQ codes
    frame rate · K · log2(entries), in bits per second.

Figures of the language models, over every held-out text, in the voice of another held-out clip of
its speaker where the run was trained with voice prompts
  facts right: share of the facts stated by a text of the toy corpus (digits, counts, pitch, tempo)
    that its oracle measures in the audio (corpora/oracle.py). "chance" is what guessing gives. Left
    out on other corpora.
  length right: share of generations that end within two latent frames of the held-out clip's end
    (two clips of one text differ too).

--metrics: published metrics (judges.py); most need the extra eval or hf
  speech: wer (--whisper, --language), sim (--sim), dnsmos, distillmos, utmos (--utmos), vert, ppx
    (--text-model); of reconstructions pesq, stoi; of latents abx
  every kind: fad, fad_inf, mmd (--embedding, --fad-dims, --reference), clap (--clap); kld (--tags)
    against the held-out clip; of reconstructions visqol
  Without --reference reconstructions are compared with their originals, generations with held-out
  clips. What a metric refuses is the last line; the other figures are printed and written.
A metric that nothing of what is judged can have, and an option that nothing reads, are refused at
the start. A generation without sound has opinion scores of 1 (judges.py).

Processes (--jobs, torchrun) share the clips and find the same figures as one; on CUDA the models
run in bf16 (--dtype).
Sweeps of a sampling setting, continuations of audio and the diversity of samples: tools/studies.py.
Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse
import json
import math
import os

from audio import load_audio, save_audio
from cli import check_packages

if __name__ == "__main__":
    check_packages()                # before the imports that need them

import torch
from tqdm import tqdm

from cli import BadInput, Parser, check_writable, cli, number, threads, write_file
from config import load_checkpoint, open_run, trained_stages
from corpora import oracle
from data import KINDS, encode_text, fits, load_clips, load_manifest, pad_id, seconds_of
from discrete import DISCRETE
from generate import refuse_steps, render, sampling_options, what_was_seen
from intervals import Figure, Figures, drawn_evenly
from judges import (DISTANCES, METRICS, Judges, read_sources, refuse_unjudged,
                    refuse_without_material)
from page import keep_evaluation
from prompts import encode_voice
from reconstruction import (clip_name, count_right_facts, judge_vae, load_clip, with_interval)
from report import draw_spectrograms
from workers import Place, choose_place, gather, gather_dict, mine, rank, shared

BATCH = 32                          # texts generated at once
LENGTH_TOLERANCE = 2                # latent frames
REPEATS = 6                         # generations per text
# options of generating, and other options -> the metrics that read them
GENERATING = ("stage", "steps", "temperature", "cfg", "noise", "repeats")
WORDS = ("wer", "vert", "ppx")
READERS = {"whisper": WORDS, "language": WORDS, "text_model": ("ppx",), "sim": ("sim",),
           "embedding": tuple(DISTANCES), "reference": tuple(DISTANCES),
           "fad_dims": ("fad", "fad_inf"), "tags": ("kld",), "clap": ("clap",),
           "utmos": ("utmos",)}


# ---------------------------------------------------------------------------- one clip


def length_is_right(wav, clip, cfg):
    """Does wav (ch, S) end within two latent frames of the clip's end? cfg: VAEConfig."""
    frames = wav.shape[-1] // cfg.hop
    target = math.ceil(round(seconds_of(clip) * cfg.sample_rate) / cfg.hop)
    return abs(frames - target) <= LENGTH_TOLERANCE


def rounded_mean(values):
    """Mean to four decimals; None for an empty list."""
    return round(sum(values) / len(values), 4) if values else None


# ---------------------------------------------------------------------------- the language models


@torch.no_grad()
def voice_prompt(clip, clips, lm, vae, cfg):
    """The voice prompt for a clip's text: another held-out clip of its speaker -> (its latents
    (1, P, D), the wav (ch, S)), or None where there is none or the run was trained without.
    """
    seconds = cfg.data.prompt_frames / vae.cfg.frame_rate
    others = [c for c in clips if c.speaker == clip.speaker != "" and c.audio != clip.audio
              and seconds_of(c) >= seconds]
    if clip.kind != "speech" or not cfg.data.prompt_frames or not others:
        return None

    # the first one that is not silent; the same window of it that sample.py would take
    for other in others:
        latents, _ = encode_voice(lm, vae, other.audio, cfg.data.prompt_frames)     # (1, P, D)
        if latents is not None:
            return latents, torch.tensor(load_audio(other.audio, vae.cfg.sample_rate,
                                                    vae.cfg.channels))
    return None


def choose_targets(clips, kind, cfg, limit):
    """At most `limit` distinct held-out texts of a kind -> {text: clip}, in alphabetical order.
    cfg: DataConfig; texts longer than its text_len are left out.
    """
    targets = {clip.text: clip for clip in clips if clip.kind == kind and clip.text
               and fits(clip.text, kind, cfg)}
    return {text: targets[text] for text in drawn_evenly(sorted(targets), limit)}


def batch_texts(texts, voices, kind, lm, cfg):
    """Lists of at most 32 texts that the model can generate together. cfg: DataConfig.

    The model takes no padding when it generates, so a batch has texts of equal length, all with or
    all without a voice prompt; with an inner monologue texts of every length.
    """
    groups = {}
    for text in texts:
        any_length = kind == "speech" and lm.monologue
        length = 0 if any_length else len(encode_text(text, kind, cfg))
        groups.setdefault((length, voices[text] is not None), []).append(text)

    return [group[i:i + BATCH] for _, group in sorted(groups.items())
            for i in range(0, len(group), BATCH)]


def generate_batch(lm, vae, cfg, kind, texts, voices, seed, options, place=Place()):
    """Generate one batch of texts -> list of waveforms (ch, S)."""
    # monologues differ in length: padding at the end adds no words
    ids = [encode_text(text, kind, cfg.data) for text in texts]
    longest = max(map(len, ids))
    pad = pad_id(cfg.data)
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], dtype=torch.long,
                          device=place.device)

    prompt = None
    if voices[texts[0]] is not None:
        prompt = torch.cat([voices[text][0] for text in texts])                 # (B, P, D)
    generator = torch.Generator(place.device).manual_seed(seed)
    with place.autocast():
        wavs = render(lm, vae, tokens, kind=KINDS.index(kind), seconds=cfg.sample.seconds,
                      prompt=prompt, generator=generator, **options)
    return [wav.float().cpu() for wav in wavs]


def generate_texts(lm, vae, cfg, kind, texts, voices, repeats, options, place=Place(), first=0):
    """Generate every text `repeats` times, this process its share; yields (text, repeat, waveform
    (ch, S)). A repeat is a draw of its own; they count from `first`.
    """
    batches = [(repeat, i, batch) for i, batch in enumerate(batch_texts(texts, voices, kind, lm,
                                                                        cfg.data))
               for repeat in range(first, first + repeats)]
    for repeat, i, batch in tqdm(mine(batches), desc=f"generate {kind}", leave=False,
                                 disable=rank() > 0):
        wavs = generate_batch(lm, vae, cfg, kind, batch, voices, 1000 * repeat + i, options, place)
        for text, wav in zip(batch, wavs):
            yield text, repeat, wav


def save_generation(folder, wav, clip, rate):
    """Write one generation of a clip's text to folder -> its row of a manifest."""
    name = clip_name(clip)
    save_audio(f"{folder}/{name}.wav", wav.numpy(), rate)
    return {"id": name, "text": clip.transcript or clip.text, "kind": clip.kind,
            "audio": f"{name}.wav", "speaker": clip.speaker}


def judge_lm(lm, vae, cfg, clips, options, repeats, limit, folder="", judges=None, place=Place(),
             seed=0):
    """Generate at most `limit` held-out texts of each kind, `repeats` times each -> {"facts":
    {kind: share of facts right}, "chance": {kind: the same by guessing}, "length": {kind: share
    that ends on time}, "intervals": {"facts": {kind: [low, high]}, ...}}.

    options: steps, temperature, guidance, noise. folder: for the first wav of each text and a
    manifest per kind, "" = none. judges: Judges that score the audio too, or None.
    """
    own = Figures(seed)
    if judges is not None:
        judges.held_out = clips
    for kind in KINDS:
        targets = choose_targets(clips, kind, cfg.data, limit)
        voices = {text: voice_prompt(clip, clips, lm, vae, cfg) for text, clip in targets.items()}
        saved = {}                                   # id -> row of the manifest

        # judge wav by wav
        generated = generate_texts(lm, vae, cfg, kind, list(targets), voices, repeats, options,
                                   place)
        for text, repeat, wav in generated:
            clip = targets[text]
            add_generation(own, wav, clip, cfg.vae, repeat)
            if judges is not None:
                _, voice = voices[text] or (None, None)
                real = load_clip(clip, cfg.vae, seconds=20.0) if "kld" in judges.metrics else None
                judges.judge("generation", wav, cfg.vae.sample_rate, clip, voice, real, repeat)
            if folder and repeat == 0:
                saved[text] = save_generation(folder, wav, clip, cfg.vae.sample_rate)

        # the manifest of this kind
        rows = gather_dict(saved).values()
        if rows and rank() == 0:
            write_file(f"{folder}/{kind}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    figures = Figures(seed)
    figures.merge(gather(own))
    return split_figures(figures.read(), ("facts", "chance", "length"))


def add_generation(figures, wav, clip, cfg, repeat):
    """Add one generation (ch, S) of a Clip's text to Figures. cfg: VAEConfig."""
    facts = count_right_facts(wav, clip, cfg.sample_rate)
    if facts is not None:
        figures.add("facts", clip.kind, clip.text, *facts, repeat=repeat)
        figures.add("chance", clip.kind, clip.text, oracle.chance(clip.text, clip.kind), 1,
                    repeat=repeat)
    figures.add("length", clip.kind, clip.text, length_is_right(wav, clip, cfg), 1, repeat=repeat)


def split_figures(figures, names):
    """{name: {kind: Figure}} -> {name: {kind: number}, "intervals": {name: {kind: [low, high]}}}.
    """
    values = {name: {kind: round(found.value, 4) for kind, found in figures.get(name, {}).items()}
              for name in names}
    ends = {name: {kind: found.ends() for kind, found in figures[name].items()}
            for name in names if name in figures}
    return values | {"intervals": ends}


@torch.no_grad()
def draw_overview(path, vae, models, cfg, clips, place=Place()):
    """Spectrograms of one text per kind: the held-out clip, its reconstruction, and the generation
    of each model. models: {name: (model, its options)}.
    """
    texts = {kind: [c for c in clips if c.kind == kind and c.text] for kind in KINDS}
    examples = [min(texts[kind], key=lambda clip: clip.text) for kind in KINDS if texts[kind]]
    if not examples:
        return
    wavs = [load_clip(clip, vae.cfg, seconds=cfg.sample.seconds) for clip in examples]

    # one row of pictures after the other
    pictures = [(f"{clip.kind}: {clip.text}", wav) for clip, wav in zip(examples, wavs)]
    pictures += [("reconstruction", vae.decode(vae.encode(wav[None].to(place.device))[0])[0])
                 for wav in wavs]
    for name, (lm, options) in models.items():
        for clip in examples:
            voices = {clip.text: voice_prompt(clip, clips, lm, vae, cfg)}
            wav, = generate_batch(lm, vae, cfg, clip.kind, [clip.text], voices, 0, options, place)
            pictures.append((f"generated from the text, {name}", wav))
    draw_spectrograms(path, pictures, cfg.vae.sample_rate, columns=len(examples))


# ---------------------------------------------------------------------------- command line


def metric_names(text):
    """The argparse type of --metrics: "pesq,wer" -> ["pesq", "wer"]."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"unknown '{name}'; valid: {', '.join(METRICS)}")
    return names


def run_arguments(no_steps="0 = the objective's own"):
    """A parent parser: which run, which clips, where the figures go. no_steps: what `--steps 0`
    means.
    """
    p = Parser(add_help=False)
    p.add_argument("--run", required=True, help="a run folder written by train.py")
    p.add_argument("--manifest", help="held-out clips; default: the run's own")
    p.add_argument("--stage", default="", help="only this language model, e.g. lm")
    p.add_argument("--limit", type=number(int, 1), default=40,
                   help="clips and texts per kind (default 40)")
    p.add_argument("--steps", type=number(int, 0), default=0,
                   help=f"solver steps of the head; {no_steps} (default)")
    p.add_argument("--json", help="write the figures here")
    p.add_argument("--threads", type=threads, default=0, help="CPU threads; 0 = torch's choice")
    return p


def sampling_arguments(wavs=True):
    """A parent parser: how generations are sampled and, with `wavs`, where the wavs go."""
    p = Parser(add_help=False)
    p.add_argument("--temperature", type=number(float, 0),
                   help="variance of the sampling noise; default: the config's")
    p.add_argument("--cfg", type=number(float),
                   help="latent guidance, 1 = off; default: the config's")
    p.add_argument("--noise", type=number(float, 0, 1),
                   help="noise on the generated history, as a share of the training noise, "
                        "0 .. 1; default: the config's")
    p.set_defaults(wavs=None)
    if wavs:
        p.add_argument("--wavs", help="folder for wavs and pictures")
    return p


def judging_arguments():
    """A parent parser: how often texts are generated, and which metrics judge them. Options of a
    metric that are not given are None; their defaults are those of Judges.
    """
    p = Parser(add_help=False)
    p.add_argument("--repeats", type=number(int, 1), default=REPEATS,
                   help=f"generations per text (default {REPEATS})")
    p.add_argument("--seed", type=number(int, 0), default=0,
                   help="of the draws for the intervals (default 0)")

    # published metrics and their models
    m = p.add_argument_group("published metrics (judges.py)")
    m.add_argument("--metrics", type=metric_names, default=[],
                   help=f"any of {','.join(METRICS)}; most need the extra eval or hf")
    m.add_argument("--whisper",
                   help="faster-whisper model for wer, vert and ppx (default base)")
    m.add_argument("--language", help="of the speech, as Whisper names it (default en)")
    m.add_argument("--sim",
                   help="resemblyzer (default), a transformers model with an x-vector head, or "
                        "speechbrain/... (pip install speechbrain)")
    m.add_argument("--embedding",
                   help="for fad, fad_inf and mmd: mel (default), birdnet, or an audio model of "
                        "transformers")
    m.add_argument("--fad-dims", type=number(int, 0),
                   help="principal axes for fad and fad_inf; 0 = all dimensions (default)")
    m.add_argument("--reference", help="manifest of real clips for the distances, matched by "
                                       "source; default: originals, held-out clips")
    m.add_argument("--text-model", help="causal text model for ppx")
    m.add_argument("--tags", help="audio classifier for kld")
    m.add_argument("--clap", help="CLAP model for clap")
    m.add_argument("--utmos", help="checkout of SpeechMOS for utmos")
    return p


def options_of_metrics(a):
    """{name: value} of the options for metrics that were given; BadInput where none of --metrics
    reads one.
    """
    options = {name: value for name, value in vars(a).items()
               if name in READERS and value is not None}
    for name in options:
        if not set(READERS[name]) & set(a.metrics):
            raise BadInput(f"--{name.replace('_', '-')}: is for --metrics "
                           f"{' or '.join(READERS[name])}; leave it out, or add that metric")
    return options


def refuse_generating(a):
    """BadInput where an option of generating was given, and only the VAE is judged."""
    for name in GENERATING:
        if vars(a)[name] is not None:
            raise BadInput(f"--{name}: is for generations, and only the VAE is judged; leave it "
                           "out, or judge a language model (--what lm)")


def open_judges(a, cfg, device="cpu", reconstructed=False, generated=True):
    """The Judges that the command line asks for; None without --metrics. cfg: Config.
    reconstructed, generated: what they will judge. BadInput: a metric that nothing of it can have,
    an option that no metric reads.
    """
    options = options_of_metrics(a)
    refuse_unjudged(a.metrics, reconstructed, generated, cfg.data.prompt_frames > 0)
    if not a.metrics:
        return None
    options.pop("reference", None)
    reference = load_manifest(a.reference) if a.reference else None
    sources = {}
    if set(a.metrics) & set(DISTANCES):
        sources = read_sources(a.manifest or cfg.data.valid or cfg.data.manifest)
        sources |= read_sources(a.reference)
    return Judges(a.metrics, **options, reference=reference, sources=sources, device=device,
                  seed=a.seed)


def prepare(a):
    """Set the number of threads; refuse a --json or --wavs that cannot be written, before the work.
    """
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.json:
        check_writable(a.json)
    if a.wavs:
        check_writable(f"{a.wavs}/overview.png")


def find_stages(run, stage=""):
    """The language models that a run has, in order of training; with `stage` only that one."""
    stages = trained_stages(run)
    if not stage:
        return stages
    if stage not in stages:
        raise BadInput(f"--stage: {run} has no '{stage}'; it has {', '.join(stages) or 'none'}")
    return [stage]


def open_stage(run, stage, device="cpu"):
    """The language model of a stage whose training is finished."""
    if not load_checkpoint(f"{run}/{stage}.pt")["done"]:
        raise BadInput(f"{run}/{stage}.pt: its training is not finished; "
                       "run train.py again to resume it")
    _, _, lm, _ = open_run(run, stage, device)
    return lm


def held_out_clips(run, manifest, cfg):
    """The clips of a manifest, else the ones that the run did not train on."""
    if not manifest and not cfg.data.manifest:
        manifest = f"{run}/toy/valid.jsonl"
    if manifest:
        return load_manifest(manifest)
    _, held_out = load_clips(cfg.data)
    return held_out


def of_trained_kinds(clips, run, stages, cfg):
    """The clips of kinds that the language models of `stages` saw in training; a line says which
    are left out.
    """
    trained = {kind for stage in stages for kind in what_was_seen(run, stage, cfg)["kinds"]}
    for kind in sorted({clip.kind for clip in clips} - trained):
        print(f"{kind}: not generated, {run} was not trained on it")
    return [clip for clip in clips if clip.kind in trained]


def chosen_sampling(a, cfg, lm):
    """The sampling options of a model: the command line's, else the config's; steps: the command
    line's, else the objective's own.
    """
    refuse_steps(lm, a.steps, "--steps")
    options = sampling_options(cfg.sample, a.steps, a.temperature, a.cfg, a.noise)
    return options | {"steps": a.steps or lm.cfg.head.sample_steps}


def vae_rows(figures, published, unit):
    """Rows of print_table: judge_vae's figures and the published metrics. unit: nats or bits."""
    def row(name, key):
        return name, {kind: with_interval(values, key, values["clips"])
                      for kind, values in figures.items()}

    return [row("log-mel distance (0 perfect, 1 another clip)", "log_mel"),
            row("STFT distance", "stft"),
            row("SI-SDR, dB", "si_sdr"),
            row(f"rate, {unit} per second", "rate"),
            *published.items(),
            row("original: facts right", "original"),
            row("reconstruction: facts right", "reconstruction")]


def lm_rows(name, figures, published):
    """Rows of print_table: judge_lm's figures of one model and the published metrics."""
    return [(f"generation, {name}: facts right", joined(figures, "facts")),
            (f"generation, {name}: length right", joined(figures, "length")),
            *[(f"{key}, {name}", row) for key, row in published.items()]]


def joined(figures, name):
    """{kind: Figure} of judge_lm's figures."""
    ends = figures["intervals"].get(name, {})
    return {kind: Figure(value, *(ends[kind] or (None, None)))
            for kind, value in figures[name].items()}


def by_kind(published):
    """{figure: {kind: Figure}} -> {"speech": {figure: number}, ..., "intervals": {kind: {figure:
    [low, high]}}}, for --json; kinds without figures are left out.
    """
    found = {}
    for name, row in published.items():
        for kind, figure in row.items():
            found.setdefault(kind, {})[name] = round(figure.value, 4)
            found.setdefault("intervals", {}).setdefault(kind, {})[name] = figure.ends()
    return found


def count_steps(steps):
    """1 -> "1 step", 4 -> "4 steps"."""
    return f"{steps} step{'s' * (steps > 1)}"


def model_name(stage, figures):
    """"lm: trigflow, 20 steps"; heads of codes have no steps."""
    name = f"{stage}: {figures['objective']}"
    return name if figures["objective"] in DISCRETE else f"{name}, {count_steps(figures['steps'])}"


def print_table(rows, seed=0):
    """Print [(name, {kind: number, Figure or None})], a column per kind that has any; rows without
    numbers are left out. seed: of the intervals.
    """
    rows = [(name, row) for name, row in rows if any(v is not None for v in row.values())]
    kinds = [kind for kind in KINDS if any(row.get(kind) is not None for _, row in rows)]
    cells = [[shown(row.get(kind)) for kind in kinds] for _, row in rows]
    left = max((len(name) for name, _ in rows), default=0)
    width = 2 + max((len(cell) for line in cells for cell in line), default=0)
    width = max(width, 9)
    if rows:
        print(" " * left + "".join(f"{kind:>{width}s}" for kind in kinds))
    for (name, _), line in zip(rows, cells):
        print(f"{name:{left}s}" + "".join(f"{cell:>{width}s}" for cell in line))
    if any("[" in cell for line in cells for cell in line):
        print(f"[low, high]: 95 % bootstrap interval over clips, seed {seed}")


def shown(value):
    """A cell of the table."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, Figure) else f"{value:.3f}"


def write_json(path, figures):
    """Write the figures as JSON, whole or not at all."""
    write_file(path, json.dumps(figures, indent=1))


def parse():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               parents=[run_arguments(), sampling_arguments(), judging_arguments()])
    p.add_argument("--what", default="all", choices=["all", "vae", "lm"],
                   help="judge the VAE, the language models, or all (default)")
    p.add_argument("--device", default="auto",
                   help="auto (cuda, else mps, else cpu), or one of them (default auto)")
    p.add_argument("--dtype", default="auto", choices=["auto", "bf16", "fp32"],
                   help="of the models; auto = bf16 on NVIDIA GPUs from Ampere on (default)")
    p.add_argument("--jobs", type=number(int, 1, 1024), default=1,
                   help="processes that share the clips; with torchrun its processes (default 1)")
    p.set_defaults(**dict.fromkeys(GENERATING))      # None = not given
    return p.parse_args()


def judge_run(a, place):
    """All figures of a run, printed and written by process 0."""
    # the run, and clips that it was not trained on
    cfg, vae, _, _ = open_run(a.run, device=place.device)
    stages = [] if a.what == "vae" else find_stages(a.run, a.stage)
    if a.what == "lm" and not stages:
        raise BadInput(f"{a.run}: has no language model to generate with")
    if not stages:
        refuse_generating(a)
    clips = held_out_clips(a.run, a.manifest, cfg)
    generated = of_trained_kinds(clips, a.run, stages, cfg) if stages else clips

    # what judges it
    judges = open_judges(a, cfg, place.device, a.what != "lm", bool(stages))
    refuse_without_material(a.metrics, generated if a.what == "lm" else clips)
    figures = {"run": a.run, "clips": len(clips), "seed": a.seed}
    rows = []

    # the VAE
    if a.what != "lm":
        found, published = vae_figures(a, cfg, vae, clips, judges, place)
        figures["vae"] = found
        figures |= published_json(published, judges)
        rows += vae_rows(found, published, "nats" if vae.quantizer is None else "bits")

    # the language models
    models = {}
    for stage in stages:
        lm = open_stage(a.run, stage, place.device)
        options = chosen_sampling(a, cfg, lm)
        folder = f"{a.wavs}/{stage}" if a.wavs else ""
        found = judge_lm(lm, vae, cfg, generated, options, a.repeats or REPEATS, a.limit, folder,
                         judges, place, a.seed)
        published = judges.pop() if judges else {}

        # what is written, what is printed
        figures[stage] = {"objective": lm.cfg.head.objective, **options, **found}
        merge_intervals(figures[stage], published_json(published, judges))
        name = model_name(stage, figures[stage])
        models[name] = lm, options
        rows += lm_rows(name, found, published)
    if stages:                                       # the same for every stage
        rows.append(("chance", joined(found, "chance")))

    # printed, drawn and written by one process
    if rank() > 0:
        return
    print_table(rows, a.seed)
    if a.wavs:
        draw_overview(f"{a.wavs}/overview.png", vae, models, cfg, generated, place)
    if a.json:
        write_json(a.json, figures)
    keep_evaluation(a.run, figures, a.wavs, {clip_name(clip): clip.audio for clip in generated})
    if judges:
        judges.refuse_missing()
    if judges and judges.refused:                    # the other figures are there
        more = f" (and {len(judges.refused) - 1} more)" if len(judges.refused) > 1 else ""
        raise BadInput(judges.refused[0] + more)


def vae_figures(a, cfg, vae, clips, judges, place):
    """judge_vae's figures and the published ones; BadInput: too few clips, nothing else asked."""
    found = judge_vae(vae, clips, a.limit, a.wavs, judges, cfg.gan.loss_floor, place, a.seed)
    if not found and a.what == "vae":
        raise BadInput(f"{len(clips)} held-out clips: the log-mel distance needs two clips of "
                       "a kind, of 1024 samples; give --manifest with more")
    return found, judges.pop() if judges else {}


def published_json(published, judges):
    """The published figures for --json: "speech" is there wherever judges were asked."""
    return {"speech": {}} | by_kind(published) if judges else {}


def merge_intervals(figures, published):
    """Add published figures, their intervals to those that are there."""
    ends = published.pop("intervals", {})
    figures |= published
    figures["intervals"] |= ends


def main():
    a = parse()
    prepare(a)
    place = choose_place(a.device, a.dtype)
    if a.jobs > 1 and not a.threads:
        torch.set_num_threads(max(1, os.cpu_count() // a.jobs))
    with shared(a.jobs):
        judge_run(a, place)


if __name__ == "__main__":
    cli(main)
