"""Seeded faults for files that are read: checkpoints, latents, configs, logs, manifests.

    seed ─► mutate_bytes ──────► damaged file     one of BYTES: what disks, copies and kills do
    seed ─► mutate_checkpoint ─► hostile state    one of STATES: a whole archive with bad contents
    seed ─► mutate_config ─────► TOML text        a value that nobody can mean, at a random key

    outcome(read, same) ─► "refused"   BadInput of one line, at most MESSAGE characters
                           "harmless"  read, and the values equal those before
                           "silent"    read, and they differ: a fault of ours
                           "crash"     any other exception: a fault of ours

Used by tests/plumbing/test_faults.py (some dozens of seeds) and by the campaign of this folder.
"""
import dataclasses
import io
import random
import traceback
import zipfile

import torch

from cli import BadInput

MESSAGE = 600


def outcome(read, same):
    """What became of one fault -> (name of the outcome, what to print of it).

    read(): opens the damaged file as the program does -> its value. same(value): whether it equals
    the whole file's.
    """
    try:
        value = read()
    except BadInput as e:
        text = str(e)
        short = "\n" not in text and len(text) <= MESSAGE
        return ("refused" if short else "crash"), text[:2 * MESSAGE]
    except Exception:
        return "crash", traceback.format_exc(limit=-4)
    return ("harmless" if same(value) else "silent"), ""


# ---------------------------------------------------------------- bytes

def flip_a_bit(data, r):
    at = r.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1:]


def overwrite_a_block(data, r):
    at = r.randrange(len(data))
    n = min(r.choice([4, 64, 512, 4096]), len(data) - at)
    return data[:at] + r.randbytes(n) + data[at + n:]


def zero_a_block(data, r):
    at = r.randrange(len(data))
    n = min(r.choice([64, 512, 4096]), len(data) - at)
    return data[:at] + bytes(n) + data[at + n:]


def cut_the_tail(data, r):
    return data[:r.randrange(len(data))]


def zero_the_tail(data, r):
    at = r.randrange(len(data))
    return data[:at] + bytes(len(data) - at)


def append_garbage(data, r):
    return data + r.randbytes(r.choice([1, 100, 70_000]))


def damage_the_end(data, r):
    """One bit of the last 4 kB, where a zip archive has its directory."""
    at = len(data) - 1 - r.randrange(min(4096, len(data)))
    return data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1:]


