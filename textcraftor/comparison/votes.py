"""Human preference between two runs: the voting page, blind.html, and what its votes say.

The page shows two pictures of one prompt in random order and exports votes.json: {"comparison": runs.comparison_hash,
"benchmark", "runs": [names of A and B], "rater": a random name made by the page, "votes": [{"index", "prompt",
"category", "challenge" (PartiPrompts only), "first": "A" or "B", "preferred": "A", "B" or "tie"}]}.
"""

import base64
import json
from pathlib import Path

import numpy as np

from textcraftor.comparison.pages import BLOCK, embed_json, image_blocks, write_page
from textcraftor.comparison.runs import comparison_hash
from textcraftor.errors import UserError
from textcraftor.files import read_json_object
from textcraftor.statistics import wilson_interval

SHARE_OF_B = {"A": 0.0, "tie": 0.5, "B": 1.0}


def write_blind(path, runs, keys, seed, limit, image_size):
    """Write blind.html for the paired prompts `keys`, or `limit` of them, in random order and with random sides.

    The page keeps the names of the runs, the categories and which side is which encoded, so that nobody sees them by
    accident before the votes are exported. Raises UserError if an image cannot be read.
    """
    order = np.random.default_rng(seed).permutation(len(keys))[: limit or None]
    keys = [keys[i] for i in order]
    pairs, paths = [], []
    for key in keys:
        row = runs[0].rows[key]
        about = {name: row[name] for name in ("index", "prompt", "category", "challenge") if name in row}
        first = int(np.random.default_rng([seed, row["index"]]).integers(2))
        pairs.append(about | {"first": runs[first].label})
        paths.append([runs[first].image(key), runs[1 - first].image(key)])
    comparison = comparison_hash(runs)
    names = [run.name for run in runs]
    told = {"comparison": comparison, "benchmark": runs[0].settings["benchmark"], "runs": names, "pairs": pairs}
    page = {
        "id": f"{comparison}-{seed}-{limit}",
        "block": BLOCK,
        "prompts": [prompt for _, prompt in keys],
        "sealed": base64.b64encode(json.dumps(told).encode()).decode(),
    }

    def images():
        problems = {}
        for block in image_blocks(paths, image_size, problems):
            if problems:
                ((file, why),) = problems.items()
                raise UserError(f"{file}: {why}; people can only vote if both pictures of a prompt exist")
            yield block

    write_page(path, "blind.html", {"data": embed_json(page), "images": images()})


def read_votes(paths):
    """Read files of votes; returns (about: {"comparison", "benchmark", "runs"}, [[vote], one list per file]).

    Raises UserError if a file is damaged, or if they belong to different comparisons or twice to one rater.
    """
    files = [_read_file(Path(path)) for path in paths]
    about = {name: files[0][name] for name in ("comparison", "benchmark", "runs")}
    for path, file in zip(paths, files, strict=True):
        if file["comparison"] != about["comparison"]:
            raise UserError(
                f"{path}: votes on {' against '.join(file['runs'])} ({file['comparison']}), but {paths[0]}: votes on "
                f"{' against '.join(about['runs'])} ({about['comparison']}); report them separately"
            )
    raters = [file["rater"] for file in files]
    for i, rater in enumerate(raters):
        if rater in raters[:i]:
            raise UserError(f"{paths[i]} and {paths[raters.index(rater)]}: by the same rater; give only the later one")
    return about, [file["votes"] for file in files]


def _read_file(path):
    expected = "expected votes exported from a --blind page"
    file = read_json_object(path, expected)
    if not _is_votes(file):
        raise UserError(f"{path}: contains no valid votes; {expected}")
    if not file["votes"]:
        raise UserError(f"{path}: contains no votes yet")
    if len({vote["index"] for vote in file["votes"]}) < len(file["votes"]):
        raise UserError(f"{path}: has two votes on the same prompt; export the votes again")
    return file


