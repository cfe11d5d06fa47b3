"""What a user can choose for explore.py, and what its page may ask for."""

from dataclasses import dataclass

from training.config.fields import Config, option

MAX_IMAGES = 32  # at a time: as many as a batch of generate_images.py, which makes the same pixels then
MAX_STEPS = 4000
MAX_NETWORKS = 64


@dataclass(frozen=True, kw_only=True)
class ExploreConfig(Config):
    """The page, beside the options of generate_images.py that it begins with."""

    also: tuple[str, ...] = option(
        (),
        "Another network to choose on the page, as --net; may be repeated",
        metavar="FILE",
        items=(0, MAX_NETWORKS - 2),
        multiple=True,
    )
    port: int = option(8765, "Port of the page, at 127.0.0.1; 0 = any that is free", low=0, high=65535)


@dataclass(frozen=True, kw_only=True)
class NetworkChoice(Config):
    """A network of the page's list; of a training run, one of its snapshots, or an average that they make.

    `kimg` is its time in thousands of images, and `ema` a width such as 0.073, or what the names of snapshots end in,
    such as 'ema'. None = as of the snapshot that the folder of the run stands for.
    """

    network: int = option(0, flag=None, low=0)
    kimg: int | None = option(None, flag=None, low=0)
    ema: str | None = option(None, flag=None)


@dataclass(frozen=True, kw_only=True)
class PageSetting(Config):
    """How the page wants images to be made.

    `options` are those of generate_images.py that have a place of their own on the page, '--name=value' each, and
    `more` is a text with others. `guide` says what guides: nothing or the network itself, or the network of `guiding`.
    """

    main: NetworkChoice = NetworkChoice()
    guide: str = option("none", flag=None, choices=("none", "itself", "network"))
    guiding: NetworkChoice = NetworkChoice()
    options: tuple[str, ...] = option((), flag=None, items=(0, 64))
    more: str = option("", flag=None)


@dataclass(frozen=True, kw_only=True)
class PageRequest(Config):
    """Images that the page asks for.

    `pane` is whoever asks, and waits for the images of its last request alone. `seed` is the first of so many `images`,
    as they stand on the page; `path_of` says of which of them the way through the noise levels is wanted, None = none.
    """

    pane: str = option("", flag=None)
    seed: str = option("0", flag=None)
    images: int = option(1, flag=None, low=1, high=MAX_IMAGES)
    path_of: int | None = option(None, flag=None, low=0, high=MAX_IMAGES - 1)
    setting: PageSetting = PageSetting()
