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
