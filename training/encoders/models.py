"""VAEs of diffusers: found in a folder, a file, on the Hugging Face hub or in its cache, and loaded."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnnlib.download import OFFLINE_VARIABLE, offline, open_url
from dnnlib.errors import RunError, UserError, one_line
from dnnlib.files import file_sha256
from training.config.edm2 import PUBLISHED_VAE
from training.encoders.published_autoencoder import load_autoencoder

# What files of strangers may have fetched from the hub without being asked about it.
KNOWN_VAES = (
    PUBLISHED_VAE,
    "stabilityai/sd-vae-ft-ema",
    "stabilityai/sdxl-vae",
    "madebyollin/sdxl-vae-fp16-fix",
    "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers",
    "mit-han-lab/dc-ae-f64c128-in-1.0-diffusers",
    "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
)
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # in a folder or repository
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*(?:@[\w.-]+)?)((?:/\w[\w.-]*)*)")  # owner/repo[@revision][/folder]
PUBLISHED_SUFFIX = ".pth"  # of the VAE of the published U-ViT code, which says its configuration by its shapes
MAX_CONFIG = 1 << 20  # bytes


class ModelFiles:
    """Where the files of a VAE are: `folder` holds config.json, and `weights` is the file of the weights.

    Args:
        name: a name on the hub (owner/repo[@revision][/folder]), a folder, a .safetensors file (beside its config.json,
            or with the configuration of the published VAE), or a .pth file of the published U-ViT code.
        named_by: the file that names it; '' = the user does. What a file names on the hub is fetched only if it is
            one of `KNOWN_VAES`; of others, what the cache holds is used.
        with_weights: find the weights, too; else `weights` is ''.

    Raises:
        UserError: it is missing, or on the hub and not to be fetched.
        RunError: it could not be downloaded now.
    """

    def __init__(self, name: str, named_by: str = "", with_weights: bool = True):
        self.name, self.named_by = name, named_by
        self.is_published = name.endswith(PUBLISHED_SUFFIX)
        failed, is_file = f"the VAE {name} could not be loaded", name.endswith(".safetensors") or self.is_published
        found = os.path.exists(name)
        if not found and (is_file or HUB_NAME.fullmatch(name) is None):
            other = ", or --encoder with its place" if named_by else ""
            raise UserError(f"{failed}: no such file or folder (a name on the hub would be owner/repo{other})")
        try:
            if not is_file:
                files = [CONFIG, WEIGHTS] if with_weights else [CONFIG]
                self.folder = name if found else _hub_folder(name, files, named_by)
            else:
                self.folder = os.path.dirname(name) or "."
                if not self.is_published and not os.path.isfile(os.path.join(self.folder, CONFIG)):
                    self.folder = _hub_folder(PUBLISHED_VAE, [CONFIG])
        except (UserError, RunError) as err:
            reason = err
            if is_file:
                reason = f"no {CONFIG} beside it, and that of {PUBLISHED_VAE} is not available: put its own beside it"
            raise type(err)(f"{failed}: {reason}") from None
        self.weights = name if is_file else os.path.join(self.folder, WEIGHTS) if with_weights else ""

    def class_name(self) -> str:
        """diffusers' name of the class, as config.json says it.

        Raises:
            UserError: it cannot be read.
        """
        if self.is_published:
            return "AutoencoderKL"
        path = Path(self.folder, CONFIG)
        try:
            with open(path, "rb") as f:
                config = json.loads(f.read(MAX_CONFIG))
            name = config.get("_class_name", "AutoencoderKL")
        except FileNotFoundError:
            raise UserError(f"the VAE {self.name} could not be loaded: no file named {CONFIG} in it") from None
        except (OSError, ValueError, RecursionError, AttributeError) as err:
            raise UserError(f"the VAE {self.name} could not be loaded: {path}: {one_line(err)}") from None
        return str(name)

    def sha256(self) -> str:
        """SHA-256 of the weights.

        Raises:
            UserError: there are none.
        """
        try:
            return file_sha256(self.weights)
        except OSError as err:
            raise UserError(f"the VAE {self.name} could not be loaded: {self.weights}: {err.strerror}") from None

    def load(self, class_name: str) -> Any:
        """The model, of this class of diffusers.

        Raises:
            UserError: diffusers is not installed, or the model is damaged or of another class.
        """
        failed = f"the VAE {self.name} could not be loaded"
        diffusers = import_diffusers()
        found_class = self.class_name()
        if found_class != class_name:
            raise UserError(f"{failed}: it is an {one_line(found_class)[:50]}, not an {class_name}")
        model_class = getattr(diffusers, class_name)
        if self.is_published:
            return load_autoencoder(self.name, model_class)
        # Not its default low_cpu_mem_usage, which asks for another package in five lines.
        options = dict(low_cpu_mem_usage=False, local_files_only=True)
        try:
            if self.weights == self.name:
                return model_class.from_single_file(self.name, config=self.folder, **options)
            options |= dict(use_safetensors=True, output_loading_info=True)
            model, found = model_class.from_pretrained(self.folder, **options)
        except Exception as err:  # diffusers has errors of its own, and torch's where shapes differ
            raise UserError(f"{failed}: {one_line(str(err).strip())[:200]}") from None
        if found["missing_keys"]:  # which diffusers fills with random numbers
            first = ", ".join(sorted(found["missing_keys"])[:3])
            raise UserError(f"{failed}: it lacks {len(found['missing_keys'])} weights, such as {first}: copy it again")
        return model


def absolute(name: str) -> str:
    """The name of a VAE that means the same in every folder."""
    return os.path.abspath(name) if os.path.exists(name) else name


def import_diffusers() -> Any:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import diffusers
    except ImportError:
        raise UserError("converting between pixels and latents needs diffusers: pip install diffusers") from None
    return diffusers


def _hub_folder(name: str, files: Sequence[str], named_by: str = "") -> str:
    """The folder in huggingface_hub's cache that holds these files, downloaded if they are not there yet.

    Raises:
        UserError: they are missing from the hub, from the cache when offline, or not to be fetched.
        RunError: they could not be downloaded now.
    """
    match = HUB_NAME.fullmatch(name)
    assert match is not None
    repo, folder = match.groups()
    if named_by and repo.partition("@")[0] not in KNOWN_VAES:
        return _cached_folder(repo, folder, files, named_by)
    urls = {file: f"hf://{repo}{folder}/{file}" for file in (CONFIG, WEIGHTS)}
    advice = (
        f"run python snapshot_tool.py prefetch {' '.join(urls.values())} where there is a network, "
        "and copy huggingface_hub's cache (HF_HOME) from there for --offline"
    )
    try:
        paths = [open_url(urls[file], return_filename=True) for file in files]
    except RunError as err:
        raise RunError(f"{err}; {advice}") from None
    except UserError:
        if not offline():
            raise
        raise UserError(
            f"downloads are off ({OFFLINE_VARIABLE}=1), and it is not in huggingface_hub's cache; {advice}"
        ) from None
    return os.path.dirname(paths[0])


def _cached_folder(repo: str, folder: str, files: Sequence[str], named_by: str) -> str:
    """As `_hub_folder`, for what the cache holds."""
    import huggingface_hub

    repo_id, _, revision = repo.partition("@")
    paths = [
        huggingface_hub.try_to_load_from_cache(repo_id, f"{folder}/{file}".lstrip("/"), revision=revision or None)
        for file in files
    ]
    if not all(isinstance(path, str) for path in paths):
        raise UserError(
            f"{named_by} names it, and it is none of the known ones on the Hugging Face hub, which is not asked for it "
            f"unless you add --trust-encoder=1 (or give your own: --encoder)"
        )
    return os.path.dirname(str(paths[0]))
