"""Listening tests as in CALM's appendix B: one page to send to listeners, and the score of what
they send back.

    python -m tools.listen make out/quickstart out/quickstart,stage=lm reference --out test.html
                           [--kind speech] [--task text|continue] [--samples 10] [--pairs 10]
                           [--ratings 10] [--seed 0]
    python -m tools.listen score answers/*.json [--json scores.json]

    systems ─► clips of each ─► test.html ─► answers_*.json ─► preferences ─► Elo, 95 % interval
               (tools/systems.py)  listeners                ─► ratings     ─► mean, 95 % interval

make: generates the same held-out samples with every system (tools/systems.py: a run folder with its
settings, or "reference", the recordings) and writes one HTML file that holds the audio (FLAC, 16
bit). It opens from the disk in any browser, with keyboard, mouse or touch, and asks each listener
  --pairs    which of two clips of one sample is better; ties are allowed
  --ratings  how good one clip is, from 1 (bad) to 5 (excellent)
Which samples a listener hears, their order and their sides follow from --seed and the listener's
name; systems take turns. A vote opens when 10 s of each clip, or nearly all of a shorter one, have
been played. At the end the page gives the answers as a JSON file.

score: Bayesian Elo from the preferences (tools/elo.py), mean opinion score from the ratings, with
95 % intervals: of Elo those of the posterior, of the mean a bootstrap over ratings (intervals.py),
which takes them as independent. Rank: by Elo, without the reference.

CALM has 50 listeners, 10 of 50 samples for each, clips of 30 s with the same first 3 s.
Exit status: 0 done, 2 your mistake (one line says which).
"""
import argparse
import base64
import hashlib
import json
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

import soundfile as sf
import torch

from audio import limit, refuse_poison
from cli import BadInput, Parser, check_writable, cli, number, threads, write_file
from data import KINDS
from intervals import bootstrap
from reconstruction import clip_name
from tools import systems
from tools.elo import elo

FORMAT = "nanocalm-listening-1"
LISTEN_SECONDS = 10                     # of each clip before a vote (appendix B)
# what is asked about a pair; continuations as in appendix B
PAIR_QUESTIONS = {
    ("continue", "speech"): "Which of these two clips feels more like meaningful and natural "
                            "speech?",
    ("continue", "sound"): "Which of these two sounds goes on more naturally?",
    ("continue", "music"): "Which music do you enjoy listening to more?",
    ("text", "speech"): "Which of these two clips speaks the text more naturally?",
    ("text", "sound"): "Which of these two clips fits the description better?",
    ("text", "music"): "Which of these two clips fits the description better?",
}
RATING_QUESTION = ("How would you rate the overall quality of this clip? Consider aspects such as "
                   "clarity, balance, richness, and naturalness.")


# ---------------------------------------------------------------------------- make


def make(a):
    """Write the page of a listening test."""
    compared = systems.parse_all(a.systems)
    if len(compared) < 2:
        raise BadInput("make: compares systems, give at least two; a run may stand twice with "
                       "other settings, and 'reference' stands for the recordings")
    check_writable(a.out)
    if a.threads:
        torch.set_num_threads(a.threads)

    # the same samples with every system
    contestants = systems.open_all(compared)
    clips = systems.choose_clips(contestants, a.kind, a.task, a.samples, a.manifest)
    audio = {}
    for contestant in contestants:
        wavs = systems.generate(contestant, clips, a.kind, a.task, a.seed)
        rate = contestant.cfg.vae.sample_rate
        audio[contestant.system.name] = [to_flac(wav, rate) for wav in wavs]

    study = describe(a, clips, audio)
    page = fill_template(study)
    write_file(a.out, page)
    print(f"{a.out}: {len(clips)} samples of {len(audio)} systems, {len(page) / 1e6:.1f} MB; each "
          f"listener is asked {study['pairs']} preferences and {study['ratings']} ratings")


def to_flac(wav, rate):
    """A waveform (ch, S) as a FLAC file of 16 bits, in base64."""
    refuse_poison(wav, rate, "a clip of the test")
    wav, _, _ = limit(wav.detach().float().cpu())
    file = BytesIO()
    sf.write(file, wav.numpy().T, rate, subtype="PCM_16", format="FLAC")
    return base64.b64encode(file.getvalue()).decode()


