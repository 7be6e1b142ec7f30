"""Planted defects of scenes64."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "scenes64/linear_code.py",
        "scenes64/test_linear_code.py",
        (
            "latents: details are scaled up nearly to the colours' variance",
            "scale = variances.pow(-0.25)",
            "scale = variances.pow(-0.4)",
            "test_it_explains_more_than_other_projections",
        ),
        (
            "latents: the code takes the least components",
            "variances.flip(0)[:channels], vectors.flip(1)[:, :channels]",
            "variances[:channels], vectors[:, :channels]",
            "test_it_explains_more_than_other_projections",
        ),
    ),
    *planted(
        "scenes64/denoise.py",
        "scenes64/test_train_teacher.py",
        (
            "teacher: the second task does not fade",
            "share=self.detection * (1 - progress.step / progress.total)",
            "share=self.detection",
            "test_the_second_task_is_told_from_inside_and_fades",
        ),
        (
            "teacher: every image has its first caption",
            "picked = tokens[rows, draws.telling.to(tokens.device)]",
            "picked = tokens[rows, 0 * draws.telling.to(tokens.device)]",
            "test_times_cover_all_and_captions_are_dropped",
        ),
        (
            "teacher: a lesson's times lie in the rest of the table",
            "torch.where(drawn, low + (high - low)",
            "torch.where(~drawn, low + (high - low)",
            "test_a_lesson_shows_single_things_and_their_times",
        ),
        (
            "teacher: a lesson shows several things",
            "Scenes(seed, numbers=(1, 0, 0, 0), fills=self.fills)",
            "Scenes(seed, fills=self.fills)",
            "test_a_lesson_shows_single_things_and_their_times",
        ),
    ),
    *planted(
        "scenes64/train_teacher.py",
        "scenes64/test_train_teacher.py",
        (
            "teacher: a lesson encodes the whole task's scenes",
            "settings.tellings, device, lesson)",
            "settings.tellings, device, None)",
            "test_a_lesson_is_taught_in_a_folder_of_its_own",
        ),
        (
            "teacher: a lesson continues the whole task's folder",
            'out / "-".join(filter(None, ("unet", settings.lesson)))',
            'out / "unet"',
            "test_a_lesson_is_taught_in_a_folder_of_its_own",
        ),
    ),
    *planted(
        "scenes64/architecture.py",
        "scenes64/test_architecture.py",
        (
            "teacher: the upper and lower borders look alike",
            "((1, 0), (1, 2), (0, 1), (2, 1))",
            "((1, 0), (1, 2), (0, 1), (0, 1))",
            "test_a_new_unet_sees_the_borders_and_passes_its_input_on",
        ),
        (
            "teacher: borders are not spread to their neighbours",
            "block.conv2.weight[channel, channel, row, column] = 0.5",
            "block.conv2.weight[channel, channel, row, column] = 0.0",
            "test_a_new_unet_sees_the_borders_and_passes_its_input_on",
        ),
    ),
    *planted(
        "scenes64/autoencoder.py",
        "scenes64/test_train_teacher.py",
        (
            "teacher: the decoder draws from what the encoder gives",
            "vae.decode(latents + spread",
            "vae.decode(posterior.mean + spread",
            "test_the_encoder_is_taught_the_code_and_the_decoder_draws_from_it",
        ),
    ),
    *planted(
        "scenes64/stage.py",
        "scenes64/test_train_teacher.py",
        (
            "stages: the shipped model is trained again on other noise",
            "rng=ScenesRng",
            "rng=Rng",
            "tests/scenes64/test_losses_kept.py::test_preferences",
        ),
        (
            "stages: the average of a short run still holds its random start",
            "decay = min(settings.ema_decay, (1 + settings.steps) / (10 + settings.steps))",
            "decay = settings.ema_decay",
            "test_the_average_spans_no_more_than_the_run",
        ),
        (
            "stages: minutes are converted anew when a run is continued",
            "if minutes is not None and not distributed.from_first((folder / _PLAN).is_file()):",
            "if minutes is not None:",
            "test_minutes_become_steps_once",
        ),
    ),
    *planted(
        "scenes64/train_detector.py",
        "scenes64/test_detector.py",
        (
            "detector: labels of the pool's images are those of other rows",
            "Labels.cat([labels, self.pool[1].rows(rows)])",
            "Labels.cat([labels, self.pool[1].rows(rows.flip(0))])",
            "test_batches_are_new_renders_and_passed_pictures_under_their_own_labels",
        ),
    ),
    *planted(
        "scenes64/train_rewards.py",
        "scenes64/test_train_rewards.py",
        (
            "reward training: the rejected one wins",
            "return F.softplus(-margin).mean()",
            "return F.softplus(margin).mean()",
            "test_the_loss_is_the_likelihood_of_the_choices",
        ),
        (
            "reward training: it is measured on what it was trained on",
            "result = measure(network, preferences, held, seen.rows(held))",
            "result = measure(network, preferences, order[count:], mine)",
            "test_a_reward_is_learnt_from_choices_and_is_the_same_again",
        ),
        (
            "reward training: the ceiling is the mean probability of what was chosen",
            "float(torch.maximum(p, 1 - p).mean())",
            "float(p.mean())",
            "test_measured_on_held_out_choices",
        ),
    ),
    *planted(
        "scenes64/scenes/raters.py",
        "data/test_preferences.py",
        (
            "raters: the probability is that of the first picture, whichever was chosen",
            "return second, first, 1 - probability, decoded",
            "return second, first, probability, decoded",
            "test_raters_choose_by_their_rule_and_with_their_noise",
        ),
    ),
]
