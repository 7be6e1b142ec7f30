"""Planted defects of weights that are spread over processes: built, saved and read by rows."""

from tests.mutants.mutant import planted

ROWS, SHARDED = "test_rows_of_any_number_of_processes_are_read_by_any_other[4]", "training/test_sharded.py"
FULL = "test_a_checkpoint_that_could_not_be_written_ends_the_run_in_a_sentence"
COPY = "test_the_copy_of_a_checkpoint_in_the_background_is_counted"
BUILD = "test_no_process_of_four_holds_more_than_its_rows[build]"
MUTANTS = [
    *planted(
        "models/tensor_files.py",
        SHARDED,
        (
            "sharded: rows are read from the begin of their file",
            "file.seek(piece.begin + (low - piece.first) * each)",
            "file.seek(piece.begin)",
            ROWS,
        ),
        (
            "sharded: rows of later files come first",
            "there[(low - first) * each : (high - first) * each]",
            "there[: (high - low) * each]",
            ROWS,
        ),
        (
            "sharded: a tensor's files are taken in any order",
            "found.sort(key=lambda piece: piece.first)",
            "found.sort(key=lambda piece: -piece.first)",
            ROWS,
        ),
        (
            "sharded: missing rows are left as they are in memory",
            "ends[-1] != (shape[0] if shape else 1)",
            "ends[-1] > (shape[0] if shape else 1)",
            "test_a_lost_file_of_rows_is_noticed",
        ),
        (
            "sharded: half a file passes for a whole one",
            "8 + size + _end(header) != length",
            "8 + size + _end(header) < length",
            "test_half_a_file_is_none",
        ),
        (
            "sharded: a tensor need not have the bytes of its shape",
            "if known is not None and end - begin",
            "if False and end - begin",
            "test_a_changed_header_is_refused_in_a_sentence",
        ),
        (
            "sharded: too few pieces make a file",
            "if file.tell() != 8 + len(text) + end:",
            "if file.tell() > 8 + len(text) + end:",
            "test_a_file_in_pieces_is_one_that_safetensors_reads",
        ),
    ),
    *planted(
        "models/sharding.py",
        SHARDED,
        (
            "sharded: a process writes its rows as the first ones",
            "return Part(local(tensor), like.shape, _rows(like)[0])",
            "return Part(local(tensor), like.shape, 0)",
            "test_killed_while_it_writes_it_continues_from_the_last_whole_checkpoint",
        ),
        (
            "sharded: copies of a network are whole before they are spread",
            'id(p): nn.Parameter(torch.empty_like(p, device="meta")',
            'id(p): nn.Parameter(torch.empty_like(p, device="cpu")',
            BUILD,
        ),
        (
            "sharded: the first process's rows stand for all in the student",
            "            yield theirs\n",
            "            yield mine[: last - first]\n",
            "test_the_student_is_that_of_the_checkpoint",
        ),
    ),
    *planted(
        "models/roles.py",
        SHARDED,
        (
            "sharded: the teacher's rows are never read",
            "local(spread[parameter]).copy_(rows_in(tensors, name, spread[parameter]))",
            "local(spread[parameter]).zero_()",
            "test_a_teacher_stays_in_its_files_until_it_is_spread_and_trains_the_same_student",
        ),
    ),
    *planted(
        "training/checkpoint.py",
        SHARDED,
        (
            "sharded: a checkpoint appears before all have written",
            "            outcomes = distributed.everywhere(outcomes[0])\n",
            "            outcomes = outcomes[:]\n",
            "test_killed_while_it_writes_it_continues_from_the_last_whole_checkpoint",
        ),
    ),
    *planted(
        "training/checkpoint.py",
        "training/test_async_checkpoints.py",
        (
            "async checkpoints: rows are written as they are by then",
            "replace(t, rows=_on_host(t.rows)) if background else t",
            "t",
            "test_a_checkpoint_holds_the_weights_of_its_step_whatever_changes_them_while_it_is_written",
        ),
        (
            "async checkpoints: nobody hears that a disk was full",
            "self._mistake = str(error) or type(error).__name__",
            "return",
            FULL + "[error0]",
        ),
        (
            "async checkpoints: nobody hears of other errors in a thread",
            'self._mistake = f"{type(error).__name__}: {error}"',
            "pass",
            FULL + "[error1]",
        ),
    ),
    *planted(
        "training/trainer.py",
        "training/test_async_checkpoints.py",
        (
            "async checkpoints: the next one does not wait for the one before",
            "        self._guard()\n        self.complete_checkpoint()\n",
            "        self._guard()\n",
            "test_the_next_checkpoint_waits_for_the_one_before_and_the_end_for_the_last",
        ),
        (
            "async checkpoints: the end does not wait for the last one",
            "self.save(wait=last or stop)",
            "self.save(wait=stop)",
            "test_the_next_checkpoint_waits_for_the_one_before_and_the_end_for_the_last",
        ),
        (
            "async checkpoints: the setting is not asked",
            "in_rows and not wait and self.settings.async_checkpoints",
            "in_rows and not wait",
            "test_steps_go_on_while_a_checkpoint_is_written_where_the_settings_let_them[False]",
        ),
        (
            "async checkpoints: none is written in the background",
            "in_rows and not wait and self.settings.async_checkpoints",
            "False",
            "test_steps_go_on_while_a_checkpoint_is_written_where_the_settings_let_them[True]",
        ),
        (
            "async checkpoints: a written one waits for the next to get its name",
            "                if not at_work:\n                    self.complete_checkpoint()\n",
            "",
            "test_a_checkpoint_gets_its_name_as_soon_as_it_is_written",
        ),
        (
            "async checkpoints: a step waits until the checkpoint is written",
            "                if not at_work:\n                    self.complete_checkpoint()\n",
            "                self.complete_checkpoint()\n",
            "test_steps_go_on_while_a_checkpoint_is_written_where_the_settings_let_them[True]",
        ),
        (
            "async checkpoints: the others go on while the first one deletes",
            "            writing.finish()\n            distributed.wait()",
            "            writing.finish()",
            "test_no_process_goes_on_before_a_checkpoint_has_its_name",
        ),
        (
            "async checkpoints: a run that breaks forgets the one it was writing",
            "                self.complete_checkpoint()\n                for log",
            "                for log",
            "test_a_run_that_breaks_names_the_checkpoint_that_was_being_written",
        ),
        (
            "async checkpoints: a hook that ends the run has the same step written again",
            "self.complete_checkpoint() if due else self.save()",
            "self.save()",
            "test_a_hook_that_ends_the_run_costs_no_second_checkpoint",
        ),
    ),
    *planted(
        "runs/setup.py",
        "runs/test_distill_lightning.py",
        (
            "sharded: a discriminator's adapters stand on weights that are still in their files",
            ' or recipe.method.get("discriminator_weights") == "lora"',
            "",
            "test_a_teacher_that_adapters_stand_on_is_read_at_once",
        ),
    ),
    *planted(
        "models/precision.py",
        "models/test_precision.py",
        (
            "precision: copies that were made in inference mode stay without a gradient",
            "@torch.inference_mode(False)  # whoever",
            "# whoever",
            "test_sampling_in_inference_mode_first_leaves_a_student_that_learns",
        ),
        (
            "precision: forward derivatives meet copies that have none",
            "return not _is_transformed() and all(",
            "return all(",
            "test_forward_derivatives_are_those_of_float32_within_bf16[lora-True]",
        ),
        (
            "precision: dual numbers are not noticed",
            "forward_ad._current_level >= 0 or torch._C",
            "torch._C",
            "test_forward_derivatives_are_those_of_float32_within_bf16[lora-False]",
        ),
        (
            "precision: copies stand in for weights that another call brings",
            "s.master is layer._parameters.get(name)",
            "True",
            "test_weights_that_stand_in_for_a_layers_own_are_computed_with",
        ),
    ),
    *planted(
        "models/lora.py",
        "models/test_precision.py",
        (
            "lora: what a hook keeps of a base layer changes later",
            "in_place = not layer.base_layer._forward_hooks",
            "in_place = True",
            "test_a_hook_on_a_base_layer_keeps_what_that_layer_gave",
        ),
    ),
    *planted(
        "models/offload.py",
        "models/test_offload.py",
        (
            "offload: a layer of two blocks goes with one of them",
            "if id(module) in self.shared:",
            "if False:",
            "test_a_layer_that_two_blocks_share_stays_on_the_device",
        ),
    ),
    *planted(
        "planning/estimate.py",
        "planning/test_estimate.py",
        (
            "plan: the moments in the copy of a checkpoint are forgotten",
            'return _size(rows, "cpu") + moment_bytes([t for t in rows if id(t) in learn], settings.optimizer)',
            'return _size(rows, "cpu")',
            COPY + "[full-changes0-4]",
        ),
        (
            "plan: a copy is counted where checkpoints are waited for",
            "if not (settings.fsdp and settings.async_checkpoints):",
            "if not settings.fsdp:",
            COPY + "[full-changes1-0]",
        ),
        (
            "plan: adapters are counted in the copy of a checkpoint",
            'kept_whole = (".lora_", "/extras.", "/bank.")',
            'kept_whole = ("/extras.", "/bank.")',
            COPY + "[lora-changes3-0]",
        ),
    ),
    *planted(
        "runs/fit.py",
        "models/test_offload.py",
        (
            "offload: nobody hears that a CPU gains nothing",
            'torch.device(recipe.training.device).type == "cpu":',
            'torch.device(recipe.training.device).type == "tpu":',
            "test_offload_on_a_cpu_is_remarked_once",
        ),
    ),
    *planted(
        "training/distributed.py",
        "training/test_launch.py",
        (
            "machines: a start waits without a word",
            "        with doing(label):\n            yield\n",
            "        yield\n",
            "test_a_start_states_what_it_waits_for[place0-said0]",
        ),
        (
            "machines: only the first machine states what it waits for",
            "if here.rank > 0 and here.local_rank == 0:",
            "if here.rank > 99 and here.local_rank == 0:",
            "test_a_start_states_what_it_waits_for[place1-said1]",
        ),
    ),
]
