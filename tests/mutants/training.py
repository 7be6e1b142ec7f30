"""Planted defects of training."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "training/progress.py",
        "training/test_progress.py",
        (
            "progress: a line every minute",
            "EVERY = 20.0",
            "EVERY = 60.0",
            "test_there_is_a_line_every_thirty_seconds_whatever_the_work_does",
        ),
        (
            "progress: lines come only when the work reports",
            "threading.Thread(target=self._watch, args=(self._over,), daemon=True).start()",
            "pass",
            "test_the_thread_writes_while_the_work_is_busy",
        ),
        (
            "progress: the outermost work is shown, not the one that runs",
            "self.write(self.tasks[-1].sentence(now))",
            "self.write(self.tasks[0].sentence(now))",
            "test_there_is_a_line_every_thirty_seconds_whatever_the_work_does",
        ),
        (
            "progress: what was done before a resume counts as speed",
            "spent, fresh = now - self.began, self.done - self.start",
            "spent, fresh = now - self.began, self.done",
            "test_a_line_says_where_the_work_stands",
        ),
        (
            "progress: CI that asks for colours gets a terminal's control codes",
            "(stream.isatty() and console.is_interactive)",
            "console.is_terminal",
            "test_colours_alone_make_no_terminal",
        ),
        (
            "progress: a closed pipe ends the work",
            "with suppress(OSError, ValueError):",
            "with suppress(KeyError):",
            "test_what_cannot_be_written_does_not_end_the_work",
        ),
    ),
    *planted(
        "training/console.py",
        "training/test_progress.py",
        (
            "progress: a recipe that is printed has lines of progress in it",
            'given.get("dry_run") or ',
            "",
            "test_quiet_and_other_processes_say_nothing_and_a_plan_is_a_recipe",
        ),
        (
            "console: prompts that begin with ~ are paths",
            "if before in _PROMPTS or option in _PROMPTS:",
            "if option in _PROMPTS:",
            "tests/cases/test_data.py::test_the_home_folder_on_the_command_line",
        ),
    ),
    *planted(
        "cli/use.py",
        "training/test_progress.py",
        (
            "progress: an export is silent",
            "@long\ndef export(",
            "def export(",
            "test_every_long_command_says_where_it_stands",
        ),
    ),
    *planted(
        "training/players.py",
        "training/test_step.py",
        (
            "training: gradients are not clipped",
            (
                "        if self.settings.max_grad_norm > 0:\n"
                "            torch.nn.utils.clip_grads_with_norm_(self.mine, self.settings.max_grad_norm, norm)\n"
            ),
            "",
            "test_steps_are_adamw_on_clipped_gradients_then_the_average",
        ),
        (
            "training: gradients are clipped by the norm of the step before",
            "self.grad_norm = norm = self._norm()",
            "norm, self.grad_norm = self.grad_norm, self._norm()",
            "test_steps_are_adamw_on_clipped_gradients_then_the_average",
        ),
        (
            "training: clipping leaves one tensor as it is",
            "clip_grads_with_norm_(self.mine,",
            "clip_grads_with_norm_(self.mine[1:],",
            "tests/training/test_trainer.py::test_clipping_sees_every_trainable_tensor",
        ),
        (
            "training: the total norm misses a tensor",
            "get_total_norm([row.grad for p, row in pairs if row is p and row.grad is not None])",
            "get_total_norm([row.grad for p, row in pairs[1:] if row is p and row.grad is not None])",
            "tests/training/test_trainer.py::test_clipping_sees_every_trainable_tensor",
        ),
        (
            "training: micro-batches are added, not averaged",
            "total = total / accumulation",
            "pass",
            "tests/methods/test_contract.py::test_accumulation_changes_a_step_by_rounding_only",
        ),
        (
            "training: gradients are never forgotten",
            "self.optimizer.zero_grad(set_to_none=True)",
            "pass",
            "test_steps_are_adamw_on_clipped_gradients_then_the_average",
        ),
        (
            "training: a step is made on gradients that are not finite",
            "self.optimizer.found_inf = self.first_bad_step.isfinite().to(torch.float32)",
            "self.optimizer.found_inf = torch.zeros(())",
            (
                "tests/training/test_trainer.py::test_the_guard_names_step_player_and_checkpoint_and_keeps_the_go"
                "od_weights"
            ),
        ),
        (
            "training: a good step makes a bad one forgotten",
            "torch.where(bad, self.first_bad_step.clamp_max(step), self.first_bad_step)",
            "torch.where(bad, float(step), torch.inf)",
            (
                "tests/training/test_trainer.py::test_the_guard_names_step_player_and_checkpoint_and_keeps_the_go"
                "od_weights"
            ),
        ),
        (
            "training: the guard names the last bad step",
            "torch.where(bad, self.first_bad_step.clamp_max(step), self.first_bad_step)",
            "torch.where(bad, float(step), self.first_bad_step)",
            "test_the_guard_names_the_first_of_several_bad_steps",
        ),
        (
            "training: the learning rate is that of the step before",
            "self.settings.rate(step, self.player.name, self.player.rate, self.player.start)",
            "self.settings.rate(step - 1, self.player.name, self.player.rate, self.player.start)",
            "tests/training/test_trainer.py::test_the_optimiser_uses_the_rate_of_its_step",
        ),
        (
            "training: the critic learns at the student's rate",
            "self.settings.rate(step, self.player.name, self.player.rate, self.player.start)",
            "self.settings.rate(step)",
            "test_each_player_has_its_own_rate",
        ),
        (
            "training: the gradients of a loss reach other players' weights",
            ("total.backward(inputs=inputs, retain_graph=left > 0)\n        for"),
            ("total.backward(retain_graph=left > 0)\n        for"),
            "tests/methods/test_contract.py::test_each_loss_reaches_its_players_parameters_and_nobody_elses",
        ),
        (
            "players: the norm knows one process's rows alone",
            "distributed.total(torch.nn.utils.get_total_norm(shards).square())",
            "torch.nn.utils.get_total_norm(shards).square()",
            "tests/training/test_processes.py::test_two_processes_are_one[toy-full-fsdp]",
        ),
        (
            "players: gradients stay those of a process's own rows",
            "distributed.average_gradients([p for p in self.mine if id(p) not in split and p.grad is not None])",
            "",
            "tests/training/test_processes.py::test_two_processes_are_one[toy-lora]",
        ),
        (
            "training: critics take the student's betas",
            'settings.betas if player.name == "student" else settings.critic_betas or settings.betas',
            "settings.betas",
            "tests/training/test_trainer.py::test_critics_may_have_betas_of_their_own",
        ),
        (
            "balance: a term is weighted by its own gradient norm over the total's",
            "ratio = self._probe_norm(of_total) / (self._probe_norm(of_term) + 1e-4)",
            "ratio = self._probe_norm(of_term) / (self._probe_norm(of_total) + 1e-4)",
            "tests/methods/test_ctm.py::test_terms_are_weighted_by_their_pull_at_the_last_weight[heun-full]",
        ),
        (
            "balance: the weight has no bounds",
            "balance.scale * ratio.clamp(balance.low, balance.high)",
            "balance.scale * ratio",
            "tests/methods/test_ctm.py::test_balanced_terms_add_up_over_micro_batches_before_they_are_weighed",
        ),
        (
            "balance: only the last micro-batch's term counts",
            "self._exchange(self._terms[name][1] if name in self._terms else [None] * len(self.parameters))",
            "self._exchange([None] * len(self.parameters))",
            "tests/methods/test_ctm.py::test_balanced_terms_add_up_over_micro_batches_before_they_are_weighed",
        ),
        (
            "balance: terms are not divided among micro-batches",
            "(balance.term / accumulation).backward(",
            "balance.term.backward(",
            "tests/methods/test_ctm.py::test_balanced_terms_add_up_over_micro_batches_before_they_are_weighed",
        ),
        (
            "balance: a weight that the total does not reach is left out",
            "weight * b if a is None else a + weight * b",
            "a if a is None else a + weight * b",
            "tests/methods/test_ctm.py::test_a_term_alone_may_reach_a_weight",
        ),
    ),
    *planted(
        "training/step.py",
        "training/test_step.py",
        (
            "players: terms after the first one are not learnt from",
            "for term in loss.terms():",
            "for term in [loss]:",
            "test_terms_that_go_backward_one_after_the_other_are_one_loss",
        ),
        (
            "players: the log has the last term alone",
            "done.total += term.total.detach()",
            "done.total = term.total.detach()",
            "test_terms_that_go_backward_one_after_the_other_are_one_loss",
        ),
        (
            "training: a method prepares for every player, due or not",
            "method.prepare(roles, batch, draws, due)",
            "method.prepare(roles, batch, draws, {player.name for player in method.players})",
            "test_a_method_is_told_where_it_stands_and_who_is_due",
        ),
    ),
    *planted(
        "training/settings.py",
        "training/test_trainer.py",
        (
            "training: warm-up starts at rate 0",
            "return peak * (step + 1) / self.warmup_steps",
            "return peak * step / self.warmup_steps",
            "test_learning_rate_warms_up_then_stays_or_falls_to_zero",
        ),
        (
            "training: the cosine counts from step 0, not from the end of warm-up",
            "done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)",
            "done = step / max(1, self.steps)",
            "test_learning_rate_warms_up_then_stays_or_falls_to_zero",
        ),
        (
            "training: the cosine ends half way down",
            "(1 + math.cos(math.pi * min(1.0, done)))",
            "(1 + math.cos(math.pi / 2 * min(1.0, done)))",
            "test_learning_rate_warms_up_then_stays_or_falls_to_zero",
        ),
    ),
    *planted(
        "training/trainer.py",
        "training/test_step.py",
        (
            "training: the average takes the weights from before the step",
            "            state.update(step)\n",
            (
                "            for role in state.player.roles:\n"
                "                self.roles.update_followers(role)\n"
                "            state.update(step)\n"
                "            continue\n"
            ),
            "test_steps_are_adamw_on_clipped_gradients_then_the_average",
        ),
        (
            "training: the target's average never moves",
            "self.roles.update_followers(role)",
            "pass",
            "test_steps_are_adamw_on_clipped_gradients_then_the_average",
        ),
        (
            "training: dropout is the same at every step",
            'stream_key(self.seed, step, "dropout")',
            'stream_key(self.seed, "dropout")',
            "test_dropout_is_keyed_by_seed_step_and_process",
        ),
        (
            "training: every micro-batch has the first rows",
            "rows = slice(own.start + i * size, own.start + (i + 1) * size)",
            "rows = slice(own.start, own.start + size)",
            "tests/methods/test_contract.py::test_accumulation_changes_a_step_by_rounding_only",
        ),
        (
            "training: a checkpoint lacks the optimiser",
            'tensors |= {f"optimizer/{player.player.name}/{k}": t for k, t in player.tensors(gather).items()}',
            "pass",
            "tests/training/test_trainer.py::test_logged_losses_after_a_resume_are_those_of_a_whole_run",
        ),
        (
            "training: a checkpoint is written without a look at the guard",
            ("        self._guard()\n        self.complete_checkpoint()\n"),
            "        self.complete_checkpoint()\n",
            "test_no_checkpoint_is_written_after_a_bad_step",
        ),
        (
            "training: a method is told that it is always the first step",
            "progress = Progress(step, self.settings.steps, self.stage, due.keys())",
            "progress = Progress(0, self.settings.steps, self.stage, due.keys())",
            "test_a_method_is_told_where_it_stands_and_who_is_due",
        ),
        (
            "training: a method is not told who is due, and draws for all",
            "self.stage, due.keys())",
            "self.stage)",
            "tests/methods/test_dmd2.py::test_no_noise_is_drawn_for_a_student_that_is_not_due",
        ),
        (
            "training: the numbers of a step are those of the next one",
            "yield self.rng(self.seed, step, ",
            "yield self.rng(self.seed, step + 1, ",
            "test_steps_are_adamw_on_clipped_gradients_then_the_average[4]",
        ),
        (
            "training: a stopped run does not save what it has done",
            "% settings.checkpoint_every == 0 or last or stop\n",
            "% settings.checkpoint_every == 0 or last\n",
            "tests/training/test_trainer.py::test_a_stop_request_saves_what_it_reports_and_resumes_to_the_bit",
        ),
        (
            "training: a resumed run forgets what it had spent",
            'self.spent = float(state.get("forward_equivalents", 0))',
            "self.spent = 0",
            "tests/training/test_trainer.py::test_logged_losses_after_a_resume_are_those_of_a_whole_run",
        ),
        (
            "training: bf16 asked for is not turned on",
            "autocast=settings.autocast",
            "autocast=None",
            "test_settings_reach_the_roles",
        ),
        (
            "training: checkpointing asked for is not turned on",
            "gradient_checkpointing=settings.gradient_checkpointing",
            "gradient_checkpointing=False",
            "test_settings_reach_the_roles",
        ),
        (
            "training: hooks are not called after the last step",
            "if self.done % every == 0 or last]",
            "if self.done % every == 0]",
            "test_hooks_run_when_due_and_after_the_last_step",
        ),
        (
            "training: every process takes the first rows",
            "rows = slice(own.start + i * size, own.start + (i + 1) * size)",
            "rows = slice(i * size, (i + 1) * size)",
            "tests/training/test_processes.py::test_two_processes_are_one[toy-lora]",
        ),
        (
            "training: what the other processes compute costs nothing",
            "self.roles.cost().forward_equivalents * distributed.count()\n",
            "self.roles.cost().forward_equivalents\n",
            "tests/training/test_processes.py::test_two_processes_are_one[toy-lora]",
        ),
        (
            "init: target and average start as the teacher",
            (
                "    if init is not None:\n"
                "        for spec in method.roles():\n"
                '            if spec.name == "student" or spec.init_from == "student":\n'
                "                roles.start(spec.name, init)\n"
                "    follow(roles, method, settings)\n"
            ),
            (
                "    follow(roles, method, settings)\n"
                "    if init is not None:\n"
                "        for spec in method.roles():\n"
                '            if spec.name == "student" or spec.init_from == "student":\n'
                "                roles.start(spec.name, init)\n"
            ),
            "tests/runs/test_chain.py::test_init_is_where_the_student_starts[lora]",
        ),
        (
            "training: enough is not enough",
            "if self._call_hooks() and not last:",
            "if False:",
            "tests/runs/test_chain.py::test_the_best_student_is_kept_and_patience_ends_the_run[FD]",
        ),
        (
            "resume: a run that had enough trains on",
            "if self._resumed and self._call_hooks():",
            "if self._resumed and self._call_hooks() and False:",
            "tests/runs/test_chain.py::test_an_interrupted_run_decides_as_a_whole_one",
        ),
        (
            "resume: hooks that died with the process are never called",
            "if self._resumed and self._call_hooks():",
            "if False:",
            ("tests/training/test_trainer.py::test_what_died_between_a_checkpoint_and_its_hooks_is_looked_at_again[4]"),
        ),
        (
            "trainer: the clip rate counts gradients below the limit",
            "(state.grad_norm > self.settings.max_grad_norm)",
            "(state.grad_norm < self.settings.max_grad_norm)",
            "test_the_log_says_how_often_gradients_were_clipped_and_each_players_rate",
        ),
        (
            "trainer: the critic's logged rate is the student's",
            "player.rate(self.done - 1)",
            "self.settings.rate(self.done - 1)",
            "test_the_log_says_how_often_gradients_were_clipped_and_each_players_rate",
        ),
        (
            "trainer: a run dies without last words",
            "log.write(self._final_record(player.player.name, int(bad)))",
            "pass",
            "test_a_run_that_dies_leaves_its_last_words_in_the_log",
        ),
        (
            "init: a fake score that is to begin as the student begins as the teacher",
            'if spec.name == "student" or spec.init_from == "student":',
            'if spec.name == "student":',
            "tests/methods/test_hyper.py::test_a_fake_score_may_begin_as_the_student",
        ),
        (
            "init: every role begins as the student",
            'if spec.name == "student" or spec.init_from == "student":',
            "if spec.follows is None and not spec.features_only:",
            "tests/methods/test_hyper.py::test_a_fake_score_may_begin_as_the_student",
        ),
    ),
    *planted(
        "training/logging.py",
        "training/test_step.py",
        (
            "training: logged losses are sums, not means",
            "means = {name: value / self._counts[key] for (key,",
            "means = {name: value for (key,",
            "test_a_meter_means_over_the_steps_that_gave_a_value",
        ),
        (
            "training: logged losses never start anew",
            "        self.__init__()  # type: ignore[misc]\n",
            "",
            "test_a_meter_means_over_the_steps_that_gave_a_value",
        ),
    ),
    *planted(
        "training/checkpoint.py",
        "training/test_checkpoint.py",
        (
            "checkpoint: older random numbers pass",
            "if before != version:",
            "if before > version:",
            "tests/training/test_trainer.py::test_a_run_that_began_with_other_random_numbers_is_one_clear_sentence",
        ),
        (
            "checkpoint: it is copied into place, not renamed",
            "        os.rename(part, final)\n",
            "        shutil.copytree(part, final)\n",
            "test_files_are_on_disk_before_the_folder_gets_its_name",
        ),
        (
            "checkpoint: a failed renaming takes the one before along",
            "            os.rename(aside, final)\n",
            "            pass\n",
            "test_a_checkpoint_whose_renaming_fails_leaves_the_one_of_the_same_step",
        ),
        (
            "checkpoint: a failed renaming ends the first process alone",
            "self._agree(lambda: _put(self._part, final, self.keep))",
            "_put(self._part, final, self.keep)",
            "tests/training/test_async_checkpoints.py::test_all_processes_end_where_the_first_cannot_name_a_checkpoint",
        ),
        (
            "checkpoint: the folder's entries are not flushed before the renaming",
            "        sync_folder(self._part)\n",
            "",
            "test_files_are_on_disk_before_the_folder_gets_its_name",
        ),
        (
            "checkpoint: the renaming is not flushed",
            ("    sync_folder(folder)\n    shutil.rmtree(aside"),
            "    shutil.rmtree(aside",
            "test_files_are_on_disk_before_the_folder_gets_its_name",
        ),
        (
            "checkpoint: the checkpoint of the same step is deleted where it stands",
            "os.rename(final, aside)",
            "shutil.rmtree(final)",
            "test_whenever_the_process_dies_the_newest_checkpoint_is_whole",
        ),
        (
            "checkpoint: old ones go before the new one is there",
            "    part.mkdir()\n",
            ("    part.mkdir()\n    for old in complete(folder)[-1:]:\n        shutil.rmtree(old)\n"),
            "test_whenever_the_process_dies_the_newest_checkpoint_is_whole",
        ),
        (
            "checkpoint: one less than asked for is kept",
            "complete(folder)[:-keep]",
            "complete(folder)[: 1 - keep]",
            "test_the_newest_are_kept",
        ),
        (
            "checkpoint: the oldest counts as the newest",
            "return found[-1] if found else None",
            "return found[0] if found else None",
            "test_the_newest_are_kept",
        ),
        (
            "checkpoint: a flipped bit goes unseen",
            "if any(sums[name] not in (None, _checksum(path / name)) for name in mine):",
            "if False:",
            "tests/training/test_full_disk.py::test_a_flipped_bit_is_noticed",
        ),
        (
            "checkpoint: half of one stays on a full disk",
            "shutil.rmtree(self._part, ignore_errors=True)  # half a checkpoint must not fill the disk\n",
            "pass\n",
            "tests/training/test_full_disk.py::test_a_full_disk_costs_the_newest_steps_alone[5000]",
        ),
    ),
    *planted(
        "training/distributed.py",
        "training/test_processes.py",
        (
            "processes: only the first one's gradients count",
            "dist.all_reduce(flat)",
            "dist.broadcast(flat, src=0)",
            "tests/scenes64/test_train_teacher.py::test_two_processes_train_as_one",
        ),
        (
            "processes: the log has the first one's losses",
            'dist.all_reduce(numbers, group=_GROUPS.get("host"))',
            "numbers *= count()",
            "test_two_processes_are_one[toy-lora]",
        ),
        (
            "processes: only the one that is asked stops",
            'dist.all_reduce(found, dist.ReduceOp.MAX, group=_GROUPS.get("host"))',
            'dist.all_reduce(found, dist.ReduceOp.MIN, group=_GROUPS.get("host"))',
            "test_processes_stop_after_the_same_step",
        ),
    ),
    *planted(
        "training/optimizers.py",
        "training/test_step.py",
        (
            "training: AdamW keeps its own betas",
            '        "betas": settings.betas,\n',
            "",
            "test_steps_are_adamw_on_clipped_gradients_then_the_average",
        ),
        (
            "training: weight decay is ignored",
            '"weight_decay": settings.weight_decay',
            '"weight_decay": 0.0',
            "test_steps_are_adamw_on_clipped_gradients_then_the_average",
        ),
        (
            "training: a resumed optimiser counts its steps from 0",
            "else value.to(device).clone()",
            'else value.to(device).clone() * (name != "step")',
            "tests/training/test_trainer.py::test_logged_losses_after_a_resume_are_those_of_a_whole_run",
        ),
        (
            "training: a resumed optimiser has lost its first moments",
            "else value.to(device).clone()",
            'else value.to(device).clone() * (name != "exp_avg")',
            "tests/training/test_trainer.py::test_logged_losses_after_a_resume_are_those_of_a_whole_run",
        ),
        (
            "estimate: 8-bit moments have no scales",
            "total += 2 * n + 2 * 4 * -(-n // _BLOCK)",
            "total += 2 * n",
            "tests/planning/test_estimate.py::test_moments_of_8_bits_are_a_byte_and_a_scale",
        ),
    ),
    *planted(
        "training/optimizers.py",
        "training/test_optimizers.py",
        (
            "eight bits: a bad step changes weights",
            "now.copy_(torch.where(skip, old, now))",
            "now.copy_(now)",
            "test_a_bad_step_leaves_weights_and_moments",
        ),
        (
            "eight bits: a bad step leaves weights but not moments",
            "changing = [parameter.data, *_moments(self.state[parameter]).values()]",
            "changing = [parameter.data]",
            "test_a_bad_step_leaves_weights_and_moments",
        ),
        (
            "eight bits: a checkpoint forgets how many steps were made",
            'if isinstance(state.get("step"), int):',
            'if isinstance(state.get("step"), str):',
            "test_resumed_to_the_bit",
        ),
    ),
    *planted(
        "training/machine.py",
        "planning/test_estimate.py",
        (
            "out of memory: GiB are read as GB",
            '"gib": 2**30',
            '"gib": 10**9',
            "test_errors_of_memory_are_known_as_such",
        ),
    ),
    *planted(
        "training/trackers.py",
        "training/test_trackers.py",
        (
            "trackers: TensorBoard keeps what was written beyond the resumed step",
            "purge_step=done + 1 if written > done else None",
            "purge_step=None",
            "test_tensorboard_holds_the_log_and_no_step_twice_after_a_resume",
        ),
        (
            "trackers: trackio gets steps a second time after a resume",
            'if record["step"] > self._written:',
            "if True:",
            "test_trackio_gets_the_log_and_no_step_twice_after_a_resume",
        ),
        (
            "trackers: a resumed run begins anew in trackio",
            'resume="allow" if written else "never"',
            'resume="never"',
            "test_trackio_gets_the_log_and_no_step_twice_after_a_resume",
        ),
    ),
]
