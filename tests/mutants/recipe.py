"""Planted defects of recipe."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "recipe/load.py",
        "runs/test_distill_hyper.py",
        (
            "recipe: a method's own sampling is forgotten",
            'update={"sample": given.model_copy(update=own)}',
            'update={"sample": given}',
            "tests/runs/test_distill_pcm.py::test_what_a_recipe_leaves_out_is_the_methods_own",
        ),
        (
            "recipe: pairs are guided as the sample grid, not as the method",
            "scale = guidance.low if guidance and guidance.fixed else recipe.sample.guidance_scale",
            "scale = recipe.sample.guidance_scale",
            "tests/runs/test_teacher_samples.py::test_what_a_recipe_leaves_out",
        ),
        (
            "recipe: another sampler must take the method's steps",
            "bound = wanted.no_other_steps and given.sampler is None",
            "bound = wanted.no_other_steps",
            "test_a_sampler_of_the_recipes_own",
        ),
        (
            "recipe: the home folder is not found in lists of paths",
            "if isinstance(data, list | tuple):",
            "if isinstance(data, dict):",
            "tests/cases/test_data.py::test_the_home_folder_stands_for_a_tilde",
        ),
        (
            "recipe: prompts that begin with ~ are paths",
            'value if key == "prompts" else _at_home(value)',
            "_at_home(value)",
            "tests/cases/test_data.py::test_the_home_folder_stands_for_a_tilde",
        ),
    ),
    *planted(
        "recipe/schema.py",
        "runs/test_distill_hyper.py",
        (
            "recipe: any word is a sampler",
            'None if value is None else sampler_name(value, "sample.sampler")',
            "value",
            "test_a_sampler_of_the_recipes_own",
        ),
    ),
]
