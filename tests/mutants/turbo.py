"""Planted defects of ADD, of the heads and pictures it shares with LADD, and of the frozen helpers."""

from tests.mutants.mutant import planted

STEP = "test_both_players_steps_are_the_papers"

TURBO = planted(
    "methods/turbo.py",
    "methods/test_turbo.py",
    (
        "turbo: c(t) is sigma",
        'return alpha if self.settings.weighting == "exponential"',
        'return sigma if self.settings.weighting == "exponential"',
        f"{STEP}[vp-epsilon-the paper's]",
    ),
    (
        "turbo: c(t) of sds forgets its half",
        "np.asarray(alpha * sigma / 2)",
        "np.asarray(alpha * sigma)",
        "test_in_latents_sds_has_the_gradient_of_score_distillation[vp]",
    ),
    (
        "turbo: the advice keeps its graph",
        "        with torch.no_grad():\n            x_t = self.schedule",
        "        if True:\n            x_t = self.schedule",
        "test_in_latents_sds_has_the_gradient_of_score_distillation[vp]",
    ),
    (
        "turbo: the student's own noise is the teacher's too",
        "x_t = self.schedule.add_noise(shared.answer, draws.teacher_noise, t)",
        "x_t = self.schedule.add_noise(shared.answer, draws.noise, t)",
        f"{STEP}[vp-epsilon-advice alone]",
    ),
    (
        "turbo: the teacher is not guided",
        "return roles.teacher(x_t, t, cond, guidance_scale=scale).x0",
        "return roles.teacher(x_t, t, cond).x0",
        f"{STEP}[vp-epsilon-advice alone]",
    ),
    (
        "turbo: the student advises itself",
        "return roles.teacher(x_t, t, cond, guidance_scale=scale).x0",
        "return roles.student(x_t, t, cond, guidance_scale=scale).x0",
        f"{STEP}[vp-epsilon-advice alone]",
    ),
    (
        "turbo: pixels are compared with latents' weights: the answer is not decoded",
        'return roles.decode(latents) if self.settings.space == "pixels" else latents',
        "return latents",
        f"{STEP}[vp-epsilon-advice alone]",
    ),
    (
        "turbo: nfsd goes against the prompt",
        "(scale * (given - without) + early * without)",
        "(scale * (without - given) + early * without)",
        f"{STEP}[vp-epsilon-nfsd, table]",
    ),
    (
        "turbo: nfsd keeps eps_0 at high levels",
        "early = expand((t < self.levels",
        "early = expand((t >= self.levels",
        f"{STEP}[vp-epsilon-nfsd, table]",
    ),
    (
        "turbo: the answer's pictures are detached before they are judged",
        'y = shared.seen if settings.space == "pixels" else roles.decode(answer)',
        "y = roles.decode(answer).detach()",
        "test_gradients_pass_through_decoder_and_encoder_and_stay_in_neither[vp]",
    ),
    (
        "turbo: both sides are augmented alike",
        "augmented(data, draws.real_augment, settings.augment)",
        "augmented(data, draws.fake_augment, settings.augment)",
        f"{STEP}[vp-epsilon-the paper's]",
    ),
    (
        "turbo: heads are told the picture where the student saw noise alone",
        "return projection_condition(roles.helpers, cond, seen * summary)",
        "return projection_condition(roles.helpers, cond, summary)",
        "test_heads_are_told_the_picture_where_the_student_saw_it",
    ),
    (
        "turbo: the distillation has the game's weight",
        'weights = {name: getattr(self.settings, f"{name}_weight") for name in terms}',
        "weights = {name: self.settings.adversarial_weight for name in terms}",
        f"{STEP}[vp-epsilon-the paper's]",
    ),
    (
        "turbo: the discriminator is spared R1",
        '"hinge", self.settings.r1_weight)',
        '"hinge")',
        f"{STEP}[vp-epsilon-the paper's]",
    ),
    (
        "turbo: the teacher is asked where nothing of the answer is left",
        "levels[schedule.alpha_sigma(levels)[0] > 0]",
        "levels",
        "test_the_teacher_is_asked_wherever_something_of_the_answer_is_left[flow-999]",
    ),
    (
        "turbo: the last level is never drawn",
        'rng.sample.integers("level", 0, len(self.timesteps))',
        'rng.sample.integers("level", 0, len(self.timesteps) - 1)',
        "test_draws_cover_all_levels_evenly_and_noises_are_their_own",
    ),
    (
        "turbo: EDM's alpha is taken as it is",
        'np.hypot(alpha, sigma) if self.schedule.family == "edm" else 1.0',
        "1.0",
        f"{STEP}[edm-sample-advice alone]",
    ),
)

INPUTS = planted(
    "methods/parts/inputs.py",
    "methods/test_turbo.py",
    (
        "inputs: the noisiest level shows its data",
        'return blind | (t == schedule.start) if terminal == "noise" else blind',
        "return blind",
        f"{STEP}[vp-epsilon-the paper's]",
    ),
)

