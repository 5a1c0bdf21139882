"""Reads `multipart/form-data` as it comes. A file part goes to the disk, a text part may have 4 KB and not more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from arbor_core.application.file_service import LIFETIME, FileService
from arbor_core.application.objects import FileObject, UploadPart
from arbor_core.application.upload_service import UploadService
from arbor_core.config.settings import LimitsConfig
from arbor_core.files.repository import PURPOSES
from arbor_core.files.uploads import UploadRow
from arbor_core.files.writer import Incoming, too_large
from arbor_core.types import CLOSE, NO_RETRY, ApiError

from .requests import AnyRequest

log = logging.getLogger(__name__)
TEXT_BYTES = 4096
HEADER_BYTES = 8192
PARTS = 16
OVERHEAD_BYTES = 1 << 20
"""What a form may have beside its file: more than its parts' headers and texts can come to."""
NAMES = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": LIFETIME[0], "maximum": LIFETIME[1]},
    },
}
"""JSON Schema of the form, for the API's document."""
PART_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "format": "binary"}},
}


async def receive(request: AnyRequest, files: FileService, owner: str) -> FileObject:
    """Store the file of `POST /v1/files`; whatever is wrong with the form, nothing of it stays on the disk.

    Raises:
        ApiError: saying what is wrong with the form.
    """
    await files.expire()
    async with files.incoming() as part:
        form = FileForm(part)
        await read(request, form, files.limits)
        purpose, lifetime = form.finished()
        return await files.commit(part, owner, form.filename, purpose, lifetime)


async def receive_part(request: AnyRequest, uploads: UploadService, upload: UploadRow) -> UploadPart:
    """Store a part of an upload; whatever is wrong with the form, nothing of it stays on the disk.

    Raises:
        ApiError: saying what is wrong with the form, or that the upload is no longer pending.
    """
    async with uploads.incoming() as part:
        form = Form(part, "data")
        await read(request, form, uploads.limits)
        form.require()
        return await uploads.add(upload, part)


async def read(request: AnyRequest, form: Form, limits: LimitsConfig) -> None:
    """Take a form as it comes.

    Raises:
        ApiError: saying what is wrong with it.
    """
    length = request.headers.get("content-length", "")
    if length.isdigit():
        form.part.require_room(max(0, int(length) - OVERHEAD_BYTES))
    parser = PushMultipartParser(boundary(request), max_header_size=HEADER_BYTES, max_segment_count=PARTS)
    try:
        with parser:
            async for chunk in chunks(request, form.part, limits):
                for event in parser.parse(chunk):
                    await form.take(event)
    except MultipartError as error:
        raise _invalid(f"{error}") from None


def boundary(request: AnyRequest) -> str:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != "multipart/form-data":
        message = f"Expected a body of type multipart/form-data, got '{kind[:80]}'."
        raise ApiError(415, message, "invalid_multipart", headers=CLOSE)
    found = str(options.get("boundary", ""))
    if not 0 < len(found) <= 256 or not found.isascii() or not found.isprintable():
        raise _invalid("the content-type header has no boundary that can be used")
    return found


async def chunks(request: AnyRequest, part: Incoming, limits: LimitsConfig) -> AsyncIterator[bytes]:
    """The body as it comes.

    Raises:
        ApiError: it is longer than a file may be, it stopped coming or comes too slowly, or the client went away.
    """
    total, pace = 0, Pace(limits.upload_idle_seconds, limits.upload_bytes_per_second)
    while True:
        message = await pace.next(request)
        if message["type"] == "http.disconnect":
            log.info("an upload ended after %d bytes: the client went away", total)
            raise ApiError(400, "The client went away during the upload.", "upload_aborted")
        total += len(message["body"])
        if total > part.most + OVERHEAD_BYTES:
            raise too_large(part.most, part.param)
        if message["body"]:
            yield message["body"]
        if not message.get("more_body"):
            return


class Pace:
    """How fast a body comes, as far as that is its client's doing: what counts is the time spent waiting for it."""

    def __init__(self, window: float, rate: float) -> None:
        """`window`: seconds of waiting over which the average must be at least `rate` bytes a second."""
        self.window, self.rate = window, rate
        self.waited, self.came = 0.0, 0

    async def next(self, request: AnyRequest) -> Any:
        """The next message of the body.

        Raises:
            ApiError: 408: there was none within a window, or too little in the last one.
        """
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.window):
                message: Any = await request.receive()
        except TimeoutError:
            raise _given_up(f"Nothing came for {self.window:g} seconds (limits.upload_idle_seconds)") from None
        self.waited += time.monotonic() - began
        self.came += len(message.get("body", b""))
        if self.waited >= self.window and message.get("more_body"):
            if self.came < self.rate * self.waited:
                raise _given_up(
                    f"{self.came} bytes came in {self.waited:.3g} seconds, fewer than {self.rate:g} a second "
                    "(limits.upload_bytes_per_second)"
                )
            self.waited, self.came = 0.0, 0
        return message


