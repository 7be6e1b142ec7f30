"""The keys of a recipe: one YAML file with teacher, method, data and training. No weight is loaded here."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator

from fewstep.data.find import STREAMED, Place, find_captions
from fewstep.data.remote import open_shards
from fewstep.evaluation.figures import DECIDING
from fewstep.methods.base import Method
from fewstep.methods.registry import find_method
from fewstep.methods.settings import LARGEST, FixedGuidance
from fewstep.models.roles import Weights
from fewstep.recipe.validate import RecipeError, unknown_key, validated
from fewstep.sampling.samplers import sampler_name
from fewstep.training.settings import TrainingSettings


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherConfig(Section):
    """The model to distil."""

    path: str = Field(
        default="scenes-64",
        description="scenes-64 (shipped), a diffusers folder, a hub name, a .safetensors file of SD 1.x or SDXL, a "
        "finished run, or an earlier stage",
    )
    config: str | None = Field(default=None, description="folder with configs and tokenizers for a single file")
    loras: tuple[str, ...] = Field(default=(), description="LoRA files, folders or hub names of its LoRAs")
    size: int | None = Field(
        default=None, ge=1, le=LARGEST, description="side of the images in pixels; empty: the model's own"
    )
    dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="number format of the teacher's weights")
    guidance_embed: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="FLUX's guidance-scale embedding; empty: 3.5"
    )
    quantize: Literal["int8", "nf4"] | None = Field(
        default=None, description="hold the frozen network in 8 or 4 bits, under LoRA (extra lowmem)"
    )
    vae_tiling: bool = Field(default=False, description="encode and decode large images in tiles")


class StudentConfig(Section):
    """How the student holds its weights."""

    weights: Literal["lora", "full"] = Field(default="lora", description="LoRA adapters on the teacher, or all weights")
    rank: int = Field(default=32, ge=1, le=2**16, description="LoRA rank")
    alpha: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="the LoRA scale is alpha / rank; empty: alpha = rank"
    )
    targets: tuple[str, ...] | None = Field(default=None, description="layers to adapt; empty: the family's list")

    def build(self) -> Weights:
        return Weights(self.weights, self.rank, self.alpha, self.targets)


class DataConfig(Section):
    """What to train on."""

    source: Literal["scenes", "folder", "webdataset", "parquet", "datasets", "prompts", "teacher"] = Field(
        default="scenes",
        description="scenes: rendered, captioned ones; folder: your images with captions; webdataset: tar shards; "
        "parquet: tables; datasets: a data set of the hub; prompts: a text file, for methods that need no images; "
        "teacher: the teacher's samples for the captions of any of these (see `pairs`)",
    )
    path: str | None = Field(
        default=None,
        description="folder or file, with captions in .txt, metadata.jsonl or metadata.csv; for datasets the name",
    )
    size: int | None = Field(
        default=None, ge=1, le=LARGEST, description="number of images; empty: 4000 scenes, or all images"
    )
    seed: int = Field(default=1, ge=0, lt=2**63, description="seed of the scenes")
    split: str = Field(default="train", description="split of a data set of the hub")
    image_column: str | None = Field(
        default=None,
        description="image column of a table, or image suffix in shards; empty: image, jpg, png or another usual one",
    )
    caption_column: str | None = Field(
        default=None,
        description="caption column of a table, JSON file or metadata list; empty: text, caption or prompt",
    )
    aspect_buckets: bool = Field(default=False, description="keep the shape of images instead of cropping squares")
    caption_dropout: float = Field(default=0.0, ge=0, lt=1, description="share of images trained without caption")
    text: Literal["cached", "live"] = Field(
        default="cached",
        description="cached: captions are encoded once, and their embeddings kept on disk; live: captions are kept as "
        "text and encoded in every step, and the text encoders stay in memory",
    )
    stream: bool = Field(
        default=False,
        description="read shards (webdataset, parquet or datasets, by path, URL or hub name) while the run trains, and "
        "encode images and captions in every step; nothing is kept on disk",
    )
    shuffle_buffer: int = Field(
        default=512, ge=1, le=LARGEST, description="images of a stream that are shuffled together and held in memory"
    )

    @model_validator(mode="after")
    def _path_fits_source(self) -> DataConfig:
        needs_path = self.source not in ("scenes", "teacher")
        if (self.path is None and needs_path) or (self.path is not None and self.source == "scenes"):
            named = self.source if needs_path else "folder"
            raise ValueError(f"data.path and 'source: {named}' go together: give both, or neither for scenes.")
        if self.aspect_buckets and self.source in ("scenes", "prompts", "teacher"):
            raise ValueError(f"data.aspect_buckets needs images of your own, not 'source: {self.source}'.")
        if self.stream and self.source not in STREAMED:
            raise ValueError(f"data.stream reads the sources {', '.join(STREAMED)}, not 'source: {self.source}'.")
        for key, off in (("size", "null"), ("aspect_buckets", "false")) if self.stream else ():
            if getattr(self, key):
                raise ValueError(f"data.{key} does not go with data.stream: set it to {off}.")
        if self.path is None and self.size is None:
            object.__setattr__(self, "size", 4000)
        return self

    @property
    def live(self) -> bool:
        """Whether captions are encoded in every step."""
        return self.stream or self.text == "live"

    @property
    def place(self) -> Place | None:
        """Where the images or prompts are; None for scenes."""
        if self.path is None:
            return None
        source = "" if self.source == "teacher" else self.source
        return Place(source, self.path, self.split, self.image_column, self.caption_column)


class PairsConfig(Section):
    """The teacher's samples, made once: pairs of noise and latent (dmd), or data (`data.source: teacher`)."""

    size: int | None = Field(
        default=None, ge=1, le=LARGEST, description="number of samples; empty: one for each caption"
    )
    solver: Literal["ddim", "heun", "dpm++2m"] = Field(default="ddim", description="solver of the teacher's ODE")
    num_inference_steps: int = Field(
        default=50, ge=1, le=LARGEST, description="solver steps; heun calls the teacher twice in each"
    )
    guidance_scale: FixedGuidance | None = Field(
        default=None, description="guidance scale of the teacher; empty: that of the method, or else of the sample grid"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the noise")
    batch_size: int = Field(default=32, ge=1, le=LARGEST, description="samples generated at once and kept in one file")
    path: str | None = Field(default=None, description="folder of the samples; empty: a folder inside the run")

    @property
    def cost(self) -> int:
        """Forward passes of the teacher for all samples; 0 as long as their number is open."""
        calls = self.num_inference_steps * (2 if self.solver == "heun" else 1)
        return (self.size or 0) * calls * (1 if self.guidance_scale == 1.0 else 2)


class SampleConfig(Section):
    """Sample grids during training, and the sampler of the finished student."""

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
    every: int = Field(default=500, ge=1, le=LARGEST, description="training steps between sample grids")
    sampler: str | None = Field(
        default=None,
        description="sampler of the finished student, with the steps and eta given here; empty: that of its method",
    )
    num_inference_steps: int = Field(
        default=4, ge=1, le=LARGEST, description="steps of the student; for PCM its phases by default"
    )
    eta: float = Field(default=0.0, ge=0, le=1, description="fresh noise, 0 (none) to 1; for TCD 0.3 by default")
    teacher_steps: int = Field(default=50, ge=1, le=LARGEST, description="steps of the teacher in the grid")
    guidance_scale: FixedGuidance = Field(
        default=3.0, description="guidance scale of the teacher in the grid; 1 or 0: off"
    )

    @field_validator("sampler")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return None if value is None else sampler_name(value, "sample.sampler")


class EvaluateConfig(Section):
    """Validation during training: keep the best student, stop when nothing improves."""

    every: int = Field(default=0, ge=0, le=LARGEST, description="training steps between measurements; 0: no validation")
    count: int = Field(default=128, ge=8, le=LARGEST, description="number of prompts")
    prompts: str | None = Field(
        default=None,
        description="text file of prompts, one a line; empty: captions that are held out of training (at most a third "
        "of them), for scenes those of unseen ones",
    )
    reference: str | None = Field(
        default=None,
        description="images to measure distances to. teacher: its own for the same prompts and noise, made once; data: "
        "those of the held-out captions; or a folder of images; empty: teacher, for scenes-64 its real scenes",
    )
    path: str | None = Field(
        default=None, description="folder of the teacher's reference images; empty: inside the run"
    )
    features: str | None = Field(
        default=None,
        description="network whose features are compared: imagenet (extra metrics), or DINOv2, CLIP or SigLIP from a "
        "folder or the hub; empty: imagenet, for scenes-64 its detector",
    )
    metrics: tuple[str, ...] = Field(
        default=(),
        description="further figures: perceptual (distance to the teacher's image), clip:MODEL, pickscore, "
        "aesthetic:FOLDER",
    )
    metric: str = Field(default="detail FD", description="figure that decides, such as detail FD, FD, KID or accuracy")
    keep_best: bool = Field(default=True, description="the finished student is the best one measured, not the last")
    patience: int = Field(
        default=0, ge=0, le=LARGEST, description="stop after this many measurements without improvement; 0: never"
    )

    @field_validator("metric")
    @classmethod
    def _decides(cls, value: str) -> str:
        if value not in DECIDING:
            raise ValueError(f"evaluate.metric: '{value}' cannot decide: use {', '.join(DECIDING)}.")
        return value


_OF_TEACHER = ("to teacher", "unlike teacher", "perceptual")
_ASKED_FOR = {
    "CLIP score": "clip:MODEL", "PickScore": "pickscore", "aesthetic": "aesthetic:FOLDER", "perceptual": "perceptual",
}  # fmt: skip
"""Figures that are measured where ``evaluate.metrics`` has this."""


def _check_metric(evaluate: EvaluateConfig, scenes: bool) -> None:
    """Raises ValueError where ``evaluate.metric`` is a figure that these settings do not measure."""
    metric, asked = evaluate.metric, {name.partition(":")[0] for name in evaluate.metrics}
    of_scenes = scenes and not (evaluate.prompts or evaluate.reference)
    missing, entry = "", _ASKED_FOR.get(metric)
    if metric == "accuracy" and not of_scenes:
        missing = "only the detector of scenes-64 judges prompts"
    if entry is not None and entry.partition(":")[0] not in asked:
        missing = f"add {entry} to evaluate.metrics"
    if metric in _OF_TEACHER and (of_scenes or evaluate.reference not in (None, "teacher")):
        missing = "set evaluate.reference to teacher"
    if missing:
        raise ValueError(f"evaluate.metric: '{metric}' is not measured here: {missing}.")


class Recipe(Section):
    """A whole run."""

    method: dict[str, Any] = Field(description="method name and its settings, e.g. {name: tcd, guidance_scale: 3}")
    teacher: TeacherConfig = TeacherConfig()
    init: str | None = Field(
        default=None,
        description="first weights of the student: a finished run, a student's folder, a LoRA file, a published "
        "checkpoint (fewstep checkpoints), or an earlier stage; empty: those of the teacher",
    )
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    pairs: PairsConfig = PairsConfig()
    training: TrainingSettings = TrainingSettings()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of all random numbers in training")

    @field_validator("method", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("teacher", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        method, settings, data = self.method_class(), self.method_settings(), self.data
        streams = method.streams_of(settings)
        if data.source == "prompts" and method.needs_images(settings):
            raise ValueError(
                f"data.source: {method.name} needs images, so prompts alone are not enough: give it some, or set "
                "data.source to teacher to train on the teacher's samples for these prompts."
            )
        _check_metric(self.evaluate, scenes=data.path is None)
        if self.teacher.quantize and (self.student.weights == "full" or self.training.fsdp):
            other = "student.weights full" if self.student.weights == "full" else "training.fsdp"
            raise ValueError(f"teacher.quantize does not go with {other}: a quantised network is frozen and whole.")
        coarse = {
            "training.precision": self.training.precision == "bf16",
            "teacher.dtype": self.teacher.dtype == "bf16",
            "teacher.quantize": self.teacher.quantize is not None,
        }
        if method.needs_precision and any(coarse.values()):
            key = next(key for key, is_coarse in coarse.items() if is_coarse)
            remedy = "leave it empty" if key == "teacher.quantize" else "set it to fp32"
            raise ValueError(f"{key}: {method.name} learns from small differences of predictions: {remedy}.")
        if data.stream and "pairs" in streams:
            raise ValueError(f"data.stream does not go with {method.name}, which needs samples for all captions first.")
        if data.stream and self.evaluate.every and (not self.evaluate.prompts or self.evaluate.reference == "data"):
            raise ValueError(
                "evaluate: nothing can be held out of a stream: give evaluate.prompts a file of prompts"
                + (", and evaluate.reference the teacher or a folder." if self.evaluate.reference == "data" else ".")
            )
        if data.aspect_buckets and "pairs" in streams:
            raise ValueError(f"data.aspect_buckets do not go with {method.name}, whose pairs are squares.")
        if data.aspect_buckets and "prompts" in streams:
            raise ValueError(f"data.aspect_buckets do not go with {method.name}, which reads the images' captions.")
        return self

    @property
    def place(self) -> Place | None:
        """Where the images or prompts are, and how many are held out of training to measure on; None for scenes."""
        place, evaluate = self.data.place, self.evaluate
        if place is None or not evaluate.every or (evaluate.prompts and evaluate.reference != "data"):
            return place
        return dataclasses.replace(place, held_out=evaluate.count)

    @property
    def lacks_data(self) -> bool:
        """Whether the file or folder of its data is not there: such a recipe can be planned, but not run."""
        if self.place is None:
            return False
        if self.data.stream:
            try:
                open_shards(self.place)
            except ValueError:
                return True
            return False
        return not self.place.root.exists() and self.place.kind != "datasets"

    def captions(self) -> int:
        """The number of images or captions that are trained on; those of a file or folder are counted there.

        Of a stream it is not known: those of one batch are held at once.

        Raises:
            ValueError: one sentence when they do not exist.
        """
        if self.data.stream:
            return self.training.batch_size
        return self.data.size or 0 if self.place is None else len(find_captions(self.place, self.data.size))

    def method_class(self) -> type[Method]:
        """The class that ``method.name`` names."""
        name = self.method.get("name")
        if not isinstance(name, str):
            raise RecipeError("method: give its name, e.g. 'method: tcd' or 'method: {name: tcd}'.")
        return find_method(name)

    @property
    def needs_pairs(self) -> bool:
        """Whether the teacher must be sampled before training."""
        return self.data.source == "teacher" or "pairs" in self.method_class().streams_of(self.method_settings())

    def method_settings(self) -> Any:
        """``method`` without its name as the method's own Settings, validated."""
        cls = self.method_class()
        given = {key: value for key, value in self.method.items() if key != "name"}
        for key in given:
            if key in cls.renamed:
                raise RecipeError(f"method.{key} is called method.{cls.renamed[key]} now.")
            if key not in cls.setting_names():  # a plain dataclass of a method of one's own takes any key
                raise RecipeError(unknown_key(f"method.{key}", key, cls.setting_names()))
        return validated(cls.Settings, given, "method")

    def on_device(self, device: str | None) -> Recipe:
        """The same recipe with its training on this device; None: on its own."""
        training = self.training if device is None else dataclasses.replace(self.training, device=device)
        return self.model_copy(update={"training": training})

    def as_data(self) -> dict[str, Any]:
        """The recipe as plain data, every default written out."""
        settings = TypeAdapter(dict[str, Any]).dump_python(dataclasses.asdict(self.method_settings()), mode="json")
        return {**self.model_dump(mode="json"), "method": {"name": self.method["name"], **settings}}

    def as_yaml(self) -> str:
        """`as_data` as the text of a recipe file."""
        return yaml.safe_dump(self.as_data(), sort_keys=False, allow_unicode=True)
