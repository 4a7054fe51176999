"""The table says what the log says; the figures are drawn from what is there."""

import matplotlib.image
import numpy as np
import pytest

from jaxdpo.analysis import report
from jaxdpo.analysis.row_table import row_table
from jaxdpo.metrics import MetricsWriter


@pytest.fixture
def run(tmp_path):
    for stage, names in (
        ("sft", ("loss", "loss_per_token", "grad_norm")),
        ("dpo", [name for _, curves in report.PANELS["dpo"] for name, *_ in curves]),
    ):
        with MetricsWriter(tmp_path / stage, after=None) as writer:
            writer.write({"step": 0} | {f"eval/{name}": 1.0 for name in names})
            for step in range(1, 21):
                writer.write({"step": step} | {f"train/{name}": step / 10 for name in names})
            writer.write({"step": 21} | {f"eval/{name}": 0.25 for name in names})
    return tmp_path


def test_summary_by_hand(run):
    rows = report.summary(report.read_metrics(run / "dpo"), "dpo")
    # The first tenth of twenty steps is steps 1 and 2, the last 19 and 20.
    assert ("dpo", "rewards/margins", "0.1500", "1.9500", "1.0000", "0.2500") in rows
    assert [row[1] for row in rows][0] == "loss"


def test_figures_and_table_are_written(run):
    report.write(run, ("sft", "dpo"))
    for name in ("sft_loss.png", "rewards.png"):
        image = matplotlib.image.imread(run / name)
        assert image.shape[0] > 300 and len(np.unique(image.reshape(-1, 4), axis=0)) > 50
    lines = (run / "summary.md").read_text().splitlines()
    assert lines[0].count("|") == 7 and any("rewards/accuracies" in line for line in lines)


def test_running_mean_looks_back_only():
    values = np.arange(40.0)
    smooth = report._running_mean(values)  # a window of two
    np.testing.assert_allclose(smooth[:3], [0.0, 0.5, 1.5])


def test_row_table_shows_what_each_token_predicts():
    from examples import token_store

    from jaxdpo import synthetic
    from jaxdpo.batching import RowShape, rows

    pieces = synthetic.tokenizer()
    store = token_store([[2, 2, 3]], vocab_size=pieces.get_vocab_size())
    _, chosen, rejected = store[0]
    table = row_table(rows(store, [[0]], RowShape(6, 5)), 0, pieces)
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert cells[0] == ["0", "1", "2", "3", "4"]
    assert cells[3] == ["prompt", "prompt", "chosen", "rejected", "rejected"]
    predicts = [[int(cell.split()[0]) if cell else None for cell in column] for column in cells[6:]]
    # The prompt's last token predicts the first of both; the last of each is the EOS, 0.
    assert predicts[0] == [None, chosen[0], 0, None, None]
    assert predicts[1] == [None, rejected[0], None, rejected[1], 0]
    assert "5 tokens are scored; 1 places of padding" in str(table.caption)
