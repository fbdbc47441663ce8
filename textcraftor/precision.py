"""Choose the floating-point type that networks compute in (--mixed_precision)."""

import os

import torch

from textcraftor.errors import UserError

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HAS_FP16 = {"cuda", "xpu", "npu", "mps"}


def choose_precision(requested: str, device: torch.device | str) -> tuple[str, str]:
    """--mixed_precision (auto, no, fp16 or bf16) on this device -> ("no", "fp16" or "bf16"; why, for the start line).

    auto means bf16 where the hardware supports it: GPUs with bf16, x86 CPUs with AVX-512-BF16 or AMX. Elsewhere it
    means "no" (fp32): without hardware support, CPU libraries run bf16 ten times slower than fp32.
    Raises UserError for fp16 on a device that cannot train in fp16.
    """
    kind = torch.device(device).type
    if requested == "fp16" and kind not in HAS_FP16:
        raise UserError("--mixed_precision fp16: needs a GPU; on a CPU use auto, bf16 or no")
    if requested != "auto":
        return requested, "as requested"
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU has bf16") if fast else ("no", "this GPU has no bf16; fp16 needs half the memory")
    if kind == "cpu":
        fast = cpu_has_fast_bf16()
        return ("bf16", "this CPU has bf16 instructions") if fast else ("no", "this CPU has no bf16 instructions")
    return "no", f"bf16 is not known to be fast on {kind}"


def cpu_has_fast_bf16() -> bool:
    """Whether this CPU has AVX-512-BF16 or AMX, and oneDNN, PyTorch's CPU library, may use them."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "DEFAULT")).upper()
    allowed = limit in ("ALL", "DEFAULT") or limit.startswith(
        ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10")
    )
    return allowed and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
