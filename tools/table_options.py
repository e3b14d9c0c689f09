"""The command line of the papers' tables, for tools/studies.py: options that they share as parent
parsers, and one command a table.
"""
from cli import Parser, number, threads
from data import KINDS
from tools import ablation_tables, tables


# ---------------------------------------------------------------------------- shared options


def samples_argument(samples):
    """A parent parser: how many clips are generated."""
    p = Parser(add_help=False)
    p.add_argument("--samples", type=number(int, 2), default=samples,
                   help=f"generations per row or kind (default {samples})")
    return p


def reference_arguments():
    """A parent parser: what generations are compared with."""
    p = Parser(add_help=False)
    p.add_argument("--reference", help="manifest of real clips to compare with; train: those of "
                                       "training; default: the held-out clips that are left")
    p.add_argument("--reference-limit", type=number(int, 4), default=1000,
                   help="of --reference at most so many clips per kind (default 1000)")
    p.add_argument("--embedding", default="mel",
                   help="of FAD and MMD²: mel (default), birdnet or a model of transformers")
    p.add_argument("--fad-dims", type=number(int, 0), default=8,
                   help="principal axes that FAD is taken on (default 8; 0 = all)")
    return p


def seed_argument():
    """A parent parser: which draw of generations."""
    p = Parser(add_help=False)
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the generations (default 0)")
    return p


def table_arguments(kind="music", manifest=True):
    """A parent parser: what all tables share. kind: by default; "" = the table has all kinds.
    manifest: whether clips are judged.
    """
    p = Parser(add_help=False)
    if manifest:
        p.add_argument("--manifest", help="held-out clips; default: those of the first run")
    if kind:
        p.add_argument("--kind", choices=KINDS, default=kind, help=f"default {kind}")
    p.add_argument("--json", help="write the figures here")
    p.add_argument("--threads", type=threads, default=0, help="CPU threads; 0 = torch's choice")
    return p


def run_options(*roles):
    """A parent parser: the runs that stand for the rows of a table."""
    p = Parser(add_help=False)
    help_of = {"calm": "a run of CALM", "flow": "a run of TrigFlow; default: stage lm of --calm",
               "rq": "a run of the RQ-Transformer", "rq16": "one with half of the levels",
               "delay": "a run of the delay pattern (lm.head.objective delay)"}
    for role in ("calm", "flow", "rq", "rq16", "delay"):
        if role in roles:
            p.add_argument(f"--{role}", metavar="RUN", help=help_of[role])
        else:
            p.set_defaults(**{role: None})
    return p


def task_argument(task="continue"):
    """A parent parser: what is generated for a table. task: by default."""
    p = Parser(add_help=False)
    p.add_argument("--task", choices=["continue", "text"], default=task,
                   help=f"continue clips, or speak their texts (default {task})")
    return p


def timing_arguments():
    """A parent parser: how generations are timed."""
    p = Parser(add_help=False)
    p.add_argument("--seconds", type=number(float, above=0), default=30.0,
                   help="audio that is generated to measure the time (default 30)")
    p.add_argument("--repeats", type=number(int, 1), default=3,
                   help="repeats of that (default 3)")
    return p


def steps_of(text):
    """The argparse type of table6's --steps: "1,4,10" -> [1, 4, 10]."""
    return [number(int, 1)(value) for value in text.split(",")]


def temperatures_of(text):
    """The argparse type of fig3's --temperatures."""
    return [number(float, 0)(value) for value in text.split(",")]


# ---------------------------------------------------------------------------- commands


