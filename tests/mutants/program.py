"""Planted defects of what keeps a run alive: processes, stages, starts, measurements, checkpoints."""

from tests.mutants.mutant import Mutant, planted

_STARTED = """    if init is not None:
        for spec in method.roles():
            if spec.name == "student" or spec.begins_as == "student":
                roles.start(spec.name, init)
"""
_FOLLOW = "    follow(roles, method, settings)\n"

PROCESSES: list[Mutant] = [
    *planted(
        "models/sharding.py",
        "training/test_processes.py",
        (
            "shards: a network keeps the gathered weights of its last call",
            ", reshard_after_forward=True)",
            ")",
            "test_two_processes_are_one[toy-full-fsdp]",
        ),
        (
            "shards: every process saves its own rows of the moments as if they were all",
            "if isinstance(like, DTensor) and tensor.shape == local(like).shape:",
            "if False:",
            "test_two_processes_are_one[toy-full-fsdp]",
        ),
        (
            "shards: a resumed process takes the first rows",
            "return parts[mine] if mine < len(parts) else tensor[:0]",
            "return parts[0][: len(parts[mine])]",
            "test_the_number_of_processes_may_change_at_a_resume",
        ),
    ),
    *planted(
        "training/players.py",
        "training/test_processes.py",
        (
            "players: the norm knows one process's rows alone",
            "distributed.total(torch.nn.utils.get_total_norm(shards).square())",
            "torch.nn.utils.get_total_norm(shards).square()",
            "test_two_processes_are_one[toy-full-fsdp]",
        ),
        (
            "players: gradients stay those of a process's own rows",
            "distributed.average_gradients([p for p in self.mine if id(p) not in split and p.grad is not None])",
            "",
            "test_two_processes_are_one[toy-lora]",
        ),
    ),
    *planted(
        "training/distributed.py",
        "training/test_processes.py",
        (
            "processes: the log has the first one's losses",
            'dist.all_reduce(numbers, group=_HOST.get("group"))',
            "numbers *= count()",
            "test_two_processes_are_one[toy-lora]",
        ),
        (
            "processes: only the one that is asked stops",
            'dist.all_reduce(said, dist.ReduceOp.MAX, group=_HOST.get("group"))',
            'dist.all_reduce(said, dist.ReduceOp.MIN, group=_HOST.get("group"))',
            "test_processes_stop_after_the_same_step",
        ),
    ),
    *planted(
        "training/trainer.py",
        "training/test_processes.py",
        (
            "training: every process takes the first rows",
            "rows = slice(mine.start + i * size, mine.start + (i + 1) * size)",
            "rows = slice(i * size, (i + 1) * size)",
            "test_two_processes_are_one[toy-lora]",
        ),
        (
            "training: what the other processes compute costs nothing",
            "self.roles.cost().forward_equivalents * distributed.count()\n",
            "self.roles.cost().forward_equivalents\n",
            "test_two_processes_are_one[toy-lora]",
        ),
    ),
]

