"""The stage `sample`: what it draws from raw records, and what it refuses."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_scalebio.commands import sample as sample_command
from megatron_scalebio.data.prepare import PrepareConfig, SourceInput, prepare
from megatron_scalebio.errors import UserError
from megatron_scalebio.sample.config import SampleConfig, WeightedSource
from megatron_scalebio.sample.stage import sample
from tests.data.sample_world import World, alpaca, write

ROOT = Path(__file__).resolve().parents[2]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sample.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def test_sample_by_weight(world: World) -> None:
    (manifest,) = world.sample("out")
    folder = world.root / "out"
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert (manifest["asked"], manifest["given"], manifest["redistributed"]) == (20, 20, 0)
    big, small = manifest["sources"]
    assert [(e["asked"], e["given"], e["epochs"]) for e in (big, small)] == [
        (4, 4, 0.1),
        (16, 16, 1.6),
    ]
    found = lines(folder)
    assert Counter(record["sampled_from"] for record in found) == {"big": 4, "small": 16}
    assert [r["sampled_from"] for r in found] != sorted(r["sampled_from"] for r in found)
    for name, entry, records in (
        ("big", big, alpaca("big", 40)),
        ("small", small, alpaca("small", 10)),
    ):
        (file,) = entry["inputs"]
        assert file["rows"] == len(records)
        taken = [{**records[row], "sampled_from": name} for row in file["taken"]]
        key = json.dumps
        assert sorted(map(key, taken)) == sorted(key(r) for r in found if r["sampled_from"] == name)
    assert max(Counter(small["inputs"][0]["taken"]).values()) == 2
    # The prepared set is what prepare makes of sample.jsonl, and is a source as it is.
    assert manifest["sample_sha256"] == digests(folder)["sample.jsonl"]
    again = (SourceInput("again", (folder / "sample.jsonl",)),)
    (report,) = prepare(PrepareConfig(world.root, again, str(world.tokenizer), seq_length=64))
    made = json.loads((folder / "source.json").read_text())
    assert made["fingerprint"] == report["fingerprint"] == manifest["fingerprint"]
    assert made["inputs"] == report["inputs"] and made["examples"] == 20
    assert (
        sample(SampleConfig(world.root / "of_sample", (WeightedSource("s", str(folder), 1.0),), 5))[
            0
        ]["given"]
        == 5
    )
    assert sorted(p.name for p in world.root.iterdir() if p.name.startswith(".")) == []


def test_same_inputs_and_seed_give_the_same_bytes(world: World) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        world.sample(f"{out}/sample", seed=seed)
    same, other = digests(world.root / "b/sample"), digests(world.root / "c/sample")
    first = digests(world.root / "a/sample")
    assert {n for n in first if first[n] != same[n]} <= {"source.json"}  # it holds its own path
    assert first["sample.jsonl"] != other["sample.jsonl"]
    for seed in (1, 2):
        world.sample(f"whole/{seed}", seed=seed, num_samples=50, max_epochs=1)
    every = [lines(world.root / f"whole/{seed}") for seed in (1, 2)]
    by_id = [sorted(map(json.dumps, records)) for records in every]
    assert by_id[0] == by_id[1] and every[0] != every[1], "the same 50 rows, in another order"
    world.sample("w/sample", seed=1, workers=2)
    assert digests(world.root / "w/sample")["manifest.json"] == first["manifest.json"]


def test_surplus_above_the_cap_goes_to_the_others(world: World) -> None:
    (manifest,) = world.sample("out", max_epochs=1)
    big, small = manifest["sources"]
    assert (big["asked"], big["given"], big["received"]) == (4, 10, 6)
    assert (small["asked"], small["given"], small["surplus"]) == (16, 10, 6)
    assert manifest["redistributed"] == 6 and manifest["given"] == 20
    config = SampleConfig(world.root / "out", (), 20, max_epochs=1)
    assert sample_command.remarks([manifest], config)[0] == (
        "warning: not in the proportions asked for: big 50.0% for 20.0%, small 50.0% for 80.0%; "
        "about --num-samples 12 keeps them, or more --max-epochs"
    )
    (manifest,) = world.sample("all", num_samples=1000, max_epochs=2)
    assert manifest["given"] == 100 and [e["given"] for e in manifest["sources"]] == [80, 20]


def test_contaminated_rows_are_never_drawn(world: World) -> None:
    told = "one two three four five six seven eight nine ten eleven twelve thirteen"
    rows = alpaca("goal", 5)
    rows[1]["output"] = f"It is {told}."
    write(world.root / "big.jsonl", [*alpaca("big", 6), *rows[:1], {**rows[2], "output": "no"},
          {"instruction": "count", "output": told}])  # fmt: skip
    goal = write(world.root / "goal.jsonl", rows)
    source = WeightedSource("big", str(world.root / "big.jsonl"), 1.0)
    for exclude in ((("goal", str(goal)),), (("goal", str(goal)), ("small", str(world.small)))):
        (manifest,) = world.sample(f"out{len(exclude)}", source, exclude=exclude, max_epochs=9,
                                   num_samples=99, tokenizer=str(world.tokenizer))  # fmt: skip
        (entry,) = manifest["sources"]
        assert entry["contaminated"] == {"exact": 1, "prompt": 1, "ngram": 1}
        assert (entry["rows"], entry["usable"], entry["given"]) == (9, 6, 54)
        assert set(entry["inputs"][0]["taken"]) == set(range(6))
    against = manifest["contamination"]["against"]
    assert [(e["name"], e["examples"]) for e in against] == [("goal", 5), ("small", 10)]
    with pytest.raises(UserError, match="no usable row is left"):
        world.sample(
            "none", source, exclude=(("big", source.path),), tokenizer=str(world.tokenizer)
        )
    assert not (world.root / "none").exists()


def test_benchmarks_in_a_format_of_their_own_can_be_excluded(world: World) -> None:
    told = "one two three four five six seven eight nine ten eleven twelve thirteen"
    goal = [{"question": "big question 3", "answer": "other", "idx": 3},
            {"turns": ["big question 5", "And then?"], "reference": {"a": [told]}}]  # fmt: skip
    exclude = (("bench", str(write(world.root / "bench.jsonl", goal))),)
    write(world.big, [*alpaca("big", 6), {"instruction": "x", "output": told}])
    (manifest,) = world.sample("out", WeightedSource("big", str(world.big), 1.0), exclude=exclude,
                               num_samples=99, tokenizer=str(world.tokenizer))  # fmt: skip
    assert manifest["sources"][0]["contaminated"] == {"exact": 0, "prompt": 2, "ngram": 1}
    assert set(manifest["sources"][0]["inputs"][0]["taken"]) == {0, 1, 2, 4}


def test_rows_that_give_no_example_are_replaced(world: World) -> None:
    records = [{**r, "output": r["output"] * (k % 2)} for k, r in enumerate(alpaca("half", 40))]
    world.prepare(half=write(world.root / "half.jsonl", records))
    (manifest,) = world.sample("out", world.source("half"), num_samples=15)
    (entry,) = manifest["sources"]
    assert entry["given"] == 15 and all(row % 2 for row in entry["inputs"][0]["taken"])
    assert entry["no_example"]["no_target"] > 0
    (manifest,) = world.sample("more", world.source("half"), num_samples=999, max_epochs=2)
    assert manifest["given"] == 40 and manifest["sources"][0]["no_example"]["no_target"] == 20


def test_weights_count_examples_where_a_text_becomes_several(
    world: World, corpus: list[str]
) -> None:
    world.prepare(web=write(world.root / "web.jsonl", [{"text": text} for text in corpus]))
    (manifest,) = world.sample("out", world.source("web", 0.5), world.source("big", 0.5))
    web, big = manifest["sources"]
    assert web["examples_per_row"] > 3 and big["examples_per_row"] == 1
    share = web["examples"] / (web["examples"] + big["examples"])
    assert 0.3 < share < 0.7 and web["given"] < big["given"] / 2
    assert manifest["examples"] == web["examples"] + big["examples"]


def test_per_source(world: World) -> None:
    first, second = world.sample("out", per_source=15)
    assert [(m["asked"], m["given"], m["max_epochs"]) for m in (first, second)] == [
        (15, 15, 1),
        (15, 10, 1),
    ]
    assert len(lines(world.root / "out/big")) == 15 and len(lines(world.root / "out/small")) == 10
    assert json.loads((world.root / "out/big/source.json").read_text())["name"] == "big"


def test_prepared_examples_can_be_drawn_without_the_raw_files(world: World) -> None:
    world.prepare(goal=write(world.root / "goal.jsonl", alpaca("big", 3)))
    for path in (world.big, world.small):
        path.unlink()
    with pytest.raises(UserError, match=r"big.jsonl: the raw file of 'big' is gone .*from-tokens"):
        world.sample("out")
    exclude = (("goal", str(world.root / "data/goal")),)
    (manifest,) = world.sample("out", from_tokens=True, exclude=exclude)
    assert manifest["sources"][0]["contaminated"]["exact"] == 3
    assert manifest["sample_sha256"] is None and not (world.root / "out/sample.jsonl").exists()
    taken = manifest["sources"][1]["taken"]
    old, new = (IndexedDataset(str(p / "tokens")) for p in
                (world.root / "data/small", world.root / "out"))  # fmt: skip
    given = [new[k].tolist() for k in range(len(new))]
    assert all(old[row].tolist() in given for row in taken) and len(given) == 20


def test_sets_prepared_with_another_tokenizer_are_compared_by_their_raw_files(
    world: World, sentence_piece: Path
) -> None:
    goal = write(world.root / "goal.jsonl", alpaca("big", 3))
    other = (SourceInput("goal", (goal,)),)
    prepare(PrepareConfig(world.root / "other", other, str(sentence_piece), seq_length=256))
    exclude = (("goal", str(world.root / "other/goal")),)
    (manifest,) = world.sample("out", from_tokens=True, exclude=exclude)
    assert manifest["sources"][0]["contaminated"]["exact"] == 3
    (against,) = manifest["contamination"]["against"]
    assert (against["examples"], against["inputs"][0]["path"]) == (3, str(goal))
    (manifest,) = world.sample("raw", from_tokens=True, exclude=(("goal", str(goal)),))
    assert manifest["sources"][0]["contaminated"]["exact"] == 3
    goal.unlink()
    for from_tokens in (True, False):
        with pytest.raises(UserError, match=r"other/goal: 'goal' was prepared with .*--exclude"):
            world.sample("gone", from_tokens=from_tokens, exclude=exclude)


def test_only_selected_examples_are_drawn(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    run = world.root / "run"
    run.mkdir()
    paths = {name: str(world.root / f"data/{name}/tokens") for name in ("big", "small")}
    given = (("big", 0.6), ("small", 0.4))
    weights = [{"name": name, "path": paths[name], "weight": w} for name, w in given]
    selected = [{"name": "big", "taken": [3, 5, 8]}, {"name": "small", "taken": [0, 9]}]
    (run / "weights.json").write_text(json.dumps({"sources": weights}))
    (run / "selected.json").write_text(json.dumps({"sources": selected}))
    assert command(world, "--weights", str(run), "--num-samples", "10", "--max-epochs", "4") == 0
    assert "37 not selected" in capsys.readouterr().out
    big, small = json.loads((world.root / "out/manifest.json").read_text())["sources"]
    assert set(big["taken"]) == {3, 5, 8} and set(small["taken"]) == {0, 9}
    assert (big["given"], small["given"], big["usable"]) == (6, 4, 3)
    so_far = {"sources": weights, "complete": False, "step": 7}
    (run / "weights.json").write_text(json.dumps(so_far))
    assert command(world, "--weights", str(run), "--num-samples", "10", "--overwrite") == 0
    assert "weights so far of a run stopped at step 7" in capsys.readouterr().err
    selected[0]["taken"] = [40]
    (run / "selected.json").write_text(json.dumps({"sources": selected}))
    with pytest.raises(UserError, match="'big' has 40 examples, and one chosen is beyond them"):
        command(world, "--weights", str(run), "--num-samples", "10", "--overwrite")


def test_refusals(world: World, sentence_piece: Path) -> None:
    big = world.source("big")
    raw = WeightedSource("raw", str(world.big), 1.0)
    cases: list[tuple[str, tuple[WeightedSource, ...], dict[str, Any]]] = [
        (r"--num-samples: 0 is below 1", (big,), {"num_samples": 0}),
        (r"--seed: 4294967296 does not fit 32 bits", (big,), {"seed": 2**32}),
        (r"--num-samples: give exactly one", (big,), {"per_source": 3, "num_samples": 3}),
        (r"--max-epochs: 0 is below 1", (big,), {"max_epochs": 0}),
        (r"gone: source 'x' is not there", (WeightedSource("x", "gone", 1.0),), {}),
        (r"--tokenizer: is needed for raw files", (raw,), {}),
        (r"does not become the example .*--train-on-prompt", (big,), {"train_on_prompt": True}),
        (r"'raw' is raw text, and the sample is drawn", (big, raw), {"from_tokens": True}),
        (r"is not the tokenizer that the sources", (big,),
         {"from_tokens": True, "tokenizer": str(sentence_piece)}),
        (r"data: exists and is not empty", (big,), {"out": "data"}),
    ]  # fmt: skip
    for message, sources, options in cases:
        with pytest.raises(UserError, match=message):
            world.sample(options.pop("out", "out"), *sources, **options)
        assert not (world.root / "out").exists()
    write(world.big, alpaca("other", 40))
    with pytest.raises(UserError, match=r"big.jsonl: has changed since 'big' was prepared"):
        world.sample("out")
    world.big.write_text('{"instruction": "a", "output": "b"}\n{nonsense\n')
    with pytest.raises(UserError, match=r"big.jsonl:2: malformed JSON"):
        world.sample("out", raw, tokenizer=str(world.tokenizer))


def command(world: World, *words: str) -> int:
    parser = argparse.ArgumentParser()
    sample_command.add_arguments(parser)
    return sample_command.run(parser.parse_args([*words, "--out", str(world.root / "out")]))


def test_command_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    run = world.root / "run"
    run.mkdir()
    world.prepare(goal=write(world.root / "goal.jsonl", alpaca("big", 3)))
    paths = {name: str(world.root / f"data/{name}/tokens") for name in ("big", "small", "goal")}
    sources = [
        {"name": n, "path": paths[n], "weight": w} for n, w in (("big", 0.2), ("small", 0.8))
    ]
    (run / "weights.json").write_text(json.dumps({"sources": sources}))
    (run / "blend.json").write_text(json.dumps({"valid": ["1.0", paths["goal"]]}))
    assert command(world, "--weights", str(run), "--num-samples", "20", "--max-epochs", "1") == 0
    printed = capsys.readouterr().out
    assert "3 exact" in printed and "compared with goal" in printed
    assert "6 rows beyond 1 epochs of small were taken from the other sources" in printed
    asked = ("--weights", str(run), "--num-samples", "3", "--overwrite", "--exclude")
    wordless = write(world.root / "wordless.jsonl", [{"text": "🙂"}, {"text": "?!"}])
    none = world.root / "none.json"
    none.write_text("[]")
    for message, words in (
        (r"--weights: is missing", ("--input", f"a={world.big}", "--num-samples", "3")),
        (r"'a' gives no weight", ("--weights", "a", "b=1", "--num-samples", "3")),
        (r"the weight of 'a' is -1.0", ("--weights", "a=-1", "--num-samples", "3")),
        (r"has no source 'a'", ("--weights", "a=1", "--num-samples", "3")),
        (r"cannot read the weights", ("--weights", "none", "--num-samples", "3")),
        (r"holds no weights", ("--weights", str(run / "blend.json"), "--num-samples", "3")),
        (r"'wordless' holds no words in 2 examples", (*asked, f"wordless={wordless}")),
        (r"'none' holds no words in 0 examples", (*asked, f"none={none}")),
    ):
        with pytest.raises(UserError, match=message):
            command(world, *words)


def test_sample_mixture_tool(world: World) -> None:
    words = ["--weights", "a=1", "b=3", "--num-samples", "8", "--input", f"b={world.small}",
             "--tokenizer", str(world.tokenizer), "--out", str(world.root / "out")]  # fmt: skip
    tool = [sys.executable, str(ROOT / "tools" / "sample_mixture.py"), *words, "--input"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [subprocess.run([*tool, f"a={path}"], env=env, capture_output=True, text=True)
            for path in (world.root / "gone", world.big)]  # fmt: skip
    assert runs[0].returncode == 2 and "source 'a' is not there" in runs[0].stderr
    assert runs[1].returncode == 0, runs[1].stderr
    assert Counter(r["sampled_from"] for r in lines(world.root / "out")) == {"a": 2, "b": 6}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(world: World) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from megatron_scalebio.sample.stage import sample\n"
        "from megatron_scalebio.sample.config import SampleConfig, WeightedSource\n"
        "out, path, goal, tokenizer = sys.argv[1:]\n"
        "sources = (WeightedSource('s', path, 1.0),)\n"
        "sample(SampleConfig(Path(out), sources, 100, exclude=(('goal', goal),),\n"
        "                    tokenizer=tokenizer))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peak_mb = []
    for megabytes in (4, 80):
        path = world.root / f"{megabytes}.jsonl"
        record = {"text": "A few words to tokenize.", "meta": ["m" * 990] * 4}
        line = json.dumps(record) + "\n"
        with open(path, "w") as file:
            file.writelines(line for _ in range(megabytes * 250))
        words = [str(world.root / f"out{megabytes}"), str(path), str(world.small)]
        command = [sys.executable, "-c", code, *words, str(world.tokenizer)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        peak = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
        peak_mb.append(int(peak) / 1024)
    assert peak_mb[1] - peak_mb[0] < 16
