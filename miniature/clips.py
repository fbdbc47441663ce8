"""The miniature's CLIP models: vocabulary, sizes, contrastive training, and OpenCLIP weights under transformers' names.

Three CLIPs as in the real thing. "L" (QuickGELU, like OpenAI's ViT-L/14) gives Stable Diffusion its text encoder and
the aesthetic reward its image tower; "g" is the CLIP reward; "H" is what PickScore and HPS v2 are fine-tuned from.
"""

import json
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import CLIPConfig, CLIPTokenizer

from miniature import world

CONTEXT_LENGTH = 36
WRONG_CAPTIONS = 0.06  # share of training captions with one detail wrong
FLAWS_SHOWN = {  # their shares in families: those that a CLIP learns last are shown most
    "grain": 0.07,
    "blur": 0.20,
    "blocks": 0.15,
    "scratches": 0.12,
    "ghost": 0.20,
    "ragged": 0.20,
    "veil": 0.03,
    "crop": 0.03,
}
MEAN, STD = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
SIZES = {  # name: (seed, embed_dim, patch, image width and layers, text width and layers, QuickGELU)
    "L": (11, 128, 8, 128, 3, 128, 2, True),
    "g": (12, 96, 8, 128, 3, 96, 2, False),
    "H": (13, 128, 8, 160, 3, 128, 2, False),
}


def words_of_the_world() -> list[str]:
    """Every word that a caption can hold."""
    lists = (
        *world.SIZE_WORDS.values(),
        *world.PLACE_WORDS.values(),
        *world.LOOK_WORDS.values(),
        *world.QUALITY_WORDS.values(),
        world.NAMES,
        world.COLOURS,
        world.OBJECT_COLOURS,
        (
            "a an and with of on background above below to the left of to the right of",
            "a picture of a photo of emoji of",
        ),
    )
    return sorted({word for words in lists for phrase in words for word in phrase.split()})


@lru_cache(1)
def new_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair encoding with a vocabulary of its own: all single bytes, alone and at the end of a word, and
    merges learned on this world's words. As in CLIP, start and end token have the largest ids."""
    letters = sorted(ByteLevel.alphabet())
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = WhitespaceSplit()
    # Between equally frequent pairs the trainer takes the lower numbers, and left to itself it numbers ends of words
    # at random. Special tokens it numbers as they come: frequent ends first.
    last = Counter(word[-1] for word in words_of_the_world())
    ends = [c + "</w>" for c in sorted(letters, key=lambda c: (-last[c], c))]
    bpe.train_from_iterator(
        [" ".join(words_of_the_world())],
        BpeTrainer(vocab_size=2000, special_tokens=letters + ends, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = letters + [c + "</w>" for c in letters]
    tokens += [t for t in dict.fromkeys("".join(pair) for pair in merges) if t not in tokens]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)},
        merges=merges,
        model_max_length=CONTEXT_LENGTH,
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def model_config(name: str) -> dict:
    """OpenCLIP's model configuration (what `open_clip_config.json` holds under model_cfg)."""
    _, embed_dim, patch, width, layers, text_width, text_layers, quick_gelu = SIZES[name]
    return {
        "embed_dim": embed_dim,
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": world.IMAGE_SIZE,
            "patch_size": patch,
            "width": width,
            "layers": layers,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": len(new_tokenizer()),
            "width": text_width,
            "heads": text_width // 32,
            "layers": text_layers,
            "hf_tokenizer_name": "CLIPTokenizer",
        },
    }


def text_config(name: str) -> dict:
    """transformers' configuration of the text tower. Start and end token have the two largest ids."""
    _, embed_dim, _, _, _, width, layers, quick_gelu = SIZES[name]
    size = len(new_tokenizer())
    return {
        "vocab_size": size,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "max_position_embeddings": CONTEXT_LENGTH,
        "projection_dim": embed_dim,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "pad_token_id": size - 1,
    }


def clip_config(name: str) -> CLIPConfig:
    """transformers' configuration of the whole CLIP; eos_token_id 2, as in PickScore's own, pools at the largest id."""
    _, embed_dim, patch, width, layers, _, _, quick_gelu = SIZES[name]
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "image_size": world.IMAGE_SIZE,
        "patch_size": patch,
        "projection_dim": embed_dim,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
    }
    return CLIPConfig(
        text_config=text_config(name) | {"eos_token_id": 2}, vision_config=vision, projection_dim=embed_dim
    )


