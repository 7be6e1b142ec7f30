"""Recipes: one YAML that says what to distil, how, and on what — validated before any weight is loaded."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from fewstep.data.find import Place, find_captions
from fewstep.methods.base import Method, Sampling
from fewstep.methods.registry import find_method
from fewstep.methods.settings import explain
from fewstep.models.roles import Weights
from fewstep.sampling import SAMPLERS
from fewstep.training.settings import TrainingSettings

_STRICT = ConfigDict(extra="forbid", frozen=True)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RecipeError(ValueError):
    """A recipe that cannot be run; the message says where and what to do."""


class TeacherConfig(BaseModel):
    """The model to distil."""

    model_config = _STRICT
    path: str = Field(
        default="scenes-64",
        description="scenes-64 (shipped), a diffusers folder, a hub name, a .safetensors file of SD 1.x or SDXL, a "
        "finished run, or an earlier stage",
    )
    config: str | None = Field(default=None, description="folder with configs and tokenizers for a single file")
    loras: tuple[str, ...] = Field(default=(), description="LoRA files or hub names that are part of the teacher")
    size: int | None = Field(default=None, ge=1, description="side of the pictures in pixels; empty: the model's own")
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="how the teacher's weights are held")
    guidance_embed: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="guidance scale that FLUX is told; empty means 3.5"
    )
    quantize: Literal["int8", "nf4"] | None = Field(
        default=None, description="hold the frozen network in 8 or 4 bits, under LoRA (extra lowmem)"
    )
    vae_tiling: bool = Field(default=False, description="encode and decode large pictures in tiles")


class StudentConfig(BaseModel):
    """How the student holds its weights."""

    model_config = _STRICT
    weights: Literal["lora", "full"] = Field(default="lora", description="LoRA adapters on the teacher, or all weights")
    rank: int = Field(default=32, ge=1, description="LoRA rank")
    alpha: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="LoRA scale is alpha / rank; empty means alpha = rank"
    )
    targets: tuple[str, ...] | None = Field(default=None, description="layers to adapt; empty takes the family's list")

    def build(self) -> Weights:
        return Weights(self.weights, self.rank, self.alpha, self.targets)


class DataConfig(BaseModel):
    """What to train on."""

    model_config = _STRICT
    source: Literal["scenes", "folder", "webdataset", "parquet", "datasets", "prompts", "teacher"] = Field(
        default="scenes",
        description="scenes: rendered, captioned ones; folder: your pictures with captions; webdataset: tar shards; "
        "parquet: tables; datasets: one of the hub; prompts: a text file, for methods that look at no pictures; "
        "teacher: its own samples of the captions of any of these (`pairs` says how)",
    )
    path: str | None = Field(
        default=None, description="the folder or file; captions in .txt or metadata.jsonl; of datasets the name"
    )
    size: int | None = Field(default=None, ge=1, description="how many pictures; empty means 4000 scenes, or all")
    seed: int = Field(default=1, ge=0, lt=2**63, description="which scenes")
    split: str = Field(default="train", description="of datasets")
    image_column: str | None = Field(default=None, description="of tables; empty takes image, jpg, png, ...")
    caption_column: str | None = Field(
        default=None, description="of tables and JSON; empty takes text, caption or prompt"
    )
    aspect_buckets: bool = Field(default=False, description="keep the shape of pictures, instead of cutting squares")
    caption_dropout: float = Field(default=0.0, ge=0, lt=1, description="share of pictures without their caption")

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        needs_path = self.source not in ("scenes", "teacher")
        if (self.path is None and needs_path) or (self.path is not None and self.source == "scenes"):
            named = self.source if needs_path else "folder"
            raise ValueError(f"data.path and 'source: {named}' go together: give both, or neither for scenes.")
        if self.aspect_buckets and self.source in ("scenes", "prompts", "teacher"):
            raise ValueError(f"data.aspect_buckets are for pictures of yours, not for 'source: {self.source}'.")
        if self.path is None and self.size is None:
            object.__setattr__(self, "size", 4000)
        return self

    @property
    def place(self) -> Place | None:
        """Where the pictures or prompts are; None for scenes."""
        if self.path is None:
            return None
        source = "" if self.source == "teacher" else self.source
        return Place(source, self.path, self.split, self.image_column, self.caption_column)


class PairsConfig(BaseModel):
    """The teacher's own samples, made once: pairs of noise and latent (dmd), or data (`data.source: teacher`)."""

    model_config = _STRICT
    size: int | None = Field(default=None, ge=1, description="how many; empty takes data.size, one for each caption")
    solver: Literal["ddim", "heun", "dpm++2m"] = Field(default="ddim", description="of the teacher's ODE")
    num_inference_steps: int = Field(default=50, ge=1, description="steps of the solver; heun asks twice in each")
    guidance_scale: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="empty takes the method's own, or else the sample grid's"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="of their noise")
    batch_size: int = Field(default=32, ge=1, description="sampled at once, and kept in one file")
    path: str | None = Field(default=None, description="folder that keeps them; empty takes one inside the run")


