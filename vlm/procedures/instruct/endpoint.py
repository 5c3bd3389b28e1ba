"""Models behind an OpenAI-compatible endpoint: `POST URL/chat/completions`.

Every server that speaks this form will do: OpenAI's own, vLLM, SGLang, llama.cpp, Ollama and most providers.
"""

import base64
import email.utils
import http.client
import io
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from PIL import Image

from vlm.errors import UserError
from vlm.procedures.instruct.answers import Rejected
from vlm.procedures.instruct.models import Reply, Turn
from vlm.procedures.instruct.rate_limiter import RateLimiter
from vlm.procedures.instruct.task_specs import Sampling
from vlm.sample import Sample

_BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
_THIS_REQUEST = (400, 413, 422)
_LONGEST_PAUSE = 900.0
_SENT_AS_STORED = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class _Failure:
    """A request that may succeed later.

    Attributes:
        what: happened.
        pause: seconds that the server asks everybody to wait.
        is_plain_wrong: it cannot be expected to go away where nothing has ever succeeded.
    """

    what: str
    pause: float = 0.0
    is_plain_wrong: bool = False


class Endpoint:
    """A model behind an endpoint.

    Args:
        url: base, such as https://host/v1; or the whole address that ends in /chat/completions.
        model: its name there.
        key: sent as bearer token. It stands in no message and no file.
        fields: put into every request, over what stands there; None takes a field out.
        tries: at one request.
        timeout: seconds without a byte.

    Raises:
        UserError: the address or the key cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        pace: RateLimiter,
        key: str | None = None,
        fields: Mapping[str, Any] | None = None,
        tries: int = 6,
        timeout: float = 120.0,
    ) -> None:
        self.url = _address(url)
        self.name = model
        self.pace = pace
        self.fields = dict(fields or {})
        self.tries = tries
        self.timeout = timeout
        self._key = key
        self._has_answered = False
        self._opener = urllib.request.build_opener(_NoRedirects)
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise UserError("the key holds blanks or characters that no key has; copy it again")

    def reply(self, turns: Sequence[Turn], *, seed: int, sampling: Sampling) -> Reply:
        body = {
            "model": self.name,
            "messages": [_message(turn) for turn in turns],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed % 2**31,  # some servers read 32 bits
        }
        body = {key: value for key, value in {**body, **self.fields}.items() if value is not None}
        data = json.dumps(body).encode()
        waits = Random(seed)
        last = ""
        for number in range(1, self.tries + 1):
            self.pace.wait()
            found = self._once(data)
            if isinstance(found, Reply):
                self._has_answered = True
                return found
            last = found.what
            if found.is_plain_wrong and not self._has_answered:
                raise UserError(f"{self.url}: {found.what}; correct --endpoint, or start the server")
            if found.pause > _LONGEST_PAUSE:
                raise UserError(f"{self.url}: {found.what}; it asks to wait {found.pause:.0f} s, start again then")
            if found.pause:
                self.pace.pause(found.pause)
            if number < self.tries:
                # apart from each other, or all threads would come back at the same moment
                self.pace.clock.sleep(max(found.pause, min(60.0, 2.0 ** (number - 1)) * waits.uniform(0.5, 1.0)))
        raise UserError(
            f"{self.url}: no answer in {self.tries} tries, the last: {last}; the same command goes on, with "
            "fewer --requests-per-minute or less --parallel if it is too much"
        )

    def _once(self, data: bytes) -> Reply | _Failure:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "vlm"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return self._read(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return self._status(error.code, _body(error), error.headers)
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                return _Failure(f"no answer within {self.timeout:g} s")
            reason = error.reason.strerror if isinstance(error.reason, OSError) else None
            if isinstance(error.reason, ssl.SSLError):
                reason = error.reason.reason
            return _Failure(f"cannot be reached ({self._safe(reason or error.reason)})", is_plain_wrong=True)
        except TimeoutError:
            return _Failure(f"no answer within {self.timeout:g} s")
        except (OSError, http.client.HTTPException) as error:
            return _Failure(f"broke off ({self._safe(error) or type(error).__name__})")

    def _read(self, data: bytes) -> Reply | _Failure:
        try:
            answer = json.loads(data)
            choice = answer["choices"][0]
            message, end = choice["message"], choice.get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
            if not isinstance(text, str | None):
                raise TypeError
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            shown = self._safe(data[:200].decode(errors="replace"))
            return _Failure(f"what it answers is no chat completion: {shown[:120]!r}", is_plain_wrong=True)
        usage = answer.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        tokens = tokens if isinstance(tokens, int) else None
        if refusal or end == "content_filter":
            return Reply(text or "", "refused", tokens)
        return Reply(text or "", "length" if end == "length" else "stop", tokens)

    def _status(self, status: int, data: bytes, headers: Any) -> _Failure:
        """What an error status means.

        Raises:
            UserError: no request will succeed.
            Rejected: this one will not.
        """
        code, said = _error(data)
        said = self._safe(said or http.client.responses.get(status, "no reason given"))
        what = f"{status}: {said}"
        if status in (401, 403):
            remedy = "the variable that --key-env names holds another key" if self._key else "name one with --key-env"
            raise UserError(f"{self.url}: refuses the key, {remedy} ({what})")
        if status == 404:
            raise UserError(f"{self.url}: no model {self.name!r}, or no such address; see --model, --endpoint ({what})")
        if status == 402 or code in ("insufficient_quota", "billing_hard_limit_reached"):
            raise UserError(f"{self.url}: the quota is used up, the same command goes on when there is more ({what})")
        if status in _THIS_REQUEST:
            raise Rejected(f"the endpoint refuses the request ({what})"[:200])
        if status in _BUSY:
            return _Failure(what, pause=_retry_after(headers.get("Retry-After")))
        if 300 <= status < 400:
            raise UserError(f"{self.url}: sends on to {self._safe(headers.get('Location'))!r}; give that as --endpoint")
        raise UserError(f"{self.url}: cannot be used ({what}); correct --endpoint")

    def _safe(self, value: object) -> str:
        """In one line and without the key: some servers repeat it."""
        text = " ".join(str(value).split())[:300]
        return text.replace(self._key, "***") if self._key else text


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key must not travel to wherever a server points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or " " in url:
        raise UserError(f"--endpoint {url}: no address; write http://HOST:PORT/v1 or https://HOST/v1")
    if parts.username or parts.password:
        raise UserError("--endpoint: keep name and password out of the address; name a variable with --key-env")
    path = parts.path.rstrip("/")
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def _message(turn: Turn) -> dict[str, Any]:
    if turn.picture is None:
        return {"role": turn.role, "content": turn.text}
    image = {"type": "image_url", "image_url": {"url": data_uri(turn.picture)}}
    return {"role": turn.role, "content": [image, {"type": "text", "text": turn.text}]}


def data_uri(sample: Sample) -> str:
    """The one image of a sample, as it is trained on: files as they are stored, others as PNG.

    A rotation noted in EXIF is not applied in training, so it must not be applied by the endpoint either.

    Raises:
        SampleError: the image cannot be read.
    """
    (file,) = sample.images
    picture = file.read(sample)  # the whole of it: half a file would only fail at the other end
    data = file.path.read_bytes() if file.path is not None else file.data or b""
    with Image.open(io.BytesIO(data)) as image:
        kind = _SENT_AS_STORED.get(image.format or "")
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    if kind is None or turned:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        kind, data = "image/png", buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _body(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(100_000)
    except (OSError, http.client.HTTPException):
        return b""


def _error(data: bytes) -> tuple[str | None, str | None]:
    """(code, message) of an error's body, as OpenAI and those who follow it write them."""
    try:
        found = json.loads(data)
    except ValueError:
        return None, None
    inner = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(inner, dict):
        message = inner.get("message") or inner.get("detail")
        return inner.get("code"), None if message is None else str(message)
    return None, inner if isinstance(inner, str) else None


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which are given as such or as a date; 0 where there are none."""
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
