"""Planted defects of the choices of --vram."""

from tests.mutants.mutant import planted

FIRST = "test_the_cheapest_changes_come_first_and_each_only_as_far_as_needed"
OWN = "test_what_the_user_set_stays"
MUTANTS = [
    *planted(
        "runs/vram.py",
        "runs/test_vram.py",
        ("vram: what the user set is changed", "key not in own and", "", OWN),
        ("vram: changes go on although the plan fits", "while peak > room and", "while", FIRST),
        ("vram: each change is made once, not as often as it helps", "while peak > room", "if peak > room", FIRST),
        (
            "vram: each of several processes plans for the whole batch",
            "batch_size=recipe.training.batch_size // processes",
            "batch_size=recipe.training.batch_size",
            "test_several_processes_share_the_batch_that_is_planned",
        ),
        ("vram: what does not fit is trained", "    if peak > room:\n", "    if False:\n", FIRST),
    ),
    *planted(
        "recipe/load.py",
        "runs/test_vram.py",
        (
            "vram: a shipped recipe's keys count as the user's",
            "if path in shipped_recipes().values():",
            "if False:",
            "test_keys_of_shipped_recipes_are_not_the_users",
        ),
        (
            "vram: keys of the recipe that a user's is like are forgotten",
            "found | below | set(",
            "found | set(",
            "test_keys_of_shipped_recipes_are_not_the_users",
        ),
    ),
    *planted(
        "cli/make.py",
        "runs/test_vram.py",
        (
            "vram: the run trains what was there before",
            "overrides, lines = [*(overrides or ()), *found.overrides], found.lines",
            "lines = found.lines",
            "test_the_program_trains_what_was_chosen",
        ),
    ),
]
