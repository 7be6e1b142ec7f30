"""Planted defects of planning."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "planning/memory_trace.py",
        "planning/test_estimate.py",
        (
            "memory trace: what is released goes on counting",
            "        self.live -= size",
            "        self.live -= 0",
            "test_the_tracker_counts_from_birth_to_death",
        ),
        (
            "memory trace: views count as memory of their own",
            "if key not in self._seen:",
            "if True:",
            "test_the_tracker_counts_from_birth_to_death",
        ),
        (
            "memory trace: attention makes the matrix of queries and keys",
            "if func is F.scaled_dot_product_attention:",
            "if func is None:",
            "test_attention_keeps_no_matrix_of_queries_and_keys[None-4]",
        ),
        (
            "memory trace: one micro-batch stands for all",
            "for i in range(min(settings.accumulation, 2)):",
            "for i in range(1):",
            "test_estimate_and_measurement_agree[accumulation in fp64]",
        ),
        (
            "memory trace: what checkpointing recomputes is not as on the device",
            "learn(loss, partial(_backward, inputs=trained_by(player, roles)))",
            "learn(loss, lambda term: term.total.backward(inputs=trained_by(player, roles)))",
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
        (
            "estimate: pairs take no memory",
            "return WithPairs(read, made), [data, made]",
            "return WithPairs(read, made), [data]",
            "test_pairs_are_counted_where_a_method_learns_from_them",
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
