"""A tuned text encoder in diffusers' own pipelines: text to image, image to image, inpainting, ControlNet.

TextCraftor lets the original text encoder drive the first steps and the tuned one the last: 10 and 15 of 25 in the
paper's tests (Table 4). `attach_encoder` makes a pipeline do so, in SD v1's classes and in SDXL's, where the tuned
encoder stands in for the first of the two (Figure 7).
"""

import inspect
import math
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import CLIPTextModel

from textcraftor.errors import UserError
from textcraftor.mixing import mix
from textcraftor.options import TEST_TUNED_STEPS
from textcraftor.recorded import TESTED, recorded_settings, shared_settings, tunes_unconditional
from textcraftor.weight_files import load_text_encoder, needs_base


def attach_encoder(pipeline, tuned, tuned_steps=None, tune_unconditional=None):
    """Let a tuned text encoder drive the last steps of each later call of `pipeline(prompt, …)`.

    pipeline: a pipeline of diffusers for SD v1 or SDXL. It takes the same arguments as before, except prompt_embeds and
    negative_prompt_embeds: it must encode the prompts itself. Other pipelines that share its networks do not change.
    A callback_on_step_end still works, but prompt_embeds that it returns have no effect in the tuned steps.
    tuned: a CLIPTextModel, or weights as load_text_encoder takes them; or a list [(tuned, w), …] of several with their
    weights, for Σ wᵢ Tᵢ + (1 − Σ wᵢ) T₀ (Figures 4 and 5). A weight file that says that it was trained with another
    --prompt_weighting than 1 has its weight multiplied by that. With the next prompt it moves to the pipeline's device.
    tuned_steps: how many steps at the end of a call, at least 0; by default as many as the weight files say that they
    were trained for, and 15 if they do not say. Image to image, which skips the first steps, has as many tuned ones as
    text to image. What counts is steps, not evaluations of the UNet: second-order schedulers need two for each step but
    the last, and PNDM two for the first.
    tune_unconditional: whether the tuned encoder encodes the negative prompt as well; by default as the weight files
    say that they were trained, and yes if they do not say.

    Attaching again replaces what was attached. Raises UserError if the pipeline or the encoder is of another kind.
    """
    name = type(pipeline).__name__
    if not hasattr(pipeline, "unet") or not all(
        hasattr(type(pipeline), needed) for needed in ("encode_prompt", "num_timesteps")
    ):
        raise UserError(f"{name}: expected a pipeline of diffusers for Stable Diffusion v1 or SDXL")
    own = pipeline.text_encoder
    if not _is_clip(own):
        found = "no first text encoder" if own is None else f"a {type(own).__name__} as its text encoder"
        raise UserError(f"{name}: has {found}; expected a CLIPTextModel, as in Stable Diffusion v1 and SDXL")
    pairs = tuned if isinstance(tuned, list) else [(tuned, 1.0)]
    weights = [pair[1] if isinstance(pair, tuple) and len(pair) == 2 else type(pair).__name__ for pair in pairs]
    if not weights or not all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in weights):
        raise UserError(
            "a list of tuned text encoders needs pairs (tuned, weight) with finite weights; found "
            f"{', '.join(map(str, weights)) or 'nothing'}"
        )
    files = [each for each, _ in pairs if isinstance(each, (str, Path))]
    if tuned_steps is None:
        others = set(TESTED) - {"grad_steps"}
        tuned_steps = shared_settings(files, others, "say how many with tuned_steps").get(
            "grad_steps", TEST_TUNED_STEPS
        )
    if not isinstance(tuned_steps, int) or tuned_steps < 0:
        raise UserError(f"tuned_steps is {tuned_steps!r}; expected a whole number of steps, 0 or more")
    if tune_unconditional is None:
        tune_unconditional = tunes_unconditional(files, "say which with tune_unconditional=True or False")
    fitting = [(_fitting(each, own), weight * _weighting(each)) for each, weight in pairs]
    switch = _Switch(pipeline, fitting, tuned_steps, tune_unconditional)
    pipeline.encode_prompt, pipeline.progress_bar = switch.encode_prompt, switch.progress_bar


def detach_encoder(pipeline):
    """Undo attach_encoder; without one attached, do nothing."""
    for name in ("encode_prompt", "progress_bar"):
        vars(pipeline).pop(name, None)


def _is_clip(encoder):
    """Whether it is a CLIPTextModel, compiled or not: the one with a projection has another output."""
    return isinstance(getattr(encoder, "_orig_mod", encoder), CLIPTextModel)


def _fitting(tuned, own):
    """The tuned text encoder, checked; a new one like the pipeline's own if `tuned` names weights."""
    if isinstance(tuned, (str, Path)):
        # A new one, since the pipeline's own may be offloaded, and its weights then elsewhere.
        encoder = CLIPTextModel(own.config).to(own.dtype).eval().requires_grad_(False)
        if needs_base(tuned):
            encoder.load_state_dict(getattr(own, "_orig_mod", own).state_dict())
        load_text_encoder(encoder, tuned)
        return encoder
    if not _is_clip(tuned):
        raise UserError(
            f"the tuned text encoder is a {type(tuned).__name__}; expected a CLIPTextModel or a weight file"
        )
    width, expected = tuned.config.hidden_size, own.config.hidden_size
    if width != expected:
        raise UserError(
            f"the tuned text encoder has hidden size {width}, the pipeline's {expected}: they are of different models"
        )
    return tuned


