"""Execute the notebooks and write their outputs back: python tests/refresh_notebooks.py [part of a
name ...].

The only way by which outputs change. Every notebook runs from top to bottom in a fresh kernel; what
depends on the machine or the day is taken out, pictures and sounds are made small, and the header
gets the seconds that were measured. Then the answers to each *Predict* are folded in all notebooks,
and the table of chapters in the READMEs is written anew from the headers; `python
tests/refresh_notebooks.py README` does these two alone.
"""

import base64
import io
import os
import re
import sys
import time
from math import ceil
from pathlib import Path

import chapters
import nbformat
import soundfile
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
BUDGET = re.compile(r"run in (\d+|\?) s\b")  # the words of the header that hold the measured time
PREDICT = re.compile(r"\*Predict\b")  # a question whose answer the next code cell prints
FOLDED = {"jupyter": {"outputs_hidden": True}}  # JupyterLab shows three dots instead of outputs
COLORS = 64  # of a stored figure: a third of the bytes of full color, and no eye sees it
SOUND = re.compile(r"data:audio/wav;base64,([A-Za-z0-9+/=]+)")
PHOTOGRAPH = 8192  # more colors than this and it is a photograph, in whose sky an eye would see it


def refresh(path: Path) -> float:
    """Run one notebook, clean it, write it back -> seconds. Raises nbclient's CellExecutionError if
    a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    begun = time.monotonic()
    NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    seconds = time.monotonic() - begun
    clean(notebook)
    header = notebook.cells[0]
    header.source = BUDGET.sub(
        f"run in {5 * ceil(seconds / 5)} s", header.source
    )  # coarse, so that it seldom changes
    nbformat.write(notebook, path)
    return seconds


def clean(notebook) -> None:
    """Keep of a run notebook what would be the same on another machine. In place."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(codes, start=1):
        cell.execution_count, cell.outputs = count, merged(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "text" in output:
                output.text = output.text.replace(f"{ROOT}{os.sep}", "")
            if "data" in output:
                shown_size = output.metadata.get("image/png")  # of a figure at 2x resolution
                figure = output.data.pop("image/png", None)
                output.data = {
                    kind: data.replace(f"{ROOT}{os.sep}", "") for kind, data in output.data.items()
                }
                if "text/html" in output.data:
                    output.data["text/html"] = with_flac(output.data["text/html"])
                picture = small(figure, shown_size) if figure else {}
                output.data |= picture
                output.metadata = dict.fromkeys(picture, shown_size) if shown_size else {}
    fold_answers(notebook)


def fold_answers(notebook) -> None:
    """Let JupyterLab fold the outputs of the first code cell that has some after a *Predict*, so
    that a reader can predict first. No other code cell keeps metadata. In place.
    """
    asked = False
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            asked = asked or PREDICT.search(cell.source) is not None
        elif cell.cell_type == "code":
            answers = asked and bool(cell.outputs)
            cell.metadata = dict(FOLDED) if answers else {}
            asked = asked and not answers


def merged(outputs) -> list:
    """Pieces of one stream that follow one another as one output: how they were cut depends on
    timing.
    """
    kept = []
    for output in outputs:
        if (
            kept
            and output.output_type == kept[-1].output_type == "stream"
            and output.name == kept[-1].name
        ):
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def small(png: str, shown: dict[str, int] | None = None) -> dict[str, str]:
    """A PNG in base64 -> the same picture as a PNG with a palette, or a photograph as a JPEG, under
    its MIME type. shown: the size at which a page shows it; a photograph keeps no more pixels.
    """
    picture, file = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    photograph = picture.getcolors(PHOTOGRAPH) is None
    if photograph:
        if shown:
            picture = picture.resize((shown["width"], shown["height"]), Image.Resampling.LANCZOS)
        picture.save(file, "JPEG", quality=75, optimize=True)
    else:
        picture.quantize(COLORS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            file, "PNG", optimize=True
        )
    return {"image/jpeg" if photograph else "image/png": base64.b64encode(file.getvalue()).decode()}


def with_flac(page: str) -> str:
    """HTML with its sounds as FLAC instead of WAV: three quarters of the bytes, no sample lost."""
    found = SOUND.sub(lambda sound: f"data:audio/flac;base64,{flac(sound[1])}", page)
    return found.replace('type="audio/wav"', 'type="audio/flac"')


def flac(wav: str) -> str:
    """A WAV of 16 bits in base64 -> the same samples as FLAC, in base64."""
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(wav)), dtype="int16")
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return base64.b64encode(file.getvalue()).decode()


def main(wanted: list[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if not wanted or any(word in path.name for word in wanted):
            print(f"{path.name}: {refresh(path):.0f} s, {path.stat().st_size // 1000} kB")
        else:
            notebook = nbformat.read(path, as_version=4)
            fold_answers(notebook)
            nbformat.write(notebook, path)
    chapters.write()


if __name__ == "__main__":
    main(sys.argv[1:])