STAGES: list[Mutant] = [
    *planted(
        "models/lora.py",
        "runs/test_chain.py",
        (
            "merge: A B instead of B A",
            "weight += (scale * delta).view_as(weight).to(weight)",
            "weight -= (scale * delta).view_as(weight).to(weight)",
            "test_merging_changes_the_form_alone",
        ),
    ),
    *planted(
        "models/roles.py",
        "runs/test_chain.py",
        (
            "init: the role's own scale is forgotten",
            'key: t / scale if ".lora_B" in key else t',
            'key: t if ".lora_B" in key else t',
            "test_init_is_where_the_student_starts[lora]",
        ),
        (
            "init: full weights start without the LoRA",
            "            merge(mine, saved)\n",
            "",
            "test_init_is_where_the_student_starts[full]",
        ),
    ),
    *planted(
        "training/trainer.py",
        "runs/test_chain.py",
        (
            "init: target and average start as the teacher",
            _STARTED + _FOLLOW,
            _FOLLOW + _STARTED,
            "test_init_is_where_the_student_starts[lora]",
        ),
        (
            "training: enough is not enough",
            "if self._look() and not last:",
            "if False:",
            "test_the_best_student_is_kept_and_patience_ends_the_run[FD]",
        ),
    ),
    *planted(
        "students/lineage.py",
        "runs/test_chain.py",
        (
            "chain: a student that becomes a teacher leaves its LoRA behind",
            "        merge(weights, saved)\n",
            "",
            "test_a_finished_stage_is_a_teacher",
        ),
        (
            "chain: a run of several is its first stage",
            "path = stages[-1]",
            "path = stages[0]",
            "test_every_stage_leaves_a_student",
        ),
    ),
    *planted(
        "runs/chain.py",
        "runs/test_chain.py",
        (
            "stages: keys above win over the stage's own",
            "merged[key] = value\n",
            "merged.setdefault(key, value)\n",
            "test_keys_above_hold_for_every_stage_and_overrides_reach_each",
        ),
        (
            "stages: another method inherits the settings of the one above",
            "not _other(key, old, value)",
            "True",
            "test_keys_above_hold_for_every_stage_and_overrides_reach_each",
        ),
    ),
    *planted(
        "runs/setup.py",
        "runs/test_chain.py",
        (
            "stages: earlier ones cost nothing",
            "    costs: dict[str, float] = {}\n    for card in map(load_card, found):",
            "    costs: dict[str, float] = {}\n    for card in ():",
            "test_every_stage_leaves_a_student",
        ),
        (
            "stages: what two later ones begin with is paid twice",
            "costs |= card.costs or",
            "costs |= {mark_of(repr(card)): card.forward_equivalents} or",
            "test_every_stage_leaves_a_student",
        ),
    ),
    *planted(
        "runs/validation.py",
        "runs/test_chain.py",
        (
            "watch: high accuracy is bad",
            'sign = -1 if self.settings.metric == "accuracy" else 1',
            "sign = 1",
            "test_the_best_student_is_kept_and_patience_ends_the_run[accuracy]",
        ),
        (
            "watch: patience is one longer",
            "return 0 < self.settings.patience <= waited",
            "return 0 < self.settings.patience < waited",
            "test_the_best_student_is_kept_and_patience_ends_the_run[FD]",
        ),
    ),
    *planted(
        "training/trainer.py",
        "runs/test_chain.py",
        (
            "resume: a run that had enough trains on",
            "if self._resumed and self._look():",
            "if self._resumed and self._look() and False:",
            "test_an_interrupted_run_decides_as_a_whole_one",
        ),
        (
            "resume: hooks that died with the process are never called",
            "if self._resumed and self._look():",
            "if False:",
            "tests/training/test_trainer.py::test_what_died_between_a_checkpoint_and_its_hooks_is_looked_at_again[4]",
        ),
    ),
    *planted(
        "runs/distill.py",
        "runs/test_distill.py",
        (
            "resume: a run made longer passes for finished",
            '        (folder / "student" / CARD_FILE).unlink(missing_ok=True)\n',
            "",
            "test_a_run_made_longer_and_interrupted_is_not_finished",
        ),
    ),
    *planted(
        "students/lineage.py",
        "runs/test_chain.py",
        (
            "init: a LoRA counts twice on a teacher that has it",
            "return first is second",
            "return True",
            "test_a_start_from_a_lora_on_another_teacher_is_what_that_student_says",
        ),
    ),
    *planted(
        "training/checkpoint.py",
        "training/test_full_disk.py",
        (
            "checkpoint: a flipped bit goes unseen",
            'if state.get("checksum") not in (None, _checksum(tensors)):',
            "if False:",
            "test_a_flipped_bit_is_noticed",
        ),
        (
            "checkpoint: half of one stays on a full disk",
            "        shutil.rmtree(part, ignore_errors=True)  # half a checkpoint must not fill the disk\n",
            "",
            "test_a_full_disk_costs_the_newest_steps_alone[5000]",
        ),
    ),
]

BENCHMARK: list[Mutant] = [
    *planted(
        "reports/benchmark.py",
        "reports/test_benchmark.py",
        (
            "benchmark: what another process is at is begun twice",
            "                if not mine:\n",
            "                if False:\n",
            "test_two_processes_take_different_runs",
        ),
        (
            "benchmark: done, though another process is still at the teacher",
            "return mine and self._measure_teacher()",
            "return self._measure_teacher()",
            "test_who_finds_nothing_but_what_others_are_at_is_not_done",
        ),
        (
            "benchmark: the memory of a chain is its first stage's",
            "return max(map(memory_of_step, _alone(self.recipe)))",
            "return memory_of_step(_alone(self.recipe)[0])",
            "test_the_memory_of_a_chain_is_that_of_the_stage_that_needs_most",
        ),
        (
            "benchmark: a chain's budget pays for its last stage alone",
            "    alone = _alone(recipe)\n",
            "    alone = _alone(recipe)[-1:] * len(_alone(recipe))\n",
            "test_a_chain_shares_its_budget_among_its_stages",
        ),
        (
            "benchmark: a job may work outside its folder",
            'if not name or name.startswith(".") or Path(name).name != name:',
            "if not name:",
            "test_a_job_that_makes_no_sense_is_one_sentence[name: ../elsewhere-to be the name of a folder]",
        ),
    ),
    *planted(
        "reports/results.py",
        "reports/test_benchmark.py",
        (
            "summary: the deviation of the seeds as if they were all there are",
            "float(values.std())",
            "float(values.std(correction=0))",
            "test_a_cell_of_the_summary",
        ),
        (
            "summary: the first seed stands for all",
            "cells = [over_seeds([e.figures for e in mine if e.steps == n]) for n in steps]",
            "cells = [over_seeds([e.figures for e in mine if e.steps == n][:1]) for n in steps]",
            "test_the_summary_is_over_seeds",
        ),
    ),
]
