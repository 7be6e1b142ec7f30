"""Planted defects of Sana and Sana-Sprint."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "inference/load.py",
        "checkpoints/test_sprint.py",
        (
            "sprint: its folder is sampled as a teacher of fifty steps",
            "    if own is not None:\n",
            "    if False:\n",
            "test_its_folder_is_a_few_step_model_too",
        ),
    ),
    *planted(
        "checkpoints/load.py",
        "checkpoints/test_sprint.py",
        (
            "sprint: its scheduler's word stands for what the network predicts",
            'if schedule.family != "flow":',
            "if True:",
            "test_the_published_file_samples_as_its_pipeline[2-None]",
        ),
    ),
    *planted(
        "models/families/sana.py",
        "models/test_pipeline_images.py",
        (
            "sana: the instruction is left out",
            'self._encoded(prompts, parameters["complex_human_instruction"].default)',
            "self._encoded(prompts, None)",
            "test_an_image_is_the_pipelines_own[sana]",
        ),
        (
            "sana: the instruction stands before negative prompts too",
            "return self._encoded(prompts, None)",
            "return self.encode(prompts)",
            "test_an_image_is_the_pipelines_own[sana guided]",
        ),
        (
            "sana: its time is a number up to one",
            "self.schedule().num_train_timesteps * self.base.config.timestep_scale",
            "self.base.config.timestep_scale",
            "test_an_image_is_the_pipelines_own[sana]",
        ),
        (
            "sprint: it is told its guidance scale itself",
            "scale * self.config.guidance_embeds_scale",
            "scale",
            "test_two_steps_of_sprint_are_its_pipelines",
        ),
        (
            "sprint: its time counts to a thousand",
            "        return SanaNetwork(self.base)\n",
            "        return SanaNetwork(self.base, 1000.0)\n",
            "test_two_steps_of_sprint_are_its_pipelines",
        ),
        (
            "sprint: its second step starts elsewhere",
            "_SECOND_ANGLE = 1.3",
            "_SECOND_ANGLE = 1.0",
            "test_two_steps_of_sprint_are_its_pipelines",
        ),
    ),
]