def _given_up(reason: str) -> ApiError:
    return ApiError(408, f"{reason}: the upload was given up.", "upload_timeout", headers=NO_RETRY | CLOSE)


class Form:
    """The parts of a form, in whatever order they come; one of them is content, the others are short texts."""

    def __init__(self, part: Incoming, content: str, names: Sequence[str] = ()) -> None:
        """`part`: where the content goes. `content`: its name. `names`: those of the texts."""
        self.part, self.content, self.names = part, content, (content, *names)
        self.filename = ""
        self.texts: dict[str, bytes] = {}
        self.seen: set[str] = set()
        self.name, self.is_file = "", False

    async def take(self, event: MultipartSegment | bytes | bytearray | None) -> None:
        """The next thing that the parser found: a part's headers, some of its bytes, or its end (None)."""
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is None:
            self._check()
        elif self.is_file:
            await self.part.write(bytes(event))
        else:
            self.texts[self.name] += event
            if len(self.texts[self.name]) > TEXT_BYTES:
                message = f"The part '{self.name[:80]}' has more than {TEXT_BYTES} bytes; only 'file' may."
                raise ApiError(413, message, "field_too_large", self.name[:80], CLOSE)

    def _begin(self, segment: MultipartSegment) -> None:
        self.name = segment.name or ""
        if self.name in self.seen:
            name = self.name[:80]
            raise ApiError(400, f"The part '{name}' came twice.", "duplicate_parameter", name, CLOSE)
        self.seen.add(self.name)
        self.is_file = self.name == self.content and self.is_content(segment)
        if self.is_file:
            self.filename = segment.filename or ""
        else:
            self.texts[self.name] = b""

    def is_content(self, segment: MultipartSegment) -> bool:
        """Whether the part of that name may be content."""
        return True

    def _check(self) -> None:
        """Refuse a wrong text part as soon as it is there."""

    def text(self, name: str) -> str:
        """A text part."""
        try:
            return self.texts.get(name, b"").decode()
        except UnicodeDecodeError:
            raise _invalid(f"the part '{name}' is not UTF-8") from None

    def require(self, *others: str) -> None:
        """Make sure, once all parts are there, that the content is, and these others, and none that nobody knows.

        Raises:
            ApiError: it is not so.
        """
        for name in (*others, self.content):
            if name not in self.seen:
                raise ApiError(400, f"Missing required parameter: '{name}'.", "missing_required_parameter", name)
        if self.content in self.texts:
            message = f"The part '{self.content}' has no filename: send it as a file, not as a text field."
            raise ApiError(400, message, "missing_required_parameter", self.content)
        if unknown := sorted(self.seen - set(self.names)):
            message = f"Unknown parameter: '{unknown[0][:80]}'. Known are {', '.join(self.names)}."
            raise ApiError(400, message, "unknown_parameter", unknown[0][:80])
        if self.part.bytes == 0:
            raise ApiError(400, f"'{self.content}' is empty.", "empty_file", self.content)


class FileForm(Form):
    """What `POST /v1/files` takes."""

    def __init__(self, part: Incoming) -> None:
        super().__init__(part, "file", NAMES)

    def is_content(self, segment: MultipartSegment) -> bool:
        return segment.filename is not None

    def _check(self) -> None:
        """Refuse a wrong text part as soon as it is there: the file may be large, and mostly comes after it."""
        if self.name == "purpose" and self.text("purpose") not in PURPOSES:
            message = f"Invalid 'purpose': '{self.text('purpose')[:80]}' is not one of {', '.join(PURPOSES)}."
            raise ApiError(400, message, "invalid_value", "purpose", CLOSE)
        if self.name == "expires_after[anchor]" and self.text(self.name) != "created_at":
            message = "Invalid 'expires_after[anchor]': expected 'created_at'."
            raise ApiError(400, message, "invalid_value", self.name, CLOSE)
        if self.name == "expires_after[seconds]":
            text = self.text(self.name)
            if not (text.isascii() and text.isdigit() and LIFETIME[0] <= int(text[:9]) <= LIFETIME[1]):
                message = f"Invalid '{self.name}': expected an integer from {LIFETIME[0]} to {LIFETIME[1]}."
                raise ApiError(400, message, "invalid_value", self.name, CLOSE)

    def finished(self) -> tuple[str, int | None]:
        """The purpose and the lifetime (seconds), once all parts are there.

        Raises:
            ApiError: one is missing, or there is one that nobody knows.
        """
        self.require("purpose")
        anchor, seconds = NAMES[1:]
        if (anchor in self.seen) != (seconds in self.seen):
            missing = seconds if anchor in self.seen else anchor
            raise ApiError(400, f"Missing required parameter: '{missing}'.", "missing_required_parameter", missing)
        return self.text("purpose"), int(self.text(seconds)) if seconds in self.seen else None


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"The body is not valid multipart/form-data: {reason}.", "invalid_multipart", headers=CLOSE)
