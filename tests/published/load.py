"""load.py PICKLE INPUTS OUTPUT: evaluate the network of a pickle as the published tools would get it."""

import pickle
import sys

import torch

with open(sys.argv[1], "rb") as f:
    data = pickle.load(f)
net = data.ema.eval().requires_grad_(False).float()
inputs = torch.load(sys.argv[2], weights_only=True)
output = dict(
    D_x=net(inputs["x"], inputs["sigma"], inputs["labels"]),
    state=net.state_dict(),
    init_kwargs=dict(net._init_kwargs),
    encoder=type(data.encoder).__name__,
    dataset_kwargs=dict(data.dataset_kwargs),
    loss=dict(P_mean=data.loss_fn.P_mean, P_std=data.loss_fn.P_std),
)
if hasattr(data.encoder, "scale"):
    output["latents"] = torch.from_numpy(data.encoder.encode(inputs["x"].numpy()))
torch.save(output, sys.argv[3])
