"""plot_run.py with matplotlib: a picture with the figures of metrics.jsonl in it."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.figure
import matplotlib.image
import matplotlib.text
import numpy as np
import pytest
from script import call, script
from test_plot_run import written

from milepost.plots.curves import smoothed

plot = script("plot_run")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run, its child from step 2 on, and another."""
    written(tmp_path, "a1", losses=[3.0, 2.0, 1.0])
    written(tmp_path, "child", losses=[1.5, 1.25], before=2, parent={"run_id": "a1", "step": 2})
    written(tmp_path, "b1", losses=[3.0, 2.75], since=2000.0)
    return tmp_path


def test_the_axes_hold_the_values_of_the_runs_and_their_parents(folder, monkeypatch):
    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *words, **more: (figures.append(self), save(self, *words, **more)),
    )
    output = folder / "curves.png"
    said = call(plot, folder, RUN="child,b1", OUTPUT=str(output))
    assert (said.code, said.out) == (0, "")
    (figure,) = figures
    loss, rate, speed = figure.axes
    assert loss.bbox.width > 2 * rate.bbox.width
    assert loss.get_xlim() == rate.get_xlim()
    drawn = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle())
        for line in loss.lines
        if line.get_label() != "_"
    }
    validation = [line for line in loss.lines if line.get_marker() == "o"]
    assert drawn == {
        "a1": ([1, 2], [3.0, 2.0], "--"),
        "child (from a1 at step 2)": ([3, 4], [1.5, 1.25], "-"),
        "b1": ([1, 2], [3.0, 2.75], "-"),
    }
    assert [list(line.get_ydata()) for line in validation] == [[], [1.75], [3.25]]
    assert all(list(line.get_ydata()) == [0.1, 0.1] for line in rate.lines)
    assert speed.get_ylim()[0] == 0


NAMES = [r"a$\x$", r"$\frac{1}$", "$", "$$", r"\\$x_$", "a_$^{", "_hidden", "a%b", "a&<b>"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_name_is_drawn_as_it_is_written(name, suffix, folder, monkeypatch):
    """matplotlib takes what is between dollar signs as mathematics, and leaves out what begins with an underscore."""
    place = written(folder, name, losses=[3.0, 2.0], since=5000.0, parent={"run_id": None, "file": name, "step": 0})
    lines = (place / "metrics.jsonl").read_text().replace('"tok_s"', f"{json.dumps(name)}: 1.0, " + '"tok_s"')
    (place / "metrics.jsonl").write_text(lines)
    texts: list[str] = []
    save = matplotlib.figure.Figure.savefig

    def saving(figure, *words, **more):
        texts.extend(text.get_text() for text in figure.findobj(matplotlib.text.Text) if not text.get_parse_math())
        save(figure, *words, **more)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", saving)
    output = folder / f"curves{suffix}"
    said = call(plot, folder, OUTPUT=str(output))
    assert said.code == 0, said.err
    assert name in texts  # the title of its metric
    assert f"{name} (weights from {name} at step 0)" in texts  # the legend
    assert output.stat().st_size > 1000


def test_a_png_in_color_and_no_other_file(folder):
    output = folder / "curves.png"
    assert call(plot, folder, RUN="a1,b1", OUTPUT=str(output)).code == 0
    pixels = matplotlib.image.imread(output)
    assert pixels.shape == (960, 1440, 4)
    for colour in ("#1f77b4", "#ff7f0e"):  # the first two of matplotlib's cycle
        wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        assert (np.abs(pixels[..., :3] - wanted).max(axis=-1) < 0.02).sum() > 100
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "letters.txt", "runs"]
    before = output.read_bytes()
    assert call(plot, folder, RUN="a1,b1", OUTPUT=str(output)).code == 0  # it may be drawn again
    assert output.read_bytes() == before


@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".PNG"])
def test_other_file_types(suffix, folder):
    output = folder / f"curves{suffix}"
    assert call(plot, folder, RUN="a1", OUTPUT=str(output)).code == 0
    assert output.read_bytes()[:4] == {".svg": b"<?xm", ".pdf": b"%PDF", ".PNG": b"\x89PNG"}[suffix]
    if suffix == ".svg":
        root = ElementTree.parse(output).getroot()
        assert "prefers-color-scheme: dark" in root[0].text


def test_a_long_training_loss_is_smoothed_and_its_own_values_stay_behind_it():
    values = [float(at % 2) for at in range(1000)]
    smooth = smoothed(values)
    assert len(smooth) == len(values)
    assert max(smooth[20:-20]) - min(smooth[20:-20]) < 0.1  # of a range of 1
    assert smoothed(values[:99]) == values[:99]


def test_a_failed_write_leaves_the_old_picture(folder, monkeypatch):
    output = folder / "curves.png"
    output.write_bytes(b"old")

    def full(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    said = call(plot, folder, RUN="a1", OUTPUT=str(output))
    assert (said.code, output.read_bytes()) == (1, b"old")
    assert "No space left on device" in said.err
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "letters.txt", "runs"]
