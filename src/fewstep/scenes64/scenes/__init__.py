"""Scenes: rendered 64x64 images of shapes with captions that leave much open; endless, free, and known exactly."""

from fewstep.scenes64.scenes.caption import WORDS
from fewstep.scenes64.scenes.content import ATTRIBUTES, Mention, Scene, Thing, place_of
from fewstep.scenes64.scenes.source import Scenes
from fewstep.scenes64.scenes.write import write_image_folder, write_webdataset

__all__ = [
    "ATTRIBUTES",
    "WORDS",
    "Mention",
    "Scene",
    "Scenes",
    "Thing",
    "place_of",
    "write_image_folder",
    "write_webdataset",
]
