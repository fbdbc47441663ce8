"""Build the miniature from nothing: draw the world, train every model on it, write the folders that ship.

    python -m miniature.build                     # everything, stage by stage; stop and start again at will
    python -m miniature.build vae unet            # some stages only
    python -m miniature.build --work build        # where unfinished work lies (default: build/miniature)

Needs the font Noto Color Emoji (Debian and Ubuntu: apt-get install fonts-noto-color-emoji).
"""

import argparse
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, GPT2LMHeadModel

from miniature.clips import (
    SIZES,
    clip_config,
    contrastive_loss,
    families,
    new_clip,
    new_tokenizer,
    normalize,
    save_open_clip,
    save_tokenizer,
    text_config,
    tokenize,
    transformers_names,
    web_caption,
    wrong_captions,
)
from miniature.extender import extender_loss, new_extender, save_extender
from miniature.extender import new_tokenizer as new_extender_tokenizer
from miniature.fit import fit
from miniature.judge import Judge, judge_loss, see
from miniature.preferences import GROUPS, draw_groups, group_of, new_head, preference_loss, rating
from miniature.world import IMAGE_SIZE, QUALITY_WORDS, content_right, random_scene, render, write_caption

SEED = 0
UNET_STEPS, DECODER_STEPS = 5_000, 5_000
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SCENES = {"train": 40_000, "test": 2_000}
LATENTS = (16, 8, 8)


# The world, drawn once.


def scene_of(split: str, index: int) -> dict:
    """Scene number `index` of a split; it depends on (SEED, split, index) alone. A test scene in four is held out."""
    rng = np.random.default_rng([SEED, list(SCENES).index(split), index])
    return random_scene(rng, held_out=split == "test" and index % 4 == 0)


def draw_world(work: Path) -> None:
    for split, count in SCENES.items():
        if (work / f"{split}.npy").exists():
            continue
        with Pool() as pool:
            pictures = pool.imap(partial(picture_of, split), range(count), chunksize=256)
            images = np.stack(list(tqdm(pictures, desc=f"draw {split}", total=count, mininterval=10)))
        np.save(work / f"{split}.npy", images)


def picture_of(split: str, index: int) -> np.ndarray:
    return render(scene_of(split, index), np.random.default_rng([SEED, list(SCENES).index(split), index, 1]))


def scenes_of(split: str) -> list[dict]:
    return [scene_of(split, i) for i in range(SCENES[split])]


def images_of(work: Path, split: str) -> np.ndarray:
    return np.load(work / f"{split}.npy", mmap_mode="r")


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [0, 1], channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def batch_indices(step: int, size: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, step]).integers(count, size=size)


# The autoencoder: both halves first, then the decoder alone, so that the UNet can start on latents that stay.


def new_vae() -> AutoencoderKL:
    """Normalised in two wide groups: narrower ones wipe out the colour of a plain background, and learn slowly."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(32, 32, 96, 128),
        layers_per_block=1,
        latent_channels=LATENTS[0],
        norm_num_groups=2,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    vae.quant_conv.bias.data[LATENTS[0] :] = -5  # start with little noise on the latents
    return vae.to(memory_format=torch.channels_last)


def picture_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error, which finds the colours, and absolute errors of the pixels and of their differences to the next
    pixel, which keep edges sharp. (B, 3, H, W) in [-1, 1] -> scalar."""
    error = (output - target).float()
    return (
        4 * error.square().mean()
        + (error.abs().mean() + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
    )


def train_vae(work: Path) -> AutoencoderKL:
    images, vae = images_of(work, "train"), new_vae()

    def both_halves(step):
        x = to_tensor(images[batch_indices(step, 16, len(images), SEED + 1)]) * 2 - 1
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(x).latent_dist
            loss = picture_loss(vae.decode(latents.sample()).sample, x)
        return loss + 2e-4 * latents.kl().mean() / latents.mean[0].numel()

    return fit("vae", vae, both_halves, 2200, 1e-3, work)


def train_decoder(work: Path) -> AutoencoderKL:
    images, vae = images_of(work, "train"), trained_vae(work, "vae")
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)

    def loss(step):
        x = to_tensor(images[batch_indices(step, 16, len(images), SEED + 2)]) * 2 - 1
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(x).latent_dist.sample()
            return picture_loss(vae.decode(latents).sample, x)

    return fit("decoder", vae, loss, DECODER_STEPS, 1e-3, work, ema=0.999)


# Three CLIPs.