class SampleConfig(BaseModel):
    """Sample grids during training, and the sampler that the finished student wants."""

    model_config = _STRICT
    prompts: tuple[str, ...] = Field(
        default=(
            "a red circle",
            "two shapes",
            "a striped blue square and a star",
            "a green triangle on a dark background",
        ),
        min_length=1,
        description="prompts of the sample grid",
    )
    every: int = Field(default=500, ge=1, description="steps between sample grids")
    sampler: str | None = Field(
        default=None,
        description="the sampler the finished student wants, with the steps and eta given here; empty: its method's",
    )
    num_inference_steps: int = Field(default=4, ge=1, description="steps of the student; PCM's default is its phases")
    eta: float = Field(default=0.0, ge=0, le=1, description="fresh noise, 0 (none) to 1; TCD's default is 0.3")
    teacher_steps: int = Field(default=50, ge=1, description="steps of the teacher's row")
    guidance_scale: float = Field(default=3.0, ge=0, allow_inf_nan=False, description="guidance of the teacher's rows")

    @field_validator("sampler")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in SAMPLERS:
            raise ValueError(f"Unknown sample.sampler '{value}': use {', '.join(SAMPLERS)}.")
        return value


class EvaluateConfig(BaseModel):
    """Measuring while training: keep the best student, stop when nothing gets better."""

    model_config = _STRICT
    every: int = Field(default=0, ge=0, description="steps between measurements; 0 is off")
    metric: Literal["detail FD", "FD", "accuracy"] = Field(
        default="detail FD", description="what decides: detail FD or FD (lower is better), accuracy (higher is)"
    )
    count: int = Field(default=128, ge=8, description="unseen prompts")
    keep_best: bool = Field(default=True, description="the finished student is the best one measured, not the last")
    patience: int = Field(default=0, ge=0, description="stop after so many measurements without a better one; 0 never")