def describe(a, clips, audio):
    """What the page knows. audio: {system: [FLAC of each clip]}; a: the command line."""
    names = list(audio)
    samples = [{"id": clip_name(clip),
                "text": clip.text if a.task == "text" else "",
                "audio": [audio[name][i] for name in names]} for i, clip in enumerate(clips)]
    content = json.dumps([a.seed, names, samples])

    # at most every combination once
    pairs = len(names) * (len(names) - 1) // 2 * len(clips)
    same = "" if a.task == "text" else " The first seconds of both clips are the same."
    return {"format": FORMAT,
            "id": hashlib.sha256(content.encode()).hexdigest()[:10],
            "seed": a.seed,
            "title": a.title,
            "about": f"First {min(a.pairs, pairs)} times two clips, then "
                     f"{min(a.ratings, len(names) * len(clips))} times one clip.{same}",
            "pair_question": (a.question or PAIR_QUESTIONS[a.task, a.kind]) + same,
            "rating_question": RATING_QUESTION,
            "listen_seconds": LISTEN_SECONDS,
            "listen_text": f"Listen first: at least {LISTEN_SECONDS} seconds of each clip, shorter "
                           "ones to the end.",
            "pairs": min(a.pairs, pairs),
            "ratings": min(a.ratings, len(names) * len(clips)),
            "systems": names,
            "samples": samples}


def fill_template(study):
    """The page of a study: tools/listen.html with the study in it."""
    template = Path(__file__).with_name("listen.html").read_text(encoding="utf8")
    before, after = template.split(">STUDY<")
    # "</script>" in a text would end the element
    content = json.dumps(study).replace("</", "<\\/")
    return f"{before}>{content}<{after}"


# ---------------------------------------------------------------------------- score


def score(a):
    """Print, and write where asked, the scores of answer files."""
    if a.json:
        check_writable(a.json)
    answers = read_answers(a.answers)
    found = score_answers(answers)

    pairs = sum(len(answer["pairs"]) for answer in answers)
    ties = sum(pair["choice"] == "tie" for answer in answers for pair in answer["pairs"])
    ratings = sum(len(answer["ratings"]) for answer in answers)
    print(f"{len(answers)} listeners, {pairs} comparisons ({ties} ties), {ratings} ratings")
    print_scores(found)
    if a.json:
        write_file(a.json, json.dumps(found, indent=1, default=asdict))


def read_answers(paths):
    """The answer files of one test, each from another listener."""
    answers = []
    listeners = {}
    for path in paths:
        answer = read_answer(path)
        if answers and answer["study"] != answers[0]["study"]:
            raise BadInput(f"{path}: answers of another test ({answer['study']}) than {paths[0]} "
                           f"({answers[0]['study']}); score them apart")
        if answer["listener"] in listeners:
            raise BadInput(f"{path}: {answer['listener']} has answered already, in "
                           f"{listeners[answer['listener']]}; leave one of the files out")
        listeners[answer["listener"]] = path
        answers.append(answer)
    return answers


def read_answer(path):
    """One answer file, checked."""
    try:
        with open(path, encoding="utf8") as f:
            answer = json.load(f)
    except (OSError, UnicodeDecodeError, ValueError) as e:
        raise BadInput(f"{path}: cannot be read as JSON ({e})") from None
    if not isinstance(answer, dict) or answer.get("format") != FORMAT:
        raise BadInput(f"{path}: no answers of a listening test ({FORMAT})")

    try:
        names = answer["systems"]
        for pair in answer["pairs"]:
            sides = {pair["left"], pair["right"]}
            valid = len(sides) == 2 and sides <= set(names)
            if not valid or pair["choice"] not in ("left", "right", "tie"):
                raise BadInput(f"{path}: a comparison that cannot be: {json.dumps(pair)}")
        for rating in answer["ratings"]:
            if rating["system"] not in names or rating["score"] not in (1, 2, 3, 4, 5):
                raise BadInput(f"{path}: a rating that cannot be: {json.dumps(rating)}")
        return answer | {"listener": str(answer["listener"]), "study": str(answer["study"])}
    except (KeyError, TypeError) as e:
        raise BadInput(f"{path}: damaged: {e} is missing or of another type") from None


