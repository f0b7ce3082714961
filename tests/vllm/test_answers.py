"""ProphetKV inside vLLM on the real small model: answers and selections are our engine's, controls are exact."""

from __future__ import annotations

import pytest

from prophetkv_rag.defaults import fetch_default_model, read_speeches
from prophetkv_rag.integrations.vllm.planner import Planner
from tests.vllm.serving import Served, reuse, tokens

pytestmark = pytest.mark.model

QUESTIONS = ("What does the speaker say about taxes?", "Who is thanked, and what for?")
ORDERS = ((2, 0, 3, 1), (1, 3, 5, 0))


DOCUMENT_ORDERS = ((1, 3, 2), (3, 2, 1))


def test_a_document_s_chunks_behind_each_other(served):
    """The defaults of both: behind two chunks, the first from its second cache, a twentieth recomputed."""
    words = " ".join(read_speeches().values()).split()
    document = [" ".join(words[start : start + 70]) for start in range(4000, 4280, 70)]
    served.register(document, in_order=True)
    prompts = [
        [{"role": "user", "content": "\n\n".join(document[i] for i in order) + f"\n\n{QUESTIONS[number]}"}]
        for number, order in enumerate(DOCUMENT_ORDERS)
    ]
    served.forget_prefixes()
    with served.selections() as selected:
        outputs = served.run([served.ids(one) for one in prompts], [{}, {}])
    assert [tokens(output) for output in outputs] == [served.engine_answer(one) for one in prompts]
    ours = [served.engine.prefill(one) for one in prompts]
    assert sorted(selected, key=sorted) == sorted((set(one.recomputed.tolist()) for one in ours), key=sorted)
    for output, one in zip(outputs, ours, strict=True):
        assert reuse(output)["recompute_ratio"] == pytest.approx(one.report.recompute_ratio) == pytest.approx(0.05)
        assert [chunk["status"] for chunk in reuse(output)["chunks"]] == ["miss", "hit", "hit"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    words = " ".join(read_speeches().values()).split()
    chunks = [" ".join(words[start : start + 70]) for start in range(0, 3600, 600)]
    served = Served(fetch_default_model(), tmp_path_factory.mktemp("caches"))
    assert len(served.register(chunks)) == 6
    yield served
    served.close()


def prompt(served, number, question=None):
    chunks = "\n\n".join(served.texts[i] for i in ORDERS[number % 2])
    text = question or QUESTIONS[number % 2]
    return [{"role": "user", "content": f"Use what follows.\n\n{chunks}\n\n{text}"}]


@pytest.mark.parametrize("ratio", [0.0, 0.2])
def test_answers_and_selections_are_the_engines(served, ratio):
    prompts = [prompt(served, number) for number in range(2)]
    served.forget_prefixes()
    with served.selections() as selected:
        answers = served.answers(prompts, ratio)
    assert answers == [served.engine_answer(one, recompute_ratio=ratio) for one in prompts]
    expected = [served.engine.prefill(one, recompute_ratio=ratio).recomputed.tolist() for one in prompts]
    assert selected == [set(positions) for positions in expected]
    assert all(selected) == (ratio > 0)


def test_ratio_one_is_the_full_prefill_of_vllm_and_of_transformers(served):
    prompts = [prompt(served, number) for number in range(2)]
    served.forget_prefixes()
    everything = served.answers(prompts, 1.0)
    assert everything == served.full(prompts)
    assert everything == [served.engine_answer(one, strategy="full_prefill") for one in prompts]


def test_the_report_says_what_was_done(served):
    served.forget_prefixes()
    ids = served.ids(prompt(served, 0))
    (output,) = served.run([ids], [{"recompute_ratio": 0.2}])
    ours = served.engine.prefill(prompt(served, 0), recompute_ratio=0.2).report
    said = reuse(output)
    assert said["status"] == "reused"
    names = ("prompt_tokens", "chunk_tokens", "reused_tokens", "recomputed_tokens")
    assert [said[name] for name in names] == [getattr(ours, name) for name in names]
    assert [ids[chunk["start"] : chunk["stop"]] for chunk in said["chunks"]] == [
        served.engine.library.tokens.chunk(served.texts[i]) for i in ORDERS[0]
    ]


def test_eight_at_once_answer_as_one_by_one(served):
    prompts = [prompt(served, number, f"{QUESTIONS[number % 2]} Number {number}.") for number in range(8)]
    served.forget_prefixes()
    together = served.answers(prompts, 0.2)
    served.forget_prefixes()
    assert together == [served.answers([one], 0.2)[0] for one in prompts]
    assert len({tuple(answer) for answer in together}) > 1


def test_approximate_and_plain_requests_of_one_prompt_in_one_batch(served):
    served.forget_prefixes()
    ids = served.ids(prompt(served, 0))
    options = [{"recompute_ratio": 0.0}, {"enabled": False}] * 2
    mixed = [tokens(output) for output in served.run([ids] * 4, options)]
    served.forget_prefixes()
    (exact,) = served.full([prompt(served, 0)])
    (stale,) = served.answers([prompt(served, 0)], 0.0)
    assert mixed == [stale, exact, stale, exact]
    assert stale != exact  # else this proves nothing


def test_approximate_rows_never_reach_plain_requests(served, monkeypatch):
    """And they would, if blocks were not salted: the same requests then get a wrong answer."""
    ids = served.ids(prompt(served, 0))
    served.forget_prefixes()
    (exact,) = served.full([prompt(served, 0)])

    def plain_after_approximate():
        served.forget_prefixes()
        served.run([ids], [{"recompute_ratio": 0.0}])
        (plain,) = served.run([ids], [{"enabled": False}])
        return tokens(plain), plain.num_cached_tokens

    plain, cached = plain_after_approximate()
    assert (plain, cached) == (exact, 0)
    monkeypatch.setattr(served.planner, "_salt", lambda *args, **settings: 0)
    plain, cached = plain_after_approximate()
    assert cached > 0
    assert plain != exact
    monkeypatch.undo()
    served.forget_prefixes()


def test_the_same_request_again_is_served_from_the_prefix_cache(served):
    served.forget_prefixes()
    ids = served.ids(prompt(served, 0))
    first, again = (served.run([ids], [{"recompute_ratio": 0.2}])[0] for _ in range(2))
    assert tokens(again) == tokens(first)
    assert again.num_cached_tokens >= len(ids) - 1 - 16 * 8


def test_plain_chats_are_found_by_token_ids(served):
    """As any client sends them: vLLM renders and tokenises, so that chunks' ends may be other tokens."""
    served.forget_prefixes()
    text = " ".join(served.texts[i] for i in ORDERS[0])  # no line breaks: the ends grow together with their neighbours
    chat = [{"role": "user", "content": f"Read:{text} {QUESTIONS[0]}"}]
    (output,) = served.llm.chat([chat], served.llm.get_default_sampling_params(), use_tqdm=False)
    said = reuse(output)
    assert said["status"] == "reused"
    assert len(said["chunks"]) == 4
    for chunk, number in zip(said["chunks"], ORDERS[0], strict=True):
        length = len(served.engine.library.tokens.chunk(served.texts[number]))
        assert length - 8 <= chunk["stop"] - chunk["start"] <= length


def test_requests_without_known_chunks_are_vllms_own(served):
    text = [{"role": "user", "content": "Say something about the sea, the harbour and the museum."}]
    (output,) = served.run([served.ids(text)])
    assert output.kv_transfer_params is None


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"recompute_ratio": 2}, "recompute_ratio"),
        ({"recompute_ratio": "much"}, "a number from 0 to 1"),
        ({"question_ids": [10**9]}, "list of token ids"),
        ({"register": [[]]}, "1 to"),
        ({"register": "text"}, "list of at most"),
        ({"spans": [[0, 5]]}, "some of"),
        (7, "must be an object"),
    ],
)
def test_what_a_client_gets_wrong_is_said_and_changes_no_answer(served, exact, said, reason):
    ids = served.ids(prompt(served, 0))
    (output,) = served.run([ids], [said])
    assert reason in reuse(output)["error"]
    assert tokens(output) == exact


