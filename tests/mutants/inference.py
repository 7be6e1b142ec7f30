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
        (
            "sampling options: images of a prompt are not one after the other",
            "torch.arange(len(given)).repeat_interleave(each)",
            "torch.arange(len(given)).repeat(each)",
            "tests/cases/test_sampling.py::test_several_images_of_each_prompt_from_an_image",
        ),
        (
            "sampling options: FLUX keeps the shift of its own size",
            "denoiser = denoiser.uncounted(family.schedule())",
            "pass",
            "tests/cases/test_sampling.py::test_sizes_generators_and_several_images_are_those_of_diffusers[48-80-flux]",
        ),
        (
            "sampling options: SDXL is told its own size",
            "cond = this.condition(given, negative_prompt, scale)",
            "cond = self.condition(given, negative_prompt, scale)",
            "tests/cases/test_sampling.py::test_sizes_generators_and_several_images_are_those_of_diffusers[48-80-sdxl]",
        ),
        (
            "sampling options: guidance 0 leaves the prompt out",
            'guidance(scale, "guidance_scale") or 1.0',
            'guidance(scale, "guidance_scale")',
            "tests/cases/test_sampling.py::test_guidance_off_is_said_by_0_and_by_1",
        ),
    ),
    *planted(
        "inference/arguments.py",
        "cases/test_sampling.py",
        (
            "sampling options: noise is drawn from a generator whose latents are given",
            "if given is not None and generator is not None:",
            "if False:",
            "test_a_generator_goes_on_where_it_stands",
        ),
        (
            "sampling options: half a character is handed on",
            "text.encode()",
            "pass",
            "test_what_cannot_be_used_is_one_sentence",
        ),
        (
            "sampling options: text is a number",
            "isinstance(given, bool | str | bytes) or given != int(given)",
            "isinstance(given, bool) or float(given) != int(given)",
            "test_what_cannot_be_used_is_one_sentence",
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
        (
            "images: a pipe is waited for",
            "    if not stat.S_ISREG(kind):\n",
            "    if stat.S_ISDIR(kind):\n",
            "tests/cases/test_pictures.py::test_pipes_and_devices_are_not_waited_for",
        ),
        (
            "images: tensors have their channels last",
            ".numpy(), channels_first=True)",
            ".numpy())",
            "tests/cases/test_pictures.py::test_shapes_that_could_be_both",
        ),
        (
            "images: several in one array are one",
            "return list(given) if given.ndim == 4 else [given]",
            "return [given]",
            "tests/cases/test_pictures.py::test_a_picture_is_the_same_from_whatever_it_comes",
        ),
    ),
    *planted(
        "inference/load.py",
        "inference/test_use.py",
        (
            "styles: a student of full weights gets none",
            "family.part: getattr(student.network.network, family.part)}, styles)",
            "}, styles)",
            "test_style_loras_are_added_at_their_scales[full run]",
        ),
        (
            "loading: the home folder is not found",
            "expanded(str(file)), float(scale)",
            "Path(file), float(scale)",
            "tests/cases/test_data.py::test_the_home_folder_of_what_is_loaded",
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
    *planted(
        "inference/generate.py",
        "program/test_edges.py",
        (
            "edges: an image is written over the earlier one",
            "with replacing(out) as part:",
            "for part in [out]:",
            "test_a_full_disk_keeps_the_earlier_image",
        ),
        (
            "edges: a folder takes the place of an image",
            "if out.exists() and not out.is_file():",
            "if False:",
            "test_what_cannot_be_sampled_is_one_sentence",
        ),
    ),
    *planted(
        "models/hub.py",
        "program/test_edges.py",
        (
            "edges: a device of no values is a device",
            "torch.empty(1, device=name).cpu().device.type",
            'torch.empty(1, device=name).shape and "cpu"',
            "test_a_device_that_is_not_there_is_said_first",
        ),
    ),
    *planted(
        "training/console.py",
        "program/test_edges.py",
        (
            "edges: infinite minutes are minutes",
            "if value is not None and not math.isfinite(value):",
            "if value is not None and math.isnan(value):",
            "test_other_commands_refuse_in_one_sentence",
        ),
    ),
    *planted(
        "data/files.py",
        "program/test_edges.py",
        (
            "edges: half a file stays",
            "            part.unlink()\n",
            "            pass\n",
            "test_a_block_that_fails_leaves_the_old_file",
        ),
    ),
]
