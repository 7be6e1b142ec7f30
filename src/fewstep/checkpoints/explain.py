"""An entry in words: what it is, its settings, the code for diffusers, the settings for ComfyUI, and warnings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fewstep.checkpoints.registry import Checkpoint, checkpoints

if TYPE_CHECKING:
    from fewstep.models.families import Family

_KINDS = {
    "lora": "a LoRA",
    "lora-peft": "a LoRA in peft's own folder",
    "lora-heads": "a LoRA with a head for each step",
    "unet": "all weights of a network",
    "pipeline": "a whole pipeline",
    "unet-edm": "all weights of an EDM network",
}
_COMMERCIAL = {
    "yes": "commercial use is allowed by its licence",
    "no": "no commercial use",
    "ask": "read the licence before commercial use",
}
_STATUS = {
    "checked": "read from its authors' card, code or config",
    "partly": "read in part from its authors' card or config",
    "second-hand": "taken from third parties' lists",
}
_MODULES = {"PeftModel": "peft", "hf_hub_download": "huggingface_hub", "load_file": "safetensors.torch"}


def table(entries: Iterable[Checkpoint] | None = None) -> str:
    """One line for every entry: name, method, family, kind, steps, guidance."""
    chosen = list(checkpoints().values() if entries is None else entries)
    width = max(len(e.id) for e in chosen)
    return "\n".join(
        f"{e.id:{width}}  {e.method:9} {e.family:11} {e.kind:9}  steps {_steps(e):13} guidance {_guidance(e)}"
        for e in chosen
    )


def explain(entry: Checkpoint) -> str:
    """All that is known of an entry, one thing a line."""
    lines = [
        f"{entry.id}: {_KINDS[entry.kind]} ({entry.method}), hub {entry.repo}{': ' + entry.file if entry.file else ''}",
        f"  base        {entry.base or 'its own'} ({entry.family}), {entry.resolution} px",
        f"  scheduler   {entry.scheduler or 'of its authors, none of diffusers'}{_overrides(entry)}",
        f"  steps       {_steps(entry)}{' and no other number' if entry.steps_exact else ''}",
        f"  guidance    {_guidance(entry)}",
    ]
    lines += [f"  timesteps   {_numbers(entry.timesteps)}"] if entry.timesteps else []
    lines += [f"  sigmas      {_numbers(entry.sigmas)}"] if entry.sigmas else []
    lines += [f"  eta         {entry.eta:g}"] if entry.eta is not None else []
    lines += [f"  LoRA scale  {entry.lora_scale:g}"] if entry.lora_scale is not None else []
    lines += [f"  ComfyUI     {comfy(entry)}", f"  licence     {entry.licence}; {_COMMERCIAL[entry.commercial]}"]
    lines += [f"  settings    {_STATUS[entry.status]}"]
    return "\n".join(lines + ([f"  note        {entry.note}"] if entry.note else []))


def licence_notice(entry: Checkpoint) -> str:
    """One sentence to print whenever the file is used."""
    return f"Licence of {entry.id}: {entry.licence}; {_COMMERCIAL[entry.commercial]}."


def comfy(entry: Checkpoint) -> str:
    """ComfyUI's settings in one line."""
    if entry.guidance == "embedded" and not _family(entry).comfyui_embeds_guidance:
        return "cannot load it: its network has a guidance-scale embedding"
    words = {
        "file": "file {}", "sampler": "sampler {}", "scheduler": "scheduler {}", "node": "node {}", "cfg": "cfg {:g}",
        "flux_guidance": "FluxGuidance {:g}", "lora_strength": "strength_model {:g}", "model_sampling": "{}",
    }  # fmt: skip
    known = [text.format(entry.comfy[key]) for key, text in words.items() if entry.comfy.get(key) not in (None, "")]
    return ", ".join([*known, f"steps {entry.default_steps}"]) if known else "settings are not known here"


def code(entry: Checkpoint) -> str:
    """Lines of Python that sample from it with diffusers; a comment where diffusers cannot."""
    if not entry.scheduler:
        return f"# diffusers has no scheduler for {entry.id}. {entry.note}"
    lines = _loading(entry)
    if entry.kind != "pipeline" or entry.scheduler_overrides:
        options = "".join(f", {key}={value!r}" for key, value in entry.scheduler_overrides.items())
        lines.append(f"pipe.scheduler = {entry.scheduler}.from_config(pipe.scheduler.config{options})")
    lines.append(f'image = pipe(prompt="a photo of a cat", {_call(entry)}).images[0]')
    text = "\n".join(lines)
    names = {entry.pipeline, entry.scheduler, _family(entry).network_class} - {""}
    classes = sorted(name for name in names if name in text)
    others = [f"from {module} import {name}" for name, module in _MODULES.items() if name in text]
    return "\n".join(["import torch", f"from diffusers import {', '.join(classes)}", *others, "", text])


