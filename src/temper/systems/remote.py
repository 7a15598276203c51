"""A model behind any OpenAI-compatible endpoint: it generates, and sometimes says its log-probabilities."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

from temper.core.errors import ConfigError, ModelError, NeedsError
from temper.core.types import Json, Message
from temper.systems.base import Reply, Sampling, System

__all__ = ["Remote"]

logger = logging.getLogger(__name__)

RETRY_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
MAX_WAIT_S = 60.0


@dataclass(frozen=True, eq=False)
class Remote(System):
    """An endpoint's model. The key is read from the environment when a call is made and kept nowhere."""

    model: str
    base_url: str | None = None
    """None is the client's own default."""
    system_prompt: str = "default"
    """ "default" and "none" send none; any other text goes first unless the messages bring their own."""
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    requests_per_minute: float | None = None
    timeout_s: float = 60.0
    max_retries: int = 5
    first_wait_s: float = 0.5
    """Doubled after each failed try, plus some chance; a Retry-After header wins."""
    kind: ClassVar[str] = "Remote"
    _state: _State = field(default_factory=lambda: _State(), repr=False)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("The remote system names no model", cure="Write openai:MODEL.")
        if self.concurrency < 1 or self.max_retries < 0 or self.timeout_s <= 0:
            raise ConfigError(
                "Remote needs concurrency >= 1, max_retries >= 0 and timeout_s > 0",
                where=f"{self.concurrency}, {self.max_retries}, {self.timeout_s}",
            )
        if self.requests_per_minute is not None and self.requests_per_minute <= 0:
            raise ConfigError("requests_per_minute must be above 0", where=str(self.requests_per_minute))

    @property
    def spec(self) -> str:  # type: ignore[override]
        """`openai:MODEL`."""
        return f"openai:{self.model}"

    @property
    def fingerprint(self) -> str:
        """Hash of endpoint, model name and system prompt: weights behind an endpoint cannot be seen."""
        text = "\0".join((self.base_url or "", self.model, self.system_prompt))
        return hashlib.sha256(text.encode()).hexdigest()

    def probe(self) -> Mapping[str, bool | None]:
        """What is known without a call: `logprobs` is None until the endpoint was asked for them."""
        inside = ("hidden", "attention", "grads", "embed", "classify", "see", "draw")
        return {"generate": True, "logprobs": self._state.gives_logprobs, **dict.fromkeys(inside, False)}

    def probe_logprobs(self) -> bool:
        """Ask for one token with log-probabilities; afterwards `probe` knows."""
        if self._state.gives_logprobs is None:
            self.complete([[Message("user", "Hi")]], Sampling(max_new_tokens=1), logprobs=True)
        return bool(self._state.gives_logprobs)

    def cure_for(self, capability: str) -> str:
        """What a user can do about a missing capability."""
        if capability == "logprobs" and self._state.gives_logprobs is None:
            return "Call probe_logprobs() first: not every endpoint gives them."
        return "An endpoint only shows text; load the model's weights here for that."

    def complete(
        self,
        messages_list: Sequence[Sequence[Message]],
        sampling: Sampling,
        *,
        logprobs: bool = False,
    ) -> list[Reply]:
        """One reply a conversation, in order, at most `concurrency` at a time.

        `Reply.info` holds "model", "finish_reason", "num_reply_tokens" and, if asked for and given,
        "tokens" and "logprobs" (nats). Raises NeedsError when the endpoint refuses the key or cannot
        be reached, ModelError when it answers nonsense or refuses a request.
        """
        if sampling.top_k:
            raise NeedsError(
                "An OpenAI-compatible endpoint has no top_k", cure="Set top_k to 0 and use top_p."
            )
        client = self._client()
        calls = [self._request(messages, sampling, logprobs) for messages in messages_list]
        with ThreadPoolExecutor(min(self.concurrency, max(1, len(calls)))) as pool:
            futures = [pool.submit(self._one, client, call) for call in calls]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def _client(self) -> Any:
        try:
            import openai
        except ImportError:
            raise NeedsError(
                "Remote systems need the openai client", cure="Install it: pip install 'temper-ml[remote]'."
            ) from None
        key = os.environ.get(self.key_env)
        if not key and self.base_url is None:
            raise NeedsError(
                f"No key in ${self.key_env}", cure=f"export {self.key_env}=..., or give a base_url."
            )
        # Retries are ours: the client's own know nothing of our rate limit.
        return openai.OpenAI(
            api_key=key or "none", base_url=self.base_url, timeout=self.timeout_s, max_retries=0
        )

    def _request(self, messages: Sequence[Message], sampling: Sampling, logprobs: bool) -> dict[str, Any]:
        sent = list(messages)
        if self.system_prompt not in ("default", "none") and all(m.role != "system" for m in sent):
            sent.insert(0, Message("system", self.system_prompt))
        call: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": m.role, "content": m.content} for m in sent],
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        if sampling.stop:
            call["stop"] = list(sampling.stop)
        if logprobs and self._state.gives_logprobs is not False:
            call["logprobs"] = True
        return call

    def _one(self, client: Any, call: dict[str, Any]) -> Reply:
        answer = self._retried(lambda: client.chat.completions.create(**call))
        reply = self._read(answer)
        if call.get("logprobs"):
            self._state.gives_logprobs = "logprobs" in reply.info
        return reply

    def _retried(self, send: Callable[[], Any]) -> Any:
        """What `send` gives, tried again after failures that may pass."""
        import openai

        for tries in range(self.max_retries + 1):
            self._state.wait_turn(self.requests_per_minute)
            try:
                return send()
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                if tries == self.max_retries or not _may_pass(error):
                    raise self._explained(error, tries + 1) from None
                wait_s = _wait_s(error, self.first_wait_s, tries)
                logger.info("%s: %s; again in %.1f s", self.spec, type(error).__name__, wait_s)
                time.sleep(wait_s)
            except ValueError as error:  # a body that is not JSON
                raise self._nonsense(str(error)) from None
        raise AssertionError("the loop returns or raises")

    def _read(self, answer: Any) -> Reply:
        try:
            choice = answer.choices[0]
            text, reason, usage = choice.message.content or "", choice.finish_reason, answer.usage
            info: dict[str, Json] = {"model": answer.model, "finish_reason": reason}
            info["num_reply_tokens"] = usage.completion_tokens if usage else None
            num_prompt_tokens = usage.prompt_tokens if usage else 0
            listed = choice.logprobs.content if choice.logprobs else None
            if listed:
                info["tokens"] = [entry.token for entry in listed]
                info["logprobs"] = [float(entry.logprob) for entry in listed]
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise self._nonsense(f"{error} in {str(answer)[:80]!r}") from None
        return Reply(text, [], "length" if reason == "length" else "stop", num_prompt_tokens, info)

    def _nonsense(self, detail: str) -> ModelError:
        return ModelError(
            f"The endpoint's answer is not a chat completion: {detail}",
            where=f"{self.spec} at {self.base_url or 'the default address'}",
            cure="Check that base_url ends where /chat/completions begins, often in /v1.",
        )

    def _explained(self, error: Any, num_tries: int) -> NeedsError | ModelError:
        import openai

        where = f"{self.spec} at {self.base_url or 'the default address'}, {num_tries} tries"
        if isinstance(error, openai.APITimeoutError):
            return NeedsError(f"No answer within {self.timeout_s:g} s", where=where, cure="Raise timeout_s.")
        if isinstance(error, openai.APIConnectionError):
            return NeedsError(
                "The endpoint cannot be reached", where=where, cure="Check base_url and network."
            )
        status = error.status_code
        if status in (401, 403):
            return NeedsError(
                f"The endpoint refuses the key ({status})",
                where=where,
                cure=f"Set ${self.key_env} to a valid key.",
            )
        if status == 404:
            return NeedsError(
                "The endpoint has no such model or address (404)", where=where, cure="Check both."
            )
        if status in RETRY_STATUS:
            return NeedsError(
                f"The endpoint keeps answering {status}",
                where=where,
                cure="Lower concurrency or try again later.",
            )
        return ModelError(f"The endpoint refuses the request ({status}): {_said(error)}", where=where)


class _State:
    """What a Remote learns while it is used: the next free moment, and whether log-probs come."""

    def __init__(self) -> None:
        self.gives_logprobs: bool | None = None
        self._lock = threading.Lock()
        self._next_s = 0.0

    def wait_turn(self, requests_per_minute: float | None) -> None:
        """Space requests evenly, over all threads."""
        if requests_per_minute is None:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next_s)
            self._next_s = turn + 60.0 / requests_per_minute
        time.sleep(turn - now)


def _may_pass(error: Any) -> bool:
    status = getattr(error, "status_code", None)
    return status is None or status in RETRY_STATUS


def _wait_s(error: Any, first_wait_s: float, tries: int) -> float:
    """Seconds until the next try: what Retry-After says, else doubling with up to a quarter more."""
    response = getattr(error, "response", None)
    said = response.headers.get("retry-after", "") if response is not None else ""
    try:
        return min(MAX_WAIT_S, max(0.0, float(said)))
    except ValueError:
        return min(MAX_WAIT_S, first_wait_s * 2**tries * (1 + random.random() / 4))


def _said(error: Any) -> str:
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return str(message or body or error.message)[:300]
