"""Planted defects of runs on several machines: launchers, shared folders, lost processes, many writers."""

from tests.mutants.mutant import planted

WHICH = "test_which_process_this_is"
MUTANTS = [
    *planted(
        "training/launch.py",
        "training/test_launch.py",
        (
            "machines: a batch script without srun waits for the other tasks of its job",
            'in_step = "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env',
            'in_step = "SLURM_PROCID" in env',
            WHICH,
        ),
        (
            "machines: the tasks of the job count, not those of the step",
            '_number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS")',
            '_number("SLURM_NTASKS")',
            WHICH,
        ),
        (
            "machines: srun's number goes before torchrun's",
            "(local is not None or not in_step)",
            "not in_step",
            WHICH,
        ),
        (
            "machines: WORLD_SIZE of a batch script makes every task of srun the first",
            "(local is not None or not in_step)",
            "True",
            WHICH,
        ),
        (
            "machines: a variable that is no number is a traceback",
            "int(text) if text.isdecimal() else None",
            "int(text) if name in os.environ else None",
            WHICH,
        ),
        (
            "machines: processes meet on the last host of a range",
            r're.sub(r"\[([^],-]+)[^]]*\]"',
            r're.sub(r"\[[^]]*?([^],-]+)\]"',
            "test_the_first_host_of_slurms_list",
        ),
        (
            "machines: steps of one job meet at one port",
            "15_000 + (10 * job + step) % 15_000",
            "15_000 + 10 * job % 15_000",
            "test_processes_of_srun_find_each_other",
        ),
        (
            "machines: the command that continues starts one process",
            'if here.count > 1 and "LOCAL_WORLD_SIZE" in env:',
            'if here.count > 99 and "LOCAL_WORLD_SIZE" in env:',
            "test_the_command_that_continues_is_that_of_the_launcher",
        ),
    ),
    *planted(
        "training/distributed.py",
        "training/test_launch.py",
        (
            "machines: cuda:0 is taken by all processes",
            "    if number:\n",
            "    if not kind:\n",
            "test_one_gpu_for_all_processes_is_refused",
        ),
        (
            "machines: each process takes the GPU of its global rank",
            "    return here.local_rank\n",
            "    return here.rank\n",
            "test_each_process_has_a_gpu_of_its_own",
        ),
        (
            "machines: with one GPU to be seen, srun's processes take others",
            'if there == 1 and here.by == "srun":',
            'if there == 1 and here.by == "sbatch":',
            "test_each_process_has_a_gpu_of_its_own",
        ),
        (
            "machines: a start that waits for its first host cannot be stopped",
            "        signal.signal(number, signal.SIG_DFL)\n",
            "        pass\n",
            "test_a_start_that_waits_can_be_stopped",
        ),
        (
            "machines: two processes on one GPU are a lost process, for ever",
            '("invalid usage", "Duplicate GPU")',
            "()",
            "test_only_a_communications_own_errors_are_a_lost_process",
        ),
    ),
    *planted(
        "training/distributed.py",
        "training/test_lost.py",
        (
            "machines: folders of other names on one file system pass for one",
            "seen = path.parts[len(mine.parts) :] == below and _appears(mine / name)",
            "seen = _appears(mine / name)",
            "test_a_folder_that_is_not_the_same_for_all_is_refused",
        ),
        (
            "machines: nobody looks whether the folder is shared",
            "seen = path.parts[len(mine.parts) :] == below and _appears(mine / name)",
            "seen = path.parts[len(mine.parts) :] == below",
            "test_a_folder_that_is_not_the_same_for_all_is_refused",
        ),
        (
            "machines: a look at the folder leaves a file",
            "        probe.unlink(missing_ok=True)\n",
            "        pass\n",
            "test_looking_at_a_folder_leaves_nothing",
        ),
        (
            "machines: a step waits for twelve hours",
            'dist.init_process_group("gloo" if gpu is None else "nccl", timeout=timeout)',
            'dist.init_process_group("gloo" if gpu is None else "nccl", timeout=_PATIENCE)',
            "test_a_late_process_is_lost_after_the_time_of_a_step_and_not_before",
        ),
        (
            "machines: work of one process may last no longer than a step",
            '_GROUPS["patient"] = dist.new_group(backend="gloo", timeout=_PATIENCE)',
            '_GROUPS["patient"] = dist.new_group(backend="gloo", timeout=timeout)',
            "test_a_late_process_is_lost_after_the_time_of_a_step_and_not_before",
        ),
        (
            "machines: a dead process leaves a traceback",
            "(count() > 1 and _OF_GLOO",
            "(count() > 9 and _OF_GLOO",
            "test_a_dead_process_ends_the_other_with_a_sentence",
        ),
    ),
    *planted(
        "data/files.py",
        "data/test_files.py",
        (
            "writers: all writers of a file write under one name",
            'end = f".{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.part"',
            'end = f".{_HOST}-1-00000000.part"',
            "test_none_of_200_writes_by_eight_processes_at_once_is_lost",
        ),
        (
            "writers: two writers in one process write under one name",
            "{secrets.token_hex(4)}",
            "00000000",
            "test_two_writers_of_one_file_do_not_meet",
        ),
        (
            "writers: a long name has no temporary one",
            "[: 254 - len(end)]",
            "[:254]",
            "test_a_name_as_long_as_a_name_may_be",
        ),
        (
            "writers: what a living process writes is deleted",
            'age > _QUIET and not _lives(int(found["pid"]))',
            "age > _QUIET",
            "test_what_killed_processes_have_left_is_cleared_away",
        ),
        (
            "writers: what another machine writes is deleted",
            'if found["host"] == _HOST:',
            "if True:",
            "test_what_killed_processes_have_left_is_cleared_away",
        ),
        (
            "writers: a folder whose files grow is deleted",
            '(part, *part.rglob("*"))',
            "(part,)",
            "test_what_killed_processes_have_left_is_cleared_away",
        ),
        (
            "writers: no locks are another process",
            "            ours = error.errno in _NO_LOCKS\n",
            "            ours = False\n",
            "test_a_file_system_without_locks_is_no_other_process",
        ),
        (
            "writers: any failure of a lock is another process",
            "elif error.errno not in _LOCKED:",
            "elif False:",
            "test_any_other_failure_of_a_lock_is_said_as_it_is",
        ),
    ),
]