def swap_blocks(data, r):
    n = min(512, len(data) // 2)
    one, other = sorted(r.sample(range(len(data) // n), 2)) if len(data) >= 2 * n > 0 else (0, 0)
    a, b = one * n, other * n
    return data[:a] + data[b:b + n] + data[a + n:b] + data[a:a + n] + data[b + n:]


BYTES = [flip_a_bit, overwrite_a_block, zero_a_block, cut_the_tail, zero_the_tail, append_garbage,
         damage_the_end, swap_blocks]


def mutate_bytes(data, seed):
    """A file's bytes with one fault -> (name of the fault, the bytes)."""
    r = random.Random(seed)
    fault = BYTES[seed % len(BYTES)]
    return fault.__name__, fault(data, r)


# ---------------------------------------------------------------- checkpoints, whole but hostile

def some_weight(state, r):
    """The table and name of a random weight that the program would use."""
    table = state["ema"] or state["model"]
    return table, r.choice([k for k, v in table.items() if v.is_floating_point() and v.numel()])


def nan_in_a_weight(state, r):
    table, name = some_weight(state, r)
    table[name] = table[name].clone()
    table[name].view(-1)[r.randrange(table[name].numel())] = r.choice([float("nan"), float("inf")])


def complex_weight(state, r):
    table, name = some_weight(state, r)
    table[name] = table[name].to(torch.complex64)


def whole_numbers_for_a_weight(state, r):
    table, name = some_weight(state, r)
    table[name] = table[name].to(r.choice([torch.int64, torch.uint8, torch.bool]))


def missing_weight(state, r):
    table, name = some_weight(state, r)
    del table[name]


def weight_of_another_shape(state, r):
    table, name = some_weight(state, r)
    table[name] = torch.cat([table[name].flatten(), torch.zeros(1)])


def one_number_as_a_terabyte(state, r):
    table, name = some_weight(state, r)
    table[name] = torch.zeros(1).expand(10 ** 6, 10 ** 6)


def text_for_a_weight(state, r):
    table, name = some_weight(state, r)
    table[name] = "a weight"


def missing_key(state, r):
    del state[r.choice(["stage", "step", "done", "config", "model", "ema", "optimizers"])]


def other_type_for_a_key(state, r):
    key = r.choice(["stage", "step", "done", "config", "model", "optimizers", "seen", "clips"])
    state[key] = r.choice([None, 1.5, ["a"], {1: 2}] if key not in ("config", "optimizers", "seen")
                          else [None, 1.5, ["a"]])


def other_stage(state, r):
    state["stage"] = r.choice(["audiocalm", "nothing", "x" * 10 ** 5])


def enormous_size(state, r):
    """A model that would need years or terabytes to build."""
    table, key = r.choice({
        "vae": [("vae", "dim"), ("vae", "encoder_layers"), ("vae", "latent_dim"), ("vae", "width"),
                ("vae", "res_layers"), ("vae", "stft_size"), ("vae", "decoder_layers")],
        "lm": [("lm.backbone", "layers"), ("lm.backbone", "dim"), ("lm.head", "blocks"),
               ("lm.head", "width"), ("lm", "short_layers"), ("vae", "latent_dim"),
               ("lm.backbone", "mlp_dim")]}[state["stage"]])
    value = r.choice([100, 4096, 10 ** 4, 10 ** 7, 2 ** 62, 10 ** 400])
    at = state["config"]
    for name in table.split("."):
        at = at[name]
    at[key] = value


def tokenizer_of_the_hub(state, r):
    state["config"]["data"]["tokenizer"] = "nobody/" + "".join(r.choices("abcdef", k=20))


def hostile_value_in_the_config(state, r):
    at = state["config"]
    name = r.choice(sorted(at))
    while isinstance(at[name], dict) and at[name]:
        at = at[name]
        name = r.choice(sorted(at))
    at[name] = r.choice([10 ** 5000, float("nan"), nested(100), "\0", "\ud800", b"bytes",
                         torch.zeros(3), None])


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


STATES = [nan_in_a_weight, complex_weight, whole_numbers_for_a_weight, missing_weight,
          weight_of_another_shape, one_number_as_a_terabyte, text_for_a_weight, missing_key,
          other_type_for_a_key, other_stage, enormous_size, tokenizer_of_the_hub,
          hostile_value_in_the_config]


def mutate_checkpoint(path, seed):
    """A checkpoint with hostile contents in a whole archive -> (name of the fault, its bytes).

    Every eighth has two records of equal size swapped, with their checksums.
    """
    r = random.Random(seed)
    if seed % 8 == 7:
        with open(path, "rb") as f:
            return "swapped_records", swap_records(f.read(), r)
    fault = STATES[(seed - seed // 8) % len(STATES)]
    state = torch.load(path, weights_only=True)
    state.pop("checksum", None)                  # who changes the contents can also leave it out
    fault(state, r)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return fault.__name__, buffer.getvalue()


def swap_records(data, r):
    """The archive with the contents of two records of the same size swapped, written anew."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    pairs = [(a, b) for a in records for b in records
             if a < b and len(records[a]) == len(records[b]) and records[a] != records[b]
             and "/data/" in a and "/data/" in b]
    a, b = r.choice(pairs)
    records[a], records[b] = records[b], records[a]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def same_state(one, other):
    """Whether two checkpoints hold equal values, tensors bitwise."""
    if torch.is_tensor(one) and torch.is_tensor(other):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_state(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same_state, one, other))
    return type(one) is type(other) and one == other


# ---------------------------------------------------------------- configs, logs, manifests

VALUES = ["inf", "-inf", "nan", "1e400", "-1", "0", "1", "true", "1e300", "1e-300", "9" * 5000,
          "9" * 400, "1000000000", "9223372036854775807", "9223372036854775808", "-0.0", "0.1",
          "[" * 5000 + "]" * 5000, "[1, 2]", "[[1]]", "{a = 1}", '""', '"\\u0000"', '"\\u007f"',
          '"a\\nb"', '"ü \\U0001F600"', '"x"', "1979-05-27", "3", "0x7f", '["speech"]', "[]", "{}"]


def leaves(table, prefix=""):
    """The dotted names of a nested table's values."""
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def mutate_config(cfg, seed):
    """A config file in which one key, or another name, has a hostile value -> TOML text."""
    r = random.Random(seed)
    key = r.choice(sorted(leaves(dataclasses.asdict(cfg))))
    key = r.choice([key] * 9 + [key + "x"])
    return f"{key} = {r.choice(VALUES)}\n"


def mutate_manifest(seed):
    """A line of a manifest whose fields are hostile."""
    r = random.Random(seed)
    value = r.choice(["NaN", "Infinity", "-1", "1e999", '"\\ud800"', "[]", "{}", "true", "9" * 5000,
                      "[" * 5000, '[["a", NaN, 1]]', '[["a", 0, Infinity]]', '[["\\udfff", 0, 1]]',
                      '[["a", 2, 3], ["b", 1, 2]]', '"\\u0000"', "1e300", '[["a", 0, 1, 2]]'])
    key = r.choice(["duration", "words", "text", "transcript", "kind", "speaker", "id", "audio"])
    return f'{{"audio": "a.wav", "{key}": {value}}}'


def mutate_log(lines, seed):
    """A log.jsonl (bytes) with one fault: half a line, zeros, another encoding, a list."""
    r = random.Random(seed)
    line = r.choice([b"[1, 2]", b'{"stage": "vae"}', b"\xff\xfe", b"\0\0\0\0", b"null", b'"a"',
                     b'{"stage": "vae", "step": 1, "loss": "x"}', b"[" * 5000, b"9" * 5000,
                     b'{"stage": "vae", "step": 1e400}', b'{"stage": 1, "step": 1}'])
    rows = lines.split(b"\n")
    rows.insert(r.randrange(len(rows)), line)
    data = b"\n".join(rows)
    return r.choice([data, data, lines[:r.randrange(len(lines))], lines + bytes(r.randrange(999))])
