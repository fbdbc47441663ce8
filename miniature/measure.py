"""What the miniature is like, measured on what ships: its judge, its rewards, and how its words control quality.

python -m miniature.measure            prints the figures that miniature/build.json holds
"""

from pathlib import Path

import numpy as np
import torch

from miniature import world
from miniature.judge import see
from miniature.preferences import FAVOURITES
from rewards import REWARDS, load_reward
from textcraftor.bank import Bank, with_bank
from textcraftor.embeddings import embed_prompts
from textcraftor.models import Model, latent_shape, load_model, make_networks, quiet_libraries
from textcraftor.options import TEST_STEPS, TEST_TUNED_STEPS, miniature_defaults
from textcraftor.prompts import read_prompts
from textcraftor.sampling import make_images, make_scheduler, sample_last_k
from textcraftor.validation import validation_noise

HERE = Path(__file__).parent
SEED = 1_000_000  # of test scenes, far from the training scenes' numbers
JUDGED, PAIRS, PROMPTS = 1_000, 100, 128
WORDS = ", sharp and vivid, clean"


def draw(scenes: list[dict], seed: int = SEED) -> torch.Tensor:
    """Pictures of scenes, (B, 3, 64, 64) in [0, 1]; picture i's jitter depends on (seed, i) alone."""
    pictures = [world.render(scene, np.random.default_rng([seed, i, 1])) for i, scene in enumerate(scenes)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@torch.inference_mode()
def through(vae, images: torch.Tensor) -> torch.Tensor:
    """The images as the autoencoder gives them back, which is how generated ones look."""
    parts = [vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample for part in images.split(100)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def measure_judge(vae) -> dict[str, dict[str, float]]:
    """Percent of test pictures, a quarter of them with held-out pairs, that the judge is right about: all content, the
    objects with their colours and places, their sizes, background, look and condition; as drawn and decoded."""
    rng = np.random.default_rng(SEED)
    scenes, figures = [world.random_scene(rng, held_out=i % 4 == 0) for i in range(JUDGED)], {}
    images = draw(scenes)
    for kind, pictures in (("drawn", images), ("decoded", through(vae, images))):
        right = {name: [] for name in ("content", "objects", "sizes", "background", "look", "condition")}
        for seen, scene in zip(see(pictures), scenes, strict=True):
            details = world.content_right(seen, {**scene, "look": None})
            right["content"].append(all(details.values()))
            right["objects"].append(all(v for k, v in details.items() if not k.startswith(("size", "back"))))
            right["sizes"].append(all(v for k, v in details.items() if k.startswith("size")))
            for name in ("background", "look", "condition"):
                right[name].append(seen[name] == scene[name])
        figures[kind] = {name: percent(values) for name, values in right.items()}
    return figures


def pairs(kind: str, favourite: str | None, rng: np.random.Generator) -> tuple[list[dict], list[dict], list[str]]:
    """PAIRS clean scenes, the same with one thing worse, and complete captions that ask for the first.

    kind: one of world.spoils; a flaw; or "look": the favourite look against another.
    """
    good, bad, captions = [], [], []
    while len(good) < PAIRS:
        scene = {**world.random_scene(rng, held_out=len(good) % 2 == 0), "condition": "clean"}
        if kind in world.FLAWS:
            worse = {**scene, "condition": kind}
        elif kind == "look":
            scene = {**scene, "look": favourite}
            worse = {**scene, "look": world.pick(rng, [look for look in world.LOOKS if look != favourite])}
        elif kind in world.spoils(scene):
            worse = world.spoil(scene, rng, kind)
        else:
            continue
        good.append(scene)
        bad.append(worse)
        captions.append(world.write_caption(scene, rng, complete=True))
    return good, bad, captions


@torch.inference_mode()
def measure_reward(name: str, vae, root: Path = HERE) -> dict[str, float]:
    """Percent of pairs of decoded pictures that differ in one thing in which a reward scores the better one higher,
    {kind: percent} for the kinds that its raters care about."""
    reward, rng, figures = load_reward(name, root, "cpu"), np.random.default_rng(SEED + 1), {}
    content = ["object", "colour", "size", "place", "swap", "background"]
    quality = world.FLAWS + (["look"] if name in FAVOURITES else [])
    for kind in {"clip": content, "aesthetic": quality}.get(name, content + quality):
        good, bad, captions = pairs(kind, FAVOURITES.get(name), rng)
        scores = [reward(through(vae, draw(scenes)), captions) for scenes in (good, bad)]
        figures[kind] = percent(scores[0] > scores[1])
    return figures


@torch.inference_mode()
def make(
    model: Model,
    prompts: list[str],
    indices: list[int],
    guidance: float,
    tuned=None,
    words: str = "",
    steps: int = TEST_TUNED_STEPS,
    tune_unconditional: bool = True,
    bank: Bank | None = None,
) -> torch.Tensor:
    """Pictures (B, 3, 64, 64) of prompts from the fixed noise of their indices, the last `steps` of 25 steps driven by
    a tuned text encoder, or the model's own, that reads the prompts with `words` after them; the others by the model's
    own that reads the prompts. Without tune_unconditional, so is the empty prompt in all steps. bank: of the first 25 -
    `steps` steps, which are the same under every encoder."""
    networks, noise = make_networks(model, tuned, tune_unconditional), validation_noise(indices, latent_shape(model))
    plain, _ = embed_prompts(networks, prompts)
    _, told = embed_prompts(networks, [prompt + words for prompt in prompts])
    scheduler = make_scheduler(model.scheduler_config, TEST_STEPS)
    return make_images(
        networks, scheduler, prompts, noise, tuned_steps=steps, guidance=guidance,
        conditions=(plain, told), sampler=with_bank(bank, sample_last_k, prompts, noise) if bank else None,
    )  # fmt: skip


def measure_words(model: Model, prompts: list[str], guidance: float) -> dict[str, dict[str, float]]:
    """How the judge finds pictures of held-out prompts, in percent, as they are and with quality words added in all
    steps, the last 15 and the last 5: what tuning the late steps' encoder can reach."""
    figures = {}
    for name, steps in {"plain": 0, "words in all steps": TEST_STEPS, "in the last 15": 15, "in the last 5": 5}.items():
        seen = []
        for start in range(0, len(prompts), 32):
            some = prompts[start : start + 32]
            indices = range(start, start + len(some))
            seen += see(make(model, some, indices, guidance, words=WORDS, steps=steps))
        right = [all(world.content_right(s, world.parse(p)).values()) for s, p in zip(seen, prompts, strict=True)]
        clean = [scene["condition"] == "clean" for scene in seen]
        figures[name] = {
            "clean": percent(clean),
            "right": percent(right),
            "both": percent(np.logical_and(right, clean)),
            **{look: percent([scene["look"] == look for scene in seen]) for look in world.LOOKS},
            **{flaw: percent([scene["condition"] == flaw for scene in seen]) for flaw in world.FLAWS},
        }
    return figures


def percent(values) -> float:
    return round(100 * float(np.mean(np.asarray(values))), 1)


def measure_all(root: Path = HERE) -> dict:
    """Every figure, printed as it comes."""
    quiet_libraries()
    model = load_model(root / "stable-diffusion")
    guidance = miniature_defaults()["guidance"]
    prompts = read_prompts(str(root / "heldout.csv"))[0][-PROMPTS:]
    figures = {"judge": measure_judge(model.vae)}
    report("judge, percent right", figures["judge"])
    figures["rewards"] = {name: measure_reward(name, model.vae, root) for name in REWARDS}
    report("rewards, percent of pairs in the right order", figures["rewards"])
    figures["words"] = measure_words(model, prompts, guidance)
    report(f"base, guidance {guidance}, {len(prompts)} held-out prompts, percent", figures["words"])
    return figures


def report(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(title)
    for name, values in rows.items():
        print(f"  {name}: " + ", ".join(f"{key} {value:g}" for key, value in values.items()), flush=True)


if __name__ == "__main__":
    measure_all()
