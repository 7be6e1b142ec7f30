"""Planted defects of weights that are spread over processes: built, saved and read by rows."""

from tests.mutants.mutant import planted

ROWS, SHARDED = "test_rows_of_any_number_of_processes_are_read_by_any_other[4]", "training/test_sharded.py"
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
    ),
]