def warnings(entry: Checkpoint, base: str, family: str, steps: int, guidance_scale: float | None) -> list[str]:
    """A sentence for each of the user's settings that differs from the entry's own.

    Args:
        base: the model it is put on. family: that model's, empty if unknown.
        guidance_scale: None for the entry's.
    """
    found = []
    if steps not in entry.steps:
        bound = "is bound to" if entry.steps_exact else "is known to work at"
        found.append(f"{entry.id} {bound} {_steps(entry)} steps, not {steps}: images will be worse.")
    low, high = entry.guidance_range or (entry.guidance_scale or 1.0,) * 2
    if guidance_scale is not None and not low <= max(1.0, guidance_scale) <= high:
        right = "without guidance (scale 1)" if high == 1 else f"at guidance {_span(low, high)}"
        found.append(f"{entry.id} is made to be sampled {right}, not {guidance_scale:g}: colours will be off.")
    if family and family != entry.family:
        found.append(f"{entry.id} was made for {entry.family} models; {base} is of another family ({family}).")
    elif entry.base and base not in (entry.base, entry.repo):
        found.append(f"{entry.id} was made for {entry.base}; on {base} it may work less well.")
    return found


def _family(entry: Checkpoint) -> type[Family]:
    """The entry's family; for one that is not built in, what most families have in common."""
    from fewstep.models.families import Family, family_named  # with PyTorch, which the list does without

    return family_named(entry.family) or Family


def _passes_sigmas(entry: Checkpoint) -> bool:
    """Whether the pipeline passes the levels n/n, ..., 1/n by itself, as those of families not built in do."""
    from fewstep.models.families import family_named

    family = family_named(entry.family)
    return family is None or family.passes_sigmas


def _loading(entry: Checkpoint) -> list[str]:
    family = _family(entry)
    base, where, part = entry.base or entry.repo, f", torch_dtype={family.text_dtype}", family.part
    if entry.kind == "pipeline":
        return [f'pipe = {entry.pipeline}.from_pretrained("{entry.repo}"{where})']
    if entry.kind == "lora":
        name = f', weight_name="{entry.file}"' if entry.file else ""
        lines = [
            f'pipe = DiffusionPipeline.from_pretrained("{base}"{where})',
            f'pipe.load_lora_weights("{entry.repo}"{name})',
        ]
        return [*lines, f"pipe.fuse_lora(lora_scale={entry.lora_scale})"] if entry.lora_scale != 1 else lines
    if entry.kind == "lora-peft":
        return [
            f'pipe = DiffusionPipeline.from_pretrained("{base}"{where})',
            f'pipe.{part} = PeftModel.from_pretrained(pipe.{part}, "{entry.repo}")',
        ]
    pipe = f'pipe = DiffusionPipeline.from_pretrained("{base}", {part}={part}{where})'
    network = family.network_class
    if entry.guidance == "embedded":  # the repository is the network, config and all
        return [f'{part} = {network}.from_pretrained("{entry.repo}"{where}, variant="fp16")', pipe]
    config, download = f'"{base}", subfolder="{part}"', f'hf_hub_download("{entry.repo}", "{entry.file}")'
    safe = entry.file.endswith(".safetensors")
    weights = f"load_file({download})" if safe else f"torch.load({download}, weights_only=True)"
    return [
        f"{part} = {network}.from_config({network}.load_config({config})).to(torch.float16)",
        f"{part}.load_state_dict({weights})",
        pipe,
    ]


def _call(entry: Checkpoint) -> str:
    n = entry.default_steps
    words = [f"num_inference_steps={n}"]
    if entry.timesteps:
        words = [f"timesteps={list(entry.timesteps)}"]
    elif entry.sigmas or (entry.flow and not _passes_sigmas(entry)):
        words.append(f"sigmas={list(entry.sigmas) if entry.sigmas else [(n - i) / n for i in range(n)]}")
    if entry.guidance_scale is not None:
        off = entry.guidance == "cfg" and entry.guidance_scale == 1
        key = entry.guidance_argument
        words.append(f"{key}={0.0 if off and key == 'guidance_scale' else entry.guidance_scale}")
    if entry.scheduler == "SCMScheduler" and n != 2:  # the pipeline's own default is right for two steps alone
        words.append("intermediate_timesteps=None")
    words += [f"eta={entry.eta}"] if entry.eta is not None else []
    words += [f"{key}={value!r}" for key, value in entry.call.items()]
    return ", ".join(words)


def _overrides(entry: Checkpoint) -> str:
    if not entry.scheduler_overrides:
        return ""
    return f" ({', '.join(f'{key}={value}' for key, value in entry.scheduler_overrides.items())})"


def _steps(entry: Checkpoint) -> str:
    whole = len(entry.steps) > 2 and entry.steps == tuple(range(entry.steps[0], entry.steps[-1] + 1))
    return f"{entry.steps[0]}-{entry.steps[-1]}" if whole else ", ".join(map(str, entry.steps))


def _guidance(entry: Checkpoint) -> str:
    if entry.guidance_scale is None:
        return "none"
    if entry.guidance_scale == 1 and entry.guidance_range is None:
        return "off"
    span = f" ({_span(*entry.guidance_range)})" if entry.guidance_range else ""
    return f"{entry.guidance_scale:g}{span}" + (", embedded in the network" if entry.guidance == "embedded" else "")


def _span(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
