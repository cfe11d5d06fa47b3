"""Orders of the steps of DPM-Solver's singlestep solvers."""

from dnnlib.errors import UserError


def singlestep_orders(evaluations: int, order: int, fixed: bool = False) -> list[int]:
    """Orders of steps that evaluate the denoiser `evaluations` times in all.

    Steps of order 3 end in orders 2, 1 or in one of the two (arXiv 2206.00927, Section 3.4, "DPM-Solver-fast"), those
    of order 2 in 1 where the number is odd.

    Args:
        fixed: all steps have the same order.

    Raises:
        UserError: the number is not a multiple of a fixed order.
    """
    full, rest = divmod(evaluations, order)
    if fixed and rest:
        raise UserError(f"{evaluations} steps are not a multiple of the fixed order {order}")
    if rest == 0 and order == 3 and not fixed and full > 0:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [rest] * (rest > 0)
