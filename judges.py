"""Published metrics of audio, none of them ours: which clip goes to which metric.

    original ───────┬──────────► one clip      dnsmos distillmos utmos wer ppx clap
                    ├──────────► two clips     pesq stoi visqol kld
    reconstruction ─┴──────────► one clip      ...
    generation ────────────────► one clip      ...     ◄── clip of the voice: sim
    all of either ─────────────► a set         fad fad_inf mmd (against real clips), vert, abx

    judges = Judges(["pesq", "wer"])
    for ...: judges.compare(original, reconstruction, rate, clip)
    judges.pop()        {"pesq": {"speech": Figure(3.1, 2.9, 3.3, 40)}, "wer original": ...}

Formulas and sources: speech_metrics.py (one or two clips, sim), transcripts.py (wer, vert, ppx),
embeddings.py (clap), distances.py (fad, fad_inf, mmd, kld), abx.py; intervals: intervals.py.
All but visqol, clap and the distances are of speech only. Every process judges its own clips;
pop() gathers them (workers.py).

Silence and scraps: a clip that pesq, stoi or visqol cannot score is left out of that metric. Of
opinion scores a recording without sound (all below -80 dB of full scale, or shorter than 0.1 s) is
left out, and so is its reconstruction. Lines count both. A generation without sound, or such a
reconstruction of a recording that has some, stays in with 1, the bottom of the scale: nobody is
rewarded for silence.
"""
import json
import os
from collections import Counter, defaultdict
from contextlib import contextmanager

import numpy as np
import torch

from abx import abx_errors, items_of
from audio import load_audio
from cli import BadInput
from distances import fad, fad_inf, kl_divergence, mmd
from embeddings import BUILT_IN, Clap, Tagger, embed_clip, open_embedding, resample
from intervals import Figures, exp_ratio, geometric_mean
from speech_metrics import (SPEECH_RATE, DistillMos, Dnsmos, Pesq, Stoi, Utmos, Visqol,
                            is_audible, open_speaker)
from transcripts import Recogniser, TextModel, Words, auto_bleu, self_bleu
from workers import gather, gather_dict, mine

SPEECH = ("pesq", "stoi", "dnsmos", "distillmos", "utmos", "wer", "sim", "abx", "vert", "ppx")
DISTANCES = {"fad": fad, "fad_inf": fad_inf, "mmd": mmd}
METRICS = ("pesq", "stoi", "visqol", "dnsmos", "distillmos", "utmos", "wer", "sim", "abx", "vert",
           "ppx", *DISTANCES, "kld", "clap")
# metrics that need the recording itself, or its latents
OF_RECONSTRUCTIONS = ("pesq", "stoi", "visqol", "abx")
# opinion scores, and the lowest one, of a generation without sound
OPINIONS = ("dnsmos", "distillmos", "utmos")
LOWEST = 1.0
# metrics that need a model to be named, and the option that names it
NEED = {"utmos": "utmos", "ppx": "text-model", "kld": "tags", "clap": "clap"}
# the models of a metric, where they have other names
MODELS = {"visqol": ("visqol speech", "visqol audio"), "wer": ("words", "whisper"),
          "vert": ("words", "whisper"), "ppx": ("ppx", "whisper"), "abx": (),
          **{metric: ("embedding",) for metric in DISTANCES}}
# seconds of a real clip that are compared, as of those that are reconstructed
SECONDS = 20.0


def spoken(clip):
    """The words of a Clip of speech, without the description around them."""
    return clip.transcript or clip.text


