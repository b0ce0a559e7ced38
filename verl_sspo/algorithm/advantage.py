"""Group-relative advantages: each response's reward compared with the other responses to its prompt.

A_i = (R_i - mean) / (std + epsilon) over the group of responses to one prompt, with the unbiased std. This is GRPO
(arXiv:2402.03300); without the division it is Dr. GRPO (arXiv:2503.20783). The leave-one-out baseline is RLOO's
(arXiv:2402.14740).
"""

import torch


def group_relative_advantages(
    rewards: torch.Tensor,
    groups: torch.Tensor,
    *,
    normalize_by_std: bool = True,
    baseline: str = "mean",
    std_floor: float = 0.0,
    epsilon: float = 1e-6,
) -> torch.Tensor:
    """Computes one advantage per response, vectorised over groups of any size and order.

    A group whose rewards are all equal gives exactly 0. A group of one has baseline 0 and std 1, as in verl's grpo.
    A non-finite reward makes the advantages of its group NaN.

    Args:
        rewards: reward of each response, (bs,), any float dtype.
        groups: group of each response as an integer 0..G-1, (bs,), int64.
        normalize_by_std: whether to divide by std + epsilon.
        baseline: "mean" of the group, or "leave_one_out", the mean of the other responses.
        std_floor: smallest std to divide by.
        epsilon: added to the std.

    Returns:
        advantages, (bs,), dtype of `rewards`; computed in float64.
    """
    if rewards.numel() == 0:
        return torch.zeros_like(rewards)
    exact = rewards.double()
    zeros = exact.new_zeros(int(groups.max()) + 1)
    size = zeros.index_add(0, groups, torch.ones_like(exact))
    # Subtract one member's reward first: equal rewards then give exact zeros, without a rounding residue.
    member = zeros.index_put((groups,), exact)
    deviation = exact - member[groups]
    mean = zeros.index_add(0, groups, deviation) / size
    deviation = deviation - mean[groups]
    single = size == 1
    others = (size - 1).clamp(min=1)
    # R_i - mean of the others = n / (n - 1) (R_i - mean of all).
    advantages = deviation * (size / others)[groups] if baseline == "leave_one_out" else deviation
    advantages = torch.where(single[groups], exact, advantages)
    if normalize_by_std:
        std = torch.sqrt(zeros.index_add(0, groups, deviation * deviation) / others)
        std = torch.where(single, 1.0, std.clamp(min=std_floor))
        advantages = advantages / (std + epsilon)[groups]
    # 0 where every reward of the group is finite, NaN elsewhere.
    spoiled = zeros.index_add(0, groups, exact - exact)
    return (advantages + spoiled[groups]).to(rewards.dtype)
