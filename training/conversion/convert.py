"""Making datasets: any images in, square PNG files with labels out."""

import contextlib
import itertools
import json
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import PIL

from dnnlib.errors import UserError, one_line
from dnnlib.files import check_not_input
from dnnlib.progress import Progress
from training.conversion.depth import ValueRange
from training.conversion.label_table import LabelTable
from training.conversion.labels import WrittenLabels
from training.conversion.sources import CLASS_FOLDERS, Label, Source, SourceImage
from training.conversion.transforms import decode_image, enlarged_from, make_transform
from training.conversion.workers import map_in_order
from training.conversion.writer import DatasetWriter, encode_png, image_name
from training.dataset.labels import describe_classes, only_the_first
from training.dataset.listing import NAMES_FILE, many
from training.dataset.order import evenly_spaced

CHUNK = 16  # images that a worker gets at a time
SHOWN = 10  # images left out that are listed one by one
MADE_AGAIN = 64  # images, to see that the source is the same


@dataclass(frozen=True)
class ImageSettings:
    """What is done to each image."""

    transform: str | None
    width: int | None
    height: int | None
    channels: int
    value_range: ValueRange | None = None  # of images of more than 8 bits, see `to_8_bits`


@dataclass
class Report:
    """What a conversion did, as report.json keeps it beside the images."""

    written: int = 0
    too_small: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name, error
    classes: list[str] | None = None  # names of the classes 0, 1, ...
    class_counts: dict[int, int] = field(default_factory=dict)  # images per class; empty where labels are no classes
    sources: list[list[str]] = field(default_factory=list)  # what was found in each, in lines for users
    notes: list[str] = field(default_factory=list)  # on the labels, and what was left out
    # Of the images that this run has converted; not in report.json, which interruptions leave as it is.
    enlarged: int = 0
    smallest: int = 0  # shorter side of the smallest of these, before

    def lines(self, dest: Path) -> list[str]:
        """What was done, for users."""
        classes = describe_classes(self.class_counts, self.classes) if self.class_counts else "no classes"
        lines = [f"{dest}: {many(self.written, 'image')}, {classes}", *(f"  {note}" for note in self.notes)]
        if self.enlarged:
            lines.append(
                f"  Note: {self.enlarged} of {many(self.written, 'image')} were enlarged, the smallest from "
                f"{self.smallest} pixels: a lower --resolution would keep them sharp"
            )
        if self.too_small:
            lines.append(f"  left out: {self.too_small} that are too small")
        lines += [f"  left out: {name}: {reason}" for name, reason in self.skipped[:SHOWN]]
        if len(self.skipped) > SHOWN:
            lines.append(f"  and {len(self.skipped) - SHOWN} more; report.json in {dest} lists them")
        return lines


def convert_images(
    sources: Sequence[Source],
    dest: Path,
    settings: ImageSettings,
    labels: LabelTable | None = None,
    max_images: int | None = None,
    workers: int = 1,
    on_error: str = "fail",
    resume: bool = False,
    keep_names: bool = False,
) -> Report:
    """Convert images into a dataset of uncompressed PNG files. Its bytes do not depend on the number of workers.

    Args:
        labels: a table of labels; None = those of the sources.
        on_error: 'fail', or 'skip' images that are broken.
        keep_names: write names.json, which says what images were called in the source.

    Raises:
        UserError: no images, broken ones, sizes or labels that do not go together, or `dest` exists.
        OSError: `dest` cannot be written. What was written stays, for `resume`.
    """
    make_transform(settings.transform, settings.width, settings.height)  # fails before anything is written
    for source in sources:
        check_not_input("--dest", dest, {"--source": source.path})
        if labels is None and source.classes != sources[0].classes:
            raise UserError(
                f"--source={source.path}: other names of classes than {sources[0].path}: convert them one by one"
            )
    written_labels = WrittenLabels(
        labels,
        only_names=labels is not None or any(source.labels == CLASS_FOLDERS for source in sources),
        class_names=sources[0].classes if labels is None else labels.class_names,
        multi_label=labels is None and any(source.multi_label for source in sources),
    )
    options = dict(
        sources=[str(source.path) for source in sources],
        transform=settings.transform,
        resolution=None if settings.width is None else [settings.width, settings.height],
        channels=settings.channels,
        range=None if settings.value_range is None else list(settings.value_range),
        max_images=max_images,
        **({"keep_names": True} if keep_names else {}),
    )
    writer = DatasetWriter(dest, options, resume)
    try:
        conversion = _Conversion(writer, settings, written_labels, on_error)
        conversion.write_images(sources, max_images, workers)
        report = conversion.finish(sources)
        counts = [source.count for source in sources if source.count is not None]
        if max_images is not None and len(counts) == len(sources):
            # Of several sources, classes of the same name are one.
            known = sources[0].num_classes if len(sources) == 1 and labels is None else None
            report.notes += only_the_first(max_images, sum(counts), len(report.class_counts), known)
        if labels is not None and (unused := labels.unused()):
            report.notes.append(f"{many(len(unused), 'row')} of {labels.path} without an image, such as {unused[0]}")
        writer.write("dataset.json", written_labels.to_json())
        if keep_names:
            writer.write(NAMES_FILE, json.dumps(conversion.names).encode())
        stored = {key: value for key, value in asdict(report).items() if key not in ("enlarged", "smallest")}
        writer.write("report.json", json.dumps({**stored, "options": options}, indent=2).encode())
        writer.finish()
    except BaseException:
        writer.close()
        raise
    return report


