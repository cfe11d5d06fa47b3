"""See what networks make, in a browser."""

import shlex
import tempfile
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import CommandLine, given_options, offline_option, with_options
from training.config.explore import ExploreConfig
from training.config.fields import click_options
from training.config.generation import GenerationConfig, NetworksConfig, SamplingConfig


@click.command(cls=CommandLine)
@with_options(click_options(ExploreConfig))
@with_options(click_options(NetworksConfig))
@with_options(click_options(SamplingConfig))
@offline_option
@click.pass_context
def main(ctx: click.Context, **opts: Any) -> None:
    """A page in a browser that shows what networks make: by seed, class or prompt, sampler, guidance and EMA length,
    two settings side by side, with the command lines that make the same pictures. It begins with the options of
    generate_images.py that are given here, and is open to this machine alone.

    \b
    Examples:
      # All averages of a run
      python explore.py --net=out/digits
      # Beside a run of another kind, and with autoguidance to begin with
      python explore.py --net=out/digits --gnet=out/guide --guidance=1.5 --also=out/uvit
    """
    explore = ExploreConfig.from_flat({name: opts.pop(name) for name in ("also", "port") if opts[name] is not None})
    others = ctx.params.keys() - opts.keys()
    words = [word for text in given_options(ctx, others) for word in shlex.split(text)]
    config = GenerationConfig.take(opts)

    from training.explore.server import serve
    from training.explore.session import Session
    from training.generation import fetch

    fetch(config.networks)
    with tempfile.TemporaryDirectory(prefix="openedm2-explore-") as folder:
        serve(Session(config, words, explore.also, Path(folder)), explore.port)


if __name__ == "__main__":
    main()
