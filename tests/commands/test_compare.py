"""tools/compare.py: what is compared with what."""
from tools import compare


def test_checkouts_of_one_name_and_changed_files_have_run_folders_of_their_own(tmp_path):
    """Fault: two checkouts called "main" shared a run folder, and the second was "equal" without
    being trained; so was a checkout whose files had changed since.
    """
    for name in ("a/main", "b/main"):
        (tmp_path / name / "configs").mkdir(parents=True)
        (tmp_path / name / "train.py").write_text("x = 1")

    def folder(name, steps=20):
        return compare.run_folder_of("work", tmp_path / name, "quickstart", steps)

    first = folder("a/main")
    assert first.startswith("work/main_") and first.endswith("_quickstart")
    assert folder("a/main") == first
    assert len({first, folder("b/main"), folder("a/main", steps=30)}) == 3
    (tmp_path / "a/main" / "train.py").write_text("x = 2")
    assert folder("a/main") != first


def test_the_bare_command_needs_no_recordings():
    """Fault: the default configs had one of recordings, and the command stopped."""
    assert not [name for name in compare.CONFIGS if name.startswith("real")]


def test_the_first_figure_that_differs_is_named():
    row = {"stage": "lm", "step": 3, "loss": 0.5}
    assert compare.first_difference([row], [dict(row)]) is None
    assert compare.first_difference([row], []) == "1 rows of log.jsonl against 0"
    assert compare.first_difference([row], [{**row, "loss": 0.25}]) == (
        "lm step 3: loss 0.5 against 0.25")
