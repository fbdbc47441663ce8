"""A tuned text encoder in diffusers' own pipelines: text to image, image to image, inpainting, ControlNet.

TextCraftor lets the original text encoder drive the first steps and the tuned one the last: 10 and 15 of 25 in the
paper's tests (Table 4). Pipelines of diffusers allow that without a subclass: they call a function after each step, and
what it returns as `prompt_embeds` drives the steps that follow.
"""

import torch


def encode_with(text_encoder, pipeline, prompts, negative_prompts=None):
    """The text embeddings that `pipeline` would use if it had this text encoder -> (2B, L, D), negative rows first.

    pipeline: any Stable Diffusion v1 pipeline of diffusers, with guidance. prompts, negative_prompts: as the pipeline
    takes them, a string or a list of B. The text encoder may have another device and type; the embeddings get those of
    the pipeline.
    """
    own = pipeline.text_encoder
    pipeline.text_encoder = text_encoder
    try:
        with torch.no_grad():
            positive, negative = pipeline.encode_prompt(
                prompts, text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=True,
                negative_prompt=negative_prompts,
            )  # fmt: skip
    finally:
        pipeline.text_encoder = own
    return torch.cat([negative, positive]).to(pipeline._execution_device, own.dtype)  # with offloading not own.device


def switch_embeddings(embeddings, tuned_steps):
    """A `callback_on_step_end` for pipelines of diffusers: the last `tuned_steps` steps use `embeddings`.

    embeddings: what the pipeline holds in its loop: (2B, L, D) with guidance, negative rows first; (B, L, D) without.
    The steps are counted from the end, so that image to image, which skips the first ones, keeps as many. Second-order
    schedulers evaluate the network twice in each step but the last, and PNDM twice in the first. A pipeline calls this
    after a step, so the first step keeps its own embeddings: if all steps are to be tuned, pass them as prompt_embeds.
    """

    def switch(pipeline, evaluation, t, tensors):
        left = pipeline.num_timesteps - 1 - evaluation
        return {"prompt_embeds": embeddings} if left <= pipeline.scheduler.order * (tuned_steps - 1) + 1 else {}

    return switch
