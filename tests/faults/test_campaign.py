"""A small seed of the campaign of faults: python -m tests.faults.campaign, or make faults."""
import re

import pytest

from conftest import run
from tests.faults.campaign import KINDS


@pytest.fixture(scope="module")
def few():
    """One trial of every kind, in stages of a second."""
    return run("-m", "tests.faults.campaign", "--seed", "6", "--trials", "1", "--workers", "1",
               "--stages", "vae", "lm")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_survived(few, kind):
    assert re.search(rf"^{kind} +1 +1$", few.stdout, re.MULTILINE), few.stdout + few.stderr
