"""Learning rate as a function of the number of images seen."""

import math

from training.config.edm2 import EDM2Optimizer


def learning_rate_schedule(
    cur_nimg: int,
    batch_size: int,
    ref_lr: float = EDM2Optimizer.lr,
    ref_batches: float = EDM2Optimizer.decay,
    rampup_Mimg: float = EDM2Optimizer.rampup_Mimg,
) -> float:
    """Inverse square root decay with linear ramp-up (EDM2, Eq. 67 and Appendix B.2).

    Args:
        cur_nimg: images seen before the step.
        batch_size: images per step.
        ref_lr: learning rate at the end of the constant phase.
        ref_batches: number of batches after which the decay begins; 0 = no decay.
        rampup_Mimg: length of the linear ramp-up in millions of images; 0 = none.
    """
    lr = ref_lr
    if ref_batches > 0:
        lr /= math.sqrt(max(cur_nimg / (ref_batches * batch_size), 1))
    if rampup_Mimg > 0:
        lr *= min(cur_nimg / (rampup_Mimg * 1e6), 1)
    return lr


def warmup_linear(
    cur_nimg: int, ref_lr: float, warmup_nimg: int = 0, decay_from_nimg: int = 0, decay_to_nimg: int = 0
) -> float:
    """Linear warm-up to `ref_lr`, where it stays, and later a linear fall to 0.

    Args:
        cur_nimg: images seen before the step.
        warmup_nimg: images of the warm-up; 0 = none.
        decay_from_nimg, decay_to_nimg: images at which the fall begins and ends; the latter 0 = no fall.
    """
    rise = cur_nimg / warmup_nimg if warmup_nimg > 0 else 1
    fall = (decay_to_nimg - cur_nimg) / (decay_to_nimg - decay_from_nimg) if decay_to_nimg > 0 else 1
    return ref_lr * max(min(rise, fall, 1), 0)


def warmup_cosine(cur_nimg: int, total_nimg: int, ref_lr: float, min_lr: float = 0.0, warmup_nimg: float = 0) -> float:
    """Linear warm-up to `ref_lr`, then half a cosine down to `min_lr` at the end (Loshchilov & Hutter 2017, Eq. 5).

    Args:
        cur_nimg: images seen before the step.
        total_nimg: images of the whole training.
        warmup_nimg: images of the warm-up.
    """
    if cur_nimg < warmup_nimg:
        return ref_lr * cur_nimg / warmup_nimg
    progress = (cur_nimg - warmup_nimg) / max(total_nimg - warmup_nimg, 1)
    return min_lr + (ref_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def warmup_cosine_by_epochs(
    cur_nimg: int,
    batch_size: int,
    epoch_batches: int,
    epochs: int,
    warmup_epochs: int,
    ref_lr: float = 0.01,
    min_lr: float = 1e-4,
) -> float:
    """`warmup_cosine` as NVAE's published code steps it, for its checkpoints and figures.

    The warm-up ends one step short of `ref_lr`; the rate that it reaches stays for one more epoch, and is where the
    cosine begins, which changes the rate once per epoch.

    Args:
        cur_nimg: images seen before the step.
        epoch_batches: steps of an epoch.
        epochs: of the whole training, with the warm-up.
    """
    step = cur_nimg // batch_size
    epoch, warmup = step // epoch_batches, warmup_epochs * epoch_batches
    if epoch < warmup_epochs:
        return ref_lr * step / warmup
    peak = ref_lr * (warmup - 1) / warmup if warmup > 0 else ref_lr
    if epoch == warmup_epochs:
        return peak
    return warmup_cosine(epoch - warmup_epochs, epochs - warmup_epochs - 1, peak, min_lr)