@pytest.fixture(scope="module")
def exact(served):
    served.forget_prefixes()
    (answer,) = served.full([prompt(served, 0)])
    return answer


def test_a_question_before_the_chunks_asks_from_elsewhere(served):
    chunks = "\n\n".join(served.texts[i] for i in ORDERS[0])
    before = [{"role": "user", "content": f"{QUESTIONS[0]}\n\n{chunks}"}]
    layout = served.engine.read(before, query=QUESTIONS[0])
    assert layout.probe_ids
    served.forget_prefixes()
    with served.selections() as selected:
        (output,) = served.run([layout.input_ids.tolist()], [{"question_ids": list(layout.probe_ids)}])
    assert reuse(output)["status"] == "reused"
    ours = served.engine.prefill(before, query=QUESTIONS[0])
    assert selected == [set(ours.recomputed.tolist())]


def test_a_lost_cache_is_vllms_own_prefill_and_does_not_fail_again(served):
    key = served.planner._identity.key(served.engine.library.tokens.chunk(served.texts[2]))
    path = served.planner._store.files.path(key)
    data = path.read_bytes()
    served.stages._store.drop_from_memory([key])
    (exact,) = served.full([prompt(served, 0)])
    served.forget_prefixes()
    asked = []
    claim = Planner.claim
    with pytest.MonkeyPatch.context() as patch:
        # Lost after the scheduler has looked: what it looks for is still there.
        patch.setattr(
            Planner, "claim", lambda *args: path.unlink(missing_ok=True) or asked.append(claim(*args)) or asked[-1]
        )
        (output,) = served.run([served.ids(prompt(served, 0))], [{"recompute_ratio": 0.0}])
    assert tokens(output) == exact
    assert reuse(output)["status"] == "left_to_vllm"
    assert len([one for one in asked if one]) == 1  # None: it waits for what can be read
    # The next prompt has it computed again, as our engine does.
    (output,) = served.run([served.ids(prompt(served, 0))], [{"recompute_ratio": 0.0}])
    assert [chunk["status"] for chunk in reuse(output)["chunks"]] == ["miss", "hit", "hit", "hit"]
    assert path.stat().st_size == len(data)


