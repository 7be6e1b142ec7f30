"""Planted defects of checkpoints."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "checkpoints/load.py",
        "checkpoints/test_load.py",
        (
            "checkpoints: a pipeline of another family is sampled by the entry's settings",
            "if not isinstance(teacher.family, family):",
            "if False:",
            "tests/checkpoints/test_load.py::test_a_pipeline_of_another_family_is_refused",
        ),
        (
            "checkpoints: the LoRA scale is forgotten",
            "[(path, entry.lora_scale or 1.0)]",
            "[(path, 1.0)]",
            "test_a_lora_is_added_at_the_entrys_scale",
        ),
        (
            "checkpoints: the base's prediction type stays",
            'entry.scheduler_overrides.get("prediction_type", kind)',
            "kind",
            "test_a_whole_network_replaces_the_bases",
        ),
        (
            "checkpoints: a LoRA of another rank is handed on",
            'if weights == "lora" and has != [rank]:',
            "if False:",
            "test_a_recipe_starts_from_one[lora-8-has rank 4]",
        ),
    ),
    *planted(
        "checkpoints/sampling.py",
        "checkpoints/test_sampling.py",
        (
            "checkpoints: DDIM steps to its next time",
            "next=reached if reached >= 0 else",
            "next=at.next if reached >= 0 else",
            "test_an_entry_samples_as_diffusers_does[hyper-sdxl-12step-cfg]",
        ),
        (
            "checkpoints: DDIM's last step always reaches the final state",
            "reached if reached >= 0 else",
            "reached if reached >= 0 and not at.last else",
            "tests/checkpoints/test_strides.py::test_ddim_ends_where_that_of_diffusers_ends[counts0-trailing-0-True]",
        ),
        (
            "checkpoints: DDIM skips a call at index 0",
            "grid = self._part(self._spaced(schedule, self.num_inference_steps), schedule)",
            "grid = super().times(schedule)[:-1]",
            "tests/checkpoints/test_strides.py::test_ddim_ends_where_that_of_diffusers_ends[counts0-leading-0-False]",
        ),
        (
            "checkpoints: TCD ends at clean data by set_alpha_to_one",
            "if cls is StridedDDIM:  #",
            "if cls.diffusers_eta:  #",
            "tests/checkpoints/test_strides.py::test_tcd_ends_at_index_0_whatever_its_config_says",
        ),
        (
            "checkpoints: samplers of published files are a table of their own",
            "(StridedDDIM, *SAMPLERS.values())",
            "(StridedDDIM, *list(SAMPLERS.values())[:10])",
            "tests/export/test_extension.py::test_a_sampler_is_exported_and_has_published_files",
        ),
        (
            "checkpoints: sigmas are not shifted",
            "schedule.shifted(flow_sigmas(entry, config, n), n)",
            "tuple(flow_sigmas(entry, config, n))",
            "test_an_entry_samples_as_diffusers_does[pcm-sd3-4step-shift3]",
        ),
        (
            "checkpoints: Euler starts from unit noise",
            '"unit" if cls is None or entry.flow else cls.diffusers_start',
            '"unit"',
            "test_an_entry_samples_as_diffusers_does[sdxl-turbo]",
        ),
        (
            "checkpoints: DDIM ends at clean data",
            '"clean" if config.get("set_alpha_to_one", True) else "end"',
            '"clean"',
            "test_an_entry_samples_as_diffusers_does[pcm-sdxl-4step-smallcfg]",
        ),
        (
            "checkpoints: the entry's eta is forgotten",
            "(entry.eta or 0.0)",
            "0.0",
            "test_an_entry_samples_as_diffusers_does[hyper-sdxl-unified]",
        ),
        (
            "checkpoints: the entry's timesteps are forgotten",
            "if entry.timesteps is not None and n == len(entry.timesteps):",
            "if False:",
            "test_an_entry_samples_as_diffusers_does[dmd2-sdxl-4step]",
        ),
        (
            "checkpoints: the entry's sigmas are forgotten",
            "own = entry.sigmas\n",
            "own = None\n",
            "test_an_entry_samples_as_diffusers_does[pcm-sd3-4step-shift1]",
        ),
    ),
    *planted(
        "checkpoints/explain.py",
        "checkpoints/test_explain.py",
        (
            "checkpoints: there is no warning of a wrong number of steps",
            "if steps not in entry.steps:",
            "if False:",
            "test_settings_other_than_the_entrys_are_warned_about",
        ),
        (
            "checkpoints: guidance 0 is warned about",
            "max(1.0, guidance_scale) <= high",
            "guidance_scale <= high",
            "test_settings_other_than_the_entrys_are_warned_about",
        ),
        (
            "checkpoints: the code leaves SD3's levels to diffusers",
            "entry.sigmas or (entry.flow and not _passes_sigmas(entry))",
            "entry.sigmas",
            "test_the_code_for_diffusers_does_what_the_entry_holds[hyper-sd3-4step-cfg]",
        ),
        (
            "checkpoints: the code forgets the LoRA scale",
            "if entry.lora_scale != 1 else lines",
            "if False else lines",
            "test_the_code_for_diffusers_does_what_the_entry_holds[hyper-sd3-4step-cfg]",
        ),
    ),
    *planted(
        "checkpoints/registry.json",
        "checkpoints/test_published.py",
        (
            "registry: tcd-sdxl has another eta",
            '"eta": 0.3, "lora_scale": 1.0, "resolution": 1024',
            '"eta": 0.2, "lora_scale": 1.0, "resolution": 1024',
            "test_an_entry_holds_what_was_published[tcd-sdxl]",
        ),
        (
            "registry: dmd2's one step starts at the noisiest time",
            '"timesteps": [399]',
            '"timesteps": [999]',
            "test_an_entry_holds_what_was_published[dmd2-sdxl-1step]",
        ),
        (
            "registry: hyper's LoRA for SD3 is added whole",
            '"guidance_scale": 5.0, "guidance_range": null, "eta": null, "lora_scale": 0.125',
            '"guidance_scale": 5.0, "guidance_range": null, "eta": null, "lora_scale": 1.0',
            "test_an_entry_holds_what_was_published[hyper-sd3-8step-cfg]",
        ),
        (
            "registry: an entry names another entry's file",
            '"file": "Hyper-SDXL-2steps-lora.safetensors"',
            '"file": "Hyper-SDXL-4steps-lora.safetensors"',
            "test_an_entry_holds_what_was_published[hyper-sdxl-2step]",
        ),
        (
            "registry: a licence without commercial use allows it",
            '"licence": "sai-nc-community", "commercial": "no"',
            '"licence": "sai-nc-community", "commercial": "yes"',
            "test_what_the_table_does_not_say_follows_from_it[sdxl-turbo]",
        ),
    ),
    *planted(
        "checkpoints/copies.py",
        "cases/test_teachers.py",
        (
            "checkpoints: a folder's name is enough",
            "return found if found is not None and family_in(path) is family_named(found.family) else None",
            "return found",
            "test_a_folder_that_only_has_the_name_of_one_is_not_one",
        ),
        (
            "checkpoints: copies are known by their own name alone",
            "        yield str(json.loads(",
            "        str(json.loads(",
            "test_a_copy_of_a_published_pipeline_is_that_checkpoint",
        ),
    ),
    *planted(
        "inference/load.py",
        "cases/test_teachers.py",
        (
            "checkpoints: an LCM pipeline is sampled as a teacher",
            "if sampler not in (LCMSampler, TCDSampler) and embedded is None:",
            "if True:",
            "test_an_lcm_pipeline_is_sampled_as_its_own_pipeline_does",
        ),
    ),
]
