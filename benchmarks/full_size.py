"""
What a training step of SD v1.5 with the four real reward models costs, at their full sizes, with random weights.

Counted, not run: FLOPs and peak memory of every part, on any machine, in a minute:
$ python -m benchmarks.full_size --count

Run, on the device there is (a GPU, or a CPU with 24 GB and some patience): seconds and FLOPs by part, peak memory:
$ python -m benchmarks.full_size --steps 3 --batch-size 4
"""

import contextlib
import copy
import weakref

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from aesthetic import Aesthetic
from pickscore import PickScore
from rewards.towers import OpenClipReward
from textcraftor.models import SD_V1_CONFIGS, clip_tokenizer, embed_prompts, encode_prompts
from textcraftor.sampling import decode, make_scheduler, prompt_noise, sample_latents

PROMPT = "a watercolour of a lighthouse on a cliff at dawn, soft light, highly detailed"
WEIGHTS = {"clip": 0.5, "aesthetic": 1.0, "pickscore": 1.0, "hpsv2": 1.0}
HEAD = (768, 1024, 128, 64, 16, 1)

# fmt: off
OPTIONS = (
    ("--train",            ("text_encoder", "unet"), "what trains"),
    ("--batch-size",       1,                        "images a step"),
    ("--step",             25,                       "T, DDIM steps"),
    ("--grad_steps",       5,                        "K, those with gradient"),
    ("--mixed_precision",  ("bf16", "fp16", "no"),   "as in training"),
    ("--gradient_checkpointing", ("full", "none"),   "as in training"),
    ("--compile",          False,                    "as in training"),
    ("--steps",            1,                        "steps to run; the last is reported"),
    ("--count",            False,                    "run nothing: count FLOPs and bytes on tensors without contents"),
    ("--table",            False,                    "count for all batch sizes of README's table"),
)
# fmt: on


