"""Planted defects of students."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "students/student.py",
        "export/test_student.py",
        (
            "export: a LoRA's scale is not part of the file",
            'found = {name: t * scale if ".lora_B" in name else t',
            'found = {name: t if ".lora_B" in name else t',
            "test_a_lora_predicts_as_before_whatever_its_alpha",
        ),
        (
            "export: a LoRA's scale goes into both of its matrices",
            'found = {name: t * scale if ".lora_B" in name else t',
            'found = {name: t * scale if ".lora_" in name else t',
            "test_a_lora_predicts_as_before_whatever_its_alpha",
        ),
        (
            "export: a LoRA that needs embeddings gets the public name",
            'shareable = card.weights == "lora" and not any(name.startswith(("extras.", "bank.")) for name in tensors)',
            'shareable = card.weights == "lora"',
            "test_what_only_fewstep_can_read_never_gets_the_public_name",
        ),
        (
            "export: the student is written, whichever role was asked for",
            "tensors = _folded(roles, role)",
            'tensors = _folded(roles, "student")',
            "test_a_lora_predicts_as_before_whatever_its_alpha",
        ),
        (
            "export: a student is loaded as its teacher's kind",
            "prediction_type=card.prediction_type or None",
            "prediction_type=None",
            "tests/runs/test_distill_lightning.py::test_a_student_may_predict_another_kind_than_its_teacher",
        ),
    ),
    *planted(
        "students/card.py",
        "export/test_student.py",
        (
            "export: the card's eta is not the sampler's",
            'for key in {"eta", "original_inference_steps"} &',
            'for key in {"original_inference_steps"} &',
            "test_a_card_holds_how_to_sample",
        ),
        (
            "cards: a student's own times are forgotten when its number of steps is asked for",
            "if steps not in (None, len(card.timesteps)):",
            "if steps is not None:",
            "test_a_card_with_timesteps_samples_there_unless_the_user_gives_others",
        ),
        (
            "cards: a student that has times of its own is asked at others",
            "if steps not in (None, len(card.timesteps)):",
            "if False:",
            "test_a_card_with_timesteps_samples_there_unless_the_user_gives_others",
        ),
        (
            "cards: another sampler begins where the student was never trained",
            "if card.timesteps and not given.keys()",
            "if card.timesteps and name in (None, card.sampler) and not given.keys()",
            "test_a_card_with_timesteps_samples_there_unless_the_user_gives_others",
        ),
    ),
    *planted(
        "students/lineage.py",
        "runs/test_chain.py",
        (
            "chain: a student that becomes a teacher leaves its LoRA behind",
            "        merge(weights, saved)\n",
            "",
            "test_a_finished_stage_is_a_teacher",
        ),
        (
            "chain: a run of several is its first stage",
            "path = stages[-1]",
            "path = stages[0]",
            "test_every_stage_leaves_a_student",
        ),
        (
            "init: a LoRA counts twice on a teacher that has it",
            "return first is second",
            "return True",
            "test_a_start_from_a_lora_on_another_teacher_is_what_that_student_says",
        ),
        (
            "chain: a student becomes a teacher of its own teacher's kind",
            "with_denoiser(name=name, kind=card.prediction_type)",
            "with_denoiser(name=name)",
            "tests/runs/test_distill_lightning.py::test_a_student_may_predict_another_kind_than_its_teacher",
        ),
        (
            "chain: discriminators begin as the student in between",
            "load_teacher(first_teacher(folder)).denoiser",
            "open_teacher(name).denoiser",
            "tests/runs/test_distill_lightning.py::test_a_discriminator_begins_as_the_first_model_whoever_teaches",
        ),
        (
            "merging: the joined LoRA stands on the student that it holds",
            "name = _as_seen_from(target, below)",
            "name = card.teacher",
            "tests/runs/test_distill_feedback.py::test_merged_with_a_scale_as_one_lora_on_the_first_teacher",
        ),
        (
            "export: an exported pipeline is taken for a student's folder",
            "if is_pipeline(path):",
            "if False:",
            "tests/export/test_publish.py::test_a_pipeline_folder_samples_right_with_nothing_set",
        ),
    ),
    *planted(
        "students/exported.py",
        "export/test_families.py",
        (
            "export: SD3's stretched shift is read as its own",
            'if shift is not None and schedule.family == "flow":',
            "if False:",
            "test_a_student_of_every_family_is_read_back_elsewhere[sd3-diffusers]",
        ),
    ),
]
