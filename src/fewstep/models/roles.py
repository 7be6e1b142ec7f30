"""Roles: one frozen base, many views — teacher, student, target, fake score.

Each view owns its weights: a full copy, or LoRA adapters on the shared base. A method calls ``roles.student(...)``
and need not know which. The teacher is the base with no adapter live, bit for bit, before and after training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.diffusion.schedule import Array, Time
from fewstep.models.bank import LayerBank, Mixed, usual_rate
from fewstep.models.compiled import compile_blocks
from fewstep.models.cond import Cond
from fewstep.models.denoiser import Cost, Denoiser, guidance_of, laid_out, network_dtype
from fewstep.models.extras import ExtraInputs
from fewstep.models.helpers import Encoder, Helpers, Reward
from fewstep.models.lora import (
    adapter_layers,
    adapter_scale,
    adapter_tensors,
    add_adapter,
    checkpoint,
    copy_tensors,
    live,
    matching,
    merge,
)
from fewstep.models.offload import is_offloaded, offload, restore
from fewstep.models.precision import (
    Shadow,
    autocast,
    drop_shadows,
    keep_shadows,
    refresh,
    runs_without_autocast,
    shadows_of,
)
from fewstep.models.quantize import is_quantized
from fewstep.models.sharding import (
    device_of,
    gathered,
    local,
    outline,
    rows_in,
    rows_of,
    shape_in,
    shard,
    waiting,
)


@dataclass(frozen=True)
class Weights:
    """How a trainable role holds its weights.

    Attributes:
        kind: "lora" (adapters on the shared base) or "full" (a copy of the base).
        rank, alpha: LoRA rank and scale numerator; alpha None means rank.
        targets: layer names to adapt; None leaves the choice to the network's family.
    """

    kind: Literal["lora", "full"] = "lora"
    rank: int = 64
    alpha: float | None = None
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "full"):
            raise ValueError(f"Unknown kind of weights '{self.kind}': use lora or full.")


class RoleNetwork:
    """A network as one role calls it: with its adapters live, its extra inputs embedded, under its autocast.

    Where it has a bank of last layers, the end of a step is no input of the network: it chooses a layer (`between`).

    Attributes:
        autocast: dtype in which autocast lets the network compute; None: it computes in that of its weights.
        shadows: copies of its trained weights in a lower dtype (`fewstep.models.precision`).
    """

    def __init__(
        self,
        network: Any,
        adapters: tuple[str, ...] = (),
        extras: ExtraInputs | None = None,
        autocast: torch.dtype | None = None,
        bank: LayerBank | None = None,
    ) -> None:
        self.network, self.adapters, self.extras = network, adapters, extras
        self.autocast = None if runs_without_autocast(network, autocast) else autocast
        self.bank = bank
        self.shadows: list[Shadow] = []

    @property
    def dtype(self) -> torch.dtype | None:
        return network_dtype(self.network)

    @property
    def accepts(self) -> frozenset[str]:
        native = frozenset(getattr(self.network, "accepts", ())) | ({"end"} if self.bank is not None else set())
        return native | (self.extras.names if self.extras is not None else frozenset())

    def mixed(self, rows: Array) -> Mixed:
        """This network with mixtures [R, N] of its bank in place of its last layer.

        Raises:
            ValueError: it has no bank.
        """
        if self.bank is None:
            raise ValueError("This role has one last layer, and no bank of them that could be mixed.")
        return Mixed(self, rows)

    def between(self, t: Time, end: Time | None) -> Mixed:
        """This network with its last layer for a step from t to ``end``.

        Raises:
            ValueError: no end is given, or `LayerBank.between`.
        """
        if self.bank is None or end is None:
            raise ValueError("This student has a last layer for every step: its sampler must say where a step ends.")
        return self.mixed(self.bank.between(t, end))

    def lay_out(self, noise: Tensor) -> Tensor:
        return laid_out(self.network, noise)

    def guide(self, with_: Tensor, without: Tensor, scale: float | Tensor) -> Tensor:
        return guidance_of(self.network)(with_, without, scale)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond | None, **inputs: Tensor) -> Tensor:
        with live(self.adapters), self._precision(x):
            if self.extras is not None:
                mine = {name: inputs.pop(name) for name in self.extras.names & inputs.keys()}
                vector = self.extras(**mine)
                if vector is not None:
                    inputs = {**inputs, "extra": vector}
            output: Tensor = self.network(x, t, cond, **inputs)
            return output

    def features(self, x: Tensor, t: Tensor, cond: Cond | None, taps: Iterable[str]) -> list[Tensor]:
        with live(self.adapters), self._precision(x):
            features: list[Tensor] = self.network.features(x, t, cond, taps)
            return features

    def _precision(self, x: Tensor) -> Any:
        # Autocast wraps the network alone: schedules, jumps and losses stay in float32.
        refresh(self.shadows)
        return autocast(x.device.type, self.autocast)


class Roles:
    """The views of one teacher.

    Args:
        teacher: the Denoiser to distil; its network is frozen here.
        autocast: dtype of network arithmetic (torch.bfloat16) or None.
        gradient_checkpointing: trade a second forward for memory, in networks that offer it.
        seed: of LoRA's random A matrices.
        helpers: frozen networks that losses use (`fewstep.models.helpers`).
        spread_later: `shard` will be called, before any role but the teacher is: until then full copies of a network
            have shapes alone, and no process ever has memory for more than its rows of them.

    Views are attributes: ``roles.teacher``, ``roles.student``, ... each a `Denoiser`.

    Attributes:
        heads: trainable modules on the features of a view, by name: a discriminator's.
    """

    def __init__(
        self,
        teacher: Denoiser,
        *,
        autocast: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        helpers: Helpers | None = None,
        spread_later: bool = False,
    ) -> None:
        if autocast == torch.float16:
            raise ValueError("Training in fp16 diverges: use bf16 or fp32.")
        self.base: Any = teacher.network
        self.autocast, self.seed = autocast, seed
        self.helpers = helpers or Helpers()
        self.heads: dict[str, nn.Module] = {}
        self._views: dict[str, Denoiser] = {}
        self._tensors: dict[str, dict[str, nn.Parameter]] = {}
        self._followers: dict[str, tuple[str, float]] = {}
        self._sharded, self._spread_later = False, spread_later
        self._later: list[Callable[[Mapping[nn.Parameter, nn.Parameter]], None]] = []  # what gives outlines values
        self._teacher = teacher
        if isinstance(self.base, nn.Module):
            self.base.eval().requires_grad_(False)
            if gradient_checkpointing:
                enable_checkpointing(self.base)
        self._views["teacher"] = self._view(RoleNetwork(self.base, (), None, autocast))

    def __getattr__(self, name: str) -> Denoiser:
        views: dict[str, Denoiser] = self.__dict__.get("_views", {})
        if name in views:
            return views[name]
        raise AttributeError(f"There is no role '{name}' here: the roles are {', '.join(views)}.")

    def __contains__(self, name: str) -> bool:
        return name in self._views

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, ...] -> images [B, 3, H, W] from -1 to 1, with a graph to the latents (`Helpers.decode`)."""
        return self.helpers.decode(latents)

    @property
    def encoder(self) -> Encoder:
        """The frozen image encoder of perceptual and adversarial losses.

        Raises:
            ValueError: this teacher came without one.
        """
        if self.helpers.encoder is None:
            raise ValueError("There is no image encoder here: build the roles with helpers that have one.")
        return self.helpers.encoder

    def reward(self, name: str) -> Reward:
        """The frozen reward model of that name (`Helpers.rewards`).

        Raises:
            ValueError: this teacher came without it.
        """
        if name not in self.helpers.rewards:
            raise ValueError(f"There is no reward model '{name}' here: build the roles with helpers that have it.")
        return self.helpers.rewards[name]

    def views(self) -> dict[str, Denoiser]:
        """All roles by name; a target without an EMA is the student's own view under a second name."""
        return dict(self._views)

    def add(
        self,
        name: str,
        weights: Weights | None = None,
        *,
        extra_inputs: Iterable[str] = (),
        prediction_type: str | None = None,
        bank: Sequence[float] = (),
        bank_rate: float | None = None,
    ) -> Denoiser:
        """A trainable role that starts with the teacher's weights.

        Args:
            extra_inputs: "guidance_embed" and/or "end", embedded by the role unless the network has them already.
            prediction_type: what its output predicts; None: what the teacher's does.
            bank: N + 1 decreasing native times: N last layers in place of its own (`fewstep.models.bank`).
            bank_rate: how fast these learn, as a share of the role's rate; by default `bank.usual_rate`.

        Raises:
            ValueError: the network is no nn.Module, takes no extra inputs, or names no last layer.
        """
        weights = weights or Weights()
        if not isinstance(self.base, nn.Module):
            raise ValueError("This teacher is no nn.Module and cannot be copied: use add_network for its student.")
        extras = self._extras(set(extra_inputs))
        network = self._copy(self.base) if weights.kind == "full" else self.base
        rate = usual_rate(weights.kind == "lora") if bank_rate is None else bank_rate
        layers = self._bank(self.base, bank, rate) if bank else None
        adapters, tensors = self._trainable(network, name, weights, banked=bool(bank))
        role = self._shadowed(RoleNetwork(network, adapters, extras, self.autocast, layers))
        return self._register(name, role, tensors, None, prediction_type)

    def add_encoder(self, name: str, weights: Weights | None = None, origin: Denoiser | None = None) -> Denoiser:
        """A trainable role that gives features alone: a copy of a network without the layers behind them.

        Neither memory nor optimiser state is spent on a decoder, where the network knows how to leave it out
        (``drop_decoder``). A LoRA stands on a frozen copy of its own: ``origin`` need not be the teacher.

        Args:
            weights: all of them by default.
            origin: the model to start from, on any device; the teacher by default.

        Raises:
            ValueError: the network is no nn.Module.
        """
        weights, network = weights or Weights("full"), (origin or self._teacher).network
        if not isinstance(network, nn.Module):
            raise ValueError("This model is no nn.Module and cannot be copied: use add_network for a discriminator.")
        network = self._copy(network, outlined=weights.kind == "full")  # a LoRA has values, and so has what it is on
        drop: Any = getattr(network, "drop_decoder", None)
        if drop is not None:
            drop()
        if isinstance(self.base, nn.Module) and not any(p.is_meta for p in network.parameters()):
            device = device_of(self.base)
            if weights.kind == "lora" and is_offloaded(self.base) and not is_offloaded(network):
                offload(network, device)
            elif not is_offloaded(network):
                network.to(device)
        adapters, tensors = self._trainable(network, name, weights)
        return self._register(name, self._shadowed(RoleNetwork(network, adapters, None, self.autocast)), tensors)

    def add_network(self, name: str, network: nn.Module, prediction_type: str, bank: Sequence[float] = ()) -> Denoiser:
        """A trainable role with a network of its own, of any kind: a student of a closed-form teacher, say."""
        layers = self._bank(network, bank) if bank else None
        role = RoleNetwork(network, (), None, self.autocast, layers)
        return self._register(name, role, dict(network.named_parameters()), None, prediction_type)

    def add_heads(
        self, name: str, build: Callable[..., nn.Module], backbone: str = "teacher", conditioned: bool = False
    ) -> nn.Module:
        """Trainable heads ``heads[name]`` on features of a role, float32 at least and outside autocast.

        Args:
            build: from the channels of every tap of its network to the heads.
            backbone: the role, or "encoder": the frozen encoder of images.
            conditioned: ``build`` is given the `Helpers` too, to know how wide their vectors are.

        Raises:
            ValueError: the network offers no features, or the name is taken.
        """
        network: Any = self.encoder if backbone == "encoder" else self._views[backbone].network.network  # type: ignore[attr-defined]
        channels = getattr(network, "tap_channels", None)
        if channels is None:
            raise ValueError(f"{type(network).__name__} offers no features (tap_channels) for a discriminator.")
        if name in self._tensors:
            raise ValueError(f"There already is a role '{name}': give the heads another name.")
        with self._seeded():
            heads = build(channels, self.helpers) if conditioned else build(channels)
        if isinstance(self.base, nn.Module):
            like = next(self.base.parameters())
            heads.to(device=device_of(self.base), dtype=torch.promote_types(like.dtype, torch.float32))
        self.heads[name], self._tensors[name] = heads, dict(heads.named_parameters())
        return heads

    def follow(self, name: str, source: str, decay: float, *, in_steps: bool = True) -> Denoiser:
        """A role that is an exponential moving average of ``source``: name = decay name + (1 - decay) source.

        With decay 0 it *is* the source (one view under two names), with 1 it stays what the source is now.

        Args:
            in_steps: training steps call it. Full weights that are called now and then keep no shadows.

        Raises:
            ValueError: a decay outside [0, 1].
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"An EMA decay must be in [0, 1], not {decay}.")
        if decay == 0:
            self._views[name] = self._views[source]
            return self._views[name]
        leader: RoleNetwork = self._views[source].network  # type: ignore[assignment]
        adapters: tuple[str, ...] = ()
        if leader.adapters:
            # A LoRA's follower is a second LoRA on the same base: averaging A and B costs megabytes where a copy of the
            # network would cost gigabytes. Its rank, layers and scale are read off the leader's, whoever made that.
            targets = {key.rsplit(".lora_", 1)[0] for key in self._tensors[source] if ".lora_" in key}
            rank = next(p.shape[0] for key, p in self._tensors[source].items() if key.endswith(".lora_A.weight"))
            scale = adapter_scale(leader.network, source)
            add_adapter(leader.network, name, rank=rank, alpha=scale * rank, targets=targets)
            network, adapters, tensors = leader.network, (name,), adapter_tensors(leader.network, name)
        else:
            network = self._twin(leader.network)
            tensors = dict(network.named_parameters())
        role = RoleNetwork(network, adapters, copy.deepcopy(leader.extras), self.autocast, copy.deepcopy(leader.bank))
        if adapters or (leader.shadows and in_steps):
            self._shadowed(role)
        elif leader.shadows:
            drop_shadows(network)
        view = self._register(name, role, tensors, self._views[source])
        copy_tensors(self._tensors[name], self._tensors[source])  # type: ignore[arg-type]
        for tensor in self._tensors[name].values():
            tensor.requires_grad_(False)
        self._followers[name] = source, decay
        return view

    def pull(self, name: str, source: str, share: float) -> None:
        """After every update of ``source`` also move ``name``, a trained role, this share of the way towards it.

        SenseFlow's implicit distribution alignment (Ge et al. 2025, arXiv 2506.00523), which brings a fake score near
        the student that it must follow. Of a LoRA both factors move, not their product.

        Raises:
            ValueError: a share outside [0, 1), or roles of different kinds.
        """
        if not 0 <= share < 1:
            raise ValueError(f"The share by which a role is pulled must be at least 0 and below 1, not {share}.")
        mine, theirs = self._tensors[name], self._tensors[source]
        shapes = ({key: p.shape for key, p in tensors.items()} for tensors in (mine, theirs))
        types = {self._views[role].prediction_type for role in (name, source)}
        if len(types) > 1 or next(shapes) != next(shapes):
            raise ValueError(
                f"The {name} cannot be pulled to the {source}: their weights or predictions differ in kind."
            )
        self._followers[name] = source, 1 - share

    @torch.no_grad()
    def update_followers(self, source: str) -> None:
        """Move every follower of ``source``, and what is pulled to it, one step towards it.

        In float32 masters, one fused call each.
        """
        for name, (leader, decay) in self._followers.items():
            if leader == source:
                mine = [local(t) for t in self._tensors[name].values()]
                theirs = [local(t) for t in self._tensors[source].values()]
                torch._foreach_lerp_(mine, theirs, 1 - decay)

    def shard(self) -> None:
        """Spread the base and all full-weight networks over the processes (FSDP2); adapters stay whole everywhere.

        Call it once, when every role is there. From then on every process must make the same calls.
        """
        adapters = {p for tensors in self._tensors.values() for key, p in tensors.items() if ".lora_" in key}
        spread: dict[nn.Parameter, nn.Parameter] = {}
        networks, stored = self._networks(), waiting(self.base) if isinstance(self.base, nn.Module) else {}
        device = device_of(self.base if isinstance(self.base, nn.Module) else networks[0])
        for network in networks:
            spread |= shard(network, adapters, device)
        with torch.no_grad():
            for parameter, (tensors, name) in stored.items():
                local(spread[parameter]).copy_(rows_in(tensors, name, spread[parameter]))
        self._tensors = {
            role: {key: spread.get(p, p) for key, p in tensors.items()} for role, tensors in self._tensors.items()
        }
        for role in (view.network for view in self._views.values()):
            if isinstance(role, RoleNetwork) and role.shadows and not role.adapters:
                drop_shadows(role.network)  # FSDP gathers the masters into other tensors
                role.shadows = []
        self._sharded, self._spread_later = True, False
        for fill in self._later:
            fill(spread)
        self._later.clear()

    def compile(self, backend: str = "inductor") -> None:
        """Compile the repeated blocks of every network; call it once, when every role is there."""
        for network in self._networks():
            compile_blocks(network, backend)

    def leaves(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The leaves of a graph that stand for ``parameters``: themselves, or the gathered weights of sharded ones.

        FSDP computes with a gathered copy of every weight, and ``backward(inputs=...)`` must name what the graph holds.
        """
        if not self._sharded:
            return list(parameters)
        found = {p: t for network in self._networks() for p, t in gathered(network).items()}
        return [found.get(p, p) for p in parameters]

    def _networks(self) -> list[nn.Module]:
        """The base and every full copy."""
        found = {id(v.network.network): v.network.network for v in self._views.values()}  # type: ignore[attr-defined]
        return [network for network in found.values() if isinstance(network, nn.Module)]

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The trainable tensors of a role, in a fixed order; empty for the teacher and for followers."""
        return [p for p in self._tensors.get(name, {}).values() if p.requires_grad]

    def probe(self, name: str) -> nn.Parameter:
        """The weight whose gradients balance a role's loss terms (`fewstep.methods.base.Balanced`): its last one.

        Esser et al. (2021, arXiv 2012.09841, eq. 7) take the decoder's last layer. Of a LoRA it is the last B: A's
        gradient is 0 at the start, where B = 0. Biases and extra inputs do not count; diffusers' UNets register the
        middle block after the decoder, though it runs before.
        """
        tensors = {key: p for key, p in self._tensors[name].items() if not key.startswith("extras.")}
        last = [key for key, p in tensors.items() if p.ndim > 1 and ".lora_A" not in key] or list(tensors)
        return tensors[sorted(last, key=lambda key: "mid_block" not in key)[-1]]

    def shadows(self) -> list[Shadow]:
        """The copies of trained weights that roles keep in a lower dtype; those of a view under two names once."""
        roles = {id(view.network): view.network for view in self._views.values()}
        return [shadow for role in roles.values() if isinstance(role, RoleNetwork) for shadow in role.shadows]

    def tensors_of(self, name: str) -> dict[str, Tensor]:
        """The tensors that make a role differ from the teacher: its LoRA or all weights, its extra inputs and bank."""
        return dict(self._tensors[name])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that training changes, as ``<role>/<name>``: what a checkpoint must hold."""
        return {f"{role}/{key}": p for role, tensors in self._tensors.items() for key, p in tensors.items()}

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave.

        Raises:
            ValueError: when names or shapes differ (the checkpoint belongs to another recipe).
        """
        mine = self.tensors()
        if mine.keys() != saved.keys() or any(mine[k].shape != shape_in(saved, k) for k in mine):
            raise ValueError("This checkpoint belongs to another student: its tensors differ in name or shape.")
        copy_tensors(mine, saved)

    @torch.no_grad()
    def start(self, name: str, saved: Mapping[str, Tensor]) -> None:
        """Let a role start from ``saved``: what `tensors_of` gave for a role like it, or a LoRA for full weights.

        Extra inputs and a bank of last layers that ``saved`` does not know stay at zero. Call it before others `follow`
        the role.

        Raises:
            ValueError: one sentence when ``saved`` does not fit.
        """
        mine = dict(self._tensors[name])
        network: Any = self._views[name].network
        if any(p.is_meta for p in mine.values()):  # now for its refusals, and again when there are values
            self._later.append(lambda _: self.start(name, saved))
        is_lora = any(".lora_" in key for key in saved)
        optional = ["extras.", "bank."]
        if network.bank is not None:
            saved = {key: t / network.bank.rate if key.startswith("bank.") else t for key, t in saved.items()}
            optional.append(f"{network.network.last_layer}.")
            if not network.adapters:  # the layer that its bank differs from
                mine |= {k: p for k, p in network.network.named_parameters() if k.startswith(optional[-1])}
        if is_lora and not network.adapters:
            merge(mine, saved)
            saved = {key: t for key, t in saved.items() if ".lora_" not in key}
        elif is_lora:  # saved with alpha folded in, so that it fits a role of any scale
            scale = adapter_scale(network.network, name)
            saved = {key: t / scale if ".lora_B" in key else t for key, t in saved.items()}
        wanted = {key for key in mine if not key.startswith(tuple(optional)) and (network.adapters or not is_lora)}
        misfits = [key for key in saved.keys() | wanted if key not in saved or key not in mine]
        misfits += [key for key in saved.keys() & mine.keys() if saved[key].shape != mine[key].shape]
        if misfits:
            raise ValueError(
                f"The {name} cannot start from these weights: {min(misfits)} differs (a LoRA starts a LoRA of the same "
                "rank and targets, or full weights; full weights start full weights of the same network)."
            )
        copy_tensors({key: mine[key] for key in saved}, dict(saved))

    def cost(self) -> Cost:
        """Calls of all networks together; a view under two names counts once."""
        total = Cost()
        for view in {id(v): v for v in self._views.values()}.values():
            total.calls += view.cost.calls
            total.evaluations += view.cost.evaluations
            total.graph_evaluations += view.cost.graph_evaluations
        return total

    def _trainable(
        self, network: nn.Module, name: str, weights: Weights, banked: bool = False
    ) -> tuple[tuple[str, ...], dict[str, nn.Parameter]]:
        """(live adapters, trainable tensors) of a role on ``network``: all its weights, or a new LoRA's.

        None is on a last layer that a bank stands for (``banked``).
        """
        if weights.kind == "full":
            if is_offloaded(network):
                restore(network)
            return (), dict(_masters(network).named_parameters())
        with self._seeded():
            targets = weights.targets or getattr(network, "lora_targets", None)
            if banked:
                targets = [layer for layer in matching(network, targets) if layer != network.last_layer]
            add_adapter(network, name, rank=weights.rank, alpha=weights.alpha, targets=targets)
        return (name,), adapter_tensors(network, name)

    def _shadowed(self, role: RoleNetwork) -> RoleNetwork:
        """``role``, whose layers keep their trained weights in the dtype of autocast too, where there is autocast."""
        if self.autocast is not None and (role.adapters or not self._spread_later):  # FSDP casts what it gathers
            parts = [layer for name in role.adapters for layer in adapter_layers(role.network, name)]
            parts = parts if role.adapters else [role.network]
            for part in parts:
                keep_shadows(part, self.autocast)
            role.shadows = shadows_of(parts)
        return role

    def _register(
        self,
        name: str,
        role: RoleNetwork,
        tensors: dict[str, nn.Parameter],
        like: Denoiser | None = None,
        prediction_type: str | None = None,
    ) -> Denoiser:
        """Make a role known, by its network and by the tensors that make it differ from the teacher.

        Args:
            like: the view whose schedule, prediction type and way of guidance it shares; the teacher's by default.
        """
        if role.extras is not None:
            tensors |= {f"extras.{k}": p for k, p in role.extras.named_parameters()}
        if role.bank is not None:  # the network's own last layer is what the bank differs from, and stays
            tensors = {k: p for k, p in tensors.items() if not k.startswith(f"{role.network.last_layer}.")}
            tensors |= {f"bank.{k}": p for k, p in role.bank.named_parameters()}
        self._tensors[name] = tensors
        self._views[name] = self._view(role, like, prediction_type)
        return self._views[name]

    def _view(self, network: RoleNetwork, like: Denoiser | None = None, kind: str | None = None) -> Denoiser:
        like = like or self._teacher
        return Denoiser(network, like.schedule, kind or like.prediction_type, batched_guidance=like.batched_guidance)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Within this block torch's generator starts from this seed; outside, it continues undisturbed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            yield

    def _copy(self, network: nn.Module, outlined: bool = True) -> nn.Module:
        """A copy of a network, which must be free of adapters; with values now, unless it may be an outline."""
        if any(".lora_" in name for name, _ in network.named_parameters()):
            raise ValueError("Add full-weight roles before LoRA roles: the base already carries adapters.")
        return self._twin(network) if outlined else copy.deepcopy(network)

    def _twin(self, network: nn.Module) -> nn.Module:
        """A copy of a network; where all are to be spread an outline, which `shard` gives memory and values."""
        if not self._spread_later:
            return copy.deepcopy(network)
        twin, origin = outline(network), dict(network.named_parameters())

        @torch.no_grad()
        def fill(spread: Mapping[nn.Parameter, nn.Parameter]) -> None:
            for name, parameter in twin.named_parameters():
                own = spread.get(origin[name], origin[name])
                local(parameter).copy_(rows_of(own, parameter))

        self._later.append(fill)
        return twin

    def _bank(self, network: Any, times: Sequence[float], rate: float = 1.0) -> LayerBank:
        last = getattr(network, "last_layer", None)
        if last is None:
            raise ValueError(
                f"{type(network).__name__} does not say which layer is its last, so it can have no bank of them: give "
                "it the attribute last_layer, or train by another method."
            )
        bank = LayerBank(network.get_submodule(last), self._teacher.schedule, times, rate)
        if bank.weight.is_meta:
            bank.to_empty(device=device_of(network))
            for parameter in bank.parameters():
                nn.init.zeros_(parameter)
        return bank

    def _extras(self, names: set[str]) -> ExtraInputs | None:
        names = names - set(getattr(self.base, "accepts", ()))
        if not names:
            return None
        width = getattr(self.base, "extra_width", None)
        if width is None:
            raise ValueError(
                f"{type(self.base).__name__} takes no extra inputs ({', '.join(sorted(names))}): "
                "turn them off in the method's settings, or give the network an `extra_width`."
            )
        extras = ExtraInputs(names, width, self._teacher.schedule)
        like = next(self.base.parameters())
        return extras.to(device=device_of(self.base), dtype=torch.promote_types(like.dtype, torch.float32))


def _masters(network: nn.Module) -> nn.Module:
    """``network`` with all weights trainable, in float32 at least.

    Raises:
        ValueError: it is quantised.
    """
    if is_quantized(network):
        raise ValueError(
            "A quantised teacher has no weights that could be trained whole: use LoRAs, or leave teacher.quantize out."
        )
    for parameter in network.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return network.requires_grad_(True)


def enable_checkpointing(module: nn.Module) -> None:
    """Turn on activation checkpointing through `fewstep.models.lora.checkpoint` wherever the network offers it."""
    for part in module.modules():
        if hasattr(part, "enable_gradient_checkpointing"):
            part.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint)  # type: ignore[operator]
            return
    if hasattr(module, "gradient_checkpointing"):
        module.gradient_checkpointing = True  # type: ignore[assignment]
        return
    raise ValueError(f"{type(module).__name__} offers no gradient checkpointing: turn it off in the recipe.")
