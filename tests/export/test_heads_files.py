"""Files with a last layer for each step, on a network in memory: the layout as published, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fewstep.export.heads import refuse_bank, write_heads
from fewstep.export.publish import export
from fewstep.models.families import as_teacher
from fewstep.models.lora_files import add_heads_file, add_loras
from fewstep.models.lora_files.heads import _by_step
from fewstep.sampling import make_sampler, sample
from fewstep.students.card import Card, load_card
from fewstep.students.lineage import open_teacher
from tests.models.pipelines import build

LEVELS = (1.0, 0.9169867038726807, 0.7861579060554504, 0.5494909882545471, 0.0)
"""Those of the published Qwen-Image-2.1 file, in full."""
RANK = 4


@pytest.fixture(scope="module")
def teacher():
    return as_teacher(build("qwen_image21"))


@pytest.fixture(scope="module")
def published(teacher):
    """(tensors as the published file has them, the LoRA's products by layer): bare names, bfloat16, whole norms."""
    base, draw = teacher.family.base, torch.Generator().manual_seed(3)
    tensors, products = {}, {}
    for name, layer in base.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "proj_out":
            down = (0.2 * torch.randn(RANK, layer.in_features, generator=draw)).bfloat16()
            up = (0.1 * torch.randn(layer.out_features, RANK, generator=draw)).bfloat16()
            tensors |= {f"{name}.lora_down": down, f"{name}.lora_up": up}
            products[f"{name}.weight"] = up.float() @ down.float()
    for name, weight in base.named_parameters():
        if "norm_q" in name or "norm_k" in name or name == "txt_in.text_norm.weight":
            tensors[name] = (weight.detach() + 0.2 * torch.randn(weight.shape, generator=draw)).bfloat16()
    own = base.proj_out.weight.detach()
    tensors["proj_out.weight"] = (own + 0.1 * torch.randn(4, *own.shape, generator=draw)).bfloat16()
    return tensors, products


@pytest.fixture
def read(teacher, tmp_path):
    """Reads tensors as a file on a network of its own: (student, network)."""

    def read(tensors, config=None, header=None, times=LEVELS):
        denoiser, file = copy.deepcopy(teacher.denoiser), tmp_path / "file.safetensors"
        save_file({name: t.clone().contiguous() for name, t in tensors.items()}, file, header)
        beside = tmp_path / "pdd_config.json"
        beside.unlink(missing_ok=True)
        if config is not None:
            beside.write_text(config if isinstance(config, str) else json.dumps(config))
        network = denoiser.network.transformer
        before = {name: p.clone() for name, p in network.named_parameters()}
        try:
            return add_heads_file({"transformer": network}, denoiser, file, times), network
        except ValueError:
            assert all(torch.equal(before[name], p) for name, p in network.named_parameters())
            raise

    return read


@torch.no_grad()
def by_hand(teacher, tensors, products, scale):
    """Euler's steps of diffusers' network, its weights put there one by one."""
    denoiser = copy.deepcopy(teacher.denoiser)
    network = denoiser.network.transformer
    weights = dict(network.named_parameters())
    for name, product in products.items():
        weights[name] += scale * product
    for name, t in tensors.items():
        if name in weights and name != "proj_out.weight":
            weights[name].copy_(t)
    cond, x = teacher.encode_prompts(["a red circle"]), start(teacher)
    for i, (t, s) in enumerate(pairwise(LEVELS)):
        network.proj_out.weight.copy_(tensors["proj_out.weight"][i])
        x = x + (s - t) * denoiser.network(x, torch.tensor([t]), cond)
    return x


def start(teacher):
    return torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))


def sampled(teacher, student, times=LEVELS):
    sampler = make_sampler("euler", timesteps=times[:-1])
    return sample(student, sampler, start(teacher), teacher.encode_prompts(["a red circle"])).x0


def gap(one, other):
    return float((one - other).abs().max() / other.abs().max())


def test_the_published_layout_is_what_its_config_says(teacher, published, read):
    """Bare names, and the LoRA's alpha in pdd_config.json alone, or in the header."""
    tensors, products = published
    config = {"pdd_num_steps": 4, "pdd_block_size": 1, "pdd_sigmas": LEVELS, "lora_rank": RANK, "lora_alpha": 2 * RANK}
    wanted, plain = by_hand(teacher, tensors, products, 2.0), by_hand(teacher, tensors, products, 1.0)
    assert gap(plain, wanted) > 0.05
    header = {key: json.dumps(value) for key, value in config.items()}
    flat = {**tensors, "proj_out.weight": tensors["proj_out.weight"].flatten(0, 1)}
    assert gap(sampled(teacher, read(tensors, config)[0]), wanted) <= 1e-6
    assert gap(sampled(teacher, read(flat, None, header)[0]), wanted) <= 1e-6
    assert gap(sampled(teacher, read(tensors)[0]), plain) <= 1e-6


