"""The model card of an exported text encoder: how to use it, what it was trained with, what that changed."""

import re
from pathlib import Path

import safetensors
from huggingface_hub import ModelCardData

from rewards import REWARDS
from textcraftor.downloads import SOURCES
from textcraftor.errors import UserError, first_line
from textcraftor.options import TEST_STEPS, TEST_TUNED_STEPS
from textcraftor.run_folder import OPTIONS_FILE, read_options, read_rows
from textcraftor.statistics import paired_interval
from textcraftor.validation import load_look

PAPER = "https://arxiv.org/abs/2403.18978"
PICTURE = "before_after.png"
# Options of a run that the card names, if the run has them and they are not off; never paths, which are private.
SETTINGS = {
    "images per step": "images per update",
    "method": "method",
    "lr_text": "learning rate, text encoder",
    "lr_unet": "learning rate, UNet",
    "step": "sampling steps",
    "gradient": "gradient",
    "grad_steps": "steps with gradient",
    "driven": "of the last steps",
    "tune_unconditional": "empty prompt tuned",
    "reuse": "uses of each trajectory",
    "lora_rank": "LoRA rank",
    "guidance": "guidance scale",
    "clip_constraint": "CLIP constraint",
    "anchor": "anchor",
    "shared_text": "weight of the shared text direction",
    "smooth": "smoothing",
    "ema": "moving average",
    "seed": "seed",
}
OFF = {
    "lr_unet": 0,
    "reuse": 1,
    "lora_rank": 0,
    "clip_constraint": 0,
    "anchor": 0,
    "shared_text": 1,
    "smooth": 0,
    "ema": 0,
}

# Loads the tuned text encoder, leaves `tuned` as the embeddings, and puts the original one back.
WHOLE = """\
pipe = StableDiffusionPipeline.{load}
{embed}
pipe.text_encoder = CLIPTextModel.from_pretrained("{base}", subfolder="text_encoder")"""
LORA = """\
pipe = StableDiffusionPipeline.from_pretrained("{base}")
pipe.load_lora_weights("{repo}", weight_name="{file}")
{embed}
pipe.unload_lora_weights()"""
CODE = {
    "diffusers": WHOLE.replace("{load}", 'from_pretrained("{repo}")'),
    "checkpoint": WHOLE.replace("{load}", 'from_single_file("https://huggingface.co/{repo}/blob/main/{file}")'),
    "lora": LORA,
    "lora_kohya": LORA,
    "text_encoder": """\
pipe = StableDiffusionPipeline.from_pretrained("{base}")
original, pipe.text_encoder = pipe.text_encoder, CLIPTextModel.from_pretrained("{repo}")
{embed}
pipe.text_encoder = original""",
}
BEGIN = """\
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextModel

prompt = "a red fox in the snow"
"""
EMBED = """\
with torch.no_grad():
    tuned = torch.cat(pipe.encode_prompt(prompt, pipe.device, 1, True)[::-1])"""
# The negative prompt's embeddings come first in `tuned`.
ORIGINAL_NEGATIVE = """
tuned[:1] = pipe.encode_prompt(prompt, pipe.device, 1, True)[1].detach()  # the negative prompt stays the original's"""
# --prompt_weighting: the original encoder keeps the rest.
WEIGHTED = """
with torch.no_grad():
    tuned = torch.cat(pipe.encode_prompt(prompt, pipe.device, 1, True)[::-1]).lerp(tuned, {weighting:g})"""
