"""Planted defects of how LoRA files are read."""

from tests.mutants.mutant import planted

_CASES = "cases/test_lora_files.py"
_UNET = "test_the_change_of_a_unet_is_the_formulas"
_OTHER = "test_the_change_of_other_networks_is_the_formulas"
_REFUSED = "test_a_file_is_refused_whole_in_one_sentence"
_HOSTILE = "tests/checkpoints/test_load.py::test_a_hostile_file_is_one_sentence_and_loads_nothing"

MUTANTS = [
    *planted(
        "models/lora_files/read.py",
        _CASES,
        (
            "styles: their scale is forgotten",
            "layer.add_to(parts[layer.part], scale)",
            "layer.add_to(parts[layer.part], 1.0)",
            "tests/inference/test_use.py::test_style_loras_are_added_at_their_scales[teacher]",
        ),
        (
            "styles: the text encoder's part is lost",
            "for layer in read_layers(parts, path)]",
            "for layer in read_layers(parts, path) if 'text' not in layer.part]",
            "tests/inference/test_use.py::test_style_loras_are_added_at_their_scales[teacher]",
        ),
        (
            "foreign: layers that are not there are ignored",
            "    if wrong:\n",
            "    if False:\n",
            f"{_REFUSED}[another_model: half of it]",
        ),
        (
            "foreign: numbers that are none are loaded",
            "    if not finite:",
            "    if False:",
            f"{_HOSTILE}[not a number]",
        ),
        (
            "foreign: the text encoder's part is dropped",
            "if any(of_words):",
            "if False:",
            f"{_HOSTILE}[text encoder]",
        ),
        (
            "foreign: kohya's alpha is forgotten",
            "layer.scale = checked_scale(float(tensors[own.name].to(torch.float32)) / rank)",
            "layer.scale = 1.0",
            "tests/checkpoints/test_load.py::test_a_lora_of_any_layout_is_read_as_ours[kohya]",
        ),
        (
            "lora files: two layouts in one file are read",
            "if first.layout != key.layout:",
            "if False:",
            f"{_REFUSED}[unknown_layout: mixed layouts]",
        ),
        (
            "lora files: of two tensors of one layer the last counts",
            "if key.kind in layer.keys:",
            "if False:",
            f"{_REFUSED}[unknown_layout: two adapters]",
        ),
        (
            "lora files: a file is added layer by layer while it is checked",
            "        _fill(layer, tensors, path)\n        _fits(layer, parts, path)\n",
            "        _fill(layer, tensors, path)\n        _fits(layer, parts, path)\n"
            "        layer.add_to(parts[layer.part], 1.0)\n",
            f"{_REFUSED}[damage: up alone in the last layer]",
        ),
        (
            "lora files: a single number is a matrix",
            "    if not t.ndim:\n",
            "    if False:\n",
            f"{_REFUSED}[damage: a single number for diff]",
        ),
        (
            "lora files: a DoRA without magnitudes is a LoRA",
            'if settings[layer.part].get("use_dora") and',
            "if False and",
            f"{_REFUSED}[damage: a DoRA without magnitudes]",
        ),
        (
            "lora files: nobody is told of the alpha that some layers lack",
            'if without and any("alpha" in layer.keys for layer in layers):',
            "if False:",
            "test_what_has_no_effect_is_said[an alpha that one layer lacks]",
        ),
        (
            "lora files: a change of a bias that is not there is dropped",
            'if rows is not None and not layer.has(network, "bias"):',
            "if False:",
            f"{_REFUSED}[other_kinds: a bias of what has none]",
        ),
    ),
    *planted(
        "models/lora_files/scale.py",
        _CASES,
        (
            "foreign: an absurd alpha is believed",
            "abs(scale) < _MOST",
            "True",
            f"{_HOSTILE}[absurd rank in the header]",
        ),
        (
            "foreign: alpha in the header is forgotten",
            'return checked_scale(float(alpha) / (math.sqrt(size) if settings.get("use_rslora") else size))',
            "return 1.0",
            "tests/checkpoints/test_load.py::test_a_lora_of_any_layout_is_read_as_ours[peft with alpha in its header]",
        ),
        (
            "lora files: settings of a network's own file are not read",
            'if settings.keys() & {"r", "lora_alpha", "alpha"}:',
            "if False:",
            f"{_UNET}[of_peft: a network's own file]",
        ),
        (
            "lora files: peft's config beside original names is not read",
            "path.with_name(ADAPTER_CONFIG).is_file() or not",
            "not",
            "test_original_names_by_peft_have_the_scale_of_its_config",
        ),
        (
            "lora files: the rank's pattern is not read",
            '_setting(settings, "rank_pattern", layer, settings.get("r"))',
            'settings.get("r")',
            "tests/cases/test_lora_oracles.py::test_a_folder_of_pefts_is_what_peft_merges",
        ),
        (
            "lora files: patterns of many choices are tried",
            "[*+?{(]",
            "[*+{]",
            f"{_REFUSED}[damage: a pattern short]",
        ),
        (
            "lora files: rsLoRA is scaled as LoRA",
            'math.sqrt(size) if settings.get("use_rslora") else size',
            "size",
            f"{_UNET}[of_peft: rsLoRA]",
        ),
        (
            "lora files: a pattern matches whole names alone",
            'rf"(.*\\.)?({pattern})$"',
            'rf"({pattern})$"',
            f"{_UNET}[of_peft: alpha by the end of a name]",
        ),
        (
            "lora files: a pattern matches within a word",
            'rf"(.*\\.)?({pattern})$"',
            'rf".*({pattern})$"',
            f"{_UNET}[of_peft: no end of a name]",
        ),
        (
            "lora files: an initialisation that changes the base is passed over",
            "if isinstance(begun, str) and begun.lower().startswith(_OF_BASE):",
            "if False:",
            f"{_REFUSED}[other_kinds: PiSSA]",
        ),
    ),
    *planted(
        "models/lora_files/formats.py",
        _CASES,
        (
            "lora files: DoRA by columns is taken by rows",
            "_decomposed(weight.float(), found, size, 0 if rows else 1)",
            "_decomposed(weight.float(), found, size, 0)",
            f"{_UNET}[of_lycoris: DoRA by columns]",
        ),
        (
            "lora files: DoRA's norm is of the weight before the change",
            "torch.linalg.vector_norm(merged.transpose(0, axis)",
            "torch.linalg.vector_norm(weight.transpose(0, axis)",
            f"{_UNET}[of_peft: DoRA]",
        ),
        (
            "lora files: a bias is not scaled by alpha",
            'parts = [scale * _float(tensors["bias"])]',
            'parts = [_float(tensors["bias"])]',
            f"{_UNET}[of_peft: a bias]",
        ),
        (
            "lora files: the core tensor of a LoCon is transposed",
            'torch.einsum("rtkl,ti->rikl", mid, down.flatten(1))',
            'torch.einsum("trkl,ti->rikl", mid, down.flatten(1))',
            f"{_UNET}[of_lycoris: CP-LoCon]",
        ),
        (
            "lora files: a LoHa is the sum of its factors",
            '_product(tensors, "hada_w1", "hada_t1") * _product',
            '_product(tensors, "hada_w1", "hada_t1") + _product',
            f"{_UNET}[of_lycoris: LoHa]",
        ),
        (
            "lora files: a LoKr's rank is its first factor's",
            '("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")',
            '("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")',
            f"{_UNET}[of_lycoris: LoKr of two products: the rank of the second]",
        ),
        (
            "lora files: any shape of as many numbers fits",
            "if found.reshape(len(found), -1).shape != weight.reshape(len(weight), -1).shape:",
            "if found.numel() != weight.numel():",
            f"{_REFUSED}[another_model: rows and columns exchanged]",
        ),
    ),
    *planted(
        "models/lora_files/layer.py",
        _CASES,
        (
            "lora files: pairs have the shapes of the file",
            "down = pair[0].reshape(-1, *inputs)",
            "down = pair[0]",
            "tests/cases/test_lora_use.py::test_pairs_have_the_shapes_of_the_layers_that_they_adapt",
        ),
        (
            "lora files: shift and scale of the last modulation are not exchanged",
            "torch.cat(rows.chunk(2)[::-1]) if self.place.swapped else rows",
            "rows",
            f"{_OTHER}[flux: the last modulation]",
        ),
        (
            "lora files: the rows of a fused layer are shared out equally",
            "pieces = self._ordered(found).split([len(w) for w in weights])",
            "pieces = self._ordered(found).chunk(len(weights))",
            f"{_OTHER}[flux: linear1 of a single block]",
        ),
    ),
    *planted(
        "models/lora_files/original.py",
        "cases/test_lora_oracles.py",
        (
            "lora files: SD3's last block of text is as the others",
            'last = bool(getattr(block, "context_pre_only", False))',
            "last = False",
            "test_original_names_are_those_of_diffusers_converters[sd3]",
        ),
        (
            "lora files: the middle block's attention is its last resnet",
            'place = 2 * int(number) + (kind == "attentions")',
            "place = 2 * int(number)",
            "test_original_names_are_those_of_diffusers_converters[sd15]",
        ),
    ),
    *planted(
        "models/lora_files/keys.py",
        _CASES,
        (
            "lora files: T5 is kohya's third text encoder alone",
            '("lora_te3_", (_THIRD, _T5))',
            '("lora_te3_", (_THIRD,))',
            f"{_OTHER}[flux: T5 as lora_te3_]",
        ),
    ),
    *planted(
        "inference/load.py",
        "cases/test_lora_use.py",
        (
            "lora files: one without a card is sampled with guidance",
            'replace(TEACHER, sampler=""), 1.0, base=base)',
            'replace(TEACHER, sampler=""), 3.0, base=base)',
            "test_a_few_step_lora_of_ones_own_is_sampled",
        ),
    ),
    *planted(
        "inference/model.py",
        "cases/test_lora_use.py",
        (
            "lora files: one without a card has fifty steps",
            "any(options.get(option) is not None for option in counts)",
            "True",
            "test_a_few_step_lora_of_ones_own_is_sampled",
        ),
    ),
    *planted(
        "checkpoints/load.py",
        "cases/test_lora_use.py",
        (
            "lora files: full weights begin without the DoRA that they start from",
            "add_loras({**family.lora_parts, family.part: network}, [(path, scale)])",
            "pass",
            "test_full_weights_start_from_a_lora_of_any_form",
        ),
        (
            "lora files: a LoRA of several ranks starts one of another",
            'if weights == "lora" and len(has) > 1:',
            "if False:",
            "test_a_lora_starts_no_lora_that_it_is_not[ranks.safetensors-has the ranks 4, 8]",
        ),
    ),
    *planted(
        "models/families/load.py",
        "cases/test_lora_use.py",
        (
            "lora files: the model is loaded before a wrong file is seen",
            "            check_lora(lora)\n",
            "            pass\n",
            "test_a_wrong_file_is_refused_before_any_model_is_loaded",
        ),
    ),
]
