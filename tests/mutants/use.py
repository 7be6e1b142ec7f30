"""Planted defects of loading, drawing, and pictures drawn anew."""

from tests.mutants.mutant import planted

_CUT = "test_other_grids_are_cut"
_KEEPS = "test_inpainting_keeps_the_picture_and_draws_the_rest_as_if_alone"
_STYLES = "tests/inference/test_use.py::test_style_loras_are_added_at_their_scales"
_READ_BACK = "tests/export/test_families.py::test_a_student_of_every_family_is_read_back_elsewhere"

USE = [
    *planted(
        "sampling/samplers.py",
        "sampling/test_strength.py",
        ("strength: the first steps are left", "return times[-count:]", "return times[:count]", _CUT),
        (
            "strength: flow grids are rounded down",
            'math.ceil(wanted - 1e-9) if schedule.family == "flow" else math.floor(wanted + 1e-9)',
            "math.floor(wanted + 1e-9)",
            _CUT,
        ),
        ("strength: LCM's own grid is cut too", "if self.strength == 1 or (", "if self.strength == 1 or False and (",
         "test_lcms_times_are_built_from_the_strength"),
    ),
    *planted(
        "diffusion/schedule.py",
        "sampling/test_strength.py",
        (
            "strength: LCM picks from the noisiest part",
            "total, origin = len(origin), origin[len(origin) - math.floor(len(origin) * strength + 1e-9) :]",
            "total, origin = len(origin), origin[: math.floor(len(origin) * strength + 1e-9)]",
            "test_lcms_times_are_built_from_the_strength",
        ),
    ),
    *planted(
        "sampling/sample.py",
        "sampling/test_strength.py",
        (
            "strength: the picture gets the second time's noise",
            "schedule.add_noise(image.to(noise), noise, float(times[0]))",
            "schedule.add_noise(image.to(noise), noise, float(times[1]))",
            "test_steps_of_lcm_are_posterior_means_and_the_last_adds_no_noise",
        ),
        (
            "inpainting: the mask is read the wrong way round",
            "return (1 - self.mask) * known.to(x.dtype) + self.mask * x",
            "return self.mask * known.to(x.dtype) + (1 - self.mask) * x",
            _KEEPS,
        ),
        ("inpainting: what is kept stays noisy at the end", "self.image if last", "self.image if False", _KEEPS),
        (
            "inpainting: what is kept is put back without noise",
            "schedule.add_noise(self.image, self.noise, time)",
            "self.image",
            _KEEPS,
        ),
    ),
    *planted(
        "inference/model.py",
        "inference/test_from_images.py",
        (
            "pictures: pixels outside the mask come from the decoder",
            "drawn = torch.where(masks.to(drawn.device) > 0, drawn, images.to(drawn) / 2 + 0.5)",
            "pass",
            "test_pixels_outside_the_mask_are_the_pictures_own",
        ),
    ),
    *planted(
        "inference/images.py",
        "inference/test_from_images.py",
        ("pictures: from -2 to 0", "/ 127.5 - 1", "/ 127.5 - 2", "test_img2img_is_diffusers_own"),
        (
            "pictures: a mask touches a cell only in its corner",
            "return max_pool2d(masks, down)",
            "return masks[..., ::down, ::down]",
            "test_pixels_outside_the_mask_are_the_pictures_own",
        ),
    ),
    *planted(
        "models/cond.py",
        "inference/test_use.py",
        (
            "negative prompts: prompt and negative prompt change places",
            "return Cond(self.tensors, other.tensors)",
            "return Cond(other.tensors, self.tensors)",
            "test_a_negative_prompt_is_diffusers_own",
        ),
    ),
    *planted(
        "models/lora_files.py",
        "inference/test_use.py",
        (
            "styles: their scale is forgotten",
            "merge(dict(module.named_parameters()), layers, scale)",
            "merge(dict(module.named_parameters()), layers)",
            f"{_STYLES}[teacher]",
        ),
        (
            "styles: the text encoder's part is lost",
            "parts = {part: _layers(getattr(pipeline, part, None)) for part in (name, *ENCODERS)}",
            "parts = {part: _layers(getattr(pipeline, part, None)) for part in (name,)}",
            f"{_STYLES}[teacher]",
        ),
    ),
    *planted(
        "inference/load.py",
        "inference/test_use.py",
        (
            "styles: a student of full weights gets none",
            "add_loras(teacher.pipeline, styles, getattr(student.network.network, part))",
            "add_loras(teacher.pipeline, styles)",
            f"{_STYLES}[full run]",
        ),
        (
            "loading: another base is passed over",
            'teacher = load_teacher(base, **{"size": card.image_size, **how})',
            "teacher = teacher_of(folder, card, **how)",
            "test_a_lora_goes_on_another_base",
        ),
    ),
    *planted(
        "export/publish.py",
        "export/test_families.py",
        (
            "export: the teacher's prediction kind for an x0 student",
            "card.prediction_type or teacher.denoiser.prediction_type, first_teacher",
            "teacher.denoiser.prediction_type, first_teacher",
            f"{_READ_BACK}[sd15-diffusers]",
        ),
    ),
    *planted(
        "students/exported.py",
        "export/test_families.py",
        (
            "export: SD3's stretched shift is read as its own",
            'if shift is not None and schedule.family == "flow":',
            "if False:",
            f"{_READ_BACK}[sd3-diffusers]",
        ),
    ),
    *planted(
        "export/round_trip.py",
        "export/test_families.py",
        (
            "export: schedulers of flow models draw from elsewhere",
            'torch.manual_seed(question["seed"])',
            'torch.Generator().manual_seed(question["seed"])',
            "test_lcm_on_a_flow_model",
        ),
    ),
    *planted(
        "inference/app.py",
        "inference/test_app.py",
        (
            "app: the teacher draws from another seed",
            "teacher.draw(prompts, teacher_steps, seed=seed)",
            "teacher.draw(prompts, teacher_steps, seed=seed + 1)",
            "test_a_row_of_the_student_and_one_of_its_teacher",
        ),
    ),
]