@pytest.mark.parametrize("name", ["transformer.{}", "model.diffusion_model.{}", "lora_unet__{}"])
def test_names_begin_as_those_of_any_lora(teacher, published, read, name):
    tensors = {name.format(key): t for key, t in published[0].items()}
    student, network = read(tensors)
    assert torch.equal(network.txt_in.text_norm.weight, published[0]["txt_in.text_norm.weight"].float())
    bank = student.network.bank
    assert torch.allclose(bank.weight + network.proj_out.weight, published[0]["proj_out.weight"].float(), atol=1e-6)


def refusals(tensors):
    heads, norm = tensors["proj_out.weight"], "txt_in.text_norm.weight"
    nan, whole = tensors[norm] * math.nan, {key: t for key, t in tensors.items() if key != "proj_out.weight"}
    to_q, inputs = "transformer_blocks.0.attn.to_q", heads.shape[-1]
    yield (
        {**tensors, "proj_out.weight": heads.movedim(0, 1).flatten(1)},
        {},
        "does not hold 4 last layers: proj_out.weight has",
    )
    yield {**tensors, "proj_out.weight": heads.to(torch.int8)}, {}, "proj_out.weight holds int8, where real numbers"
    yield {**tensors, "proj_out.weight": heads * math.inf}, {}, "is damaged: proj_out.weight is not finite"
    yield {**tensors, norm: tensors[norm].int()}, {}, "text_norm.weight holds int32, where real numbers should be"
    yield {**tensors, norm: nan}, {}, "is damaged: txt_in.text_norm.weight is not finite"
    twice = {**tensors, "proj_out.set_weight": heads.flatten(0, 1)}
    yield twice, {}, "holds proj_out.weight twice: proj_out.set_weight and proj_out.weight"
    last = {"proj_out.lora_down": torch.ones(2, inputs), "proj_out.lora_up": torch.ones(heads.shape[1], 2)}
    yield {**tensors, **last}, {}, r"holds proj_out twice, whole and as a LoRA \(proj_out.lora_down\)"
    yield (
        {**tensors, f"{to_q}.weight": torch.ones(32, 32)},
        {},
        "holds .*to_q twice, whole and as",
    )
    yield whole, {}, r"holds no last layer for each step: proj_out\.weight is not in it"
    yield {**tensors, "blocks.7.other.weight": nan}, {}, "has no blocks.7.other.weight"
    yield {**tensors, "txt_in.text_norm.scale": nan}, {}, "text_norm.scale"
    ending = {key.replace("lora_down", "lora_down.default.weight"): t for key, t in tensors.items()}
    yield ending, {}, "has a layout that is not known here: it holds .*lora_down.default.weight"
    other = [1.0, 0.9, 0.8, 0.5, 0.0]
    yield tensors, {"config": {"pdd_sigmas": other}}, "for the levels 1, 0.9, 0.8, 0.5, 0, not 1, 0.916987, 0.786158"
    yield tensors, {"config": {"pdd_sigmas": other[:4]}}, "are for the levels 1, 0.9, 0.8, 0.5, not 1"
    for damaged in ("[1, 2]", "{", '{"lora_alpha": "many"}', '{"pdd_sigmas": {"a": 1}}'):
        yield (
            tensors,
            {"config": damaged},
            r"The settings of .*, in its header or in pdd_config\.json.*, are damaged",
        )
    yield tensors, {"config": {"lora_alpha": math.nan}}, "its alpha is absurd"
    yield tensors, {"times": (0.5, 1.0, 0.4, 0.3, 0.0)}, "must decrease, not 0.5, 1, 0.4, 0.3, 0"


def test_what_does_not_fit_is_refused_and_nothing_is_added(published, read):
    for tensors, how, why in refusals(published[0]):
        with pytest.raises(ValueError, match=why):
            read(tensors, **how)


def test_last_layers_stand_step_by_step():
    """A layer of 6 x 5, four times: one after the other, or their rows; in any other order they would be scrambled."""
    own, layers = torch.zeros(6, 5), torch.arange(120.0).reshape(4, 6, 5)
    for stacked in (layers, layers.reshape(24, 5)):
        assert torch.equal(_by_step(stacked, own, 4, "file", "proj_out.weight"), layers)
    for other in (layers.transpose(0, 1), layers.transpose(0, 1).reshape(6, 20), layers[:3], layers.reshape(8, 3, 5)):
        with pytest.raises(ValueError, match="The file file does not hold 4 last layers"):
            _by_step(other, own, 4, "file", "proj_out.weight")


def test_such_a_file_is_no_style_lora(teacher, published, tmp_path):
    """The sentence says what can be done with it."""
    file = tmp_path / "file.safetensors"
    for tensors in (published[0], {f"transformer.{key}": t for key, t in published[0].items()}):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=r"holds a last layer for each step \(.*proj_out\.weight\).*: sample it"):
            add_loras({"transformer": teacher.family.base}, [(file, 1.0)])


