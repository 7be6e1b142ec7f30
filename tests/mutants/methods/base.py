"""Planted defects of the method base."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "methods/base.py",
        "methods/test_contract.py",
        (
            "methods: a player that is not due every time misses step 0",
            "(step - self.start) % self.every == 0",
            "(step - self.start + 1) % self.every == 0",
            "test_calls_per_step_are_those_the_denoisers_counted",
        ),
    ),
]
