"""Tiny text encoders of language models with their tokenizers, for pipelines that read prompts by such models.

Some of diffusers' pipelines take a processor of images and text, which wants torchvision: of text alone it is a
tokenizer with a chat template, so the tokenizer (FLUX.2-dev) or `text_processor` (Qwen-Image-2.1) stands for it.
"""

from __future__ import annotations

import sys
from functools import cache

WORDS = (
    "a", "an", "red", "blue", "green", "circle", "square", "on", "grass", "system", "user", "assistant", "describe",
    "the", "image", "color", "shape", "size", "texture", "text", "you", "are", "prompt", "of", "objects", "and",
    "background",
)  # fmt: skip
MARKS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "[IMG]",
)  # fmt: skip
PAD, END = MARKS[0], MARKS[2]
CHAT = """
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else -%}
{%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor -%}
{%- endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif -%}
{%- endif -%}
"""


def tokenizer(length, side="right", ends_with=""):
    """A token for each word, mark and other character; words that it does not know are all one token.

    The text that stands before a prompt of Qwen-Image is thus 34 tokens, as in the published model.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = list(dict.fromkeys([*MARKS, "<unk>", *WORDS, *map(chr, range(33, 127)), "\n"]))
    numbers = {name: number for number, name in enumerate(names)}
    made = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    if ends_with:
        made.post_processor = processors.TemplateProcessing(
            single=f"$A {ends_with}", special_tokens=[(ends_with, numbers[ends_with])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=length, padding_side=side, unk_token="<unk>", pad_token=PAD,
        eos_token=ends_with or END, additional_special_tokens=list(MARKS[1:]), chat_template=CHAT,
    )  # fmt: skip


@cache
def text_processor():
    """The class that stands for transformers.Qwen3VLProcessor, in whose place it is put: of text alone, saved as it."""
    import diffusers
    import transformers

    from fewstep.models.families import folder

    folder.find_spec = lambda name: name  # it needs no torchvision, without which the real one is refused
    assert diffusers.QwenImage21Pipeline  # whose import would put the real one back

    class Qwen3VLProcessor(transformers.ProcessorMixin):
        def __init__(self, tokenizer=None, chat_template=None):
            super().__init__(tokenizer, chat_template=chat_template)

        def __call__(self, text, images=None, **more):
            assert images is None
            return self.tokenizer(text, **more)

        def apply_chat_template(self, messages, **more):
            return [self.tokenizer.apply_chat_template(messages, **{"tokenize": True, "return_dict": False, **more})]

    Qwen3VLProcessor.__module__ = "transformers"
    sys.modules["transformers"].Qwen3VLProcessor = Qwen3VLProcessor  # what stands there by now
    return Qwen3VLProcessor


def _sizes(reader, width, layers):
    """Settings that the language models share."""
    return {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(reader), "max_position_embeddings": 2048,
        "bos_token_id": None, "eos_token_id": reader.eos_token_id, "pad_token_id": reader.pad_token_id,
    }  # fmt: skip


def qwen3(width, layers, writes=False):
    """Z-Image's and Anima's; FLUX.2-klein's is one that writes too."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    reader = tokenizer(512)
    kind = Qwen3ForCausalLM if writes else Qwen3Model
    return kind(Qwen3Config(tie_word_embeddings=True, **_sizes(reader, width, layers))), reader


def mistral3(width, layers):
    """FLUX.2-dev's, of which the hidden states 10, 20 and 30 are read."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    reader = tokenizer(512, side="left")
    eyes = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = Mistral3Config(
        text_config={"model_type": "mistral", **_sizes(reader, width, layers)}, vision_config=eyes,
        image_token_index=reader.convert_tokens_to_ids("[IMG]"), spatial_merge_size=1,
    )  # fmt: skip
    return Mistral3ForConditionalGeneration(config), reader


def qwen_vl(width, layers, generation, writes=True):
    """A Qwen-VL of generation 2.5 (Qwen-Image) or 3 (Qwen-Image-2.1; Krea 2, without its head)."""
    import transformers

    new = generation == 3
    name = "Qwen3VL" if new else "Qwen2_5_VL"
    config, kind = (
        getattr(transformers, name + end)
        for end in ("Config", "ForConditionalGeneration" if writes or not new else "Model")
    )
    reader = tokenizer(1024)
    turns = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1] if new else [1, 1, 2]}
    eyes = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
        "patch_size": 16 if new else 14,
    }  # fmt: skip
    eyes |= (
        {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        if new
        else {"fullatt_block_indexes": [0], "window_size": 28}
    )
    marks = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    marks |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    made = config(
        text_config={**_sizes(reader, width, layers), "rope_parameters": turns}, vision_config=eyes,
        **{key: reader.convert_tokens_to_ids(mark) for key, mark in marks.items()},
    )  # fmt: skip
    return kind(made), reader


def gemma2(width):
    """Sana's."""
    from transformers import Gemma2Config, Gemma2Model

    reader = tokenizer(300)
    config = Gemma2Config(query_pre_attn_scalar=8, sliding_window=64, **_sizes(reader, width, 2))
    return Gemma2Model(config), reader


def t5(width, multilingual=False):
    """Chroma's and Anima's; Wan's is the multilingual one."""
    import transformers

    reader, name = tokenizer(512, ends_with=END), "UMT5" if multilingual else "T5"
    config, kind = (getattr(transformers, name + end) for end in ("Config", "EncoderModel"))
    return kind(
        config(vocab_size=len(reader), d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2)
    ), reader
