"""Options of UniPC."""

from dataclasses import dataclass

from training.config.fields import Config, option


@dataclass(frozen=True, kw_only=True)
class UniPC(Config):
    """The unified predictor-corrector of Zhao et al. 2023 (arXiv 2302.04867)."""

    order: int = option(
        3,
        "Order p of the predictor of --sampler=unipc; its corrector makes it p + 1",
        flag="--unipc-order",
        low=1,
        high=3,
    )
    B: str = option(
        "B2", "The paper's B(h), which counts in the first two steps: B1 = h, B2 = e^h - 1", flag="--unipc-b",
        choices=("B1", "B2"),
    )  # fmt: skip
    prediction: str = option(
        "data", "What it expands: the image or the noise", flag="--unipc-prediction", choices=("data", "noise")
    )
    corrector: bool = option(
        True,
        "Correct each step by the evaluation at its end, which the next step needs anyway",
        flag="--unipc-corrector",
    )
