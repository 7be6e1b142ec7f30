"""Scenes: rendered 64x64 images of shapes with captions that leave much open; endless, free, and known exactly."""

from fewstep.scenes64.scenes.caption import WORDS, describe
from fewstep.scenes64.scenes.content import (
    ATTRIBUTES,
    COLOURS,
    FILLS,
    PLACES,
    SHAPES,
    SIZES,
    Background,
    Mention,
    Scene,
    Thing,
    place_of,
)
from fewstep.scenes64.scenes.source import Rendered, Scenes
from fewstep.scenes64.scenes.write import write_image_folder, write_webdataset

__all__ = [
    "ATTRIBUTES",
    "COLOURS",
    "FILLS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "WORDS",
    "Background",
    "Mention",
    "Rendered",
    "Scene",
    "Scenes",
    "Thing",
    "describe",
    "place_of",
    "write_image_folder",
    "write_webdataset",
]
