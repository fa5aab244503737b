"""One model over several processes, each of which computes some of its attention heads.

transformers shards the projections by the model's plan, evenly. Where the key heads can't be divided
evenly, its plan would cut a head in two: then the attention projections are loaded whole, each process
keeps the rows and columns of the query heads that fall to it, and of keys and values a copy for each.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from qk_sniffer.capture import AttentionLayer, ModelShard, ScoreFunction
from qk_sniffer.errors import UserError

try:
    from transformers.distributed import DistributedConfig
    from transformers.distributed.utils import TransformersDeviceMesh
except ImportError:
    # Before 5.19 transformers shares a model over all processes of a run alone.
    DistributedConfig = TransformersDeviceMesh = None

_KEY_PROJECTIONS = ("k_proj", "kv_b_proj", "qkv_proj", "query_key_value")
_CAN_BE_CUT = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
"""Projections that can be cut between any two heads: the rows of a head are adjacent in the first
three, its columns in the last."""

_REFUSED = {
    "doge": "cuts the gate of its heads in other places than the heads",
    "gemma3n_text": "shards the activations over all of which it takes a mean and a deviation",
    "hrm_text": "shards a fused projection of its checkpoint before it is taken apart",
    "inkling_text": "shards what its convolutions need whole",
}
"""Architectures, by their decoder's model_type, and what the plan of transformers does to them."""


def require_plan(
    name: str, skeleton: PreTrainedModel, layers: Sequence[AttentionLayer], count: int
) -> None:
    """See that a model can be shared by so many processes.

    Args:
        name: What a person knows the model by.
        skeleton: The model, or one without weights.
        layers: Its attention layers.
        count: Processes that are to share it.

    Raises:
        UserError: It can't.
    """
    if TransformersDeviceMesh is None:
        raise UserError(
            "model.tensor_parallel: this release of transformers can't do that; install 5.19 or later"
        )
    if problem := _REFUSED.get(skeleton.config.get_text_config().model_type):
        raise UserError(
            f"model.tensor_parallel: the plan by which transformers shares {type(skeleton).__name__} "
            f"({name}) {problem}; set it to 1"
        )
    plan = plan_of(skeleton)
    if not any(".layers." in f".{key}" for key in plan):
        raise UserError(
            f"model.tensor_parallel: transformers has no plan by which processes share "
            f"{type(skeleton).__name__} ({name}); set it to 1, and spread the model with "
            "model.device_map: auto if it is larger than a device"
        )
    if _is_even(plan, layers, count):
        return
    rules = _attention_rules(plan)
    if {
        key.rpartition(".")[2]: style for key, style in rules.items() if "wise" in style
    } != _CAN_BE_CUT:
        fewest = min(layer.num_key_value_heads for layer in layers)
        raise UserError(
            f"model.tensor_parallel: {count} processes can't share the {fewest} key heads of {name} "
            "evenly; set it to a number that divides them"
        )
    if (fewest := min(layer.num_attention_heads for layer in layers)) < count:
        raise UserError(
            f"model.tensor_parallel: {name} has {fewest} query heads, too few for {count} processes; "
            f"set it to {fewest} or less"
        )


def plan_of(model: PreTrainedModel) -> dict[str, str]:
    """By which transformers shards a model: a style for each module or parameter that it names."""
    return dict(getattr(model, "_tp_plan", None) or {})


def _attention_rules(plan: Mapping[str, str]) -> dict[str, str]:
    """The rules for the modules beside the projection of keys."""
    owners = {key.rpartition(".")[0] for key in plan if key.rpartition(".")[2] in _KEY_PROJECTIONS}
    return {key: style for key, style in plan.items() if key.rpartition(".")[0] in owners}


def _is_even(plan: Mapping[str, str], layers: Sequence[AttentionLayer], count: int) -> bool:
    """Whether transformers' way of sharding cuts no head in two."""
    shares_heads = any(
        key.rpartition(".")[2] in _KEY_PROJECTIONS and style == "colwise" for key, style in plan.items()
    )
    return not shares_heads or all(layer.num_key_value_heads % count == 0 for layer in layers)


