"""The states of a run that --resume continues from."""

from textcraftor.checkpoints import last_state


def test_the_last_whole_state_is_found(tmp_path):
    assert last_state(tmp_path) == (None, 0)
    for name in ("step_000100", "step_1000000", "step_000900", "unfinished"):
        (tmp_path / name).mkdir()
    assert last_state(tmp_path) == (tmp_path / "step_1000000", 1_000_000)