SCHEDULER = """
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
"""
SWITCH = """\
switch = lambda pipe, step, t, tensors: {{"prompt_embeds": tuned}} if step >= {last_original} else {{}}
settings = {{"num_inference_steps": {steps}, "guidance_scale": {guidance:g}}}
image = pipe(prompt, **settings, callback_on_step_end=switch).images[0]
"""
# A callback comes after a step, so it cannot change the first.
NO_SWITCH = """\
settings = {{"num_inference_steps": {steps}, "guidance_scale": {guidance:g}}}
image = pipe(prompt_embeds=tuned[1:], negative_prompt_embeds=tuned[:1], **settings).images[0]
"""
COMFYUI = {
    "clip_l": "Put `{file}` into `models/text_encoders/`; load it with *Load CLIP*, type `stable_diffusion`.",
    "checkpoint": "Put `{file}` into `models/checkpoints/`. In A1111: `models/Stable-diffusion/`.",
    "lora": "Put `{file}` into `models/loras/`; load it with *Load LoRA*.",
    "lora_kohya": "Put `{file}` into `models/loras/`; load it with *Load LoRA*. In A1111: `models/Lora/`.",
}
COMFYUI_SWITCH = (
    "To keep the original encoder in the first steps, encode {prompts} with both, pass the original's through "
    "*ConditioningSetTimestepRange* with 0 to {share:g} and the tuned one's with {share:g} to 1, and join them with "
    "*ConditioningCombine*."
)
COMFYUI_WEIGHTED = (
    " Before that, mix both by *ConditioningAverage*: `conditioning_to` is the tuned one's, `conditioning_to_strength` "
    "{weighting:g}."
)


def find_run(run: str, text_path: str) -> Path | None:
    """The output folder of the training run that --run names or that the weights lie in, if there is one."""
    folder = Path(run or Path(text_path).parent)
    return folder if (folder / OPTIONS_FILE).is_file() else None


def model_card(repo: str, form: str, file: str, model: str, training: list[str], note: str, settings: dict) -> str:
    """README.md of a hub repository, its metadata included.

    repo: USER/NAME; form: of exporting.options; file: the name of the exported file; model: the base model; training:
    sections on the training run, see run_parts; note: what export says of the file; settings: how the encoder was
    trained to sample, see recorded.recorded_settings.
    """
    base, known = base_model(model)
    data = ModelCardData(
        license="creativeml-openrail-m", library_name="diffusers", pipeline_tag="text-to-image",
        tags=["textcraftor", "stable-diffusion", *(["lora"] if "lora" in form else [])],
        base_model=base if known else None,
    )  # fmt: skip
    names = {"repo": repo, "file": file, "base": base}
    steps, tuned_steps = settings.get("step", TEST_STEPS), settings.get("grad_steps", TEST_TUNED_STEPS)
    first, both = steps - tuned_steps, settings.get("tune_unconditional", "on") == "on"
    weighting = settings.get("prompt_weighting", 1)
    mixed = "" if weighting == 1 else f", its embeddings weighted {weighting:g} and the original ones {1 - weighting:g}"
    parts = [f"---\n{data.to_yaml()}\n---\n# {repo.split('/')[1]}"]
    parts += [
        f"The text encoder of {base}, fine-tuned with rewards by [TextCraftor]({PAPER}). The original encoder drives "
        f"the first {first} of {steps} steps, this one the last {tuned_steps}{mixed}"
        f"{'.' if both else ', and the original one the negative prompt in all of them.'}"
    ]
    if form in CODE:
        switch = SCHEDULER + (SWITCH if first else NO_SWITCH).format(
            last_original=first - 1, steps=steps, guidance=settings.get("guidance", 7.5)
        )
        code = CODE[form].format(**names, embed=EMBED) + ("" if both else ORIGINAL_NEGATIVE)
        code += "" if weighting == 1 else WEIGHTED.format(weighting=weighting)
        parts += [f"## In diffusers\n\n```python\n{BEGIN}{code}{switch}```"]
    if form in COMFYUI:
        prompts = "the prompts" if both else "the prompt, but not the negative one,"
        switch = COMFYUI_SWITCH.format(prompts=prompts, share=round(first / steps, 3))
        switch += "" if weighting == 1 else COMFYUI_WEIGHTED.format(weighting=weighting)
        parts += [f"## In ComfyUI\n\n{COMFYUI[form].format(**names)} {switch}"]
    if "lora" in form:
        parts += [f"This LoRA approximates the difference of two encoders. {note[:1].upper()}{note[1:]}."]
    return "\n\n".join([*parts, *training]) + "\n"


def base_model(model: str) -> tuple[str, bool]:
    """(name of the base model for the card, whether the hub knows it by that name)."""
    path = Path(model)
    if path.name == "stable-diffusion-v1-5":
        return SOURCES["sd"][0].repo, True
    return (path.name, False) if path.exists() else (model, True)


