"""Build the miniature from nothing: draw the world, train every model on it, write and measure the folders that ship.

    python -m miniature.build                     # everything, stage by stage; stop and start again at will
    python -m miniature.build vae unet            # some stages only
    python -m miniature.build --work FOLDER       # where unfinished work lies (default: .miniature_build)

Takes up to five hours on two cores without bf16 instructions; a build that is stopped, at any moment, goes on where it
was two minutes earlier and ends with the same weights. What it measures, which commit made what, how long it took and
the weights' hashes are in miniature/build.json.

Needs the font Noto Color Emoji (Debian and Ubuntu: apt-get install fonts-noto-color-emoji).
"""

import argparse
import functools
import hashlib
import json
import subprocess
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
from miniature.fit import core_seconds, fit, in_parts
from miniature.judge import Judge, judge_loss
from miniature.measure import measure_all
from miniature.preferences import (
    FAVOURITES,
    GROUP,
    GROUPS,
    TORN_STD,
    draw_group,
    group_of,
    new_head,
    preference_loss,
    rating,
)
from miniature.world import IMAGE_SIZE, QUALITY_WORDS, random_scene, render, write_caption
from textcraftor.errors import UserError, run_program

HERE = Path(__file__).parent
SEED = 0
PICTURES, DECODED = 48_000, 20_000  # in all, and those kept as the autoencoder gives them back
LATENTS = (4, 16, 16)
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
STEPS = {
    "vae": 2_400,
    "clip_L_web": 700,
    "clip_L": 1_000,
    "clip_g_web": 600,
    "clip_g": 1_100,
    "clip_H_web": 600,
    "clip_H": 1_200,
    "unet": 4_000,
    "pickscore": 750,
    "hpsv2": 750,
    "aesthetic": 4_000,
    "judge": 5_000,
    "extender": 1_000,
}


# The world, drawn once.


def scene_of(index: int) -> dict:
    """Training scene number `index`; it depends on (SEED, index) alone and pairs nothing that is held out."""
    return random_scene(np.random.default_rng([SEED, index]))


def picture_of(index: int) -> np.ndarray:
    return render(scene_of(index), np.random.default_rng([SEED, index, 1]))


def scenes() -> list[dict]:
    return [scene_of(i) for i in range(PICTURES)]


def pictures(work: Path) -> np.ndarray:
    """All training pictures, uint8 (PICTURES, 64, 64, 3)."""
    with Pool(2) as pool:
        return in_parts(
            work / "pictures.npy", PICTURES, 4000, lambda rows: np.stack(pool.map(picture_of, rows, chunksize=50))
        )


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [0, 1], channels last in memory."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """float (B, 3, H, W) in [0, 1] -> uint8 (B, H, W, 3)."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def batch_indices(step: int, size: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, step]).integers(count, size=size)


# The autoencoder.


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder. Its residual branches start at zero: it finds the pictures' colours sooner so."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        latent_channels=LATENTS[0],
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    for name, layer in vae.named_modules():
        if name.endswith(".conv2"):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    vae.quant_conv.bias.data[LATENTS[0] :] = -5  # start with little noise on the latents
    return vae.to(memory_format=torch.channels_last)


def picture_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error, which finds the colours, and absolute errors of the pixels and of their differences to the next
    pixel, which keep edges sharp. (B, 3, H, W) in [-1, 1] -> scalar."""
    error = output - target
    return (
        4 * error.square().mean()
        + (error.abs().mean() + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2
    )


def train_vae(work: Path) -> AutoencoderKL:
    images, vae = pictures(work), new_vae()
    clean = np.array([i for i, scene in enumerate(scenes()) if scene["condition"] == "clean"])

    def loss(step):
        """Half of each batch is clean, so that clean pictures come out sharpest."""
        rng = np.random.default_rng([SEED, 1, step])
        chosen = np.concatenate([rng.choice(clean, 8), rng.integers(len(images), size=8)])
        x = to_tensor(images[chosen]) * 2 - 1
        torch.manual_seed(step)
        latents = vae.encode(x).latent_dist
        loss = picture_loss(vae.decode(latents.sample()).sample, x)
        return loss + 2e-4 * latents.kl().mean() / latents.mean[0].numel()

    return fit("vae", vae, loss, STEPS["vae"], 5e-4, work, ema=0.995)


@torch.inference_mode()
def latents_of(work: Path) -> np.ndarray:
    """All training pictures as latents: fp16 (PICTURES, 2, 4, 16, 16), mean and standard deviation."""
    images, vae = pictures(work), trained(work, "vae", new_vae())

    def encode(rows):
        parts = []
        for start in range(rows.start, rows.stop, 200):
            latents = vae.encode(to_tensor(images[start : start + 200]) * 2 - 1).latent_dist
            parts.append(torch.stack([latents.mean, latents.std], dim=1).half().numpy())
        return np.concatenate(parts)

    return in_parts(work / "latents.npy", PICTURES, 4000, encode)


def scaling_factor(latents: np.ndarray) -> float:
    """1 / standard deviation of the latents, so that the UNet sees unit variance (Rombach et al., section D.1)."""
    sample = torch.from_numpy(latents[:4000].astype(np.float32))
    return round(1 / (sample[:, 0].var() + sample[:, 1].square().mean()).sqrt().item(), 5)


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, 4, 16, 16) as the encoder gives them -> images (B, 3, 64, 64) in [0, 1]."""
    pictures = vae.decode(latents.contiguous(memory_format=torch.channels_last)).sample
    return (pictures / 2 + 0.5).clamp(0, 1)


