"""`prophetkv-rag serve --engine vllm` as a client sees it: one command, chunks and chats over HTTP."""

from __future__ import annotations

import contextlib
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import OpenAI

from prophetkv_rag import ProphetKVEngine
from tests.tiny import text_of, tiny_llama, tiny_tokenizer
from tests.vllm.running import PROGRAM, serving
from tests.vllm.serving import AS_IN_VLLM
from tests.vllm.test_models import SHAPE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(**SHAPE).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving(model, tmp_path_factory.mktemp("server")) as found:
        yield found.url


@pytest.fixture(scope="module")
def engine(model):
    engine = ProphetKVEngine.from_pretrained(model, config=AS_IN_VLLM)
    engine.add_chunks(TEXTS)
    return engine


TEXTS = [text_of(70, seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def keys(server):
    answer = httpx.put(f"{server}/chunks", json={"chunks": TEXTS, "namespace": "one"}, timeout=None)
    assert answer.status_code == 200, answer.text
    return [chunk["key"] for chunk in answer.json()["data"]]


def chat(number=0):
    order = TEXTS[number % 4 :] + TEXTS[: number % 4]
    return [{"role": "user", "content": "Read this.\n\n" + "\n\n".join(order) + f"\n\n{text_of(8, seed=50 + number)}"}]


def post(server, number=0, **body):
    body = {"model": "tiny", "messages": chat(number), "max_tokens": 16, "temperature": 0} | body
    return httpx.post(f"{server}/chat/completions", json=body, timeout=None)


def whole(text):
    """Without half a character at the end, which vLLM keeps back and we show as one."""
    return text.rstrip("\ufffd")


def text_of_answer(answer):
    return whole(answer["choices"][0]["message"]["content"])


def test_answers_and_reports_are_the_engines(server, keys, engine):
    answer = post(server, prophetkv={"recompute_ratio": 0.25}).json()
    ours = engine.generate(chat(), max_new_tokens=16, recompute_ratio=0.25)
    assert text_of_answer(answer) == whole(ours.text)
    said = answer["prophetkv"]
    for name in ("strategy", "prompt_tokens", "chunk_tokens", "reused_tokens", "recomputed_tokens"):
        assert said[name] == getattr(ours.report, name), name
    # The rows before the chunks run in both stages here: stage I's layers are gone when stage II begins.
    layout = engine.read(chat())
    twice = (layout.context_start - layout.known_prefix) * SHAPE["num_hidden_layers"]
    assert twice > 0
    assert said["row_layers"] == ours.report.row_layers + twice
    assert said["charged_ratio"] > ours.report.charged_ratio
    assert [chunk["key"] for chunk in said["chunks"]] == keys


def test_a_stream_ends_with_the_report(server, keys, engine):
    client = OpenAI(base_url=server, api_key="none")
    pieces = list(
        client.chat.completions.create(model="tiny", messages=chat(1), max_tokens=16, temperature=0, stream=True)
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert whole(text) == whole(engine.generate(chat(1), max_new_tokens=16).text)
    assert pieces[-1].model_extra["prophetkv"]["reused_tokens"] > 0


def test_eight_clients_at_once(server, keys, engine):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: post(server, number).json(), range(8)))
    texts = [text_of_answer(answer) for answer in answers]
    assert texts == [whole(engine.generate(chat(number), max_new_tokens=16).text) for number in range(8)]


@pytest.mark.parametrize(
    ("said", "status", "reason"),
    [
        ({"prophetkv": {"strategy": "cacheblend"}}, 400, "full_reuse"),
        ({"prophetkv": {"recompute_ratio": 2}}, 400, "recompute_ratio"),
        ({"model": "other"}, 404, "other"),
        ({"messages": []}, 400, "messages"),
    ],
)
def test_bad_input_is_an_error_of_the_clients(server, keys, said, status, reason):
    answer = post(server, **said)
    assert (answer.status_code, reason in answer.text) == (status, True), answer.text


def test_a_full_prefill_can_be_asked_for(server, keys, engine):
    answer = post(server, prophetkv={"strategy": "full_prefill"}).json()
    ours = engine.generate(chat(), max_new_tokens=16, strategy="full_prefill")
    assert text_of_answer(answer) == whole(ours.text)
    assert answer["prophetkv"]["reused_tokens"] == 0


def test_clients_that_leave_stop_their_answers(server, keys):
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server}/chat/completions",
                json={"model": "tiny", "messages": chat(2), "max_tokens": 1500},
                timeout=0.5,
            )
    assert post(server, 3).status_code == 200
    metrics = httpx.get(f"{server.removesuffix('/v1')}/metrics").text
    assert 'prophetkv_requests_total{outcome="cancelled"} 3.0' in metrics
    ((name, count),) = [
        line.split() for line in metrics.splitlines() if line.startswith("vllm:prophetkv_requests_total")
    ]
    assert "tiny" in name
    assert float(count) >= 9


