"""The demo, and the README's code run as it stands against it."""

import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch
import yaml

from qk_sniffer.cli import main
from readers import assert_readers_agree
from test_configs import composed

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
READING = (REPOSITORY / "docs" / "reading.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory like a checkout in which the demo has run, as the working directory."""
    directory = tmp_path_factory.mktemp("checkout")
    for name in ("src", "configs"):
        (directory / name).symlink_to(REPOSITORY / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr("sys.argv", ["qk-sniffer"])
        assert main(["predict", "--config", "configs/demo.yaml"]) == 0
        yield directory


def test_the_demo_can_be_run_again(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--config", "configs/demo.yaml"]) == 0
    table = capsys.readouterr().out.splitlines()[-6:]
    assert [line.split()[0] for line in table] == ["heads", "rows", "bytes", "seconds", "where", "load"]
    assert table[-1].endswith('datasets.load_dataset("data/demo", "l00h00q", split="train")')


def test_the_demos_files_are_the_same_to_every_reader(demo: Path) -> None:
    for head in ("l00h00q", "l03h05q", "l03h01k"):
        table = assert_readers_agree(demo / "data" / "demo", head, head_dim=32)
        assert table.num_rows > 1000


def test_the_demo_shows_a_head_that_looks_at_the_previous_token(demo: Path) -> None:
    """The weights are trained ones: random weights attend to the previous token like to any other."""
    assert (
        main(
            [
                "predict",
                "--config",
                "configs/demo.yaml",
                "--data.max_samples",
                "4",
                "--sniffer.capture.sampler.type",
                "all",
                "--sniffer.output.data_root",
                "data/all",
            ]
        )
        == 0
    )
    best = max(previous_token_attention(layer, head) for layer in range(4) for head in range(6))
    assert best > 0.3


def previous_token_attention(layer: int, head: int) -> float:
    """Mean probability of the token before, over the positions of one text of the demo."""
    query, key = (
        datasets.load_dataset("data/all", f"l{layer:02d}h{index:02d}{kind}", split="train").with_format(
            "torch"
        )
        for kind, index in (("q", head), ("k", head // 3))
    )
    text = query["example_id"][:] == query["example_id"][0]
    query, key = query["vector"][:][text], key["vector"][:][text]
    scores = query @ key.T * query.shape[1] ** -0.5
    probabilities = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)
    return probabilities.diagonal(-1)[1:].mean().item()


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_readmes_python_runs(demo: Path, number: int) -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[number], names)
    if "frame" in names:
        shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)
        assert shown is not None
        # Another processor rounds the vectors otherwise.
        for (_, row), line in zip(
            names["frame"].head(3).iterrows(), shown[1].splitlines()[1:], strict=True
        ):  # type: ignore[attr-defined]
            assert line.split()[1:4] == [row.source_id, str(row.position), row.token_str]
            assert float(line.split("[")[1].split(",")[0]) == pytest.approx(row.vector[0], abs=1e-4)
    if "vectors" in names:
        vectors = names["vectors"]
        assert isinstance(vectors, torch.Tensor)
        assert vectors.dtype == torch.float32
        assert vectors.ndim == 2
    if "batch" in names:
        documented = re.search(r"# (input_ids.*)", README)
        assert documented is not None
        assert list(names["batch"]) == documented.group(1).split(", ")  # type: ignore[call-overload]


def test_the_page_on_reading_captures_runs_from_top_to_bottom(demo: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", READING, re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) > 5
    commands = re.search(r"```sh\n(.*?)```", READING, re.DOTALL)
    assert commands is not None
    for line in commands.group(1).splitlines():
        assert main(line.split()[1:]) == 0


def test_the_page_on_moments_runs_from_top_to_bottom(demo: Path) -> None:
    page = (REPOSITORY / "docs" / "moments.md").read_text()
    moments = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    moments["sniffer"]["moments"]["pre_rope"] = True
    moments["sniffer"]["output"] = {"data_root": "data/moments", "overwrite": False}
    moments["sniffer"]["capture"]["capture_token_strings"] = False
    Path("moments.yaml").write_text(yaml.safe_dump({"config": "configs/demo.yaml"} | moments))
    for line in page.split("```sh\n")[1].split("```")[0].splitlines():
        assert main(line.partition("#")[0].split()[1:]) == 0
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert (Path("statistics") / "model.safetensors").exists()
    assert main(["report", "data/moments"]) == 0


def test_the_page_on_sniff_runs_from_top_to_bottom(demo: Path) -> None:
    page = (REPOSITORY / "docs" / "sniffing.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    for root in ("data/mine", "data/larger", "data/run"):
        assert main(["verify", root]) == 0


def test_the_readmes_config_is_the_shipped_one() -> None:
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    shown = yaml.safe_load(block.group(1))
    assert shown == composed(REPOSITORY / "configs" / "qwen3-8b.yaml")


def test_the_paths_of_the_tree_exist() -> None:
    tree = (REPOSITORY / "CONTRIBUTING.md").read_text().split("## Where things are")[1]
    names = re.findall(r"^  ((?:[\w/]+(?:\.py)? ?)+)  ", tree, re.MULTILINE)
    assert len(names) > 5
    for name in names:
        for part in name.split():
            assert (REPOSITORY / "src" / "qk_sniffer" / part).exists(), part


def test_the_readme_is_as_long_as_it_should_be() -> None:
    assert 500 <= len(README.split()) <= 1200
