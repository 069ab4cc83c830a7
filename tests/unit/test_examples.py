"""The examples and the programs that other tests run: they do what they claim, alone and without an agent."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from hpcft.data import JsonLines
from hpcft.errors import UnusableError
from hpcft.examples import sized, text
from hpcft.examples.gpt import GPT, Bytes, Settings, learning_rate

torch.set_num_threads(1)

PROGRAMS = Path(__file__).parents[1] / "programs"
SMALL = Settings(width=32, layers=2, heads=2, context=64, batch_size=8, dropout=0.0)


@pytest.fixture(scope="module")
def topics_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text.prepare(tmp_path_factory.mktemp("text") / "topics")


def python(*arguments: str, timeout: float = 120) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


# --- the text


def test_the_text_is_complete_and_in_pieces(topics_text: Path) -> None:
    records = [record for shard in sorted(topics_text.iterdir()) for record in JsonLines(shard)]  # type: ignore[attr-defined]
    pieces = [record["text"] for record in records]
    assert sorted(pieces) == sorted(text.pieces())
    assert "".join(text.pieces()) == "".join(topics[name].strip() + "\n" for name in sorted(topics))
    assert len(pieces) > 1000 and min(map(len, pieces)) >= 32 and max(map(len, pieces)) <= text.CHARACTERS


def test_prepared_text_is_left_as_it_is(topics_text: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in topics_text.iterdir()}
    assert str(topics_text) in python("-m", "hpcft.examples.text", str(topics_text))
    assert {path: path.stat().st_mtime_ns for path in topics_text.iterdir()} == before


def test_many_processes_may_prepare_the_same_directory_at_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(6) as pool:
        made = pool.map(text.prepare, [tmp_path / "new" / "topics"] * 12, chunksize=1)
    assert set(made) == {tmp_path / "new" / "topics"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["topics"]
    assert len(JsonLines(made[0])) == len(list(text.pieces()))


def test_other_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("mine", "file"):
        with pytest.raises(UnusableError, match=rf"text cannot be put into .*{name}: "):
            text.prepare(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


# --- the model


def test_samples_are_bytes_padded_with_zeros(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "abc"}\n{"text": "' + "é" * 100 + '"}\n')
    samples = Bytes(JsonLines(tmp_path), context=7)
    assert samples[0].tolist() == [97, 98, 99, 0, 0, 0, 0, 0]
    assert samples[1].shape == (8,) and set(samples[1].tolist()) == set("é".encode())


def test_a_byte_is_predicted_from_those_before_it() -> None:
    torch.manual_seed(0)
    model = GPT(SMALL).eval()
    one = torch.randint(256, (2, 64))
    other = one.clone()
    other[:, 40:] = torch.randint(256, (2, 24))
    with torch.no_grad():
        first, second = model(one), model(other)
    assert first.shape == (2, 64, 256)
    assert torch.equal(first[:, :40], second[:, :40])
    assert not torch.equal(first[:, 40:], second[:, 40:])


def test_gradients_have_the_same_bits_every_time() -> None:
    torch.manual_seed(0)
    model = GPT(SMALL)
    tokens = torch.randint(256, (8, 64))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    assert len(expected) == len(list(model.parameters()))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


def test_the_learning_rate_warms_up_and_falls() -> None:
    settings = Settings(steps=300, warmup=20, learning_rate=1.0)
    rates = [learning_rate(settings, step) for step in range(320)]
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert max(rates) == 1.0 and rates[300] == rates[319] == pytest.approx(0.1)


@pytest.mark.local
@pytest.mark.parametrize("parameters", [20_000, 300_000, 2_000_000])
def test_a_model_has_about_as_many_parameters_as_were_asked_for(parameters: int) -> None:
    settings = sized.Settings(parameters=parameters)
    model, _, data = sized.build(settings, torch.device("cpu"))
    there = sum(parameter.numel() for parameter in model.parameters())
    assert there == sized.shape_of(parameters, settings.context).parameters(settings.context)
    assert there == pytest.approx(parameters, rel=0.15 if parameters < 100_000 else 0.03)
    assert data.state_dict()["samples"] == settings.samples


@pytest.mark.parametrize("parameters", [125_000_000, 1_300_000_000, 70_000_000_000])
def test_large_models_have_the_proportions_of_large_models(parameters: int) -> None:
    shape = sized.shape_of(parameters, 32)
    assert shape.parameters(32) == pytest.approx(parameters, rel=0.03)
    assert 16 <= shape.width / shape.layers <= 256


def test_made_up_samples_are_determined_by_their_number() -> None:
    data = sized.MadeUp(8, context=16)
    assert torch.equal(data[3], data[3])
    assert not torch.equal(data[3], data[4])
    assert data[7].shape == (17,)
    assert int(data[7].max()) < 256


def test_a_model_can_be_too_small() -> None:
    with pytest.raises(ValueError, match="the smallest has"):
        sized.shape_of(sized.SMALLEST - 1, 32)


def test_the_example_trains_alone_and_its_loss_falls(topics_text: Path) -> None:
    program = (
        "import functools, hpcft; from hpcft.examples import gpt; gpt.Settings = functools.partial(gpt.Settings, "
        f"data={str(topics_text)!r}, steps=120, width=32, layers=2, context=64, batch_size=16); hpcft.main(gpt.train)"
    )
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", python("-c", program))]
    assert len(losses) == 6
    assert losses[-1] < 3.4 and losses[-1] < losses[0] - 0.2


# --- programs of other tests


@pytest.mark.drill
@pytest.mark.local
def test_the_bit_exact_program_has_the_same_bits_with_and_without_loader_processes(tmp_path: Path) -> None:
    program = f"""
import functools, sys
sys.path.insert(0, {str(PROGRAMS)!r})
import exact, hpcft
exact.Settings = functools.partial(exact.Settings, steps=20, width=64, out=sys.argv[1])
exact.Data = functools.partial(exact.Data, workers=int(sys.argv[2]), seed=int(sys.argv[3]))
hpcft.main(exact.train)
"""
    for name, workers, seed in (("a", 0, 1), ("b", 2, 1), ("c", 0, 2)):
        python("-c", program, str(tmp_path / name), str(workers), str(seed))
    a, b, c = ((tmp_path / name).read_text() for name in "abc")
    assert re.fullmatch(r"[0-9a-f]{64}\n", a)
    assert a == b != c


@pytest.mark.drill
@pytest.mark.local
def test_the_plain_program_runs_under_torchrun_and_resumes(tmp_path: Path) -> None:
    def torchrun(steps: int) -> dict[str, float]:
        python(
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--redirects", "3"),
            *("--log-dir", str(tmp_path / "logs"), str(PROGRAMS / "plain_train.py")),
            *("--checkpoint", str(tmp_path / "state.pt"), "--out", str(tmp_path / "facts.json")),
            *("--steps", str(steps)),
        )
        facts: dict[str, float] = json.loads((tmp_path / "facts.json").read_text())
        return facts

    assert torchrun(20)["first_step"] == 0
    resumed = torchrun(30)
    assert (resumed["first_step"], resumed["last_step"], resumed["world_size"]) == (20, 30, 2)