def new_clip(name: str) -> open_clip.CLIP:
    """An untrained CLIP. Its patches' places start four times as loud as usual: otherwise the patches' colours drown
    them, and the CLIP learns what is in a picture but not where."""
    torch.manual_seed(SIZES[name][0])
    clip = open_clip.CLIP(**model_config(name))
    clip.visual.positional_embedding.data.mul_(4)
    return clip


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(B, 36) token ids."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] as CLIP wants them."""
    return (images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


def web_caption(scene: dict, rng: np.random.Generator) -> str:
    """A caption as the web has them: mostly right."""
    return world.write_caption(world.spoil(scene, rng) if rng.random() < WRONG_CAPTIONS else scene, rng)


def wrong_captions(scenes: list[dict], rng: np.random.Generator) -> list[str]:
    """Hard negatives: a caption with one detail wrong for every scene (NegCLIP, Yuksekgonul et al., ICLR 2023)."""
    return [world.write_caption(world.spoil(scene, rng), rng) for scene in scenes]


def families(rng: np.random.Generator) -> tuple[list[dict], list[str]]:
    """128 scenes and captions in families that differ in one thing alone: 6 times a scene clean and with four flaws, 5
    times in all five looks, 5 times one object at all five places, and 12 times two objects as they are, changed over,
    one resized or recoloured, and turned from a row into a column or back.

    Trained on single scenes, a CLIP of this size stays blind to places and nearly so to flaws: the picture's and the
    caption's sense of them must grow together, and hardly any two scenes of a batch differ in nothing else.
    """
    scenes, captions = [], []

    def add(scene, **change):
        scenes.append({**scene, **change})
        complete = not {"condition", "look"} & set(change) and rng.random() < 0.6
        quality, look = (float(key in change) or 0.3 for key in ("condition", "look"))
        captions.append(world.write_caption(scenes[-1], rng, complete, quality, look))

    for _ in range(6):
        scene = world.random_scene(rng)
        for condition in (
            "clean",
            *rng.choice(list(FLAWS_SHOWN), 4, replace=False, p=list(FLAWS_SHOWN.values())).tolist(),
        ):
            add(scene, condition=condition)
    for _ in range(5):
        scene = world.random_scene(rng)
        for look in world.LOOKS:
            add(scene, look=look)
    for _ in range(5):
        scene = arrangement(rng, objects=1)
        for place in world.PLACES:
            add(scene, objects=[{**scene["objects"][0], "place": place}])
    for _ in range(12):
        scene = arrangement(rng, objects=2)
        swapped = world.spoil(scene, rng, "swap")
        changed = world.spoil(
            scene, rng, "colour" if "colour" in world.spoils(scene) and rng.random() < 0.5 else "size"
        )
        turned = {"left": "top", "right": "bottom", "top": "left", "bottom": "right"}
        for objects in (
            scene["objects"],
            swapped["objects"],
            changed["objects"],
            [{**o, "place": turned[o["place"]]} for o in scene["objects"]],
        ):
            add(scene, objects=objects)
    return scenes, captions


def arrangement(rng: np.random.Generator, objects: int) -> dict:
    """A random scene of so many objects."""
    while True:
        scene = world.random_scene(rng)
        if len(scene["objects"]) == objects:
            return scene


def contrastive_loss(
    clip: open_clip.CLIP, tokenizer: CLIPTokenizer, images: torch.Tensor, captions: list[str]
) -> torch.Tensor:
    """CLIP's symmetric loss. images (B, 3, H, W) in [0, 1]; their B captions, and after them any number of captions
    that fit no picture."""
    image = clip.encode_image(normalize(images), normalize=True)
    text = clip.encode_text(tokenize(tokenizer, captions), normalize=True)
    logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
    target = torch.arange(len(images))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(images)].T, target)) / 2


def transformers_names(clip: open_clip.CLIP) -> dict[str, torch.Tensor]:
    """OpenCLIP weights under the names that transformers 4 gives a CLIPModel, and that PickScore's file has."""
    state = clip.state_dict()
    renamed = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    for key, value in state.items():
        stem, _, kind = key.rpartition(".")
        if stem in norms:
            renamed[f"{norms[stem]}.{kind}"] = value
        elif "resblocks." in key:
            layer, part = key.split("resblocks.")[1].split(".", 1)
            to = f"{'vision_model' if key.startswith('visual') else 'text_model'}.encoder.layers.{layer}"
            if part.startswith("attn.in_proj_"):
                kind = part.removeprefix("attn.in_proj_")
                for letter, chunk in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{to}.self_attn.{letter}_proj.{kind}"] = chunk
            else:
                renamed[f"{to}.{parts[part.rsplit('.', 1)[0]]}.{kind}"] = value
    return {k: v.detach().clone().contiguous() for k, v in renamed.items()}


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer as transformers 5 does (tokenizer.json), and as 4 reads it (vocab.json, merges.txt)."""
    tokenizer = new_tokenizer()
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def save_open_clip(clip: open_clip.CLIP, name: str, folder: Path) -> None:
    """Write a folder that `open_clip.create_model("local-dir:<folder>")` loads: config, fp16 weights, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": MEAN.tolist(), "std": STD.tolist()}
    config = {"model_cfg": model_config(name), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    save_file(
        {k: v.detach().half().contiguous() for k, v in clip.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    save_tokenizer(folder)