def _weighting(tuned):
    """The --prompt_weighting that a weight file was trained with, 1 if it does not say."""
    return recorded_settings(tuned).get("prompt_weighting", 1) if isinstance(tuned, (str, Path)) else 1


def _token_embeddings(encoded):
    """What encode_prompt returned -> {"+": of the prompts, "-": of the negative ones, if guidance needs them}.

    SDXL's returns the pooled embeddings after these two; its first text encoder has no part in them.
    """
    positive, negative, *_ = encoded
    return {"+": positive} if negative is None else {"+": positive, "-": negative}


class _Switch:
    """What an attached pipeline calls in place of two of its own methods.

    A pipeline calls encode_prompt before the steps, and enters and leaves progress_bar around them, also where a step
    fails. In between, the inputs of UNet and ControlNet are replaced: their embeddings, in the first step as in others.
    """

    def __init__(self, pipeline, tuned, tuned_steps, tune_unconditional):
        self.pipeline, self.tuned, self.tuned_steps = pipeline, tuned, tuned_steps
        self.tune_unconditional = tune_unconditional
        self.rows = {}  # the tuned embeddings by the number of their rows: with guidance and without

    def encode_prompt(self, *args, **kwargs):
        """The pipeline's own embeddings; those of the tuned encoder are kept for the last steps."""
        pipeline, stock = self.pipeline, type(self.pipeline).encode_prompt
        given = inspect.signature(stock).bind(pipeline, *args, **kwargs).arguments
        if any(given.get(name) is not None for name in ("prompt_embeds", "negative_prompt_embeds")):
            raise UserError(
                "the pipeline was given prompt_embeds, which a tuned text encoder cannot change; pass the prompt and "
                "the negative prompt as text, or call detach_encoder(pipeline) first"
            )
        own, device = pipeline.text_encoder, pipeline._execution_device  # both change with the text encoder
        with _computed_once(getattr(pipeline, "text_encoder_2", None)):
            result = stock(pipeline, *args, **kwargs)
            original = _token_embeddings(result)
            embeddings = []
            for encoder, weight in self.tuned:
                if encoder.get_input_embeddings().num_embeddings < own.get_input_embeddings().num_embeddings:
                    raise UserError(
                        "textual inversion added tokens to the pipeline's text encoder but not to the tuned one; load "
                        "them into both"
                    )
                pipeline.text_encoder = encoder.to(device)
                try:
                    values = _token_embeddings(stock(pipeline, *args, **kwargs))
                finally:
                    pipeline.text_encoder = own
                embeddings.append(({name: values[name].to(original[name]) for name in original}, weight))
        mixed = mix(original, embeddings)
        if "-" in mixed and not self.tune_unconditional:
            mixed["-"] = original["-"]
        self.rows = {len(mixed["+"]): mixed["+"]}
        if "-" in mixed:
            self.rows[2 * len(mixed["+"])] = torch.cat([mixed["-"], mixed["+"]])
        return result

    @contextmanager
    def progress_bar(self, total):
        """The pipeline's own progress bar; until it ends, the last steps use the tuned embeddings."""
        pipeline, evaluation = self.pipeline, 0
        order = pipeline.scheduler.order
        steps = math.ceil(pipeline.num_timesteps / order)

        def replace(module, args, kwargs):
            nonlocal evaluation
            rows = len(kwargs["encoder_hidden_states"])
            if self.tuned_steps and rows not in self.rows:  # said in the first step
                raise UserError(
                    f"{type(pipeline).__name__} runs its UNet on {rows} prompt embeddings; expected "
                    f"{' or '.join(map(str, self.rows))}: its kind of guidance is not supported"
                )
            left = steps - evaluation // order
            evaluation += module is pipeline.unet  # a ControlNet comes before it
            if left > self.tuned_steps and total > self.tuned_steps:
                return None
            return args, kwargs | {"encoder_hidden_states": self.rows[rows]}

        with ExitStack() as hooks:
            for network in (pipeline.unet, getattr(pipeline, "controlnet", None)):
                if network is not None:
                    hooks.callback(network.register_forward_pre_hook(replace, with_kwargs=True).remove)
            hooks.callback(self.rows.clear)
            yield hooks.enter_context(type(pipeline).progress_bar(pipeline, total=total))


@contextmanager
def _computed_once(encoder):
    """Inside, a text encoder (or None) runs once for the same tokens: SDXL's second one gives all of them its part."""
    if encoder is None:
        yield
        return
    replaced, forward, outputs = vars(encoder).get("forward"), encoder.forward, {}

    def remember(tokens, **options):
        key = str(tokens.tolist())
        if key not in outputs:
            outputs[key] = forward(tokens, **options)
        return outputs[key]

    encoder.forward = remember
    try:
        yield
    finally:
        del encoder.forward
        if replaced is not None:  # by accelerate, for offloading
            encoder.forward = replaced
