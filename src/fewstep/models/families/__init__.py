"""Teachers through diffusers: one short file for each family of pipelines.

diffusers and transformers are imported inside functions: `fewstep --help` must not wait for them.
"""

from fewstep.models.families.family import CLIP_TOKENS, Family
from fewstep.models.families.load import is_ours, load_teacher, parts_of, shipped
from fewstep.models.families.network import TransformerNetwork
from fewstep.models.families.registry import FAMILIES, family_named, find_family
from fewstep.models.families.teacher import Teacher, as_teacher, vae_batch_size
from fewstep.models.families.unet import UNET_LORA_TARGETS, UNetNetwork

__all__ = [
    "CLIP_TOKENS",
    "FAMILIES",
    "UNET_LORA_TARGETS",
    "Family",
    "Teacher",
    "TransformerNetwork",
    "UNetNetwork",
    "as_teacher",
    "family_named",
    "find_family",
    "is_ours",
    "load_teacher",
    "parts_of",
    "shipped",
    "vae_batch_size",
]
