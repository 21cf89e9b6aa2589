"""The stores under which each interop test runs: the embedded ones; and, marked long, MongoDB and S3."""

from __future__ import annotations

import json
import uuid

import pytest

URL_PREFIX = "/internal"


@pytest.fixture(scope="module", params=["embedded", pytest.param("MongoDB and S3", marks=pytest.mark.long)])
def server_arguments(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of `flserve up`, beside the data directory and the ports."""
    settings = {"custom_url_prefix": URL_PREFIX}
    if request.param != "embedded":
        mongo_url, s3 = request.getfixturevalue("mongo_url"), request.getfixturevalue("s3_server")
        name = f"interop-{uuid.uuid4().hex[:8]}"
        settings |= {
            "mongo_url": mongo_url,
            "mongo_database": name,
            "s3_endpoint_url": s3.endpoint_url,
            "s3_access_key": s3.access_key,
            "s3_secret_key": s3.secret_key,
            "s3_model_bucket": f"{name}-models",
            "s3_context_bucket": f"{name}-context",
            "s3_prediction_bucket": f"{name}-prediction",
        }
    file = tmp_path_factory.mktemp("config") / "flserve.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    return ["--config", str(file)]
