"""What loading models has in common: errors and remarks in one sentence, silenced libraries, words for dtypes."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Remark(UserWarning):
    """A sentence for people about what they asked for: it is done, but perhaps not what they mean."""


class ModelError(ValueError):
    """What is wrong with a model's files, in a whole sentence of ours: raised as it is, without words around it."""


def short_error(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def check_device(name: str, option: str = "device") -> None:
    """Raises ValueError for a device that this machine or this torch does not have, or that holds no values (meta)."""
    try:
        there = torch.empty(1, device=name).cpu().device.type == "cpu"
    except torch.OutOfMemoryError:
        return  # it is there and full, which is another sentence
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError):
        there = False
    if not there:
        raise ValueError(f"{option}: there is no device '{name!s:.40}' here: use cpu, or cuda where torch finds one.")


def is_cached(repo: str, file: str) -> bool:
    """Whether a file of a hub model is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, file), str)


@contextmanager
def asking_hub(name: str, cached: bool = False) -> Iterator[None]:
    """Within this block the hub is asked for ``name``: that is said at once, and again whenever it does not answer.

    Args:
        cached: its files are on this machine, so that only an answer that does not come is worth a word.
    """
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if not cached and not HF_HUB_OFFLINE:
        warnings.warn(Remark(f"{name} is not on this machine: asking {ENDPOINT} for it."), stacklevel=3)
    logger = logging.getLogger("huggingface_hub")
    before = logger.handlers[:]
    logger.handlers[:] = [_Retries(name)]
    try:
        yield
    finally:
        logger.handlers[:] = before


class _Retries(logging.Handler):
    """What the hub's client logs about an attempt that failed, as a sentence; its other warnings as they are."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.WARNING)
        self.asked = name

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        attempt = re.search(r"([\d.]+) ?s\b.*\[Retry (\d+)/(\d+)\]", text)
        if attempt:
            after, number, of = attempt.groups()
            text = f"The hub does not answer for {self.asked}: attempt {number} of {of} follows after {after} s."
        elif "thrown while requesting" in text:  # the sentence about the next attempt follows
            return
        warnings.warn(Remark(text), stacklevel=2)


@contextmanager
def quiet() -> Iterator[None]:
    """Within this block diffusers and transformers do not warn of missing extras and long prompts."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", Remark)
            yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])


def dtype_word(word: str, option: str) -> str:
    """A key of `DTYPES`: ``word`` itself, or the one for torch's name (float32, float16, bfloat16).

    Raises:
        ValueError: one sentence that names ``option``, for any other word.
    """
    found = next((key for key, dtype in DTYPES.items() if word in (key, str(dtype).removeprefix("torch."))), None)
    if found is None:
        raise ValueError(f"Unknown {option} '{word}': use {', '.join(DTYPES)}.")
    return found
