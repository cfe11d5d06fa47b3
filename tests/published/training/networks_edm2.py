"""The classes' names. All that an object is comes from a pickle."""

import torch


class Precond(torch.nn.Module):
    pass


class UNet(torch.nn.Module):
    pass


class Block(torch.nn.Module):
    pass


class MPConv(torch.nn.Module):
    pass


class MPFourier(torch.nn.Module):
    pass
