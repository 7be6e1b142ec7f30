"""Planted defects of the method feedback."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "methods/feedback.py",
        "methods/test_feedback.py",
        (
            "feedback: the hinge is upside down",
            "torch.relu(goal.threshold - reward).mean()",
            "torch.relu(reward - goal.threshold).mean()",
            "test_a_step_is_the_papers[vp-v_prediction-tcd, two rewards-lora]",
        ),
        (
            "feedback: the threshold is ignored",
            "torch.relu(goal.threshold - reward).mean()",
            "(goal.threshold - reward).mean()",
            "test_nothing_pulls_once_every_picture_is_liked_enough",
        ),
        (
            "feedback: the threshold is that of the mean reward",
            "torch.relu(goal.threshold - reward).mean()",
            "torch.relu(goal.threshold - reward.mean())",
            "test_a_step_is_the_papers[vp-v_prediction-tcd, two rewards-lora]",
        ),
        (
            "feedback: every reward has the first one's threshold",
            "torch.relu(goal.threshold - reward).mean()",
            "torch.relu(settings.rewards[0].threshold - reward).mean()",
            "test_a_step_is_the_papers[vp-v_prediction-tcd, two rewards-lora]",
        ),
        (
            "feedback: weights of rewards are left out",
            'terms[f"{goal.label}_missing"] = (goal.weight, ',
            'terms[f"{goal.label}_missing"] = (1.0, ',
            "test_a_step_is_the_papers[vp-v_prediction-tcd, two rewards-lora]",
        ),
        (
            "feedback: the gradient goes through all calls",
            ("        with torch.no_grad():\n            return walk("),
            ("        if True:\n            return walk("),
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
            "test_a_step_is_the_papers[vp-v_prediction-tcd, two rewards-lora]",
        ),
        (
            "feedback: rewards see latents",
            "images = self.settings, roles.decode(shared.x0_student)",
            "images = self.settings, shared.x0_student",
            "test_a_step_is_the_papers[vp-v_prediction-tcd, two rewards-lora]",
        ),
        (
            "feedback: pictures are detached before they are judged",
            "images = self.settings, roles.decode(shared.x0_student)",
            "images = self.settings, roles.decode(shared.x0_student.detach())",
            "test_a_step_is_the_papers[vp-v_prediction-tcd, two rewards-lora]",
        ),
        (
            "feedback: rewards are not told the prompts",
            "(roles.reward(goal.model)(images, batch.prompts))",
            '(roles.reward(goal.model)(images, ("",) * len(images)))',
            "test_a_step_is_the_papers[vp-v_prediction-tcd, two rewards-lora]",
        ),
        (
            "feedback: the teacher goes the way",
            "x_t, t = self.state(roles.student, draws",
            "x_t, t = self.state(roles.teacher, draws",
            "test_a_step_is_the_papers[vp-v_prediction-tcd, two rewards-lora]",
        ),
        (
            "feedback: the student is drawn from without its fresh noise",
            'options = {"eta": settings.eta,',
            'options = {"eta": 0.0,',
            "test_a_step_is_the_papers[vp-v_prediction-tcd, two rewards-lora]",
        ),
        (
            "feedback: the anchor is where the student is",
            "before = roles.teacher(shared.x_t",
            "before = roles.student(shared.x_t",
            "test_a_step_is_the_papers[vp-v_prediction-ddim, perceptual and anchor-lora]",
        ),
        (
            "feedback: the perceptual term sees noise of another time",
            "t = torch.from_numpy(self.times)[draws.level]",
            "t = torch.from_numpy(self.times)[draws.level - 1]",
            "test_a_step_is_the_papers[vp-v_prediction-ddim, perceptual and anchor-lora]",
        ),
        (
            "feedback: data are compared with themselves",
            "return perceptual_loss(roles.encoder, roles.decode(x0_student), data)",
            "return perceptual_loss(roles.encoder, roles.decode(batch.x0 + 0 * x0_student), data)",
            "test_a_step_is_the_papers[vp-v_prediction-ddim, perceptual and anchor-lora]",
        ),
        (
            "feedback: what is held out is trained on",
            ('            with torch.no_grad():\n                stats |= reward_statistics("held_out"'),
            (
                '            terms["judge"] = (1.0, -roles.reward(settings.held_out)(images, batch.prompts).mea'
                "n())\n"
                "            with torch.no_grad():\n"
                '                stats |= reward_statistics("held_out"'
            ),
            "test_a_step_is_the_papers[vp-v_prediction-tcd, two rewards-lora]",
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
            "test_nothing_pulls_once_every_picture_is_liked_enough",
        ),
    ),
]