@torch.inference_mode()
def decoded(work: Path) -> np.ndarray:
    """The first DECODED training pictures as the autoencoder gives them back, uint8 (DECODED, 64, 64, 3)."""
    latents, vae = latents_of(work), trained(work, "vae", new_vae())

    def some(rows):
        starts = range(rows.start, rows.stop, 100)
        means = (torch.from_numpy(latents[start : start + 100, 0].astype(np.float32)) for start in starts)
        return np.concatenate([to_bytes(decode(vae, mean)) for mean in means])

    return in_parts(work / "decoded.npy", DECODED, 2000, some)


# The judge.


def train_judge(work: Path) -> Judge:
    """On pictures as drawn and as decoded, half and half."""
    images, again, shown = pictures(work), decoded(work), scenes()
    torch.manual_seed(41)
    judge = Judge()

    def loss(step):
        rng = np.random.default_rng([41, step])
        first, second = rng.integers(len(images), size=64), rng.integers(len(again), size=64)
        batch = to_tensor(np.concatenate([images[first], again[second]]))
        return judge_loss(judge, batch, [shown[i] for i in (*first, *second)])

    return fit("judge", judge, loss, STEPS["judge"], 2e-3, work)


# Three CLIPs.


def train_clip(work: Path, name: str) -> open_clip.CLIP:
    """First as on the web, one picture and one caption after another, then on families that differ in one detail."""
    images, shown, tokenizer, seed = pictures(work), scenes(), new_tokenizer(), SIZES[name][0]
    clip = new_clip(name)

    def web_loss(step):
        chosen, rng = batch_indices(step, 128, len(images), seed), np.random.default_rng([seed, step, 1])
        some = [shown[i] for i in chosen]
        captions = [web_caption(s, rng) for s in some] + wrong_captions(some, rng)
        return contrastive_loss(clip, tokenizer, to_tensor(images[chosen]), captions)

    def family_loss(step):
        rng = np.random.default_rng([seed, step, 2])
        some, captions = families(rng)
        return contrastive_loss(clip, tokenizer, to_tensor(np.stack([render(s, rng) for s in some])), captions)

    fit(f"clip_{name}_web", clip, web_loss, STEPS[f"clip_{name}_web"], 1e-3, work, weight_decay=0.05)
    clip.requires_grad_(True)
    return fit(f"clip_{name}", clip, family_loss, STEPS[f"clip_{name}"], 1e-3, work, weight_decay=0.05)


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


def new_unet() -> UNet2DConditionModel:
    torch.manual_seed(SEED)
    return UNet2DConditionModel(
        sample_size=LATENTS[1],
        in_channels=LATENTS[0],
        out_channels=LATENTS[0],
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
    ).to(memory_format=torch.channels_last)