def test_random_cancellations_leave_the_others_right(server, keys, engine):
    expected = [whole(engine.generate(chat(number), max_new_tokens=16).text) for number in range(4)]

    def client(seed):
        draw = random.Random(seed)
        found = []
        for _ in range(6):
            number = draw.randrange(4)
            if draw.random() < 0.4:
                with contextlib.suppress(httpx.TimeoutException):
                    body = {"model": "tiny", "messages": chat(number), "max_tokens": 900}
                    httpx.post(f"{server}/chat/completions", json=body, timeout=draw.random())
            else:
                found.append((number, text_of_answer(post(server, number).json())))
        return found

    with ThreadPoolExecutor(8) as pool:
        answers = [answer for found in pool.map(client, range(8)) for answer in found]
    assert len(answers) > 20
    assert [text for _, text in answers] == [expected[number] for number, _ in answers]


def talk(server, **ours):
    """Two turns of a chat; returns what their reports say was remembered."""
    messages, found = chat(2), []
    for number in range(2):
        answer = post(server, messages=messages, prophetkv=ours).json()
        found.append(answer["prophetkv"]["remembered_tokens"])
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= found[-1]
        said = answer["choices"][0]["message"]["content"]
        messages = [
            *messages,
            {"role": "assistant", "content": said},
            {"role": "user", "content": text_of(8, seed=60 + number)},
        ]
    return found


def forget(server, namespace):
    answer = httpx.request("DELETE", f"{server}/conversations", params={"namespace": namespace})
    assert answer.json()["forgotten_tokens"] is None


def test_conversations_go_on_within_a_namespace_until_they_are_forgotten(server, keys):
    first, second = talk(server, namespace="alice")
    assert first == 0 < 250 < second
    assert talk(server, namespace="alice")[1] >= second  # the same once more: answered from the prefix cache
    assert talk(server, namespace="bob")[0] == 0
    assert talk(server, namespace="carol", remember=False) == [0, 0]
    forget(server, "bob")
    assert talk(server, namespace="alice")[0] > 0
    forget(server, "alice")
    assert talk(server, namespace="alice")[0] == 0
    httpx.request("DELETE", f"{server}/chunks", json={"all": True, "namespace": "alice"})
    assert talk(server, namespace="alice")[0] == 0


def test_conversations_without_chunks_are_remembered_too(server, keys):
    text = [{"role": "user", "content": text_of(70, seed=77)}]
    found = [post(server, messages=text, prophetkv={"namespace": name}).json()["prophetkv"] for name in ("d", "d", "e")]
    assert [one["remembered_tokens"] > 0 for one in found] == [False, True, False]
    assert all(one["remembered_tokens"] + one["fresh_tokens"] == one["prompt_tokens"] for one in found)


def test_a_deleted_chunk_is_not_reused(server, keys):
    extra = text_of(70, seed=30)
    (chunk,) = httpx.put(f"{server}/chunks", json={"chunks": [extra], "namespace": "two"}, timeout=None).json()["data"]
    messages = [{"role": "user", "content": f"{extra}\n\n{text_of(8, seed=31)}"}]
    assert len(post(server, messages=messages).json()["prophetkv"]["chunks"]) == 1
    gone = httpx.request("DELETE", f"{server}/chunks", json={"chunks": [extra], "namespace": "two"}).json()
    assert gone["deleted"] == [chunk["key"]]
    assert post(server, messages=messages).json()["prophetkv"]["reused_tokens"] == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--engine", "vllm"], "--cache-dir"),
        (["--engine", "sglang"], "allowed: transformers, vllm"),
        (["--engine", "vllm", "--cache-dir", "x", "--vllm-args", "{"], "no JSON"),
        (["--engine", "vllm", "--cache-dir", "x", "--vllm-args", '{"model": "y"}'], "without model"),
        (["--vllm-args", "{}"], "goes with --engine vllm"),
    ],
)
def test_wrong_arguments_end_with_status_two(arguments, reason, tmp_path):
    done = subprocess.run([PROGRAM, "serve", *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, reason in done.stderr.replace("\n", " ")) == (2, True), done.stderr