def train_clip(work: Path, name: str) -> open_clip.CLIP:
    """First as on the web, one picture and one caption after another, then on families that differ in one detail."""
    images, scenes, tokenizer = images_of(work, "train"), scenes_of("train"), new_tokenizer()
    seed = SIZES[name][0]

    def web_loss(step):
        chosen, rng = batch_indices(step, 128, len(images), seed), np.random.default_rng([seed, step, 1])
        shown = [scenes[i] for i in chosen]
        captions = [web_caption(s, rng) for s in shown] + wrong_captions(shown, rng)
        return contrastive_loss(clip, tokenizer, to_tensor(images[chosen]), captions)

    def family_loss(step):
        rng = np.random.default_rng([seed, step, 2])
        shown, captions = families(rng)
        return contrastive_loss(clip, tokenizer, to_tensor(np.stack([render(s, rng) for s in shown])), captions)

    clip = new_clip(name)
    fit(f"clip_{name}_web", clip, web_loss, 1300, 1e-3, work, weight_decay=0.05)
    clip.visual.positional_embedding.data.mul_(4)  # the patches' colours drown them, and places with them
    return fit(f"clip_{name}", clip, family_loss, 800, 1e-3, work, weight_decay=0.05)


def text_encoder_of(clip: open_clip.CLIP) -> CLIPTextModel:
    """The text tower of CLIP "L" as Stable Diffusion has it."""
    config = CLIPTextConfig(**text_config("L"))
    encoder = CLIPTextModel(config).eval().requires_grad_(False)
    names = {k: v for k, v in transformers_names(clip).items() if k.startswith("text_model.")}
    own = encoder.state_dict()
    prefix = "" if "final_layer_norm.weight" in own else "text_model."  # transformers 5, or 4
    encoder.load_state_dict({prefix + k.removeprefix("text_model."): v for k, v in names.items()})
    return encoder


# The UNet, on latents computed once, with the text encoder frozen.


@torch.inference_mode()
def encode_world(work: Path) -> np.ndarray:
    """All training pictures as latents: fp16 (N, 2, 16, 8, 8), mean and standard deviation; computed once."""
    file = work / "latents.npy"
    if not file.exists():
        images, vae, parts = images_of(work, "train"), trained_vae(work, "vae"), []
        for start in tqdm(range(0, len(images), 200), desc="latents", mininterval=10):
            with torch.autocast("cpu", torch.bfloat16):
                latents = vae.encode(to_tensor(images[start : start + 200]) * 2 - 1).latent_dist
            parts.append(torch.stack([latents.mean.float(), latents.std.float()], dim=1).half().numpy())
        np.save(file, np.concatenate(parts))
    return np.load(file, mmap_mode="r")


def scaling_factor(latents: np.ndarray) -> float:
    """1 / standard deviation of the latents, so that the UNet sees unit variance (Rombach et al., section D.1)."""
    sample = torch.from_numpy(latents[:4000].astype(np.float32))
    return round(1 / (sample[:, 0].var() + sample[:, 1].square().mean()).sqrt().item(), 5)


def new_unet() -> UNet2DConditionModel:
    torch.manual_seed(SEED)
    return UNet2DConditionModel(
        sample_size=LATENTS[1],
        in_channels=LATENTS[0],
        out_channels=LATENTS[0],
        block_out_channels=(96, 112),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=4,
    ).to(memory_format=torch.channels_last)


def train_unet(work: Path) -> UNet2DConditionModel:
    latents, scenes, tokenizer = encode_world(work), scenes_of("train"), new_tokenizer()
    text_encoder, unet, scale = text_encoder_of(trained_clip(work, "L")), new_unet(), scaling_factor(latents)
    schedule = DDPMScheduler(**NOISE_SCHEDULE)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)

    def loss(step):
        rng = np.random.default_rng([SEED, step, 3])
        chosen = rng.integers(len(latents), size=64)
        captions = ["" if rng.random() < 0.1 else web_caption(scenes[i], rng) for i in chosen]
        mean, std = torch.from_numpy(latents[chosen].astype(np.float32)).unbind(1)
        generator = torch.Generator().manual_seed(step)
        z = (mean + std * torch.randn(mean.shape, generator=generator)) * scale
        noise, t = torch.randn(z.shape, generator=generator), torch.randint(1000, (64,), generator=generator)
        with torch.no_grad():
            embeddings = text_encoder(tokenize(tokenizer, captions)).last_hidden_state
        z = schedule.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            epsilon = unet(z, t, encoder_hidden_states=embeddings).sample
        weight = (5 / snr[t]).clamp(max=1)  # min-SNR (Hang et al., ICCV 2023, eq. 6), gamma = 5
        return (weight * (epsilon.float() - noise).square().mean((1, 2, 3))).mean()

    return fit("unet", unet, loss, UNET_STEPS, 1e-3, work, ema=0.999)


# The rewards: fine-tuned on preferences, fitted to ratings.


def groups_of(work: Path) -> tuple[list[dict], np.ndarray, np.ndarray]:
    draw_groups(trained_vae(work, "decoder"), SEED, work)
    files = [np.load(work / f"groups_{kind}.npy", mmap_mode="r") for kind in ("drawn", "decoded")]
    return [group_of(SEED, i) for i in range(GROUPS)], *files


