"""ABX: do latents tell words (or phones) apart? (Schatz et al. 2013; CALM Table 1)

    A  "bat", speaker s     ─► latents (T_a, D) ─┐
    X  "bat", another token ─► latents (T_x, D) ─┼─► wrong where d(A, X) > d(B, X), half where equal
    B  "bit", speaker s     ─► latents (T_b, D) ─┘

    d(A, X) = mean over the path of dynamic time warping of the angle between latents, arccos / π
    error within speakers = mean over (word pair, speaker) of the share of wrong triples
    error across speakers: X is of another speaker, cells are (word pair, speaker, speaker of X)

Chance is 0.5, lower is better. The path minimises the sum of angles and steps to the next frame of
A, of X or of both (Dunbar et al. 2017, Zero Resource Speech Challenge). Items are the labels of the
manifest's `words` ([[label, start, end], ...]): words, or phones where the alignment has phones;
their context is not held equal, as it is for the challenge's phones, so compare systems only on the
same manifest. A latent belongs to an item where its middle lies in it.

At most 10 tokens of a label and speaker, and 2000 cells, both chosen by seed, bound the time.
Precision: float64.
"""
import itertools
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

import cli  # so that -h says what this file is

TOKENS = 10
CELLS = 2000


@dataclass
class Item:
    """One token of a label."""
    label: str
    speaker: str
    # the clip it is from
    clip: str
    # (T, D), unit vectors
    latents: np.ndarray


def items_of(clip, name, latents, frame_rate):
    """The aligned words of a Clip -> [Item]. latents (T, D), frame_rate per second."""
    found = []
    for label, start, end in clip.words or []:
        first = max(0, round(start * frame_rate))
        last = max(first + 1, round(end * frame_rate))
        piece = np.asarray(latents[first:last], np.float64)                 # (t, D)
        if len(piece):
            length = np.linalg.norm(piece, axis=1, keepdims=True)
            label = label.lower().strip(".,;:!?\"'()")
            found.append(Item(label, clip.speaker, name, piece / np.maximum(length, 1e-12)))
    return found


def distance(a, x):
    """Mean angle, 0 .. 1, along the cheapest warping path between unit vectors (T, D), (T', D)."""
    angles = (np.arccos((a @ x.T).clip(-1, 1)) / np.pi).tolist()
    above = []
    for i, row in enumerate(angles):
        line = []                                    # (sum of angles, length) of the best path here
        for j, angle in enumerate(row):
            before = []
            if i and j:
                before.append(above[j - 1])
            if i:
                before.append(above[j])
            if j:
                before.append(line[-1])
            total, length = min(before, default=(0.0, 0))
            line.append((total + angle, length + 1))
        above = line
    total, length = above[-1]
    return total / length


def choose_cells(groups, across, rng):
    """(label, other label, speaker, speaker of X) that have tokens; at most CELLS of them.

    groups: {(label, speaker): [Item]}.
    """
    speakers = defaultdict(list)                     # label -> who says it
    for label, speaker in sorted(groups):
        speakers[label].append(speaker)
    cells = []
    for label, other in itertools.permutations(sorted(speakers), 2):
        for speaker in set(speakers[label]) & set(speakers[other]):
            if across:
                cells += [(label, other, speaker, of_x) for of_x in speakers[label]
                          if of_x != speaker]
            elif len(groups[label, speaker]) > 1:
                cells.append((label, other, speaker, speaker))
    cells.sort()
    if len(cells) <= CELLS:
        return cells
    return [cells[i] for i in sorted(rng.choice(len(cells), CELLS, replace=False))]


def abx_errors(items, across, seed=0):
    """Items -> {clip of X: (weighted errors, weights)}: the error is the ratio of their sums. Each
    cell has the weight 1. Empty where no label has the tokens that it needs.
    """
    # the same tokens whatever the order in which they come
    rng = np.random.default_rng(seed)
    groups = defaultdict(list)
    for item in sorted(items, key=lambda item: (item.clip, item.label)):
        groups[item.label, item.speaker].append(item)
    for key, group in sorted(groups.items()):
        groups[key] = [group[i] for i in rng.permutation(len(group))[:TOKENS]]

    known = {}

    def cached_distance(a, x):
        key = id(a), id(x)
        if key not in known:
            known[key] = distance(a.latents, x.latents)
        return known[key]

    # every triple of every cell
    found = defaultdict(lambda: [0.0, 0.0])
    for label, other, speaker, of_x in choose_cells(groups, across, rng):
        triples = [(a, b, x) for x in groups[label, of_x] for a in groups[label, speaker]
                   for b in groups[other, speaker] if a is not x]
        for a, b, x in triples:
            same = cached_distance(a, x)
            different = cached_distance(b, x)
            error = 1.0 if same > different else 0.5 * (same == different)
            found[x.clip][0] += error / len(triples)
            found[x.clip][1] += 1 / len(triples)
    return dict(found)
