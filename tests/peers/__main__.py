"""Compare what ``sniff`` captures with what nnsight and TransformerLens give, and write docs/peers.md.

``python -m peers PYTHON``, with the interpreter of an environment that has the two.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from bench.tables import markdown
from conftest import byte_tokenizer
from families import tiny_model
from peers.one import REPETITIONS, TOKENS

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "peers.md"
TOLERANCE = 1e-5
SIZE = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
MODELS: dict[str, PreTrainedConfig] = {
    "a tiny Llama": LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **SIZE,
    ),
    "a tiny GPT-2": GPT2Config(n_embd=64, n_layer=4, n_head=4, n_positions=512, **SIZE),
}
TOOLS = {
    "qk-sniffer": "with_qk_sniffer",
    "nnsight": "with_nnsight",
    "TransformerLens": "with_transformer_lens",
}
TEXT = """# Beside other tools

[nnsight](https://nnsight.net) and
[TransformerLens](https://transformerlensorg.github.io/TransformerLens/) also give you the queries and
keys of a model. `make peers` reads the same tokens with each of them, in an environment of their own,
and compares the vectors of all layers and heads as the attention uses them, after RoPE.

{table}

{versions}.

One text of {tokens} tokens, one thread, the median of {repetitions} calls on one machine;
loading the model is in none of the times. The lines are those between `begin` and `end` in the scripts
of `tests/peers/`.

The tools serve different needs. nnsight and TransformerLens reach any activation, and can change it.
`sniff` gives queries and keys alone. It needs no names of modules, follows texts through padding,
caches and `generate`, and keeps rows that can be sampled, saved and turned into attention again.
"""


def run(python: str, module: str, directory: Path, out: Path) -> dict[str, Any]:
    subprocess.run([python, HERE / "one.py", module, directory, out], check=True)
    result: dict[str, Any] = torch.load(out, weights_only=True)
    return result


def lines_of(module: str) -> int:
    """Lines of a user's code that capture."""
    text = (HERE / f"{module}.py").read_text()
    inside = text.split("# begin\n")[1].split("# end")[0]
    return sum(bool(line.strip()) for line in inside.splitlines())


def largest_difference(found: Any, expected: Any) -> float:
    pairs = [pair for kind in zip(found, expected, strict=True) for pair in zip(*kind, strict=True)]
    assert all(ours.shape == theirs.shape for ours, theirs in pairs)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def main(python: str) -> None:
    rows = [("", "lines", *(f"{name}, ms" for name in MODELS), "largest difference from ours")]
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as place:
        for number, config in enumerate(MODELS.values()):
            directory = Path(place) / str(number)
            tiny_model(config).save_pretrained(directory)
            byte_tokenizer().save_pretrained(directory)
            for tool, module in TOOLS.items():
                own = sys.executable if tool == "qk-sniffer" else python
                out = Path(place) / f"{module}-{number}"
                results.setdefault(tool, []).append(run(own, module, directory, out))
    for tool, found in results.items():
        ours = results["qk-sniffer"]
        differences = [
            largest_difference(a["vectors"], b["vectors"]) for a, b in zip(found, ours, strict=True)
        ]
        assert max(differences) <= TOLERANCE, (tool, differences)
        milliseconds = [f"{1000 * one['seconds']:.0f}" for one in found]
        told = "" if tool == "qk-sniffer" else f"{max(differences):.0e}"
        rows.append((tool, f"{lines_of(TOOLS[tool])}", *milliseconds, told))
    print(markdown(*rows))
    versions = []
    listed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        name, _, number = line.partition(" ")
        if name in ("nnsight", "transformer-lens", "transformers", "torch"):
            versions.append(f"{name} {number.strip()}")
    PAGE.write_text(
        TEXT.format(
            table=markdown(*rows), versions=", ".join(versions), tokens=TOKENS, repetitions=REPETITIONS
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
