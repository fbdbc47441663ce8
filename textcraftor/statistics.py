"""Confidence intervals for scores of the same prompts under two models, and for rates. All intervals are 95 %.

Means of differences: Student's t below 20 prompts, the percentile bootstrap from 20 on. Rates: Wilson's interval.
"""

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
BOOTSTRAP_FROM = 20  # prompts; with fewer, the percentile bootstrap is clearly too narrow
DRAWN_AT_ONCE = 2**22  # resampled scores held in memory together: 32 MB


def mean_interval(values, seed=0):
    """Interval of the mean over prompts; values (N, K) -> low (K,), high (K,).

    N = 1: NaN, as one prompt says nothing about the spread between prompts.
    2 <= N < 20: Student's t interval, exact for normally distributed values.
    N >= 20: percentile bootstrap with 10,000 resamples, which makes no assumption about the distribution. A prompt is
    drawn together with all its K values (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13).
    """
    values = np.asarray(values, dtype=float)
    count, columns = values.shape
    if count < 2:
        return np.full(columns, np.nan), np.full(columns, np.nan)
    if count < BOOTSTRAP_FROM:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * values.std(0, ddof=1) / np.sqrt(count)
        return values.mean(0) - half, values.mean(0) + half
    batch = max(1, DRAWN_AT_ONCE // values.size)
    found = stats.bootstrap(
        (values,), np.mean, axis=0, n_resamples=RESAMPLES, batch=batch, confidence_level=CONFIDENCE,
        method="percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip
    return found.confidence_interval.low, found.confidence_interval.high


def paired_interval(first, other):
    """Mean of `other - first` over the same N prompts, with its interval: floats (mean difference, low, high).

    first, other: (N,), NumPy arrays or CPU tensors. mean_interval says how the interval is made for which N. It is
    deterministic: the bootstrap is always seeded alike.
    """
    gain = np.asarray(other, dtype=float) - np.asarray(first, dtype=float)
    low, high = mean_interval(gain[:, None])
    return gain.mean().item(), low.item(), high.item()


def paired_table(before, after):
    """A text table of the mean scores before and after, and the mean change with its interval.

    before, after: {score: (N,)} of the same prompts and noise; the rows are those of `after`.
    """
    lines = [f"{'score':<16}{'before':>10}{'after':>10}{'change':>10}   95 % interval"]
    for name in after:
        mean, low, high = paired_interval(before[name], after[name])
        first, second = (np.mean(np.asarray(scores, dtype=float)) for scores in (before[name], after[name]))
        lines.append(f"{name:<16}{first:>10.4f}{second:>10.4f}{mean:>+10.4f}   [{low:+.4f}, {high:+.4f}]")
    return "\n".join(lines)


def wilson_interval(rate, count):
    """Wilson's score interval for a rate over `count` prompts; rate (...,) -> (..., 2), low and high.

    Each prompt contributes a number in [0, 1]. For zeros and ones this is the textbook interval (Wilson, JASA 1927).
    Ties (counted half) and means over several votes vary less, so for those the interval is somewhat too wide, never
    too narrow. It keeps its width where all prompts agree, unlike the bootstrap. NaN if count is 0.
    scipy.stats.binomtest has the same formula, but takes whole numbers of successes only.
    """
    if count == 0:
        return np.full((*np.shape(rate), 2), np.nan)
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)
    rate = np.asarray(rate, dtype=float)
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return np.stack([np.maximum(0, centre - half), np.minimum(1, centre + half)], axis=-1)


def paired(first, other, seed=0):
    """How one model's scores compare with another's on the same N prompts; first, other: (N, K) -> {name: (K,)}.

    first, mean: means of `first` and `other`; difference, low, high: mean of other - first and its interval;
    wins, ties, losses: numbers of prompts, seen from `other`; win_rate, win_low, win_high: the share of prompts won,
    ties counted half, and Wilson's interval.
    """
    gain = other - first
    low, high = mean_interval(gain, seed)
    wins, ties, losses = ((sign == np.sign(gain)).sum(0) for sign in (1, 0, -1))
    rate = (wins + ties / 2) / len(gain)
    win_low, win_high = wilson_interval(rate, len(gain)).T
    return {
        "first": first.mean(0), "mean": other.mean(0), "difference": gain.mean(0), "low": low, "high": high,
        "wins": wins, "ties": ties, "losses": losses, "win_rate": rate, "win_low": win_low, "win_high": win_high,
    }  # fmt: skip


def compare_groups(scores, columns, groups, seed=0):
    """Compare every model with the first, over all prompts and within each group of prompts.

    scores: (R, N, K), R models, N prompts, and the K scores named by `columns`; groups: {"category": N values, ...}.
    Returns one record per model, group and score: {"run": 1 ... R-1, "by": "all" or the kind of group, "group",
    "score", "prompts"} and the values of `paired`, with None for an interval that one prompt does not have. The
    bootstrap resamples each group by itself.
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
