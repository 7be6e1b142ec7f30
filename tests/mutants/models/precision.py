"""Planted defects of bf16 networks with float32 masters."""

from tests.mutants.mutant import planted

NEWEST = "test_a_student_answers_with_its_newest_weights"
TRUTH = "test_in_bf16_an_adapter_is_as_near_to_the_truth_as_pefts_was"
PRODUCT = "test_a_product_added_in_place_has_the_gradients_of_the_formula"
MUTANTS = [
    *planted(
        "models/precision.py",
        "models/test_precision.py",
        (
            "shadows: none is ever stale",
            "self.tensor is None or self._copied != self._now()",
            "self.tensor is None",
            NEWEST,
        ),
        (
            "shadows: a copied network trusts the original's version counter",
            "return Shadow(copy.deepcopy(self.master, memo), self.dtype)",
            "return Shadow(self.master, self.dtype)",
            "test_a_copied_network_has_its_own_shadows",
        ),
        (
            "shadows: a gradient stays in bf16",
            "return gradient.to(ctx.dtype), None",
            "return gradient.sign().to(ctx.dtype), None",
            "test_the_gradient_of_a_shadow_is_its_masters",
        ),
        (
            "shadows: they are used in float32 too",
            "in (x.dtype, autocast_dtype(x.device.type))",
            "in (torch.bfloat16, x.dtype)",
            "test_the_gradient_of_a_shadow_is_its_masters",
        ),
        (
            "precision: a network with weights in two formats has no autocast",
            "return {p.dtype for p in own} == {dtype}",
            "return dtype in {p.dtype for p in own}",
            "test_a_bf16_network_needs_no_autocast_and_one_with_other_weights_does",
        ),
        (
            "precision: a network that never said so has no autocast",
            'not getattr(network, "casts_inputs", False)',
            "False",
            "test_a_bf16_network_needs_no_autocast_and_one_with_other_weights_does",
        ),
        (
            "adapters: the scale is missing in the gradient",
            "gradient if ctx.scale == 1 else",
            "gradient if True else",
            PRODUCT,
        ),
    ),
    *planted(
        "models/lora.py",
        "models/test_precision.py",
        (
            "adapters: alpha / rank is left out",
            "(result + (added if scale == 1 else added * scale))",
            "(result + added)",
            "test_without_autocast_an_adapter_is_pefts_to_the_bit",
        ),
        (
            "adapters: they compute in the base's bf16 where training is in float32",
            "h = down(x if computes_low(down, x) else x.to(down.weight.dtype))",
            "h = torch.nn.functional.linear(x, down.weight.to(x.dtype)) if down.weight.ndim == 2 else down(x.float())",
            "test_without_autocast_an_adapter_is_pefts_to_the_bit",
        ),
    ),
    *planted(
        "training/players.py",
        "models/test_precision.py",
        (
            "players: nobody learns that a fused update changed the weights",
            "torch.autograd.graph.increment_version(self.mine)",
            "torch.autograd.graph.increment_version([])",
            NEWEST,
        ),
    ),
]