def test_a_damaged_card_of_last_layers_is_one_sentence(tmp_path):
    for bank, steps, why in [
        ([1.0, 0.5, 0.0], [], "bank_steps must divide"),
        ([], [2], "bank_steps must divide"),
        ([1.0, 0.5, 0.0], [3], "bank_steps must divide"),
        ([1.0, 1.0, 0.0], [2], "bank must be decreasing times"),
        ([1.0, math.nan, 0.0], [2], "bank must be decreasing times"),
        ([math.inf, 0.5, 0.0], [2], "bank must be decreasing times"),
    ]:
        Card("pdd", "ddim", 2, "lora", "", bank=tuple(bank), bank_steps=tuple(steps)).save(tmp_path)
        with pytest.raises(ValueError, match=rf"few_step\.json is missing or damaged \({why}"):
            load_card(tmp_path)


@pytest.mark.parametrize(
    ("to", "told", "holds"),
    [("lora", True, "the target times"), ("diffusers", True, "the target times"), ("heads", False, "the last layers")],
)
def test_an_export_is_no_run_and_such_a_one_no_teacher(tmp_path, to, told, holds):
    card = Card(
        "pdd", "ddim", 2, "lora", "", rank=3, bank=() if told else (1.0, 0.5, 0.0), bank_steps=(2,) * (not told)
    )
    card = replace(card, extra_inputs=("end",), target_times=((1.0, 0.5), (0.5, 0.0))) if told else card
    card.save(tmp_path, export=to, base="scenes-64")
    save_file({"a": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    if to == "diffusers":
        (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="is an export: name the run that it was made from"):
        export(tmp_path, "lora", tmp_path / "out")
    with pytest.raises(ValueError, match=f"hold {holds} of its own steps, so it cannot be a teacher: take a model"):
        open_teacher(str(tmp_path))


def test_forms_are_advised_that_are_not_refused():
    """Heads are a LoRA's, and a LoRA is no form of full weights."""
    card = Card("pdd", "ddim", 2, "full", "", bank=(1.0, 0.5, 0.0), bank_steps=(2,))
    for weights, bank, to, end in [
        ("full", True, "merged", "sample it with fewstep sample."),
        ("lora", True, "merged", "or export a transformer's --to heads, one file for fewstep.load."),
        ("full", False, "heads", "for all steps: export --to merged or diffusers."),
        ("lora", False, "heads", "for all steps: export --to lora, merged or diffusers."),
    ]:
        one = replace(card, weights=weights, **({} if bank else {"bank": (), "bank_steps": ()}))
        with pytest.raises(ValueError) as caught:
            refuse_bank(one, to)
        assert str(caught.value).endswith(end)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_file_is_written_in_the_published_layout(teacher, read, tmp_path, steps):
    """The layers of a step weigh by the lengths of their intervals, here by hand; other programs find the levels."""
    base, draw = teacher.family.base, torch.Generator().manual_seed(2)
    bank = (1.0, 0.95, 0.8, 0.3, 0.0)
    card = Card("pdd", "ddim", steps, "lora", "", rank=3, prediction_type="flow", bank=bank, bank_steps=(2, 4))
    own, layer = base.proj_out.weight, base.transformer_blocks[0].attn.to_q
    tensors = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.randn(3, layer.in_features, generator=draw),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.randn(layer.out_features, 3, generator=draw),
        "bank.weight": torch.randn(4, *own.shape, generator=draw),
    }
    file = write_heads(tmp_path, teacher, card, tensors, {"format": "pt"}, torch.float32)
    held = load_file(file)
    down, up = (f"transformer_blocks.0.attn.to_q.{name}" for name in ("lora_down", "lora_up"))
    assert held.keys() == {down, up, "proj_out.weight"}
    own, each = own.detach(), tensors["bank.weight"]
    first, second = own + (0.05 * each[0] + 0.15 * each[1]) / 0.2, own + (0.5 * each[2] + 0.3 * each[3]) / 0.8
    wanted = torch.stack([first, second]) if steps == 2 else own + each
    assert torch.allclose(held["proj_out.weight"], wanted, atol=1e-5)
    levels = [1.0, 0.8, 0.0] if steps == 2 else list(bank)
    config = json.loads((tmp_path / "pdd_config.json").read_text())
    assert config == {
        "pdd_num_steps": steps, "pdd_block_size": 1, "pdd_sigmas": levels, "lora_rank": 3, "lora_alpha": 3.0,
        "lora_targets": "transformer_blocks.0.attn.to_q",
    }  # fmt: skip
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    assert {key: json.loads(said[key]) for key in config if key != "lora_targets"} == {
        key: value for key, value in config.items() if key != "lora_targets"
    }
    student, network = read(held, config, said, levels)
    assert torch.allclose(network.transformer_blocks[0].attn.to_q.weight, layer.weight + held[up] @ held[down])
    assert torch.allclose(student.network.bank.weight + own, wanted, atol=1e-5)