def train_unet(work: Path) -> UNet2DConditionModel:
    latents, shown, tokenizer = latents_of(work), scenes(), new_tokenizer()
    text_encoder, unet, scale = text_encoder_of(trained_clip(work, "L")), new_unet(), scaling_factor(latents)
    schedule = DDPMScheduler(**NOISE_SCHEDULE)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)

    def loss(step):
        rng = np.random.default_rng([SEED, step, 3])
        chosen = rng.integers(len(latents), size=64)
        captions = ["" if rng.random() < 0.1 else web_caption(shown[i], rng) for i in chosen]
        mean, std = torch.from_numpy(latents[chosen].astype(np.float32)).unbind(1)
        generator = torch.Generator().manual_seed(step)
        z = (mean + std * torch.randn(mean.shape, generator=generator)) * scale
        noise, t = torch.randn(z.shape, generator=generator), torch.randint(1000, (64,), generator=generator)
        with torch.no_grad():
            embeddings = text_encoder(tokenize(tokenizer, captions)).last_hidden_state
        z = schedule.add_noise(z, noise, t).contiguous(memory_format=torch.channels_last)
        epsilon = unet(z, t, encoder_hidden_states=embeddings).sample
        weight = (5 / snr[t]).clamp(max=1)  # min-SNR (Hang et al., ICCV 2023, eq. 6), gamma = 5
        return (weight * (epsilon - noise).square().mean((1, 2, 3))).mean()

    return fit("unet", unet, loss, STEPS["unet"], 1e-3, work, ema=0.999)


# The rewards: fine-tuned on preferences, fitted to ratings.


def groups_of(work: Path) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """All groups and their pictures, uint8 (GROUPS, 8, 64, 64, 3): as drawn, and as the autoencoder gives them back
    with as much noise on the latents as each is to be torn."""
    vae, scale = trained(work, "vae", new_vae()), scaling_factor(latents_of(work))
    groups = [group_of(SEED, i) for i in range(GROUPS)]
    with Pool(2) as pool:
        drawn = in_parts(
            work / "groups_drawn.npy",
            GROUPS,
            400,
            lambda rows: np.stack(pool.starmap(draw_group, [(SEED, i) for i in rows])),
        )

    @torch.inference_mode()
    def decode_group(index):
        z = vae.encode(to_tensor(drawn[index]) * 2 - 1).latent_dist.mode()
        torn = torch.tensor(groups[index]["torn"]).float().view(-1, 1, 1, 1) * TORN_STD / scale
        noise = np.random.default_rng([SEED, index, 2]).standard_normal(z.shape, np.float32)
        return to_bytes(decode(vae, z + torn * torch.from_numpy(noise)))

    again = in_parts(work / "groups_decoded.npy", GROUPS, 200, lambda rows: np.stack([decode_group(i) for i in rows]))
    return groups, drawn, again


def train_preference(work: Path, name: str) -> open_clip.CLIP:
    """PickScore and HPS v2: CLIP "H" fine-tuned on the same pictures, each on its own crowd's noisy answers."""
    groups, drawn, again = groups_of(work)
    tokenizer, clip, seed = new_tokenizer(), trained_clip(work, "H"), {"pickscore": 21, "hpsv2": 22}[name]
    clip.requires_grad_(True)
    clip.logit_scale.requires_grad_(False)

    def loss(step):
        rng = np.random.default_rng([seed, step])
        chosen, torn = rng.choice(len(groups), size=12, replace=False), bool(rng.random() < 0.6)
        images = to_tensor((again if torn else drawn)[chosen].reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3))
        some = [groups[i] for i in chosen]
        return preference_loss(clip, tokenizer, images.unflatten(0, (12, GROUP)), some, torn, FAVOURITES[name], rng)

    return fit(name, clip, loss, STEPS[name], 1e-4, work, weight_decay=0.05)


def train_aesthetic(work: Path) -> torch.nn.Sequential:
    groups, drawn, again = groups_of(work)
    tower, rng = trained_clip(work, "L"), np.random.default_rng([SEED, 5])
    marks = [
        rating(scene, decoded * torn, rng)
        for decoded in (False, True)
        for group in groups
        for scene, torn in zip(group["scenes"], group["torn"], strict=True)
    ]

    @torch.inference_mode()
    def features(rows):
        images = (drawn if rows.start < GROUPS else again)[rows.start % GROUPS :][: len(rows)]
        parts = to_tensor(images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)).split(400)
        return torch.cat([tower.encode_image(normalize(part), normalize=True) for part in parts]).numpy()

    features = np.concatenate([features(range(i, i + 400)) for i in range(0, 2 * GROUPS, 400)])
    features, marks = torch.from_numpy(features), torch.tensor(marks, dtype=torch.float32)
    torch.manual_seed(SEED)
    head = new_head(features.shape[1])

    def loss(step):
        torch.manual_seed(step)
        chosen = torch.from_numpy(batch_indices(step, 256, len(marks), 31))
        return (head(features[chosen])[:, 0] - marks[chosen]).square().mean()

    return fit("aesthetic", head, loss, STEPS["aesthetic"], 1e-3, work)


