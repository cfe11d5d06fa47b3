class EDM2Loss:
    pass
