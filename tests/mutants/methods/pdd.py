"""Planted defects of the method pdd, of banks of last layers, and of files with them."""

from tests.mutants.mutant import planted

STEP = "test_a_step_is_the_papers[vp-heun]"
PLAIN = "test_a_step_is_the_papers[flow-plain]"
POINT = "test_at_the_fixed_point_there_is_no_loss_and_blocks_are_the_solver_steps[flow-mixture-ddim]"
HEUN = "test_at_the_fixed_point_there_is_no_loss_and_blocks_are_the_solver_steps[vp-mixture-heun]"
GRID = "test_steps_are_every_lth_time_of_the_grid_of_all_steps[by number]"
MIXTURE = "test_every_mixture_is_the_network_with_that_last_layer[sana]"
RATE = "test_layers_move_at_a_tenth_of_the_rate_beside_a_lora"
BANK = (
    "    bank = LayerBank(network.get_submodule(network.last_layer), denoiser.schedule, times).requires_grad_(False)\n"
)
ADDED = "    for layer in layers:\n        layer.add_to(parts[layer.part], scale)\n"
LAYOUT = "test_the_published_layout_is_what_its_config_says"
FITS = "test_what_does_not_fit_is_refused_and_nothing_is_added"
TIMES = "test_only_its_own_times_are_steps"

