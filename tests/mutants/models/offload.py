"""Planted defects of blocks that come from the host's memory."""

from tests.mutants.mutant import planted

ROLES = "test_every_role_answers_as_without"
COPIES = "test_copies_and_full_weights_are_whole"
STREAMS = "test_streams_wait_for_each_other"
PLAN = "test_a_plan_counts_two_blocks"
MUTANTS = [
    *planted(
        "models/offload.py",
        "models/test_offload.py",
        (
            "offload: a graph keeps the weights of its forward",
            "torch.is_grad_enabled() and checkpointed()",
            "False and checkpointed()",
            ROLES,
        ),
        ("offload: what was used stays", "for other in self._here - {index}:", "for other in ():", ROLES),
        (
            "offload: the next block is always the one behind",
            "(1 if index > self._before or not index else -1)",
            "1",
            "test_the_next_block_comes_early_in_both_directions",
        ),
        (
            "offload: the order of blocks is not learned",
            "self._seen[self._before, self._last] = index",
            "pass",
            "test_the_next_block_comes_early_in_both_directions",
        ),
        (
            "offload: a block does not wait for its copy",
            "            torch.cuda.current_stream(self.device).wait_stream(_side(self.device))",
            "            pass",
            STREAMS,
        ),
        (
            "offload: a copy does not wait for what reads its memory",
            "    side.wait_stream(torch.cuda.current_stream(device))",
            "    pass",
            STREAMS,
        ),
        ("offload: copies are made where blocks compute", "    with torch.cuda.stream(side):", "    if True:", STREAMS),
        (
            "offload: what is outside the blocks stays on the host",
            "        if id(module) not in inside:",
            "        if False:",
            "test_what_is_outside_the_blocks_moves_and_what_is_inside_does_not",
        ),
        (
            "offload: a network without blocks is left as it is",
            "    if not blocks:",
            "    if False:",
            "test_what_cannot_be_streamed_is_refused_in_a_sentence",
        ),
    ),
    *planted(
        "models/lora.py",
        "models/test_offload.py",
        (
            "offload: adapters are on the host",
            "                part[name].to(device=device)\n",
            "",
            "test_what_is_outside_the_blocks_moves_and_what_is_inside_does_not",
        ),
    ),
    *planted(
        "models/roles.py",
        "models/test_offload.py",
        (
            "offload: full students are streamed",
            "            if is_offloaded(network):\n                restore",
            "            if False:\n                restore",
            COPIES,
        ),
    ),
    *planted(
        "models/quantize.py",
        "models/test_offload.py",
        (
            "offload: weights in 4 bits stay on their node",
            "        layer.__class__ = _linear_in_4_bits()",
            "        pass",
            "test_a_quantised_base_is_streamed[nf4]",
        ),
    ),
    *planted(
        "planning/estimate.py",
        "models/test_offload.py",
        (
            "offload: a plan counts one block",
            "max((a + b for a, b",
            "max((b for a, b",
            "test_a_plan_of_a_quantised_base_counts_packed_blocks",
        ),
        (
            "offload: a plan leaves the blocks on the GPU",
            'on_host = 0 if device == "cpu" else blocks',
            "on_host = 0",
            PLAN,
        ),
    ),
    *planted(
        "runs/setup.py",
        "models/test_offload.py",
        (
            "offload: the setting changes nothing",
            "    if recipe.training.offload:\n",
            "    if False:\n",
            "test_the_setting_streams_the_teacher_of_a_run",
        ),
    ),
    *planted(
        "training/settings.py",
        "models/test_offload.py",
        (
            "offload: sharded or compiled too",
            "if self.offload and is_on:",
            "if False:",
            "test_what_cannot_be_streamed_is_refused_in_a_sentence",
        ),
    ),
]
