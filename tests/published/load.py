"""load.py PICKLE OUTPUT: unpickle as the published tools do, and tell what came out."""

import pickle
import sys

import torch

with open(sys.argv[1], "rb") as f:
    data = pickle.load(f)
net = data.ema if isinstance(data, dict) else data
output = dict(state=net.state_dict(), init_kwargs=dict(net._init_kwargs), repr=repr(net))
if isinstance(data, dict):
    output.update(
        encoder=type(data.encoder).__name__,
        dataset_kwargs=dict(data.dataset_kwargs),
        loss=dict(P_mean=data.loss_fn.P_mean, P_std=data.loss_fn.P_std),
    )
    if hasattr(data.encoder, "scale"):
        output.update(scale=torch.from_numpy(data.encoder.scale), bias=torch.from_numpy(data.encoder.bias))
torch.save(output, sys.argv[2])
