"""Planted defects of the plan, the doctor and the optimisers."""

import importlib.util

from tests.mutants.mutant import planted

OPTIMIZERS = [
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
    ),
]

PLAN = [
    *planted(
        "planning/memory_trace.py",
        "planning/test_estimate.py",
        (
            "ledger: what is released goes on counting",
            "        self.live -= size",
            "        self.live -= 0",
            "test_the_ledger_counts_from_birth_to_death",
        ),
        (
            "ledger: views count as memory of their own",
            "if key not in self._seen:",
            "if True:",
            "test_the_ledger_counts_from_birth_to_death",
        ),
        (
            "rehearsal: attention makes the matrix of queries and keys",
            "if func is F.scaled_dot_product_attention:",
            "if func is None:",
            "test_attention_keeps_no_matrix_of_queries_and_keys[None-4]",
        ),
        (
            "rehearsal: one micro-batch stands for all",
            "for i in range(min(settings.accumulation, 2)):",
            "for i in range(1):",
            "test_estimate_and_measurement_agree[accumulation in fp64]",
        ),
        (
            "rehearsal: what checkpointing recomputes is not as on the device",
            "_backward(term, trained_by(player, roles), keep=term is not terms[-1])",
            "term.backward(inputs=trained_by(player, roles))",
            "test_estimate_and_measurement_agree[checkpointing in bf16]",
        ),
    ),
    *planted(
        "planning/estimate.py",
        "planning/test_estimate.py",
        (
            "estimate: gradients count twice",
            '"activations": max(peak - gradients, 0)',
            '"activations": peak',
            "test_estimate_and_measurement_agree[full]",
        ),
    ),
    *planted(
        "training/optimizers.py",
        "planning/test_estimate.py",
        (
            "estimate: 8-bit moments have no scales",
            "total += 2 * n + 2 * 4 * -(-n // _BLOCK)",
            "total += 2 * n",
            "test_moments_of_8_bits_are_a_byte_and_a_scale",
        ),
    ),
    *planted(
        "models/meta_pipeline.py",
        "planning/test_estimate.py",
        (
            "outline: an encoded prompt is always 77 tokens long",
            "min(int(tokens), CLIP_TOKENS)",
            "CLIP_TOKENS",
            "tests/planning/test_doctor.py::test_a_dry_run_is_a_recipe_with_remarks",
        ),
        (
            "outline: adapters stay behind in the base",
            "self.family(copy.deepcopy(self.base))",
            "self.family(self.base)",
            "test_stable_diffusion_has_859_520_964_parameters",
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
        "planning/plan.py",
        "planning/test_doctor.py",
        (
            "plan: the least effective advice comes first",
            "key=lambda change: -change.saves",
            "key=lambda change: change.saves",
            "test_advice_is_ordered_by_what_it_saves",
        ),
    ),
    *planted(
        "planning/doctor.py",
        "planning/test_doctor.py",
        (
            "doctor: float32 is held against itself",
            'exact, _ = lora_step("cpu", "fp64")',
            'exact, _ = lora_step("cpu", "fp32")',
            "test_a_wrong_number_is_a_problem",
        ),
        (
            "doctor: any version will do",
            "if found is None or not wanted.specifier.contains(found, prereleases=True):",
            "if found is None:",
            "test_versions_are_held_against_their_ranges",
        ),
    ),
]

# Their tests are skipped, and so cannot fail, where the extra `lowmem` is not installed.
EIGHT_BITS = [] if importlib.util.find_spec("bitsandbytes") is None else planted(
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
)  # fmt: skip
