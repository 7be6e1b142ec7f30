"""Planted defects of the families of pipelines."""

from tests.mutants.mutant import planted

MUTANTS = [
    *planted(
        "models/families/latents.py",
        "models/test_families.py",
        (
            "families: the posterior's deviation is not scaled",
            "self.from_encoder(std) * factor",
            "self.from_encoder(std)",
            "test_latents_are_shifted_and_scaled_and_back",
        ),
        (
            "families: latents are shifted the wrong way",
            "(self.from_encoder(mean) - shift) * factor",
            "(self.from_encoder(mean) + shift) * factor",
            "test_latents_are_shifted_and_scaled_and_back",
        ),
        (
            "families: latents are shifted before they are scaled back",
            "/ factor + shift",
            "+ shift / factor",
            "test_latents_are_shifted_and_scaled_and_back",
        ),
        (
            "families: images for losses forget the latents' scale",
            "self.to_decoder(latents / factor + shift)",
            "self.to_decoder(latents)",
            "tests/models/test_helpers.py::test_pictures_are_what_the_autoencoder_makes_of_unscaled_latents",
        ),
    ),
    *planted(
        "models/families/teacher.py",
        "models/test_families.py",
        (
            "teacher: of several text encoders one is let go",
            "for name in self.family.text_parts:",
            "for name in self.family.text_parts[:1]:",
            "tests/data/test_cache.py::test_text_encoders_are_let_go_and_what_was_asked_for_is_kept[sdxl]",
        ),
        (
            "teacher: what will be asked later is forgotten",
            "self._known[tuple(prompts)] = self.encode_prompts(prompts)",
            "self.encode_prompts(prompts)",
            "tests/data/test_cache.py::test_text_encoders_are_let_go_and_what_was_asked_for_is_kept[sdxl]",
        ),
    ),
    *planted(
        "models/families/network.py",
        "models/test_teachers.py",
        (
            "families: FLUX: it gets no guidance scale of its own",
            "torch.full_like(t, self.guidance_embed)",
            "torch.full_like(t, 1.0)",
            "test_the_network_is_called_as_its_pipeline_calls_it[flux]",
        ),
        (
            "features: the UNet's decoder runs for nothing",
            "                leave()\n",
            "                pass\n",
            "tests/models/test_features.py::test_nothing_after_the_last_tap_is_run",
        ),
        (
            "features: the blocks are watched for ever",
            ("        for handle in handles:\n            handle.remove()"),
            "        pass",
            "tests/models/test_features.py::test_nothing_after_the_last_tap_is_run",
        ),
        (
            "features: they carry no gradient to the image",
            "found[tap] = output[place] if isinstance(output, tuple) else output",
            "found[tap] = (output[place] if isinstance(output, tuple) else output).detach()",
            "tests/models/test_features.py::test_the_gradient_reaches_the_student_through_the_frozen_teacher",
        ),
        (
            "features: a transformer's maps are turned",
            "(height, width)) for tokens in of_image]",
            "(width, height)).transpose(2, 3) for tokens in of_image]",
            "test_features_are_the_blocks_tokens_as_maps",
        ),
        (
            "features: all of a transformer's blocks run",
            "setattr(transformer, stack, blocks[:count])",
            "setattr(transformer, stack, blocks[: count + 1])",
            "test_features_are_the_blocks_tokens_as_maps",
        ),
        (
            "features: a transformer stays cut",
            "                setattr(transformer, stack, blocks)\n",
            "                pass\n",
            "test_features_are_the_blocks_tokens_as_maps",
        ),
        (
            "families: a transformer ignores its extra input",
            "(args[0] + extra.to(args[0].dtype), *args[1:])",
            "args",
            "test_extra_inputs_start_at_zero_and_change_the_output",
        ),
    ),
    *planted(
        "models/families/unet.py",
        "models/test_teachers.py",
        (
            "families: a UNet's decoder stays",
            "        unet.up_blocks = nn.ModuleList()\n",
            "",
            "tests/runs/test_distill_lightning.py::test_a_discriminator_has_no_decoder",
        ),
        (
            "features: taps come in the network's order, not as asked",
            "return [found[tap] for tap in wanted]",
            "return list(found.values())",
            "tests/models/test_features.py::test_a_unets_features_are_its_blocks_outputs",
        ),
        (
            "families: SDXL is conditioned on another size",
            "torch.tensor([[*sides, 0, 0, *sides]])",
            "torch.tensor([[*sides, 0, 0, 2 * sides[0], sides[1]]])",
            "test_the_network_is_called_as_its_pipeline_calls_it[sdxl]",
        ),
        (
            "families: SDXL's null is the empty prompt whatever its config says",
            (
                '        _, embeds, _, pooled = self.pipeline.encode_prompt("", device=self.device(), do_classifi'
                "er_free_guidance=True)\n"
                '        return {"prompt_embeds": embeds, "pooled_embeds": pooled}'
            ),
            '        return self.encode([""])',
            "test_no_prompt_is_zeros_for_sdxl_unless_its_config_says_the_empty_prompt",
        ),
        (
            "families: a refiner passes for a base model",
            "encoder.config.projection_dim != self._pooled()",
            "encoder.config.projection_dim < 0",
            "test_foreign_pipelines_are_refused",
        ),
    ),
    *planted(
        "models/families/family.py",
        "models/test_teachers.py",
        (
            "families: a zeroed terminal and v-prediction are taken for epsilon",
            'str(self._scheduler().get("prediction_type", "epsilon"))',
            '"epsilon"',
            "test_an_image_is_the_pipelines_own[sd2v]",
        ),
        (
            "families: the shift of FLUX forgets the picture's size",
            "self.shift(config, self.tokens, self.settings)",
            "self.shift(config, 4096, self.settings)",
            "test_a_shift_that_depends_on_the_size_is_the_schedulers",
        ),
        (
            "families: a bucket's size is no condition",
            "size or (side * self.down for side in self.latent_shape[-2:])",
            "(side * self.down for side in self.latent_shape[-2:])",
            "tests/data/test_cache.py::test_buckets_have_their_own_shapes_and_the_network_is_told_them[sdxl]",
        ),
        (
            "families: the size is a condition with a prompt only",
            "null=None if null is None else null | sizes)",
            "null=None if null is None else null | {k: 0 * t for k, t in sizes.items()})",
            "test_conditions_on_the_size_stay_when_the_prompt_is_dropped",
        ),
        (
            "families: any size passes",
            "if size is not None and (size < step or size % step):",
            "if size is not None and size < step:",
            "test_a_size_that_does_not_fit_is_refused",
        ),
        (
            "checkpoints: FLUX's tokens are too many",
            "pixels_per_token: ClassVar[int] = 16 * 16",
            "pixels_per_token: ClassVar[int] = 8 * 8",
            "tests/checkpoints/test_sampling.py::test_an_entry_samples_as_diffusers_does[hyper-flux-8step]",
        ),
    ),
    *planted(
        "models/families/packed.py",
        "models/test_teachers.py",
        (
            "families: FLUX: rows and columns change places",
            "torch.stack([torch.zeros_like(rows), rows, columns], dim=1)",
            "torch.stack([torch.zeros_like(rows), columns, rows], dim=1)",
            "test_packing_is_that_of_diffusers",
        ),
        (
            "families: FLUX: fresh noise has the layout of latents",
            "unpack(noise.reshape(len(noise), height * width, -1), height, width, self.patch_size)",
            "noise",
            "tests/export/test_families.py::test_lcm_on_a_flow_model[flux]",
        ),
    ),
    *planted(
        "models/families/sd3.py",
        "models/test_teachers.py",
        (
            "families: SD3: features are the text's",
            "    place = 1\n",
            "    place = 0\n",
            "test_features_are_the_blocks_tokens_as_maps",
        ),
        (
            "families: SD3: its times are not scaled",
            "timestep=t * self.time_scale",
            "timestep=t",
            "test_the_network_is_called_as_its_pipeline_calls_it[sd3]",
        ),
        (
            "families: SD3: a LoRA leaves the modulations out",
            '"linear", "linear_1"',
            '"linear_1"',
            "tests/planning/test_estimate.py::test_transformers_have_every_linear_layer_adapted",
        ),
    ),
    *planted(
        "models/families/pixart.py",
        "models/test_teachers.py",
        (
            "families: PixArt: padding is read as words",
            'encoder_attention_mask=cond["prompt_mask"]',
            "encoder_attention_mask=None",
            "test_the_network_is_called_as_its_pipeline_calls_it[pixart]",
        ),
        (
            "families: PixArt: the variance passes for the noise",
            "[:, : x.shape[1]]",
            "[:, x.shape[1] :]",
            "test_an_image_is_the_pipelines_own[pixart]",
        ),
    ),
    *planted(
        "models/families/registry.py",
        "export/test_extension.py",
        (
            "families: where a pipeline keeps its network is a table of its own",
            "return tuple(dict.fromkeys(cls.part for cls in FAMILIES))",
            'return ("unet", "transformer")',
            "test_a_family_is_planned_trained_and_sampled",
        ),
        (
            "families: the folder of a network alone is of the first families only",
            "if cls.network_class == type(network).__name__",
            "if cls.network_class == type(network).__name__ != 'NovelNetwork'",
            "test_a_family_is_planned_trained_and_sampled",
        ),
        (
            "families: licences are those of the first families",
            "for cls in FAMILIES if base in cls.licences",
            "for cls in FAMILIES[:5] if base in cls.licences",
            "test_a_family_is_exported",
        ),
    ),
    *planted(
        "models/families/teacher.py",
        "cases/test_teachers.py",
        (
            "families: a float16 autoencoder overflows",
            'if vae is not None and vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):',
            "if vae is None:",
            "test_an_autoencoder_that_says_force_upcast_runs_in_float32_as_in_diffusers",
        ),
        (
            "families: a white image hides infinite pixels",
            '                self._check_finite(pixels, "The autoencoder\'s images")\n',
            "",
            "test_what_is_not_finite_is_an_error_before_it_is_an_image",
        ),
        (
            "families: latents of NaN are decoded",
            '        self._check_finite(latents, "The latents")\n',
            "",
            "test_what_is_not_finite_is_an_error_before_it_is_an_image",
        ),
        (
            "families: data of NaN are learned",
            '        self._check_finite(mean + std, "The autoencoder\'s latents of these images")\n',
            "",
            "test_what_is_not_finite_is_an_error_before_it_is_an_image",
        ),
    ),
    *planted(
        "models/families/unet.py",
        "cases/test_teachers.py",
        (
            "families: the embedded guidance scale counts from zero",
            "sinusoid(1000 * (w - 1),",
            "sinusoid(1000 * w,",
            "test_an_lcm_pipeline_teaches_with_its_guidance_scale",
        ),
        (
            "families: the embedded scale is not the pipeline's own",
            'return float(parameters["guidance_scale"].default) if',
            "return 7.5 if",
            "test_an_lcm_pipeline_teaches_with_its_guidance_scale",
        ),
        (
            "families: a student's inputs are lost beside the guidance scale",
            "with added_to_time(self.time_embedder, extra):",
            "with added_to_time(self.time_embedder, None):",
            "test_an_lcm_pipeline_teaches_with_its_guidance_scale",
        ),
        (
            "families: every unet has a middle block",
            '{"mid": int(widths[-1])} if self.unet.mid_block is not None else {}',
            '{"mid": int(widths[-1])}',
            "test_a_unet_without_a_middle_block_has_features_for_discriminators",
        ),
        (
            "families: channels have no statistics",
            "return factor / std, mean",
            "return factor, shift",
            "test_channels_with_statistics_of_their_own_are_followed_as_in_diffusers",
        ),
    ),
    *planted(
        "models/families/folder.py",
        "cases/test_teachers.py",
        (
            "families: missing weights are random",
            'refuse_missing(f"The weights in {folder}", report["missing_keys"])',
            "pass",
            "test_weights_that_a_folder_lacks_are_never_random",
        ),
        (
            "families: variants are not read",
            "variant=variant or None",
            "variant=None",
            "test_a_folder_with_one_variant_alone_is_read",
        ),
        (
            "families: a variant is taken before plain weights",
            'for name in ("", "fp32", "fp16", "bf16")',
            'for name in ("fp16", "fp32", "", "bf16")',
            "test_a_folder_with_one_variant_alone_is_read",
        ),
        (
            "families: words without merges are a vocabulary",
            '("vocab.json", "merges.txt")',
            '("vocab.json",)',
            "test_a_tokenizer_without_its_words_is_refused",
        ),
        (
            "families: a part that is left out must be there",
            "absent = {part for part, (_, kind) in listed.items() if kind is None}",
            "absent: set[str] = set()",
            "test_sd3_without_t5_is_encoded_as_diffusers_encodes_it",
        ),
    ),
    *planted(
        "models/families/single_file.py",
        "cases/test_teachers.py",
        (
            "families: a file's v_pred is ignored",
            'found["prediction_type"] = "v_prediction"',
            'found["prediction_type"] = "epsilon"',
            "test_a_file_that_says_v_prediction_is_the_folder_that_says_so",
        ),
        (
            "families: a file's ztsnr is ignored",
            'found["rescale_betas_zero_snr"] = True',
            'found["rescale_betas_zero_snr"] = False',
            "test_a_file_that_says_v_prediction_is_the_folder_that_says_so",
        ),
        (
            "families: an EDM network is read as another",
            "if edm is not None:",
            "if False:",
            "test_markers_that_cannot_be_followed_are_refused",
        ),
        (
            "families: what a file lacks is left empty",
            'refuse_missing(f"The file {path} is not whole: its',
            'print(f"The file {path} is not whole: its',
            "test_files_that_lack_layers_or_are_for_another_model_are_refused",
        ),
    ),
    *planted(
        "models/families/wrong_base.py",
        "cases/test_teachers.py",
        (
            "families: prompts of another width are put on any base",
            "other = None not in (width, wide) and width != wide",
            "other = False",
            "test_models_are_called_by_the_width_of_their_prompts",
        ),
        (
            "families: a transformer's LoRA is put on a UNet",
            "wrong = bool(mine) and theirs not in mine",
            "wrong = False",
            "test_a_wrong_base_is_named_before_it_is_loaded",
        ),
    ),
    *planted(
        "models/families/wrong_base.py",
        "models/test_wrong_base.py",
        (
            "families: a LoRA of FLUX.2 is refused on its own base",
            "((Flux2, Klein), (",
            "((Flux,), (",
            "test_a_lora_fits_its_own_base",
        ),
        (
            "families: names that Qwen-Image shares with SD3 are SD3's alone",
            "((StableDiffusion3, QwenImage, *_OF_FLUX), (",
            "((StableDiffusion3,), (",
            "test_a_lora_fits_its_own_base",
        ),
    ),
    *planted(
        "models/families/latents.py",
        "cases/test_teachers.py",
        (
            "families: an autoencoder without a posterior has a random one",
            "torch.zeros_like(mean)",
            "torch.ones_like(mean)",
            "test_a_tiny_autoencoder_encodes_and_decodes",
        ),
    ),
]
