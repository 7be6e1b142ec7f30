"""Planted defects of data that are streamed."""

from tests.mutants.mutant import planted

RULE = "test_the_rows_of_a_step_follow_from_seed_step_and_shards[sizes0-4-12-4]"
MUTANTS = [
    *planted(
        "data/streamed.py",
        "data/test_streamed.py",
        (
            "stream: every epoch has the order of the first",
            'stream_key(self._seed, "shards", epoch)',
            'stream_key(self._seed, "shards", 0)',
            RULE,
        ),
        (
            "stream: all lanes shuffle alike",
            'stream_key(self._seed, "block", self._number, number)',
            'stream_key(self._seed, "block", number)',
            RULE,
        ),
        (
            "stream: the seed changes nothing",
            'stream_key(self._seed, "shards", epoch)',
            'stream_key("shards", epoch)',
            RULE,
        ),
        (
            "stream: every lane reads all shards",
            "permutation(len(self._shards.names))[self._number :: self._count]]",
            "permutation(len(self._shards.names))]",
            "test_every_image_is_seen_once_an_epoch",
        ),
        (
            "stream: a resumed lane begins a block late",
            "first = number * self.size\n",
            "first = number * self.size + (self.size if self._at < 0 and number else 0)\n",
            "test_it_goes_on_at_any_step[False]",
        ),
        (
            "stream: a shard that was counted is skipped where its end is wanted",
            "if known is not None and at + known <= first:",
            "if known is not None and at + known <= first + 1:",
            "test_it_goes_on_at_any_step[True]",
        ),
        (
            "stream: counts of other shards pass",
            'if found["shards"] == self._of else {}',
            "if self._of else {}",
            "test_counts_of_other_shards_are_no_counts",
        ),
        (
            "stream: a shard that is opened again begins anew",
            "itertools.islice(self._shards.read(shard), done, None)",
            "itertools.islice(self._shards.read(shard), 0, None)",
            "test_a_shard_that_the_network_fails_to_give_is_opened_again",
        ),
        (
            "stream: damaged images are not listed",
            "            self._skipped(found)\n",
            "",
            "test_what_cannot_be_used_leaves_its_place_to_the_next_of_its_block",
        ),
        (
            "stream: the next block waits until it is asked for",
            "        self._begun(number + 1)\n",
            "",
            "test_the_next_block_is_read_before_it_is_asked_for",
        ),
        (
            "stream: a block without a usable image ends the run",
            "itertools.chain(self._from(block, first), self._following(number, first))",
            "self._from(block, first)",
            "test_of_a_block_that_cannot_be_used_the_next_ones_are_taken",
        ),
        (
            "stream: an empty shard ends the run",
            "if at == began and not any(self._counts[shard] != 0 for shard in range(len(self._shards.names))):",
            "if at == began:",
            "test_empty_shards_among_others_are_passed_over",
        ),
        (
            "stream: what was read stays in memory",
            "        return [found[i] for i in generator.permutation(self.size)]",
            '        self.__dict__.setdefault("all", []).extend(found)\n'
            "        return [found[i] for i in generator.permutation(self.size)]",
            "test_two_blocks_are_held_at_most",
        ),
        (
            "stream: latents are finer than those of files",
            "mean, std = (t.half().to(rng.dtype) for t in self._teacher.posterior(images))",
            "mean, std = (t.to(rng.dtype) for t in self._teacher.posterior(images))",
            "test_batches_are_what_the_encoders_make_of_images_and_captions[sdxl]",
        ),
    ),
    *planted(
        "data/remote.py",
        "data/test_remote.py",
        (
            "remote: links of a shard are read",
            "wrong = wrong or refused(member, sys.maxsize) or",
            "wrong = wrong or",
            "test_samples_are_those_of_shards_that_are_listed",
        ),
        (
            "remote: a shard that is cut short ends the run",
            "            except _DAMAGED:\n",
            "            except EOFError:\n",
            "test_of_a_shard_cut_short_what_is_whole_is_kept",
        ),
        (
            "remote: numbers of shards lose their zeros",
            'f"{i:0{len(span[1])}d}"',
            'f"{i}"',
            "test_ranges_are_spelled_out_as_shells_do",
        ),
        (
            "remote: only the first shard is looked for",
            'for name in found if "://" not in found[0] else (found[0], found[-1]):',
            "for name in found[:1]:",
            "test_a_shard_that_is_not_there_is_one_sentence[range]",
        ),
    ),
    *planted(
        "runs/dataset.py",
        "runs/test_stream.py",
        (
            "stream: a run goes on with other shards",
            'found = _checked_rows(run, "shards", shards.names, rows)',
            'found = _checked_rows(run, "shards", shards.names, None)',
            "test_other_shards_are_refused_on_resume",
        ),
    ),
    *planted(
        "runs/measured_on.py",
        "runs/test_stream.py",
        (
            "stream: shards far away are listed for a line of help",
            "    if data.stream:\n        raise",
            "    if False:\n        raise",
            "test_shards_are_not_listed_for_a_line_of_help_or_for_prompts",
        ),
    ),
    *planted(
        "runs/hints.py",
        "runs/test_stream.py",
        (
            "hints: a run whose student cannot be measured is told to measure it",
            "if trained.place is None or _captions(trained):",
            "if True:",
            "test_a_finished_run_proposes_no_measure_on_too_few_captions",
        ),
    ),
    *planted(
        "runs/distill.py",
        "runs/test_stream.py",
        (
            "stream: the autoencoder of a stream waits on the host",
            "keep_vae = recipe.data.stream or bool(",
            "keep_vae = bool(",
            "test_the_autoencoder_stays_where_it_works",
        ),
    ),
]
