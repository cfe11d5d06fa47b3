"""From a dataset to a command that trains on it: each option with its reason, and how long it takes on this machine."""

from training.advice.commands import Advice, Proposal, advice_on, propose

__all__ = ["Advice", "Proposal", "advice_on", "propose"]