PROJECTION = planted(
    "methods/parts/projection.py",
    "methods/test_projection.py",
    (
        "projection: kernels are not normalised",
        "weight = self.weight / self.largest()",
        "weight = self.weight",
        "test_kernels_are_divided_by_their_largest_singular_value",
    ),
    (
        "projection: the norm has no slope",
        "return u @ matrix @ v",
        "return (u @ matrix @ v).detach()",
        "test_the_norm_is_the_same_at_every_call_and_its_slope_is_of_one_singular_pair",
    ),
    (
        "projection: rows are closed one place off",
        "first = around * length - padding",
        "first = around * length - padding + 1",
        "test_rows_are_closed_however_short",
    ),
    (
        "projection: batch norm over the whole batch",
        "else math.gcd(GROUP, n)",
        "else n",
        "test_groups_have_mean_zero_and_variance_one",
    ),
    (
        "projection: batch norm with the unbiased variance",
        "correction=0, keepdim=True",
        "correction=1, keepdim=True",
        "test_groups_have_mean_zero_and_variance_one",
    ),
    (
        "projection: the shortcut is left out",
        "h = (h + self.middle(h)) / math.sqrt(2)",
        "h = self.middle(h) / math.sqrt(2)",
        f"tests/methods/test_turbo.py::{STEP}[vp-epsilon-the paper's]",
    ),
    (
        "projection: the sum of 64 products is not scaled",
        '"bcl,bc->bl", said, asked) / math.sqrt(CONDITION_WIDTH)',
        '"bcl,bc->bl", said, asked)',
        f"tests/methods/test_turbo.py::{STEP}[vp-epsilon-the paper's]",
    ),
    (
        "projection: the head is not told the condition",
        "asked = self.condition(condition.to(said.dtype))",
        "asked = self.condition(0 * condition.to(said.dtype))",
        "test_logits_are_linear_in_the_condition_and_need_none",
    ),
    (
        "projection: what heads are told keeps its scale",
        "sized = [part.to(dtype) / part.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6) for part in parts]",
        "sized = [part.to(dtype) for part in parts]",
        "test_what_heads_are_told_has_one_scale_and_zeros_stay",
    ),
    (
        "projection: R1 on the fake side",
        "said.total, r1(heads, real)",
        "said.total, r1(heads, fake)",
        f"tests/methods/test_turbo.py::{STEP}[vp-epsilon-the paper's]",
    ),
    (
        "projection: the heads' player moves the student",
        "heads([feature.detach() for feature in fake])",
        "heads(fake)",
        "tests/methods/test_turbo.py::test_gradients_pass_through_decoder_and_encoder_and_stay_in_neither[vp]",
    ),
)

AUGMENT = planted(
    "methods/parts/augment.py",
    "methods/test_augment.py",
    (
        "augment: brightness only brightens",
        "x = x + expand(u[:, 0] - 0.5, x)",
        "x = x + expand(u[:, 0], x)",
        "test_pictures_become_what_they_become_by_hand[8-policies1]",
    ),
    (
        "augment: contrast is about the pixel's grey",
        "mean = x.mean(dim=(1, 2, 3), keepdim=True)",
        "mean = x.mean(dim=1, keepdim=True)",
        "test_pictures_become_what_they_become_by_hand[8-policies1]",
    ),
    (
        "augment: pictures only move one way",
        "np.floor(u * (2 * reach + 1)).astype(np.int64) - reach",
        "np.floor(u * (2 * reach + 1)).astype(np.int64)",
        "test_moves_reach_an_eighth_and_cuts_a_half",
    ),
    (
        "augment: what comes in repeats the edge",
        "index.expand_as(x)) * _on(inside.reshape(shape), x)",
        "index.expand_as(x))",
        "test_pictures_become_what_they_become_by_hand[8-policies2]",
    ),
    (
        "augment: a cross is cut, not a window",
        "rows[:, None, :, None] & columns",
        "rows[:, None, :, None] | columns",
        "test_pictures_become_what_they_become_by_hand[8-policies3]",
    ),
    (
        "augment: all numbers of a picture are one",
        'rng.sample.uniform(f"{name}/{i}")',
        "rng.sample.uniform(name)",
        "tests/methods/test_turbo.py::test_draws_cover_all_levels_evenly_and_noises_are_their_own",
    ),
)

HELPERS = [
    *planted(
        "models/encoders.py",
        "models/test_encoders.py",
        (
            "encoders: a block's tap is the one before it",
            'else int(tap.removeprefix("block")) + 1]',
            'else int(tap.removeprefix("block"))]',
            "test_losses_see_tokens_after_each_quarter_and_gradients_come_back[dino]",
        ),
        (
            "encoders: the class token is left out",
            "found.append((tokens[:, others:] + tokens[:, :1]).transpose(1, 2))",
            "found.append(tokens[:, others:].transpose(1, 2))",
            "test_losses_see_tokens_after_each_quarter_and_gradients_come_back[clip]",
        ),
        (
            "encoders: the small one sees pictures from -1 to 1 as they are",
            "return (pictures / 2 + 0.5).to(next(self.network.parameters()).dtype)",
            "return pictures.to(next(self.network.parameters()).dtype)",
            "test_the_shipped_encoder_sees_what_its_taps_see",
        ),
    ),
    *planted(
        "models/families/teacher.py",
        "models/test_helpers.py",
        (
            "families: pictures for losses forget the latents' scale",
            "latents.to(vae.device, vae.dtype) / factor + shift, return_dict",
            "latents.to(vae.device, vae.dtype), return_dict",
            "test_pictures_are_what_the_autoencoder_makes_of_unscaled_latents",
        ),
    ),
    *planted(
        "models/helpers.py",
        "models/test_helpers.py",
        (
            "helpers: the pooled prompt is its first token, which has seen nothing",
            'cond["prompt_embeds"][:, -1]',
            'cond["prompt_embeds"][:, 0]',
            "test_the_pooled_prompt_tells_prompts_apart",
        ),
    ),
]