def n_sharing(model: nn.Module) -> int:
    """How many processes share a model of transformers; 1 where this one has all of it."""
    return getattr(model, "_tp_size", None) or 1


def too_large_to_share(size: int, width: int) -> UserError:
    """The error for texts that don't fit: the others would not read fewer where one process does.

    Args:
        size: The texts.
        width: Tokens of the longest.
    """
    return UserError(
        f"data.max_tokens_per_batch: {size} x {width:,} tokens do not fit into the device's memory, "
        "and a process that shares its model can't try fewer by itself; lower it or data.batch_size, "
        "or set model.prefill_chunk_size, to 4096 for example"
    )


class SharedModel:
    """What loads the part of a model that one of several processes computes.

    Every process of a run makes one at the same time.

    Args:
        shard: Its place among those that share the model.
        device: Where its part goes.
        plan: By which transformers shards the model.
        layers: The attention layers of the whole model.
    """

    def __init__(
        self,
        shard: ModelShard,
        device: torch.device,
        plan: Mapping[str, str],
        layers: Sequence[AttentionLayer],
    ) -> None:
        self._shard = shard
        self._device = device
        self._layers = {layer.layer_idx: layer for layer in layers}
        self._rules = {} if _is_even(plan, layers, shard.count) else _attention_rules(plan)
        """For the projections that are loaded whole and cut."""
        shape = dist.get_world_size() // shard.count, 1, 1, 1, shard.count
        names = "replica", "pp", "dp_replicate", "fsdp", "tp"
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self._mesh = mesh["pp", "dp_replicate", "fsdp", "tp"]

    def load(self, cls: Any, **kwargs: Any) -> Any:
        """Load this process's part with ``from_pretrained``.

        Args:
            cls: The auto class.
            kwargs: Of ``from_pretrained``, without a device map.

        Returns:
            What that gives.
        """
        with self._sharding():
            return cls.from_pretrained(**kwargs, distributed_config=self._config(kwargs["config"]))

    def distribute(self, model: Any) -> None:
        """Turn a model without weights into this process's part of it.

        Args:
            model: On the meta device, with tied weights apart.
        """
        model.maybe_distribute_model(model, self._config(model.config), self._meshes())
        self.cut(model)

    def _config(self, config: Any) -> Any:
        whole = [*self._rules, *_read_beside_its_module(config)]
        # The empty plan would shard nothing at all.
        return DistributedConfig(
            tp_size=self._shard.count, tp_plan=dict.fromkeys(whole, "replicate") or None
        )

    def _meshes(self) -> Any:
        return TransformersDeviceMesh(self._mesh, self._mesh)

    @contextmanager
    def _sharding(self) -> Iterator[None]:
        """Let transformers shard over the processes of one group, on their devices.

        By itself it takes all processes of a run for one group, and the first accelerator that it sees.
        """
        meshes = self._meshes()

        def prepare(cls: Any, config: Any, device_map: Any = None) -> Any:
            return config, self._device, meshes

        # Inherited by the class, so that what is set here hides it for a while.
        PreTrainedModel.prepare_distribute_model = classmethod(prepare)
        try:
            yield
        finally:
            del PreTrainedModel.prepare_distribute_model

    def cut(self, model: PreTrainedModel) -> None:
        """Keep of attention projections that were loaded whole what falls to this process.

        Args:
            model: The model, as ``load`` has given it.
        """
        for key in self._rules:
            for number, owner, name in _modules(model, key):
                self._cut_projection(getattr(owner, name), name, self._layers[number])
                if name == "k_proj" and hasattr(owner, "num_key_value_groups"):
                    layer = self._layers[number]
                    n_keys = len(self._shard.computed_keys(layer))
                    owner.num_key_value_groups = len(self._shard.query_heads(layer)) // n_keys

    def _cut_projection(self, module: Any, name: str, layer: AttentionLayer) -> None:
        heads: Sequence[int]
        if name in ("q_proj", "o_proj"):
            heads, n_heads = self._shard.query_heads(layer), layer.num_attention_heads
        elif name in ("k_proj", "v_proj"):
            heads, n_heads = self._shard.computed_keys(layer), layer.num_key_value_heads
        else:
            # A norm of single heads.
            return
        _keep_heads(module, heads, n_heads, dim=1 if name == "o_proj" else 0)
        if name == "o_proj":
            _sum_outputs(module, self._mesh["tp"].get_group())


