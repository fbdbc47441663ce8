"""What all rewards share: images and their prompts in, one score per image out, differentiable in the images."""

import logging

import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class Reward(nn.Module):
    """A frozen model that scores images (B, 3, H, W) in [0, 1] against B prompts, differentiable in the images.

    A subclass sets

    - `name`, and `scale`, the factor between the score and its term in the training objective,
    - `tower`, the network, with its `image_size` (height, width) and `context_length` in tokens,
    - `mean` and `std` per channel, if the tower was not trained with OpenAI's,

    and implements `encode_image`, `encode_text` and `tokenize`. A reward that ignores the prompt overrides `score`
    instead of the last two. Loaders return `reward.frozen(device, dtype)`.
    """

    name: str
    scale: float
    tower: nn.Module
    image_size: tuple[int, int]
    context_length: int
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN
    std: tuple[float, ...] = OPENAI_DATASET_STD

    def __init__(self):
        super().__init__()
        self._warned = False

    @property
    def visual(self) -> nn.Module:
        """The image part of the tower. Rewards with the same one share its forward pass."""
        return self.tower

    @property
    def compares_texts(self) -> bool:
        """Whether the score is `compare` of image and text features, and not a `score` of the subclass's own."""
        return type(self).score is Reward.score

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, h, w) of the tower's size and dtype -> features (B, D)."""
        raise NotImplementedError

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) -> features (B, D)."""
        raise NotImplementedError

    def tokenize(self, prompts: list[str], length: int) -> Tensor:
        """Token ids (B, length), truncated and padded to that length; the end token has the largest id."""
        raise NotImplementedError

    def score(self, image_features: Tensor, prompts: list[str]) -> Tensor:
        """Unit image features (B, D) and the images' prompts -> (B,) unscaled rewards."""
        return self.compare(image_features, self.text_features(prompts))

    def compare(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Image and text features, both (B, D) -> (B,): the cosine of each image and its own prompt."""
        return (image_features * text_features.to(image_features)).sum(dim=-1)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and B prompts -> (B,) unscaled rewards; ValueError for anything else."""
        check_inputs(images, prompts)
        return self.score(self.image_features(images), prompts)

    def image_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> unit features (B, D), fp32 (float64 if the tower is)."""
        weight = next(self.tower.parameters())
        # Compute in the tower's own dtype whatever the caller's autocast, so that scores stay comparable.
        with torch.autocast(weight.device.type, enabled=False):
            pixels = preprocess(images.to(weight.device), self.image_size, self.mean, self.std)
            return normalize(self.encode_image(pixels.to(weight.dtype)))

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """B prompts -> unit features (B, D), fp32 (float64 if the tower is), without gradient.

        All prompts go through the text tower as one batch, and nothing is cached: the last bits of a matrix product
        depend on the batch, so cached features would depend on earlier batches, and a resumed run would differ.
        """
        weight = next(self.tower.parameters())
        self._warn_if_truncated(prompts)
        with torch.autocast(weight.device.type, enabled=False):
            return normalize(self.encode_text(self.tokenize(prompts, self.context_length).to(weight.device)))

    def frozen(self, device: torch.device | str, dtype: torch.dtype) -> "Reward":
        """This reward on `device`, in eval mode, with its weights frozen and its tower in `dtype`."""
        self.tower.to(dtype)
        return self.to(device).eval().requires_grad_(False)

    def _warn_if_truncated(self, prompts: list[str]) -> None:
        """Warn, once, that prompts are truncated, and say how many of these."""
        if self._warned:
            return
        # With room for one more token, the end token (the largest id) of a prompt that is too long takes that place.
        longer = self.tokenize(prompts, self.context_length + 1)
        truncated = (longer.argmax(dim=-1) == self.context_length).sum().item()
        if truncated:
            self._warned = True
            logger.warning(
                f"{self.name}: {truncated} of {len(prompts)} prompts are longer than {self.context_length} tokens and "
                "are truncated (this is the only warning; later prompts are truncated too)"
            )


def share_towers(rewards: list[Reward]) -> None:
    """Let a reward with only an image tower (the aesthetic one) use that of another reward if the two are equal.

    Equal towers have the same layers, weights, image size and pixel normalisation.
    """

    def pixels(reward):
        return reward.image_size, [round(value, 6) for value in (*reward.mean, *reward.std)]

    for reward in rewards:
        if reward.visual is not reward.tower:
            continue
        # A whole CLIP first: it keeps its own tower, so that all others meet in one.
        for other in sorted(rewards, key=lambda other: other.visual is other.tower):
            if pixels(reward) == pixels(other) and _equal(reward.visual, other.visual):
                reward.tower = other.visual
                break


def _equal(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks have the same layers (GELU and QuickGELU differ), attention heads and weights."""

    def layers(network):
        return repr(network), [getattr(module, "num_heads", None) for module in network.modules()]

    if first is second:
        return True
    weights, others = first.state_dict(), second.state_dict()
    return layers(first) == layers(second) and all(torch.equal(weights[name], others[name]) for name in weights)


def preprocess(
    images: Tensor,
    size: tuple[int, int],
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN,
    std: tuple[float, ...] = OPENAI_DATASET_STD,
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> (B, 3, *size): adaptive average pooling, then (x - mean) / std per channel.

    Pooling replaces the bicubic resize and centre crop of the towers' own preprocessing, as in TextCraftor's released
    code: it is differentiable and keeps the whole image.
    """
    images = images.to(at_least_fp32(images.dtype))
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (F.adaptive_avg_pool2d(images, size) - mean) / std


def normalize(features: Tensor) -> Tensor:
    """Features (..., D) -> unit length, in fp32 or better: half precision loses the third decimal of a PickScore."""
    return F.normalize(features.to(at_least_fp32(features.dtype)), dim=-1)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half-precision types; float32 and float64 stay as they are."""
    return torch.promote_types(dtype, torch.float32)


def check_inputs(images: Tensor, prompts: list[str], values: bool = True) -> None:
    """Raise ValueError unless images are (B, 3, H, W) floats in [0, 1] (NaN passes) and there are as many prompts.

    values: whether to look at the range. A GPU's queue of work runs empty meanwhile, so training does it only once.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, 3, H, W)")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}, expected floats in [0, 1]")
    if isinstance(prompts, str) or len(prompts) != len(images):
        found = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"{found} for {len(images)} images, expected a list with one prompt per image")
    if not values:
        return
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if low < 0 or high > 1:
        raise ValueError(f"images lie in [{low:.3g}, {high:.3g}], expected [0, 1]")
