"""What loading a model from a folder or from the Hub has in common: errors in one sentence, and silence."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def short_error(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


@contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' and transformers' remarks about missing extras and long prompts."""
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
            yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
