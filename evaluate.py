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
import os

from cli import check_packages

if __name__ == "__main__":
    check_packages()                # before the imports that need them

import torch

from checks import same_clips
from cli import BadInput, Parser, check_writable, cli, number, threads
from config import load_checkpoint, open_run, trained_stages
from data import fits, load_clips, load_manifest, split_off
from figures import (joined, lm_rows, merge_intervals, model_name, print_table, published_json,
                     vae_rows, write_json)
from generate import refuse_steps, sampling_options, what_was_seen
from generations import draw_overview, judge_lm
from judges import (DISTANCES, METRICS, Judges, read_sources, refuse_unjudged,
                    refuse_without_material)
from page import keep_evaluation
from reconstruction import clip_name, judge_vae
from remote import is_remote
from workers import choose_place, rank, shared

REPEATS = 6                         # generations per text
# options of generating, and other options -> the metrics that read them
GENERATING = ("stage", "steps", "temperature", "cfg", "noise", "repeats")
WORDS = ("wer", "vert", "ppx")
READERS = {"whisper": WORDS, "language": WORDS, "text_model": ("ppx",), "sim": ("sim",),
           "embedding": tuple(DISTANCES), "reference": tuple(DISTANCES),
           "fad_dims": ("fad", "fad_inf"), "tags": ("kld",), "clap": ("clap",),
           "utmos": ("utmos",)}


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
        return load_manifest(f"{run}/toy/valid.jsonl")
    if manifest:
        return clips_to_judge(run, manifest, cfg)
    path = cfg.data.valid or cfg.data.manifest
    if not os.path.exists(path) and not is_remote(path):
        raise BadInput(f"{run}: its clips, {path}, are not here; give held-out clips, --manifest "
                       "FILE")
    _, held_out = load_clips(cfg.data)
    return held_out


def clips_to_judge(run, manifest, cfg):
    """The clips of a manifest. Of one whose held-out part the training split off (data.valid = ""),
    wherever it lies now, that part; a line says so, and where training had them all.
    """
    clips = load_manifest(manifest)
    train, held_out = split_off(clips, cfg.data.seed)
    stages = ("vae", *trained_stages(run))
    digests = [load_checkpoint(f"{run}/{stage}.pt").get("clips", "") for stage in stages]
    digests = {digest for digest in digests if digest}
    if len(clips) > 1 and any(same_clips(digest, train) for digest in digests):
        clips = held_out
        if rank() == 0:
            print(f"{manifest}: {run} was trained on all but {len(clips)} of its clips; these are "
                  "judged")
    elif any(same_clips(digest, clips) for digest in digests) and rank() == 0:
        print(f"{manifest}: {run} was trained on these very clips; expect better figures than on "
              "others")
    return clips


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
    if stages and not has_texts(a, generated, cfg.data):
        stages = []
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

    # what a metric refused ends the command, now that the other figures are there
    if judges:
        judges.refuse_missing()
    if judges and judges.refused:
        more = f" (and {len(judges.refused) - 1} more)" if len(judges.refused) > 1 else ""
        raise BadInput(judges.refused[0] + more)


def has_texts(a, clips, cfg):
    """Whether there is a text to generate from; BadInput without one, where nothing else is asked.
    A line says how many are too long for the run (cfg: DataConfig).
    """
    texts = [clip for clip in clips if clip.text]
    long = sum(not fits(clip.text, clip.kind, cfg) for clip in texts)
    found = len(texts) > long
    without = "no held-out clip has a text to generate from"
    if long:
        why = f"longer than those of training (data.text_len = {cfg.text_len})"
        without = f"all texts of held-out clips are {why}, none is generated"
    if long and found and rank() == 0:
        print(f"texts: {long} of {len(texts)} held-out ones are not generated, they are {why}")
    if not found and a.what == "lm":
        raise BadInput(f"{without}; give a --manifest with texts, or --what vae")
    if not found and a.what == "all":
        print(without)
    return found


def vae_figures(a, cfg, vae, clips, judges, place):
    """judge_vae's figures and the published ones; BadInput: too few clips, nothing else asked."""
    found = judge_vae(vae, clips, a.limit, a.wavs, judges, cfg.gan.loss_floor, place, a.seed)
    if not found and a.what == "vae":
        more = "give --manifest with more" if a.limit > 1 else "give --limit 2 or more"
        raise BadInput(f"{len(clips)} held-out clips: the log-mel distance needs two clips of "
                       f"a kind, of 1024 samples; {more}")
    return found, judges.pop() if judges else {}


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
