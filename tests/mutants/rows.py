"""Planted defects of rows that are read from disk."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "data/rows.py",
        "data/test_rows.py",
        (
            "rows: the row after the one that was asked for is read",
            "row = int(picked[place] - before)",
            "row = int(picked[place] - before) - 1 if picked[place] > before else 0",
            "test_rows_are_those_of_the_files_in_any_order[plain]",
        ),
        (
            "rows: the last row of a file is looked for in it and in the next",
            'np.searchsorted(self._ends, picked, side="right")',
            'np.searchsorted(self._ends, picked, side="left")',
            "test_rows_are_those_of_the_files_in_any_order[plain]",
        ),
        (
            "rows: all sizes of images are read as one",
            "if name.startswith(prefix)",
            "if prefix or name",
            "test_rows_are_those_of_the_files_in_any_order[sizes]",
        ),
        (
            "rows: a file that is cut short gives what memory held",
            "        if not count:\n",
            "        if not count:\n            return\n        if count is None:\n",
            "test_errors_of_reading_are_raised_where_the_batch_is_asked_for[False]",
        ),
        (
            "rows: whatever was read ahead passes for the rows asked for",
            "self._coming.pop(picked.tobytes(), None)",
            "self._coming.pop(next(iter(self._coming), b''), None)",
            "test_batches_from_disk_are_those_from_memory[0]",
        ),
        (
            "rows: an error of the thread is lost, and the batch waits for ever",
            "            future.set_exception(error)",
            "            future.set_result({})",
            "test_errors_of_reading_are_raised_where_the_batch_is_asked_for[True]",
        ),
        (
            "rows: padding is not restored",
            "                        found[name][place, end - first :] = 0\n",
            "                        found[name][place, end - first :] = 1\n",
            "test_padding_that_is_masked_is_not_stored_and_comes_back_as_zeros",
        ),
        (
            "rows: the mask of a prompt ends one token early",
            "torch.arange(found[MASK].shape[1]) < end - first",
            "torch.arange(found[MASK].shape[1]) < end - first - 1",
            "test_padding_that_is_masked_is_not_stored_and_comes_back_as_zeros",
        ),
        (
            "rows: tokens are those of the row before",
            "ends[row : row + 2]",
            "ends[max(row - 1, 0) : max(row - 1, 0) + 2]",
            "test_padding_that_is_masked_is_not_stored_and_comes_back_as_zeros",
        ),
        (
            "rows: tokens in the middle are cut like padding",
            "not torch.equal(kept, mask.bool()):",
            "kept.shape != mask.shape:",
            "test_padding_that_is_masked_is_not_stored_and_comes_back_as_zeros",
        ),
        (
            "rows: the null condition is another text's",
            "self.null = {name: _whole(files[0], block)",
            "self.null = {name: _whole(files[-1], block)",
            "test_padding_that_is_masked_is_not_stored_and_comes_back_as_zeros",
        ),
        (
            "rows: a checksum does not know which tensor is which",
            'digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())',
            'digest.update(f"{t.dtype} {tuple(t.shape)}".encode())',
            "test_a_checksum_knows_names_types_shapes_and_values",
        ),
    ),
    *planted(
        "data/sources.py",
        "data/test_rows.py",
        (
            "rows: the order is shifted by one epoch",
            "epochs, places = positions // self.size, positions % self.size",
            "epochs, places = positions // self.size + 1, positions % self.size",
            "test_the_order_is_that_of_former_versions",
        ),
        (
            "rows: the null condition is copied for every batch",
            "if device not in self._there:",
            "if True:",
            "test_the_null_condition_is_copied_to_a_device_once",
        ),
    ),
    *planted(
        "data/find.py",
        "runs/test_listing.py",
        (
            "listing: what was listed for one limit passes for another",
            '("images", _whole(place), limit)',
            '("images", _whole(place))',
            "test_what_is_held_out_is_listed_with_the_rest",
        ),
        (
            "listing: held-out images are looked for anew",
            "return replace(place, held_out=0)",
            "return place",
            "test_what_is_held_out_is_listed_with_the_rest",
        ),
    ),
    *planted(
        "data/listing.py",
        "runs/test_listing.py",
        (
            "listing: a folder is listed as it was long ago",
            "        _LISTED.reset(before)",
            "        before.old_value",
            "test_what_is_held_out_is_listed_with_the_rest",
        ),
    ),
    *planted(
        "data/sources.py",
        "training/test_copies.py",
        (
            "copies: rows are waited for",
            "t.to(rng.device, non_blocking=True) for name, t in read.items()",
            "t.to(rng.device) for name, t in read.items()",
            "test_a_step_blocks_on_no_copy_and_reads_nothing[lcm]",
        ),
        (
            "copies: the null condition is copied for every batch",
            "if device not in self._there:",
            "if len(self._there) < 9:",
            "test_a_step_blocks_on_no_copy_and_reads_nothing[lcm]",
        ),
    ),
    *planted(
        "models/cond.py",
        "training/test_copies.py",
        (
            "copies: the captions that are dropped are waited for",
            "mask.to(t.device, non_blocking=True).reshape",
            "mask.to(t.device).reshape",
            "test_a_step_blocks_on_no_copy_and_reads_nothing[lcm]",
        ),
    ),
    *planted(
        "methods/parts/statistics.py",
        "training/test_copies.py",
        (
            "copies: bins of times are waited for",
            ".to(like.device, non_blocking=True).to(like.dtype)",
            ".to(like.device).to(like.dtype)",
            "test_a_step_blocks_on_no_copy_and_reads_nothing[dmd2]",
        ),
    ),
    *planted(
        "training/trainer.py",
        "training/test_ahead.py",
        (
            "rows: the step after the next is read ahead",
            "next(self._micro_batches(step + 1)) if step + 1 <",
            "next(self._micro_batches(step + 2)) if step + 1 <",
            "test_every_micro_batch_but_the_first_was_read_ahead_and_none_twice",
        ),
        (
            "rows: a step that is not trained is read ahead",
            "if step + 1 < self.settings.steps else None",
            "if step < self.settings.steps else None",
            "test_every_micro_batch_but_the_first_was_read_ahead_and_none_twice",
        ),
    ),
    *planted(
        "data/cache.py",
        "training/test_encoding_shared.py",
        (
            "sharing: a file is encoded by two processes",
            "for number in missing[share.rank :: share.count]:",
            "for number in missing[max(0, share.rank - 1) :: share.count]:",
            "test_the_work_is_shared_evenly_and_nothing_is_encoded_twice[2]",
        ),
        (
            "sharing: the last process's share is left out",
            "            self._make(number, pieces[number], advance or (lambda done: None))",
            "            if share.count == 1 or share.rank < share.count - 1:\n"
            "                self._make(number, pieces[number], advance or (lambda done: None))",
            "test_the_work_is_shared_evenly_and_nothing_is_encoded_twice[4]",
        ),
        (
            "sharing: the first process encodes alone",
            "for number in missing[share.rank :: share.count]:",
            "for number in missing if share.rank == 0 else []:",
            "test_the_work_is_shared_evenly_and_nothing_is_encoded_twice[2]",
        ),
        (
            "sharing: threads give images in the order in which they are done",
            "yield waiting.popleft().result()\n            while",
            "yield waiting.pop().result()\n            while",
            "test_files_of_large_rows_have_fewer_of_them",
        ),
        (
            "cache: the hash of other values passes for a file's",
            '"checksum": checksum(flat)}',
            '"checksum": text_hash(self.name)}',
            "test_files_of_former_versions_are_read",
        ),
        (
            "cache: files of former versions are encoded again",
            '            if about.get("source") == self.name and',
            '            if about.get("sources") == self.name and',
            "test_files_of_former_versions_are_read",
        ),
    ),
]
