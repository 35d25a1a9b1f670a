"""How the trained roles are kept in memory: float32 masters, or the compact form where they would not fit."""

import torch

from stage2_distill.config import AUTO, COMPACT, STANDARD, DistillConfig
from stage2_distill.parallel import Ranks

STANDARD_BYTES = 34  # a parameter: two roles' masters and AdamW states (12 each), gradients 4, average 4, teacher 2
REST = 16 << 30  # bytes of activations and of gathered weights


def choose_memory(config: DistillConfig, ranks: Ranks, parameters: int) -> str:
    """The memory mode; `auto` is compact where `parameters` would not fit the GPUs in the standard one."""
    if config.memory != AUTO:
        return config.memory
    if ranks.device.type != "cuda" or config.dtype != "bfloat16" or config.beta1 != 0:
        return STANDARD
    _, total = torch.cuda.mem_get_info(ranks.device)
    shards = ranks.world // config.replicate
    return COMPACT if STANDARD_BYTES * parameters // shards + REST > total else STANDARD
