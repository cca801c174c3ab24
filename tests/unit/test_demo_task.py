"""The demo's task: disjoint parts, one distribution of lengths, equal files from equal seeds, clear errors."""

import json
from pathlib import Path

import pytest

from peerturb.errors import DataError
from peerturb.spec import RunSpec
from peerturb_node.demo import BASE_MODEL_FOLDER, RUN_FILE, task


@pytest.fixture(scope="module")
def parts() -> task.TaskParts:
    return task.make_task(seed=3)


def everything(parts: task.TaskParts) -> list[tuple[task.Example, ...]]:
    return [parts.heldout, *parts.train]


def test_parts_have_the_sizes_asked_for_and_both_labels_equally_often(parts: task.TaskParts) -> None:
    assert [len(part) for part in everything(parts)] == [300, 400, 400, 400, 400]
    for part in everything(parts):
        assert sum(e.label == "doc" for e in part) * 2 == len(part)
        assert {e.label for e in part} == {"doc", "code"}


def test_an_odd_size_gives_the_odd_example_to_doc() -> None:
    parts = task.make_task(nodes=1, train_examples=5, heldout_examples=3)
    assert [sum(e.label == "doc" for e in part) for part in everything(parts)] == [2, 3]


@pytest.mark.parametrize("nodes", [5, 9, 16])
def test_many_nodes_share_the_text_in_smaller_parts(nodes: int) -> None:
    parts = task.make_task(nodes=nodes, seed=1)
    sizes = {len(part) for part in parts.train}
    assert len(parts.train) == nodes
    assert len(parts.heldout) == 300
    assert len(sizes) == 1
    assert sizes.pop() >= 800 // nodes


def test_no_source_and_no_text_is_in_two_parts(parts: task.TaskParts) -> None:
    sources = [{(e.label, e.source) for e in part} for part in everything(parts)]
    assert len(set.union(*sources)) == sum(map(len, sources))
    texts = [e.text for part in everything(parts) for e in part]
    assert len(set(texts)) == len(texts)


def test_parts_are_about_several_topics_and_files(parts: task.TaskParts) -> None:
    for part in everything(parts):
        for label in ("doc", "code"):
            assert len({e.source for e in part if e.label == label}) >= 5


def test_pieces_are_plain_single_lines_of_the_stated_length(parts: task.TaskParts) -> None:
    for part in everything(parts):
        for example in part:
            assert example.text == " ".join(example.text.split())
            assert example.text.isascii()
            assert task.PIECE_CHARS_MIN // 2 <= len(example.text) <= task.PIECE_CHARS_MAX


