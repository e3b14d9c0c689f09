"""The tables of both papers as they are printed, to be shown beside one's own.

    TABLES["table4"] ─► title, columns {name: heading}, rows: label, run, its settings, figures

A row's role names the run that stands for it (an option of tools/studies.py); "" = no run of ours.
The paper's ± is half a 95 % interval. CALM: arXiv 2509.06926; AudioCALM: arXiv 2606.23080.
"""
from dataclasses import dataclass, field


@dataclass
class Row:
    """One line of a table: label, role, settings of the sampler, and the printed figures."""
    label: str
    role: str = ""
    options: dict = field(default_factory=dict)
    paper: dict = field(default_factory=dict)


@dataclass
class Table:
    """A table of a paper. columns: {name: heading}, the paper's and those that only we have."""
    title: str
    columns: dict
    rows: list


SPEED = {"overall": "overall", "sampler": "sampler", "share": "in sampler"}
HEARD = {"quality": "quality", "elo": "Elo", "rank": "rank"}
OURS = {"fad": "FAD", "mmd": "MMD²", "facts": "facts right"}
RQ = {"overall": "x1.0", "sampler": "x1.0"}


def speed(overall, sampler, share):
    return {"overall": overall, "sampler": sampler, "share": share}


def heard(quality, elo, rank="-"):
    return {"quality": quality, "elo": elo, "rank": rank}


