"""LoRA files where people give them: `--lora`, `teacher.loras`, `init:`, and by themselves with a base."""

from __future__ import annotations

import copy
import json
import shutil
import warnings

import pytest
import torch

import fewstep
from fewstep.models.families import load_teacher
from fewstep.models.lora_files import add_loras, lora_file, read_lora
from fewstep.recipe.load import parse_recipe
from fewstep.runs.setup import setup
from tests.cases.lora_inputs import CONV, Q, copied, decomposed, kohya, pair, write
from tests.checkpoints.tiny import added, lora_of, peft
from tests.command_line import inside

WORDS = ["a red star"]


@pytest.fixture(scope="module")
def teacher(tiny):
    return load_teacher(str(tiny))


@pytest.fixture(scope="module")
def lora(teacher):
    return lora_of(teacher.pipeline.unet)


@pytest.fixture(scope="module")
def files(teacher, lora, tmp_path_factory):
    """A plain LoRA of all layers of a student, the same in peft's own folder, a DoRA of it, and one of two ranks."""
    folder, tensors = tmp_path_factory.mktemp("files"), peft(lora)
    write(folder / "plain.safetensors", tensors)
    sizes = {name: 1.5 * teacher.pipeline.unet.get_submodule(name).weight.flatten(1).norm(dim=1) for name in lora}
    write(folder / "dora.safetensors", {
        **tensors, **{f"unet.{name}.lora_magnitude_vector": size for name, size in sizes.items()}})  # fmt: skip
    first, one = min(lora), lora[min(lora)]
    write(folder / "ranks.safetensors", {**tensors, f"unet.{first}.lora_A.weight": torch.cat([one[0], one[0]]),
                                         f"unet.{first}.lora_B.weight": torch.cat([one[1], 0 * one[1]], 1)
                                         })  # fmt: skip
    own = folder / "own"
    own.mkdir()
    write(
        own / "adapter_model.safetensors", {k.replace("unet.", "base_model.model.", 1): t for k, t in tensors.items()}
    )
    (own / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True}))
    return folder


def gaps(network, wanted):
    return max((p - wanted[name]).abs().max().item() for name, p in network.named_parameters())


@pytest.mark.parametrize(
    "name, scale",
    [("plain.safetensors", 1), ("own", 4), pytest.param("own/adapter_model.safetensors", 4, marks=pytest.mark.slow)],
)
def test_both_doors_open_the_same_files(name, scale, tiny, teacher, lora, files):
    """peft's alpha of 8 at rank 4, stabilised, is a scale of 8 / 2."""
    wanted = added(teacher.pipeline.unet, lora, scale)
    for made in (
        fewstep.load(str(tiny), loras=[files / name]).teacher,
        load_teacher(str(tiny), loras=[str(files / name)]),
    ):
        assert gaps(made.pipeline.unet, wanted) <= 1e-5


def test_a_teachers_name_may_hold_a_folder(tiny, teacher, lora, files):
    made = load_teacher(f"{tiny}+{files / 'own'}")
    assert gaps(made.pipeline.unet, added(teacher.pipeline.unet, lora, 4)) <= 1e-5


def test_a_teachers_lora_of_another_model_names_a_layer(tiny, lora, tmp_path):
    path = write(tmp_path / "x.safetensors", {k.replace("mid_block", "mid_block_7"): t for k, t in peft(lora).items()})
    with pytest.raises(ValueError, match=r"The teacher's LoRA '.*' cannot be loaded: .*of another model.*mid_block_7"):
        load_teacher(str(tiny), loras=[str(path)])


def test_the_command_line_says_what_has_no_effect(tiny, lora, tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "x.safetensors", {**peft(lora), "bundle_emb.mytoken.clip_l": torch.ones(1, 16)})
    code, _, err = inside(monkeypatch, capsys, tmp_path, "sample", tiny, "--lora", file, "--steps", 1)
    assert code == 0 and err == f"Note: The embeddings in {file} (mytoken) are left out: only its LoRA is used.\n"


