"""Planted defects of random streams, in whatever room they stand: numbers that must be independent and are not."""

from tests.mutants.mutant import planted

OF_A_STEP = "test_the_streams_of_a_step_are_independent"
NAMES = "test_every_stream_that_stands_in_a_method_is_drawn_above"
MUTANTS = [
    *planted(
        "methods/parts/score_gan.py",
        "methods/test_independent_streams.py",
        (
            "streams: a stream is renamed with its field",
            'rng.sample.normal("played_noise", shape)',
            'rng.sample.normal("generator_noise", shape)',
            NAMES,
        ),
        (
            "streams: two terms of a discriminator see one noise",
            'rng.sample.normal("judged_noise", shape)',
            'rng.sample.normal("data_noise", shape)',
            f"{OF_A_STEP}[dmd2]",
        ),
    ),
    *planted(
        "methods/reflow.py",
        "methods/test_independent_streams.py",
        (
            "streams: a new method renames where it draws a point of a line",
            'rng.sample.uniform("height", 0.0,',
            'rng.sample.uniform("level", 0.0,',
            NAMES,
        ),
    ),
    *planted(
        "data/sources.py",
        "methods/test_independent_streams.py",
        (
            "streams: the posterior's noise is the noise of training",
            'rng.sample.normal("posterior", self.shape)',
            'rng.sample.normal("noise", self.shape)',
            f"{OF_A_STEP}[lcm]",
        ),
        (
            "streams: captions are dropped where the guidance scale is low",
            'rng.sample.uniform("caption_dropout")',
            'rng.sample.uniform("guidance_scale")',
            f"{OF_A_STEP}[lcm-target_decay-guidance_scale]",
        ),
        (
            "streams: all sizes of images are visited in the same order",
            'Order(len(source.rows), f"order {number}")',
            "Order(len(source.rows))",
            "test_no_two_owners_ask_for_one_key",
        ),
    ),
    *planted(
        "data/random.py",
        "methods/test_independent_streams.py",
        (
            "streams: every second step draws the numbers of the one before",
            'self._key = (seed, step, "sample")',
            'self._key = (seed, step // 2, "sample")',
            f"{OF_A_STEP}[lcm]",
        ),
        (
            "streams: both halves of a batch draw the same noise",
            "return unit_normals(key, rows, math.prod(shape), self.device, self.dtype).view(len(rows), *shape)",
            "rows = range(-(-self.batch_size // 2))\n"
            "        half = unit_normals(key, rows, math.prod(shape), self.device, self.dtype)"
            ".view(len(rows), *shape)\n"
            "        return half.repeat(2, *[1] * len(shape))[self.rows]",
            f"{OF_A_STEP}[lcm]",
        ),
    ),
    *planted(
        "methods/parts/score_gan.py",
        "methods/test_independent_streams.py",
        (
            "streams: dmd2's discriminator noises its images as the fake score does",
            'draws.data_noise = rng.sample.normal("data_noise", shape)',
            "draws.data_noise = draws.fake_noise",
            f"{OF_A_STEP}[dmd2]",
        ),
    ),
    *planted(
        "methods/parts/matching.py",
        "methods/test_independent_streams.py",
        (
            "streams: dmd2 compares scores at the time where the fake score learns",
            'self.scores.draw_time(rng, "matching_time", *MATCHED, above, upto)',
            'self.scores.draw_time(rng, "fake_time", *MATCHED, above, upto)',
            f"{OF_A_STEP}[dmd2]",
        ),
    ),
    *planted(
        "methods/dmd.py",
        "methods/test_independent_streams.py",
        (
            "streams: dmd's scores are compared on the student's initial noise",
            'noise=rng.sample.normal("noise", shape)',
            'noise=rng.sample.normal("start", shape)',
            f"{OF_A_STEP}[dmd]",
        ),
    ),
    *planted(
        "methods/turbo.py",
        "methods/test_independent_streams.py",
        (
            "streams: turbo's teacher noises the student's image by the noise it came from",
            'teacher_noise=rng.sample.normal("teacher_noise", shape)',
            'teacher_noise=rng.sample.normal("noise", shape)',
            f"{OF_A_STEP}[turbo]",
        ),
    ),
    *planted(
        "methods/ladd.py",
        "methods/test_independent_streams.py",
        (
            "streams: ladd's discriminator noises both sides by one noise",
            'real_noise=rng.sample.normal("real_noise", shape)',
            'real_noise=rng.sample.normal("fake_noise", shape)',
            f"{OF_A_STEP}[ladd]",
        ),
    ),
    *planted(
        "methods/tcd.py",
        "methods/test_independent_streams.py",
        (
            "streams: tcd's end is drawn with its guidance scale",
            'rng.sample.uniform("end")',
            'rng.sample.uniform("guidance_scale")',
            f"{OF_A_STEP}[tcd-target_decay-guidance_scale]",
        ),
    ),
    *planted(
        "methods/hyper.py",
        "methods/test_independent_streams.py",
        (
            "streams: hyper's offset noise is part of its noise",
            'rng.sample.normal("offset", (shape[0], *[1] * (len(shape) - 1)))',
            'rng.sample.normal("noise", (shape[0], *[1] * (len(shape) - 1)))',
            f"{OF_A_STEP}[hyper-segments-offset_noise-target_decay]",
        ),
    ),
    *planted(
        "training/trainer.py",
        "training/test_step.py",
        (
            "streams: every process drops out the same elements",
            'stream_key(self.seed, step, "dropout") + distributed.rank()',
            'stream_key(self.seed, step, "dropout")',
            "test_dropout_is_keyed_by_seed_step_and_process",
        ),
    ),
    *planted(
        "inference/arguments.py",
        "inference/test_noise.py",
        (
            "streams: noise that is given is drawn once more",
            "    noise = unit_normal(shape, source, torch.float32)\n",
            "    noise = given if given is not None else unit_normal(shape, source, torch.float32)\n",
            "test_given_noise_is_not_drawn_again[lcm]",
        ),
    ),
    *planted(
        "inference/model.py",
        "inference/test_noise.py",
        (
            "streams: what a sampler draws is the noise it starts from",
            "guidance_embed=embed, generator=draws,",
            "guidance_embed=embed, generator=torch.Generator().manual_seed(seed),",
            "test_one_seed_gives_independent_noises",
        ),
    ),
    *planted(
        "sampling/sample.py",
        "inference/test_noise.py",
        (
            "streams: samplers draw from the global generator",
            "unit_normal(like.shape, self.generator, like.dtype, like.device)",
            "unit_normal(like.shape, None, like.dtype, like.device)",
            "test_the_global_generator_is_no_part_of_it",
        ),
    ),
    *planted(
        "runs/validation.py",
        "inference/test_noise.py",
        (
            "streams: sample grids draw their initial noise once more",
            "guidance_embed=card.guidance_embed, generator=generator,",
            "guidance_embed=card.guidance_embed, generator=torch.Generator().manual_seed(run.recipe.seed + number),",
            "test_sample_grids_of_training_are_the_images_of_their_seed",
        ),
        (
            "streams: diversity compares two samples from one noise",
            "manual_seed(recipe.seed + number)",
            "manual_seed(recipe.seed)",
            "test_sample_grids_of_training_are_the_images_of_their_seed",
        ),
    ),
    *planted(
        "export/publish.py",
        "inference/test_noise.py",
        (
            "streams: exports are compared on draws that are the initial noise",
            "guidance_embed=card.guidance_embed, generator=generator,",
            "guidance_embed=card.guidance_embed, generator=torch.Generator().manual_seed(0),",
            "test_exports_are_compared_on_independent_noises",
        ),
    ),
    *planted(
        "evaluation/compare.py",
        "inference/test_noise.py",
        (
            "streams: evaluation's draws are its initial noise",
            "manual_seed(seed + 1 + first)",
            "manual_seed(seed + first)",
            "test_evaluation_draws_every_batch_anew",
        ),
        (
            "streams: every batch of an evaluation has the same draws",
            "manual_seed(seed + 1 + first)",
            "manual_seed(seed + 1)",
            "test_evaluation_draws_every_batch_anew",
        ),
        (
            "streams: the spread of a prompt starts from the noises of the evaluation",
            "manual_seed(seed + 10**6)",
            "manual_seed(seed)",
            "test_the_spread_of_a_prompt_is_measured_on_noises_of_its_own",
        ),
    ),
    *planted(
        "runs/measured_on.py",
        "inference/test_noise.py",
        (
            "streams: students are measured from the noises of their pairs",
            "NOISE = 2**62",
            "NOISE = 0",
            "test_students_are_not_measured_from_the_noises_of_their_pairs",
        ),
    ),
]
