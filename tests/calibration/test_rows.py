"""Rows and gradients of tiny models, against what their projections compute and what autograd says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvserve.calibrate.gradients import GradientHost
from kvserve.calibration.artefact import Cache, CalibrationError, read
from kvserve.calibration.corpus import default_corpus, segments
from kvserve.calibration.methods.kvquant import Kvquant
from kvserve.calibration.rows import Rows, RowsError, RowWriter, read_rotary
from kvserve.cli import main
from kvserve.codecs.tile import Half
from kvserve.engine.row_worker import EXTENSION_PATH
from kvserve.errors import TextError
from tests.cases.engine_cases import engine
from tests.cases.tiny_models import VOCAB_SIZE, make_tiny_model

SEGMENT, PARTS, SINKS = 48, 2, 4
SHAPES = {"llama-gqa-64": Cache(2, 2, 64), "qwen3-qk-norm": Cache(2, 2, 128), "phi3-mha-96": Cache(2, 2, 96)}


@pytest.fixture(scope="module")
def parts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, VOCAB_SIZE, (PARTS, SEGMENT), generator=generator).tolist()


def found_rows(folder: Path, family: str, found: dict) -> Rows:
    assert found == {"seen": [SEGMENT * PARTS], "no_rotary": ""}
    return Rows(folder, SHAPES[family], SEGMENT * PARTS, SEGMENT, read_rotary(folder))


def rows_of_engine(model: Path, family: str, folder: Path, parts: list[list[int]]) -> Rows:
    from vllm import SamplingParams

    with engine(model, "none", worker_extension_cls=EXTENSION_PATH, max_num_seqs=1, skip_tokenizer_init=True) as llm:
        assert llm.collective_rpc("kvserve_rows_start", args=(str(folder), SEGMENT * PARTS)) == [None]
        for part in parts:
            llm.generate([{"prompt_token_ids": part}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
        return found_rows(folder, family, llm.collective_rpc("kvserve_rows_finish", args=(str(folder), SEGMENT))[0])


def rows_of_gradients(model: Path, family: str, folder: Path, parts: list[list[int]]) -> Rows:
    host = GradientHost(str(model), "float32")
    host.start(str(folder), SEGMENT * PARTS)
    for part in parts:
        host.read(part)
    return found_rows(folder, family, host.finish(str(folder), SEGMENT))


def projected(model: Path, family: str, parts: list[list[int]]) -> list[dict[Half, torch.Tensor]]:
    """Per layer: keys before RoPE and values from the projections' own outputs, with their gradients at `.grad`.

    [kv_heads, tokens, head_dim], the first tokens of every part left out.
    """
    network, cache = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), SHAPES[family]
    layers: list[dict[Half, list[torch.Tensor]]] = [{half: [] for half in Half} for _ in network.model.layers]

    def note(found: list[torch.Tensor]):
        def hook(module, inputs, output):
            output.retain_grad()
            found.append(output)

        return hook

    for layer, found in zip(network.model.layers, layers, strict=True):
        attention = layer.self_attn
        (attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj).register_forward_hook(
            note(found[Half.KEY])
        )
        attention.v_proj.register_forward_hook(note(found[Half.VALUE]))
    for part in parts:
        inputs = torch.tensor([part])
        network(input_ids=inputs, labels=inputs).loss.backward()

    def together(tensors: list[torch.Tensor]) -> torch.Tensor:
        cut = [tensor.reshape(SEGMENT, cache.num_kv_heads, cache.head_dim)[SINKS:] for tensor in tensors]
        return torch.cat(cut).transpose(0, 1)

    result = []
    for found in layers:
        own = {half: together([tensor.detach() for tensor in found[half]]) for half in Half}
        for half in Half:
            own[half].grad = together([tensor.grad for tensor in found[half]])
        result.append(own)
    return result


@pytest.mark.parametrize("family", ["llama-gqa-64", "qwen3-qk-norm"])
def test_rows_are_what_the_projections_compute(family: str, parts, tmp_path: Path) -> None:
    model = make_tiny_model(family, tmp_path / "model")
    folders = [tmp_path / "engine", tmp_path / "gradients"]
    for folder in folders:
        folder.mkdir()
    of_engine = rows_of_engine(model, family, folders[0], parts)
    of_gradients = rows_of_gradients(model, family, folders[1], parts)
    for layer, own in enumerate(projected(model, family, parts)):
        for half in Half:
            plain = of_engine.half(layer, half, before_rope=True, sinks=SINKS)
            torch.testing.assert_close(plain.rows, own[half], rtol=2e-4, atol=2e-4)
            assert plain.weights is None
            weighed = of_gradients.half(layer, half, before_rope=True, sinks=SINKS)
            torch.testing.assert_close(weighed.rows, own[half], rtol=2e-4, atol=2e-4)
            scale = float(own[half].grad.square().max())
            torch.testing.assert_close(weighed.weights, own[half].grad.square(), rtol=2e-3, atol=1e-4 * scale)


def test_keys_after_rope_are_those_turned_to_their_positions(parts, tmp_path: Path) -> None:
    family = "llama-gqa-64"
    rows = rows_of_gradients(make_tiny_model(family, tmp_path / "model"), family, tmp_path, parts)
    before, after = (rows.half(1, Half.KEY, before_rope=way, sinks=0) for way in (True, False))
    torch.testing.assert_close(before.rows[:, ::SEGMENT], after.rows[:, ::SEGMENT])  # position 0 is not turned
    assert not torch.allclose(before.rows, after.rows, atol=0.1)
    torch.testing.assert_close(before.rows.norm(dim=2), after.rows.norm(dim=2))
    torch.testing.assert_close(before.weights.sum(2), after.weights.sum(2))


# -- files of rows -------------------------------------------------------------------------------------------------

CACHE = Cache(1, 4, 8)


def test_ranks_write_their_own_heads_and_all_are_read(tmp_path: Path) -> None:
    whole = torch.randn(10, 4, 8)
    for first, count in ((2, 2), (0, 1), (1, 1)):
        writer = RowWriter(tmp_path, 0, 10, first)
        for start, end in ((0, 7), (7, 10)):
            writer.put("key", start, whole[start:end, first : first + count].bfloat16())
    rows = Rows(tmp_path, CACHE, 10, 5, None).half(0, Half.KEY, before_rope=False, sinks=2)
    expected = whole[[2, 3, 4, 7, 8, 9]].bfloat16().float().transpose(0, 1)
    assert torch.equal(rows.rows, expected) and rows.weights is None


def test_missing_heads_missing_layers_and_broken_numbers_are_noticed(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path, 0, 4)
    writer.put("value", 0, torch.zeros(4, 3, 8))
    rows = Rows(tmp_path, CACHE, 4, 4, None)
    with pytest.raises(RowsError, match="layer 0 showed 3 KV heads, the model has 4"):
        rows.half(0, Half.VALUE, False, 0)
    with pytest.raises(RowsError, match="no key rows of layer 0"):
        rows.half(0, Half.KEY, False, 0)
    with pytest.raises(RowsError, match="layer 0 has seen 6 tokens, 4 were announced"):
        writer.put("value", 3, torch.zeros(3, 3, 8))
    RowWriter(tmp_path, 1, 4).put("key", 0, torch.full((4, 4, 8), torch.nan))
    with pytest.raises(RowsError, match="layer 1 has key rows that are not finite"):
        rows.half(1, Half.KEY, False, 0)


# -- text ----------------------------------------------------------------------------------------------------------


def test_parts_of_a_text_do_not_overlap_and_begin_as_the_tokenizer_does() -> None:
    parts = segments(list(range(1000)), 300, 100, start=[7777])
    assert [part[0] for part in parts] == [7777] * 3 and all(len(part) == 100 for part in parts)
    own = [token for part in parts for token in part[1:]]
    assert len(set(own)) == len(own) and own[0] == 0 and own[-1] > 990
    assert segments([1, 2], 2, 2) == [[1, 2]]


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(TextError, match="the text has 299 tokens and 300 are wanted"):
        segments(list(range(299)), 300, 100)
    with pytest.raises(TextError, match="less than one part"):
        segments(list(range(299)), 99, 100)


def test_the_default_text_is_long_and_not_what_evaluations_read() -> None:
    from kvserve.evals.text import default_text
    from kvserve.prose import SENTENCES

    corpus, read = default_corpus(), default_text()[1]
    assert len(corpus.text) > 300_000 and corpus.sha256 == default_corpus().sha256
    paragraphs = [text for text in corpus.text.split("\n\n") if len(text) > 200][::10]
    assert sum(text in read for text in paragraphs) < 0.01 * len(paragraphs)
    assert not any(sentence in corpus.text for sentence in SENTENCES if len(sentence) > 40)


# -- the command ---------------------------------------------------------------------------------------------------


def calibrate(model: Path, *arguments: str) -> int:
    return main(["calibrate", "--model", str(model), "--tokens", "512", "--dtype", "float32", *arguments])


def test_a_tiny_model_is_calibrated_in_one_command(tiny: Path, capsys) -> None:
    from kvserve.calibration.store import load

    assert calibrate(tiny, "--method", "kvquant-2bit,cq-8c8b,skvq-2bit", "--importance", "gradient") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["kvquant-2bit", "cq-8c8b", "skvq-2bit"]
    cache = SHAPES["llama-gqa-64"]
    for line in lines:
        found = load(line.partition(":")[0], str(tiny), cache)
        assert str(found.path) in line
        assert found.origin.num_tokens == 512 and found.origin.importance == "gradient"
        assert found.origin.corpus_sha256 == default_corpus().sha256
    assert not list((tiny.parent / "cache" / "calibration").glob(".rows-*"))


@pytest.mark.slow
def test_the_engine_and_transformers_calibrate_alike(tiny: Path, tmp_path: Path) -> None:
    """Without gradients the same rows make nearly the same ranges; a server's engine is started for them."""
    from kvserve.calibration.fingerprint import fingerprint

    files = {kind: tmp_path / f"{kind}.safetensors" for kind in ("gradient", "none")}
    for kind, file in files.items():
        options = ("--importance", kind, "--set", "outliers=0.02", "--out", str(file))
        assert calibrate(tiny, "--method", "kvquant-3bit", *options) == 0
    one, other = (read(file, fingerprint(tiny), SHAPES["llama-gqa-64"], "") for file in files.values())
    assert one.origin.importance == "gradient" and other.origin.importance == "none"
    assert one.origin.method == other.origin.method == Kvquant(bits=3, outliers=0.02)
    for layer in (0, 1):
        name = f"layers.{layer}.key.table.range"
        torch.testing.assert_close(one.tensors[name], other.tensors[name], rtol=1e-3, atol=1e-3)
        name = f"layers.{layer}.value.table.levels"
        assert not torch.equal(one.tensors[name], other.tensors[name])