@contextmanager
def opening(option, extra):
    """`with opening("--embedding NAME", "hf"):` what a model's loading raises becomes one line.
    extra: of this project, that has its package.
    """
    try:
        yield
    except ImportError as e:
        package = (e.name or str(e)).partition(".")[0]
        install = package if package == "speechbrain" else f"-e .[{extra}]"
        raise BadInput(f"{option}: {package} is not installed: pip install {install}") from None
    except (RuntimeError, OSError, ValueError, KeyError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise BadInput(f"{option}: cannot be loaded ({reason})") from None


def refuse_unjudged(metrics, reconstructed, generated, prompted):
    """BadInput where nothing that is judged can have a metric. reconstructed, generated: whether
    such clips are judged; prompted: whether generations have a voice prompt.
    """
    asked = [metric for metric in metrics if metric in OF_RECONSTRUCTIONS]
    if asked and not reconstructed:
        raise BadInput(f"--metrics {','.join(asked)}: for reconstructions, and only generations "
                       "are judged, which have no recording to compare with; leave out, or run "
                       "evaluate.py with --what vae")
    if "sim" in metrics and not generated:
        raise BadInput("--metrics sim: compares generations with their voice prompts, and only the "
                       "VAE is judged; leave out, or judge a language model (--what lm)")
    if "sim" in metrics and not prompted:
        raise BadInput("--metrics sim: compares generations with their voice prompts, and the run "
                       "was trained without (data.prompt_frames); leave out")


def refuse_without_material(metrics, clips):
    """BadInput where no clip is speech, has a text, or shares its speaker with another one, and a
    metric needs that.
    """
    asked = [metric for metric in metrics if metric in SPEECH]
    if asked and not any(clip.kind == "speech" for clip in clips):
        raise BadInput(f"--metrics {','.join(asked)}: no held-out clip is speech; give a "
                       "--manifest that has some, or other metrics")
    for metric in ("wer", "clap"):
        if metric in metrics and not any(clip.text or clip.transcript for clip in clips):
            raise BadInput(f"--metrics {metric}: no held-out clip has a text; give a --manifest "
                           "with texts, or other metrics")
    voices = Counter(clip.speaker for clip in clips if clip.kind == "speech" and clip.speaker)
    if "sim" in metrics and max(voices.values(), default=0) < 2:
        raise BadInput("--metrics sim: no two held-out clips of speech have the same `speaker`, so "
                       "there are no voice prompts; give a --manifest that has some")


def metrics_of(figures):
    """The metrics of figures by name: {"wer original": ..., "pesq": ...} -> {"wer", "pesq"}."""
    return {name.split()[0] for name in figures}


# ---------------------------------------------------------------------------- real clips


def read_sources(manifest):
    """{path of the audio, as in its Clip: its "source"} of the lines of a manifest that have one.
    """
    if not manifest or os.path.isdir(manifest):
        return {}
    folder = os.path.dirname(os.path.abspath(manifest))
    with open(manifest, encoding="utf8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return {os.path.normpath(os.path.join(folder, row["audio"])): row["source"]
            for row in rows if "source" in row}


def match_sources(judged, reference, sources, most=1000, seed=0):
    """Choose clips with the same shares of each source -> (names of judged clips, Clips of the
    reference): for every judged clip the same number of its source, as many as there are.

    judged: audio paths; reference: Clips; sources: {audio path: source}. Judged clips of a source
    of which the reference has fewer are left out, which a line says. BadInput: nothing is left.
    """
    wanted = Counter(sources.get(name, "") for name in judged)
    there = defaultdict(list)
    for clip in reference:
        there[sources.get(clip.audio, "")].append(clip)
    for source in [s for s in wanted if len(there[s]) < wanted[s]]:
        print(f"reference: has {len(there[source])} clips of source '{source}', "
              f"{wanted[source]} were judged; these are left out")
        del wanted[source]
    if not wanted:
        raise BadInput("--reference: has too few clips of every source that was judged; give one "
                       "with as many")

    # the same number of real clips for each judged one
    times = min(most, *(len(there[source]) // count for source, count in wanted.items()))
    rng = np.random.default_rng(seed)
    chosen = []
    for source in sorted(wanted):
        order = rng.permutation(len(there[source]))[:times * wanted[source]]
        chosen += [there[source][i] for i in sorted(order)]
    return [name for name in judged if sources.get(name, "") in wanted], chosen


# ---------------------------------------------------------------------------- the judges


class Judges:
    """compare() and judge() add one clip; pop() gives the figures, each with its interval."""

    def __init__(self, metrics, whisper="base", *, language="en", sim="resemblyzer",
                 embedding="mel", fad_dims=0, text_model="", tags="", clap="", utmos="",
                 reference=None, sources=None, device="cpu", seed=0, models=True):
        """metrics: some of METRICS; models: load what they need. whisper: name or folder of a
        faster-whisper model. sim, embedding, text_model, tags, clap, utmos: names of models.
        reference: Clips that the distances compare with; None = the originals of the clips that
        are judged, else held-out clips. sources: {audio path: source} of all clips.
        """
        self.metrics = metrics
        self.device = device
        self.seed = seed

        # models and their names
        self.models = {}
        self.names = {"utmos": utmos, "ppx": text_model, "kld": tags, "clap": clap, "sim": sim,
                      "whisper": whisper}
        self.embedding = embedding
        self.fad_dims = fad_dims
        self.language = language

        # real clips
        self.reference = reference
        self.held_out = None                         # real clips, where nothing else is compared
        self.sources = sources or {}
        self.real = {}                               # (audio path, rate) -> windows of a real clip

        self.refused = []                            # lines about what a metric could not do
        self.missing = set(metrics)                  # metrics that have had no figure yet
        self.clear()
        for metric in metrics if models else ():
            self.load(metric)

    def clear(self):
        self.figures = Figures(self.seed)
        self.transcripts = defaultdict(dict)         # name -> {(audio path, repeat): transcript}
        self.windows = defaultdict(dict)             # (name, kind) -> {(path, repeat): (n, F)}
        self.items = []                              # of abx
        self.unaligned = 0                           # clips that gave it none
        self.unheard = Counter()                     # metric -> clips that it refused
        self.rate = None

    def load(self, metric):
        """Load the models of one metric; BadInput names what is missing."""
        option = NEED.get(metric)
        if option and not self.names[metric]:
            raise BadInput(f"--metrics {metric}: needs a model; name one with --{option}")
        makers = self.makers()
        for name in MODELS.get(metric, (metric,)):
            if name not in self.models:
                self.models[name] = self.open(metric, name, makers[name])

    def makers(self):
        """{model: the function that makes it}."""
        names = self.names
        device = self.device

        # of one or two clips
        clips = {"pesq": Pesq, "stoi": Stoi, "dnsmos": Dnsmos,
                 "visqol speech": lambda: Visqol("speech"),
                 "visqol audio": lambda: Visqol("audio"),
                 "distillmos": lambda: DistillMos(device),
                 "utmos": lambda: Utmos(names["utmos"], device)}

        # of what was said, and of who said it
        speech = {"whisper": lambda: Recogniser(names["whisper"], self.language, device),
                  "words": lambda: Words(self.language),
                  "ppx": lambda: TextModel(names["ppx"], device),
                  "sim": lambda: open_speaker(names["sim"], device)}

        # of any audio
        audio = {"embedding": lambda: open_embedding(self.embedding, device),
                 "clap": lambda: Clap(names["clap"], device),
                 "kld": lambda: Tagger(names["kld"], device)}
        return clips | speech | audio

    def open(self, metric, name, make):
        """make(), or one line about what kept it from being made."""
        # which option is to blame, and which extra has the package
        option = f"--metrics {metric}"
        extra = "mos" if name == "distillmos" else "eval"
        if name == "whisper":
            option = f"--whisper {self.names[name]}"
        elif name == "embedding":
            option = f"--embedding {self.embedding}"
            extra = "eval" if self.embedding in BUILT_IN else "hf"
        elif name in NEED:
            option = f"--{NEED[name]} {self.names[name]}"
            extra = "hf"
        elif name == "sim":
            option = f"--sim {self.names[name]}"
            extra = "eval" if self.names[name] == "resemblyzer" else "hf"

        with opening(option, extra):
            return make()

    # ------------------------------------------------------------------------ one clip

    def compare(self, original, reconstruction, rate, clip):
        """Add an original and its reconstruction, tensors (ch, S) at `rate` Hz, of a Clip. Opinion
        scores of a recording without sound are left out, on both sides.
        """
        names = [name for name in ("pesq", "stoi") if name in self.metrics
                 and clip.kind == "speech"]
        if "visqol" in self.metrics:
            names.append("visqol speech" if clip.kind == "speech" else "visqol audio")

        # clips that a metric refuses are not counted
        for name in names:
            model = self.models[name]
            score = model.score(resample(original, rate, model.rate),
                                resample(reconstruction, rate, model.rate))
            figure = name.split()[0]
            if score is None:
                self.unheard[figure] += 1
            else:
                self.figures.add(figure, clip.kind, clip.audio, score, 1)

        opinions = [metric for metric in OPINIONS if metric in self.metrics]
        if clip.kind == "speech" and not is_audible(original[0].numpy(), rate):
            self.unheard.update(opinions)
            opinions = []
        self.judge("original", original, rate, clip, opinions=opinions)
        self.judge("reconstruction", reconstruction, rate, clip, original=original,
                   opinions=opinions)

    def judge(self, name, wav, rate, clip, voice=None, original=None, repeat=0, opinions=OPINIONS):
        """Add one wav (ch, S) that was made for a Clip, the repeat-th one. voice: the clip
        (ch, S') that gave its voice, original: the real clip, opinions: the opinion scores that
        it gets, of those asked for.
        """
        if clip.kind == "speech":
            self.judge_speech(name, resample(wav, rate, SPEECH_RATE), clip, repeat, opinions)
        if "sim" in self.metrics and voice is not None:
            similarity = (self.embed_voice(resample(wav, rate, SPEECH_RATE))
                          @ self.embed_voice(resample(voice, rate, SPEECH_RATE)))
            self.figures.add(f"sim {name}", clip.kind, clip.audio, similarity, 1, repeat=repeat)

        # against its caption, against the real clip
        if "clap" in self.metrics and clip.text:
            score = self.models["clap"].score(wav, rate, clip.text)
            self.figures.add(f"clap {name}", clip.kind, clip.audio, score, 1, repeat=repeat)
        if "kld" in self.metrics and original is not None:
            tagger = self.models["kld"]
            distance = kl_divergence(tagger.tag(original, rate), tagger.tag(wav, rate))
            self.figures.add(f"kld {name}", clip.kind, clip.audio, distance, 1, repeat=repeat)

        # as one of a set
        if "embedding" in self.models:
            self.rate = rate
            vectors = embed_clip(self.models["embedding"], wav, rate)               # (n, F)
            self.windows[name, clip.kind][clip.audio, repeat] = vectors

    def judge_speech(self, name, wav, clip, repeat, opinions):
        """Add opinion scores and the transcript of one wav (S,) at 16 kHz. Without sound its
        scores are 1: the models' own, of silence, lie above those of poor speech.
        """
        audible = is_audible(wav, SPEECH_RATE)
        for metric in opinions:
            if metric in self.metrics:
                score = self.models[metric].score(wav) if audible else LOWEST
                self.figures.add(f"{metric} {name}", "speech", clip.audio, score, 1, repeat=repeat)
        if "whisper" not in self.models:
            return

        transcript = self.models["whisper"].transcribe(wav)
        if "wer" in self.metrics and spoken(clip):
            errors, words = self.models["words"].errors(spoken(clip), transcript)
            self.figures.add(f"wer {name}", "speech", clip.audio, errors, words,
                             repeat=repeat)
        if "ppx" in self.metrics:
            nats, tokens = self.models["ppx"].surprise(transcript)
            self.figures.add(f"ppx {name}", "speech", clip.audio, nats, tokens, repeat=repeat,
                             formula=exp_ratio)
        self.transcripts[name][clip.audio, repeat] = transcript

    def embed_voice(self, wav):
        """The unit speaker embedding of wav (S,) at 16 kHz; zeros where there is no speech."""
        return self.models["sim"].embed(wav)

    def add_latents(self, latents, frame_rate, clip):
        """Add a clip's latents (T, D) for abx."""
        if "abx" in self.metrics:
            items = items_of(clip, clip.audio, latents, frame_rate)
            self.items += items
            self.unaligned += not items

    # ------------------------------------------------------------------------ sets of clips

    def pop(self):
        """{figure: {kind: Figure}} of the clips added since the last call, of all processes. What a
        metric refuses is left out, and stands in `refused`, one line each; a line is printed of the
        clips that a metric left out.
        """
        merged = Figures(self.seed)
        merged.merge(gather(self.figures))
        if "vert" in self.metrics:
            self.add_diversity(merged)
        if "abx" in self.metrics:
            self.add_abx(merged)
        found = merged.read()
        for metric, clips in sum(gather(self.unheard), Counter()).items():
            if metric not in metrics_of(found):
                self.refused.append(f"--metrics {metric}: heard nothing in any of {clips} clips; "
                                    "give a --manifest with longer or louder ones")
            else:
                print(f"{metric}: {clips} clip{'s' * (clips > 1)} left out, silent or too short")

        # distances come last
        for name, kind in sorted(set().union(*gather(set(self.windows)))):
            judged = self.windows_of(name, kind)
            for metric in self.metrics:
                try:
                    if metric in DISTANCES and self.is_compared(name):
                        figure, value = self.distance(metric, name, kind, judged)
                        found.setdefault(figure, {})[kind] = value
                except BadInput as e:
                    self.refused.append(f"--metrics {e} ({name}, {kind})")
        self.missing -= metrics_of(found)
        self.clear()
        return found

    def refuse_missing(self):
        """Add a line to `refused` for each metric that no pop() gave, and that has no line yet."""
        for metric in self.metrics:
            refused = any(line.startswith(f"--metrics {metric}:") for line in self.refused)
            if metric in self.missing and not refused:
                why = ("no text had another clip of its speaker to give the voice"
                       if metric == "sim" else "nothing that was judged could have it")
                self.refused.append(f"--metrics {metric}: {why}; give a --manifest with other "
                                    "clips, or leave out")

    def pop_figures(self):
        """pop() as {figure: number}: metrics of speech by their name, others with the kind.
        BadInput: a metric refuses, or has no figure.
        """
        numbers = {}
        for figure, kinds in self.pop().items():
            for kind, found in kinds.items():
                name = figure if figure.split()[0] in SPEECH else f"{figure} {kind}"
                numbers[name] = round(found.value, 4)
        self.refuse_missing()
        if self.refused:
            raise BadInput(self.refused[0])
        return numbers

    def windows_of(self, name, kind):
        """{audio path: windows (n, F) of all its wavs}, of all processes."""
        clips = defaultdict(list)
        for (clip, _), vectors in gather_dict(self.windows.get((name, kind), {})).items():
            clips[clip].append(vectors)
        return {clip: np.concatenate(vectors) for clip, vectors in clips.items()}

    def add_diversity(self, merged):
        """VERT of the transcripts of every set."""
        for name in sorted(set().union(*gather(set(self.transcripts)))):
            texts = gather_dict(self.transcripts.get(name, {}))
            words = [self.models["words"].normalize(text).split() for text in texts.values()]
            if len(words) < 2:
                self.refused.append(f"--metrics vert: needs 2 clips of speech, the {name} ones are "
                                    f"{len(words)}; raise --limit")
                continue
            for (clip, repeat), own, against in zip(texts, words, self_bleu(words)):
                merged.add(f"vert {name}", "speech", clip, 100 * against, 100 * auto_bleu(own), 1,
                           repeat=repeat, formula=geometric_mean)

    def add_abx(self, merged):
        """The errors within and across speakers, whichever there are, of the latents added."""
        items = sum(gather(self.items), [])
        within = abx_errors(items, False, self.seed)
        across = abx_errors(items, True, self.seed)
        for name, errors in (("within", within), ("across", across)):
            for clip, columns in errors.items():
                merged.add(f"abx {name}", "speech", clip, *columns)

        # generations have no latents here, and no items
        if items and not within and not across:
            self.refused.append("--metrics abx: no word is said twice beside another word; give a "
                                "--manifest with more speech")
        if self.unaligned and not items:
            self.refused.append("--metrics abx: no held-out clip has `words` with times; add them "
                                "with python -m corpora.align")

    def is_compared(self, name):
        """Whether a set is compared with real clips: originals only with others."""
        return name != "original" or self.reference is not None

    def distance(self, metric, name, kind, judged):
        """("fad mel generation", Figure) of judged clips {audio path: windows}."""
        original = self.windows_of("original", kind)
        options = {"seed": self.seed}
        if self.reference is None and original:
            reference = list(original.values())
            options["paired"] = True
        else:
            judged, reference = self.against_manifest(kind, judged)

        # the embedding and its axes are part of a figure's name
        label = os.path.basename(self.embedding.rstrip("/"))
        if metric != "mmd":
            options.pop("paired", None)
            options["dims"] = self.fad_dims
            label += f" {self.fad_dims}d" if self.fad_dims else ""
        return (f"{metric} {label} {name}",
                DISTANCES[metric](list(judged.values()), reference, **options))

    def against_manifest(self, kind, judged):
        """Judged clips {audio path: windows} and windows of real clips, matched by source. Real
        clips are heard at the rate of the judged ones: what lies above no model could give.
        """
        clips = self.held_out if self.reference is None else self.reference
        rate = max(gather(self.rate or 0))
        names, chosen = match_sources(list(judged), [clip for clip in clips if clip.kind == kind],
                                      self.sources, seed=self.seed)
        for clip in mine([clip for clip in chosen if (clip.audio, rate) not in self.real]):
            wav = torch.tensor(load_audio(clip.audio, rate, seconds=SECONDS, allow_silence=True))
            self.real[clip.audio, rate] = embed_clip(self.models["embedding"], wav, rate)
        self.real = gather_dict(self.real)
        return ({name: judged[name] for name in names},
                [self.real[clip.audio, rate] for clip in chosen])