def add_tables(studies):
    """The commands of tables.py."""
    def compared(kind="music"):
        return [table_arguments(kind), samples_argument(40), reference_arguments()]

    def generated(kind="music", task="continue"):
        return [*compared(kind), seed_argument(), task_argument(task)]

    def add(name, table, help_text, parents):
        s = studies.add_parser(name, help=help_text, parents=parents)
        s.set_defaults(run_command=tables.run_table, table=table, answers=[], whisper="",
                       text_model="", picture=None, threads=0)
        return s

    s = add("table2", tables.table2, "CALM Table 2: speech, RQ-Transformer and consistency",
            [*generated("speech"), timing_arguments(), run_options("calm", "rq")])
    s.add_argument("--whisper", default="", help="faster-whisper model, for VERT, PPX and WER")
    s.add_argument("--text-model", default="", help="causal model of transformers, for PPX")
    s.add_argument("--answers", nargs="+", default=[], help="of a listening test (tools/listen.py)")

    s = add("table3", tables.table3, "CALM Table 3: VAEs and codecs", compared())
    s.add_argument("runs", nargs="+", help="run folders with a vae.pt")
    s.add_argument("--visqol", action="store_true", help="ViSQOL, audio mode (extra eval)")

    s = add("table4", tables.table4, "CALM Table 4: music, six models",
            [*generated(), timing_arguments(),
             run_options("calm", "flow", "rq", "rq16", "delay")])
    s.add_argument("--answers", nargs="+", default=[], help="of a listening test (tools/listen.py)")

    s = add("table6", tables.table6, "CALM Table 6: steps of the head",
            [*generated(), timing_arguments(), run_options("calm", "flow")])
    s.add_argument("--steps", type=steps_of, default=[1, 4, 10, 25, 50, 100],
                   help="separated by commas (default 1,4,10,25,50,100)")
    s.add_argument("--picture", help="draw the distances into this file (png)")

    s = add("table8", tables.table8, "CALM Table 8: sizes of the backbones", [])
    s.add_argument("--json", help="write the figures here")

    s = add("fig3", tables.fig3, "CALM Fig. 3: similarity over the temperature",
            [table_arguments("speech"), samples_argument(100), seed_argument(),
             run_options("calm", "rq")])
    s.add_argument("--seconds", type=number(float, above=0), default=10.0,
                   help="longest generation and recording (default 10)")
    s.add_argument("--temperatures", type=temperatures_of, default=[0.2, 0.4, 0.6, 0.8, 1.0],
                   help="separated by commas (default 0.2,0.4,0.6,0.8,1)")
    s.add_argument("--speaker", default="mel", help="mel (default), resemblyzer, or a speaker "
                                                    "model of transformers or speechbrain")
    s.add_argument("--picture", help="draw the curves into this file (png)")

    s = add("audiocalm", tables.audiocalm, "AudioCALM's table: three kinds",
            [*generated("", "text"), run_options("calm")])
    s.add_argument("--whisper", default="", help="faster-whisper model, for WER")


def add_ablations(studies):
    """The commands of ablation_tables.py."""
    for name, table, help_text in (
            ("table5", ablation_tables.table5, "CALM Table 5: ablation"),
            ("table7", ablation_tables.table7, "CALM Table 7: length of the short context"),
            ("fig2", ablation_tables.fig2, "CALM Fig. 2: head batch multiplier")):
        s = studies.add_parser(name, help=help_text,
                               parents=[table_arguments(manifest=name != "fig2")])
        s.add_argument("--family", default="consistency",
                       help="of configs/ablation.toml (default consistency)")
        s.add_argument("--seeds", default="0,1,2", help="separated by commas (default 0,1,2)")
        s.add_argument("--out", default="out/ablation",
                       help="parent of the run folders (default out/ablation)")
        s.add_argument("--vae", help="a run with the VAE that all rows use")
        s.add_argument("--train", default="", help="options of train.py for all rows, in quotes")
        s.set_defaults(run_command=tables.run_table, table=table, study="", manifest=None)
        if name != "fig2":
            s.add_argument("--study", default="", help="how rows are judged, in quotes; default: "
                                                       "the family's, e.g. \"distance --limit 40\"")
        else:
            s.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 4, 8],
                           choices=[1, 2, 4, 8], help="those to compare (default 1 2 4 8)")
            s.add_argument("--picture", help="draw the curves into this file (png)")
