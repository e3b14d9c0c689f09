"""Processes that share clips find what one finds; what stops one of them is said in one line."""
import os

import pytest
import torch

import workers
from cli import BadInput
from conftest import ROOT, run
from workers import Place

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from cli import BadInput, cli
from workers import gather, gather_dict, mine, my_block, rank, shared

def main():
    with shared(2):
        if {wrong} == rank():
            raise BadInput("clip 7: is silent")
        squares = gather_dict({{i: i * i for i in mine(list(range(7)))}})
        blocks = gather(list(my_block(7)))
        assert squares == {{i: i * i for i in range(7)}}, squares
        assert blocks == [[0, 1, 2], [3, 4, 5, 6]], blocks
        print("rank", rank())

cli(main)
"""


def write(folder, wrong):
    path = folder / "program.py"
    path.write_text(PROGRAM.format(root=ROOT, wrong=wrong))
    return str(path)


def test_two_processes_share_the_work_and_the_first_prints(tmp_path):
    done = run(write(tmp_path, -1))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "rank 0\n"


def test_an_error_in_another_process_is_one_line_and_ends_all(tmp_path):
    done = run(write(tmp_path, 1), timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "error: process 1 of 2 ended: clip 7: is silent"
    assert done.stdout == ""


def test_alone_a_process_has_everything():
    assert workers.mine([1, 2, 3]) == [1, 2, 3] and workers.my_block(3) == range(3)
    assert workers.gather("x") == ["x"] and workers.rank() == 0


def test_a_device_that_is_not_there_is_refused():
    assert workers.choose_device("cpu") == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="--device cuda: not available here .*use auto or cpu"):
            workers.choose_device("cuda")


def test_on_a_cpu_bf16_is_for_who_asks():
    assert workers.choose_place("cpu", "auto") == Place("cpu", False)
    x = torch.ones(2, 2)
    with workers.choose_place("cpu", "bf16").autocast():
        assert (x @ x).dtype == torch.bfloat16
    with Place().autocast():
        assert (x @ x).dtype == torch.float32


def test_on_gpus_each_process_has_its_own(monkeypatch):
    monkeypatch.setattr(workers.torch, "zeros", lambda *shape, device: None)
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "6")
    assert workers.choose_device("cuda") == "cuda:2"
    assert workers.choose_device("cuda:1") == "cuda:1"
