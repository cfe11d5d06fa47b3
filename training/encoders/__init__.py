"""Encoders between stored data (pixels or raw latents) and what the diffusion model sees."""

from training.encoders.autoencoders import AutoencoderDCEncoder, AutoencoderEncoder, StabilityVAEEncoder
from training.encoders.base import (
    FINAL_STD,
    Encoder,
    Moments,
    RandnLike,
    RawLatentEncoder,
    StandardRGBEncoder,
    unwhiten,
    whiten,
)
from training.encoders.choice import (
    ENCODERS,
    data_spec,
    encoder_for,
    encoder_from_record,
    encoder_of_autoencoder,
    encoder_of_vae,
    encoder_to_decode,
    encoder_to_encode,
    same_latents,
)
from training.encoders.models import KNOWN_VAES, PUBLISHED_VAE
from training.encoders.nvae import NVAEEncoder
from training.encoders.text import (
    PUBLISHED_CLIP,
    TEXT_ENCODERS,
    ContextEncoder,
    TextEncoder,
    WordEncoder,
    text_encoder_from_record,
    text_record,
)
from training.encoders.vae import VAEEncoder

__all__ = [
    "ENCODERS",
    "FINAL_STD",
    "KNOWN_VAES",
    "PUBLISHED_CLIP",
    "PUBLISHED_VAE",
    "TEXT_ENCODERS",
    "AutoencoderDCEncoder",
    "AutoencoderEncoder",
    "ContextEncoder",
    "Encoder",
    "Moments",
    "NVAEEncoder",
    "RandnLike",
    "RawLatentEncoder",
    "StabilityVAEEncoder",
    "StandardRGBEncoder",
    "TextEncoder",
    "VAEEncoder",
    "WordEncoder",
    "data_spec",
    "encoder_for",
    "encoder_from_record",
    "encoder_of_autoencoder",
    "encoder_of_vae",
    "encoder_to_decode",
    "encoder_to_encode",
    "same_latents",
    "text_encoder_from_record",
    "text_record",
    "unwhiten",
    "whiten",
]