def test_length_alone_does_not_tell_the_labels_apart(parts: task.TaskParts) -> None:
    examples = [e for part in everything(parts) for e in part]
    best = 0.0
    for threshold in range(task.PIECE_CHARS_MIN // 2, task.PIECE_CHARS_MAX + 1):
        right = sum((len(e.text) > threshold) == (e.label == "doc") for e in examples) / len(examples)
        best = max(best, right, 1 - right)
    assert best < 0.6


def test_equal_seeds_give_equal_files_and_others_do_not(tmp_path: Path) -> None:
    first, again, other = (
        task.write_task(tmp_path / name, nodes=2, train_examples=20, heldout_examples=10, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.heldout.read_bytes() == again.heldout.read_bytes()
    assert [p.read_bytes() for p in first.train] == [p.read_bytes() for p in again.train]
    assert first.heldout.read_bytes() != other.heldout.read_bytes()


def test_files_are_json_lines_with_text_and_label(tmp_path: Path) -> None:
    files = task.write_task(tmp_path / "new" / "folder", nodes=4, train_examples=20, heldout_examples=10)
    assert [p.name for p in (*files.train, files.heldout)] == [
        *(f"train-{node}.jsonl" for node in range(4)),
        "heldout.jsonl",
    ]
    rows = [json.loads(line) for line in files.train[3].read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 20
    assert all(set(row) == {"text", "label"} and row["label"] in ("doc", "code") for row in rows)


def test_a_folder_that_cannot_be_made_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write the demo's data"):
        task.write_task(tmp_path / "file" / "below", nodes=1, train_examples=2, heldout_examples=2)


def test_too_large_a_wish_is_a_data_error_with_the_counts() -> None:
    with pytest.raises(DataError, match=r"too few pieces of label 'doc'.* of \d+ in one part"):
        task.make_task(train_examples=200_000)


@pytest.mark.parametrize("wrong", [{"nodes": 0}, {"train_examples": 1}, {"heldout_examples": 0}])
def test_a_senseless_wish_is_a_data_error(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match="at least one node and two examples"):
        task.make_task(**wrong)


def test_a_python_without_the_documentation_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pydoc_data\.topics"):
        task.make_task()


def test_a_python_without_sources_is_a_data_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no standard-library sources"):
        task.make_task()


def test_code_only_drops_docstrings_and_comments_but_keeps_strings_in_use() -> None:
    source = 'def f(x):\n    """Say what."""\n    y = "# no comment"  # a comment\n    return y\n'
    assert task.code_only(source).split() == ["def", "f(x):", "y", "=", '"#', "no", 'comment"', "return", "y"]
    assert task.code_only("def broken(:") == ""


def test_files_of_the_task_are_not_those_of_the_pretraining() -> None:
    pretrain = pytest.importorskip("peerturb_node.demo.pretrain")
    seen = "\n".join(pretrain.corpus_texts())
    unseen = dict(task.standard_library_files())["asyncio/base_events.py"].read_text(encoding="utf-8")
    assert unseen not in seen
    assert "pydoc_data/topics.py" not in dict(task.standard_library_files())


def test_the_run_file_names_the_committed_base_model() -> None:
    pytest.importorskip("torch")
    from peerturb.zo.digest import run_digest
    from peerturb.zo.model import build_manifest, load_model

    spec = RunSpec.from_toml(RUN_FILE)
    model, _ = load_model(BASE_MODEL_FOLDER, spec.model.dtype)
    manifest = build_manifest(model, spec.model)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert run_digest(manifest, [named[entry.name].data for entry in manifest]).hex() == spec.model.digest
    assert (BASE_MODEL_FOLDER / "model.safetensors").stat().st_size <= 4_000_000


def test_the_base_model_reads_every_piece_and_cannot_do_the_task_yet(parts: task.TaskParts, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from peerturb.zo.batch import Runner
    from peerturb.zo.model import build_manifest, load_model
    from peerturb.zo.objective import Objective

    spec = RunSpec.from_toml(RUN_FILE)
    model, tokenizer = load_model(BASE_MODEL_FOLDER, spec.model.dtype)
    objective = Objective(spec.objective, tokenizer)
    assert set(objective.label_values) == {"doc", "code"}
    assert objective.is_single_token
    sequences = objective.load(task.write_task(tmp_path, seed=3).heldout)
    assert len(sequences) == len(parts.heldout)
    runner = Runner(model, build_manifest(model, spec.model), objective)
    rows = objective.rows(sequences)
    answers = objective.scores(runner.logits(rows), rows).argmax(1)
    right = (answers == rows.answers).double().mean().item()
    assert 0.4 <= right <= 0.6


def test_pretraining_writes_a_model_that_loads_and_equal_seeds_give_equal_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    pretrain = pytest.importorskip("peerturb_node.demo.pretrain")
    texts = [path.read_text(encoding="utf-8") for _, path in task.standard_library_files()[:40]]
    monkeypatch.setattr(pretrain, "corpus_texts", lambda: list(texts))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = pretrain.pretrain(tmp_path / name, steps=2, seed=seed, threads=1)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "c")]
    assert weights[0] == weights[1] != weights[2]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert sum(p.numel() for p in model.parameters()) == result.parameters == 869_504
    assert tokenizer.decode(tokenizer("def f(x):\n    return x")["input_ids"]) == "def f(x):\n    return x"


def test_pretraining_without_enough_text_is_a_data_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretrain = pytest.importorskip("peerturb_node.demo.pretrain")
    monkeypatch.setattr(pretrain, "corpus_texts", lambda: ["pass\n"])
    with pytest.raises(DataError, match="only 0 windows"):
        pretrain.pretrain(tmp_path, steps=1, seed=0, threads=1)
