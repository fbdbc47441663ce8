"""Stable Diffusion and the four reward models with random weights, at full and at middle size; a counter of memory."""

import json
import weakref
from itertools import pairwise

import open_clip
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from rewards.aesthetic import Aesthetic
from rewards.pickscore import PickScore
from rewards.towers import OpenClipReward
from textcraftor.embeddings import encode_prompts
from textcraftor.models import SD_V1_CONFIGS, Networks, clip_tokenizer

WEIGHTS = {"clip": 0.5, "aesthetic": 1.0, "pickscore": 1.0, "hpsv2": 1.0}  # the released script's
LEARNING_RATE = 1e-6


def full_size():
    """Configurations of SD v1.5, ViT-g-14, ViT-L/14, PickScore and HPS v2."""
    parts = ("text_encoder", "unet", "vae")
    configs = {part: json.loads((SD_V1_CONFIGS / part / "config.json").read_text()) for part in parts}
    towers = {"clip": "ViT-g-14", "aesthetic": "ViT-L-14-quickgelu", "hpsv2": "ViT-H-14"}
    configs |= {name: open_clip.get_model_config(tower) for name, tower in towers.items()}
    both = {"num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 1024}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14}
    configs["pickscore"] = {"text_config": text | both, "vision_config": vision | both, "projection_dim": 1024}
    return configs | {"head": (768, 1024, 128, 64, 16, 1)}


def middle_size():
    """The same architectures with about 1/90 of the compute: a fifth of the channels, 256 x 256 pixels, smaller towers.

    Text towers shrink most: CLIP's vocabulary keeps its size, so narrow embeddings keep its share of the memory small.
    """
    configs = full_size()
    configs["text_encoder"] |= {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 6}
    configs["unet"] |= {"block_out_channels": (64, 128, 256, 256), "sample_size": 32, "cross_attention_dim": 96}
    configs["unet"] |= {"norm_num_groups": 16}
    configs["vae"] |= {"block_out_channels": (24, 48, 96, 96), "norm_num_groups": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 6}
    for name, width, layers in (("clip", 320, 16), ("aesthetic", 192, 10), ("hpsv2", 256, 12)):
        vision = {"image_size": 224, "layers": layers, "width": width, "head_width": 64, "patch_size": 28}
        configs[name] |= {"embed_dim": 256, "vision_cfg": vision, "text_cfg": text}
    both = {"num_attention_heads": 4, "hidden_act": "gelu", "projection_dim": 256}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6}
    vision = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "patch_size": 28}
    configs["pickscore"] = {"text_config": text | both, "vision_config": vision | both, "projection_dim": 256}
    return configs | {"head": (256, 128, 64, 32, 16, 1)}


def build(configs, trained, dtype, tower_dtype=None):
    """Networks with random weights on torch's default device, all frozen, `trained` in fp32 and the rest in `dtype`.

    trained: "text_encoder", "unet" or "", nothing. tower_dtype: that of the reward towers, `dtype` by default.
    Returns (original text encoder, tuned text encoder, unet, vae, rewards).
    """
    tower_dtype = tower_dtype or dtype

    def make(kind, *arguments, dtype=dtype, **options):
        torch.set_default_dtype(dtype)  # created in that type: an fp32 copy would not fit beside the other networks
        network = kind(*arguments, **options)
        torch.set_default_dtype(torch.float32)
        return network.eval().requires_grad_(False)

    def tower(name):
        return make(open_clip.CLIP, dtype=tower_dtype, **configs[name])

    types = {"text_encoder": dtype, "unet": dtype} | {trained: torch.float32}
    text = CLIPTextConfig(**configs["text_encoder"])
    original, tuned = make(CLIPTextModel, text), make(CLIPTextModel, text, dtype=types["text_encoder"])
    tuned.load_state_dict(original.state_dict())
    unet = make(UNet2DConditionModel.from_config, configs["unet"], dtype=types["unet"])
    vae = make(AutoencoderKL.from_config, configs["vae"])
    tokenizer, widths = open_clip.SimpleTokenizer(), configs["head"]
    layers = (nn.Linear(width, after) for width, after in pairwise(widths))
    rewards = [
        OpenClipReward("clip", 100.0, tower("clip"), tokenizer),
        Aesthetic(tower("aesthetic").visual, nn.Sequential(*layers).requires_grad_(False)),
        PickScore(make(CLIPModel, CLIPConfig(**configs["pickscore"]), dtype=tower_dtype), clip_tokenizer()),
        OpenClipReward("hpsv2", 100.0, tower("hpsv2"), tokenizer),
    ]
    return original, tuned, unet, vae, rewards


def held(networks):
    """All tensors that belong to networks as `build` returns them: weights, buffers, and gradients not yet cleared."""
    parts = [*networks[:4], *networks[4]]
    gradients = [parameter.grad for part in parts for parameter in part.parameters() if parameter.grad is not None]
    return [part.state_dict() for part in parts], gradients


def flop_counter():
    """A FlopCounterMode that also counts attention on the CPU, which torch's own omits before version 2.15."""
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of `tensors` and of every tensor created from then on: `live` now, `peak` at the most.

    It does not see the workspace of kernels, the gaps that an allocator leaves, or the libraries' own memory.
    """

    def __init__(self, tensors):
        super().__init__()
        self.live = self.peak = 0
        self.seen = set()
        tree_map_only(torch.Tensor, self.add, tensors)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in self.seen:
            self.seen.add(id(storage))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.remove, id(storage), storage.nbytes())

    def remove(self, key, size):
        self.seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        tree_map_only(torch.Tensor, self.add, result)
        return result


def in_use(networks, tokenizer, tune_unconditional=True):
    """Text encoders, UNet and VAE of `networks`, as `build` returns them, as a models.Networks."""
    original, tuned, unet, vae, *_ = networks
    with torch.no_grad():
        unconditional = encode_prompts(tokenizer, original, [""])
    return Networks(tokenizer, original, tuned, unet, vae, unconditional, tune_unconditional)
