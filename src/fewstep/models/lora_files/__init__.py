"""LoRA files of any form and layout: one module for style LoRAs, a recipe's ``init`` and ``teacher.loras``."""

from fewstep.models.lora_files.files import lora_file, put_weights, read_tensors, tensor_names
from fewstep.models.lora_files.heads import add_heads_file
from fewstep.models.lora_files.keys import Parts
from fewstep.models.lora_files.read import NotLowRank, add_loras, check_lora, is_lora, read_lora

__all__ = [
    "NotLowRank", "Parts", "add_heads_file", "add_loras", "check_lora", "is_lora", "lora_file", "put_weights",
    "read_lora", "read_tensors", "tensor_names",
]  # fmt: skip
