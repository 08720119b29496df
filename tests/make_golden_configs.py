"""The config.json that a version of transformers saves, for the sizes of oracle.py, as a file of
tests/golden.

    pip install --no-deps --target DIR transformers==4.57.1 "huggingface-hub<1" "tokenizers<0.23"
    # writes saved_by_4.57.1.json and thinker_saved_by_4.57.1.json
    PYTHONPATH=DIR python tests/make_golden_configs.py

The same for 5.24.0, whose libraries are those of requirements-dev.txt.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import oracle  # noqa: E402
import transformers  # noqa: E402

from minomni.checkpoint.hf_config import as_json, to_json  # noqa: E402


def keep(config, name: str) -> None:
    """Save a configuration with its library's own save_pretrained, and keep the file under a golden
    name.
    """
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        text = (Path(folder) / "config.json").read_text()
    (oracle.GOLDEN / f"{name}_{transformers.__version__}.json").write_text(text)


if __name__ == "__main__":
    whole = transformers.Qwen2_5OmniConfig(**as_json(to_json(oracle.CONFIG)))
    keep(whole, "saved_by")
    keep(whole.thinker_config, "thinker_saved_by")
