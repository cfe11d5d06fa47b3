class StandardRGBEncoder:
    pass


class StabilityVAEEncoder:
    pass
