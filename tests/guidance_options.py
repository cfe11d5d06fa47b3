"""Options of guidance: together, all of them."""

# Each set gives other images than --guidance=2 alone.
OPTIONS_OF_GUIDANCE = {
    "linear": ["--guidance=2", "--guidance-schedule=linear", "--guidance-ramp=0.02,1", "--guidance-end=0.5"],
    "cosine": ["--guidance=2", "--guidance-schedule=cosine", "--guidance-ramp=0.02,1"],
    "table": ["--guidance-table=WEIGHTS"],
    "apg": ["--guidance=2", "--guidance-method=apg"],
    "changed apg": ["--guidance=2", "--guidance-method=apg", "--apg-eta=0.5", "--apg-norm=0.1", "--apg-momentum=0.2"],
    "cfg++": ["--guidance=0.6", "--guidance-method=cfg++"],
    "cfg-zero": ["--guidance=2", "--guidance-method=cfg-zero"],
    "changed cfg-zero": ["--guidance=2", "--guidance-method=cfg-zero", "--zero-init-steps=3"],
}
