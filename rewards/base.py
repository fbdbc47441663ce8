"""What every reward is: images and their prompts in, one score an image out, differentiable in the images."""

import logging
from itertools import permutations

import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

logger = logging.getLogger(__name__)

CACHED_PROMPTS = 65_536  # text features kept, about 4 kB each: bounds the memory of a long run


class Reward(nn.Module):
    """A frozen model that scores images (B, 3, H, W) in [0, 1] against B prompts, differentiable in the images.

    A subclass sets `name`, `scale` (what the user's weight is multiplied by), `tower` (the model), `image_size`
    (height, width: the tower's input), `context_length` (in tokens), and writes `encode_image`, `encode_text` and
    `tokenize`; one with no use for the prompt overrides `score` instead of the last two. A loader ends with `frozen`.
    """

    name: str
    scale: float
    tower: nn.Module
    image_size: tuple[int, int]
    context_length: int
    keep_texts = True  # text features, by prompt, encoded alone; or else with the batch they come in, which is faster

    def __init__(self):
        super().__init__()
        self._text_cache: dict[str, Tensor] = {}
        self._warned = False

    @property
    def visual(self) -> nn.Module:
        """The part of the tower that sees images: rewards with one in common share its forward pass."""
        return self.tower

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, h, w) of the tower's size and dtype -> features (B, D)."""
        raise NotImplementedError

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> features (B, D)."""
        raise NotImplementedError

    def tokenize(self, prompts: list[str], length: int) -> Tensor:
        """Token ids (B, length), cut and padded to it; the end token is the largest id."""
        raise NotImplementedError

    def score(self, image_features: Tensor, prompts: list[str]) -> Tensor:
        """Unit features (B, D) of the images and their prompts -> (B,): the cosine of each pair, the diagonal."""
        return (image_features * self.text_features(prompts).to(image_features)).sum(dim=-1)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts -> (B,) unscaled rewards; ValueError for anything else."""
        check_inputs(images, prompts)
        return self.score(self.image_features(images), prompts)

    def image_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> unit features (B, D), fp32 (float64 if the tower is)."""
        weight = next(self.tower.parameters())
        # The tower's own dtype decides the precision, not the caller's autocast: scores stay comparable.
        with torch.autocast(weight.device.type, enabled=False):
            pixels = preprocess(images.to(weight.device), self.image_size)
            return normalize(self.encode_image(pixels.to(weight.dtype)))

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """B prompts -> unit features (B, D), fp32 (float64 if the tower is), no gradient; see `keep_texts`."""
        weight = next(self.tower.parameters())

        def encode(texts):
            with torch.autocast(weight.device.type, enabled=False):
                return normalize(self.encode_text(self.tokenize(texts, self.context_length).to(weight.device)))

        if not self.keep_texts:
            self._warn_if_cut(prompts)
            return encode(prompts)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_cache]
        self._warn_if_cut(new)
        # One by one: the last bits of a batched product depend on the batch, and so would a resumed run.
        self._text_cache |= {prompt: encode([prompt])[0].cpu() for prompt in new}
        features = torch.stack([self._text_cache[prompt] for prompt in prompts]).to(weight.device)
        while len(self._text_cache) > CACHED_PROMPTS:
            del self._text_cache[next(iter(self._text_cache))]  # the oldest
        return features

    def frozen(self, device: torch.device | str, dtype: torch.dtype) -> "Reward":
        """This reward in eval mode on `device`, nothing trainable, its tower in `dtype`."""
        self.tower.to(dtype)
        return self.to(device).eval().requires_grad_(False)

    def _warn_if_cut(self, prompts: list[str]) -> None:
        """Say, once, how many of these prompts do not fit into the context."""
        if self._warned or not prompts:
            return
        # With one token more of room, the end token (the largest id) of a prompt that is cut sits in that extra place.
        cut = (self.tokenize(prompts, self.context_length + 1).argmax(dim=-1) == self.context_length).sum().item()
        if cut:
            self._warned = True
            logger.warning(
                f"{self.name}: {cut} of {len(prompts)} prompts exceed {self.context_length} tokens and are cut "
                "(said once; later ones are cut too)"
            )


def share_towers(rewards: list[Reward]) -> None:
    """Let a reward whose tower is for images only (the aesthetic one) use an equal one of another reward."""
    for reward, other in permutations(rewards, 2):
        if reward.visual is reward.tower and _equal(reward.visual, other.visual):
            reward.tower = other.visual


def _equal(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks have the same layers (QuickGELU is not GELU), attention heads and weights."""

    def layers(network):
        return repr(network), [getattr(module, "num_heads", None) for module in network.modules()]

    weights, others = first.state_dict(), second.state_dict()
    return layers(first) == layers(second) and all(torch.equal(weights[name], others[name]) for name in weights)


def preprocess(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> (B, 3, *size): adaptive average pool, then CLIP's mean and std per channel."""
    images = images.to(at_least_fp32(images.dtype))
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (F.adaptive_avg_pool2d(images, size) - mean) / std


def normalize(features: Tensor) -> Tensor:
    """Features (..., D) -> unit length, in fp32 or better: half precision loses the third decimal of a PickScore."""
    return F.normalize(features.to(at_least_fp32(features.dtype)), dim=-1)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, half precisions become float32."""
    return torch.promote_types(dtype, torch.float32)


def check_inputs(images: Tensor, prompts: list[str]) -> None:
    """Raise ValueError unless images are (B, 3, H, W) floats in [0, 1] (NaN passes) with as many prompts."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, 3, H, W)")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}, expected floats in [0, 1]")
    if isinstance(prompts, str) or len(prompts) != len(images):
        found = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"{found} for {len(images)} images, expected a list with one prompt an image")
    low, high = (value.item() for value in images.detach().aminmax())
    if low < 0 or high > 1:
        raise ValueError(f"images lie in [{low:.3g}, {high:.3g}], expected [0, 1]")