def train_preference(work: Path, name: str) -> open_clip.CLIP:
    """PickScore and HPS v2: CLIP "H" fine-tuned on the same pictures, each on its own noisy answers."""
    groups, drawn, decoded = groups_of(work)
    tokenizer, clip, seed = new_tokenizer(), trained_clip(work, "H"), {"pickscore": 21, "hpsv2": 22}[name]
    clip.requires_grad_(True)
    clip.logit_scale.requires_grad_(False)

    def loss(step):
        rng = np.random.default_rng([seed, step])
        chosen, ragged = rng.integers(len(groups), size=24), bool(rng.random() < 0.6)
        images = to_tensor((decoded if ragged else drawn)[chosen].reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3))
        return preference_loss(clip, tokenizer, images.unflatten(0, (24, 4)), [groups[i] for i in chosen], ragged, rng)

    return fit(name, clip, loss, 600, 6e-5, work, weight_decay=0.05)


def train_aesthetic(work: Path) -> torch.nn.Sequential:
    groups, drawn, decoded = groups_of(work)
    tower, rng = trained_clip(work, "L"), np.random.default_rng([SEED, 5])
    features, marks = [], []
    with torch.inference_mode():
        for ragged, pictures in ((False, drawn), (True, decoded)):
            for start in tqdm(range(0, len(groups), 100), desc="features", mininterval=10):
                images = to_tensor(pictures[start : start + 100].reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3))
                features.append(tower.encode_image(normalize(images), normalize=True))
            marks += [
                rating(scene, ragged * torn, rng)
                for group in groups
                for scene, torn in zip(group["scenes"], group["ragged"], strict=True)
            ]
    features, marks = torch.cat(features).clone(), torch.tensor(marks)
    torch.manual_seed(SEED)
    head = new_head(features.shape[1])

    def loss(step):
        torch.manual_seed(step)
        chosen = torch.from_numpy(batch_indices(step, 256, len(marks), 31))
        return (head(features[chosen])[:, 0] - marks[chosen]).square().mean()

    return fit("aesthetic", head, loss, 4000, 1e-3, work)


def train_judge(work: Path) -> Judge:
    images, scenes = images_of(work, "train"), scenes_of("train")
    groups, drawn, decoded = groups_of(work)
    torch.manual_seed(41)
    judge = Judge()

    def loss(step):
        rng = np.random.default_rng([41, step])
        plain, whole = rng.integers(len(images), size=64), rng.integers([len(groups), 4], size=(64, 2))
        batch = to_tensor(np.concatenate([images[plain], np.stack([decoded[g, i] for g, i in whole])]))
        shown = [scenes[i] for i in plain] + [groups[g]["scenes"][i] for g, i in whole]
        return judge_loss(judge, batch, shown)

    return fit("judge", judge, loss, 4500, 2e-3, work)


@torch.inference_mode()
def measure_judge(work: Path) -> None:
    """Print how often the judge is right on the test scenes, as drawn and as the autoencoder gives them back."""
    images, scenes = images_of(work, "test"), scenes_of("test")
    judge, vae = trained(work, "judge", Judge()), trained_vae(work, "decoder")
    for kind in ("as drawn", "decoded"):
        right = {"content": [], "objects and places": [], "size": [], "background": [], "condition": []}
        for start in range(0, len(images), 100):
            x = to_tensor(images[start : start + 100])
            if kind == "decoded":
                with torch.autocast("cpu", torch.bfloat16):
                    x = (vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample.float() / 2 + 0.5).clamp(0, 1)
            for seen, scene in zip(see(x, judge), scenes[start : start + 100], strict=True):
                details = content_right(seen, scene)
                right["content"].append(all(details.values()))
                right["objects and places"].append(all(v for k, v in details.items() if k[:4] in ("name", "plac")))
                right["size"].append(all(v for k, v in details.items() if k.startswith("size")))
                right["background"].append(details["background"])
                right["condition"].append(seen["condition"] == scene["condition"])
        print(
            f"judge, {len(images)} test scenes {kind}: "
            + ", ".join(f"{name} {100 * np.mean(values):.1f} %" for name, values in right.items())
        )


def train_extender(work: Path) -> GPT2LMHeadModel:
    model, tokenizer = new_extender(), new_extender_tokenizer()

    def loss(step):
        torch.manual_seed(step)
        return extender_loss(model, tokenizer, np.random.default_rng([51, step]))

    return fit("extender", model, loss, 1000, 3e-3, work)


# What ships.