def train_extender(work: Path) -> GPT2LMHeadModel:
    model, tokenizer = new_extender(), new_extender_tokenizer()

    def loss(step):
        torch.manual_seed(step)
        return extender_loss(model, tokenizer, np.random.default_rng([51, step]))

    return fit("extender", model, loss, STEPS["extender"], 3e-3, work)


# What ships.


def ship(work: Path, to: Path = HERE) -> None:
    """Write every trained model in the real ones' file formats, weights in fp16."""
    latents, vae, unet = latents_of(work), trained(work, "vae", new_vae()), trained(work, "unet", new_unet())
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
    head = trained(work, "aesthetic", new_head(SIZES["L"][1])).state_dict()
    torch.save({f"layers.{k}": v.half() for k, v in head.items()}, to / "aesthetic/sac+logos+ava1-l14-linearMSE.pth")

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
        caption = write_caption(random_scene(rng), rng, complete=rng.random() < 0.7, quality=0, look=0)
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
    """`model` with the weights that a finished stage left, frozen. Raises UserError if the stage is not finished."""
    file = work / f"{stage}.safetensors"
    if not file.exists():
        raise UserError(f"{file} is missing: first run python -m miniature.build {stage}")
    model.load_state_dict(load_file(file))
    return model.eval().requires_grad_(False)


def trained_clip(work: Path, name: str) -> open_clip.CLIP:
    return trained(work, f"clip_{name}", new_clip(name))


# What was done, when, by which commit.

STAGES = {
    "pictures": pictures,
    "vae": train_vae,
    "latents": latents_of,
    "decoded": decoded,
    "judge": train_judge,
    "clip_L": partial(train_clip, name="L"),
    "unet": train_unet,
    "clip_g": partial(train_clip, name="g"),
    "clip_H": partial(train_clip, name="H"),
    "groups": groups_of,
    "pickscore": partial(train_preference, name="pickscore"),
    "hpsv2": partial(train_preference, name="hpsv2"),
    "aesthetic": train_aesthetic,
    "extender": train_extender,
    "ship": ship,
}


@functools.cache  # asked first when the code on disk is what this process has read
def commit() -> str:
    """The commit that the miniature's code is at; "+" after it if the code differs from that commit."""
    git = partial(subprocess.run, cwd=HERE, capture_output=True, text=True, check=True)
    head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
    return head + ("+" if git(["git", "status", "--porcelain", "--", "*.py"]).stdout.strip() else "")


def run_stage(name: str, work: Path) -> None:
    """Run a stage, or go on with it, unless it is done; its log, NAME.json in the work folder, says by which commits
    and how many processor seconds it took. A stop loses what was done since the last save, and its seconds."""
    file = work / f"{name}.json"
    log = (
        json.loads(file.read_text()) if file.exists() else {"commits": [], "threads": [], "seconds": 0.0, "done": False}
    )
    if log["done"]:
        return
    log["commits"] = list(dict.fromkeys([*log["commits"], commit()]))
    log["threads"] = list(dict.fromkeys([*log["threads"], torch.get_num_threads()]))
    file.write_text(json.dumps(log) + "\n")
    begun = core_seconds()
    STAGES[name](work)
    seconds = log["seconds"] + core_seconds() - begun
    states = [file for file in (work / f"{name}_web.pt", work / f"{name}.pt") if file.exists()]
    if states:  # of training; they know of earlier starts
        seconds = sum(torch.load(file, weights_only=True)["seconds"] for file in states)
    log["seconds"], log["done"] = round(seconds), True
    file.write_text(json.dumps(log) + "\n")


def hashes() -> dict[str, str]:
    """{file below miniature/: sha256} of all weights that ship."""
    weights = sorted(f for f in HERE.rglob("*") if f.suffix in (".safetensors", ".pt", ".pth"))
    return {str(f.relative_to(HERE)): hashlib.sha256(f.read_bytes()).hexdigest() for f in weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, "measure", []], help="which (default: all, in order)")
    parser.add_argument("--work", type=Path, default=Path(".miniature_build"), help="folder for unfinished stages")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    commit()
    for stage in args.stages or [*STAGES, "measure"]:
        if stage in STAGES:
            run_stage(stage, args.work)
        else:
            logs = {name: json.loads((args.work / f"{name}.json").read_text()) for name in STAGES}
            record = {"stages": logs, "figures": measure_all(HERE), "weights": hashes()}
            (HERE / "build.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)
