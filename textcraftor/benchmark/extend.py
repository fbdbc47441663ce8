"""The prompt engineering baseline: a causal language model continues each prompt before its image is generated."""

from pathlib import Path
from threading import Lock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from textcraftor.errors import UserError, first_line
from textcraftor.sampling import index_seed

NEW_TOKENS = 50
LONGEST = 2048  # tokens, for language models without a limit
_sampling = Lock()  # it uses the global random generator: one thread at a time


def load_extender(model, device):
    """(tokenizer, language model) from a folder or hub id; UserError if there is none."""
    where = {"local_files_only": Path(model).is_dir()}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **where)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **where)
    except Exception as problem:  # transformers, huggingface_hub, safetensors and json raise their own kinds
        raise UserError(
            f"--prompt_eng {model}: cannot be loaded ({first_line(problem)}); expected a folder or hub id of a causal "
            "language model"
        ) from problem
    if _length(tokenizer, network) <= NEW_TOKENS:
        raise UserError(
            f"--prompt_eng {model}: reads {_length(tokenizer, network)} tokens, expected a language model that reads "
            f"more than the {NEW_TOKENS} that it adds"
        )
    return tokenizer, network.to(device).eval().requires_grad_(False)


def _length(tokenizer, model):
    """How many tokens the language model reads; some, such as Bloom, have no limit and tokenizers with a huge one."""
    return getattr(model.config, "max_position_embeddings", None) or min(tokenizer.model_max_length, LONGEST)


@torch.no_grad()
def extend_prompt(tokenizer, model, prompt, seed, index):
    """The prompt, a comma and the model's continuation (top-50 sampling, seeded by (seed, index)), as one line.

    Takes one prompt, not a batch: in a batch, random numbers and the logits' last bits depend on the other prompts.
    """
    room = _length(tokenizer, model) - NEW_TOKENS
    tokens = tokenizer(f"{prompt},", return_tensors="pt", truncation=True, max_length=room).to(model.device)
    with _sampling, torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(index_seed(seed, index))
        output = model.generate(
            tokens.input_ids, attention_mask=tokens.attention_mask, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=50,
            pad_token_id=model.config.eos_token_id,
        )  # fmt: skip
    said = tokenizer.decode(output[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)
    return " ".join(f"{prompt},{said}".split())