def test_a_blob_that_holds_another_chunk_is_not_used(served):
    served.forget_prefixes()
    (exact,) = served.full([prompt(served, 0)])
    served.forget_prefixes()
    ids = [served.engine.library.tokens.chunk(text) for text in served.texts]
    (own, other), store = (served.planner._identity.key(ids[number]) for number in (0, 1)), served.planner._store
    data = store.files.path(own).read_bytes()
    store.files.path(own).write_bytes(store.files.path(other).read_bytes())
    served.stages._store.drop_from_memory([own])
    (output,) = served.run([served.ids(prompt(served, 0))], [{"recompute_ratio": 0.0}])
    assert (tokens(output), reuse(output)["status"]) == (exact, "left_to_vllm")
    served.stages._store.flush()
    store.files.path(own).write_bytes(data)  # another one is there: it is found again
    (output,) = served.run([served.ids(prompt(served, 0))], [{"recompute_ratio": 0.0}])
    assert [chunk["status"] for chunk in reuse(output)["chunks"]] == ["hit"] * 4


def test_counters_reach_vllms_metrics(served):
    served.forget_prefixes()
    before = counters(served)
    served.answers([prompt(served, 0)], 0.2)
    after = counters(served)
    assert after["vllm:prophetkv_requests"] == before["vllm:prophetkv_requests"] + 1
    assert after["vllm:prophetkv_reused_tokens"] > before["vllm:prophetkv_reused_tokens"]


def counters(served):
    return {m.name: getattr(m, "value", None) for m in served.llm.get_metrics() if "prophetkv" in m.name}
