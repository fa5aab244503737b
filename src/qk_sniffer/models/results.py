"""What a short forward shows of an attention's result: its values, its outputs, and their way on."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qk_sniffer.errors import UserError
from qk_sniffer.kinds import PARTS, Part
from qk_sniffer.models.adapters import OnResult
from qk_sniffer.models.calls import AttentionCall
from qk_sniffer.models.notes import in_layers
from qk_sniffer.models.scores import softmax_problem


@dataclass
class ResultMap:
    """Which values, outputs and statistics of an architecture can be captured.

    Attributes:
        problems: Why some can't, to follow "this architecture".
        projected: Layers whose output projection takes the outputs as they are.
        layers: All layers.
    """

    problems: dict[Part, str] = field(default_factory=dict)
    projected: set[int] = field(default_factory=set)
    layers: set[int] = field(default_factory=set)

    def require(self, parts: Collection[Part]) -> None:
        """See that some parts can be captured.

        Raises:
            UserError: One can't.
        """
        for part in parts:
            if problem := self.problems.get(part):
                facts = PARTS[part]
                raise UserError(
                    f"sniffer.capture.{facts.setting}: this architecture {problem}, so its "
                    f"{facts.plural} can't be told; capture without them"
                )

    def notes(self, parts: Collection[Part]) -> list[str]:
        """What a reader of some parts must know."""
        changed = self.layers - self.projected
        if "o" not in parts or "o" in self.problems or not changed:
            return []
        note = (
            "outputs are those of the attention; a gate, a norm or experts come between them and the "
            "output projection"
        )
        return [note if changed == self.layers else in_layers(note, changed)]

    def learn_call(self, layer_idx: int, call: AttentionCall) -> None:
        """Note what a call shows before it is computed."""
        self.layers.add(layer_idx)
        if problem := softmax_problem(call):
            self.problems["softmax"] = problem

    def learn_result(self, call: AttentionCall, output: Tensor | None, value: Tensor | None) -> None:
        """Note what its result shows."""
        n_heads, n_queries = call.query.shape[1:3]
        n_key_heads, n_keys = call.key.shape[1:3]
        if value is None or value.shape[1:3] != (n_key_heads, n_keys):
            self.problems["v"] = "has no value for each of its keys"
        if output is None or output.shape[1:3] != (n_queries, n_heads):
            self.problems["o"] = "has no output for each of its queries"

    def learn_repeat(self) -> None:
        """Note that one attention was computed twice."""
        text = "computes each attention twice, with one half of the values and then the other"
        self.problems |= {"v": text, "o": text}


class ProjectionTrace:
    """Notes which layers give their outputs to a module as they are.

    Args:
        results: Is told.
    """

    def __init__(self, results: ResultMap) -> None:
        self._results = results
        self._layer_idx = -1
        self._output: Tensor | None = None

    def see(self, layer_idx: int, output: Tensor | None) -> None:
        """Note what a layer's attention has given: (B, Q, H, D)."""
        self._layer_idx, self._output = layer_idx, output

    @contextmanager
    def watching(self, modules: Collection[nn.Module]) -> Iterator[None]:
        """Look at what some modules are given, within a block."""
        with ExitStack() as stack:
            for module in filter(is_projection, modules):
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        output = self._output
        given = args[0] if args and isinstance(args[0], Tensor) else None
        if output is None or given is None or given.numel() != output.numel():
            return
        if torch.equal(given.reshape(-1), output.reshape(-1)):
            self._results.projected.add(self._layer_idx)
            self._output = None


def is_projection(module: nn.Module) -> bool:
    """Whether a module has weights and is no norm."""
    has_weights = next(module.parameters(recurse=False), None) is not None
    return has_weights and "Norm" not in type(module).__name__


def on_result_of(module: nn.Module, take: Callable[[Tensor | None, Tensor | None], None]) -> OnResult:
    """What is called with an attention's result.

    Args:
        module: The attention module.
        take: Called with its values and its output, as wide as the module's values.
    """

    def on_result(output: Tensor | None, _: Tensor | None, value: Tensor | None) -> None:
        take(own_width(module, value), own_width(module, output))

    return on_result


def own_width(module: nn.Module, states: Tensor | None) -> Tensor | None:
    """Values or outputs (…, D) as wide as the module's values: flash attention has MLA's padded."""
    width = getattr(module, "v_head_dim", None)
    if states is None or not isinstance(width, int) or states.shape[-1] <= width:
        return states
    return states[..., :width]