def count_wins(answers, names):
    """wins[a][b]: how often system a was preferred to b; a tie is half a win for either."""
    index = {name: i for i, name in enumerate(names)}
    wins = [[0.0] * len(names) for _ in names]
    for answer in answers:
        for pair in answer["pairs"]:
            left = index[pair["left"]]
            right = index[pair["right"]]
            share = {"left": 1.0, "right": 0.0, "tie": 0.5}[pair["choice"]]
            wins[left][right] += share
            wins[right][left] += 1 - share
    return wins


def score_answers(answers):
    """{system: {"elo": (value, low, high), "quality": Figure, "comparisons", "ratings", "rank"}}.

    quality is None without ratings; the reference has no rank.
    """
    names = answers[0]["systems"]
    wins = count_wins(answers, names)
    found = {}
    for i, (name, points) in enumerate(zip(names, elo(wins))):
        scores = [rating["score"] for answer in answers for rating in answer["ratings"]
                  if rating["system"] == name]
        found[name] = {"elo": points,
                       "quality": bootstrap([(n, 1) for n in scores]) if scores else None,
                       "comparisons": round(sum(wins[i]) + sum(row[i] for row in wins)),
                       "ratings": len(scores)}

    ranked = sorted((name for name in names if name != systems.REFERENCE.name),
                    key=lambda name: -found[name]["elo"][0])
    for name in names:
        found[name]["rank"] = ranked.index(name) + 1 if name in ranked else None
    return found


def print_scores(found):
    """One line per system."""
    width = max(map(len, found)) + 2
    print(f"{'':{width}s}{'quality':>9s}{'95 %':>14s}{'Elo':>8s}{'95 %':>14s}{'rank':>6s}"
          f"{'comparisons':>13s}{'ratings':>9s}")
    for name, row in found.items():
        quality = " " * 8 + "-" + " " * 14
        if row["quality"]:
            mean = row["quality"]
            interval = "-" if mean.low is None else f"{mean.low:.2f} .. {mean.high:.2f}"
            quality = f"{mean.value:9.2f}{interval:>14s}"
        points, low, high = row["elo"]
        print(f"{name:{width}s}{quality}{points:8.0f}{f'{low:.0f} .. {high:.0f}':>14s}"
              f"{row['rank'] or '-':>6}{row['comparisons']:13d}{row['ratings']:9d}")


# ---------------------------------------------------------------------------- command line


def parse():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True, metavar="make|score")

    s = commands.add_parser("make", help="write the page of a listening test")
    s.add_argument("systems", nargs="+", help="run folders with settings, e.g. "
                                              "out/quickstart,stage=lm,steps=20, or reference")
    s.add_argument("--out", required=True, help="the page, an .html file")
    s.add_argument("--kind", choices=KINDS, default="speech", help="default speech")
    s.add_argument("--task", choices=["text", "continue"], default="text",
                   help="speak texts (default), or continue the first seconds of clips")
    s.add_argument("--manifest", help="held-out clips; default: those of the first run")

    # how much of it
    s.add_argument("--samples", type=number(int, 1), default=10,
                   help="samples of each system (default 10)")
    s.add_argument("--pairs", type=number(int, 0), default=10,
                   help="preferences asked of a listener (default 10)")
    s.add_argument("--ratings", type=number(int, 0), default=10,
                   help="ratings asked of a listener (default 10)")
    s.add_argument("--seed", type=number(int, 0), default=0,
                   help="of the audio, the order and the sides (default 0)")

    # how the page looks
    s.add_argument("--question", help="asked about a pair; default: by --task and --kind")
    s.add_argument("--title", default="Listening test", help="title of the page")
    s.add_argument("--threads", type=threads, default=0, help="CPU threads; 0 = torch's choice")
    s.set_defaults(command=make)

    s = commands.add_parser("score", help="Elo and mean opinion scores of answers")
    s.add_argument("answers", nargs="+", help="JSON files from listeners of one test")
    s.add_argument("--json", help="write the scores here")
    s.set_defaults(command=score)
    return p.parse_args()


def main():
    a = parse()
    a.command(a)


if __name__ == "__main__":
    cli(main)
