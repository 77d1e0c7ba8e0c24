"""An emulator of Google Cloud Storage, which serves a bucket over HTTP, as fixtures for a test module to import."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import fsspec
import pytest
from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

from llava_cot_jax.paths import as_path, bucket_filesystem

NUMBERS = itertools.count()


class Server(ThreadingHTTPServer):
    """The emulator's own serves one connection at a time, and clients open several."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up early are no news."""


CREATING = Lock()


def upload_if_absent(request: Any, response: Any, storage: Any, upload: Callable[..., Any]) -> None:
    """Upload as Google does: where asked to create a file, refuse to replace one, which the emulator does not know."""
    with CREATING:
        if request.query.get("ifGenerationMatch") == ["0"]:
            with contextlib.suppress(NotFound):
                storage.get_file_obj(request.params["bucket_name"], request.data["meta"]["name"])
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        upload(request, response, storage)


@pytest.fixture(name="host", scope="module", autouse=True)
def bucket_host() -> Iterator[None]:
    """The emulator, where gcsfs, array_record and tensorstore look for it; it has one bucket, ``bucket``."""
    with pytest.MonkeyPatch.context() as patch:
        with pytest.MonkeyPatch.context() as making:
            making.setattr(emulator.server, "HTTPServer", Server)
            server = emulator.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
            server.start()
        address = f"http://localhost:{server._api._httpd.server_port}"
        patch.setattr(objects, "_multipart_upload", partial(upload_if_absent, upload=objects._multipart_upload))
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", address)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # as_path does so, but a test may import gcsfs first
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        yield
        server.stop()


@pytest.fixture(name="folder")
def bucket_folder() -> Path:
    """A folder in the bucket, empty."""
    return as_path(f"gs://bucket/{next(NUMBERS)}")


def upload(local: Path, folder: Path) -> Path:
    bucket_filesystem().put(f"{local}/", f"{folder}/", recursive=True)
    return folder
