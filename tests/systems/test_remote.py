"""Remote systems against a real HTTP server on this machine."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from temper.core.errors import ConfigError, ModelError, NeedsError
from temper.core.types import Message
from temper.systems.base import Sampling
from temper.systems.loading import load_base
from temper.systems.remote import Remote

HI = [Message("user", "hi")]
KEY = "sk-very-secret-value"


class Server(ThreadingHTTPServer):
    """Answers from a script of steps, then echoes; remembers what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.keys, self.times = [], [], [], []
        self.delay_s, self.logprobs, self.active, self.most_active = 0.0, True, 0, 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append(body)
            server.keys.append(self.headers["Authorization"])
            server.times.append(time.monotonic())
            server.active += 1
            server.most_active = max(server.most_active, server.active)
            step = server.script.pop(0) if server.script else None
        time.sleep(server.delay_s if step is None else step.get("delay_s", 0))
        with server.lock:
            server.active -= 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that stopped waiting
            self.answer(step or {}, body)

    def answer(self, step, body):
        text = step.get("body")
        if text is None:
            text = json.dumps(completion(body, self.server.logprobs))
        self.send_response(step.get("status", 200))
        self.send_header("Content-Type", step.get("type", "application/json"))
        for name, value in step.get("headers", {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


def completion(body, logprobs):
    said = "echo " + body["messages"][-1]["content"]
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
    if body.get("logprobs") and logprobs:
        choice["logprobs"] = {"content": [{"token": "echo", "logprob": -0.25, "top_logprobs": []}]}
    if body["max_tokens"] == 1:
        choice["finish_reason"] = "length"
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m-1",
        "choices": [choice],
        "usage": usage,
    }


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def remote(server, **more):
    return Remote("m", server.url, **{"first_wait_s": 0.01, "timeout_s": 5.0, **more})


def test_replies_come_in_order_with_all_settings_sent(server):
    system = load_base("openai:m", base_url=server.url, system_prompt="Be brief.")
    sampling = Sampling(max_new_tokens=9, temperature=0.5, top_p=0.9, seed=3, stop=("X",))
    replies = system.complete([[Message("user", f"q{i}")] for i in range(20)], sampling)
    assert [r.text for r in replies] == [f"echo q{i}" for i in range(20)]
    assert replies[0].num_prompt_tokens == 7
    assert replies[0].info == {"model": "m-1", "finish_reason": "stop", "num_reply_tokens": 2}
    sent = next(b for b in server.seen if b["messages"][-1]["content"] == "q4")
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q4"}]
    wanted = {"model": "m", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["X"]}
    assert {k: sent[k] for k in wanted} == wanted
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert system.spec == "openai:m"


def test_finish_length_and_empty_list(server):
    assert remote(server).complete([HI], Sampling(max_new_tokens=1))[0].finish == "length"
    assert remote(server).complete([], Sampling()) == []


def test_busy_then_fine_honours_retry_after(server):
    server.script = [{"status": 429, "headers": {"Retry-After": "0.3"}, "body": "{}"}]
    assert remote(server).complete([HI], Sampling())[0].text == "echo hi"
    assert len(server.times) == 2
    assert server.times[1] - server.times[0] >= 0.3


def test_server_errors_are_tried_again_with_growing_waits(server):
    server.script = [{"status": s, "body": "{}"} for s in (500, 503, 502)]
    assert remote(server, first_wait_s=0.05).complete([HI], Sampling())[0].text == "echo hi"
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert gaps[0] >= 0.05
    assert gaps[1] >= 0.1
    assert gaps[2] >= 0.2


def test_a_server_that_stays_broken_is_given_up(server):
    server.script = [{"status": 500, "body": "{}"}] * 10
    with pytest.raises(NeedsError, match=r"keeps answering 500.*3 tries"):
        remote(server, max_retries=2).complete([HI], Sampling())
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("body", "type_"),
    [
        ("<html>hello</html>", "text/html"),
        ("{not json", "application/json"),
        ('{"choices": []}', "application/json"),
        ('{"hello": 1}', "application/json"),
        ("[]", "application/json"),
    ],
)
def test_malformed_bodies_are_one_clear_error(server, body, type_):
    server.script = [{"body": body, "type": type_}]
    with pytest.raises(ModelError, match=r"not a chat completion.*base_url"):
        remote(server).complete([HI], Sampling())