def _is_votes(file):
    kinds = {"comparison": str, "benchmark": str, "runs": list, "rater": str, "votes": list}
    if any(not isinstance(file.get(name), kind) for name, kind in kinds.items()):
        return False
    kinds = {"index": int, "prompt": str, "category": str, "first": str, "preferred": str}
    return [type(name) for name in file["runs"]] == [str, str] and all(
        isinstance(vote, dict)
        and all(isinstance(vote.get(name), kind) for name, kind in kinds.items())
        and vote["first"] in ("A", "B")
        and vote["preferred"] in SHARE_OF_B
        for vote in file["votes"]
    )


def shares(votes):
    """{(index, prompt): share of its votes that prefer B, ties counted half}, over all files."""
    found = {}
    for vote in (vote for file in votes for vote in file):
        found.setdefault((vote["index"], vote["prompt"]), []).append(SHARE_OF_B[vote["preferred"]])
    return {key: float(np.mean(values)) for key, values in found.items()}


def preference(votes):
    """How often people preferred B, overall and by category and challenge, as records.

    A record is {"by", "group", "prompts", "votes", "A", "B", "tie": numbers of votes, "preference": share of votes for
    B, averaged over prompts so that each prompt counts once, "low", "high": Wilson's interval over prompts}.
    """
    every = [vote for file in votes for vote in file]
    kinds = [by for by in ("category", "challenge") if all(by in vote for vote in every)]
    chosen = {("all", "all"): every}
    for by in kinds:
        for group in sorted({vote[by] for vote in every}):
            chosen[by, group] = [vote for vote in every if vote[by] == group]
    records = []
    for (by, group), members in chosen.items():
        of_prompts = list(shares([members]).values())
        mean = float(np.mean(of_prompts))
        low, high = wilson_interval(mean, len(of_prompts)).tolist()
        counts = {name: sum(vote["preferred"] == name for vote in members) for name in ("A", "B", "tie")}
        about = {"by": by, "group": group, "prompts": len(of_prompts), "votes": len(members), **counts}
        records.append(about | {"preference": mean, "low": low, "high": high})
    return records


def agreement(share, gain):
    """How often scores agree with people; share: (N,), of votes for B; gain: (N, K), scores of B minus scores of A.

    Counts the prompts on which people prefer one run: a score agrees if it is higher for that run; equal scores count
    half. Returns (rates (K,), Wilson's intervals (K, 2), number of such prompts); NaN if there are none.
    """
    decided = share != 0.5
    if not decided.any():
        return np.full(gain.shape[1], np.nan), np.full((gain.shape[1], 2), np.nan), 0
    same = np.sign(share[decided] - 0.5)[:, None] * np.sign(gain[decided])
    rate = ((same + 1) / 2).mean(0)
    return rate, wilson_interval(rate, int(decided.sum())), int(decided.sum())


def preference_table(about, votes, records, agreements):
    """The votes as a text table; agreements: {score: {"agreement", "low", "high", "prompts"}}, or empty."""
    first, other = about["runs"]
    firsts = [vote["preferred"] == vote["first"] for file in votes for vote in file if vote["preferred"] != "tie"]
    count = records[0]["votes"]
    raters = f"{len(votes)} rater{'s' * (len(votes) > 1)}"
    lines = [f"{about['benchmark']}: {count} votes by {raters}", f"A  {first}", f"B  {other}", ""]
    lines.append(f"{'':<26}" + "".join(f"{name:>9}" for name in ("prompts", "A better", "B better", "tie")))
    lines[-1] += f"{'B preferred, % [95 % interval]':>34}"
    for record in records:
        counts = "".join(f"{record[name]:>9}" for name in ("prompts", "A", "B", "tie"))
        lines.append(f"{record['group']:<26}{counts}{_rate(record, 'preference'):>34}")
    lines.append("ties count half; each prompt counts once; Wilson's interval over prompts")
    if firsts:
        lines.append(f"the left (upper) picture won {100 * np.mean(firsts):.0f} % of the votes that were not ties")
    for name, found in agreements.items():
        told = _rate(found, "agreement")
        lines.append(
            f"{name} agrees with the votes on {told} % of the {found['prompts']} prompts where people prefer one"
        )
    return "\n".join(lines)


def _rate(record, name):
    return f"{100 * record[name]:.1f} [{100 * record['low']:.1f} … {100 * record['high']:.1f}]"
