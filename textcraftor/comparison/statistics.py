"""Statistics of paired scores and of rates, as functions of arrays.

The same prompts under two models: differences with bootstrap intervals, rates with Wilson's.
"""

import numpy as np

RESAMPLES = 10_000
QUANTILES = (0.025, 0.975)  # 95 % intervals
Z = 1.959964  # of the normal distribution at QUANTILES[1]
DRAWN_AT_ONCE = 2**20  # prompts of resamples held in memory together: some 30 MB


def bootstrap_interval(values, seed, resamples=RESAMPLES):
    """Percentile bootstrap interval of the mean over prompts; values (N, K) -> (K, 2), low and high.

    A prompt is drawn with all its K values, so that pairs stay pairs (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, ch. 13). One prompt says nothing of the spread between prompts: NaN for N < 2.
    """
    count, columns = values.shape
    if count < 2:
        return np.full((columns, 2), np.nan)
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, columns))
    rows = max(1, DRAWN_AT_ONCE // count)
    for start in range(0, resamples, rows):
        drawn = generator.integers(count, size=(min(rows, resamples - start), count))
        places = drawn + count * np.arange(len(drawn))[:, None]
        times = np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape)
        means[start : start + rows] = times @ values / count
    return np.quantile(means, QUANTILES, axis=0).T


def wilson_interval(rate, count):
    """Wilson's score interval of a rate (...,) over `count` prompts -> (..., 2), low and high; NaN where there is none.

    Each prompt gives a number in [0, 1]. With nothing but 0 and 1 this is the textbook's interval (Wilson, JASA 1927);
    ties, counted half, and means over several votes vary less, so that it is wider than need be and never too narrow.
    Unlike the bootstrap's, it does not shrink to a point where all prompts agree.
    """
    if count == 0:
        return np.full((*np.shape(rate), 2), np.nan)
    rate = np.asarray(rate, dtype=float)
    centre = (rate + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * np.sqrt(rate * (1 - rate) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    return np.stack([np.maximum(0, centre - half), np.minimum(1, centre + half)], axis=-1)


def paired(first, other, seed):
    """Two models' scores of the same N prompts, (N, K) each -> {what: (K,)}, of `other` against `first`.

    first, mean: the two means; difference, low, high: mean difference and its bootstrap interval; wins, ties, losses:
    prompts; win_rate, win_low, win_high: share of prompts won, ties counted half, and Wilson's interval.
    """
    gain = other - first
    low, high = bootstrap_interval(gain, seed).T
    wins, ties, losses = ((sign == np.sign(gain)).sum(0) for sign in (1, 0, -1))
    rate = (wins + ties / 2) / len(gain)
    win_low, win_high = wilson_interval(rate, len(gain)).T
    return {
        "first": first.mean(0), "mean": other.mean(0), "difference": gain.mean(0), "low": low, "high": high,
        "wins": wins, "ties": ties, "losses": losses, "win_rate": rate, "win_low": win_low, "win_high": win_high,
    }  # fmt: skip


def compare_groups(scores, columns, groups, seed):
    """Every model against the first, over all prompts and within groups of them.

    scores (R, N, K): of R models, N prompts and the K scores named by `columns`; groups: {"category": N values, …}.
    Returns records, {"run": 1 … R − 1, "by": "all" or the kind of group, "group", "score", "prompts"} and what `paired`
    gives, None for what is not known. A group is resampled within itself.
    """
    members = [("all", "all", np.arange(scores.shape[1]))]
    for by, values in groups.items():
        values = np.asarray(values)
        members += [(by, str(group), np.flatnonzero(values == group)) for group in np.unique(values)]
    records = []
    for run in range(1, len(scores)):
        for by, group, chosen in members:
            found = paired(scores[0, chosen], scores[run, chosen], seed)
            for k, column in enumerate(columns):
                values = {name: array[k].item() for name, array in found.items()}
                known = {name: None if np.isnan(value) else value for name, value in values.items()}
                about = {"run": run, "by": by, "group": group, "score": column, "prompts": len(chosen)}
                records.append(about | known)
    return records