def test_of_several_files_none_is_added_where_one_is_refused(teacher, lora, files, tmp_path):
    network = copy.deepcopy(teacher.pipeline.unet)
    path = write(tmp_path / "x.safetensors", {"nothing": torch.ones(1)})
    with pytest.raises(ValueError, match="holds no LoRA"):
        add_loras({**teacher.family.lora_parts, "unet": network}, [(files / "plain.safetensors", 1.0), (path, 1.0)])
    assert gaps(network, teacher.pipeline.unet.state_dict()) == 0


def test_a_wrong_file_is_refused_before_any_model_is_loaded(tiny, tmp_path, monkeypatch):
    from fewstep.models.families import load

    path = write(tmp_path / "x.safetensors", {"emb_params": torch.ones(1)})
    monkeypatch.setattr(load, "load_folder", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="holds a textual inversion"):
        fewstep.load(str(tiny), loras=[path])
    with pytest.raises(
        ValueError, match=r"The teacher's LoRA .* cannot be loaded: The file .* holds a textual inversion"
    ):
        load_teacher(str(tiny), loras=[str(path)])


# ---------------------------------------------------------------- init


def begun(tiny, init, folder, **student):
    recipe = {"method": "lcm", "teacher": str(tiny), "init": str(init), "student": student}
    return setup(parse_recipe({**recipe, "training": {"steps": 2, "batch_size": 2}}), folder).roles


@pytest.mark.slow
def test_a_student_starts_from_a_folder_at_its_scale(tiny, lora, files, tmp_path):
    mine = begun(tiny, files / "own", tmp_path, rank=4).tensors_of("student")
    for name, (a, b) in lora.items():
        torch.testing.assert_close(mine[f"unet.{name}.lora_A.weight"], a)
        torch.testing.assert_close(mine[f"unet.{name}.lora_B.weight"], 4 * b)


@pytest.mark.parametrize("flat", [True, False])
def test_pairs_have_the_shapes_of_the_layers_that_they_adapt(flat, tmp_path):
    """A convolution's as a matrix, or a matrix as a convolution: either would fit no adapter."""
    conv, linear = pair("sd15", CONV), pair("sd15", Q)
    first = [t.flatten(1) for t in conv] if flat else conv
    second = linear if flat else [t[:, :, None, None] for t in linear]
    path = write(tmp_path / "x.safetensors", {**kohya(CONV, *first, 2), **kohya(Q, *second, 2)})
    found = read_lora(copied("sd15"), path)
    for layer, (a, b) in ((CONV, conv), (Q, linear)):
        assert torch.equal(found[f"{layer}.lora_A.weight"], a)
        assert torch.equal(found[f"{layer}.lora_B.weight"], b / 2)


@pytest.mark.slow
def test_full_weights_start_from_a_lora_of_any_form(tiny, teacher, lora, files, tmp_path):
    unet = teacher.pipeline.unet
    mine = begun(tiny, files / "dora.safetensors", tmp_path, weights="full").tensors_of("student")
    for name, p in unet.named_parameters():
        layer, wanted = name.removesuffix(".weight"), p.double()
        if layer in lora:
            change = (lora[layer][1].flatten(1) @ lora[layer][0].flatten(1)).view_as(p).double()
            size = 1.5 * p.flatten(1).norm(dim=1)
            wanted = wanted + decomposed(wanted, change, size, 0)
        assert (mine[f"unet.{name}"] - wanted).abs().max() <= 2e-6 * max(1, wanted.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name, match", [
    ("dora.safetensors", r"more than products of two matrices"),
    ("ranks.safetensors", r"has the ranks 4, 8"),
])  # fmt: skip
def test_a_lora_starts_no_lora_that_it_is_not(name, match, tiny, files, tmp_path):
    with pytest.raises(ValueError, match=rf"{match}.*: it can start full weights only \(student.weights=full\)"):
        begun(tiny, files / name, tmp_path, rank=4)


# ---------------------------------------------------------------- by itself


