#!/usr/bin/env bash
# From a folder of recordings to a model that speaks, in an hour of one H100, estimated.
#
#   bash speedrun.sh RECORDINGS out/mine [--train.lm.steps 3000 ...]
#
# RECORDINGS: one to ten hours of one speaker, any tree of audio files with the words of NAME.wav in
# NAME.txt. What follows the run folder goes to train.py. PYTHON, CONFIG, ALIGN=no: see below.
set -euo pipefail
recordings=$1
run=$2
shift 2
PYTHON=${PYTHON:-python}
mkdir -p "$run"

# the clips, without those that cannot be read
$PYTHON -m corpora.scan "$recordings" --out "$run/all.jsonl"
$PYTHON -m corpora.scan check "$run/all.jsonl" --out "$run/clean.jsonl"
$PYTHON -m corpora.scan info "$run/clean.jsonl"

# when each word is spoken, for the inner monologue (Whisper; pip install -e .[eval]); ALIGN=no where
# the manifest has it, or with --lm.monologue false
manifest=$run/clean.jsonl
if [ "${ALIGN:-yes}" = yes ]; then
    $PYTHON -m corpora.align "$run/clean.jsonl" --out "$run/aligned.jsonl"
    manifest=$run/aligned.jsonl
fi

# what it will need, then the training; the same command again goes on after an interruption
options=(--config "${CONFIG:-configs/h100.toml}" --data.manifest "$manifest" --data.valid "" --out "$run" "$@")
$PYTHON train.py "${options[@]}" --plan
$PYTHON train.py "${options[@]}"

# listen, measure, take the weights away
$PYTHON sample.py --run "$run" --text "The old farmer opened the green box." --out "$run/hello.wav"
$PYTHON evaluate.py --run "$run" --what lm --limit 20
$PYTHON -m tools.convert export "$run" --out "$run/export"
