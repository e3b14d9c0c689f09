"""Weights in and out: python -m tools.convert mimi|pocket-tts|qwen3|llama|export|gather IN --out DIR

    mimi    Kyutai's codec, one .safetensors file, named as in PyPI `moshi` or `pocket-tts`
            -> a run folder with config.toml and vae.pt for evaluate.py, sample.py and train.py
    pocket-tts    Kyutai's text to speech, flow LM and Mimi in one .safetensors file, named as in
            PyPI `pocket-tts` -> a run folder that speaks: vae.pt, lm.pt, config.toml and
            tokenizer.json (from the folder of the weights, or --tokenizer)
    qwen3, llama    a text model, as a folder with config.json, *.safetensors and tokenizer.json
            -> a run folder with config.toml (that of --config, with the text model's sizes and
            tokenizer) and text.pt: a CALM (or --stage audiocalm) whose backbone and text embedding
            are the text model's and whose other weights are random. Train it with
            python train.py --config RUN/config.toml
    export  a finished run -> a folder of .safetensors, config.toml and a model card, which takes a
            run's place in sample.py and evaluate.py (--dtype, --card, --licence, --stage)
    gather  a run that is still in training with train.shard -> a plain run to listen to

    published names ─► rename ─► reorder or fold, exactly ─► every name and shape checked ─► RUN

The converted model computes what the published one does, to rounding. What cannot be converted
exactly is refused, and so are quantised weights, tensors and keys that no rule knows. mimi.py,
pocket_tts.py and text_model.py of tools/convert list every change.

--data MANIFEST measures the mean and standard deviation of Mimi's latents on about 400 clips, which
a language model needs; without it they are 0 and 1.
Exit status: 0 done, 2 the user's mistake (one line says which).
"""
import argparse
import os

from cli import BadInput, Parser, cli
from config import LM_STAGES
from tools.convert import export, gather, mimi, pocket_tts, text_model

MODELS = {"mimi": mimi, "pocket-tts": pocket_tts, "qwen3": text_model, "llama": text_model,
          "export": export, "gather": gather}


def positive(text):
    """The argparse type of a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not possible, use a whole number of 1 or more")
    return int(text)


def options():
    parser = Parser(prog="python -m tools.convert", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS,
                        help="which published model")
    parser.add_argument("weights",
                        help="its .safetensors file, the folder of a text model, or a run")
    parser.add_argument("--out", required=True, help="the run folder to make")

    parser.add_argument("--heads", type=positive, default=8,
                        help="mimi, pocket-tts: attention heads of Mimi (default 8)")
    parser.add_argument("--context", type=positive, default=250,
                        help="mimi, pocket-tts: positions that a transformer layer of Mimi sees "
                        "(default 250)")
    parser.add_argument("--sample-rate", type=positive, default=24000,
                        help="mimi, pocket-tts: Hz (default 24000)")
    parser.add_argument("--data",
                        help="mimi: manifest or folder of audio to measure the latents on")

    parser.add_argument("--stage", default="", choices=LM_STAGES,
                        help="qwen3, llama: the model that gets the backbone, lm (default) or "
                        "audiocalm; export: the one that travels (default: the last trained)")
    parser.add_argument("--config", help="qwen3, llama: the experiment that gets this backbone "
                        "(default: the defaults of config.py)")
    parser.add_argument("--tokenizer", help="pocket-tts: its tokenizer.json "
                        "(default: the one in the folder of the weights)")
    parser.add_argument("--eos-threshold", type=float, default=-4.0,
                        help="pocket-tts: the logit above which a clip ends (default -4)")
    parser.add_argument("--dtype", choices=export.DTYPES, default="bf16",
                        help="export: of the matrices (default bf16)")
    parser.add_argument("--card", metavar="FILE",
                        help="export: lines for the model card: where the data is from, figures")
    parser.add_argument("--licence", default="unknown",
                        help="export: of the weights, as the Hugging Face hub writes it (cc0-1.0, "
                        "cc-by-4.0, ...; default unknown)")
    return parser


def main():
    args = options().parse_args()
    if not os.path.exists(args.weights):
        raise BadInput(f"{args.weights}: no such file")
    if os.path.isfile(args.out):
        raise BadInput(f"--out {args.out}: is a file; name a folder for the run")
    if args.model in ("qwen3", "llama"):
        args.stage = args.stage or "lm"
        if args.stage not in ("lm", "audiocalm"):
            raise BadInput(f"--stage {args.stage}: a text model becomes lm or audiocalm")

    # what is there already stays
    file = {"qwen3": "text.pt", "llama": "text.pt", "export": "vae.safetensors"}
    file = f"{args.out}/{file.get(args.model, 'vae.pt')}"
    if os.path.exists(file):
        raise BadInput(f"{file} exists; choose another --out")

    MODELS[args.model].run(args)


if __name__ == "__main__":
    cli(main)