TABLES = {
    "table2": Table(
        "CALM Table 2: speech continuation, RQ-Transformer and one-step consistency",
        SPEED | {"ppx": "PPX", "vert": "VERT"} | HEARD | OURS | {"wer": "WER"},
        [Row("Reference", "reference", {},
             {"ppx": "20.2 ± 0.1", "vert": "25.2 ± 0.1"} | heard("4.02 ± 0.11", "2180 ± 30")),
         Row("RQ-Transformer 8 RVQ, T 1.0", "rq", {"temperature": 1.0},
             RQ | {"share": "26.7 %", "ppx": "52.4 ± 0.2", "vert": "36.3 ± 0.2"}
             | heard("2.42 ± 0.12", "1841 ± 25", "4")),
         Row("RQ-Transformer 8 RVQ, T 0.8", "rq", {"temperature": 0.8},
             RQ | {"share": "26.7 %", "ppx": "26.8 ± 0.1", "vert": "33.1 ± 0.1"}
             | heard("2.75 ± 0.14", "1870 ± 30", "3")),
         Row("Consistency, 1 step, T 1.0", "calm", {"temperature": 1.0, "steps": 1},
             speed("x1.3", "x12.3", "2.9 %") | {"ppx": "42.9 ± 0.2", "vert": "34.3 ± 0.2"}
             | heard("2.82 ± 0.13", "1947 ± 28", "2")),
         Row("Consistency, 1 step, T 0.8", "calm", {"temperature": 0.8, "steps": 1},
             speed("x1.3", "x12.3", "2.9 %") | {"ppx": "23.8 ± 0.1", "vert": "31.2 ± 0.1"}
             | heard("3.45 ± 0.14", "2023 ± 27", "1"))]),

    "table3": Table(
        "CALM Table 3: music compression",
        {"size": "dims / RVQ", "frame_rate": "frames / s", "bitrate": "kbit / s",
         "visqol": "ViSQOL", "si_sdr": "SI-SNR, dB", "log_mel": "log-mel", "fad": "FAD",
         "mmd": "MMD²"},
        [Row("EnCodec", paper={"size": "4 RVQ", "frame_rate": "50", "bitrate": "2.2",
                               "visqol": "2.41", "si_sdr": "5.62"}),
         Row("VQ-VAE (Mimi)", paper={"size": "32 RVQ", "frame_rate": "25", "bitrate": "8.8",
                                     "visqol": "3.63", "si_sdr": "9.61"}),
         *[Row(f"VAE {dims}", paper={"size": f"{dims} dims", "frame_rate": "25",
                                     "visqol": visqol, "si_sdr": si_sdr})
           for dims, visqol, si_sdr in ((32, "2.23", "5.51"), (96, "3.65", "9.76"),
                                        (128, "4.01", "10.3"))]]),

    "table4": Table(
        "CALM Table 4: music continuation, 30 s",
        SPEED | {"fad": "FAD", "mmd": "MMD²", "facts": "facts right"} | HEARD,
        [Row("Reference", "reference", {}, heard("3.84 ± 0.08", "2166 ± 33")),
         Row("RQ-Transformer 32 RVQ", "rq", {},
             RQ | {"share": "57.7 %", "fad": "1.06 ± 0.06"}
             | heard("2.85 ± 0.07", "1824 ± 29", "4")),
         Row("RQ-Transformer 16 RVQ", "rq16", {},
             speed("x1.5", "x2.2", "38.0 %") | {"fad": "1.43 ± 0.07"}
             | heard("2.76 ± 0.07", "1781 ± 29", "5")),
         Row("Consistency, 1 step", "calm", {"steps": 1},
             speed("x2.2", "x19.3", "6.6 %") | {"fad": "0.83 ± 0.04"}
             | heard("2.90 ± 0.07", "1857 ± 28", "2")),
         Row("Consistency, 4 steps", "calm", {"steps": 4},
             speed("x1.9", "x5.4", "20.1 %") | {"fad": "0.71 ± 0.05"}
             | heard("3.07 ± 0.07", "1847 ± 24", "3")),
         Row("TrigFlow, 100 steps", "flow", {"steps": 100},
             speed("x0.3", "x0.2", "86.6 %") | {"fad": "0.64 ± 0.04"}
             | heard("3.12 ± 0.07", "1921 ± 29", "1")),
         Row("MusicGen (delay pattern)", "delay", {},
             {"overall": "x1.3", "share": "0.0 %", "fad": "1.72 ± 0.12"}
             | heard("2.62 ± 0.07", "1761 ± 33", "6"))]),

    "table5": Table(
        "CALM Table 5: ablation, consistency, 4 steps",
        {},
        [Row("full", paper={"fad": "0.93 ± 0.06"}),
         Row("no_multiplier", paper={"fad": "1.32 ± 0.09"}),
         Row("no_noise", paper={"fad": "1.63 ± 0.11"}),
         Row("no_short", paper={"fad": "4.03 ± 0.16"}),
         Row("none", paper={"fad": "8.38 ± 0.17"})]),

    "table6": Table(
        "CALM Table 6: steps of the head, 30 s of audio (time and factor: consistency)",
        {"seconds": "seconds", "rtf": "x real time", "flow_fad": "FAD TrigFlow",
         "calm_fad": "FAD consistency", "flow_mmd": "MMD² TrigFlow", "calm_mmd": "MMD² consist.",
         "flow_facts": "facts TrigFlow", "calm_facts": "facts consist."},
        [Row(str(steps), "", {"steps": steps},
             {"seconds": seconds, "rtf": rtf, "flow_fad": flow, "calm_fad": consistency})
         for steps, seconds, rtf, flow, consistency in (
             (1, "16.7", "1.80", "-", "0.83 ± 0.04"),
             (4, "20.4", "1.47", "28.83 ± 0.20", "0.71 ± 0.05"),
             (10, "27.7", "1.08", "4.62 ± 0.07", "0.73 ± 0.05"),
             (25, "46.1", "0.65", "0.79 ± 0.04", "0.96 ± 0.06"),
             (50, "76.8", "0.39", "0.74 ± 0.05", "1.46 ± 0.06"),
             (100, "136.4", "0.22", "0.64 ± 0.04", "2.05 ± 0.07"))]),

    "table7": Table(
        "CALM Table 7: latents in the short context",
        {},
        [Row("k5", paper={"fad": "0.85 ± 0.05"}),
         Row("full", paper={"fad": "0.76 ± 0.04"}),
         Row("k20", paper={"fad": "0.73 ± 0.04"}),
         Row("k40", paper={"fad": "0.78 ± 0.04"})]),

    "table8": Table(
        "CALM Table 8: size of the backbone",
        {"backbone": "backbone", "parameters": "all", "fad": "FAD"},
        [Row("calm_3b", "", {}, {"backbone": "3B", "fad": "0.62 ± 0.05"}),
         Row("rq_3b", "", {}, {"backbone": "3B", "fad": "0.98 ± 0.06"}),
         Row("calm_music", "", {}, {"backbone": "1.3B", "fad": "0.71 ± 0.05"}),
         Row("rq_music", "", {}, {"backbone": "1.3B", "fad": "1.06 ± 0.06"})]),

    "audiocalm": Table(
        "AudioCALM: one model, three kinds (speech: WER and SIM on two benchmarks)",
        {"wer": "WER", "sim": "SIM", "fad": "FAD", "clap": "CLAP", "mmd": "MMD²",
         "facts": "facts right"},
        [Row("speech", "calm", {}, {"wer": "0.020 / 0.011", "sim": "0.668 / 0.672"}),
         Row("sound", "calm", {}, {"fad": "1.95", "clap": "0.37"}),
         Row("music", "calm", {}, {"fad": "2.02", "clap": "0.36"})]),
}