class Recipe(BaseModel):
    """A whole run."""

    model_config = _STRICT
    method: dict[str, Any] = Field(description="method name and its settings, e.g. {name: tcd, guidance_scale: 3}")
    teacher: TeacherConfig = TeacherConfig()
    init: str | None = Field(
        default=None,
        description="where the student starts: a finished run, a student's folder, a LoRA file, a published "
        "checkpoint (fewstep checkpoints), or an earlier stage; empty starts from the teacher",
    )
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    pairs: PairsConfig = PairsConfig()
    training: TrainingSettings = TrainingSettings()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    seed: int = Field(default=0, ge=0, lt=2**63, description="of everything random")

    @field_validator("method", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("teacher", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    def method_class(self) -> type[Method]:
        """The class that ``method.name`` names."""
        name = self.method.get("name")
        if not isinstance(name, str):
            raise RecipeError("method: give its name, e.g. 'method: tcd' or 'method: {name: tcd}'.")
        return find_method(name)

    @property
    def needs_pairs(self) -> bool:
        """Whether the teacher must be sampled before training."""
        return self.data.source == "teacher" or "pairs" in self.method_class().streams

    def method_settings(self) -> Any:
        """``method`` without its name as the method's own Settings, validated."""
        cls = self.method_class()
        given = {k: v for k, v in self.method.items() if k != "name"}
        known = cls.setting_names()
        for key in given:
            if key in cls.renamed:
                raise RecipeError(f"method.{key} is called method.{cls.renamed[key]} now.")
            if key not in known:
                raise RecipeError(_unknown(f"method.{key}", key, [*known, "name"]))
        return validated(TypeAdapter(cls.Settings), given, "method")


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file or a shipped name, with ``a.b=c`` overrides on top.

    Raises:
        RecipeError: one sentence: what is wrong, where, what to do.
    """
    return parse_recipe(read_recipe(source, overrides))


def read_recipe(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain data of a recipe, overridden but not validated."""
    data = _merge(_read(find_recipe(source)), overrides)
    if not _is_small(data):
        raise RecipeError(f"The recipe {source} is no recipe: it has more than 100,000 entries, or holds itself.")
    return data


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """A validated recipe from plain data."""
    if "stages" in data:
        raise RecipeError("This recipe has stages: run it with fewstep distill.")
    for key in data:
        if key not in Recipe.model_fields:
            raise RecipeError(_unknown(key, key, list(Recipe.model_fields)))
    training = data.get("training")
    if isinstance(training, Mapping):  # a dataclass: pydantic would only say "unexpected keyword argument"
        known = [f.name for f in dataclasses.fields(TrainingSettings)]
        for key in training:
            if key not in known:
                raise RecipeError(_unknown(f"training.{key}", key, known))
    recipe = validated(TypeAdapter(Recipe), dict(data), "")
    _check_data(recipe)
    return _with_pairs(_as_the_method_wants(recipe, recipe.method_class().sampling(recipe.method_settings())))


def count_pictures(recipe: Recipe) -> int:
    """How many pictures, or captions, the recipe's data are.

    Raises:
        ValueError: one sentence when they are not there.
    """
    data = recipe.data
    return data.size or 0 if data.place is None else len(find_captions(data.place, data.size))


def _check_data(recipe: Recipe) -> None:
    """What is trained on must suit the method."""
    method, settings, data = recipe.method_class(), recipe.method_settings(), recipe.data
    if data.source == "prompts" and method.needs_pictures(settings):
        raise RecipeError(
            f"data.source: {method.name} looks at pictures, so prompts alone are not enough: give it some, or set "
            "data.source to teacher for the teacher's own of these prompts."
        )
    if recipe.teacher.quantize and (recipe.student.weights == "full" or recipe.training.fsdp):
        other = "student.weights full" if recipe.student.weights == "full" else "training.fsdp"
        raise RecipeError(f"teacher.quantize does not go with {other}: a quantised network is frozen and whole.")
    if data.aspect_buckets and "pairs" in method.streams:
        raise RecipeError(f"data.aspect_buckets do not go with {method.name}, whose pairs are squares.")
    if data.aspect_buckets and "prompts" in method.streams:
        raise RecipeError(f"data.aspect_buckets do not go with {method.name}, which reads the pictures' captions.")


def _with_pairs(recipe: Recipe) -> Recipe:
    """What the recipe does not say about the teacher's samples, where it needs them."""
    if not recipe.needs_pairs:
        return recipe
    pairs, guidance = recipe.pairs, recipe.method_class().teacher_guidance(recipe.method_settings())
    if pairs.guidance_scale is None:
        scale = guidance.low if guidance and guidance.fixed else recipe.sample.guidance_scale
        pairs = pairs.model_copy(update={"guidance_scale": scale})
    if pairs.size is None:
        pairs = pairs.model_copy(update={"size": count_pictures(recipe)})
    return recipe.model_copy(update={"pairs": pairs})


def _as_the_method_wants(recipe: Recipe, wanted: Sampling) -> Recipe:
    """What the recipe does not say about the student's sampler is the method's own; another sampler, other rules."""
    own = {key: getattr(wanted, key) for key in {"num_inference_steps", "eta"} - recipe.sample.model_fields_set}
    steps = recipe.sample.num_inference_steps
    bound = wanted.no_other_steps and recipe.sample.sampler is None
    if bound and "num_inference_steps" not in own and steps != wanted.num_inference_steps:
        raise RecipeError(
            f"sample.num_inference_steps is {steps}, but this method's students take {wanted.num_inference_steps}: "
            "leave it out, or change the method's own number."
        )
    return recipe.model_copy(update={"sample": recipe.sample.model_copy(update=own)})


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a shipped one."""
    path = Path(source)
    if path.is_file():
        return path
    named = shipped_recipes()
    if str(source) in named:
        return named[str(source)]
    near = difflib.get_close_matches(str(source), named, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else f" Shipped recipes: {', '.join(named)}."
    raise RecipeError(f"There is no recipe '{source}'.{hint}")


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {p.stem: p for p in sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))}


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out."""
    from omegaconf import OmegaConf

    data = recipe.model_dump(mode="json")
    data["method"] = {"name": recipe.method["name"], **TypeAdapter(dict[str, Any]).dump_python(
        dataclasses.asdict(recipe.method_settings()), mode="json")}  # fmt: skip
    return OmegaConf.to_yaml(OmegaConf.create(data))


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}.") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise RecipeError(f"The recipe {path} is not valid YAML{where}.") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"The recipe {path} must be a mapping that starts with 'method: ...'.")
    return data


def _is_small(data: Any, limit: int = 100_000) -> bool:
    """Whether it ends: a few lines of YAML anchors can stand for billions of entries, or for themselves."""
    waiting = [data]
    while waiting and limit > 0:
        entry = waiting.pop()
        limit -= 1
        if isinstance(entry, Mapping):
            waiting += entry.values()
        elif isinstance(entry, list):
            waiting += entry
    return not waiting


NAMED = {"method": "name", "teacher": "path"}
"""Keys that a string alone may stand for, and what it then is."""


def spelled_out(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with ``method: tcd`` as ``method: {name: tcd}``, and the teacher likewise."""
    return {k: {NAMED[k]: v} if k in NAMED and isinstance(v, str) else v for k, v in data.items()}


def _merge(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    import yaml

    data = spelled_out(data)
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path or any(not part for part in path.split(".")):
            raise RecipeError(f"--set wants key.subkey=value, not '{item}'.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise RecipeError(f"--set {path}: the value '{text}' is not valid YAML.") from None
        if isinstance(value, str):
            value = _number(value)
        *parents, last = path.split(".")
        place, parents = _stage(data, path, parents)
        if not parents:
            value = spelled_out({last: value})[last]
        for key in parents:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise RecipeError(f"--set {path}: '{key}' has no sub-keys.")
        place[last] = value
    return data


def _stage(data: dict[str, Any], path: str, parents: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Where an override begins: ``stages.NAME.key`` inside the stage of that name, anything else at the top."""
    stages = data.get("stages")
    if not parents or parents[0] != "stages" or not isinstance(stages, list):
        return data, parents
    for stage in stages:
        if isinstance(stage, dict) and len(parents) > 1 and stage.get("name") == parents[1]:
            stage.update(spelled_out(stage))
            return stage, parents[2:]
    names = [str(stage.get("name")) for stage in stages if isinstance(stage, dict)]
    raise RecipeError(f"--set {path}: there is no such stage: the stages are {', '.join(names)}.")


def _number(text: str) -> Any:
    """YAML 1.1 reads 1e-4 as a string; people mean a number."""
    try:
        return float(text)
    except ValueError:
        return text


def validated(adapter: TypeAdapter[Any], data: Any, prefix: str) -> Any:
    """What ``adapter`` makes of plain data that people wrote; ``prefix`` is where it stood.

    Raises:
        RecipeError: one sentence.
    """
    try:
        return adapter.validate_python(_numbers(data))
    except ValidationError as error:
        raise RecipeError(_sentence(error, prefix)) from None


def _numbers(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _numbers(value) for key, value in data.items()}
    return _number(data) if isinstance(data, str) and data[:1].isdigit() and "e" in data else data


def _sentence(error: ValidationError, prefix: str) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in (*([prefix] if prefix else []), *first["loc"]))
    if first["type"] == "extra_forbidden":
        model: Any = Recipe
        for part in first["loc"][:-1]:
            model = model.model_fields[str(part)].annotation
        return _unknown(where, str(first["loc"][-1]), list(model.model_fields))
    if first["type"] == "missing":
        return f"{where} is missing: e.g. 'method: tcd'." if where == "method" else f"{where} is missing."
    if first["type"] in ("model_type", "dataclass_type"):
        return f"{where} must hold keys of its own, as in '{where}: {{key: value}}', not {first['input']!r:.80}."
    return explain(error, prefix)


def _unknown(where: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(str(key), known, n=1)  # YAML has keys that are no words
    hint = f"did you mean '{near[0]}'?" if near else f"known keys are {', '.join(known)}."
    return f"Unknown key '{where}': {hint}"
