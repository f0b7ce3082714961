"""The quality grid on tiny random models: what a row says is checked by other means."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from prophetkv_rag import ProphetKVConfig, ProphetKVEngine
from prophetkv_rag.errors import InputError
from prophetkv_rag.evaluation.quality.calibration import calibrate
from prophetkv_rag.evaluation.quality.engines import Engines
from prophetkv_rag.evaluation.quality.fidelity import Arm, arms_of, full_prefill
from prophetkv_rag.evaluation.quality.grid import measure_example, run_grid
from prophetkv_rag.evaluation.quality.intervals import bootstrap_mean
from prophetkv_rag.evaluation.quality.picks import YARDSTICK, picks_of
from prophetkv_rag.evaluation.quality.results import QualityRow, ResultsFile, read_results
from prophetkv_rag.evaluation.quality.tables import markdown, summarise
from prophetkv_rag.evaluation.tasks.example import TaskExample
from prophetkv_rag.evaluation.tasks.prompting import join_pieces, prompt_length, task_prompt
from prophetkv_rag.evaluation.tasks.surroundings import Surroundings
from prophetkv_rag.profile import load_profile
from tests.tiny import text_of, tiny_llama, tiny_tokenizer

ARMS = [Arm("full_reuse", 0.0), Arm("prophetkv", 0.2), Arm("prophetkv@corpus", 0.2), Arm("random", 1.0)]
ENCODINGS = ["full_reuse", "full_reuse@prompt", "full_reuse@corpus", "full_reuse@prompt+corpus"]


def example(number=0, pieces=4):
    words = [text_of(40, seed=100 * number + piece) + "\n" for piece in range(pieces)]
    return TaskExample(
        task="toy",
        example_id=str(number),
        before="Read this.\n",
        context=tuple(words),
        after="What is it about?",
        query="What is it about?",
        answer_prefix=" It is",
        references=("a",),
        metric="string_match_all",
        max_new_tokens=6,
    )


@pytest.fixture(scope="module")
def engines():
    return Engines(
        ProphetKVEngine(tiny_llama(), tiny_tokenizer()), {"toy": Surroundings(text_of(30, seed=7), "Read this.\n")}
    )


def test_chunks_joined_are_the_context():
    tokenizer = tiny_tokenizer()
    pieces = [text_of(size, seed=size) + "\n\n" for size in (3, 50, 7, 200, 1)]
    for chunk_tokens in (16, 40, 100, 10_000):
        chunks = join_pieces(pieces, tokenizer, chunk_tokens)
        assert "".join(chunks) == "".join(pieces)
        lengths = [len(tokenizer(chunk, add_special_tokens=False)["input_ids"]) for chunk in chunks]
        assert max(lengths) <= chunk_tokens
        # Greedy: two neighbours never fit into one chunk.
        for first, second in pairwise(chunks):
            both = len(tokenizer(first + second, add_special_tokens=False)["input_ids"])
            assert both > chunk_tokens or first.startswith(pieces[3][:5])


def test_the_answer_prefix_follows_the_open_assistant_turn():
    tokenizer = tiny_tokenizer()
    prompt = task_prompt(example(), tokenizer, 64)
    assert prompt.suffix.endswith(" It is")
    assert prompt.suffix.count(" It is") == 1
    assert "".join([prompt.prefix, *prompt.chunks, prompt.suffix]).startswith(prompt.prefix)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Read this.\n" + "".join(example().context) + "What is it about?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt.prefix + "".join(prompt.chunks) + prompt.suffix == rendered + " It is"


def test_prompt_length_is_what_the_engine_sees(engines):
    length = prompt_length(example(), engines.default.tokenizer, 64)
    assert engines.default.read(task_prompt(example(), engines.default.tokenizer, 64)).num_tokens == length


def test_rows(engines):
    rows = measure_example(engines, example(), ARMS, chunk_tokens=64, answer_tokens=5)
    assert [row.strategy for row in rows] == ["full_prefill", *(arm.strategy for arm in ARMS)]
    full, reuse, ours, behind_lead_in, everything = rows
    assert full.kl == 0.0
    assert everything.kl == pytest.approx(0, abs=1e-7)  # ratio 1.0 is full prefill
    assert everything.answer == full.answer
    assert everything.attended_recall == 1.0
    assert reuse.charged_ratio == 0.0
    assert reuse.recomputed_tokens == 0
    assert reuse.attended_recall is None
    assert reuse.kl > 1e-6
    assert ours.kl != behind_lead_in.kl  # other caches
    assert 0.2 < ours.charged_ratio < 0.6  # stage I is charged too
    assert ours.recomputed_tokens == ours.chunk_tokens // 5


def test_each_encoding_is_of_its_own(engines):
    arms = [Arm(strategy, 0.0) for strategy in ENCODINGS]
    rows = measure_example(engines, example(), arms, chunk_tokens=64, answer_tokens=5)
    assert len({row.kl for row in rows}) == 1 + len(arms)
    prefixes = [engines.of(arm, "toy").identity.prefix_ids for arm in arms]
    tokenizer = engines.default.tokenizer
    assert tokenizer.decode(prefixes[1]) == "Read this.\n"
    assert prefixes[3] == (*prefixes[1], *prefixes[2][len(prefixes[0]) :])


def test_kl_and_agreement_by_an_independent_forward(engines):
    """KL from whole-sequence forwards: full prefill's by the bare model, reuse's by greedy stepping."""
    engine, prompt = engines.default, task_prompt(example(), engines.default.tokenizer, 64)
    truth = full_prefill(engine, prompt, answer_tokens=5)
    ids = engine.read(prompt).input_ids[None]
    with torch.no_grad():
        whole = torch.cat([ids, torch.tensor([truth.answer[:-1]], dtype=torch.int64)], dim=1)
        logits = engine.model(whole).logits[0, ids.shape[1] - 1 :]
    expected = torch.log_softmax(logits.double(), dim=-1)
    torch.testing.assert_close(truth.log_probs, expected, atol=1e-5, rtol=1e-5)
    assert truth.answer == expected.argmax(-1).tolist()

    row = measure_example(engines, example(), [Arm("full_reuse", 0.0)], chunk_tokens=64, answer_tokens=5)[1]
    keys = engine.add_chunks(prompt.chunks, owner="test")
    from prophetkv_rag.model import cache_argument, complete_cache

    result = engine.prefill(prompt, strategy="full_reuse")
    cache, actual = complete_cache(result.past_key_values), [result.logits[0]]
    with torch.no_grad():
        for token in truth.answer[:-1]:
            step = engine.model(torch.tensor([[token]]), **cache_argument(engine.model, cache), use_cache=True)
            actual.append(step.logits[0, -1])
    engine.remove_chunks(keys, owner="test")
    actual = torch.log_softmax(torch.stack(actual).double(), dim=-1)
    kl = (expected.exp() * (expected - actual)).sum(-1)
    assert row.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert row.top1_agreement == pytest.approx(float((expected.argmax(-1) == actual.argmax(-1)).double().mean()))


def test_the_own_answer_is_what_generation_gives(engines):
    """Decoding starts where the forced answer and the arm part; the result must be plain greedy decoding."""
    engine = engines.default
    parted = 0
    for number in range(6):
        prompt = task_prompt(example(number), engine.tokenizer, 64)
        row = measure_example(engines, example(number), [Arm("full_reuse", 0.0)], chunk_tokens=64, answer_tokens=6)[1]
        keys = engine.add_chunks(prompt.chunks, owner="test")
        generated = engine.generate(prompt, strategy="full_reuse", max_new_tokens=6)
        engine.remove_chunks(keys, owner="test")
        assert row.answer.strip() == generated.text.strip()
        parted += row.top1_agreement < 1
    assert parted  # otherwise nothing was tested


def test_an_interrupted_run_goes_on(engines, tmp_path):
    conditions = {"model": "tiny", "length": 64}
    examples, path = [example(0), example(1)], tmp_path / "deep" / "rows.jsonl"
    calls = []

    class Stop(Exception):
        pass

    def stop(steps):
        if steps:
            raise Stop

    settings = {"chunk_tokens": 64, "answer_tokens": 3}
    with pytest.raises(Stop):
        run_grid(engines, examples, ARMS[:2], ResultsFile(path, conditions), on_step=stop, **settings)
    assert len(read_results(path)[1]) == 3
    first = path.read_text()
    with path.open("a") as file:
        file.write('{"task": "toy", "example_id": "1", "stra')  # killed while writing
    file = ResultsFile(path, conditions)
    run_grid(engines, examples, ARMS[:2], file, on_step=calls.append, **settings)
    assert path.read_text().startswith(first)
    assert calls == [1, 1]
    rows = read_results(path)[1]
    assert len(rows) == len({(row.example_id, row.strategy, row.recompute_ratio) for row in rows}) == 6
    # Another arm later: full prefill's row is not written twice.
    run_grid(engines, examples, ARMS[:3], ResultsFile(path, conditions), **settings)
    assert len(read_results(path)[1]) == 8


def test_other_conditions_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    ResultsFile(path, {"length": 64})
    with pytest.raises(InputError, match=r"other conditions \(length\)"):
        ResultsFile(path, {"length": 128})
    with pytest.raises(InputError, match="cannot be used for results"):
        ResultsFile(tmp_path, {})
    (tmp_path / "notes.txt").write_text("hello\n")
    with pytest.raises(InputError, match="not a results file"):
        ResultsFile(tmp_path / "notes.txt", {})


def test_rows_of_other_text_are_refused(engines, tmp_path):
    settings = {"chunk_tokens": 64, "answer_tokens": 2}
    path = tmp_path / "rows.jsonl"
    run_grid(engines, [example()], ARMS[:3], ResultsFile(path, {}), **settings)
    before = path.read_text()
    changed = replace(example(), after="Who wrote it?")
    with pytest.raises(InputError, match="full_reuse of toy, example 0, measured on other text"):
        run_grid(engines, [changed], ARMS[:1], ResultsFile(path, {}), **settings)
    surroundings = {"toy": Surroundings(text_of(30, seed=8), "Read this.\n")}
    others = Engines(engines.default, surroundings)
    run_grid(others, [example()], ARMS[:2], ResultsFile(path, {}), **settings)  # which have no lead-in
    with pytest.raises(InputError, match="prophetkv@corpus 20% of toy, example 0, measured on other text"):
        run_grid(others, [example()], ARMS[:3], ResultsFile(path, {}), **settings)
    assert path.read_text() == before
    untold = re.sub(r', "inputs": "[0-9a-f]{16}"', "", before)
    path.write_text(untold)
    run_grid(others, [changed], ARMS[:3], ResultsFile(path, {}), **settings)  # rows that do not tell are believed
    assert path.read_text() == untold


def test_answers_are_scored_beyond_what_is_compared(engines):
    """KL over two tokens, scores over six: the scored answer is plain greedy decoding all the same."""
    for number in range(4):
        one = example(number)
        short = measure_example(engines, one, ARMS[:2], chunk_tokens=64, answer_tokens=2)
        whole = measure_example(engines, one, ARMS[:2], chunk_tokens=64, answer_tokens=6)
        cut = measure_example(engines, one, ARMS[:2], chunk_tokens=64, answer_tokens=6, score_tokens=2)
        assert [row.answer for row in short] == [row.answer for row in whole]
        assert [row.kl for row in short] != [row.kl for row in whole]
        assert [row.kl for row in cut] == [row.kl for row in whole]
        for one_cut, one_whole in zip(cut, whole, strict=True):
            assert one_whole.answer.startswith(one_cut.answer)
            assert len(one_cut.answer) < len(one_whole.answer)


def test_arms(engines):
    arms = arms_of(["full_prefill", "full_reuse@corpus", "epic", "epic"], [0.1, 0.2])
    assert arms == [Arm("full_reuse@corpus", 0.0), Arm("epic", 0.1), Arm("epic", 0.2)]
    with pytest.raises(InputError, match="recompute_ratio is 2"):
        arms_of(["full_reuse"], [2])


def test_a_task_without_a_lead_in_says_so(engines):
    with pytest.raises(InputError, match="'toy' has no example to spare"):
        Engines(engines.default).of(Arm("prophetkv@corpus", 0.2), "toy")
    bare = Engines(engines.default, {"toy": Surroundings(None, "Read this.\n")})
    with pytest.raises(InputError, match="no passage that no other has"):
        bare.of(Arm("prophetkv@prompt+corpus", 0.2), "toy")
    assert bare.of(Arm("prophetkv@prompt", 0.2), "toy") is not bare.default


def test_a_prompt_over_the_window_says_so():
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(max_prompt_tokens=50))
    with pytest.raises(InputError, match=r"toy, example 0.*--length"):
        measure_example(Engines(engine), example(), ARMS, chunk_tokens=16, answer_tokens=2)


@pytest.mark.parametrize(
    ("strategy", "ratio", "message"),
    [
        ("prophet", 0.2, "unknown strategy"),
        ("epic:q=1", 0.2, "no option 'q'"),
        ("epic:k=-1", 0.2, "k is -1"),
        ("prophetkv@alone", 0.2, "unknown encoding 'alone'"),
        ("prophetkv", 1.5, "recompute_ratio is 1.5"),
    ],
)
def test_bad_arms(strategy, ratio, message):
    with pytest.raises(InputError, match=message):
        Arm(strategy, ratio).check()


def row(number, strategy, ratio, kl, *, score=1.0, task="toy", agreement=1.0):
    return QualityRow(task, str(number), strategy, ratio, ratio + 0.05, kl, agreement, 0.5, score, 100, 80, 8, 0.5, "a")


def test_summary_is_paired():
    rows = [row(n, "full_prefill", 1.0, 0.0) for n in range(4)]
    rows += [row(n, "prophetkv", 0.1, 0.1 * n) for n in range(4)]
    rows += [row(n, "prophetkv", 0.2, 1.0) for n in range(4)]
    rows += [row(n, "random", 0.1, 0.1 * n + 0.5, score=0.25) for n in range(4)]
    rows += [row(n, "full_reuse", 0.0, 2.0) for n in range(4)]
    rows += [row(n, "random", 0.3, 2.0) for n in range(4)]
    table = {(e["task"], e["strategy"], e["recompute_ratio"]): e for e in summarise(rows, against="prophetkv")}
    random = table["all", "random", 0.1]
    assert random["kl"]["mean"] == pytest.approx(0.65)
    # The same distance for every example: paired, it has no spread, whatever the examples' own spread.
    assert random["kl_above"] == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5})
    assert random["kl_change"] == pytest.approx(0.65 / 0.15 - 1)
    assert random["score_lost"]["mean"] == pytest.approx(0.75)
    assert "kl_above" not in table["all", "prophetkv", 0.1]
    # Plain reuse has no arm of its ratio to be compared with: the smallest ratio stands in.
    assert table["all", "full_reuse", 0.0]["kl_above"]["mean"] == pytest.approx(2.0 - 0.15)
    # A ratio that it was not measured at is compared with nothing.
    assert "kl_above" not in table["all", "random", 0.3]
    text = markdown(summarise(rows), {"model": "m"})
    assert "| random | 10% | 15.0% | 4 |" in text
    assert "+0.500 (+0.500 to +0.500)" in text


def test_bootstrap_interval_covers():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        interval = bootstrap_mean(generator.normal(1.0, 1.0, 40).tolist(), samples=500)
        inside += interval.low <= 1.0 <= interval.high
    assert 175 <= inside <= 199


def test_calibration_takes_no_lucky_dip(tmp_path):
    rows = [row(n, "full_prefill", 1.0, 0.0) for n in range(2)]
    for ratio, agreement in ((0.05, 0.97), (0.1, 0.9), (0.2, 0.96), (0.3, 0.99)):
        rows += [row(n, "prophetkv", ratio, 0.1, agreement=agreement) for n in range(2)]
        rows += [row(n, "random", ratio, 0.1, agreement=0.5) for n in range(2)]
    profile = calibrate(rows, model="m", model_fingerprint="ab", wanted_agreement=0.95)
    assert profile.best.strategy == "prophetkv"
    assert profile.best.recompute_ratio == 0.2
    assert {one.strategy: one.recompute_ratio for one in profile.strategies} == {"prophetkv": 0.2, "random": None}
    assert profile.best.curve[0]["top1_low"] == profile.best.curve[0]["top1_high"] == 0.97
    profile.save(tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile
    with pytest.raises(InputError, match="made for 'm'"):
        ProphetKVEngine(tiny_llama(), tiny_tokenizer(), profile=tmp_path / "p.json")


def test_the_engine_runs_by_its_profile(engines, tmp_path):
    rows = [row(0, "full_prefill", 1.0, 0.0), row(0, "epic:k=3", 0.3, 0.1)]
    fingerprint = engines.default.identity.model
    profile = calibrate(rows, model="tiny", model_fingerprint=fingerprint, wanted_agreement=0.9)
    engine = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), profile=profile)
    assert (engine.config.strategy, engine.config.recompute_ratio) == ("epic:k=3", 0.3)
    nothing = calibrate([rows[0]], model="tiny", model_fingerprint=fingerprint, wanted_agreement=0.9)
    assert ProphetKVEngine(tiny_llama(), tiny_tokenizer(), profile=nothing).config.strategy == "full_prefill"


TEMPLATE = "Read this.\n{context}\nNow answer."


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("epic:k=3", 0.3)),
        ({"lead_in": "words"}, ("full_prefill", None)),  # measured, and it kept too little
        ({"prompt_template": TEMPLATE, "lead_in": "words"}, ("prophetkv", 0.05)),
        ({"encoding_prefix": "words", "prompt_template": TEMPLATE, "lead_in": "words"}, ("epic:k=3", 0.3)),
    ],
)
def test_a_profile_speaks_of_caches_of_one_kind(engines, settings, expected):
    rows = [row(0, "full_prefill", 1.0, 0.0), row(0, "epic:k=3", 0.3, 0.1), row(0, "prophetkv", 0.5, 0.1)]
    rows += [row(0, "prophetkv@corpus", 0.1, 0.1, agreement=0.5), row(0, "prophetkv@prompt+corpus", 0.05, 0.1)]
    fingerprint = engines.default.identity.model
    profile = calibrate(rows, model="tiny", model_fingerprint=fingerprint, wanted_agreement=0.9)
    assert profile.best.strategy == "prophetkv@prompt+corpus"
    config = ProphetKVEngine(tiny_llama(), tiny_tokenizer(), config=ProphetKVConfig(**settings), profile=profile).config
    assert (config.strategy, config.recompute_ratio) == expected
    with pytest.raises(InputError, match=r"with prompt_template; run .* --strategy prophetkv@prompt too"):
        profile.apply_to(ProphetKVConfig(prompt_template=TEMPLATE), model_fingerprint=fingerprint)
    with pytest.raises(InputError, match=r"encoding='previous:2'; run .* --strategy prophetkv@(.*\+)?previous:2 too"):
        profile.apply_to(ProphetKVConfig(encoding="previous", **settings), model_fingerprint=fingerprint)


@pytest.mark.parametrize("content", ["", "[]", '{"version": 7}', '{"version": 1, "strategies": [{}]}', "\0"])
def test_bad_profiles(tmp_path, content):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(InputError, match="profile"):
        load_profile(path)
    with pytest.raises(InputError, match="no profile"):
        load_profile(tmp_path / "none.json")


def test_picks_and_pictures(engines, tmp_path):
    plots = pytest.importorskip("prophetkv_rag.evaluation.quality.plots")
    pytest.importorskip("matplotlib")
    picks, spans = picks_of(engines, example(), ARMS, chunk_tokens=64)
    assert list(picks) == [YARDSTICK, "prophetkv 20%", "prophetkv@corpus 20%", "random 100%"]
    total = sum(stop - start for start, stop in spans)
    assert len(picks["random 100%"]) == total
    assert len(picks["prophetkv 20%"]) == total // 5
    plots.plot_picks(picks, spans, tmp_path / "picks.png", title="t")
    rows = measure_example(engines, example(), ARMS, chunk_tokens=64, answer_tokens=2)
    plots.plot_against_budget(summarise(rows), tmp_path / "budget.png")
    plots.plot_tasks(summarise(rows), tmp_path / "tasks.png", recompute_ratio=0.2)
    for name in ("picks", "budget", "tasks"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_plain_json(engines, tmp_path):
    path = tmp_path / "rows.jsonl"
    run_grid(engines, [example()], ARMS, ResultsFile(path, {"a": 1}), chunk_tokens=64, answer_tokens=2)
    for line in path.read_text().splitlines():
        json.loads(line)