MUTANTS = [
    *planted(
        "training/trainer.py",
        "methods/test_pdd.py",
        (
            "trainer: a bank's own rate is dropped",
            "bank_rate=spec.bank_rate",
            "bank_rate=None",
            "test_the_last_layers_have_a_rate_of_their_own[lora-0.1]",
        ),
    ),
    *planted(
        "methods/pdd.py",
        "methods/test_pdd.py",
        (
            "pdd: the layer of the next solver step is learned",
            "np.eye(len(self.lengths))[k] for k",
            "np.eye(len(self.lengths))[k - 1] for k",
            POINT,
        ),
        (
            "pdd: the teacher is asked where the block begins",
            "x_k = next(mixed).at(float(self.grid[k])) if k > start",
            "x_k = (next(mixed), x)[1] if k > start",
            POINT,
        ),
        (
            "pdd: the target keeps a graph to earlier layers",
            "            with torch.no_grad():\n                x_k",
            "            if True:\n                x_k",
            "test_only_layers_that_are_drawn_learn[flow]",
        ),
        (
            "pdd: the teacher is not guided",
            "guidance_scale=scale)\n        if self._calls_of",
            "guidance_scale=1.0)\n        if self._calls_of",
            "test_the_fixed_point_is_the_guided_teachers",
        ),
        ("pdd: Heun's second call is not guided", "u, batch.cond, guidance_scale=scale))", "u, batch.cond))", STEP),
        (
            "pdd: Heun's slope is not that of sigma/alpha",
            "self.schedule.mean_slope(first.x, t, x_u, u)",
            "(x_u - first.x) / float(self.lengths[k])",
            HEUN,
        ),
        (
            "pdd: the grid is one of the few steps",
            "schedule.timesteps(count).numpy()",
            "schedule.for_steps(4).timesteps(count).numpy()",
            GRID,
        ),
        (
            "pdd: the next block begins where this one did",
            "batch, draws, reached, number + 1",
            "batch, draws, x, number + 1",
            PLAIN,
        ),
        (
            "pdd: a block's end keeps its graph",
            "at(float(self.grid[stop])).detach()",
            "at(float(self.grid[stop]))",
            PLAIN,
        ),
        ("pdd: the terms of a trajectory are summed", ".mean() / len(draws.starts)", ".mean()", PLAIN),
        (
            "pdd: noise is no beginning of noised data",
            "if first > 0:",
            "if self.settings.student_input == 'noised':",
            "test_a_step_is_the_papers[vp-noised]",
        ),
        (
            "pdd: one target is drawn for all blocks",
            'f"target/{start}/{i}"',
            'f"target/{i}"',
            "test_targets_of_blocks_are_drawn_apart",
        ),
        (
            "pdd: a solver step is asked twice in a block",
            "left.pop(rng.shared.integer(f",
            "left.__getitem__(rng.shared.integer(f",
            "test_targets_of_one_block_differ",
        ),
        (
            "pdd: a block has more targets than solver steps",
            "if self.targets_per_block > self.num_grid_steps // steps:",
            "if False:",
            "test_targets_of_one_block_differ",
        ),
        (
            "pdd: the last solver step has two calls",
            "or only_first_order(self.schedule, self.grid[k], self.grid[k + 1])",
            "",
            "test_the_teacher_is_not_asked_at_clean_data[vp]",
        ),
    ),
    *planted(
        "models/bank.py",
        "models/test_bank.py",
        (
            "bank: a mixture does not count the lengths",
            "row[first:last] = lengths[first:last] / lengths[first:last].sum()",
            "row[first:last] = 1 / (last - first)",
            f"tests/methods/test_pdd.py::{POINT}",
        ),
        (
            "bank: a block ends a solver step early",
            "return fused(self.lengths, first, last)[None]",
            "return fused(self.lengths, first, last - 1)[None]",
            "tests/methods/test_pdd.py::test_a_sampler_asks_for_the_blocks_of_the_student",
        ),
        ("bank: layers move at the whole rate", "LORA_RATE = 0.1", "LORA_RATE = 1.0", RATE),
        (
            "bank: the base layer is not in a mixture",
            "weight = own.weight.to(h.dtype) + self.rate",
            "weight = self.rate",
            MIXTURE,
        ),
        (
            "bank: it computes under autocast",
            "enabled=False",
            "enabled=True",
            "test_a_bank_stays_in_float32_where_the_network_is_not[sd15]",
        ),
        (
            "bank: mixtures of a network that reshapes are scrambled",
            "if len(output) != len(self.rows) * len(x):",
            "if False:",
            "test_a_network_that_would_scramble_mixtures_is_refused",
        ),
        ("bank: any time is the nearest of its own", "atol=_SAME * self.times[0]", "atol=0.2 * self.times[0]", TIMES),
        ("bank: a step may lead back", "        if first > last:", "        if False:", TIMES),
        (
            "bank: pure noise has a place in it",
            "if not np.isfinite(way).all():",
            "if False:",
            "test_what_can_have_no_bank_is_refused",
        ),
    ),
    *planted(
        "models/roles.py",
        "models/test_bank.py",
        ("roles: a LoRA is on the layer of a bank", "if layer != network.last_layer]", "if layer]", MIXTURE),
        (
            "roles: a follower shares its leader's bank",
            "copy.deepcopy(leader.bank)",
            "leader.bank",
            "test_a_follower_has_a_bank_of_its_own[lora]",
        ),
        (
            "roles: a bank's own rate is not asked for",
            "if bank_rate is None else bank_rate",
            "if True else bank_rate",
            RATE,
        ),
        (
            "roles: a bank is not among the student's tensors",
            'tensors |= {f"bank.{k}": p',
            'tensors | {f"bank.{k}": p',
            RATE,
        ),
        (
            "roles: the bank's rate is not taken off",
            't / network.bank.rate if key.startswith("bank.")',
            't if key.startswith("bank.")',
            "test_a_saved_bank_starts_another_beside_a_lora",
        ),
    ),
    *planted(
        "models/families/qwen21.py",
        "models/test_bank.py",
        (
            "qwen: mixtures of texts of unequal length are scrambled",
            "return torch.cat(by_row, dim=1).flatten(0, 1)",
            "return torch.cat(parts)",
            "test_every_mixture_is_the_network_with_that_last_layer[qwen_image21]",
        ),
    ),
    *planted(
        "students/card.py",
        "methods/test_pdd.py",
        (
            "card: any number of steps is one of a bank's",
            "if steps not in card.bank_steps:",
            "if False:",
            "test_numbers_of_steps_that_were_not_trained_are_refused",
        ),
        (
            "card: blocks begin at the first times of the bank",
            "card.bank[:: count // steps]",
            "card.bank[: steps + 1]",
            "test_steps_are_every_lth_time_of_the_grid_of_all_steps[shifted]",
        ),
    ),
    *planted(
        "export/heads.py",
        "export/test_heads_files.py",
        (
            "heads: layers of a step are not weighted",
            "fused(lengths, first, last)",
            "fused(lengths * 0 + 1, first, last)",
            "test_a_file_is_written_in_the_published_layout[2]",
        ),
        (
            "heads: the file holds differences",
            "getattr(layer, name).detach().float().cpu()\n        +",
            "0 *  getattr(layer, name).detach().float().cpu()\n        +",
            "test_a_file_is_written_in_the_published_layout[4]",
        ),
        (
            "heads: other programs find the levels of the whole grid",
            "sigmas = card.num_inference_steps, list(block_edges(card, card.num_inference_steps))",
            "sigmas = card.num_inference_steps, list(card.bank)",
            "test_a_file_is_written_in_the_published_layout[2]",
        ),
        (
            "heads: names have the network's part in front",
            'adapted = [layer.removeprefix(f"{first}.") for',
            "adapted = [layer for",
            "test_a_file_is_written_in_the_published_layout[2]",
        ),
    ),
    *planted(
        "models/lora_files/heads.py",
        "export/test_heads_files.py",
        (
            "heads: the norms of a file are left out",
            "        named[place].copy_(tensor)",
            "        pass",
            LAYOUT,
        ),
        (
            "heads: the difference is not from the layer",
            "tensor.to(bank.weight) - named",
            "tensor.to(bank.weight) - 0 * named",
            LAYOUT,
        ),
        (
            "heads: the alpha of the file's settings is not read",
            "without=own, alpha=alpha)",
            "without=own)",
            LAYOUT,
        ),
        (
            "heads: settings of other levels are taken",
            "        sigmas.shape == (len(times),) and np.allclose(sigmas, times, rtol=0, atol=_SAME)\n",
            "        True\n",
            FITS,
        ),
        (
            "heads: of one layer twice in a file the second is read",
            "if parameter in found:",
            "if False:",
            FITS,
        ),
        (
            "heads: a LoRA on a layer that is there whole is lost",
            "if twice is not None and parts[layer.part] is base:",
            "if False:",
            FITS,
        ),
        (
            "heads: integers and NaN are read",
            "        check_numbers(tensors[name], name, path)\n",
            "",
            FITS,
        ),
        (
            "heads: weights are added before the times are checked",
            f"{BANK}{ADDED}",
            f"{ADDED}{BANK}",
            FITS,
        ),
        (
            "heads: a file of another number of steps is read",
            "if tuple(tensor.shape) not in ((steps, *own.shape), (steps * own.shape[0], *own.shape[1:])):",
            "if tensor.shape[-1] != own.shape[-1]:",
            "test_last_layers_stand_step_by_step",
        ),
        (
            "heads: last layers in another order are read",
            "if tuple(tensor.shape) not in ((steps, *own.shape), (steps * own.shape[0], *own.shape[1:])):",
            "if tensor.numel() != steps * own.numel() or tensor.shape[-1] != own.shape[-1]:",
            "test_last_layers_stand_step_by_step",
        ),
    ),
]
