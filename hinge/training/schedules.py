"""Schedules of the learning rate, of weight decay and of a teacher's momentum."""

import math
import warnings

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from hinge.training.settings import ScheduleName

STEP_SHARES = (0.5, 0.875)
"""Shares of a run after which the schedule `step` multiplies the learning rate with `STEP_FACTOR`, as HINGE's paper."""

STEP_FACTOR = 0.2


def learning_rate_schedule(
    optimizer: Optimizer, name: ScheduleName, warmup_steps: int, total_steps: int, step: int = 0
) -> LRScheduler:
    """Return the schedule of the learning rate, moved on to a step.

    Parameters
    ----------
    optimizer
        Its learning rate is the largest of the run.
    name
        `"constant"`; `"cosine"`, half a cosine down to 0 after the warm-up; `"step"`, × 0.2 after half and again after
        seven eighths of all steps.
    warmup_steps
        Steps W of a linear warm-up; step s has the share (s + 1) / W of the learning rate.
    total_steps
        Steps of the whole run.
    step
        Number of steps that were taken already.
    """
    warmup = LinearLR(optimizer, 1 / warmup_steps, total_iters=warmup_steps - 1) if warmup_steps else None
    decay: LRScheduler
    if name == "cosine":
        decay = CosineAnnealingLR(optimizer, max(total_steps - warmup_steps, 1))
    elif name == "step":
        milestones = [math.ceil(share * total_steps) - warmup_steps for share in STEP_SHARES]
        decay = MultiStepLR(optimizer, milestones, STEP_FACTOR)
    else:
        decay = ConstantLR(optimizer, 1.0, total_iters=0)
    schedule = decay if warmup is None else SequentialLR(optimizer, [warmup, decay], [warmup_steps])
    for _ in range(step):
        advance(schedule)
    return schedule


def advance(schedule: LRScheduler) -> None:
    """Move a schedule on by one step."""
    with warnings.catch_warnings():
        # torch warns where the optimiser took no step yet: it took them before the run was stopped, or the first loss
        # was not finite
        warnings.simplefilter("ignore", UserWarning)
        schedule.step()


def cosine(step: int, total_steps: int, start: float, end: float) -> float:
    """Return a value that goes from `start` at step 0 to `end` at the last step along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step / max(total_steps - 1, 1), 1.0)))
