"""What people like, in the miniature: pictures in groups of eight for one prompt, and noisy raters who compare them.

PickScore and HPS v2 are CLIPs fine-tuned on such comparisons (Kirstain et al., NeurIPS 2023, eq. 2; Wu et al., 2023),
the aesthetic score is a linear head on CLIP features fitted to ratings. All raters like right content and clean
pictures; each likes one look best.
"""

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from miniature import world
from miniature.clips import normalize, tokenize

GROUPS, GROUP = 1_600, 8
FAVOURITES = {"aesthetic": "shadow", "pickscore": "sticker", "hpsv2": "ink"}  # each rater's look
PAIR_NOISE = 0.5  # scale of the logistic noise on which of two pictures is liked better
STRANGERS = 8  # pictures of other prompts that each prompt's own are compared with
RATING_NOISE = 0.7  # standard deviation of a rating, on a scale of about 1 to 10
TORN_STD = 0.5  # latent noise, in standard deviations of the latents, that tears detail fully


def group_of(seed: int, index: int) -> dict:
    """Group `index`: {"caption", "scenes": eight, "torn": eight in [0, 1]}: the scene that the caption asks
    for; then with one thing wrong: an object, background or colour; a size; a place; twice a flaw; then clean in its
    own look and in another; and with anything wrong. A third of the pictures have torn detail besides, as a generator's
    failures do."""
    rng = np.random.default_rng([seed, index])
    asked = {**world.random_scene(rng), "condition": "clean"}
    kinds = [what for what in world.spoils(asked) if what in ("object", "background", "colour")]
    others = rng.permutation([look for look in world.LOOKS if look != asked["look"]]).tolist()
    flaws = rng.permutation(world.FLAWS).tolist()
    moved = "swap" if "swap" in world.spoils(asked) else "place"
    scenes = [
        asked,
        world.spoil(asked, rng, world.pick(rng, kinds)),
        world.spoil(asked, rng, "size"),
        world.spoil(asked, rng, moved),
        {**asked, "condition": flaws[0]},
        {**asked, "look": others[0], "condition": flaws[1]},
        {**asked, "look": others[0]},
        {**world.spoil(asked, rng), "look": others[1], "condition": world.pick(rng, world.CONDITIONS)},
    ]
    torn = rng.uniform(size=GROUP) * (rng.random(GROUP) < 1 / 3)
    caption = world.write_caption(asked, rng, complete=rng.random() < 0.8, quality=0.2, look=0.2)
    return {"caption": caption, "scenes": scenes, "torn": torn.tolist()}


def draw_group(seed: int, index: int) -> np.ndarray:
    """The pictures of a group, uint8 (8, 64, 64, 3). Those of one prompt share their jitter, so that nothing but what
    the group says tells them apart."""
    scenes = group_of(seed, index)["scenes"]
    return np.stack([world.render(scene, np.random.default_rng([seed, index, 1])) for scene in scenes])


def like(scene: dict, asked: dict, favourite: str, torn: float = 0.0) -> float:
    """How much a rater likes a picture of `scene` for a caption that asked for `asked` (see world.parse), before the
    noise. Right content counts most (up to 4, and 2 more when nothing is wrong), then a clean picture (2), then the
    rater's favourite look (1); `torn` in [0, 1] says how much the picture's detail is torn (1: as bad as a flaw)."""
    right = list(world.content_right(scene, asked).values())
    clean = scene["condition"] == "clean"
    return 4 * float(np.mean(right)) + 2 * all(right) + 2 * clean + (scene["look"] == favourite) - 2 * torn


def preference_loss(
    clip: open_clip.CLIP,
    tokenizer,
    images: torch.Tensor,
    groups: list[dict],
    torn: bool,
    favourite: str,
    rng: np.random.Generator,
) -> torch.Tensor:
    """Bradley-Terry loss of all pairs among a prompt's pictures and some of other groups (their first ones), which keep
    it from forgetting what the words mean.

    images (B, 8, 3, H, W) in [0, 1]; torn: whether they are the decoded ones, torn as the groups say.
    """
    count, size = images.shape[:2]
    others = [[(i + 1 + k) % count for k in range(min(STRANGERS, count - 1))] for i in range(count)]
    image = clip.encode_image(normalize(images.flatten(0, 1)), normalize=True).unflatten(0, (count, size))
    text = clip.encode_text(tokenize(tokenizer, [g["caption"] for g in groups]), normalize=True)
    image = torch.cat([image, image[:, 0][torch.tensor(others)]], dim=1)  # (B, 8 + strangers, D)
    scores = clip.logit_scale.exp() * (image * text[:, None]).sum(-1)
    liked = []
    for group, strangers in zip(groups, others, strict=True):
        scenes = group["scenes"] + [groups[j]["scenes"][0] for j in strangers]
        tears = group["torn"] + [groups[j]["torn"][0] for j in strangers]
        asked = world.parse(group["caption"])
        liked.append([like(scene, asked, favourite, torn * t) for scene, t in zip(scenes, tears, strict=True)])
    liked = np.array(liked)
    first, second = torch.triu_indices(liked.shape[1], liked.shape[1], offset=1)
    gap = liked[:, first] - liked[:, second]
    prefers = torch.from_numpy(gap + rng.logistic(scale=PAIR_NOISE, size=gap.shape) > 0).to(scores.dtype)
    return F.binary_cross_entropy_with_logits(scores[:, first] - scores[:, second], prefers)


def rating(scene: dict, torn: float, rng: np.random.Generator) -> float:
    """The rater's mark for a picture without a prompt, 1 to 10; clean, whole and in the favourite look is best."""
    clean, favourite = scene["condition"] == "clean", scene["look"] == FAVOURITES["aesthetic"]
    return 5.0 + (1.7 if clean else -1.7) + 1.2 * favourite - 2.5 * torn + rng.normal(0, RATING_NOISE)


def new_head(width: int) -> torch.nn.Sequential:
    """The aesthetic predictor's layers, 0, 2, 4, 6, 7 of which have weights."""
    sizes, dropouts = (width, 1024, 128, 64, 16, 1), (0.2, 0.2, 0.1)
    layers = []
    for i in range(5):
        layers.append(torch.nn.Linear(sizes[i], sizes[i + 1]))
        layers += [torch.nn.Dropout(dropouts[i])] if i < 3 else []
    return torch.nn.Sequential(*layers)
