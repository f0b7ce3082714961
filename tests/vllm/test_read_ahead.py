"""A request waits until its caches are in RAM, while others decode: no step reads them. Nothing here goes by time."""

from __future__ import annotations

from collections import Counter
from contextlib import closing

import pytest
from vllm import SamplingParams

from prophetkv_rag.store.disk import open_disk_store
from tests.tiny import save_tiny, text_of
from tests.vllm.serving import ANSWER, Served, reuse, tokens
from tests.vllm.slow_reads import SlowReads
from tests.vllm.test_models import SHAPE

DOCUMENT = [text_of(70, seed=seed) for seed in range(3)]
OTHERS = [text_of(70, seed=seed) for seed in range(10, 13)]
PLAIN = text_of(40, seed=90)


@pytest.fixture(scope="module", params=[False, True], ids=["", "async"])
def served(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    model = save_tiny(directory / "model", **SHAPE)
    served = Served(model, directory / "caches", block_size=32, async_scheduling=request.param)
    for texts in (DOCUMENT, OTHERS):
        served.register(texts)
    yield served
    served.close()


@pytest.fixture
def reads(served, monkeypatch):
    """Nothing is in RAM, reading does not end, and the time stands still."""
    served.forget_prefixes()
    reads = SlowReads(served.stages)
    reads.now, reads.counts, awaited = 0.0, Counter(), served.planner.awaited
    monkeypatch.setattr(awaited, "_clock", lambda: reads.now)
    monkeypatch.setattr(awaited, "_count", lambda name, value: reads.counts.update({name: value}))
    forget(served)
    yield reads
    reads.close()
    engine = served.llm.llm_engine
    engine.abort_request(list(engine.output_processor.request_states), internal=True)  # of a test that failed
    served.run([served.ids(PLAIN)], [None], max_tokens=2)
    assert (len(awaited), awaited._sizes) == (0, {})


def forget(served):
    store = served.stages._store
    store.flush()
    store.drop_from_memory(store.keys_in_ram())
    served.run([served.ids(PLAIN)], [None], max_tokens=2)  # the scheduler hears of it


def chat(texts, question=0):
    return [{"role": "user", "content": "\n\n".join([*texts, text_of(8, seed=50 + question)])}]


def begin(served, name, prompt, *, max_tokens=ANSWER):
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    served.llm.llm_engine.add_request(name, {"prompt_token_ids": served.ids(prompt)}, sampling)


class Steps(dict):
    """What each request has answered so far."""

    def __init__(self, served):
        super().__init__()
        self.engine, self.count = served.llm.llm_engine, 0

    def go(self, count=1):
        for _ in range(count):
            self.update({output.request_id: output for output in self.engine.step()})
            self.count += 1

    def until(self, *names):
        while not all(name in self and self[name].finished for name in names):
            self.go()
        return [self[name] for name in names]

    def length(self, name):
        return len(tokens(self[name])) if name in self else 0


def first_token(served, name, prompt):
    """Engine steps until a request has one."""
    steps = Steps(served)
    begin(served, name, prompt)
    while not steps.length(name):
        steps.go()
    steps.until(name)
    return steps.count


def reused(served, output, prompt):
    assert reuse(output)["status"] == "reused"
    assert tokens(output) == served.engine_answer(prompt)


def test_others_decode_while_caches_are_read(served, reads):
    steps = Steps(served)
    begin(served, "stream", PLAIN, max_tokens=200)
    while not steps.length("stream"):
        steps.go()
    begin(served, "cold", chat(DOCUMENT))
    begin(served, "too", chat(DOCUMENT, 1))  # the same caches: they are read once
    before = steps.length("stream")
    steps.go(20)
    assert steps.length("stream") >= before + 15
    assert not steps.length("cold") + steps.length("too")
    reads.may_end.set()
    for number, output in enumerate(steps.until("cold", "too")):
        reused(served, output, chat(DOCUMENT, number))
    assert (len(reads.ahead), reads.in_step) == (3, [])
    assert reads.counts == {"read_ahead_waits": 2, "read_ahead_seconds": 0.0}
    steps.until("stream")


def test_an_idle_engine_goes_on_when_caches_are_read(served, reads):
    steps = Steps(served)
    begin(served, "cold", chat(DOCUMENT))
    steps.go(20)
    assert not steps
    assert served.llm.llm_engine.has_unfinished_requests()
    reads.may_end.set()
    reused(served, *steps.until("cold"), chat(DOCUMENT))
    assert reads.in_step == []


def test_a_request_whose_caches_are_in_ram_does_not_wait_a_step(served, reads):
    reads.may_end.set()
    first_token(served, "cold", chat(DOCUMENT))
    served.forget_prefixes()
    reads.counts.clear()
    reads.ahead.clear()
    plain = first_token(served, "plain", PLAIN + " and more")
    assert first_token(served, "warm", chat(DOCUMENT, 1)) == plain
    assert (reads.counts, reads.ahead, reads.in_step) == ({}, [], [])


def test_after_the_bound_the_step_reads(served, reads):
    steps = Steps(served)
    begin(served, "cold", chat(DOCUMENT))
    steps.go(5)
    reads.now = served.planner._settings.read_ahead_s
    reused(served, *steps.until("cold"), chat(DOCUMENT))
    assert (reads.ahead, len(reads.in_step)) == ([], 3)
    assert reads.counts == {"read_ahead_waits": 1, "read_ahead_late": 1, "read_ahead_seconds": reads.now}


def test_a_request_that_is_aborted_while_it_waits(served, reads):
    steps = Steps(served)
    begin(served, "cold", chat(DOCUMENT))
    steps.go(5)
    served.llm.llm_engine.abort_request(["cold"])
    assert len(served.planner.awaited) == 0
    reads.may_end.set()
    begin(served, "again", chat(DOCUMENT))
    reused(served, *steps.until("again"), chat(DOCUMENT))
    assert reads.in_step == []


def test_a_chunk_that_is_deleted_while_a_request_waits(served, reads):
    texts = [*DOCUMENT[1:], text_of(70, seed=20)]
    reads.may_end.set()
    served.register(texts[2:])
    served.run([served.ids(chat(texts))], [{}])
    (exact,) = served.full([chat(texts)])
    served.forget_prefixes()
    forget(served)
    reads.may_end.clear()
    reads.counts.clear()
    steps = Steps(served)
    begin(served, "cold", chat(texts))
    steps.go(5)
    with closing(open_disk_store(served.directory, ram_bytes=0)) as other:
        other.delete([served.planner._identity.key(served.engine.library.tokens.chunk(texts[2]))])
    reads.may_end.set()
    (output,) = steps.until("cold")
    assert (tokens(output), reuse(output)["status"]) == (exact, "left_to_vllm")
    assert reads.counts == {"read_ahead_waits": 1, "read_ahead_seconds": 0.0}


def size(served, texts):
    keys = [served.planner._identity.key(served.engine.library.tokens.chunk(text)) for text in texts]
    return sum(map(served.planner.chunks.nbytes, keys))


def give_ram(served, monkeypatch, nbytes):
    ram = served.stages._store._ram
    for whose, name in ((ram, "max_bytes"), (ram, "namespace_max_bytes"), (served.planner.awaited, "_ram_bytes")):
        monkeypatch.setattr(whose, name, nbytes)


def test_requests_whose_caches_have_no_room_together_wait_in_turn(served, reads, monkeypatch):
    sizes = size(served, DOCUMENT), size(served, OTHERS)
    give_ram(served, monkeypatch, sum(sizes) - min(sizes) // 6)  # one cache has no room
    prompts = [chat(texts, number) for number, texts in enumerate((DOCUMENT, OTHERS))]
    steps = Steps(served)
    for number, prompt in enumerate(prompts):
        begin(served, str(number), prompt)
    steps.go(5)
    reads.may_end.set()
    for output, prompt in zip(steps.until("0", "1"), prompts, strict=True):
        reused(served, output, prompt)
    assert reads.in_step == []


def test_a_request_whose_caches_never_fit_does_not_wait(served, reads, monkeypatch):
    give_ram(served, monkeypatch, size(served, DOCUMENT) - 1)
    (output,) = served.run([served.ids(chat(DOCUMENT))], [{}])
    reused(served, output, chat(DOCUMENT))
    assert (reads.counts, reads.ahead, len(reads.in_step)) == ({}, [], 3)


def test_what_was_just_encoded_is_not_read(served, reads):
    texts = [text_of(70, seed=seed) for seed in range(30, 33)]
    served.register(texts, in_order=True)
    prompt = chat([*texts[1:], texts[0]])  # the first one's second cache is computed, too
    (output,) = served.run([served.ids(prompt)], [{}])
    reused(served, output, prompt)
    assert reuse(output)["chunks"][0]["status"] == "miss"
    assert (reads.counts, reads.ahead, reads.in_step) == ({}, [], [])


def test_encoding_does_not_wait_for_what_others_read(served, reads):
    texts = [text_of(70, seed=seed) for seed in range(40, 43)]
    served.register(texts, in_order=True)
    prompt = chat([*texts[1:], texts[0]])
    steps = Steps(served)
    begin(served, "cold", chat(DOCUMENT))
    steps.go(5)
    begin(served, "new", prompt)  # a second cache is computed and stored for it
    reused(served, *steps.until("new"), prompt)
    assert not steps.length("cold")
    reads.may_end.set()
    reused(served, *steps.until("cold"), chat(DOCUMENT))
    assert reads.in_step == []
