"""Planted defects of human feedback: of the method, its rewards, the choices they are learnt from, and merging."""

from tests.mutants.mutant import planted

_STEP = "test_a_step_is_the_papers[vp-v_prediction-tcd, two rewards-lora]"
_OTHER = "test_a_step_is_the_papers[vp-v_prediction-ddim, perceptual and anchor-lora]"
_ENOUGH = "test_nothing_pulls_once_every_picture_is_liked_enough"

FEEDBACK = [
    *planted(
        "methods/feedback.py",
        "methods/test_feedback.py",
        (
            "feedback: the hinge is upside down",
            "torch.relu(goal.threshold - reward).mean()",
            "torch.relu(reward - goal.threshold).mean()",
            _STEP,
        ),
        (
            "feedback: the threshold is ignored",
            "torch.relu(goal.threshold - reward).mean()",
            "(goal.threshold - reward).mean()",
            _ENOUGH,
        ),
        (
            "feedback: the threshold is that of the mean reward",
            "torch.relu(goal.threshold - reward).mean()",
            "torch.relu(goal.threshold - reward.mean())",
            _STEP,
        ),
        (
            "feedback: every reward has the first one's threshold",
            "torch.relu(goal.threshold - reward).mean()",
            "torch.relu(settings.rewards[0].threshold - reward).mean()",
            _STEP,
        ),
        (
            "feedback: weights of rewards are left out",
            'terms[f"{goal.label}_missing"] = (goal.weight, ',
            'terms[f"{goal.label}_missing"] = (1.0, ',
            _STEP,
        ),
        (
            "feedback: the gradient goes through all calls",
            "        with torch.no_grad():\n            return walk(",
            "        if True:\n            return walk(",
            "test_the_gradient_is_the_last_calls_alone",
        ),
        (
            "feedback: the exit is one call early",
            "until=draws.exit)[-1]",
            "until=max(draws.exit - 1, 0))[-1]",
            "test_the_way_to_each_exit_is_the_samplers_own[vp-tcd]",
        ),
        (
            "feedback: the student is asked at the time before",
            "float(self.times[draws.exit])\n",
            "float(self.times[max(draws.exit - 1, 0)])\n",
            _STEP,
        ),
        (
            "feedback: rewards see latents",
            "pictures = self.settings, roles.decode(shared.answer)",
            "pictures = self.settings, shared.answer",
            _STEP,
        ),
        (
            "feedback: pictures are detached before they are judged",
            "pictures = self.settings, roles.decode(shared.answer)",
            "pictures = self.settings, roles.decode(shared.answer.detach())",
            _STEP,
        ),
        (
            "feedback: rewards are not told the prompts",
            "(roles.reward(goal.model)(pictures, batch.prompts))",
            '(roles.reward(goal.model)(pictures, ("",) * len(pictures)))',
            _STEP,
        ),
        (
            "feedback: the teacher goes the way",
            "x_t, t = self.state(roles.student, draws",
            "x_t, t = self.state(roles.teacher, draws",
            _STEP,
        ),
        (
            "feedback: the student is drawn from without its fresh noise",
            'options = {"eta": settings.eta,',
            'options = {"eta": 0.0,',
            _STEP,
        ),
        (
            "feedback: the anchor is where the student is",
            "before = roles.teacher(shared.x_t",
            "before = roles.student(shared.x_t",
            _OTHER,
        ),
        (
            "feedback: the perceptual term sees noise of another time",
            "t = torch.from_numpy(self.times)[draws.level]",
            "t = torch.from_numpy(self.times)[draws.level - 1]",
            _OTHER,
        ),
        (
            "feedback: data are compared with themselves",
            "return likeness_loss(roles.encoder, roles.decode(answer), data)",
            "return likeness_loss(roles.encoder, roles.decode(batch.x0 + 0 * answer), data)",
            _OTHER,
        ),
        (
            "feedback: what is held out is trained on",
            "            with torch.no_grad():\n                stats |= reward_statistics(\"held_out\"",
            "            terms[\"judge\"] = (1.0, -roles.reward(settings.held_out)(pictures, batch.prompts).mean())\n"
            "            with torch.no_grad():\n                stats |= reward_statistics(\"held_out\"",
            _STEP,
        ),
        (
            "feedback: the last call is never trained",
            'rng.shared.integer("exit", self.settings.first_exit, steps)',
            'rng.shared.integer("exit", self.settings.first_exit, max(steps - 1, 1))',
            "test_draws",
        ),
        (
            "feedback: data are shown at the first time too",
            'rng.sample.integers("level", 1, steps)',
            'rng.sample.integers("level", 0, steps)',
            "test_draws",
        ),
        (
            "feedback: reached is beyond the threshold alone",
            "(reward.detach() >= goal.threshold)",
            "(reward.detach() > goal.threshold)",
            _ENOUGH,
        ),
    ),
    *planted(
        "sampling/sample.py",
        "methods/test_feedback.py",
        (
            "sampling: cut short, a way ends as if it were whole",
            "last = i == len(times) - 2",
            "last = i == (len(times) - 2 if until is None else until - 1)",
            "test_the_way_to_each_exit_is_the_samplers_own[vp-tcd]",
        ),
    ),
    *planted(
        "methods/parts/likeness.py",
        "methods/test_likeness.py",
        (
            "likeness: empty cells count like things",
            "each = each + (weight * divergence).sum(dim=(1, 2))",
            "each = each + divergence.mean(dim=(1, 2))",
            "test_instances_by_hand",
        ),
        (
            "likeness: the divergence is the other way round",
            "F.kl_div(log, log_wanted, ",
            "F.kl_div(log_wanted, log, ",
            "test_instances_by_hand",
        ),
        (
            "likeness: the data feel a gradient",
            "        with torch.no_grad():\n            wanted = told(data)",
            "        if True:\n            wanted = told(data)",
            "test_the_encoder_tells_scenes_apart_and_gradients_come_back",
        ),
    ),
    *planted(
        "models/rewards.py",
        "models/test_rewards.py",
        (
            "rewards: pictures are not cut to what files hold",
            "return (pictures / 2 + 0.5).clamp(0, 1)",
            "return pictures / 2 + 0.5",
            "test_gradients_reach_what_a_file_could_hold_and_stay_in_no_weight[small]",
        ),
        (
            "rewards: pictures are taken to be from 0 to 1 already",
            "return (pictures / 2 + 0.5).clamp(0, 1)",
            "return pictures.clamp(0, 1)",
            "test_the_small_reward_by_hand",
        ),
        (
            "rewards: CLIP's pictures are resized without antialiasing",
            'F.interpolate(images, sides, mode="bicubic", antialias=True)',
            'F.interpolate(images, sides, mode="bicubic")',
            "test_clip_sees_pictures_as_its_own_processor_shows_them[33-33]",
        ),
        (
            "rewards: CLIP's pictures are squeezed, not cropped",
            "sides = (int(size * height / short), int(size * width / short))",
            "sides = (size, size)",
            "test_clip_sees_pictures_as_its_own_processor_shows_them[26-33]",
        ),
        (
            "rewards: the aesthetic head sees CLIP's vector as it is",
            "x = F.normalize(working(_pooled(self.model(pixel_values=pixels.to(self.model.dtype)))), dim=1)",
            "x = working(_pooled(self.model(pixel_values=pixels.to(self.model.dtype))))",
            "test_aesthetic_is_a_chain_of_layers_on_a_unit_vector",
        ),
        (
            "rewards: the head's layers are in the order of their names",
            'numbers = sorted(int(key.split(".")[1])',
            'numbers = sorted(key.split(".")[1]',
            "test_aesthetic_is_a_chain_of_layers_on_a_unit_vector",
        ),
        (
            "rewards: one that stands on the reader may be trained on",
            'if reward.network.about.trunk == "reader" and not measures:',
            "if False:",
            "test_what_measures_is_refused_in_a_loss",
        ),
        (
            "rewards: the small one's numbers are not brought to scale",
            "return (self.like(self.seen(images)) - self.scale[0]) / self.scale[1]",
            "return self.like(self.seen(images))",
            "test_the_small_reward_by_hand",
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
        "data/preferences.py",
        "data/test_preferences.py",
        (
            "preferences: pictures may lie anywhere",
            "return inside(root, name).resolve()",
            "return (root / name).resolve(strict=True)",
            "test_a_bad_line_is_one_sentence_that_names_it",
        ),
        (
            "preferences: label_0 says which was rejected",
            "if label == 1 else (second, first)",
            "if label != 1 else (second, first)",
            "test_three_layouts_say_the_same",
        ),
        (
            "preferences: ties are choices of the second",
            "    if label == 0.5:\n        return None\n",
            "",
            "test_three_layouts_say_the_same",
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
    *planted(
        "data/sources.py",
        "data/test_preferences.py",
        (
            "sources: prompts are those of the next rows",
            "tuple(self.captions[i] for i in self.data.order.rows(rng))",
            "tuple(self.captions[i - 1] for i in self.data.order.rows(rng))",
            "test_prompts_are_those_of_their_rows",
        ),
    ),
    *planted(
        "students/lineage.py",
        "runs/test_distill_feedback.py",
        (
            "merging: the scale is squared",
            'return {key: t * scale if ".lora_B" in key else t for key, t in lora.items()}',
            "return {key: t * scale for key, t in lora.items()}",
            "test_merged_with_a_scale_as_one_lora_on_the_first_teacher",
        ),
        (
            "merging: the joined LoRA stands on the student that it holds",
            "        name = _as_seen_from(target, base)\n",
            "",
            "test_merged_with_a_scale_as_one_lora_on_the_first_teacher",
        ),
    ),
    *planted(
        "runs/distill.py",
        "runs/test_distill_feedback.py",
        (
            "distil: rewards get no captions",
            '_with_prompts(data, recipe, of_teacher) if "prompts" in job.method.streams else data',
            "data",
            "test_prompts_of_the_pictures_reach_the_rewards",
        ),
    ),
    *planted(
        "runs/setup.py",
        "runs/test_distill_feedback.py",
        (
            "job: feedback draws from its student by another sampler",
            "if card.sampler != method.sampler:",
            "if False:",
            "test_what_does_not_fit_is_one_sentence_before_anything_is_written",
        ),
    ),
    *planted(
        "models/roles.py",
        "runs/test_distill_feedback.py",
        (
            "roles: the consistency student's weights learn too",
            "self.base.eval().requires_grad_(False)",
            "self.base.eval()",
            "tests/methods/test_contract.py::test_each_loss_reaches_its_players_parameters_and_nobody_elses[feedback-full]",
        ),
    ),
]  # fmt: skip
