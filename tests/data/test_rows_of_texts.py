"""Files of encoded texts that have no common length: only real tokens are kept; a batch is as long as its longest."""

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fewstep.data.pairs import PairFiles
from fewstep.data.random import Rng
from fewstep.data.rows import CUT, TOKENS, Stored, cut_padding
from fewstep.data.sources import LatentSource, Prompts
from tests.models.test_text_lengths import real, text

LENGTHS = (5, 2, 3, 1)


def stored(folder, *conds):
    """Rows of these conditions, a file each."""
    files = []
    for number, cond in enumerate(conds):
        files.append(folder / f"{number}.safetensors")
        save_file({name: t.contiguous() for name, t in cut_padding(cond.flat()).items()}, files[-1])
    return Stored(files)


def test_only_real_tokens_are_in_the_files_and_a_batch_is_as_long_as_its_longest(tmp_path):
    rows = stored(tmp_path, text(5, 2), text(3, 1, start=10.0))
    assert load_file(tmp_path / "0.safetensors")[CUT].shape == (7, 3)
    assert len(rows) == 4 and rows.shape(TOKENS) == (5, 3) and rows.null["null.prompt_embeds"].shape == (1, 2, 3)
    found = rows.take(np.array([3, 1]))
    assert found[TOKENS].shape == (2, 2, 3) and found[TOKENS][..., 0].tolist() == [[10, 0], [1, 2]]
    assert found["cond.prompt_length"].tolist() == [1, 2]
    assert rows.held().take(np.array([0]))[TOKENS][0, :, 0].tolist() == [1, 2, 3, 4, 5]


def test_a_batch_has_its_lengths_on_the_host(tmp_path):
    for source in (Prompts(stored(tmp_path, text(*LENGTHS)), (1, 2, 2)), Prompts(text(*LENGTHS), (1, 2, 2))):
        cond = source.batch(Rng(0, 0, 4, None, "meta", torch.float32)).cond
        assert cond["prompt_embeds"].device.type == "meta" and sorted(cond["prompt_length"].tolist()) == sorted(LENGTHS)
        assert cond.null()["prompt_length"].device.type == "cpu"


def test_samples_of_a_teacher_are_kept_likewise(tmp_path):
    files = PairFiles(tmp_path, {"size": 4, "batch_size": 2, "seed": 0})
    files.claim()
    for number, cond in enumerate((text(5, 2), text(3, 1))):
        files.write(number, torch.zeros(2, 1, 2, 2), cond.to(torch.bfloat16), 1.0)  # beyond float16's range
    source = files.load()
    assert isinstance(source, LatentSource) and source.cond["prompt_embeds"].dtype == torch.bfloat16
    assert real(source.cond) == [[1, 2, 3, 4, 5], [1, 2], [1, 2, 3], [1]]
