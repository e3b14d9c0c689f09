"""Strict dataclasses: which values a field may have stands beside its type, and is checked here.

    layers: Annotated[int, Range(1)] = 4                  at least 1
    noise: Annotated[float, Range(0, 1)] = 1.0            0 .. 1
    lr: Annotated[float, Range(above=0)] = 1e-3           above 0
    ema: Annotated[float, Range(0, below=1)] = 0.0        0 .. below 1
    encoder: Literal["conv", "stft"] = "conv"             one of these

    {"lr": -1} ─► build(StageConfig, table, "train.lm") ─► "train.lm.lr: must be above 0, got -1.0"

A rule between two fields stands in the dataclass's __post_init__, as a ValueError. Every file with
a config imports this one: it imports none of ours but cli.py.
"""
import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from cli import BadInput

# what a clip of audio is: every corpus, batch and model uses these names, in this order
Kind = Literal["speech", "sound", "music"]
# the largest whole number of a TOML file
MOST = 2 ** 63 - 1


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included, above `above` and below `below`."""
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value):
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self):
        """What a value must do, e.g. "be at least 1"."""
        parts = []
        if self.low > -math.inf and self.high < math.inf:
            return f"lie in {self.low} .. {self.high}"
        if self.low > -math.inf:
            parts.append(f"at least {self.low}")
        if self.above > -math.inf:
            parts.append(f"above {self.above}")
        if self.high < math.inf:
            parts.append(f"at most {self.high}")
        if self.below < math.inf:
            parts.append(f"below {self.below}")
        return "be " + " and ".join(parts)


def shown(value):
    """A value in at most 60 characters for a message: it may be a page long, or nested in itself.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):                    # 5,000 digits, brackets in brackets
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def check(value, annotation, key):
    """`value` as the type that the annotation names, or BadInput naming the key."""
    origin = get_origin(annotation)
    args = get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return build(annotation, value, key)

    if origin is Annotated:
        value = check(value, args[0], key)
        if value not in args[1]:
            raise BadInput(f"{key}: must {args[1]}, got {shown(value)}")
        return value

    if origin is Literal:
        if type(value) is not str or value not in args:
            raise BadInput(f"{key}: unknown {shown(value)}; valid: {', '.join(args)}")
        return value

    if origin is list and isinstance(value, list):
        return [check(v, args[0], key) for v in value]
    if origin is dict and isinstance(value, dict):
        return {check(k, args[0], key): check(v, args[1], f"{key}.{k}") for k, v in value.items()}

    if annotation is float and type(value) is int:
        check_value(value, key)
        value = float(value)
    if type(value) is not annotation:
        expected = getattr(annotation, "__name__", annotation)
        raise BadInput(f"{key}: expected {expected}, got {shown(value)}")
    check_value(value, key)
    return value


def check_value(value, key):
    """BadInput where a value of the right type cannot be meant, or not be written as TOML."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{key}: must be a finite number, got {value}")
    if isinstance(value, int) and abs(value) > MOST:
        raise BadInput(f"{key}: must lie in {-MOST} .. {MOST}, got {shown(value)}")
    if isinstance(value, str):
        for character in value:
            if character == "\0" or "\ud800" <= character <= "\udfff":
                raise BadInput(f"{key}: holds {ascii(character)} in {ascii(value)[:60]}, which no "
                               "config file can; give a name in UTF-8")


def build(cls, table, key=""):
    """A dataclass from a (nested) dict; strict. BadInput names the key."""
    if not isinstance(table, dict):
        raise BadInput(f"{key}: expected a table, got {shown(table)}")
    prefix = key + "." if key else ""
    annotations = get_type_hints(cls, include_extras=True)
    for name in table:
        if name not in annotations:
            name = name if isinstance(name, str) and len(name) <= 60 else shown(name)
            raise BadInput(f"{prefix}{name}: unknown key; valid: {', '.join(sorted(annotations))}")

    values = {name: check(value, annotations[name], prefix + name) for name, value in table.items()}
    try:
        return cls(**values)
    except ValueError as e:
        text = str(e)
        raise BadInput(f"{prefix}{text if len(text) <= 300 else text[:297] + '...'}") from None