def _read_beside_its_module(config: Any) -> list[str]:
    """What a model takes a weight from by itself, which it must have whole."""
    has_per_layer = getattr(config.get_text_config(), "hidden_size_per_layer_input", 0)
    if config.model_type == "gemma4" and has_per_layer:
        return ["model.language_model.embed_tokens"]
    return []


def _modules(model: nn.Module, key: str) -> Iterator[tuple[int, Any, str]]:
    """The modules that a rule of a plan names: number of the layer, who has it, and its name there."""
    name_of = re.compile(re.escape(key).replace(r"\*", r"(\d+)"))
    for name, _ in model.named_modules():
        if match := name_of.fullmatch(name):
            owner, _, last = name.rpartition(".")
            yield int(match[1]), model.get_submodule(owner), last


def _keep_heads(projection: Any, heads: Sequence[int], n_heads: int, *, dim: int) -> None:
    """Keep some heads of a projection, whose rows (``dim`` 0) or columns (1) are those of all heads."""
    weight, bias = projection.weight.detach(), projection.bias
    width = weight.shape[dim] // n_heads
    starts = torch.tensor(heads, device=weight.device)[:, None] * width
    own = (starts + torch.arange(width, device=weight.device)).view(-1)
    projection.weight = nn.Parameter(weight.index_select(dim, own), requires_grad=False)
    projection.out_features, projection.in_features = projection.weight.shape
    if dim == 0 and bias is not None:
        projection.bias = nn.Parameter(bias.detach()[own], requires_grad=False)


def _sum_outputs(projection: Any, group: Any) -> None:
    """Let an output projection give the sum over all processes of a group, and its bias once."""
    bias = projection.bias
    projection.bias = None

    def add_up(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        dist.all_reduce(output, group=group)
        return output if bias is None else output + bias

    projection.register_forward_hook(add_up)


def whole_layers(
    held: Sequence[Sequence[AttentionLayer]], layers: Sequence[AttentionLayer]
) -> list[AttentionLayer]:
    """What a probe would see of the attention layers of the whole model.

    Args:
        held: What it saw in each of the processes that share the model, in their order.
        layers: The whole layers, without their ``scores``.

    Raises:
        UserError: The processes have not the heads that fall to them.
    """
    whole = []
    for layer, parts in zip(layers, zip(*held, strict=True), strict=True):
        shards = [ModelShard(number, len(parts)) for number in range(len(parts))]
        shares = [(len(s.query_heads(layer)), len(s.computed_keys(layer))) for s in shards]
        found = [(part.num_attention_heads, part.num_key_value_heads) for part in parts]
        all_heads = layer.num_attention_heads, layer.num_key_value_heads
        if found not in (shares, [all_heads] * len(parts)):
            raise UserError(
                f"model.tensor_parallel: the plan of transformers gives {len(parts)} processes "
                f"{_listed(found)} query and key heads of layer {layer.layer_idx}, which has "
                f"{all_heads[0]} and {all_heads[1]}, so their numbers can't be told; set it to 1"
            )
        scores = parts[0].scores if found[0] == all_heads else _joined([part.scores for part in parts])
        n_query, n_key = all_heads
        whole.append(
            replace(parts[0], num_attention_heads=n_query, num_key_value_heads=n_key, scores=scores)
        )
    return whole


def _listed(heads: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{n_query} and {n_key}" for n_query, n_key in heads)


def _joined(scores: Sequence[ScoreFunction | None]) -> ScoreFunction | None:
    """The score function of all heads, from those of some heads each."""
    known = [function for function in scores if function is not None]
    if len(known) < len(scores):
        return None
    numbers: Any = {
        name: [number for function in known for number in getattr(function, name)]
        for name in ("alibi_slopes", "sinks")
        if getattr(known[0], name) is not None
    }
    return replace(known[0], **numbers)