def build(trained, dtype):
    """All networks at full size with random weights, on torch's default device, frozen ones in `dtype`.

    trained: "text_encoder" or "unet", in fp32. Returns (original encoder, tuned encoder, unet, vae, rewards).
    """

    def make(kind, *arguments, dtype=dtype, **options):
        torch.set_default_dtype(dtype)
        network = kind(*arguments, **options)
        torch.set_default_dtype(torch.float32)
        return network.eval().requires_grad_(False)

    types = {trained: torch.float32}
    text = CLIPTextConfig.from_pretrained(SD_V1_CONFIGS / "text_encoder")
    original = make(CLIPTextModel, text)
    tuned = make(CLIPTextModel, text, dtype=types.get("text_encoder", dtype))
    config = UNet2DConditionModel.load_config(SD_V1_CONFIGS, subfolder="unet")
    unet = make(UNet2DConditionModel.from_config, config, dtype=types.get("unet", dtype))
    vae = make(AutoencoderKL.from_config, AutoencoderKL.load_config(SD_V1_CONFIGS, subfolder="vae"))

    def tower(name):
        return make(open_clip.CLIP, **open_clip.get_model_config(name))

    tokenizer = open_clip.get_tokenizer("ViT-H-14")
    head = torch.nn.Sequential(*(torch.nn.Linear(width, after) for width, after in zip(HEAD, HEAD[1:], strict=False)))
    huge = {"projection_dim": 1024, "hidden_act": "gelu"}
    huge |= {"text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24} | huge}
    huge |= {"vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32} | huge}
    huge["text_config"] |= {"num_attention_heads": 16}
    huge["vision_config"] |= {"num_attention_heads": 16, "patch_size": 14}
    rewards = [
        OpenClipReward("clip", 100.0, tower("ViT-g-14"), tokenizer),
        Aesthetic(tower("ViT-L-14-quickgelu").visual, head.requires_grad_(False)),
        PickScore(make(CLIPModel, CLIPConfig(**huge)), clip_tokenizer()),
        OpenClipReward("hpsv2", 100.0, tower("ViT-H-14"), tokenizer),
    ]
    return original, tuned, unet, vae, rewards


def step(part, networks, scheduler, optimizer, args, device):
    """One training step, each part within part(name), which may time or count it.

    The gradient is carried by hand from part to part, as autograd would: every boundary is a leaf of its own.
    """
    original, tuned, unet, vae, rewards = networks
    tokenizer, recompute = clip_tokenizer(), args.gradient_checkpointing == "full"
    first, last = copy.copy(scheduler), copy.copy(scheduler)
    times = scheduler.timesteps.tolist()
    first.timesteps, last.timesteps = times[: -args.grad_steps], times[-args.grad_steps :]
    prompts = [f"{PROMPT}, {index}" for index in range(args.batch_size)]
    noise = prompt_noise(0, range(args.batch_size), (4, 64, 64)).to(device)
    autocast = torch.autocast(device, DTYPES[args.mixed_precision], args.mixed_precision != "no", cache_enabled=False)
    trained = networks[1] if args.train == "text_encoder" else unet

    with part("prompt embeddings"):
        with torch.no_grad():
            unconditional = encode_prompts(tokenizer, original, [""])
        with autocast if trained is tuned else contextlib.nullcontext():
            early, late = embed_prompts(tokenizer, original, tuned, unconditional, prompts)
    late_leaf = late.detach().requires_grad_(late.requires_grad)
    with part("first steps, no gradient"), autocast if trained is unet else contextlib.nullcontext():
        z = sample_latents(unet, first, noise, early, early, 7.5, 0)
    with part("last steps, forward"), autocast if trained is unet else contextlib.nullcontext():
        z = sample_latents(unet, last, z, early, late_leaf, 7.5, args.grad_steps, recompute)
    z_leaf = z.detach().requires_grad_()
    with part("VAE, forward"):
        images = decode(vae, z_leaf, recompute)
    images_leaf = images.detach().requires_grad_()
    for reward in rewards:
        if reward.name != "aesthetic":
            with part("rewards, texts"), torch.no_grad():
                tokens = reward.tokenize(prompts, reward.context_length).to(device)
                texts = torch.nn.functional.normalize(reward.encode_text(tokens).float(), dim=-1)
        with part(f"{reward.name}, forward and backward"):
            features = reward.image_features(images_leaf)
            scores = reward.score(features, prompts) if reward.name == "aesthetic" else (features * texts).sum(dim=-1)
            (-WEIGHTS[reward.name] * reward.scale * scores.mean()).backward()
    with part("VAE, backward"):
        images.backward(images_leaf.grad)
    with part("last steps, backward"):
        z.backward(z_leaf.grad)
    with part("prompt embeddings, backward"):
        if late.requires_grad:
            late.backward(late_leaf.grad)
    with part("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    return scores


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def count(args):
    """FLOPs {part: number}, FLOPs in all, peak bytes {what: number} of the second step, on tensors without contents.

    The second, since it holds the optimizer's state from the start.
    """
    flops = {}

    @contextlib.contextmanager
    def part(name):
        with FlopCounterMode(display=False) as counter:
            yield
        flops[name] = flops.get(name, 0) + counter.get_total_flops()

    scheduler = new_scheduler(args)
    with FakeTensorMode(allow_non_fake_inputs=True):
        networks = build(args.train, DTYPES[args.mixed_precision])
        optimizer = make_optimizer(networks, args)
        step(part, networks, scheduler, optimizer, args, "cpu")
        states = [network.state_dict() for network in (*networks[:4], *networks[4])]
        with LiveBytes([*states, optimizer.state_dict()]) as memory:
            step(lambda name: contextlib.nullcontext(), networks, scheduler, optimizer, args, "cpu")
    return flops, memory.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of `tensors` and of all that are made from then on; `peak` is the most alive at once."""

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


def make_optimizer(networks, args):
    """AdamW of what trains, which gets gradients from here on."""
    trained = networks[1] if args.train == "text_encoder" else networks[2]
    return torch.optim.AdamW(trained.requires_grad_().parameters(), lr=1e-6)


def new_scheduler(args):
    return make_scheduler(DDIMScheduler.load_config(SD_V1_CONFIGS, subfolder="scheduler"), args.step)
