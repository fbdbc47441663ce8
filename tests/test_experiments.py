"""What the experiments share: runs and scores are made once, and tables say what they should."""

import pytest
import torch

from experiments import runs, ways
from textcraftor.training_options import parse_options


def test_scores_are_computed_once_for_a_key(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "FOLDER", tmp_path)
    made = []

    def compute():
        made.append(True)
        return {"right": torch.tensor([1.0, 0.0])}

    for key in (["a", 1], ["a", 1], ["a", 2]):
        assert runs.kept(key, compute)["right"].tolist() == [1, 0]
    assert len(made) == 2


def test_a_row_has_the_paired_change_in_the_columns_units():
    before = {"right": torch.tensor([0.0, 0.0, 1.0, 1.0]), "total": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    after = {"right": torch.tensor([1.0, 0.0, 1.0, 1.0]), "total": torch.tensor([0.0, 1.0, 2.0, 3.0])}
    row = runs.changes("a", look=runs.mean([after, after]), before=before, scores=("right", "total"))
    # Student's t of four prompts: 25 ± 3.182 * 50 / 2, and no spread at all.
    assert row == "| a | +25.0 [−54.6, +104.6] | −1.00 [−1.00, −1.00] |"
    assert runs.means("a", look=after, scores=("right",)) == "| a | 75.0 |"
    assert runs.header("way", scores=("right",)) == "| way | right |\n| --- | --- |"


@pytest.mark.parametrize("way", ways.WAYS)
def test_ways_are_runs_of_their_own_with_options_that_training_takes(way):
    assert [ways.folder(other) for other in ways.WAYS].count(ways.folder(way)) == 1
    args = parse_options(["--model", "miniature", "--output-path", "x", *ways.WAYS[way]])
    assert args.gradient in way and (f"used {args.reuse} times" in way or args.reuse == 1)