def test_rows_need_room(tiny: Path, monkeypatch, capsys) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 10))
    assert calibrate(tiny, "--method", "kvquant-2bit") == 2
    assert "set KVSERVE_CACHE to a larger disk" in capsys.readouterr().err


def test_a_model_without_one_rotary_embedding_is_calibrated_after_it(tmp_path: Path) -> None:
    from rich.progress import Progress

    from kvserve.calibrate.fit import Recipe, _fit

    RowWriter(tmp_path, 0, 64).put("key", 0, torch.randn(64, 4, 8))
    RowWriter(tmp_path, 0, 64).put("value", 0, torch.randn(64, 4, 8))
    rows = Rows(tmp_path, CACHE, 64, 64, None, "the layers of this model have two kinds")
    with pytest.raises(CalibrationError, match="two kinds; add --set keys=after-rope"):
        _fit(Recipe("kvquant-2bit", Kvquant(), tmp_path / "x"), rows, 0, Progress(disable=True))
    after = Recipe("kvquant-2bit", Kvquant(keys="after-rope"), tmp_path / "x")
    assert len(_fit(after, rows, 0, Progress(disable=True))) == 3


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--method", "kvquant"], "there is no calibration 'kvquant'"),
        (["--method", "kvquant-2bit", "--set", "bits=3"], "--set needs --out FILE"),
        (["--method", "kvquant-2bit,cq-4c8b", "--out", "x.safetensors"], "--out FILE takes one method"),
        (["--method", "kvquant-2bit", "--tokens", "10000000"], "give a longer --text, or fewer --tokens"),
        (["--method", "kvquant-2bit", "--importance", "fisher"], "--importance"),
        (["--method", "razor", "--importance", "gradient"], "razor reads random tokens and no text; drop --importance"),
        (["--method", "razor", "--tokens", "512"], "drop --tokens"),
        ([], "--method"),
    ],
)
def test_command_lines_that_cannot_be_followed_are_refused(arguments, part, tiny: Path, capsys) -> None:
    assert main(["calibrate", "--model", str(tiny), *arguments]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1
