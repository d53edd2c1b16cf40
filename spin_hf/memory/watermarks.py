"""How much of a GPU's memory a cache with `gpu_memory="auto"` may have, from what is free: arithmetic, and no state.

    pool = what the cache holds + what is free;  a margin is a tenth of it

    free    0 ........ half a margin ........ one margin ........ two margins ........
              give back               frames of decode steps               grow
              until one is free       leave this                           until one is free

What lies between giving back and growing changes nothing, so that a cache whose neighbour comes and goes by a little stays
as it is.
"""

from __future__ import annotations

import torch

MARGIN_SHARE = 0.1
"""Of the pool: what decode steps leave free, for the user's own activations. While prompts are read it is twice as much."""
MARGIN_BYTES = 256 << 20
"""The margin is at least this, or a fifth of the pool if that is less."""


def free_gpu_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device, with what torch keeps for reuse; None where that is not known (no GPU).

    No more than `torch.cuda.set_per_process_memory_fraction` leaves to this process.
    """
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    reserved, share = torch.cuda.memory_reserved(index), torch.cuda.get_per_process_memory_fraction(index)
    if share < 1:
        free = max(0, min(free, int(share * total) - reserved))
    return free + reserved - torch.cuda.memory_allocated(index)


def margin(pool: int) -> int:
    """What to leave free of a pool of so many bytes."""
    return max(int(pool * MARGIN_SHARE), min(MARGIN_BYTES, pool // 5))


def cap_for_prompts(held: int, free: int) -> int:
    """The cap while prompts are read, whose activations take more."""
    return max(1, held + free - 2 * margin(held + free))


def cap_for_decoding(held: int, free: int) -> int:
    """The cap while tokens are decoded."""
    return max(1, held + free - margin(held + free))


def is_low(held: int, free: int) -> bool:
    """Whether so little is free that some has to be given back."""
    return 2 * free < margin(held + free)


def is_ample(held: int, free: int) -> bool:
    """Whether so much is free that more may be taken."""
    return free > 2 * margin(held + free)


def fair_share(wanted: int, available: int, others: int) -> int:
    """Bytes that a cache may ask for, in proportion to what all would take if nothing were paged.

    Args:
        wanted: what it would take; what `others` would.
        available: what is free, and what they could give back.
    """
    return min(wanted, available * wanted // max(1, wanted + others))


def split_fairly(missing: int, givable: list[int]) -> list[int]:
    """`missing` bytes, in proportion to what each can give and no more than that."""
    total = sum(givable)
    return [min(each, -(-missing * each // total)) if total else 0 for each in givable]
