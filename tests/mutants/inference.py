"""Planted defects of inference."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "inference/model.py",
        "inference/test_from_images.py",
        (
            "images: pixels outside the mask come from the decoder",
            "pixels = torch.where(masks.to(pixels.device) > 0, pixels, images.to(pixels) / 2 + 0.5)",
            "pass",
            "test_pixels_outside_the_mask_are_those_of_the_image",
        ),
    ),
    *planted(
        "inference/images.py",
        "inference/test_from_images.py",
        (
            "images: from -2 to 0",
            "/ 127.5 - 1",
            "/ 127.5 - 2",
            "test_img2img_is_diffusers_own",
        ),
        (
            "images: a mask touches a cell only in its corner",
            "return max_pool2d(masks, down)",
            "return masks[..., ::down, ::down]",
            "test_pixels_outside_the_mask_are_those_of_the_image",
        ),
    ),
    *planted(
        "inference/load.py",
        "inference/test_use.py",
        (
            "styles: a student of full weights gets none",
            "add_loras(teacher.pipeline, styles, getattr(student.network.network, teacher.family.part))",
            "add_loras(teacher.pipeline, styles)",
            "test_style_loras_are_added_at_their_scales[full run]",
        ),
        (
            "loading: another base is passed over",
            'teacher = load_teacher(base, **{"size": card.image_size, **how})',
            "teacher = teacher_of(folder, card, **how)",
            "test_a_lora_goes_on_another_base",
        ),
    ),
    *planted(
        "inference/app.py",
        "inference/test_app.py",
        (
            "app: the teacher samples from another seed",
            "teacher.generate(prompts, teacher_steps, seed=seed)",
            "teacher.generate(prompts, teacher_steps, seed=seed + 1)",
            "test_a_row_of_the_student_and_one_of_its_teacher",
        ),
    ),
]
