"""What people like, in the miniature: pictures in groups of four for one prompt, and a noisy rater who compares them.

PickScore and HPS v2 are CLIPs fine-tuned on such comparisons (Kirstain et al., NeurIPS 2023, eq. 2; Wu et al., 2023),
the aesthetic score is a linear head on CLIP features fitted to ratings. The rater's taste is `world.like`.
"""

from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from tqdm import tqdm

from miniature import world
from miniature.clips import normalize, tokenize

GROUPS = 3_000
PAIR_NOISE = 0.7  # scale of the logistic noise on which of two pictures is liked better
STRANGERS = 8  # pictures of other prompts that each prompt's own are compared with
RATING_NOISE = 0.7  # standard deviation of a rating, on a scale of about 1 to 10
RAGGED_STD = 0.6  # latent noise, in standard deviations of the latents, that makes detail fully ragged


def group_of(seed: int, index: int) -> dict:
    """Group `index`: {"caption", "scenes": four, "ragged": four in [0, 1]}: right and clean, right but flawed, one
    thing wrong but clean, and anything. About half of the pictures have torn detail besides."""
    rng = np.random.default_rng([seed, index])
    asked = world.random_scene(rng)
    scenes = [asked, asked, world.spoil(asked, rng), world.spoil(asked, rng) if rng.random() < 0.5 else asked]
    flaws = [c for c in world.CONDITIONS if c != "clean"]
    conditions = ["clean", world.pick(rng, flaws), "clean", world.pick(rng, list(world.CONDITIONS))]
    scenes = [{**s, "condition": c, "vivid": float(rng.uniform())} for s, c in zip(scenes, conditions, strict=True)]
    ragged = rng.uniform(size=4) * (rng.random(4) < 0.5)
    caption = world.write_caption({**asked, "condition": "clean"}, rng, complete=rng.random() < 0.7)
    return {"caption": caption, "scenes": scenes, "ragged": ragged.tolist()}


@torch.inference_mode()
def draw_groups(vae, seed: int, folder: Path) -> None:
    """Write the pictures of all groups, uint8 (GROUPS, 4, 64, 64, 3): as drawn, and as the autoencoder gives them
    back with as much noise on the latents as each is to be ragged."""
    if (folder / "groups_decoded.npy").exists():
        return
    drawn, decoded = [], []
    for index in tqdm(range(GROUPS), desc="groups", mininterval=10):
        group, rng = group_of(seed, index), np.random.default_rng([seed, index, 1])
        pictures = np.stack([world.render(scene, rng) for scene in group["scenes"]])
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mode().float()
            torn = torch.tensor(group["ragged"]).float().view(4, 1, 1, 1) * RAGGED_STD / vae.config.scaling_factor
            noise = torch.from_numpy(rng.standard_normal(z.shape, np.float32))
            y = vae.decode((z + torn * noise).contiguous(memory_format=torch.channels_last)).sample.float()
        drawn.append(pictures)
        decoded.append(((y.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    np.save(folder / "groups_drawn.npy", np.stack(drawn))
    np.save(folder / "groups_decoded.npy", np.stack(decoded))


def preference_loss(
    clip: open_clip.CLIP, tokenizer, images: torch.Tensor, groups: list[dict], ragged: bool, rng: np.random.Generator
) -> torch.Tensor:
    """Bradley-Terry loss of all pairs among a prompt's four pictures and some of other groups (their first ones),
    which keep it from forgetting what the words mean.

    images (B, 4, 3, H, W) in [0, 1]; ragged: whether they are the decoded ones, torn as the groups say.
    """
    count = len(groups)
    others = [[(i + 1 + k) % count for k in range(min(STRANGERS, count - 1))] for i in range(count)]
    image = clip.encode_image(normalize(images.flatten(0, 1)), normalize=True).unflatten(0, (count, 4))
    text = clip.encode_text(tokenize(tokenizer, [g["caption"] for g in groups]), normalize=True)
    image = torch.cat([image, image[:, 0][torch.tensor(others)]], dim=1)  # (B, 4 + strangers, D)
    scores = clip.logit_scale.exp() * (image * text[:, None]).sum(-1)
    liked = []
    for group, strangers in zip(groups, others, strict=True):
        shown = group["scenes"] + [groups[j]["scenes"][0] for j in strangers]
        torn = group["ragged"] + [groups[j]["ragged"][0] for j in strangers]
        asked = world.parse(group["caption"])
        liked.append([world.like(scene, asked, ragged * t) for scene, t in zip(shown, torn, strict=True)])
    liked = np.array(liked)
    first, second = torch.triu_indices(liked.shape[1], liked.shape[1], offset=1)
    gap = liked[:, first] - liked[:, second]
    prefers = torch.from_numpy(gap + rng.logistic(scale=PAIR_NOISE, size=gap.shape) > 0).float()
    return F.binary_cross_entropy_with_logits(scores[:, first] - scores[:, second], prefers)


def rating(scene: dict, ragged: float, rng: np.random.Generator) -> float:
    """The rater's mark for a picture without a prompt, about 1 to 10: clean, vivid and whole pictures score high."""
    clean = scene["condition"] == "clean"
    vivid = scene["vivid"] - 0.5 if scene["condition"] != "washed out" else -0.5
    return 5.5 + (1.7 if clean else -1.7) + 1.5 * vivid - 2.5 * ragged + rng.normal(0, RATING_NOISE)


def new_head(width: int) -> torch.nn.Sequential:
    """The aesthetic predictor's layers, 0, 2, 4, 6, 7 of which have weights."""
    sizes, dropouts = (width, 1024, 128, 64, 16, 1), (0.2, 0.2, 0.1)
    layers = []
    for i in range(5):
        layers.append(torch.nn.Linear(sizes[i], sizes[i + 1]))
        layers += [torch.nn.Dropout(dropouts[i])] if i < 3 else []
    return torch.nn.Sequential(*layers)
