"""The measurement of the reward `math`, on a few truths."""

import json

import pyarrow
import pyarrow.parquet

from benchmarks import graders


def test_graders_are_measured(tmp_path, capsys):
    truths = ["1/2", r"\frac{1}{2}", "3"]
    rows = pyarrow.table({"reward_model": [{"ground_truth": truth} for truth in truths]})
    pyarrow.parquet.write_table(rows, tmp_path / "truths.parquet")
    (tmp_path / "gsm8k.jsonl").write_text('{"answer": "so #### 1,080"}\n{"answer": "#### 72"}\n')
    files = {
        "truths": tmp_path / "truths.parquet",
        "gsm8k": tmp_path / "gsm8k.jsonl",
        "output": tmp_path / "out.json",
    }
    graders.measure(tasks=4, samples=4, workers=1, repeats=1, alone=True, **files)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == json.loads(capsys.readouterr().out)
    assert found["speed"]["gradings_a_repeat"] == 16 and found["speed"]["gradings_per_second"] > 0
    table = found["truths.parquet"]
    assert table["self_correct"] == 1.0 and table["other_wrong"] == 2 / 3
    assert table["not_other_wrong"] == [["1/2", r"\frac{1}{2}", 1.0]]
    assert table["not_math_verify_self_correct"] == table["not_math_verify_other_wrong"] == []
    assert found["gsm8k.jsonl"]["other_wrong"] == 1.0