def test_a_few_step_lora_of_ones_own_is_sampled(tiny, lora, teacher, files, tmp_path, monkeypatch, capsys):
    """The command that the issue names; the same latents as of the teacher with the weights added by hand."""
    call = ["sample", files / "plain.safetensors", "--base", tiny, "-p", WORDS[0]]
    code, out, err = inside(monkeypatch, capsys, tmp_path, *call, "--sampler", "lcm", "--steps", 4)
    assert code == 0 and "Wrote sample.png (lcm, timesteps" in out and "guidance 1;" in out and not err
    made = fewstep.load(files / "own", base=str(tiny))
    for more in ({}, {"sampler": "lcm"}, {"num_inference_steps": 4}, {"timesteps": [999, 499]}):
        with pytest.raises(ValueError, match="No card says how this LoRA is sampled: give a sampler and the number of"):
            made.sample(WORDS, **more)
    by_hand = fewstep.load(str(tiny))
    by_hand.teacher.pipeline.unet.load_state_dict(added(teacher.pipeline.unet, lora, 4))
    options = {"sampler": "lcm", "output_type": "latent"}
    got, wanted = made.sample(WORDS, 4, **options), by_hand.sample(WORDS, 4, guidance_scale=1, **options)
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_base_needs_a_lora(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"few_step\.json is not beside it. Give its base model \(--base\)"):
        fewstep.load(
            write(tmp_path / "x.safetensors", kohya("conv_in", torch.ones(1, 4, 3, 3), torch.ones(4, 1, 1, 1)))
        )
    write(tmp_path / "y.safetensors", {"nothing": torch.ones(1)})
    for name in (tiny, tmp_path / "y.safetensors", "scenes-64"):
        with pytest.raises(ValueError, match=r"A base goes with a LoRA or a published checkpoint, which .* is not"):
            fewstep.load(name, base=str(tiny))


# ---------------------------------------------------------------- folders and hub names


def test_a_folder_must_hold_one_lora(files, tmp_path):
    for name, match in (
        ("none", r"holds no LoRA file \(\.safetensors\)"),
        ("two", "holds several LoRA files: name one"),
    ):
        (tmp_path / name).mkdir()
        for i in range(2 if name == "two" else 0):
            shutil.copyfile(files / "plain.safetensors", tmp_path / name / f"{i}.safetensors")
        with pytest.raises(ValueError, match=match):
            lora_file(tmp_path / name)
    (tmp_path / "none" / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match=r"holds no LoRA file .*, but adapter_model\.bin, which may run any program"):
        lora_file(tmp_path / "none")
    shutil.copyfile(files / "plain.safetensors", tmp_path / "two" / "pytorch_lora_weights.safetensors")
    assert lora_file(tmp_path / "two").name == "pytorch_lora_weights.safetensors"


def test_a_hub_name_is_downloaded_and_peft_config_with_it(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def download(repo, name):
        asked.append((repo, name))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    listed = ["README.md", "adapter_model.safetensors", "sample.png"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda _, repo: listed)
    assert lora_file("someone/lora") == tmp_path / "adapter_model.safetensors"
    assert asked == [("someone/lora", "adapter_config.json"), ("someone/lora", "adapter_model.safetensors")]
    assert lora_file("someone/lora/deep/x.safetensors") == tmp_path / "deep" / "x.safetensors"
    assert lora_file("someone/lora/deep/adapter_model.safetensors").parent == tmp_path / "deep"
    assert asked[3] == ("someone/lora", "deep/adapter_config.json")
    listed[1:] = ["a.safetensors", "b.safetensors"]
    with pytest.raises(ValueError, match="The hub's someone/lora holds several LoRA files: name one"):
        lora_file("someone/lora")

    def unreachable(*_):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    with pytest.raises(ValueError, match=r"There is no file someone/lora, and the hub .* out of reach \(no network\)"):
        lora_file("someone/lora")


def test_a_whole_file_is_read_in_silence(tiny, files):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fewstep.load(str(tiny), loras=[files / "plain.safetensors"])