def run_parts(run: Path | None, text_path: str) -> list[str]:
    """The card's sections on a training run: rewards, settings, scores before and after, pictures; none without a run.

    text_path: the weights of the run that are exported. Raises UserError if the run's files are damaged.
    """
    if run is None:
        return []
    options = read_options(run)
    rewards = options.get("reward weights") or {name: options[name] for name in REWARDS if options.get(name)}
    lines = ["## Training", "", "| reward | weight |", "| --- | --- |"]
    lines += [f"| {name} | {weight:g} |" for name, weight in rewards.items()]
    lines += ["", "| setting | |", "| --- | --- |"]
    off = OFF | ({"driven": options.get("driven")} if options.get("gradient", "last_k") == "last_k" else {})
    told = {text: options[name] for name, text in SETTINGS.items() if options.get(name) not in (None, off.get(name))}
    lines += [
        f"| {text} | {value:g} |" if isinstance(value, float) else f"| {text} | {value} |"
        for text, value in told.items()
    ]
    rows = read_metrics(run / "metrics.csv")
    step = step_of(text_path, rows, run)
    lines += [f"| updates | {step:g} |"] if step else []
    parts = ["\n".join(lines)]
    before, after = (next((row for row in rows if row["step"] == number), {}) for number in (0, step))
    names = [name for name in after if name.startswith("val_") and name in before]
    # With --ema, the scores and pictures are those of the average, whatever lies in the file of the newest weights.
    shown = not options.get("ema") or Path(text_path).stem.endswith(("_best", "_ema"))
    if shown and step and names:
        lines = [f"## Held-out prompts, before and after {step:g} updates", ""]
        lines += ["| score | before | after | change | 95 % interval |", "| --- | --- | --- | --- | --- |"]
        intervals = paired_intervals(run) if step == shown_step(run, rows) else {}
        for name in names:
            change = after[name] - before[name]
            low_high = "{:+.4f} … {:+.4f}".format(*intervals[name][1:]) if name in intervals else ""
            cells = (name.removeprefix("val_"), f"{before[name]:.4f}", f"{after[name]:.4f}", f"{change:+.4f}", low_high)
            lines += [f"| {' | '.join(cells)} |"]
        parts += ["\n".join(lines)]
    if shown and step == shown_step(run, rows) and (run / PICTURE).is_file():
        parts += [f"![held-out prompts before and after tuning]({PICTURE})"]
    return parts


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv; empty cells are left out. Raises UserError if the file is damaged."""
    try:
        return read_rows(path)
    except (OSError, ValueError, TypeError) as problem:
        raise UserError(
            f"{path}: cannot be read ({first_line(problem)}); name another training run with --run"
        ) from problem


def shown_step(run: Path, rows: list[dict[str, float]]) -> float | None:
    """The update after which before_after.png and the scores of each prompt were made."""
    look = run / "resume" / "after.safetensors"
    if look.is_file():
        with safetensors.safe_open(look, "pt") as file:
            if "step" in (file.metadata() or {}):
                return float(file.metadata()["step"])
    return rows[-1]["step"] if rows else None  # a run of an earlier version, which made them at its end


def step_of(text_path: str, rows: list[dict[str, float]], run: Path) -> float | None:
    """The update after which the weights were saved, as their file's name tells; None if it does not."""
    path = Path(text_path)
    if path.stem.endswith("_best"):
        best = max((row for row in rows if "val_total" in row), key=lambda row: row["val_total"], default={})
        return best.get("step")
    if path.stem.endswith("_ema"):  # written with the newest checkpoint
        path = run / f"{path.stem.removesuffix('_ema')}.safetensors"
    if number := re.search(r"_iter_(\d+)$", path.resolve().stem):  # tc_text.safetensors is a link to the newest
        return float(number[1])
    return None


def paired_intervals(run: Path) -> dict[str, tuple[float, float, float]]:
    """{column of metrics.csv: (mean change, low, high)} from the scores of each prompt, where the run has kept them."""
    looks = [run / "resume" / name for name in ("before.safetensors", "after.safetensors")]
    if not all(look.is_file() for look in looks):
        return {}
    before, after = (load_look(look)[0] for look in looks)
    return {f"val_{name}": paired_interval(before[name], after[name]) for name in after if name in before}
