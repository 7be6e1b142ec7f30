"""Planted defects of compiled blocks."""

from tests.mutants.mutant import planted

ROLES = "test_compiled_roles_answer_each_with_its_own_adapter"
ASKED = "test_what_cannot_be_compiled_is_refused_in_a_sentence"
MUTANTS = [
    *planted(
        "models/lora.py",
        "models/test_compiled.py",
        ("compiled: no adapter is live", "return _TRACED if torch", "return () if torch", ROLES),
    ),
    *planted(
        "models/compiled.py",
        "models/test_compiled.py",
        ("compiled: a network without blocks is left as it is", "if not blocks:", "if False:", ASKED),
        ("compiled: nobody looks for triton", 'find_spec("triton") is None', "False", ASKED),
    ),
    *planted(
        "runs/fit.py",
        "models/test_compiled.py",
        (
            "compiled: the compiler is asked for after the teacher is loaded",
            "if recipe.training.compile:",
            "if False:",
            "test_a_recipe_that_compiles_asks_for_the_compiler_first",
        ),
    ),
    *planted(
        "training/trainer.py",
        "models/test_compiled.py",
        (
            "compiled: the setting changes nothing",
            "    if settings.compile:\n        roles.compile()",
            "    if False:\n        roles.compile()",
            "test_the_setting_compiles_every_role_of_a_run",
        ),
    ),
    *planted(
        "training/settings.py",
        "models/test_compiled.py",
        ("compiled: sharded networks too", "if self.compile and self.fsdp:", "if False:", ASKED),
    ),
]
