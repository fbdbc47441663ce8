"""Intervals against scipy, closed forms and simulated coverage; pairing, ties and groups against plain counting."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from textcraftor.statistics import compare_groups, mean_interval, paired, paired_interval, paired_table, wilson_interval


def test_small_groups_have_students_interval():
    for count in (2, 3, 5, 19):
        first, other = np.random.default_rng(count).normal(size=(2, count))
        expected = stats.ttest_rel(other, first).confidence_interval(0.95)
        np.testing.assert_allclose(paired_interval(first, other)[1:], expected, rtol=1e-9)
        assert paired_interval(torch.tensor(first), torch.tensor(other)) == paired_interval(first, other)
    mean, low, high = paired_interval([1.0], [3.0])
    assert mean == 2 and np.isnan([low, high]).all()


def test_large_groups_have_the_percentile_bootstrap():
    values = np.random.default_rng(1).exponential(size=(20, 2))
    generator = np.random.default_rng(8)
    means = np.stack([values[generator.integers(20, size=20)].mean(0) for _ in range(20_000)])
    expected = np.quantile(means, (0.025, 0.975), axis=0)
    spread = values.std(0) / np.sqrt(20)
    np.testing.assert_allclose((mean_interval(values) - expected) / spread, 0, atol=0.1)  # both are random
    np.testing.assert_array_equal(mean_interval(values), mean_interval(values))
    assert (mean_interval(values, seed=1)[0] != mean_interval(values)[0]).all()
    # The columns are means over many values: the normal limit.
    values = np.random.default_rng(2).exponential(3, size=(4000, 1))
    half = 1.96 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose(np.ravel(mean_interval(values)), values.mean() + [-half, half], atol=0.06 * half)


def test_intervals_hold_the_true_mean_in_95_of_100_samples():
    for count in 3, 8, 30:
        values = np.random.default_rng(count).normal(1, 2, size=(count, 2000))
        low, high = mean_interval(values)
        assert 0.92 < ((low < 1) & (high > 1)).mean() < 0.97, count  # standard error 0.005


def test_pairs_stay_pairs():
    first = np.random.default_rng(3).normal(0, 100, 50)
    np.testing.assert_allclose(paired_interval(first, first + 0.25), 0.25, atol=1e-12)


def test_the_table_of_changes():
    before = {"clip": torch.tensor([1.0, 2, 3]), "total": torch.tensor([1.0, 1, 1])}
    after = {"total": torch.tensor([2.0, 2, 2]), "clip": torch.tensor([2.0, 2, 5])}
    head, total, clip = paired_table(before, after).splitlines()
    assert head.split() == ["score", "before", "after", "change", "95", "%", "interval"]
    assert total.split() == ["total", "1.0000", "2.0000", "+1.0000", "[+1.0000,", "+1.0000]"]
    assert clip.split() == ["clip", "2.0000", "3.0000", "+1.0000", "[-1.4841,", "+3.4841]"]  # 1 ± 4.3027 / sqrt(3)


def test_wilsons_interval():
    for hits, count in ((81, 263), (15, 148), (0, 20), (1, 29), (20, 20)):
        expected = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(wilson_interval(hits / count, count), expected, rtol=1e-9, atol=1e-12)
    assert np.isnan(wilson_interval(np.nan, 0)).all()


def test_groups_are_compared_within_themselves_and_ties_count_half():
    scores = np.random.default_rng(4).normal(size=(3, 30, 2))
    scores[2, 3, 1] = scores[0, 3, 1]
    kinds = ["one"] + ["x", "y"] * 14 + ["x"]
    records = compare_groups(scores, ["clip", "hps"], {"category": kinds}, 7)
    assert len(records) == 2 * (1 + 3) * 2
    gain = pd.Series(scores[2, :, 1] - scores[0, :, 1])
    for group, values in [("all", gain), *gain.groupby(kinds)]:
        (record,) = [r for r in records if (r["run"], r["group"], r["score"]) == (2, group, "hps")]
        assert record["difference"] == pytest.approx(values.mean())
        assert record["prompts"] == len(values) == record["wins"] + record["ties"] + record["losses"]
        assert record["win_rate"] == pytest.approx(((values > 0).sum() + (values == 0).sum() / 2) / len(values))
        expected = np.ravel(mean_interval(values.to_numpy()[:, None], 7))
        assert [record["low"], record["high"]] == ([None, None] if group == "one" else pytest.approx(expected))
    found = paired(np.zeros((5, 1)), np.array([[1.0], [2], [0], [0], [-1]]))
    assert [found[name].item() for name in ("wins", "ties", "losses", "win_rate")] == [2, 2, 1, 0.6]