class _Conversion:
    """The images of a conversion on their way to the writer, with their labels and the report."""

    def __init__(self, writer: DatasetWriter, settings: ImageSettings, labels: WrittenLabels, on_error: str):
        self.writer = writer
        self.settings = settings
        self.labels = labels
        self.on_error = on_error
        self.report = Report()
        self.names: dict[str, str] = {}  # of images in the source, by their names in the dataset
        self._first: _Converted | None = None

    def write_images(self, sources: Sequence[Source], max_images: int | None, workers: int) -> None:
        counts = [source.count for source in sources if source.count is not None]
        totals = [max_images] if max_images is not None else []
        if len(counts) == len(sources):
            totals.append(sum(counts))
        images = ((source.path, image) for source in sources for image in source.images())
        chunks = _chunks(itertools.islice(images, max_images), self.writer.names)
        # Closed before an error leaves, so that the workers end in order.
        work = map_in_order(_Task(self.settings), chunks, workers)
        with (
            contextlib.closing(work),
            Progress(total=min(totals, default=None), unit="img") as progress,
        ):
            for result in itertools.chain.from_iterable(work):
                progress.update()
                self._add(result)

    def _add(self, result: "_Converted") -> None:
        name = image_name(result.index)
        present = name in self.writer.names  # from the run that was interrupted
        if result.png is not None:
            self._check_size(result)
            if result.enlarged_from:
                self.report.enlarged += 1
                self.report.smallest = min(result.enlarged_from, self.report.smallest or result.enlarged_from)
            if not present:
                self.writer.write(name, result.png)
            elif zlib.crc32(result.png) != self.writer.crc(name):
                raise self._changed(result.name)
        elif result.is_error and present:
            raise self._changed(result.name)
        elif not present:
            self._leave_out(result)
            return
        self.labels.add(name, result.source, result.name, result.label)
        self.names[name] = result.name
        self.report.written += 1

    def _leave_out(self, result: "_Converted") -> None:
        if not result.is_error:
            self.report.too_small += 1
        elif self.on_error == "fail":
            raise UserError(f"{result.name}: {result.reason} (--on-error=skip leaves such images out)")
        else:
            self.report.skipped.append((result.name, result.reason))

    def _check_size(self, result: "_Converted") -> None:
        if self._first is None:
            self._first = result
        (width, height), first = result.size, self._first
        if result.size != first.size:
            self.writer.discard()  # another command will make them differently
            raise UserError(
                f"{result.name} is {width}x{height}, but {first.name} {first.size[0]}x{first.size[1]}: "
                "give --resolution (and --transform)"
            )
        if width != height:
            self.writer.discard()
            raise UserError(f"{result.name} is {width}x{height}, not square: give --transform and --resolution")

    def finish(self, sources: Sequence[Source]) -> Report:
        """The report, once all images are written."""
        if set(self.writer.names).difference(self.labels.names):
            raise self._changed("the source, which now has fewer images,")
        if self.report.written == 0:
            if self.report.too_small > 0:
                raise UserError(
                    f"all {self.report.too_small} images are too small for --resolution={self.settings.width}x"
                    f"{self.settings.height} with --transform={self.settings.transform}: choose a lower one"
                )
            raise UserError(f"no images in {', '.join(str(source.path) for source in sources)} could be converted")
        self.labels.finish()
        self.report.classes = self.labels.class_names
        self.report.class_counts = dict(sorted(self.labels.counts().items()))
        self.report.sources = [source.summary() for source in sources]
        return self.report

    def _changed(self, what: str) -> UserError:
        return UserError(
            f"--resume: {what} has changed since {self.writer.partial} was started: delete that to start over"
        )


# ---------------------------------------------------------------------------------------------------------
# What the workers do


@dataclass
class _Converted:
    """The result of converting an image: a PNG file and its size, or the reason why there is none."""

    index: int
    source: Path
    name: str
    label: Label
    png: bytes | None = None
    size: tuple[int, int] = (0, 0)  # width, height
    enlarged_from: int = 0  # see `transforms.enlarged_from`
    reason: str = ""
    is_error: bool = False


_Item = tuple[int, Path, SourceImage, bool]  # index, source, image, whether it is written already


@dataclass(frozen=True)
class _Task:
    """Converts a chunk of images; made once, run in the workers."""

    settings: ImageSettings

    def __call__(self, chunk: list[_Item]) -> list[_Converted]:
        settings = self.settings
        transform = make_transform(settings.transform, settings.width, settings.height)
        results = []
        for index, source, image, done in chunk:
            result = _Converted(index, source, image.name, image.label)
            results.append(result)
            if done:
                continue
            if image.error:
                result.reason, result.is_error = f"cannot be read: {image.error}", True
                continue
            try:
                decoded = decode_image(image.data, settings.channels, settings.value_range)
                pixels = transform(decoded)
            except Exception as err:  # a broken image can fail in any way
                kind = "damaged, or not an image" if isinstance(err, PIL.UnidentifiedImageError) else one_line(err)
                result.reason, result.is_error = f"cannot be read: {kind or type(err).__name__}", True
                continue
            if pixels is None:
                result.reason = "too small"
                continue
            result.png, result.size = encode_png(pixels), (pixels.shape[1], pixels.shape[0])
            result.enlarged_from = enlarged_from(settings.transform, decoded, settings.width, settings.height)
        return results


def _chunks(images: Iterator[tuple[Path, SourceImage]], names: Collection[str]) -> Iterator[list[_Item]]:
    """Images with their index and source, and whether they are written already (then without their data).

    Some of the written ones are converted once more, which shows their size and whether the source is still the same.
    """
    numbered, present = enumerate(images), sorted(names)
    again = {present[i] for i in evenly_spaced(len(present), MADE_AGAIN)}
    while True:
        chunk = []
        for index, (source, image) in itertools.islice(numbered, CHUNK):
            done = image_name(index) in names and image_name(index) not in again
            chunk.append((index, source, replace(image, data=b"") if done else image, done))
        if not chunk:
            return
        yield chunk
