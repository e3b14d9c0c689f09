"""How long the parts take, as ratios measured within one process.

    python -m tools.bench vae         encoding, decoding and a training step of the VAE
    python -m tools.bench heads       one latent of CALM and of the RQ-Transformer, paper sizes
    python -m tools.bench sample      text and voice prompt to audio, end to end
    python -m tools.bench audiocalm   latents: CALM one by one, AudioCALM block by block
    python -m tools.bench train       one training step: time, FLOPs, utilisation, memory

    contestants {name: function} ─► in turn, repeat by repeat ─► medians and ratios ─► table, json

`python -m tools.bench heads -h` explains one measurement and lists its options. Contestants take
turns within each repeat, so that a noisy machine slows all of them. Times are medians over the
repeats; a ratio is the median of the ratios of the single repeats. Weights are random.

Precision: fp32 on a CPU; bf16 autocast on CUDA, except `sample`, which is fp32 on both.
Exit status: 0 done, 2 the user's mistake (one line says which).
"""
import argparse

import torch

from cli import BadInput, Parser, check_writable, cli, number, threads
from tools.bench import audiocalm, feed, heads, sample, training, vae
from tools.bench.timing import write_json

COMMANDS = {"vae": vae, "heads": heads, "sample": sample, "audiocalm": audiocalm,
            "train": training, "feed": feed}


def options():
    """The command line: each sub-command has its module's options and the four common ones."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m tools.bench", description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                     help=f"one of {', '.join(COMMANDS)}")

    for name, module in COMMANDS.items():
        command = commands.add_parser(name, description=module.__doc__, formatter_class=layout,
                                      help=module.__doc__.splitlines()[0])
        module.add_options(command)

        command.add_argument("--repeats", type=number(int, 1), default=7,
                             help="measured repeats after one that is not (default 7)")
        command.add_argument("--threads", type=threads, default=0,
                             help="CPU threads per operation; 0 = torch's choice (default)")
        command.add_argument("--device", choices=["cpu", "cuda"],
                             default="cuda" if torch.cuda.is_available() else "cpu",
                             help="default: cuda where there is one")
        command.add_argument("--json", metavar="FILE", help="also write the figures here")

    return parser


def main():
    args = options().parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this machine has none; use --device cpu")
    if args.json:
        check_writable(args.json)

    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    figures = COMMANDS[args.command].run(args)

    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    cli(main)
