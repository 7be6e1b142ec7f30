"""Planted defects of captions that are kept as text and encoded while a run trains."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "data/captions.py",
        "data/test_live_text.py",
        (
            "captions: the null condition is the empty prompt's where a pipeline has zeros",
            "return {name: t for name, t in cond.flat().items() if name.startswith(NULL)}",
            'return {name.replace("cond.", NULL): t for name, t in cond.flat().items() if not name.startswith(NULL)}',
            "test_conditions_are_those_of_kept_embeddings[sdxl]",
        ),
        (
            "captions: conditions are finer than those of files",
            "return _without_padding(cond.to(teacher.family.text_dtype).given())",
            "return _without_padding(cond.given())",
            "test_conditions_are_those_of_kept_embeddings[flux]",
        ),
        (
            "captions: padding that files leave out stays",
            "return tensors | {TOKENS: tokens.masked_fill(",
            "return tensors or {TOKENS: tokens.masked_fill(",
            "test_conditions_are_those_of_kept_embeddings[pixart]",
        ),
        (
            "captions: a network is told its own size for images of every bucket",
            "teacher.encode_prompts(captions, size=size, guided=False)",
            "teacher.encode_prompts(captions, guided=False)",
            "test_images_keep_their_captions_sizes_and_latents[sdxl]",
        ),
        (
            "captions: the shorter ones of a batch end in what fills them",
            'bytes(row).rstrip(b"\\0").decode()',
            "bytes(row).decode()",
            "test_conditions_are_those_of_kept_embeddings[flux]",
        ),
    ),
    *planted(
        "data/cache.py",
        "data/test_live_text.py",
        (
            "captions: files with embeddings pass for files of text",
            '            **({"text": "live"} if self.live else {}),\n',
            "",
            "test_files_of_one_kind_do_not_pass_for_the_other",
        ),
        (
            "captions: the null condition is encoded for every part of the data",
            "            if size not in self._nulls:\n",
            "            if self.live:\n",
            "test_conditions_are_those_of_kept_embeddings[flux]",
        ),
        (
            "captions: nobody is told that a caption is longer than what is read",
            "            self.teacher.remark_on_length(captions)\n",
            "",
            "test_a_long_caption_is_remarked_once_when_data_are_prepared",
        ),
    ),
    *planted(
        "data/rows.py",
        "data/test_live_text.py",
        (
            "captions: what an earlier row held fills the shorter ones",
            "                        found[name][place, end - first :] = 0\n",
            "                        found[name][place, end - first :] = 65\n",
            "test_conditions_are_those_of_kept_embeddings[flux]",
        ),
        (
            "captions: the longest one is that of the first file",
            "longest = max(int(cuts[TEXT].max()), *self._shapes.get(CAPTION, ((1,),))[0])",
            "longest = self._shapes.get(CAPTION, ((int(cuts[TEXT].max()),),))[0][0]",
            "test_conditions_are_those_of_kept_embeddings[flux]",
        ),
    ),
    *planted(
        "data/pairs.py",
        "data/test_live_text.py",
        (
            "captions: samples of the teacher keep embeddings beside their captions",
            "as_bytes(captions) | {name: t for name, t in given.items() if name.startswith(NULL)}",
            "as_bytes(captions) | given",
            "test_pairs_keep_captions_likewise",
        ),
    ),
    *planted(
        "runs/distill.py",
        "runs/test_live_text.py",
        (
            "captions: the text encoders are freed before the first step",
            "texts=recipe.data.live",
            "texts=False",
            "test_a_run_learns_as_with_kept_embeddings",
        ),
    ),
    *planted(
        "planning/estimate.py",
        "runs/test_live_text.py",
        (
            "captions: text encoders that stay take no memory",
            '**({"text encoders": _parts(pipeline, "text_encoder", device)} if live else {}),',
            '**({"text encoders": 0} if live else {}),',
            "test_plans_say_and_count_what_stays",
        ),
    ),
]
