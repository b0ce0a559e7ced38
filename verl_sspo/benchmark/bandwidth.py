"""The floor of a loss: the time that its bytes need to cross the memory bus."""

from collections.abc import Callable

import torch

# The least that a loss with a forward and a backward pass moves for each token. Forward: log_prob, old_log_prob and
# advantages are read, float32, and the mask, bool; the gradient is written. Backward: it is read, multiplied with the
# gradient of what follows, and written. Keeping no gradient costs more: all four inputs again.
BYTES_PER_TOKEN = (3 * 4 + 1 + 4) + (4 + 4)


def copy_of_as_many(tokens: int, device: torch.device) -> Callable[[], object]:
    """A call that moves the bytes of a loss over `tokens`: half of them read, half of them written, nothing computed.

    Both tensors exist before, so that it pays for no allocation: it can only be faster than a loss.
    """
    source = torch.ones(tokens * BYTES_PER_TOKEN // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
