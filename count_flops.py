"""Count parameters and operations of a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import CommandLine, offline_option
from dnnlib.download import is_url
from dnnlib.errors import UserError
from training.config.edm2 import TRAINING_PRESETS
from training.config.names import unknown_preset


def open_network(name: str) -> Any:
    """The network of a file, URL or training preset, without its values."""
    import torch

    from training.families import preset_network
    from training.snapshot import build_for, open_snapshot

    if name in TRAINING_PRESETS:
        with torch.device("meta"):
            return preset_network(TRAINING_PRESETS[name]).eval()
    if not is_url(name) and not Path(name).suffix and not Path(name).exists():
        raise unknown_preset("NET", name, TRAINING_PRESETS)
    return build_for(open_snapshot(name))[0].eval()


def measure_memory(net: Any) -> int | None:
    """Peak memory per sample in bytes, where there is a GPU to measure it on; the weights need no values."""
    import torch

    from torch_utils.device import select_device, set_up_device
    from training.families import architecture_of
    from training.flops import peak_memory_per_sample

    architecture = architecture_of(net)
    if not torch.cuda.is_available() or not architecture.makes_images:
        return None
    device = select_device("cuda")
    set_up_device(device)
    net.to_empty(device=device).precision = "fp16"
    return peak_memory_per_sample(net, lambda batch: architecture.inputs(net, batch, device), architecture.step)


def cost(name: str) -> dict[str, Any]:
    """What one evaluation of a network costs."""
    from training.families import architecture_of
    from training.flops import count_operations, count_parameters

    net = open_network(name)
    operations = count_operations(net, architecture_of(net).inputs(net, 1, "meta"))
    return dict(
        net=name,
        parameters=count_parameters(net),
        gflops=sum(operations.values()) / 1e9,
        gflops_by_layer={kind: count / 1e9 for kind, count in operations.items()},
        peak_memory_per_sample=measure_memory(net),
    )


def show(result: dict[str, Any]) -> None:
    print(result["net"])
    print(f"  {'parameters':24s}{format_si(result['parameters'], 'M'):>10s}")
    print(f"  {'operations':24s}{format_si(result['gflops'] * 1e9):>10s}  per evaluation; a multiply-add is one")
    for kind, gflops in result["gflops_by_layer"].items():
        print(f"    {kind:22s}{format_si(gflops * 1e9):>10s} {gflops / result['gflops']:7.1%}")
    memory = result["peak_memory_per_sample"]
    text = "not measured: no CUDA device" if memory is None else f"{memory / 2**20:.1f} MiB"
    print(f"  {'peak memory per sample':24s}{text:>10s}")


def format_si(number: float, largest: str = "G") -> str:
    """'1523.16 M' and the like, in units up to `largest`."""
    units = {"G": 1e9, "M": 1e6, "k": 1e3}
    for unit in list(units)[list(units).index(largest) :]:
        if number >= units[unit]:
            return f"{number / units[unit]:.2f} {unit}"
    return f"{number:.0f}"


@click.command(cls=CommandLine)
@click.argument("nets", metavar="NET...", nargs=-1)
@click.option("--net", "more_nets", help="The same as an option", metavar="NET", multiple=True)
@click.option("--json", "as_json", help="Print JSON, one line per network", is_flag=True)
@offline_option
def main(nets: tuple[str, ...], more_nets: tuple[str, ...], as_json: bool) -> None:
    """Count what one evaluation of a network costs. NET is a snapshot, a URL or the name of a training preset.

    Operations are counted as in the papers: one for a multiply-add, one for each element of other operations.

    \b
    Examples:
      python count_flops.py edm2-img512-xxl
      python count_flops.py --json out/digits/network-snapshot-0000147-0.100.safetensors
    """
    if not nets + more_nets:
        raise UserError("which network? Give a snapshot, a URL or one of the presets " + ", ".join(TRAINING_PRESETS))
    for name in nets + more_nets:
        result = cost(name)
        if as_json:
            print(json.dumps(result))
        else:
            show(result)


if __name__ == "__main__":
    main()
