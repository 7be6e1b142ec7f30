"""Planted defects of the command line: its start, its words while one waits, its hints."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "recipe/shipped.py",
        "program/test_start.py",
        (
            "start: the list of recipes waits for PyTorch",
            "from fewstep.data.files import at_home",
            "import torch\n\nfrom fewstep.data.files import at_home",
            "test_what_only_lists_imports_nothing_heavy[recipes]",
        ),
        (
            "recipes: the list shows the first line of a longer sentence",
            're.match(r".*?\\.(?=\\s|$)", text)',
            're.match(r".*", path.read_text(encoding="utf-8")[2:])',
            "test_the_list_of_recipes_has_whole_sentences",
        ),
    ),
    *planted(
        "checkpoints/explain.py",
        "program/test_start.py",
        (
            "start: the list of published files waits for the families",
            "from fewstep.checkpoints.registry import Checkpoint, checkpoints",
            "import fewstep.models.families\nfrom fewstep.checkpoints.registry import Checkpoint, checkpoints",
            "test_what_only_lists_imports_nothing_heavy[checkpoints]",
        ),
    ),
    *planted(
        "training/progress.py",
        "training/test_progress.py",
        (
            "waits: the first word comes after ten seconds",
            "_FIRST = 1.5",
            "_FIRST = 10.0",
            "test_the_first_word_comes_within_three_seconds_of_the_start",
        ),
        (
            "waits: a terminal shows nothing between two parts of the work",
            "self._show_whole(len(self.rows) == 1)",
            "pass",
            "test_a_terminal_always_has_a_word_and_a_result_has_the_terminal_for_itself",
        ),
        (
            "waits: a result is broken into the terminal's lines",
            "        if all(task.whole for task, _ in self.rows.values()):",
            "        if not self.rows:",
            "test_a_terminal_always_has_a_word_and_a_result_has_the_terminal_for_itself",
        ),
        (
            "waits: libraries are loaded as long as the command lasts",
            "        if outer.text == _BEGINS:",
            '        if outer.text == "":',
            "test_the_first_word_comes_within_three_seconds_of_the_start",
        ),
    ),
    *planted(
        "models/hub.py",
        "program/test_start.py",
        (
            "waits: the hub is asked without a word",
            "if not cached and not HF_HUB_OFFLINE:",
            "if cached and not HF_HUB_OFFLINE:",
            "test_the_hub_is_named_before_it_is_asked",
        ),
        (
            "waits: a hub that does not answer is the client's own lines",
            "logger.handlers[:] = [_Retries(name)]",
            "logger.handlers[:] = before",
            "test_a_hub_that_does_not_answer_is_said_at_once",
        ),
    ),
    *planted(
        "students/lineage.py",
        "program/test_start.py",
        (
            "waits: a dry run looks a missing run up on the hub",
            "    refuse_missing_run(name)\n    student = student_folder(Path(name))",
            "    student = student_folder(Path(name))",
            "test_a_missing_run_is_no_matter_for_the_hub",
        ),
    ),
    *planted(
        "inference/load.py",
        "program/test_start.py",
        (
            "waits: a missing run is looked up on the hub to sample from it",
            "    refuse_missing_run(name)\n    if base",
            "    if base",
            "test_a_missing_run_is_no_matter_for_the_hub",
        ),
    ),
    *planted(
        "inference/model.py",
        "program/test_start.py",
        (
            "samplers: ComfyUI's name is taken where its steps are others",
            "if ours != name and found.comfyui_sampler(schedule) != name:",
            "if False:",
            "test_a_name_of_comfyuis_that_means_other_steps_on_this_model_is_refused",
        ),
    ),
    *planted(
        "sampling/samplers.py",
        "program/test_start.py",
        (
            "samplers: dpmpp_2m is said to step alike on flow models",
            'return "dpmpp_2m" if same and schedule.alpha_sigma(schedule.start)[0] > 0 else ""',
            'return "dpmpp_2m"',
            "test_a_name_of_comfyuis_that_means_other_steps_on_this_model_is_refused",
        ),
        (
            "samplers: dpmpp_2m is Heun's sampler",
            'return "dpmpp_2m" if same',
            'return "heun" if same',
            "test_comfyuis_names_are_taken_for_what_steps_alike",
        ),
    ),
    *planted(
        "runs/hints.py",
        "program/test_start.py",
        (
            "hints: own data are sampled by scenes' prompts",
            "if recipe.place is None or recipe.data.stream or given != SampleConfig().prompts:",
            "if True:",
            "test_prompts_of_a_hint_are_those_of_the_recipe",
        ),
        (
            "hints: prompts of the recipe's own are forgotten",
            "if recipe.place is None or recipe.data.stream or given != SampleConfig().prompts:",
            "if recipe.place is None:",
            "test_prompts_of_a_hint_are_those_of_the_recipe",
        ),
    ),
    *planted(
        "recipe/chain.py",
        "program/test_start.py",
        (
            "device: a chain stays on the devices of its stages",
            "does=s.recipe.on_device(device))",
            "does=s.recipe)",
            "test_a_device_is_for_every_stage_and_leaves_the_rest",
        ),
    ),
    *planted(
        "reports/demo.py",
        "program/test_cli.py",
        (
            "demo: it trains before it shows anything",
            "    _before(folder, recipe, teacher, count, tell)\n",
            "    distill(recipe, folder, resume=True)\n    _before(folder, recipe, teacher, count, tell)\n",
            "test_the_demo_writes_a_picture_and_a_table",
        ),
    ),
]
