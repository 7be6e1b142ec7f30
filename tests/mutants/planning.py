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
            "memory trace: a result of another type is returned",
            "else (type(v), v)",
            "else v",
            "test_a_call_made_before_gives_what_the_operator_gives",
        ),
        (
            "memory trace: strides are forgotten",
            "(v.dtype, v.shape, v.stride(), v.device)",
            "(v.dtype, v.shape, v.device)",
            "test_a_call_made_before_gives_what_the_operator_gives",
        ),
        (
            "memory trace: what shares a storage is taken for new",
            "untyped_storage()._cdata in given for t in found",
            "untyped_storage()._cdata in () for t in found",
            "test_a_call_made_before_gives_what_the_operator_gives",
        ),
        (
            "memory trace: only the first of equal calls computes",
            "self.flops += flops",
            "self.flops = max(self.flops, flops)",
            "test_operations_are_those_that_pytorch_counts",
        ),
    ),
    *planted(
        "planning/rehearsal.py",
        "planning/test_estimate.py",
        (
            "rehearsal: the first micro-batch stands for all",
            "        if last:",
            "        if False:",
            "test_estimate_and_measurement_agree[accumulation in fp64]",
        ),
        (
            "rehearsal: what checkpointing recomputes is not as on the device",
            "learn(loss, kept[player.name].backward)",
            "learn(loss, lambda term: term.total.backward(inputs=trained_by(player, roles)))",
            "test_estimate_and_measurement_agree[checkpointing in bf16]",
        ),
        (
            "rehearsal: gradients of balanced terms take no room",
            "self.apart[name] = self._exchange(of_others)",
            "self._exchange(of_others)",
            "test_balanced_terms_hold_gradients_of_their_own",
        ),
        (
            "rehearsal: other processes get their gradients for nothing",
            "if processes > 1:",
            "if processes > 99:",
            "test_several_processes_copy_the_gradients",
        ),
        (
            "rehearsal: a step computes one micro-batch",
            "flops / count * settings.accumulation)",
            "flops / count)",
            "test_a_step_computes_what_pytorch_counts_in_a_real_one",
        ),
    ),
    *planted(
        "planning/hardware.py",
        "planning/test_hardware.py",
        (
            "hardware: any GPU holds any run",
            "        if peak <= usable(gpu.gigabytes):",
            "        if True:",
            "test_gpus_that_are_too_small_are_left_out",
        ),
        (
            "hardware: the peak rate is reached",
            "flops / (UTILISATION * 1e12",
            "flops / (1e12",
            "test_duration_is_operations_over_the_assumed_rate",
        ),
        (
            "hardware: a driver takes nothing",
            "return 0.97 * gigabytes",
            "return 1.01 * gigabytes",
            "test_sizes_of_memory",
        ),
    ),
    *planted(
        "planning/estimate.py",
        "planning/test_estimate.py",
        (
            "estimate: gradients count twice",
            "activations = max(step.peak - gradients, 0)",
            "activations = step.peak",
            "test_estimate_and_measurement_agree[full]",
        ),
        (
            "estimate: the bf16 copies of trained weights take no memory",
            "if copies else {}),",
            "if False else {}),",
            "test_copies_of_trained_weights_in_bf16_are_counted",
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