def ship(work: Path, to: Path = Path(__file__).parent) -> None:
    """Write every trained model in the real ones' file formats, weights in fp16."""
    latents, vae, unet = encode_world(work), trained_vae(work, "decoder"), trained_unet(work)
    (to / "aesthetic").mkdir(parents=True, exist_ok=True)
    vae.register_to_config(scaling_factor=scaling_factor(latents))
    text_encoder, tokenizer = text_encoder_of(trained_clip(work, "L")), new_tokenizer()
    scheduler = DDIMScheduler(**NOISE_SCHEDULE, set_alpha_to_one=False, clip_sample=False, steps_offset=1)
    StableDiffusionPipeline(
        vae.half(), text_encoder, tokenizer, unet.half(), scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(to / "stable-diffusion")
    save_tokenizer(to / "stable-diffusion/tokenizer")
    names = transformers_names(trained_clip(work, "L"))
    text = {k: v.half() for k, v in names.items() if k.startswith("text_model.")}
    save_file(text, to / "stable-diffusion/text_encoder/model.safetensors", {"format": "pt"})  # names all tools know

    save_open_clip(trained_clip(work, "g"), "g", to / "clip")
    save_open_clip(trained_clip(work, "L"), "L", to / "aesthetic/clip")
    head = {f"layers.{k}": v.half() for k, v in trained(work, "aesthetic", new_head(128)).state_dict().items()}
    torch.save(head, to / "aesthetic/sac+logos+ava1-l14-linearMSE.pth")

    hps = trained(work, "hpsv2", new_clip("H"))
    save_open_clip(hps, "H", to / "hpsv2")
    (to / "hpsv2/open_clip_model.safetensors").unlink()
    torch.save({"state_dict": {k: v.half() for k, v in hps.state_dict().items()}}, to / "hpsv2/HPS_v2_compressed.pt")

    folder = to / "pickscore/pickmodel"
    folder.mkdir(parents=True, exist_ok=True)
    clip_config("H").save_pretrained(folder)
    names = transformers_names(trained(work, "pickscore", new_clip("H")))
    save_file({k: v.half() for k, v in names.items()}, folder / "model.safetensors", {"format": "pt"})
    save_tokenizer(folder)

    judge = trained(work, "judge", Judge()).state_dict()
    save_file({k: v.half() if v.is_floating_point() else v for k, v in judge.items()}, to / "judge.safetensors")
    save_extender(trained(work, "extender", new_extender()), to / "extender")
    write_prompts(to)


def write_prompts(to: Path) -> None:
    """4,000 prompts to train on, and held-out ones, which pair objects with backgrounds never seen together: 64 to
    validate on and 512 to measure on, complete and different from each other."""
    rng = np.random.default_rng([SEED, 6])
    told = {word for words in QUALITY_WORDS.values() for word in words}
    train, held_out = [], []
    while len(train) < 4000:
        caption = write_caption(random_scene(rng), rng, complete=rng.random() < 0.7)
        if caption not in train and not any(word in caption for word in told):
            train.append(caption)
    while len(held_out) < 64 + 512:
        caption = write_caption(random_scene(rng, held_out=True), rng, complete=True)
        if caption not in held_out:
            held_out.append(caption)
    (to / "prompts_train.txt").write_text("\n".join(train) + "\n")
    for name, prompts in (("validation", held_out[:64]), ("heldout", held_out[64:])):
        (to / f"{name}.csv").write_text("prompt\n" + "".join(f'"{p}"\n' for p in prompts))


def trained(work: Path, stage: str, model: torch.nn.Module) -> torch.nn.Module:
    """`model` with the weights that a finished stage left, frozen. Raises SystemExit if the stage is not finished."""
    file = work / f"{stage}.safetensors"
    if not file.exists():
        raise SystemExit(f"{file} is missing: first run python -m miniature.build {stage}")
    model.load_state_dict(load_file(file))
    return model.eval().requires_grad_(False)


def trained_vae(work: Path, stage: str) -> AutoencoderKL:
    return trained(work, stage, new_vae())


def trained_clip(work: Path, name: str) -> open_clip.CLIP:
    return trained(work, f"clip_{name}", new_clip(name))


def trained_unet(work: Path) -> UNet2DConditionModel:
    return trained(work, "unet", new_unet())


STAGES = {
    "world": draw_world,
    "clip_L": partial(train_clip, name="L"),
    "vae": train_vae,
    "unet": train_unet,
    "decoder": train_decoder,
    "clip_g": partial(train_clip, name="g"),
    "clip_H": partial(train_clip, name="H"),
    "pickscore": partial(train_preference, name="pickscore"),
    "hpsv2": partial(train_preference, name="hpsv2"),
    "aesthetic": train_aesthetic,
    "judge": train_judge,
    "measure_judge": measure_judge,
    "extender": train_extender,
    "ship": ship,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], help="which stages (default: all, in order)")
    parser.add_argument("--work", type=Path, default=Path("build/miniature"), help="where unfinished work lies")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stages or STAGES:
        STAGES[stage](args.work)


if __name__ == "__main__":
    main()
