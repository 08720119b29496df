"""How long a folder of about 1.75 GB in five files takes to load, here and in transformers, each
run in a new process.

    python tests/bench_load.py [runs]

It needs Linux, transformers and 2 GB in the temporary folder; the runs take turns.
Wall and CPU time of the loading alone (imports done before), and how far the process's memory rose
above its start.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARD_BYTES = 365_000_000
MEASURE = """
import json, sys, time
folder = sys.argv[1]
{imports}
def memory(line):
    return int(next(text for text in open("/proc/self/status") if text.startswith(line)).split()[1])
start = memory("VmRSS")
wall, cpu = time.perf_counter(), time.process_time()
{load}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps(dict(wall=wall, cpu=cpu, memory=(memory("VmHWM") - start) / 1024)))
"""
PROGRAMS = {
    "minomni": ("import torch; from minomni import weights", "model = weights.load(folder)"),
    "transformers": (
        "import torch; from transformers import Qwen2_5OmniForConditionalGeneration as Model",
        "model = Model.from_pretrained(folder, dtype='auto')",
    ),
}


def make(folder: Path) -> None:
    """A model of 0.85 billion weights: Thinker and Talker in bf16, the rest in fp32, as the release
    stores them.
    """
    import torch

    from minomni.checkpoint import weights
    from minomni.config import SMALL
    from minomni.omni import Omni
    from minomni.token2wav.voice import Voice

    thinker, talker = SMALL.thinker, SMALL.talker
    text = replace(
        thinker.text,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        vocab_size=32_768,
    )
    thinker = replace(
        thinker,
        text=text,
        audio=replace(thinker.audio, output_dim=1024, encoder_layers=12),
        vision=replace(thinker.vision, out_hidden_size=1024, depth=16),
    )
    decoder = replace(
        talker.decoder,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
    )
    config = replace(
        SMALL,
        thinker=thinker,
        talker=replace(talker, embedding_size=1024, decoder=decoder),
        codec=None,
    )
    with torch.device("meta"), weights.SkipInit():
        omni = Omni(config)
    omni.thinker.bfloat16(), omni.talker.bfloat16()
    omni.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in omni.parameters():
            parameter.fill_(0.01)
    dit = config.token2wav.dit
    omni.voices = {
        "Ann": Voice("Ann", 4070, torch.zeros(1, dit.enc_emb_dim), torch.zeros(1, 150, dit.mel_dim))
    }
    weights.save(omni, folder, SHARD_BYTES)


def measure(name: str, folder: Path) -> dict:
    imports, load = PROGRAMS[name]
    code = MEASURE.format(imports=imports, load=load)
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def main(runs: int) -> None:
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "model"
        make(folder)
        files = sorted(folder.glob("*.safetensors"))
        print(f"{sum(file.stat().st_size for file in files) / 1e9:.2f} GB in {len(files)} files")
        rows = {name: [] for name in PROGRAMS}
        for turn in range(runs + 1):
            for name in PROGRAMS:
                row = measure(name, folder)
                if turn:  # the first one warms the page cache
                    rows[name].append(row)
                    print(
                        turn,
                        name,
                        *(f"{key} {value:.2f}" for key, value in row.items()),
                        flush=True,
                    )
    medians = {
        name: {key: statistics.median(row[key] for row in rows[name]) for key in rows[name][0]}
        for name in rows
    }
    for key, unit in (("wall", "s"), ("cpu", "s"), ("memory", "MiB")):
        ours, theirs = (medians[name][key] for name in PROGRAMS)
        print(
            f"{key:6} minomni {ours:8.2f} {unit:3}  transformers {theirs:8.2f} {unit:3}  "
            f"ratio {ours / theirs:.2f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
