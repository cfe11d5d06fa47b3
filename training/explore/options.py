"""Options of generate_images.py as the page has them: some in places of their own, others in a line of text."""

import shlex
from collections.abc import Sequence
from typing import Any

from dnnlib.errors import UserError
from training.config.explore import MAX_STEPS, PageRequest, PageSetting
from training.config.fields import all_fields, show
from training.config.generation import GenerationConfig, SamplingConfig, check_seed
from training.config.samplers import SOLVERS
from training.explore.sources import Found
from training.provenance import format_seeds
from training.sweep import read_options

CONTROLS = ("sampler", "steps", "guidance", "guidance-interval", "class", "prompt", "temperature")  # with own places
NOT_ON_PAGE = ("prompts", "guidance-table", "device", "compile")  # they name files, or are the same for all images
OUTDIR = "out/explore"  # in commands
Words = list[str]  # options, '--name=value' each

FIELDS = {field.flag.removeprefix("--"): field for field in all_fields(SamplingConfig)}


class Options:
    """The options that explore.py was started with, and those that the page asks for.

    Args:
        config, words: options of generate_images.py, and the same as words of a command line.
    """

    def __init__(self, config: GenerationConfig, words: Words):
        self.config = config
        given = [word for word in words if _name(word) not in ("preset", "net", "gnet", "guidance")]
        self.fixed = [word for word in given if not _is_for_page(word) or _is_file(word)]
        self.first = [word for word in given if word not in self.fixed]

    @property
    def has_classifier(self) -> bool:
        return self.config.networks.classifier is not None

    def describe(self) -> dict[str, Any]:
        """What the page begins with, and what it must know of options, as plain JSON values."""
        guidance, sampling = self.config.sampling.guidance, SamplingConfig()
        first: dict[str, list[str]] = {"guidance": [f"{guidance.guidance:g}"]}
        for word in self.first:
            if _name(word) in CONTROLS:
                first.setdefault(_name(word), []).append(_value(word))
        guide = "network" if self.config.networks.gnet is not None else "itself"
        return {
            "first": first,
            "guide": guide if guidance.acts and not self.has_classifier else "none",
            "more": shlex.join(word for word in self.first if _name(word) not in CONTROLS),
            "classifier": self.config.networks.classifier,
            "defaults": {
                "sampler": sampling.sampler.solver,
                "steps": sampling.sampler.grid.num_steps,
                "guidance": sampling.guidance.guidance,
                "temperature": 1,
            },
            "takes_steps": {name: kind.grid not in ("ends", "listed") for name, kind in SOLVERS.items()},
        }

    def of_page(self, setting: PageSetting) -> Words:
        """The options that the page asks for, but for those that are as by default, or have no effect beside others.

        Raises:
            UserError: one has no place there.
        """
        try:
            more = shlex.split(setting.more)
        except ValueError as err:  # a quotation mark without its counterpart
            raise UserError(f"further options: {setting.more}: {err}") from None
        for word in more:
            if not (word.startswith("--") and "=" in word):
                raise UserError(f"further options: {word!r} is not of the form --name=value, such as --rho=5")
            if _name(word) in CONTROLS:
                raise UserError(f"further options: {word}: --{_name(word)} has its own place on this page")
        for word in [*setting.options, *more]:
            if not _is_for_page(word):
                known = ", ".join(sorted(FIELDS.keys() - {*CONTROLS, *NOT_ON_PAGE}))
                raise UserError(f"further options: {word} cannot be chosen on this page; these can: {known}")
            if _name(word) == "sigmas" and _is_file(word):
                raise UserError(f"{word} is no list of numbers, such as 20,5,1,0.2 (files have no place on this page)")
        useless = {"guidance", "guidance-interval"} if setting.guide == "none" and not self.has_classifier else set()
        useless |= {"steps"} if any(_name(word) == "sigmas" for word in more) else set()
        kept = [word for word in setting.options if _name(word) not in useless and not _is_default(word)]
        return kept + more

    def read(self, words: Words, main: str, guide: str | None = None) -> GenerationConfig:
        """What options of the page stand for, with those that it cannot change.

        Args:
            main, guide: networks.

        Raises:
            UserError: they are refused by generate_images.py, or take too long.
        """
        config = read_options(self._with_networks(words, main, guide))
        steps = config.sampling.sampler.grid.num_steps
        if steps > MAX_STEPS:
            raise UserError(f"--steps={steps}: this page takes at most {MAX_STEPS}")
        return config

    def command(self, words: Words, main: Found, guide: Found | None, seeds: Sequence[int]) -> str:
        """The command lines that make the same images."""
        found = [main] if guide is None else [main, guide]
        before = list(dict.fromkeys(network.command for network in found if network.command))
        options = self._with_networks(words, main.name, None if guide is None else guide.name)
        options += [f"--seeds={format_seeds(seeds)}", f"--outdir={OUTDIR}"]
        return "\n".join([*before, _lines("python generate_images.py", options)])

    def _with_networks(self, words: Words, main: str, guide: str | None) -> Words:
        return [f"--net={main}", *([] if guide is None else [f"--gnet={guide}"]), *self.fixed, *words]


def seeds_of(request: PageRequest) -> range:
    """The seeds of the images that the page asks for.

    Raises:
        UserError: the first is no seed.
    """
    if not request.seed.strip().isdecimal():
        raise UserError(f"seed {request.seed!r} is no whole number, such as 0 or 16")
    first = int(request.seed)
    check_seed(first + request.images - 1)
    return range(first, first + request.images)


def _lines(program: str, options: Words) -> str:
    """A command, with its options in lines of their own."""
    return " \\\n    ".join([program, *map(shlex.quote, options)])


def _name(word: str) -> str:
    return word.partition("=")[0].removeprefix("--")


def _value(word: str) -> str:
    return word.partition("=")[2]


def _is_for_page(word: str) -> bool:
    return _name(word) in FIELDS and _name(word) not in NOT_ON_PAGE


def _is_file(word: str) -> bool:
    """Whether an option that takes numbers or a file is given a file."""
    return _name(word) == "sigmas" and not all(map(_is_number, _value(word).split(",")))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_default(word: str) -> bool:
    """Whether an option says what is so without it."""
    default, value = FIELDS[_name(word)].default, _value(word)
    if default is None:
        return _name(word) == "temperature" and value == "1"
    if isinstance(default, (int, float)):
        return _is_number(value) and float(value) == default
    return value == show(default)