def test_refusals_are_not_tried_again(server):
    error = json.dumps({"error": {"message": "max_tokens is too large"}})
    server.script = [
        {"status": 400, "body": error},
        {"status": 401, "body": "{}"},
        {"status": 404, "body": "{}"},
    ]
    with pytest.raises(ModelError, match="max_tokens is too large"):
        remote(server).complete([HI], Sampling())
    with pytest.raises(NeedsError, match="refuses the key"):
        remote(server).complete([HI], Sampling())
    with pytest.raises(NeedsError, match="no such model"):
        remote(server).complete([HI], Sampling())
    assert len(server.seen) == 3


def test_slow_answers_time_out_and_are_tried_again(server):
    server.script = [{"delay_s": 0.6}]
    assert remote(server, timeout_s=0.2).complete([HI], Sampling())[0].text == "echo hi"
    server.script = [{"delay_s": 0.6}] * 2
    with pytest.raises(NeedsError, match=r"No answer within 0\.2 s.*timeout_s"):
        remote(server, timeout_s=0.2, max_retries=1).complete([HI], Sampling())


def test_nobody_there(server):
    gone = Remote("m", "http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(NeedsError, match="cannot be reached"):
        gone.complete([HI], Sampling())


def test_concurrency_is_used_and_limited(server):
    server.delay_s = 0.05
    remote(server, concurrency=3).complete([HI] * 12, Sampling())
    assert server.most_active == 3


def test_rate_limit_spaces_requests(server):
    remote(server, requests_per_minute=600, concurrency=8).complete([HI] * 4, Sampling())
    assert max(server.times) - min(server.times) >= 0.28


def test_logprobs_are_found_out_not_claimed(server):
    system = remote(server)
    assert system.probe()["logprobs"] is None
    assert system.capabilities == {"generate"}
    with pytest.raises(NeedsError, match="probe_logprobs"):
        system.require("logprobs")
    reply = system.complete([HI], Sampling(), logprobs=True)[0]
    assert reply.info["tokens"] == ["echo"]
    assert reply.info["logprobs"] == [-0.25]
    system.require("logprobs")
    server.logprobs = False
    silent = remote(server)
    assert not silent.probe_logprobs()
    assert silent.probe()["logprobs"] is False
    assert len(server.seen) == 2


def test_what_an_endpoint_cannot_do(server):
    for capability in ("grads", "hidden", "attention"):
        with pytest.raises(NeedsError, match=f"lacks '{capability}'.*weights"):
            remote(server).require(capability)
    with pytest.raises(ConfigError, match="not a capability"):
        remote(server).require("gradients")
    with pytest.raises(NeedsError, match="top_k"):
        remote(server).complete([HI], Sampling(top_k=5))


def test_the_key_is_nowhere_to_be_read(server, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    server.script = [{"status": 500, "body": "{}"}, {"status": 401, "body": "{}"}]
    system = remote(server)
    with pytest.raises(NeedsError) as caught:
        system.complete([HI], Sampling())
    assert KEY not in caplog.text + str(caught.value) + repr(system) + system.fingerprint
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(NeedsError, match="No key in"):
        Remote("m").complete([HI], Sampling())


def test_fingerprint_names_endpoint_model_and_prompt(server):
    same = {remote(server).fingerprint, remote(server, concurrency=2).fingerprint}
    assert len(same) == 1
    assert remote(server, system_prompt="Be brief.").fingerprint not in same
    assert Remote("other", server.url).fingerprint not in same


@pytest.mark.parametrize(
    "wrong", [{"concurrency": 0}, {"timeout_s": 0}, {"requests_per_minute": 0}, {"model": ""}]
)
def test_wrong_settings(wrong):
    with pytest.raises(ConfigError):
        Remote(**{"model": "m", **wrong})
